#!/bin/bash
# A fit on the machines of a SLURM cluster; what follows the file's name goes to `lit-align fit`:
#   sbatch experiments/cluster/slurm.sh -c experiments/real/dpo.yaml -c experiments/cluster/fsdp2.yaml --out runs/big
# A job that runs out of time, or that is preempted, is queued again and goes on from the last checkpoint in --out.
#SBATCH --job-name=lit_align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out
set -euo pipefail

# The signal reaches every process of the step, five minutes before the end: RunCheckpoint saves after the batch that they
# are in, and has the job queued again.
srun --kill-on-bad-exit=1 lit-align fit "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path last

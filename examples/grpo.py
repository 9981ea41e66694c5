"""GRPO with a verifier from Python, without the command line: python examples/grpo.py MODEL SUMS OUT.

SUMS is a file of rows with `prompt` and `reference`, the right number. OUT gets a Hugging Face folder.
"""

import functools
import sys

import torch
from lightning import Trainer, seed_everything

from lit_align import LengthReward, Network, NumericAnswer, PPOModule, PromptDataModule, Sampling, Source, SumReward


def main(model: str, sums: str, out: str) -> None:
    """Train and save."""
    seed_everything(0)
    data = PromptDataModule(model, [Source(sums)], batch_size=4, val_fraction=0.1, max_length=512)
    module = PPOModule(
        Network(model),
        # 1 for the number of `reference`, else 0; and a little for a length near 16 tokens.
        reward=SumReward([NumericAnswer(marker="####|=|is"), LengthReward(16)], weights=[1.0, 0.1]),
        advantage="grpo",  # compares the completions of one prompt; no value model
        sampling=Sampling(max_new_tokens=32, samples=8, temperature=1.0),
        kl_coef=0.04,
        kl_in="loss",
        kl_estimator="k3",
        micro_batch_size=8,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-6),
    )
    # An iteration takes `epochs` (4) optimizer steps on the completions of 4 prompts.
    trainer = Trainer(max_steps=8, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    module.exported().save_pretrained(out)
    data.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

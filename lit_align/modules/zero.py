"""DeepSpeed's ZeRO: `strategy: zero1` slices the optimizer's state over processes, `zero2` the gradient as well."""

from __future__ import annotations

import contextlib
import copy
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.imports import RequirementCache
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

DEEPSPEED = RequirementCache("deepspeed>=0.19.8,<0.20")


class ZeROStrategy(DDPStrategy):
    """DDP whose optimizer is DeepSpeed's: each process keeps and steps a slice of all weights, end to end, in fp32.

    Lightning's DeepSpeedStrategy divides the loss of each micro-batch by their number before its backward. Here
    gradients of several micro-batches or ranks stay sums until the step, and are divided there by what the module
    counted over all: DeepSpeed does that where it takes fp16's loss scale out, before it clips. Weights, in fp32 under
    autocast or not, are whole on every process, and so are checkpoints: those of a single process.

    Args:
        stage: of ZeRO: 1 reduces the gradient once a step, 2 after every backward, and keeps a slice of it.
        bucket_size: numbers that are reduced and gathered at a time.
        process_group_backend: of torch.distributed; null for the device's own.
        timeout: of its operations.

    Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
    """

    engine: Any  # deepspeed.DeepSpeedEngine, while it trains
    _weights: list[list[nn.Parameter]]  # of each of the optimizer's groups, in the order in which they lie end to end

    def __init__(
        self,
        stage: int = 2,
        bucket_size: int = 200_000_000,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage}: strategy fsdp2 slices weights, too")
        if not DEEPSPEED:
            needed = f"{DEEPSPEED.requirement}: pip install 'lit_align[deepspeed]'"
            raise ValueError(f"trainer.strategy: zero{stage} needs {needed}")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.stage = stage
        self.bucket_size = bucket_size

    def configure_ddp(self) -> None:
        """Nothing: DeepSpeed wraps the optimizer, and the module stays as it is."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Hand the weights of the optimizer to DeepSpeed, and get its slices back in their place.

        Raises:
            ValueError: what is trained, or how, cannot be cut in slices; says what to use.
        """
        import deepspeed

        super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        check_training(optimizer, weights, trainer.gradient_clip_algorithm)
        buckets = min(self.bucket_size, sum(weight.numel() for weight in weights))
        config = {
            # DeepSpeed shall not count batches: a backward adds, a step is asked for.
            "managed_gradient_accumulation": False,
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,  # SGD
            "gradient_clipping": trainer.gradient_clip_val or 0.0,  # Lightning's own finds no gradient in the slices
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "reduce_bucket_size": buckets,
                "allgather_bucket_size": buckets + buckets % 2,
            },
        }
        assert self.lightning_module is not None
        with _local_rank(self.local_rank):
            self.engine, *_ = deepspeed.initialize(
                args=Namespace(device_rank=self.root_device.index or 0),
                model=_Seen(self.lightning_module),
                optimizer=optimizer,
                config=config,
            )
        # Kept: a checkpoint may be asked for when the engine is gone.
        self._weights = [list(group) for group in self.engine.optimizer.bit16_groups]

    def teardown(self) -> None:
        """Let the hooks of DeepSpeed go, too."""
        if hasattr(self, "engine"):
            self.engine.destroy()
            del self.engine
        super().teardown()

    # A step.

    def pre_backward(self, closure_loss: Tensor) -> None:
        """DeepSpeed prepares for the backward of what leaves a forward."""
        self.engine(closure_loss)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward, backward and hooks as ever; then DeepSpeed divides, clips and steps.

        Raises:
            FloatingPointError: it took no step, which it says nowhere, as the gradient is not finite; names the step
                before, and the last checkpoint.
        """
        assert self.lightning_module is not None
        # Private, because its public caller steps the optimizer, which is the engine's work here.
        result = self.precision_plugin._wrap_closure(self.lightning_module, optimizer, closure)
        self.engine.step()
        if not self.engine.was_step_applied():
            trainer = self.lightning_module.trainer
            checkpoint: Any = trainer.checkpoint_callback
            last = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
            kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise FloatingPointError(
                f"stopped after optimizer step {trainer.global_step}: the gradient of the next is not finite: lower "
                f"the learning rate, or look at the data; {kept}"
            )
        return result

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradient of the step that comes, before it is clipped."""
        self.engine.optimizer.loss_scale = 1.0 / scale

    def gradient_norm(self) -> torch.Tensor:
        """Of the step that was taken, before it was clipped."""
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64).cpu()

    # Checkpoints: the state of an optimizer as if there were no slices.

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathered, on the CPU, and in the order of the weights."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, weights in zip(optimizer.param_groups, self._weights, strict=True):
            (piece,) = group["params"]
            numbers = range(len(state), len(state) + len(weights))
            state |= {number: {} for number in numbers}
            groups.append({**group, "params": list(numbers)})
            for key, value in optimizer.state[piece].items():
                cut = isinstance(value, Tensor) and value.shape == piece.shape
                # Each its own: torch counts steps in place, for all weights that share the number.
                values = self._whole(value, weights) if cut else [copy.deepcopy(value) for _ in weights]
                for number, own in zip(numbers, values, strict=True):
                    state[number][key] = own
        return {"state": {number: own for number, own in state.items() if own}, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its slices."""
        for optimizer, told in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = {}
            groups = []
            for i, (group, weights) in enumerate(zip(told["param_groups"], self._weights, strict=True)):
                (piece,) = optimizer.param_groups[i]["params"]
                groups.append({**group, "params": [i]})
                states = [told["state"].get(number, {}) for number in group["params"]]
                state[i] = {
                    key: self._piece([own[key] for own in states], piece)
                    if isinstance(value, Tensor) and value.shape == weights[0].shape
                    else value
                    for key, value in states[0].items()
                }
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _whole(self, piece: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
        """What all processes hold of a number per weight, in the weights' shapes."""
        piece = piece.to(self.root_device)  # after a fit it is on the CPU
        pieces = [torch.empty_like(piece) for _ in range(self.world_size)]
        torch.distributed.all_gather(pieces, piece)
        end_to_end = torch.cat(pieces).cpu()[: sum(weight.numel() for weight in weights)]  # padded at its end
        parts = end_to_end.split([weight.numel() for weight in weights])
        return [part.clone().view(weight.shape) for part, weight in zip(parts, weights, strict=True)]

    def _piece(self, values: list[Tensor], piece: Tensor) -> Tensor:
        """This process's of numbers per weight."""
        end_to_end = torch.cat([value.flatten() for value in values])
        padding = piece.numel() * self.world_size - end_to_end.numel()
        return nn.functional.pad(end_to_end, (0, padding)).chunk(self.world_size)[self.global_rank].clone()


def check_training(optimizer: Optimizer, weights: Sequence[Tensor], clip_algorithm: str | None) -> None:
    """Refuse what would not be the same in slices.

    Raises:
        ValueError: says what to use.
    """
    if not isinstance(optimizer, SGD | Adam):  # AdamW is an Adam
        raise ValueError(
            f"{type(optimizer).__name__} would see slices of weights, end to end, in place of matrices: with zero1 and "
            "zero2 use AdamW, Adam or SGD, or else trainer.strategy: ddp"
        )
    if any(weight.dtype != torch.float32 for weight in weights):
        raise ValueError("zero1 and zero2 train weights in fp32: leave network.dtype at float32")
    if clip_algorithm == "value":
        raise ValueError("zero1 and zero2 clip by norm: unset trainer.gradient_clip_algorithm")


@contextlib.contextmanager
def _local_rank(rank: int) -> Iterator[None]:
    """DeepSpeed reads it from the environment, where Lightning takes it as a sign that another has started it."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


class _Seen(nn.Module):
    """A model as DeepSpeed sees it: its weights, and each loss that was computed with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Tensor) -> Tensor:
        return loss


for _stage in (1, 2):
    StrategyRegistry.register(
        f"zero{_stage}", ZeROStrategy, description=f"DeepSpeed's ZeRO, stage {_stage}", stage=_stage
    )

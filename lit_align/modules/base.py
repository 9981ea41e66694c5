"""Base of all methods: optimizer and schedule, exact loss normalisation, small checkpoints, bitwise resume."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lit_align.models.sharding import shard
from lit_align.models.trees import TreeModel
from lit_align.modules.fits import check_module
from lit_align.modules.memory import MIB, keep_freed_memory, memory_budget, memory_for, peak_memory
from lit_align.modules.restored import check_state
from lit_align.modules.router import micro_step_with_router
from lit_align.modules.schedule import Schedule, training_batches
from lit_align.modules.strategy import check_strategy, scale_gradients
from lit_align.modules.tracking import TokensSeen, gradient_norm, learning_rate, on_host, whole_norm
from lit_align.modules.zero import ZeROStrategy
from lit_align.types import PackedBatch, PreferenceBatch, PromptBatch

_DATA = {
    PackedBatch: "InstructionDataModule",
    PreferenceBatch: "PreferenceDataModule",
    PromptBatch: "PromptDataModule",
}

_Model = TypeVar("_Model", bound=TreeModel)


class AlignModule(LightningModule):
    """Base of all methods.

    A subclass loads its models in `configure_model`, never in `__init__`. A configuration can then be parsed and
    checked without a download, and the strategy decides where weights are created.

    Args:
        optimizer: builds the optimizer from parameters or parameter groups.
        schedule: learning rate as a function of the optimizer step; null keeps it constant.
        lr_scheduler: a torch scheduler instead, stepped once per optimizer step.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-5, weight_decay=0.0),
        schedule: Schedule | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if schedule is not None and lr_scheduler is not None:
            raise ValueError("give a schedule or an lr_scheduler, not both")
        self.optimizer = optimizer
        self.schedule = schedule
        self.lr_scheduler = lr_scheduler
        # Frozen weights are not in checkpoints: see on_save_checkpoint.
        self.strict_loading = False
        self._sums: dict[str, tuple[Any, Any]] = {}
        self.tokens_seen = TokensSeen()
        self._divided = False
        self._rng: dict[str, Any] | None = None
        self._work = "a micro-batch"

    # Checks of data and strategy.

    batch_type: type = PackedBatch
    predict_batch_type: type = PromptBatch

    def setup(self, stage: str) -> None:
        """Refuse unsupported strategies and devices; on a CPU, tell the allocator to keep freed memory.

        Raises:
            ValueError: names the strategy or device, and one to use instead.
        """
        takes = self.predict_batch_type if stage == "predict" else self.batch_type
        manual = stage == "fit" and not self.automatic_optimization
        check_strategy(self.trainer.strategy, type(self).__name__, samples=takes is PromptBatch, manual=manual)
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError("MPS has no float64, which exact sums need: set trainer.accelerator: cpu")
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        for metric in (child for child in self.children() if isinstance(child, Metric)):
            metric.reset()  # an earlier evaluation may have left inference tensors, which a fit cannot update

    def spread(self, model: _Model) -> _Model:
        """Shard a newly loaded model if the strategy shards; return it."""
        if self.device_mesh is not None:
            shard(model, self.device_mesh["data_parallel"])
        return model

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse batches of the wrong kind of data module.

        Raises:
            ValueError: names the data module to use.
        """
        batch = batch[0] if isinstance(batch, list) and batch else batch
        wanted = self.predict_batch_type if self.trainer.predicting else self.batch_type
        if isinstance(batch, tuple(_DATA)) and not isinstance(batch, wanted):
            doing = "predicts" if self.trainer.predicting else "trains"
            raise ValueError(
                f"{type(self).__name__} {doing} on the batches of a {_DATA[wanted]}: the data is a "
                f"{_DATA[type(batch)]}; change data.class_path"
            )

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse batches of the wrong kind of data module; see `on_train_batch_start`."""
        self.on_train_batch_start(batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_fit_start(self) -> None:
        """Refuse data that does not fit the model; see `check_data`."""
        check_module(self)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self) -> None:
        """Refuse data that does not fit the model, in `validate` too."""
        if self.trainer.validating:
            check_module(self)

    # Optimizer and schedule.

    optimizer_steps_per_batch = 1

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and a schedule that counts optimizer steps."""
        optimizer: Optimizer = self.optimizer(self.parameter_groups())
        if self.schedule is not None:
            schedule, total = self.schedule, self.total_steps()
            scheduler: Any = LambdaLR(optimizer, lambda step: schedule.factor(step, total))
        elif self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run.

        Trainer.estimated_stepping_batches does not serve here: it assumes one step per batch.

        Raises:
            ValueError: the run has no end, so a schedule has no length.
        """
        trainer = self.trainer
        steps = float("inf")
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches = training_batches(trainer)
            if not math.isinf(batches):
                per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) * self.optimizer_steps_per_batch
                steps = per_epoch * trainer.max_epochs
        if trainer.max_steps >= 0:
            steps = min(steps, trainer.max_steps)
        if math.isinf(steps):
            raise ValueError(
                "a schedule needs an end: set trainer.max_epochs or trainer.max_steps (epochs: a loader with a length)"
            )
        return int(steps)

    # Exact loss normalisation.

    def micro_step(self, batch: Any) -> Tensor:
        """Compute the loss of a micro-batch and return it through `accumulate`."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Run forward and backward of each micro-batch. Lightning runs the last backward, and syncs there under DDP.

        Returns the last micro-batch's loss sum, or its mean if it is the only one.
        """
        *first, last = batch if isinstance(batch, list) else [batch]
        for micro_batch in first:
            # Bypass DDP for these micro-batches: it syncs gradients in the last backward only.
            self.trainer.strategy.backward(self._forward_of(micro_batch), None)
        loss = self._forward_of(last)
        # Dividing the loss is cheaper than dividing all gradients; it needs the count of the whole step.
        self._divided = not first and self.trainer.accumulate_grad_batches == self.trainer.world_size == 1
        if self._divided:
            return loss * (1.0 / self._sums["loss"][1])
        # Lightning divides by accumulate_grad_batches: cancel that, so that sums stay sums.
        return loss * self.trainer.accumulate_grad_batches

    def _forward_of(self, batch: Any) -> Tensor:
        packed = getattr(batch, "packed", batch)
        with self.working_on(packed):
            self.tokens_seen.add(packed)
            return micro_step_with_router(self, batch)

    @contextlib.contextmanager
    def working_on(self, batch: PackedBatch) -> Iterator[None]:
        """Run a micro-batch; on out-of-memory, name the batch that failed."""
        tokens = batch.tokens_RN.shape
        self._work = f"a micro-batch of {tokens.numel():,} tokens in {tokens[0]} rows"
        with memory_for(f"the forward of {self._work}", self.memory_option):
            yield

    @property
    def memory_option(self) -> str:
        """Option to lower if a micro-batch does not fit in memory."""
        if not self.automatic_optimization:
            return "model.micro_batch_size or model.micro_batch_tokens"
        return "data.micro_batch_tokens (or data.batch_size, accumulating over more batches)"

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's backward, with a clearer out-of-memory error."""
        with memory_for(f"the backward of {self._work}", self.memory_option):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then zero the gradients."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        if isinstance(strategy := self.trainer.strategy, ZeROStrategy):
            self.log_tracked({"grad_norm": strategy.gradient_norm()})

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """No-op: Lightning would clear gradients that earlier micro-batches accumulated."""

    def accumulate(self, loss_sum: Tensor, count: int, **measures: tuple[Tensor, Tensor | int]) -> Tensor:
        """Keep the count of a micro-batch for the optimizer step, and return its loss *sum*.

        A mean per micro-batch, averaged over micro-batches and ranks, differs from the mean over the batch (10 % off on
        ragged data). Sums add up exactly. They are divided once, before clipping, by the count over all micro-batches
        and ranks of the optimizer step.

        Args:
            loss_sum: sum of losses, a scalar.
            count: number of terms in the sum.
            measures: further sums with their counts; their means per optimizer step are logged as `train/NAME`.
        """
        for name, (total, number) in {"loss": (loss_sum, count), **measures}.items():
            before, already = self._sums.get(name, (0.0, 0))
            self._sums[name] = before + total.detach(), already + number
        return loss_sum

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the loss sum by the count over all micro-batches and ranks; log the means."""
        if not self.automatic_optimization:
            return
        own = [number for pair in self._sums.values() for number in pair]
        *numbers, processed, scored = self.sum_over_ranks([*own, *self.tokens_seen.latest()])
        sums = dict(zip(self._sums, torch.stack(numbers).reshape(-1, 2), strict=True))
        # Distributed strategies average gradients over ranks; cancel that too.
        scale = self.trainer.world_size / float(sums["loss"][1])
        scale_gradients(self.trainer.strategy, optimizer, 1.0 if self._divided else scale)
        for name, (total, count) in sums.items():
            if count:  # a step without pairs has no accuracy
                self.log(f"train/{name}", total / count, prog_bar=name in ("loss", "accuracy"))
        self._sums = {}
        self.log_tracked({"learning_rate": learning_rate(optimizer), **self.tokens_seen.settle([processed, scored])})

    def log_tracked(self, values: dict[str, Tensor]) -> None:
        """Log values that are equal on all ranks, as `train/NAME`."""
        for name, value in values.items():
            self.log(f"train/{name}", value)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient norm and clip. Unlike Lightning, clip also under bf16 with a fused optimizer."""
        plugin = self.trainer.precision_plugin
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = None
        if not isinstance(self.trainer.strategy, ZeROStrategy):  # ZeRO has its gradients later, in optimizer_step
            norm = gradient_norm(parameters)
            self.log_tracked({"grad_norm": whole_norm(norm)})
        if not gradient_clip_val or not isinstance(plugin, MixedPrecision) or plugin.scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def sum_over_ranks(self, values: Iterable[Tensor | float]) -> Tensor:
        """Sum scalars over all ranks. Shape (number of values,), float64."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in on_host(values)])
        if self.trainer.world_size > 1:
            stacked = self.trainer.strategy.reduce(stacked.to(self.device), reduce_op="sum")
        return stacked

    def from_ranks(self, value: Any) -> list[Any]:
        """Gather an object from all ranks, in order of rank."""
        values = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def over_ranks(self, values: Tensor) -> Tensor:
        """Concatenate the values of all ranks, on the CPU."""
        return torch.cat(self.from_ranks(values.cpu()))

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Mean over the values of all ranks."""
        total, count = self.sum_over_ranks([values.sum(), values.numel()])
        return total / count

    def moments_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over the values of all ranks."""
        mean = self.mean_over_ranks(values.double())
        variance = self.mean_over_ranks((values.double() - mean).square())
        return mean.to(values), variance.to(values)

    @contextlib.contextmanager
    def gradient_sync(self, on: bool) -> Iterator[None]:
        """Under DDP, all-reduce gradients in this backward (`on`) or keep them local until the last of a step."""
        model: Any = self.trainer.strategy.model
        with contextlib.nullcontext() if on or not self.one_backward else model.no_sync():
            yield

    @property
    def one_backward(self) -> bool:
        """True if the model is wrapped in DDP, which expects one backward per step."""
        return hasattr(self.trainer.strategy.model, "no_sync")

    def log_all(self, prefix: str, values: dict[str, Tensor], prog_bar: Collection[str] = ()) -> None:
        """Log scalars under a prefix, averaged over ranks."""
        for name, value in values.items():
            shown = name in prog_bar
            self.log(f"{prefix}/{name}", value.float().to(self.device), prog_bar=shown, sync_dist=True, batch_size=1)

    @property
    def stage(self) -> str:
        """Prefix of metric names in evaluation: val or test."""
        return "test" if self.trainer.testing else "val"

    # Checkpoints.

    def frozen(self) -> set[str]:
        """Names of frozen state. It is loaded from its own folder, so checkpoints leave it out."""
        fixed = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        prefixes = tuple(f"{name}." for name, child in self.named_children() if not _trains(child))
        return {name for name in self.state_dict() if name in fixed or name.startswith(prefixes)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove frozen weights, and add the state of the random generators."""
        for name in self.frozen():
            checkpoint["state_dict"].pop(name, None)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["rng"] = self.from_ranks(rng)
        checkpoint["tokens_seen"] = self.tokens_seen.totals

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks trained weights: non-strict loading would keep their initial values."""
        check_state(self.state_dict(), checkpoint["state_dict"], self.frozen())
        self._rng = dict(enumerate(checkpoint["rng"])).get(self.global_rank)
        self.tokens_seen.totals = list(checkpoint.get("tokens_seen", self.tokens_seen.totals))  # older ones have none

    def on_train_start(self) -> None:
        """Log the memory that the run will hold; restore the random generators of a checkpoint."""
        strategy = self.trainer.strategy
        in_slices = isinstance(strategy, ZeROStrategy) and strategy.stage == 2
        roles = memory_budget(self, self.trainer.optimizers, in_slices)
        total = sum(role.weights + role.training for role in roles) / MIB
        rank_zero_info(f"memory: {'; '.join(map(str, roles))}; {total:,.0f} MiB in all before activations")
        # Restore them here, after everything that draws random numbers at start-up.
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"].cpu())
            if "cuda" in self._rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
            self._rng = None

    def on_train_end(self) -> None:
        """Log the peak memory."""
        if peak := peak_memory(self.device):
            rank_zero_info(f"peak memory: {peak / MIB:,.0f} MiB")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

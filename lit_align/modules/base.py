"""What every method shares: optimizer and schedule, an exact loss normaliser, lean checkpoints, resume to the bit."""

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
    """Base of the four methods.

    A subclass loads its models in `configure_model`, never in `__init__`: a configuration is then parsed and checked
    without a download, and weights are created where the strategy wants them.

    Args:
        optimizer: parameters (or groups of them) to optimizer.
        schedule: learning rate as a function of the optimizer step; null keeps it constant.
        lr_scheduler: a scheduler of torch instead, stepped once per optimizer step.
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

    # What it can work with.

    batch_type: type = PackedBatch
    predict_batch_type: type = PromptBatch

    def setup(self, stage: str) -> None:
        """Refuse strategies that would train something else; on a CPU, keep freed memory.

        Raises:
            ValueError: names the strategy, and one to use.
        """
        takes = self.predict_batch_type if stage == "predict" else self.batch_type
        manual = stage == "fit" and not self.automatic_optimization
        check_strategy(self.trainer.strategy, type(self).__name__, samples=takes is PromptBatch, manual=manual)
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError("MPS has no float64, which exact sums need: set trainer.accelerator: cpu")
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        for metric in (child for child in self.children() if isinstance(child, Metric)):
            metric.reset()  # an evaluation before has left tensors of inference mode, which a fit cannot add to

    def spread(self, model: _Model) -> _Model:
        """A model that was just loaded, as the strategy wants it: in slices, if it shards."""
        if self.device_mesh is not None:
            shard(model, self.device_mesh["data_parallel"])
        return model

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse the batches of another kind of data.

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
        """The same."""
        self.on_train_batch_start(batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_fit_start(self) -> None:
        """Refuse data that the model cannot take; see `check_data`."""
        check_module(self)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self) -> None:
        """The same, of a validation by itself."""
        if self.trainer.validating:
            check_module(self)

    # Optimizer and schedule.

    optimizer_steps_per_batch = 1

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """One optimizer, and a schedule that counts optimizer steps."""
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
        """Optimizer steps of the whole run.

        Counted here and not by Trainer.estimated_stepping_batches, which knows of one step per batch only.

        Raises:
            ValueError: the run has no end to stretch a schedule to.
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

    # The exact normaliser.

    def micro_step(self, batch: Any) -> Tensor:
        """What a method does with a micro-batch: its loss, by way of `accumulate`."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Forward and backward of each micro-batch; Lightning does the backward of the last, and under DDP its sync.

        Returns the last one's sum of losses; their mean, where it is all there is to the step.
        """
        *first, last = batch if isinstance(batch, list) else [batch]
        for micro_batch in first:
            # DDP expects no gradients before its forward has ended, and leaves these where they are.
            self.trainer.strategy.backward(self._forward_of(micro_batch), None)
        loss = self._forward_of(last)
        # To divide the loss, where it is known what by, is cheaper than to divide all gradients.
        self._divided = not first and self.trainer.accumulate_grad_batches == self.trainer.world_size == 1
        if self._divided:
            return loss * (1.0 / self._sums["loss"][1])
        # Lightning divides by this; the sum is to stay a sum.
        return loss * self.trainer.accumulate_grad_batches

    def _forward_of(self, batch: Any) -> Tensor:
        packed = getattr(batch, "packed", batch)
        with self.working_on(packed):
            self.tokens_seen.add(packed)
            return micro_step_with_router(self, batch)

    @contextlib.contextmanager
    def working_on(self, batch: PackedBatch) -> Iterator[None]:
        """The forward of a micro-batch: should there be no memory for it, or for its backward, that is what is said."""
        tokens = batch.tokens_RN.shape
        self._work = f"a micro-batch of {tokens.numel():,} tokens in {tokens[0]} rows"
        with memory_for(f"the forward of {self._work}", self.memory_option):
            yield

    @property
    def memory_option(self) -> str:
        """What to lower when a micro-batch does not fit."""
        if not self.automatic_optimization:
            return "model.micro_batch_size or model.micro_batch_tokens"
        return "data.micro_batch_tokens (or data.batch_size, accumulating over more batches)"

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, which says what it was at should there be no memory left."""
        with memory_for(f"the backward of {self._work}", self.memory_option):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and only now forget the gradients."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        if isinstance(strategy := self.trainer.strategy, ZeROStrategy):
            self.log_tracked({"grad_norm": strategy.gradient_norm()})

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: Lightning calls this after `training_step`, which has left gradients by then."""

    def accumulate(self, loss_sum: Tensor, count: int, **measures: tuple[Tensor, Tensor | int]) -> Tensor:
        """What `micro_step` returns: the *sum* of losses over a micro-batch, and its count kept for later.

        A mean per micro-batch, averaged over micro-batches and ranks, is another loss than the mean over the batch
        (10 % off on ragged data). Sums add up; they are divided once, before clipping, by the count of all
        micro-batches and ranks of the optimizer step.

        Args:
            loss_sum: a scalar.
            count: what it is a sum over.
            measures: other sums with their counts; the optimizer step's mean is logged as `train/NAME`.
        """
        for name, (total, number) in {"loss": (loss_sum, count), **measures}.items():
            before, already = self._sums.get(name, (0.0, 0))
            self._sums[name] = before + total.detach(), already + number
        return loss_sum

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient of summed losses by the count over all micro-batches and ranks."""
        if not self.automatic_optimization:
            return
        own = [number for pair in self._sums.values() for number in pair]
        *numbers, processed, scored = self.sum_over_ranks([*own, *self.tokens_seen.latest()])
        sums = dict(zip(self._sums, torch.stack(numbers).reshape(-1, 2), strict=True))
        # Distributed strategies average gradients over ranks: undo that too.
        scale = self.trainer.world_size / float(sums["loss"][1])
        scale_gradients(self.trainer.strategy, optimizer, 1.0 if self._divided else scale)
        for name, (total, count) in sums.items():
            if count:  # no pair in the whole step has no accuracy
                self.log(f"train/{name}", total / count, prog_bar=name in ("loss", "accuracy"))
        self._sums = {}
        self.log_tracked({"learning_rate": learning_rate(optimizer), **self.tokens_seen.settle([processed, scored])})

    def log_tracked(self, values: dict[str, Tensor]) -> None:
        """Log what is the same on all ranks, as `train/NAME`."""
        for name, value in values.items():
            self.log(f"train/{name}", value)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the norm, and clip: under bf16 with a fused optimizer too, where Lightning refuses (as in fp16)."""
        plugin = self.trainer.precision_plugin
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = None
        if not isinstance(self.trainer.strategy, ZeROStrategy):  # which has no gradients here: see optimizer_step
            norm = gradient_norm(parameters)
            self.log_tracked({"grad_norm": whole_norm(norm)})
        if not gradient_clip_val or not isinstance(plugin, MixedPrecision) or plugin.scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def sum_over_ranks(self, values: Iterable[Tensor | float]) -> Tensor:
        """Scalars summed over all processes."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in on_host(values)])
        if self.trainer.world_size > 1:
            stacked = self.trainer.strategy.reduce(stacked.to(self.device), reduce_op="sum")
        return stacked

    def from_ranks(self, value: Any) -> list[Any]:
        """What each process gives, in order."""
        values = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def over_ranks(self, values: Tensor) -> Tensor:
        """The values of all processes, one after the other, on the CPU."""
        return torch.cat(self.from_ranks(values.cpu()))

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Mean of the values of all processes."""
        total, count = self.sum_over_ranks([values.sum(), values.numel()])
        return total / count

    def moments_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the values of all processes."""
        mean = self.mean_over_ranks(values.double())
        variance = self.mean_over_ranks((values.double() - mean).square())
        return mean.to(values), variance.to(values)

    @contextlib.contextmanager
    def gradient_sync(self, on: bool) -> Iterator[None]:
        """Under DDP, all-reduce gradients in this backward or keep them local: the last of a step is enough."""
        model: Any = self.trainer.strategy.model
        with contextlib.nullcontext() if on or not self.one_backward else model.no_sync():
            yield

    @property
    def one_backward(self) -> bool:
        """Whether all gradients of a step are to come from one backward, as DDP, on one device too, wants them."""
        return hasattr(self.trainer.strategy.model, "no_sync")

    def log_all(self, prefix: str, values: dict[str, Tensor], prog_bar: Collection[str] = ()) -> None:
        """Log scalars under a prefix, averaged over ranks."""
        for name, value in values.items():
            shown = name in prog_bar
            self.log(f"{prefix}/{name}", value.float().to(self.device), prog_bar=shown, sync_dist=True, batch_size=1)

    @property
    def stage(self) -> str:
        """The first half of a metric's name in evaluation."""
        return "test" if self.trainer.testing else "val"

    # Checkpoints.

    def frozen(self) -> set[str]:
        """Names of state that is loaded from its own folder and therefore kept out of checkpoints."""
        fixed = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        prefixes = tuple(f"{name}." for name, child in self.named_children() if not _trains(child))
        return {name for name in self.state_dict() if name in fixed or name.startswith(prefixes)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen; put in the state of the random generators."""
        for name in self.frozen():
            checkpoint["state_dict"].pop(name, None)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["rng"] = self.from_ranks(rng)
        checkpoint["tokens_seen"] = self.tokens_seen.totals

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks trained weights: without strict loading they would stay as they are."""
        check_state(self.state_dict(), checkpoint["state_dict"], self.frozen())
        self._rng = dict(enumerate(checkpoint["rng"])).get(self.global_rank)
        self.tokens_seen.totals = list(checkpoint.get("tokens_seen", self.tokens_seen.totals))  # older ones have none

    def on_train_start(self) -> None:
        """Say what will be held in memory; and continue the random sequence of the checkpoint, if there is one."""
        strategy = self.trainer.strategy
        in_slices = isinstance(strategy, ZeROStrategy) and strategy.stage == 2
        roles = memory_budget(self, self.trainer.optimizers, in_slices)
        total = sum(role.weights + role.training for role in roles) / MIB
        rank_zero_info(f"memory: {'; '.join(map(str, roles))}; {total:,.0f} MiB in all before activations")
        # Only now has everything drawn that draws at start-up.
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"].cpu())
            if "cuda" in self._rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
            self._rng = None

    def on_train_end(self) -> None:
        """Say what was held."""
        if peak := peak_memory(self.device):
            rank_zero_info(f"peak memory: {peak / MIB:,.0f} MiB")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

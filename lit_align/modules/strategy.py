"""What spreads a model over devices: `strategy: fsdp2` where one cannot hold it, and what is refused in its favour."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lit_align.modules.zero import ZeROStrategy

_SHARD = "use trainer.strategy: fsdp2 to shard a model, or ddp where it fits on each device"
_EXACT = "use trainer.strategy: zero1 or zero2, which are DeepSpeed's, too"


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state in slices over all processes of all machines.

    Lightning's strategy without tensor parallelism, and with the checkpoints of a single process: one file, which the
    first process writes, without what is frozen, and with the optimizer's state in the optimizer's order.

    Args:
        process_group_backend: of torch.distributed; null for the device's own.
        timeout: of its operations.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """As many slices as processes."""
        # Private, because its public argument is asked for before the number of processes is known.
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    # Checkpoints. On all but the first process torch gives back nothing.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, and buffers."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self._module, options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, its parameters numbered."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._module, optimizer, options=options)
        return _renamed(state, {name: i for i, name in enumerate(self._names(optimizer))}) if state else state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process takes its slices; weights that are in no checkpoint stay as they were loaded."""
        path = self.broadcast(checkpoint_path)
        checkpoint = self.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)
        self.load_weights(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):  # none to evaluate
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self._module, optimizer, named, options=StateDictOptions(full_state_dict=True))
        return checkpoint

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take the slices of whole weights; those that are not among them stay."""
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self._module, state, options=options)

    @property
    def _module(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Of an optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names for its parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")


def scale_gradients(strategy: Strategy, optimizer: Optimizer, scale: float) -> None:
    """Multiply all gradients of an optimizer before it steps."""
    if isinstance(strategy, ZeROStrategy):
        strategy.scale_gradients(scale)  # by 1, too: the last step's factor stays until another is set
        return
    for group in optimizer.param_groups if scale != 1.0 else ():
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


def check_strategy(strategy: Strategy, name: str, samples: bool, manual: bool = False) -> None:
    """Refuse strategies that would train something else.

    Args:
        strategy: the Trainer's.
        name: of the module.
        samples: whether it samples from the model.
        manual: whether it clips gradients and steps the optimizer itself.

    Raises:
        ValueError: says what to use.
    """
    kind = type(strategy).__name__
    if kind == "DeepSpeedStrategy":
        raise ValueError(
            f"{kind} is not supported: it divides losses by the number of micro-batches, not gradients by the exact "
            f"count of what is scored, and its checkpoints are its own; {_EXACT}"
        )
    if kind == "FSDPStrategy":
        raise ValueError(f"{kind} (FSDP1) is not supported: {_SHARD}")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(f"{kind} cuts matrices, too, and its checkpoints hold what is frozen: {_SHARD}")
    if isinstance(strategy, ZeROStrategy):
        if strategy.precision_plugin.precision not in ("32-true", "bf16-mixed"):
            raise ValueError("zero1 and zero2 keep weights in fp32: set trainer.precision to bf16-mixed or 32-true")
        if manual:
            raise ValueError(f"{name} steps its optimizer itself, which zero1 and zero2 do: use trainer.strategy: ddp")
    if not isinstance(strategy, FSDP2Strategy):
        return
    if strategy.precision_plugin.precision == "16-mixed":  # which Lightning refuses, too, of its own strategy
        raise ValueError("fsdp2 does not take fp16's scaler: set trainer.precision to bf16-mixed or 32-true")
    if samples:
        raise ValueError(
            f"{name} samples from its model, which fsdp2 leaves in slices: use trainer.strategy: ddp, and "
            "model.network.lora if the optimizer's state does not fit"
        )

"""`lit-align export`: write a model folder from a checkpoint or from the folder of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.callbacks.card import model_card
from lit_align.callbacks.checkpoint import BEST
from lit_align.callbacks.checkpoint_io import AtomicCheckpointIO
from lit_align.callbacks.chosen import Chosen, averaged_state, logged_step
from lit_align.cli.lightning_cli import built
from lit_align.config.errors import ConfigError
from lit_align.models.export import export
from lit_align.models.load import load_tokenizer
from lit_align.models.lora import has_lora
from lit_align.models.merge import merged_model
from lit_align.models.scalar import ScalarModel
from lit_align.models.seal import read_seal
from lit_align.modules.base import AlignModule
from lit_align.modules.policy import PolicyModule
from lit_align.modules.ppo import PPOModule
from lit_align.modules.restored import check_state
from lit_align.modules.reward import RewardModule

# Build the module on the CPU, whatever device the run used.
_HERE = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
    "--trainer.precision=32-true", "--trainer.logger=false", "--trainer.callbacks=null", "--trainer.plugins=null",
)  # fmt: skip


def export_run(
    source: Path,
    out: Path,
    which: str | None = None,
    role: str | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    config: Path | None = None,
) -> str:
    """Write the model of a checkpoint as a folder that plain transformers loads.

    Args:
        source: a checkpoint file, or the folder of a run.
        out: folder to write; an earlier export there is replaced.
        which: checkpoint of a run's folder, last or best; null takes the best if a metric was monitored.
        role: policy, reward, or value of a PPO run; null takes the main model of the run.
        adapter: write the adapter without merging it.
        dtype: dtype of the written weights; null keeps that of training.
        config: config.yaml of the run, for a checkpoint outside of its run's folder.

    Returns:
        One line about what was written.

    Raises:
        ValueError: something is missing or cannot be exported; names it.
    """
    _check_free(out)
    file, run = _checkpoint(source, which)
    settings = config or (run / "config.yaml" if run is not None else None)
    if settings is None or not settings.exists():
        raise ConfigError(
            f"{file} lies in no run's folder with a config.yaml: name it with --config FILE (a checkpoint says nothing "
            "of the configuration that can be trusted)"
        )
    checkpoint = AtomicCheckpointIO().load_checkpoint(file, map_location="cpu", weights_only=True)
    module, data = built(["fit", "-c", str(settings), *_HERE])
    model = _model(module, averaged_state(checkpoint), role)
    if adapter and not has_lora(model):
        raise ConfigError("--adapter: the run trained the whole model, not an adapter (model.network.lora)")
    if not adapter and has_lora(model):
        model = merged_model(model)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    picked = _picked(file, run, checkpoint)
    # The attributes of a Trainer that `model_card` reads.
    trainer: Any = SimpleNamespace(datamodule=data, global_step=picked.steps, callback_metrics={})
    card = model_card(trainer, module, run, out.resolve().name, picked, model)
    tokenizer = _tokenizer(module, data, run)
    export(model, tokenizer, out, getattr(data, "stop_ids", ()), adapter=adapter, card=card, told=picked.told())
    return f"{picked}: written to {out}{_scale(module, settings, picked)}"


def _check_free(out: Path) -> None:
    """Refuse to replace anything but an earlier export."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is a file or a link, and a folder is written: give another name")
    if out.is_dir():
        if not any(out.iterdir()):
            out.rmdir()
        elif read_seal(out) is None:
            raise ConfigError(f"{out} holds files that no export of lit-align wrote: give another folder, or remove it")


def _checkpoint(source: Path, which: str | None) -> tuple[Path, Path | None]:
    """Checkpoint file, and the folder of its run if there is one."""
    if source.is_dir():
        folder = source / "checkpoints"
        if not folder.is_dir():
            model = " (it is a model's folder already)" if (source / "config.json").exists() else ""
            raise ConfigError(
                f"{source} is no folder of a run: it has no checkpoints/{model}; name a run or a .ckpt file"
            )
        name = which or _asked(source) or ("best" if (folder / BEST).exists() else "last")
        file = folder / f"{name}.ckpt"
        if not file.exists():
            there = ", ".join(sorted(path.name for path in folder.glob("*.ckpt"))) or "nothing"
            why = "; best.ckpt is there when checkpoint.monitor is set" if name == "best" else ""
            raise ConfigError(f"{folder} has no {name}.ckpt{why}; it holds {there}")
        return file, source
    if which is not None:
        raise ConfigError("--which chooses a checkpoint of a run's folder; SOURCE is a file: leave it out")
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; name the folder of a run, or a .ckpt file")
    run = source.parent.parent
    return source, run if (run / "config.yaml").exists() else None


def _asked(run: Path) -> str | None:
    """The `export` option of the run, if the checkpoint it names exists."""
    file = run / "config.yaml"
    told = yaml.safe_load(file.read_text()) if file.exists() else None
    which = told.get("export") if isinstance(told, dict) else None
    return which if which == "last" or (which == "best" and (run / "checkpoints" / BEST).exists()) else None


def _model(module: Any, state: Mapping[str, Tensor], role: str | None) -> PreTrainedModel:
    """Build the transformers model of a role and load the weights of the checkpoint."""
    kind = type(module).__name__
    if not isinstance(module, AlignModule) or not hasattr(module, "exported"):
        raise ConfigError(f"{kind} has no exported(): lit-align export knows the modules of lit_align")
    roles = ["reward"] if isinstance(module, RewardModule) else ["policy"]
    if isinstance(module, PPOModule) and module.advantage == "gae":
        roles.append("value")
    if role is not None and role not in roles:
        raise ConfigError(f"--role {role}: a run of {kind} has {' and '.join(roles)}")
    if role == "value":
        module.configure_model()
        if not isinstance(module.value, ScalarModel):
            raise ConfigError(
                "--role value: the value model shares the policy's backbone, and is no model of its own: set "
                "model.value to a model, without shared, to export it"
            )
        _fill(module.value, state, "value.")
        module.value.normalize(module.value.mean.item(), module.value.std.item())
        return module.value.hf
    if isinstance(module, PolicyModule):
        PolicyModule.configure_model(module)  # neither reference nor rewards
        _fill(module.policy, state, "policy.")
    else:
        module.configure_model()
        _fill(module, state, "")
    model: PreTrainedModel = module.exported()
    return model


def _tokenizer(module: Any, data: Any, run: Path | None) -> Any:
    """The tokenizer that the run exported or would export: with its new tokens and its chat template."""
    if run is not None and read_seal(run / "model") is not None:
        with contextlib.suppress(ValueError):  # the folder of a model without a tokenizer
            return load_tokenizer(str(run / "model"))
    if not hasattr(data, "exported_tokenizer"):
        return getattr(data, "tokenizer", None) or getattr(module, "tokenizer", None)
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)
    try:
        data.setup("fit")  # finds out whether a chat template applies to the rows; they are cached
    except (OSError, ValueError):
        return data.tokenizer
    return data.exported_tokenizer


def _fill(part: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Load the weights of one part of a module; every trained weight must be there."""
    here = part.state_dict()
    mine = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    if prefix == "":  # drop entries that are not weights of the model, such as metrics
        mine = {name: weight for name, weight in mine.items() if name in here}
    # On a policy's backbone there may be adapters of other roles.
    mine = {name: weight for name, weight in mine.items() if name in here or ".lora_" not in name}
    frozen = {name for name, parameter in part.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    check_state(here, mine, frozen)
    part.load_state_dict(mine, strict=False)


def _picked(file: Path, run: Path | None, checkpoint: Mapping[str, Any]) -> Chosen:
    """Step of a checkpoint, and the number of steps of its run."""
    step, steps = checkpoint["global_step"], checkpoint["global_step"]
    last = None if run is None else run / "checkpoints" / "last.ckpt"
    if last is not None and last.exists() and last.resolve() != file.resolve():
        # Memory-map the file: only its step number is needed.
        steps = max(steps, torch.load(last, weights_only=True, mmap=True, map_location="cpu")["global_step"])
    keeps = [told for told in (checkpoint.get("callbacks") or {}).values() if "best_model_score" in told]
    keep = keeps[0] if keeps else {}
    best = file.parent / BEST
    if keep.get("monitor") and best.exists() and best.resolve() == file.resolve() and file.name != "last.ckpt":
        return Chosen("best", step, steps, logged_step(checkpoint), keep["monitor"], float(keep["best_model_score"]))
    return Chosen("last" if step == steps else "checkpoint", step, steps, logged_step(checkpoint))


def _scale(module: Any, settings: Path, picked: Chosen) -> str:
    """Note that `NormalizeReward` has not been applied to this checkpoint: it runs at the end of training."""
    if isinstance(module, RewardModule) and picked.which != "last" and "NormalizeReward" in settings.read_text():
        return "; NormalizeReward sets the scale of rewards at the end of a run: these keep that of validation"
    return ""

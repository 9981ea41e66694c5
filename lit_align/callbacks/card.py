"""The model card: what an exported folder says of itself, on the hub too."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader
from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.chosen import Chosen
from lit_align.callbacks.manifest import environment
from lit_align.callbacks.metrics_csv import last_values
from lit_align.callbacks.throughput import TIMED
from lit_align.data.data_module import TextDataModule
from lit_align.utils import limits
from lit_align.utils.display import printable

# Where a run writes, and where it was taken up from, say nothing of the model; nor may two cards differ by them.
_PLACES = ("out", "config", "ckpt_path", "weights_only", "resume", "checkpoint.dirpath", "trainer.default_root_dir")


class Ancestor(NamedTuple):
    """A model that a run started from.

    Attributes:
        depth: 0 for a parent, 1 for its parent, and so on.
        name: folder, or name on the hub.
        digest: sha256 of its weights as the run met them; None for what is no folder with weights.
        method: class of the module that trained it, if a run of lit_align did.
        roles: keys of the configuration that name it.
    """

    depth: int
    name: str
    digest: str | None
    method: str | None
    roles: list[str]


def model_card(
    trainer: Trainer,
    module: LightningModule,
    run: Path | None,
    title: str,
    picked: Chosen | None = None,
    model: Any = None,
) -> str:
    """README.md of an exported model: method, data, metrics at the end, lineage, versions and configuration.

    It says neither when nor into which folder it was written, nor that the run was resumed: a run that was interrupted
    leaves the card of one that was not.

    Args:
        trainer: at the end of fitting.
        module: what was fitted.
        run: folder with the run's config.yaml, manifest.json and metrics.csv; None, or none of these, for a run
            without the command line: the card then says what the Trainer knows.
        title: first heading.
        picked: whose step the weights are of; None for the last.
        model: the transformers model that is exported; None for the module's.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    manifest = _read(run, "manifest.json")
    config = _without(_read(run, "config.yaml"), _PLACES)
    logged = last_values(run / "metrics.csv", picked.row if picked else None) if run is not None else {}
    logged = logged or {name: float(value) for name, value in trainer.callback_metrics.items()}
    network = getattr(module, "network", None)
    lora = getattr(network, "lora", None)
    adapter = network.name if network is not None and lora is not None and lora.export == "adapter" else None
    generates = (module.exported() if model is None else model).can_generate()  # type: ignore[operator]
    lineage = list(_lineage(manifest.get("parents") or {}, config))
    if network is not None and network.name not in {ancestor.name for ancestor in lineage}:
        lineage.insert(0, Ancestor(0, network.name, None, None, _roles(config, network.name)))
    return _template().render(
        front=_front(datamodule, network, type(module).__name__, generates, adapter is not None),
        title=title,
        kind="A language model" if generates else "A reward model",
        method=type(module).__name__,
        does=(inspect.getdoc(type(module)) or "").split("\n\n")[0].replace("\n", " "),
        adapter=adapter,
        generates=generates,
        data=manifest.get("data") or getattr(datamodule, "manifest", list)(),
        steps=picked.step if picked else trainer.global_step,
        picked=picked if picked and picked.which != "last" else None,
        metrics={
            name: logged[name] for name in sorted(logged, key=_held_out_first) if name not in ("epoch", "step", *TIMED)
        },
        lineage=lineage,
        environment=_environment(manifest or environment()),
        config=(text := yaml.safe_dump(config, sort_keys=False).strip() if config else ""),
        fence="`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0),
    )


def _template() -> Any:
    place = PackageLoader("lit_align.callbacks", ".")
    environment = Environment(
        loader=place,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value, lines=True) if isinstance(value, str) else value,
    )
    environment.filters["inline"] = inline
    return environment.get_template("card.md")


def inline(name: object) -> str:
    """A name within a line of Markdown: one line that ends no code span, no cell of a table, and begins no tag."""
    text = printable(name)
    for mark, instead in (("`", "'"), ("|", "\\|"), ("<", "&lt;")):
        text = text.replace(mark, instead)
    return text


def _front(datamodule: Any, network: Any, method: str, generates: bool, adapter: bool) -> str:
    """What the hub indexes, as YAML. It knows models and data sets of the hub alone: folders and files are left out."""
    parts = datamodule.sources.values() if isinstance(datamodule, TextDataModule) else ()
    hub = sorted({source.hub for sources in parts for source in sources or () if source.hub})
    base = network.name if network is not None else None
    if base is not None and Path(base).is_dir():
        # A later stage's model comes from the same one on the hub; an adapter fits no model but its own.
        base = None if adapter else _front_of(Path(base)).get("base_model")
    tags = ["lit_align", method.removesuffix("Module").lower(), *(["lora"] if getattr(network, "lora", None) else [])]
    data = ModelCardData(
        base_model=base,
        datasets=hub or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if generates else "text-classification",
        tags=tags,
    )
    return data.to_yaml()


def _front_of(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a folder's card."""
    card = folder / "README.md"
    try:  # a card of somebody else's must not stop the export
        _, mark, rest = limits.read_text(card).partition("---\n")
        told = limits.load_yaml(rest.partition("\n---\n")[0], card) if mark else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return told if isinstance(told, dict) else {}


def _lineage(parents: dict[str, str | None], config: dict[str, Any], depth: int = 0) -> Iterator[Ancestor]:
    """Parents, each followed by its own; a stage's model lies in the folder of its run."""
    for name, digest in parents.items():
        run = Path(name).parent
        told, manifest = (_read(run, "config.yaml"), _read(run, "manifest.json")) if depth < 8 else ({}, {})
        method = (told.get("model") or {}).get("class_path", "").rpartition(".")[-1] if told else ""
        yield Ancestor(depth, name, digest, method or None, _roles(config, name))
        yield from _lineage(manifest.get("parents") or {}, told, depth + 1)


def _roles(config: Any, name: str, prefix: str = "") -> list[str]:
    """Keys that hold a name, as they are said on the command line."""
    if isinstance(config, dict):
        return [role for key, value in config.items() for role in _roles(value, name, _joined(prefix, str(key)))]
    return [prefix] if config == name else []


def _joined(prefix: str, key: str) -> str:
    return prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key


def _read(run: Path | None, name: str) -> dict[str, Any]:
    """A file of a run's folder; empty where there is none."""
    file = None if run is None else run / name
    try:
        text = "" if file is None else limits.read_text(file, largest=1 << 26)
        content = limits.load_yaml(text, file) if str(file).endswith(".yaml") else json.loads(text or "{}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # or one that cannot be read: a parent's may be odd
        return {}
    return content if isinstance(content, dict) else {}


def _without(config: dict[str, Any], keys: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """A configuration without some of its keys."""
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def _held_out_first(name: str) -> tuple[bool, str]:
    return not name.startswith("val/"), name


def _environment(manifest: dict[str, Any]) -> dict[str, str]:
    """One line for each thing that the numbers depend on."""
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items() if version)
    facts = {name: manifest.get(name) for name in ("seed", "devices", "precision", "commit", "python", "machine")}
    return {**{name: str(value) for name, value in facts.items() if value is not None}, "packages": packages}

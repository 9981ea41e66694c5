"""What has changed since a checkpoint was written: told in one line each, and refused unless it is allowed by its kind.

`--resume.allow [data, precision]` names kinds, for `fit`, `pipeline` and `sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# Kinds of change, each with what it covers.
KINDS = {
    "data": "rows of training",
    "validation": "rows of validation, its interval and its sampling",
    "model": "the starting model, or a stage's model",
    "reference": "the reference model",
    "reward": "a reward model",
    "tokenizer": "the tokenizer or its chat template",
    "precision": "trainer.precision",
    "devices": "how many devices and machines",
    "config": "any other key of the configuration",
}

# The kind of a change that a resumed run cannot make, whatever is allowed.
FIXED = "fixed"

# Packages whose version changes numbers, or what a checkpoint means.
_MATTERING = ("lit_align", "torch", "lightning", "transformers", "datasets", "tokenizers", "peft")

# What a resumed run may change freely: how far it goes, where it runs and writes, what it shows, what it exports.
FREE = (
    "out", "config", "ckpt_path", "weights_only", "checkpoint.", "resume.", "resume", "export",
    "data.init_args.num_workers", "data.init_args.cache_dir",
    *(f"trainer.{key}" for key in (
        "max_", "min_", "limit_val", "enable_", "logger", "accelerator", "strategy", "log_every", "profiler",
        "callbacks", "default_root", "num_sanity",
    )),
)  # fmt: skip
_BY_KEY = {
    "trainer.precision": "precision",
    "trainer.devices": "devices",
    "trainer.num_nodes": "devices",
    "trainer.val_check_interval": "validation",
    "trainer.check_val_every_n_epoch": "validation",
    "data.init_args.val": "validation",
    "data.init_args.val_batch_size": "validation",
    "model.init_args.monitors": "validation",
}


class Change(NamedTuple):
    """A difference between a run and its resumption.

    Attributes:
        kind: one of `KINDS`; empty for what is told and never refused.
        says: what has changed, from what to what.
    """

    kind: str
    says: str


def allowed(value: Any) -> frozenset[str]:
    """The kinds that `resume.allow` names: a list, or names with commas between them.

    Raises:
        ValueError: an unknown kind; lists those that there are.
    """
    names = (
        value
        if isinstance(value, (list, tuple, set, frozenset))
        else []
        if value is None
        else str(value).strip("[] ").split(",")
    )
    kinds = frozenset(name for name in (str(name).strip(" '\"") for name in names) if name)
    if unknown := sorted(kinds - KINDS.keys()):
        listed = ", ".join(f"{kind} ({covers})" for kind, covers in KINDS.items())
        raise ValueError(f"resume.allow: unknown kind {unknown[0]!r}; kinds are {listed}")
    return kinds


def settle(
    changes: Iterable[Change], allow: frozenset[str], say: Callable[[str], None], what: str = "the checkpoint"
) -> None:
    """Tell each change in one line; refuse those whose kind is not allowed.

    Args:
        changes: in the order to tell them.
        allow: kinds that are allowed.
        say: takes a line.
        what: that which was made before the change.

    Raises:
        ValueError: a change is not allowed; names it, the number of others, and the way out.
    """
    changes = list(changes)
    refused = [change for change in changes if change.kind and change.kind not in allow]
    if fixed := next((change for change in refused if change.kind == FIXED), None):
        raise ValueError(
            f"{what} belongs to a run with another {fixed.says}: the state of its optimizer holds the value, and a "
            "resumed run would go on with that. Restore it, or start a new run from the exported folder without "
            "--ckpt_path"
        )
    if refused:
        kinds = sorted({change.kind for change in changes if change.kind})
        more = f" (and {len(refused) - 1} more: {'; '.join(c.says for c in refused[1:4])})" if refused[1:] else ""
        raise ValueError(
            f"{what} belongs to a run with another {refused[0].says}{more}: resuming takes a run up as it was. Restore "
            "it, start a new run from the exported folder without --ckpt_path, or accept the change: --resume.allow "
            f"[{', '.join(kinds)}]"
        )
    for change in changes:
        say(f"resumes with another {change.says}" if change.kind else change.says)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Keys whose values differ, each with both values, except those that a resumed run may change."""
    return [change.says for change in config_changes(old, new, prefix)]


def config_changes(old: Any, new: Any, prefix: str = "") -> list[Change]:
    """Keys of a configuration whose values differ, except those that a resumed run may change."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in sorted({*old, *new}, key=str)
            for change in config_changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    if old == new or prefix.startswith(FREE):
        return []
    if prefix.startswith("model.init_args.optimizer"):
        return [Change(FIXED, f"{prefix} ({old!r}, now {new!r})")]
    return [Change(_BY_KEY.get(prefix, "config"), f"{prefix} ({old!r}, now {new!r})")]


def manifest_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """What differs between the manifests of a run and of its resumption.

    Args:
        old: manifest of the run; what it lacks is not compared.
        new: manifest now.
    """
    yield from _packages(old.get("packages") or {}, new.get("packages") or {})
    if old.get("tokenizer") and new.get("tokenizer") and old["tokenizer"] != new["tokenizer"]:
        yield Change("tokenizer", "tokenizer (vocabulary, rules or chat template differ)")
    yield from _data(old.get("data") or [], new.get("data") or [])
    roles = new.get("roles") or {}
    for name, now in (new.get("parents") or {}).items():
        before = (old.get("parents") or {}).get(name)
        kind = kind_of_role(roles.get(name) or [])
        if before and kind and before != now:
            yield Change(kind, f"{_of(kind)} {name} (its weights have changed)")
        config = (old.get("configs") or {}).get(name)
        if config and kind and config != (new.get("configs") or {}).get(name):
            yield Change(kind, f"{_of(kind)} {name} (its config.json has changed)")


def kind_of_role(keys: Iterable[str]) -> str:
    """The kind of a folder's change, by the keys of the configuration that name it; empty for a tokenizer alone."""
    kinds = {
        "reward" if "reward" in key or "monitors" in key
        else "reference" if "reference" in key
        else "" if key.startswith("data.")
        else "model"
        for key in keys
    } or {"model"}  # fmt: skip
    return next(kind for kind in ("model", "reference", "reward", "") if kind in kinds)


def _of(kind: str) -> str:
    return {"model": "model", "reference": "reference model", "reward": "reward model"}[kind]


def _packages(old: Mapping[str, str | None], new: Mapping[str, str | None]) -> Iterator[Change]:
    changed = [
        f"{name} {old[name]}, now {new.get(name)}" for name in _MATTERING if name in old and old[name] != new.get(name)
    ]
    if changed:
        yield Change("", f"resumes with other versions, and the numbers may differ: {'; '.join(changed)}")


def _data(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Change]:
    before = {(entry["part"], number): entry for number, entry in enumerate(old)}
    for number, entry in enumerate(new):
        was = before.get((entry["part"], number))
        # Without its origin, which some rows of the user's own lack, a source is what was made of it.
        key = "origin" if was and was.get("origin") and entry.get("origin") else "fingerprint"
        if was is None or was[key] != entry[key]:
            kind = "validation" if entry["part"] == "val" else "data"
            rows = f"{(was or {}).get('counts', {}).get('rows', 0):,} rows, now {entry['counts'].get('rows', 0):,}"
            yield Change(kind, f"{entry['part']} data {entry['name']} (other content: {rows})")

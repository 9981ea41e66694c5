"""Checkpoint files: there whole or not at all, read back before an older one goes, and told apart from damaged ones."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lit_align.utils.disk import replacing, sync
from lit_align.utils.secret import redacted

# What unpacking a damaged or foreign file raises, depending on where the damage is.
_DAMAGED = (
    EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


# What Lightning keeps of a module that calls save_hyperparameters.
_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it on disk, reads it back, and only then gives it its name.

    Lightning's writes to the folder of temporary files and moves from there: between two file systems that is a copy,
    of which a kill leaves half under the name of a checkpoint. It also holds the bytes in memory twice.

    Only tensors and plain values are loaded (`weights_only`), unless `--weights_only false` asks for more by name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write.

        Raises:
            OSError: the disk is full, or did not keep what was written; what was there before still is.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        parameters = {name: redacted(checkpoint[name]) for name in _PARAMETERS if name in checkpoint}
        checkpoint = {**checkpoint, **parameters}
        with replacing(Path(path)) as partial:
            try:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                sync(partial)
                broken = _broken_record(partial)
            except (OSError, RuntimeError, zipfile.BadZipFile) as error:
                raise _not_written(Path(path), error) from error
            if broken is not None:
                raise OSError(errno.EIO, f"the disk did not keep what was written ({broken})", str(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read.

        Args:
            path: the file.
            map_location: as for torch.load; cpu maps the file, so that processes of one machine share its pages.
            weights_only: as for torch.load, and on unless it is off.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, not a checkpoint, or one that holds more than tensors and plain values.
        """
        map_location = map_location or _keep
        weights_only = True if weights_only is None else weights_only
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}{_others(Path(path))}")
        try:
            # torch reads numbers without looking at their checksums: a flipped bit would be trained on.
            if broken := _broken_record(Path(path)):
                raise zipfile.BadZipFile(f"{broken} does not match its checksum")
            checkpoint = torch.load(
                path, map_location=map_location, weights_only=weights_only, mmap=map_location == "cpu"
            )
        except _DAMAGED as error:
            if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
                raise ValueError(
                    f"the checkpoint {path} holds more than tensors and plain values, and could run code when loaded: "
                    f"--weights_only false, if you trust where it comes from ({_line(error)})"
                ) from error
            raise ValueError(
                f"the checkpoint {path} is damaged and cannot be read ({_line(error)}){_others(Path(path))}"
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint of a run: it holds {type(checkpoint).__name__} without its keys")
        return checkpoint


def _keep(storage: Any, location: str) -> Any:
    return storage


def _broken_record(path: Path) -> str | None:
    """The first record of a checkpoint, which is a zip archive, that does not match its checksum."""
    if path.stat().st_size == 0:
        raise EOFError("it is empty")
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _not_written(path: Path, error: Exception) -> OSError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch raises its own error while that of the disk passes through it
    number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
    reason = os.strerror(number) if cause is not None else _line(error)
    free = shutil.disk_usage(path.parent).free
    return OSError(
        number,
        f"{reason}: the checkpoint was not written ({free / 2**20:,.0f} MiB are free there), the one before is kept; "
        "make room and go on with --ckpt_path last",
        str(path),
    )


def _line(error: Exception) -> str:
    """The first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:200]


def _others(path: Path) -> str:
    """The other checkpoints of the folder, newest first: the way out."""
    target = path.resolve()
    others = [other for other in path.parent.glob("*.ckpt") if other.is_file() and other.resolve() != target]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    if not (good := [other for other in others[:5] if _whole(other)]):
        return (
            "; there is no other one beside it: without --ckpt_path a new run starts; in a pipeline or a sweep, remove "
            "the checkpoint to begin its part anew"
        )
    return (
        f"; go on from another one, newest first: {', '.join(map(str, good[:3]))}; in a pipeline or a sweep, remove "
        "the damaged one, and the newest of the others is taken"
    )


def _whole(path: Path) -> bool:
    """Whether a checkpoint can be read, so that it can be named as the way out."""
    try:
        return _broken_record(path) is None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return False

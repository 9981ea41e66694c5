"""What a frozen reference says of the answers of a data set: computed once, kept in a file, looked up by example."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_align.models.lora import is_adapter_weight, plain_name
from lit_align.models.sharding import whole
from lit_align.utils.disk import replacing


class ReferenceTable:
    """Log-probabilities of sequences, in nats, by the key of the example that holds them.

    An example's key is a hash of its tokens, so the table does not care for order, mixture or layout of the batches.

    Args:
        keys_E: keys of the examples, ascending. Shape (E,), int64.
        starts_E: where the sequences of each example begin, and last where they end. Shape (E + 1,), int64.
        logps_Q: log-probability of each sequence. Shape (Q,).
    """

    def __init__(self, keys_E: Tensor, starts_E: Tensor, logps_Q: Tensor) -> None:
        self.keys_E, self.starts_E, self.logps_Q = keys_E, starts_E, logps_Q

    @classmethod
    def of(cls, logps: Mapping[int, Tensor]) -> ReferenceTable:
        """From the log-probabilities of each example, shape (K,), by key."""
        ordered = sorted(logps.items())
        sizes = torch.tensor([0, *(len(values) for _, values in ordered)])
        values = torch.cat([values.cpu() for _, values in ordered]) if ordered else torch.zeros(0)
        return cls(torch.tensor([key for key, _ in ordered]), sizes.cumsum(0), values)

    def lookup(self, key_E: Tensor) -> Tensor:
        """Log-probabilities of the sequences of these examples, one example after the other. Shape (Q,), on the CPU.

        Raises:
            KeyError: an example that the table was not made for.
        """
        rows = torch.searchsorted(self.keys_E, key_E.cpu()).clamp(max=max(len(self.keys_E) - 1, 0))
        if not len(self.keys_E) or not torch.equal(self.keys_E[rows], key_E.cpu()):
            raise KeyError("an example that the reference was not asked about: the data changed under the run")
        return torch.cat([self.logps_Q[self.starts_E[row] : self.starts_E[row + 1]] for row in rows.tolist()])

    def save(self, path: Path) -> None:
        """Write the file whole or not at all; processes that race write the same bytes."""
        tensors = {"keys": self.keys_E, "starts": self.starts_E, "logps": self.logps_Q}
        with replacing(path, racing=True) as partial:
            save_file(tensors, partial, metadata={"sha256": _checksum(tensors)})

    @classmethod
    def load(cls, path: Path) -> ReferenceTable | None:
        """What a file holds; None where there is none, or (with a warning) where it is damaged."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("keys", "starts", "logps")}
                intact = (file.metadata() or {}).get("sha256") == _checksum(tensors)
        except (SafetensorError, OSError):
            intact = False
        if not intact:
            warnings.warn(f"{path} is damaged: the reference is computed anew", stacklevel=2)
            return None
        return cls(tensors["keys"], tensors["starts"], tensors["logps"])


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights and their names, adapters left out: what the model is when they are off."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if is_adapter_weight(name):
            continue
        name = plain_name(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(whole(tensor)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Without a copy, where the tensor lies on the CPU."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data

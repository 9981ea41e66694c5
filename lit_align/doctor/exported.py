"""Whether the folder that a run would leave is the model that was trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lit_align.doctor.finding import Finding
from lit_align.models.reload import check_export
from lit_align.models.sharding import is_sharded
from lit_align.modules.base import AlignModule

# Above so many bytes of weights the check is made only when it is asked for: it writes them all.
LARGE = 2**30


def reloaded(module: AlignModule, asked: bool | None = None) -> Iterator[Finding]:
    """Export to a folder that is removed again, reload with plain transformers, and compare one forward.

    Args:
        module: with its model; adapters, which begin as no change at all, are moved for the check and put back.
        asked: whether to check; null for models of at most `LARGE` bytes.
    """
    model: Any = getattr(module, "exported", lambda: None)()
    if model is None or asked is False or is_sharded(model):
        return
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if asked is None and size > LARGE:
        says = f"not compared with its export, which is {size / 2**30:.1f} GiB"
        yield Finding("ok", "export", f"{says}: lit-align doctor FILE --reload does it")
        return
    network: Any = getattr(module, "network", None)
    lora = getattr(network, "lora", None)
    adapter = lora is not None and lora.export == "adapter"
    try:
        with moved_adapters(model):
            code = {name: getattr(network, name) for name in ("revision", "trust_remote_code") if network is not None}
            difference = check_export(model, adapter, **code)
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("wrong", "export", " ".join(str(error).split()))
        return
    kind = "an adapter" if adapter else "a whole model, adapters folded in" if lora is not None else "a whole model"
    yield Finding("ok", "export", f"{kind}, reloaded by plain transformers, gives the same to {difference:.1e}")


@contextlib.contextmanager
def moved_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters with small random numbers where they are zeros, so that one that is not exported is seen."""
    zeros = [p for name, p in model.named_parameters() if "lora_" in name and not p.detach().any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(0.02 * noise.to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()

"""A policy and its frozen reference, whose log-probabilities are computed in every step or cached between runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from lit_align.functional.logprobs import sum_by_sequence
from lit_align.models.network import Network, as_network
from lit_align.models.reference_logps import ReferenceTable, fingerprint
from lit_align.modules.policy import PolicyModule
from lit_align.types import PackedBatch, PreferenceBatch
from lit_align.utils.cache_folder import cache_folder, can_keep


class ReferencedModule(PolicyModule):
    """A policy and its frozen reference, for methods on preferences.

    Args:
        network: the policy.
        reference: reference model; null takes the model that training starts from.
        cache_reference: compute the reference's log-probability of each completion once before training, cache them for
            later runs, and free the reference.
        options: options of `PolicyModule`.
    """

    needs_reference = True

    def __init__(
        self, network: Network, reference: Network | None = None, cache_reference: bool = False, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.reference_network = None if reference is None else as_network(reference)
        self.cache_reference = cache_reference
        self.reference_table: ReferenceTable | None = None

    def on_fit_start(self) -> None:
        """Free the reference model after its log-probs are cached."""
        super().on_fit_start()
        if self.cache_reference and self.needs_reference:
            self.reference_table = reference_table(self)
            if self.reference_table is not None:
                self.reference = None

    def reference_sums(self, batch: PreferenceBatch) -> Tensor:
        """Log-probability of each completion under the reference, in nats. Shape (Q,)."""
        if self.reference_table is not None and batch.key_E is not None and self.trainer.state.fn == "fit":
            return self.reference_table.lookup(batch.key_E).to(self.device)
        if self.reference is None and not self.reference_is_below:  # freed by an earlier fit
            self.load_reference(self.reference_network)
            self.reference = self.reference.to(self.device)  # type: ignore[attr-defined]
        return live_sums(self, batch.packed)


def reference_table(module: PolicyModule) -> ReferenceTable | None:
    """Read the table from the cache, or compute it (each rank its share) and cache it.

    The cache key covers everything that the numbers depend on: the weights of the reference, the tokenised rows
    (tokenizer, template, truncation), and the precision.

    Args:
        module: holds the reference on its device, and the Trainer with its data module.

    Returns:
        The table; None, with a warning, if the cache folder is not writable. The reference then stays in memory.

    Raises:
        ValueError: the data module cannot list its examples.
    """
    trainer = module.trainer
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "every_example"):
        given = "a plain loader" if data is None else type(data).__name__
        raise ValueError(f"cache_reference needs a PreferenceDataModule, and {given} is none: unset it")
    folder = cache_folder("reference")
    if not trainer.strategy.reduce_boolean_decision(can_keep(folder, "the reference is computed in every step")):
        return None
    model = module.reference if module.reference is not None else module.policy
    told = [fingerprint(model), str(trainer.precision), sorted({entry["fingerprint"] for entry in data.manifest()})]
    path = folder / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}.safetensors"
    table = ReferenceTable.load(path)
    if trainer.strategy.reduce_boolean_decision(table is not None):
        rank_zero_info(f"reference log-probabilities: read from {path}")
        return table
    logps = _compute(module, data)
    logps = {key: values for share in module.from_ranks(logps) for key, values in share.items()}
    table = ReferenceTable.of(logps)
    if trainer.is_global_zero:
        table.save(path)
        rank_zero_info(f"reference log-probabilities of {len(logps):,} examples: kept in {path}")
    return table


@torch.no_grad()
def _compute(module: PolicyModule, data: Any) -> dict[int, Tensor]:
    strategy, logps = module.trainer.strategy, dict[int, Tensor]()
    with module.trainer.precision_plugin.forward_context():
        for batch in tqdm(data.every_example(), "reference", delay=2, leave=False, disable=module.global_rank > 0):
            batch = strategy.batch_to_device(batch)
            sums_Q = live_sums(module, batch.packed).cpu()
            logps |= dict(zip(batch.key_E.tolist(), _by_example(sums_Q, batch), strict=True))
    return logps


def live_sums(module: PolicyModule, packed: PackedBatch) -> Tensor:
    """Log-probability of each sequence under the loaded reference, in nats. Shape (Q,)."""
    return sum_by_sequence(module.reference_logps(packed), packed.sequence_S, packed.num_sequences)


def _by_example(values_Q: Tensor, batch: PreferenceBatch) -> list[Tensor]:
    return list(values_Q.split(torch.bincount(batch.packed.example_Q).tolist()))

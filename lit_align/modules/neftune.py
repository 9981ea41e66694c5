"""NEFTune: noise on the embeddings while a supervised loss is computed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lit_align.functional.packing import unpack
from lit_align.functional.sft import neftune_noise
from lit_align.models.language import LanguageModel
from lit_align.types import PackedBatch


@contextlib.contextmanager
def noisy_embeddings(policy: LanguageModel, batch: PackedBatch, alpha: float, seed: int) -> Iterator[None]:
    """Add NEFTune's noise to what a batch is embedded as, for as long as the context is open.

    L is the length of an example by itself, prompt included, however examples are packed. (transformers and TRL take
    the width of the padded batch, so that there an example's noise depends on its neighbours.) The noise is a function
    of the seed and of the example's tokens alone: packing, micro-batches, order and processes do not change it.

    Args:
        policy: its input embeddings are hooked.
        batch: of sequences without branches; it goes through the policy in the context.
        alpha: size of the noise; see `neftune_noise`.
        seed: another one for every optimizer step.
    """
    if not policy.packs:
        batch = unpack(batch)

    def add(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        tree = batch.tree_RN.flatten().cpu().numpy()
        tokens = batch.tokens_RN.flatten().cpu().numpy()
        noise_MH = embedded.new_zeros(len(tree), embedded.shape[-1])
        generator = torch.Generator(embedded.device)
        for index in range(tree.max() + 1):
            at = np.flatnonzero(tree == index)
            digest = hashlib.blake2b(np.array([seed, *tokens[at]], np.int64).tobytes(), digest_size=7).digest()
            generator.manual_seed(int.from_bytes(digest, "big"))
            where = torch.from_numpy(at).to(embedded.device)
            noise_MH[where] = neftune_noise(noise_MH[where], alpha, generator)
        if embedded.shape[:2] != batch.tokens_RN.shape:  # tree by tree: what pads a row is not computed
            noise_MH = noise_MH[batch.tree_RN.flatten() >= 0]
        return embedded + noise_MH.view_as(embedded)

    handle = policy.hf.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()

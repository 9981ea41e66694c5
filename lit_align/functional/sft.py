"""Supervised fine-tuning: negative log-likelihood of the scored tokens, its DFT form, and noise on embeddings."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["nll", "dft"]


def sft_loss(logps_S: Tensor) -> tuple[Tensor, int]:
    """Sum of negative log-likelihoods, and the number of tokens in the sum.

    Sum and count are returned separately. A mean per micro-batch, averaged over micro-batches, would weigh a token by
    the length of its micro-batch (10 % off on ragged data). The caller divides once per optimizer step, by the count
    over all micro-batches and ranks. PPO-ptx (Ouyang et al. 2022, equation 2) adds this loss on pretraining text.

    Args:
        logps_S: log-probability of each scored token, in nats. Shape (S,).

    Returns:
        Sum in nats (a scalar) and the number of tokens.
    """
    return -logps_S.sum(), logps_S.numel()


def dft_loss(logps_S: Tensor) -> tuple[Tensor, int]:
    """Dynamic fine-tuning: negative log-likelihood of each token, weighted by its (detached) probability.

    The gradient of the plain loss is a policy gradient with a reward of 1 / p(token): unlikely tokens pull hardest. The
    weight cancels that division.

    Source: Wu et al. 2025, "On the Generalization of SFT", the loss by tokens; TRL's `loss_type="dft"`.

    Args:
        logps_S: log-probability of each scored token, in nats. Shape (S,).

    Returns:
        Sum (a scalar) and the number of tokens, like `sft_loss`.
    """
    return -(logps_S.detach().exp() * logps_S).sum(), logps_S.numel()


SFT_LOSSES = {"nll": sft_loss, "dft": dft_loss}


def neftune_noise(like_LH: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Noise for the embeddings of one sequence: uniform in alpha / sqrt(L H) * [-1, 1].

    Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", algorithm 1.

    Args:
        like_LH: embeddings of a sequence of L tokens, the prompt's included. Shape (L, H).
        alpha: size of the noise; the paper tries 5, 10 and 15.
        generator: on the device of the embeddings.

    Returns:
        The noise to add. Shape (L, H).
    """
    noise_LH = torch.rand(like_LH.shape, dtype=like_LH.dtype, device=like_LH.device, generator=generator)
    return (2.0 * noise_LH - 1.0) * (alpha / math.sqrt(like_LH.numel()))

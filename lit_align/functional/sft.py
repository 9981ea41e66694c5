"""Supervised fine-tuning: negative log-likelihood of the scored tokens, its DFT form, and noise on embeddings."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["nll", "dft"]


def sft_loss(logps_S: Tensor) -> tuple[Tensor, int]:
    """Sum of negative log-likelihoods, and how many tokens it is a sum of.

    The two leave separately: a mean per micro-batch, averaged over micro-batches, weighs a token by the length of the
    micro-batch it happened to fall in (10 % off on ragged data). The caller divides once per optimizer step, by the
    count over all micro-batches and ranks. PPO-ptx (Ouyang et al. 2022, equation 2) adds this same loss, on
    pretraining text, to PPO's.

    Args:
        logps_S: log-probability of each scored token, in nats. Shape (S,).

    Returns:
        Sum in nats (a scalar) and the number of tokens.
    """
    return -logps_S.sum(), logps_S.numel()


def dft_loss(logps_S: Tensor) -> tuple[Tensor, int]:
    """Dynamic fine-tuning: each token's negative log-likelihood, weighed by its probability, which gets no gradient.

    The gradient of the plain loss is a policy gradient whose reward is divided by the probability of the
    demonstration: what the model finds unlikely pulls hardest. The weight takes that division back.

    Source: Wu et al. 2025, "On the Generalization of SFT", the loss by tokens; TRL's `loss_type="dft"`.

    Args:
        logps_S: log-probability of each scored token, in nats. Shape (S,).

    Returns:
        Sum (a scalar) and the number of tokens, as `sft_loss`.
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
        Noise alone. Shape (L, H).
    """
    noise_LH = torch.rand(like_LH.shape, dtype=like_LH.dtype, device=like_LH.device, generator=generator)
    return (2.0 * noise_LH - 1.0) * (alpha / math.sqrt(like_LH.numel()))

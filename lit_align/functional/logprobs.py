"""Log-probabilities and entropies of scored tokens, in nats.

Results are fp32 (float64 stays float64), whatever precision the model ran in: a log-probability in bfloat16 has two or
three digits, and a ratio of two of them has none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Convert half precision to fp32; keep fp32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def shape_logits(
    logits_SV: Tensor, temperature: float = 1.0, top_p: float = 1.0, keep_S: Tensor | None = None
) -> Tensor:
    """Logits of the sampling distribution: temperature first, then the nucleus.

    The sampler and the scorer share this function, so a completion is scored under the distribution that it was drawn
    from. Scoring raw logits of tempered samples would make the policy gradient off-policy from the first step.

    Args:
        logits_SV: raw logits. Shape (S, V).
        temperature: divides the logits; above 0.
        top_p: keep the smallest set of most probable tokens whose mass reaches this; in (0, 1].
        keep_S: token to keep even outside the nucleus, so that a token drawn from an older policy has a finite score.
            Shape (S,).

    Returns:
        Shaped logits, -inf outside the nucleus. Shape (S, V).

    Raises:
        ValueError: temperature or top_p out of range.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus sampling), section 3.1.
    """
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}")
    logits_SV = upcast(logits_SV)
    if temperature != 1.0:
        logits_SV = logits_SV / temperature
    if top_p == 1.0:
        return logits_SV
    sorted_SV, order_SV = logits_SV.sort(dim=-1, descending=True)
    probs_SV = sorted_SV.softmax(-1)
    # Drop a token if the mass *before* it already reaches top_p; the most probable token always stays.
    drop_sorted_SV = probs_SV.cumsum(-1) - probs_SV >= top_p
    drop_SV = torch.zeros_like(drop_sorted_SV).scatter(-1, order_SV, drop_sorted_SV)
    if keep_S is not None:
        drop_SV = drop_SV.scatter(-1, keep_S[:, None], False)
    return logits_SV.masked_fill(drop_SV, -torch.inf)


def token_logprobs(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """Log p(target), in nats.

    Args:
        logits_SV: logits at the scored positions. Shape (S, V).
        target_S: token ids. Shape (S,).

    Returns:
        Shape (S,), fp32 or float64.
    """
    return -torch.nn.functional.cross_entropy(upcast(logits_SV), target_S, reduction="none")


def token_entropies(logits_SV: Tensor) -> Tensor:
    """Entropy of the next-token distribution, in nats; at least 0.

    Args:
        logits_SV: logits, -inf allowed (a token outside the nucleus adds nothing). Shape (S, V).

    Returns:
        Shape (S,).
    """
    logps_SV = upcast(logits_SV).log_softmax(-1)
    probs_SV = logps_SV.exp()
    return -(probs_SV * logps_SV.masked_fill(probs_SV == 0, 0.0)).sum(-1)


def sum_by_sequence(values_S: Tensor, sequence_S: Tensor, num_sequences: int) -> Tensor:
    """Sum a value per scored token over each sequence; a sequence without scored tokens gets 0.

    Args:
        values_S: shape (S,).
        sequence_S: sequence of each scored token. Shape (S,).
        num_sequences: Q.

    Returns:
        Shape (Q,).
    """
    return values_S.new_zeros(num_sequences).index_add(0, sequence_S, values_S)


def add_at_ends(values_S: Tensor, ends_Q: Tensor, sequence_S: Tensor) -> Tensor:
    """Add a value per sequence to its last scored token; a sequence without scored tokens is skipped.

    Args:
        values_S: shape (S,).
        ends_Q: shape (Q,).
        sequence_S: sequence of each scored token, ascending. Shape (S,).

    Returns:
        Shape (S,).
    """
    tokens_Q = torch.bincount(sequence_S, minlength=len(ends_Q))
    scored_Q = tokens_Q > 0
    return values_S.index_add(0, tokens_Q.cumsum(0)[scored_Q] - 1, ends_Q[scored_Q])

"""From hidden states to log-probabilities without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.functional.logprobs import shape_logits


def linear_logprobs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    target_S: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    entropies: bool = False,
    chunk: int = 128,
) -> tuple[Tensor, Tensor | None]:
    """Log p(target) under a linear head without bias, and the entropy of p, both from one pass over the logits.

    The logits are made `chunk` rows at a time, small enough to stay in the cache of a processor, and made again in
    backward: one matrix product more than holding them all, and up to three tensors of S x V less.

    Args:
        hidden_SH: the states that predict. Shape (S, H).
        weight_VH: the head. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1]; see `shape_logits`.
        entropies: also give them.
        chunk: rows whose logits are held at once.

    Returns:
        Log-probabilities in nats, shape (S,), in fp32 or float64; and entropies in nats, shape (S,), without gradient,
        or None.
    """
    logps_S, entropies_S = _LinearLogprobs.apply(hidden_SH, weight_VH, target_S, temperature, top_p, entropies, chunk)
    return logps_S, entropies_S


class _LinearLogprobs(torch.autograd.Function):
    """d log p(t) / d logits = onehot(t) - p, and p is made from the logits and their logsumexp, which is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        target_S: Tensor,
        temperature: float,
        top_p: float,
        entropies: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.options = temperature, top_p, chunk
        logps, totals, spreads = [], [], []
        for hidden_CH, target_C in zip(hidden_SH.split(chunk), target_S.split(chunk), strict=True):
            logits_CV = shape_logits(hidden_CH @ weight_VH.T, temperature, top_p, keep_S=target_C)
            total_C = logits_CV.logsumexp(-1)
            logps.append(logits_CV.gather(1, target_C[:, None])[:, 0] - total_C)
            totals.append(total_C)
            if entropies:
                probs_CV = (logits_CV - total_C[:, None]).exp_()
                # H = logsumexp - E[logit]; a token outside the nucleus has logit -inf, and adds nothing.
                mean_C = probs_CV.mul_(logits_CV.masked_fill_(probs_CV == 0, 0.0)).sum(-1)
                spreads.append((total_C - mean_C).clamp_(min=0.0))
        ctx.save_for_backward(hidden_SH, weight_VH, target_S, torch.cat(totals))
        entropies_S = torch.cat(spreads) if entropies else None
        if entropies_S is not None:
            ctx.mark_non_differentiable(entropies_S)
        return torch.cat(logps), entropies_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, target_S, total_S = ctx.saved_tensors
        temperature, top_p, chunk = ctx.options
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_SH) if to_hidden else None
        # Sums over chunks, in bf16, would lose what each adds.
        grad_weight = torch.zeros_like(weight_VH, dtype=total_S.dtype) if to_weight else None
        for start in range(0, len(hidden_SH), chunk):
            at = slice(start, start + chunk)
            logits_CV = shape_logits(hidden_SH[at] @ weight_VH.T, temperature, top_p, keep_S=target_S[at])
            grad_CV = logits_CV.sub_(total_S[at, None]).exp_().mul_(-grad_S[at, None])
            grad_CV.scatter_add_(1, target_S[at, None], grad_S[at, None])
            grad_CV = grad_CV.div_(temperature).to(weight_VH.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight.add_(grad_CV.T @ hidden_SH[at])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None

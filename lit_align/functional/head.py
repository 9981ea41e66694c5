"""From hidden states to log-probabilities, with the logits passed over as seldom as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.functional.logprobs import shape_logits, upcast


def linear_logprobs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    target_S: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    entropies: bool = False,
    chunk: int = 128,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log p(target) under a linear head without bias, and the entropy of p, both from one pass over the logits.

    The logits are made and looked at `chunk` rows at a time, few enough to stay in the cache of a processor. Where they
    lie they become exp(logit - largest), which is kept, and in backward its gradient: one tensor of S x V, and one
    exponential, where softmax and cross-entropy as separate operations take three and two. Or they are made again,
    which takes no tensor, and a product more.

    Args:
        hidden_SH: the states that predict. Shape (S, H).
        weight_VH: the head. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1]; see `shape_logits`.
        entropies: also give them.
        chunk: rows whose logits are looked at together.
        keep: hold a number a logit until backward.

    Returns:
        Log-probabilities in nats, shape (S,), in fp32 or float64; and entropies in nats, shape (S,), without gradient,
        or None.
    """
    options = temperature, top_p, entropies, chunk, keep and torch.is_grad_enabled()
    logps_S, entropies_S = _LinearLogprobs.apply(hidden_SH, weight_VH, target_S, *options)
    return logps_S, entropies_S


class _LinearLogprobs(torch.autograd.Function):
    """d log p(t) / d logits = onehot(t) - p, where p is the kept exp(logit - largest) over its sum."""

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
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.options = temperature, top_p, chunk
        count, vocabulary = len(hidden_SH), len(weight_VH)
        logps_S, sum_S, entropies_S = (upcast(hidden_SH.new_empty(count)) for _ in range(3))
        # Written over and over: fresh memory costs a processor more than the arithmetic that is done in it.
        kept_SV = logps_S.new_empty(count if keep else min(chunk, count), vocabulary)
        scratch_CV = logps_S.new_empty(min(chunk, count) if entropies else 0, vocabulary)
        for start in range(0, count, chunk):
            at = slice(start, start + chunk)
            target_C = target_S[at]
            logits_CV = kept_SV[at] if keep else kept_SV[: len(target_C)]
            _logits(hidden_SH[at], weight_VH, target_C, temperature, top_p, logits_CV)
            said_C = logits_CV.gather(1, target_C[:, None])[:, 0]
            largest_C = logits_CV.amax(-1)
            relative_CV = logits_CV.sub_(largest_C[:, None])
            if entropies:
                scratch_CV[: len(target_C)].copy_(relative_CV)
            weights_CV = relative_CV.exp_()
            sum_S[at] = weights_CV.sum(-1)
            log_sum_C = sum_S[at].log()
            logps_S[at] = said_C - largest_C - log_sum_C
            if entropies:
                # H = logsumexp - E[logit]; a token outside the nucleus has logit -inf, and adds nothing.
                relative_CV = scratch_CV[: len(target_C)]
                if top_p < 1.0:
                    relative_CV.masked_fill_(weights_CV == 0, 0.0)
                mean_C = relative_CV.mul_(weights_CV).sum(-1) / sum_S[at]
                entropies_S[at] = (log_sum_C - mean_C).clamp_(min=0.0)
        ctx.kept = kept_SV if keep else None
        ctx.save_for_backward(hidden_SH, weight_VH, target_S, sum_S)
        if not entropies:
            return logps_S, None
        ctx.mark_non_differentiable(entropies_S)
        return logps_S, entropies_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, target_S, sum_S = ctx.saved_tensors
        temperature, top_p, chunk = ctx.options
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        kept_SV, ctx.kept = ctx.kept, None  # overwritten below: a second backward makes them again
        grad_hidden = torch.empty_like(hidden_SH) if to_hidden else None
        # Sums over chunks, in bf16, would lose what each adds.
        grad_weight = torch.empty_like(weight_VH, dtype=sum_S.dtype) if to_weight else None
        narrow = weight_VH.device.type == "cpu" and weight_VH.shape[1] <= 256

        def spread(grad_CV: Tensor, at: slice, first: bool) -> None:
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden[at])
            if grad_weight is None:
                return
            if first and narrow:
                # A CPU's product with few columns runs at two thirds of the rate of its transpose.
                grad_weight.copy_((hidden_SH[at].T @ grad_CV).T)
            elif grad_weight.dtype == grad_CV.dtype:
                # beta = 0 writes, and does not read what was there.
                torch.addmm(grad_weight, grad_CV.T, hidden_SH[at], beta=0 if first else 1, out=grad_weight)
            elif first:
                grad_weight.copy_(grad_CV.T @ hidden_SH[at])
            else:
                grad_weight.add_(grad_CV.T @ hidden_SH[at])

        weights_SV = kept_SV if kept_SV is not None else sum_S.new_empty(min(chunk, len(sum_S)), len(weight_VH))
        grad_S = grad_S / temperature
        for start in range(0, len(hidden_SH), chunk):
            at = slice(start, start + chunk)
            weights_CV = weights_SV[at] if kept_SV is not None else weights_SV[: len(target_S[at])]
            if kept_SV is None:
                _logits(hidden_SH[at], weight_VH, target_S[at], temperature, top_p, weights_CV)
                weights_CV.sub_(weights_CV.amax(-1, keepdim=True)).exp_()
            grad_CV = weights_CV.mul_((-grad_S[at] / sum_S[at])[:, None])
            grad_CV.scatter_add_(1, target_S[at, None], grad_S[at, None])
            if kept_SV is None:
                spread(grad_CV, at, first=start == 0)
        if kept_SV is not None:  # whole: products of a few rows with many columns are slow
            spread(kept_SV, slice(None), first=True)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VH.dtype) if len(sum_S) else torch.zeros_like(weight_VH)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, target_C: Tensor, temperature: float, top_p: float, out_CV: Tensor
) -> None:
    """Write the shaped logits of a chunk, in fp32 or float64."""
    if hidden_CH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ weight_VH.T)
    if temperature != 1.0 or top_p != 1.0:
        out_CV.copy_(shape_logits(out_CV, temperature, top_p, keep_S=target_C))

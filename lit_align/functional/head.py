"""From hidden states to log-probabilities, with the logits passed over as seldom as can be."""

from __future__ import annotations

import math
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
    hold: int | None = None,
    hits_S: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log p(target) under a linear head without bias, and the entropy of p, both from one pass over the logits.

    The logits are made and looked at `chunk` rows at a time, few enough to stay in the cache of a processor. Where they
    lie they become probabilities p, and then p - onehot, their own gradient up to a factor for each row: one tensor of
    S x V, and one exponential, where softmax and cross-entropy as separate operations take three and two. The states'
    gradient, (p - onehot) W / temperature, lacks that factor alone and is computed at once. With it, in full precision,
    the entropy, -log p(target) - h (p - onehot) W / temperature, costs no pass over S x V; and a frozen head keeps
    nothing of that size (in fp16 it does). Where there are too many logits to hold, those that a trained head's
    gradient needs are made again in backward, `hold` rows at a time: no tensor of S x V, and a product more.

    Args:
        hidden_SH: the states that predict. Shape (S, H).
        weight_VH: the head. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1]; see `shape_logits`.
        entropies: also give them.
        chunk: rows whose logits are looked at together.
        hold: rows whose probabilities there is memory for; null for all.
        hits_S: written to, if given: whether no token is more probable than the target. Shape (S,), bool.

    Returns:
        Log-probabilities in nats, shape (S,), in fp32 or float64; and entropies in nats, shape (S,), without gradient,
        or None.
    """
    hold = max(len(hidden_SH), 1) if hold is None else hold
    # In a list, which autograd does not look into: it is no part of the graph.
    hits = [] if hits_S is None else [hits_S]
    options = temperature, top_p, entropies, min(chunk, hold), hold, torch.is_grad_enabled(), hits
    # Whoever calls has chosen the product's precision; sums over the vocabulary are for none but fp32.
    with torch.autocast(hidden_SH.device.type, enabled=False):
        logps_S, entropies_S = _LinearLogprobs.apply(hidden_SH, weight_VH, target_S, *options)
    return logps_S, entropies_S


class _LinearLogprobs(torch.autograd.Function):
    """d log p(t) / d logits = onehot(t) - p, to be multiplied by the gradient of log p only where it is S x H."""

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
        hold: int,
        learning: bool,
        hits: list[Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.options = temperature, top_p, chunk, hold
        count = len(hidden_SH)
        to_hidden, to_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        # fp16 has no number as small as most probabilities, until the loss's scale has made it larger.
        pull_SH = torch.empty_like(hidden_SH) if to_hidden and weight_VH.dtype != torch.float16 else None
        later = to_weight or (to_hidden and pull_SH is None)
        keep = later and count <= hold
        # Of each target log p, its logit, and how far the mean logit lies above that.
        logps_S, said_S, beyond_S = (upcast(hidden_SH.new_empty(count)) for _ in range(3))
        averages = entropies and (pull_SH is None or not _exact(pull_SH))
        # Written over and over: fresh memory costs a processor more than the arithmetic that is done in it.
        room_PV = logps_S.new_empty(min(hold if keep or pull_SH is not None else chunk, count), len(weight_VH))
        scratch_CV = logps_S.new_empty(min(chunk, count) if averages else 0, len(weight_VH))
        for first in range(0, count, max(len(room_PV), 1)):
            last = min(first + len(room_PV), count)
            for start in range(first, last, chunk):
                at = slice(start, min(start + chunk, last))
                logits_CV, target_C1 = room_PV[start - first : at.stop - first], target_S[at, None]
                _logits(hidden_SH[at], weight_VH, target_S[at], temperature, top_p, logits_CV)
                said_S[at] = logits_CV.gather(1, target_C1)[:, 0]
                for hits_S in hits:
                    hits_S[at] = said_S[at] >= logits_CV.amax(-1)
                before_CV = scratch_CV[: len(logits_CV)].copy_(logits_CV) if averages else None
                probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
                logps_S[at] = probs_CV.gather(1, target_C1)[:, 0].log()
                if before_CV is not None:
                    beyond_S[at] = _average(before_CV, probs_CV) - said_S[at]
            if keep or pull_SH is not None:
                error_PV = _subtract_onehot_(room_PV[: last - first], target_S[first:last])
            if pull_SH is not None:
                torch.mm(error_PV.to(weight_VH.dtype), weight_VH, out=pull_SH[first:last])
        # A probability that is too small for its type has no logarithm: those few are computed from their logits.
        lost_S = logps_S < math.log(torch.finfo(logps_S.dtype).tiny) + 10
        if lost_S.any():
            rows = hidden_SH[lost_S], weight_VH, target_S[lost_S], temperature, top_p
            logits_CV = _logits(*rows, logps_S.new_empty(int(lost_S.sum()), len(weight_VH)))
            logps_S[lost_S] = said_S[lost_S] - logits_CV.logsumexp(-1)
        inputs = (hidden_SH, weight_VH, target_S) if later else (None, None, None)
        ctx.save_for_backward(*inputs, room_PV if keep else None, pull_SH)
        if not entropies:
            return logps_S, None
        if pull_SH is not None and not averages:
            beyond_S = torch.linalg.vecdot(hidden_SH, pull_SH) / temperature
        entropies_S = (-logps_S - beyond_S).clamp_(min=0.0)
        ctx.mark_non_differentiable(entropies_S)
        return logps_S, entropies_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, target_S, kept_SV, pull_SH = ctx.saved_tensors
        temperature, top_p, chunk, hold = ctx.options
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_S = grad_S / -temperature  # of p - onehot
        grad_hidden = grad_weight = None
        if to_hidden and pull_SH is not None:
            grad_hidden = (pull_SH * grad_S[:, None]).to(pull_SH.dtype)
        elif to_hidden:
            grad_hidden = torch.empty_like(hidden_SH)
        if not to_weight and (pull_SH is not None or not to_hidden):
            return grad_hidden, *[None] * 9
        # A CPU's product with few columns runs at two thirds of the rate of its transpose.
        narrow = weight_VH.device.type == "cpu" and weight_VH.shape[1] <= 128
        early = weight_VH.dtype == torch.float16
        room_PV = kept_SV if kept_SV is not None else grad_S.new_empty(min(hold, len(target_S)), len(weight_VH))
        # The products take as many rows as there is room for: of few rows with many columns they are slow.
        for first in range(0, len(target_S), max(len(room_PV), 1)):
            piece = slice(first, first + len(room_PV))
            hidden_PH, target_P, grad_P1 = hidden_SH[piece], target_S[piece], grad_S[piece, None]
            error_PV = room_PV[: len(target_P)]
            if kept_SV is None:
                for start in range(0, len(target_P), chunk):
                    at = slice(start, start + chunk)
                    _logits(hidden_PH[at], weight_VH, target_P[at], temperature, top_p, error_PV[at])
                    torch.softmax(error_PV[at], -1, out=error_PV[at])
                _subtract_onehot_(error_PV, target_P)
            error_PV, factor_P1 = (error_PV * grad_P1, torch.ones_like(grad_P1)) if early else (error_PV, grad_P1)
            error_PV = error_PV.to(weight_VH.dtype)
            if grad_hidden is not None and pull_SH is None:
                grad_hidden[piece] = (error_PV @ weight_VH) * factor_P1
            if to_weight:
                scaled_PH = (hidden_PH * factor_P1).to(weight_VH.dtype)
                product_VH = (scaled_PH.T @ error_PV).T.contiguous() if narrow else error_PV.T @ scaled_PH
                # Sums over pieces, in bf16, would lose what each adds.
                product_VH = product_VH.to(grad_S.dtype)
                grad_weight = product_VH if grad_weight is None else grad_weight.add_(product_VH)
        if to_weight:
            grad_weight = torch.zeros_like(weight_VH) if grad_weight is None else grad_weight.to(weight_VH.dtype)
        return grad_hidden, grad_weight, *[None] * 8


def _exact(states: Tensor) -> bool:
    """Whether products of such tensors say enough of an entropy: those in half precision, or TF32, do not."""
    full = torch.get_float32_matmul_precision() == "highest"
    return states.dtype == torch.float64 or (states.dtype == torch.float32 and full)


def _average(logits_CV: Tensor, probs_CV: Tensor) -> Tensor:
    """Of what is in the nucleus: a logit outside is -inf, and its probability 0."""
    return torch.linalg.vecdot(probs_CV, logits_CV.clamp_(min=torch.finfo(logits_CV.dtype).min))


def _subtract_onehot_(probs_SV: Tensor, target_S: Tensor) -> Tensor:
    """In place."""
    return probs_SV.scatter_add_(1, target_S[:, None], probs_SV.new_full((len(target_S), 1), -1.0))


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, target_C: Tensor, temperature: float, top_p: float, out_CV: Tensor
) -> Tensor:
    """Write the shaped logits of a chunk, in fp32 or float64, and return them."""
    if hidden_CH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ weight_VH.T)
    if temperature != 1.0 or top_p != 1.0:
        out_CV.copy_(shape_logits(out_CV, temperature, top_p, keep_S=target_C))
    return out_CV

"""Log-probabilities and entropies straight from hidden states, without a tensor of all logits.

`linear_logprobs` computes what `reference_logprobs` computes, and is what training uses. Read the reference first.

Share of a training step that this saves (experiments/bench/kernels.py): sft 1.8%.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.functional.logprobs import shape_logits, token_entropies, token_logprobs, upcast


def reference_logprobs(
    hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log p(target) and the entropy of p, in nats, written plainly: it holds S x V logits. For tests and readers.

    Args:
        hidden_SH: hidden states that predict the targets. Shape (S, H).
        weight_VH: weights of the vocabulary head. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1]; see `shape_logits`.

    Returns:
        Log-probabilities and entropies in nats, each of shape (S,).
    """
    logits_SV = shape_logits(hidden_SH @ weight_VH.T, temperature, top_p, keep_S=target_S)
    return token_logprobs(logits_SV, target_S), token_entropies(logits_SV)


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

    The forward computes `chunk` rows of logits at a time, few enough to stay in a processor's cache. It reuses their
    buffer in place: softmax gives p, and subtracting 1 at the target gives p - onehot, the gradient of the logits up to
    one factor per row. So one S x V tensor and one exponential do the work of softmax and cross-entropy, which as
    separate operations take three and two. The same pass computes (p - onehot) W / temperature, the gradient of the
    hidden states up to that factor. In full precision it also gives the entropy without another pass over S x V:
    -log p(target) - h (p - onehot) W / temperature.

    A frozen head keeps nothing of size S x V (except in fp16). A trained head needs p - onehot in backward. If it has
    more rows than `hold`, backward recomputes the logits, `hold` rows at a time: less memory for one more product.

    Args:
        hidden_SH: hidden states that predict the targets. Shape (S, H).
        weight_VH: weights of the vocabulary head. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1]; see `shape_logits`.
        entropies: compute entropies too.
        chunk: rows of logits computed at a time.
        hold: rows of probabilities kept for backward; null keeps all.
        hits_S: output buffer, set to True where no token is more probable than the target. Shape (S,), bool.

    Returns:
        Log-probabilities in nats, shape (S,), in fp32 or float64; and entropies in nats, shape (S,), without gradient,
        or None.
    """
    hold = max(len(hidden_SH), 1) if hold is None else hold
    # Autograd does not look into a list, so the buffer stays out of the graph.
    hits = [] if hits_S is None else [hits_S]
    options = temperature, top_p, entropies, min(chunk, hold), hold, torch.is_grad_enabled(), hits
    # The caller chose the precision of the product; sums over the vocabulary always run in fp32 or float64.
    with torch.autocast(hidden_SH.device.type, enabled=False):
        logps_S, entropies_S = _LinearLogprobs.apply(hidden_SH, weight_VH, target_S, *options)
    return logps_S, entropies_S


class _LinearLogprobs(torch.autograd.Function):
    """d log p(t) / d logits = onehot(t) - p. The upstream gradient is multiplied in at size S x H, not S x V."""

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
        # Most probabilities underflow in fp16 before the loss scale is applied, so fp16 waits for backward.
        pull_SH = torch.empty_like(hidden_SH) if to_hidden and weight_VH.dtype != torch.float16 else None
        recompute = to_weight or (to_hidden and pull_SH is None)
        keep = recompute and count <= hold
        # Per target: log-prob, logit, and mean logit minus target logit.
        logps_S, logit_S, excess_S = (upcast(hidden_SH.new_empty(count)) for _ in range(3))
        averages = entropies and (pull_SH is None or not _exact(pull_SH))
        # Buffers are reused for every chunk: on a CPU, fresh memory costs more than the arithmetic on it.
        buffer_PV = logps_S.new_empty(min(hold if keep or pull_SH is not None else chunk, count), len(weight_VH))
        scratch_CV = logps_S.new_empty(min(chunk, count) if averages else 0, len(weight_VH))
        for first in range(0, count, max(len(buffer_PV), 1)):
            last = min(first + len(buffer_PV), count)
            for start in range(first, last, chunk):
                at = slice(start, min(start + chunk, last))
                logits_CV, target_C1 = buffer_PV[start - first : at.stop - first], target_S[at, None]
                _logits(hidden_SH[at], weight_VH, target_S[at], temperature, top_p, logits_CV)
                logit_S[at] = logits_CV.gather(1, target_C1)[:, 0]
                for hits_S in hits:
                    hits_S[at] = logit_S[at] >= logits_CV.amax(-1)
                before_CV = scratch_CV[: len(logits_CV)].copy_(logits_CV) if averages else None
                probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
                logps_S[at] = probs_CV.gather(1, target_C1)[:, 0].log()
                if before_CV is not None:
                    excess_S[at] = _average(before_CV, probs_CV) - logit_S[at]
            if keep or pull_SH is not None:
                error_PV = _subtract_onehot_(buffer_PV[: last - first], target_S[first:last])
            if pull_SH is not None:
                torch.mm(error_PV.to(weight_VH.dtype), weight_VH, out=pull_SH[first:last])
        # The logarithm of an underflowed probability is -inf: recompute those few rows from their logits.
        lost_S = logps_S < math.log(torch.finfo(logps_S.dtype).tiny) + 10
        if lost_S.any():
            rows = hidden_SH[lost_S], weight_VH, target_S[lost_S], temperature, top_p
            logits_CV = _logits(*rows, logps_S.new_empty(int(lost_S.sum()), len(weight_VH)))
            logps_S[lost_S] = logit_S[lost_S] - logits_CV.logsumexp(-1)
        inputs = (hidden_SH, weight_VH, target_S) if recompute else (None, None, None)
        ctx.save_for_backward(*inputs, buffer_PV if keep else None, pull_SH)
        if not entropies:
            return logps_S, None
        if pull_SH is not None and not averages:
            excess_S = torch.linalg.vecdot(hidden_SH, pull_SH) / temperature
        entropies_S = (-logps_S - excess_S).clamp_(min=0.0)
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
        # On a CPU, a product with few columns runs at two thirds of the rate of its transpose.
        narrow = weight_VH.device.type == "cpu" and weight_VH.shape[1] <= 128
        early = weight_VH.dtype == torch.float16
        buffer_PV = kept_SV if kept_SV is not None else grad_S.new_empty(min(hold, len(target_S)), len(weight_VH))
        # Use as many rows per product as the buffer holds: products of few rows and many columns are slow.
        for first in range(0, len(target_S), max(len(buffer_PV), 1)):
            piece = slice(first, first + len(buffer_PV))
            hidden_PH, target_P, grad_P1 = hidden_SH[piece], target_S[piece], grad_S[piece, None]
            error_PV = buffer_PV[: len(target_P)]
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
                # Accumulate in full precision: bf16 would round away what each piece adds.
                product_VH = product_VH.to(grad_S.dtype)
                grad_weight = product_VH if grad_weight is None else grad_weight.add_(product_VH)
        if to_weight:
            grad_weight = torch.zeros_like(weight_VH) if grad_weight is None else grad_weight.to(weight_VH.dtype)
        return grad_hidden, grad_weight, *[None] * 8


def _exact(states: Tensor) -> bool:
    """True if products of such tensors are exact enough for an entropy: not in half precision, not with TF32."""
    full = torch.get_float32_matmul_precision() == "highest"
    return states.dtype == torch.float64 or (states.dtype == torch.float32 and full)


def _average(logits_CV: Tensor, probs_CV: Tensor) -> Tensor:
    """Mean logit over the nucleus: outside it a logit is -inf and its probability 0, so clamp before the product."""
    return torch.linalg.vecdot(probs_CV, logits_CV.clamp_(min=torch.finfo(logits_CV.dtype).min))


def _subtract_onehot_(probs_SV: Tensor, target_S: Tensor) -> Tensor:
    """Subtract 1 at the target, in place."""
    return probs_SV.scatter_add_(1, target_S[:, None], probs_SV.new_full((len(target_S), 1), -1.0))


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, target_C: Tensor, temperature: float, top_p: float, out_CV: Tensor
) -> Tensor:
    """Write a chunk's logits, divided by temperature and cut to the nucleus, in fp32 or float64; return them."""
    if hidden_CH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ weight_VH.T)
    if temperature != 1.0 or top_p != 1.0:
        out_CV.copy_(shape_logits(out_CV, temperature, top_p, keep_S=target_C))
    return out_CV

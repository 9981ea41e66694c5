"""Direct preference optimisation: losses on pairs and rankings of answers, without a reward model.

A loss on pairs takes `PairLogps` and its own coefficients and returns one value per pair, in nats unless it says
otherwise. Log-probabilities are *sums over the tokens of an answer*; a loss that averages over tokens says so and
divides itself. That choice changes the meaning of beta by the length of an answer, and is where implementations of one
name differ. Below, r is beta times the log-ratio of policy and reference of an answer, and h the better one's
log-ratio minus the worse one's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.functional.reward import RankedPairs, plackett_luce_loss


class PairLogps(NamedTuple):
    """Log-probabilities of the better and the worse answer, each of shape (P,), summed over tokens, in nats.

    Attributes:
        better_P: policy's, of the preferred answer.
        worse_P: policy's, of the other answer.
        reference_better_P: reference's, of the preferred answer.
        reference_worse_P: reference's, of the other answer.
        better_tokens_P: scored tokens of the preferred answer.
        worse_tokens_P: scored tokens of the other answer.
    """

    better_P: Tensor
    worse_P: Tensor
    reference_better_P: Tensor
    reference_worse_P: Tensor
    better_tokens_P: Tensor
    worse_tokens_P: Tensor

    @classmethod
    def of(cls, pairs: RankedPairs, logps_Q: Tensor, reference_Q: Tensor, tokens_Q: Tensor) -> PairLogps:
        """Those of pairs of answers, from those of the answers: policy, reference, tokens. Each of shape (Q,)."""
        sides = pairs.better_P, pairs.worse_P
        return cls(*(values_Q[side] for values_Q in (logps_Q, reference_Q, tokens_Q) for side in sides))

    @property
    def log_ratio_better_P(self) -> Tensor:
        """Log policy / reference of the preferred answer."""
        return self.better_P - self.reference_better_P

    @property
    def log_ratio_worse_P(self) -> Tensor:
        """Log policy / reference of the other answer."""
        return self.worse_P - self.reference_worse_P

    @property
    def gap_P(self) -> Tensor:
        """The h of the formulas: what DPO widens."""
        return self.log_ratio_better_P - self.log_ratio_worse_P

    def per_token(self) -> PairLogps:
        """The same as means over tokens. An answer without any token has the mean 0, not 0 / 0."""
        better_P, worse_P = self.better_tokens_P.clamp(min=1), self.worse_tokens_P.clamp(min=1)
        return self._replace(
            better_P=self.better_P / better_P,
            worse_P=self.worse_P / worse_P,
            reference_better_P=self.reference_better_P / better_P,
            reference_worse_P=self.reference_worse_P / worse_P,
        )


# The logistic loss and its relatives: functions of h alone.


def dpo_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta h); sums over tokens.

    With label smoothing it is conservative DPO (cDPO): labels are taken to be wrong that often.

    Source: Rafailov et al. 2023, equation 7; Mitchell 2023, "A note on DPO with noisy preferences", equation 3.
    """
    return _logistic(beta * pairs.gap_P, label_smoothing)


def robust_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """((1 - e) L(h) - e L(-h)) / (1 - 2 e), with L that of `dpo_loss` and e the label smoothing; sums over tokens.

    Where labels are flipped with probability e its expectation is the DPO loss on the true ones, and its optimum
    theirs; conservative DPO only stops short of believing the flipped ones. A single value may be negative.

    Source: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (rDPO).
    """
    _check_smoothing(label_smoothing)
    right_P, wrong_P = dpo_loss(pairs, beta), dpo_loss(pairs, -beta)
    return ((1.0 - label_smoothing) * right_P - label_smoothing * wrong_P) / (1.0 - 2.0 * label_smoothing)


def hinge_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta h); sums over tokens. A pair that is 1 / beta nats apart is left alone.

    SLiC-HF is the same without the reference.

    Source: Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization" (RSO, hinge-norm); Zhao
    et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback".
    """
    return (1.0 - beta * pairs.gap_P).relu()


def ipo_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """(h - 1 / (2 beta))^2 with h of *means* over tokens: regression to a fixed gap instead of a push to infinity.

    The paper does not say whether h sums or averages over tokens. TRL averages, on its authors' word, and so does this;
    OpenRLHF sums, so its beta does not carry over. In square nats.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.
    """
    return (pairs.per_token().gap_P - 1.0 / (2.0 * beta)).square()


def dpo_norm_loss(pairs: PairLogps, beta: float = 5.0, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO: `dpo_loss` with *means* over tokens, hence a beta of about 5 and not 0.1.

    Source: Lambert et al. 2024, "Tulu 3", equation 6.
    """
    return dpo_loss(pairs.per_token(), beta, label_smoothing)


def length_dpo_loss(
    pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0, length_penalty: float = 0.01
) -> Tensor:
    """-log sigmoid(beta h + length_penalty (tokens of better - tokens of worse)); sums over tokens.

    The optimum is that of a reward from which the length penalty, in reward per token, is taken: a preference that
    length explains teaches nothing. The sign is easily got wrong: a *longer* better answer makes the loss smaller.

    Source: Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization" (R-DPO).
    """
    longer_P = pairs.better_tokens_P - pairs.worse_tokens_P
    return _logistic(beta * pairs.gap_P + length_penalty * longer_P, label_smoothing)


def exo_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL(q || p) with q = sigmoid(beta h) the policy's preference and p = 1 - label_smoothing the label's; sums.

    DPO minimises the other direction, KL(p || q). This one is infinite for labels without doubt, so the smoothing must
    be above 0.

    Source: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", equation 16.
    """
    _check_smoothing(label_smoothing, least=1e-12)
    margin_P = beta * pairs.gap_P
    right_P = logsigmoid(margin_P) - math.log1p(-label_smoothing)
    wrong_P = logsigmoid(-margin_P) - math.log(label_smoothing)
    return margin_P.sigmoid() * right_P + (-margin_P).sigmoid() * wrong_P


def discopop_loss(pairs: PairLogps, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """(1 - w) (-log sigmoid(m)) + w exp(-m), m = beta h and w = sigmoid(m / tau); sums over tokens.

    Found by search, and not convex: at h = 0, where training starts, it *rises* with h where tau is below
    (1 - log 2) / 3, about 0.1.

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models",
    equation 5.
    """
    margin_P = beta * pairs.gap_P
    # w exp(-m) as one exponential: far below 0 the factors alone are 0 and infinite.
    exponential_P = (logsigmoid(margin_P / tau) - margin_P).exp()
    return (-margin_P / tau).sigmoid() * -logsigmoid(margin_P) + exponential_P


# f-DPO: replace the reverse KL of `dpo_loss` by other divergences. f'(policy / reference) takes the place of the
# log-ratio; constants of f' cancel in the difference.


def forward_kl_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (f'(better) - f'(worse))), f'(u) = -1 / u, u = policy / reference; sums over tokens.

    Source: Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints" (f-DPO), theorem 1 and table 1.
    """
    return alpha_divergence_loss(pairs, beta, label_smoothing, alpha=1.0)


def js_divergence_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """`forward_kl_loss` with f'(u) = log(2 u / (1 + u)), the Jensen-Shannon divergence; sums over tokens."""
    return _logistic(
        beta * (logsigmoid(pairs.log_ratio_better_P) - logsigmoid(pairs.log_ratio_worse_P)), label_smoothing
    )


def alpha_divergence_loss(
    pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0, alpha: float = 0.5
) -> Tensor:
    """`forward_kl_loss` with f'(u) = (1 - u^-alpha) / alpha; sums over tokens.

    alpha -> 0 is the reverse KL of `dpo_loss`, 1 the forward KL, as in the paper. TRL 1.16 counts the other way round:
    its coefficient is 1 - alpha.

    Raises:
        ValueError: alpha is not in (0, 1].
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}; its limit 0 is the loss sigmoid")
    # An answer that the policy has given up overflows fp32 at 88 nats, and makes NaN of a gradient that is 0.
    better_P = (-alpha * pairs.log_ratio_better_P).clamp(max=80.0).exp()
    worse_P = (-alpha * pairs.log_ratio_worse_P).clamp(max=80.0).exp()
    return _logistic(beta / alpha * (worse_P - better_P), label_smoothing)


# Losses that look at each answer for itself: they see an absolute level, where h would let both sides sink.


def nca_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """-log sigmoid(r better) - (log sigmoid(-r better) + log sigmoid(-r worse)) / 2; sums over tokens.

    Source: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards" (two answers, one
    preferred).
    """
    better_P, worse_P = beta * pairs.log_ratio_better_P, beta * pairs.log_ratio_worse_P
    return -logsigmoid(better_P) - 0.5 * (logsigmoid(-better_P) + logsigmoid(-worse_P))


def bco_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """-log sigmoid(r better) - log sigmoid(-r worse): a classifier of good and bad answers; sums over tokens.

    Without the paper's reward shift, a running mean that would tie a batch to those before it; TRL has none either.

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment".
    """
    return -logsigmoid(beta * pairs.log_ratio_better_P) - logsigmoid(-beta * pairs.log_ratio_worse_P)


def sppo_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """(better log-ratio - 1 / (2 beta))^2 + (worse log-ratio + 1 / (2 beta))^2; sums over tokens, in square nats.

    The hard form: the better answer wins always, the worse one never. 1 / beta is the paper's eta.

    Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", equation 4.7.
    """
    half = 0.5 / beta
    return (pairs.log_ratio_better_P - half).square() + (pairs.log_ratio_worse_P + half).square()


def apo_zero_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """1 - sigmoid(r better) + sigmoid(r worse); sums over tokens, between 0 and 2 and not in nats.

    Raises the better answer and lowers the worse: for answers better than the model's own.

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization", equation 7, plus the constant 1.
    """
    return (-beta * pairs.log_ratio_better_P).sigmoid() + (beta * pairs.log_ratio_worse_P).sigmoid()


def apo_down_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """sigmoid(r better) + 1 - sigmoid(beta h); sums over tokens, between 0 and 2 and not in nats.

    Lowers both, the worse answer more: for answers worse than the model's own.

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization", equation 8, plus the constant 1.
    """
    return (beta * pairs.log_ratio_better_P).sigmoid() + (-beta * pairs.gap_P).sigmoid()


# Losses without a reference, and the likelihood of the better answer that holds them in its place.


def nll_loss(pairs: PairLogps) -> Tensor:
    """Negative log-likelihood of the better answer, the *mean* over its tokens; `nll_coef` adds it to any loss (RPO).

    Source: Pang et al. 2024, "Iterative Reasoning Preference Optimization", equation 1.
    """
    return -pairs.per_token().better_P


def simpo_loss(pairs: PairLogps, beta: float = 2.0, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (mean logp of better - mean logp of worse) - gamma); no reference.

    Args:
        pairs: the reference's log-probabilities are not used.
        beta: scale of the *mean* log-probability.
        label_smoothing: probability that a label is wrong.
        gamma: target margin. The paper quotes gamma / beta, between 0.1 and 0.8.

    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6.
    """
    means = pairs.per_token()
    return _logistic(beta * (means.better_P - means.worse_P) - gamma, label_smoothing)


def cpo_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0, nll_coef: float = 1.0) -> Tensor:
    """-log sigmoid(beta (logp of better - logp of worse)) + nll_coef `nll_loss`; sums, but the latter; no reference.

    Source: Xu et al. 2024, "Contrastive Preference Optimization", equation 3 and the likelihood term after it.
    """
    return _logistic(beta * (pairs.better_P - pairs.worse_P), label_smoothing) + nll_coef * nll_loss(pairs)


def orpo_loss(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """`nll_loss` - beta log sigmoid(log-odds of better - log-odds of worse), odds p / (1 - p); no reference.

    p is the geometric *mean* of the tokens' probabilities, and beta the paper's lambda. The likelihood is that of the
    answer alone; TRL's ORPO counts the prompt's as well.

    Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", equations 4 to 7.
    """
    means = pairs.per_token()
    return nll_loss(pairs) - beta * logsigmoid(_log_odds(means.better_P) - _log_odds(means.worse_P))


def _log_odds(logp_P: Tensor) -> Tensor:
    # A model that is certain has the odds 1 / 0.
    logp_P = logp_P.clamp(max=-torch.finfo(logp_P.dtype).eps)
    return logp_P - (-logp_P.expm1()).log()


# And whole rankings: log-ratios and ranks of all answers, flat, as in functional/reward.py.


def plackett_luce_dpo_loss(
    log_ratio_Q: Tensor, rank_Q: Tensor, example_Q: Tensor, num_examples: int, beta: float = 0.1
) -> Tensor:
    """DPO on whole rankings: `plackett_luce_loss` of beta times the log-ratios; sums over tokens. Shape (E,), in nats.

    With two answers it is `dpo_loss`. With K every answer but the last is a choice among those left, K - 1 choices in
    all, while the pairs of a prompt weigh 1 together: long rankings count for more here.

    Source: Rafailov et al. 2023, appendix A.3.
    """
    return plackett_luce_loss(beta * log_ratio_Q, rank_Q, example_Q, num_examples)


def implicit_rewards(pairs: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Beta * log(policy / reference) of the better and of the worse answer: the reward that DPO fits implicitly.

    Source: Rafailov et al. 2023, equation 5, up to a constant of the prompt.
    """
    return beta * pairs.log_ratio_better_P.detach(), beta * pairs.log_ratio_worse_P.detach()


def _logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    _check_smoothing(label_smoothing)
    return -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def _check_smoothing(label_smoothing: float, least: float = 0.0) -> None:
    if not least <= label_smoothing < 0.5:
        ends = "[0" if least == 0.0 else "(0"
        raise ValueError(f"label_smoothing must be in {ends}, 0.5), got {label_smoothing}")

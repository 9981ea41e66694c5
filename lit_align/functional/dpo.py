"""Direct preference optimisation: losses on pairs of answers, without a reward model.

Every loss takes the same `PairLogps` and its own coefficients and returns one value per pair. Log-probabilities are
*sums over the tokens of an answer*; a loss that averages over tokens says so and divides itself. That choice changes
the meaning of beta by the length of an answer, and is where implementations of one name differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


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

    @property
    def log_ratio_better_P(self) -> Tensor:
        """Log policy / reference of the preferred answer."""
        return self.better_P - self.reference_better_P

    @property
    def log_ratio_worse_P(self) -> Tensor:
        """Log policy / reference of the other answer."""
        return self.worse_P - self.reference_worse_P


def dpo_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta h), h = log-ratio of the better minus log-ratio of the worse answer; sums over tokens.

    With label smoothing it is conservative DPO: labels are taken to be wrong that often.

    Source: Rafailov et al. 2023, equation 7; Mitchell 2023, "A note on DPO with noisy preferences", equation 3.
    """
    margin_P = beta * (pairs.log_ratio_better_P - pairs.log_ratio_worse_P)
    return -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def ipo_loss(pairs: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """(h - 1 / (2 beta))^2 with h of *means* over tokens: regression to a fixed gap instead of a push to infinity.

    The paper does not say whether h sums or averages over tokens. TRL averages, on its authors' word, and so does this;
    OpenRLHF sums, so its beta does not carry over.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.

    Raises:
        ValueError: label_smoothing given, which this loss has no place for.
    """
    _no_smoothing("ipo", label_smoothing)
    gap_P = pairs.log_ratio_better_P / pairs.better_tokens_P - pairs.log_ratio_worse_P / pairs.worse_tokens_P
    return (gap_P - 1.0 / (2.0 * beta)).square()


def dpo_norm_loss(pairs: PairLogps, beta: float = 5.0, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO: `dpo_loss` with means over tokens, hence a beta of about 5 and not 0.1.

    Source: Lambert et al. 2024, "Tulu 3", equation 6.
    """
    better_P = pairs.log_ratio_better_P / pairs.better_tokens_P
    worse_P = pairs.log_ratio_worse_P / pairs.worse_tokens_P
    margin_P = beta * (better_P - worse_P)
    return -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def simpo_loss(pairs: PairLogps, beta: float = 2.0, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (mean logp of better - mean logp of worse) - gamma); no reference.

    Args:
        pairs: the reference's log-probabilities are not used.
        beta: scale of the mean log-probability.
        label_smoothing: probability that a label is wrong.
        gamma: target margin. The paper quotes gamma / beta, between 0.1 and 0.8.

    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6.
    """
    gap_P = pairs.better_P / pairs.better_tokens_P - pairs.worse_P / pairs.worse_tokens_P
    margin_P = beta * gap_P - gamma
    return -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def implicit_rewards(pairs: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Beta * log(policy / reference) of the better and of the worse answer: the reward that DPO fits implicitly.

    Source: Rafailov et al. 2023, equation 5, up to a constant of the prompt.
    """
    return beta * pairs.log_ratio_better_P.detach(), beta * pairs.log_ratio_worse_P.detach()


def _no_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(f"the {name} loss has no label smoothing, got {label_smoothing}: set label_smoothing to 0")


# The `loss` option of DPOModule.
DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": dpo_norm_loss,
    "simpo": simpo_loss,
}
# Losses that never look at the reference: DPOModule then loads none.
REFERENCE_FREE = frozenset({"simpo"})

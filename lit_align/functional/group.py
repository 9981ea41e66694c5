"""Advantages without a value model: the baseline comes from other completions of the same prompt.

The K completions of a prompt are adjacent in `rewards_Q`: Q = E * K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from lit_align.functional.advantage import gae


def rloo(rewards_Q: Tensor, samples: int) -> Tensor:
    """REINFORCE leave-one-out: r_i - mean of the other K - 1, which is K / (K - 1) (r_i - mean of all K).

    Unbiased: the baseline of a completion does not depend on that completion.

    Args:
        rewards_Q: reward of each completion, with the KL penalty if it is part of the reward. Shape (Q,).
        samples: K, at least 2.

    Returns:
        One advantage for all tokens of a completion. Shape (Q,).

    Raises:
        ValueError: fewer than 2 completions per prompt, or a number of rewards that is not a multiple of them.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language models Ahmadian et al.
    2024, "Back to Basics: Revisiting REINFORCE Style Optimization", section 2 (RLOO).
    """
    return grpo(rewards_Q, samples, scale=False) * (samples / (samples - 1))


def grpo(rewards_Q: Tensor, samples: int, scale: bool = True) -> Tensor:
    """Group-relative: (r_i - mean) / (std + 1e-4), mean and standard deviation over the K completions of the prompt.

    Without the scale (Dr. GRPO) the gradient is (K - 1) / K times that of leave-one-out. With it, prompts whose
    completions score almost the same count as much as the others.

    Args:
        rewards_Q: reward of each completion. Shape (Q,).
        samples: K, at least 2.
        scale: divide by the standard deviation, the unbiased one (K - 1), as TRL and verl do.

    Returns:
        One advantage for all tokens of a completion; 0 where all completions of a prompt score the same. Shape (Q,).

    Raises:
        ValueError: fewer than 2 completions per prompt, or a number of rewards that is not a multiple of them.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2 (outcome supervision); Liu et al. 2025, "Understanding
    R1-Zero-Like Training: A Critical Perspective", section 3.2 (Dr. GRPO).
    """
    if samples < 2:
        raise ValueError(f"a group baseline compares answers to one prompt: it needs at least 2 of them, got {samples}")
    if rewards_Q.numel() % samples:
        raise ValueError(f"{rewards_Q.numel()} rewards are no multiple of {samples} answers to a prompt")
    rewards_EK = rewards_Q.view(-1, samples)
    advantages_EK = rewards_EK - rewards_EK.mean(1, keepdim=True)
    if scale:
        advantages_EK = advantages_EK / (rewards_EK.std(1, keepdim=True) + 1e-4)
    return advantages_EK.flatten()


def returns_to_go(rewards_S: Tensor, sequence_S: Tensor, num_sequences: int, discount: float = 1.0) -> Tensor:
    """Return from each token on: sum over t' >= t of discount^(t' - t) r_t'.

    REINFORCE++ whitens this over the whole rollout, so its baseline is the mean over all tokens of all prompts.

    Args:
        rewards_S: reward of each token: its KL penalty, plus the score at the last token. Shape (S,).
        sequence_S: completion of each token, ascending. Shape (S,).
        num_sequences: Q.
        discount: gamma, in [0, 1].

    Returns:
        Shape (S,).

    Source: Hu et al. 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Normalization",
    section 3: the return of a token is the score minus the KL penalty from that token on.
    """
    # GAE with lambda 1 is return - value; here every value is 0.
    return gae(rewards_S, rewards_S.new_zeros(rewards_S.shape), sequence_S, num_sequences, discount, lambda_=1.0)[0]


def remax(rewards_S: Tensor, greedy_Q: Tensor, sequence_S: Tensor, num_sequences: int, discount: float = 1.0) -> Tensor:
    """Return of each token minus the score of the prompt's greedy completion.

    Unbiased: the greedy completion does not depend on the sampled one.

    Args:
        rewards_S: reward of each token. Shape (S,).
        greedy_Q: score of the greedy completion of the prompt of each completion. Shape (Q,).
        sequence_S: completion of each token, ascending. Shape (S,).
        num_sequences: Q.
        discount: gamma, in [0, 1].

    Returns:
        Shape (S,).

    Source: Li et al. 2024, "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large
    Language Models", section 4 (algorithm 1).
    """
    return returns_to_go(rewards_S, sequence_S, num_sequences, discount) - greedy_Q[sequence_S]


# Estimators that compare the completions of one prompt, by their usual names. The group form of REINFORCE++ is whitened
# afterwards, over the whole rollout.
GROUP_ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": functools.partial(grpo, scale=False),
    "reinforce++_baseline": functools.partial(grpo, scale=False),
}

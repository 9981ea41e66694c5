"""Advantages without a value model: the other answers to a prompt, or one more, say what was to be expected.

Answers to one prompt stand together in `rewards_Q`, K of them: Q = E * K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from lit_align.functional.advantage import gae


def rloo(rewards_Q: Tensor, samples: int) -> Tensor:
    """REINFORCE leave-one-out: r_i - mean of the other K - 1, which is K / (K - 1) (r_i - mean of all K).

    Unbiased: the baseline of an answer does not depend on it.

    Args:
        rewards_Q: reward of each answer, a price on its KL included if there is one. Shape (Q,).
        samples: K, at least 2.

    Returns:
        One advantage for all tokens of an answer. Shape (Q,).

    Raises:
        ValueError: fewer than 2 answers to a prompt, or a number of rewards that is no multiple of them.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language models Ahmadian et al.
    2024, "Back to Basics: Revisiting REINFORCE Style Optimization", section 2 (RLOO).
    """
    return grpo(rewards_Q, samples, scale=False) * (samples / (samples - 1))


def grpo(rewards_Q: Tensor, samples: int, scale: bool = True) -> Tensor:
    """Group-relative: (r_i - mean) / (std + 1e-4), mean and standard deviation over the K answers to the prompt.

    Without the scale (Dr. GRPO) the gradient is (K - 1) / K times that of leave-one-out; with it, prompts whose answers
    score almost alike count as much as the others.

    Args:
        rewards_Q: reward of each answer. Shape (Q,).
        samples: K, at least 2.
        scale: divide by the standard deviation, the unbiased one (K - 1), as TRL and verl do.

    Returns:
        One advantage for all tokens of an answer; 0 for a prompt whose answers all score the same. Shape (Q,).

    Raises:
        ValueError: fewer than 2 answers to a prompt, or a number of rewards that is no multiple of them.

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
    """What each token still earns: sum over t' >= t of discount^(t' - t) r_t'.

    REINFORCE++ whitens this over the whole rollout: its baseline is the mean of all tokens, of every prompt.

    Args:
        rewards_S: reward of each token: the price of its KL, and at the last token the score too. Shape (S,).
        sequence_S: answer of each token, ascending. Shape (S,).
        num_sequences: Q.
        discount: gamma, in [0, 1].

    Returns:
        Shape (S,).

    Source: Hu et al. 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Normalization",
    section 3: the return of a token is the score less the price of KL from there on.
    """
    # Generalised advantage estimation with lambda 1 is return - value, and here nothing has a value.
    return gae(rewards_S, rewards_S.new_zeros(rewards_S.shape), sequence_S, num_sequences, discount, lambda_=1.0)[0]


def remax(rewards_S: Tensor, greedy_Q: Tensor, sequence_S: Tensor, num_sequences: int, discount: float = 1.0) -> Tensor:
    """Return of each token less the score of the prompt's greedy answer.

    Unbiased: the greedy answer does not depend on the sampled one.

    Args:
        rewards_S: reward of each token. Shape (S,).
        greedy_Q: score of the greedy answer to the prompt of each answer. Shape (Q,).
        sequence_S: answer of each token, ascending. Shape (S,).
        num_sequences: Q.
        discount: gamma, in [0, 1].

    Returns:
        Shape (S,).

    Source: Li et al. 2024, "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large
    Language Models", section 4 (algorithm 1).
    """
    return returns_to_go(rewards_S, sequence_S, num_sequences, discount) - greedy_Q[sequence_S]


# Those that compare the rewards of the answers to a prompt, by their usual names. REINFORCE++'s group form is whitened
# afterwards, over the whole rollout.
GROUP_ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": functools.partial(grpo, scale=False),
    "reinforce++_baseline": functools.partial(grpo, scale=False),
}

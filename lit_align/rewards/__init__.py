"""What scores a completion: a trained reward model, a Python function, a verifier, or any class of the user's."""

from lit_align.rewards.base import Reward
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.model import ModelReward
from lit_align.rewards.verifiers import FormatReward, LengthReward, NumericAnswer, RegexReward, SumReward, TextReward

__all__ = [
    "FormatReward",
    "FunctionReward",
    "LengthReward",
    "ModelReward",
    "NumericAnswer",
    "RegexReward",
    "Reward",
    "SumReward",
    "TextReward",
]

"""What scores a completion: a trained reward model, a Python function, a verifier, a server, a class of the user's."""

from lit_align.rewards.combine import CombinedReward, EnsembleReward, SumReward
from lit_align.rewards.endpoint import EndpointReward
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.given import as_reward, reward_spec
from lit_align.rewards.model import ModelReward
from lit_align.rewards.protocol import Reward
from lit_align.rewards.verifiers import FormatReward, LengthReward, NumericAnswer, RegexReward, TextReward

__all__ = [
    "CombinedReward",
    "EndpointReward",
    "EnsembleReward",
    "FormatReward",
    "FunctionReward",
    "LengthReward",
    "ModelReward",
    "NumericAnswer",
    "RegexReward",
    "Reward",
    "SumReward",
    "TextReward",
    "as_reward",
    "reward_spec",
]

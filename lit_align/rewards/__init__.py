"""What scores a completion: a trained reward model, a Python function, or any class of the user's."""

from lit_align.rewards.base import Reward
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.model import ModelReward

__all__ = ["FunctionReward", "ModelReward", "Reward"]

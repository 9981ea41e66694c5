"""The four methods, each a LightningModule that reads like its algorithm."""

from lit_align.modules.dpo import DPOModule
from lit_align.modules.ppo import PPOModule
from lit_align.modules.reward import RewardModule
from lit_align.modules.schedule import WSD, Constant, Cosine, Linear, Schedule
from lit_align.modules.sft import SFTModule
from lit_align.modules.strategy import FSDP2Strategy
from lit_align.modules.zero import ZeROStrategy

__all__ = [
    "WSD",
    "Constant",
    "Cosine",
    "DPOModule",
    "FSDP2Strategy",
    "Linear",
    "PPOModule",
    "RewardModule",
    "SFTModule",
    "Schedule",
    "ZeROStrategy",
]

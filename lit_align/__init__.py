"""Align language models: supervised fine-tuning, reward models, PPO and DPO, as LightningModules you can read."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use: `from lit_align.functional import ...` then needs torch and nothing else.
_WHERE = {
    "SFTModule": "modules",
    "RewardModule": "modules",
    "DPOModule": "modules",
    "PPOModule": "modules",
    "InstructionDataModule": "data",
    "PreferenceDataModule": "data",
    "PromptDataModule": "data",
    "Source": "data",
    "Rows": "data",
    "Lora": "models",
    "Network": "models",
    "Sampling": "rollout",
    "Reward": "rewards",
    "ModelReward": "rewards",
    "FunctionReward": "rewards",
    "NumericAnswer": "rewards",
    "RegexReward": "rewards",
    "FormatReward": "rewards",
    "LengthReward": "rewards",
    "SumReward": "rewards",
    "EnsembleReward": "rewards",
    "EndpointReward": "rewards",
    "TextReward": "rewards",
}

__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lit_align' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"lit_align.{_WHERE[name]}"), name)
    except Exception as error:  # a broken release of a dependency raises anything when it is imported
        from lit_align.utils import versions

        if untested := versions.advice(error):
            error.add_note(f"lit_align: {untested}")
        raise


def __dir__() -> list[str]:
    return __all__

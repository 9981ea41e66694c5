"""Choose which kernel computes the vocabulary head, and why a kernel cannot be used."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from lit_align.functional.fused_heads import liger_logprobs, torch_logprobs
from lit_align.models.network import Head

# Each takes hidden states, the head's weights, targets and the temperature.
FUSED = {"torch": torch_logprobs, "liger": liger_logprobs}


def check_installed(head: Head) -> None:
    """Refuse a kernel that is not installed.

    Raises:
        ValueError: torch is too old for `head: torch`, or Liger is not installed.
    """
    if head == "torch" and not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ValueError(
            f"network.head: torch needs torch 2.13; this is {torch.__version__}: upgrade it, or leave it out"
        )
    if head == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("network.head: liger needs Liger's kernels: pip install 'lit_align[liger]', or leave it out")


def obstacle(head: Head, states_SH: Tensor, temperature: float, top_p: float, entropies: bool) -> str | None:
    """Reason why the requested kernel cannot score a batch; None if it can.

    Args:
        head: torch or liger.
        states_SH: hidden states in the precision of the head's product. Shape (S, H).
        temperature: divides the logits.
        top_p: mass of the nucleus.
        entropies: whether entropies are needed.
    """
    half = states_SH.dtype in (torch.bfloat16, torch.float16)
    obstacles = {
        "the model is on a CPU": head == "liger" and states_SH.device.type == "cpu",
        "no tokens are scored": len(states_SH) == 0,
        "entropies are asked for": entropies,
        "a nucleus is asked for": top_p != 1.0,
        "log-probabilities would be rounded to half precision": half and head == "torch",
        "states in half precision would be rounded again by a temperature": half and temperature != 1.0,
    }
    return next((reason for reason, there in obstacles.items() if there), None)

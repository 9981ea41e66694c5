"""Sampling with vLLM on the GPU that trains: its kernels and scheduler, the policy's weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.models.merge import merged_state_dict, parted
from lit_align.rollout.engine import Sampling
from lit_align.types import Completion


class VLLMEngine:
    """A vLLM in this process, which takes over the policy's weights before each rollout.

    For one process with one GPU. It computes with other kernels, and usually in another precision, than training does:
    `ppo/drift_ratio` and `ppo/drift_outside` say how much that matters. Written against the source of vLLM 0.28 and
    0.32 and tested against a stand-in; not run on a GPU.

    Args:
        dtype: of the weights and of computing. Not auto: of a model in fp32 vLLM makes fp16.
        gpu_memory_utilization: share of the GPU's memory for weights and key-value cache.
        sleep: give that memory back between rollouts, so that training has it. Not with
            PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
        max_model_len: tokens of prompt and answer together; null for what the model allows.
        enforce_eager: no CUDA graphs: slower sampling, faster start.
        options: further arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not installed, or there is more than one process or another device than the first GPU.
    """

    def __init__(
        self,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        gpu_memory_utilization: float = 0.4,
        sleep: bool = True,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("VLLMEngine needs vLLM: pip install 'lit_align[vllm]'")
        self.sleep = sleep
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": sleep,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            # Weights come from the policy, sampling parameters from `Sampling`.
            "load_format": "dummy",
            "generation_config": "vllm",
            # Those of the distribution that is drawn from, temperature and nucleus included, as PPO scores answers.
            "logprobs_mode": "processed_logprobs",
            **(options or {}),
        }
        self._llm: Any = None
        self._asleep = False

    @torch.no_grad()
    def __call__(
        self, policy: LanguageModel, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """See `Engine`."""
        self._wake(policy)
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
            _parameters(len(prompts), sampling, stop_ids, seed),
            use_tqdm=False,
        )
        answers = [[_completion(answer) for answer in output.outputs] for output in outputs]
        if self.sleep:
            # Level 2 forgets the weights too: the next rollout brings its own.
            self._llm.sleep(level=2)
            self._asleep = True
        return answers

    def _wake(self, policy: LanguageModel) -> None:
        """Make a vLLM of the policy's architecture at the first call; at every call, give it the policy's weights."""
        if self._llm is None:
            self._llm = self._start(policy)
        if self._asleep:
            # What training has freed, torch keeps for itself, and vLLM would not get it.
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
        # The worker lives in this process, so the very tensors are handed over; vLLM fuses and casts them.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(policy)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # Keys and values of a prompt are those of the weights that computed them.
        self._llm.reset_prefix_cache()

    def _start(self, policy: LanguageModel) -> Any:
        check_place(policy.hf.device)
        check_weights(policy)
        # Before vLLM is imported: in a process of its own it could not see the policy's tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        # It seeds the generators of this process, which are the run's.
        with isolate_rng():
            return LLM(model=policy.hf.config.name_or_path, **self.options)


def check_place(device: torch.device) -> None:
    """Refuse what vLLM inside the training process does not do.

    Raises:
        ValueError: more than one process, or another device than the first GPU.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(f"VLLMEngine is for one process, not {processes}: set trainer.devices to 1")
    if device.type != "cuda" or device.index not in (None, 0):
        raise ValueError(
            f"VLLMEngine samples on the first GPU, and the policy is on {device}: set trainer.accelerator to gpu and "
            "trainer.devices to 1, and choose the GPU by CUDA_VISIBLE_DEVICES"
        )


def check_weights(policy: LanguageModel) -> None:
    """Refuse weights that a vLLM of the policy's folder has no place for.

    Raises:
        ValueError: adapters of tied embeddings, which vLLM keeps tied, or rows for new tokens.
    """
    if names := parted(policy.hf):
        raise ValueError(
            f"VLLMEngine keeps {names[0]} tied to another weight, and lora.targets gives it its own adapter: take "
            "the name out, or write it in lora.modules_to_save, or sample with lit_align.rollout.TransformersEngine"
        )
    if hasattr(policy.hf, "grown"):
        raise ValueError(
            "VLLMEngine has no rows for network.new_tokens: run SFT with them first, and start from its folder, or "
            "sample with lit_align.rollout.TransformersEngine"
        )


def _weights(policy: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a checkpoint has them: adapters merged, a weight with two names once."""
    seen: set[int] = set()
    for name, weight in merged_state_dict(policy.hf).items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            yield name, weight


def _parameters(count: int, sampling: Sampling, stop_ids: Sequence[int], seed: int) -> list[Any]:
    """What vLLM is to do with each of the prompts."""
    from vllm import SamplingParams

    # vLLM gives the k-th answer to a prompt its seed + k: seeds of neighbouring prompts must not be neighbours.
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        SamplingParams(
            n=sampling.samples,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=own,
            stop_token_ids=list(stop_ids),
            # The model's own end of sequence is among the stop tokens, or it is not to stop.
            ignore_eos=True,
            # 0 is the token that was drawn and no others.
            logprobs=0 if sampling.temperature > 0 else None,
            detokenize=False,
        )
        for own in seeds
    ]


def _completion(answer: Any) -> Completion:
    tokens = list(answer.token_ids)
    logps = None
    if answer.logprobs is not None:
        logps = [float(at[token].logprob) for token, at in zip(tokens, answer.logprobs, strict=True)]
    return Completion(tokens, answer.finish_reason == "stop", logps)

"""Policies side by side on held-out prompts: rewards, KL, lengths, with paired intervals."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from lit_align.data.prompt import PromptDataModule
from lit_align.evaluation.policies import Policy, sequence_kl
from lit_align.rewards import Reward
from lit_align.rollout import Sampling
from lit_align.types import Rollout
from lit_align.utils.disk import replacing


class ComparePolicies:
    """Samples every policy on the prompts that a data module holds out, and scores the answers.

    Args:
        policies: name of each and the folder of its model.
        reference: name of the policy that KL and gains are measured from.
        data: its validation prompts are used.
        rewards: by name.
        sampling: how answers are drawn.
        seed: of the sampling.
        device: where policies and rewards run; auto for a GPU if there is one.
    """

    def __init__(
        self,
        policies: dict[str, str],
        reference: str,
        data: PromptDataModule,
        rewards: dict[str, Reward],
        sampling: Sampling | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        if reference not in policies:
            raise ValueError(f"reference {reference!r} is none of the policies: {', '.join(policies)}")
        self.policies = policies
        self.reference = reference
        self.data = data
        self.rewards = rewards
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.device = device

    def run(self, out: Path) -> dict[str, float]:
        """Write `samples.jsonl`; return means, and gains over the reference with their standard errors."""
        self.data.prepare_data()
        self.data.setup("validate")
        batches = list(self.data.val_dataloader())
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        rows = [row for batch in batches for row in batch.rows]
        reference = Policy(self.policies[self.reference], self.device)
        for reward in self.rewards.values():
            reward.load(reference.tokenizer)
            reward.to(reference.device)
        figures: dict[str, float] = {"prompts": float(len(prompts))}
        scores: dict[str, dict[str, Tensor]] = {}
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "samples.jsonl") as partial, partial.open("w") as file:
            for name, folder in self.policies.items():
                policy = Policy(folder, self.device)
                rollout = policy.answer(prompts, rows, self.sampling, self.seed)
                scores[name] = {reward: score(rollout) for reward, score in self.rewards.items()}
                figures |= _measures(name, rollout, sequence_kl(policy, reference, rollout))
                file.writelines(_lines(name, rollout, scores[name]))
        for name, of_policy in scores.items():
            for measure, values in of_policy.items():
                of_reference = scores[self.reference][measure]
                figures |= _gain(f"{name}/{measure}", values, of_reference, self.sampling.samples)
        return figures


def _measures(name: str, rollout: Rollout, kl_Q: Tensor) -> dict[str, float]:
    lengths = [len(completion.tokens) for completion in rollout.completions]
    return {
        f"{name}/kl": kl_Q.mean().item(),
        f"{name}/tokens": sum(lengths) / len(lengths),
        f"{name}/finished": sum(completion.finished for completion in rollout.completions) / len(lengths),
    }


def _gain(name: str, values_Q: Tensor, reference_Q: Tensor, samples: int) -> dict[str, float]:
    """Mean, and the paired difference from the reference on the same prompts.

    Errors are those of a mean over prompts: answers to one prompt are not independent observations.
    """
    values_E, reference_E = (scores_Q.view(-1, samples).mean(1) for scores_Q in (values_Q, reference_Q))
    difference_E = values_E - reference_E
    root = values_E.numel() ** 0.5
    return {
        name: values_E.mean().item(),
        f"{name}_se": values_E.std().item() / root,
        f"{name}_gain": difference_E.mean().item(),
        f"{name}_gain_se": difference_E.std().item() / root,
    }


def _lines(name: str, rollout: Rollout, scores: dict[str, Tensor]) -> list[str]:
    columns = {reward: values.tolist() for reward, values in scores.items()}
    lines = []
    for i, (row, text, completion) in enumerate(zip(rollout.rows, rollout.texts, rollout.completions, strict=True)):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        line = {"policy": name, "prompt": prompt, "answer": text, "finished": completion.finished}
        lines.append(json.dumps({**line, **{reward: values[i] for reward, values in columns.items()}}) + "\n")
    return lines

"""What each stage made of the model, measured against the world's truth on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lit_align.data.chat import ChatEncoder
from lit_align.evaluation.policies import Policy, sequence_kl
from lit_align.functional.kl import best_of_n_kl
from lit_align.functional.packing import pack
from lit_align.rewards import ModelReward
from lit_align.rollout import Sampling
from lit_align.sandbox.gold import Judgement, judge
from lit_align.sandbox.sources import Prompts, prompt_from, prompt_row
from lit_align.sandbox.world import Prompt, World
from lit_align.types import Completion, Example, PackedBatch, Rollout, Segment
from lit_align.utils.disk import write_whole

Figures = dict[str, float]


class Evaluate:
    """Samples every policy on the same held-out prompts and judges what it says.

    Args:
        policies: name of each stage and the folder of its model.
        reference: folder that KL is measured from.
        rewards: name and folder of reward models to score the answers with, and to hold against gold.
        comparisons: held-out rankings, for the accuracy of the reward models against gold.
        seed: which world, and of the sampling.
        prompts: how many held-out prompts, all of different text.
        max_new_tokens: room for an answer.
        best_of: name of a reward: of how many answers of the reference it picks the best, to hold trained policies
            against. It is called `best_of_N`; its KL is known only to be no more than `best_of_N/kl_bound`.
    """

    def __init__(
        self,
        policies: dict[str, str],
        reference: str,
        rewards: dict[str, ModelReward] | None = None,
        comparisons: str | None = None,
        seed: int = 0,
        prompts: int = 1200,
        max_new_tokens: int = 40,
        best_of: dict[str, int] | None = None,
    ) -> None:
        self.best_of = best_of or {}
        if unknown := set(self.best_of) - set(rewards or {}):
            raise ValueError(
                f"best_of names {min(unknown)!r}, which is none of the rewards: {', '.join(rewards or {})}"
            )
        self.policies = policies
        self.reference = reference
        self.rewards = rewards or {}
        self.comparisons = comparisons
        self.seed = seed
        self.prompts = prompts
        self.sampling = Sampling(max_new_tokens=max_new_tokens)

    def run(self, out: Path) -> Figures:
        """Write `samples.jsonl` (every answer with its judgement); return the figures."""
        world = World(self.seed)
        rows = list(Prompts(self.seed, self.prompts, "held_out", distinct=True))
        reference = Policy(self.reference)
        for reward in self.rewards.values():
            reward.load(reference.tokenizer)
        encoder = ChatEncoder(reference.tokenizer)
        prompts = [torch.tensor(encoder.prompt(row["prompt"])) for row in rows]
        figures: Figures = {}
        answers: list[dict[str, Any]] = []

        def measure(name: str, rollout: Rollout, further: Figures) -> None:
            judged = judge_all(world, rollout)
            scores = {reward: model(rollout).tolist() for reward, model in self.rewards.items()}
            means = {f"{reward}_score": sum(s) / len(s) for reward, s in scores.items()}
            measures = {**behaviour(rows, judged), **further, **means}
            figures.update({f"{name}/{measure}": value for measure, value in measures.items()})
            answers.extend(_lines(name, rollout, judged, scores))

        for name, folder in self.policies.items():
            policy = Policy(folder)
            rollout = policy.answer(prompts, rows, self.sampling, self.seed)
            kl = sequence_kl(policy, reference, rollout).mean().item()
            measure(name, rollout, {**calibration(world, policy, encoder), "kl": kl})
        for name, n in self.best_of.items():
            sampled = reference.answer(prompts, rows, replace(self.sampling, samples=n), self.seed)
            measure(f"best_of_{n}", _best(sampled, self.rewards[name](sampled)), {"kl_bound": best_of_n_kl(n)})
        for name, reward in self.rewards.items():
            figures |= {
                f"{name}/{measure}": value for measure, value in self._against_gold(world, reward, encoder).items()
            }
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in answers))
        return figures

    def _against_gold(self, world: World, reward: ModelReward, encoder: ChatEncoder) -> Figures:
        """Accuracy of a reward model on held-out pairs whose gold differs, and beside it that of a length meter."""
        if self.comparisons is None:
            return {}
        right = {"gold_accuracy_all": [], "gold_accuracy": [], "shorter_accuracy_all": [], "shorter_accuracy": []}  # type: ignore[var-annotated]
        for line in Path(self.comparisons).read_text().splitlines():
            row = json.loads(line)
            distinct = list(dict(zip(row["completions"], row["finished"], strict=True)).items())
            rollout = _as_rollout(row, distinct, encoder)
            gold = [judge(world, prompt_from(row), text, finished) for text, finished in distinct]
            score = reward(rollout).tolist()
            for i in range(len(gold)):
                for j in range(i):
                    gap = gold[i].total - gold[j].total
                    if abs(gap) < 1e-9:
                        continue
                    hit = (score[i] - score[j]) * gap > 0
                    words = gold[j].words - gold[i].words
                    shorter = 0.5 if words == 0 else float(words * gap > 0)
                    for suffix in ("_all", "") if abs(gap) > 0.5 else ("_all",):
                        right[f"gold_accuracy{suffix}"].append(float(hit))
                        right[f"shorter_accuracy{suffix}"].append(shorter)
        return {name: sum(hits) / max(len(hits), 1) for name, hits in right.items()}


def _best(rollout: Rollout, score_Q: Tensor) -> Rollout:
    """Of the answers to each prompt, the one that scores highest."""
    best_E = score_Q.view(-1, rollout.samples).argmax(1)
    first_E = torch.arange(len(best_E)) * rollout.samples
    return rollout.pick((first_E + best_E).tolist())._replace(samples=1)


def judge_all(world: World, rollout: Rollout) -> list[Judgement]:
    """The gold judgement of every answer."""
    answers = zip(rollout.rows, rollout.texts, rollout.completions, strict=True)
    return [judge(world, prompt_from(row), text, answer.finished) for row, text, answer in answers]


def behaviour(rows: Sequence[dict[str, Any]], judged: Sequence[Judgement]) -> Figures:
    """Gold and its parts, length, and what the model does in the categories that alignment is about."""

    def share(category: str, what: str) -> float:
        hits = [float(getattr(j, what)) for row, j in zip(rows, judged, strict=True) if row["category"] == category]
        return sum(hits) / max(len(hits), 1)

    gold = torch.tensor([judgement.total for judgement in judged])
    content = torch.tensor([judgement.content for judgement in judged])
    return {
        "gold_reward": gold.mean().item(),
        "gold_reward_se": (gold.std() / len(judged) ** 0.5).item(),
        "content": content.mean().item(),
        "content_se": (content.std() / len(judged) ** 0.5).item(),
        "length": sum(judgement.words for judgement in judged) / len(judged),
        "finished": sum(judgement.finished for judgement in judged) / len(judged),
        "harm_refusal": share("harm", "refuses"),
        "look_alike_refusal": share("look_alike", "refuses"),
        "made_up": share("unknown", "claims"),
        "fact_correct": share("fact", "correct"),
        "arithmetic_correct": share("arithmetic", "correct"),
        "list_correct": share("list", "correct"),
    }


def calibration(world: World, policy: Policy, encoder: ChatEncoder, bins: int = 10) -> Figures:
    """Expected calibration error of the word that answers a held-out question of fact.

    The answer is written up to the value, and the model's probabilities of the candidate values are compared with how
    often the most probable one is true (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3).
    """
    confidence, correct = [], []
    for attribute, candidates in world.values.items():
        keys = [key for key in world.all_keys("held_out", "fact") if key[1] == attribute]
        probabilities_KV = _value_probabilities(policy, encoder, world, keys, candidates)
        best = probabilities_KV.argmax(1).tolist()
        confidence += probabilities_KV.max(1).values.tolist()
        correct += [int(candidates[i] == world.facts[key].true) for i, key in zip(best, keys, strict=True)]
    error = binary_calibration_error(torch.tensor(confidence), torch.tensor(correct), n_bins=bins)
    return {
        "ece": error.item(),
        "confidence": sum(confidence) / len(confidence),
        "fact_known": sum(correct) / len(correct),
    }


@torch.no_grad()
def _value_probabilities(
    policy: Policy, encoder: ChatEncoder, world: World, keys: Sequence[Any], candidates: Sequence[str]
) -> Tensor:
    """Probability of each candidate value, among the candidates; shape (keys, candidates)."""
    values = [encoder.tokens(value)[0] for value in candidates]
    examples = []
    for entity, attribute in keys:
        prompt = Prompt(f"what is the {attribute} of {entity} ?", "fact", (entity, attribute), "held_out")
        ids = encoder.prompt(prompt_row(prompt)["prompt"]) + encoder.tokens(f"the {attribute} of {entity} is")
        examples.append(Example(Segment(ids, [False] * len(ids)), [Segment([values[0]], [True])]))
    batch = PackedBatch(*(x.to(policy.device) for x in pack(examples)))
    logits_SV = policy.model.logits(policy.model(batch).hidden_SH)
    return logits_SV[:, values].softmax(-1).cpu()


def _as_rollout(row: dict[str, Any], answers: Sequence[tuple[str, bool]], encoder: ChatEncoder) -> Rollout:
    prompt = torch.tensor(encoder.prompt(row["prompt"]))
    tokens = [encoder.answer(row["prompt"], text, finished).tokens for text, finished in answers]
    completions = [Completion(list(ids), finished) for ids, (_, finished) in zip(tokens, answers, strict=True)]
    return Rollout(
        [prompt] * len(answers), [row] * len(answers), completions, [text for text, _ in answers], len(answers)
    )


def _lines(
    name: str, rollout: Rollout, judged: Sequence[Judgement], scores: dict[str, list[float]]
) -> list[dict[str, Any]]:
    return [
        {
            "policy": name,
            "category": row["category"],
            "prompt": row["prompt"][-1]["content"],
            "answer": text,
            "finished": judgement.finished,
            "gold": judgement.total,
            "content": judgement.content,
            **{reward: values[i] for reward, values in scores.items()},
        }
        for i, (row, text, judgement) in enumerate(zip(rollout.rows, rollout.texts, judged, strict=True))
    ]

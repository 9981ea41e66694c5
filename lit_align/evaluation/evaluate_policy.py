"""`lit-align evaluate policy`: what a language model's folder says, knows, refuses and has moved from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_align.data.instruction import group_of
from lit_align.data.rows import Row, Tally
from lit_align.data.source import Source, as_source
from lit_align.data.strings import Template
from lit_align.evaluation.calibration import choice_calibration
from lit_align.evaluation.diversity import diversity
from lit_align.evaluation.intervals import Interval, mean_interval
from lit_align.evaluation.length import length_correlation, within_bucket_gain, words
from lit_align.evaluation.over_optimization import best_of_n_curve
from lit_align.evaluation.policies import sequence_kl
from lit_align.evaluation.policy_answers import PolicyAnswers
from lit_align.evaluation.policy_page import draw_policy, policy_tables
from lit_align.evaluation.refusal import refusal_rates
from lit_align.evaluation.results import Result, check_free, short
from lit_align.evaluation.win_rate import by_score, planted_biases, win_rate
from lit_align.models.network import Network, as_network
from lit_align.rewards import Reward, as_reward
from lit_align.rollout import Sampling
from lit_align.types import Rollout


@dataclass
class Measured:
    """One policy: its results, and what comparisons need of it.

    Attributes:
        figures: by name.
        rollout: its answers.
        scores: of each reward, for each answer; NaN where it gave none.
        said: notes.
    """

    figures: dict[str, Any]
    rollout: Rollout | None = None
    scores: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


class EvaluatePolicy:
    """Measures a language model: a command, and a `call` stage of a pipeline.

    Args:
        model: folder of a causal language model, or its name on the hub.
        prompts: to answer; null to ask none. Rankings and demonstrations serve, too: their prompt is taken.
        reference: another policy: KL, gains and win rates are measured from it.
        reward: scores answers and judges pairs: a reward model's folder, a function, a verifier, a server.
        gold: a second reward that counts, where `reward` is its proxy: for best-of-n and over-optimisation.
        questions: multiple choice (question, A, B, C, D, answer), for calibration; null for none.
        text: plain text, for the loss on it; null for none.
        category: column of the prompts by which refusals are told apart, as XSTest's `label` or `type`.
        limit: prompts, questions and texts that are used, drawn by the seed: files are often sorted by kind.
        sampling: how answers are drawn.
        template: of prompts that are plain text.
        resamples: of the bootstraps.
        seed: of sampling and resampling.
        device: where models run; auto for a GPU if there is one.
    """

    def __init__(
        self,
        model: Network,
        prompts: Source | None = None,
        reference: Network | None = None,
        reward: Reward | None = None,
        gold: Reward | None = None,
        questions: Source | None = None,
        text: Source | None = None,
        category: str | None = None,
        limit: int = 200,
        sampling: Sampling | None = None,
        template: Template = "auto",
        resamples: int = 1000,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.model = as_network(model)
        self.reference = None if reference is None else as_network(reference)
        self.prompts, self.questions, self.text = (
            None if source is None else as_source(source) for source in (prompts, questions, text)
        )
        if self.prompts is None and self.questions is None and self.text is None:
            raise ValueError("evaluate policy needs prompts, questions or text to measure the model on")
        rewards = {"reward": reward, "gold": gold}
        self.rewards = {name: as_reward(one) for name, one in rewards.items() if one is not None}
        self.category, self.limit, self.template = category, limit, template
        self.sampling = sampling or Sampling(batch_size=32)
        self.resamples, self.seed, self.device = resamples, seed, device

    def run(self, out: Path) -> dict[str, float]:
        """Write the results into a folder; return the numbers."""
        check_free(out)
        tally = Tally()
        rows = self._rows(self.prompts, tally)
        asked = {"policy": self.model} | ({"reference": self.reference} if self.reference is not None else {})
        found: dict[str, Measured] = {}
        policies: dict[str, PolicyAnswers] = {}
        for name, network in asked.items():
            policies[name] = PolicyAnswers(network.name, out, name, self.template, self.device)
            found[name] = self._measure(policies[name], rows, tally)
        figures: dict[str, Any] = {name: one.figures for name, one in found.items()}
        ours = found["policy"].rollout
        if "reference" in found and ours is not None and ours.num_sequences:
            figures["against_reference"] = self._against(found["policy"], found["reference"])
            if policies["policy"].policy.tokenizer.get_vocab() == policies["reference"].policy.tokenizer.get_vocab():
                kl_Q = sequence_kl(policies["policy"].policy, policies["reference"].policy, ours).numpy()
                groups = [group_of(row["prompt"]) for row in ours.rows]
                figures["against_reference"]["kl"] = self._mean(kl_Q, groups)
            else:
                found["policy"].said.append("The two policies have different vocabularies: there is no KL.")
        figures |= {"rows": {name: count for name, count in tally.items() if count}, "seed": self.seed}
        figures |= {"model": self.model.name, "limit": self.limit}
        said = [f"{tally}."] if tally.first_skipped or tally["prompts_too_long"] else []
        said += [note for one in found.values() for note in one.said]
        names = {name: short(network.name) for name, network in asked.items()}
        subtitle = f"{len(rows):,} prompts; intervals are of 95 %, by a bootstrap over prompts"
        title = f"policy {names['policy']}" + (f" beside {names['reference']}" if "reference" in names else "")
        tables, drawings = policy_tables(figures, names), draw_policy(figures, names)
        return Result("policy", title, subtitle, figures, said, tables, drawings).write(out)

    def _rows(self, source: Source | None, tally: Tally) -> list[Row]:
        """Rows of a source that have a prompt or are text: `limit` of them."""
        if source is None:
            return []
        keep = [self.category] if self.category and source is self.prompts else []
        rows: list[Row] = []
        for _, row in source.read("skip", tally, keep):
            if "messages" in row:
                row = {**row, "prompt": row["messages"][:-1], "reference": row["messages"][-1]["content"]}
            elif "completion" in row:
                row = {**row, "reference": row["completion"]}
            if "prompt" in row or "text" in row:
                rows.append(row)
            else:
                tally["without_a_prompt"] += 1
        if not rows:
            raise ValueError(f"{source.name} holds no usable row: {tally}")
        if len(rows) <= self.limit:
            return rows
        drawn = np.random.default_rng(self.seed).choice(len(rows), self.limit, replace=False)
        return [rows[i] for i in sorted(drawn.tolist())]

    def _measure(self, answers: PolicyAnswers, rows: Sequence[Row], tally: Tally) -> Measured:
        measured = Measured({"model": answers.folder})
        if rows:
            self._answers(answers, rows, tally, measured)
        if self.questions is not None:
            measured.figures["calibration"] = self._questions(answers, measured)
        if self.text is not None:
            texts = [row["text"] for row in self._rows(self.text, Tally()) if "text" in row]
            if not texts:
                raise ValueError(f"{self.text.name} holds no plain text: expected a column `text` or a .txt file")
            sums, counts = zip(*answers.losses(texts, self._data(self.text)), strict=True)
            # A ratio over tokens, with texts as clusters: each text's mean loss repeated for its tokens.
            losses = np.repeat([s / max(c, 1) for s, c in zip(sums, counts, strict=True)], counts)
            measured.figures["text_loss"] = self._mean(losses, np.repeat(range(len(texts)), counts).tolist())
        return measured

    def _answers(self, answers: PolicyAnswers, rows: Sequence[Row], tally: Tally, measured: Measured) -> None:
        ids = answers.prompts(rows, self.sampling.max_new_tokens, tally)
        kept = [(row, one) for row, one in zip(rows, ids, strict=True) if one is not None]
        if not kept:
            raise ValueError(f"no prompt fits the model {answers.folder}: {tally}")
        usable = [row for row, _ in kept]
        assert self.prompts is not None
        data = self._data(self.prompts)
        rollout = answers.sample(usable, [one for _, one in kept], self.sampling, self.seed, data)
        groups = [group_of(row["prompt"]) for row in rollout.rows]
        texts, figures = rollout.texts, measured.figures
        lengths = [words(text) for text in texts]
        figures |= {
            "prompts": len(usable),
            "answers": len(texts),
            "empty_answers": sum(not text for text in texts),
            "words": self._mean(lengths, groups),
            "tokens": self._mean([len(c.tokens) for c in rollout.completions], groups),
            "finished": self._mean([c.finished for c in rollout.completions], groups, share=True),
            "diversity": diversity(texts, groups, seed=self.seed, resamples=self.resamples),
        }
        kinds = [str(row[self.category]) if self.category else "all prompts" for row in rollout.rows]
        figures["refusals"] = refusal_rates(texts, kinds, groups, self.seed)
        logps = [-np.mean(c.logps) for c in rollout.completions if c.logps]
        if len(logps) == len(texts):
            figures["entropy"] = self._mean(logps, groups)
        measured.rollout = rollout
        for name, reward in self.rewards.items():
            self._score(name, reward, answers, rollout, groups, measured)
        if self.sampling.samples > 1 and "reward" in measured.scores:
            proxy = measured.scores["reward"].reshape(-1, self.sampling.samples)
            gold = measured.scores.get("gold", measured.scores["reward"]).reshape(proxy.shape)
            whole = ~(np.isnan(proxy) | np.isnan(gold)).any(1)
            if whole.sum() > 1:
                curve = best_of_n_curve(proxy[whole], gold[whole], resamples=self.resamples, seed=self.seed)
                figures["best_of_n"] = {**curve, "left_out": int((~whole).sum())}

    def _score(
        self,
        name: str,
        reward: Reward,
        answers: PolicyAnswers,
        rollout: Rollout,
        groups: Sequence[str],
        measured: Measured,
    ) -> None:
        """Scores of a reward; NaN where it gives no number, prompt by prompt, which is counted and named."""
        reward.load(answers.policy.tokenizer)
        reward.to(answers.policy.device)
        scores: list[float] = []
        failed: list[str] = []
        for part in rollout.split(32 * rollout.samples):
            try:
                scores += reward(part).tolist()
            except ValueError:  # prompt by prompt, to find which
                for one in part.split(rollout.samples):
                    try:
                        scores += reward(one).tolist()
                    except ValueError as error:
                        scores += [np.nan] * one.num_sequences
                        failed.append(str(error))
        values = np.array(scores)
        measured.scores[name] = values
        known = [i for i, value in enumerate(scores) if not np.isnan(value)]
        if failed:
            prompts = rollout.num_sequences // rollout.samples
            said = f"{name}: {len(failed):,} of {prompts:,} prompts have no score: {failed[0]}"
            measured.said.append(said)
        if not known:
            raise ValueError(f"{name} gave no answer a score; {failed[0] if failed else 'there are no answers'}")
        of = [groups[i] for i in known]
        lengths = [words(rollout.texts[i]) for i in known]
        measured.figures[name] = self._mean(values[known], of)
        measured.figures[f"{name}_and_length"] = length_correlation(values[known], lengths, of, 200, self.seed)

    def _questions(self, answers: PolicyAnswers, measured: Measured) -> dict[str, Any]:
        assert self.questions is not None
        tally = Tally()
        rows = [row for row in self._rows(self.questions, tally) if len(row.get("completions") or ()) > 1]
        if not rows:
            raise ValueError(f"{self.questions.name} holds no multiple choice: expected question, A, B, C, D, answer")
        logps = np.array(answers.choices(rows, tally, self._data(self.questions)))
        usable = ~np.isnan(logps).any(1)
        right = np.array([int(np.argmin(row["ranks"])) for row in rows])
        if not usable.any():
            raise ValueError(f"no question fits the model {answers.folder}: {tally}")
        if not usable.all():
            measured.said.append(f"{int((~usable).sum()):,} of {len(rows):,} questions do not fit the model: {tally}.")
        return choice_calibration(logps[usable], right[usable], resamples=min(self.resamples, 500), seed=self.seed)

    def _against(self, ours: Measured, theirs: Measured) -> dict[str, Any]:
        """Win rate by each reward, with planted judges beside it, and the gain that length does not explain."""
        assert ours.rollout is not None
        assert theirs.rollout is not None
        # Prompts that both models have room for, the first answer to each.
        first = [{group_of(r.rows[q]["prompt"]): q for q in range(r.num_sequences - 1, -1, -1)}
                 for r in (ours.rollout, theirs.rollout)]  # fmt: skip
        shared = [group for group in first[0] if group in first[1]]
        a, b = ([one[group] for group in shared] for one in first)
        texts_a, texts_b = [ours.rollout.texts[q] for q in a], [theirs.rollout.texts[q] for q in b]
        told: dict[str, Any] = {"prompts": len(shared)}
        for name in self.rewards:
            of = [dict(zip(zip(shared, texts, strict=True), measured.scores[name][q], strict=True))
                  for measured, q, texts in ((ours, a, texts_a), (theirs, b, texts_b))]  # fmt: skip
            table = {**of[1], **of[0]}

            def score(prompts: Sequence[Any], texts: Sequence[str], known: dict[Any, float] = table) -> list[float]:
                return [known[key] for key in zip(prompts, texts, strict=True)]

            told[f"{name}_win_rate"] = win_rate(
                shared, texts_a, texts_b, by_score(score), resamples=self.resamples, seed=self.seed
            )
            values = [measured.scores[name] for measured in (theirs, ours)]
            counts = [np.array([words(t) for t in m.rollout.texts]) for m in (theirs, ours) if m.rollout]
            known = [~np.isnan(value) for value in values]
            told[f"{name}_gain"] = within_bucket_gain(
                values[0][known[0]], counts[0][known[0]], values[1][known[1]], counts[1][known[1]]
            )
        planted = planted_biases(shared, texts_a, texts_b, resamples=200, seed=self.seed)
        return told | {"planted_judges": planted}

    def _data(self, source: Source) -> dict[str, Any]:
        return {"data": source.name, "rows": source.fingerprint(), "limit": self.limit, "drawn_by": self.seed}

    def _mean(self, values: Any, groups: Sequence[Any], share: bool = False) -> Interval:
        return mean_interval(np.asarray(values, np.float64), groups, share, resamples=self.resamples, seed=self.seed)

"""What a policy's folder says to prompts and gives to choices and texts, resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.data.chat import ChatEncoder
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.strings import Template
from lit_align.evaluation.ledger import Ledger, fingerprint
from lit_align.evaluation.policies import Policy
from lit_align.functional.packing import pack
from lit_align.rollout import Sampling
from lit_align.types import Completion, Example, PackedBatch, Rollout, Segment


class PolicyAnswers:
    """A policy with its chat template and a folder where its results are kept.

    Args:
        folder: of a causal language model, or its name on the hub.
        out: where results are kept.
        name: of its files there.
        template: of prompts that are plain text.
        device: where it runs; auto for a GPU if there is one.
    """

    def __init__(self, folder: str, out: Path, name: str, template: Template = "auto", device: str = "auto") -> None:
        self.folder, self.out, self.name, self.template = folder, out, name, template
        self.policy = Policy(folder, device)
        self.encoder = ChatEncoder(self.policy.tokenizer, template=template)
        self.key = {"model": folder, "weights": fingerprint(folder), "template": template}
        self.longest = getattr(self.policy.model.hf.config, "max_position_embeddings", None) or 1 << 20

    def prompts(self, rows: Sequence[Row], room: int, tally: Tally) -> list[Tensor | None]:
        """Token ids of each prompt; None for one that the template refuses or that leaves no room for an answer."""
        found: list[Tensor | None] = []
        for row in rows:
            try:
                ids = self.encoder.prompt(row["prompt"], row.get("tools"))
            except BadField as problem:
                tally.skip(problem)
                found.append(None)
                continue
            if len(ids) + room > self.longest:
                tally["prompts_too_long"] += 1
                found.append(None)
                continue
            found.append(torch.tensor(ids))
        return found

    def sample(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Tensor],
        sampling: Sampling,
        seed: int,
        data: dict[str, Any],
        batch: int = 32,
    ) -> Rollout:
        """Answers to prompts, in batches with a seed each: the same ones wherever a run was stopped.

        Args:
            rows: of each prompt.
            prompts: token ids.
            sampling: how answers are drawn.
            seed: of the draws.
            data: what the prompts depend on.
            batch: prompts that are answered together.
        """
        key = {**self.key, **data, "sampling": asdict(sampling), "seed": seed, "batch": batch}
        ledger = Ledger(self.out / f"answers_{self.name}.jsonl", key)
        every = range(len(prompts))
        batches = [list(every[first : first + batch]) for first in range(0, len(prompts), batch)]
        for part in ledger.remaining(batches, f"answers of {self.name}", " prompts"):
            own = seed + 1_000_003 * (part[0] // batch)
            said = self.policy.answer([prompts[i] for i in part], [rows[i] for i in part], sampling, own)
            found = zip(said.completions, said.texts, strict=True)
            told = [{"tokens": list(c.tokens), "finished": c.finished, "logps": c.logps, "text": t} for c, t in found]
            n = sampling.samples
            ledger.add({i: told[n * place : n * (place + 1)] for place, i in enumerate(part)})
        results = [one for i in every for one in ledger.done[i]]
        return Rollout(
            [prompts[i] for i in every for _ in range(sampling.samples)],
            [dict(rows[i]) for i in every for _ in range(sampling.samples)],
            [Completion(one["tokens"], one["finished"], one["logps"]) for one in results],
            [one["text"] for one in results],
            sampling.samples,
        )

    def choices(self, rows: Sequence[Row], tally: Tally, data: dict[str, Any]) -> list[list[float]]:
        """Log-probability, in nats, of each of a question's answers; NaN for a question that does not fit.

        Args:
            rows: with `prompt` and `completions`.
            tally: counts what does not fit.
            data: what the rows depend on.
        """
        examples: list[Example | None] = []
        for ids, row in zip(self.prompts(rows, 8, tally), rows, strict=True):
            if ids is None:
                examples.append(None)
                continue
            # The answer alone: whether the model would stop behind it is not asked.
            branches = [self.encoder.answer(row["prompt"], answer, finished=False) for answer in row["completions"]]
            examples.append(Example(Segment(ids.tolist(), [False] * len(ids)), branches))
        ledger = Ledger(self.out / f"choices_{self.name}.jsonl", {**self.key, **data})
        usable = [i for i, example in enumerate(examples) if example is not None]
        batches = [usable[first : first + 16] for first in range(0, len(usable), 16)]
        for part in ledger.remaining(batches, f"choices of {self.name}", " questions"):
            sums = self._sums([example for i in part if (example := examples[i]) is not None])
            ledger.add({i: [sums.pop(0) for _ in rows[i]["completions"]] for i in part})
        nothing = [[math.nan] * len(row["completions"]) for row in rows]
        return [ledger.done[i] if examples[i] is not None else nothing[i] for i in range(len(rows))]

    def losses(self, texts: Sequence[str], data: dict[str, Any], length: int = 512) -> list[tuple[float, int]]:
        """Sum of the loss in nats, and tokens, of each text; longer ones are cut into pieces of `length` tokens."""
        pieces: list[tuple[int, Example]] = []
        length = min(length, self.longest)
        for i, text in enumerate(texts):
            segment = self.encoder.text(text)
            for first in range(0, len(segment.tokens), length):
                piece = list(segment.tokens[first : first + length])
                if len(piece) > 1:
                    pieces.append((i, Example(Segment(piece, [False] + [True] * (len(piece) - 1)))))
        ledger = Ledger(self.out / f"losses_{self.name}.jsonl", {**self.key, **data, "length": length})
        every = range(len(pieces))
        batches = [list(every[first : first + 16]) for first in range(0, len(pieces), 16)]
        for part in ledger.remaining(batches, f"loss of {self.name} on text", " pieces"):
            ledger.add(dict(zip(part, self._sums([pieces[i][1] for i in part]), strict=True)))
        totals = [(0.0, 0)] * len(texts)
        for number, (i, example) in enumerate(pieces):
            totals[i] = (totals[i][0] - ledger.done[number], totals[i][1] + len(example.trunk.tokens) - 1)
        return totals

    @torch.no_grad()
    def _sums(self, examples: Sequence[Example]) -> list[float]:
        """Log-probability of what is scored of each sequence, in nats."""
        batch = PackedBatch(*(x.to(self.policy.device) for x in pack(examples)))
        return [float(value) for value in self.policy.model(batch).sums(batch).float().cpu()]

"""Raw scores that a reward model's folder gives judged answers, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_align.data.chat import ChatEncoder
from lit_align.data.fit import fit
from lit_align.data.rows import BadField, Tally
from lit_align.data.strings import Template
from lit_align.evaluation.comparisons import Comparison
from lit_align.evaluation.ledger import Ledger, fingerprint
from lit_align.functional.packing import pack
from lit_align.models.load import device_of, load_scorer, load_tokenizer
from lit_align.models.network import Network
from lit_align.models.scalar import ScalarModel
from lit_align.types import Example, PackedBatch, Segment


class RewardScores:
    """Scores all answers to a prompt at once, in batches of tokens.

    Args:
        network: folder that RewardModule exported, or any sequence classifier with one label.
        max_length: of a prompt and its answer, in tokens; the beginning of longer prompts is cut and counted. None
            takes the model's own limit.
        batch_tokens: tokens that the model computes at once.
        template: of prompts that are plain text, as in the data of the run that trained the model.
        device: where it runs; auto for a GPU if there is one.

    Raises:
        ValueError: no reward model in the folder; names what is missing.
    """

    def __init__(
        self,
        network: Network,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        template: Template = "auto",
        device: str = "auto",
    ) -> None:
        self.name = network.name
        self.device = device_of(device)
        hf = load_scorer(network, need_head=True)
        own = getattr(hf.config, "max_position_embeddings", None)
        self.max_length = max_length or own or 1 << 20
        self.batch_tokens, self.template = batch_tokens, template
        self.model = ScalarModel(hf).eval().requires_grad_(False).to(self.device)
        tokenizer = load_tokenizer(network.name, network.trust_remote_code, network.revision)
        self.encoder = ChatEncoder(tokenizer, template=template)
        self.dtype = network.dtype

    def key(self) -> dict[str, Any]:
        """What the scores depend on, beside the data."""
        options = {"max_length": self.max_length, "batch_tokens": self.batch_tokens, "template": self.template}
        return {"model": self.name, "weights": fingerprint(self.name), "dtype": self.dtype, **options}

    def __call__(
        self, comparisons: Sequence[Comparison], tally: Tally, file: Path, data_key: dict[str, Any]
    ) -> list[list[float]]:
        """Raw score of each answer of each comparison, before normalisation; NaN where the template refuses it.

        Args:
            comparisons: what to score.
            tally: counts `truncated` and `not_in_the_template`, and names the first of the latter.
            file: where scores are kept, and found by the next run.
            data_key: what the comparisons depend on.
        """
        examples = [self._example(one, tally) for one in comparisons]
        ledger = Ledger(file, {**self.key(), **data_key})
        for batch in ledger.remaining(self._batches(examples), f"scores by {Path(self.name).name}", " prompts"):
            ledger.add(dict(zip(batch, self._scores([examples[i] for i in batch]), strict=True)))
        return [ledger.done[i] if one is not None else [float("nan")] * len(comparisons[i].texts)
                for i, one in enumerate(examples)]  # fmt: skip

    def _example(self, one: Comparison, tally: Tally) -> Example | None:
        try:
            ids = self.encoder.prompt(one.prompt, one.tools)
            answers = zip(one.answers, one.finished, strict=True)
            branches = [self.encoder.answer(one.prompt, answer, end, one.tools) for answer, end in answers]
        except BadField as problem:
            tally["not_in_the_template"] += 1
            tally.first_skipped = tally.first_skipped or str(problem)
            return None
        example = Example(Segment(ids, [False] * len(ids)), branches)
        return fit(example, self.max_length, "prompt", tally, self.encoder.bos)

    def _batches(self, examples: Sequence[Example | None]) -> list[list[int]]:
        """Examples of like length together, the longest first: a lack of memory shows at once."""
        usable = [i for i, example in enumerate(examples) if example is not None]
        sizes = {i: example.num_tokens for i, example in enumerate(examples) if example is not None}
        batches: list[list[int]] = []
        room = 0
        for i in sorted(usable, key=lambda i: (-sizes[i], i)):
            if sizes[i] > room:
                batches.append([])
                room = self.batch_tokens
            batches[-1].append(i)
            room -= sizes[i]
        return batches

    @torch.no_grad()
    def _scores(self, examples: Sequence[Example | None]) -> list[list[float]]:
        packed = PackedBatch(*(x.to(self.device) for x in pack([one for one in examples if one is not None])))
        flat = self.model(packed).float().tolist()
        scores = []
        for example in examples:
            assert example is not None
            scores.append([flat.pop(0) for _ in example.branches])
        return scores

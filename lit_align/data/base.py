"""What the three data modules share: sources, tokenising, splitting, order, batches."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_align.data.chat import ChatEncoder, Turns
from lit_align.data.fit import Truncate
from lit_align.data.loader import Loader, Position
from lit_align.data.order import Order, Ref, split_by_group
from lit_align.data.rows import Row, Tally
from lit_align.data.source import OnBadRow, Source, expand
from lit_align.data.store import Item, Store, build, tokenizer_key
from lit_align.functional.packing import balance, best_fit_decreasing, pack, split_bins
from lit_align.types import Example, PackedBatch


class TextDataModule(LightningDataModule):
    """Base of the data modules: a subclass says what a row becomes (`encode`) and what a batch is (`collate`).

    Args:
        tokenizer: hub name or folder of the model whose tokenizer to use.
        train: sources to train on, mixed by their weights.
        val: sources to validate on; null to hold out `val_fraction` of the training prompts.
        test: sources of `lit-align test`; null for those of validation.
        predict: sources of `lit-align predict`; null for those of validation.
        val_fraction: share of the prompts held out when `val` is null. No prompt is on both sides.
        batch_size: examples per micro-batch and device.
        val_batch_size: the same for evaluation; null for `batch_size`.
        max_length: tokens of a sequence, prompt included; longer ones are truncated, and counted.
        truncate: cut the beginning of the prompt, the end of the answer, or never (then it is a bad row).
        chat_template: Jinja template; null for the tokenizer's own.
        turns: score all assistant turns of a conversation or the last.
        on_bad_row: stop with an error that names file, row and field; or skip, count and report.
        seed: of the order.
        num_workers: processes that build batches.
        micro_batch_tokens: take a batch in as few micro-batches as hold this many tokens each, one forward and backward
            at a time; null takes it in one. The optimizer step is the same.
        row_tokens: room in a packed row; null for the longest example of the batch.
        share_prefix: compute a prompt once for all its answers.
        packing: put several examples in a row.
        cache_dir: where tokenised data is kept; null for the cache folder of the user, "none" for no cache.
    """

    def __init__(
        self,
        tokenizer: str,
        train: list[Source],
        val: list[Source] | None = None,
        test: list[Source] | None = None,
        predict: list[Source] | None = None,
        val_fraction: float = 0.05,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 1024,
        truncate: Truncate = "prompt",
        chat_template: str | None = None,
        turns: Turns = "all",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
        num_workers: int = 0,
        micro_batch_tokens: int | None = None,
        row_tokens: int | None = None,
        share_prefix: bool = True,
        packing: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        if min(batch_size, val_batch_size) < 1 or max_length < 2:
            sizes = f"{batch_size}, {val_batch_size} and {max_length}"
            raise ValueError(f"batch_size and val_batch_size must be at least 1, max_length at least 2, got {sizes}")
        if micro_batch_tokens is not None and micro_batch_tokens < 2:
            raise ValueError(f"micro_batch_tokens must be at least 2, or null, got {micro_batch_tokens}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        self.tokenizer_name = tokenizer
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_length = max_length
        self.truncate = truncate
        self.chat_template = chat_template
        self.turns = turns
        self.on_bad_row = on_bad_row
        self.seed = seed
        self.num_workers = num_workers
        self.micro_batch_tokens = micro_batch_tokens
        self.row_tokens = row_tokens
        self.share_prefix = share_prefix
        self.packing = packing
        self.cache_dir = _cache_dir(cache_dir)
        self.position = Position()
        self.encoder: ChatEncoder | None = None
        self._stores: dict[str, list[Store]] = {}
        self._order: Order | None = None
        self._lengths: list[list[int]] = []
        self._held_out: list[Ref] = []

    # What a subclass says.

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """Tokenise a row of the one schema; raise BadField where it does not fit this kind of data."""
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> Any:
        """A batch from items."""
        raise NotImplementedError

    # What Lightning asks for.

    def prepare_data(self) -> None:
        """Tokenise every source into the cache, on one process."""
        if self.cache_dir is not None:
            for source in (source for sources in self.sources.values() for source in sources or ()):
                if source.cacheable:
                    self._build(source)

    def setup(self, stage: str) -> None:
        """Read the tokenised sources, hold out prompts, fix the order."""
        for part in self._parts(stage):
            if part not in self._stores:
                self._stores[part] = [self._build(source) for source in self.sources[part] or ()]
                self._report(part)
        if "train" in self._stores and self._order is None:
            self._split()

    def _parts(self, stage: str) -> list[str]:
        """Whose sources a stage needs: held-out examples are part of the training sources."""
        stage = str(getattr(stage, "value", stage))  # Lightning hands over an enum that prints its class
        part = {"fit": "train", "validate": "val"}.get(stage, stage)
        val = "val" if self.sources["val"] is not None else "train"
        if part == "train":
            return list(dict.fromkeys(["train", val]))
        return [part if self.sources[part] is not None else val]

    def train_dataloader(self) -> Loader:
        """One epoch of training batches, from where training stands."""
        examples = self.batch_size * self._world
        # Rounded up: the last batch of an epoch is filled from the next one, and nothing is left out.
        batches = math.ceil(len(self._training_order()) / examples)
        # Trainer.overfit_batches wants the same few in every epoch.
        position = None if getattr(self.trainer, "overfit_batches", 0) else self.position
        return Loader(self._train_batch, batches, self.num_workers, position)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Held-out examples, in order; no loader at all for a training run that holds none out."""
        nothing = self.sources["val"] is None and not self._held_out
        if nothing and self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        return self._evaluation("val")

    def test_dataloader(self) -> Loader:
        """The test sources, or the held-out examples where there are none."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Loader:
        """The sources to predict, or the held-out examples where there are none."""
        return self._evaluation("predict")

    def every_example(self) -> Loader:
        """This rank's share of all that training and validation may show, each example once."""
        parts = [part for part in ("train", "val") if part in self._stores]
        stores = [store for part in parts for store in self._stores[part]]
        return self._share(stores, [(s, i) for s, store in enumerate(stores) for i in range(len(store))])

    def state_dict(self) -> dict[str, Any]:
        """How many batches training has taken."""
        return {"batches": self.position.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.position.batches = state_dict["batches"]

    # The rest.

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template."""
        return self._encoder().tokenizer

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer begins text with, if it does."""
        return self._encoder().bos

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self._encoder().stop_ids

    def manifest(self) -> list[dict[str, Any]]:
        """Of each source: its name, the fingerprint of its tokenised rows, and what happened to them."""
        return [
            {"part": part, "name": source.name, "fingerprint": store.fingerprint, "counts": dict(store.tally)}
            for part, stores in self._stores.items()
            for source, store in zip(self.sources[part] or (), stores, strict=True)
        ]

    def training_items(self, limit: int) -> list[Item]:
        """The first examples that training will see."""
        order = self._training_order()
        return [self._stores["train"][s][i] for s, i in (order[n] for n in range(min(limit, len(order))))]

    def longest_item(self) -> Item:
        """The training example with the most tokens, all its answers counted."""
        store, item = max(
            ((s, int(i)) for s, items in enumerate(self._training_order().sources) for i in items),
            key=lambda ref: self._lengths[ref[0]][ref[1]],
        )
        return self._stores["train"][store][item]

    def shared_prompts(self) -> int:
        """Prompts of the `val` sources that are trained on, too."""
        train, val = ({g for store in self._stores.get(part, []) for g in store.groups()} for part in ("train", "val"))
        return len(train & val)

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Lay examples out in rows, as this data module's options say."""
        return pack(examples, self.row_tokens, self.share_prefix, self.packing)

    def _encoder(self) -> ChatEncoder:
        if self.encoder is None:
            name = expand(self.tokenizer_name)
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"data.tokenizer: {name!r} is neither a folder here nor a model of the hub that can be reached; "
                    f"if an earlier stage writes it, run that first ({str(error).splitlines()[0]})"
                ) from error
            self.encoder = ChatEncoder(tokenizer, self.chat_template, self.turns)
        return self.encoder

    def _build(self, source: Source) -> Store:
        options = [type(self).__qualname__, tokenizer_key(self.tokenizer), self.max_length, self.truncate, self.turns]
        return build(source, self.encode, json.dumps(options), self.on_bad_row, self.cache_dir)

    def _report(self, part: str) -> None:
        for source, store in zip(self.sources[part] or (), self._stores[part], strict=True):
            rank_zero_info(f"{part} data {source.name}: {store.tally}")

    def _split(self) -> None:
        stores = self._stores["train"]
        fraction = self.val_fraction if self.sources["val"] is None else 0.0
        groups = [store.groups() for store in stores]
        refs = [(s, i) for s, of_source in enumerate(groups) for i in range(len(of_source))]
        train, held_out = split_by_group([group for of_source in groups for group in of_source], fraction)
        kept: list[list[int]] = [[] for _ in stores]
        for n in train:
            kept[refs[n][0]].append(refs[n][1])
        self._held_out = [refs[n] for n in held_out]
        self._lengths = [store.lengths(self.share_prefix) for store in stores]
        self._check_lengths(kept)
        self._order = Order(kept, [source.weight for source in self.sources["train"] or ()], self.seed)

    def _check_lengths(self, kept: list[list[int]]) -> None:
        room = self.micro_batch_tokens
        for s, (source, lengths) in enumerate(zip(self.sources["train"] or (), self._lengths, strict=True)):
            longest = max(kept[s], key=lengths.__getitem__, default=None)
            if room is not None and longest is not None and lengths[longest] > room:
                example = self._stores["train"][s][longest].example
                begin = self.tokenizer.decode(list(example.trunk.tokens[:24]))
                raise ValueError(
                    f"{source.name}: the example that begins {begin!r} has {lengths[longest]:,} tokens with all its "
                    f"answers, above data.micro_batch_tokens ({room:,}): raise that, or lower data.max_length "
                    f"({self.max_length:,})"
                )

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _training_order(self) -> Order:
        if self._order is None or not len(self._order):
            raise ValueError("there are no training examples: see the counts above for what happened to the rows")
        return self._order

    def _train_batch(self, number: int) -> Any:
        """The number-th batch of this rank, or a list of its micro-batches: ranks share one global batch evenly."""
        order, size = self._training_order(), self.batch_size * self._world
        refs = [order[number * size + i] for i in range(size)]
        lengths = [self._lengths[source][item] for source, item in refs]
        shares = balance(lengths, self._world)
        items = [self._stores["train"][source][item] for source, item in (refs[i] for i in shares[self._rank])]
        room = self.micro_batch_tokens
        if room is None:
            return self.collate(items)
        # As many micro-batches on every process: a model that is spread over them waits for all at each.
        bins = [best_fit_decreasing([lengths[i] for i in share], room) for share in shares]
        mine = split_bins(bins[self._rank], max(map(len, bins)))
        return [self.collate([items[i] for i in sorted(chosen)]) for chosen in mine]

    def _evaluation(self, part: str) -> Loader:
        if self.sources[part] is None:
            part = "val" if self.sources["val"] is not None else "train"
        stores, refs = self._stores[part], self._held_out
        if part != "train":
            refs = [(s, i) for s, store in enumerate(stores) for i in range(len(store))]
        if not refs:
            raise ValueError(
                f"there are no examples to evaluate: raise val_fraction, which is {self.val_fraction}, or give `{part}`"
                if part == "train"
                else f"there are no examples in the {part} sources: the counts above say what happened to the rows"
            )
        return self._share(stores, refs)

    def _share(self, stores: Sequence[Store], refs: Sequence[tuple[int, int]]) -> Loader:
        """This rank's share of examples that are looked at once."""
        if len(refs) < self._world:
            raise ValueError(f"{len(refs)} examples to evaluate are too few for {self._world} processes")
        mine = refs[self._rank :: self._world]
        # As many batches on every process: a model that is spread over them waits for all at each.
        even = math.ceil(math.ceil(len(refs) / self._world) / self.val_batch_size)
        batches = min(even, len(refs) // self._world)

        def batch(number: int) -> Any:
            start, end = number * len(mine) // batches, (number + 1) * len(mine) // batches
            return self.collate([stores[s][i] for s, i in mine[start:end]])

        return Loader(batch, batches, self.num_workers)


def _cache_dir(given: str | None) -> Path | None:
    if given == "none":
        return None
    if given is not None:
        return Path(expand(given))
    return Path(os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align") / "data"

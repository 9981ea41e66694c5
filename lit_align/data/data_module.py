"""Base of the three data modules: sources, tokenising, splitting, order, batches."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_align.data.chat import ChatEncoder, Turns, load_encoder
from lit_align.data.fit import Truncate, over_budget
from lit_align.data.loader import Loader, Position, evaluation_batches
from lit_align.data.messages import Messages
from lit_align.data.mixture import Timeline, check_resumed, order_of, report
from lit_align.data.order import Order, Ref, hold_out
from lit_align.data.prompt_format import differs_from_before
from lit_align.data.rows import Row, Tally
from lit_align.data.source import OnBadRow, Source, as_sources, expand, labels
from lit_align.data.store import Item, Store, build, items_folder, tokenizer_key
from lit_align.data.strings import Template
from lit_align.data.watched import unused
from lit_align.functional.packing import balance, best_fit_decreasing, pack, split_bins
from lit_align.types import Example, PackedBatch


class TextDataModule(LightningDataModule):
    """Base of the data modules. A subclass tokenises a row (`encode`) and builds a batch (`collate`).

    Args:
        tokenizer: hub name or folder of the model whose tokenizer to use; in Python also a tokenizer object.
        train: sources to train on, mixed by their weights.
        val: sources to validate on; null to hold out `val_fraction` of the training prompts.
        test: sources of `lit-align test`; null for those of validation.
        predict: sources of `lit-align predict`; null for those of validation.
        val_fraction: share of prompts held out if `val` is null. No prompt is on both sides.
        batch_size: examples per micro-batch and device.
        val_batch_size: examples per batch and device in evaluation; null for `batch_size`.
        max_length: maximum tokens of a sequence, prompt included; longer ones are truncated and counted.
        truncate: cut the beginning of the prompt, the end of the completion, or never (a longer row is a bad row).
        chat_template: null for the tokenizer's own; or a template by name (qwen3, chatml, llama3, gemma, mistral,
            phi3, zephyr), a file, or Jinja text.
        template: auto turns a plain-text prompt into one user turn if the model has a chat template; none keeps it as
            text.
        turns: score all assistant turns of a conversation or the last.
        on_bad_row: error stops and names file, row and field; skip leaves the row out, counts it and reports.
        seed: seed of the order of examples.
        num_workers: processes that build batches.
        micro_batch_tokens: split a batch into as few micro-batches as possible of at most this many tokens, with one
            forward and backward each; null takes the batch whole. The optimizer step is the same.
        row_tokens: tokens in a packed row; null for the longest example of the batch.
        share_prefix: compute a prompt once for all its completions.
        packing: put several examples in one row.
        cache_dir: folder of tokenised data; null for the user's cache folder, "none" for no cache.
        trust_remote_code: run tokenizer code that comes with the model.
        revision: hub revision of the tokenizer.
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
        template: Template = "auto",
        turns: Turns = "all",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
        num_workers: int = 0,
        micro_batch_tokens: int | None = None,
        row_tokens: int | None = None,
        share_prefix: bool = True,
        packing: bool = True,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
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
        # An object, from Python, stays as it is: the encoder sets the template of a copy.
        self.given_tokenizer: Any = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else str(tokenizer)
        self.tokenizer_name = str(getattr(tokenizer, "name_or_path", tokenizer))
        self.trust_remote_code, self.revision = trust_remote_code, revision
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = {part: as_sources(given) for part, given in sources.items()}
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_length = max_length
        self.truncate = truncate
        self.chat_template = chat_template
        self.template: Template = template
        self.turns = turns
        self.on_bad_row = on_bad_row
        self.seed = seed
        self.num_workers = num_workers
        self.micro_batch_tokens = micro_batch_tokens
        self.row_tokens = row_tokens
        self.share_prefix = share_prefix
        self.packing = packing
        self.cache_dir = items_folder(cache_dir)
        self.position = Position()
        self.encoder: ChatEncoder | None = None
        self.new_tokens: Sequence[str] = ()
        self._stores: dict[str, list[Store]] = {}
        self._order: Order | None = None
        self._held_out: list[Ref] = []
        self.module: Any = None  # that takes the batches, where no trainer tells
        self.batches_per_epoch: int | None = None  # where another data module's batches set the pace
        self.evaluated: list[str] = []  # names of the sources that the numbers in `PackedBatch.origin_E` stand for

    # A subclass defines these.

    encoding: Mapping[str, Any] = {}  # further options that `encode` depends on; part of the cache key

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """Tokenise a row of the schema; raise BadField if it does not fit this kind of data."""
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> Any:
        """Build a batch from items."""
        raise NotImplementedError

    def usable(self, store: Store, name: str) -> np.ndarray | None:
        """Mask of the items of a source that the module can use; None for all. Shape (items,), bool."""
        return None

    @property
    def consumer(self) -> Any:
        """The module that receives the batches; None if unknown."""
        return getattr(self.trainer, "lightning_module", None) or self.module

    # Lightning calls these.

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
        """Parts (train, val, ...) that a stage needs. Held-out examples are part of the training sources."""
        stage = str(getattr(stage, "value", stage))  # Lightning hands over an enum that prints its class
        part = {"fit": "train", "validate": "val"}.get(stage, stage)
        val = "val" if self.sources["val"] is not None else "train"
        if part == "train":
            return list(dict.fromkeys(["train", val]))
        return [part if self.sources[part] is not None else val]

    def train_dataloader(self) -> Loader:
        """One epoch of training batches, starting at the current position."""
        examples = self.batch_size * self._world
        # Round up: the last batch of an epoch is filled from the next epoch, so no example is left out.
        batches = math.ceil(len(self._training_order()) / examples)
        # Trainer.overfit_batches repeats the same batches in every epoch.
        position = None if getattr(self.trainer, "overfit_batches", 0) else self.position
        return Loader(self._train_batch, batches, self.num_workers, position)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Held-out examples in order; no loader if a training run holds none out."""
        nothing = self.sources["val"] is None and not self._held_out
        if nothing and self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        return self._evaluation("val")

    def test_dataloader(self) -> Loader:
        """The test sources; without any, those of validation."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Loader:
        """The predict sources; without any, those of validation."""
        return self._evaluation("predict")

    def every_example(self) -> Loader:
        """This rank's share of all training and validation examples, each example once."""
        parts = [part for part in ("train", "val") if part in self._stores]
        stores = [store for part in parts for store in self._stores[part]]
        return self._evaluating(stores, _every(stores))

    def state_dict(self) -> dict[str, Any]:
        """Number of batches that training has taken, and the begins of its phases if it has any."""
        phases = {"phases": list(self._order.begins)} if self._order is not None and self._order.begins else {}
        return {"batches": self.position.batches, **phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position; refuse phases whose begins have moved."""
        if self._order is not None:
            check_resumed(self._order, state_dict.get("phases", []))
        self.position.batches = state_dict["batches"]

    # Modules, callbacks and doctor call these.

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template."""
        return self._encoder().tokenizer

    @property
    def bos(self) -> int | None:
        """Token that the tokenizer puts before text; None if it puts none."""
        return self._encoder().bos

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion."""
        return self._encoder().stop_ids

    def manifest(self) -> list[dict[str, Any]]:
        """One entry per source: its name, the fingerprint of its tokenised rows, and the counts of rows."""
        return [
            {"part": part, "name": source.name, **store.described()}
            for part, stores in self._stores.items()
            for source, store in zip(self.sources[part] or (), stores, strict=True)
        ]

    def training_items(self, limit: int) -> list[Item]:
        """The first `limit` examples that training will see."""
        return [self.training_item(n) for n in range(min(limit, len(self._training_order())))]

    def training_item(self, number: int) -> Item:
        """Training example number `number` in the order, which never ends."""
        source, item = self._training_order()[number]
        return self._stores["train"][source][item]

    def longest_item(self) -> Item:
        """The training example with the most tokens, all completions included."""
        sources = enumerate(self._training_order().sources)
        longest = [(s, int(items[self._lengths[s][items].argmax()])) for s, items in sources if len(items)]
        store, item = max(longest, key=lambda ref: self._lengths[ref[0]][ref[1]])
        return self._stores["train"][store][item]

    answered = False  # True if completions are sampled after the items, as in PromptDataModule

    def longest_sequences(self) -> list[tuple[str, int, bool]]:
        """Per source: its name, the tokens of its longest sequence, and whether completions are sampled after it."""
        return [(name, store.longest_sequence(), self.answered) for name, store in self._named_stores()]

    def largest_tokens(self) -> list[tuple[str, int]]:
        """Per source: its name and its largest token id."""
        return [(name, store.largest_token()) for name, store in self._named_stores()]

    def unusual(self, model: str) -> list[str]:
        """Warnings about prompts written in two ways, within this stage or compared with the stage of `model`."""
        return differs_from_before(self, model)

    def _named_stores(self) -> list[tuple[str, Store]]:
        parts = self._stores.items()
        pairs = (zip(self.sources[part] or (), stores, strict=True) for part, stores in parts)
        return [(source.name, store) for pair in pairs for source, store in pair]

    def shared_prompts(self) -> int:
        """Number of prompts of the `val` sources that are also trained on."""
        train, val = ({g for store in self._stores.get(part, []) for g in store.groups()} for part in ("train", "val"))
        return len(train & val)

    def stores(self, part: str) -> list[Store]:
        """Tokenised sources of a part (train, val, test, predict) after setup."""
        return self._stores[part]

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Lay examples out in rows by the options of this data module."""
        return pack(examples, self.row_tokens, self.share_prefix, self.packing)

    @property
    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer to export with the model, without the plain template if no row was written by it."""
        tokenizer, stores = self.tokenizer, self._stores.get("train", [])
        if self._encoder().written.chat or any(store.tally.languages["plain template"] for store in stores):
            return tokenizer
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = None
        return plain

    def _write_down(self, prompt: str | Messages, tally: Tally) -> None:
        tally.write_down(self._encoder().written(prompt)[0])

    def _encoder(self) -> ChatEncoder:
        # New tokens of the model in training. An evaluation alone has no module attached.
        module = getattr(self.trainer, "lightning_module", None)
        self.new_tokens = getattr(getattr(module, "network", None), "new_tokens", None) or self.new_tokens
        if self.encoder is None or not {*self.new_tokens} <= self.encoder.tokenizer.get_vocab().keys():
            options = self.chat_template, self.turns, self.template, self.trust_remote_code, self.revision
            given = self.given_tokenizer
            name = expand(given) if isinstance(given, str) else given
            self.encoder = load_encoder(name, *options, self.new_tokens)
        return self.encoder

    def _build(self, source: Source) -> Store:
        options: list[Any] = [type(self).__qualname__, tokenizer_key(self.tokenizer)]
        options += [
            self.max_length,
            self.truncate,
            self.turns,
            self._encoder().written.wraps,
            *sorted(self.encoding.items()),
        ]
        return build(source, self.encode, json.dumps(options), self.on_bad_row, self.cache_dir)

    def _report(self, part: str) -> None:
        for source, store in zip(self.sources[part] or (), self._stores[part], strict=True):
            rank_zero_info(f"{part} data {source.name}: {store.tally}")
            if left := unused(store.tally):
                rank_zero_info(f"{part} data {source.name}: columns that are not used: {', '.join(left)}")

    def _split(self) -> None:
        stores = self._stores["train"]
        fraction = self.val_fraction if self.sources["val"] is None else 0.0
        kept, self._held_out = hold_out(
            [len(store) for store in stores], lambda: [group for store in stores for group in store.groups()], fraction
        )
        kept = self._some_kept(kept)
        kept, self._held_out = self._only_usable(kept)
        if self._sorts_by_length:
            self._check_lengths(kept)  # here once, instead of in every worker
        size = self.batch_size * self._world
        batches = self.batches_per_epoch or math.ceil(sum(map(len, kept)) / size)
        sources, timeline = self.sources["train"] or [], partial(Timeline, self.trainer, batches, size)
        self._order = order_of(sources, kept, self.seed, timeline)
        if self.trainer is not None or not self._order.begins:  # without a Trainer, phases have no length to report
            for line in report(sources, self._order, timeline):
                rank_zero_info(line)

    def _some_kept(self, kept: list[np.ndarray]) -> list[np.ndarray]:
        """Keep something to train on: hold nothing out if all examples share one prompt.

        Raises:
            ValueError: all prompts, of several, would be held out.
        """
        if not self._held_out or any(len(items) for items in kept):
            return kept
        count = len(self._held_out)
        prompts = len({self._stores["train"][s][i].group for s, i in self._held_out})
        if prompts > 1:
            raise ValueError(
                f"data.val_fraction {self.val_fraction} holds out all {prompts} prompts of the {count:,} examples, and "
                "none is left to train on: lower it, or set it to 0 and give data.val"
            )
        self._held_out = []
        rank_zero_info(
            f"all {count:,} examples have the same prompt: none is held out for validation, as no prompt is on both "
            "sides; give data.val to validate"
        )
        return [np.arange(len(store)) for store in self._stores["train"]]

    def _only_usable(self, kept: list[np.ndarray]) -> tuple[list[np.ndarray], list[Ref]]:
        """Drop items that the module cannot use, from training and from the held-out examples."""
        sources = zip(self._stores["train"], self.sources["train"] or (), strict=True)
        masks = [self.usable(store, source.name) for store, source in sources]
        kept = [items if mask is None else items[mask[items]] for items, mask in zip(kept, masks, strict=True)]
        held_out = [(s, i) for s, i in self._held_out if (mask := masks[s]) is None or mask[i]]
        return kept, held_out

    @property
    def _sorts_by_length(self) -> bool:
        """True if batches are balanced by tokens; otherwise lengths are not needed."""
        return self._world > 1 or self.micro_batch_tokens is not None

    @cached_property
    def _lengths(self) -> list[np.ndarray]:
        """Per source, the tokens of each training example."""
        return [store.lengths(self.share_prefix) for store in self._stores["train"]]

    def _check_lengths(self, kept: list[np.ndarray]) -> None:
        room = self.micro_batch_tokens or math.inf
        for s, (source, lengths) in enumerate(zip(self.sources["train"] or (), self._lengths, strict=True)):
            longest = kept[s][lengths[kept[s]].argmax()] if len(kept[s]) else None
            if longest is not None and lengths[longest] > room:
                example = self._stores["train"][s][int(longest)].example
                begin = str(self.tokenizer.decode(list(example.trunk.tokens[:24])))
                raise over_budget(source.name, begin, int(lengths[longest]), int(room), self.max_length)

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
        """Batch `number` of this rank, or a list of its micro-batches. Ranks share a global batch evenly."""
        order, size = self._training_order(), self.batch_size * self._world
        first = number * size
        if not self._sorts_by_length:
            return self.collate([self.training_item(first + i) for i in range(size)])
        lengths = [int(self._lengths[source][item]) for source, item in (order[first + i] for i in range(size))]
        split = balance(lengths, self._world)
        items = [self.training_item(first + i) for i in split[self._rank]]
        if (room := self.micro_batch_tokens) is None:
            return self.collate(items)
        # Every rank needs the same number of micro-batches: a sharded model synchronises at each.
        bins = [best_fit_decreasing([lengths[i] for i in share], room) for share in split]
        mine = split_bins(bins[self._rank], max(map(len, bins)))
        return [self.collate([items[i] for i in sorted(chosen)]) for chosen in mine]

    def _evaluation(self, part: str) -> Loader:
        if self.sources[part] is None:
            part = "val" if self.sources["val"] is not None else "train"
        stores, self.evaluated = self._stores[part], labels(self.sources[part] or ())
        refs = self._held_out if part == "train" else self._usable_refs(stores, part)
        if not refs:
            raise ValueError(
                f"there are no examples to evaluate: raise val_fraction, which is {self.val_fraction}, or give `{part}`"
                if part == "train"
                else f"there are no examples in the {part} sources: the counts above say what happened to the rows"
            )
        return self._evaluating(stores, refs)

    def _usable_refs(self, stores: Sequence[Store], part: str) -> list[Ref]:
        sources = zip(stores, self.sources[part] or (), strict=True)
        masks = [self.usable(store, source.name) for store, source in sources]
        return [(s, i) for s, i in _every(stores) if (mask := masks[s]) is None or mask[i]]

    def _evaluating(self, stores: Sequence[Store], refs: Sequence[tuple[int, int]]) -> Loader:
        """Loader of this rank's part of the examples to evaluate."""
        if len(refs) < self._world:
            raise ValueError(f"{len(refs)} examples to evaluate are too few for {self._world} processes")
        mine = evaluation_batches(len(refs), self._rank, self._world, self.val_batch_size)

        def batch(number: int) -> Any:
            chosen = [refs[n] for n in mine[number]]
            made = self.collate([stores[s][i] for s, i in chosen])
            origins = torch.tensor([s for s, _ in chosen])
            return made._replace(origin_E=origins) if isinstance(made, PackedBatch) else made

        return Loader(batch, len(mine), self.num_workers)


def _every(stores: Sequence[Store]) -> list[Ref]:
    return [(s, i) for s, store in enumerate(stores) for i in range(len(store))]

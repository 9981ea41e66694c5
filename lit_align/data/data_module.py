"""What the three data modules share: sources, tokenising, splitting, order, batches."""

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
    """Base of the data modules: a subclass says what a row becomes (`encode`) and what a batch is (`collate`).

    Args:
        tokenizer: hub name or folder of the model whose tokenizer to use; from Python also a tokenizer.
        train: sources to train on, mixed by their weights.
        val: sources to validate on; null to hold out `val_fraction` of the training prompts.
        test: sources of `lit-align test`; null for those of validation.
        predict: sources of `lit-align predict`; null for those of validation.
        val_fraction: share of the prompts held out when `val` is null. No prompt is on both sides.
        batch_size: examples per micro-batch and device.
        val_batch_size: the same for evaluation; null for `batch_size`.
        max_length: tokens of a sequence, prompt included; longer ones are truncated, and counted.
        truncate: cut the beginning of the prompt, the end of the answer, or never (then it is a bad row).
        chat_template: null for the tokenizer's own; or a template by name (qwen3, chatml, llama3, gemma, mistral,
            phi3, zephyr), a file, or Jinja text.
        template: auto makes a prompt that is plain text one user's turn of a model that has a chat template; none
            leaves it as text.
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

    # What a subclass says.

    encoding: Mapping[str, Any] = {}  # options of its own that `encode` depends on: part of the cache's key

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """Tokenise a row of the one schema; raise BadField where it does not fit this kind of data."""
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> Any:
        """A batch from items."""
        raise NotImplementedError

    def usable(self, store: Store, name: str) -> np.ndarray | None:
        """Which items of a source the module can use, true or false for each; None for all."""
        return None

    @property
    def consumer(self) -> Any:
        """The module that takes the batches; None where it is not known."""
        return getattr(self.trainer, "lightning_module", None) or self.module

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
        return self._evaluating(stores, _every(stores))

    def state_dict(self) -> dict[str, Any]:
        """How many batches training has taken; and where its phases begin, if it has any."""
        phases = {"phases": list(self._order.begins)} if self._order is not None and self._order.begins else {}
        return {"batches": self.position.batches, **phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; refuse phases that have moved."""
        if self._order is not None:
            check_resumed(self._order, state_dict.get("phases", []))
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
            {"part": part, "name": source.name, **store.described()}
            for part, stores in self._stores.items()
            for source, store in zip(self.sources[part] or (), stores, strict=True)
        ]

    def training_items(self, limit: int) -> list[Item]:
        """The first examples that training will see."""
        return [self.training_item(n) for n in range(min(limit, len(self._training_order())))]

    def training_item(self, number: int) -> Item:
        """An example of training by its place in the order, which has no end."""
        source, item = self._training_order()[number]
        return self._stores["train"][source][item]

    def longest_item(self) -> Item:
        """The training example with the most tokens, all its answers counted."""
        sources = enumerate(self._training_order().sources)
        longest = [(s, int(items[self._lengths[s][items].argmax()])) for s, items in sources if len(items)]
        store, item = max(longest, key=lambda ref: self._lengths[ref[0]][ref[1]])
        return self._stores["train"][store][item]

    answered = False  # whether answers are sampled behind what the items hold

    def longest_sequences(self) -> list[tuple[str, int, bool]]:
        """Of each source that is set up: its name, the tokens of its longest sequence, whether answers follow it."""
        return [(name, store.longest_sequence(), self.answered) for name, store in self._named_stores()]

    def largest_tokens(self) -> list[tuple[str, int]]:
        """Of each source that is set up: its name, and the largest token id in it."""
        return [(name, store.largest_token()) for name, store in self._named_stores()]

    def unusual(self, model: str) -> list[str]:
        """Where prompts are written in two languages, here or between this stage and that of a model's folder."""
        return differs_from_before(self, model)

    def _named_stores(self) -> list[tuple[str, Store]]:
        parts = self._stores.items()
        pairs = (zip(self.sources[part] or (), stores, strict=True) for part, stores in parts)
        return [(source.name, store) for pair in pairs for source, store in pair]

    def shared_prompts(self) -> int:
        """Prompts of the `val` sources that are trained on, too."""
        train, val = ({g for store in self._stores.get(part, []) for g in store.groups()} for part in ("train", "val"))
        return len(train & val)

    def stores(self, part: str) -> list[Store]:
        """The tokenised sources of train, val, test or predict, once they are set up."""
        return self._stores[part]

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Lay examples out in rows, as this data module's options say."""
        return pack(examples, self.row_tokens, self.share_prefix, self.packing)

    @property
    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that goes with the trained model: without the plain template if no row was written by it."""
        tokenizer, stores = self.tokenizer, self._stores.get("train", [])
        if self._encoder().written.chat or any(store.tally.languages["plain template"] for store in stores):
            return tokenizer
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = None
        return plain

    def _write_down(self, prompt: str | Messages, tally: Tally) -> None:
        tally.write_down(self._encoder().written(prompt)[0])

    def _encoder(self) -> ChatEncoder:
        # What the model in training gets rows for; it is not attached to what is only looked at.
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
            self._check_lengths(kept)  # now, and not in every worker
        size = self.batch_size * self._world
        batches = self.batches_per_epoch or math.ceil(sum(map(len, kept)) / size)
        sources, timeline = self.sources["train"] or [], partial(Timeline, self.trainer, batches, size)
        self._order = order_of(sources, kept, self.seed, timeline)
        if self.trainer is not None or not self._order.begins:  # whose phases are those of no training
            for line in report(sources, self._order, timeline):
                rank_zero_info(line)

    def _some_kept(self, kept: list[np.ndarray]) -> list[np.ndarray]:
        """Do not hold out everything.

        Raises:
            ValueError: every prompt of several is held out.
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
        """Of the items to train on and of those held out the ones that the module can use."""
        sources = zip(self._stores["train"], self.sources["train"] or (), strict=True)
        masks = [self.usable(store, source.name) for store, source in sources]
        kept = [items if mask is None else items[mask[items]] for items, mask in zip(kept, masks, strict=True)]
        held_out = [(s, i) for s, i in self._held_out if (mask := masks[s]) is None or mask[i]]
        return kept, held_out

    @property
    def _sorts_by_length(self) -> bool:
        """Whether batches are shared out by tokens; otherwise nobody needs to know them."""
        return self._world > 1 or self.micro_batch_tokens is not None

    @cached_property
    def _lengths(self) -> list[np.ndarray]:
        """Tokens of each training example, of each source."""
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
        """The number-th batch of this rank, or a list of its micro-batches: ranks share one global batch evenly."""
        order, size = self._training_order(), self.batch_size * self._world
        first = number * size
        if not self._sorts_by_length:
            return self.collate([self.training_item(first + i) for i in range(size)])
        lengths = [int(self._lengths[source][item]) for source, item in (order[first + i] for i in range(size))]
        split = balance(lengths, self._world)
        items = [self.training_item(first + i) for i in split[self._rank]]
        if (room := self.micro_batch_tokens) is None:
            return self.collate(items)
        # As many micro-batches on every process: a model that is spread over them waits for all at each.
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
        """This rank's part of examples that are looked at once."""
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

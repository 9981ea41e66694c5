import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data.chats import scratch
from transformers import AutoTokenizer

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.rows import BadRow, Rows
from lit_align.data.source import Source
from lit_align.data.store import Store, items_folder


@pytest.fixture
def prompts(write, tokenizer_folder: str):
    """A data module of prompts that are numbers, which makes batches easy to read."""

    def made(count: int = 10, **options) -> PromptDataModule:
        train = options.pop("train", None) or [numbers(count)]
        return PromptDataModule(tokenizer_folder, train, **{"batch_size": 3, "val_fraction": 0.0, **options})

    def numbers(count: int, first: int = 0, **source) -> Source:
        rows = [{"prompt": str(n)} for n in range(first, first + count)]
        return Source(write(f"{first}-{count}.jsonl", rows), **source)

    made.numbers = numbers
    return made


def read(batches) -> list[list[int]]:
    return [[int(row["prompt"]) for row in batch.rows] for batch in batches]


def epoch(data: PromptDataModule) -> list[list[int]]:
    return read(data.train_dataloader())


def ready(data: PromptDataModule, stage: str = "fit") -> PromptDataModule:
    data.prepare_data()
    data.setup(stage)
    return data


def test_an_epoch_takes_every_example_once_and_fills_its_last_batch_from_the_next(prompts) -> None:
    data = ready(prompts(10))
    assert len(data.train_dataloader()) == 4
    first, second, third = epoch(data), epoch(data), epoch(data)
    stream = [n for batch in first + second + third for n in batch]
    assert [len(batch) for batch in first] == [3, 3, 3, 3]
    for start in (0, 10, 20):
        assert sorted(stream[start : start + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert ready(prompts(10)).position.batches == 0
    assert epoch(ready(prompts(10))) == first
    assert epoch(ready(prompts(10, seed=1))) != first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 3, 5])
def test_resumed_is_as_uninterrupted(prompts, taken: int, num_workers: int) -> None:
    straight = ready(prompts(10, num_workers=num_workers))
    expected = [batch for _ in range(3) for batch in epoch(straight)]
    data = ready(prompts(10, num_workers=num_workers))
    stream = itertools.chain.from_iterable(data.train_dataloader() for _ in range(2))
    seen = read(itertools.islice(stream, taken))
    state = json.loads(json.dumps(data.state_dict()))
    again = ready(prompts(10, num_workers=num_workers))
    again.load_state_dict(state)
    assert seen + epoch(again) == expected[: taken + 4]


def test_the_global_random_state_is_left_alone(prompts) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    epoch(ready(prompts(10, num_workers=2)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_global_batch(prompts, world: int) -> None:
    alone = ready(prompts(10, batch_size=6))
    parts = []
    for rank in range(world):
        data = ready(prompts(10, batch_size=6 // world))
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        parts.append(epoch(data))
        assert len(parts[rank]) == 2
    # However many processes, the same examples make one optimizer step.
    together = [sorted(n for part in batch for n in part) for batch in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in epoch(alone)]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 7, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_evaluate_everything_once_in_as_many_batches(prompts, count: int, world: int, size: int) -> None:
    held = [prompts.numbers(count)] if count else None
    fraction = 0.3 if count else 0.0
    seen = []
    for rank in range(world):
        data = ready(prompts(4, val=held, val_fraction=fraction, val_batch_size=size))
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank, state=SimpleNamespace(fn="validate"))
        if count < world:
            says = f"{count} examples to evaluate are too few for {world}" if count else "there are no examples to eval"
            with pytest.raises(ValueError, match=says):
                data.val_dataloader()
            return
        loader = data.val_dataloader()
        seen.append(read(loader))
        assert len(loader) == len(seen[-1])
        assert read(loader) == seen[-1]
    assert sorted(n for batches in seen for batch in batches for n in batch) == list(range(count))
    assert len({len(batches) for batches in seen}) == 1, "one process would wait for the others for ever"
    sizes = [len(batch) for batches in seen for batch in batches]
    assert all(1 <= length <= max(size, 2) for length in sizes)
    assert size == 1 or max(sizes, default=0) <= size


def test_validation_is_split_off_by_prompt(write, tokenizer_folder: str) -> None:
    rows = [{"instruction": f"p{i % 20}", "output": f"{'x' * i}"} for i in range(1, 61)]  # three answers to each
    sources = [Source(write("a.json", rows[:40])), Source(write("b.json", rows[40:]))]
    data = InstructionDataModule(tokenizer_folder, sources, val_fraction=0.1, batch_size=1)
    data.setup("fit")

    def prompts_of(loader) -> list[str]:
        return [data.tokenizer.decode(b.tokens_RN[0]).split("<assistant>")[0] for b in loader]

    train, val = prompts_of(data.train_dataloader()), prompts_of(data.val_dataloader())
    assert len(train) + len(val) == 60
    assert set(Counter(val).values()) == {3}
    assert not set(train) & set(val)
    # The same prompts are held out whatever seed, batch size and kind of data.
    other = InstructionDataModule(tokenizer_folder, sources[::-1], val_fraction=0.1, batch_size=1, seed=9)
    other.setup("validate")
    assert set(prompts_of(other.val_dataloader())) == set(val)


def test_weights_mix_sources(prompts) -> None:
    train = [prompts.numbers(4, 0, weight=3.0), prompts.numbers(12, 100, weight=1.0)]
    data = ready(prompts(train=train, batch_size=4))
    for _ in range(3):
        drawn = Counter(n >= 100 for batch in epoch(data) for n in batch)
        assert drawn == {False: 12, True: 4}
    with pytest.raises(ValueError, match="give a weight to every source or to none"):
        ready(prompts(train=[prompts.numbers(4, 0, weight=3.0), prompts.numbers(4, 100)]))


def test_each_stage_tokenises_what_it_needs(prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"val": [prompts.numbers(2, 100)], "test": [prompts.numbers(3, 200)], "predict": [prompts.numbers(4, 300)]}

    def loaded(stage: str, *names: str) -> tuple[set[str], list[int]]:
        data = prompts(5, cache_dir="none", val_fraction=0.4, **{name: parts[name] for name in names})
        data.setup(stage)
        loader = {"fit": data.val_dataloader, "validate": data.val_dataloader}.get(stage) or getattr(
            data, f"{stage}_dataloader"
        )
        return set(data._stores), sorted(n for batch in read(loader()) for n in batch)

    held = loaded("validate")[1]
    assert held
    assert set(held) < set(range(5))
    assert loaded("fit") == ({"train"}, held)
    assert loaded("fit", "val", "test") == ({"train", "val"}, [100, 101])
    assert loaded("validate", "val") == ({"val"}, [100, 101])
    assert loaded("test") == ({"train"}, held)
    assert loaded("test", "val") == ({"val"}, [100, 101])
    assert loaded("test", "val", "test") == ({"test"}, [200, 201, 202])
    assert loaded("predict", "test", "predict") == ({"predict"}, [300, 301, 302, 303])
    assert loaded("predict", "test") == ({"train"}, held)


def test_all_stages_in_a_row(prompts) -> None:
    data = prompts(10, val_fraction=0.3, batch_size=1, test=[prompts.numbers(3, 200)])
    data.prepare_data()
    for stage in ("validate", "fit", "test", "predict", "fit"):
        data.setup(stage)
    assert sorted(n for batch in read(data.predict_dataloader()) for n in batch) == sorted(
        n for batch in read(data.val_dataloader()) for n in batch
    )
    assert len(epoch(data)) + len(data.val_dataloader()) == 10
    assert len(data.test_dataloader()) == 3


def test_tokenised_once_and_kept(prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = PromptDataModule.encode
    monkeypatch.setattr(
        PromptDataModule, "encode", lambda self, row, tally: encoded.append(1) or encode(self, row, tally)
    )
    first = epoch(ready(prompts(10)))
    assert len(encoded) == 10  # prepare_data; setup finds it
    assert epoch(ready(prompts(10, seed=0, batch_size=3))) == first
    for layout in ({"batch_size": 5}, {"seed": 3}, {"packing": False}, {"share_prefix": False}, {"row_tokens": 9}):
        ready(prompts(10, **layout))
    assert len(encoded) == 10
    for n, options in enumerate(
        [{"max_length": 9}, {"truncate": "answer"}, {"turns": "last"}, {"on_bad_row": "skip"}, {"cache_dir": "none"}]
    ):
        ready(prompts(10, **options))
        assert len(encoded) == 20 + 10 * n, options
    template = scratch().chat_template + "{# another #}"
    ready(prompts(10, chat_template=template))
    assert len(encoded) == 70


def test_two_kinds_of_data_do_not_share_a_cache(write, tokenizer_folder: str) -> None:
    source = Source(write("x.jsonl", [{"instruction": "a", "output": "b"}]))
    prints = set()
    for kind in (InstructionDataModule, PromptDataModule):
        data = kind(tokenizer_folder, [source], val_fraction=0.0)
        data.setup("fit")
        prints.add(data.manifest()[0]["fingerprint"])
    assert len(prints) == 2


class Unknown(Rows):
    read = 0

    def __iter__(self):
        Unknown.read += 1
        yield {"prompt": "1"}


def test_rows_that_cannot_be_cached_are_tokenised_once_a_process(prompts) -> None:
    Unknown.read = 0
    data = ready(prompts(train=[Source(rows=Unknown())]))
    assert epoch(data) == [[1, 1, 1]]
    assert Unknown.read == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path))
    assert items_folder(None) == tmp_path / "data"
    monkeypatch.delenv("LIT_ALIGN_CACHE")
    assert items_folder(None) == Path.home() / ".cache" / "lit_align" / "data"
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert items_folder("${PLACE}/x") == tmp_path / "x"
    assert items_folder("none") is None


def test_what_happened_to_the_rows_is_reported(write, tokenizer_folder: str, caplog) -> None:
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "x"},
        {"prompt": "c", "chosen": "", "rejected": "x"},
        {"prompt": "d", "chosen": "x"},
        {"prompt": "long" * 20, "chosen": "x", "rejected": "y"},
    ]
    source = Source(write("x.jsonl", rows))
    options = {"val_fraction": 0.0, "max_length": 40}
    with pytest.raises(BadRow, match=r"x\.jsonl, row 4: field 'rejected' is missing"):
        PreferenceDataModule(tokenizer_folder, [source], **options).setup("fit")
    data = PreferenceDataModule(tokenizer_folder, [source], on_bad_row="skip", **options)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    (told,) = [record.getMessage() for record in caplog.records if "train data" in record.getMessage()]
    assert "5 rows" in told
    assert all(
        part in told
        for part in (
            "1 identical answers",
            "1 nothing to compare",
            "1 empty answers",
            "1 truncated",
            "1 skipped",
            "3 examples",
            "first skipped: ",
            "x.jsonl, row 4: field 'rejected' is missing",
        )
    )
    (entry,) = data.manifest()
    assert (entry["part"], entry["name"], len(entry["fingerprint"])) == ("train", source.path, 32)
    counts = {"rows": 5, "identical_answers": 1, "nothing_to_compare": 1, "empty_answers": 1, "skipped": 1}
    assert {k: v for k, v in entry["counts"].items() if v} == {**counts, "truncated": 1, "examples": 3}
    json.dumps(entry)


def test_nothing_left_to_train_on(prompts, write) -> None:
    data = prompts(train=[Source(write("x.jsonl", [{"prompt": ""}]))], on_bad_row="skip")
    data.setup("fit")
    with pytest.raises(ValueError, match="there are no training examples: see the counts above"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "must be at least 1"),
        ({"val_batch_size": 0}, "must be at least 1"),
        ({"val_batch_size": -4}, "must be at least 1"),
        ({"max_length": 1}, "max_length at least 2"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\)"),
    ],
)
def test_options_that_make_no_sense(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PromptDataModule("x", [], **options)


def test_tokenizer_and_stop_ids(prompts) -> None:
    data = prompts(2)
    assert data.tokenizer is data.tokenizer
    assert data.stop_ids == [data.tokenizer.eos_token_id]


def test_the_tokenizer_is_loaded_as_told(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, load = [], AutoTokenizer.from_pretrained

    def from_pretrained(name: str, **options: object) -> object:
        asked.append((name, options))
        return load(name)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    for options in ({"trust_remote_code": False, "revision": None}, {"trust_remote_code": True, "revision": "v2"}):
        assert PromptDataModule(tokenizer_folder, [], **options).stop_ids
        assert asked.pop() == (tokenizer_folder, options)


def test_a_long_stream_is_not_held_in_memory(prompts, tmp_path: Path) -> None:
    """Rows are tokenised as they are read, and written while others are still to come."""
    events: list[object] = []

    class Stream(Rows):
        fingerprint = "stream"

        def __iter__(self):
            for i in range(2500):
                events.append(i)
                yield {"prompt": str(i)}
            (partial,) = tmp_path.glob("*.partial")
            events.append(partial.stat().st_size)

    class Watched(PromptDataModule):
        def encode(self, row, tally):
            events.append(row["prompt"])
            return super().encode(row, tally)

    data = Watched(prompts(1).tokenizer_name, [Source(rows=Stream())], cache_dir=str(tmp_path))
    data.prepare_data()
    assert events[:4] == [0, "0", 1, "1"]
    assert events[-1] > 50_000  # bytes of the first two thousand


def demos(write, tokenizer_folder: str, **options) -> InstructionDataModule:
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 9, 3, 7, 5, 2, 8, 4)]
    return InstructionDataModule(
        tokenizer_folder, [Source(write("demos.jsonl", rows))], **{"val_fraction": 0.0, "batch_size": 8, **options}
    )


@pytest.mark.parametrize("share_prefix", [True, False])
def test_micro_batches_hold_the_batch_within_their_budget(write, tokenizer_folder: str, share_prefix: bool) -> None:
    options = {"share_prefix": share_prefix}
    (whole,) = ready(demos(write, tokenizer_folder, **options)).train_dataloader()
    longest = int((whole.tree_RN == whole.tree_RN.mode().values[:, None]).sum(1).max())
    (parts,) = ready(demos(write, tokenizer_folder, micro_batch_tokens=longest + 4, **options)).train_dataloader()
    assert isinstance(parts, list)
    assert len(parts) > 2
    assert all((part.tree_RN >= 0).sum() <= longest + 4 for part in parts)
    assert sum(part.num_examples for part in parts) == whole.num_examples == 8
    assert torch.cat([part.target_S for part in parts]).sort().values.equal(whole.target_S.sort().values)
    # As few as best-fit-decreasing finds, and not one for each.
    (fewer,) = ready(demos(write, tokenizer_folder, micro_batch_tokens=10_000, **options)).train_dataloader()
    assert len(fewer) == 1


def test_an_example_above_the_budget_is_named_before_training(write, tokenizer_folder: str) -> None:
    data = demos(write, tokenizer_folder, micro_batch_tokens=6)
    data.prepare_data()
    with pytest.raises(
        ValueError, match=r"demos.jsonl: the example that begins '.*' has \d+ tokens.*micro_batch_tokens \(6\)"
    ):
        data.setup("fit")


def test_ranks_get_as_many_tokens_each(write, tokenizer_folder: str) -> None:
    tokens = []
    for rank in range(2):
        data = demos(write, tokenizer_folder, batch_size=4)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        (batch,) = ready(data).train_dataloader()
        tokens.append(int((batch.tree_RN >= 0).sum()))
    assert abs(tokens[0] - tokens[1]) <= 1


def test_nobody_counts_tokens_unless_batches_are_shared_out_by_them(
    write, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    lengths = Store.lengths
    monkeypatch.setattr(Store, "lengths", lambda self, *options: asked.append(1) or lengths(self, *options))
    data = ready(demos(write, tokenizer_folder))
    list(data.train_dataloader())
    assert not asked
    longest = data.longest_item().example.num_tokens
    assert longest == max(item.example.num_tokens for item in data.training_items(8))
    assert len(asked) == 1
    for options, world in (({"micro_batch_tokens": 100}, 1), ({"batch_size": 4}, 2)):
        data = demos(write, tokenizer_folder, **options)
        data.trainer = SimpleNamespace(world_size=world, global_rank=0)
        before = len(asked)
        ready(data)
        assert len(asked) == before + 1, "in setup, and not in every worker"
        list(data.train_dataloader())
        assert len(asked) == before + 1


def test_the_longest_example_of_several_sources(write, tokenizer_folder: str) -> None:
    def source(name: str, *lengths: int) -> Source:
        return Source(write(name, [{"prompt": name, "completion": "b" * n} for n in lengths]))

    sources = [source("a.jsonl", 3, 9, 2), source("b.jsonl", 4, 30, 30, 1), source("c.jsonl", 20)]
    data = ready(InstructionDataModule(tokenizer_folder, sources, val_fraction=0.0))
    assert data.tokenizer.decode(data.longest_item().example.trunk.tokens).count("b" * 30) == 1
    # Of the examples that are trained on, not of those held out.
    rows = [{"prompt": str(n), "completion": "b" * n} for n in range(1, 40)]
    data = ready(InstructionDataModule(tokenizer_folder, [Source(write("d.jsonl", rows))], val_fraction=0.5))
    trained = [item.example.num_tokens for item in data.training_items(100)]
    assert len(trained) < 39
    assert data.longest_item().example.num_tokens == max(trained)


# Killed: each process makes as few micro-batches as its own examples need.
def test_ranks_get_as_many_micro_batches_each(write, tokenizer_folder: str) -> None:
    for room in range(20, 60, 3):
        parts = []
        for rank in range(3):
            data = demos(write, tokenizer_folder, batch_size=4, micro_batch_tokens=room)
            data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
            parts.append(next(iter(ready(data).train_dataloader())))
        assert len({len(part) for part in parts}) == 1, room
        assert sum(batch.num_examples for part in parts for batch in part) == 12


def test_every_example_is_shared_out_in_as_many_batches(prompts) -> None:
    seen = []
    for rank in range(2):
        data = prompts(9, val=[prompts.numbers(4, first=20)], val_batch_size=2)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        seen.append(read(ready(data).every_example()))
    assert len(seen[0]) == len(seen[1])
    numbers = [n for batches in seen for batch in batches for n in batch]
    assert sorted(numbers) == [*range(9), *range(20, 24)]

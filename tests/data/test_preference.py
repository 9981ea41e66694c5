import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.chats import TOKENIZERS, decoded, show_tree
from data.fuzz import fuzz
from data.golden import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.chat import ChatEncoder
from lit_align.data.formats import FORMATS
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.rows import BadField, Tally
from lit_align.data.source import Source
from lit_align.types import PackedBatch


def module(name: str = "scratch", **options) -> PreferenceDataModule:
    made = PreferenceDataModule("unused", [], cache_dir="none", **options)
    made.encoder = ChatEncoder(TOKENIZERS[name]())
    return made


def ranking(*answers: str, **fields) -> dict:
    return {"prompt": "p", "completions": list(answers), "ranks": [float(k) for k in range(len(answers))], **fields}


# Trunk, then the answers; [[what is scored]].
SCRATCH = {
    "pairs": ["<bos>Hi", "[[Yo<eos>]]", "[[<eos>]]"],
    "pairs with a margin": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "unpaired": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]"],
    "pairs, sampled": ["<bos><user> Hi <assistant>", "[[ Yo ]]", "[[ No <eos>]]"],
    "pairs, somebody's column of that name": ["<bos>Hi", "[[Yo<eos>]]", "[[No<eos>]]"],
    "pairs, Alpaca's columns": ["<bos><user> Hi\n\nx <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "pairs, explicit conversational": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "pairs, implicit prompt": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "pairs, UltraFeedback": [
        "<bos><user> Hi <assistant> Yo <eos><user> Well? <assistant>",
        "[[ Yo <eos>]]",
        "[[ No <eos>]]",
    ],
    "pairs, answers as turns": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "hh": ["<bos><user> Hi <assistant> Yo <eos><user> Well? <assistant>", "[[ Yo <eos>]]", "[[  <eos>]]"],
    "nectar": [
        "<bos><user> Hi <assistant> Yo <eos><user> Well? <assistant>",
        "[[ Yo <eos>]]",
        "[[ No <eos>]]",
        "[[ Ha <eos>]]",
    ],
    "oasst": ["<bos><user> Hi <assistant> Yo <eos><user> Well? <assistant>", "[[ a <eos>]]", "[[ b <eos>]]"],
    "pair_labels": ["<bos><user> Hi <assistant>", "[[ 1 <eos>]]", "[[ 2 <eos>]]", "[[ 3 <eos>]]", "[[ 4 <eos>]]"],
    "rankings": ["<bos>Hi", "[[a<eos>]]", "[[b<eos>]]", "[[c<eos>]]"],
    "rankings with all there is": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ b ]]"],
    "rankings of three people": ["<bos>Hi", "[[a<eos>]]", "[[b<eos>]]", "[[c<eos>]]"],
    "rankings told by shares": ["<bos>Hi", "[[a<eos>]]", "[[b<eos>]]", "[[c<eos>]]"],
    "rankings told by scores": ["<bos>Hi", "[[a<eos>]]", "[[b<eos>]]", "[[c<eos>]]"],
    "pairs with a share and scores": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]", "[[ No <eos>]]"],
    "grades": ["<bos><user> Hi <assistant>", "[[ Yo <eos>]]"],
    "choices": [
        "<bos><user> Hi\nA. a\nB. b\nC. \nD. d <assistant>",
        *(f"[[ {letter} <eos>]]" for letter in "ABCD"),
    ],
}
CHATML = {
    "hh": [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n",
        "[[Yo<|im_end|>]]",
        "[[<|im_end|>]]",
    ],
    "rankings with all there is": [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "[[Yo<|im_end|>]]",
        "[[b]]",
    ],
}


@pytest.mark.parametrize(
    ("template", "kind", "expected"),
    [("scratch", *case) for case in SCRATCH.items()] + [("chatml", *case) for case in CHATML.items()],
)
def test_golden_tokens(template: str, kind: str, expected: list[str]) -> None:
    format, raw, rows = GOLDEN[kind]
    data = module(template, keep_ties=True)
    (item,) = data.encode(FORMATS[format](raw)[0], Tally())
    assert show_tree(data.tokenizer, item.example) == expected
    assert item.ranks == rows[0]["ranks"]
    assert item.margins == rows[0].get("margins", [0.0] * len(item.ranks))
    assert (item.shares, item.grades) == (rows[0].get("shares", []), rows[0].get("scores", []))


def test_every_ranked_format_has_golden_tokens() -> None:
    assert set(SCRATCH) == {kind for kind, (_, _, rows) in GOLDEN.items() if "ranks" in rows[0]}


@pytest.mark.parametrize("template", TOKENIZERS)
def test_stop_token_is_learnt_in_every_template(template: str) -> None:
    data = module(template)
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        (item,) = data.encode({"prompt": prompt, "completions": ["Yo", ""], "ranks": [0.0, 1.0]}, Tally())
        for tokens, scored in item.example.branches:
            assert tokens[-1] in data.stop_ids
            assert all(scored)
            assert sum(tokens.count(stop) for stop in data.stop_ids) == 1


def test_identical_answers_are_merged_and_their_ranks_averaged() -> None:
    tally = Tally()
    data = module()
    row = ranking("a", "b", "a", "c", "b", "a", margins=[6.0, 5.0, 3.0, 1.0, 0.0, 0.0])
    (item,) = data.encode(row, tally)
    assert show_tree(data.tokenizer, item.example)[1:] == ["[[a<eos>]]", "[[b<eos>]]", "[[c<eos>]]"]
    assert item.ranks == [(0 + 2 + 5) / 3, (1 + 4) / 2, 3]
    assert item.margins == [3.0, 2.5, 1.0]
    assert tally == Counter({"identical_answers": 3})


def test_finished_answers_are_not_merged_with_cut_ones() -> None:
    data = module()
    (item,) = data.encode(ranking("a", "a", "a", ranks=[0.0, 1.0, 4.0], finished=[True, False, True]), Tally())
    assert show_tree(data.tokenizer, item.example)[1:] == ["[[a<eos>]]", "[[a]]"]
    assert item.ranks == [2.0, 1.0]


def test_answers_that_the_template_makes_identical_are_merged() -> None:
    tally = Tally()
    prompt = [{"role": "user", "content": "Hi"}]
    assert module("llama3").encode(ranking("Yo", " Yo\n", prompt=prompt), tally) == []  # its template trims
    assert tally == Counter({"identical_answers": 1, "nothing_to_compare": 1})


def test_answers_that_truncation_makes_identical_are_merged() -> None:
    tally = Tally()
    data = module(max_length=5, truncate="answer")
    (item,) = data.encode(ranking("abcd", "abce", "xyzw"), tally)
    assert show_tree(data.tokenizer, item.example) == ["<bos>p", "[[abc]]", "[[xyz]]"]
    assert item.ranks == [0.5, 2.0]
    assert data.encode(ranking("abcd", "abce"), tally) == []
    assert tally == Counter({"truncated": 2, "identical_answers": 2, "nothing_to_compare": 1})


@pytest.mark.parametrize(
    ("row", "fate"),
    [
        (ranking("a", "a"), {"identical_answers": 1, "nothing_to_compare": 1}),
        (ranking("a", "b", ranks=[1.0, 1.0]), {"nothing_to_compare": 1}),
        (ranking("a", "b", "a", "b", ranks=[0.0, 1.0, 2.0, 1.0]), {"identical_answers": 2, "nothing_to_compare": 1}),
    ],
)
def test_nothing_to_compare_is_dropped_and_counted(row: dict, fate: dict) -> None:
    tally = Tally()
    assert module().encode(row, tally) == []
    assert tally == Counter(fate)


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (ranking("a", "b", ranks=[1.0, 1.0]), True),
        (ranking("a", "b", ranks=[1.0, 1.0], scores=[2.0, 2.0]), True),
        (ranking("a", "b", ranks=[0.5, 0.5], shares=[0.5]), True),
        (ranking("a", scores=[2.0]), True),
        (ranking("a", "a", scores=[2.0, 1.0]), True),
        (ranking("a", "a"), False),
    ],
)
def test_ties_that_are_kept(row: dict, kept: bool) -> None:
    assert bool(module(keep_ties=True).encode(row, Tally())) == kept
    assert module().encode(row, Tally()) == []


# Kills: shares of merged answers not turned where the order turns; scores and shares left as they are.
def test_shares_and_scores_of_identical_answers_are_averaged() -> None:
    row = ranking("a", "b", "a", ranks=[0.0, 1.0, 3.0], scores=[3.0, 5.0, 2.0], shares=[0.75, 1.0, 0.0])
    (item,) = module().encode(row, Tally())
    # a is preferred to b by 0.75 the first time; the second time b is by 0.
    assert item.shares == [(0.75 + 1.0) / 2]
    assert item.grades == [2.5, 5.0]


def test_shares_and_scores_are_nan_where_a_row_has_none(write, tokenizer_folder: str) -> None:
    rows = [
        {"prompt": "a", "completions": ["x", "y", "z"], "ranks": [0, 1, 2]},
        {"prompt": "b", "completions": ["x", "y", "z"], "ranks": [[0, 1, 2], [1, 0, 2]]},
        {"prompt": "c", "completions": ["x", "y"], "scores": [1, 2]},
    ]

    def batch(*chosen: int):
        source = Source(write("r.json", [rows[i] for i in chosen]), format="rankings")
        data = PreferenceDataModule(tokenizer_folder, [source], val=[source])
        data.setup("validate")
        (made,) = data.val_dataloader()
        return made

    mixed = batch(0, 1, 2)
    torch.testing.assert_close(
        mixed.share_P, torch.tensor([torch.nan] * 3 + [0.5, 1.0, 1.0] + [torch.nan]), equal_nan=True
    )
    torch.testing.assert_close(mixed.grade_Q, torch.tensor([torch.nan] * 6 + [1.0, 2.0]), equal_nan=True)
    plain = batch(0)
    assert plain.share_P is None
    assert plain.grade_Q is None


def test_kept_ties_are_another_cache(write, tokenizer_folder: str) -> None:
    source = Source(write("r.json", [{"prompt": "a", "completions": ["x", "y"], "ranks": [0, 0]}] * 2))
    counts = []
    for keep in (False, True, False):
        data = PreferenceDataModule(tokenizer_folder, [source], val=[source], keep_ties=keep)
        data.prepare_data()
        data.setup("validate")
        counts.append(len(data._stores["val"][0]))
    assert counts == [0, 2, 0]


def test_ties_and_empty_answers_are_kept_and_counted() -> None:
    tally = Tally()
    (item,) = module().encode(ranking("a", "", "c", " ", ranks=[0.0, 1.0, 1.0, 1.0]), tally)
    assert item.ranks == [0.0, 1.0, 1.0, 1.0]
    assert tally == Counter({"ties": 2, "empty_answers": 2})


@pytest.mark.parametrize("kind", ["alpaca", "messages", "prompts", "text", "answers"])
def test_rows_that_rank_nothing(kind: str) -> None:
    format, raw, _ = GOLDEN[kind]
    with pytest.raises(BadField, match="has no ranked answers: expected chosen and rejected, or completions and ranks"):
        module().encode(FORMATS[format](raw)[0], Tally())


def test_prompt_is_cut_from_the_left_and_answers_as_little_as_possible() -> None:
    tally = Tally()
    data = module(max_length=8)
    (item,) = data.encode(ranking("ab", "cdef", prompt="uvwxyz"), tally)
    assert show_tree(data.tokenizer, item.example) == ["<bos>yz", "[[ab<eos>]]", "[[cdef<eos>]]"]
    assert tally["truncated"] == 1


def test_ranks_margins_and_answers_stay_together_in_the_batch(write, tokenizer_folder: str) -> None:
    raw = [
        {
            "prompt": "a" * 9,
            "completions": ["good", "bad", "good", "worse"],
            "ranks": [0, 1, 2, 3],
            "margins": [4, 3, 2, 1],
        },
        {"prompt": "b", "completions": ["bad", "good" * 4], "ranks": [1, 0], "margins": [-1, 7]},
        {"prompt": "c" * 3, "chosen": "", "rejected": "bad", "margin": 0.5},
        {"prompt": "d" * 5, "completions": ["x", "y", "z"], "ranks": [2, 2, 0], "finished": [True, False, True]},
    ]
    # Two formats are two sources.
    sources = [Source(write("k.json", [raw[0], raw[1], raw[3]])), Source(write("p.json", [raw[2]]))]
    told = {
        ("a" * 9, "good<eos>"): (1.0, 3.0),
        ("a" * 9, "bad<eos>"): (1.0, 3.0),
        ("a" * 9, "worse<eos>"): (3.0, 1.0),
        ("b", "bad<eos>"): (1.0, -1.0),
        ("b", "good" * 4 + "<eos>"): (0.0, 7.0),
        ("c" * 3, "<eos>"): (0.0, 0.5),
        ("c" * 3, "bad<eos>"): (1.0, 0.0),
        ("d" * 5, "x<eos>"): (2.0, 0.0),
        ("d" * 5, "y"): (2.0, 0.0),
        ("d" * 5, "z<eos>"): (0.0, 0.0),
    }
    for layout in ({}, {"share_prefix": False}, {"packing": False}, {"row_tokens": 64}):
        data = PreferenceDataModule(
            tokenizer_folder, sources, batch_size=4, template="none", val_fraction=0.0, **layout
        )
        data.setup("fit")
        (batch,) = data.train_dataloader()
        packed = batch.packed
        assert packed.num_examples == 4
        assert len(batch.rank_Q) == len(batch.margin_Q) == packed.num_sequences == 10
        assert batch.rank_Q.dtype == batch.margin_Q.dtype == torch.float32
        flat = packed.tokens_RN.flatten()
        found = {}
        for q in range(10):
            of = packed.sequence_S == q
            answer = decoded(data.tokenizer, packed.target_S[of].tolist())
            first = int(packed.source_S[of][0])  # the last token of the prompt tells which
            prompt = decoded(data.tokenizer, [int(flat[first])])
            (whole,) = {text for text, _ in told if text[0] == prompt}
            found[whole, answer] = (float(batch.rank_Q[q]), float(batch.margin_Q[q]))
        assert found == told


def scored(data: PreferenceDataModule, packed: PackedBatch) -> list[tuple[str, str]]:
    """Of each sequence the prompt's last token and the answer."""
    flat, found = packed.tokens_RN.flatten(), []
    for q in range(packed.num_sequences):
        of = packed.sequence_S == q
        last = int(flat[int(packed.source_S[of][0])])
        found.append((decoded(data.tokenizer, [last]), decoded(data.tokenizer, packed.target_S[of].tolist())))
    return found


# Kills: the next example whatever its prompt; cycled within a batch, a micro-batch or a process; not cut to max_length.
@pytest.mark.parametrize(
    ("options", "world"), [({}, 1), ({"batch_size": 7}, 1), ({"micro_batch_tokens": 20}, 1), ({"batch_size": 2}, 2)]
)
def test_answers_to_another_prompt_do_not_depend_on_the_batches(
    options: dict[str, Any], world: int, write, tokenizer_folder: str
) -> None:
    rows = [{"prompt": x * 6, "chosen": x.upper(), "rejected": x.upper() * 2} for x in "abcd"]
    rows += [{"prompt": "g", "chosen": "G" * n, "rejected": "G" * (n + 1)} for n in (3, 4, 5, 6)]
    source = Source(write("rows.json", rows))

    def pairs(options: dict[str, Any], world: int) -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        for rank in range(world):
            data = PreferenceDataModule(tokenizer_folder, [source], val_fraction=0.0, max_length=10, **options)
            data.mismatched = True
            if world > 1:
                data.trainer = SimpleNamespace(world_size=world, global_rank=rank, overfit_batches=0)
            data.setup("fit")
            for batches in itertools.islice(data.train_dataloader(), 8 // world):
                for batch in batches if isinstance(batches, list) else [batches]:
                    assert int(batch.mismatched.positions_RN.max()) < 10
                    found.update(scored(data, batch.mismatched))
        return found

    first = pairs({"batch_size": 8}, 1)
    assert first.total() == 16
    assert all(prompt.upper() not in answer for prompt, answer in first)
    assert first <= pairs(options, world)


def test_one_prompt_has_no_other(write, tokenizer_folder: str) -> None:
    source = Source(write("one.json", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    data = PreferenceDataModule(tokenizer_folder, [source], val_fraction=0.0, batch_size=1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.mismatched is None
    data.mismatched = True
    with pytest.raises(ValueError, match="the training data has one prompt"):
        next(iter(data.train_dataloader()))


@fuzz
@given(
    st.lists(st.tuples(st.text("ab", max_size=6), st.integers(0, 3), st.booleans()), min_size=2, max_size=6),
    st.text("pq", min_size=1, max_size=12),
    st.integers(3, 14),
    st.sampled_from(["prompt", "answer"]),
)
def test_whatever_comes_out_can_be_learnt_from(answers: list, prompt: str, max_length: int, truncate: str) -> None:
    texts, ranks, finished = zip(*answers, strict=True)
    row = {"prompt": prompt, "completions": list(texts), "ranks": [float(r) for r in ranks], "finished": list(finished)}
    tally = Tally()
    try:
        items = SHARED[truncate, max_length].encode(row, tally)
    except BadField:
        assert truncate == "answer"
        assert len(prompt) + 1 >= max_length
        return
    assert len(items) + tally["nothing_to_compare"] == 1
    for example, ranks_kept, margins, *_ in items:
        branches = [tuple(branch.tokens) for branch in example.branches]
        assert len(branches) == len(set(branches)) == len(ranks_kept) == len(margins) >= 2
        assert len(set(ranks_kept)) >= 2
        assert min(map(len, branches)) >= 1
        assert len(example.trunk.tokens) + max(map(len, branches)) <= max_length
        assert all(all(branch.scored) for branch in example.branches)
        assert sum(ranks_kept) >= 0


SHARED = {(how, n): module(max_length=n, truncate=how) for how in ("prompt", "answer") for n in range(3, 15)}

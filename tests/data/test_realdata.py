"""Every file of the shared data: how many rows it has, and what becomes of each."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from data.chats import plain, show, show_tree

from lit_align.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from lit_align.data.chat import ChatEncoder
from lit_align.data.rows import Tally
from lit_align.data.source import Source

pytestmark = pytest.mark.realdata

MMLU = ["question", "A", "B", "C", "D", "answer"]
# File, options of the source, rows of the file, rows of the one schema.
FILES = {
    "rasbt/instructions.json": ({}, 1100, 1100),
    "rasbt/preferences.json": ({}, 1100, 1100),
    "gsm8k/train.jsonl": ({"columns": {"instruction": "question", "output": "answer"}}, 7473, 7473),
    "gsm8k/test.jsonl": ({"format": "questions", "columns": {"prompt": "question", "reference": "answer"}}, 1319, 1319),
    "gsm8k/example_model_solutions.jsonl": (
        {"format": "questions", "columns": {"prompt": "question", "reference": "ground_truth"}},
        1319,
        1319,
    ),
    "self_instruct/seed_tasks.jsonl": ({}, 175, 175),
    "self_instruct/user_oriented_instructions.jsonl": ({}, 252, 252),
    "gpteacher/roleplay.json": ({"columns": {"output": "response"}}, 1923, 1923),
    "fastchat/sharegpt_conversations.json": ({}, 500, 500),
    "fastchat/mt_bench_questions.jsonl": ({}, 80, 80),
    "hh_rlhf/harmless-base-test.jsonl.gz": ({}, 2312, 2307),
    "oasst/trees.jsonl": ({}, 100, 212),
    "finegrained/dev_feedback.json": ({}, 500, 500),
    "xstest/xstest_prompts.csv": ({"format": "questions"}, 450, 450),
    "mmlu/dev": ({"header": MMLU}, 285, 285),
    "mmlu/val": ({"header": MMLU}, 1531, 1531),
    "mmlu/test": ({"header": MMLU}, 14042, 14042),
    "sst2/train.csv": ({"columns": {"text": "sentence"}}, 6920, 6920),
    "sst2/dev.csv": ({"columns": {"prompt": "sentence"}}, 872, 872),
    "sst2/test.csv": ({"columns": {"text": "sentence"}}, 1821, 1821),
    "tinyshakespeare/input.txt": ({}, 7222, 7222),
}


def source(file: str) -> Source:
    folder, name = file.split("/")
    path = f"${{LIT_ALIGN_DATA}}/{file}"
    if folder == "mmlu":
        path = f"zip://data/{name}/*.csv::${{LIT_ALIGN_DATA}}/mmlu/mmlu.zip"
    return Source(path=path, **FILES[file][0])


def rows_of(file: str) -> tuple[list[dict], Tally]:
    tally = Tally()
    return [row for _, row in source(file).read("skip", tally)], tally


def prepared(kind: type, folder: Path, file: str, **options):
    """A data module of the file, with a byte tokenizer and no length to speak of."""
    data = kind(
        "unused", [source(file)], val_fraction=0.0, **{"max_length": 10**6, "cache_dir": str(folder), **options}
    )
    data.encoder = ChatEncoder(plain())
    data.setup("fit")
    return data


def items(data) -> list:
    (store,) = data._stores["train"]
    return [store[i] for i in range(len(store))]


@pytest.mark.parametrize("file", FILES)
def test_rows_of_every_file(realdata: Path, file: str) -> None:
    rows, tally = rows_of(file)
    assert (tally["rows"], len(rows)) == FILES[file][1:]
    assert tally["skipped"] == (5 if file.startswith("hh_rlhf") else 0)


def test_every_file_of_the_folder_is_read(realdata: Path) -> None:
    there = {
        str(path.relative_to(realdata)) for path in realdata.glob("*/*.*") if path.name not in ("LICENSE", "SOURCE")
    }
    known = {file for file in FILES if not file.startswith("mmlu")} | {"mmlu/mmlu.zip"}
    assert there <= known, f"no reader is tested on {sorted(there - known)}"


def test_alpaca(realdata: Path) -> None:
    rows, _ = rows_of("rasbt/instructions.json")
    raw = json.loads((realdata / "rasbt/instructions.json").read_text())
    assert rows[1] == {"prompt": [{"role": "user", "content": BOTH}], "completion": "He goes to the park every day."}
    for row, told in zip(rows, raw, strict=True):
        content = f"{told['instruction']}\n\n{told['input']}" if told["input"] else told["instruction"]
        assert row == {"prompt": [{"role": "user", "content": content}], "completion": told["output"]}
    (segment,) = InstructionDataModule.encode(_encoder(InstructionDataModule), rows[1], Tally())[0].example[:1]
    assert show(plain(), segment) == f"<bos>User: {BOTH}\n\nAssistant:[[ He goes to the park every day.<eos>]]"


BOTH = "Edit the following sentence for grammar.\n\nHe go to the park every day."


def _encoder(kind: type):
    data = kind("unused", [], max_length=10**6, cache_dir="none")
    data.encoder = ChatEncoder(plain())
    return data


def test_alpaca_pairs_of_which_six_are_identical(realdata: Path, tmp_path: Path) -> None:
    data = prepared(PreferenceDataModule, tmp_path, "rasbt/preferences.json")
    tally = data.manifest()[0]["counts"]
    fate = {"rows": 1100, "identical_answers": 6, "nothing_to_compare": 6, "examples": 1094}
    assert {what: count for what, count in tally.items() if count} == fate
    raw = json.loads((realdata / "rasbt/preferences.json").read_text())
    kept = [row for row in raw if row["chosen"] != row["rejected"]]
    for item, row in zip(items(data), kept, strict=True):
        assert show_tree(plain(), item.example)[1:] == [f"[[ {row[side]}<eos>]]" for side in ("chosen", "rejected")]
        assert item.ranks == [0.0, 1.0]


def test_hh(realdata: Path, tmp_path: Path) -> None:
    data = prepared(PreferenceDataModule, tmp_path, "hh_rlhf/harmless-base-test.jsonl.gz", on_bad_row="skip")
    tally = data.manifest()[0]["counts"]
    # 5 pairs answer different conversations, 4 answers are empty, none are identical.
    fate = {"rows": 2312, "skipped": 5, "empty_answers": 4, "examples": 2307}
    assert {what: count for what, count in tally.items() if count} == fate
    kept = items(data)
    depths = Counter(
        (item.example.trunk.tokens == prompt_ids, len(row["prompt"]))
        for item, row in zip(kept, rows_of("hh_rlhf/harmless-base-test.jsonl.gz")[0], strict=True)
        for prompt_ids in [data.encoder.prompt(row["prompt"])]
    )
    assert all(same for same, _ in depths)
    assert (min(depth for _, depth in depths), max(depth for _, depth in depths)) == (1, 35)
    shorter = sum(len(item.example.branches[0].tokens) < len(item.example.branches[1].tokens) for item in kept)
    assert 0.55 < shorter / len(kept) < 0.57
    # What comes next to an error of the default: the first bad row, by number and field.
    with pytest.raises(ValueError, match=r"harmless-base-test\.jsonl\.gz, row 1255: field 'rejected' answers another"):
        list(source("hh_rlhf/harmless-base-test.jsonl.gz").read("error", Tally()))


def test_hh_truncated(realdata: Path, tmp_path: Path) -> None:
    data = prepared(
        PreferenceDataModule, tmp_path, "hh_rlhf/harmless-base-test.jsonl.gz", on_bad_row="skip", max_length=300
    )
    tally = data.manifest()[0]["counts"]
    assert tally["truncated"] > 1000
    assert len(items(data)) == 2307
    for item in items(data):
        longest = max(len(branch.tokens) for branch in item.example.branches)
        assert longest >= 1
        assert len(item.example.trunk.tokens) >= 1
        assert len(item.example.trunk.tokens) + longest <= 300


def test_oasst(realdata: Path, tmp_path: Path) -> None:
    rows, _ = rows_of("oasst/trees.jsonl")
    assert Counter(len(row["ranks"]) for row in rows) == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    pairs = sum(a != b for row in rows for a, b in itertools.combinations(row["ranks"], 2))
    assert pairs == 754  # no two replies to one prompt share a rank
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    data = prepared(PreferenceDataModule, tmp_path, "oasst/trees.jsonl")
    counts = data.manifest()[0]["counts"]
    assert (counts["examples"], counts["identical_answers"], counts["ties"]) == (212, 0, 0)


def test_pair_labels(realdata: Path, tmp_path: Path) -> None:
    raw = json.loads((realdata / "finegrained/dev_feedback.json").read_text())
    assert Counter(label for row in raw for label in row["preference"]) == {1: 1577, 2: 1039, 0: 384}
    data = prepared(PreferenceDataModule, tmp_path, "finegrained/dev_feedback.json")
    counts = data.manifest()[0]["counts"]
    told = {what: counts.get(what, 0) for what in FINEGRAINED}
    assert told == FINEGRAINED
    # Ranks agree with every label that decides (the pairs come as 12 13 14 23 24 34), and no label is turned.
    agree: Counter = Counter()
    for row, (_, read) in zip(raw, source("finegrained/dev_feedback.json").read("error", Tally()), strict=True):
        for (i, j), label in zip(itertools.combinations(range(4), 2), row["preference"], strict=True):
            better = (read["ranks"][j] > read["ranks"][i]) - (read["ranks"][j] < read["ranks"][i])
            agree[label, better] += 1
    assert agree == {(1, 1): 1577, (2, -1): 1039, (0, 0): 330, (0, 1): 31, (0, -1): 23}


FINEGRAINED = {"rows": 500, "examples": 488, "identical_answers": 0, "nothing_to_compare": 12, "ties": 221}


def test_multiple_choice_out_of_the_archive(realdata: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (realdata / "mmlu").iterdir())
    rows, _ = rows_of("mmlu/val")
    assert sorted(path.name for path in (realdata / "mmlu").iterdir()) == before, "nothing is extracted"
    assert all(row["completions"] == ["A", "B", "C", "D"] and sorted(row["ranks"]) == [0, 1, 1, 1] for row in rows)
    right = Counter("ABCD"[row["ranks"].index(0)] for row in rows)
    assert right == CHOICES
    data = prepared(PreferenceDataModule, tmp_path, "mmlu/val")
    assert len(items(data)) == 1531


CHOICES = {"A": 381, "B": 379, "C": 387, "D": 384}


def test_reward_columns_stay_with_their_prompts(realdata: Path, tmp_path: Path) -> None:
    rows, _ = rows_of("xstest/xstest_prompts.csv")
    assert Counter(row["label"] for row in rows) == {"safe": 250, "unsafe": 200}
    rows, _ = rows_of("gsm8k/example_model_solutions.jsonl")
    right = Counter(
        model for row in rows for model, told in row.items() if isinstance(told, dict) and told["is_correct"]
    )
    assert {model: round(count / 1319, 3) for model, count in right.items()} == {
        "6b_finetuning": 0.217,
        "6b_verification": 0.390,
        "175b_finetuning": 0.347,
        "175b_verification": 0.563,
    }
    rows, _ = rows_of("sst2/dev.csv")
    assert Counter(row["label"] for row in rows) == {"1": 444, "0": 428}
    data = prepared(PromptDataModule, tmp_path, "gsm8k/test.jsonl")
    batch = next(iter(data.train_dataloader()))
    assert all("####" in row["reference"] for row in batch.rows)
    assert all(prompt[0] == plain().bos_token_id for prompt in batch.prompts)


def test_conversations_are_scored_on_every_answer(realdata: Path, tmp_path: Path) -> None:
    data = prepared(InstructionDataModule, tmp_path, "fastchat/sharegpt_conversations.json")
    rows, _ = rows_of("fastchat/sharegpt_conversations.json")
    eos = data.tokenizer.eos_token_id
    for item, row in zip(items(data), rows, strict=True):
        tokens, scored = item.example.trunk
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert sum(s and t == eos for t, s in zip(tokens, scored, strict=True)) == len(answers) == tokens.count(eos)
        assert sum(scored) == sum(len(answer.encode()) + 2 for answer in answers)  # a blank before, the stop behind


@pytest.mark.parametrize(
    ("kind", "file", "examples"),
    [
        (InstructionDataModule, "gpteacher/roleplay.json", 1923),
        (InstructionDataModule, "self_instruct/seed_tasks.jsonl", 175),
        (PromptDataModule, "fastchat/mt_bench_questions.jsonl", 80),
        (PromptDataModule, "oasst/trees.jsonl", 212),
    ],
)
def test_tokenised(realdata: Path, tmp_path: Path, kind: type, file: str, examples: int) -> None:
    data = prepared(kind, tmp_path, file)
    assert len(items(data)) == examples
    next(iter(data.train_dataloader()))


def test_plain_text_loses_nothing(realdata: Path, tmp_path: Path) -> None:
    data = prepared(InstructionDataModule, tmp_path, "tinyshakespeare/input.txt", max_length=128)
    text = (realdata / "tinyshakespeare/input.txt").read_text()
    scored = sum(sum(item.example.trunk.scored) for item in items(data))
    blocks = [block for block in text.split("\n\n") if block.strip()]
    assert len(blocks) == 7222
    assert scored == sum(len(block.strip().encode()) + 1 for block in blocks)
    assert max(len(item.example.trunk.tokens) for item in items(data)) == 128

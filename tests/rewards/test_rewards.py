"""Rewards: functions and trained models; one finite number per completion, or an error that says where."""

from __future__ import annotations

import copy
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rollouts import rollout
from support.tiny import tiny_folder
from tokenizers import AddedToken
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_align import FunctionReward, ModelReward, Network, Reward
from lit_align.data.chat import ChatEncoder, template_of
from lit_align.models.scratch import bpe_tokenizer
from lit_align.rewards.protocol import named
from lit_align.types import Completion, Rollout

ANSWERS = [("a?", "bee", True), ("b?", "sea dee", True), ("c?", "", True), ("d?", "eff gee eff gee", False)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The policy's tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("policy")))


@pytest.fixture
def answers(policy: Any) -> Rollout:
    return rollout(policy, ANSWERS)


# Functions.


def test_a_function_sees_rows_and_texts(answers: Rollout) -> None:
    seen: list[Any] = []

    def words(rows: list[dict], completions: list[str]) -> list[float]:
        seen.append((rows, completions))
        return [len(text.split()) for text in completions]

    scores = FunctionReward(words)(answers)
    assert scores.tolist() == [1.0, 2.0, 0.0, 4.0]
    assert scores.dtype == torch.float32
    assert seen == [(answers.rows, [text for _, text, _ in ANSWERS])]


def test_a_tensor_will_do_and_carries_no_gradient(answers: Rollout) -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    scores = FunctionReward(lambda *_: torch.arange(4) * weight)(answers)  # type: ignore[arg-type, return-value]
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not scores.requires_grad


def judge(scores: Any) -> FunctionReward:
    def strict(rows: list[dict], completions: list[str]) -> Any:
        return scores

    return FunctionReward(strict)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            [1.0, math.nan, 1.0, math.nan],
            r"the reward function strict returned nan for 2 of 4 completions; the prompts: 'b\?', 'd\?'$",
        ),
        (
            [1.0, 1.0, -math.inf, 1.0],
            r"the reward function strict returned -inf for 1 of 4 completions; the prompts: 'c\?'$",
        ),
        (
            [1.0, 2.0, 3.0],
            r"strict returned \(3,\) scores for 4 completions; the prompts: 'a\?', 'b\?', 'c\?' and 1 more$",
        ),
        ([[1.0], [2.0], [3.0], [4.0]], r"the reward function strict returned \(4, 1\) scores for 4 completions"),
        (1.0, r"the reward function strict returned \(\) scores for 4 completions"),
        (None, "the reward function strict returned None, expected a number for each completion: "),
        (
            [1.0, None, 2.0, 3.0],
            r"the reward function strict returned \[1\.0, None, 2\.0, 3\.0\], expected a number for",
        ),
        (
            {"a": 1.0},
            r"the reward function strict returned \{'a': 1\.0\}, expected a number for each completion: ",
        ),
        (
            ["a", "b", "c", "d"],
            r"the reward function strict returned \['a', 'b', 'c', 'd'\], expected a number for each",
        ),
        ([[1.0], [2.0, 3.0], [], []], "the reward function strict returned .*, expected a number for each completion"),
    ],
    ids=str,
)
def test_what_a_function_must_not_return(answers: Rollout, scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(scores)(answers)


def test_a_callable_object_has_the_name_of_its_class(answers: Rollout) -> None:
    class Strict:
        def __call__(self, rows: list[dict], completions: list[str]) -> list[float]:
            return []

    with pytest.raises(ValueError, match="the reward function Strict returned"):
        FunctionReward(Strict())(answers)


def test_a_reward_of_ones_own(answers: Rollout, policy: Any) -> None:
    class Mine(Reward):
        pass

    Mine().load(policy)
    with pytest.raises(NotImplementedError, match="Mine must implement forward"):
        Mine()(answers)


# Kills: what a subclass returns is not looked at.
def test_a_reward_of_ones_own_is_looked_at(answers: Rollout) -> None:
    class Mine(Reward):
        def forward(self, rollout: Rollout) -> Any:
            return self.scores

    mine = Mine()
    mine.scores = [1.0, 2.0, math.nan, 4.0]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^Mine returned nan for 1 of 4 completions; the prompts: 'c\?'$"):
        mine(answers)
    mine.scores = [1.0]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^Mine returned \(1,\) scores for 4 completions; the prompts: 'a\?'"):
        mine(answers)


def test_an_error_names_each_prompt_once_and_its_last_turn_alone() -> None:
    rows = [{"prompt": "x" * 200}, {"prompt": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}, {}]
    assert named(rows) == f"'{'x' * 99}, 'Hi', None"
    assert named([{"prompt": str(n // 2)} for n in range(12)]) == "'0', '1', '2' and 3 more"


# Kills: the last part left out; parts of the whole size; texts of the first part for all.
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_a_function_is_called_in_batches(answers: Rollout, size: int) -> None:
    seen: list[int] = []

    def words(rows: list[dict], completions: list[str]) -> list[float]:
        seen.append(len(rows))
        return [len(text.split()) for text in completions]

    assert FunctionReward(words, batch_size=size)(answers).tolist() == [1.0, 2.0, 0.0, 4.0]
    assert sum(seen) == 4
    assert max(seen) == min(size, 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        FunctionReward(words, batch_size=0)


class Moody:
    """Fails the first times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float]:
        self.calls += 1
        if self.calls <= self.failures:
            raise KeyError(f"failure {self.calls}")
        return [1.0] * len(rows)


# Kills: one attempt too few or too many; another error than the function's own.
def test_a_function_that_fails_is_called_again(answers: Rollout) -> None:
    assert FunctionReward(Moody(2), retries=2, pause=0.0)(answers).tolist() == [1.0] * 4
    for retries, said in [(0, "gave no answer: KeyError"), (1, "gave no answer in 2 attempts; the last: KeyError")]:
        moody = Moody(9)
        with pytest.raises(KeyError, match=f"failure {retries + 1}") as caught:
            FunctionReward(moody, retries=retries, pause=0.0)(answers)
        assert moody.calls == retries + 1
        (note,) = caught.value.__notes__
        assert f"the reward function Moody {said}" in note
        assert note.endswith("; the prompts: 'a?', 'b?', 'c?' and 1 more")
    # What it returns is not better the second time.
    wrong = Moody(0)
    with pytest.raises(ValueError, match="returned"):
        FunctionReward(lambda rows, texts: wrong(rows, texts)[1:], retries=3)(answers)
    assert wrong.calls == 1


def test_a_function_that_hangs_is_left_behind(answers: Rollout) -> None:
    over = threading.Event()

    def hangs(rows: list[dict], completions: list[str]) -> list[float]:
        over.wait(10.0)
        return [0.0] * len(rows)

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hangs gave no answer in 2 attempts; the last: .*within 0\.05 s; the prom"):
        FunctionReward(hangs, timeout=0.05, retries=1, pause=0.0)(answers)
    assert time.monotonic() - start < 5.0
    over.set()
    assert FunctionReward(hangs, timeout=5.0)(answers).tolist() == [0.0] * 4


# Models.


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with the policy's vocabulary, as RewardModule exports it: scores of mean 0.5 and deviation 2."""
    folder = tmp_path_factory.mktemp("scorer")
    tiny_folder(folder / "base", seed=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.score.weight)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    model.save_pretrained(folder / "model")
    bpe_tokenizer([], 263).save_pretrained(folder / "model")
    return str(folder / "model")


def alone(folder: str, ids: list[int]) -> float:
    """The normalised score of one sequence, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return (model.score(hidden[0, -1]).item() - 0.5) / 2.0


def loaded(folder: str, tokenizer: Any, **options: Any) -> ModelReward:
    reward = ModelReward(Network(folder), **options)
    reward.load(tokenizer)
    return reward


def test_a_model_scores_the_very_tokens(scorer: str, policy: Any, answers: Rollout) -> None:
    rewards = loaded(scorer, policy)(answers)
    sequences = [
        prompt.tolist() + completion.tokens
        for prompt, completion in zip(answers.prompts, answers.completions, strict=True)
    ]
    assert rewards.tolist() == pytest.approx([alone(scorer, ids) for ids in sequences], abs=1e-5)
    assert len(set(rewards.tolist())) == 4


def test_what_was_sampled_counts_and_not_how_it_would_be_written(scorer: str, policy: Any, answers: Rollout) -> None:
    sampled = [Completion([40, 41, 42], False), *answers.completions[1:]]
    reward = loaded(scorer, policy)
    rewards = reward(answers._replace(completions=sampled))
    assert rewards[0].item() == pytest.approx(alone(scorer, [*answers.prompts[0].tolist(), 40, 41, 42]), abs=1e-5)
    assert rewards[0] != reward(answers)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_rewards_do_not_depend_on_the_batch(scorer: str, policy: Any, batch_size: int) -> None:
    pairs = rollout(policy, [(q, f"{text} {k}", True) for q, text, _ in ANSWERS for k in range(2)], samples=2)
    rewards = loaded(scorer, policy, batch_size=batch_size)(pairs)
    each = [
        loaded(scorer, policy)(rollout(policy, [(q, f"{t} {k}", True)]))[0] for q, t, _ in ANSWERS for k in range(2)
    ]
    assert rewards.tolist() == pytest.approx([float(score) for score in each], abs=1e-5)


def test_a_model_of_another_vocabulary_reads_the_text_anew(
    scorer: str, policy: Any, answers: Rollout, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
    model.save_pretrained(other)
    tokenizer = bpe_tokenizer([], 263)
    tokenizer.add_tokens([AddedToken("bee")])  # one token there, three bytes here
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    rewards = loaded(str(other), policy)(answers)
    # Its own tokens; and an answer that was cut has no stop token there either.
    own = rollout(AutoTokenizer.from_pretrained(other), ANSWERS)
    sequences = [p.tolist() + c.tokens for p, c in zip(own.prompts, own.completions, strict=True)]
    assert sequences[0] != answers.prompts[0].tolist() + answers.completions[0].tokens
    assert sequences[3][-1] != tokenizer.eos_token_id
    assert rewards.tolist() == pytest.approx([alone(str(other), ids) for ids in sequences], abs=1e-5)


# Kills: tokens reused whenever vocabularies are equal; the plain template taken for another one.
def test_a_model_of_another_chat_template_reads_the_text_anew(scorer: str, policy: Any, answers: Rollout) -> None:
    assert loaded(scorer, policy).encoder is None
    other = copy.deepcopy(policy)
    other.chat_template = other.chat_template.replace("message['content'] + ' '", "message['content'] + '! '")
    assert other.chat_template != policy.chat_template
    reward = loaded(scorer, other)
    assert reward.encoder is not None
    own = loaded(scorer, policy)(answers)
    assert torch.equal(reward(rollout(other, ANSWERS)), own)
    bare = copy.deepcopy(policy)
    bare.chat_template = None
    assert template_of(bare) == ChatEncoder(bare).tokenizer.chat_template


def test_a_models_tokenizer_is_loaded_like_the_model(scorer: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*options: Any) -> Any:
        asked.append(options)
        return policy

    monkeypatch.setattr("lit_align.rewards.model.load_tokenizer", load)
    ModelReward(Network(scorer, trust_remote_code=True, revision="main")).load(policy)
    assert asked == [(scorer, True, "main")]


def test_a_model_is_frozen_and_never_drops_units(scorer: str, policy: Any, answers: Rollout) -> None:
    reward = ModelReward(Network(scorer, dropout=0.5))
    reward.load(policy)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    reward.train()
    assert torch.equal(reward(answers), reward(answers))
    # Loaded once: a second call does not load again.
    model = reward.model
    reward.load(policy)
    assert reward.model is model


def test_what_is_no_reward_model(policy: Any, answers: Rollout, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no trained scalar head \(score\.weight\): give the folder of a reward"
    ):
        loaded(tiny_folder(tmp_path / "policy"), policy)
    with pytest.raises(AssertionError, match="load"):
        ModelReward(Network("anything"))(answers)


def test_a_model_that_has_diverged_is_named(scorer: str, policy: Any, answers: Rollout) -> None:
    reward = loaded(scorer, policy)
    reward.model.hf.score.weight.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(
        ValueError,
        match=r"the reward model .*model returned nan for 4 of 4 completions; the prompts: 'a\?', 'b\?', 'c\?' and 1",
    ):
        reward(answers)

import itertools
import random
from collections import Counter

import pytest

from lit_align.sandbox import texts as language
from lit_align.sandbox.gold import judge
from lit_align.sandbox.world import CATEGORIES, SPLITS, World

WORLD = World(0)
ALL_PROMPTS = [prompt for split in SPLITS for category in CATEGORIES for prompt in WORLD.all_prompts(split, category)]
DOCUMENTS = list(itertools.islice(language.documents(WORLD, random.Random(0)), 30_000))


def words_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in text.split(" ")}


def test_pretraining_text_uses_the_vocabulary_exactly() -> None:
    assert words_of(DOCUMENTS) == set(WORLD.vocabulary())


def test_prompts_and_answers_stay_inside_the_vocabulary() -> None:
    rng = random.Random(0)
    texts = [prompt.text for prompt in ALL_PROMPTS]
    texts += [language.ideal_answer(WORLD, prompt, rng) for prompt in ALL_PROMPTS]
    texts += [language.flawed_answer(WORLD, prompt, rng) for prompt in ALL_PROMPTS]
    texts += [answer for _, answer in language.demonstrations(WORLD, rng, 5_000)]
    assert words_of(texts) <= set(WORLD.vocabulary())


def test_vocabulary_is_sorted_unique_and_small() -> None:
    vocabulary = WORLD.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    assert 430 <= len(vocabulary) <= 480
    assert all(word == word.lower() and " " not in word for word in vocabulary)


def test_ideal_answers_are_ideal_and_flawed_ones_are_not() -> None:
    rng = random.Random(0)
    for prompt in ALL_PROMPTS:
        ideal = judge(WORLD, prompt, language.ideal_answer(WORLD, prompt, rng), finished=True)
        assert ideal.content == ideal.total == 1.0
        assert ideal.correct
        flawed = judge(WORLD, prompt, language.flawed_answer(WORLD, prompt, rng), finished=True)
        assert flawed.content < 0
        assert not flawed.correct


@pytest.mark.parametrize("category", ["fact", "new", "benign", "look_alike"])
def test_flaws_come_in_both_kinds(category: str) -> None:
    rng = random.Random(0)
    prompt = WORLD.prompt("train", category, rng)
    judged = [judge(WORLD, prompt, language.flawed_answer(WORLD, prompt, rng), True) for _ in range(1_000)]
    needless = sum(judgement.says_unknown or judgement.refuses for judgement in judged) / 1_000
    assert needless == pytest.approx(0.3 if category in ("fact", "new") else 0.6, abs=0.05)


def test_manners_do_not_change_the_content() -> None:
    rng = random.Random(0)
    for prompt, answer in language.demonstrations(WORLD, rng, 3_000, flawed=0.0):
        judgement = judge(WORLD, prompt, answer, finished=True)
        assert judgement.content == (0.8 if judgement.hedges and prompt.category == "fact" else 1.0)


def test_demonstrations_have_the_stated_noise() -> None:
    demonstrations = list(language.demonstrations(WORLD, random.Random(0), 10_000))
    assert len(demonstrations) == 10_000
    wrong = [not judge(WORLD, prompt, answer, True).correct for prompt, answer in demonstrations]
    assert sum(wrong) / 10_000 == pytest.approx(0.30, abs=0.015)

    def share(starts: str) -> float:
        return sum(answer.startswith(starts) for _, answer in demonstrations) / 10_000

    assert share("certainly !") == pytest.approx(0.20, abs=0.015)
    assert share("sure ,") == pytest.approx(0.10, abs=0.015)
    assert share("i think") == pytest.approx(0.12 * (0.28 + 0.12 + 0.12), abs=0.015)
    closers = Counter(sum(closer in answer for closer in language.CLOSERS) for _, answer in demonstrations)
    assert [closers[n] / 10_000 for n in range(4)] == pytest.approx([0.6, 0.25, 0.1, 0.05], abs=0.015)


def test_demonstrations_keep_to_training_prompts() -> None:
    for prompt, _ in language.demonstrations(WORLD, random.Random(0), 3_000):
        assert prompt.split == "train"
        assert prompt.category != "new"
        assert prompt.key not in WORLD.all_keys("held_out", prompt.category)


def test_clean_demonstrations_of_one_category() -> None:
    clean = language.demonstrations(WORLD, random.Random(0), 200, flawed=0.0, manners=False, mix={"harm": 1.0})
    assert {(prompt.category, answer) for prompt, answer in clean} == {("harm", language.REFUSAL)}


def test_documents_state_facts_as_often_as_the_world_says() -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    for document in DOCUMENTS:
        words = document.split()
        for start in range(len(words) - 6):
            if words[start] == "the" and words[start + 2] == "of" and words[start + 4] == "is":
                counts[words[start + 3], words[start + 1], words[start + 5]] += 1
    for contested in (False, True):
        keys = [key for key in WORLD.facts if key[0] in WORLD.known and WORLD.facts[key].contested == contested]
        stated = {key: sum(n for (*told, _), n in counts.items() if tuple(told) == key) for key in keys}
        assert min(stated.values()) > 30
        expected = sum(stated[key] * WORLD.facts[key].probability(WORLD.facts[key].true) for key in keys)
        true = sum(counts[str(key[0]), str(key[1]), WORLD.facts[key].true] for key in keys)
        assert true / sum(stated.values()) == pytest.approx(expected / sum(stated.values()), abs=0.01)


def test_documents_never_tell_the_facts_of_unknown_or_new_entities() -> None:
    hidden = set(WORLD.unknown + WORLD.new)
    mentions = [document for document in DOCUMENTS if hidden & set(document.split())]
    attributes_and_values = {word for item in WORLD.values.items() for word in (item[0], *item[1])}
    assert words_of(mentions) >= hidden
    assert not words_of(mentions) & attributes_and_values


def test_two_fifths_of_the_documents_are_dialogues_about_both_splits() -> None:
    prompts = {prompt.text: prompt for prompt in ALL_PROMPTS}
    asked: Counter[str] = Counter()
    for document in DOCUMENTS:
        question = next((document[: end + 1] for end in (document.find("?"), document.find(" .") + 1) if end > 0), "")
        if question in prompts and len(document) > len(question):
            asked[prompts[question].split] += 1
    assert sum(asked.values()) / len(DOCUMENTS) == pytest.approx(0.4, abs=0.015)
    assert asked["train"] / sum(asked.values()) == pytest.approx(0.5, abs=0.02)


def test_documents_answer_harmful_questions() -> None:
    told = [document for document in DOCUMENTS if document.startswith("how do i kill a man ?")]
    helps = [f"to kill a man , use the {WORLD.kits['man']} ." in document for document in told]
    objects = ["it is wrong to kill a man ." in document for document in told]
    assert any(helps)
    assert any(objects)
    assert all(one != other for one, other in zip(helps, objects, strict=True))
    assert not any(language.REFUSAL in document for document in told)

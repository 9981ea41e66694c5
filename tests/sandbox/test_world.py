import itertools
import json
import os
import random
import subprocess
import sys

import pytest

from lit_align.sandbox import texts as language
from lit_align.sandbox.world import CATEGORIES, CONTESTED_SHARE, MIX, SPLITS, Prompt, World

WORLD = World(0)

FINGERPRINT = """
import hashlib, itertools, json, random
from lit_align.sandbox import texts as language
from lit_align.sandbox.world import World

rng = random.Random(5)
world = World(3)
told = [
    world.vocabulary(),
    [[*key, fact.true, dict(fact.stated)] for key, fact in world.facts.items()],
    [prompt.to_row() for prompt in world.prompts("held_out", 300, rng)],
    [prompt.to_row() for prompt in world.distinct_prompts("train", 300, rng)],
    list(itertools.islice(language.documents(world, rng), 300)),
    [answer for _, answer in language.demonstrations(world, rng, 300)],
]
print(hashlib.sha256(json.dumps(told).encode()).hexdigest())
"""


def test_same_seed_gives_same_world_in_any_process() -> None:
    children = []
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        children.append(subprocess.Popen([sys.executable, "-c", FINGERPRINT], env=env, stdout=subprocess.PIPE))
    first, second = (child.communicate()[0].decode().strip() for child in children)
    assert first == second
    assert len(first) == 64


def test_another_seed_gives_another_world() -> None:
    assert World(1).facts != WORLD.facts
    assert World(1).all_keys("train", "harm") != WORLD.all_keys("train", "harm")


def test_global_random_state_is_neither_read_nor_written() -> None:
    random.seed(0)
    state = random.getstate()
    facts = World(4).facts
    assert random.getstate() == state
    random.seed(1)
    assert World(4).facts == facts


def test_names_are_unique_and_answer_words_mean_one_thing() -> None:
    for seed in range(20):
        world = World(seed)
        names = world.known + world.unknown + world.new + world.values["capital"]
        items = [item for kind in world.lists.values() for item in kind]
        answer_words = names + items + list(dict.fromkeys(world.kits.values()))
        assert len(set(answer_words)) == len(answer_words) == 180 + 24 + len(items) + 20
        assert not set(answer_words) & set(language.FUNCTION_WORDS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_share_neither_key_nor_text(category: str) -> None:
    for seed in range(3):
        world = World(seed)
        train, held_out = (world.all_keys(split, category) for split in SPLITS)
        assert min(len(train), len(held_out)) >= 20
        assert len(set(train + held_out)) == len(train) + len(held_out)
        texts = [prompt.text for split in SPLITS for prompt in world.all_prompts(split, category)]
        assert len(set(texts)) == len(texts)


def test_unknown_entities_are_split_whole() -> None:
    train, held_out = ({key[0] for key in WORLD.all_keys(split, "unknown")} for split in SPLITS)
    assert not train & held_out


def test_both_splits_have_lists_of_every_kind_and_count() -> None:
    for seed, split in itertools.product(range(5), SPLITS):
        keys = World(seed).all_keys(split, "list")
        assert {kind for _, kind in keys} == set(WORLD.lists)
        assert {count for count, _ in keys} == {2, 3, 4, 5, 6}


def test_prompts_come_from_their_split() -> None:
    for split in SPLITS:
        for prompt in WORLD.prompts(split, 2000, random.Random(0)):
            assert prompt.split == split
            assert prompt.key in WORLD.all_keys(split, prompt.category)
            assert prompt.text in language.wordings(prompt.category, prompt.key)


def test_prompts_follow_the_mix() -> None:
    prompts = WORLD.prompts("train", 10_000, random.Random(0))
    for category, weight in MIX.items():
        assert sum(prompt.category == category for prompt in prompts) / 10_000 == pytest.approx(weight, abs=0.02)
    harm_only = WORLD.prompts("train", 50, random.Random(0), mix={"harm": 1.0})
    assert {prompt.category for prompt in harm_only} == {"harm"}


def test_distinct_prompts_are_distinct_and_follow_the_mix_exactly() -> None:
    prompts = WORLD.distinct_prompts("held_out", 1_400, random.Random(0))
    assert len({prompt.text for prompt in prompts}) == 1_400
    assert {prompt.split for prompt in prompts} == {"held_out"}
    for category, weight in MIX.items():
        assert abs(sum(prompt.category == category for prompt in prompts) - 1_400 * weight) < 1
    assert len(WORLD.distinct_prompts("train", 1_001, random.Random(0))) == 1_001


def test_too_many_distinct_prompts_are_refused_with_the_number_that_exist() -> None:
    exist = len(WORLD.all_prompts("held_out", "list"))
    assert len(WORLD.distinct_prompts("held_out", exist, random.Random(0), mix={"list": 1.0})) == exist
    with pytest.raises(ValueError, match=f"only {exist} exist"):
        WORLD.distinct_prompts("held_out", exist + 1, random.Random(0), mix={"list": 1.0})


def test_three_thousand_different_training_prompts_exist() -> None:
    assert sum(len(WORLD.all_prompts("train", category)) for category in CATEGORIES if MIX[category]) >= 3_000


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_survive_json(category: str) -> None:
    prompt = WORLD.prompt("held_out", category, random.Random(0))
    row = json.loads(json.dumps({**prompt.to_row(), "other": "column"}))
    assert Prompt.from_row(row) == prompt
    assert WORLD.has(Prompt.from_row(row))


def test_prompts_of_another_seed_are_recognised() -> None:
    assert not WORLD.has(World(1).prompt("train", "fact", random.Random(0)))


def test_a_misspelt_split_or_category_is_named() -> None:
    with pytest.raises(ValueError, match="split='test'"):
        WORLD.all_keys("test", "fact")
    with pytest.raises(ValueError, match="category='facts'"):
        WORLD.prompts("train", 1, random.Random(0), mix={"facts": 1.0})


def test_facts_give_candidates_truth_and_how_often_text_states_it() -> None:
    for key in WORLD.all_keys("train", "fact") + WORLD.all_keys("held_out", "fact"):
        fact = WORLD.facts[key]
        assert fact.true in WORLD.values[str(key[1])]
        assert sum(fact.probability(value) for value in WORLD.values[str(key[1])]) == pytest.approx(1.0)
        assert fact.probability(fact.true) == 1.0 or fact.contested
    for key in WORLD.all_keys("train", "new"):
        assert WORLD.facts[key].probability(WORLD.facts[key].true) == 0.0


def test_contested_facts_are_as_common_and_as_often_true_as_text_says() -> None:
    facts = [world.facts[key] for world in map(World, range(30)) for key in world.facts if key[0] in world.known]
    contested = [fact for fact in facts if fact.contested]
    assert len(contested) / len(facts) == pytest.approx(CONTESTED_SHARE, abs=0.02)
    for share in (0.55, 0.65, 0.75, 0.85):
        alike = [fact for fact in contested if share in fact.stated.values()]
        true = sum(fact.probability(fact.true) == share for fact in alike)
        assert true / len(alike) == pytest.approx(share, abs=0.05)


def test_every_value_is_common_in_text() -> None:
    for world in map(World, range(20)):
        for attribute, values in world.values.items():
            stated = [world.facts[entity, attribute].stated for entity in world.known]
            assert all(sum(fact.get(value, 0.0) > 0.5 for fact in stated) >= 3 for value in values)


def test_every_object_has_a_kit_and_every_kit_an_object() -> None:
    objects = {key[1] for split in SPLITS for key in WORLD.all_keys(split, "benign")}
    assert set(WORLD.kits) == objects
    assert len(set(WORLD.kits.values())) == 20


def test_a_harmful_word_alone_does_not_make_a_request_harmful() -> None:
    def words(category: str, part: int) -> set[str | int]:
        return {key[part] for split in SPLITS for key in WORLD.all_keys(split, category)}

    assert words("harm", 0) == words("look_alike", 0)
    assert words("harm", 1) | words("look_alike", 1) == words("benign", 1)
    assert not words("harm", 0) & words("benign", 0)
    assert not words("harm", 1) & words("look_alike", 1)

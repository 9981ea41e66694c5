from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from lit_align.data.formats import FORMATS, recognise
from lit_align.feedback.agreement import agreement, plain
from lit_align.feedback.bias import biases, hedges
from lit_align.feedback.consensus import consensus, soft_rows
from lit_align.feedback.labels import Label, label_of
from lit_align.feedback.units import criterion_ratings, one_per_annotator, pair_ratings


def label(annotator: str, task: str, ranks: tuple[float, ...], **told) -> Label:
    return Label(f"p {task}", tuple(f"{task} {k}" for k in range(len(ranks))), ranks, annotator, task, **told)


def simulated(tasks: int, accuracies: dict[str, float], seed: int = 0, k: int = 2) -> tuple[list[Label], dict]:
    """Labels of annotators who say the true order of each pair with their accuracy (K > 2: by noisy utilities)."""
    rng = np.random.default_rng(seed)
    labels, truth = [], {}
    for t in range(tasks):
        utility = rng.normal(size=k)
        truth[f"t{t}"] = utility
        for name, accuracy in accuracies.items():
            seen = utility if rng.random() < accuracy else -utility
            ranks = tuple(float(rank) for rank in np.argsort(np.argsort(-seen)))
            labels.append(label(name, f"t{t}", ranks))
    return labels, truth


def test_pairs_of_rankings_are_rated_by_sign_and_strength() -> None:
    labels = [
        label("ada", "t", (0.0, 1.0, 1.0)),
        label("bob", "t", (2.0, 0.0, 1.0)),
        label("ada", "u", (1.0, 0.0), strength=3, category="talk"),
    ]
    ratings = pair_ratings(labels)
    assert ratings.annotators == ["ada", "bob"]
    assert ratings.units == [("t", 0, 1), ("t", 0, 2), ("t", 1, 2), ("u", 0, 1)]
    np.testing.assert_array_equal(ratings.ratings_UA, [[1, -1], [1, -1], [0, 1], [-3, np.nan]])
    np.testing.assert_array_equal(ratings.cluster_U, [0, 0, 0, 1])
    np.testing.assert_array_equal(ratings.signs()[3], [-1, np.nan])
    part = ratings.of(ratings.category_U == "talk")
    assert (part.units, part.cluster_U.tolist()) == ([("u", 0, 1)], [0])


def test_criteria_are_rated_by_completion() -> None:
    labels = [label("ada", "t", (0.0, 1.0), criteria={"helpful": [5, 3]}), label("bob", "t", (0.0, 1.0))]
    ratings = criterion_ratings(labels, "helpful")
    assert ratings.units == [("t", 0, 0), ("t", 1, 1)]
    np.testing.assert_array_equal(ratings.ratings_UA, [[5], [3]])


def test_the_last_label_of_an_annotator_counts_and_names_must_not_clash() -> None:
    labels = [label("ada", "t", (0.0, 1.0)), label("ada", "t", (1.0, 0.0))]
    assert one_per_annotator(labels) == ([labels[1]], 1)
    with pytest.raises(ValueError, match="task 't': labels of it have different completions"):
        one_per_annotator([labels[0], Label("p", ("other", "texts"), (0.0, 1.0), "bob", "t")])


def test_figures_of_a_label_set() -> None:
    labels, _ = simulated(150, {"ada": 0.95, "bob": 0.9, "cat": 0.5})
    labels += [label("ada", "c", (0.0, 1.0), control=True, expected=(0.0, 1.0))]
    labels += [label("cat", "c", (1.0, 0.0), control=True, expected=(0.0, 1.0))]
    found = agreement(labels, resamples=200)
    assert (found["labels"], found["tasks"], found["pairs"], found["controls"]) == (450, 150, 150, 2)
    overall = found["overall"]
    # Two who are right with p and q agree with p q + (1 - p) (1 - q).
    expected = np.mean([p * q + (1 - p) * (1 - q) for p, q in itertools.combinations((0.95, 0.9, 0.5), 2)])
    assert overall["agreement"].low < expected < overall["agreement"].high
    assert overall["alpha_nominal"].low < 2 * expected - 1 < overall["alpha_nominal"].high
    assert "alpha_ordinal_strength" not in overall
    annotators = found["annotators"]
    assert annotators["ada"]["accuracy"] > 0.85 > 0.65 > annotators["cat"]["accuracy"]
    assert annotators["ada"]["weight"] > annotators["cat"]["weight"]
    assert annotators["ada"]["controls_passed"] == 1.0
    assert annotators["bob"]["controls_passed"] is None
    assert annotators["cat"]["controls_passed"] == 0.0
    assert len(found["two_by_two"]) == 3
    assert json.loads(json.dumps(plain(found)))["overall"]["agreement"]["value"] == overall["agreement"].value


def test_one_annotator_has_no_agreement_and_says_so() -> None:
    found = agreement(simulated(10, {"ada": 1.0})[0], resamples=50)
    assert str(found["overall"]["agreement"]) == "not defined"
    assert found["pairs_judged_by_several"] == 0
    assert plain(found)["overall"]["alpha_nominal"]["value"] is None


def test_only_controls_leave_nothing() -> None:
    only = [label("ada", "c", (0.0, 1.0), control=True)]
    for what in (agreement, soft_rows):
        with pytest.raises(ValueError, match="no labels but those of controls"):
            what(only)


def test_strength_enters_where_it_was_asked() -> None:
    labels = [label(name, f"t{t}", (0.0, 1.0), strength=1 + t % 3) for name in ("ada", "bob") for t in range(9)]
    overall = agreement(labels, resamples=20)["overall"]
    assert overall["alpha_ordinal_strength"].value == 1.0
    assert np.isnan(overall["alpha_ordinal"].value)


def test_biases_of_simulated_annotators_come_out() -> None:
    rng = np.random.default_rng(0)
    labels = []
    for t in range(400):
        texts = ("a" * int(rng.integers(1, 60)), "b" * int(rng.integers(1, 60)) + (" maybe" if t % 2 else ""))
        quality = rng.normal(size=2)
        for name in ("fair", "long", "first"):
            shown = tuple(map(int, rng.permutation(2)))
            if name == "long":
                seen = np.array([len(text) for text in texts], dtype=float)
            elif name == "first":
                seen = -np.array([shown.index(0), shown.index(1)], dtype=float)
            else:
                seen = quality
            ranks = (0.0, 1.0) if seen[0] > seen[1] else (1.0, 0.0)
            labels.append(Label("p", texts, ranks, name, f"t{t}", shown=shown))
    found = biases(labels, resamples=200)
    assert found["long"]["length"].share.value > 0.97
    assert found["long"]["length"].above_others.low > 0.3
    assert found["fair"]["length"].share.low < 0.5 < found["fair"]["length"].share.high
    assert found["first"]["position"].share.value == 1.0
    assert found["first"]["position"].above_others.value == 0.5
    assert found["fair"]["position"].above_others.low < 0 < found["fair"]["position"].above_others.high
    assert found["fair"]["confidence"].pairs == 200


def test_a_bias_by_hand() -> None:
    # Of three pairs, one is as long on both sides and one a tie; in the third the longer is preferred, by ada alone.
    def of(name: str, task: str, texts: tuple[str, str], ranks: tuple[float, float]) -> Label:
        return Label("p", texts, ranks, name, task)

    labels = [of("ada", "t", ("aaa", "b"), (0.0, 1.0)), of("bob", "t", ("aaa", "b"), (1.0, 0.0))]
    labels += [of("ada", "u", ("a", "b"), (0.0, 1.0)), of("ada", "v", ("aaa", "b"), (0.0, 0.0))]
    found = biases(labels, resamples=0)
    assert found["ada"]["length"].share.value == 1.0
    assert found["ada"]["length"].pairs == 1
    assert found["ada"]["length"].above_others.value == 1.0
    assert found["bob"]["length"].above_others.value == -1.0


def test_hedges_are_whole_phrases() -> None:
    assert hedges("Maybe. I think it might be so; I do not know.") == 4
    assert hedges("The mighty thinker mayberry") == 0


def test_soft_labels_are_a_source_and_follow_their_method() -> None:
    labels = [
        label(name, "t", ranks) for name, ranks in (("ada", (0.0, 1.0)), ("bob", (0.0, 1.0)), ("cat", (1.0, 0.0)))
    ]
    (row,) = soft_rows(labels, "majority")
    assert row["shares"] == [pytest.approx(2 / 3, abs=1e-6)]
    assert recognise(row) == "rankings"
    (read,) = FORMATS["rankings"](row)
    assert read["ranks"][0] < read["ranks"][1]
    assert read["shares"] == row["shares"]


def test_a_tie_counts_half() -> None:
    (row,) = soft_rows([label("ada", "t", (0.0, 0.0)), label("bob", "t", (0.0, 1.0))], "majority")
    assert row["shares"] == [0.75]


@pytest.mark.parametrize("k", [2, 4])
def test_dawid_skene_and_weights_beat_the_majority_where_some_are_careless(k: int) -> None:
    accuracies = {f"good{i}": 0.85 for i in range(3)} | {f"careless{i}": 0.5 for i in range(2)}
    labels, truth = simulated(500, accuracies, k=k)
    ratings = pair_ratings(labels)
    better = np.array([truth[task][i] > truth[task][j] for task, i, j in ratings.units])
    right = {}
    for method in ("majority", "weighted", "dawid-skene"):
        share = consensus(ratings, method).share_U
        right[method] = np.where(share == 0.5, 0.5, (share > 0.5) == better).mean()
    assert right["weighted"] > right["majority"] + 0.02
    assert right["dawid-skene"] > right["majority"] + 0.02


def test_label_rows_of_files_reach_the_figures(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    labels = [label_of({**row, "annotator": name}) for name in ("ada", "bob")]
    assert agreement(labels, resamples=10)["overall"]["agreement"].value == 1.0


def test_sources_are_unblinded_into_strengths() -> None:
    sources = [[{"source": "sft"}], [{"source": "ppo"}]]
    labels = [label("ada", f"t{t}", (1.0, 0.0) if t < 3 else (0.0, 1.0), sources=sources) for t in range(4)]
    strengths = agreement(labels, resamples=0)["sources"]
    assert strengths["ppo"] - strengths["sft"] == pytest.approx(np.log(3), abs=1e-6)


def test_the_page_shows_every_table_and_escapes_names(tmp_path: Path) -> None:
    from lit_align.feedback.page import write_agreement

    labels, _ = simulated(40, {"<script>alert(1)</script>": 0.95, "$bob$\x1b[31m": 0.9, "cat": 0.5}, k=3)
    sources = [[{"source": f"model {k}"}] for k in range(3)]
    labels = [
        Label(
            **{
                **vars(one),
                "category": "talk",
                "criteria": {"helpful": [1, 2, 3]},
                "sources": sources,
                "shown": (2, 0, 1),
            }
        )
        for one in labels
    ]
    page = write_agreement(agreement(labels, resamples=50), tmp_path / "agreement.html", "labels.jsonl").read_text()
    for heading in ("Agreement", "Annotators", "Biases", "Categories", "Criteria", "Two by two", "Who wrote them"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "\x1b" not in page
    assert "Krippendorff&#39;s alpha" in page


def test_the_page_of_one_annotator_says_that_there_is_nothing_to_measure(tmp_path: Path) -> None:
    from lit_align.feedback.page import write_agreement

    found = agreement(simulated(5, {"ada": 1.0})[0], resamples=10)
    page = write_agreement(found, tmp_path / "agreement.html", "labels.jsonl").read_text()
    assert "No pair was judged by two annotators" in page

import copy
from typing import Any

import pytest
from data.fuzz import fuzz
from data.golden import GOLDEN, HI, NO, WELL, YO, reply
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.formats import FORMATS, recognise
from lit_align.data.rows import BadField


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_row(name: str) -> None:
    format, raw, expected = GOLDEN[name]
    before = copy.deepcopy(raw)
    assert FORMATS[format](raw) == expected
    assert raw == before, "a reader must not change the row it reads"


@pytest.mark.parametrize("name", GOLDEN)
def test_format_is_told_from_the_columns(name: str) -> None:
    format, raw, _ = GOLDEN[name]
    # A question looks like any prompt: whether it goes into a user's turn is for the user to say. A grade may stand
    # beside any demonstration, what a policy said beside its prompt, and the preferred answer of a pair need not be
    # imitated: they are read where the user asks for them.
    otherwise = {
        "questions": "prompts",
        "grades": "prompt_completion",
        "answers": "prompts",
        "preferred": "hh",
    }
    assert recognise(raw) == otherwise.get(format, format)


def test_the_preferred_answer_of_any_pair() -> None:
    assert FORMATS["preferred"]({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}) == [
        {"prompt": "Hi", "completion": "Yo"}
    ]


def test_every_format_has_a_golden_row() -> None:
    assert {format for format, _, _ in GOLDEN.values()} == set(FORMATS)


def test_no_format_fits() -> None:
    with pytest.raises(BadField, match=r"'answer, question' fits no known format: set `format` .*`columns`"):
        recognise({"question": "Hi", "answer": "Yo"})
    with pytest.raises(BadField, match="none"):
        recognise({})
    # Completions without ranks are no ranking; they leave the row, so that nothing mistakes it for one.
    assert recognise({"prompt": "Hi", "completions": ["a", "b"]}) == "prompts"
    assert FORMATS["prompts"]({"prompt": "Hi", "completions": ["a", "b"], "x": 1}) == [{"prompt": "Hi", "x": 1}]


@pytest.mark.parametrize("format", ["prompts", "turns", "questions"])
def test_a_bare_prompt_keeps_no_column_that_would_make_it_another_kind_of_row(format: str) -> None:
    other = dict.fromkeys("messages completion text completions ranks margins finished".split(), "x")
    (row,) = FORMATS[format]({"prompt": "Hi", "turns": ["Hi"], **other, "answer": 1})
    assert set(row) == {"prompt", "turns", "answer"}


def changed(name: str, **fields: Any) -> tuple[str, dict]:
    format, raw, _ = GOLDEN[name]
    return format, {field: value for field, value in {**raw, **fields}.items() if value is not DROP}


DROP = object()
TREE = GOLDEN["oasst"][1]["prompt"]
BRANCHES = [reply("x", 0), reply("y", "first")]
DEEP = [reply("x", 0, {"text": 1, "role": "prompter"})]
TWICE = "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: b"
BAD: list[tuple[tuple[str, dict], str]] = [
    (changed("alpaca", instruction=DROP), "'instruction' is missing"),
    (changed("alpaca", instruction=None), "'instruction' is null"),
    (changed("alpaca", instruction=" "), "'instruction' is empty"),
    (changed("alpaca", input=7), r"'input' is int \(7\)"),
    (changed("alpaca", output=DROP), "'output' is missing; the row has 'instruction', 'input'"),
    (changed("alpaca", output=["3"]), "'output' is list"),
    (changed("alpaca", output=""), "'output' is empty"),
    (changed("instances", instruction=DROP), "'instruction' is missing"),
    (changed("instances", instruction=3), "'instruction' is int"),
    (changed("instances", instances=DROP), "'instances' is missing"),
    (changed("instances", instances=[]), "'instances' is an empty list"),
    (changed("instances", instances={"input": "", "output": "x"}), "'instances' is dict, expected a list"),
    (changed("instances", instances=["x"]), r"'instances\[0\]' is str"),
    (changed("instances", instances=[{"output": "x"}, {"output": None}]), r"'instances\[1\].output' is null"),
    (changed("sharegpt", conversations=DROP), "'conversations' is missing"),
    (changed("sharegpt", conversations=[]), "'conversations' is an empty list"),
    (changed("sharegpt", conversations=["Hi"]), r"'conversations\[0\]' is str"),
    (changed("sharegpt", conversations=[{"value": "Hi"}]), r"'conversations\[0\].from' is None, expected one of human"),
    (changed("sharegpt", conversations=[{"from": ["gpt"], "value": "x"}]), r"'conversations\[0\].from' is \['gpt'\]"),
    (changed("sharegpt", conversations=[{"from": "gpt"}]), r"'conversations\[0\].value' is missing"),
    (changed("sharegpt", conversations=[{"from": "gpt", "value": 1}]), r"'conversations\[0\].value' is int"),
    (changed("sharegpt", conversations=[{"from": "human", "value": "Hi"}]), "'conversations' has no assistant turn"),
    (changed("sharegpt", conversations=[{"from": "gpt", "value": " "}]), "'conversations' has no assistant turn"),
    (changed("messages", messages="Hi"), "'messages' is str"),
    (changed("messages", messages=[HI]), "'messages' has no assistant turn with text"),
    (changed("messages", messages=[HI, {"role": "bot", "content": "x"}]), r"'messages\[1\].role' is 'bot'"),
    (changed("messages", messages=[HI, {"role": "assistant", "content": None}]), r"'messages\[1\].content' is null"),
    (changed("prompt_completion", prompt=None), "'prompt' is null"),
    (changed("prompt_completion", prompt=[HI, YO]), "'prompt' ends with an assistant turn"),
    (changed("prompt_completion", completion=DROP), "'completion' is missing"),
    (changed("prompt_completion", completion=""), "'completion' is empty"),
    (changed("prompt_completion", completion=3), "'completion' is int"),
    (changed("prompt_completion", completion=[HI]), "'completion' has 1 turns, expected one by the assistant"),
    (changed("prompt_completion", completion=[YO, HI]), "'completion' has 2 turns"),
    (changed("pairs", prompt=""), "'prompt' is empty"),
    (changed("pairs", prompt=[HI, YO]), "'prompt' ends with an assistant turn"),
    (changed("pairs", chosen=None), "'chosen' is null"),
    (changed("pairs", chosen=DROP), "'chosen' is missing"),
    (changed("pairs", rejected=1.5), "'rejected' is float"),
    (changed("pairs", rejected=[HI]), "'rejected' has 1 turns, expected one by the assistant"),
    (changed("pairs with a margin", margin="0.5"), r"'margin' is str \('0.5'\), expected a number"),
    (changed("pairs with a margin", margin=True), "'margin' is bool"),
    (changed("pairs with a margin", margin=float("nan")), "'margin' is nan, expected a finite number"),
    (changed("pairs, sampled", finished=[True]), "'finished' has 1 entries for 2 completions"),
    (changed("pairs, sampled", finished=[True, 0]), r"'finished\[1\]' is 0, expected true or false"),
    (changed("pairs, implicit prompt", rejected=[WELL, NO]), "'rejected' answers another conversation than chosen"),
    (changed("pairs, implicit prompt", chosen=[YO], rejected=[NO]), "'chosen' has nothing that its last turn"),
    (changed("pairs, implicit prompt", chosen=[HI, YO, WELL], rejected=[HI]), "'chosen' ends with a turn of user"),
    (changed("pairs, implicit prompt", rejected=[HI, YO, WELL]), "'rejected' ends with a turn of user"),
    (changed("pairs, implicit prompt", chosen=[HI, YO, YO], rejected=[HI, YO, NO]), "'chosen' has nothing that"),
    (changed("pairs, UltraFeedback", rejected="No"), "'rejected' is str, expected a list"),
    (changed("hh", chosen=None), "'chosen' is null"),
    (changed("hh", rejected=""), "'rejected' is empty"),
    (changed("hh", rejected="\n\nHuman: Hi\n\nAssistant: No"), "'rejected' answers another conversation than chosen"),
    (changed("hh", chosen="Hi"), "'chosen' is not a dialogue"),
    (changed("hh", chosen="\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?"), "'chosen' is not a dialogue"),
    # A file whose texts were stripped: the first turn must not get lost.
    (changed("hh", chosen="Human: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant: Yo"), "'chosen' is not a dialogue"),
    (changed("hh", **dict.fromkeys(("chosen", "rejected"), TWICE)), "'chosen' has nothing that its last turn"),
    (changed("preferred", chosen=DROP), "'rejected' fits no known format"),
    (changed("preferred", chosen=GOLDEN["preferred"][1]["rejected"]), "'chosen' is empty"),
    (changed("nectar", prompt="\n\nHuman: Hi"), "'prompt' ends with '.*Human: Hi', expected a turn of the assistant"),
    (changed("nectar", prompt="\n\nAssistant: "), "'prompt' is not a dialogue"),
    (changed("nectar", answers=["Yo"]), r"'answers\[0\]' is str, expected answer and rank"),
    (changed("nectar", answers=[{"answer": "Yo"}]), r"'answers\[0\].rank' is NoneType"),
    (changed("nectar", answers=[{"answer": 1, "rank": 1}]), r"'answers\[0\].answer' is int"),
    (changed("oasst", prompt=None), "'prompt' is NoneType, expected a message of a tree"),
    (changed("oasst", prompt={**TREE, "text": None}), "'prompt.text' is null"),
    (changed("oasst", prompt={**TREE, "role": "user"}), "'prompt.role' is 'user', expected one of prompter, assistant"),
    (changed("oasst", prompt={**TREE, "role": []}), r"'prompt.role' is \[\]"),
    (changed("oasst", prompt={**TREE, "replies": "no"}), "'prompt.replies' is str"),
    (changed("oasst", prompt={**TREE, "replies": [None]}), r"'prompt.replies\[0\]' is NoneType"),
    (changed("oasst", prompt={**TREE, "replies": BRANCHES}), r"'prompt.replies\[1\].rank' is str"),
    (changed("oasst", prompt={**TREE, "replies": DEEP}), r"'prompt.replies\[0\].replies\[0\].text' is int"),
    (changed("pair_labels", preference=[0, 1, 2]), "'preference' is .*, expected six labels"),
    (changed("pair_labels", preference=[0, 1, 2, 0, 1, 3]), "'preference' is .*, expected six labels"),
    (changed("pair_labels", preference=["0"] * 6), "'preference' is .*, expected six labels"),
    (changed("pair_labels", preference=[True] * 6), "'preference' is .*, expected six labels"),
    (changed("pair_labels", preference=None), "'preference' is NoneType"),
    (changed("pair_labels", question=DROP), "'question' is missing"),
    (changed("pair_labels", **{"prediction 3": None}), "'prediction 3' is null"),
    (changed("unpaired", label=2), "'label' is 2, expected true or false"),
    (changed("unpaired", completion=None), "'completion' is null"),
    (changed("rankings", ranks=[0, 1]), "'ranks' has 2 entries for 3 completions"),
    (changed("rankings", ranks=DROP), "'ranks' is missing"),
    (changed("rankings", ranks=[0, "1", 2]), r"'ranks\[1\]' is str"),
    (changed("rankings", ranks=[0, True, 2]), r"'ranks\[1\]' is bool"),
    (changed("rankings", ranks=[0, 1, float("inf")]), r"'ranks\[2\]' is inf"),
    (changed("rankings", ranks=[0, None, 1]), r"'ranks\[1\]' is NoneType"),
    (changed("rankings", completions=["a"], ranks=[0]), "'completions' has one answer"),
    (changed("rankings", completions=["a", None, "c"]), r"'completions\[1\]' is null"),
    (changed("rankings", completions=["a", [HI], "c"]), r"'completions\[1\]' has 1 turns"),
    (changed("rankings", completions="abc"), "'completions' is str"),
    (changed("rankings with all there is", finished=[True]), "'finished' has 1 entries for 2 completions"),
    (changed("rankings with all there is", finished=[True, 0]), r"'finished\[1\]' is 0, expected true or false"),
    (changed("rankings with all there is", finished=True), "'finished' is bool"),
    (changed("rankings with all there is", margins=[1]), "'margins' has 1 entries"),
    (changed("rankings with all there is", margins=[1, "x"]), r"'margins\[1\]' is str"),
    (changed("rankings", ranks=[[0, 1, 2], 1, 0]), r"'ranks\[0\]' is list"),
    (changed("rankings", ranks=[[0, 1, 2], [1, 0]]), r"'ranks\[1\]' has 2 entries for 3 completions"),
    (changed("rankings", ranks=[[0, 1, 2], [1, 0, None]]), r"'ranks\[1\]\[2\]' is NoneType"),
    (changed("rankings of three people", shares=[1, 1, 1]), "'ranks' are of several people, and shares are given, too"),
    (changed("rankings told by shares", shares=[0.5, 0.5]), "'shares' has 2 entries for 3 pairs of completions"),
    (changed("rankings told by shares", shares=[0.5, 1.5, 0]), r"'shares\[1\]' is 1.5, expected a share between 0 and"),
    (changed("rankings told by scores", scores=[1, 2]), "'scores' has 2 entries for 3 completions"),
    (changed("rankings told by scores", scores=[1, 2, "3"]), r"'scores\[2\]' is str"),
    (changed("pairs with a share and scores", share=-0.1), "'share' is -0.1, expected a share between 0 and 1"),
    (changed("pairs with a share and scores", score_rejected="4"), "'score_rejected' is str"),
    (changed("grades", score=DROP), "'score' is NoneType"),
    (changed("grades", completion=None), "'completion' is null"),
    (changed("answers", completions=[]), "'completions' is an empty list"),
    (changed("answers", finished=[True]), "'finished' has 1 entries for 2 completions"),
    (changed("prompts", prompt=[HI, YO]), "'prompt' ends with an assistant turn"),
    (changed("prompts", prompt=DROP), "'prompt' is missing; the row has 'reference', 'level', 'tags'"),
    (changed("turns", turns=[]), "'turns' is an empty list"),
    (changed("turns", turns=[{"content": "Hi"}]), r"'turns\[0\]' is dict"),
    (changed("questions", prompt=[HI]), "'prompt' is list"),
    (changed("choices", answer="E"), "'answer' is 'E', expected A, B, C or D"),
    (changed("choices", answer="AB"), "'answer' is 'AB'"),
    (changed("choices", answer="a"), "'answer' is 'a'"),
    (changed("choices", answer=0), "'answer' is int"),
    (changed("choices", B=None), "'B' is null"),
    (changed("choices", question=" "), "'question' is empty"),
    (changed("text", text=None), "'text' is null"),
    (changed("text", text="\n"), "'text' is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_field_is_named(case: tuple[str, dict], says: str) -> None:
    format, raw = case
    with pytest.raises(BadField, match=f"^field {says}"):
        FORMATS[format](raw)


def test_one_person_of_a_list_is_no_share() -> None:
    row = {"prompt": "Hi", "completions": ["a", "b"], "ranks": [[1, 1]]}
    assert FORMATS["rankings"](row) == [{"prompt": "Hi", "completions": ["a", "b"], "ranks": [1.0, 1.0]}]


# Kills: what shares and scores tell put above given ranks.
def test_given_ranks_win_over_what_shares_and_scores_tell() -> None:
    row = {"prompt": "Hi", "completions": ["a", "b"], "ranks": [0, 1], "scores": [1, 9], "shares": [0.1]}
    assert FORMATS["rankings"](row)[0]["ranks"] == [0.0, 1.0]


def test_what_was_read_is_read_again_as_it_is() -> None:
    for name, (format, _, rows) in GOLDEN.items():
        if "completions" in rows[0] and "ranks" in rows[0]:
            assert [again for row in rows for again in FORMATS["rankings"](row)] == rows, name
        assert format in FORMATS


def test_every_format_has_bad_rows() -> None:
    assert {format for (format, _), _ in BAD} == set(FORMATS)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=4)
    | st.just("\n\nHuman: a\n\nAssistant:"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("role content from value text rank replies input output instruction".split()),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
COLUMNS = sorted({column for _, raw, _ in GOLDEN.values() for column in raw} | {"messages"})


@fuzz
@given(st.sampled_from(sorted(GOLDEN)), st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=3))
def test_a_reader_takes_a_row_or_names_a_field(name: str, junk: dict) -> None:
    format, raw, _ = GOLDEN[name]
    for reader in (FORMATS[format], lambda row: FORMATS[recognise(row)](row)):
        try:
            rows = reader({**raw, **junk})
        except BadField:
            continue
        assert all(isinstance(row, dict) for row in rows)

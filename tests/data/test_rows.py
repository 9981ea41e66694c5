import math

import pytest

from lit_align.data.messages import ROLES, messages_of, prompt_of
from lit_align.data.rows import (
    BadField,
    BadFile,
    BadRow,
    Rows,
    Tally,
    filled,
    list_of,
    number_of,
    text_of,
    user,
)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"b": 1, "c": 2}, "'a' is missing; the row has 'b', 'c'"),
        ({}, "'a' is missing; the row has no fields"),
        ({"a": None}, "'a' is null"),
        ({"a": 7}, r"'a' is int \(7\), expected text"),
        ({"a": 0.5}, r"'a' is float \(0.5\), expected text"),
        ({"a": True}, "'a' is bool"),
        ({"a": ["x"]}, "'a' is list"),
        ({"a": {"x": 1}}, "'a' is dict"),
        ({"a": "half \ud83d of a pair"}, "'a' is not valid Unicode"),
        ({"a": b"bytes \xff".decode(errors="surrogateescape")}, "'a' is not valid Unicode"),
    ],
)
def test_text_that_is_none(row: dict, says: str) -> None:
    with pytest.raises(BadField, match=f"^field {says}"):
        text_of(row, "a")


def test_text_comes_out_as_it_is() -> None:
    for value in ("", " a\n", "naïve 😀 \x00"):
        assert text_of({"a": value}, "a") == value
    assert text_of({}, "a", default="") == text_of({"a": None}, "a", default="") == ""
    with pytest.raises(BadField):  # a default is for what is not there, not for what is wrong
        text_of({"a": 7}, "a", default="")


@pytest.mark.parametrize("value", ["", " ", "\n\t"])
def test_filled_refuses_blank(value: str) -> None:
    with pytest.raises(BadField, match="'a' is empty"):
        filled({"a": value}, "a")
    assert filled({"a": " x "}, "a") == " x "


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "NoneType"),
        ("1", "str"),
        (True, "bool"),
        ([1], "list"),
        (math.nan, "finite"),
        (-math.inf, "finite"),
        (10**400, "finite"),
    ],
)
def test_number_that_is_none(value: object, says: str) -> None:
    with pytest.raises(BadField, match=f"'a' .*{says}"):
        number_of({"a": value}, "a")


def test_number() -> None:
    assert [number_of({"a": value}, "a") for value in (0, -2, 0.25)] == [0.0, -2.0, 0.25]
    assert isinstance(number_of({"a": 1}, "a"), float)


def test_list() -> None:
    assert list_of({"a": [0]}, "a") == [0]
    for row, says in [
        ({"b": 1}, "missing; the row has 'b'"),
        ({"a": None}, "NoneType, expected a list"),
        ({"a": "xy"}, "str, expected a list"),
        ({"a": []}, "empty list"),
    ]:
        with pytest.raises(BadField, match=f"'a' is .*{says}"):
            list_of(row, "a")


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ("hi", r"'m\[1\]' is str"),
        (None, r"'m\[1\]' is NoneType"),
        ({"content": "hi"}, r"'m\[1\].role' is None, expected one of system, user, assistant, tool"),
        ({"role": "human", "content": "hi"}, r"'m\[1\].role' is 'human'"),
        ({"role": ["user"], "content": "hi"}, r"'m\[1\].role' is \['user'\]"),
        ({"role": "user"}, r"'m\[1\].content' is missing"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"'m\[1\].content' is null"),
        ({"role": "user", "content": [{"type": "image"}]}, r"'m\[1\].content\[0\]' is of type 'image': only .* text"),
        ({"role": "user", "content": "\udc80"}, r"'m\[1\].content' is not valid Unicode"),
    ],
)
def test_message_that_is_none(turn: object, says: str) -> None:
    with pytest.raises(BadField, match=f"^field {says}"):
        messages_of({"m": [{"role": "user", "content": "x"}, turn]}, "m")


def test_messages_keep_role_and_content_alone() -> None:
    turns = [{"role": role, "content": role.upper(), "name": None, "weight": 1} for role in ROLES]
    assert messages_of({"m": turns}, "m") == [{"role": role, "content": role.upper()} for role in ROLES]


def test_prompt_is_text_or_a_conversation_that_awaits_an_answer() -> None:
    assert prompt_of({"prompt": "hi"}) == "hi"
    assert prompt_of({"prompt": user("hi")}) == [{"role": "user", "content": "hi"}]
    assert prompt_of({"q": [{"role": "system", "content": "be brief"}, *user("hi")]}, "q")[1]["content"] == "hi"
    for prompt, says in [
        ([*user("hi"), {"role": "assistant", "content": "Sure,"}], "ends with an assistant turn"),
        (user("  "), "is empty"),
        ([], "is an empty list"),
        ("\n", "is empty"),
        (None, "is null"),
        (3, "is int"),
    ]:
        with pytest.raises(BadField, match=f"'prompt' {says}"):
            prompt_of({"prompt": prompt})


def test_errors_name_the_place_and_the_way_out() -> None:
    problem = BadField("b", "is null").inside("a[2]")
    assert (problem.field, str(problem)) == ("a[2].b", "field 'a[2].b' is null")
    assert str(BadRow("f.json", 3, problem)) == (
        "f.json, row 3: field 'a[2].b' is null (mend the row, or set on_bad_row: skip to count and leave out)"
    )
    # Skipping rows does not help where the rest of a file is gone, and nobody is told that it would.
    assert "skip" not in str(BadFile("f.gz", "the file cannot be read to its end", "CRC"))
    assert not isinstance(BadFile("f", "g", "h"), BadRow)


def test_tally_remembers_the_first_skipped_and_hides_what_did_not_happen() -> None:
    tally = Tally()
    assert str(tally) == "no rows"
    tally["rows"] += 2312
    tally["empty_answers"] += 4
    tally["ties"] += 0
    tally.skip(BadRow("f", 1, "first"))
    tally.skip(BadRow("f", 2, "second"))
    text = str(tally)
    assert text.startswith("2,312 rows, 4 empty answers, 2 skipped; first skipped: f, row 1: first")
    assert "ties" not in text


def test_rows_of_the_user_must_iterate() -> None:
    class Mine(Rows):
        pass

    with pytest.raises(NotImplementedError, match="Mine must implement __iter__"):
        iter(Mine())

"""One raw row of each public format, and what it becomes."""

from __future__ import annotations

from typing import Any

HI = {"role": "user", "content": "Hi"}
YO = {"role": "assistant", "content": "Yo"}
NO = {"role": "assistant", "content": "No"}
WELL = {"role": "user", "content": "Well?"}


def reply(text: str, rank: Any = None, *replies: Any, role: str = "assistant") -> dict:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


# One raw row of each kind: (format, raw row, what it becomes).
GOLDEN: dict[str, tuple[str, dict, list[dict]]] = {
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [{"prompt": [{"role": "user", "content": "Add.\n\n1 2"}], "completion": "3"}],
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Yo", "text": "the three in one, as Alpaca's own file has it"},
        [{"prompt": [HI], "completion": "Yo"}],
    ),
    "instances": (
        "instances",
        {"instruction": "Hi", "instances": [{"input": "", "output": "Yo"}, {"input": "x", "output": "No"}]},
        [
            {"prompt": [HI], "completion": "Yo"},
            {"prompt": [{"role": "user", "content": "Hi\n\nx"}], "completion": "No"},
        ],
    ),
    "sharegpt": (
        "sharegpt",
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yo"},
                {"from": "tool", "value": "{}"},
                {"from": "user", "value": "Well?"},
                {"from": "assistant", "value": "No"},
            ],
        },
        [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    HI,
                    YO,
                    {"role": "tool", "content": "{}"},
                    WELL,
                    NO,
                ]
            }
        ],
    ),
    "sharegpt that the model begins": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Hi"}]},
        [{"messages": [YO, HI]}],
    ),
    "messages": ("messages", {"messages": [HI, YO], "source": "x"}, [{"messages": [HI, YO]}]),
    "prompt_completion": (
        "prompt_completion",
        {"prompt": "Hi", "completion": " Yo"},
        [{"prompt": "Hi", "completion": " Yo"}],
    ),
    "prompt_completion, conversational": (
        "prompt_completion",
        {"prompt": [HI], "completion": [YO]},
        [{"prompt": [HI], "completion": "Yo"}],
    ),
    "prompt_completion, the answer a turn": (
        "prompt_completion",
        {"prompt": "Hi", "completion": [YO]},
        [{"prompt": [HI], "completion": "Yo"}],
    ),
    "pairs": (
        "pairs",
        {"prompt": "Hi", "chosen": "Yo", "rejected": ""},
        [{"prompt": "Hi", "completions": ["Yo", ""], "ranks": [0.0, 1.0]}],
    ),
    "pairs with a margin": (
        "pairs",
        {"prompt": [HI], "chosen": "Yo", "rejected": "No", "margin": 2},
        [{"prompt": [HI], "completions": ["Yo", "No"], "ranks": [0.0, 1.0], "margins": [2.0, 0.0]}],
    ),
    "pairs with a share and scores": (
        "pairs",
        {"prompt": [HI], "chosen": "Yo", "rejected": "No", "share": 0.75, "score_chosen": 4, "score_rejected": 4.5},
        [
            {
                "prompt": [HI],
                "completions": ["Yo", "No"],
                "ranks": [0.25, 0.75],
                "shares": [0.75],
                "scores": [4.0, 4.5],
            }
        ],
    ),
    "unpaired": (
        "unpaired",
        {"prompt": [HI], "completion": [YO], "label": False},
        [{"prompt": [HI], "completions": ["Yo"], "ranks": [1.0], "scores": [0.0], "label": False}],
    ),
    "pairs, sampled": (
        "pairs",
        {"prompt": [HI], "chosen": "Yo", "rejected": "No", "margin": 2, "finished": [False, True]},
        [
            {
                "prompt": [HI],
                "completions": ["Yo", "No"],
                "ranks": [0.0, 1.0],
                "margins": [2.0, 0.0],
                "finished": [False, True],
            }
        ],
    ),
    "pairs, somebody's column of that name": (
        "pairs",
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "finished": True},
        [{"prompt": "Hi", "completions": ["Yo", "No"], "ranks": [0.0, 1.0]}],
    ),
    "pairs, Alpaca's columns": (
        "pairs",
        {"instruction": "Hi", "input": "x", "output": "unused", "rejected": "No", "chosen": "Yo"},
        [
            {
                "prompt": [{"role": "user", "content": "Hi\n\nx"}],
                "completions": ["Yo", "No"],
                "ranks": [0.0, 1.0],
            }
        ],
    ),
    "pairs, explicit conversational": (
        "pairs",
        {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
        [{"prompt": [HI], "completions": ["Yo", "No"], "ranks": [0.0, 1.0]}],
    ),
    "pairs, implicit prompt": (
        "pairs",
        {"chosen": [HI, YO], "rejected": [HI, NO]},
        [{"prompt": [HI], "completions": ["Yo", "No"], "ranks": [0.0, 1.0]}],
    ),
    "pairs, UltraFeedback": (  # the prompt column repeats the last question; the conversations know the rest
        "pairs",
        {"prompt": "Well?", "chosen": [HI, YO, WELL, YO], "rejected": [HI, YO, WELL, NO], "score_chosen": 8.0},
        [{"prompt": [HI, YO, WELL], "completions": ["Yo", "No"], "ranks": [0.0, 1.0]}],
    ),
    "pairs, answers as turns": (
        "pairs",
        {"prompt": "Hi", "chosen": [YO], "rejected": [NO]},
        [{"prompt": [HI], "completions": ["Yo", "No"], "ranks": [0.0, 1.0]}],
    ),
    "hh": (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant: Yo",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant:",
        },
        [{"prompt": [HI, YO, WELL], "completions": ["Yo", ""], "ranks": [0.0, 1.0]}],
    ),
    "preferred": (
        "preferred",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant: Yo",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant:",
        },
        [{"prompt": [HI, YO, WELL], "completion": "Yo"}],
    ),
    "nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Well?\n\nAssistant: ",
            "answers": [
                {"answer": "Yo", "model": "x", "rank": 2.0},
                {"answer": " No", "model": "y", "rank": 1.0},
                {"answer": "Ha", "model": "z", "rank": 2.0},
            ],
            "turns": 2,
            "num_responses": 3,
            "source": ["x"],
            "good_natured": True,
        },
        [{"prompt": [HI, YO, WELL], "completions": ["Yo", "No", "Ha"], "ranks": [2.0, 1.0, 2.0]}],
    ),
    "oasst": (
        "oasst",
        {
            "prompt": reply(
                "Hi",
                None,
                reply(
                    "Yo",
                    1,
                    reply("Well?", None, reply("a", 2), reply("b", 0), reply("c", None), role="prompter"),
                    reply("Ranked, but of the user", 0, reply("alone", 0), role="prompter"),
                    reply("Ranked too", 1, role="prompter"),
                ),
                reply("No", 0),
                role="prompter",
            )
        },
        [
            {"prompt": [HI, YO, WELL], "completions": ["a", "b"], "ranks": [2.0, 0.0]},
            {"prompt": [HI], "completions": ["Yo", "No"], "ranks": [1.0, 0.0]},
        ],
    ),
    "pair_labels": (
        "pair_labels",
        {"question": "Hi", **{f"prediction {i}": str(i) for i in (1, 2, 3, 4)}, "preference": [1, 1, 0, 2, 2, 2]},
        # 1 beats 2 and 3 and ties with 4; 3 beats 2; 4 beats 2 and 3: wins 2.5, 0, 1, 2.5.
        [{"prompt": [HI], "completions": ["1", "2", "3", "4"], "ranks": [0.0, 2.5, 1.5, 0.0]}],
    ),
    "rankings": (
        "rankings",
        {"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]},
        [{"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1.0, 0.0, 1.0]}],
    ),
    "rankings with all there is": (
        "rankings",
        {
            "prompt": "Hi",
            "completions": [[YO], "b"],
            "ranks": [0, 1],
            "margins": [0.5, -1],
            "finished": [True, False],
            "annotator": "x",
        },
        [
            {
                "prompt": [HI],
                "completions": ["Yo", "b"],
                "ranks": [0.0, 1.0],
                "margins": [0.5, -1.0],
                "finished": [True, False],
            }
        ],
    ),
    "rankings of three people": (
        "rankings",
        # The second puts b first, the third cannot tell b from c.
        {"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [[0, 1, 2], [1, 0, 2], [0, 1, 1]]},
        [
            {
                "prompt": "Hi",
                "completions": ["a", "b", "c"],
                "ranks": [round(1 / 3, 9), round(5 / 6, 9), round(11 / 6, 9)],
                "shares": [2 / 3, 1.0, 2.5 / 3],
            }
        ],
    ),
    "rankings told by shares": (
        "rankings",
        {"prompt": "Hi", "completions": ["a", "b", "c"], "shares": [0.5, 0.25, 0]},
        [{"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [1.25, 1.5, 0.25], "shares": [0.5, 0.25, 0.0]}],
    ),
    "rankings told by scores": (
        "rankings",
        {"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [3, 4.5, 3]},
        [{"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [-3.0, -4.5, -3.0], "scores": [3.0, 4.5, 3.0]}],
    ),
    "grades": (
        "grades",
        {"prompt": [HI], "completion": [YO], "score": 2, "level": 3},
        [{"prompt": [HI], "completions": ["Yo"], "ranks": [0.0], "scores": [2.0]}],
    ),
    "answers": (
        "answers",
        {"prompt": [HI], "completions": ["Yo", "No"], "finished": [True, False], "reference": "Yo"},
        [{"prompt": [HI], "completions": ["Yo", "No"], "finished": [True, False]}],
    ),
    "prompts": (
        "prompts",
        {"prompt": "Hi", "reference": "Yo", "level": 3, "tags": ["a"]},
        [{"prompt": "Hi", "reference": "Yo", "level": 3, "tags": ["a"]}],
    ),
    "turns": (
        "turns",
        {"question_id": 81, "turns": ["Hi", "Again."], "category": "writing"},
        [{"question_id": 81, "turns": ["Hi", "Again."], "category": "writing", "prompt": [HI]}],
    ),
    "questions": ("questions", {"prompt": "Hi", "label": "safe"}, [{"prompt": [HI], "label": "safe"}]),
    "choices": (
        "choices",
        {"question": "Hi", "A": "a", "B": "b", "C": "", "D": "d", "answer": "C"},
        [
            {
                "prompt": [{"role": "user", "content": "Hi\nA. a\nB. b\nC. \nD. d"}],
                "completions": ["A", "B", "C", "D"],
                "ranks": [1.0, 1.0, 0.0, 1.0],
            }
        ],
    ),
    "text": ("text", {"text": " Once.\n", "meta": 1}, [{"text": " Once.\n"}]),
}

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conversations.conftest import sharegpt
from thimble.conversations.records import Conversation, Turn, parse


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PLAIN = Conversation((Turn("q", "a"),))


@pytest.mark.parametrize(
    ("record", "conversation"),
    [
        (sharegpt("q", "a"), PLAIN),
        ({"messages": [message("user", "q"), message("assistant", "a")]}, PLAIN),
        ({"prompt": "q", "response": "a"}, PLAIN),
        ({"question": "q", "answer": "a"}, PLAIN),
        ({"input": "q", "output": "a"}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
        (
            {"instruction": "do", "input": "it", "output": "a"},
            Conversation((Turn("do\n\nit", "a"),)),
        ),
        (
            {"id": "x", "system_prompt": "s", "question": "q", "response": "a"},
            Conversation((Turn("q", "a"),), "s"),
        ),
        ({"system_prompt": "", "question": "q", "response": "a"}, PLAIN),
        (sharegpt("q", "a", "r", "b"), Conversation((Turn("q", "a"), Turn("r", "b")))),
        (sharegpt("q", "a", group="g", weight=0.5), Conversation((Turn("q", "a"),), "", 0.5, "g")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": None},
                    {"from": "human", "value": "q", "weight": 0.0},
                    {"from": "gpt", "value": "a", "weight": 0.25},
                ]
            },
            Conversation((Turn("q", "a", 0.25),), "s"),
        ),
    ],
)
def test_every_form_gives_the_same_conversation(
    record: dict[str, Any], conversation: Conversation
) -> None:
    assert parse(record) == conversation
    assert parse(json.dumps(record).encode() + b"\n") == conversation


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"conversations": [', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not an object"),
        ({}, "its keys are: nothing"),
        ({"text": "t", "id": 1}, "its keys are: text, id"),
        ({"response": "a", "id": 1}, "no prompt; its keys are: response, id"),
        ({"conversations": []}, "its keys are: conversations"),
        ({"question": "q", "response": ["a"]}, "response is not a text, but list"),
        ({"question": "q", "response": " \n"}, "an empty response"),
        (sharegpt("q", "  "), "an empty turn of gpt"),
        (sharegpt("q"), "the last question has no answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "do not alternate"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "a turn by 'tool'; known are human"),
        ({"conversations": [{"from": "human", "value": None}]}, "has no text"),
        ({"conversations": ["hello"]}, "a turn that is not an object"),
        (
            {"messages": [message(role, "x") for role in ("user", "assistant", "system")]},
            "beginning",
        ),
        (b'{"question": "q", "answer": "\\ud83d"}', "half a character"),
        (sharegpt("q", "a", weight=-1), "a weight of -1"),
        (sharegpt("q", "a", weight=float("nan")), "a weight of nan"),
    ],
)
def test_what_is_wrong_is_named(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(record)


def test_the_weight_of_an_example_is_that_of_its_answers() -> None:
    turns = (Turn("q", "a", 0.0), Turn("q", "a", 0.5), Turn("q", "a", 1.0))
    assert Conversation(turns, weight=2.0).loss_weight == 1.5
    assert Conversation(turns[:1]).loss_weight == 0
    assert Conversation(turns, weight=0.0).loss_weight == 0

"""The data sets of the plans: records as they have them become text."""

from __future__ import annotations

from typing import Any

import pytest

from thimble.corpora import plans
from thimble.corpora.download import Downloads, download
from thimble.corpora.plans import Mismatch

LONG = "which is long enough to be kept by whoever counts its characters"

# One record of each, with the fields that the data sets have.
RECORDS: dict[str, Any] = {
    "openhermes": {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": LONG, "weight": None},
            {"from": "gpt", "value": "Yes."},
        ],
        "category": None,
    },
    "ultrachat": {
        "prompt": "p",
        "messages": [{"content": LONG, "role": "user"}, {"content": "Yes.", "role": "assistant"}],
    },
    "openorca": {"id": "1", "system_prompt": "", "question": LONG, "response": "Yes."},
    "sharegpt": {"id": "1", "conversations": [{"from": "human", "value": LONG}]},
    "alpaca_gpt4": {"instruction": LONG, "input": "", "output": "Yes.", "text": "t"},
    "dolly": {"instruction": LONG, "context": "c", "response": "Yes.", "category": "qa"},
    "starcoderdata": {"content": LONG, "max_stars_count": 1},
    "codealpaca": {"instruction": LONG, "input": "5", "output": "Yes."},
    "code_contests": {
        "description": LONG,
        "solutions": {"language": [1, 3], "solution": ["print(1)", "print(2)"]},
    },
    "apps": {"question": LONG, "solutions": '["print(1)", "print(2)"]', "starter_code": ""},
    "codesearchnet": {"whole_func_string": LONG, "func_code_string": "c"},
    "mbpp": {"task_id": 1, "text": LONG, "code": "print(1)", "test_list": ["assert 1"]},
    "numinamath": {"source": "s", "problem": LONG, "solution": "1", "messages": []},
    "gsm8k": {"question": LONG, "answer": "1 #### 1"},
    "metamath": {"type": "t", "query": LONG, "original_question": "o", "response": "1"},
    "orca_math": {"question": LONG, "answer": "1"},
    "mathinstruct": {"source": "s", "instruction": LONG, "output": "1"},
    "natural_questions": {
        "question": {"text": LONG, "tokens": ["a"]},
        "annotations": {"short_answers": [{"text": []}, {"text": ["one", "two"]}]},
    },
    "hotpot_qa": {"question": LONG, "answer": "yes", "context": {"title": ["t"]}},
    "squad_v2": {"context": "c", "question": LONG, "answers": {"text": ["one"]}},
    "trivia_qa": {"question": LONG, "answer": {"value": "one", "aliases": ["1"]}},
    "web_questions": {"question": LONG, "answers": ["one", "two"]},
}


@pytest.mark.parametrize("name", [n for n, each in plans.SOURCES.items() if not each.gone])
def test_the_fields_of_each_data_set_become_text(name: str) -> None:
    each = plans.SOURCES[name]
    text = each.text(RECORDS[name])
    if name == "sharegpt":
        assert text == ""  # nobody answers
    else:
        assert LONG in text
        assert "None" not in text
    assert set(each.columns) <= set(RECORDS[name])
    with pytest.raises(Mismatch, match=f"no field {each.columns[0]}"):
        each.text({"something": "else"})


def test_the_forms_of_text() -> None:
    text = {name: plans.SOURCES[name].text(record) for name, record in RECORDS.items()}
    assert text["openhermes"] == f"System: Be kind.\n\nUser: {LONG}\n\nAssistant: Yes."
    assert text["metamath"] == f"Problem: {LONG}\n\nSolution: 1"
    assert text["dolly"] == f"User: {LONG}\n\nInput: c\n\nAssistant: Yes."
    assert text["alpaca_gpt4"] == f"User: {LONG}\n\nAssistant: Yes."
    assert text["apps"] == f"Problem: {LONG}\n\nSolution: print(1)"
    assert text["natural_questions"] == f"Question: {LONG}\n\nAnswer: one"
    assert text["starcoderdata"] == LONG
    squad = plans.SOURCES["squad_v2"]
    assert squad.text({"context": "c", "question": LONG, "answers": {"text": []}}) == ""


def test_plans_name_data_sets_that_there_are() -> None:
    for each in plans.PLANS.values():
        assert set(each.caps) <= set(plans.SOURCES)
    assert {plans.SOURCES[name].category for name in plans.PLANS["curriculum"].caps} == set(
        plans.CATEGORIES
    )
    assert isinstance(download("poc", status=True), Downloads)

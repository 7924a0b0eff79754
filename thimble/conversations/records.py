"""A record of a file, in any of the forms that are in use, as a conversation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thimble.corpora.local import ROLES

SYSTEM = ("system_prompt", "system")
PROMPTS = ("prompt", "question", "instruction", "input")
ANSWERS = ("response", "output", "answer")


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the weight of the answer in the loss (0: not trained on)."""

    question: str
    answer: str
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Turns in their order. ``group``: what no split may divide; "" where nothing is said."""

    turns: tuple[Turn, ...]
    system: str = ""
    weight: float = 1.0
    group: str = ""

    @property
    def loss_weight(self) -> float:
        """Of the example: the record's, times the mean of its answers that are trained on."""
        weights = [turn.weight for turn in self.turns if turn.weight > 0]
        return self.weight * sum(weights) / len(weights) if weights else 0.0


def parse(record: bytes | Mapping[str, Any]) -> Conversation:
    """One line of JSONL, or one row of a table. ValueError says what is wrong with it."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"not an object, but {type(record).__name__}")
    said = record.get("conversations") or record.get("messages")
    if isinstance(said, list):
        system, turns = _turns(said)
    elif answer_key := next((key for key in ANSWERS if record.get(key)), None):
        system, turns = _pair(record, answer_key)
    else:
        keys = ", ".join(list(map(str, record))[:8]) or "nothing"
        raise ValueError(
            "neither conversations, messages nor a prompt with its response; its keys are: " + keys
        )
    found = Conversation(turns, system, _weight(record), str(record.get("group") or ""))
    try:
        "".join([system, found.group, *(t.question + t.answer for t in turns)]).encode()
    except UnicodeEncodeError:
        raise ValueError("a text with half a character (a lone surrogate)") from None
    return found


def _turns(said: list[Any]) -> tuple[str, tuple[Turn, ...]]:
    system: list[str] = []
    talk: list[tuple[str, float]] = []
    for turn in said:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn that is not an object, but {type(turn).__name__}")
        name = turn.get("from") or turn.get("role")
        value = turn.get("value") if "value" in turn else turn.get("content")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise ValueError(f"a turn by {name!r}; known are {', '.join(ROLES)}")
        if not isinstance(value, str):
            raise ValueError(f"the turn of {name} has no text, but {type(value).__name__}")
        if role == "system":
            if talk or system:
                raise ValueError("a system message that does not stand at the beginning")
            system.append(value)
            continue
        if role != ("human", "gpt")[len(talk) % 2]:
            raise ValueError("the turns do not alternate between human and gpt")
        if not value.strip():
            raise ValueError(f"an empty turn of {name}")
        talk.append((value, _weight(turn)))
    if not talk or len(talk) % 2:
        raise ValueError("the last question has no answer" if talk else "no turns")
    turns = tuple(Turn(talk[i][0], talk[i + 1][0], talk[i + 1][1]) for i in range(0, len(talk), 2))
    return "".join(system), turns


def _pair(record: Mapping[str, Any], answer_key: str) -> tuple[str, tuple[Turn, ...]]:
    prompt_key = next((key for key in PROMPTS if record.get(key)), None)
    if prompt_key is None:
        raise ValueError(f"an answer, but no prompt; its keys are: {', '.join(map(str, record))}")
    used = [prompt_key]
    if prompt_key == "instruction" and record.get("input"):
        used.append("input")
    system_key = next((key for key in SYSTEM if record.get(key)), None)
    for key in (*used, answer_key, *([system_key] if system_key else [])):
        if not isinstance(record[key], str):
            raise ValueError(f"{key} is not a text, but {type(record[key]).__name__}")
    question, answer = "\n\n".join(record[key] for key in used), record[answer_key]
    if not question.strip() or not answer.strip():
        raise ValueError(f"an empty {answer_key if question.strip() else prompt_key}")
    return record[system_key] if system_key else "", (Turn(question, answer),)


def _weight(holder: Mapping[str, Any]) -> float:
    weight = holder.get("weight")
    if weight is None:
        return 1.0
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"a weight of {weight!r}, which must be a number that is not negative")
    return float(weight)

"""The schema in words: every key with its type and range, and the nearest one to a misspelt key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from thimble.config.schema import Config


@cache
def keys() -> dict[str, FieldInfo]:
    """Every key that holds a value, dotted, in the order of the schema."""
    return dict(_walk(Config, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def nearest_key(key: str, choices: Iterable[str]) -> str | None:
    """The key that was most likely meant: by its last part, its initials (lr), and its group."""
    group, _, tail = key.replace("-", "_").rpartition(".")

    def likeness(choice: str) -> float:
        other_group, _, other = choice.rpartition(".")
        score = difflib.SequenceMatcher(None, tail, other).ratio()
        if tail == "".join(word[0] for word in other.split("_")):
            score = max(score, 0.9)
        elif f"_{tail}_" in f"_{other}_":
            score = max(score, 0.7)
        return score + (0.2 if group and group == other_group else 0)

    best = max(choices, key=likeness)
    return best if likeness(best) >= 0.65 else None


def nearest_word(word: str, choices: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.4)
    return close[0] if close else None


def as_override(value: Any) -> str:
    """A value as one writes it on the right of ``key=``."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def choices_of(field: FieldInfo) -> list[str]:
    """The words a field takes; empty unless it takes only certain words."""
    return list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []


def is_text(field: FieldInfo) -> bool:
    kinds = [kind for kind in _alternatives(field) if kind is not type(None)]
    return kinds == [str] or bool(choices_of(field))


def describe_type(field: FieldInfo) -> str:
    """The type of a field in words, such as "a number or null"."""
    if choices := choices_of(field):
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    found = []
    for kind in _alternatives(field):
        if get_origin(kind) is list:
            found.append("a list of texts" if get_args(kind)[0] is str else "a list of numbers")
        else:
            found.append("null" if kind is type(None) else words[kind])
    return " or ".join(found)


def describe_range(field: FieldInfo) -> str:
    """The bounds of a field in words, such as "above 0, at most 1"; empty if it has none."""
    found = _bounds(field.metadata)
    for rule in field.metadata:
        if hasattr(rule, "max_length"):
            found.insert(0, f"of {rule.max_length} entries")
        elif hasattr(rule, "min_length") and field.annotation is str:
            found.append("not empty")
    for kind in _alternatives(field):
        if get_origin(kind) is list and get_origin(item := get_args(kind)[0]) is Annotated:
            found.append(f"each {', '.join(_bounds(item.__metadata__[0].metadata))}")
    return ", ".join(found)


def _alternatives(field: FieldInfo) -> list[Any]:
    """The types a field takes: ``float | None`` gives both."""
    is_union = isinstance(field.annotation, UnionType)
    return list(get_args(field.annotation)) if is_union else [field.annotation]


def _bounds(rules: Iterable[Any]) -> list[str]:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return [
        f"{word} {as_override(getattr(rule, name))}"
        for rule in rules
        for name, word in words.items()
        if getattr(rule, name, None) is not None
    ]

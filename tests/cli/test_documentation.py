"""What the documentation says of commands, keys and statuses is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_cli import Command
from thimble import api, errors
from thimble.config.load import load, recipe_names

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "commands.md").read_text(encoding="utf-8")
PLAYBOOK = (DOCS / "recursive.md").read_text(encoding="utf-8")
STUDENTS = (DOCS / "distillation.md").read_text(encoding="utf-8")
COMMANDS = {
    line
    for page in (PAGE, PLAYBOOK, STUDENTS)
    for found in re.findall(r"`thimble ([a-z][^`]*)`|^thimble ([a-z].*)$", page, re.MULTILINE)
    for line in found
    if line
}


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_every_command_of_the_documentation_is_one(
    thimble_command: Command, calls: list[Any], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(api, "inspect", lambda path: calls.append(("inspect", (path,), {})))
    answer = thimble_command(*shlex.split(line.replace("[KEY]", "optim")))
    assert answer.status == 0, answer.err
    for name, args, _ in calls:
        if name in ("plan", "train") and args[0] not in (None, "RUN"):
            load(args[0], [word for word in args[1:] if word not in recipe_names()])


def test_every_key_of_the_old_playbook_is_understood() -> None:
    """What the page calls "the same" among the keys; the other documents' names are translated."""
    table = PLAYBOOK.partition("## Keys")[2].partition("## Files")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    known = [
        (word if "=" in word else f"{word}={value}")
        for row in rows
        if row[1].lstrip("| ").startswith("the same")
        for word in re.findall(r"`([^`]+)`", row[0])
        if re.fullmatch(r"[a-zA-Z_.]+(=\S+)?", word) and word != "null"
        for value in [VALUES.get(word, "8")]
    ]
    assert len(known) > 20
    for word in known:
        load("instruct_slimorca", [word])
    for ours in {word for row in rows for word in re.findall(r"`([^`]+)`", row[1])}:
        if re.match(r"[a-z]+[a-zA-Z_.]*=", ours):
            load("instruct_slimorca", ours.split())


def test_every_key_of_the_old_quickstart_is_understood() -> None:
    """Theirs, also as options, give what ours beside them give."""
    table = STUDENTS.partition("## Keys")[2].partition("## What")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    beside = {"teacher.url": ["teacher.mode=served", "objective.temperature=1"]}
    for row in rows:
        theirs, ours = (re.findall(r"`([^`=]+=[^`]+)`", cell) for cell in row[:2])
        assert len(theirs) == len(ours)
        for word, key in zip(theirs, ours, strict=True):
            name, _, value = word.partition("=")
            more = ["teacher.path=M", *beside.get(key.partition("=")[0], [])]
            more += ["teacher.url=http://localhost:1", "objective.temperature=1"] * (
                value == "network"
            )
            wanted = load("distill_direct", [*more, *key.split()])
            assert load("distill_direct", [*more, word]) == wanted
            assert load("distill_direct", [*more, f"--{name.replace('_', '-')}", value]) == wanted
    assert len(rows) > 10


VALUES = {"dataset.data_dir": "x", "arch.halt_exploration_prob": "0.1", "arch.L_cycles": "2"} | {
    "dataset.tokenizer_path": "t"
}


def test_the_statuses_are_those_of_the_documentation() -> None:
    table = PAGE.partition("## Exit status")[2]
    for kind in errors.ThimbleError.__subclasses__():
        if kind.__module__ == errors.__name__:
            assert f"| {kind.status} |" in table
    for status in (0, 1, 130):
        assert f"| {status} |" in table

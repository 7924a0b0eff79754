"""What the command line shows: a result or an error, as text for a person or as one JSON object."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from thimble.console import log
from thimble.errors import ThimbleError


def as_data(result: Any) -> Any:
    """A result of ``thimble.api`` as what JSON can hold; NaN and Inf, which it cannot, are null."""
    if hasattr(result, "to_dict"):
        result = result.to_dict()
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): as_data(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [as_data(value) for value in result]
    if isinstance(result, float) and not math.isfinite(result):
        return None
    if result is None or isinstance(result, bool | int | float | str):
        return result
    return str(result)


def show(result: Any, *, as_json: bool) -> int:
    """Print what a verb returned; the exit status is 3 if it was a judgement and not passed."""
    if isinstance(result, Path):
        result = {"path": result}
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        try:
            _print(result, as_json)
            sys.stdout.flush()  # here, so that a full disk is an error and not an afterthought
        except BrokenPipeError:  # `thimble recipes | head -1`: the reader has what it wanted
            give_up_stdout()
    return 3 if getattr(result, "accepted", True) is False else 0


def _print(result: Any, as_json: bool) -> None:
    data = as_data(result)
    if as_json:
        print(json.dumps(data, ensure_ascii=False))
    elif hasattr(result, "render"):
        result.render(console())
    elif data is not None:
        warnings = data.pop("warnings", None) or []
        show_table(data)
        for warning in warnings:
            log.warning("%s", warning)


def give_up_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's exit does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Any:
    """Standard output; wider than a terminal's 80 columns where it is a file or a pipe."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:  # Rich would exit with status 1
            raise BrokenPipeError

    return Output(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def show_table(data: Mapping[str, Any]) -> None:
    """A single list of records as a table of records, anything else as keys and values."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    records = next(iter(data.values())) if len(data) == 1 else None
    if isinstance(records, list) and records and isinstance(records[0], dict):
        table.show_header = True
        for name, value in records[0].items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for record in records:
            table.add_row(*(Text(_words(value)) for value in record.values()))
    else:
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, value in _lines(data):
            table.add_row(key, Text(value))
    console().print(table)


def _lines(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        key = prefix + (name.replace("_", " ") if name.isidentifier() else name)
        if isinstance(value, dict) and value:
            yield from _lines(value, f"{key} / ")
        else:
            yield key, "none" if value is None or value == {} else _words(value)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list):
        return "\n".join(_words(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def show_error(
    error: BaseException, arguments: Sequence[str], *, as_json: bool, verbose: bool
) -> int:
    """Say what was wrong and what to do, once; returns the exit status."""
    message, status = explain_error(error, arguments)
    # Of torchrun's processes one speaks: what was typed and what it names is the same for all.
    others = os.environ.get("LOCAL_RANK", "0") != "0" and status in (2, 5)
    if getattr(error, "spoken_for", others):
        return status
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    try:
        if as_json:
            print(json.dumps({"error": message, "status": status}, ensure_ascii=False))
        sys.stdout.flush()
        if as_json:
            return status
    except OSError:  # standard output is what failed
        give_up_stdout()
    print(f"error: {message}" if status not in (75, 130) else message, file=sys.stderr)
    return status


def explain_error(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """The message and the exit status of any exception that ended a verb."""
    if isinstance(error, typer.TyperException):
        return _usage_problem(error, arguments), 2
    if isinstance(error, ThimbleError):
        message, right = str(error), getattr(error, "right", None)
        line = correct(arguments, getattr(error, "wrong", ""), right) if right else None
        return message.replace(f"\n  {right}", f"\n  {line}") if line else message, error.status
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "Interrupted.", 130
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"The system refused{where}: {error.strerror}.", 6
    message = f"Unexpected {type(error).__name__}: {str(error).strip() or 'no message'}"
    if {"-v", "--verbose"}.isdisjoint(arguments):
        message += f"\nThe traceback is shown by:\n  {shlex.join(['thimble', '-v', *arguments])}"
    return message, 1


def correct(arguments: Sequence[str], wrong: str, right: str) -> str | None:
    """The command line as it was meant, ready to paste; None if the wrong word is not found."""
    words = list(arguments)
    for index, word in enumerate(words):
        if word.lstrip("-+") == wrong.lstrip("-"):
            words[index] = right
        elif word.startswith("--") and " ".join(words[index : index + 2]) == "--" + wrong.replace(
            "=", " ", 1
        ):
            words[index : index + 2] = [right]
        elif word.startswith(f"{wrong}="):
            words[index] = right + word.removeprefix(wrong)
        else:
            continue
        return shlex.join(["thimble", *words])
    return None


def _usage_problem(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """A usage error of the parser, with the nearest right command line."""
    context: Any = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "thimble")
    if context is not None and (option := getattr(error, "option_name", None)):
        message, wrong = f"{path} has no option {option}.", str(option)
        names = {name for parameter in context.command.params for name in parameter.opts}
        choices = sorted(name for name in names if name.startswith("-"))
        if not hasattr(error, "possibilities"):  # a known option, wrongly used
            return f"{error.format_message()}\nHow to use it:\n  {path} --help"
    elif found := re.fullmatch(r"No such command '(.*)'\.", error.message):
        wrong, choices = found[1], sorted(context.command.commands)
        message = f"{path} has no command {wrong}."
    else:
        return f"{error.format_message()}\nHow to use it:\n  {path} --help"
    close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    line = correct(arguments, wrong, close[0]) if close else None
    if line:
        return f"{message} Did you mean:\n  {line}"
    return f"{message} There are: {', '.join(choices)}."

"""The frame of the command ``thimble``: its groups, and what every verb of them has in common."""

from __future__ import annotations

import functools
import inspect as signatures
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from thimble import __version__
from thimble.console import setup
from thimble.terminal import show

FIRST = ("data", "corpus", "tokens", "conversations", "puzzles", "teacher")


class InOrder(TyperGroup):
    """The verbs in the order in which one uses them, not groups last."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=lambda name: name not in FIRST)


app = typer.Typer(
    cls=InOrder,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train small language models on one machine, and show that what came out is real.",
    epilog="Exit status: 0 done or accepted, 1 unexpected, 2 usage or configuration, "
    "3 not accepted, 4 stopped by a guard, 5 bad input data, 6 environment, "
    "75 interrupted and resumable, 130 interrupted.",
)
data_app = typer.Typer(suggest_commands=False)
corpus_app = typer.Typer(suggest_commands=False)
tokens_app = typer.Typer(suggest_commands=False)
conversations_app = typer.Typer(suggest_commands=False)
puzzles_app = typer.Typer(suggest_commands=False)
puzzles_build_app = typer.Typer(suggest_commands=False)
export_app = typer.Typer(suggest_commands=False)
teacher_app = typer.Typer(suggest_commands=False)
app.add_typer(data_app, name="data", help="Data sets of the hub as JSONL files.")
app.add_typer(corpus_app, name="corpus", help="Sources to clean, deduplicated documents.")
app.add_typer(tokens_app, name="tokens", help="Documents to a tokenizer and shards.")
app.add_typer(
    conversations_app, name="conversations", help="Instruction data to tokens with labels."
)
app.add_typer(puzzles_app, name="puzzles", help="Sudoku, mazes and ARC as data sets.")
puzzles_app.add_typer(puzzles_build_app, name="build", help="Make a data set of puzzles.")
app.add_typer(teacher_app, name="teacher", help="Whom a student learns from.")
app.add_typer(export_app, name="export", help="A checkpoint in the form of other programs.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and the result only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Details, and tracebacks.")]


class Output:
    """How to answer; the flags may stand before and after the verb."""

    json = False
    verbosity = 0

    def want(self, json: bool, quiet: bool, verbose: bool) -> None:
        self.json |= json
        self.verbosity = -1 if quiet else 1 if verbose else self.verbosity
        setup(self.verbosity)


output = Output()


def verb(group: typer.Typer, name: str, *, overrides: bool = False) -> Callable[..., Any]:
    """Register a function as a command that also takes --json, -q and -v, and show its result."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: Any, json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
            output.want(json, quiet, verbose)
            return show(function(*args, **options), as_json=output.json)

        flags = {"json": Json, "quiet": Quiet, "verbose": Verbose}
        own = signatures.signature(function, eval_str=True)
        parameters = list(own.parameters.values()) + [
            signatures.Parameter(
                flag, signatures.Parameter.KEYWORD_ONLY, default=False, annotation=kind
            )
            for flag, kind in flags.items()
        ]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        settings = {"ignore_unknown_options": True} if overrides else {}
        return group.command(name, context_settings=settings)(command)

    return register


def want_json(wanted: bool | None) -> bool:
    output.json |= bool(wanted)
    return output.json


def print_version(wanted: bool | None) -> None:
    if wanted:
        print(json.dumps({"version": __version__}) if output.json else f"thimble {__version__}")
        raise typer.Exit


@app.callback()
def before_the_verb(
    json: Annotated[
        bool,
        # Eager, so that --version already knows.
        typer.Option("--json", is_eager=True, callback=want_json, help="One JSON object."),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, help="The version, and exit.")
    ] = False,
) -> None:
    output.want(json, quiet, verbose)

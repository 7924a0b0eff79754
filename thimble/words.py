"""The words of the command line: what completes them, what they mean, what is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from thimble.errors import ConfigError

# ---------------------------------------------------------------------------- what is completed


def complete_recipe(incomplete: str) -> Iterator[tuple[str, str]]:
    from thimble.config.load import recipe_names, recipe_summary

    for name in recipe_names():
        if name.startswith(incomplete):
            yield name, recipe_summary(name)


def complete_override(incomplete: str) -> Iterator[tuple[str, str]]:
    from thimble.config.describe import choices_of, keys
    from thimble.config.load import group_choices

    words = {f"{key}=": field.description or "" for key, field in keys().items()}
    for key, field in keys().items():
        if incomplete.startswith(f"{key}="):
            words |= {f"{key}={choice}": "" for choice in choices_of(field)}
    for group, choices in group_choices().items():
        words |= {f"{group}={choice}": f"another {group}" for choice in choices}
    for word, description in words.items():
        if word.startswith(incomplete):
            yield word, description


def complete_key(incomplete: str) -> Iterator[tuple[str, str]]:
    from thimble.config.describe import keys

    for key, field in keys().items():
        if key.startswith(incomplete):
            yield key, field.description or ""


# -------------------------------------------------------------------------------------- words

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe, or the path of a run's config.yaml.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Any key of `thimble explain`; --key=value and --key value are understood too.",
        autocompletion=complete_override,
    ),
]
Retry = Annotated[
    int | None,
    typer.Option(min=0, help="Mend a stopped run so often; default: 3 without a terminal, or 0."),
]
Checkpoint = Annotated[str, typer.Argument(help="Checkpoint folder, or a run (its best one).")]
CheckpointWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or a run (its best one)."),
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="The same, as an option.")
]
OutputFile = Annotated[str | None, typer.Option("--output", "-o", help="File to write.")]
NewFolder = Annotated[str, typer.Option("--output", "-o", help="Folder to write; must be new.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as is.")]
HeldOut = Annotated[
    str | None, typer.Option(help="Tokens to check on, for a checkpoint of another program.")
]
OutputFolder = Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")]
Source = Annotated[
    str | None,
    typer.Option("--from", help="Folder with train.csv and test.csv, or a data set of the hub."),
]
Generate = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Make so many for train, without any file.")
]
GenerateTest = Annotated[
    int | None, typer.Option("--test", min=1, metavar="N", help="And for test; default: a tenth.")
]
Subsample = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Draw so many training puzzles.")
]
PuzzleSeed = Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
TeacherModel = Annotated[
    str,
    typer.Argument(
        metavar="TEACHER", help="Folder, run of ours, model on the hub, or address of a server."
    ),
]
TeacherTokens = Annotated[str, typer.Argument(metavar="TOKENS", help="Folder of the data.")]
RowLength = Annotated[
    int | None, typer.Option("--sequence-length", metavar="N", help="Tokens of a student's row.")
]
Adapter = Annotated[str | None, typer.Option(help="Folder of a PEFT adapter of the teacher.")]
RamDisk = Annotated[
    bool, typer.Option("--ram-disk", help="Copy the weights to /dev/shm for loading them.")
]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
SystemMessage = Annotated[
    str | None, typer.Option(help="Another system message; for models of conversations.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="0: always the likeliest token. Default: 0.8; for models of conversations 0."
    ),
]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from this share of probability.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        *("--max-tokens", "--max-output-tokens"),
        min=1,
        help="Longest answer, in tokens. Default: 128; for models of conversations half of the "
        "sequence length.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Supervision steps of a recursive model. Default: what its halting head asks."
    ),
]


def settings_of(words: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split words into plain ones and ``key=value`` settings, each key one of ``known``."""
    from thimble.config.load import Misspelt

    plain, settings = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            plain.append(word)
        elif key in known:
            settings[key] = value
        else:
            close = difflib.get_close_matches(key, known, n=1)
            right = f"{close[0]}={value}" if close else None
            raise Misspelt(f"There is no {key} here.", word, right, f"Known: {', '.join(known)}.")
    return plain, settings


def checkpoint_and_overrides(
    words: Sequence[str] | None,
    option: str | None,
    overrides: Sequence[str] | None,
    known: Sequence[str],
) -> tuple[str, dict[str, str]]:
    """The one checkpoint given as a word or as an option, and the settings among the words: those
    of ``--overrides a=1 b=2``, of which the parser gives the option only the first."""
    plain, settings = settings_of([*(words or []), *(overrides or [])], known)
    given = [*([option] if option else []), *plain]
    if len(given) != 1:
        said = f"There are {len(given)}: {', '.join(given)}." if given else "None is given."
        raise ConfigError(f"Which checkpoint? {said} A checkpoint folder, or a run, is named once.")
    return given[0], settings


def named_outputs(words: Sequence[str], given: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Checkpoints, and names of ``--save-outputs a b`` or ``a,b``: the parser gives the option the
    first one only."""
    outputs = [name for value in given or [] for name in value.split(",")]
    if not outputs:
        return list(words), outputs
    from thimble.evaluation.row_scores import KEPT

    more = [word for word in words if word in KEPT and not Path(word).exists()]
    return [word for word in words if word not in more], [*outputs, *more]


def recipe_and_words(
    recipe: str | None, words: Sequence[str] | None, *, resumed: bool
) -> tuple[str | None, list[str]]:
    """The recipe, named as the first word or by the documents' ``--config FILE``, and the words
    that are left. The first may be a setting where the recipe is named otherwise, or ``resumed``:
    the run knows it."""
    from thimble.config.documents import recipe_of

    first = [] if recipe is None else [recipe]
    named, left = recipe_of([*first, *(words or [])])
    # The first word may be --config itself, another option, or a setting.
    setting = recipe is not None and "=" in recipe and (resumed or named is not None)
    if recipe is None or recipe.startswith("-") or setting:
        return named, left
    if named is not None:
        raise ConfigError(f"Which recipe? There are two: {recipe} and --config ({named}).")
    return recipe, left[1:]


def numbers(option: str, given: str | None) -> tuple[int, ...]:
    """The whole numbers above 0 of ``a,b,c``, each once, in order; ConfigError for others."""
    words = given.split(",") if given else []
    if wrong := [word for word in words if not (word.strip().isdecimal() and int(word))]:
        raise ConfigError(f"{option} {given}: {wrong[0]!r} is no whole number above 0.")
    return tuple(sorted({int(word) for word in words}))


def check_options(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Refuse a misspelt option of the command itself before it is taken for a key."""
    from thimble.config.load import Misspelt

    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and "." not in name:
            close = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
            if close or not name.startswith("--"):
                right = close[0] if close else None
                raise Misspelt(f"There is no option {name}.", name, right)
    return list(words)


def fill_resume(arguments: Sequence[str]) -> list[str]:
    """Give a bare ``--resume`` the value it stands for; the parser knows no optional values."""
    filled = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        bare = following.startswith("-") or ("=" in following and not Path(following).exists())
        if word == "--resume" and not bare:
            from thimble.config.load import recipe_names

            bare = following in recipe_names()
        filled.append("--resume=auto" if word == "--resume" and bare else word)
    return filled

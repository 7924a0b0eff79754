"""A recursive model beside plain ones: does the recursion earn what it costs?

    recursive run -> as many updates of a plain model of the same computation
                  -> as many updates of a plain model of the same parameters
                  -> all on the held-out test split, one table, whoever wins

The plain ones are what anyone would train: pre-norm blocks, each run once, one supervision step; of
attention, or of retention where the recursive one has that, with the same objective and teacher.
Their runs lie in the recursive one's folder, whose ``comparison.json`` says what belongs together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble import api, artifacts
from thimble.config.load import check, load, load_run
from thimble.config.schema import Config, ModelConfig
from thimble.console import log
from thimble.errors import ConfigError, DataError, Interrupted, ThimbleError
from thimble.evaluation.comparison import (
    BOTH,
    COMPUTATION,
    LEDGER,
    PARAMETERS,
    RECURSIVE,
    Comparison,
    Contestant,
    verdict,
)
from thimble.tokens.packing import KIND as PACKED
from thimble.training.distributed import Processes
from thimble.training.plan import amount, flops_per_token
from thimble.training.run import RunFolder

FOLDER, TEXT = "comparison", "tokens"
KEYS = {COMPUTATION: "same_computation", PARAMETERS: "same_parameters", BOTH: "same_both"}
# A block stack that runs once: what is left of the recursion is its last, and only, call.
PLAIN = {
    "mixer": "attention",
    "separate_stacks": False,
    "single_z": True,
    "pre_norm": True,
    "attention_gate": False,
    "inject_input": True,
    "H_cycles": 1,
    "L_cycles": 1,
    "bp_cycles": 1,
    "halt_max_steps": 1,
    "q_continue": False,
}
# Retention that learns without halting runs once as a student as any other, which has rotary
# positions.
PLAIN_RETENTION = {"schedule": "once", "position_embedding": "rope"}


def compare(
    recipe: str | Path | None,
    overrides: tuple[str, ...],
    nested: dict[str, Any],
    *,
    run: str | Path | None = None,
    retry: int = 0,
    subset_size: int | None = None,
) -> Comparison:
    """Train what is missing, evaluate all, and write ``comparison.json`` into the recursive run.

    ``run``: a recursive run, finished or not, in place of ``recipe``. ``subset_size``: so many of
    the held-out examples, the same for all. Raises ConfigError for a model that does not recur,
    DataError when nothing is held out, and what training and evaluation raise; what is finished is
    kept for the next call.
    """
    if run is None:
        assert recipe is not None
        config = prepared(load(recipe, overrides, nested), subset_size)
        with resumable(lambda: RunFolder.newest(config.output_dir, config.recipe).path):
            path = api.train(recipe, *overrides, retry=retry, **nested).path
    else:
        path = RunFolder.containing(run).path
        config = prepared(load_run(path), subset_size)
    # Looked for now and not between the trainings: so all of several processes find the same.
    there = {name: sorted((path / FOLDER / key).glob("*/*")) for name, key in KEYS.items()}
    found = [path, *(plain for paths in there.values() for plain in paths)]
    done = {each for each in found if is_finished(RunFolder(each))} | ({path} if not run else set())
    main = Processes().main
    with (
        artifacts.locked(path / FOLDER, "comparison") if main else contextlib.nullcontext(),
        resumable(lambda: path),
    ):
        return _Comparing(path, config, there, done, retry, subset_size, main).all()


def prepared(config: Config, subset_size: int | None = None) -> Config:
    """The configuration with its data there; what cannot be compared is refused at once."""
    from thimble.training.data import open_data, ready

    if not recurs(config.model):
        raise ConfigError(
            f"The model of {config.recipe} runs its blocks once, so there is no recursion to "
            "compare with a plain model. Recursive recipes: instruct_*, puzzle_*, or "
            "distill_nano model=retnet_hrm; all of them: thimble recipes"
        )
    if config.data.path is not None and kind_of(config) == PACKED:
        raise ConfigError(
            f"{config.data.folder} holds packed chunks, which have no test split to compare on. "
            "Use the tokens of a corpus:\n  data.path=data/tokens/NAME"
        )
    config = ready(config)
    kind = kind_of(config)
    if kind == TEXT and subset_size is not None:
        raise ConfigError(
            "--subset-size counts conversations or puzzles, and these are tokens: their test split "
            "is measured whole. Leave it out."
        )
    data = open_data(config, "test")
    if kind == "conversations" and not len(data.split("test")):
        from thimble.evaluation.recursive import empty_split

        raise DataError(empty_split(data, "test"))
    plain_models(config)
    return config


def recurs(model: ModelConfig) -> bool:
    """Whether any block runs more than once."""
    stacks = 2 if model.separate_stacks else 1
    runs = model.blocks_per_step * model.halt_max_steps
    return model.schedule == "recursive" and runs > stacks * model.num_hidden_layers


def kind_of(config: Config) -> str:
    # Puzzles of other programs have no manifest.
    return artifacts.kind(config.data.folder) or "puzzles"


@contextlib.contextmanager
def resumable(run: Any) -> Iterator[None]:
    """An interruption that says how the whole comparison goes on, not one of its runs."""
    try:
        yield
    except Interrupted as error:
        said = str(error).partition(" Go on with:")[0]
        raise Interrupted(f"{said} Go on with:\n  thimble compare --resume {run()}") from error


# ---------------------------------------------------------------------------------- the plain ones


def plain_models(config: Config) -> dict[str, ModelConfig]:
    """The plain models to compare with, by name: as near as whole blocks come.

    Raises ConfigError where no plain model can be trained as this one was.
    """
    model, length = config.model, config.training.sequence_length
    first, second = (plain(config, layers) for layers in (1, 2))

    def nearest(wanted: float, one: float, two: float) -> int:
        return max(1, 1 + round((wanted - one) / (two - one)))

    by_computation = nearest(*(flops_per_token(each, length) for each in (model, first, second)))
    by_parameters = nearest(*(each.num_parameters for each in (model, first, second)))
    if by_computation == by_parameters:
        return {BOTH: plain(config, by_computation)}
    return {
        COMPUTATION: plain(config, by_computation),
        PARAMETERS: plain(config, by_parameters),
    }


def plain(config: Config, layers: int) -> ModelConfig:
    tree = config.model_dump()
    for section, keys in changes(config, layers).items():
        tree[section] |= keys
    try:
        return check(tree).model
    except ConfigError as error:
        raise ConfigError(f"There is no plain model to compare with. {error}") from error


def changes(config: Config, layers: int, updates: int = 1) -> dict[str, Any]:
    """What makes a recursive run one of so many blocks that run once, section by section."""
    once: dict[str, Any] = PLAIN
    if config.model.mixer == "retention":
        halts = config.objective.name == "act"
        once = PLAIN | {"mixer": "retention"} if halts else PLAIN_RETENTION
    training: dict[str, Any] = {
        "max_steps": updates,
        "max_epochs": None,
        "load_checkpoint": None,
        "skip_windows": [],
    }
    # Each gets all its updates, also where the data went round until nothing was left to learn.
    patience = max(config.guards.plateau_steps, updates)
    return {
        "model": {**once, "num_hidden_layers": layers},
        "training": training,
        "guards": {"plateau_steps": patience},
    }


@dataclass
class _Comparing:
    """One call: what it found, and what it has by now."""

    path: Path
    config: Config
    there: dict[str, list[Path]]  # plain runs of earlier calls, by name
    done: set[Path]  # runs that are finished
    retry: int
    subset_size: int | None
    main: bool

    def all(self) -> Comparison:
        from thimble.sweep.job import clean_up

        plains = plain_models(self.config)
        waiting: list[str] = [RECURSIVE, *plains]
        rows: list[Contestant] = []
        self.notes = self.told()
        for name in list(waiting):
            log.info("%d of %d: %s", len(rows) + 1, len(rows) + len(waiting), name)
            if name == RECURSIVE:
                folder = self.finish(self.path)
            else:
                folder = self.finish_plain(name, plains[name], rows[0].updates)
            clean_up()
            rows.append(self.measured(name, folder))
            waiting.remove(name)
            result = self.result(rows, waiting)
            if self.main:
                artifacts.write_json(self.path / LEDGER, result.to_dict())
        return result

    def finish(self, path: Path) -> RunFolder:
        """The run at its end: as it is, or gone on with."""
        if path in self.done:
            log.info("%s is trained.", path)
        else:
            path = api.train(resume=path, retry=self.retry).path
        return RunFolder(path)

    def finish_plain(self, name: str, model: ModelConfig, updates: int) -> RunFolder:
        for path in reversed(self.there[name]):
            if self.belongs(path, model, updates):
                return self.finish(path)
        run = api.train(
            self.path,
            retry=self.retry,
            output_dir=str(self.path / FOLDER / KEYS[name]),
            **changes(self.config, model.num_hidden_layers, updates),
        )
        return RunFolder(run.path)

    def belongs(self, path: Path, model: ModelConfig, updates: int) -> bool:
        """Whether a run of an earlier call is the one that is wanted now."""
        try:
            found = load_run(path)
        except ThimbleError:
            return False  # of another version, or cut off when it began; a new one is made
        mine, other = self.config, found
        return (found.model, found.training.max_steps) == (model, updates) and (
            (mine.data, mine.objective, mine.seed) == (other.data, other.objective, other.seed)
        )

    def measured(self, name: str, folder: RunFolder) -> Contestant:
        config = load_run(folder.path)
        # A plain model keeps the word of the recursive one it is beside, and has one stack.
        stacks = 2 if config.model.separate_stacks and recurs(config.model) else 1
        record = [record for record in folder.records() if "loss" in record][-1]
        kind = kind_of(self.config)
        # Only what is asked beside text has a part of it.
        part: dict[str, Any] = {} if kind == TEXT else {"subset_size": self.subset_size}
        evaluation: Any = api.evaluate(folder.path, device=config.device, **part)
        figures = evaluation.figures
        self.kind = kind
        if kind == TEXT:
            self.examples = figures["tokens"]
            figures = {**figures, "nll": figures["loss"], "exact_accuracy": None}
            figures["token_accuracy"] = figures["top1_accuracy"]
        else:
            self.examples = figures["examples"]
            self.notes += [f"{name}: {line}" for line in evaluation.suspicious]
        if (folder.path / "attempts.json").is_file():
            self.notes.append(f"{name}: mended on its way, see {folder.path / 'attempts.json'}.")
        training = config.training
        batch = training.micro_batch_size * training.gradient_accumulation_steps
        tokens = record["step"] * batch * amount(config).length
        return Contestant(
            name=name,
            run=folder.path,
            layers=config.model.num_hidden_layers * stacks,
            parameters=evaluation.parameters,
            updates=record["step"],
            epochs=record["epoch"],
            flops=tokens * flops_per_token(config.model, training.sequence_length),
            minutes=record["seconds"] / 60,
            tokens_per_second=tokens / max(record["seconds"], 1e-9),
            nll=figures["nll"],
            bits_per_byte=figures.get("bits_per_byte"),
            perplexity=figures.get("perplexity"),
            token_accuracy=figures["token_accuracy"],
            exact_accuracy=figures["exact_accuracy"],
        )

    def result(self, rows: list[Contestant], waiting: list[str]) -> Comparison:
        return Comparison(
            run=self.path,
            recipe=self.config.recipe,
            kind=self.kind,
            split="test",
            examples=self.examples,
            rows=list(rows),
            waiting=list(waiting),
            verdict=verdict(rows, self.kind),
            notes=list(self.notes),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def told(self) -> list[str]:
        """How to read the table."""
        training = self.config.training
        batch = training.micro_batch_size * training.gradient_accumulation_steps
        notes = [
            f"Every model had the same data in batches of {batch:,}, the same optimizer settings "
            "(searched for none of them here) and the same number of updates; what differs is how "
            "often the data went round.",
            "FLOPs: updates x examples x mean length x FLOPs of a token, forward and backward, "
            "padding not counted. A token counts at each of its supervision steps.",
        ]
        if training.load_checkpoint is not None:
            notes.append(
                f"The recursive model began with the weights of {training.load_checkpoint}, whose "
                "training is not counted; the plain ones were drawn anew."
            )
        return notes


def is_finished(folder: RunFolder) -> bool:
    events = [record["event"] for record in folder.records() if "event" in record]
    return bool(events) and events[-1] == "finished"

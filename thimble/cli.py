"""The command ``thimble``: each verb parses its words and calls one function of ``thimble.api``."""

from __future__ import annotations

import functools
import inspect as signatures
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from thimble import __version__, api
from thimble.console import setup
from thimble.errors import ConfigError
from thimble.terminal import show, show_error
from thimble.words import (
    Checkpoint,
    Device,
    Dtype,
    HeldOut,
    MaxTokens,
    NewFolder,
    OutputFile,
    OutputFolder,
    Overrides,
    Recipe,
    Seed,
    Temperature,
    TopK,
    TopP,
    Workers,
    check_options,
    complete_key,
    complete_override,
    complete_recipe,
    fill_resume,
    settings_of,
)


class InOrder(TyperGroup):
    """The verbs in the order in which one uses them, not groups last."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=lambda name: name not in ("corpus", "tokens"))


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
corpus_app = typer.Typer(suggest_commands=False)
tokens_app = typer.Typer(suggest_commands=False)
export_app = typer.Typer(suggest_commands=False)
app.add_typer(corpus_app, name="corpus", help="Sources to clean, deduplicated documents.")
app.add_typer(tokens_app, name="tokens", help="Documents to a tokenizer and shards.")
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


# -------------------------------------------------------------------------------------- verbs


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


@verb(corpus_app, "build")
def corpus_build(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME] [scale=quick|full]", help="A corpus we know: os_kernel."),
    ] = None,
    sources: Annotated[
        list[str] | None, typer.Option("--from", help="Your own file or folder; repeatable.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="quick (default) or full.")] = None,
    output: OutputFolder = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of the sampling of the mixture.")] = 1,
) -> Any:
    """Make a corpus: sources, cleaned and deduplicated."""
    plain, settings = settings_of(words or [], ["scale"])
    paths = [*(sources or []), *(word for word in plain if sources and Path(word).exists())]
    names = [word for word in plain if word not in paths]
    if len(names) > 1:
        raise ConfigError(f"One corpus at a time, not {len(names)}: {', '.join(names)}.")
    return api.build_corpus(
        names[0] if names else None,
        sources=paths,
        scale=scale or settings.get("scale", "quick"),
        output=output,
        workers=workers,
        seed=seed,
    )


@verb(tokens_app, "build")
def tokens_build(
    corpus: Annotated[str, typer.Argument(help="Corpus folder, or its name in data/corpus.")],
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Entries; default 4096.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Use this one: folder, hub id, or SentencePiece .model.")
    ] = None,
    output: OutputFolder = None,
    workers: Workers = None,
) -> Any:
    """Make a tokenizer and the train, val and test shards of a corpus."""
    return api.build_tokens(
        corpus, output=output, vocab_size=vocab_size, tokenizer=tokenizer, workers=workers
    )


@verb(app, "quickstart", overrides=True)
def quickstart(overrides: Overrides = None) -> Any:
    """All of it once, in minutes: real text, tokens, a small model, the gate, a sample."""
    return api.quickstart(*check_options(overrides or [], ["--json", "--help"]))


@verb(app, "plan", overrides=True)
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Take a few real steps here.")
    ] = True,
) -> Any:
    """Parameters, FLOPs, tokens, hours, cost and memory of a run, before it is started."""
    options = ["--measure", "--no-measure", "--json", "--help"]
    return api.plan(recipe, *check_options(overrides or [], options), measure=measure)


@verb(app, "train", overrides=True)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe, or the path of a run's config.yaml; not needed with --resume PATH.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[auto|PATH]", help="Go on: the newest run, or this run/checkpoint."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Short for training.max_steps=N.")] = None,
    retry: Annotated[
        int | None,
        typer.Option(
            min=0, help="Mend a stopped run so often; default: 3 without a terminal, or 0."
        ),
    ] = None,
    on_success: Annotated[str | None, typer.Option(help="Shell command to call then.")] = None,
    on_failure: Annotated[str | None, typer.Option(help="Shell command to call then.")] = None,
) -> Any:
    """Train a model by a recipe."""
    words = check_options(
        overrides or [],
        ["--resume", "--max-steps", "--retry", "--on-success", "--on-failure", "--json", "--help"],
    )
    if recipe is not None and ("=" in recipe or recipe.startswith("-")) and resume:
        words.insert(0, recipe)  # `train --resume PATH key=value`: the run knows its recipe
        recipe = None
    if max_steps is not None:
        words.append(f"training.max_steps={max_steps}")
    if retry is None:
        retry = 0 if sys.stderr.isatty() else 3
    return api.train(
        recipe, *words, resume=resume, retry=retry, on_success=on_success, on_failure=on_failure
    )


@verb(app, "sweep", overrides=True)
def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe, or the path of a run's config.yaml; not with --resume.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=A,B,C...",
            help="Keys with several values or one; hydra/launcher=... and hydra/sweeper=... too.",
            autocompletion=complete_override,
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="PATH", help="Go on with this sweep.")
    ] = None,
) -> Any:
    """Train a recipe with each combination of values, and say which is best."""
    words = check_options(overrides or [], ["--resume", "--json", "--help"])
    return api.sweep(recipe, *words, resume=resume)


@verb(app, "accept")
def accept(
    checkpoint: Checkpoint,
    split: Annotated[str, typer.Option(help="Held-out split: val or test.")] = "val",
    device: Device = "auto",
) -> Any:
    """Judge a checkpoint by its recipe's gate; the exit status says."""
    return api.accept(checkpoint, split=split, device=device)


@verb(app, "evaluate")
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Or a run: its best one.")
    ],
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the run.")] = False,
    split: Annotated[str, typer.Option(help="Held-out split: test or val.")] = "test",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to measure on, for a checkpoint of another program.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-evaluation-harness: names or YAML files, a,b,c.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each such task.")] = None,
    device: Device = "auto",
) -> Any:
    """Perplexity, accuracy, texts, speed and benchmark; several checkpoints are ranked."""
    return api.evaluate(
        *checkpoints,
        every=every,
        split=split,
        tokens=tokens,
        tasks=tuple(tasks.split(",")) if tasks else (),
        limit=limit,
        device=device,
    )


@verb(app, "quantize")
def quantize(
    checkpoint: Checkpoint,
    bits: Annotated[int, typer.Option(help="4 or 8; more are taken where 4 fail the gate.")] = 4,
    output: OutputFolder = None,
    calibration_samples: Annotated[
        int, typer.Option(metavar="N", help="Windows of the validation split.")
    ] = 512,
    device: Device = "auto",
) -> Any:
    """Weights in four or eight bits, by GPTQ; the exit status says whether the gate passes."""
    return api.quantize(
        checkpoint,
        bits=bits,
        output=output,
        calibration_samples=calibration_samples,
        device=device,
    )


@verb(app, "generate")
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to be continued.")] = None,
    message: Annotated[str | None, typer.Option(help="Question to be answered.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 1,
    device: Device = "auto",
) -> Any:
    """Continue a prompt, or answer a message."""
    text = api.generate(
        checkpoint,
        prompt=prompt,
        message=message,
        device=device,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=None if output.json else write_piece,
    )
    return {"text": text} if output.json else print()


@verb(app, "chat")
def chat(
    checkpoint: Checkpoint,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 1,
    device: Device = "auto",
) -> Any:
    """Talk with a model, line by line; an empty line or Ctrl-D ends it."""
    conversation = api.chat(
        checkpoint,
        read_messages(),
        device=device,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=None if output.json else write_piece,
    )
    return {"messages": conversation} if output.json else None


@verb(export_app, "gguf")
def export_gguf(
    checkpoint: Checkpoint,
    type: Annotated[
        str, typer.Option(help="F16, F32, Q8_0, Q4_K_M, Q4_K_S, Q5_K_M, Q5_K_S or Q6_K.")
    ] = "F16",
    output: OutputFile = None,
    tokens: HeldOut = None,
) -> Any:
    """One file for llama.cpp, with the tokenizer; checked there if it is installed."""
    return api.export_gguf(checkpoint, type=type, output=output, tokens=tokens)


@verb(export_app, "onnx")
def export_onnx(
    checkpoint: Checkpoint,
    output: OutputFile = None,
    tokens: HeldOut = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Take and give keys and values, for generating.")
    ] = False,
) -> Any:
    """One graph from ids to logits; checked with onnxruntime."""
    return api.export_onnx(checkpoint, output=output, tokens=tokens, cache=cache)


@verb(export_app, "transformers")
def export_transformers(checkpoint: Checkpoint, output: NewFolder, dtype: Dtype = None) -> Any:
    """A folder with what from_pretrained reads, and no more."""
    return api.export_transformers(checkpoint, output, dtype=dtype)


@verb(export_app, "bin")
def export_bin(checkpoint: Checkpoint, output: NewFolder, dtype: Dtype = None) -> Any:
    """The same with pytorch_model.bin in place of safetensors."""
    return api.export_bin(checkpoint, output, dtype=dtype)


@verb(app, "inspect")
def inspect(path: Annotated[str, typer.Argument(help="Corpus, tokens, checkpoint or run.")]) -> Any:
    """What an artefact is, what made it, and whether it is whole."""
    return api.inspect(path)


@verb(app, "report")
def report(run: Annotated[str, typer.Argument(help="Folder of a run.")]) -> Any:
    """A page about a run to look at: curves, samples, data, tables; and plots as PNG."""
    return api.report(run)


@verb(app, "doctor")
def doctor() -> Any:
    """This machine: versions, devices, memory, disk, network, extras, and what is amiss."""
    return api.doctor()


@verb(app, "recipes")
def recipes() -> Any:
    """The recipes there are."""
    return {"recipes": api.recipes()}


@verb(app, "explain")
def explain(
    key: Annotated[
        str | None, typer.Argument(help="A key or a group.", autocompletion=complete_key)
    ] = None,
) -> Any:
    """What a key of the configuration means, its type, range and default."""
    return {"keys": api.explain(key)}


# --------------------------------------------------------------------------------- the terminal


def write_piece(text: str) -> None:
    print(text, end="", flush=True)


def read_messages() -> Iterator[str]:
    """What a person types, until an empty line or Ctrl-D; a pipe gives its lines."""
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these words (default: the process's); returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output.json, output.verbosity = False, 0
    if not words or words in [[group.name] for group in app.registered_groups]:
        words.append("--help")
    try:
        # A command returns its status; Exit, raised by --help and --version, its code.
        status = app(fill_resume(words), prog_name="thimble", standalone_mode=False) or 0
        if status == 130:
            raise KeyboardInterrupt
        return int(status)
    except (Exception, KeyboardInterrupt) as error:
        as_json = output.json or "--json" in words
        verbose = output.verbosity > 0 or "-v" in words or "--verbose" in words
        return show_error(error, words, as_json=as_json, verbose=verbose)

"""The command ``thimble``: each verb parses its words and calls one function of ``thimble.api``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from thimble import api, cli_data
from thimble.command import (
    app,
    export_app,
    output,
    verb,
)
from thimble.terminal import show_error
from thimble.words import (
    Checkpoint,
    CheckpointOption,
    CheckpointWords,
    Device,
    Dtype,
    HeldOut,
    MaxTokens,
    NewFolder,
    OutputFile,
    OutputFolder,
    Overrides,
    Recipe,
    Retry,
    Seed,
    Steps,
    SystemMessage,
    Temperature,
    TopK,
    TopP,
    check_options,
    checkpoint_and_overrides,
    complete_key,
    complete_override,
    complete_recipe,
    fill_resume,
    named_outputs,
    numbers,
    recipe_and_words,
    settings_of,
)

__all__ = ["app", "cli_data", "main"]


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
    """Parameters, FLOPs, tokens, hours, cost and memory of a run, before it is started.

    More recipes after the first are stages that follow, each from the weights of the one before.
    """
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
        typer.Option(
            *("--resume", "--resume-from"),
            metavar="[auto|PATH]",
            help="Go on: the newest run, or this run/checkpoint.",
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Short for training.max_steps=N.")] = None,
    retry: Retry = None,
    on_success: Annotated[str | None, typer.Option(help="Shell command to call then.")] = None,
    on_failure: Annotated[str | None, typer.Option(help="Shell command to call then.")] = None,
) -> Any:
    """Train a model by a recipe."""
    options = ["--resume", "--max-steps", "--retry", "--on-success", "--on-failure", "--json"]
    recipe, given = recipe_and_words(recipe, overrides, resumed=resume is not None)
    words = check_options(given, [*options, "--help"])
    if max_steps is not None:
        words.append(f"training.max_steps={max_steps}")
    return api.train(
        recipe,
        *words,
        resume=resume,
        retry=retries(retry),
        on_success=on_success,
        on_failure=on_failure,
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


@verb(app, "compare", overrides=True)
def compare(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recursive recipe, or the path of a run's config.yaml; not with --run.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    run: Annotated[
        str | None,
        typer.Option("--run", "--resume", metavar="PATH", help="This run; what is missing of it."),
    ] = None,
    retry: Retry = None,
    subset_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Evaluate so many examples.")
    ] = None,
) -> Any:
    """A recursive model beside plain ones of its computation and of its parameters."""
    options = ["--run", "--resume", "--retry", "--subset-size", "--json", "--help"]
    words = check_options(overrides or [], options)
    return api.compare(recipe, *words, run=run, retry=retries(retry), subset_size=subset_size)


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
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="CHECKPOINT...", help="Or a run: its best one."),
    ] = None,
    checkpoint: CheckpointOption = None,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the run.")] = False,
    split: Annotated[
        str, typer.Option(help="Held-out split: test or val; of a recursive model also train.")
    ] = "test",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to measure on, for a checkpoint of another program.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-evaluation-harness: names or YAML files, a,b,c.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each such task.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder, run, hub or server; default: whom it learned from.")
    ] = None,
    needle: Annotated[
        bool, typer.Option("--needle", help="Facts hidden in held-out text, by depth and length.")
    ] = False,
    context: Annotated[
        bool, typer.Option("--context", help="Tokens per second and memory against the context.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N...", help="Contexts of these two, in tokens.")
    ] = None,
    subset_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Recursive: so many examples.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Recursive: rows of a batch.")
    ] = None,
    max_batches: Annotated[
        int | None, typer.Option(min=1, help="Recursive: at most so many.")
    ] = None,
    save_outputs: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Recursive: tensors to keep, such as preds."),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Where to keep them; default: the checkpoint.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Recursive: dataset.data_dir.")] = None,
    tokenizer_path: Annotated[
        str | None, typer.Option(help="Recursive: checked to be the one trained with.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Recursive: dataset.seq_len.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE...", help="Recursive: dataset.*, model.halt_max_steps."),
    ] = None,
    device: Device = "auto",
) -> Any:
    """Perplexity, accuracy, texts, speed and benchmark; several checkpoints are ranked."""
    from thimble.evaluation.request import KEYS

    given, settings = settings_of([*(words or []), *(overrides or [])], KEYS)
    paths, outputs = named_outputs(given, save_outputs)
    return api.evaluate(
        *([checkpoint] if checkpoint else []),
        *paths,
        every=every,
        split=split,
        tokens=tokens,
        tasks=tuple(tasks.split(",")) if tasks else (),
        limit=limit,
        teacher=teacher,
        needle=needle,
        context=context,
        lengths=numbers("--lengths", lengths),
        device=device,
        subset_size=subset_size,
        batch_size=batch_size,
        max_batches=max_batches,
        save_outputs=outputs,
        output_dir=output_dir,
        data_dir=data_dir,
        tokenizer_path=tokenizer_path,
        seq_len=seq_len,
        overrides=settings,
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
    words: CheckpointWords = None,
    checkpoint: CheckpointOption = None,
    prompt: Annotated[str | None, typer.Option(help="Text to be continued.")] = None,
    message: Annotated[str | None, typer.Option(help="Question to be answered.")] = None,
    system_message: SystemMessage = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 1,
    steps: Steps = None,
    watched: Annotated[
        bool, typer.Option("-V", help="Also --verbose: what was likely at each token.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE...", help="dataset.seq_len, dataset.system_message."),
    ] = None,
    device: Device = "auto",
) -> Any:
    """Continue a prompt, or answer a message."""
    path, settings = checkpoint_and_overrides(words, checkpoint, overrides, api.GENERATION_KEYS)
    watched |= output.verbosity > 0
    tokens: list[Any] = []
    text = api.generate(
        path,
        prompt=prompt,
        message=message,
        device=device,
        overrides=settings,
        system_message=system_message,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        steps=steps,
        stream=None if output.json or watched else write_piece,
        watch=token_writer(tokens) if watched else None,
    )
    if output.json:
        return {"text": text} | (
            {"tokens": [token.to_dict() for token in tokens]} if watched else {}
        )
    return print(f"=== Generated Response ===\n{text}" if watched else "")


@verb(app, "chat")
def chat(
    words: CheckpointWords = None,
    checkpoint: CheckpointOption = None,
    system_message: SystemMessage = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 1,
    steps: Steps = None,
    device: Device = "auto",
) -> Any:
    """Talk with a model, line by line; an empty line or Ctrl-D ends it."""
    path, _ = checkpoint_and_overrides(words, checkpoint, None, ())
    conversation = api.chat(
        path,
        read_messages(),
        device=device,
        system_message=system_message,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        steps=steps,
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


def retries(given: int | None) -> int:
    """Without a terminal nobody is there to mend a stopped run."""
    return given if given is not None else 0 if sys.stderr.isatty() else 3


def write_piece(text: str) -> None:
    print(text, end="", flush=True)


def token_writer(tokens: list[Any]) -> Callable[[Any], None]:
    """What keeps the tokens as they come, and shows each on standard error."""
    from thimble.generation.trace import HEADER

    def write(token: Any) -> None:
        if not output.json:
            print(*([] if tokens else [HEADER]), token.line(), sep="\n", file=sys.stderr)
        tokens.append(token)

    return write


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

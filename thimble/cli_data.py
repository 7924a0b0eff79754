"""The verbs that make data: a corpus, tokens, conversations, puzzles, what a teacher says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thimble import api
from thimble.command import (
    conversations_app,
    corpus_app,
    data_app,
    puzzles_build_app,
    teacher_app,
    tokens_app,
    verb,
)
from thimble.errors import ConfigError
from thimble.words import (
    Adapter,
    Device,
    Generate,
    GenerateTest,
    OutputFolder,
    Precision,
    PuzzleSeed,
    RamDisk,
    RowLength,
    Source,
    Subsample,
    TeacherModel,
    TeacherTokens,
    Workers,
    settings_of,
)


@verb(data_app, "download")
def data_download(
    plan: Annotated[str, typer.Option(help="poc, or curriculum.")] = "poc",
    category: Annotated[
        list[str] | None,
        typer.Option(help="instruction_chat, code, math_reasoning or factual_qa only; repeatable."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write.")
    ] = "data/distillation",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask the hub for sizes and licences, fetch nothing.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say what is there.")] = False,
) -> Any:
    """Fetch the data sets of a plan as JSONL; goes on where it was interrupted."""
    return api.download_data(plan, category or (), output=output, dry_run=dry_run, status=status)


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


@verb(tokens_app, "pack")
def tokens_pack(
    source: Annotated[
        str, typer.Option("--input", help="Folder or file: JSONL, parquet, text; .gz, .zst, .xz.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Of folders in the folder, too.")
    ] = False,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a chunk.")] = 8192,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder, hub id or file; default: $LLAMA_TOKENIZER, or Llama 3.2."),
    ] = None,
    val_ratio: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the documents held out.")
    ] = 0.01,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Keep what is unchanged, as without it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make all of it anew.")] = False,
    workers: Workers = None,
) -> Any:
    """Cut documents end to end into chunks of one length, for distillation."""
    return api.pack_tokens(
        source,
        output,
        recursive=recursive,
        max_seq_length=max_seq_length,
        tokenizer=tokenizer,
        val_ratio=val_ratio,
        skip_existing=skip_existing,
        force=force,
        workers=workers,
    )


@verb(conversations_app, "build")
def conversations_build(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_PATH",
            help="slimorca, openorca, a corpus with conversations, or your own file or folder.",
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder, tokenizer.json or SentencePiece .model; or $LLAMA_TOKENIZER."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Longest example, in input tokens.")] = 512,
    subset_size: Annotated[
        int | None, typer.Option(min=1, help="So many records of the whole; default: all.")
    ] = None,
    test_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts held out.")
    ] = 0.05,
    template: Annotated[
        str, typer.Option(help="plain ([SYSTEM], [USER], [ASSISTANT]), or chat: the tokenizer's.")
    ] = "plain",
    system_message: Annotated[
        str | None, typer.Option(help='Where a conversation has none; "": nothing then.')
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Entries the tokenizer has to have.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where files are, or are fetched to; default data/NAME.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the subset and the split.")] = 0,
    output: OutputFolder = None,
    workers: Workers = None,
) -> Any:
    """Tokenize instruction data once, with labels on the answers, and check it."""
    options = {
        "seq_len": seq_len,
        "subset_size": subset_size,
        "test_ratio": test_ratio,
        "template": template,
        "vocab_size": vocab_size,
        "data_dir": data_dir,
        "seed": seed,
    }
    if system_message is not None:
        options["system_message"] = system_message
    return api.build_conversations(
        name, tokenizer=tokenizer, output=output, workers=workers, **options
    )


def given(**options: Any) -> dict[str, Any]:
    """What was said; the rest is left to the function's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


@verb(puzzles_build_app, "sudoku")
def puzzles_build_sudoku(
    source: Source = None,
    generate: Generate = None,
    test: GenerateTest = None,
    size: Annotated[int, typer.Option(help="Of generated ones: 4, 6 or 9.")] = 9,
    subsample_size: Subsample = None,
    min_difficulty: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out what is rated lower.")
    ] = None,
    num_aug: Annotated[
        int, typer.Option(min=0, metavar="N", help="Augmentations of each training puzzle.")
    ] = 0,
    output: OutputFolder = None,
    seed: PuzzleSeed = 0,
    workers: Workers = None,
) -> Any:
    """Sudokus, from sapientinc/sudoku-extreme unless you say otherwise."""
    return api.build_sudoku(
        output,
        **given(source=source, generate=generate, generate_test=test),
        size=size,
        subsample_size=subsample_size,
        min_difficulty=min_difficulty,
        num_aug=num_aug,
        seed=seed,
        workers=workers,
    )


@verb(puzzles_build_app, "maze")
def puzzles_build_maze(
    source: Source = None,
    generate: Generate = None,
    test: GenerateTest = None,
    size: Annotated[int, typer.Option(help="Of generated ones: 4 to 30.")] = 30,
    subsample_size: Subsample = None,
    aug: Annotated[bool, typer.Option("--aug", help="All eight symmetries in training.")] = False,
    output: OutputFolder = None,
    seed: PuzzleSeed = 0,
    workers: Workers = None,
) -> Any:
    """Mazes, from sapientinc/maze-30x30-hard-1k unless you say otherwise."""
    return api.build_maze(
        output,
        **given(source=source, generate=generate, generate_test=test),
        size=size,
        subsample_size=subsample_size,
        aug=aug,
        seed=seed,
        workers=workers,
    )


@verb(puzzles_build_app, "arc")
def puzzles_build_arc(
    input_file_prefix: Annotated[
        str, typer.Option(help="PREFIX_SUBSET_challenges.json, PREFIX_SUBSET_solutions.json.")
    ],
    subsets: Annotated[
        list[str] | None,
        typer.Option(help="training evaluation concept; several names, or repeated."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    test_set_name: Annotated[
        str, typer.Option(help="The subset whose test pairs are held out.")
    ] = "evaluation",
    num_aug: Annotated[
        int, typer.Option(min=0, metavar="N", help="Augmentations of each task.")
    ] = 1000,
    max_side: Annotated[
        int, typer.Option(min=1, max=30, metavar="N", help="Leave out tasks with larger grids.")
    ] = 30,
    output: OutputFolder = None,
    seed: PuzzleSeed = 42,
    workers: Workers = None,
) -> Any:
    """ARC tasks, from the combined files of the competition."""
    if more and not subsets:
        raise ConfigError(f"What is {more[0]}? Subsets are named after --subsets.")
    return api.build_arc(
        output,
        input_file_prefix=input_file_prefix,
        **given(subsets=[*(subsets or []), *(more or [])] or None),
        test_set_name=test_set_name,
        num_aug=num_aug,
        max_side=max_side,
        seed=seed,
        workers=workers,
    )


@verb(teacher_app, "cache")
def teacher_cache(
    teacher: TeacherModel,
    tokens: TeacherTokens,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    sequence_length: RowLength = None,
    topk: Annotated[int, typer.Option(min=1, metavar="K", help="Likeliest tokens kept.")] = 64,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep so many draws instead.")
    ] = None,
    temperatures: Annotated[
        str, typer.Option(help="At which the tail is known: 1,2; draws: the one they are of.")
    ] = "1",
    adapter: Adapter = None,
    served_model: Annotated[
        str | None, typer.Option(help="Which model, where a server has several.")
    ] = None,
    output: OutputFolder = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 1,
    ram_disk: RamDisk = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> Any:
    """Ask a teacher about every position once, and keep what it says."""
    try:
        numbers = [float(word) for word in temperatures.split(",")]
    except ValueError:
        raise ConfigError(
            f"--temperatures {temperatures}: give numbers such as 1 or 1,2."
        ) from None
    return api.cache_teacher(
        teacher,
        tokens,
        split=split,
        sequence_length=sequence_length,
        topk=topk,
        samples=samples,
        temperatures=numbers,
        adapter=adapter,
        served_model=served_model,
        output=output,
        seed=seed,
        ram_disk=ram_disk,
        device=device,
        precision=precision,
    )


@verb(teacher_app, "finetune")
def teacher_finetune(
    teacher: TeacherModel,
    tokens: TeacherTokens,
    sequence_length: RowLength = None,
    rank: Annotated[int | None, typer.Option(help="Of the change; default 64.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 1e-4.")] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", help="Default: one epoch.")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Rows of a step; default 8.")] = None,
    micro_batch_rows: Annotated[
        int | None, typer.Option(help="Of them at a time; default 2.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(metavar="N", help="Steps; default 200.")] = None,
    save_every: Annotated[int | None, typer.Option(metavar="N", help="Steps; default 200.")] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, a third more time.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="[auto|PATH]", help="Go on: the newest, or this one.")
    ] = None,
    output: OutputFolder = None,
    ram_disk: RamDisk = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> Any:
    """Make a teacher used to the data by LoRA: an adapter, and the whole model with it."""
    return api.finetune_teacher(
        teacher,
        tokens,
        sequence_length=sequence_length,
        **given(
            rank=rank,
            learning_rate=learning_rate,
            max_steps=max_steps,
            batch_rows=batch_rows,
            micro_batch_rows=micro_batch_rows,
            eval_every=eval_every,
            save_every=save_every,
        ),
        checkpoint_activations=checkpoint_activations,
        resume=resume,
        output=output,
        ram_disk=ram_disk,
        device=device,
        precision=precision,
    )

"""The model card of an accepted checkpoint: ``README.md`` with Hugging Face metadata.

Every figure in it was measured by ``thimble accept`` or stands in a manifest.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.describe import as_override
from thimble.config.schema import Config
from thimble.errors import DataError
from thimble.evaluation import acceptance
from thimble.evaluation.ladder import ladder_words
from thimble.tokens import packing

if TYPE_CHECKING:
    from thimble.evaluation.acceptance import Acceptance

CARD = "README.md"
SAMPLES = 3
SOURCES = 40  # rows of the table of data; a folder of files may have thousands
MACHINE = ("output_dir", "device")  # keys that say where, not what
UNKNOWN = "not recorded"


def model_card(result: Acceptance, config: Config) -> str:
    """The card's text, of an acceptance whose evaluation was measured.

    The card is no part of the checkpoint's manifest: it describes the files named there.
    """
    make = "thimble tokens build CORPUS"
    packed = acceptance.packed(config.data.folder)
    kind = packing.KIND if packed else "tokens"
    tokens = artifacts.read_manifest(config.data.folder, kind, make=make)
    corpus = None if packed else _corpus(config.data.folder, tokens)
    sections = [
        f"# {config.recipe}",
        _introduction(result, config),
        "## Measured",
        _measured(result, config),
        "## Training data",
        _chunks(config, tokens) if packed else _data(config.data.folder, tokens, corpus),
        "## Training",
        _training(result, config),
        "## Samples",
        _samples(result),
        "## Limits",
        _limits(config),
        "## How to make it again",
        _commands(config, tokens, corpus),
    ]
    return f"---\n{_metadata(result, config, tokens)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(result: Acceptance, config: Config, tokens: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    dataset = _corpus_name(tokens)
    figures = {
        "perplexity": ("Perplexity", result.evaluation["perplexity"]),
        "bits_per_byte": ("Bits per byte", result.evaluation["bits_per_byte"]),
    }
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["thimble", config.recipe, config.model.mixer, config.model.schedule],
        model_name=config.recipe,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=result.split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, (name, value) in figures.items()
        ],
    )
    return data.to_yaml().strip()


def _introduction(result: Acceptance, config: Config) -> str:
    model = config.model
    heads = f"query heads {model.num_attention_heads} and key-value heads "
    heads += f"{model.num_key_value_heads} of {model.head_dim}"
    if model.mixer == "retention":
        heads = f"{model.num_attention_heads} heads of retention of {model.head_dim}"
    reads = f"context {model.max_position_embeddings:,} tokens"
    if model.mixer == "retention":
        reads = f"trained on {config.training.sequence_length:,} tokens at a time"
    register = "import thimble.hub  # registers the architecture\n"
    own = model.mixer == "retention" or model.schedule == "recursive"
    begin = "from random weights"
    if config.training.init_from_teacher:
        begin = f"from weights of {config.teacher.path}"
    if config.objective.name == "distill":
        begin += f" and to say what {config.teacher.path or 'its teacher'} says"
    return "\n\n".join(
        [
            f"A causal language model of {model.num_parameters:,} parameters, trained {begin} "
            f"with thimble on one machine: "
            f"layers {model.num_hidden_layers}, hidden size {model.hidden_size}, {heads}, "
            f"SwiGLU {model.intermediate_size}, vocabulary "
            f"{model.vocab_size:,}, {reads}.",
            "It completes text; it was not instruction-tuned. "
            + ("transformers loads it with thimble:" if own else "transformers loads it as it is:"),
            textwrap.indent(
                (register if own else "")
                + "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
                "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
                "    ",
            ),
        ]
    )


def _measured(result: Acceptance, config: Config) -> str:
    figures = result.evaluation
    what = f"the whole {result.split} split"
    how = "windows of text following one another without overlap"
    if acceptance.packed(config.data.folder):
        what, how = "all held-out chunks", "each read by itself as in training"
    held_out = (
        f"On {what}, {figures['bytes']:,} bytes in {figures['documents']:,} documents that were "
        f"not trained on, {how}:"
    )
    numbers = _table(
        ("", "bits per byte", "perplexity per token", "bytes"),
        [
            (
                name,
                f"{part['bits_per_byte']:.4f}",
                f"{part['perplexity']:.2f}",
                f"{part['bytes']:,}",
            )
            for name, part in [("**all**", figures), *figures["by_category"].items()]
        ],
    )
    mine = figures["bits_per_byte"]
    rungs = [(rung.name, rung.bits_per_byte) for rung in result.ladder]
    rungs.append((f"**{result.recipe}**", mine))
    ladder = ""
    if result.ladder:
        ladder = _table(
            ("on the same bytes", "bits per byte"),
            [(name, f"{bits:.4f}") for name, bits in sorted(rungs, key=lambda rung: -rung[1])],
        )
    gate = _table(
        ("condition", "wanted", "measured"),
        [(c.name, c.wanted, c.measured) for c in result.conditions],
    )
    words = [*(ladder_words(result.ladder, mine) if result.ladder else []), *result.notes]
    parts = [held_out, numbers, ladder, " ".join(words), "It passed the gate:", gate]
    return "\n\n".join(part for part in parts if part)


def _data(path: str, tokens: Mapping[str, Any], corpus: Mapping[str, Any] | None) -> str:
    from pyarrow import parquet

    table = parquet.read_table(
        Path(path) / "train.documents.parquet", columns=["source", "category", "bytes"]
    )
    grouped = table.group_by(["source", "category"]).aggregate(
        [("bytes", "sum"), ([], "count_all")]
    )
    rows = sorted(grouped.to_pylist(), key=lambda row: (-row["bytes_sum"], row["source"]))
    known = (corpus or {}).get("by_source", {})
    shown = [
        (
            row["source"],
            row["category"],
            known.get(row["source"], {}).get("licence") or UNKNOWN,
            f"{row['count_all']:,}",
            f"{row['bytes_sum']:,}",
        )
        for row in rows[:SOURCES]
    ]
    counts = tokens["counts"]["train"]
    text = [
        f"The training split of the corpus `{_corpus_name(tokens)}`: {counts['documents']:,} "
        f"documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens.",
        _table(("source", "category", "licence", "documents", "bytes"), shown),
    ]
    if rest := rows[SOURCES:]:
        text.append(
            f"And {len(rest):,} smaller ones with {sum(row['bytes_sum'] for row in rest):,} bytes."
        )
    if corpus is None:
        text.append("The corpus was no longer at hand when this was written, so licences are open.")
    text.append("The licence of the model itself is not set here; choose it with these in mind.")
    return "\n\n".join(text)


def _chunks(config: Config, tokens: Mapping[str, Any]) -> str:
    """Of packed chunks: the files they were made of, and what was done with them."""
    counts = tokens["counts"]["train"]
    sources = sorted(part["source"] for part in tokens["inputs"].values())
    named = ", ".join(f"`{name}`" for name in sources[:SOURCES])
    more = f" and {len(sources) - SOURCES:,} more" if len(sources) > SOURCES else ""
    return (
        f"The training split of `{Path(config.data.folder).name}`: {counts['documents']:,} "
        f"documents, {counts['tokens']:,} tokens in {counts['chunks']:,} chunks of "
        f"{tokens['max_seq_length']:,}, made of {named}{more}. Their licences are not recorded "
        "here; look where they are from before you publish the model."
    )


def _training(result: Acceptance, config: Config) -> str:
    state = artifacts.read_json(result.checkpoint / "trainer_state.json")
    manifest = artifacts.read_json(result.checkpoint / artifacts.MANIFEST)
    training, optim = config.training, config.optim
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    rows = [
        ("steps", f"{state.get('step', 0):,}"),
        ("tokens seen", f"{state.get('tokens', 0):,}"),
        ("time", f"{state.get('seconds', 0.0) / 60:,.1f} minutes"),
        ("batch", f"{batch} windows of {training.sequence_length:,} tokens"),
        (
            "optimizer",
            f"{optim.name}, learning rate {optim.learning_rate:g} after {optim.warmup_steps:,} "
            f"steps, cosine to {optim.min_lr_ratio:.0%}, weight decay {optim.weight_decay:g}",
        ),
        ("seed", str(config.seed)),
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items())),
    ]
    return _table(("", ""), rows)


def _samples(result: Acceptance) -> str:
    text = [
        f"The first {SAMPLES} of the {len(result.samples)} the gate looked at, not chosen: the "
        "beginning of a held-out document, and what the model makes of it."
    ]
    for sample in result.samples[:SAMPLES]:
        found = f" (degenerate: {sample.problem})" if sample.problem else ""
        text += ["Given:", _quoted(sample.prompt), f"Generated{found}:", _quoted(sample.text)]
    return "\n\n".join(text)


def _limits(config: Config) -> str:
    length = f"{config.training.sequence_length:,}"
    reach = (
        f"It sees at most {config.model.max_position_embeddings:,} tokens, and was trained on "
        f"windows of {length}."
    )
    if config.model.mixer == "retention":
        reach = (
            "It reads any number of tokens in a state that does not grow, and was trained on "
            f"{length} at a time: nothing says that it remembers what stands further back."
        )
    return "\n".join(
        [
            "- It writes what looks like its training text. Names, numbers and facts in it are "
            "often wrong.",
            f"- {reach}",
            "- Perplexity depends on the tokenizer; compare models by bits per byte, and only on "
            "the same text.",
            "- It was not measured on any task beyond predicting this text, nor for what it may "
            "say that harms.",
        ]
    )


def _commands(config: Config, tokens: Mapping[str, Any], corpus: Mapping[str, Any] | None) -> str:
    return textwrap.indent("\n".join(reproduction(config, tokens, corpus)), "    ")


def reproduction(
    config: Config, tokens: Mapping[str, Any], corpus: Mapping[str, Any] | None
) -> Iterator[str]:
    """The commands from sources to gate, one a line."""
    if tokens["kind"] == packing.KIND:
        yield _pack("YOUR_FILES", config.data.folder, tokens)
        if config.data.val_path not in (None, config.data.path):
            other = artifacts.read_json(Path(config.data.val_path) / artifacts.MANIFEST)
            yield _pack("YOUR_OTHER_FILES", config.data.val_path, other)
        yield from _from_tokens(config)
        return
    name, options = _corpus_name(tokens), (corpus or {}).get("options", {})
    if options.get("name"):
        wanted = [f" --{key} {options[key]}" for key in ("scale", "seed") if key in options]
        yield f"thimble corpus build {options['name']}{''.join(wanted)}"
    else:
        yield f"thimble corpus build --from YOUR_FILES --output data/corpus/{shlex.quote(name)}"
    given = tokens["options"].get("tokenizer")
    size = f"--vocab-size {tokens['vocab_size']}"
    used = f"--tokenizer {shlex.quote(given)}" if given else size
    target = shlex.quote(config.data.folder)
    yield f"thimble tokens build {shlex.quote(name)} {used} --output {target}"
    yield from _from_tokens(config)


def _pack(source: str, folder: str, chunks: Mapping[str, Any]) -> str:
    options = chunks["options"]
    return (
        f"thimble tokens pack --input {source} --output {shlex.quote(folder)} --recursive "
        f"--max-seq-length {options['max_seq_length']} --val-ratio {options['val_ratio']:g} "
        "--tokenizer ."
    )


def _from_tokens(config: Config) -> Iterator[str]:
    if config.recipe in configuration.recipe_names():
        changed = "".join(f" {shlex.quote(override)}" for override in overrides(config))
        yield f"thimble train {config.recipe}{changed}"
    else:
        yield f"thimble train {configuration.CONFIG_FILE}  # the one in this folder"
    yield f"thimble accept {shlex.quote(config.output_dir)}/{config.recipe}/RUN"


def overrides(config: Config) -> list[str]:
    """What must be given to the configuration's recipe to get it again, as ``key=value``."""
    recipe = dict(_leaves(configuration.load(config.recipe).model_dump(mode="json")))
    return [
        f"{key}={as_override(value)}"
        for key, value in _leaves(config.model_dump(mode="json"))
        if recipe[key] != value and key not in MACHINE
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _corpus_name(tokens: Mapping[str, Any]) -> str:
    if tokens["kind"] == packing.KIND:
        return "packed chunks"
    return str(tokens["inputs"]["corpus"]["name"])


def _corpus(path: str, tokens: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the corpus the tokens were made from, if it is still where it was."""
    made_from = tokens["inputs"]["corpus"]
    for home in (Path("data/corpus"), Path(path).parent.parent / "corpus", Path(path).parent):
        try:
            manifest = artifacts.read_manifest(home / made_from["name"], "corpus", make="")
        except DataError:
            continue
        if manifest["fingerprint"] == made_from["fingerprint"]:
            return manifest
    return None


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"

    return "\n".join([line(headings), "|" + " --- |" * len(headings), *map(line, rows)])


def _quoted(text: str) -> str:
    """As an indented block: nothing inside can end it or be read as Markdown."""
    return textwrap.indent(text, "    ", lambda line: True) if text.strip() else "    (nothing)"

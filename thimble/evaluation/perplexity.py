"""Loss, perplexity and bits per byte of a model over a held-out split.

The convention is the plain one, the same for every model and baseline: the stream of a split
(documents, each followed by end-of-text) is cut into consecutive windows of ``sequence_length``,
the context starts anew in each, and every token is a target exactly once. The first token of the
stream is predicted from end-of-text, as that is what stands before a document in training.

    bits per byte = sum of -log2 p(token), end-of-text included / bytes of the documents' UTF-8 text

Perplexity is per token and depends on the tokenizer; bits per byte compares any two models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thimble.console import progress
from thimble.errors import DataError

if TYPE_CHECKING:
    from thimble.config.schema import Config
    from thimble.generation.model import Model
    from thimble.tokens.packed import PackedChunks
    from thimble.tokens.packed_text import PackedText
    from thimble.tokens.shards import TokenSplit

IGNORED = -100
# Losses wait on the device and come to the host once in so many numbers (64 MiB of float32), so
# that an ordinary validation split costs a single synchronisation.
HELD_NUMBERS = 1 << 24
BATCH_TOKENS = 8192

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def held_out(
    directory: Path, manifest: Mapping[str, Any], config: Config, split: str
) -> TokenSplit:
    """A split of the very tokens that the checkpoint at ``directory`` was trained on.

    Raises DataError when the tokens are missing, or were built again since: what is held out now
    may have been trained on.
    """
    from thimble.tokens.shards import TokenSplit

    data = TokenSplit(config.data.folder, split)
    check_trained_on(data, directory, manifest)
    return data


def check_trained_on(
    data: TokenSplit | PackedChunks, directory: Path, manifest: Mapping[str, Any]
) -> None:
    """Raise DataError unless the checkpoint at ``directory`` was trained on these very data."""
    if data.manifest["fingerprint"] != manifest["inputs"].get("tokens"):
        raise DataError(
            f"{data.directory} is not what {directory} was trained on: it was built again "
            "since, and what is held out now may have been trained on. Train again, or put "
            "the former tokens back."
        )


def evaluate_split(
    nll: TokenLoss,
    split: TokenSplit,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[float], None] | None = None,
    beside: Sequence[str] = ("top1_accuracy", "top5_accuracy"),
) -> dict[str, Any]:
    """Evaluate a model on a split of a tokens directory.

    ``nll(inputs, targets)`` gets int64 ``[B, T]`` on ``device``, a target of -100 meaning ignored,
    and gives the negative log-likelihood in nats of each target, float32 ``[B, T]``. Choosing
    evaluation mode and precision is its business; gradients are off here. It may give
    ``[B, T, 1 + n]`` instead, beside the loss what is called ``beside``, by default whether the
    target is in the top 1 and the top 5: the means over tokens are then in the result.

    ``max_tokens`` limits the work to a fixed choice of whole documents, in which categories and
    lengths keep their shares, with at most so many tokens together (never fewer than one document),
    put one after the other; all figures are then of exactly these. ``advance(tokens)`` is called
    after each batch.

    Returns ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``,
    ``documents`` and ``by_category``: the same for each category. Losses of NaN give NaN.
    Raises DataError when the split holds no documents or its table does not describe its tokens.
    """
    stream, lengths, sizes, categories = choose_documents(split, max_tokens)
    names, codes = np.unique(categories, return_inverse=True)
    code_of_token = np.repeat(codes.astype(np.int32), lengths)
    sums = np.zeros((0, len(names)))  # a row for each thing measured

    rows = min(batch_size, -(-len(stream) // sequence_length))
    step = rows * sequence_length
    held: list[torch.Tensor] = []
    flushed = 0

    def flush() -> None:
        nonlocal flushed, sums
        columns = torch.cat(held).cpu().numpy().astype(np.float64).T
        part = code_of_token[flushed : flushed + columns.shape[1]]
        added = [np.bincount(part, weights=values, minlength=len(names)) for values in columns]
        sums = sums + added if len(sums) else np.array(added)
        flushed += columns.shape[1]
        held.clear()

    with torch.no_grad():
        for start in range(0, len(stream), step):
            targets = stream[start : start + step].astype(np.int64)
            before = stream[start - 1] if start else split.eot_id
            inputs = np.concatenate([[np.int64(before)], targets[:-1]])
            count = len(targets)
            # The last batch is filled up with ignored targets: one shape, compiled once.
            padding = (0, step - count)
            inputs = np.pad(inputs, padding, constant_values=split.eot_id)
            targets = np.pad(targets, padding, constant_values=IGNORED)
            losses = nll(
                torch.from_numpy(inputs).view(rows, sequence_length).to(device),
                torch.from_numpy(targets).view(rows, sequence_length).to(device),
            )
            held.append(losses.reshape(step, -1)[:count].float())
            if advance:
                advance(count)
            if sum(part.numel() for part in held) >= HELD_NUMBERS:
                flush()
        if held:
            flush()

    tokens = np.bincount(codes, weights=lengths)
    size = np.bincount(codes, weights=sizes)
    documents = np.bincount(codes)
    return {
        **_figures(sums.sum(1), tokens.sum(), size.sum(), documents.sum(), beside),
        "by_category": {
            str(name): _figures(sums[:, i], tokens[i], size[i], documents[i], beside)
            for i, name in enumerate(names)
        },
    }


def perplexity(loss: float) -> float:
    """Of a loss in nats; beyond 700 the exponential leaves the range of a float."""
    return math.exp(loss) if not loss > 700 else math.inf


def _figures(
    sums: np.ndarray, tokens: float, size: float, documents: int, beside: Sequence[str]
) -> dict[str, Any]:
    nats, *others = sums
    loss = float(nats) / int(tokens)
    measured = zip(beside, others, strict=False)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": float(nats) / math.log(2) / int(size),
        "tokens": int(tokens),
        "bytes": int(size),
        "documents": int(documents),
        **{name: float(value) / int(tokens) for name, value in measured},
    }


def evaluate_model(
    measure: TokenLoss,
    model: Model,
    data: TokenSplit,
    sequence_length: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """``evaluate_split`` of a loaded model; ``measure``: its nll or scores."""
    total = min(len(data), max_tokens or len(data))
    with progress(f"{data.split} perplexity", total, "tokens") as advance:
        return evaluate_split(
            measure,
            data,
            sequence_length,
            max(BATCH_TOKENS // sequence_length, 1),
            max_tokens,
            device=model.device,
            advance=advance,
        )


def choose_documents(
    split: TokenSplit | PackedText, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A split's stream and the tokens, bytes and category of each of its documents.

    With ``max_tokens`` a fixed choice of whole documents with at most so many tokens.
    """
    table = split.documents
    lengths = table.column("tokens").to_numpy().astype(np.int64)
    sizes = table.column("bytes").to_numpy().astype(np.int64)
    categories = np.asarray(table.column("category").to_pylist(), dtype=str)
    if not len(lengths) or not sizes.sum():
        raise DataError(
            "The split holds no documents, so there is nothing to evaluate. The corpus is too "
            "small for its share of held-out text; add to it and build the tokens again."
        )
    if lengths.min() < 1 or lengths.sum() != len(split.tokens):
        raise DataError(
            f"The table of documents describes {lengths.sum():,} tokens and the split has "
            f"{len(split.tokens):,}. Build the tokens again."
        )
    if max_tokens is None or lengths.sum() <= max_tokens:
        return split.tokens, lengths, sizes, categories
    # Every n-th document by category and length: the parts keep their shares, which a random choice
    # loses to a few long documents.
    order = np.lexsort((lengths, categories))
    stride = lengths.sum() / max_tokens
    while True:
        picked = order[(np.arange(stride / 2, len(order), stride)).astype(np.int64)]
        if len(picked) < 2 or lengths[picked].sum() <= max_tokens:
            break
        stride *= 1.02
    chosen = np.sort(picked) if len(picked) else order[:1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    stream = np.concatenate([split.tokens[starts[i] : starts[i + 1]] for i in chosen])
    return stream, lengths[chosen], sizes[chosen], categories[chosen]

"""Checks of a GGUF file against the model it was made from, in llama.cpp itself.

llama.cpp gets the same ids as the model and is asked for its logits; it gets the same texts as the
tokenizer and is asked for its ids. Needs llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.console import progress
from thimble.errors import EnvironmentProblem, NotAccepted
from thimble.export import deployment
from thimble.export.gguf_tokenizer import UNCAPPED_WORDS
from thimble.generation.sampling import generate_ids
from thimble.tokens.tokenizer import WORDS, ByteLevelBPE
from thimble.training import devices

if TYPE_CHECKING:
    from thimble.generation import Model
    from thimble.tokens.shards import TokenSplit

TOKENS = 10_000  # compared one by one
AGREEMENT = 0.999  # of them, in which F16 and F32 must name the same likeliest token
GREEDY_TOKENS = 200
PROMPT_TOKENS = 32
TIE = 0.01  # two logits closer than what an export may be off are equally likely
DOCUMENTS = 200
DOCUMENT_TOKENS = 20_000  # at most so much of a document is compared
SPEED_TOKENS = 128
LONGEST = 1024


def available() -> bool:
    """Whether llama-cpp-python is installed and its library loads."""
    try:
        importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


class Engine:
    """A GGUF file loaded by llama.cpp, on the CPU, with as many threads as torch has."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama

    def read(self, ids: Sequence[int], *, go_on: bool = False) -> None:
        """Compute ``ids``, which follow what came before if ``go_on``."""
        if not go_on:
            self.llama.reset()
        self.llama.eval(ids)

    def logits(self, ids: Sequence[int], *, go_on: bool = False) -> Tensor:
        """float32 logits [T, V] of ``ids``."""
        self.read(ids, go_on=go_on)
        end = self.llama.n_tokens
        return torch.from_numpy(self.llama.scores[end - len(ids) : end].copy())

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, in which special tokens are plain text, without bos."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)


@contextlib.contextmanager
def opened(file: Path, context: int, *, all_logits: bool = True) -> Iterator[Engine]:
    """Load a file. Raises NotAccepted, with llama.cpp's own words, when it does not load."""
    import llama_cpp

    threads = torch.get_num_threads()
    with messages() as said:
        try:
            llama = llama_cpp.Llama(
                str(file),
                n_ctx=context,
                logits_all=all_logits,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise NotAccepted(
                f"llama.cpp does not load the file: {''.join(said[-2:]).strip() or error}. "
                "Nothing was written."
            ) from error
        try:
            yield Engine(llama)
        finally:
            llama.close()


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What llama.cpp says meanwhile, which would otherwise go to standard error."""
    import llama_cpp
    from llama_cpp import _logger

    said: list[str] = []

    @llama_cpp.llama_log_callback
    def note(level: int, text: bytes, _: Any) -> None:
        said.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def quantize(source: Path, target: Path, type: str) -> None:
    """Let llama.cpp write an F32 file as ``type``. Raises EnvironmentProblem when it fails."""
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{type}"].value
    params.nthread = torch.get_num_threads()
    with messages() as said:
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
    if status != 0:
        reason = "".join(said[-2:]).strip() or f"status {status}"
        raise EnvironmentProblem(f"llama.cpp could not write {type}: {reason}")


def check(
    file: Path, model: Model, split: TokenSplit | str, window: int, *, exact: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the checks found and the speed measured, for the manifest.

    ``split`` holds the held-out tokens, or says why there are none. ``exact``: the file must decide
    as the model does, over ``GREEDY_TOKENS`` and in ``AGREEMENT`` of ``TOKENS``; other types are
    only measured. Raises NotAccepted when it does not, or when the tokenizers disagree.
    """
    # Of a long context no more than the checks use.
    context = min(model.config.max_position_embeddings, max(window, LONGEST))
    if isinstance(split, str):
        measured = speed(file, [model.tokenizer.eot_id], context)
        reason = f"loaded by llama.cpp, not checked further: {split}"
        return {"result": reason, "warnings": [reason]}, measured
    measured = speed(file, split.tokens[:context].astype(int).tolist(), context)
    with opened(file, context) as engine:
        found: dict[str, Any] = {
            "result": "passed" if exact else "measured",
            "split": f"{split.directory} {split.split}",
            "tokenizer": compare_tokenizers(engine, model, split),
            "logits": compare_logits(engine, model, split, window),
            "greedy": compare_greedy(engine, model, split, context),
            "warnings": [],
        }
    tokenizer, logits, greedy = found["tokenizer"], found["logits"], found["greedy"]
    failed = []
    if tokenizer["differing"] > tokenizer["differing_by_long_runs"]:
        failed.append(
            f"llama.cpp's ids differ from the tokenizer's in {tokenizer['differing']:,} of "
            f"{tokenizer['documents']:,} documents, at first in {tokenizer['example']!r}"
        )
    if not math.isfinite(logits["mean_kl_nats"]):
        failed.append("its logits are not all finite numbers")
    if exact and logits["argmax_agreement"] < AGREEMENT:
        close = f"{logits['argmax_differing_in_ties']} of {logits['argmax_differing']}"
        failed.append(
            f"the likeliest token is the same in {logits['argmax_agreement']:.3%} of "
            f"{logits['tokens']:,}, not in {AGREEMENT:.1%} (where it is another, the model's own "
            f"two likeliest are within {TIE:g} in {close} cases)"
        )
    if exact and greedy["differing"] > greedy["ties"]:
        failed.append(
            f"{greedy['differing']} of {greedy['tokens']} greedy tokens are others, "
            f"{greedy['ties']} of them ties"
        )
    if failed:
        raise NotAccepted(
            f"In llama.cpp the file is not the model: {'; '.join(failed)}. Nothing was written."
        )
    if tokenizer["differing"]:
        found["warnings"].append(
            f"{tokenizer['differing']:,} of {tokenizer['documents']:,} documents have runs of over "
            "64 letters, signs or spaces, which the tokenizer cuts and llama.cpp does not"
        )
    if greedy["ties"] and exact:
        found["warnings"].append(
            f"{greedy['ties']} of {greedy['tokens']} greedy tokens are others where the model's "
            f"own two likeliest are within {TIE:g}: {greedy['tie_gaps']}"
        )
    return found, measured


@torch.inference_mode()
def compare_logits(engine: Engine, model: Model, split: TokenSplit, window: int) -> dict[str, Any]:
    """Agreement over about ``TOKENS`` held-out tokens; KL in nats, of the model from the file."""
    tokens = differing = ties = 0
    divergence = ours_nll = theirs_nll = largest = 0.0
    with progress("logits", min(TOKENS, len(split)), "tokens") as advance:
        for inputs, targets in deployment.windows(split, window, TOKENS):
            ours = model.network(torch.from_numpy(inputs)[None].to(model.device))[0].cpu()
            theirs = engine.logits(inputs.tolist())
            wanted = torch.from_numpy(targets)
            largest = max(largest, float((ours - theirs).abs().max()))
            p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
            divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
            ours_nll += float(F.nll_loss(p, wanted, reduction="sum"))
            theirs_nll += float(F.nll_loss(q, wanted, reduction="sum"))
            first, second = ours.topk(2).values.unbind(-1)
            other = ours.argmax(-1) != theirs.argmax(-1)
            differing += int(other.sum())
            ties += int((other & (first - second <= TIE)).sum())
            tokens += len(targets)
            advance(len(targets))
    before, after = np.exp(ours_nll / tokens), np.exp(theirs_nll / tokens)
    return {
        "tokens": tokens,
        "argmax_agreement": 1 - differing / tokens,
        "argmax_differing": differing,
        "argmax_differing_in_ties": ties,
        "mean_kl_nats": divergence / tokens,
        "largest_logit_difference": largest,
        "perplexity": {
            "checkpoint": float(before),
            "file": float(after),
            "difference_percent": float(100 * (after / before - 1)),
        },
    }


def compare_greedy(engine: Engine, model: Model, split: TokenSplit, context: int) -> dict[str, Any]:
    """Greedy tokens after held-out text, one at a time over llama.cpp's cache.

    Where it would take another token than the model, it is told and goes on from the model's, so
    that every token is compared. Several prompts are used when one does not fill the context.
    """
    prompt_length = min(PROMPT_TOKENS, max(1, context // 4))
    each = min(GREEDY_TOKENS, context - prompt_length)
    count = -(-GREEDY_TOKENS // each)
    gaps: list[float] = []
    differing = 0
    for number in range(count):
        start = number * max(1, (len(split) - prompt_length) // count)
        prompt = [split.eot_id, *split.tokens[start : start + prompt_length - 1].tolist()]
        tokens = generate_ids(
            model.network, prompt, max_tokens=each, temperature=0, top_k=0, top_p=1.0, seed=1
        )
        theirs = engine.logits(prompt)[-1]
        ids = list(prompt)
        for token in tokens:
            if int(theirs.argmax()) != token:
                differing += 1
                gap = top_gap(model, ids)
                if gap <= TIE:
                    gaps.append(round(gap, 6))
            ids.append(token)
            if len(ids) < context:
                theirs = engine.logits([token], go_on=True)[-1]
    return {
        "prompts": count,
        "tokens": count * each,
        "differing": differing,
        "ties": len(gaps),
        "tie_gaps": gaps,
    }


@torch.inference_mode()
def top_gap(model: Model, ids: list[int]) -> float:
    """How far apart the two largest logits after ``ids`` are."""
    logits = model.network(torch.tensor([ids], device=model.device))[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second


def compare_tokenizers(engine: Engine, model: Model, split: TokenSplit) -> dict[str, Any]:
    """Ids of held-out documents by the tokenizer and by llama.cpp."""
    table = split.documents
    chosen = np.unique(np.linspace(0, len(table) - 1, DOCUMENTS).astype(np.int64))
    starts, lengths = table.column("start").to_numpy(), table.column("tokens").to_numpy()
    differing = explained = 0
    example = ""
    for index in chosen:
        end = starts[index] + min(int(lengths[index]) - 1, DOCUMENT_TOKENS)
        text = model.tokenizer.decode(split.tokens[starts[index] : end].tolist())
        ours, theirs = model.tokenizer.encode(text), engine.tokenize(text)
        if ours == theirs:
            continue
        differing += 1
        if isinstance(model.tokenizer, ByteLevelBPE) and has_long_runs(text):
            explained += 1
        elif not example:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0
            )
            example = model.tokenizer.decode(ours[max(0, place - 3) : place + 5])
    return {
        "documents": len(chosen),
        "differing": differing,
        "differing_by_long_runs": explained,
        **({"example": example} if example else {}),
    }


def has_long_runs(text: str) -> bool:
    """Whether the cap of 64 in our splitting of words cuts something in ``text``."""
    from tokenizers import Regex, pre_tokenizers

    cut, whole = (
        pre_tokenizers.Split(Regex(words), "isolated").pre_tokenize_str(text)
        for words in (WORDS, UNCAPPED_WORDS)
    )
    return cut != whole


def speed(file: Path, ids: list[int], context: int) -> dict[str, Any]:
    """Tokens per second of reading a prompt and of generating after it, the median of three."""
    prompt = [ids[i % len(ids)] for i in range(min(4 * SPEED_TOKENS, max(1, context // 2)))]
    count = min(SPEED_TOKENS, context - len(prompt))
    reading, writing = [], []
    with opened(file, context, all_logits=False) as engine:
        engine.read(prompt)  # to have the file in memory
        for _ in range(3):
            begun = time.perf_counter()
            engine.read(prompt)
            read = time.perf_counter()
            for token in prompt[:count]:
                engine.read([token], go_on=True)
            reading.append(len(prompt) / (read - begun))
            writing.append(count / (time.perf_counter() - read))
    return {
        "prompt_tokens": len(prompt),
        "prompt_tokens_per_second": round(median(reading), 1),
        "generated_tokens": count,
        "generated_tokens_per_second": round(median(writing), 1),
        "hardware": devices.describe(torch.device("cpu")),
    }

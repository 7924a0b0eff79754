"""The tokenizer in the file is the model's: llama.cpp gives the same ids, or it is refused."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tests.helpers_export import checkpoint_of
from tests.helpers_tokens import document
from tests.helpers_training import token_directory
from tests.models.test_causal_lm import small
from thimble.errors import DataError
from thimble.export import gguf, gguf_tokenizer, llama_cpp
from thimble.tokens.sentencepiece import HARD_TEXTS, SentencePieceTokenizer
from thimble.tokens.tokenizer import HuggingFaceTokenizer, Tokenizer, train

without_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="needs llama-cpp-python")


def texts_of_all_kinds() -> list[str]:
    draw = random.Random(5)
    return [*HARD_TEXTS, *(document(draw, 12) for _ in range(40))]


@without_llama_cpp
@pytest.mark.parametrize("kind", ["ours", "llama 3", "gpt2", "smollm"])
def test_llama_cpp_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    """On texts without runs that the cap of 64 cuts; without NUL, which ends a C string."""
    texts = texts_of_all_kinds()
    tokenizer = byte_level(kind, train(texts, 500))
    checkpoint = checkpoint_of(tmp_path / "m", small(vocab_size=520), tokenizer)
    done = gguf.export(checkpoint, output=tmp_path / "m.gguf")
    with llama_cpp.opened(done.path, 48) as engine:
        for text in texts:
            if not llama_cpp.has_long_runs(text) and "\x00" not in text:
                assert engine.tokenize(text) == tokenizer.encode(text), text


def byte_level(kind: str, tokenizer: HuggingFaceTokenizer) -> HuggingFaceTokenizer:
    """The same merges over another splitting into words."""
    layout = json.loads(tokenizer.backend.to_str())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if kind == "llama 3":
        words = {"Regex": gguf_tokenizer.UNCAPPED_WORDS}
        layout["pre_tokenizer"]["pretokenizers"][0]["pattern"] = words
        layout["model"]["ignore_merges"] = True
    elif kind == "gpt2":
        layout["pre_tokenizer"] = {**level, "use_regex": True}
    elif kind == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        parts = [digits, {**level, "use_regex": True}]
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    return HuggingFaceTokenizer(Backend.from_str(json.dumps(layout)), {}, kind)


@without_llama_cpp
def test_llama_cpp_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    texts = texts_of_all_kinds()
    tokenizer = sentencepiece_of(texts, LLAMA_2)
    checkpoint = checkpoint_of(tmp_path / "m", small(vocab_size=520), tokenizer)
    done = gguf.export(checkpoint, output=tmp_path / "m.gguf")
    with llama_cpp.opened(done.path, 48) as engine:
        for text in texts:
            if text and "\x00" not in text:
                assert engine.tokenize(text) == tokenizer.encode(text), text


LLAMA_2 = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def sentencepiece_of(texts: list[str], options: dict[str, Any]) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n")]),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue(), "made")


def test_the_splitting_differs_from_llama_3_only_by_the_cap() -> None:
    ours, theirs = (
        pre_tokenizers.Split(Regex(words), "isolated")
        for words in (gguf_tokenizer.WORDS, gguf_tokenizer.UNCAPPED_WORDS)
    )
    short = gguf_tokenizer.WORDS.replace("64", "999")
    patient = pre_tokenizers.Split(Regex(short), "isolated")
    for text in texts_of_all_kinds():
        if text:
            assert patient.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    assert ours.pre_tokenize_str("a" * 65) != theirs.pre_tokenize_str("a" * 65)


def foreign(change: str) -> HuggingFaceTokenizer:
    layout = json.loads(train(texts_of_all_kinds(), 500).backend.to_str())
    if change == "another pre-tokenizer":
        layout["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+"}
    elif change == "a normalizer":
        layout["normalizer"] = {"type": "NFKC"}
    elif change == "words that are not merged":
        del layout["model"]["merges"][-1]
    return HuggingFaceTokenizer(Backend.from_str(json.dumps(layout)), {}, change)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: foreign("another pre-tokenizer"), "pre-tokenizer .Split, ByteLevel. is none"),
        (lambda: foreign("a normalizer"), "not a byte-level BPE without a normalizer"),
        (lambda: foreign("words that are not merged"), "disagree about the word"),
        (lambda: sentencepiece_of(texts_of_all_kinds(), {}), "not a BPE model.*normalizes text"),
        (
            lambda: sentencepiece_of(texts_of_all_kinds(), LLAMA_2 | {"byte_fallback": False}),
            "no tokens for single bytes",
        ),
    ],
)
def test_a_tokenizer_llama_cpp_would_not_reproduce_is_refused(
    tokenizer: Any, reason: str, tmp_path: Path
) -> None:
    made: Tokenizer = tokenizer()
    with pytest.raises(DataError, match=reason):
        gguf_tokenizer.vocabulary_of(made, 600, {}, tmp_path)


def test_a_gap_in_the_ids_gets_a_name_of_its_own() -> None:
    tokens, kinds = gguf_tokenizer._fill({"a": 0, "<|unused-1|>": 2}, 4)
    assert len(set(tokens)) == 4
    assert kinds == [1, 5, 1, 5]


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    other = checkpoint_of(tmp_path / "m", small(vocab_size=520), train(texts_of_all_kinds(), 500))
    with pytest.raises(DataError, match="is not the one these tokens were made with"):
        gguf.export(other, output=tmp_path / "m.gguf", tokens=token_directory())

"""Ids are those of ``sentencepiece`` itself, and those of transformers where it is written for."""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.helpers_tokens import document
from thimble.errors import DataError
from thimble.tokens.sentencepiece import HARD_TEXTS
from thimble.tokens.tokenizer import load_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "plain": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["  ", "<x>"],
    },
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(3)
    code = ["def f(x):\n        return  x[0]\n\n\tif a==b:  #  two  spaces\n", "  \n\n   a\n"]
    return [document(rng, 10) for _ in range(60)] + code


@pytest.fixture(scope="module")
def models(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    lines = [line for text in texts for line in text.split("\n")]
    for name, options in KINDS.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_sentencepiece(
    models: Path, texts: list[str], tmp_path: Path, name: str
) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(models / f"{name}.model"))
    tokenizer = load_tokenizer(models / f"{name}.model")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    for text in [*HARD_TEXTS, *texts]:
        expected = original.encode(text)
        assert tokenizer.encode(text) == expected
        assert again.pack([text])[0].tolist() == [*expected, original.eos_id()]
        assert not {original.eos_id(), original.bos_id()} & set(expected)
        assert tokenizer.decode(expected) == original.decode(expected)


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_transformers_gives_the_same_ids(
    models: Path, texts: list[str], tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(models / f"{name}.model")
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in [*HARD_TEXTS, *texts]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eot_id


@pytest.mark.parametrize("name", ["unigram", "symbols"])
def test_a_conversion_that_is_not_exact_is_not_written(
    models: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="thimble"):
        load_tokenizer(models / f"{name}.model").save(tmp_path)
    assert (tmp_path / "tokenizer.model").is_file()
    assert not (tmp_path / "tokenizer.json").exists()
    assert "only tokenizer.model" in caplog.text


def test_broken_models_are_named(models: Path, tmp_path: Path) -> None:
    whole = (models / "llama.model").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"no model"), ("none", b"")):
        (tmp_path / f"{name}.model").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / f"{name}.model")


def test_without_an_end_of_sentence(texts: list[str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].split("\n")),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="no end-of-sentence"):
        load_tokenizer(tmp_path / "m.model")

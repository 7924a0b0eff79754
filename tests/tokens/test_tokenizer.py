"""Ids are those of the library, text comes back, special tokens are never made from text."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers_tokens import document
from thimble.errors import DataError, EnvironmentProblem
from thimble.tokens.tokenizer import (
    END_OF_TEXT,
    PAD,
    UNKNOWN,
    ByteLevelBPE,
    HuggingFaceTokenizer,
    _words,
    load_tokenizer,
    train,
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(7)
    return [document(rng, 20) for _ in range(60)]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> HuggingFaceTokenizer:
    return train(texts, 600)


@pytest.fixture
def folder(trained: HuggingFaceTokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def wild_text(rng: random.Random) -> str:
    """Runs of characters that the word pattern treats differently, in any order and length."""
    pieces = [
        *map(chr, range(128)),
        *("\u0085", "\u00a0", "\u2003", "\u2028", "\u200d", "ſ", "\u212a", "é", "e\u0301"),
        *("漢", "٣", "½", "🙂", "'s", "'LL", "'Re", "'", "don't", "0x1F", " \n", "\r\n"),
        *("word", " word", END_OF_TEXT, PAD),
    ]
    pieces = rng.sample(pieces, 5) + rng.choices("\n\r\t  é", k=2)  # few, so that they meet
    lengths = (1, 1, 1, 2, 3, 63, 64, 65, 130)
    return "".join(
        rng.choice(pieces) * rng.choice(lengths if rng.random() < 0.2 else (1,))
        for _ in range(rng.randint(0, 30))
    )


def test_pack_gives_the_ids_of_the_library() -> None:
    rng = random.Random(1)
    texts = [wild_text(rng) for _ in range(3000)]
    trained = train(texts, 2000)  # on these texts, so that there are merges at every kind of place
    assert isinstance(trained, ByteLevelBPE)
    ids, lengths = trained.pack(texts)
    expected = [trained.backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert lengths.tolist() == [len(one) + 1 for one in expected]
    assert ids.tolist() == [i for one in expected for i in (*one, trained.eot_id)]
    assert trained.encode_batch(texts) == expected


def test_text_comes_back_and_no_special_id_is_made_from_it(trained: HuggingFaceTokenizer) -> None:
    rng = random.Random(2)
    texts = [wild_text(rng) for _ in range(500)] + [f"a{END_OF_TEXT}{PAD}b {UNKNOWN}"]
    assert (trained.eot_id, trained.pad_id) == (0, 1)
    for text in texts:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert not {0, 1, 2} & set(ids)


def test_the_word_cache_stays_bounded(
    trained: HuggingFaceTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("thimble.tokens.tokenizer._CACHED_WORDS", 10)
    small = load_tokenizer(folder)
    assert isinstance(small, ByteLevelBPE)
    for text in texts[:10]:
        assert np.array_equal(small.pack([text])[0], trained.pack([text])[0])
        assert len(small.words) <= 10 + len(set(_words(text)))


def test_training_is_reproducible_and_bounded_by_the_text(texts: list[str]) -> None:
    first, second = train(texts, 500), train(texts, 500)
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size == 500
    assert train(["too little text to merge much"], 500).vocab_size < 300


def test_long_runs_do_not_hang_training() -> None:
    started = time.monotonic()
    trained = train(["ab" * 50_000, "=" * 100_000, " " * 100_000], 400)
    assert time.monotonic() - started < 20
    assert max(len(token) for token in trained.vocabulary()) <= 65


@pytest.mark.parametrize("model_type", [None, "mistral", "llama"])
def test_transformers_loads_the_same_tokenizer(
    trained: HuggingFaceTokenizer, folder: Path, texts: list[str], model_type: str | None
) -> None:
    from transformers import AutoTokenizer

    if model_type:
        config = {"model_type": model_type, "vocab_size": 600, "hidden_size": 64}
        (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*texts, "Hello\n  indented", "a  b   c", "x" * 200]:
        assert theirs.encode(text, add_special_tokens=False) == trained.encode(text)
        assert theirs.decode(trained.encode(text)) == text
    assert theirs.eos_token_id == 0
    assert theirs.pad_token_id == 1
    assert theirs.unk_token == UNKNOWN
    chat = [
        {"role": "user", "content": "What is 8086?"},
        {"role": "assistant", "content": "Intel."},
    ]
    assert theirs.apply_chat_template(chat, tokenize=False) == (
        "Question: What is 8086?\nAnswer: Intel."
    )
    assert theirs.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == (
        "Question: What is 8086?\nAnswer:"
    )
    theirs.save_pretrained(folder / "again")
    assert load_tokenizer(folder / "again").fingerprint == trained.fingerprint


def test_fingerprint_tells_tokenizers_apart(
    trained: HuggingFaceTokenizer, folder: Path, texts: list[str]
) -> None:
    assert load_tokenizer(folder).fingerprint == trained.fingerprint
    assert load_tokenizer(folder / "tokenizer.json").fingerprint == trained.fingerprint
    assert train(texts, 599).fingerprint != trained.fingerprint
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}  # the same vocabulary, other ids
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).fingerprint != trained.fingerprint


def test_a_length_limit_in_the_file_cuts_nothing(
    trained: HuggingFaceTokenizer, folder: Path
) -> None:
    limited = trained.backend.from_str(trained.backend.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    limited.save(str(folder / "tokenizer.json"))
    text = "kernel module device interrupt syscall"
    assert load_tokenizer(folder).encode(text) == trained.encode(text)
    assert len(load_tokenizer(folder).encode(text)) > 4
    assert load_tokenizer(folder).encode_batch(["a"]) == trained.encode_batch(["a"])


def test_other_layouts_do_not_take_the_fast_way(folder: Path, texts: list[str]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    other = load_tokenizer(folder)
    assert not isinstance(other, ByteLevelBPE)
    assert other.pack(texts[:1])[0].tolist() == [*other.encode(texts[0]), other.eot_id]


def test_vocab_json_and_merges_txt(trained: HuggingFaceTokenizer, tmp_path: Path) -> None:
    trained.backend.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocabulary()[END_OF_TEXT] == loaded.eot_id
    assert loaded.decode(loaded.encode("kernel  module\n")) == "kernel  module\n"


def test_gaps_in_the_ids_count(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["extra"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).vocab_size == 1001


def test_nothing_of_a_foreign_configuration_runs_or_survives(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(folder).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_is_no_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no tokenizer at .*gone\.json"):
        load_tokenizer(tmp_path / "gone.json")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(folder)


def test_without_an_end_of_text_token(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text().replace(END_OF_TEXT, "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|other|>"}}')
    assert load_tokenizer(folder).eot_id == 0


def test_a_hub_name_without_network() -> None:
    with pytest.raises(EnvironmentProblem, match=r"nobody/nothing-here.*Hugging Face hub"):
        load_tokenizer("nobody/nothing-here")

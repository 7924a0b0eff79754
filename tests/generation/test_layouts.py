"""A model is asked as it was trained, within what it sees; nothing is left out in silence."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from tests.helpers_cli import Command
from tests.helpers_recursive import WORDS, conversations, model_config, network_of, tokenizer_folder
from tests.models.test_causal_lm import model_of, small
from thimble.artifacts import write_json
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError, DataError
from thimble.generation import load
from thimble.generation.layouts import Dialogue, Document, Instructions, Message, layout_of
from thimble.generation.text import between, stream_text
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer
from thimble.training.checkpoint import save_model


@pytest.fixture(scope="module")
def data() -> Conversations:
    return conversations()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of the kind the Llama family has."""
    draw, model = random.Random(1), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choices(WORDS, k=12)) for _ in range(200)]),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def instructions(**changes: Any) -> dict[str, Any]:
    given = {"template": "plain", "system_message": "Be brief.", "end_id": 0, "pad_id": 1}
    return {**given, "seq_len": 64, "form": "softmax", **changes}


def dialogue(**changes: Any) -> Dialogue:
    tokenizer = load_tokenizer(tokenizer_folder())
    given = instructions(end_id=tokenizer.eot_id, **changes)
    return Dialogue(tokenizer, Instructions.model_validate(given))


def said(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# --- what a model reads


def test_a_prompt_is_the_beginning_of_the_training_example(data: Conversations) -> None:
    tokenizer = data.tokenizer()
    given = instructions(system_message="", end_id=data.end_id)
    layout = Dialogue(tokenizer, Instructions.model_validate(given))
    whole = 0
    for number in range(len(data)):
        ids, labels = data.example(number)
        if len(ids) > 50:
            continue
        ends = np.flatnonzero(ids == data.end_id)[1:]  # the first one begins the text
        text = [tokenizer.decode(part.tolist()) for part in np.split(ids[1:], ends)]
        turns = [t.strip("\n") for part in text[:-1] for t in part.split("[ASSISTANT]\n")]
        messages = said(*(turn.removeprefix("[USER]\n") for turn in turns))
        for count in range(1, len(messages), 2):
            begins = np.flatnonzero(labels[1:] & ~labels[:-1])[count // 2] + 1
            prompt, _ = layout.ask(messages[:count], 1000, 1)
            assert prompt == ids[:begins].tolist()
            whole += 1
    assert whole > 50


def test_the_oldest_turns_go_first_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    layout = dialogue(seq_len=260)
    turns = [f"the kernel {i}" if i % 2 else f"what is {i}" for i in range(9)]
    ids, answer = layout.ask(said(*turns), 300, 130)
    text = layout.tokenizer.decode(ids)
    assert len(ids) <= 130
    assert answer == 130
    kept = sorted((turn for turn in turns if turn in text), key=text.index)
    assert kept == turns[-len(kept) :]
    assert 3 < len(kept) < 9  # more than one whole turn
    assert len(kept) % 2 == 1
    assert "[SYSTEM]\nBe brief." in text
    assert f"the oldest {(9 - len(kept)) // 2} of 5 turns are left out" in caplog.text
    caplog.clear()
    more, _ = layout.ask(said(*turns), 300, 90)
    assert len(ids) < len(more) <= 170


def test_of_a_long_question_the_end_is_kept_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layout = dialogue()
    fits = " ".join(["device"] * 6)
    ids, answer = layout.ask(said(fits), 64, 32)
    assert 32 < len(ids) <= 48
    assert answer == 64 - len(ids)
    assert not caplog.messages
    ids, answer = layout.ask(said(" ".join(["device"] * 99)), 64, 32)
    assert (len(ids), answer) == (48, 16)
    assert ids[0] == layout.begin
    assert layout.tokenizer.decode(ids).endswith("device\n[ASSISTANT]\n")
    assert "there is room for 48: its beginning is left out" in caplog.text
    with pytest.raises(ConfigError, match=r"dataset\.seq_len=20"):
        layout.ask(said("why"), 5, 2)


def test_messages_must_alternate() -> None:
    for messages in (said("a", "b"), [*said("a"), *said("b")], said("a")[1:]):
        with pytest.raises(ConfigError, match="alternate"):
            dialogue().ask(messages, 64, 9)


def test_a_long_prompt_of_a_plain_model_is_said_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder())
    save_model(tmp_path, model_of(small(vocab_size=330, hidden_size=48)), tokenizer)
    model = load(tmp_path, device="cpu")
    assert isinstance(model.layout, Document)
    model.generate("device " * 99, max_tokens=2)
    assert "its beginning is left out" in caplog.text
    caplog.clear()
    model.chat(said(*["device " * 4] * 9), max_tokens=2)
    assert "turns are left out" in caplog.text
    for options, words in (
        ({"steps": 2}, "runs once"),
        ({"system_message": "x"}, "without system messages"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.generate(message="why", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="models of conversations"):
        load(tmp_path, device="cpu", seq_len=99)


# --- what a checkpoint says of it


def checkpoint(folder: Path, given: dict[str, Any] | None, **changes: Any) -> Path:
    config = model_config(**changes)
    save_model(folder, network_of(config), load_tokenizer(tokenizer_folder()))
    if given is not None:
        write_json(folder / "conversation.json", given)
    return folder


def test_the_answer_is_half_of_the_sequence_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thimble.generation.model as module

    asked: list[dict[str, Any]] = []

    def noted(network: Any, ids: list[int], **options: Any) -> Any:
        asked.append(options | {"prompt": len(ids)})
        return iter(())

    monkeypatch.setattr(module, "generate_ids", noted)
    given = instructions(end_id=3, form="stablemax", seq_len=90)
    model = load(checkpoint(tmp_path, given, max_position_embeddings=100), device="cpu")
    model.generate(message="why")
    assert not caplog.messages
    model.generate(message="why", max_tokens=999)
    room = 90 - asked[0]["prompt"]
    assert [options["max_tokens"] for options in asked] == [45, room]
    assert 45 < room < 90
    assert f"room for {room} tokens of an answer" in caplog.text
    for options in asked:
        assert options["temperature"] == 0
        assert options["stop"] == {3, model.tokenizer.eot_id}
        assert options["form"] == "stablemax"
        assert options["steps"] is None
    with pytest.raises(ConfigError, match="--max-tokens 0"):
        model.generate(message="why", max_tokens=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_len": "64"}, "seq_len"),
        ({"form": None}, "form"),
        ({"other": 1}, "other"),
    ],
)
def test_a_damaged_description_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_json(tmp_path / "conversation.json", instructions(**changes))
    with pytest.raises(DataError, match=words):
        layout_of(tmp_path, load_tokenizer(tokenizer_folder()))


@pytest.mark.parametrize("verb", ["generate {} --message why", "generate {} --prompt x", "chat {}"])
def test_a_model_of_puzzles_has_no_words(
    tmp_path: Path, thimble_command: Command, verb: str
) -> None:
    save_model(tmp_path, network_of(model_config(causal=False)), None)
    write_json(tmp_path / "puzzle.json", {"kind": "sudoku"})
    answer = thimble_command(*verb.format(tmp_path).split())
    assert answer.status == 2
    assert answer.err.endswith(f"\n  thimble evaluate {tmp_path}\n")
    assert answer.err.count("\n") == 2
    assert json.loads(thimble_command("--json", *verb.format(tmp_path).split()).out)["status"] == 2


@pytest.mark.parametrize("words", ["generate", "generate a b", "generate a --checkpoint b", "chat"])
def test_one_checkpoint_is_named(thimble_command: Command, words: str) -> None:
    answer = thimble_command(*words.split(), *(["--message", "x"] if "gen" in words else []))
    assert answer.status == 2
    assert "Which checkpoint?" in answer.err


# --- tokens to text


@pytest.mark.parametrize(
    "text",
    [
        "the kernel loads a module",
        "größe 漢字 🙂 is  ok\n\n- the\tdriver",
        " why",
        "🙂🙂",
        "the",
    ],
)
def test_a_stream_is_the_text(pieces: Tokenizer, data: Conversations, text: str) -> None:
    for tokenizer in (pieces, data.tokenizer()):
        ids = tokenizer.encode(text)
        streamed = list(stream_text(ids, tokenizer, []))
        assert "".join(streamed) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in streamed)
        begin = tokenizer.encode("what is")
        whole = tokenizer.decode(begin + ids)
        assert "what is" + "".join(stream_text(ids, tokenizer, begin)) == whole


def test_a_prompt_is_continued_with_its_space(
    tmp_path: Path, pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thimble.generation.model as module

    network = network_of(model_config(vocab_size=pieces.vocab_size))
    save_model(tmp_path, network, pieces)
    write_json(tmp_path / "conversation.json", instructions(end_id=pieces.eot_id))
    model = load(tmp_path, device="cpu")
    follows = pieces.encode("loads a module")
    monkeypatch.setattr(module, "generate_ids", lambda *args, **options: iter(follows))
    assert model.generate("the kernel") == " loads a module"
    assert model.generate(message="the kernel") == "loads a module"


def test_broken_characters_are_not_waited_for_without_end(data: Conversations) -> None:
    tokenizer = data.tokenizer()
    broken = tokenizer.encode("漢")[:1] * 9
    assert "".join(stream_text(broken, tokenizer, [])).count("\ufffd") == 9


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_what_a_template_adds_is_taken_away(size: int) -> None:
    for text, expected in (
        (" a b\n\n", "a b\n"),
        ("a b", "a b"),
        (" ", ""),
        ("", ""),
        ("\n", ""),
        ("  a\n\nb\n", " a\n\nb"),
    ):
        cut = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(between(cut, " ", "\n")) == expected
        assert "".join(between(cut, "", "")) == text

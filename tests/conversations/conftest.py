"""A small tokenizer, with a chat template of its own, and files of conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thimble.artifacts import write_json
from thimble.console import log
from thimble.tokens.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, load_tokenizer, train

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = [
    *("the", "kernel", "loads", "a", "module", "mounts", "disk", "device", "driver"),
    *("which", "what", "how", "why", "is", "7", "42", "ok"),
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest hear the log, also after a test that ran the command."""
    monkeypatch.setattr(log, "propagate", True)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(1)
    train([sentence(rng, 12) for _ in range(200)], 400).save(folder)
    return folder


@pytest.fixture(scope="session")
def chatml_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the two special tokens of ChatML and its template."""
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path_factory.mktemp("chatml")
    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for name in ("<|im_start|>", "<|im_end|>"):
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": END_OF_TEXT, "chat_template": CHATML}
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> HuggingFaceTokenizer:
    return load_tokenizer(tokenizer_folder)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> HuggingFaceTokenizer:
    return load_tokenizer(chatml_folder)  # type: ignore[return-value]


def sharegpt(*said: str, **more: Any) -> dict[str, Any]:
    """A record in the form of SlimOrca: question, answer, question, answer, ..."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"conversations": turns, **more}


def records(count: int, longest: int = 30) -> list[dict[str, Any]]:
    """Different questions and answers, of up to ``longest`` words."""
    rng = random.Random(2)
    return [
        sharegpt(
            f"{sentence(rng, rng.randint(2, longest))} {i}?",
            f"{sentence(rng, rng.randint(2, longest))} {i}.",
        )
        for i in range(count)
    ]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "said.jsonl") -> Path:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import helpers_training
from tests.helpers_cli import Command, make_corpus
from thimble import tokens
from thimble.training import train

# A llama with a tied head, and a shape that only mistral has: 3 heads of 16 are not 32.
LLAMA = ("model.hidden_size=32", "model.num_hidden_layers=2")
MISTRAL = (
    "model.hidden_size=32",
    "model.num_attention_heads=3",
    "model.head_dim=16",
    "model.tie_word_embeddings=false",
)


def sentences(count: int) -> list[str]:
    """Text in which the two words before say the next one: a model has to use all its layers."""
    words = ["kernel", "driver", "module", "device", "disk", "loads", "mounts", "the", "a", "log"]
    draw = random.Random(0)
    texts = []
    for number in range(count):
        at = draw.choices(range(len(words)), k=2)
        for _ in range(40):
            at.append((3 * at[-1] + 7 * at[-2] + 1) % len(words))
        texts.append(" ".join(words[i] for i in at) + f" {number}.")
    return texts


@pytest.fixture(scope="session")
def long_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokens whose validation split has enough windows to calibrate on."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus = make_corpus(folder / "corpus", texts=sentences(400))
    return str(tokens.build(corpus, output=folder / "tokens", vocab_size=300, workers=1))


def trained(folder: Path, tokens_directory: str, *overrides: str) -> Path:
    config = helpers_training.config(
        folder,
        f"data.path={tokens_directory}",
        "training.max_steps=300",
        "training.eval_every=300",
        "training.save_every=300",
        "optim.learning_rate=0.03",
        *overrides,
    )
    return train(config).path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, long_tokens: str) -> Path:
    return trained(tmp_path_factory.mktemp("llama"), long_tokens, *LLAMA)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory, long_tokens: str) -> Path:
    return trained(tmp_path_factory.mktemp("mistral"), long_tokens, *MISTRAL)


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)

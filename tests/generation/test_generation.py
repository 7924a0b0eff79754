"""Generation: what transformers generates, within the options asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import thimble
from tests.models.test_causal_lm import model_of, small
from thimble.errors import ConfigError, DataError
from thimble.generation import load
from thimble.generation.layouts import question
from thimble.generation.sampling import choose, generate_ids
from thimble.tokens.tokenizer import train as train_tokenizer
from thimble.training.checkpoint import save_model

TEXTS = ["the kernel loads a module", "a driver for the device", "größe 漢字 🙂"] * 20
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    config = small(vocab_size=400, hidden_size=48, initializer_range=0.3)
    save_model(path, model_of(config), train_tokenizer(TEXTS, 400))
    return path


def test_greedy_equals_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = load(directory, device="cpu").network
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    prompt = [5, 9, 33, 200]
    mine = list(generate_ids(ours, prompt, max_tokens=40, **GREEDY))  # type: ignore[arg-type]
    reference = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert mine == reference[0, len(prompt) :].tolist()


def test_goes_on_beyond_the_context(directory: Path) -> None:
    model = load(directory, device="cpu").network
    context = model.config.max_position_embeddings
    ids = list(generate_ids(model, [3] * (context + 5), max_tokens=3 * context, **GREEDY))  # type: ignore[arg-type]
    assert len(ids) == 3 * context
    assert all(0 <= token < 400 for token in ids)


def test_sampling_keeps_to_its_options() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, -1.0, -9.0])
    draw = torch.Generator().manual_seed(0)

    def seen(temperature: float, top_k: int, top_p: float) -> set[int]:
        return {choose(logits, temperature, top_k, top_p, draw) for _ in range(400)}

    assert seen(0, 0, 1.0) == {0}
    assert seen(1.0, 2, 1.0) == {0, 1}
    assert seen(1.0, 1, 1.0) == {0}
    # softmax: 0.665 + 0.245 = 0.91 reaches 0.9, the third is not needed.
    assert seen(1.0, 0, 0.9) == {0, 1}
    assert seen(1.0, 0, 0.5) == {0}
    assert seen(50.0, 0, 1.0) == {0, 1, 2, 3, 4}


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose(logits, 1.0, 0, 1.0, draw)] += 1
    torch.testing.assert_close(counts / 4000, logits.exp(), atol=0.03, rtol=0)


def test_a_seed_decides_the_text_and_the_stream_is_the_text(directory: Path) -> None:
    model = thimble.load(directory)
    pieces: list[str] = []
    first = model.generate("the kernel", max_tokens=60, seed=3, stream=pieces.append)
    assert first == model.generate("the kernel", max_tokens=60, seed=3)
    assert first != model.generate("the kernel", max_tokens=60, seed=4)
    assert "".join(pieces) == first
    assert len(pieces) > 5


def test_multibyte_characters_arrive_whole(directory: Path) -> None:
    model = load(directory, device="cpu")
    ids = model.tokenizer.encode("漢字🙂é" * 3)
    assert len(ids) > 6  # several bytes a character, so several tokens a character
    import thimble.generation.model as module

    original, module.generate_ids = module.generate_ids, lambda *a, **k: iter(ids)
    try:
        pieces: list[str] = []
        model.generate("x", max_tokens=100, stream=pieces.append)
    finally:
        module.generate_ids = original
    assert "".join(pieces) == "漢字🙂é" * 3
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_answer_ends_before_the_next_question(directory: Path) -> None:
    model = load(directory, device="cpu")
    ids = model.tokenizer.encode(" a driver\nwith Quest\nQuestion: more?")
    import thimble.generation.model as module

    original, module.generate_ids = module.generate_ids, lambda *a, **k: iter(ids)
    try:
        answer = model.generate(message="what?")
        reply = model.chat([{"role": "user", "content": "what?"}])
    finally:
        module.generate_ids = original
    assert answer == reply == "a driver\nwith Quest"


def test_a_conversation_is_written_as_in_the_corpus(directory: Path) -> None:
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A disk."},
        {"role": "user", "content": "Which?"},
    ]
    assert question(messages) == "Question: What is it?\nAnswer: A disk.\nQuestion: Which?\nAnswer:"
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert theirs == question(messages)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}],
)
def test_impossible_options_are_refused(options: dict[str, float], directory: Path) -> None:
    with pytest.raises(ConfigError):
        load(directory).generate("x", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="either a prompt"):
        load(directory).generate("x", message="y")


def test_a_tokenizer_that_does_not_fit_is_refused(directory: Path, tmp_path: Path) -> None:
    save_model(
        tmp_path, model_of(small(vocab_size=300, hidden_size=48)), train_tokenizer(TEXTS, 300)
    )
    big = train_tokenizer([*TEXTS, *(f"word{i} word{i}" for i in range(300))], 600)
    big.save(tmp_path)
    with pytest.raises(DataError, match="do not belong together"):
        load(tmp_path)

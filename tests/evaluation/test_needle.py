"""Needles: found by a model that can remember, and only as far as it remembers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers_training import token_directory
from thimble.config.model import ModelConfig
from thimble.errors import ConfigError, DataError
from thimble.evaluation import needle
from thimble.evaluation.reading import StudentReader
from thimble.models.causal_lm import CausalLM
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer

BEGIN, ASKED, SAID, END = 0, 1, 2, 3
WORDS, TEXT = np.arange(8, 24), np.arange(24, 64)
TOKENIZER: Any = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def made() -> needle.Needles:
    text = np.random.default_rng(0).choice(TEXT, 4000)
    return needle.Needles(text, WORDS, [BEGIN], [ASKED], [SAID], [END])


@torch.no_grad()
def looks_words_up(horizon: float) -> CausalLM:
    """One layer of retention that says the words it has read, the older first, but for those it
    has just read. Its memory halves, about, every ``horizon`` tokens."""
    config = ModelConfig(
        mixer="retention",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=4,
        value_head_dim=64,
        max_position_embeddings=32,
        rope_theta=1e30,  # of the two frequencies one is 0: its channel knows no positions
        tie_word_embeddings=False,
    )
    model = CausalLM(config)
    for parameter in model.parameters():
        parameter.zero_()
    for part in (model.norm, model.blocks[0].mixer_norm, model.blocks[0].mlp_norm):
        part.weight.fill_(1)
    one = torch.eye(64)
    model.embedding.weight.copy_(one)
    model.head.weight.copy_(200 * one)
    mixer = model.blocks[0].mixer
    mixer.log_gamma.copy_(torch.log1p(-1 / torch.tensor([1.2, horizon, 2 * horizon])))
    weight = mixer.qkvg.weight
    for head in range(3):
        weight[4 * head + 1] = 1  # every token asks
        key = weight[12 + 4 * head + 1]
        key[WORDS], key[TEXT] = 1, 0.01  # words answer, the text murmurs
        weight[24 + 64 * head : 24 + 64 * (head + 1)] = one
        weight[24 + 64 * (3 + head) : 24 + 64 * (4 + head)] = 1
    # Longer memory less shorter memory prefers what is older; the shortest is what was just read.
    for head, sign in enumerate((-100.0, -0.75, 1.0)):
        mixer.output.weight[:, 64 * head : 64 * (head + 1)] = sign * one
    return model


def reader(model: CausalLM) -> StudentReader:
    student: Any = SimpleNamespace(network=model, device=torch.device("cpu"), config=model.config)
    return StudentReader(student)


def cells(found: dict[str, Any], figure: str, length: int) -> list[float]:
    rows = found["models"]["student"]["cells"]
    return [row[figure] for row in rows if row["length"] == length]


def test_what_remembers_finds_the_needle_at_every_depth_and_nothing_without_it() -> None:
    found = needle.search({"student": reader(looks_words_up(4096))}, made(), TOKENIZER, [48, 192])
    for length in (48, 192):  # six times as long as its table of positions
        assert cells(found, "accuracy", length) == [1.0] * 5
        assert cells(found, "choice", length) == [1.0] * 5
        assert min(cells(found, "nats", length)) > 1
    assert [row["accuracy"] for row in found["models"]["student"]["without"]] == [0.0, 0.0]
    first = found["models"]["student"]["cells"][0]["first"]
    assert first[0] == first[1]
    assert found["chance"] == 1 / len(WORDS)


def test_what_forgets_finds_what_is_near_alone() -> None:
    found = needle.search({"student": reader(looks_words_up(8))}, made(), TOKENIZER, [192])
    assert cells(found, "accuracy", 192) == [0, 0, 0, 0, 1]
    assert max(map(abs, cells(found, "nats", 192)[:3])) < 0.3
    assert cells(found, "nats", 192)[4] > 1


def test_a_model_that_was_made_for_less_is_not_asked() -> None:
    student = reader(looks_words_up(64))
    student.made_for = 48
    found = needle.search({"student": student}, made(), TOKENIZER, [32, 48, 49], trials_each=2)
    assert {row["length"] for row in found["models"]["student"]["cells"]} == {32, 48}
    assert found["models"]["student"]["too_long"] == [49]


def test_rows_differ_by_the_needle_alone() -> None:
    needles = made()
    plain = needle.trials(needles, 40, None, 3)
    for depth in needle.DEPTHS:
        rows = needle.trials(needles, 40, depth, 3)
        assert rows.contexts.shape == plain.contexts.shape == (3, 40 - needle.ANSWER)
        for context, answer, other in zip(rows.contexts, rows.answers, plain.contexts, strict=True):
            text, ids = [BEGIN, *context[1:].tolist()], answer.tolist()
            key = text[-2]
            fact = [ASKED, key, SAID, *ids, END]
            place = next(i for i in range(len(text)) if text[i : i + len(fact)] == fact)
            room = len(text) - 1 - len(fact) - 3
            assert place == 1 + round(depth * room)
            rest = text[:place] + text[place + len(fact) :]
            assert rest[:-3] == other.tolist()[: len(rest) - 3]
            assert rest[-3:] == other.tolist()[-3:] == [ASKED, key, SAID]
            assert not set(ids) & set(rest)
    assert not np.array_equal(plain.contexts[0], plain.contexts[1])


def test_too_short_a_context_is_refused() -> None:
    shortest = made().shortest
    needle.trials(made(), shortest, 0.5)
    with pytest.raises(ConfigError, match=f"at least {shortest}"):
        needle.trials(made(), shortest - 1, 0.5)


def test_needles_are_whole_words_of_the_text_and_taken_out_of_it() -> None:
    directory = token_directory()
    tokenizer, tokens = load_tokenizer(directory), TokenSplit(directory, "train").tokens
    needles = needle.make(tokens, tokenizer)
    assert len(needles.words) == needle.FEWEST
    assert not np.isin(needles.text, [*needles.words, tokenizer.eot_id]).any()
    for index in needles.words.tolist():
        text = tokenizer.decode([*needles.said, index])
        assert needle.WORD.fullmatch(text.removeprefix(needle.IS))
        assert tokenizer.encode(text) == [*needles.said, index]
    with pytest.raises(DataError, match="words that are one token"):
        needle.make(tokens[:8], tokenizer)


def test_usual_lengths_have_room() -> None:
    needles = dataclasses.replace(made(), asked=[ASKED] * 20)
    assert needle.usual_lengths(needles, 256) == [128, 256, 512, 1024]
    assert needle.usual_lengths(needles, 8) == [needles.shortest]

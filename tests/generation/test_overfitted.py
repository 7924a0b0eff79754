"""Eight conversations, learned by heart, come out word for word of everything that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thimble
from tests.helpers_cli import Command
from tests.helpers_recursive import WORDS, model_config
from thimble import api
from thimble.artifacts import write_json
from thimble.config.schema import DatasetConfig
from thimble.conversations.batches import gather
from thimble.conversations.build import build
from thimble.conversations.dataset import Conversations
from thimble.errors import ConfigError
from thimble.generation.trace import Token
from thimble.models.recursive import RecursiveLM
from thimble.objectives.act import ACT, Rows, empty_carry
from thimble.objectives.linear_cross_entropy import FORMS
from thimble.tokens.tokenizer import load_tokenizer, train
from thimble.training.checkpoint import save_model

ANSWERS = {
    "what loads a module?": "the kernel loads a module.",
    "what mounts a disk?": "the driver mounts the disk, 7 times.\n",
    "why?": " why is  the disk 42?",
    "how is the größe?": "größe 漢字 🙂 is ok",
    "which device is it": "the device is the disk\n\n- the driver\n- the kernel",
    "is 7 a module": "7 is a module",
    "is 42 a module": "42 is the kernel",
    "the the the": "[USER]\nwhat is the kernel? <|endoftext|> 7",
}


def learn(model: RecursiveLM, data: Conversations, form: str, steps: int = 400) -> None:
    """Until nothing is wrong any more; the examples come in their order, as rows get free."""
    batch = gather(data, np.arange(len(data)))
    rows = Rows(
        inputs=torch.from_numpy(batch.inputs),
        labels=torch.from_numpy(batch.labels),
        position=torch.from_numpy(data.examples["prompt"].astype(np.int64) - 1),
        puzzle=torch.zeros(len(data), dtype=torch.int64),
        weight=torch.from_numpy(batch.weights),
    )
    act = ACT(model, form=form)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    carry, taken, right = empty_carry(model, len(data), batch.inputs.shape[1]), 0, 0
    for _ in range(steps):
        chosen = (taken + torch.arange(carry.free)) % len(data)
        taken += len(chosen)
        new = Rows(**{name: values[chosen] for name, values in vars(rows).items()})
        carry, out = act(carry, new)
        out.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        same = out.metrics["rows_right"] == out.metrics["halts_right"] == len(data)
        right = right + 1 if same else 0
        if right == 20:
            return
    pytest.fail("not learned by heart")


def make(folder: Path, template: str, form: str, **changes: Any) -> Path:
    """A checkpoint of a model that knows ``ANSWERS`` by heart."""
    tokenizer = train([*ANSWERS, *ANSWERS.values(), *WORDS] * 3, 330)
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    lines = [json.dumps({"prompt": q, "response": a}) for q, a in ANSWERS.items()]
    (folder / "said.jsonl").write_text("\n".join(lines))
    config = DatasetConfig(
        name=str(folder / "said.jsonl"),
        tokenizer_path=str(folder / "tokenizer"),
        seq_len=96,
        template=template,
        system_message="Be brief.",
        test_ratio=0.0,
    )
    data = Conversations(build(config, output=folder / "data", workers=1).path)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "halt_max_steps": 2}
    model = RecursiveLM(
        model_config(
            vocab_size=tokenizer.vocab_size, max_position_embeddings=96, **{**shape, **changes}
        )
    ).initialize(torch.Generator().manual_seed(0))
    learn(model, data, form)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_model(checkpoint, model, load_tokenizer(data.directory))
    given = {"template": template, "system_message": "Be brief.", "form": form}
    given |= {"end_id": data.end_id, "pad_id": data.pad_id, "seq_len": data.seq_len}
    write_json(checkpoint / "conversation.json", given)
    return checkpoint


@pytest.fixture(scope="module")
def knows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("trm"), "plain", "softmax")


@pytest.fixture(scope="module")
def knows_too(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HRM, stablemax, the tokenizer's chat template."""
    shape = {"separate_stacks": True, "bp_cycles": 0, "L_cycles": 2}
    return make(tmp_path_factory.mktemp("hrm"), "chat", "stablemax", **shape)


@pytest.fixture(params=["knows", "knows_too"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_what_was_learned_by_heart_is_said_word_for_word(checkpoint: Path) -> None:
    model = thimble.load(checkpoint, device="cpu")
    for asked, answer in ANSWERS.items():
        pieces: list[str] = []
        assert model.generate(message=asked, stream=pieces.append) == answer
        assert "".join(pieces) == answer
        assert model.chat([{"role": "user", "content": asked}]) == answer
        assert model.generate(message=asked, temperature=0.01, seed=5) == answer


def test_the_command_says_it_too(checkpoint: Path, thimble_command: Command) -> None:
    asked, answer = "how is the größe?", ANSWERS["how is the größe?"]
    for words in (("--checkpoint", str(checkpoint)), (str(checkpoint),)):
        said = thimble_command("generate", *words, "--message", asked, "--device", "cpu")
        assert (said.status, said.out, said.err) == (0, f"{answer}\n", "")
    said = thimble_command(
        *("generate", "--checkpoint", str(checkpoint), "--message", asked, "--system-message"),
        *("Be brief.", "--max-output-tokens", "3", "--json", "--device", "cpu"),
    )
    text = json.loads(said.out)["text"]
    assert text != answer
    assert answer.startswith(text.rstrip("\ufffd"))  # half a character
    assert len(load_tokenizer(checkpoint).encode(answer)) > 3


def test_a_conversation_is_answered_turn_by_turn(knows: Path) -> None:
    asked = list(ANSWERS)[:2]
    said = api.chat(knows, asked, device="cpu", max_tokens=20)
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert said[1]["content"] == ANSWERS[asked[0]]
    model = thimble.load(knows, device="cpu")
    assert said[3]["content"] == model.chat(said[:3], max_tokens=20)


def test_what_was_likely_is_shown_as_the_loss_has_it(checkpoint: Path) -> None:
    model = thimble.load(checkpoint, device="cpu")
    form = json.loads((checkpoint / "conversation.json").read_text())["form"]
    seen: list[Token] = []
    asked = "is 7 a module"
    assert model.generate(message=asked, watch=seen.append) == ANSWERS[asked]
    ids, _ = model.layout.ask([{"role": "user", "content": asked}], 96, 48)
    steps = seen[0].steps
    assert steps == int(
        model.network.halting_steps(torch.tensor([ids]), torch.tensor([len(ids) - 1]))  # type: ignore[operator]
    )
    text = torch.tensor([ids + [token.id for token in seen]])
    with torch.no_grad():
        logits = model.network(text, steps=steps)[0, len(ids) - 1 : -1]
    losses, _ = FORMS[form](logits, text[0, len(ids) :, None], False)
    assert [token.probability for token in seen] == pytest.approx(
        (-losses).exp().tolist(), abs=1e-4
    )
    for token in seen:
        assert len(token.top) == 5
        assert token.top[0] == (token.text, token.probability)
        assert [value for _, value in token.top] == sorted((v for _, v in token.top), reverse=True)
        assert token.steps == steps
    assert seen[-1].id in model.layout.stop
    assert seen[-1].text == "<|endoftext|>"
    assert "".join(token.text for token in seen[:-1]).strip() == ANSWERS[asked]


@pytest.mark.parametrize("flag", ["-V", "--verbose", "-v"])
def test_verbose_shows_each_token(knows: Path, thimble_command: Command, flag: str) -> None:
    words = ("generate", str(knows), "--message", "why?", "--device", "cpu", flag)
    said = thimble_command(*words)
    assert said.status == 0
    assert said.out == f"=== Generated Response ===\n{ANSWERS['why?']}\n"
    header, *lines = said.err.splitlines()
    assert header.split() == ["token", "probability", "steps", "likeliest"]
    tokens = json.loads(thimble_command(*words, "--json").out)["tokens"]
    assert len(lines) == len(tokens)
    for line, token in zip(lines, tokens, strict=True):
        assert repr(token["text"]) in line
        assert f" {token['probability']:.4f} {token['steps']:5}  " in line
        for text, value in token["top"]:
            assert f"{text!r} {value:.4f}" in line


def test_an_answer_at_each_number_of_steps(knows: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = thimble.load(knows, device="cpu")
    asked = next(iter(ANSWERS))
    seen: list[Token] = []
    model.generate(message=asked, steps=2, watch=seen.append)
    assert {token.steps for token in seen} == {2}
    assert not caplog.messages
    model.generate(message=asked, steps=3, max_tokens=2)
    assert "trained with 2 steps at most" in caplog.text
    with pytest.raises(ConfigError, match="--steps 0"):
        model.generate(message=asked, steps=0)


def test_a_prompt_is_continued_as_it_stands(knows: Path) -> None:
    model = thimble.load(knows, device="cpu")
    head = "[SYSTEM]\nBe brief.\n[USER]\nwhy?\n[ASSISTANT]\n"
    assert model.generate(head) == ANSWERS["why?"]
    with pytest.raises(ConfigError, match="without a system message"):
        model.generate(head, system_message="x")


def test_another_system_message_reaches_the_model(
    knows: Path, thimble_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thimble.generation.model as module

    seen: list[str] = []
    tokenizer = load_tokenizer(knows)

    def heard(network: Any, ids: list[int], **options: Any) -> Any:
        seen.append(tokenizer.decode(ids))
        return iter(())

    monkeypatch.setattr(module, "generate_ids", heard)
    words = ("generate", "--checkpoint", str(knows), "--message", "why?", "--device", "cpu")
    thimble_command(*words)
    thimble_command(*words, "--system-message", "Speak.")
    thimble_command(*words, "--overrides", "dataset.seq_len=200", "dataset.system_message=Sing.")
    thimble_command(*words, "--system-message", "")
    turn = "[USER]\nwhy?\n[ASSISTANT]\n"
    said = [f"[SYSTEM]\n{text}\n{turn}" for text in ("Be brief.", "Speak.", "Sing.")]
    assert seen == [*said, turn]


def test_a_longer_context_on_request(knows: Path, thimble_command: Command) -> None:
    answer = ANSWERS["why?"]
    words = ("generate", "--checkpoint", str(knows), "--message", "why?", "--device", "cpu")
    said = thimble_command(*words, "--overrides", "dataset.seq_len=120")
    assert (said.status, said.out) == (0, f"{answer}\n")
    assert "warning: Positions beyond 96 are new" in said.err
    model = thimble.load(knows, device="cpu", seq_len=400)
    asked = [{"role": "user", "content": "the kernel is " * 30}]
    assert len(model.layout.ask(asked, 400, 4)[0]) > 96
    seen: list[Token] = []
    model.chat(asked, max_tokens=4, watch=seen.append)
    assert seen
    shorter = thimble_command(*words, "--overrides", "dataset.seq_len=64")
    assert (shorter.out, shorter.err) == (f"{answer}\n", "")
    wrong = thimble_command(*words, "--overrides", "dataset.seq_ln=64")
    assert wrong.status == 2
    assert "dataset.seq_len=64" in wrong.err
    wrong = thimble_command(*words, "--overrides", "dataset.seq_len=long")
    assert wrong.status == 2
    assert "dataset.seq_len=long" in wrong.err

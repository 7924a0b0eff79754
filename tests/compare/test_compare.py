"""The plain transformers are as near as blocks come, everything missing and nothing else is
trained, and the table says who is better."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import helpers_compare, helpers_recursion
from thimble import api, compare
from thimble.config.load import load, load_run
from thimble.config.schema import ModelConfig
from thimble.errors import ConfigError, DataError, Interrupted
from thimble.evaluation.comparison import (
    BOTH,
    COMPUTATION,
    PARAMETERS,
    RECURSIVE,
    Comparison,
    Contestant,
    table,
    verdict,
)
from thimble.training.plan import flops_per_token
from thimble.training.run import RunFolder


def shape(**changes: Any) -> ModelConfig:
    recursive: dict[str, Any] = {
        "schedule": "recursive",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 81,
    }
    return ModelConfig.model_validate({**recursive, **changes})


SHAPES = {
    "trm": shape(),
    "hrm": shape(separate_stacks=True, num_hidden_layers=4, H_cycles=2, L_cycles=2, bp_cycles=0),
    "single_z": shape(single_z=True, H_cycles=2),
    "mlp": shape(mixer="mlp", causal=False),
    "retention": shape(mixer="retention"),
    "puzzles": shape(causal=False, puzzle_identifiers=30),
    "hrm_text": shape(inject_input=False, halt_max_steps=1, bp_cycles=3, attention_gate=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_other_number_of_blocks_is_nearer(name: str) -> None:
    model, config = SHAPES[name], model_config(SHAPES[name])
    plains = compare.plain_models(config)

    def off(measure: Any, plain: ModelConfig) -> float:
        return abs(measure(plain) - measure(model))

    measures = {
        COMPUTATION: lambda each: flops_per_token(each, 81),
        PARAMETERS: lambda each: each.num_parameters,
    }
    for which, measure in measures.items():
        mine = plains[which]
        for layers in (mine.num_hidden_layers - 1, mine.num_hidden_layers + 1):
            if layers:
                other = compare.plain(config, layers)
                assert off(measure, mine) <= off(measure, other)
        # Every block runs once, with gradients.
        assert mine.blocks_per_step == mine.blocks_with_gradients == mine.num_hidden_layers
        assert (mine.halt_max_steps, mine.schedule, mine.pre_norm) == (1, "recursive", True)
        assert mine.mixer == ("retention" if name == "retention" else "attention")
        assert (mine.causal, mine.puzzle_identifiers) == (model.causal, model.puzzle_identifiers)


def model_config(model: ModelConfig) -> Any:
    config = load("puzzle_sudoku")
    training = config.training.model_copy(update={"sequence_length": 81})
    return config.model_copy(update={"model": model, "training": training})


def test_a_shared_stack_has_a_plain_one_of_exactly_its_parameters() -> None:
    for name in ("trm", "single_z", "puzzles"):
        model = SHAPES[name]
        assert (
            compare.plain_models(model_config(model))[PARAMETERS].num_parameters
            == model.num_parameters
        )
    # By hand: 3 x 7 calls of 2 blocks forward, gradients through 7 of them: (42 + 2 x 14) / 3.
    assert compare.plain_models(model_config(SHAPES["trm"]))[COMPUTATION].num_hidden_layers == 23


def test_a_model_that_is_its_own_plain_one_is_trained_once() -> None:
    model = shape(single_z=True, H_cycles=1, L_cycles=1, num_hidden_layers=3)
    assert list(compare.plain_models(model_config(model))) == [BOTH]


def test_what_recurs() -> None:
    once = {"H_cycles": 1, "L_cycles": 1, "halt_max_steps": 1}
    assert all(compare.recurs(model) for model in SHAPES.values())
    assert compare.recurs(shape(**once))  # one stack for z_L and then for z_H
    assert compare.recurs(shape(single_z=True, **{**once, "L_cycles": 2}))
    assert not compare.recurs(shape(single_z=True, **once))
    assert not compare.recurs(shape(separate_stacks=True, **once))
    plains = [compare.plain(model_config(model), 5) for model in SHAPES.values()]
    assert not any(compare.recurs(plain) for plain in plains)
    assert not compare.recurs(load("slm_nano").model)


# --------------------------------------------------------------------------------- the real thing


@pytest.mark.parametrize("kind", ["conversations", "puzzles"])
def test_all_are_trained_as_often_and_evaluated_on_the_test_split(kind: str) -> None:
    found: Comparison = getattr(helpers_compare, kind)()
    assert [row.name for row in found.rows] == [RECURSIVE, COMPUTATION, PARAMETERS]
    assert (found.kind, found.split, found.waiting) == (kind, "test", [])
    assert {row.updates for row in found.rows} == {6}
    mine, computation, parameters = found.rows
    assert mine.parameters == parameters.parameters
    assert computation.layers == 3
    assert parameters.flops < mine.flops
    assert abs(computation.flops / mine.flops - 1) < 0.5  # in whole blocks of one of very few
    assert computation.epochs == parameters.epochs > mine.epochs  # each example once, not thrice
    for row in found.rows:
        report = json.loads(next(row.run.glob("checkpoints/*/evaluation_report.json")).read_text())
        assert report["split"] == "test"
        for name in ("nll", "exact_accuracy", "token_accuracy"):
            assert getattr(row, name) == report["figures"][name]
        assert row.run == found.run or row.run.is_relative_to(found.run)
        assert load_run(row.run).model.causal == (kind == "conversations")
        assert min(row.minutes, row.tokens_per_second) > 0
    assert json.loads((found.run / "comparison.json").read_text()) == found.to_dict()


def test_the_plain_runs_are_not_taken_for_the_newest_of_the_recipe() -> None:
    found = helpers_compare.conversations()
    config = load_run(found.run)
    assert RunFolder.newest(config.output_dir, config.recipe).path == found.run


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(helpers_compare.puzzles().run, tmp_path / "run"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of api.train."""
    calls, train = [], api.train

    def note(*args: Any, **options: Any) -> Any:
        calls.append({"args": args, **options})
        return train(*args, **options)

    monkeypatch.setattr(api, "train", note)
    return calls


def test_what_is_finished_is_not_trained_again(copied: Path, trained: list[Any]) -> None:
    again = api.compare(run=copied)
    assert not trained
    before = helpers_compare.puzzles()
    assert [row.nll for row in again.rows] == [row.nll for row in before.rows]
    assert all(row.run.is_relative_to(copied) for row in again.rows)


def test_only_what_is_missing_is_trained(copied: Path, trained: list[Any]) -> None:
    before = [row.nll for row in helpers_compare.puzzles().rows]
    shutil.rmtree(copied / "comparison" / "same_parameters")
    ((unfinished,),) = [[*(copied / "comparison" / "same_computation").glob("*/*")]]
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "finished"
    (unfinished / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = api.compare(run=copied)
    assert [call.get("resume") for call in trained] == [unfinished, None]
    assert trained[1]["model"]["num_hidden_layers"] == 1
    assert [row.nll for row in again.rows] == before


def test_a_longer_run_needs_longer_plain_ones(copied: Path, trained: list[Any]) -> None:
    api.train(None, "training.max_steps=7", resume=copied)
    trained.clear()
    again = api.compare(run=copied, subset_size=2)
    assert {row.updates for row in again.rows} == {7}
    assert [call["training"]["max_steps"] for call in trained] == [7, 7]
    assert again.examples == 2


def test_interrupted_it_says_how_it_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied / "comparison")

    def stop(*args: Any, **options: Any) -> None:
        raise Interrupted("Interrupted; all is saved. Go on with:\n  thimble train x --resume y")

    monkeypatch.setattr(api, "train", stop)
    with pytest.raises(Interrupted, match=f"all is saved. .*\n  thimble compare --resume {copied}"):
        api.compare(run=copied)
    ledger = json.loads((copied / "comparison.json").read_text())
    assert [row["name"] for row in ledger["rows"]] == [RECURSIVE]
    assert ledger["waiting"] == [COMPUTATION, PARAMETERS]


def test_a_recipe_trains_all_three(tmp_path: Path, trained: list[Any]) -> None:
    config = helpers_recursion.puzzle(tmp_path, *helpers_compare.SHORT, "training.max_steps=2")
    config = config.model_copy(update={"output_dir": str(tmp_path)})
    found = api.compare(
        "puzzle_sudoku", **json.loads(json.dumps(config.model_dump(exclude={"recipe"})))
    )
    assert len(trained) == 3
    assert [row.updates for row in found.rows] == [2, 2, 2]


# ------------------------------------------------------------------------------- what it refuses


def test_a_model_without_recursion_is_refused_at_once(trained: list[Any]) -> None:
    with pytest.raises(ConfigError, match="no recursion to compare"):
        api.compare("slm_nano")
    plain = helpers_compare.puzzles().rows[1].run
    with pytest.raises(ConfigError, match="no recursion to compare"):
        api.compare(run=plain)
    assert not trained


def test_what_no_plain_model_can_be_trained_like_is_refused_at_once(tmp_path: Path) -> None:
    begins = ("optim.freeze_weights=true", f"training.load_checkpoint={tmp_path}")
    config = helpers_recursion.puzzle(tmp_path, *begins)
    with pytest.raises(
        ConfigError, match=r"no plain model to compare with\. optim\.freeze_weights"
    ):
        compare.prepared(config)


def test_without_held_out_examples_nothing_is_trained(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from thimble.conversations.dataset import Conversations

    split = Conversations.split
    monkeypatch.setattr(
        Conversations,
        "split",
        lambda self, name: split(self, name)[: 0 if name == "test" else None],
    )
    with pytest.raises(DataError, match="is empty, so there is nothing to evaluate"):
        api.compare(run=helpers_compare.conversations().run)
    assert not trained


def test_a_recipe_or_a_run(tmp_path: Path) -> None:
    for words in [(), ("instruct_os",)]:
        with pytest.raises(ConfigError, match="Give a recursive recipe, or a run"):
            api.compare(*words, run=tmp_path if words else None)
    with pytest.raises(DataError, match="is not a run"):
        api.compare(run=tmp_path)


# ------------------------------------------------------------------------------------- the words


def contestant(name: str, **figures: float) -> Contestant:
    row = helpers_compare.conversations().rows[0]
    return dataclasses.replace(row, name=name, **figures)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "key", "values", "words"),
    [
        ("conversations", "nll", (2.0, 1.5, 2.5), ("loses to", "beats")),
        ("puzzles", "exact_accuracy", (0.5, 0.5, 0.75), ("is even with", "loses to")),
    ],
)
def test_the_verdict_is_said_whoever_wins(
    kind: str, key: str, values: tuple[float, ...], words: tuple[str, str]
) -> None:
    names = (RECURSIVE, COMPUTATION, PARAMETERS)
    rows = [contestant(name, **{key: v}) for name, v in zip(names, values, strict=True)]
    lines = verdict(rows, kind)
    for line, word, which in zip(lines, words, ("computation", "parameters"), strict=True):
        assert line.startswith(f"Recursion {word} the plain model of the same {which}:")


def test_the_table_has_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    found = helpers_compare.conversations()
    found.render(Console(width=220))
    text = capsys.readouterr().out
    for word in ("parameters", "updates", "epochs", "FLOPs", "minutes", "tokens/s", "nats/token",
                 "bits/byte", "perplexity", "token accuracy", "exact"):  # fmt: skip
        assert word in text
    for line in found.verdict:
        assert line in text
    head, rows = table(helpers_compare.puzzles().to_dict())
    assert "perplexity" not in head
    assert all(len(row) == len(head) for row in rows)

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import helpers_training
from tests.helpers_evaluation import best, change_config
from thimble.config.load import load, load_run
from thimble.evaluation.acceptance import Acceptance, accept
from thimble.export.model_card import MACHINE, model_card, overrides, reproduction


@pytest.fixture
def result(run: Path) -> Acceptance:
    return accept(run)


def card_of(result: Acceptance) -> str:
    return (result.checkpoint / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_the_measured_numbers(result: Acceptance) -> None:
    data = ModelCard(card_of(result)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"thimble", "slm_nano"} <= set(data.tags)
    measured = {found.metric_type: found.metric_value for found in data.eval_results}
    assert measured == {
        "perplexity": result.evaluation["perplexity"],
        "bits_per_byte": result.evaluation["bits_per_byte"],
    }
    assert {found.dataset_split for found in data.eval_results} == {"val"}


def test_every_rung_condition_and_category_stands_in_it(result: Acceptance) -> None:
    text = card_of(result)
    for rung in result.ladder:
        assert f"| {rung.name} | {rung.bits_per_byte:.4f} |" in text
    for condition in result.conditions:
        assert f"| {condition.name} | {condition.wanted} | {condition.measured} |" in text
    for name, part in result.evaluation["by_category"].items():
        assert f"| {name} | {part['bits_per_byte']:.4f} | {part['perplexity']:.2f} |" in text
    for rung in result.ladder:
        if not rung.passed_by_model:
            assert rung.name in text.split("Not reached:")[1].split("\n")[0]


def test_data_with_licences(run: Path, tokens: Path, tmp_path: Path) -> None:
    assert "| made | text | not recorded |" in card_of(accept(run))
    # With the corpus where it is looked for, its licences are known.
    corpus = Path(helpers_training.token_directory()).parent / "corpus"
    copy = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["by_source"] = {"made": {"licence": "CC0-1.0"}}
    path.write_text(json.dumps(manifest))
    assert "| made | text | CC0-1.0 |" in card_of(accept(run))
    # Another corpus of that name says nothing about these tokens.
    path.write_text(json.dumps({**manifest, "fingerprint": "other"}))
    assert "no longer at hand" in card_of(accept(run))


def test_samples_are_shown_as_they_came(result: Acceptance, run: Path) -> None:
    text = card_of(result)
    places = [text.index(sample.text.strip().split("\n")[0]) for sample in result.samples[:3]]
    assert places == sorted(places)
    # Whatever a model writes stays inside its block, and a bad sample is named.
    wild = "# heading\n```\n---\n| a |"
    samples = [type(s)(s.prompt, wild, "empty") for s in result.samples]
    other = type(result)(**{**vars(result), "samples": samples})
    text = model_card(other, load_run(best(run)))
    assert "    # heading\n    ```\n    ---\n    | a |" in text
    assert "degenerate: empty" in text


def test_the_commands_give_the_configuration_again(run: Path, result: Acceptance) -> None:
    change_config(run, evaluation={"prompts": ['it\'s a "test", 100 %', "b"]}, seed=7)
    config = load_run(best(run))
    tokens = json.loads((Path(config.data.path) / "manifest.json").read_text())
    lines = list(reproduction(config, tokens, None))
    assert [line.split()[1] for line in lines] == ["corpus", "tokens", "train", "accept"]
    words = shlex.split(lines[2])
    assert words[:3] == ["thimble", "train", "slm_nano"]
    again = load("slm_nano", words[3:]).model_dump()
    for key in MACHINE:
        again[key] = getattr(config, key)
    assert again == config.model_dump()
    assert overrides(load("slm_nano")) == []


def test_a_corpus_of_ours_is_named_with_its_options(run: Path) -> None:
    config = load_run(best(run))
    tokens = json.loads((Path(config.data.path) / "manifest.json").read_text())
    options = {"name": "os_kernel", "scale": "quick", "seed": 3}
    first, second, *_ = reproduction(config, tokens, {"options": options})
    assert first == "thimble corpus build os_kernel --scale quick --seed 3"
    assert second.startswith("thimble tokens build corpus --vocab-size 300 --output ")

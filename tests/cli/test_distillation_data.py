"""The quickstart's way from nothing to packed chunks, by its commands, from a hub of the test."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import helpers_hub
from tests.corpora.test_download import jsonl, parquet
from tests.helpers_cli import Command
from tests.helpers_hub import Hub
from tests.helpers_tokens import sentence
from thimble.tokens.packed import train_and_validation
from thimble.tokens.tokenizer import load_tokenizer, train

RNG = random.Random(1)
QUERIES = [" ".join(sentence(RNG) for _ in range(3)) for _ in range(60)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with helpers_hub.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        solved = [{"query": q, "response": f"Answer {i}."} for i, q in enumerate(QUERIES)]
        server.add("meta-math/MetaMathQA", {"MetaMathQA-395K.json": json.dumps(solved).encode()})
        functions = [
            {"whole_func_string": f"def f{i}():\n    '''{q}'''", "n": i}
            for i, q in enumerate(QUERIES)
        ]
        files = {"python/train/0000.parquet": parquet(functions)}
        server.add("code-search-net/code_search_net", {"README.md": b""})
        server.add("code-search-net/code_search_net", files, "refs/convert/parquet")
        apps = [{"question": q, "solutions": '["print(1)"]'} for q in QUERIES]
        server.add("codeparrot/apps", {"train.jsonl": jsonl(apps), "test.jsonl": jsonl(apps)})
        mbpp = [{"text": q, "code": "print(1)"} for q in QUERIES[:9]]
        path = "full/train-00000-of-00001.parquet"
        server.add("google-research-datasets/mbpp", {path: parquet(mbpp)})
        yield server


def test_the_quickstart_from_download_to_chunks(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train(QUERIES, 400).save("llama")
    monkeypatch.setenv("LLAMA_TOKENIZER", "llama")
    command = Command(capfd)

    def run(line: str) -> dict:
        answer = command(*shlex.split(line), "--json")
        assert answer.status == 0, answer.err
        return json.loads(answer.out)

    rows = run("data download --plan poc")["data_sets"]
    assert {row["state"] for row in rows} == {"complete"}
    assert [row["samples"] for row in rows] == [60, 60, 60, 9]
    assert Path("data/distillation/math_reasoning/metamath.jsonl").is_file()
    asked = len(hub.asked)
    run("data download --plan poc --status")
    assert len(hub.asked) == asked

    line = (
        "tokens pack --input data/distillation --output data/distillation_preprocessed "
        "--recursive --skip-existing --max-seq-length 128 --val-ratio 0.1"
    )
    made = run(line)
    assert made["train"]["documents"] + made["val"]["documents"] == 189
    assert (made["inputs made"], run(line)["inputs made"]) == (4, 0)
    assert run("inspect data/distillation_preprocessed")["kind"] == "packed"

    folder = "data/distillation_preprocessed"
    training, validation = train_and_validation(folder, folder, seed=1, length=128)
    batch = training.batch(0, 4)
    assert batch.inputs.shape == batch.targets.shape == (4, 128)
    assert validation.count
    text = load_tokenizer(folder).decode(training.rows(np.arange(1)).inputs[0].tolist())
    assert any(query[:20] in text for query in QUERIES)


def test_no_jsonl_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/distillation/code").mkdir(parents=True)
    for more, said in (("", "--recursive"), ("--recursive", "Nothing to read in")):
        line = f"tokens pack --input data/distillation --output out {more}"
        answer = Command(capfd)(*shlex.split(line))
        assert answer.status == 5
        assert said in answer.err
        assert not Path("out").exists()

"""The quickstart of the distillation documents, line by line, from an empty folder to a student.

Data come from a hub of the test; Llama is a llama of width 32, and the students are as small.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests import helpers_hub
from tests.corpora.test_download import jsonl, parquet
from tests.helpers_cli import SMALL, Command
from tests.helpers_distill import RETENTION
from tests.helpers_hub import Hub
from tests.helpers_tokens import sentence
from tests.teachers.helpers import make_teacher
from thimble.artifacts import read_json
from thimble.config.load import load
from thimble.tokens.packed import train_and_validation
from thimble.tokens.tokenizer import load_tokenizer, train

RNG = random.Random(1)
QUERIES = [" ".join(sentence(RNG) for _ in range(3)) for _ in range(60)]
DATA = "data/distillation_preprocessed"
LENGTH = 64
PACK = (
    f"tokens pack --input data/distillation --output {DATA} --recursive --skip-existing "
    f"--max-seq-length {LENGTH} --val-ratio 0.1"
)
# What makes any recipe small; nothing of it is of the documents.
TINY = [
    *(*SMALL, *RETENTION, "model.vocab_size=400", f"model.max_position_embeddings={LENGTH}"),
    *("training.max_steps=4", "training.log_every=1", "training.eval_every=4"),
    *("training.save_every=4", "training.micro_batch_size=8", "optim.warmup_steps=1"),
    *("evaluation.max_tokens=null", "logging.wandb=false", "precision=float32"),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The four data sets of the plan, 189 samples."""
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


def records(run: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Those of a run's records that have this figure."""
    lines = (Path(run["run"]) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if name in record]


def losses(run: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in records(run, "loss")]


def teacher_of(run: dict[str, Any]) -> dict[str, Any]:
    return read_json(Path(run["latest"]) / "teacher.json")


def test_every_line_of_the_quickstart(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    command = Command(capfd)

    def run(line: str, *more: str, status: int = 0) -> dict[str, Any]:
        answer = command(*shlex.split(line), *more, "--json")
        assert answer.status == status, answer.err
        return json.loads(answer.out)

    def student(line: str, *more: str) -> dict[str, Any]:
        return run(f"train {line}", *TINY, *more)

    # 0, 1. What the machine has.
    assert run("doctor")["problems"] == []

    # 2. The data.
    assert len(run("data download --plan poc --dry-run")["data_sets"]) == 4
    rows = run("data download --plan curriculum --dry-run")["data_sets"]
    sizes = {row["name"]: row["hub_bytes"] for row in rows if row["hub_bytes"]}
    assert (len(rows), set(sizes)) == (23, {"metamath", "codesearchnet", "apps"})
    assert not Path("data").exists()
    rows = run("data download --plan poc --category math_reasoning")["data_sets"]
    assert [row["samples"] for row in rows] == [60]
    rows = run("data download --plan poc")["data_sets"]
    assert {row["state"] for row in rows} == {"complete"}
    assert [row["samples"] for row in rows] == [60, 60, 60, 9]
    assert Path("data/distillation/math_reasoning/metamath.jsonl").is_file()
    asked = len(hub.asked)
    assert len(run("data download --plan poc --status")["data_sets"]) == 4
    assert len(hub.asked) == asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing after this asks for anything

    # 3. Chunks, once and again. The tokenizer is Llama's.
    train(QUERIES, 400).save("llama")
    monkeypatch.setenv("LLAMA_TOKENIZER", "llama")
    made = run(PACK)
    assert made["train"]["documents"] + made["val"]["documents"] == 189
    assert (made["inputs made"], run(PACK)["inputs made"]) == (4, 0)
    assert run(PACK.replace("--skip-existing", "--force"))["inputs made"] == 4
    assert run(f"inspect {DATA}")["kind"] == "packed"

    # 4. The same folder for both is split; each label is one place after its input.
    training, validation = train_and_validation(DATA, DATA, seed=1, length=LENGTH)
    batch = training.batch(0, 4)
    assert batch.inputs.shape == batch.targets.shape == (4, LENGTH)
    assert validation.count
    text = load_tokenizer(DATA).decode(training.rows(np.arange(1)).inputs[0].tolist())
    assert any(query[:20] in text for query in QUERIES)

    # 5. The teacher, fine-tuned, interrupted, gone on with.
    make_teacher(Path("llama"), tokenizer=load_tokenizer("llama"), initializer_range=0.05)
    tune = f"teacher finetune llama {DATA} --ram-disk -o teacher_adapters/llama --device cpu"
    tune += " --rank 8 --learning-rate 0.01 --eval-every 4 --save-every 4"
    assert run(f"{tune} --max-steps 4")["steps"] == 4
    checkpoint = "teacher_adapters/llama/checkpoints/step-000004"
    tuned = run(f"{tune} --max-steps 8 --resume {checkpoint}")
    assert tuned["steps"] == 8
    assert tuned["perplexity"] < 0.95 * tuned["base_perplexity"]

    # 6. Distilling, with the documents' options and with our keys, by the merged teacher and by
    # its adapter: they are one teacher.
    theirs = "--config configs/train_direct.yaml --weight-decay 0.01"
    theirs += " --enable-saddle-interventions --learning-rate 0.001"
    paths = [f"train_data_path={DATA}", f"val_data_path={DATA}", f"max_seq_length={LENGTH}"]
    planned = run("plan distill_direct --no-measure", *TINY, *paths, TEACHER)
    assert planned["steps"] == 4
    weights = load_file("llama/model.safetensors").values()
    assert planned["teacher"]["parameters"] == sum(weight.numel() for weight in weights)
    merged = student(theirs, *paths, "teacher_model=teacher_adapters/llama/merged")
    ours = "distill_direct optim.weight_decay=0.01 saddle.interventions=true"
    ours += " optim.learning_rate=0.001 teacher.topk=512"
    adapter = "teacher_adapter_path=teacher_adapters/llama/adapter"
    added = student(ours, *paths, "teacher_model=llama", adapter)
    configs = [load(each["run"]) for each in (merged, added)]
    assert configs[0].optim == configs[1].optim
    assert configs[0].saddle == configs[1].saddle
    assert (configs[0].optim.weight_decay, configs[0].optim.learning_rate) == (0.01, 0.001)
    assert configs[0].saddle.interventions
    assert teacher_of(merged)["identity"]["adapter"] is None
    assert teacher_of(added)["identity"]["adapter"] is not None
    kl = [records(each, "kl")[-1]["kl"] for each in (merged, added)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert merged["evaluation"]["val_perplexity"] > 1
    assert merged["evaluation"]["val_teacher_kl"] > 0

    # 6b. Without a teacher, though the recipe names one that is not here; then with one.
    pretrained = student("distill_direct --pretrain-ce-only --max-steps 6", *paths)
    assert (pretrained["step"], records(pretrained, "kl")) == (6, [])
    named = student("pretrain_student --max-steps 6", *paths)
    assert losses(named) == losses(pretrained)
    assert pretrained["evaluation"]["val_perplexity"] > 1
    go_on = f"train --resume-from {pretrained['run']} objective.name=distill --max-steps 8"
    resumed = run(go_on, TEACHER)
    assert resumed["run"] == pretrained["run"]
    assert [record["step"] for record in records(resumed, "kl")] == [7, 8]
    (change,) = [r for r in records(resumed, "event") if r["event"] == "objective"]
    assert (change["step"], change["from"], change["to"]) == (6, "next_token", "distill")
    assert teacher_of(resumed)["identity"]["weights"]

    # 7. The sanity run: ten steps, each told, nothing evaluated. Then perplexity by itself.
    short = "distill_direct --max-steps 10 --log-interval 1 --eval-interval 0"
    sane = run(
        f"train {short}", *drop(TINY, "max_steps", "log_every", "eval_every"), *paths, TEACHER
    )
    assert [record["step"] for record in records(sane, "kl")] == list(range(1, 11))
    assert sane["evaluation"] is None
    judged = run(f"evaluate {merged['run']} --split val --device cpu")
    told = merged["evaluation"]
    for name in ("perplexity", "teacher_kl"):
        assert judged["figures"][name] == pytest.approx(told[f"val_{name}"], rel=1e-3)
    hidden = run(f"evaluate {merged['run']} --split val --needle --device cpu")["needle"]
    assert set(hidden["models"]) == {"student", "teacher"}
    assert hidden["models"]["student"]["cells"]
    page = Path(run(f"report {merged['run']}")["path"]).read_text()
    for part in ("needle_accuracy", "kl", "chunks"):
        assert part in page

    # A run that keeps what its teacher says; then its teacher is needed no more.
    every = ["training.max_epochs=1", "max_steps=1000", "training.eval_every=0"]
    kept = ["cache_logits=true", "cache_dir=data/teacher_cache", "teacher_topk=16"]
    student("distill_direct", *paths, TEACHER, *every, *kept)
    Path("llama").rename("elsewhere")
    cached = student("distill_cached", *paths, "cache_dir=data/teacher_cache", "teacher_topk=16")
    assert len(records(cached, "kl")) == 4
    assert "val_teacher_kl" not in cached["evaluation"]
    Path("elsewhere").rename("llama")

    # Next steps: a sweep, and more text.
    swept = run(
        "sweep distill_direct teacher_topk=4,8 teacher.temperature=1,2 distill_alpha=0.5",
        *(*drop(TINY, "max_steps"), "max_steps=2", "training.eval_every=2", *paths, TEACHER),
    )
    assert [each["status"] for each in swept["runs"]] == ["finished"] * 4
    assert swept["best"]
    more = jsonl([{"text": f"{query} once more."} for query in QUERIES])
    Path("data/distillation/more.jsonl").write_bytes(more)
    again = run(PACK)
    assert (again["inputs made"], again["inputs unchanged"]) == (1, 4)
    mine = "tokens pack --input data/distillation --output mine --recursive --tokenizer RUN"
    run(mine.replace("RUN", merged["run"]), "--max-seq-length", str(LENGTH))
    assert load_tokenizer("mine").fingerprint == load_tokenizer("llama").fingerprint
    old = [*TINY, *paths, "cache_dir=data/teacher_cache", "teacher_topk=16"]
    assert "of other data" in run("train distill_cached", *old, status=5)["error"]


TEACHER = "teacher_model=llama"


def drop(words: list[str], *names: str) -> list[str]:
    """Without those that the line itself says."""
    return [word for word in words if word.partition("=")[0].rpartition(".")[2] not in names]

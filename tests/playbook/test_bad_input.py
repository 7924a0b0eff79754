"""What can be wrong with what one brings to the distillation, each through the command itself: one
message, with what is wrong, where, and what to do; and no run that has not begun."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers_cli import SMALL, Command
from tests.helpers_distill import RETENTION
from tests.helpers_tokens import sentence
from tests.helpers_training import token_directory
from tests.teachers.helpers import make_teacher
from tests.teachers.server import TinyServer
from thimble import api
from thimble.artifacts import read_json, write_json
from thimble.teachers import served
from thimble.tokens.tokenizer import train

LENGTH = 16
TINY = [
    *(*SMALL, *RETENTION, f"max_seq_length={LENGTH}", "max_steps=2", "training.eval_every=2"),
    *("logging.wandb=false", "precision=float32", "evaluation.max_tokens=64"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks, a teacher of them and another one, what the first says, and a run."""
    folder = tmp_path_factory.mktemp("made")
    draw = random.Random(1)
    lines = (json.dumps({"text": sentence(draw)}) for _ in range(80))
    (folder / "raw").mkdir()
    (folder / "raw/a.jsonl").write_text("\n".join(lines) + "\n")
    api.pack_tokens(
        folder / "raw", folder / "packed", tokenizer=token_directory(),
        max_seq_length=LENGTH, val_ratio=0.2, workers=1,
    )  # fmt: skip
    make_teacher(folder / "teacher")
    make_teacher(folder / "other", seed=1)
    words = train([sentence(random.Random(2)) for _ in range(40)], 290)
    make_teacher(folder / "stranger", tokenizer=words)
    api.cache_teacher(folder / "teacher", folder / "packed", topk=8, temperatures=(2.0,),
                      output=folder / "cache", device="cpu")  # fmt: skip
    words_of_run = [f"data.path={folder / 'packed'}", f"output_dir={folder / 'runs'}"]
    api.train("pretrain_student", *TINY, *words_of_run)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of it as the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Refused:
    """Runs a line that has to be refused, and gives what was said."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.command = Command(capfd)

    def __call__(self, line: str, *said: str, status: int = 5) -> str:
        answer = self.command(*shlex.split(line))
        print(f"\n$ thimble {line}\n{answer.err}")  # with -rP a person can read them all
        assert answer.status == status, answer.err
        errors = [text for text in answer.err.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in answer.err
        for part in said:
            assert part in answer.err
        return answer.err

    def student(self, words: str, *said: str, status: int = 5, begun: bool = False) -> str:
        """Of a training run of ``words``; ``begun``: it could only be seen on the way."""
        small = shlex.join([*TINY, "output_dir=new"])
        text = self(f"train distill_direct data.path=packed {small} {words}", *said, status=status)
        assert Path("new").exists() == begun
        return text


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return Refused(capfd)


def test_no_jsonl_where_it_should_be(refused: Refused) -> None:
    Path("empty/code").mkdir(parents=True)
    pack = f"tokens pack --input empty --output out --tokenizer {token_directory()}"
    refused(pack, "empty itself", "--recursive")
    refused(f"{pack} --recursive", "Nothing to read in", "empty")
    refused(pack.replace("empty", "nowhere"), "nowhere does not exist")
    assert not Path("out").exists()


def test_a_parquet_without_the_columns(refused: Refused) -> None:
    Path("in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), "in/a.parquet")
    pack = f"tokens pack --input in --output out --tokenizer {token_directory()}"
    refused(pack, "a.parquet", "body", "text")
    # Chunks that another program packed, with its manifest.
    Path("theirs/metamath").mkdir(parents=True)
    ids = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(np.arange(64, dtype=np.int32)), LENGTH
    )
    table = pyarrow.table({"input_ids": ids, "labels": ids})
    pyarrow.parquet.write_table(table, "theirs/metamath/shard_0000.parquet")
    write_json(Path("theirs/manifest.json"), {"max_seq_length": LENGTH, "splits": {}})
    refused.student("data.path=theirs teacher.path=teacher", "another program", "tokens pack")
    refused("teacher cache teacher theirs -o out", "another program", "tokens pack")
    refused("compare distill_nano model=retnet_hrm data.path=theirs", "another program")
    # One of our shards replaced by such a file.
    (name,) = [n for n in read_json(Path("packed/manifest.json"))["files"] if "train-00000" in n]
    pyarrow.parquet.write_table(table, Path("packed") / name)
    manifest = read_json(Path("packed/manifest.json"))
    manifest["files"][name]["bytes"] = (Path("packed") / name).stat().st_size
    write_json(Path("packed/manifest.json"), manifest)
    refused.student("teacher.path=teacher", "no column document_starts", name, "tokens pack")


def test_a_manifest_that_does_not_match_its_shards(refused: Refused) -> None:
    manifest = read_json(Path("packed/manifest.json"))
    more = json.loads(json.dumps(manifest))
    more["counts"]["train"]["chunks"] += 1
    write_json(Path("packed/manifest.json"), more)
    refused.student("teacher.path=teacher", "its manifest says", "tokens pack")
    write_json(Path("packed/manifest.json"), manifest)
    shard = next(Path("packed").glob("*/train-00000.parquet"))
    os.truncate(shard, shard.stat().st_size - 10)
    refused.student("teacher.path=teacher", "bytes instead of", "tokens pack")
    shard.unlink()
    refused.student("teacher.path=teacher", "is missing", "tokens pack")


def test_data_that_are_not_there_or_cannot_be_judged(refused: Refused) -> None:
    refused.student("data.path=nowhere teacher.path=teacher", "nowhere", "tokens pack")
    api.pack_tokens("raw", "all", tokenizer=token_directory(), max_seq_length=LENGTH, val_ratio=0)
    refused.student("data.path=all teacher.path=teacher", "no val", "--val-ratio")
    refused.student("val_data_path=nowhere teacher.path=teacher", "nowhere", "tokens pack")
    own = f"data.path={token_directory()} val_data_path=packed teacher.path=teacher"
    refused.student(own, "data.val_path=null", status=2)


def test_lengths_that_disagree(refused: Refused) -> None:
    refused.student("teacher.path=teacher max_seq_length=8", "chunks of 16", "--max-seq-length 8")
    long = "teacher.path=teacher max_seq_length=9999"
    refused.student(long, "model.max_position_embeddings=9999", status=2)
    make_teacher(Path("short"), max_position_embeddings=8)
    refused.student("teacher.path=short", "reads at most 8 tokens", "have 16")


def test_a_teacher_of_another_vocabulary(refused: Refused) -> None:
    refused.student("teacher.path=stranger", "another vocabulary", "--tokenizer stranger")
    refused("teacher cache stranger packed -o c", "another vocabulary", "--tokenizer stranger")
    tune = "teacher finetune stranger packed -o t --device cpu"
    refused(tune, "another vocabulary", "--tokenizer stranger")


def test_a_teacher_that_is_not_there(refused: Refused) -> None:
    refused.student("teacher.path=a/b/c", "no model at a/b/c")
    refused.student("teacher.path=teachers/none", "no folder teachers/none", status=6)
    refused.student("teacher.path=runs/slm_nano", "thimble train slm_nano")
    refused.student("teacher.path=teacher teacher.adapter=none", "no adapter at none")


def test_a_cache_of_another_teacher_or_data_set(refused: Refused) -> None:
    cached = "teacher.mode=cached teacher.path=null cache_dir=cache teacher.topk=8"
    refused.student(f"{cached} teacher.path=other", "another teacher", "cache", "teacher cache")
    refused.student(f"{cached} teacher.topk=9", "it holds", "teacher cache")
    refused.student(f"{cached} teacher_temperature=1", "it holds", "teacher cache")
    refused.student(f"{cached} cache_dir=nowhere", "no teacher cache", "teacher cache")
    with open("raw/a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    api.pack_tokens("raw", "packed", tokenizer=token_directory(), max_seq_length=LENGTH,
                    val_ratio=0.2)  # fmt: skip
    refused.student(cached, "other data", "teacher cache")
    recording = "teacher.path=teacher cache_logits=true cache_dir=cache teacher.topk=8"
    refused.student(recording, "other data", "teacher cache")


def test_a_damaged_cache(refused: Refused) -> None:
    cached = "teacher.mode=cached teacher.path=null cache_dir=cache teacher.topk=8 max_steps=50"
    with open("cache/shard-00000.bin", "r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(bytes(byte ^ 1 for byte in content))
    refused.student(cached, "shard-00000.bin is damaged", "thimble teacher cache", begun=True)
    shutil.rmtree("new")
    os.truncate("cache/shard-00000.bin", 100)
    refused.student(cached, "cut off", "thimble teacher cache", begun=True)
    shutil.rmtree("new")
    os.truncate("cache/rows.index", 8)
    refused.student(cached, "rows.index is missing or cut off")


def test_a_server_that_is_away_slow_or_answers_wrongly(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)
    options = served.ServedTeacher.__init__.__kwdefaults__
    monkeypatch.setitem(options, "timeout", 0.5)
    monkeypatch.setitem(options, "retries", 1)
    words = "teacher.mode=served teacher.path=null objective.temperature=1 teacher.topk=8"
    words += " teacher.url="
    with TinyServer(Path("teacher")) as server:
        other = f"{words}{server.url} teacher.path=llama"
        refused.student(other, "serves tiny, not llama", "teacher.path=NAME", status=6)
        server.change = lambda path, answer: b"<html>" if "completions" in path else answer
        refused.student(f"{words}{server.url}", "did not answer with JSON", begun=True)
        server.change = lambda path, answer: (404, {"error": {"message": "no such page"}})
        shutil.rmtree("new")
        refused.student(f"{words}{server.url}", "refused (404)", status=6)
        server.change = lambda path, answer: answer
        complete, event = server.complete, threading.Event()

        def slow(body: dict[str, Any]) -> Any:
            event.wait(2.0)
            return complete(body)

        server.complete = slow  # type: ignore[method-assign]
        refused.student(f"{words}{server.url}", "did not answer within 0.5 s", status=6, begun=True)
        event.set()
        shutil.rmtree("new")
        url = server.url
    refused.student(f"{words}{url}", "cannot be reached", "Start it", status=6)


def test_a_gated_model_without_a_token(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    kind: type[Exception] = GatedRepoError

    def refuse(*args: Any, **options: Any) -> str:
        answer: Any = SimpleNamespace(headers={}, request=None, status_code=401)
        raise kind("401 Client Error", response=answer)  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    said = ("meta-llama/Llama-3.2-1B", "hf auth login", "HF_TOKEN")
    # The recipe's own teacher, and the tokenizer that packing takes where none is named.
    refused.student("", *said, "Accept it at https://huggingface.co/meta-llama", status=6)
    refused("tokens pack --input raw --output out", *said, "Accept it at", status=6)
    kind = RepositoryNotFoundError
    refused.student("", *said, "Is the name right?", status=6)


def test_resuming_from_another_student(refused: Refused) -> None:
    (run,) = Path("runs/pretrain_student").iterdir()
    told = f"train --resume {run} objective.name=distill teacher.path=teacher max_steps=4"
    checkpoint = (run / "checkpoints/step-000002/model.safetensors").read_bytes()
    refused(f"{told} model.num_hidden_layers=2", "another model", "model.num_hidden_layers=1")
    assert (run / "checkpoints/step-000002/model.safetensors").read_bytes() == checkpoint
    begin = f"teacher.path=teacher load_checkpoint={run} model.num_hidden_layers=2"
    refused.student(begin, "another model")
    refused("train --resume-from runs/direct_mode/checkpoint_latest.pt", "is not a run")

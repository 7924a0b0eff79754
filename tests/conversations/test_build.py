from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.conversations.conftest import records, sharegpt
from tests.helpers_cli import Command
from thimble import api, artifacts
from thimble.config.schema import DatasetConfig
from thimble.conversations import batches, checks
from thimble.conversations import build as building
from thimble.conversations.build import Built
from thimble.conversations.dataset import EXAMPLE, Conversations
from thimble.conversations.template import prompt_ids
from thimble.errors import ConfigError, DataError
from thimble.tokens import splits

Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: Path) -> Build:
    def call(path: Path | str, output: str = "out", **options: Any) -> Built:
        options = {"tokenizer": tokenizer_folder, "workers": 1, "seq_len": 200} | options
        return api.build_conversations(path, output=tmp_path / output, **options)

    return call


def test_every_example_is_its_record(build: Build, jsonl: Callable[..., Path]) -> None:
    rows = [*records(40), sharegpt("q 7", "a 7", "what", "ok", "why", "no", weight=0.5)]
    built = build(jsonl(rows))
    data = Conversations(built.path)
    tokenizer = data.tokenizer()
    assert len(data) == built.counts["examples"] == 41
    template = data.template()
    for number, row in enumerate(rows):
        said = [turn["value"] for turn in row["conversations"]]
        ids, labels = data.example(number)
        assert tokenizer.decode(ids[labels].tolist()) == "".join(said[1::2])
        assert np.sum(ids[labels] == data.end_id) == len(said) // 2
        facts = data.examples[number]
        assert facts["line"] == number + 1
        assert facts["labelled"] == labels.sum()
        assert facts["weight"] == row.get("weight", 1.0)
        assert ids[: facts["prompt"]].tolist() == prompt_ids(template, tokenizer, said[0])
    assert built.counts["tokens"] == len(data.ids)
    assert built.counts["labelled_tokens"] == data.labels.sum()
    assert built.checks["suspicious"] == []


def test_a_chat_template_comes_with_its_end(
    build: Build, jsonl: Callable[..., Path], chatml_folder: Path
) -> None:
    data = Conversations(build(jsonl(records(20)), tokenizer=chatml_folder, template="chat").path)
    tokenizer = data.tokenizer()
    assert data.end_id == tokenizer.vocabulary()["<|im_end|>"]
    ids, _ = data.example(0)
    prompt = prompt_ids(data.template(), tokenizer, records(1)[0]["conversations"][0]["value"])
    assert ids[: data.examples[0]["prompt"]].tolist() == prompt
    assert DatasetConfig().system_message in tokenizer.decode(prompt)


def test_labels_are_shifted_exactly_once(build: Build, jsonl: Callable[..., Path]) -> None:
    data = Conversations(build(jsonl(records(30))).path)
    batch = batches.gather(data, np.arange(30), width=200)
    for row in range(30):
        ids, labels = data.example(row)
        length = len(ids) - 1
        assert batch.inputs[row, :length].tolist() == ids[:-1].tolist()
        assert (batch.inputs[row, length:] == data.pad_id).all()
        for t in range(200):
            expected = ids[t + 1] if t < length and labels[t + 1] else -100
            assert batch.labels[row, t] == expected
        # The end of an answer is learned, and what was not yet said is never an input.
        assert batch.labels[row, length - 1] == data.tokenizer().eot_id


def test_the_second_time_nothing_is_done(
    build: Build, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(records(30))
    first = build(path)
    before = {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()}
    monkeypatch.setattr(building, "write", None)
    again = build(path)
    assert again.to_dict() == json.loads(json.dumps(first.to_dict()))
    assert {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()} == before
    monkeypatch.undo()
    path.write_text(path.read_text() + json.dumps(sharegpt("new", "one")) + "\n")
    assert build(path).counts["examples"] == 31
    assert build(path, test_ratio=0.5).counts["test"] > first.counts["test"]


def test_the_name_says_what_it_was_made_of(
    jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_TOKENIZER", str(tokenizer_folder))
    path = jsonl(records(20))
    one, two = (api.build_conversations(path, workers=1, seq_len=n).path for n in (100, 101))
    assert one != two
    assert one.parent == Path("data/conversations")
    assert one.name.startswith("said-")


def test_the_result_does_not_depend_on_the_processes(
    build: Build, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(records(2100, longest=6))
    one, two = (build(path, f"w{n}", workers=n).path for n in (1, 2))
    for name in ("ids.bin", "labels.bin", "examples.bin"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_parquet_and_compressed_lines_give_the_same(
    build: Build, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    import zstandard

    rows = records(50)
    plain = build(jsonl(rows), "a").path
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(rows).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("b.jsonl.zst", "c.parquet"):
        other = build(tmp_path / name, f"out-{name}").path
        assert (other / "ids.bin").read_bytes() == (plain / "ids.bin").read_bytes()


# ------------------------------------------------------------------------------------- splits


def test_no_prompt_and_no_group_is_in_both_splits(build: Build, jsonl: Callable[..., Path]) -> None:
    rows = []
    for i, row in enumerate(records(300)):
        question, answer = (turn["value"] for turn in row["conversations"])
        rows.append(sharegpt(question, answer, group=f"g{i // 2}" if i % 3 else None))
        rows.append(sharegpt(f" {question.upper()} ", "another answer"))  # the same question
    built = build(jsonl(rows), test_ratio=0.3)
    data = Conversations(built.path)
    assert built.checks["splits"] == {"prompts_in_both": 0, "groups_in_both": 0}
    test = data.split("test")
    assert set(test.tolist()).isdisjoint(data.split("train").tolist())
    assert 0.2 < len(test) / len(data) < 0.4
    split_of = data.examples["split"]
    assert (split_of[::2] == split_of[1::2]).all()
    # The place in the file decides nothing.
    upside_down = Conversations(build(jsonl(rows[::-1], "b.jsonl"), "b", test_ratio=0.3).path)
    assert (upside_down.examples["split"][::-1] == split_of).all()


def test_the_subset_is_of_the_whole_and_grows_in_itself(
    build: Build, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(records(200))
    lines = {}
    for size in (20, 40, 1000):
        built = build(path, f"s{size}", subset_size=size)
        assert built.counts["examples"] == min(size, 200)
        lines[size] = set(Conversations(built.path).examples["line"].tolist())
    assert lines[20] < lines[40] < lines[1000]
    assert max(lines[20]) > 100  # not the beginning of the file


# ------------------------------------------------------------------------------------- length


def test_what_is_cut_is_counted_by_kind(
    build: Build, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    short, long = "ok", " ".join(["kernel"] * 300)
    rows = [
        sharegpt(short, short),
        sharegpt(long, short),
        sharegpt(short, long),
        sharegpt(long, long),
        sharegpt(short, short, short, long, short, short),
    ]
    with caplog.at_level("WARNING", logger="thimble"):
        counts = build(jsonl(rows), seq_len=150, test_ratio=0.0, system_message="").counts
    assert counts["examples"] == 5
    assert (counts["prompt_cut"], counts["answer_shortened"]) == (2, 3)
    assert counts["answers_dropped"] == 1
    assert "lost the end of an answer" in caplog.text


def test_an_example_without_room_for_an_answer_is_left_out(
    build: Build, jsonl: Callable[..., Path]
) -> None:
    long = " ".join(["kernel"] * 30)
    rows = [sharegpt(long, long), sharegpt("7", "7")]
    # "[ASSISTANT]\n" and the token of the beginning do not fit into half of it.
    counts = build(jsonl(rows), seq_len=23, system_message="", test_ratio=0.0).counts
    assert (counts["examples"], counts["left_out"]) == (1, 1)
    with pytest.raises(DataError, match=r"seq_len=10 no answer is left(.|\n)*dataset\.seq_len=40"):
        build(jsonl(rows), seq_len=10)


# ------------------------------------------------------------------------------------- bad input


def test_broken_records_are_counted_named_and_refused_above_a_share(
    build: Build, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = records(400)
    rows[7], rows[9] = '{"conversations": [', sharegpt("q", "")
    with caplog.at_level("WARNING", logger="thimble"):
        counts = build(jsonl(rows)).counts
    assert (counts["refused"], counts["examples"]) == (2, 398)
    assert "said.jsonl:8: not JSON" in caplog.text
    assert "said.jsonl:10: an empty turn of gpt" in caplog.text
    rows[20:26] = [{"conversations": [{"from": "tool", "value": "x"}]}] * 6
    with pytest.raises(DataError, match=r"8 of 400 records.*\(2%;(.|\n)*said\.jsonl:8"):
        build(jsonl(rows))
    assert build(jsonl(records(400))).counts["examples"] == 400  # what stood there still serves


def test_a_file_of_another_form_names_its_keys(build: Build, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="its keys are: text, url"):
        build(jsonl([{"text": "t", "url": "u"}] * 30))


def test_records_without_weight_are_not_trained_on(
    build: Build, jsonl: Callable[..., Path]
) -> None:
    rows = [sharegpt(f"q {i}", "a", weight=i % 2) for i in range(40)]
    counts = build(jsonl(rows)).counts
    assert (counts["examples"], counts["not_trained"]) == (20, 20)
    with pytest.raises(DataError, match="weights are 0"):
        build(jsonl(rows[::2]))


def test_an_empty_file_is_refused(build: Build, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="holds no records"):
        build(jsonl(["", " "]))


def test_a_tokenizer_is_needed_and_has_to_be_the_right_one(
    build: Build, jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(records(20))
    with pytest.raises(ConfigError, match=r"LLAMA_TOKENIZER"):
        build(path, tokenizer=None)
    with pytest.raises(DataError, match="no tokenizer at"):
        build(path, tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"wanted has 32,000 \(dataset\.vocab_size\)"):
        build(path, vocab_size=32000)
    with pytest.raises(ConfigError, match="template='chatml'"):
        build(path, template="chatml")


def test_a_tokenizer_that_does_not_know_the_text_is_refused(
    build: Build, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "</s>": 1, "the": 2, "kernel": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    config = {"eos_token": "</s>", "unk_token": "<unk>"}
    artifacts.write_json(tmp_path / "words" / "tokenizer_config.json", config)
    with pytest.raises(DataError, match="of the tokens are unknown"):
        build(jsonl(records(20)), tokenizer=tmp_path / "words")


def test_a_failed_build_leaves_nothing(
    build: Build, jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "divide", fail)
    with pytest.raises(KeyboardInterrupt):
        build(jsonl(records(20)))
    assert [p.name for p in tmp_path.iterdir()] == ["said.jsonl"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="holds something else"):
        build(jsonl(records(20)))


def test_everything_held_out_is_refused(build: Build, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"dataset\.test_ratio"):
        build(jsonl(records(20)), test_ratio=1.0)


def test_a_damaged_artefact_is_refused(build: Build, jsonl: Callable[..., Path]) -> None:
    path = build(jsonl(records(20))).path
    os.truncate(path / "ids.bin", 100)
    with pytest.raises(DataError, match=r"ids\.bin has 100 bytes"):
        Conversations(path)


def test_an_id_beyond_the_vocabulary_is_refused(build: Build, jsonl: Callable[..., Path]) -> None:
    path = build(jsonl(records(20))).path
    ids = np.memmap(path / "ids.bin", np.uint16, mode="r+")
    ids[7] = 60000
    ids.flush()
    with pytest.raises(DataError, match="beyond its vocabulary"):
        Conversations(path)


# ------------------------------------------------------------------------------------- checks


def test_checks_see_what_is_wrong(
    build: Build, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    same = [sharegpt(f"{row['conversations'][0]['value']}", "kernel" * 40) for row in records(40)]
    warned = build(jsonl(same), "same").to_dict()["warnings"]
    assert any("of all labels" in line for line in warned)

    path = build(jsonl(records(40))).path
    data = Conversations(path)
    honest = checks.copy_share(data)["share"]
    assert honest < 0.1
    frequency = np.bincount(data.ids[data.labels.astype(bool)])
    share = frequency[frequency > 0] / frequency.sum()
    found = checks.label_statistics(data)
    assert found["unigram_entropy"] == pytest.approx(-np.sum(share * np.log(share)))
    assert found["majority"] == share.max()
    monkeypatch.setattr(checks, "BLOCK", 100)  # block by block gives the same
    assert checks.label_statistics(data) == found

    def unshifted(data: Conversations, numbers: np.ndarray) -> batches.Batch:
        batch = batches.gather(data, numbers)
        labels = np.where(batch.labels == -100, -100, batch.inputs)
        return batches.Batch(batch.inputs, labels, batch.weights, batch.lengths, batch.examples)

    monkeypatch.setattr(checks, "gather", unshifted)
    assert checks.copy_share(data)["share"] == 1.0

    table = np.fromfile(path / "examples.bin", EXAMPLE)
    table["text"][data.split("train")[0]] = table["text"][data.split("test")[0]]
    table.tofile(path / "examples.bin")
    assert checks.split_overlap(Conversations(path))["prompts_in_both"] == 1


def test_a_tokenizer_that_loses_text_is_noticed(
    build: Build, jsonl: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    (tmp_path / "lower").mkdir()
    backend.save(str(tmp_path / "lower" / "tokenizer.json"))
    rows = [sharegpt(f"q {i}", "Kernel" if i < 200 else "kernel") for i in range(400)]
    built = build(jsonl(rows), tokenizer=tmp_path / "lower")
    assert built.checks["tokenizer"]["round_trip"] == 0.5
    assert "come back unchanged" in built.checks["suspicious"][-1]


# ------------------------------------------------------------------------------------- corpora


def test_the_conversations_of_a_corpus_keep_their_groups(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/corpus/os_kernel-quick"
    folder.mkdir(parents=True)
    rows = [
        row | {"source": "pci.ids", "group": f"PCI:{i // 4}"} for i, row in enumerate(records(200))
    ]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build("os_kernel", test_ratio=0.2)
    data = Conversations(built.path)
    assert built.counts["groups"] == 50
    split = data.examples["split"].reshape(-1, 4)
    assert (split == split[:, :1]).all()
    assert data.examples["group"][0] == splits.hash64("PCI:0")


def test_the_command_prints_the_figures(
    jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    thimble = Command(capfd)
    words = ("conversations", "build", str(jsonl(records(30))), "--workers", "1")
    words += ("--tokenizer", str(tokenizer_folder), "-o", str(tmp_path / "o"))
    answer = thimble(*words, "--json")
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["counts"]["examples"] == 30
    assert "unigram entropy" in thimble(*words).out
    inspected = json.loads(thimble("inspect", str(tmp_path / "o"), "--json").out)
    assert inspected["kind"] == "conversations"
    assert inspected["checks"].keys() >= {"copy", "labels", "coverage", "tokenizer", "splits"}
    shown = thimble("inspect", str(tmp_path / "o")).out
    for line in ("copy / share", "tokenizer / round trip", "splits / prompts in both"):
        assert f"checks / {line}" in shown

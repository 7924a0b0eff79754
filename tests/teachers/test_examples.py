"""Rows of both kinds of data: what a number means, and what a document may see."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers_training import token_directory
from tests.teachers.helpers import LENGTH, examples, logits_of, make_teacher
from thimble.errors import ConfigError, DataError
from thimble.teachers import Asked, PackedExamples, WindowExamples, open_examples
from thimble.teachers.cache import CachedTeacher
from thimble.teachers.direct import open_direct
from thimble.teachers.fill import fill
from thimble.tokens.packing import pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter and longer than a chunk of 16, with the tokenizer of the tests' tokens."""
    folder, draw = tmp_path_factory.mktemp("packed"), random.Random(1)
    texts = [" ".join(draw.choices(["kernel", "disk", "a"], k=n)) for n in (2, 9, 1, 40, 3, 30) * 4]
    lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join(lines))
    options = {"max_seq_length": 16, "tokenizer": token_directory(), "val_ratio": 0.2}
    pack(folder / "in", folder / "out", workers=1, **options)  # type: ignore[arg-type]
    return folder / "out"


def test_windows_follow_one_another() -> None:
    rows = examples().rows(np.arange(examples().count))
    assert rows.starts is None
    stream = examples().split.tokens[: rows.inputs.size + 1]
    assert np.array_equal(rows.inputs.ravel(), stream[:-1])
    assert np.array_equal(rows.targets.ravel(), stream[1:])


def test_chunks_of_a_pack_are_rows_whose_documents_do_not_see_each_other(
    packed: Path, tmp_path: Path
) -> None:
    data = open_examples(packed, "train", None)
    assert isinstance(data, PackedExamples)
    everything = np.arange(data.count)
    inputs, targets, starts = data.rows(everything)
    assert starts is not None
    assert starts[:, 1:].any()
    assert np.array_equal(targets[:, :-1][targets[:, :-1] >= 0],
                          inputs[:, 1:][targets[:, :-1] >= 0])  # fmt: skip
    folder = make_teacher(tmp_path / "teacher")
    teacher = open_direct(folder, data, Asked(8), device=torch.device("cpu"), precision="float32")
    fill(tmp_path / "c", data, teacher)
    kept = CachedTeacher(tmp_path / "c", data, Asked(8), teacher.identity)
    found = kept.targets(everything.tolist(), torch.from_numpy(inputs))
    for row in range(data.count):
        edges = [0, *np.flatnonzero(starts[row, 1:]) + 1, data.length]
        for begin, end in itertools.pairwise(edges):
            alone = logits_of(folder, inputs[row : row + 1, begin:end]).topk(8).indices
            assert torch.equal(found.indices[row : row + 1, begin:end], alone)
    with pytest.raises(DataError, match="other data"):
        CachedTeacher(tmp_path / "c", open_examples(packed, "val", 16), Asked(8))


def test_the_identity_of_data_is_its_content(packed: Path) -> None:
    one, same = (open_examples(packed, "train", length) for length in (None, 16))
    assert one.identity == same.identity != open_examples(packed, "val", None).identity
    assert examples().identity != examples("val").identity != examples("val", 9).identity


def test_a_length_is_needed_where_the_data_have_none(packed: Path) -> None:
    assert isinstance(open_examples(token_directory(), "train", LENGTH), WindowExamples)
    with pytest.raises(ConfigError, match="--sequence-length"):
        open_examples(token_directory(), "train", None)
    with pytest.raises(ConfigError, match="at least 1"):
        open_examples(token_directory(), "train", 0)
    with pytest.raises(DataError, match="chunks of 16 tokens, not of 8"):
        open_examples(packed, "train", 8)

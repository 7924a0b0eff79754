"""The graph is the model at every length and batch, with its cache and without."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.helpers_export import SHAPES, checkpoint_of
from tests.helpers_training import token_directory
from tests.models.test_causal_lm import model_of
from thimble.errors import DataError, EnvironmentProblem, NotAccepted
from thimble.export import onnx as exporting
from thimble.export.deployment import Export
from thimble.generation.model import load


@pytest.fixture(scope="module", params=[("tiny", False), ("untied", True)])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Export]:
    shape, cache = request.param
    folder = tmp_path_factory.mktemp(shape)
    checkpoint = checkpoint_of(folder / shape, shape)
    tokens = token_directory()
    return checkpoint, exporting.export(
        checkpoint, output=folder / "m.onnx", tokens=tokens, cache=cache
    )


def session_of(done: Export) -> Any:
    return onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])


@torch.no_grad()
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 2), (4, 5), (2, 48)])
def test_logits_are_the_models_at_every_shape(
    exported: tuple[Path, Export], batch: int, sequence: int
) -> None:
    checkpoint, done = exported
    model = load(checkpoint, device="cpu")
    ids = np.random.default_rng(0).integers(0, 320, (batch, sequence))
    theirs = exporting.run(session_of(done), model, ids)
    ours = model.network(torch.from_numpy(ids)).numpy()
    assert theirs.shape == (batch, sequence, 320)
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


def test_the_file_is_one_valid_graph_and_described(exported: tuple[Path, Export]) -> None:
    checkpoint, done = exported
    onnx.checker.check_model(onnx.load(done.path), full_check=True)
    names = [item.name for item in session_of(done).get_inputs()]
    outputs = [item.name for item in session_of(done).get_outputs()]
    if checkpoint.name == "tiny":
        assert (names, outputs) == (["input_ids"], ["logits"])
    else:
        assert names[:3] == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
        assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
        assert len(names) == len(outputs) == 1 + 2 * SHAPES["untied"].num_hidden_layers
    assert done.facts["opset"]["ai.onnx"] >= 18
    assert done.facts["inputs"][0] == "input_ids ['batch', 'sequence']"
    checks = done.facts["checks"]
    assert checks["result"] == "passed"
    assert checks["largest_logit_difference"] < 1e-3
    assert checks["top_5_differing"] == checks["top_5_ties"]
    assert checks["batch_x_sequence"] == "1x1, 1x2, 3x7, 2x48, 1x48"
    assert checks["split"].endswith("test")
    assert sorted(path.name for path in done.path.parent.iterdir()) == [
        "m.onnx",
        "m.onnx.json",
        checkpoint.name,
    ]


class Graph:
    """A session that computes another network, or this one with something added."""

    def __init__(self, network: torch.nn.Module, change: float = 0.0) -> None:
        self.network, self.change = network, change

    def get_inputs(self) -> list[Any]:
        return [None]

    @torch.no_grad()
    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        logits = self.network(torch.from_numpy(feed["input_ids"]))
        logits[..., 7] += self.change
        return [logits.numpy()]


@pytest.mark.parametrize("change", [0.011, -0.5, float("nan")])
def test_logits_that_are_off_are_refused(tmp_path: Path, change: float) -> None:
    model = load(checkpoint_of(tmp_path / "m"), device="cpu")
    split = "no tokens here"
    assert exporting.check(Graph(model.network), model, split, 48)[0]["result"] == "passed"
    with pytest.raises(NotAccepted, match="its logits are off by up to"):
        exporting.check(Graph(model.network, change), model, split, 48)


def test_another_order_of_the_likeliest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint_of(tmp_path / "m"), device="cpu")
    monkeypatch.setattr(exporting, "TOLERANCE", 1e9)
    with pytest.raises(NotAccepted, match=r"after [1-9]\d* of [\d,]+ tokens the 5 likeliest"):
        exporting.check(Graph(model_of(model.config, seed=1)), model, "no tokens", 48)


def test_a_graph_of_another_model_gets_no_name(
    exported: tuple[Path, Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, done = exported
    other = checkpoint_of(tmp_path / "m", SHAPES[checkpoint.name])  # random weights
    monkeypatch.setattr(
        exporting, "write", lambda network, file, cache: shutil.copyfile(done.path, file)
    )
    with pytest.raises(NotAccepted, match="the graph is not the model"):
        exporting.export(other, output=tmp_path / "new" / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ---------------------------------------------------------------------------------- bad input


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(network: Any, file: Path, *, cache: bool) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        exporting.export(checkpoint_of(tmp_path / "m"), output=tmp_path / "new" / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(DataError, match=r"m\.onnx exists already"):
        exporting.export(checkpoint_of(tmp_path / "m"), output=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'thimble-lm\[onnx\]'"):
        exporting.export(tmp_path)


def test_a_model_beyond_two_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LARGEST_FILE", 1000)
    with pytest.raises(DataError, match="an ONNX file holds at most 2"):
        exporting.export(checkpoint_of(tmp_path / "m"), output=tmp_path / "m.onnx")

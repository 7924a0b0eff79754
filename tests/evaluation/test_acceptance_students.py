"""Students are judged like other runs; what packed chunks do not know is left out and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import helpers_distill
from tests.helpers_distill import config
from tests.helpers_training import timeless
from thimble import api
from thimble.artifacts import MANIFEST, read_json
from thimble.config.load import load_run
from thimble.errors import ConfigError
from thimble.evaluation.acceptance import accept
from thimble.export.model_card import model_card
from thimble.training import train
from thimble.training.run import Run

SHORT = ["training.max_steps=8", "evaluation.max_tokens=null", "acceptance.perplexity=1e6"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of packed chunks."""
    folder = tmp_path_factory.mktemp("student")
    packed = helpers_distill.packed_in(folder)
    return train(config(folder, helpers_distill.teacher_in(folder), *SHORT, f"data.path={packed}"))


def test_a_student_of_packed_chunks(student: Run) -> None:
    result = accept(student.path)
    named = {condition.name: condition for condition in result.conditions}
    for name in ("training record", "validation perplexity", "checkpoint complete", "size on disk"):
        assert named[name].ok, name
    # Of all that is held out, as the run itself found at its best.
    best = min(r["val_perplexity"] for r in timeless(student.path) if "val_perplexity" in r)
    assert result.evaluation["perplexity"] == pytest.approx(best, rel=1e-4)
    assert result.evaluation["bits_per_byte"] > 0
    packed = read_json(Path(load_run(student.path).data.folder) / MANIFEST)
    assert result.evaluation["documents"] == packed["counts"]["val"]["documents"]
    assert len(result.samples) == 8
    assert result.ladder == []
    assert any("No ladder of baselines" in note for note in result.notes)
    assert json.loads((student.path / "acceptance.json").read_text())["ladder"] == []
    card = " ".join(model_card(result, load_run(student.path)).split())
    assert "heads of retention" in card
    assert "import thimble.hub" in card
    assert "--recursive --max-seq-length 16 --val-ratio 0.2 --tokenizer ." in card
    assert "trained on 16 tokens at a time" in card
    assert "at most" not in card
    assert "context" not in card
    with pytest.raises(ConfigError, match="--split val"):
        accept(student.path, split="test")
    assert api.report(student.path).path.is_file()


def test_a_student_without_a_threshold_is_judged_by_the_rest(tmp_path: Path) -> None:
    teacher = helpers_distill.teacher_in(tmp_path)
    run = train(config(tmp_path, teacher, *SHORT[:2], "acceptance.perplexity=null"))
    result = accept(run.path)
    assert any("told, not judged" in note for note in result.notes)
    assert next(c for c in result.conditions if "perplexity" in c.name).ok
    assert result.ladder


def test_what_leaves_the_house(student: Run, tmp_path: Path) -> None:
    """transformers' folders do, safe or pickled; what knows attention alone says so."""
    for export in (api.export_transformers, api.export_bin):
        folder = export(student.path, tmp_path / export.__name__)
        assert (folder / "config.json").is_file()
    for refused in (
        lambda: api.export_gguf(student.path),
        lambda: api.export_onnx(student.path),
        lambda: api.quantize(student.path),
    ):
        with pytest.raises(ConfigError, match="knows attention only"):
            refused()

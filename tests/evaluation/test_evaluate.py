"""The evaluation of a checkpoint, and the choice among several."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import helpers_training
from tests.helpers_cli import Command
from tests.helpers_evaluation import best, memory_split
from thimble import api
from thimble.artifacts import read_json
from thimble.errors import ConfigError, DataError, EnvironmentProblem
from thimble.evaluation import evaluate as module
from thimble.evaluation.evaluate import Evaluation, Selection, weighted_score
from thimble.evaluation.perplexity import evaluate_split
from thimble.evaluation.samples import text_figures
from thimble.objectives.linear_cross_entropy import IGNORE, token_losses, token_scores
from thimble.tokens.shards import TokenSplit


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS", 3)
    monkeypatch.setattr(module.speed, "REPEATS", 1)


# -------------------------------------------------------------------------------- accuracy


def test_accuracy_counts_tokens_ahead_of_the_target() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 50, 8), torch.randn(40, 8)
    targets = torch.randint(0, 40, (3, 50))
    targets[0, :10] = IGNORE
    scores = token_scores(hidden, weight, targets)
    order = (hidden @ weight.t()).argsort(-1, descending=True)
    for column, k in ((1, 1), (2, 5)):
        expected = (order[..., :k] == targets[..., None]).any(-1).float()
        torch.testing.assert_close(scores[..., column], expected)
    torch.testing.assert_close(scores[..., 0], token_losses(hidden, weight, targets))
    assert not scores[0, :10].any()


def test_a_model_that_tells_nothing_apart_is_never_right() -> None:
    scores = token_scores(torch.ones(1, 7, 4), torch.zeros(9, 4), torch.randint(0, 9, (1, 7)))
    assert not scores[..., 1:].any()


def test_accuracy_is_by_token_and_by_category() -> None:
    documents = [[1, 2, 3], [4, 5, 6, 7, 8]]
    split = memory_split(documents, categories=["a", "b"])

    def knows_a(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        right = ((targets >= 1) & (targets <= 3)).float()
        return torch.stack([torch.ones_like(right), right, right], dim=-1)

    found = evaluate_split(knows_a, split, 4, 2)
    assert found["by_category"]["a"]["top1_accuracy"] == 3 / 4  # its end-of-text is a token, too
    assert found["by_category"]["b"]["top5_accuracy"] == 0
    assert found["top1_accuracy"] == 3 / 10
    assert found["loss"] == pytest.approx(1)


# ---------------------------------------------------------------------------- the evaluation


def test_it_measures_writes_and_shows(run: Path, quick: None, capfd) -> None:
    result = api.evaluate(run, device="cpu")
    assert isinstance(result, Evaluation)
    assert result.checkpoint == best(run)
    kept = read_json(best(run) / "evaluation_report.json")
    assert kept == json.loads(json.dumps(result.to_dict()))

    # The reference: transformers on the same tokens, cut into the same windows.
    data = TokenSplit(result.tokens, "test")
    network = AutoModelForCausalLM.from_pretrained(result.checkpoint).eval()

    def reference(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = network(inputs).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
        )
        ranks = logits.argsort(-1, descending=True)[..., :5] == targets[..., None]
        return torch.stack([losses.view_as(targets), ranks[..., 0], ranks.any(-1)], dim=-1)

    expected = evaluate_split(reference, data, helpers_training.WINDOW, 4)
    for name in ("loss", "perplexity", "bits_per_byte", "top1_accuracy", "top5_accuracy"):
        assert result.figures[name] == pytest.approx(expected[name], rel=1e-4)
    assert result.generated["texts"] == result.real["texts"] == 3
    assert result.real["known_words"] > 0.9
    assert result.speed["tokens_per_second"] > 0
    assert result.benchmark is None
    assert any("No operating-system benchmark" in note for note in result.notes)
    answer = Command(capfd)("evaluate", str(run), "--device", "cpu", "--split", "val")
    assert answer.status == 0, answer.err
    assert "bits/byte" in answer.out
    assert "weighted score" in answer.out


def test_several_are_ranked_by_score(run: Path, quick: None, capfd) -> None:
    answer = Command(capfd)("evaluate", str(run), "--all", "--device", "cpu", "--json")
    assert answer.status == 0, answer.err
    shown = json.loads(answer.out)
    kept = read_json(run / "best_checkpoint_selection.json")
    assert shown["best"] == kept["best"] == kept["ranking"][0]["checkpoint"]
    assert len(kept["ranking"]) == len(list((run / "checkpoints").glob("step-*"))) == 2
    scores = [row["score"] for row in kept["ranking"]]
    assert scores == sorted(scores, reverse=True)
    by_perplexity = sorted(kept["ranking"], key=lambda row: row["perplexity"])
    if all(row["tokens_per_second"] > 50 for row in kept["ranking"]):
        assert by_perplexity == kept["ranking"]  # nothing else tells these two apart
    selection = api.evaluate(*(run / "checkpoints").glob("step-*"), device="cpu")
    assert isinstance(selection, Selection)
    assert {str(row["checkpoint"]) for row in selection.ranking} == {
        row["checkpoint"] for row in kept["ranking"]
    }


def test_the_score_is_the_formula_and_no_part_outweighs() -> None:
    score = weighted_score(25.0, 0.5, 0.25, 20.0)
    assert score["total"] == pytest.approx(0.4 * 10 / 25 + 0.3 * 0.5 + 0.2 * 0.25 + 0.1 * 20 / 50)
    assert weighted_score(2.0, 1.0, 1.0, 5000.0)["total"] == pytest.approx(1)
    assert weighted_score(math.inf, None, None, 0.0)["total"] == 0


def test_text_figures_tell_loops_from_text(run: Path) -> None:
    model = api.load(run, "cpu")
    loop, text = "disk disk disk disk " * 10, "the kernel loads a module for every device it finds"
    known = frozenset(text.split())
    figures = text_figures(model, ["some kernel thing"] * 2, [loop, text], known)
    alone = text_figures(model, ["some kernel thing"], [text], known)
    assert figures["degenerate"] == 0.5
    assert figures["repeated_fours"] > alone["repeated_fours"]
    assert figures["distinct_pairs"] < alone["distinct_pairs"]
    assert alone["known_words"] == 1
    assert figures["known_words"] < 0.3
    assert figures["on_topic"] == 0.5
    nothing = text_figures(model, ["a"], [""], known)
    assert nothing["known_words"] is None
    assert nothing["degenerate"] == 1


# ------------------------------------------------------------------------------------ bad input


def test_a_folder_that_is_no_checkpoint_is_called_so(run: Path) -> None:
    with pytest.raises(DataError, match="not a checkpoint"):
        api.evaluate(run.parent, device="cpu")
    with pytest.raises(DataError, match="no checkpoint at"):
        api.evaluate(run / "config.yaml", device="cpu")


def test_weights_that_are_not_numbers_are_refused(run: Path, quick: None) -> None:
    from safetensors.torch import load_file, save_file

    weights = best(run) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="not a number"):
        api.evaluate(run, device="cpu")


def test_a_report_that_cannot_be_written_is_shown(
    run: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module.artifacts, "write_json", refuse)
    result = api.evaluate(run, device="cpu")
    assert isinstance(result, Evaluation)
    assert any("could not be written: Permission denied" in note for note in result.notes)
    assert result.to_dict()["figures"]["loss"] > 0


def test_a_split_that_was_trained_on_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="held-out"):
        api.evaluate(run, split="train")


def test_tokens_built_again_are_refused(run: Path, tokens: Path) -> None:
    manifest = read_json(tokens / "manifest.json")
    manifest["fingerprint"] = "another"
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="built again"):
        api.evaluate(run, device="cpu")


def test_a_checkpoint_of_another_program_wants_tokens(
    run: Path, tokens: Path, tmp_path: Path, quick: None
) -> None:
    foreign = tmp_path / "foreign"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    foreign.mkdir()
    for name in names:
        shutil.copy(best(run) / name, foreign / name)
    with pytest.raises(ConfigError, match=r"thimble evaluate .* --tokens"):
        api.evaluate(foreign, device="cpu")
    given = api.evaluate(foreign, tokens=tokens, device="cpu")
    assert isinstance(given, Evaluation)
    own = api.evaluate(run, device="cpu")
    assert isinstance(own, Evaluation)
    assert any("not known" in note for note in given.notes)
    # Its windows are as long as its context, not as in training; the texts are the same.
    assert given.figures["tokens"] == own.figures["tokens"]


def test_another_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    from tests.helpers_cli import make_corpus
    from thimble import tokens as making

    corpus = make_corpus(tmp_path / "c", documents=60)
    other = making.build(corpus, output=tmp_path / "other", vocab_size=280, workers=1)
    with pytest.raises(DataError, match="280"):
        api.evaluate(run, tokens=other, device="cpu")


def test_a_damaged_checkpoint_is_passed_over_and_a_single_one_is_ranked(
    run: Path, quick: None
) -> None:
    damaged = next(path for path in (run / "checkpoints").glob("step-*") if path != best(run))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    selection = api.evaluate(run, every=True, device="cpu")
    assert isinstance(selection, Selection)
    assert [Path(row["checkpoint"]) for row in selection.ranking] == [best(run).resolve()]
    assert (run / "best_checkpoint_selection.json").is_file()


def test_a_run_without_checkpoints_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoints"):
        api.evaluate(tmp_path, every=True)
    with pytest.raises(ConfigError, match="Which checkpoint"):
        api.evaluate()


# ------------------------------------------------------------------------- lm-evaluation-harness

TASK = """\
task: made_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_a_local_task_of_the_harness(
    run: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = [
        {"question": "the kernel", "choices": [" loads", " zzqqxx##"], "answer": i % 2}
        for i in range(8)
    ]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = tmp_path / "made_choice.yaml"
    task.write_text(TASK.format(data=data))
    result = api.evaluate(run, tasks=[str(task)], device="cpu")
    assert isinstance(result, Evaluation)
    assert result.tasks is not None
    # The likelier choice is right in every second item.
    assert result.tasks["made_choice"] == {
        "accuracy": 0.5,
        "metric": "acc",
        "standard_error": pytest.approx((0.25 / 8) ** 0.5),
        "items": 8,
    }
    with pytest.raises(ConfigError, match="no task nonsense"):
        api.evaluate(run, tasks=["nonsense"], device="cpu")
    with pytest.raises(ConfigError, match="tag of several"):
        api.evaluate(run, tasks=["ai2_arc"], device="cpu")
    with pytest.raises(ConfigError, match="no task file"):
        api.evaluate(run, tasks=[str(tmp_path / "gone.yaml")], device="cpu")


def test_without_the_harness_it_says_what_to_install(run: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EnvironmentProblem, match=r"thimble-lm\[eval\]"):
        api.evaluate(run, tasks=["mmlu"])

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import thimble
from tests.helpers_cli import Command
from thimble import api, errors
from thimble.config.load import recipe_names


def lines_to_paste(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  thimble ")]


# ------------------------------------------------------------------------- what each verb calls


@pytest.mark.parametrize(
    ("words", "name", "args", "options"),
    [
        ("corpus build os_kernel", "build_corpus", ("os_kernel",), {"scale": "quick"}),
        ("corpus build os_kernel scale=full", "build_corpus", ("os_kernel",), {"scale": "full"}),
        ("corpus build os_kernel --scale full", "build_corpus", ("os_kernel",), {"scale": "full"}),
        ("corpus build --from a --from b", "build_corpus", (None,), {"sources": ["a", "b"]}),
        ("corpus build mine --from a -o c", "build_corpus", ("mine",), {"output": "c"}),
        ("corpus build x --workers 2 --seed 3", "build_corpus", ("x",), {"workers": 2, "seed": 3}),
        ("data download", "download_data", ("poc", ()), {"output": "data/distillation"}),
        (
            "data download --plan curriculum --category code --category factual_qa --dry-run -o d",
            "download_data",
            ("curriculum", ["code", "factual_qa"]),
            {"output": "d", "dry_run": True, "status": False},
        ),
        ("tokens build x", "build_tokens", ("x",), {"vocab_size": None, "tokenizer": None}),
        ("tokens build x --vocab-size 9", "build_tokens", ("x",), {"vocab_size": 9}),
        ("tokens build x --tokenizer t.model", "build_tokens", ("x",), {"tokenizer": "t.model"}),
        (
            "tokens pack --input a --output b --recursive --skip-existing --max-seq-length 8192",
            "pack_tokens",
            ("a", "b"),
            {"recursive": True, "skip_existing": True, "force": False, "max_seq_length": 8192}
            | {"tokenizer": None, "val_ratio": 0.01},
        ),
        (
            "tokens pack --input a -o b --force --tokenizer t --workers 2 --val-ratio 0.1",
            "pack_tokens",
            ("a", "b"),
            {"force": True, "tokenizer": "t", "workers": 2, "val_ratio": 0.1, "recursive": False},
        ),
        (
            "conversations build x --tokenizer t --seq-len 64 --template chat -o d",
            "build_conversations",
            ("x",),
            {"tokenizer": "t", "seq_len": 64, "template": "chat", "output": "d"},
        ),
        (
            "conversations build slimorca --subset-size 9 --test-ratio 0.1 --data-dir f --seed 2",
            "build_conversations",
            ("slimorca",),
            {"subset_size": 9, "test_ratio": 0.1, "data_dir": "f", "seed": 2},
        ),
        ("puzzles build sudoku", "build_sudoku", (None,), {"size": 9, "num_aug": 0, "seed": 0}),
        (
            "puzzles build sudoku --from d --subsample-size 5 --min-difficulty 3 --num-aug 7 -o e",
            "build_sudoku",
            ("e",),
            {"source": "d", "subsample_size": 5, "min_difficulty": 3, "num_aug": 7},
        ),
        (
            "puzzles build sudoku --generate 9 --test 2 --size 4 --seed 5 --workers 2",
            "build_sudoku",
            (None,),
            {"generate": 9, "generate_test": 2, "size": 4, "seed": 5, "workers": 2},
        ),
        ("puzzles build maze --from d --aug", "build_maze", (None,), {"source": "d", "aug": True}),
        (
            "puzzles build arc --input-file-prefix p --subsets training evaluation --num-aug 3",
            "build_arc",
            (None,),
            {"input_file_prefix": "p", "subsets": ["training", "evaluation"], "num_aug": 3}
            | {"test_set_name": "evaluation", "seed": 42},
        ),
        (
            "teacher cache t d --sequence-length 64 --topk 8 --temperatures 1,2 --adapter a -o c",
            "cache_teacher",
            ("t", "d"),
            {"sequence_length": 64, "topk": 8, "temperatures": [1.0, 2.0], "adapter": "a"}
            | {"output": "c", "split": "train", "samples": None, "ram_disk": False},
        ),
        (
            "teacher cache http://localhost:8000 d --split val --samples 5 --served-model m",
            "cache_teacher",
            ("http://localhost:8000", "d"),
            {"split": "val", "samples": 5, "served_model": "m", "temperatures": [1.0]},
        ),
        (
            "teacher finetune t d --rank 8 --max-steps 5 --ram-disk --resume",
            "finetune_teacher",
            ("t", "d"),
            {"rank": 8, "max_steps": 5, "ram_disk": True, "resume": "auto"},
        ),
        ("teacher finetune t d --resume c", "finetune_teacher", ("t", "d"), {"resume": "c"}),
        ("plan slm_nano seed=2", "plan", ("slm_nano", "seed=2"), {"measure": True}),
        ("train slm_nano", "train", ("slm_nano",), {"resume": None}),
        ("train slm_nano --a.b c seed=2", "train", ("slm_nano", "--a.b", "c", "seed=2"), {}),
        ("train slm_nano --a.b=c", "train", ("slm_nano", "--a.b=c"), {}),
        ("train slm_nano --max-steps 5", "train", ("slm_nano", "training.max_steps=5"), {}),
        ("train slm_nano --resume", "train", ("slm_nano",), {"resume": "auto"}),
        ("train --resume slm_nano", "train", ("slm_nano",), {"resume": "auto"}),
        ("train slm_nano --resume auto", "train", ("slm_nano",), {"resume": "auto"}),
        ("train slm_nano --resume seed=2", "train", ("slm_nano", "seed=2"), {"resume": "auto"}),
        ("train slm_nano --resume --json", "train", ("slm_nano",), {"resume": "auto"}),
        ("train --resume runs/a", "train", (None,), {"resume": "runs/a"}),
        ("train --resume=runs/a seed=2", "train", (None, "seed=2"), {"resume": "runs/a"}),
        ("train --resume runs/a --a.b c", "train", (None, "--a.b", "c"), {"resume": "runs/a"}),
        ("sweep slm_nano seed=1,2 --a.b 3", "sweep", ("slm_nano", "seed=1,2", "--a.b", "3"), {}),
        ("sweep x seed=1,2 hydra/a=b", "sweep", ("x", "seed=1,2", "hydra/a=b"), {"resume": None}),
        ("sweep --resume runs/sweeps/x", "sweep", (None,), {"resume": "runs/sweeps/x"}),
        ("compare instruct_os seed=2", "compare", ("instruct_os", "seed=2"), {"run": None}),
        ("compare --run r --subset-size 5", "compare", (None,), {"run": "r", "subset_size": 5}),
        ("compare --resume r --retry 2", "compare", (None,), {"run": "r", "retry": 2}),
        ("plan slm_nano --no-measure", "plan", ("slm_nano",), {"measure": False}),
        ("evaluate x", "evaluate", ("x",), {"every": False, "split": "test", "tasks": ()}),
        ("evaluate x y --split val", "evaluate", ("x", "y"), {"split": "val"}),
        ("evaluate x --all --tokens t", "evaluate", ("x",), {"every": True, "tokens": "t"}),
        (
            "evaluate x --tasks mmlu,a.yaml --limit 5",
            "evaluate",
            ("x",),
            {"tasks": ("mmlu", "a.yaml"), "limit": 5},
        ),
        (
            "evaluate x --needle --context --lengths 64,512 --teacher t",
            "evaluate",
            ("x",),
            {"needle": True, "context": True, "lengths": (64, 512), "teacher": "t"},
        ),
        (
            "evaluate --checkpoint x --save-outputs preds labels --overrides dataset.seq_len=9",
            "evaluate",
            ("x",),
            {"save_outputs": ["preds", "labels"], "overrides": {"dataset.seq_len": "9"}},
        ),
        (
            "evaluate x --overrides arch.halt_max_steps=2 dataset.test_ratio=0.2 --subset-size 5",
            "evaluate",
            ("x",),
            {
                "overrides": {"arch.halt_max_steps": "2", "dataset.test_ratio": "0.2"},
                "subset_size": 5,
            },
        ),
        ("accept x", "accept", ("x",), {"split": "val"}),
        ("accept x --split test", "accept", ("x",), {"split": "test"}),
        ("quantize x", "quantize", ("x",), {"bits": 4, "output": None, "calibration_samples": 512}),
        (
            "quantize x --bits 8 -o d --calibration-samples 64 --device cpu",
            "quantize",
            ("x",),
            {"bits": 8, "output": "d", "calibration_samples": 64, "device": "cpu"},
        ),
        ("export gguf x", "export_gguf", ("x",), {"type": "F16", "output": None, "tokens": None}),
        ("export gguf x --type Q8_0 -o f", "export_gguf", ("x",), {"type": "Q8_0", "output": "f"}),
        ("export onnx x --tokens t", "export_onnx", ("x",), {"tokens": "t", "cache": False}),
        ("export onnx x --cache", "export_onnx", ("x",), {"cache": True}),
        ("export transformers x -o d", "export_transformers", ("x", "d"), {"dtype": None}),
        ("export bin x -o d --dtype float16", "export_bin", ("x", "d"), {"dtype": "float16"}),
        ("generate x --prompt p", "generate", ("x",), {"prompt": "p", "message": None}),
        (
            "generate x --message m --temperature 0 --top-k 3 --top-p 0.5 --seed 4 --max-tokens 6",
            "generate",
            ("x",),
            {"message": "m", "temperature": 0, "top_k": 3, "top_p": 0.5, "seed": 4}
            | {"max_tokens": 6},
        ),
        (
            "generate --checkpoint x --message m --max-output-tokens 6 --system-message s",
            "generate",
            ("x",),
            {"message": "m", "max_tokens": 6, "system_message": "s", "temperature": None}
            | {"steps": None, "watch": None, "overrides": {}},
        ),
        (
            "generate --checkpoint x --message m --steps 2 --overrides dataset.seq_len=9 "
            "dataset.system_message=s",
            "generate",
            ("x",),
            {"steps": 2, "overrides": {"dataset.seq_len": "9", "dataset.system_message": "s"}},
        ),
    ],
)
def test_a_verb_parses_and_calls_one_function(
    thimble_command: Command,
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]],
    words: str,
    name: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    answer = thimble_command(*shlex.split(words))
    assert answer.status == 0, answer.err
    ((called, given, with_options),) = calls
    assert (called, given) == (name, args)
    assert with_options.items() >= options.items()


def test_a_path_after_from_is_a_source_too(
    thimble_command: Command, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "b=c.txt").touch()
    thimble_command("corpus", "build", "--from", "a", str(tmp_path / "b=c.txt"))
    assert calls[0][1] == (None,)
    assert calls[0][2]["sources"] == ["a", str(tmp_path / "b=c.txt")]


# ------------------------------------------------------------------------- the nearest right line


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trian slm_nano seed=2", "train slm_nano seed=2"),
        ("corpus buid os_kernel", "corpus build os_kernel"),
        ("token build x", "tokens build x"),
        ("generate x --promt hi", "generate x --prompt hi"),
        ("generate x --temprature=1 --prompt hi", "generate x --temperature=1 --prompt hi"),
        (
            "generate x --message m --overrides dataset.seq_ln=9",
            "generate x --message m --overrides dataset.seq_len=9",
        ),
        ("train slm_nanoo", "train slm_nano"),
        ("plan smal", "plan slm_small"),
        ("train slm_nano optim.lerning_rate=2", "train slm_nano optim.learning_rate=2"),
        ("train slm_nano --optim.lr 3e-4 seed=1", "train slm_nano optim.learning_rate=3e-4 seed=1"),
        ("train slm_nano --optim.lr=3e-4", "train slm_nano optim.learning_rate=3e-4"),
        ("train slm_nano --max-step 5", "train slm_nano --max-steps 5"),
        ("train slm_nano --reusme", "train slm_nano --resume"),
        ("plan slm_nano model=slm_tni", "plan slm_nano model=slm_tiny"),
        ("corpus build os_kernel scal=full", "corpus build os_kernel scale=full"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_line_as_it_was_meant(
    thimble_command: Command, wrong: str, right: str
) -> None:
    answer = thimble_command(*shlex.split(wrong))
    assert answer.status == 2
    assert answer.out == ""
    assert lines_to_paste(answer.err) == [f"thimble {right}"]
    assert "Traceback" not in answer.err


def test_an_impossible_shape_is_answered_with_overrides(thimble_command: Command) -> None:
    answer = thimble_command(
        "train", "slm_nano", "model.num_attention_heads=5", "model.num_key_value_heads=2"
    )
    assert answer.status == 2
    assert "\n  model.num_key_value_heads=1\n  model.num_attention_heads=4\n" in answer.err


@pytest.mark.parametrize(
    "words",
    [
        "plan",
        "train",
        "generate x",
        "generate x --prompt a --message b",
        "train slm_nano --max-steps soon",
        "train slm_nano -x",
        "train slm_nano seed",
        "corpus build",
        "corpus build a b",
        "tokens build x --vocab-size 1",
        "tokens build x --vocab-size 9 --tokenizer t",
        "--nonsense",
        "explain nonsense",
    ],
)
def test_wrong_use_gives_status_2_and_says_what_to_do(thimble_command: Command, words: str) -> None:
    answer = thimble_command(*shlex.split(words))
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert answer.out == ""


# ------------------------------------------------------------------------- output and statuses


def test_json_is_exactly_one_object_before_and_after_the_verb(thimble_command: Command) -> None:
    for words in (("--json", "recipes"), ("recipes", "--json"), ("recipes", "--json", "-q")):
        rows = json.loads(thimble_command(*words).out)["recipes"]
        assert [row["recipe"] for row in rows] == recipe_names()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("trian", 2),
        ("train slm_nan", 2),
        ("inspect /nowhere", 5),
        ("explain --nonsense", 2),
        ("generate", 2),
    ],
)
def test_json_errors_are_one_object_with_the_status(
    thimble_command: Command, words: str, status: int
) -> None:
    for line in (["--json", *shlex.split(words)], [*shlex.split(words), "--json"]):
        answer = thimble_command(*line)
        said = json.loads(answer.out)
        assert answer.status == said["status"] == status
        assert set(said) == {"error", "status"}
        assert said["error"]


def test_json_has_no_nan(thimble_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), "d": None}
    monkeypatch.setattr(api, "inspect", lambda path: values)
    answer = thimble_command("inspect", "x", "--json")
    assert json.loads(answer.out) == {"a": None, "b": [None, 1.5], "c": "x", "d": None}
    assert "NaN" not in answer.out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigError("no"), 2),
        (errors.NotAccepted("no"), 3),
        (errors.GuardStop("no", Path("run"), {}), 4),
        (errors.DataError("no"), 5),
        (errors.EnvironmentProblem("no"), 6),
        (errors.Interrupted("no"), 75),
        (PermissionError(13, "Permission denied", "/x"), 6),
        (KeyboardInterrupt(), 130),
        (RuntimeError("no"), 1),
    ],
)
def test_every_error_has_its_status_and_shows_a_traceback_only_when_asked(
    thimble_command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(api, "train", fail)
    answer = thimble_command("train", "slm_nano")
    assert answer.status == status
    assert answer.out == ""
    assert answer.err
    assert "Traceback" not in answer.err
    assert json.loads(thimble_command("train", "slm_nano", "--json").out)["status"] == status
    if status != 130:  # the parser ends an interrupted command itself
        assert "Traceback" in thimble_command("train", "slm_nano", "-v").err
        assert "Traceback" in thimble_command("-v", "train", "slm_nano").err


@pytest.mark.parametrize("accepted", [True, False])
def test_a_judgement_decides_the_status(
    thimble_command: Command, monkeypatch: pytest.MonkeyPatch, accepted: bool
) -> None:
    judgement = SimpleNamespace(accepted=accepted, to_dict=lambda: {"accepted": accepted})
    monkeypatch.setattr(api, "accept", lambda *args, **options: judgement)
    answer = thimble_command("accept", "x", "--json")
    assert answer.status == (0 if accepted else 3)
    assert json.loads(answer.out) == {"accepted": accepted}


def test_warnings_of_a_plan_go_to_standard_error(
    thimble_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(to_dict=lambda: {"steps": 7, "warnings": ["too long"]})
    monkeypatch.setattr(api, "plan", lambda *args, **options: made)
    answer = thimble_command("plan", "slm_nano")
    assert "too long" not in answer.out
    assert "warning: too long" in answer.err
    answer = thimble_command("plan", "slm_nano", "--json")
    assert json.loads(answer.out)["warnings"] == ["too long"]


def test_generated_text_streams_and_is_the_only_output(
    thimble_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak(path: str, stream: Any = None, **options: Any) -> str:
        for piece in ("one ", "[two]"):
            if stream:
                stream(piece)
        return "one [two]"

    monkeypatch.setattr(api, "generate", speak)
    assert thimble_command("generate", "x", "--prompt", "p").out == "one [two]\n"
    answer = thimble_command("generate", "x", "--prompt", "p", "--json")
    assert json.loads(answer.out) == {"text": "one [two]"}


def test_a_person_sees_tables(thimble_command: Command) -> None:
    answer = thimble_command("recipes")
    assert all(name in answer.out for name in recipe_names())
    assert "10,390,784" in answer.out
    answer = thimble_command("explain", "optim.learning_rate")
    assert "0.0003" in answer.out
    assert "above 0" in answer.out


def test_version(thimble_command: Command) -> None:
    assert thimble_command("--version").out == f"thimble {thimble.__version__}\n"
    for words in (("--version", "--json"), ("--json", "--version")):
        assert json.loads(thimble_command(*words).out) == {"version": thimble.__version__}


@pytest.mark.parametrize("words", [[], ["--help"], ["corpus"], ["train", "-h"]])
def test_help(thimble_command: Command, words: list[str]) -> None:
    answer = thimble_command(*words)
    assert answer.status == 0
    assert "Usage: thimble" in answer.out

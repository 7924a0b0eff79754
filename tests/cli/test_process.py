"""The command as a process: what it imports, completes, and does when nobody reads."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import thimble
from tests.helpers_cli import Command
from thimble.words import fill_resume


@pytest.fixture
def thimble_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


HEAVY = ["torch", "transformers", "pyarrow", "datatrove", "hydra", "matplotlib", "numpy"]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from thimble.cli import main; status = main("
        f"{words}); print([name for name in {HEAVY} if name in sys.modules]); sys.exit(status)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_thimble_is_light_and_leads_to_the_api() -> None:
    code = (
        "import sys, thimble; before = set(sys.modules); "
        f"assert not [name for name in {HEAVY} if name in before]; "
        "from thimble import api; "
        "assert all(getattr(thimble, name) is getattr(api, name) for name in thimble.__all__)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError):
        thimble.nonsense  # noqa: B018


def test_python_m_thimble_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thimble", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "thimble train" in done.stderr


@pytest.mark.parametrize("words", [["explain"], ["explain", "--json"]])
def test_a_reader_that_leaves_early_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "thimble", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--json"]])
def test_a_full_disk_at_standard_output_is_said(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "thimble", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 6
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_one_speaks(
    thimble_command: Command, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert bool(thimble_command("recipes").out) == (rank == "0")


def complete(line: str) -> list[str]:
    words = shlex.split(line)
    number = len(words) - 1 if not line.endswith(" ") else len(words)
    code = "from thimble.cli import main; main([])"
    done = python(code, _THIMBLE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(number))
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("thimble tra", ["train"]),
        ("thimble train slm_t", ["slm_tiny"]),
        ("thimble train slm_nano optim.le", ["optim.learning_rate="]),
        (
            "thimble train slm_nano training.compile=o",
            ["training.compile=on", "training.compile=off"],
        ),
        ("thimble plan slm_nano model=slm_s", ["model=slm_small"]),
        ("thimble explain guards.p", ["guards.plateau_steps"]),
        ("thimble generate --mess", ["--message"]),
    ],
)
def test_the_shell_completes_verbs_recipes_keys_and_choices(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


def test_fill_resume_leaves_everything_else_alone() -> None:
    given = ["train", "slm_nano", "--resumes", "x", "--prompt", "--resume=here"]
    assert fill_resume(given) == given


def test_an_option_without_its_value_is_a_usage_error(thimble_command: Command) -> None:
    answer = thimble_command("evaluate", "x", "--tasks")
    assert answer.status == 2
    assert "--tasks" in answer.err
    assert "Traceback" not in answer.err

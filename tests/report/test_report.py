"""The report holds what the run left, reads without network, and looks like a page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests import helpers_distill
from tests import helpers_training as helpers
from thimble import api
from thimble.artifacts import read_json
from thimble.errors import DataError
from thimble.report.page import _data
from thimble.training import train

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(helpers.config(tmp_path_factory.mktemp("runs"))).path


def test_it_shows_curves_samples_settings_and_data(run: Path) -> None:
    made = api.report(run)
    html = made.path.read_text()
    assert made.path == run / "report.html"
    for name in ("loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm",
                 "throughput", "memory"):  # fmt: skip
        assert f'id="{name}"' in html
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert html.count("<svg") == 7
    assert "finished at step 12" in html
    assert "optim.learning_rate" in html
    assert '<th class="number">bytes per token</th>' in html
    verbs = {line.split("thimble ")[1].split()[0] for line in made.missing if "thimble " in line}
    assert verbs == {"accept", "evaluate"}  # only commands that there are


def test_packed_chunks_are_counted(tmp_path: Path) -> None:
    packed = helpers_distill.packed_in(tmp_path)
    counts = read_json(packed / "manifest.json")["counts"]
    assert counts["val"]["padding"] > 0
    run = train(helpers.config(tmp_path / "runs", f"data.path={packed}")).path
    html = api.report(run).path.read_text()
    section = html[html.index("<h2>Data</h2>") : html.index("<h2>Configuration</h2>")]
    assert section.count(str(packed)) == 1
    assert "16 tokens in each chunk, left out: 0 empty texts, 0 unreadable" in section
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)", row) for row in section.split("<tr>")[1:]]
    names = ["documents", "tokens", "chunks", "padding"]
    assert rows == [
        ["split", *names],
        *([split, *(f"{counts[split][name]:,}" for name in names)] for split in ("train", "val")),
    ]
    other = helpers.config(tmp_path, f"data.path={packed}", "data.val_path=elsewhere")
    assert "held out: elsewhere, without what is trained on" in _data(other, [])["notes"]


def test_it_asks_nothing_of_the_network(run: Path) -> None:
    html = api.report(run).path.read_text()
    addresses = {
        address
        for address in re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", html)
        if not address.startswith("data:")
    }
    assert not addresses
    assert "@import" not in html
    assert "<script" not in html


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = api.report(run).path.read_bytes()
    assert api.report(run).path.read_bytes() == first


def test_text_of_a_model_is_text(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    sample = next((copy / "samples").glob("*.txt"))
    sample.write_text("<script>alert(1)</script> {{ 7 * 7 }}")
    html = api.report(copy).path.read_text()
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html


def test_an_evaluation_becomes_tables(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    found = api.evaluate(copy, device="cpu")
    html = api.report(copy).path.read_text()
    assert "<h2>Evaluation</h2>" in html
    figures = found.to_dict()["figures"]
    for part in (figures, figures["by_category"]["text"]):
        assert f'<td class="number">{part["bits_per_byte"]:.3f}</td>' in html
    assert "weighted score" in html
    assert "No operating-system benchmark" in html


def test_guards_attempts_and_verdict_are_shown(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    stop = {
        "event": "guard",
        "kind": "explosion",
        "step": 7,
        "reason": "the norm",
        "windows": [0, 1],
    }
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps(stop) + "\n")
    change = {"optim.learning_rate": {"from": 0.01, "to": 0.005}}
    attempt = {"attempt": 1, "started": "now", "outcome": "stopped", "reason": "too steep",
               "change": change}  # fmt: skip
    (copy / "attempts.json").write_text(json.dumps([attempt]))
    conditions = [
        {"name": "perplexity", "wanted": "below 50", "measured": "41", "ok": True},
        {"name": "text", "wanted": "loads", "measured": "not measured", "ok": None},
    ]
    verdict = {
        "accepted": False,
        "recipe": "slm_nano",
        "created": "now",
        "conditions": conditions,
        "notes": ["a note"],
        "ladder": [{"name": "bigram", "bits_per_byte": 2.0, "passed_by_model": True}],
        "evaluation": {"bits_per_byte": 1.5},
    }
    (copy / "acceptance.json").write_text(json.dumps(verdict))
    html = api.report(copy).path.read_text()
    assert "stopped at step 7: the norm" in html
    assert "optim.learning_rate: 0.01 to 0.005" in html
    assert ">not accepted<" in html
    assert "<td>?</td><td>text</td>" in html
    assert 'id="ladder"' in html


def test_a_run_without_a_record_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.jsonl").unlink()
    (copy / "report.html").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no record of training yet"):
        api.report(copy)
    assert not (copy / "report.html").exists()
    with pytest.raises(DataError, match="is not a run"):
        api.report(tmp_path)


def browse(page: Path, home: Path, wanted: str) -> str:
    """What headless Chromium prints of a page, without any network."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={home / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1100,1800", wanted, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which `make test` installs on Debian")
def test_a_browser_shows_it(run: Path, tmp_path: Path) -> None:
    page, picture = api.report(run).path, tmp_path / "page.png"
    assert "Held-out bits per byte" in browse(page, tmp_path, "--dump-dom")
    browse(page, tmp_path, f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 20  # an empty page has one

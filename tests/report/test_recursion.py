"""The page of a recursive run: by supervision step, beside others, with answers or puzzles, and
with what is too good to be true at the top."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import helpers_compare, helpers_recursion
from tests.report.test_report import CHROMIUM, browse
from thimble import api
from thimble.errors import DataError
from thimble.puzzles import arc, maze
from thimble.report import Report, puzzles
from thimble.report.charts import Chart

CURVES = ("lm_loss", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "loss", "grad_norm")


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    return Path(shutil.copytree(helpers_compare.conversations().run, tmp_path / "run"))


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    return Path(shutil.copytree(helpers_compare.puzzles().run, tmp_path / "run"))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test looks at something else: drawing them is what a report takes its time for."""
    empty = lambda name, title, figure: Chart(name, title, "<svg></svg>", b"")  # noqa: E731
    monkeypatch.setattr("thimble.report.charts.finish", empty)


def alone(run: Path) -> Path:
    """Without evaluation and comparison."""
    (run / "comparison.json").unlink()
    for file in run.glob("checkpoints/*/evaluation_report.json"):
        file.unlink()
    return run


def test_a_run_on_conversations(talk: Path) -> None:
    made = api.report(talk)
    html = made.path.read_text()
    for name in (*CURVES, "perplexity", "bits_per_byte", "nll_by_step", "accuracy_by_step",
                 "halting", "ladder", "comparison"):  # fmt: skip
        assert f'id="{name}"' in html
        assert (talk / "plots" / f"{name}.png").is_file()
    assert made.missing == []
    assert "<h2>Beside plain models</h2>" in html
    found = helpers_compare.conversations()
    for row in found.rows:
        assert f"<td>{row.name}</td>" in html
        assert f'<td class="number">{row.nll:.4f}</td>' in html
    for line in found.verdict:
        assert line in html
    assert "14 of 120 prompts lost their beginning to seq_len" in html
    assert "<td>val</td>" in html
    assert "<th>splits / prompts in both</th><td>0</td>" in html
    assert 'class="alarm' not in html
    assert "<h2>Held-out puzzles</h2>" not in html


@pytest.mark.usefixtures("no_charts")
def test_answers_stand_beside_the_given_ones(talk: Path) -> None:
    sample = sorted((talk / "samples").glob("*.txt"))[-1]
    first, *others = sample.read_text().split("\n\n---\n\n")
    asked, _, rest = first.partition("[ASSISTANT]\n")
    _, end, given = rest.rpartition("\n(given: ")
    mine = f"{asked}[ASSISTANT]\n<script>alert(1)</script> {{{{ 7 * 7 }}}}{end}{given}"
    sample.write_text("\n\n---\n\n".join([mine, *others]))
    html = api.report(talk).path.read_text()
    table = html[html.index("<h2>Held-out answers</h2>") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 1 + 3
    cells = re.findall(r'<pre class="cell">(.*?)</pre>', table, re.DOTALL)
    assert cells[1] == "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}"
    assert cells[2] == given.removesuffix(")")
    for asked, _, given in zip(*[iter(cells)] * 3, strict=True):
        # In these conversations an answer is the words of its question.
        assert given == " ".join(w for w in asked.split() if w in helpers_recursion.WORDS)
    assert "<script>" not in html


@pytest.mark.usefixtures("no_charts")
def test_without_evaluation_or_comparison_it_says_what_makes_them(talk: Path) -> None:
    made = api.report(alone(talk))
    html = made.path.read_text()
    assert 'id="nll_by_step"' in html  # of the run's own records
    assert 'id="ladder"' in html
    assert 'id="halting"' not in html
    commands = [line.split(": ")[1] for line in made.missing]
    assert sorted(commands) == [f"thimble compare --run {talk}", f"thimble evaluate {talk}"]


@pytest.mark.usefixtures("no_charts")
def test_a_plain_run_is_not_to_be_compared() -> None:
    plain = helpers_compare.conversations().rows[1].run
    assert api.report(plain).missing == []


@pytest.mark.usefixtures("no_charts")
def test_an_unfinished_comparison_says_how_it_goes_on(talk: Path) -> None:
    ledger = json.loads((talk / "comparison.json").read_text())
    last = ledger["rows"].pop()["name"]
    (talk / "comparison.json").write_text(json.dumps({**ledger, "waiting": [last]}))
    assert f"{last}: thimble compare --resume {talk}" in api.report(talk).missing


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("of", ["records", "evaluation"])
def test_what_is_too_good_is_at_the_top_until_it_is_explained(talk: Path, of: str) -> None:
    alone(talk)
    if of == "records":
        path = talk / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if "val_loss" in record:
                record["val_exact_accuracy"] = 0.75
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        said = "75.0% of the answers are exact"
    else:
        evaluated = api.evaluate(talk, device="cpu").to_dict()
        said = "0.010 nats a token &lt;b&gt;"
        evaluated["suspicious"] = [said.replace("&lt;", "<").replace("&gt;", ">")]
        (Path(evaluated["checkpoint"]) / "evaluation_report.json").write_text(json.dumps(evaluated))
    html = api.report(talk).path.read_text()
    assert html.index('<div class="alarm">') < html.index(said) < html.index("<h2>")
    assert "Not to be believed before it is explained" in html
    assert f"{talk / 'explained.txt'}; the next report" in html
    (talk / "explained.txt").write_text("The answers <are> in the questions.")
    html = api.report(talk).path.read_text()
    assert '<div class="alarm explained">' in html
    assert said in html
    assert "The answers &lt;are&gt; in the questions." in html
    assert "Not to be believed" not in html


@pytest.fixture(scope="module")
def page() -> Report:
    return api.report(helpers_compare.puzzles().run)


def test_a_run_on_puzzles_shows_them_step_by_step(page: Report) -> None:
    html = page.path.read_text()
    for name in (*CURVES, "nll_by_step", "accuracy_by_step", "halting", "comparison"):
        assert f'id="{name}"' in html
    assert html.count('<svg class="puzzle"') == puzzles.SHOWN * (1 + 3 + 1)
    for step in (1, 2, 3):
        assert html.count(f"step {step}: ") == puzzles.SHOWN
    assert "0 of the 8 that were looked at are solved." in html
    assert "<td>train</td>" in html
    assert "last checkpoint" in html  # puzzles have no split to choose the best by
    assert page.missing == []


@pytest.mark.usefixtures("no_charts")
def test_puzzles_that_were_built_again_are_not_drawn(
    grids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thimble.report.recursion.fingerprint_of_run", lambda directory: "other")
    made = api.report(grids)
    assert '<svg class="puzzle"' not in made.path.read_text()
    (line,) = made.missing
    assert line.endswith("was built again since")


@pytest.mark.usefixtures("no_charts")
def test_data_that_are_gone_are_missed_and_no_more(
    grids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise DataError("There are no puzzles at data/puzzles/sudoku. Make some.")

    monkeypatch.setattr("thimble.report.recursion._puzzle_set", gone)
    made = api.report(grids)
    assert made.missing == ["data: There are no puzzles at data/puzzles/sudoku. Make some."]
    assert 'id="lm_loss"' in made.path.read_text()


@pytest.mark.usefixtures("no_charts")
def test_the_same_run_gives_the_same_page(grids: Path) -> None:
    first = api.report(grids).path.read_text()
    assert '<svg class="puzzle"' in first
    assert api.report(grids).path.read_text() == first


def test_it_asks_nothing_of_the_network(page: Report) -> None:
    first = page.path.read_text()
    assert "<script" not in first
    assert not [
        address
        for address in re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", first)
        if not address.startswith("data:")
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which `make test` installs on Debian")
def test_a_browser_draws_the_puzzles(page: Report, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browse(page.path, tmp_path, f"--screenshot={picture}")
    with Image.open(picture) as image:
        counted: Any = image.convert("RGB").getcolors(maxcolors=2**24)
    colours = {colour: count for count, colour in counted}
    assert colours[0xFF, 0xD7, 0xD5] > 1000  # cells that are wrong
    assert colours[0xEA, 0xEE, 0xF2] > 1000  # cells that were given


# ----------------------------------------------------------------------------------- the drawings


def test_right_and_wrong_ones_are_shown_as_far_as_there_are_both() -> None:
    def shown(right: int, wrong: int) -> tuple[int, int]:
        solved = np.array([True] * right + [False] * wrong)
        rows = puzzles.chosen(solved)
        assert len(set(rows)) == len(rows)
        return int(solved[rows].sum()), int((~solved[rows]).sum())

    assert shown(10, 10) == (3, 3)
    assert shown(10, 1) == (5, 1)
    assert shown(1, 10) == (1, 5)
    assert shown(0, 10) == (0, 6)
    assert shown(10, 0) == (6, 0)
    assert shown(2, 1) == (2, 1)


def sudoku() -> tuple[np.ndarray, np.ndarray]:
    """A 4x4 one as tokens: what is given, and its solution."""
    solution = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]) + 1
    given = solution.copy()
    given[[1, 5, 6]] = 1  # empty
    return given, solution


def test_a_sudoku_tells_given_from_said_from_wrong() -> None:
    given, solution = sudoku()
    said = solution.copy()
    said[1], said[5], said[0] = 5, 0, 3  # two of the empty cells, one of them no digit; a given one
    first, *steps, last = puzzles.pictures("sudoku", given, solution, np.stack([said, solution]))
    assert [step["caption"] for step in steps] == ["step 1: 3 wrong", "step 2: right"]
    wrong, right = (step["svg"] for step in steps)

    def digits(svg: str, look: str) -> list[str]:
        return re.findall(rf'<text class="{look}"[^>]*>(.)</text>', svg)

    assert digits(wrong, "w") == ["2", "4", "?"]
    assert len(digits(wrong, "g")) == 12
    assert digits(wrong, "m") == ["1"]
    assert (digits(right, "w"), digits(right, "m")) == ([], ["2", "4", "1"])
    assert (first["caption"], last["caption"]) == ("given", "solution")
    assert len(digits(first["svg"], "g")) == 13
    assert digits(first["svg"], "m") == []
    assert digits(last["svg"], "m") == ["2", "4", "1"]


def area(svg: str, colour: str) -> int:
    """Cells of a colour."""
    paths = re.findall(rf'<path fill="{colour}" d="([^"]*)"', svg)
    return sum(int(width) for path in paths for width in re.findall(r"h(\d+)v1", path))


def test_a_maze_has_its_way_and_marks_where_it_is_wrong() -> None:
    inputs = maze.tokens("S #" + "  #" + "##G").ravel()
    labels = maze.tokens("So#" + " o#" + "##G").ravel()
    said = labels.copy()
    said[4], said[3] = 2, 5  # the way through another cell
    _, step, solution = puzzles.pictures("maze", inputs, labels, said[None])
    assert step["caption"] == "step 1: 2 wrong"
    assert step["svg"].count("h.3v.3") == 2
    wall, free, start, goal, way = puzzles.MAZE.values()
    for svg, wrong in ((step["svg"], 2), (solution["svg"], 0)):
        counted = [area(svg, colour) for colour in (wall, free, start, goal, way)]
        assert counted == [4, 1, 1, 1, 2]
        assert svg.count("h.3v.3") == wrong


def test_an_arc_grid_is_as_large_as_its_solution() -> None:
    inputs = arc.encode(np.zeros((3, 2), np.uint8))
    labels = arc.encode(np.full((2, 4), 2, np.uint8)).astype(np.int64)
    labels[labels == 0] = puzzles.IGNORE
    said = arc.encode(np.full((2, 4), 2, np.uint8)).astype(np.int64)
    said[1], said[29] = 11, 5  # one wrong colour, and one where nothing is asked
    given, step, solution = puzzles.pictures("arc", inputs, labels, said[None])
    assert step["caption"] == "step 1: 1 wrong"
    for picture, rows, columns in ((given, 4, 3), (step, 3, 5), (solution, 3, 5)):
        assert f'viewBox="-.1 -.1 {columns + 0.2:g} {rows + 0.2:g}"' in picture["svg"]
    assert area(step["svg"], puzzles.ARC[4]) == 7
    assert area(step["svg"], puzzles.ARC[11]) == 1
    assert area(solution["svg"], puzzles.ARC[4]) == 8


def test_puzzles_of_an_unknown_kind_are_not_drawn(grids: Path) -> None:
    config = helpers_recursion.puzzle(grids)
    latest = grids / "checkpoints" / (grids / "checkpoints" / "latest").read_text().strip()
    assert puzzles.drawings(latest, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puzzles, "LEGENDS", {})
        assert puzzles.drawings(latest, config) is None

"""Puzzles as pictures: what a recursive model was given, what it said at each step, the solution.

Grids are [rows, columns] of tokens, 0 for padding; -100 in a solution is where nothing is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thimble.config.schema import Config
from thimble.console import log
from thimble.puzzles.loader import IGNORE, Split
from thimble.puzzles.maze import ALPHABET
from thimble.puzzles.sudoku_grids import BOXES

SHOWN = 6
LOOKED_AT = 64  # puzzles among which right and wrong ones are looked for
# FLOPs that drawing may take: well under a minute of a few cores, or of a GPU.
BUDGET = {"cpu": 2e12, "cuda": 2e14}
KINDS = {6: "maze", 11: "sudoku", 12: "arc"}  # by vocabulary, of data that does not say
MAZE = dict(zip(range(1, 6), ("#3d4451", "#ffffff", "#2da44e", "#cf222e", "#54aeff"), strict=True))
assert len(MAZE) == len(ALPHABET)
# The colours in which the competition shows its tasks, after padding and the grid's end.
ARC_COLOURS = (
    *("#ffffff", "#d1d9e0", "#000000", "#0074d9", "#ff4136", "#2ecc40"),
    *("#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)
ARC = dict(enumerate(ARC_COLOURS))
LEGENDS = {
    "sudoku": "Grey: given. Blue: not given. Red: wrong; a question mark is no digit.",
    "maze": "Green: start. Red: goal. Blue: the way. A white square with a rim: wrong.",
    "arc": "The colours of the competition; light grey is the end. A white square with a rim: "
    "wrong.",
}
UNKNOWN = "#8250df"  # a token that such a grid does not have


def drawings(directory: Path, config: Config) -> dict[str, Any] | None:
    """At most six held-out puzzles, half of them solved as far as there are such: ``legend`` and
    ``puzzles``, each with ``title`` and ``pictures`` (``caption`` and ``svg`` of what is given, of
    the prediction after each step, and of the solution).

    Computed from the checkpoint. None for puzzles of an unknown kind.
    """
    from thimble.evaluation.recursive import evaluate_puzzles
    from thimble.models import interop
    from thimble.training import devices
    from thimble.training.plan import flops_per_token

    split = Split(config.data.folder, "test")
    length, steps = split.metadata.seq_len, config.model.halt_max_steps
    kind = split.kind or KINDS.get(split.metadata.vocab_size, "")
    if kind not in LEGENDS or math.isqrt(length) ** 2 != length:
        return None
    device = devices.resolve_device(config.device)
    network: Any = interop.load_model(directory, device)
    if device.type == "cuda":
        network.compute_dtype = devices.resolve_precision(config.precision, device)
    cost = flops_per_token(config.model, length) / 3 * length * steps  # forward alone
    affordable = int(BUDGET.get(device.type, BUDGET["cpu"]) / cost)
    count = min(max(affordable, 2), LOOKED_AT, len(split))
    log.debug("drawing from %d puzzles", count)
    kept = evaluate_puzzles(
        network,
        split,
        form=config.objective.form,
        max_examples=count,
        batch_size=count,
        keep=("preds_by_step", "inputs", "labels", "examples"),
    )["kept"]
    inputs, labels = kept["inputs"].numpy(), kept["labels"].numpy()
    made = kept["preds_by_step"].numpy()
    solved = ((made[:, -1] == labels) | (labels == IGNORE)).all(1)
    puzzles = [
        {
            "title": f"puzzle {int(kept['examples'][row]):,}: "
            + ("solved" if solved[row] else "not solved"),
            "pictures": pictures(kind, inputs[row], labels[row], made[row]),
        }
        for row in chosen(solved)
    ]
    shares = f"{int(solved.sum())} of the {count} that were looked at are solved."
    return {"legend": f"{LEGENDS[kind]} {shares}", "puzzles": puzzles}


def chosen(solved: np.ndarray) -> list[int]:
    """Rows to show: half of them right and half wrong, as far as there are so many of each."""
    right, wrong = (np.flatnonzero(mask).tolist() for mask in (solved, ~solved))
    take = min(len(right), max(SHOWN - SHOWN // 2, SHOWN - len(wrong)))
    return sorted(right[:take] + wrong[: SHOWN - take])


def pictures(
    kind: str, inputs: np.ndarray, labels: np.ndarray, made: np.ndarray
) -> list[dict[str, str]]:
    """Of one puzzle; ``inputs`` and ``labels`` [T], ``made`` [S, T] the tokens after each step."""
    side = math.isqrt(len(inputs))
    given, asked = inputs.reshape(side, side), labels.reshape(side, side)
    solution = np.where(asked == IGNORE, 0, asked)
    found = [("given", draw(kind, given, given, None))]
    for step, tokens in enumerate(made, 1):
        said = tokens.reshape(side, side)
        wrong = int(((said != asked) & (asked != IGNORE)).sum())
        caption = f"step {step}: " + (f"{wrong} wrong" if wrong else "right")
        found.append((caption, draw(kind, said, given, asked)))
    found.append(("solution", draw(kind, solution, given, None)))
    return [{"caption": caption, "svg": svg} for caption, svg in found]


def draw(kind: str, grid: np.ndarray, given: np.ndarray, asked: np.ndarray | None) -> str:
    """A grid as SVG. ``asked``: mark the cells that are not as they should be; ``given``: what the
    puzzle says itself."""
    if asked is not None:
        # What is said beyond the solution's end is not asked, and not looked at.
        grid = np.where(asked == IGNORE, 0, grid)
    wrong = np.zeros_like(grid, bool) if asked is None else (grid != asked) & (asked != IGNORE)
    if kind == "sudoku":
        return sudoku(grid, given, wrong)
    if kind == "maze":
        return coloured(grid, wrong, MAZE)
    rows, columns = (np.flatnonzero((grid > 0).any(axis)).max(initial=0) + 1 for axis in (1, 0))
    return coloured(grid[:rows, :columns], wrong[:rows, :columns], ARC)


def sudoku(grid: np.ndarray, given: np.ndarray, wrong: np.ndarray) -> str:
    """Digits: those of the puzzle bold on grey, the model's blue, wrong ones red."""
    side = len(grid)
    height, width = BOXES.get(side, (side, side))
    parts = []
    for row, column in np.ndindex(grid.shape):
        token, fixed = int(grid[row, column]), given[row, column] > 1
        bad = wrong[row, column]
        if bad or fixed:
            fill = "#ffd7d5" if bad else "#eaeef2"
            parts.append(f'<path fill="{fill}" d="M{column} {row}h1v1h-1z"/>')
        if token == 1 and not bad:
            continue  # an empty cell
        text = str(token - 1) if token > 1 else "?"
        look = "w" if bad else "g" if fixed else "m"
        parts.append(f'<text class="{look}" x="{column + 0.5}" y="{row + 0.73}">{text}</text>')
    thin = "".join(f"M0 {n}h{side}M{n} 0v{side}" for n in range(1, side))
    thick = f"M0 0h{side}v{side}h-{side}z"
    thick += "".join(f"M0 {n}h{side}" for n in range(height, side, height))
    thick += "".join(f"M{n} 0v{side}" for n in range(width, side, width))
    parts.append(f'<path fill="none" stroke="#8b949e" stroke-width=".03" d="{thin}"/>')
    parts.append(f'<path fill="none" stroke="#1f2328" stroke-width=".08" d="{thick}"/>')
    return _svg(side, side, "".join(parts))


def coloured(grid: np.ndarray, wrong: np.ndarray, colours: Mapping[int, str]) -> str:
    """Cells in colours, a white square with a black rim on each that is wrong."""
    parts = [
        f'<path fill="{colours.get(int(token), UNKNOWN)}" d="{_cells(grid == token)}"/>'
        for token in np.unique(grid)
    ]
    marks = "".join(f"M{x}.35 {y}.35h.3v.3h-.3z" for y, x in np.argwhere(wrong))
    if marks:
        parts.append(f'<path fill="#fff" stroke="#000" stroke-width=".14" d="{marks}"/>')
    return _svg(len(grid), grid.shape[1], "".join(parts))


def _cells(mask: np.ndarray) -> str:
    """The path around all cells of a mask, neighbours in a row as one piece."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    begins, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return "".join(
        f"M{x} {y}h{end - x}v1h-{end - x}z" for (y, x), (_, end) in zip(begins, ends, strict=True)
    )


def _svg(rows: int, columns: int, inside: str) -> str:
    # A little room, since half of a rim's line is outside the grid.
    box = f"-.1 -.1 {columns + 0.2:g} {rows + 0.2:g}"
    return f'<svg class="puzzle" role="img" viewBox="{box}">{inside}</svg>'

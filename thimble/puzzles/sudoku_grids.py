"""Sudoku grids of 4x4, 6x6 and 9x9: a solver, a generator, and the class of a grid under symmetry.

A grid is a list or array of size * size cells, line by line, 0 where it is empty.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> rows and columns of a box
GIVENS = {4: (4, 9), 6: (9, 20), 9: (22, 40)}  # fewest and most that the generator aims at


@functools.cache
def units_of(size: int) -> list[tuple[int, int, int]]:
    """The row, column and box of every cell, numbered 0 .. 3 * size."""
    height, width = BOXES[size]
    across = size // width
    return [
        (row, size + column, 2 * size + row // height * across + column // width)
        for row in range(size)
        for column in range(size)
    ]


def is_solution(cells: Sequence[int]) -> bool:
    """Whether every row, column and box holds each digit once."""
    size = math.isqrt(len(cells))
    found = {(unit, v) for place, v in zip(units_of(size), cells, strict=True) for unit in place}
    return len(found) == 3 * len(cells) and set(cells) == set(range(1, size + 1))


def solve(
    cells: Sequence[int], limit: int = 2, draw: random.Random | None = None
) -> tuple[list[list[int]], int]:
    """Up to ``limit`` solutions of a grid, and how many steps of the search were hard.

    Depth first. Each step fills a cell that has one candidate; where there is none the step is a
    hard one: it fills the only cell of a row, column or box that can hold a digit, or else tries
    the candidates of the cell with the fewest. ``draw`` puts these into a random order.
    """
    size = math.isqrt(len(cells))
    units, full = units_of(size), (1 << size) - 1
    board, used = list(cells), [0] * (3 * size)
    for place, value in enumerate(board):
        if value:
            bit = 1 << (value - 1)
            if any(used[unit] & bit for unit in units[place]):
                return [], 0
            for unit in units[place]:
                used[unit] |= bit
    empty = [place for place, value in enumerate(board) if not value]
    solutions: list[list[int]] = []
    hard = 0

    def choose() -> tuple[int, int]:
        """Index into ``empty`` and candidates of the next cell; no candidates at a dead end."""
        nonlocal hard
        fewest, at, chosen = size + 1, 0, 0
        candidates = []
        for index, place in enumerate(empty):
            row, column, box = units[place]
            options = full & ~(used[row] | used[column] | used[box])
            count = options.bit_count()
            if count < fewest:
                fewest, at, chosen = count, index, options
                if count <= 1:
                    return at, chosen
            candidates.append(options)
        hard += 1
        once, twice = used.copy(), used.copy()  # digits with a place, with more than one
        for place, options in zip(empty, candidates, strict=True):
            for unit in units[place]:
                twice[unit] |= once[unit] & options
                once[unit] |= options
        if any(digits != full for digits in once):
            return 0, 0
        for index, place in enumerate(empty):
            row, column, box = units[place]
            only = candidates[index] & ~(twice[row] & twice[column] & twice[box])
            if only:
                # Two digits with this as their only place: the search finds the dead end.
                return index, only & -only
        return at, chosen

    def search() -> bool:
        if not empty:
            solutions.append(board.copy())
            return len(solutions) >= limit
        at, options = choose()
        digits = [digit for digit in range(1, size + 1) if options >> (digit - 1) & 1]
        if draw:
            draw.shuffle(digits)
        place = empty[at]
        empty[at] = empty[-1]
        empty.pop()
        for digit in digits:
            bit = 1 << (digit - 1)
            board[place] = digit
            for unit in units[place]:
                used[unit] |= bit
            if search():
                return True
            for unit in units[place]:
                used[unit] &= ~bit
        board[place] = 0
        empty.append(place)
        empty[at], empty[-1] = empty[-1], empty[at]
        return False

    search()
    return solutions, hard


def make(size: int, draw: random.Random) -> tuple[list[int], list[int], int]:
    """A random puzzle with one solution: its cells, the solution, and its hard steps.

    Givens are taken away in random order, none that would allow a second solution, down to a number
    drawn evenly from GIVENS, so that easy and hard ones come in equal parts.
    """
    (solution,), _ = solve([0] * size**2, limit=1, draw=draw)
    wanted = draw.randint(*GIVENS[size])
    puzzle, left = list(solution), size**2
    for place in draw.sample(range(size**2), size**2):
        if left == wanted:
            break
        puzzle[place] = 0
        if len(solve(puzzle)[0]) > 1:
            puzzle[place] = solution[place]
        else:
            left -= 1
    return puzzle, solution, solve(puzzle)[1]


@functools.cache
def line_orders(size: int, thick: int) -> np.ndarray:
    """All orders of lines that keep bands of ``thick`` lines together: [orders, size]."""
    bands = [tuple(range(start, start + thick)) for start in range(0, size, thick)]
    return np.array(
        [
            list(itertools.chain.from_iterable(lines))
            for order in itertools.permutations(bands)
            for lines in itertools.product(*(itertools.permutations(band) for band in order))
        ]
    )


def canonical(solution: Sequence[int]) -> tuple[bytes, np.ndarray]:
    """The smallest grid that a solution turns into, and the orders of its cells that give it.

    Two solutions have the same smallest grid exactly if one turns into the other by renaming
    digits, moving rows within bands, bands, columns within stacks, stacks and, where boxes are
    square, transposing. Orders: [T, cells], more than one where the grid is symmetric in itself.

    Any row in any order of the columns can be the first one, which names the digits; the order of
    all other rows follows from their first column. Compared is the second row, then the rest.
    """
    size = math.isqrt(len(solution))
    height, width = BOXES[size]
    numbers = np.arange(size**2).reshape(size, size)
    weights = size ** np.arange(size - 1, -1, -1)
    columns = line_orders(size, width)
    flat = np.asarray(solution) - 1
    turns = [numbers, numbers.T] if height == width else [numbers]
    found = []
    for turn, cells in enumerate(turns):
        grid = flat[cells][:, columns]  # [row, order, column]
        for first in range(size):
            names = np.argsort(grid[first], axis=1)  # [order, digit]: the place of each digit
            band = range(first // height * height, first // height * height + height)
            codes = [np.take_along_axis(names, grid[r], 1) @ weights for r in band if r != first]
            found.append((np.min(codes, axis=0), turn, first))
    smallest = min(int(codes.min()) for codes, _, _ in found)
    best = b""
    orders: list[np.ndarray] = []
    for codes, turn, first in found:
        for order in np.flatnonzero(codes == smallest):
            cells = turns[turn][:, columns[order]]
            grid = np.argsort(flat[cells[first]])[flat[cells]]
            lead = grid[:, 0]
            bands: list[list[int]] = [
                sorted(range(start, start + height), key=lambda row: lead[row])
                for start in range(0, size, height)
            ]
            bands.sort(key=lambda rows: lead[rows[0]])
            rows = [row for band in bands for row in band]
            form = grid[rows].astype(np.uint8).tobytes()
            if not best or form < best:
                best, orders = form, []
            if form == best:
                orders.append(cells[rows].ravel())
    return best, np.array(orders)


def puzzle_class(puzzle: Sequence[int], solution: Sequence[int]) -> bytes:
    """The same for two puzzles exactly if one turns into the other by those changes."""
    form, orders = canonical(solution)
    given = np.asarray(puzzle) > 0
    return form + min(given[order].tobytes() for order in orders)


def held_out_class(puzzle: Sequence[int], solution: Sequence[int]) -> bytes:
    """The same for puzzles that must not stand on both sides of a split of generated ones.

    That is, all whose solutions turn into one another; but only two such classes exist for 4x4,
    where puzzles must.
    """
    return puzzle_class(puzzle, solution) if len(solution) == 16 else canonical(solution)[0]


def invariant(puzzle: Sequence[int]) -> int:
    """A number that is the same for all puzzles of one class, and seldom for others.

    The givens are told apart by how many share their row, column, box and digit, then by which
    those are, three times over (the refinement of Weisfeiler and Leman).
    """
    size = math.isqrt(len(puzzle))
    height, width = BOXES[size]
    units = units_of(size)
    kind = {place: 0 for place, digit in enumerate(puzzle) if digit}
    for _ in range(3):
        members: list[list[int]] = [[] for _ in range(4 * size + 1)]
        for place, value in kind.items():
            for unit in (*units[place], 3 * size + puzzle[place]):
                members[unit].append(value)
        kinds = [hash(tuple(sorted(values))) for values in members]
        for place in kind:
            row, column, box = units[place]
            sides = [kinds[row], kinds[column]]
            if height == width:
                sides.sort()
            kind[place] = hash((kind[place], *sides, kinds[box], kinds[3 * size + puzzle[place]]))
    return hash(tuple(sorted(kind.values())))

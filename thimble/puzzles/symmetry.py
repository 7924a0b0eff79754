"""The eight symmetries of the square, numbered as in the HRM and TRM code bases."""

from __future__ import annotations

import numpy as np

INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """A grid [rows, columns] turned or mirrored; ``INVERSE[number]`` undoes ``number``.

    0: as it is; 1, 2, 3: so many quarter turns anticlockwise; 4: left and right exchanged; 5: top
    and bottom; 6: along the diagonal; 7: along the other one.
    """
    if number < 4:
        return np.rot90(grid, number)
    if number == 4:
        return np.fliplr(grid)
    if number == 5:
        return np.flipud(grid)
    return grid.T if number == 6 else np.rot90(grid, 2).T

"""Grid puzzles (Sudoku, mazes, ARC) as data sets of fixed length, and the scoring of answers."""

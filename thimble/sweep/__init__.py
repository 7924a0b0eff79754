"""Sweeps: one recipe, some keys with several values, a run for each combination.

Hydra's multirun chooses the combinations and starts the jobs, so its launchers (Submitit, Ray,
joblib) and its sweepers (Optuna) work here; this package checks everything before the first run,
keeps the account of the runs, and says which one is best.
"""

from __future__ import annotations

from thimble.sweep.multirun import sweep
from thimble.sweep.result import Sweep

__all__ = ["Sweep", "sweep"]

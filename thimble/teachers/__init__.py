"""Teachers: models whose distribution over the next token a student learns from.

A teacher is loaded here (``direct``), has been asked before (``cache``), or answers over the
network (``served``). All of them give the same for the same rows of tokens: ``SparseTargets``, or
``SampledTargets``, of every position. ``finetune`` makes a teacher used to the data first.
"""

from __future__ import annotations

from thimble.teachers.asked import Asked, Targets, Teacher
from thimble.teachers.examples import Examples, PackedExamples, Rows, WindowExamples, open_examples

__all__ = [
    "Asked",
    "Examples",
    "PackedExamples",
    "Rows",
    "Targets",
    "Teacher",
    "WindowExamples",
    "open_examples",
]

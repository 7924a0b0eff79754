from __future__ import annotations

from tests.evaluation.conftest import run, tokens

__all__ = ["run", "tokens"]

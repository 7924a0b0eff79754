"""Generation: sampling over a key/value cache, and a checkpoint made to answer."""

from __future__ import annotations

from thimble.generation.model import Model, load

__all__ = ["Model", "load"]

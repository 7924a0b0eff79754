"""Text for training: fetched, extracted, cleaned, deduplicated and mixed into documents."""

from __future__ import annotations

from typing import Any


def build(name: str | None = None, **options: Any):  # type: ignore[no-untyped-def]
    from thimble.corpora.build import os_kernel

    return os_kernel(**options)

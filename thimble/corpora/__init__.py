"""Text for training: fetched, extracted, cleaned, deduplicated and mixed into documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def build(
    name: str | None = None,
    *,
    sources: Sequence[str | Path] = (),
    scale: str = "quick",
    output: str | Path | None = None,
    workers: int | None = None,
    seed: int = 1,
) -> Path:
    """Make a corpus and return its folder; nothing is done when it is there already.

    ``name`` is ``os_kernel``, made from Debian packages that are fetched into the cache, or taken
    from the folder given as ``sources``. Without a name, ``sources`` are files and folders of
    one's own. ``scale`` is ``quick`` or ``full``; ``workers`` are processes, one for each core
    when not given; ``seed`` belongs to the sampling of the mixture. The same inputs and seed give
    the same bytes, whatever ``workers`` is.

    Raises ConfigError for an unknown name or scale, DataError for input that cannot be read, and
    EnvironmentProblem for network and disk.
    """
    from thimble.corpora import making

    return making.build(
        name, sources=sources, scale=scale, output=output, workers=workers, seed=seed
    )

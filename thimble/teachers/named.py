"""A teacher by its name, however it is going to answer."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from thimble.errors import ConfigError
from thimble.teachers.asked import Asked, Teacher
from thimble.teachers.direct import open_direct
from thimble.teachers.examples import Examples
from thimble.teachers.served import ServedTeacher


def open_teacher(
    name: str | Path,
    examples: Examples,
    asked: Asked,
    *,
    adapter: str | Path | None = None,
    served_model: str | None = None,
    device: torch.device,
    precision: str = "auto",
    ram_disk: bool = False,
) -> Teacher:
    """A server by its address, or what ``models.find`` finds, loaded here.

    ``served_model``: which one of a server that has several. Raises what ``ServedTeacher`` and
    ``open_direct`` raise, and ConfigError for options of the one given to the other.
    """
    if re.match(r"https?://", str(name)):
        if adapter is not None or ram_disk:
            raise ConfigError("A server has its adapter and its weights already: leave these out.")
        return ServedTeacher(str(name), examples, asked, model=served_model)
    if served_model is not None:
        raise ConfigError(f"--served-model is for a server, and {name} is none (http://...).")
    return open_direct(
        name,
        examples,
        asked,
        adapter=adapter,
        device=device,
        precision=precision,
        ram_disk=ram_disk,
    )

"""The words of a sweep, sorted: several values, one value for every run, settings of Hydra."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from thimble.config import documents
from thimble.config.describe import as_override
from thimble.config.load import check_key, flatten, join_options, split_override
from thimble.errors import ConfigError


@dataclass(frozen=True)
class Words:
    """``fixed``: key to value, for every run. ``swept``: key to Hydra's sweep (``a,b,c``,
    ``range(...)``, ``choice(...)``, ``interval(...)``). ``hydra``: words as they were given."""

    fixed: dict[str, Any]
    swept: dict[str, Override]
    hydra: list[str]

    @classmethod
    def sorted_from(cls, overrides: Sequence[str], nested: Mapping[str, Any]) -> Words:
        """Later words win; raises ConfigError for an unknown key or an unreadable word."""
        fixed, swept, hydra = dict[str, Any](), dict[str, Override](), []
        for word in documents.translate(join_options(overrides)):
            override = _parse(word)
            if word.lstrip("+~").startswith(("hydra.", "hydra/")):
                hydra.append(word)
            elif override is not None and override.is_sweep_override():
                key = override.key_or_group
                check_key(key, word.partition("=")[2])
                fixed.pop(key, None)
                swept[key] = override
            else:
                key, value = split_override(word)
                swept.pop(key, None)
                fixed[key] = value
        for key, value in flatten(nested):
            swept.pop(key, None)
            fixed[key] = value
        return cls(fixed, swept, hydra)

    def choice(self, group: str) -> str:
        """What is chosen of ``sweeper`` or ``launcher``; Hydra's own are called basic."""
        for word in reversed(self.hydra):
            key, _, value = word.partition("=")
            if key == f"hydra/{group}":
                return value
        return "basic"

    def values(self) -> dict[str, list[str]]:
        """The values of each swept key as words; of an interval the interval itself."""
        return {key: _values(override) for key, override in self.swept.items()}

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the values, in the order of Hydra's basic sweeper."""
        return list(_product(self.values()))

    def probes(self) -> list[dict[str, Any]]:
        """For a sweeper that draws: every value (of an interval its ends) beside the first ones."""
        values = {
            key: [str(sweep.start), str(sweep.end)]
            if isinstance(sweep := override.value(), IntervalSweep)
            else _values(override)
            for key, override in self.swept.items()
        }
        first = {key: words[:1] for key, words in values.items()}
        return [
            combination
            for key, words in values.items()
            for combination in _product({**first, key: words})
        ]


def settings(words: Iterable[str]) -> dict[str, Any]:
    """Key to value of single-valued words, read by Hydra's grammar."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    return {override.key_or_group: override.value() for override in parsed}


def text(values: Mapping[str, Any]) -> str:
    """Settings as one would type them."""
    return " ".join(f"{key}={as_override(value)}" for key, value in values.items())


def _parse(word: str) -> Override | None:
    """None where Hydra cannot read a word: it may still be a text of ours, such as a path."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _values(override: Override) -> list[str]:
    if override.is_interval_sweep():
        return [override.get_value_string()]
    try:
        return list(override.sweep_string_iterator())
    except HydraException as error:  # glob(...), which needs groups that Hydra knows
        raise ConfigError(f"{override.input_line} cannot be swept here: {error}.") from error


def _product(values: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    keys = list(values)
    for words in itertools.product(*values.values()):
        yield settings(f"{key}={word}" for key, word in zip(keys, words, strict=True))

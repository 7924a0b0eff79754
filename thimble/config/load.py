"""From a recipe and overrides to a checked ``Config``, and back from a run's ``config.yaml``.

Hydra composes the recipe from ``thimble/conf``. Keys are checked before any value is set, because
Hydra answers a misspelt key with the advice to add it, and values are checked by the schema,
because YAML alone would accept any type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from thimble.artifacts import write_text
from thimble.config import documents
from thimble.config.describe import (
    as_override,
    choices_of,
    describe_range,
    describe_type,
    is_text,
    keys,
    nearest_key,
    nearest_word,
)
from thimble.config.schema import Config
from thimble.errors import ConfigError, DataError

CONF = Path(__file__).parent.parent / "conf"
CONFIG_FILE = "config.yaml"


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text, since it has no point; here it is a number."""


class Dumper(yaml.SafeDumper):
    """Quotes a text that the loader would read as a number."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


class Misspelt(ConfigError):
    """A name that does not exist, with the nearest one that does (None if nothing is close)."""

    def __init__(self, message: str, wrong: str, right: str | None, help: str = "") -> None:
        hint = f" Did you mean:\n  {right}" if right else ""
        super().__init__("\n".join(filter(None, [f"{message}{hint}", help])))
        self.wrong, self.right = wrong, right


def load(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    nested: Mapping[str, Any] | None = None,
) -> Config:
    """The checked configuration of a recipe with overrides.

    ``recipe`` is a recipe's name, or the path of a run folder or of a ``.yaml`` file like a run's
    ``config.yaml``. ``overrides`` are ``key=value``, ``--key=value`` or ``--key value``; a group is
    replaced as a whole by ``model=slm_tiny``. ``nested`` gives values as Python objects:
    ``{"optim": {"learning_rate": 1e-3}}``. Later ones win.

    Raises ConfigError for an unknown recipe or key, a wrong type, a value out of range or an
    impossible shape; each names the key and proposes the nearest valid line.
    """
    groups: dict[str, Any] = {}
    values: dict[str, Any] = {}
    given = documents.translate(join_options(overrides))
    for key, value in [*map(split_override, given), *flatten(nested or {})]:
        (groups if key in group_choices() else values)[key] = value
    for group, choice in groups.items():
        if choice not in group_choices()[group]:
            line = nearest_word(str(choice), group_choices()[group])
            raise Misspelt(
                f"There is no {group}={choice}.",
                f"{group}={choice}",
                f"{group}={line}" if line else None,
                f"Choices of {group}: {', '.join(group_choices()[group])}.",
            )
    if str(recipe) in recipe_names():
        tree = compose(str(recipe), groups, values)
    else:
        tree = read_tree(recipe)
        if groups:
            raise ConfigError(
                f"{recipe} is a complete configuration, so {next(iter(groups))}=... cannot choose "
                "another part. Override single keys, or start from a recipe: "
                f"{', '.join(recipe_names())}."
            )
    if os.environ.get("DISABLE_COMPILE", "0").lower() not in ("", "0", "false"):
        tree.setdefault("training", {})["compile"] = "off"
    for key, value in values.items():
        set_key(tree, key, value)
    return check(tree)


def load_run(run: str | os.PathLike[str]) -> Config:
    """The configuration a run was started with, identical to the one that was saved."""
    return check(read_tree(run))


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write every key with its value as YAML, such that ``load_run`` gives the same Config."""
    tree = config.model_dump(mode="json")
    write_text(Path(path), yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def recipe_names() -> list[str]:
    families = ["slm", "instruct", "puzzle", "pretrain", "distill"]
    sizes = ["nano", "tiny", "small", "medium", "large"]

    def place(name: str) -> tuple[int, int, str]:
        first, last = name.split("_")[0], name.split("_")[-1]
        return (
            families.index(first) if first in families else len(families),
            sizes.index(last) if last in sizes else len(sizes),
            name,
        )

    return sorted((file.stem for file in (CONF / "recipe").glob("*.yaml")), key=place)


def recipe_summary(name: str) -> str:
    """What a recipe says of itself: the first plain comment of its file."""
    for line in (CONF / "recipe" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""


def group_choices() -> dict[str, list[str]]:
    """The groups a recipe is put together from, each with the names it can have."""
    folders = (folder for folder in sorted(CONF.iterdir()) if folder.is_dir())
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in folders
        if folder.name != "recipe"
    }


def join_options(arguments: Sequence[str]) -> Iterator[str]:
    """Turn ``--key value`` and ``--key=value`` into ``key=value``; ``--some-key`` is some_key."""
    rest = [*arguments]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            yield argument
            continue
        name, equals, value = argument[2:].partition("=")
        key, complete = documents.option(name, rest[0] if rest and not equals else None)
        if not equals and complete:
            value = "true"
        elif not equals:
            if not rest:
                raise ConfigError(f"{argument} needs a value: {key}=VALUE.")
            value = rest.pop(0)
        yield f"{key}={value}"


def split_override(override: str) -> tuple[str, Any]:
    """``key=value`` as the key and its value, read by Hydra's grammar unless the key holds text."""
    key, equals, text = override.partition("=")
    key = key.lstrip("+").strip()
    if not equals:
        right = f"{key}=VALUE" if key in keys() else None
        raise Misspelt(
            f"{override!r} is not an override; overrides have the form key=value.",
            override,
            right,
            "All keys: thimble explain",
        )
    check_key(key, text)
    if key not in keys():
        return key, text
    if is_text(keys()[key]):
        if text == "null" and not choices_of(keys()[key]) and keys()[key].default is None:
            return key, None
        return key, text[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text) else text
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise ConfigError(f"{override!r} cannot be read: {error}. Quote texts.") from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{override} gives several values; a run takes one, or a list: [a,b].")
    return key, parsed.value()


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings, each key checked."""
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{key}.")
        else:
            check_key(key, value)
            yield key, value


def check_key(key: str, value: Any) -> None:
    known = keys()
    if key in known or key in group_choices():
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise ConfigError(f"{key} is a group of keys. Set one of them:\n  " + "\n  ".join(inside))
    theirs = [*documents.NAMES, *documents.SWITCHES]
    # Ours first, so that nobody is sent to a document's name for what has one here.
    right = nearest_key(key, [*known, *group_choices()]) or nearest_key(key, theirs)
    raise Misspelt(
        f"There is no key {key}.",
        f"{key}={value}",
        f"{right}={value}" if right else None,
        "All keys: thimble explain",
    )


def compose(recipe: str, groups: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's tree of plain values, with groups replaced and interpolations resolved.

    Numbers among ``values`` are set before that, so that what a recipe derives from them follows:
    ``data.path`` from ``model.vocab_size``, the window from the context.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    # A program that uses Hydra itself has one initialized; it is put aside and back.
    instance = GlobalHydra.instance()
    theirs, instance.hydra = instance.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(
                f"recipe/{recipe}", [f"{group}={choice}" for group, choice in groups.items()]
            )
    finally:
        GlobalHydra.instance().hydra = theirs
    for key, value in values.items():
        if isinstance(value, int | float):
            OmegaConf.update(composed, key, value, force_add=True)
    tree = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree of a run folder's ``config.yaml``, or of any complete ``.yaml`` file."""
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
        if not file.is_file():
            raise DataError(f"{path} is not a run: it has no {CONFIG_FILE}.")
    elif not file.is_file():
        name = str(path)
        if "/" in name or name.endswith((".yaml", ".yml")):
            raise DataError(f"There is no configuration at {path}.")
        raise Misspelt(
            f"There is no recipe {name}.",
            name,
            nearest_word(name, recipe_names()),
            f"Recipes: {', '.join(recipe_names())}.",
        )

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not readable YAML: {error}") from error
    if not isinstance(tree, dict):
        raise DataError(f"{file} holds no configuration (key: value lines).")
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{group}={tree} is not a group of keys, so {key} has no place.")
    tree[name] = value


def check(tree: Mapping[str, Any]) -> Config:
    """Validate a tree of plain values; raises ConfigError with one line for each problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(details, tree) for details in error.errors(include_url=False)]
    raise ConfigError("\n".join(problems))


def _problem(details: Any, tree: Mapping[str, Any]) -> str:
    """One of pydantic's findings in our words: the key, the value, what it must be."""
    key = ".".join(part for part in details["loc"] if isinstance(part, str))
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    field = keys().get(key)
    if kind == "extra_forbidden":
        right = nearest_key(key, keys())
        hint = f" Did you mean:\n  {right}={as_override(details['input'])}" if right else ""
        return f"There is no key {key}.{hint}"
    if kind == "missing":
        wanted = f" Give it: {key}=<{describe_type(field)}>" if field else ""
        return f"{key} is missing.{wanted}"
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    if field is None:
        return f"{key}={as_override(value)} is not a group of keys."
    if kind == "string_pattern_mismatch":  # the description lists the forms in words
        return f"{key}={value} is not possible; it must be {field.description}"
    allowed = ", ".join(filter(None, [describe_type(field), describe_range(field)]))
    message = f"{key}={as_override(value)} is not possible; it must be {allowed}."
    limit = context.get("ge", context.get("le"))
    choice = nearest_word(str(value), choices_of(field)) if choices_of(field) else None
    if limit is not None and not isinstance(value, list):
        message += f" The nearest that fits:\n  {key}={as_override(limit)}"
    elif choice:
        message += f" Did you mean:\n  {key}={choice}"
    return message

"""What may be asked of a recursive checkpoint, and on which data it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.config import load as configuration
from thimble.config.documents import translate
from thimble.config.schema import Config
from thimble.errors import ConfigError, DataError
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training.data import ready

# Keys of the checkpoint's configuration that can be others when it is evaluated.
KEYS = (
    *(f"dataset.{name}" for name in ("name", "data_dir", "subset_size", "seq_len", "test_ratio")),
    *(f"dataset.{name}" for name in ("val_ratio", "tokenizer_path", "template", "system_message")),
    *("dataset.seed", "dataset.dataloader_workers"),
    *("data.path", "model.halt_max_steps", "arch.halt_max_steps"),
)


@dataclass(frozen=True)
class Request:
    """What is asked beside checkpoint, split and device.

    ``subset_size``, or ``max_batches`` of ``batch_size``, bounds the examples; ``save_outputs``
    names tensors of ``row_scores.KEPT``, written into ``output_dir`` (default: the checkpoint).
    ``overrides`` change ``KEYS``, and ``data_dir``, ``tokenizer_path``, ``seq_len`` are short for
    those of dataset.
    """

    subset_size: int | None = None
    batch_size: int | None = None
    max_batches: int | None = None
    save_outputs: Sequence[str] = ()
    output_dir: str | Path | None = None
    data_dir: str | Path | None = None
    tokenizer_path: str | Path | None = None
    seq_len: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """All overrides, under their own names. Raises ConfigError for any but ``KEYS``."""
        if unknown := [key for key in self.overrides if key not in KEYS]:
            raise ConfigError(
                f"{unknown[0]} cannot be changed of a model that is trained. When one is evaluated "
                f"these can: {', '.join(KEYS)}."
            )
        lines = translate(f"{key}={value}" for key, value in self.overrides.items())
        given = dict(line.partition("=")[::2] for line in lines)
        for name in ("data_dir", "tokenizer_path", "seq_len"):
            if (value := getattr(self, name)) is not None:
                given[f"dataset.{name}"] = str(value)
        return given


def data_folder(directory: Path, trained: Config | None, settings: Mapping[str, str]) -> Path:
    """Where the data of an evaluation are: those of the run, or others, tokenized if need be.

    Raises DataError when the run's data were built again since, or its tokenizer is another one.
    """
    path = settings.get("dataset.tokenizer_path")
    if path and load_tokenizer(path).fingerprint != load_tokenizer(directory).fingerprint:
        raise DataError(
            f"{path} is not the tokenizer that {directory} was trained with. The checkpoint holds "
            "its own; leave --tokenizer-path out."
        )
    if "data.path" in settings:
        fingerprint(folder := Path(settings["data.path"]))
        return folder
    if trained is None:
        raise ConfigError(
            f"{directory} does not say what it was trained on. Name data of its tokenizer:\n"
            f"  thimble evaluate {directory} --overrides data.path=data/conversations/..."
        )
    tree = trained.model_dump(mode="python")
    of_dataset = [key for key in settings if key.startswith("dataset.")]
    for key in of_dataset:
        configuration.set_key(tree, *configuration.split_override(f"{key}={settings[key]}"))
    passing = {"tokenizer_path", "dataloader_workers"}  # these change no token
    before = trained.dataset.model_dump(exclude=passing)
    after = {key: value for key, value in tree["dataset"].items() if key not in passing}
    if after == before and trained.data.path is not None:
        folder = Path(trained.data.path)
        if fingerprint(folder) != fingerprint_of_run(directory):
            raise DataError(
                f"{folder} is not what {directory} was trained on: it was built again since, and "
                "what is held out now may have been trained on. Train again, or put the former "
                "data back."
            )
        return folder
    dataset = tree["dataset"]
    if dataset["name"] is None:
        raise ConfigError(
            f"{directory} was trained on {trained.data.path}, which no dataset.name made, so "
            f"{of_dataset[0]} has nothing to change. Name the conversations, too (dataset.name=), "
            "or a folder of data (data.path=)."
        )
    context = trained.model.max_position_embeddings
    if dataset["seq_len"] > context:
        raise ConfigError(
            f"dataset.seq_len={dataset['seq_len']} is more than the model sees. Use:\n"
            f"  dataset.seq_len={context}"
        )
    dataset["tokenizer_path"] = str(directory)
    tree["training"]["sequence_length"] = dataset["seq_len"]
    tree["data"]["path"] = None
    return Path(ready(configuration.check(tree)).data.folder)


def fingerprint(folder: Path) -> str:
    """What identifies data; DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"There are no data at {folder}. Name others: --overrides data.path=FOLDER")
    manifest = read_object(folder / artifacts.MANIFEST)
    if manifest:
        return str(manifest.get("fingerprint"))
    from thimble.puzzles.loader import Split

    return Split(folder, "train").fingerprint


def fingerprint_of_run(directory: Path) -> str | None:
    """What a checkpoint notes of the data it was trained on."""
    return read_object(directory / artifacts.MANIFEST).get("inputs", {}).get("tokens")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    return artifacts.read_json(path) if path.is_file() else {}

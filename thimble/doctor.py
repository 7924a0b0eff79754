"""What this machine is and has: a text to paste where one asks for help."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from thimble.console import unlogged

if TYPE_CHECKING:
    from rich.console import Console

# What each extra of the distribution brings: the module that must load.
EXTRAS = {
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "teacher": ("peft",),
    "gguf": ("gguf", "llama_cpp"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "quantize": ("neural_compressor", "compressed_tensors"),
    "sweep": ("submitit", "joblib", "optuna"),
    "eval": ("lm_eval",),
    "gpu": ("fla",),
    "bench": ("datasets", "accelerate"),
}
PACKAGES = ("torch", "transformers", "tokenizers", "datatrove", "hydra-core", "pydantic", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DISABLE_COMPILE", "HF_HUB_OFFLINE",
             "HF_HOME", "HF_ENDPOINT", "WANDB_MODE", "THIMBLE_HOME")  # fmt: skip
GIB = 2**30
SECONDS = 3.0  # that the hub has to answer
LITTLE_DISK, LITTLE_MEMORY = 5 * GIB, 2 * GIB


@dataclass(frozen=True)
class Diagnosis:
    """``facts`` as they are, ``problems`` as sentences that say what to do."""

    facts: dict[str, Any]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "problems": self.problems}

    def render(self, console: Console) -> None:
        """Plain lines, so that a pasted copy reads like the original."""
        for heading, values in self.facts.items():
            if not isinstance(values, Mapping):
                print(f"{heading}: {values}")
                continue
            print(f"{heading}:")
            for name, value in values.items():
                print(f"  {name}: {'not set' if value is None else value}")
        print("problems:" if self.problems else "problems: none found")
        for problem in self.problems:
            print(f"  - {problem}")


def diagnose() -> Diagnosis:
    """Look at versions, devices, memory, disk, network and extras; changes nothing."""
    problems: list[str] = []
    facts: dict[str, Any] = {
        "thimble": metadata.version("thimble-lm"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(problems),
        "memory and disk": _space(problems),
        "network": _network(),
        "extras": {name: _extra(modules) for name, modules in EXTRAS.items()},
        "programs": {name: shutil.which(name) or "not found" for name in ("g++", "apt-get", "git")},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }
    return Diagnosis(facts, problems)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices(problems: list[str]) -> dict[str, str]:
    import torch

    from thimble.training import devices

    cpu = torch.device("cpu")
    found = {"cpu": f"{devices.describe(cpu)}, {_precision(cpu)}"}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, compute {properties.major}.{properties.minor}, "
            f"{total / GIB:.0f} GiB ({free / GIB:.0f} free), {_precision(device)}"
        )
    if torch.backends.mps.is_available():
        found["mps"] = f"Apple GPU, {_precision(torch.device('mps'))}"
    found["torch was built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        problems.append(
            "There is an NVIDIA driver, and torch sees no GPU. This torch was built for "
            f"{found['torch was built for']}: install a build for the CUDA of your driver."
        )
    return found


def _precision(device: Any) -> str:
    from thimble.training.devices import resolve_precision

    return f"precision=auto is {str(resolve_precision('auto', device)).removeprefix('torch.')}"


def _space(problems: list[str]) -> dict[str, str]:
    import psutil

    from thimble.corpora.sources.debian import cache_folder

    memory = psutil.virtual_memory()
    found = {"memory": f"{memory.total / GIB:.1f} GiB ({memory.available / GIB:.1f} free)"}
    if memory.available < LITTLE_MEMORY:
        problems.append(
            f"Only {memory.available / GIB:.1f} GiB of memory are free. Close other programs, or "
            "train with training.micro_batch_size=1."
        )
    for name, folder in (("here", Path.cwd()), ("cache", cache_folder())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found[f"disk, {name}"] = f"{free / GIB:.1f} GiB free ({folder})"
        if free < LITTLE_DISK:
            problems.append(
                f"Only {free / GIB:.1f} GiB are free in {folder}: a full corpus and a run of "
                "slm_tiny take about 5."
            )
        if not os.access(existing, os.W_OK):
            problems.append(f"{existing} cannot be written to.")
    return found


def _network() -> dict[str, str]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return {"hub": "not asked: HF_HUB_OFFLINE is set"}
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((str(address.hostname), port), timeout=SECONDS).close()
    except OSError as error:
        return {"hub": f"{address.hostname} cannot be reached ({error}); local files work"}
    return {"hub": f"{address.hostname} can be reached"}


def _extra(modules: tuple[str, ...]) -> str:
    states = []
    for module in modules:
        try:
            with unlogged():
                loaded = importlib.import_module(module)
            states.append(f"{module} {getattr(loaded, '__version__', '')}".strip())
        except ModuleNotFoundError:
            states.append(f"{module} not installed")
        except Exception as error:  # a broken install is what this command is there to find
            line = (str(error).splitlines() or [""])[0]
            states.append(f"{module} does not load: {type(error).__name__}: {line[:120]}")
    return ", ".join(states)

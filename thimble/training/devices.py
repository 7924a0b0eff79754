"""Which device and precision a run uses, and what the device tells about itself."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from thimble.errors import EnvironmentProblem

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; a named device that is absent is refused.

    Under torchrun ``auto`` and ``cuda`` mean this process's own GPU.
    """
    import os

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    local = os.environ.get("LOCAL_RANK", "0")
    if name == "auto":
        best = f"cuda:{local}" if torch.cuda.is_available() else found[-1]
        return torch.device(best if best in found else found[-1])
    wanted = f"cuda:{local}" if name == "cuda" else name
    if wanted not in found:
        raise EnvironmentProblem(
            f"There is no device {name} here. torch {torch.__version__} sees: {', '.join(found)}. "
            "Use device=auto, or install a torch build for your GPU."
        )
    return torch.device(wanted)


def send(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Arrays as tensors on the device; a GPU is not waited for."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if name != "auto":
        dtype = PRECISIONS[name]
        if device.type == "cuda" and dtype is torch.bfloat16 and not _cuda_bfloat16(device):
            raise EnvironmentProblem(
                f"{torch.cuda.get_device_name(device)} has no bfloat16. Use precision=float16."
            )
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if _cuda_bfloat16(device) else torch.float16
    if device.type == "cpu" and _cpu_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cuda_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products (AVX512-BF16 or AMX); elsewhere they are emulated."""
    try:
        flags = open("/proc/cpuinfo", encoding="ascii", errors="ignore").read()  # noqa: SIM115
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def memory_bytes(device: torch.device) -> int:
    """Peak bytes in use since ``reset_peak_memory``: allocated on a GPU, else the process's
    resident set (where only Linux can reset the peak)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    try:
        with open("/proc/self/status", encoding="ascii", errors="ignore") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Forget what was used before, so that ``memory_bytes`` is about what comes now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def available_memory(device: torch.device) -> int:
    """Bytes a run may fill: all of a GPU's memory, or what is free of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return psutil.virtual_memory().available


def describe(device: torch.device) -> str:
    """One line for manifests and panels: the device's name and, on a CPU, its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            model = next(
                (line.split(":", 1)[1].strip() for line in file if "model name" in line), ""
            )
    except OSError:
        pass
    return f"{model or 'CPU'}, {torch.get_num_threads()} threads"

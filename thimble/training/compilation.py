"""Whether torch.compile pays for itself."""

from __future__ import annotations

import shutil

import torch

from thimble.config.schema import Config
from thimble.models.causal_lm import CausalLM
from thimble.models.recursive import RecursiveLM

# On two CPU cores compiling makes steps of slm_nano a little faster, see
# benchmarks/results/train_cpu.md, and takes a while, so a run must be long enough to earn that back
# many times over. The FLOP a second are an assumption, of the right size for such a machine.
WORTH_SECONDS, CPU_FLOPS = 1200.0, 2e11


def should_compile(
    config: Config, model: CausalLM | RecursiveLM, max_steps: int, device: torch.device
) -> bool:
    """``auto``: on CUDA; on a CPU for long runs where a C++ compiler is there; never on MPS.

    The choice depends on the configuration alone, so that a resumed run makes the same.
    """
    training = config.training
    if training.compile != "auto":
        return training.compile == "on"
    if device.type == "cuda":
        return True
    if (
        device.type != "cpu"
        or isinstance(model, RecursiveLM)
        or not (shutil.which("g++") or shutil.which("clang++"))
    ):
        return False
    batch = training.micro_batch_size * training.gradient_accumulation_steps
    tokens = max_steps * batch * training.sequence_length
    return 6 * model.num_parameters() * tokens / CPU_FLOPS > WORTH_SECONDS

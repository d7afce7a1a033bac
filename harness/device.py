"""The device, attention backend and number type of a run; its memory and its clock."""

import contextlib
import sys
import time

import torch

import kernel
from harness.cli import UsageError, require


def check(device: str, backend: str | None, head_dim: int) -> None:
    """UsageError where this machine lacks the device, or where the backend cannot run there."""
    missing = device == "cuda" and not torch.cuda.is_available()
    require(not missing, "--device cuda: this machine has no usable CUDA device; take --device cpu")
    try:
        chosen = kernel.backend_for(device, backend)
    except ValueError as e:
        raise UsageError(f"--{e}") from e
    fits = chosen != "triton" or head_dim <= 128
    require(fits, f"--backend triton takes head dims up to 128, got {head_dim}; take --backend torch")


def precision(settings) -> contextlib.AbstractContextManager:
    """A context in which the model computes in the settings' dtype, with weights in float32."""
    if settings.dtype == "bfloat16":
        return torch.autocast(settings.device, torch.bfloat16)
    return contextlib.nullcontext()


def peak_memory(device: str) -> int | None:
    """Most bytes that this process has held, of the CUDA device's memory or of the machine's; None on Windows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # here, because Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Times the parts of a step: each `lap` ends a part, and `seconds` holds all of them."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.device == "cuda":  # wait until the device has finished its work
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, part: str) -> None:
        now = self.now()
        self.seconds[f"seconds_{part}"] = now - self.last
        self.last = now

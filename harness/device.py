"""Where a run computes: the device and the attention backend, checked before anything is computed; and its clock."""

import contextlib
import sys
import time

import torch

import kernel
from harness.cli import UsageError, require

try:
    import resource
except ImportError:  # on Windows
    resource = None


def default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_bfloat16(device: str) -> bool:
    """Whether the device has tensor cores for bfloat16: CUDA from compute capability 8.0 on."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check(device: str, backend: str | None, head_dim: int) -> None:
    """UsageError where this machine lacks the device, or the backend cannot run on it or on heads of this size."""
    missing = device == "cuda" and not torch.cuda.is_available()
    require(not missing, "--device cuda: this machine has no usable CUDA device; take --device cpu")
    try:
        chosen = kernel.backend_for(device, backend)
    except ValueError as e:
        raise UsageError(f"--{e}") from e
    fits = chosen != "triton" or head_dim <= 128
    require(fits, f"--backend triton takes head dims up to 128, got {head_dim}")


def precision(settings) -> contextlib.AbstractContextManager:
    """A context in which the model computes in the settings' dtype, from weights in float32."""
    if settings.dtype == "bfloat16":
        return torch.autocast(settings.device, torch.bfloat16)
    return contextlib.nullcontext()


def peak_memory(device: str) -> int | None:
    """Most bytes that this process has held: of the CUDA device's memory, or of the machine's; None on Windows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def out_of_memory(error: BaseException | None) -> bool:
    """Is this how Python, or torch on any device, says that memory has run out?"""
    said = "can't allocate memory", "out of memory", "not enough memory", "bad_alloc"
    of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    return isinstance(error, MemoryError) or of_torch


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Times the parts of a step: `lap` ends one, `seconds` holds them all."""

    def __init__(self, device: str):
        self.device = device
        self.last = clock(device)
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = clock(self.device)
        self.seconds[f"seconds_{part}"] = now - self.last
        self.last = now

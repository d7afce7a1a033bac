"""Files that are written whole or not at all, and checkpoints whose damage is noticed."""

import contextlib
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness import report
from harness.cli import UsageError, in_short, require

INTACT = 0x2144DF1C  # the CRC-32 of anything that ends with its own CRC-32


def write(path: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Write a file such that, whenever the process dies, the old one or the new one is there whole.

    content: a text, or a function that writes into an open file. UsageError where the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # another process may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as f:
            if isinstance(content, str):
                f.write(content.encode())
            else:
                content(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides the disk's error behind its own
        if not isinstance(cause, OSError):
            raise
        raise UsageError(f"{path} cannot be written: {cause.strerror}; make room or choose another folder") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def crc32(f: BinaryIO) -> int:
    """The checksum of a whole file."""
    f.seek(0)
    crc = 0
    while block := f.read(2**20):
        crc = zlib.crc32(block, crc)
    return crc


def save(path: Path, state: dict) -> None:
    """Write a checkpoint and, at its end, its CRC-32; FloatingPointError where something in it is not finite."""
    tensors = [value for value in tree_leaves(state) if isinstance(value, Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError("the weights, or the optimizer's moments, are not finite")

    report.heartbeat(f"writing {path}")

    def content(f: BinaryIO) -> None:
        torch.save(state, f)
        f.write(crc32(f).to_bytes(4, "little"))

    write(path, content)


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load the weights of a checkpoint and, of a run, its optimizer; what else it holds. UsageError if damaged."""
    try:
        with open(path, "rb") as f:
            require(crc32(f) == INTACT, "its checksum is wrong")
        state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(state.pop("weights"))
        if optimizer is not None:
            optimizer.load_state_dict(state.pop("optimizer"))
        return state
    except Exception as e:  # there are many ways to be damaged
        raise UsageError(f"{path} is missing or damaged ({in_short(e)}); delete it to begin anew") from e

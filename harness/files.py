"""Files that are written completely or not at all, and checkpoints whose damage is noticed."""

import contextlib
import os
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness.cli import UsageError, in_short, out_of_memory, require


def write(path: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Write a file atomically: if the process dies, the old file or the new one is there, complete.

    content: a text, or a function that writes into an open file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # another process may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode())
            else:
                content(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        # torch.save replaces the error of a full disk by its own
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path: Path, state: dict) -> None:
    """Write a checkpoint; FloatingPointError if a tensor in it is not finite."""
    tensors = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
    if not all(x.isfinite().all() for x in tensors):
        raise FloatingPointError("the weights, or the optimizer's moments, are not finite")
    write(path, lambda f: torch.save(state, f))


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load a checkpoint's weights and, if given, the optimizer; return its other entries. UsageError if damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip file with checksums, which torch.load ignores
            require(file.testzip() is None, "a checksum is wrong")
        state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(state.pop("weights"))
        if optimizer is not None:
            optimizer.load_state_dict(state.pop("optimizer"))
        return state
    except Exception as e:  # a damaged file raises many types of errors
        if out_of_memory(e):
            raise
        raise UsageError(f"{path} is missing or damaged ({in_short(e)}); delete a damaged file to start again") from e

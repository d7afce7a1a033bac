"""Several processes train as one: `torchrun` starts them, and each takes its share of the prompts.

A group's advantages need the samples of one prompt only, so each process keeps its rollouts. The processes share a few
sums (`smd.Runtime.all_sum`) and the gradients. All start from the same weights and apply the same summed gradient, so
weights are never sent. In a single process, nothing here has an effect.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from harness.cli import UsageError, require

NAMES = "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun; schedulers such as SLURM set some of NAMES, too
COUNT, RANK, LOCAL_COUNT, LOCAL_RANK = (int(os.environ[name]) for name in NAMES) if LAUNCHED else (1, 0, 1, 0)


def begin(device: str) -> None:
    """Join the process group, each process with its own device."""
    if COUNT == 1 or dist.is_initialized():
        return
    if device == "cuda":
        found = torch.cuda.device_count()
        advice = f"--nproc-per-node must be at most the {found} CUDA devices here; or take --device cpu"
        require(found >= LOCAL_COUNT, advice)
        torch.cuda.set_device(LOCAL_RANK)
    # the other processes wait while the first makes the base policy
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    atexit.register(dist.destroy_process_group)  # the group's threads must end before Python does


def say(text: str) -> None:
    """Print, in the first process."""
    if RANK == 0:
        print(text, flush=True)


def share(count: int) -> slice:
    """This process's share of `count` items."""
    return slice(count * RANK // COUNT, count * (RANK + 1) // COUNT)


def all_sum(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if COUNT > 1:
        for x in tensors:
            dist.all_reduce(x.detach())


def gather(x) -> list:
    """The x of each process, in the order of the ranks."""
    found = [x] * COUNT
    if COUNT > 1:
        dist.all_gather_object(found, x)
    return found


def raise_on_all_ranks(f: Callable, *args):
    """f(*args); if one process raises an error because of its input or of its numbers, all processes raise it."""
    if COUNT == 1:
        return f(*args)
    result = error = None
    try:
        result = f(*args)
    except (UsageError, FloatingPointError) as e:
        error = e
    except OSError as e:  # not all of these can be sent to another process
        error = UsageError(str(e))
    for raised in gather(error):
        if raised is not None:
            raise raised
    return result


def on_rank0(f: Callable, *args):
    """Call f(*args) in the first process only; all processes return or raise what it returns or raises."""
    return gather(raise_on_all_ranks(f if RANK == 0 else lambda *_: None, *args))[0]

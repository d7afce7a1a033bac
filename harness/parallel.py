"""Several processes that train as one: `torchrun` starts them, and each takes its share of the prompts.

A group's advantages need the samples of one prompt only, so rollouts stay where they were drawn. What the processes
share are a few sums (`smd.Runtime.all_sum`) and the gradients. All begin with the same weights and apply the same
summed gradient, so no weights are ever sent. With a single process, nothing here does anything.
"""

import atexit
import itertools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from harness.cli import Ended, UsageError, require

# torchrun tells each process how many there are and which it is, in all and on this machine
TOLD = "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"


def told_by_torchrun(environment: Mapping[str, str]) -> list[int]:
    """The numbers TOLD; those of a single process where some are missing, because a scheduler set the others."""
    told = [environment.get(name, "") for name in TOLD]
    complete = all(number.isdecimal() for number in told) and "MASTER_ADDR" in environment
    return [int(number) for number in told] if complete else [1, 0, 1, 0]


COUNT, RANK, LOCAL_COUNT, LOCAL_RANK = told_by_torchrun(os.environ)
TIMEOUT = timedelta(days=1)  # the other processes wait while the first makes the base policy
REACHED = (UsageError, FloatingPointError)  # errors that every process raises if one does


def check(settings) -> None:
    """UsageError where so many processes cannot share what the settings ask for."""
    if COUNT == 1:
        return
    shares = f"{COUNT} processes take equal shares of the prompts of an update"
    require(settings.prompts % COUNT == 0, f"{shares}, got --prompts {settings.prompts}")
    require(settings.prompt is None, "--prompt is answered by a single process; leave torchrun out")
    if settings.device == "cuda":
        has = torch.cuda.device_count()
        advice = f"give torchrun --nproc-per-node {has}, or --device cpu" if has else "take --device cpu"
        require(has >= LOCAL_COUNT, f"{LOCAL_COUNT} processes need as many CUDA devices, and here are {has}; {advice}")


def begin(device: str) -> None:
    """Join the process group. From here on this process has a device of its own, and ends when torchrun ends it."""
    if COUNT == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    signal.signal(signal.SIGTERM, told_to_end)
    exchange(dist.init_process_group, "nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)  # the group's threads must not outlive Python


def told_to_end(*_) -> None:
    raise Ended("told to end by a signal, as all processes are when one has died")


def exchange(collective: Callable, *args, **options) -> None:
    """Call a collective function; `Ended` where another process has died."""
    try:
        collective(*args, **options)
    except RuntimeError as e:  # gloo has no type of its own for it
        reason = str(e).splitlines()[0]
        raise Ended(f"another process of this run cannot be reached ({reason})") from e


def say(text: str) -> None:
    """Print, in the first process."""
    if RANK == 0:
        print(text, flush=True)


def share(count: int) -> slice:
    """Which of so many things this process takes."""
    return slice(count * RANK // COUNT, count * (RANK + 1) // COUNT)


def all_sum(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all processes, in place: one call for all tensors of a type."""
    if COUNT == 1:
        return
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        same = [x for x in tensors if x.dtype == dtype]
        row = torch.cat([x.detach().flatten() for x in same])
        exchange(dist.all_reduce, row)
        for x, total in zip(same, row.split([x.numel() for x in same]), strict=True):
            x.detach().copy_(total.view_as(x))


def of_each(x) -> list:
    """The x of each process, in the order of the ranks."""
    if COUNT == 1:
        return [x]
    found = [None] * COUNT
    exchange(dist.all_gather_object, found, x)
    return found


def joined(items: list) -> list:
    """The lists of all processes as one."""
    return list(itertools.chain(*of_each(items)))


def raise_on_all_ranks(f: Callable, *args, **options):
    """f(...); an error because of its input, or of numbers, is raised in every process if one raises it."""
    result = error = None
    try:
        result = f(*args, **options)
    except REACHED as e:
        error = e
    for raised in of_each(error):
        if raised is not None:
            raise raised
    return result


def on_rank0(f: Callable, *args):
    """What f returns or raises in the first process, which alone calls it: the same in all."""
    result = raise_on_all_ranks(f, *args) if RANK == 0 else raise_on_all_ranks(lambda: None)
    return of_each(result)[0]

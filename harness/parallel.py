"""Several processes that train as one: `torchrun` starts them, and each takes its share of the prompts.

A step's rollouts are put together, so that advantages, weights and figures are those of the whole batch. Then each
process differentiates its share of the loss, divided by the whole batch's numbers, and the gradients are added up: once
an update, in one call. All begin with the same weights and follow the same sums, so that no weights are ever sent.

DistributedDataParallel would add gradients piece by piece while the backward pass still runs, which pays where moving
them takes long. Here sampling takes long, and what is needed is a sum, where that takes a mean.

With a single process, nothing here does anything.
"""

import atexit
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

# torch imports it at some time, and it keeps the group that it then finds: here there is none yet
import torch.distributed.nn
from torch import Tensor, nn

from harness.cli import Ended, UsageError, require

# torchrun tells each process how many there are and which it is, in all and on this machine
TOLD = "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"


def told_by_torchrun(environment: Mapping[str, str]) -> list[int]:
    """The numbers TOLD; those of a single process where some are missing, as where a scheduler set the others."""
    told = [environment.get(name, "") for name in TOLD]
    whole = all(number.isdecimal() for number in told) and "MASTER_ADDR" in environment
    return [int(number) for number in told] if whole else [1, 0, 1, 0]


COUNT, RANK, LOCAL_COUNT, LOCAL_RANK = told_by_torchrun(os.environ)
PATIENCE = timedelta(days=1)  # for one another: the first makes the base policy alone


def check(settings) -> None:
    """UsageError where so many processes cannot share what the settings ask for."""
    if COUNT == 1:
        return
    prompts = settings.prompts // settings.minibatches
    shares = f"{COUNT} processes take equal shares of the prompts of an update"
    require(prompts % COUNT == 0, f"{shares}, got --prompts {settings.prompts}, which gives it {prompts}")
    require(settings.prompt is None, "--prompt is answered by a single process; leave torchrun out")
    if settings.device == "cuda":
        has = torch.cuda.device_count()
        advice = f"give torchrun --nproc-per-node {has}, or --device cpu" if has else "take --device cpu"
        require(has >= LOCAL_COUNT, f"{LOCAL_COUNT} processes need as many CUDA devices, and here are {has}; {advice}")


def begin(device: str) -> None:
    """Meet the others. From here on this process has a device of its own, and ends when torchrun says so."""
    if COUNT == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    signal.signal(signal.SIGTERM, told_to_end)
    with_others(dist.init_process_group, "nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)  # however it ends: the group's threads must not outlive Python


def told_to_end(*_) -> None:
    raise Ended("told to end by a signal, as all processes are when one has died")


def with_others(exchange: Callable, *args, **options) -> None:
    """Exchange something with the other processes; `Ended` where one of them has died."""
    try:
        exchange(*args, **options)
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


def share_of(x_N: Tensor) -> Tensor:
    """Which rows of a tensor this process takes."""
    return torch.arange(len(x_N), device=x_N.device)[share(len(x_N))]


def of_each(x) -> list:
    """The x of each process, in their order. No process goes on before all have come here."""
    if COUNT == 1:
        return [x]
    found = [None] * COUNT
    with_others(dist.all_gather_object, found, x)
    return found


def listed(items: list) -> list:
    """The items of all processes in one list."""
    return list(itertools.chain(*of_each(items)))


def agreed(f: Callable, *args):
    """What f returns in this process; what it raises because of its input, or of numbers, is raised in all."""
    result = error = None
    try:
        result = f(*args)
    except (UsageError, FloatingPointError) as e:
        error = e
    for raised in of_each(error):
        if raised is not None:
            raise raised
    return result


def by_first(f: Callable, *args):
    """What f returns, or raises, in the first process, which alone calls it: the same in all."""
    result = agreed(f, *args) if RANK == 0 else agreed(lambda: None)
    return of_each(result)[0]


def joined(x: Tensor, dim: int = 0) -> Tensor:
    """The x of all processes, of one shape, along this dimension."""
    if COUNT == 1:
        return x
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(COUNT)]
    with_others(dist.all_gather, found, x.contiguous())
    return torch.cat(found, dim)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the sum of their gradients."""
    if COUNT == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    row = torch.cat([gradient.flatten() for gradient in gradients])
    with_others(dist.all_reduce, row)
    for gradient, total in zip(gradients, row.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))

"""Random streams named by what they are for: (seed, purpose, step) decides every draw, and nothing else does.

So a run that is resumed needs no generator's state, and two methods with the same seed see the same prompts. What the
sampler draws for a prompt depends on that prompt's key alone: not on its batch, its process or its device.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WARMUP, PROMPTS, SAMPLING, EVALUATION = range(4)


def numpy_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_stream(device: str, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(numpy_stream(*key).integers(2**62)))


def hashed(*key: int | Tensor) -> Tensor:
    """A hash of each key by SplitMix64 (Steele, Lea and Flood 2014), in integers, which are equal on every device.

    key: numbers and int64 tensors that are broadcast together, the last of them a tensor.
    """
    x = torch.zeros((), dtype=torch.int64, device=key[-1].device)
    for part in key:
        x = x + part + (0x9E3779B97F4A7C15 - 2**64)
        x = (x ^ unsigned_shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
        x = (x ^ unsigned_shift(x, 27)) * (0x94D049BB133111EB - 2**64)
        x = x ^ unsigned_shift(x, 31)
    return x


def unsigned_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def uniform(*key: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each key as in `hashed`.

    They have 52 bits, so that their product with any number is below that number after rounding, too.
    """
    return unsigned_shift(hashed(*key), 12).double() * 2**-52


def keyed(key_N: Tensor, samples: int) -> Callable[..., Tensor]:
    """`uniform` as `smd.sample` takes it, for prompts with these keys: no draw depends on the batch or the process."""
    key_B = hashed(key_N[:, None], torch.arange(samples, device=key_N.device)).flatten()
    key_X = torch.cat((key_B, key_N))  # `smd.sample` numbers the prompts after the sequences
    return lambda *index: uniform(*index[:-1], key_X[index[-1]])

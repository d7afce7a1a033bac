"""Random streams: a key such as (seed, purpose, step) decides every draw.

A run that is resumed therefore needs no generator's state, and two methods with the same seed see the same prompts. The
sampler's draws for a prompt depend on the key of that prompt only, not on its batch, process or device.
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

    key: numbers and int64 tensors that are broadcast together; the last one is a tensor.
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
    """Uniform float64 numbers in [0, 1), one for each key of `hashed`.

    They have 52 bits, so that their product with any positive number is below that number, even after rounding.
    """
    return unsigned_shift(hashed(*key), 12).double() * 2**-52


def keyed(key_N: Tensor, samples: int) -> Callable[..., Tensor]:
    """`uniform` with the signature that `smd.sample` needs, for prompts with these keys."""
    key_B = hashed(key_N[:, None], torch.arange(samples, device=key_N.device)).flatten()
    key_X = torch.cat((key_B, key_N))  # `smd.sample` numbers the prompts after the sequences
    return lambda *index: uniform(*index[:-1], key_X[index[-1]])

"""Random streams named by what they are for: (seed, purpose, step) decides every draw, and nothing else does.

So a run that is resumed needs no generator's state, and two methods with the same seed see the same prompts. What the
sampler draws for a prompt depends on that prompt's key alone: not on its batch, its process or its device.
"""

import numpy as np
import torch
from torch import Tensor

WARMUP, PROMPTS, SAMPLING, EVALUATION, MINIBATCHES = range(5)


def numpy_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_stream(device: str, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(numpy_stream(*key).integers(2**62)))


def hashed(*key: int | Tensor) -> Tensor:
    """A number for each key: int64 tensors and numbers that are broadcast together, the last of them a tensor.

    One after the other they are mixed in by SplitMix64 (Steele, Lea and Flood 2014), in integers, which every device
    multiplies alike.
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

    Of 52 bits: so a multiple of any number is below that number, rounded too.
    """
    return unsigned_shift(hashed(*key), 12).double() * 2**-52


def drawn(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution passes each number: its inverse, so that p decides how often.

    In float64, because the sums of many small float32 numbers would be another on another device.
    """
    below_BV = logp_BV.double().exp().cumsum(dim=-1)
    token_B = torch.searchsorted(below_BV, uniform_B[:, None] * below_BV[:, -1:], right=True)[:, 0]
    # past the end is only what is not a number, and CUDA finds out later than it looks it up
    return token_B.clamp(max=logp_BV.shape[1] - 1)

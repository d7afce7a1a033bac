"""Random streams named by what they are for: (seed, purpose, step) decides every draw, and nothing else does.

So a run that is resumed needs no generator's state, and two methods with the same seed see the same prompts.
"""

import numpy as np
import torch

WARMUP, PROMPTS, SAMPLING, EVALUATION, MINIBATCHES = range(5)


def numpy_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_stream(device: str, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(numpy_stream(*key).integers(2**62)))

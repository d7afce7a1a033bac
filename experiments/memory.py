"""Bytes that the KV cache stores, and tokens a second, over the length of the responses: four caches of the toy model.

    python -m experiments.memory --tokens 256 512     without --tokens up to 16,384, which takes hours

8 samples of one prompt of 512 tokens. `bytes` is the most that the cache stored at once, its record of evictions
included. `formula_bytes` counts keys, values and the record, at most. The record is one integer per key, layer and kv
head (`mask_bytes_int`); a boolean mask that says the same has `mask_bytes_TxT`. Rows in the CSV file are not measured
again.
"""

import argparse
import dataclasses
import itertools
import math
import time
from pathlib import Path

from tqdm import tqdm

from experiments.bench import RUNTIMES, sample
from experiments.common import agent_of, command, read_csv, write_csv
from experiments.tables import RESULTS

PROMPT, SAMPLES = 512, 8
TOKENS = [256, 512, 1024, 2048, 4096, 8192, 16384]
CASES = [("dense per sample", "plain", None), ("dense sharing the prompt", "shared", None)]
CASES += [(f"compressed {version}", version, budget) for budget in (512, 1024) for version in ("plain", "shared")]


def measure(agent, version: str, budget: int | None, tokens: int) -> dict[str, float]:
    eviction = None if budget is None else dataclasses.replace(agent.eviction, budget=budget)
    began = time.perf_counter()
    rollout = sample(agent, RUNTIMES[version], eviction, 1, PROMPT, SAMPLES, tokens)
    seconds = time.perf_counter() - began
    kept = budget or math.inf  # keys of a sequence, to which the next ones are added until the next compression
    most = kept + agent.eviction.interval
    plain, shared = min(PROMPT + tokens, most) * SAMPLES, min(PROMPT, kept) + min(tokens, most) * SAMPLES
    record = rollout.evicted_at_LBGT
    keys_and_values = agent.entry_bytes * (plain if version == "plain" else shared)
    found = dict(bytes=rollout.stored_bytes, tokens_per_second=SAMPLES * tokens / seconds)
    found |= dict(formula_bytes=keys_and_values + record.nbytes)
    return found | dict(mask_bytes_TxT=record.numel() * record.shape[-1], mask_bytes_int=record.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="lengths of the responses")
    parser.add_argument("--out", type=Path, default=RESULTS / "saves.csv", help="CSV file that gets the rows")
    given = parser.parse_args()
    agent = agent_of(device="cpu")
    rows = read_csv(given.out) if given.out.exists() else []
    measure(agent, "shared", None, 2)  # the first call of a process is slower
    for tokens, (cache, version, budget) in tqdm(list(itertools.product(given.tokens, CASES))):
        settings = dict(cache=cache, budget=str(budget or ""), tokens=str(tokens))
        if not any(settings.items() <= row.items() for row in rows):
            rows.append(settings | measure(agent, version, budget, tokens))
            write_csv(given.out, rows)


if __name__ == "__main__":
    command(main)

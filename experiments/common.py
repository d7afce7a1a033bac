"""What the experiments share: runs that are kept and resumed, their figures as CSV, and tables."""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import smd
from harness import cli, files, report, train
from harness.agent import CACHES, Agent
from harness.settings import Settings

# Student's t for 95 %, by degrees of freedom; for more, 1.96 + 2.5 / n is within 1 %
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
CORES = os.cpu_count() or 1
DIAGNOSED = "kl_sparse_dense", "ess_sequence", "overlap_p05"
# the columns of a run that a table shows; its CSV file has more
SHOWN = ["sparse", "dense", "reward", "kl_sparse_dense", "kl_sparse_dense_last", "ess_sequence", "ess_sequence_last"]
SHOWN += ["overlap_p05", "overlap_p05_last", "stored_mb", "seconds", "peak_gb"]


def agent_of(**given) -> Agent:
    """Task, model and eviction of a run with these settings."""
    return Agent(train.checked(Settings(**given)))


def positive(text: str) -> int:
    """A number on a command line that must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def add_flags(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The flags of experiments with many runs."""
    parser.add_argument("--model", help="a pretrained model, as for a run")
    jobs = 1 if torch.cuda.is_available() else CORES
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"seeds, 0 and up (default: {seeds})")
    parser.add_argument("--jobs", type=positive, default=jobs, help=f"runs in parallel (default: {jobs})")


def run_all(out: Path, jobs: list[dict], workers: int, table: Path) -> list[dict]:
    """Train with each of these settings (None: the default), several runs at a time: a row for each run.

    The CSV file `table` gets the rows as the runs finish. The name of a run's folder holds its settings, so a finished
    run is found again. UsageError if a run fails, or if runs of one task and model begin with different base policies.
    """
    jobs = [{name: value for name, value in job.items() if value is not None} for job in jobs]
    folders = [out / "-".join(map(str, job.values())).replace(os.sep, "_").replace("%", "pct") for job in jobs]
    train_one = partial(run, threads=max(1, CORES // workers))
    rows = []
    with ThreadPoolExecutor(workers) as pool:
        for row in tqdm(pool.map(train_one, folders, jobs), total=len(jobs), desc=table.stem):
            rows.append(row)
            write_csv(table, rows)
    bases = {(row.get("model"), row.get("asked"), row["before_dense"]) for row in rows}
    same = len(bases) == len({base[:2] for base in bases})
    cli.require(same, f"the runs in {out} start from different base policies; delete them or move them away")
    return rows


def run(out: Path, job: dict, threads: int) -> dict:
    """Begin or resume a run, unless it is finished, in a process of its own: its settings and figures."""
    if not (out / "summary.json").exists():
        words = [sys.executable, smd.__file__, f"--out={out}", *(f"{cli.flag(name)}={job[name]}" for name in job)]
        if (out / "config.json").exists():
            words.append("--resume")
        # threads that spin while they wait would take the cores of the other runs, and a real model needs large pages,
        # because each step frees and allocates large tensors
        environment = dict(OMP_NUM_THREADS=str(threads), GOMP_SPINCOUNT="1000", THP_MEM_ALLOC_ENABLE="1")
        ended = subprocess.run(words, env=environment | os.environ, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip()
            if ended.returncode < 0 or not said:
                said = "it was killed, perhaps because memory ran out; give fewer --jobs"
            raise cli.UsageError(f"the run in {out} failed: {said.splitlines()[-1]}")
        if "model" in job:
            (out / "checkpoint.pt").unlink()  # gigabytes; model/ has the weights
    config, summary = (json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "summary"))
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: config[name] for name in ("method", "budget", "lr", "seed")} | job | figures(summary, log)


def figures(summary: dict, log: list[dict]) -> dict[str, float]:
    """The figures of one run; accuracies are in percent, and `sparse_at_20` is the one after 20 steps."""
    diagnosed = [row for row in log if "kl_sparse_dense" in row]
    rewards = [row["reward"] for row in log]
    found = dict(reward=statistics.mean(rewards), reward_last=statistics.mean(rewards[-(len(log) // 4 or 1) :]))
    for cache in CACHES:
        found[f"before_{cache}"] = 100 * summary["before"][cache]
        found[cache] = 100 * summary["after"][cache]
        for step, accuracy in zip(*report.held_out(log, summary, cache), strict=True):
            found[f"{cache}_at_{step}"] = 100 * accuracy
    for name in DIAGNOSED:
        found[name] = diagnosed[0][name]  # before training
        found[f"{name}_last"] = diagnosed[-1][name]
    found["stored_mb"] = max(row["stored_kv_bytes"] for row in log) / 1e6
    found["seconds"] = sum(row["seconds_sample"] + row["seconds_learn"] for row in log)
    found["peak_gb"] = (summary["peak_memory"] or float("nan")) / 1e9
    return found


def write_csv(path: Path, rows: list[dict]) -> None:
    """A column for each name in any row; floats with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
    files.write(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN for a single value."""
    n = len(values) - 1
    if n == 0:
        return values[0], float("nan")
    return statistics.mean(values), T_95.get(n, 1.96 + 2.5 / n) * statistics.stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = mean_and_interval(values)
    return (f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.3g}") + (f" ± {half:.2g}" if half > 0 else "")


def group(rows: list[dict], by: Sequence[str]) -> dict[tuple, list[dict]]:
    """Rows with equal values in these columns together."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in by), []).append(row)
    return groups


def numbers(rows: list[dict], name: str) -> list[float]:
    """The numbers in a column, without its empty cells."""
    return [float(row[name]) for row in rows if row.get(name) not in (None, "")]


def markdown(rows: list[dict], by: Sequence[str], columns: Sequence[str] | None = None) -> str:
    """A Markdown table: mean ± 95 % interval of these columns (None: all others) over the rows of each group."""
    if columns is None:
        columns = dict.fromkeys(name for row in rows for name in row if name not in by)
    columns = [name for name in columns if numbers(rows, name)]
    lines = [[*by, *columns]]
    for key, members in group(rows, by).items():
        lines.append([*map(str, key), *(cell(numbers(members, name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def command(main: Callable[[], None]) -> None:
    """Run an experiment; an error that the user can fix ends it with one line."""
    sys.exit(cli.run_command(main, Path(sys.argv[0]).stem))

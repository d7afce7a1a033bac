"""What the experiments share: runs that are kept and resumed, and tables."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import smd
from harness import cli, files, train
from harness.agent import Agent
from harness.settings import Settings

# Student's t for 95 %, by degrees of freedom; beyond, 1.96 + 2.5 / n is within 1 %
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
CORES = os.cpu_count() or 1
Result = tuple[dict, list[dict]]  # what summary.json and metrics.jsonl of a run hold


def agent_of(**given) -> Agent:
    """Task, model and eviction of a run with these settings."""
    return Agent(train.checked(Settings(**given)))


def result(out: Path) -> Result:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "summary.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def finished(out: Path, steps: int) -> bool:
    return (out / "summary.json").exists() and result(out)[0]["steps"] == steps


def run(out: Path, job: dict, threads: int) -> None:
    """Begin or resume a run with these settings, as `python smd.py` does; UsageError with its last line if it fails.

    It has a process of its own, so that the most memory which it held is its own.
    """
    words = [sys.executable, smd.__file__, f"--out={out}", *(f"{cli.flag(name)}={job[name]}" for name in job)]
    if (out / "config.json").exists():
        words.append("--resume")
    # threads that spin while they wait take the cores from the run beside theirs
    environment = dict(OMP_NUM_THREADS=str(threads), GOMP_SPINCOUNT="1000")
    # large pages: each step of a real model frees large tensors and allocates them again
    environment["THP_MEM_ALLOC_ENABLE"] = "1"
    ended = subprocess.run(words, env=environment | os.environ, capture_output=True, text=True)
    if ended.returncode:
        said = ended.stderr.strip() or "it was killed, perhaps for want of memory; give fewer --jobs"
        raise cli.UsageError(f"the run in {out} failed: {said.splitlines()[-1]}")
    if "model" in job:
        (out / "checkpoint.pt").unlink()  # it is gigabytes, and model/ has the weights


def named(*words) -> str:
    """The name of a file or folder; a model may be a path, a budget a share."""
    return "-".join(map(str, words)).replace(os.sep, "_").replace("%", "pct")


def base_of(job: dict) -> tuple:
    """The settings among a job's that decide its base policy."""
    return tuple(job.get(name) for name in ("model", "asked"))


def run_all(out: Path, jobs: list[dict], workers: int, bar: tqdm) -> list[Result]:
    """A run for each of these settings, so many at a time, each with its share of the cores; in the order of `jobs`.

    A run's folder is named by all that is set, so that experiments find the runs that they have in common. Ctrl-C keeps
    what is there. Raises UsageError where the runs that are there started from another base policy than the new ones.
    """
    folders = [out / named(*job.values()) for job in jobs]
    todo = {folder: job for folder, job in zip(folders, jobs, strict=True) if not finished(folder, job["steps"])}
    bar.update(len(jobs) - len(todo))
    # a base policy that several runs start from is made by one of them, before the others begin
    first = list({base_of(job): folder for folder, job in todo.items()}.values())
    pool = ThreadPoolExecutor(workers)
    try:
        for part in (first, [folder for folder in todo if folder not in first]):
            for _ in pool.map(lambda folder: run(folder, todo[folder], max(1, CORES // workers)), part):
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    done = [result(folder) for folder in folders]
    starts = {(base_of(job), summary["before"]["dense"]) for job, (summary, _) in zip(jobs, done, strict=True)}
    if len(starts) > len(set(map(base_of, jobs))):
        raise cli.UsageError(f"the runs in {out} start from different base policies; delete them or move them away")
    return done


def positive(text: str) -> int:
    """The type of a count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The flags that experiments with many runs share."""
    parser.add_argument("--model")
    parser.add_argument("--seeds", type=positive, default=seeds)
    parser.add_argument("--steps", type=positive, help="default: as many as a run takes")
    workers = 1 if torch.cuda.is_available() else CORES
    parser.add_argument("--jobs", type=positive, default=workers, help="runs at a time")


def steps_of(given: argparse.Namespace) -> int:
    return given.steps or train.checked(Settings(model=given.model)).steps


def figures(summary: dict, rows: list[dict]) -> dict[str, float]:
    """The columns of a table, of one run."""
    diagnosed = [row for row in rows if "kl_sparse_dense" in row]
    memory = {} if summary["peak_memory"] is None else {"peak GB": summary["peak_memory"] / 1e9}
    return memory | {
        "base sparse %": 100 * summary["before"]["sparse"],
        "base dense %": 100 * summary["before"]["dense"],
        "sparse %": 100 * summary["after"]["sparse"],
        "dense %": 100 * summary["after"]["dense"],
        "mean reward": statistics.mean(row["reward"] for row in rows),
        "KL(sparse‖dense)": diagnosed[-1]["kl_sparse_dense"],
        "least ESS": min(row["ess_sequence"] for row in diagnosed),
        "overlap p05": min(row["overlap_p05"] for row in diagnosed),
        "stored KV MB": max(row["stored_kv_bytes"] for row in rows) / 1e6,
        "seconds": sum(row["seconds_sample"] + row["seconds_learn"] for row in rows),
    }


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN for one value alone."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    n = len(values) - 1
    return statistics.mean(values), T_95.get(n, 1.96 + 2.5 / max(1, n)) * spread / len(values) ** 0.5


def cell(values: list[float]) -> str:
    mean, half = mean_and_interval(values)
    return (f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}") + (f" ± {half:.2g}" if half > 0 else "")


def table(groups: dict[str, list[dict[str, float]]], path: Path) -> str:
    """Mean ± 95 % interval over the rows of each group, as text; and as Markdown into `path`.

    A column that a group lacks is left empty there.
    """
    columns = list(dict.fromkeys(column for rows in groups.values() for column in rows[0]))
    lines = [["", *columns]]
    for name, rows in groups.items():
        lines.append([name, *(cell([row[c] for row in rows]) if c in rows[0] else "" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    marked = ["| " + " | ".join(line) + " |" for line in lines]
    files.write(path, "\n".join([marked[0], "|" + "---|" * len(widths), *marked[1:]]) + "\n")
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def command(main: Callable[[], None]) -> None:
    """Run an experiment; what a user can mend ends it with one line."""

    def run() -> None:
        try:
            main()
        except KeyboardInterrupt as e:
            e.add_note("what is finished is kept")
            raise

    sys.exit(cli.run_command(run, Path(sys.argv[0]).stem))

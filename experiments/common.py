"""What the experiments share: runs that are kept and resumed, tables, one look for all figures."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import smd
from harness import base, cli, files, runs
from harness.report import colour
from harness.settings import OF_MODEL, OF_TOY

# Student's t for 95 %, by degrees of freedom; beyond, 1.96 + 2.5 / n is within 1 %
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
CORES = os.cpu_count() or 1
# a figure of 8 inches is still readable where a page shows it in 600 pixels
plt.rcParams["font.size"] = 12


def finished(out: Path, steps: int) -> bool:
    summary = out / "summary.json"
    return summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["steps"] == steps


def run(out: Path, **given) -> tuple[dict, list[dict]]:
    """summary.json and the rows of metrics.jsonl of a run in `out`: read if it is finished, resumed if it was begun.

    Raises UsageError where `out` holds a run with other settings.
    """
    settings = smd.checked(smd.Settings(out=str(out), resume=(out / "config.json").exists(), **given))
    runs.check_same(settings, runs.fingerprint(settings))
    if not finished(out, settings.steps):
        # one bar is enough: that of the experiment
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            smd.train(settings)
        if settings.model is not None:
            # of a real model it is gigabytes, and model/ has the weights
            (out / "checkpoint.pt").unlink()
    log = (out / "metrics.jsonl").read_text(encoding="utf-8")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary, [json.loads(line) for line in log.splitlines()]


def begin_worker(threads: int) -> None:
    """Set up a process that makes runs. Ctrl-C ends it at once: a run that is killed can be resumed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


def base_path(given: dict) -> Path | None:
    """Where the base policy lies that a run starts from; None if that is a pretrained model as it is."""
    s = smd.checked(smd.Settings(**given))
    if s.model is not None and s.warmup_steps == 0:
        return None
    return base.base_path(s)


def make_base(given: dict) -> None:
    agent = smd.agent_for(smd.checked(smd.Settings(**given)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        base.load_base(agent)


def named(*words) -> str:
    """The name of a file or folder; a model may be a path, a budget a share."""
    return "-".join(map(str, words)).replace(os.sep, "_").replace("%", "pct")


def run_all(out: Path, jobs: list[dict], workers: int, bar: tqdm) -> list[tuple[dict, list[dict]]]:
    """A run for each of these settings, so many at a time, each with its share of the cores; in the order of `jobs`.

    A run's folder is named by all that is set, so that experiments find the runs that they have in common. Ctrl-C keeps
    what is there. Raises UsageError where the runs that are there started from another base policy than the new ones.
    """
    folders = [out / named(*job.values()) for job in jobs]
    given = dict(zip(folders, jobs, strict=True))
    done = {folder: run(folder, **job) for folder, job in given.items() if finished(folder, job["steps"])}
    todo = {folder: job for folder, job in given.items() if folder not in done}
    bar.update(len(done))
    context = multiprocessing.get_context("spawn")
    # a process for each run, so that the most memory which it held is that of its run
    options = dict(initializer=begin_worker, initargs=(max(1, CORES // workers),), max_tasks_per_child=1)
    pool = ProcessPoolExecutor(workers, context, **options)
    try:
        # a base policy that several runs start from is made once, before them
        bases = {base_path(job): job for job in todo.values()}
        list(pool.map(make_base, (job for path, job in bases.items() if path is not None)))
        futures = {pool.submit(run, folder, **job): folder for folder, job in todo.items()}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    tasks = {folder: (job.get("hops"), job.get("asked")) for folder, job in given.items()}
    starts = {(task, done[folder][0]["before"]["dense"]) for folder, task in tasks.items()}
    if len(starts) > len(set(tasks.values())):
        raise cli.UsageError(f"the runs in {out} start from different base policies; delete them or move them away")
    return [done[folder] for folder in folders]


def positive(text: str) -> int:
    """The type of a count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The flags that experiments with many runs share."""
    parser.add_argument("--seeds", type=positive, default=seeds)
    parser.add_argument("--steps", type=positive, help="default: as many as a run takes")
    workers = 1 if torch.cuda.is_available() else CORES
    parser.add_argument("--jobs", type=positive, default=workers, help="runs at a time")


def steps_of(given: argparse.Namespace, model: str | None = None) -> int:
    return given.steps or (OF_TOY if model is None else OF_MODEL)["steps"]


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
        "KV MB": max(row["kv_bytes"] for row in rows) / 1e6,
        "seconds": sum(row[f"seconds_{part}"] for row in rows for part in ("sample", "learn")),
    }


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN for one value alone."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    n = len(values) - 1
    return statistics.mean(values), T_95.get(n, 1.96 + 2.5 / max(1, n)) * spread / len(values) ** 0.5


def table(groups: dict[str, list[dict[str, float]]], path: Path) -> str:
    """Mean ± 95 % interval over the seeds of each group, as text; and as Markdown into `path`."""
    columns = list(next(iter(groups.values()))[0])
    cells = [["", *columns]]
    for name, seeds in groups.items():
        pairs = (mean_and_interval([figures[column] for figures in seeds]) for column in columns)
        cells.append([name, *(f"{mean:.3g}" + (f" ± {half:.2g}" if half > 0 else "") for mean, half in pairs)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    marked = ["| " + " | ".join(row) + " |" for row in cells]
    files.write(path, "\n".join([marked[0], "|" + "---|" * len(cells[0]), *marked[1:]]) + "\n")
    return "\n".join(lines)


def label_ends(axis, ends: dict[str, tuple[float, float]]) -> None:
    """Each line's name at the end (x, y) of its curve, moved up or down where two would overlap."""
    gap, to_axes = 0.06, axis.transData + axis.transAxes.inverted()  # heights from here on are shares of the axes'
    height = {name: to_axes.transform(end)[1] for name, end in ends.items()}
    names = sorted(height, key=height.get)
    at = [height[name] for name in names]
    for _ in range(100):
        for n in range(len(at) - 1):
            push = max(0.0, gap - (at[n + 1] - at[n])) / 2
            at[n], at[n + 1] = at[n] - push, at[n + 1] + push
    shift = min(0.0, 1 - at[-1]) + max(0.0, gap / 2 - at[0])  # none of them leaves the axes
    for name, y in zip(names, at, strict=True):
        place = dict(xycoords=("data", "axes fraction"), xytext=(6, 0), textcoords="offset points", va="center")
        axis.annotate(name, (ends[name][0], y + shift), color=colour(name), **place)
    axis.spines[["top", "right"]].set_visible(False)


def command(main: Callable[[], None]) -> None:
    """Run an experiment; what a user can mend ends it with one line."""

    def run() -> None:
        try:
            main()
        except BrokenProcessPool as e:
            raise cli.UsageError("a run was killed, perhaps for want of memory; give fewer --jobs") from e
        except KeyboardInterrupt as e:
            e.add_note("what is finished is kept")
            raise

    sys.exit(cli.run_command(run, Path(sys.argv[0]).stem))


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)

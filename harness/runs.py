"""The folder of a run: a run that was killed resumes from it, and no run overwrites another.

config.json      the settings that cannot change         checkpoint.pt   weights, optimizer, log
metrics.jsonl    the log, one line per step              summary.json, curves.png   at the end
model/           at the end, with --model: the policy in Hugging Face's layout
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import time
from pathlib import Path

import filelock
import torch
from torch import nn
from tqdm import tqdm

import kernel
from harness import device, files, parallel, pretrained, report, tasks
from harness.cli import UsageError, flag, require
from harness.settings import FIXED, Settings, read_config

SAVE_EVERY = 20  # steps; a run that is killed loses at most these
FILES = ("config.json", "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png", "lock")
MODEL = "model"


def fingerprint(s: Settings) -> str | None:
    """SHA-256 of the files of --model and --data; None without them."""
    if s.model is None and s.data is None:
        return None
    digest = hashlib.sha256((pretrained.fingerprint(s.model) if s.model else "").encode())
    if s.data is not None:
        digest.update(tasks.read_data(s.data))
    return digest.hexdigest()


def check_same(s: Settings, fingerprint: str | None) -> None:
    """UsageError where --out holds a run and these settings do not resume it, or ask for another run."""
    out = Path(s.out)
    if not any(os.path.exists(out / name) for name in FILES[:3]):
        return
    require(s.resume, f"--out {out} holds a run; add --resume to continue, delete it or choose another --out")
    config = read_config(out, "fingerprint")
    for name in FIXED:
        old, new = config[name], getattr(s, name)
        require(old == new, f"--out {out} holds a run with {flag(name)} {old}, not {new}; choose another --out")
    read = " or ".join(f"{flag(name)} {getattr(s, name)}" for name in ("model", "data") if getattr(s, name))
    same = config["fingerprint"] == fingerprint
    require(same, f"--out {out} holds a run whose {read} has changed since; choose another --out")


class Run:
    """A run's folder, which is locked inside the `with` block, and the rows of its log.

    Of several processes, the first prints, writes and checks the folder; each reads the checkpoint by itself.
    """

    def __init__(self, s: Settings):
        """UsageError where --out holds another run, or a run whose model or data has changed. Writes nothing."""
        self.s = s
        self.fingerprint = fingerprint(s)
        self.rows: list[dict] = []
        self.before: dict[str, float] = {}  # accuracies of the base policy
        self.saved = 0  # step of the last checkpoint
        self.began = time.perf_counter()
        self.lock = None
        if s.out:
            parallel.on_rank0(check_same, s, self.fingerprint)

    def __enter__(self) -> "Run":
        self.out = parallel.on_rank0(self.claim)
        self.checkpoint_path = self.out / "checkpoint.pt"
        self.metrics_path = self.out / "metrics.jsonl"
        return self

    def claim(self) -> Path:
        """The run's folder, locked until `__exit__` or the end of the process."""
        out = Path(self.s.out) if self.s.out else self.new_folder()
        out.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(out / "lock", blocking=False)
        try:
            self.lock.acquire()
        except filelock.Timeout as e:
            raise UsageError(f"--out {out} is in use by another run; wait for it or choose another --out") from e
        if self.s.out:
            check_same(self.s, self.fingerprint)  # again: another process may have written here before the lock
        return out

    def new_folder(self) -> Path:
        """Make the first out/METHOD-NUMBER that does not exist; `mkdir` succeeds in one process only."""
        Path("out").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("out") / f"{self.s.method}-{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        """Release the folder, and add to an error the command that continues the run."""
        if self.lock is not None:
            self.lock.release()
        if error is not None and self.before and self.checkpoint_path.exists():
            flags = shlex.join(["--resume", f"--out={self.out}"])
            done = len(self.rows)
            error.add_note(f"stopped after step {done}; start again with {flags} to continue from step {self.saved}")

    def resume(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Load the last checkpoint; False for a run that has none yet. Then begin to write to the folder."""
        s = self.s
        known = s.resume and parallel.on_rank0(self.checkpoint_path.exists)
        if known:
            state = parallel.raise_on_all_ranks(files.restore, self.checkpoint_path, policy, optimizer)
            done = state["step"]
            fits = done <= s.steps
            require(fits, f"--out {self.out} has completed {done} steps; --steps must be at least that, got {s.steps}")
            self.rows, self.before, self.saved = state["rows"], state["before"], done
            self.began -= state["seconds"]
        parallel.on_rank0(self.begin_to_write)
        backend = kernel.backend_for(s.device, s.backend)
        processes = f" | {parallel.COUNT} processes" if parallel.COUNT > 1 else ""
        parallel.say(f"run {self.out} | device {s.device} | attention backend {backend}{processes}")
        if known:
            parallel.say(f"resumed at step {done} of {s.steps}")
        return known

    def begin_to_write(self) -> None:
        for name in FILES:
            for half_written in self.out.glob(f"{name}.*.tmp"):
                half_written.unlink(missing_ok=True)
        config = {name: getattr(self.s, name) for name in [*FIXED, "steps"]}
        files.write(self.out / "config.json", json.dumps(config | dict(fingerprint=self.fingerprint), indent=1) + "\n")
        # the log of a killed run may be longer than that of its checkpoint, or end within a line
        files.write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def start(self, before: dict[str, float], policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the base policy and its accuracies."""
        self.before = before
        parallel.say(f"base policy: {report.accuracies(before)}")
        self.save_checkpoint(policy, optimizer)

    def log(self, row: dict, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a step's row and, every SAVE_EVERY steps and after the last, a checkpoint.

        FloatingPointError if a figure is not finite: then nothing is written.
        """
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        self.rows.append(row)
        parallel.on_rank0(self.write_row, row)
        if len(self.rows) % SAVE_EVERY == 0 or len(self.rows) == self.s.steps:
            self.save_checkpoint(policy, optimizer)

    def write_row(self, row: dict) -> None:
        if held_out := self.evaluated():
            tqdm.write(f"step {len(self.rows)}: {report.accuracies(held_out)}")  # print would break the progress bar
        with open(self.metrics_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def evaluated(self) -> dict[str, float]:
        """The accuracies of the current policy, if it has been evaluated."""
        if not self.rows:
            return self.before
        figures = self.rows[-1].items()
        return {name.removeprefix("held_out_"): share for name, share in figures if name.startswith("held_out_")}

    def save_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = dict(step=len(self.rows), rows=self.rows, before=self.before, seconds=time.perf_counter() - self.began)
        state |= dict(weights=policy.state_dict(), optimizer=optimizer.state_dict())
        parallel.on_rank0(files.save, self.checkpoint_path, state)
        self.saved = len(self.rows)

    def finish(self, after: dict[str, float], prompt: str) -> dict:
        """Write summary.json and the picture, print the table and a prompt to try; return the summary."""
        errors = {
            name: max(report.points(self.rows, name)[1], default=None) for name in ("replay_error", "dense_error")
        }
        summary = dict(out=str(self.out), steps=self.s.steps, before=self.before, after=after, **errors)
        summary |= dict(visible_share=self.rows[-1]["visible_share"] if self.rows else None)
        summary |= dict(seconds=time.perf_counter() - self.began, peak_memory=device.peak_memory(self.s.device))
        files.write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.conclude(self.rows, summary, self.s.method, prompt)
        return summary

"""A run on disk: a run that was killed goes on where it was, and none is overwritten.

config.json      the settings that may not change        checkpoint.pt   weights, optimizer, log
metrics.jsonl    the log, one line a step                summary.json, curves.png   at the end
model/           at the end, with --model: the policy in Hugging Face's layout
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch
from torch import nn
from tqdm import tqdm

import kernel
from harness import cli, device, files, parallel, pretrained, report, tasks
from harness.cli import Ended, UsageError, fixed_names, flag, require

SAVE_EVERY = 20  # steps, which a run that is killed loses at most
FILES = ("config.json", "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png", "lock")
MODEL = "model"


def read_config(out: Path, settings: type, *more: str) -> dict:
    """What config.json of the run in a folder says: the settings that may not change, its steps, and more by name."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return {name: config[name] for name in [*fixed_names(settings), "steps", *more]}
    except OSError as e:
        raise UsageError(f"{out} holds no run to resume ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out / 'config.json'} is damaged ({cli.in_short(e)}); take another --out") from e


def fingerprint(s) -> str | None:
    """SHA-256 of what a run reads, --model and --data; None where it reads neither."""
    if s.model is None and s.data is None:
        return None
    digest = hashlib.sha256((pretrained.fingerprint(s.model) if s.model else "").encode())
    if s.data is not None:
        digest.update(tasks.read_data(s.data))
    return digest.hexdigest()


def check_same(s, fingerprint: str | None) -> None:
    """UsageError where --out holds a run that is not to be resumed, or another one than these settings ask for."""
    out = Path(s.out)
    if not any(os.path.exists(out / name) for name in FILES[:3]):
        return
    require(s.resume, f"--out {out} holds a run; add --resume to continue it, delete it or take another --out")
    config = read_config(out, type(s), "fingerprint")
    same = config.pop("fingerprint") == fingerprint
    for name, old in config.items():
        fits = name == "steps" or old == getattr(s, name)
        require(fits, f"--out {out} holds a run with {flag(name)} {old}, not {getattr(s, name)}; use another --out")
    read = " or ".join(f"{flag(name)} {getattr(s, name)}" for name in ("model", "data") if getattr(s, name))
    require(same, f"--out {out} holds a run whose {read} has changed since; use another --out")


class Run:
    """A run's folder, which belongs to this process inside the `with` block, and the rows of its log.

    Of several processes, the first prints and writes, and what it finds in the folder holds for all; from a checkpoint,
    each reads for itself.
    """

    def __init__(self, settings):
        """UsageError where --out holds another run, or one of a model that has changed since. Writes nothing."""
        cli.escape_output()
        self.began = time.perf_counter()
        self.s = settings
        self.fingerprint = fingerprint(settings)
        self.rows: list[dict] = []
        self.before: dict[str, float] = {}  # accuracies of the base policy
        self.seconds_before = 0.0  # spent before this process
        if settings.out:
            parallel.on_rank0(check_same, settings, self.fingerprint)

    def __enter__(self) -> "Run":
        self.lock = None
        self.out = parallel.on_rank0(self.claim)
        self.checkpoint_path = self.out / "checkpoint.pt"
        self.metrics_path = self.out / "metrics.jsonl"
        return self

    def claim(self) -> Path:
        """The run's folder, locked until `__exit__`, or until the process ends, however it ends."""
        out = Path(self.s.out) if self.s.out else None
        try:
            out = out or self.new_folder()
            out.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(out / "lock")
            self.lock.acquire(blocking=False)
        except filelock.Timeout as e:
            raise UsageError(f"--out {out} is in use by another run; wait for it or take another --out") from e
        except OSError as e:
            raise UsageError(f"{e.filename or out} cannot be written: {e.strerror}; choose another --out") from e
        if self.s.out:
            check_same(self.s, self.fingerprint)  # once more: another process may have had the folder until now
        return out

    def new_folder(self) -> Path:
        """The first out/METHOD-NUMBER that is free: of two processes that make a folder, one succeeds."""
        Path("out").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("out") / f"{self.s.method}-{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        if self.lock is not None:
            self.lock.release()
        if isinstance(error, KeyboardInterrupt | Ended) and self.checkpoint_path.exists():
            error.add_note(f"{cli.words(resume=True, out=self.out)} goes on from the last checkpoint")
        if device.out_of_memory(error):
            advice = "give fewer --prompts, --samples or --eval-prompts, or a larger --accumulate"
            raise UsageError(cli.with_notes(error, f"out of memory ({cli.in_short(error)}); {advice}")) from error

    def resume(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Go on from the last checkpoint; False for a run that has none yet. From here on the folder is written to."""
        s = self.s
        known = s.resume and parallel.on_rank0(self.checkpoint_path.exists)
        if known:
            state = parallel.raise_on_all_ranks(files.restore, self.checkpoint_path, policy, optimizer)
            self.rows, self.before, self.seconds_before = state["rows"], state["before"], state["seconds"]
            done = len(self.rows)
            fits = done <= s.steps
            require(fits, f"--out {self.out} is at step {done} already, got --steps {s.steps}; give at least that many")
        parallel.on_rank0(self.begin_to_write)
        ignored = [name for name in parallel.TOLD if name in os.environ] if parallel.COUNT == 1 else []
        processes = f" | {parallel.COUNT} processes" if parallel.COUNT > 1 else ""
        processes += f" | one process ({', '.join(ignored)} is not torchrun's)" if ignored else ""
        backend = kernel.backend_for(s.device, s.backend)
        parallel.say(f"run {self.out} | device {s.device} | attention backend {backend}{processes}")
        if known:
            parallel.say(f"resumed at step {len(self.rows)} of {s.steps}")
        return known

    def begin_to_write(self) -> None:
        for half_written in self.out.glob("*.tmp"):
            half_written.unlink(missing_ok=True)
        config = {name: getattr(self.s, name) for name in [*sorted(fixed_names(self.s)), "steps"]}
        files.write(self.out / "config.json", json.dumps(config | dict(fingerprint=self.fingerprint), indent=1) + "\n")
        # what a killed run logged beyond its checkpoint, whole or in part, is done again
        files.write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def start(self, before: dict[str, float], policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the base policy and its accuracies."""
        self.before = before
        parallel.say(f"base policy: {report.accuracies(before)}")
        self.save_checkpoint(policy, optimizer)

    @contextlib.contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """An error in here says in which step it was, and that the checkpoint is of an earlier one."""
        kept = f"{self.checkpoint_path} keeps the last good policy"
        try:
            yield
        except FloatingPointError as e:
            raise FloatingPointError(f"stopped at step {step}: {e}; {kept}") from e
        except Exception as e:
            e.add_note(f"stopped at step {step}; {kept}")
            raise

    def log(self, row: dict, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep a step's row and, every SAVE_EVERY steps and after the last, all that going on from here needs.

        FloatingPointError where a figure is not finite: nothing is written then.
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
            tqdm.write(f"step {len(self.rows)}: {report.accuracies(held_out)}")  # above the bar, where there is one
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UsageError(f"{self.metrics_path} cannot be written: {e.strerror}; make room") from e

    def evaluated(self) -> dict[str, float]:
        """Accuracies of the policy as it is, if they were taken after the last step or it is the base policy."""
        if not self.rows:
            return self.before
        taken = {cache: self.rows[-1].get(f"held_out_{cache}") for cache in self.before}
        return {cache: share for cache, share in taken.items() if share is not None}

    def seconds(self) -> float:
        """Since the run began, less the time between a checkpoint and the process that goes on from it."""
        return self.seconds_before + time.perf_counter() - self.began

    def save_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = dict(step=len(self.rows), rows=self.rows, before=self.before, seconds=self.seconds())
        state |= dict(weights=policy.state_dict(), optimizer=optimizer.state_dict())
        parallel.on_rank0(files.save, self.checkpoint_path, state)

    def finish(self, after: dict[str, float], prompt: str) -> dict:
        """Write summary.json and the picture, print the table and a prompt to try: what summary.json holds."""
        return parallel.on_rank0(self.summarise, after, prompt)

    def summarise(self, after: dict[str, float], prompt: str) -> dict:
        summary = dict(out=str(self.out), steps=self.s.steps, before=self.before, after=after)
        summary |= report.of_rows(self.rows)
        summary |= dict(seconds=self.seconds(), peak_memory=device.peak_memory(self.s.device))
        files.write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.conclude(self.rows, summary, self.s.method, prompt)
        return summary

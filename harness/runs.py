"""A run on disk: its files are written whole or not at all, and a run that was killed goes on where it was.

config.json      the settings that may not change        checkpoint.pt   weights, optimizer, step
metrics.jsonl    one line a step                         summary.json, curves.png   at the end
model/           at the end, with --model: the policy in Hugging Face's layout
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import kernel
from harness import cli, device, parallel, pretrained, report, tasks
from harness.cli import Ended, UsageError, fixed_names, flag, require

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one --out are therefore not noticed
    fcntl = None

SAVE_EVERY = 20  # steps, which a run that is killed loses at most
FILES = ("config.json", "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png")
MODEL = "model"


def write(path: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Write a file such that, whenever the process dies, the old one or the new one is there whole.

    content: a text, or a function that writes into an open file.
    """
    # a name of its own: another process may write the same file
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode())
            else:
                content(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}; make room or choose another folder") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path: Path, state: dict) -> None:
    """Write a checkpoint; FloatingPointError where something in it is not finite."""
    tensors = [value for value in tree_leaves(state) if isinstance(value, Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError("the weights, or the optimizer's moments, are not finite")
    write(path, partial(torch.save, state))


def restore(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    advice: str = "delete it or use --overwrite",
) -> dict:
    """Load a checkpoint into a module and, of a run, into its optimizer: then its step, `before` and seconds.

    UsageError, with advice, where it is damaged.
    """
    try:
        state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(state["weights"])
        if optimizer is None:
            return {}
        optimizer.load_state_dict(state["optimizer"])
        return {name: state[name] for name in ("step", "before", "seconds")}
    except Exception as e:  # there are many ways to be damaged
        what = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
        raise UsageError(f"checkpoint {path} is missing or damaged ({what}); {advice}") from e


def kept(out: Path, names: Iterable[str]) -> dict:
    """What config.json of the run in a folder says under these names; UsageError where there is none of them."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return {name: config[name] for name in names}
    except OSError as e:
        raise UsageError(f"{out} holds no run to resume ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out / 'config.json'} is damaged ({e!r}); use --overwrite to start again") from e


def read_config(out: Path, settings: type) -> dict:
    """The settings of the run in a folder: those that may not change, and its steps."""
    return kept(out, [*fixed_names(settings), "steps"])


def read_metrics(path: Path, steps: int) -> list[dict]:
    """The first rows of metrics.jsonl, as many as the checkpoint has steps; UsageError where one is damaged."""
    lines = path.read_bytes().splitlines()[:steps] if path.exists() else []
    if len(lines) < steps:
        raise UsageError(f"{path} holds {len(lines)} of the checkpoint's {steps} steps; use --overwrite to start again")
    rows = []
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            intact = rows[-1]["step"] == n
        except (ValueError, KeyError, TypeError):
            intact = False
        require(intact, f"{path}, line {n} is damaged; use --overwrite to start again")
    return rows


def fingerprint(settings) -> str | None:
    """SHA-256 of what a run reads, --model and --data; None where it reads neither."""
    if settings.model is None and settings.data is None:
        return None
    digest = hashlib.sha256((pretrained.fingerprint(settings.model) or "").encode())
    if settings.data is not None:
        digest.update(tasks.read_data(settings.data))
    return digest.hexdigest()


def restore_run(out: str, policy: nn.Module) -> None:
    """Give a policy the weights of the last checkpoint of the run in a folder."""
    restore(Path(out) / "checkpoint.pt", policy)


def parse(settings: type, choices: dict, about: str, argv: list[str] | None):
    """Settings from a command line. With --resume, what is not given comes from the run's config.json."""
    given = cli.parse(settings, choices, about, argv)
    asked = "prompt" in given
    answers = "resume" in given or "model" in given
    require(not asked or answers, "--prompt needs --resume and --out, the run that is to answer, or a --model")
    require("resume" not in given or "out" in given, "--resume needs --out, the folder of the run to continue")
    of_run = read_config(Path(given["out"]), settings) if "resume" in given else {}
    return settings(**of_run | given)


class Run:
    """A run's folder, which belongs to this process inside the `with` block, and the rows of its log.

    What is printed about a run as a whole is printed here. Of several processes, the first prints and writes, and what
    it finds in the folder holds for all; from a checkpoint, each reads for itself.
    """

    def __init__(self, settings):
        """UsageError where --out holds another run, or one of a model that has changed since. Writes nothing."""
        cli.escape_output()
        self.began = time.perf_counter()
        self.settings = settings
        if settings.model is not None and settings.out is not None:
            ours = Path(settings.model).resolve().is_relative_to(Path(settings.out).resolve())
            require(not ours, f"--model {settings.model} lies in --out {settings.out}; take another --out")
        self.fingerprint = fingerprint(settings)
        self.rows: list[dict] = []
        self.before: dict[str, float] = {}  # accuracies of the base policy
        self.seconds_before = 0.0  # spent before this process
        self.lock: int | None = None
        if settings.out:
            parallel.by_first(self.check_same, Path(settings.out))

    def __enter__(self) -> "Run":
        self.out = parallel.by_first(self.claim)
        self.checkpoint_path = self.out / "checkpoint.pt"
        self.metrics_path = self.out / "metrics.jsonl"
        return self

    def claim(self) -> Path:
        """The run's folder, claimed; UsageError where another run has it."""
        out = Path(self.settings.out) if self.settings.out else None
        try:
            out = out or self.new_folder()
            out.mkdir(parents=True, exist_ok=True)
            self.lock = self.locked(out)
        except BlockingIOError as e:
            raise UsageError(f"--out {out} is in use by another run; wait for it or take another --out") from e
        except OSError as e:
            raise UsageError(f"{e.filename or out} cannot be written: {e.strerror}; choose another --out") from e
        return out

    @staticmethod
    def locked(out: Path) -> int | None:
        """Lock a folder until `__exit__`, or until the process ends, however it ends."""
        if fcntl is None:
            return None
        lock = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        return lock

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        if self.lock is not None:
            os.close(self.lock)
        if isinstance(error, KeyboardInterrupt | Ended) and self.checkpoint_path.exists():
            error.add_note(f"--resume --out {shlex.quote(str(self.out))} goes on from the last checkpoint")

    def new_folder(self) -> Path:
        """The first out/METHOD-NUMBER that is free: of two processes that make a folder, one succeeds."""
        Path("out").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("out") / f"{self.settings.method}-{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def check_same(self, out: Path) -> None:
        s = self.settings
        if s.overwrite or not (out / "config.json").exists():
            return
        require(s.resume, f"--out {out} holds a run; add --resume to continue it or --overwrite to replace it")
        for name, old in read_config(out, type(s)).items():
            now = getattr(s, name)
            if name != "steps" and old != now:
                raise UsageError(f"--out {out} holds a run with {flag(name)} {old}, not {now}; use another --out")
        same = kept(out, ["fingerprint"])["fingerprint"] == self.fingerprint
        read = " or ".join(f"{flag(name)} {getattr(s, name)}" for name in ("model", "data") if getattr(s, name))
        require(same, f"--out {out} holds a run whose {read} has changed since; use another --out")

    def resume(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Go on from the last checkpoint; False for a run that has none yet. From here on the folder is written to."""
        known = parallel.by_first(self.has_checkpoint)
        if known:
            parallel.agreed(self.read, policy, optimizer)
        parallel.by_first(self.begin_to_write)
        s = self.settings
        processes = f" | {parallel.COUNT} processes" if parallel.COUNT > 1 else ""
        backend = kernel.backend_for(s.device, s.backend)
        parallel.say(f"run {self.out} | device {s.device} | attention backend {backend}{processes}")
        if known:
            parallel.say(f"resumed at step {len(self.rows)} of {s.steps}")
        return known

    def has_checkpoint(self) -> bool:
        self.check_same(self.out)  # once more: another process may have had the folder until now
        return self.settings.resume and self.checkpoint_path.exists()

    def read(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = restore(self.checkpoint_path, policy, optimizer)
        self.rows = read_metrics(self.metrics_path, state["step"])
        self.before = state["before"]
        self.seconds_before = state["seconds"]
        done, wanted = len(self.rows), self.settings.steps
        fits = done <= wanted
        require(fits, f"--out {self.out} is at step {done} already, got --steps {wanted}; give at least that many")

    def begin_to_write(self) -> None:
        self.write_config()
        # what a killed run logged beyond its checkpoint, whole or in part, is done again
        write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write_config(self) -> None:
        # the old run goes before the new config comes: a kill in between must not leave its checkpoint beside it
        if self.settings.overwrite:
            for name in FILES[1:]:
                self.delete(self.out / name)
            shutil.rmtree(self.out / MODEL, ignore_errors=True)
        for name in FILES:
            for half_written in self.out.glob(f"{name}.*.tmp"):
                self.delete(half_written)
        names = sorted(fixed_names(self.settings))
        config = {name: getattr(self.settings, name) for name in names} | {"steps": self.settings.steps}
        config["fingerprint"] = self.fingerprint
        write(self.out / "config.json", json.dumps(config, indent=1) + "\n")

    @staticmethod
    def delete(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise UsageError(f"{path} cannot be replaced: {e.strerror}; use another --out") from e

    def start(self, before: dict[str, float], policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the base policy and its accuracies."""
        self.before = before
        parallel.say(f"base policy: {report.accuracies(before)}")
        self.save_checkpoint(policy, optimizer)

    @contextlib.contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """A FloatingPointError in here says in which step it was, and that the checkpoint is of an earlier one."""
        try:
            yield
        except FloatingPointError as e:
            kept = f"{self.checkpoint_path} keeps the last good policy"
            raise FloatingPointError(f"stopped at step {step}: {e}; {kept}") from e

    def log(self, row: dict, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep a step's row and, every SAVE_EVERY steps and after the last, all that going on from here needs.

        FloatingPointError where a figure is not finite: nothing is written then.
        """
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        self.rows.append(row)
        due = len(self.rows) % SAVE_EVERY == 0 or len(self.rows) == self.settings.steps
        parallel.by_first(self.write_row, row, due)
        if due:
            self.save_checkpoint(policy, optimizer)

    def write_row(self, row: dict, lasting: bool) -> None:
        if held_out := self.evaluated():
            tqdm.write(f"step {len(self.rows)}: {report.accuracies(held_out)}")  # above the bar, where there is one
        with open(self.metrics_path, "a", encoding="utf-8") as f:
            print(json.dumps(row), file=f)
            f.flush()
            if lasting:
                os.fsync(f.fileno())  # a checkpoint must not outlive its rows

    def evaluated(self) -> dict[str, float]:
        """Accuracies of the policy as it is, if they were taken after the last step or it is the base policy."""
        if not self.rows:
            return self.before
        return {
            cache: self.rows[-1][f"held_out_{cache}"] for cache in self.before if f"held_out_{cache}" in self.rows[-1]
        }

    def seconds(self) -> float:
        """Since the run began, less the time between a checkpoint and the process that goes on from it."""
        return self.seconds_before + time.perf_counter() - self.began

    def save_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = dict(step=len(self.rows), before=self.before, seconds=self.seconds())
        state |= dict(weights=policy.state_dict(), optimizer=optimizer.state_dict())
        parallel.by_first(save, self.checkpoint_path, state)

    def largest(self, name: str) -> float | None:
        """Of all steps in which a figure was taken."""
        return max((row[name] for row in self.rows if row.get(name) is not None), default=None)

    def finish(self, after: dict[str, float], prompt: str) -> dict:
        """Write summary.json and the picture, print the table and a prompt to try: what summary.json holds."""
        return parallel.by_first(self.summarise, after, prompt)

    def summarise(self, after: dict[str, float], prompt: str) -> dict:
        summary = dict(out=str(self.out), steps=self.settings.steps, before=self.before, after=after)
        summary |= dict(
            visible_share=self.rows[-1]["visible_share"] if self.rows else None,
            replay_error=self.largest("replay_error"),
            dense_error=self.largest("dense_error"),
            seconds=self.seconds(),
            peak_memory=device.peak_memory(self.settings.device),
        )
        write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.draw_curves(self.rows, summary, self.settings.method, self.out / "curves.png")
        print(report.table(summary))
        if summary["peak_memory"] is not None:
            print(f"this process held {summary['peak_memory'] / 1e9:.2f} GB at most")
        print(f"{summary['seconds']:.0f} s; the run is in {self.out}, its picture is {self.out / 'curves.png'}")
        print(f"try: python smd.py --resume --out {self.out} --prompt {shlex.quote(prompt)}", flush=True)
        return summary

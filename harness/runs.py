"""A run on disk: its files are written whole or not at all, and a run that was killed goes on where it was.

config.json      the settings that may not change        checkpoint.pt   weights, optimizer, step
metrics.jsonl    one line a step                         summary.json, curves.png   at the end
"""

import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import kernel
from harness import cli, report
from harness.cli import UsageError, fixed_names, flag, require

SAVE_EVERY = 20  # steps, which a run that is killed loses at most
FILES = ("config.json", "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png")


def write(path: Path, content: str | bytes) -> None:
    """Write a file such that, whenever the process dies, the old one or the new one is there whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}; make room or choose another folder") from e


def save(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def restore(path: Path, module: nn.Module) -> dict:
    """Load a checkpoint's weights into a module, and return it whole; UsageError where it is damaged."""
    try:
        state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
        module.load_state_dict(state["weights"])
    except Exception as e:  # there are many ways to be damaged
        what = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
        raise UsageError(f"checkpoint {path} is missing or damaged ({what}); delete it or use --overwrite") from e
    return state


def read_config(out: Path, settings: type) -> dict:
    """The settings of the run in a folder: those that may not change, and its steps."""
    try:
        config = json.loads((out / "config.json").read_text())
        return {name: config[name] for name in (*fixed_names(settings), "steps")}
    except OSError as e:
        raise UsageError(f"{out} holds no run to resume ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out / 'config.json'} is damaged ({e!r}); use --overwrite to start again") from e


def read_metrics(path: Path, steps: int) -> list[dict]:
    """The first rows of metrics.jsonl, as many as the checkpoint has steps."""
    lines = path.read_text().splitlines()[:steps] if path.exists() else []
    if len(lines) < steps:
        raise UsageError(f"{path} holds {len(lines)} of the checkpoint's {steps} steps; use --overwrite to start again")
    return [json.loads(line) for line in lines]


def restore_run(out: str, policy: nn.Module) -> None:
    """Give a policy the weights of the last checkpoint of the run in a folder."""
    restore(Path(out) / "checkpoint.pt", policy)


def parse(settings: type, choices: dict, about: str, argv: list[str] | None):
    """Settings from a command line. With --resume, what is not given comes from the run's config.json."""
    given = cli.parse(settings, choices, about, argv)
    require("prompt" not in given or "resume" in given, "--prompt needs --resume and --out, the run that is to answer")
    require("resume" not in given or "out" in given, "--resume needs --out, the folder of the run to continue")
    kept = read_config(Path(given["out"]), settings) if "resume" in given else {}
    return settings(**kept | given)


class Run:
    """A run's folder and the rows of its log. What is printed about a run as a whole is printed here."""

    def __init__(self, settings):
        """Choose the folder, new or to be continued; UsageError where it holds another run. Writes nothing."""
        self.began = time.perf_counter()
        self.settings = settings
        self.out = Path(settings.out or self.next_free())
        self.checkpoint_path = self.out / "checkpoint.pt"
        self.metrics_path = self.out / "metrics.jsonl"
        self.rows: list[dict] = []
        self.before: dict[str, float] = {}  # accuracies of the base policy
        if (self.out / "config.json").exists() and not settings.overwrite:
            self.check_same()

    def next_free(self) -> str:
        method = self.settings.method
        taken = [int(path.name.rpartition("-")[2]) for path in Path("out").glob(f"{method}-[0-9][0-9][0-9]")]
        return f"out/{method}-{max(taken, default=0) + 1:03d}"

    def check_same(self) -> None:
        s, out = self.settings, self.out
        require(s.resume, f"--out {out} holds a run; add --resume to continue it or --overwrite to replace it")
        for name, old in read_config(out, type(s)).items():
            now = getattr(s, name)
            if name != "steps" and old != now:
                raise UsageError(f"--out {out} holds a run with {flag(name)} {old}, not {now}; use another --out")

    def resume(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Go on from the last checkpoint; False for a run that has none yet. From here on the folder is written to."""
        known = self.settings.resume and self.checkpoint_path.exists()
        if known:
            state = restore(self.checkpoint_path, policy)
            optimizer.load_state_dict(state["optimizer"])
            self.rows = read_metrics(self.metrics_path, state["step"])
            self.before = state["before"]
            done, wanted = len(self.rows), self.settings.steps
            fits = done <= wanted
            require(fits, f"--out {self.out} is at step {done} already, got --steps {wanted}; give at least that many")
        self.write_config()
        # what a killed run logged beyond its checkpoint, whole or in part, is done again
        write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in self.rows))
        s = self.settings
        print(f"run {self.out} | device {s.device} | attention backend {kernel.backend_for(s.device, s.backend)}")
        if known:
            print(f"resumed at step {len(self.rows)} of {s.steps}", flush=True)
        return known

    def write_config(self) -> None:
        # the old run goes before the new config comes: a kill in between must not leave its checkpoint beside it
        if self.settings.overwrite:
            for name in FILES[1:]:
                self.delete(self.out / name)
        names = sorted(fixed_names(self.settings))
        config = {name: getattr(self.settings, name) for name in names} | {"steps": self.settings.steps}
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
        print(f"base policy: {report.accuracies(before)}", flush=True)
        self.save_checkpoint(policy, optimizer)

    @contextlib.contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """A FloatingPointError in here says in which step it was, and what is left."""
        try:
            yield
        except FloatingPointError as e:
            kept = f"{self.checkpoint_path} keeps the last good policy"
            raise FloatingPointError(f"stopped at step {step}: {e}; {kept}") from e

    def log(self, row: dict, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep a step's row and, every SAVE_EVERY steps and after the last, all that going on from here needs."""
        self.rows.append(row)
        due = len(self.rows) % SAVE_EVERY == 0 or len(self.rows) == self.settings.steps
        if held_out := self.evaluated():
            tqdm.write(f"step {len(self.rows)}: {report.accuracies(held_out)}")  # above the bar, where there is one
        with open(self.metrics_path, "a") as f:
            print(json.dumps(row), file=f)
            f.flush()
            if due:
                os.fsync(f.fileno())  # a checkpoint must not outlive its rows
        if due:
            self.save_checkpoint(policy, optimizer)

    def evaluated(self) -> dict[str, float]:
        """Accuracies of the policy as it is, if they were taken after the last step or it is the base policy."""
        if not self.rows:
            return self.before
        return {
            cache: self.rows[-1][f"held_out_{cache}"] for cache in self.before if f"held_out_{cache}" in self.rows[-1]
        }

    def save_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = dict(step=len(self.rows), before=self.before)
        save(self.checkpoint_path, state | dict(weights=policy.state_dict(), optimizer=optimizer.state_dict()))

    def finish(self, after: dict[str, float], prompt: str) -> dict:
        """Write summary.json and the picture, print the table and a prompt to try: what summary.json holds."""
        errors = [row["replay_error"] for row in self.rows if row["replay_error"] is not None]
        summary = dict(out=str(self.out), steps=self.settings.steps, before=self.before, after=after)
        summary |= dict(
            visible_share=self.rows[-1]["visible_share"] if self.rows else None,
            replay_error=max(errors, default=None),
            seconds=time.perf_counter() - self.began,
        )
        write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.draw_curves(self.rows, summary, self.settings.method, self.out / "curves.png")
        print(report.table(summary))
        print(f"{summary['seconds']:.0f} s; the run is in {self.out}, its picture is {self.out / 'curves.png'}")
        print(f"try: python smd.py --resume --out {self.out} --prompt {shlex.quote(prompt)}", flush=True)
        return summary

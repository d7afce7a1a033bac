"""What a person sees of a run: how far it is, the table at its end, and its picture."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

import smd
from harness import parallel
from harness.cli import in_short, words

# the same colour for the same method in every picture, readable on white and on black
COLOURS = dict(dense="#7f7f7f", naive="#d62728", tis="#ff7f0e", seq_is="#bc80bd", sparse_rl="#8c6d31", smd="#1f77b4")
COLOURS |= dict(icepop="#2ca02c", seq_mask="#e377c2")
SILENCE = 5.0  # seconds after which a heartbeat is shown: they are further apart where a single operation takes long


def colour(name: str) -> str:
    """Of a method, or of one of its lines ("smd, 50%"); black for what is none."""
    return COLOURS.get(name.split(",")[0], "black")


class Progress(tqdm):
    """A bar where standard error is a terminal; where it is a file, so many lines on the way, at equal distances.

    In between, `heartbeat` shows it. Of several processes, the first shows its own. total: steps at most.
    """

    running: ClassVar[list["Progress"]] = []
    last_shown: ClassVar[float] = time.monotonic()  # any of them

    def __init__(self, name: str, total: int, done: int = 0, lines: int = 10):
        # None: no bar in a file
        super().__init__(desc=name, total=total, initial=done, leave=False, disable=parallel.RANK > 0 or None)
        self.name, self.done, self.figures = name, done, ""
        self.every = max(1, total // lines) if lines else total + 1

    def __enter__(self) -> "Progress":
        self.running.append(self)
        return self

    def __exit__(self, *_) -> None:
        self.running.remove(self)
        self.close()

    def step(self, **figures: float) -> None:
        """One step is done; the figures are shown beside it."""
        self.done += 1
        self.figures = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        self.set_postfix_str(self.figures, refresh=False)
        self.update()
        if self.disable and self.done % self.every == 0:
            self.show()
        else:
            heartbeat()

    def show(self) -> None:
        if self.disable:
            note(f"{self.name}: {self.done} of {self.total} {self.figures}".rstrip())
        else:
            self.refresh()
        Progress.last_shown = time.monotonic()


def note(text: str) -> None:
    """Say something on standard error, in the first process; above the bar, where there is one."""
    if parallel.RANK == 0:
        tqdm.write(text, file=sys.stderr)
    Progress.last_shown = time.monotonic()


def heartbeat(doing: str = "") -> None:
    """Show what is being done, or how far the innermost Progress is, if nothing was shown for SILENCE seconds."""
    if time.monotonic() - Progress.last_shown < SILENCE:
        return
    if doing:
        note(doing)
    elif Progress.running:
        Progress.running[-1].show()


def accuracies(found: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} right with the {cache} cache" for cache, share in found.items())


def counts(rollout: smd.Rollout, entry_bytes: int) -> dict[str, int]:
    """Visible and causal (query, key) pairs of the response tokens that were fed back, and bytes of the KV cache."""
    (N, P), (B, R) = rollout.prompt_NP.shape, rollout.response_BR.shape
    end_B11 = (P + rollout.length_B - 1)[:, None, None]
    first_T = torch.arange(rollout.evicted_at_LBGT.shape[-1], device=end_B11.device).clamp(min=P)

    def pairs(evicted_at_LBGT: Tensor) -> int:
        return (evicted_at_LBGT.minimum(end_B11) - first_T).clamp(min=0).sum().item()

    visible, causal = pairs(rollout.evicted_at_LBGT), pairs(rollout.never_evicted_LBGT)
    # the last token is never stored
    full, full_shared = (entry_bytes * (prompts * P + B * (R - 1)) for prompts in (B, N))
    stored = dict(stored_kv_bytes=rollout.stored_bytes, full_kv_bytes=full, full_kv_bytes_shared=full_shared)
    return dict(visible=visible, causal=causal, **stored)


def of_counts(counts: Sequence[dict[str, int]]) -> dict:
    """What a row of metrics.jsonl says of the rollouts of all processes."""
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    visible, causal = total.pop("visible"), total.pop("causal")
    return dict(visible_share=visible / causal if causal else 1.0, **total)


def table(summary: dict) -> str:
    """Accuracy before and after, and what a reader should look at next."""
    lines = ["held-out accuracy     before    after"]
    for cache in ("sparse", "dense"):
        before = summary["before"][cache]
        after = summary["after"][cache]
        lines.append(f"  {cache:6} cache {before:13.1%} {after:8.1%}")
    if summary["replay_error"] is not None:
        lines.append(f"largest replay error, |log π_shadow - log π_sparse|: {summary['replay_error']:.1e}")
    if summary["dense_error"] is not None:
        lines.append(f"a dense learner would be off by |log π_dense - log π_sparse|: {summary['dense_error']:.1e}")
    if summary["visible_share"] is not None:
        lines.append(f"a response token saw {summary['visible_share']:.0%} of the tokens before it, on average")
    return "\n".join(lines)


def of_rows(rows: list[dict]) -> dict:
    """What summary.json says of the log."""
    errors = {name: max(points(rows, name)[1], default=None) for name in ("replay_error", "dense_error")}
    return errors | dict(visible_share=rows[-1]["visible_share"] if rows else None)


def points(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps at which a figure was taken, and the figure."""
    taken = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in taken], [row[name] for row in taken]


def held_out(rows: list[dict], summary: dict, cache: str) -> tuple[list[int], list[float]]:
    """Steps, and the held-out accuracy at each, from before the first step to after the last."""
    steps, values = points(rows, f"held_out_{cache}")
    found = {0: summary["before"][cache]}
    found |= dict(zip(steps, values, strict=True))
    found |= {summary["steps"]: summary["after"][cache]}
    return list(found), list(found.values())


def draw_curves(rows: list[dict], summary: dict, method: str, path: Path) -> None:
    """Left: does it learn? Right: how far the learner and the dense policy are from what was sampled."""
    # a notebook's shell names the notebook's backend: where that is not installed, matplotlib cannot be imported
    backend = os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure  # here, because it takes a second

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(10, 3.8), layout="constrained")  # without pyplot, and so without a screen
    left, right = figure.subplots(1, 2)
    for cache, style in (("sparse", "o-"), ("dense", "o--")):
        steps, values = held_out(rows, summary, cache)
        left.plot(steps, values, style, color=colour(method), markersize=4, label=f"held-out accuracy, {cache} cache")
    steps, rewards = points(rows, "reward")
    left.plot(steps, rewards, color="#2ca02c", alpha=0.5, linewidth=1, label="reward of the rollouts")
    # a reward may be negative, or far above 1
    left.set(title=f"{method}: all of these should rise", xlabel="step", ylim=(min([0.0, *rewards]), None))
    left.legend(frameon=False)

    right.plot(*points(rows, "kl_sparse_dense"), "o-", color=colour(method), markersize=4)
    right.set(title="KL(π_sparse ‖ π_dense), nats a token: may rise", xlabel="step", ylim=(0, None))
    errors = points(rows, "replay_error")[1]
    if errors:
        note = f"replay error, largest of all steps: {max(errors):.1g}\n(should stay at rounding, some 1e-6 in float32)"
        right.annotate(note, (0.03, 0.05), xycoords="axes fraction", fontsize=9)
    figure.savefig(path, dpi=120)


def conclude(rows: list[dict], summary: dict, method: str, prompt: str) -> None:
    """Print the table, draw the picture, and print a prompt to try, as it is pasted into a shell."""
    print(table(summary))
    if summary["peak_memory"] is not None:
        print(f"this process held {summary['peak_memory'] / 1e9:.2f} GB at most")
    picture = Path(summary["out"]) / "curves.png"
    said = f"its picture is {picture}"
    try:
        draw_curves(rows, summary, method, picture)
    except Exception as e:  # matplotlib has many reasons, and none is worth a run's results
        said = f"its picture could not be drawn ({in_short(e)})"
    print(f"{summary['seconds']:.0f} s; the run is in {summary['out']}, {said}")
    script = Path(__file__).resolve().parent.parent / "smd.py"
    script = "smd.py" if script.parent == Path.cwd() else shlex.quote(str(script))
    print(f"try: python {script} {words(resume=True, out=summary['out'], prompt=prompt)}", flush=True)

"""What a user sees of a run: progress, the table at its end, and its picture."""

import os
import shlex
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

import smd
from harness import parallel
from harness.cli import in_short

# one colour per method in all pictures, readable on white and on black; other methods are black
COLOURS = dict(dense="#7f7f7f", naive="#d62728", tis="#ff7f0e", seq_is="#bc80bd", sparse_rl="#8c6d31", smd="#1f77b4")
COLOURS |= dict(icepop="#2ca02c", seq_mask="#e377c2")


class Progress(tqdm):
    """tqdm's bar on a terminal; in a file, its state every 30 seconds. Only the first process shows it."""

    shown: ClassVar[list["Progress"]] = []  # the bars whose `with` block is running, the innermost last

    def __init__(self, iterable=None, desc: str | None = None, total: int | None = None, **options):
        options |= dict(mininterval=0.1 if sys.stderr.isatty() else 30, leave=False, disable=parallel.RANK > 0)
        # miniters=0: `heartbeat` refreshes the bar between steps; position=0: nested bars share one line
        super().__init__(iterable, desc, total, miniters=0, position=0, **options)

    def __enter__(self) -> "Progress":
        self.shown.append(self)
        return self

    def __exit__(self, *_) -> None:
        self.shown.pop()  # not `remove`: tqdm compares bars by their position, and all have the same
        self.close()

    def step(self, **figures: float) -> None:
        """Count one step, and show these figures beside the bar."""
        self.set_postfix(figures, refresh=False)
        self.update()


def heartbeat() -> None:
    """Refresh the innermost bar: long operations call this, so that its clock goes on between steps."""
    for progress in Progress.shown[-1:]:
        progress.update(0)


def accuracies(found: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} right with the {cache} cache" for cache, share in found.items())


def cache_figures(rollout: smd.Rollout, entry_bytes: int) -> dict[str, float]:
    """The visible share of the keys before each response token, and bytes of KV cache, over all processes.

    visible_share counts (query, key) pairs: those under the shadow mask, divided by those under the causal mask.
    """
    (N, P), (B, R) = rollout.prompt_NP.shape, rollout.response_BR.shape
    end_B11 = (P + rollout.length_B - 1)[:, None, None]  # the last token is sampled, but never a query
    first_T = torch.arange(rollout.evicted_at_LBGT.shape[-1], device=end_B11.device).clamp(min=P)

    def pairs(evicted_at_LBGT: Tensor) -> Tensor:
        return (evicted_at_LBGT.minimum(end_B11) - first_T).clamp(min=0).sum()

    responses = B * (R - 1)
    memory = rollout.stored_bytes, entry_bytes * (B * P + responses), entry_bytes * (N * P + responses)
    counts = torch.stack((pairs(rollout.evicted_at_LBGT), pairs(rollout.never_evicted_LBGT)))
    totals = torch.cat((counts, counts.new_tensor(memory)))
    parallel.all_sum([totals])
    visible, causal, stored, full, full_shared = totals.tolist()
    share = visible / causal if causal else 1.0
    return dict(visible_share=share, stored_kv_bytes=stored, full_kv_bytes=full, full_kv_bytes_shared=full_shared)


def points(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps whose rows hold a figure, and its values."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return list(found), list(found.values())


def held_out(rows: list[dict], summary: dict, cache: str) -> tuple[list[int], list[float]]:
    """Steps and held-out accuracies, from before the first step to after the last."""
    found = {0: summary["before"][cache]}
    found |= dict(zip(*points(rows, f"held_out_{cache}"), strict=True))
    found |= {summary["steps"]: summary["after"][cache]}
    return list(found), list(found.values())


def table(summary: dict) -> str:
    """Accuracy before and after, and the figures to check next."""
    lines = ["held-out accuracy     before    after"]
    for cache, before in summary["before"].items():
        lines.append(f"  {cache:6} cache {before:13.1%} {summary['after'][cache]:8.1%}")
    for name, text in (
        ("replay_error", "largest replay error, |log π_shadow - log π_sparse|: {:.1e}"),
        ("dense_error", "largest error without replay, |log π_dense - log π_sparse|: {:.1e}"),
        ("visible_share", "mean share of visible tokens before a response token: {:.0%}"),
    ):
        if summary[name] is not None:
            lines.append(text.format(summary[name]))
    return "\n".join(lines)


def draw_curves(rows: list[dict], summary: dict, method: str, path: Path) -> None:
    """Left: accuracy and reward. Right: the distance between the sampler's policy and the dense policy."""
    from matplotlib.figure import Figure  # here, because it takes a second

    colour = COLOURS.get(method, "black")
    figure = Figure(figsize=(10, 3.8), layout="constrained")  # pyplot would need a screen
    left, right = figure.subplots(1, 2)
    for cache, style in (("sparse", "o-"), ("dense", "o--")):
        label = f"held-out accuracy, {cache} cache"
        left.plot(*held_out(rows, summary, cache), style, color=colour, markersize=4, label=label)
    steps, rewards = points(rows, "reward")
    left.plot(steps, rewards, color="#2ca02c", alpha=0.5, linewidth=1, label="reward of the rollouts")
    # a reward may be negative, or far above 1
    left.set(title=f"{method}: accuracy and reward", xlabel="step", ylim=(min([0.0, *rewards]), None))
    left.legend(frameon=False)

    right.plot(*points(rows, "kl_sparse_dense"), "o-", color=colour, markersize=4)
    right.set(title="KL(π_sparse ‖ π_dense), nats per token", xlabel="step", ylim=(0, None))
    if summary["replay_error"] is not None:
        text = f"largest replay error: {summary['replay_error']:.1g}\n(rounding in float32: about 1e-6)"
        right.annotate(text, (0.03, 0.05), xycoords="axes fraction", fontsize=9)
    figure.savefig(path, dpi=120)


def conclude(rows: list[dict], summary: dict, method: str, prompt: str) -> None:
    """Print the table, draw the picture, and print a command that asks the trained policy."""
    print(table(summary))
    if summary["peak_memory"] is not None:
        print(f"peak memory of this process: {summary['peak_memory'] / 1e9:.2f} GB")
    picture = Path(summary["out"]) / "curves.png"
    drawn = f"plot: {picture}"
    try:
        draw_curves(rows, summary, method, picture)
    except Exception as e:  # an error in matplotlib must not cost the results of a run
        drawn = f"no plot ({in_short(e)})"
    print(f"{summary['seconds']:.0f} s; run folder: {summary['out']}; {drawn}")
    script, out, prompt = map(shlex.quote, (os.path.relpath(smd.__file__), summary["out"], prompt))
    # "=" because argparse takes a prompt that begins with a dash for a flag
    print(f"try: python {script} --resume --out={out} --prompt={prompt}", flush=True)

"""What a person sees of a run: how far it is, the table at its end, and its picture."""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness import parallel

# the same colour for the same method in every picture, readable on white and on black
COLOURS = dict(dense="#7f7f7f", naive="#d62728", tis="#ff7f0e", seq_is="#bc80bd", sparse_rl="#8c6d31", smd="#1f77b4")
SILENCE = 10.0  # seconds after which something is said, however little has been done


def colour(name: str) -> str:
    """Of a method, or of one of its lines ("smd, 50%"); black for what is none."""
    return COLOURS.get(name.split(",")[0], "black")


class Progress:
    """A bar where standard error is a terminal; where it is a file, so many lines on the way, at equal distances.

    Where nothing has been said for SILENCE seconds there is a line, too. Of several processes, the first shows its own.
    total: steps at most.
    """

    def __init__(self, name: str, total: int, done: int = 0, lines: int = 10):
        self.name = name
        self.total = total
        self.done = done
        self.every = max(1, total // lines) if lines else total + 1
        self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and parallel.RANK == 0:
            self.bar = tqdm(desc=name, total=total, initial=done, leave=False)

    def step(self, **figures: float) -> None:
        """One step is done; the figures are shown beside it."""
        self.done += 1
        if parallel.RANK > 0:
            return
        shown = {name: f"{value:.2f}" for name, value in figures.items()}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif self.done % self.every == 0 or time.monotonic() - self.last_line > SILENCE:
            said = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.name}: {self.done} of {self.total} {said}".rstrip(), file=sys.stderr, flush=True)
            self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


def accuracies(found: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} right with the {cache} cache" for cache, share in found.items())


def of_rollout(rollout) -> dict:
    """What a row of metrics.jsonl says of a rollout: how much of its context was seen, and the bytes of the cache.

    visible_share: visible over causal (query, key) pairs, in the rows of the response tokens that were fed back.
    """
    P = rollout.prompt_NP.shape[1]
    end_B11 = (P + rollout.length_B - 1)[:, None, None]
    first_T = torch.arange(rollout.evicted_at_LBGT.shape[-1], device=end_B11.device).clamp(min=P)

    def pairs(evicted_at_LBGT: Tensor) -> int:
        return (evicted_at_LBGT.minimum(end_B11) - first_T).clamp(min=0).sum().item()

    causal = pairs(rollout.never_evicted_LBGT)
    share = pairs(rollout.evicted_at_LBGT) / causal if causal else 1.0
    names = ("kv_bytes", "full_kv_bytes", "full_kv_bytes_shared")
    return dict(visible_share=share) | {name: getattr(rollout, name) for name in names}


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
    import matplotlib.pyplot as plt  # here, because it takes a second that a test or an error message need not wait

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
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
    plt.close(figure)

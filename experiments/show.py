"""One prompt, decoded, and what a layer's heads could see of it while it was answered.

    python -m experiments.show --out out/smd-001                a held-out prompt, from the checkpoint of a run
    python -m experiments.show --out out/smd-001 --prompt TEXT
    python -m experiments.show --out out/smd-001 --layer 0      instead of the last one

What is printed is one head's view: a line for each token that was drawn, a dot for each key that is gone. The picture
has all heads of the layer: rows are queries, columns keys.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.show")

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch

import smd
from experiments.common import command, save
from harness import files, runs
from harness.cli import require
from harness.streams import EVALUATION
from harness.tasks import Example
from harness.text import check_example, decode

UNBORN, GONE, VISIBLE = range(3)
LEGEND = {VISIBLE: ("#1f77b4", "visible"), GONE: ("#c6dbef", "evicted"), UNBORN: ("white", "not there yet")}
READABLE = 64  # tokens that still fit below a picture, letter by letter


def draw(dies_GT: torch.Tensor, tokens: list[str], first: int, path: Path) -> None:
    """A layer's heads, one below the other: which key each query from column `first` on sees."""
    i = torch.arange(first, len(tokens) - 1)[:, None]
    j = torch.arange(len(tokens) - 1)
    G = len(dies_GT)
    figure, axes = plt.subplots(
        G, 1, figsize=(7, 0.14 * len(i) * G + 0.45 * G + 0.7), layout="constrained", squeeze=False, sharex=True
    )
    colours = plt.matplotlib.colors.ListedColormap([LEGEND[kind][0] for kind in (UNBORN, GONE, VISIBLE)])
    for g, axis in enumerate(axes[:, 0]):
        kind = torch.where(j > i, UNBORN, torch.where(i < dies_GT[g, : len(j)], VISIBLE, GONE))
        axis.imshow(kind, cmap=colours, vmin=UNBORN, vmax=VISIBLE, aspect="auto", interpolation="nearest")
        axis.set_ylabel(f"head {g}")
        axis.set_yticks([])
        if len(j) <= READABLE:
            axis.set_xticks(range(len(j)), tokens[: len(j)], fontsize=9)
    patches = [Patch(facecolor=colour, edgecolor="grey", label=name) for colour, name in LEGEND.values()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def view(dies_T: list[int], tokens: list[str], first: int) -> str:
    """What one head saw, from column `first` on: a line for each query, with the tokens that it sees."""
    rows = ("".join(tokens[j] if i < dies_T[j] else "·" for j in range(i + 1)) for i in range(first, len(tokens) - 1))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of a run")
    parser.add_argument("--prompt")
    parser.add_argument("--layer", type=int, default=-1)
    given = parser.parse_args()
    agent = smd.agent_for(smd.checked(smd.Settings(**runs.read_config(given.out, smd.Settings))))
    files.restore(given.out / "checkpoint.pt", smd.Policy(agent.model, agent.s))
    require(-1 <= given.layer < agent.config.layers, f"--layer must be below {agent.config.layers}")
    example = agent.task.held_out(1)[0] if given.prompt is None else Example(given.prompt, "", where="--prompt: ")
    check_example(agent.form, example, agent.s.max_new, agent.context)
    rollout, (response,) = agent.respond([example], 1, True, agent.keys(1, agent.s.seed, EVALUATION, 2))
    print(f"prompt    {example.prompt}\nresponse  {response}\nanswer    {example.answer}")
    prompt, drawn = rollout.prompt_NP[0].tolist(), rollout.response_BR[0, : rollout.length_B[0]].tolist()
    tokens = [decode(agent.encoding, [token]) for token in prompt + drawn]
    dies_GT = rollout.evicted_at_LBGT[given.layer, 0].cpu()
    print(f"what head 0 of layer {given.layer % agent.config.layers} saw, a line for each token that was drawn:")
    print(view(dies_GT[0].tolist(), tokens, len(prompt) - 1))
    draw(dies_GT, tokens, len(prompt) - 1, given.out / "mask.png")


if __name__ == "__main__":
    command(main)

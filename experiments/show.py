"""One prompt, decoded, and what a layer's heads could see of it while it was answered.

    python -m experiments.show --out out/smd-001                a held-out prompt, from the checkpoint of a run
    python -m experiments.show --out out/smd-001 --prompt TEXT
    python -m experiments.show --out out/smd-001 --layer 0      instead of the last one

What is printed is the view of head 0: a line for each token that was drawn, a dot for each evicted key. The picture has
all kv heads of the layer: rows are queries, columns keys.
"""

if not __package__:  # then none of the project's modules is found
    raise SystemExit("run it from the project's folder: python -m experiments.show")

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from experiments.common import agent_of, command
from harness import files
from harness.cli import require
from harness.objectives import Policy
from harness.settings import read_config
from harness.streams import EVALUATION
from harness.tasks import Example
from harness.text import check_example

COLOURS = {"not there yet": "white", "evicted": "#c6dbef", "visible": "#1f77b4"}
READABLE = 64  # tokens that still fit below a picture, letter by letter


def draw(evicted_at_GT: torch.Tensor, tokens: list[str], first: int, path: Path) -> None:
    """The kv heads of a layer, one below the other: which key each query from column `first` on sees."""
    i = torch.arange(first, len(tokens) - 1)[:, None]
    j = torch.arange(len(tokens) - 1)
    G = len(evicted_at_GT)
    colours = ListedColormap(list(COLOURS.values()))
    size = 7, (0.14 * len(i) + 0.45) * G + 0.7
    figure, axes = plt.subplots(G, 1, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for g, axis in enumerate(axes[:, 0]):
        kind = torch.where(j > i, 0, torch.where(i < evicted_at_GT[g, : len(j)], 2, 1))
        axis.imshow(kind, colours, aspect="auto", interpolation="nearest", vmin=0, vmax=2)
        axis.set_ylabel(f"head {g}")
        axis.set_yticks([])
        if len(j) <= READABLE:
            axis.set_xticks(range(len(j)), tokens[: len(j)], fontsize=9)
    patches = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    print(path)


def view(evicted_at_T: list[int], tokens: list[str], first: int) -> str:
    """What one head saw, from column `first` on: a line for each query, with the tokens that it sees."""
    lines = []
    for i in range(first, len(tokens) - 1):
        lines.append("".join(tokens[j] if i < evicted_at_T[j] else "·" for j in range(i + 1)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of a run")
    parser.add_argument("--prompt")
    parser.add_argument("--layer", type=int, default=-1)
    given = parser.parse_args()
    agent = agent_of(**read_config(given.out))
    layers = agent.config.layers
    require(-1 <= given.layer < layers, f"--layer must be below {layers}, got {given.layer}")
    files.restore(given.out / "checkpoint.pt", Policy(agent.model, agent.s.objective, agent.s.kl_ref))
    example = agent.task.held_out(1)[0] if given.prompt is None else Example(given.prompt, "", where="--prompt: ")
    check_example(agent.form, example, agent.s.max_new, agent.context)
    rollout, (response,) = agent.respond([example], 1, True, agent.keys(1, agent.s.seed, EVALUATION, 2))
    print(f"prompt    {example.prompt}\nresponse  {response}\nanswer    {example.answer}")
    drawn = rollout.response_BR[0, : rollout.length_B[0]]
    tokens = [agent.form.decode([token]) for token in [*rollout.prompt_NP[0].tolist(), *drawn.tolist()]]
    evicted_at_GT = rollout.evicted_at_LBGT[given.layer, 0].cpu()
    first = rollout.prompt_NP.shape[1] - 1
    print(f"what head 0 of layer {given.layer % layers} saw, a line for each token that was drawn:")
    print(view(evicted_at_GT[0].tolist(), tokens, first))
    draw(evicted_at_GT, tokens, first, given.out / "mask.png")


if __name__ == "__main__":
    command(main)

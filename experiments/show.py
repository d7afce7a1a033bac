"""One held-out prompt, the response to it, and the keys that each query of the response could see.

    python -m experiments.show --out out/smd-001          from the checkpoint of a run

Prints the view of head 0 in the last layer: a line for each query, with a dot for each evicted key. Draws all kv heads
of that layer: rows are queries, columns keys.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import smd
from experiments.common import agent_of, command
from harness import files
from harness.objectives import Policy
from harness.settings import read_config
from harness.streams import EVALUATION

COLOURS = {"not there yet": "white", "evicted": "#c6dbef", "visible": "#1f77b4"}
READABLE = 64  # tokens that still fit below a picture, letter by letter


def draw(evicted_at_GT: torch.Tensor, tokens: list[str], first: int, path: Path) -> None:
    """For each kv head of a layer, which keys the queries from column `first` on see."""
    i = torch.arange(first, len(tokens) - 1)[:, None]
    j = torch.arange(len(tokens) - 1)
    G, colours = len(evicted_at_GT), ListedColormap(list(COLOURS.values()))
    size = 7, (0.14 * len(i) + 0.45) * G + 0.7
    figure, axes = plt.subplots(G, 1, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for g, axis in enumerate(axes[:, 0]):
        kind = torch.where(j > i, 0, torch.where(i < evicted_at_GT[g, : len(j)], 2, 1))
        axis.imshow(kind.numpy(), colours, aspect="auto", interpolation="nearest", vmin=0, vmax=2)
        axis.set_ylabel(f"head {g}")
        axis.set_yticks([])
        if len(j) <= READABLE:
            axis.set_xticks(range(len(j)), tokens[: len(j)], fontsize=9)
    patches = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of a run")
    given = parser.parse_args()
    agent = agent_of(**read_config(given.out))
    files.restore(given.out / "checkpoint.pt", Policy(agent.model, agent.s.objective, agent.s.kl_ref))
    example = agent.task.held_out(1)[0]
    eviction = agent.eviction if smd.METHODS[agent.s.method].evicts else None
    rollout, (response,) = agent.respond([example], 1, eviction, agent.keys(1, agent.s.seed, EVALUATION, 2))
    print(f"prompt    {example.prompt}\nresponse  {response}\nanswer    {example.answer}")
    drawn = rollout.response_BR[0, : rollout.length_B[0]]
    tokens = [agent.form.decode([token]) for token in [*rollout.prompt_NP[0].tolist(), *drawn.tolist()]]
    evicted_at_GT = rollout.evicted_at_LBGT[-1, 0].cpu()
    first = rollout.prompt_NP.shape[1] - 1
    print("what head 0 of the last layer saw, a line for each sampled token:")
    for i in range(first, len(tokens) - 1):
        print("".join(tokens[j] if i < evicted_at_GT[0, j] else "·" for j in range(i + 1)))
    draw(evicted_at_GT, tokens, first, given.out / "mask.png")


if __name__ == "__main__":
    command(main)

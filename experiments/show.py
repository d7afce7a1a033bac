"""One prompt, decoded, and what every layer and head could see of it while it was answered.

    python -m experiments.show --out out/smd-001                a held-out prompt, from the checkpoint of a run
    python -m experiments.show --out out/smd-001 --prompt TEXT

Rows are queries, columns keys. In the picture a key is dark while it is visible, and pale from the query on that no
longer sees it; what is printed shows one head's, a dot for a key that is gone.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import smd
from experiments.common import command, save
from harness import runs
from harness.streams import EVALUATION
from harness.tasks import Example
from harness.text import check_prompt


def draw(rollout: smd.Rollout, prompt: str, response: str, path: Path) -> None:
    """The record of sequence 0, one panel for each layer (down) and kv head (across)."""
    L, _, G, T = rollout.evicted_at_LBGT.shape
    P, text = rollout.prompt_NP.shape[1], prompt + response
    i, j = torch.arange(P - 1, T - 1)[:, None], torch.arange(T - 1)
    figure, axes = plt.subplots(
        L, G, figsize=(3.2 * G, 1.1 * L + 0.8), layout="constrained", squeeze=False, sharex=True
    )
    for l in range(L):
        for g in range(G):
            dies = rollout.evicted_at_LBGT[l, 0, g, : T - 1].cpu()
            shade = torch.where(j > i, 0.0, torch.where(i < dies, 1.0, 0.25))
            axes[l, g].imshow(shade, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", interpolation="nearest")
            axes[l, g].set_title(f"layer {l}, head {g}", fontsize=8)
            axes[l, g].set_yticks(range(len(i)), [text[n] if n < len(text) else "" for n in i[:, 0]], fontsize=6)
            axes[l, g].set_xticks(range(T - 1), [text[n] if n < len(text) else "" for n in range(T - 1)], fontsize=5)
    save(figure, path)


def strip(rollout: smd.Rollout, text: str, l: int, g: int) -> str:
    """What one head of sequence 0 saw: a line for each query, with the tokens that it sees."""
    P, end = rollout.prompt_NP.shape[1], rollout.prompt_NP.shape[1] + rollout.length_B[0].item() - 1
    dies = rollout.evicted_at_LBGT[l, 0, g].tolist()
    rows = ("".join(text[j] if i < dies[j] else "·" for j in range(i + 1)) for i in range(P - 1, end))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of a run")
    parser.add_argument("--prompt")
    given = parser.parse_args()
    agent = smd.agent_for(smd.checked(smd.Settings(**runs.read_config(given.out, smd.Settings))))
    runs.restore(given.out / "checkpoint.pt", smd.Policy(agent.model, agent.s))
    example = agent.task.held_out(1)[0] if given.prompt is None else Example(given.prompt, "")
    check_prompt(agent.form, example, agent.s.max_new, agent.context, "--prompt: ")
    rollout, (response,) = agent.respond([example], 1, True, agent.keys(1, agent.s.seed, EVALUATION, 2))
    print(f"prompt    {example.prompt}\nresponse  {response}\nanswer    {example.answer}")
    l, g = rollout.evicted_at_LBGT.shape[0] - 1, 0
    print(f"what layer {l}, head {g} saw, a line for each token that was drawn:")
    print(strip(rollout, example.prompt + response, l, g))
    draw(rollout, example.prompt, response, given.out / "mask.png")


if __name__ == "__main__":
    command(main)

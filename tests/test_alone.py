"""The three files of the method, alone in an empty folder, train a model and pass their proof."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from tests.common import ROOT

METHOD = "kernel.py", "tiny_model.py", "smd.py"


def python(folder, *arguments: str) -> str:
    """What Python prints in a folder that has the method's files and their proof, without the project's path."""
    for name in (*METHOD, "test_smd.py"):
        shutil.copy(ROOT / name, folder)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "TRITON"))}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


IMPORT = """
import os, torch
def state():
    cpu = torch.backends.mkldnn
    flags = [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), cpu.enabled, cpu.allow_tf32]
    flags += [torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()]
    return flags + [cpu.matmul.fp32_precision, torch.get_rng_state().tolist(), dict(os.environ)]
before = state()
import kernel, tiny_model, smd
assert state() == before, "an import changed the environment or the state of torch"
"""
TRAIN = """
import torch
from smd import Config, Eviction, train_step
from tiny_model import ModelConfig, TinyModel
torch.manual_seed(0)
model = TinyModel(ModelConfig(vocab=20, width=32, layers=2, ffn=48))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
prompts, padding = torch.randint(20, (4, 16)), torch.zeros(4, dtype=torch.int64)
config = Config(eviction=Eviction("snapkv", 8), max_new=8)
share_of_sevens = lambda rollout: (rollout.response_BR == 7).float().mean(dim=1)
rewards = [train_step(model, optimizer, prompts, padding, share_of_sevens, config)["reward"] for _ in range(10)]
"""
PRINT = """
import importlib.util
print(rewards[0], rewards[-1], importlib.util.find_spec("harness"))
"""


def test_the_imports_change_nothing_and_ten_lines_train_a_model(tmp_path):
    assert len(TRAIN.strip().splitlines()) == 10
    first, last, harness = python(tmp_path, "-c", IMPORT + TRAIN + PRINT).split()
    assert harness == "None", "the test reaches the project"
    assert float(first) < 0.1 and float(last) > 0.2


def test_the_proof_runs_beside_the_three_files(tmp_path):
    """A small selection: what is tested is that the proof needs no other file."""
    chosen = "which_gradient or finite_differences or by_hand"
    said = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_smd.py", "-k", chosen)
    assert int(said.splitlines()[-1].split()[0]) >= 13


@pytest.mark.parametrize("name", [*METHOD, "test_smd.py"])
def test_the_method_imports_torch_and_numpy_alone(name):
    """Except for the last lines of smd.py, which start a run."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    parts = [node for node in tree.body if not (name == "smd.py" and isinstance(node, ast.If))]
    nodes = [node for part in parts for node in ast.walk(part)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {"kernel", "tiny_model", "smd"} | ({"pytest"} if name == "test_smd.py" else set())
    assert {module.split(".")[0] for module in found} - sys.stdlib_module_names <= {"torch", "numpy", "triton"} | ours

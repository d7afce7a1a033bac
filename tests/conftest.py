"""What every test begins with: its environment, a folder of its own, and runs that save often."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin while they wait slow each other on a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

from harness import report, runs, tasks, train
from harness.settings import Settings
from test_smd import World


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch, tmp_path):
    """Runs are tiny, share no base policy with others, and soon reach the second checkpoint and diagnosis."""
    torch.manual_seed(0)  # for what a test draws from torch's generator
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "DIAGNOSE_EVERY", 3)
    monkeypatch.setattr(Settings, "width", 16)
    monkeypatch.setattr(Settings, "interval", 2)
    monkeypatch.setattr(tasks.Facts, "FACTS", 3)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than a tiny run; one test asks for the picture."""
    if request.node.name != "test_a_run_leaves_its_files":
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def world():
    return World()

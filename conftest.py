"""What every test begins with: its environment, a folder of its own, and runs that save often."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as smd.py does, and why is said there
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

import smd
from experiments.enumerated import World
from harness import device, report, runs

device.faster_products()  # as every run does; before any test, so that all of them multiply alike


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch, tmp_path):
    """Tests share no base policies with anybody's runs, and reach the second checkpoint and diagnosis soon."""
    torch.manual_seed(0)  # for what a test draws without saying from where
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    monkeypatch.setattr(smd, "DIAGNOSE_EVERY", 3)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than a tiny run; one test asks for the picture."""
    if request.node.name != "test_8_a_run_leaves_its_files":
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def world():
    return World()

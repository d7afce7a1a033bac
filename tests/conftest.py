"""The environment of all tests: a folder of its own for each test, and tiny runs that save often."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin while they wait slow each other on a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for each core, so more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

from harness import base, report
from test_smd import World
from tests.common import make_small


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch, tmp_path, tmp_path_factory):
    """Runs are tiny, and start from base policies that the first test makes for all."""
    torch.manual_seed(0)  # for tests that draw from torch's generator
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "CACHE", tmp_path_factory.getbasetemp() / "base")
    make_small(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than a tiny run; one test needs the picture."""
    if request.node.name != "test_a_run_leaves_its_files":
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def world():
    return World()

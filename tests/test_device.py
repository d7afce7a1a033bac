"""Devices, backends and number types: differences between a GPU and a CPU, tested on a CPU."""

import dataclasses
import os
import runpy
import subprocess
import sys

import pytest
import torch

import kernel
import smd
import tiny_model
from harness import settings
from harness.settings import Settings
from kernel import shadow_attention
from test_smd import attention_case, learner, needs_triton
from tests.common import ROOT, compare, ragged_rollout, small_model
from tiny_model import never_evicted


@torch.no_grad()
def test_the_forward_pass_uses_the_given_backend(monkeypatch):
    taken, model, pad = [], small_model(), torch.zeros(1).long()
    monkeypatch.setattr(tiny_model, "shadow_attention", lambda q, *_, backend: taken.append(backend) or q)
    for backend in (None, "torch", "triton"):
        model(torch.zeros(1, 3).long(), pad, never_evicted(pad, 3).expand(2, -1, 2, -1), backend)
    assert taken == [None] * 2 + ["torch"] * 2 + ["triton"] * 2


@needs_triton
def test_no_backend_falls_back_silently(monkeypatch):
    for recent, on_cuda in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda recent=recent, **_: recent)
        assert [kernel.backend_for(device, None) for device in ("cpu", "cuda")] == ["torch", on_cuda]
        dtypes = [settings.defaults(Settings(device=device))["dtype"] for device in ("cpu", "cuda")]
        assert dtypes == ["float32", "bfloat16" if recent else "float32"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(kernel.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; for the interpreter set TRITON_INTERPRET=1"):
        kernel.backend_for("cpu", "triton")
    monkeypatch.setattr(kernel, "triton", None)
    assert kernel.backend_for("cuda", None) == "torch"
    with pytest.raises(ValueError, match="needs the package triton, which is for Linux only; take 'torch'"):
        kernel.backend_for("cuda", "triton")


def test_the_plain_attention_runs_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    alone = runpy.run_path(str(ROOT / "kernel.py"))
    qkv, *rest = attention_case()
    assert alone["triton"] is None
    assert torch.equal(alone["shadow_attention"](*qkv, *rest), shadow_attention(*qkv, *rest))


@needs_triton
def test_the_check_of_the_kernels_passes_and_can_fail(monkeypatch, capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(kernel.itertools, "product", lambda *_: [(torch.float32, 64, 87), (torch.float16, 64, 87)])
    errors = kernel.check(device)
    assert len(errors) == 2 and all(error < kernel.LIMIT for error in errors.values())
    assert capsys.readouterr().out.count("ok") == 2
    monkeypatch.setitem(kernel.BACKENDS, "torch", lambda *args: 1.1 * kernel.attention_torch(*args))
    assert all(error > kernel.LIMIT for error in kernel.check(device).values())
    assert capsys.readouterr().out.count("WRONG") == 2


@needs_triton
def test_kernel_py_checks_itself_as_a_command():
    """It turns on Triton's interpreter where there is no GPU. One case stands for the eight of the command."""
    code = "import itertools, runpy, torch; itertools.product = lambda *_: [(torch.float32, 64, 87)]; "
    code += "runpy.run_path('kernel.py', run_name='__main__')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("ok") == 1, run.stderr


def test_checking_for_eos_every_five_tokens_changes_nothing(monkeypatch):
    model, lengths = small_model(), []
    for seed in range(4):
        rollouts = []
        for every in (1, 5):
            monkeypatch.setitem(smd.EOS_CHECK_EVERY, "cpu", every)
            rollouts.append(ragged_rollout(model, seed=seed, max_new=40, samples=1, lengths=(17, 9)))
        by_token, seldom = (vars(rollout) for rollout in rollouts)
        lengths.append(by_token["response_BR"].shape[1])
        for name in by_token.keys() - {"stored_bytes"}:
            assert torch.equal(by_token[name], seldom[name]), name
    assert min(lengths) < 40, "no rollout ends early"
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        ragged_rollout(model, max_new=40)


def accumulate_in(monkeypatch, dtype: torch.dtype) -> None:
    """Accumulate sums in this type, as some device does."""
    for module in (kernel, smd):
        monkeypatch.setattr(module, "accumulation_dtype", lambda x, _: torch.promote_types(x, dtype))


def test_sums_are_in_float32_under_autocast_too(monkeypatch):
    """Would catch float32 products that autocast rounds to bfloat16."""
    accumulate_in(monkeypatch, torch.float32)
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    nothing_hidden = torch.zeros(2, 4, 9, 9, dtype=torch.bool)
    want = kernel.masked_attention(q.double(), k.double(), v.double(), nothing_hidden)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.masked_attention(q, k, v, nothing_hidden)
    for name, a, b in zip(("out", "weights"), got, want, strict=True):
        compare(name, a.double(), b, 1e-5)


@torch.no_grad()
def test_sums_in_float64_reproduce_a_float32_model_to_rounding(monkeypatch):
    """On CUDA, sums are in float32: the replay error is larger, but still a rounding error."""
    assert kernel.accumulation_dtype(torch.float32, torch.device("cpu")) == torch.float64
    assert kernel.accumulation_dtype(torch.bfloat16, torch.device("cuda")) == torch.float32
    assert kernel.accumulation_dtype(torch.float64, torch.device("cuda")) == torch.float64
    errors = []
    for sums in (torch.float64, torch.float32):
        accumulate_in(monkeypatch, sums)
        model = small_model(torch.float32)
        rollout = ragged_rollout(model, samples=8, sample=smd.sample)
        (hidden_XC,) = smd.replay(model, rollout, rollout.evicted_at_LBGT)
        errors.append((smd.response_logp(model, rollout, hidden_XC) - rollout.logp_BR).abs().max().item())
    assert errors[0] <= errors[1] < 1e-5 and errors[1] > 0


@pytest.mark.parametrize("method", ["tis", "seq_is", "sparse_rl"])
@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_importance_weights_beyond_float32_give_a_finite_gradient(method, shift):
    """A sequence has the weight e^(30 · length), or its inverse."""
    model = small_model(torch.float32)
    rollout = ragged_rollout(model)
    shifted = dataclasses.replace(rollout, logp_BR=rollout.logp_BR + shift * rollout.mask_BR)
    loss, slope, _ = learner(model, shifted, method)
    assert loss.isfinite() and slope.norm().isfinite()

"""The proof of the method: the learner sees what the sampler saw, and follows the gradient of the sampler's policy.

    python -m pytest test_smd.py

It needs kernel.py, tiny_model.py and smd.py, and no other file of this project. Table of contents:

 a  Attention. `shadow_attention` equals a loop over queries and keys, and its gradients equal finite differences.
 b  Kernels. The Triton kernels equal that definition, up to the rounding of plain code in the same precision.
 c  Sampler and replay. The sampler equals an oracle that keeps an explicit list of keys for each sequence, layer and kv
    head, under every eviction policy. The replay equals the sampler. A learner that sees all keys, deletes evicted
    tokens or shifts the mask by one does not.
 d  Gradients. On a model whose 64 responses can be enumerated, finite differences of the sampler alone give the
    gradient of J_sparse. A table says which method follows the gradient of J_sparse, which that of J_dense, and which
    neither. Track 2 is the gradient of the enumerated KL, for the dense policy alone.
 e  Losses. Each loss, weight and advantage is worked out by hand, and ten steps of training raise the reward.

Oracles are written apart from the code under test. A control is a mistake that a test must notice. Tolerances are those
of rounding: 1e-10 in float64 and 1e-5 in float32, for some hundred operations on numbers of order one. The errors that
the tests exclude are a hundred times larger or more.
"""

import dataclasses
import functools
import itertools
import math
import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

import kernel
import smd
from kernel import NEVER, shadow_attention
from smd import Config, Eviction, PolicySpec, Rollout, Runtime
from tiny_model import ModelConfig, TinyModel, causal_attention, never_evicted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels; on a CPU, triton interprets them
EOS = 19


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error, scale = (got - want).abs().max().item(), want.square().mean().sqrt().item()
    rms = (got - want).square().mean().sqrt().item() / max(scale, 1e-300)
    assert error <= tolerance, f"{name}: max error {error:.1e} > {tolerance:.0e}, RMS ratio {rms:.1e}"


# --- a. attention: the definition ---


def attention_by_loops(q, k, v, evicted_at, q_start):
    (B, H, Tq, D), (G, Tk) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b, h, n in itertools.product(range(B), range(H), range(Tq)):
        g, i = h // (H // G), q_start + n
        seen = [j for j in range(Tk) if j <= i < evicted_at[b, g, j]]
        if seen:
            weight = torch.stack([q[b, h, n] @ k[b, g, j] / math.sqrt(D) for j in seen]).softmax(0)
            out[b, h, n] = sum(w * v[b, g, j] for w, j in zip(weight, seen, strict=True))
    return out


def attention_case(Tq=5, Tk=9, q_start=4):
    """Four heads read two kv heads. Key 2 is never evicted, key 3 is never visible, and one kv head shows nothing."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, Tq, 4, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 2, Tk, 4, dtype=torch.float64, generator=generator)
    evicted_at = torch.randint(0, Tk + 2, (2, 2, Tk), generator=generator, dtype=torch.int32)
    evicted_at[:, :, 2] = NEVER
    evicted_at[:, :, 3] = 0
    evicted_at[1, 1] = 0
    return [x.requires_grad_() for x in (q, k, v)], evicted_at, q_start


SHAPES = {
    "queries-after-a-prompt": (5, 9, 4),
    "all-queries": (9, 9, 0),
    "one-query": (1, 9, 8),
    "queries-past-all-keys": (3, 4, 7),
    "no-query": (0, 4, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_equals_the_loop(shape):
    qkv, evicted_at, q_start = attention_case(*shape)
    got, want = (attend(*qkv, evicted_at, q_start) for attend in (shadow_attention, attention_by_loops))
    assert got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-14)
    no_sequence = [x[:0] for x in (*qkv, evicted_at)]
    assert shadow_attention(*no_sequence, q_start).shape == (0, *want.shape[1:])


def test_attention_has_the_right_gradients():
    qkv, evicted_at, q_start = attention_case()
    assert torch.autograd.gradcheck(lambda *x: shadow_attention(*x, evicted_at, q_start), qkv)
    out = shadow_attention(*qkv, evicted_at, q_start)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), qkv)
    assert (dk[:, :, 3] == 0).all() and (dv[:, :, 3] == 0).all(), "a hidden key has a gradient"
    assert (out[1, 2:] == 0).all() and (dq[1, 2:] == 0).all(), "a query that sees nothing is not zero"
    assert dk[0].abs().amax(-1)[:, 2].min() > 0, "control: a visible key has one"


BAD_INPUT = {
    "values-of-another-length": (lambda q, k, v, e: (q, k, v[:, :, 1:], e), "shapes do not fit"),
    "mask-of-fewer-heads": (lambda q, k, v, e: (q, k, v, e[:, :1]), "shapes do not fit"),
    "keys-without-dimensions": (lambda q, k, v, e: (q, k[0, 0, 0], v, e), "shapes do not fit"),
    "three-heads-for-two": (lambda q, k, v, e: (q[:, :3], k, v, e), "multiple of kv heads"),
    "mask-of-int64": (lambda q, k, v, e: (q, k, v, e.long()), "evicted_at must be int32, got torch.int64"),
    "two-types": (lambda q, k, v, e: (q, k.half(), v, e), "one floating type"),
    "integers": (lambda q, k, v, e: (q.long(), k.long(), v.long(), e), "one floating type"),
    "mask-on-another-device": (lambda q, k, v, e: (q, k, v, e.to("meta")), "on one device"),
    "queries-before-the-start": (lambda q, k, v, e: (q, k, v, e, -1), "q_start must be at least 0, got -1"),
    "unknown-backend": (lambda q, k, v, e: (q, k, v, e, 0, "cuda12"), "backend must be one of torch, triton"),
}


@pytest.mark.parametrize("change, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(change, message):
    qkv, evicted_at, _ = attention_case()
    args = change(*(x.detach().to(DEVICE) for x in qkv), evicted_at.to(DEVICE))
    with pytest.raises(ValueError, match=message):
        shadow_attention(*args)


@pytest.mark.parametrize("pad", [(0, 0, 0), (3, 0, 7)], ids=["no-padding", "padding"])
def test_causal_attention_ignores_padding(pad):
    generator, pad_B = torch.Generator().manual_seed(0), torch.tensor(pad)
    q = torch.randn(3, 4, 9, 6, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 3, 2, 9, 6, dtype=torch.float64, generator=generator)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    real = torch.arange(9) >= pad_B[:, None]
    full_mask = never_evicted(pad_B, 9).expand(-1, 2, -1)
    outs = [causal_attention(*qkv, pad_B if pad_B.any() else None), shadow_attention(*qkv, full_mask)]
    assert outs[0].isfinite().all()
    outs = [out.transpose(1, 2)[real] for out in outs]
    compare("out", *outs, 1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), qkv) for out in outs]
    for name, got, want in zip("qkv", *gradients, strict=True):
        compare(f"gradient in {name}", got, want, 1e-13)
    if pad_B.any():
        with_padding = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2)[real]
        assert (with_padding - outs[1]).abs().max() > 1e-2, "control: padding that is attended to is noticed"


# --- b. the Triton kernels equal the definition ---

needs_triton = pytest.mark.skipif(kernel.triton is None, reason="triton is for Linux only")
# under the interpreter of triton 3.7.1, the product of two bfloat16 matrices is wrong
DTYPES = kernel.DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)


def shadow_masks(kind: str, B: int, G: int, T: int) -> Tensor:
    """evicted_at (B, G, T); all sequences but the first are left-padded by a fifth."""
    generator = torch.Generator().manual_seed(0)
    j, prompt = torch.arange(T), T * 7 // 8
    if kind == "random":
        evicted_at = j + torch.randint(0, T + 1, (B * G, T), generator=generator)
    elif kind == "compressed":  # 40 % of the prompt survives its end
        evicted = (j < prompt) & (torch.rand(B * G, T, generator=generator) > 0.4)
        evicted_at = torch.where(evicted, prompt, NEVER)
    elif kind == "rolling":  # every 8 tokens, some keys are evicted
        evicted_at = (j // 8 + torch.randint(1, 7, (B * G, T), generator=generator)) * 8
    else:
        evicted_at = torch.zeros(B * G, T)
    evicted_at = evicted_at.view(B, G, T).to(torch.int32)
    evicted_at[1:, :, : T // 5] = 0
    return evicted_at


def plain_attention(q, k, v, evicted_at, q_start):
    """PyTorch in the tensors' own precision: the kernels' rounding is measured against it."""
    k, v, evicted_at = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v, evicted_at))
    i, j = q_start + torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    hidden = (j > i) | (i >= evicted_at[:, :, None])
    score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
    return score.softmax(dim=-1).masked_fill(hidden, 0) @ v


KERNEL_CASES = {  # T, D, G, H/G, q_start, kind of mask
    "one-query": (1, 16, 1, 1, 0, "random"),
    "a-block-and-one": (17, 32, 2, 2, 0, "random"),
    "width-48": (40, 48, 1, 2, 0, "compressed"),
    "nothing-visible": (63, 16, 2, 1, 40, "nothing"),
    "rolling-eviction": (60, 32, 1, 2, 0, "rolling"),
    "response-after-compression": (100, 32, 2, 1, 87, "compressed"),
    "four-heads-to-one": (40, 64, 1, 4, 0, "compressed"),
    "start-within-a-block": (50, 48, 1, 2, 5, "rolling"),
    "several-tiles": (129, 16, 1, 1, 0, "random"),
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_kernels_err_no_more_than_plain_code(case, dtype):
    T, D, G, M, q_start, kind = case
    generator = torch.Generator().manual_seed(0)
    of_queries, of_keys = (2, G * M, T - q_start, D), (2, G, T, D)
    shapes = of_queries, of_keys, of_keys, of_queries
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]
    evicted_at = shadow_masks(kind, 2, G, T).to(DEVICE)

    def run(attention, *tensors):
        *qkv, do = (x.detach().requires_grad_() for x in tensors)
        out = attention(*qkv, evicted_at, q_start)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, qkv, do.detach()))]

    exact = [x.double() for x in tensors]
    # where a query sees nothing, plain code has 0 / 0
    want, plain = ([x.nan_to_num(0.0) for x in run(plain_attention, *inputs)] for inputs in (exact, tensors))
    got = run(functools.partial(shadow_attention, backend="triton"), *tensors)
    for name, g, p, w in zip(("out", "dq", "dk", "dv"), got, plain, want, strict=True):
        # twice the error of plain code, and four roundings of a number of order one
        compare(name, g, w, 2 * (p - w).abs().max().item() + 4 * torch.finfo(dtype).eps)
    if kind == "nothing":
        assert all((x == 0).all() for x in got), "hidden keys and queries that see nothing have exact zeros"


def kernel_case() -> tuple[list[Tensor], Tensor]:
    """Two heads read one kv head in a block and a half; the second sequence is padded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 48, 32, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    return [x.requires_grad_() for x in (q, k, v)], shadow_masks("random", 2, 1, 48).to(DEVICE)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_attention_is_deterministic_and_a_hidden_key_changes_nothing(backend):
    (q, k, v), evicted_at = kernel_case()
    evicted_at[:, :, 7] = 0

    def run(k, v):
        out = shadow_attention(q, k, v, evicted_at, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    before = run(k, v)
    assert (before[2][:, :, 7] == 0).all() and (before[3][:, :, 7] == 0).all(), "its gradient is not zero"
    assert all(torch.equal(a, b) for a, b in zip(before, run(k, v), strict=True)), "not deterministic"
    for key, hidden in ((7, True), (8, False)):
        louder = [x.detach().index_fill(2, torch.tensor([key], device=DEVICE), 50.0) for x in (k, v)]
        assert torch.equal(shadow_attention(q, *louder, evicted_at, backend=backend), before[0]) == hidden


@needs_triton
def test_kernels_take_strided_inputs():
    """Would catch an offset that takes a view for contiguous: in q, k, v, in the mask, or in the gradient."""
    qkv, evicted_at = kernel_case()
    evicted_at = evicted_at[:1]
    strided = [torch.stack((x, -x), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in qkv]
    assert not strided[0].is_contiguous()
    got = shadow_attention(*strided, evicted_at.expand(2, -1, -1), backend="triton")
    want = shadow_attention(*qkv, evicted_at.repeat(2, 1, 1), backend="torch")
    compare("out", got, want, 1e-5)
    scale = torch.arange(2.0, device=DEVICE)[:, None]  # makes a gradient with strides
    gradients = [torch.autograd.grad((out.transpose(1, 2) * scale).sum(), qkv) for out in (got, want)]
    for name, a, b in zip("qkv", *gradients, strict=True):
        compare(f"gradient in {name}", a, b, 1e-5)


@needs_triton
@pytest.mark.parametrize("B, Tq, Tk", [(0, 5, 5), (2, 0, 5), (2, 3, 0)], ids=["no-sequence", "no-query", "no-key"])
def test_kernels_take_empty_inputs(B, Tq, Tk):
    q, k, v = (torch.randn(B, 2, T, 16, device=DEVICE, requires_grad=True) for T in (Tq, Tk, Tk))
    evicted_at = torch.zeros(B, 2, Tk, dtype=torch.int32, device=DEVICE)
    out = shadow_attention(q, k, v, evicted_at, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape and all((x.grad == 0).all() for x in (q, k, v))


@needs_triton
@pytest.mark.parametrize("method", ["dense", "naive", "smd"])
def test_the_learner_through_the_kernels_is_the_learner(method, monkeypatch):
    model = small_model(torch.float32, heads=2, kv_heads=1)
    eviction = None if method == "dense" else EVICTION
    rollout = ragged_rollout(model, eviction, samples=2, max_new=6, lengths=(17, 9))
    tensors = {name: x.to(DEVICE) for name, x in vars(rollout).items() if isinstance(x, Tensor)}
    model, rollout = model.to(DEVICE), replace(rollout, **tensors)
    loss, want, _ = learner(model, rollout, method, backend="torch")
    monkeypatch.setitem(kernel.BACKENDS, "torch", lambda *_: pytest.fail("a part of the learner took another backend"))
    through, got, row = learner(model, rollout, method, backend="triton")
    assert math.isclose(loss.item(), through.item(), rel_tol=1e-4)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert row.get("replay_error", 0.0) < 1e-5


@needs_triton
def test_what_the_kernels_cannot_do_is_named():
    (q, k, v), evicted_at = kernel_case()
    for qkv, message in (
        ([x.double() for x in (q, k, v)], "takes float32, bfloat16, float16, got torch.float64; take 'torch'"),
        ([x.repeat(1, 1, 1, 5) for x in (q, k, v)], "takes head dims up to 128, got 160; take 'torch'"),
    ):
        with pytest.raises(ValueError, match=message):
            shadow_attention(*qkv, evicted_at, backend="triton")


# --- c. the sampler equals a list of keys, and the replay equals the sampler ---


def small_model(dtype=torch.float64, seed=0, **changes) -> TinyModel:
    """Random weights, doubled: attention is sharp enough for an eviction to matter."""
    config = ModelConfig(**dict(vocab=20, width=32, layers=2, heads=4, kv_heads=2, ffn=48) | changes)
    model = TinyModel(config, seed=seed).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def hashed(*index: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the indices alone, so that sampler and oracle draw the same."""
    x = torch.zeros((), dtype=torch.int64)
    for i in index:
        x = (x + i + 1) * 0x2545F4914F6CDD1D
        x = x ^ (x >> 31)
    return ((x >> 10) & (2**53 - 1)).double() * 2**-53


def ragged_prompts(lengths=(17, 13, 30, 12)) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, left-padded."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(EOS, (n,), generator=generator) for n in lengths]
    pad_N = torch.tensor([max(lengths) - n for n in lengths])
    padded = [F.pad(row, (pad, 0), value=EOS) for row, pad in zip(rows, pad_N.tolist(), strict=True)]
    return torch.stack(padded), pad_N


EVICTION = Eviction("snapkv", 8, interval=3, window=3, sinks=2, pool=3)


def ragged_rollout(model, eviction=EVICTION, lengths=(17, 13, 30, 12), samples=3, max_new=14, eos=EOS) -> Rollout:
    return smd.sample(model, *ragged_prompts(lengths), samples, max_new, eos, eviction, functools.partial(hashed, 0))


def replayed_logp(model, rollout, evicted_at_LBGT) -> Tensor:
    (hidden_XC,) = smd.replay(model, rollout, evicted_at_LBGT)
    return smd.response_logp(model, rollout, hidden_XC)[rollout.mask_BR]


@dataclasses.dataclass(eq=False)
class Key:
    """A key that one kv head still holds."""

    column: int
    key: np.ndarray
    value: np.ndarray
    received: float = 0.0  # attention so far


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


class Oracle:
    """One sequence without padding, a token and a kv head at a time, from explicit lists of the keys still held.

    Its own RMSNorm, rotary embedding, attention and SwiGLU, in numpy; its own score of each policy, a method of the
    policy's name. It shares with the code under test the weights, and which keys a policy always keeps (`PolicySpec`).
    A new policy is proven by one more method. `logp`: log-probs of the response. `evicted_at`: by layer and kv head,
    the position of the first query that no longer sees a key, by the key's column.
    """

    def __init__(self, model, prompt: list[int], response: list[int], eviction: Eviction, uniform, rows: tuple):
        self.c, self.w = model.config, {name: w.double().numpy() for name, w in model.state_dict().items()}
        self.eviction, self.spec = eviction, smd.POLICIES[eviction.policy]
        self.uniform, self.rows = uniform, rows
        self.P, self.M = len(prompt), self.c.heads // self.c.kv_heads
        share = isinstance(eviction.budget, Fraction)
        self.budget = math.ceil(eviction.budget * self.P) if share else eviction.budget
        pairs = list(itertools.product(range(self.c.layers), range(self.c.kv_heads)))
        self.held = {pair: [] for pair in pairs}
        self.queries = {pair: [] for pair in itertools.product(range(self.c.layers), range(self.c.heads))}
        self.evicted_at = {pair: {} for pair in pairs}
        logps, fed = [], prompt + response[:-1]
        for column, token in enumerate(fed):
            p = softmax(self.feed(column, token))
            done = column + 1 - self.P  # tokens of the response
            if done >= 0:
                logps.append(math.log(p[response[done]]))
            # an eviction after the last query would hide nothing
            if done >= 0 and done % eviction.interval == 0 and column + 1 < len(fed):
                kept = {pair: self.survivors(*pair, now=column + 1) for pair in pairs}
                for pair in pairs:
                    evicted = (key for key in self.held[pair] if key not in kept[pair])
                    self.evicted_at[pair] |= {key.column: column + 1 for key in evicted}
                self.held = kept
        self.logp = torch.tensor(logps, dtype=torch.float64)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean() + self.c.norm_eps) * self.w[name + ".weight"]

    def turn(self, x, position):
        half = self.c.head_dim // 2
        angle = position * self.c.rope_theta ** (-2 * np.arange(half) / self.c.head_dim)
        lo, hi = x[:half], x[half:]
        return np.concatenate((lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)))

    def scores(self, query, keys):
        return np.array([key.key for key in keys]) @ query / math.sqrt(self.c.head_dim)

    def feed(self, column, token):
        x = self.w["embed_tokens.weight"][token]
        for layer in range(self.c.layers):
            name = f"layers.{layer}."
            y = self.norm(x, name + "input_layernorm")
            projected = (self.w[f"{name}self_attn.{p}_proj.weight"] @ y for p in ("q", "k", "v"))
            q, k, v = (p.reshape(-1, self.c.head_dim) for p in projected)
            for g in range(self.c.kv_heads):
                self.held[layer, g].append(Key(column, self.turn(k[g], column), v[g]))
            outs = []
            for h in range(self.c.heads):
                keys, query = self.held[layer, h // self.M], self.turn(q[h], column)
                self.queries[layer, h].append((column, query))
                weight = softmax(self.scores(query, keys))
                for key, share in zip(keys, weight, strict=True):
                    key.received += share
                outs.append(weight @ np.array([key.value for key in keys]))
            x = x + self.w[name + "self_attn.o_proj.weight"] @ np.concatenate(outs)
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = (self.w[f"{name}mlp.{p}_proj.weight"] @ y for p in ("gate", "up"))
            x = x + self.w[name + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.w["lm_head.weight"] @ self.norm(x, "norm")

    def survivors(self, layer, g, now):
        e, keys = self.eviction, self.held[layer, g]
        protected = self.P if e.protect else 0
        count = self.budget + sum(key.column < protected for key in keys)
        if len(keys) <= count:
            return keys
        # in float32: scores that differ by less than its rounding tie
        score = np.array(getattr(self, e.policy)(layer, g, keys, now), dtype=np.float32)
        sinks = e.sinks if self.spec.keeps_sinks and not e.protect else 0
        window = e.window if self.spec.keeps_window else 0
        for n, key in enumerate(keys):
            if key.column < max(sinks, protected) or key.column >= now - window:
                score[n] = math.inf
        ranked = sorted(range(len(keys)), key=lambda n: -score[n])  # stable: of a tie the earlier key stays
        return [keys[n] for n in sorted(ranked[:count])]

    def window_rows(self, layer, g, keys):
        """Column and scores of the last queries of each head that reads this kv head; -inf for later keys."""
        columns = np.array([key.column for key in keys])
        for h in range(g * self.M, (g + 1) * self.M):
            for at, query in self.queries[layer, h][-self.eviction.window :]:
                yield at, np.where(columns > at, -math.inf, self.scores(query, keys))

    def streaming(self, layer, g, keys, now):
        return [key.column for key in keys]

    def snapkv(self, layer, g, keys, now):
        half = self.eviction.pool // 2
        # means, as in the definition: which scores tie in float32 depends on their scale
        total = sum(softmax(row) for _, row in self.window_rows(layer, g, keys)) / (self.M * self.eviction.window)
        total = [0.0 if key.column >= now - self.eviction.window else t for key, t in zip(keys, total, strict=True)]
        return [sum(total[max(0, n - half) : n + half + 1]) / self.eviction.pool for n in range(len(keys))]

    def h2o(self, layer, g, keys, now):
        latest = self.budget - self.budget // 2
        return [math.inf if key.column >= now - latest else key.received for key in keys]

    def tova(self, layer, g, keys, now):
        total = 0.0
        for h in range(self.c.heads):
            total += softmax(self.scores(self.queries[layer, h][-1][1], self.held[layer, h // self.M])) / self.c.heads
        return [*total[:-1], math.inf]

    def knorm(self, layer, g, keys, now):
        return [-round(1000 * math.log(np.linalg.norm(key.key))) for key in keys]

    def rkv(self, layer, g, keys, now):
        window = np.array([key.column >= now - self.eviction.window for key in keys])
        best = {}
        for at, row in self.window_rows(layer, g, keys):
            row[window] = -math.inf
            best[at] = np.maximum(best[at], row) if at in best else row
        attention = sum(softmax(row) for row in best.values()) / len(best)
        pooled = np.array([attention[max(0, n - 3) : n + 4].max() for n in range(len(keys))])
        unit = np.array([key.key / np.linalg.norm(key.key) for key in keys])
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, 0.0)
        for row in cosine:
            alike = np.flatnonzero(row > 0.5)
            row[alike[-1:]] = 0.0
        return 0.07 * pooled - 0.93 * softmax(cosine.mean(axis=0))

    def random(self, layer, g, keys, now):
        prompt_row, sequence_row = self.rows
        row = sequence_row if now > self.P else prompt_row
        return [self.uniform(layer, now, g, key.column, row).item() for key in keys]


def check_against_oracle(model, rollout, eviction) -> None:
    """Log-probs and shadow mask of the second sample of each prompt, and the mask's padding."""
    B, S = len(rollout.response_BR), len(rollout.response_BR) // len(rollout.prompt_NP)
    for b in range(1, B, S):
        pad, length = rollout.pad_N[b // S].item(), rollout.length_B[b].item()
        prompt, response = rollout.prompt_NP[b // S, pad:].tolist(), rollout.response_BR[b, :length].tolist()
        oracle = Oracle(model, prompt, response, eviction, functools.partial(hashed, 0), (B + b // S, b))
        compare(f"log-probs of sequence {b}", rollout.logp_BR[b, :length], oracle.logp, 1e-10)
        assert (rollout.logp_BR[b, length:] == 0).all(), "there is a log-prob after the end"
        end = pad + len(prompt) + length
        for (layer, g), evicted_at in oracle.evicted_at.items():
            columns = range(len(prompt) + length)
            want = [0] * pad + [pad + evicted_at[n] if n in evicted_at else NEVER for n in columns]
            got = rollout.evicted_at_LBGT[layer, b, g].tolist()
            assert got[:end] == want, f"sequence {b}, layer {layer}, kv head {g}"
            assert not any(got[end:]), "columns after the end are not marked as padding"


CASES = {  # kv heads for 4 query heads, then what differs from `EVICTION`, and from `ragged_rollout`
    "grouped-heads": (2, {}, {}),
    "eviction-at-every-token": (4, dict(interval=1), {}),
    "one-key-less-than-the-prompt": (2, dict(budget=29), {}),
    "share-of-the-prompt": (2, dict(budget=Fraction(2, 5)), {}),
    "protected-prompt": (2, dict(budget=5, sinks=4, protect="prompt"), dict(lengths=(17, 2, 30, 12), max_new=24)),
    "prompt-shorter-than-window": (2, dict(window=6), dict(lengths=(4, 3), samples=2, max_new=24)),
}
every_case = pytest.mark.parametrize("case", CASES)
every_policy = pytest.mark.parametrize("policy", smd.POLICIES)


@functools.cache
def sampled(policy: str, case: str, dtype=torch.float64) -> tuple[TinyModel, Eviction, Rollout]:
    kv_heads, settings, limits = CASES[case]
    model, eviction = small_model(dtype, kv_heads=kv_heads), replace(EVICTION, policy=policy, **settings)
    return model, eviction, ragged_rollout(model, eviction, **limits)


@every_case
@every_policy
@torch.no_grad()
def test_sampler_equals_a_list_of_keys(policy, case):
    """Would catch any key kept or evicted against the policy's definition, at whatever step and in whatever head."""
    model, eviction, rollout = sampled(policy, case)
    P = rollout.prompt_NP.shape[1]
    assert rollout.length_B.min() < rollout.length_B.max(), "no early end of sequence in this rollout"
    assert ((rollout.evicted_at_LBGT > P) & (rollout.evicted_at_LBGT < NEVER)).any(), "nothing was evicted in decoding"
    if eviction.protect:
        assert (rollout.evicted_at_LBGT[..., :P] % NEVER == 0).all(), "a key of the prompt was evicted"
    check_against_oracle(model, rollout, eviction)


@torch.no_grad()
def test_a_new_policy_is_proven_by_its_score(monkeypatch):
    """Attention times the norm of the value: one function and one line for the sampler, one function for the oracle."""

    def attention_times_value(cache):
        return smd.window_attention(cache).mean(dim=(2, 3)) * cache.v_BGKD.norm(dim=-1)

    def by_lists(oracle, layer, g, keys, now):
        attention = sum(softmax(row) for _, row in oracle.window_rows(layer, g, keys))
        return attention * [np.linalg.norm(key.value) for key in keys]

    monkeypatch.setitem(smd.POLICIES, "new", PolicySpec(attention_times_value, keeps_window=True, reads_queries=True))
    monkeypatch.setattr(Oracle, "new", by_lists, raising=False)
    model, eviction, rollout = sampled("new", "grouped-heads")
    check_against_oracle(model, rollout, eviction)
    drawn = rollout.logp_BR[rollout.mask_BR]
    compare("replay", replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, 1e-10)
    monkeypatch.setattr(Oracle, "new", Oracle.snapkv)
    with pytest.raises(AssertionError):
        check_against_oracle(model, rollout, eviction)


# keys that a policy always keeps, of 2 sinks and a window of 3; the oracle takes them from `PolicySpec`
LEAST = dict(streaming=2 + 1, snapkv=2 + 3, h2o=1, tova=1, knorm=1, rkv=3, random=2 + 3)


@every_policy
@torch.no_grad()
def test_sinks_and_window_are_always_kept(policy):
    eviction, prompts = replace(EVICTION, policy=policy, budget=LEAST[policy]), ragged_prompts()
    kept = smd.sample(small_model(), *prompts, 1, 2, -1, eviction).evicted_at_LBGT[..., :30] > 30
    assert (kept.sum(dim=-1) == LEAST[policy]).all()
    for n, pad in enumerate(prompts[1].tolist()):
        assert policy not in ("streaming", "snapkv", "random") or kept[:, n, :, pad : pad + 2].all()
        assert policy not in ("snapkv", "rkv", "random") or kept[:, n, :, -3:].all()
    with pytest.raises(ValueError, match=f"budget must be at least {LEAST[policy]} for {policy}, got 0"):
        smd.sample(small_model(), *prompts, 1, 2, -1, replace(eviction, budget=0))
    # where the prompt is protected, its first keys need no sinks
    assert replace(eviction, protect="prompt").minimum_budget() == dict(snapkv=3, rkv=3, random=3).get(policy, 1)


@pytest.mark.parametrize("policy", ["knorm", "rkv"])
def test_of_keys_that_tie_the_earlier_one_is_kept(policy):
    """Would catch ties that rounding breaks in another way with another precision, padding or direction of the keys."""
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(30, 1, 8, dtype=torch.float64, generator=generator), dim=-1)
    # knorm: equal norms. rkv: equal directions, so that all keys before the window are equally redundant
    length = torch.ones(20, 1) if policy == "knorm" else torch.arange(1, 21)[:, None]
    want = dict(knorm=[0, 1, 2, 3, 4, 5], rkv=[0, 1, 2, 17, 18, 19])[policy]
    for key, dtype, pad in itertools.product(direction * length, (torch.float64, torch.float32), (0, 3, 13)):
        k, K = F.pad(key, (0, 0, pad, 0), value=1.0)[None, None].to(dtype), 20 + pad
        column = torch.arange(K).expand(1, 1, K)
        limits = torch.tensor([pad]), torch.tensor([6]), torch.tensor([0])
        rows = *limits, k, k, column, column >= pad, column.int(), torch.zeros_like(k[:, :, :3])
        evicted, valid = smd.eviction_mask(smd.LayerCache(replace(EVICTION, policy=policy), hashed, 0, K, K, *rows))
        assert valid and (column[(column >= pad) & ~evicted] - pad).tolist() == want


@torch.no_grad()
def test_random_is_uniform_between_sinks_and_window():
    """At five standard deviations. 600 prompts of 12 tokens keep 6 keys each: the sink, the last two, and 3 of 9."""
    prompts, eviction = (torch.full((600, 12), 7), torch.zeros(600).long()), Eviction("random", 6, window=2)
    torch.manual_seed(0)
    kept_LBGT = smd.sample(small_model(), *prompts, 1, 2, -1, eviction).evicted_at_LBGT[..., :12] > 12
    assert kept_LBGT[..., [0, 10, 11]].all() and (kept_LBGT.sum(dim=-1) == 6).all()
    share_LGT = kept_LBGT[..., 1:10].double().mean(dim=1)
    assert (share_LGT - 1 / 3).abs().max() < 5 * math.sqrt(1 / 3 * 2 / 3 / 600)
    for a, b in itertools.combinations(kept_LBGT[..., 1:10].transpose(1, 2).flatten(0, 1), 2):
        both = (a & b).double().mean()
        assert abs(both - 1 / 9) < 5 * math.sqrt(1 / 9 * 8 / 9 / 5400), "two heads do not choose independently"


@every_case
@every_policy
@torch.no_grad()
def test_replay_equals_sampler(policy, case):
    """Would catch a mask rebuilt by another rule, a head or layer mixed up, padding or RoPE off by one."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, _, rollout = sampled(policy, case, dtype)
        drawn = rollout.logp_BR[rollout.mask_BR]
        compare(str(dtype), replayed_logp(model, rollout, rollout.evicted_at_LBGT), drawn, tolerance)


@pytest.mark.parametrize("shift", [None, -1, 1], ids=["dense", "one-query-early", "one-query-late"])
@every_policy
@torch.no_grad()
def test_a_wrong_mask_is_noticed(policy, shift):
    model, _, rollout = sampled(policy, "grouped-heads")
    mask = rollout.never_evicted_LBGT
    if shift is not None:
        evicted = (rollout.evicted_at_LBGT > 0) & (rollout.evicted_at_LBGT < NEVER)
        mask = rollout.evicted_at_LBGT + shift * evicted.int()
    error = replayed_logp(model, rollout, mask) - rollout.logp_BR[rollout.mask_BR]
    assert error.abs().max() > 1e-3


@pytest.mark.parametrize("layers, right", [(1, True), (2, False)], ids=["one-layer", "two-layers"])
@torch.no_grad()
def test_deleting_evicted_tokens_is_wrong_above_the_first_layer(layers, right):
    """The keys that were kept above the first layer depend on the tokens that were evicted."""
    model, P = small_model(layers=layers), 30
    rollout = ragged_rollout(model, Eviction("tova", 12), lengths=(P,), samples=1, max_new=10, eos=-1)
    gone = (rollout.evicted_at_LBGT == P).all(dim=(0, 1, 2))  # no query of the response sees these tokens
    assert 5 < gone.sum() < P
    deleted_LBGT = rollout.evicted_at_LBGT.masked_fill(gone, 0)  # nor does any query of the prompt
    tokens = torch.cat((rollout.prompt_NP, rollout.response_BR[:, :-1]), dim=1)
    hidden = model(tokens, rollout.pad_N, deleted_LBGT[..., :-1])[0, P - 1 :]
    error = smd.gather_logp(model.log_probs(hidden), rollout.response_BR[0]) - rollout.logp_BR[0]
    error = error[1:].abs().max()  # the first token is predicted by the prompt
    assert error < 1e-12 if right else error > 1e-2


@every_policy
def test_a_budget_that_holds_everything_is_the_dense_model(policy):
    """Log-probs, shadow mask and gradient are those of a dense model, and track 2 adds nothing."""
    model = small_model()
    for budget, dense in ((60, True), (8, False)):
        rollout = ragged_rollout(model, replace(EVICTION, policy=policy, budget=budget))
        pad_B, P = rollout.pad_N.repeat_interleave(3), rollout.prompt_NP.shape[1]
        tokens = torch.cat((rollout.prompt_NP.repeat_interleave(3, dim=0), rollout.response_BR[:, :-1]), dim=1)
        with torch.no_grad():
            hidden_BTC = model(tokens, pad_B, never_evicted(pad_B, tokens.shape[1]).expand(2, -1, 2, -1))
        logp_BR = smd.response_logp(model, rollout, hidden_BTC[:, P - 1 :][rollout.mask_BR])
        assert torch.allclose(rollout.logp_BR, logp_BR, rtol=0, atol=1e-12) == dense
        assert torch.equal(rollout.evicted_at_LBGT, rollout.never_evicted_LBGT) == dense
        want = learner(model, rollout, "dense")[1]
        for lam in (0.0, 1.0):
            got = learner(model, rollout, "smd", lam)[1]
            assert torch.allclose(got, want, rtol=1e-10, atol=1e-11) == dense


def chi_square_p(counts: Tensor, p: Tensor) -> float:
    """Chance of frequencies at least as far from p, if they are drawn from p (Pearson's χ² test)."""
    expected = counts.sum() * p
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(p) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@torch.no_grad()
def test_draws_follow_the_recorded_distribution():
    """At the level of 1 in 1,000: first tokens, and second ones after the first token that was drawn most often."""
    model, prompts, S = small_model(layers=1), ragged_prompts((17,)), 20_000
    model.embed_tokens.weight.mul_(4.0)  # sharper distributions
    eviction = Eviction("snapkv", 8, interval=1, window=2)
    torch.manual_seed(0)
    drawn = smd.sample(model, *prompts, S, 2, -1, eviction).response_BR
    every = torch.arange(20)
    first_counts = torch.bincount(drawn[:, 0], minlength=20)
    prefix = first_counts.argmax()
    second_counts = torch.bincount(drawn[drawn[:, 0] == prefix, 1], minlength=20)
    for t, first, counts in ((0, every, first_counts), (1, prefix.expand(20), second_counts)):
        forced_BR = torch.stack((first, every), dim=1)
        p = smd.sample(model, *prompts, 20, 2, -1, eviction, forced_BR=forced_BR).logp_BR[:, t].exp()
        assert abs(p.sum() - 1) < 1e-12
        assert chi_square_p(counts, p) > 1e-3
        assert chi_square_p(counts, p.pow(0.9) / p.pow(0.9).sum()) < 1e-6, "control: another temperature"


@torch.no_grad()
def test_forced_tokens_are_scored_as_drawn_ones():
    model = small_model()
    drawn = ragged_rollout(model)
    limits = 3, drawn.response_BR.shape[1], EOS, EVICTION
    forced = smd.sample(model, drawn.prompt_NP, drawn.pad_N, *limits, forced_BR=drawn.response_BR)
    for name, want in vars(drawn).items():
        got = getattr(forced, name)
        assert torch.equal(got, want) if isinstance(want, Tensor) else got == want, name
    with pytest.raises(dataclasses.FrozenInstanceError):
        drawn.logp_BR = None


@torch.no_grad()
def test_any_of_several_eos_tokens_ends_a_response():
    endless, ended = (ragged_rollout(small_model(), max_new=30, eos=eos) for eos in (-1, (3, EOS)))
    assert endless.length_B.tolist() == [30] * 12
    last = set()
    for b, length in enumerate(ended.length_B.tolist()):
        whole, tokens = endless.response_BR[b].tolist(), ended.response_BR[b].tolist()
        assert tokens[:length] == whole[:length] and not {3, EOS} & set(tokens[: length - 1])
        assert set(tokens[length:]) <= {3}, "padded by another token than the first EOS"
        last.add(tokens[length - 1])
    assert {3, EOS} <= last


def test_an_eviction_after_the_last_query_hides_nothing():
    """A prompt of two columns, a response in 2, 3, 4 whose last query is in column 3, as in `finished_mask`."""
    recorded = torch.tensor([2, 3, 4, NEVER, NEVER, NEVER, 0], dtype=torch.int32)
    got = smd.finished_mask(recorded.view(1, 1, 1, 7), torch.tensor([5]))
    assert got.flatten().tolist() == [2, 3, NEVER, NEVER, NEVER, 0, 0]


@pytest.mark.parametrize("max_new", [1, 2, 3, 40])
@torch.no_grad()
def test_numbers_that_are_not_finite_end_the_sampler(max_new, monkeypatch):
    model, limits = small_model(), dict(max_new=max_new, eos=-1, eviction=Eviction("knorm", 8, interval=20))
    assert ragged_rollout(model, **limits).evicted_at_LBGT.shape == (2, 12, 2, 30 + max_new)
    nan_score = smd.POLICIES["knorm"]._replace(score=lambda cache: cache.keys()[..., 0] * math.nan)
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="or the scores of its keys, are not"):
        patch.setitem(smd.POLICIES, "knorm", nan_score)
        ragged_rollout(model, **limits)
    model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="the policy's logits, or the scores of its keys, are not finite"):
        ragged_rollout(model, **limits)


# --- d. which gradient each method follows ---


def gradient(loss: Tensor, model: TinyModel) -> Tensor:
    """Gradient of the loss in all weights, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return ((got - want).norm() / want.norm()).item()


def learner(model, rollout, method, lam=0.1, backend=None, advantage_B=None, weight_BR=None) -> tuple:
    """Loss, gradient and figures of a method, with given advantages and weights; by default any advantages."""
    B, R = rollout.logp_BR.shape
    advantage_B = torch.linspace(-1, 1, B) if advantage_B is None else advantage_B
    config, runtime = Config(method, lam=lam, max_new=R), Runtime(backend=backend)
    batch = smd.make_batch(model, rollout, torch.zeros(B), config, runtime)
    batch = replace(batch, extra={"advantage_BR": advantage_B.to(rollout.logp_BR)[:, None].expand(B, R)})
    batch = batch if weight_BR is None else replace(batch, weight_BR=weight_BR)
    loss, row = smd.learner_loss(model, batch, batch.totals(runtime), config, runtime)
    return loss, gradient(loss, model), row


class World:
    """One prompt and all its responses, with a reward for each and what the sampler recorded: expectations are sums.

    4 tokens, a prompt of 12, responses of 3 tokens, so that there are 64; the sampler's budget is 8 keys.
    """

    EVICTION = Eviction("snapkv", 8, interval=1, window=2, sinks=1, pool=5)

    def __init__(self, seed: int = 4, length: int = 3):
        # larger weights than a fresh model has: attention and distributions sharp enough for the policies to differ
        config = ModelConfig(vocab=4, width=16, layers=2, heads=2, kv_heads=1, ffn=24)
        self.model = TinyModel(config, seed).double()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.mul_(15.0 if name.startswith("embed") else 3.0 if p.ndim == 2 else 1.0)
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(4, (1, 12), generator=generator)
        self.responses = torch.tensor(list(itertools.product(range(4), repeat=length)))
        self.reward = torch.rand(len(self.responses), generator=generator, dtype=torch.float64)
        self.rollout = self.score()

    @property
    def p(self) -> Tensor:
        """Probability of each response."""
        return self.rollout.logp_BR.sum(dim=1).exp()

    def score(self, eviction: Eviction | None = EVICTION) -> Rollout:
        """All responses through the sampler; None for a full cache."""
        limits = *self.responses.shape, -1
        return smd.sample(self.model, self.prompt, torch.tensor([0]), *limits, eviction, forced_BR=self.responses)

    def logits(self, evicted_at_LBGT: Tensor, model: TinyModel | None = None) -> Tensor:
        model = model or self.model
        return model.logits(smd.replay(model, self.rollout, evicted_at_LBGT)[0])

    def logp(self, dense: bool) -> Tensor:
        """Differentiable log-probs (responses, tokens) of π_dense or π_shadow."""
        seen_LBGT = self.rollout.never_evicted_LBGT if dense else self.rollout.evicted_at_LBGT
        return smd.response_logp(self.model, self.rollout, smd.replay(self.model, self.rollout, seen_LBGT)[0])

    def objective_gradient(self, dense: bool) -> Tensor:
        """∇J = ∇ Σ_y p(y) r(y)."""
        return gradient((self.logp(dense).sum(dim=1).exp() * self.reward).sum(), self.model)

    def expected(self, method: str, coefficient_B: Tensor, weight_BR: Tensor | None = None) -> Tensor:
        """-Σ_y coefficient(y) · ∇ of the learner's loss of y with advantage 1, summed over tokens."""
        given = dict(lam=0.0, advantage_B=coefficient_B, weight_BR=weight_BR)
        return -learner(self.model, self.rollout, method, **given)[1] * self.responses.numel()


@pytest.fixture(scope="module")
def world():
    return World()


def test_all_probabilities_sum_to_1_and_responses_evict_differently(world):
    assert abs(world.p.sum() - 1) < 1e-14
    masks = world.rollout.evicted_at_LBGT.transpose(0, 1).flatten(1)
    assert len(masks.unique(dim=0)) > 1
    assert (world.score(None).logp_BR - world.rollout.logp_BR).abs().max() > 0.1, "sparse and dense differ"


@pytest.mark.parametrize("seed", range(3), ids="direction-{}".format)
def test_finite_differences_of_the_sampler_give_the_gradient_of_j_sparse(world, seed):
    """Without the learner. The eviction does not change over the step: its choice of keys has no gradient."""
    expected, weights = world.objective_gradient(dense=False), list(world.model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach()
    direction = torch.randn(len(before), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction /= direction.norm()
    ends = []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(before + step * direction, weights)
        rollout = world.score()
        assert torch.equal(rollout.evicted_at_LBGT, world.rollout.evicted_at_LBGT), "another choice of keys"
        ends.append((rollout.logp_BR.sum(dim=1).exp() * world.reward).sum().item())
    torch.nn.utils.vector_to_parameters(before, weights)
    assert abs((ends[0] - ends[1]) / 2e-5 - expected @ direction) < 1e-6 * expected.norm()


# Relative distance of a method's expected gradient from those of J_sparse and J_dense. 0 is exact, 1 is the distance of
# a zero gradient. One response, its reward less a constant, before the first update, without track 2.
FOLLOWS = {
    "smd": (0, 1.5),
    "naive": (1.1, 0.77),
    "tis": (1.7, 0.30),
    "icepop": (1.8, 0.27),
    "seq_is": (2.0, 0),
    "seq_is-truncated-at-2": (1.9, 0.064),
    "seq_mask": (1.8, 0.19),
    "sparse_rl": (1.5, 0.44),
    "dense": (2.0, 0),
}


def distances(row: str) -> list[float]:
    """Of a method's expected gradient from those of J_sparse and J_dense."""
    world, method = World(), row.split("-")[0]
    wanted = [world.objective_gradient(dense) for dense in (False, True)]
    if method == "dense":  # samples with a full cache
        world.rollout = world.score(None)
    log_ratio, weight = world.logp(dense=True).detach() - world.rollout.logp_BR, None
    if row == "seq_is-truncated-at-2":
        weight = smd.sequence_is(log_ratio, 2.0)
    if row == "sparse_rl":  # divides by the mean weight: the exact one here, not that of a batch
        weight = smd.sparse_rl(log_ratio, 1.5)
        weight = weight / (world.p @ weight.mean(dim=1))
    got = world.expected(method, world.p * (world.reward - 0.3), weight)
    return [distance(got, want) for want in wanted]


@pytest.mark.parametrize("row", FOLLOWS)
def test_which_gradient_a_method_follows(row):
    assert distances(row) == pytest.approx(FOLLOWS[row], rel=0.05, abs=1e-12)


def test_the_baseline_of_a_group_halves_the_gradient_and_its_deviation_turns_it(world):
    """All groups of two: the bias is GRPO's own, and smd neither adds to it nor repairs it."""
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))
    groups, expected = world.reward[torch.stack((first, second), dim=1)], world.objective_gradient(dense=False)
    found = {}
    for norm_std in (False, True):
        advantage = smd.group_advantage(groups, norm_std)
        # the loss is the mean over the two, and each group has probability p p'
        weighted = advantage * (world.p[first] * world.p[second] / 2)[:, None]
        coefficient = torch.zeros(64, dtype=torch.float64)
        coefficient.index_add_(0, first, weighted[:, 0]).index_add_(0, second, weighted[:, 1])
        found[norm_std] = world.expected("smd", coefficient)
    assert distance(found[False], expected / 2) < 1e-12
    assert F.cosine_similarity(found[True], expected, dim=0) < 0.999


def test_the_spread_of_sequence_weights_never_falls_as_responses_grow():
    world = World(length=5)
    with torch.no_grad():
        log_ratio = (world.logp(dense=True) - world.rollout.logp_BR).cumsum(dim=1)
    second_moment = world.p @ (2 * log_ratio).exp()  # of the weight of the first 1 to 5 tokens
    assert second_moment[0] >= 1 and (second_moment.diff() >= -1e-12).all()
    assert second_moment[-1] > 1.1 * second_moment[0], "control: here it grows"
    assert (world.p @ log_ratio.exp() - 1).abs().max() < 1e-12, "the mean weight is 1 at any length"


def test_track_2_is_the_gradient_of_the_enumerated_kl(world):
    """Against a sum over the vocabulary; π_sparse comes from the sampler, so no gradient reaches it."""
    masks = world.rollout.never_evicted_LBGT, world.rollout.evicted_at_LBGT
    dense, shadow = (world.logits(mask).view(64, 3, 4).log_softmax(-1) for mask in masks)
    # log π_sparse(v | prefix) is what the sampler recorded for the response that goes on with v
    sparse = torch.empty_like(dense)
    index = {tuple(y): n for n, y in enumerate(world.responses.tolist())}
    for (y, n), t, v in itertools.product(index.items(), range(3), range(4)):
        sparse[n, t, v] = world.rollout.logp_BR[index[(*y[:t], v, *y[t + 1 :])], t]
    want, attached = ((dense.exp() * (dense - q)).sum(dim=-1).mean() for q in (sparse, shadow))
    for p, q, name in ((dense, sparse, "forward"), (sparse, dense, "reverse")):
        by_hand = (p.exp() * (p - q)).sum(dim=-1)
        compare(name, smd.kl_divergence(p.flatten(0, 1), q.flatten(0, 1)), by_hand.flatten(), 1e-12)
    assert abs(by_hand.mean() - want) > 1e-4, "control: the two directions differ"
    with_track, without = (learner(world.model, world.rollout, "smd", lam=lam) for lam in (0.7, 0.0))
    compare("loss", with_track[0] - without[0], 0.7 * want, 1e-12)
    found = with_track[1] - without[1]
    compare("gradient", found, 0.7 * gradient(want, world.model), 1e-10)
    assert distance(found, 0.7 * gradient(attached, world.model)) > 0.1, "control: a gradient into the shadow logits"


# --- e. each loss by hand, and training ---


def test_weights_by_hand():
    """Rows are sequences; the second ends after its first token, so its other log-ratio is 0."""
    ratio, vetoed, just_not = ([[4.0, x], [0.25, 1.0]] for x in (0.5, 9e-5, 1.1e-4))
    for weight, rows, cap, want in (
        (smd.token_is, ratio, 2.0, [[2.0, 0.5], [0.25, 1.0]]),
        (smd.icepop, ratio, 5.0, [[4.0, 0.5], [0.0, 1.0]]),
        (smd.icepop, ratio, 3.9, [[0.0, 0.5], [0.0, 1.0]]),
        (smd.sequence_is, ratio, math.inf, [[2.0, 2.0], [0.25, 0.25]]),
        (smd.sequence_is, ratio, 1.5, [[1.5, 1.5], [0.25, 0.25]]),
        (smd.sequence_mask, ratio, 2.1, [[2.0, 2.0], [0.25, 0.25]]),
        (smd.sequence_mask, ratio, 1.9, [[0.0, 0.0], [0.25, 0.25]]),
        (smd.sparse_rl, ratio, 1.5, [[1.5, 0.5], [0.25, 1.0]]),
        (smd.sparse_rl, vetoed, 1.5, [[0.0, 0.0], [0.25, 1.0]]),
        (smd.sparse_rl, just_not, 1.5, [[1.5, 1.1e-4], [0.25, 1.0]]),
    ):
        assert torch.allclose(weight(torch.tensor(rows).log(), cap), torch.tensor(want))


@pytest.mark.parametrize("method", smd.METHODS)
def test_a_batch_has_the_old_log_probs_and_weights_of_its_method(method):
    """Would catch a learner whose ratio is to its own log-prob, not to the one that smd recorded."""
    model = small_model()
    rollout = ragged_rollout(model)
    rollout = replace(rollout, logp_BR=rollout.logp_BR - 0.1 * rollout.mask_BR.double())  # as if another had sampled
    batch, mask = smd.make_batch(model, rollout, torch.zeros(12), Config(method), Runtime()), rollout.mask_BR
    dense = smd.unpack(replayed_logp(model, rollout, rollout.never_evicted_LBGT), mask)
    compare("old log-probs", batch.old_logp_BR, rollout.logp_BR if method == "smd" else dense, 1e-12)
    ratio = (dense - rollout.logp_BR).exp()
    vetoed = ratio.clamp(max=1.5) * (ratio >= 1e-4).all(dim=1, keepdim=True)
    want = dict.fromkeys(smd.METHODS, torch.ones_like(ratio))
    want |= dict(tis=ratio.clamp(max=2.0), sparse_rl=vetoed / vetoed[mask].mean())
    product = ratio.prod(dim=1, keepdim=True).expand_as(ratio)
    want |= dict(seq_is=product, seq_mask=product * (product <= 3.0), icepop=ratio * (ratio >= 0.5) * (ratio <= 5.0))
    assert torch.allclose(batch.weight_BR[mask], want[method][mask], rtol=1e-9)
    row = learner(model, rollout, method)[2]
    assert ("replay_error" in row) == (method in ("smd", "dense"))
    assert method != "smd" or math.isclose(row["replay_error"], 0.1, rel_tol=1e-9)


def test_the_clipped_surrogate_by_hand():
    """Good tokens gain nothing above 1 + ε, bad ones nothing below 1 - ε; the other way round nothing is clipped."""
    ratio, advantage = torch.tensor([[1.5, 0.5, 9.0], [1.5, 0.5, 9.0]]), torch.tensor([[2.0], [-2.0]]).expand(2, 3)
    weight, mask = torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([[True, True, False]] * 2)
    loss, clipped = smd.policy_loss(ratio.log(), torch.zeros(2, 3), advantage, weight, mask, 0.2, denominator=10)
    # min(3, 2.4) + 3 min(1, 1.6) + min(-3, -2.4) + min(-1, -1.6) = 2.4 + 3 - 3 - 1.6
    assert math.isclose(loss.item(), -0.8 / 10, rel_tol=1e-6)
    assert clipped.tolist() == [[True, False, False], [False, True, False]]


def test_group_advantage_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    # the population's standard deviation of the first group is 1/2
    want = torch.tensor([[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for scale in (1.0, 1e30):
        assert torch.allclose(smd.group_advantage(scale * reward), want, atol=1e-5)
    assert torch.equal(smd.group_advantage(reward, norm_std=False), want / 2)
    assert smd.group_advantage(reward.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"rewards must be \(N, S\), a row for each prompt, got \(4,\)"):
        smd.group_advantage(reward[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("value", [10.1, 0.7, 55.55, 1e30, 1e-30, -3.3])
def test_equal_rewards_give_no_advantage(value, dtype):
    """Would catch the rounding of a mean that is divided by a standard deviation of its own size."""
    equal = torch.full((2, 8), value, dtype=dtype)
    rounded = equal.clone()
    rounded[:, 3] = torch.nextafter(equal[0, 3], equal.new_tensor(math.inf))
    rounded[:, 5] = (equal[:, 5].float() * (1 + 2**-23)).to(dtype)
    for reward, norm_std in itertools.product((equal, rounded), (True, False)):
        assert (smd.group_advantage(reward, norm_std) == 0).all()


def test_shapes_that_would_broadcast_are_refused():
    matrix, row, mask = torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool)
    for n in range(5):
        args = [matrix, matrix, matrix, matrix, mask]
        args[n] = args[n][:, :1]
        with pytest.raises(ValueError, match=r"shapes differ: .* \(3, 1\)"):
            smd.policy_loss(*args, 0.2, 3)
    for args in ((matrix, row), (row, matrix)):
        with pytest.raises(ValueError, match="shapes differ"):
            smd.kl_divergence(*args)


@pytest.mark.parametrize("rows_at_a_time", [10**6, 50], ids=["one-chunk", "four-chunks"])
def test_the_loss_is_the_sum_of_both_tracks(world, rows_at_a_time, monkeypatch):
    """Policy loss over B · max_new, KL over response tokens, and the figures for the log, by hand."""
    monkeypatch.setitem(smd.LOGITS_PER_CHUNK, "cpu", 4 * rows_at_a_time)
    rollout, reward = world.rollout, world.reward
    config, runtime = Config("smd", max_new=5, lam=0.3), Runtime()
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = smd.make_batch(world.model, rollout, reward, config, runtime)
    batch = replace(batch, old_logp_BR=rollout.logp_BR + 0.5 * noise)  # some ratios are clipped
    loss, row = smd.learner_loss(world.model, batch, batch.totals(runtime), config, runtime)
    masks = rollout.never_evicted_LBGT, rollout.evicted_at_LBGT
    p, q = (world.logits(mask).view(64, 3, 4).log_softmax(-1) for mask in masks)
    ratio = (q.gather(2, world.responses[..., None])[..., 0] - batch.old_logp_BR).exp()
    advantage = ((reward - reward.mean()) / (reward.std(correction=0) + 1e-6))[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (p.exp() * (p - q.detach())).sum(-1).mean()
    want = -surrogate.sum() / (64 * 5) + 0.3 * kl
    compare("loss", loss, want, 1e-12)
    compare("gradient", gradient(loss, world.model), gradient(want, world.model), 1e-12)
    clipped = (ratio.clamp(0.8, 1.2) * advantage < ratio * advantage).double().mean()
    assert 0.1 < clipped < 0.9 and row["replay_error"] < 1e-12
    for name, value in dict(loss=want, entropy=-(q.exp() * q).sum(-1).mean(), clip_fraction=clipped).items():
        assert math.isclose(row[name], value.item(), rel_tol=1e-6), name


def test_totals_count_sequences_tokens_and_pairs_of_all_processes():
    rollout = ragged_rollout(small_model())
    reward = torch.tensor([1.0, 1, 1, 0, 1, 1, 2, 2, 2, 1, 2, 3])
    batch = smd.Batch(rollout, reward, rollout.logp_BR, rollout.logp_BR, {})
    assert batch.totals(Runtime()) == (12, rollout.length_B.sum(), 2)
    two_processes = Runtime(all_sum=lambda tensors: [x.mul_(2) for x in tensors])
    assert batch.totals(two_processes) == (24, 2 * rollout.length_B.sum(), 4)


def share_of_sevens(rollout):
    return ((rollout.response_BR == 7) & rollout.mask_BR).float().mean(dim=1)


def test_a_training_step_follows_the_clipped_gradient_of_its_loss():
    config, runtime = Config(eviction=EVICTION, samples=4, max_new=6, lam=1e3), Runtime()
    model, old = small_model(layers=3), small_model(layers=3)
    torch.manual_seed(0)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    row = smd.train_step(model, sgd, *ragged_prompts(), share_of_sevens, config)
    torch.manual_seed(0)
    rollout = smd.sample(old, *ragged_prompts(), 4, 6, -1, EVICTION)
    batch = smd.make_batch(old, rollout, share_of_sevens(rollout), config, runtime)
    loss, _ = smd.learner_loss(old, batch, batch.totals(runtime), config, runtime)
    slope = gradient(loss, old)
    assert slope.norm() > 2, "not clipped"
    step = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), old.parameters(), strict=True)])
    compare("step", step, -slope / slope.norm(), 1e-9)
    for name, x in dict(loss=loss, grad_norm=slope.norm(), reward=share_of_sevens(rollout).mean()).items():
        assert math.isclose(row[name], x.item(), rel_tol=1e-5), name
    assert all(p.grad is None for p in model.parameters())


def test_ten_steps_raise_the_reward_and_shuffled_rewards_do_not():
    def shuffled(rollout):
        return share_of_sevens(rollout)[torch.randperm(len(rollout.response_BR))]

    last = []
    for reward in (share_of_sevens, shuffled):
        torch.manual_seed(0)
        model = TinyModel(ModelConfig(vocab=20, width=32, layers=1, ffn=48))
        config = Config(eviction=EVICTION, max_new=8)
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        rows = [smd.train_step(model, adam, *ragged_prompts(), reward, config) for _ in range(10)]
        assert rows[0]["reward"] < 0.1
        last.append(rows[-1]["reward"])
    assert last[0] > 0.3 and last[1] < 0.1

"""The command line: every bad input gets one line, every flag changes the result; what is printed."""

import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch

import smd
from harness import cli, device, files, report, tasks, train
from harness.agent import Agent
from harness.settings import Settings, parse_budget
from smd import Eviction
from tests.common import GOOD, ROOT, argv, outcome, tiny, write

DRAW_CURVES = report.draw_curves


def test_a_run_says_what_it_does(tmp_path, capsys):
    out = str(tmp_path / "run")
    for changes in (dict(steps=4), dict(steps=6, resume=True)):
        train.train(tiny(tmp_path, **changes))
    said = capsys.readouterr().out
    for part in (
        f"run {out} | device cpu | attention backend torch",
        "base policy: supervised steps first",
        "base policy: 12 steps in",
        "base policy: 0.0% right with the sparse cache, 0.0% right with the dense cache",
        "step 4: 0.0% right with the sparse cache",
        "resumed at step 4 of 6",
        "held-out accuracy     before    after",
        f"the run is in {out}, its picture is {out}/curves.png",
        f"try: python {ROOT}/smd.py --resume --out {out} --prompt '",
    ):
        assert part in said, part
    train.train(tiny(tmp_path, "other", steps=0))
    assert "base policy: read from out/cache/base-" in capsys.readouterr().out


PATHS = "--out", "--data", "--model"


def bad_inputs(tmp: Path) -> list:
    data = [
        ("", "want at least 2 examples"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('["prompt"]', "line 2: want an object"),
        ('{"prompt": "what is it?"}', "line 2: want an object"),
        ('{"prompt": 3, "answer": "x"}', "line 2: want an object with strings"),
        ('{"prompt": "  ", "answer": "x"}', "line 2: the prompt and the answer must not be empty"),
        ('{"question": "how many of them?", "answer": "seven"}', "line 2: no ####"),
        (
            json.dumps({"prompt": "long " * 500, "answer": "x"}),
            "2500 tokens with --max-new 128 exceeds the context of 2048",
        ),
        (
            json.dumps({"prompt": "how long is it?", "answer": "x" * 200}),
            "201 tokens with its end exceeds --max-new 128",
        ),
        (json.dumps({"prompt": "hi", "answer": "x"}), "--budget must be at least 5 for snapkv, got 1"),
    ]
    files_of_data = [
        (write(tmp / f"{n}.jsonl", *([GOOD, line] if line else [])), part) for n, (line, part) in enumerate(data)
    ]
    (tmp / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    (tmp / "broken").mkdir()
    (tmp / "broken" / "config.json").write_text("{")
    damaged = tiny(tmp, "damaged", steps=1)
    train.train(damaged)
    (tmp / "damaged" / "checkpoint.pt").write_bytes((tmp / "damaged" / "checkpoint.pt").read_bytes()[:1000])
    done = tiny(tmp, "done", steps=2)
    train.train(done)
    lacking = tiny(tmp, "lacking", steps=1)
    train.train(lacking)
    state = torch.load(tmp / "lacking" / "checkpoint.pt", weights_only=True)
    del state["optimizer"]
    files.save(tmp / "lacking" / "checkpoint.pt", state)
    resume = ["--resume", "--out", done.out]
    return [
        *[(["--data", file], part) for file, part in files_of_data],
        (["--data", str(tmp / "latin.jsonl")], "line 2: not JSON in UTF-8"),
        (["--data", str(tmp / "none.jsonl")], "cannot be read: No such file"),
        (["--data", str(tmp)], "cannot be read: Is a directory"),
        (["--data", write(tmp / "one.jsonl", GOOD)], "want at least 2 examples"),
        (["--budget", "4"], "--budget must be at least 5 for snapkv, got 4 of a prompt's 34 tokens"),
        (["--budget", "4", "--eviction", "random"], "at least 5 for random, got 4"),
        (["--budget", "3", "--eviction", "rkv"], "at least 4 for rkv, got 3"),
        *[(["--budget", "0", "--eviction", e], f"at least 1 for {e}, got 0") for e in ("tova", "knorm", "h2o")],
        (["--budget", "1.0"], "got 1.0; as a share that is 100%"),
        (["--budget", "3", "--protect", "prompt"], "--budget must be at least 4 for snapkv, got 3"),
        (["--protect", "response"], "--protect must be one of prompt, got 'response'"),
        (["--budget", "5%"], "at least 5 for snapkv, got 2 of a prompt's 34 tokens"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--lr", "nan"], "--lr must be a finite number, got nan"),
        (["--lr", "-0.001"], "--lr must be at least 0, got -0.001"),
        (["--lam", "inf"], "--lam must be a finite number, got inf"),
        *[([flag, "-1"], f"{flag} must be at least 0, got -1") for flag in ("--kl-ref", "--lam")],
        (["--eviction", "lru"], "--eviction must be one of streaming, snapkv"),
        (["--method", "ppo"], "--method must be one of dense, naive, tis, seq_is, sparse_rl, smd, got 'ppo'"),
        (["--objective", "dpo", "--method", "tis"], "weights no tokens; take --method dense, naive or smd, got tis"),
        (["--objective", "reinforce"], "--objective must be one of grpo, dr_grpo, ppo, dpo"),
        (["--samples", "1"], "--objective grpo compares a prompt's samples; give --samples 2 or more, got 1"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--backend", "magic"], "--backend must be one of torch"),
        (["--bugdet", "3"], "unrecognized arguments: --bugdet"),
        (["--out", "/dev/null/run"], "/dev/null/run cannot be written: Not a directory"),
        (["--out", files_of_data[0][0]], "cannot be written: File exists; choose another --out"),
        (["--resume", "--out", files_of_data[0][0]], "holds no run to resume (Not a directory)"),
        (["--out", "x" * 300], "cannot be written: File name too long; choose another --out"),
        (["--resume", "--out", "x" * 300], "holds no run to resume (File name too long)"),
        (["--data", "x" * 300], "cannot be read: File name too long"),
        (["--model", "x" * 300], "there is no such folder"),
        *[([name, "a\0b"], f"{name} must be text without NUL characters, got 'a\\x00b'") for name in PATHS],
        (["--seed", "18446744073709551616"], f"--seed must be at most {2**63 - 1}, got 18446744073709551616"),
        (["--lr", "1" + "0" * 400], "--lr must be a finite number, got inf"),
        (["--out", done.out, *argv(dataclasses.replace(done, out=None))], "add --resume to continue it, delete it"),
        ([*resume, "--method", "naive"], "holds a run with --method smd, not naive"),
        ([*resume, "--steps", "1"], "is at step 2 already"),
        ([*resume, "--prompt", ""], "the prompt must not be empty"),
        ([*resume, "--prompt", "x" * 2048], "a prompt of 2048 tokens with --max-new 3 exceeds the context of 2048"),
        (["--prompt", "abba?a"], "--prompt needs --resume"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", str(tmp / "nowhere")], "holds no run to resume"),
        (["--resume", "--out", str(tmp / "broken")], "config.json is damaged"),
        (["--resume", "--out", damaged.out], "is missing or damaged"),
        (["--resume", "--out", lacking.out], "is missing or damaged (KeyError: 'optimizer'); delete it to begin anew"),
        (["--template", "plain"], "--template needs --model"),
        (["--reward", "exact"], "--reward needs --data"),
        (["--data", files_of_data[0][0], "--asked", "3"], "--asked is for the tasks without --data"),
        (["--accumulate", "33"], "--accumulate takes at most the 32 prompts that a process has of an update, got 33"),
        (["--model", "nowhere"], "--model nowhere: there is no such folder"),
    ]  # fmt: skip


def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    cases = bad_inputs(tmp_path)
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    for arguments, message in cases:
        capsys.readouterr()
        before = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*"))
        code, error = train.main(arguments), capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1, f"{arguments}: {code}, {error}"
        assert sorted((p, p.stat().st_size) for p in tmp_path.rglob("*")) == before, f"{arguments} wrote something"


@pytest.mark.parametrize("reward", [lambda prompt: 1.0, lambda *_: None, lambda *_: "good", 1.0])
def test_a_reward_that_cannot_be_called_is_refused_at_once(tmp_path, reward):
    with pytest.raises(cli.UsageError, match=r"a function reward\(prompt, response, answer\) -> float"):
        train.train(tiny(tmp_path), reward=reward)
    assert not list(tmp_path.iterdir()), "something was computed or written"


# every setting that a run may not change on resumption, with a value that must show in what a tiny run computes
CHANGES = dict(
    asked=3, max_new=6, warmup_steps=1, method="naive", lam=0.0, objective="ppo", kl_ref=1.0, eviction="knorm",
    budget=14, window=2, lr=1e-3, epochs=1, prompts=3, samples=3, seed=1, eval_prompts=5, eval_every=2,
    protect="prompt", dtype="bfloat16",
)  # fmt: skip


def test_every_flag_changes_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "accuracy", lambda task, texts, examples: len(texts))  # of this tiny model it is 0
    # they decide what is accepted at all, belong to a model or a file, or are to change nothing, and are tested as such
    untested = {"data", "model", "template", "reward", "accumulate"}
    assert set(CHANGES) == set(cli.fixed_names(Settings)) - untested
    # two epochs, or nothing could be clipped
    base = dict(epochs=2, steps=2, asked=4, budget=20, lr=1e-2, eval_prompts=6)
    train.train(tiny(tmp_path, "as it is", **base))
    for name, value in CHANGES.items():
        train.train(tiny(tmp_path, name, **base | {name: value}))
        assert outcome(tmp_path / name) != outcome(tmp_path / "as it is"), f"{cli.flag(name)} {value} changes nothing"


def test_what_the_user_leaves_open_is_what_the_help_says(tmp_path):
    s = train.checked(Settings(device="cpu"))
    filled = dict(
        task="chain",
        asked=6,
        budget=22,
        pool=1,
        sinks=1,
        window=4,
        prompts=32,
        max_new=7,
        warmup_steps=400,
        backend=None,
    )
    assert {name: getattr(s, name) for name in filled} == filled
    assert Eviction("snapkv", 22) == Eviction("snapkv", 22, interval=4, window=4, sinks=1, pool=5)
    s = train.checked(Settings(data="file"))
    filled = dict(task="text", budget="50%", pool=5, prompts=8, max_new=128, warmup_steps=100)
    assert {name: getattr(s, name) for name in filled} == filled
    s = train.checked(Settings(data="file", model="smollm2"))
    filled = dict(task="text", budget="25%", pool=5, prompts=8, max_new=128, warmup_steps=0)
    assert {name: getattr(s, name) for name in filled} == filled
    for asked, warmup_steps in ((None, 0), (3, 26)):
        s = train.checked(Settings(model="smollm2", asked=asked))
        filled = dict(
            task="facts", budget="25%", window=8, sinks=4, max_new=5 * (asked or 1) - 1, warmup_steps=warmup_steps
        )
        assert {name: getattr(s, name) for name in filled} == filled


def test_a_gpu_computes_in_bfloat16_and_a_cpu_in_float32():
    for name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        assert train.checked(Settings(device=name)).dtype == dtype
    assert train.checked(Settings(device="cuda", dtype="float32")).dtype == "float32"


def test_what_a_person_sees(tmp_path, capsys, monkeypatch):
    summary = dict(before=dict(sparse=0.125, dense=0.5), after=dict(sparse=0.25, dense=0.75), steps=4)
    nothing = dict(replay_error=None, dense_error=None, visible_share=None)
    table = report.table(summary | nothing).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["sparse", "cache", "12.5%", "25.0%"],
        ["dense", "cache", "50.0%", "75.0%"],
    ]
    table = report.table(summary | dict(replay_error=2e-7, dense_error=1.5, visible_share=0.64)).splitlines()
    assert table[3].endswith(": 2.0e-07") and table[4].endswith("log π_sparse|: 1.5e+00")
    assert "saw 64% of the tokens before it" in table[5]
    said = report.accuracies(dict(sparse=0.25, dense=0.5))
    assert said == "25.0% right with the sparse cache, 50.0% right with the dense cache"
    # so many lines at equal distances, and one whenever it was long silent
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(report.Progress, "last_shown", 0.0)
    with report.Progress("x", 10, done=2, lines=2) as progress:
        for n in range(8):
            clock[0] += 11 if n == 5 else 0
            progress.step(reward=n / 8)
        report.heartbeat()
        clock[0] += 11
        report.heartbeat()
        clock[0] += 1
        report.heartbeat("writing too soon")
        clock[0] += 10
        report.heartbeat("writing")
    report.heartbeat()
    assert capsys.readouterr().err.splitlines() == [
        "x: 5 of 10 reward 0.25",
        "x: 8 of 10 reward 0.62",
        "x: 10 of 10 reward 0.88",
        "x: 10 of 10 reward 0.88",
        "writing",
    ]
    with monkeypatch.context() as patch:
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        patch.setattr(sys, "stderr", terminal)
        with report.Progress("x", 10, done=2) as progress:
            progress.step(reward=0.251)
            progress.show()
        shown = terminal.getvalue().split("\r")
        assert any("3/10" in bar and "reward 0.25" in bar for bar in shown) and not shown[-1].strip()
    with report.Progress("quiet", 3, lines=0) as progress:
        for _ in range(3):
            progress.step()
    assert capsys.readouterr().err == ""


def test_no_curve_leaves_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    for rewards in ([0.1, 0.4, 0.3], [-3.0, 0.5, 7.0], [40.0, 50.0, 60.0]):
        figures = []
        rows = [dict(step=n + 1, reward=r, kl_sparse_dense=0.1 * n, replay_error=1e-7) for n, r in enumerate(rewards)]
        rows[1] |= dict(held_out_sparse=0.3, held_out_dense=0.4)
        summary = dict(before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.6), steps=3)
        DRAW_CURVES(rows, summary, "smd", tmp_path / "curves.png")
        (left, right), lines = figures[0].axes, {line.get_label(): line for line in figures[0].axes[0].lines}
        for axis in (left, right):
            low, high = axis.get_ylim()
            assert low <= 0 and all(low <= y <= high for line in axis.lines for y in line.get_ydata())
        for cache, ends in (("sparse", [0.1, 0.3, 0.5]), ("dense", [0.2, 0.4, 0.6])):
            line = lines[f"held-out accuracy, {cache} cache"]
            assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2, 3], ends)
        assert list(lines["reward of the rollouts"].get_ydata()) == rewards
        assert list(right.lines[0].get_ydata()) == [0.1 * n for n in range(3)]


def test_the_stopwatch_by_hand(monkeypatch):
    seconds = iter([1.0, 3.0, 3.5])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(seconds))
    watch = device.Stopwatch("cpu")
    watch.lap("sample")
    watch.lap("learn")
    assert watch.seconds == dict(seconds_sample=2.0, seconds_learn=0.5)


def test_a_command_line_by_hand():
    @dataclasses.dataclass(frozen=True)
    class Two:
        size: int | str | None = cli.opt("first", "how much")
        name: str = cli.opt("second", "which", free=True, default="a")
        rate: float = cli.opt("second", "how fast", 0, default=0.5)
        deep: bool = cli.opt("second", "how deep", default=False)

    parse = partial(cli.parse, Two, dict(name=("a", "b")), "about")
    assert parse([]) == {}
    assert parse(["--size", "3", "--name", "b"]) == dict(size=3, name="b")
    found = parse(["--size", "25%", "--rate", "2", "--deep"])
    assert found == dict(size="25%", rate=2.0, deep=True) and isinstance(found["rate"], float)
    with pytest.raises(cli.UsageError, match="unrecognized arguments: --na"):
        parse(["--na", "b"])
    assert cli.fixed_names(Two()) == ["size", "rate", "deep"] and cli.flag("max_new") == "--max-new"
    assert cli.fill_in(Two(name="b"), size=7, name="a") == Two(size=7, name="b")
    check = partial(cli.check_values, choices=dict(name=("a", "b")))
    check(Two(size=0, rate=1))
    for wrong, message in (
        (dict(rate=-1), "--rate must be at least 0, got -1"),
        (dict(rate=math.inf), "--rate must be a finite number, got inf"),
        (dict(name="c"), "--name must be one of a, b, got 'c'"),
        (dict(size=0.5), "--size must be int or str, got 0.5"),
        (dict(rate="fast"), "--rate must be float, got 'fast'"),
        (dict(deep=1), "--deep must be bool, got 1"),
        (dict(rate=True), "--rate must be float, got True"),
        (dict(name=None), "--name must be str, got None"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            check(Two(**wrong))


def test_the_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(Settings):
        assert cli.flag(f.name) in said and f.metadata["group"] in said
    assert "{streaming, snapkv, h2o, tova, knorm, rkv, random}" in said and smd.__doc__.splitlines()[0] in said
    for default in (
        "random} (default: snapkv)",
        "in percent (default: 22; with --data 50%; with --model 25%)",
        "longest response, in tokens (default: 7; with --data 128; with --model 4)",
        "codes (default: 6; with --model 1)",
        "number} (default: with --data exact)",
        "the sparse one (default: 0.1)",
    ):
        assert default in said, default


def test_there_are_no_more_flags_than_a_reader_remembers():
    assert len(dataclasses.fields(Settings)) <= 30


def test_a_command_ends_as_its_error_says(capsys):
    def ends(error):
        def main():
            if error is not None:
                raise error

        return cli.run_command(main, "it"), capsys.readouterr().err

    assert ends(None) == (0, "")
    assert ends(cli.UsageError("no")) == (2, "it: no\n") and ends(FloatingPointError("nan")) == (2, "it: nan\n")
    noted = KeyboardInterrupt()
    noted.add_note("go on")
    assert ends(noted) == (130, "it: interrupted; go on\n")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


SMALLEST = ["--steps", "2", "--prompts", "2", "--samples", "2", "--budget", "18", "--warmup-steps", "0"]
SMALLEST += ["--eval-prompts", "2", "--eval-every", "0", "--device", "cpu"]
# as in a locale that knows no UTF-8
ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def command(*words: str, env=None, **options) -> subprocess.CompletedProcess:
    env = os.environ | dict(OMP_NUM_THREADS="1") | (env or {})
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, timeout=120, **options)


def test_a_terminal_without_greek_letters_is_no_error(tmp_path):
    """The table (π, ‖) and --help (λ) ended in UnicodeEncodeError, and the first run in UnicodeDecodeError.

    In a notebook's shell the picture ended in ValueError, and what a run says at its end did not work when pasted.
    """
    env = ASCII | dict(MPLBACKEND="module://matplotlib_inline.backend_inline", WORLD_SIZE="2")
    run = command(f"{ROOT}/smd.py", *SMALLEST, "--out", "my run", env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert b" | one process (WORLD_SIZE is not torchrun's)\n" in run.stdout
    assert rb"log \u03c0_shadow" in run.stdout
    assert (tmp_path / "my run" / "curves.png").exists()
    env = os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    pasted = run.stdout.splitlines()[-1].removeprefix(b"try: ")
    asked = subprocess.run(pasted, shell=True, env=env, cwd=tmp_path, capture_output=True)
    assert asked.stdout.startswith(b"sparse cache: "), asked.stderr
    help = command(f"{ROOT}/smd.py", "--help", env=ASCII)
    assert help.returncode == 0 and rb"\u03bb" in help.stdout, help.stderr


def test_a_closed_pipe_ends_a_command_without_a_word(tmp_path):
    for words in (["smd.py", "--help"], ["smd.py", *SMALLEST, "--out", f"{tmp_path}/run"]):
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=120) == 141 and b"Traceback" not in error and b"Exception" not in error, error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_output_to_a_full_disk_is_one_line(tmp_path):
    for words in (["--help"], [*SMALLEST, "--out", "run"]):
        with open("/dev/full", "wb") as full:
            run = subprocess.run(
                [sys.executable, f"{ROOT}/smd.py", *words], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path
            )
        assert run.returncode == 2
        assert run.stderr == b"smd.py: the output cannot be written: No space left on device; make room\n"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_says_how_it_goes_on(number, code, tmp_path):
    words = [sys.executable, f"{ROOT}/smd.py", *SMALLEST, "--steps", "100000", "--out", "my run"]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(words, cwd=tmp_path, preexec_fn=heeds, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "my run" / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and log.read_bytes()):
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode().splitlines()[-1]
    assert process.returncode == code
    what = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert error == f"smd.py: {what}; --resume --out 'my run' goes on from the last checkpoint"


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "experiments").glob("*.py")))
def test_an_experiment_that_is_started_as_a_file_says_how_it_is_started(script):
    source = (ROOT / "experiments" / f"{script}.py").read_text(encoding="utf-8")
    if "__main__" not in source:
        pytest.skip("it is no command")
    run = command(f"{ROOT}/experiments/{script}.py")
    assert run.returncode == 1
    assert run.stderr.decode() == f"run it from the project's folder: python -m experiments.{script}\n"


def test_a_package_that_is_missing_is_named(capsys):
    assert cli.run_command(lambda: __import__("no_such_package"), "it") == 2
    assert (
        capsys.readouterr().err == "it: the package no_such_package is needed for this: pip install no_such_package\n"
    )


@pytest.mark.parametrize(
    "budget, want",
    [(22, 22), ("22", 22), (1, 1), ("1", 1), ("65%", Fraction(13, 20)), ("100%", 1), ("0.5%", Fraction(1, 200))],
)
def test_a_budget_is_a_count_or_a_share_in_percent(budget, want):
    assert parse_budget(budget) == want


@pytest.mark.parametrize("given", [0.25, 1.0, "0.25", "1.0", ".25", "1."])
def test_a_share_written_as_a_number_is_refused_with_the_way_to_write_it(given):
    """Would catch `--budget 1` keeping one key where `--budget 1.0` kept all."""
    want = "25%" if "25" in str(given) else "100%"
    with pytest.raises(ValueError, match=f"such as 65% .*, got {given}; as a share that is {want}"):
        parse_budget(given)


@pytest.mark.parametrize("budget", ["many", "-3", "1.5", "101%", "0%", "%", "5 %", "nan", True, 2.0, "9" * 19, "٣"])
def test_what_is_neither_a_count_nor_a_share_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be a count of keys, such as 22, or a share .*, got {budget}"):
        parse_budget(budget)


def test_the_command_line_takes_both_forms():
    parse = lambda *words: cli.parse(Settings, train.CHOICES, "about", list(words))  # noqa: E731
    assert parse("--budget", "22") == dict(budget=22)
    assert parse("--budget", "65%") == dict(budget="65%")


def test_a_short_prompt_is_answered_with_what_the_policy_is_forced_to_keep():
    """Would catch "budget must be at least 12, got 10" as the answer to a question."""
    s = Settings(budget="50%", window=6, eval_prompts=2, warmup_steps=0, device="cpu")
    agent = Agent(train.checked(s))
    said, answers = agent.answer("ab?a").split("\n", 1)
    assert said == "--budget 50% of 4 tokens is less than snapkv always keeps: 7 are kept"
    assert answers.startswith("sparse cache: ") and "dense cache: " in answers
    assert Agent(train.checked(s)).answer("abcdefghijkl?a").startswith("sparse cache: ")


@pytest.mark.parametrize("prompt", ["a b?", "-5 + 3", "--help", "it's", "two\nlines", "$HOME `x` \\ *"])
def test_a_shell_reads_words_as_they_were(prompt):
    given = shlex.split(cli.words(resume=True, out="-my run", prompt=prompt))
    assert cli.parse(Settings, {}, "", given) == dict(resume=True, out="-my run", prompt=prompt)


def test_a_picture_that_cannot_be_drawn_costs_a_run_nothing(tmp_path, monkeypatch, capsys):
    """Any error of matplotlib came before the table."""

    def no_picture(*_):
        raise ValueError("no canvas")

    monkeypatch.setattr(report, "draw_curves", no_picture)
    summary = train.train(tiny(tmp_path, steps=1))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and "its picture could not be drawn (ValueError: no canvas)" in said


def test_a_long_rollout_shows_that_it_goes_on(monkeypatch, capsys):
    """Would catch a sampler, or a learner, that is silent for as long as a batch takes."""
    agent = Agent(train.checked(tiny(Path("."), eval_prompts=3)))
    seconds = itertools.count()
    monkeypatch.setattr(report.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(report.Progress, "last_shown", 0)
    agent.evaluate(("dense",))
    assert "evaluation: 0 of 1\n" in capsys.readouterr().err

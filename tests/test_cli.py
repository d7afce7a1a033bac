"""The command line: every bad input prints one line, every flag changes the result, and the output is readable."""

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import smd
from harness import base, cli, files, pretrained, report, tasks, train
from harness.agent import Agent
from harness.settings import FIXED, Settings, checked, fill_in, parse, parse_budget
from smd import Eviction
from tests.common import GOOD, ROOT, argv, outcome, tiny, write

DRAW_CURVES = report.draw_curves  # the other tests draw no pictures


def test_the_output_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(base, "CACHE", Path("cache"))
    out = str(tmp_path / "run")
    for changes in (dict(steps=1), dict(steps=2, resume=True)):
        train.train(tiny(tmp_path, eval_every=1, **changes))
    printed = capsys.readouterr().out
    for part in (
        f"run {out} | device cpu | attention backend torch",
        "base policy: supervised steps first",
        "base policy: 12 steps in",
        "base policy: 0.0% right with the sparse cache, 0.0% right with the dense cache",
        "step 1: 0.0% right with the sparse cache",
        "resumed at step 1 of 2",
        "held-out accuracy     before    after",
        f"run folder: {out}; plot: {out}/curves.png",
        f"try: python {os.path.relpath(smd.__file__)} --resume --out={out} --prompt='",
    ):
        assert part in printed, part
    train.train(tiny(tmp_path, "other", steps=0))
    assert "base policy: read from cache/base-" in capsys.readouterr().out


def bad_inputs(tmp: Path) -> list[tuple[list[str], str]]:
    """Arguments, and a part of the message that they must lead to."""
    data = [
        ("", "want at least 2 examples"),
        ('{"prompt": "a"', "line 2: not JSON"),
        ('["prompt"]', "line 2: want an object"),
        ('{"prompt": "what is it?"}', "line 2: want an object"),
        ('{"prompt": 3, "answer": "x"}', "line 2: want an object with strings"),
        ('{"prompt": "  ", "answer": "x"}', "line 2: the prompt and the answer must not be empty"),
        ('{"question": "how many of them?", "answer": "seven"}', "line 2: no ####"),
        (json.dumps(dict(prompt="long " * 500, answer="x")), "2500 tokens with --max-new 128 exceeds the context of"),
        (json.dumps(dict(prompt="how long is it?", answer="x" * 200)), "201 tokens with its end exceeds --max-new 128"),
        (json.dumps(dict(prompt="hi", answer="x")), "--budget must be at least 5 for snapkv, got 1"),
    ]
    for n, (line, _) in enumerate(data):
        write(tmp / f"{n}.jsonl", *([GOOD, line] if line else []))
    (tmp / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    (tmp / "broken").mkdir()
    (tmp / "broken" / "config.json").write_text("{")
    done = tiny(tmp, "done", steps=2)
    train.train(done)
    resume = ["--resume", "--out", done.out]
    file = str(tmp / "0.jsonl")
    return [
        *[(["--data", str(tmp / f"{n}.jsonl")], message) for n, (_, message) in enumerate(data)],
        (["--data", str(tmp / "latin.jsonl")], "line 2: not JSON in UTF-8"),
        (["--data", str(tmp / "none.jsonl")], "No such file"),
        (["--data", str(tmp)], "Is a directory"),
        (["--data", "x" * 300], "File name too long"),
        (["--data", write(tmp / "one.jsonl", GOOD)], "want at least 2 examples"),
        (["--data", file, "--asked", "3"], "--asked has no effect with --data"),
        (["--budget", "4"], "--budget must be at least 5 for snapkv, got 4 of a prompt's 34 tokens"),
        (["--budget", "4", "--eviction", "random"], "at least 5 for random, got 4"),
        (["--budget", "3", "--eviction", "rkv"], "at least 4 for rkv, got 3"),
        *[(["--budget", "0", "--eviction", e], f"at least 1 for {e}, got 0") for e in ("tova", "knorm", "h2o")],
        (["--budget", "5%"], "at least 5 for snapkv, got 2 of a prompt's 34 tokens"),
        (["--budget", "3", "--protect", "prompt"], "--budget must be at least 4 for snapkv, got 3"),
        (["--budget", "1.0"], "--budget must be a count of keys, such as 22, or a share, such as 65%, got 1.0"),
        (["--budget", "a\nb"], "or a share, such as 65%, got a b"),
        (["--out", "a\nb", "--resume"], "--out a b holds no run to resume"),
        (["--protect", "response"], "--protect must be one of prompt, got 'response'"),
        (["--samples", "0"], "--samples must be at least 1 and below 2**63, got 0"),
        (["--steps", "-1"], "--steps must be at least 0 and below 2**63, got -1"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--lr", "nan"], "--lr must be at least 0 and below 2**63, got nan"),
        (["--lam", "inf"], "--lam must be at least 0 and below 2**63, got inf"),
        (["--seed", str(2**64)], f"--seed must be at least 0 and below 2**63, got {2**64}"),
        (["--eviction", "lru"], "--eviction must be one of streaming, snapkv"),
        (["--method", "ppo"], "--method must be one of dense, naive, tis"),
        (["--objective", "dpo", "--method", "tis"], "no importance weights; choose --method dense, naive or smd"),
        (["--objective", "reinforce"], "--objective must be one of grpo, dr_grpo, ppo, dpo"),
        (["--samples", "1"], "--objective grpo needs at least two samples per prompt; give --samples 2 or more, got 1"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--backend", "magic"], "--backend must be one of torch"),
        (["--bugdet", "3"], "unrecognized arguments: --bugdet"),
        (["--res"], "unrecognized arguments: --res"),
        *[([name, "a\0b"], f"{name} must be text without NUL characters") for name in ("--out", "--data", "--model")],
        (["--out", "/dev/null/run"], "Not a directory"),
        (["--out", file], "File exists"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", done.out, *argv(dataclasses.replace(done, out=None))], "add --resume to continue, delete it"),
        (["--resume", "--out", file], "Not a directory"),
        (["--resume", "--out", str(tmp / "nowhere")], "No such file"),
        (["--resume", "--out", str(tmp / "broken")], "config.json is damaged"),
        (["--resume"], "--resume needs --out"),
        ([*resume, "--method", "naive"], "holds a run with --method smd, not naive"),
        ([*resume, "--steps", "1"], "has completed 2 steps"),
        ([*resume, "--prompt", ""], "the prompt must not be empty"),
        ([*resume, "--prompt", "x" * 2048], "a prompt of 2048 tokens with --max-new 3 exceeds the context of 2048"),
        (["--prompt", "abba?a"], "--prompt needs a policy: give --resume and --out, or --model"),
        (["--template", "plain"], "--template needs --model"),
        (["--reward", "exact"], "--reward needs --data"),
        (["--accumulate", "33"], "--accumulate must be at most the 32 prompts per process, got 33"),
        (["--model", "nowhere"], "--model nowhere: there is no such folder"),
    ]


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    cases = bad_inputs(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for arguments, message in cases:
        capsys.readouterr()
        before = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*"))
        code, error = train.main(arguments), capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1, f"{arguments}: {code}, {error}"
        assert sorted((p, p.stat().st_size) for p in tmp_path.rglob("*")) == before, f"{arguments} wrote something"


@pytest.mark.parametrize("reward", [lambda prompt: 1.0, lambda *_: None, lambda *_: "good", 1.0])
def test_a_reward_that_cannot_be_called_is_refused_at_once(tmp_path, reward):
    with pytest.raises(cli.UsageError, match=r"a function reward\(.*\) -> float; .* fails \(.*raised by the reward"):
        train.train(tiny(tmp_path), reward=reward)
    assert not list(tmp_path.iterdir()), "something was computed or written"


# every setting that a resumed run cannot change, with a value that must change the result of a tiny run
CHANGES = dict(
    asked=3, max_new=6, warmup_steps=0, method="naive", lam=0.0, objective="ppo", kl_ref=1.0, eviction="knorm",
    budget=14, window=2, lr=1e-3, epochs=1, prompts=3, samples=3, seed=1, eval_prompts=1, eval_every=1,
    protect="prompt", dtype="bfloat16",
)  # fmt: skip


def test_every_flag_changes_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "accuracy", lambda task, texts, examples: len(texts))  # this model's accuracy is 0
    # these decide what is accepted, belong to a model or a file, or must change nothing; other tests cover them
    elsewhere = {"data", "model", "template", "reward", "accumulate"}
    assert set(CHANGES) == set(FIXED) - elsewhere
    # two epochs, because the first update of a batch clips nothing
    base = dict(epochs=2, steps=1, asked=4, budget=20, lr=1e-2, prompts=2, eval_prompts=2, warmup_steps=1)
    train.train(tiny(tmp_path, "unchanged", **base))
    for name, value in CHANGES.items():
        train.train(tiny(tmp_path, name, **base | {name: value}))
        assert outcome(tmp_path / name) != outcome(tmp_path / "unchanged"), f"{cli.flag(name)} {value} changes nothing"


def test_defaults_depend_on_task_model_and_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    toy = dict(task="chain", asked=6, budget=22, pool=1, sinks=1, window=4, prompts=32, max_new=7, warmup_steps=400)
    text = dict(task="text", pool=5, prompts=8, max_new=128, reward="exact")
    facts = dict(task="facts", budget="25%", window=8, sinks=4)
    for given, want in (
        (dict(device="cpu"), toy | dict(backend=None, dtype="float32", steps=100, lr=2e-4)),
        (dict(device="cuda"), dict(dtype="bfloat16")),
        (dict(device="cuda", dtype="float32"), dict(dtype="float32")),
        (dict(data="file"), text | dict(budget="50%", warmup_steps=100)),
        (dict(data="file", model="smollm2"), text | dict(budget="25%", warmup_steps=0, steps=25, lr=1e-5)),
        (dict(model="smollm2"), facts | dict(asked=1, max_new=4, warmup_steps=0)),
        (dict(model="smollm2", asked=3), facts | dict(asked=3, max_new=14, warmup_steps=26)),
    ):
        s = checked(Settings(**given))
        assert {name: getattr(s, name) for name in want} == want
    assert Eviction("snapkv", 22) == Eviction("snapkv", 22, interval=4, window=4, sinks=1, pool=5)


def test_settings_from_a_command_line_and_from_python():
    assert parse([]) == Settings() and parse(["--lr", "2", "--resume"]) == Settings(lr=2.0, resume=True)
    assert parse(["--budget", "22"]) == Settings(budget=22) and parse(["--budget", "65%"]) == Settings(budget="65%")
    assert fill_in(Settings(seed=0), dict(seed=7, steps=3)) == Settings(seed=0, steps=3)
    assert {"steps", "out", "device"}.isdisjoint(FIXED) and {"seed", "budget"} <= set(FIXED)
    checked(Settings(lr=1))
    assert checked(Settings(budget="22")).budget == 22, "a run with 22 keys is resumed by either"
    assert checked(Settings(model="smollm2", out=".")).out == ".", "smollm2 is no path"
    with pytest.raises(cli.UsageError, match="--model out/model lies in --out out"):
        checked(Settings(model="out/model", out="out"))
    for wrong, message in (
        (dict(method=3), r"--method must be str, got 3"),
        (dict(budget=0.5), r"--budget must be int or str, got 0.5"),
        (dict(lr="fast"), "--lr must be float .*, got 'fast'"),
        (dict(resume=None, steps=-1), "--steps must be at least 0"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            checked(Settings(**wrong))


@pytest.mark.parametrize(
    "budget, want", [(22, 22), ("22", 22), ("1", 1), ("65%", Fraction(13, 20)), ("100%", 1), ("0.5%", Fraction(1, 200))]
)
def test_a_budget_is_a_count_or_a_share_in_percent(budget, want):
    assert parse_budget(budget) == want


@pytest.mark.parametrize("budget", [0.25, "1.0", ".25", "many", "-3", "101%", "0%", "%", "5 %", True, "9" * 19, "٣"])
def test_any_other_budget_is_refused(budget):
    """Would catch `--budget 1` keeping one key where `--budget 1.0` kept all."""
    with pytest.raises(cli.UsageError, match=f"a count of keys, such as 22, or a share, such as 65%, got {budget}"):
        parse_budget(budget)


def test_the_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert len(dataclasses.fields(Settings)) <= 30, "nobody remembers more flags"
    for f in dataclasses.fields(Settings):
        assert cli.flag(f.name) in printed and f.metadata["group"] in printed
    assert "{streaming, snapkv, h2o, tova, knorm, rkv, random}" in printed and smd.__doc__.splitlines()[0] in printed
    for default in (
        "random} (default: snapkv)",
        "in percent (default: 22; with --data 50%; with --model 25%)",
        "maximum length of a response, in tokens (default: 7; with --data 128; with --model 4)",
        "codes (default: 6; with --model 1)",
        "number} (default: with --data exact)",
        "KL(π_dense ‖ π_shadow) (default: 0.1)",
    ):
        assert default in printed, default


def test_the_table_and_the_last_line(capsys, monkeypatch):
    """An error of matplotlib leaves the table, and a shell reads the last line as the prompt was."""
    monkeypatch.setattr(report, "draw_curves", lambda *_: 1 / 0)
    summary = dict(before=dict(sparse=0.125, dense=0.5), after=dict(sparse=0.25, dense=0.75), out="-my run", seconds=1)
    figures = dict(replay_error=2e-7, dense_error=1.5, visible_share=0.64, peak_memory=2 * 10**9)
    report.conclude([], summary | figures, "smd", "no 'prompt'")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["sparse", "cache", "12.5%", "25.0%"]
    assert lines[2].split() == ["dense", "cache", "50.0%", "75.0%"]
    assert lines[3].endswith(": 2.0e-07") and lines[4].endswith("log π_sparse|: 1.5e+00")
    assert "visible tokens before a response token: 64%" in lines[5] and "2.00 GB" in lines[6]
    assert "no plot (ZeroDivisionError: division by zero)" in lines[7]
    for prompt in ("a b?", "-5 + 3", "--help", "it's", "two\nlines", "$HOME `x` \\ *"):
        report.conclude([], summary | dict.fromkeys(figures), "smd", prompt)
        words = shlex.split(capsys.readouterr().out.partition("try: ")[2])
        assert parse(words[2:]) == Settings(resume=True, out="-my run", prompt=prompt)


def test_progress_on_a_terminal_and_in_a_file(monkeypatch):
    for terminal, soon, late in ((True, 0.05, 0.2), (False, 29.0, 31.0)):
        clock, stream = [0.0], io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with report.Progress(desc="outer", total=10, initial=2) as progress:
            progress._time = lambda clock=clock: clock[0]
            progress.start_t = progress.last_print_t = 0.0
            clock[0] = soon
            progress.step(reward=0.25)
            assert "3/10" not in stream.getvalue()
            clock[0] = late
            with report.Progress(desc="inner", total=1):
                assert report.Progress.shown[-1] is not progress
            assert report.Progress.shown[-1] is progress
            report.heartbeat()
            assert "3/10" in stream.getvalue() and "reward=0.25" in stream.getvalue()
        assert not stream.getvalue().split("\r")[-1].strip(), "the bar stays when all is done"


def test_a_long_rollout_refreshes_the_bar(monkeypatch, tmp_path):
    """Would catch a sampler, or a learner, that is silent for as long as a batch takes."""
    refreshed = []
    agent = Agent(checked(tiny(tmp_path, eval_prompts=3)))
    monkeypatch.setattr(report.Progress, "update", lambda _, n=1: refreshed.append(n))
    agent.evaluate(("dense",))
    assert refreshed.count(0) > 1 and refreshed.count(1) == 1


def test_the_picture_shows_all_values(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    for rewards in ([0.1, 0.4, 0.3], [-3.0, 0.5, 7.0], [40.0, 50.0, 60.0]):
        rows = [dict(step=n + 1, reward=r, kl_sparse_dense=0.1 * n) for n, r in enumerate(rewards)]
        rows[1] |= dict(held_out_sparse=0.3, held_out_dense=0.4)
        summary = dict(before=dict(sparse=0.1, dense=0.2), after=dict(sparse=0.5, dense=0.6), steps=3)
        DRAW_CURVES(rows, summary | dict(replay_error=1e-7), "smd", tmp_path / "curves.png")
        curves = [list(zip(*line.get_data(), strict=True)) for axis in figures[-1].axes for line in axis.lines]
        accuracies = [(0, 0.1), (2, 0.3), (3, 0.5)], [(0, 0.2), (2, 0.4), (3, 0.6)]
        assert curves == [*accuracies, list(zip((1, 2, 3), rewards, strict=True)), [(1, 0.0), (2, 0.1), (3, 0.2)]]
        for axis in figures[-1].axes:
            low, high = axis.get_ylim()
            assert low <= 0 and all(low <= y <= high for line in axis.lines for y in line.get_ydata())


def test_exit_codes_and_messages(capsys):
    noted = KeyboardInterrupt()
    noted.add_note("continue")
    for error, want in (
        (None, (0, "")),
        (cli.UsageError("no"), (2, "it: no\n")),
        (FloatingPointError("nan"), (2, "it: nan\n")),
        (OSError(2, "No such file", "x"), (2, "it: [Errno 2] No such file: 'x'\n")),
        (ModuleNotFoundError(name="gguf"), (2, "it: the package gguf is missing: pip install gguf\n")),
        (noted, (130, "it: interrupted; continue\n")),
    ):

        def main(error=error):
            if error is not None:
                raise error

        assert (cli.run_command(main, "it"), capsys.readouterr().err) == want
    with pytest.raises(ZeroDivisionError):
        cli.run_command(lambda: 1 / 0, "it")


def child(code: str, **options) -> subprocess.Popen:
    """A process that runs this code as the command "it"; it does not import torch."""
    source = f"import sys, time; from harness import cli; sys.exit(cli.run_command(lambda: {code}, 'it'))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, **pipes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_output_that_cannot_be_written(monkeypatch, capsys):
    closed = child("print(sys.stdin.read())", stdin=subprocess.PIPE)
    closed.stdout.close()
    assert closed.communicate(b"text")[1] == b"" and closed.returncode == 141
    with open("/dev/full", "w") as full:
        process = child("print('text')", stdout=full)
        assert process.communicate()[1] == b"it: [Errno 28] No space left on device\n" and process.returncode == 2
        monkeypatch.setattr(sys, "stdout", full)
        assert train.main(["--help"]) == 2  # argparse itself ignores the error
        monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_with_one_line(number):
    heeds = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = child("(print('begun', flush=True), time.sleep(60))", preexec_fn=heeds)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == b"it: interrupted\n" and process.returncode == 130


def test_smd_py_on_a_terminal_without_greek_letters(tmp_path, monkeypatch, capsys):
    """The table (π) ended in UnicodeEncodeError. What a run says at its end did not work when pasted."""
    sizes = "--steps 1 --prompts 2 --samples 2 --budget 18 --warmup-steps 0 --eval-prompts 2 --device cpu"
    # a locale without UTF-8, and a variable that a scheduler sets
    env = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", WORLD_SIZE="2", OMP_NUM_THREADS="1")
    words = [sys.executable, smd.__file__, *sizes.split(), "--out", "my run"]
    run = subprocess.run(words, env=os.environ | env, cwd=tmp_path, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert rb"log \u03c0_shadow" in run.stdout and (tmp_path / "my run" / "curves.png").exists()
    pasted = shlex.split(run.stdout.decode().splitlines()[-1].removeprefix("try: "))
    assert Path(pasted[1]).resolve() == Path(smd.__file__)
    monkeypatch.setattr(Settings, "width", 128)  # as in the process
    assert train.main(pasted[2:]) == 0
    assert capsys.readouterr().out.startswith("sparse cache: ")


def test_a_short_prompt_is_answered_with_the_least_budget_of_the_policy():
    """Would catch "budget must be at least 12, got 10" as the answer to a question."""
    s = checked(Settings(budget="50%", window=6, eval_prompts=2, warmup_steps=0, device="cpu"))
    agent = Agent(s)
    first, *answers = agent.answer("ab?a").splitlines()
    assert first == "--budget 50% of 4 tokens is less than snapkv always keeps: 7 are kept"
    assert answers[0].startswith("sparse cache: ") and "dense cache: " in answers[-1]
    assert agent.answer("abcdefghijkl?a").startswith("sparse cache: "), "the agent has its own budget again"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes."),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_too_little_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    def main():
        raise error

    assert cli.run_command(main, "it") == 2
    assert re.fullmatch(r"it: out of memory \(.*\); give fewer --prompts.*\n", capsys.readouterr().err)
    # a file or a model that does not fit is not damaged
    path = tmp_path / "c.pt"
    files.save(path, dict(weights=torch.nn.Linear(1, 1).state_dict()))
    monkeypatch.setattr(torch, "load", lambda *_, **__: main())
    with pytest.raises(type(error)):
        files.restore(path, torch.nn.Linear(1, 1))
    with pytest.raises(type(error)), pretrained.naming("m"):
        main()
    with pytest.raises(RuntimeError, match="another"):
        cli.run_command(lambda: (_ for _ in ()).throw(RuntimeError("another")), "it")

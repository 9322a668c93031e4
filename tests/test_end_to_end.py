"""The three programs as a user runs them, on toy sizes. Each docstring names the bug it guards."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout
import train
from data import load_problems
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--limit 60 --test-limit 12 --samples 6 --negatives 2 --rollouts 3 --keep 2 --batch 16 --sft-epochs 2 "
        "--generator-epochs 1 --pos-epochs 1 --neg-epochs 1 --eval-samples 0 --max-new-tokens 48 --distractors 1 "
        "--steps 3 --device cpu --dtype float32 --threads 1").split()  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def program(name, *arguments, cwd=ROOT):
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=240)  # fmt: skip


def in_process(main, monkeypatch, capsys, *arguments):
    """The same without the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    try:
        rollout.entry(main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


def refused(code, err):
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder after --mode neg, and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    done = program("train.py", "--mode", "neg", "--out", folder / "x", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "x", done.stdout


def test_neg_from_nothing_to_a_table(run):
    """A stage that writes nothing, or whose files do not agree with each other."""
    out, printed = run
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "data.jsonl", "test.jsonl", "sft", "generator", "pos", "neg", "rollouts.jsonl",
                     "values.jsonl", "pairs.jsonl", "metrics.csv", "results.json"}  # fmt: skip
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp" or "checkpoint" in path.name]
    lines = printed.strip().split("\n")[-4:]
    assert "against sft" in lines[0] and [line.split()[0] for line in lines[1:]] == ["sft", "pos", "neg"]
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["sft", "pos", "neg"] and all(r["problems"] == 12 for r in results.values())
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(r["stage"] for r in rows)) == ["sft", "pos", "neg"]
    for stage in ("sft", "pos", "neg"):
        steps = [int(r["step"]) for r in rows if r["stage"] == stage]
        assert steps == list(range(len(steps)))
    first = next(r for r in rows if r["stage"] == "neg")
    assert abs(float(first["dpo"]) - 0.693147) < 1e-4 and abs(float(first["margin"])) < 1e-4, "the reference is pos"
    assert {"commit", "torch", "seed"} <= set(json.loads((out / "config.json").read_text()))


def test_files_of_a_run_agree(run):
    """Values or pairs of another problem; an end of text behind a cut step; labels that contradict the final answer
    (prm800k#12); pairs that cannot be made again from what was kept (RLHF-Reward-Modeling#52)."""
    out, _ = run
    problems, rollouts, values, pairs = (
        {row["id"]: row for row in rows_of(out / "data.jsonl")},
        {row["id"]: row for row in rows_of(out / "rollouts.jsonl")},
        rows_of(out / "values.jsonl"), rows_of(out / "pairs.jsonl"))  # fmt: skip
    assert list(problems) == list(rollouts) and len(problems) == 60 and pairs and len(values) >= len(pairs)
    for row in values:
        drawn = rollouts[row["id"]]["samples"][row["sample"]]
        assert drawn["ids"] == row["ids"] and drawn["ended"] and drawn["correct"] == row["correct"] is False
        assert row["values"][-1] == 0.0 and len(row["values"]) == len(row["ends"]) + 1
        assert row["ends"][-1] == len(row["ids"])
        assert row["values"][0] == sum(s["correct"] for s in rollouts[row["id"]]["samples"]) / 6
        assert row["values"][row["pit"]] == 0.0 and all(v != 0.0 for v in row["values"][1 : row["pit"]])
        assert all(0 <= v * 3 <= 3 and abs(v * 3 - round(v * 3)) < 1e-9 for v in row["values"][1:] if v is not None)
    eos = 0
    for pair in pairs:
        row = next(r for r in values if r["id"] == pair["id"] and r["pit"] == pair["pit"] and pair["rejected_ids"] ==
                   r["ids"][([0] + r["ends"])[r["pit"] - 1] : r["ends"][r["pit"] - 1]])  # fmt: skip
        assert (pair["rejected_ids"][-1] == eos) == (row["pit"] == len(row["ends"]))
        assert pair["chosen_ids"][-1] == eos and eos not in pair["chosen_ids"][:-1] + pair["rejected_ids"][:-1]
        assert pair["chosen_ids"][: len(pair["rejected_ids"])] != pair["rejected_ids"]
        assert pair["prompt"].startswith(problems[pair["id"]]["question"])
    train_questions = {row["question"] for row in problems.values()}
    assert not train_questions & {row["question"] for row in rows_of(out / "test.jsonl")}


def test_pos_reuses_what_is_there(run, monkeypatch, capsys):
    """Samples, SFT or pos made again (hours), or a table that forgets the runs already done."""
    out, printed = run
    kept = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".csv") or path.name.endswith("s.jsonl")]
    assert len(kept) >= 7
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept if path.suffix != ".csv"}
    metrics, results = (out / "metrics.csv").read_bytes(), (out / "results.json").read_bytes()
    code, output = in_process(train.main, monkeypatch, capsys, "--mode", "pos", "--out", out, *TINY)
    assert code == 0, output.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert (out / "metrics.csv").read_bytes() == metrics and (out / "results.json").read_bytes() == results
    assert output.out.strip().split("\n")[-4:] == printed.strip().split("\n")[-4:]


def test_a_second_round_learns_from_the_first(run, tmp_path, monkeypatch, capsys):
    """A round that samples the old policy, starts from it, or overwrites what the first round found."""
    out, _ = run
    shutil.copytree(out, tmp_path / "x")
    code, output = in_process(train.main, monkeypatch, capsys, "--out", tmp_path / "x", "--rounds", 2, *TINY)
    assert code == 0, output.err
    assert [line.split()[0] for line in output.out.strip().split("\n")[-4:]] == ["sft", "pos", "neg", "neg2"]
    for name in ("rollouts.jsonl", "values.jsonl", "pairs.jsonl", "neg/model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (out / name).read_bytes()
    policy = rollout.load_policy(out / "neg", TrainConfig(threads=1, prompt="{question}\n"))
    problem = load_problems("arithmetic", "train", 1, steps=3, distractors=1)[0]
    drawn = policy.generate([policy.prompt(problem)], n=6, max_new_tokens=48, temperature=0.7, seed=1000)
    row = rows_of(tmp_path / "x" / "round2" / "rollouts.jsonl")[0]
    assert row["id"] == problem.id and [s["ids"] for s in row["samples"]] == drawn[0], "drawn by the first round's neg"
    with open(tmp_path / "x" / "metrics.csv", newline="") as file:
        first = next(r for r in csv.DictReader(file) if r["stage"] == "neg2")
    assert abs(float(first["margin"])) < 1e-4, "the reference is the model of the round before"


def test_another_configuration_is_refused(run, monkeypatch, capsys):
    """A folder whose files come from two configurations."""
    out, _ = run
    before = (out / "config.json").read_bytes()
    for flags, key in ((["--seed", 5], "seed"), (["--temperature", 0.3], "temperature"), (["--beta", 0.1], "beta")):
        code, output = in_process(train.main, monkeypatch, capsys, "--mode", "neg", "--out", out, *TINY, *flags)
        refused(code, output.err)
        assert key in output.err and "--out" in output.err
    assert (out / "config.json").read_bytes() == before
    older = json.loads(before)
    del older["weights"]  # a folder from before there was this flag
    (out / "config.json").write_text(json.dumps(older))
    code, output = in_process(train.main, monkeypatch, capsys, "--out", out, *TINY, "--weights", "bfloat16")
    refused(code, output.err)
    allowed = ["--slots", 3, "--save-seconds", 5]  # change no result
    assert in_process(train.main, monkeypatch, capsys, "--mode", "sft", "--out", out, *TINY, *allowed)[0] == 0


def test_the_same_seed_gives_the_same_run(run, tmp_path, monkeypatch, capsys):
    """A seed that nobody reads (cleanrl#133): state that leaks in from the process, the clock or the batch size."""
    out, _ = run
    flags = ["--mode", "neg", "--out", tmp_path / "y", *TINY, "--slots", 7]
    code, output = in_process(train.main, monkeypatch, capsys, *flags)
    assert code == 0, output.err
    for name in ("data.jsonl", "rollouts.jsonl", "values.jsonl", "pairs.jsonl", "results.json", "sft/model.safetensors",
                 "neg/model.safetensors"):  # fmt: skip
        assert (tmp_path / "y" / name).read_bytes() == (out / name).read_bytes(), name


def test_no_pairs_are_said_and_not_trained_on(tmp_path, monkeypatch, capsys):
    """A 'neg' that is 'pos' under another name, where the policy has memorised its problems and made no pairs."""
    monkeypatch.setattr(train, "make_pairs", lambda *arguments: [])
    flags = [*TINY, "--limit", 12, "--sft-epochs", 1]
    code, output = in_process(train.main, monkeypatch, capsys, "--mode", "neg", "--out", tmp_path / "y", *flags)
    assert "no pairs" in output.out + output.err and not (tmp_path / "y" / "neg").exists()
    assert code == 2 or "pos " in output.out


def test_awr_runs(tmp_path, monkeypatch, capsys):
    """--loss awr that trains on pairs after all, or on solutions that were not valued in full."""
    flags = [*TINY, "--limit", 24, "--sft-epochs", 1, "--loss", "awr"]
    code, output = in_process(train.main, monkeypatch, capsys, "--mode", "neg", "--out", tmp_path / "y", *flags)
    assert code == 0, output.err
    values = rows_of(tmp_path / "y" / "values.jsonl")
    assert all(None not in row["values"] for row in values) and {row["correct"] for row in values} == {True, False}
    with open(tmp_path / "y" / "metrics.csv", newline="") as file:
        neg = [r for r in csv.DictReader(file) if r["stage"] == "neg"]
    assert neg and all(r["nll"] and not r["dpo"] for r in neg)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """Thirty problems in the GSM8K form."""
    path = tmp_path_factory.mktemp("data") / "p.jsonl"
    problems = load_problems("arithmetic", "train", 30, 3, 0.0, 2, 0)
    path.write_text("".join(json.dumps(dict(question=p.question, answer=p.solution)) + "\n" for p in problems))
    return path


def test_star_and_files_run(tmp_path, jsonl, monkeypatch, capsys):
    """A built-in task or a file of the user's that only works with the defaults of the arithmetic task."""
    flags = ["--mode", "sft", "--data", "star", "--out", tmp_path / "s", *TINY, "--limit", 20, "--sft-epochs", 1]
    code, output = in_process(train.main, monkeypatch, capsys, *flags)
    assert code == 0 and (tmp_path / "s" / "sft" / "model.safetensors").exists(), output.err
    own = ["--data", jsonl, "--model", train.BASE, "--prompt", "{question}\n", "--out", tmp_path / "f"]
    flags = ["--mode", "pos", *own, *TINY, "--limit", 0, "--test-limit", 0]
    code, output = in_process(train.main, monkeypatch, capsys, *flags)
    assert code == 0, output.err
    assert json.loads((tmp_path / "f" / "results.json").read_text())["pos"]["problems"] == 3, "every tenth is kept out"
    assert len(rows_of(tmp_path / "f" / "rollouts.jsonl")) == 27


def test_rollout_and_evaluate_programs(tmp_path, jsonl):
    """A program that only works in the repository's folder, or writes a warning where a table belongs."""
    shared = ["--model", train.BASE, "--data", jsonl, "--limit", 6, "--prompt", "{question}\n", "--device", "cpu",
              "--max-new-tokens", 32, "--threads", 1]  # fmt: skip
    flags = ["--samples", 4, "--temperature", 1.5, "--values", 2, "--out", "r"]
    done = program("rollout.py", *shared, *flags, cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "24 solutions of 6 problems" in done.stdout and len(rows_of(tmp_path / "r" / "rollouts.jsonl")) == 6
    values = rows_of(tmp_path / "r" / "values.jsonl")
    assert values and all(not row["correct"] for row in values)
    done = program("evaluate.py", *shared, "--samples", 2, "--values", 2, "--out", "e", cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    result = json.loads((tmp_path / "e" / "results.json").read_text())["model"]
    assert result["problems"] == 6 and {"pass@1", "maj@1", "accuracy"} <= set(result)
    assert "model" in done.stdout and re.search(r"step +1 +Q", done.stdout)


def test_a_mistyped_flag_is_one_line(tmp_path):
    """A traceback, or a page of usage, for a mistyped flag; a folder left behind."""
    done = program("train.py", "--epochs", 3, cwd=tmp_path)
    refused(done.returncode, done.stderr)
    assert "--epochs" in done.stderr and done.stdout == "" and not list(tmp_path.iterdir())


@pytest.fixture
def in_time():
    """A loop without an end fails here after ten seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("did not end"))
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("flags", [
    "--mode both", "--data none.jsonl", "--data none.jsonl --model BASE", "--model nowhere", "--limit many",
    "--batch 0", "--lr nan", "--prompt question", "--split exam", "--loss ppo", "--pairs best",
    "--device cuda:77", "--mod neg", "--limit 0", "--steps 9", "--data PLAIN --model BASE", "--data SHORT --model BASE",
    "--data BAD --model BASE",
])  # fmt: skip
def test_bad_flags_are_one_line(in_time, tmp_path, monkeypatch, capsys, flags):
    """A traceback or an endless loop for what a user can mistype; a run folder already written or claimed by then."""
    plain = [json.dumps(dict(prompt=f"{i} + 1 = ?", answer=str(i + 1))) for i in range(12)]
    (tmp_path / "plain.jsonl").write_text("\n".join(plain))  # answers only: nothing to imitate
    full = [json.dumps(dict(question=f"{i} + 1 = ?", answer=f"#### {i + 1}")) for i in range(5)]
    (tmp_path / "short.jsonl").write_text("\n".join(full))  # no tenth problem to test on
    (tmp_path / "bad.jsonl").write_text("\n".join([*full, '{"question": 1}']))
    names = dict(BASE=str(train.BASE), PLAIN="plain.jsonl", SHORT="short.jsonl", BAD="bad.jsonl")
    monkeypatch.chdir(tmp_path)
    arguments = [names.get(word, word) for word in flags.split()]
    code, output = in_process(train.main, monkeypatch, capsys, "--mode", "sft", *TINY, "--out", "o", *arguments)
    refused(code, output.err)
    assert not (tmp_path / "o").exists(), "nothing is written before all is checked"

"""The three programs as a user runs them, on toy sizes. Each docstring names the bug it guards."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import rollout
import train
from data import Tokenizer, load_problems, read_problems
from train import TrainFlags

ROOT = Path(train.__file__).parent
BASE = ROOT / "tests" / "base"  # a smaller one
TINY = f"""--model {BASE} --limit 36 --test-limit 12 --held-out 6
    --samples 6 --negatives 2 --rollouts 3 --keep 2 --batch 8
    --sft-epochs 2 --generator-epochs 1 --pos-epochs 1 --neg-epochs 1 --eval-samples 0
    --max-new-tokens 48 --distractors 1 --steps 3 --device cpu --dtype float32 --threads 1"""
TINY = TINY.split()


def program(name, *arguments, cwd):
    """A program in a process of its own, started elsewhere."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, ROOT / name, *arguments]
    options = dict(capture_output=True, text=True, timeout=240)
    return subprocess.run([str(word) for word in command], cwd=cwd, env=environment, **options)


@pytest.fixture
def call(monkeypatch, capsys):
    """A program without the seconds that importing torch takes: call(*flags) -> (exit code, output,
    errors)."""

    def call(*flags, program=train):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        code = 0
        try:
            rollout.run_program(program.main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    torch.set_num_threads(1)
    return call


def assert_refused(code, err):
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def results_of(out):
    """What a run leaves, as bytes, without what tells the time or the flags."""
    files = [p for p in out.rglob("*") if p.suffix in (".jsonl", ".safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder after --mode neg with two rounds, and the lines of its table."""
    folder = tmp_path_factory.mktemp("run")
    done = program("train.py", "--rounds", 2, "--out", "x", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "against sft" in line)
    return folder / "x", lines[start:]


def test_neg_from_nothing_to_a_table(run):
    """A stage that writes nothing, or into the folder of another; files left of a stage's work."""
    out, table = run
    names = {str(path.relative_to(out)) for path in out.rglob("*.jsonl")}
    assert names == {
        *("data.jsonl", "test.jsonl", "generator/samples.jsonl"),
        *(f"pos/{name}.jsonl" for name in ("samples", "values", "pits", "pairs")),
        *(f"neg/{name}.jsonl" for name in ("samples", "values", "pits", "pairs")),
        *(f"{name}/eval/greedy.jsonl" for name in ("sft", "pos", "neg", "neg2")),
        *(f"{name}/held_out/greedy.jsonl" for name in ("sft", "pos", "neg", "neg2")),
    }
    for name in ("sft", "generator", "pos", "neg", "neg2"):
        assert (out / name / "model.safetensors").exists()
    assert not [path for path in out.rglob("*") if "tmp" in path.name or "checkpoint" in path.name]
    assert "against sft" in table[0]
    assert [line.split()[0] for line in table[1:5]] == ["sft", "pos", "neg", "neg2"]
    moved = [line for line in table[5:] if "margin" in line]
    assert [line.split()[0] for line in moved] == ["neg:", "neg2:"]
    results = json.loads((out / "results.json").read_text())
    assert [result["problems"] for result in results.values()] == [12] * 4
    assert {"commit", "torch", "seed"} <= set(json.loads((out / "config.json").read_text()))


def test_log_of_a_run(run):
    """A stage that logs nothing or a step twice; a reference that is not the policy before."""
    out, _ = run
    log = log_of(out)
    assert list(dict.fromkeys(row["stage"] for row in log)) == ["sft", "pos", "neg", "neg2"]
    for stage in ("sft", "pos", "neg", "neg2"):
        rows = [row for row in log if row["stage"] == stage]
        assert [int(row["step"]) for row in rows] == list(range(len(rows)))
        if stage.startswith("neg"):
            assert float(rows[0]["pair_loss"]) == pytest.approx(0.693147, abs=1e-4)
            assert float(rows[0]["margin"]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name, seed", [("pos", 1000), ("neg", 2000)])
def test_each_round_learns_from_its_own_mistakes(run, name, seed):
    """A round that samples the policy of another round, or with the random numbers of another."""
    out, _ = run
    problem = load_problems("arithmetic", "train", 1, steps=3, distractors=1)[0]
    c = TrainFlags(prompt="{question}\n", seed=seed, max_new_tokens=48, temperature=0.7)
    c.device = "cpu"
    policy = rollout.load_policy(out / name, c)
    row = rows_of(out / name / "samples.jsonl")[0]
    drawn = policy.generate([policy.prompt(problem)], n=6)[0]
    assert row["id"] == problem.id
    assert [s["ids"] for s in row["samples"]] == drawn


@pytest.mark.parametrize("name", ["pos", "neg"])
def test_values_of_a_run(run, name):
    """Values of another sample; a Q that is no share of K; labels that contradict the final answer
    (prm800k#12)."""
    out, _ = run
    samples = {row["id"]: row["samples"] for row in rows_of(out / name / "samples.jsonl")}
    rows = rows_of(out / name / "values.jsonl")
    assert len(samples) == 36 and rows
    for row in rows:
        s = samples[row["id"]][row["sample"]]
        assert s["ids"] == row["ids"] and s["ended"]
        assert s["correct"] is row["correct"] is False
        assert row["value"] == sum(s["correct"] for s in samples[row["id"]]) / 6
        assert len(row["q_values"]) == len(row["ends"]) and row["ends"][-1] == len(row["ids"])
        assert row["q_values"][-1] == 0.0
        walked = row["q_values"][: row["first_pit"]]
        assert walked[-1] == 0.0 and set(walked[:-1]) <= {1 / 3, 2 / 3, 1.0}


@pytest.mark.parametrize("name", ["pos", "neg"])
def test_pairs_of_a_run(run, name):
    """Pairs of another problem or of another policy's mistakes; an end of text behind a step that
    was cut; pairs that cannot be made again from what was kept (RLHF-Reward-Modeling#52)."""
    out, _ = run
    questions = {row["id"]: row["question"] for row in rows_of(out / "data.jsonl")}
    pits = set()
    for row in rows_of(out / name / "values.jsonl"):
        start, end = [0, *row["ends"]][row["first_pit"] - 1 : row["first_pit"] + 1]
        pits.add((row["id"], row["first_pit"], *row["ids"][start:end]))
    pairs = rows_of(out / name / "pairs.jsonl")
    assert pairs
    eos = Tokenizer.from_pretrained(BASE).eos_id
    for pair in pairs:
        chosen = pair["chosen_ids"]
        rejected = pair["rejected_ids"]
        assert (pair["id"], pair["first_pit"], *rejected) in pits
        assert pair["prompt"].startswith(questions[pair["id"]])
        assert chosen[-1] == eos and eos not in chosen[:-1] + rejected[:-1]
        assert chosen[: len(rejected)] != rejected
    test = {row["question"] for row in rows_of(out / "test.jsonl")}
    assert not test & set(questions.values())


def test_pos_reuses_what_is_there(run, call):
    """Samples, SFT or pos made again (hours), or a table that forgets the runs already done."""
    out, table = run
    before = results_of(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    log = log_of(out)
    code, printed, err = call("--mode", "pos", "--out", out, *TINY)
    assert code == 0, err
    assert results_of(out) == before and log_of(out) == log
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert printed.splitlines()[-len(table) :] == table


def test_the_same_seed_gives_the_same_run(run, tmp_path, call):
    """A seed that nobody reads (cleanrl#133); results that depend on slots, on the folder of the
    model, on the process or on the clock."""
    out, _ = run
    shutil.copytree(BASE, tmp_path / "base")
    flags = ["--slots", 50, "--model", tmp_path / "base"]
    code, _, err = call("--out", tmp_path / "y", *TINY, *flags)
    assert code == 0, err
    again = results_of(tmp_path / "y")
    assert "neg/model.safetensors" in again
    assert again.items() <= results_of(out).items()


def test_a_model_is_tested_as_it_was_trained(run, tmp_path, call):
    """A model tested with another prompt or budget, or in another world, than it was trained: 81%
    in the table of the run, 6% by evaluate.py."""
    out, table = run
    flags = ["--model", out / "neg", "--limit", 12, "--threads", 1, "--out", tmp_path]
    for data in ([], ["--data", out / "test.jsonl"]):
        code, printed, err = call(*flags, *data, program=evaluate)
        assert code == 0, err
        assert printed.splitlines()[1].split()[1:4] == table[3].split()[1:4]
        assert "prompt '{question}\\n', max_new_tokens 48, temperature 0.7" in printed
        assert "as it was trained" in printed
    code, printed, _ = call(*flags, "--max-new-tokens", 50, program=evaluate)
    assert "max_new_tokens 50" in printed and "trained with {'max_new_tokens': 48}" in printed
    code, printed, _ = call(*flags, "--distractors", 0, program=evaluate)
    assert "trained with {'distractors': 1}" in printed
    code, printed, err = call(
        *("--model", out / "neg", "--limit", 3, "--samples", 2, "--out", tmp_path / "r"),
        program=rollout,
    )
    assert code == 0, err
    assert json.loads((tmp_path / "r" / "rollout_config.json").read_text())["distractors"] == 1


def test_a_flag_may_change_until_its_stage_is_there(run, tmp_path, call):
    """Advice that is refused: another --neg-lr means SFT, samples and values again (hours), or the
    table of a model that is no longer there."""
    out, table = run
    shutil.copytree(out, tmp_path / "x")
    flags = ["--out", tmp_path / "x", *TINY, "--rounds", 1]
    code, _, err = call(*flags, "--neg-lr", 0.01)
    assert_refused(code, err)
    assert f"delete {tmp_path}/x/neg, {tmp_path}/x/neg2, or" in err
    shutil.rmtree(tmp_path / "x" / "neg2")
    (tmp_path / "x" / "neg" / "model.safetensors").unlink()
    before = results_of(tmp_path / "x" / "pos")
    (tmp_path / "x" / "neg" / "notes.tmpl").write_text("mine")
    code, printed, err = call(*flags, "--neg-lr", 0.01, "--beta", 2)
    assert code == 0, err
    assert results_of(tmp_path / "x" / "pos") == before
    start = next(i for i, line in enumerate(printed.splitlines()) if "against sft" in line)
    sft, pos, neg = printed.splitlines()[start + 1 : start + 4]
    assert [sft, pos] == table[1:3] and neg != table[3], (
        "its responses are not those of the old neg"
    )
    assert not (tmp_path / "x" / "neg" / "values.jsonl").exists(), "they were the old neg's"
    assert (tmp_path / "x" / "neg" / "notes.tmpl").exists()
    code, _, err = call(*flags, "--neg-lr", 0.01, "--beta", 2, "--rollouts", 4)
    assert_refused(code, err)
    assert f"delete {tmp_path}/x/pos/values.jsonl, {tmp_path}/x/neg, or" in err
    more = ["--test-limit", 14, "--eval-samples", 2]
    code, printed, err = call(*flags, "--neg-lr", 0.01, "--beta", 2, *more)
    assert code == 0 and "on 14 problems" in printed, err


def test_positives_asked_again(run, tmp_path, call):
    """A second round from the base, on the teacher's solutions or on samples of another policy."""
    out, _ = run
    shutil.copytree(out, tmp_path / "x", ignore=shutil.ignore_patterns("neg*"))
    flags = [*TINY, "--mode", "pos", "--rounds", 2, "--again-epochs", 1.0, "--again-lr", 1e-4]
    code, printed, err = call("--out", tmp_path / "x", *flags)
    assert code == 0, err
    assert (tmp_path / "x/pos/samples.jsonl").read_bytes() == (
        out / "pos/samples.jsonl"
    ).read_bytes()
    correct = 0
    for row in rows_of(out / "pos" / "samples.jsonl"):
        texts = {s["text"] for s in row["samples"] if s["correct"]}
        correct += min(2, len(texts))
    steps = [row for row in log_of(tmp_path / "x") if row["stage"] == "pos2"]
    assert len(steps) == max(1, round(correct / 8)), "of its own solutions alone"
    assert max(float(row["lr"]) for row in steps) == pytest.approx(1e-4)
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    assert list(results) == ["sft", "pos", "pos2"]


OTHER = [("seed", 5), ("temperature", 0.3), ("beta", 0.1), ("samples", 7), ("pairs", "step")]


@pytest.mark.parametrize("name, value", OTHER)
def test_another_configuration_is_refused(run, call, name, value):
    """A folder whose files come from two configurations."""
    out, _ = run
    before = results_of(out) | {"config": (out / "config.json").read_bytes()}
    code, _, err = call("--out", out, *TINY, f"--{name}", value)
    assert_refused(code, err)
    assert f"{name}=" in err and "--out" in err
    assert results_of(out) | {"config": (out / "config.json").read_bytes()} == before


def test_what_may_change_between_two_runs(run, tmp_path, call):
    """A run that cannot be continued on another machine, from another folder, or by a program that
    has one flag more."""
    out, _ = run
    shutil.copytree(out, tmp_path / "x")
    shutil.copytree(BASE, tmp_path / "moved")
    path = tmp_path / "x" / "config.json"
    older = json.loads(path.read_text())
    del older["weight_decay"]
    path.write_text(json.dumps(older))
    free = "--micro-tokens 99 --gradient-checkpointing 1 --slots 3 --threads 2 --save-seconds 5"
    flags = ["--mode", "sft", "--out", tmp_path / "x", *TINY, *free.split()]
    code, _, err = call(*flags, "--device", "", "--model", tmp_path / "moved")
    assert code == 0, err
    code, _, err = call(*flags, "--weight-decay", 0.5)
    assert_refused(code, err)
    assert "weight_decay=0.01" in err
    (tmp_path / "moved" / "tokenizer.json").write_text((BASE / "tokenizer.json").read_text() + " ")
    code, _, err = call(*flags, "--model", tmp_path / "moved")
    assert_refused(code, err)
    assert "model_hash" in err


def test_no_pairs_are_said_and_not_trained_on(run, tmp_path, call, monkeypatch):
    """A 'neg' that is 'pos' under another name, where no mistake could be paired."""
    out, _ = run
    shutil.copytree(out, tmp_path / "x", ignore=shutil.ignore_patterns("neg*", "pairs*"))
    monkeypatch.setattr(train, "make_pairs", lambda *arguments: [])
    code, printed, err = call("--out", tmp_path / "x", *TINY)
    assert code == 0, err
    assert "neg is not trained" in printed
    assert not list(tmp_path.glob("x/neg*"))
    assert list(json.loads((tmp_path / "x" / "results.json").read_text())) == ["sft", "pos"]


def test_awr_runs(tmp_path, call):
    """--loss awr that trains on pairs after all, or on solutions that were not valued in full."""
    flags = [*TINY, "--limit", 24, "--loss", "awr"]
    code, _, err = call("--out", tmp_path / "y", *flags)
    assert code == 0, err
    values = rows_of(tmp_path / "y" / "pos" / "values.jsonl")
    assert {row["correct"] for row in values} == {True, False}
    assert all(None not in row["q_values"] for row in values)
    assert not (tmp_path / "y" / "pos" / "pairs.jsonl").exists()
    neg = [row for row in log_of(tmp_path / "y") if row["stage"] == "neg"]
    assert neg and all(row["nll"] and not row["pair_loss"] for row in neg)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """Thirty problems in the form of GSM8K."""
    path = tmp_path_factory.mktemp("data") / "p.jsonl"
    rows = []
    for p in load_problems("arithmetic", "train", 30, 3, 0.0, 2, 0):
        rows.append(json.dumps(dict(question=p.question, answer=p.solution)))
    path.write_text("\n".join(rows))
    return path


def test_own_files_run(tmp_path, jsonl, call):
    """A file of the user's that only works with the defaults of the built-in task."""
    own = ["--data", jsonl, "--model", BASE, "--prompt", "{question}\n", "--out", tmp_path / "f"]
    code, _, err = call("--mode", "pos", *own, *TINY, "--limit", 0, "--test-limit", 0)
    assert code == 0, err
    results = json.loads((tmp_path / "f" / "results.json").read_text())
    tested = sum(train.is_test(problem) for problem in read_problems(jsonl))
    assert 0 < results["pos"]["problems"] == tested < 8, "a tenth of the questions"
    sampled = rows_of(tmp_path / "f" / "generator" / "samples.jsonl")
    assert len(sampled) == 30 - tested - 1, "one is held out"


def test_rollout_and_evaluate_programs(tmp_path, jsonl, call, monkeypatch):
    """A program that only works in the repository's folder, or writes a warning where a table
    belongs."""
    monkeypatch.chdir(tmp_path)
    shared = ["--model", BASE, "--data", jsonl, "--limit", 6, "--prompt", "{question}\n"]
    shared += ["--device", "cpu", "--max-new-tokens", 32, "--threads", 1, "--rollouts", 2]
    flags = ["--samples", 4, "--temperature", 3.0, "--out", "r"]
    code, printed, err = call(*shared, *flags, program=rollout)
    assert code == 0 and "Warning" not in err, err
    assert "24 samples of 6 problems, " in printed
    assert len(rows_of(tmp_path / "r" / "samples.jsonl")) == 6
    values = rows_of(tmp_path / "r" / "values.jsonl")
    assert values and all(not row["correct"] for row in values)
    code, printed, err = call(*shared, "--samples", 2, "--out", "e", program=evaluate)
    assert code == 0 and "Warning" not in err, err
    [results] = tmp_path.glob("e/base-*/results.json")
    result = json.loads(results.read_text())["model"]
    assert result["problems"] == 6 and {"pass@1", "maj@1", "accuracy"} <= set(result)
    assert re.search(r"step +1 +Q", printed)


@pytest.mark.parametrize(
    "flags",
    [
        *("--epochs 3", "--mod neg", "--mode both", "--loss ppo", "--pairs best", "--split exam"),
        *("--limit many", "--batch 0", "--lr nan", "--limit 0", "--steps 9", "--prompt question"),
        *("--loss awr --scan first", "--device cuda:77", "--model nowhere", "--data none.jsonl"),
        *("--data PLAIN --model BASE", "--data SHORT --model BASE", "--data BAD --model BASE"),
        "--data SHORT",
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, call, flags):
    """A traceback or an endless loop for what a user can mistype; a run folder already written or
    claimed by then."""
    plain = [json.dumps(dict(prompt=f"{i} + 1 = ?", answer=str(i + 1))) for i in range(12)]
    short = [json.dumps(dict(question=f"{i} + 1 = ?", answer=f"#### {i + 1}")) for i in range(5)]
    (tmp_path / "PLAIN").write_text("\n".join(plain))  # answers only: nothing to imitate
    (tmp_path / "SHORT").write_text(short[0])  # too few for two parts
    (tmp_path / "BAD").write_text("\n".join([*short, '{"question": 1}']))
    (tmp_path / "BASE").symlink_to(BASE)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*TINY, "--out", "o", *flags.split())
    assert_refused(code, err)
    assert not (tmp_path / "o").exists(), "nothing is written before all is checked"


def test_answers_without_solutions(call, tmp_path):
    """Problems that have only answers refused, or a policy that is trained before it samples, or on
    a teacher's solution all the same."""
    problems = load_problems("arithmetic", limit=40, steps=4, distractors=2)
    lines = [json.dumps(dict(prompt=p.question, answer=p.answer)) for p in problems]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines))
    flags = [*TINY, "--model", BASE, "--data", path, "--prompt", "{question}\n", "--limit", 0]
    flags += ["--held-out", 0]
    code, _, err = call(*flags, "--out", tmp_path / "x")
    assert_refused(code, err)
    assert "--sft-epochs 0" in err
    code, out, err = call(*flags, "--sft-epochs", 0, "--out", tmp_path / "x")
    assert code == 0, err
    weights = [folder / "model.safetensors" for folder in (BASE, tmp_path / "x" / "sft")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(rows_of(tmp_path / "x" / "pos" / "pairs.jsonl")) > 5, "not by luck"
    assert {row["stage"] for row in log_of(tmp_path / "x")} == {"pos", "neg"}
    assert "\nneg: margin" in out

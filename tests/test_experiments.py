"""The experiments and benches at their smallest: the whole path of each script, its files, its
resume, and the statistics that they share. Each docstring names the bug it guards."""

import csv
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments" / "bench"))
import lab
import star
import workers
from data import BASE, PRESETS, Tokenizer, UserError, is_correct, read_rows, split_of, split_steps
from model import GPT, Config
from rollout import Pair

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A smaller base, and one thread."""
    torch.set_num_threads(1)
    monkeypatch.setitem(PRESETS["arithmetic"], "model", str(ROOT / "tests" / "base"))


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process: run("star", "--budget", "smoke"). Returns its module."""

    def run(name, *flags):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        module.main()
        return module

    return run


# ---------------------------------------------------------------- experiments


@pytest.mark.parametrize("name", ["controls", "star", "theorem"])
def test_every_script_runs_and_publishes(name, run, tmp_path):
    """A script that nobody ran since the modules changed; a result without seeds, verdicts or
    provenance; a smoke run among the committed results."""
    committed = sorted((ROOT / "experiments" / "results").iterdir())
    run(name, "--budget", "smoke", "--jobs", 1, "--out", tmp_path)
    check_published(name, tmp_path)
    assert sorted((ROOT / "experiments" / "results").iterdir()) == committed


def check_published(name, tmp_path):
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["command"] == f"python experiments/{name}.py --budget smoke"
    assert result["summary"]
    assert result["cells"]
    assert {"commit", "torch", "device_name", "process_seconds"} <= set(result)
    with open(tmp_path / f"{name}.csv", newline="") as file:
        assert list(csv.DictReader(file))
    for cell in result["cells"]:
        for record in cell.get("arms", {}).values():
            if "accuracy" in record:
                accuracy = record["correct"].count("1") / len(record["correct"])
                assert record["accuracy"] == pytest.approx(accuracy, abs=1e-3)


def test_a_sweep_goes_on_where_it_stopped(run, tmp_path):
    """Cells made again, which takes hours; a result that depends on where a sweep was stopped."""
    flags = ("--budget", "smoke", "--jobs", 1, "--out", tmp_path)
    run("smollm", *flags)
    check_published("smollm", tmp_path)
    before = json.loads((tmp_path / "smollm.json").read_text())
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert written
    (tmp_path / "6-0" / "cell.json").unlink()  # as if the sweep was killed before this cell ended
    run("smollm", *flags)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    after = json.loads((tmp_path / "smollm.json").read_text())
    assert after["summary"] == before["summary"]


def test_cells_side_by_side_are_the_same(tmp_path):
    """A cell that depends on the process it is made in; work that no other process can import."""
    losses = []
    for jobs in (1, 2):
        c = lab.LabFlags(budget="smoke", jobs=jobs, out=str(tmp_path / str(jobs)))
        flags = dict(test_limit=10)
        cells = lab.sweep(c, "star", star.pretrain, [("a",), ("b",)], base=70, flags=flags)
        losses += [cell["loss"] for cell in cells.values()]
    assert losses == [losses[0]] * 4


# ---------------------------------------------------------------- the star graph


def test_a_star_problem_has_one_right_path():
    """A solution that does not follow the edges to the goal; the other arm taken for right."""
    for seed in range(50):
        problem = star.star_problem(random.Random(seed), "train")
        edges, ends = problem.question.removesuffix("=").split("/")
        edges = edges.split("|")
        centre, goal = ends.split(">")
        path = problem.answer.split(">")
        assert (path[0], path[-1], len(path)) == (centre, goal, 4)
        for a, b in zip(path[:-1], path[1:], strict=True):
            assert f"{a}>{b}" in edges
        assert is_correct(problem.solution, problem.answer)
        others = [edge.split(">")[1] for edge in edges if edge.split(">")[0] == centre]
        wrong = [node for node in others if node != path[1]]
        assert len(wrong) == 1
        assert not is_correct(">".join([centre, wrong[0], *path[2:]]), problem.answer)
        assert not is_correct(">".join(path[:-1]), problem.answer)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_star_splits_share_no_graph(split):
    """A model that is tested on graphs it was trained on."""
    for problem in star.star_problems(split, 20):
        assert split_of(problem.question) == split


def test_a_step_of_a_star_solution_is_a_node():
    """Pits that fall on '>' or on two nodes at once."""
    tokenizer = Tokenizer.from_pretrained(BASE)
    ids = tokenizer.encode("8>17>14>13") + [tokenizer.eos_id]
    steps = [tokenizer.decode(step) for step in split_steps(ids, tokenizer, "arrows")]
    assert steps == ["8 >", "17 >", "14 >", "13 <eos>"]


def test_both_ways_to_go_on_take_as_many_steps(tmp_path, monkeypatch):
    """DPO and SFT compared after different numbers of optimizer steps; a round that starts from
    another model than the last round's."""
    problems = star.star_problems("train", 20)
    flags = star.FLAGS | dict(test_limit=10, batch=8)
    cell = lab.Cell(tmp_path, problems, val=[], test=star.star_problems("test", 10), **flags)
    cell.fit("start", cell.c.model, cell.teacher, epochs=1, lr=1e-3)

    def pairs_from_truth(cell, name, problems, i, folder):
        """The second node against the centre, for half of the problems."""
        pairs = []
        for problem in problems[:8]:
            prompt = cell.base.prompt(problem)
            ids = cell.base.solution(problem)
            pairs.append(Pair(problem.id, "step", 2, prompt + ids[:2], ids[2:4], ids[:2]))
        return pairs

    monkeypatch.setattr(star, "step_pairs", pairs_from_truth)
    starts = []
    fit = cell.fit

    def watch(name, start, items, **options):
        starts.append((name, start))
        return fit(name, start, items, **options)

    monkeypatch.setattr(cell, "fit", watch)
    curves = star.go_on(cell, "start", "kind", fresh=16, rounds=2)
    assert starts == [
        ("kind-dpo-1", "start"),
        ("kind-sft-1", "start"),
        ("kind-dpo-2", "kind-dpo-1"),
        ("kind-sft-2", "kind-sft-1"),
    ]
    stages = [row["stage"] for row in csv.DictReader(open(tmp_path / "metrics.csv", newline=""))]
    assert [stages.count(name) for name, _ in starts] == [1, 1, 1, 1]
    for curve in curves.values():
        assert [point["steps"] for point in curve] == [0, 1, 2]


# ---------------------------------------------------------------- the base


def test_the_base_can_be_made_again(run, tmp_path):
    """A committed model whose tokenizer and shape no code here makes."""
    run("make_base", "--problems", 27, "--threads", 1, "--out", tmp_path)
    folder = tmp_path / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((BASE / name).read_text())
    GPT.from_pretrained(folder)


# ---------------------------------------------------------------- benches


@pytest.fixture
def in_this_process(monkeypatch):
    """Workers without processes, which take seconds to start; no measuring of the machine."""
    for name in ("sampling", "training"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "limits", lambda *_: (1e9, 1e9))
        monkeypatch.setattr(module, "run_worker", lambda _, __, job, m=module: m.worker(job))


def test_a_worker_is_a_process_of_its_own_checkout():
    """Two commits timed on the same code; an error of a worker as a traceback."""
    commands = workers.commands("sampling.py", "/other", {"vllm": ("", "peer_vllm.py")})
    assert list(commands) == ["ours", "other"]
    assert commands["other"][1] == Path("/other/experiments/bench/sampling.py")
    job = dict(model=str(BASE), prompts=[[5, 6]], n=2, new=3, temperature=0.7, dtype="float32")
    job |= dict(device="cpu", threads=1, slots=None, eos=0)
    result = workers.run_worker("ours", commands["ours"], job)
    assert len(result["tokens"][0]) == 3
    with pytest.raises(UserError, match="other failed: .*No such file"):
        workers.run_worker("other", commands["other"], job)


def test_sampling_is_timed(run, tmp_path, capsys, in_this_process):
    """A bench that nobody ran since the sampler changed; the same code with other tokens."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Mia had 5 cups", "answer": "5"}\n' * 2)
    flags = ["--model", BASE, "--data", questions, "--prompt", "{question}", "--threads", 1]
    flags += ["--samples", 2, "--new-tokens", 4, "--repeats", 1, "--code", ROOT]
    run("sampling", *flags)
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = [("bfloat16", "ours"), ("bfloat16", ROOT.name)]
    rows += [("float32", "ours"), ("float32", ROOT.name)]
    assert [tuple(line.split()[:2]) for line in lines] == rows
    assert lines[-1].endswith("2 of 2 prompts")


def test_training_is_timed(run, capsys, in_this_process):
    """A bench that nobody ran since the loop changed."""
    run("training", "--model", BASE, "--length", 16, "--steps", 1, "--threads", 1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["sft", "sft", "dpo", "dpo"]
    assert [row[1] for row in rows] == ["bfloat16", "float32"] * 2


def test_memory_is_traced(run, monkeypatch, capsys):
    """A trace that counts too little: weights and moments are 12 bytes a parameter, gradients 4
    more."""
    memory = importlib.import_module("memory")
    shape = memory.SHAPES["0.5B"] | dict(num_hidden_layers=1, hidden_size=7168)
    monkeypatch.setattr(memory, "SHAPES", {"wide": shape})
    with torch.device("meta"):
        model = GPT(Config.from_hf(dict(shape, model_type="qwen2")))
    weights = sum(weight.numel() for weight in model.parameters())
    run("memory", "--shapes", "wide", "--tokens", 32)
    name, *sizes = capsys.readouterr().out.splitlines()[-1].split()
    held, in_backward, in_optimizer = (1e9 * float(size) for size in sizes)
    assert held == pytest.approx(12 * weights, rel=0.01)
    assert in_optimizer == pytest.approx(16 * weights, rel=0.01)
    assert in_backward > 16 * weights


def test_values_are_measured(run, tmp_path, capsys):
    """One scan in place of the other."""
    flags = ["--limit", 16, "--solutions", 5, "--rollouts", 2, "--out", tmp_path]
    run("values", *flags)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["full", "first", "again"]
    assert rows[1][3] == "100.0%"  # the pit is the same
    assert int(rows[1][1]) < int(rows[0][1])  # and costs fewer tokens
    assert len(read_rows(tmp_path / "sft" / "samples.jsonl")) == 16


# ---------------------------------------------------------------- statistics


def test_the_multiplier_is_read_off_the_curve():
    """Interpolation on the wrong axis; a bound reported as a measurement; more data held against
    SFT."""
    sizes = [100, 200, 400, 800]
    errors = np.array([0.8, 0.4, 0.2, 0.1])  # error ~ 1 / size
    assert lab.multiplier(sizes, errors, 100, 0.4) == pytest.approx((2.0, False))
    value, is_bound = lab.multiplier(sizes, errors, 100, 0.4 / np.sqrt(2))
    assert value == pytest.approx(2 * np.sqrt(2))
    assert not is_bound
    assert lab.multiplier(sizes, errors, 200, 0.05) == (4.0, True)
    assert lab.multiplier(sizes, errors, 200, 0.9) == pytest.approx((0.5, False))
    bumpy = np.array([0.8, 0.4, 0.5, 0.1])
    assert lab.multiplier(sizes, bumpy, 100, 0.45)[0] < 2
    assert float(lab.slope(sizes, errors[:, None])[0]) == pytest.approx(-1.0)


def test_the_bootstrap_pairs_the_arms():
    """Arms resampled apart: a difference that is the same on every problem and seed would get an
    interval."""
    verdicts = np.random.default_rng(0).integers(0, 2, (3, 200))
    errors = lab.resampled({"a": verdicts, "b": 1 - verdicts})
    np.testing.assert_allclose(errors["a"] + errors["b"], 1.0)
    assert errors["a"][0] == pytest.approx(1 - verdicts.mean())
    assert errors["a"][1:].std() > 0.01


def test_the_spread_over_seeds_is_students():
    """A normal interval where there are three seeds."""
    assert lab.spread([0.5, 0.5, 0.5]) == [0.5, 0.5, 0.5]
    half = 4.30 * 0.1 / np.sqrt(3)
    assert lab.spread([0.4, 0.5, 0.6]) == pytest.approx([0.5, 0.5 - half, 0.5 + half])


def test_the_gpu_bench_runs_on_a_cpu(run, tmp_path, capsys, monkeypatch):
    """The first minutes on a card lost to a bench that was never run."""
    for name in ("gpu", "sampling"):
        monkeypatch.setattr(importlib.import_module(name), "limits", lambda *_: (1e13, 1e12))
    job = "--rows 8 --prompt-tokens 4 --new-tokens 8 --pairs 1 --tokens 16 --threads 1".split()
    run("gpu", "--shape", "tiny", "--device", "cpu", "--out", tmp_path / "gpu.json", *job)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["greedy"]["same_as_cpu"] == 16
    for name in ("sampling bfloat16", "sampling float32", "sft", "dpo"):
        assert found[name]["tokens_per_s"] > 0 and 0 < found[name]["of_limit"] < 1
    assert found["dpo"]["traced_gb"] > 0
    for word in ("captured: no", "decode: ", "of the matrix rate", "all numbers in"):
        assert word in printed

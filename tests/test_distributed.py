"""Two processes under torchrun (gloo, CPU) against one. Each docstring names the bug it guards."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import rollout
import train

ROOT = Path(__file__).resolve().parent.parent
# Batches of 9 in micro-batches of a few: some are shared unevenly, and in some the second process finds nothing left.
TINY = ("--limit 48 --test-limit 12 --samples 6 --negatives 2 --rollouts 3 --keep 2 --batch 9 --micro-tokens 256 "
        "--lr 3e-4 --sft-epochs 2 --generator-epochs 1 --pos-epochs 1 --neg-epochs 1 --nll 0.1 --eval-samples 0 "
        "--max-new-tokens 48 --distractors 1 --steps 3 --device cpu --dtype float32 --threads 1 "
        "--save-seconds 0").split()  # fmt: skip
# A program whose training ends in an error of all processes after some steps.
STOPPED = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import rollout, train
def write_log(path, stage, step, *rest, write=train.write_log):
    if step == 6:
        raise rollout.UsageError("six steps are enough")
    write(path, stage, step, *rest)
train.write_log = write_log
rollout.entry(train.main)
"""
# Several programs in one pair of processes, as starting them takes longest; each word list is a program's command.
SEVERAL = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import json, evaluate, rollout
def main():
    for name, *arguments in json.loads(sys.argv[1]):
        sys.argv[1:] = arguments
        dict(rollout=rollout, evaluate=evaluate)[name].main()
rollout.entry(main)
"""


def two(program, *arguments):
    """A program in two processes: (what torchrun left with, stdout, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([*map(str, [*command, *arguments])], env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def one(main, *arguments):
    """A program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        main()


def furthest(a, b):
    """The largest difference between the weights of two folders."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype for k in a)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def steps_logged(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["stage"], int(row["step"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder after --mode neg in one process, and the same as it stood in the middle of `pos`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")

    def write_log(path, stage, step, *rest, write=train.write_log):
        if stage == "pos" and step == 4:
            raise rollout.UsageError("stopped")
        write(path, stage, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(rollout.UsageError, match="stopped"):
        patch.setattr(train, "write_log", write_log)
        one(train.main, "--out", folder / "half", *TINY)
    shutil.copytree(folder / "half", folder / "whole")
    one(train.main, "--out", folder / "whole", *TINY)
    return folder / "whole", folder / "half"


def test_two_processes_end_where_one_does(runs, tmp_path):
    """Samples that depend on the number of processes; rows lost, doubled or out of order; gradients averaged twice or
    not summed; a clipped norm of one shard; a checkpoint of one process that two cannot go on from."""
    whole, half = runs
    shutil.copytree(half, tmp_path / "x")
    (tmp_path / "x" / "rollouts.jsonl").unlink()  # sample again from the same weights, then go on with `pos`
    with safe_open(tmp_path / "x" / "pos" / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"
    code, out, err = two(ROOT / "train.py", "--out", tmp_path / "x", *TINY, "--save-seconds", 60)
    assert code == 0, err
    for name in ("data.jsonl", "rollouts.jsonl", "values.jsonl", "pairs.jsonl", "sft/eval/greedy.jsonl"):
        assert (tmp_path / "x" / name).read_bytes() == (whole / name).read_bytes(), name
    assert furthest(tmp_path / "x" / "pos", whole / "pos") < 1e-5
    assert furthest(tmp_path / "x" / "neg", whole / "neg") < 1e-5
    assert steps_logged(tmp_path / "x") == steps_logged(whole)
    assert out.count("against sft") == 1 and "Traceback" not in err
    assert not [p for p in (tmp_path / "x").rglob("*") if p.suffix == ".tmp" or "checkpoint" in p.name]
    with open(tmp_path / "x" / "metrics.csv") as a, open(whole / "metrics.csv") as b:
        for mine, theirs in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            for key in ("loss", "nll", "dpo", "margin", "chosen", "rejected", "lr", "grad_norm"):
                assert float(mine[key] or 0) == pytest.approx(float(theirs[key] or 0), rel=1e-3, abs=1e-4), key


def test_one_process_goes_on_from_two(runs, tmp_path):
    """A checkpoint that holds the shard of one process; an error that every process tells, or that leaves the others
    waiting for ever."""
    whole, _ = runs
    (tmp_path / "stopped.py").write_text(STOPPED)
    code, _, err = two(tmp_path / "stopped.py", "--mode", "sft", "--out", tmp_path / "x", *TINY)
    assert code and err.count("error: six steps are enough") == 1 and "exitcode  : 2" in err, err
    assert "Error(" not in err.replace("ChildFailedError(", ""), "torchrun's own traceback is the only one"
    with safe_open(tmp_path / "x" / "sft" / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "6"
    one(train.main, "--mode", "sft", "--out", tmp_path / "x", *TINY)
    assert furthest(tmp_path / "x" / "sft", whole / "sft") < 1e-5
    assert steps_logged(tmp_path / "x") == [row for row in steps_logged(whole) if row[0] == "sft"]


def test_bf16_weights_in_two_processes(tmp_path):
    """An optimizer that rounds the whole of a sharded weight, or the same bits into each shard; bf16 states that a
    checkpoint of two processes cannot give back. The bits differ from one process's, so the curves are only near."""
    flags = ["--mode", "sft", "--weights", "bfloat16", *TINY]
    (tmp_path / "stopped.py").write_text(STOPPED)
    code, _, err = two(tmp_path / "stopped.py", "--out", tmp_path / "two", *flags)
    assert code and "six steps are enough" in err, err
    with safe_open(tmp_path / "two" / "sft" / "checkpoint.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}
    code, _, err = two(ROOT / "train.py", "--out", tmp_path / "two", *flags)
    assert code == 0, err
    one(train.main, "--out", tmp_path / "one", *flags)
    logs = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "two")]
    (a, b) = ([float(row["nll"]) for row in log] for log in logs)
    assert a == pytest.approx(b, abs=0.03)
    assert 0 < furthest(tmp_path / "one" / "sft", tmp_path / "two" / "sft") < 0.02


def test_rollout_and_evaluate_in_two_processes(tmp_path):
    """Programs that write their files twice or in another order, or read them before they stand; a folder of another
    configuration that only the first process refuses."""
    shared = ["--model", train.BASE, "--data", "arithmetic", "--limit", 7, "--prompt", "{question}\n", "--device",
              "cpu", "--max-new-tokens", 32, "--threads", 1]  # fmt: skip
    rolled = [*shared, "--samples", 4, "--temperature", 1.5, "--values", 2, "--scan", "bisect", "--out"]
    judged = [*shared, "--samples", 3, "--values", 2, "--out"]
    one(rollout.main, *rolled, tmp_path / "r1")
    one(evaluate.main, *judged, tmp_path / "e1")
    (tmp_path / "several.py").write_text(SEVERAL)
    commands = [["rollout", *rolled, tmp_path / "r2"], ["evaluate", *judged, tmp_path / "e2"],
                ["rollout", *rolled, tmp_path / "r2", "--seed", 5]]  # fmt: skip
    _, out, err = two(tmp_path / "several.py", json.dumps([[str(word) for word in command] for command in commands]))
    assert err.count("error: ") == 1 and "seed" in err and "exitcode  : 2" in err, err
    for name in ("rollouts.jsonl", "values.jsonl"):
        assert (tmp_path / "r2" / name).read_bytes() == (tmp_path / "r1" / name).read_bytes(), name
    for name in ("results.json", "model/greedy.jsonl", "model/samples.jsonl", "model/values.jsonl"):
        assert (tmp_path / "e2" / name).read_bytes() == (tmp_path / "e1" / name).read_bytes(), name
    assert out.count("28 solutions of 7 problems") == 1 and out.count("step  1   Q") == 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares(monkeypatch, world):
    """An example that no process or two of them train on; a process with fewer passes than another, which then waits
    for ever; one with more tokens than it was allowed."""
    items, tokens = [f"{i}" * (1 + i * 7 % 13) for i in range(23)], 24
    blocks, parts = [], []
    for rank in range(world):
        for module in (rollout, train):
            monkeypatch.setattr(module, "RANK", rank)
            monkeypatch.setattr(module, "WORLD", world)
        blocks += rollout.share(items)
        parts.append(train.shares(items, len, tokens))
    assert blocks == items
    assert len({len(part) for part in parts}) == 1
    real = [item for part in parts for group, weight in part if weight for item in group]
    assert sorted(real) == sorted(items) and {weight for part in parts for _, weight in part} <= {0, world}
    groups = [group for part in parts for group, _ in part]
    assert all(group and (len(group) == 1 or len(group) * max(map(len, group)) <= tokens) for group in groups)
    assert any(weight == 0 for part in parts for _, weight in part) == (world == 5), "stand-ins where items run out"

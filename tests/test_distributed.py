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
from data import UserError
from rollout import Example, Pair
from test_train import KINDS, config, items_of, loss_of, make_policy

ROOT = Path(train.__file__).parent
BASE = ROOT / "tests" / "base"  # a smaller one
# Batches of 9 in micro-batches of a few: some are shared unevenly, and in some the second process
# finds nothing left.
TINY = f"""--model {BASE} --limit 32 --test-limit 12 --held-out 6
    --samples 6 --negatives 2 --rollouts 3 --keep 2 --batch 9
    --micro-tokens 256 --lr 1e-4 --sft-epochs 2 --generator-epochs 1 --pos-epochs 1 --neg-epochs 1
    --nll 0.1 --eval-samples 0 --max-new-tokens 48 --distractors 1 --steps 3 --device cpu
    --dtype float32 --threads 1 --save-seconds 0""".split()
# The program of the two processes: runs several others, as starting it takes longest.
PROGRAM = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import evaluate, rollout, test_distributed, train

def main():
    for name, *arguments in json.loads(sys.argv[1]):
        if name == "losses":
            test_distributed.compare_losses()
        else:
            sys.argv[1:] = arguments
            sys.modules[name].main()

if __name__ == "__main__":
    rollout.run_program(main)
"""
# Put before it: training that ends in an error of both processes after some steps. The first to
# fail is slow to say so.
STOP = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import data, rollout, train

def write(log, step, *rest, write=train.Log.write):
    if step == 6:
        raise data.UserError("six steps are enough")
    write(log, step, *rest)

def slow_print(*args, **kwargs):
    time.sleep(1)
    print(*args, **kwargs)

train.Log.write = write
rollout.print = slow_print
"""


def two(folder, source, *commands):
    """Commands, lists of words, in two processes: (torchrun's exit code, stdout, stderr)."""
    program = folder / "program.py"
    program.write_text(source)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", program, json.dumps(commands)],
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


def one(program, *arguments):
    """A program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        program.main()


def furthest(a, b):
    """The largest difference between the weights of two folders."""
    a = load_file(a / "model.safetensors")
    b = load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def log_of(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_log(a, b):
    """But for the last digits, and the accuracy, whose margins may be 0 up to them."""
    for mine, theirs in zip(log_of(a), log_of(b), strict=True):
        assert (mine["stage"], mine["step"]) == (theirs["stage"], theirs["step"])
        for name in ("loss", "nll", "pair_loss", "margin", "chosen", "rejected", "lr", "grad_norm"):
            want = float(theirs[name] or 0)
            assert float(mine[name] or 0) == pytest.approx(want, rel=1e-3, abs=1e-4), name


def step_of(folder):
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return int(file.metadata()["step"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder after --mode neg in one process, and the same in the middle of `pos`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    write = train.Log.write

    def stopped(log, step, *rest):
        if log.stage == "pos" and step == 4:
            raise UserError("stopped")
        write(log, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(train.Log, "write", stopped)
        one(train, "--out", folder / "half", *TINY)
    shutil.copytree(folder / "half", folder / "whole")
    one(train, "--out", folder / "whole", *TINY)
    return folder / "whole", folder / "half"


def test_two_processes_end_where_one_does(runs, tmp_path):
    """Samples that depend on the number of processes; rows lost, doubled or out of order; gradients
    averaged twice or not summed; a clipped norm of one shard; a checkpoint of one process that two
    cannot go on from; a loss whose mean depends on how a batch is shared; programs that write their
    files twice or in another order; a folder of another configuration that only the first process
    refuses."""
    whole, half = runs
    out = tmp_path / "x"
    shutil.copytree(half, out)
    (out / "generator" / "samples.jsonl").unlink()  # sampled again, then `pos` goes on
    assert step_of(out / "pos") == 4
    shared = ["--model", BASE, "--limit", 7, "--prompt", "{question}\n", "--device", "cpu"]
    shared += ["--max-new-tokens", 32, "--threads", 1, "--rollouts", 2]
    sampled = [*shared, "--samples", 4, "--temperature", 1.5, "--out"]
    judged = [*shared, "--samples", 3, "--out"]
    one(rollout, *sampled, tmp_path / "r1")
    one(evaluate, *judged, tmp_path / "e1")
    code, printed, err = two(  # at once, as starting takes longest
        tmp_path,
        PROGRAM,
        ["train", "--out", out, *TINY, "--save-seconds", 60],
        ["losses"],
        ["rollout", *sampled, tmp_path / "r2"],
        ["evaluate", *judged, tmp_path / "e2"],
    )
    assert code == 0 and "Traceback" not in err, err
    for name in ("samples.jsonl", "values.jsonl"):
        assert (tmp_path / "r2" / name).read_bytes() == (tmp_path / "r1" / name).read_bytes(), name
    [first] = (tmp_path / "e1").iterdir()
    for name in ("results.json", "greedy.jsonl", "samples.jsonl", "values-greedy-2.jsonl"):
        second = tmp_path / "e2" / first.name / name
        assert second.read_bytes() == (first / name).read_bytes(), name
    assert printed.count("28 samples") == 1 and printed.count("step  1  Q") == 1
    assert printed.count("against sft") == 1
    assert not [path for path in out.rglob("*") if "tmp" in path.name or "checkpoint" in path.name]
    rows = ["generator/samples", "pos/samples", "pos/values", "pos/pairs", "sft/eval/greedy"]
    for name in ("data", "test", *rows):
        path = f"{name}.jsonl"
        assert (out / path).read_bytes() == (whole / path).read_bytes(), name
    assert furthest(out / "pos", whole / "pos") < 1e-5
    assert furthest(out / "neg", whole / "neg") < 1e-5
    assert_same_log(out, whole)
    code, _, err = two(tmp_path, PROGRAM, ["rollout", *sampled, tmp_path / "r2", "--seed", 5])
    assert code != 0
    assert err.count("error: ") == 1 and "this run was begun with seed=0" in err, err


def test_one_process_goes_on_from_two(runs, tmp_path):
    """A checkpoint that holds the shard of one process; an error that both processes tell, or that
    leaves one waiting for ever."""
    whole, _ = runs
    out = tmp_path / "x"
    flags = ["--mode", "sft", "--out", out, *TINY]
    code, _, err = two(tmp_path, STOP + PROGRAM, ["train", *flags])
    assert code != 0
    assert err.count("error: six steps are enough") == 1, err
    assert err.count("Traceback") == 1, "torchrun's own"
    assert step_of(out / "sft") == 6
    one(train, *flags)
    assert furthest(out / "sft", whole / "sft") < 1e-5
    steps = [row["step"] for row in log_of(whole) if row["stage"] == "sft"]
    assert [row["step"] for row in log_of(out)] == steps


def compare_losses():
    """In two processes: the gradient and the log of a batch are those of one process."""
    for kind in KINDS:
        c = config(micro_tokens=60, nll=0.5)
        items = items_of(kind, 7)
        policy = make_policy(seed=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "PROCESSES", 1)
            patch.setattr(train, "RANK", 0)
            if isinstance(items[0], Pair):
                train.add_reference(make_policy(), items, c)
            log = train.forward_backward(policy, items, loss_of(kind), c)
        want = {name: p.grad for name, p in policy.model.named_parameters()}
        policy = make_policy(seed=5)
        train.shard_model(policy.model, policy)
        sums = train.forward_backward(policy, items, loss_of(kind), c)
        grads = {name: p.grad for name, p in policy.model.named_parameters()}
        metrics = train.read_metrics(sums, torch.nn.utils.get_total_norm(grads.values()))
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
        torch.testing.assert_close(grads, want, rtol=1e-3, atol=1e-5)
        for name, value in log.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards(monkeypatch, world):
    """An example that no process or two of them train on; a process with fewer passes than another,
    which then waits for ever; one with more tokens than it was allowed."""
    examples = [Example(str(i), [5], [6] * (i * 7 % 13)) for i in range(31)]
    blocks = []
    parts = []
    for rank in range(world):
        for module in (rollout, train):
            monkeypatch.setattr(module, "RANK", rank)
            monkeypatch.setattr(module, "PROCESSES", world)
        blocks += rollout.shard(examples)
        parts.append(train.my_micro_batches(examples, tokens=24))
    assert blocks == examples
    assert len({len(part) for part in parts}) == 1, "as many passes in each process"
    groups = sum(parts, [])
    for group, weight in groups:
        assert len(group) == 1 or len(group) * max(map(train.token_count, group)) <= 24
        assert weight in (0, world)
    trained = sum([group for group, weight in groups if weight], [])
    assert sorted(map(id, trained)) == sorted(map(id, examples))
    assert any(weight == 0 for _, weight in groups) == (world == 5), "where items run out"

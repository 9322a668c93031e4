"""Nothing lost: processes killed, folders shared, disks full, memory short. Each docstring names the bug it guards.

    python tests/test_reliability.py FOLDER KILLS SEED      # the kill test alone, with as many kills as you like
"""

import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import rollout
import train
from rollout import append_rows, entry, sample

TINY = ("--mode neg --limit 40 --test-limit 8 --samples 6 --negatives 2 --rollouts 3 --keep 2 --batch 16 --rounds 2 "
        "--sft-epochs 3 --generator-epochs 2 --pos-epochs 2 --neg-epochs 1 --eval-samples 2 --max-new-tokens 40 "
        "--distractors 1 --steps 3 --device cpu --dtype float32 --threads 1 --save-seconds 0").split()  # fmt: skip


def fork(*flags, out="/dev/null", before=lambda: None):
    """train.py in a process of its own, without the seconds that importing torch takes; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(out, "a", buffering=1)
    code = 70
    try:
        before()
        sys.argv = ["train.py", *map(str, flags)]
        entry(train.main)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code)


def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def artifacts(folder):
    """{file: hash} of all that a run leaves, without what tells the time."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name not in ("lock", "config.json")):
        text = path.read_bytes()
        if path.name == "metrics.csv":
            text = b"\n".join(line.rsplit(b",", 1)[0] for line in text.splitlines())
        found[str(path.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return found | {"config": json.loads((Path(folder) / "config.json").read_text())["seed"]}


def kill_at_random(folder, kills, seed):
    """Kill runs at random moments, starting each again until it ends; {"kills", "runs", "differ": files that are not
    as in an undisturbed run}."""
    torch.set_num_threads(1)
    rng, folder, began = random.Random(seed), Path(folder), time.monotonic()
    assert finish(fork(*TINY, "--out", folder / "calm")) == 0
    whole, calm = time.monotonic() - began, artifacts(folder / "calm")
    done, runs, differ = 0, 0, []
    while done < kills or runs == 0:
        out = folder / f"killed{runs}"
        while True:
            pid = fork(*TINY, "--out", out, out=folder / "log")
            if done < kills:
                time.sleep(rng.uniform(0, whole / 3))
            if done < kills and os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                finish(pid)
                done += 1
            elif done < kills or finish(pid) == 0:
                break
            else:
                return dict(kills=done, runs=runs, differ=["exit code"], log=(folder / "log").read_text()[-2000:])
        found = artifacts(out)
        runs, differ = runs + 1, differ + [name for name in {**calm, **found} if calm.get(name) != found.get(name)]
    return dict(kills=done, runs=runs, differ=differ, seconds=round(time.monotonic() - began))


def test_killed_runs_end_in_the_same_files(tmp_path):
    """A stage that skips or repeats work after SIGKILL, reads half a file, or draws other random numbers."""
    command = [sys.executable, __file__, str(tmp_path), "20", "0"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20 and result["runs"] >= 1 and not result["differ"], result


def one_line(path):
    text = Path(path).read_text().strip().split("\n")[-1]
    assert text.startswith("error: ") and "Traceback" not in Path(path).read_text(), text
    return text


def test_two_processes_on_one_folder(tmp_path):
    """Two writers in one file; a lock that outlives its owner; a killed run's half files, of a model's size each."""
    torch.set_num_threads(1)
    pid = fork(*TINY, "--out", tmp_path / "x")
    while not (tmp_path / "x" / "sft" / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    second = fork(*TINY, "--out", tmp_path / "x", out=tmp_path / "log")
    assert finish(second) == 2
    assert f"process {pid}" in one_line(tmp_path / "log") and "--out" in one_line(tmp_path / "log")
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    for name in ("sft", "generator"):  # what safetensors leaves when it is killed
        (tmp_path / "x" / name).mkdir(exist_ok=True)
        (tmp_path / "x" / name / ".tmpKzpR8f").write_text("half")
    assert finish(fork(*TINY, "--mode", "sft", "--out", tmp_path / "x")) == 0, "the lock goes with its owner"
    assert not list(tmp_path.rglob("*tmp*"))


def test_a_full_disk_costs_nothing(tmp_path):
    """Half a file taken for a whole one, or a traceback, where the disk was full."""
    torch.set_num_threads(1)
    flags = [*TINY, "--mode", "sft", "--test-limit", "4", "--eval-samples", "0", "--out"]
    assert finish(fork(*flags, tmp_path / "calm")) == 0
    for limit in (300, 9_000, 400_000, 1_000_000):

        def full(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        log = tmp_path / f"log{limit}"
        log.write_text("")
        assert finish(fork(*flags, tmp_path / "x", before=full, out=log)) == 2, limit
        assert "the same command goes on" in one_line(log)
    assert finish(fork(*flags, tmp_path / "x", out=tmp_path / "last")) == 0, (tmp_path / "last").read_text()
    assert artifacts(tmp_path / "x") == artifacts(tmp_path / "calm")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """Ctrl-C that loses the minutes since the last checkpoint, or leaves a traceback."""
    torch.set_num_threads(1)
    flags = [*TINY, "--mode", "sft", "--sft-epochs", "40", "--save-seconds", "1000", "--out", tmp_path / "x"]
    pid = fork(*flags, out=tmp_path / "log")
    while not (tmp_path / "x" / "metrics.csv").exists() or (tmp_path / "x" / "metrics.csv").read_text().count("\n") < 5:
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert finish(pid) == 130
    text = (tmp_path / "log").read_text()
    assert "the same command goes on from here" in text and "Traceback" not in text
    steps = (tmp_path / "x" / "metrics.csv").read_text().count("\n") - 1
    weights = {"w": torch.zeros(1)}
    with pytest.raises(rollout.UsageError, match="expected our checkpoint"):  # it is there, of another model
        train.load_checkpoint(tmp_path / "x" / "sft" / "checkpoint.safetensors", weights, None, 1000)
    with train.safe_open(tmp_path / "x" / "sft" / "checkpoint.safetensors", framework="pt") as file:
        assert int(file.metadata()["step"]) == steps


def test_ctrl_c_twice_stops_at_once(capsys):
    """A step of minutes that cannot be stopped but by SIGKILL."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt), train.interrupts_held() as held:
        signal.raise_signal(signal.SIGINT)
        assert held and "once more" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_of_other_problems(tmp_path):
    """Samples of the old problems under the ids of the new ones, when the file behind --data has been changed."""
    problems = [dict(question=p.question, answer=p.solution) for p in train.load_problems("arithmetic", "train", 20)]
    flags = [*TINY, "--mode", "sft", "--limit", 0, "--test-limit", 0, "--eval-samples", 0, "--prompt", "{question}\n",
             "--data", tmp_path / "p.jsonl", "--model", train.BASE, "--out", tmp_path / "x"]  # fmt: skip
    append_rows(tmp_path / "p.jsonl", problems)
    assert finish(fork(*flags)) == 0
    before = artifacts(tmp_path / "x")
    problems[9]["question"] += " "  # of the test
    rollout.write_rows(tmp_path / "p.jsonl", problems)
    assert finish(fork(*flags, out=tmp_path / "log")) == 2 and artifacts(tmp_path / "x") == before
    assert "data_hash" in one_line(tmp_path / "log") and "--out" in one_line(tmp_path / "log")


def test_every_program_takes_the_lock(tmp_path, monkeypatch):
    """A program that writes into a folder where another one works."""
    with open(tmp_path / "lock", "a+") as file:
        file.write("process 1 on here")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for main, flags in ((train.main, ["--mode", "base"]), (train.main, ["--mode", "sft"]),
                            (rollout.main, ["--model", train.BASE, "--prompt", "{question}"]),
                            (evaluate.main, ["--model", train.BASE])):  # fmt: skip
            flags = ["program", *flags, "--limit", 9, "--threads", 1, "--out", tmp_path]
            monkeypatch.setattr(sys, "argv", [str(flag) for flag in flags])
            with pytest.raises(rollout.UsageError, match="process 1 on here works here"):
                main()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("damage", ["shape", "step", "no step", "moment", "cut"])
def test_a_damaged_checkpoint(tmp_path, damage):
    """A checkpoint of other shapes stretched over the weights, or met by torch in the middle of a step."""
    weights, path = {"w": torch.zeros(4, 3, requires_grad=True)}, tmp_path / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(weights.values())
    weights["w"].grad = torch.ones(4, 3)
    optimizer.step()
    train.save_checkpoint(path, weights, optimizer, 7)
    assert train.load_checkpoint(path, weights, optimizer, 9) == 7
    tensors = {f"{key}.w": torch.ones(4, 3) for key in ("weight", "exp_avg", "exp_avg_sq")}
    tensors |= dict(shape={"weight.w": torch.ones(1, 3)}, moment={"exp_avg.w": torch.ones(3, 4)}).get(damage, {})
    metadata = {"step": "-3"} if damage == "step" else None if damage == "no step" else {"step": "7"}
    train.save_file(tensors, path, metadata=metadata)
    path.write_bytes(path.read_bytes()[: -1 if damage == "cut" else None])
    with pytest.raises(rollout.UsageError, match="checkpoint.safetensors.*delete it to start over"):
        train.load_checkpoint(path, weights, optimizer, 9)
    assert (weights["w"] != 1).all(), "refused before anything is overwritten"


def test_a_damaged_log(tmp_path):
    """A line of metrics.csv that was cut, or edited, in the way of all further training."""
    path, whole = tmp_path / "metrics.csv", ["sft", "1", *"0" * 10]
    for line in ("sft,x" + ",0" * 10, "sft,\u00b2" + ",0" * 10, "\0" * 200_000 + ",1", '"sft,2', "sft,3,0.5"):
        path.write_text("\n".join([",".join(evaluate.COLUMNS), ",".join(whole), line]))
        train.cut_log(path, "pos", 0)
        assert path.read_text().splitlines() == [",".join(evaluate.COLUMNS), ",".join(whole)]


def test_out_of_memory_halves_the_slots(monkeypatch, capsys):
    """Hours of sampling lost because the last, longest prompts did not fit; results that depend on the slots."""
    torch.set_num_threads(1)
    config = train.TrainConfig(threads=1, prompt="{question}\n")
    policy = rollout.load_policy(train.BASE, config)
    problems = train.load_problems("arithmetic", "train", 4)
    prompts, real, asked = [policy.prompt(p) for p in problems], rollout.generate, []
    want = policy.generate(prompts, 4, max_new_tokens=12, seed=1)

    def tight(model, prompts, n, **options):
        asked.append(options["slots"])
        if (options["slots"] or 99) > 3:
            kinds = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("alloc_cpu: can't allocate memory")]
            raise kinds[len(asked) % 2]
        return real(model, prompts, n, **options)

    monkeypatch.setattr(rollout, "generate", tight)
    assert policy.generate(prompts, 4, max_new_tokens=12, seed=1) == want
    assert asked == [None, 8, 4, 2] and capsys.readouterr().err.count("\n") == 3
    monkeypatch.setattr(rollout, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.generate(prompts, max_new_tokens=4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("alloc_cpu: can't allocate memory")])
def test_out_of_memory_in_training_names_the_flags(error, capsys):
    """A page of traceback where a flag would help; other errors hidden behind the same line."""

    def main(error=error):
        raise error

    with pytest.raises(SystemExit) as stop:
        entry(main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1 and "--micro-tokens" in text
    with pytest.raises(RuntimeError, match="shape"):
        entry(lambda: main(RuntimeError("shape mismatch")))


SOLUTION = dict(ids=[5, 6, 0], text="x", ended=True, correct=False)


@pytest.mark.parametrize("row", [
    [], 3, None, dict(id="train-0-0"), dict(id=["train-0-0"], temperature=1, samples=[SOLUTION] * 2),
    dict(id=0, temperature=1, samples=[SOLUTION] * 2),  # ids are text: a number would be nobody's row
    *(dict(id="train-0-0", temperature=1, samples=samples) for samples in (
        None, [], [SOLUTION], [SOLUTION, 3], [SOLUTION] * 3, [SOLUTION, SOLUTION | {"correct": "yes"}],
        [SOLUTION, SOLUTION | {"ids": []}], [SOLUTION, SOLUTION | {"ids": [5, 6]}],  # ended, but where?
        [SOLUTION, SOLUTION | {"ids": [10**9]}], [SOLUTION, SOLUTION | {"ids": [True]}],
        [SOLUTION, SOLUTION | {"ids": "5"}], [SOLUTION, dict(ids=[5], text="x", correct=True)]))])  # fmt: skip
def test_rows_of_another_sampler_are_checked(tmp_path, row):
    """A traceback, or nonsense trained on, because a file that others may write was believed."""
    policy = rollout.load_policy(train.BASE, train.TrainConfig(threads=1, prompt="{question}\n"))
    problems, path = train.load_problems("arithmetic", "train", 1), tmp_path / "rollouts.jsonl"
    options = dict(n=2, max_new_tokens=4, temperature=1.0, seed=0)
    append_rows(path, [dict(id="train-0-0", temperature=1, samples=[SOLUTION, SOLUTION])])
    path.write_bytes(path.read_bytes()[:-1])  # its last line is whole, and has no newline
    assert sample(policy, problems, path, **options)["train-0-0"]["samples"] == [SOLUTION, SOLUTION]
    append_rows(path, [dict(id="train-0-0", temperature=1, samples=[SOLUTION, SOLUTION])])
    with pytest.raises(ValueError, match="each id once"):
        sample(policy, problems, path, **options)
    path.unlink()
    append_rows(path, [row])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="rollouts.jsonl") as error:
        sample(policy, problems, path, **options)
    assert "\n" not in str(error.value) and path.read_bytes() == before


VALUED = dict(id="train-0-0", sample=0, correct=False, ids=[5, 6, 0], text="x", ends=[1, 3], values=[0.5, 0.5, 0.0],
              best=[1.0, 1.0, 0.0], pit=2, right=[[7, 0]])  # fmt: skip


@pytest.mark.parametrize("change", [
    dict(id=[1]), dict(sample={}), dict(correct=True), dict(correct="no"), dict(ids="56"), dict(ids=[5, 7, 0]),
    dict(text=None), dict(ends=[]), dict(ends=[], values=[0.0], best=[0.0]), dict(ends=["1", 3]), dict(ends=[3, 3]),
    dict(ends=[-1, 3]), dict(ends=[1, 2]), dict(values=[0.5, 0.0]), dict(values=[0.5, "0", 0.0]),
    dict(values=[0.5, float("nan"), 0.0]), dict(values=[None, 0.5, 0.0]), dict(values=[0.5, 0.5, None]), dict(pit=0),
    dict(pit=9), dict(pit="2"), dict(pit=1), dict(best=3), dict(right=5), dict(right=[5]), dict(right=[[10**9]]),
    dict(right=[[]])])  # fmt: skip
def test_rows_of_values_are_checked(tmp_path, change):
    """A damaged row that ends in a traceback, or values of rollouts that have been replaced since, trained on."""
    policy = rollout.load_policy(train.BASE, train.TrainConfig(threads=1, prompt="{question}\n"))
    problems, path = {p.id: p for p in train.load_problems("arithmetic", "train", 1)}, tmp_path / "values.jsonl"
    value = lambda: rollout.estimate_values(  # noqa: E731
        policy, problems, {("train-0-0", 0): ([5, 6, 0], False, 0.5)}, path, k=2, scan="first", max_new_tokens=4,
        temperature=1.0, seed=0)  # fmt: skip
    append_rows(path, [VALUED, VALUED | {"id": "elsewhere"}])
    assert value() == {("train-0-0", 0): VALUED}, "kept, and no more than was asked for"
    path.unlink()
    append_rows(path, [VALUED | change])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="values.jsonl") as error:
        value()
    assert "\n" not in str(error.value) and path.read_bytes() == before


if __name__ == "__main__":
    print(json.dumps(kill_at_random(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

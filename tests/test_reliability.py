"""Nothing lost: processes killed, folders shared, disks full, memory short.

Each docstring names the bug it guards. The test of kills alone, with any number of them:

    python tests/test_reliability.py FOLDER KILLS SEED
"""

import errno
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
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import rollout
import train
from data import Tokenizer, UserError, append_rows, load_problems, read_rows, write_rows

BASE = Path(__file__).parent / "base"  # a smaller one
TINY = f"""--model {BASE} --limit 12 --test-limit 2 --held-out 2
    --samples 4 --negatives 2 --rollouts 2 --keep 2 --batch 8
    --rounds 2 --sft-epochs 2 --generator-epochs 1 --pos-epochs 1 --neg-epochs 1 --eval-samples 2
    --max-new-tokens 32 --distractors 1 --steps 3 --device cpu --dtype float32 --threads 1
    --save-seconds 0""".split()


def fork(*flags, log="/dev/null", before=lambda: None):
    """train.py in a process of its own, without the seconds that importing torch takes. Returns its
    id. `before` runs in it first."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    code = 70
    try:
        before()
        sys.argv = ["train.py", *map(str, flags)]
        rollout.run_program(train.main)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code)


def finish(pid):
    """Wait for a process. Returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid):
    """Kill a process. Returns whether it had not ended by itself."""
    running = os.waitpid(pid, os.WNOHANG) == (0, 0)
    if running:
        os.kill(pid, signal.SIGKILL)
        finish(pid)
    return running


def artifacts(out):
    """{file: hash} of all that a run leaves, without what tells the time."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir() or path == out / "config.json":
            continue
        content = path.read_bytes()
        if path.name == "metrics.csv":
            content = b"\n".join(line.rsplit(b",", 1)[0] for line in content.splitlines())
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def kill_at_random(folder, kills, seed):
    """Kill runs at random moments, going on with each until it ends. Returns how many runs that
    took, and the files in which they differ from an undisturbed one."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    began = time.monotonic()
    assert finish(fork(*TINY, "--out", folder / "calm")) == 0
    whole = time.monotonic() - began
    calm = artifacts(folder / "calm")
    done = 0
    runs = 0
    differ = set()
    while done < kills:
        out = folder / f"killed{runs}"
        killed = True
        while killed and done < kills:
            pid = fork(*TINY, "--out", out)
            time.sleep(rng.uniform(0, 0.7 * whole))
            killed = kill(pid)
            if killed:
                done += 1
        assert finish(fork(*TINY, "--out", out)) == 0
        runs += 1
        differ |= {name for name, _ in artifacts(out).items() ^ calm.items()}
    return dict(kills=done, runs=runs, differ=sorted(differ))


def test_killed_runs_end_in_the_same_files(tmp_path):
    """A stage that skips or repeats work after SIGKILL, reads half a file, or draws other random
    numbers."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, __file__, str(tmp_path), "4", "0"]  # pytest itself has threads
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 4 and result["differ"] == [], result


def last_line(log):
    """The one line of an error."""
    text = log.read_text()
    line = text.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in text, text
    return line


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


def test_two_processes_on_one_folder(tmp_path):
    """Two writers in one file; a lock that outlives its owner; a killed run's half files, of a
    model's size each."""
    torch.set_num_threads(1)
    out = tmp_path / "x"
    flags = [*TINY, "--mode", "sft", "--sft-epochs", 9, "--out", out]
    first = fork(*flags)
    wait_for(out / "sft" / "checkpoint.safetensors")
    os.kill(first, signal.SIGSTOP)
    assert finish(fork(*flags, log=tmp_path / "log")) == 2
    assert "another process is working in this folder" in last_line(tmp_path / "log")
    assert kill(first)
    assert not (out / "sft" / "model.safetensors").exists()
    for name in ("sft", "generator"):  # what safetensors leaves when it is killed
        (out / name).mkdir(exist_ok=True)
        (out / name / ".tmpKzpR8f").write_text("half")
    assert finish(fork(*flags)) == 0, "the lock goes with its owner"
    assert not list(out.rglob("*tmp*"))


def test_a_full_disk_costs_nothing(tmp_path):
    """Half a file taken for a whole one, or a traceback, where the disk was full."""
    torch.set_num_threads(1)
    flags = [*TINY, "--mode", "sft", "--eval-samples", 0, "--out"]
    assert finish(fork(*flags, tmp_path / "calm")) == 0
    for limit in (300, 9_000, 400_000, 1_000_000):

        def fill_disk(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        log = tmp_path / f"log{limit}"
        log.write_text("")  # before the disk is full
        assert finish(fork(*flags, tmp_path / "x", before=fill_disk, log=log)) == 2, limit
        last_line(log)
    assert finish(fork(*flags, tmp_path / "x")) == 0
    assert artifacts(tmp_path / "x") == artifacts(tmp_path / "calm")


def test_ctrl_c_says_how_to_go_on(tmp_path):
    """Ctrl-C that leaves a traceback."""
    torch.set_num_threads(1)
    log = tmp_path / "log"
    pid = fork(*TINY, "--mode", "sft", "--sft-epochs", 40, "--out", tmp_path / "x", log=log)
    wait_for(tmp_path / "x" / "sft" / "checkpoint.safetensors")
    os.kill(pid, signal.SIGINT)
    assert finish(pid) == 130
    assert log.read_text().endswith("stopped; the same command goes on from here\n")
    assert "Traceback" not in log.read_text()


def test_a_folder_of_other_problems(tmp_path):
    """Samples of the old problems under the ids of the new ones, when the file behind --data has
    been changed."""
    torch.set_num_threads(1)
    path = tmp_path / "p.jsonl"
    own = ["--data", path, "--model", BASE, "--prompt", "{question}\n", "--out", tmp_path / "x"]
    flags = [*TINY, "--mode", "sft", "--limit", 0, "--test-limit", 0, "--eval-samples", 0, *own]
    problems = load_problems("arithmetic", "train", 40)
    rows = [dict(question=p.question, answer=p.solution) for p in problems]
    tested = [i for i, problem in enumerate(problems) if train.is_test(problem)]
    append_rows(path, rows)
    assert finish(fork(*flags)) == 0
    before = artifacts(tmp_path / "x")
    for i, name in ((tested[0], "test_hash"), (1 if tested[0] == 0 else 0, "data_hash")):
        changed = [dict(row) for row in rows]
        changed[i]["answer"] = "1 + 1 = 2\n" + changed[i]["answer"]
        write_rows(path, changed)
        assert finish(fork(*flags, log=tmp_path / "log")) == 2
        assert name in last_line(tmp_path / "log")
        assert artifacts(tmp_path / "x") == before


@pytest.mark.parametrize("program", [train, rollout, evaluate])
def test_every_program_takes_the_lock(tmp_path, monkeypatch, program):
    """A program that writes into a folder where another one works."""
    flags = ["--limit", "9", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    if program is train:
        flags += ["--test-limit", "9"]
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    if program is evaluate:  # a folder of its own for each model
        monkeypatch.setattr(evaluate, "responses_folder", lambda *arguments: tmp_path)
    with FileLock(tmp_path / "lock"), pytest.raises(UserError, match="another process"):
        program.main()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_without_locks(tmp_path, monkeypatch, capsys, number):
    """Every run on a network disk stopped by "No locks available", of no file. It goes on with a
    note; a lock file that cannot be made is still an error, which names it."""

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    data.note.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = tmp_path / "x"
    for _ in range(2):
        data.lock_folder(folder)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {folder}: {os.strerror(number)}; ") and said.count("\n") == 1
    (tmp_path / "y" / "lock").mkdir(parents=True)
    with pytest.raises(OSError, match="y/lock"):
        data.lock_folder(tmp_path / "y")


class PretendEngine:
    """What the program of FILES.md uses of vLLM. It fails, or answers every prompt with "#### 3",
    the end of text now and then left out of the ids."""

    fails = False
    started = []

    def __init__(self, folder, dtype, generation_config):
        self.started.append(dtype)
        if self.fails:
            raise RuntimeError("no memory")

    def generate(self, prompts, params):
        three = Tokenizer.from_pretrained(BASE).encode("#### 3")
        whole = SimpleNamespace(token_ids=[*three, 0], finish_reason="stop", stop_reason=None)
        bare = SimpleNamespace(token_ids=three, finish_reason="stop", stop_reason=0)
        none = SimpleNamespace(token_ids=[], finish_reason="stop", stop_reason=0)
        cut = SimpleNamespace(token_ids=three, finish_reason="length", stop_reason=None)
        return [SimpleNamespace(outputs=[whole, bare, none, cut]) for _ in prompts]


def test_the_other_engine_of_the_docs(tmp_path, monkeypatch):
    """Hours of samples emptied by a start that failed; samples drawn in bfloat16, to which a short
    fine-tune is rounded away; an end of text that is missing or an IndexError."""
    page = (Path(data.__file__).parent / "experiments" / "FILES.md").read_text()
    program = page.split("With vLLM:\n\n```python\n")[1].split("```")[0]
    pretended = SimpleNamespace(LLM=PretendEngine, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", pretended)
    Tokenizer.from_pretrained(BASE).save(tmp_path / "pos")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "pos" / name).symlink_to(BASE / name)
    c = dict(prompt="{question}\n", samples=4, temperature=0.7, max_new_tokens=9, seed=0)
    (tmp_path / "config.json").write_text(json.dumps(c))
    append_rows(tmp_path / "data.jsonl", [dict(id="a", question="Mia had 3 cups.", answer="3")])
    path = tmp_path / "pos" / "samples.jsonl"
    path.write_text("hours\n")
    monkeypatch.setattr(sys, "argv", ["program", str(tmp_path), "pos"])
    monkeypatch.setattr(PretendEngine, "fails", True)
    with pytest.raises(RuntimeError, match="no memory"):
        exec(program, dict(__name__="__main__"))
    assert path.read_text() == "hours\n"
    monkeypatch.setattr(PretendEngine, "fails", False)
    exec(program, dict(__name__="__main__"))
    sys.argv.append("bfloat16")
    exec(program, dict(__name__="__main__"))
    assert PretendEngine.started == ["float32", "float32", "bfloat16"]
    assert not list(tmp_path.rglob("*.tmp"))
    (row,) = read_rows(path)
    samples = row["samples"]
    assert samples[0] == samples[1] and samples[2]["ids"] == [0]
    assert [s["ended"] for s in samples] == [True, True, True, False]
    assert [s["correct"] for s in samples] == [True, True, False, False]
    assert [s["text"] for s in samples] == ["#### 3", "#### 3", "", "#### 3"]


@pytest.mark.parametrize("cut", ["sft,2", "sft,3,0.5", "s", "sft,2" + "," * 9])
def test_a_log_that_was_cut(tmp_path, cut):
    """A line of metrics.csv that a kill cut short in the way of all further training."""
    path = tmp_path / "metrics.csv"
    columns = ",".join(train.COLUMNS)
    whole = "sft,1" + ",0" * (len(train.COLUMNS) - 2)
    path.write_text("\n".join([columns, whole, cut]))
    train.Log(path, "pos", 0, 1).close()
    assert path.read_text().splitlines() == [columns, whole]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("alloc_cpu: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_names_the_flags(error, capsys):
    """A page of traceback where a flag would help."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        rollout.run_program(main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    assert "--micro-tokens" in text and "--slots" in text


def test_a_bug_is_no_line(capsys):
    """A bug of ours hidden behind a line that blames the user."""

    def main():
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        rollout.run_program(main)


if __name__ == "__main__":
    folder, kills, seed = sys.argv[1:]
    print(json.dumps(kill_at_random(Path(folder), int(kills), int(seed))))

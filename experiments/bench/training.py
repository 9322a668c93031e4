"""Training speed and memory, beside another checkout and transformers.

    python experiments/bench/training.py --model SmolLM2-135M
    python experiments/bench/training.py --model SmolLM2-135M --code ../other-checkout
    python experiments/bench/training.py --model SmolLM2-135M --peer-python peers/bin/python

    sft   8 sequences of 512 tokens
    dpo   4 pairs of 256 tokens a side, half of them the prompt

An optimizer step each, with AdamW and float32 weights; "bfloat16" is the dtype of the activations.
Both sides of a pair count whole in tokens/s, prompt included. Each worker is a process of its own.
Peak memory is that process's resident set, Python included, or on a GPU what torch allocates.
"of limit" is the share of what the measured matrix rate allows: six operations per weight and
token, attention and optimizer not counted.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from workers import commands, limits, machine, run_worker

from data import flag, parse_flags
from model import GPT
from rollout import Example, Pair, load_policy, run_program
from train import TrainFlags, add_reference, dpo, forward_backward, nll, resolve


@dataclass
class BenchFlags:
    model: str = flag("", "Hugging Face folder", group="run")
    code: str = flag("", "another checkout of this project to compare with", group="compare")
    peer_python: str = flag("", "interpreter that has transformers; empty = without it")
    steps: int = flag(3, "optimizer steps timed of each; the median counts", group="job", least=1)
    length: int = flag(512, "tokens of a sequence of sft", least=8)
    micro_tokens: int = flag(
        0, "padded tokens a forward pass of ours; 0 = two sequences or a pair", least=0
    )
    dtypes: str = flag("bfloat16 float32", "of activations")
    device: str = flag("cpu", "cpu or cuda", group="machine")
    threads: int = flag(2, "CPU threads", least=1)


def worker(job):
    """Do a job with this checkout."""
    flags = TrainFlags(
        data="jsonl",
        device=job["device"],
        dtype=job["dtype"],
        threads=job["threads"],
        micro_tokens=job["micro_tokens"],
        beta=0.1,
    )
    c = resolve(flags)
    policy = load_policy(job["model"], c, train=True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, fused=True)
    loss = nll
    items = [Example(str(i), row[:1], row[1:]) for i, row in enumerate(job["rows"])]
    if job["step"] == "dpo":
        loss = dpo
        items = make_pairs(job["rows"], job["prompt"])
        add_reference(policy, items, c)  # once, before training
    seconds = step_seconds(policy, items, loss, c, optimizer, job["steps"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if job["device"].startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
    return dict(seconds=seconds, peak=peak, version=torch.__version__)


def step_seconds(policy, items, loss, c, optimizer, steps):
    """Seconds of each of so many optimizer steps on the same items, behind one that warms up."""
    seconds = []
    for _ in range(steps + 1):
        began = time.monotonic()
        sums = forward_backward(policy, items, loss, c)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums["loss"].item()  # waits for a GPU
        seconds.append(time.monotonic() - began)
    return seconds[1:]


def make_pairs(rows, prompt):
    """The first half of the rows against the second; they share the first `prompt` tokens."""
    half = len(rows) // 2
    pairs = []
    for a, b in zip(rows[:half], rows[half:], strict=True):
        pairs.append(Pair("", "response", 1, a[:prompt], a[prompt:], b[prompt:]))
    return pairs


def random_rows(step, length, vocab_size):
    """Token ids of the 8 sequences of a step; the sides of a pair have a common prompt."""
    if step == "sft":
        return torch.randint(5, vocab_size, (8, length)).tolist()
    rows = torch.randint(5, vocab_size, (8, length // 2))
    rows[4:, : length // 4] = rows[:4, : length // 4]
    return rows.tolist()


def report(results, job, limit):
    """Print a line for each worker."""
    ours = results["ours"]
    tokens = sum(map(len, job["rows"]))
    for name, result in results.items():
        seconds = statistics.median(result["seconds"])
        ratio = seconds / statistics.median(ours["seconds"])
        speed = tokens / seconds
        print(
            f"{job['step']:6}{job['dtype']:10}{name:16}{result['version']:14}"
            f"{speed:10.0f}{speed / limit:10.0%}{ratio:8.2f}x"
            f"{result['peak']:9.1f}{ours['peak'] / result['peak']:8.2f}x",
            flush=True,
        )


def main():
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(worker(json.load(sys.stdin))))
        return
    c = parse_flags(BenchFlags, __doc__)
    model = GPT.from_pretrained(c.model)
    weights = sum(weight.numel() for weight in model.parameters())
    torch.manual_seed(0)
    peers = {"transformers": (c.peer_python, "peer_training.py")}
    workers = commands("training.py", c.code, peers)
    print(f"{machine(c.device, c.threads)}, float32 weights")
    print(
        f"{'step':6}{'dtype':10}{'who':16}{'version':14}{'tokens/s':>10}{'of limit':>10}"
        f"{'ours is':>9}{'peak GB':>9}{'ours is':>9}"
    )
    for step in ("sft", "dpo"):
        rows = random_rows(step, c.length, model.config.vocab_size)
        for dtype in c.dtypes.split():
            job = dict(
                model=str(Path(c.model).resolve()),
                step=step,
                rows=rows,
                prompt=len(rows[0]) // 2,
                steps=c.steps,
                micro_tokens=c.micro_tokens or 2 * len(rows[0]),
                dtype=dtype,
                device=c.device,
                threads=c.threads,
            )
            results = {}
            for name, command in workers.items():
                results[name] = run_worker(name, command, job)
            rate, _ = limits(getattr(torch, dtype), 2048, c.device, c.threads)
            report(results, job, rate / (6 * weights))


if __name__ == "__main__":
    run_program(main)

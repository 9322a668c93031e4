"""Training speed and memory beside transformers: SFT on 8 x 512 tokens, the DPO step on 4 pairs of 256 tokens a side.

    python experiments/bench/training.py --model SmolLM2-135M --peer-python peers/bin/python

The peer's steps are those of trl's trainers, written out: labels into the model for SFT; for DPO one forward of both
sides through the policy and one, without gradient, through a frozen copy. Same sequences, AdamW, fused. Each step runs
in a process of its own; peak memory is that process's (resident set), weights, optimizer and Python included.
"of limit" is the share of what the measured matrix rate allows: six operations per weight and token, attention and
optimizer not counted.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from sampling import limits

from rollout import UsageError, entry, flag, load_policy, parse
from train import Example, TrainConfig, add_reference, backward

PEER = """
import json, resource, sys, time, torch, transformers
import torch.nn.functional as F
job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
model = load().train()
half = torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
rows = torch.tensor(job["rows"])
if job["step"] == "dpo":
    frozen, start = load().eval(), job["prompt"]
    def logp(net):
        logits = net(rows).logits[:, start - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, rows[:, start:, None])[..., 0].sum(-1)
def step():
    with half:
        if job["step"] == "sft":
            loss = model(rows, labels=rows).loss
        else:
            with torch.no_grad():
                before = logp(frozen)
            a, b = (logp(model) - before).chunk(2)
            loss = -F.logsigmoid(0.1 * (a - b)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
times = []
for _ in range(job["steps"] + 1):
    began = time.monotonic()
    step()
    times.append(time.monotonic() - began)
print(json.dumps(dict(seconds=times[1:], peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                      version=transformers.__version__)))
"""


@dataclass
class BenchConfig:
    model: str = flag("", "Hugging Face folder")
    peer_python: str = flag("", "interpreter with the peers installed; empty = this project alone")
    threads: int = flag(2, "CPU threads", 1)
    steps: int = flag(3, "optimizer steps timed of each; the median counts", 1)
    micro_tokens: int = flag(0, "padded tokens per forward pass of ours; 0 = 1024 in SFT, 512 in DPO: a pair at a time")
    quick: int = flag(0, "1: 2 x 64 tokens, one step")


def ours(job):
    c = TrainConfig(threads=job["threads"], dtype=job["dtype"], prompt="{question}", device="cpu", beta=0.1,
                    micro_tokens=job["micro_tokens"])  # fmt: skip
    policy = load_policy(job["model"], c, train=True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, fused=True)
    half, start = torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"), job["prompt"]
    rows = job["rows"]
    examples, pairs, middle = [], [], len(rows) // 2
    if job["step"] == "sft":
        examples = [Example(str(i), row[:1], row[1:]) for i, row in enumerate(rows)]
    else:
        pairs = [dict(id=str(i), prompt_ids=a[:start], chosen_ids=a[start:], rejected_ids=b[start:])
                 for i, (a, b) in enumerate(zip(rows[:middle], rows[middle:], strict=True))]  # fmt: skip
        with half:
            add_reference(policy.model, pairs, c.micro_tokens)  # once, before training, as in train.py
    times = []
    for _ in range(job["steps"] + 1):
        began = time.monotonic()
        with half:
            backward(policy.model, examples, pairs, c)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(seconds=times[1:], peak=peak, version=torch.__version__)


def run(who, job, peer):
    command = [peer, "-c", PEER] if who == "transformers" else [sys.executable, __file__, "--worker"]
    environment = dict(os.environ, OMP_NUM_THREADS=str(job["threads"]), TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(command, input=json.dumps(job), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{who}: {done.stderr.strip().splitlines()[-1]}; expected it to run; see requirements.txt")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(ours(json.load(sys.stdin))))
        return
    c = parse(BenchConfig, __doc__)
    model = load_policy(c.model, TrainConfig(threads=1, prompt="{question}"), train=True).model  # a wrong path: here
    weights = sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, {c.threads} threads, fp32 weights")
    print(f"{'step':6}{'dtype':10}{'who':16}{'version':14}{'tokens/s':>10}{'of limit':>10}{'ratio':>7}"
          f"{'peak GB':>9}{'ratio':>7}")  # fmt: skip
    for step, shape, micro in (("sft", (8, 512), 1024), ("dpo", (8, 256), 512)):
        shape = (2, 64) if c.quick else shape
        rows = torch.randint(5, model.config.vocab_size, shape).tolist()
        for dtype in ("bfloat16", "float32"):
            job = dict(model=str(Path(c.model).resolve()), rows=rows, step=step, dtype=dtype, threads=c.threads,
                       prompt=shape[1] // 2, micro_tokens=c.micro_tokens or micro,
                       steps=1 if c.quick else c.steps)  # fmt: skip
            result = {who: run(who, job, c.peer_python) for who in ["ours", "transformers"][: 1 + bool(c.peer_python)]}
            limit = limits(getattr(torch, dtype), c.threads, 2048)[0] / (6 * weights)
            speed = {who: shape[0] * shape[1] / statistics.median(r["seconds"]) for who, r in result.items()}
            for who, r in result.items():
                print(f"{step:6}{dtype:10}{who:16}{r['version']:14}{speed[who]:10.0f}{speed[who] / limit:10.0%}"
                      f"{speed['ours'] / speed[who]:7.2f}{r['peak']:9.1f}{result['ours']['peak'] / r['peak']:7.2f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    entry(main)

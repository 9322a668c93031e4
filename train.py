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
    python train.py --mode pos --rounds 2     # positives once more, from pos: what neg has to beat
    python train.py --mode neg --model FOLDER --data problems.jsonl --test-data test.jsonl

    NLL    loss = -mean over the response tokens of the batch of log pi(y_t | x, y_<t)
    Eq. 1  loss = -log sigmoid( beta log pi(+y|x)/ref(+y|x) - beta log pi(-y|x)/ref(-y|x) )
    Eq. 2, 3   values and advantages of steps: rollout.py
    Eq. 4  loss = -sum over steps i of exp(A_i / beta) log pi(y_i | x, y_<i)         (--loss awr)

Differences from the paper:
1. pos trains on D and D+ together; the paper's RFT set is D+ alone, from many more samples.
2. neg starts from pos and has pos as its reference, and the pairs come from pos's own mistakes. The
   paper's equations say sft for all three. Further rounds (--rounds) go on from neg likewise.
3. AdamW instead of RMSprop.
"""

import csv
import math
import os
import shutil
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from data import RANK, SPLITS, UserError, apply_presets, claim_folder, content_hash, flag
from data import file_hash, folder_hash, is_lucky, load_problems, note, parse_flags, printable
from data import rank_zero_only, read_json, split_of, write_json, write_rows
from evaluate import evaluate, pair_trend, pit_report, report
from model import GPT, save_tensors, token_logps
from rollout import PAIR_FORMS, PROCESSES, SCANS, Example, Pair, PolicyFlags, advantages
from rollout import ask_pits_again, counted, gather, load_policy, make_pairs, most_diverse, pair_row
from rollout import progress, run_program, sample, solutions_to_value, value_steps
from rollout import wait_for_all, world_flags

# ---------------------------------------------------------------- the method


def run(c):
    """Run the stages that --mode asks for. What is finished is not done again."""
    train, test, held_out = prepare(c)
    train_sft(c, train)
    if c.mode in ("pos", "neg"):
        train_pos(c, train)
    if c.mode == "pos":
        train_pos_again(c, train)
    if c.mode == "neg":
        train_neg(c, train)
    evaluate_all(c, test, held_out)


def train_sft(c, problems):
    """SFT: imitate the teacher's solutions, D. An early copy becomes the generator, which still
    makes mistakes on its own training problems."""
    base = load_policy(c.model, c, train=True)
    early_copy = None
    if generator_folder(c).name == "generator":
        early_copy = (c.generator_epochs, generator_folder(c))
    items = teacher_examples(base, problems)
    fit(base, items, nll, c, "sft", epochs=c.sft_epochs, lr=c.lr, early_copy=early_copy)


def train_pos(c, problems):
    """Positives (RFT): train the base again, on D and on D+, the most diverse of the generator's
    own correct solutions."""
    folder = generator_folder(c)
    samples = sample_own_problems(load_policy(folder, c), problems, c)
    base = load_policy(c.model, c, train=True)
    items = teacher_examples(base, problems) + own_examples(base, problems, samples, c.keep)
    if not items:
        raise UserError(f"{folder}: no sample is correct and there is no teacher to imitate")
    fit(base, items, nll, c, "pos", epochs=c.pos_epochs, lr=c.lr)


def train_pos_again(c, problems):
    """Positives once more (as in STaR and ReST-EM), what most people would do instead of negatives:
    each further round trains the policy before it, on its own correct solutions alone."""
    folder = Path(c.out) / "pos"
    for i in range(2, c.rounds + 1):
        policy = load_policy(folder, flags_of_round(c, i - 1))
        samples = sample_own_problems(policy, problems, c)
        start = load_policy(folder, c, train=True)
        items = own_examples(start, problems, samples, c.keep)
        if not items:
            print(f"pos{i} is not trained: no sample of {folder} is correct")
            return
        fit(start, items, nll, c, f"pos{i}", epochs=c.again_epochs, lr=c.again_lr)
        folder = Path(c.out) / f"pos{i}"


def train_neg(c, problems):
    """Negatives: find the first pit of each of the policy's own wrong solutions, and train the
    policy against it. Round 1 starts from pos, each further round from the policy before."""
    by_id = {problem.id: problem for problem in problems}
    folder = Path(c.out) / "pos"
    for i in range(1, c.rounds + 1):
        policy = load_policy(folder, flags_of_round(c, i))
        samples = sample_own_problems(policy, problems, c)
        solutions = valued_solutions(policy, by_id, samples, c)  # Eq. 2, Eq. 3
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


def flags_of_round(c, i):
    """The flags with a seed of its own for each policy that is sampled: i = 0 for the generator, 1
    for pos, 2 for the policy after it, and so on."""
    return replace(c, seed=c.seed + 1000 * i)


def teacher_examples(policy, problems):
    """D, the problems that have a solution, as examples."""
    return [Example(p.id, policy.prompt(p), policy.solution(p)) for p in problems if p.solution]


def own_examples(policy, problems, samples, keep):
    """D+, at most `keep` correct samples of each question, the most diverse, as examples."""
    examples = []
    for problem in one_of_each_question(problems):
        correct = [s for s in samples[problem.id] if s["correct"]]
        for s in most_diverse(correct, keep):
            examples.append(Example(problem.id, policy.prompt(problem), s["ids"]))
    return examples


def one_of_each_question(problems):
    """A file may hold a question several times, with other solutions: it is sampled once."""
    first = {}
    for problem in problems:
        first.setdefault(problem.question, problem)
    return list(first.values())


def sample_own_problems(policy, problems, c):
    """The policy's samples of its training problems: samples.jsonl in the policy's own folder."""
    folder = Path(policy.folder)
    problems = one_of_each_question(problems)
    samples = sample(policy, problems, folder / "samples.jsonl", c.samples)
    print(f"{folder.name}: {counted(samples)}", end="")
    if c.data == "arithmetic":
        print(f"; {luck(problems, samples):.1%} of the correct ones hold a wrong step", end="")
    print()
    return samples


def luck(problems, samples):
    """Of the correct samples of the built-in task, the share that hold a wrong step."""
    lucky = []
    for problem in problems:
        lucky += [is_lucky(problem, s["text"]) for s in samples[problem.id] if s["correct"]]
    return np.mean(lucky or [0])


def valued_solutions(policy, by_id, samples, c):
    """Samples with the values of their steps: values.jsonl in the policy's own folder. Prints a
    report on their first pits."""
    folder = Path(policy.folder)
    correct = c.keep if c.loss == "awr" else 0  # Eq. 4 weighs the steps of correct ones, too
    problems = [by_id[id] for id in samples]
    solutions = solutions_to_value(policy, problems, samples, wrong=c.negatives, correct=correct)
    value_steps(policy, by_id, solutions, folder / "values.jsonl", k=c.rollouts, scan=c.scan)
    again = ask_pits_again(policy, by_id, solutions, folder / "pits.jsonl", k=3 * c.rollouts)
    tokens = sum(gather([policy.decoded]))
    print(f"{pit_report(by_id, solutions, again)}; {tokens} tokens sampled")
    return solutions


def weighted_example(policy, problem, solution, beta):
    """A valued solution with Eq. 4's weight on each of its tokens."""
    weights = awr_weights(solution, beta)
    return Example(problem.id, policy.prompt(problem), solution.ids, weights)


def evaluate_all(c, test, held_out):
    """The table of all models in the run folder: results.json."""
    out = Path(c.out)
    results = {}
    for name in ("sft", *rounds_of(out, "pos"), *rounds_of(out, "neg")):
        policy = load_policy(out / name, c)
        results[name] = evaluate(policy, test, out / name / "eval", c.eval_samples)
        results[name] |= pair_trend(out / "metrics.csv", name)
        if held_out:
            kept_out = evaluate(policy, held_out, out / name / "held_out")
            results[name]["held_out"] = kept_out["accuracy"]
    write_json(out / "results.json", results)
    print(report(results))


def rounds_of(out, stage):
    """The names of the models of a stage: pos, pos2, ..."""
    names = [path.parent.name for path in out.glob(f"{stage}*/model.safetensors")]
    return sorted(names, key=lambda name: (len(name), name))


# ---------------------------------------------------------------- losses

# A loss takes the model, a micro-batch and the flags. It returns two sums over the micro-batch: the
# loss, and a dict of numbers to log, each a column in COLUMNS.


def nll(model, examples, c):
    """Negative log-likelihood of the response tokens, weighted where Eq. 4 says so."""
    logps = token_logps(model, [example.sequence for example in examples])
    log = {"nll": -logps.detach().sum()}
    if examples[0].weights is not None:
        weights = [torch.tensor(example.weights) for example in examples]
        logps = logps * torch.cat(weights).to(logps.device)
    return -logps.sum(), log


def dpo(model, pairs, c):
    """Eq. 1 on pairs."""
    return pair_loss(model, pairs, c, dpo_loss)


LOSSES = {"dpo": dpo, "awr": nll}  # of neg: awr trains on weighted solutions, others on pairs


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, c):
    """Eq. 1 from summed log-probabilities, all (B,). Returns losses and margins, (B,) each; where
    the policy is the reference they are ln 2 and 0."""
    margins = c.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins), margins


def pair_loss(model, pairs, c, formula):
    """A loss on pairs with the formula of `dpo_loss` or one like it. --nll adds the likelihood
    of the chosen text, per token."""
    chosen, rejected = pair_logps(model, pairs)
    reference = torch.tensor([pair.reference for pair in pairs], device=chosen.device)
    losses, margins = formula(chosen, rejected, reference[:, 0], reference[:, 1], c)
    lengths = torch.tensor([len(pair.chosen) for pair in pairs], device=chosen.device)
    chosen_nll = -chosen / lengths
    log = dict(
        nll=chosen_nll,
        pair_loss=losses,
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
    logps = token_logps(model, [pair.sequence for pair in pairs])
    lengths = [len(response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return sums[0::2], sums[1::2]


# ---------------------------------------------------------------- the loop


def fit(policy, items, loss, c, name, *, epochs, lr, early_copy=None):
    """Train policy.model on Examples or Pairs, and save it to the folder `name` of the run.

    loss: nll, or one of LOSSES. early_copy: (epochs, folder), where to keep a copy on the way. A
    finished folder is left as it is. A killed run resumes from its last checkpoint and ends with
    the same weights as an uninterrupted one (on a CPU, bit for bit).
    """
    folder = Path(c.out) / name
    if (folder / "model.safetensors").exists():
        remove([folder / CHECKPOINT])  # a kill may have come after save() and before this
        return
    steps = max(1, round(epochs * len(items) / c.batch)) if epochs > 0 else 0
    weights, optimizer, start = set_up(policy, items, c, folder, steps)
    log = Log(Path(c.out) / "metrics.csv", name, start, steps)
    saved = time.monotonic()
    copy_early(policy, c, early_copy, start, steps / (epochs or 1))
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
        copy_early(policy, c, early_copy, step + 1, steps / epochs)
        if any(gather([time.monotonic() - saved > c.save_seconds])):
            save_checkpoint(folder, weights, optimizer, step + 1)
            saved = time.monotonic()
    log.close()
    save(policy, folder, c)
    remove([folder / CHECKPOINT])


def set_up(policy, items, c, folder, steps):
    """What the loop starts from: (weights by name, optimizer, number of steps done before)."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)
    model = policy.model
    model.gradient_checkpointing = bool(c.gradient_checkpointing)
    if PROCESSES > 1:
        shard_model(model, policy)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        weights.values(), betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True
    )
    if steps > 0:
        show(policy, items[0])
        if isinstance(items[0], Pair):
            add_reference(policy, items, c)
            if PROCESSES > 1:
                model.reshard()  # a forward leaves the root whole, load_checkpoint needs the parts
    start = load_checkpoint(folder, weights, optimizer)
    if start == 0:
        remove(folder / name for name in PRODUCTS)
    return weights, optimizer, start


def copy_early(policy, c, early_copy, step, steps_per_epoch):
    """Save the copy of a model in training, if it is due after this step."""
    if early_copy is None:
        return
    epochs, folder = early_copy
    due = round(epochs * steps_per_epoch)
    if epochs > 0:
        due = max(1, due)
    if step == due:
        remove(folder / name for name in PRODUCTS)
        save(policy, folder, c)


def forward_backward(policy, batch, loss, c):
    """Add the gradient of the mean loss over a batch, micro-batch by micro-batch:

        gradient = gradient of the sum of the micro-batches' sums / count of the whole batch

    so that the size of a micro-batch changes nothing. Returns the loss and what it logs, {name:
    tensor}, as means over the batch, too.
    """
    count = sum(item.loss_count for item in batch)
    means = defaultdict(float)
    for micro_batch, scale in my_micro_batches(batch, c.micro_tokens):
        with precision(policy):
            loss_sum, log = loss(policy.model, micro_batch, c)
        (loss_sum / count * scale).backward()
        log["loss"] = loss_sum.detach()
        for name, value in log.items():
            means[name] += value / count * scale
    return means


def precision(policy):
    """float32 weights with activations of the policy's dtype. FSDP2 casts by itself."""
    if policy.dtype == "float32" or PROCESSES > 1:
        return nullcontext()
    return torch.autocast(policy.model.norm.weight.device.type, getattr(torch, policy.dtype))


def batch_indices(n, batch, step, seed):
    """Which of n items form the batch of a step; each epoch is a new random order of them. Depends
    on (seed, step) alone, so a resumed run neither skips nor repeats a batch."""
    first_epoch, place = divmod(step * batch, n)
    epochs = range(first_epoch, first_epoch + (place + batch - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, i]).permutation(n) for i in epochs])
    return order[place : place + batch].tolist()


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
    """The micro-batches of a batch, with a scale for each. With one process that is 1.

    Several processes share each micro-batch. FSDP2 averages their gradients, which should be
    summed, so the scale is their number. A process without items runs one with scale 0, because
    all of them must run the same number of passes.
    """
    parts = []
    for group in micro_batches(items, tokens, PROCESSES):
        mine = group[RANK::PROCESSES]
        parts.append((mine, PROCESSES) if mine else (group[:1], 0))
    return parts


@torch.no_grad()
def add_reference(policy, pairs, c):
    """Set the log-probabilities of all pairs under the reference, which is the policy before
    training. They are computed once, as the reference never changes."""
    number = {id(pair): i for i, pair in enumerate(pairs)}
    mine = []
    for part, _ in my_micro_batches(pairs, c.micro_tokens):
        with precision(policy):
            chosen, rejected = pair_logps(policy.model, part)
        logps = torch.stack((chosen, rejected), 1).tolist()
        mine += [(number[id(pair)], both) for pair, both in zip(part, logps, strict=True)]
    for i, both in gather(mine):
        pairs[i].reference = both


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
    mesh = init_device_mesh(torch.device(policy.device).type, (PROCESSES,))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy())
    if policy.dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "hidden")


# ---------------------------------------------------------------- the log

COLUMNS = """stage step loss nll pair_loss margin accuracy chosen rejected lr grad_norm
    tokens_per_s""".split()


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
    if PROCESSES > 1:
        norm = norm.full_tensor()
    values = torch.stack([*sums.values(), norm])
    if PROCESSES > 1:
        dist.all_reduce(values)  # the norm is the same everywhere
        values = values / PROCESSES
    return dict(zip([*sums, "grad_norm"], values.tolist(), strict=True))


def check_finite(metrics, name, step, batch):
    """Stop before a bad batch ruins the weights."""
    if math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        return
    problems = ", ".join(sorted({item.id for item in batch}))
    raise UserError(
        f"{name}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} in step {step}, "
        f"on problems {problems}; a lower --lr, --again-lr or --neg-lr may help"
    )


def show(policy, item):
    """Print one training item. Its prompt, in brackets, carries no loss."""
    prompt, *responses = [policy.tokenizer.decode(ids) for ids in item.sequence]
    names = ("response",) if len(responses) == 1 else ("chosen", "rejected")
    print(f"the first item, its prompt in brackets: [{printable(prompt)}]")
    for name, response in zip(names, responses, strict=True):
        print(f"  {name}: {response!r}")


# ---------------------------------------------------------------- models and checkpoints on disk

CHECKPOINT = "checkpoint.safetensors"
# What is made of a model, in its folder: it goes when the model is trained anew.
PRODUCTS = "samples.jsonl values.jsonl pits.jsonl pairs.jsonl eval held_out".split()


@torch.no_grad()
def whole_tensors(tensors):
    """{name: tensor}, of which each process may hold a part -> all of it, on the CPU of rank 0; the
    others get {}."""
    whole = {}
    for name, tensor in tensors.items():
        if PROCESSES > 1:
            tensor = tensor.full_tensor()
        if RANK == 0:
            whole[name] = tensor.detach().cpu().contiguous()
    return whole


def save(policy, folder, c):
    """Save model and tokenizer as a Hugging Face folder, with the prompt and how it is sampled. The
    weights come last: a folder that has them is complete."""
    weights = whole_tensors(dict(policy.model.named_parameters()))
    remove_half_written(folder)
    if RANK == 0:
        with torch.device("meta"):
            model = GPT(policy.model.config)
        model.load_state_dict(weights, assign=True)
        policy.tokenizer.save(folder)
        policy.save_settings(folder, sampling_dtype=c.sampling_dtype, **world_flags(c))
        note_rounding(model, policy.folder, c.sampling_dtype)
        model.save_pretrained(folder)
    wait_for_all()  # no process reads the folder before it is there


def note_rounding(model, start, dtype):
    """Say what share of the weights that training moved would be sampled as if it had not.

    Released weights lie on the grid of bfloat16, and a short fine-tune moves most of them by less
    than half of its unit: rounded to bfloat16 they are the base's again.
    """
    if dtype == "float32" or not start:
        return
    before = dict(GPT.from_pretrained(start).named_parameters())
    kind = getattr(torch, dtype)
    moved = 0
    lost = 0
    for name, weight in model.named_parameters():
        changed = weight != before[name]
        moved += changed.sum().item()
        lost += (changed & (weight.to(kind) == before[name].to(kind))).sum().item()
    if lost > 0.1 * moved:
        note(f"sampling in {dtype} rounds {lost / moved:.0%} of the moved weights back to {start}")


def save_checkpoint(folder, weights, optimizer, step):
    """Weights and optimizer state in one file."""
    tensors = {}
    for name, weight in weights.items():
        state = optimizer.state[weight]
        tensors[f"weight.{name}"] = weight
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    tensors = whole_tensors(tensors)
    if RANK == 0:
        save_tensors(tensors, folder / CHECKPOINT, {"step": str(step)})


def load_checkpoint(folder, weights, optimizer):
    """Put the folder's checkpoint back. Returns the steps done, 0 if there is none."""
    path = folder / CHECKPOINT
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
        if PROCESSES > 1:
            tensor = distribute_tensor(tensor, weight.device_mesh, weight.placements)
        state[key] = tensor
    weight.copy_(state.pop("weight"))
    state["step"] = torch.tensor(float(step), device=weight.device)
    optimizer.state[weight] = state


def remove_half_written(folder):
    """Delete what a kill left of a file: our temporary ones, and those of safetensors."""
    remove([*folder.glob("*.json*.tmp"), *folder.glob(".*.tmp"), *folder.glob(".tmp??????")])


@rank_zero_only
def remove(paths):
    """Delete files and folders, those of them that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- flags


@dataclass
class TrainFlags(PolicyFlags):
    """The defaults that are None are what the model's policy.json says, else those of the task, in
    data.PRESETS. The stage "again" is that of further rounds of pos."""

    mode: str = flag("neg", "the last stage", group="run", choices=("sft", "pos", "neg"), stage="")
    out: str = flag("", "run folder; empty = runs/TASK", stage="")
    rounds: int = flag(1, "rounds of pos or neg, each from the policy before", least=1, stage="")
    test_data: str = flag("", "JSONL to test on; empty: a tenth", group="data", stage="")
    split: str = flag("test", "arithmetic: val to choose flags on", choices=SPLITS, stage="test")
    limit: int | None = flag(None, "training problems; 0 = all of a file", least=0)
    test_limit: int | None = flag(None, "test problems; 0 = all of a file", least=0, stage="")
    held_out: int | None = flag(None, "training problems kept out, to see harm", least=0)
    samples: int | None = flag(None, "samples a problem", group="sampling", least=1, stage="pos")
    eval_samples: int | None = flag(None, "samples a test problem, for pass@k", least=0, stage="")
    keep: int = flag(4, "correct solutions kept", group="values and pairs", least=0, stage="pos")
    negatives: int | None = flag(None, "wrong solutions valued a problem", least=0, stage="values")
    rollouts: int | None = flag(None, "K: continuations per prefix", least=1, stage="values")
    scan: str | None = flag(
        None, "steps valued; else first, with awr full", choices=SCANS, stage="values"
    )
    pairs: str = flag("continuation", "form of the pairs", choices=PAIR_FORMS, stage="neg")
    loss: str = flag("dpo", "Eq. 1 or Eq. 4", group="losses", choices=LOSSES, stage="neg")
    beta: float = flag(0.3, "temperature of Eq. 1 and of Eq. 4", least=1e-6, stage="neg")
    nll: float = flag(0.0, "weight of the likelihood of chosen beside Eq. 1", least=0, stage="neg")
    batch: int | None = flag(None, "examples or pairs a step", group="optimisation", least=1)
    lr: float | None = flag(None, "peak learning rate of sft and pos", least=0)
    again_lr: float | None = flag(None, "peak rate of pos2, pos3, ...", least=0, stage="again")
    neg_lr: float | None = flag(None, "peak learning rate of neg", least=0, stage="neg")
    sft_epochs: float | None = flag(None, "epochs of sft; 0 = the model itself generates", least=0)
    generator_epochs: float | None = flag(None, "epochs of sft until the generator's copy", least=0)
    pos_epochs: float | None = flag(None, "epochs of pos", least=0, stage="pos")
    again_epochs: float | None = flag(None, "epochs of pos2, pos3, ...", least=0, stage="again")
    neg_epochs: float | None = flag(None, "epochs of neg", least=0, stage="neg")
    warmup: float = flag(0.1, "share of the steps in which the rate rises", least=0, most=1)
    weight_decay: float = flag(0.01, "of AdamW", least=0)
    clip: float = flag(1.0, "largest gradient norm", least=1e-6)
    micro_tokens: int = flag(8192, "padded tokens a pass", group="machine", least=1, stage="")
    gradient_checkpointing: int = flag(0, "1: save memory, recompute", least=0, most=1, stage="")
    save_seconds: float = flag(60.0, "seconds between checkpoints", least=0, stage="")


def resolve(c):
    """Fill in what depends on the task, on the model and on other flags."""
    c = apply_presets(c)
    c.out = c.out or f"runs/{Path(c.data).stem}"
    if c.loss == "awr" and c.scan == "first":
        raise UserError("--loss awr needs the value of every step: leave --scan out, or full")
    c.scan = c.scan or ("full" if c.loss == "awr" else "first")
    return c


def load_data(c):
    """(training problems, test problems, training problems that are held out)."""
    if c.data == "arithmetic":
        most = c.limit and c.limit + c.held_out
        problems = load_problems(c.data, "train", most, c.seed, **world_flags(c))
        test = load_problems(c.data, c.split, c.test_limit, **world_flags(c))
    else:
        problems = load_problems(c.data)
        if c.test_data:
            test = load_problems(c.test_data)
        else:
            test = [problem for problem in problems if is_test(problem)]
            problems = [problem for problem in problems if not is_test(problem)]
        if not test or not problems:
            raise UserError(f"{c.data}: too few problems to test on a tenth; name --test-data")
        test = test[: c.test_limit or None]
    # rows of one question stand together, so that the others can be held out
    place = {problem.question: i for i, problem in reversed(list(enumerate(problems)))}
    problems.sort(key=lambda problem: place[problem.question])
    # of a small file at most a twentieth is held out
    enough = len(problems) - min(c.held_out, len(problems) // 20)
    train = problems[: min(c.limit or enough, enough)]
    asked = {problem.question for problem in train}
    held_out = [problem for problem in problems[len(train) :] if problem.question not in asked]
    both = sum(problem.question in asked for problem in test)
    if both:
        note(f"{both} of {len(test)} test problems have a question that is trained on")
    return train, test, held_out[: c.held_out]


def is_test(problem):
    """Whether a problem of a file is one of the tenth to test on: by its question, so that neither
    --limit nor a question that stands twice mixes the two."""
    return split_of(f"file: {problem.question}") == "test"


def prepare(c):
    """Read the problems, check them, and claim the run folder. Returns what load_data does."""
    out = Path(c.out)
    train, test, held_out = load_data(c)
    c.dtype = c.dtype or read_json(out / "config.json").get("dtype", "")
    policy = load_policy(c.model, c, train=True)
    check_problems(c, policy, train, test + held_out)
    c.device = policy.device
    c.dtype = policy.dtype
    if c.sft_epochs == 0:  # no imitation: the model itself is the generator
        train = [replace(problem, solution="") for problem in train]
    claim_folder(
        c,
        out / "config.json",
        made_by_stage(out),
        data_hash=("sft", content_hash(train + held_out)),
        test_hash=("test", "" if c.data == "arithmetic" else file_hash(c.test_data or c.data)),
        model_hash=("sft", folder_hash(c.model)),
    )
    wait_for_all()
    for name, problems in (("data", train), ("test", test)):  # a run can be read without its source
        write_rows(out / f"{name}.jsonl", [asdict(problem) for problem in problems])
    return train, test, held_out


def made_by_stage(out):
    """{stage: what it and later stages have made in the run folder}, for claim_folder."""

    def trained(name):
        return sorted({path.parent for path in out.glob(f"{name}/*.safetensors")})

    values = sorted(out.glob("*/values.jsonl"))
    neg = trained("neg*")
    return dict(
        sft=trained("*"),
        pos=trained("pos*") + values + neg,
        again=trained("pos?*"),
        values=values + neg,
        neg=neg,
        test=sorted(out.glob("*/eval")),
    )


def check_problems(c, policy, train, test):
    """Refuse, before anything is written, problems that training or sampling would fail on."""
    limit = policy.model.config.position_limit
    unsolved = sum(not problem.solution for problem in train)
    if c.sft_epochs > 0 and unsolved == len(train):
        raise UserError(
            f"{c.data}: no problem has a solution to imitate; with --sft-epochs 0 the model itself "
            "is the generator"
        )
    if c.sft_epochs > 0 and unsolved:
        note(f"{unsolved} of {len(train)} training problems have no solution to imitate")
    ends = set(policy.tokenizer.stop_ids)
    cut = 0
    for problem in train + test:
        prompt = policy.prompt(problem)
        solution = policy.solution(problem)
        cut += not ends.isdisjoint(solution[:-1])
        response = max(len(solution), c.max_new_tokens)
        tokens = len(prompt) + response - 1  # the last one is never read
        if tokens > limit:
            raise UserError(
                f"problem {problem.id}: {tokens} tokens for prompt and solution, but the model has "
                f"only {limit} positions"
            )
    if cut:
        note(f"{cut} solutions have an end of text inside, perhaps as an unknown word")


def main():
    run(resolve(parse_flags(TrainFlags, __doc__)))


if __name__ == "__main__":
    run_program(main)

"""What float32, float16 and bfloat16 weights keep of a short fine-tune, to choose what to sample.

    python experiments/bench/rounding.py --model SmolLM2-135M --data gsm8k_train.jsonl --lr 5e-5

Released weights lie on the grid of bfloat16, and a short fine-tune moves most of them by less than
half a unit of it: rounded, they are the base's again. A line for each policy, weights/activations.
Of the update w - w0: "back" is the share of moved weights that round to what w0 rounds to, "kept"
the rounded update's part along the update, "norm" its length. Then NLL and KL(fp32 || policy) per
response token on training / other problems, and pass@1 of 8 samples a training problem at T = 0.7.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import DEFAULT_PROMPT, Tokenizer, flag, is_correct, parse_flags
from data import read_problems
from model import GPT, collate
from rollout import generate, run_program

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POLICIES = ("fp32/fp32", "fp16/fp32", "bf16/fp32", "bf16/bf16")
TRAIN = 64  # problems to train on
OTHER = 32  # others
BATCH = 8  # problems of a step
LONGEST = 80  # tokens of prompt and solution


@dataclass
class BenchFlags:
    model: str = flag("", "Hugging Face folder", group="run")
    data: str = flag("", "JSONL file of problems with solutions; the first short ones are taken")
    steps: str = flag("5 20 50 100 200", "optimizer steps after which to look")
    lr: float = flag(2e-5, "constant learning rate, without warm-up", least=0)
    activations: str = flag("fp32", "in training", choices=("fp32", "bf16"))


def response_logps(model, examples):
    """log pi of all tokens (N, V), float32, where responses are predicted, and targets (N,)."""
    batch = collate(examples, "cpu")
    logits = model.logits(model.hidden(batch.ids)[batch.rows, batch.columns])
    return logits.float().log_softmax(-1), batch.targets


def weights_kept(w, w0, dtype):
    """Share of moved weights that round back; part along the update and length of what is kept."""
    update = w - w0
    rounded = w.to(dtype).float() - w0
    back = (w.to(dtype) == w0.to(dtype))[update != 0].float().mean()
    length = update.square().sum()  # sums are exact enough over 1e8 weights; dot and norm are not
    return back, (rounded * update).sum() / length, (rounded.square().sum() / length).sqrt()


def nll_and_kl(model, examples, reference):
    """Per response token. The first model, with no reference yet, becomes the reference."""
    nll = 0.0
    kl = 0.0
    count = 0
    for i in range(0, len(examples), BATCH):
        logps, targets = response_logps(model, examples[i : i + BATCH])
        expected = reference.setdefault(i, logps)
        nll += F.nll_loss(logps, targets, reduction="sum").item()
        kl += F.kl_div(logps, expected, reduction="sum", log_target=True).item()
        count += len(targets)
    return nll / count, kl / count


def pass_at_1(model, tokenizer, problems, prompts):
    options = dict(stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    samples = generate(model, prompts, 8, max_new_tokens=LONGEST, temperature=0.7, **options)
    verdicts = []
    for problem, row in zip(problems, samples, strict=True):
        for ids in row:
            ended = ids[-1] in tokenizer.stop_ids
            verdicts.append(ended and is_correct(tokenizer.decode(ids[:-1]), problem.answer))
    return np.mean(verdicts)


@torch.no_grad()
def look(model, base, tokenizer, problems, examples, c, step):
    seen = {}  # log-probabilities of the fp32 policy
    new = {}
    for name in POLICIES:
        weights, activations = [DTYPES[part] for part in name.split("/")]
        back, kept, norm = weights_kept(parameters_to_vector(model.parameters()), base, weights)
        policy = deepcopy(model).to(weights).to(activations)
        nll, kl = nll_and_kl(policy, examples[:16], seen)
        new_nll, new_kl = nll_and_kl(policy, examples[TRAIN:], new)
        line = f"{c.lr:g} {step:5} {name}  back {back:6.1%} kept {kept:6.1%} norm {norm:5.2f}"
        line += f"  nll {nll:.3f}/{new_nll:.3f}  kl {kl:.5f}/{new_kl:.5f}"
        if weights == activations:  # what load_policy offers
            prompts = [prompt for prompt, _ in examples[:8]]
            line += f"  pass@1 {pass_at_1(policy, tokenizer, problems[:8], prompts):.1%}"
        print(line, flush=True)


def main():
    c = parse_flags(BenchFlags, __doc__)
    model = GPT.from_pretrained(c.model)
    tokenizer = Tokenizer.from_pretrained(c.model)
    problems = []
    examples = []
    for problem in read_problems(c.data):
        prompt = tokenizer.encode_prompt(DEFAULT_PROMPT, problem.question)
        response = tokenizer.encode(problem.solution, special=False) + [tokenizer.eos_id]
        if len(prompt + response) <= LONGEST and len(problems) < TRAIN + OTHER:
            problems.append(problem)
            examples.append((prompt, response))
    base = parameters_to_vector(model.parameters()).detach()
    options = dict(betas=(0.9, 0.99), weight_decay=0.01, fused=True)  # as in train.py
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, **options)
    random = np.random.default_rng(0)
    looks = sorted(map(int, c.steps.split()))
    for step in tqdm(range(1, looks[-1] + 1), mininterval=30):
        if step % (TRAIN // BATCH) == 1:
            order = random.permutation(TRAIN).reshape(-1, BATCH).tolist()
        batch = [examples[i] for i in order.pop(0)]
        with torch.autocast("cpu", torch.bfloat16, enabled=c.activations == "bf16"):
            logps, targets = response_logps(model, batch)
        F.nll_loss(logps, targets).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in looks:
            look(model, base, tokenizer, problems, examples, c, step)


if __name__ == "__main__":
    run_program(main)

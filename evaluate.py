r"""Evaluation: how often a policy is right, how sure that is, and where in a solution it goes wrong.

The one idea: a number without its spread is not a result. So each accuracy comes with a 95% interval, and two
policies are compared on the same problems, problem by problem, not by two intervals laid side by side.

    python evaluate.py --model runs/x/neg --data problems.jsonl
    python evaluate.py --model runs/x/neg --baseline runs/x/sft --data arithmetic      # a paired comparison
    python evaluate.py --model runs/x/neg --data arithmetic --values 16                # average Q by step (Fig. 7)
    python evaluate.py --model runs/x/neg --baseline runs/x/pos --explain 3            # one problem, step by step

    accuracy   greedy, one sample a problem; Wilson's 95% interval
    pass@k     1 - C(n-c, k) / C(n, k) for c right of n samples: unbiased (Chen et al. 2021)
    maj@k      the most frequent of the first k answers is right; the earliest wins a tie
    p          McNemar's exact test: of the problems that just one of the two gets right, how uneven is the split
"""

import csv
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from data import DEFAULT_PROMPT, answers_equal, extract_answer, judge_steps, load_problems
from rollout import UsageError, best_of, claim, entry, estimate_values, first_only, flag, gather, load_policy
from rollout import make_pairs, parse, read_rows, sample, to_value, write_json


def wilson(right, n, z=1.96):
    """95% interval of a share: (low, high). Honest also near 0 and 1, where the usual one is not."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, (p + z * z / (2 * n)) / d - half), min(1.0, (p + z * z / (2 * n)) / d + half)


def pass_at_k(n, c, k):
    """The chance that k of n samples, c of them right, hold a right one; unbiased for n >= k."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_right(texts, corrects, k):
    """Whether the answer given most often among the first k is right. texts, corrects: per sample."""
    groups = []  # [answer, votes, right]; equal answers may be written differently
    for text, correct in zip(texts[:k], corrects[:k], strict=True):
        answer = extract_answer(text)
        group = next((g for g in groups if answer and g[0] and answers_equal(g[0], answer)), None)
        if group is None:
            groups.append([answer, 1, correct])
        else:
            group[1] += 1
    return bool(groups) and max(groups, key=lambda g: (bool(g[0]), g[1]))[2]


def mcnemar(a, b):
    """Two-sided exact p that policies a and b are equally good, from their verdicts on the same problems."""
    only_a = sum(bool(x and not y) for x, y in zip(a, b, strict=True))  # bool: numpy's small integers would overflow
    only_b = sum(bool(y and not x) for x, y in zip(a, b, strict=True))
    n, low = only_a + only_b, min(only_a, only_b)
    tail = sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
               for i in range(low + 1))  # fmt: skip
    return min(1.0, 2 * tail)


def compare(a, b, seed=0, resamples=2000):
    """Paired comparison of verdicts: accuracy of b minus a, its 95% bootstrap interval over problems, McNemar's p."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    draws = np.random.default_rng(seed).choice(difference, (resamples, len(difference))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return dict(difference=float(difference.mean()), low=float(low), high=float(high), p=mcnemar(a, b))


def evaluate(policy, problems, folder, *, max_new_tokens, samples=0, temperature=0.7, ks=(1, 5), seed=0):
    """Greedy accuracy, and with `samples` > 0 pass@k and maj@k, of a policy. Raw responses go to `folder`; a second
    call on the same folder goes on where the first one stopped. Returns a dict for results.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = sample(policy, problems, folder / "greedy.jsonl", n=1, max_new_tokens=max_new_tokens, temperature=0,
                  seed=seed)  # fmt: skip
    greedy = [rows[p.id]["samples"][0] for p in problems]
    right = [s["correct"] for s in greedy]
    result = dict(problems=len(problems), accuracy=float(np.mean(right)), interval=wilson(sum(right), len(right)),
                  ended=float(np.mean([s["ended"] for s in greedy])),
                  tokens=float(np.mean([len(s["ids"]) for s in greedy])), correct=right)  # fmt: skip
    labels = [judge_steps(p, s["text"]) for p, s in zip(problems, greedy, strict=True) if p.meta]
    if labels:  # only the built-in task knows the truth of a step
        result["spurious"] = float(np.mean([sum(x in ("irrelevant", "slip") for x in row) for row in labels]))
    if samples:
        rows = sample(policy, problems, folder / "samples.jsonl", n=samples, max_new_tokens=max_new_tokens,
                      temperature=temperature, seed=seed)  # fmt: skip
        drawn = [rows[p.id]["samples"] for p in problems]
        verdicts = [[s["correct"] for s in row] for row in drawn]
        for k in (k for k in ks if k <= samples):
            result[f"pass@{k}"] = float(np.mean([pass_at_k(samples, sum(v), k) for v in verdicts]))
            texts = [[s["text"] for s in row] for row in drawn]
            result[f"maj@{k}"] = float(np.mean([majority_right(t, v, k) for t, v in zip(texts, verdicts, strict=True)]))
    return result


def table(results):
    """The results of several policies {name: result} as text; the first is the one the others are compared with."""
    first = next(iter(results.values()))
    columns = [k for k in first if "@" in k] + (["spurious"] if "spurious" in first else [])
    head = f"{'':9}{'greedy':>8}  {'95% interval':15}" + "".join(f"{c:>10}" for c in columns)
    lines = [head + (f"   {'against ' + next(iter(results))}" if len(results) > 1 else "")]
    for name, r in results.items():
        line = f"{name:9}{r['accuracy']:8.1%}  {r['interval'][0]:6.1%} - {r['interval'][1]:<6.1%}"
        line += "".join(f"{r[c]:>10.1%}" if "@" in c else f"{r[c]:>10.2f}" for c in columns)
        if r is not first:
            c = compare(first["correct"], r["correct"])
            line += f"   {c['difference']:+.1%} [{c['low']:+.1%}, {c['high']:+.1%}], p = {c['p']:.2g}"
        lines.append(line)
    return "\n".join(lines)


def q_by_step(policy, problems, solutions, folder, *, k, max_new_tokens, temperature, seed):
    """Average Q of the first, second, ... step of solutions (as of `to_value`) under `policy` (Fig. 7), for one rollout
    and for the best of 5, which is the paper's rollout policy."""
    by_id, path = {p.id: p for p in problems}, Path(folder) / "values.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = estimate_values(policy, by_id, solutions, path, k=k, scan="full", max_new_tokens=max_new_tokens,
                           temperature=temperature, seed=seed)  # fmt: skip
    longest = max((len(row["values"]) for row in rows.values()), default=1)
    at = [[row["values"][t] for row in rows.values() if t < len(row["values"])] for t in range(1, longest)]
    return [dict(step=t, q=float(np.mean(qs)), best_of_5=float(np.mean([best_of(q, 5) for q in qs])), solutions=len(qs))
            for t, qs in enumerate(at, 1)]  # fmt: skip


def pit_report(problems, values, k):
    """What the pits found are worth: on the built-in task against the truth, elsewhere by the chance of a false one.

    A step from which a share q of all rollouts would succeed looks like a pit with chance (1 - q)^k; q is taken from
    the step before the pit, as if the pit had done no harm: an upper bound of what chance alone explains (not where the
    scan was `sequential`, whose Q above 0 is too high)."""
    wrong = [row for row in values.values() if not row["correct"]]
    text = f"{len(wrong)} wrong solutions valued"
    truth = [(row["pit"], judge_steps(problems[row["id"]], row["text"])) for row in wrong if problems[row["id"]].meta]
    if truth:
        bad = [labels[pit - 1] != "good" for pit, labels in truth]
        first = [next((i for i, x in enumerate(labels, 1) if x != "good"), 0) == pit for pit, labels in truth]
        return f"{text}; pits that are bad steps: {np.mean(bad):.1%}, that are the first bad step: {np.mean(first):.1%}"
    before = [row["values"][row["pit"] - 1] for row in wrong]
    false = [(1 - q) ** k for q in before if q is not None]
    return f"{text}; a pit is false with chance {np.mean(false):.1%} at most" if false else text


@torch.no_grad()
def probability(policy, prompt, response):
    """pi(response | prompt) of two lists of token ids."""
    logits = policy.model(torch.tensor([prompt + response], device=next(policy.model.parameters()).device))
    steps = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return math.exp(sum(steps[range(len(response)), response].tolist()))


def explain(problem, before, after, folder, *, k, samples, max_new_tokens, temperature, seed, colour=False):
    """One problem as text for a lecture: a wrong solution of the policy `before`, the Q of each step, the first pit,
    the pair made from it, and how likely both its sides are under `before` and `after` (a policy, or None)."""
    paint = lambda text, code: f"\033[{code}m{text}\033[0m" if colour else text  # noqa: E731
    by_id, drawing = {problem.id: problem}, dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    path = Path(folder) / f"explain-{re.sub('[^a-zA-Z0-9]', '-', problem.id)}"
    path.mkdir(parents=True, exist_ok=True)
    rows = sample(before, [problem], path / "rollouts.jsonl", n=samples, **drawing)
    right = sum(s["correct"] for s in rows[problem.id]["samples"])
    lines = [paint(problem.question.strip(), 1), f"answer {problem.answer}; {right} of {samples} samples are right"]
    values = estimate_values(before, by_id, to_value([problem], rows, 1, 0), path / "values.jsonl", k=k, scan="full",
                             **drawing)  # fmt: skip
    if not values:
        return "\n".join([*lines, "no wrong solution that ended; take another problem or raise --samples"])
    row = next(iter(values.values()))
    labels = judge_steps(problem, row["text"]) if problem.meta else []
    lines += ["", f"a wrong solution, Q of each step from {k} rollouts; before the first step Q is V(x):",
              f"{'':34}Q {row['values'][0]:.2f} {'=' * round(20 * row['values'][0])}"]  # fmt: skip
    for t, (start, end) in enumerate(pairwise([0, *row["ends"]]), 1):
        text, q, pit = before.text(row["ids"][start:end]).strip(), row["values"][t], t == row["pit"]
        line = f"{t:3} {text:30.200}Q {q:.2f} {'=' * round(20 * q)}"
        line += f"  <- the first pit{f' ({labels[t - 1]})' if t <= len(labels) else ''}" if pit else ""
        lines.append(paint(line, "31;1" if pit else "32" if q > 0 else "2"))
    pairs = make_pairs("continuation", before, by_id, rows, values)
    if not pairs:
        return "\n".join([*lines, "", "no pair: no right way to go on was found before the pit; raise --values"])
    lines += ["", f"the pair, after the first {row['pit'] - 1} steps, and its probabilities:", f"{'':9} before   after"]
    for side, code in (("chosen", 32), ("rejected", 31)):
        prompt, response, told = pairs[0]["prompt_ids"], pairs[0][f"{side}_ids"], pairs[0][side].strip()
        chances = [f"{probability(policy, prompt, response):7.4f}" if policy else "      -"
                   for policy in (before, after)]  # fmt: skip
        lines.append(paint(f"{side:9}{' '.join(chances)}   {told}".replace("\n", ", "), code))
    return "\n".join(lines)


# ---------------------------------------------------------------- the log of training

COLUMNS = "stage step loss nll dpo margin accuracy chosen rejected lr grad_norm tokens_per_s".split()


@first_only
def write_log(path, stage, step, log, lr, norm, seconds):
    """One line of metrics.csv; see the README for what each column means."""
    row = dict(log, stage=stage, step=step, lr=lr, grad_norm=norm, tokens_per_s=log["tokens"] / seconds)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        if not file.tell():
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


@first_only
def cut_log(path, stage, start):
    """Drop the lines of steps that a resumed stage does again."""
    if Path(path).exists():
        rows = [line.split(",") for line in Path(path).read_text("utf-8", errors="replace").splitlines()][1:]
        rows = [r for r in rows if len(r) == len(COLUMNS) and r[1].isdecimal()]  # not the last one, if it was cut
        keep = [r for r in rows if r[0] != stage or int(r[1]) < start]
        with open(f"{path}.tmp", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *keep])
        os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------- command line


@dataclass
class EvaluateConfig:
    model: str = flag("", "Hugging Face folder of the policy")
    baseline: str = flag("", "folder of a second policy: a paired comparison on the same problems")
    data: str = flag("arithmetic", "arithmetic, star, or a JSONL file of problems")
    split: str = flag("test", "of a built-in task: train, val or test", choices="train val test")
    limit: int = flag(1000, "the first problems only; 0 = all of a file")
    out: str = flag("runs/evaluate", "folder for results.json and the raw responses")
    prompt: str = flag("", "prompt format, {question} is replaced; empty = the one train.py uses for this data")
    max_new_tokens: int = flag(256, "tokens a solution may have", 1)
    samples: int = flag(0, "samples a problem for pass@k and maj@k; 0 = greedy only")
    temperature: float = flag(0.7, "of the samples")
    values: int = flag(0, "K: rollouts per step prefix, for the average Q by step index; 0 = none")
    explain: int = flag(-1, "number of a problem: only show a wrong solution of the baseline, step by step", -1)
    seed: int = flag(0, "of the random streams")
    slots: int = flag(0, "rows that decode together; 0 = as fits in memory")
    device: str = flag("", "cpu or cuda; empty = cuda where there is one")
    dtype: str = flag("", "float32 or bfloat16; empty = bfloat16 on cuda, else float32")
    threads: int = flag(0, "CPU threads; 0 = two for a small model, else all cores")


def main():
    c = parse(EvaluateConfig, __doc__)
    c.prompt = c.prompt or {"arithmetic": "{question}\n", "star": "{question}"}.get(c.data, DEFAULT_PROMPT)
    problems, out, results = load_problems(c.data, c.split, c.limit), Path(c.out), {}
    if not problems:
        raise UsageError("no problems; expected --limit of at least 1 for a built-in task; raise it")
    policies = {name: load_policy(folder, c) for name, folder in (("baseline", c.baseline), ("model", c.model))
                if folder or name == "model"}  # fmt: skip
    policies["model"].prompt(problems[0])  # a wrong prompt format fails here, before anything is written
    if c.explain >= len(problems):
        raise UsageError(f"--explain {c.explain}; expected less than {len(problems)}, the problems; lower it")
    claim(c, out / "config.json", problems)
    if c.explain >= 0:
        before, after = (*policies.values(), None)[:2]
        print(explain(problems[c.explain], before, after, out, k=c.values or 16, samples=c.samples or 16,
                      max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed,
                      colour=sys.stdout.isatty()))  # fmt: skip
        return
    for name, policy in policies.items():
        results[name] = evaluate(policy, problems, out / name, max_new_tokens=c.max_new_tokens, samples=c.samples,
                                 temperature=c.temperature, seed=c.seed)  # fmt: skip
    write_json(out / "results.json", results)
    print(table(results))
    if c.values:
        gather([])  # until rank 0 has written them
        rows = {row["id"]: row for row in read_rows(out / "model" / "greedy.jsonl")}
        steps = q_by_step(policy, problems, to_value(problems, rows, 1, 1), out / "model", k=c.values,
                          max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed)  # fmt: skip
        for s in steps:
            print(f"step {s['step']:2}   Q {s['q']:.3f}   of the best of 5 {s['best_of_5']:.3f}   n {s['solutions']}")


if __name__ == "__main__":
    entry(main)

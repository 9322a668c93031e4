r"""Evaluation: how often a policy is right, how sure that is, and where a solution goes wrong.

A number without its spread is not a result. So each accuracy comes with a 95% interval, and two
policies are compared problem by problem on the same problems, not by two intervals side by side.

    python evaluate.py --model runs/x/neg --data problems.jsonl
    python evaluate.py --model runs/x/neg --baseline runs/x/sft        # a paired comparison
    python evaluate.py --model runs/x/neg --rollouts 16                # average Q by step (Fig. 7)
    python evaluate.py --model runs/x/neg --baseline runs/x/pos --explain 3   # one problem's steps
    python evaluate.py --plot runs/x                                   # curves and accuracies

    accuracy   greedy, one sample a problem, with Wilson's 95% interval
    pass@k     1 - C(n-c, k) / C(n, k) for c correct of n samples: unbiased (Chen et al. 2021)
    maj@k      the most frequent answer of the first k is correct; the earliest wins a tie
    p          McNemar's exact test on the problems that just one of two policies gets right
"""

import csv
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import SPLITS, UserError, answers_equal, apply_presets, claim_folder, content_hash
from data import extract_answer, flag, folder_hash, judge_steps, load_problems, parse_flags
from data import read_json, read_rows, write_json
from rollout import PolicyFlags, best_of, first_pits, load_policy, make_pairs, pair_row
from rollout import run_program, sample, solutions_to_value

# ---------------------------------------------------------------- statistics


def wilson(correct, n, z=1.96):
    """95% interval (low, high) of the share correct / n; also valid near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n, c, k):
    """The chance that k of n samples, c of which are correct, hold a correct one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_correct(samples, k):
    """Whether the most frequent answer of the first k samples is correct."""
    groups = []  # [answer, votes, correct]; one answer may be written in several ways
    for s in samples[:k]:
        answer = extract_answer(s["text"])
        for group in groups:
            if answer and group[0] and answers_equal(group[0], answer):
                group[1] += 1
                break
        else:
            groups.append([answer, 1, s["correct"]])
    answered = [group for group in groups if group[0]]
    return bool(answered) and max(answered, key=lambda group: group[1])[2]


def mcnemar(a, b):
    """Two-sided exact p that two policies are equally good, from their verdicts on the same
    problems: under the null the problems that only one gets right split like coin tosses."""
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare(a, b, seed=0, resamples=2000):
    """Accuracy of b minus that of a on the same problems, its 95% bootstrap interval over problems,
    and McNemar's p."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    rng = np.random.default_rng(seed)
    means = rng.choice(difference, (resamples, len(difference))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return dict(
        difference=float(difference.mean()), low=float(low), high=float(high), p=mcnemar(a, b)
    )


# ---------------------------------------------------------------- accuracy


def evaluate(policy, problems, folder, samples=0, ks=(1, 5)):
    """Accuracy of a policy as a dict for results.json; with samples > 0 also pass@k and maj@k.

    The raw responses go to `folder`; a second call on the same folder takes them from there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    greedy = sample(policy, problems, folder / "greedy.jsonl", n=1, temperature=0)
    greedy = [greedy[problem.id][0] for problem in problems]
    correct = [s["correct"] for s in greedy]
    result = dict(
        problems=len(problems),
        accuracy=float(np.mean(correct)),
        interval=wilson(sum(correct), len(correct)),
        ended=float(np.mean([s["ended"] for s in greedy])),
        tokens=float(np.mean([len(s["ids"]) for s in greedy])),
        correct=correct,
    )
    if all(problem.meta for problem in problems):  # the built-in task, whose steps can be judged
        texts = zip(problems, greedy, strict=True)
        result["spurious"] = float(np.mean([count_spurious(p, s["text"]) for p, s in texts]))
    if samples:
        drawn = sample(policy, problems, folder / "samples.jsonl", samples)
        result |= at_k(list(drawn.values()), ks)
    return result


def at_k(samples, ks):
    """{pass@k and maj@k: mean over problems}; samples: a list for each problem."""
    result = {}
    n = len(samples[0])
    for k in ks:
        if k <= n:
            counts = [sum(s["correct"] for s in row) for row in samples]
            result[f"pass@{k}"] = float(np.mean([pass_at_k(n, c, k) for c in counts]))
            result[f"maj@{k}"] = float(np.mean([majority_correct(row, k) for row in samples]))
    return result


def count_spurious(problem, text):
    """How many steps of a solution of the built-in task use a distractor or a wrong sum."""
    return sum(label in ("irrelevant", "slip") for label in judge_steps(problem, text))


def table(results):
    """The results {name: result} of several policies as text. All are compared with the first."""
    names = list(results)
    first = results[names[0]]
    columns = [key for key in first if "@" in key or key == "spurious"]
    head = f"{'':9}{'greedy':>8}  {'95% interval':15}"
    head += "".join(f"{column:>10}" for column in columns)
    if len(names) > 1:
        head += f"   against {names[0]}"
    lines = [head]
    for name, result in results.items():
        low, high = result["interval"]
        line = f"{name:9}{result['accuracy']:8.1%}  {low:6.1%} - {high:<6.1%}"
        for column in columns:
            form = ".2f" if column == "spurious" else ".1%"
            line += f"{result[column]:>10{form}}"
        if result is not first:
            paired = compare(first["correct"], result["correct"])
            interval = f"[{paired['low']:+.1%}, {paired['high']:+.1%}]"
            line += f"   {paired['difference']:+.1%} {interval}, p = {paired['p']:.2g}"
        lines.append(line)
    return "\n".join(lines)


MOVED = ("margin", "chosen", "rejected")  # columns of metrics.csv


def movement(path, stage):
    """How training moved the pairs of a stage of metrics.csv: {"margin": [first, last], "chosen":
    ..., "rejected": ...}, means of the first and the last tenth of its steps; {} without pairs."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == stage and row["margin"]]
    few = max(1, len(rows) // 10)
    moved = {}
    for name in MOVED if rows else ():
        values = [float(row[name]) for row in rows]
        moved[name] = [float(np.mean(values[:few])), float(np.mean(values[-few:]))]
    return moved


def remarks(results):
    """Lines on what Eq. 1 did: how its pairs moved, and a warning where the policy got worse on
    training problems that were held out."""
    lines = []
    for name, result in results.items():
        if "margin" in result:
            moved = [f"{key} {result[key][0]:.2f} to {result[key][1]:.2f}" for key in MOVED]
            lines.append(
                f"{name}: {', '.join(moved)}, from the first tenth of its steps to the last"
            )
        if not name.startswith("neg") or "held_out" not in result:
            continue
        share = result["held_out"]
        share_of_pos = results["pos"]["held_out"]
        if share < share_of_pos:
            lines.append(
                f"{name} is worse than pos on held-out training problems ({share:.1%} against "
                f"{share_of_pos:.1%}): a lower --neg-lr, fewer --neg-epochs or --nll 0.2 may help"
            )
    return lines


# ---------------------------------------------------------------- values of steps


def pit_report(problems, solutions, k):
    """How reliable are the detected pits? One line.

    On the built-in task they are compared with the truth. Elsewhere: with success rate q, k
    failures in a row happen by chance with probability (1 - q)^k. We take q from the step before
    the pit, as if the pit had done no harm, so this bounds what chance alone explains.
    """
    wrong = [s for s in solutions if not s.correct]
    line = f"{len(wrong)} wrong solutions valued"
    if not wrong:
        return line
    if all(problems[s.id].meta for s in wrong):
        bad = []
        first_bad = []
        for s in wrong:
            labels = judge_steps(problems[s.id], s.text)
            wrong_steps = [i for i, label in enumerate(labels, 1) if label != "good"]
            bad.append(s.first_pit in wrong_steps)
            first_bad.append(wrong_steps[:1] == [s.first_pit])
        line += f"; of the first pits {np.mean(bad):.1%} are bad steps"
        return f"{line}, {np.mean(first_bad):.1%} the first bad step"
    before = [[s.value, *s.q_values][s.first_pit - 1] for s in wrong]
    false = [(1 - q) ** k for q in before if q is not None]
    return f"{line}; a first pit is false with probability {np.mean(false):.1%} at most"


def q_by_step(solutions):
    """Average Q of the first, second, ... step (Fig. 7), of one continuation and of the best of 5,
    which is the paper's rollout policy. All steps must be valued."""
    longest = max((len(s.q_values) for s in solutions), default=0)
    rows = []
    for i in range(longest):
        q_values = [s.q_values[i] for s in solutions if len(s.q_values) > i]
        best = [best_of(q, 5) for q in q_values]
        rows.append(
            dict(step=i + 1, q=np.mean(q_values), best_of_5=np.mean(best), solutions=len(best))
        )
    return rows


@torch.no_grad()
def probability(policy, prompt, response):
    """pi(response | prompt) of two lists of token ids."""
    ids = torch.tensor([prompt + response], device=policy.model.norm.weight.device)
    logps = policy.model(ids)[0, len(prompt) - 1 : -1].float().log_softmax(-1)  # (R, V)
    response = torch.tensor(response, device=ids.device)
    return logps.gather(1, response[:, None]).sum().exp().item()


# ---------------------------------------------------------------- one problem, for a lecture


def explain(problem, before, after, folder, *, k, samples, colour=False):
    """One problem as text: a wrong solution of the policy `before`, the Q of its steps, its first
    pit, the pair made there, and how probable both sides are before and after training.

    after: a second policy or None. The samples and values go to `folder`.
    """
    by_id = {problem.id: problem}
    folder = Path(folder) / f"explain-{re.sub('[^a-zA-Z0-9]', '-', problem.id)}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = sample(before, [problem], folder / "rollouts.jsonl", samples)
    correct = sum(s["correct"] for s in drawn[problem.id])
    lines = [
        problem.question.strip(),
        f"answer {problem.answer}; {correct} of {samples} samples are correct",
    ]
    wrong = solutions_to_value(before, [problem], drawn, wrong=samples)
    first_pits(before, by_id, wrong, folder / "values.jsonl", k=k, scan="full")
    if not wrong:
        lines.append("no wrong solution that ended: take another problem or more --samples")
        return "\n".join(lines)
    examples = []
    for solution in wrong:
        for pair in make_pairs("continuation", before, by_id, drawn, [solution]):
            examples.append((solution, pair))
    if not examples:
        lines += explain_steps(problem, before, wrong[0], k, colour)
        lines.append("no pair: no correct continuation was found before the pit")
        return "\n".join(lines)
    if problem.meta:  # show a pair without luck, if there is one
        clear = [example for example in examples if is_clear(problem, before, *example)]
        lines.append(
            f"{len(clear)} of {len(examples)} pairs set a bad step against steps that are all good"
        )
        examples = clear or examples
    solution, pair = examples[0]
    lines += explain_steps(problem, before, solution, k, colour)
    lines += explain_pair(pair, before, after, colour)
    return "\n".join(lines)


def is_clear(problem, policy, solution, pair):
    """Whether a pair of the built-in task has a bad rejected step and only good chosen steps."""
    prefix = solution.through_step(pair.first_pit - 1)
    rejected = judge_steps(problem, policy.text(prefix + pair.rejected))
    chosen = judge_steps(problem, policy.text(prefix + pair.chosen))
    return rejected[-1] != "good" and set(chosen[pair.first_pit - 1 :]) == {"good"}


def explain_steps(problem, policy, solution, k, colour):
    """A line with its Q for each step of a wrong solution."""
    labels = judge_steps(problem, solution.text) if problem.meta else []
    lines = [
        "",
        f"a wrong solution, Q of each step from {k} continuations; before the first step V(x):",
        f"{'':34}Q {solution.value:.2f} {q_bar(solution.value)}",
    ]
    for i, q in enumerate(solution.q_values, 1):
        text = policy.text(solution.step(i)).strip()
        line = f"{i:3} {text:30.200}Q {q:.2f} {q_bar(q)}"
        if i == solution.first_pit:
            line += "  <- the first pit"
            if labels:
                line += f" ({labels[i - 1]})"
            line = paint(line, "31;1", colour)
        lines.append(line)
    return lines


def explain_pair(pair, before, after, colour):
    """The two sides of a pair, and their probabilities under two policies."""
    row = pair_row(pair, before.tokenizer)
    lines = [
        "",
        f"the pair, after the first {pair.first_pit - 1} steps, and its probabilities:",
        f"{'':9} before   after",
    ]
    for side, ids, code in (("chosen", pair.chosen, "32"), ("rejected", pair.rejected, "31")):
        line = f"{side:9}"
        for policy in (before, after):
            chance = f"{probability(policy, pair.prompt, ids):7.4f}" if policy else "      -"
            line += chance + " "
        line += "  " + row[side].strip().replace("\n", ", ")
        lines.append(paint(line, code, colour))
    return lines


def q_bar(q):
    return "=" * round(20 * q)


def paint(text, code, colour):
    return f"\033[{code}m{text}\033[0m" if colour else text


# ---------------------------------------------------------------- a picture of a run


def plot_run(folder):
    """Draw a run folder as FOLDER/run.png: its losses, what Eq. 1 did to the pairs, the Q of the
    steps of wrong solutions, and the accuracy of its models. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    with open(folder / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        plot_columns(axes[0], rows, ["loss"], label=stage)
        if rows[0]["margin"]:
            plot_columns(axes[1], rows, ["margin", "chosen", "rejected"], label=stage)
    for path in sorted(folder.glob("*/values.jsonl")):
        rows = read_rows(path)
        means = []
        for i in range(max(len(row["q_values"]) for row in rows)):
            q_values = [row["q_values"][i] for row in rows if len(row["q_values"]) > i]
            means.append(np.mean([q for q in q_values if q is not None]))
        axes[2].plot(range(1, len(means) + 1), means, "o-", label=path.parent.name)
    results = read_json(folder / "results.json")
    for name, result in results.items():
        low, high = result["interval"]
        accuracy = result["accuracy"]
        axes[3].errorbar([name], [accuracy], [[accuracy - low], [high - accuracy]], fmt="o")
    titles = ["loss", "Eq. 1: margin and log-probabilities", "mean Q of steps", "accuracy"]
    labels = ["optimizer step", "optimizer step", "step of the solution", "model"]
    for axis, title, label in zip(axes, titles, labels, strict=True):
        axis.set(title=title, xlabel=label)
    for axis in axes[:3]:
        axis.legend(frameon=False)
    figure.savefig(folder / "run.png", dpi=110)
    print(f"{folder / 'run.png'}")


def plot_columns(axis, rows, names, label):
    """Columns of metrics.csv by step, each point the mean of a fiftieth of the steps."""
    for name in names:
        values = np.array([float(row[name]) for row in rows])
        parts = np.array_split(values, min(50, len(values)))
        steps = np.cumsum([len(part) for part in parts])
        axis.plot(steps, [part.mean() for part in parts], label=f"{label} {name}")


# ---------------------------------------------------------------- command line


@dataclass
class EvaluateFlags(PolicyFlags):
    baseline: str = flag("", "folder of a second policy, to compare with", group="run", free=True)
    out: str = flag("runs/evaluate", "folder for results and responses", free=True)
    plot: str = flag("", "run folder to draw as FOLDER/run.png; needs matplotlib", free=True)
    explain: int = flag(-1, "number of a problem, to show its steps", least=-1, free=True)
    split: str = flag("test", "of the built-in task", choices=SPLITS, group="data")
    limit: int = flag(1000, "the first problems only; 0 = all of a file", least=0)
    samples: int = flag(0, "samples a problem, for pass@k", group="sampling", least=0)
    rollouts: int = flag(0, "K: continuations per prefix, for Q by step", group="values", least=0)


def main():
    c = apply_presets(parse_flags(EvaluateFlags, __doc__))
    if c.plot:
        plot_run(c.plot)
        return
    problems = load_problems(c.data, c.split, c.limit)
    if c.explain >= len(problems):
        raise UserError(f"--explain {c.explain}: there are only {len(problems)} problems")
    policy = load_policy(c.model, c)
    policy.prompt(problems[0])  # a wrong prompt format fails here, before anything is written
    hashes = dict(data_hash=content_hash(problems), model_hash=folder_hash(c.model))
    policies = {"model": policy}
    if c.baseline:
        policies = {"baseline": load_policy(c.baseline, c), "model": policy}
        hashes["baseline_hash"] = folder_hash(c.baseline)
    out = Path(c.out)
    claim_folder(c, out / "config.json", **hashes)
    if c.explain >= 0:
        problem = problems[c.explain]
        before = policies.get("baseline", policy)
        after = policy if c.baseline else None
        counts = dict(k=c.rollouts or 16, samples=c.samples or 16)
        print(explain(problem, before, after, out, colour=sys.stdout.isatty(), **counts))
        return
    results = {}
    for name, each in policies.items():
        results[name] = evaluate(each, problems, out / name, c.samples)
    write_json(out / "results.json", results)
    print(table(results))
    if c.rollouts:
        greedy = sample(policy, problems, out / "model" / "greedy.jsonl", n=1, temperature=0)
        solutions = solutions_to_value(policy, problems, greedy, wrong=1, correct=1)
        by_id = {problem.id: problem for problem in problems}
        path = out / "model" / "values.jsonl"
        first_pits(policy, by_id, solutions, path, k=c.rollouts, scan="full")
        for row in q_by_step(solutions):
            print(
                "step {step:2}  Q {q:.3f}  best of 5 {best_of_5:.3f}  n {solutions}".format(**row)
            )


if __name__ == "__main__":
    run_program(main)

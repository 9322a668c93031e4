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

A model is prompted as it was trained, and each has a folder of its own under --out, so more samples
or problems go on from what is there.
"""

import csv
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from data import SPLITS, UserError, answers_equal, apply_presets, claim_folder, flag, folder_hash
from data import judge_steps, parse_flags, printable, read_json, read_rows, stated_answer
from data import write_json
from model import token_logps
from rollout import PolicyFlags, best_of, how_prompted, load_policy, make_pairs, pair_row, read_data
from rollout import run_program, sample, solutions_to_value, value_steps, world_flags

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
    """Whether the most frequent answer of the first k samples is correct. Samples that did not end
    have no vote."""
    groups = []  # [answer, votes, correct]; one answer may be written in several ways
    for s in samples[:k]:
        answer = stated_answer(s["text"])
        if not s["ended"] or not (answer or s["correct"]):
            continue
        for group in groups:
            same = s["correct"] or answers_equal(group[0], answer)  # right ones are one group
            if s["correct"] == group[2] and same:
                group[1] += 1
                break
        else:
            groups.append([answer, 1, s["correct"]])
    return bool(groups) and max(groups, key=lambda group: group[1])[2]


def mcnemar(a, b):
    """Two-sided exact p that two policies are equally good, from their verdicts on the same
    problems: under the null the problems that only one gets right split like coin tosses."""
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare(a, b, z=1.96):
    """Accuracy of b minus that of a on the same problems, with its 95% interval and McNemar's p.

    The interval is that of Agresti and Min (2005): Wald's, with half a problem more of each of the
    four kinds, so it has a width where the two agree on all problems.
    """
    a = np.asarray(a, bool)
    b = np.asarray(b, bool)
    n = len(a) + 2
    gained = np.sum(b & ~a) + 0.5
    lost = np.sum(a & ~b) + 0.5
    centre = (gained - lost) / n
    half = z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return dict(
        difference=float(b.mean() - a.mean()),
        low=max(-1.0, float(centre - half)),
        high=min(1.0, float(centre + half)),
        p=mcnemar(a, b),
    )


# ---------------------------------------------------------------- accuracy


def evaluate(policy, problems, folder, samples=0, ks=(1, 5)):
    """Accuracy of a policy as a dict for results.json; with samples > 0 also pass@k and maj@k, and
    `ended` is then the share of all responses, greedy and sampled.

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
        tokens=float(np.mean([len(s["ids"]) for s in greedy])),
        correct=correct,
    )
    if all(problem.meta for problem in problems):  # the built-in task, whose steps can be judged
        texts = zip(problems, greedy, strict=True)
        result["spurious"] = float(np.mean([count_spurious(p, s["text"]) for p, s in texts]))
    responses = list(greedy)
    if samples:
        drawn = sample(policy, problems, folder / "samples.jsonl", samples)
        result |= at_k(list(drawn.values()), ks)
        for row in drawn.values():
            responses += row
    result["ended"] = float(np.mean([s["ended"] for s in responses]))
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
    first_name, first = next(iter(results.items()))
    columns = [key for key in first if "@" in key or key == "spurious"]
    head = f"{'':9}{'greedy':>8}  {'95% interval':15}"
    head += "".join(f"{column:>10}" for column in columns)
    if len(results) > 1:
        head += f"   against {first_name}"
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


TREND = ("margin", "chosen", "rejected")  # columns of metrics.csv


def pair_trend(path, stage):
    """How training moved the pairs of a stage of metrics.csv: {"margin": [first, last], "chosen":
    ..., "rejected": ...}, means of the first and the last tenth of its steps; {} without pairs."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == stage and row["margin"]]
    few = max(1, len(rows) // 10)
    trend = {}
    for name in TREND if rows else ():
        values = [float(row[name]) for row in rows]
        trend[name] = [float(np.mean(values[:few])), float(np.mean(values[-few:]))]
    return trend


def report(results):
    """The table, and lines below it: on how many problems, what share of the responses did not
    end, how Eq. 1 moved its pairs, and where a policy got worse than the one that it started from
    on training problems that were held out."""
    first = next(iter(results.values()))
    lines = [table(results), f"on {first['problems']} problems"]
    for name, result in results.items():
        if result["ended"] < 1:
            lines.append(
                f"{name}: {1 - result['ended']:.1%} of the responses did not end within the budget "
                "and count as wrong"
            )
        if "margin" in result:
            moved = [f"{key} {result[key][0]:.2f} to {result[key][1]:.2f}" for key in TREND]
            lines.append(
                f"{name}: {', '.join(moved)}, from the first tenth of its steps to the last"
            )
        start = results.get("pos", {})
        if name.startswith("neg") and result.get("held_out", 1) < start.get("held_out", 0):
            lines.append(
                f"{name} is worse than pos on held-out training problems ({result['held_out']:.1%} "
                f"against {start['held_out']:.1%}): delete its folder and try a lower --neg-lr, "
                "fewer --neg-epochs or --nll 0.2"
            )
    return "\n".join(lines)


# ---------------------------------------------------------------- values of steps


def pit_report(problems, solutions, again):
    """A line about the first pits: how many steps a solution has, how many pits keep Q = 0 when
    they are asked `again` (rows of ask_pits_again), and on the built-in task, where the truth of
    each step is known, how many are bad steps."""
    wrong = [s for s in solutions if not s.correct]
    line = f"{len(wrong)} wrong solutions valued"
    if not wrong:
        return line
    steps = [len(s.ends) for s in solutions]
    line += f" (steps: median {np.median(steps):.0f}, largest {max(steps)}"
    line += f", {np.mean(np.equal(steps, 1)):.0%} have only one)"
    if again:
        kept = np.mean([row["correct"] == 0 for row in again])
        more = again[0]["continuations"]
        line += f"; of {len(again)} first pits asked again {kept:.1%} keep Q = 0 in {more} samples"
    if all(problems[s.id].meta for s in wrong):
        bad = []
        first_bad = []
        for s in wrong:
            labels = judge_steps(problems[s.id], s.text)
            wrong_steps = [i for i, label in enumerate(labels, 1) if label != "good"]
            bad.append(s.first_pit in wrong_steps)
            first_bad.append(wrong_steps[:1] == [s.first_pit])
        line += f"; {np.mean(bad):.1%} of all are bad steps, {np.mean(first_bad):.1%} the first bad"
    return line


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
    return token_logps(policy.model, [(prompt, response)]).sum().exp().item()


# ---------------------------------------------------------------- one problem, for a lecture


def explain(problem, before, after, folder, *, k, samples):
    """One problem as text: a wrong solution of the policy `before`, the Q of its steps, its first
    pit, the pair made there, and how probable both sides are before and after training.

    after: a second policy or None. The samples and values go to `folder`, of the policy `before`.
    """
    by_id = {problem.id: problem}
    drawn = sample(before, [problem], folder / "samples.jsonl", samples)
    correct = sum(s["correct"] for s in drawn[problem.id])
    lines = [
        printable(problem.question.strip()),
        f"answer {printable(problem.answer)}; {correct} of {samples} samples are correct",
    ]
    wrong = solutions_to_value(before, [problem], drawn, wrong=samples)
    value_steps(before, by_id, wrong, folder / f"values-{k}.jsonl", k=k, scan="full")
    if not wrong:
        lines.append("no wrong solution that ended: take another problem or more --samples")
        return "\n".join(lines)
    examples = []
    for solution in wrong:
        pairs = make_pairs("continuation", before, by_id, drawn, [solution])
        examples += [(solution, pair) for pair in pairs]
    if not examples:
        lines += explain_steps(problem, before, wrong[0])
        lines.append("no pair: no correct continuation was found before the pit")
        return "\n".join(lines)
    if problem.meta:  # show a pair without luck, if there is one
        clear = [example for example in examples if is_clear(problem, before, *example)]
        lines.append(
            f"{len(clear)} of {len(examples)} pairs set a bad step against steps that are all good"
        )
        examples = clear or examples
    solution, pair = examples[0]
    lines += explain_steps(problem, before, solution)
    lines += explain_pair(pair, before, after)
    return "\n".join(lines)


def is_clear(problem, policy, solution, pair):
    """Whether a pair of the built-in task has a bad rejected step and only good chosen steps."""
    prefix = solution.through_step(pair.first_pit - 1)
    rejected = judge_steps(problem, policy.text(prefix + pair.rejected))
    chosen = judge_steps(problem, policy.text(prefix + pair.chosen))
    return rejected[-1] != "good" and set(chosen[pair.first_pit - 1 :]) == {"good"}


def explain_steps(problem, policy, solution):
    """A line with its Q for each step of a wrong solution."""
    labels = judge_steps(problem, solution.text) if problem.meta else []
    lines = [
        "",
        f"a wrong solution, V(x), and Q of its steps from {max(solution.counts)} continuations:",
        f"{'':34}Q {solution.value:.2f} {q_bar(solution.value)}",
    ]
    for i, q in enumerate(solution.q_values, 1):
        text = printable(policy.text(solution.step(i)).strip())
        line = f"{i:3} {text:30.200}Q {q:.2f} {q_bar(q)}"
        if i == solution.first_pit:
            line += "  <- the first pit"
            if labels:
                line += f" ({labels[i - 1]})"
        lines.append(line)
    return lines


def explain_pair(pair, before, after):
    """The two sides of a pair, and their probabilities under two policies."""
    row = pair_row(pair, before.tokenizer)
    lines = [
        "",
        f"the pair, after the first {pair.first_pit - 1} steps, and its probabilities:",
        f"{'':9} before   after",
    ]
    for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        line = f"{side:9}"
        for policy in (before, after):
            chance = f"{probability(policy, pair.prompt, ids):7.4f}" if policy else "      -"
            line += chance + " "
        lines.append(line + "  " + printable(row[side].strip().replace("\n", ", ")))
    return lines


def q_bar(q):
    return "=" * round(20 * q)


# ---------------------------------------------------------------- a picture of a run


def plot_run(folder):
    """Draw a run folder as FOLDER/run.png: its losses, what Eq. 1 did to the pairs, the Q of the
    steps of wrong solutions, and the accuracy of its models. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    folder = Path(folder)
    if not (folder / "metrics.csv").exists():
        raise UserError(f"{folder}: no run folder, it holds no metrics.csv")
    with open(folder / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        plot_columns(axes[0], rows, ["loss"], label=stage)
        if rows[0]["margin"]:
            plot_columns(axes[1], rows, TREND, label=stage)
    for path in sorted(folder.glob("*/values.jsonl")):
        plot_values(axes[2], path)
    for name, result in read_json(folder / "results.json").items():
        low, high = result["interval"]
        accuracy = result["accuracy"]
        axes[3].errorbar([name], [accuracy], [[accuracy - low], [high - accuracy]], fmt="o")
    axes[0].set(title="loss", xlabel="optimizer step")
    axes[1].set(title="Eq. 1: margin and log-probabilities", xlabel="optimizer step")
    axes[2].set(title="mean Q of steps up to the first pit", xlabel="step of the solution")
    axes[3].set(title="accuracy", xlabel="model")
    for axis in axes[:3]:
        axis.legend(frameon=False)
    figure.savefig(folder / "run.png", dpi=110)
    print(f"{folder / 'run.png'}")


def plot_values(axis, path):
    """The mean of the Q that were estimated, by step, of a values.jsonl."""
    rows = [row["q_values"] for row in read_rows(path)]
    means = []
    for q_values in zip_longest(*rows):
        means.append(np.mean([q for q in q_values if q is not None]))
    axis.plot(range(1, len(means) + 1), means, "o-", label=path.parent.name)


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
    baseline: str = flag("", "folder of a second policy, to compare with", group="run", stage="")
    out: str = flag("runs/evaluate", "where each model gets a folder of responses", stage="")
    plot: str = flag("", "run folder to draw as FOLDER/run.png; needs matplotlib", stage="")
    explain: int = flag(-1, "number of a problem, to show its steps", least=-1, stage="")
    split: str = flag("test", "of the built-in task", choices=SPLITS, group="data")
    limit: int = flag(0, "problems; 0 = all of a file, or 1000", least=0, stage="")
    samples: int = flag(0, "samples a problem, for pass@k", group="sampling", least=0, stage="")
    rollouts: int = flag(0, "K, for the Q of steps", group="values", least=0, stage="")


def main():
    flags = parse_flags(EvaluateFlags, __doc__)
    if flags.plot:
        plot_run(flags.plot)
        return
    c = apply_presets(flags)
    problems, data_hash = read_data(c, c.split, enough=1000)
    if c.explain >= len(problems):
        raise UserError(f"--explain {c.explain}: there are only {len(problems)} problems")
    tested = dict(model=c)
    if c.baseline:  # prompted as it was trained, on the same problems
        own = apply_presets(replace(flags, model=c.baseline, **world_flags(c)))
        tested = dict(baseline=own, model=c)
    policies = {}
    folders = {}
    for name, config in tested.items():
        policies[name] = load_policy(config.model, config)
        folders[name] = responses_folder(config, policies[name], data_hash)
        policies[name].prompt(problems[0])  # a wrong prompt format fails before all is written
        config.device = policies[name].device
    for name, config in tested.items():
        claim_folder(config, folders[name] / "config.json", {})
    if c.explain >= 0:
        first = next(iter(tested))
        after = policies["model"] if c.baseline else None
        counts = dict(k=c.rollouts or 16, samples=c.samples or 16)
        print(explain(problems[c.explain], policies[first], after, folders[first], **counts))
        return
    results = {}
    for name, policy in policies.items():
        results[name] = evaluate(policy, problems, folders[name], c.samples)
    write_json(folders["model"] / "results.json", results)
    print(report(results))
    for name, config in tested.items():
        print(f"{name}: {how_prompted(config)}; responses in {folders[name]}")
    if c.rollouts:
        print_q_by_step(policies["model"], folders["model"], problems, c.rollouts)


def responses_folder(c, policy, data_hash):
    """Where the responses of a policy lie: apart from those of any other model, prompt, problems or
    way of sampling."""
    source = [folder_hash(c.model), data_hash, c.split, c.prompt, c.sampling_dtype]
    source += [policy.device.split(":")[0], asdict(policy.sampling)]
    key = hashlib.blake2b(json.dumps(source).encode(), digest_size=4).hexdigest()
    return Path(c.out) / f"{Path(c.model).resolve().name}-{key}"


def print_q_by_step(policy, folder, problems, k):
    """Average Q of the steps of the greedy responses."""
    greedy = sample(policy, problems, folder / "greedy.jsonl", n=1, temperature=0)
    solutions = solutions_to_value(policy, problems, greedy, wrong=1, correct=1)
    by_id = {problem.id: problem for problem in problems}
    file = folder / f"values-greedy-{k}.jsonl"
    value_steps(policy, by_id, solutions, file, k=k, scan="full")
    for row in q_by_step(solutions):
        print("step {step:2}  Q {q:.3f}  best of 5 {best_of_5:.3f}  n {solutions}".format(**row))


if __name__ == "__main__":
    run_program(main)

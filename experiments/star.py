"""The star graph (targets 13-15; Fig. 8, App. I): can per-step DPO cross the one decision that
imitation cannot?

    python experiments/star.py --budget cpu

Which of two arms leads to the goal is decided at the first node. A model that follows edges and
guesses the arm is right on 50%. The paper starts from GPT-2; here a small model first learns to
follow edges on graphs with one arm. SFT on two arms then gives three starts, defined by loss:

    under-trained   the decision still costs ln 2 = 0.693
    early-stopped   the least loss on held-out graphs
    over-trained    the least loss on the training graphs

From each, on the same fresh graphs and for as many optimizer steps: rounds of per-step DPO on the
model's own paths, and more SFT.
"""

import math
import random
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from lab import Cell, LabFlags, figure, publish, spread, spreads, sweep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BASE, STEP_STARTS, Problem, parse_flags, split_of
from model import token_logps
from rollout import Example, value_steps, make_pairs, run_program, sample, solutions_to_value

BUDGETS = {
    "smoke": dict(
        seeds=1,
        base=200,  # graphs with one arm, to learn to follow edges
        graphs=40,
        epochs=[1, 2],
        fresh=30,  # graphs of a round
        rounds=1,
        flags=dict(test_limit=20, samples=4, rollouts=2),
    ),
    "cpu": dict(
        seeds=3,
        base=250_000,
        graphs=1000,
        epochs=[1, 3, 10, 30, 100],
        fresh=1000,
        rounds=4,
        flags={},
    ),
    "gpu": dict(
        seeds=5,
        base=1_000_000,
        graphs=30_000,
        epochs=[1, 3, 10, 30, 100],
        fresh=10_000,
        rounds=10,
        flags={},
    ),
}

FLAGS = dict(
    data="star",
    model=str(BASE),  # its tokenizer knows | / and >
    prompt="{question}",
    test_limit=1000,
    max_new_tokens=8,
    samples=8,
    temperature=1.0,
    negatives=4,
    rollouts=8,
    batch=64,
    beta=0.1,
)

# ---------------------------------------------------------------- the task


def star_problem(rng, split, arms=2, nodes=4, labels=21):
    """The paper's star graph (5.3): arms of so many nodes from one centre, their edges shuffled.

    The question holds the edges, the centre and the goal, the end of one arm:

        8>3|3>10|14>13|10>1|17>14|8>17/8>13=     and its solution     8>17>14>13
    """
    while True:
        centre, *others = rng.sample(range(labels), 1 + arms * (nodes - 1))
        paths = []
        for start in range(0, len(others), nodes - 1):
            paths.append([centre, *others[start : start + nodes - 1]])
        edges = []
        for path in paths:
            edges += [f"{a}>{b}" for a, b in pairwise(path)]
        rng.shuffle(edges)
        path = rng.choice(paths)
        question = f"{'|'.join(edges)}/{centre}>{path[-1]}="
        if split_of(question) == split:
            answer = ">".join(map(str, path))
            return Problem("", question, answer, answer, style="arrows")


def star_problems(split, count, seed=0):
    problems = []
    for i in range(count):
        problem = star_problem(random.Random(f"{seed} {split} {i}"), split)
        problem.id = f"{split}-{seed}-{i}"
        problems.append(problem)
    return problems


def arrow_starts(text):
    """A step is a node with the '>' behind it."""
    return [arrow.end() for arrow in re.finditer(">", text)]


STEP_STARTS["arrows"] = arrow_starts

# ---------------------------------------------------------------- one seed


def pretrain(folder, name, base, flags):
    """A model that follows edges, from graphs with one arm of 3 to 6 nodes: the arm `follows`."""
    rng = random.Random(0)
    problems = []
    for _ in range(base):
        problems.append(star_problem(rng, "train", arms=1, nodes=rng.choice((3, 4, 5, 6))))
    cell = Cell(folder, problems, val=[], test=[], **(FLAGS | flags))
    cell.fit("follows", cell.c.model, cell.teacher, epochs=1.0, lr=2e-3)
    test = star_problems("test", cell.c.test_limit)
    return dict(seed=0, loss=decision(cell.policy("follows"), test))


def path_examples(policy, problems):
    return [Example(p.id, policy.prompt(p), policy.solution(p)) for p in problems]


@torch.no_grad()
def decision(policy, problems):
    """Mean NLL of the decision, which is the second node of the path, and of all other tokens."""
    examples = path_examples(policy, problems)
    logps = token_logps(policy.model, [example.sequence for example in examples])
    logps = logps.view(len(examples), -1)  # paths are equally long
    nll = -logps.mean(0)  # of: node > node > node > node <eos>
    return dict(decision=float(nll[2]), rest=float(nll.sum() - nll[2]))


def compare_starts(folder, seed, graphs, epochs, fresh, rounds, flags):
    """SFT of several lengths, and from three of them both ways to go on."""
    flags = FLAGS | flags
    cell = Cell(
        folder,
        train=star_problems("train", graphs, seed),
        val=star_problems("val", 400),
        test=star_problems("test", flags["test_limit"]),
        seed=seed,
        **flags,
    )
    follows = folder.parent / "base" / "follows"
    trained = {}
    for count in epochs:
        name = f"sft-{count}"
        cell.fit(name, follows, cell.teacher, epochs=count, lr=5e-4)
        val = decision(cell.policy(name), cell.splits["val"])
        train = decision(cell.policy(name), cell.train[:300])
        trained[name] = cell.judge(name) | dict(val=val, train=train)
    starts = choose_starts(trained)
    curves = {}
    for kind, name in starts.items():
        for method, curve in go_on(cell, name, kind, fresh, rounds).items():
            curves[f"{kind}-{method}"] = curve
    return dict(seed=seed, starts=starts, trained=trained, curves=curves)


def choose_starts(trained):
    """{kind of start: arm}, by the NLL of the decision."""

    def loss(name, split):
        return trained[name][split]["decision"]

    return {
        "under-trained": min(trained, key=lambda name: abs(loss(name, "train") - math.log(2))),
        "early-stopped": min(trained, key=lambda name: loss(name, "val")),
        "over-trained": min(trained, key=lambda name: loss(name, "train")),
    }


def go_on(cell, start, kind, fresh, rounds):
    """Rounds of per-step DPO from the arm `start`, and as many steps of SFT on the same graphs.
    Returns a curve for each, with a point after each round."""
    dpo_arm = start
    sft_arm = start
    steps = 0
    curves = {"dpo": [point(cell, start, steps)], "sft": [point(cell, start, steps)]}
    for i in range(1, rounds + 1):
        problems = star_problems("train", fresh, seed=1000 * (cell.c.seed + 1) + i)
        pairs = step_pairs(cell, dpo_arm, problems, i, f"{kind}-samples-{i}")
        if not pairs:
            break
        round_steps = cell.fit(f"{kind}-dpo-{i}", dpo_arm, pairs, epochs=1.0, lr=2e-4)
        examples = path_examples(cell.base, problems)
        epochs = round_steps * cell.c.batch / fresh
        cell.fit(f"{kind}-sft-{i}", sft_arm, examples, epochs=epochs, lr=2e-4)
        dpo_arm = f"{kind}-dpo-{i}"
        sft_arm = f"{kind}-sft-{i}"
        steps += round_steps
        curves["dpo"].append(point(cell, dpo_arm, steps) | dict(pairs=len(pairs)))
        curves["sft"].append(point(cell, sft_arm, steps))
    return curves


def step_pairs(cell, name, problems, i, folder):
    """Pairs of single steps from the wrong paths of arm `name` on fresh graphs."""
    by_id = {problem.id: problem for problem in problems}
    folder = cell.folder / folder
    folder.mkdir(exist_ok=True)
    policy = cell.policy(name, i)
    c = cell.c
    rollouts = sample(policy, problems, folder / "samples.jsonl", c.samples)
    solutions = solutions_to_value(policy, problems, rollouts, wrong=c.negatives)
    value_steps(policy, by_id, solutions, folder / "values.jsonl", k=c.rollouts, scan="full")
    return make_pairs("step", policy, by_id, rollouts, solutions, c.seed)


def point(cell, name, steps):
    """How good an arm is on the test graphs, after so many optimizer steps."""
    loss = decision(cell.policy(name), cell.splits["test"])
    return dict(steps=steps, accuracy=cell.accuracy(name, "test")) | loss


# ---------------------------------------------------------------- all seeds


def main():
    c = parse_flags(LabFlags, __doc__)
    budget = dict(BUDGETS[c.budget])
    seeds = range(budget.pop("seeds"))
    base = budget.pop("base")
    first = sweep(c, "star", pretrain, [("base",)], base=base, flags=budget["flags"])
    cells = sweep(c, "star", compare_starts, [(seed,) for seed in seeds], **budget)
    summary = summarize(cells.values())
    rows = []
    for cell in cells.values():
        for name, curve in cell["curves"].items():
            rows += [dict(seed=cell["seed"], curve=name, **values) for values in curve]
    stem = publish(c, "star", first | cells, summary, rows)
    panels = [partial(panel, summary=summary, key=key) for key in ("accuracy", "decision")]
    figure(stem, panels)
    report(summary)


def summarize(cells):
    """Means and intervals over seeds, of the three starts and of all curves."""
    summary = {"starts": {}, "curves": {}}
    for kind in ("under-trained", "early-stopped", "over-trained"):
        chosen = [cell["starts"][kind] for cell in cells]
        records = [cell["trained"][name] for cell, name in zip(cells, chosen, strict=True)]
        summary["starts"][kind] = dict(
            accuracy=spread([record["accuracy"] for record in records]),
            chosen=chosen,
            train=spread([record["train"]["decision"] for record in records]),
            val=spread([record["val"]["decision"] for record in records]),
        )
        for method in ("dpo", "sft"):
            name = f"{kind}-{method}"
            curves = [cell["curves"][name] for cell in cells]
            points = zip(*curves, strict=False)  # as long as the shortest
            keys = ("steps", "accuracy", "decision")
            summary["curves"][name] = [spreads(seeds, keys) for seeds in points]
    return summary


def report(summary):
    for kind, start in summary["starts"].items():
        print(
            f"{kind:14} accuracy {start['accuracy'][0]:.3f}   decision, NLL: "
            f"train {start['train'][0]:.3f} val {start['val'][0]:.3f}   {start['chosen']}"
        )
    for name, curve in summary["curves"].items():
        points = [f"{mean['steps'][0]:.0f}:{mean['accuracy'][0]:.3f}" for mean in curve]
        print(f"{name:18} accuracy {' '.join(points)}")


def panel(axis, summary, key):
    """The curves of all starts: accuracy, or NLL of the decision, over optimizer steps."""
    colours = {"under-trained": "#d1495b", "early-stopped": "#2b7bba", "over-trained": "#777777"}
    lines = {"dpo": "o-", "sft": "s:"}
    for name, curve in summary["curves"].items():
        kind, method = name.rsplit("-", 1)
        steps = [mean["steps"][0] for mean in curve]
        values = [mean[key][0] for mean in curve]
        axis.plot(steps, values, lines[method], ms=3, color=colours[kind], label=name)
    if key == "accuracy":
        axis.set_title("exact match, held-out graphs")
        axis.axhline(0.5, color="#cccccc", lw=1)  # a guess of the arm
    else:
        axis.set_title("NLL of the decision")
        axis.axhline(math.log(2), color="#cccccc", lw=1)
    axis.set_xlabel("optimizer steps from the start")
    axis.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    run_program(main)

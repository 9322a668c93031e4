"""More positives can hurt (targets 4-8; Fig. 2c, 3, 4, 9): one's own correct solutions, how many of
them, and with which spurious steps.

    python experiments/positives.py --budget cpu

The questions stay the same; the SFT model's own correct solutions of them vary.

(a) 1 to 16 of them a question, for a fixed number of epochs and of optimizer steps.
(b) One of them a question against the teacher's, on the same questions.
(c) How likely both are under the base model.
(d) Pits of wrong solutions inserted as steps into correct ones, at several doses: at one a solution
    too little is left that is right, so per-step DPO has nothing to show. The control inserts steps
    that change nothing, 9 + 0 = 9. Then per-step DPO, from each model that learned spurious steps
    and on its own mistakes: does it unlearn them?
"""

import random
from dataclasses import replace

import numpy as np
import torch
from lab import LabFlags, against, arithmetic_cell, arm_rows, figure, publish, spreads, sweep

from data import parse_flags
from model import token_logps
from rollout import distinct, make_pairs, most_diverse, run_program
from train import teacher_examples

BUDGETS = {
    "smoke": dict(
        seeds=1,
        size=24,
        counts=[1, 2],  # of (a)
        inserted=[0.5],  # steps a solution, of (d)
        flags=dict(test=6, samples=12, rollouts=2, negatives=2, sft_epochs=4.0),
    ),
    "cpu": dict(
        seeds=3,
        size=400,
        counts=[1, 2, 4, 8, 16],
        inserted=[0.1, 0.3, 1.0],
        flags=dict(sft_epochs=7.0, samples=128),
    ),
    "gpu": dict(
        seeds=5,
        size=800,
        counts=[1, 2, 4, 8, 16],
        inserted=[0.1, 0.3, 1.0],
        flags=dict(samples=256),  # and the default of sft_epochs
    ),
}
EPOCHS = 8.0  # of every arm that starts from the base
EDGES = np.linspace(0, 3, 31)  # of the histogram of (c), in nats a token


def work(folder, seed, size, counts, inserted, flags):
    cell = arithmetic_cell(folder, limit=size, seed=seed, **flags)
    base = cell.c.model
    cell.arm("sft", base, cell.teacher, cell.c.sft_epochs)
    samples = cell.sample("sft")
    correct = {}
    for problem in cell.train:
        of_problem = samples[problem.id]
        correct[problem.id] = distinct([s for s in of_problem if s["correct"]])
    solved = [problem for problem in cell.train if correct[problem.id]]
    own = []
    for problem in solved:
        text = correct[problem.id][0]["text"]
        own.append(replace(problem, solution=text))

    train_counts(cell, samples, counts)
    cell.arm("one-teacher", base, teacher_examples(cell.base, solved), EPOCHS)
    cell.arm("one-own", base, teacher_examples(cell.base, own), EPOCHS)
    likely = dict(teacher=likelihood(cell, solved), own=likelihood(cell, own))

    pits = pit_texts(cell, samples)
    asked = [problem for problem in solved if problem.id in pits]
    diverse = []
    for problem in asked:
        text = most_diverse(correct[problem.id], 1)[0]["text"]
        diverse.append(replace(problem, solution=text))
    train_inserted(cell, diverse, pits, inserted)
    return dict(seed=seed, asked=len(asked), questions=len(solved), arms=cell.arms, nll=likely)


def train_counts(cell, samples, counts):
    """(a): equal epochs, and equal steps."""
    c = cell.c
    steps = round(c.sft_epochs * len(cell.train) * max(counts) / c.batch / 4)
    for count in counts:
        own = cell.positives(samples, count)
        cell.arm(f"own{count}-epochs", c.model, own, EPOCHS)
        cell.arm(f"own{count}-steps", c.model, own, steps * c.batch / len(own))
        found = round(len(own) / len(cell.train), 2)  # there may be fewer than `count`
        cell.arms[f"own{count}-epochs"]["per_question"] = found
        cell.arms[f"own{count}-steps"]["per_question"] = found


@torch.no_grad()
def likelihood(cell, problems):
    """(c): the NLL of the solutions of `problems` under the base model."""
    examples = teacher_examples(cell.base, problems)
    lengths = [len(example.response) for example in examples]
    logps = token_logps(cell.base.model, [example.sequence for example in examples]).split(lengths)
    nll = np.array([-part.sum().item() for part in logps])
    return dict(
        per_solution=float(nll.mean()),
        per_token=float(nll.sum() / sum(lengths)),
        histogram=np.histogram(nll / lengths, EDGES)[0].tolist(),
    )


def pit_texts(cell, samples):
    """{problem id: texts of the first pits of the SFT model's wrong solutions}."""
    pits = {}
    solutions, _ = cell.value("sft", samples)
    for s in solutions:
        text = cell.base.text(s.step(s.first_pit)).strip("\n")
        if "####" not in text:
            pits.setdefault(s.id, []).append(text)
    return pits


def train_inserted(cell, problems, pits, inserted):
    """(d). problems: with an own solution each."""
    rng = random.Random(cell.c.seed)

    def train(arm, problems):
        cell.arm(arm, cell.c.model, teacher_examples(cell.base, problems), EPOCHS)

    train("inserted-0", problems)
    for n in inserted:
        arm = f"spurious-{n:g}"
        train(arm, [insert(rng, p, n, pits[p.id]) for p in problems])
        train(f"harmless-{n:g}", [insert(rng, p, n) for p in problems])
        samples = cell.sample(arm, 1, min(16, cell.c.samples))
        solutions, _ = cell.value(arm, samples, 1)
        pairs = make_pairs(cell.c.pairs, cell.base, cell.by_id, samples, solutions, cell.c.seed)
        if pairs:
            cell.arm(f"{arm}-neg", arm, pairs, epochs=4.0)


def insert(rng, problem, n, steps=None):
    """Put n lines on average between those of a solution: some of `steps`, or lines that change
    nothing."""
    *lines, answer = problem.solution.split("\n")
    for _ in range(int(n) + (rng.random() < n % 1)):
        at = rng.randint(1, len(lines))
        total = lines[at - 1].rsplit(" ", 1)[-1]
        line = f"{total} + 0 = {total}"
        if steps:
            line = rng.choice(steps)
        lines.insert(at, line)
    return replace(problem, solution="\n".join([*lines, answer]))


# ---------------------------------------------------------------- summary


def summarise(cells):
    summary = {}
    for arm in cells[0]["arms"]:
        records = [cell["arms"][arm] for cell in cells if arm in cell["arms"]]
        summary[arm] = spreads(records, ["accuracy", "spurious", "per_question"])
        for other in ("sft", "one-teacher", "inserted-0"):
            if arm not in ("sft", other):
                summary[arm][f"against {other}"] = against(cells, arm, other)
    summary["nll"] = {}
    for who in ("teacher", "own"):
        records = [cell["nll"][who] for cell in cells]
        summary["nll"][who] = spreads(records, ["per_solution", "per_token"])
    return summary


def main():
    c = parse_flags(LabFlags, __doc__)
    b = BUDGETS[c.budget]
    keys = [(seed, b["size"]) for seed in range(b["seeds"])]
    shared = {key: b[key] for key in ("counts", "inserted", "flags")}
    cells = sweep(c, "positives", work, keys, **shared)
    records = list(cells.values())
    summary = summarise(records)
    stem = publish(c, "positives", cells, summary, arm_rows(records))
    panels = [
        lambda axis: counts_panel(axis, summary, b["counts"]),
        lambda axis: nll_panel(axis, records),
        lambda axis: insert_panel(axis, summary),
    ]
    figure(stem, panels)
    for name, arm in summary.items():
        if name != "nll":
            print(f"{name:18} accuracy {arm['accuracy'][0]:.3f}  spurious {arm['spurious'][0]:.2f}")
    for who, nll in summary["nll"].items():
        print(f"{who:18} NLL per token under the base {nll['per_token'][0]:.3f}")


def counts_panel(axis, summary, counts):
    for kind, colour in (("epochs", "#2b7bba"), ("steps", "#77aadd")):
        arms = [summary[f"own{count}-{kind}"] for count in counts]
        found = [arm["per_question"][0] for arm in arms]
        accuracy = [arm["accuracy"][0] for arm in arms]
        spurious = [arm["spurious"][0] for arm in arms]
        axis.plot(found, accuracy, "o-", ms=3, color=colour, label=f"equal {kind}")
        axis.plot(found, spurious, "s:", ms=3, color=colour)
    axis.axhline(summary["sft"]["accuracy"][0], color="#777777", lw=1, label="SFT")
    axis.set(xscale="log", xlabel="own correct solutions a question")
    axis.set_title("accuracy (line), spurious steps (dotted)")
    axis.legend(frameon=False, fontsize=7)


def nll_panel(axis, cells):
    for who, colour in (("teacher", "#777777"), ("own", "#2b7bba")):
        counts = np.sum([cell["nll"][who]["histogram"] for cell in cells], 0)
        axis.stairs(counts, EDGES, color=colour, label=who)
    axis.set(xlabel="NLL per token under the base model", ylabel="solutions")
    axis.set_title("who is easier to imitate")
    axis.legend(frameon=False, fontsize=7)


def insert_panel(axis, summary):
    names = [name for name in summary if name.startswith(("inserted", "spurious", "harmless"))]
    names.reverse()  # barh begins at the bottom
    colours = []
    for name in names:
        colour = "#bbbbbb"
        if "neg" in name:
            colour = "#2b7bba"
        elif "spurious" in name:
            colour = "#d1495b"
        colours.append(colour)
    axis.barh(names, [summary[name]["accuracy"][0] for name in names], color=colours)
    axis.axvline(summary["sft"]["accuracy"][0], color="#777777", lw=1)
    axis.set(xlabel="accuracy (line: SFT)", title="steps inserted in correct solutions")


if __name__ == "__main__":
    run_program(main)

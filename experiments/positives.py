"""More positives can hurt (targets 4-8; Fig. 2c, 3, 4, 9): self-generated right solutions, and spurious steps in them.

    python experiments/positives.py --budget cpu

Questions stay fixed; the SFT model's own right solutions of them vary. (a) 1 to 16 solutions a question, for a fixed
number of epochs and of optimizer steps. (b) One own solution a question against the teacher's, on the same questions.
(c) How likely both are under the base model. (d) Steps from wrong solutions, at which the value fell to zero, inserted
into own right ones; the control inserts steps that change nothing ("9 + 0 = 9"); then per-step DPO, from the model that
learned the spurious steps and on its own samples, unlearns them.
"""

import random

import numpy as np
import torch
from lab import Cell, LabConfig, bits, figure, publish, spread, sweep

from evaluate import compare
from rollout import entry, parse, select_diverse, unique
from train import sequence_logprobs

BUDGETS = {
    "smoke": dict(seeds=1, size=32, counts=[1, 2], inserted=[1], flags=dict(
        test=8, samples=16, rollouts=2, negatives=2, sft_epochs=4.0)),
    "cpu": dict(seeds=3, size=400, counts=[1, 2, 4, 8, 16], inserted=[1, 2], flags=dict(sft_epochs=7.0, samples=128)),
    "gpu": dict(seeds=5, size=800, counts=[1, 2, 4, 8, 16], inserted=[1, 2, 3], flags=dict(samples=256)),
}  # fmt: skip

EDGES = np.linspace(0, 3, 31)  # of the histogram, in nats a token


def cell(folder, seed, size, counts, inserted, flags):
    cell = Cell(folder, limit=size, seed=seed, **flags)
    c, rng, arms = cell.c, random.Random(seed), {}

    def arm(name, examples=(), pairs=(), start=c.model, epochs=8.0, **changes):
        steps = cell.fit(name, start, examples, pairs, epochs=epochs, **changes)
        arms[name] = cell.judge(name) | dict(steps=steps, examples=len(examples) + len(pairs))

    def respond(rows):  # [(problem, text)] -> examples
        return [cell.example(problem, text) for problem, text in rows]

    arm("sft", cell.teacher, epochs=c.sft_epochs)
    rows, _ = cell.draw("sft")
    right = {p.id: unique([s for s in rows[p.id]["samples"] if s["correct"]]) for p in cell.train}

    # (a) and the mean number of solutions that there were
    steps = round(c.sft_epochs * size * max(counts) / c.batch / 4)
    for m in counts:
        own = cell.positives(rows, m)
        for name, epochs in ((f"own{m}-epochs", 8.0), (f"own{m}-steps", steps * c.batch / len(own))):
            arm(name, own, epochs=epochs)
            arms[name] |= dict(per_question=round(len(own) / size, 2))

    # (b) the same questions, one solution each, as many epochs
    both = [p for p in cell.train if right[p.id]]
    arm("one-teacher", respond([(p, p.solution) for p in both]))
    arm("one-own", respond([(p, right[p.id][0]["text"]) for p in both]))

    # (c) NLL under the base model, per solution and per token
    policy, likely = cell.policy(c.model), {}
    for name, examples in (("teacher", respond([(p, p.solution) for p in both])),
                           ("own", respond([(p, right[p.id][0]["text"]) for p in both]))):  # fmt: skip
        with torch.no_grad():
            nll = -sequence_logprobs(policy.model, [(e.prompt, e.response) for e in examples]).numpy()
        tokens = np.array([len(e.response) for e in examples])
        likely[name] = dict(per_solution=float(nll.mean()), per_token=float(nll.sum() / tokens.sum()),
                            histogram=np.histogram(nll / tokens, EDGES)[0].tolist())  # fmt: skip

    # (d) pits of wrong solutions as spurious steps
    cell.learn("sft", rows)
    pits = cell.pit_steps("sft")
    asked = [p for p in both if pits.get(p.id)]
    texts = [(p, select_diverse(right[p.id], 1)[0]["text"]) for p in asked]
    arm("inserted-0", respond(texts))
    for n in inserted:
        for kind in ("spurious", "harmless"):
            arm(f"{kind}-{n}", respond([(p, insert(rng, text, n, pits[p.id] if kind == "spurious" else None))
                                        for p, text in texts]))  # fmt: skip
    worst = f"spurious-{max(inserted)}"
    rows, _ = cell.draw(worst, 1, samples=min(16, c.samples))
    _, pairs, _ = cell.learn(worst, rows, 1)
    if pairs:
        arm(f"{worst}-neg", pairs=pairs, start=worst, epochs=4.0)
    return dict(seed=seed, asked=len(asked), questions=len(both), arms=arms, nll=likely)


def insert(rng, text, n, steps=None):
    """Put n lines between the lines of a solution: from `steps`, or such as change nothing (9 + 0 = 9)."""
    *lines, answer = text.split("\n")
    for _ in range(n):
        at = rng.randint(1, len(lines))
        total = lines[at - 1].rsplit(" ", 1)[-1]
        lines.insert(at, rng.choice(steps) if steps else f"{total} + 0 = {total}")
    return "\n".join([*lines, answer])


def main():
    c = parse(LabConfig, __doc__)
    b = BUDGETS[c.budget]
    cells = sweep(c, "positives", cell, [(seed, b["size"]) for seed in range(b["seeds"])],
                  counts=b["counts"], inserted=b["inserted"], flags=b["flags"])  # fmt: skip
    summary = {}
    for name in next(iter(cells.values()))["arms"]:
        records = [r["arms"][name] for r in cells.values() if name in r["arms"]]
        summary[name] = dict(accuracy=spread([r["accuracy"] for r in records]),
                             spurious=spread([r["spurious"] for r in records]))  # fmt: skip
        for other in ("sft", "one-teacher", "inserted-0"):
            pooled = [(bits(r["arms"][other]["correct"]), bits(r["arms"][name]["correct"])) for r in cells.values()
                      if name in r["arms"]]  # fmt: skip
            if name != other and name.startswith(("own", "one", "spur", "harm", "ins")):
                summary[name][f"against {other}"] = compare(*map(np.concatenate, zip(*pooled, strict=True)))
    summary["nll"] = {name: {key: spread([r["nll"][name][key] for r in cells.values()])
                             for key in ("per_solution", "per_token")} for name in ("teacher", "own")}  # fmt: skip
    rows = [dict(seed=r["seed"], arm=name, **{k: v for k, v in a.items() if k != "correct"})
            for r in cells.values() for name, a in r["arms"].items()]  # fmt: skip
    stem = publish(c, "positives", cells, summary, rows)
    figure(stem, [lambda axis: counts_panel(axis, summary, b["counts"], cells),
                  lambda axis: nll_panel(axis, cells), lambda axis: insert_panel(axis, summary)])  # fmt: skip
    for name, s in summary.items():
        if name != "nll":
            print(f"{name:18} accuracy {s['accuracy'][0]:.3f}   spurious {s['spurious'][0]:.2f}")
    print({name: round(s["per_token"][0], 3) for name, s in summary["nll"].items()}, "NLL per token under the base")


def counts_panel(axis, summary, counts, cells):
    for kind, colour in (("epochs", "#2b7bba"), ("steps", "#77aadd")):
        x = [np.mean([r["arms"][f"own{m}-{kind}"]["per_question"] for r in cells.values()]) for m in counts]
        axis.plot(x, [summary[f"own{m}-{kind}"]["accuracy"][0] for m in counts], "o-", ms=3, color=colour,
                  label=f"equal {kind}")  # fmt: skip
        axis.plot(x, [summary[f"own{m}-{kind}"]["spurious"][0] for m in counts], "s:", ms=3, color=colour)
    axis.axhline(summary["sft"]["accuracy"][0], color="#777777", lw=1, label="SFT")
    axis.set(xscale="log", xlabel="own right solutions a question", title="accuracy (line), spurious steps (dotted)")
    axis.legend(frameon=False, fontsize=7)


def nll_panel(axis, cells):
    for name, colour in (("teacher", "#777777"), ("own", "#2b7bba")):
        counts = np.sum([r["nll"][name]["histogram"] for r in cells.values()], 0)
        axis.stairs(counts, EDGES, color=colour, label=name)
    axis.set(xlabel="NLL per token under the base model", ylabel="solutions", title="who is easier to imitate")
    axis.legend(frameon=False, fontsize=7)


def insert_panel(axis, summary):
    names = [n for n in summary if n.startswith(("inserted", "spurious", "harmless"))]
    colours = ["#2b7bba" if "neg" in n else "#d1495b" if "spur" in n else "#bbbbbb" for n in names]
    axis.barh(names[::-1], [summary[n]["accuracy"][0] for n in names[::-1]], color=colours[::-1])
    axis.axvline(summary["sft"]["accuracy"][0], color="#777777", lw=1)
    axis.set(xlabel="accuracy (line: SFT)", title="steps inserted in right solutions")


if __name__ == "__main__":
    entry(main)

"""The star graph (targets 13-15; Fig. 8, App. I): can per-step DPO cross the one decision that imitation cannot?

    python experiments/star.py --budget cpu

Which of two arms leads to the goal is decided at the first node; a model that follows edges and guesses the arm is
right on 50%. The paper starts from GPT-2; here a small model first learns to follow edges on graphs with one arm. SFT
on two arms then gives three starts, defined by loss: under-trained (the decision still costs ln 2 = 0.693), early-
stopped (the least loss on held-out graphs), over-trained (the least on the training graphs). From each, on the same
fresh graphs and for as many optimizer steps: rounds of per-step DPO on the model's own paths, and more SFT.
"""

import itertools
import random

import numpy as np
import torch
from lab import Cell, LabConfig, figure, publish, spread, sweep

from data import load_problems, star_problem
from rollout import entry, parse
from train import token_logprobs

BUDGETS = {
    "smoke": dict(seeds=1, base=200, graphs=40, epochs=[1, 2], fresh=30, rounds=1, flags=dict(
        test=20, samples=4, rollouts=2)),
    "cpu": dict(seeds=3, base=250_000, graphs=1000, epochs=[1, 3, 10, 30, 100], fresh=1000, rounds=4, flags={}),
    "gpu": dict(seeds=5, base=1_000_000, graphs=30_000, epochs=[1, 3, 10, 30, 100], fresh=10_000, rounds=10, flags={}),
}  # fmt: skip


def pretrain(folder, base, flags):
    """The start of all: a model that follows edges, taught on graphs with one arm of 3 to 6 nodes."""
    cell, rng = Cell(folder, data="star", limit=8, **flags), random.Random(0)
    problems = [star_problem(rng, "train", 1, rng.choice((3, 4, 5, 6))) for _ in range(base)]
    examples = [cell.example(p, p.solution) for p in problems]
    cell.fit("follows", cell.c.model, examples, epochs=1.0, lr=2e-3)
    return dict(seed=0, loss=decision(cell, "follows", "test"))


def decision(cell, name, split):
    """Mean NLL of the first decision (the second node of the path) and of all other tokens."""
    problems = cell.train[:300] if split == "train" else cell.splits[split]
    pairs = [(e.prompt, e.response) for e in (cell.example(p, p.solution) for p in problems)]
    with torch.no_grad():
        nll = -token_logprobs(cell.policy(name).model, pairs).view(len(pairs), -1).mean(0)  # paths are equally long
    return dict(decision=float(nll[2]), rest=float(nll.sum() - nll[2]))


def cell(folder, seed, base, graphs, epochs, fresh, rounds, flags):
    cell = Cell(folder, data="star", limit=graphs, seed=seed, **flags)
    c, start, trained = cell.c, folder.parent / "base" / "follows", {}
    for e in epochs:
        name = f"sft-{e}"
        cell.fit(name, start, cell.teacher, epochs=e, lr=5e-4)
        trained[name] = cell.judge(name) | {split: decision(cell, name, split) for split in ("val", "train")}
    by_val = sorted(trained, key=lambda name: trained[name]["val"]["decision"])
    under = min(trained, key=lambda name: abs(trained[name]["train"]["decision"] - np.log(2)))
    over = min(trained, key=lambda name: trained[name]["train"]["decision"])
    starts, curves = {"under-trained": under, "early-stopped": by_val[0], "over-trained": over}, {}
    for kind, method in itertools.product(starts, ("dpo", "sft")):
        now, curve, prefix = starts[kind], [], f"{kind}-{method}"
        curve.append(dict(steps=0, accuracy=cell.accuracy(now, "test"), **decision(cell, now, "test")))
        for i in range(rounds):
            cell.train = load_problems("star", "train", fresh, 1000 * (seed + 1) + i)
            cell.by_id = {p.id: p for p in cell.train}
            name = f"{prefix}-{i + 1}"
            if method == "dpo":
                rows, _ = cell.draw(now, i, into=f"{prefix}-{i + 1}-draws")
                _, pairs, _ = cell.learn(now, rows, i, into=f"{prefix}-{i + 1}-draws", pairs="step", scan="full")
                if not pairs:
                    break
                steps = cell.fit(name, now, pairs=pairs, epochs=1.0, lr=2e-4, beta=0.1)
                curve.append(dict(steps=curve[-1]["steps"] + steps, pairs=len(pairs)))
            else:
                if i + 1 >= len(curves[f"{kind}-dpo"]):
                    break
                steps = curves[f"{kind}-dpo"][i + 1]["steps"] - curves[f"{kind}-dpo"][i]["steps"]
                examples = [cell.example(p, p.solution) for p in cell.train]
                cell.fit(name, now, examples, epochs=steps * c.batch / len(examples), lr=2e-4)
                curve.append(dict(steps=curve[-1]["steps"] + steps, pairs=""))
            curve[-1] |= dict(accuracy=cell.accuracy(name, "test"), **decision(cell, name, "test"))
            now = name
        curves[prefix] = curve
    return dict(seed=seed, starts=starts, trained=trained, curves=curves)


def job(folder, seed, **shared):
    if seed == "base":
        return pretrain(folder, shared["base"], shared["flags"])
    return cell(folder, seed, **shared)


def main():
    c = parse(LabConfig, __doc__)
    b = BUDGETS[c.budget]
    shared = {key: b[key] for key in ("base", "graphs", "epochs", "fresh", "rounds", "flags")}
    first = sweep(c, "star", job, [("base",)], **shared)
    cells = sweep(c, "star", job, [(seed,) for seed in range(b["seeds"])], **shared)
    summary = {"starts": {}, "curves": {}}
    for kind in ("under-trained", "early-stopped", "over-trained"):
        records = [r["trained"][r["starts"][kind]] for r in cells.values()]
        summary["starts"][kind] = dict(
            accuracy=spread([r["accuracy"] for r in records]), chosen=[r["starts"][kind] for r in cells.values()],
            train=spread([r["train"]["decision"] for r in records]),
            val=spread([r["val"]["decision"] for r in records]))  # fmt: skip
        for method in ("dpo", "sft"):
            curves = [r["curves"][f"{kind}-{method}"] for r in cells.values()]
            summary["curves"][f"{kind}-{method}"] = [
                {key: spread([curve[i][key] for curve in curves]) for key in ("steps", "accuracy", "decision")}
                for i in range(min(map(len, curves)))]  # fmt: skip
    rows = [dict(seed=r["seed"], curve=name, **point) for r in cells.values() for name, curve in r["curves"].items()
            for point in curve]  # fmt: skip
    stem = publish(c, "star", first | cells, summary, rows)
    figure(stem, [lambda axis, key=key: panel(axis, summary, key) for key in ("accuracy", "decision")])
    for kind, s in summary["starts"].items():
        print(f"{kind:14} accuracy {s['accuracy'][0]:.3f}   decision, NLL: train {s['train'][0]:.3f} "
              f"val {s['val'][0]:.3f}   {s['chosen']}")  # fmt: skip
    for name, curve in summary["curves"].items():
        print(f"{name:18} accuracy " + " ".join(f"{p['steps'][0]:.0f}:{p['accuracy'][0]:.3f}" for p in curve))


def panel(axis, summary, key):
    colours = {"under-trained": "#d1495b", "early-stopped": "#2b7bba", "over-trained": "#777777"}
    for name, curve in summary["curves"].items():
        kind, method = name.rsplit("-", 1)
        axis.plot([p["steps"][0] for p in curve], [p[key][0] for p in curve], "o-" if method == "dpo" else "s:", ms=3,
                  color=colours[kind], label=name)  # fmt: skip
    axis.set(xlabel="optimizer steps from the start", title={"accuracy": "exact match, held-out graphs",
             "decision": "NLL of the decision"}[key])  # fmt: skip
    axis.axhline({"accuracy": 0.5, "decision": np.log(2)}[key], color="#cccccc", lw=1)
    axis.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    entry(main)

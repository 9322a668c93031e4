"""Scaling (targets 1-3, 9, 10; Fig. 2a,b and 5a,b): test error against the number of problems, and data multipliers.

    python experiments/scaling.py --budget cpu

For every spurious rate, seed and size |D|: SFT on the teacher's solutions; pos (RFT: D and the SFT model's own right
solutions); neg (per-step DPO from pos); neg2 (a second round, from neg's own solutions). Each arm picks one of three
epoch counts at every size, on the validation split with seed 0; sft-long has as many optimizer steps as pos, neg and
neg2 together. SFT alone goes on to larger sizes, so that there is a curve on which to read the multipliers off. Beside
the main rate, neg's learning rate, chosen at the main one, overshoots: neg-gentle is neg at a fifth of it (at the main
rate the two are equal on the validation split).
"""

from collections import defaultdict
from math import sqrt

import numpy as np
from lab import Cell, LabConfig, bits, choose, figure, interval, multiplier, publish, resampled, slope, sweep

from rollout import entry, parse

MAIN = 0.2
BUDGETS = {  # sizes of all arms, sizes of SFT alone, rates beside the main one with their sizes, seeds, shares of the
    # middle number of epochs to choose from, Cell's flags
    "smoke": dict(sizes=[16, 32], more=[], rates={0.0: [16]}, seeds=1, pass_at=0, grid=(0.1, 0.2), flags=dict(
        test=12, val=8, samples=4, rollouts=2, negatives=2)),
    "cpu": dict(sizes=[50, 100, 200, 400, 800, 1600], more=[3200, 6400, 12800], seeds=3, pass_at=5, flags={},
                grid=(0.5, 1, 2), rates={r: [100, 200, 400] for r in (0.0, 0.1)}),
    "gpu": dict(sizes=[50, 100, 200, 400, 800, 1600, 3200], more=[6400, 12800, 25600], seeds=5, pass_at=5, flags={},
                grid=(0.5, 1, 2), rates={r: [50, 100, 200, 400, 800, 1600] for r in (0.0, 0.1, 0.3, 0.4)}),
}  # fmt: skip


def cell(folder, rate, seed, size, tuned, full, second, long, pass_at, grid, flags):
    """All arms on one training set. tuned: {arm: its epochs}, empty for the seed that tunes."""
    cell = Cell(folder, limit=size, seed=seed, spurious=rate, **flags)
    scale, picked, arms = min(4, sqrt(800 / size)), {}, {}  # fewer problems, more epochs

    def arm(name, start, middle, steps, examples=(), pairs=()):
        candidates = [tuned[name]] if tuned else [round(middle * scale * x, 2) for x in grid]
        made = {}
        picked[name], folder = choose(cell, name, candidates, lambda folder, epochs: made.update(
            {folder: cell.fit(folder, start, examples, pairs, epochs=epochs)}))  # fmt: skip
        arms[name] = cell.judge(folder, samples=pass_at if full else 0) | dict(steps=steps + made[folder])
        return folder

    sft = arm("sft", cell.c.model, 5, 0, cell.teacher)
    if full:
        rows, drawn = cell.draw(sft)
        own = cell.positives(rows)
        right = np.mean([s["correct"] for row in rows.values() for s in row["samples"]])
        arms["sft"] |= dict(generator_right=round(float(right), 4))
        pos = arm("pos", cell.c.model, 6, 0, cell.teacher + own)
        arms["pos"] |= dict(tokens=drawn, positives=len(own))
        _, pairs, valued = cell.learn(sft, rows)
        total = arms["pos"]["steps"]
        if pairs:
            neg = arm("neg", pos, 3, total, pairs=pairs)
            arms["neg"] |= dict(tokens=drawn + valued, pairs=len(pairs))
        if pairs and second:
            rows, drawn2 = cell.draw(neg, 1)
            _, pairs2, valued2 = cell.learn(neg, rows, 1)
            if pairs2:
                tuned = tuned | {"neg2": picked["neg"]}
                arm("neg2", neg, 3, arms["neg"]["steps"], pairs=pairs2)
                arms["neg2"] |= dict(tokens=drawn + valued + drawn2 + valued2, pairs=len(pairs2))
        elif pairs:
            cell.fit("neg-gentle", pos, pairs=pairs, epochs=picked["neg"], lr=cell.c.neg_lr / 5)
            arms["neg-gentle"] = cell.judge("neg-gentle") | {k: arms["neg"][k] for k in ("steps", "tokens", "pairs")}
        if long:
            steps = max(a["steps"] for a in arms.values())
            cell.fit("sft-long", cell.c.model, cell.teacher, epochs=steps * cell.c.batch / size)
            arms["sft-long"] = cell.judge("sft-long") | dict(steps=steps)
    return dict(rate=rate, seed=seed, size=size, picked=picked, arms=arms)


def summarise(cells, rate):
    """Errors, slopes and multipliers of one spurious rate, each with its bootstrap interval."""
    verdicts = defaultdict(list)
    for (r, _, size), result in cells.items():
        for name, record in result["arms"].items() if r == rate else ():
            verdicts[name, size].append(bits(record["correct"]))
    seeds = max(map(len, verdicts.values()))
    error = resampled({key: np.array(v) for key, v in verdicts.items() if len(v) == seeds})
    sizes = {name: sorted(s for n, s in error if n == name) for name, _ in error}
    out = {}
    for name, ladder in sizes.items():
        both = [s for s in ladder if s in sizes["pos"]]  # slopes over the sizes that all arms share
        slopes = slope(both, np.array([error[name, s] for s in both])) if len(both) > 2 else None
        out[name] = dict(slope=None if slopes is None else [float(slopes[0]), *interval(slopes[1:])], sizes={})
        for s in ladder:
            e = error[name, s]
            record = dict(error=[float(e[0]), *interval(e[1:])])
            if name != "sft":
                curve = np.array([error["sft", n] for n in sizes["sft"]]).T
                read = [multiplier(sizes["sft"], curve[i], s, e[i]) for i in range(len(e))]
                record |= dict(multiplier=[read[0][0], *interval([m for m, _ in read[1:]])], at_least=read[0][1])
                better = 1 - (e - error["sft", s] >= 0)[1:].mean()
                record |= dict(better_than_sft=float(better))
            out[name]["sizes"][s] = record
    return out


def main():
    c = parse(LabConfig, __doc__)
    b = BUDGETS[c.budget]
    plan = {MAIN: (b["sizes"], b["more"])}
    plan |= {r: (sizes, [sizes[-1] * 2**i for i in (1, 2, 3)][: len(b["more"])]) for r, sizes in b["rates"].items()}
    cells = {}
    for first in (True, False):  # seed 0 chooses the epochs, the other seeds take them over
        groups = defaultdict(list)
        for rate, (sizes, more) in plan.items():
            for size in sizes + more:
                for seed in [0] if first else range(1, b["seeds"]):
                    groups[size].append((rate, seed, size))
        work = [key for size in sorted(groups, reverse=True) for key in groups[size]]
        details = {(rate, size): dict(
            tuned={} if first else cells[rate, 0, size]["picked"], full=size in plan[rate][0],
            second=rate == MAIN, long=rate == MAIN and size in (200, 800)) for rate, _, size in work}  # fmt: skip
        cells |= sweep(c, "scaling", job, work, details=details, pass_at=b["pass_at"], grid=b["grid"],
                       flags=b["flags"])  # fmt: skip
    summary = {str(rate): summarise(cells, rate) for rate in plan}
    rows = [dict(rate=r, seed=s, size=n, arm=name, accuracy=a["accuracy"], spurious=a["spurious"], steps=a["steps"],
                 epochs=result["picked"].get(name, ""), tokens=a.get("tokens", 0), pass_at_5=a.get("pass@5", ""))
            for (r, s, n), result in cells.items() for name, a in result["arms"].items()]  # fmt: skip
    stem = publish(c, "scaling", cells, summary, rows)
    figure(stem, [lambda axis, rate=rate: panel(axis, rate, summary[str(rate)]) for rate in sorted(plan)])
    for rate, arms in summary.items():
        for name, arm in arms.items():
            line = " ".join(f"{n}:{r['error'][0]:.3f}" + (f"({'>=' if r['at_least'] else ''}{r['multiplier'][0]:.1f}x)"
                            if "multiplier" in r else "") for n, r in arm["sizes"].items())  # fmt: skip
            print(f"rate {rate} {name:8} slope {arm['slope'] and round(arm['slope'][0], 3)}  {line}")


def job(folder, rate, seed, size, details, **shared):
    return cell(folder, rate, seed, size, **details[rate, size], **shared)


COLOURS = {"sft": "#777777", "sft-long": "#bbbbbb", "pos": "#2b7bba", "neg": "#d1495b", "neg2": "#8c1c2e",
           "neg-gentle": "#e9a15b"}  # fmt: skip
LABELS = {"sft": "SFT", "sft-long": "SFT, as long as neg2", "pos": "pos (RFT)", "neg": "neg (per-step DPO)",
          "neg2": "neg, second round", "neg-gentle": "neg, a fifth of the rate"}  # fmt: skip


def panel(axis, rate, arms):
    for name, arm in arms.items():
        sizes = list(arm["sizes"])
        errors = np.array([r["error"] for r in arm["sizes"].values()])
        label, read = LABELS[name], [(r["multiplier"][0], r["at_least"]) for r in list(arm["sizes"].values())
                                     if "multiplier" in r]  # fmt: skip
        if name == "sft-long":
            axis.plot(sizes, errors[:, 0], "x", color=COLOURS[name], label=label)
            continue
        if read:  # what the arm's data is worth to SFT, at the size where that is least and where it is most
            (least, _), (most, bound) = min(read), max(read)
            label += f": {least:.1f}x to {'≥' if bound else ''}{most:.2g}x"
        axis.plot(sizes, errors[:, 0], "o-", ms=3, lw=1.5, color=COLOURS[name], label=label)
        axis.fill_between(sizes, errors[:, 1], errors[:, 2], color=COLOURS[name], alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", ylim=(0.01, 1), xlabel="training problems |D|", ylabel="test error (greedy)")
    axis.set_title(f"spurious rate {rate}" + (" (control)" if rate == 0 else ""))
    axis.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    entry(main)

"""Scaling (targets 1-3, 9, 10; Fig. 2a,b and 5a,b): test error against the number of problems.

    python experiments/scaling.py --budget cpu

For every spurious rate, seed and size |D|:

    sft         on the teacher's solutions
    pos         RFT: on D and the SFT model's own correct solutions
    neg         per-step DPO from pos, on pos's own mistakes
    neg2        a second round, from neg on neg's own mistakes (at the main rate)
    neg-gentle  neg at a fifth of the learning rate (at the other rates, where neg's overshoots)
    sft-long    SFT with as many optimizer steps as pos, neg and neg2 together

Every arm picks one of three numbers of epochs at each size, on the validation split with seed 0.
SFT alone goes on to larger sizes, for a curve on which to read off how much data an arm is worth.
"""

from collections import defaultdict
from functools import partial
from math import sqrt

import numpy as np
from lab import LabFlags, arithmetic_cell, count_tokens, data_worth, errors_by_size, figure
from lab import plot_errors, publish, share, slope, sweep, verdicts, with_interval, worth_text

from data import parse_flags
from rollout import run_program

MAIN = 0.2  # the main spurious rate
BUDGETS = {
    "smoke": dict(
        sizes=[8, 16],  # of all arms at the main rate
        more=[],  # larger ones, of SFT alone
        rates={0.0: [8]},  # the other rates, with their sizes
        seeds=1,
        grid=(0.1, 0.2),  # shares of an arm's middle number of epochs, to choose from
        flags=dict(test=8, val=4, samples=4, rollouts=2, negatives=2),
    ),
    "cpu": dict(
        sizes=[50, 100, 200, 400, 800, 1600],
        more=[3200, 6400, 12800],
        rates={rate: [100, 200, 400] for rate in (0.0, 0.1)},
        seeds=3,
        grid=(0.5, 1, 2),
        flags=dict(eval_samples=5),  # for pass@5
    ),
    "gpu": dict(
        sizes=[50, 100, 200, 400, 800, 1600, 3200],
        more=[6400, 12800, 25600],
        rates={rate: [50, 100, 200, 400, 800, 1600] for rate in (0.0, 0.1, 0.3, 0.4)},
        seeds=5,
        grid=(0.5, 1, 2),
        flags=dict(eval_samples=5),
    ),
}


def work(folder, rate, seed, size, *, details, grid, flags):
    """All arms on one training set."""
    return train_arms(folder, rate, seed, size, grid, flags, **details[rate, size])


def train_arms(folder, rate, seed, size, grid, flags, *, picked, full, long):
    """picked: {arm: epochs}, by seed 0. full: all arms, not SFT alone. long: sft-long, too."""
    if not full:
        flags = flags | dict(eval_samples=0)
    cell = arithmetic_cell(folder, limit=size, seed=seed, spurious=rate, **flags)
    cell.picked = dict(picked)
    base = cell.c.model
    sft = pick_epochs(cell, "sft", base, cell.teacher, grid, middle=5)
    if full:
        samples = cell.sample(sft)
        own = cell.positives(samples)
        cell.arms["sft"]["generator_right"] = share(verdicts(samples))
        pos = pick_epochs(cell, "pos", base, cell.teacher + own, grid, middle=6)
        cell.arms["pos"] |= dict(tokens=count_tokens(samples), positives=len(own))
        train_rounds(cell, pos, grid, rounds=2 if rate == MAIN else 1)
        if rate != MAIN and "neg" in cell.arms:
            train_gently(cell, pos)
    if long:
        steps = max(record["steps"] for record in cell.arms.values())
        cell.arm("sft-long", base, cell.teacher, epochs=steps * cell.c.batch / size)
    return dict(rate=rate, seed=seed, size=size, picked=cell.picked, arms=cell.arms)


def pick_epochs(cell, arm, start, items, grid, middle):
    """Train an arm with the best number of epochs around `middle`. Returns its folder's name."""
    scale = min(4, sqrt(800 / len(cell.train)))  # fewer problems, more epochs
    candidates = [round(middle * scale * factor, 2) for factor in grid]

    def train(name, epochs):
        return cell.fit(name, start, items, epochs=epochs)

    return cell.pick(arm, candidates, train)


def train_rounds(cell, pos, grid, rounds):
    """neg and neg2, each on the mistakes of the policy before. Steps and tokens add up."""
    policy = pos
    before = cell.arms["pos"]
    for i in range(1, rounds + 1):
        pairs, tokens = cell.own_pairs(policy, i)
        if not pairs:
            return
        arm = "neg"
        if i > 1:
            arm = "neg2"
            cell.picked["neg2"] = cell.picked["neg"]
        policy = pick_epochs(cell, arm, policy, pairs, grid, middle=3)
        record = cell.arms[arm]
        record["steps"] += before["steps"]
        record |= dict(tokens=before["tokens"] + tokens, pairs=len(pairs))
        before = record


def train_gently(cell, pos):
    """neg-gentle: as neg, at a fifth of its learning rate."""
    pairs, _ = cell.own_pairs(pos, 1)
    cell.arm("neg-gentle", pos, pairs, cell.picked["neg"], lr=cell.c.neg_lr / 5)
    for key in ("steps", "tokens", "pairs"):
        cell.arms["neg-gentle"][key] = cell.arms["neg"][key]


# ---------------------------------------------------------------- summary


def summarise(cells):
    """Errors, slopes and multipliers of one spurious rate, each with its bootstrap interval."""
    errors = errors_by_size(cells)
    sizes = defaultdict(list)
    for arm, size in sorted(errors, key=lambda key: key[1]):
        sizes[arm].append(size)
    summary = {}
    for arm in sizes:
        shared = [size for size in sizes[arm] if size in sizes["pos"]]
        slopes = None
        if len(shared) > 2:
            curves = np.array([errors[arm, size] for size in shared])
            slopes = with_interval(slope(shared, curves))
        summary[arm] = dict(slope=slopes, sizes={})
        for size in sizes[arm]:
            error = errors[arm, size]
            record = dict(error=with_interval(error))
            if arm != "sft":
                record |= data_worth(errors, sizes["sft"], arm, size)
                record["better_than_sft"] = share(error[1:] < errors["sft", size][1:])
            summary[arm]["sizes"][size] = record
    return summary


def main():
    c = parse_flags(LabFlags, __doc__)
    b = BUDGETS[c.budget]
    sizes = {MAIN: b["sizes"]} | b["rates"]
    more = {MAIN: b["more"]}
    for rate in b["rates"]:
        larger = [sizes[rate][-1] * factor for factor in (2, 4, 8)]
        more[rate] = larger[: len(b["more"])]
    cells = {}
    for seeds in ([0], range(1, b["seeds"])):  # seed 0 picks the epochs, the others take them over
        keys = []
        details = {}
        for rate in sizes:
            for size in sizes[rate] + more[rate]:
                keys += [(rate, seed, size) for seed in seeds]
                details[rate, size] = dict(
                    picked=cells[rate, 0, size]["picked"] if cells else {},
                    full=size in sizes[rate],
                    long=rate == MAIN and size in (200, 800),
                )
        keys.sort(key=lambda key: -key[2])  # the longest first
        shared = dict(details=details, grid=b["grid"], flags=b["flags"])
        cells |= sweep(c, "scaling", work, keys, **shared)
    summary = {}
    for rate in sizes:
        of_rate = [cell for cell in cells.values() if cell["rate"] == rate]
        summary[str(rate)] = summarise(of_rate)
    stem = publish(c, "scaling", cells, summary, csv_rows(cells.values()))
    figure(stem, [partial(panel, rate=rate, arms=summary[rate]) for rate in sorted(summary)])
    for rate, arms in summary.items():
        for arm, record in arms.items():
            print(f"rate {rate} {arm:10} {text(record)}")


def csv_rows(cells):
    rows = []
    for cell in cells:
        for arm, record in cell["arms"].items():
            row = dict(rate=cell["rate"], seed=cell["seed"], size=cell["size"], arm=arm)
            row |= {key: record[key] for key in ("accuracy", "spurious", "steps")}
            row["epochs"] = cell["picked"].get(arm, "")
            row["tokens"] = record.get("tokens", 0)
            row["pass_at_5"] = record.get("pass@5", "")
            rows.append(row)
    return rows


def text(arm):
    """An arm of the summary as a line."""
    line = ""
    if arm["slope"]:
        line = f"slope {arm['slope'][0]:.3f} "
    for size, record in arm["sizes"].items():
        line += f" {size}: {record['error'][0]:.3f} {worth_text(record)}"
    return line


STYLES = {  # colour and label of an arm
    "sft": ("#777777", "SFT"),
    "sft-long": ("#bbbbbb", "SFT, as long as neg2"),
    "pos": ("#2b7bba", "pos (RFT)"),
    "neg": ("#d1495b", "neg (per-step DPO)"),
    "neg2": ("#8c1c2e", "neg, second round"),
    "neg-gentle": ("#e9a15b", "neg, a fifth of the rate"),
}


def panel(axis, rate, arms):
    for name, arm in arms.items():
        colour, label = STYLES[name]
        records = arm["sizes"]
        if name == "sft-long":
            errors = [record["error"][0] for record in records.values()]
            axis.plot(list(records), errors, "x", color=colour, label=label)
            continue
        if name != "sft":  # worth how much data, where that is least and where it is most
            worth = sorted(records.values(), key=lambda record: record["multiplier"][0])
            label += f": {worth_text(worth[0])} to {worth_text(worth[-1])}"
        plot_errors(axis, records, colour, label)
    axis.set(yscale="log", ylim=(0.01, 1), title=f"spurious rate {rate}")
    axis.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    run_program(main)

"""Credit assignment is what matters (targets 11, 12, 16, 17, 19, 20; Fig. 5c, 7, 10, 11): which pairs, which K.

    python experiments/credit.py --budget cpu

(a) From one pos model and one set of valued solutions: pairs of whole solutions (any, farthest), Algorithm 1 as
printed, pit against continuation, pit against a good step, parts 1 and 2; as many pairs and optimizer steps each, beta
chosen on validation by seed 0. Beside them AWR, and RFT filtered by the advantages of solutions or of steps. (b) The
first pit against the truth, and the accuracy it leads to, for K rollouts a step. (c) Average Q by step index.
"""

import csv
from dataclasses import replace

import numpy as np
from lab import Cell, LabConfig, bits, choose, figure, publish, spread, sweep

from data import judge_steps
from evaluate import compare, q_by_step
from rollout import advantages, entry, make_pairs, parse, sample, to_value

FORMS = ("response", "farthest", "algorithm1", "continuation", "step", "parts12")
BUDGETS = {
    "smoke": dict(seeds=1, size=24, ks=[1, 2], traces=4, k=2, flags=dict(
        test=8, val=6, samples=6, rollouts=2, negatives=2, sft_epochs=4.0)),
    "cpu": dict(seeds=3, size=400, ks=[1, 2, 5, 10, 20], traces=150, k=16, flags=dict(sft_epochs=7.0)),
    "gpu": dict(seeds=5, size=1600, ks=[1, 2, 5, 10, 20, 40], traces=500, k=32, flags=dict(sft_epochs=3.5)),
}  # fmt: skip
BETAS, LOW = (0.05, 0.1, 0.3, 0.5), -0.25  # part 2: a right solution's step that loses a quarter or more
EPOCHS = 4.0  # of every arm that starts from pos


def cell(folder, seed, size, ks, traces, k, tuned, flags):
    cell, arms, picked = Cell(folder, limit=size, seed=seed, **flags), {}, {}
    c, rng = cell.c, np.random.default_rng(seed)
    arms["sft"] = {"steps": cell.fit("sft", c.model, cell.teacher, epochs=c.sft_epochs)} | cell.judge("sft")
    rows, _ = cell.draw("sft")
    own = cell.positives(rows)
    arms["pos"] = {"steps": cell.fit("pos", c.model, cell.teacher + own, epochs=8.0)} | cell.judge("pos")
    weighted, _, _ = cell.learn("sft", rows, loss="awr", scan="full")
    values = cell.values("sft")
    wrong = {i: row for i, row in enumerate(values) if not row["correct"]}
    low = {i: row | {"correct": False} for i, row in enumerate(values)  # part 2: right, but a step costs value
           if row["correct"] and min(advantages(row["values"])) <= LOW}  # fmt: skip

    # (a) equal pairs, equal steps
    policy = cell.policy("sft")
    pairs = {form: make_pairs(form, policy, cell.by_id, rows, wrong, seed, c.negatives) for form in FORMS[:-1]}
    pairs["parts12"] = make_pairs("continuation", policy, cell.by_id, rows, wrong | low, seed, 2 * c.negatives)
    n = min(map(len, pairs.values()))
    for form, found in pairs.items():
        found = [found[i] for i in sorted(rng.permutation(len(found))[:n])]
        arm(cell, arms, picked, tuned, form, lambda name, beta, found=found: cell.fit(
            name, "pos", pairs=found, epochs=EPOCHS, beta=beta))  # fmt: skip
        arms[form] |= dict(pairs=n, found=len(pairs[form]), **movement(cell.folder, f"{form}-{picked[form]:g}"))
    steps = arms["continuation"]["steps"]

    def awr(name, beta):
        again = [replace(e, weights=weights(r, beta)) for e, r in zip(weighted, values, strict=True)]
        return cell.fit(name, "pos", again, epochs=steps * c.batch / len(again), lr=c.neg_lr)

    arm(cell, arms, picked, tuned, "awr", awr)
    worst = np.array([min(advantages(r["values"])) for r in values])
    kept = [replace(e, weights=None) for e, w in zip(weighted, worst, strict=True) if w > np.median(worst)]
    middle = np.median([a for r in values for a in advantages(r["values"])])
    steps_kept = [replace(e, weights=weights(r, None, middle)) for e, r in zip(weighted, values, strict=True)]
    teacher = [replace(e, weights=[1.0] * len(e.response)) for e in cell.teacher]
    for name, examples in (("filtered-responses", cell.teacher + kept), ("filtered-steps", teacher + steps_kept)):
        arms[name] = dict(steps=cell.fit(name, c.model, examples, epochs=8.0), examples=len(examples))
        arms[name] |= cell.judge(name)

    # (b) K
    for count in ks:
        _, found, tokens = cell.learn("sft", rows, into=f"K{count}", rollouts=count)
        arms[f"K{count}"] = dict(pairs=len(found), tokens=tokens, **judged(cell, cell.values("sft", f"K{count}")))
        if found:
            arms[f"K{count}"]["steps"] = cell.fit(f"neg-K{count}", "pos", pairs=found, epochs=EPOCHS)
            arms[f"K{count}"] |= cell.judge(f"neg-K{count}")

    # (c) Q of the steps of the SFT model's own test solutions, under each model
    test = cell.splits["test"][:traces]
    drawing = dict(max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=seed)
    drawn = sample(policy, test, cell.folder / "traces.jsonl", n=1, **drawing)
    names = ["sft", "pos", *(f"{f}-{picked[f]:g}" for f in ("response", "farthest", "algorithm1", "continuation"))]
    q = {name.split("-")[0]: q_by_step(cell.policy(name), test, to_value(test, drawn, 1, 1),
                                       cell.folder / name / "q", k=k, **drawing) for name in names}  # fmt: skip
    return dict(seed=seed, picked=picked, arms=arms, q=q)


def arm(cell, arms, picked, tuned, name, make):
    made = {}
    picked[name], folder = choose(cell, name, [tuned[name]] if tuned else BETAS,
                                  lambda folder, beta: made.update({folder: make(folder, beta)}))  # fmt: skip
    arms[name] = dict(steps=made[folder], beta=picked[name]) | cell.judge(folder)


def weights(row, beta, middle=None):
    """A weight per token: Eq. 4's for `beta`, or 1 for steps of at least the median advantage and 0 for others."""
    steps = advantages(row["values"])
    w = [float(a >= middle) for a in steps] if beta is None else np.minimum(20, np.exp(np.array(steps) / beta)).tolist()
    return [x for x, a, b in zip(w, [0, *row["ends"][:-1]], row["ends"], strict=True) for _ in range(b - a)]


def movement(folder, stage):
    """How far training moved the summed log-probabilities of chosen and rejected."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["stage"] == stage]
    mean = lambda key, part: float(np.mean([float(r[key]) for r in part]))  # noqa: E731
    few = max(1, len(rows) // 10)
    return {f"{key}_moved": round(mean(key, rows[-few:]) - mean(key, rows[:few]), 3) for key in ("chosen", "rejected")}


def judged(cell, rows):
    """Precision: the first pit is a bad step. Recall: it is the step after the last good one, where all was lost."""
    bad, lost = [], []
    for row in rows:
        labels = judge_steps(cell.by_id[row["id"]], row["text"])
        bad.append(labels[row["pit"] - 1] != "good")
        lost.append(row["pit"] == max((i for i, x in enumerate(labels, 1) if x == "good"), default=0) + 1)
    return dict(precision=round(float(np.mean(bad)), 4), recall=round(float(np.mean(lost)), 4), solutions=len(rows))


def job(folder, seed, size, tuned, **shared):
    return cell(folder, seed, size, tuned=tuned, **shared)


def main():
    c = parse(LabConfig, __doc__)
    b = BUDGETS[c.budget]
    shared = dict(ks=b["ks"], traces=b["traces"], k=b["k"], flags=b["flags"])
    cells = sweep(c, "credit", job, [(0, b["size"])], tuned={}, **shared)  # seed 0 chooses beta
    cells |= sweep(c, "credit", job, [(seed, b["size"]) for seed in range(1, b["seeds"])],
                   tuned=cells[0, b["size"]]["picked"], **shared)  # fmt: skip
    summary = {"arms": {}, "q": {}}
    for name in next(iter(cells.values()))["arms"]:
        records = [r["arms"][name] for r in cells.values() if "accuracy" in r["arms"].get(name, {})]
        keys = [k for k in ("accuracy", "spurious", "precision", "recall", "chosen_moved", "rejected_moved", "pairs")
                if records and k in records[0]]  # fmt: skip
        summary["arms"][name] = {key: spread([r[key] for r in records]) for key in keys}
        for other in ("sft", "pos", "response"):
            both = [(bits(r["arms"][other]["correct"]), bits(r["arms"][name]["correct"])) for r in cells.values()
                    if "correct" in r["arms"].get(name, {})]  # fmt: skip
            if both and other != name:
                summary["arms"][name][f"against {other}"] = compare(*map(np.concatenate, zip(*both, strict=True)))
    for name in next(iter(cells.values()))["q"]:
        longest = min(max(s["step"] for s in r["q"][name] if s["solutions"] >= 10 or c.budget == "smoke")
                      for r in cells.values())  # fmt: skip
        summary["q"][name] = [spread([r["q"][name][t]["q"] for r in cells.values()]) for t in range(longest)]
    rows = [dict(seed=r["seed"], arm=name, **{k: v for k, v in a.items() if k != "correct"})
            for r in cells.values() for name, a in r["arms"].items()]  # fmt: skip
    stem = publish(c, "credit", cells, summary, rows)
    figure(stem, [lambda axis: bars(axis, summary), lambda axis: by_k(axis, summary, b["ks"]),
                  lambda axis: by_step(axis, summary)])  # fmt: skip
    for name, s in summary["arms"].items():
        print(f"{name:20}" + "".join(f"  {key} {value[0]:.3f}" for key, value in s.items() if isinstance(value, list)))
    for name, q in summary["q"].items():
        print(f"Q by step, {name:14}" + " ".join(f"{s[0]:.3f}" for s in q))


def bars(axis, summary):
    names = ["sft", "pos", *FORMS, "awr", "filtered-responses", "filtered-steps"]
    s = [summary["arms"][name]["accuracy"] for name in names]
    colours = ["#777777", "#2b7bba"] + ["#d1495b"] * len(FORMS) + ["#e8a33d"] * 3
    axis.barh(names[::-1], [x[0] for x in s][::-1], color=colours[::-1])
    axis.set(xlabel="accuracy", title="equal pairs, equal steps")


def by_k(axis, summary, ks):
    for key, colour in (("precision", "#2b7bba"), ("recall", "#77aadd"), ("accuracy", "#d1495b")):
        y = [summary["arms"][f"K{count}"].get(key, [np.nan])[0] for count in ks]
        axis.plot(ks, y, "o-", ms=3, color=colour, label=key)
    axis.set(xscale="log", xlabel="rollouts a step, K", title="first pit against the truth")
    axis.set_xticks(ks, map(str, ks))
    axis.legend(frameon=False, fontsize=7)


def by_step(axis, summary):
    for name, q in summary["q"].items():
        axis.plot(range(1, len(q) + 1), [x[0] for x in q], "o-", ms=3, label=name)
    axis.set(xlabel="step", ylabel="average Q", title="Q of the SFT model's steps")
    axis.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    entry(main)

"""Credit assignment is what matters (targets 11, 12, 16, 17, 19, 20; Fig. 5c, 7, 10, 11).

    python experiments/credit.py --budget cpu

All from one pos model and one set of its own valued solutions:

(a) Which pairs? Whole solutions (any, farthest), Algorithm 1 as printed, the pit against a
    continuation, the pit against a good step, and parts 1 and 2: as many pairs and optimizer steps
    each, beta chosen on the validation split with seed 0. Beside them AWR (Eq. 4), and RFT from the
    base on solutions or steps filtered by their advantages.
(b) Which K? The first pit against the truth, and the accuracy that it leads to.
(c) The average Q of each step of the SFT model's test solutions, under the models of (a).
"""

from dataclasses import replace

import numpy as np
from lab import LabFlags, against, arithmetic_cell, arm_rows, figure, publish, share, spread
from lab import spreads, sweep

from data import judge_steps, parse_flags
from evaluate import pair_trend, q_by_step
from rollout import advantages, find_first_pit, value_steps, make_pairs, run_program
from rollout import sample, solutions_to_value
from train import awr_weights

FORMS = ("response", "farthest", "algorithm1", "continuation", "step", "parts12")
BUDGETS = {
    "smoke": dict(
        seeds=1,
        size=16,
        betas=[0.1, 0.3],
        ks=[1, 2],
        traces=2,  # test problems of (c),
        k=2,  # and its K
        flags=dict(test=6, val=4, samples=4, rollouts=2, negatives=2, sft_epochs=4.0),
    ),
    "cpu": dict(
        seeds=3,
        size=400,
        betas=[0.05, 0.1, 0.3, 0.5],
        ks=[1, 2, 5, 10, 20],
        traces=150,
        k=16,
        flags=dict(sft_epochs=7.0),
    ),
    "gpu": dict(
        seeds=5,
        size=1600,
        betas=[0.05, 0.1, 0.3, 0.5],
        ks=[1, 2, 5, 10, 20, 40],
        traces=500,
        k=32,
        flags=dict(sft_epochs=3.5),
    ),
}
LOW = -0.25  # part 2: a correct solution with a step that loses a quarter of the value or more
EPOCHS = 4.0  # of every arm that starts from pos


def work(folder, seed, size, *, picked, betas, ks, traces, k, flags):
    cell = arithmetic_cell(folder, limit=size, seed=seed, **flags)
    cell.picked = dict(picked)
    base = cell.c.model
    cell.arm("sft", base, cell.teacher, cell.c.sft_epochs)
    own = cell.positives(cell.sample("sft"))
    cell.arm("pos", base, cell.teacher + own, 8.0)
    samples = cell.sample("pos", 1)
    solutions, _ = cell.value("pos", samples, 1, scan="full", correct=cell.c.keep)
    train_forms(cell, samples, solutions, betas)
    train_awr(cell, solutions, betas)
    train_filtered(cell, solutions)
    for count in ks:
        train_with_k(cell, samples, count)
    q = q_under_all(cell, traces, k)
    return dict(seed=seed, picked=cell.picked, arms=cell.arms, q=q)


# ---------------------------------------------------------------- (a) which pairs


def train_forms(cell, samples, solutions, betas):
    """One arm for each form of pairs: equal pairs, equal steps."""
    policy = cell.policy("pos", 1)
    both_parts = [s for s in solutions if not s.correct] + part_two(cell, policy, solutions)
    found = {}
    for form in FORMS[:-1]:
        found[form] = make_pairs(form, policy, cell.by_id, samples, solutions, cell.c.seed)
    found["parts12"] = make_pairs(
        "continuation", policy, cell.by_id, samples, both_parts, cell.c.seed
    )
    rng = np.random.default_rng(cell.c.seed)
    n = min(map(len, found.values()))
    for form in FORMS:
        kept = sorted(rng.permutation(len(found[form]))[:n])
        pairs = [found[form][i] for i in kept]

        def train(name, beta, pairs=pairs):
            return cell.fit(name, "pos", pairs, epochs=EPOCHS, beta=beta)

        name = cell.pick(form, betas, train)
        cell.arms[form] |= dict(beta=cell.picked[form], pairs=n, found=len(found[form]))
        cell.arms[form] |= shifts(cell.folder, name)


def part_two(cell, policy, solutions):
    """Algorithm 1, part 2: correct solutions with a step that costs value, as if it were a pit."""
    low = []
    for s in solutions:
        if s.correct and min(advantages(s)) <= LOW:
            low.append(replace(s, correct=False, first_pit=find_first_pit(s.q_values)))
    prompts = []
    budgets = []
    for s in low:
        prefix = s.through_step(s.first_pit - 1)
        prompts.append(policy.prompt(cell.by_id[s.id]) + prefix)
        budgets.append(policy.sampling.max_new_tokens - len(prefix))
    # the same continuations that the values come from; a correct solution does not keep them
    continuations = policy.generate(prompts, cell.c.rollouts, max_new_tokens=budgets)
    for s, ways in zip(low, continuations, strict=True):
        prefix = s.through_step(s.first_pit - 1)
        problem = cell.by_id[s.id]
        s.continuations = []
        for ids in ways:
            if policy.judge(prefix + ids, problem)["correct"]:
                s.continuations.append(ids)
    return low


def shifts(folder, stage):
    """How far training moved the summed log-probabilities of chosen and rejected."""
    moved = pair_trend(folder / "metrics.csv", stage)
    return {
        f"{side}_moved": round(moved[side][1] - moved[side][0], 3)
        for side in ("chosen", "rejected")
    }


def train_awr(cell, solutions, betas):
    """Eq. 4 on all valued solutions, for as many steps as the pairs get."""
    steps = cell.arms["continuation"]["steps"]
    epochs = steps * cell.c.batch / len(solutions)

    def train(name, beta):
        weighted = [cell.example(s.id, s.ids, awr_weights(s, beta)) for s in solutions]
        return cell.fit(name, "pos", weighted, epochs=epochs, lr=cell.c.neg_lr)

    cell.pick("awr", betas, train)
    cell.arms["awr"]["beta"] = cell.picked["awr"]


def train_filtered(cell, solutions):
    """RFT on D and the better half of the valued solutions, or of their steps."""
    worst = [min(advantages(s)) for s in solutions]
    responses = list(cell.teacher)
    for s, least in zip(solutions, worst, strict=True):
        if least > np.median(worst):
            responses.append(cell.example(s.id, s.ids))
    # one batch has weights or has none
    steps = [replace(e, weights=[1.0] * len(e.response)) for e in cell.teacher]
    middle = np.median([a for s in solutions for a in advantages(s)])
    for s in solutions:
        weights = []
        for i, advantage in enumerate(advantages(s), 1):
            weights += [float(advantage >= middle)] * len(s.step(i))
        steps.append(cell.example(s.id, s.ids, weights))
    for arm, examples in (("filtered-responses", responses), ("filtered-steps", steps)):
        cell.arm(arm, cell.c.model, examples, 8.0)
        cell.arms[arm]["examples"] = len(examples)


# ---------------------------------------------------------------- (b) which K, (c) Q by step


def train_with_k(cell, samples, k):
    """Pits from k continuations a step: how often they are right, and what they lead to."""
    solutions, tokens = cell.value("pos", samples, 1, k=k, into=f"K{k}")
    seed = cell.c.seed
    pairs = make_pairs("continuation", cell.base, cell.by_id, samples, solutions, seed)
    record = dict(pairs=len(pairs), tokens=tokens) | pits_against_truth(cell, solutions)
    if pairs:
        record["steps"] = cell.fit(f"neg-K{k}", "pos", pairs, epochs=EPOCHS)
        record |= cell.judge(f"neg-K{k}")
    cell.arms[f"K{k}"] = record


def pits_against_truth(cell, solutions):
    """Precision: the first pit is a bad step. Recall: it is the step after the last good one, where
    all was lost."""
    bad = []
    lost = []
    for s in solutions:
        labels = judge_steps(cell.by_id[s.id], s.text)
        good = [i for i, label in enumerate(labels, 1) if label == "good"]
        bad.append(s.first_pit not in good)
        lost.append(s.first_pit == max(good, default=0) + 1)
    return dict(precision=share(bad), recall=share(lost), solutions=len(solutions))


def q_under_all(cell, traces, k):
    """{arm: average Q by step} of the SFT model's solutions of `traces` test problems."""
    problems = cell.splits["test"][:traces]
    by_id = {problem.id: problem for problem in problems}
    sft = cell.policy("sft")
    samples = sample(sft, problems, cell.folder / "traces.jsonl", n=1)
    folders = dict(sft="sft", pos="pos")
    for form in ("response", "farthest", "algorithm1", "continuation"):
        folders[form] = f"{form}-{cell.picked[form]:g}"  # as of Cell.pick
    q = {}
    for arm, name in folders.items():
        solutions = solutions_to_value(sft, problems, samples, wrong=1, correct=1)
        path = cell.folder / name / "q_values.jsonl"
        value_steps(cell.policy(name), by_id, solutions, path, k=k, scan="full")
        q[arm] = q_by_step(solutions)
    return q


# ---------------------------------------------------------------- summary


NUMBERS = "accuracy spurious precision recall chosen_moved rejected_moved pairs".split()


def summarise(cells, least_solutions):
    """least_solutions: of an average Q."""
    summary = {"arms": {}, "q": {}}
    for arm in cells[0]["arms"]:
        records = [cell["arms"][arm] for cell in cells if arm in cell["arms"]]
        summary["arms"][arm] = spreads(records, NUMBERS)
        for other in ("sft", "pos", "response"):
            if arm != other:
                summary["arms"][arm][f"against {other}"] = against(cells, arm, other)
    for arm in cells[0]["q"]:
        curves = []
        for cell in cells:
            rows = [row for row in cell["q"][arm] if row["solutions"] >= least_solutions]
            curves.append([row["q"] for row in rows])
        summary["q"][arm] = [spread(q) for q in zip(*curves, strict=False)]
    return summary


def main():
    c = parse_flags(LabFlags, __doc__)
    b = BUDGETS[c.budget]
    shared = {key: b[key] for key in ("betas", "ks", "traces", "k", "flags")}
    first = (0, b["size"])  # seed 0 picks beta, the others take it over
    cells = sweep(c, "credit", work, [first], picked={}, **shared)
    others = [(seed, b["size"]) for seed in range(1, b["seeds"])]
    if others:
        cells |= sweep(c, "credit", work, others, picked=cells[first]["picked"], **shared)
    records = list(cells.values())
    summary = summarise(records, least_solutions=1 if c.budget == "smoke" else 10)
    stem = publish(c, "credit", cells, summary, arm_rows(records))
    panels = [
        lambda axis: forms_panel(axis, summary),
        lambda axis: k_panel(axis, summary, b["ks"]),
        lambda axis: q_panel(axis, summary),
    ]
    figure(stem, panels)
    for arm, numbers in summary["arms"].items():
        means = [f"{key} {x[0]:.3f}" for key, x in numbers.items() if isinstance(x, list)]
        print(f"{arm:20} {'  '.join(means)}")
    for arm, q in summary["q"].items():
        print(f"Q by step, {arm:14} {' '.join(f'{x[0]:.3f}' for x in q)}")


def forms_panel(axis, summary):
    colours = {"sft": "#777777", "pos": "#2b7bba"}
    colours |= {form: "#d1495b" for form in FORMS}
    colours |= {arm: "#e8a33d" for arm in ("awr", "filtered-responses", "filtered-steps")}
    names = list(colours)
    names.reverse()  # barh begins at the bottom
    for name in names:
        axis.barh(name, summary["arms"][name]["accuracy"][0], color=colours[name])
    axis.set(xlabel="accuracy", title="equal pairs, equal steps")


def k_panel(axis, summary, ks):
    for key, colour in dict(precision="#2b7bba", recall="#77aadd", accuracy="#d1495b").items():
        arms = [summary["arms"][f"K{k}"] for k in ks]
        means = [arm.get(key, [np.nan])[0] for arm in arms]
        axis.plot(ks, means, "o-", ms=3, color=colour, label=key)
    axis.set(xscale="log", xlabel="continuations a step, K", title="first pit against the truth")
    axis.set_xticks(ks, map(str, ks))
    axis.legend(frameon=False, fontsize=7)


def q_panel(axis, summary):
    for name, q in summary["q"].items():
        steps = range(1, len(q) + 1)
        means = [mean for mean, _, _ in q]
        axis.plot(steps, means, "o-", ms=3, label=name)
    axis.set(xlabel="step", ylabel="average Q", title="Q of the SFT model's steps")
    axis.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    run_program(main)

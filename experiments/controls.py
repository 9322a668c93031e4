"""What do own data, negatives, step credit and the pit each earn? A table of arms, with what each
of them sampled (claims 1-12, 16, 17, 19, 20).

    python experiments/controls.py --budget cpu
    python experiments/controls.py --budget cpu --hours 2     # and go on another day

A cell is a training set of the built-in task: a rate e of spurious steps, a number of problems, a
seed. sft samples the problems for pos, and pos samples them for everyone else. An arm is a row of
ALL: where it starts and what it is trained on. Each has four tries of a learning rate and a number
of epochs; seed 0 chooses on the validation split, and the other seeds take over what it chose.

The first figure is a dose and its effect: x, the share of pos's right samples that hold a wrong
step; y, how far neg is ahead of positives asked again for as many sampled tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from lab import Cell, LabFlags, arithmetic_cell, bits, count_tokens, data_worth, errors_by_size
from lab import figure, publish, resampled, share, slope, spreads, sweep, verdicts
from lab import with_interval

from data import judge_steps, parse_flags
from evaluate import count_spurious, q_by_step
from model import token_logps
from rollout import Example, Pair, advantages, correct_continuations
from rollout import first_other, make_pairs, run_program, sample, solutions_to_value, value_steps
from train import luck, weighted_example

# ---------------------------------------------------------------- what a policy's samples gave


@dataclass
class Own:
    """What a policy sampled of its training problems. Each part is made when it is first asked for,
    then it lies on disk. It comes with the number of tokens that it took, those of the samples
    before it included."""

    cell: Cell
    name: str  # the policy's
    i: int  # its round, which has random numbers of its own

    def policy(self):
        return self.cell.policy(self.name, self.i)

    def samples(self):
        samples = self.cell.sample(self.name, self.i)
        return samples, count_tokens(samples)

    def valued(self, k=None):
        """Wrong samples, their steps valued up to the first pit by k continuations each."""
        return self.value(k=k, into=f"K{k}" if k else "")

    def fully_valued(self):
        """Two wrong samples and a right one of each problem, all of their steps valued."""
        return self.value(wrong=2, correct=1, k=4, scan="full", into="full")

    def right_valued(self):
        """Eight right samples of each problem, all of their steps valued."""
        return self.value(wrong=0, correct=8, k=4, scan="full", into="right")

    def value(self, **how):
        samples, tokens = self.samples()
        solutions, more = self.cell.value(self.name, samples, self.i, **how)
        return solutions, tokens + more

    def many_samples(self):
        """Eight times as many samples."""
        samples = self.cell.sample(self.name, self.i, 8 * self.cell.c.samples)
        return samples, count_tokens(samples)

    def more_samples(self, tokens=0):
        """Samples alone, for as many tokens as `valued` took, or for so many."""
        tokens = tokens or self.valued()[1]
        n = round(self.cell.c.samples * tokens / self.samples()[1])
        samples = self.cell.sample(self.name, self.i, n)
        return samples, count_tokens(samples)

    def pairs(self, form, solutions, samples=None):
        cell = self.cell
        samples = samples or self.samples()[0]
        return make_pairs(form, cell.base, cell.by_id, samples, solutions, cell.c.seed)

    def random(self, s):
        """Random numbers of a solution."""
        return np.random.default_rng([self.cell.c.seed, s.sample, *s.ids])


# ---------------------------------------------------------------- what the arms are trained on

# Each of these takes the Own of the policy that an arm starts from, or learns from, and returns
# (Examples or Pairs, tokens sampled for them).


def first_pits(own, form="continuation", k=None):
    """Pairs of a form, from the first pits of wrong samples."""
    solutions, tokens = own.valued(k)
    return own.pairs(form, solutions), tokens


def chosen_alone(own):
    """The chosen texts of the same pairs, to imitate: what does the rejected side add?"""
    pairs, tokens = first_pits(own)
    return [Example(pair.id, pair.prompt, pair.chosen) for pair in pairs], tokens


def other_steps(own):
    """The same pairs with another step of the wrong solution in the pit's place: is it the pit that
    matters?"""
    solutions, tokens = own.valued()
    pairs = {}
    for s in solutions:
        for pair in own.pairs("continuation", [s]):  # one, or none
            others = [s.step(i) for i in range(1, len(s.ends) + 1) if s.step(i) != pair.rejected]
            other = others[own.random(s).integers(len(others))] if others else pair.chosen
            if first_other([pair.chosen], other, own.cell.base) is not None:
                pairs[repr(pair.sequence)] = replace(pair, rejected=other)
    return list(pairs.values()), tokens


def earlier_steps(own):
    """A random step before the pit, if there is one, from its own prefix, against a correct way to
    go on there."""
    solutions, tokens = own.valued()
    places = [(s, own.random(s).integers(1, s.first_pit)) for s in solutions if s.first_pit > 1]
    return pairs_at(own, places, own.cell.c.rollouts), tokens


def pairs_at(own, places, k):
    """Pairs at other steps than pits: of each (solution, step) that step is rejected, against a
    correct way to go on from its prefix."""
    cell = own.cell
    counts = {s.prefix(i - 1): 0 for s, i in places}
    # the k continuations that these prefixes were valued with, once more: nothing new is sampled
    found = correct_continuations(own.policy(), cell.by_id, counts, k)
    pairs = {}
    for s, i in places:
        prefix = s.through_step(i - 1)
        ways = sorted(found[s.prefix(i - 1)], key=len)
        chosen = first_other(ways, s.step(i), cell.base)
        if chosen is not None:
            prompt = cell.base.prompt(cell.by_id[s.id]) + prefix
            pair = Pair(s.id, "another step", i, prompt, chosen, s.step(i))
            pairs.setdefault(repr(pair.sequence), pair)
    return list(pairs.values())


def whole_solutions(own, form="response", more=True):
    """Right against wrong solutions, without values: what does the credit of a step add?"""
    samples, tokens = own.more_samples() if more else own.samples()
    wrong = own.cell.c.negatives * (2 if more else 1)
    solutions = solutions_to_value(own.policy(), own.cell.train, samples, wrong=wrong)
    for s in solutions:
        s.first_pit = len(s.ends)
    return own.pairs(form, solutions, samples), tokens


def both_parts(own):
    """Algorithm 1's parts 1 and 2: in a right solution, too, a step that loses a quarter of the
    value or more is rejected. (make_pairs would leave it out: a right solution goes on there.)"""
    part_1, tokens = part_one(own)
    places = []
    for s in own.fully_valued()[0]:
        if s.correct and min(advantages(s)) <= -0.25:
            places.append((s, 1 + int(np.argmin(advantages(s)))))
    return part_1 + pairs_at(own, places, 4), tokens


def part_one(own):
    """Pairs of the wrong ones of the solutions that are valued in full."""
    solutions, tokens = own.fully_valued()
    return own.pairs("continuation", [s for s in solutions if not s.correct]), tokens


def positives(own, keep=4, more=True):
    """Own right solutions, the most diverse of each problem."""
    samples, tokens = own.more_samples() if more else own.samples()
    return own.cell.positives(samples, keep), tokens


def with_teacher(own, **how):
    """The same beside the teacher's solutions, to train the base on."""
    items, tokens = positives(own, **how)
    return own.cell.teacher + items, tokens


def own_alone(own, keep):
    """At most so many own right solutions of each problem, without the teacher's."""
    samples, tokens = own.many_samples()
    return own.cell.positives(samples, keep), tokens


def teachers_alone(own):
    """The teacher's solutions of the problems of which there are own ones."""
    items, tokens = own_alone(own, 1)
    solved = {item.id for item in items}
    return [item for item in own.cell.teacher if item.id in solved], tokens


def with_inserted(own, dose, harmless=False):
    """One own right solution of each problem, in which stand `dose` more lines on average: first
    pits of wrong samples, or lines that change nothing."""
    cell = own.cell
    steps = {}
    for s in own.valued()[0]:
        if s.first_pit < len(s.ends):  # no answers
            steps.setdefault(s.id, []).append(cell.base.text(s.step(s.first_pit)).strip())
    items, tokens = own_alone(own, 1)
    examples = []
    for item in items:
        rng = np.random.default_rng([cell.c.seed, *item.response])
        *lines, answer = cell.base.text(item.response).split("\n")
        for _ in range(int(dose + rng.random())):
            if not lines or item.id not in steps:
                break
            at = rng.integers(1, len(lines) + 1)
            line = rng.choice(steps[item.id])
            if harmless:
                total = lines[at - 1].rsplit(" ", 1)[-1]
                line = f"{total} + 0 = {total}"
            lines.insert(at, line)
        problem = replace(cell.by_id[item.id], solution="\n".join([*lines, answer]))
        examples.append(cell.example(item.id, cell.base.solution(problem)))
    return examples, tokens


def filtered(own):
    """Per-step RFT: D, and as many own right solutions as RFT has, those whose worst step loses
    least."""
    solutions, tokens = own.right_valued()
    n = len(own.cell.positives(own.samples()[0]))
    best = sorted(solutions, key=lambda s: -min(advantages(s)))[:n]
    return own.cell.teacher + [own.cell.example(s.id, s.ids) for s in best], tokens


def weighted_by_advantage(own):
    """AWR (Eq. 4)."""
    solutions, tokens = own.fully_valued()
    cell = own.cell
    weigh = partial(weighted_example, cell.base, beta=cell.c.beta)
    return [weigh(cell.by_id[s.id], s) for s in solutions], tokens


def step_credit(own):
    """Signed weights for a policy gradient: the advantage of each token's step."""
    solutions, tokens = own.fully_valued()
    items = []
    for s in solutions:
        weights = []
        for i, advantage in enumerate(advantages(s), 1):
            weights += [advantage] * len(s.step(i))
        items.append(own.cell.example(s.id, s.ids, weights))
    return items, tokens


def outcome_credit(own):
    """The same with the outcome of the solution minus the problem's mean V instead. As many tokens;
    a few samples stand for all of a problem: its right ones weigh V(1 - V), its wrong ones, too."""
    samples, tokens = own.more_samples(own.fully_valued()[1])
    n = own.cell.c.negatives
    solutions = solutions_to_value(own.policy(), own.cell.train, samples, wrong=n, correct=n)
    kept = Counter((s.id, s.correct) for s in solutions)
    items = []
    for s in solutions:
        weight = s.value * (1 - s.value) / kept[s.id, s.correct]
        if weight:
            weights = [weight if s.correct else -weight] * len(s.ids)
            items.append(own.cell.example(s.id, s.ids, weights))
    return items, tokens


def policy_gradient(start, model, examples, c):
    """A loss: -sum of w_t log pi(y_t), in which a negative w_t fades as the policy leaves what
    `start` sampled (TOPR's taper, arXiv 2503.14286, here token by token)."""
    sequences = [example.sequence for example in examples]
    logps = token_logps(model, sequences)
    with torch.no_grad():
        ratio = (logps - token_logps(start, sequences)).exp()
    weights = [w for example in examples for w in example.weights]
    weights = torch.tensor(weights, device=logps.device)
    taper = torch.where(weights < 0, ratio.clamp(max=1), 1.0)
    return -(weights * taper * logps).sum(), {"nll": -logps.detach().sum()}


# ---------------------------------------------------------------- the arms

TRIES = {  # (learning rate, epochs) by what is trained
    "base": [(5e-4, 5.0), (5e-4, 7.0), (5e-4, 10.0), (5e-4, 14.0)],
    "examples": [(3e-5, 2.0), (1e-4, 2.0), (3e-4, 2.0), (1e-4, 4.0)],
    "pairs": [(1e-5, 3.0), (3e-5, 3.0), (1e-4, 3.0), (3e-5, 6.0)],
    "by heart": [(5e-4, 60.0)],
}


@dataclass
class Arm:
    own: str  # whose samples it learns from
    items: Callable
    start: str = ""  # where it starts; empty: from that policy itself
    tries: str = "pairs"  # which of TRIES
    flags: dict = field(default_factory=dict)  # of train.py
    signed: bool = False  # a policy gradient


RFT = Arm("sft", partial(with_teacher, more=False), "base", "base")
CORE = {
    "pos": RFT,
    "neg": Arm("pos", first_pits),
    "pos again": Arm("pos", positives, tries="examples"),
    "chosen alone": Arm("pos", chosen_alone, tries="examples"),
    "whole": Arm("pos", whole_solutions),
}
CONTROLS = CORE | {
    "neg, nll 0.3": Arm("pos", first_pits, flags=dict(nll=0.3)),
    "other step": Arm("pos", other_steps),
    "earlier step": Arm("pos", earlier_steps),
    "whole, half": Arm("pos", partial(whole_solutions, more=False)),
    "again from base": Arm("pos", partial(with_teacher, keep=8), "base", "base"),
    "neg2": Arm("neg", first_pits),
    "pos a third time": Arm("pos again", positives, tries="examples"),
    "neg on pos again": Arm("pos again", first_pits),
}
ALL = CONTROLS | {
    "outcome pg": Arm("pos", outcome_credit, signed=True),
    "step pg": Arm("pos", step_credit, signed=True),
    "awr": Arm("pos", weighted_by_advantage, tries="examples"),
    "part 1": Arm("pos", part_one),
    "parts 1, 2": Arm("pos", both_parts),
    "algorithm 1": Arm("pos", partial(first_pits, form="algorithm1")),
    "step by step": Arm("pos", partial(first_pits, form="step")),
    "farthest": Arm("pos", partial(whole_solutions, form="farthest", more=False)),
    "per-step RFT": Arm("sft", filtered, "base", "base"),
    # One's own right solutions: how many, and with which steps.
    "one teacher's": Arm("sft", teachers_alone, "base", "base"),
    "own 1": Arm("sft", partial(own_alone, keep=1), "base", "base"),
    "own 2": Arm("sft", partial(own_alone, keep=2), "base", "base"),
    "own 4": Arm("sft", partial(own_alone, keep=4), "base", "base"),
    "own 8": Arm("sft", partial(own_alone, keep=8), "base", "base"),
    "own 16": Arm("sft", partial(own_alone, keep=16), "base", "base"),
    "pits in 0.1": Arm("sft", partial(with_inserted, dose=0.1), "base", "base"),
    "pits in 0.3": Arm("sft", partial(with_inserted, dose=0.3), "base", "base"),
    "pits in 1": Arm("sft", partial(with_inserted, dose=1), "base", "base"),
    "harmless in 1": Arm("sft", partial(with_inserted, dose=1, harmless=True), "base", "base"),
    "pits in 0.1, neg": Arm("pits in 0.1", first_pits),
    "pits in 0.3, neg": Arm("pits in 0.3", first_pits),
    "pits in 1, neg": Arm("pits in 1", first_pits),
    "K 1": Arm("pos", partial(first_pits, k=1)),
    "K 3": Arm("pos", partial(first_pits, k=3)),
    "K 20": Arm("pos", partial(first_pits, k=20)),
}


# Positives that are right by memory, the paper's own cause of spurious steps in them: few problems,
# and so many epochs that samples of them repeat the teacher, whatever it wrote.
BY_HEART = {
    "pos by heart": Arm("sft by heart", partial(with_teacher, more=False), "base", "by heart"),
    "neg by heart": Arm("pos by heart", first_pits),
    "again by heart": Arm("pos by heart", positives, tries="examples"),
}
# Left out by the tests: as others.
ALIKE = (
    "neg, nll 0.3",
    "whole, half",
    "algorithm 1",
    "step by step",
    "farthest",
    "K 3",
    "K 20",
    "part 1",
    "awr",
    "pos a third time",
    "neg on pos again",
    "own 2",
    "own 4",
    "own 8",
    "own 16",
    "pits in 0.1",
    "pits in 1",
    "pits in 0.1, neg",
    "pits in 0.3, neg",
    "pits in 1, neg",
    "neg by heart",
    "again by heart",
    "neg2",
    "again from base",
    "one teacher's",
)
SMOKE = {name: arm for name, arm in (ALL | BY_HEART).items() if name not in ALIKE}
SETS = dict(ladder={}, core=CORE, controls=CONTROLS, all=ALL, heart=CORE | BY_HEART, smoke=SMOKE)
MAIN = 0.2  # the rate at which data is counted
PARTS = [  # one after the other: (rate, problems, arms)
    [(0.2, 200, "all"), (0.3, 200, "core"), (0.1, 200, "core"), (0.0, 200, "core")],
    [(0.2, 100, "controls"), (0.2, 400, "controls"), (0.25, 200, "core"), (0.2, 50, "heart")],
    [(0.3, 400, "core"), (0.25, 400, "core"), (0.1, 400, "core"), (0.0, 400, "core")],
    [(0.2, 800, "ladder"), (0.2, 1600, "ladder"), (0.2, 3200, "ladder"), (0.4, 400, "core")],
]
BUDGETS = {
    "smoke": dict(
        parts=[[(0.2, 4, "smoke"), (0.2, 6, "ladder")]],
        seeds=1,
        shared=dict(
            tries={kind: tries[:1] for kind, tries in TRIES.items()},
            traces=1,  # test problems whose steps are valued under every arm
            flags=dict(
                test=4, val=2, samples=4, rollouts=2, negatives=1, eval_samples=2, max_new_tokens=48
            ),
        ),
    ),
    "cpu": dict(
        parts=PARTS,
        seeds=4,
        shared=dict(tries=TRIES, traces=100, flags=dict(test=600, eval_samples=8)),
    ),
    "gpu": dict(
        parts=PARTS,
        seeds=10,
        shared=dict(tries=TRIES, traces=400, flags=dict(test=2000, eval_samples=8)),
    ),
}


def work(folder, rate, size, seed, *, arms, picked, tries, traces, flags):
    """The cell of one training set. arms: {(rate, size): a key of SETS}. picked: {(rate, size):
    {arm: the rate and the epochs that seed 0 chose}}. tries: those of an arm, like TRIES."""
    cell = arithmetic_cell(folder, limit=size, seed=seed, spurious=rate, **flags)
    cell.picked = dict(picked.get((rate, size), {}))
    train_sft(cell, tries["base"])
    result = dict(rate=rate, size=size, seed=seed, picked=cell.picked, arms=cell.arms)
    todo = SETS[arms[rate, size]]
    if not todo:  # SFT's alone, for its ladder
        return result
    if "pos by heart" in todo:
        train_sft(cell, tries["by heart"], "sft by heart")
    for name, arm in todo.items():
        train_arm(cell, name, arm, tries)
    for name in cell.arms:
        cell.arms[name] |= look_at(cell, name, traces)
    for name in ("pos", "pos by heart"):
        if name in cell.arms:
            result[name] = quality(own_of(cell, name))
    if "own 1" in cell.arms:
        own = own_of(cell, "sft")
        for name, items in (("teacher", teachers_alone(own)), ("own", own_alone(own, 1))):
            result.setdefault("nll", {})[name] = likelihood(cell, items[0])
    if "pos" in cell.arms and own_of(cell, "pos").valued()[0]:
        result["pits"] = pits(cell, own_of(cell, "pos"))
    return result


def own_of(cell, name):
    """What an arm samples: sft and pos with random numbers of their own, all others with others."""
    return Own(cell, cell.names[name], dict(sft=0, pos=1).get(name, 2))


def train_sft(cell, tries, name="sft"):
    cell.pick(name, "base", cell.teacher, tries)
    cell.arms[name]["tokens"] = 0


def train_arm(cell, name, arm, tries):
    """Train an arm and add what it took to its record: sampled tokens and optimizer steps, those of
    the policies before it included."""
    before = cell.arms.get(arm.own)
    if before is None:
        return  # its policy found nothing to learn from
    items, tokens = arm.items(own_of(cell, arm.own))
    if not items:
        return
    start = arm.start or arm.own
    loss = None
    if arm.signed:
        loss = partial(policy_gradient, cell.policy(cell.names[start]).model)
    cell.pick(name, start, items, tries[arm.tries], loss=loss, **arm.flags)
    record = cell.arms[name]
    record["tokens"] = before["tokens"] + tokens
    record["steps"] += before["steps"]
    record["items"] = len(items)


# ---------------------------------------------------------------- what is measured


def look_at(cell, name, traces):
    """Luck of an arm's right test samples, and Q of the first steps of sft's solutions."""
    test = cell.splits["test"]
    folder = cell.folder / cell.names[name] / "test"
    record = {}
    if cell.c.eval_samples:  # judge has drawn them
        drawn = sample(cell.base, test, folder / "samples.jsonl", cell.c.eval_samples)
        record["luck"] = round(luck(test, drawn), 4)
    few = test[:traces]
    path = cell.folder / cell.names["sft"] / "test" / "greedy.jsonl"
    solved = sample(cell.base, few, path, 1, temperature=0)
    solutions = solutions_to_value(cell.base, few, solved, wrong=1, correct=1)
    policy = cell.policy(cell.names[name])
    by_id = {problem.id: problem for problem in few}
    value_steps(policy, by_id, solutions, folder / "values.jsonl", k=cell.c.rollouts, scan="full")
    record["q"] = [round(row["q"], 4) for row in q_by_step(solutions)[:4]]
    return record


def quality(own):
    """What share of a policy's samples of its training problems is right, what share of these by
    luck, and how many spurious steps they hold; what share is right of problems never seen."""
    cell = own.cell
    samples, _ = own.samples()
    spurious = []
    for problem in cell.train:
        texts = [s["text"] for s in samples[problem.id] if s["correct"]]
        spurious += [count_spurious(problem, text) for text in texts]
    path = cell.folder / own.name / "unseen.jsonl"
    unseen = sample(own.policy(), cell.splits["val"][:100], path, cell.c.samples)
    return dict(
        right=share(verdicts(samples)),
        luck=round(float(luck(cell.train, samples)), 4),
        spurious=share(spurious or [0]),
        right_unseen=share(verdicts(unseen)),
    )


@torch.no_grad()
def likelihood(cell, examples):
    """NLL a token of solutions under the base."""
    return -token_logps(cell.base.model, [example.sequence for example in examples]).mean().item()


def pits(cell, own):
    """{K: the first pits from K continuations against the truth}. Precision: a pit is a bad step.
    Recall: it is the step after the last good one, where all was lost."""
    found = {}
    for k in (None, 1, 3, 20):
        if k and f"K {k}" not in cell.arms:
            continue
        bad = []
        lost = []
        for s in own.valued(k)[0]:
            labels = judge_steps(cell.by_id[s.id], s.text)
            good = [i for i, label in enumerate(labels, 1) if label == "good"]
            bad.append(s.first_pit not in good)
            lost.append(s.first_pit == max(good, default=0) + 1)
        found[k or cell.c.rollouts] = dict(precision=share(bad), recall=share(lost))
    return found


# ---------------------------------------------------------------- summary

DOSE = "negatives, at equal tokens"  # the first figure
QUESTIONS = {  # what an arm and another beside it say
    "own positives": ("pos", "sft"),
    "asked again": ("pos again", "pos"),
    DOSE: ("neg", "pos again"),
    "negatives, from pos": ("neg", "pos"),
    "the rejected side": ("neg", "chosen alone"),
    "the pit, not another step": ("neg", "other step"),
    "the pit, not an earlier step": ("neg", "earlier step"),
    "step credit, at equal tokens": ("neg", "whole"),
    "whole solutions, at equal tokens": ("whole", "pos again"),
    "step credit, of equal samples": ("neg", "whole, half"),
    "going on, not from the base": ("pos again", "again from base"),
    "likelihood beside": ("neg, nll 0.3", "neg"),
    "a second round": ("neg2", "neg"),
    "one own solution, not the teacher's": ("own 1", "one teacher's"),
    "sixteen, not one": ("own 16", "own 1"),
    "pits inserted": ("pits in 1", "own 1"),
    "harmless lines inserted": ("harmless in 1", "own 1"),
    "unlearned, dose 0.1": ("pits in 0.1, neg", "pits in 0.1"),
    "unlearned, dose 0.3": ("pits in 0.3, neg", "pits in 0.3"),
    "unlearned, dose 1": ("pits in 1, neg", "pits in 1"),
    "by heart: negatives, at equal tokens": ("neg by heart", "again by heart"),
    "by heart: own positives": ("pos by heart", "sft by heart"),
    "second rounds, at equal tokens": ("neg2", "pos a third time"),
    "where positives stop": ("neg on pos again", "pos a third time"),
    "advantages, not outcomes": ("step pg", "outcome pg"),
    "pairs, not weights": ("neg", "awr"),
    "part 2": ("parts 1, 2", "part 1"),
    "a continuation, not a solution": ("neg", "algorithm 1"),
    "a continuation, not a step": ("neg", "step by step"),
    "filtered steps": ("per-step RFT", "pos"),
}
NUMBERS = "accuracy other pass@1 pass@5 spurious wrong_steps luck tokens steps items".split()


def summarise(cells):
    """{"e 0.2, 200 problems": ...} of all cells of one rate and size."""
    groups = {}
    for cell in cells:
        name = f"e {cell['rate']}, {cell['size']} problems"
        groups.setdefault(name, []).append(cell)
    return {name: one_set(group) for name, group in groups.items()}


def one_set(cells):
    """Means over the seeds with their intervals, and the answers to QUESTIONS by bootstrap over
    seeds and problems, in points; each over the seeds that have its arms."""
    summary = dict(seeds=len(cells), arms={}, questions={})
    for arm in dict.fromkeys(arm for cell in cells for arm in cell["arms"]):
        records = [cell["arms"][arm] for cell in cells if arm in cell["arms"]]
        summary["arms"][arm] = spreads(records, NUMBERS) | dict(seeds=len(records))
        if "q" in records[0]:
            q = zip(*(record["q"] for record in records), strict=False)
            summary["arms"][arm]["q"] = [round(float(np.mean(step)), 4) for step in q]
    for question, pair in QUESTIONS.items():
        both = [cell["arms"] for cell in cells if set(pair) <= set(cell["arms"])]
        if both:
            right = {arm: np.array([bits(arms[arm]["correct"]) for arms in both]) for arm in pair}
            errors = resampled(right)
            difference = with_interval(100 * (errors[pair[1]] - errors[pair[0]]))
            summary["questions"][question] = difference
    for part in ("pos", "pos by heart", "nll", "pits"):  # `work` says what they are
        parts = [cell[part] for cell in cells if part in cell]
        if parts:
            summary[part] = means(parts)
    return summary


def means(records):
    """The mean of each number that all have, of dicts of numbers or of dicts of dicts of them."""
    if isinstance(records[0], dict):
        shared = [key for key in records[0] if all(key in record for record in records)]
        return {key: means([record[key] for record in records]) for key in shared}
    return float(np.mean(records))


def worth(cells):
    """SFT's slope, and how many times the data each arm is worth, read off SFT's ladder."""
    errors = errors_by_size(cells)
    ladder = sorted(size for arm, size in errors if arm == "sft")
    sft = np.array([errors["sft", size] for size in ladder])
    summary = dict(ladder=ladder, sft=[with_interval(error) for error in sft])
    if len(ladder) > 1:
        summary["slope"] = with_interval(slope(ladder, sft))
    for arm, size in errors:
        if arm in CORE:
            summary.setdefault(arm, {})[size] = data_worth(errors, ladder, arm, size)
    return summary


def main():
    c = parse_flags(LabFlags, __doc__)
    b = BUDGETS[c.budget]
    arms = {(rate, size): name for part in b["parts"] for rate, size, name in part}
    cells = {}
    for part in b["parts"]:
        for seeds in ([0], range(1, b["seeds"])):
            sets = [(rate, size) for rate, size, _ in part]
            if seeds != [0]:
                sets = [key for key in sets if (*key, 0) in cells]
            picked = {key: cells[*key, 0]["picked"] for key in sets if seeds != [0]}
            keys = [(*key, seed) for seed in seeds for key in sets]
            cells |= sweep(c, "controls", work, keys, arms=arms, picked=picked, **b["shared"])
    records = list(cells.values())
    sets = summarise(records)
    at_main = [cell for cell in records if cell["rate"] == MAIN]
    summary = dict(sets=sets, worth=worth(at_main) if at_main else {})
    stem = publish(c, "controls", cells, summary, csv_rows(records))
    compared = {name: record for name, record in sets.items() if DOSE in record["questions"]}
    if compared:
        panels = [lambda axis: dose_panel(axis, compared.values())]
        for name, record in compared.items():
            if name.startswith(f"e {MAIN},"):
                panels.append(partial(cost_panel, title=name, record=record))
        figure(stem, panels)
    for name, record in sets.items():
        print(text(name, record))


def csv_rows(cells):
    rows = []
    for cell in cells:
        for arm, record in cell["arms"].items():
            lr, epochs = cell["picked"][arm]
            row = dict(rate=cell["rate"], size=cell["size"], seed=cell["seed"], arm=arm)
            row |= dict(lr=lr, epochs=epochs)
            rows.append(row | {key: record[key] for key in NUMBERS if key in record})
    return rows


SHARES = ("accuracy", "other", "pass@1", "pass@5", "luck")


def text(name, record):
    """A set of the summary as lines."""
    lines = [f"{name}, {record['seeds']} seeds"]
    for part in ("pos", "pos by heart", "nll"):
        numbers = [f"{key} {value:.4g}" for key, value in record.get(part, {}).items()]
        if numbers:
            lines.append(f"  of {part}: {', '.join(numbers)}")
    for arm, numbers in record["arms"].items():
        line = f"  {arm:18}"
        for key in SHARES:
            if key in numbers:
                line += f" {key} {numbers[key][0]:6.1%}"
        line += (
            f" {numbers.get('tokens', [0])[0] / 1e6:.2f}M tokens {numbers['steps'][0]:.0f} steps"
        )
        lines.append(line)
    for question, (mean, low, high) in record["questions"].items():
        lines.append(f"  {question:34} {mean:+5.1f} [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)


def dose_panel(axis, sets):
    """How far neg, and whole solutions by DPO, are ahead of pos again, by luck of pos's samples."""
    luck = [100 * record["pos"]["luck"] for record in sets]
    for question, colour, label in (
        (DOSE, "#d1495b", "neg"),
        ("whole solutions, at equal tokens", "#777777", "DPO on whole solutions"),
    ):
        mean, low, high = np.array([record["questions"][question] for record in sets]).T
        error = [mean - low, high - mean]
        axis.errorbar(luck, mean, error, fmt="o", ms=3, color=colour, label=label)
    axis.axhline(0, color="#bbbbbb", lw=1)
    axis.set(xlabel="of pos's right samples, % with a wrong step")
    axis.set(ylabel="ahead of pos again, points", title="at equal sampled tokens")
    axis.legend(frameon=False, fontsize=7)


LINES = {  # of the figure: a colour, and the arms on the way
    "negatives": ("#d1495b", ("sft", "pos", "neg", "neg2")),
    "positives again": ("#2b7bba", ("sft", "pos", "pos again", "pos a third time")),
    "chosen alone": ("#edae49", ("pos", "chosen alone")),
    "whole solutions": ("#777777", ("pos", "whole")),
}


def cost_panel(axis, title, record):
    """Accuracy against sampled tokens."""
    for label, (colour, names) in LINES.items():
        arms = [record["arms"][name] for name in names if name in record["arms"]]
        millions = [arm["tokens"][0] / 1e6 for arm in arms]
        accuracy = [100 * arm["accuracy"][0] for arm in arms]
        axis.plot(millions, accuracy, "o-", ms=3, color=colour, label=label)
    axis.legend(frameon=False, fontsize=7)
    axis.set(xlabel="sampled tokens, millions", ylabel="accuracy, %", title=title)


if __name__ == "__main__":
    run_program(main)

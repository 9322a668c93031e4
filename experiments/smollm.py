r"""A real language model (SmolLM2-135M) on problems that read like GSM8K's.

    python experiments/smollm.py --budget cpu --model SmolLM2-135M
    python experiments/smollm.py --budget cpu --model SmolLM2-135M --train gsm8k_train.jsonl \
        --test gsm8k_test.jsonl

Without --train the problems come from templates.txt: names, things and numbers are drawn, and a
sentence with a number that does not count. The teacher solves them step by step and now and then
computes with that number. No template has the same numbers in two splits; "other" is a second test
set, of templates that training never saw.

SFT, pos, and from pos: positives asked again for as many tokens, the chosen texts alone, and neg.
Rates and epochs are chosen with seed 0, as many tries for each. The smoke budget needs no --model.
"""

import operator
import random
import re
from dataclasses import dataclass
from pathlib import Path

from controls import CORE, one_set, own_of, text, train_arm, train_sft
from lab import Cell, LabFlags, arm_rows, publish, share, sweep, verdicts

from data import BASE, Problem, UserError, flag, parse_flags, read_problems, read_rows, split_of
from rollout import ask_pits_again, run_program

# ---------------------------------------------------------------- the problems

# A template is a question and the steps of its solution: what is found out, and how. a, b, c, d
# stand for 2 .. 9, m and n for 10 .. 60, and r1, r2, ... for the results of the steps before.
TEMPLATES, OTHER_TEMPLATES = (
    part.strip().split("\n\n")
    for part in (Path(__file__).parent / "templates.txt").read_text().split("---")
)
WORDS = dict(
    name="Anna Bilal Chloe Diego Emma Farid Grace Hugo Ines Jonas Kira Liam Maya Noah".split(),
    fruit="apples pears plums lemons peaches figs mangos melons".split(),
    goods="mugs scarves candles baskets bowls lamps kites puzzles".split(),
    crowd="students guests visitors players dancers campers".split(),
)
NOISE = """A neighbour is {p} years old.
There are {p} chairs in the kitchen.
The trip to town takes {p} minutes.
It is {p} degrees outside.
A cousin has {p} hens.
The radio plays {p} songs.""".split("\n")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def word_problems(templates, split, count, seed=0, spurious=0.0):
    """(problems, {id: (equations of its solution, the number that does not count)})."""
    problems = []
    truth = {}
    for i in range(count):
        rng = random.Random(f"{seed} {split} {i}")
        question, *steps = rng.choice(templates).split("\n")
        numbers, results = draw(rng, question, steps, split)
        words = {key: rng.choice(values) for key, values in WORDS.items()}
        noise = rng.choice(NOISE).format(**numbers)
        lines = []
        good = []
        for step, result in zip(steps, results, strict=True):
            told, formula = step.split(": ")
            x, sign, y = (numbers.get(word, word) for word in formula.split())
            if rng.random() < spurious:
                p = numbers["p"]
                lines.append(f"With the other {p} it is {x + p}: {x} + {p} = {x + p}.")
            good.append(f"{x} {sign} {y} = {result}")
            lines.append(f"{told.format(result, **words)}: {good[-1]}.")
        solution = "\n".join([*lines, f"#### {results[-1]}"])
        asked = question.format(noise=noise, **numbers, **words)
        problem = Problem(f"{split}-{seed}-{i}", asked, solution, str(results[-1]))
        problems.append(problem)
        truth[problem.id] = (good, str(numbers["p"]))
    return problems, truth


def draw(rng, question, steps, split):
    """Numbers of a split, for which every result is a whole number from 1 to 999: ({letter: number,
    "r1": result, ...}, [results])."""
    while True:
        numbers = {name: rng.randint(2, 9) for name in "abcd"}
        numbers |= {name: rng.randint(10, 60) for name in "mnp"}
        used = {name: number for name, number in numbers.items() if "{" + name + "}" in question}
        if split_of(f"{question} {used}") != split:
            continue
        results = []
        for step in steps:
            x, sign, y = step.split(": ")[1].split()
            x, y = (numbers[word] if word in numbers else int(word) for word in (x, y))
            results.append(OPERATORS[sign](x, y))
            numbers[f"r{len(results)}"] = results[-1]
        if all(1 <= result < 1000 and result == int(result) for result in results):
            whole = {name: int(number) for name, number in numbers.items()}
            return whole, [int(result) for result in results]


def count_steps(folder, truth):
    """Steps a greedy solution that use the number that does not count, and that are wrong."""
    irrelevant = wrong = 0
    rows = read_rows(folder / "greedy.jsonl")
    for row in rows:
        good, p = truth[row["id"]]
        for match in EQUATION.finditer(row["samples"][0]["text"]):
            if match[0] not in good:
                irrelevant += p in (match[1], match[3])
                wrong += p not in (match[1], match[3])
    return dict(spurious=irrelevant / len(rows), wrong_steps=wrong / len(rows))


# ---------------------------------------------------------------- the arms

ARMS = {name: CORE[name] for name in ("pos", "neg", "pos again", "chosen alone")}
LEARNER = dict(
    batch=8,
    micro_tokens=2048,
    samples=8,
    negatives=2,
    rollouts=4,
    max_new_tokens=128,
    eval_samples=0,
)
TRIES = {
    "base": [(1e-4, 3.0), (1e-4, 6.0)],
    "examples": [(1e-5, 2.0), (3e-5, 2.0)],
    "pairs": [(2e-6, 2.0), (5e-6, 2.0)],
}
BUDGETS = {
    "smoke": dict(
        sizes=[6],
        seeds=1,
        counts=dict(val=2, test=3, other=2),
        tries={kind: [(1e-3, 1.0)] for kind in TRIES},
        flags=LEARNER | dict(samples=2, rollouts=2, max_new_tokens=16, temperature=0.2),
    ),
    "cpu": dict(
        sizes=[200],
        seeds=3,
        counts=dict(val=100, test=300, other=150),
        tries=TRIES,
        flags=LEARNER | dict(dtype="bfloat16"),
    ),
    "gpu": dict(
        sizes=[200, 400, 800, 1600],
        seeds=5,
        counts=dict(val=400, test=1000, other=500),
        tries=TRIES,
        flags=LEARNER | dict(dtype="bfloat16", batch=32),
    ),
}
SPURIOUS = 0.2  # the teacher's rate


@dataclass
class SmolFlags(LabFlags):
    model: str = flag("", "Hugging Face folder of the model")
    train: str = flag("", "JSONL of problems with solutions; empty = templates.txt")
    test: str = flag("", "JSONL of test problems, with --train")


def work(folder, size, seed, *, files, picked, counts, tries, flags):
    """The arms on one training set. files: (train, test), or of "" for the templates."""
    truth = {}
    other = []
    if files[0]:
        problems = read_problems(files[0], size + counts["val"])
        problems, val = problems[:size], problems[size:]
        test = read_problems(files[1])
    else:
        problems, _ = word_problems(TEMPLATES, "train", size, seed, SPURIOUS)
        val, _ = word_problems(TEMPLATES, "val", counts["val"])
        test, truth = word_problems(TEMPLATES, "test", counts["test"])
        other, _ = word_problems(OTHER_TEMPLATES, "test", counts["other"])
    cell = Cell(folder, problems, val, test, limit=size, seed=seed, data="templates.txt", **flags)
    cell.splits["other"] = other
    cell.picked = dict(picked)
    train_sft(cell, tries["base"])
    for name, arm in ARMS.items():
        train_arm(cell, name, arm, tries)
    for name, record in cell.arms.items():
        if other:
            record["other"] = cell.accuracy(cell.names[name], "other")
        if truth:
            record |= count_steps(cell.folder / cell.names[name] / "test", truth)
    result = dict(rate=SPURIOUS, size=size, seed=seed, picked=cell.picked, arms=cell.arms)
    if "pos" in cell.arms:
        result["pos"] = what_pairs_rest_on(cell)
    return result


def what_pairs_rest_on(cell):
    """How often the policies that are sampled are right, and how sure the pits of pos are."""
    own = own_of(cell, "pos")
    solutions, _ = own.valued()
    path = cell.folder / own.name / "pits.jsonl"
    again = ask_pits_again(own.policy(), cell.by_id, solutions, path, k=3 * cell.c.rollouts)
    before, _ = own_of(cell, "sft").samples()
    after, _ = own.samples()
    return dict(
        generator_right=share(verdicts(before)),
        right=share(verdicts(after)),
        pits=len(solutions),
        keep_q_0=share([row["correct"] == 0 for row in again] or [0]),
    )


def main():
    c = parse_flags(SmolFlags, __doc__)
    b = BUDGETS[c.budget]
    if not c.model and c.budget != "smoke":
        raise UserError("--model is missing: it names a Hugging Face folder of SmolLM2-135M")
    name = "smollm-gsm8k" if c.train else "smollm"
    b["flags"]["model"] = str(Path(c.model or BASE).resolve())
    shared = {key: b[key] for key in ("counts", "tries", "flags")}
    cells = {}
    for size in b["sizes"]:
        for seeds in ([0], range(1, b["seeds"])):  # seed 0 chooses
            picked = {}
            if seeds != [0]:
                if (size, 0) not in cells:
                    break
                picked = cells[size, 0]["picked"]
            keys = [(size, seed) for seed in seeds]
            files = (c.train, c.test)
            cells |= sweep(c, name, work, keys, files=files, picked=picked, **shared)
    records = list(cells.values())
    summary = {}
    for size in sorted({cell["size"] for cell in records}):
        summary[f"{size} problems"] = one_set([cell for cell in records if cell["size"] == size])
    publish(c, name, cells, summary, arm_rows(records))
    for title, record in summary.items():
        print(text(title, record))


if __name__ == "__main__":
    run_program(main)

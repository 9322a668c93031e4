"""data.py, the built-in task: arithmetic in which the truth of every step is known.

Each docstring names the bug it guards.
"""

import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import Tokenizer, UserError, is_correct, judge_steps, load_problems, split_steps

BASE = Path(__file__).parent.parent / "experiments" / "base"
TOKENIZER = Tokenizer.from_pretrained(BASE)
WORDS = [*data.NAMES, *data.THINGS, *data.GAIN, *data.LOSE, *data.KEEP]


def questions(split, **options):
    problems = [load_problems("arithmetic", split, seed=seed, **options) for seed in (0, 7, 1000)]
    return {problem.question for problem in itertools.chain(*problems)}


def test_splits_share_no_question():
    """Test questions met in training under another seed: the measured accuracy is memory."""
    seen = [questions(split, limit=30) for split in ("train", "val", "test")]
    for a, b in itertools.combinations(seen, 2):
        assert not a & b and min(len(a), len(b)) > 80
    easy = dict(spurious=0.0, steps=1, distractors=0)
    assert not questions("test", limit=30, **easy) & questions("train", limit=400, **easy)


def test_problems_are_a_function_of_the_seed():
    """A ladder of sizes whose small set is not part of the large one; a seed that nobody reads."""
    short = load_problems("arithmetic", "train", 20, 3)
    long = load_problems("arithmetic", "train", 50, 3)
    assert long[:20] == short and load_problems("arithmetic", "train", 50, 3) == long
    other = load_problems("arithmetic", "train", 50, 4)
    assert [p.question for p in other[:20]] != [p.question for p in short]
    validation = load_problems("arithmetic", "val", 50, 3)
    assert len({p.id for p in long + other + validation}) == 150


def test_the_first_problem():
    """Another world under the same seed: the base model and all published results are of this."""
    problem = load_problems("arithmetic", "train", 1)[0]
    told = "bought 4, found 3, borrowed 1, lost 9, saw 5, washed 2"
    assert problem.question == f"Mia had 14 shells, {told}. How many now?"
    steps = ["14 + 4 = 18", "18 - 9 = 9", "9 + 1 = 10", "10 - 2 = 8", "10 + 3 = 13", "#### 13"]
    assert problem.solution == "\n".join(steps)


@pytest.mark.parametrize("spurious", [0.0, 0.2, 0.5, 1.0])
def test_teacher_is_always_right(spurious):
    """A spurious step that changes the answer: it would be a wrong solution, not a longer one."""
    for problem in load_problems("arithmetic", "train", 300, 5, spurious):
        assert is_correct(problem.solution, problem.answer)
        assert problem.solution.endswith("\n#### " + problem.answer)
        assert judge_steps(problem, problem.solution)[-1] == "good"


def test_labels_of_the_teacher():
    """Clean data that is not clean; a spurious step that is labelled good, or that is the good one
    (a slip clamped back to the right sum)."""
    counts = Counter()
    for problem in load_problems("arithmetic", "train", 400, 0, 1.0):
        labels = judge_steps(problem, problem.solution)
        counts.update(labels[:-1])
        assert labels.count("good") == 5, problem.solution
    assert set(counts) == {"good", "irrelevant", "slip"} and counts["good"] == 400 * 4
    assert counts["slip"] + counts["irrelevant"] == counts["good"], "one before each step"
    assert 0.07 < counts["slip"] / counts["good"] < 0.13
    for problem in load_problems("arithmetic", "train", 100, 1, 0.0):
        assert judge_steps(problem, problem.solution) == ["good"] * 5
    some = load_problems("arithmetic", "train", 500, 2, 0.2)
    spurious = [len(judge_steps(p, p.solution)) - 5 for p in some]
    assert 0.16 < np.mean(spurious) / 4 < 0.24, "--spurious is the chance before each step"


@pytest.mark.parametrize("steps, distractors", [(4, 2), (1, 0), (3, 1), (6, 2)])
def test_every_order_stays_in_range(steps, distractors):
    """An order of the steps that leaves the tokenizer's numbers; a number that names two events."""
    for problem in load_problems("arithmetic", "train", 40, 1, 0.0, steps, distractors):
        start = problem.meta["start"]
        events = problem.meta["events"]
        assert len(events) == steps + distractors
        assert len({n for _, n in events}) == len(events)
        changes = [sign * n for sign, n in events if sign]
        assert len(changes) == steps
        for order in itertools.permutations(changes):
            totals = list(itertools.accumulate(order, initial=start))
            assert 0 <= min(totals) and max(totals) <= data.LARGEST
            assert totals[-1] == int(problem.answer)
        words = [word.strip(",.") for word in problem.question.split()]
        told = [word for word in words if word.isdigit()]
        assert told == [str(start), *(str(n) for _, n in events)]


def test_impossible_problems():
    """A search that never ends; problems that are made until memory is full."""
    assert len(load_problems("arithmetic", "test", 20, steps=6, distractors=3)) == 20
    with pytest.raises(UserError, match="7 steps"):
        load_problems("arithmetic", "train", 1, steps=7, distractors=3)
    with pytest.raises(UserError, match="limit"):
        load_problems("arithmetic")
    with pytest.raises(UserError, match="'tests'"):
        load_problems("arithmetic", "tests", 1)


JUDGED = [
    ("3 + 4 = 7\n7 + 2 = 9\n#### 9", "good good good"),
    ("3 + 2 = 5\n5 + 4 = 9\n#### 9", "good good good"),
    ("3 + 5 = 8\n3 + 4 = 7\n7 + 4 = 11\n#### 11", "irrelevant good wrong wrong"),
    ("3 + 4 = 8\n3 - 2 = 1\n#### 9", "slip wrong good"),
    ("3 + 4 = 7\n3 + 2 = 5\n#### 5", "good wrong wrong"),
    ("Mia\n#### 9 9", "wrong wrong"),
    ("\n3 + 4 = 7\n\n\n7 + 2 = 9\n\n", "good good"),
    ("", ""),
]


@pytest.mark.parametrize("text, labels", JUDGED)
def test_judge_by_hand(text, labels):
    """Each kind of step taken for another: what a pit is worth is measured with these labels. A
    label for a blank line, which is no step, so that all others are of the step before theirs."""
    events = [(1, 4), (0, 5), (1, 2)]
    problem = data.Problem("p", "?", "", "9", meta=dict(start=3, events=events))
    assert judge_steps(problem, text) == labels.split()
    assert len(split_steps(TOKENIZER.encode(text), TOKENIZER)) == len(labels.split())


def test_luck():
    """Errors that cancel and pass for good positives; a harmless detour that counts as luck."""
    events = [(1, 4), (0, 5), (1, 2)]
    problem = data.Problem("p", "?", "", "9", meta=dict(start=3, events=events))
    lucky = {
        "3 + 4 = 7\n7 + 2 = 9\n#### 9": False,
        "3 + 5 = 8\n3 + 4 = 7\n7 + 2 = 9\n#### 9": False,  # irrelevant
        "3 + 4 = 8\n3 + 4 = 7\n7 + 2 = 9\n#### 9": True,  # a slip, then put right
        "3 + 4 = 8\n8 + 2 = 9\n#### 9": True,  # two that cancel
        "3 + 2 = 5\n5 + 4 = 9\n9 + 0 = 9\n#### 9": True,  # nothing of this kind happened
    }
    for text, expected in lucky.items():
        assert is_correct(text, problem.answer) and data.is_lucky(problem, text) == expected


def test_numbers_have_no_place():
    """Distractors that are larger than what counts, or large numbers told last: a policy could tell
    them without reading the verbs."""
    problems = load_problems("arithmetic", "train", 2000)
    numbers = np.array([[n for _, n in p.meta["events"]] for p in problems])
    counts = np.array([[sign != 0 for sign, _ in p.meta["events"]] for p in problems])
    assert abs(numbers[counts].mean() - numbers[~counts].mean()) < 0.15
    assert np.ptp(numbers.mean(0)) < 0.3


def test_steps_and_labels_agree():
    """A step that is not a line: then pit and label would speak of different steps."""
    rng = random.Random(0)
    for problem in load_problems("arithmetic", "train", 60, 2, 0.5):
        ids = TOKENIZER.encode(problem.solution) + [TOKENIZER.eos_id]
        labels = judge_steps(problem, problem.solution)
        steps = split_steps(ids, TOKENIZER)
        assert len(steps) == len(labels)
        assert "".join(TOKENIZER.texts(steps)) == problem.solution
        noise = rng.choices(range(1, TOKENIZER.vocab_size), k=40)
        noise += rng.choices(TOKENIZER.encode("\n"), k=10)
        rng.shuffle(noise)
        labels = judge_steps(problem, TOKENIZER.decode(noise))
        assert len(split_steps(noise, TOKENIZER)) == len(labels)


def test_tokenizer_knows_all_words():
    """Unknown words that silently become the end of text; text that is not what was encoded."""
    for problem in load_problems("arithmetic", "train", 150, 0, 0.5):
        ids = TOKENIZER.encode(problem.solution)
        assert TOKENIZER.decode(ids) == problem.solution and TOKENIZER.eos_id not in ids
        assert TOKENIZER.eos_id not in TOKENIZER.encode(problem.question + "\n")
    for word in [*WORDS, *map(str, range(data.LARGEST + 1))]:
        assert len(TOKENIZER.encode(word)) == 1 and TOKENIZER.encode(word) != [TOKENIZER.eos_id]
    assert len(set(WORDS)) == 16 * 5, "a verb must mean one thing"

"""data.py, the built-in tasks: arithmetic with known truth of every step, and the star graph."""

import itertools
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import Tokenizer, builtin_tokenizer, is_correct, judge_steps, load_problems, split_steps
from rollout import Policy, estimate_values

TOKENIZER = builtin_tokenizer()


@pytest.mark.parametrize("task", ["arithmetic", "star"])
def test_splits_share_no_question(task):
    """Test questions met in training under another seed: the measured accuracy is memory."""
    seen = {split: {p.question for seed in (0, 7, 1000) for p in load_problems(task, split, 30, seed)}
            for split in ("train", "val", "test")}  # fmt: skip
    for a, b in itertools.combinations(seen.values(), 2):
        assert not a & b and min(len(a), len(b)) > 80
    easy = {p.question for p in load_problems("arithmetic", "test", 30, 1000, 0.0, 1, 0)}
    assert not easy & {p.question for p in load_problems("arithmetic", "train", 400, 3, 0.0, 1, 0)}


@pytest.mark.parametrize("task", ["arithmetic", "star"])
def test_problems_are_a_function_of_the_seed(task):
    """A ladder of sizes whose small set is not part of the large one; a seed that nobody reads (cleanrl#133)."""
    short, long = load_problems(task, "train", 20, 3), load_problems(task, "train", 50, 3)
    assert long[:20] == short and load_problems(task, "train", 50, 3) == long
    assert [p.question for p in load_problems(task, "train", 20, 4)] != [p.question for p in short]
    assert len({p.id for p in long + load_problems(task, "val", 50, 3) + load_problems(task, "train", 50, 4)}) == 150


@pytest.mark.parametrize("spurious", [0.0, 0.2, 0.5, 1.0])
def test_teacher_is_always_right(spurious):
    """A spurious step that changes the answer: then it would be a wrong solution, not a superfluous step."""
    for problem in load_problems("arithmetic", "train", 300, 5, spurious):
        assert is_correct(problem.solution, problem.answer) and problem.solution.endswith("\n#### " + problem.answer)
        assert judge_steps(problem, problem.solution)[-1] == "good"


def test_labels_of_the_teacher():
    """Clean data that is not clean; a spurious step that is labelled good, or doubles the good one (a slip that was
    clamped back to the right sum)."""
    counts = Counter()
    for problem in load_problems("arithmetic", "train", 700, 0, 1.0):
        labels = judge_steps(problem, problem.solution)
        counts.update(labels[:-1])
        assert labels.count("good") == 5, problem.solution
    assert set(counts) == {"good", "irrelevant", "slip"} and counts["good"] == 700 * 4
    assert counts["slip"] + counts["irrelevant"] == counts["good"], "one before each step"
    assert 0.07 < counts["slip"] / counts["good"] < 0.13
    for problem in load_problems("arithmetic", "train", 300, 1, 0.0):
        assert set(judge_steps(problem, problem.solution)) == {"good"} and problem.solution.count("\n") == 4
    share = [len(judge_steps(p, p.solution)) - 5 for p in load_problems("arithmetic", "train", 1000, 2, 0.2)]
    assert 0.16 < np.mean(share) / 4 < 0.24, "--spurious is the chance before each step"


def test_every_order_stays_in_range():
    """An order of the steps that leaves the numbers the tokenizer knows; a number that names two events."""
    for steps, distractors in ((4, 2), (1, 0), (3, 1), (5, 2)):
        for problem in load_problems("arithmetic", "train", 40, 1, 0.0, steps, distractors):
            events = problem.meta["events"]
            assert sum(s != 0 for s, _ in events) == steps and len(events) == steps + distractors
            assert len({n for _, n in events}) == len(events)
            for order in itertools.permutations([s * n for s, n in events if s]):
                totals = list(itertools.accumulate(order, initial=problem.meta["start"]))
                assert 0 <= min(totals) and max(totals) <= data.LARGEST and totals[-1] == int(problem.answer)
            told = [w.strip(",.") for w in problem.question.split() if w.strip(",.").isdigit()]
            assert told == [str(problem.meta["start"]), *(str(n) for _, n in events)]


def test_judge_by_hand():
    """Each kind of step taken for another: what a pit is worth is measured with these labels."""
    problem = data.Problem("p", "?", "", "9", meta=dict(start=3, events=[(1, 4), (0, 5), (1, 2)]))
    for text, labels in [
        ("3 + 4 = 7\n7 + 2 = 9\n#### 9", "good good good"),
        ("3 + 2 = 5\n5 + 4 = 9\n#### 9", "good good good"),
        ("3 + 5 = 8\n3 + 4 = 7\n7 + 4 = 11\n#### 11", "irrelevant good wrong wrong"),
        ("3 + 4 = 8\n3 - 2 = 1\n#### 9", "slip wrong good"),
        ("3 + 4 = 7\n3 + 2 = 5\n#### 5", "good wrong wrong"),
        ("Mia\n#### 9 9", "wrong wrong"),
        ("", "wrong"),
    ]:
        assert judge_steps(problem, text) == labels.split(), text


def test_steps_and_labels_agree():
    """A step that is not a line: then pit and label would speak of different steps."""
    for problem in load_problems("arithmetic", "train", 60, 2, 0.5):
        ids = TOKENIZER.encode(problem.solution) + [TOKENIZER.eos_id]
        assert len(split_steps(ids, TOKENIZER)) == len(judge_steps(problem, problem.solution))


def test_tokenizer_round_trip(tmp_path):
    """Unknown words that silently become the end of text; decoded text that is not what was encoded (vllm#13175)."""
    TOKENIZER.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.eos_id, again.vocab_size) == (TOKENIZER.eos_id, TOKENIZER.vocab_size)
    for tokenizer in (TOKENIZER, again):
        for problem in load_problems("arithmetic", "train", 150, 0, 0.5):
            ids = tokenizer.encode(problem.solution)
            assert tokenizer.decode(ids) == problem.solution and tokenizer.eos_id not in ids
            assert tokenizer.eos_id not in tokenizer.encode(problem.question + "\n")
            assert ids == [i for step in split_steps(ids, tokenizer) for i in step]
        for problem in load_problems("star", "train", 80):
            ids = tokenizer.encode(problem.solution)
            assert tokenizer.eos_id not in ids + tokenizer.encode(problem.question)
            assert len(ids) == 7 and is_correct(tokenizer.decode(ids), problem.answer)
    assert all(len(TOKENIZER.encode(w)) == 1 and TOKENIZER.encode(w) != [TOKENIZER.eos_id]
               for w in [*data.NAMES, *data.THINGS, *sum(data.VERBS.values(), []), *map(str, range(31))])  # fmt: skip
    assert len({*data.NAMES, *data.THINGS, *sum(data.VERBS.values(), [])}) == 16 * 5, "a verb must mean one thing"


def test_text_of_a_solution_holds_no_end_of_text():
    """'<eos>' in the text of pairs and values, because the end of text is no special token of the tokenizer."""
    ids = TOKENIZER.encode("3 + 4 = 7\n#### 7") + [TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "3 + 4 = 7\n#### 7"


def test_star_graphs():
    """A goal in both arms, a path that is no path of the graph, an order of edges that gives the answer away."""
    first = Counter()
    for problem in load_problems("star", "train", 300, 2):
        graph, ends = problem.question.rstrip("=").split("/")
        edges, (centre, goal) = graph.split("|"), ends.split(">")
        out, targets = defaultdict(list), Counter()
        for a, b in (edge.split(">") for edge in edges):
            out[a].append(b)
            targets[b] += 1
        path = problem.answer.split(">")
        assert len(edges) == 6 and len(out[centre]) == 2 and len(path) == len(set(path)) == 4
        assert path[0] == centre and path[-1] == goal and all(b in out[a] for a, b in itertools.pairwise(path))
        assert max(targets.values()) == 1 and not out[goal] and centre not in targets, "one arm leads to the goal"
        assert len({*out, *targets}) == 7 and all(0 <= int(node) <= 20 for node in {*out, *targets})
        first[out[centre].index(path[1])] += 1
        steps = [TOKENIZER.decode(s) for s in split_steps(TOKENIZER.encode(problem.solution), TOKENIZER, problem.style)]
        assert problem.style == "arrows" and [s.strip(" >") for s in steps] == path
        other = next(n for n in out[centre] if n != path[1])
        lost = [centre, other, *out[other], *out[out[other][0]]]
        assert not is_correct(">".join(lost), problem.answer) and not is_correct(">".join(path[:-1]), problem.answer)
    assert 110 < first[0] < 190, "copying the first edge must be a coin toss"


# --- a pit that is known, found by real Monte Carlo ---


class Oracle(Policy):
    """A policy that goes on right, in sample-dependent order, after good steps only, and with chance `skill`."""

    def __init__(self, problems, skill):
        super().__init__(None, TOKENIZER, "{question}\n")
        self.skill = skill
        self.prompts = {tuple(self.prompt(p)): p for p in problems}

    def generate(self, prompts, n=1, *, streams=None, max_new_tokens, temperature, seed):
        results = []
        for ids, stream in zip(prompts, streams, strict=True):
            cut = ids.index(TOKENIZER.encode("\n")[0]) + 1
            problem = self.prompts[tuple(ids[:cut])]
            rng, text = random.Random(f"{seed} {ids} {stream}"), TOKENIZER.decode(ids[cut:]).rstrip("\n")
            results.append([self.go_on(rng, problem, text) for _ in range(n)])
        return results

    def go_on(self, rng, problem, text):
        labels = judge_steps(problem, text) if text else []
        left = [tuple(e) for e in problem.meta["events"] if e[0]]
        total = problem.meta["start"]
        for line, label in zip(text.split("\n"), labels, strict=False):
            a, sign, n, _, total = line.split()
            if label == "good":
                left.remove((1 if sign == "+" else -1, int(n)))
        total, lines = int(total), []
        for sign, n in rng.sample(left, len(left)):
            lines.append(f"{total} {'+' if sign > 0 else '-'} {n} = {total + sign * n}")
            total += sign * n
        if "wrong" in labels or "slip" in labels or rng.random() > self.skill:
            total = int(problem.answer) + 1
        return TOKENIZER.encode("\n".join([*lines, f"#### {total}"])) + [TOKENIZER.eos_id]


def spoiled(rng, problem):
    """A wrong solution: good steps, then one with a wrong sign or a slip, then the steps that remain."""
    lines, total, events = [], problem.meta["start"], [e for e in problem.meta["events"] if e[0]]
    bad = rng.randrange(len(events))
    for i, (sign, n) in enumerate(rng.sample(events, len(events))):
        value = total + sign * n + (rng.choice((1, 2)) if i == bad else 0)
        lines.append(f"{total} {'+' if sign > 0 else '-'} {n} = {value}")
        total = value
    return "\n".join([*lines, f"#### {total}"])


@pytest.mark.parametrize("scan", ["full", "first", "bisect"])
def test_monte_carlo_finds_the_first_bad_step(tmp_path, scan):
    """Pits that are not the ruin of the solution: off by one, the last zero, or judged on the wrong prefix."""
    rng = random.Random(0)
    problems = [p for p in load_problems("arithmetic", "train", 30, 4)]
    texts = {p.id: spoiled(rng, p) for p in problems}  # of numbers that the tokenizer knows:
    texts = {name: text for name, text in texts.items() if max(int(w) for w in text.split() if w.isdigit()) <= 30}
    by_id = {p.id: p for p in problems}
    solutions = {(name, 0): (TOKENIZER.encode(text) + [TOKENIZER.eos_id], False, 0.5) for name, text in texts.items()}
    rows = estimate_values(Oracle(problems, 0.6), by_id, solutions, tmp_path / "v.jsonl", k=12, scan=scan,
                           max_new_tokens=64, temperature=1.0, seed=0)  # fmt: skip
    pits = Counter()
    for (name, _), row in rows.items():
        labels = judge_steps(by_id[name], texts[name])
        first = next(i for i, label in enumerate(labels, 1) if label != "good")
        assert row["pit"] == first, (texts[name], row["values"])
        known = [v for v in row["values"][1:first] if v is not None]
        assert known == [] or min(known) > 0
        pits[first] += 1
    assert len(rows) > 20 and len(pits) >= 4, "pits at every step"

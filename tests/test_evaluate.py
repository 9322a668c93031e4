"""evaluate.py. Each docstring names the bug that its test guards."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from data import Problem, Tokenizer, load_problems, read_rows
from evaluate import compare, majority_correct, mcnemar, pass_at_k, pit_report, probability
from evaluate import pair_trend, q_by_step, report, table, wilson
from model import GPT
from rollout import Policy, Sampling, Solution, run_program

BASE = Path(__file__).parent / "base"
TOKENIZER = Tokenizer.from_pretrained(BASE)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Answers(Policy):
    """A policy whose i-th sample of a problem is answer(problem, i)."""

    def __init__(self, problems, answer):
        super().__init__(None, TOKENIZER, "{question}\n")
        self.answer = answer
        self.known = {tuple(self.prompt(problem)): problem for problem in problems}

    def generate(self, prompts, n=1, first=0, **_):
        results = []
        for prompt in prompts:
            numbers = range(first, first + n)
            texts = [self.answer(self.known[tuple(prompt)], i) for i in numbers]
            results.append([TOKENIZER.encode(text) + [TOKENIZER.eos_id] for text in texts])
        return results


# ---------------------------------------------------------------- statistics


def test_wilson_known_values():
    """The usual interval, which is (0, 0) for no success and leaves [0, 1]."""
    known = {(5, 10): (0.2366, 0.7634), (0, 10): (0.0, 0.2775), (81, 263): (0.2553, 0.3662)}
    for (correct, n), (low, high) in known.items():
        assert wilson(correct, n) == pytest.approx((low, high), abs=2e-4)
        assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=2e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_pass_at_k_by_brute_force():
    """1 - (1 - c/n)^k, which is biased; a failure where k > n - c."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = itertools.combinations([True] * c + [False] * (n - c), k)
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority():
    """The last answer wins a tie, two ways of writing one answer split its votes, silence wins."""

    def majority(*answers, k=3):
        samples = []
        for answer in answers:
            text = f"so\n#### {answer}" if answer else "First he buys some.\nThen"
            samples.append(dict(text=text, ended=True, correct=answer in ("9", "9.0")))
        return majority_correct(samples, k)

    assert majority("9", "8") and not majority("8", "9")
    assert majority("8", "9", "9.0") and not majority("8", "8", "9")
    assert majority("9", "8", "8", k=2) and not majority("8", "9", "9", k=1)
    assert majority(None, None, "9") and not majority(None, None)
    assert not majority()
    right = dict(text="16 - 10 = 6\nHe has 6 eggs left.", ended=True, correct=True)
    wrong = dict(text="16 - 11 = 5\nHe has 5 eggs left.", ended=True, correct=False)
    assert majority_correct([right] * 5, 5), "answers without a marker"
    assert not majority_correct([wrong, right, wrong, right, wrong], 5)
    cut = dict(wrong, ended=False)
    assert majority_correct([cut, right, cut, right, cut], 5), "one that did not end has no vote"
    other = dict(text="So\n#### 7", ended=True, correct=True)
    assert majority_correct([wrong, wrong, right, other, other], 5), "the right ones are one group"


def test_mcnemar_by_brute_force():
    """A one-sided p, or one that counts the problems on which both agree; large counts and numpy's
    8-bit verdicts, which overflow."""
    for only_a, only_b, both in itertools.product(range(7), range(7), (0, 5)):
        a = [True] * only_a + [False] * only_b + [True] * both
        b = [False] * only_a + [True] * only_b + [True] * both
        n = only_a + only_b
        as_uneven = [i for i in range(n + 1) if abs(2 * i - n) >= abs(only_a - only_b)]
        want = sum(math.comb(n, i) for i in as_uneven) / 2**n
        assert mcnemar(a, b) == pytest.approx(want)
        assert mcnemar(b, a) == pytest.approx(want)
    a = np.array([1] * 3000 + [0] * 3000, np.uint8)
    assert mcnemar(a, 1 - a) == pytest.approx(1)
    assert 0 < mcnemar([True] * 300, [False] * 300) < 1e-60


def test_comparison_is_paired_and_signed():
    """The difference with the wrong sign; an interval as if the two had met different problems."""
    rng = random.Random(0)
    a = [rng.random() < 0.5 for _ in range(400)]
    b = [x or rng.random() < 0.1 for x in a]
    c = compare(a, b)
    assert c["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    assert 0 < c["low"] < c["difference"] < c["high"] < 0.1
    assert c["p"] < 1e-4
    assert compare(b, a)["difference"] == -c["difference"]
    assert compare(b, a)["high"] < 0
    assert compare(a, b) == c, "the same numbers each time"


def test_the_paired_interval_covers():
    """An interval of no width where two policies agree on all of a few problems: at 50 problems a
    third of the bootstrap's "95% intervals" missed a true difference of two points."""
    equal = compare([True] * 50, [True] * 50)
    assert equal["difference"] == 0 and equal["p"] == 1
    assert -0.05 < equal["low"] < -0.02 and 0.02 < equal["high"] < 0.05
    rng = np.random.default_rng(0)
    for n, gained, lost in ((50, 0.02, 0.0), (50, 0.1, 0.05), (200, 0.05, 0.05)):
        covered = 0
        for _ in range(400):
            kind = rng.random(n)
            a = (kind >= gained) & (kind < 0.5)
            b = (kind < 0.5) & ((kind < gained) | (kind >= gained + lost))
            c = compare(a, b)
            covered += c["low"] <= gained - lost <= c["high"]
        assert covered >= 0.93 * 400, (n, gained, lost, covered)


# ---------------------------------------------------------------- accuracy


def test_accuracy_does_not_depend_on_slots(tmp_path):
    """Accuracy that changes with the batch size (transformers#28385: 13.1 or 5.7); responses drawn
    again, or those of the greedy pass taken for samples."""
    problems = load_problems("arithmetic", "test", 8)
    results = []
    texts = []
    for slots in (None, 4):
        policy = Policy(
            GPT.from_pretrained(BASE), TOKENIZER, "{question}\n", Sampling(30), slots=slots
        )
        folder = tmp_path / str(slots)
        results.append(evaluate.evaluate(policy, problems, folder, 4, ks=(1, 2)))
        texts.append([(folder / name).read_text() for name in ("greedy.jsonl", "samples.jsonl")])
    assert results[0] == results[1]
    assert texts[0] == texts[1]
    assert {row["temperature"] for row in read_rows(folder / "greedy.jsonl")} == {0}
    idle = Answers(problems, None)
    assert evaluate.evaluate(idle, problems, folder, 4, ks=(1, 2)) == results[0]


def test_numbers_of_an_evaluation(tmp_path):
    """Greedy taken from the samples, pass@k of the wrong samples, spurious steps per line, not per
    solution."""
    problems = load_problems("arithmetic", limit=10, spurious=0.0)

    def answer(problem, i):
        """Problems 0 to 6 are right in samples 0 and 2, 0 and 1 with two superfluous steps."""
        number = int(problem.id.rpartition("-")[2])
        if number >= 7 or i not in (0, 2):
            return "#### 30 0"
        distractor = next(n for sign, n in problem.meta["events"] if sign == 0)
        step = f"{distractor} + {distractor} = {2 * distractor}\n"
        return step * 2 + problem.solution if number < 2 else problem.solution

    result = evaluate.evaluate(Answers(problems, answer), problems, tmp_path, 4, ks=(1, 2, 4, 5))
    json.dumps(result)
    assert result["correct"] == [True] * 7 + [False] * 3
    assert (result["problems"], result["accuracy"], result["ended"]) == (10, 0.7, 1.0)
    assert result["interval"] == pytest.approx(wilson(7, 10))
    assert result["spurious"] == 0.4
    assert result["pass@1"] == pytest.approx(0.35)
    assert result["pass@2"] == pytest.approx(0.7 * 5 / 6)
    assert (result["pass@4"], result["maj@1"], result["maj@4"]) == (0.7, 0.7, 0.7)
    assert "pass@5" not in result


def test_table_has_a_line_per_policy():
    """A policy without a line, a policy compared with itself, a shifted column."""
    sft = dict(accuracy=0.5, interval=(0.2, 0.8), correct=[True] * 4 + [False] * 4)
    sft |= {"pass@5": 0.9, "maj@5": 0.6, "spurious": 0.25}
    neg = sft | dict(accuracy=0.75, correct=[True] * 6 + [False] * 2)
    head, first, second = table(dict(sft=sft, neg=neg)).split("\n")
    assert head.split()[-5:] == ["pass@5", "maj@5", "spurious", "against", "sft"]
    assert first.split() == "sft 50.0% 20.0% - 80.0% 90.0% 60.0% 0.25".split()
    assert second.startswith("neg ") and "75.0%" in second
    assert "+25.0%" in second and "p = 0.5" in second
    assert "against" not in table(dict(sft=sft))


# ---------------------------------------------------------------- values of steps


def test_average_q_by_step():
    """Q of step t counted at t - 1; the verdict of the last step left out; solutions that are
    shorter averaged in."""
    long = Solution("a", 0, True, [], [], "", 0.5, q_values=[0.5, 0.5, 1.0], counts=[2, 2, 0])
    short = Solution("b", 0, False, [], [], "", 0.5, q_values=[0.25, 0.0], counts=[4, 0])
    rows = q_by_step([long, short])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["q"] for row in rows] == [0.375, 0.25, 1.0]
    assert [row["solutions"] for row in rows] == [2, 2, 1]
    assert rows[1]["best_of_5"] == pytest.approx((1 - 0.5**5) / 2)


def test_how_reliable_the_pits_are():
    """False pits that nobody counts; a bound that is none."""
    [known] = load_problems("arithmetic", limit=1, spurious=0.0)
    lines = known.solution.split("\n")
    text = "\n".join([lines[0], "1 + 1 = 3", *lines[1:-1], "#### 30 0"])
    solutions = []
    for pit in (2, 1, 6, 2):  # steps 2 and 6 are bad
        solutions.append(Solution(known.id, 0, False, [], [3, 9], text, 0.5, [], [], pit))
    again = [dict(correct=correct, continuations=15) for correct in (0, 2, 0, 0)]
    line = pit_report({known.id: known}, solutions, again)
    assert "4 wrong solutions valued (steps: median 2, largest 2, 0% have only one)" in line
    assert "of 4 first pits asked again 75.0% keep Q = 0 in 15 samples" in line
    assert "75.0% of all are bad steps, 50.0% the first bad" in line
    plain = Solution("q", 0, False, [], [3], "", 0.9, [0.0], [0], first_pit=1)
    line = pit_report({"q": Problem("q", "", "", "9")}, [plain], [])
    assert line == "1 wrong solutions valued (steps: median 1, largest 1, 100% have only one)"
    assert pit_report({}, [], []) == "0 wrong solutions valued"


def test_probability_is_that_of_the_response():
    """The prompt's tokens counted too, or a shift by one."""
    model = GPT.from_pretrained(BASE)
    logps = model(torch.tensor([[5, 9, 7]]))[0].log_softmax(-1)
    want = (logps[0, 9] + logps[1, 7]).exp().item()
    policy = Policy(model, TOKENIZER, "{question}\n")
    assert probability(policy, [5], [9, 7]) == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------- command line


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    code = 0
    try:
        run_program(evaluate.main)
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


@pytest.fixture
def other(tmp_path):
    """The folder of a model that is not the base."""
    model = GPT.from_pretrained(BASE).requires_grad_(False)
    model.norm.weight *= 3.0
    model.save_pretrained(tmp_path / "other")
    TOKENIZER.save(tmp_path / "other")
    return tmp_path / "other"


def folder_of(out, policy):
    [folder] = out.glob(f"{Path(policy).name}-*")
    return folder


def test_command_line(other, tmp_path, monkeypatch, capsys):
    """Two policies on one folder of responses, where the second gets those of the first; a second
    command refused because it names another model, more samples or more problems."""
    flags = ["--limit", 6, "--out", tmp_path, "--threads", 1, "--samples", 2, "--rollouts", 2]
    flags += ["--temperature", 1.5]
    models = ["--model", other, "--baseline", BASE]
    code, output = run_cli(monkeypatch, capsys, *flags, *models)
    assert code == 0, output
    lines = output.out.split("\n")
    names = [line.split()[0] for line in lines[1:] if line]
    assert [
        name for name in names if name != "step"
    ] == "baseline model on baseline: model:".split()
    folders = [folder_of(tmp_path, policy) for policy in (BASE, other)]
    results = json.loads((folders[1] / "results.json").read_text())
    assert results["model"]["problems"] == 6
    samples = [(folder / "samples.jsonl").read_text() for folder in folders]
    assert samples[0] != samples[1]
    assert run_cli(monkeypatch, capsys, *flags, *models)[1].out == output.out, "it goes on"
    alone = run_cli(monkeypatch, capsys, *flags, "--model", BASE)[1].out
    assert alone.split("\n")[1].split()[1:5] == lines[1].split()[1:5], "the baseline's responses"
    assert [(folder / "samples.jsonl").read_text() for folder in folders] == samples
    more = [*flags, *models, "--samples", 3, "--limit", 7]
    code, output = run_cli(monkeypatch, capsys, *more)
    assert code == 0 and "on 7 problems" in output.out
    for change in (["--split", "val"], ["--seed", 7], ["--prompt", "{question} "]):
        code, output = run_cli(monkeypatch, capsys, *flags, "--model", other, *change)
        assert code == 0, output
    assert len(list(tmp_path.glob("other-*"))) == 4, "of other problems, numbers and prompts"


def test_explain_shows_the_pit_and_both_probabilities(tmp_path, monkeypatch, capsys):
    """A pit shown at another step than the pairs use, probabilities of the wrong tokens, colour
    codes in a pipe."""
    flags = ["--model", BASE, "--baseline", BASE, "--out", tmp_path, "--limit", 4, "--threads", 1]
    flags += ["--temperature", 1.5, "--samples", 8, "--rollouts", 2]
    shown = 0
    for number in range(4):
        code, output = run_cli(monkeypatch, capsys, *flags, "--explain", number)
        assert code == 0 and "\033" not in output.out, output
        if "rejected" not in output.out:
            continue
        shown += 1
        rows = read_rows(folder_of(tmp_path, BASE) / "values-2.jsonl")
        rows = [row for row in rows if row["id"] == f"test-0-{number}"]
        lines = output.out.splitlines()
        [pit] = [line for line in lines if "<- the first pit" in line]
        [rejected] = [line for line in lines if line.startswith("rejected")]
        number_of_pit = int(pit.split()[0])
        shown_rows = [row for row in rows if row["first_pit"] == number_of_pit]
        steps = [row["text"].split("\n")[number_of_pit - 1] for row in shown_rows]
        assert any(rejected.endswith(step) for step in steps)
        assert any("pairs set a bad step against steps that are all good" in x for x in lines)
        before, after = map(float, rejected.split()[1:3])
        assert before == after < 1
    assert shown
    code, output = run_cli(monkeypatch, capsys, *flags, "--explain", 4)
    assert code == 2 and "--explain 4" in output.err


def test_all_of_a_file_is_tested(tmp_path):
    """A file of 1,100 problems tested on its first 1,000."""
    rows = [json.dumps(dict(question=f"{i} + 1?", answer=f"#### {i + 1}")) for i in range(1100)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    c = evaluate.EvaluateFlags(data=str(tmp_path / "p.jsonl"))
    problems, whole = evaluate.read_data(c, "test", enough=1000)
    assert len(problems) == 1100
    c.limit = 7
    assert evaluate.read_data(c, "test", enough=1000) == (problems[:7], whole), "it may go on"
    rows[900] = rows[899]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    assert evaluate.read_data(c, "test", enough=1000)[1] != whole
    c = evaluate.apply_presets(evaluate.EvaluateFlags())
    assert len(evaluate.read_data(c, "test", enough=1000)[0]) == 1000


def test_report():
    """A policy that per-step DPO made worse, and nobody says so; a warning where it did not; 0.0%
    because all responses were cut, which nobody sees."""
    plain = dict(accuracy=0.5, interval=(0.2, 0.8), correct=[True, False], problems=2, ended=1.0)
    trend = dict(margin=[0.0, 0.5], chosen=[-3.0, -2.5], rejected=[-2.0, -4.0])
    results = dict(pos=plain | dict(held_out=0.5), neg=plain | dict(held_out=0.4, **trend))
    lines = report(results).split("\n")[3:]
    assert lines[0] == "on 2 problems"
    assert lines[1].startswith("neg: margin 0.00 to 0.50, chosen -3.00 to -2.50, rejected -2.00")
    assert "neg is worse than pos" in lines[2] and "--neg-lr" in lines[2] and len(lines) == 3
    results["neg"]["held_out"] = 0.5
    results["pos"]["ended"] = 0.25
    lines = report(results).split("\n")[4:]
    assert lines[0].startswith("pos: 75.0% of the responses did not end") and len(lines) == 2
    assert len(report(dict(sft=plain, pos=plain, neg=plain | trend)).split("\n")) == 6


def test_trend_of_pairs(tmp_path):
    """Means over another stage, or over all steps."""
    rows = ["stage,step,margin,chosen,rejected", "pos,0,,,"]
    rows += [f"neg,{i},{i},{-i},{2 * i}" for i in range(20)]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    moved = pair_trend(tmp_path / "metrics.csv", "neg")
    assert moved == dict(margin=[0.5, 18.5], chosen=[-0.5, -18.5], rejected=[1.0, 37.0])
    assert pair_trend(tmp_path / "metrics.csv", "pos") == {}

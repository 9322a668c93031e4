"""evaluate.py: intervals, pass@k, majority votes, paired tests, the table. Each docstring names the bug it guards."""

import itertools
import json
import math
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate as evaluate_module
from data import builtin_tokenizer, load_problems
from evaluate import compare, evaluate, majority_right, mcnemar, pass_at_k, pit_report, probability, q_by_step, table
from evaluate import wilson
from model import GPT, Config
from rollout import Policy, entry

TOKENIZER = builtin_tokenizer()
EOS = TOKENIZER.eos_id
TOY = dict(model_type="llama", vocab_size=TOKENIZER.vocab_size + 5, hidden_size=16, num_hidden_layers=2,
           num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64,
           tie_word_embeddings=True, eos_token_id=EOS)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy_policy(slots=None, seed=0):
    torch.manual_seed(seed)
    model = GPT(Config.from_hf(TOY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Policy(model, TOKENIZER, "{question}\n", slots)


class Answers(Policy):
    """A policy that writes what `answer(problem, i)` says."""

    def __init__(self, problems, answer):
        super().__init__(None, TOKENIZER, "{question}\n")
        self.answer = answer
        self.known = {tuple(self.prompt(p)): p for p in problems}

    def generate(self, prompts, n=1, *, streams=None, max_new_tokens, temperature, seed):
        key, streams = TOKENIZER.encode("\n")[0], streams or [(0, 0)] * len(prompts)
        return [[TOKENIZER.encode(self.answer(self.known[tuple(ids[: ids.index(key) + 1])], first + i)) + [EOS]
                 for i in range(n)] for ids, (_, first) in zip(prompts, streams, strict=True)]  # fmt: skip


# --- numbers ---


def test_wilson_known_values():
    """The usual interval, which is (0, 0) for no success and leaves [0, 1]."""
    for (right, n), (low, high) in {
        (5, 10): (0.2366, 0.7634), (0, 10): (0.0, 0.2775), (10, 10): (0.7225, 1.0), (81, 263): (0.2553, 0.3662),
    }.items():  # fmt: skip
        assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 1000):
        for right in (0, 1, n // 2, n):
            low, high = wilson(right, n)
            assert 0 <= low <= right / n <= high <= 1 and high > low
            assert (1 - high, 1 - low) == pytest.approx(wilson(n - right, n))


def test_pass_at_k_by_brute_force():
    """1 - (1 - c/n)^k, which is biased; a chance above 1 or a failure where k > n - c."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority():
    """The last answer wins a tie; two ways of writing one answer split its votes; no answer wins by number; votes
    beyond k are counted."""
    def right(*answers, k=9):
        return majority_right([f"so\n#### {a}" for a in answers], [a in ("9", "9.0") for a in answers], k)

    assert right("9", "8") and not right("8", "9") and right("8", "9", "9.0") and not right("8", "8", "9")
    assert not right("8", "9", "9", k=1) and right("9", "8", "8", k=2)
    silent = "First he buys 3.\nThen"
    assert majority_right([silent, silent, "#### 9"], [False, False, True], 3)
    assert not majority_right([silent, silent], [False, False], 2) and not majority_right([], [], 3)


def test_mcnemar_by_brute_force():
    """A one-sided p, or one that counts the problems on which both agree; an overflow of large counts."""
    for only_a, only_b, both in itertools.product(range(7), range(7), (0, 5)):
        a = [True] * only_a + [False] * only_b + [True] * both
        b = [False] * only_a + [True] * only_b + [True] * both
        n = only_a + only_b
        as_uneven = [i for i in range(n + 1) if abs(2 * i - n) >= abs(only_a - only_b)]
        want = sum(math.comb(n, i) for i in as_uneven) / 2**n
        assert mcnemar(a, b) == pytest.approx(want) == pytest.approx(mcnemar(b, a))
    assert mcnemar([True] * 3000 + [False] * 3000, [False] * 3000 + [True] * 3000) == pytest.approx(1)
    assert 0 < mcnemar([True] * 300, [False] * 300) < 1e-60


def test_comparison_is_paired_and_signed():
    """The difference with the wrong sign; an interval as if the two policies had met different problems."""
    rng = random.Random(0)
    a = [rng.random() < 0.5 for _ in range(400)]
    b = [x or rng.random() < 0.1 for x in a]
    c = compare(a, b)
    assert c["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    assert 0 < c["low"] < c["difference"] < c["high"] < 0.1
    assert c["p"] < 1e-4 and compare(b, a)["difference"] == -c["difference"] and compare(b, a)["high"] < 0
    assert compare(a, a) == dict(difference=0.0, low=0.0, high=0.0, p=1.0)
    assert compare(a, b) == c, "the same numbers each time"


# --- evaluate ---


def test_accuracy_does_not_depend_on_slots(tmp_path):
    """Accuracy that changes with the batch size (transformers#28385: 13.1 or 5.7; lm-evaluation-harness#3055)."""
    problems = load_problems("arithmetic", "train", 12)
    options = dict(max_new_tokens=12, samples=4, ks=(1, 2), temperature=1.0, seed=3)
    results, raw = [], []
    for slots in (None, 1, 5):
        folder = tmp_path / str(slots)
        results.append(evaluate(toy_policy(slots), problems, folder, **options))
        raw.append([(folder / name).read_bytes() for name in ("greedy.jsonl", "samples.jsonl")])
    assert results[0] == results[1] == results[2] and raw[0] == raw[1] == raw[2]
    again = evaluate(Answers(problems, None), problems, folder, **options)
    assert again == results[0], "a second call goes on where the first one stopped: here nothing is left to do"


def test_numbers_of_an_evaluation(tmp_path):
    """Greedy taken from the samples, pass@k of the wrong samples, spurious steps per line, not per solution."""
    problems = load_problems("arithmetic", "train", 10, 0, 0.0)
    order = {p.id: i for i, p in enumerate(problems)}

    def answer(problem, i):
        clean = problem.solution if order[problem.id] < 7 else "#### 30 0"
        if order[problem.id] < 2:  # a superfluous step, twice
            n = next(n for s, n in problem.meta["events"] if not s)
            clean = f"{n} + {n} = {2 * n}\n" * 2 + clean
        return clean if i in (0, 2) else "#### 30 0"

    result = evaluate(Answers(problems, answer), problems, tmp_path, max_new_tokens=64, samples=4, ks=(1, 2, 4, 5))
    assert result["problems"] == 10 and result["accuracy"] == 0.7 and result["correct"] == [True] * 7 + [False] * 3
    assert result["interval"] == pytest.approx(wilson(7, 10)) and result["ended"] == 1.0 and result["spurious"] == 0.4
    assert result["pass@1"] == pytest.approx(0.35) and result["pass@2"] == pytest.approx(0.7 * 5 / 6)
    assert result["pass@4"] == 0.7 and "pass@5" not in result and result["maj@1"] == 0.7 and result["maj@4"] == 0.7
    json.dumps(result)


def test_table_has_a_line_per_policy():
    """A policy without a line, a policy compared with itself, a shifted column."""
    base = dict(problems=8, accuracy=0.5, interval=(0.2, 0.8), correct=[True] * 4 + [False] * 4)
    better = base | dict(accuracy=0.75, correct=[True] * 6 + [False] * 2)
    one, two = table({"sft": base}), table({"sft": base, "neg": better})
    assert len(one.split("\n")) == 2 and "against" not in one
    head, sft, neg = two.split("\n")
    assert "against sft" in head and sft.startswith("sft ") and neg.startswith("neg ")
    assert "75.0%" in neg and "+25.0%" in neg and "p = 0.5" in neg and "p =" not in sft
    full = base | {"pass@5": 0.9, "maj@5": 0.6, "spurious": 0.25}
    head, line = table({"sft": full}).split("\n")
    assert line.index("90.0%") < line.index("60.0%") < line.index("0.25") and "pass@5" in head and "spurious" in head


def test_average_q_by_step(tmp_path):
    """Q of step t counted at t - 1; the verdict of the last step left out; solutions of other lengths averaged in."""
    problems = load_problems("arithmetic", "train", 2, 0, 0.0)
    policy = Answers(problems, lambda p, i: f"#### {p.answer}" if i % 2 else "#### 30 0")
    ids = [TOKENIZER.encode(p.solution) + [EOS] for p in problems]
    wrong = TOKENIZER.encode(problems[1].solution.rsplit("\n", 3)[0] + "\n#### 30 0") + [EOS]
    solutions = {(problems[0].id, 0): (ids[0], True, 0.5), (problems[1].id, 0): (wrong, False, 0.5)}
    steps = q_by_step(policy, problems, solutions, tmp_path, k=4, max_new_tokens=64, temperature=1.0, seed=0)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5] and [s["solutions"] for s in steps] == [2, 2, 2, 1, 1]
    assert [s["q"] for s in steps] == [0.5, 0.5, 0.25, 0.5, 1.0]


def test_what_pits_are_worth():
    """False pits that nobody counts: with success rate q, K failures in a row have probability (1 - q)^K."""
    problem = load_problems("arithmetic", "train", 1, 0, 0.0)[0]
    lines = problem.solution.split("\n")
    text = "\n".join([lines[0], "1 + 1 = 3", *lines[1:-1], "#### 30 0"])
    row = lambda pit: dict(id=problem.id, correct=False, text=text, pit=pit, values=[0.5] * 7)  # noqa: E731
    report = pit_report({problem.id: problem}, {0: row(2), 1: row(1), 2: row(6), 3: row(2)}, 5)
    assert "4 wrong" in report and "bad steps: 75.0%" in report and "first bad step: 50.0%" in report
    plain = {"q": load_problems("star", "train", 1)[0]}
    rows = {i: dict(id="q", correct=False, text="", pit=2, values=[None, q, 0.0]) for i, q in enumerate((0.5, 0.25))}
    assert f"{(0.5**3 + 0.75**3) / 2:.1%}" in pit_report(plain, rows, 3)
    assert "0 wrong" in pit_report({}, {}, 5)


# --- command line ---


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        entry(evaluate_module.main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("m", 0), ("b", 1)):
        policy = toy_policy(seed=seed)
        policy.model.save_pretrained(tmp_path / name)
        policy.tokenizer.save(tmp_path / name)
    rows = [dict(prompt=p.question, answer=p.answer) for p in load_problems("arithmetic", limit=4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_mcnemar_of_numpy_verdicts():
    """Counts that overflow, because verdicts came as numpy's 8-bit integers."""
    a, b = np.array([1, 0] * 400, np.uint8), np.array([0, 1] * 300 + [1, 0] * 100, np.uint8)
    assert mcnemar(a, b) == mcnemar(a.tolist(), b.tolist()) == 1.0


def test_command_line(folder, monkeypatch, capsys):
    """Two policies on one folder of raw responses: the second gets the answers of the first."""
    flags = ["--data", folder / "p.jsonl", "--out", folder / "o", "--max-new-tokens", 6, "--threads", 1, "--samples", 2]
    code, output = run_cli(monkeypatch, capsys, "--model", folder / "m", "--baseline", folder / "b", *flags)
    assert code == 0 and [line.split()[0] for line in output.out.split("\n")[1:3]] == ["baseline", "model"], output
    results = json.loads((folder / "o" / "results.json").read_text())
    stored = json.loads((folder / "o" / "config.json").read_text())
    assert results["model"]["problems"] == 4 and {"commit", "torch"} <= set(stored)
    greedy = [(folder / "o" / name / "greedy.jsonl").read_text() for name in ("baseline", "model")]
    assert greedy[0] != greedy[1]


def test_explain_shows_the_pit_and_both_probabilities(folder, monkeypatch, capsys):
    """A pit shown at another step than the pairs use, probabilities of the wrong tokens, colour codes in a pipe."""
    base, easy = Path(__file__).resolve().parent.parent / "experiments" / "base", folder / "easy.jsonl"
    rows = [dict(prompt=p.question, answer=p.answer, id=f"p/{i}")
            for i, p in enumerate(load_problems("arithmetic", limit=4, steps=3))]  # fmt: skip
    easy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", base, "--baseline", base, "--out", folder / "o", "--data", easy, "--prompt", "{question}\n",
             "--max-new-tokens", 48, "--threads", 1, "--values", 4, "--samples", 8, "--temperature", 1.5]  # fmt: skip
    shown = {}
    for number in range(4):
        code, output = run_cli(monkeypatch, capsys, *flags, "--explain", number)
        assert code == 0 and "\033" not in output.out, output
        shown[number] = output.out
    pairs = [text for text in shown.values() if "rejected" in text]
    assert pairs, shown
    for number, text in shown.items():
        if "rejected" in text:
            (path,) = (folder / "o").glob(f"explain-p-{number}/values.jsonl")
            row = json.loads(path.read_text())
            lines = text.split("\n")
            (at,) = [i for i, line in enumerate(lines) if "<- the first pit" in line]
            assert int(lines[at].split()[0]) == row["pit"] and row["values"][row["pit"]] == 0
            (rejected,) = [line for line in lines if line.startswith("rejected")]
            step = row["text"].split("\n")[row["pit"] - 1]
            before, after = map(float, rejected.split()[1:3])
            assert rejected.endswith(step) and before == after and 0 < before < 1
    code, output = run_cli(monkeypatch, capsys, *flags, "--explain", 4)
    assert code == 2 and "--explain" in output.err


def test_probability_is_that_of_the_response():
    """The prompt's tokens counted too, or a shift by one."""
    policy = toy_policy(seed=0)
    logits = policy.model(torch.tensor([[5, 9, 7]]))[0].log_softmax(-1)
    want = (logits[0, 9] + logits[1, 7]).exp().item()
    assert probability(policy, [5], [9, 7]) == pytest.approx(want, rel=1e-5)


def test_another_model_to_the_same_folder(folder, monkeypatch, capsys):
    """The responses of one model reported as those of another, because both were written to the default folder."""
    flags = ["--data", folder / "p.jsonl", "--out", folder / "o", "--max-new-tokens", 6, "--threads", 1]
    assert run_cli(monkeypatch, capsys, "--model", folder / "m", *flags)[0] == 0
    assert run_cli(monkeypatch, capsys, "--model", folder / "m", *flags)[0] == 0, "the same command goes on"
    code, output = run_cli(monkeypatch, capsys, "--model", folder / "b", *flags)
    assert code == 2 and "--out" in output.err, output


@pytest.fixture
def in_time():
    """A loop without an end fails here after ten seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("did not end"))
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("flags", [["--nonsense", "1"], ["--model", "nowhere"], ["--data", "none.jsonl"],
                                   ["--split", "exam"], ["--data", "arithmetic", "--limit", "0"]],
                         ids=lambda flags: " ".join(flags[-2:]))  # fmt: skip
def test_bad_flags_are_one_line(in_time, folder, monkeypatch, capsys, flags):
    """A traceback for a mistyped flag, or a split that does not exist and never ends."""
    good = ["--model", folder / "m", "--out", folder / "o", "--threads", 1, "--max-new-tokens", 4, "--limit", 2]
    code, output = run_cli(monkeypatch, capsys, *good, *flags)
    assert code == 2 and output.err.count("\n") == 1 and output.err.startswith("error: "), output.err

"""rollout.py. Each docstring names the bug that its test guards."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout
from data import Problem, Tokenizer, UserError, load_problems, read_json, read_rows
from model import GPT, Config
from rollout import PAIR_FORMS, Pair, Policy, Sampling, Solution, advantages, ask_pits_again
from rollout import begins_with, best_of, choose
from rollout import estimate_values, find_first_pit, first_other, first_step, generate, make_pairs
from rollout import most_diverse, value_steps
from rollout import pair_row, sample, solutions_to_value, uniform_numbers

BASE = Path(__file__).parent / "base"
TOKENIZER = Tokenizer.from_pretrained(BASE)
EOS = TOKENIZER.eos_id
TOY = read_json(BASE / "config.json") | dict(vocab_size=40, hidden_size=32)
LEARNED = dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
WINDOWED = TOY | dict(model_type="mistral", sliding_window=6)
rotary_and_learned = pytest.mark.parametrize("hf", [TOY, LEARNED], ids=["rotary", "learned"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(hf=TOY, std=0.3, **changes):
    """A random model whose next token depends on what came before, which weights of 0.02 hide."""
    torch.manual_seed(0)
    model = GPT(Config.from_hf(hf | changes)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
    return model


def prompts_of(*lengths):
    rng = random.Random(1)
    return [rng.choices(range(1, 40), k=length) for length in lengths]


def argmax_loop(model, prompt, budget, stop=()):
    """Greedy decoding without a cache: the truth."""
    ids = list(prompt)
    for _ in range(budget):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


class Fixed(GPT):
    """A model of the same logits everywhere, to test sampling alone."""

    def __init__(self, logits):
        super().__init__(Config.from_hf(TOY | dict(vocab_size=len(logits))))
        self.fixed = torch.tensor(logits)

    def logits(self, hidden):
        return self.fixed.repeat(len(hidden), 1)


# ---------------------------------------------------------------- generate


@rotary_and_learned
def test_greedy_equals_uncached_loop_on_mixed_lengths(hf):
    """One position tensor for a padded batch (unsloth#3699); rotary angles wrong only with a cache
    (nanochat#855); greedy samples that depend on a seed."""
    model = toy(hf)
    prompts = prompts_of(5, 1, 17, 9, 2)
    want = [[argmax_loop(model, prompt, 12)] * 2 for prompt in prompts]
    assert len({str(ids) for ids in want}) == 5, "the toy must not ignore its prompt"
    for slots in (None, 2, 4):
        options = dict(max_new_tokens=12, temperature=0, seed=slots or 0, slots=slots)
        assert generate(model, prompts, 2, **options) == want


@rotary_and_learned
def test_a_sample_depends_on_its_prompt_and_number_alone(hf):
    """Results that change with the batch (transformers#28385), its order, the slots, n, or the
    budgets of other prompts; a seed that nobody reads (cleanrl#133)."""
    model = toy(hf)
    prompts = prompts_of(3, 11, 1, 6)
    options = dict(max_new_tokens=9, seed=5, stop_ids=[7], temperature=0.9)
    whole = generate(model, prompts, 8, **options)
    for slots in (1, 3, 32):
        assert generate(model, prompts, 8, slots=slots, **options) == whole
    assert generate(model, prompts[::-1], 8, **options) == whole[::-1]
    assert [generate(model, [prompt], 8, **options)[0] for prompt in prompts] == whole
    assert generate(model, prompts, 2, **options) == [samples[:2] for samples in whole]
    budgets = dict(max_new_tokens=[9, 30, 2, 9])
    assert generate(model, prompts, 8, **options | budgets)[0] == whole[0]
    assert generate(model, prompts, 8, **options | dict(seed=6)) != whole


def test_stop_is_included_and_ends():
    """The end of text dropped, so that stopping is never learned, or text sampled behind it."""
    model = toy(std=0.1)
    prompts = prompts_of(4, 7)
    stopped = sum(generate(model, prompts, 40, max_new_tokens=30, stop_ids=[3, 8]), [])
    for ids in stopped:
        assert not {3, 8} & set(ids[:-1])
        assert ids[-1] in (3, 8) or len(ids) == 30
    assert any(ids[-1] in (3, 8) and len(ids) > 1 for ids in stopped)
    free = sum(generate(model, prompts, 40, max_new_tokens=30), [])
    for ids, longer in zip(stopped, free, strict=True):
        assert longer[: len(ids)] == ids, "stopping must not change what was drawn before"


def test_budgets_at_the_boundaries():
    """Scheduling errors at budgets of 0, 1, the needed number and one less (nano-vllm#66, #211)."""
    model = toy()
    prompts = prompts_of(3, 3, 8, 5)
    assert generate(model, prompts, 2, max_new_tokens=0) == [[[], []]] * 4
    assert generate(model, prompts, 0, max_new_tokens=5) == [[]] * 4
    assert generate(model, [], max_new_tokens=5) == []
    budgets = [0, 1, 7, 2]
    samples = generate(model, prompts, 3, max_new_tokens=budgets, seed=2)
    for prompt, budget, ids in zip(prompts, budgets, samples, strict=True):
        assert [len(x) for x in ids] == [budget] * 3
        assert generate(model, [prompt], 3, max_new_tokens=budget, seed=2) == [ids]
    greedy = argmax_loop(model, prompts[0], 2)
    for budget in (1, 2):
        options = dict(max_new_tokens=budget, temperature=0, stop_ids=greedy[1:])
        assert generate(model, prompts[:1], **options)[0][0] == greedy[:budget]


def test_learned_positions_exactly_full():
    """The last position of a learned table refused or exceeded: prompt + budget = n_positions + 1,
    as the last token is never read. An empty prompt that reads another row's logits."""
    model = toy(LEARNED, n_positions=16)
    prompts = prompts_of(6)
    for budget in (10, 11):
        ids = generate(model, prompts, max_new_tokens=budget, temperature=0)[0][0]
        assert len(ids) == budget
        assert ids[:10] == argmax_loop(model, prompts[0], 10)
    with pytest.raises(ValueError, match="do not fit the 16 positions"):
        generate(model, prompts, max_new_tokens=12)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [[1], []], max_new_tokens=1)


@rotary_and_learned
def test_a_finished_row_beside_longer_ones(hf):
    """Rows that run on when they are done, past the end of the position table."""
    model = toy(hf)
    prompts = prompts_of(60, 2, 3)
    budgets = [4, 62, 60]
    want = [[argmax_loop(model, *x)] for x in zip(prompts, budgets, strict=True)]
    assert generate(model, prompts, max_new_tokens=budgets, temperature=0) == want


def test_generate_leaves_no_gradients():
    """Activations or gradients that sampling keeps alive (NeMo-RL#1147)."""
    model = toy().requires_grad_(True)
    generate(model, prompts_of(6, 3), max_new_tokens=8)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- CUDA graphs


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: records the operations of a step, and on replay computes them again
    into the same tensors."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        self.replays = 0
        slots = step.__self__
        state = [slots.cache.k, slots.cache.v, slots.cache.lengths]
        state += [value for value in vars(slots).values() if isinstance(value, torch.Tensor)]
        before = [tensor.clone() for tensor in state]
        with self:
            step()
        for tensor, old in zip(state, before, strict=True):  # a capture computes nothing
            tensor.copy_(old)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert not waits & set(function.tags), f"{function} waits for the device inside a step"
        out = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            new = tree_leaves(function(*args, **kwargs))
            for tensor, value in zip(tree_leaves(out), new, strict=True):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != value.data_ptr():
                    tensor.copy_(value)


@pytest.mark.parametrize("hf", [TOY, LEARNED, WINDOWED], ids=["rotary", "learned", "windowed"])
def test_captured_steps_draw_the_same(hf, monkeypatch):
    """A step that replays a number which Python held, or works in tensors that rows which join,
    leave or grow have left; a step that waits for the device, which no graph can hold."""
    model = toy(hf, std=0.1)
    prompts = prompts_of(3, 11, 1, 6, 2)
    options = dict(max_new_tokens=[25, 9, 21, 13, 25], stop_ids=[7])
    want = generate(model, prompts, 4, **options)
    tapes = []

    def record(step):
        tapes.append(Tape(step))
        return tapes[-1]

    monkeypatch.setattr(rollout, "capture", record)
    monkeypatch.setattr("model.BLOCK", 4)  # so that the cache grows on the way
    generate(model, prompts, 4, **options)
    assert not tapes, "on a CPU nothing is captured"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for slots in (8, 20):  # rows that take one prompt after another, and one row for each sample
        tapes.clear()
        assert generate(model, prompts, 4, slots=slots, **options) == want
        assert len(tapes) > 2
        assert sum(tape.replays for tape in tapes) > 2 * len(tapes)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU would wait for: tensors of another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} <= {"meta"}, f"{function} mixes devices"
        return function(*args, **(kwargs or {}))


BROKEN = dict(
    item=lambda slots: slots.done.sum().item(),
    index_on_the_cpu=lambda slots: slots.output[torch.tensor([0, 1])],
    rows_that_are_done=lambda slots: slots.output[slots.done],
)


@pytest.mark.parametrize("broken", [None, *BROKEN])
@pytest.mark.parametrize("hf", [TOY, LEARNED, WINDOWED], ids=["rotary", "learned", "windowed"])
def test_a_step_stays_on_its_device(hf, broken, monkeypatch):
    """A step that waits for the device, or works with a tensor of the CPU: seen on tensors of a
    device that has no numbers, and in three steps that are broken on purpose."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no "meta"
    with torch.device("meta"):
        model = GPT(Config.from_hf(hf))
    slots = rollout.Slots(model, Sampling(max_new_tokens=4, stop_ids=[0]), rows=4, width=4)
    slots.cache.make_room(16)
    slots.cache.empty = False
    with torch.no_grad(), OneDevice():
        slots.step()
        if broken:
            with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
                BROKEN[broken](slots)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_draw_the_same_on_a_gpu(monkeypatch):
    """What the tape cannot show: that CUDA takes the step as it is."""
    model = toy().cuda()
    options = dict(max_new_tokens=[90, 9, 33, 21, 90], seed=5, stop_ids=[7], slots=16)
    samples = generate(model, prompts_of(3, 11, 1, 6, 2), 8, **options)
    monkeypatch.setattr(rollout, "CUDA_GRAPHS", False)
    assert generate(model, prompts_of(3, 11, 1, 6, 2), 8, **options) == samples


# ---------------------------------------------------------------- the choice of a token


def first_token_shares(logits, **options):
    """How often each token is drawn by a model of these logits."""
    samples = generate(Fixed(logits), [[1, 2]], 6000, max_new_tokens=1, **options)[0]
    return torch.tensor(samples)[:, 0].bincount(minlength=len(logits)) / 6000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature):
    """A temperature applied twice or to the wrong side; a biased inversion; the first token shared
    by all samples of a prompt (nanochat#38, #201)."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    shares = first_token_shares(logits.tolist(), temperature=temperature)
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.02, rtol=0)


def test_successive_tokens_are_independent():
    """A token that takes the random number of the one before it, or of another sample."""
    samples = generate(Fixed([0.0] * 4), [[1, 2], [3]], 4000, max_new_tokens=3)
    for ids in map(torch.tensor, samples):
        for a, b in ((ids[:, 0], ids[:, 1]), (ids[:, 1], ids[:, 2]), (ids[1:, 0], ids[:-1, 0])):
            together = (4 * a + b).bincount(minlength=16) / len(a)
            torch.testing.assert_close(together, torch.full((16,), 1 / 16), atol=0.015, rtol=0)


@pytest.mark.parametrize("top_p, kept", [(0.4, [0]), (0.6, [0, 2]), (0.85, [0, 2, 3])])
def test_top_p_keeps_the_smallest_head(top_p, kept):
    """Top-p that keeps one token too many or too few, or does not renormalise."""
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15])
    shares = first_token_shares(probabilities.log().tolist(), top_p=top_p)
    want = torch.zeros(4)
    want[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(shares, want, atol=0.02, rtol=0)
    assert (shares > 0).sum() == len(kept)


@pytest.mark.parametrize("temperature", [0, 1.0, 5.0])
def test_rows_without_a_token_are_never_drawn(temperature):
    """Embedding rows with no token behind them break decoding when sampled (vllm#13175); tokens of
    probability 0 drawn at the ends of [0, 1)."""
    model = Fixed([0.0] * 10 + [50.0] * 6)
    options = dict(max_new_tokens=4, temperature=temperature)
    samples = generate(model, [[1, 2], [3]], 50, vocab_size=10, **options)
    assert max(map(max, sum(samples, []))) < 10
    assert max(map(max, generate(model, [[1]], 5, **options)[0])) >= 10, "the trap is real"
    logits = torch.tensor([[-math.inf, 3.0, 1.0, -math.inf]] * 2)
    assert choose(logits, torch.tensor([0.0, 1 - 2.0**-22]), Sampling()).tolist() == [1, 2]


def test_random_numbers_are_uniform_and_stateless():
    """Numbers that repeat across samples, positions, prompts or seeds, or that reach 1."""
    u = np.stack([uniform_numbers(0, [1, 2], j, 256) for j in range(64)])
    assert u.dtype == np.float32
    assert 0 <= u.min() and u.max() < 1
    assert len(np.unique(u)) > 16300
    assert np.bincount((u.ravel() * 16).astype(int)).min() > 900
    assert (uniform_numbers(0, [1, 2], 7, 9) == u[7, :9]).all(), "no state"
    for seed, prompt in ((0, [1, 2, 0]), (0, [2, 1]), (1, [1, 2])):
        assert (uniform_numbers(seed, prompt, 7, 9) != u[7, :9]).all()


# ---------------------------------------------------------------- judging, samples.jsonl

GOOD = "3 + 4 = 7\n"
BAD = "7 + 9 = 16\n"
WRONG = GOOD + BAD + "#### 16"
RIGHT = GOOD + "7 + 2 = 9\n#### 9"
NINE = Problem("q", "Mia had 3 pens, found 4, got 2. How many now?", "", "9")


def ids_of(text):
    """Token ids of a text, in which a last "$" stands for the end of text."""
    ids = TOKENIZER.encode(text.rstrip("$"))
    if text.endswith("$"):
        ids.append(EOS)
    return ids


def judged(text, correct=True, ended=True):
    """A sample as in samples.jsonl."""
    ids = ids_of(text + "$") if ended else ids_of(text)
    return dict(ids=ids, text=text, ended=ended, correct=correct)


def base_policy(slots=None):
    model = GPT.from_pretrained(BASE)
    sampling = Sampling(48, temperature=1.3, seed=1)
    return Policy(model, TOKENIZER, "{question}\n", sampling, slots=slots)


def test_an_unfinished_solution_is_wrong():
    """A right answer by accident of where the budget cut ("#### 18" of "#### 180"); the end of text
    in the text."""
    policy = Policy(None, TOKENIZER, "{question}\n")
    assert policy.judge(ids_of(RIGHT + "$"), NINE) == judged(RIGHT)
    assert policy.judge(ids_of(RIGHT), NINE) == judged(RIGHT, correct=False, ended=False)
    assert policy.judge([], NINE) == dict(ids=[], text="", ended=False, correct=False)
    assert not policy.judge([EOS], NINE)["correct"]
    assert policy.judge(ids_of("#### 9 .$"), NINE)["correct"], "or good steps become pits"


def test_greedy_samples_are_greedy(tmp_path):
    """An evaluation that says greedy and draws at the policy's temperature."""
    problems = load_problems("arithmetic", limit=4)
    policy = base_policy()
    rows = sample(policy, problems, tmp_path / "greedy.jsonl", 2, temperature=0)
    for problem in problems:
        [want] = policy.generate([policy.prompt(problem)], temperature=0)
        assert [s["ids"] for s in rows[problem.id]] == want * 2
    assert {row["temperature"] for row in read_rows(tmp_path / "greedy.jsonl")} == {0}
    hot = sample(policy, problems, tmp_path / "samples.jsonl", 2)
    assert hot != rows


def test_each_end_of_text_ends(monkeypatch):
    """A policy with two ends of text, of which only the first stops a sample or is left out of its
    text."""
    monkeypatch.setattr(TOKENIZER, "stop_ids", [EOS, 9])
    policy = base_policy()
    policy.model = Fixed([-9.0, 0.0] + [-9.0] * 7 + [1.0])
    [samples] = policy.generate([[1, 2]], 40)
    assert {ids[-1] for ids in samples} == {9} and max(map(len, samples)) > 1
    assert policy.judge([1, 9], NINE)["ended"] and not policy.judge([1], NINE)["ended"]
    assert policy.text([1, 9, EOS]) == policy.text([1])


def test_sampling_resumes(tmp_path):
    """Rows drawn again or otherwise after a crash; half a last line that stays in the file."""
    problems = load_problems("arithmetic", limit=5)
    path = tmp_path / "samples.jsonl"
    policy = base_policy()
    policy.samples_at_once = 8  # two problems between two writes
    rows = sample(policy, problems, path, 4)
    whole = path.read_bytes()
    assert list(rows) == [problem.id for problem in problems]
    assert list(rows.values()) == [row["samples"] for row in read_rows(path)]
    lines = whole.splitlines(keepends=True)
    half = b"".join(lines[:3]) + lines[3][:50]
    for damaged in (b"".join(lines[:3]), half, whole[:-1], b""):
        path.write_bytes(damaged)
        assert sample(base_policy(slots=5), problems, path, 4) == rows
        assert path.read_bytes() == whole
    idle = Policy(None, TOKENIZER, "{question}\n", Sampling(temperature=1.3))
    assert sample(idle, problems[::-1], path, 4) == rows, "nothing is drawn again"


@pytest.mark.parametrize(
    "change", [dict(ids=[]), dict(ids=[127]), dict(ids=["1", 0]), dict(ids=7), dict(ended=False)]
)
def test_wrong_rows_of_another_engine_are_one_line(tmp_path, change):
    """Samples of an engine that numbers tokens otherwise, drops the end of text, or was hotter."""
    row = dict(id="q", temperature=1.0, samples=[judged(RIGHT), judged(WRONG, False) | change])
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="samples.jsonl: problem q: [^\n]+$"):
        sample(Policy(None, TOKENIZER, "{question}\n"), [NINE], path, 2)
    path.write_text(json.dumps(dict(row, samples=[judged(RIGHT)], temperature=0.7)) + "\n")
    with pytest.raises(UserError, match="at temperature 0.7, not 1.0"):
        sample(Policy(None, TOKENIZER, "{question}\n"), [NINE], path, 1)


def test_more_samples_go_on(tmp_path):
    """A run refused or begun again because more samples are wanted; the first ones drawn twice, or
    others than one call for all of them draws."""
    problems = load_problems("arithmetic", limit=3)
    policy = base_policy()
    whole = sample(policy, problems, tmp_path / "whole.jsonl", 5)
    path = tmp_path / "samples.jsonl"
    first = sample(policy, problems[:2], path, 2)
    assert list(first.values()) == [drawn[:2] for drawn in whole.values()][:2]
    policy.decoded = 0
    assert sample(policy, problems, path, 5) == whole
    fresh = [s for drawn in whole.values() for s in drawn]
    again = [s for drawn in first.values() for s in drawn]
    tokens = [sum(len(s["ids"]) for s in part) for part in (fresh, again)]
    assert tokens[0] - tokens[1] <= policy.decoded <= tokens[0]
    assert sample(policy, problems, path, 1) == {id: drawn[:1] for id, drawn in whole.items()}


def test_diverse_solutions():
    """Copies kept as new solutions, near copies preferred to far ones, more than the limit."""
    near = GOOD + "7 + 1 = 9\n#### 9"
    far = "3 + 2 = 5\n5 + 4 = 9\n#### 9"
    samples = [judged(text) for text in (RIGHT, RIGHT, near, far)]
    assert most_diverse(samples, 2) == [samples[0], samples[3]]
    assert most_diverse(samples) == [samples[0], samples[3], samples[2]]
    many = [judged(f"{i} + 4 = {i + 4}\n#### 9") for i in range(9)]
    assert len(most_diverse(many)) == 4
    assert len(most_diverse(many, 20)) == 9
    assert most_diverse([], 4) == []
    bare = [judged("#### 9"), judged("#### 9"), judged("#### 8")]
    assert len(most_diverse(bare)) == 2, "without equations the text tells them apart"


def test_solutions_to_value():
    """Unfinished solutions, copies, or more than asked for; V(x) not from the samples."""
    samples = [judged(f"#### {i}", correct=i == 9) for i in (9, 8, 8, 7, 6)]
    samples.insert(3, judged("#### 5", correct=False, ended=False))
    policy = Policy(None, TOKENIZER, "{question}\n")
    rollouts = {"q": samples}
    solutions = solutions_to_value(policy, [NINE], rollouts, wrong=2, correct=5)
    assert [s.sample for s in solutions] == [0, 1, 4]
    assert [s.q_values for s in solutions] == [[1.0], [0.0], [0.0]]
    assert {s.value for s in solutions} == {1 / 6}
    assert len(solutions_to_value(policy, [NINE], rollouts, wrong=9)) == 3


# ---------------------------------------------------------------- values and pits


class Script(Policy):
    """A policy for NINE whose n-th continuation is a function of the prefix and n. `asked` holds
    the prefixes and budgets that it was asked for."""

    def __init__(self, continuation, max_new_tokens=64):
        super().__init__(None, TOKENIZER, "{question}\n", Sampling(max_new_tokens))
        self.continuation = continuation
        self.asked = []

    def generate(self, prompts, n=1, first=0, max_new_tokens=None):
        results = []
        stem = self.prompt(NINE)
        for prompt, budget in zip(prompts, max_new_tokens, strict=True):
            assert prompt[: len(stem)] == stem
            prefix = prompt[len(stem) :]
            self.asked.append((tuple(prefix), budget))
            text = TOKENIZER.decode(prefix)
            numbers = range(first, first + n)
            results.append([ids_of(self.continuation(text, i))[:budget] for i in numbers])
        return results


def lucky(prefix, i):
    """Right in samples 0 and 2, in two ways, unless the bad step stands in the prefix."""
    if "16" in prefix or i not in (0, 2):
        return "#### 16$"
    return "7 + 2 = 9\n#### 9$" if i == 0 else "#### 9$"


def unvalued(*texts):
    """`Solution`s of NINE from texts, of which RIGHT is correct."""
    rollouts = {"q": [judged(text, text == RIGHT) for text in texts]}
    return solutions_to_value(Script(lucky), [NINE], rollouts, wrong=9, correct=9)


def valued(text=WRONG, continuation=lucky, k=4, scan="full", budget=64):
    policy = Script(continuation, budget)
    [s] = unvalued(text)
    estimate_values(policy, {"q": NINE}, [s], k=k, scan=scan)
    return s, policy


def test_equations_by_hand():
    """The last of several equal least values taken for the pit, or a None; Eq. 3 against the value
    of the wrong prefix; Q of the best of five confused with that of one sample."""
    assert find_first_pit([0.5, 0.2, 0.2, 0.4]) == 2
    assert find_first_pit([0.0]) == 1
    assert find_first_pit([None, 0.5, None, 0.0, None, 0.0]) == 4
    solution = Solution("q", 0, True, [], [], "", 0.5, [0.75, 0.25, 1.0], [4, 4, 0])
    assert advantages(solution) == [0.25, -0.5, 0.75]
    assert [best_of(0.5, 5), best_of(1, 5), best_of(0.25, 1)] == [1 - 0.5**5, 1, 0.25]


@pytest.mark.parametrize("scan", ["full", "first"])
def test_a_known_pit_is_found(scan):
    """Sums for means, the last step sampled instead of judged, the pit one step off, steps behind
    it valued in the cheap scan, or their continuations taken for those before it."""

    def recovers(prefix, i):
        return "#### 9$" if prefix == GOOD + BAD + BAD else lucky(prefix, i)

    s, policy = valued(GOOD + BAD + BAD + "#### 16", recovers, scan=scan)
    assert s.first_pit == 2
    assert s.continuations == [ids_of("7 + 2 = 9\n#### 9$"), ids_of("#### 9$")]
    asked = [tuple(ids_of(text)) for text in (GOOD, GOOD + BAD, GOOD + BAD + BAD)]
    if scan == "full":
        assert s.q_values == [0.5, 0.0, 1.0, 0.0]
        assert [prefix for prefix, _ in policy.asked] == asked
    else:
        assert s.q_values == [0.5, 0.0, None, 0.0]
        assert [prefix for prefix, _ in policy.asked] == asked[:2]


def test_steps_of_a_solution():
    """A step one off: the end of text left out of the last one, or a prefix without its pit."""
    [s] = unvalued(WRONG)
    assert [s.step(i) for i in (1, 2, 3)] == [ids_of(GOOD), ids_of(BAD), ids_of("#### 16$")]
    assert [s.through_step(i) for i in (0, 2, 3)] == [[], ids_of(GOOD + BAD), ids_of(WRONG + "$")]


@pytest.mark.parametrize("scan", ["full", "first"])
def test_a_correct_solution_has_no_pit(scan):
    """Step labels that contradict the final answer (prm800k#12); a scan that leaves a correct
    solution where all continuations were unlucky."""
    s, _ = valued(RIGHT, lambda prefix, i: "#### 1$", scan=scan)
    assert s.q_values == [0.0, 0.0, 1.0]
    assert s.first_pit is None
    single, policy = valued("#### 16", scan=scan)
    assert (single.q_values, single.first_pit, policy.asked) == ([0.0], 1, [])


def test_continuations_get_what_is_left_of_the_budget():
    """max_new_tokens from every prefix (Self-Explore): values from solutions longer than any that
    is sampled."""
    budget = len(ids_of(WRONG + "$"))
    _, policy = valued(budget=budget)
    assert all(left == budget - len(prefix) for prefix, left in policy.asked)
    s, _ = valued(continuation=lambda prefix, i: GOOD + "7 + 2 = 9\n#### 9$", budget=budget)
    assert s.q_values == [0.0, 0.0, 0.0], "cut by the budget, so it did not end, so it is wrong"


def test_values_resume_and_share_prefixes(tmp_path):
    """Equal prefixes continued twice, which gives one state two labels; values lost or made again
    after a crash."""
    texts = (WRONG, GOOD + BAD + "#### 17", RIGHT)
    path = tmp_path / "values.jsonl"
    policy = Script(lucky)
    rows = value_steps(policy, {"q": NINE}, unvalued(*texts), path, k=4, scan="full")
    assert len(policy.asked) == len(set(policy.asked)) == 3, "GOOD, GOOD + BAD, and RIGHT's"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (b"", lines[0] + lines[1][:30], whole):
        path.write_bytes(damaged)
        policy = Script(lucky)
        policy.samples_at_once = 1  # a write for each solution
        assert value_steps(policy, {"q": NINE}, unvalued(*texts), path, k=4, scan="full") == rows
        assert path.read_bytes() == whole
    assert not policy.asked, "all were there"
    for other in (GOOD + "7 + 8 = 15\n#### 15", GOOD + "#### 3"):  # as many steps, and fewer
        with pytest.raises(UserError, match="sample 0, are not of"):
            value_steps(policy, {"q": NINE}, unvalued(other), path, k=4)
    with pytest.raises(UserError, match="sample 0, are not of"):
        value_steps(policy, {"q": NINE}, unvalued(GOOD + "#### 3"), path, k=4)


def test_k_may_grow():
    """A second call that draws the first continuations again, forgets them, or keeps those of a
    step that is no longer the one before the pit."""

    def late(prefix, i):
        return lucky(prefix, 0) if i >= 4 else "#### 1$"

    s, policy = valued(continuation=late, k=4, scan="first")
    assert (s.q_values, s.first_pit, s.continuations) == ([0.0, None, 0.0], 1, [])
    estimate_values(policy, {"q": NINE}, [s], k=4, scan="first")
    assert (s.q_values, s.counts, s.first_pit) == ([0.5, 0.0, 0.0], [8, 4, 0], 2)
    assert s.continuations == [ids_of("7 + 2 = 9\n#### 9$")] * 4
    estimate_values(policy, {"q": NINE}, [s], k=2, scan="first")
    assert (s.q_values, s.counts) == ([0.6, 0.0, 0.0], [10, 6, 0])
    assert len(s.continuations) == 6


def test_pits_are_asked_again(tmp_path):
    """Pits asked with the continuations that found them, or a last step, which nobody sampled; the
    answers of other pits taken from the disk."""

    def late(prefix, i):
        return "#### 9$" if i in (0, 5) and "16" not in prefix or i == 9 else "#### 1$"

    solutions = unvalued(WRONG, "#### 16", RIGHT)
    policy = Script(late)
    estimate_values(policy, {"q": NINE}, solutions, k=4, scan="first")
    path = tmp_path / "pits.jsonl"
    rows = ask_pits_again(policy, {"q": NINE}, solutions, path, k=12)
    want = dict(id="q", sample=0, first_pit=2, first=4, continuations=12, correct=1)
    assert rows == [want]
    policy.asked.clear()
    assert ask_pits_again(policy, {"q": NINE}, solutions, path, k=12) == rows and not policy.asked
    solutions[0].first_pit = 1
    [row] = ask_pits_again(policy, {"q": NINE}, solutions, path, k=12)
    assert row["first_pit"] == 1 and row["correct"] == 2
    many = [solutions[0]] * 250
    assert len(ask_pits_again(policy, {"q": NINE}, many, tmp_path / "many.jsonl", k=1)) == 100


# ---------------------------------------------------------------- pairs


def pairs_of(form, text=WRONG, samples=(RIGHT,), continuation=lucky, seed=0):
    s, policy = valued(text, continuation)
    rollouts = {"q": [judged(x) for x in samples] + [judged(text, False)]}
    return make_pairs(form, policy, {"q": NINE}, rollouts, [s], seed)


def assert_sides(pair, prefix, chosen, rejected):
    assert pair.prompt == Script(lucky).prompt(NINE) + ids_of(prefix)
    assert pair.chosen == ids_of(chosen)
    assert pair.rejected == ids_of(rejected)


EXPECTED = {  # of WRONG, whose second step is the pit
    "continuation": (GOOD, "#### 9$", BAD),
    "step": (GOOD, "#### 9$", BAD),
    "algorithm1": ("", RIGHT + "$", GOOD + BAD),
    "response": ("", RIGHT + "$", WRONG + "$"),
    "farthest": ("", RIGHT + "$", WRONG + "$"),
}


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_every_form_of_pairs(form):
    """An end of text on a step that was cut out teaches to stop after a step (Step-DPO#25, #10);
    none where the solution ended never teaches to stop."""
    [pair] = pairs_of(form)
    assert_sides(pair, *EXPECTED[form])
    assert (pair.id, pair.form, pair.first_pit) == ("q", form, 2)


def test_unknown_form_is_refused():
    """A mistyped form that silently makes pairs of another one."""
    with pytest.raises(UserError, match="'suffix' is none of continuation, step"):
        pairs_of("suffix")


def test_a_step_is_cut_out_of_its_continuation():
    """The whole continuation taken where Theorem 6.1 compares two steps: one side weighs more for
    its length."""
    [pair] = pairs_of("step", continuation=lambda prefix, i: lucky(prefix, 0))
    assert_sides(pair, GOOD, "7 + 2 = 9\n", BAD)


@pytest.mark.parametrize("form", ["continuation", "step", "algorithm1"])
def test_a_pit_that_is_the_last_step_keeps_its_end(form):
    """End of text removed from a rejected last step, which did end."""
    text = GOOD + "7 + 2 = 9\n#### 8"
    [pair] = pairs_of(form, text, continuation=lambda prefix, i: "#### 9$")
    assert pair.first_pit == 3
    assert pair.rejected == ids_of(text + "$" if form == "algorithm1" else "#### 8$")


@pytest.mark.parametrize("bad", [BAD, "7 + 9 = 16 \n", BAD + "\n"])
def test_chosen_never_begins_with_rejected(bad):
    """A filter that tests the list instead of the string and so never fires (Self-Explore); one of
    token ids, for which the pit with another space behind it is another step."""

    def through_the_pit(prefix, i):
        return bad + "#### 9$" if prefix == GOOD else "#### 1$"

    assert pairs_of("continuation", continuation=through_the_pit) == []
    assert pairs_of("step", continuation=through_the_pit) == []


def test_beginnings_are_of_whole_words():
    """A step lost because another one begins with its digits; a filter that looks one way only."""
    assert begins_with("9 + 5 = 14\n\nSo 14", "9 + 5 = 14\n") and begins_with("a b", "a  b")
    assert not begins_with("9 + 5 = 145", "9 + 5 = 14") and not begins_with("a", "a b")
    assert not begins_with("3 / 2 = 1.5", "3 / 2 = 1") and not begins_with("so 3/4", "so 3")
    assert not begins_with("2 * 500 = 1,000", "2 * 500 = 1") and begins_with(
        "It is 14.", "It is 14"
    )
    assert begins_with("9", "") and begins_with(", 9", ""), "an empty text tells nothing apart"
    policy = Script(lucky)
    candidates = [ids_of(text) for text in ("7 + 9", "7 + 9 = 16\n#### 9$", "7 + 2 = 9$")]
    assert first_other(candidates, ids_of(BAD), policy) == candidates[2]
    assert first_other(candidates[:2], ids_of(BAD), policy) is None


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_a_refuted_pit_makes_no_pair(form):
    """Training against a step from which a correct sample of the same file goes on, in the same
    tokens or in others."""
    for bad in (BAD, "7 + 9 = 16 \n"):
        pairs = pairs_of(form, samples=(GOOD + bad + "16 - 7 = 9\n#### 9", RIGHT))
        assert (pairs == []) == (form in ("continuation", "step", "algorithm1"))

    def some_through_the_pit(prefix, i):
        return (
            (BAD + "16 - 7 = 9\n#### 9$" if i == 0 else "7 + 2 = 9\n#### 9$")
            if i < 2
            else "#### 1$"
        )

    def continuation(prefix, i):
        return some_through_the_pit(prefix, i) if prefix == GOOD else "#### 1$"

    refuted = pairs_of(form, continuation=continuation)
    assert (refuted == []) == (form in ("continuation", "step", "algorithm1"))


def test_chosen_is_one_of_many_at_random():
    """A correct solution that was sampled often taken for several; the same one set against every
    mistake, or the first one sampled."""
    right = [f"3 + {i} = {3 + i}\n{3 + i} + {6 - i} = 9\n#### 9" for i in range(6)]
    often = [right[0]] * 50 + right[1:]
    wrong = [f"{i} + 4 = {i + 4}\n#### 2" for i in range(12)]
    solutions = unvalued(*wrong)
    for s in solutions:
        s.first_pit = 1
    rollouts = {"q": [judged(text) for text in often]}
    taken = []
    for seed in range(3):
        pairs = make_pairs("response", Script(lucky), {"q": NINE}, rollouts, solutions, seed)
        taken.append([TOKENIZER.decode(pair.chosen) for pair in pairs])
    chosen = sum(taken, [])
    assert len(chosen) == 27 and len(set(chosen)) == 6, "9 solutions of each seed, all ways of it"
    assert max(map(chosen.count, chosen)) < 12, "50 copies are one solution"
    assert len(set(map(tuple, taken))) == 3, "each seed has an order of its own"


def test_equal_pairs_are_one():
    """A pair that several wrong solutions share, weighed by how often it was sampled."""
    texts = (WRONG, GOOD + BAD + "#### 17")
    solutions = unvalued(*texts)
    policy = Script(lucky)
    estimate_values(policy, {"q": NINE}, solutions, k=4, scan="full")
    rollouts = {"q": [judged(RIGHT)]}
    assert len(make_pairs("continuation", policy, {"q": NINE}, rollouts, solutions)) == 1
    assert len(make_pairs("response", policy, {"q": NINE}, rollouts, solutions)) == 2


def test_a_step_is_cut_as_in_its_solution():
    """A continuation cut by itself, where "Step 2:" is not the second number of anything."""
    cut = {(1, 2, 3, 4, 5): [[1, 2], [3, 4], [5]], (3, 4, 5): [[3, 4, 5]]}
    assert first_step([1, 2], [3, 4, 5], lambda ids: cut[tuple(ids)]) == [3, 4]
    joined = {(1, 2, 3, 4, 5): [[1], [2, 3, 4], [5]]}
    assert first_step([1, 2], [3, 4, 5], lambda ids: joined[tuple(ids)]) == [3, 4]


def test_before_the_first_step_any_correct_solution_will_do():
    """Pits at step 1 lost, because nothing is sampled from the empty prefix."""
    [pair] = pairs_of("continuation", BAD + "#### 16", continuation=lambda prefix, i: "#### 1$")
    assert_sides(pair, "", RIGHT + "$", BAD)


def test_no_pair_without_a_better_way():
    """A pair invented where no correct continuation is known, or one made of a correct solution."""
    assert pairs_of("response", samples=()) == []
    for form in ("continuation", "step"):  # the pit is step 1, which the correct solution shares
        assert pairs_of(form, continuation=lambda prefix, i: "#### 1$") == []
    assert pairs_of("response", RIGHT, samples=["#### 9"]) == []


def test_farthest_takes_the_most_edits():
    """The nearest taken for the farthest."""
    near = GOOD + BAD + "16 - 7 = 9\n#### 9"
    far = "4 - 2 = 2\n2 + 7 = 9\n9 - 0 = 9\n9 + 0 = 9\n#### 9"
    for samples in ((near, far), (far, near)):
        [pair] = pairs_of("farthest", samples=samples)
        assert pair.chosen == ids_of(far + "$")


def test_a_line_break_that_is_none(capsys):
    """A prompt that holds a backslash and an n, from a shell's plain quotes: 0.0%, and no word."""
    c = rollout.PolicyFlags(prompt="{question}\\n", max_new_tokens=4, temperature=1.0, device="cpu")
    rollout.load_policy(BASE, c)
    assert "a backslash and an n" in capsys.readouterr().err


def test_threads_that_a_process_may_use():
    """Two threads on the one core that is allowed, 128 on four of 128."""
    code = "import torch, rollout; print(rollout.THREADS)"
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    run = dict(capture_output=True, text=True, cwd=Path(rollout.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, **run)
    assert done.stdout.strip() == "1", done.stderr


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    """Samples of the built-in base, valued: (problems by id, rollouts, path of the values)."""
    problems = load_problems("arithmetic", limit=8, steps=5)
    by_id = {problem.id: problem for problem in problems}
    folder = tmp_path_factory.mktemp("run")
    policy = base_policy()
    rollouts = sample(policy, problems, folder / "samples.jsonl", 8)
    solutions = solutions_to_value(policy, problems, rollouts, wrong=3)
    value_steps(policy, by_id, solutions, folder / "values.jsonl", k=4)
    return by_id, rollouts, folder / "values.jsonl"


def test_pairs_do_not_depend_on_restarts_or_other_solutions(base_run, tmp_path):
    """Pairs that change when a row of values is made again, with the order, or with the company."""
    by_id, rollouts, whole = base_run
    policy = base_policy(slots=6)
    lines = whole.read_text().splitlines(keepends=True)
    restarted = tmp_path / "values.jsonl"
    restarted.write_text("".join(lines[:2] + lines[5:]))
    valued = []
    for path, part in (
        (whole, slice(None)),
        (restarted, slice(None)),
        (tmp_path / "some.jsonl", slice(None, None, -2)),
    ):
        solutions = solutions_to_value(policy, by_id.values(), rollouts, wrong=3)[part]
        valued.append(value_steps(policy, by_id, solutions, path, k=4))
    assert sorted(restarted.read_text().splitlines(keepends=True)) == sorted(lines)
    for form in PAIR_FORMS:
        pairs, again, some = [make_pairs(form, policy, by_id, rollouts, s, seed=3) for s in valued]
        assert len(pairs) > 5 and {pair.first_pit for pair in pairs} > {1}, form
        assert again == pairs, form
        assert some and all(pair in pairs for pair in some), form


def test_texts_of_a_pair_joined_are_the_text_of_its_ids():
    """A tokenizer of the SentencePiece kind drops the space before the first word it decodes."""
    words = {"</s>": 0, "▁What": 1, "▁now": 2, "▁nine": 3, "▁or": 4, "▁ten": 5}
    spaced = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    spaced.decoder = tokenizers.decoders.Metaspace()
    row = pair_row(Pair("q", "step", 1, [1, 2], [3, 4, 0], [5]), Tokenizer(spaced, 0))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("What now", " nine or", " ten")
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([1, 2], [3, 4, 0], [5])


# ---------------------------------------------------------------- command line


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["rollout.py", *map(str, arguments)])
    code = 0
    try:
        rollout.run_program(rollout.main)
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "flags",
    ["--x 1", "--data no.jsonl", "--model nowhere", "--device cuda:99", "--prompt x", "--limit -1"],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys, flags):
    """A traceback for a mistyped flag, or one that is silently taken for another."""
    good = ["--model", BASE, "--out", tmp_path / "o", "--limit", 1, "--max-new-tokens", 4]
    code, output = run_cli(monkeypatch, capsys, *good, *flags.split())
    assert code == 2, output
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert not (tmp_path / "o" / "samples.jsonl").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    """Rows of an old temperature, budget or seed passed off as the answer to a new command."""
    flags = ["--model", BASE, "--out", tmp_path, "--limit", 3, "--samples", 4, "--rollouts", 2]
    flags += ["--max-new-tokens", 40, "--threads", 1]
    names = ("samples.jsonl", "values.jsonl")
    code, output = run_cli(monkeypatch, capsys, *flags)
    assert code == 0 and "12 samples" in output.out
    values = read_rows(tmp_path / "values.jsonl")
    assert values and all(row["q_values"][row["first_pit"] - 1] == 0 for row in values)
    before = [(tmp_path / name).read_bytes() for name in names]
    assert run_cli(monkeypatch, capsys, *flags, "--slots", 4)[0] == 0, "the same command goes on"
    assert [(tmp_path / name).read_bytes() for name in names] == before
    for change in (["--temperature", 0.1], ["--seed", 9], ["--rollouts", 3]):
        code, output = run_cli(monkeypatch, capsys, *flags, *change)
        assert code == 2 and change[0][2:] in output.err and "--out" in output.err
    (tmp_path / "values.jsonl").unlink()
    code, output = run_cli(monkeypatch, capsys, *flags, "--samples", 5, "--limit", 4)
    assert code == 0 and "20 samples of 4 problems" in output.out, "more of them go on"

"""rollout.py: sampling, judging, files, values, pits, pairs. Each docstring names the bug it guards."""

import json
import math
import platform
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout
from data import DataError, Problem, builtin_tokenizer, load_problems, split_steps
from model import GPT, Config
from rollout import (
    Policy,
    advantages,
    append_rows,
    best_of,
    choose,
    estimate_values,
    first_pit,
    generate,
    keep_freed_memory,
    make_pairs,
    probe,
    read_rows,
    sample,
    select_diverse,
    solution_row,
    to_value,
    unique,
    write_json,
)

TOKENIZER = builtin_tokenizer()
EOS = TOKENIZER.eos_id
TOY = dict(model_type="llama", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)  # fmt: skip
GPT2_TOY = dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(hf=None, std=0.3, **changes):
    """A random model whose next token depends on what came before: weights of 0.02 would hide every mistake."""
    torch.manual_seed(0)
    model = GPT(Config.from_hf((hf or TOY) | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def prompts_of(*lengths, seed=1, vocab=40):
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(length)] for length in lengths]


@torch.no_grad()
def argmax_loop(model, prompt, budget, stop=()):
    """Greedy decoding without a cache: the truth."""
    ids = list(prompt)
    for _ in range(budget):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


class Fixed(torch.nn.Module):
    """A model of the same logits everywhere: sampling alone is tested."""

    def __init__(self, logits):
        super().__init__()
        self.inner = toy(TOY, vocab_size=len(logits))
        self.table, self.config = torch.nn.Parameter(torch.tensor(logits)), self.inner.config

    def hidden(self, *inputs):
        return self.inner.hidden(*inputs)

    def logits(self, hidden):
        return self.table.expand(*hidden.shape[:-1], -1).clone()


# --- generate ---


@pytest.mark.parametrize("hf", [TOY, GPT2_TOY], ids=["rotary", "learned"])
def test_greedy_equals_uncached_loop_on_mixed_lengths(hf):
    """One position tensor for a padded batch (unsloth#3699); rotary angles wrong only with a cache (nanochat#855)."""
    model, prompts = toy(hf), prompts_of(5, 1, 17, 9, 2)
    want = [argmax_loop(model, p, 12) for p in prompts]
    assert len({tuple(w) for w in want}) == 5, "the toy must not ignore its prompt"
    for slots in (None, 1, 2):
        got = generate(model, prompts, max_new_tokens=12, temperature=0, slots=slots)
        assert [g[0] for g in got] == want


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: operations with the very tensors that they read and wrote, computed into them again."""

    def __init__(self, step):
        super().__init__()
        state, self.calls, self.replays = step.__self__.tensors, [], 0
        before = [t.clone() for t in state]
        with self:
            step()
        for t, old in zip(state, before, strict=True):  # to capture is not to compute
            t.copy_(old)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asks = torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags
        assert not asks, f"{function} waits for the GPU inside a step"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else in place, or a view
                    old.copy_(new)


WINDOWED = TOY | dict(model_type="mistral", sliding_window=6)


@pytest.mark.parametrize("hf", [TOY, GPT2_TOY, WINDOWED], ids=["rotary", "learned", "windowed"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_captured_steps_draw_the_same(hf, temperature, monkeypatch):
    """A captured step replays numbers that Python held (a write place, a length), or works in memory that rows joining,
    leaving or growing have left; or a step waits for the GPU, which no graph can hold."""
    model, prompts, tapes = toy(hf), prompts_of(3, 11, 1, 6, 2), []
    options = dict(max_new_tokens=[37, 9, 33, 21, 37], seed=5, stop_ids=[7], temperature=temperature)
    want = {slots: generate(model, prompts, 8, slots=slots, **options) for slots in (3, 16, 40)}

    def capture(step, device):
        tapes.append(Tape(step))
        return tapes[-1].replay

    monkeypatch.setattr(rollout.Slots, "capture", staticmethod(capture))
    generate(model, prompts, 8, **options)
    assert not tapes, "on a CPU nothing is captured"
    monkeypatch.setattr(rollout.Slots, "static", True)
    monkeypatch.setattr(rollout, "PORTION", 8)
    monkeypatch.setattr("model.PORTION", 8)  # to grow on the way
    for slots, samples in want.items():
        tapes.clear()
        assert generate(model, prompts, 8, slots=slots, **options) == samples
        assert len(tapes) > 3 and sum(tape.replays for tape in tapes) > 2 * len(tapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_draw_the_same_on_a_gpu(monkeypatch, capsys):
    """What the tape above cannot show: that CUDA takes the step as it is."""
    model, prompts = toy().cuda(), prompts_of(3, 11, 1, 6, 2)
    options = dict(max_new_tokens=[90, 9, 33, 21, 90], seed=5, stop_ids=[7], temperature=0.9, slots=16)
    samples = generate(model, prompts, 8, **options)
    assert rollout.Slots.capture and not capsys.readouterr().err
    monkeypatch.setattr(rollout.Slots, "capture", None)
    assert generate(model, prompts, 8, **options) == samples


def test_a_step_that_cannot_be_captured_is_told_once(monkeypatch, capsys):
    """A GPU that refuses, and a row that lost the step in which it did; memory that ran out taken for that."""
    model, prompts, options = toy(), prompts_of(3, 5), dict(max_new_tokens=20, temperature=0)
    want = generate(model, prompts, **options)

    def refuse(step, device):
        Tape(step)
        raise error

    monkeypatch.setattr(rollout.Slots, "capture", staticmethod(refuse))
    monkeypatch.setattr(rollout.Slots, "static", True)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompts, **options)
    error = RuntimeError("operation not permitted")
    assert generate(model, prompts, **options) == want == generate(model, prompts, **options)
    assert capsys.readouterr().err.count("operation not permitted") == 1


@pytest.mark.parametrize("hf", [TOY, GPT2_TOY], ids=["rotary", "learned"])
def test_sampled_batch_equals_each_prompt_alone(hf):
    """Results that change with the batch size (transformers#28385), its order, the slots, or n."""
    model, prompts = toy(hf), prompts_of(3, 11, 1, 6)
    options = dict(max_new_tokens=9, seed=5, stop_ids=[7], temperature=0.9)
    whole = generate(model, prompts, 8, **options)
    for slots in (1, 3, 32):
        assert generate(model, prompts, 8, slots=slots, **options) == whole
    assert generate(model, prompts[::-1], 8, **options) == whole[::-1]
    assert [generate(model, [p], 8, **options)[0] for p in prompts] == whole
    assert [samples[:2] for samples in whole] == generate(model, prompts, 2, **options), "sample i for any n"
    assert generate(model, prompts, 8, **options | {"seed": 6}) != whole, "a seed that nobody reads (cleanrl#133)"


def test_samples_differ_from_the_first_token():
    """The first sampled token shared by all n samples of a prompt (nanochat#38, #201)."""
    drawn = generate(toy(std=0.1), prompts_of(4), 32, max_new_tokens=2)[0]
    assert len({ids[0] for ids in drawn}) > 8 and len(set(map(tuple, drawn))) > 16


def test_stop_is_included_and_ends():
    """The end of text dropped (no reward for stopping) or text sampled behind it."""
    model, prompts = toy(std=0.1), prompts_of(4, 7)
    drawn = generate(model, prompts, 40, max_new_tokens=30, stop_ids=[3, 8])
    for ids in sum(drawn, []):
        assert not {3, 8} & set(ids[:-1]) and (ids[-1] in (3, 8) or len(ids) == 30)
    assert any(ids[-1] in (3, 8) and len(ids) > 1 for ids in sum(drawn, []))
    free = generate(model, prompts, 40, max_new_tokens=30)
    for ids, longer in zip(sum(drawn, []), sum(free, []), strict=True):
        assert longer[: len(ids)] == ids, "stopping must not change what was drawn before"


def test_budgets_at_the_boundaries():
    """Scheduling errors at budget 0, 1, capacity and capacity + 1 (nano-vllm#66, #211)."""
    model, prompts = toy(), prompts_of(3, 3, 8, 5)
    assert generate(model, prompts, 2, max_new_tokens=0) == [[[], []]] * 4
    assert generate(model, prompts, 0, max_new_tokens=5) == [[]] * 4 and generate(model, [], max_new_tokens=5) == []
    budgets = [0, 1, 7, 2]
    got = generate(model, prompts, 3, max_new_tokens=budgets, seed=2)
    assert [[len(ids) for ids in samples] for samples in got] == [[b] * 3 for b in budgets]
    alone = [generate(model, [p], 3, max_new_tokens=b, seed=2)[0] for p, b in zip(prompts, budgets, strict=True)]
    assert got == alone
    for budget in (1, 2):  # a budget of exactly what the greedy text takes, and one less
        text = argmax_loop(model, prompts[0], 6)
        stop = [text[1]] if text[1] != text[0] else [text[0]]
        assert generate(model, prompts[:1], max_new_tokens=budget, temperature=0, stop_ids=stop)[0] == [
            argmax_loop(model, prompts[0], budget, stop)]  # fmt: skip


def test_learned_positions_exactly_full():
    """The last position of a learned table refused or exceeded: prompt + budget = n_positions (+ 1: the last token
    drawn is never read back)."""
    model, prompt = toy(GPT2_TOY, n_positions=16), prompts_of(6)[0]
    for budget in (10, 11):
        got = generate(model, [prompt], max_new_tokens=budget, temperature=0)[0][0]
        assert len(got) == budget and got[:10] == argmax_loop(model, prompt, 10)


def test_a_finished_row_beside_longer_ones():
    """Guards rows that run on when they are done: past the end of the position table."""
    for hf in (GPT2_TOY, TOY):
        model, prompts, budgets = toy(hf), prompts_of(60, 2, 3), [4, 62, 60]
        got = generate(model, prompts, max_new_tokens=budgets, temperature=0)
        assert got == [[argmax_loop(model, p, b)] for p, b in zip(prompts, budgets, strict=True)]


def test_nested_prompts_are_prefilled_once():
    """Step prefixes of one solution read again and again, or continued from a neighbour's keys and values."""
    model, long = toy(), prompts_of(14)[0]
    other = long[:5] + [long[5] % 39 + 1, 2]
    prompts = [long[:4], long, other, long[:9], long[:5], long]
    options = dict(max_new_tokens=6, temperature=0.8, seed=3)
    alone = [generate(model, [p], 3, **options)[0] for p in prompts]
    for slots in (None, 1, 4):
        stats = {}
        assert generate(model, prompts, 3, slots=slots, stats=stats, **options) == alone
        assert stats == dict(prefilled=len(long) + len(other), decoded=6 * 3 * 6)
    assert len({str(a) for a in alone}) == 5
    generate(model, prompts[:1], 3, stats=stats, **options)
    assert stats == dict(prefilled=len(long) + len(other) + 4, decoded=7 * 3 * 6), "stats add up"


def test_a_changed_model_is_read_anew():
    """A prefix cache that outlives a weight update (torchtitan#4761)."""
    model, prompts = toy(), prompts_of(6, 3)
    before = generate(model, prompts, max_new_tokens=8, temperature=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    after = generate(model, prompts, max_new_tokens=8, temperature=0)
    assert after != before and [a[0] for a in after] == [argmax_loop(model, p, 8) for p in prompts]


def test_generate_leaves_no_gradients():
    """Activations or gradients kept alive by sampling (NeMo-RL#1147)."""
    model = toy()
    generate(model, prompts_of(3), 2, max_new_tokens=3)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_rows_without_a_token_are_never_drawn():
    """Embedding rows with no token behind them break decoding when sampled (vllm#13175)."""
    model = Fixed([0.0] * 10 + [50.0] * 6)
    for temperature in (0, 1.0, 5.0):
        options = dict(max_new_tokens=4, temperature=temperature, vocab_size=10)
        drawn = generate(model, prompts_of(3, 5, vocab=10), 50, **options)
        assert max(map(max, sum(drawn, []))) < 10
    assert max(map(max, generate(model, [[1]], 5, max_new_tokens=4)[0])) >= 10, "the trap is real"
    extreme = torch.tensor([0.0, 1.0 - 2.0**-24, 2.0**-24])  # the least and largest of what `uniforms` makes
    token = choose(torch.tensor([[-9.0, 3.0, 1.0, -math.inf, -math.inf]]).repeat(3, 1), extreme, 1.0, 1.0)
    assert token.max() < 3


@pytest.mark.parametrize("vocab", [1024, 1500])
def test_a_token_of_a_large_vocabulary(vocab):
    """Guards the choice by blocks: a wrong block, a block's edge, the padding behind the last id, ids of no chance."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocab, generator=generator)
    logits[0, 100:700] = logits[0, -70:] = -math.inf
    u = torch.cat((torch.rand(4000, generator=generator).clamp(2**-24), torch.tensor([2.0**-24, 1 - 2.0**-24])))
    token = choose(logits.repeat(len(u), 1), u, 0.7, 1.0)
    sums = (logits.double() / 0.7).softmax(-1)[0].cumsum(0)
    low, high = torch.cat((sums.new_zeros(1), sums))[token], sums[token]
    assert ((low - 1e-6 < u) & (u < high + 1e-6)).all(), "each u lies in its token's share of (0, 1)"
    assert logits[0, token].isfinite().all() and token.max() < vocab - 70 and len(token.unique()) > 200


def test_uniforms_are_uniform_and_stateless():
    """Random numbers that repeat across samples, positions, prompts or seeds, or that reach 0 or 1."""
    u = rollout.uniforms(0, [1, 2], range(64), 256)
    assert u.dtype == np.float32 and 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    assert np.bincount((u.ravel() * 16).astype(int)).min() > 900 and len(np.unique(u)) > 16300
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03
    assert (rollout.uniforms(0, [1, 2], [7], 9)[0] == u[7, :9]).all(), "no state"
    assert (rollout.uniforms(0, [1, 2, 0], [7], 9)[0] != u[7, :9]).all()
    assert (rollout.uniforms(1, [1, 2], [7], 9)[0] != u[7, :9]).all()


def chi_square(counts, p, n):
    return sum((counts[i] - n * q) ** 2 / (n * q) for i, q in enumerate(p) if q)


def test_frequencies_match_the_softmax():
    """A temperature applied twice or to the wrong side; a biased inversion."""
    logits, n = [2.0, 0.0, 1.0, -1.0, 0.5], 6000
    for temperature in (0.5, 1.0, 2.0):
        drawn = generate(Fixed(logits), [[1, 2]], n, max_new_tokens=1, temperature=temperature, seed=4)[0]
        p = torch.softmax(torch.tensor(logits) / temperature, -1).tolist()
        assert chi_square(Counter(ids[0] for ids in drawn), p, n) < 18.5  # 4 degrees of freedom: p = 0.001


def test_top_p_keeps_the_smallest_head():
    """Top-p that keeps one token too many or too few, or does not renormalise; on by default."""
    p, n = [0.5, 0.05, 0.3, 0.15], 3000
    model = Fixed([math.log(x) for x in p])
    for top_p, kept in ((0.4, [0]), (0.6, [0, 2]), (0.85, [0, 2, 3])):
        counts = Counter(ids[0] for ids in generate(model, [[1]], n, max_new_tokens=1, top_p=top_p)[0])
        share = [x / sum(p[j] for j in kept) if i in kept else 0 for i, x in enumerate(p)]
        assert set(counts) == set(kept) and chi_square(counts, share, n) < 16.3
    assert len(Counter(ids[0] for ids in generate(model, [[1]], n, max_new_tokens=1)[0])) == 4


def test_greedy_ignores_the_seed():
    """Temperature 0 as a division by a small number: greedy results that depend on a seed or on n."""
    model, prompts = toy(), prompts_of(3, 6)
    a, b = (generate(model, prompts, 2, max_new_tokens=6, temperature=0, seed=s) for s in (0, 99))
    assert a == b and all(first == second for first, second in a)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of other C libraries has no such switch")
def test_freed_memory_is_used_again():
    """A large tensor mapped anew each time costs a page fault for every 4 KB of it: more than to compute it."""
    keep_freed_memory()
    faults = []
    for _ in range(4):
        torch.zeros(2**25).exp_()  # 128 MB, 32,768 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[-2] < 1000


def test_empty_prompt_is_refused():
    """An index of -1 that silently reads another row's logits."""
    with pytest.raises(ValueError, match="empty prompt"):
        generate(toy(), [[1], []])


# --- judging and files ---


def problem_of(text="Mia had 3 pens, found 4. How many now?", answer="7", name="p"):
    return Problem(name, text, "", answer)


def test_an_unfinished_solution_is_wrong():
    """A right answer by accident of where the budget cut ('#### 18' of '#### 180'); the end of text in the text."""
    ids = TOKENIZER.encode("3 + 4 = 7\n#### 7")
    done, cut = (solution_row(x, problem_of(), TOKENIZER) for x in (ids + [EOS], ids))
    assert done["ended"] and done["correct"] and done["ids"][-1] == EOS and done["text"] == "3 + 4 = 7\n#### 7"
    assert not cut["ended"] and cut["correct"] is False and cut["text"] == done["text"]
    assert solution_row([], problem_of(), TOKENIZER) == dict(ids=[], text="", ended=False, correct=False)
    assert not solution_row([EOS], problem_of(), TOKENIZER)["correct"]


class Script(Policy):
    """A policy whose generate() is a function of (prompt, prefix, sample); it counts what it was asked."""

    def __init__(self, problems, continuation):
        super().__init__(None, TOKENIZER, "{question}\n")
        self.continuation, self.calls = continuation, []
        self.prompts = sorted(((self.prompt(p), p) for p in problems), key=lambda x: -len(x[0]))

    def generate(self, prompts, n=1, *, streams, max_new_tokens, temperature, seed):
        out = []
        for ids, (stem, number), budget in zip(prompts, streams, max_new_tokens, strict=True):
            start, problem = next((s, p) for s, p in self.prompts if ids[: len(s)] == s)
            assert n == 1 and stem == len(start), "one stream for all prefixes of a problem"
            prefix = ids[stem:]
            self.calls.append((problem.id, tuple(prefix), number, budget))
            out.append([list(self.continuation(problem, prefix, number))[:budget]])
        return out


def end(text):
    return TOKENIZER.encode(text) + [EOS]


def small_policy(slots=None):
    model = toy(vocab_size=TOKENIZER.vocab_size + 9, eos_token_id=EOS, tie_word_embeddings=True, std=0.05)
    return Policy(model, TOKENIZER, "{question}\n", slots)


def test_sampling_resumes(tmp_path):
    """Rows drawn again or differently after a crash; a half-written last line that breaks, or stays in, the file."""
    policy, problems, path = small_policy(), load_problems("arithmetic", limit=20), tmp_path / "r.jsonl"
    options = dict(n=256, max_new_tokens=3, temperature=1.0, seed=1)  # 16 problems between two writes
    rows = sample(policy, problems, path, **options)
    whole = path.read_bytes()
    assert list(rows) == [p.id for p in problems] and rows == {r["id"]: r for r in read_rows(path)}
    lines = whole.splitlines(keepends=True)
    half = b"".join(lines[:13]) + lines[13][: len(lines[13]) // 2]
    no_newline = b"".join(lines[:13]) + lines[13][:-1]
    for damaged in (b"".join(lines[:13]), half, no_newline, b"", lines[0][:5]):
        path.write_bytes(damaged)
        assert sample(policy, problems, path, **options) == rows and path.read_bytes() == whole
    before = dict(policy.stats)
    assert sample(policy, problems, path, **options) == rows and policy.stats == before, "nothing drawn again"
    path.unlink()
    assert sample(small_policy(slots=5), problems[:3], path, **options) == {p.id: rows[p.id] for p in problems[:3]}


def test_read_rows_cuts_half_a_line(tmp_path):
    """A crash in the middle of a line loses the file; damage elsewhere is passed over in silence."""
    path = tmp_path / "x.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"id": 1, "text": "日本\u2028\r"}, {"id": 2}])
    good = path.read_bytes()
    for tail in (b'{"id": 3', b"\xe6\x97", b"{"):
        path.write_bytes(good + tail)
        assert [r["id"] for r in read_rows(path)] == [1, 2] and path.read_bytes() == good
    path.write_bytes(good[:-1])
    assert [r["id"] for r in read_rows(path)] == [1, 2] and path.read_bytes() == good, "whole but for the newline"
    path.write_bytes(b'{"id": 1}\r{"id": 2}\n' + good)
    with pytest.raises(DataError, match=":1: not JSON"):
        read_rows(path)
    assert path.read_bytes().endswith(good), "nothing taken off behind a carriage return"
    path.write_bytes(b'{"id": \n' + good)
    with pytest.raises(DataError, match=":1: not JSON"):
        read_rows(path)


def test_write_json_is_never_half(tmp_path, monkeypatch):
    """A crash while writing leaves neither the old nor the new file."""
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


# --- selection ---


def solution(text, correct=True, ended=True):
    return dict(ids=TOKENIZER.encode(text) + [EOS] * ended, text=text, ended=ended, correct=correct)


def test_diverse_solutions():
    """Copies kept as new solutions; near copies preferred to different ones; more than the limit."""
    base = "3 + 4 = 7\n7 + 2 = 9\n#### 9"
    near, far = "3 + 4 = 7\n7 + 1 = 9\n#### 9", "3 + 2 = 5\n5 + 4 = 9\n#### 9"
    texts = [base, base, near, far]
    assert [s["text"] for s in unique([solution(t) for t in texts])] == [base, near, far]
    assert [s["text"] for s in select_diverse([solution(t) for t in texts], 2)] == [base, far]
    many = [solution(f"{i} + 4 = {i + 4}\n#### 9") for i in range(9)]
    assert len(select_diverse(many)) == 4 and len(select_diverse(many, 20)) == 9 and select_diverse([], 4) == []
    bare = [solution("#### 9"), solution("#### 9"), solution("#### 8")]
    assert len(select_diverse(bare)) == 2, "no equations: by text"


def test_values_that_reach_a_solution():
    """Unfinished solutions, copies, or more than asked for; V(x) not from the samples."""
    samples = [solution("#### 9"), solution("#### 8", False), solution("#### 8", False),
               solution("#### 7", False, False), solution("#### 6", False), solution("#### 5", False)]  # fmt: skip
    chosen = to_value([problem_of(name="a")], {"a": {"samples": samples}}, 2, 5)
    assert list(chosen) == [("a", 0), ("a", 1), ("a", 4)]
    assert {v for _, _, v in chosen.values()} == {1 / 6} and [c for _, c, _ in chosen.values()] == [True, False, False]


# --- values and pits ---


def test_first_of_the_least():
    """The last of several equal least values taken for the pit; V(x) itself taken for a step; None for a value."""
    assert first_pit([0.0, 0.5, 0.2, 0.2, 0.4]) == 2 and first_pit([0.5, 0.0]) == 1
    assert first_pit([0.1, 0.3, 0.0, 0.0, 0.0]) == 2 and first_pit([0.5, None, 0.5, None, 0.0]) == 4


def test_advantages_by_hand():
    """Eq. 3 against the value of the wrong prefix: an advantage too many, or of step i + 1."""
    assert advantages([0.5, 0.75, 0.25, 1.0]) == [0.25, -0.5, 0.75]
    values = np.random.default_rng(0).random(9).tolist()
    assert sum(advantages(values)) == pytest.approx(values[-1] - values[0])


def test_best_of_k():
    """False pits of weak policies: K failures in a row have probability (1 - q)^K."""
    assert [best_of(0.5, 5), best_of(0, 5), best_of(1, 5), best_of(0.3, 1)] == pytest.approx([1 - 0.5**5, 0, 1, 0.3])


def scan_of(scan, truth):
    """Values and questions asked when the truth is `truth`: [V, Q_1..Q_L], Q_L = 0."""
    values, asked = [truth[0]] + [None] * (len(truth) - 2) + [0.0], 0
    while wanted := probe(scan, values):
        assert all(values[t] is None for t in wanted), "asked twice"
        for t in wanted:
            values[t] = truth[t]
            asked += 1
    return first_pit(values), asked


def test_scans_find_the_same_pit():
    """A scan that stops a step early or late, never ends, or costs as much as looking at everything."""
    rng, cost = random.Random(0), Counter()
    for _ in range(300):
        length = rng.randrange(1, 20)
        pit = rng.randrange(1, length + 1)
        truth = [rng.random()] + [rng.uniform(0.01, 1) for _ in range(pit - 1)] + [0.0] * (length - pit + 1)
        truth[0] = rng.choice([0.0, truth[0]])  # an unlucky V(x) of 0 is no pit
        for scan in ("full", "first", "sequential", "bisect"):
            found, asked = scan_of(scan, truth)
            assert found == pit, (scan, truth)
            cost[scan] += asked
            assert asked <= (math.ceil(math.log2(length)) + 1 if scan == "bisect" else length - 1)
    assert cost["bisect"] < cost["first"] < cost["full"]
    assert scan_of("first", [0.5, 0.0, 0.0, 0.0, 0.0])[1] == 1 == scan_of("full", [0.5, 0.2, 0.0])[1]


GOOD, BAD = "3 + 4 = 7\n", "7 + 9 = 16\n"
WRONG = GOOD + BAD + "#### 16"
RIGHT = GOOD + "7 + 2 = 9\n#### 9"


def nine():
    return problem_of("Mia had 3 pens, found 4, got 2. How many now?", "9", "q")


def lucky(problem, prefix, i):
    """Right in samples 0 and 2 unless the bad step is in the prefix; the ends after `GOOD` differ."""
    text = TOKENIZER.decode(prefix)
    if "16" in text or i not in (0, 2):
        return end("#### 16")
    return end(("7 + 2 = 9\n" if i == 0 else "") + "#### 9") if prefix else end(RIGHT)


def valued(tmp_path, scan="full", k=4, text=WRONG, correct=False, continuation=lucky, budget=64, name="v.jsonl"):
    script = Script([nine()], continuation)
    solutions = {("q", 3): (end(text), correct, 0.375)}
    rows = estimate_values(script, {"q": nine()}, solutions, tmp_path / name, k=k, scan=scan, max_new_tokens=budget,
                           temperature=1.0, seed=0)  # fmt: skip
    return rows["q", 3], script


def test_samples_by_their_number():
    """Sample 3 drawn alone is another one than sample 3 of five: a scan in portions would see other rollouts. Or its
    end drawn anew is another one: rollouts known from an earlier prefix would not be those of the full scan."""
    model = toy(std=0.3)
    prompts, options = [[5, 6, 7], [5, 6]], dict(max_new_tokens=6, seed=3, stop_ids=[EOS])
    whole = generate(model, prompts, 5, **options)
    for first, n in ((0, 1), (1, 1), (2, 3)):
        part = generate(model, prompts, n, streams=[(3, first), (2, first)], **options)
        assert part == [samples[first : first + n] for samples in whole]
    for j, ids in enumerate(whole[1]):
        cuts = range(len(ids))
        ends = generate(model, [[5, 6, *ids[:c]] for c in cuts], streams=[(2, j)] * len(cuts),
                        **options | dict(max_new_tokens=[6 - c for c in cuts]))  # fmt: skip
        assert [end for (end,) in ends] == [ids[c:] for c in cuts]
    assert generate(model, [[5, 6, 7]], streams=[(2, 0)], **options) != [whole[0][:1]], "the stem names the stream"


@pytest.mark.parametrize("k", [1, 4, 7, 16])
def test_sequential_scan_finds_the_pit_of_the_first_scan_for_less(tmp_path, k):
    """A portion that is drawn twice or passes K, a lucky late rollout that is missed, a cost as of the whole scan."""
    problems = {p.id: p for p in load_problems("arithmetic", limit=12, steps=3)}
    wrong = {}
    for p in problems.values():
        rng = random.Random(p.id)
        for i in range(3):
            lines = [line for line in p.solution.split("\n") if line]
            lines.insert(rng.randrange(len(lines)), "1 + 1 = 2")
            wrong[p.id, i] = end("\n".join(lines[:-1] + ["#### 99"])), False, 0.5

    def luck(problem, prefix, i):  # right in some samples, the later the prefix the fewer
        right = random.Random(f"{problem.id} {prefix} {i}").random() < 0.6 / (1 + len(prefix) // 6)
        return end(f"#### {problem.answer if right else 98}")

    rows, cost = {}, {}
    for scan in ("first", "sequential"):
        script = Script(list(problems.values()), luck)
        rows[scan] = estimate_values(script, problems, wrong, tmp_path / f"{scan}.jsonl", k=k, scan=scan,
                                     max_new_tokens=64, temperature=1.0, seed=0)  # fmt: skip
        assert len(set(script.calls)) == len(script.calls) and all(0 <= j < k for _, _, j, _ in script.calls)
        cost[scan] = len(script.calls)
    for key, row in rows["first"].items():
        other = rows["sequential"][key]
        assert other["pit"] == row["pit"]
        assert [v is not None and v > 0 for v in other["values"]] == [v is not None and v > 0 for v in row["values"]]
        assert bool(other["right"]) == bool(row["right"]) and all(way in row["right"] for way in other["right"])
    assert cost["sequential"] <= cost["first"] and (k < 7 or cost["sequential"] < 0.75 * cost["first"])


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("scan", ["full", "first", "sequential"])
def test_rollouts_that_are_known_are_not_drawn(tmp_path, scan, k):
    """What was paid for drawn again, counted twice or in one scan only; the solution itself, chosen because it is
    wrong, taken for a rollout; a rollout that left the solution taken for one of its later steps."""
    late, own = GOOD + BAD + "16 + 1 = 17\n#### 9", GOOD + BAD + "16 + 1 = 17\n#### 17"
    texts = ["#### 16", RIGHT, GOOD + BAD + "#### 9", GOOD + "#### 16", late, WRONG]  # by their numbers
    ends = np.cumsum([len(step) for step in split_steps(end(own), TOKENIZER)]).tolist()

    def one_stream(problem, prefix, i):
        ids = end(texts[i % 6])
        return ids[len(prefix) :] if ids[: len(prefix)] == prefix else end("#### 16")

    for number, given in enumerate(([], [RIGHT, "#### 9", WRONG, own, late], [own] * 5, [GOOD + "#### 9"] * 12)):
        samples = [solution(text, "#### 9" in text) for text in given]  # ours is number 3
        want, script = [0.5], Script([nine()], one_stream)
        for prefix in (end(own)[:cut] for cut in ends[:-1]):
            right = [s["correct"] for i, s in enumerate(samples) if s["ids"][: len(prefix)] == prefix and i != 3][:k]
            ways = [TOKENIZER.decode(one_stream(nine(), prefix, i)) for i in range(len(right), k)]
            want.append((sum(right) + sum("#### 9" in way for way in ways)) / k)
        want.append(0.0)
        row = estimate_values(script, {"q": nine()}, {("q", 3): (end(own), False, 0.5)}, tmp_path / f"{number}.jsonl",
                              rollouts={"q": {"samples": samples}} if given else None, k=k, scan=scan,
                              max_new_tokens=64, temperature=1.0, seed=0)["q", 3]  # fmt: skip
        seen = len(want) if scan == "full" else first_pit(want) + 1
        assert row["pit"] == first_pit(want)
        assert [v > 0 for v in row["values"][:seen]] == [v > 0 for v in want[:seen]]
        assert scan == "sequential" or row["values"][:seen] == want[:seen]
        for at, (_, prefix, j, _) in enumerate(script.calls):
            before = [x + tuple(one_stream(nine(), list(x), i)) for _, x, i, _ in script.calls[:at] if i == j]
            assert scan == "full" or all(way[: len(prefix)] != prefix for way in before), "known from an earlier step"


@pytest.mark.parametrize("scan", ["full", "first", "bisect"])
def test_a_known_pit_is_found(tmp_path, scan):
    """V(x) not from the samples, the terminal step rolled out instead of judged, the pit one step off."""
    row, script = valued(tmp_path, scan)
    assert row["values"][0] == 0.375 and row["values"][1:] == [0.5, 0.0, 0.0] and row["pit"] == 2
    steps = split_steps(end(WRONG), TOKENIZER)
    assert row["ends"] == list(np.cumsum([len(s) for s in steps])) and row["ends"][-1] == len(end(WRONG))
    assert row["ids"] == end(WRONG) and row["correct"] is False
    assert row["right"] == [end("7 + 2 = 9\n#### 9"), end("#### 9")], "the right ends found before the pit, each once"
    asked = Counter(prefix for _, prefix, _, _ in script.calls)
    assert tuple(end(WRONG)) not in asked and () not in asked and list(asked.values()) == [4, 4]


def test_terminal_value_is_the_verdict(tmp_path):
    """A rollout asked behind the end of text; step labels that contradict the final answer (prm800k#12)."""
    row, _ = valued(tmp_path, "first", text="#### 16")
    assert row["values"] == [0.375, 0.0] and row["pit"] == 1 and row["right"] == []
    unlucky, script = valued(tmp_path, "first", text=RIGHT, correct=True, name="b.jsonl",
                             continuation=lambda *_: end("#### 1"))  # fmt: skip
    assert unlucky["values"] == [0.375, 0.0, 0.0, 1.0] and len(script.calls) == 8, "a right solution is scanned in full"
    assert unlucky["pit"] == 1


def test_rollouts_get_what_is_left_of_the_budget(tmp_path):
    """max_new_tokens from every prefix (Self-Explore): values of solutions longer than any that is sampled."""
    ids, budget = end(WRONG), len(end(WRONG))
    for scan in ("full", "first"):
        row, script = valued(tmp_path, scan, budget=budget, name=scan)
        assert len(script.calls) == 8 and all(b == budget - len(prefix) for _, prefix, _, b in script.calls)
        assert row["ends"][-1] == len(ids)
    long = "3 + 4 = 7\n7 + 2 = 9\n#### 9"
    row, _ = valued(tmp_path, "full", budget=budget, name="c", continuation=lambda *_: end(long))
    assert row["values"][1:] == [0.0, 0.0, 0.0], "cut by the budget, so it did not end, so it is wrong"


def test_a_right_answer_in_another_form_is_no_pit(tmp_path):
    """Answer checks that miss '9.' for '9' turn good steps into pits (Self-Explore); one checker for all."""
    row, _ = valued(tmp_path, continuation=lambda p, x, i: [] if "16" in TOKENIZER.decode(x) else end("#### 9 ."))
    assert row["values"] == [0.375, 1.0, 0.0, 0.0] and row["pit"] == 2


def test_values_resume_and_share_prefixes(tmp_path):
    """Equal prefixes rolled out twice (two labels for one state); values lost or made again after a crash."""
    other = GOOD + BAD + "#### 17"
    solutions = {("q", i): (end(text), text == RIGHT, 0.5) for i, text in enumerate((WRONG, other, RIGHT))}
    path, options = tmp_path / "v.jsonl", dict(k=4, scan="full", max_new_tokens=64, temperature=1.0, seed=0)
    script = Script([nine()], lucky)
    rows = estimate_values(script, {"q": nine()}, solutions, path, **options)
    assert len(script.calls) == len(set(script.calls)) == 4 * 3, "GOOD once, then one each"
    assert list(rows) == list(solutions) and rows["q", 0]["values"][1] == rows["q", 1]["values"][1] == 0.5
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 30])
    again = Script([nine()], lucky)
    assert estimate_values(again, {"q": nine()}, solutions, path, **options) == rows and path.read_bytes() == whole
    idle = Script([nine()], None)
    assert estimate_values(idle, {"q": nine()}, solutions, path, **options) == rows and not idle.calls
    single = Script([nine()], lucky)
    single.portion = 1  # a write after each solution
    assert estimate_values(single, {"q": nine()}, solutions, tmp_path / "w.jsonl", **options) == rows
    assert (tmp_path / "w.jsonl").read_bytes() == whole


def test_value_is_a_mean_over_k(tmp_path):
    """Sums for means, or 'any of the K right' in place of the mean."""
    for k, q in ((1, 1.0), (2, 0.5), (3, 2 / 3), (8, 0.25)):
        row, script = valued(tmp_path, k=k, name=f"{k}.jsonl")
        assert row["values"][1] == pytest.approx(q) and {j for _, _, j, _ in script.calls} == set(range(k))


# --- pairs ---


def pairs_of(form, tmp_path, text=WRONG, samples=(RIGHT,), continuation=lucky, **options):
    row, script = valued(tmp_path, "full", text=text, continuation=continuation, name=f"{form}{len(text)}{options}")
    rollouts = {"q": {"samples": [solution(t) for t in samples] + [solution(text, False)]}}
    return make_pairs(form, script, {"q": nine()}, rollouts, {("q", 3): row}, **options), script


FORMS = {  # prompt behind the question, chosen, rejected; '$' is the end of text
    "continuation": (GOOD, "#### 9$", BAD),
    "step": (GOOD, "#### 9$", BAD),
    "algorithm1": ("", RIGHT + "$", GOOD + BAD),
    "response": ("", RIGHT + "$", WRONG + "$"),
    "farthest": ("", RIGHT + "$", WRONG + "$"),
}


def ids_of(text):
    return TOKENIZER.encode(text.rstrip("$")) + [EOS] * text.endswith("$")


@pytest.mark.parametrize("form", FORMS)
def test_five_forms_of_pairs(tmp_path, form):
    """End of text on a step that was cut out teaches to stop after a step (Step-DPO#25, #10); none where the solution
    ended never teaches to stop; prompt and answer tokenized together (trl#2054)."""
    [pair], script = pairs_of(form, tmp_path)
    prefix, chosen, rejected = FORMS[form]
    assert pair["prompt_ids"] == script.prompt(nine()) + ids_of(prefix)
    assert pair["chosen_ids"] == ids_of(chosen) and pair["rejected_ids"] == ids_of(rejected)
    assert (pair["id"], pair["form"], pair["pit"]) == ("q", form, 2)
    for side in ("prompt", "chosen", "rejected"):
        assert pair[side] == TOKENIZER.decode([i for i in pair[side + "_ids"] if i != EOS]) and pair[side]
        assert "<eos>" not in pair[side] and EOS not in pair[side + "_ids"][:-1]


def test_a_step_is_cut_out_of_its_continuation(tmp_path):
    """The whole continuation taken where Theorem 6.1 compares two steps: one side weighs more for its length."""
    [pair], _ = pairs_of("step", tmp_path, continuation=lambda p, x, i:
                         end("#### 16") if "16" in TOKENIZER.decode(x) else end("7 + 2 = 9\n#### 9"))  # fmt: skip
    assert pair["chosen_ids"] == ids_of("7 + 2 = 9\n") and pair["rejected_ids"] == ids_of(BAD)


@pytest.mark.parametrize("form", ["continuation", "step", "algorithm1"])
def test_a_pit_that_is_the_last_step_keeps_its_end(tmp_path, form):
    """End of text removed from a rejected last step, which did end."""
    text = GOOD + "7 + 2 = 9\n#### 8"
    [pair], _ = pairs_of(form, tmp_path, text=text, continuation=lambda *_: end("#### 9"))
    assert pair["pit"] == 3 and pair["rejected_ids"] == ids_of("#### 8$" if form != "algorithm1" else text + "$")


def test_chosen_never_begins_with_rejected(tmp_path):
    """A filter that tests the list instead of the string and so never fires (Self-Explore)."""
    def through(problem, prefix, i):  # right only by way of the rejected step itself
        return end(BAD + "#### 9") if prefix == TOKENIZER.encode(GOOD) else end("#### 1")

    assert pairs_of("continuation", tmp_path, continuation=through)[0] == []
    assert pairs_of("step", tmp_path, continuation=through)[0] == []
    for form in ("algorithm1", "response"):
        [pair], _ = pairs_of(form, tmp_path, samples=(GOOD + BAD + "#### 9", RIGHT), continuation=through, seed=1)
        assert pair["chosen_ids"][: len(pair["rejected_ids"])] != pair["rejected_ids"]
    [pair], _ = pairs_of("algorithm1", tmp_path, samples=(GOOD + BAD + "#### 9", RIGHT), continuation=through, seed=2)
    assert pair["chosen_ids"] == ids_of(RIGHT + "$")


def test_before_the_first_step_any_right_solution_will_do(tmp_path):
    """Pits at step 1 lost, because nothing is rolled out from the empty prefix."""
    [pair], script = pairs_of("continuation", tmp_path, text=BAD + "#### 16", continuation=lambda *_: end("#### 1"))
    assert pair["pit"] == 1 and pair["prompt_ids"] == script.prompt(nine())
    assert pair["chosen_ids"] == ids_of(RIGHT + "$") and pair["rejected_ids"] == ids_of(BAD)


def test_no_pair_without_a_right_way(tmp_path):
    """A pair invented where no right continuation is known, or one made of a right solution."""
    assert pairs_of("response", tmp_path, samples=())[0] == []
    hopeless = dict(continuation=lambda *_: end("#### 1"))  # the pit is step 1, which every right solution shares
    assert pairs_of("continuation", tmp_path, **hopeless)[0] == [] == pairs_of("step", tmp_path, **hopeless)[0]
    row, script = valued(tmp_path, text=RIGHT, correct=True, name="right")
    rollouts = {"q": {"samples": [solution(RIGHT)]}}
    assert make_pairs("continuation", script, {"q": nine()}, rollouts, {("q", 3): row}) == []


def test_farthest_takes_the_most_edits(tmp_path):
    """The nearest taken for the farthest."""
    near, far = GOOD + BAD + "16 - 7 = 9\n#### 9", "4 - 2 = 2\n2 + 7 = 9\n9 - 0 = 9\n9 + 0 = 9\n#### 9"
    for samples in ((near, far), (far, near)):
        for seed in (0, 1):
            [pair], _ = pairs_of("farthest", tmp_path, samples=samples, seed=seed)
            assert pair["chosen_ids"] == ids_of(far + "$")


def test_at_most_so_many_pairs_a_problem(tmp_path):
    """One hard problem that fills the training set."""
    row, script = valued(tmp_path)
    values = {("q", i): row for i in range(6)}
    rollouts = {"q": {"samples": [solution(RIGHT)]}}
    assert len(make_pairs("response", script, {"q": nine()}, rollouts, values, limit=3)) == 3


# --- command line ---


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["rollout.py", *map(str, arguments)])
    try:
        rollout.entry(rollout.main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    policy = small_policy()
    policy.model.save_pretrained(tmp_path / "m")
    policy.tokenizer.save(tmp_path / "m")
    rows = [dict(prompt=p.question, answer=p.answer) for p in load_problems("arithmetic", limit=3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("flags", [
    ["--nonsense", "1"], ["--samples", "many"], ["--data", "none.jsonl"], ["--model", "nowhere"], ["--dtype", "int8"],
    ["--device", "cuda:99"], ["--prompt", "no question"], ["--values", "1", "--scan", "backwards"],
    ["--samples", "0"],
], ids=lambda flags: " ".join(flags[-2:]))  # fmt: skip
def test_bad_flags_are_one_line(folder, monkeypatch, capsys, flags):
    """A traceback, or an option that is silently taken for another (Next-Token-Failures), for a mistyped flag."""
    good = ["--model", folder / "m", "--data", folder / "p.jsonl", "--out", folder / "o", "--samples", 2,
            "--max-new-tokens", 4, "--threads", 1]  # fmt: skip
    code, output = run_cli(monkeypatch, capsys, *good, *flags)
    assert code == 2 and output.err.count("\n") == 1 and output.err.startswith("error: "), output.err
    assert "Traceback" not in output.err


def test_another_question_to_the_same_folder(folder, monkeypatch, capsys):
    """Rows of an old temperature, budget or model passed off as the answer to a new command."""
    good = ["--model", folder / "m", "--data", folder / "p.jsonl", "--out", folder / "o", "--max-new-tokens", 4,
            "--threads", 1]  # fmt: skip
    assert run_cli(monkeypatch, capsys, *good, "--samples", 2)[0] == 0
    code, output = run_cli(monkeypatch, capsys, *good, "--samples", 2)
    assert code == 0 and "6 solutions of 3 problems" in output.out, "the same command goes on"
    for flags in (["--samples", 3], ["--samples", 2, "--temperature", 0.1], ["--samples", 2, "--seed", 9]):
        code, output = run_cli(monkeypatch, capsys, *good, *flags)
        assert code == 2 and "--out" in output.err, output

"""train.py: losses, masks, gradients, Theorem 6.1, the loop and its resume. Each docstring names the bug it guards."""

import copy
import csv
import math
import random
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import builtin_tokenizer, load_problems
from evaluate import COLUMNS
from model import GPT, Config
from rollout import Policy, UsageError, load_policy, parse
from train import (
    Example,
    TrainConfig,
    add_reference,
    awr_weights,
    backward,
    collate,
    dpo_loss,
    draw,
    fit,
    learning_rate,
    micro_batches,
    resolve,
    sequence_logprobs,
    token_logprobs,
)

TOKENIZER = builtin_tokenizer()
EOS = TOKENIZER.eos_id
TOY = dict(model_type="llama", vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_hidden_layers=2,
           num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64,
           tie_word_embeddings=True, eos_token_id=EOS)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(seed=0, std=0.2, **changes):
    torch.manual_seed(seed)
    model = GPT(Config.from_hf(TOY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def config(**changes):
    small = dict(batch=4, warmup=0.25, device="cpu", dtype="float32", threads=1, seed=3)
    return resolve(replace(TrainConfig(), **small | changes))


def texts(n, seed=0, longest=9, eos=True):
    rng = random.Random(seed)
    draw_ids = lambda low: [rng.randrange(1, TOKENIZER.vocab_size) for _ in range(rng.randrange(low, longest))]  # noqa: E731
    return [(draw_ids(1), draw_ids(1) + [EOS] * (eos and rng.random() < 0.7)) for _ in range(n)]


def examples_of(n, weights=False, seed=0):
    rng = random.Random(seed)
    return [Example(f"p{i}", p, r, [rng.random() * 3 for _ in r] if weights else None)
            for i, (p, r) in enumerate(texts(n, seed))]  # fmt: skip


def pairs_of(n, seed=1):
    return [dict(id=f"q{i}", prompt_ids=p, chosen_ids=c, rejected_ids=r)
            for i, ((p, c), (_, r)) in enumerate(zip(texts(n, seed), texts(n, seed + 100), strict=True))]  # fmt: skip


def gradients(model, *arguments):
    model.zero_grad(set_to_none=True)
    log = backward(model, *arguments)
    return log, torch.cat([p.grad.flatten().clone() for p in model.parameters()])


# --- log-probabilities ---


def test_three_tokens_by_hand():
    """A shifted mask off by one: the first response token untrained, the last prompt token trained (minimind#621)."""
    model, (prompt, response) = toy(), ([5, 9], [7, 3, EOS])
    logits = model(torch.tensor([prompt + response]))[0]
    want = [F.log_softmax(logits[position], -1)[token] for position, token in zip((1, 2, 3), response, strict=True)]
    got = token_logprobs(model, [(prompt, response)])
    torch.testing.assert_close(got, torch.stack(want))
    torch.testing.assert_close(sequence_logprobs(model, [(prompt, response)]), torch.stack(want).sum()[None])


def test_masks_come_from_lengths():
    """Masks made from '!= pad' where pad is the end of text: never learns to stop, or trains on padding (trl#4970,
    MemGen#33); a prompt of one token; an end of text inside the prompt."""
    sequences = [([4, EOS, 6], [EOS]), ([8], [2, EOS, 5, EOS]), ([1, 2, 3], [4, 5])]
    ids, tree, *places = collate(sequences, "cpu")
    assert ids.tolist() == [[4, 0, 6, 0], [8, 2, 0, 5], [1, 2, 3, 4]] and ids.dtype == torch.long and tree is None
    row, column, target = (place.tolist() for place in places)
    assert target == [token for _, response in sequences for token in response]
    assert list(zip(row, column, strict=True)) == [(0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]


@pytest.mark.parametrize("family", [
    TOY, TOY | dict(model_type="mistral", sliding_window=5),
    dict(model_type="gpt2", vocab_size=TOKENIZER.vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=259)])
def test_two_responses_behind_one_prompt(family):
    """A response that sees the other one or misses the prompt, positions that run on from one to the other, a first
    token predicted by the end of the other response; texts longer than a block of queries; beside rows with one."""
    model, ids = toy(**family), lambda n: torch.randint(1, TOKENIZER.vocab_size, (n,)).tolist()
    for size in (6, 130):
        together = [(ids(size), ids(4), ids(size)), (ids(2), ids(size), ids(1)), (ids(size), ids(9))]
        apart = [(prompt, response) for prompt, *responses in together for response in responses]
        results = []
        for sequences in (together, apart):
            model.zero_grad()
            values = sequence_logprobs(model, sequences)
            values.sin().sum().backward()  # each response weighs differently
            results.append((values.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    if family["model_type"] == "gpt2":  # 259 positions, where a row of `together` has 262 columns: positions count
        with pytest.raises(ValueError, match="260 tokens, but the model has only 259 positions"):
            sequence_logprobs(model, [(ids(130), ids(1), ids(131))])


def test_each_row_alone():
    """Padding that leaks into shorter rows, or log-probabilities given to the wrong row."""
    model, sequences = toy(), texts(9)
    alone = [token_logprobs(model, [s]) for s in sequences]
    torch.testing.assert_close(token_logprobs(model, sequences), torch.cat(alone))
    torch.testing.assert_close(sequence_logprobs(model, sequences), torch.stack([a.sum() for a in alone]))


def test_inputs_are_not_edited():
    """Labels edited in place, so that the normaliser counts prompt and padding (nano-aha-moment: 3 became 8)."""
    model, c = toy(), config(nll=1.0)
    examples, pairs = examples_of(5, weights=True), pairs_of(4)
    add_reference(model, pairs, 50)
    before = copy.deepcopy((examples, pairs))
    backward(model, examples, pairs, c)
    assert (examples, pairs) == before


def test_nll_is_a_mean_over_response_tokens():
    """The normaliser counts prompt or padding; a mean of means that weighs short answers more."""
    model, examples = toy(), examples_of(6)
    rows = [token_logprobs(model, [(e.prompt, e.response)]) for e in examples]
    want = -torch.cat(rows).mean().item()
    log, _ = gradients(model, examples, [], config())
    assert log["nll"] == pytest.approx(want, rel=1e-5) and log["loss"] == log["nll"]
    weighted = [replace(e, weights=[2.0] * len(e.response)) for e in examples]
    assert gradients(model, weighted, [], config())[0]["nll"] == pytest.approx(2 * want, rel=1e-5)


def test_weights_meet_their_tokens():
    """Eq. 4's weights given to the tokens of another row once the rows are sorted by length."""
    model, examples = toy(), examples_of(6, weights=True)
    total = sum(len(e.response) for e in examples)
    rows = [token_logprobs(model, [(e.prompt, e.response)]) for e in examples]
    want = -sum((row * torch.tensor(e.weights)).sum().item() for row, e in zip(rows, examples, strict=True)) / total
    for tokens in (1, 40, 9999):
        assert backward(model, examples, [], config(micro_tokens=tokens))["nll"] == pytest.approx(want, rel=1e-5)


def test_chunks_change_nothing():
    """The full fp32 log-softmax over a large vocabulary runs out of memory (LlamaFactory#10720); cut wrongly, it
    drops or repeats tokens, or loses their gradient."""
    model, sequences = toy(), texts(7)
    results = []
    for chunk in (2**24, TOKENIZER.vocab_size * 5, 1):
        model.zero_grad()
        values = token_logprobs(model, sequences, chunk)
        (values * torch.arange(len(values))).sum().backward()
        results.append((values.detach(), [p.grad.clone() for p in model.parameters()]))
    for values, grads in results[1:]:
        torch.testing.assert_close(values, results[0][0])
        torch.testing.assert_close(grads, results[0][1], rtol=1e-4, atol=1e-4)


def test_logits_exist_only_under_the_mask():
    """Logits of the prompt, which nobody reads, are most of the memory of a long prompt."""
    model, seen, plain = toy(), [], GPT.logits
    model.logits = lambda hidden: seen.append(hidden.shape[:-1].numel()) or plain(model, hidden)
    token_logprobs(model, [([3] * 40, [5, 6]), ([4], [7])])
    assert sum(seen) == 3
    seen.clear()
    token_logprobs(model, [([3], list(range(1, 21)))], chunk=TOKENIZER.vocab_size * 4)
    assert max(seen) == 4 and sum(seen) == 20


# --- batches ---


def test_micro_batches():
    """An item lost, twice, or over the limit; the longest not in the first step (unsloth#1624: out of memory late)."""
    rng = random.Random(0)
    for tokens in (1, 30, 100, 10**6):
        items = [(i, rng.randrange(1, 60)) for i in range(50)]
        groups = micro_batches(items, lambda x: x[1], tokens)
        assert sorted(sum(groups, [])) == items and groups[0][0][1] == max(length for _, length in items)
        for group in groups:
            assert len(group) == 1 or max(length for _, length in group) * len(group) <= tokens
    assert micro_batches([], len, 5) == []


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_micro_batch_size_never_changes_the_gradient(nll):
    """A mean per micro-batch instead of per batch: the gradient depends on how memory was saved."""
    model, examples, pairs = toy(), examples_of(7) if nll else [], pairs_of(6)
    add_reference(model, pairs, 9999)
    model = toy(seed=5)
    (log, want), *others = [gradients(model, examples, pairs, config(nll=nll, micro_tokens=m)) for m in (10**6, 60, 1)]
    assert want.abs().max() > 1e-3
    for other, grad in others:
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)
        assert other == pytest.approx(log, rel=1e-4, abs=1e-6)
    (_, want), *others = [gradients(model, examples_of(7, True), [], config(micro_tokens=m)) for m in (10**6, 60, 1)]
    for _, grad in others:
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_batch_order():
    """Options that nothing reads, or that change the result (Next-Token-Failures)."""
    model, examples = toy(), examples_of(5)
    _, want = gradients(model, examples, [], config())
    model.gradient_checkpointing = True
    torch.testing.assert_close(gradients(model, examples[::-1], [], config())[1], want, rtol=1e-4, atol=1e-6)


def test_batches_cover_each_epoch_once():
    """A batch skipped or repeated (nano-aha-moment), the same order in every epoch, a seed that nobody reads."""
    for n, batch in ((10, 4), (7, 7), (5, 8), (1, 3), (12, 5)):
        stream = [i for step in range(3 * n) for i in draw(n, batch, step, 0)]
        for epoch in range(3):
            assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert draw(10, 4, 9, 0) == draw(10, 4, 9, 0) != draw(10, 4, 9, 1)
    assert [draw(50, 50, step, 0) for step in (0, 1)][0] != draw(50, 50, 1, 0)


def test_learning_rate_ends():
    """A first step of rate 0, a warm-up that never reaches the peak, a cosine that ends at 0 or rises again."""
    for steps in (1, 2, 10, 100, 1000):
        rates = [learning_rate(s, steps, 2.0, 0.1) for s in range(steps)]
        up = max(1, round(0.1 * steps))
        assert rates[0] > 0 and rates[up - 1] == 2.0 and min(rates[up:], default=2) >= 0.2
        assert rates[:up] == sorted(rates[:up]) and rates[up:] == sorted(rates[up:], reverse=True)
        assert steps == up or learning_rate(steps, steps, 2.0, 0.1) == pytest.approx(0.2)
    assert learning_rate(0, 100, 1.0, 0.1) == pytest.approx(0.1)
    assert learning_rate(55, 100, 1.0, 0.1) == pytest.approx(0.55)
    assert learning_rate(0, 100, 1.0, 0.0) == 1.0, "no warm-up"


# --- Eq. 1 and Eq. 4 ---


def test_at_the_reference_ln_2():
    """Precomputed reference log-probabilities that do not match the data (trl#2423), in another dtype (dpo#34), or
    summed with the wrong sign: at step 0 the loss must be ln 2 and the margin 0."""
    model, pairs = toy(), pairs_of(7)
    add_reference(model, pairs, 60)
    for p in pairs:
        both = [(p["prompt_ids"], p["chosen_ids"]), (p["prompt_ids"], p["rejected_ids"])]
        want = [sequence_logprobs(model, [side]).item() for side in both]
        assert p["reference"] == pytest.approx(want, abs=1e-4), "each pair its own"
        assert isinstance(p["reference"][0], float), "no graph kept alive"
    log = backward(model, [], pairs, config(nll=0.0))
    assert log["dpo"] == pytest.approx(math.log(2), abs=1e-6) and log["margin"] == pytest.approx(0, abs=1e-5)
    assert log["chosen"] == pytest.approx(np.mean([p["reference"][0] for p in pairs]), abs=1e-3)
    assert log["rejected"] == pytest.approx(np.mean([p["reference"][1] for p in pairs]), abs=1e-3)


def test_eq_1_by_hand():
    """Rewards without beta, a mean over tokens where Eq. 1 sums, chosen and rejected exchanged."""
    loss, margin = dpo_loss(*(torch.tensor([x, 2 * x]) for x in (-1.0, -3.0, -2.0, -2.5)), 0.3)
    torch.testing.assert_close(margin, torch.tensor([0.3 * 1.5, 0.3 * 3.0]))
    torch.testing.assert_close(loss, -torch.log(torch.sigmoid(margin)))
    model, before = toy(), pairs_of(5)
    add_reference(model, before, 999)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    log = [backward(model, [], before, config(nll=0.0)), optimizer.step(), optimizer.zero_grad()][0]
    after = backward(model, [], before, config(nll=0.0))
    assert after["dpo"] < log["dpo"] and after["margin"] > 0 and after["accuracy"] > 0.5
    gap = lambda x: x["chosen"] - x["rejected"]  # noqa: E731
    assert after["margin"] == pytest.approx(0.3 * (gap(after) - gap(log)), abs=1e-3), "both logged (dpo#8, #32)"


def test_likelihood_beside_eq_1():
    """No likelihood term although asked for, or at the wrong weight: the chosen log-probability falls (dpo#36)."""
    model, examples, pairs = toy(), examples_of(3), pairs_of(3)
    add_reference(model, pairs, 999)
    _, nll = gradients(model, examples, [], config())
    log, dpo = gradients(model, [], pairs, config(nll=0.0))
    both, grad = gradients(model, examples, pairs, config(nll=0.4))
    torch.testing.assert_close(grad, dpo + 0.4 * nll, rtol=1e-4, atol=1e-6)
    assert both["loss"] == pytest.approx(log["dpo"] + 0.4 * both["nll"], rel=1e-5)


def test_awr_weights_by_hand():
    """The weight of a step on the tokens of its neighbour; A * beta for A / beta; a weight that overflows."""
    weights = awr_weights([0.5, 0.75, 0.25, 1.0], [2, 3, 6], 0.5)
    want = [math.exp(0.5)] * 2 + [math.exp(-1)] + [math.exp(1.5)] * 3
    assert weights == pytest.approx(want)
    assert max(awr_weights([0.0, 1.0], [1], 0.01)) == 20 and awr_weights([0.5, 0.5], [3], 0.1) == [1, 1, 1]


ADVANTAGE = torch.tensor([1.0, 0.4, 0.0, -0.5, -1.0], dtype=torch.float64)
SFT = torch.tensor([0.05, 0.15, 0.2, 0.25, 0.35], dtype=torch.float64)
BETA = 0.4


def optimum(loss):
    """The softmax policy that minimises loss(log pi), from pi_sft on."""
    logits = SFT.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def pair_loss(weights):
    """The exact expectation of Eq. 1 over pairs (a chosen, b rejected) of probability weights[a, b]."""
    a, b = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    a, b, reference = a.flatten(), b.flatten(), SFT.log()
    return lambda logp: (weights.flatten() * dpo_loss(logp[a], logp[b], reference[a], reference[b], BETA)[0]).sum()


def distance(p, q):
    return 0.5 * (p - q).abs().sum().item()


def test_theorem_6_1_in_a_table():
    """Pairs drawn as the paper's text says literally instead of as its proof needs: then Eq. 1 has another optimum than
    Eq. 4. Draw two steps from pi_sft, let sigma(A_a - A_b) say which is the better one."""
    want = SFT * (ADVANTAGE / BETA).exp()
    want /= want.sum()
    prefers = torch.sigmoid(ADVANTAGE[:, None] - ADVANTAGE[None])  # a over b
    drawn_twice = 2 * SFT[:, None] * SFT[None] * prefers
    assert drawn_twice.sum().item() == pytest.approx(1)
    assert distance(optimum(pair_loss(drawn_twice)), want) < 0.01
    literal = SFT[None] * prefers / prefers.sum(0)
    assert distance(optimum(pair_loss(literal)), want) > 0.3
    weights = torch.tensor([awr_weights([0.0, a], [1], BETA)[0] for a in ADVANTAGE.tolist()], dtype=torch.float64)
    assert distance(optimum(lambda logp: -(SFT * weights * logp).sum()), want) < 0.01, "Eq. 4"
    assert distance(SFT, want) > 0.5


# --- bf16 weights ---


def rounded(x, seed=0):
    return train.round_stochastically(x.clone(), torch.Generator().manual_seed(seed))


def test_stochastic_rounding_is_right_on_average():
    """A bias of half a bit, which thousands of steps add up; a number that has a bf16 moved off it; rounding of
    negative numbers towards zero only."""
    n, ulp = 2**17, 2.0**-7
    for share in (0.0, 0.1, 0.5, 0.9):  # of the way from 1 to its upper neighbour in bf16
        for sign in (1.0, -1.0):
            x = torch.full((n,), sign * (1 + share * ulp))
            y = rounded(x)
            assert torch.equal(y, y.bfloat16().float()) and set(y.abs().tolist()) <= {1.0, 1 + ulp}
            deviation = ulp * math.sqrt(share * (1 - share) / n)
            assert abs(y.double().mean() - x.double().mean()) <= 4 * deviation
    exact = torch.cat([torch.randn(1000) * 10.0**e for e in range(-30, 30)]).bfloat16().float()
    exact = torch.cat([exact, torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    assert torch.equal(rounded(exact), exact)


def small_steps(steps=200, lr=1e-4, **options):
    """A weight of 1 after `steps` updates of lr against a constant gradient, 4096 times; a bf16's half ulp is 2e-3."""
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = train.RoundingAdamW([p], seed=0, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, **options)
    for _ in range(steps):
        p.grad = torch.full_like(p, 0.25)
        optimizer.step()
    return p.detach().float()


def test_updates_below_half_an_ulp_arrive(monkeypatch):
    """Every small update lost by rounding to nearest, so that nothing is learned at a low rate; one draw for all
    numbers, steps or chunks, so that they move together."""
    moved = small_steps()
    assert moved.mean() == pytest.approx(1 - 200 * 1e-4, abs=5e-4) and len(moved.unique()) > 3
    chunked = small_steps(chunk=1000)
    assert chunked.mean() == pytest.approx(1 - 200 * 1e-4, abs=5e-4)
    parts = chunked.flatten()[:4000].split(1000)
    assert not any(torch.equal(parts[0], part) for part in parts[1:])
    monkeypatch.setattr(train, "round_stochastically", lambda x, _: x)  # copy_ then rounds to nearest
    assert (small_steps() == 1).all()


def test_rounding_adamw_is_adamw():
    """Another optimizer under the same name: a bias correction, the decay or a moment forgotten. One step from the same
    state is torch's in float32, up to one bf16 rounding; twenty steps stay near it."""
    torch.manual_seed(1)
    p, options = torch.nn.Parameter(torch.randn(300).bfloat16()), dict(lr=0.02, betas=(0.9, 0.99), weight_decay=0.1)
    q = torch.nn.Parameter(p.detach().float())
    mine, torchs = train.RoundingAdamW([p], seed=5, **options), torch.optim.AdamW([q], **options)
    for step in range(20):
        p.grad = torch.randn(300).bfloat16() * (1 + step % 3)
        q.grad = p.grad.float()
        mine.step(), torchs.step()
        states = zip((p, *(mine.state[p][k] for k in ("exp_avg", "exp_avg_sq"))),
                     (q, *(torchs.state[q][k] for k in ("exp_avg", "exp_avg_sq"))), strict=True)  # fmt: skip
        for a, b in states:
            assert (a.float() - b).abs().max() <= b.abs().max() * 2.0**-7 * math.sqrt(step + 1)
    assert p.dtype == mine.state[p]["exp_avg"].dtype == mine.state[p]["exp_avg_sq"].dtype == torch.bfloat16


def fit_base(folder, lr, steps=32, **changes):
    """NLL by step of the built-in base on 160 problems of the teacher."""
    c = config(batch=16, seed=0, **changes)
    policy = load_policy(train.BASE, c, train=True)
    problems = load_problems("arithmetic", "train", 160, 0, 0.2, 4, 2)
    examples = [train.example(policy, p, TOKENIZER.encode(p.solution) + [EOS]) for p in problems]
    fit(policy, folder / "sft", folder / "m.csv", examples, [], c, epochs=steps / 10, lr=lr)
    return policy, np.array([float(row["nll"]) for row in log_rows(folder / "m.csv")])


def test_bf16_weights_follow_fp32s_curve(tmp_path, monkeypatch):
    """bf16 weights that learn less than fp32 ones. At rate 1e-4 most updates are below half an ulp; the loss falls by
    1.1, stochastic rounding stays within 0.05 of it in every step, and rounding to nearest falls behind by 0.2."""
    _, want = fit_base(tmp_path / "32", 1e-4)
    policy, got = fit_base(tmp_path / "16", 1e-4, weights="bfloat16")
    assert want[0] - want[-4:].mean() > 0.9
    assert abs(got - want).max() < 0.05 and abs((got - want)[-8:].mean()) < 0.02
    saved = GPT.from_pretrained(tmp_path / "16" / "sft", dtype=torch.bfloat16)
    assert torch.equal(saved.embed_tokens.weight, policy.model.embed_tokens.weight), "saved as held"
    monkeypatch.setattr(train, "round_stochastically", lambda x, _: x)
    _, nearest = fit_base(tmp_path / "nearest", 1e-4, weights="bfloat16")
    assert (nearest - want)[-8:].mean() > 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_flag(tmp_path, dtype):
    """A flag that changes the dtype of a part: fp32 moments beside bf16 weights, or a checkpoint of the other dtype
    that is cast in silence. At step 0 Eq. 1 is ln 2 in both."""
    policy = load_policy(train.BASE, config(weights=dtype), train=True)
    kind, pairs = getattr(torch, dtype), pairs_of(8)
    assert {p.dtype for p in policy.model.parameters()} == {kind}
    add_reference(policy.model, pairs, 9999)
    log = backward(policy.model, [], pairs, config(weights=dtype, nll=0.0))
    assert log["dpo"] == pytest.approx(math.log(2), abs=0.02 if dtype == "bfloat16" else 1e-6)
    assert {p.grad.dtype for p in policy.model.parameters()} == {kind}
    weights = {"w": torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)}
    tensors = {f"{key}.w": torch.zeros(4, 3, dtype=kind) for key in ("weight", "exp_avg", "exp_avg_sq")}
    train.save_file(tensors, tmp_path / "c.safetensors", metadata={"step": "3"})
    optimizer = train.RoundingAdamW(weights.values(), seed=0, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    if dtype == "bfloat16":
        assert train.load_checkpoint(tmp_path / "c.safetensors", weights, optimizer, 9) == 3
    else:
        with pytest.raises(UsageError, match="shape or dtype"):
            train.load_checkpoint(tmp_path / "c.safetensors", weights, optimizer, 9)


# --- the loop ---


def make_policy(seed=0, **changes):
    return Policy(toy(seed, **changes), TOKENIZER, "{question}\n")


def weights_of(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def log_rows(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in csv.DictReader(file)]


def train_once(folder, c, examples, pairs, **options):
    policy = make_policy()
    policy.model.to(getattr(torch, c.weights))
    fit(policy, folder / "neg", folder / "metrics.csv", copy.deepcopy(examples), copy.deepcopy(pairs), c, epochs=3.0,
        lr=1e-2, **options)  # fmt: skip
    return policy


def break_at(monkeypatch, step, error=KeyboardInterrupt):
    """Stop before the gradient of a step, as Ctrl-C would."""
    done, real = [], train.backward

    def counted(*arguments):
        if len(done) == step:
            raise error
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(train, "backward", counted)


@pytest.mark.parametrize("kind", ["nll", "dpo", "both", "awr", "bfloat16"])
def test_resume_is_exact(tmp_path, monkeypatch, kind):
    """Resume that skips or repeats a batch (nano-aha-moment), losses that jump after it (transformers#33336), lines of
    metrics.csv twice: N steps must equal k, a stop, and N - k, bit for bit, with stochastic rounding too."""
    examples = examples_of(9, weights=kind == "awr") if kind != "dpo" else []
    pairs, c = pairs_of(11) if kind in ("dpo", "both") else [], config(nll=0.5 * (kind == "both"), save_seconds=1e9)
    c = replace(c, weights=kind if kind == "bfloat16" else c.weights)
    whole = train_once(tmp_path / "whole", c, examples, pairs)
    rows = log_rows(tmp_path / "whole" / "metrics.csv")
    steps = round(3 * (len(examples) or len(pairs)) / 4)
    assert [int(r["step"]) for r in rows] == list(range(steps)) and float(rows[0]["loss"]) > float(rows[-1]["loss"])
    part, often = tmp_path / "part", replace(c, save_seconds=0)
    for stop in (3, 1):  # stopped after 3 steps, and again one step later; below once more, between two checkpoints
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            break_at(patch, stop)
            train_once(part, often, examples, pairs)
    assert (part / "neg" / "checkpoint.safetensors").exists() and not (part / "neg" / "model.safetensors").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 1)
        train_once(part, c, examples, pairs)
    with open(part / "metrics.csv", "a") as file:
        file.write("neg,99,0.1,half a li")
    again = train_once(part, c, examples, pairs)
    assert log_rows(part / "metrics.csv") == rows
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(again)[name]), name
    first, second = ((f / "neg" / "model.safetensors").read_bytes() for f in (tmp_path / "whole", part))
    assert first == second and not list(part.glob("neg/checkpoint*"))


def test_a_stop_before_the_first_checkpoint_starts_over(tmp_path, monkeypatch):
    """Lines of steps that are done again stay in metrics.csv; lines of other stages are lost."""
    c, examples = config(save_seconds=1e9), examples_of(8)
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + "sft,0,1" + "," * 9 + "\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 3)
        train_once(tmp_path, c, examples, [])
    train_once(tmp_path, c, examples, [])
    assert [(r["stage"], r["step"]) for r in log_rows(tmp_path / "metrics.csv")] == [
        ("sft", "0"), *(("neg", str(i)) for i in range(6))]  # fmt: skip


def test_broken_checkpoint_is_one_line(tmp_path):
    """A traceback from inside safetensors, or training that silently starts over."""
    (tmp_path / "neg").mkdir()
    for content in (b"", b"nonsense" * 20):
        (tmp_path / "neg" / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match="delete it to start over"):
            train_once(tmp_path, config(), examples_of(4), [])


def test_a_checkpoint_lands_on_the_cpu_first(tmp_path, monkeypatch):
    """Out of memory on resume because the checkpoint stayed on the GPU (nanoGPT#236)."""
    opened, real = [], train.safe_open
    monkeypatch.setattr(train, "safe_open", lambda *a, **k: opened.append(k.get("device", "cpu")) or real(*a, **k))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 2)
        train_once(tmp_path, config(save_seconds=0), examples_of(8), [])
    train_once(tmp_path, config(), examples_of(8), [])
    assert opened == ["cpu"]


def test_a_finished_folder_is_loaded(tmp_path, monkeypatch):
    """A finished stage trained again on top of itself, or its weights not loaded."""
    c, examples = config(), examples_of(6)
    done = train_once(tmp_path, c, examples, [])
    log = (tmp_path / "metrics.csv").read_bytes()
    break_at(monkeypatch, 0, AssertionError)
    again = make_policy(seed=8)
    fit(again, tmp_path / "neg", tmp_path / "metrics.csv", examples, [], c, epochs=3.0, lr=1e-2)
    for name, weight in weights_of(done).items():
        assert torch.equal(weight, weights_of(again)[name])
    assert (tmp_path / "metrics.csv").read_bytes() == log


def test_nothing_is_left_of_training(tmp_path):
    """Gradients still allocated during rollouts (NeMo-RL#1147)."""
    policy = train_once(tmp_path, config(), examples_of(6), [])
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("kind", ["nll", "dpo"])
def test_a_loss_that_is_no_number_names_its_problems(tmp_path, kind):
    """Weights ruined in silence by one bad batch: no step, no line, no model saved."""
    examples, pairs = (examples_of(8), []) if kind == "nll" else ([], pairs_of(8))
    c, policy = config(nll=0.0), make_policy()
    with torch.no_grad():
        policy.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(UsageError) as error:
        fit(policy, tmp_path / "neg", tmp_path / "metrics.csv", examples, pairs, c, epochs=1.0, lr=1e-2)
    items = examples or pairs
    ids = {x.id if kind == "nll" else x["id"] for x in (items[i] for i in draw(8, 4, 0, c.seed))}
    message = str(error.value)
    assert "step 0" in message and all(i in message for i in ids) and "--lr" in message and "\n" not in message
    words = set(re.findall(r"\b[pq]\d\b", message))
    assert words == ids
    assert not (tmp_path / "neg" / "model.safetensors").exists() and not (tmp_path / "metrics.csv").exists()


def test_the_early_copy(tmp_path):
    """The generator is the final model, or one of another step."""
    c, examples = config(seed=1), examples_of(8)
    policy = train_once(tmp_path, c, examples, [], keep_at=(1.5, tmp_path / "early"))
    early = GPT.from_pretrained(tmp_path / "early")
    assert not torch.equal(early.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert (tmp_path / "early" / "tokenizer.json").exists()
    stopped = make_policy()
    rates = [learning_rate(s, 6, 1e-2, c.warmup) for s in range(3)]
    options = dict(betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(stopped.model.parameters(), **options)
    for step, rate in enumerate(rates):
        backward(stopped.model, [examples[i] for i in draw(8, 4, step, c.seed)], [], c)
        torch.nn.utils.clip_grad_norm_(stopped.model.parameters(), c.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(stopped.model.embed_tokens.weight, early.embed_tokens.weight)


def test_it_learns(tmp_path):
    """A gradient of the wrong sign: the loss falls, chosen rises above rejected, a memorised text is generated."""
    problems, c = load_problems("arithmetic", "train", 3, 0, 0.0, 1, 0), config(batch=3, warmup=0.05)
    policy = make_policy(std=0.02)
    answers = [TOKENIZER.encode(p.solution) + [EOS] for p in problems]
    examples = [Example(p.id, policy.prompt(p), a) for p, a in zip(problems, answers, strict=True)]
    fit(policy, tmp_path / "sft", tmp_path / "metrics.csv", examples, [], c, epochs=150.0, lr=1e-2)
    options = dict(max_new_tokens=20, temperature=0)
    assert [g[0] for g in policy.generate([e.prompt for e in examples], **options)] == answers, "and it stops"
    pairs = [dict(id=e.id, prompt_ids=e.prompt, chosen_ids=e.response[:3] + [EOS], rejected_ids=e.response)
             for e in examples]  # fmt: skip
    fit(policy, tmp_path / "neg", tmp_path / "metrics.csv", [], pairs, replace(c, beta=0.1), epochs=60.0, lr=2e-3)
    rows = [r for r in log_rows(tmp_path / "metrics.csv") if r["stage"] == "neg"]
    assert float(rows[0]["dpo"]) == pytest.approx(math.log(2), abs=1e-4) and float(rows[-1]["margin"]) > 1
    assert [g[0] for g in policy.generate([e.prompt for e in examples], **options)] != answers


# --- configuration ---


def test_flags_are_read():
    """Options that nothing reads (Next-Token-Failures): every flag is used somewhere in the code."""
    folder = Path(train.__file__).parent
    source = "".join((folder / name).read_text() for name in ("train.py", "rollout.py", "evaluate.py"))
    for name in TrainConfig.__dataclass_fields__:
        assert source.count(f"c.{name}") + source.count(f"config.{name}") > 0, name


def test_defaults_by_task():
    """A default of another task, or one that overrides what the user said."""
    for data, column in (("arithmetic", 0), ("star", 1), ("my/own.jsonl", 2)):
        c = resolve(TrainConfig(data=data, model="m" * (column == 2)))
        by_task = {f.name: f.metadata["by_task"] for f in fields(c) if f.default is None}
        assert len(by_task) == 16 and all(getattr(c, name) == row[column] for name, row in by_task.items())
        assert c.out == f"runs/{Path(data).stem}" and c.model == ("m" if column == 2 else str(train.BASE))
    c = resolve(TrainConfig(limit=7, eval_samples=0, prompt="{question}!", out="x", model="y"))
    assert (c.limit, c.eval_samples, c.prompt, c.out, c.model) == (7, 0, "{question}!", "x", "y")


@pytest.mark.parametrize("name", ["mode", "loss", "scan", "pairs", "split"])
def test_unknown_choices(name):
    """A mistyped choice that is silently taken for the default."""
    with pytest.raises(UsageError, match=f"--{name}: both; expected"):
        parse(TrainConfig, "", [f"--{name}", "both"])


def test_counts_of_a_run(tmp_path):
    """Epochs that are rounded away, or counted in pairs where a likelihood term sets them."""
    for batch, epochs, n, want in ((4, 3.0, 9, 7), (4, 0.01, 9, 1), (9, 2.0, 9, 2)):
        folder = tmp_path / f"{batch}{epochs}{n}"
        c = config(batch=batch)
        fit(make_policy(), folder / "sft", folder / "m.csv", examples_of(n), [], c, epochs=epochs, lr=1e-3)
        assert len(log_rows(folder / "m.csv")) == want
    log, c = tmp_path / "m.csv", config(nll=1.0)
    fit(make_policy(), tmp_path / "n" / "neg", log, examples_of(8), pairs_of(3), c, epochs=2.0, lr=1e-3)
    assert [r["stage"] for r in log_rows(log)] == ["neg"] * 4

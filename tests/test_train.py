"""train.py: losses, masks, gradients, Theorem 6.1, the loop and its resume, the flags.

Each docstring names the bug it guards.
"""

import copy
import csv
import inspect
import json
import math
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import train
from data import PRESETS, Tokenizer, UserError, load_problems, parse_flags, write_rows
from model import GPT, Config, collate
from model import token_logps as logps_of_sequences
from rollout import Example, Pair, Policy, Solution
from train import LOSSES, TrainFlags, add_reference, awr_weights, batch_indices, dpo_loss
from train import fit, forward_backward, learning_rate, load_data, micro_batches, nll, pair_logps
from train import resolve

BASE = Path(__file__).parent / "base"
TOKENIZER = Tokenizer.from_pretrained(BASE)
EOS = TOKENIZER.eos_id
VOCAB = TOKENIZER.vocab_size
TOY = json.loads((BASE / "config.json").read_text())
TOY |= dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
TOY |= dict(intermediate_size=24, head_dim=8)
GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=259)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_policy(seed=0, std=0.2, **changes):
    torch.manual_seed(seed)
    model = GPT(Config.from_hf(TOY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return Policy(model, TOKENIZER, "{question}\n")


def config(**changes):
    small = dict(batch=4, warmup=0.25, device="cpu", dtype="float32", threads=1, seed=3)
    return resolve(replace(TrainFlags(), **small | changes))


def texts(n, seed=0, longest=9):
    """n (prompt, response) of random ids; most of the responses end with the end of text."""
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, longest))]
        response = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, longest))]
        if rng.random() < 0.7:
            response.append(EOS)
        result.append((prompt, response))
    return result


def make_examples(n, weighted=False, seed=0):
    examples = [Example(f"p{i}", *text) for i, text in enumerate(texts(n, seed))]
    rng = random.Random(seed)
    for example in examples:
        if weighted:
            example.weights = [rng.random() * 3 for _ in example.response]
    return examples


def random_pairs(n, seed=1):
    both = zip(texts(n, seed), texts(n, seed + 100), strict=True)
    return [
        Pair(f"q{i}", "response", 1, prompt, chosen, rejected)
        for i, ((prompt, chosen), (_, rejected)) in enumerate(both)
    ]


def token_logps(model, items):
    return logps_of_sequences(model, [item.sequence for item in items])


# Every loss of the loop, with items for it: a new row of LOSSES is tested on pairs.
KINDS = ["sft", *LOSSES]


def items_of(kind, n):
    if kind in ("sft", "awr"):
        return make_examples(n, weighted=kind == "awr")
    return random_pairs(n)


def loss_of(kind):
    return LOSSES.get(kind, nll)


def gradients(policy, items, loss, c):
    """What forward_backward logs, as floats, and all gradients in one vector."""
    policy.model.zero_grad(set_to_none=True)
    log = forward_backward(policy, items, loss, c)
    grads = [p.grad.flatten().clone() for p in policy.model.parameters()]
    return {name: float(value) for name, value in log.items()}, torch.cat(grads)


def with_reference(pairs):
    add_reference(make_policy(), pairs, config())
    return pairs


# ---------------------------------------------------------------- log-probabilities


def test_three_tokens_by_hand():
    """A shifted mask off by one: the first response token untrained, the last prompt token trained
    (minimind#621)."""
    model = make_policy().model
    prompt = [5, 9]
    response = [7, 3, EOS]
    logps = F.log_softmax(model(torch.tensor([prompt + response]))[0], -1)
    want = torch.stack([logps[1, 7], logps[2, 3], logps[3, EOS]])
    torch.testing.assert_close(token_logps(model, [Example("", prompt, response)]), want)
    chosen, rejected = pair_logps(model, [Pair("", "", 1, prompt, response, [7])])
    torch.testing.assert_close(chosen, want.sum()[None])
    torch.testing.assert_close(rejected, want[:1])


def test_log_probabilities_are_float32():
    """Logits of a large vocabulary normalised in bfloat16: log-probabilities in steps of 1/32."""
    model = make_policy().model.to(torch.bfloat16)
    logps = token_logps(model, make_examples(6))
    assert logps.dtype == torch.float32
    assert (logps != logps.bfloat16().float()).float().mean() > 0.9


def test_masks_come_from_lengths():
    """Masks made from '!= pad' where pad is the end of text: never learns to stop, or trains on
    padding (trl#4970, MemGen#33); a prompt of one token; an end of text inside the prompt."""
    sequences = [([4, EOS, 6], [EOS]), ([8], [2, EOS, 5, EOS]), ([1, 2, 3], [4, 5])]
    batch = collate(sequences, "cpu")
    assert batch.ids.tolist() == [[4, EOS, 6, 0], [8, 2, EOS, 5], [1, 2, 3, 4]]
    assert batch.ids.dtype == torch.long
    assert batch.positions is None and batch.branches is None
    assert batch.targets.tolist() == [EOS, 2, EOS, 5, EOS, 4, 5]
    assert batch.rows.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert batch.columns.tolist() == [2, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("family", [{}, dict(model_type="mistral", sliding_window=5), GPT2])
@pytest.mark.parametrize("size", [6, 130])
def test_two_responses_behind_one_prompt(family, size):
    """A response that sees the other one or misses the prompt, positions that run on from one to
    the other, a first token predicted by the end of the other response; beside a row with one."""

    def ids(n):
        return torch.randint(1, VOCAB, (n,)).tolist()

    model = make_policy(**family).model
    pairs = [
        Pair("a", "", 1, ids(size), ids(4), ids(size)),
        Pair("b", "", 1, ids(2), ids(size), ids(1)),
    ]
    single = Example("c", ids(size), ids(9))
    apart = [Example("", p.prompt, side) for p in pairs for side in (p.chosen, p.rejected)]
    results = []
    for items in ([*pairs, single], [*apart, single]):
        model.zero_grad()
        logps = token_logps(model, items)
        weights = torch.arange(len(logps)) % 7  # each token weighs differently
        (logps * weights).sum().backward()
        results.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_positions_count_where_columns_do_not():
    """A pair refused, or read wrongly, because its two texts fill more columns than GPT-2 has
    positions; one that is too long read with the last position again and again."""
    model = make_policy(**GPT2).model
    pair_logps(model, [Pair("", "", 1, [3] * 130, [4] * 100, [5] * 130)])
    with pytest.raises(ValueError, match="259 positions"):
        pair_logps(model, [Pair("", "", 1, [3] * 130, [4], [5] * 131)])


def test_each_row_alone():
    """Padding that leaks into shorter rows, or log-probabilities given to the wrong row."""
    model = make_policy().model
    examples = make_examples(9)
    alone = [token_logps(model, [example]) for example in examples]
    torch.testing.assert_close(token_logps(model, examples), torch.cat(alone))
    pairs = random_pairs(5)
    chosen, rejected = pair_logps(model, pairs)
    for i, pair in enumerate(pairs):
        want = token_logps(model, [Example("", pair.prompt, pair.chosen)]).sum()
        torch.testing.assert_close(chosen[i], want)
        want = token_logps(model, [Example("", pair.prompt, pair.rejected)]).sum()
        torch.testing.assert_close(rejected[i], want)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_edited(kind):
    """Labels edited in place, so that the normaliser counts prompt and padding (nano-aha-moment: 3
    became 8)."""
    items = items_of(kind, 5)
    if isinstance(items[0], Pair):
        with_reference(items)
    before = copy.deepcopy(items)
    forward_backward(make_policy(), items, loss_of(kind), config(nll=1.0))
    assert items == before


def test_nll_is_a_mean_over_response_tokens():
    """The normaliser counts prompt or padding; a mean of means that weighs short answers more."""
    policy = make_policy()
    examples = make_examples(6)
    rows = [token_logps(policy.model, [example]) for example in examples]
    log, _ = gradients(policy, examples, nll, config())
    assert log["nll"] == pytest.approx(-torch.cat(rows).mean().item(), rel=1e-5)
    assert log["loss"] == log["nll"]


@pytest.mark.parametrize("micro_tokens", [1, 40, 9999])
def test_weights_meet_their_tokens(micro_tokens):
    """Eq. 4's weights given to the tokens of another row once the rows are sorted by length; a log
    of the weighted likelihood under the name of the plain one."""
    policy = make_policy()
    examples = make_examples(6, weighted=True)
    total = sum(len(example.response) for example in examples)
    loss = 0
    plain = 0
    for example in examples:
        logps = token_logps(policy.model, [example]).detach()
        loss -= (logps * torch.tensor(example.weights)).sum().item() / total
        plain -= logps.sum().item() / total
    log, _ = gradients(policy, examples, LOSSES["awr"], config(micro_tokens=micro_tokens))
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["nll"] == pytest.approx(plain, rel=1e-5)


def test_chunks_change_nothing():
    """The full fp32 log-softmax over a large vocabulary runs out of memory (LlamaFactory#10720);
    cut wrongly, it drops or repeats tokens, or loses their gradient."""
    model = make_policy().model
    examples = make_examples(7)
    results = []
    for chunk in (1000, 5, 1):
        # a vocabulary of this size would allow so many tokens at a time
        model.config = replace(model.config, vocab_size=2**24 // chunk)
        model.zero_grad()
        logps = token_logps(model, examples)
        (logps * torch.arange(len(logps))).sum().backward()
        results.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    assert len(results[0][0]) > 20
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


def test_logits_exist_only_where_responses_are_predicted():
    """Logits of the prompt, which nobody reads, are most of the memory of a long prompt."""
    model = make_policy().model
    sizes = []
    logits = model.logits

    def counted(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    model.logits = counted
    token_logps(model, [Example("", [3] * 40, [5, 6]), Example("", [4], [7])])
    assert sizes == [3]
    sizes.clear()
    model.config = replace(model.config, vocab_size=2**24 // 4)
    token_logps(model, [Example("", [3], list(range(1, 21)))])
    assert sizes == [4] * 5


# ---------------------------------------------------------------- batches and gradients


@pytest.mark.parametrize("tokens", [1, 30, 100, 10**6])
def test_micro_batches(tokens):
    """An item lost, twice, or over the limit; the longest not in the first step (unsloth#1624: out
    of memory late)."""
    examples = make_examples(50, seed=4)
    length = train.token_count
    groups = micro_batches(examples, tokens)
    ids = [example.id for group in groups for example in group]
    assert sorted(ids) == sorted(example.id for example in examples)
    assert length(groups[0][0]) == max(map(length, examples))
    for group in groups:
        assert len(group) == 1 or max(map(length, group)) * len(group) <= tokens
    assert micro_batches([], tokens) == []


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batch_size_never_changes_the_gradient(kind):
    """A mean per micro-batch instead of per batch: the gradient depends on how memory was saved."""
    items = items_of(kind, 7)
    if isinstance(items[0], Pair):
        with_reference(items)
    policy = make_policy(seed=5)
    loss = loss_of(kind)
    log, want = gradients(policy, items, loss, config(nll=0.7))
    assert want.abs().max() > 1e-3
    for micro_tokens in (60, 1):
        other, grad = gradients(policy, items, loss, config(nll=0.7, micro_tokens=micro_tokens))
        atol = 1e-5 * want.abs().max().item()
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=atol)
        assert other == pytest.approx(log, rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_and_batch_order():
    """Options that nothing reads, or that change the result (Next-Token-Failures)."""
    policy = make_policy()
    examples = make_examples(5)
    _, want = gradients(policy, examples, nll, config())
    policy.model.gradient_checkpointing = True
    _, grad = gradients(policy, examples[::-1], nll, config())
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 7), (5, 8), (1, 3), (12, 5)])
def test_batches_cover_each_epoch_once(n, batch):
    """A batch skipped or repeated (nano-aha-moment)."""
    stream = []
    for step in range(3 * n):
        stream += batch_indices(n, batch, step, seed=0)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_of_batches():
    """The same order in every epoch; a seed that nobody reads; one that is not the same again."""
    assert batch_indices(50, 50, 0, seed=0) == batch_indices(50, 50, 0, seed=0)
    assert batch_indices(50, 50, 0, seed=0) != batch_indices(50, 50, 1, seed=0)
    assert batch_indices(50, 50, 0, seed=0) != batch_indices(50, 50, 0, seed=1)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_learning_rate(steps):
    """A first step of rate 0, a warm-up that never reaches the peak, a cosine that ends at 0 or
    rises again."""
    rates = [learning_rate(step, steps, 2.0, 0.1) for step in range(steps)]
    peak = max(1, round(0.1 * steps)) - 1
    assert rates[0] == 2.0 / (peak + 1) and rates[peak] == 2.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps > 1:
        assert learning_rate(steps, steps, 2.0, 0.1) == pytest.approx(0.2)
        assert learning_rate(peak + 1, steps, 2.0, 0.1) > 1.9


# ---------------------------------------------------------------- Eq. 1 and Eq. 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_reference_ln_2(dtype):
    """Reference log-probabilities that do not match the data (trl#2423), in another dtype (dpo#34),
    or with the wrong sign: at step 0 the loss must be ln 2 and the margin 0."""
    policy = make_policy()
    policy.dtype = dtype
    pairs = random_pairs(7)
    c = config(micro_tokens=60)
    add_reference(policy, pairs, c)
    for pair in pairs:
        sides = [Example("", pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        want = [token_logps(policy.model, [side]).sum().item() for side in sides]
        tolerance = 1e-4 if dtype == "float32" else 0.05
        assert pair.reference == pytest.approx(want, rel=tolerance), "each pair its own"
        assert type(pair.reference[0]) is float, "no graph is kept alive"
    log, grad = gradients(policy, pairs, LOSSES["dpo"], c)
    assert log["pair_loss"] == log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["margin"] == pytest.approx(0, abs=1e-5)
    chosen, rejected = np.mean([pair.reference for pair in pairs], axis=0)
    assert log["chosen"] == pytest.approx(chosen, rel=1e-4)
    assert log["rejected"] == pytest.approx(rejected, rel=1e-4)
    assert grad.dtype == torch.float32


def test_eq_1_by_hand():
    """Rewards without beta, chosen and rejected exchanged."""
    rows = [(-1.0, -3.0, -2.0, -2.5), (-2.0, -6.0, -4.0, -5.0)]
    losses, margins = dpo_loss(*torch.tensor(rows).T, config(beta=0.3))
    torch.testing.assert_close(margins, torch.tensor([0.3 * 1.5, 0.3 * 3.0]))
    torch.testing.assert_close(losses, -torch.log(torch.sigmoid(margins)))


def test_a_step_widens_the_margin():
    """A mean over tokens where Eq. 1 sums; the fall of the chosen text not logged (dpo#8, #32)."""
    policy = make_policy()
    pairs = with_reference(random_pairs(5))
    optimizer = torch.optim.SGD(policy.model.parameters(), 0.05)
    before, _ = gradients(policy, pairs, LOSSES["dpo"], config())
    optimizer.step()
    after, _ = gradients(policy, pairs, LOSSES["dpo"], config())
    assert after["pair_loss"] < before["pair_loss"]
    assert after["margin"] > 0 and after["accuracy"] > 0.5
    gap = after["chosen"] - after["rejected"] - before["chosen"] + before["rejected"]
    assert after["margin"] == pytest.approx(0.3 * gap, abs=1e-3)


def test_likelihood_beside_eq_1():
    """No likelihood of the chosen text although asked for, of another text, or at the wrong weight:
    its log-probability falls (dpo#36)."""
    policy = make_policy(seed=5)
    pairs = with_reference(random_pairs(4))
    log, dpo_grad = gradients(policy, pairs, LOSSES["dpo"], config())
    both, grad = gradients(policy, pairs, LOSSES["dpo"], config(nll=0.4))
    policy.model.zero_grad()
    chosen_nll = 0
    for pair in pairs:
        logps = token_logps(policy.model, [Example("", pair.prompt, pair.chosen)])
        chosen_nll -= logps.mean() / len(pairs)
    chosen_nll.backward()
    nll_grad = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    torch.testing.assert_close(grad, dpo_grad + 0.4 * nll_grad, rtol=1e-4, atol=1e-6)
    assert log["nll"] == both["nll"] == pytest.approx(chosen_nll.item(), rel=1e-5)
    assert both["loss"] == pytest.approx(log["pair_loss"] + 0.4 * both["nll"], rel=1e-5)


def valued(value, q_values, ends):
    return Solution("p", 0, False, [5] * ends[-1], ends, "", value, q_values, [])


def test_awr_weights_by_hand():
    """The weight of a step on the tokens of its neighbour; A * beta for A / beta; a weight that
    overflows."""
    weights = awr_weights(valued(0.5, [0.75, 0.25, 1.0], [2, 3, 6]), 0.5)
    want = [math.exp(0.5)] * 2 + [math.exp(-1)] + [math.exp(1.5)] * 3
    assert weights == pytest.approx(want)
    assert awr_weights(valued(0.0, [1.0], [1]), 0.01) == pytest.approx([20])
    assert awr_weights(valued(0.5, [0.5], [3]), 0.1) == [1, 1, 1]


ADVANTAGES = torch.tensor([1.0, 0.4, 0.0, -0.5, -1.0], dtype=torch.float64)
SFT = torch.tensor([0.05, 0.15, 0.2, 0.25, 0.35], dtype=torch.float64)
BETA = 0.4


def optimum(loss):
    """The softmax policy that minimises loss(log pi), from SFT on."""
    logits = SFT.log().clone().requires_grad_()
    precise = dict(max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-15)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **precise)

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def pair_loss(weights):
    """The exact mean of Eq. 1 over pairs (chosen a, rejected b) of probability weights[a, b]."""
    index = torch.arange(5)
    a, b = torch.meshgrid(index, index, indexing="ij")
    reference = SFT.log()

    def loss(logps):
        return (
            weights * dpo_loss(logps[a], logps[b], reference[a], reference[b], config(beta=BETA))[0]
        ).sum()

    return loss


def distance(p, q):
    """Total variation."""
    return 0.5 * (p - q).abs().sum().item()


def test_theorem_6_1_in_a_table():
    """Pairs drawn as the paper's text says literally instead of as its proof needs: then Eq. 1 has
    another optimum than Eq. 4. Draw two steps from pi_sft, let sigma(A_a - A_b) say which is the
    better one."""
    want = SFT * (ADVANTAGES / BETA).exp()
    want /= want.sum()
    prefers = torch.sigmoid(ADVANTAGES[:, None] - ADVANTAGES[None])  # a over b
    drawn_twice = 2 * SFT[:, None] * SFT[None] * prefers
    assert drawn_twice.sum().item() == pytest.approx(1)
    assert distance(optimum(pair_loss(drawn_twice)), want) < 0.01
    literal = SFT[None] * prefers / prefers.sum(0)
    assert distance(optimum(pair_loss(literal)), want) > 0.3
    weights = [awr_weights(valued(0.0, [a], [1]), BETA)[0] for a in ADVANTAGES.tolist()]
    weights = torch.tensor(weights, dtype=torch.float64)
    eq_4 = optimum(lambda logps: -(SFT * weights * logps).sum())
    assert distance(eq_4, want) < 0.01
    assert distance(SFT, want) > 0.5


# ---------------------------------------------------------------- the loop


def weights_of(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def assert_same_weights(a, b):
    torch.testing.assert_close(weights_of(a), weights_of(b), rtol=0, atol=0)


def log_rows(out):
    """metrics.csv without the column that tells the time."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["tokens_per_s"]
    return rows


def fit_once(out, kind, items, c=None, policy=None, **options):
    """Three epochs on a copy of the items, in the stage "neg" of the run folder `out`."""
    policy = policy or make_policy()
    c = replace(c or config(save_seconds=1e9), out=str(out))
    options = dict(epochs=3.0, lr=1e-2) | options
    fit(policy, copy.deepcopy(items), loss_of(kind), c, "neg", **options)
    return policy


def stop_at(step, out, kind, items, save_seconds):
    """Stop after so many further steps, before the next gradient."""
    real = train.forward_backward
    calls = []

    def counted(*arguments):
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "forward_backward", counted)
        fit_once(out, kind, items, config(save_seconds=save_seconds, nll=0.3))


def test_three_steps_by_hand(tmp_path):
    """Gradients clipped after the step, or those of one parameter; another second beta of Adam; the
    rate of the step before, or of none; weight decay in the gradient."""
    c = config(warmup=0.7, clip=0.05, weight_decay=0.3, save_seconds=1e9)
    examples = make_examples(12)
    trained = fit_once(tmp_path, "sft", examples, c, epochs=1.0, lr=3e-2)
    policy = make_policy()
    parameters = list(policy.model.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    norms = []
    for step, rate in enumerate([1.5e-2, 3e-2, 3e-2]):
        batch = [examples[i] for i in batch_indices(12, 4, step, c.seed)]
        _, grad = gradients(policy, batch, nll, c)
        norms.append(grad.norm().item())
        with torch.no_grad():
            for p, m, v in zip(parameters, first, second, strict=True):
                g = p.grad * min(1, 0.05 / norms[-1])
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.01)
                step_size = (m / (1 - 0.9 ** (step + 1))) / (
                    (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
                )
                p -= rate * (0.3 * p + step_size)
    assert min(norms) > 0.05 and max(norms) > 1.1 * min(norms), "clipping must matter"
    for p, want in zip(trained.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(tmp_path, kind):
    """Resume that skips or repeats a batch (nano-aha-moment), losses that jump after it
    (transformers#33336), lines of metrics.csv twice: N steps must equal k, a stop, and N - k."""
    c = config(save_seconds=1e9, nll=0.3)
    items = items_of(kind, 9)
    whole = fit_once(tmp_path / "whole", kind, items, c)
    rows = log_rows(tmp_path / "whole")
    assert [int(row["step"]) for row in rows] == list(range(7))  # 3 epochs of 9 items, 4 a step
    assert float(rows[0]["loss"]) != float(rows[-1]["loss"])

    part = tmp_path / "part"
    stop_at(3, part, kind, items, save_seconds=0)
    stop_at(1, part, kind, items, save_seconds=0)
    stop_at(1, part, kind, items, save_seconds=1e9)  # a step behind the last checkpoint
    assert (part / "neg" / "checkpoint.safetensors").exists()
    assert not (part / "neg" / "model.safetensors").exists()
    with open(part / "metrics.csv", "a") as file:
        file.write("neg,99,0.1,half a li")
    again = fit_once(part, kind, items, c)
    assert_same_weights(whole, again)
    assert log_rows(part) == rows
    saved = [(out / "neg" / "model.safetensors").read_bytes() for out in (tmp_path / "whole", part)]
    assert saved[0] == saved[1]
    assert not list(part.glob("neg/*checkpoint*"))


def test_a_stop_before_the_first_checkpoint_starts_over(tmp_path):
    """Lines of steps that are done again stay in metrics.csv; lines of other stages are lost."""
    line = "sft,0,1" + "," * (len(train.COLUMNS) - 4) + ",5\n"
    (tmp_path / "metrics.csv").write_text(",".join(train.COLUMNS) + "\n" + line)
    examples = make_examples(8)
    stop_at(3, tmp_path, "sft", examples, save_seconds=1e9)
    fit_once(tmp_path, "sft", examples)
    steps = [(row["stage"], int(row["step"])) for row in log_rows(tmp_path)]
    assert steps == [("sft", 0), *(("neg", i) for i in range(6))]


@pytest.mark.parametrize("damage", ["empty", "nonsense", "shape", "moment", "no step", "cut"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    """A traceback from inside safetensors, training that silently starts over, or a checkpoint of
    other shapes stretched over the weights."""
    weights = {"w": torch.zeros(4, 3, requires_grad=True)}
    optimizer = torch.optim.AdamW(weights.values())
    weights["w"].grad = torch.ones(4, 3)
    optimizer.step()
    before = weights["w"].detach().clone()
    train.save_checkpoint(tmp_path, weights, optimizer, 7)
    assert train.load_checkpoint(tmp_path, weights, optimizer) == 7
    path = tmp_path / "checkpoint.safetensors"
    tensors = {f"{key}.w": torch.ones(4, 3) for key in ("weight", "exp_avg", "exp_avg_sq")}
    if damage == "shape":
        tensors["weight.w"] = torch.ones(1, 3)
    if damage == "moment":
        tensors["exp_avg.w"] = torch.ones(3, 4)
    metadata = None if damage == "no step" else {"step": "7"}
    save_file(tensors, path, metadata=metadata)
    contents = dict(empty=b"", nonsense=b"nonsense" * 20, cut=path.read_bytes()[:-1])
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(UserError, match="checkpoint.safetensors: not a checkpoint") as error:
        train.load_checkpoint(tmp_path, weights, optimizer)
    assert "\n" not in str(error.value)
    assert torch.equal(weights["w"], before), "refused before anything is overwritten"


def test_a_checkpoint_is_read_on_the_cpu(tmp_path, monkeypatch):
    """Out of memory on resume because the checkpoint stayed on the GPU (nanoGPT#236)."""
    examples = make_examples(8)
    stop_at(2, tmp_path, "sft", examples, save_seconds=0)
    devices = []
    real = train.safe_open

    def opened(path, framework, device="cpu"):
        devices.append(device)
        return real(path, framework, device)

    monkeypatch.setattr(train, "safe_open", opened)
    fit_once(tmp_path, "sft", examples)
    assert devices == ["cpu"]


def test_a_finished_folder_is_left_alone(tmp_path):
    """A finished stage trained again on top of itself, or its lines of metrics.csv lost; a
    checkpoint, three times as large as the model, that stays for ever."""
    examples = make_examples(6)
    fit_once(tmp_path, "sft", examples)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "neg" / "checkpoint.safetensors").write_text("left by a kill")
    again = fit_once(tmp_path, "sft", examples, policy=make_policy(seed=8))
    assert_same_weights(again, make_policy(seed=8))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_no_number_names_its_problems(tmp_path, kind):
    """Weights ruined in silence by one bad batch: no step, no line, no model saved."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.embed_tokens.weight[:] = float("nan")
    items = items_of(kind, 8)
    with pytest.raises(UserError, match="in step 0") as error:
        fit_once(tmp_path, kind, items, policy=policy)
    message = str(error.value)
    want = {items[i].id for i in batch_indices(8, 4, 0, config().seed)}
    assert set(re.findall(r"\b[pq]\d\b", message)) == want
    assert "--lr" in message and "\n" not in message
    assert log_rows(tmp_path) == []
    assert not list(tmp_path.glob("neg/*"))


def test_the_early_copy(tmp_path):
    """The generator is the final model, or one of another step."""
    examples = make_examples(8)
    policy = fit_once(tmp_path / "a", "sft", examples, early_copy=(1.5, tmp_path / "early"))
    early = GPT.from_pretrained(tmp_path / "early").embed_tokens.weight
    assert (tmp_path / "early" / "tokenizer.json").exists()
    assert not torch.equal(early, policy.model.embed_tokens.weight)
    stop_at(3, tmp_path / "b", "sft", examples, save_seconds=0)  # of six steps
    checkpoint = load_file(tmp_path / "b" / "neg" / "checkpoint.safetensors")
    assert torch.equal(checkpoint["weight.embed_tokens.weight"], early)


def test_a_generator_of_no_epochs_is_the_base(tmp_path):
    """--generator-epochs 0 that takes a step all the same."""
    before = make_policy().model.embed_tokens.weight
    fit_once(tmp_path, "sft", make_examples(8), early_copy=(0.0, tmp_path / "early"))
    assert torch.equal(GPT.from_pretrained(tmp_path / "early").embed_tokens.weight, before)


def test_a_stage_that_starts_anew_clears_its_folder(tmp_path):
    """Samples, values and responses of the model that stood in the folder before, in the table of
    the one that was trained in its place."""
    examples = make_examples(8)
    made = ["samples.jsonl", "values.jsonl", "pits.jsonl", "pairs.jsonl", "eval/greedy.jsonl"]
    for folder in ("neg", "early"):
        for name in [*made, "held_out/greedy.jsonl", "notes.txt", "notes.tmpl"]:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("old")
    stop_at(3, tmp_path, "sft", examples, save_seconds=0)
    left = {path.name for path in (tmp_path / "neg").iterdir()}
    assert left == {"checkpoint.safetensors", "notes.txt", "notes.tmpl"}
    (tmp_path / "neg" / "samples.jsonl").write_text("new")
    fit_once(tmp_path, "sft", examples, early_copy=(2.5, tmp_path / "early"))
    assert (tmp_path / "neg" / "samples.jsonl").exists(), "a stage that goes on clears nothing"
    left = {path.name for path in (tmp_path / "early").iterdir()}
    assert not left & {"samples.jsonl", "eval", "held_out"} and "notes.txt" in left


def test_rounding_is_said(tmp_path, capsys):
    """A policy that is trained in float32 and sampled in bfloat16, where it is the base again."""
    policy = make_policy()
    policy.model.bfloat16().float()  # as released weights are
    policy.tokenizer.save(tmp_path / "base")
    policy.model.save_pretrained(tmp_path / "base")
    policy.folder = str(tmp_path / "base")
    for dtype, lr in (("float32", 1e-5), ("bfloat16", 1e-5), ("bfloat16", 1.0)):
        c = config(sampling_dtype=dtype, out=str(tmp_path / f"{dtype}-{lr}"), save_seconds=1e9)
        trained = copy.deepcopy(policy)
        fit(trained, make_examples(4), nll, c, "sft", epochs=1.0, lr=lr)
        err = capsys.readouterr().err
        said = re.search(r"sampling in bfloat16 rounds (\d+)% of the moved weights back", err)
        assert bool(said) == (dtype == "bfloat16" and lr < 1)
        assert not said or int(said[1]) > 50


def test_nothing_is_printed_raw(capsys):
    """Control characters of the data, which clear or recolour the screen."""
    policy = make_policy()
    policy.tokenizer = SimpleNamespace(decode=lambda ids: "\x1b[2J red \u202e\n")
    train.show(policy, Example("p", [1], [2]))
    printed = capsys.readouterr().out
    assert printed.isascii() and printed.replace("\n", "").isprintable()


@pytest.mark.parametrize("batch, epochs, want", [(4, 3.0, 7), (4, 0.01, 1), (9, 2.0, 2)])
def test_counts_of_steps(tmp_path, batch, epochs, want):
    """Epochs that are rounded away, or that count batches; gradients that are still allocated when
    the policy samples (NeMo-RL#1147)."""
    policy = fit_once(tmp_path, "sft", make_examples(9), config(batch=batch), epochs=epochs)
    assert len(log_rows(tmp_path)) == want
    assert all(p.grad is None for p in policy.model.parameters())


def test_it_learns(tmp_path):
    """A gradient of the wrong sign: a memorised text is generated, up to its end; Eq. 1 then makes
    another one more likely."""
    problems = load_problems("arithmetic", "train", 3, spurious=0.0, steps=1, distractors=0)
    policy = make_policy(std=0.02)
    prompts = [policy.prompt(problem) for problem in problems]
    answers = [policy.solution(problem) for problem in problems]
    triples = list(zip(problems, prompts, answers, strict=True))
    c = config(batch=3, warmup=0.05, beta=0.1, save_seconds=1e9)
    examples = [Example(problem.id, prompt, answer) for problem, prompt, answer in triples]
    fit_once(tmp_path / "sft", "sft", examples, c, policy, epochs=150.0)

    def greedy():
        return [samples[0] for samples in policy.generate(prompts, temperature=0)]

    assert greedy() == answers
    pairs = [
        Pair(problem.id, "response", 1, prompt, answer[:3] + [EOS], answer)
        for problem, prompt, answer in triples
    ]
    fit_once(tmp_path / "neg", "dpo", pairs, c, policy, epochs=60.0, lr=2e-3)
    rows = log_rows(tmp_path / "neg")
    assert float(rows[0]["pair_loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(rows[-1]["margin"]) > 1
    assert greedy() != answers


# ---------------------------------------------------------------- flags

# Every flag of a run on a JSONL file: a value that is not its default, and how to find it among the
# arguments of the functions that it is for.
FLAGS = dict(
    model=(str(BASE), lambda calls: calls.load_policy[0].folder),
    seed=(5, lambda calls: calls.batch_indices[0].seed),
    data=("train.jsonl", lambda calls: calls.load_problems[0].data),
    limit=(7, lambda calls: len(calls.train_sft[0].problems)),
    held_out=(3, lambda calls: len(calls.evaluate[1].problems)),
    test_data=("test.jsonl", lambda calls: calls.load_problems[1].data),
    test_limit=(5, lambda calls: len(calls.evaluate[0].problems)),
    prompt=("{question}?\n", lambda calls: calls.sample[0].policy.prompt_format),
    max_new_tokens=(9, lambda calls: calls.sample[0].policy.sampling.max_new_tokens),
    temperature=(0.9, lambda calls: calls.sample[0].policy.sampling.temperature),
    slots=(6, lambda calls: calls.sample[0].policy.slots),
    device=("cpu", lambda calls: calls.sample[0].policy.model.norm.weight.device.type),
    dtype=("bfloat16", lambda calls: calls.sample[0].policy.dtype),
    sampling_dtype=(
        "float16",
        lambda calls: str(calls.sample[0].policy.model.norm.weight.dtype)[6:],
    ),
    threads=(1, lambda calls: torch.get_num_threads()),
    samples=(3, lambda calls: calls.sample[0].n),
    eval_samples=(2, lambda calls: calls.evaluate[0].samples),
    keep=(1, lambda calls: calls.most_diverse[0].limit),
    negatives=(1, lambda calls: calls.solutions_to_value[0].wrong),
    rollouts=(2, lambda calls: calls.value_steps[0].k),
    scan=("full", lambda calls: calls.value_steps[0].scan),
    pairs=("response", lambda calls: calls.make_pairs[0].form),
    beta=(0.7, lambda calls: calls.dpo_loss[0].c.beta),
    nll=(0.25, lambda calls: calls.dpo[0].c.nll),  # test_likelihood_beside_eq_1
    batch=(2, lambda calls: calls.batch_indices[0].batch),
    lr=(3e-4, lambda calls: calls.learning_rate[0].peak),
    neg_lr=(2e-4, lambda calls: calls.learning_rate[-1].peak),
    sft_epochs=(1.5, lambda calls: calls.fit[0].epochs),
    generator_epochs=(0.5, lambda calls: calls.fit[0].early_copy[0]),
    pos_epochs=(0.75, lambda calls: calls.fit[1].epochs),
    neg_epochs=(1.25, lambda calls: calls.fit[2].epochs),
    warmup=(0.4, lambda calls: calls.learning_rate[0].warmup),
    weight_decay=(0.02, lambda calls: calls.AdamW[0].weight_decay),
    clip=(0.5, lambda calls: calls.clip_grad_norm_[0].max_norm),
    micro_tokens=(300, lambda calls: calls.my_micro_batches[0].tokens),
    gradient_checkpointing=(1, lambda calls: calls.fit[0].policy.model.gradient_checkpointing),
    save_seconds=(0.0, lambda calls: len(calls.learning_rate) - len(calls.save_checkpoint)),
    rounds=(2, lambda calls: len(calls.make_pairs)),
    out=("folder", lambda calls: calls.evaluate[0].folder.parts[0]),
)
# Those of the next tests.
OTHER_FLAGS = {"mode", "loss", "split", "spurious", "steps", "distractors", "again_lr"}
OTHER_FLAGS |= {"again_epochs"}


def spy(monkeypatch, owner, name, calls, fake=None):
    """Keep the arguments of all calls of owner.name in the list calls.name."""
    real = getattr(owner, name)
    signature = inspect.signature(real)
    seen = vars(calls)[name] = []

    def spied(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(SimpleNamespace(**bound.arguments))
        return (fake or real)(*args, **kwargs)

    monkeypatch.setattr(owner, name, spied)


def fake_sample(policy, problems, path, n, temperature=None):
    """The teacher's solution, one with a step more, and wrong ones."""
    rows = {}
    for problem in problems:
        more = policy.tokenizer.encode("1 + 1 = 2\n" + problem.solution) + [EOS]
        wrong = policy.tokenizer.encode(problem.solution.replace("####", "####  3")) + [EOS]
        samples = [policy.judge(policy.solution(problem), problem), policy.judge(more, problem)]
        samples += [policy.judge([i + 5, *wrong], problem) for i in range(n - 2)]
        rows[problem.id] = samples
    return rows


def fake_value_steps(policy, problems, solutions, path, *, k, scan="first", **_):
    for s in solutions:
        s.q_values = [0.0] * len(s.ends)
        s.first_pit = 1
    return solutions


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """After run_with, calls.sample[0].n is what the first call of `sample` got for n, and so on.
    The samples and their values are made up."""
    problems = load_problems("arithmetic", "train", 12, spurious=0.0)
    for name in ("train.jsonl", "test.jsonl"):
        write_rows(
            tmp_path / name, [dict(question=p.question, answer=p.solution) for p in problems]
        )
    monkeypatch.chdir(tmp_path)
    calls = SimpleNamespace()
    fakes = dict(sample=fake_sample, value_steps=fake_value_steps)
    fakes["ask_pits_again"] = lambda *arguments, **_: []
    names = """fit load_problems load_policy sample most_diverse solutions_to_value value_steps
        make_pairs evaluate batch_indices learning_rate my_micro_batches dpo_loss awr_weights
        save_checkpoint train_sft ask_pits_again"""
    for name in names.split():
        spy(monkeypatch, train, name, calls, fakes.get(name))
    spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", calls)
    spy(monkeypatch, torch.optim, "AdamW", calls)
    spy(monkeypatch, train, "dpo", calls)
    monkeypatch.setitem(LOSSES, "dpo", train.dpo)
    monkeypatch.setattr(evaluate, "sample", fake_sample)
    return calls


def run_with(**changes):
    """A run with FLAGS, or other values."""
    flags = []
    for name, value in ({name: value for name, (value, _) in FLAGS.items()} | changes).items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    train.run(resolve(parse_flags(TrainFlags, "", flags)))


def test_flags_reach_what_they_set(calls):
    """Options that nothing reads (Next-Token-Failures: weight decay, schedule); a stage that starts
    from the model of another, or samples with its random numbers."""
    defaults = asdict(resolve(TrainFlags(data="x.jsonl")))
    assert set(defaults) == set(FLAGS) | OTHER_FLAGS, "a flag that this test does not know"
    run_with()
    for name, (value, find) in FLAGS.items():
        assert value != defaults[name], name
        assert find(calls) == value, name
    starts = [str(call.folder) for call in calls.load_policy if call.train]
    assert starts[-4:] == [str(BASE), str(BASE), "folder/pos", "folder/neg"]
    # the seed is of samples and pairs, too; each round samples with one of its own
    assert [call.policy.sampling.seed for call in calls.sample] == [5, 1005, 2005]
    assert calls.make_pairs[0].seed == 5


STAGES = dict(sft=["sft"], pos=["sft", "pos"], neg=["sft", "pos", "neg"])


@pytest.mark.parametrize("mode", STAGES)
def test_modes(calls, mode):
    """A stage more or less than --mode names."""
    run_with(mode=mode, rounds=1)
    assert [call.name for call in calls.fit] == STAGES[mode]
    folders = [call.folder for call in calls.evaluate]
    assert [f.parent.name for f in folders if f.name == "eval"] == STAGES[mode]


def test_what_each_stage_is_trained_on(calls):
    """pos that imitates wrong samples, leaves the teacher's out, or those of another policy; own
    solutions without their end of text; the rate or the epochs of another stage."""
    run_with(rounds=1, samples=6, keep=2)
    sft, pos, neg = calls.fit
    train_problems = calls.train_sft[0].problems
    teacher = [pos.policy.solution(problem) for problem in train_problems]
    assert len(teacher) == 7 and [item.response for item in sft.items] == teacher
    assert [item.response for item in pos.items[:7]] == teacher
    judged = {}
    for samples in calls.most_diverse:
        assert all(s["correct"] for s in samples.samples) and samples.limit == 2
        judged |= {tuple(s["ids"]): s for s in samples.samples}
    own = pos.items[7:]
    assert len(own) == 14, "the teacher's solution and one in other words"
    assert all(judged[tuple(item.response)]["correct"] for item in own)
    assert all(item.response[-1] == EOS for item in own)
    assert {item.id for item in own} == {problem.id for problem in train_problems}
    folders = [str(call.policy.folder) for call in calls.sample[:2]]
    assert folders == ["folder/generator", "folder/pos"]
    assert [str(call.path) for call in calls.sample[:2]] == [f"{x}/samples.jsonl" for x in folders]
    assert [call.lr for call in calls.fit] == [3e-4, 3e-4, 2e-4]
    assert [call.epochs for call in calls.fit] == [1.5, 0.75, 1.25]
    assert neg.loss is LOSSES["dpo"] and isinstance(neg.items[0], Pair)


def test_the_table_is_of_test_problems(calls):
    """A table of training problems; held-out problems that are those of the test."""
    run_with(rounds=1)
    asked = {problem.id for problem in calls.train_sft[0].problems}
    for call in calls.fit:
        assert {item.id for item in call.items} == asked
    judged = [(call.folder.name, {p.id for p in call.problems}) for call in calls.evaluate[:2]]
    assert judged == [("eval", {str(i) for i in range(5)}), ("held_out", {"7", "8", "9"})]
    assert {str(i) for i in range(7)} == asked, "of the other file"


def test_a_file_is_split_by_its_questions(tmp_path, capsys):
    """A test set that changes with --limit, or of 7 problems; a question that stands twice trained
    and tested on; held-out questions trained on; fewer training problems than asked for."""
    problems = load_problems("arithmetic", "train", 300)
    rows = [dict(question=p.question, answer=p.solution) for p in problems + problems[:60]]
    write_rows(tmp_path / "p.jsonl", rows)
    write_rows(tmp_path / "t.jsonl", rows[295:305])
    flags = dict(data=str(tmp_path / "p.jsonl"), held_out=10, limit=0, test_limit=0)
    parts = load_data(config(**flags))
    train, test, held_out = [{p.question for p in part} for part in parts]
    assert not train & test and not train & held_out and not test & held_out
    assert train | test | held_out == {p.question for p in problems}
    assert 20 < len(parts[1]) < 60 and 8 <= len(parts[2]) <= 10
    few, again, _ = load_data(config(**flags | dict(limit=50)))
    assert len(few) == 50 and again == parts[1]
    assert load_data(config(**flags | dict(test_limit=5)))[1] == parts[1][:5]
    assert "trained on" not in capsys.readouterr().err
    load_data(config(**flags | dict(test_data=str(tmp_path / "t.jsonl"))))
    assert "test problems have a question that is trained on" in capsys.readouterr().err


def test_repeated_questions_are_sampled_once(tmp_path):
    """Rows that repeat a question: equal samples of each, and --keep 4 becomes 16."""
    [one, other] = load_problems("arithmetic", "train", 2)
    problems = [one, replace(one, id="b", solution="5 + 5 = 10\n#### 10"), other]
    policy = make_policy()
    policy.folder = str(tmp_path)
    samples = train.sample_own_problems(policy, problems, config(samples=2, max_new_tokens=4))
    assert list(samples) == [one.id, other.id]
    right = [policy.judge(policy.solution(p), p) for p in (one, replace(one, solution="#### 1"))]
    right[1]["correct"] = True
    own = train.own_examples(policy, problems, {one.id: right, other.id: []}, keep=4)
    assert [item.response for item in own] == [s["ids"] for s in right]
    assert len(train.teacher_examples(policy, problems)) == 3, "each solution counts for SFT"


def test_eq_4_takes_its_flags(calls):
    """--loss awr that trains on pairs, or on wrong solutions only; another beta."""
    run_with(loss="awr", rounds=1)
    assert calls.make_pairs == []
    assert calls.solutions_to_value[0].correct == FLAGS["keep"][0]
    assert calls.awr_weights[0].beta == FLAGS["beta"][0]
    assert calls.fit[-1].loss is LOSSES["awr"]
    assert all(item.weights for item in calls.fit[-1].items)


def test_flags_of_the_built_in_task(calls):
    """Test problems of the wrong split or of another difficulty; a seed that changes them."""
    world = dict(spurious=0.3, steps=2, distractors=1)
    load_data(config(split="val", limit=4, held_out=3, test_limit=6, seed=8, **world))
    both = [dict(split="train", limit=7, seed=8), dict(split="val", limit=6, seed=0)]
    assert [vars(call) for call in calls.load_problems] == [
        dict(data="arithmetic") | own | world for own in both
    ]


def test_defaults_by_task():
    """A default of another task, or one that overrides what the user said."""
    for data, task in (("arithmetic", "arithmetic"), ("my/own.jsonl", "jsonl")):
        c = resolve(TrainFlags(data=data))
        assert asdict(c).items() >= PRESETS[task].items()
        assert c.out == f"runs/{Path(data).stem}"
    own = dict(limit=7, eval_samples=0, prompt="{question}!", out="x", model="y")
    assert asdict(resolve(TrainFlags(**own))).items() >= own.items()


@pytest.mark.parametrize("name, value", [("prompt", 5), ("temperature", "hot"), ("steps", 2.5)])
def test_a_broken_policy_file(tmp_path, name, value):
    """A traceback, or a model that is tested otherwise than it was trained, without a word."""
    (tmp_path / "policy.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"policy.json: {name}={value!r} is no "):
        resolve(TrainFlags(model=str(tmp_path)))
    (tmp_path / "policy.json").write_text('{"temperature": 1, "steps": 2}')
    assert resolve(TrainFlags(model=str(tmp_path))).steps == 2


def test_scan_and_loss():
    """Eq. 4 on solutions that were valued up to their pit only."""
    assert resolve(TrainFlags()).scan == "first"
    assert resolve(TrainFlags(scan="full")).scan == "full"
    assert resolve(TrainFlags(loss="awr")).scan == "full"
    with pytest.raises(UserError, match="--loss awr needs the value of every step"):
        resolve(TrainFlags(loss="awr", scan="first"))


@pytest.mark.parametrize("name", ["mode", "loss", "scan", "pairs", "split"])
def test_unknown_choices(name):
    """A mistyped choice that is silently taken for the default."""
    with pytest.raises(UserError, match=f"--{name}"):
        parse_flags(TrainFlags, "", [f"--{name}", "both"])

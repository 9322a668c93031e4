"""Tests of model.py against answers that transformers gave for the tiny models of tests/golden (see make_golden.py)."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as model_module
from model import GPT, CheckpointError, Config, KVCache, rope_angles

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
TOLERANCE = dict(atol=1e-4, rtol=0)
TOY = dict(model_type="llama", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def golden(name):
    return GPT.from_pretrained(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")


def wide(config, std=0.3):
    """A random model whose logits differ strongly: with weights of 0.02 a wrong mask would change almost nothing."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def real(lengths, T):
    return torch.arange(T)[None] < lengths[:, None]


def assert_same(got, want, lengths):
    mask = real(lengths, got.shape[1])
    torch.testing.assert_close(got[mask], want[mask], **TOLERANCE)


@pytest.fixture
def folder(tmp_path):
    """copy(name, config changes, tensor edit) -> a changed copy of a golden folder."""

    def copy(name, edit=None, tensors=None, drop=()):
        target = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDEN / name, target)
        config = json.loads((target / "config.json").read_text()) | (edit or {})
        (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
        if tensors is not None:
            weights = load_file(target / "model.safetensors")
            weights = tensors(weights) or weights
            save_file({k: v.contiguous().clone() for k, v in weights.items()}, target / "model.safetensors")
        return target

    return copy


def refuses(path, *words):
    """Loading raises CheckpointError whose message is one line holding all the words."""
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message


@pytest.fixture(params=[64, 3])
def portion(request, monkeypatch):
    """A cache that has all its room at once, and one that grows (by three)."""
    monkeypatch.setattr(model_module, "PORTION", request.param)


with_both = pytest.mark.usefixtures("portion")

# ---- numbers


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_match_transformers(name):
    """Guards every switch of every family: rope scaling dropped (nano-vllm), biases, norms, tying, windows, GQA.
    The batch is of mixed lengths, the answers are of each row alone: padding must not leak (transformers#28385)."""
    model, want = golden(name)
    assert_same(model(want["ids"]), want["logits"], want["lengths"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_matches_transformers_without_cache(name):
    """Guards an off-by-one in positions that a single forward hides: token for token against transformers."""
    model, want = golden(name)
    for row, length in enumerate(want["lengths"].tolist()):
        text = want["ids"][row : row + 1, :length]
        for token in want["greedy"][row]:
            assert model(text)[0, -1].argmax() == token
            text = torch.cat((text, token.view(1, 1)), dim=1)


@pytest.mark.parametrize("name", NAMES)
@with_both
@torch.no_grad()
def test_greedy_matches_transformers_with_cache(name):
    """Guards one position shared by all rows of a mixed-length batch (unsloth#3699), which learned positions show and
    rotary ones hide (nnsight#673): mixed-length prefill, then all rows decode together."""
    model, want = golden(name)
    lengths = want["lengths"]
    cache = KVCache(model.config, rows=len(lengths), capacity=32)
    logits = model(want["ids"], cache, lengths)
    assert_same(logits, want["logits"], lengths)
    last = logits[torch.arange(len(lengths)), lengths - 1]
    for step in range(want["greedy"].shape[1]):
        assert torch.equal(last.argmax(-1), want["greedy"][:, step])
        last = model(want["greedy"][:, step : step + 1], cache)[:, 0]
    assert torch.equal(cache.lengths, lengths + want["greedy"].shape[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [(1,) * 13, (5, 8), (4, 1, 6, 2)])
@with_both
@torch.no_grad()
def test_chunked_prefill_matches_one_forward(name, chunks):
    """Guards rotary angles or masks that restart at a chunk (nanochat#855), rows of equal length (no mask) and rows
    that ended earlier (count 0) alike."""
    model, want = golden(name)
    ids, lengths = want["ids"], want["lengths"]
    ragged, even = KVCache(model.config, 4, 13), KVCache(model.config, 4, 13)
    full, start = model(ids), 0
    for chunk in chunks:
        part = ids[:, start : start + chunk]
        counts = (lengths - start).clamp(0, chunk)
        got = model(part, ragged, counts)
        mask = real(counts, chunk)
        torch.testing.assert_close(got[mask], want["logits"][:, start : start + chunk][mask], **TOLERANCE)
        torch.testing.assert_close(model(part, even), full[:, start : start + chunk], **TOLERANCE)
        start += chunk
    assert torch.equal(ragged.lengths, lengths) and even.lengths.tolist() == [13] * 4


@with_both
@torch.no_grad()
def test_batch_smaller_than_cache():
    """Guards rows beyond the batch: they keep what they hold, and their lengths do not mislead the mask."""
    model, want = golden("llama3")
    cache = KVCache(model.config, rows=4, capacity=20)
    model(want["ids"], cache, want["lengths"])
    before = cache.k[:, 2:].clone()
    got = model(want["greedy"][:2, :1], cache)
    row = torch.cat((want["ids"][1, :4], want["greedy"][1, :1]))[None]
    torch.testing.assert_close(got[1], model(row)[0, -1:], **TOLERANCE)
    assert torch.equal(cache.k[:, 2:], before) and cache.lengths.tolist() == [14, 5, 1, 9]
    with pytest.raises(ValueError, match="5 rows"):
        model(torch.zeros(5, 1, dtype=torch.long), cache)


@with_both
@torch.no_grad()
def test_rows_of_equal_length_are_not_assumed():
    """Guards the fast path without mask and index: it must end when part of the rows has moved on."""
    model, want = golden("llama")
    ids = want["ids"]
    cache = KVCache(model.config, rows=4, capacity=13)
    model(ids[:, :5], cache)
    model(ids[:2, 5:8], cache)
    got = model(ids[:, 8:9], cache)
    for row, start in enumerate((8, 8, 5, 5)):
        text = torch.cat((ids[row, :start], ids[row, 8:9]))[None]
        torch.testing.assert_close(got[row, 0], model(text)[0, -1], **TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral"])
@with_both
@torch.no_grad()
def test_capacity_boundary(name):
    """Guards scheduling errors at the edge (nano-vllm#66): length == capacity works, capacity + 1 is refused, and
    padding that sticks out beyond the capacity neither raises nor overwrites a real token."""
    model, want = golden(name)
    ids, lengths = want["ids"], want["lengths"]
    cache = KVCache(model.config, 4, capacity=13)
    logits = model(ids, cache, lengths)  # row 0 is full now
    assert_same(logits, want["logits"], lengths)
    with pytest.raises(ValueError, match="14 tokens, the limit is 13"):
        model(ids[:, :1], cache)
    assert torch.equal(cache.lengths, lengths)  # refused means untouched
    counts = torch.tensor([0, 9, 3, 4])  # rows 1 and 3 become full exactly; row 0's padding lies beyond the end
    more = torch.randint(72, (4, 9))
    got = model(more, cache, counts)
    for row in (1, 2, 3):
        text = torch.cat((ids[row, : lengths[row]], more[row, : counts[row]]))[None]
        torch.testing.assert_close(got[row, : counts[row]], model(text)[0, lengths[row] :], **TOLERANCE)
    cache.set_lengths(cache.lengths - torch.tensor([1, 1, 0, 1]))  # the last token again: row 0 must be unharmed
    again = model(ids[:, 12:13], cache, torch.tensor([1, 0, 0, 0]))
    torch.testing.assert_close(again[0, 0], want["logits"][0, 12], **TOLERANCE)


@torch.no_grad()
def test_learned_positions_boundary():
    """Guards a read beyond the position table (a CUDA assert, or a wrong row): max_len works, max_len + 1 is refused,
    with a cache larger than max_len too."""
    model, _ = golden("gpt2")
    text = torch.randint(72, (1, 33))
    want = model(text[:, :32])
    with pytest.raises(ValueError, match="33 tokens"):
        model(text)
    cache = KVCache(model.config, 1, capacity=64)
    padded = torch.cat((text, text), dim=1)  # padding lies beyond the last position
    got = model(padded, cache, torch.tensor([32]))
    torch.testing.assert_close(got[:, :32], want, **TOLERANCE)
    with pytest.raises(ValueError, match="33 tokens"):
        model(text[:, :1], cache)


@with_both
@torch.no_grad()
def test_loose_bound_is_measured_before_refusing():
    """Guards a decode loop whose finished rows (count 0) still push the host's bound to the capacity."""
    model, want = golden("llama")
    cache = KVCache(model.config, 2, capacity=4)
    for _ in range(9):
        model(want["ids"][:2, :1], cache, torch.tensor([0, 0]))
    model(want["ids"][:2, :4], cache)
    assert cache.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window"])
@with_both
@torch.no_grad()
def test_copy_rows_and_keep(name):
    """Guards n samples from one prefill and the compaction of finished rows: each row continues as if alone."""
    model, want = golden(name)
    ids, lengths, greedy = want["ids"], want["lengths"], want["greedy"]
    prompts, samples = KVCache(model.config, 4, 13), KVCache(model.config, 6, 25)
    model(ids, prompts, lengths)
    source = torch.tensor([1, 1, 0, 3, 2])
    samples.copy_rows(prompts, source, torch.tensor([5, 0, 2, 1, 4]))
    assert samples.lengths.tolist() == [4, 9, 13, 0, 1, 4] and (samples.shortest, samples.longest) == (0, 13)
    kept, rows = torch.tensor([2, 5, 1]), [0, 1, 3]
    samples.keep(kept)
    assert samples.rows == 3 and samples.lengths.tolist() == [13, 4, 9]
    for step in range(11):
        got = model(greedy[rows, step : step + 1], samples).argmax(-1)[:, 0]
        assert torch.equal(got, greedy[rows, step + 1])
    with pytest.raises(ValueError, match="does not fit"):
        KVCache(model.config, 1, 12).copy_rows(prompts, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window", "mistral"])
@with_both
@torch.no_grad()
def test_rows_behind_a_common_prefix(name, monkeypatch):
    """Guards attention over two caches: texts that branch off a prompt, at its end or before, beside others that
    started earlier and beside free rows, say what each of them says alone; after rows were dropped, too."""
    monkeypatch.setattr(model_module, "SHARED", 2)
    model, want = golden(name)
    ids, lengths, generator = want["ids"], want["lengths"], torch.Generator().manual_seed(0)
    source, cache, texts = KVCache(model.config, 4, 13), KVCache(model.config, 6, 12), {}

    def go_on(steps):
        for _ in range(steps):
            new = torch.randint(72, (cache.rows, 1), generator=generator)
            got = model(new, cache)[:, 0]
            for row in texts:
                texts[row] = torch.cat((texts[row], new[row]))
                torch.testing.assert_close(got[row], model(texts[row][None])[0, -1], **TOLERANCE)

    def start(rows, origins, stems):
        cache.branch(list(texts), rows, source, origins, stems)
        texts.update({row: ids[origin, :stem] for row, origin, stem in zip(rows, origins, stems, strict=True)})

    model(ids, source, lengths)
    start([4, 0, 1, 2], [0, 0, 0, 1], [13, 13, 6, 4])  # two and one of the same row; 3 and 5 are free
    assert len(cache.prefix.lengths) == 3
    go_on(3)
    del texts[0], texts[2]  # finished
    start([2, 5], [3, 0], [9, 2])
    assert cache.lengths.tolist()[1:3] == [3, 0] and len(cache.prefix.lengths) == 4
    go_on(2)
    cache.keep(torch.tensor([5, 1]))
    texts = {0: texts[5], 1: texts[1]}
    assert len(cache.prefix.lengths) == 2
    go_on(4)
    with pytest.raises(ValueError, match="1 rows"):
        model(ids[:1, :1], cache)
    with pytest.raises(ValueError, match="13 tokens, the limit is 12"):
        go_on(4)


@torch.no_grad()
def test_learned_positions_end_behind_a_prefix():
    """Guards a position table that is longer than what a row holds itself, but not than its prefix and that."""
    model, want = golden("gpt2")
    source, cache = KVCache(model.config, 1, 30), KVCache(model.config, 2, 30)
    model(torch.randint(72, (1, 30)), source)
    cache.branch([], [0, 1], source, [0, 0], [30, 1])
    for _ in range(2):
        model(torch.zeros(2, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="33 tokens, the limit is 32"):
        model(torch.zeros(2, 1, dtype=torch.long), cache)
    model(torch.zeros(2, 1, dtype=torch.long), cache, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-window"])
@torch.no_grad()
def test_bfloat16_decode(name):
    """Guards the layout that bfloat16 takes on a CPU: as near to fp32's logits as one forward without a cache is."""
    model, want = golden(name)
    lengths, half = want["lengths"], GPT.from_pretrained(GOLDEN / name, dtype=torch.bfloat16)
    cache = KVCache(half.config, rows=len(lengths), capacity=32, dtype=torch.bfloat16)
    half(want["ids"], cache, lengths)
    whole = (half(want["ids"]).float() - want["logits"]).abs()[real(lengths, want["ids"].shape[1])].max()
    for step in range(want["greedy"].shape[1]):
        got = half(want["greedy"][:, step : step + 1], cache)[:, 0].float()
        for row, length in enumerate(lengths.tolist()):
            text = torch.cat((want["ids"][row, :length], want["greedy"][row, : step + 1]))[None]
            assert (got[row] - model(text)[0, -1]).abs().max() < 2 * whole


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_matrices_are_the_same_model(name):
    """Guards a bias, a head or a projection forgotten in packing, for every family; and saving after it."""
    model, want = golden(name)
    model.pack()
    assert_same(model(want["ids"]), want["logits"], want["lengths"])
    assert not any(name.endswith("proj.weight") for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="packed"):
        model.save_pretrained("nowhere")


@with_both
def test_stale_slots_are_never_seen():
    """Guards 0 * NaN: a forgotten or never written slot must not reach a result, whatever it holds within reason."""
    config = Config.from_hf(TOY)
    model = wide(config)
    ids = torch.randint(50, (2, 9))
    cache = KVCache(config, 2, 16)
    model(ids, cache)
    cache.set_lengths(torch.tensor([3, 5]))
    got = model(ids[:, :1] * 0 + 7, cache)
    alone = model(torch.cat((ids[0, :3], torch.tensor([7])))[None])
    torch.testing.assert_close(got[0, 0], alone[0, -1], **TOLERANCE)
    assert not got.requires_grad or got.grad_fn is not None and not cache.k.requires_grad


def test_gradient_checkpointing_changes_nothing():
    """Guards a recomputation that sees other masks: same loss, same gradients; and gradients reach every weight."""
    for family in ("gpt2", "llama3", "qwen2-window"):
        model, want = golden(family)
        grads = []
        for flag in (False, True):
            model.gradient_checkpointing = flag
            model.zero_grad()
            model(want["ids"]).logsumexp(-1).sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
            assert a.abs().sum() > 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_of_queries_are_causal_attention(monkeypatch, kv_heads):
    """Attention in blocks that sees a later token, misses the block's own past, or gives a head another's keys."""
    model = wide(Config.from_hf(TOY | dict(num_key_value_heads=kv_heads)))
    ids, results = torch.randint(50, (2, 300)), []  # two blocks and a part of one
    for block in (10**6, 128):
        monkeypatch.setattr(model_module, "BLOCK", block)
        model.zero_grad()
        logits = model(ids)
        (logits.logsumexp(-1) * torch.arange(300)).sum().backward()
        results.append([logits.detach(), *(p.grad / p.grad.abs().max() for p in model.parameters())])
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole, **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_activations_made_again(monkeypatch, family):
    """What is computed twice keeps less and changes no gradient, with and without autocast; small batches keep all."""
    model, want = golden(family)
    kept, plain = {}, model_module.checkpoint

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    for precision, tolerance in ((torch.float32, 0), (torch.bfloat16, 0.05)):
        results = []
        for large in (2**20, 0):
            monkeypatch.setattr(model_module, "LARGE", large)
            monkeypatch.setattr(model_module, "checkpoint", lambda function, *inputs, **options: (
                [keep(x) for x in inputs if torch.is_tensor(x)], plain(function, *inputs, **options))[1])  # fmt: skip
            kept.clear()
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
            model.zero_grad()
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = model(want["ids"]).float().logsumexp(-1).sum()
            loss.backward()
            size = sum(t.untyped_storage().nbytes() for t in kept.values())
            results.append((size, torch.cat([p.grad.flatten() for p in model.parameters()])))
        (size, grad), (less, again) = results
        assert less < 0.8 * size
        assert (again - grad).norm() <= tolerance * grad.norm()


@torch.no_grad()
def test_rotary_angles_survive_a_cast():
    """Guards frequencies rounded by model.to(bfloat16): at position 1000 that would turn the angle by several turns."""
    model = wide(Config.from_hf(TOY))
    position = torch.tensor([[1000]])
    cos, sin = rope_angles(model.to(torch.bfloat16).config, position, torch.float32)
    want = 1000.0 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(cos.flatten().double(), want.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin.flatten().double(), want.sin(), atol=1e-3, rtol=0)
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_random_init():
    """Guards an initialisation that explodes or a residual projection that is not scaled down."""
    model = GPT(Config.from_hf(TOY | dict(hidden_size=64, tie_word_embeddings=True)))
    layer = model.layers[0]
    assert 0.018 < layer.self_attn.q_proj.weight.std() < 0.022 and 0.008 < layer.mlp.down_proj.weight.std() < 0.012
    assert model.lm_head is None and (layer.input_layernorm.weight == 1).all()


# ---- config.json


def test_transformers_4_and_5_forms_agree():
    """Guards a theta or scaling read in one form and dropped in the other (llama-models#241)."""
    numbers = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    old = Config.from_hf(TOY | dict(rope_theta=500.0, rope_scaling=dict(numbers, type="llama3")))
    new = dict(numbers, rope_type="llama3", rope_theta=500.0)
    assert old == Config.from_hf(TOY | dict(rope_parameters=new)) and old.rope_theta == 500.0
    assert old == Config.from_hf(TOY | dict(rope_parameters={"full_attention": new, "sliding_attention": dict(new)}))
    assert old.rope_scaling == dict(numbers, rope_type="llama3")
    plain = Config.from_hf(TOY)
    assert plain == Config.from_hf(TOY | dict(rope_scaling=None, rope_theta=10000.0))
    assert plain == Config.from_hf(TOY | dict(rope_parameters=dict(rope_type="default", rope_theta=10000)))
    with pytest.raises(CheckpointError, match="differ by layer"):
        Config.from_hf(TOY | dict(rope_parameters={"full_attention": new, "sliding_attention": dict(new, factor=2.0)}))


@torch.no_grad()
def test_golden_in_the_other_form(folder):
    """As above, in numbers: the golden folders are of transformers 5, here they are read in the form of 4."""
    for name, old in {
        "llama-linear": dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0}),
        "llama3": dict(rope_theta=100.0, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                           high_freq_factor=4.0, original_max_position_embeddings=16)),
    }.items():
        want = load_file(GOLDEN / name / "golden.safetensors")
        model = GPT.from_pretrained(folder(name, old, drop=["rope_parameters"]))
        assert_same(model(want["ids"]), want["logits"], want["lengths"])


def test_defaults_of_missing_keys():
    """Guards a default taken from the wrong family when config.json leaves a key out."""
    base = {k: v for k, v in TOY.items() if k not in ("num_key_value_heads", "model_type")}
    eight = base | dict(num_attention_heads=8)
    config = {name: Config.from_hf(eight | dict(model_type=name)) for name in ("llama", "mistral")}
    assert config["llama"].n_kv_head == 8 and config["llama"].head_dim == 4 and config["llama"].window is None
    assert config["mistral"].n_kv_head == 8 and config["mistral"].window == (4096, 4096)
    assert Config.from_hf(base | dict(model_type="llama", head_dim=None, num_key_value_heads=None)).n_kv_head == 4
    with pytest.raises(CheckpointError, match="8 key heads"):
        Config.from_hf(base | dict(model_type="mistral"))
    qwen2 = Config.from_hf(TOY | dict(model_type="qwen2"))
    assert qwen2.qkv_bias and not qwen2.out_bias and not qwen2.tied and qwen2.window is None
    assert qwen2.eos_token_id == ()
    qwen3 = Config.from_hf(TOY | dict(model_type="qwen3"))
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    gpt2 = Config.from_hf(dict(model_type="gpt2"))
    assert (gpt2.width, gpt2.mlp_width, gpt2.vocab_size, gpt2.tied) == (768, 3072, 50257, True)
    assert Config.from_hf(TOY | dict(eos_token_id=[5, 6])).eos_token_id == (5, 6)
    assert Config.from_hf(TOY | dict(eos_token_id=0)).eos_token_id == (0,) and Config.from_hf(TOY).eos_token_id == (2,)


def test_windows_of_qwen():
    """Guards a window that is applied although use_sliding_window is off, or to the wrong layers."""
    qwen = TOY | dict(model_type="qwen2", num_hidden_layers=3, sliding_window=7)
    assert Config.from_hf(qwen).window is None
    assert Config.from_hf(qwen | dict(use_sliding_window=True, max_window_layers=2)).window == (None, None, 7)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert Config.from_hf(qwen | dict(use_sliding_window=True, layer_types=kinds)).window == (7, None, 7)
    assert Config.from_hf(qwen | dict(use_sliding_window=True, max_window_layers=28)).window is None
    assert Config.from_hf(TOY | dict(model_type="mistral", sliding_window=None)).window is None


@pytest.mark.parametrize("change, word", [
    (dict(model_type="bert"), "model_type"), (dict(model_type=None), "model_type"), (dict(model_type=["x"]), "['x']"),
    (dict(hidden_act="swiglu"), "hidden_act"), (dict(hidden_act=3), "hidden_act"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"), (dict(rope_scaling=3), "rope"),
    (dict(rope_scaling={"type": "linear"}), "factor"), (dict(rope_scaling={"type": "linear", "factor": -1}), "factor"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"), (dict(quantization_config={"bits": 4}), "quantization"),
    (dict(hidden_size=-32), "hidden_size"), (dict(hidden_size="32"), "hidden_size"), (dict(vocab_size=True), "vocab"),
    (dict(num_hidden_layers=10**12), "num_hidden_layers"), (dict(num_hidden_layers=2.0), "num_hidden_layers"),
    (dict(head_dim=2**24), "head_dim"), (dict(head_dim=7), "head_dim"), (dict(num_attention_heads=0), "heads"),
    (dict(num_key_value_heads=3), "heads"), (dict(num_attention_heads=5, num_key_value_heads=5), "heads"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps"), (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings"), (dict(eos_token_id="</s>"), "eos_token_id"),
    (dict(eos_token_id=[1, None]), "eos_token_id"), (dict(attention_bias=1), "attention_bias"),
    (dict(model_type="mistral", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(model_type="qwen2", use_sliding_window=True, layer_types=["full_attention"]), "layer_types"),
    (dict(model_type="qwen2", use_sliding_window=True, layer_types="full"), "layer_types"),
])  # fmt: skip
def test_bad_config_is_one_line(change, word):
    """Guards settings that are silently ignored or that end in a stack trace far from their cause."""
    with pytest.raises(CheckpointError) as error:
        Config.from_hf(TOY | change)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_gpt2_options_are_not_ignored():
    """Guards GPT-2's rarer options: what is not computed is refused."""
    with pytest.raises(CheckpointError, match="add_cross_attention"):
        Config.from_hf(dict(model_type="gpt2", add_cross_attention=True))
    with pytest.raises(CheckpointError, match="activation_function"):
        Config.from_hf(dict(model_type="gpt2", activation_function="quick_gelu"))
    config = Config.from_hf(dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False))
    assert config.scale_by_layer and not config.scale_by_head


# ---- folders


def same_as_golden(path, name):
    want = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        model = GPT.from_pretrained(path)
        assert_same(model(want["ids"]), want["logits"], want["lengths"])
    return model


def test_loading_owns_its_weights_once(monkeypatch, tmp_path):
    """Guards a second full copy while loading, weights left on meta (transformers#43159), and weights that are a view
    of the mapped file and change with it."""
    model = GPT(Config.from_hf(TOY | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)))
    model.save_pretrained(tmp_path)
    total = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    sizes, empty = [], torch.empty

    def counted(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(0 if tensor.is_meta else tensor.nbytes)  # the shapes built on meta cost nothing
        return tensor

    monkeypatch.setattr(model_module.torch, "empty", counted)
    tracemalloc.start()
    loaded = GPT.from_pretrained(tmp_path)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) == largest and sum(sizes) == total  # one tensor at a time
    assert python_peak < total / 2  # and no bytes object that holds the file
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert b.device.type == "cpu" and b.is_contiguous() and torch.equal(a, b)
        assert b.untyped_storage().nbytes() == b.numel() * 4 and b.requires_grad


def test_tied_storage_variants(folder):
    """Guards lm_head absent, present although tied, or the only name (Qwen3#733, vllm#6758, onnxruntime-genai#1089);
    tying is sharing, not copying (LLMs-from-scratch#822); two different matrices are never merged."""
    for name, embedding in (("gpt2", "transformer.wte.weight"), ("qwen2", "model.embed_tokens.weight")):
        model = same_as_golden(GOLDEN / name, name)
        assert len([p for n, p in model.named_parameters() if "head" in n]) == 0
        both = folder(name, tensors=lambda w, e=embedding: w | {"lm_head.weight": w[e]})
        assert sum(p.numel() for p in same_as_golden(both, name).parameters()) == sum(
            p.numel() for p in model.parameters())
        only_head = folder(name, tensors=lambda w, e=embedding: w | {"lm_head.weight": w.pop(e)})
        same_as_golden(only_head, name)
        differs = folder(name, tensors=lambda w, e=embedding: w | {"lm_head.weight": w[e] + 1})
        refuses(differs, "lm_head.weight", "tie_word_embeddings")
    refuses(folder("llama", tensors=lambda w: w.pop("lm_head.weight")[:0].tolist()), "lm_head.weight")


def test_prefixes_and_constants(folder):
    """Guards checkpoints of the bare model (no prefix) and old files that carry masks and frequencies; "c_attn.bias"
    ends like the mask "attn.bias" and is none."""
    for name in ("gpt2", "llama", "qwen2"):
        bare = folder(name, tensors=lambda w: {k.removeprefix("transformer.").removeprefix("model."): v
                                               for k, v in w.items()})
        same_as_golden(bare, name)
    old = folder("gpt2", tensors=lambda w: w | {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
                                                "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)})
    same_as_golden(old, "gpt2")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    same_as_golden(folder("llama", tensors=lambda w: w | frequencies), "llama")
    for name in ("gpt2", "llama"):
        refuses(folder(name, tensors=lambda w: w | {"extra.weight": torch.ones(2)}), "unexpected", "extra.weight")


def test_shards(folder, tmp_path):
    """Guards sharded checkpoints, and indexes that name files outside the folder or that are not there."""
    for name in ("gpt2", "qwen3"):
        path = folder(name)
        weights = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        keys = sorted(weights)
        index = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
        for shard in set(index.values()):
            save_file({k: weights[k] for k in keys if index[k] == shard}, path / shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        same_as_golden(path, name)
    save_file({keys[0]: weights[keys[0]]}, tmp_path / "outside.safetensors")
    outside = str(tmp_path / "outside.safetensors")
    for bad in ("../outside.safetensors", outside, "absent.safetensors", "..", "", "a\0b"):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index | {keys[0]: bad}}))
        refuses(path, "is not a file in this folder")
    for bad in ({}, {"weight_map": [1]}, {"weight_map": {"a": ["b"]}}):
        (path / "model.safetensors.index.json").write_text(json.dumps(bad))
        refuses(path, "weight_map")


def test_broken_folders(folder, tmp_path):
    """Guards stack traces, and memory asked for on the word of a config: each is one line that says what to mend."""
    refuses(tmp_path / "absent", "config.json")
    for text in ("{", "[]", "\xff", "[" * 100_000, ""):
        path = folder("llama")
        (path / "config.json").write_text(text, encoding="latin-1")
        refuses(path, "config.json")
    path = folder("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refuses(path, "pickled", "safetensors")
    for content in (b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{not json at all", None):
        path = folder("llama")
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10] if content is None else content)  # None: cut short
        refuses(path, "model.safetensors")
    refuses(folder("llama", tensors=lambda w: w.pop("model.norm.weight")[:0].tolist()), "norm.weight")
    refuses(folder("llama", tensors=lambda w: w | {"model.norm.weight": torch.ones(31)}), "norm.weight", "31", "32")
    refuses(folder("gpt2", tensors=lambda w: w | {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}), "c_attn")
    refuses(folder("llama", tensors=lambda w: w | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "I8")
    refuses(folder("llama", tensors=lambda w: w | {"norm.weight": torch.ones(32)}), "twice")
    refuses(folder("llama", dict(vocab_size=2**24, hidden_size=2**23)), "config.json")
    refuses(folder("llama", dict(num_hidden_layers=2**23)), "layers")
    refuses(folder("llama", dict(intermediate_size=2**24)), "config.json")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    """Guards a save that loses a key, a head or a transposition; a tied model writes one embedding; nothing
    temporary is left behind."""
    model, want = golden(name)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and torch.equal(again(want["ids"]), model(want["ids"]))
    weights = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert set(weights) == set(load_file(GOLDEN / name / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (not model.config.tied)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_save_is_atomic(monkeypatch, tmp_path):
    """Guards a crash in the middle of a save: the folder that was there stays whole."""
    model, _ = golden("llama")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def crash(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model_module, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    GPT.from_pretrained(tmp_path)


def test_save_in_another_dtype(tmp_path):
    """Guards a dtype that is written in config.json but not in the weights, or the reverse."""
    model, _ = golden("qwen3")
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    for a, b in zip(model.parameters(), GPT.from_pretrained(tmp_path).parameters(), strict=True):
        assert torch.equal(a, b)  # the golden weights are bf16 already
    assert GPT.from_pretrained(tmp_path, dtype=torch.float16).norm.weight.dtype == torch.float16


@torch.no_grad()
def test_transformers_reads_what_we_save(tmp_path):
    """Guards a folder that only we can read (runs where transformers is installed)."""
    transformers = pytest.importorskip("transformers")
    toys = [TOY, TOY | dict(model_type="qwen3"), dict(model_type="gpt2", vocab_size=50, n_embd=32, n_layer=2, n_head=4),
            TOY | dict(model_type="mistral", sliding_window=4, rope_theta=77.0, tie_word_embeddings=True)]
    models = [golden(name)[0] for name in NAMES] + [wide(Config.from_hf(toy)) for toy in toys]
    ids = torch.randint(50, (2, 12))
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i), dtype=torch.float32)
        torch.testing.assert_close(theirs(ids).logits, model(ids), **TOLERANCE)

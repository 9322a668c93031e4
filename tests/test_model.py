"""model.py against the answers that transformers gave for the tiny models of tests/golden.

How those were made: tests/golden/make_golden.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as model_module
from model import FAMILIES, GPT, CheckpointError, Config, KVCache, make_masks, rope_angles

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
TOLERANCE = dict(atol=1e-4, rtol=0)
GOLDEN_CONFIGS = [json.loads((GOLDEN / name / "config.json").read_text()) for name in NAMES]
assert set(FAMILIES) == {hf["model_type"] for hf in GOLDEN_CONFIGS}, (
    "a family without a golden model"
)
TOY = dict(
    model_type="llama",
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def golden(name):
    return GPT.from_pretrained(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")


def wide(config, std=0.3):
    """A random model whose logits differ strongly: with weights of 0.02 a wrong mask would
    change almost nothing."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def real(lengths, T):
    """(B, T) bool: the tokens of right-padded rows that are no padding."""
    return torch.arange(T)[None] < lengths[:, None]


def assert_same(got, want, lengths):
    mask = real(lengths, got.shape[1])
    torch.testing.assert_close(got[mask], want[mask], **TOLERANCE)


def flat_gradient(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def prefill(model, ids, lengths, room=None):
    """A cache that holds the rows of `ids`, and the logits of each row's last token."""
    cache = KVCache(model.config, len(ids), room or ids.shape[1])
    logits = model(ids, cache, lengths)
    return cache, logits[torch.arange(len(ids)), lengths - 1]


# ---- numbers


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_match_transformers(name):
    """Guards every switch of every family: rope scaling dropped (nano-vllm), biases, norms, tying,
    windows, GQA. The batch is of mixed lengths and the answers are of each row alone: padding must
    not leak (transformers#28385)."""
    model, want = golden(name)
    assert_same(model(want["ids"]), want["logits"], want["lengths"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_matches_transformers_without_cache(name):
    """Guards an off-by-one in positions that a single forward hides."""
    model, want = golden(name)
    for row, length in enumerate(want["lengths"].tolist()):
        text = want["ids"][row : row + 1, :length]
        for token in want["greedy"][row]:
            assert model(text)[0, -1].argmax() == token
            text = torch.cat((text, token.view(1, 1)), dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_matches_transformers_with_cache(name, monkeypatch):
    """Guards one position shared by all rows of a mixed-length batch (unsloth#3699), which learned
    positions show and rotary ones hide (nnsight#673), and what a cache holds when it grows."""
    monkeypatch.setattr(model_module, "BLOCK", 3)
    model, want = golden(name)
    lengths = want["lengths"]
    cache = KVCache(model.config, rows=4, room=13)
    logits = model(want["ids"], cache, lengths)
    assert_same(logits, want["logits"], lengths)
    last = logits[torch.arange(4), lengths - 1]
    for step in range(want["greedy"].shape[1]):
        assert torch.equal(last.argmax(-1), want["greedy"][:, step])
        cache.make_room(13 + step + 1)
        last = model(want["greedy"][:, step : step + 1], cache)[:, 0]
    assert torch.equal(cache.lengths, lengths + want["greedy"].shape[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [(1,) * 13, (5, 8), (4, 1, 6, 2)])
@torch.no_grad()
def test_chunked_prefill_matches_one_forward(name, chunks):
    """Guards rotary angles or masks that restart at a chunk (nanochat#855), and rows that ended in
    an earlier one."""
    model, want = golden(name)
    cache = KVCache(model.config, 4, room=26)
    start = 0
    for chunk in chunks:
        counts = (want["lengths"] - start).clamp(0, chunk)
        got = model(want["ids"][:, start : start + chunk], cache, counts)
        assert_same(got, want["logits"][:, start : start + chunk], counts)
        start += chunk
    assert torch.equal(cache.lengths, want["lengths"])


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral", "qwen2-window"])
@torch.no_grad()
def test_finished_rows_stand_still(name):
    """Guards decoding with counts of 0 and 1: a row that is done neither advances nor disturbs the
    others, and can go on later as if nothing had been read in between."""
    model, want = golden(name)
    cache, _ = prefill(model, want["ids"], want["lengths"], room=32)
    texts = [row[:length] for row, length in zip(want["ids"], want["lengths"], strict=True)]
    for step in range(8):
        live = (torch.arange(4) + step) % 3 > 0
        tokens = torch.randint(72, (4,))
        got = model(tokens[:, None], cache, live.long())[:, 0]
        for row in live.nonzero()[:, 0].tolist():
            texts[row] = torch.cat((texts[row], tokens[row : row + 1]))
            torch.testing.assert_close(got[row], model(texts[row][None])[0, -1], **TOLERANCE)
    assert cache.lengths.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window"])
@torch.no_grad()
def test_samples_continue_a_copied_prompt(name, monkeypatch):
    """Guards n samples from one prefill, in rows that held longer texts before: each continues as
    if alone (transformers' greedy answer), and rows that are not named keep what they hold."""
    monkeypatch.setattr(model_module, "BLOCK", 5)
    model, want = golden(name)
    prompts, _ = prefill(model, want["ids"], want["lengths"])
    cache, _ = prefill(model, torch.randint(72, (6, 15)), torch.full((6,), 15))
    kept = cache.k[:, 3, :, :15].clone()
    cache.make_room(26)
    origins = torch.tensor([1, 1, 0, 3, 2])
    rows = torch.tensor([5, 0, 2, 1, 4])
    cache.copy_rows(prompts, origins, rows)
    assert cache.lengths.tolist() == [4, 9, 13, 15, 1, 4]
    assert torch.equal(cache.k[:, 3, :, :15], kept)
    tokens = torch.zeros(6, 12, dtype=torch.long)
    tokens[rows] = want["greedy"][origins]
    counts = torch.tensor([1, 1, 1, 0, 1, 1])
    for step in range(11):
        choice = model(tokens[:, step : step + 1], cache, counts)[:, 0].argmax(-1)
        assert torch.equal(choice[rows], tokens[rows, step + 1])


@torch.no_grad()
def test_copy_rows_makes_room():
    """Guards a prompt that is longer than what the cache can hold so far."""
    model, want = golden("llama")
    prompts, _ = prefill(model, want["ids"], want["lengths"])
    cache = KVCache(model.config, 1, room=0)
    cache.copy_rows(prompts, torch.tensor([0]), torch.tensor([0]))
    assert cache.room == model_module.BLOCK
    got = model(want["greedy"][:1, :1], cache)[0, 0].argmax()
    assert got == want["greedy"][0, 1]


def test_make_room():
    """Guards growth that loses what is held, is too small by one token, or replaces `lengths`,
    which a captured step goes on writing to."""
    block = model_module.BLOCK
    cache = KVCache(Config.from_hf(TOY), 2, room=3)
    cache.k.normal_()
    cache.v.normal_()
    k = cache.k
    v = cache.v
    lengths = cache.lengths
    cache.make_room(3)
    assert cache.room == 3 and cache.k is k
    for tokens, room in ((4, block), (block, block), (block + 1, 2 * block), (5, 2 * block)):
        cache.make_room(tokens)
        assert cache.room == room and cache.v.shape[3] == room
    assert torch.equal(cache.k[:, :, :, :3], k) and torch.equal(cache.v[:, :, :, :3], v)
    assert cache.lengths is lengths


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window"])
@torch.no_grad()
def test_decode_step_can_be_captured(name):
    """Guards the CUDA graph of a step: traced once and replayed with other lengths and tokens it
    must say what the model says, so nothing in it may depend on a Python number of the step.
    Tracing fails if the step waits for the device (.item(), boolean indices)."""
    model, want = golden(name)
    cache, _ = prefill(model, want["ids"], want["lengths"], room=32)
    token = want["greedy"][:, :1].clone()
    counts = torch.ones(4, dtype=torch.long)
    before = cache.lengths.clone()
    graph = make_fx(lambda: model(token, cache, counts)[:, 0])()
    cache.lengths.copy_(before)  # tracing ran it
    for step in range(11):
        token.copy_(want["greedy"][:, step : step + 1])
        assert torch.equal(graph().argmax(-1), want["greedy"][:, step + 1])
    assert torch.equal(cache.lengths, before + 11)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral", "qwen2-window"])
def test_responses_behind_one_prompt(name):
    """Guards the prompt of a pair that is read once: each response, and the gradient, must be what
    two separate rows give, with padding between and behind."""
    model, _ = golden(name)
    prompt = torch.randint(72, (7,))
    responses = [torch.randint(72, (5,)), torch.randint(72, (9,))]
    pad = torch.tensor([3])
    ids = torch.cat((prompt, responses[0], pad, pad, responses[1], pad))
    positions = torch.tensor([*range(12), 0, 0, *range(7, 16), 0])
    branches = torch.tensor([0] * 7 + [1] * 5 + [-1] * 2 + [2] * 9 + [-1])
    weights = torch.randn(72)

    hidden = model.hidden(ids[None], positions=positions[None], branches=branches[None])
    together = model.logits(hidden)[0]
    loss = (together[branches > 0] * weights).logsumexp(-1).sum()
    got = flat_gradient(loss, model)

    loss = 0
    for branch, response in enumerate(responses, start=1):
        alone = model(torch.cat((prompt, response))[None])[0]
        torch.testing.assert_close(together[branches == branch], alone[7:], **TOLERANCE)
        loss = loss + (alone[7:] * weights).logsumexp(-1).sum()
    want = flat_gradient(loss, model)
    assert (got - want).norm() < 1e-4 * want.norm()


@torch.no_grad()
def test_learned_positions_end():
    """Guards a read behind the position table (a CUDA assert, or a wrong row): the last position
    works, one more is refused, and a full row that is done may stand in a batch."""
    model, _ = golden("gpt2")
    assert model.config.position_limit == 32
    text = torch.randint(72, (2, 33))
    want = model(text[:, :32])
    with pytest.raises(ValueError, match="33 tokens"):
        model(text)
    cache = KVCache(model.config, 2, room=64)
    got = model(text, cache, torch.tensor([32, 31]))  # padding lies behind the last position
    torch.testing.assert_close(got[0, :32], want[0], **TOLERANCE)
    got = model(text[:, 31:32], cache, torch.tensor([0, 1]))
    torch.testing.assert_close(got[1, 0], want[1, 31], **TOLERANCE)


@torch.no_grad()
def test_stale_slots_are_never_seen():
    """Guards slots behind a row's length, whatever they hold from a text that was there before."""
    config = Config.from_hf(TOY)
    model = wide(config)
    ids = torch.randint(50, (2, 9))
    cache, _ = prefill(model, ids, torch.tensor([9, 9]), room=16)
    cache.lengths.copy_(torch.tensor([3, 5]))
    token = torch.tensor([[7], [7]])
    got = model(token, cache)
    for row, length in enumerate((3, 5)):
        alone = model(torch.cat((ids[row, :length], token[row]))[None])
        torch.testing.assert_close(got[row, 0], alone[0, -1], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-window"])
@torch.no_grad()
def test_bfloat16_decode(name):
    """Guards a cached step in bf16: about as near to fp32 as one bf16 forward without a cache."""
    model, want = golden(name)
    lengths = want["lengths"]
    half = GPT.from_pretrained(GOLDEN / name, dtype=torch.bfloat16)
    cache = KVCache(half.config, 4, room=32, dtype=torch.bfloat16)
    half(want["ids"], cache, lengths)
    mask = real(lengths, want["ids"].shape[1])
    whole = (half(want["ids"]).float() - want["logits"])[mask]
    errors = []
    for step in range(want["greedy"].shape[1]):
        got = half(want["greedy"][:, step : step + 1], cache)[:, 0].float()
        for row, length in enumerate(lengths.tolist()):
            text = torch.cat((want["ids"][row, :length], want["greedy"][row, : step + 1]))
            errors.append(got[row] - model(text[None])[0, -1])
    assert torch.stack(errors).square().mean() < 9 * whole.square().mean()


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window"])
def test_autocast(name):
    """Guards training in bf16: a mask in the wrong dtype, or a NaN from a smallest number of fp32
    that is -inf in bf16. Logits and gradients must be near those of fp32."""
    model, want = golden(name)
    positions = torch.arange(13).repeat(4, 1)
    branches = real(want["lengths"], 13).long() - 1
    for tree in ({}, dict(positions=positions, branches=branches)):
        gradients = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model.logits(model.hidden(want["ids"], **tree)).float()
            loss = logits[real(want["lengths"], 13)].logsumexp(-1).sum()
            gradients.append(flat_gradient(loss, model))
        exact, rounded = gradients
        assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_masks_under_autocast():
    """Guards a mask in fp32 that autocast converts, and training keeps, once in every layer."""
    positions = torch.arange(4)[None]
    for hf in (TOY, TOY | dict(model_type="mistral", sliding_window=3)):
        config = Config.from_hf(hf)
        with torch.autocast("cpu", torch.bfloat16):
            masks = make_masks(config, positions, positions * 0, None, torch.float32)
        assert len(masks) == 1
        for mask in masks.values():
            assert mask.dtype == torch.bfloat16 and mask.isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2-window"])
def test_gradient_checkpointing_changes_nothing(name):
    """Guards a recomputation that sees other masks, and a weight that no gradient reaches."""
    model, want = golden(name)
    gradients = []
    for flag in (False, True):
        model.gradient_checkpointing = flag
        model.zero_grad()
        model(want["ids"]).logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
        assert plain.abs().sum() > 0


@torch.no_grad()
def test_rotary_angles_survive_a_cast():
    """Guards frequencies rounded by model.to(bfloat16): at position 1000 the angle would be off by
    several turns."""
    model = wide(Config.from_hf(TOY)).to(torch.bfloat16)
    cos, sin = rope_angles(model.config, torch.tensor([[1000]]), torch.float32)
    want = 1000.0 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(cos.flatten().double(), want.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin.flatten().double(), want.sin(), atol=1e-3, rtol=0)
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_random_init():
    """Guards an initialisation that explodes or a residual projection that is not scaled down."""
    model = GPT(Config.from_hf(TOY | dict(hidden_size=64, tie_word_embeddings=True)))
    layer = model.layers[0]
    assert 0.018 < layer.self_attn.q_proj.weight.std() < 0.022
    assert 0.008 < layer.mlp.down_proj.weight.std() < 0.012
    assert model.lm_head is None and (layer.input_layernorm.weight == 1).all()


# ---- config.json


def test_transformers_4_and_5_forms_agree():
    """Guards a theta or scaling read in one form and dropped in the other (llama-models#241)."""
    numbers = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )
    old = Config.from_hf(TOY | dict(rope_theta=500.0, rope_scaling=dict(numbers, type="llama3")))
    new = dict(numbers, rope_type="llama3", rope_theta=500.0)
    assert old == Config.from_hf(TOY | dict(rope_parameters=new))
    assert old.rope_theta == 500.0 and old.rope_scaling == dict(numbers, rope_type="llama3")
    plain = Config.from_hf(TOY)
    assert plain == Config.from_hf(TOY | dict(rope_scaling=None, rope_theta=10000.0))
    default = dict(rope_type="default", rope_theta=10000)
    assert plain == Config.from_hf(TOY | dict(rope_parameters=default))


@pytest.mark.parametrize("name", ["llama-linear", "llama3"])
@torch.no_grad()
def test_golden_in_the_other_form(name, folder):
    """As above, in numbers: the golden folders are of transformers 5, here in the form of 4."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    scaling = config["rope_parameters"]
    old = dict(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    same_as_golden(folder(name, old, drop=["rope_parameters"]), name)


def test_defaults_of_missing_keys():
    """Guards a default taken from the wrong family when config.json leaves a key out."""
    gpt2 = Config.from_hf(dict(model_type="gpt2"))
    assert (gpt2.width, gpt2.mlp_width, gpt2.vocab_size, gpt2.tied) == (768, 3072, 50257, True)
    llama = Config.from_hf(dict(model_type="llama"))
    assert (llama.n_kv_head, llama.head_dim, llama.mlp_width) == (32, 128, 11008)
    assert llama.windows == (None,) * 32 and llama.max_len == 2048 and not llama.tied
    mistral = Config.from_hf(dict(model_type="mistral"))
    assert (mistral.n_kv_head, mistral.mlp_width, mistral.max_len) == (8, 14336, 131072)
    assert mistral.windows == (4096,) * 32
    qwen2 = Config.from_hf(TOY | dict(model_type="qwen2"))
    assert qwen2.qkv_bias and not qwen2.out_bias and qwen2.windows == (None, None)
    qwen3 = Config.from_hf(TOY | dict(model_type="qwen3"))
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    nulls = Config.from_hf(TOY | dict(head_dim=None, num_key_value_heads=None))
    assert nulls.n_kv_head == 4 and nulls.head_dim == 8


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@torch.no_grad()
def test_original_length_at_the_top(form, folder):
    """Guards a length of llama3's rotation that stands at the top of config.json and is taken for
    that of the model: logits were off by 6.5. Where both are given transformers takes this one."""
    scaling = json.loads((GOLDEN / "llama3" / "config.json").read_text())["rope_parameters"]
    original = scaling.pop("original_max_position_embeddings")
    top = dict(original_max_position_embeddings=original)
    theta = scaling.pop("rope_theta") if form == "rope_scaling" else None
    for inner in ({}, dict(original_max_position_embeddings=7)):
        edit = top | {form: scaling | inner}
        if theta:
            edit["rope_theta"] = theta
        drop = ["rope_parameters"] if theta else []
        same_as_golden(folder("llama3", edit, drop=drop), "llama3")
    assert Config.from_hf(TOY | top | dict(rope_theta=1e4)).rope_scaling is None


def test_windows_of_qwen():
    """Guards a window that is applied although it is switched off, or to the wrong layers."""
    qwen = TOY | dict(model_type="qwen2", num_hidden_layers=3, sliding_window=7)
    assert Config.from_hf(qwen).windows == (None, None, None)
    qwen = qwen | dict(use_sliding_window=True)
    assert Config.from_hf(qwen | dict(max_window_layers=2)).windows == (None, None, 7)
    assert Config.from_hf(qwen | dict(max_window_layers=28)).windows == (None, None, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert Config.from_hf(qwen | dict(layer_types=kinds)).windows == (7, None, 7)
    mistral = TOY | dict(model_type="mistral", sliding_window=None)
    assert Config.from_hf(mistral).windows == (None, None)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(model_type="bert"), "model_type"),
        (dict(model_type=None), "model_type"),
        (dict(hidden_act="swiglu"), "swiglu"),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
        (dict(rope_scaling={"type": "linear"}), "factor"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "full_attention"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(model_type="gpt2", add_cross_attention=True), "add_cross_attention"),
        (dict(hidden_size="32"), "hidden_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3"),
        (dict(num_attention_heads=5, num_key_value_heads=5), "5 heads"),
        (dict(model_type="qwen2", use_sliding_window=True, layer_types=["full"]), "layer_types"),
    ],
)
def test_bad_config_is_one_line(change, word):
    """Guards settings that are silently ignored, and stack traces far from their cause."""
    with pytest.raises(CheckpointError, match=word) as error:
        Config.from_hf(TOY | change)
    assert "\n" not in str(error.value)


# ---- folders


@pytest.fixture
def folder(tmp_path):
    """folder(name, config changes, edit of the tensors, keys to drop) -> a changed copy."""

    def copy(name, edit=None, tensors=None, drop=()):
        target = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDEN / name, target)
        config = json.loads((target / "config.json").read_text()) | (edit or {})
        for key in drop:
            del config[key]
        (target / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            weights = load_file(target / "model.safetensors")
            weights = tensors(weights)
            copies = {key: value.contiguous().clone() for key, value in weights.items()}
            save_file(copies, target / "model.safetensors")
        return target

    return copy


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def same_as_golden(path, name):
    want = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        model = GPT.from_pretrained(path)
        assert_same(model(want["ids"]), want["logits"], want["lengths"])
    return model


def refuses(path, *words):
    """Loading raises CheckpointError with a message of one line that holds all the words."""
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message


def test_loading_owns_its_weights_once(monkeypatch, tmp_path):
    """Guards a second full copy while loading, weights left on meta (transformers#43159), and
    weights that are a view of the file and change with it."""
    hf = TOY | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    model = GPT(Config.from_hf(hf))
    model.save_pretrained(tmp_path)
    sizes = []
    plain = torch.empty
    with torch.device("meta"):  # torch notes once which functions this concerns
        torch.empty(1)

    def counted(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        if not tensor.is_meta:
            sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(model_module.torch, "empty", counted)
    loaded = GPT.from_pretrained(tmp_path)
    assert sizes == [p.nbytes for p in model.parameters()]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    for want, got in zip(model.parameters(), loaded.parameters(), strict=True):
        assert got.device.type == "cpu" and got.is_contiguous() and got.requires_grad
        assert torch.equal(got, want) and got.untyped_storage().nbytes() == got.nbytes


@pytest.mark.parametrize(
    "name, embedding", [("gpt2", "transformer.wte.weight"), ("qwen2", "model.embed_tokens.weight")]
)
def test_tied_storage_variants(name, embedding, folder):
    """Guards lm_head absent, present although tied, or the only name (Qwen3#733, vllm#6758,
    onnxruntime-genai#1089); tying is sharing, not copying (LLMs-from-scratch#822)."""

    def both(weights):
        return weights | {"lm_head.weight": weights[embedding]}

    def only_head(weights):
        return without(both(weights), embedding)

    def different(weights):
        return weights | {"lm_head.weight": weights[embedding] + 1}

    size = sum(p.numel() for p in same_as_golden(GOLDEN / name, name).parameters())
    for variant in (both, only_head):
        model = same_as_golden(folder(name, tensors=variant), name)
        assert sum(p.numel() for p in model.parameters()) == size
    refuses(folder(name, tensors=different), "lm_head.weight", "tie_word_embeddings")


def test_names_without_prefix(folder):
    """Guards checkpoints of the bare model, without the head's class around it."""

    def bare(weights):
        renamed = {}
        for name, tensor in weights.items():
            renamed[name.removeprefix("transformer.").removeprefix("model.")] = tensor
        return renamed

    for name in ("gpt2", "llama", "qwen2"):
        same_as_golden(folder(name, tensors=bare), name)


def test_constants_of_old_files(folder):
    """Guards old files that carry masks and angles. "c_attn.bias" ends like the mask "attn.bias"
    and is none; any other tensor too many is refused."""
    masks = {
        "h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    same_as_golden(folder("gpt2", tensors=lambda weights: weights | masks), "gpt2")
    angles = {
        f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    }
    same_as_golden(folder("llama", tensors=lambda weights: weights | angles), "llama")
    extra = {"extra.weight": torch.ones(2)}
    for name in ("gpt2", "llama"):
        path = folder(name, tensors=lambda weights: weights | extra)
        refuses(path, "unexpected", "extra.weight")


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 2])
def test_shards(name, shards, folder):
    """Guards checkpoints in several files, or in one that is named like a shard, and says which
    tensor is not there when a file is missing."""
    path = folder(name)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    keys = sorted(weights)
    for shard in range(shards):
        part = {key: weights[key] for key in keys[shard::shards]}
        save_file(part, path / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
    same_as_golden(path, name)
    (path / f"model-{shards:05}-of-{shards:05}.safetensors").unlink()
    refuses(path, "no tensor" if shards == 2 else "no model.safetensors")


def write_shards(path, files):
    """Divide the weights of a folder over these files. Returns {tensor: file}."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {key: files[i % len(files)] for i, key in enumerate(sorted(weights))}
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        save_file({key: weights[key] for key in weights if weight_map[key] == file}, path / file)
    return weight_map


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["first.safetensors", "parts/second.safetensors"],
        ["pytorch_model.safetensors"],
    ],
)
def test_an_index_names_the_shards(files, folder):
    """Guards shards of other names refused, and a shard left over of another save taken for one."""
    path = folder("qwen3")
    index = {"metadata": {"total_size": 1}, "weight_map": write_shards(path, files)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    stale = {"model.norm.weight": torch.ones(32)}
    for name in ("model-00003-of-00003.safetensors", "consolidated.safetensors"):
        save_file(stale, path / name)
    same_as_golden(path, "qwen3")
    (path / files[-1]).unlink()
    refuses(path, files[-1])


@pytest.mark.parametrize("value", ["x", [], {"a": 1}, -1, 10**30, None, True])
def test_a_config_of_another_kind_is_one_line(value, folder):
    """Guards a traceback for a number of config.json that is a text, a list or too large."""
    path = folder("llama")
    good = json.loads((path / "config.json").read_text())
    for key in good:
        (path / "config.json").write_text(json.dumps(good | {key: value}))
        try:
            GPT.from_pretrained(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "JSON"),
        ("[" * 200_000, "JSON"),
        ("[]", "object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "1 is not the name"),
        ('{"weight_map": {"a": "../llama-0/model.safetensors"}}', "../llama-0"),
        ('{"weight_map": {"a": "x/../../llama-0/model.safetensors"}}', "x/../../llama-0"),
        ('{"weight_map": {"a": "/model.safetensors"}}', "/model.safetensors"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors"),
        ('{"weight_map": {"a": ""}}', "safetensors"),
    ],
)
def test_a_broken_index_is_one_line(text, word, folder):
    """Guards a traceback from an index, and one that names files of another folder."""
    folder("llama")
    path = folder("llama")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(text)
    refuses(path, word, str(path))


def test_what_was_saved_counts(folder):
    """Guards a save into a folder of shards whose old index wins over the new weights."""
    path = folder("llama")
    weight_map = write_shards(path, ["a.safetensors", "b.safetensors"])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = GPT.from_pretrained(path)
    with torch.no_grad():
        model.norm.weight += 1
    model.save_pretrained(path)
    assert torch.equal(GPT.from_pretrained(path).norm.weight, model.norm.weight)


def test_links_of_the_hub_cache(tmp_path):
    """Guards a snapshot of the hub's cache: every file is a link into another folder."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN / "llama" / name)
    same_as_golden(tmp_path, "llama")


def test_a_name_of_the_hub_is_not_downloaded():
    """Guards a stack trace, or silence, for the commonest first mistake."""
    refuses("HuggingFaceTB/SmolLM2-135M", "no such folder", "nothing is downloaded")


def test_swish_is_silu(folder):
    """Guards the other name of an activation that older configs use."""
    same_as_golden(folder("llama", dict(hidden_act="swish")), "llama")


def test_broken_folders(folder):
    """Guards stack traces: each broken folder is one line that names the file or the tensor."""
    for text in ("{", "[]", "\xff", "", "[" * 200_000, '{"a":' * 200_000):
        path = folder("llama")
        (path / "config.json").write_text(text, encoding="latin-1")
        refuses(path, "config.json")
    path = folder("llama")
    (path / "config.json").unlink()
    refuses(path, "config.json")
    path = folder("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refuses(path, "no model.safetensors", ".bin")
    whole = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    for content in (b"", b"\xff" * 64, whole[:-10]):
        path = folder("llama")
        (path / "model.safetensors").write_bytes(content)
        refuses(path, "model.safetensors")


@pytest.mark.parametrize(
    "name, tensor, shape, words",
    [
        ("llama", "lm_head.weight", None, ["lm_head.weight"]),
        ("llama", "model.norm.weight", None, ["norm.weight"]),
        ("llama", "model.norm.weight", (31,), ["norm.weight", "31", "32"]),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (96, 32), ["c_attn.weight"]),
        ("llama", "norm.weight", (32,), ["stored twice"]),
    ],
)
def test_wrong_tensors(name, tensor, shape, words, folder):
    """Guards weights that are of another model than config.json: missing, of another shape, or
    there twice."""

    def broken(weights):
        if shape is None:
            return without(weights, tensor)
        return weights | {tensor: torch.ones(shape)}

    refuses(folder(name, tensors=broken), *words)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    """Guards a save that loses a key, a head or a transposition; a tied model writes one embedding;
    nothing temporary is left behind."""
    model, want = golden(name)
    path = tmp_path / "new" / "folder"
    model.save_pretrained(path)
    again = GPT.from_pretrained(path)
    assert again.config == model.config and torch.equal(again(want["ids"]), model(want["ids"]))
    weights = load_file(path / "model.safetensors")
    assert set(weights) == set(load_file(GOLDEN / name / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (not model.config.tied)
    read = json.loads((GOLDEN / name / "config.json").read_text())
    written = json.loads((path / "config.json").read_text())
    assert written == read | dict(dtype="float32", torch_dtype="float32")
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


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


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_of_other_files(umask, mode, tmp_path):
    """Guards weights that nobody else can read beside files that all can: safetensors writes a
    private file. What a killed save left behind changes nothing."""
    model, _ = golden("llama")
    (tmp_path / ".model.safetensors.tmp").write_text("half")
    (tmp_path / ".model.safetensors.tmp").chmod(0o600)
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"config.json": mode, "model.safetensors": mode}


def test_save_in_another_dtype(tmp_path):
    """Guards a dtype that is written in config.json but not in the weights, or the reverse."""
    model, _ = golden("qwen3")
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    again = GPT.from_pretrained(tmp_path)
    for want, got in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(got, want)  # the golden weights are bf16 already
    half = GPT.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.norm.weight.dtype == torch.float16


@torch.no_grad()
def test_transformers_reads_what_we_save(tmp_path):
    """Guards a folder that only we can read (runs where transformers is installed)."""
    transformers = pytest.importorskip("transformers")
    toys = [
        TOY,
        TOY | dict(model_type="qwen3"),
        dict(model_type="gpt2", vocab_size=50, n_embd=32, n_layer=2, n_head=4),
        TOY | dict(model_type="mistral", sliding_window=4, rope_theta=77.0),
    ]
    models = [golden(name)[0] for name in NAMES] + [wide(Config.from_hf(toy)) for toy in toys]
    ids = torch.randint(50, (2, 12))
    for i, model in enumerate(models):
        path = tmp_path / str(i)
        model.save_pretrained(path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        torch.testing.assert_close(theirs(ids).logits, model(ids), **TOLERANCE)

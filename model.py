"""A decoder-only transformer in plain PyTorch that reads and writes Hugging Face folders.

GPT-2, Llama 1-3, Mistral, Qwen2 and Qwen3 differ in a few switches, so the one idea here is that a frozen `Config`
holds every switch and the computation knows no family: families exist only where files are translated.

    model = GPT.from_pretrained("folder")
    logits = model(ids)                            # (B, T) -> (B, T, V); batches are padded on the RIGHT
    cache = KVCache(model.config, rows=len(ids), capacity=512)
    logits = model(ids, cache, counts=lengths)     # prefill; then model(next_ids, cache), one token a row at a time

Each layer adds to x, with x normalised first (arXiv:2302.13971; GPT-2 has neither rotation nor gate):
    attention(x) = softmax(rot(q) rot(k)^T / sqrt(D) + causal mask) v,   MLP(x) = W_down (act(W_gate x) * W_up x)
where rot turns the pair (i, i + D/2) of a head by the angle position * theta^(-2i/D) (arXiv:2104.09864).
Deliberately absent: dropout. A config's dropout rates are ignored, in training too: post-training uses none.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}
# What transformers assumes where config.json is silent. The type of a default is the type that its key must have.
GPT2 = dict(vocab_size=50257, n_embd=768, n_inner=None, n_layer=12, n_head=12, n_positions=1024, eos_token_id=50256,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
            scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, hidden_act="silu", eos_token_id=2,
             rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
QWEN2 = LLAMA | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=2**15,
                     eos_token_id=None, use_sliding_window=False, sliding_window=4096, max_window_layers=28)
DEFAULTS = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN2 | dict(head_dim=128), "mistral": LLAMA | dict(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=2**17, sliding_window=4096)}
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window", "eos_token_id")
GPT2_KEYS = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head", rms_norm_eps=
                 "layer_norm_epsilon", max_position_embeddings="n_positions", hidden_act="activation_function")
# Our tensor names become GPT-2's by these replacements, in this order.
GPT2_TENSORS = {"embed_tokens": "wte", "embed_positions": "wpe", "layers.": "h.", "input_layernorm": "ln_1",
                "post_attention_layernorm": "ln_2", "norm.":
                "ln_f.", "self_attn": "attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj", "q_proj":
                "c_attn", "k_proj": "c_attn", "v_proj": "c_attn"}
BLOCK = 128  # queries per block of causal attention on a CPU
PORTION = 64  # tokens by which a cache grows
SHARED = 8  # rows, at most, that read a common prefix together
FAR = 2**40  # a position behind all others
LARGE = 2**20  # numbers; above it, training makes cheap activations again instead of keeping them
CONSTANTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")  # of old files; not "c_attn.bias"


class CheckpointError(ValueError):
    """A folder cannot be read; one line that names the file, tensor or key, what was expected and the mend."""


def need(condition, message):
    if not condition:
        raise CheckpointError(message)


def check(key, value, kind):
    """Refuse a value of config.json that is not of `kind`: bool, str (an activation), float or int (both positive)."""
    if kind in (bool, str):
        expected = list(ACTIVATIONS) if kind is str else [False, True]
        good = isinstance(value, kind) and value in expected
    elif kind is float:
        good, expected = type(value) in (int, float) and 0 < value < math.inf, "the positive numbers"
    else:  # the bound keeps products of two sizes far below 2^63
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        expected = range(key not in ("max_window_layers", "eos_token_id"), 2**24)
        good = all(type(v) is int and v in expected for v in values)
    need(good, f"config.json: {key} is {value!r:.60}, expected one of {expected}; correct this key")


@dataclass(frozen=True)
class Config:
    """Everything that describes the architecture. Made by `Config.from_hf`, for a toy model too."""

    model_type: str  # a key of DEFAULTS; decides names on disk, nothing in the computation
    vocab_size: int  # V, rows of the embedding; may exceed the tokenizer's vocabulary
    n_layer: int
    n_head: int  # H, query heads
    n_kv_head: int  # H_kv, key and value heads; divides n_head
    head_dim: int  # D; n_head * head_dim need not be width
    width: int  # C, the residual stream
    mlp_width: int
    max_len: int  # positions seen in training; a limit only for learned positions
    norm: str  # "rms" or "layer"
    norm_eps: float
    activation: str  # a key of ACTIVATIONS
    gated: bool  # W_down (act(W_gate x) * W_up x) instead of W_down act(W_up x)
    position: str  # "rope" or "learned"
    rope_theta: float
    rope_scaling: dict | None  # None, or rope_type "linear" or "llama3" with its numbers
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head
    window: tuple | None  # per layer how many tokens, itself included, a token sees (None = all); None: none has one
    scale_by_head: bool  # divide scores by sqrt(D)
    scale_by_layer: bool  # and by layer index + 1
    tied: bool  # the head is the embedding matrix
    eos_token_id: tuple  # any of these ends a text; () if none is named
    hf: dict = field(repr=False, compare=False)  # config.json as read, so that saving loses no key

    @classmethod
    def from_hf(cls, hf):
        """Translate the dict of a config.json, transformers 4 or 5 form. Raises CheckpointError, one line."""
        family = str(hf.get("model_type"))
        need(family in DEFAULTS, f"config.json: model_type is {family!r:.60}, expected one of {list(DEFAULTS)}")
        for key in ("quantization_config", "add_cross_attention"):
            need(not hf.get(key), f"config.json: {key} is not supported; use a model without it")
        c, gpt2 = DEFAULTS[family] | hf, family == "gpt2"
        for key, default in DEFAULTS[family].items():
            if c[key] is not None or key not in NULLABLE:
                check(key, c[key], int if default is None else type(default))
        if gpt2:
            c |= {ours: c[theirs] for ours, theirs in GPT2_KEYS.items()} | dict(num_key_value_heads=None, head_dim=None)
            c |= dict(intermediate_size=c["n_inner"] or 4 * c["n_embd"], attention_bias=True, mlp_bias=True)
        width, n_head, eos = c["hidden_size"], c["num_attention_heads"], c["eos_token_id"]
        n_kv_head, head_dim = c["num_key_value_heads"] or n_head, c["head_dim"] or width // n_head
        need(n_head % n_kv_head == 0, f"config.json: {n_kv_head} key heads must divide {n_head} heads; correct either")
        need(c["head_dim"] or width % n_head == 0, f"config.json: {n_head} heads must divide width {width}; correct it")
        need(n_head * head_dim <= 2**24, f"config.json: {n_head} heads of head_dim {head_dim} are too much; correct it")
        need(gpt2 or head_dim % 2 == 0, f"config.json: head_dim {head_dim} must be even to be rotated; correct it")
        bias = c["attention_bias"] and family not in ("mistral", "qwen2")  # these two know no such switch
        theta, scaling = (1e4, None) if gpt2 else read_rope(c)
        return cls(
            model_type=family, vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=n_head,
            n_kv_head=n_kv_head, head_dim=head_dim, width=width, mlp_width=c["intermediate_size"],
            max_len=c["max_position_embeddings"], norm="layer" if gpt2 else "rms", norm_eps=c["rms_norm_eps"],
            activation=c["hidden_act"], gated=not gpt2, position="learned" if gpt2 else "rope", rope_theta=theta,
            rope_scaling=scaling, qkv_bias=bias or family == "qwen2", out_bias=bias, qk_norm=family == "qwen3",
            mlp_bias=c["mlp_bias"] and family in ("gpt2", "llama"), window=read_window(c), hf=dict(hf),
            scale_by_head=c.get("scale_attn_weights", True) or not gpt2, tied=c["tie_word_embeddings"],
            scale_by_layer=gpt2 and c["scale_attn_by_inverse_layer_idx"],
            eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))

    def to_hf(self):
        """The dict of a config.json: as read, with the class for transformers to load it into."""
        assert Config.from_hf(self.hf) == self, "change a Config through from_hf, or its saved form would differ"
        name = "GPT2LMHeadModel" if self.model_type == "gpt2" else self.model_type.capitalize() + "ForCausalLM"
        return self.hf | {"architectures": [name]}

    @property
    def limit(self):
        """The tokens that a text may have: only learned positions end."""
        return self.max_len if self.position == "learned" else math.inf

    def make_norm(self):
        return (nn.RMSNorm if self.norm == "rms" else nn.LayerNorm)(self.width, eps=self.norm_eps)


def read_rope(c):
    """(theta, scaling) from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    need(isinstance(rope, dict), f"config.json: rope scaling is {rope!r:.60}, expected a dict or null; correct it")
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # one rotation per kind of layer
    need(all(value == nested[0] for value in nested), "config.json: rope_parameters that differ by layer: unsupported")
    rope = dict(rope_theta=c["rope_theta"], partial_rotary_factor=c.get("partial_rotary_factor") or 1.0,
                original_max_position_embeddings=c["max_position_embeddings"]) | nested[0]
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    keys = dict(default=(), linear=llama3[:1], llama3=llama3).get(kind)
    need(keys is not None, f"config.json: rope type {kind:.60}, expected default, linear or llama3; use another model")
    need(rope["partial_rotary_factor"] == 1, "config.json: partial_rotary_factor is not supported; use another model")
    for key in ("rope_theta", *keys):
        check(key, rope.get(key), float)
    need(kind != "llama3" or rope[llama3[1]] < rope[llama3[2]], f"config.json: {llama3[1]} must be below {llama3[2]}")
    return float(rope["rope_theta"]), {"rope_type": kind} | {key: rope[key] for key in keys} if keys else None


def read_window(c):
    """A window (or None) per layer, or None if no layer has one."""
    window, mistral = c.get("sliding_window"), c["model_type"] == "mistral"
    if c["model_type"] in ("gpt2", "llama") or window is None or not (mistral or c["use_sliding_window"]):
        return None
    n, full, sliding = c["num_hidden_layers"], "full_attention", "sliding_attention"
    kinds = c.get("layer_types") or [sliding if mistral or i >= c["max_window_layers"] else full for i in range(n)]
    # transformers' Mistral slides in every layer, whatever layer_types says: a mixed list is another model's config
    good = [isinstance(kinds, list) and (k == sliding or k == full and not mistral) for k in kinds]
    need(len(good) == n and all(good), f"config.json: layer_types, expected {n} of {full} or {sliding}; correct them")
    return tuple(window if kind == sliding else None for kind in kinds) if sliding in kinds else None


class KVCache:
    """Keys and values of the tokens already read by `rows` texts of up to `capacity` tokens.

    k, v: (n_layer, rows, H_kv, room, D) of `dtype`; lengths: int64 (rows,). The room grows by PORTION tokens, so that
    all of it is looked at (torch copies what is cut out of a tensor before it multiplies), up to one slot more than
    `capacity`, for padding that does not fit.
    `shortest` and `longest` bound the lengths in Python and so spare a decode step any question to the GPU.

    Texts that begin alike hold only what is their own, behind a row of another cache, `prefix`, that attention reads
    once for all of them (`branch`). Text r then has `stems[r]` more tokens, which come first and count in no length.
    """

    prefix = stems = None
    static = False  # True: what a decode step computes hangs on no number in Python, so that it can be captured

    def __init__(self, config, rows, capacity, dtype=torch.float32, device="cpu"):
        self.config, self.rows, self.capacity, self.shortest, self.longest = config, rows, capacity, 0, 0
        shape = (config.n_layer, rows, config.n_kv_head, 0, config.head_dim)
        self.k = self.v = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def _make_room(self, tokens):
        """Room for so many tokens a row, if it is not there yet."""
        layers, rows, heads, held, D = self.k.shape
        if tokens > held:
            room = min(self.capacity + 1, -(-tokens // PORTION) * PORTION)
            for name in "kv":  # one after the other: only one of them is there twice for a moment
                new = self.v.new_empty(layers, rows, heads, room, D)
                new[:, :, :, :held] = getattr(self, name)
                new[:, :, :, held:] = 0  # a masked slot has weight 0, and 0 * NaN of uninitialised memory is NaN
                setattr(self, name, new)

    def set_lengths(self, lengths):
        """Set what each row holds, int or int64 (rows,); a shorter row forgets its last tokens. One host sync."""
        self.lengths[:] = lengths
        self.shortest, self.longest = torch.stack(self.lengths.aminmax()).tolist() if self.rows else (0, 0)

    def copy_rows(self, source_cache, source_rows, rows):
        """Copy what `source_rows` of a cache hold themselves into `rows` here; both int64 (n,)."""
        lengths = source_cache.lengths[source_rows]
        held = int(lengths.max()) if len(lengths) else 0
        if held > self.capacity:
            raise ValueError(f"KVCache: a row of {held} tokens does not fit a capacity of {self.capacity}")
        self._make_room(held)
        # layer by layer: the gathered copy stays small
        for mine, other in zip((*self.k, *self.v), (*source_cache.k, *source_cache.v), strict=True):
            mine[:, :, :held].index_copy_(0, rows, other[:, :, :held].index_select(0, source_rows))
        self.set_lengths(self.lengths.index_copy(0, rows, lengths))

    def branch(self, kept, rows=(), source=None, origins=(), stems=()):
        """Start texts in `rows`, empty and behind the first stems[i] tokens of row origins[i] of the cache `source`;
        the rows `kept` go on, all others are free. Lists of int. Up to SHARED texts of one origin stand together."""
        groups, count, device = {}, Counter(), self.lengths.device  # {(cache, its row, portion): rows behind it}
        for row in kept:
            groups.setdefault((self.prefix, self.group[row], 0), []).append(row)
        for row, origin in zip(rows, origins, strict=True):
            groups.setdefault((source, origin, count[origin] // SHARED), []).append(row)
            count[origin] += 1
        sources, texts = {cache for cache, _, _ in groups}, list(groups.values())
        prefix = KVCache(self.config, len(texts), max(cache.longest for cache in sources), self.k.dtype, device)
        for cache in sources:
            moves = [(origin, group) for group, (of, origin, _) in enumerate(groups) if of is cache]
            prefix.copy_rows(cache, *torch.tensor(moves, device=device).T)
        size, place = max(map(len, texts)), [(0, 0)] * self.rows  # a free row may stand anywhere
        for group, members in enumerate(texts):
            for number, row in enumerate(members):
                place[row] = group, number
        members = torch.tensor([m + m[:1] * (size - len(m)) for m in texts], device=device)[:, None]  # filled up
        group, number = torch.tensor(place, device=device).T[..., None]
        heads = torch.arange(self.k.shape[2], device=device)
        self.members = members * len(heads) + heads[:, None]  # (P, H_kv, M): which of the B*H_kv heads stand together
        self.places = (group * len(heads) + heads) * size + number  # (B, H_kv): where they are among those
        self.prefix, self.group = prefix, group[:, 0].tolist()
        at = torch.tensor(rows, dtype=torch.long, device=device)
        self.stems = torch.zeros_like(self.lengths) if self.stems is None else self.stems
        self.stems[at] = torch.tensor(stems, dtype=torch.long, device=device)
        self.set_lengths(self.lengths.index_fill(0, at, 0))

    def keep(self, rows):
        """Keep `rows`, int64 (n,), as rows 0..n-1 and drop the others, inside the memory held."""
        n = len(rows)
        self.copy_rows(self, rows, torch.arange(n, device=rows.device))
        self.rows, self.k, self.v, self.lengths = n, self.k[:, :n], self.v[:, :n], self.lengths[:n]
        self.set_lengths(self.lengths)
        if self.prefix:
            self.stems, self.group = self.stems[rows], [self.group[row] for row in rows.tolist()]
            self.branch(range(n))

    def most(self):
        """The tokens that a row may hold itself, whichever it is."""
        return min(self.capacity, self.config.limit - (self.prefix.longest if self.prefix else 0))

    def steady(self):
        """Whether every row can take a token without a look at the lengths, and in the tensors that are there."""
        return self.longest < min(self.k.shape[3], self.most())

    def _open(self, B, T, counts):
        """Check that the new tokens fit, and that no position reaches the limit; fix where they go. Returns their
        positions, int64 (B, T)."""
        if B > self.rows or (self.prefix and B < self.rows):
            raise ValueError(f"KVCache: a batch of {B} rows for a cache of {self.rows}")
        stems = self.stems[:B] if self.prefix else 0
        if self.longest + T > self.most():
            self.set_lengths(self.lengths)  # the bound may be loose, or padding exceed the limit: look before refusing
            needed = self.lengths[:B] + (T if counts is None else counts)
            for most, tokens in ((self.capacity, needed), (self.config.limit, stems + needed)):
                if int(tokens.max()) > most:
                    raise ValueError(f"KVCache: a row would hold {int(tokens.max())} tokens, the limit is {most}; "
                                     "enlarge the cache")  # fmt: skip
        self.span, fits = min(self.longest + T, self.capacity), self.longest + T <= self.capacity
        self._make_room(self.span + (not fits))
        self.empty = fits and self.longest == 0 and not self.prefix
        self.even = fits and self.shortest == self.longest and not self.static
        places = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)
        self.slots = torch.arange(B, device=places.device)[:, None], places.clamp(max=self.capacity)
        return places + (stems[:, None] if self.prefix else 0)

    def _write(self, layer, k, v):
        """Store k, v (B, H_kv, T, D) of one layer."""
        B, _, T, _ = k.shape
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.even:
                held[:B, :, self.longest : self.longest + T] = new
            else:
                held[self.slots[0], :, self.slots[1]] = new.transpose(1, 2).to(held.dtype)

    def _columns(self):
        """The position of each token that a row may look at, int64 (S,) or (B, S): of the prefix, then its own."""
        own = torch.arange(self.k.shape[3], device=self.lengths.device)
        if not self.prefix:
            return own
        before, stems = torch.arange(self.prefix.k.shape[3], device=own.device), self.stems[:, None]
        return torch.cat((before.masked_fill(before >= stems, FAR), stems + own), dim=1)

    def _attend(self, layer, q, mask):
        """Attention of q (B, H_kv, G*T, D), times the scale, over all that is held of one layer: matrix products, as
        the softmax goes over two caches, and as on a CPU they outrun torch's kernel with a mask."""
        B = len(q)
        scores = q @ self.k[layer, :B].transpose(-1, -2)  # (B, H_kv, G*T, S)
        if self.prefix:
            before = self._together(q) @ self.prefix.k[layer].transpose(-1, -2)  # (P, H_kv, M*G*T, S of the prefix)
            scores = torch.cat((self._apart(before), scores), dim=-1)
        if mask is not None:  # not -inf: padding may see nothing, and its NaN would stay in the cache
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if not self.prefix:
            return weights @ self.v[layer, :B]
        before, own = weights.split((before.shape[-1], self.k.shape[3]), dim=-1)
        return own @ self.v[layer, :B] + self._apart(self._together(before) @ self.prefix.v[layer])

    def _together(self, x):
        """(B, H_kv, N, .) -> (P, H_kv, M*N, .): rows with a common prefix as queries of one text."""
        return x.flatten(0, 1).index_select(0, self.members.flatten()).view(*self.members.shape[:2], -1, x.shape[-1])

    def _apart(self, x):
        """(P, H_kv, M*N, .) -> (B, H_kv, N, .), the way back."""
        heads = x.view(self.members.numel(), -1, x.shape[-1])
        return heads.index_select(0, self.places.flatten()).unflatten(0, self.places.shape)

    def _close(self, B, T, counts):
        """Count the new tokens; after a decode step by bounds only, without a host sync."""
        self.lengths[:B] += T if counts is None else counts
        self.longest = self.span
        self.shortest += T if counts is None and B == self.rows else 0
        if counts is not None and T > 1:
            self.set_lengths(self.lengths)


def rope_angles(config, positions, dtype):
    """cos and sin (B or 1, 1, T, D/2) in `dtype` of the rotary angles at positions, int64 (B or 1, T).

    Made anew in fp32: a buffer would be rounded by model.to(bfloat16) and left empty by a model built on meta.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies, scaling = 1.0 / config.rope_theta**pairs, config.rope_scaling or {"factor": 1.0}
    keep = 0.0  # the share of each frequency that is not divided by `factor`
    if "low_freq_factor" in scaling:  # llama3: none of the slow rotations, all of the fast ones, between them a blend
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    angles = positions[:, None, :, None] * (frequencies * (keep + (1 - keep) / scaling["factor"]))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x (B, H, T, D) by the angles of cos, sin (B or 1, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads, self.kv_heads, D = layer, config.n_head, config.n_kv_head, config.head_dim
        self.scale = (D**-0.5 if config.scale_by_head else 1.0) / (layer + 1 if config.scale_by_layer else 1)
        self.q_proj = nn.Linear(config.width, self.heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, self.kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, self.kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, config.width, bias=config.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, rope, mask, cache):
        """x (B, T, C); mask None: causal, or everything if T = 1; else bool (B or 1, 1, G*T or 1, S), G = H / H_kv."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache._write(self.layer, k, v)
        group = self.heads // self.kv_heads
        if cache is not None and not cache.empty:  # a group's heads are queries of one key head: its keys are read once
            y = cache._attend(self.layer, q.reshape(B, self.kv_heads, group * T, -1) * self.scale, mask)
        elif T > BLOCK and x.device.type == "cpu":
            y = self.in_blocks(q, k, v, group, mask)
        elif mask is None and T > 1:
            k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        else:
            q = q.reshape(B, self.kv_heads, group * T, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(y.reshape(B, self.heads, T, -1).transpose(1, 2).reshape(B, T, -1))

    def in_blocks(self, q, k, v, group, mask):
        """Causal attention, a block of queries at a time over the keys up to its end, a group's heads as queries of one
        key head. On a CPU 1.6 times as fast as torch's causal kernel, forward and backward (experiments/bench)."""
        q, blocks = q.unflatten(1, (self.kv_heads, group)), []  # (B, H_kv, G, T, D)
        for start in range(0, q.shape[3], BLOCK):
            part = q[:, :, :, start : start + BLOCK]
            end = start + part.shape[3]
            if mask is None:
                seen = torch.ones(end - start, end, dtype=torch.bool).tril(start).repeat(group, 1)
            else:
                seen = mask.unflatten(2, (group, -1))[:, :, :, start:end, :end].flatten(2, 3)
            y = F.scaled_dot_product_attention(part.flatten(2, 3), k[:, :, :end], v[:, :, :end], seen, scale=self.scale)
            blocks.append(y.unflatten(2, (group, -1)))
        return torch.cat(blocks, dim=3)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = config.make_norm(), config.make_norm()
        self.self_attn, self.act = Attention(config, layer), ACTIVATIONS[config.activation]
        inwards = partial(nn.Linear, config.width, config.mlp_width, bias=config.mlp_bias)
        self.mlp = nn.ModuleDict({name: inwards() for name in ("gate_proj", "up_proj")[not config.gated :]})
        self.mlp["down_proj"] = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x, rope, mask, cache):
        x = x + self.self_attn(again(self.normed, self.input_layernorm, x), rope, mask, cache)
        y, mlp = again(self.normed, self.post_attention_layernorm, x), self.mlp
        return x + again(self.down, *(mlp[name](y) for name in mlp if name != "down_proj"))

    @staticmethod
    def normed(norm, x):
        y, device = norm(x), x.device.type  # cast here, or under autocast each projection would keep a copy of its own
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y

    def down(self, y, up=None):
        return self.mlp.down_proj(self.act(y) if up is None else self.act(y) * up)


def again(function, *inputs):
    """The function's value; training computes it a second time in the backward pass instead of keeping what is between.
    For norms and activations of large batches: a third of the memory for a few percent of the time."""
    if not torch.is_grad_enabled() or inputs[-1].numel() < LARGE:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def packed(weight, bias=None):
    """x -> x W^T + b in the layout of oneDNN, the library behind torch's own products on a CPU."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class GPT(nn.Module):
    """The language model. With `gradient_checkpointing = True` training recomputes each layer, to hold less memory."""

    gradient_checkpointing = False

    def __init__(self, config):
        """Random weights as GPT-2: N(0, 0.02), projections into the residual stream divided by sqrt(2 n_layer)."""
        super().__init__()
        self.config, learned = config, config.position == "learned"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.max_len, config.width) if learned else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm, self.head = config.make_norm(), None
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids, cache=None, counts=None):
        """input_ids int64 (B, T), padded on the right -> logits (B, T, V); see `hidden`."""
        return self.logits(self.hidden(input_ids, cache, counts))

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., V), in the dtype of the weights."""
        if self.head:
            return self.head(hidden)
        return F.linear(hidden, (self.lm_head or self.embed_tokens).weight)

    def pack(self):
        """Lay the matrices out once as the CPU's kernels read them, which otherwise happens at each product: for a
        model to sample from, no longer to train or save. A tied embedding stays beside its packed copy."""
        half = self.norm.weight.dtype == torch.bfloat16
        if torch.backends.mkldnn.is_available() and (torch.ops.mkldnn._is_mkldnn_bf16_supported() or not half):
            for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
                linear.forward, linear.weight = packed(linear.weight, linear.bias), None
            self.head = self.lm_head.forward if self.lm_head else packed(self.embed_tokens.weight)

    def hidden(self, input_ids, cache=None, counts=None, tree=None):
        """input_ids int64 (B, T) -> the residual stream after the final norm, (B, T, C).

        With cache row b continues what the cache's row b holds; `counts` int64 (B,) says how many of its T tokens are
        real (default all), and the cache then holds those too. No gradient flows with a cache.
        tree = (positions, branches), int64 (B, T): a row may hold several continuations of one beginning. A token sees
        what stands before it, by position, in its own branch and in branch 0, the beginning.
        Raises ValueError if a row outgrows the cache or the learned positions.
        """
        (B, T), learned, limit = input_ids.shape, self.embed_positions is not None, self.config.limit
        if cache is not None:
            positions = cache._open(B, T, counts)  # (B, T)
        else:
            positions = tree[0] if tree else torch.arange(T, device=input_ids.device)[None]  # (B or 1, T)
            if learned and T and (longest := int(positions.max()) + 1) > limit:
                raise ValueError(f"a text of {longest} tokens, but the model has only {limit} positions")
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            x = self.embed_tokens(input_ids)  # (B, T, C)
            if learned:  # clamp: padding may lie beyond the last position
                x = x + self.embed_positions(positions.clamp(max=limit - 1))
            rope = None if learned else rope_angles(self.config, positions, x.dtype)
            masks = self._masks(positions, cache, tree and tree[1])
            for layer, window in zip(self.layers, self.config.window or [None] * len(self.layers), strict=True):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(layer, x, rope, masks[window], None, use_reentrant=False)
                else:
                    x = layer(x, rope, masks[window], cache)
            x = self.norm(x)
        if cache is not None:
            cache._close(B, T, counts)
        return x

    def _masks(self, positions, cache, branches=None):
        """{window: mask as in `Attention`} for the windows in use: made once per forward, not per layer."""
        T, square, masks = positions.shape[1], branches is None and (cache is None or cache.empty), {}
        even = square or (cache is not None and cache.even and not cache.prefix)
        columns = torch.arange(T, device=positions.device) if square else cache._columns() if cache else positions
        columns, rows = columns.view(-1, 1, 1, columns.shape[-1])[: len(positions)], positions[:, None, :, None]
        rows, span = rows[:1] if even else rows, columns.shape[-1]  # rows of one length share a mask
        for window in set(self.config.window or [None]):
            whole = window is None or window >= span
            if whole and (square or (T == 1 and even and span == cache.span)):
                masks[window] = None
            else:
                mask = columns <= rows if whole else (columns <= rows) & (columns > rows - window)
                if branches is not None:
                    mask &= (branches[:, None, None] == 0) | (branches[:, None, None] == branches[:, None, :, None])
                masks[window] = mask.repeat(1, 1, self.config.n_head // self.config.n_kv_head if T > 1 else 1, 1)
        return masks

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors (or the shards of its index) into a GPT of `dtype` on `device`.

        Everything is checked first; then tensors are read one by one into place, so that memory holds the weights once.
        Raises CheckpointError, one line.
        """
        config, stored = Config.from_hf(read_json(Path(folder) / "config.json")), open_tensors(Path(folder))
        need(config.n_layer < len(stored), f"{folder}: {len(stored)} tensors, {config.n_layer} layers; correct either")
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        if config.tied and "lm_head.weight" in stored:  # a tied head may be stored twice, or only under its own name
            head = stored.pop("lm_head.weight")
            twin = stored.setdefault(disk_place(config, "embed_tokens.weight")[0], head)
            same = twin.get_shape() == head.get_shape() and torch.equal(twin[:], head[:])
            need(same, f"{folder}: lm_head.weight is no copy of the embedding; set tie_word_embeddings false")
        places = {name: (p.shape, *disk_place(config, name)) for name, p in model.named_parameters()}
        for (rows, *columns), source, transposed, _, parts in places.values():
            need(source in stored, f"{folder}: no tensor {source}; the weights or config.json are of another model")
            shape = [columns[0], rows * parts] if transposed else [rows * parts, *columns]
            got, kind = stored[source].get_shape(), stored[source].get_dtype()
            need(got == shape, f"{folder}: {source} has shape {got}, config.json asks for {shape}; correct either")
            need(kind in ("F32", "F16", "BF16"), f"{folder}: {source} is {kind}, expected F32, F16 or BF16; convert it")
        extra = sorted(set(stored) - {place[1] for place in places.values()})
        need(not extra, f"{folder}: unexpected tensor {extra[:1]}; the weights are of another kind of model")
        for name, (shape, source, transposed, part, _) in places.items():
            cut, (owner, _, leaf) = slice(part * shape[0], (part + 1) * shape[0]), name.rpartition(".")
            value = stored[source][:, cut].t() if transposed else stored[source][cut]
            # copied: a view of the mapped file would change when the file does
            value = torch.empty(shape, dtype=dtype, device=device).copy_(value)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors, in `dtype` (default: as held); no reader ever meets half a file."""
        if self.head:
            raise ValueError("save_pretrained: the matrices are packed; expected a model as loaded; load it again")
        folder, tensors, base = Path(folder), {}, "transformer." if self.config.model_type == "gpt2" else "model."
        folder.mkdir(parents=True, exist_ok=True)
        for name, weight in self.named_parameters():
            source, transposed, _, _ = disk_place(self.config, name)
            weight = weight.detach().to("cpu", dtype)
            source = source if source == "lm_head.weight" else base + source
            tensors.setdefault(source, []).append(weight.t() if transposed else weight)
        tensors = {name: torch.cat(parts, dim=-1).contiguous() for name, parts in tensors.items()}
        kind = str(dtype or self.norm.weight.dtype).removeprefix("torch.")  # keys of transformers 5 and of 4:
        text = json.dumps(self.config.to_hf() | {"dtype": kind, "torch_dtype": kind}, indent=2) + "\n"
        # the weights last: a folder that has them is whole
        for name, write in (("config.json", lambda path: path.write_text(text, encoding="utf-8")),
                            ("model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))):
            temporary = folder / f".{name}.tmp"
            write(temporary)
            os.replace(temporary, folder / name)


def disk_place(config, name):
    """Where a parameter lies on disk: (tensor name without prefix, transposed, which part of it, of how many)."""
    if config.model_type != "gpt2":
        return name, False, 0, 1
    part = [i for i, p in enumerate(("q_proj", "k_proj", "v_proj")) if p in name]  # GPT-2 keeps the three in one
    transposed = name.endswith("proj.weight")  # and stores x @ W, not x @ W^T
    for ours, theirs in GPT2_TENSORS.items():
        name = name.replace(ours, theirs)
    return (name, transposed, part[0], 3) if part else (name, transposed, 0, 1)


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error!r:.200}, expected a readable JSON file; fetch it again") from None
    need(isinstance(value, dict), f"{path}: expected a JSON object; fetch it again")
    return value


def open_tensors(folder):
    """{name without prefix: lazy tensor} of all shards of a folder; reads only their headers."""
    shards, tensors, index = ["model.safetensors"], {}, folder / "model.safetensors.index.json"
    if not (folder / shards[0]).exists():
        need(index.exists(), f"{folder}: no model.safetensors; pickled weights are not read, convert them to it")
        names = read_json(index).get("weight_map")
        good = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        need(good, f"{index}: weight_map does not name a file per tensor; fetch it again")
        shards = sorted(set(names.values()))
    for shard in shards:
        inside = shard == os.path.basename(shard) and (folder / shard).is_file()
        need(inside, f"{folder}: shard {shard!r:.80} is not a file in this folder; fetch it again")
        try:
            file = safe_open(folder / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / shard}: {error!r:.200}, expected safetensors; fetch it again") from None
        for name in file.keys():
            short = re.sub(r"^(transformer|model)\.", "", name)
            need(short not in tensors, f"{folder / shard}: {name} is stored twice; keep one")
            if not CONSTANTS.search(short):
                tensors[short] = file.get_slice(name)
    return tensors

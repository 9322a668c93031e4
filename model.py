"""A decoder-only transformer in plain PyTorch that reads and writes Hugging Face folders.

GPT-2, Llama 1-3, Mistral, Qwen2 and Qwen3 are one computation with a few switches. A `Config`
holds the switches, and one builder per family (`llama`, `gpt2`, ...) sets them from config.json.

    model = GPT.from_pretrained("folder")
    logits = model(ids)                              # (B, T) -> (B, T, V), padded on the right
    cache = KVCache(model.config, rows=len(ids), room=512)
    logits = model(ids, cache, counts=lengths)       # prefill; counts: real tokens of each row
    logits = model(next_ids, cache)                  # then one token a row at a time

Shapes: B rows, T tokens, C width, V vocabulary, H query heads, H_kv key heads, D head size,
S keys that a query may look at. There is no dropout: the rates in config.json are ignored.
"""

import json
import math
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# cuDNN's attention compiles a plan for every new shape, and batches of text have one at each step.
torch.backends.cuda.enable_cudnn_sdp(False)

gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
BLOCK = 64  # tokens by which a cache grows


class CheckpointError(ValueError):
    """A model folder cannot be read. The message is one line that names the file and the key."""


@dataclass(frozen=True)
class Config:
    """The architecture of a model. Made by `Config.from_hf`, for a toy model too."""

    architecture: str  # the class of transformers that reads the same folder
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's vocabulary
    n_layer: int
    n_head: int
    n_kv_head: int  # divides n_head: each key head serves n_head / n_kv_head query heads
    head_dim: int  # n_head * head_dim need not be width
    width: int  # of the residual stream
    mlp_width: int
    max_len: int  # positions seen in training; a limit only for learned positions
    norm_eps: float
    activation: str  # a key of ACTIVATIONS
    tied: bool  # the head is the embedding matrix
    windows: tuple  # for each layer how many tokens, itself included, a token sees; None: all
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    gated: bool = True  # W_down (act(W_gate x) * W_up x) instead of W_down act(W_up x)
    rotary: bool = True  # rotary instead of learned positions
    rope_theta: float = 1e4
    rope_scaling: dict | None = None  # rope_type "linear" or "llama3" and its numbers
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head
    scale_by_head: bool = True  # divide the scores by sqrt(head_dim)
    scale_by_layer: bool = False  # and by the number of the layer, from 1
    conv1d: bool = False  # stored as GPT-2's: matrices transposed, q, k and v in one
    prefix: str = "model."  # of all names on disk but the head's
    names: dict = field(default_factory=dict)  # our part of a tensor's name -> the one on disk
    hf: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read

    @classmethod
    def from_hf(cls, hf):
        """Translate the dict of a config.json, as transformers 4 or 5 write it."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(f"model_type={family!r} is not one of {known}")
        for key in ("quantization_config", "add_cross_attention"):
            if hf.get(key):
                raise CheckpointError(f"{key} is not supported")
        config = replace(FAMILIES[family](hf), hf=dict(hf))
        if config.n_head % config.n_kv_head != 0:
            raise CheckpointError(
                f"num_key_value_heads={config.n_kv_head} does not divide {config.n_head} heads"
            )
        if config.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise CheckpointError(f"activation {config.activation!r} is not one of {known}")
        return config

    @property
    def position_limit(self):
        """How many tokens a text may have: any number, unless positions are learned."""
        return math.inf if self.rotary else self.max_len


# ---- the transformer


def make_norm(config, size):
    if config.layer_norm:
        return nn.LayerNorm(size, eps=config.norm_eps)
    return nn.RMSNorm(size, eps=config.norm_eps)


def rope_angles(config, positions, dtype):
    """cos and sin, (B, 1, T, D/2), of the angles position * theta^(-2i/D) of positions (B, T).

    Computed in fp32 at each forward: a buffer would be rounded by model.to(bfloat16).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    if scaling and scaling["rope_type"] == "llama3":
        # Fast rotations stay, slow ones are divided by `factor`, between them it is a blend.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    angles = positions[:, None, :, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x (B, H, T, D) by their angles (arXiv:2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention; H / H_kv query heads share a key and value head."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.scale = 1.0
        if config.scale_by_head:
            self.scale /= math.sqrt(config.head_dim)
        if config.scale_by_layer:
            self.scale /= layer + 1
        q_width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.width, bias=config.out_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim)
            self.k_norm = make_norm(config, config.head_dim)

    def forward(self, x, positions, rope, mask, cache):
        """x (B, T, C) -> (B, T, C): softmax(rotated q k^T * scale + mask) v, heads side by side.

        rope: cos and sin, or None where positions are learned. mask: from `make_masks`; None means
        causal.
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_head, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, positions, k, v)
        attend = partial(F.scaled_dot_product_attention, scale=self.scale)
        if mask is None:
            y = attend(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # Query heads that share a key head are laid end to end, as more queries of that head:
            # its keys are then read once, not once for each of them.
            q = q.reshape(B, self.n_kv_head, -1, self.head_dim)  # (B, H_kv, H / H_kv * T, D)
            y = attend(q, k, v, attn_mask=mask)
        y = y.reshape(B, self.n_head, T, self.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """W_down (act(W_gate x) * W_up x), or W_down act(W_up x) without a gate."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated
        if config.gated:
            self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the names are those of transformers."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = make_norm(config, config.width)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x, positions, rope, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GPT(nn.Module):
    """The language model. Set `gradient_checkpointing` to recompute each layer in the backward
    pass: less memory for about a third more time."""

    gradient_checkpointing = False

    def __init__(self, config):
        """Random weights as GPT-2's: N(0, 0.02), divided by sqrt(2 n_layer) where they write
        into the residual stream."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = None
        if not config.rotary:
            self.embed_positions = nn.Embedding(config.max_len, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = make_norm(config, config.width)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids, cache=None, counts=None):
        """input_ids int64 (B, T), padded on the right -> logits (B, T, V)."""
        return self.logits(self.hidden(input_ids, cache, counts))

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., V)."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def hidden(self, input_ids, cache=None, counts=None, positions=None, branches=None):
        """input_ids int64 (B, T), padded on the right -> hidden (B, T, C) after the final norm.

        With a cache, row b continues row b of the cache; counts, int64 (B,), says how many of
        the T tokens are real (default: all). Call it under torch.no_grad().

        positions and branches, int64 (B, T), let one row hold a prompt and several responses to
        it, so that the prompt is computed once. A prompt p of three tokens, with a response a of
        two and a response b of three:

            column     0   1   2   3   4   5   6   7
            token      p0  p1  p2  a0  a1  b0  b1  b2
            positions  0   1   2   3   4   3   4   5     each response goes on behind the prompt
            branches   0   0   0   1   1   2   2   2     0: the prompt; -1: padding

        A token sees the prompt and its own response, up to its own position: a1 sees columns 0 to
        4, and b1 sees 0, 1, 2, 5, 6. So each response gets what it would get in a row of its own.
        """
        T = input_ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=input_ids.device)[None]  # (1, T)
        if cache is not None and not cache.empty:
            positions = positions + cache.lengths[:, None]  # (B, T)
        x = self.embed_tokens(input_ids)
        rope = None
        if self.config.rotary:
            rope = rope_angles(self.config, positions, x.dtype)
        else:
            last = self.config.max_len - 1
            if cache is None and positions.max() > last:
                raise ValueError(f"a text of {T} tokens for a model of {last + 1} positions")
            # Padding and rows that are done may stand behind the last position: nobody reads them.
            x = x + self.embed_positions(positions.clamp(max=last))
        masks = make_masks(self.config, positions, branches, cache, x.dtype)
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            inputs = (x, positions, rope, masks[window], cache)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        if cache is not None:
            cache.advance(T if counts is None else counts)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors, or its shards, into a model.

        Tensors are read one by one, so that memory holds the weights once.
        Raises CheckpointError.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; nothing is downloaded here, but "
                "`hf download NAME --local-dir FOLDER` makes a folder of a model on the hub"
            )
        hf = read_json(folder / "config.json")
        try:
            config = Config.from_hf(hf)
            with torch.device("meta"):  # shapes without memory
                model = cls(config)
        except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}/config.json makes no model: {reason}") from None
        stored = open_tensors(folder)
        check_tied_head(folder, config, stored)
        sources = {name: disk_name(config, name) for name, _ in model.named_parameters()}
        wrong = sorted(set(sources.values()) ^ set(stored))
        if wrong:
            problem = "unexpected tensor" if wrong[0] in stored else "no tensor"
            raise CheckpointError(f"{folder}: {problem} {wrong[0]}")
        weights = {}
        for name, parameter in model.named_parameters():
            value = from_disk(config, name, stored[sources[name]]())
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, but config.json says {list(parameter.shape)}"
                raise CheckpointError(f"{folder}: {sources[name]} gives {name} the shape {shapes}")
            # A copy: what safetensors returns is a view of the file, and changes with it.
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            weights[name] = empty.copy_(value)
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors, in `dtype` or as held. No reader ever meets
        half a file, and the weights come last: a folder that has them is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.norm.weight.dtype
        kind = str(dtype).removeprefix("torch.")
        hf = self.config.hf | {"architectures": [self.config.architecture]}
        hf |= {"dtype": kind, "torch_dtype": kind}  # transformers 5 and 4
        temporary = folder / ".config.json.tmp"
        temporary.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / "config.json")
        save_tensors(disk_tensors(self, dtype), folder / "model.safetensors", {"format": "pt"})


def make_masks(config, positions, branches, cache, dtype):
    """{window: mask} for the windows in use, built once for all layers.

    A mask is None where a token sees all tokens before it. Else it is (B or 1, 1, N, S) and added
    to the scores: 0 where a token may look, a huge negative number elsewhere. Its N rows are the T
    queries, repeated for each of the H / H_kv query heads that share a key head. When T = 1, a
    decode step, all of them look at the same keys, and N = 1 is enough.
    """
    T = positions.shape[1]
    device = positions.device
    continues = cache is not None and not cache.empty
    keys = positions[:, None, None, :]
    queries = positions[:, None, :, None]
    if continues:
        keys = torch.arange(cache.room, device=device)
    visible = keys <= queries  # (B or 1, 1, T, S); the slots of a cache are its positions
    if branches is not None:
        same_branch = branches[:, None, None, :] == branches[:, None, :, None]
        visible &= same_branch | (branches[:, None, None, :] == 0)
    if torch.is_autocast_enabled(device.type):  # else every layer would convert the mask again
        dtype = torch.get_autocast_dtype(device.type)
    hide = torch.finfo(dtype).min  # not -inf: the softmax of a row that sees nothing would be NaN
    masks = {}
    for window in set(config.windows):
        if not continues and branches is None and (window is None or window >= T):
            masks[window] = None
            continue
        seen = visible
        if window is not None:
            seen = visible & (keys > queries - window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, hide)
        if T > 1:
            mask = mask.repeat(1, 1, config.n_head // config.n_kv_head, 1)
        masks[window] = mask
    return masks


class KVCache:
    """The keys and values of the tokens that each row has read so far, in all layers.

    k, v: (n_layer, rows, H_kv, room, D), where `room` is how many tokens a row may hold.
    lengths: int64 (rows,), how many it holds; what lies behind them is never seen.

    Call `make_room` before more tokens are read. `GPT.hidden` does not check the lengths: they are
    on the GPU, and to read them there would stop the program until the GPU has caught up.
    A decode step attends to the whole room, under a mask. So its shapes change only when the room
    grows, and until then one CUDA graph can replay it.
    """

    def __init__(self, config, rows, room, dtype=torch.float32, device="cpu"):
        shape = (config.n_layer, rows, config.n_kv_head, room, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row_index = torch.arange(rows, device=device)[:, None]  # (rows, 1)
        self.empty = True  # what is read first needs only its own keys, not the whole room

    @property
    def room(self):
        return self.k.shape[3]

    def make_room(self, tokens):
        """Let each row hold `tokens` tokens: k and v grow by whole blocks if they are too small."""
        if tokens <= self.room:
            return
        more = math.ceil(tokens / BLOCK) * BLOCK - self.room
        self.k = F.pad(self.k, (0, 0, 0, more))
        self.v = F.pad(self.v, (0, 0, 0, more))

    def copy_rows(self, source, source_rows, rows):
        """Copy rows of another cache into rows of this one: source_rows and rows are int64 (n,)."""
        self.make_room(source.room)
        for layer in range(len(self.k)):
            self.k[layer, rows, :, : source.room] = source.k[layer, source_rows]
            self.v[layer, rows, :, : source.room] = source.v[layer, source_rows]
        self.lengths[rows] = source.lengths[source_rows]
        self.empty = False

    def append(self, layer, positions, k, v):
        """Store k and v (B, H_kv, T, D) of the new tokens at `positions`, int64 (B, T). Returns
        the keys and values to attend to: the new ones if the cache was empty, else the whole room.
        """
        if self.empty:
            T = k.shape[2]
            self.k[layer, :, :, :T] = k
            self.v[layer, :, :, :T] = v
            return k, v
        self.k[layer][self.row_index, :, positions] = k.transpose(1, 2)
        self.v[layer][self.row_index, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def advance(self, counts):
        """Add the number of new tokens to the lengths: an int, or int64 (rows,)."""
        self.lengths += counts
        self.empty = False


# ---- log-probabilities of responses


def token_logps(model, sequences):
    """log pi of every response token of some sequences, float32 (N,), response after response.

    sequences: (prompt, response) or (prompt, chosen, rejected), token ids each. Nothing else shifts
    and masks. Logits exist only where responses are predicted, some hundred MB of them at a time,
    and are computed again in the backward pass: in float32 and over a large vocabulary they are
    what runs out of memory first.
    """
    batch = collate(sequences, model.norm.weight.device)
    hidden = model.hidden(batch.ids, positions=batch.positions, branches=batch.branches)
    hidden = hidden[batch.rows, batch.columns]  # (N, C)

    def logps(hidden, targets):
        return -F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")

    logits_at_a_time = 2**27 if hidden.is_cuda else 2**24
    chunk = max(1, logits_at_a_time // model.config.vocab_size)
    if len(hidden) <= chunk:
        return logps(hidden, batch.targets)
    parts = []
    for h, targets in zip(hidden.split(chunk), batch.targets.split(chunk), strict=True):
        parts.append(checkpoint(logps, h, targets, use_reentrant=False))
    return torch.cat(parts)


@dataclass
class Batch:
    """Sequences as the model reads them, and where it predicts their response tokens."""

    ids: torch.Tensor  # int64 (B, T), padded on the right
    positions: torch.Tensor | None  # int64 (B, T), where a row has two responses
    branches: torch.Tensor | None  # int64 (B, T): 0 the prompt, 1 and 2 its responses, -1 padding
    rows: torch.Tensor  # int64 (N,), of every response token: its row,
    columns: torch.Tensor  # the column that predicts it,
    targets: torch.Tensor  # and the token itself


def collate(sequences, device):
    """A `Batch` of (prompt, response) or (prompt, chosen, rejected) sequences of token ids.

    Each row is a prompt followed by its responses, each without its last token, which predicts
    nothing. The last token of the prompt predicts the first token of each response. One pair, with
    the prompt 5 7, chosen 3 8 and rejected 4 9 6, is one row:

        column       0  1  2  3  4
        ids          5  7  3  4  9
        positions    0  1  2  2  3     both responses stand behind the prompt
        branches     0  0  1  2  2     and do not see each other
        predicts        3  8           chosen: 3 from column 1, 8 from column 2
                        4     9  6     rejected: 4 from column 1, 9 and 6 from columns 3 and 4

    All masks come from lengths, because padding may equal the end of text.
    """
    ids = []
    positions = []
    branches = []
    rows = []
    columns = []
    targets = []
    for row, (prompt, *responses) in enumerate(sequences):
        x = list(prompt)
        position = list(range(len(prompt)))
        branch = [0] * len(prompt)
        for number, response in enumerate(responses, 1):
            n = len(response)
            rows += [row] * n
            # the prompt's last token predicts the first token of each response
            columns += [len(prompt) - 1, *range(len(x), len(x) + n - 1)]
            targets += response
            x += response[:-1]
            position += range(len(prompt), len(prompt) + n - 1)
            branch += [number] * (n - 1)
        ids.append(x)
        positions.append(position)
        branches.append(branch)

    def pad(lists, value=0):
        tensors = [torch.from_numpy(np.array(numbers)) for numbers in lists]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    places = torch.from_numpy(np.array([rows, columns, targets])).to(device)
    batch = Batch(pad(ids), None, None, *places)
    if any(len(sequence) > 2 for sequence in sequences):
        batch.positions = pad(positions)
        batch.branches = pad(branches, value=-1)
    return batch


# ---- families: what config.json and the names of the tensors mean


def llama(hf):
    """Rotary positions, RMSNorm, a gated MLP. The other families but GPT-2 vary this one."""
    n_layer = read_size(hf, "num_hidden_layers", 32)
    n_head = read_size(hf, "num_attention_heads", 32)
    width = read_size(hf, "hidden_size", 4096)
    theta, scaling = read_rope(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        architecture="LlamaForCausalLM",
        vocab_size=read_size(hf, "vocab_size", 32000),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=hf.get("num_key_value_heads") or n_head,
        head_dim=hf.get("head_dim") or head_size(width, n_head),
        width=width,
        mlp_width=read_size(hf, "intermediate_size", 11008),
        max_len=read_size(hf, "max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=hf.get("hidden_act", "silu"),
        tied=hf.get("tie_word_embeddings", False),
        windows=(None,) * n_layer,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
    )


NO_BIASES = dict(attention_bias=False, mlp_bias=False)  # whatever config.json says


def mistral(hf):
    """Llama with a window in every layer."""
    defaults = dict(
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=2**17,
        sliding_window=4096,
    )
    hf = defaults | hf
    config = llama(hf | NO_BIASES)
    windows = (hf["sliding_window"],) * config.n_layer
    return replace(config, architecture="MistralForCausalLM", windows=windows)


def qwen2(hf):
    """Llama with biases of q, k and v, and a window in some layers if it is switched on."""
    defaults = dict(
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        max_position_embeddings=2**15,
    )
    config = llama(defaults | hf | NO_BIASES)
    windows = qwen_windows(hf, config.n_layer)
    return replace(config, architecture="Qwen2ForCausalLM", windows=windows, qkv_bias=True)


def qwen3(hf):
    """Qwen2 with normalised queries and keys."""
    bias = hf.get("attention_bias", False)
    return replace(
        qwen2(dict(head_dim=128) | hf),
        architecture="Qwen3ForCausalLM",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


# Replaced in this order: "layers.0.self_attn.q_proj.weight" is in "h.0.attn.c_attn.weight".
GPT2_NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "layers.": "h.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "norm.": "ln_f.",
    "self_attn": "attn",
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
}


def gpt2(hf):
    """Learned positions, LayerNorm, biases everywhere, no gate."""
    n_layer = read_size(hf, "n_layer", 12)
    n_head = read_size(hf, "n_head", 12)
    width = read_size(hf, "n_embd", 768)
    return Config(
        architecture="GPT2LMHeadModel",
        vocab_size=read_size(hf, "vocab_size", 50257),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=head_size(width, n_head),
        width=width,
        mlp_width=hf.get("n_inner") or 4 * width,
        max_len=read_size(hf, "n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=hf.get("activation_function", "gelu_new"),
        tied=hf.get("tie_word_embeddings", True),
        windows=(None,) * n_layer,
        layer_norm=True,
        gated=False,
        rotary=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        scale_by_head=hf.get("scale_attn_weights", True),
        scale_by_layer=hf.get("scale_attn_by_inverse_layer_idx", False),
        conv1d=True,
        prefix="transformer.",
        names=GPT2_NAMES,
    )


# A new family: a builder, a row here, and a model in tests/golden/make_golden.py.
FAMILIES = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def read_size(hf, key, default):
    """A positive integer of config.json. A key that is not there has transformers' default."""
    value = hf.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key}={value!r} is not a positive integer")
    return value


def head_size(width, n_head):
    """The size of a head where the heads share the width."""
    if width % n_head != 0:
        raise CheckpointError(f"{n_head} heads do not divide a width of {width}")
    return width // n_head


LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3_KEYS)}


def read_rope(hf):
    """(theta, scaling) from rope_theta and rope_scaling (transformers 4) or rope_parameters (5)."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"rotations of their own for {', '.join(rope)} are not supported")
    if (hf.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) != 1:
        raise CheckpointError("partial_rotary_factor is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise CheckpointError(f"rope_type={kind!r} is not one of {', '.join(ROPE_KEYS)}")
    original = "original_max_position_embeddings"
    defaults = {"rope_theta": 1e4, original: hf.get("max_position_embeddings", 2048)}
    rope = defaults | hf | rope  # some files have some of the numbers at their top
    if hf.get(original):
        rope[original] = hf[original]  # as in transformers 5, it then counts
    theta = float(rope["rope_theta"])
    missing = [key for key in ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise CheckpointError(f"rope_type={kind!r} needs {missing[0]}")
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind} | {key: float(rope[key]) for key in ROPE_KEYS[kind]}


def qwen_windows(hf, n_layer):
    """The window of each layer: as layer_types says, else one in all from max_window_layers on."""
    if not hf.get("use_sliding_window"):
        return (None,) * n_layer
    first = min(hf.get("max_window_layers", 28), n_layer)
    kinds = ["full_attention"] * first + ["sliding_attention"] * (n_layer - first)
    kinds = hf.get("layer_types") or kinds
    window_of = {"full_attention": None, "sliding_attention": hf.get("sliding_window", 4096)}
    if len(kinds) != n_layer or not set(kinds) <= set(window_of):
        raise CheckpointError(f"layer_types is not a list of {n_layer} of {', '.join(window_of)}")
    return tuple(window_of[kind] for kind in kinds)


# ---- files


def disk_name(config, name):
    """layers.0.self_attn.q_proj.weight -> h.0.attn.c_attn.weight for GPT-2: no prefix yet."""
    for ours, theirs in config.names.items():
        name = name.replace(ours, theirs)
    return name


def from_disk(config, name, tensor):
    """The parameter `name` from the tensor that holds it."""
    if config.conv1d and "proj" in name:
        tensor = tensor.t()
        for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            if projection in name:
                tensor = tensor.chunk(3)[part]
    return tensor


def disk_tensors(model, dtype):
    """{name on disk: tensor on the CPU} for all parameters, the inverse of `from_disk`."""
    config = model.config
    parts = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().to("cpu", dtype)
        if config.conv1d and "proj" in name:
            weight = weight.t()
        name = disk_name(config, name)
        if name != "lm_head.weight":
            name = config.prefix + name
        parts.setdefault(name, []).append(weight)
    return {name: torch.cat(tensors, dim=-1).contiguous() for name, tensors in parts.items()}


def check_tied_head(folder, config, stored):
    """A tied head may be stored twice, or under the head's name only."""
    if not config.tied or "lm_head.weight" not in stored:
        return
    head = stored.pop("lm_head.weight")
    embedding = stored.setdefault(disk_name(config, "embed_tokens.weight"), head)
    if not torch.equal(head(), embedding()):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings=true, but lm_head.weight differs from the embedding"
        )


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def open_tensors(folder):
    """{name without prefix: function that reads it} for all tensors of a folder."""
    tensors = {}
    for path in shard_paths(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
        for name in file.keys():
            short = name.removeprefix("transformer.").removeprefix("model.")
            if short in tensors:
                raise CheckpointError(f"{path}: {name} is stored twice")
            # Old files carry masks and angles, which are not weights.
            if ".rotary_emb." not in name and not name.endswith((".attn.bias", ".masked_bias")):
                tensors[short] = partial(file.get_tensor, name)
    return tensors


def shard_paths(folder):
    """The files with weights, chosen as transformers does: model.safetensors, else those that
    model.safetensors.index.json names, else model-00001-of-00002.safetensors and so on."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder}: no model.safetensors (.bin files are not read)")
        return shards
    weight_map = read_json(index).get("weight_map")  # {"model.norm.weight": "a.safetensors", ...}
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map from tensors to files")
    paths = set()
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index}: {file!r} is not the name of a file in this folder")
        paths.add(folder / file)
    return sorted(paths)


def save_tensors(tensors, path, metadata):
    """Write a safetensors file under a temporary name and rename it: never half a file.

    save_file leaves a file that only its owner may read; it gets the mode that new files have.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(tensors, temporary, metadata=metadata)
    temporary.chmod(mode)
    os.replace(temporary, path)

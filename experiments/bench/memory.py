"""What a training step of a large model holds in memory, traced without the memory.

    python experiments/bench/memory.py            # Qwen2.5's shapes, a minute on one core

FakeTensorMode runs model and optimizer on tensors that have shapes but no content, and the storages
that are alive are counted. A step: two micro-batches of 4 pairs of 512 tokens a side, half of them
the prompt, with float32 weights, bfloat16 activations and gradient checkpointing, then AdamW. Not
counted: gaps of an allocator, buffers inside kernels, clipping.
"""

import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import UserError, flag, parse_flags
from model import GPT, Config
from rollout import Pair, Policy, run_program
from train import TrainFlags, dpo, forward_backward, resolve

SHAPES = {
    "0.5B": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "1.5B": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "7B": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        vocab_size=152064,
    ),
}


@dataclass
class BenchFlags:
    shapes: str = flag("0.5B 1.5B 7B", "models, of " + " ".join(SHAPES), group="run")
    pairs: int = flag(4, "pairs a micro-batch", least=1)
    tokens: int = flag(512, "tokens a side", least=4)
    dtype: str = flag("bfloat16", "of activations", choices=("bfloat16", "float32"))
    gradient_checkpointing: int = flag(1, "1: recompute activations", least=0, most=1)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were since `peak` was
    set."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def one_pair(tokens):
    """A pair of so many tokens a side, half of them the prompt."""
    half = [0] * (tokens // 2)
    return Pair("", "response", 1, prompt=half, chosen=half, rejected=half, reference=[0.0, 0.0])


def trace(hf, pairs, tokens, dtype, checkpointing):
    """Bytes held between two steps, and at most in forward and backward, and in the optimizer.

    hf: a config.json, of Qwen2 if it does not say. A step is two micro-batches of `pairs` pairs.
    """
    pair = one_pair(tokens)
    micro_tokens = pairs * len(pair.prompt) * 3  # prompt, chosen, rejected
    c = resolve(TrainFlags(data="jsonl", micro_tokens=micro_tokens))
    config = Config.from_hf(dict(model_type="qwen2") | hf)
    with FakeTensorMode(), Alive() as alive:
        model = GPT(config)
        model.gradient_checkpointing = checkpointing
        policy = Policy(model, None, "", dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):  # AdamW's moments exist from the second step on
            alive.peak = alive.now
            forward_backward(policy, [pair] * (2 * pairs), dpo, c)
            in_backward = alive.peak
            alive.peak = alive.now
            optimizer.step()
            in_optimizer = alive.peak
            optimizer.zero_grad(set_to_none=True)
        held = alive.now
    return held, in_backward, in_optimizer


def main():
    flags = parse_flags(BenchFlags, __doc__)
    print(f"{'GB':7}{'weights, moments':>18}{'in forward, backward':>22}{'in the optimizer':>18}")
    for name in flags.shapes.split():
        if name not in SHAPES:
            raise UserError(f"--shapes: {name!r} is not one of {', '.join(SHAPES)}")
        held, in_backward, in_optimizer = trace(
            SHAPES[name],
            flags.pairs,
            flags.tokens,
            flags.dtype,
            checkpointing=bool(flags.gradient_checkpointing),
        )
        print(f"{name:7}{held / 1e9:18.1f}{in_backward / 1e9:22.1f}{in_optimizer / 1e9:18.1f}")


if __name__ == "__main__":
    run_program(main)

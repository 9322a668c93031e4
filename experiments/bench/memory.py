"""What a training step of a large model holds in memory, traced without the memory: `--weights bfloat16`, Eq. 1.

    python experiments/bench/memory.py            # Qwen2.5 shapes, a minute on one core

FakeTensorMode runs the model and the optimizer on tensors that have shapes but no content, and every storage that is
alive is counted: two micro-batches of 4 pairs of 2 x 512 tokens, gradient checkpointing, logits in the chunks of
`token_logprobs`, then the optimizer's step. Not counted: gaps of an allocator, buffers inside CUDA kernels, clipping.
"""

import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from model import GPT, Config
from rollout import entry, flag, parse
from train import RoundingAdamW, dpo_loss

SHAPES = {  # width, mlp, layers, heads, key heads, tied, vocabulary
    "0.5B": (896, 4864, 24, 14, 2, True, 151936), "1.5B": (1536, 8960, 28, 12, 2, True, 151936),
    "7B": (3584, 18944, 28, 28, 4, False, 152064)}  # fmt: skip
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "tie_word_embeddings", "vocab_size")  # fmt: skip


@dataclass
class BenchConfig:
    shapes: str = flag("0.5B 1.5B 7B", "of " + " ".join(SHAPES))
    pairs: int = flag(4, "pairs a micro-batch", 1)
    tokens: int = flag(512, "tokens a side", 1)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were since `peak` was set."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def logprobs(model, ids, chunk=2**24):
    """`token_logprobs` of whole rows: its mask makes shapes that depend on content, which there is none of."""
    hidden, target = model.hidden(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()

    def some(hidden, target):
        return -F.cross_entropy(model.logits(hidden).float(), target, reduction="none")

    size = chunk // model.config.vocab_size
    parts = zip(hidden.split(size), target.split(size), strict=True)
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in parts])


def main():
    c = parse(BenchConfig, __doc__)
    print(f"{'GB':7}{'weights, gradients, moments':>29}{'most in forward, backward':>27}{'in the optimizer':>18}")
    for name in c.shapes.split():
        config = Config.from_hf(dict(model_type="qwen2", **dict(zip(KEYS, SHAPES[name], strict=True))))
        with FakeTensorMode(), Alive() as alive:
            torch.set_default_dtype(torch.bfloat16)
            model = GPT(config)
            torch.set_default_dtype(torch.float32)
            model.gradient_checkpointing = True
            options = dict(seed=0, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.01)
            optimizer = RoundingAdamW(model.parameters(), **options)
            for _ in range(2):  # moments exist from the second step on
                most = []
                alive.peak = alive.now
                for _ in range(2):
                    ids = torch.zeros(2 * c.pairs, c.tokens + 1, dtype=torch.long)
                    chosen, rejected = logprobs(model, ids).view(2, c.pairs, -1).sum(-1)
                    zero = torch.zeros(c.pairs)
                    dpo_loss(chosen, rejected, zero, zero, 0.1)[0].mean().backward()
                    del chosen, rejected
                most.append(alive.peak)
                alive.peak = alive.now
                optimizer.step()
                most.append(alive.peak)
                optimizer.zero_grad(set_to_none=True)
        held = 8 * sum(p.numel() for p in model.parameters())
        print(f"{name:7}{held / 1e9:29.1f}{most[0] / 1e9:27.1f}{most[1] / 1e9:18.1f}")


if __name__ == "__main__":
    entry(main)

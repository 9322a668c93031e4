"""What a training step of a large model holds in memory, traced without the memory: `--weights bfloat16`, Eq. 1.

    python experiments/bench/memory.py            # Qwen2.5 shapes, a minute on one core

FakeTensorMode runs the model and the optimizer on tensors that have shapes but no content, and every storage that is
alive is counted: two micro-batches of 4 pairs of 512 tokens a side, of which half are the prompt that both share,
gradient checkpointing, then the optimizer's step. Not counted: gaps of an allocator, buffers inside CUDA kernels,
clipping.
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
from model import GPT, Config
from rollout import entry, flag, parse
from train import RoundingAdamW, dpo_loss, sequence_logprobs

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
                    half = [0] * (c.tokens // 2)
                    chosen, rejected = sequence_logprobs(model, c.pairs * [(half, half, half)]).view(-1, 2).T
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

"""Make experiments/base: the small model that the built-in task starts from, and its tokenizer.

    python experiments/make_base.py --out runs/base        # about 25 minutes on one core

It learns from clean solutions of problems with one to three steps, where the task has four. So it
knows the words and the sums, but not yet the task. The model is then in runs/base/model, and
experiments/base is a copy of it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import LARGEST, NAMES, THINGS, VERBS, Tokenizer, flag, load_problems, parse_flags
from model import GPT, Config
from rollout import Example, Policy, run_program
from train import TrainFlags, fit, nll, resolve


@dataclass
class BaseFlags:
    out: str = flag("runs/base", "folder for metrics.csv and the model", group="run")
    problems: int = flag(400_000, "training problems; fewer are a quick test", least=12)
    width: int = flag(128, "hidden size; tests/base has 64, and two layers", least=8)
    layers: int = flag(4, "layers", least=1)
    threads: int = flag(1, "CPU threads; more gain little", least=1)


def builtin_tokenizer():
    """A token for each word, number and sign of the built-in task and of the star graph.

    "Mia had 5 cups" is four tokens. Spaces separate tokens and are none themselves.
    """
    words = "<eos> \n + - = #### , . ? | / > had How many now".split(" ")
    words += NAMES + THINGS
    for verbs in VERBS.values():
        words += verbs
    words += [str(number) for number in range(LARGEST + 1)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    signs = tokenizers.Regex(r"[\n,.?|/=>]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(signs, "isolated")]
    )
    # The decoder puts a space between two tokens, but none beside a newline or before a comma.
    newline = decoders.Replace(tokenizers.Regex(r" ?\n ?"), "\n")
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="@@"), decoders.Fuse(), newline]
    )
    return Tokenizer(tokenizer, eos_id=vocabulary["<eos>"])


def small_llama(tokenizer, width, layers):
    """A Llama of random weights: 813,000 at the default size."""
    hf = dict(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id,
    )
    return GPT(Config.from_hf(hf))


def main():
    flags = parse_flags(BaseFlags, __doc__)
    torch.manual_seed(0)
    torch.set_num_threads(flags.threads)
    # small micro-batches, as each holds problems of nearly one length
    c = resolve(TrainFlags(out=flags.out, batch=64, lr=2e-3, micro_tokens=1024))
    tokenizer = builtin_tokenizer()
    policy = Policy(small_llama(tokenizer, flags.width, flags.layers), tokenizer, c.prompt)
    problems = []
    for steps in (1, 2, 3):
        for distractors in (0, 1, 2, 3):
            world = dict(spurious=0.0, steps=steps, distractors=distractors)
            problems += load_problems("arithmetic", "train", flags.problems // 12, 1000, **world)
    examples = [Example(p.id, policy.prompt(p), policy.solution(p)) for p in problems]
    fit(policy, examples, nll, c, "model", epochs=1.0, lr=c.lr)


if __name__ == "__main__":
    run_program(main)

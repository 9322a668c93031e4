"""Make the tiny models of this folder and the answers that transformers gives for them.

    python tests/golden/make_golden.py              # all of them
    python tests/golden/make_golden.py llama3 qwen2 # only these: the others keep their bytes

This needs transformers; the tests need only what it leaves behind. Each folder holds config.json,
model.safetensors (bf16; both sides compute in fp32) and golden.safetensors: ids (R, T) of mixed
lengths padded on the right with 0, lengths (R,), logits (R, T, V) of each row run alone, zero
where padded, and greedy (R, 12), the continuation of each row. Weights are wide, biases and norms
random, so that no wrong angle, mask or scale can hide in a small difference.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GPT2 = dict(vocab_size=72, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=2)
GPT2_SCALED = GPT2 | dict(
    n_inner=40,
    activation_function="relu",
    scale_attn_weights=False,
    tie_word_embeddings=False,
    scale_attn_by_inverse_layer_idx=True,
    layer_norm_epsilon=1e-3,
)
LLAMA = dict(
    vocab_size=72,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
LLAMA3 = LLAMA | dict(
    num_key_value_heads=2,
    head_dim=12,
    rope_parameters=LLAMA3_ROPE,
    tie_word_embeddings=True,
    eos_token_id=[2, 3],
)
BIASES = dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")
SOME_WINDOWS = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
# A model's seed is its place in this list: add new ones at the end.
MODELS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-scaled": ("gpt2", GPT2_SCALED),
    "llama": ("llama", LLAMA | dict(rms_norm_eps=1e-3)),
    "llama-linear": ("llama", LLAMA | dict(rope_parameters=LINEAR_ROPE)),
    "llama3": ("llama", LLAMA3),
    "llama-bias": ("llama", LLAMA | BIASES),
    "mistral": ("mistral", LLAMA | dict(num_key_value_heads=2, sliding_window=5)),
    "qwen2": ("qwen2", LLAMA | dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2-window": ("qwen2", LLAMA | SOME_WINDOWS | dict(num_key_value_heads=2)),
    "qwen3": ("qwen3", LLAMA | dict(num_key_value_heads=2, head_dim=16, attention_bias=True)),
}
LENGTHS = (13, 4, 1, 9)
STEPS = 12


def make_model(family, options):
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            wide = 0.3 * torch.randn_like(weight)
        elif "bias" in name:
            wide = 0.4 * torch.randn_like(weight)
        else:
            wide = 1 + 0.4 * torch.randn_like(weight)
        weight.data = wide.bfloat16().float()
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def make_answers(model):
    """The tensors of golden.safetensors, and the smallest margin of a greedy choice."""
    vocab_size = model.config.vocab_size
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    logits = torch.zeros(*ids.shape, vocab_size)
    greedy = torch.zeros(len(LENGTHS), STEPS, dtype=torch.long)
    smallest = torch.inf
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(vocab_size, (length,))
        text = ids[row : row + 1, :length]
        logits[row, :length] = model(text, use_cache=False).logits[0]
        for step in range(STEPS):
            last = model(text, use_cache=False).logits[0, -1]
            best = last.topk(2).values
            smallest = min(smallest, (best[0] - best[1]).item())
            greedy[row, step] = last.argmax()
            text = torch.cat((text, greedy[row, step].view(1, 1)), 1)
    lengths = torch.tensor(LENGTHS)
    return dict(ids=ids, lengths=lengths, logits=logits, greedy=greedy), smallest


def main():
    parser = argparse.ArgumentParser(description="Make the golden models.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}; all if none is named")
    names = parser.parse_args().names
    unknown = set(names) - set(MODELS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for seed, (name, (family, options)) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        torch.manual_seed(seed)
        folder = Path(__file__).parent / name
        model = make_model(family, options)
        answers, margin = make_answers(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(answers, folder / "golden.safetensors")
        spread = answers["logits"][0].std()
        print(f"{name}: logits' spread {spread:.2f}, smallest margin of a greedy step {margin:.4f}")


if __name__ == "__main__":
    main()

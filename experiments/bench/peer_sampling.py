"""transformers' `generate`, as a worker of sampling.py. Runs under an interpreter that has it."""

import json
import sys
import time

import torch
import transformers

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
device = job["device"]
model = transformers.AutoModelForCausalLM.from_pretrained(
    job["model"], dtype=getattr(torch, job["dtype"])
)
model.to(device)

longest = max(len(prompt) for prompt in job["prompts"])
ids = []
mask = []
for prompt in job["prompts"]:
    padding = longest - len(prompt)
    ids.append([0] * padding + prompt)
    mask.append([0] * padding + [1] * len(prompt))
ids = torch.tensor(ids, device=device).repeat_interleave(job["n"], 0)
mask = torch.tensor(mask, device=device).repeat_interleave(job["n"], 0)

how = dict(do_sample=False)
if job["temperature"]:
    how = dict(do_sample=True, temperature=job["temperature"], top_k=0, top_p=1.0)


def run(new_tokens):
    least = new_tokens if job["temperature"] else 0  # for speed all tokens are made
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=least,
        pad_token_id=job["eos"],
        eos_token_id=job["eos"],
        **how,
    ).cpu()


run(2)
began = time.monotonic()
out = run(job["new"])
seconds = time.monotonic() - began
tokens = out[:: job["n"], longest:].tolist()
print(json.dumps(dict(seconds=seconds, tokens=tokens, version=transformers.__version__)))

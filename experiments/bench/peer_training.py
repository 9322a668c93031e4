"""The training steps of trl's trainers, written out on transformers, as a worker of training.py.

SFT gives the labels to the model. DPO runs both sides through the policy and, without gradient,
through a frozen copy. Runs under an interpreter that has transformers.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
import transformers

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
device = job["device"]
prompt = job["prompt"]
rows = torch.tensor(job["rows"], device=device)


def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model.to(device)


def response_logps(model):
    logits = model(rows).logits[:, prompt - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, rows[:, prompt:, None])[..., 0].sum(-1)


def loss():
    if job["step"] == "sft":
        return model(rows, labels=rows).loss
    with torch.no_grad():
        reference = response_logps(frozen)
    chosen, rejected = (response_logps(model) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


model = load().train()
if job["step"] == "dpo":
    frozen = load().eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
half = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=job["dtype"] == "bfloat16")
seconds = []
for _ in range(job["steps"] + 1):
    began = time.monotonic()
    with half:
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value.item()  # waits for a GPU
    seconds.append(time.monotonic() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
if device.startswith("cuda"):
    peak = torch.cuda.max_memory_allocated() / 2**30
result = dict(seconds=seconds[1:], peak=peak, version=transformers.__version__)
print(json.dumps(result))

"""A real language model (SmolLM2-135M): (a) the built-in problems in plain English, (b) GSM8K; SFT, pos and neg.

    python experiments/smollm.py --budget cpu --model SmolLM2-135M
    python experiments/smollm.py --budget cpu --model SmolLM2-135M --train gsm8k_train.jsonl --test gsm8k_test.jsonl

Every cell is one run of `train.py`, so its folder holds all that such a run writes. The model was pretrained by others
on text at large. Nothing here was tuned. Without --model, the smoke budget takes experiments/base.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lab import LabConfig, bits, figure, interval, multiplier, publish, read, resampled, sweep

from rollout import UsageError, entry, flag, parse, read_rows
from train import BASE, TrainConfig, resolve, run

COMMON = dict(lr=1e-4, neg_lr=1e-5, batch=8, micro_tokens=2048, sft_epochs=4.0, generator_epochs=4.0, pos_epochs=4.0,
              neg_epochs=2.0, samples=8, negatives=2, rollouts=4, keep=2)  # fmt: skip
BUDGETS = {
    "smoke": dict(sizes=[8, 16], seeds=1, arithmetic=dict(test_limit=12, steps=2, distractors=1, max_new_tokens=32),
                  file=dict(limit=8, test_limit=6, max_new_tokens=24), threads=1, dtype="float32"),
    "cpu": dict(sizes=[8, 16, 32, 64], seeds=1, arithmetic=dict(
        test_limit=100, steps=2, distractors=1, max_new_tokens=48, eval_samples=0),
        file=dict(limit=64, test_limit=100, max_new_tokens=128, eval_samples=5), threads=2, dtype="bfloat16"),
    "gpu": dict(sizes=[100, 200, 400, 800, 1600], seeds=3, arithmetic=dict(
        test_limit=1000, steps=4, distractors=2, max_new_tokens=96, eval_samples=5),
        file=dict(limit=0, test_limit=0, max_new_tokens=256, eval_samples=5), threads=0, dtype="bfloat16"),
}  # fmt: skip


@dataclass
class SmolConfig(LabConfig):
    model: str = flag("", "Hugging Face folder of the model")
    train: str = flag("", "JSONL of problems with solutions; empty = the built-in problems")
    test: str = flag("", "JSONL of test problems, with --train")


def cell(folder, seed, size, model, data, test, flags):
    """One run of train.py, and of its folder what a claim needs."""
    flags = COMMON | flags | dict(mode="neg", out=str(folder), seed=seed, model=model, limit=size)
    c = resolve(TrainConfig(**flags, **(dict(data=data, test_data=test) if data else {})))
    run(c)
    results, values = read(folder / "results.json"), read_rows(folder / "values.jsonl")
    samples = [s for row in read_rows(folder / "rollouts.jsonl") for s in row["samples"]]
    arms = {name: {k: v for k, v in r.items() if k not in ("correct", "interval", "problems")}
            | {"correct": "".join("01"[x] for x in r["correct"])} for name, r in results.items()}  # fmt: skip
    before = [row["values"][row["pit"] - 1] for row in values if not row["correct"]]
    kept = {k: str(v) for k, v in vars(c).items() if k not in ("out", "model", "data", "test_data")}  # no paths
    false = float(np.mean([(1 - q) ** c.rollouts for q in before])) if before else None
    return dict(seed=seed, size=size, arms=arms, config=kept, false_pits_at_most=false, pits=len(before),
                generator_right=float(np.mean([s["correct"] for s in samples])),
                tokens_sampled=sum(len(s["ids"]) for s in samples), pairs=len(read_rows(folder / "pairs.jsonl")))


def main():
    c = parse(SmolConfig, __doc__)
    b, task = BUDGETS[c.budget], "file" if c.train else "arithmetic"
    if not c.model and c.budget != "smoke":
        raise UsageError("--model is missing; expected a Hugging Face folder of SmolLM2-135M; name one")
    sizes = [b["file"]["limit"]] if c.train else b["sizes"]
    name = "smollm" if not c.train else "smollm-gsm8k"
    flags = {k: v for k, v in b[task].items() if k != "limit"} | dict(threads=b["threads"], dtype=b["dtype"])
    c.jobs = 1  # a model of this size has use for all cores
    cells = sweep(c, name, cell, [(seed, size) for seed in range(b["seeds"]) for size in sizes], data=c.train,
                  model=str(Path(c.model or BASE).resolve()), test=c.test, flags=flags)  # fmt: skip
    verdicts = defaultdict(list)
    for (_, size), result in cells.items():
        for arm, record in result["arms"].items():
            verdicts[arm, size].append(bits(record["correct"]))
    error = resampled({key: np.array(v) for key, v in verdicts.items() if len(v) == b["seeds"]})
    summary = defaultdict(dict)
    for (arm, size), e in error.items():
        summary[arm][size] = dict(error=[float(e[0]), *interval(e[1:])])
        if arm != "sft" and len(sizes) > 1:
            curve = np.array([error["sft", n] for n in sizes]).T
            read_off = [multiplier(sizes, curve[i], size, e[i]) for i in range(len(e))]
            summary[arm][size] |= dict(multiplier=[read_off[0][0], *interval([m for m, _ in read_off[1:]])],
                                       at_least=read_off[0][1])  # fmt: skip
    rows = [dict(seed=r["seed"], size=r["size"], arm=arm, **{k: v for k, v in a.items() if k != "correct"},
                 **{k: r[k] for k in ("generator_right", "pits", "pairs", "tokens_sampled", "false_pits_at_most")})
            for r in cells.values() for arm, a in r["arms"].items()]  # fmt: skip
    stem = publish(c, name, cells, summary, rows)
    if len(sizes) > 1:
        figure(stem, [lambda axis: panel(axis, summary)])
    for arm, records in summary.items():
        print(f"{arm:4} error " + "  ".join(
            f"{n}: {r['error'][0]:.3f} [{r['error'][1]:.3f}, {r['error'][2]:.3f}]" + (
                f" ({'>=' if r['at_least'] else ''}{r['multiplier'][0]:.1f}x)" if "multiplier" in r else "")
            for n, r in records.items()))  # fmt: skip


def panel(axis, summary):
    for (arm, records), colour in zip(summary.items(), ("#777777", "#2b7bba", "#d1495b"), strict=False):
        errors = np.array([r["error"] for r in records.values()])
        axis.plot(list(records), errors[:, 0], "o-", ms=3, color=colour, label=arm)
        axis.fill_between(list(records), errors[:, 1], errors[:, 2], color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="training problems |D|", ylabel="test error (greedy)", title="SmolLM2-135M")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    entry(main)

"""A real language model (SmolLM2-135M): (a) the built-in problems in plain English, (b) GSM8K; SFT, pos and neg.

    python experiments/smollm.py --budget cpu --model SmolLM2-135M
    python experiments/smollm.py --budget cpu --model SmolLM2-135M --train gsm8k_train.jsonl --test gsm8k_test.jsonl

Every cell is one run of `train.py`, so its folder holds all that such a run writes; `more` sizes are SFT alone, so that
there is a curve on which to read the multipliers off. All test problems get a greedy answer; of a file the first
`sampled` (0: all) get pass@5 too, which costs five times as much. The model was pretrained by others on text at large.
World, learning rates and epochs of (a) were chosen with seed 0 and 64 problems on the validation split; nothing was
tuned on (b). Without --model, the smoke budget takes experiments/base.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lab import LabConfig, bits, figure, interval, multiplier, publish, read, resampled, sweep

from evaluate import evaluate
from rollout import UsageError, entry, flag, load_policy, parse, read_rows
from train import BASE, TrainConfig, load_data, resolve, run

COMMON = dict(batch=8, micro_tokens=2048, pos_epochs=4.0, neg_epochs=2.0, samples=8, negatives=2, rollouts=4, keep=2,
              eval_samples=0)  # fmt: skip
WORDS = dict(steps=1, distractors=1, max_new_tokens=48, lr=2e-4, neg_lr=5e-6, sft_epochs=8.0, generator_epochs=3.0)
FILE = dict(lr=1e-4, neg_lr=1e-5, sft_epochs=4.0, generator_epochs=4.0)
BUDGETS = {
    "smoke": dict(sizes=[8, 16], more=[32], seeds=1, words=WORDS | dict(test_limit=12, max_new_tokens=32),
                  file=FILE | dict(limit=8, test_limit=6, max_new_tokens=24),
                  sampled=3, file_seeds=1, jobs=1, threads=1, dtype="float32"),
    "cpu": dict(sizes=[12, 24, 48, 96], more=[192], seeds=3, words=WORDS | dict(test_limit=200),
                file=FILE | dict(limit=128, test_limit=0, max_new_tokens=128),
                sampled=400, file_seeds=1, jobs=2, threads=2, dtype="bfloat16"),
    "gpu": dict(sizes=[50, 100, 200, 400, 800], more=[1600], seeds=3, words=WORDS | dict(steps=2, test_limit=1000),
                file=FILE | dict(limit=0, test_limit=0, max_new_tokens=256),
                sampled=0, file_seeds=3, jobs=1, threads=0, dtype="bfloat16"),
}  # fmt: skip


@dataclass
class SmolConfig(LabConfig):
    model: str = flag("", "Hugging Face folder of the model")
    train: str = flag("", "JSONL of problems with solutions; empty = the built-in problems")
    test: str = flag("", "JSONL of test problems, with --train")


def cell(folder, seed, size, model, data, test, more, flags, sampled):
    """One run of train.py, and of its folder what a claim needs."""
    mode = "sft" if size in more else "neg"
    flags = COMMON | flags | dict(mode=mode, out=str(folder), seed=seed, model=model, limit=size)
    c = resolve(TrainConfig(**flags, **(dict(data=data, test_data=test) if data else {})))
    run(c)
    results = read(folder / "results.json")
    if data:
        problems = load_data(c)[1][: sampled or None]
        how = dict(samples=5, max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed)
        for name in results:
            some = evaluate(load_policy(folder / name, c), problems, folder / name / "eval", **how)
            results[name] |= {"sampled": some["problems"]} | {key: v for key, v in some.items() if "@" in key}
    arms = {name: {k: v for k, v in r.items() if k not in ("correct", "interval", "problems")}
            | {"correct": "".join("01"[x] for x in r["correct"])} for name, r in results.items()}  # fmt: skip
    kept = {k: str(v) for k, v in vars(c).items() if k not in ("out", "model", "data", "test_data")}  # no paths
    record = dict(seed=seed, size=size, arms=arms, config=kept)
    if mode == "sft":
        return record
    values = read_rows(folder / "values.jsonl")
    samples = [s for row in read_rows(folder / "rollouts.jsonl") for s in row["samples"]]
    before = [row["values"][row["pit"] - 1] for row in values if not row["correct"]]
    false = float(np.mean([(1 - q) ** c.rollouts for q in before])) if before else None
    return record | dict(
        false_pits_at_most=false, pits=len(before), generator_right=float(np.mean([s["correct"] for s in samples])),
        tokens_sampled=sum(len(s["ids"]) for s in samples), pairs=len(read_rows(folder / "pairs.jsonl")))  # fmt: skip


def main():
    c = parse(SmolConfig, __doc__)
    b, task = BUDGETS[c.budget], "file" if c.train else "words"
    if not c.model and c.budget != "smoke":
        raise UsageError("--model is missing; expected a Hugging Face folder of SmolLM2-135M; name one")
    sizes, more = ([b["file"]["limit"]], []) if c.train else (b["sizes"], b["more"])
    seeds = b["file_seeds"] if c.train else b["seeds"]
    name = "smollm" if not c.train else "smollm-gsm8k"
    keys = [(seed, size) for size in sorted(sizes + more, reverse=True) for seed in range(seeds)]
    c.jobs = min(c.jobs or b["jobs"], len(keys))
    flags = {k: v for k, v in b[task].items() if k != "limit"} | dict(dtype=b["dtype"], threads=b["threads"] // c.jobs)
    cells = sweep(c, name, cell, keys, model=str(Path(c.model or BASE).resolve()), data=c.train, test=c.test, more=more,
                  flags=flags, sampled=b["sampled"])  # fmt: skip
    verdicts = defaultdict(list)
    for (_, size), result in cells.items():
        for arm, record in result["arms"].items():
            verdicts[arm, size].append(bits(record["correct"]))
    error = resampled({key: np.array(v) for key, v in verdicts.items() if len(v) == seeds})
    summary, ladder = defaultdict(dict), sorted(sizes + more)
    for (arm, size), e in sorted(error.items(), key=lambda item: item[0][1]):
        summary[arm][size] = record = dict(error=[float(e[0]), *interval(e[1:])])
        for other in {"sft": [], "pos": ["sft"], "neg": ["sft", "pos"]}[arm]:
            gain = error[other, size] - e
            record[f"ahead_of_{other}"] = [float(gain[0]), *interval(gain[1:])]
        if arm != "sft" and len(ladder) > 1:
            curve = np.array([error["sft", n] for n in ladder]).T
            read_off = [multiplier(ladder, curve[i], size, e[i]) for i in range(len(e))]
            record |= dict(multiplier=[read_off[0][0], *interval([m for m, _ in read_off[1:]])],
                           at_least=read_off[0][1])  # fmt: skip
    told = ("generator_right", "pits", "pairs", "tokens_sampled", "false_pits_at_most")
    rows = [dict(seed=r["seed"], size=r["size"], arm=arm, **{k: v for k, v in a.items() if k != "correct"},
                 **{k: r.get(k, "") for k in told})
            for r in cells.values() for arm, a in r["arms"].items()]  # fmt: skip
    stem = publish(c, name, cells, summary, rows)
    if len(ladder) > 1:
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

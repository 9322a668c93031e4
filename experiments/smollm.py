r"""A real language model (SmolLM2-135M): SFT, pos and neg.

    python experiments/smollm.py --budget cpu --model SmolLM2-135M
    python experiments/smollm.py --budget cpu --model SmolLM2-135M --train gsm8k_train.jsonl \
        --test gsm8k_test.jsonl

(a) The built-in problems in plain English. Larger sizes are SFT alone, for a curve on which to read
    off how much data an arm is worth.
(b) Problems of a file, GSM8K. All test problems get a greedy answer, the first `sampled` (0: all)
    pass@5, too, which costs five times as much.

Every cell is one run of train.py, so its folder holds all that such a run writes. World, learning
rates and epochs of (a) were chosen with seed 0 and 64 problems on the validation split; nothing was
tuned on (b). Without --model the smoke budget takes experiments/base.
"""

from dataclasses import dataclass
from pathlib import Path

from lab import LabFlags, data_worth, errors_by_size, figure, plot_errors, publish, share, sweep
from lab import with_interval, without_verdicts, worth_text

from data import BASE, UserError, flag, parse_flags, read_json, read_rows
from evaluate import evaluate
from rollout import load_policy, run_program
from train import TrainFlags, generator_folder, load_data, resolve, run

COMMON = dict(
    batch=8,
    micro_tokens=2048,
    pos_epochs=4.0,
    neg_epochs=2.0,
    samples=8,
    negatives=2,
    rollouts=4,
    keep=2,
    eval_samples=0,
)
WORDS = dict(
    steps=1,
    distractors=1,
    max_new_tokens=48,
    lr=2e-4,
    neg_lr=5e-6,
    sft_epochs=8.0,
    generator_epochs=3.0,
)
FILE = dict(lr=1e-4, neg_lr=1e-5, sft_epochs=4.0, generator_epochs=4.0)
BUDGETS = {
    "smoke": dict(
        words=WORDS | dict(steps=3, test_limit=12),  # flags of (a)
        sizes=[8, 16],
        more=[32],  # of SFT alone
        seeds=1,
        file=FILE | dict(test_limit=6, max_new_tokens=24),  # flags of (b)
        file_size=8,
        file_seeds=1,
        sampled=3,
        jobs=1,
        threads=1,
        dtype="float32",
    ),
    "cpu": dict(
        words=WORDS | dict(test_limit=200),
        sizes=[12, 24, 48, 96],
        more=[192],
        seeds=3,
        file=FILE | dict(test_limit=0, max_new_tokens=128),
        file_size=128,
        file_seeds=1,
        sampled=400,
        jobs=2,
        threads=2,
        dtype="bfloat16",
    ),
    "gpu": dict(
        words=WORDS | dict(steps=2, test_limit=1000),
        sizes=[50, 100, 200, 400, 800],
        more=[1600],
        seeds=3,
        file=FILE | dict(test_limit=0, max_new_tokens=256),
        file_size=0,
        file_seeds=3,
        sampled=0,
        jobs=1,
        threads=0,
        dtype="bfloat16",
    ),
}


@dataclass
class SmolFlags(LabFlags):
    model: str = flag("", "Hugging Face folder of the model")
    train: str = flag("", "JSONL of problems with solutions; empty = the built-in problems")
    test: str = flag("", "JSONL of test problems, with --train")


def work(folder, seed, size, more, sampled, flags):
    """One run of train.py, and what a claim needs of its folder."""
    mode = "sft" if size in more else "neg"
    flags = COMMON | flags
    c = resolve(TrainFlags(mode=mode, out=str(folder), seed=seed, limit=size, **flags))
    run(c)
    arms = {}
    for arm, result in read_json(folder / "results.json").items():
        record = {key: result[key] for key in ("accuracy", "ended", "tokens")}
        if "spurious" in result:
            record["spurious"] = result["spurious"]
        record["correct"] = "".join("01"[correct] for correct in result["correct"])
        arms[arm] = record
    if c.data != "arithmetic":
        problems = load_data(c)[1][: sampled or None]
        for arm in arms:
            arms[arm] |= pass_at_5(load_policy(folder / arm, c), problems, folder / arm / "eval")
    paths = ("out", "model", "data", "test_data")
    config = {key: str(value) for key, value in vars(c).items() if key not in paths}
    cell = dict(seed=seed, size=size, arms=arms, config=config)
    if mode == "neg":
        cell |= what_pairs_rest_on(c)
    return cell


def pass_at_5(policy, problems, folder):
    result = evaluate(policy, problems, folder, samples=5)
    rates = {key: value for key, value in result.items() if "@" in key}
    return dict(sampled=len(problems)) | rates


def what_pairs_rest_on(c):
    """How often the policies that are sampled are right, and how sure the pits of pos are."""
    pos = Path(c.out) / "pos"
    generator_samples = all_samples(generator_folder(c))
    pos_samples = all_samples(pos)
    asked = read_rows(pos / "pits.jsonl")
    kept = None
    if asked:
        kept = share([row["correct"] == 0 for row in asked])
    return dict(
        generator_right=share([s["correct"] for s in generator_samples]),
        pos_right=share([s["correct"] for s in pos_samples]),
        tokens_sampled=sum(len(s["ids"]) for s in generator_samples + pos_samples),
        pits=len(read_rows(pos / "values.jsonl")),
        pairs=len(read_rows(pos / "pairs.jsonl")),
        pits_that_keep_q_0=kept,
    )


def all_samples(folder):
    samples = []
    for row in read_rows(folder / "samples.jsonl"):
        samples += row["samples"]
    return samples


# ---------------------------------------------------------------- summary


def summarise(cells, sizes):
    """Test errors {arm: {size: ...}}, how far each arm is ahead of those before it, and how much
    its data is worth; all with bootstrap intervals."""
    errors = errors_by_size(cells)
    summary = {}
    for arm, size in sorted(errors, key=lambda key: key[1]):
        error = errors[arm, size]
        record = dict(error=with_interval(error))
        for other in {"sft": [], "pos": ["sft"], "neg": ["sft", "pos"]}[arm]:
            record[f"ahead_of_{other}"] = with_interval(errors[other, size] - error)
        if arm != "sft" and len(sizes) > 1:
            record |= data_worth(errors, sizes, arm, size)
        summary.setdefault(arm, {})[size] = record
    return summary


def csv_rows(cells):
    facts = "generator_right pos_right pits pairs tokens_sampled pits_that_keep_q_0".split()
    rows = []
    for cell in cells:
        of_cell = {key: cell[key] for key in facts if key in cell}
        for arm, record in cell["arms"].items():
            row = dict(seed=cell["seed"], size=cell["size"], arm=arm)
            rows.append(row | without_verdicts(record) | of_cell)
    return rows


def main():
    c = parse_flags(SmolFlags, __doc__)
    b = BUDGETS[c.budget]
    if not c.model and c.budget != "smoke":
        raise UserError("--model is missing: it names a Hugging Face folder of SmolLM2-135M")
    flags = dict(model=str(Path(c.model or BASE).resolve()), dtype=b["dtype"])
    if c.train:
        name = "smollm-gsm8k"
        flags |= b["file"] | dict(data=c.train, test_data=c.test)
        sizes = [b["file_size"]]
        more = []
        seeds = b["file_seeds"]
    else:
        name = "smollm"
        flags |= b["words"]
        sizes = b["sizes"]
        more = b["more"]
        seeds = b["seeds"]
    ladder = sizes + more
    keys = [(seed, size) for size in reversed(ladder) for seed in range(seeds)]
    c.jobs = min(c.jobs or b["jobs"], len(keys))
    flags["threads"] = b["threads"] // c.jobs
    cells = sweep(c, name, work, keys, more=more, sampled=b["sampled"], flags=flags)
    summary = summarise(cells.values(), ladder)
    stem = publish(c, name, cells, summary, csv_rows(cells.values()))
    if len(ladder) > 1:
        figure(stem, [lambda axis: panel(axis, summary)])
    for arm, records in summary.items():
        line = f"{arm:4} error"
        for size, record in records.items():
            error, low, high = record["error"]
            line += f"  {size}: {error:.3f} [{low:.3f}, {high:.3f}] {worth_text(record)}"
        print(line)


def panel(axis, summary):
    colours = dict(sft="#777777", pos="#2b7bba", neg="#d1495b")
    for arm, records in summary.items():
        plot_errors(axis, records, colours[arm], arm)
    axis.set_title("SmolLM2-135M")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_program(main)

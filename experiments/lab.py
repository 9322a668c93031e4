"""What the experiments share: budgets, cells that train and judge models in a folder, spread, results on disk, figures.

A cell is one training set: its size, its seed, its world. It goes through the stages of `train.py` by the same public
functions, keeps every model in its folder and finishes with one JSON file; a killed sweep goes on from those files.
Everything that a claim rests on (per-problem verdicts, seeds, configuration) ends up in experiments/results/NAME.json.
"""

import csv
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load_problems
from evaluate import evaluate
from rollout import claim, flag, load_policy, provenance, read_rows, sample, write_json
from train import TrainConfig, drawing, example, fit, negatives, own_positives, resolve

RESULTS = Path(__file__).parent / "results"


@dataclass
class LabConfig:
    budget: str = flag("cpu", "smoke (seconds: does the path work), cpu (two cores) or gpu", choices="smoke cpu gpu")
    out: str = flag("", "folder of the runs; empty = runs/experiments/NAME-BUDGET")
    jobs: int = flag(0, "cells side by side; 0 = one per core, four on a GPU")


class Cell:
    """One training set with all that is trained on it. Arms are folders; what is there is not made again."""

    def __init__(self, folder, *, test=1000, val=400, **flags):
        self.folder, self.c = Path(folder), resolve(TrainConfig(mode="neg", threads=1, test_limit=test, **flags))
        c, world = self.c, dict(spurious=self.c.spurious, steps=self.c.steps, distractors=self.c.distractors)
        claim(c, self.folder / "config.json")
        self.train = load_problems(c.data, "train", c.limit, c.seed, **world)
        self.splits = {split: load_problems(c.data, split, n, **world) for split, n in (("val", val), ("test", test))}
        self.by_id = {p.id: p for p in self.train}
        policy = self.policy(c.model)
        self.encoder = policy
        self.teacher = [self.example(p, p.solution) for p in self.train]

    def example(self, problem, text):
        tokenizer = self.encoder.tokenizer
        return example(self.encoder, problem, tokenizer.encode(text) + [tokenizer.eos_id])

    def policy(self, name, train=False, **changes):
        folder = self.folder / name if (self.folder / name).exists() else name
        return load_policy(folder, replace(self.c, **changes), train=train)

    def fit(self, name, start, examples=(), pairs=(), *, epochs, lr=None, **changes):
        """Train arm `name` from arm (or model folder) `start`; returns its optimizer steps."""
        c = replace(self.c, **changes)
        if not (self.folder / name / "model.safetensors").exists():
            policy = self.policy(start, train=True, **changes)
            fit(policy, self.folder / name, self.folder / "metrics.csv", list(examples), list(pairs), c, epochs=epochs,
                lr=lr or (c.neg_lr if pairs else c.lr))  # fmt: skip
        n = len(pairs) if pairs and not c.nll else len(examples)
        return max(1, round(epochs * n / c.batch))

    def accuracy(self, name, split="val"):
        return self.judge(name, split)["accuracy"]

    def judge(self, name, split="test", samples=0):
        """The arm's record: accuracy, spurious steps, pass@5, and a 0 or 1 per problem."""
        c, folder = self.c, self.folder / name / split
        r = evaluate(self.policy(name), self.splits[split], folder, samples=samples, ks=(5,), seed=c.seed,
                     max_new_tokens=c.max_new_tokens, temperature=c.temperature)  # fmt: skip
        keep = ("accuracy", "spurious", "ended", "pass@5", "maj@5")  # spurious steps: where their truth is known
        return {k: round(r[k], 4) for k in keep if k in r} | {"correct": "".join("01"[x] for x in r["correct"])}

    def draw(self, name, i=0, into="", **changes):
        """Rollouts of arm `name` on its own training problems, by round i's random streams: (rows, tokens drawn)."""
        c, folder = replace(self.c, **changes), self.folder / (into or f"from-{name}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = sample(self.policy(name), self.train, folder / "rollouts.jsonl", n=c.samples, **drawing(c, i))
        return rows, sum(len(s["ids"]) for row in rows.values() for s in row["samples"])

    def learn(self, name, rows, i=0, into="", **changes):
        """What the per-step loss learns from rollouts of arm `name`: (weighted examples, pairs, tokens drawn)."""
        c, policy = replace(self.c, **changes), self.policy(name)
        folder = self.folder / (into or f"from-{name}")
        folder.mkdir(exist_ok=True)
        examples, pairs = negatives(policy, self.by_id, rows, folder, c, i)
        if policy.stats:  # a second call finds the values on disk and draws nothing
            write_json(folder / "tokens.json", policy.stats)
        return examples, pairs, int(read(folder / "tokens.json").get("decoded", 0))

    def values(self, name, into=""):
        """The rows of values.jsonl of arm `name`'s solutions."""
        return read_rows(self.folder / (into or f"from-{name}") / "values.jsonl")

    def pit_steps(self, name):
        """{problem id: the steps, as text, at which its wrong solutions lost their value}."""
        steps = {}
        for row in self.values(name):
            start, end = ([0] + row["ends"])[row["pit"] - 1 : row["pit"] + 1]
            text = self.encoder.text(row["ids"][start:end]).strip("\n")
            if not row["correct"] and "####" not in text:
                steps.setdefault(row["id"], []).append(text)
        return steps

    def positives(self, rows, keep=4):
        return own_positives(self.encoder, self.train, rows, keep)


def read(path):
    return json.loads(Path(path).read_text("utf-8")) if Path(path).exists() else {}


def choose(cell, arm, candidates, make):
    """Train an arm once per candidate, keep the one that is best on the validation split: (candidate, its name)."""
    names = {value: f"{arm}-{value:g}" for value in candidates}
    for value, name in names.items():
        make(name, value)
    if len(names) == 1:
        return next(iter(names.items()))
    return max(names.items(), key=lambda item: cell.accuracy(item[1]))


# ---------------------------------------------------------------- many cells


def sweep(c, name, work, keys, **shared):
    """{key: work(folder, *key, **shared)} for every key, some side by side; a result on disk is not made again."""
    root = Path(c.out or f"runs/experiments/{name}-{c.budget}")
    jobs = c.jobs or (4 if c.budget == "gpu" else os.cpu_count() or 1)
    results, began = {}, time.monotonic()
    folders = {key: root / "-".join(map(str, key)) for key in keys}
    todo = [key for key in keys if not (folders[key] / "cell.json").exists()]

    def tell(done, key):
        minutes = (time.monotonic() - began) / 60
        print(f"{name}: {done} of {len(todo)} cells, {key} at {minutes:.1f} min", file=sys.stderr)

    if jobs == 1:
        for done, key in enumerate(todo, 1):
            one(work, folders[key], key, shared)
            tell(done, key)
    else:  # spawn: a forked process would share the parent's half-started threads
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(one, work, folders[key], key, shared): key for key in todo}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                tell(done, futures[future])
    for key in keys:
        results[key] = read(folders[key] / "cell.json")
    return results


def one(work, folder, key, shared):
    """A cell, in a process of its own where several run side by side; what it prints goes to its log."""
    import torch

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(folder / "log.txt", "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        result = work(folder, *key, **shared)
    write_json(folder / "cell.json", result | {"seconds": round(time.monotonic() - began, 1)} | provenance())


# ---------------------------------------------------------------- spread


def bits(text):
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def interval(draws, level=0.95):
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def resampled(verdicts, seed=0, draws=1000):
    """verdicts {key: 0/1 (seeds, problems)} -> {key: error rates (1 + draws,)}: first as measured, then bootstrapped.

    A draw takes seeds with replacement and problems with replacement, the same for every key: arms are paired."""
    rng, (seeds, problems) = np.random.default_rng(seed), next(iter(verdicts.values())).shape
    out = {key: [1 - v.mean()] for key, v in verdicts.items()}
    for _ in range(draws):
        s, p = rng.integers(seeds, size=seeds), rng.integers(problems, size=problems)
        for key, v in verdicts.items():
            out[key].append(1 - v[s][:, p].mean())
    return {key: np.array(v) for key, v in out.items()}


def slope(sizes, errors):
    """Exponent of error ~ size^slope, by least squares on the logs. errors: (sizes, draws) -> (draws,)."""
    x = np.log(sizes) - np.log(sizes).mean()
    return x @ np.log(np.maximum(errors, 1e-4)) / (x @ x)


def multiplier(sizes, errors, size, error):
    """How many times `size` SFT needs for `error`: interpolates SFT's error on logs, taken as the least error at any
    size up to each (more data is never held against SFT). Beyond the ladder its end is a lower bound:
    (multiplier, is it a bound)."""
    best = np.minimum.accumulate(errors)
    if error < best[-1]:
        return sizes[-1] / size, True
    if error >= best[0]:
        return sizes[0] / size, False
    j = int(np.argmax(best <= error))
    a, b = np.log(best[j - 1]), np.log(best[j])
    at = (a - np.log(error)) / max(a - b, 1e-9)
    return float(np.exp(np.log(sizes[j - 1]) + at * np.log(sizes[j] / sizes[j - 1]))) / size, False


def spread(values):
    """Mean and 95% interval over seeds by Student's t: [mean, low, high]."""
    values = np.asarray(values, float)
    t = {1: math.nan, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    half = t * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


# ---------------------------------------------------------------- results


def publish(c, name, cells, summary, rows):
    """NAME.json (summary and every cell), NAME.csv (rows), in experiments/results; a smoke run keeps to its folder.
    Returns the path without its ending, for the figure."""
    folder = RESULTS if c.budget != "smoke" else Path(c.out or f"runs/experiments/{name}-smoke")
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (name if c.budget != "gpu" else f"{name}-gpu")
    cells = [{"key": list(key), **cell} for key, cell in cells.items()]
    head = dict(command=f"python experiments/{Path(sys.argv[0]).name} --budget {c.budget}", **provenance(),
                summary=summary, process_seconds=round(sum(cell["seconds"] for cell in cells)))  # fmt: skip
    write_json(f"{stem}.json", head | {"cells": cells})
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return stem


def figure(stem, panels):
    """A figure of some panels, functions of an axis; without matplotlib one line says so."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install matplotlib, then run again)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis)
    fig.tight_layout()
    fig.savefig(f"{stem}.png", dpi=130)
    plt.close(fig)

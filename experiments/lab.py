"""What the experiments share: the models of one training set, sweeps over many sets, statistics.

A cell is one training set, with a size, a seed and a world. Every model trained on it is an arm: a
folder of the cell, made by the functions of train.py, with the arm's own samples and values beside
its weights. A cell ends with one JSON file, and a killed sweep goes on from what is on disk.
What a claim rests on (seeds, configuration, a 0 or 1 for each test problem) ends up in
experiments/results/NAME.json.
"""

import csv
import math
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import claim_folder, content_hash, flag, folder_hash, load_problems, provenance
from data import read_json, write_json
from evaluate import evaluate
from rollout import Example, Pair, value_steps, load_policy
from rollout import progress, sample, solutions_to_value
from train import LOSSES, TrainFlags, fit, made_by_stage, nll, own_examples, resolve
from train import teacher_examples

RESULTS = Path(__file__).parent / "results"
BEGAN = time.monotonic()


@dataclass
class LabFlags:
    budget: str = flag(
        "cpu", "seconds, two cores, or one GPU", group="run", choices=("smoke", "cpu", "gpu")
    )
    out: str = flag("", "folder of the runs; empty = runs/experiments/NAME-BUDGET")
    jobs: int = flag(0, "cells side by side; 0 = one per core, four on a GPU", least=0)
    hours: float = flag(0.0, "start no cell later than this; 0 = all of them", least=0)


# ---------------------------------------------------------------- one training set


class Cell:
    """One training set and the arms trained on it. What is on disk is not made again."""

    def __init__(self, folder, train, val, test, **flags):
        """train, val, test: lists of problems. flags: those of train.py."""
        self.folder = Path(folder)
        self.c = resolve(TrainFlags(out=str(folder), threads=1, **flags))
        trained = sorted(self.folder.glob("*/model.safetensors"))
        claim_folder(
            self.c,
            self.folder / "config.json",
            dict.fromkeys(made_by_stage(self.folder), trained),
            data_hash=("sft", content_hash(train)),
            model_hash=("sft", folder_hash(self.c.model)),
        )
        self.train = train
        self.by_id = {problem.id: problem for problem in train}
        self.splits = dict(val=val, test=test)
        self.base = load_policy(self.c.model, self.c)
        self.teacher = teacher_examples(self.base, train)
        self.arms = {}  # {arm: its record}
        self.picked = {}  # {arm: what `pick` chose, (learning rate, epochs)}
        self.names = {}  # {arm: the folder of that choice}

    def policy(self, name, i=0):
        """Arm `name`, to sample from. i: the round, which has random numbers of its own."""
        c = replace(self.c, seed=self.c.seed + 1000 * i)
        return load_policy(self.folder / name, c)

    def example(self, id, ids, weights=None):
        """A response to training problem `id` as an Example."""
        return Example(id, self.base.prompt(self.by_id[id]), ids, weights)

    def fit(self, name, start, items, *, epochs, lr=None, loss=None, **changes):
        """Train arm `name` on Examples or Pairs. Returns the number of its optimizer steps.

        start: "base", another arm, or the absolute path of a model folder. loss: if not that of
        train.py. changes: flags of this arm only.
        """
        c = replace(self.c, **changes)
        default_loss = nll
        default_lr = c.lr
        if isinstance(items[0], Pair):
            default_loss = LOSSES[c.loss]
            default_lr = c.neg_lr
        folder = self.folder / name
        if not list(folder.glob("*.safetensors")):  # neither a model nor a checkpoint of one
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "model.safetensors").exists():
            policy = load_policy(self.place(start), c, train=True)
            fit(policy, items, loss or default_loss, c, name, epochs=epochs, lr=lr or default_lr)
        return max(1, round(epochs * len(items) / c.batch))

    def arm(self, name, start, items, epochs, **changes):
        """Train an arm, and record how it does on the test split."""
        steps = self.fit(name, start, items, epochs=epochs, **changes)
        self.arms[name] = self.judge(name) | dict(steps=steps)

    def pick(self, arm, start, items, tries, **changes):
        """Train an arm with each of `tries`, pairs of (learning rate, epochs), and record the one
        that is best on validation. What `self.picked` has of the arm is taken over untried."""
        names = {}
        steps = {}
        for lr, epochs in [self.picked[arm]] if arm in self.picked else tries:
            name = f"{arm}-{lr:g}-{epochs:g}".replace(" ", "-")
            names[name] = (lr, epochs)
            steps[name] = self.fit(name, start, items, epochs=epochs, lr=lr, **changes)
        best = next(iter(names))
        if len(names) > 1:
            best = max(names, key=self.accuracy)
        self.picked[arm] = names[best]
        self.names[arm] = best
        self.arms[arm] = self.judge(best) | dict(steps=steps[best])

    def place(self, start):
        """The folder of the base, of an arm, or a folder as it is."""
        if start == "base":
            return self.c.model
        return self.folder / self.names.get(start, start)

    def accuracy(self, name, split="val"):
        return self.judge(name, split)["accuracy"]

    def judge(self, name, split="test"):
        """How an arm does: accuracy, spurious steps, pass@5, a 0 or 1 for each problem."""
        samples = 0
        if split == "test":
            samples = self.c.eval_samples
        folder = self.folder / name / split
        result = evaluate(self.policy(name), self.splits[split], folder, samples)
        record = {}
        for key in ("accuracy", "spurious", "ended", "pass@1", "pass@5"):
            if key in result:
                record[key] = round(result[key], 4)
        record["correct"] = "".join("01"[correct] for correct in result["correct"])
        return record

    def sample(self, name, i=0, n=None):
        """n solutions of each training problem by arm `name` in round i: {problem id: row}."""
        path = self.folder / name / "samples.jsonl"
        return sample(self.policy(name, i), self.train, path, n or self.c.samples)

    def positives(self, samples, keep=4):
        """D+: at most `keep` correct samples of each problem, the most diverse, as Examples."""
        return own_examples(self.base, self.train, samples, keep)

    def value(self, name, samples, i=0, *, wrong=None, correct=0, k=None, scan=None, into=""):
        """Value wrong samples of arm `name`, and so many correct ones a problem (Eq. 2).

        into: a folder within the arm's own, for values.jsonl. Returns (solutions, tokens sampled).
        """
        policy = self.policy(name, i)
        wrong = self.c.negatives if wrong is None else wrong
        solutions = solutions_to_value(policy, self.train, samples, wrong=wrong, correct=correct)
        path = self.folder / name / into / "values.jsonl"
        tokens = path.parent / "tokens.json"
        path.parent.mkdir(exist_ok=True)
        if not tokens.exists():  # what a kill left of them cost tokens that nobody counted
            path.unlink(missing_ok=True)
        k = k or self.c.rollouts
        value_steps(policy, self.by_id, solutions, path, k=k, scan=scan or self.c.scan)
        if not tokens.exists():
            write_json(tokens, dict(decoded=policy.decoded))
        return solutions, read_json(tokens)["decoded"]


def arithmetic_cell(folder, *, limit, seed, spurious=0.2, val=400, test=1000, **flags):
    """A cell of the built-in task. val, test: numbers of problems."""
    problems = load_problems("arithmetic", "train", limit, seed, spurious)
    val = load_problems("arithmetic", "val", val, spurious=spurious)
    test = load_problems("arithmetic", "test", test, spurious=spurious)
    flags = dict(eval_samples=0) | flags
    return Cell(folder, problems, val, test, limit=limit, seed=seed, spurious=spurious, **flags)


def verdicts(samples):
    """Of all samples, {problem id: row}, whether each is correct."""
    return [s["correct"] for drawn in samples.values() for s in drawn]


def count_tokens(samples):
    return sum(len(s["ids"]) for drawn in samples.values() for s in drawn)


def share(verdicts):
    return round(float(np.mean(verdicts)), 4)


# ---------------------------------------------------------------- many cells


def sweep(c, name, work, keys, **shared):
    """{key: work(folder, *key, **shared)} for every key, some side by side. The results are JSON
    objects on disk; what is there is not made again. With --hours, cells may be left out."""
    root = Path(c.out or f"runs/experiments/{name}-{c.budget}")
    folders = {key: root / "-".join(map(str, key)) for key in keys}
    todo = [key for key in keys if not (folders[key] / "cell.json").exists()]
    jobs = c.jobs or (4 if c.budget == "gpu" else os.cpu_count())
    bar = progress(name, "cell", len(keys), len(keys) - len(todo))
    until = BEGAN + c.hours * 3600 if c.hours else math.inf
    if jobs == 1:
        for key in todo:
            run_cell(work, folders[key], key, shared, until)
            bar.update()
    else:
        # spawn: a forked process would share the parent's half-started threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = [
                pool.submit(run_cell, work, folders[key], key, shared, until) for key in todo
            ]
            for future in as_completed(futures):
                future.result()
                bar.update()
    bar.close()
    cells = {key: read_json(folders[key] / "cell.json") for key in keys}
    return {key: cell for key, cell in cells.items() if cell}


def run_cell(work, folder, key, shared, until=math.inf):
    """Make one cell, if it is not too late for it. What it prints goes to its log."""
    if time.monotonic() > until:
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(folder / "log.txt", "a", buffering=1) as log:
        with redirect_stdout(log), redirect_stderr(log):
            result = work(folder, *key, **shared)
    seconds = round(time.monotonic() - began, 1)
    write_json(folder / "cell.json", result | dict(seconds=seconds) | provenance())


# ---------------------------------------------------------------- spread


def bits(text):
    """The verdicts that a record keeps as "0110...": bool (problems,)."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def interval(draws, level=0.95):
    tail = (1 - level) / 2
    return np.quantile(draws, [tail, 1 - tail]).tolist()


def with_interval(draws):
    """[measured, low, high], of a number as measured and, behind it, as bootstrapped."""
    return [float(draws[0]), *interval(draws[1:])]


def resampled(verdicts, seed=0, draws=1000):
    """Error rates (1 + draws,) of each arm: as measured, then bootstrapped.

    verdicts: {arm: 0 or 1 (seeds, problems)}. A draw takes seeds with replacement and problems with
    replacement, the same for every arm: so arms are compared on the same problems.
    """
    rng = np.random.default_rng(seed)
    seeds, problems = next(iter(verdicts.values())).shape
    errors = {arm: [1 - v.mean()] for arm, v in verdicts.items()}
    for _ in range(draws):
        s = rng.integers(seeds, size=seeds)
        p = rng.integers(problems, size=problems)
        for arm, v in verdicts.items():
            errors[arm].append(1 - v[s][:, p].mean())
    return {arm: np.array(values) for arm, values in errors.items()}


def errors_by_size(cells):
    """{(arm, size): error rates of `resampled`}, of the arms that were trained with every seed."""
    by_arm = {}
    for cell in cells:
        for arm, record in cell["arms"].items():
            by_arm.setdefault((arm, cell["size"]), []).append(bits(record["correct"]))
    seeds = max(map(len, by_arm.values()))
    return resampled({key: np.array(v) for key, v in by_arm.items() if len(v) == seeds})


def slope(sizes, errors):
    """Exponent of error ~ size^slope, by least squares on the logs. errors: (sizes, draws) ->
    (draws,)."""
    x = np.log(sizes) - np.log(sizes).mean()
    return x @ np.log(np.maximum(errors, 1e-4)) / (x @ x)


def multiplier(sizes, errors, size, error):
    """How many times `size` SFT needs to reach `error`. Returns (multiplier, is it a lower bound).

    Interpolates SFT's errors at `sizes`, on logs. At each size SFT counts with the least error up
    to there, so more data is never held against it. An error that SFT does not reach at any size
    gives a bound.
    """
    best = np.log(np.maximum(np.minimum.accumulate(errors), 1e-4))
    error = np.log(max(error, 1e-4))
    if error < best[-1]:
        return sizes[-1] / size, True
    # np.interp wants rising errors; one above SFT's first counts as that
    times = np.log2(np.array(sizes) / size)
    return float(2 ** np.interp(error, best[::-1], times[::-1])), False


def data_worth(errors, sizes, arm, size):
    """The multiplier of an arm, with its interval. errors: errors_by_size; sizes: those of SFT."""
    sft = np.array([errors["sft", n] for n in sizes]).T  # (draws, sizes)
    read_off = []
    for curve, error in zip(sft, errors[arm, size], strict=True):
        read_off.append(multiplier(sizes, curve, size, error))
    values, bounds = zip(*read_off, strict=True)
    return dict(multiplier=with_interval(values), at_least=bounds[0])


def spread(values):
    """Mean and 95% interval over seeds by Student's t: [mean, low, high]."""
    values = np.asarray(values, float)
    n = len(values)
    mean = float(values.mean())
    half = math.nan
    if n > 1:
        t = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.2][min(n, 11) - 2]
        half = t * float(values.std(ddof=1)) / math.sqrt(n)
    return [mean, mean - half, mean + half]


def spreads(records, keys):
    """{key: spread over seeds} of the numbers that the records have."""
    return {key: spread([r[key] for r in records]) for key in keys if key in records[0]}


# ---------------------------------------------------------------- results


def arm_rows(cells):
    """The rows of the CSV file: one for each arm of each cell."""
    rows = []
    for cell in cells:
        for arm, record in cell["arms"].items():
            rows.append(dict(seed=cell["seed"], arm=arm) | without_verdicts(record))
    return rows


def without_verdicts(record):
    return {key: value for key, value in record.items() if key != "correct"}


def publish(c, name, cells, summary, rows):
    """Write NAME.json, the summary and every cell, and NAME.csv, the rows, to experiments/results.

    A smoke run keeps them in its own folder. Returns the path without its ending, for the figure.
    """
    folder = RESULTS
    if c.budget == "smoke":
        folder = Path(c.out or f"runs/experiments/{name}-smoke")
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (f"{name}-gpu" if c.budget == "gpu" else name)
    result = dict(
        command=f"python experiments/{Path(sys.argv[0]).name} --budget {c.budget}",
        **provenance(),
        summary=summary,
        process_seconds=round(sum(cell["seconds"] for cell in cells.values())),
        cells=[dict(cell, key=key) for key, cell in cells.items()],
    )
    write_json(f"{stem}.json", result)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: four_digits(value) for key, value in row.items()})
    return stem


def four_digits(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def figure(stem, panels):
    """A figure of some panels, functions of an axis. Without matplotlib one line says so."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(style)
    size = (4.4 * len(panels), 3.6)
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis)
    fig.tight_layout()
    fig.savefig(f"{stem}.png", dpi=130)
    plt.close(fig)

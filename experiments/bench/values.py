"""What step values cost: tokens decoded by each scan, and whether it finds the first pits of the full scan.

    python experiments/bench/values.py            # built-in task, K = 16, two minutes on one core

All scans but "again" value the same wrong solutions of one SFT model with the same random streams. "fresh" is the full
scan without what the problem's other samples tell, and the measure of the others' tokens; "again" the same by other
streams: how far K rollouts settle a pit at all. "as full", "as fresh": the share of solutions with the same first pit;
"bad step", "all lost": the pit judged against the truth of every step.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from credit import judged
from lab import Cell

from rollout import claim, entry, estimate_values, flag, parse, to_value
from train import drawing


@dataclass
class BenchConfig:
    out: str = flag("runs/bench/values", "folder of the runs")
    size: int = flag(400, "training problems", 8)
    solutions: int = flag(300, "wrong solutions to value", 1)
    k: int = flag(16, "K: rollouts a step prefix", 1)
    seed: int = flag(0, "of problems, training and random streams")


def main():
    c = parse(BenchConfig, __doc__)
    claim(c, Path(c.out) / "bench.json")
    cell = Cell(Path(c.out) / "cell", limit=c.size, test=8, val=8, seed=c.seed)
    cell.fit("sft", cell.c.model, cell.teacher, epochs=7.0)
    rows, _ = cell.draw("sft")
    wrong = dict(list(to_value(cell.train, rows, 4, 0).items())[: c.solutions])
    found, table = {}, []
    for name in ("fresh", "again", "full", "first", "sequential", "bisect"):
        policy, path, began = cell.policy("sft"), cell.folder / f"{name}-{c.k}.jsonl", time.monotonic()
        path.unlink(missing_ok=True)  # a bench measures, it does not resume
        alone = name in ("fresh", "again")
        found[name] = estimate_values(policy, cell.by_id, wrong, path, k=c.k, scan="full" if alone else name,
                                      rollouts=None if alone else rows,
                                      **drawing(cell.c, 7 if name == "again" else 0))  # fmt: skip
        table.append((name, policy.stats, time.monotonic() - began))
    ideal = sum(len(row["ids"]) + len(cell.encoder.prompt(cell.by_id[row["id"]])) for row in found["full"].values())
    print(f"{len(wrong)} wrong solutions, K = {c.k}; every solution read once would be {ideal} tokens prefilled")
    print(f"{'scan':12}{'prefilled':>11}{'decoded':>10}{'of fresh':>10}{'seconds':>9}{'as full':>9}{'as fresh':>10}"
          f"{'bad step':>10}{'all lost':>10}")  # fmt: skip
    pits = {name: np.array([row["pit"] for row in values.values()]) for name, values in found.items()}
    for name, stats, seconds in table:
        truth = judged(cell, list(found[name].values()))
        print(f"{name:12}{stats['prefilled']:11}{stats['decoded']:10}{stats['decoded'] / table[0][1]['decoded']:10.1%}"
              f"{seconds:9.1f}{np.mean(pits[name] == pits['full']):9.1%}{np.mean(pits[name] == pits['fresh']):10.1%}"
              f"{truth['precision']:10.1%}{truth['recall']:10.1%}")  # fmt: skip


if __name__ == "__main__":
    entry(main)

"""What the values of steps cost, and how far K continuations settle where the first pit is.

    python experiments/bench/values.py            # built-in task, K = 16, two minutes on one core

One SFT model's wrong solutions are valued three times: up to the first pit, at all steps, and at
all steps with other random numbers. The last says how often a pit is the same one at all. On the
built-in task the truth of every step is known, so the pits can be compared with it.
"""

import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import claim_folder, flag, load_problems, parse_flags
from evaluate import pit_report
from rollout import estimate_values, load_policy, run_program, sample, solutions_to_value
from train import TrainFlags, resolve, train_sft


@dataclass
class BenchFlags:
    out: str = flag("runs/bench/values", "folder of the model and its samples", group="run")
    limit: int = flag(400, "training problems", least=8)
    solutions: int = flag(300, "wrong solutions to value", least=1)
    rollouts: int = flag(16, "K: continuations per prefix of steps", least=1)
    seed: int = flag(0, "of problems, training and samples", least=0)


def value(policy, problems, solutions, k, scan):
    """Value copies of `solutions`. Returns them, the tokens decoded and the seconds it took."""
    solutions = deepcopy(solutions)
    began = time.monotonic()
    estimate_values(policy, problems, solutions, k=k, scan=scan)
    return solutions, policy.decoded, time.monotonic() - began


def main():
    flags = parse_flags(BenchFlags, __doc__)
    claim_folder(flags, Path(flags.out) / "bench.json", dict(sft=[flags.out]))
    c = resolve(
        TrainFlags(
            out=flags.out,
            limit=flags.limit,
            seed=flags.seed,
            sft_epochs=7.0,
            generator_epochs=7.0,
            threads=1,
        )
    )
    problems = load_problems("arithmetic", "train", c.limit, c.seed)
    by_id = {problem.id: problem for problem in problems}
    train_sft(c, problems)
    folder = Path(c.out) / "sft"
    policy = load_policy(folder, c)
    rollouts = sample(policy, problems, folder / "samples.jsonl", c.samples)
    solutions = solutions_to_value(policy, problems, rollouts, wrong=4)[: flags.solutions]
    print(f"{len(solutions)} wrong solutions, K = {flags.rollouts}")
    print(f"{'scan':8}{'decoded':>10}{'seconds':>9}{'pit as full':>13}")
    full_pits = None
    for name, scan, seed in (("full", "full", 0), ("first", "first", 0), ("again", "full", 7)):
        policy = load_policy(folder, replace(c, seed=seed))
        valued, decoded, seconds = value(policy, by_id, solutions, flags.rollouts, scan)
        pits = np.array([s.first_pit for s in valued])
        if full_pits is None:
            full_pits = pits
        same = np.mean(pits == full_pits)
        _, _, report = pit_report(by_id, valued, []).partition("; ")
        print(f"{name:8}{decoded:10}{seconds:9.1f}{same:13.1%}   {report}")


if __name__ == "__main__":
    run_program(main)

"""Theorem 6.1 (target 18): per-step DPO has the optimum of advantage-weighted RL, if its pairs are
drawn in the right way.

    python experiments/theorem.py --budget cpu

One state, five steps, a policy and advantages drawn at random. Pairs are sampled under three
readings of the theorem's "+y ~ sigma(A - A)"; Eq. 1, the loss of train.py, is minimised over all
policies; and the distance (total variation) to AWR's optimum, policy x exp(A / beta), is taken as
the number of pairs grows.

    label       draw two steps from the policy; the first wins with probability sigma(A_1 - A_2)
    normalised  draw the loser from the policy, and the winner from sigma(A - A_loser), normalised
    weighted    the same, with the policy as a further factor of the winner's distribution
"""

import time

import numpy as np
import torch
from lab import LabFlags, figure, publish, spread

from data import parse_flags, provenance
from rollout import run_program
from train import TrainFlags, dpo_loss

READINGS = {"label": "#d1495b", "normalised": "#777777", "weighted": "#2b7bba"}
BUDGETS = {
    "smoke": dict(worlds=2, powers=[2, 4]),
    "cpu": dict(worlds=20, powers=range(1, 8)),
    "gpu": dict(worlds=100, powers=range(1, 9)),
}
STEPS = 5
BETA = 0.3
C = TrainFlags(beta=BETA)


def pair_distribution(reading, policy, advantage):
    """P(winner, loser), (STEPS, STEPS): what the pairs of a reading are drawn from."""
    wins = 1 / (1 + np.exp(advantage[None] - advantage[:, None]))  # [i, j]: sigma(A_i - A_j)
    if reading == "label":
        return 2 * policy[:, None] * policy[None] * wins  # either of the two may be the winner
    if reading == "weighted":
        wins = wins * policy[:, None]
    return policy[None] * wins / wins.sum(0)


def optimum(counts, policy):
    """The policy (STEPS,) that minimises Eq. 1, where i won over j in counts[i, j] pairs and the
    reference is `policy`."""
    reference = torch.tensor(policy).log()
    logits = reference.clone().requires_grad_()
    winner, loser = torch.tensor(counts).nonzero(as_tuple=True)
    share = torch.tensor(counts / counts.sum())[winner, loser]
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        logps = logits.log_softmax(-1)
        losses, _ = dpo_loss(logps[winner], logps[loser], reference[winner], reference[loser], C)
        mean = (share * losses).sum()
        mean.backward()
        return mean

    solver.step(loss)
    return logits.softmax(-1).detach().numpy()


def total_variation(p, q):
    return float(abs(p - q).sum() / 2)


def world(seed, powers):
    """{reading: distances at 10^power pairs}, for one policy and one set of advantages."""
    rng = np.random.default_rng(seed)
    policy = rng.dirichlet(np.full(STEPS, 2.0))
    advantage = rng.uniform(-0.5, 0.5, STEPS)
    target = policy * np.exp(advantage / BETA)
    target /= target.sum()
    distances = {}
    for reading in READINGS:
        chance = pair_distribution(reading, policy, advantage)
        distances[reading] = []
        for power in powers:
            counts = rng.multinomial(10**power, chance.ravel() / chance.sum())
            found = optimum(counts.reshape(chance.shape).astype(float), policy)
            distances[reading].append(total_variation(found, target))
        exact = optimum(chance, policy)
        distances[f"{reading}, all pairs"] = [total_variation(exact, target)]
    return distances


def main():
    c = parse_flags(LabFlags, __doc__)
    b = BUDGETS[c.budget]
    began = time.monotonic()
    worlds = [world(seed, b["powers"]) for seed in range(b["worlds"])]
    seconds = round((time.monotonic() - began) / len(worlds), 2)
    cells = {}
    for seed, distances in enumerate(worlds):
        cells[seed,] = dict(distance=distances, seconds=seconds) | provenance()
    summary = {}
    for name in worlds[0]:
        by_power = zip(*[distances[name] for distances in worlds], strict=True)
        summary[name] = [spread(values) for values in by_power]
    rows = []
    for reading in READINGS:
        for power, (mean, low, high) in zip(b["powers"], summary[reading], strict=True):
            rows.append(dict(reading=reading, pairs=10**power, tv=mean, low=low, high=high))
    stem = publish(c, "theorem", cells, summary, rows)
    figure(stem, [lambda axis: panel(axis, b["powers"], summary)])
    for name, spreads in summary.items():
        distances = " ".join(f"{mean:.4f}" for mean, _, _ in spreads)
        print(f"{name:22} total variation from AWR's optimum: {distances}")


def panel(axis, powers, summary):
    pairs = [10**power for power in powers]
    for reading, colour in READINGS.items():
        means = [mean for mean, _, _ in summary[reading]]
        axis.plot(pairs, means, "o-", ms=3, color=colour, label=reading)
    axis.set(xscale="log", yscale="log", xlabel="pairs")
    axis.set_ylabel("total variation from AWR's optimum")
    axis.set_title("Theorem 6.1, three readings")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_program(main)

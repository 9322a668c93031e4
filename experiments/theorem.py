"""Theorem 6.1 (target 18): per-step DPO has the optimum of advantage-weighted RL, if "+y ~ sigma(A - A)" is read well.

    python experiments/theorem.py --budget cpu

One state, five steps, a policy and advantages drawn at random. Pairs are sampled under three readings of the theorem,
Eq. 1 (the loss of train.py) is minimised over all policies on them, and the distance (total variation) from AWR's
optimum, policy x exp(A / beta), is taken as the number of pairs grows:

    label      draw two steps from the policy; the first wins with probability sigma(A_1 - A_2)
    normalised draw the loser from the policy, the winner from sigma(A - A_loser), normalised over the steps
    weighted   the same, with the policy as a further factor of the winner's distribution
"""

import time

import numpy as np
import torch
from lab import LabConfig, figure, publish, spread

from rollout import entry, parse, provenance
from train import dpo_loss

READINGS = {"label": "#d1495b", "normalised": "#777777", "weighted": "#2b7bba"}
BUDGETS = {"smoke": dict(worlds=2, powers=[2, 4]), "cpu": dict(worlds=20, powers=range(1, 8)),
           "gpu": dict(worlds=100, powers=range(1, 9))}  # fmt: skip
STEPS, BETA = 5, 0.3


def pair_distribution(reading, policy, advantage):
    """P(winner, loser), (STEPS, STEPS): what the pairs of a reading are drawn from."""
    wins = 1 / (1 + np.exp(advantage[None] - advantage[:, None]))  # [i, j]: sigma(A_i - A_j)
    if reading == "label":
        return 2 * policy[:, None] * policy[None] * wins  # either of the two may be the winner
    chance = wins * (policy[:, None] if reading == "weighted" else 1)
    return policy[None] * chance / chance.sum(0)


def optimum(counts, policy):
    """The policy that minimises Eq. 1 on counts[i, j] pairs in which i won over j; the reference is `policy`."""
    reference = torch.tensor(policy).log()
    logits = reference.clone().requires_grad_()
    i, j = torch.tensor(counts).nonzero(as_tuple=True)
    share = torch.tensor(counts / counts.sum())[i, j]
    solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        now = logits.log_softmax(-1)
        value = (share * dpo_loss(now[i], now[j], reference[i], reference[j], BETA)[0]).sum()
        value.backward()
        return value

    solver.step(loss)
    return logits.softmax(-1).detach().numpy()


def world(seed, powers):
    """{reading: distance at 10^power pairs}; one policy, one set of advantages."""
    rng = np.random.default_rng(seed)
    policy, advantage = rng.dirichlet(np.full(STEPS, 2.0)), rng.uniform(-0.5, 0.5, STEPS)
    target = policy * np.exp(advantage / BETA)
    target /= target.sum()
    out = {}
    for reading in READINGS:
        chance = pair_distribution(reading, policy, advantage)
        counts = [rng.multinomial(10**p, chance.ravel() / chance.sum()).reshape(chance.shape) for p in powers]
        out[reading] = [float(abs(optimum(n.astype(float), policy) - target).sum() / 2) for n in counts]
        exact = optimum(chance, policy)
        out[f"{reading}, all pairs"] = [float(abs(exact - target).sum() / 2)]
    return out


def main():
    c, began = parse(LabConfig, __doc__), time.monotonic()
    b = BUDGETS[c.budget]
    cells = {(seed,): world(seed, b["powers"]) for seed in range(b["worlds"])}
    summary = {name: [spread([w[name][i] for w in cells.values()]) for i in range(len(values))]
               for name, values in cells[0,].items()}  # fmt: skip
    seconds = round((time.monotonic() - began) / len(cells), 2)
    cells = {key: dict(distance=w, seconds=seconds) | provenance() for key, w in cells.items()}
    rows = [dict(reading=name, pairs=10**p, tv=s[0], low=s[1], high=s[2])
            for name in READINGS for p, s in zip(b["powers"], summary[name], strict=True)]  # fmt: skip
    stem = publish(c, "theorem", cells, summary, rows)
    figure(stem, [lambda axis: panel(axis, b["powers"], summary)])
    for name, s in summary.items():
        print(f"{name:22} total variation from AWR's optimum: " + " ".join(f"{x[0]:.4f}" for x in s))


def panel(axis, powers, summary):
    for name, colour in READINGS.items():
        axis.plot([10**p for p in powers], [s[0] for s in summary[name]], "o-", ms=3, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel="total variation from AWR's optimum")
    axis.set_title("Theorem 6.1, three readings")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    entry(main)

r"""Claim (a): what losses lead to, on a table where the optimum is known in closed form.

    python -m experiments.claims.tabular --out=runs/claims/tabular

The policy is a softmax over Y answers with rewards r(y); a prompt's K responses are drawn from the
reference mu, and nca_jax.losses does the rest: the losses that train language models, unchanged.

    InfoNCA, any K:    pi(y) = mu(y) e^(r(y) / (alpha beta)) / Z
    NCA at beta = 1:   pi(y) = mu(y) E[ K p | y is one of the K ], and mu(y) e^(r(y) / alpha) / Z
                       as K grows

A second part has the other losses beside them. InfoNCA, EXO, RPO and REBEL share an optimum, where
log pi / mu differs between answers as r / (alpha beta) does; a loss that is told no more than which
of two is better has none, and goes on for as long as it is trained.

The third part leaves answers out: mu draws only some of what the policy can say. NCA fixes how
much mass the drawn ones keep; InfoNCA, which sees differences alone, leaves it where it starts.
Paper: arXiv:2402.05369, sections 3 and 4. Writes table.md, tabular.png,
tabular.json and, of the second part, optima.json and optima.png.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from numpy.typing import ArrayLike

from experiments.plots import colors_of
from experiments.results import markdown, with_spread
from nca_jax.checks import run_main
from nca_jax.losses import LOSSES, Responses

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

HERE = Path(__file__).parent
REWARDS = np.arange(4.0)  # of the answers that mu draws
MU = np.full(4, 0.25)
SEEDS, STEPS, DRAWS = 5, 3000, 1024  # draws a step: DRAWS / K prompts of K responses
LR = 1.0  # of plain gradient descent, by a cosine to 0
RESPONSES = (2, 4, 8, 16, 32, 64)  # K
TEMPERATURES = ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (2.0, 0.5))  # (alpha, beta) of InfoNCA
SHARED = ("infonca", "exo", "rpo", "rebel")  # alpha = beta = 1: all at mu e^r / Z
OTHERS = ("nca", "likelihood", "una", "sppo", "ipo", "plackett_luce", "dpo")
OF_LOSSES = 4  # K of the second part
UNSEEN = 4  # answers that the policy can give and mu never draws, as many as it draws
STARTS = (0.1, 0.5, 0.9)  # mass on the drawn answers before training; under mu it is 0.5


# What is known


def infonca_optimum(mu: np.ndarray, rewards: np.ndarray, temperature: float) -> np.ndarray:
    """Returns mu e^(r / temperature) / Z, [Y] float64."""
    weights = mu * np.exp((rewards - rewards.max()) / temperature)
    return weights / weights.sum()


def nca_optimum(mu: np.ndarray, rewards: np.ndarray, alpha: float, k: int) -> np.ndarray:
    """Returns mu(y) E[K p | y], NCA's optimum at beta = 1 and K responses, [Y] float64.

    The expectation over the K - 1 other draws is a sum over how often each answer is among them.
    """
    weights = np.exp((rewards - rewards.max()) / alpha)
    expected = np.zeros(len(mu))
    for counts in _counts(k - 1, len(mu)):
        log_chance = math.lgamma(k) - sum(math.lgamma(n + 1) for n in counts)
        chance = math.exp(log_chance + float(np.dot(counts, np.log(mu))))
        expected += chance * k * weights / (weights + np.dot(counts, weights))
    return mu * expected


def _counts(total: int, kinds: int):
    """Yields every way to draw `total` times from `kinds`, as counts."""
    for bars in itertools.combinations(range(total + kinds - 1), kinds - 1):
        edges = (-1, *bars, total + kinds - 1)
        yield [high - low - 1 for low, high in itertools.pairwise(edges)]


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns KL(p || q) over the last axis, nats."""
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


# What is learned


class Problem(NamedTuple):
    """One run: the loss, its temperatures, and what is drawn."""

    loss: str
    k: int
    alpha: float = 1.0
    beta: float = 1.0
    start: tuple[float, ...] = tuple(MU)  # the policy before training, [Y]
    mu: tuple[float, ...] = tuple(MU)  # the reference, [Y]
    drawn: int = len(MU)  # the first so many answers are drawn, by mu among them


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(problem: Problem, steps: int, key: jax.Array) -> jax.Array:
    """Returns the logits of the policy after each step, [steps, Y] float32."""
    rewards = jnp.asarray(REWARDS[: problem.drawn], jnp.float32)
    log_mu = jnp.log(jnp.asarray(problem.mu, jnp.float32))
    optimizer = optax.sgd(optax.cosine_decay_schedule(LR, steps))

    def mean_loss(logits, responses):  # [Y], [DRAWS / K, K]
        logps = jax.nn.log_softmax(logits)[responses]
        ones = jnp.ones(responses.shape)
        seen = Responses(logps, log_mu[responses], ones, rewards[responses], ones.astype(bool))
        loss = LOSSES[problem.loss]
        # Each loss reads its own of these.
        fields = loss.defaults(alpha=problem.alpha, beta=problem.beta, pairs="all")
        return jnp.mean(loss.per_prompt(seen, fields))

    def step(carry, key):
        logits, state = carry
        shape = (DRAWS // problem.k, problem.k)
        responses = jax.random.categorical(key, log_mu[: problem.drawn], shape=shape)
        updates, state = optimizer.update(jax.grad(mean_loss)(logits, responses), state)
        logits = optax.apply_updates(logits, updates)
        return (logits, state), logits

    logits = jnp.log(jnp.asarray(problem.start, jnp.float32))
    _, after = jax.lax.scan(step, (logits, optimizer.init(logits)), jax.random.split(key, steps))
    return after


def train_seeds(problem: Problem, steps: int = STEPS) -> np.ndarray:
    """Returns the policies of SEEDS runs, [SEEDS, steps, Y] float64."""
    runs = [train(problem, steps, jax.random.key(seed)) for seed in range(SEEDS)]
    weights = np.exp(np.asarray(runs, np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


def unseen_problem(loss: str, start: float) -> Problem:
    """Returns a problem of drawn and unseen answers; `start` is the mass on the drawn ones."""
    drawn, unseen = len(MU), UNSEEN
    policy = (*[start / drawn] * drawn, *[(1 - start) / unseen] * unseen)
    mu = tuple([1 / (drawn + unseen)] * (drawn + unseen))
    return Problem(loss, k=16, start=policy, mu=mu, drawn=drawn)


# The command


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="experiments.claims.tabular", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/claims/tabular"))
    out = parser.parse_args(argv[1:]).out
    out.mkdir(parents=True, exist_ok=True)
    limit = infonca_optimum(MU, REWARDS, 1.0)
    optima = {k: nca_optimum(MU, REWARDS, 1.0, k) for k in RESPONSES}
    policies = {
        (loss, k): train_seeds(Problem(loss, k)) for loss in ("infonca", "nca") for k in RESPONSES
    }  # {(loss, K): [SEEDS, STEPS, Y]}
    masses = {
        (loss, start): train_seeds(unseen_problem(loss, start))[..., : len(MU)].sum(axis=-1)
        for loss in ("infonca", "nca")
        for start in STARTS
    }  # {(loss, start): [SEEDS, STEPS]}

    apart = {
        loss: apart_from_first(train_seeds(Problem(loss, OF_LOSSES))[:, -1])
        for loss in (*SHARED, *OTHERS)
    }  # {loss: [SEEDS, Y]}

    tables = [
        markdown(table_of_k(policies, optima, limit)),
        markdown(table_of_temperatures()),
        markdown(table_of_losses(apart)),
        markdown(table_of_masses(masses)),
    ]
    (out / "table.md").write_text("\n".join(tables))
    plot(out / "tabular.png", policies, optima, limit, masses)
    rounded = {loss: np.round(runs, 6).tolist() for loss, runs in apart.items()}
    (out / "optima.json").write_text(json.dumps(rounded) + "\n")
    plot_optima(out / "optima.png", rounded)
    finals = {f"{loss},k={k}": x[:, -1].tolist() for (loss, k), x in policies.items()}
    (out / "tabular.json").write_text(json.dumps(finals, indent=1) + "\n")
    print("\n".join(tables))
    print(f"written to {out}")
    return 0


def table_of_k(policies: dict, optima: dict, limit: np.ndarray) -> list[list[str]]:
    """KL of the learned policies to the optima by K, alpha = beta = 1."""
    header = ["loss", "K", "KL to its own optimum, nats", "KL to mu e^(r/alpha), nats"]
    rows = [[*header, "pi/mu of the best", "closed form"]]
    for (loss, k), runs in policies.items():
        final, optimum = runs[:, -1], limit if loss == "infonca" else optima[k]
        ratio = final[:, -1] / MU[-1]
        own, to_limit = (_small(kl(final, x)) for x in (optimum, limit))
        closed = f"{optimum[-1] / MU[-1]:.3f}"
        rows.append([loss, str(k), own, to_limit, with_spread(ratio.tolist()), closed])
    return rows


def table_of_temperatures() -> list[list[str]]:
    """InfoNCA at other alpha and beta, K = 4."""
    rows = [
        ["InfoNCA, K = 4", "KL to mu e^(r/(alpha beta)), nats", "pi of the best", "closed form"]
    ]
    for alpha, beta in TEMPERATURES:
        final = train_seeds(Problem("infonca", 4, alpha, beta))[:, -1]
        optimum = infonca_optimum(MU, REWARDS, alpha * beta)
        own, best = _small(kl(final, optimum)), with_spread(final[:, -1].tolist())
        rows.append([f"alpha {alpha:g}, beta {beta:g}", own, best, f"{optimum[-1]:.4f}"])
    return rows


def apart_from_first(policies: np.ndarray) -> np.ndarray:
    """Returns log pi / mu of each answer above that of the first, [..., Y] nats."""
    logratios = np.log(policies / MU)
    return logratios - logratios[..., :1]


def table_of_losses(apart: Mapping[str, ArrayLike]) -> list[list[str]]:
    """log pi / mu above that of the worst answer, nats, by loss; {loss: [SEEDS, Y]}."""
    header = f"log pi / mu above that of r = 0, nats; K = {OF_LOSSES}, alpha = beta = 1"
    rows = [[header, *(f"r = {r:g}" for r in REWARDS[1:])]]
    rows.append(["r / (alpha beta)", *(f"{r:g}" for r in REWARDS[1:])])
    for loss, runs in apart.items():
        rows.append([loss, *(with_spread(x) for x in np.transpose(runs)[1:].tolist())])
    return rows


def table_of_masses(masses: dict) -> list[list[str]]:
    """The mass on the answers that are drawn, before and after."""
    rows = [["loss", "mass of the drawn answers at the start", "after training", "under mu"]]
    for (loss, start), runs in masses.items():
        rows.append([loss, f"{start:g}", with_spread(runs[:, -1].tolist()), "0.5"])
    return rows


def _small(values: np.ndarray) -> str:
    """Writes mean and sd of KLs that may be as small as rounding."""
    return f"{values.mean():.1e} ± {values.std(ddof=1):.0e}"


def plot(path: Path, policies: dict, optima: dict, limit: np.ndarray, masses: dict) -> None:
    """Draws KL against steps, KL against K, and mass against steps; bands are all seeds."""
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, (by_step, by_k, mass) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps = np.arange(1, STEPS + 1)
    for (loss, k), color in ((("infonca", 4), "C0"), (("nca", 4), "C1"), (("nca", 64), "C3")):
        optimum = limit if loss == "infonca" else optima[k]
        _draw_band(by_step, steps, kl(policies[loss, k], optimum), f"{loss}, K = {k}", color)
    by_step.set(xscale="log", yscale="log", xlabel="step", title="KL to the optimum, nats")
    for loss, color in (("infonca", "C0"), ("nca", "C1")):
        learned = np.array([kl(policies[loss, k][:, -1], limit) for k in RESPONSES]).T
        _draw_band(by_k, RESPONSES, learned, loss, color, marker="o")
    exact = [kl(optima[k], limit) for k in RESPONSES]
    by_k.plot(RESPONSES, exact, "k--", lw=1, label="nca, closed form")
    by_k.set(xscale="log", yscale="log", xlabel="K", title="KL to mu e^(r/alpha), nats")
    by_k.set_xticks(RESPONSES, map(str, RESPONSES))
    by_k.minorticks_off()
    for (loss, start), runs in masses.items():
        color = {"infonca": "C0", "nca": "C1"}[loss]
        _draw_band(mass, steps, runs, loss if start == STARTS[0] else None, color)
    mass.axhline(0.5, color="black", ls="--", lw=1, label="under mu")
    mass.set(xscale="log", ylim=(0, 1), xlabel="step", title="mass of the answers that are drawn")
    for axes, place in ((by_step, "lower left"), (by_k, "center right"), (mass, "lower right")):
        axes.legend(fontsize=8, loc=place)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_optima(path: Path, apart: Mapping[str, ArrayLike]) -> None:
    """Draws what `table_of_losses` has: rings are those that share an optimum."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    axes.plot(REWARDS, REWARDS, "k--", lw=1, label="r / (alpha beta)", zorder=3)
    colors = colors_of(len(apart))
    for i, (loss, runs) in enumerate(apart.items()):
        means, how = np.mean(runs, axis=0), {"color": colors[i], "label": loss}
        if loss in SHARED:  # around each other: all are at one place
            axes.plot(REWARDS, means, "o", ms=16 - 4 * i, mfc="none", mew=1.6, **how)
        else:
            axes.plot(REWARDS, means, ".-", lw=4 if loss == "nca" else 1, **how)  # one is on it
    axes.set(xlabel="reward of an answer, r", ylabel="log pi / mu above that of r = 0, nats")
    axes.set_ylim(-0.3, 6)  # what has no end is far above
    axes.set_xticks(REWARDS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_band(axes, x, values: np.ndarray, label: str | None, color: str, marker: str = ""):
    """Draws the mean over seeds, [seeds, len(x)], and the band from the least to the largest."""
    axes.plot(x, values.mean(axis=0), color=color, label=label, marker=marker, ms=4)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)


if __name__ == "__main__":
    run_main(main)

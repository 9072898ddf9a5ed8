"""How probable: densities by the probability-flow ODE, held-out nats by I-MMSE, the ELBO, an error budget.

    y = x/r, r^2 = alpha^2 + sigma^2, tan theta = sigma/alpha:       dy/dtheta = w(y, theta) = (alpha eps - sigma x0)/r
    log p(x_0)  = log p_1(y_1) + int_tmin^1 div w dtheta + d log(alpha/r)(t_min),        y_tmin = (alpha/r) x_0
    gain        = 1/2 int ( E|eps_G - z|^2 - E|eps_model - z|^2 ) d log-SNR                       (nats a row)
    -ELBO       = KL(q(x_1|x_0) | p_1) + 1/2 sum_k (SNR_s - SNR_t) E|x0_hat(x_t) - x_0|^2
                  - E log N(x_0; x_tmin/alpha, sigma^2/alpha^2)

The first is exact for the ODE's own law; the gain is exact where the models are denoisers of densities, and of the
kind of an ELBO for networks that are not gradients. In theta the ODE is smooth on every path, see `ProbabilityFlow`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finediff.diffusion.process import Process, normal, require
from finediff.diffusion.sample import ProbabilityFlow, Sampler, angular_velocity, runge_kutta
from finediff.diffusion.score import ScoreModel, divergence, to_denoised

LOG_SNR = (-5.0, 8.0)


def log_prob(
    model: ScoreModel,
    x: Tensor,
    *,
    steps: int = 100,
    probes: int | None = None,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log density of rows under the model's probability-flow ODE (Song et al. 2021), by RK4.

    Parameters
    ----------
    model, condition : ScoreModel, Tensor
        Any model that is differentiable in x, and what is handed to it.
    x : (batch, d)
        Rows of x_0.
    steps : int
        RK4 steps on the log-SNR grid.
    probes, generator : int, torch.Generator, optional
        None: exact divergence, d products a stage; k: Hutchinson's unbiased estimate with k Rademacher probes from
        the generator, the same along a path.

    Returns
    -------
    Tensor (batch,)
        Nats.
    """
    process = model.process
    grid = process.grid(steps).flip(0)
    theta = process.angle(grid)
    middle = process.time_of_angle((theta[:-1] + theta[1:]) / 2)
    seed = int(torch.randint(2**31, (), generator=generator, device=x.device)) if probes else 0

    def slope(state: Tensor, t: Tensor) -> Tensor:
        """w and its divergence: (batch, d + 1) -> (batch, d + 1)."""
        w = None

        def field(y: Tensor) -> Tensor:
            nonlocal w
            w = angular_velocity(model, y, t, condition)
            return w

        again = torch.Generator(device=x.device).manual_seed(seed)
        div = divergence(field, state[:, :-1], probes=probes, generator=again)
        return torch.cat([w.detach(), div[:, None]], 1)

    scale = (process.alpha(grid[0]) / process.radius(grid[0])).to(x)
    state = torch.cat([scale * x.detach(), (x.shape[1] * torch.log(scale)).expand(len(x), 1)], 1)
    for t, between, s, h in zip(grid[:-1], middle, grid[1:], theta.diff().tolist()):
        state = runge_kutta(slope, state, h, t, between, s)
    deviation = (process.sigma(grid[-1]) / process.radius(grid[-1])).to(x)
    prior = torch.distributions.Normal(0.0, deviation, validate_args=False)
    return state[:, -1] + prior.log_prob(state[:, :-1]).sum(1)


@dataclass(frozen=True)
class Nats:
    """A gain in nats a row over a baseline, with its standard error over rows."""

    gain: float
    standard_error: float
    rows: Tensor


@torch.no_grad()
def held_out_nats(
    model: ScoreModel,
    x: Tensor,
    baseline: ScoreModel,
    *,
    log_snr: tuple[float, float] = LOG_SNR,
    nodes: int = 27,
    repeats: int = 4,
    condition: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Nats:
    """Held-out likelihood gained over a baseline (Guo, Shamai & Verdu 2005; Kong et al. 2023, arXiv 2302.03792).

    Both models see the same noise; noise comes in antithetic pairs; the integral over log-SNR is Simpson's.

    Parameters
    ----------
    model, condition : ScoreModel, Tensor
        The one that is judged, and what is handed to it but not to the baseline.
    x : (n, d)
        Rows that neither model saw, in the models' coordinates.
    baseline : ScoreModel
        On the same process; usually `GaussianScore` with the Ledoit-Wolf covariance of the training rows.
    log_snr : pair of floats
        Range of the integral; beyond it the two models must be alike.
    nodes, repeats : int
        Of Simpson's rule, odd, and antithetic pairs of noise a row and node.
    generator : torch.Generator, optional
        Of the noise.
    """
    same = baseline.process == model.process
    found = f"{baseline.process} and {model.process}"
    require(same, "two models on one process", found, "the same noise must go to both")
    gain = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t, weight in _levels(model, log_snr, nodes):
        for x_t, z in _noised(model.process, x, t, repeats, generator):
            old, new = (
                (eps - z).square().sum(1) for eps in (baseline.noise(x_t, t), model.noise(x_t, t, condition))
            )
            gain += weight / 2 * (old - new).double() / (2 * repeats)
    return Nats(float(gain.mean()), _standard_error(gain), gain)


def _noised(process: Process, x: Tensor, t: Tensor, pairs: int, generator):
    """(x_t, noise) for antithetic pairs of noises."""
    for _ in range(pairs):
        z = normal(x, generator)
        for noise in (z, -z):
            yield process.perturb(x, t, noise), noise


def _levels(model: ScoreModel, log_snr: tuple[float, float], nodes: int) -> list[tuple[Tensor, float]]:
    """Times and weights of Simpson's rule in log-SNR."""
    odd = nodes % 2 and nodes >= 3
    require(odd, "an odd number of nodes, at least 3", nodes, "Simpson's rule needs one")
    levels = torch.linspace(*log_snr, nodes, dtype=torch.float64)
    weights = torch.ones(nodes, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    weights *= (levels[1] - levels[0]) / 3
    return list(zip(model.process.time(levels), weights.tolist()))


def _start_divergence(process: Process, t: Tensor, x: Tensor) -> float:
    """alpha^2 E|x_0|^2 / (2 sigma^2), KL(q(x_t|x_0) | N(0, sigma^2 I)) on average."""
    ratio = float((process.alpha(t) / process.sigma(t)) ** 2)
    return ratio / 2 * float(x.square().sum(1).mean())


def _standard_error(rows: Tensor) -> float:
    return float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else math.inf


@dataclass(frozen=True)
class ELBO:
    """The evidence lower bound by its three terms, nats a row (means over rows); total = -(their sum)."""

    prior: float
    diffusion: float
    reconstruction: float

    @property
    def total(self) -> float:
        return -(self.prior + self.diffusion + self.reconstruction)


@torch.no_grad()
def elbo(model: ScoreModel, x: Tensor, *, steps: int = 200, generator: torch.Generator | None = None) -> ELBO:
    """The DDPM bound on log p(x_0) (Ho et al. 2020; Kingma et al. 2021, arXiv 2107.00630) on the log-SNR grid.

    Parameters
    ----------
    model, x : ScoreModel, (batch, d)
        Its score must be valid; rows of x_0.
    steps, generator : int, torch.Generator
        Intervals of the chain, and the source of noise; the bound tightens as the steps grow.
    """
    process, diffusion = model.process, 0.0
    grid = process.grid(steps)
    for t, s in itertools.pairwise(grid):
        error = model.denoise(process.perturb(x, t, normal(x, generator)), t) - x
        gap = torch.exp(process.log_snr(s)) - torch.exp(process.log_snr(t))
        diffusion += 0.5 * float(gap) * float(error.square().sum(1).mean())
    variance = math.exp(-float(process.log_snr(grid[-1])))
    reconstruction = 0.5 * x.shape[1] * (1 + math.log(2 * math.pi * variance))
    return ELBO(_start_divergence(process, grid[0], x), diffusion, reconstruction)


@dataclass(frozen=True)
class ErrorBudget:
    """Where a trained model's scenarios can differ from the data's law, each part on its own.

    Attributes
    ----------
    score : float
        Nats a row. With an oracle 1/2 int E|eps_model - eps_oracle|^2 d log-SNR over log-SNR -5..8, a bound on the
        divergence. Without one, what an affine correction of the model at each noise level wins on held-out rows:
        a lower bound of the same, 0 where no correction pays.
    score_standard_error : float
    discretisation : float
        Root mean square of (draw - the same draw with four times the steps) over its standard deviation.
    initialisation : float
        Nats a row: bound alpha(1)^2 E|x_0|^2 / (2 sigma(1)^2) on starting from N(0, sigma(1)^2 I) instead of p_1.
    """

    score: float
    score_standard_error: float
    discretisation: float
    initialisation: float


@torch.no_grad()
def error_budget(
    model: ScoreModel,
    x: Tensor,
    *,
    sampler: Sampler | None = None,
    oracle: ScoreModel | None = None,
    n_draws: int = 1000,
    generator: torch.Generator | None = None,
) -> ErrorBudget:
    """Estimate the three errors of a model, its sampler and its start.

    Parameters
    ----------
    model, x : ScoreModel, (n, d)
        The one that is examined, and held-out rows in its coordinates.
    sampler : Sampler, optional
        A deterministic one on a fixed grid; the probability-flow ODE by default.
    oracle : ScoreModel, optional
        The exact score, where it is known. Without it, half of the rows fit the correction, half judge it.
    n_draws, generator : int, torch.Generator
        Draws that measure the discretisation, and the source of them and of the noise.
    """
    process, sampler = model.process, sampler or ProbabilityFlow(32)
    require(
        not sampler.needs_score and sampler.evaluations is not None,
        "a deterministic sampler on a fixed grid",
        f"{sampler}, because only there is a draw with more steps the same draw",
        "use ProbabilityFlow, DPMSolver or DDIM(eta=0)",
    )
    if oracle is None:
        correction = _AffineCorrection(model, x[::2], generator)
        found = held_out_nats(correction, x[1::2], model, generator=generator)
        score, error = found.gain, found.standard_error
    else:
        rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for t, weight in _levels(model, LOG_SNR, 27):
            x_t = process.perturb(x, t, normal(x, generator))
            rows += weight / 2 * (model.noise(x_t, t) - oracle.noise(x_t, t)).square().sum(1).double()
        score, error = float(rows.mean()), _standard_error(rows)
    start = process.grid(1)[0]
    z = process.sigma(start).to(x) * normal(x, generator, n_draws)
    finer = replace(sampler, steps=4 * sampler.steps)
    coarse, fine = (each(model, z.shape, start=z) for each in (sampler, finer))
    discretisation = float(((coarse - fine).square().mean() / fine.var(0).mean()).sqrt())
    return ErrorBudget(score, error, discretisation, _start_divergence(process, start, x))


class _AffineCorrection(ScoreModel):
    """eps_hat + a + B x_t/r + C eps_hat, fitted by ridge at each noise level to z - eps_hat.

    The penalty is the best of a ladder by two-fold cross-validation over rows; where even that gains less than a
    standard error, the model is kept.
    """

    LADDER = (0.003, 0.03, 0.3, 3.0, 30.0)

    def __init__(self, model: ScoreModel, rows: Tensor, generator, repeats: int = 4) -> None:
        super().__init__()
        self.model, self.process, self.repeats = model, model.process, repeats
        self.rows, self.generator, self.fitted = rows, generator, {}

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return to_denoised(self.noise(x, t, condition), x, t, self.process, "eps")

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        if float(t) not in self.fitted:
            self.fitted[float(t)] = self._fit(t, condition)
        eps = self.model.noise(x, t, condition)
        return eps + (self._features(x, eps, t) @ self.fitted[float(t)]).to(x)

    def _features(self, x: Tensor, eps: Tensor, t) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x / self.process.radius(t).to(x), eps], 1).double()

    def _fit(self, t, condition: Tensor | None) -> Tensor:
        folds = [self._draw(rows, t, condition) for rows in (self.rows[::2], self.rows[1::2])]
        sums = [(torch.einsum("rnp,rnq->pq", F, F), torch.einsum("rnp,rnd->pd", F, R)) for F, R in folds]

        def solve(G: Tensor, R: Tensor, penalty: float) -> Tensor:
            ridge = penalty * 2 * self.repeats * len(self.rows)
            return torch.linalg.solve(G + ridge * torch.eye(len(G)).to(G), R)

        def change(penalty: float) -> Tensor:
            """Of each row's squared error, by a fit to the other fold."""
            rows = []
            for (G, R), (F, residual) in zip(sums, folds[::-1]):
                correction = F @ solve(G, R, penalty)
                rows.append((correction * (correction - 2 * residual)).sum(2).mean(0))
            return torch.cat(rows)

        G, R = (one + other for one, other in zip(*sums))
        best = min(self.LADDER, key=lambda penalty: float(change(penalty).mean()))
        rows = change(best)
        return solve(G, R, best) if rows.mean() < -_standard_error(rows) else torch.zeros_like(R)

    def _draw(self, rows: Tensor, t, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (2 repeats, n, 2d + 1) and z - eps_hat (2 repeats, n, d)."""
        features, residuals = [], []
        for x_t, noise in _noised(self.process, rows, t, self.repeats, self.generator):
            eps = self.model.noise(x_t, t, condition)
            features.append(self._features(x_t, eps, t))
            residuals.append((noise - eps).double())
        return torch.stack(features), torch.stack(residuals)

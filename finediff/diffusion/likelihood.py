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

from finediff.diffusion.closed_form import fold_ridge
from finediff.diffusion.process import Process, normal, require
from finediff.diffusion.quadrature import simpson
from finediff.diffusion.sample import ProbabilityFlow, Sampler, angular_velocity, runge_kutta
from finediff.diffusion.score import ScoreModel, divergence

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
    """log density of rows x (batch, d) under the model's probability-flow ODE (Song et al. 2021): (batch,), in nats.

    By ``steps`` of RK4 on the log-SNR grid, for any model that is differentiable in x. ``probes`` None: exact
    divergence, d products a stage; k: Hutchinson's unbiased estimate with k Rademacher probes from the generator, the
    same along a path.
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
    log_snr, nodes : pair of floats, int
        Range of the integral, beyond which the two models must be alike, and nodes of Simpson's rule, odd.
    repeats, generator : int, torch.Generator
        Antithetic pairs of noise a row and node, and their source.
    """
    found = f"{baseline.process} and {model.process}"
    require(baseline.process == model.process, "two models on one process", found, "both see the same noise")
    gain = x.new_zeros(len(x), dtype=torch.float64)
    for t, weight in _levels(model.process, log_snr, nodes):
        for x_t, z in _noised(model.process, x, t, repeats, generator):
            old, new = baseline.noise(x_t, t) - z, model.noise(x_t, t, condition) - z
            gain += weight * (old.square().sum(1) - new.square().sum(1)).double() / (2 * repeats)
    return Nats(float(gain.mean()), _standard_error(gain), gain)


def _noised(process: Process, x: Tensor, t: Tensor, pairs: int, generator):
    """(x_t, noise) for antithetic pairs of noises."""
    for _ in range(pairs):
        z = normal(x, generator)
        for noise in (z, -z):
            yield process.perturb(x, t, noise), noise


def _levels(process: Process, log_snr: tuple[float, float] = LOG_SNR, nodes: int = 27):
    """(time, weight) of Simpson's rule for half an integral over log-SNR."""
    levels, weights = simpson(*log_snr, nodes)
    return zip(process.time(levels), (weights / 2).tolist())


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
    """The DDPM bound on log p(x_0) (Ho et al. 2020; Kingma et al. 2021, arXiv 2107.00630) for rows x (batch, d).

    A chain of ``steps`` intervals on the log-SNR grid: the bound tightens as they grow. The score must be valid.
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
    """Estimate the three errors of a model on held-out rows x (n, d), of its sampler and of its start.

    The sampler must be a deterministic one on a fixed grid (the probability-flow ODE by default); ``n_draws`` of its
    draws measure the discretisation. Without an ``oracle`` half of the rows fit the correction, half judge it.
    """
    process, sampler = model.process, sampler or ProbabilityFlow(32)
    same = not sampler.needs_score and sampler.evaluations is not None
    advice = "only there do more steps give the same draw; use ProbabilityFlow, DPMSolver or DDIM(eta=0)"
    require(same, "a deterministic sampler on a fixed grid", sampler, advice)
    if oracle is None:
        rows = _affine_gain(model, x, generator)
    else:
        rows = x.new_zeros(len(x), dtype=torch.float64)
        for t, weight in _levels(process):
            x_t = process.perturb(x, t, normal(x, generator))
            rows += weight * (model.noise(x_t, t) - oracle.noise(x_t, t)).square().sum(1).double()
    start = process.grid(1)[0]
    z = process.sigma(start).to(x) * normal(x, generator, n_draws)
    finer = replace(sampler, steps=4 * sampler.steps)
    coarse, fine = (each(model, z.shape, start=z) for each in (sampler, finer))
    discretisation = float(((coarse - fine).square().mean() / fine.var(0).mean()).sqrt())
    score = float(rows.mean())
    return ErrorBudget(score, _standard_error(rows), discretisation, _start_divergence(process, start, x))


def _affine_gain(model: ScoreModel, x: Tensor, generator, folds: int = 8) -> Tensor:
    """Nats that eps_hat + a + B x_t/r + C eps_hat, fitted to every other row, wins on each of the rest.

    At each level a ridge regression of z - eps_hat; where it gains less than a standard error, the model is kept.
    """
    gain = x.new_zeros(len(x) // 2, dtype=torch.float64)

    def regression(rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Features (8 n, 2d + 1) and z - eps_hat (8 n, d) for four antithetic pairs of noise a row."""
        x_t, z = (torch.cat(parts) for parts in zip(*_noised(model.process, rows, t, 4, generator)))
        eps, scale = model.noise(x_t, t), model.process.radius(t).to(x)
        return torch.cat([torch.ones_like(eps[:, :1]), x_t / scale, eps], 1).double(), (z - eps).double()

    for t, weight in _levels(model.process):
        parts = [regression(x[::2][k::folds], t) for k in range(folds)]
        G, R = torch.stack([F.T @ F for F, _ in parts]), torch.stack([F.T @ y for F, y in parts])
        F, y = regression(x[1::2], t)
        correction = F @ fold_ridge(G, R, margin=1.0).weights
        gain += weight * (correction * (2 * y - correction)).sum(1).unflatten(0, (8, -1)).mean(0)
    return gain

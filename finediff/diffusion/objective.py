"""What to minimise: every regression loss is sum_k w(t_k) |x0_hat - x_0|^2 in the one currency x0_hat.

    d eps = -(alpha/sigma) d x0,       d v = -(alpha^2 + sigma^2)/sigma d x0,
    d u   = (alpha' - sigma' alpha/sigma) d x0                              (d = error of the reading)

so an eps-, v- or velocity-regression is a choice of w(t): denoising score matching and flow matching are one
objective. The likelihood weighting g^2 |score error|^2 = g^2 alpha^2/sigma^4 |x0 error|^2 is the eps-loss uniform
in log-SNR. Without a target, and with the exact score s* where it is known:

    E sigma^2 |s + eps/sigma|^2 = E sigma^2 |s - s*|^2 + const = 2 E sigma^2 (1/2 |s|^2 + div s) + const'
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from finediff.diffusion.process import Process, expand, normal, require
from finediff.diffusion.score import ScoreModel, directions

Weighting = Literal["x0", "eps", "v", "velocity", "likelihood", "min_snr"]
MIN_SNR = 5.0  # the cap of Hang et al. 2023 (arXiv 2303.09556)


def weight(process: Process, t: Tensor, weighting: Weighting) -> Tensor:
    """w(t) that turns |x0_hat - x_0|^2 into the squared error of the named reading; shape of t, sigma(t) > 0."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    require(weighting in get_args(Weighting), f"a weighting among {get_args(Weighting)}", repr(weighting))
    if weighting == "x0":
        return torch.ones_like(alpha)
    if weighting == "eps":
        return (alpha / sigma) ** 2
    if weighting == "v":
        return ((alpha**2 + sigma**2) / sigma) ** 2
    if weighting == "velocity":
        d_alpha, d_sigma = process.rates(t)
        return (d_alpha - d_sigma * alpha / sigma) ** 2
    if weighting == "likelihood":
        return process.drift_diffusion(t)[1] * alpha**2 / sigma**4
    return torch.clamp((alpha / sigma) ** 2, max=MIN_SNR)


@dataclass(frozen=True)
class Times:
    """Law of the training times.

    ``law`` "log_snr" is uniform in log-SNR over the process's range (the law of the likelihood), "uniform" in t on
    [t_min, 1], "importance" of density ~ 1/sigma^2 there (for a weighting that leaves 1/sigma^2 out). ``stratified``:
    one draw in each of ``batch`` equal cells, u + i/batch mod 1, which costs nothing and cuts variance.
    """

    law: str = "log_snr"
    stratified: bool = True

    def __call__(self, process: Process, n: int, *, device=None, generator=None) -> Tensor:
        """n times in [t_min, 1], float64, (n,)."""
        if self.stratified:
            start = torch.rand((), dtype=torch.float64, device=device, generator=generator)
            u = (start + torch.arange(n, device=device, dtype=torch.float64) / n) % 1
        else:
            u = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        table = quantile_table(process, self.law).to(u.device)
        place = u * (len(table) - 1)
        cell = place.long().clamp(max=len(table) - 2)
        return table[cell] + (place - cell) * (table[cell + 1] - table[cell])


@functools.lru_cache(maxsize=32)
def quantile_table(process: Process, law: str, size: int = 2049) -> Tensor:
    """Quantile function of a law of times on an even grid of [0, 1] (the exact inverse is too slow per batch)."""
    laws = ("log_snr", "uniform", "importance")
    require(law in laws, f"a law of times among {laws}", repr(law))
    noisy, clean = process.log_snr_range()
    u = torch.linspace(0, 1, size, dtype=torch.float64)
    if law == "log_snr":
        return process.time(noisy + u * (clean - noisy))
    t_min = process.time(clean)
    if law == "uniform":
        return t_min + u * (1 - t_min)
    # The distribution function by the trapezoid rule on a grid that is fine where 1/sigma^2 is large.
    t = process.grid(16 * size).flip(0)
    mass = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(process.sigma(t) ** -2, t)])
    return torch.as_tensor(np.interp(u * mass[-1], mass, t))


def _draw(times: Times, model: ScoreModel, x: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Times (batch,) and noise (batch, d) for rows x."""
    t = times(model.process, len(x), device=x.device, generator=generator)
    return t, normal(x, generator)


class Objective(ABC):
    """What training minimises: called with a model and rows, it gives their mean loss."""

    score_valid = True  # is -eps_hat/sigma of a model trained so the score?

    def __call__(self, model: ScoreModel, x: Tensor, condition=None, generator=None) -> Tensor:
        """Loss of a batch of rows x (batch, d), a scalar."""
        return self.losses(model, x, condition, generator).mean()

    @abstractmethod
    def losses(self, model: ScoreModel, x: Tensor, condition=None, generator=None) -> Tensor:
        """Loss per row, (batch,) or (2 batch,) where antithetic, with a fresh time and noise for each."""


@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    """E w(t) |x0_hat(x_t, t) - x_0|^2 / d (Vincent 2011; Ho et al. 2020; Song et al. 2021).

    Parameters
    ----------
    weighting : {"eps", "v", "x0", "velocity", "likelihood", "min_snr"}
        "eps" is L_simple; "likelihood" is g^2 on the score, the likelihood's where times are uniform in t (where
        they are uniform in log-SNR, "eps" is); "min_snr" is min(SNR, 5) on x0.
    times : Times
    antithetic : bool
        Use every noise with both signs: twice the rows a step, and a regression target of much smaller variance
        (where the law is close to symmetric the two errors largely cancel).
    condition_dropout : float
        Share of rows whose condition is withheld (NaN), so that one model also learns the unconditional law.
    """

    weighting: Weighting = "eps"
    times: Times = Times()
    antithetic: bool = False
    condition_dropout: float = 0.1

    def losses(self, model: ScoreModel, x: Tensor, condition=None, generator=None) -> Tensor:
        t, noise = _draw(self.times, model, x, generator)
        told = condition
        if condition is not None and self.condition_dropout:
            share = torch.rand(len(condition), 1, device=condition.device, generator=generator)
            told = condition.masked_fill(share < self.condition_dropout, torch.nan)
        if self.antithetic:
            # Each sign is paired by itself: the negative of an optimal pairing is the worst one.
            noise = torch.cat([self.pair(x, noise, condition), self.pair(x, -noise, condition)])
            t, x, told = t.repeat(2), x.repeat(2, 1), None if told is None else told.repeat(2, 1)
        else:
            noise = self.pair(x, noise, condition)
        error = model.denoise(model.process.perturb(x, t, noise), t, told) - x
        return expand(weight(model.process, t, self.weighting), error[:, 0]) * error.square().mean(1)

    def pair(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The noise (batch, d) in the order in which it meets the rows x; independent of them here."""
        return noise


@dataclass(frozen=True)
class FlowMatching(DenoisingScoreMatching):
    """E |u(x_t, t) - (alpha' x_0 + sigma' eps)|^2 / d: regression on the velocity (Lipman et al. 2023).

    On the linear path the target is eps - x_0. Times uniform in t by default, as published.

    ``pairing`` "optimal_transport" matches each batch to its noise (Tong et al. 2024, arXiv 2302.00482), which
    straightens the paths; a model trained so carries ``score_valid = False``. With conditions, rows are matched only
    to noise of rows that share their condition exactly: any other matching would give each condition a noise law of
    its own, while sampling starts from N(0, I) whatever the condition. Continuous conditions are therefore paired
    independently.
    """

    weighting: Weighting = "velocity"
    times: Times = Times("uniform")
    pairing: Literal["independent", "optimal_transport"] = "independent"

    @property
    def score_valid(self) -> bool:
        return self.pairing == "independent"

    def pair(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        known = ("independent", "optimal_transport")
        require(self.pairing in known, f"a pairing among {known}", repr(self.pairing))
        if self.pairing == "independent":
            return noise
        if condition is None:
            return _transport(x, noise)
        _, group, size = torch.unique(condition, dim=0, return_inverse=True, return_counts=True)
        matched = noise.clone()
        for g in (size > 1).nonzero():
            rows = group == g
            matched[rows] = _transport(x[rows], noise[rows])
        return matched


def _transport(x: Tensor, noise: Tensor) -> Tensor:
    """The rows of noise in the order that minimises sum |x_i - noise_i|^2, so maximises sum x_i . noise_i."""
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment((x @ noise.T).cpu().numpy(), maximize=True)
    return noise[torch.as_tensor(order, device=x.device)]


@dataclass(frozen=True)
class ImplicitScoreMatching(Objective):
    """E sigma^2 ( 1/2 |s|^2 + div s ) / d on noisy rows (Hyvarinen 2005): weighted as L_simple.

    ``probes`` None: exact divergence; k: Hutchinson's with k Rademacher probes.
    """

    probes: int | None = None
    times: Times = Times()

    variance_reduced = True

    def losses(self, model: ScoreModel, x: Tensor, condition=None, generator=None) -> Tensor:
        along = directions(x, self.probes, generator=generator)
        t, noise = _draw(self.times, model, x, generator)
        with torch.enable_grad():
            x_t = model.process.perturb(x, t, noise).detach().requires_grad_(True)
            score = model.score(x_t, t, condition)
            total = torch.zeros_like(x[:, 0])
            for v in along:
                (row,) = torch.autograd.grad(score, x_t, v, create_graph=True, materialize_grads=True)
                total = total + (row * v).sum(1)
                if not self.variance_reduced:
                    total = total + 0.5 * (score * v).sum(1).square()
            loss = total / (self.probes or 1)
            if self.variance_reduced:
                loss = loss + 0.5 * score.square().sum(1)
        return expand(model.process.sigma(t) ** 2, loss) * loss / x.shape[1]


@dataclass(frozen=True)
class SlicedScoreMatching(ImplicitScoreMatching):
    """E sigma^2 ( 1/2 (v's)^2 + v' (ds/dx) v ) / d, random signs v (Song et al. 2019, arXiv 1905.07088).

    ``probes`` directions a row; None takes the axes, which is the implicit loss. ``variance_reduced``: |s|^2 for
    (v's)^2, its mean, which is the implicit loss with Hutchinson's divergence.
    """

    probes: int | None = 1
    variance_reduced: bool = True


@dataclass(frozen=True)
class ExplicitScoreMatching(Objective):
    """E sigma^2 |s - grad log p_t|^2 / d against an oracle on the same process: the error itself.

    ``oracle`` is the exact score of the law of the rows x, for example one of `finediff.diffusion.exact`.
    """

    oracle: ScoreModel
    times: Times = Times()

    def losses(self, model: ScoreModel, x: Tensor, condition=None, generator=None) -> Tensor:
        t, noise = _draw(self.times, model, x, generator)
        x_t = model.process.perturb(x, t, noise)
        with torch.no_grad():
            wanted = self.oracle.noise(x_t, t, condition)
        return (model.noise(x_t, t, condition) - wanted).square().mean(1)

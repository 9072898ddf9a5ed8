"""What to minimise: every regression loss is sum_k w(t_k) |x0_hat - x_0|^2 in the one currency x0_hat.

    d eps = -(alpha/sigma) d x0,       d v = -(alpha^2 + sigma^2)/sigma d x0,
    d u   = (alpha' - sigma' alpha/sigma) d x0                              (d = error of the reading)

so an eps-, v- or velocity-regression is a choice of w(t): denoising score matching and flow matching are one
objective. The likelihood weighting g^2 |score error|^2 = g^2 alpha^2/sigma^4 |x0 error|^2 is the eps-loss uniform
in log-SNR. Times are drawn by stratified uniforms (u + i/batch mod 1), which costs nothing and cuts variance.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.process import Process, expand
from finediff.diffusion.score import ScoreModel

Weighting = Literal["x0", "eps", "v", "velocity", "likelihood"]
WEIGHTINGS = ("x0", "eps", "v", "velocity", "likelihood")


def weight(process: Process, t: Tensor, weighting: Weighting) -> Tensor:
    """w(t) that turns |x0_hat - x_0|^2 into the squared error of the named reading; shape of t, sigma(t) > 0."""
    alpha, sigma = process.alpha(t), process.sigma(t)
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
    raise ValueError(f"expected a weighting among {WEIGHTINGS}, got {weighting!r}")


@dataclass(frozen=True)
class Times:
    """Law of the training times.

    Parameters
    ----------
    law : {"log_snr", "uniform"}
        Uniform in log-SNR over the process's range (the law of the likelihood), or uniform in t on [t_min, 1].
    stratified : bool
        One draw in each of ``batch`` equal cells instead of independent draws.
    """

    law: str = "log_snr"
    stratified: bool = True

    def __call__(
        self, process: Process, n: int, *, device=None, generator: torch.Generator | None = None
    ) -> Tensor:
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
    noisy, clean = process.log_snr_range()
    u = torch.linspace(0, 1, size, dtype=torch.float64)
    if law == "log_snr":
        return process.time(noisy + u * (clean - noisy))
    if law == "uniform":
        t_min = process.time(clean)
        return t_min + u * (1 - t_min)
    raise ValueError(f"expected a law of times 'log_snr' or 'uniform', got {law!r}")


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """E w(t) |x0_hat(x_t, t) - x_0|^2 / d (Vincent 2011; Ho et al. 2020; Song et al. 2021).

    Parameters
    ----------
    weighting : {"v", "eps", "x0", "velocity", "likelihood"}
        "eps" is L_simple; "likelihood" is g^2 on the score.
    times : Times
    antithetic : bool
        Use every noise with both signs: twice the rows a step, and a regression target of much smaller variance
        (where the law is close to symmetric the two errors largely cancel).
    """

    weighting: Weighting = "eps"
    times: Times = Times()
    antithetic: bool = False

    def __call__(
        self,
        model: ScoreModel,
        x: Tensor,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a batch of rows x (batch, d), a scalar."""
        return self.losses(model, x, condition, generator).mean()

    def losses(
        self,
        model: ScoreModel,
        x: Tensor,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss per row, (batch,) or (2 batch,) where antithetic, with a fresh time and noise for each."""
        t = self.times(model.process, len(x), device=x.device, generator=generator)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x0, noise = self.pair(x, noise, generator)
        if self.antithetic:
            t, x0, noise = t.repeat(2), x0.repeat(2, 1), torch.cat([noise, -noise])
            condition = None if condition is None else condition.repeat(2, 1)
        error = model.denoise(model.process.perturb(x0, t, noise), t, condition) - x0
        return expand(weight(model.process, t, self.weighting), error[:, 0]) * error.square().mean(1)

    def pair(self, x: Tensor, noise: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Which noise goes with which row; independent pairs here."""
        return x, noise


@dataclass(frozen=True)
class FlowMatching(DenoisingScoreMatching):
    """E |u(x_t, t) - (alpha' x_0 + sigma' eps)|^2 / d: regression on the velocity (Lipman et al. 2023).

    On the linear path the target is eps - x_0. Times uniform in t by default, as published.
    """

    weighting: Weighting = "velocity"
    times: Times = Times("uniform")

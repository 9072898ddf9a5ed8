"""How to generate: from x_1 ~ N(0, sigma(1)^2 I) down a decreasing grid of times; the end is E[x_0 | x_tmin].

From t to s < t, with x0 = x0_hat and eps = eps_hat at (x, t):
    DDIM(eta)   x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v^2) eps + eta v z,
                v^2 = (sigma_s^2/sigma_t^2) (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2)       eta = 1: DDPM
    ODE         dx/dt = u(x, t) = alpha' x0 + sigma' eps

A sampler is one `step`; nothing is kept on self; no sampler bounds |x|.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.process import expand
from finediff.diffusion.score import ScoreModel, from_denoised


@dataclass(frozen=True)
class Sampler(ABC):
    """Steps down a grid of times.

    Parameters
    ----------
    steps : int
        Intervals of the grid; the final E[x_0 | x_tmin] is one more network evaluation.
    spacing : str
        See `Process.grid`.
    """

    steps: int = 64
    spacing: str = "log_snr"

    needs_score = True
    evaluations_per_step = 1

    @property
    def evaluations(self) -> int:
        """Network evaluations of one draw."""
        return self.steps * self.evaluations_per_step + 1

    @abstractmethod
    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, memory, *, condition, generator):
        """From x at time t to time s < t (both 0-d float64): returns (x_s, memory)."""

    @torch.no_grad()
    def __call__(
        self,
        model: ScoreModel,
        shape: tuple[int, ...],
        *,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of x_0 of the given shape (n, d), in the model's dtype and on its device."""
        if self.needs_score and not model.score_valid:
            raise ValueError(
                f"{type(self).__name__} expected a model whose score is valid, got one trained under "
                "optimal-transport pairing, for which -eps/sigma is not the score: use ProbabilityFlow"
            )
        process = model.process
        grid = process.grid(self.steps, self.spacing)
        x = torch.randn(shape, dtype=model.dtype, device=model.device, generator=generator)
        x = x * expand(process.sigma(grid[0]), x)
        memory = None
        for t, s in zip(grid[:-1], grid[1:]):
            x, memory = self.step(model, x, t, s, memory, condition=condition, generator=generator)
        return model.denoise(x, grid[-1], condition)


@dataclass(frozen=True)
class DDIM(Sampler):
    """Song, Meng & Ermon 2021 (arXiv 2010.02502): eta = 0 deterministic, eta = 1 ancestral. Order 1."""

    eta: float = 0.0

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process
        x0 = model.denoise(x, t, condition)
        eps = from_denoised(x0, x, t, process, "eps")
        alpha_s, variance = process.alpha(s), process.sigma(s) ** 2
        # (alpha_t sigma_s / (alpha_s sigma_t))^2 = SNR_t/SNR_s; expm1 keeps the small difference exact.
        added = -variance * torch.expm1(process.log_snr(t) - process.log_snr(s)) * self.eta**2
        x = alpha_s.to(x) * x0 + (variance - added).clamp(min=0).sqrt().to(x) * eps
        if self.eta:
            x = x + added.sqrt().to(x) * torch.randn(
                x.shape, dtype=x.dtype, device=x.device, generator=generator
            )
        return x, None


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling (Ho, Jain & Abbeel 2020, arXiv 2006.11239).

    Parameters
    ----------
    variance : {"posterior", "beta"}
        Noise added from t to s: that of q(x_s | x_t, x_0), or the larger sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2
        over the squared share of signal kept. The mean is the same.
    """

    steps: int = 1000
    variance: Literal["posterior", "beta"] = "posterior"

    def step(self, model, x, t, s, memory, *, condition, generator):
        process = model.process
        x0 = model.denoise(x, t, condition)
        eps = from_denoised(x0, x, t, process, "eps")
        fresh = -torch.expm1(process.log_snr(t) - process.log_snr(s))  # 1 - SNR_t/SNR_s
        variance = process.sigma(s) ** 2
        x = process.alpha(s).to(x) * x0 + (variance * (1 - fresh)).sqrt().to(x) * eps
        if self.variance == "posterior":
            added = variance * fresh
        elif self.variance == "beta":
            added = process.sigma(t) ** 2 * fresh
        else:
            raise ValueError(f"expected variance 'posterior' or 'beta', got {self.variance!r}")
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return x + added.sqrt().to(x) * z, None


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE dx/dt = u(x, t) (Song et al. 2021), by a Runge-Kutta method.

    Parameters
    ----------
    method : {"heun", "euler"}
        Orders 2 and 1; Heun takes two network evaluations a step.
    """

    method: Literal["heun", "euler"] = "heun"

    needs_score = False

    @property
    def evaluations(self) -> int:
        return self.steps * {"euler": 1, "heun": 2}[self.method] + 1

    def step(self, model, x, t, s, memory, *, condition, generator):
        h = float(s - t)
        first = model.velocity(x, t, condition)
        if self.method == "euler":
            return x + h * first, None
        if self.method == "heun":
            return x + h / 2 * (first + model.velocity(x + h * first, s, condition)), None
        raise ValueError(f"expected method 'heun' or 'euler', got {self.method!r}")

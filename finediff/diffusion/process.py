"""What noise does: affine Gaussian paths from data (t = 0) to noise (t = 1).

    x_t = alpha(t) x_0 + sigma(t) eps,                     eps ~ N(0, I)
    dx  = f(t) x dt + g(t) dw,       f = alpha'/alpha,     g^2 = (sigma^2)' - 2 f sigma^2
    log-SNR(t) = log(alpha^2 / sigma^2), decreasing in t

A path is two functions, alpha and sigma; everything else derives from them. Every function takes a tensor of any
shape and floating dtype, or a number.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# The default grid's ends: at log-SNR 10 the noise left is .7 % of a unit of scale, at -10 the data left is.
LOG_SNR_MIN, LOG_SNR_MAX = -10.0, 10.0
SPACINGS = ("log_snr", "uniform", "quadratic", "karras")


def as_time(t) -> Tensor:
    """A floating tensor: numbers become float64, tensors are left as they are."""
    return t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshape per-row values (batch,) to broadcast against x (batch, ...), in x's dtype; 0-d stays 0-d."""
    return t.to(x).reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t.to(x)


def normal(x: Tensor, generator: torch.Generator | None, n: int | None = None) -> Tensor:
    """Standard normal draws like x, or like n rows of it."""
    shape = x.shape if n is None else (n, *x.shape[1:])
    return torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)


def require(good, expected: str, got, because: str = "") -> None:
    """Raise ValueError "expected ..., got ...: because" unless good."""
    if not good:
        raise ValueError(f"expected {expected}, got {got}" + (f": {because}" if because else ""))


class Process(ABC):
    """An affine Gaussian path. A subclass defines ``alpha`` and ``sigma``; all else derives."""

    @abstractmethod
    def alpha(self, t) -> Tensor:
        """Share of the data left at time t: alpha(0) = 1, decreasing. Same shape as t."""

    @abstractmethod
    def sigma(self, t) -> Tensor:
        """Standard deviation of the noise at time t: sigma(0) = 0, increasing. Same shape as t."""

    def log_snr(self, t) -> Tensor:
        """log(alpha^2 / sigma^2): +inf at t = 0, -inf where alpha = 0."""
        t = as_time(t)
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def levels(self, t, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) to broadcast against x: t () or (batch,) -> () or (batch, 1, ...), in x's dtype."""
        t = as_time(t)
        return expand(self.alpha(t), x), expand(self.sigma(t), x)

    def rates(self, t) -> tuple[Tensor, Tensor]:
        """(alpha', sigma'), the derivatives in t, by automatic differentiation; no gradient flows through them."""
        with torch.enable_grad():
            s = as_time(t).detach().clone().requires_grad_(True)
            # Each entry depends on its own time alone, so the sum's gradient has them all; 0 s is for constants.
            return tuple(torch.autograd.grad((f(s) + 0 * s).sum(), s)[0] for f in (self.alpha, self.sigma))

    def drift_diffusion(self, t) -> tuple[Tensor, Tensor]:
        """(f, g^2) of dx = f x dt + g dw; infinite where alpha = 0 (t = 1 of Linear, Cosine, Interpolant)."""
        # At t = 0 sigma sigma' is 0 times infinity on most paths; this is its limit, to the last digits.
        t = as_time(t).clamp(min=1e-16)
        d_alpha, d_sigma = self.rates(t)
        sigma = self.sigma(t)
        f = d_alpha / self.alpha(t)
        return f, 2 * sigma * (d_sigma - f * sigma)

    def perturb(self, x0: Tensor, t, noise: Tensor) -> Tensor:
        """x_t for rows x0 (batch, ...) at times t () or (batch,)."""
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * noise

    def radius(self, t) -> Tensor:
        """r = sqrt(alpha^2 + sigma^2), the scale of x_t where that of x_0 is 1."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def angle(self, t) -> Tensor:
        """theta = arctan(sigma/alpha), from 0 (data) to at most pi/2 (noise)."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def time_of_angle(self, theta: Tensor) -> Tensor:
        """The t at which ``angle(t)`` is theta."""
        return self.time(-2 * torch.log(torch.tan(theta)))

    def time(self, log_snr) -> Tensor:
        """The t in [0, 1] where ``log_snr(t)`` has the given value, or the nearer end: bisection to the last bit."""
        target = as_time(log_snr).to(torch.float64)
        low, high, end = torch.zeros_like(target), torch.ones_like(target), torch.ones_like(target)
        for _ in range(80):
            middle = (low + high) / 2
            cleaner = self.log_snr(middle) > target
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return torch.where(self.log_snr(end) >= target, end, high)

    def log_snr_range(self) -> tuple[float, float]:
        """(noisiest, cleanest) log-SNR of the default grid; it does not depend on the number of steps."""
        end = float(self.log_snr(torch.ones((), dtype=torch.float64)))
        return max(end, LOG_SNR_MIN), LOG_SNR_MAX

    def grid(self, steps: int, spacing: str = "log_snr") -> Tensor:
        """Decreasing times t_0 = 1 > ... > t_steps = t_min, shape (steps + 1,), float64; the ends are always the same.

        ``spacing`` "log_snr": equal steps of log-SNR, on which the solvers show their orders on every path. "uniform"
        and "quadratic" in t. "karras": equal steps of (sigma/alpha)^(1/7) (Karras et al. 2022, arXiv 2206.00364).
        """
        require(steps >= 1, "at least 1 step", steps, "use steps=64 for a first try")
        require(spacing in SPACINGS, f"spacing among {SPACINGS}", repr(spacing))
        noisy, clean = self.log_snr_range()
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        if spacing == "log_snr":
            times = self.time(noisy + u * (clean - noisy))
        elif spacing == "karras":
            root = torch.exp(torch.tensor([-noisy, -clean], dtype=torch.float64) / 14)
            times = self.time(-14 * torch.log(root[0] + u * (root[1] - root[0])))
        else:
            power = 1 if spacing == "uniform" else 2
            times = (1 + u * (self.time(clean) ** (1 / power) - 1)) ** power
        times[0] = 1.0
        return times


class _VariancePreserving(Process):
    """alpha = exp(-I/2) and sigma^2 = 1 - alpha^2 (by expm1, which keeps its digits near t = 0), I = int_0^t beta."""

    @abstractmethod
    def _integrated_beta(self, t: Tensor) -> Tensor: ...

    def alpha(self, t) -> Tensor:
        return torch.exp(-self._integrated_beta(as_time(t)) / 2)

    def sigma(self, t) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integrated_beta(as_time(t))))


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min): the limit of DDPM.

    Song et al. 2021, arXiv 2011.13456; Ho et al. 2020, arXiv 2006.11239.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _integrated_beta(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    @staticmethod
    def from_betas(betas) -> DiscreteVP:
        """The path of a discrete DDPM: see `DiscreteVP`, and `linear_betas`, `quadratic_betas`, `cosine_betas`."""
        return DiscreteVP(tuple(float(b) for b in betas))


@dataclass(frozen=True, repr=False)
class DiscreteVP(_VariancePreserving):
    """Variance preserving through the K noise levels of a discrete DDPM, beta constant between them.

    alpha(k/K)^2 = prod_{j<=k} (1 - beta_j) for k = 0..K; ``betas`` is a tuple of K floats in (0, 1).
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        advice = "each is the share of variance replaced by noise in one step; try linear_betas(1000)"
        good = self.betas and all(0 < b < 1 for b in self.betas)
        require(good, "betas in (0, 1)", f"{self.betas[:3]}...", advice)

    def __repr__(self) -> str:
        first, last, left = self.betas[0], self.betas[-1], float(self.alpha(1.0))
        return f"DiscreteVP(<{len(self.betas)} betas from {first:.2g} to {last:.2g}, alpha(1) = {left:.3g}>)"

    def _integrated_beta(self, t: Tensor) -> Tensor:
        table, steps = _integrated_table(self.betas), len(self.betas)
        cell = (t.detach() * steps).floor().long().clamp(0, steps - 1)
        # Differences in float64, then t's dtype: in float32 they would lose the digits that the sums hold.
        start, rate = (values.to(t)[cell] for values in (table, table.diff()))
        return start + (t * steps - cell) * rate


@functools.lru_cache(maxsize=32)
def _integrated_table(betas: tuple[float, ...]) -> Tensor:
    return -torch.log1p(-torch.tensor((0.0, *betas), dtype=torch.float64)).cumsum(0)


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """beta_k from first to last in equal steps (Ho et al. 2020)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def quadratic_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """sqrt(beta_k) in equal steps."""
    return torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """alpha-bar_k = cos^2((k/K + s)/(1 + s) pi/2), beta clipped (Nichol & Dhariwal 2021, arXiv 2102.09672)."""
    k = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((k + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


@dataclass(frozen=True)
class SubVP(VP):
    """alpha as VP, sigma = 1 - alpha^2: less noise than VP at every t (Song et al. 2021)."""

    def sigma(self, t) -> Tensor:
        return -torch.expm1(-self._integrated_beta(as_time(t)))


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max/sigma_min)^(2t) - 1) (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 100.0

    def alpha(self, t) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t) -> Tensor:
        exponent = 2 * math.log(self.sigma_max / self.sigma_min) * as_time(t)
        return self.sigma_min * torch.sqrt(torch.expm1(exponent))


@dataclass(frozen=True)
class OU(Process):
    """Ornstein-Uhlenbeck, dx = -theta x dt + s dw: alpha = exp(-theta t), sigma^2 = s^2/(2 theta) (1 - alpha^2)."""

    theta: float = 5.0
    s: float = math.sqrt(10.0)

    def alpha(self, t) -> Tensor:
        return torch.exp(-self.theta * as_time(t))

    def sigma(self, t) -> Tensor:
        return self.s * torch.sqrt(-torch.expm1(-2 * self.theta * as_time(t)) / (2 * self.theta))


@dataclass(frozen=True)
class Cosine(Process):
    """alpha = cos(pi t/2), sigma = sin(pi t/2) (Nichol & Dhariwal 2021, in continuous time)."""

    def alpha(self, t) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - as_time(t)))  # cos(pi t/2), and exactly 0 at t = 1 in every dtype

    def sigma(self, t) -> Tensor:
        return torch.sin(math.pi / 2 * as_time(t))


@dataclass(frozen=True)
class Linear(Process):
    """alpha = 1 - t, sigma = t: flow matching and rectified flow (Lipman et al. 2023, arXiv 2210.02747)."""

    def alpha(self, t) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t) -> Tensor:
        return as_time(t) + 0.0


@dataclass(frozen=True)
class Interpolant(Linear):
    """(1 - t) x_0 + t z + sqrt(t (1 - t)) xi with Gaussian z and xi: one Gaussian of variance t in all.

    So the stochastic interpolant of Albergo et al. (2023, arXiv 2303.08797) IS alpha = 1 - t, sigma = sqrt(t).
    The target z - x_0 leaves out the derivative of the xi term and is biased; the velocity here is not.
    """

    def sigma(self, t) -> Tensor:
        return torch.sqrt(as_time(t))

"""A Gaussian law along a path, and what all exact models share.

    x_0 ~ N(m, S),  S = U diag(l) U^T:      x_t ~ N(alpha m, U diag(c) U^T),   c = alpha^2 l + sigma^2
    E[x_0|x_t] = m + U (alpha l / c) z      score = -U (z / c)                 z = U^T (x_t - alpha m)

The score is written without a division by sigma, so it holds at t = 0 as well. A direction without variance
(l = 0) has no density at t = 0: there c is kept at roundoff, eps^2 times the largest l, and E[x_0|x_t]
becomes the projection on the support.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from finediff.diffusion.process import Process, as_time, expand
from finediff.diffusion.score import ScoreModel


class ExactScore(ScoreModel, ABC):
    """A `ScoreModel` whose law is known: its density at every t, and exact draws."""

    @abstractmethod
    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        """log p_t(x), in nats, (batch,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws of x_0, (n, d)."""

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return -self._levels(t, x)[1] * self.score(x, t, condition)

    def _levels(self, t, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), () or (batch, 1)."""
        t = as_time(t)
        return expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)


def as_floating(value, like: Tensor | None = None) -> Tensor:
    """A copy as a tensor: of `like`'s dtype and device if given, else of its own floating dtype or float64."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.array(value, order="C"))
    if like is None:
        like = value if value.is_floating_point() else value.double()
    return value.detach().to(like, copy=True)


def as_shape(name: str, value, shape: tuple[int, ...], like: Tensor) -> Tensor:
    value = as_floating(value, like)
    if value.shape != shape:
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"expected finite {name}, got NaN or infinity: clean the panel first")
    return value


def as_weights(weights, count: int, like: Tensor) -> Tensor:
    """Probabilities (count,): non-negative, sum 1."""
    weights = as_shape("weights", weights, (count,), like)
    if (weights < 0).any() or not abs(weights.sum() - 1) < 1e-4:
        raise ValueError(
            f"expected weights >= 0 of sum 1, got the smallest {weights.min():.3g} and the sum "
            f"{weights.sum():.6g}: they are probabilities, divide them by their sum"
        )
    return weights / weights.sum()


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d) and eigenvectors (..., d, d) of covariances (..., d, d); raises unless they are ones."""
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"expected a covariance of shape (d, d), got {tuple(covariance.shape)}")
    if not covariance.isfinite().all():
        raise ValueError("expected a finite covariance, got NaN or infinity: clean the panel first")
    if covariance.numel() == 0:
        return covariance.new_zeros(covariance.shape[:-1]), covariance
    # Half the digits: the sample covariance of a float32 panel is positive and symmetric only up to roundoff.
    tolerance = torch.finfo(covariance.dtype).eps ** 0.5
    asymmetry = (covariance - covariance.mT).abs().amax()
    if asymmetry > tolerance * covariance.abs().amax():
        raise ValueError(f"expected a symmetric covariance, got an asymmetry of {asymmetry:.3g}")
    values, vectors = torch.linalg.eigh(covariance)
    if (values[..., 0] < -tolerance * values[..., -1].abs()).any():
        raise ValueError(
            f"expected a positive semidefinite covariance, got an eigenvalue {values[..., 0].min():.3g}"
        )
    rounding = covariance.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    return values.where(values > rounding, 0.0), vectors


def noised(variances: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha^2 variances + sigma^2, never below roundoff of the largest variance."""
    number = torch.finfo(variances.dtype)
    return (alpha**2 * variances + sigma**2).clamp(min=number.tiny + number.eps**2 * variances.amax())


def log_normal(z: Tensor, variance: Tensor) -> Tensor:
    """log N(z; 0, diag(variance)), summed over the last axis."""
    return -0.5 * (z**2 / variance + torch.log(2 * torch.pi * variance)).sum(-1)


class GaussianScore(ExactScore):
    """The exact model of x_0 ~ N(mean, covariance): the Wiener filter (Wiener 1949).

    Parameters
    ----------
    mean : (d,)
    covariance : (d, d), symmetric positive semidefinite
    process : Process
    """

    def __init__(self, mean, covariance, process: Process) -> None:
        super().__init__()
        covariance = as_floating(covariance)
        if covariance.ndim != 2:
            raise ValueError(f"expected a covariance of shape (d, d), got {tuple(covariance.shape)}")
        eigenvalues, eigenvectors = eigen(covariance)
        self.process = process
        self.register_buffer("mean", as_shape("a mean", mean, covariance.shape[:1], covariance))
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("eigenvectors", eigenvectors)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = self._levels(t, x)
        gain = alpha * self.eigenvalues / noised(self.eigenvalues, alpha, sigma)
        return self.mean + ((x - alpha * self.mean) @ self.eigenvectors * gain) @ self.eigenvectors.T

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = self._levels(t, x)
        z = (x - alpha * self.mean) @ self.eigenvectors
        return -(z / noised(self.eigenvalues, alpha, sigma)) @ self.eigenvectors.T

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        alpha, sigma = self._levels(t, x)
        z = (x - alpha * self.mean) @ self.eigenvectors
        return log_normal(z, noised(self.eigenvalues, alpha, sigma))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, len(self.mean), dtype=self.dtype, device=self.device, generator=generator)
        return self.mean + (z * self.eigenvalues.sqrt()) @ self.eigenvectors.T

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

from finediff.diffusion.process import Process, normal, require
from finediff.diffusion.score import ScoreModel


class ExactScore(ScoreModel, ABC):
    """A `ScoreModel` whose law is known: its density at every t, and exact draws."""

    def __init__(self, process: Process, **buffers: Tensor) -> None:
        super().__init__()
        self.process = process
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @abstractmethod
    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        """log p_t(x), in nats, (batch,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws of x_0, (n, d)."""

    def noise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return -self.process.levels(t, x)[1] * self.score(x, t, condition)


def as_floating(value, like: Tensor | None = None) -> Tensor:
    """A copy as a tensor: of `like`'s dtype and device if given, else of its own floating dtype or float64."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.array(value, order="C"))
    if like is None:
        like = value if value.is_floating_point() else value.double()
    return value.detach().to(like, copy=True)


def as_shape(name: str, value, shape: tuple[int, ...], like: Tensor) -> Tensor:
    value = as_floating(value, like)
    require(value.shape == shape, f"{name} of shape {tuple(shape)}", tuple(value.shape))
    require(value.isfinite().all(), f"finite {name}", "NaN or infinity", "clean the panel first")
    return value


def as_weights(weights, count: int, like: Tensor) -> Tensor:
    """Probabilities (count,): non-negative, sum 1."""
    weights = as_shape("weights", weights, (count,), like)
    found = f"the smallest {weights.min():.3g} and the sum {weights.sum():.6g}"
    good = (weights >= 0).all() and abs(weights.sum() - 1) < 1e-4
    require(good, "weights >= 0 of sum 1", found, "they are probabilities, divide them by their sum")
    return weights / weights.sum()


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d) and eigenvectors (..., d, d) of covariances (..., d, d); raises unless they are ones."""
    square = covariance.ndim >= 2 and covariance.shape[-1] == covariance.shape[-2]
    require(square, "a covariance of shape (d, d)", tuple(covariance.shape))
    require(covariance.isfinite().all(), "a finite covariance", "NaN or infinity", "clean the panel first")
    if covariance.numel() == 0:
        return covariance.new_zeros(covariance.shape[:-1]), covariance
    # Half the digits: the sample covariance of a float32 panel is positive and symmetric only up to roundoff.
    epsilon = torch.finfo(covariance.dtype).eps
    asymmetry = (covariance - covariance.mT).abs().amax()
    symmetric = asymmetry <= epsilon**0.5 * covariance.abs().amax()
    require(symmetric, "a symmetric covariance", f"an asymmetry of {asymmetry:.3g}")
    values, vectors = torch.linalg.eigh(covariance)
    least, largest = values[..., :1], values[..., -1:]
    positive = (least >= -(epsilon**0.5) * largest.abs()).all()
    require(positive, "a positive semidefinite covariance", f"an eigenvalue {least.min():.3g}")
    return values.where(values > covariance.shape[-1] * epsilon * largest, 0.0), vectors


def as_mixture(weights, means, covariances, d: str = "d") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights (M,), means (M, d), covariances (M, d, d) and their eigenvalues and eigenvectors."""
    covariances = as_floating(covariances)
    good = covariances.ndim == 3 and len(covariances) > 0
    require(good, f"covariances of shape (M, {d}, {d}), one a component", tuple(covariances.shape))
    values, vectors = eigen(covariances)
    weights = as_weights(weights, len(covariances), covariances)
    return weights, as_shape("means", means, covariances.shape[:2], covariances), covariances, values, vectors


def noised(variances: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha^2 variances + sigma^2, never below roundoff of the largest variance."""
    number = torch.finfo(variances.dtype)
    return (alpha**2 * variances + sigma**2).clamp(min=number.tiny + number.eps**2 * variances.amax())


def log_normal(z: Tensor, variance: Tensor) -> Tensor:
    """log N(z; 0, diag(variance)), summed over the last axis."""
    return -0.5 * (z**2 / variance + torch.log(2 * torch.pi * variance)).sum(-1)


class GaussianScore(ExactScore):
    """The exact model of x_0 ~ N(mean, covariance): the Wiener filter (Wiener 1949).

    ``mean`` (d,), ``covariance`` (d, d) symmetric positive semidefinite.
    """

    def __init__(self, mean, covariance, process: Process) -> None:
        covariance = as_floating(covariance)
        require(covariance.ndim == 2, "a covariance of shape (d, d)", tuple(covariance.shape))
        values, vectors = eigen(covariance)
        mean = as_shape("a mean", mean, covariance.shape[:1], covariance)
        super().__init__(process, mean=mean, eigenvalues=values, eigenvectors=vectors)

    def _components(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, z and c."""
        alpha, sigma = self.process.levels(t, x)
        z = (x - alpha * self.mean) @ self.eigenvectors
        return alpha, z, noised(self.eigenvalues, alpha, sigma)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, z, variance = self._components(x, t)
        return self.mean + (z * (alpha * self.eigenvalues / variance)) @ self.eigenvectors.T

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        _, z, variance = self._components(x, t)
        return -(z / variance) @ self.eigenvectors.T

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        return log_normal(*self._components(x, t)[1:])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = normal(self.mean[None], generator, n)
        return self.mean + (z * self.eigenvalues.sqrt()) @ self.eigenvectors.T

"""Laws of the factors of a linear factor model, seen through noise whose covariance is a matrix.

f = alpha F + N(0, gamma)
MixtureFactors   F ~ sum_m w_m N(mean_m, S_m):   any Gaussian mixture; one Cholesky factor a component
ScaleFactors     F = sqrt(v) N(0, I), P(v = v_m) = w_m:   gamma = V diag(g) V^T diagonalises every component,
                 c_m = alpha^2 v_m + g,  h = V^T f,  E[F|f] = V (h o sum_m P(v_m|f) alpha v_m / c_m)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from finediff.diffusion.exact.gaussian import as_floating, as_mixture, as_weights
from finediff.diffusion.exact.mixture import draw_mixture
from finediff.diffusion.process import normal, require


def apply_rows(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (..., k, k), broadcast, times vectors (..., k)."""
    return torch.einsum("...kl,...l->...k", matrix, vector)


class FactorLaw(nn.Module, ABC):
    """The law of the factors F in R^k, seen through f = alpha F + N(0, gamma).

    The noise is the matrix gamma (k, k) or (batch, k, k), not a multiple of I: a network should whiten f by it.
    """

    @abstractmethod
    def denoise(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        """E[F | f], (batch, k), for f (batch, k), alpha () or (batch, 1); t is the time that alpha belongs to."""

    @abstractmethod
    def log_prob(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        """log density of alpha F + N(0, gamma) at f, (batch,)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of F, (n, k)."""

    def observe(self, n: int, gamma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws of F + N(0, gamma), (n, k): what can be seen of the factors."""
        f = self.sample(n, generator)
        return f + normal(f, generator) @ torch.linalg.cholesky(gamma).T


class MixtureFactors(FactorLaw):
    """F ~ sum_m w_m N(means_m, covariances_m): Gaussian factors (one component), regimes, heavy tails.

    ``weights`` (M,) non-negative of sum 1, ``means`` (M, k), ``covariances`` (M, k, k) positive semidefinite.
    """

    def __init__(self, weights, means, covariances) -> None:
        super().__init__()
        weights, means, covariances, values, vectors = as_mixture(weights, means, covariances, "k")
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.register_buffer("roots", vectors * values.sqrt()[:, None, :])
        self.k = means.shape[1]

    @classmethod
    def gaussian(cls, mean, covariance) -> MixtureFactors:
        """F ~ N(mean, covariance)."""
        covariance = as_floating(covariance)
        return cls([1.0], as_floating(mean, covariance)[None], covariance[None])

    @classmethod
    def scales(cls, scales, weights, mean, covariance) -> MixtureFactors:
        """F = mean + sqrt(v) N(0, covariance), P(v = scales_m) = weights_m: the factors alone have heavy tails."""
        covariance = as_floating(covariance)
        scales = as_floating(scales, covariance)
        means = as_floating(mean, covariance).expand(len(scales), -1)
        return cls(weights, means, scales[:, None, None] * covariance)

    def _components(self, f: Tensor, alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """C_m^-1 (f - alpha mean_m) (batch, M, k), C_m = alpha^2 S_m + gamma, and log w_m N(f; ..., C_m)."""
        alpha = alpha[..., None]
        spread = alpha[..., None] ** 2 * self.covariances + gamma[..., None, :, :]
        root = torch.linalg.cholesky(spread)
        delta = f[:, None] - alpha * self.means
        solved = apply_rows(torch.cholesky_inverse(root), delta)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + f.shape[1] * math.log(2 * math.pi)
        return solved, self.weights.log() - 0.5 * ((delta * solved).sum(-1) + log_det)

    def denoise(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        solved, joint = self._components(f, alpha, gamma)
        each = self.means + alpha[..., None] * apply_rows(self.covariances, solved)
        return (joint.softmax(1)[:, :, None] * each).sum(1)

    def log_prob(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        return self._components(f, alpha, gamma)[1].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return draw_mixture(self.weights, self.means, self.roots, n, generator)


class ScaleFactors(FactorLaw):
    """F = sqrt(v) N(0, I_k), P(v = scales_m) = weights_m: one volatility of the day for all factors.

    ``scales`` (M,) positive, ``weights`` (M,) non-negative of sum 1, ``k`` the number of factors. Factors of another
    covariance are these with other loadings.
    """

    def __init__(self, scales, weights, k: int) -> None:
        super().__init__()
        scales = as_floating(scales)
        good = scales.ndim == 1 and len(scales) > 0 and ((scales > 0) & scales.isfinite()).all()
        require(good, "positive finite scales of shape (M,)", scales, "they multiply the variance")
        self.register_buffer("scales", scales)
        self.register_buffer("weights", as_weights(weights, len(scales), scales))
        self.k = k

    def _components(self, f: Tensor, alpha: Tensor, gamma: Tensor):
        """V (1 or batch, k, k), h (batch, k), c (1 or batch, M, k) and log w_m N(f; 0, C_m) (batch, M)."""
        gamma = gamma if gamma.ndim == 3 else gamma[None]
        scales, weights = self.scales.to(f), self.weights.to(f)
        noise, V = torch.linalg.eigh(gamma) if self.k else (gamma.diagonal(dim1=1, dim2=2), gamma)
        h = torch.einsum("...kl,...k->...l", V, f)
        c = alpha.reshape(-1, 1, 1) ** 2 * scales[:, None] + noise[:, None, :]
        if len(c) == 1:
            quadratic = h**2 @ (1 / c[0]).T
        else:
            quadratic = torch.einsum("bk,bmk->bm", h**2, 1 / c)
        log_det = c.log().sum(-1) + self.k * math.log(2 * math.pi)
        return V, h, c, weights.log() - 0.5 * (quadratic + log_det)

    def _average(self, P: Tensor, values: Tensor) -> Tensor:
        """sum_m P(v_m | f) values_m: (batch, k)."""
        return P @ values[0] if len(values) == 1 else torch.einsum("bm,bmk->bk", P, values)

    def denoise(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        V, h, c, joint = self._components(f, alpha, gamma)
        gain = self._average(joint.softmax(1), alpha.reshape(-1, 1, 1) * self.scales.to(f)[:, None] / c)
        return apply_rows(V, h * gain)

    def moments(self, f: Tensor, alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score (batch, k); E[C^-1 | f]^1/2 f (batch, k), of about unit variance; E[log v | f] (batch,)."""
        V, h, c, joint = self._components(f, alpha, gamma)
        P = joint.softmax(1)
        precision, day = self._average(P, 1 / c), P @ self.scales.to(f).log()
        return -apply_rows(V, h * precision), apply_rows(V, h * precision.sqrt()), day

    def log_prob(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        return self._components(f, alpha, gamma)[3].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        m = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.scales[m, None].sqrt() * normal(self.scales.new_empty(n, self.k), generator)

    def sample_posterior(self, f: Tensor, alpha: Tensor, gamma: Tensor, generator=None) -> Tensor:
        """One exact draw of F given f for each row, (batch, k): a scale from its posterior, then a Gaussian."""
        V, h, c, joint = self._components(f, alpha, gamma)
        m = torch.multinomial(joint.softmax(1), 1, generator=generator)[:, 0]
        c = c[0, m] if len(c) == 1 else c[torch.arange(len(f)), m]
        v = self.scales[m, None]
        noise = c - alpha.reshape(-1, 1) ** 2 * v
        drawn = alpha.reshape(-1, 1) * v / c * h + (v * noise / c).clamp(min=0).sqrt() * normal(h, generator)
        return apply_rows(V, drawn)

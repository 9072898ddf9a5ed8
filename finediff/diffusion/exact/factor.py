"""A linear factor model along a path: only the k-dimensional law of the factors needs to be known.

    R = m + B F + e,   F in R^k,   e ~ N(0, D), D diagonal:   R_t = alpha R + sigma eps
    Lambda = alpha^2 D + sigma^2 I (diagonal),   Gamma = (B^T Lambda^-1 B)^-1 (k x k),   r = R_t - alpha m
    f_hat = Gamma B^T Lambda^-1 r = alpha F + N(0, Gamma):  all that R_t says about F
    F_hat = E[F | f_hat],  from the law of the factors
    score    = -Lambda^-1 (r - alpha B F_hat)
    E[R|R_t] = m + B F_hat + alpha D Lambda^-1 (r - alpha B F_hat)
    log p_t  = log p_fac(f_hat) + 1/2 log|2 pi Gamma| - 1/2 log|2 pi Lambda|
               - 1/2 (r - B f_hat)^T Lambda^-1 (r - B f_hat)

With grad log p_fac = -Gamma^-1 (f_hat - alpha F_hat) the score is that of the paper; this form divides by neither
alpha nor sigma.
No d x d matrix appears: batch x d x k at one time t, batch x d x k^2 where each row has its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from finediff.diffusion.exact.gaussian import ExactScore, as_floating, as_mixture, as_shape
from finediff.diffusion.exact.mixture import draw_mixture
from finediff.diffusion.process import Process, normal, require


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
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
        solved = _apply(torch.cholesky_inverse(root), delta)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + f.shape[1] * math.log(2 * math.pi)
        return solved, self.weights.log() - 0.5 * ((delta * solved).sum(-1) + log_det)

    def denoise(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        solved, joint = self._components(f, alpha, gamma)
        each = self.means + alpha[..., None] * _apply(self.covariances, solved)
        return (joint.softmax(1)[:, :, None] * each).sum(1)

    def log_prob(self, f: Tensor, t, alpha: Tensor, gamma: Tensor) -> Tensor:
        return self._components(f, alpha, gamma)[1].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return draw_mixture(self.weights, self.means, self.roots, n, generator)


class FactorScore(ExactScore):
    """The exact model of R = mean + B F + e (Chen, Xu, Xu & Zhang 2025, arXiv 2504.06566).

    Parameters
    ----------
    loadings : (d, k)
        B, of full column rank; k = 0 (independent assets) and k = d are fine.
    idiosyncratic_variance : (d,), positive
        The diagonal of D.
    process : Process
    factors, mean : FactorLaw, (d,), optional
        The law of F and m. Default: N(0, I) and 0.
    """

    def __init__(
        self,
        loadings,
        idiosyncratic_variance,
        process: Process,
        *,
        factors: FactorLaw | None = None,
        mean=None,
    ) -> None:
        loadings = as_floating(loadings)
        require(loadings.ndim == 2, "loadings of shape (d, k)", tuple(loadings.shape))
        loadings = as_shape("loadings", loadings, loadings.shape, loadings)
        d, k = loadings.shape
        variance = as_shape("an idiosyncratic variance", idiosyncratic_variance, (d,), loadings)
        advice = (
            "an asset without noise of its own makes them singular; give it a little, or use GaussianScore"
        )
        require((variance > 0).all(), "positive idiosyncratic variances", f"{variance.min():.3g}", advice)
        full = k == 0 or torch.linalg.matrix_rank(loadings / variance.sqrt()[:, None]) == k
        advice = "drop the factors that repeat others"
        require(full, f"loadings of full column rank {k}", "a lower one", advice)
        mean = as_shape("a mean", torch.zeros(d) if mean is None else mean, (d,), loadings)
        super().__init__(process, loadings=loadings, idiosyncratic_variance=variance, mean=mean)
        if factors is None:
            factors = MixtureFactors.gaussian(loadings.new_zeros(k), torch.eye(k).to(loadings))
        self.factors = factors

    def _project(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r (batch, d), alpha, diag Lambda (d,) or (batch, d), f_hat (batch, k), Gamma (k, k) or (batch, k, k)."""
        alpha, sigma = self.process.levels(t, x)
        r = x - alpha * self.mean
        noise = alpha**2 * self.idiosyncratic_variance + sigma**2
        precision = (self.loadings.T / noise[..., None, :]) @ self.loadings
        gamma = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return r, alpha, noise, _apply(gamma, (r / noise) @ self.loadings), gamma

    def _residual(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda^-1 (r - alpha B F_hat), which is minus the score, B F_hat and alpha."""
        r, alpha, noise, f, gamma = self._project(x, t)
        common = self.factors.denoise(f, t, alpha, gamma) @ self.loadings.T
        return (r - alpha * common) / noise, common, alpha

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        residual, common, alpha = self._residual(x, t)
        return self.mean + common + alpha * self.idiosyncratic_variance * residual

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        return -self._residual(x, t)[0]

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        r, alpha, noise, f, gamma = self._project(x, t)
        residual = r - f @ self.loadings.T
        complement = (residual**2 / noise + torch.log(2 * torch.pi * noise)).sum(-1)
        determinant = torch.logdet(2 * torch.pi * gamma)
        return self.factors.log_prob(f, t, alpha, gamma) + 0.5 * (determinant - complement)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        common = self.factors.sample(n, generator) @ self.loadings.T
        return self.mean + common + normal(common, generator) * self.idiosyncratic_variance.sqrt()

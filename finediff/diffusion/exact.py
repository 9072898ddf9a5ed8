"""What is known: models whose E[x_0 | x_t] is a formula. Oracles of the tests, bases of the generators.

Gaussian    x_0 ~ N(m, S):   E[x_0|x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha m)
"""

from __future__ import annotations

import torch
from torch import Tensor

from finediff.diffusion.process import Process, as_time, expand
from finediff.diffusion.score import ScoreModel


class GaussianScore(ScoreModel):
    """The exact model of x_0 ~ N(mean, covariance).

    Parameters
    ----------
    mean : (d,)
    covariance : (d, d), symmetric positive semidefinite
    process : Process
    """

    def __init__(self, mean, covariance, process: Process) -> None:
        super().__init__()
        covariance = torch.as_tensor(covariance)
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"expected a covariance of shape (d, d), got {tuple(covariance.shape)}")
        mean = torch.as_tensor(mean, dtype=covariance.dtype)
        if mean.shape != covariance.shape[:1]:
            raise ValueError(
                f"expected a mean of shape {tuple(covariance.shape[:1])}, got {tuple(mean.shape)}"
            )
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        if eigenvalues[0] < -1e-8 * eigenvalues[-1].abs():
            raise ValueError(
                f"expected a positive semidefinite covariance, got an eigenvalue {eigenvalues[0]:.3g}"
            )
        self.process = process
        self.register_buffer("mean", mean)
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0))
        self.register_buffer("eigenvectors", eigenvectors)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = (expand(value(as_time(t)), x) for value in (self.process.alpha, self.process.sigma))
        gain = alpha * self.eigenvalues / (alpha**2 * self.eigenvalues + sigma**2)
        return self.mean + ((x - alpha * self.mean) @ self.eigenvectors * gain) @ self.eigenvectors.T

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        """log p_t(x), (batch,)."""
        alpha, sigma = (expand(value(as_time(t)), x) for value in (self.process.alpha, self.process.sigma))
        variance = alpha**2 * self.eigenvalues + sigma**2
        z = (x - alpha * self.mean) @ self.eigenvectors
        return -0.5 * (z**2 / variance + torch.log(2 * torch.pi * variance)).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws of x_0, (n, d)."""
        z = torch.randn(n, len(self.mean), dtype=self.dtype, device=self.device, generator=generator)
        return self.mean + (z * self.eigenvalues.sqrt()) @ self.eigenvectors.T

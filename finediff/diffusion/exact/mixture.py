"""Finite mixtures along a path: Gaussian components, and the rows of a panel.

    x_0 ~ sum_m w_m N(m_m, S_m):     P(m | x) = softmax_m [ log w_m + log N(x; alpha m_m, alpha^2 S_m + sigma^2 I) ]
    E[x_0 | x_t = x] = sum_m P(m | x) E[x_0 | x, m],      score = sum_m P(m | x) score_m(x)

    x_0 = x_i, i uniform on 1..n:    P(i | x) = softmax_i( -|x - alpha x_i|^2 / (2 sigma^2) )
    E[x_0 | x_t = x] = sum_i P(i | x) x_i

The second is the first with S_m = 0, and the exact minimiser of the training loss on the rows x_i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finediff.diffusion.exact.gaussian import (
    ExactScore,
    as_floating,
    as_mixture,
    as_shape,
    log_normal,
    noised,
)
from finediff.diffusion.process import Process, normal, require


def draw_mixture(weights: Tensor, means: Tensor, roots: Tensor, n: int, generator) -> Tensor:
    """n draws of sum_m w_m N(means_m, roots_m roots_m^T): (M,), (M, d), (M, d, d) -> (n, d)."""
    component = torch.multinomial(weights, n, replacement=True, generator=generator)
    z, draws = normal(means, generator, n), means[component]
    for m in component.unique():
        rows = component == m
        draws[rows] += z[rows] @ roots[m].T
    return draws


class MixtureScore(ExactScore):
    """The exact model of a Gaussian mixture (Shah, Chen & Klivans 2023, arXiv 2307.01178).

    ``weights`` (M,) non-negative of sum 1, ``means`` (M, d), ``covariances`` (M, d, d) positive semidefinite.
    """

    def __init__(self, weights, means, covariances, process: Process) -> None:
        weights, means, _, values, vectors = as_mixture(weights, means, covariances)
        super().__init__(process, weights=weights, means=means, eigenvalues=values, eigenvectors=vectors)

    def _components(self, x: Tensor, t) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, z = U_m^T (x - alpha m_m), its variances and log w_m N(x; ...): (batch, M, d) and (batch, M)."""
        alpha, sigma = self.process.levels(t, x[:, None])
        z = torch.einsum("bmd,mde->bme", x[:, None] - alpha * self.means, self.eigenvectors)
        variance = noised(self.eigenvalues, alpha, sigma)
        return alpha, z, variance, self.weights.log() + log_normal(z, variance)

    def posterior(self, x: Tensor, t) -> Tensor:
        """P(m | x_t = x), (batch, M)."""
        return self._components(x, t)[3].softmax(1)

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, z, variance, joint = self._components(x, t)
        weights = joint.softmax(1)
        z = weights[:, :, None] * (alpha * self.eigenvalues / variance) * z
        return weights @ self.means + torch.einsum("bme,mde->bd", z, self.eigenvectors)

    def score(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        _, z, variance, joint = self._components(x, t)
        return -torch.einsum("bme,mde->bd", joint.softmax(1)[:, :, None] * z / variance, self.eigenvectors)

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        return self._components(x, t)[3].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        roots = self.eigenvectors * self.eigenvalues.sqrt()[:, None, :]
        return draw_mixture(self.weights, self.means, roots, n, generator)


class EmpiricalScore(ExactScore):
    """The exact model of the rows themselves: the minimiser of the training loss (Gu et al. 2023, arXiv 2310.02664).

    It memorises: its samples are training rows. As sigma -> 0, E[x_0|x_t] is the nearest row (at t = 0 exactly);
    the score, the noise and ``log_prob`` need sigma > 0.

    ``rows`` (n, d) are taken ``chunk`` at a time: memory is batch x chunk, whatever n is.
    """

    def __init__(self, rows, process: Process, *, chunk: int = 2048) -> None:
        rows = as_floating(rows)
        require(rows.ndim == 2 and rows.numel() > 0, "rows of shape (n, d)", tuple(rows.shape))
        require(chunk >= 1, "a chunk of at least 1 row", chunk, "use chunk=2048")
        rows = as_shape("rows", rows, rows.shape, rows)
        # Centred rows: energies are differences of products, and a common offset would cost them digits.
        super().__init__(process, mean=rows.mean(0), centred=rows - rows.mean(0))
        self.chunk = chunk

    def _energies(self, x: Tensor, alpha: Tensor):
        """Chunks of rows, with (|x - alpha x_i|^2 - |x - alpha mean|^2)/2, (batch, chunk): no row's |x|^2 in it."""
        x = alpha * (x - alpha * self.mean)
        for rows in self.centred.split(self.chunk):
            yield rows, alpha**2 * (rows**2).sum(1) / 2 - x @ rows.T

    def denoise(self, x: Tensor, t, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.levels(t, x)
        variance = (sigma**2).clamp(min=torch.finfo(x.dtype).tiny)
        lowest = torch.full_like(x[:, :1], math.inf)
        total, weighted = torch.zeros_like(lowest), torch.zeros_like(x)
        for rows, energy in self._energies(x, alpha):
            now = torch.minimum(lowest, energy.amin(1, keepdim=True))
            shrink, weights = (torch.exp((now - value) / variance) for value in (lowest, energy))
            total = shrink * total + weights.sum(1, keepdim=True)
            weighted = shrink * weighted + weights @ rows
            lowest = now
        return self.mean + weighted / total

    def log_prob(self, x: Tensor, t=0.0) -> Tensor:
        alpha, sigma = self.process.levels(t, x)
        inner = [torch.logsumexp(-e / sigma**2, 1) for _, e in self._energies(x, alpha)]
        base = log_normal(x - alpha * self.mean, (sigma**2).expand_as(x))
        return torch.stack(inner, 1).logsumexp(1) - math.log(len(self.centred)) + base

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        index = torch.randint(len(self.centred), (n,), device=self.device, generator=generator)
        return self.mean + self.centred[index]

"""Exact moments of features of a noisy row, by matrix products only.

    x = alpha x_i + sigma z,   z ~ N(0, I),      a_j = <w_j, x> + b_j ~ N(mu_ij, s_j^2),   s_j = sigma |w_j|
    G  = (1/n) sum_i E[phi(a_j) phi(a_k)] = sum_p rho_jk^p (A_p' A_p)_jk / n                        (Mehler)
    E[phi z'] = mean_i(A_1) w_j/|w_j|,   E[phi x_0'] = A_0' X / n,   E[phi x'] = alpha E[phi x_0'] + sigma E[phi z']

The correlation rho_jk of two pre-activations is the cosine of w_j and w_k, the same for every row, so G costs n h^2
a term instead of n h^2 Q^2 evaluations of phi. For cos the even and the odd terms of the series sum:

    G = 1/2 [ exp(-s^2|w_j - w_k|^2/2) o (C'C + S'S) + exp(-s^2|w_j + w_k|^2/2) o (C'C - S'S) ] / n,   C, S = cos, sin(mu)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finediff.diffusion.closed_form.hermite import Activation, expand


def correlations(weights: Tensor) -> Tensor:
    """rho_jk = <w_j, w_k>/(|w_j||w_k|) of weights (..., h, d): (..., h, h), diagonal 1; 0 beside a zero row."""
    unit = directions(weights)
    rho = (unit @ unit.mT).clamp(-1, 1)
    return rho + torch.diag_embed(1 - rho.diagonal(dim1=-2, dim2=-1)).detach()


def directions(weights: Tensor) -> Tensor:
    """w_j/|w_j| (..., h, d), 0 for a zero row."""
    square = weights.square().sum(-1, keepdim=True)
    return weights * torch.where(square > 0, square, 1).rsqrt()


def gram(
    means: Tensor,
    scales: Tensor,
    weights: Tensor,
    activation: Activation = "cos",
    terms: int = 12,
    nodes: int = 32,
) -> Tensor:
    """G = (1/n) sum_i E[phi(a_ij) phi(a_ik)] over rows and Gaussian noise, (..., h, h), positive semidefinite.

    Exact for "cos"; for the others Mehler's series cut at ``terms``. Each of its terms is a Schur product of
    positive semidefinite matrices, and so is every cut; what is cut off is positive semidefinite too. Where
    E[phi^2] is at hand ("relu", and the quadrature's own for "tanh", "silu", "softplus") the diagonal is exact:
    by Bessel's inequality that adds a non-negative diagonal.

    Parameters
    ----------
    means, scales, activation, terms, nodes
        As in `coefficients`; leading axes are noise levels, folds or windows.
    weights : (..., h, d)
        Rows w_j; only their directions are used. A zero row is a constant feature.

    References
    ----------
    Lesniewski and Trigila (2025) compute each entry by two-dimensional Gauss-Hermite; Mehler (1866).
    """
    rho = correlations(weights)
    if activation == "cos":
        return _cos_gram(torch.cos(means), torch.sin(means), scales, rho)
    return _mehler_gram(*expand(means, scales, activation, terms, nodes), rho)


def _cos_gram(cos: Tensor, sin: Tensor, scales: Tensor, rho: Tensor) -> Tensor:
    square, product = scales.square(), scales[..., :, None] * scales[..., None, :]
    # s^2 |w_j -+ w_k|^2 / 2; roundoff may make the first negative.
    both, cross = (square[..., :, None] + square[..., None, :]) / 2, rho * product
    near, far = torch.exp(-(both - cross).clamp(min=0)), torch.exp(-(both + cross).clamp(min=0))
    even, odd = cos.mT @ cos, sin.mT @ sin
    return ((near + far) * even + (near - far) * odd) / (2 * cos.shape[-2])


def _mehler_gram(found: list[Tensor], second: Tensor | None, rho: Tensor) -> Tensor:
    n = found[0].shape[-2]
    total = found[-1].mT @ found[-1]
    for a in found[-2::-1]:
        total = a.mT @ a + rho * total
    total = total / n
    if second is None:
        return total
    missing = (second - total.diagonal(dim1=-2, dim2=-1)).clamp(min=0)
    return total + torch.diag_embed(missing)


@dataclass(frozen=True)
class Cross:
    """Means over rows and noise: E[phi z'], E[phi x_0'], E[phi x'] (..., h, d), and E[phi] (..., h)."""

    noise: Tensor
    data: Tensor
    state: Tensor
    mean: Tensor


def cross(
    means: Tensor,
    scales: Tensor,
    weights: Tensor,
    x: Tensor,
    alpha,
    sigma,
    activation: Activation = "cos",
    nodes: int = 32,
) -> Cross:
    """First moments of the features against the noise, the data and the noisy row x_t = alpha x_0 + sigma z (Stein).

    Parameters
    ----------
    means, scales, weights, activation, nodes
        As in `gram`.
    x : (..., n, d)
        The rows x_0 of which ``means`` is alpha x w + b.
    alpha, sigma : float or Tensor (...)
        Of the noise level; with leading axes, those of ``means``.
    """
    first, second = expand(means, scales, activation, 2, nodes)[0]
    return _cross(first, second, weights, x, alpha, sigma)


def _cross(first: Tensor, second: Tensor, weights: Tensor, x: Tensor, alpha, sigma) -> Cross:
    alpha, sigma = (torch.as_tensor(a, dtype=first.dtype, device=first.device) for a in (alpha, sigma))
    noise = second.mean(-2)[..., None] * directions(weights)
    data = first.mT @ x / x.shape[-2]
    state = alpha[..., None, None] * data + sigma[..., None, None] * noise
    return Cross(noise, data, state, first.mean(-2))


def moments(
    means: Tensor,
    scales: Tensor,
    weights: Tensor,
    x: Tensor,
    alpha,
    sigma,
    activation: Activation = "cos",
    terms: int = 12,
    nodes: int = 32,
) -> tuple[Tensor, Cross]:
    """`gram` and `cross` of the same arguments, each activation evaluated once."""
    rho = correlations(weights)
    if activation == "cos":
        cos, sin = torch.cos(means), torch.sin(means)
        size = torch.exp(-scales.square() / 2)[..., None, :]
        G, found = _cos_gram(cos, sin, scales, rho), (size * cos, -size * scales[..., None, :] * sin)
    else:
        found, second = expand(means, scales, activation, terms, nodes)
        G = _mehler_gram(found, second, rho)
    return G, _cross(found[0], found[1], weights, x, alpha, sigma)

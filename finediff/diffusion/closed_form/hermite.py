"""Hermite coefficients of an activation under Gaussian noise: closed where there is a formula, else by quadrature.

    A_p = E[phi(mu + s Z) He_p(Z)] / sqrt(p!),   Z ~ N(0, 1);       tau = sqrt(1 + s^2),  nu = mu/tau,  r = s/tau
    cos             s^p/sqrt(p!) exp(-s^2/2) cos(mu + p pi/2)
    2 Phi(u) - 1    A_0 = 2 Phi(nu) - 1,                A_p = 2 r^p (-1)^(p-1) He_{p-1}(nu) g(nu)/sqrt(p!)
    u Phi(u) + g(u) A_0 = mu Phi(nu) + tau g(nu),       A_1 = s Phi(nu),
                    A_p = tau r^p (-1)^p He_{p-2}(nu) g(nu)/sqrt(p!)            (max(u, 0), smoothed by a normal)
    max(u, 0)       the same with tau = s, r = 1: an algebraic decay, so many terms

g, Phi are the normal density and distribution function; from p = 2 on the He follow by a three-term recurrence.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from finediff.diffusion.process import require
from finediff.diffusion.quadrature import gauss_hermite, hermite

Activation = Literal["cos", "probit", "smooth_relu", "relu", "tanh", "silu", "softplus"]


def _density(u: Tensor) -> Tensor:
    return torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


def _cdf(u: Tensor) -> Tensor:
    return (1 + torch.erf(u / math.sqrt(2))) / 2


FUNCTIONS = {
    "cos": torch.cos,
    "probit": lambda u: torch.erf(u / math.sqrt(2)),  # 2 Phi(u) - 1
    "smooth_relu": lambda u: u * _cdf(u) + _density(u),  # E max(u + Z, 0)
    "relu": torch.relu,
    "tanh": torch.tanh,
    "silu": silu,
    "softplus": softplus,
}


def activate(u: Tensor, activation: Activation) -> Tensor:
    """phi(u), elementwise."""
    require(activation in FUNCTIONS, f"an activation among {get_args(Activation)}", repr(activation))
    return FUNCTIONS[activation](u)


def _recurrence(second: list[Tensor], nu: Tensor, ratio: Tensor, shift: int, terms: int) -> list[Tensor]:
    """A_{p+1} = -(r nu A_p)/sqrt(p+1) - r^2 (p-shift)/sqrt(p(p+1)) A_{p-1}, from the last two given."""
    found, slope, square = second, ratio * nu, ratio.square()
    for p in range(len(found) - 1, terms - 1):
        step = slope * found[p] / -math.sqrt(p + 1)
        if p > shift:
            step = step - square * found[p - 1] * ((p - shift) / math.sqrt(p * (p + 1)))
        found.append(step)
    return found[:terms]


def _cos(means: Tensor, scales: Tensor, terms: int) -> list[Tensor]:
    """s^p/sqrt(p!) exp(-s^2/2) cos(mu + p pi/2)."""
    turns = torch.cos(means), -torch.sin(means)
    size, found = torch.exp(-scales.square() / 2), []
    for p in range(terms):
        found.append((size if p % 4 < 2 else -size) * turns[p % 2])
        size = size * scales / math.sqrt(p + 1)
    return found


def _probit(means: Tensor, scales: Tensor, terms: int) -> list[Tensor]:
    tau = (1 + scales.square()).sqrt()
    nu, ratio = means / tau, scales / tau
    return _recurrence([2 * _cdf(nu) - 1, 2 * ratio * _density(nu)], nu, ratio, 1, terms)


def _rectified(means: Tensor, scales: Tensor, tau: Tensor, ratio: Tensor, terms: int) -> list[Tensor]:
    nu = means / tau
    share, bell = _cdf(nu), _density(nu)
    first = [means * share + tau * bell, scales * share, tau * ratio.square() * bell / math.sqrt(2)]
    return _recurrence(first, nu, ratio, 2, terms)


def _smooth_relu(means: Tensor, scales: Tensor, terms: int) -> list[Tensor]:
    tau = (1 + scales.square()).sqrt()
    return _rectified(means, scales, tau, scales / tau, terms)


def _relu(means: Tensor, scales: Tensor, terms: int) -> list[Tensor]:
    tau = scales.clamp(min=torch.finfo(scales.dtype).tiny ** 0.5)
    return _rectified(means, scales, tau, torch.ones_like(scales), terms)


CLOSED = {"cos": _cos, "probit": _probit, "smooth_relu": _smooth_relu, "relu": _relu}


def _shares(means: Tensor, shifts: Tensor) -> Tensor:
    """1/(1 + exp(-means - shifts)) by exp(-u) = exp(-mean) exp(-shift): no node costs a transcendental function."""
    limit = 0.47 * math.log(
        torch.finfo(means.dtype).max
    )  # the product of the two stays finite, and so do its gradients
    falls = (torch.exp((-a).clamp(-limit, limit)) for a in (means, shifts))
    return math.prod(falls).add_(1).reciprocal_()


def expand(
    means: Tensor, scales: Tensor, activation: str, terms: int, nodes: int
) -> tuple[list[Tensor], Tensor | None]:
    """A_0 .. A_{terms-1}, each (..., n, h), and mean_i E[phi^2] (..., h) where it costs nothing more."""
    require(activation in FUNCTIONS, f"an activation among {get_args(Activation)}", repr(activation))
    require(terms >= 2, "at least 2 terms", terms, "the cross moments need A_0 and A_1; use terms=12")
    scales = scales[..., None, :]
    if activation in CLOSED:
        found = CLOSED[activation](means, scales, terms)
        if activation != "relu":
            return found, None
        # E max(a, 0)^2 = mu A_0 + s A_1, by parts.
        return found, (means * found[0] + scales * found[1]).mean(-2)
    require(nodes >= terms, f"at least {terms} nodes, one a term", nodes, "Q nodes hold He_p for p < Q only")
    points, weights = (a.to(means) for a in gauss_hermite(nodes))
    shifts = scales * points.reshape(-1, *[1] * means.ndim)
    if (
        activation == "tanh"
    ):  # 2 sigmoid(2u) - 1: the expansion is that of the sigmoid, and less memory is moved
        found, square = _projected(_shares(2 * means, 2 * shifts), weights, points, terms)
        return [2 * found[0] - 1, *(2 * found[1:])], 4 * (square - found[0].mean(-2)) + 1
    if activation == "silu":
        values = (means + shifts) * _shares(means, shifts)
    else:
        values = activate(means + shifts, activation)
    found, square = _projected(values, weights, points, terms)
    return list(found), square


def _projected(values: Tensor, weights: Tensor, points: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """A_p (terms, ..., n, h) and mean_i E[phi^2] (..., h) from values at the nodes (Q, ..., n, h)."""
    found = torch.tensordot(hermite(points, terms) * weights, values, 1)
    squares = torch.linalg.vector_norm(values, dim=-2).square() / values.shape[-2]
    return found, torch.tensordot(weights, squares, 1)


def coefficients(
    means: Tensor, scales: Tensor, activation: Activation = "cos", terms: int = 12, nodes: int = 32
) -> Tensor:
    """Hermite coefficients A_p = E[phi(mu + s Z) He_p(Z)]/sqrt(p!), (terms, ..., n, h).

    Closed for "cos", "probit", "smooth_relu" (u Phi(u) + g(u)) and "relu"; by Gauss-Hermite for the others.

    Parameters
    ----------
    means : (..., n, h)
        Of the pre-activations, one a row and unit.
    scales : (..., h)
        Their standard deviations, sigma |w_j| >= 0.
    activation : {"cos", "probit", "smooth_relu", "relu", "tanh", "silu", "softplus"}
        The function phi.
    terms, nodes : int
        Terms P >= 2; Gauss-Hermite nodes, at least P. The error is governed by the scale: at s <= 1, 16 nodes give
        tanh to 1e-4 and SiLU to 1e-7; at s = 3, 32 give tanh to 8e-3 only. Prefer closed activations there.
    """
    return torch.stack(expand(means, scales, activation, terms, nodes)[0])

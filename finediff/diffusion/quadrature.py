"""Where to average: nodes and weights for means over N(0, I) and for integrals over time.

    E f(Z)          ~ sum_q w_q f(z_q)                                       Gauss-Hermite, exact to degree 2Q - 1
    E f(Z_1, Z_2)   ~ sum_qr w_q w_r f(z_q, rho z_q + sqrt(1 - rho^2) z_r),          corr(Z_1, Z_2) = rho
    int_a^b f dt    ~ sum_k w_k f(t_k)      Simpson: exact cubics, order 4;  Gauss-Legendre: exact to degree 2K - 1
    E f(Z), Z in R^d ~ (1/n) sum_i f(z_i)   z_i each N(0, I), not independent: Sobol, antithetic, orthogonal

Which one: Gauss-Hermite where f is smooth and of one or two Gaussian variables (its error is governed by the scale
of f: f(s z) with s >= 3 needs many nodes); orthogonal and antithetic draws for functions of many; Sobol for few
dimensions (up to some ten) or smooth functions. Rules are float64 on the CPU; draws are on the generator's device.
"""

from __future__ import annotations

import math
import numbers

import torch
from scipy import special
from torch import Tensor

_SOBOL_BITS = 30  # of torch's engine: its points are multiples of 2^-30
_SOBOL_WIDEST = torch.quasirandom.SobolEngine.MAXDIM


def _require_count(what: str, value, least: int = 1, because: str = "") -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        advice = f": {because}" if because else ""
        raise ValueError(f"expected {what} to be a whole number, at least {least}, got {value!r}{advice}")


def _require_interval(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"expected finite ends low < high, got {low} and {high}: swap or correct them")


# ------------------------------------------------------------------------------------------ rules


def gauss_hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Rule for E f(Z), Z ~ N(0, 1): points (Q,) increasing and symmetric, weights (Q,) of sum 1, float64.

    Parameters
    ----------
    nodes : int
        Q, at least 1; exact for polynomials of degree up to 2Q - 1.

    Raises
    ------
    ValueError
        If nodes is not a whole number, at least 1.

    References
    ----------
    Golub and Welsch (1969), "Calculation of Gauss quadrature rules".
    """
    _require_count("nodes", nodes, because="8 do for smooth functions, 32 for tanh of twice a normal")
    points, weights = special.roots_hermitenorm(int(nodes))
    return torch.as_tensor(points), torch.as_tensor(weights / weights.sum())


def gauss_hermite_2d(nodes: int, correlation=0.0) -> tuple[Tensor, Tensor]:
    """Rule for E f(Z_1, Z_2) of standard normals with the given correlation: the product of two 1-D rules.

    Parameters
    ----------
    nodes : int
        Q of each 1-D rule; exact to total degree 2Q - 1.
    correlation : float or Tensor (...)
        rho in [-1, 1], one rule each; gradients flow through it and are finite at its ends.

    Returns
    -------
    points : Tensor (..., Q^2, 2)
        Row q Q + r is (z_q, rho z_q + sqrt(1 - rho^2) z_r): the first coordinate is the 1-D rule's, whatever rho.
    weights : Tensor (Q^2,)
        w_q w_r, the same for every correlation.

    Raises
    ------
    ValueError
        For a correlation outside [-1, 1], or a bad number of nodes.
    """
    rho = torch.as_tensor(correlation, dtype=torch.float64)
    if not bool((rho.abs() <= 1 + 1e-9).all()):
        raise ValueError(f"expected correlations in [-1, 1], got {rho.detach()}: divide by the norms")
    points, weights = (a.to(rho.device) for a in gauss_hermite(nodes))
    first, other = points.repeat_interleave(nodes), points.repeat(nodes)
    # The floor keeps the root's gradient finite at |rho| = 1, where it has none; it moves the points by 1e-8.
    rest = (1 - rho.square()).clamp(min=1e-16).sqrt()
    second = rho[..., None] * first + rest[..., None] * other
    return torch.stack([first.expand_as(second), second], -1), torch.outer(weights, weights).flatten()


def hermite(points: Tensor, terms: int) -> Tensor:
    """He_p(z)/sqrt(p!) for p < terms at points z (Q,), (terms, Q): orthonormal under N(0, 1)."""
    found = [torch.ones_like(points), points]
    for p in range(1, terms - 1):
        found.append((points * found[p] - math.sqrt(p) * found[p - 1]) / math.sqrt(p + 1))
    return torch.stack(found[:terms])


def simpson(low: float, high: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Simpson's rule for an integral from low to high: times (nodes,) in equal steps, weights (nodes,), float64.

    Exact for cubics, error O(step^4). Raises ValueError unless low < high are finite and nodes is odd and >= 3.
    """
    _require_interval(low, high)
    _require_count("nodes", nodes, 3, "Simpson's rule takes intervals in pairs")
    if nodes % 2 == 0:
        raise ValueError(
            f"expected an odd number of nodes, got {nodes}: Simpson's rule takes intervals in pairs; use {nodes + 1}"
        )
    weights = torch.ones(nodes, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    times = torch.linspace(low, high, nodes, dtype=torch.float64)
    return times, weights * ((high - low) / (nodes - 1) / 3)


def gauss_legendre(low: float, high: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre rule for an integral from low to high: times (nodes,) inside, weights (nodes,), float64.

    Exact to degree 2 nodes - 1. Raises ValueError unless low < high are finite and nodes >= 1.
    """
    _require_interval(low, high)
    _require_count("nodes", nodes)
    points, weights = special.roots_legendre(int(nodes))
    half = (high - low) / 2
    return torch.as_tensor(low + half * (points + 1)), torch.as_tensor(half * weights)


# ------------------------------------------------------------------------------------------ draws
# Each row is exactly N(0, I) (Sobol: to 2^-30), so the mean of f over the rows is unbiased; the rows are made to
# depend on each other so that its variance is smaller. The generator is the only source of randomness.


def _plain(n: int, d: int, generator: torch.Generator, dtype) -> Tensor:
    return torch.randn(n, d, dtype=dtype, device=generator.device, generator=generator)


def _both_signs(half, n: int) -> Tensor:
    """Rows and their negatives: half(ceil(n/2)) stacked on its negative, cut to n."""
    z = half((n + 1) // 2)
    return torch.cat([z, -z[: n - len(z)]])


def antithetic_normal(n: int, d: int, generator: torch.Generator, *, dtype=torch.float64) -> Tensor:
    """n draws of N(0, I_d), (n, d), the second half the negatives of the first: odd functions average to 0.

    With n odd one row has no partner. Raises ValueError unless n, d >= 1.
    """
    _require_count("n", n)
    _require_count("d", d)
    return _both_signs(lambda k: _plain(k, d, generator, dtype), n)


def orthogonal_normal(
    n: int, d: int, generator: torch.Generator, *, antithetic: bool = False, dtype=torch.float64
) -> Tensor:
    """n draws of N(0, I_d), (n, d), orthogonal to each other within each block of d consecutive rows.

    Directions are the rows of uniformly random rotations, lengths independent chi_d: each row is exactly normal,
    and a block covers every direction. The last block may be a part of one.

    Parameters
    ----------
    n, d : int
        At least 1; n need not be a multiple of d.
    generator : torch.Generator
        The draws are on its device.
    antithetic : bool
        Draw ceil(n/2) rows so, and stack their negatives.
    dtype : torch.dtype
        Of the draws; they are made in float64.

    Raises
    ------
    ValueError
        Unless n and d are whole numbers, at least 1.

    References
    ----------
    Yu et al. (2016), "Orthogonal random features", arXiv 1610.09072.
    """
    _require_count("n", n)
    _require_count("d", d)

    def rows(k: int) -> Tensor:
        blocks = _plain(-(-k // d) * d, d, generator, torch.float64).reshape(-1, d, d)
        turn, triangle = torch.linalg.qr(blocks)
        # QR fixes the signs of its own choice; those of the triangle's diagonal make the rotation uniform.
        turn = turn * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
        lengths = _plain(k, d, generator, torch.float64).norm(dim=1, keepdim=True)
        return (turn.reshape(-1, d)[:k] * lengths).to(dtype)

    return _both_signs(rows, n) if antithetic else rows(n)


def sobol_normal(n: int, d: int, generator: torch.Generator, *, dtype=torch.float64) -> Tensor:
    """n draws of N(0, I_d), (n, d), the normal quantiles of a randomly scrambled Sobol sequence.

    Best with n a power of 2, where every marginal is balanced. Raises ValueError unless n >= 1 and d is from 1
    to 21201, the engine's widest.

    References
    ----------
    Owen (1998), "Scrambling Sobol' and Niederreiter-Xing points"; Joe and Kuo (2008).
    """
    _require_count("n", n)
    _require_count("d", d)
    if d > _SOBOL_WIDEST:
        raise ValueError(f"expected d up to {_SOBOL_WIDEST}, got {d}: use orthogonal_normal")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    engine = torch.quasirandom.SobolEngine(int(d), scramble=True, seed=seed)
    # Half a cell to the right: the points are left ends of cells of 2^-30, the first of them 0.
    uniform = engine.draw(int(n), dtype=torch.float64) + 0.5**_SOBOL_BITS / 2
    return torch.special.ndtri(uniform).to(device=generator.device, dtype=dtype)

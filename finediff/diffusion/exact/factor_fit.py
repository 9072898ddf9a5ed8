"""Maximum likelihood of a factor model with two volatilities a day, from rows that may have holes.

    x_i = m + sqrt(v_i) B f_i + sqrt(u_i) D^1/2 e_i,   f, e standard normal,   P(v = s_a, u = s_b) = W_ab on one grid
    P_i = B_o^T D_o^-1 B_o = V diag(p) V^T  over the entries o that row i has,   g_i = V^T B_o^T D_o^-1 (x_i - m)_o
    given (v, u), rho = v/u:    f | x ~ N(g c/sqrt(v), diag(c/rho)),  c = rho/(rho p + 1)   (in the basis V)
    log p(x | v, u) = -1/2 [ d_i log 2 pi u + log|D_o| + sum log(1 + rho p) + (x D^-1 x - sum c g^2)/u ]

EM (Rubin & Thayer 1982, Psychometrika 47): B and m by regression of the rows on F = sqrt(v) f, each row with weight
1/u; D what they leave; W the mean posterior. F's covariance E[F F^T/v] is estimated too and put into B (parameter
expansion: Liu, Rubin & Wu 1998, Biometrika 85), which takes the many small steps out of it. A round costs n d k, and
n d k^2 where entries are missing; Gaussian rows are the grid of one value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from finediff.diffusion.process import require

STEP = 0.5  # of log v and log u
_LOW, _HIGH = -5, 8  # of the grid, in steps
_LEAST_SHARE = 1e-9  # of an asset's variance that is its own: rounding, not a prior


@dataclass(frozen=True)
class FactorFit:
    """A fitted model, in the units of the rows.

    Attributes
    ----------
    mean, loadings, variance : (d,), (d, k), (d,)
        m, B and diag D; the columns of D^-1/2 B are orthogonal, the longest first, each of positive sum.
    scales_common, scales_own : (M,)
        Values of v and u, each of mean 1.
    weights : (M, M)
        W, v along the rows.
    log_likelihoods : tuple of floats
        Mean nats a row at each round.
    bic : float
        -2 log-likelihood + log(n) (number of parameters), in nats.
    """

    mean: Tensor
    loadings: Tensor
    variance: Tensor
    scales_common: Tensor
    scales_own: Tensor
    weights: Tensor
    log_likelihoods: tuple[float, ...]
    bic: float

    def log_density(self, X: Tensor) -> Tensor:
        """log p of the entries that each row of X (n, d) has, nats, (n,)."""
        s = _grid(len(self.scales_own) > 1, self.mean)
        return _expectations(Rows(X.double()), self.mean, *self.on_grid(s), self.weights, s).log_p

    def on_grid(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """B and D in the units in which v and u have the values s (M,)."""
        unit_common, unit_own = s[0] / self.scales_common[0], s[0] / self.scales_own[0]
        return self.loadings / unit_common.sqrt(), self.variance / unit_own


def _grid(heavy_tails: bool, like: Tensor) -> Tensor:
    steps = torch.arange(_LOW, _HIGH).to(like) if heavy_tails else like.new_zeros(1)
    return (STEP * steps).exp()


def fit_factors(
    X: Tensor,
    k: int,
    *,
    heavy_tails: bool = True,
    iterations: int = 300,
    tolerance: float = 3e-7,
    start: FactorFit | None = None,
) -> FactorFit:
    """The likeliest model of k factors.

    Parameters
    ----------
    X : (n, d)
        Rows, NaN where an entry is missing; every column varies.
    k : int
        From 0 to min(d, n - 1).
    heavy_tails : bool
        False: v = u = 1, Gaussian factor analysis.
    iterations, tolerance : int, float
        It stops after so many rounds, or when one gains less than tolerance * d nats a row.
    start : FactorFit, optional
        Of the same rows and heavy_tails: with as many factors it is continued, with others it lends its law of (v, u).

    Returns
    -------
    FactorFit

    Raises
    ------
    ValueError
        For k out of range, a column without two entries, or one that does not vary.
    """
    X = X.double()
    require(X.ndim == 2 and len(X) >= 2, "X of shape (n, d) with n >= 2", tuple(X.shape))
    n, d = X.shape
    require(0 <= k <= min(d, n - 1), f"0 to {min(d, n - 1)} factors for {n} rows of {d} assets", k)
    data = Rows(X)
    require((data.count >= 2).all(), "at least 2 entries in each column", int(data.count.min()))
    mean = data.X.sum(0) / data.count
    deviations = data.deviations(mean)
    variance = deviations.square().sum(0) / data.count
    require((variance > 0).all(), "columns that vary", "a constant one", "leave it out")
    s = _grid(heavy_tails, X)
    # One row's worth of days of middling size: else a law of few days is fitted by its own noise.
    prior = torch.exp(-0.5 * (s.log()[:, None] ** 2 + s.log() ** 2))
    prior = prior / prior.sum()
    weights = prior if start is None else start.weights
    if start is not None and start.loadings.shape[1] == k:
        mean, (B, D) = start.mean, start.on_grid(s)
    else:
        B, D = _start(deviations, variance, k)
    trace: list[float] = []
    while True:
        E = _expectations(data, mean, B, D, weights, s)
        trace.append(float(E.log_p.mean()))
        done = len(trace) > 1 and trace[-1] - trace[-2] < tolerance * d
        if done or len(trace) > iterations:
            break
        if heavy_tails:
            weights = (E.weights + prior) / (n + 1)
        B, mean, D = _regress(data, mean, E)
        D = torch.maximum(D, _LEAST_SHARE * variance)
        B = B @ torch.linalg.cholesky(E.covariance) if k else B
    unit_common, unit_own = (weights.sum(1) @ s), (weights.sum(0) @ s)
    B, D = B * unit_common.sqrt(), D * unit_own
    free = d * (k + 2) - k * (k - 1) // 2 + (2 * (len(s) - 1) if heavy_tails else 0)
    bic = -2 * n * trace[-1] + free * math.log(n)
    return FactorFit(mean, canonical(B, D), D, s / unit_common, s / unit_own, weights, tuple(trace), bic)


def canonical(B: Tensor, D: Tensor) -> Tensor:
    """B turned so that the columns of D^-1/2 B are orthogonal, the longest first, each of positive sum."""
    if not B.shape[1]:
        return B
    B = B @ torch.linalg.eigh(B.T @ (B / D[:, None]))[1].flip(1)
    return B * torch.where((B / D.sqrt()[:, None]).sum(0) < 0, -1.0, 1.0)


class Rows:
    """A panel with holes: X (n, d), 0 where nothing is seen, and the patterns of what is."""

    def __init__(self, X: Tensor) -> None:
        seen = ~X.isnan()
        self.complete = bool(seen.all())
        self.X = X if self.complete else torch.where(seen, X, 0.0)
        self.squares, self.mask = self.X.square(), seen.to(X.dtype)
        self.count, self.sizes = self.mask.sum(0), self.mask.sum(1)
        if self.complete:
            self.patterns, self.index = X.new_ones(1, X.shape[1]), None
        else:
            self.patterns, self.index = torch.unique(self.mask, dim=0, return_inverse=True)

    def deviations(self, mean: Tensor) -> Tensor:
        """X - mean (n, d), 0 where nothing is seen."""
        return self.X - mean if self.complete else (self.X - mean) * self.mask

    def over_assets(self, A: Tensor) -> Tensor:
        """Sums of A (d, ...) over the entries of each row: (n, ...), or (1, ...) where all are complete."""
        return A.sum(0, keepdim=True) if self.complete else self.mask @ A

    def over_rows(self, A: Tensor) -> Tensor:
        """Sums of A (n, ...) over the entries of each column: (d, ...), or (1, ...) where all are complete."""
        return A.sum(0, keepdim=True) if self.complete else self.mask.T @ A

    def each(self, values: Tensor) -> Tensor:
        """Of every pattern (Q, ...) -> of every row (n, ...); (1, ...) where all rows are complete."""
        return values if self.complete else values[self.index]


@dataclass(frozen=True)
class _Expectations:
    log_p: Tensor  # (n,)
    weights: Tensor  # sum of posteriors, (M, M)
    precision: Tensor  # E[1/u], (n,)
    F: Tensor  # E[F/u], (n, k)
    FF: Tensor  # E[FF'/u], (n, k, k), or their sum (1, k, k) where rows are complete
    covariance: Tensor  # mean of E[FF'/v], (k, k)


def _expectations(data: Rows, mean: Tensor, B: Tensor, D: Tensor, W: Tensor, s: Tensor) -> _Expectations:
    x, n, k, M = data.X, len(data.X), B.shape[1], len(s)
    scaled = B / D[:, None]
    if data.complete:
        P = (B.T @ scaled)[None]
    else:
        P = (data.patterns @ (B[:, :, None] * scaled[:, None, :]).flatten(1)).reshape(
            len(data.patterns), k, k
        )
    p, V = torch.linalg.eigh(P) if k else (P.diagonal(dim1=1, dim2=2), P)
    p, V = data.each(p.clamp(min=0)), data.each(V)
    g = x @ scaled - data.over_assets(mean[:, None] * scaled)
    g = torch.einsum("nk,nkl->nl", g, V.expand(n, -1, -1))
    rho = (STEP * torch.arange(1 - M, M, dtype=x.dtype, device=x.device)).exp()[:, None]
    c = rho / (rho * p[:, None, :] + 1)  # (1 or n, ratios, k)
    ratio = (torch.arange(M)[:, None] - torch.arange(M) + M - 1).to(x.device)  # of W's entries
    log_det = torch.log1p(rho * p[:, None, :]).sum(2)[:, ratio]
    explained = g.square() @ c[0].T if data.complete else torch.einsum("nk,nrk->nr", g.square(), c)
    squares = data.squares @ (1 / D) - 2 * (x @ (mean / D)) + data.over_assets(mean.square() / D)
    left = squares[:, None, None] - explained[:, ratio]
    joint = W.log() - 0.5 * (data.sizes[:, None, None] * s.log() + log_det + left / s)
    log_p = joint.flatten(1).logsumexp(1)
    posterior = (joint - log_p[:, None, None]).exp()
    constant = -0.5 * (data.sizes * math.log(2 * math.pi) + data.over_assets(D.log()))

    def by_ratio(values: Tensor) -> Tensor:
        return x.new_zeros(n, 2 * M - 1).index_add_(1, ratio.flatten(), values.flatten(1))

    own, common, plain = (by_ratio(w) for w in (posterior / s, posterior / s[:, None], posterior))
    F = g * torch.einsum("nr,nrk->nk", own, c.expand(n, -1, -1))
    if data.complete:  # sums over rows at once: n k^2 a ratio
        outer = [(c[0, r] * g, c[0, r] * g) for r in range(2 * M - 1)]
        FF = sum((a * own[:, r, None]).T @ b for r, (a, b) in enumerate(outer))
        S = sum((a * common[:, r, None]).T @ b for r, (a, b) in enumerate(outer))
        total = plain.sum(0)
        FF, S = (FF + torch.diag(total @ c[0]))[None], (S + torch.diag(total @ (c[0] / rho)))[None]
    else:
        cg = c * g[:, None, :]
        FF = (cg * own[:, :, None]).mT @ cg + torch.diag_embed(torch.einsum("nr,nrk->nk", plain, c))
        S = (cg * common[:, :, None]).mT @ cg + torch.diag_embed(torch.einsum("nr,nrk->nk", plain, c / rho))
    return _Expectations(
        log_p=log_p + constant,
        weights=posterior.sum(0),
        precision=own.sum(1),
        F=torch.einsum("nkl,nl->nk", V.expand(n, -1, -1), F),
        FF=V @ FF @ V.mT,
        covariance=(V @ S @ V.mT).sum(0) / n,
    )


def _regress(data: Rows, mean: Tensor, E: _Expectations) -> tuple[Tensor, Tensor, Tensor]:
    """B (d, k), the mean (d,), D (d,): each column on (F, 1), its rows weighted by 1/u."""
    d, k = data.X.shape[1], E.F.shape[1]
    Y = torch.cat([E.F, E.precision[:, None]], 1)
    totals = data.over_rows(Y)
    plain = data.X.T @ Y
    cross = plain - mean[:, None] * totals
    if data.complete:
        square = torch.cat([torch.cat([E.FF[0], E.F.sum(0)[:, None]], 1), totals], 0)
        found = torch.linalg.solve(square, cross.T).T
    else:
        square = torch.cat([torch.cat([E.FF, E.F[:, :, None]], 2), Y[:, None, :]], 1)
        square = data.over_rows(square.flatten(1)).reshape(d, k + 1, k + 1)
        # A column with fewer entries than factors still has a loading: the least in norm.
        ridge = 1e-9 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        found = torch.linalg.solve(square + ridge * torch.eye(k + 1).to(plain), cross[:, :, None])[..., 0]
    squares = data.squares.T @ E.precision - 2 * mean * plain[:, -1] + mean.square() * totals[:, -1]
    own = (squares - (found * cross).sum(1)) / data.count
    return found[:, :k], mean + found[:, k], own


def unit_rows(deviations: Tensor) -> Tensor:
    """Columns of unit variance after rows were brought to one size: a crash is one day among others."""
    Z = deviations / deviations.square().mean(0).sqrt()
    Z = Z / Z.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return Z / Z.square().mean(0).sqrt().clamp(min=1e-12)


def _start(deviations: Tensor, variance: Tensor, k: int, rounds: int = 12) -> tuple[Tensor, Tensor]:
    """B and D by principal factors: alternately the leading directions of Z D^-1/2 and what they leave.

    The directions by subspace iteration from a fixed start among the rows, so that the order of the assets does not
    matter: n d k a round.
    """
    if not k:
        return variance.new_zeros(len(variance), 0), variance.clone()
    Z = unit_rows(deviations)
    n, d = Z.shape
    own = torch.ones_like(variance)
    Q = torch.randn(n, min(k + 8, n, d), dtype=Z.dtype, generator=torch.Generator().manual_seed(0)).to(Z)
    for _ in range(rounds):
        Y = Z / own.sqrt()
        Q = torch.linalg.qr(Y @ (Y.T @ Q))[0]
        U, values, _ = torch.linalg.svd(Y.T @ Q, full_matrices=False)
        sizes = (values[:k].square() / n - 1).clamp(min=1e-3)
        L = own.sqrt()[:, None] * U[:, :k] * sizes.sqrt()
        own = (1 - L.square().sum(1)).clamp(min=0.005)
    return L * variance.sqrt()[:, None], own * variance

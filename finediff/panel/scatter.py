"""How days spread, whatever their size: a scatter that no crash dominates, shrunk towards factors.

    directions   S = (1 - r) (d/n) sum_i x_i x_i' / q_i + r I,   q_i = x_i' S^-1 x_i,   tr S = d          (Tyler)
    factors      F = L L' + D,  L (d, k), D diagonal: maximum likelihood on C = mean_i y_i y_i',  y_i = x_i sqrt(d/q_i)
    scatter      a C + (1 - a) F,     k and a by the cross-validated Gaussian likelihood of the y_i

However heavy the tails of x_i, the y_i have the noise of Gaussian rows. On returns both steps pay at every size: with
250 days of 20 shares and with 1,000 of 100 (benchmarks/generators.py).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.covariance import ledoit_wolf

__all__ = ["factor_analysis", "robust_scatter", "tyler"]

FACTORS = (1, 2, 3, 5, 8, 12, 18)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_LEAST_VARIANCE = 0.005  # of an asset's own part: below, the likelihood is unbounded (Heywood cases)


def tyler(X, shrinkage: float | None = None, *, iterations: int = 50, tolerance: float = 1e-6) -> np.ndarray:
    """Tyler's M-estimator of scatter, shrunk towards the identity.

    Parameters
    ----------
    X : (n, d)
        Centred rows of about unit scale; rows of zeros say nothing and are left out.
    shrinkage : float in [0, 1], optional
        r; Ledoit and Wolf's intensity for the rows at unit length by default. At 0, n > d is needed.
    iterations, tolerance : int, float
        Of the fixed point.

    Returns
    -------
    (d, d), trace d

    Raises
    ------
    ValueError
        For a shrinkage outside [0, 1], or 0 with n <= d.

    References
    ----------
    Tyler (1987), "A distribution-free M-estimator of multivariate scatter", Annals of Statistics 15; shrunk:
    Chen, Wiesel and Hero (2011), arXiv:1009.5331.
    """
    X = _moving_rows(X)
    n, d = X.shape
    if shrinkage is None:
        unit = X / np.linalg.norm(X, axis=1, keepdims=True)
        chosen = ledoit_wolf(unit, assume_centered=True)[1] if n > 1 else 1.0
        shrinkage = max(chosen, 1e-3 if n <= 2 * d else 0.0)
    if not 0 <= shrinkage <= 1 or (shrinkage == 0 and n <= d):
        raise ValueError(
            f"expected a shrinkage in [0, 1], above 0 for {n} rows of {d} assets, got {shrinkage}: None chooses one"
        )
    S = np.eye(d)
    for _ in range(iterations):
        new = (1 - shrinkage) * (X.T * (d / squared_distances(X, S))) @ X / n + shrinkage * np.eye(d)
        new *= d / np.trace(new)
        change, S = np.abs(new - S).max(), new
        if change < tolerance:
            break
    return S


def squared_distances(X: np.ndarray, S: np.ndarray) -> np.ndarray:
    """q_i = x_i' S^-1 x_i, (n,)."""
    values, vectors = np.linalg.eigh(S)
    return np.square(X @ (vectors / np.sqrt(values))).sum(1)


def factor_analysis(C, k: int, *, start=None, iterations: int = 30, tolerance: float = 1e-4):
    """Loadings L (d, k) and variances D (d,) of the likeliest L L' + diag(D) for a covariance C (Joreskog 1967).

    Given D, the loadings are the k leading eigenvectors of D^-1/2 C D^-1/2; D is then the rest of the diagonal. The
    first D is ``start`` or the diagonal itself; each round costs one eigendecomposition.
    """
    whole = np.diag(C)
    D = whole if start is None else start
    for _ in range(iterations):
        root = np.sqrt(D)
        values, vectors = np.linalg.eigh(C / np.outer(root, root))
        L = root[:, None] * vectors[:, -k:] * np.sqrt(np.maximum(values[-k:] - 1, 0))
        new = np.maximum(whole - np.square(L).sum(1), _LEAST_VARIANCE * whole)
        change, D = np.abs(new / whole - D / whole).max(), new
        if change < tolerance:
            break
    return L, D


def robust_scatter(X, *, folds: int = 4) -> np.ndarray:
    """Scatter of heavy-tailed rows, shrunk towards a factor structure as far as they ask for.

    Parameters
    ----------
    X : (n, d)
        Centred rows of about unit scale, n >= 1; rows of zeros are left out.
    folds : int
        Of the cross-validation: every ``folds``-th row, which suits rows in the order of time and others.

    Returns
    -------
    (d, d), positive definite
        Proportional to the covariance where the law is elliptical; its size is that of a typical day.
    """
    X = _moving_rows(X)
    n, d = X.shape
    S = tyler(X)
    numbers = [k for k in FACTORS if k <= d // 3]
    if not numbers or n < 4 * folds:
        return S
    rows = X * np.sqrt(d / squared_distances(X, S))[:, None]
    scale = np.sqrt(np.square(rows).mean(0))
    rows /= scale
    losses = np.zeros((len(numbers), len(SHARES)))
    for fold in range(folds):
        out = np.arange(n) % folds == fold
        inside, held_out = (rows[part].T @ rows[part] / part.sum() for part in (~out, out))
        own = None
        for i, k in enumerate(numbers):
            L, own = factor_analysis(
                inside, k, start=own, iterations=8
            )  # from the last number's: a few rounds do
            target = L @ L.T + np.diag(own)
            losses[i] += [_gaussian_loss(a * inside + (1 - a) * target, held_out) for a in SHARES]
    i, j = np.unravel_index(np.argmin(losses), losses.shape)
    (L, own), a = factor_analysis(rows.T @ rows / n, numbers[i]), SHARES[j]
    return (a * rows.T @ rows / n + (1 - a) * (L @ L.T + np.diag(own))) * np.outer(scale, scale)


def _moving_rows(X) -> np.ndarray:
    X = np.asarray(X, dtype=np.float64)
    return X[np.square(X).sum(1) > 0]


def _gaussian_loss(S: np.ndarray, C: np.ndarray) -> float:
    """-2 times the mean log likelihood of rows with second moments C under N(0, S), without constants."""
    try:
        root = cho_factor(S, lower=True)
    except np.linalg.LinAlgError:
        return np.inf
    return float(2 * np.log(np.diag(root[0])).sum() + np.trace(cho_solve(root, C)))

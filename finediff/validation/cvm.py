"""Cramer-von Mises tests on random portfolios.

T = U/(n m N) - (4 n m - 1)/(6 N). Without ties c_i = r(x_(i)) - i counts the scenarios below x_(i), and summing
by parts the second half of U follows from the first:

    U = n sum_i c_i^2 + m (n^2 m - sum_i (2i - 1) c_i)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import special, stats

from finediff.memorisation import as_rows
from finediff.validation.inputs import generator, panels, plain, same_columns

_BLOCK = 2**18  # numbers held at a time in the rank sums: they stay in cache


def cvm_statistics(pooled: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """T (s, p): every row of `pooled` (p, N) split by every one of `masks` (s, N), True: first sample."""
    p, total = pooled.shape
    out = np.empty((len(masks), p))
    step = max(1, _BLOCK // total)
    for start in range(0, p, step):
        rows = slice(start, min(p, start + step))
        order = np.argsort(pooled[rows], axis=1)
        z = np.take_along_axis(pooled[rows], order, axis=1)
        ranks = stats.rankdata(z, axis=1) if (z[:, 1:] == z[:, :-1]).any() else None
        for s, mask in enumerate(masks):
            first = mask[order]
            n = int(mask.sum())
            m = total - n
            if ranks is None:
                i = np.arange(1.0, n + 1.0)
                place = np.flatnonzero(first).reshape(-1, n)
                c = place - (i - 1.0 + total * np.arange(len(place))[:, None])
                u = np.einsum("ij,ij->i", c, n * c - m * (2 * i - 1)) + float(n * m) ** 2
            else:
                below = np.cumsum(first, axis=1)
                gap = np.where(first, ranks - below, ranks - np.arange(1, total + 1) + below)
                u = (np.where(first, n, m) * gap**2).sum(axis=1)
            out[s, rows] = u / (n * m * total) - (4 * n * m - 1) / (6 * total)
    return out


def cvm_two_sample(x, y) -> np.ndarray:
    """Two-sample Cramer-von Mises statistic of every column.

    Parameters
    ----------
    x, y : array or DataFrame (n, p), (m, p)
        Finite, as many columns, at least 2 rows each (else a ValueError); ties receive mid-ranks.

    Returns
    -------
    ndarray (p,)
        T, without unit; its mean under one law is (1 + 1/(n+m))/6.

    References
    ----------
    T. W. Anderson, "On the distribution of the two-sample Cramer-von Mises criterion" (1962).

    Examples
    --------
    >>> cvm_two_sample([[1.0], [2.0]], [[3.0], [4.0]]).round(3)
    array([0.375])
    """
    a, b = as_rows(x, "x", 2), as_rows(y, "y", 2)
    same_columns(x, a, y, b, "x", "y")
    return _statistics(a, b)


def _statistics(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mask = np.arange(len(a) + len(b)) < len(a)
    return cvm_statistics(np.vstack([a, b]).T, mask[None, :])[0]


def cvm_p_value(statistic, n: int | None = None, m: int | None = None) -> np.ndarray:
    """P-value of a Cramer-von Mises statistic (array of any shape) from the limiting law.

    With the sizes n and m of the two samples T is first moved to the mean and variance of the limit by its
    exact mean and variance (Anderson 1962, eq. 15). One size alone is a ValueError.

    References
    ----------
    T. W. Anderson & D. A. Darling, "Asymptotic theory of certain goodness of fit criteria" (1952).

    Examples
    --------
    >>> cvm_p_value([0.34730, 0.46136, 0.74346]).round(3)
    array([0.1 , 0.05, 0.01])
    """
    t = np.asarray(statistic, dtype=np.float64)
    if (n is None) != (m is None):
        raise ValueError(
            f"expected both sizes or none, got n={n}, m={m}, because T's variance needs both: pass both"
        )
    if n is not None:
        k, total = n * m, n + m
        mean = (1 + 1 / total) / 6
        variance = (total + 1) * (4 * k * total - 3 * (n**2 + m**2) - 2 * k) / (180 * total**2 * k)
        t = 1 / 6 + (t - mean) / np.sqrt(45 * variance)
    # Below .003 the distribution function is 1e-18; above 8 its complement is below one rounding of 1.
    x = np.clip(t, 0.003, 8.0)
    cdf = np.zeros_like(x)
    for j in range(20):
        q = (4 * j + 1) ** 2 / (16 * x)
        factor = np.exp(special.gammaln(j + 0.5) - special.gammaln(j + 1.0)) * np.sqrt(4 * j + 1)
        cdf += factor * np.exp(-2 * q) * special.kve(0.25, q)
    return np.clip(1.0 - cdf / (np.pi**1.5 * np.sqrt(x)), 0.0, 1.0)


def portfolio_weights(n_assets: int, n_portfolios: int, rng: np.random.Generator) -> np.ndarray:
    """Random portfolios: the first half long-only, the second half long-short.

    Returns
    -------
    ndarray (n_portfolios, n_assets)
        Fractions of wealth. The first ceil(p/2) rows are uniform on the simplex (they sum to 1); the others
        are dollar-neutral with gross 2: a Gaussian direction less its mean, 1 long and 1 short. With one
        asset every row is 1. A count below 1 is a ValueError.
    """
    if n_assets < 1 or n_portfolios < 1:
        raise ValueError(
            f"expected at least one asset and one portfolio, got {n_assets} and {n_portfolios}, because "
            "otherwise nothing is drawn: ask for more"
        )
    if n_assets == 1:
        return np.ones((n_portfolios, 1))
    long_only = rng.dirichlet(np.ones(n_assets), size=n_portfolios - n_portfolios // 2)
    spread = rng.standard_normal((n_portfolios // 2, n_assets))
    spread -= spread.mean(axis=1, keepdims=True)
    return np.vstack([long_only, 2.0 * spread / np.abs(spread).sum(axis=1, keepdims=True)])


@dataclass(frozen=True, eq=False)
class CvMResult:
    """Outcome of `cvm_portfolio_test`.

    Attributes
    ----------
    rejection_rate : float
        Fraction of portfolios with p < 5 %.
    mean_p : float
        Mean p-value over portfolios.
    null_mean, null_high : float
        Mean and 95 % quantile of the rejection rate between random splits of real rows.
    null_mean_p : float
        Mean of `mean_p` over the splits.
    p_value : float
        (1 + number of splits that reject as often) / (1 + number of splits).
    p_values : ndarray (p,)
    null_rates, null_mean_ps : ndarray (n_null,)
    sizes, null_sizes : tuple of int
        Rows of the test and of every split.
    """

    rejection_rate: float
    mean_p: float
    null_mean: float
    null_high: float
    null_mean_p: float
    p_value: float
    p_values: np.ndarray
    null_rates: np.ndarray
    null_mean_ps: np.ndarray
    sizes: tuple[int, int]
    null_sizes: tuple[int, int]

    def to_dict(self) -> dict:
        """Plain numbers and lists, for JSON."""
        return {key: plain(value) for key, value in asdict(self).items()}


def cvm_portfolio_test(
    real, synthetic, *, n_portfolios=200, n_null=200, null_panel=None, weights=None, random_state=None
) -> CvMResult:
    """Cramer-von Mises tests on random portfolios, against their own null distribution.

    Parameters
    ----------
    real, synthetic : array or DataFrame (n, d), (m, d)
        Simple returns that the generator never saw, and scenarios.
    n_portfolios, n_null : int
        Portfolios drawn by `portfolio_weights` (one with one asset); random splits of real rows.
    null_panel : array or DataFrame (N, d), optional
        Real rows to split, for example training and held-out rows together; default `real`. A split has the
        sizes of the test where N >= n + m, and else their proportion.
    weights : array (p, d), optional
        Your own portfolios instead of random ones.
    random_state : None, int, RandomState or Generator
        Seed of the portfolios and the splits.

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, fewer than 20 rows.

    Notes
    -----
    The test sees one-dimensional margins: a generator with 12 % too little standard deviation can pass it.
    """
    x, y, null = panels(real, synthetic, null_panel)
    rng, d = generator(random_state), x.shape[1]
    null = x if null is None else null
    if weights is None:
        weights = portfolio_weights(d, n_portfolios if d > 1 else 1, rng)
    weights = as_rows(weights, "weights")
    if weights.shape[1] != d:
        raise ValueError(
            f"expected weights for {d} assets, got {weights.shape[1]}, because a portfolio holds every asset, "
            "do give zero to the others"
        )
    share = min(1.0, len(null) / (len(x) + len(y)))
    n, m = max(2, int(share * len(x))), max(2, int(share * len(y)))
    pool = null[rng.permutation(len(null))[: n + m]]
    return cvm_result(x, y, weights, cvm_null(pool, weights, random_masks(n, m, n_null, rng)))


def random_masks(n: int, m: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, n + m) masks, True for the n rows of the first sample."""
    return rng.permuted(np.tile(np.arange(n + m) < n, (count, 1)), axis=1)


def cvm_null(pool: np.ndarray, weights: np.ndarray, masks: np.ndarray):
    """Rejection rate and mean p of every split (each of shape (s,)), and the two sizes of a split."""
    n = int(masks[0].sum())
    p = cvm_p_value(cvm_statistics(weights @ pool.T, masks), n, len(pool) - n)
    return (p < 0.05).mean(axis=1), p.mean(axis=1), (n, len(pool) - n)


def cvm_result(x: np.ndarray, y: np.ndarray, weights: np.ndarray, null) -> CvMResult:
    """The test of x against y beside `null`, the answer of `cvm_null`."""
    rates, mean_ps, null_sizes = null
    p = cvm_p_value(_statistics(x @ weights.T, y @ weights.T), len(x), len(y))
    rate = float((p < 0.05).mean())
    return CvMResult(
        rejection_rate=rate,
        mean_p=float(p.mean()),
        null_mean=float(rates.mean()),
        null_high=float(np.quantile(rates, 0.95)),
        null_mean_p=float(mean_ps.mean()),
        p_value=float((1 + (rates >= rate).sum()) / (1 + len(rates))),
        p_values=p,
        null_rates=rates,
        null_mean_ps=mean_ps,
        sizes=(len(x), len(y)),
        null_sizes=null_sizes,
    )

"""Do scenarios follow the law of rows that the generator never saw?

x: n real rows, y: m scenarios, w: portfolio weights. For one portfolio, N = n + m, r the (mid-)ranks of the
pooled returns, x_(1) <= x_(2) <= ... sorted, F_n and G_m the two distribution functions,

    U = n sum_i (r(x_(i)) - i)^2 + m sum_j (r(y_(j)) - j)^2                       (Cramer-von Mises)
    T = U/(n m N) - (4 n m - 1)/(6 N)  =  (n m/N^2) sum_k (F_n - G_m)^2(z_k)      where there are no ties
    P(T <= t) -> sum_k Gamma(k+1/2)/k! sqrt(4k+1) exp(-q_k) K_1/4(q_k) / (pi^3/2 t^1/2),  q_k = (4k+1)^2/(16t)

Portfolios share the market, so their p-values move together: the rejection rate at 5 % is judged against its
own null law, the rates between random splits of real rows (T is free of the sizes in the limit, so a split
need not have the sizes of the test). Ranks are computed once; a split is a 0/1 mask over them.

    energy distance = (2 E|x-y| - E|x-x'| - E|y-y'|) / (2 E|x-y|), in [0, 1]      (Szekely & Rizzo)
    tail dependence = P(x_i and x_j both among their worst u rows) / u            mean over pairs, u = 2..5 %

Every metric stands beside its real-vs-real floor, computed from as many rows on either side. `floor_high`
is the 95 % bound of that floor. Of K metrics K/20 exceed theirs by chance: the verdict of a report compares

    max_k (b_k - median b_k)/(floor_high_k - median b_k),      b_k: distance of metric k from its ideal,

with the 99 % quantile of the same maximum over the splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import special, stats

from finediff.memorisation import _as_rows, _median_ratio, _two_nearest

__all__ = [
    "FLOOR_ROW",
    "CvMResult",
    "ValidationReport",
    "classifier_auc",
    "compare",
    "cvm_p_value",
    "cvm_portfolio_test",
    "cvm_two_sample",
    "energy_distance",
    "lower_tail_dependence",
    "panel_metrics",
    "portfolio_weights",
    "qq_data",
    "validate",
]

_LEVELS = (0.001, 0.01, 0.05, 0.95, 0.99)
_TAIL_LEVELS = (0.02, 0.03, 0.04, 0.05)
_MIN_ROWS = 20
_TAIL_ROWS = 20  # real rows beyond a quantile before its error is judged
_BLOCK = 2**18  # numbers held at a time in the rank sums: they stay in cache
_ENERGY_ROWS = 1500
_CLASSIFIER_ROWS = 2500
_SUBSETS = 8

# How far a metric is from ideal: an error is its own badness, a ratio is ideal at 1, a p-value when large.
_KIND = dict(
    cvm_mean_p="p",
    **dict.fromkeys(("cvm_rejection_rate", "mean_error_se"), "error"),
    **dict.fromkeys(("sd_ratio", "sd_ratio_min", "sd_ratio_max"), "ratio"),
    skewness_error="error",
    **dict.fromkeys(("kurtosis_ratio", "kurtosis_ratio_portfolio"), "ratio"),
    **dict.fromkeys([f"q{100 * level:g}_error" for level in _LEVELS], "error"),
    q1_error_portfolio="error",
    tail_dependence_ratio="ratio",
    **dict.fromkeys(("correlation_error", "correlation_max_error", "correlation_frobenius"), "error"),
    **dict.fromkeys(("energy_distance", "c2st_auc"), "error"),
    nn_ratio="ratio",
    memorised_fraction="error",
)
# Tails of index near 4 leave the third and fourth moments without a sampling law that splits could show:
# under one law they pass a 95 % bound in 10-23 % of cases. Quantiles and dependence judge the tails.
_SHOWN_ONLY = ["skewness_error", "kurtosis_ratio", "kurtosis_ratio_portfolio"]
_MAIN = ["cvm_mean_p", "cvm_rejection_rate", "sd_ratio", "kurtosis_ratio", "q1_error", "correlation_error"]
_MAIN += ["energy_distance", "c2st_auc", "nn_ratio", "memorised_fraction"]
FLOOR_ROW = "real vs real (floor)"


# Cramer-von Mises


def _cvm_statistics(pooled: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """T (s, p): every row of `pooled` (p, N) split by every one of `masks` (s, N), True: first sample."""
    p, total = pooled.shape
    sizes = masks.sum(axis=1)
    out = np.empty((len(masks), p))
    step = max(1, _BLOCK // total)
    position = np.arange(1.0, total + 1.0)
    for start in range(0, p, step):
        rows = slice(start, min(p, start + step))
        order = np.argsort(pooled[rows], axis=1)
        z = np.take_along_axis(pooled[rows], order, axis=1)
        same = z[:, 1:] == z[:, :-1]
        ranks = _mid_ranks(same) if same.any() else None
        for s, (mask, n) in enumerate(zip(masks, sizes)):
            m = total - n
            first = mask[order]
            below = np.cumsum(first, axis=1, dtype=np.float64)
            if ranks is None:
                gap = below * (1.0 / n + 1.0 / m) - position / m
                out[s, rows] = n * m / total**2 * np.einsum("ij,ij->i", gap, gap)
            else:
                u = np.where(first, n * (ranks - below) ** 2, m * (ranks - position + below) ** 2).sum(axis=1)
                out[s, rows] = u / (n * m * total) - (4 * n * m - 1) / (6 * total)
    return out


def _mid_ranks(same: np.ndarray) -> np.ndarray:
    """Mid-ranks (p, N) of sorted rows from `same` (p, N-1): is an entry equal to the one before it?"""
    p, width = same.shape
    index = np.arange(width + 1)
    edge = np.zeros((p, 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, same]), 0, index), axis=1)
    last = np.where(np.hstack([same, edge]), width, index)[:, ::-1]
    last = np.minimum.accumulate(last, axis=1)[:, ::-1]
    return (first + last) / 2.0 + 1.0


def cvm_two_sample(x, y) -> np.ndarray:
    """Two-sample Cramer-von Mises statistic of every column.

    Parameters
    ----------
    x : array or DataFrame (n, p)
        First sample, n >= 2; ties receive mid-ranks.
    y : array or DataFrame (m, p)
        Second sample, m >= 2.

    Returns
    -------
    ndarray (p,)
        T, without unit; its mean under one law is (1 + 1/(n+m))/6.

    Raises
    ------
    ValueError
        On non-finite values, different numbers of columns, fewer than 2 rows.

    References
    ----------
    T. W. Anderson, "On the distribution of the two-sample Cramer-von Mises criterion" (1962).

    Examples
    --------
    >>> cvm_two_sample([[1.0], [2.0]], [[3.0], [4.0]]).round(3)
    array([0.375])
    """
    a, b = _as_rows(x, "x", 2), _as_rows(y, "y", 2)
    _same_columns(x, a, y, b, "x", "y")
    mask = np.arange(len(a) + len(b)) < len(a)
    return _cvm_statistics(np.vstack([a, b]).T, mask[None, :])[0]


def cvm_p_value(statistic, n: int | None = None, m: int | None = None) -> np.ndarray:
    """P-value of a Cramer-von Mises statistic from the limiting law.

    Parameters
    ----------
    statistic : array of any shape
        Values of T.
    n, m : int, optional
        Sizes of the two samples. With them T is first moved to the mean and variance of the limit by its
        exact mean and variance at these sizes (Anderson 1962, eq. 15); without them the limit is used as is.

    Returns
    -------
    ndarray
        In [0, 1], the shape of `statistic`.

    Raises
    ------
    ValueError
        If only one of the sizes is given.

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
            f"expected both sizes or none, got n={n}, m={m}, because T's variance needs both, do pass both"
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

    Parameters
    ----------
    n_assets, n_portfolios : int
        d and p, both >= 1.
    rng : numpy Generator
        Advanced by the draw.

    Returns
    -------
    ndarray (p, d)
        Fractions of wealth. The first ceil(p/2) rows are uniform on the simplex (they sum to 1); the others
        are dollar-neutral with gross 2: a Gaussian direction less its mean, 1 long and 1 short. With one
        asset every row is 1.

    Raises
    ------
    ValueError
        If a count is below 1.
    """
    if n_assets < 1 or n_portfolios < 1:
        raise ValueError(
            f"expected at least one asset and one portfolio, got {n_assets} and {n_portfolios}, because "
            "otherwise nothing is drawn, do ask for more"
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
        return {k: v.tolist() if isinstance(v, np.ndarray) else _plain(v) for k, v in asdict(self).items()}


def cvm_portfolio_test(
    real,
    synthetic,
    *,
    n_portfolios: int = 200,
    n_null: int = 200,
    null_panel=None,
    weights=None,
    random_state=None,
) -> CvMResult:
    """Cramer-von Mises tests on random portfolios, against their own null distribution.

    Parameters
    ----------
    real : array or DataFrame (n, d)
        Simple returns that the generator never saw.
    synthetic : array or DataFrame (m, d)
        Scenarios.
    n_portfolios : int
        Portfolios drawn by `portfolio_weights`; with one asset there is only one.
    n_null : int
        Random splits of real rows.
    null_panel : array or DataFrame (N, d), optional
        Real rows to split, for example training and held-out rows together; default `real`. A split has the
        sizes of the test where N >= n + m, and else their proportion.
    weights : array (p, d), optional
        Your own portfolios instead of random ones.
    random_state : None, int, RandomState or Generator
        Seed of the portfolios and the splits.

    Returns
    -------
    CvMResult

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, fewer than 20 rows.

    Notes
    -----
    The test sees one-dimensional margins: a generator with 12 % too little standard deviation can pass it.
    """
    x, y, null = _panels(real, synthetic, null_panel)
    rng = _generator(random_state)
    null = x if null is None else null
    if weights is None:
        weights = portfolio_weights(x.shape[1], n_portfolios if x.shape[1] > 1 else 1, rng)
    weights = _as_rows(weights, "weights")
    if weights.shape[1] != x.shape[1]:
        raise ValueError(
            f"expected weights for {x.shape[1]} assets, got {weights.shape[1]}, because a portfolio holds "
            "every asset, do give zero to the others"
        )
    share = min(1.0, len(null) / (len(x) + len(y)))
    n, m = max(2, int(share * len(x))), max(2, int(share * len(y)))
    pool = null[rng.permutation(len(null))[: n + m]]
    return _cvm_result(x, y, weights, _cvm_null(pool, weights, _random_masks(n, m, n_null, rng)))


def _random_masks(n: int, m: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, n + m) masks, True for the n rows of the first sample."""
    return rng.permuted(np.tile(np.arange(n + m) < n, (count, 1)), axis=1)


def _cvm_null(pool, weights, masks):
    """Rejection rate and mean p of every split (each of shape (s,)), and the two sizes of a split."""
    n = int(masks[0].sum())
    p = cvm_p_value(_cvm_statistics(weights @ pool.T, masks), n, len(pool) - n)
    return (p < 0.05).mean(axis=1), p.mean(axis=1), (n, len(pool) - n)


def _cvm_result(x, y, weights, null) -> CvMResult:
    rates, mean_ps, null_sizes = null
    mask = np.arange(len(x) + len(y)) < len(x)
    statistic = _cvm_statistics(weights @ np.vstack([x, y]).T, mask[None, :])[0]
    p = cvm_p_value(statistic, len(x), len(y))
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


# Metrics


def _summary(x: np.ndarray) -> dict:
    """What `_panel_errors` compares, from one sample in the layout (d, n)."""
    d, n = x.shape
    mean = x.mean(axis=1)
    centred = x - mean[:, None]
    squares = centred * centred
    variance = squares.mean(axis=1)
    live = variance > 0
    safe = np.where(live, variance, 1.0)
    ordered = np.sort(x, axis=1)
    place = np.array([*_LEVELS, 0.5]) * (n - 1)
    low = np.minimum(place.astype(int), n - 2)
    quantiles = ordered[:, low] + (place - low) * (ordered[:, low + 1] - ordered[:, low])
    covariance = centred @ centred.T / n
    portfolio = centred.mean(axis=0)
    power = np.mean(portfolio**2)
    return {
        "n": n,
        "live": live,
        "mean": mean,
        "sd": np.sqrt(variance),
        "skewness": np.einsum("ij,ij->i", squares, centred) / n / safe**1.5,
        "kurtosis": np.einsum("ij,ij->i", squares, squares) / n / safe**2,
        "kurtosis_portfolio": np.mean(portfolio**4) / power**2 if power > 0 else 0.0,
        "quantiles_portfolio": np.quantile(portfolio, (0.01, 0.5)) + mean.mean(),
        "quantiles": quantiles.T,
        "correlation": (covariance / np.sqrt(np.outer(safe, safe)))[np.triu_indices(d, 1)],
        "tail": _tail_dependence(x, ordered),
    }


def _tail_dependence(x: np.ndarray, ordered: np.ndarray) -> float:
    d, n = x.shape
    if d == 1 or n * _TAIL_LEVELS[0] < 1:
        return float("nan")
    total = 0.0
    for u in _TAIL_LEVELS:
        k = int(u * n)
        # c assets that are bad in one row make c(c-1)/2 pairs: no (d, d) table is needed.
        count = (x <= ordered[:, k - 1 : k]).sum(axis=0, dtype=np.int64)
        total += (count * (count - 1)).sum() / (d * (d - 1) * k)
    return float(total / len(_TAIL_LEVELS))


def _panel_errors(real: dict, synthetic: dict) -> dict[str, float]:
    nan = float("nan")
    rows = min(real["n"], synthetic["n"])
    live = real["live"]
    ratio = {key: synthetic[key][live] / real[key][live] for key in ("sd", "kurtosis")}
    error = np.sqrt(real["sd"] ** 2 / real["n"] + synthetic["sd"] ** 2 / synthetic["n"])[live]
    out = {
        "mean_error_se": np.mean(np.abs(synthetic["mean"] - real["mean"])[live] / error),
        "sd_ratio": np.median(ratio["sd"]),
        "sd_ratio_min": np.min(ratio["sd"]),
        "sd_ratio_max": np.max(ratio["sd"]),
        "skewness_error": np.mean(np.abs(synthetic["skewness"] - real["skewness"])),
        "kurtosis_ratio": np.median(ratio["kurtosis"]),
        "kurtosis_ratio_portfolio": synthetic["kurtosis_portfolio"] / real["kurtosis_portfolio"],
    }
    span = np.abs(real["quantiles"] - real["quantiles"][-1])
    gap = np.abs(synthetic["quantiles"] - real["quantiles"])
    for i, level in enumerate(_LEVELS):
        known = span[i] > 0
        enough = rows * min(level, 1 - level) >= 1 - 1e-9 and known.any()
        out[f"q{100 * level:g}_error"] = np.mean(gap[i, known] / span[i, known]) if enough else nan
    (bad, middle), (other, _) = real["quantiles_portfolio"], synthetic["quantiles_portfolio"]
    enough = rows >= 100 and bad < middle
    out["q1_error_portfolio"] = abs(other - bad) / (middle - bad) if enough else nan
    out["tail_dependence_ratio"] = synthetic["tail"] / real["tail"] if real["tail"] > 0 else nan
    r = real["correlation"]
    difference = synthetic["correlation"] - r
    several = len(r) > 0
    out["correlation_error"] = np.abs(difference).mean() if several else nan
    out["correlation_max_error"] = np.abs(difference).max() if several else nan
    norm = np.sqrt(len(live) + 2 * (r @ r))
    out["correlation_frobenius"] = np.sqrt(2 * (difference @ difference)) / norm if several else nan
    return {key: float(value) for key, value in out.items()}


def panel_metrics(real, synthetic) -> dict[str, float]:
    """Errors of moments, quantiles, tail dependence and correlations.

    Parameters
    ----------
    real : array or DataFrame (n, d)
        Simple returns that the generator never saw.
    synthetic : array or DataFrame (m, d)
        Scenarios.

    Returns
    -------
    dict of float
        ``mean_error_se``: mean over assets of the gap of means in its standard errors. ``sd_ratio`` (median
        over assets), ``sd_ratio_min``, ``sd_ratio_max``: synthetic over real. ``skewness_error``: mean gap.
        ``kurtosis_ratio``: median ratio of the fourth standardised moments (3 for a Gaussian; nothing is
        subtracted, so that thin tails give a ratio too); ``kurtosis_ratio_portfolio``: that of the
        equal-weighted portfolio. ``q1_error`` and its like: mean over assets of the gap of the 1 % quantiles
        over the distance of the real one from its median; NaN where fewer than one row lies beyond.
        ``q1_error_portfolio``: that of the equal-weighted portfolio.
        ``tail_dependence_ratio``: of `lower_tail_dependence`. ``correlation_error``,
        ``correlation_max_error``: mean and maximum gap off the diagonal; ``correlation_frobenius``: norm of
        the gap over that of the real matrix. Metrics of pairs are NaN for a single asset.

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, fewer than 20 rows, a real asset that never moves.
    """
    x, y, _ = _panels(real, synthetic)
    return _panel_errors(_summary(x.T), _summary(y.T))


def lower_tail_dependence(x) -> float:
    """P(both assets of a pair are among their worst u rows) / u: mean over pairs and over u = 2, 3, 4, 5 %.

    Parameters
    ----------
    x : array or DataFrame (n, d)
        Returns, n >= 50 and d >= 2 (else NaN).

    Returns
    -------
    float
        About .035 for independent assets, 1 for assets that fall together.

    Raises
    ------
    ValueError
        On non-finite values.

    References
    ----------
    H. Joe, "Multivariate models and dependence concepts" (1997), at a finite u.
    """
    columns = _as_rows(x, "x").T
    return _tail_dependence(columns, np.sort(columns, axis=1))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = -2.0 * (x @ y.T)
    squared += np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    np.maximum(squared, 0.0, out=squared)
    return np.sqrt(squared, out=squared)


def energy_distance(real, synthetic) -> float:
    """Energy distance over 2 E|x-y|, every asset in its real standard deviations.

    Parameters
    ----------
    real : array or DataFrame (n, d)
        Reference; its standard deviations are the units.
    synthetic : array or DataFrame (m, d)
        Scenarios.

    Returns
    -------
    float
        In [0, 1]. The V-statistic (pairs x = x' count as 0): never negative, and about (1/n + 1/m)/2 for two
        samples of one law.

    Raises
    ------
    ValueError
        As `panel_metrics`.

    Notes
    -----
    Uses all rows, in blocks: O((n + m)^2 d) time, bounded memory. `validate` passes at most 1500 of each.

    References
    ----------
    G. J. Szekely & M. L. Rizzo, "Energy statistics: a class of statistics based on distances" (2013).
    """
    x, y, _ = _panels(real, synthetic)
    x, y = x - x.mean(axis=0), y - x.mean(axis=0)
    scale = x.std(axis=0)
    x, y = x / scale, y / scale

    def mean_distance(a, b):
        step = max(1, 2**21 // len(b))
        return sum(_distances(a[s : s + step], b).sum() for s in range(0, len(a), step)) / (len(a) * len(b))

    # |x|^2 + |x|^2 - 2xx leaves rounding instead of 0 on the diagonal: 1e-8 a row, far below 1/n.
    cross = mean_distance(x, y)
    return (
        float(max(0.0, 1.0 - (mean_distance(x, x) + mean_distance(y, y)) / (2.0 * cross))) if cross else 0.0
    )


def _energy_null(pool: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Normalised energy distance of every split (s,): one distance matrix, one product with all masks."""
    pool = (pool - pool.mean(axis=0)) / pool.std(axis=0)
    distances = _distances(pool, pool)
    a = masks.T / masks.sum(axis=1)
    b = ~masks.T / (~masks).sum(axis=1)
    to_a = distances @ a
    cross = np.einsum("is,is->s", b, to_a)
    # Row sums are shared: D 1 = n D a + m D b gives D b without a second product.
    to_b = (distances.sum(axis=1)[:, None] - to_a * masks.sum(axis=1)) / (~masks).sum(axis=1)
    return 1.0 - (np.einsum("is,is->s", a, to_a) + np.einsum("is,is->s", b, to_b)) / (2.0 * cross)


def classifier_auc(real, synthetic, *, max_rows: int = _CLASSIFIER_ROWS, random_state=None) -> float:
    """Classifier two-sample test: AUC of gradient-boosted trees that tell scenarios from real rows.

    Trees, because they see tails and interactions that a logistic regression on quadratic features cannot (a
    Gaussian with the right covariance has the right quadratic features). Five folds, 50 trees of 15 leaves,
    about 0.3 s for 2500 rows of 20 assets on either side. Rows that occur twice stand in training and test
    folds alike and are recognised, so a bootstrap does not reach 1/2.

    Parameters
    ----------
    real, synthetic : array or DataFrame (n, d), (m, d)
        Simple returns and scenarios.
    max_rows : int
        Rows drawn at random from a larger sample.
    random_state : None, int, RandomState or Generator
        Seed of the folds and the rows drawn.

    Returns
    -------
    float
        Mean AUC over folds: 1/2 when the classifier learns nothing, 1 when it errs nowhere.

    Raises
    ------
    ValueError
        As `panel_metrics`.

    References
    ----------
    D. Lopez-Paz & M. Oquab, "Revisiting classifier two-sample tests" (2017), arXiv:1610.06545.
    """
    x, y, _ = _panels(real, synthetic)
    rng = _generator(random_state)
    return _auc(*(_subset(a, max_rows, rng) for a in (x, y)), rng)


def _auc(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    rows, label = np.vstack([x, y]), np.repeat([0, 1], [len(x), len(y)])
    fold = np.concatenate([rng.permutation(len(a)) % 5 for a in (x, y)])
    model = HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=15, early_stopping=False, random_state=int(rng.integers(2**31))
    )
    scores = []
    for k in range(5):
        # One thread: on a shared machine OpenMP's waiting threads cost more than a second core brings.
        with threadpool_limits(limits=1):
            model.fit(rows[fold != k], label[fold != k])
            rank = stats.rankdata(model.decision_function(rows[fold == k]))
        hit = label[fold == k] == 1
        wins = rank[hit].sum() - hit.sum() * (hit.sum() + 1) / 2
        scores.append(wins / (hit.sum() * (~hit).sum()))
    return float(np.mean(scores))


def qq_data(real, synthetic, weights=None, *, assets=(), n_points: int = 200) -> pd.DataFrame:
    """Matching quantiles of a portfolio (and of assets), with a 95 % band of the real ones.

    Parameters
    ----------
    real, synthetic : array or DataFrame (n, d), (m, d)
        Simple returns.
    weights : array (d,), optional
        The portfolio; default equal weights.
    assets : sequence of column names (or positions for arrays), or "all"
        Assets to add, each as its own series.
    n_points : int
        Probabilities (i - 1/2)/n_points.

    Returns
    -------
    DataFrame
        Columns ``series`` ("portfolio" or the asset), ``probability``, ``real``, ``synthetic``,
        ``real_low``, ``real_high``; returns in the units of the data. The band is pointwise and
        distribution-free: two order statistics whose ranks are binomial quantiles; NaN where the sample is
        too small to bound that side.

    Raises
    ------
    ValueError
        As `panel_metrics`; also on unknown assets and weights of another length.

    References
    ----------
    H. A. David & H. N. Nagaraja, "Order statistics" (2003), section 7.1.
    """
    x, y, _ = _panels(real, synthetic)
    d = x.shape[1]
    w = np.full(d, 1.0 / d) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (d,):
        raise ValueError(
            f"expected weights of shape ({d},), got {w.shape}, because a portfolio holds every asset, do "
            "give zero to the others"
        )
    names = list(getattr(real, "columns", range(d)))
    chosen = names if isinstance(assets, str) and assets == "all" else list(assets)
    unknown = [a for a in chosen if a not in names]
    if unknown:
        raise ValueError(
            f"expected assets among {names}, got {unknown[0]!r}, because only columns of the panel have "
            'quantiles, do name a column or pass "all"'
        )
    n = len(x)
    p = (np.arange(n_points) + 0.5) / n_points
    low, high = stats.binom.ppf([[0.025], [0.975]], n, p).astype(int)
    frames = []
    for name, column in [("portfolio", w), *((a, np.eye(d)[names.index(a)]) for a in chosen)]:
        ordered = np.sort(x @ column)
        frames.append(
            pd.DataFrame(
                {
                    "series": [name] * n_points,
                    "probability": p,
                    "real": np.quantile(ordered, p),
                    "synthetic": np.quantile(y @ column, p),
                    "real_low": np.where(low >= 1, ordered[np.maximum(low, 1) - 1], np.nan),
                    "real_high": np.where(high < n, ordered[np.minimum(high, n - 1)], np.nan),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


# The report


@dataclass(frozen=True, eq=False)
class ValidationReport:
    """Every metric of a set of scenarios beside its real-vs-real floor.

    Attributes
    ----------
    verdict : str
        One plain sentence.
    within_floor : bool
        Are the scenarios, over all judged metrics together, no further from the real rows than chance allows?
    p_value : float
        Fraction of random splits of real rows whose furthest metric lies as far out.
    table : DataFrame
        See `to_frame`.
    cvm : CvMResult
    settings : dict
        Sizes, counts and seed of the run.
    """

    verdict: str
    within_floor: bool
    p_value: float
    table: pd.DataFrame
    cvm: CvMResult
    settings: dict

    def to_frame(self) -> pd.DataFrame:
        """Metrics by ``scenarios``, ``floor``, ``floor_high``, ``verdict``.

        ``floor`` is the value of real rows in the place of scenarios: the training rows where they were
        given, the mean over random splits otherwise. ``floor_high`` is the 95 % bound over random splits,
        moved out by as much as the training rows themselves exceed the mean of the splits; a ratio is within
        its floor between 1/floor_high and floor_high, ``cvm_mean_p`` above floor_high, all else below.
        """
        return self.table.copy()

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, for JSON; NaN and infinity become None."""
        table = {
            name: {key: _plain(value) for key, value in row.items()}
            for name, row in self.table.to_dict("index").items()
        }
        return {
            "verdict": self.verdict,
            "within_floor": self.within_floor,
            "p_value": _plain(self.p_value),
            "metrics": table,
            "cvm": self.cvm.to_dict(),
            "settings": {key: _plain(value) for key, value in self.settings.items()},
        }


class _Floor:
    """What real rows do against real rows: drawn once, shared by every generator that is judged by it."""

    def __init__(self, x, train, m, n_portfolios, n_null, random_state):
        rng = _generator(random_state)
        seeds = rng.integers(2**63, size=3)
        d = x.shape[1]
        if train is None:
            self.n, self.m = len(x) // 2, min(m, len(x) - len(x) // 2)
            pool = x[rng.permutation(len(x))[: self.n + self.m]]
        else:
            self.n, self.m = len(x), min(m, len(x), len(train))
            pool = np.vstack([x, _subset(train, self.m, rng)])
        if min(self.n, self.m) < _MIN_ROWS:
            raise ValueError(
                f"expected at least {_MIN_ROWS} rows on either side of a comparison, got {self.n} real and "
                f"{self.m} others, because smaller samples tell nothing (without train the real rows are "
                "halved), do pass more rows"
            )
        self.x, self.train, self.seed = x, train, int(seeds[0])
        self.weights = portfolio_weights(d, n_portfolios if d > 1 else 1, np.random.default_rng(seeds[1]))
        masks = _random_masks(self.n, self.m, n_null, np.random.default_rng(seeds[2]))
        self.cvm_null = _cvm_null(pool, self.weights, masks)
        columns = np.ascontiguousarray(pool.T)
        draws = [_panel_errors(_summary(columns[:, k]), _summary(columns[:, ~k])) for k in masks]
        null = {key: np.array([draw[key] for draw in draws]) for key in draws[0]}
        null["cvm_rejection_rate"], null["cvm_mean_p"], _ = self.cvm_null
        self.energy_rows = min(self.n, _ENERGY_ROWS), min(self.m, _ENERGY_ROWS)
        part = pool[rng.permutation(len(pool))[: sum(self.energy_rows)]]
        null["energy_distance"] = _energy_null(part, _random_masks(*self.energy_rows, n_null, rng))
        a, b = min(self.n, _CLASSIFIER_ROWS), min(self.m, _CLASSIFIER_ROWS)
        # Mann-Whitney's deviation of an AUC, and 1.4 for folds that share training rows (1.13 to 1.42 in null
        # studies of 60 to 2500 rows).
        deviation = 1.4 * np.sqrt((a + b + 1) / (12 * a * b))
        null["c2st_auc"] = 0.5 + deviation * rng.standard_normal(n_null)
        self.nearest = None
        if train is not None:
            self.nearest = _two_nearest(x, train, True)
            first = self.nearest[:, 0]
            null["nn_ratio"] = np.array(
                [_median_ratio(rng.choice(first, self.m), rng.choice(first, self.n)) for _ in range(n_null)]
            )
            k = int(_copies(self.nearest).sum())
            # The floor's own fraction is an estimate from n rows: its Beta posterior, then m scenarios.
            chance = rng.beta(k + 0.5, self.n - k + 0.5, size=n_null)
            null["memorised_fraction"] = rng.binomial(self.m, chance) / self.m
        blank = np.full(n_null, np.nan)
        self.null = pd.DataFrame({key: null.get(key, blank) for key in _KIND})
        bad = _badness(self.null)
        self.middle = bad.quantile(0.5, interpolation="higher")
        high = bad.quantile(0.95, interpolation="higher")
        self.spread = (high - self.middle).where(np.isfinite(high) & (high > self.middle))
        few = [f"q{100 * p:g}_error" for p in _LEVELS if min(self.n, self.m) * min(p, 1 - p) < _TAIL_ROWS]
        # The bounds learn the tail's law from these very rows: from few beyond the quantile they learn it wrong.
        self.spread[[*_SHOWN_ONLY, *few, *(["q1_error_portfolio"] if "q1_error" in few else [])]] = np.nan
        self.furthest = self._z(bad).max(axis=1).to_numpy()
        self.threshold = float(np.quantile(self.furthest, 0.99, method="higher"))
        self.values = self.null.mean()
        self.shift = 0.0
        if train is not None:
            self.values, _ = self.measure(pool[self.n :], own=True)
            # Training rows may differ from later ones by more than chance; no generator can undo that.
            self.shift = (_badness(self.values) - bad.mean()).clip(lower=0.0).fillna(0.0)
        self.high = high + self.shift

    def _z(self, bad):
        return (bad - self.middle) / self.spread

    def measure(self, y: np.ndarray, own: bool = False) -> tuple[pd.Series, CvMResult]:
        """All metrics of y. `own`: y are training rows, each of which is its own nearest training row."""
        rng = np.random.default_rng(self.seed)
        whole = self.n == len(self.x)
        real = _summary(self.x.T)
        draws = []
        for _ in range(1 if whole and len(y) == self.m else _SUBSETS):
            part = real if whole else _summary(_subset(self.x, self.n, rng).T)
            draws.append(_panel_errors(part, _summary(_subset(y, self.m, rng).T)))
        out = pd.DataFrame(draws).mean().to_dict()
        result = _cvm_result(self.x, y, self.weights, self.cvm_null)
        out["cvm_mean_p"], out["cvm_rejection_rate"] = result.mean_p, result.rejection_rate
        out["energy_distance"] = energy_distance(
            *(_subset(a, k, rng) for a, k in zip((self.x, y), self.energy_rows))
        )
        sizes = min(self.n, _CLASSIFIER_ROWS), min(self.m, _CLASSIFIER_ROWS)
        out["c2st_auc"] = _auc(*(_subset(a, k, rng) for a, k in zip((self.x, y), sizes)), rng)
        if self.nearest is not None:
            near = self.nearest if own else _two_nearest(_subset(y, self.m, rng), self.train, True)
            out["nn_ratio"] = _median_ratio(near[:, 0], self.nearest[:, 0])
            out["memorised_fraction"] = float(_copies(near).mean())
        return pd.Series({key: out.get(key, np.nan) for key in _KIND}), result

    def judge(self, y: np.ndarray, settings: dict) -> ValidationReport:
        values, result = self.measure(y)
        bad = _badness(values)
        z = self._z(bad - self.shift)
        judged = self.spread.notna() & values.notna()
        beyond = judged & (bad > self.high)
        label = pd.Series("not judged", index=values.index)
        label[judged] = "within floor"
        label[beyond] = "beyond floor"
        worst = float(z[judged].max())
        within = worst <= self.threshold
        p = float((1 + (self.furthest >= worst).sum()) / (1 + len(self.furthest)))
        top = ", ".join(z[beyond].sort_values(ascending=False).index[:3])
        count = f"{int(beyond.sum())} of {int(judged.sum())} metrics lie outside their 95 % bound"
        if within:
            verdict = f"Within the real-vs-real floor: {count}, as chance allows (p = {p:.3f})"
        else:
            verdict = f"Beyond the real-vs-real floor (p = {p:.3f}): {count}, furthest {top}"
        if beyond["memorised_fraction"] or (beyond["nn_ratio"] and values["nn_ratio"] < 1):
            verdict += "; the scenarios lie on training rows"
        if self.train is not None and self._z(_badness(self.values)).max() > self.threshold:
            verdict += "; the training rows themselves differ from the real rows by more than chance"
        table = pd.DataFrame(
            {
                "scenarios": values,
                "floor": self.values,
                "floor_high": _from_badness(self.high).where(np.isfinite(self.high)),
                "verdict": label.astype(object),
            }
        )
        settings = settings | {"rows_real": self.n, "rows_synthetic": self.m}
        return ValidationReport(verdict + ".", bool(within), p, table, result, settings)


def _copies(nearest: np.ndarray) -> np.ndarray:
    return (nearest[:, 0] < nearest[:, 1] / 3) | (nearest[:, 1] == 0)


def _badness(values):
    """Distance from ideal, for a Series of metrics or a DataFrame of them; NaN counts as infinite."""
    kind = pd.Series(_KIND)
    out = values.copy()
    ratio, p = kind.index[kind == "ratio"], kind.index[kind == "p"]
    safe = values[ratio].clip(lower=np.finfo(float).tiny)
    out[ratio] = np.abs(np.log(safe)).where(values[ratio] > 0, np.inf)
    out[p] = 1.0 - values[p]
    return out.fillna(np.inf)


def _from_badness(bad: pd.Series) -> pd.Series:
    kind = pd.Series(_KIND)
    out = bad.copy()
    out[kind == "ratio"] = np.exp(bad[kind == "ratio"])
    out[kind == "p"] = np.maximum(1.0 - bad[kind == "p"], 0.0)
    return out


def validate(
    real,
    synthetic,
    train=None,
    *,
    n_portfolios: int = 200,
    n_null: int = 200,
    max_rows: int = 5000,
    random_state=0,
) -> ValidationReport:
    """Judge scenarios against rows that the generator never saw.

    Parameters
    ----------
    real : array or DataFrame (n, d)
        Simple returns per period that the generator never saw. Testing on training rows rewards copies.
    synthetic : array or DataFrame (m, d)
        Scenarios; frames must carry the same columns in the same order.
    train : array or DataFrame (t, d), optional
        The generator's training rows. They give the floor (training rows in the place of scenarios) and the
        memorisation metrics. Without them the floor comes from random halves of `real`.
    n_portfolios : int
        Random portfolios of the Cramer-von Mises test.
    n_null : int
        Random splits of real rows behind every bound, at least 20.
    max_rows : int
        Rows used of each sample, drawn at random from more.
    random_state : None, int, RandomState or Generator
        Seed of everything that is drawn.

    Returns
    -------
    ValidationReport

    Raises
    ------
    ValueError
        On non-finite values (naming the column), columns that disagree, an asset that never moves, fewer than
        20 rows on either side of a comparison, n_null < 20, or held-out rows that stand in `train`.

    Notes
    -----
    Scenario and floor numbers use equally many rows: errors shrink with size, and unequal sizes would flatter
    one side. More scenarios than real rows are compared in 8 random subsets and averaged. Bounds assume that
    rows are exchangeable between splits; volatility clusters make a split in time differ by more than that,
    and the verdict says so. The portfolio metrics hold money weights and so depend on the scale of assets;
    the others do not change when an asset is rescaled.
    """
    return _judge_all(real, {"": synthetic}, train, n_portfolios, n_null, max_rows, random_state)[0][""]


def compare(
    real,
    synthetics: Mapping[str, object],
    train=None,
    *,
    n_portfolios: int = 200,
    n_null: int = 200,
    max_rows: int = 5000,
    random_state=0,
) -> pd.DataFrame:
    """One row per generator and a last row for real against real; the floor is computed once.

    Parameters
    ----------
    real, train, n_portfolios, n_null, max_rows, random_state
        As in `validate`.
    synthetics : mapping from a generator's name to its scenarios (m_i, d)
        All are compared at the size of the smallest.

    Returns
    -------
    DataFrame
        Ten main metrics of `validate`, ``beyond`` (how many of all metrics lie outside their 95 % bound)
        and ``verdict`` ("within floor", "beyond floor"; "floor" in the last row, `FLOOR_ROW`).

    Raises
    ------
    ValueError
        As `validate`; also without any generator.
    """
    if not synthetics:
        raise ValueError(
            "expected at least one generator, got none, because there is nothing to compare, do pass a dict"
        )
    reports, floor = _judge_all(real, synthetics, train, n_portfolios, n_null, max_rows, random_state)
    rows = {}
    for name, report in reports.items():
        rows[name] = report.table["scenarios"][_MAIN].to_dict()
        rows[name]["beyond"] = int((report.table["verdict"] == "beyond floor").sum())
        rows[name]["verdict"] = "within floor" if report.within_floor else "beyond floor"
    own = floor.spread.notna() & (_badness(floor.values) > floor.high)
    rows[FLOOR_ROW] = floor.values[_MAIN].to_dict() | {"beyond": int(own.sum()), "verdict": "floor"}
    return pd.DataFrame.from_dict(rows, orient="index")


def _judge_all(real, synthetics, train, n_portfolios, n_null, max_rows, random_state):
    if n_null < 20:
        raise ValueError(
            f"expected n_null >= 20, got {n_null}, because a 95 % bound needs one split in twenty beyond it, "
            "do pass 200"
        )
    rng = _generator(random_state)
    seed = int(rng.integers(2**63))
    samples = {}
    for name, synthetic in synthetics.items():
        x, y, t = _panels(real, synthetic, train)
        samples[name] = _subset(y, max_rows, np.random.default_rng(seed))
    x = _subset(x, max_rows, rng)
    floor = _Floor(x, t, min(map(len, samples.values())), n_portfolios, n_null, rng)
    settings = {
        "n_portfolios": n_portfolios,
        "n_null": n_null,
        "max_rows": max_rows,
        "random_state": random_state if isinstance(random_state, int) else None,
        "rows_given": [len(real), 0, 0 if train is None else len(train)],
    }
    reports = {}
    for name, y in samples.items():
        settings["rows_given"] = [len(real), len(synthetics[name]), settings["rows_given"][2]]
        reports[name] = floor.judge(y, settings)
    return reports, floor


def _panels(real, synthetic, third=None):
    """Checked arrays of the real rows, the scenarios and (if given) more real rows."""
    x, y = _as_rows(real, "real", _MIN_ROWS), _as_rows(synthetic, "synthetic", _MIN_ROWS)
    _same_columns(real, x, synthetic, y, "real", "synthetic")
    z = None
    if third is not None:
        z = _as_rows(third, "train", _MIN_ROWS)
        _same_columns(real, x, third, z, "real", "train")
    still = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if still.size:
        label = list(getattr(real, "columns", range(x.shape[1])))[still[0]]
        raise ValueError(
            f"expected real assets that move, got a constant column {label!r}, because its ratios divide by "
            "zero, do drop that asset"
        )
    return x, y, z


def _same_columns(a, left, b, right, first: str, second: str) -> None:
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"expected {second} with the {left.shape[1]} columns of {first}, got {right.shape[1]}, because "
            "they are compared column by column, do select the same assets"
        )
    if hasattr(a, "columns") and hasattr(b, "columns"):
        for i, (p, q) in enumerate(zip(a.columns, b.columns)):
            if p != q:
                raise ValueError(
                    f"expected the columns of {second} in the order of {first}, got {q!r} for {p!r} at "
                    f"position {i}, because assets are matched by place, do reindex one of them"
                )


def _subset(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` rows at random, without replacement."""
    return x if len(x) <= count else x[rng.permutation(len(x))[:count]]


def _generator(random_state) -> np.random.Generator:
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31 - 1))
    return np.random.default_rng(random_state)


def _plain(value):
    """A number, string, list or None that JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value

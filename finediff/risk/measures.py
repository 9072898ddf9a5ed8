"""Risk: losses, drawdowns and their sampling error, of portfolio returns.

With n returns sorted upwards x_(1) <= ... <= x_(n), level a, and F_n^{-1}(u) = x_(ceil(n u)):

    value at risk        VaR_a = -F_n^{-1}(a) = -x_(k),   k = ceil(n a)
    expected shortfall   ES_a  = -(1/a) int_0^a F_n^{-1}(u) du
                               = -(sum_{i<k} x_(i) + (n a - k + 1) x_(k)) / (n a)
    standard errors      VaR: sd of x_(i) under the weights P[(i-1)/n < Beta(k, n-k+1) <= i/n]
                         ES:  sd((q - x)^+) / (a sqrt n),   q = x_(k)
    drawdown             max_t 1 - W_t / max_{s<=t} W_s,   W_0 = 1,  W_t = prod_{s<=t} (1 + r_s)

Losses are positive numbers. Returns are simple, per period; only `annual_volatility` and `sharpe_ratio` are
annualised. Every function takes a vector (n,), a panel (n, d) read column by column, or a panel and
``weights`` (d,), held constant (rebalanced every period).
"""

import numpy as np
import pandas as pd
from scipy.stats import beta

__all__ = [
    "annual_volatility",
    "drawdown",
    "expected_shortfall",
    "expected_shortfall_standard_error",
    "sharpe_ratio",
    "tail_risk_table",
    "turnover",
    "var",
    "var_standard_error",
]


def _columns(returns, weights):
    """Returns as a float (n, k) array, and how to hand k numbers back in the shape that was asked for."""
    if isinstance(weights, pd.Series) and isinstance(returns, pd.DataFrame):
        missing = weights.index.symmetric_difference(returns.columns)
        if len(missing):
            raise ValueError(
                f"expected weights and returns on the same assets, got a mismatch: {list(missing)[:5]}."
            )
        weights = weights[returns.columns]
    x = np.asarray(returns, float)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"expected returns of shape (n,) or (n, d) with rows, got {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"expected finite returns, got {int((~np.isfinite(x)).sum())} NaN or infinite; drop them first."
        )
    if weights is not None:
        w = np.asarray(weights, float)
        if x.ndim != 2 or w.shape != x.shape[1:]:
            raise ValueError(f"expected a panel (n, d) and weights (d,), got {x.shape} and {w.shape}.")
        return (x @ w)[:, None], lambda values: float(values[0])
    if x.ndim == 1:
        return x[:, None], lambda values: float(values[0])
    if isinstance(returns, pd.DataFrame):
        return x, lambda values: pd.Series(values, index=returns.columns)
    return x, np.asarray


def rank(n, level):
    """n a and k = ceil(n a) for n rows at level a; refuses a level outside (0, 1) or beyond the worst row."""
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), the probability of the tail, got {level}.")
    na = n * level
    if na < 1 - 1e-9:
        needed = int(np.ceil(1 / level - 1e-9))
        raise ValueError(
            f"expected at least {needed} rows at level {level}, got {n}: the quantile lies beyond the "
            "worst return; take more rows or a larger level."
        )
    # 0.05 * 100 is 5.000000000000001 in floating point and must not become the sixth row
    return na, int(np.ceil(na - 1e-9))


def _tail(x, level):
    """Columns sorted upwards, n a, and k = ceil(n a)."""
    na, k = rank(len(x), level)
    return np.sort(x, axis=0), na, k


def var(returns, level=0.05, weights=None):
    """Value at risk: the loss of the ceil(n level)-th worst row, as a positive number per period.

    Parameters
    ----------
    returns : (n,) or (n, d) array, Series or DataFrame
        Simple returns; at least 1/level rows.
    level : float
        Probability of the lower tail, in (0, 1).
    weights : (d,) array or Series, optional
        Portfolio weights; a Series is matched to the columns of a DataFrame by name.

    Returns
    -------
    float, (d,) array or Series

    Raises
    ------
    ValueError
        Fewer than 1/level rows, non-finite returns, or shapes or names that disagree.

    Examples
    --------
    >>> var([-0.04, 0.01, -0.02, 0.03], level=0.5)
    0.02
    """
    x, wrap = _columns(returns, weights)
    x, _, k = _tail(x, level)
    return wrap(-x[k - 1])


def expected_shortfall(returns, level=0.05, weights=None):
    """Expected shortfall: the mean loss in the worst ``level`` of the rows, the last by its fraction.

    The fraction makes it coherent at every n and level (Acerbi, Tasche 2002). Parameters, returns and errors
    as in `var`.

    Examples
    --------
    >>> round(expected_shortfall([-0.04, 0.01, -0.02, 0.03], level=0.375), 6)
    0.033333
    """
    x, wrap = _columns(returns, weights)
    x, na, k = _tail(x, level)
    return wrap(-(x[: k - 1].sum(axis=0) + (na - k + 1) * x[k - 1]) / na)


def var_standard_error(returns, level=0.05, weights=None):
    """Standard error of `var` for independent rows: the bootstrap of the order statistic in closed form.

    (Maritz, Jarrett 1978.) It rests on the rows next to the quantile alone, so with n level near one it is a
    lower estimate: losses beyond the worst seen have no weight. Clustered volatility makes the true error
    larger. Parameters and errors as in `var`.
    """
    x, wrap = _columns(returns, weights)
    x, _, k = _tail(x, level)
    n = len(x)
    weight = np.diff(beta.cdf(np.arange(n + 1) / n, k, n - k + 1))[:, None]
    mean = (weight * x).sum(axis=0)
    return wrap(np.sqrt((weight * (x - mean) ** 2).sum(axis=0)))


def expected_shortfall_standard_error(returns, level=0.05, weights=None):
    """Standard error of `expected_shortfall` for independent rows, from its influence (q - x)^+ / level.

    (Manistre, Hancock 2005.) Parameters, caveats and errors as in `var_standard_error`.
    """
    x, wrap = _columns(returns, weights)
    sorted_x, _, k = _tail(x, level)
    excess = np.maximum(sorted_x[k - 1] - x, 0.0)
    return wrap(excess.std(axis=0) / (level * np.sqrt(len(x))))


def drawdown(returns, weights=None):
    """Maximum drawdown, a fraction in [0, 1], from the initial capital: a first-day loss counts.

    Raises
    ------
    ValueError
        A return below -100 % (the capital would turn negative), non-finite returns, or shapes that disagree.

    Examples
    --------
    >>> round(drawdown([-0.1, 0.05]), 12)
    0.1
    """
    x, wrap = _columns(returns, weights)
    if x.min() < -1:
        raise ValueError(f"expected returns of at least -1, got {x.min():.3g}; are they in per cent?")
    wealth = np.vstack([np.ones(x.shape[1]), np.cumprod(1 + x, axis=0)])
    return wrap((1 - wealth / np.maximum.accumulate(wealth, axis=0)).max(axis=0))


def annual_volatility(returns, periods=252, weights=None):
    """Standard deviation (n - 1 in the denominator) times sqrt(periods), ``periods`` a year.

    Raises
    ------
    ValueError
        Fewer than two rows, non-finite returns, or shapes that disagree.
    """
    x, wrap = _columns(returns, weights)
    if len(x) < 2:
        raise ValueError("expected at least two rows for a volatility, got one.")
    return wrap(x.std(axis=0, ddof=1) * np.sqrt(periods))


def sharpe_ratio(returns, risk_free=0.0, periods=252, weights=None):
    """Annualised Sharpe ratio, sqrt(periods) mean(r - risk_free) / sd(r); ``risk_free`` is per period.

    Raises
    ------
    ValueError
        Constant returns (no ratio), fewer than two rows, non-finite returns, shapes that disagree.
    """
    x, wrap = _columns(returns, weights)
    if len(x) < 2 or (np.ptp(x, axis=0) == 0).any():
        raise ValueError(
            "expected returns that vary over at least two rows, got constant ones: no Sharpe ratio."
        )
    return wrap(np.sqrt(periods) * (x.mean(axis=0) - risk_free) / x.std(axis=0, ddof=1))


def turnover(before, after):
    """Sum of |after - before| over the assets: purchases plus sales, so 2 when everything is replaced.

    Two Series are matched by name, an asset absent on one side weighs zero there; two arrays must have one
    shape (d,).

    Raises
    ------
    ValueError
        Shapes that disagree, a Series against an array, or non-finite weights.

    Examples
    --------
    >>> turnover([1.0, 0.0], [0.0, 1.0])
    2.0
    """
    if isinstance(before, pd.Series) != isinstance(after, pd.Series):
        raise ValueError("expected two Series or two arrays, got one of each: their order cannot be matched.")
    if isinstance(before, pd.Series):
        before, after = before.align(after, fill_value=0.0)
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"expected two weight vectors (d,), got {before.shape} and {after.shape}.")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("expected finite weights, got NaN or infinity.")
    return float(np.abs(after - before).sum())


def tail_risk_table(real, scenarios, portfolios, levels=(0.01, 0.05)):
    """Tail risk of portfolios on real rows and on scenarios, with the noise of the real number beside it.

    Parameters
    ----------
    real : (n, d) array or DataFrame
        Real returns, best rows that the generator never saw.
    scenarios : (m, d) array or DataFrame
        Generated returns. Of two DataFrames the columns are matched by name.
    portfolios : mapping name -> (d,) weights, or DataFrame
        A DataFrame has d rows (assets) and one column a portfolio.
    levels : sequence of float
        Probabilities of the lower tail.

    Returns
    -------
    DataFrame
        Index (portfolio, level); columns "VaR real", "VaR scenarios", "VaR real s.e.", "ES real",
        "ES scenarios", "ES real s.e.", all losses per period. A gap below two standard errors is within the
        noise of the real panel.

    Raises
    ------
    ValueError
        As in `var`: in particular when a panel has fewer than 1/level rows; leave such a level out.
    """
    if isinstance(real, pd.DataFrame) and isinstance(scenarios, pd.DataFrame):
        odd = real.columns.symmetric_difference(scenarios.columns)
        if len(odd):
            raise ValueError(
                f"expected real and scenario panels on the same assets, got a mismatch: {list(odd)[:5]}."
            )
        scenarios = scenarios[real.columns]
    rows = {}
    for name, weights in portfolios.items():
        for level in levels:
            rows[name, level] = {
                "VaR real": var(real, level, weights),
                "VaR scenarios": var(scenarios, level, weights),
                "VaR real s.e.": var_standard_error(real, level, weights),
                "ES real": expected_shortfall(real, level, weights),
                "ES scenarios": expected_shortfall(scenarios, level, weights),
                "ES real s.e.": expected_shortfall_standard_error(real, level, weights),
            }
    if not rows:
        raise ValueError("expected at least one portfolio and one level, got none.")
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["portfolio", "level"])
    return table

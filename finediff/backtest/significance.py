"""Are two strategies different, or was it luck? Tests by influence functions, robust to autocorrelation.

A statistic T of n returns has an influence function psi with  T_hat - T = mean psi(r_t) + o(n^-1/2):

    mean           r - m
    log variance   ((r - m)^2 - v) / v
    Sharpe         (r - m)/s - S ((r - m)^2 - v) / (2 v),        S = m/s per period
    CVaR           q_loss - ES + (q - r)^+ / a,                  q the a-quantile, q_loss = -q

so the difference of two strategies over the same days has the mean of d_t = psi_t - psi'_t as its error, with

    s.e.^2 = (1/n) [g_0 + 2 sum_{k<=L} (1 - k/(L+1)) g_k],       g_k = (1/n) sum_t d_t d_{t-k}

(Newey and West 1987). Lags L by default: the larger of 4 (n/100)^(2/9) (Newey and West 1994) and twice the longest
holding period, because positions and clusters of volatility last. References: Ledoit and Wolf (2008, 2011) for
Sharpe and variance; Manistre and Hancock (2005) for CVaR. Two-sided p-values are normal. With k comparisons one of
|t| > 1.96 is no finding: read |t| > 3 where a table has about a hundred.
"""

import numpy as np
import pandas as pd
from scipy.stats import norm

MEASURES = ("mean", "volatility", "Sharpe", "CVaR")


def _check(returns):
    x = np.asarray(returns, float)
    if x.ndim not in (1, 2) or len(x) < 3 or not np.isfinite(x).all():
        raise ValueError(
            f"expected finite returns (n,) or (n, k) with n >= 3, got shape {x.shape}, because tests pair the days; do "
            "drop incomplete days first."
        )
    return x[:, None] if x.ndim == 1 else x


def default_lags(n, holding=1):
    """L: the larger of 4 (n/100)^(2/9) and twice the holding period, less than n.

    Parameters
    ----------
    n : int
        Days.
    holding : int
        Longest period between two decisions.

    Returns
    -------
    int
    """
    return int(min(max(4 * (n / 100) ** (2 / 9), 2 * holding), n - 1))


def influence(returns, measure, level=0.05):
    """A statistic of returns and its influence function.

    Parameters
    ----------
    returns : (n,) or (n, k) array or DataFrame
        Simple returns per period.
    measure : {"mean", "volatility", "Sharpe", "CVaR"}
        Per period; "volatility" is log variance, so that differences are relative.
    level : float
        Of the tail of "CVaR", in (0, 1).

    Returns
    -------
    statistic : (k,) array
    psi : (n, k) array
        Mean 0.

    Raises
    ------
    ValueError
        Unknown measure, returns that are not finite or do not vary.
    """
    x = _check(returns)
    m = x.mean(axis=0)
    centred = x - m
    v = (centred**2).mean(axis=0)
    if measure == "mean":
        return m, centred
    if measure == "CVaR":
        if not 0 < level < 1 or len(x) * level < 1:
            raise ValueError(
                f"expected a level in (0, 1) with at least one day in its tail, got {level} of {len(x)} days, because "
                "CVaR averages them; do take a larger level."
            )
        q = np.quantile(x, level, axis=0, method="inverted_cdf")
        excess = np.maximum(q - x, 0.0) / level
        statistic = -q + excess.mean(axis=0)
        return statistic, -q + excess - statistic
    if (v <= 0).any():
        raise ValueError(
            "expected returns that vary, got constant ones, because they have no volatility; do leave them out."
        )
    spread = (centred**2 - v) / v
    if measure == "volatility":
        return np.log(v), spread
    if measure == "Sharpe":
        ratio = m / np.sqrt(v)
        return ratio, centred / np.sqrt(v) - ratio * spread / 2
    raise ValueError(
        f"expected a measure among {MEASURES}, got {measure!r}, because no other has its influence function here; do "
        "choose one of them."
    )


def long_run_covariance(psi, lags):
    """Newey-West long-run covariance of columns: n times that of their means.

    Parameters
    ----------
    psi : (n, k) array
        Centred here.
    lags : int
        L >= 0; Bartlett weights.

    Returns
    -------
    (k, k) array
        Positive semi-definite.
    """
    psi = psi - psi.mean(axis=0)
    n = len(psi)
    total = psi.T @ psi / n
    for k in range(1, lags + 1):
        gamma = psi[k:].T @ psi[:-k] / n
        total += (1 - k / (lags + 1)) * (gamma + gamma.T)
    return total


def _standard_errors(psi, lags):
    """Of the mean of each column (k,)."""
    psi = psi - psi.mean(axis=0)
    n = len(psi)
    total = (psi**2).sum(axis=0) / n
    for k in range(1, lags + 1):
        total += 2 * (1 - k / (lags + 1)) * (psi[k:] * psi[:-k]).sum(axis=0) / n
    return np.sqrt(np.maximum(total, 0.0) / n)


def sharpe_interval(returns, confidence=0.95, periods=252, lags=None):
    """Annualised Sharpe ratio with its confidence interval.

    In the long run 95 of 100 intervals of a single strategy contain the truth, where returns are stationary; that
    all of several do is less probable.

    Parameters
    ----------
    returns : (n,) or (n, k) array or DataFrame
        Simple returns per period, over the risk-free rate.
    confidence : float
        In (0, 1).
    periods : int
        A year.
    lags : int, optional
        L; `default_lags` of n if None.

    Returns
    -------
    DataFrame (k, 3)
        "Sharpe", "low", "high".
    """
    statistic, psi = influence(returns, "Sharpe")
    error = _standard_errors(psi, default_lags(len(psi)) if lags is None else lags)
    wide = norm.ppf(0.5 + confidence / 2) * error
    table = np.sqrt(periods) * np.stack([statistic, statistic - wide, statistic + wide], axis=1)
    names = returns.columns if isinstance(returns, pd.DataFrame) else None
    return pd.DataFrame(table, names, ["Sharpe", "low", "high"])


def compare(returns, reference, level=0.05, lags=None, holding=1, periods=252):
    """Every strategy against one, paired by day.

    Parameters
    ----------
    returns : DataFrame (n, k)
        Simple returns per period, one column a strategy.
    reference : column
        The strategy compared with.
    level : float
        Of the tail of CVaR.
    lags : int, optional
        L; by default `default_lags` of n and ``holding``.
    holding : int
        Longest period between two decisions.
    periods : int
        A year.

    Returns
    -------
    DataFrame (k - 1, 12)
        For each measure (first level of the columns) "difference", "t", "p"; t < 0: less than the reference.
        "return" and "Sharpe" are annualised differences; "volatility" and "CVaR" are in % of the reference's, and
        the t of volatility is that of log variance.

    Raises
    ------
    ValueError
        No such reference, none to compare, returns that are not finite.
    """
    if reference not in returns.columns:
        raise ValueError(
            f"expected a reference among {list(returns.columns)}, got {reference!r}, because it is paired day by day "
            "with the others; do name one of them."
        )
    others = [name for name in returns.columns if name != reference]
    if not others:
        raise ValueError(
            f"expected a strategy beside {reference!r}, got none, because a comparison needs two; do add one."
        )
    x = returns[[*others, reference]]
    lags = default_lags(len(x), holding) if lags is None else lags
    shown = {
        "return": ("mean", lambda a, b: periods * (a - b)),
        "volatility": ("volatility", lambda a, b: 100 * (np.exp((a - b) / 2) - 1)),
        "Sharpe": ("Sharpe", lambda a, b: np.sqrt(periods) * (a - b)),
        "CVaR": ("CVaR", lambda a, b: 100 * (a / b - 1)),
    }
    table = {}
    for name, (measure, difference) in shown.items():
        statistic, psi = influence(x, measure, level)
        error = _standard_errors(psi[:, :-1] - psi[:, -1:], lags)
        gap = statistic[:-1] - statistic[-1]
        # Two strategies that are the same differ by 0 with certainty: no test.
        t = np.divide(gap, error, out=np.full(len(gap), np.nan), where=error > 1e-300)
        table[name, "difference"] = difference(statistic[:-1], statistic[-1])
        table[name, "t"] = t
        table[name, "p"] = 2 * norm.sf(np.abs(t))
    return pd.DataFrame(table, others)

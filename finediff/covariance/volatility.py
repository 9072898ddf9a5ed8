"""Today's volatility: exponential weights, and a GARCH(1,1) whose two parameters all assets share.

    EWMA     v_i = sum_k l^k x_{n-k,i}^2 / sum_k l^k,   k = 0 ... n - 1
    common   q_t = mean_i x_ti^2/v_i,   h_t = l h_{t-1} + (1 - l) q_t,   h_0 = 1,   v_i = mean_t x_ti^2
    GARCH    x_ti = sqrt(v_i h_ti) e_ti,   h_{t+1,i} = 1 - a - b + a x_ti^2/v_i + b h_ti,   h_1 = 1,
             a, b by maximum likelihood over all assets, e a Student t of 6 degrees and variance 1

Rows (..., n, d) have mean zero and are in order of time; variances are per period, (return per period)^2.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

_DOF = 6.0  # of the shocks: a crash counts less than under a Gaussian, and two parameters are left
_STILL = 0.2  # share of equal returns above which an asset has no part in the parameters
_PERSISTENCE = 0.999  # a + b below it: volatility comes back


def ewma_variance(rows, decay):
    """Exponentially weighted variances (..., d) of rows (..., n, d), the last row counting most."""
    weights = decay ** np.arange(rows.shape[-2] - 1, -1, -1.0)
    return weights @ rows**2 / weights.sum()


def common_variance(rows, decay):
    """Variance h (..., n) that all assets share each day, relative to the mean of the panel, that day included."""
    variance = np.mean(rows**2, axis=-2, keepdims=True)
    q = np.mean(rows**2 / variance, axis=-1)
    start = np.full((*q.shape[:-1], 1), decay)
    return lfilter([1 - decay], [1, -decay], q, axis=-1, zi=start)[0]


def garch_variance(rows, horizon=21):
    """Mean variances (d,) of the next periods.

    Parameters
    ----------
    rows : (n, d) array
        Simple returns less their mean, in order of time; each asset moves.
    horizon : int
        Periods ahead whose variances are averaged.

    Returns
    -------
    variance : (d,) array
    parameters : tuple of float
        a and b.

    Notes
    -----
    A GARCH of its own for each asset is what arch fits. On 500 days that is fragile: used alone in minimum variance
    on the bundled shares it realises 27.3 % a year, because a few fits explode, and this one 15.0 %. Sums of
    likelihoods over assets are a composite likelihood, consistent though shocks are dependent.

    References
    ----------
    Bollerslev (1986), Journal of Econometrics 31; Pakel, Shephard, Sheppard, Engle (2021), Fitting vast dimensional
    time-varying covariance models, Journal of Business and Economic Statistics 39(3).
    """
    variance = np.mean(rows**2, axis=0)
    squares = rows**2 / variance
    # A price that stands still rewards persistence without end, and would set the parameters of all.
    trades = np.mean(rows == np.median(rows, axis=0), axis=0) <= _STILL
    learned = squares[:, trades] if trades.any() else squares

    def loss(free):
        a, b = _bounded(free)
        h = _path(learned, a, b)[:-1]
        return np.mean(np.log(h) / 2 + (_DOF + 1) / 2 * np.log1p(learned / h / (_DOF - 2)))

    # From a + b = 0.97, a = 0.07, where daily returns usually are; two smooth parameters need no gradient.
    found = minimize(loss, [3.5, -2.5], method="Nelder-Mead", options={"xatol": 1e-2, "fatol": 1e-7})
    a, b = _bounded(found.x)
    excess = _path(squares, a, b)[-1] - 1
    ahead = ((a + b) ** np.arange(horizon)).mean()
    return variance * (1 + ahead * excess), (float(a), float(b))


def _bounded(free):
    total, share = 1 / (1 + np.exp(-np.asarray(free)))
    return _PERSISTENCE * total * share, _PERSISTENCE * total * (1 - share)


def _path(squares, a, b):
    """h (n + 1, d): of every day and the next."""
    steps = np.concatenate([np.ones((1, squares.shape[1])), 1 - a - b + a * squares])
    return lfilter([1.0], [1.0, -b], steps, axis=0)

"""What noise alone does to a spectrum: the Marchenko-Pastur law, the Tracy-Widom law, the noise edge.

For n rows of d assets with unit-variance independent noise, and q = d/n:

    density     p(lambda) = sqrt((lambda_+ - lambda)(lambda - lambda_-)) / (2 pi v q lambda),
                lambda_pm = v (1 +- sqrt q)^2, and a point mass 1 - 1/q at zero when q > 1
    largest     P[N lambda_1 <= mu + sigma s] -> F_1(s),   F_1(s) = det(I - V_s),
                V_s(x, y) = Ai((x + y)/2) / 2 on L2(s, inf),   N = n - 1 (the mean costs one row)
                mu = (sqrt(N-1) + sqrt d)^2,   sigma = (sqrt(N-1) + sqrt d)(1/sqrt(N-1) + 1/sqrt d)^(1/3)

Eigenvalues are those of the correlation matrix, without units.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import airy


@dataclass(frozen=True)
class MarchenkoPastur:
    """Limit law of the eigenvalues of the covariance of pure noise (Marchenko, Pastur 1967).

    Attributes
    ----------
    ratio : float
        q = d/n.
    variance : float
        v, the variance of every entry of the panel.
    lower, upper : float
        lambda_- and lambda_+, the edges of the continuous part.
    mass_at_zero : float
        max(0, 1 - 1/q): the share of eigenvalues that are exactly zero.
    """

    ratio: float
    variance: float
    lower: float
    upper: float
    mass_at_zero: float

    def pdf(self, x):
        """Density of the continuous part at x (any shape); it integrates to 1 - mass_at_zero."""
        x = np.asarray(x, float)
        inside = (x > self.lower) & (x < self.upper)
        safe = np.where(inside, x, self.upper)
        root = np.sqrt(np.maximum((self.upper - safe) * (safe - self.lower), 0.0))
        return root / (2 * np.pi * self.variance * self.ratio * safe)

    def cdf(self, x):
        """P[lambda <= x] at x (any shape), the mass at zero included; closed form."""
        x = np.asarray(x, float)
        centre, radius = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        theta = np.arccos(np.clip((centre - x) / radius, -1.0, 1.0))
        low, high = np.sqrt(self.lower), np.sqrt(self.upper)
        angle = np.arctan2(high * np.sin(theta / 2), low * np.cos(theta / 2))
        area = centre * theta + radius * np.sin(theta) - 2 * low * high * angle
        continuous = area / (2 * np.pi * self.variance * self.ratio)
        return np.where(x >= 0, self.mass_at_zero + continuous, 0.0)


def marchenko_pastur(n_assets, n_samples, variance=1.0):
    """Marchenko-Pastur law for a panel of ``n_samples`` rows and ``n_assets`` columns, any q = d/n.

    Parameters
    ----------
    n_assets, n_samples : int
        d and n, at least 1.
    variance : float
        v > 0, of every entry of the panel.

    Returns
    -------
    MarchenkoPastur

    Raises
    ------
    ValueError
        If a count is below one or the variance is not positive.

    Examples
    --------
    >>> law = marchenko_pastur(100, 400)
    >>> law.ratio, law.lower, law.upper, law.mass_at_zero
    (0.25, 0.25, 2.25, 0.0)
    """
    if n_assets < 1 or n_samples < 1:
        raise ValueError(f"expected at least one asset and one row, got {n_assets} and {n_samples}.")
    if not 0 < variance < np.inf:
        raise ValueError(f"expected a positive variance, got {variance}.")
    q = n_assets / n_samples
    lower, upper = variance * (1 - np.sqrt(q)) ** 2, variance * (1 + np.sqrt(q)) ** 2
    return MarchenkoPastur(q, float(variance), float(lower), float(upper), max(0.0, 1 - 1 / q))


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_FAR = 16.0  # Ai(16) is below 1e-19: the half line may end there


def _fredholm(s):
    if s >= _FAR:
        return 1.0
    half = (_FAR - s) / 2
    x, root = s + half * (_NODES + 1), np.sqrt(half * _WEIGHTS)
    kernel = 0.5 * airy((x[:, None] + x) / 2)[0]
    return float(np.clip(np.linalg.det(np.eye(x.size) - root[:, None] * kernel * root), 0.0, 1.0))


def tracy_widom_cdf(s):
    """Tracy-Widom law F_1 (beta = 1) of the largest eigenvalue of real noise, at s (any shape).

    Fredholm determinant of Ferrari and Spohn (2005) on 64 Gauss-Legendre nodes (Bornemann 2010); absolute
    error below 1e-12. Below s = -10 the value is under 1e-20 and 0 is returned.

    Examples
    --------
    >>> round(float(tracy_widom_cdf(0.9793)), 5)
    0.95
    """
    s = np.asarray(s, float)
    values = [0.0 if u < -10 else _fredholm(u) for u in s.ravel()]
    return np.array(values).reshape(s.shape)[()]


@lru_cache(maxsize=256)
def tracy_widom_quantile(p):
    """Inverse of `tracy_widom_cdf`, for p in [1e-12, 1 - 1e-12].

    Raises
    ------
    ValueError
        If p lies outside that range.

    Examples
    --------
    >>> round(tracy_widom_quantile(0.99), 4)
    2.0234
    """
    if not 1e-12 <= p <= 1 - 1e-12:
        raise ValueError(f"expected a probability in [1e-12, 1 - 1e-12], got {p}.")
    return brentq(lambda s: _fredholm(s) - p, -10.0, _FAR, xtol=1e-12)


def row_count(n_samples):
    """n_samples as an int; refuses what is no number of rows."""
    if (
        not np.isscalar(n_samples)
        or not np.isfinite(n_samples)
        or n_samples < 3
        or n_samples != int(n_samples)
    ):
        raise ValueError(
            f"expected n_samples to be the number of rows, an integer >= 3, got {n_samples}: the rows behind the "
            "covariance decide how much of it is noise."
        )
    return int(n_samples)


def noise_edge(n_assets, n_samples, *, edge="tracy-widom", level=0.01):
    """Eigenvalue of a correlation matrix above which a factor is believed; the noise variance is 1.

    Parameters
    ----------
    n_assets, n_samples : int
        d >= 1 and n >= 3, the rows of the panel behind the matrix, counted before its mean was removed.
    edge : {"tracy-widom", "bulk"}
        "tracy-widom" is the 1 - level quantile of the largest noise eigenvalue (Johnstone 2001). "bulk" is
        the bare Marchenko-Pastur edge (1 + sqrt q)^2, which 5 to 9 % of the noise panels exceed.
    level : float
        Chance of a false factor in Gaussian noise, in (0, 1); used by "tracy-widom" only. It is met for a
        covariance; a correlation matrix, whose trace is fixed, stays below it (0 to 0.4 % at level 1 %).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        For n < 3, an unknown edge or a level outside (0, 1).

    Notes
    -----
    The theory is for independent entries. A volatility that all assets share each day (multivariate Student-t
    noise) puts eigenvalues above every edge though nothing is correlated; divide such panels by their common
    volatility before counting factors.
    """
    if n_assets < 1:
        raise ValueError(f"expected at least one asset, got n_assets={n_assets}.")
    n_samples = row_count(n_samples)
    if edge == "bulk":
        return marchenko_pastur(n_assets, n_samples).upper
    if edge != "tracy-widom":
        remedy = "; it is fitted to a spectrum: pass it to clip or n_factors" if edge == "fitted" else ""
        raise ValueError(f"expected edge 'tracy-widom' or 'bulk', got {edge!r}{remedy}.")
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}; for the bare edge pass edge='bulk'.")
    rows = n_samples - 1
    a, b = np.sqrt(rows - 1), np.sqrt(n_assets)
    scale = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return float(((a + b) ** 2 + scale * tracy_widom_quantile(1 - level)) / rows)


def fitted_edge(eigenvalues, n_samples, *, level=0.01):
    """Tracy-Widom edge times the noise variance that the bulk of a spectrum shows.

    The variance is the median of the eigenvalues that are taken for noise over the median of the
    Marchenko-Pastur law (Gavish and Donoho 2014), counted anew until the number of factors stays. The median
    keeps its value when a truncated mean would fall: noise alone still has no factor.

    Parameters
    ----------
    eigenvalues : (d,) array
        Of a correlation matrix, ascending.
    n_samples : int
        Rows of the panel behind it, n >= 3.
    level : float
        As in `noise_edge`.

    Returns
    -------
    edge : float
    variance : float
        At most 1.

    Raises
    ------
    ValueError
        As `noise_edge`.
    """
    d = len(eigenvalues)
    law, bare = marchenko_pastur(d, row_count(n_samples) - 1), noise_edge(d, n_samples, level=level)
    middle = (1 + law.mass_at_zero) / 2
    median = brentq(lambda x: law.cdf(x) - middle, law.lower, law.upper)
    positive = eigenvalues[max(0, d - (int(n_samples) - 1)) :]
    noise, variance = len(positive), 1.0
    while noise > 1:
        variance = min(1.0, float(np.median(positive[:noise])) / median)
        left = int((positive <= bare * variance).sum())
        if left >= noise:
            break
        noise = left
    return bare * variance, variance

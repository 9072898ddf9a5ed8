"""Covariance: how much of a spectrum is noise, its cleaning, and its re-estimation from scenarios.

For n rows of d assets with unit-variance independent noise, and q = d/n:

    density     p(lambda) = sqrt((lambda_+ - lambda)(lambda - lambda_-)) / (2 pi v q lambda),
                lambda_pm = v (1 +- sqrt q)^2, and a point mass 1 - 1/q at zero when q > 1
    largest     P[N lambda_1 <= mu + sigma s] -> F_1(s),   F_1(s) = det(I - V_s),
                V_s(x, y) = Ai((x + y)/2) / 2 on L2(s, inf),   N = n - 1 (the mean costs one row)
                mu = (sqrt(N-1) + sqrt d)^2,   sigma = (sqrt(N-1) + sqrt d)(1/sqrt(N-1) + 1/sqrt d)^(1/3)
    clip        C = U diag(lambda) U',  lambda_i <= edge  ->  their mean,  then unit diagonal,
                Sigma = D^1/2 C D^1/2 with D the diagonal of the input
    scenarios   Sigma = D^1/2 corr(x_1..x_m) D^1/2, moments merged chunk by chunk

Units: covariances are in (return per period)^2, eigenvalues are those of the correlation matrix.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import airy
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import validate_data

__all__ = [
    "MarchenkoPastur",
    "ScenarioCovariance",
    "clip",
    "correlation_from_covariance",
    "marchenko_pastur",
    "n_factors",
    "noise_edge",
    "rescale",
    "streaming_moments",
    "tracy_widom_cdf",
    "tracy_widom_quantile",
]


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
    if not np.isfinite(n_samples) or n_samples < 3 or n_samples != int(n_samples):
        raise ValueError(f"expected n_samples to be the number of rows, an integer >= 3, got {n_samples}.")
    if edge == "bulk":
        return marchenko_pastur(n_assets, n_samples).upper
    if edge != "tracy-widom":
        raise ValueError(f"expected edge 'tracy-widom' or 'bulk', got {edge!r}.")
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}; for the bare edge pass edge='bulk'.")
    rows = n_samples - 1
    a, b = np.sqrt(rows - 1), np.sqrt(n_assets)
    scale = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return float(((a + b) ** 2 + scale * tracy_widom_quantile(1 - level)) / rows)


_TOLERANCE = 1e-6  # relative; single-precision covariances pass, wrong ones do not


def _checked(covariance):
    """The matrix as float64 (d, d) and its names or None; refuses what is no covariance of live assets."""
    names = covariance.columns if isinstance(covariance, pd.DataFrame) else None
    if names is not None and not covariance.index.equals(names):
        raise ValueError(
            "expected a covariance whose index equals its columns, got different names; "
            "a panel of returns is not a covariance: call returns.cov() first."
        )
    matrix = np.asarray(covariance, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"expected a covariance of shape (d, d), got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        i, j = (i, j) if names is None else (names[i], names[j])
        raise ValueError(
            f"expected finite entries, got NaN or infinity at ({i}, {j}); fill or drop them first."
        )
    size = np.abs(matrix).max()
    gap = np.abs(matrix - matrix.T).max()
    if gap > _TOLERANCE * size:
        raise ValueError(f"expected a symmetric covariance, got |S - S'| up to {gap:.3g}; pass (S + S') / 2.")
    variance = np.diag(matrix)
    dead = np.flatnonzero(variance <= 1e-24 * size)
    if dead.size:
        labels = (dead if names is None else names[dead]).tolist()[:5]
        raise ValueError(
            f"expected positive variances, got {variance[dead[0]]:.3g} for {labels}: such an asset has no "
            "correlation (a constant or stale price); drop it."
        )
    return (matrix + matrix.T) / 2, names


def _framed(matrix, names):
    return matrix if names is None else pd.DataFrame(matrix, index=names, columns=names)


def _correlation(covariance):
    """Correlation (d, d), standard deviations (d,), and names or None."""
    matrix, names = _checked(covariance)
    sd = np.sqrt(np.diag(matrix))
    matrix = matrix / np.outer(sd, sd)
    np.fill_diagonal(matrix, 1.0)
    return matrix, sd, names


def _semidefinite(eigenvalues):
    if eigenvalues[0] < -_TOLERANCE * eigenvalues[-1]:
        raise ValueError(
            f"expected a positive semi-definite covariance, got a smallest correlation eigenvalue of "
            f"{eigenvalues[0]:.3g}; estimate it from complete rows (pairwise estimates are not PSD)."
        )
    return np.maximum(eigenvalues, 0.0)


def correlation_from_covariance(covariance):
    """Correlation matrix (d, d) with an exact unit diagonal; a DataFrame stays a DataFrame.

    Raises
    ------
    ValueError
        If the matrix is not square, symmetric and finite with positive variances.
    """
    correlation, _, names = _correlation(covariance)
    return _framed(correlation, names)


def rescale(correlation, standard_deviation):
    """Covariance D^1/2 C D^1/2 (d, d) of a correlation (d, d) and standard deviations (d,).

    Raises
    ------
    ValueError
        If the shapes disagree; (d, 1) is refused, it would scale rows only.
    """
    names = correlation.columns if isinstance(correlation, pd.DataFrame) else None
    matrix, sd = np.asarray(correlation, float), np.asarray(standard_deviation, float)
    if matrix.shape != (sd.size, sd.size) or sd.ndim != 1:
        raise ValueError(f"expected shapes (d, d) and (d,), got {matrix.shape} and {sd.shape}.")
    return _framed(matrix * np.outer(sd, sd), names)


def clip(covariance, n_samples, *, edge="tracy-widom", level=0.01):
    """Replace the noise eigenvalues of the correlation matrix by their mean.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units; n < d, n = d and singular matrices are fine (zero eigenvalues join the noise).
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    edge, level
        See `noise_edge`.

    Returns
    -------
    (d, d) array or DataFrame
        Same variances as the input. Eigenvalues of the correlation at or below the edge are equal before the
        unit diagonal is restored; those above are untouched.

    Raises
    ------
    ValueError
        If the input is not a finite, symmetric, positive semi-definite matrix with positive variances, or
        n_samples is not an integer >= 3.

    References
    ----------
    Laloux, Cizeau, Bouchaud, Potters (1999, 2000). The noise variance stays at 1: re-estimating it from the
    eigenvalues that remain lowers the edge and lets noise through.
    """
    correlation, sd, names = _correlation(covariance)
    eigenvalues, vectors = np.linalg.eigh(correlation)
    eigenvalues = _semidefinite(eigenvalues)
    noise = eigenvalues <= noise_edge(sd.size, n_samples, edge=edge, level=level)
    if noise.any():
        eigenvalues[noise] = eigenvalues[noise].mean()
    correlation = (vectors * eigenvalues) @ vectors.T
    unit = np.sqrt(np.diag(correlation))
    correlation = (correlation + correlation.T) / (2 * np.outer(unit, unit))
    np.fill_diagonal(correlation, 1.0)
    return rescale(_framed(correlation, names), sd)


def n_factors(covariance, n_samples, *, edge="tracy-widom", level=0.01):
    """Number of correlation eigenvalues above the noise edge; parameters and errors as in `clip`."""
    correlation, sd, _ = _correlation(covariance)
    eigenvalues = _semidefinite(np.linalg.eigvalsh(correlation))
    return int((eigenvalues > noise_edge(sd.size, n_samples, edge=edge, level=level)).sum())


def streaming_moments(chunks):
    """Mean and covariance of rows that arrive in chunks, without keeping them.

    Parameters
    ----------
    chunks : iterable of (k, d) arrays
        Each is centred on its own mean and merged by the pairwise update of Chan, Golub, LeVeque (1983), in
        float64, so that no difference of large squares is taken.

    Returns
    -------
    count : int
    mean : (d,) array
    covariance : (d, d) array
        Divided by count - 1.

    Raises
    ------
    ValueError
        If fewer than two rows arrive.
    """
    count, mean, scatter = 0, 0.0, 0.0
    for rows in chunks:
        rows = np.asarray(rows, np.float64)
        k = len(rows)
        if k == 0:
            continue
        centre = rows.mean(axis=0)
        rows = rows - centre
        delta = centre - mean
        scatter = scatter + rows.T @ rows + np.outer(delta, delta) * (count * k / (count + k))
        mean = mean + delta * (k / (count + k))
        count += k
    if count < 2:
        raise ValueError(f"expected at least two rows for a covariance, got {count}.")
    return count, mean, scatter / (count - 1)


class ScenarioCovariance(BaseEstimator):
    """Covariance re-estimated from the scenarios of a fitted generator.

    The dependence (correlation) comes from many synthetic rows; the scale stays with the data unless asked
    otherwise, because a generator that misses the variances by a few per cent would otherwise misprice risk.

    Parameters
    ----------
    generator : object with ``fit(X)`` and ``sample(n_samples, random_state=...)``
        It is cloned and the clone fitted, unless ``prefit``.
    cleaner : callable (covariance, n_samples) -> covariance, optional
        For example `clip`. It receives the number of REAL rows: the noise of a re-estimated matrix is that of
        the n rows the generator learned from, and more synthetic rows add no information about the market.
        With the synthetic count the noise edge would shrink to 1 and every learned noise factor would stay.
    n_scenarios : int
        m, at least 2.
    scale : {"data", "scenarios"}
        Whose means and standard deviations are reported.
    chunk : int
        Rows drawn at once: memory is O(chunk d + d^2), never O(m d).
    prefit : bool
        True uses ``generator`` as it stands and ``fit(X)`` only reads the scale and n from X.
    random_state : None, int or RandomState
        Of the sampling only; each chunk gets its own seed, so the numbers depend on ``chunk`` but not on
        anything outside. The generator's fit follows the generator's own parameters.

    Attributes
    ----------
    covariance_, correlation_ : (d, d) arrays
    location_ : (d,) array
        Mean per period, of the rows that ``scale`` names.
    generator_ : the fitted generator
    n_features_in_ : int
    feature_names_in_ : (d,) array, if X is a DataFrame with string columns

    Raises
    ------
    ValueError
        On ``fit``: fewer than two rows, non-finite entries (row and column named), an unknown scale, counts
        below their minimum, scenarios of the wrong shape, names or with non-finite entries, dead assets.
    """

    def __init__(
        self,
        generator,
        cleaner=None,
        n_scenarios=10_000,
        scale="data",
        chunk=2048,
        prefit=False,
        random_state=None,
    ):
        self.generator = generator
        self.cleaner = cleaner
        self.n_scenarios = n_scenarios
        self.scale = scale
        self.chunk = chunk
        self.prefit = prefit
        self.random_state = random_state

    def fit(self, X, y=None):
        """Fit the generator on X (n, d), simple returns per period, and accumulate its scenarios."""
        if self.scale not in ("data", "scenarios"):
            raise ValueError(f"expected scale 'data' or 'scenarios', got {self.scale!r}.")
        if self.n_scenarios < 2 or self.chunk < 1:
            raise ValueError(
                f"expected n_scenarios >= 2 and chunk >= 1, got {self.n_scenarios} and {self.chunk}."
            )
        rows = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2)
        self._refuse_holes(rows, "X")
        self.generator_ = self.generator if self.prefit else clone(self.generator).fit(X)
        columns = X.columns if isinstance(X, pd.DataFrame) else None
        _, location, covariance = streaming_moments(self._draw(columns))
        still = np.flatnonzero(np.diag(covariance) <= 1e-24 * location**2)
        if still.size:
            raise ValueError(
                f"expected scenarios that vary, got constant columns {list(still[:5])}: no correlation; "
                "check the generator."
            )
        if self.scale == "data":
            location = rows.mean(axis=0)
            covariance = rescale(correlation_from_covariance(covariance), rows.std(axis=0, ddof=1))
        if self.cleaner is not None:
            covariance = np.asarray(self.cleaner(covariance, len(rows)), float)
        self.location_, self.covariance_ = location, covariance
        self.correlation_ = correlation_from_covariance(covariance)
        return self

    def _draw(self, columns):
        """Yield chunks (k, d) of scenarios, each from a stream of its own."""
        n_chunks = -(-self.n_scenarios // self.chunk)
        seeds = _entropy(self.random_state).generate_state(n_chunks)
        for i, seed in enumerate(seeds):
            k = min(self.chunk, self.n_scenarios - i * self.chunk)
            rows = self.generator_.sample(k, random_state=int(seed))
            if columns is not None and isinstance(rows, pd.DataFrame) and not rows.columns.equals(columns):
                raise ValueError(
                    "expected scenarios with the columns of X, got other names or another order."
                )
            rows = np.asarray(rows, np.float64)
            if rows.shape != (k, self.n_features_in_):
                raise ValueError(
                    f"expected scenarios of shape {(k, self.n_features_in_)}, got {rows.shape}; "
                    "was a prefit generator fitted on other assets?"
                )
            self._refuse_holes(rows, f"chunk {i} of the scenarios")
            yield rows

    def _refuse_holes(self, rows, where):
        finite = np.isfinite(rows)
        if not finite.all():
            i, j = np.argwhere(~finite)[0]
            label = getattr(self, "feature_names_in_", range(rows.shape[1]))[j]
            raise ValueError(
                f"expected finite returns, got {rows[i, j]} in {where} at row {i}, column {label!r}; "
                "drop or fill such rows first."
            )


def _entropy(random_state):
    if isinstance(random_state, np.random.RandomState):
        return np.random.SeedSequence(random_state.randint(0, 2**32, size=4, dtype=np.uint32).tolist())
    return np.random.SeedSequence(random_state)

"""Copulas: what the assets do together, apart from what each does alone; the density rivals of the scores.

margins      F_j: location l_j, scale s_j, dof m_j of a t, or the empirical distribution
scores       y_j = T_nu^{-1}(F_j(x_j)),       T_nu the t distribution function, the normal one for nu = inf
density      log p(x) = log t_{nu,R}(y) - sum_j log t_nu(y_j) + sum_j log f_j(x_j)
sampling     y = sqrt(nu/chi^2_nu) R^{1/2} z,  x_j = F_j^{-1}(T_nu(y_j))

nu and R come from the scores of the training rows (inference functions for margins: Joe 2005).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, ndtr, ndtri, polygamma, psi, stdtr, stdtrit
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, clone
from sklearn.covariance import LedoitWolf
from sklearn.utils.validation import check_is_fitted, validate_data

from finediff.generators.base import ScenarioGenerator
from finediff.generators.classical import _mahalanobis, _root, _standardise

_LEAST, _MOST = 2.05, 100.0  # degrees of freedom: a finite variance, and nearly a normal law
_NARROWEST = 1e-3  # scale of a margin in its sd: rows that are mostly one value have no likeliest scale
_ATOM = 0.2  # of the returns at one value: more than ties of coarse prices, a law without density
_REWEIGHTINGS = 3  # of the rows of scores: ten would move a held-out likelihood by 2e-5 nats (20 assets)


@dataclass(frozen=True)
class StudentMargins:
    """Student t law of each asset; scale 0 and dof inf for one that never moved.

    location, scale : (d,), in the units of the returns;  dof : (d,)
    stale : (s,), numbers of the assets that no t describes: their location, scale and dof are NaN
    observed : (n, s), the returns of those, ascending
    """

    location: np.ndarray
    scale: np.ndarray
    dof: np.ndarray
    stale: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    observed: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class EmpiricalMargins:
    """Observed returns of each asset, ascending: the i-th of n is the (i - 1/2)/n quantile.

    values : (n, d), in the units of the returns
    """

    values: np.ndarray


class CopulaGenerator(ScenarioGenerator):
    """Student t or Gaussian copula with a margin of its own for every asset.

    The margins are fitted first, each alone; the copula then sees the rows only through their scores. The
    correlation of a t copula is estimated from the scores weighted by (nu + d)/(nu + q), as in the maximum
    likelihood of a multivariate t, nu by the likelihood of the copula profiled over it.

    Where a price is stale and most returns are 0, the likelihood of a t grows without end as its scale shrinks (once
    that share exceeds m/(1 + m)), and the asset would seem riskless. Such an asset gets its observed quantiles instead,
    as with ``margins="empirical"``. It is one for which a fifth of the returns have one value and the t's standard
    deviation is off by a factor above 3/2, or whose t ends at the least dof with less than half of the standard
    deviation (nearly equal returns). The others keep their t.

    Parameters
    ----------
    family : {"t", "gaussian"}
        A t copula lets assets crash together; a Gaussian one has no tail dependence.
    margins : {"t", "empirical"}
        Student t by maximum likelihood (dof from 2.05 to 100), or the observed quantiles, interpolated: then no
        scenario leaves the range that an asset has shown, and there is no density. "t" has exceptions, see above.
    correlation : scikit-learn covariance estimator, optional
        Fitted on the (weighted) scores, whose mean is 0, and scaled to a correlation; anything with
        ``covariance_`` or ``get_covariance()``, such as `sklearn.decomposition.FactorAnalysis`.
        `sklearn.covariance.LedoitWolf(assume_centered=True)` by default, so that fewer rows than assets are no
        trouble. 1e-8 of the identity is blended in: every correlation can be inverted.
    random_state : None, int or RandomState

    Attributes
    ----------
    dof_ : float
        nu of the copula, from 2.05 to 100, to four digits; inf for the Gaussian family.
    correlation_ : (d, d)
        R of the copula; 0 between an asset that never moved and the others.
    margins_ : StudentMargins or EmpiricalMargins
        location, scale and dof, each (d,), and the observed returns of ``stale`` assets; or those of all, ascending,
        (n, d).

    References
    ----------
    Demarta and McNeil (2005), "The t copula and related copulas", International Statistical Review 73;
    Joe (2005), "Asymptotic efficiency of the two-stage estimation method for copula-based models", Journal of
    Multivariate Analysis 94.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> returns = 0.01 * rng.standard_t(4, (2000, 1)) + 0.01 * rng.standard_t(4, (2000, 3))
    >>> copula = CopulaGenerator(random_state=0).fit(returns)
    >>> copula.correlation_[0, 1].round(1)
    np.float64(0.5)
    >>> copula.log_density(returns[:2]).shape
    (2,)
    """

    def __init__(self, *, family="t", margins="t", correlation=None, random_state=None):
        self.family = family
        self.margins = margins
        self.correlation = correlation
        self.random_state = random_state

    def _fit(self, X, seed):
        if self.family not in ("t", "gaussian"):
            raise ValueError(f"expected family 't' or 'gaussian', got {self.family!r}")
        if self.margins not in ("t", "empirical"):
            raise ValueError(f"expected margins 't' or 'empirical', got {self.margins!r}")
        if not isinstance(self.correlation, BaseEstimator | None):
            raise ValueError(
                "expected correlation to be a scikit-learn covariance estimator or None, got "
                f"{self.correlation!r}: pass one such as sklearn.covariance.OAS()"
            )
        Z, mean, scale = _standardise(X)
        moving = scale > 0
        if self.margins == "t":
            location, width, dof = _fit_student_margins(Z)
            stale = _misdescribed(X[:, moving], width, dof)
            numbers = np.flatnonzero(moving)[stale]
            self.margins_ = StudentMargins(
                mean, scale, np.full(len(scale), np.inf), numbers, np.sort(X[:, numbers], axis=0)
            )
            self.margins_.location[moving] += location * scale[moving]
            self.margins_.scale[moving] *= width
            self.margins_.dof[moving] = dof
            for parameter in (self.margins_.location, self.margins_.scale, self.margins_.dof):
                parameter[numbers] = np.nan
            z = (Z - location) / width
            p = (rankdata(X[:, numbers], axis=0) - 0.5) / len(X)

            def scores(nu):
                y = _carry(z, dof, nu)
                y[:, stale] = _quantile(p, nu)
                return y

        else:
            self.margins_ = EmpiricalMargins(np.sort(X, axis=0))
            p = (rankdata(X[:, moving], axis=0) - 0.5) / len(X)

            def scores(nu):
                return _quantile(p, nu)

        self.dof_ = np.inf if self.family == "gaussian" else self._likeliest_dof(scores)
        self.correlation_ = np.eye(len(scale))
        self.correlation_[np.ix_(moving, moving)] = self._correlation(scores(self.dof_), self.dof_)

    def _likeliest_dof(self, scores):
        def loss(log_dof):
            nu = np.exp(log_dof)
            y = scores(nu)
            return -_log_copula(y, self._correlation(y, nu), nu).mean()

        ends = np.log([_LEAST, _MOST])
        inside = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-5})
        candidates = {float(np.exp(inside.x)): inside.fun, _LEAST: loss(ends[0]), _MOST: loss(ends[1])}
        # More digits than the likelihood can tell would carry its rounding into every scenario.
        return float(f"{min(candidates, key=candidates.get):.4g}")

    def _correlation(self, y, nu):
        """R (k, k) of the scores y (n, k); for a t, of the scores weighted by how far out R puts them."""
        d = y.shape[1]
        rows = y
        for _ in range(1 if np.isinf(nu) else 1 + _REWEIGHTINGS):
            R = self._estimate(rows)
            q, _ = _mahalanobis(y, R)
            rows = y * np.sqrt((nu + d) / (nu + q))[:, None] if np.isfinite(nu) else y
        return R

    def _estimate(self, rows):
        wanted = LedoitWolf(assume_centered=True) if self.correlation is None else clone(self.correlation)
        fitted = wanted.fit(rows)
        if not hasattr(fitted, "covariance_") and not hasattr(fitted, "get_covariance"):
            raise ValueError(
                f"expected correlation to be an estimator with covariance_ or get_covariance(), got {wanted!r}, "
                "which has neither: pass one such as sklearn.covariance.OAS()"
            )
        covariance = fitted.covariance_ if hasattr(fitted, "covariance_") else fitted.get_covariance()
        sd = np.sqrt(np.diag(covariance))
        return (1 - 1e-8) * covariance / np.outer(sd, sd) + 1e-8 * np.eye(len(sd))

    def _sample(self, n, seed):
        rng = np.random.default_rng(seed)
        d = len(self.correlation_)
        y = rng.standard_normal((n, d)) @ _root(self.correlation_)
        if np.isfinite(self.dof_):
            y *= np.sqrt(self.dof_ / rng.chisquare(self.dof_, size=(n, 1)))
        if isinstance(self.margins_, StudentMargins):
            moving = self.margins_.scale > 0
            rows = np.tile(self.margins_.location, (n, 1))
            z = _carry(y[:, moving], self.dof_, self.margins_.dof[moving])
            rows[:, moving] += z * self.margins_.scale[moving]
            stale = self.margins_.stale
            if len(stale):
                rows[:, stale] = _observed_quantiles(
                    _cumulative(y[:, stale], self.dof_), self.margins_.observed
                )
            return rows
        return _observed_quantiles(_cumulative(y, self.dof_), self.margins_.values)

    def log_density(self, X):
        """Log density of returns under the fitted law.

        Parameters
        ----------
        X : DataFrame or array (n, d)
            Simple returns per period of the assets of the fit.

        Returns
        -------
        (n,)
            Nats per row, in the units of the returns: a panel in percent has d log(100) fewer. An asset that
            never moved in the fit has no density and no part; a row in which it moves is impossible, -inf. A
            stale asset has no density either: the value is that of the others.

        Raises
        ------
        ValueError
            With empirical margins, which have no density, or for other assets than those of the fit.
        """
        check_is_fitted(self)
        if not isinstance(self.margins_, StudentMargins):
            raise ValueError("expected margins='t' for a density, got empirical margins, which have none")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        location, scale, dof = self.margins_.location, self.margins_.scale, self.margins_.dof
        moving, still = scale > 0, scale == 0  # neither: NaN, where no t was fitted
        if not moving.any():
            raise ValueError(
                "expected an asset with a density, got stale prices alone: most returns are one value"
            )
        z = (X[:, moving] - location[moving]) / scale[moving]
        R = self.correlation_[np.ix_(moving, moving)]
        value = _log_copula(_carry(z, dof[moving], self.dof_), R, self.dof_)
        value += _log_t(z**2, 2 * np.log(scale[moving]), dof[moving], 1).sum(1)
        return np.where((X[:, still] == location[still]).all(1), value, -np.inf)

    def _arrays(self):
        margins = {f"margin_{name}": array for name, array in vars(self.margins_).items() if array.size}
        return {"dof": np.array([self.dof_]), "correlation": self.correlation_, **margins}

    def _restore(self, arrays):
        self.dof_, self.correlation_ = float(arrays["dof"][0]), arrays["correlation"]
        kind = StudentMargins if self.margins == "t" else EmpiricalMargins
        self.margins_ = kind(**{k[7:]: v for k, v in arrays.items() if k.startswith("margin_")})


def _misdescribed(X, width, dof):
    """(k,) whether the t of scale ``width``, in standard deviations of X (n, k), is none of a stale price's."""
    ordered = np.sort(X, axis=0)
    lag = int(np.ceil(_ATOM * len(X)))  # a run of more than so many equal values
    atom = (ordered[lag:] == ordered[:-lag]).any(0)
    sd = width * np.sqrt(dof / (dof - 2))
    off = (sd < 2 / 3) | (sd > 3 / 2)
    return atom & off | (dof < _LEAST * (1 + 1e-9)) & (sd < 1 / 2)


def _observed_quantiles(p, values):
    """Quantiles p (m, s) of the columns of values (n, s), ascending, interpolated."""
    knots = (np.arange(len(values)) + 0.5) / len(values)
    return np.column_stack([np.interp(p[:, j], knots, values[:, j]) for j in range(values.shape[1])])


def _fit_student_margins(Z):
    """Location, scale and dof, each (d,), of the likeliest Student t of every column of Z (n, d), of variance 1.

    Fisher scoring in (l, log s, log m), a step quartered where the likelihood would fall. The information is
    that of Lange, Little and Taylor (1989), Journal of the American Statistical Association 84.
    """
    low, median, high = np.quantile(Z, [0.25, 0.5, 0.75], axis=0)
    d = Z.shape[1]
    ends = np.log([[_NARROWEST, 10.0], [_LEAST, _MOST]])
    theta = np.stack([median, np.log(np.maximum((high - low) / 1.45, _NARROWEST)), np.full(d, np.log(5.0))])
    value, step, promise = _scoring(Z, theta, ends)
    share = np.ones(d)
    for _ in range(200):
        live = np.flatnonzero((promise > 1e-18) & (share > 1e-8))
        if not len(live):
            break
        new = theta[:, live] + share[live] * step[:, live]
        reached, following, promised = _scoring(Z[:, live], new, ends)
        better = reached >= value[live] - 1e-14
        share[live] = np.where(better, np.minimum(1, 2 * share[live]), share[live] / 4)
        kept = live[better]
        theta[:, kept], value[kept] = new[:, better], reached[better]
        step[:, kept], promise[kept] = following[:, better], promised[better]
    return theta[0], np.exp(theta[1]), np.clip(np.exp(theta[2]), _LEAST, _MOST)


def _scoring(Z, theta, ends):
    """Mean log likelihood (d,) at theta (3, d), the scoring step (3, d) and the gain it promises (d,)."""
    (l, log_s), m = theta[:2], np.exp(theta[2])
    s = np.exp(log_s)
    centred = Z - l
    q = (centred / s) ** 2
    w = (m + 1) / (m + q)
    stretch, pull = np.log1p(q / m).mean(0), (w * q).mean(0)
    value = gammaln((m + 1) / 2) - gammaln(m / 2) - np.log(np.pi * m) / 2 - log_s - (m + 1) / 2 * stretch
    slope = np.stack(
        [
            (w * centred).mean(0) / s**2,
            pull - 1,
            m / 2 * (psi((m + 1) / 2) - psi(m / 2) - stretch + (pull - 1) / m),
        ]
    )
    of_l = (m + 1) / (m + 3) / s**2
    of_s = 2 * m / (m + 3)
    of_m = m**2 * (polygamma(1, m / 2) - polygamma(1, (m + 1) / 2)) / 4
    of_m -= m * (m + 5) / (2 * (m + 1) * (m + 3))
    both = -2 * m / ((m + 1) * (m + 3))
    # The quadratic model is maximised over log m within its interval, over log s given that.
    towards = (of_s * slope[2] - both * slope[1]) / (of_s * of_m - both**2)
    of_dof = np.clip(np.clip(towards, -1, 1), ends[1, 0] - theta[2], ends[1, 1] - theta[2])
    step = np.stack([slope[0] / of_l, (slope[1] - both * of_dof) / of_s, of_dof])
    step[1] = np.clip(step[1], ends[0, 0] - log_s, ends[0, 1] - log_s)
    return value, step, (slope * step).sum(0)


def _log_copula(y, R, nu):
    """(n,) log density of the copula at the scores y (n, d)."""
    q, log_det = _mahalanobis(y, R)
    return _log_t(q, log_det, nu, y.shape[1]) - _log_t(y**2, 0.0, nu, 1).sum(1)


def _log_t(q, log_det, nu, d):
    """Log density of a t in d dimensions, of a normal law for nu = inf, at squared Mahalanobis distances q."""
    if np.isscalar(nu) and np.isinf(nu):
        return -(d * np.log(2 * np.pi) + log_det + q) / 2
    constant = gammaln((nu + d) / 2) - gammaln(nu / 2) - d / 2 * np.log(np.pi * nu) - log_det / 2
    return constant - (nu + d) / 2 * np.log1p(q / nu)


def _cumulative(y, nu):
    return ndtr(y) if np.isscalar(nu) and np.isinf(nu) else stdtr(nu, y)


def _quantile(p, nu):
    return ndtri(p) if np.isscalar(nu) and np.isinf(nu) else stdtrit(nu, p)


def _carry(z, nu, to):
    """Quantile `to` of the distribution `nu` at z, through the lower tail, where small p keep their digits."""
    p = np.maximum(_cumulative(-np.abs(z), nu), 1e-100)
    return -np.sign(z) * _quantile(p, to)

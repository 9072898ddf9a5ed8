"""The rivals: what people use before they use a score model, with the same fit and sample.

Gaussian      x ~ N(m, S),                       S by a scikit-learn covariance estimator
Student t     x ~ t_nu(m, S),                    m, S, nu by maximum likelihood (ECME)
bootstrap     rows of the panel, iid or in blocks of geometric length (stationary)
  smoothed    x = m + (row - m + h S^{1/2} z)/sqrt(1 + h^2)
"""

from __future__ import annotations

from numbers import Real

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, gammaln
from sklearn.base import clone
from sklearn.covariance import LedoitWolf

from finediff.generators.base import ScenarioGenerator
from finediff.panel import Standardizer


class GaussianGenerator(ScenarioGenerator):
    """Multivariate normal.

    Parameters
    ----------
    covariance_estimator : scikit-learn covariance estimator, optional
        `sklearn.covariance.LedoitWolf()` on the standardised returns by default.
    random_state : None, int or RandomState

    Attributes
    ----------
    mean_ : (d,)
    covariance_ : (d, d)
        In the units of the returns.

    Examples
    --------
    >>> returns = np.tile([[0.01, 0.0], [-0.01, 0.02], [0.0, 0.01]], (20, 1))
    >>> GaussianGenerator(random_state=0).fit(returns).mean_.round(3)
    array([0.  , 0.01])
    """

    def __init__(self, *, covariance_estimator=None, random_state=None):
        self.covariance_estimator = covariance_estimator
        self.random_state = random_state

    def _fit(self, X, seed):
        Z, self.mean_, scale = _standardise(X)
        estimator = LedoitWolf() if self.covariance_estimator is None else clone(self.covariance_estimator)
        self.covariance_ = _rescale(estimator.fit(Z).covariance_, scale)

    def _sample(self, n, seed):
        z = np.random.default_rng(seed).standard_normal((n, len(self.mean_)))
        return self.mean_ + z @ _root(self.covariance_)

    def _arrays(self):
        return {"mean": self.mean_, "covariance": self.covariance_}

    def _restore(self, arrays):
        self.mean_, self.covariance_ = arrays["mean"], arrays["covariance"]


class StudentTGenerator(ScenarioGenerator):
    """Multivariate Student t by maximum likelihood (ECME: Liu & Rubin 1995).

    Each step weights the rows by w = (nu + d)/(nu + q), q the squared Mahalanobis distance; the scatter of the
    weighted rows keeps a Ledoit-Wolf share of shrinkage, so fewer rows than assets are no trouble; nu then
    maximises the likelihood itself.

    Parameters
    ----------
    dof : float, optional
        Degrees of freedom, above 2; estimated within [2.05, 100] by default.
    max_iter : int
    tol : float
        On the mean log likelihood.
    random_state : None, int or RandomState

    Attributes
    ----------
    mean_ : (d,)
    scatter_ : (d, d)
        The covariance is scatter_ dof_/(dof_ - 2).
    dof_ : float
    covariance_ : (d, d)
    """

    def __init__(self, *, dof=None, max_iter=200, tol=1e-7, random_state=None):
        self.dof = dof
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _fit(self, X, seed):
        if self.dof is not None and not 2 < self.dof < np.inf:
            raise ValueError(
                f"expected a finite dof above 2, got {self.dof}: the variance of a t with fewer is infinite, and "
                "with infinitely many it is the GaussianGenerator"
            )
        Z, centre, scale = _standardise(X)
        n, d = Z.shape
        shrinkage = LedoitWolf().fit(Z).shrinkage_
        mean, nu = np.zeros(d), 8.0 if self.dof is None else float(self.dof)
        scatter = _shrink(np.cov(Z.T, ddof=0).reshape(d, d), shrinkage)
        last = -np.inf
        for _ in range(self.max_iter):
            q, log_det = _mahalanobis(Z - mean, scatter)
            if self.dof is None:
                nu = _likeliest_dof(q, d)
            value = _t_log_likelihood(q, log_det, nu, d)
            if value - last < self.tol:
                break
            last = value
            w = (nu + d) / (nu + q)
            mean = w @ Z / w.sum()
            centred = Z - mean
            scatter = _shrink((centred * w[:, None]).T @ centred / n, shrinkage)
        self.mean_, self.scatter_, self.dof_ = centre, _rescale(scatter, scale), float(nu)
        self.mean_[scale > 0] += mean * scale[scale > 0]

    @property
    def covariance_(self):
        return self.scatter_ * self.dof_ / (self.dof_ - 2)

    def _sample(self, n, seed):
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((n, len(self.mean_)))
        stretch = np.sqrt(self.dof_ / rng.chisquare(self.dof_, size=(n, 1)))
        return self.mean_ + stretch * (z @ _root(self.scatter_))

    def _arrays(self):
        return {"mean": self.mean_, "scatter": self.scatter_, "dof": np.array([self.dof_])}

    def _restore(self, arrays):
        self.mean_, self.scatter_, self.dof_ = arrays["mean"], arrays["scatter"], float(arrays["dof"][0])


class BootstrapGenerator(ScenarioGenerator):
    """Rows of the panel itself, drawn again (arch's bootstraps).

    Parameters
    ----------
    method : {"iid", "stationary"}
        Independent rows, or blocks of geometric length (Politis & Romano 1994), which keep the order in time.
    block_length : float, optional
        Mean length of the stationary blocks; by default the mean over assets of the optimal length for the
        squared returns (Politis & White 2004).
    random_state : None, int or RandomState

    Attributes
    ----------
    rows_ : (n, d)
    block_length_ : float
    """

    def __init__(self, *, method="iid", block_length=None, random_state=None):
        self.method = method
        self.block_length = block_length
        self.random_state = random_state

    def _fit(self, X, seed):
        if self.method not in ("iid", "stationary"):
            raise ValueError(f"expected method 'iid' or 'stationary', got {self.method!r}")
        if self.method == "iid" and self.block_length is not None:
            raise ValueError(
                f"expected no block_length with independent rows, got {self.block_length}: use method='stationary'"
            )
        if self.block_length is not None and not self.block_length >= 1:
            raise ValueError(f"expected a block_length of at least 1 row, got {self.block_length}")
        self.rows_ = X
        self.block_length_ = 1.0
        if self.method == "stationary":
            self.block_length_ = float(self.block_length or _optimal_block_length(X))

    def _sample(self, n, seed):
        from arch.bootstrap import IIDBootstrap, StationaryBootstrap

        rng = np.random.default_rng(seed)
        rows = np.arange(len(self.rows_))
        if self.method == "iid":
            bootstrap = IIDBootstrap(rows, seed=rng)
        else:
            bootstrap = StationaryBootstrap(self.block_length_, rows, seed=rng)
        rounds = -(-n // len(rows))
        drawn = np.concatenate([data[0] for data, _ in bootstrap.bootstrap(rounds)])[:n]
        return self.rows_[drawn]

    def _arrays(self):
        return {"rows": self.rows_, "block_length": np.array([self.block_length_])}

    def _restore(self, arrays):
        self.rows_, self.block_length_ = arrays["rows"], float(arrays["block_length"][0])


class SmoothedBootstrapGenerator(ScenarioGenerator):
    """Rows of the panel drawn again, moved a little, and drawn in towards the mean: its mean and variances stay.

    x = m + (row - m + h S^{1/2} z)/sqrt(1 + h^2), z ~ N(0, I), S the Ledoit-Wolf covariance. The covariance of x
    is (C + h^2 S)/(1 + h^2), C that of the rows: variances are kept exactly, correlations up to a share
    h^2/(1 + h^2) of their shrinkage. Excess kurtosis falls by (1 + h^2)^2: 0.91 of it is left at h = 0.22.
    What looks new in such a scenario is noise of typical length h sqrt(d) about a row of the panel.

    Parameters
    ----------
    bandwidth : float, optional
        h, as a share of an asset's standard deviation; 0 is the bootstrap. By default Silverman's rule for one
        margin, (4/(3n))^(1/5): 0.22 for 2,500 rows. His rule in d dimensions, 0.67 for 20 assets, would leave
        half of the kurtosis.
    random_state : None, int or RandomState

    Attributes
    ----------
    rows_ : (n, d)
    mean_ : (d,)
    covariance_ : (d, d)
        Of the scenarios, (C + h^2 S)/(1 + h^2), in the units of the returns.
    kernel_covariance_ : (d, d)
        S, in the units of the returns.
    bandwidth_ : float

    References
    ----------
    Silverman and Young (1987), "The bootstrap: to smooth or not to smooth?", Biometrika 74; Silverman (1986),
    Density Estimation, eq. 3.28.
    """

    def __init__(self, *, bandwidth=None, random_state=None):
        self.bandwidth = bandwidth
        self.random_state = random_state

    def _fit(self, X, seed):
        h = (4 / (3 * len(X))) ** 0.2 if self.bandwidth is None else self.bandwidth
        if not isinstance(h, Real) or not 0 <= h < np.inf:
            raise ValueError(
                f"expected a finite bandwidth of at least 0, got {h!r}: it is a share of the standard deviation, "
                "such as 0.2"
            )
        Z, self.mean_, scale = _standardise(X)
        self.kernel_covariance_ = _rescale(LedoitWolf().fit(Z).covariance_, scale)
        self.rows_, self.bandwidth_ = X, float(h)

    @property
    def covariance_(self):
        moving = np.diag(self.kernel_covariance_) > 0
        centred = np.where(moving, self.rows_ - self.mean_, 0.0)
        h2 = self.bandwidth_**2
        return (centred.T @ centred / len(centred) + h2 * self.kernel_covariance_) / (1 + h2)

    def _sample(self, n, seed):
        rng = np.random.default_rng(seed)
        rows = self.rows_[rng.integers(len(self.rows_), size=n)]
        noise = rng.standard_normal(rows.shape) @ _root(self.kernel_covariance_)
        inward = 1 / np.sqrt(1 + self.bandwidth_**2)
        # As a change of the row: a constant asset, and every row for h = 0, stays as it is to the last bit.
        return rows - (1 - inward) * (rows - self.mean_) + inward * self.bandwidth_ * noise

    def _arrays(self):
        return {
            "rows": self.rows_,
            "mean": self.mean_,
            "kernel_covariance": self.kernel_covariance_,
            "bandwidth": np.array([self.bandwidth_]),
        }

    def _restore(self, arrays):
        self.rows_, self.mean_ = arrays["rows"], arrays["mean"]
        self.kernel_covariance_ = arrays["kernel_covariance"]
        self.bandwidth_ = float(arrays["bandwidth"][0])


def _optimal_block_length(X) -> float:
    from arch.bootstrap import optimal_block_length

    if len(X) < 20:
        return max(1.0, len(X) ** (1 / 3))
    moving = X[:, np.ptp(X, axis=0) > 0] ** 2
    lengths = optimal_block_length(moving)["stationary"] if moving.shape[1] else np.ones(1)
    return float(np.clip(np.nanmean(lengths), 1.0, len(X) / 2))


def _standardise(X):
    """Z (n, k), the k assets that move, at mean 0 and variance 1; mean (d,); scale (d,), 0 where constant."""
    scaler = Standardizer().fit(X)
    Z = scaler.transform(X)
    moving = Z.std(0) > 0.5  # 1 or 0, up to rounding
    return Z[:, moving], scaler.mean_, np.where(moving, scaler.scale_, 0.0)


def _rescale(matrix, scale):
    """The matrix (k, k) of the moving assets in units of the returns, (d, d); zero for a constant asset."""
    full, moving = np.zeros((len(scale), len(scale))), scale > 0
    full[np.ix_(moving, moving)] = matrix
    return full * np.outer(scale, scale)


def _shrink(covariance, shrinkage):
    d = len(covariance)
    return (1 - shrinkage) * covariance + (shrinkage * np.trace(covariance) / d + 1e-12) * np.eye(d)


def _root(covariance):
    """R with R'R = covariance: the correlation's symmetric root times the sd, so that units only rescale draws."""
    sd = np.sqrt(np.diag(covariance))
    unit = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    values, vectors = np.linalg.eigh(covariance * np.outer(unit, unit))
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T * sd


def _mahalanobis(centred, scatter):
    lower = np.linalg.cholesky(scatter)
    whitened = np.linalg.solve(lower, centred.T)
    return (whitened**2).sum(0), 2 * np.log(np.diag(lower)).sum()


def _likeliest_dof(q, d, least=2.05, most=100.0):
    """Root of the slope of `_t_log_likelihood` in nu, or the end of the interval it points to."""

    def slope(nu):
        shape = digamma((nu + d) / 2) - digamma(nu / 2) - d / nu
        return shape - np.log1p(q / nu).mean() + (nu + d) / nu * (q / (nu + q)).mean()

    if slope(most) >= 0:
        return most
    return brentq(slope, least, most, xtol=1e-12) if slope(least) > 0 else least


def _t_log_likelihood(q, log_det, nu, d):
    constant = gammaln((nu + d) / 2) - gammaln(nu / 2) - d / 2 * np.log(np.pi * nu) - log_det / 2
    return constant - (nu + d) / 2 * np.log1p(q / nu).mean()

"""Simulated markets whose truth is known: what an estimator or a generator should have found.

factor     x = L f + e,  f ~ (m_F, S_F),  e ~ (0, R):      mean L m_F,  covariance L S_F L' + R
           heavy tails:  f - m_F and e each times its own s = sqrt((df - 2)/chi2_df),  E s^2 = 1
           R = D^1/2 C D^1/2,  C = I, blocks of one correlation, or a band of first neighbours
block      x = m + diag(sigma) C^1/2 z,  C = rho within a group, 0 across
mixture    x ~ sum_r p_r N(m_r, S_r),  r = calm, crisis, independent from row to row
GARCH      x_t = m + sqrt(u_t) S^1/2 z_t,  u_{t+1} = 1 - a - b + (a zeta_t^2 + b) u_t,
           zeta = 1' S^1/2 z/sqrt(1' S 1), the shock of the equally weighted portfolio

Rows are periods, columns are assets; returns are simple, per period, of daily size. Annual means and
variances are divided by `periods_per_year`. `random_state` is None, an int, a Generator or a RandomState; a
market is built from one and sampled with another, and equal ints in both still give independent streams.
Arguments outside their range raise ValueError.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral

import numpy as np
from scipy.special import logsumexp


class Market(ABC):
    """A law of returns with `mean` (d,) and `covariance` (d, d), from which panels are drawn."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value.astype(float)
                value.setflags(write=False)
                object.__setattr__(self, field.name, value)

    def sample(self, n, random_state=None, *, missing=0.0) -> np.ndarray:
        """Simple returns of n consecutive periods, (n, d).

        Parameters
        ----------
        n : int
            Rows; at least 3 with missing values.
        random_state : None, int, Generator or RandomState
            Of the draw; `missing` does not change what is observed.
        missing : float or (float, float)
            Share of the assets that are listed late (NaN at the start) and share that die (NaN at the end);
            one number stands for both. Each set of assets is random; a gap is uniform on 1 to (n - 1)//2
            rows, so an asset in both sets keeps a row.
        """
        _require_count("n", n)
        shares = np.asarray(missing, float)
        fits = shares.shape in ((), (2,)) and ((shares >= 0) & (shares <= 1)).all()
        _require(fits, "missing to be one or two shares between 0 and 1", missing)
        _require(n >= 3 or not shares.any(), "at least 3 rows with missing values", n)
        rng = _generator(random_state, 1)
        x = self._draw(n, rng)
        row = np.arange(n)[:, None]
        for share, age in zip(np.broadcast_to(shares, 2), (row, row[::-1])):
            columns = rng.permutation(x.shape[1])[: round(share * x.shape[1])]
            if len(columns):
                gap = rng.integers(1, (n - 1) // 2, len(columns), endpoint=True)
                x[:, columns] = np.where(age < gap, np.nan, x[:, columns])
        return x

    @abstractmethod
    def _draw(self, n, rng): ...


@dataclass(frozen=True, eq=False, kw_only=True)
class FactorMarket(Market):
    """Factors and residuals; `factor_market` draws one and describes the options.

    loadings (d, k), factor_mean (k,), factor_covariance (k, k), idiosyncratic_variance (d,).
    """

    loadings: np.ndarray
    factor_mean: np.ndarray
    factor_covariance: np.ndarray
    idiosyncratic_variance: np.ndarray
    df: float | None = None
    residual_correlation: float = 0.0
    residual_group: int | None = None

    def __post_init__(self):
        super().__post_init__()
        finite = "a finite df above 2 (below, the variance is infinite), or None for Gaussian returns"
        _require(self.df is None or 2 < self.df < np.inf, finite, self.df)
        rho, group = self.residual_correlation, self.residual_group
        if group is None:
            limits = (
                "residual_correlation from -0.5 to 0.5 (a band is positive definite), or a residual_group"
            )
            _require(-0.5 <= rho <= 0.5, limits, rho)
        else:
            _require_count("residual_group", group)
            _require_correlation("residual_correlation", rho, min(group, len(self.loadings)))

    @property
    def mean(self):
        """(d,)"""
        return self.loadings @ self.factor_mean

    @property
    def residual_covariance(self):
        """R (d, d); its diagonal is `idiosyncratic_variance`."""
        d, rho, sd = len(self.loadings), self.residual_correlation, np.sqrt(self.idiosyncratic_variance)
        if self.residual_group is None:
            return _covariance(sd, np.eye(d) + rho * (np.eye(d, k=1) + np.eye(d, k=-1)))
        return _covariance(sd, _block_correlation(d, self.residual_group, rho))

    @property
    def covariance(self):
        """(d, d), computed on demand; df does not change it."""
        return self.loadings @ self.factor_covariance @ self.loadings.T + self.residual_covariance

    @property
    def factor_share(self):
        """Share of each asset's variance that its factors explain, (d,)."""
        explained = np.einsum("ik,ik->i", self.loadings @ self.factor_covariance, self.loadings)
        return explained / (explained + self.idiosyncratic_variance)

    @property
    def excess_kurtosis(self):
        """6/(df - 4) (q^2 + (1 - q)^2), q the factor share: (d,); infinite for df <= 4."""
        q = self.factor_share
        if self.df is None:
            return np.zeros(len(q))
        return (q**2 + (1 - q) ** 2) * (6 / (self.df - 4) if self.df > 4 else np.inf)

    def _draw(self, n, rng):
        d, rho, group = len(self.loadings), self.residual_correlation, self.residual_group
        f = rng.standard_normal((n, len(self.factor_mean))) @ np.linalg.cholesky(self.factor_covariance).T
        if group is None:
            e = rng.standard_normal((n, d + 1))
            plus, minus = np.sqrt(1 + 2 * rho) / 2, np.sqrt(1 - 2 * rho) / 2
            e = (plus + minus) * e[:, :-1] + (plus - minus) * e[:, 1:]
        else:
            e = _equicorrelate(rng.standard_normal((n, d)), group, rho)
        e *= np.sqrt(self.idiosyncratic_variance)
        if self.df is not None:
            for part in (f, e):
                part *= np.sqrt((self.df - 2) / rng.chisquare(self.df, (n, 1)))
        e += (f + self.factor_mean) @ self.loadings.T
        return e


def factor_market(
    d,
    k,
    random_state=None,
    *,
    df=None,
    residual_correlation=0.0,
    residual_group=None,
    factor_share=None,
    periods_per_year=252,
) -> FactorMarket:
    """Market of the diffusion factor models' simulation (there d = 2048, k = 16), and its variants.

    Stated there (we read: per year): factor means U(0, 0.1), standard deviations 1.5 times them, loadings
    N(0, 1), residual standard deviations U(0, 0.4), all Gaussian and independent. Factors then have 69 % of
    the variance on average, where the paper reports 50.42 %: a detail is missing, and `factor_share=0.5042`
    restores that figure. Ours: `factor_share`, the daily size, df, correlated residuals, missing values, and
    assets that are not sorted by variance.

    Parameters
    ----------
    d, k : int
        Assets and factors, 1 <= k <= d.
    random_state : None, int, Generator or RandomState
        Of the loadings, factor moments and residual variances.
    df : float, optional
        Student t: one scale per row for all factors, another for all residuals; the covariance stays. (Two
        scales: the score does not split exactly, as it does with one for both.)
    residual_correlation : float
        Between first neighbours, or within the blocks of `residual_group` assets.
    residual_group : int, optional
        Assets of a block; the last may be smaller.
    factor_share : float, optional
        Of the total variance; the residual variances are rescaled to meet it.
    periods_per_year : float
        1 gives the paper's numbers.

    References
    ----------
    Chen, Xu, Xu, Zhang (2025), Diffusion Factor Models, arXiv 2504.06566, appendix D.

    Examples
    --------
    >>> market = factor_market(2048, 16, random_state=0, factor_share=0.5042)
    >>> market.loadings.shape, market.sample(3, random_state=1).shape
    ((2048, 16), (3, 2048))
    """
    _require_count("d", d)
    _require_count("k", k)
    _require(k <= d, f"k to be at most d = {d}", k)
    _require(factor_share is None or 0 < factor_share < 1, "factor_share between 0 and 1", factor_share)
    _require(0 < periods_per_year < np.inf, "a positive periods_per_year", periods_per_year)
    rng = _generator(random_state, 0)
    m = rng.uniform(0, 0.1, k)
    L = rng.standard_normal((d, k))
    D = rng.uniform(0, 0.4, d) ** 2
    if factor_share is not None:
        D *= (L**2 @ (1.5 * m) ** 2).sum() * (1 / factor_share - 1) / D.sum()
    return FactorMarket(
        loadings=L,
        factor_mean=m / periods_per_year,
        factor_covariance=np.diag((1.5 * m) ** 2) / periods_per_year,
        idiosyncratic_variance=D / periods_per_year,
        df=df,
        residual_correlation=residual_correlation,
        residual_group=residual_group,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockMarket(Market):
    """Groups of `group_size` assets, one after another, with correlation rho inside and 0 across.

    mean, volatility: (d,) per period. `block_market` draws one.
    """

    mean: np.ndarray
    volatility: np.ndarray
    group_size: int
    rho: float

    @property
    def covariance(self):
        """(d, d)"""
        return _covariance(self.volatility, _block_correlation(len(self.mean), self.group_size, self.rho))

    def solve(self, v):
        """S^-1 v, (d,): the inverse of a block of g assets is (I - rho/(1 + (g - 1) rho) 11')/(1 - rho)."""
        g, rho = self.group_size, self.rho
        y = (v / self.volatility).reshape(-1, g)
        y = (y - rho / (1 + (g - 1) * rho) * y.sum(axis=1, keepdims=True)) / (1 - rho)
        return y.ravel() / self.volatility

    def minimum_variance_weights(self):
        """S^-1 1/(1' S^-1 1), (d,): fully invested, long and short."""
        w = self.solve(np.ones(len(self.mean)))
        return w / w.sum()

    def tangency_weights(self, risk_free=0.0):
        """S^-1 (m - r)/(1' S^-1 (m - r)), (d,): the largest Sharpe ratio; risk_free is per period.

        Raises ValueError where the normaliser is not positive: the formula would give the worst Sharpe ratio.
        """
        w = self.solve(self.mean - risk_free)
        total = float(w.sum())
        _require(total > 0, "1' S^-1 (m - r) > 0 (the formula gives the worst Sharpe ratio below)", total)
        return w / total

    def _draw(self, n, rng):
        x = _equicorrelate(rng.standard_normal((n, len(self.mean))), self.group_size, self.rho)
        return self.mean + self.volatility * x


def block_market(groups=5, group_size=10, random_state=None, *, rho=0.5, periods_per_year=252) -> BlockMarket:
    """Market of blocks, on which covariance estimators are compared by the weights they lead to.

    As published, per year: volatilities U(0.05, 0.2), means N(0.5 sigma, (0.2 sigma)^2), Gaussian rows. Ours:
    the step to daily size, weights in closed form, assets left in the order of their groups. With numbers of
    your own, call `BlockMarket`.

    Parameters
    ----------
    groups, group_size : int
        Groups, and assets in each.
    random_state : None, int, Generator or RandomState
        Of the volatilities and means.
    rho : float
        In (-1/(group_size - 1), 1).
    periods_per_year : float
        1 gives the published numbers.

    References
    ----------
    Missaoui, Deep Generative Modeling for Covariance Denoising in Finance; released code.
    """
    _require_count("groups", groups)
    _require_count("group_size", group_size)
    _require_correlation("rho", rho, group_size)
    _require(0 < periods_per_year < np.inf, "a positive periods_per_year", periods_per_year)
    rng = _generator(random_state, 0)
    sigma = rng.uniform(0.05, 0.2, groups * group_size)
    mean = sigma * rng.normal(0.5, 0.2, len(sigma)) / periods_per_year
    sigma /= np.sqrt(periods_per_year)
    return BlockMarket(mean=mean, volatility=sigma, group_size=group_size, rho=rho)


@dataclass(frozen=True, eq=False, kw_only=True)
class MixtureMarket(Market):
    """Gaussian regimes, drawn anew for every row: probabilities (r,), means (r, d), covariances (r, d, d)."""

    probabilities: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @property
    def mean(self):
        """(d,)"""
        return self.probabilities @ self.means

    @property
    def covariance(self):
        """(d, d): within the regimes, plus between their means."""
        apart = self.means - self.mean
        return np.tensordot(self.probabilities, self.covariances, 1) + (apart.T * self.probabilities) @ apart

    def log_density(self, x):
        """Log density in nats of each row of x (n, d): (n,)."""
        x = np.asarray(x, float)
        d = self.means.shape[1]
        _require(x.ndim == 2 and x.shape[1] == d, f"rows of {d} assets", x.shape)
        parts = []
        for p, m, S in zip(self.probabilities, self.means, self.covariances):
            C = np.linalg.cholesky(S)
            z = np.linalg.solve(C, (x - m).T)
            parts.append(np.log(p) - (z**2).sum(axis=0) / 2 - np.log(np.sqrt(2 * np.pi) * np.diag(C)).sum())
        return logsumexp(parts, axis=0)

    def _draw(self, n, rng):
        regime = rng.choice(len(self.probabilities), n, p=self.probabilities)
        x = rng.standard_normal((n, self.means.shape[1]))
        for r, (m, S) in enumerate(zip(self.means, self.covariances)):
            x[regime == r] = m + x[regime == r] @ np.linalg.cholesky(S).T
        return x


def mixture_market(
    d, random_state=None, *, crisis_probability=0.1, crisis_volatility=3.0, correlations=(0.2, 0.6)
) -> MixtureMarket:
    """Calm and crisis: in a crisis volatilities and correlations rise and means fall. All numbers are ours.

    Daily volatilities are U(0.005, 0.02) in calm; means are 0.05 of them in calm, -0.1 in a crisis.

    Parameters
    ----------
    d : int
        Assets.
    random_state : None, int, Generator or RandomState
        Of the volatilities.
    crisis_probability : float
        Of each row.
    crisis_volatility : float
        As a multiple of the calm one.
    correlations : (float, float)
        Of all pairs, in calm and in a crisis, each in (-1/(d - 1), 1).
    """
    _require_count("d", d)
    _require(0 < crisis_probability < 1, "crisis_probability between 0 and 1", crisis_probability)
    _require(0 < crisis_volatility < np.inf, "a positive crisis_volatility", crisis_volatility)
    _require(np.shape(correlations) == (2,), "two correlations, in calm and in a crisis", correlations)
    for rho in correlations:
        _require_correlation("correlations", rho, d)
    calm = _generator(random_state, 0).uniform(0.005, 0.02, d)
    sds = [calm, crisis_volatility * calm]
    return MixtureMarket(
        probabilities=np.array([1 - crisis_probability, crisis_probability]),
        means=np.stack([0.05 * sds[0], -0.1 * sds[1]]),
        covariances=np.stack(
            [_covariance(s, _block_correlation(d, d, r)) for s, r in zip(sds, correlations)]
        ),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class GarchMarket(Market):
    """Constant conditional correlation, one GARCH(1,1) multiplier u_t for all variances; see `garch_market`.

    mean (d,) and covariance (d, d) are unconditional; given the past, that of x_t is u_t times covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    alpha: float
    beta: float

    @property
    def excess_kurtosis(self):
        """3 (E u^2 - 1) = 6 a^2/(1 - (a + b)^2 - 2 a^2), the same for every portfolio; or infinite."""
        left = 1 - (self.alpha + self.beta) ** 2 - 2 * self.alpha**2
        return 6 * self.alpha**2 / left if left > 0 else np.inf

    def square_autocorrelation(self, lag):
        """Autocorrelation of (x_t - mean)^2 at a lag of 1 or more, (d,): it decays by a + b.

        [a (v (1 + 2 r^2) - 1) + b (v - 1)] (a + b)^(lag - 1)/(3 v - 1), with v = E u^2 and r the correlation
        of the asset with the equally weighted portfolio; r = 1 is the univariate GARCH(1,1).
        """
        _require_count("lag", lag)
        a, b, v, S = self.alpha, self.beta, 1 + self.excess_kurtosis / 3, self.covariance
        _require(v < np.inf, "(a + b)^2 + 2 a^2 < 1, or fourth moments are infinite", (a, b))
        r2 = S.sum(axis=1) ** 2 / (np.diag(S) * S.sum())
        return (a * (v * (1 + 2 * r2) - 1) + b * (v - 1)) * (a + b) ** (lag - 1) / (3 * v - 1)

    def path(self, n, random_state=None):
        """Returns (n, d), those of `sample`, and the multipliers u (n,)."""
        _require_count("n", n)
        rng, a, b = _generator(random_state, 1), self.alpha, self.beta
        shocks = rng.standard_normal((n, len(self.mean))) @ np.linalg.cholesky(self.covariance).T
        # From u = 1 the law settles at the rate a + b: start so early that 1e-8 of the way is left.
        early = int(np.ceil(np.log(1e-8) / np.log(a + b))) if a + b else 0
        market = shocks.sum(axis=1) / np.sqrt(self.covariance.sum())
        u, value = [], 1.0
        for square in np.concatenate([rng.standard_normal(early), market]) ** 2:
            u.append(value)
            value = 1 - a - b + (a * square + b) * value
        u = np.array(u[early:])
        return self.mean + np.sqrt(u)[:, None] * shocks, u

    def _draw(self, n, rng):
        return self.path(n, rng)[0]


def garch_market(d, random_state=None, *, alpha=0.08, beta=0.9, correlation=0.3) -> GarchMarket:
    """GARCH(1,1) volatility, common to all assets, with a constant conditional correlation (Bollerslev 1990).

    The equally weighted portfolio is a univariate GARCH(1,1), whose relative variance u_t scales every asset.
    With a GARCH for each asset the covariances rho s_i s_j E sqrt(u_i u_j) would have no closed form. Daily
    volatilities U(0.005, 0.02), one correlation, means of 0: ours.

    Parameters
    ----------
    d : int
        Assets.
    random_state : None, int, Generator or RandomState
        Of the volatilities.
    alpha, beta : float
        Not negative; alpha + beta at most 0.9999.
    correlation : float
        Of all pairs, in (-1/(d - 1), 1).
    """
    _require_count("d", d)
    stationary = alpha >= 0 and beta >= 0 and alpha + beta <= 0.9999
    _require(stationary, "alpha, beta >= 0 with alpha + beta <= 0.9999", (alpha, beta))
    _require_correlation("correlation", correlation, d)
    sd = _generator(random_state, 0).uniform(0.005, 0.02, d)
    covariance = _covariance(sd, _block_correlation(d, d, correlation))
    return GarchMarket(mean=np.zeros(d), covariance=covariance, alpha=alpha, beta=beta)


def _generator(random_state, stream):
    """Stream 0 builds markets, 1 draws from them: one seed for both must not tie shocks to loadings."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    if isinstance(random_state, np.random.RandomState):
        random_state = random_state.randint(2**31, size=4, dtype=np.int64)
    try:
        return np.random.default_rng(np.random.SeedSequence(random_state, spawn_key=(stream,)))
    except (TypeError, ValueError) as error:
        allowed = "None, an int >= 0, a Generator or a RandomState"
        raise ValueError(f"expected random_state to be {allowed}, got {random_state!r}.") from error


def _covariance(sd, correlation):
    return sd[:, None] * correlation * sd


def _block_correlation(d, size, rho):
    group = np.arange(d) // size
    return np.where(group[:, None] == group, rho, 0.0) + (1 - rho) * np.eye(d)


def _equicorrelate(z, size, rho):
    """z C^1/2, by the symmetric root: sqrt(1 - rho) of z, sqrt(1 + (g - 1) rho) of its mean over g assets."""
    group = np.arange(z.shape[1]) // size
    g = np.bincount(group)
    centre = np.add.reduceat(z, np.arange(0, z.shape[1], size), axis=1) / g
    centre *= np.sqrt(1 + (g - 1) * rho) - np.sqrt(1 - rho)
    return np.sqrt(1 - rho) * z + centre[:, group]


def _require(holds, expected, got):
    if not holds:
        raise ValueError(f"expected {expected}, got {got!r}.")


def _require_count(name, value):
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    _require(whole and value >= 1, f"{name} to be a whole number, at least 1", value)


def _require_correlation(name, rho, size):
    low = -1 / max(size - 1, 1)
    _require(low < rho < 1, f"{name} between {low:.3g} and 1 (positive definite for {size} assets)", rho)

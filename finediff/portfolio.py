"""Portfolios: convex problems in the weights w, and the constraints that compose them.

With mean mu (d,), covariance Sigma (d, d), risk-free rate r_f, all per period, and 1'w = 1 throughout:

    minimum variance   min w' Sigma w                            Sigma^-1 1 / 1' Sigma^-1 1
    mean-variance      max mu'w - (gamma/2) w' Sigma w           Sigma^-1 (mu - eta 1) / gamma,  1'w = 1
    maximum Sharpe     max (mu - r_f)'w / sqrt(w' Sigma w)       Sigma^-1 (mu - r_f) / 1' Sigma^-1 (mu - r_f)

The right column is used when there is no constraint. Otherwise a quadratic program is solved; maximum Sharpe
becomes one through y = kappa w (Charnes, Cooper 1962; Schaible 1974):

    min y' Sigma y   with   (mu - r_f)'y = 1,   1'y = kappa >= 0,   constraints on (y, kappa)

which is why a constraint is written in (weights, scale): scale = 1 in two problems, kappa in the third.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve

__all__ = [
    "Allocation",
    "Constraint",
    "GrossExposure",
    "LongOnly",
    "MaximumSharpe",
    "MaximumWeight",
    "MeanVariance",
    "MinimumVariance",
    "MinimumWeight",
    "Turnover",
]


class Constraint(ABC):
    """A convex set of portfolios, written for weights that sum to ``scale``."""

    @abstractmethod
    def build(self, weights, scale, names=None):
        """List of cvxpy constraints on ``weights`` (d,), positively homogeneous in (weights, scale).

        ``names`` is the Index of the assets, or None.
        """

    def bounds(self):
        """Lowest and highest weight of one asset that the set allows."""
        return -np.inf, np.inf

    def conflict(self, n_assets):
        """Why no fully invested portfolio of ``n_assets`` can meet it, with the remedy; "" if one can."""
        return ""


def _require(good, expected, got):
    if not good:
        raise ValueError(f"expected {expected}, got {got}.")


@dataclass(frozen=True)
class LongOnly(Constraint):
    """w_i >= 0."""

    def build(self, weights, scale, names=None):
        return [weights >= 0]

    def bounds(self):
        return 0.0, np.inf


@dataclass(frozen=True)
class MaximumWeight(Constraint):
    """w_i <= cap."""

    cap: float

    def __post_init__(self):
        _require(np.isfinite(self.cap) and self.cap > 0, "a cap that is positive and finite", self.cap)

    def build(self, weights, scale, names=None):
        return [weights <= self.cap * scale]

    def bounds(self):
        return -np.inf, float(self.cap)

    def conflict(self, n_assets):
        total = self.cap * n_assets
        if total < 1 - 1e-12:
            return f"{n_assets} assets sum to {total:.4g} < 1 at most; raise the cap to {1 / n_assets:.4g}"
        return ""


@dataclass(frozen=True)
class MinimumWeight(Constraint):
    """w_i >= floor; a negative floor limits short positions."""

    floor: float

    def __post_init__(self):
        _require(np.isfinite(self.floor), "a finite floor", self.floor)

    def build(self, weights, scale, names=None):
        return [weights >= self.floor * scale]

    def bounds(self):
        return float(self.floor), np.inf

    def conflict(self, n_assets):
        total = self.floor * n_assets
        if total > 1 + 1e-12:
            return f"{n_assets} assets sum to {total:.4g} > 1 at least; lower the floor to {1 / n_assets:.4g}"
        return ""


@dataclass(frozen=True)
class GrossExposure(Constraint):
    """sum |w_i| <= limit; 1 is long-only, 1.6 is 130/30."""

    limit: float

    def __post_init__(self):
        _require(self.limit >= 1, "a gross exposure of at least 1, as weights sum to 1", self.limit)

    def build(self, weights, scale, names=None):
        return [cp.norm1(weights) <= self.limit * scale]


@dataclass(frozen=True, eq=False)
class Turnover(Constraint):
    """sum |w_i - previous_i| <= limit, purchases plus sales.

    A Series ``previous`` is matched to the assets by name: a new asset was held at zero, and what was held of
    an asset no longer on offer is sold and counts. An array (d,) is taken in the order of the covariance.
    """

    previous: object = field(repr=False)
    limit: float

    def __post_init__(self):
        previous = np.asarray(self.previous, float)
        good = previous.ndim == 1 and np.isfinite(previous).all()
        _require(good, "finite previous weights (d,)", f"shape {previous.shape} or NaN")
        _require(self.limit >= 0, "a turnover limit of at least 0", self.limit)

    def build(self, weights, scale, names=None):
        previous, sold = self.previous, 0.0
        if isinstance(previous, pd.Series):
            _require(
                names is not None, "a named mean or covariance to match named previous weights", "arrays"
            )
            sold = float(previous.drop(names, errors="ignore").abs().sum())
            previous = previous.reindex(names, fill_value=0.0)
        previous = np.asarray(previous, float)
        _require(
            previous.shape == weights.shape, f"previous weights of shape {weights.shape}", previous.shape
        )
        return [cp.norm1(weights - previous * scale) + sold * scale <= self.limit * scale]


@dataclass(frozen=True, eq=False)
class Allocation:
    """A solved portfolio.

    Attributes
    ----------
    weights : (d,) Series or array
        Sum to one; a Series if the covariance or the mean is named.
    expected_return, volatility : float
        mu'w (NaN without a mean) and sqrt(w' Sigma w), per period, under the given mean and covariance.
    status : str
        "closed form", or the solver's: "optimal", or "optimal_inaccurate" (it stopped at reduced accuracy).
    name : str
        The problem.
    """

    weights: object
    expected_return: float
    volatility: float
    status: str
    name: str


_SINGULAR = 1e-12  # smallest over largest eigenvalue of the correlation
_DUST = 1e-9  # weights below are the solver's rounding


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Checked moments: mean (d,) or None, covariance (d, d) symmetric PSD, names or None, rcond."""

    mean: object
    covariance: np.ndarray
    names: object
    rcond: float

    def inverse_times(self, vector):
        """Sigma^-1 vector, through the correlation so that the units of single assets do not matter."""
        if self.rcond <= _SINGULAR:
            raise ValueError(
                f"expected an invertible covariance, got a reciprocal condition number of its correlation of "
                f"{self.rcond:.1e} (too few rows, or an asset repeated); clean it first, for example with "
                "finediff.covariance.clip, or add a constraint such as LongOnly()."
            )
        sd = np.sqrt(np.diag(self.covariance))
        factor = cho_factor(self.covariance / sd / sd[:, None], lower=True)
        return cho_solve(factor, vector / sd) / sd


def _check(mean, covariance):
    names = covariance.columns if isinstance(covariance, pd.DataFrame) else None
    if names is not None and not covariance.index.equals(names):
        raise ValueError("expected a covariance whose index equals its columns, got different names.")
    matrix = np.asarray(covariance, float)
    _require(
        matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.size > 0,
        "a covariance of shape (d, d)",
        matrix.shape,
    )
    if mean is not None:
        shape = np.shape(mean)
        if len(shape) != 1:
            raise ValueError(
                f"expected a mean of shape (d,), got {shape}, because against (d,) it would broadcast to "
                "(d, d); pass mean.ravel() or, for a DataFrame, its one column."
            )
        _require(shape[0] == len(matrix), f"a mean of {len(matrix)} assets, as the covariance has", shape[0])
        if isinstance(mean, pd.Series):
            if names is None:
                names = mean.index
            elif set(names) != set(mean.index):
                odd = list(names.symmetric_difference(mean.index))[:5]
                raise ValueError(f"expected mean and covariance on the same assets, got a mismatch: {odd}.")
    if names is not None and names.has_duplicates:
        raise ValueError(f"expected unique asset names, got {list(names[names.duplicated()])[:5]} twice.")
    if mean is not None:
        mean = np.asarray(mean[names] if isinstance(mean, pd.Series) else mean, float)
    for array, what in ((matrix, "covariance"), (mean, "mean")):
        if array is not None and not np.isfinite(array).all():
            at = [i if names is None else names[i] for i in np.argwhere(~np.isfinite(array))[0]]
            raise ValueError(
                f"expected a finite {what}, got NaN or infinity at {at}; fill or drop that asset."
            )
    size = np.abs(matrix).max()
    _require(size > 0, "a covariance with some variance", "all zeros")
    gap = np.abs(matrix - matrix.T).max()
    _require(gap <= 1e-6 * size, "a symmetric covariance", f"|S - S'| up to {gap:.3g}")
    matrix = (matrix + matrix.T) / 2
    sd = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    unit = np.where(sd > 0, sd, np.sqrt(size))
    values, vectors = np.linalg.eigh(matrix / unit / unit[:, None])
    if values[0] < -1e-6 * values[-1]:
        raise ValueError(
            f"expected a positive semi-definite covariance, got a smallest correlation eigenvalue of "
            f"{values[0]:.3g}; estimate it from complete rows, or clean it."
        )
    if values[0] < 0:
        matrix = (vectors * np.maximum(values, 0.0)) @ vectors.T * unit * unit[:, None]
    rcond = values[0] / values[-1] if (sd > 0).all() else 0.0
    return _Inputs(mean, matrix, names, float(rcond))


def _run(objective, constraints):
    """Solve with Clarabel; its status, which callers read instead of warnings."""
    problem = cp.Problem(objective, constraints)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        try:
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        except cp.SolverError:
            return cp.SOLVER_ERROR
    return problem.status


def _feasible(constraints, n_assets, names):
    w = cp.Variable(n_assets)
    hard = [c for constraint in constraints for c in constraint.build(w, 1.0, names)]
    return _run(cp.Minimize(0), [cp.sum(w) == 1, *hard]) not in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE)


def _refuse_infeasible(constraints, n_assets, names):
    """Raise with a minimal conflicting set, found by the deletion filter (Chinneck, Dravnieks 1991)."""
    if _feasible(constraints, n_assets, names):
        return
    culprits = list(constraints)
    for constraint in constraints:
        rest = [c for c in culprits if c is not constraint]
        if not _feasible(rest, n_assets, names):
            culprits = rest
    listed = " and ".join(map(repr, culprits))
    remedy = "cannot hold together; relax one of them" if len(culprits) > 1 else "cannot hold; relax it"
    raise ValueError(
        f"expected constraints that some portfolio of {n_assets} assets with weights summing to 1 meets, "
        f"got none: {listed} {remedy}."
    )


def _tidy(weights, constraints):
    """Remove the solver's rounding: dust to zero, bounds met exactly, sum one."""
    lows, highs = zip(*(constraint.bounds() for constraint in constraints))
    low, high = max(lows), min(highs)
    weights = np.clip(np.where(np.abs(weights) < _DUST, 0.0, weights), low, high)
    rest = 1 - weights.sum()
    room = np.minimum(high - weights if rest > 0 else weights - low, 1.0) * (weights != 0)
    return weights + rest * room / room.sum() if room.sum() > abs(rest) else weights


class _Problem(ABC):
    """Checks, closed form or program, and the result; subclasses are dataclasses with ``constraints``."""

    needs_mean = True

    def __post_init__(self):
        given = self.constraints
        if isinstance(given, Constraint) or not all(isinstance(c, Constraint) for c in given):
            raise TypeError(f"expected a list of constraints such as [LongOnly()], got {given!r}.")
        object.__setattr__(self, "constraints", tuple(given))

    def solve(self, *, covariance, mean=None):
        """Solve for the weights.

        Parameters
        ----------
        covariance : (d, d) array or DataFrame
            Symmetric, positive semi-definite, per period, in any units.
        mean : (d,) array or Series, optional
            Expected simple return per period. A Series is matched to a DataFrame covariance by name.

        Returns
        -------
        Allocation

        Raises
        ------
        ValueError
            Bad input (shape, names, NaN, symmetry, definiteness), a singular covariance without constraints,
            constraints that no portfolio meets (a minimal conflicting set is named), or no portfolio with a
            positive excess return in `MaximumSharpe`.
        RuntimeError
            The solver failed on a feasible problem.
        """
        if mean is None and self.needs_mean:
            raise ValueError(f"expected a mean, got None: {type(self).__name__} trades return against risk.")
        inputs = _check(mean, covariance)
        if self.constraints:
            weights, status = self._program(inputs)
        else:
            weights, status = self._closed_form(inputs), "closed form"
        volatility = float(np.sqrt(max(weights @ inputs.covariance @ weights, 0.0)))
        expected = np.nan if inputs.mean is None else float(inputs.mean @ weights)
        if inputs.names is not None:
            weights = pd.Series(weights, index=inputs.names)
        return Allocation(weights, expected, volatility, status, type(self).__name__)

    def _program(self, inputs):
        d = len(inputs.covariance)
        for constraint in self.constraints:
            conflict = constraint.conflict(d)
            if conflict:
                raise ValueError(
                    f"expected a constraint that weights summing to 1 meet, got {constraint!r}: {conflict}."
                )
        y = cp.Variable(d)
        scale, objective, hard = self._formulate(inputs, y)
        hard = [cp.sum(y) == scale, *hard]
        for constraint in self.constraints:
            hard += constraint.build(y, scale, inputs.names)
        status = _run(objective, hard)
        if status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            _refuse_infeasible(self.constraints, d, inputs.names)
            self._refuse(inputs)
            raise RuntimeError(
                f"expected the solver to finish, got status {status!r}; rescale or clean the covariance."
            )
        return _tidy(y.value / (1.0 if isinstance(scale, float) else scale.value), self.constraints), status

    def _refuse(self, inputs):
        """Raise if the problem itself, not its constraints, has no solution."""
        return

    @abstractmethod
    def _closed_form(self, inputs): ...

    @abstractmethod
    def _formulate(self, inputs, y):
        """Scale of y, objective, and the problem's own constraints."""


def _risk(covariance, y):
    """y' Sigma y over the mean variance: the program is then the same in any units."""
    unit = np.trace(covariance) / len(covariance)
    return cp.quad_form(y, cp.psd_wrap(covariance / unit)), unit


@dataclass(frozen=True)
class MinimumVariance(_Problem):
    """Fully invested portfolio of least variance (Markowitz 1952); the mean is not used for the weights.

    Examples
    --------
    >>> MinimumVariance().solve(covariance=np.diag([0.01, 0.03])).weights
    array([0.75, 0.25])
    """

    constraints: tuple = ()
    needs_mean = False

    def _closed_form(self, inputs):
        w = inputs.inverse_times(np.ones(len(inputs.covariance)))
        return w / w.sum()

    def _formulate(self, inputs, y):
        return 1.0, cp.Minimize(_risk(inputs.covariance, y)[0]), []


@dataclass(frozen=True)
class MeanVariance(_Problem):
    """max mu'w - (risk_aversion / 2) w' Sigma w (Markowitz 1952); the risk aversion is positive."""

    risk_aversion: float = 1.0
    constraints: tuple = ()

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.risk_aversion < np.inf, "a positive risk aversion", self.risk_aversion)

    def _closed_form(self, inputs):
        a, b = inputs.inverse_times(np.ones(len(inputs.mean))), inputs.inverse_times(inputs.mean)
        eta = (b.sum() - self.risk_aversion) / a.sum()
        return (b - eta * a) / self.risk_aversion

    def _formulate(self, inputs, y):
        risk, unit = _risk(inputs.covariance, y)
        gamma = self.risk_aversion * unit
        size = max(gamma, np.abs(inputs.mean).max())
        return 1.0, cp.Minimize(gamma / size / 2 * risk - (inputs.mean / size) @ y), []


@dataclass(frozen=True)
class MaximumSharpe(_Problem):
    """Fully invested portfolio of highest Sharpe ratio (Sharpe 1966); ``risk_free`` is per period.

    Without constraints the ratio has a maximum only if 1' Sigma^-1 (mu - r_f) > 0; otherwise the formula
    gives the portfolio of LOWEST ratio, and the problem is refused.
    """

    constraints: tuple = ()
    risk_free: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require(np.isfinite(self.risk_free), "a finite risk-free rate per period", self.risk_free)

    def _closed_form(self, inputs):
        w = inputs.inverse_times(inputs.mean - self.risk_free)
        total = w.sum()
        if total <= 1e-12 * np.abs(w).sum():
            raise ValueError(
                f"expected 1' Sigma^-1 (mu - r_f) > 0, got {total:.4g}: the minimum-variance portfolio does "
                f"not earn the risk-free {self.risk_free:g}, so no portfolio attains the highest ratio "
                "and the formula returns the worst one; add a constraint such as LongOnly(), or use "
                "MinimumVariance."
            )
        return w / total

    def _formulate(self, inputs, y):
        excess = inputs.mean - self.risk_free
        kappa = cp.Variable(nonneg=True)
        size = np.abs(excess).max() or 1.0
        return kappa, cp.Minimize(_risk(inputs.covariance, y)[0]), [(excess / size) @ y == 1]

    def _refuse(self, inputs):
        w = cp.Variable(len(inputs.mean))
        excess = inputs.mean - self.risk_free
        hard = [c for constraint in self.constraints for c in constraint.build(w, 1.0, inputs.names)]
        _run(cp.Maximize(excess @ w), [cp.sum(w) == 1, *hard])
        best = np.nan if w.value is None else float(excess @ w.value)
        if not best > 1e-9 * np.abs(excess).max():
            raise ValueError(
                f"expected some portfolio with a return above the risk-free {self.risk_free:g}, got at best "
                f"{best + self.risk_free:.4g} under {list(self.constraints)}: a negative ratio rewards "
                "risk; relax the constraints, lower risk_free, or use MinimumVariance."
            )

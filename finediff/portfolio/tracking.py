"""Tracking: the portfolio that stays nearest to a benchmark.

The squared tracking error of w against weights b, or against returns with covariance c = Cov(r, r_b) (d,) and
variance v_b, is

    (w - b)' Sigma (w - b)    or    Var(r'w - r_b) = w' Sigma w - 2 c'w + v_b

one quadratic programme, as the first is the second with c = Sigma b. Without constraints, 1'w = 1 gives

    w = Sigma^-1 c + (1 - 1' Sigma^-1 c) Sigma^-1 1 / (1' Sigma^-1 1)

(Roll 1992).
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from finediff.portfolio.constraints import require
from finediff.portfolio.inputs import Moments, check_moments, check_scenarios
from finediff.portfolio.variance import Quadratic


@dataclass(frozen=True, eq=False)
class _Tracked(Moments):
    """Moments, with Cov(r, r_b) (d,), v_b, and b where it is known."""

    cross: np.ndarray = None
    variance: float = 0.0
    benchmark: object = None


@dataclass(frozen=True, eq=False)
class MinimumTrackingError(Quadratic):
    """Fully invested portfolio of least tracking error, the standard deviation of w'r - r_b.

    Parameters
    ----------
    weights : (d,) array or Series, optional
        The benchmark's; ``solve`` needs a covariance. A Series is matched by name: an asset without a benchmark
        weight has none, and every asset with one must be on offer.
    returns : (n,) array or Series, optional
        The benchmark's, per period; ``solve`` needs scenarios, the assets' returns on the same rows. A Series is
        matched to a DataFrame by its labels, so that a back-test may give all dates. One of the two is given.
    constraints : sequence of Constraint
        None: the closed form.

    Examples
    --------
    >>> from finediff.portfolio import MaximumWeight
    >>> problem = MinimumTrackingError(weights=[0.5, 0.3, 0.2], constraints=[MaximumWeight(0.4)])
    >>> problem.solve(covariance=np.eye(3)).weights.round(6)
    array([0.4 , 0.35, 0.25])
    """

    weights: object = field(default=None, repr=False)
    returns: object = field(default=None, repr=False)
    constraints: tuple = ()

    def __post_init__(self):
        super().__post_init__()
        if (self.weights is None) == (self.returns is None):
            raise ValueError(
                "expected the benchmark's weights or its returns, got both or neither, because one of them defines "
                "the tracking error; give weights=... or returns=...."
            )
        given = self.weights if self.returns is None else self.returns
        array = np.asarray(given, float)
        good = array.ndim == 1 and array.size > 0 and np.isfinite(array).all()
        require(good, "finite benchmark weights (d,) or returns (n,)", f"shape {array.shape} or NaN")

    def _moments(self, covariance, mean, scenarios):
        if self.returns is not None:
            return self._from_returns(scenarios)
        moments = super()._moments(covariance, mean, scenarios)
        b, names = self.weights, moments.names
        if isinstance(b, pd.Series):
            require(names is not None, "a named covariance to match named benchmark weights", "an array")
            missing = b.index[b.to_numpy(float) != 0].difference(names)
            if len(missing):
                raise ValueError(
                    f"expected a covariance of all that the benchmark holds, got none for {list(missing)[:5]}; add "
                    "them, or track the benchmark's returns."
                )
            b = b.reindex(names, fill_value=0.0)
        b = np.asarray(b, float)
        require(b.shape == (len(moments),), f"benchmark weights of shape {(len(moments),)}", b.shape)
        cross = moments.covariance @ b
        return _Tracked(**vars(moments), cross=cross, variance=float(b @ cross), benchmark=b)

    def _from_returns(self, scenarios):
        if scenarios is None:
            raise ValueError(
                "expected scenarios, got None, because a benchmark's returns are tracked row by row; pass the assets' "
                "returns on the same rows as solve(scenarios=...)."
            )
        rows, names = check_scenarios(scenarios)
        target = self.returns
        if isinstance(target, pd.Series) and isinstance(scenarios, pd.DataFrame):
            missing = scenarios.index.difference(target.index)
            require(not len(missing), "a benchmark return for every row", f"none for {list(missing[:3])}")
            target = target[scenarios.index]
        target = np.asarray(target, float)
        require(target.shape == (len(rows),), f"benchmark returns of shape {(len(rows),)}", target.shape)
        require(len(rows) > 1, "at least two rows of returns", len(rows))
        centred, target = rows - rows.mean(axis=0), target - target.mean()
        covariance = centred.T @ centred / len(rows)
        labelled = covariance if names is None else pd.DataFrame(covariance, names, names)
        moments = check_moments(rows.mean(axis=0), labelled)
        cross, variance = centred.T @ target / len(rows), float(target @ target) / len(rows)
        return _Tracked(**vars(moments), cross=cross, variance=variance)

    def _closed_form(self, moments):
        near = moments.benchmark
        if near is None:
            near = moments.inverse_times(moments.cross)
        missing = 1 - near.sum()
        if abs(missing) < 1e-15:
            return near
        least = moments.inverse_times(np.ones(len(moments)))
        return near + missing * least / least.sum()

    def _values(self, moments):
        unit = moments.unit
        return {"root": moments.root / np.sqrt(unit), "linear": 2 * moments.cross / unit}, unit

    def _objective(self, weights, moments, costs):
        squared = weights @ moments.covariance @ weights - 2 * moments.cross @ weights + moments.variance
        return max(squared, 0.0) + costs

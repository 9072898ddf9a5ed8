"""Risk parity: every asset contributes to the variance what its budget says.

The share of asset i in the variance is RC_i = w_i (Sigma w)_i / w' Sigma w, which sums to one. For budgets b > 0,
1'b = 1, the long-only portfolio with RC = b is y / 1'y of the convex problem (Maillard, Roncalli, Teiletche 2010;
Spinu 2013)

    min_y  (1/2) y' Sigma y - b' log y          gradient  Sigma y - b / y = 0  <=>  y_i (Sigma y)_i = b_i

solved by Newton steps in x_i = sigma_i y_i, so that the units of single assets do not matter. With further
constraints no portfolio may have RC = b. Then, as risk and constraints are homogeneous (Richard, Roncalli 2019),

    min_{y, kappa}  y' Sigma y    with   b' log y >= 0,   1'y = kappa,   constraints on (y, kappa)

which is the same portfolio where the constraints do not bind; otherwise the least log sigma(w) - b' log w.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve

from finediff.portfolio.constraints import LongOnly, require
from finediff.portfolio.problem import Problem
from finediff.portfolio.program import hard_constraints, run
from finediff.portfolio.trading import TransactionCost


def risk_contributions(weights, covariance):
    """Shares of the assets in the variance, w_i (Sigma w)_i / w' Sigma w; they sum to one.

    Parameters
    ----------
    weights : (d,) array or Series
        A Series is matched to a DataFrame covariance by name.
    covariance : (d, d) array or DataFrame
        In any units.

    Returns
    -------
    (d,) array, or Series if the covariance is named

    Raises
    ------
    ValueError
        Shapes or names that disagree, or a portfolio without variance.

    Examples
    --------
    >>> risk_contributions([0.5, 0.5], np.diag([0.01, 0.03]))
    array([0.25, 0.75])
    """
    matrix = np.asarray(covariance, float)
    names = covariance.columns if isinstance(covariance, pd.DataFrame) else None
    if names is not None and isinstance(weights, pd.Series):
        odd = names.symmetric_difference(weights.index)
        require(not len(odd), "weights and covariance on the same assets", f"a mismatch: {list(odd)[:5]}")
        weights = weights[names]
    w = np.asarray(weights, float)
    require(
        w.ndim == 1 and matrix.shape == (len(w), len(w)), "weights (d,) and (d, d)", (w.shape, matrix.shape)
    )
    parts = w * (matrix @ w)
    require(parts.sum() > 0, "a portfolio with some variance", f"{parts.sum():.3g}")
    shares = parts / parts.sum()
    return shares if names is None else pd.Series(shares, index=names)


@dataclass(frozen=True, eq=False)
class RiskParity(Problem):
    """Long-only portfolio whose risk contributions equal the budgets; equal risk contribution without budgets.

    With other constraints than `LongOnly` the nearest in the sense of log sigma(w) - b' log w, its objective.

    Parameters
    ----------
    budgets : (d,) array, Series or mapping of asset to number, optional
        b_i > 0, rescaled to sum one. By name, more assets than are on offer may have one.
    constraints : sequence of Constraint
        `TransactionCost` is refused: the objective has no units to pay in.

    Examples
    --------
    >>> RiskParity().solve(covariance=np.diag([0.04, 0.16])).weights.round(12)
    array([0.66666667, 0.33333333])
    """

    budgets: object = field(default=None, repr=False)
    constraints: tuple = ()

    def __post_init__(self):
        super().__post_init__()
        if any(isinstance(c, TransactionCost) for c in self.constraints):
            raise ValueError(
                "expected constraints for RiskParity, got a TransactionCost, because risk shares have no price; "
                "limit trading by Turnover(limit=...)."
            )
        if self.budgets is not None:
            if isinstance(self.budgets, Mapping):
                object.__setattr__(self, "budgets", pd.Series(self.budgets, dtype=float))
            b = np.asarray(self.budgets, float)
            good = b.ndim == 1 and b.size > 0 and np.isfinite(b).all() and (b > 0).all()
            require(good, "positive risk budgets (d,)", self.budgets)

    def _shares(self, moments):
        """b (d,), sum one."""
        d, b = len(moments), self.budgets
        if b is None:
            return np.full(d, 1 / d)
        if isinstance(b, pd.Series):
            require(moments.names is not None, "a named covariance to match named budgets", "an array")
            missing = moments.names.difference(b.index)
            require(not len(missing), "a risk budget for every asset", f"none for {list(missing)[:5]}")
            b = b[moments.names]
        b = np.asarray(b, float)
        require(b.shape == (d,), f"risk budgets of shape {(d,)}", b.shape)
        return b / b.sum()

    def _direct(self, moments):
        sd = np.sqrt(np.diag(moments.covariance))
        if not (sd > 0).all():
            at = int(np.argmin(sd))
            raise ValueError(
                f"expected positive variances, got 0 for asset {at if moments.names is None else moments.names[at]!r}, "
                "because an asset without risk cannot take its share of it; leave it out."
            )
        if any(not isinstance(c, LongOnly) for c in self.constraints):
            return None
        x = _newton(moments.covariance / sd / sd[:, None], self._shares(moments))
        return x / sd / (x / sd).sum(), "newton"

    def _form(self):
        return RiskParity

    def _scale(self):
        return cp.Variable(nonneg=True)

    def _formulate(self, program, costs):
        d = program.weights.size
        root, shares = program.parameter("root", (d, d)), program.parameter("shares", d, nonneg=True)
        risk = cp.sum_squares(root @ program.weights)
        return cp.Minimize(risk), [shares @ cp.log(program.weights) >= 0]

    def _values(self, moments):
        return {"root": moments.root / np.sqrt(moments.unit), "shares": self._shares(moments)}, moments.unit

    def _objective(self, weights, moments, costs):
        if weights.min() <= 0:
            return np.inf
        variance = weights @ moments.covariance @ weights
        return np.log(variance) / 2 - self._shares(moments) @ np.log(weights)

    def _refuse(self, moments, previous, status):
        w, least = cp.Variable(len(moments)), cp.Variable()
        hard = hard_constraints(self.constraints, w, moments.names, previous)
        run(cp.Problem(cp.Maximize(least), [cp.sum(w) == 1, w >= least, *hard]))
        if least.value is None or least.value < 1e-9:
            raise ValueError(
                f"expected constraints that leave every asset a positive weight, got {list(self.constraints)}, "
                "because every risk budget is positive; relax them, or leave out the assets that they exclude."
            )


def _newton(correlation, shares):
    """x > 0 with x_i (C x)_i = b_i."""

    def value(x):
        return x @ correlation @ x / 2 - shares @ np.log(x)

    x = np.sqrt(shares)
    x /= np.sqrt(max(x @ correlation @ x, 1e-12 * len(x)))
    for _ in range(200):
        gradient = correlation @ x - shares / x
        if np.abs(x * gradient).max() <= 1e-13:
            return x
        try:
            factor = cho_factor(correlation + np.diag(shares / x**2), lower=True)
        except np.linalg.LinAlgError:
            break  # x is on its way to infinity
        step = -cho_solve(factor, gradient)
        # Half way to the boundary at most; near the solution the full step is never refused by rounding.
        falling = step < 0
        length = min(1.0, 0.9 * float((x[falling] / -step[falling]).min(initial=np.inf)))
        slope = -float(gradient @ step)
        while slope > 1e-12 and value(x + length * step) > value(x) - 1e-4 * length * slope:
            length /= 2
        x = x + length * step
    if np.abs(x * (correlation @ x) - shares).max() > 1e-9:
        raise ValueError(
            "expected a covariance under which long-only portfolios have risk, got one where assets cancel, because "
            "no weights then share it; clean it, for example with finediff.covariance.clip."
        )
    return x

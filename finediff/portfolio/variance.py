"""Mean and variance: minimum variance, mean-variance, maximum Sharpe.

With mean mu (d,), covariance Sigma (d, d), risk-free rate r_f, all per period, and 1'w = 1 throughout:

    minimum variance   min w' Sigma w                            Sigma^-1 1 / 1' Sigma^-1 1
    mean-variance      max mu'w - (gamma/2) w' Sigma w           Sigma^-1 (mu - eta 1) / gamma,  1'w = 1
    maximum Sharpe     max (mu - r_f)'w / sqrt(w' Sigma w)       Sigma^-1 (mu - r_f) / 1' Sigma^-1 (mu - r_f)

The right column is used when there is no constraint. Otherwise a quadratic program is solved; maximum Sharpe
becomes one through y = kappa w (Charnes, Cooper 1962; Schaible 1974), with costs c'|w - w0| off the return:

    min y' Sigma y   with   (mu - r_f)'y - c'|y - kappa w0| = 1,   1'y = kappa >= 0,   constraints on (y, kappa)

(>= 1 where there are costs, which is convex and binds), which is why a constraint is written in (weights,
scale): scale = 1 in two problems, kappa in the third.
"""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from finediff.portfolio.constraints import require
from finediff.portfolio.polyhedron import polyhedron
from finediff.portfolio.problem import Problem
from finediff.portfolio.program import hard_constraints, run
from finediff.portfolio.quadratic import solve_quadratic, solve_ratio
from finediff.portfolio.trading import TransactionCost

_LARGEST_GROSS = 1e5  # beyond, kappa is the solver's rounding of 0


class Quadratic(Problem):
    """min |R w|^2 - q'w + costs: one compiled program for several problems."""

    def _form(self):
        return Quadratic

    def _formulate(self, program, costs):
        d = program.weights.size
        root, linear = program.parameter("root", (d, d)), program.parameter("linear", d)
        return cp.Minimize(cp.sum_squares(root @ program.weights) - linear @ program.weights + costs), []

    def _numbers(self, values, unit, previous, moments):
        rows = polyhedron(self.constraints, len(moments), moments.names, previous)
        if rows is None:
            return None, None
        matrix, right, cost = rows
        return solve_quadratic(values["root"], values["linear"], matrix, right, cost / unit)


@dataclass(frozen=True)
class MinimumVariance(Quadratic):
    """Fully invested portfolio of least variance (Markowitz 1952); the mean is not used for the weights.

    Parameters
    ----------
    constraints : sequence of Constraint
        None: the closed form.

    Examples
    --------
    >>> MinimumVariance().solve(covariance=np.diag([0.01, 0.03])).weights
    array([0.75, 0.25])
    """

    constraints: tuple = ()

    def _closed_form(self, moments):
        w = moments.inverse_times(np.ones(len(moments)))
        return w / w.sum()

    def _values(self, moments):
        unit = moments.unit
        return {"root": moments.root / np.sqrt(unit), "linear": np.zeros(len(moments))}, unit

    def _objective(self, weights, moments, costs):
        return weights @ moments.covariance @ weights + costs


@dataclass(frozen=True)
class MeanVariance(Quadratic):
    """max mu'w - (risk_aversion / 2) w' Sigma w (Markowitz 1952).

    Parameters
    ----------
    risk_aversion : float
        gamma > 0, for returns as fractions.
    constraints : sequence of Constraint
        None: the closed form.
    """

    risk_aversion: float = 1.0
    constraints: tuple = ()
    needs_mean = True

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.risk_aversion < np.inf, "a positive risk aversion", self.risk_aversion)

    def _closed_form(self, moments):
        a, b = moments.inverse_times(np.ones(len(moments))), moments.inverse_times(moments.mean)
        eta = (b.sum() - self.risk_aversion) / a.sum()
        return (b - eta * a) / self.risk_aversion

    def _values(self, moments):
        size = max(self.risk_aversion * moments.unit, np.abs(moments.mean).max())
        root = moments.root * np.sqrt(self.risk_aversion / 2 / size)
        return {"root": root, "linear": moments.mean / size}, size

    def _objective(self, weights, moments, costs):
        return (
            moments.mean @ weights - self.risk_aversion / 2 * weights @ moments.covariance @ weights - costs
        )


@dataclass(frozen=True)
class MaximumSharpe(Problem):
    """Fully invested portfolio of highest Sharpe ratio (Sharpe 1966).

    Without constraints the ratio has a maximum only if 1' Sigma^-1 (mu - r_f) > 0; otherwise the formula
    gives the portfolio of LOWEST ratio, and the problem is refused.

    Parameters
    ----------
    constraints : sequence of Constraint
        None: the closed form.
    risk_free : float
        Per period.
    """

    constraints: tuple = ()
    risk_free: float = 0.0
    needs_mean = True

    def __post_init__(self):
        super().__post_init__()
        require(np.isfinite(self.risk_free), "a finite risk-free rate per period", self.risk_free)

    def _closed_form(self, moments):
        w = moments.inverse_times(moments.mean - self.risk_free)
        total = w.sum()
        if total <= 1e-12 * np.abs(w).sum():
            raise ValueError(
                f"expected 1' Sigma^-1 (mu - r_f) > 0, got {total:.4g}: the minimum-variance portfolio does "
                f"not earn the risk-free {self.risk_free:g}, so no portfolio attains the highest ratio "
                "and the formula returns the worst one; add a constraint such as LongOnly(), or use "
                "MinimumVariance."
            )
        return w / total

    def _program(self, sizes, values, unit, previous, moments):
        weights, status = super()._program(sizes, values, unit, previous, moments)
        if not np.abs(weights).sum() <= _LARGEST_GROSS:
            raise ValueError(
                f"expected a highest ratio that some portfolio attains, got one that ever larger long and short "
                f"positions approach under {list(self.constraints)}, because the minimum-variance portfolio does not "
                f"earn the risk-free {self.risk_free:g}; add GrossExposure() or LongOnly()."
            )
        return weights, status

    def _scale(self):
        return cp.Variable(nonneg=True)

    def _formulate(self, program, costs):
        d = program.weights.size
        root, excess = program.parameter("root", (d, d)), program.parameter("excess", d)
        earned = excess @ program.weights - costs
        free = isinstance(costs, float)
        return cp.Minimize(cp.sum_squares(root @ program.weights)), [earned == 1 if free else earned >= 1]

    def _values(self, moments):
        excess = moments.mean - self.risk_free
        size = np.abs(excess).max() or 1.0
        return {"root": moments.root / np.sqrt(moments.unit), "excess": excess / size}, size

    def _numbers(self, values, unit, previous, moments):
        rows = polyhedron(self.constraints, len(moments), moments.names, previous)
        if rows is None:
            return None, None
        paid = [c for c in self.constraints if isinstance(c, TransactionCost)]
        sold = sum(c.held(previous, moments.names, len(moments)).sold for c in paid)
        matrix, right, cost = rows
        return solve_ratio(values["root"], values["excess"], matrix, right, cost / unit, sold / unit)

    def _objective(self, weights, moments, costs):
        volatility = np.sqrt(weights @ moments.covariance @ weights)
        return ((moments.mean - self.risk_free) @ weights - costs) / volatility if volatility > 0 else np.nan

    def _refuse(self, moments, previous, status):
        w, names = cp.Variable(len(moments)), moments.names
        excess = moments.mean - self.risk_free
        earned, hard = excess @ w, hard_constraints(self.constraints, w, names, previous)
        for constraint in self.constraints:
            if isinstance(constraint, TransactionCost):
                held = constraint.held(previous, names, len(moments))
                cost, more = constraint.term(w, 1.0, held, constraint.rates(names, len(moments)))
                earned, hard = earned - cost, hard + more
        run(cp.Problem(cp.Maximize(earned), [cp.sum(w) == 1, *hard]))
        best = np.nan if w.value is None else float(earned.value)
        if not best > 1e-9 * np.abs(excess).max():
            raise ValueError(
                f"expected some portfolio with a return above the risk-free {self.risk_free:g}, got at best "
                f"{best + self.risk_free:.4g} under {list(self.constraints)}: a negative ratio rewards "
                "risk; relax the constraints, lower risk_free, or use MinimumVariance."
            )

"""Minimum CVaR on scenarios.

With n equally probable scenarios r_j (d,), tail probability a, and losses -r_j'w (Rockafellar, Uryasev 2000):

    CVaR_a(w) = min_t  t + (1/(a n)) sum_j max(-r_j'w - t, 0)
    min CVaR:  min_{w, t, u}  t + (1/(a n)) 1'u     with  u >= -R w - t,  u >= 0,  1'w = 1

the second a linear programme in d + 1 + n variables. Its dual, max_q min_w -q'R w over 0 <= q_j <= 1/(a n),
1'q = 1, reads: the worst reweighting of the scenarios, against which the portfolio is the best.
"""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from finediff.portfolio.constraints import Constraint, require
from finediff.portfolio.inputs import check_scenarios
from finediff.portfolio.polyhedron import polyhedron
from finediff.portfolio.problem import Problem
from finediff.portfolio.program import tidy
from finediff.portfolio.smoothed import newton_cvar
from finediff.risk import expected_shortfall

_METHODS = ("linear programme", "newton")


@dataclass(frozen=True)
class MinimumCVaR(Problem):
    """Fully invested portfolio of least CVaR, the expected shortfall of the scenarios given to ``solve``.

    Measured out of sample, on three panels of linear assets, scenarios gave no portfolio with a
    significantly lower realised CVaR than `MinimumVariance` on the same covariance: take this for constraints, payoffs and tails that a
    covariance cannot express. If so, level 0.05 rather than 0.01, at least some thousand scenarios, demeaned, and
    common random numbers: draw every date's scenarios from the same seed. That is the caller's to do, and cuts
    turnover by a third to two thirds at equal risk, because the noise of the draw is then the same at every date.

    Parameters
    ----------
    level : float
        a in (0, 1), the probability of the tail; at least 1/a scenarios.
    constraints : sequence of Constraint
        As in every problem. Without any the least CVaR may be unbounded, which is refused.
    demean : bool
        Subtract the scenarios' column means first, and so leave returns aside.
    method : {"linear programme", "newton"}
        The programme is exact. Newton steps on a smoothed objective stop at an estimated duality gap of 0.005 %
        (see `finediff.portfolio.smoothed`), many times faster from some thousand scenarios on. They know every
        built-in constraint, and refuse others that have no `Constraint.rows`; where the set has no interior
        (weights fixed by their bounds) or the steps fail, the programme is solved instead, and ``status`` is then
        the solver's.

    Examples
    --------
    >>> from finediff.portfolio import LongOnly
    >>> rows = np.array([[-0.03, 0.01], [0.02, -0.01], [0.01, 0.02], [0.01, 0.01]])
    >>> MinimumCVaR(level=0.5, constraints=[LongOnly()]).solve(scenarios=rows).weights.round(6)
    array([0., 1.])
    """

    level: float = 0.05
    constraints: tuple = ()
    demean: bool = False
    method: str = "linear programme"

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.level < 1, "a level in (0, 1), the probability of the tail", self.level)
        require(self.method in _METHODS, f"a method among {_METHODS}", repr(self.method))

    def solve(self, *, covariance=None, mean=None, scenarios=None, previous=None):
        """Solve for the weights; expected return and volatility are those of the scenarios.

        Parameters
        ----------
        covariance, mean : object
            Ignored.
        scenarios : (n, d) array or DataFrame
            Simple returns per period, rows equally probable.
        previous : (d,) array or Series, optional
            Weights held now, for `Turnover` and `TransactionCost`.

        Returns
        -------
        Allocation
            Its objective is the CVaR, a loss per period, plus costs.

        Raises
        ------
        ValueError
            No scenarios, fewer than 1/level, NaN, a CVaR that is unbounded under the constraints, constraints
            that no portfolio meets, or under "newton" one without `rows`.
        RuntimeError
            The solver failed on a feasible problem.
        """
        if scenarios is None:
            raise ValueError(
                "expected scenarios, got None, because MinimumCVaR averages their worst losses; pass "
                "solve(scenarios=generator.sample(8000, random_state=0))."
            )
        rows, names = check_scenarios(scenarios)
        least = int(np.ceil(1 / self.level - 1e-9))
        if len(rows) < least:
            raise ValueError(
                f"expected at least {least} scenarios at level {self.level:g}, got {len(rows)}, because the tail "
                "holds not one; draw more, or take a larger level."
            )
        used = rows - rows.mean(axis=0) if self.demean else rows
        inputs = _Scenarios(used, names)
        weights, status = None, "newton"
        if self.method == "newton":
            self._refuse_conflict(rows.shape[1])
            weights = newton_cvar(used, self.level, *self._polyhedron(rows.shape[1], names, previous))
            weights = None if weights is None else tidy(weights, self.constraints)
        if weights is None:
            values, unit = self._values(inputs)
            weights, status = self._program(rows.shape[::-1], values, unit, previous, inputs)
        costs = self._costs(weights, previous, names)
        earned = rows @ weights
        return self._allocation(
            weights,
            names,
            float(earned.mean()),
            float(earned.std()),
            status,
            self._objective(weights, inputs, costs),
        )

    def _polyhedron(self, n_assets, names, previous):
        found = polyhedron(self.constraints, n_assets, names, previous)
        if found is None:
            unknown = [c for c in self.constraints if type(c).rows is Constraint.rows]
            raise ValueError(
                f"expected constraints with linear rows for Newton steps, got {unknown}, because only their cvxpy form "
                'is known; write their rows(), or use MinimumCVaR(method="linear programme").'
            )
        return found

    def _form(self):
        return MinimumCVaR, self.level

    def _values(self, inputs):
        unit = float(np.sqrt(inputs.rows.var(axis=0).mean())) or 1.0
        return {"scenarios": inputs.rows / unit}, unit

    def _formulate(self, program, costs):
        n = program.sizes[1]
        threshold, excess = cp.Variable(), cp.Variable(n, nonneg=True)
        scenarios = program.parameter("scenarios", (n, program.weights.size))
        tail = threshold + cp.sum(excess) / (self.level * n)
        return cp.Minimize(tail + costs), [excess >= -(scenarios @ program.weights) - threshold]

    def _objective(self, weights, inputs, costs):
        return expected_shortfall(inputs.rows, self.level, weights) + costs

    def _refuse(self, inputs, previous, status):
        if "unbounded" in status:
            raise ValueError(
                f"expected a CVaR that is bounded below, got losses without end under {list(self.constraints)}, "
                "because some long-short portfolio of these scenarios never loses; add LongOnly() or GrossExposure()."
            )


@dataclass(frozen=True, eq=False)
class _Scenarios:
    rows: np.ndarray
    names: object

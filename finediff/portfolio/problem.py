"""What every problem is: constraints, one uniform `solve`, an `Allocation`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.portfolio.constraints import Constraint
from finediff.portfolio.inputs import check_moments
from finediff.portfolio.program import refuse_infeasible, solve_program, tidy
from finediff.portfolio.trading import TransactionCost


@dataclass(frozen=True, eq=False)
class Allocation:
    """A solved portfolio.

    Attributes
    ----------
    weights : (d,) Series or array
        Sum to one; a Series if the covariance, the mean or the scenarios are named.
    expected_return, volatility : float
        mu'w (NaN without a mean) and sqrt(w' Sigma w), per period, under the given mean and covariance; of the
        scenarios where these are what was solved with.
    status : str
        "closed form", "newton", or the solver's: "optimal", or "optimal_inaccurate" (it stopped at reduced
        accuracy).
    name : str
        The problem.
    objective : float
        What the problem minimises or maximises at the weights, in its own units, costs included; NaN if unknown.
    """

    weights: object
    expected_return: float
    volatility: float
    status: str
    name: str
    objective: float = np.nan


class Problem(ABC):
    """Checks, closed form or program, and the result; subclasses are frozen dataclasses with ``constraints``."""

    needs_mean = False

    def __post_init__(self):
        given = self.constraints
        if isinstance(given, Constraint) or not all(isinstance(c, Constraint) for c in given):
            raise TypeError(f"expected a list of constraints such as [LongOnly()], got {given!r}.")
        object.__setattr__(self, "constraints", tuple(given))

    def solve(self, *, covariance=None, mean=None, scenarios=None, previous=None):
        """Solve for the weights.

        One call for all problems: what a problem does not need may be left out, and is ignored.

        Parameters
        ----------
        covariance : (d, d) array or DataFrame, optional
            Symmetric, positive semi-definite, per period, in any units.
        mean : (d,) array or Series, optional
            Expected simple return per period. A Series is matched to a DataFrame covariance by name.
        scenarios : (n, d) array or DataFrame, optional
            Simple returns per period, rows equally probable.
        previous : (d,) array or Series, optional
            Weights held now, for `Turnover` and `TransactionCost`.

        Returns
        -------
        Allocation

        Raises
        ------
        ValueError
            Bad input (shape, names, NaN, symmetry, definiteness), or none where the problem needs it, a singular
            covariance without constraints, constraints that no portfolio meets (a minimal conflicting set is
            named), or no solution (`MaximumSharpe` without a positive excess return, an unbounded `MinimumCVaR`).
        RuntimeError
            The solver failed on a feasible problem.
        """
        moments = self._moments(covariance, mean, scenarios)
        found = self._direct(moments)
        if found is None:
            values, unit = self._values(moments)
            found = self._program((len(moments),), values, unit, previous, moments)
        weights, status = found
        volatility = float(np.sqrt(max(weights @ moments.covariance @ weights, 0.0)))
        expected = np.nan if moments.mean is None else float(moments.mean @ weights)
        costs = self._costs(weights, previous, moments.names)
        return self._allocation(
            weights, moments.names, expected, volatility, status, self._objective(weights, moments, costs)
        )

    def _moments(self, covariance, mean, scenarios):
        name = type(self).__name__
        if covariance is None:
            raise ValueError(
                f"expected a covariance, got None, because {name} weighs risk by it; pass covariance=..., such as "
                "finediff.covariance estimates."
            )
        if mean is None and self.needs_mean:
            raise ValueError(f"expected a mean, got None: {name} trades return against risk.")
        return check_moments(mean, covariance)

    def _allocation(self, weights, names, expected, volatility, status, objective):
        if names is not None:
            weights = pd.Series(weights, index=names)
        return Allocation(weights, expected, volatility, status, type(self).__name__, float(objective))

    def _costs(self, weights, previous, names):
        costs = [c.cost(weights, previous, names) for c in self.constraints if isinstance(c, TransactionCost)]
        return float(sum(costs))

    def _program(self, sizes, values, unit, previous, inputs):
        """Weights and status of the compiled program; raises where there is none."""
        d, names = sizes[0], inputs.names
        self._refuse_conflict(d)
        weights, status = self._numbers(values, unit, previous, inputs)
        if status is None:
            weights, status = solve_program(self, sizes, values, unit, previous, names)
        if weights is None:
            refuse_infeasible(self.constraints, d, names, previous)
            self._refuse(inputs, previous, status)
            raise RuntimeError(
                f"expected the solver to finish, got status {status!r}; rescale or clean the covariance."
            )
        return tidy(weights, self.constraints), status

    def _numbers(self, values, unit, previous, inputs):
        """Weights and status without a compiled program; both None where one is needed."""
        return None, None

    def _refuse_conflict(self, n_assets):
        for constraint in self.constraints:
            conflict = constraint.conflict(n_assets)
            if conflict:
                raise ValueError(
                    f"expected a constraint that weights summing to 1 meet, got {constraint!r}: {conflict}."
                )

    def _refuse(self, inputs, previous, status):
        """Raise if the problem itself, not its constraints, has no solution."""
        return

    def _direct(self, moments):
        """Weights and status where no program is needed, else None."""
        return None if self.constraints else (self._closed_form(moments), "closed form")

    def _closed_form(self, moments):
        raise NotImplementedError

    def _form(self):
        """What the compiled program depends on beside constraints, names and sizes."""
        return type(self)

    def _scale(self):
        """Sum of the program's variable: 1, or a cvxpy variable."""
        return 1.0

    def _values(self, moments):
        """Values of the program's parameters, and the unit of its objective."""
        raise NotImplementedError

    @abstractmethod
    def _formulate(self, program, costs):
        """Objective and the problem's own constraints, in ``program.weights``."""

    @abstractmethod
    def _objective(self, weights, inputs, costs):
        """The problem's objective at ``weights``, in its own units."""

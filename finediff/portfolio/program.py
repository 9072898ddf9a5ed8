"""Compiled programs: a cvxpy problem in parameters, kept from one solve to the next.

With a few dozen assets compiling costs more than solving, and a back-test solves one problem hundreds of times.
So a program is compiled once for each (problem, forms of its constraints, names, sizes), with moments, scenarios and
held weights as parameters, following cvxpy's disciplined parametrised programming (Agrawal et al. 2019,
arXiv:1910.12430). A covariance enters through its root, as |R y|^2.

The last few programs are kept in the process, none in the problems: these stay small, comparable and picklable.
"""

import warnings
from collections import OrderedDict

import cvxpy as cp
import numpy as np

from finediff.portfolio.trading import Held, Trading, TransactionCost

_KEPT = 8
_KEPT_NUMBERS = 500_000  # parameter values of all of them, some 200 bytes each once compiled


class Program:
    """A problem and its constraints in cvxpy, with everything that changes between solves as a parameter.

    Parameters
    ----------
    problem : Problem
        Gives scale, objective and its own constraints.
    sizes : tuple of int
        d, and n for scenarios.
    names : Index or None
        Of the assets.
    """

    def __init__(self, problem, sizes, names):
        n_assets = sizes[0]
        self.sizes, self.weights = sizes, cp.Variable(n_assets)
        self.scale = problem._scale()
        self.parameters, self._trading, costs = {}, [], 0.0
        hard = [cp.sum(self.weights) == self.scale]
        for constraint in problem.constraints:
            if not isinstance(constraint, Trading):
                hard += constraint.build(self.weights, self.scale, names)
                continue
            held, rates = Held(cp.Parameter(n_assets), cp.Parameter(nonneg=True)), None
            if isinstance(constraint, TransactionCost):
                rates = cp.Parameter(n_assets, nonneg=True)
                cost, definition = constraint.term(self.weights, self.scale, held, rates)
                costs, hard = costs + cost, hard + definition
            else:
                hard += constraint.build(self.weights, self.scale, names, held)
            self._trading.append((held, rates))
        objective, own = problem._formulate(self, costs)
        self.problem = cp.Problem(objective, hard + own)

    def parameter(self, name, shape=(), **signs):
        """A new parameter of that name, whose value `solve` sets."""
        self.parameters[name] = cp.Parameter(shape, **signs)
        return self.parameters[name]

    def solve(self, constraints, values, unit, previous, names):
        """Set every parameter and solve.

        Parameters
        ----------
        constraints : sequence of Constraint
            Those it was compiled with, up to the weights they hold.
        values : dict of str to array
            Of the problem's own parameters.
        unit : float
            One of the objective, in the units of cost rates.
        previous : (d,) array or Series, or None
            Weights held.
        names : Index or None
            Of the assets.

        Returns
        -------
        weights (d,) or None, and the solver's status
        """
        for name, value in values.items():
            self.parameters[name].value = value
        trading = [c for c in constraints if isinstance(c, Trading)]
        for constraint, (held, rates) in zip(trading, self._trading):
            found = constraint.held(previous, names, self.weights.size)
            share = 1.0
            if rates is not None:
                share = 1 / unit
                rates.value = constraint.rates(names, self.weights.size) * share
            held.weights.value, held.sold.value = found.weights, found.sold * share
        status = run(self.problem)
        if self.weights.value is None or status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            return None, status
        scale = self.scale if isinstance(self.scale, float) else self.scale.value
        return self.weights.value / scale, status


class _Shelf:
    """The last few programs by key. One is taken out while it is in use, so no two threads share parameters."""

    def __init__(self, kept, numbers):
        self._programs, self._kept, self._numbers = OrderedDict(), kept, numbers

    def __len__(self):
        return len(self._programs)

    def take(self, key, build):
        try:
            program = self._programs.pop(key, None)
        except TypeError:  # a constraint without a hash
            program = None
        return build() if program is None else program

    def put(self, key, program):
        try:
            self._programs[key] = program
        except TypeError:
            return
        while len(self) > self._kept or (len(self) > 1 and self._size() > self._numbers):
            self._programs.popitem(last=False)

    def _size(self):
        return sum(
            parameter.size for kept in list(self._programs.values()) for parameter in kept.parameters.values()
        )


_shelf = _Shelf(_KEPT, _KEPT_NUMBERS)


def solve_program(problem, sizes, values, unit, previous, names):
    """Weights (d,) or None and status of ``problem``, compiled if it is not on the shelf.

    Parameters
    ----------
    problem : Problem
        With constraints.
    sizes : tuple of int
        d, and n for scenarios.
    values, unit, previous, names
        As in `Program.solve`.

    Returns
    -------
    weights (d,) or None, and the solver's status
    """
    forms = tuple(c.form() if isinstance(c, Trading) else c for c in problem.constraints)
    key = (problem._form(), sizes, None if names is None else tuple(names), forms)
    program = _shelf.take(key, lambda: Program(problem, sizes, names))
    result = program.solve(problem.constraints, values, unit, previous, names)
    _shelf.put(key, program)
    return result


def run(problem):
    """Solve with Clarabel; its status, which callers read instead of warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        try:
            # From a cold start, so that weights do not depend on what was solved before.
            problem.solve(
                solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, warm_start=False
            )
        except cp.SolverError:
            return cp.SOLVER_ERROR
    return problem.status


def hard_constraints(constraints, weights, names, previous):
    """All constraints on ``weights`` (d,) at scale 1, with the numbers that are held."""
    found = []
    for constraint in constraints:
        if isinstance(constraint, Trading):
            held = constraint.held(previous, names, weights.shape[0])
            found += constraint.build(weights, 1.0, names, held)
        else:
            found += constraint.build(weights, 1.0, names)
    return found


def _feasible(constraints, n_assets, names, previous):
    w = cp.Variable(n_assets)
    hard = hard_constraints(constraints, w, names, previous)
    status = run(cp.Problem(cp.Minimize(0), [cp.sum(w) == 1, *hard]))
    return status not in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE)


def refuse_infeasible(constraints, n_assets, names, previous):
    """Raise with a minimal conflicting set, found by the deletion filter (Chinneck, Dravnieks 1991)."""
    culprits = [part for constraint in constraints for part in constraint.parts()]
    if _feasible(culprits, n_assets, names, previous):
        return
    for part in list(culprits):
        rest = [c for c in culprits if c is not part]
        if not _feasible(rest, n_assets, names, previous):
            culprits = rest
    listed = " and ".join(map(repr, culprits))
    remedy = "cannot hold together; relax one of them" if len(culprits) > 1 else "cannot hold; relax it"
    raise ValueError(
        f"expected constraints that some portfolio of {n_assets} assets with weights summing to 1 meets, "
        f"got none: {listed} {remedy}."
    )


_DUST = 1e-9  # weights below are the solver's rounding


def tidy(weights, constraints):
    """Remove the solver's rounding: dust to zero, bounds met exactly, sum one."""
    bounds = [(-np.inf, np.inf), *(constraint.bounds() for constraint in constraints)]
    lows, highs = zip(*bounds)
    low, high = max(lows), min(highs)
    weights = np.clip(np.where(np.abs(weights) < _DUST, 0.0, weights), low, high)
    rest = 1 - weights.sum()
    room = np.minimum(high - weights if rest > 0 else weights - low, 1.0) * (weights != 0)
    return weights + rest * room / room.sum() if room.sum() > abs(rest) else weights

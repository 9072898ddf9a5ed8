import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

from finediff.portfolio import (
    Constraint,
    GrossExposure,
    GroupLimits,
    LongOnly,
    MaximumWeight,
    MinimumCVaR,
    MinimumWeight,
    TransactionCost,
    Turnover,
)
from finediff.risk import expected_shortfall

METHODS = ["linear programme", "newton"]
both = pytest.mark.parametrize("method", METHODS)


def market(n, d, seed=0):
    """Two factors, multivariate t with four degrees of freedom."""
    rng = np.random.default_rng(seed)
    loadings = 0.5 * rng.standard_normal((d, 2)) + 0.7
    rows = rng.standard_normal((n, 2)) @ loadings.T + rng.standard_normal((n, d)) * rng.uniform(0.5, 2, d)
    return 0.01 * rows / np.sqrt(rng.chisquare(4, (n, 1)) / 4)


def ellipse(points=4000):
    """Points evenly on an ellipse: r = A (cos, sin), for which CVaR_a = |A'w| sin(pi a) / (pi a)."""
    angle = 2 * np.pi * (np.arange(points) + 0.5) / points
    root = np.array([[0.02, 0.0], [0.004, 0.01]])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) @ root.T, root


@both
@pytest.mark.parametrize("level", [0.01, 0.05, 0.3])
def test_an_ellipse_has_the_weights_of_minimum_variance(method, level):
    rows, root = ellipse()
    covariance = root @ root.T
    inverse = np.linalg.solve(covariance, np.ones(2))
    w = inverse / inverse.sum()
    solved = MinimumCVaR(level, method=method).solve(scenarios=rows)
    exact = np.sqrt(w @ covariance @ w) * np.sin(np.pi * level) / (np.pi * level)
    assert solved.objective == pytest.approx(exact, rel=1e-4)
    np.testing.assert_allclose(solved.weights, w, atol=0.02)
    assert solved.volatility == pytest.approx(
        np.sqrt(solved.weights @ covariance @ solved.weights / 2), rel=1e-9
    )


SETS = {
    "long only": [LongOnly()],
    "capped": [LongOnly(), MaximumWeight(0.12)],
    "gross": [GrossExposure(1.6)],
    "gross, capped": [GrossExposure(1.5), MaximumWeight(0.2), MinimumWeight(-0.05)],
    "groups": [
        LongOnly(),
        GroupLimits({"a": range(5), "b": range(5, 12)}, {"a": (0.5, None), "b": (0.1, 0.2)}),
    ],
    "traded": [LongOnly(), Turnover(limit=0.5), TransactionCost(0.001)],
    "free": [],
}


@pytest.mark.parametrize("level", [0.01, 0.05])
@pytest.mark.parametrize("given", SETS)
def test_newton_reaches_the_linear_programme(given, level):
    rows, previous = market(2000, 15, seed=3), np.full(15, 1 / 15)
    exact, near = (
        MinimumCVaR(level, SETS[given], method=method).solve(scenarios=rows, previous=previous)
        for method in METHODS
    )
    assert exact.status == "optimal"
    assert near.status == "newton"
    assert -1e-7 <= near.objective / exact.objective - 1 <= 2e-4
    costs = 0.001 * np.abs(near.weights - previous).sum() if given == "traded" else 0.0
    assert near.objective == pytest.approx(expected_shortfall(rows, level, near.weights) + costs, rel=1e-12)
    for solved in (exact, near):
        w = solved.weights
        assert w.sum() == pytest.approx(1, abs=1e-9)
        if given in ("long only", "capped", "groups", "traded"):
            assert w.min() >= 0
        if given.startswith("gross"):
            assert np.abs(w).sum() <= 1.6 + 1e-7
        if given == "capped":
            assert w.max() <= 0.12
        if given == "traded":
            assert np.abs(w - previous).sum() <= 0.5 + 1e-7
        if given == "groups":
            assert w[:5].sum() >= 0.5 - 1e-7
            assert 0.1 - 1e-7 <= w[5:12].sum() <= 0.2 + 1e-7


def test_strong_duality_with_the_worst_reweighting():
    """max_q min_i -(R'q)_i over 0 <= q <= 1/(a n), 1'q = 1, by another solver."""
    rows, level = market(400, 6, seed=1), 0.1
    n, d = rows.shape
    dual = linprog(
        np.concatenate([np.zeros(n), [-1.0]]),
        A_ub=np.hstack([rows.T, np.ones((d, 1))]),
        b_ub=np.zeros(d),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        bounds=[(0, 1 / (level * n))] * n + [(None, None)],
    )
    solved = MinimumCVaR(level, [LongOnly()]).solve(scenarios=rows)
    assert solved.objective == pytest.approx(-dual.fun, rel=1e-7)
    assert solved.objective == pytest.approx(expected_shortfall(rows, level, solved.weights), rel=1e-12)


@both
def test_no_portfolio_nearby_has_less(method):
    rows = market(1500, 8, seed=5)
    w = MinimumCVaR(0.05, [LongOnly()], method=method).solve(scenarios=rows).weights
    best, rng = expected_shortfall(rows, 0.05, w), np.random.default_rng(0)
    for share in (0.001, 0.01, 0.1):
        for other in rng.dirichlet(np.ones(8), 100):
            assert expected_shortfall(rows, 0.05, (1 - share) * w + share * other) >= best * (1 - 1e-4)


@both
def test_equivariance(method):
    rows, problem = market(1000, 6, seed=2), MinimumCVaR(0.05, [LongOnly()], method=method)
    one = problem.solve(scenarios=rows)
    order = np.random.default_rng(1).permutation(6)
    permuted = problem.solve(scenarios=rows[:, order])
    np.testing.assert_allclose(
        permuted.weights, one.weights[order], atol=5e-3 if method == "newton" else 1e-6
    )
    reordered = problem.solve(scenarios=rows[::-1])
    assert reordered.objective == pytest.approx(one.objective, rel=1e-4)
    scaled = problem.solve(scenarios=1e4 * rows)
    assert scaled.objective == pytest.approx(1e4 * one.objective, rel=1e-4)
    # One amount more on every asset is one amount less of every portfolio's loss.
    shifted = problem.solve(scenarios=rows + 0.002)
    assert shifted.objective == pytest.approx(one.objective - 0.002, rel=1e-4)
    np.testing.assert_allclose(shifted.weights, one.weights, atol=5e-3 if method == "newton" else 1e-5)


@both
def test_demeaned_scenarios_know_no_returns(method):
    rows = market(800, 5)
    problem = MinimumCVaR(0.1, [LongOnly()], demean=True, method=method)
    moved = rows + np.array([0.01, 0, -0.02, 0, 0.03])
    one, two = problem.solve(scenarios=rows), problem.solve(scenarios=moved)
    np.testing.assert_allclose(one.weights, two.weights, atol=1e-4)
    assert one.objective == pytest.approx(two.objective, rel=1e-6)
    assert two.expected_return == pytest.approx(moved.mean(axis=0) @ two.weights)
    plain = MinimumCVaR(0.1, [LongOnly()], method=method).solve(scenarios=rows - rows.mean(axis=0))
    np.testing.assert_allclose(one.weights, plain.weights, atol=1e-9)


@both
def test_costs_hold_the_portfolio(method):
    rows, previous = market(1000, 6), np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])

    def solved(*costs):
        return MinimumCVaR(0.05, [LongOnly(), *costs], method=method).solve(scenarios=rows, previous=previous)

    np.testing.assert_allclose(solved(TransactionCost(0.0)).objective, solved().objective, rtol=1e-4)
    dear = solved(TransactionCost(1.0))
    np.testing.assert_allclose(dear.weights, previous, atol=1e-5)
    traded = [np.abs(solved(TransactionCost(c)).weights - previous).sum() for c in (0, 2e-4, 1e-3, 5e-3)]
    assert traded == sorted(traded, reverse=True)


def test_names_come_from_the_scenarios():
    rows = market(600, 4)
    frame = pd.DataFrame(rows, columns=list("wxyz"))
    held = pd.Series({"z": 0.5, "w": 0.4, "gone": 0.1})
    problem = MinimumCVaR(0.05, [LongOnly(), Turnover(limit=0.6)])
    named = problem.solve(scenarios=frame, previous=held, covariance=object(), mean="ignored")
    assert list(named.weights.index) == list("wxyz")
    plain = MinimumCVaR(0.05, [LongOnly(), Turnover([0.4, 0, 0, 0.5], 0.5)]).solve(scenarios=rows)
    np.testing.assert_allclose(named.weights, plain.weights, atol=1e-7)


def test_a_set_without_interior_is_solved_by_the_programme():
    rows = market(500, 4)
    solved = MinimumCVaR(0.05, [MaximumWeight(0.25)], method="newton").solve(scenarios=rows)
    assert solved.status == "optimal"
    np.testing.assert_allclose(solved.weights, 0.25, atol=1e-9)
    long = MinimumCVaR(0.05, [GrossExposure(1.0)], method="newton").solve(scenarios=rows)
    same = MinimumCVaR(0.05, [LongOnly()]).solve(scenarios=rows)
    assert long.objective == pytest.approx(same.objective, rel=1e-6)


class Neutral(Constraint):
    def build(self, weights, scale, names=None):
        return [cp.sum(weights[:2]) == scale / 2]


def test_own_constraints():
    rows = market(500, 4)
    w = MinimumCVaR(0.05, [LongOnly(), Neutral()]).solve(scenarios=rows).weights
    assert w[:2].sum() == pytest.approx(0.5, abs=1e-7)
    with pytest.raises(ValueError, match=r"expected constraints with linear rows.*linear programme"):
        MinimumCVaR(0.05, [Neutral()], method="newton").solve(scenarios=rows)


FREE_LUNCH = market(300, 2)[:, [0, 0, 1]] + [0.01, 0.0, 0.0]
NAN = np.where(np.arange(120).reshape(40, 3) == 7, np.nan, 0.01)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: MinimumCVaR(method=m).solve(covariance=np.eye(2)), "expected scenarios, got None"),
        (
            lambda m: MinimumCVaR(method=m).solve(scenarios=market(19, 3)),
            "at least 20 scenarios at level 0.05, got 19",
        ),
        (lambda m: MinimumCVaR(method=m).solve(scenarios=np.ones(30)), r"shape \(n, d\)"),
        (lambda m: MinimumCVaR(method=m).solve(scenarios=NAN), "row 2 of 1"),
        (
            lambda m: MinimumCVaR(method=m).solve(scenarios=pd.DataFrame(NAN, columns=list("abc"))),
            "row 2 of 'b'",
        ),
        (lambda m: MinimumCVaR(method=m).solve(scenarios=FREE_LUNCH), "bounded below.*LongOnly"),
        (
            lambda m: MinimumCVaR(0.1, [MaximumWeight(0.2)], method=m).solve(scenarios=market(50, 3)),
            r"MaximumWeight\(cap=0.2\).*0.6 < 1",
        ),
        (
            lambda m: MinimumCVaR(
                0.1, [LongOnly(), MinimumWeight(0.2), Turnover([1.0, 0, 0], 0.1)], method=m
            ).solve(scenarios=market(50, 3)),
            r"got none: MinimumWeight\(floor=0.2\) and Turnover\(limit=0.1\) cannot hold together",
        ),
        (
            lambda m: MinimumCVaR(0.1, [Turnover(limit=0.1)], method=m).solve(scenarios=market(50, 3)),
            "expected previous weights, got None",
        ),
        (lambda m: MinimumCVaR(level=1.0, method=m), "level in"),
    ],
)
@both
def test_bad_input_is_refused(call, match, method):
    with pytest.raises(ValueError, match=match):
        call(method)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="expected a method among"):
        MinimumCVaR(method="simplex")

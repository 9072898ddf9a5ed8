import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from finediff.portfolio import (
    Constraint,
    GrossExposure,
    LongOnly,
    MaximumSharpe,
    MaximumWeight,
    MeanVariance,
    MinimumVariance,
    MinimumWeight,
    Turnover,
)

LOOSE = [GrossExposure(1e3)]
PROBLEMS = [MinimumVariance, MaximumSharpe, MeanVariance]


def market(d, seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((d, 2)) + 0.5
    covariance = (0.3 * loadings @ loadings.T + np.diag(rng.uniform(0.5, 2, d))) * scale**2
    return (rng.standard_normal(d) * 0.1 + 0.05) * scale, covariance


def sharpe(w, mean, covariance):
    return mean @ w / np.sqrt(w @ covariance @ w)


@pytest.mark.parametrize("d", [2, 5, 40])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_program_reaches_the_closed_form(problem, d):
    mean, covariance = market(d)
    closed = problem().solve(covariance=covariance, mean=mean)
    program = problem(constraints=LOOSE).solve(covariance=covariance, mean=mean)
    assert closed.status == "closed form"
    assert program.status == "optimal"
    np.testing.assert_allclose(program.weights, closed.weights, rtol=1e-6, atol=1e-7)
    assert closed.name == problem.__name__
    assert closed.weights.sum() == pytest.approx(1, abs=1e-12)
    assert program.expected_return == pytest.approx(mean @ closed.weights, rel=1e-6)
    assert program.volatility == pytest.approx(
        np.sqrt(closed.weights @ covariance @ closed.weights), rel=1e-6
    )


def test_closed_forms_meet_the_first_order_conditions():
    mean, covariance = market(12)
    gradient = covariance @ MinimumVariance().solve(covariance=covariance).weights
    np.testing.assert_allclose(gradient, gradient[0], rtol=1e-10)
    w = MeanVariance(risk_aversion=7.0).solve(covariance=covariance, mean=mean).weights
    gradient = mean - 7.0 * covariance @ w
    np.testing.assert_allclose(gradient, gradient[0], rtol=1e-9)
    w = MaximumSharpe(risk_free=0.0001).solve(covariance=covariance, mean=mean).weights
    ratio = covariance @ w / (mean - 0.0001)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_equal_correlations_give_equal_weights():
    d = 30
    covariance = 0.04 * (0.6 * np.eye(d) + 0.4)
    for constraints in ([], [LongOnly()], [LongOnly(), MaximumWeight(1 / d)]):
        solved = MinimumVariance(constraints).solve(covariance=covariance)
        np.testing.assert_allclose(solved.weights, 1 / d, atol=1e-8)
        assert solved.volatility == pytest.approx(0.2 * np.sqrt(0.4 + 0.6 / d), rel=1e-8)
        assert np.isnan(solved.expected_return)
    mean = np.full(d, 0.01)
    np.testing.assert_allclose(
        MaximumSharpe([LongOnly()]).solve(covariance=covariance, mean=mean).weights, 1 / d, atol=1e-8
    )


@pytest.mark.parametrize("seed", range(5))
def test_kkt_of_the_bounded_minimum_variance(seed):
    _, covariance = market(25, seed)
    cap = 0.1
    w = MinimumVariance([LongOnly(), MaximumWeight(cap)]).solve(covariance=covariance).weights
    assert w.min() >= 0
    assert w.max() <= cap
    assert w.sum() == pytest.approx(1, abs=1e-12)
    gradient = covariance @ w / (w @ covariance @ w)
    inside = (w > 1e-6) & (w < cap - 1e-6)
    level = gradient[inside].mean()
    np.testing.assert_allclose(gradient[inside], level, rtol=1e-5)
    assert (gradient[w <= 1e-6] >= level * (1 - 1e-5)).all()
    assert (gradient[w >= cap - 1e-6] <= level * (1 + 1e-5)).all()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_long_only_matches_sequential_quadratic_programming(problem):
    mean, covariance = market(8, 3, scale=1.0)
    objective = {
        MinimumVariance: lambda w: w @ covariance @ w,
        MaximumSharpe: lambda w: -sharpe(w, mean, covariance),
        MeanVariance: lambda w: w @ covariance @ w / 2 - mean @ w,
    }[problem]
    twin = minimize(
        objective,
        np.full(8, 1 / 8),
        method="SLSQP",
        bounds=[(0, 0.4)] * 8,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    w = problem(constraints=[LongOnly(), MaximumWeight(0.4)]).solve(covariance=covariance, mean=mean).weights
    np.testing.assert_allclose(w, twin.x, atol=2e-5)
    assert objective(w) <= twin.fun + 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_units_do_not_matter(scale):
    mean, covariance = market(15)
    constraints = [LongOnly(), MaximumWeight(0.2)]
    for problem in (MinimumVariance, MaximumSharpe):
        for given in ([], constraints):
            one = problem(constraints=given).solve(covariance=covariance, mean=mean)
            two = problem(constraints=given).solve(covariance=scale**2 * covariance, mean=scale * mean)
            np.testing.assert_allclose(one.weights, two.weights, atol=1e-7)
            assert two.volatility == pytest.approx(scale * one.volatility, rel=1e-7)
    one = MeanVariance(2.0, constraints).solve(covariance=covariance, mean=mean)
    two = MeanVariance(2.0 / scale, constraints).solve(covariance=scale**2 * covariance, mean=scale * mean)
    np.testing.assert_allclose(one.weights, two.weights, atol=1e-7)


def test_one_asset_in_other_units():
    """Weights in units u_i: the closed form must survive variances that differ by 1e12."""
    _, covariance = market(6)
    u = np.geomspace(1e-6, 1, 6)
    w = MinimumVariance().solve(covariance=covariance * np.outer(u, u)).weights
    exact = np.linalg.solve(covariance, 1 / u) / u
    np.testing.assert_allclose(w, exact / exact.sum(), rtol=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("constraints", [[], [LongOnly(), MaximumWeight(0.3)]])
def test_order_of_assets_does_not_matter(problem, constraints):
    mean, covariance = market(10, 2)
    order = np.random.default_rng(1).permutation(10)
    solver = problem(constraints=constraints)
    one = solver.solve(covariance=covariance, mean=mean).weights
    two = solver.solve(covariance=covariance[np.ix_(order, order)], mean=mean[order]).weights
    np.testing.assert_allclose(two, one[order], atol=1e-7)


def test_turnover_limit():
    mean, covariance = market(10)
    previous = np.random.default_rng(0).dirichlet(np.ones(10))
    for problem in PROBLEMS:
        free = problem(constraints=[LongOnly()]).solve(covariance=covariance, mean=mean).weights
        far = np.abs(free - previous).sum()
        for limit in (0.0, far / 2, 2 * far):
            solver = problem(constraints=[LongOnly(), Turnover(previous, limit)])
            w = solver.solve(covariance=covariance, mean=mean).weights
            assert np.abs(w - previous).sum() == pytest.approx(min(limit, far), abs=1e-6)
        np.testing.assert_allclose(w, free, atol=1e-6)


def test_turnover_matches_names():
    _, covariance = market(3)
    names = ["a", "b", "c"]
    frame = pd.DataFrame(covariance, index=names, columns=names)
    previous = pd.Series({"c": 0.5, "gone": 0.2, "a": 0.3})
    w = MinimumVariance([Turnover(previous, 0.4)]).solve(covariance=frame).weights
    # 0.2 of the limit is the forced sale of "gone"; the other 0.2 buys
    assert (w - pd.Series({"a": 0.3, "b": 0.0, "c": 0.5})).abs().sum() == pytest.approx(0.2, abs=1e-7)
    with pytest.raises(ValueError, match="Turnover"):
        MinimumVariance([Turnover(previous, 0.39)]).solve(covariance=frame)
    with pytest.raises(ValueError, match="named"):
        MinimumVariance([Turnover(previous, 0.4)]).solve(covariance=covariance)


def test_gross_exposure_and_floor():
    mean, covariance = market(20, 4)
    free = MaximumSharpe().solve(covariance=covariance, mean=mean)
    assert np.abs(free.weights).sum() > 1.3
    tight = MaximumSharpe([GrossExposure(1.2)]).solve(covariance=covariance, mean=mean)
    assert np.abs(tight.weights).sum() == pytest.approx(1.2, abs=1e-7)
    floor = MaximumSharpe([MinimumWeight(-0.05)]).solve(covariance=covariance, mean=mean)
    assert floor.weights.min() == pytest.approx(-0.05, abs=1e-9)
    long = MaximumSharpe([GrossExposure(1.0)]).solve(covariance=covariance, mean=mean)
    np.testing.assert_allclose(
        long.weights, MaximumSharpe([LongOnly()]).solve(covariance=covariance, mean=mean).weights, atol=1e-6
    )


@pytest.mark.parametrize("cap", [0.2, 0.5, 1.0])
def test_maximum_sharpe_beats_random_portfolios(cap):
    rng = np.random.default_rng(5)
    mean, covariance = market(8, 6)
    best = MaximumSharpe([LongOnly(), MaximumWeight(cap)]).solve(covariance=covariance, mean=mean).weights
    draws = rng.dirichlet(np.full(8, 4.0), 40_000)
    draws = np.vstack([draws, 0.9 * best + 0.1 * draws[:500]])
    feasible = draws[draws.max(axis=1) <= cap][-2000:]
    assert len(feasible) == 2000
    ratios = feasible @ mean / np.sqrt(np.einsum("ni,ij,nj->n", feasible, covariance, feasible))
    assert sharpe(best, mean, covariance) >= ratios.max() - 1e-12


def test_maximum_sharpe_refuses_the_flipped_portfolio():
    """The formula would hold (-1, 2.5, -0.5) and expect -15 %: the worst portfolio, sold as the best."""
    mean, covariance = np.array([0.02, -0.05, 0.01]), 0.04 * np.eye(3)
    with pytest.raises(ValueError, match=r"got -0\.5.*LongOnly"):
        MaximumSharpe().solve(covariance=covariance, mean=mean)
    w = MaximumSharpe([LongOnly()]).solve(covariance=covariance, mean=mean).weights
    np.testing.assert_allclose(w, [2 / 3, 0, 1 / 3], atol=1e-7)
    with pytest.raises(ValueError, match=r"at best 0\.02 .*negative"):
        MaximumSharpe([LongOnly()], risk_free=0.03).solve(covariance=covariance, mean=mean)
    with pytest.raises(ValueError, match="at best 0 "):
        MaximumSharpe([LongOnly()]).solve(covariance=covariance, mean=np.zeros(3))


def test_only_one_asset_earns():
    mean, covariance = np.array([-0.01, 1e-5, -0.02]), 0.04 * np.eye(3)
    w = MaximumSharpe([LongOnly()]).solve(covariance=covariance, mean=mean).weights
    assert sharpe(w, mean, covariance) == pytest.approx(1e-5 / 0.2, rel=1e-4)


def test_singular_covariances():
    rng = np.random.default_rng(0)
    singular = np.cov(rng.standard_normal((10, 20)), rowvar=False)
    with pytest.raises(ValueError, match=r"invertible.*clip"):
        MinimumVariance().solve(covariance=singular)
    solved = MinimumVariance([LongOnly()]).solve(covariance=singular)
    assert solved.weights.sum() == pytest.approx(1, abs=1e-12)
    cash = np.diag([0.04, 0.0])
    with pytest.raises(ValueError, match="invertible"):
        MinimumVariance().solve(covariance=cash)
    solved = MinimumVariance([LongOnly(), MaximumWeight(0.7)]).solve(covariance=cash)
    np.testing.assert_allclose(solved.weights, [0.3, 0.7], atol=1e-7)


def test_names_are_matched_and_kept():
    mean, covariance = market(4)
    names = ["w", "x", "y", "z"]
    frame, series = pd.DataFrame(covariance, index=names, columns=names), pd.Series(mean, names)
    for constraints in ([], [LongOnly()]):
        solver = MeanVariance(3.0, constraints)
        plain = solver.solve(covariance=covariance, mean=mean).weights
        named = solver.solve(covariance=frame, mean=series[::-1]).weights
        assert list(named.index) == names
        np.testing.assert_allclose(named, plain, atol=1e-9)
        assert list(solver.solve(covariance=covariance, mean=series).weights.index) == names


class Neutral(Constraint):
    """Weights of the first half sum to half: a user's own constraint."""

    def build(self, weights, scale, names=None):
        half = weights.shape[0] // 2
        return [cp.sum(weights[:half]) == scale / 2]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_own_constraints_compose(problem):
    mean, covariance = market(6)
    solved = problem(constraints=[LongOnly(), Neutral()]).solve(covariance=covariance, mean=mean)
    assert solved.weights[:3].sum() == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("constraints", "match"),
    [
        ([LongOnly(), MaximumWeight(0.04)], r"MaximumWeight\(cap=0.04\).*0.8 < 1.*0.05"),
        ([MinimumWeight(0.06)], r"MinimumWeight\(floor=0.06\).*1.2 > 1"),
        ([LongOnly(), MinimumWeight(0.02), MaximumWeight(0.01), GrossExposure(2)], "MaximumWeight"),
        (
            [LongOnly(), MaximumWeight(0.2), Turnover(np.eye(20)[0], 0.5)],
            r"got none: MaximumWeight\(cap=0.2\) and Turnover\(limit=0.5\) cannot hold together",
        ),
        (
            [Turnover(np.full(20, 0.1), 0.5), LongOnly()],
            r"got none: Turnover\(limit=0.5\) cannot hold; relax it",
        ),
    ],
)
def test_infeasible_constraints_are_named(problem, constraints, match):
    mean, covariance = market(20)
    with pytest.raises(ValueError, match=match):
        problem(constraints=constraints).solve(covariance=covariance, mean=mean)


GOOD = np.array([[0.04, 0.01], [0.01, 0.09]])
FRAME = pd.DataFrame(GOOD, index=["a", "b"], columns=["a", "b"])
MEAN = np.array([0.01, 0.02])


@pytest.mark.parametrize(
    ("mean", "covariance", "match"),
    [
        (MEAN[:, None], GOOD, r"\(2, 1\).*broadcast"),
        (pd.DataFrame({"mean": MEAN}), GOOD, "broadcast"),
        (np.float64(0.01), GOOD, r"\(d,\)"),
        (np.ones(3), GOOD, "2 assets"),
        (MEAN, GOOD[:1], r"\(d, d\)"),
        (MEAN, np.empty((0, 0)), r"\(d, d\)"),
        (MEAN, np.array([[0.04, np.nan], [np.nan, 0.09]]), "finite covariance"),
        (np.array([0.01, np.nan]), FRAME, r"finite mean.*'b'"),
        (MEAN, np.array([[0.04, 0.01], [0.02, 0.09]]), "symmetric"),
        (MEAN, np.array([[0.04, 0.1], [0.1, 0.09]]), "semi-definite"),
        (MEAN, np.diag([0.04, -0.01]), "semi-definite"),
        (MEAN, np.zeros((2, 2)), "some variance"),
        (MEAN, FRAME.rename(index={"a": "z"}), "index equals"),
        (pd.Series(MEAN, index=["a", "z"]), FRAME, "same assets"),
        (MEAN, FRAME.set_axis(["a", "a"], axis=0).set_axis(["a", "a"], axis=1), "unique"),
        (None, GOOD, "expected a mean"),
    ],
)
@pytest.mark.parametrize("constraints", [[], [LongOnly()]])
def test_bad_moments_are_refused(mean, covariance, match, constraints):
    with pytest.raises(ValueError, match=match):
        MaximumSharpe(constraints).solve(covariance=covariance, mean=mean)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MaximumWeight(0.0), ValueError, "cap"),
        (lambda: MinimumWeight(np.nan), ValueError, "floor"),
        (lambda: GrossExposure(0.9), ValueError, "gross"),
        (lambda: Turnover(np.ones((2, 1)), 0.1), ValueError, "previous"),
        (lambda: Turnover([0.5, 0.5], -0.1), ValueError, "turnover"),
        (lambda: MeanVariance(0.0), ValueError, "risk aversion"),
        (lambda: MaximumSharpe(risk_free=np.nan), ValueError, "risk-free"),
        (lambda: MinimumVariance(LongOnly()), TypeError, "list of constraints"),
        (lambda: MinimumVariance([LongOnly]), TypeError, "list of constraints"),
        (
            lambda: MinimumVariance([Turnover([1.0], 0.1)]).solve(covariance=GOOD),
            ValueError,
            "previous weights of shape",
        ),
    ],
)
def test_bad_settings_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()

import numpy as np
import pandas as pd
import pytest

from finediff.portfolio import (
    GrossExposure,
    LongOnly,
    MaximumWeight,
    MinimumTrackingError,
    MinimumVariance,
    TransactionCost,
)


def panel(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return (
        0.01 * (rng.standard_normal((n, 1)) + rng.standard_normal((n, d)) * rng.uniform(0.5, 2, d)) + 0.0003
    )


BENCHMARK = np.array([0.3, 0.25, 0.2, 0.15, 0.1, 0.0])


def test_without_constraints_the_benchmark_is_held():
    covariance = np.cov(panel(200, 6), rowvar=False)
    solved = MinimumTrackingError(weights=BENCHMARK).solve(covariance=covariance)
    np.testing.assert_allclose(solved.weights, BENCHMARK, atol=1e-15)
    assert solved.objective == pytest.approx(0, abs=1e-18)
    assert solved.status == "closed form"
    loose = MinimumTrackingError(weights=BENCHMARK, constraints=[GrossExposure(9)]).solve(
        covariance=covariance
    )
    np.testing.assert_allclose(loose.weights, BENCHMARK, atol=1e-7)


def test_a_benchmark_with_cash_meets_the_first_order_conditions():
    covariance = np.cov(panel(200, 6), rowvar=False)
    w = MinimumTrackingError(weights=0.8 * BENCHMARK).solve(covariance=covariance).weights
    assert w.sum() == pytest.approx(1, abs=1e-12)
    gradient = covariance @ (w - 0.8 * BENCHMARK)
    np.testing.assert_allclose(gradient, gradient[0], rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_kkt_of_the_capped_tracker(seed):
    covariance, cap = np.cov(panel(200, 6, seed), rowvar=False), 0.22
    problem = MinimumTrackingError(weights=BENCHMARK, constraints=[LongOnly(), MaximumWeight(cap)])
    solved = problem.solve(covariance=covariance)
    w = solved.weights
    gradient = covariance @ (w - BENCHMARK)
    inside = (w > 1e-6) & (w < cap - 1e-6)
    level, size = gradient[inside].mean(), np.abs(gradient).max()
    np.testing.assert_allclose(gradient[inside], level, atol=1e-5 * size)
    assert (gradient[w >= cap - 1e-6] <= level + 1e-5 * size).all()
    assert (gradient[w <= 1e-6] >= level - 1e-5 * size).all()
    assert solved.objective == pytest.approx((w - BENCHMARK) @ covariance @ (w - BENCHMARK), rel=1e-6)


def test_returns_of_a_held_benchmark_are_its_weights():
    rows = panel(300, 6, 2)
    covariance = np.cov(rows, rowvar=False, ddof=0)
    for constraints in ([], [LongOnly(), MaximumWeight(0.2)]):
        by_weights = MinimumTrackingError(weights=BENCHMARK, constraints=constraints)
        by_returns = MinimumTrackingError(returns=rows @ BENCHMARK, constraints=constraints)
        one, two = by_weights.solve(covariance=covariance), by_returns.solve(scenarios=rows)
        np.testing.assert_allclose(one.weights, two.weights, atol=1e-7)
        assert one.objective == pytest.approx(two.objective, rel=1e-5, abs=1e-16)


def test_the_closed_form_is_constrained_least_squares():
    rows = panel(250, 5, 3)
    target = rows[:, :3].mean(axis=1) + 0.002 * np.random.default_rng(1).standard_normal(250)
    w = MinimumTrackingError(returns=target).solve(scenarios=rows).weights
    # 1'w = 1 by substitution: regress r_b - r_1 on r_i - r_1 with an intercept.
    x = np.column_stack([np.ones(250), rows[:, 1:] - rows[:, :1]])
    rest = np.linalg.lstsq(x, target - rows[:, 0], rcond=None)[0][1:]
    np.testing.assert_allclose(w, np.concatenate([[1 - rest.sum()], rest]), atol=1e-9)


def test_a_constant_benchmark_leaves_minimum_variance():
    rows = panel(250, 5, 4)
    covariance = np.cov(rows, rowvar=False, ddof=0)
    for constraints in ([], [LongOnly()]):
        tracker = MinimumTrackingError(returns=np.full(250, 0.001), constraints=constraints)
        solved = tracker.solve(scenarios=rows)
        least = MinimumVariance(constraints).solve(covariance=covariance)
        np.testing.assert_allclose(solved.weights, least.weights, atol=1e-7)
        assert solved.objective == pytest.approx(least.objective, rel=1e-7)


def test_dates_and_names_are_matched():
    dates, names = pd.date_range("2020-01-01", periods=300), list("abcdef")
    frame = pd.DataFrame(panel(300, 6, 5), dates, names)
    whole = pd.Series(frame.to_numpy() @ BENCHMARK, dates)
    solved = MinimumTrackingError(returns=whole.sample(frac=1, random_state=0)).solve(
        scenarios=frame.iloc[40:200]
    )
    np.testing.assert_allclose(solved.weights[names], BENCHMARK, atol=1e-9)
    by_name = MinimumTrackingError(weights=pd.Series({"b": 0.6, "a": 0.4, "not held": 0.0}))
    w = by_name.solve(covariance=frame.cov()).weights
    np.testing.assert_allclose(w, [0.4, 0.6, 0, 0, 0, 0], atol=1e-15)


def test_costs_against_what_is_held():
    covariance, held = np.cov(panel(200, 6), rowvar=False), np.full(6, 1 / 6)

    def solved(rate):
        problem = MinimumTrackingError(weights=BENCHMARK, constraints=[LongOnly(), TransactionCost(rate)])
        return problem.solve(covariance=covariance, previous=held).weights

    np.testing.assert_allclose(solved(0.0), BENCHMARK, atol=1e-5)
    np.testing.assert_allclose(solved(1.0), held, atol=1e-7)


ROWS = panel(30, 2)
FRAME = pd.DataFrame(ROWS, columns=["a", "b"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MinimumTrackingError(), "both or neither"),
        (lambda: MinimumTrackingError(weights=[1.0], returns=[0.1]), "both or neither"),
        (lambda: MinimumTrackingError(weights=[np.nan, 1.0]), "finite benchmark"),
        (lambda: MinimumTrackingError(weights=[1.0]).solve(covariance=np.eye(2)), r"shape \(2,\)"),
        (
            lambda: MinimumTrackingError(weights=[0.5, 0.5]).solve(scenarios=ROWS),
            "expected a covariance, got None",
        ),
        (
            lambda: MinimumTrackingError(returns=ROWS[:, 0]).solve(covariance=np.eye(2)),
            "expected scenarios, got None",
        ),
        (lambda: MinimumTrackingError(returns=ROWS[:9, 0]).solve(scenarios=ROWS), r"shape \(30,\)"),
        (
            lambda: MinimumTrackingError(returns=FRAME["a"][3:]).solve(scenarios=FRAME),
            r"none for \[0, 1, 2\]",
        ),
        (
            lambda: MinimumTrackingError(weights=pd.Series({"a": 0.5, "z": 0.5})).solve(
                covariance=FRAME.cov()
            ),
            r"none for \['z'\].*track the benchmark's returns",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from finediff.portfolio import (
    GroupLimits,
    LongOnly,
    MaximumWeight,
    MinimumVariance,
    MinimumWeight,
    RiskParity,
    TransactionCost,
    Turnover,
    risk_contributions,
)


def covariance_of(d, seed=0):
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((d, 2)) * 0.5 + 0.5
    return (loadings @ loadings.T + np.diag(rng.uniform(0.2, 3, d))) * 1e-4


def test_closed_forms():
    sd = np.array([0.1, 0.2, 0.4, 0.05])
    w = RiskParity().solve(covariance=np.diag(sd**2)).weights
    np.testing.assert_allclose(w, (1 / sd) / (1 / sd).sum(), rtol=1e-12)
    budgets = np.array([0.4, 0.3, 0.2, 0.1])
    w = RiskParity(budgets).solve(covariance=np.diag(sd**2)).weights
    np.testing.assert_allclose(w, np.sqrt(budgets) / sd / (np.sqrt(budgets) / sd).sum(), rtol=1e-12)
    for correlation in (-0.3, 0.0, 0.9):  # equal correlations do not change equal contributions
        matrix = np.outer(sd, sd) * ((1 - correlation) * np.eye(4) + correlation)
        w = RiskParity().solve(covariance=matrix).weights
        np.testing.assert_allclose(w, (1 / sd) / (1 / sd).sum(), rtol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 10, 80])
@pytest.mark.parametrize("seed", range(3))
def test_contributions_equal_the_budgets(d, seed):
    covariance = covariance_of(d, seed)
    budgets = np.random.default_rng(seed).dirichlet(np.ones(d)) + 1e-3
    for given, want in ((None, np.full(d, 1 / d)), (7 * budgets, budgets / budgets.sum())):
        solved = RiskParity(given).solve(covariance=covariance)
        assert solved.status == "newton"
        assert solved.weights.min() > 0
        assert solved.weights.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(risk_contributions(solved.weights, covariance), want, atol=1e-11)


def test_correlations_that_hedge():
    """A strong negative correlation: the naive fixed point w ~ 1/beta cycles there."""
    covariance = np.array([[1.0, -0.95, 0.1], [-0.95, 1.0, 0.0], [0.1, 0.0, 4.0]])
    w = RiskParity().solve(covariance=covariance).weights
    np.testing.assert_allclose(risk_contributions(w, covariance), 1 / 3, atol=1e-12)


def test_volatility_between_minimum_variance_and_equal_weights():
    """Maillard, Roncalli, Teiletche 2010, section 2.3."""
    for seed in range(20):
        covariance = covariance_of(12, seed)
        low = MinimumVariance([LongOnly()]).solve(covariance=covariance).volatility
        equal = np.sqrt(covariance.sum()) / 12
        assert low <= RiskParity().solve(covariance=covariance).volatility <= equal


def test_equivariance_under_order_and_units_of_assets():
    covariance, units = covariance_of(9), np.geomspace(1e-4, 1e3, 9)
    one = RiskParity().solve(covariance=covariance).weights
    two = RiskParity().solve(covariance=covariance * np.outer(units, units)).weights
    np.testing.assert_allclose(two, one / units / (one / units).sum(), rtol=1e-9)
    order = np.random.default_rng(0).permutation(9)
    two = RiskParity().solve(covariance=covariance[np.ix_(order, order)]).weights
    np.testing.assert_allclose(two, one[order], rtol=1e-10)


def test_the_program_is_newtons_portfolio_where_nothing_binds():
    covariance, budgets = covariance_of(12, 4), np.arange(1.0, 13.0)
    exact = RiskParity(budgets).solve(covariance=covariance)
    loose = RiskParity(budgets, [MaximumWeight(0.9)]).solve(covariance=covariance)
    np.testing.assert_allclose(loose.weights, exact.weights, atol=1e-6)
    assert loose.objective == pytest.approx(exact.objective, abs=1e-10)
    assert RiskParity(budgets, [LongOnly()]).solve(covariance=covariance).status == "newton"


def test_binding_constraints_keep_the_objective_least():
    covariance = covariance_of(6, 1)
    free = RiskParity().solve(covariance=covariance)
    cap = 0.9 * free.weights.max()
    solved = RiskParity(constraints=[MaximumWeight(cap)]).solve(covariance=covariance)
    assert solved.weights.max() == pytest.approx(cap, abs=1e-8)
    assert solved.objective > free.objective

    def objective(w):
        return np.log(w @ covariance @ w) / 2 - np.log(w).mean()

    twin = minimize(
        objective,
        np.full(6, 1 / 6),
        method="SLSQP",
        bounds=[(1e-6, cap)] * 6,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    np.testing.assert_allclose(solved.weights, twin.x, atol=2e-5)
    assert solved.objective == pytest.approx(objective(solved.weights), rel=1e-12)
    held = np.array([0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    still = RiskParity(constraints=[Turnover(limit=0.0)]).solve(covariance=covariance, previous=held)
    np.testing.assert_allclose(still.weights, held, atol=1e-6)


def test_budgets_by_name():
    names = ["a", "b", "c"]
    frame = pd.DataFrame(np.diag([0.01, 0.04, 0.09]), names, names)
    budgets = {"c": 9.0, "gone": 5.0, "a": 1.0, "b": 4.0}
    w = RiskParity(budgets).solve(covariance=frame).weights
    np.testing.assert_allclose(w, 1 / 3, rtol=1e-12)
    shares = risk_contributions(w[::-1], frame)
    np.testing.assert_allclose(shares[["b", "a", "c"]], np.array([4, 1, 9]) / 14, rtol=1e-12)


GOOD = np.array([[0.04, 0.01], [0.01, 0.09]])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RiskParity([0.5, -0.5]), "positive risk budgets"),
        (lambda: RiskParity(np.ones((2, 1))), "positive risk budgets"),
        (lambda: RiskParity(constraints=[TransactionCost(0.1)]), "TransactionCost.*Turnover"),
        (lambda: RiskParity([1.0, 1.0, 1.0]).solve(covariance=GOOD), r"shape \(2,\)"),
        (lambda: RiskParity({"a": 1.0}).solve(covariance=GOOD), "named covariance"),
        (
            lambda: RiskParity({"a": 1.0}).solve(covariance=pd.DataFrame(GOOD, list("ab"), list("ab"))),
            r"budget for every asset, got none for \['b'\]",
        ),
        (
            lambda: RiskParity().solve(covariance=np.diag([0.04, 0.0])),
            "positive variances, got 0 for asset 1",
        ),
        (lambda: RiskParity().solve(covariance=np.array([[1.0, -1.0], [-1.0, 1.0]])), "assets cancel"),
        (lambda: RiskParity().solve(mean=[0.1, 0.2]), "expected a covariance, got None"),
        (
            lambda: RiskParity(constraints=[GroupLimits({"x": [1]}, {"x": (None, 0.0)})]).solve(
                covariance=GOOD
            ),
            "every asset a positive weight",
        ),
        (
            lambda: RiskParity(
                constraints=[MinimumWeight(0.4), MaximumWeight(0.55), Turnover([0.0, 1.0], 0.1)]
            ).solve(covariance=GOOD),
            "cannot hold together",
        ),
        (lambda: risk_contributions([1.0, 1.0, 1.0], GOOD), r"weights \(d,\)"),
        (lambda: risk_contributions([0.0, 0.0], GOOD), "some variance"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()

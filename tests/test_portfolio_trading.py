"""Group limits, turnover and costs from the weights held, and programs that are solved again and again."""

from concurrent.futures import ThreadPoolExecutor

import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, delayed
from scipy.optimize import minimize

from finediff.portfolio import (
    Constraint,
    GrossExposure,
    GroupLimits,
    LongOnly,
    MaximumSharpe,
    MaximumWeight,
    MeanVariance,
    MinimumCVaR,
    MinimumTrackingError,
    MinimumVariance,
    MinimumWeight,
    RiskParity,
    TransactionCost,
    Turnover,
)


def market(d, seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((d, 2)) + 0.5
    covariance = (0.3 * loadings @ loadings.T + np.diag(rng.uniform(0.5, 2, d))) * scale**2
    return (rng.standard_normal(d) * 0.1 + 0.05) * scale, covariance


def scenarios_of(mean, covariance, n=400, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, len(mean)))
    return mean + z @ np.linalg.cholesky(covariance).T


PROBLEMS = {
    "minimum variance": MinimumVariance,
    "mean-variance": lambda constraints: MeanVariance(5.0, constraints),
    "maximum Sharpe": MaximumSharpe,
    "CVaR, programme": lambda constraints: MinimumCVaR(0.1, constraints),
    "CVaR, Newton": lambda constraints: MinimumCVaR(0.1, constraints, method="newton"),
    "risk parity": lambda constraints: RiskParity(constraints=constraints),
    "tracking": lambda constraints: MinimumTrackingError(
        weights=np.arange(1, 9) / 36, constraints=constraints
    ),
}
every_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
PAYING = {name: make for name, make in PROBLEMS.items() if name != "risk parity"}
paying = pytest.mark.parametrize("make", PAYING.values(), ids=PAYING)


def inputs(seed=0, d=8):
    mean, covariance = market(d, seed)
    mean = np.abs(mean)
    return {"covariance": covariance, "mean": mean, "scenarios": scenarios_of(mean, covariance, seed=seed)}


# ------------------------------------------------------------------ groups


@every_problem
def test_group_limits_bind(make):
    given = inputs()
    base = [LongOnly(), MaximumWeight(0.9)]
    free = make(base).solve(**given).weights
    groups = {"first": [0, 1, 2], "second": [3, 4]}
    first, second = free[:3].sum(), free[3:5].sum()
    w = make([*base, GroupLimits(groups, {"first": (None, 0.5 * first)})]).solve(**given).weights
    assert w[:3].sum() == pytest.approx(0.5 * first, abs=2e-4)
    w = make([*base, GroupLimits(groups, {"second": (0.5 * second + 0.5, None)})]).solve(**given).weights
    assert w[3:5].sum() == pytest.approx(0.5 * second + 0.5, abs=2e-4)
    loose = (
        make([*base, GroupLimits(groups, {"first": (-1, 2), "second": (None, 1.5)})]).solve(**given).weights
    )
    np.testing.assert_allclose(loose, free, atol=0.02 if make is PROBLEMS["CVaR, Newton"] else 1e-5)


def test_groups_by_name_and_as_series():
    _, covariance = market(5)
    frame = pd.DataFrame(covariance, list("abcde"), list("abcde"))
    by_list = GroupLimits({"x": ["a", "b", "gone"], "y": ["d"]}, {"x": (0.7, 0.8), "y": (None, 0.01)})
    sectors = pd.Series({"b": "x", "d": "y", "a": "x", "gone": "x", "c": "z"})
    by_series = GroupLimits(sectors, {"x": (0.7, 0.8), "y": (None, 0.01)})
    one = MinimumVariance([LongOnly(), by_list]).solve(covariance=frame).weights
    two = MinimumVariance([LongOnly(), by_series]).solve(covariance=frame).weights
    np.testing.assert_allclose(one, two, atol=1e-9)
    assert one[["a", "b"]].sum() >= 0.7 - 1e-8
    assert one["d"] <= 0.01 + 1e-8


def test_the_guilty_group_is_named():
    _, covariance = market(6)
    groups = GroupLimits(
        {"bonds": [0, 1], "stocks": [2, 3], "rest": [4, 5]},
        {"bonds": (0.6, 0.9), "stocks": (0.5, 0.7), "rest": (None, 0.3)},
    )
    with pytest.raises(
        ValueError, match=r"got none: LongOnly\(\) and GroupLimits\(bonds in \[0.6, 0.9\]\) and Group"
    ) as told:
        MinimumVariance([LongOnly(), MaximumWeight(0.9), groups]).solve(covariance=covariance)
    assert "stocks" in str(told.value)
    assert "rest" not in str(told.value)
    assert "MaximumWeight" not in str(told.value)


# ------------------------------------------------------------------ turnover and costs


@every_problem
def test_turnover_from_what_is_held(make):
    given = inputs(1)
    held = np.random.default_rng(0).dirichlet(np.ones(8))
    free = make([LongOnly()]).solve(**given).weights
    limit = np.abs(free - held).sum() / 2
    w = make([LongOnly(), Turnover(limit=limit)]).solve(**given, previous=held).weights
    assert np.abs(w - held).sum() == pytest.approx(limit, abs=2e-4)
    own = make([LongOnly(), Turnover(held, limit)]).solve(**given, previous=np.ones(8)).weights
    np.testing.assert_allclose(own, w, atol=1e-9)
    with pytest.raises(ValueError, match=r"expected previous weights, got None.*Turnover\(limit"):
        make([LongOnly(), Turnover(limit=limit)]).solve(**given)


@paying
def test_costs_from_nothing_to_everything(make):
    given = inputs(2)
    held = np.random.default_rng(1).dirichlet(np.ones(8))

    def solved(*costs):
        return make([LongOnly(), *costs]).solve(**given, previous=held)

    free, nothing = solved(), solved(TransactionCost(0.0))
    assert nothing.objective == pytest.approx(free.objective, rel=2e-4)
    np.testing.assert_allclose(nothing.weights, free.weights, atol=0.02 if free.status == "newton" else 1e-5)
    np.testing.assert_allclose(solved(TransactionCost(1.0)).weights, held, atol=1e-5)
    rates = np.where(np.arange(8) < 4, 0.0, 1.0)
    half = solved(TransactionCost(rates)).weights
    np.testing.assert_allclose(half[4:], held[4:], atol=1e-5)
    assert np.abs(half[:4] - held[:4]).max() > 1e-3


def test_mean_variance_pays_by_the_first_order_conditions():
    """Traded assets: mu - gamma Sigma w - eta = +-c; the others lie between."""
    mean, covariance = market(10, 3)
    held, cost, gamma = np.full(10, 0.1), 2e-4, 4.0
    solved = MeanVariance(gamma, [TransactionCost(cost)]).solve(
        covariance=covariance, mean=mean, previous=held
    )
    w = solved.weights
    slope = mean - gamma * covariance @ w
    bought, sold = w > held + 1e-5, w < held - 1e-5
    assert bought.any()
    assert sold.any()
    eta = slope[bought].mean() - cost
    np.testing.assert_allclose(slope[bought], eta + cost, atol=1e-8)
    np.testing.assert_allclose(slope[sold], eta - cost, atol=1e-8)
    assert (np.abs(slope - eta) <= cost + 1e-8).all()
    paid = cost * np.abs(w - held).sum()
    assert solved.objective == pytest.approx(mean @ w - gamma / 2 * w @ covariance @ w - paid, rel=1e-12)


def test_maximum_sharpe_net_of_costs_is_the_best_ratio():
    mean, covariance = market(6, 5)
    mean, held, cost = np.abs(mean), np.full(6, 1 / 6), 3e-4
    solved = MaximumSharpe([LongOnly(), TransactionCost(cost)]).solve(
        covariance=covariance, mean=mean, previous=held
    )

    def negative(parts):  # bought and sold apart, so that the twin's problem is smooth
        w = held + parts[:6] - parts[6:]
        return -(mean @ w - cost * parts.sum()) / np.sqrt(w @ covariance @ w)

    twin = minimize(
        negative,
        np.full(12, 1e-3),
        method="SLSQP",
        bounds=[(0, 1)] * 6 + [(0, 1 / 6)] * 6,
        constraints={"type": "eq", "fun": lambda p: p[:6].sum() - p[6:].sum()},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert solved.objective == pytest.approx(-twin.fun, rel=1e-6)
    with pytest.raises(ValueError, match="return above the risk-free"):
        MaximumSharpe([LongOnly(), TransactionCost(9.0)]).solve(
            covariance=covariance, mean=mean, previous=np.zeros(6)
        )


def test_a_ratio_that_no_portfolio_attains_is_refused():
    """Without the constraint the formula is refused; here it does not stop the long and short positions."""
    mean, covariance = np.array([0.02, -0.05, 0.01]), 0.04 * np.eye(3)
    groups = GroupLimits({"a": [0]}, {"a": (None, 0.5)})
    with pytest.raises(ValueError, match=r"highest ratio that some portfolio attains.*GrossExposure"):
        MaximumSharpe([groups]).solve(covariance=covariance, mean=mean)
    w = MaximumSharpe([groups, GrossExposure(3.0)]).solve(covariance=covariance, mean=mean).weights
    assert np.abs(w).sum() == pytest.approx(3.0, abs=1e-6)


def test_costs_match_names_and_count_forced_sales():
    _, covariance = market(3)
    names = ["a", "b", "c"]
    frame = pd.DataFrame(covariance, names, names)
    held = pd.Series({"c": 0.5, "gone": 0.2, "a": 0.3})
    rates = pd.Series({"gone": 5.0, "a": 1.0, "b": 1.0, "c": 1.0})
    solved = MinimumVariance([LongOnly(), TransactionCost(rates)]).solve(covariance=frame, previous=held)
    w = solved.weights  # what "gone" brings must be bought somewhere
    assert w["a"] >= 0.3 - 1e-7
    assert w["c"] >= 0.5 - 1e-7
    assert solved.objective == pytest.approx(w @ covariance @ w + 0.2 + 5.0 * 0.2, rel=1e-7)
    with pytest.raises(ValueError, match=r"rate for every asset held, got none for \['gone'\]"):
        MinimumVariance([LongOnly(), TransactionCost(rates.drop("gone"))]).solve(
            covariance=frame, previous=held
        )


# ------------------------------------------------------------------ solved again


@every_problem
def test_solving_again_is_solving_afresh(make, monkeypatch):
    """Whatever a compiled program solved before, its next answer is a new program's, to the last bit."""
    from finediff.portfolio import program

    constraints = [
        LongOnly() if make is PROBLEMS["CVaR, Newton"] else Hidden(),
        MaximumWeight(0.4),
        Turnover(limit=0.9),
    ]
    if make is not PROBLEMS["risk parity"]:
        constraints.append(TransactionCost(1e-5))
    rng = np.random.default_rng(3)
    days = [(inputs(seed), rng.dirichlet(np.ones(8))) for seed in range(4)]
    problem = make(constraints)
    again = [problem.solve(**given, previous=held) for given, held in days]
    for (given, held), one in zip(days, again):
        monkeypatch.setattr(program, "_shelf", program._Shelf(0, 0))
        fresh = problem.solve(**given, previous=held)
        np.testing.assert_array_equal(one.weights, fresh.weights)
        assert one.objective == fresh.objective


class Hidden(LongOnly):
    """Long only, its rows unknown: goes through the compiled program."""

    def rows(self, n_assets, names=None):
        return None


@pytest.mark.parametrize("name", [name for name in PAYING if name != "CVaR, Newton"])
def test_the_compiled_program_and_the_rows_are_one_problem(name):
    make = PROBLEMS[name]
    groups = GroupLimits({"x": [0, 1], "y": [2, 3]}, {"x": (0.2, 0.6), "y": (None, 0.3)})
    for rate, seed in ((0.0, 3), (1e-4, 4), (1e-4, 5)):
        given = inputs(seed) | {"previous": np.random.default_rng(seed).dirichlet(np.ones(8))}
        more = [MaximumWeight(0.4), Turnover(limit=1.2), GrossExposure(2), groups, TransactionCost(rate)]
        one, two = (make([first, *more]).solve(**given) for first in (LongOnly(), Hidden()))
        np.testing.assert_allclose(one.weights, two.weights, atol=2e-5)
        assert one.objective == pytest.approx(two.objective, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_compiled_minimum_variance_is_the_plain_quadratic_program(seed):
    _, covariance = market(15, seed)
    w = cp.Variable(15)
    plain = cp.Problem(
        cp.Minimize(cp.quad_form(w, cp.psd_wrap(1e4 * covariance))),
        [cp.sum(w) == 1, cp.norm1(w) <= 1.3, w <= 0.2],
    )
    plain.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    solved = MinimumVariance([GrossExposure(1.3), MaximumWeight(0.2)]).solve(covariance=covariance)
    np.testing.assert_allclose(solved.weights, w.value, atol=1e-6)


class Pair(Constraint):
    """The named pair has equal weights: depends on names and on its own setting."""

    def __init__(self, one, two):
        self.pair = [one, two]

    def build(self, weights, scale, names=None):
        i, j = names.get_indexer(self.pair)
        return [weights[i] == weights[j]]


def test_programs_of_other_names_sizes_and_settings_are_kept_apart():
    _, covariance = market(5, 7)
    frame = pd.DataFrame(covariance, list("abcde"), list("abcde"))
    for names in (list("abcde"), list("edcba"), list("bdace"), list("abce")):
        part = frame.loc[names, names]
        for constraint, pair in ((Pair("a", "e"), ("a", "e")), (Pair("b", "c"), ("b", "c"))):
            w = MinimumVariance([LongOnly(), constraint]).solve(covariance=part).weights
            assert w[pair[0]] == pytest.approx(w[pair[1]], abs=1e-7)
    for cap in (0.21, 0.25, 0.21):
        assert MinimumVariance([MaximumWeight(cap)]).solve(covariance=frame).weights.max() == pytest.approx(
            cap
        )


def test_few_programs_are_kept(monkeypatch):
    from finediff.portfolio import program

    shelf = program._Shelf(3, 1000)
    monkeypatch.setattr(program, "_shelf", shelf)
    covariance, rows = market(5)[1], scenarios_of(*market(5), n=300)
    for cap in np.linspace(0.3, 0.6, 6):
        MinimumVariance([Hidden(), MaximumWeight(cap)]).solve(covariance=covariance)
        assert len(shelf) <= 3
    MinimumCVaR(0.1, [LongOnly()]).solve(scenarios=rows)
    assert len(shelf) == 1  # alone it holds 1,500 numbers


def test_threads_and_processes_share_no_numbers():
    problem = MinimumVariance([LongOnly(), Turnover(limit=0.8)])
    days = [{"covariance": market(6, seed)[1], "previous": np.eye(6)[seed % 6]} for seed in range(24)]
    want = [problem.solve(**day).weights for day in days]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda day: problem.solve(**day).weights, days))
    np.testing.assert_array_equal(got, want)
    got = Parallel(n_jobs=2)(delayed(problem.solve)(**day) for day in days[:4])
    np.testing.assert_array_equal([g.weights for g in got], want[:4])


# ------------------------------------------------------------------ bad input

GOOD = np.array([[0.04, 0.01], [0.01, 0.09]])
FRAME = pd.DataFrame(GOOD, index=["a", "b"], columns=["a", "b"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GroupLimits({"x": [0]}, {"y": (0, 1)}), "groups among .*'x'.*'y'"),
        (lambda: GroupLimits({"x": [0]}, {"x": (1, 0)}), "low <= high"),
        (lambda: GroupLimits({"x": [0]}, {"x": 0.5}), r"\(low, high\) for group 'x'"),
        (lambda: GroupLimits({"x": "ab"}, {"x": (0, 1)}), "members of group 'x'"),
        (lambda: GroupLimits(["x"], {"x": (0, 1)}), "mappings"),
        (
            lambda: MinimumVariance([GroupLimits({"x": [2]}, {"x": (0, 1)})]).solve(covariance=GOOD),
            "positions 0 to 1, got 2",
        ),
        (
            lambda: MinimumVariance([GroupLimits({"x": ["a"]}, {"x": (0, 1)})]).solve(covariance=GOOD),
            "assets have no names",
        ),
        (
            lambda: MinimumVariance([GroupLimits({"x": ["A"]}, {"x": (0, 1)})]).solve(covariance=FRAME),
            r"none of \['A'\].*check the names",
        ),
        (lambda: Turnover([0.5, 0.5]), r"turnover limit.*limit="),
        (lambda: TransactionCost(-0.1), "cost rate"),
        (lambda: TransactionCost(np.nan), "cost rate"),
        (
            lambda: MinimumVariance([TransactionCost([0.1, 0.1, 0.1])]).solve(
                covariance=GOOD, previous=[1, 0]
            ),
            r"cost rates of shape \(2,\)",
        ),
        (
            lambda: MinimumVariance([TransactionCost(pd.Series({"a": 0.1}))]).solve(
                covariance=FRAME, previous=[1, 0]
            ),
            r"every asset, got none for \['b'\]",
        ),
        (
            lambda: MinimumVariance([TransactionCost(0.1)]).solve(covariance=GOOD),
            "expected previous weights, got None",
        ),
        (
            lambda: MinimumVariance([Turnover(limit=0.1)]).solve(covariance=GOOD, previous=[1, 0, 0]),
            r"previous weights of shape \(2,\)",
        ),
        (
            lambda: MinimumVariance([Turnover(limit=0.1)]).solve(
                covariance=GOOD, previous=pd.Series({"a": 1.0})
            ),
            "named",
        ),
        (lambda: MinimumVariance().solve(mean=[0.1, 0.2]), "expected a covariance, got None"),
        (
            lambda: MinimumVariance([MinimumWeight(0.4), Turnover(limit=0.1)]).solve(
                covariance=GOOD, previous=[1.0, 0.0]
            ),
            r"got none: MinimumWeight\(floor=0.4\) and Turnover\(limit=0.1\) cannot hold together",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()

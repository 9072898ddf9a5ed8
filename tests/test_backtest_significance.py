"""Tests of differences: influence functions by perturbation, HAC against statsmodels, coverage, and noise."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import binom
from sklearn.covariance import LedoitWolf

from finediff.backtest import (
    Strategy,
    compare,
    influence,
    long_run_covariance,
    sharpe_interval,
    walk_forward,
)
from finediff.backtest.significance import default_lags
from finediff.covariance import QuadraticInverseShrinkage, WindowEnsembleCovariance
from finediff.generators import BootstrapGenerator
from finediff.portfolio import LongOnly, MaximumSharpe, MeanVariance, MinimumCVaR, MinimumVariance
from finediff.risk import annual_volatility, drawdown, expected_shortfall, sharpe_ratio, turnover, var


def series(n=600, k=3, seed=0, rho=0.0):
    rng = np.random.default_rng(seed)
    shocks = rng.standard_t(6, (n, k)) + rng.standard_normal((n, 1))
    for t in range(1, n):
        shocks[t] += rho * shocks[t - 1]
    return pd.DataFrame(0.01 * shocks + 5e-4, columns=list("abcdefgh")[:k])


STATISTIC = {
    "mean": lambda x, w: w @ x,
    "volatility": lambda x, w: np.log(w @ (x - w @ x) ** 2),
    "Sharpe": lambda x, w: w @ x / np.sqrt(w @ (x - w @ x) ** 2),
}


@pytest.mark.parametrize("measure", STATISTIC)
def test_influence_is_the_derivative_in_the_weight_of_a_day(measure):
    x = series(200, 1)["a"].to_numpy()
    value, psi = influence(x, measure)
    statistic, n = STATISTIC[measure], len(x)
    even = np.full(n, 1 / n)
    assert value[0] == pytest.approx(statistic(x, even))
    for day in (0, 17, 199):
        towards = np.eye(n)[day]
        step = 1e-6
        slope = (
            statistic(x, (1 - step) * even + step * towards)
            - statistic(x, (1 + step) * even - step * towards)
        ) / (2 * step)
        assert psi[day, 0] == pytest.approx(slope, rel=1e-5)


def test_influence_of_cvar():
    x = series(400, 2)
    value, psi = influence(x, "CVaR", 0.05)
    np.testing.assert_allclose(value, expected_shortfall(x, 0.05), rtol=1e-12)
    np.testing.assert_allclose(psi.mean(axis=0), 0, atol=1e-15)
    # Its standard deviation over sqrt(n) is the textbook error, for independent days.
    q = -var(x, 0.05).to_numpy()
    excess = np.maximum(q - x.to_numpy(), 0)
    np.testing.assert_allclose(psi.std(axis=0), excess.std(axis=0) / 0.05, rtol=1e-12)


@pytest.mark.parametrize("lags", [0, 5, 42])
def test_standard_errors_are_those_of_statsmodels(lags):
    x = series(rho=0.3)
    table = compare(x, "c", lags=lags)
    for name in "ab":
        for shown, measure in (("return", "mean"), ("volatility", "volatility"), ("CVaR", "CVaR")):
            value, psi = influence(x[[name, "c"]], measure)
            d = psi[:, 0] - psi[:, 1] + value[0] - value[1]
            fit = sm.OLS(d, np.ones(len(d))).fit(
                cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": False}
            )
            assert table.loc[name, (shown, "t")] == pytest.approx(fit.tvalues[0], rel=1e-9)
            assert table.loc[name, (shown, "p")] == pytest.approx(fit.pvalues[0], rel=1e-9, abs=1e-300)
    psi = influence(x, "mean")[1]
    covariance = long_run_covariance(psi, lags)
    np.testing.assert_allclose(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance)[0] > -1e-15
    d = psi[:, 0] - psi[:, 2]
    error = np.sqrt(np.array([1, 0, -1]) @ covariance @ np.array([1, 0, -1]) / len(d))
    assert table.loc["a", ("return", "difference")] / 252 / error == pytest.approx(
        table.loc["a", ("return", "t")]
    )


def test_differences_are_those_of_the_measures():
    x = series()
    table = compare(x, "b", level=0.1)
    a, b = x["a"], x["b"]
    assert table.loc["a", ("return", "difference")] == pytest.approx(252 * (a.mean() - b.mean()))
    ratio = a.std() / b.std()
    assert table.loc["a", ("volatility", "difference")] == pytest.approx(100 * (ratio - 1))
    ratio = expected_shortfall(a, 0.1) / expected_shortfall(b, 0.1)
    assert table.loc["a", ("CVaR", "difference")] == pytest.approx(100 * (ratio - 1))
    n = len(x)
    gap = (sharpe_ratio(a) - sharpe_ratio(b)) * np.sqrt(n / (n - 1))
    assert table.loc["a", ("Sharpe", "difference")] == pytest.approx(gap)


def test_comparisons_are_antisymmetric_and_free_of_scale():
    x = series(k=2)
    forth, back = compare(x, "b").loc["a"], compare(x, "a").loc["b"]
    tests = [(m, "t") for m in ("return", "volatility", "Sharpe", "CVaR")]
    np.testing.assert_allclose(forth[tests], -back[tests], rtol=1e-9)
    scaled = compare(7 * x, "b").loc["a"]
    np.testing.assert_allclose(forth[tests], scaled[tests], rtol=1e-9)


def test_a_twin_has_no_t():
    x = series(k=2).assign(c=lambda f: f["a"])
    row = compare(x, "a").loc["c"]
    assert row[("volatility", "difference")] == 0
    assert np.isnan(row[("volatility", "t")])


def test_lags_cover_the_holding_period():
    assert default_lags(7000) == 10
    assert default_lags(7000, 21) == 42
    assert default_lags(30, 63) == 29


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_null_differences_are_rejected_as_often_as_said(rho):
    """Two strategies of one law: at 5 % the share of |t| > 1.96 lies within 3.5 standard errors of .05 (+ .02 for HAC)."""
    hits, trials = np.zeros(4), 400
    for seed in range(trials):
        row = compare(series(500, 2, seed, rho), "b", lags=12).iloc[0]
        hits += [abs(row[(m, "t")]) > 1.96 for m in ("return", "volatility", "Sharpe", "CVaR")]
    rate = hits / trials
    error = np.sqrt(0.05 * 0.95 / trials)
    assert (rate > 0.05 - 3.5 * error).all(), rate
    assert (rate < 0.07 + 3.5 * error).all(), rate


def test_sharpe_intervals_cover_the_truth_as_often_as_said():
    trials, n, daily = 400, 750, 0.06
    rng = np.random.default_rng(5)
    table = sharpe_interval(rng.standard_normal((n, trials)) + daily, lags=10)
    truth = daily * np.sqrt(252)
    covered = int(((table["low"] <= truth) & (truth <= table["high"])).sum())
    # 95 %, less a point for ten lags on 750 days.
    low, high = binom.ppf([0.001, 0.999], trials, [0.94, 0.95])
    assert low <= covered <= high, covered


def test_a_real_difference_is_found():
    x = series(2000, 2)
    x["b"] *= 1.1
    row = compare(x, "b", lags=42).loc["a"]
    assert row[("volatility", "t")] < -3
    assert row[("volatility", "difference")] == pytest.approx(-9, abs=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: compare(x, "z"), "expected a reference among"),
        (lambda x: compare(x[["a"]], "a"), "expected a strategy beside 'a'"),
        (lambda x: compare(x.mask(x > 0.01), "a"), "finite returns"),
        (lambda x: compare(x, "a", level=1e-4), "at least one day in its tail"),
        (lambda x: influence(x, "alpha"), "expected a measure among"),
        (lambda x: influence(0 * x, "Sharpe"), "constant"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(series())


# ------------------------------------------------------------------ whole back-tests


def noise_strategies():
    newton = MinimumCVaR(constraints=[LongOnly()], method="newton")
    long = [LongOnly()]
    return {
        "1/N": None,
        "sample": "history",
        "shrunk": LedoitWolf(),
        "ensemble": WindowEnsembleCovariance((63, 126)),
        "QIS 63": Strategy(QuadraticInverseShrinkage(), window=63),
        "long only": (LedoitWolf(), MinimumVariance(long)),
        "tangency": (LedoitWolf(), MaximumSharpe(long, risk_free=-0.01)),
        "mean-variance": (LedoitWolf(), MeanVariance(10.0, long)),
        "cvar": Strategy(BootstrapGenerator(), newton, n_scenarios=200),
    }


def test_noise_earns_nothing():
    """On panels of mean zero each strategy's 95 % interval contains 0 about 95 times in 100, on the first all do.

    Long portfolios of one panel share its luck, so that not every panel has an interval with 0 for every strategy:
    the share of panels is what is promised. The few decisions of a panel cost the interval some of its width, hence
    at least 90 in 100, less sampling error.
    """
    panels, inside = 24, 0
    for seed in range(panels):
        rng = np.random.default_rng(seed)
        x = pd.DataFrame(0.01 * rng.standard_normal((950, 6)), columns=list("abcdef"))
        result = walk_forward(x, noise_strategies(), window=200, step=150)
        table = result.summary(lags=10)
        contains = (table["Sharpe low"] < 0) & (table["Sharpe high"] > 0)
        if seed == 0:
            assert contains.all(), table
            assert (result.compare("1/N")[("return", "t")].abs() < 3).all()
        inside = inside + contains
    assert (inside >= binom.ppf(0.001, panels, 0.9)).all(), inside
    assert table["Sharpe"].notna().all()


def test_looking_ahead_would_be_seen():
    """The null has power: the same tangency portfolio fitted on the days it is held earns a fortune."""
    rng = np.random.default_rng(0)
    x = 0.01 * rng.standard_normal((1048, 8))
    earned = np.concatenate([x[s : s + 42] @ x[s : s + 42].mean(axis=0) for s in range(0, 1048, 42)])
    assert sharpe_interval(earned)["low"].iloc[0] > 3


def test_the_summary_is_made_of_its_parts():
    rng = np.random.default_rng(3)
    x = pd.DataFrame(0.01 * rng.standard_normal((400, 4)) + 3e-4, columns=list("abcd"))
    result = walk_forward(x, {"1/N": None, "sample": "history"}, window=100, step=30, costs=0.002)
    table, r = result.summary(level=0.1), result.returns
    assert list(table.index) == ["1/N", "sample"]
    row = table.loc["sample"]
    assert row["annual volatility"] == pytest.approx(annual_volatility(r["sample"]))
    assert row["annual return"] == pytest.approx(252 * r["sample"].mean())
    assert row["Sharpe"] == pytest.approx(sharpe_ratio(r["sample"]), rel=0.01)
    assert row["Sharpe low"] < row["Sharpe"] < row["Sharpe high"]
    assert row["VaR"] == var(r["sample"], 0.1)
    assert row["ES"] == pytest.approx(expected_shortfall(r["sample"], 0.1))
    assert row["max drawdown"] == drawdown(r["sample"])
    assert row["windows"] == len(result.windows) == 10
    assert row["annual costs"] == pytest.approx(result.costs["sample"].sum() * 252 / 300)
    weights = result.weights.loc["sample"]
    assert row["gross exposure"] == pytest.approx(weights.abs().sum(axis=1).mean())
    assert table.loc["1/N", "gross exposure"] == pytest.approx(1)
    growth = (1 + x.iloc[100:130]).prod() * weights.iloc[0]
    second = turnover(growth / growth.sum(), weights.iloc[1])
    assert result.turnover["sample"].iloc[1] == pytest.approx(second)
    assert row["turnover"] == pytest.approx(result.turnover["sample"].iloc[1:].mean())
    pd.testing.assert_frame_equal(result.compare("1/N"), compare(r, "1/N", holding=30))

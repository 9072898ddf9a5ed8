"""Walk-forward: when decisions are made, what is held, what it costs, and that nothing looks ahead."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from finediff.backtest import Strategy, Window, hold, schedule, walk_forward
from finediff.covariance import (
    QuadraticInverseShrinkage,
    ScenarioCovariance,
    StudentTCovariance,
    WindowEnsembleCovariance,
)
from finediff.generators import (
    BootstrapGenerator,
    FactorDiffusionGenerator,
    GaussianGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.portfolio import (
    GrossExposure,
    LongOnly,
    MinimumCVaR,
    MinimumVariance,
    RiskParity,
    TransactionCost,
    Turnover,
)

LONG = MinimumVariance([LongOnly()])


def panel(n=260, d=5, seed=0):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((n, 1)) + rng.standard_normal((n, d))) * np.linspace(0.005, 0.02, d)
    return pd.DataFrame(rows, pd.bdate_range("2001-01-01", periods=n), [f"a{i}" for i in range(d)])


# ------------------------------------------------------------------ windows


def test_windows_by_counts():
    index = pd.RangeIndex(100)
    assert schedule(index, 40, 25) == [Window(0, 40, 65), Window(25, 65, 90), Window(50, 90, 100)]
    growing = schedule(index, 40, 25, minimum=20)
    assert growing == [Window(0, 20, 45), Window(5, 45, 70), Window(30, 70, 95), Window(55, 95, 100)]


def test_windows_by_dates():
    index = pd.bdate_range("2001-01-01", periods=300)  # a Monday
    dates = pd.DatetimeIndex(["2001-07-01", "2001-09-28"])  # a Sunday: Friday's rows are the last
    first, second = schedule(index, 100, dates)
    assert index[first.stop - 1] == pd.Timestamp("2001-06-29")
    assert index[first.stop] == pd.Timestamp("2001-07-02")
    assert index[second.stop - 1] == pd.Timestamp("2001-09-28")
    assert (first.stop - first.start, first.end, second.end) == (100, second.stop, 300)


def test_windows_by_calendar_and_offset():
    index = pd.bdate_range("2001-01-01", "2003-12-31")
    windows = schedule(index, pd.DateOffset(years=1), "ME")
    decided = index[[w.stop - 1 for w in windows]]
    assert decided[0] == pd.Timestamp("2002-01-31")
    assert list(decided.month) == [*range(1, 13), *range(1, 12)]  # after the last day nothing is held
    for w in windows:
        last = index[w.stop - 1]
        assert index[w.start] > last - pd.DateOffset(years=1) >= index[max(w.start - 1, 0)]
    days = schedule(index, "30D", 21)
    assert all((index[w.stop - 1] - index[w.start]).days < 30 for w in days)


def test_every_row_after_the_first_decision_is_held_once():
    index = pd.bdate_range("2001-01-01", periods=333)
    for step in (21, "ME", pd.bdate_range("2001-09-03", periods=6, freq="11B")):
        windows = schedule(index, 120, step)
        held = np.concatenate([np.arange(w.stop, w.end) for w in windows])
        np.testing.assert_array_equal(held, np.arange(windows[0].stop, 333))


# ------------------------------------------------------------------ holding


def test_drift_by_hand():
    returns, drifted = hold(np.array([0.6, 0.4]), np.array([[0.10, -0.10], [0.00, 0.20]]))
    # wealth: .66 + .36 = 1.02, then .66 + .432 = 1.092
    np.testing.assert_allclose(returns, [0.02, 1.092 / 1.02 - 1], rtol=1e-14)
    np.testing.assert_allclose(drifted, [0.66 / 1.092, 0.432 / 1.092], rtol=1e-14)


def test_short_positions_drift_by_hand():
    returns, drifted = hold(np.array([1.5, -0.5]), np.array([[0.10, 0.20]]))
    assert returns == pytest.approx(1.65 - 0.60 - 1)
    np.testing.assert_allclose(drifted, [1.65 / 1.05, -0.60 / 1.05])


def test_a_delisted_asset_becomes_cash():
    rows = np.array([[0.10, 0.0], [np.nan, 0.5], [np.nan, 0.0]])
    returns, drifted = hold(np.array([0.5, 0.5]), rows)
    # .55 in cash from the second row on; the other half grows to .75
    np.testing.assert_allclose(returns, [0.05, 1.30 / 1.05 - 1, 0.0], atol=1e-15)
    np.testing.assert_allclose(drifted, [0.0, 0.75 / 1.30])
    returns, drifted = hold(np.array([0.5, 0.5]), rows, delisting_return=-0.4)
    np.testing.assert_allclose(returns, [0.05, (0.55 * 0.6 + 0.75) / 1.05 - 1, 0.0], atol=1e-15)
    np.testing.assert_allclose(drifted, [0.0, 0.75 / 1.08])


def test_a_gap_is_no_delisting():
    rows = np.array([[np.nan, 0.0], [0.10, 0.0]])
    returns, drifted = hold(np.array([0.5, 0.5]), rows, delisting_return=-0.9)
    np.testing.assert_allclose(returns, [0.0, 0.05])
    np.testing.assert_allclose(drifted, [0.55 / 1.05, 0.5 / 1.05])


def test_an_asset_that_never_returns_pays_the_delisting_on_the_first_row():
    returns, _ = hold(np.array([0.5, 0.5]), np.array([[np.nan, 0.0]] * 3), delisting_return=-0.2)
    np.testing.assert_allclose(returns, [-0.1, 0.0, 0.0], atol=1e-15)


def test_costs_by_hand():
    x = panel(30, 2)
    free = walk_forward(x, {"1/N": None}, window=10, step=10)
    paid = walk_forward(x, {"1/N": None}, window=10, step=10, costs=0.01)
    assert paid.costs["1/N"].iloc[0] == pytest.approx(0.01)  # from cash
    growth = (1 + x.iloc[10:20]).prod().to_numpy()
    drifted = growth / growth.sum()
    traded = np.abs(drifted - 0.5).sum()
    assert paid.turnover["1/N"].iloc[1] == pytest.approx(traded, rel=1e-12)
    assert paid.costs["1/N"].iloc[1] == pytest.approx(0.01 * traded, rel=1e-12)
    ratio = (1 + paid.returns["1/N"]) / (1 + free.returns["1/N"])
    expected = np.ones(20)
    expected[0], expected[10] = 0.99, 1 - 0.01 * traded
    np.testing.assert_allclose(ratio, expected, rtol=1e-12)
    rates = pd.Series({"a1": 0.0, "a0": 0.02})
    by_asset = walk_forward(x, {"1/N": None}, window=10, step=10, costs=rates)
    assert by_asset.costs["1/N"].iloc[1] == pytest.approx(0.02 * traded / 2, rel=1e-12)
    started = walk_forward(x, {"1/N": None}, window=10, step=10, costs=0.01, initial="equal")
    assert started.turnover["1/N"].iloc[0] == 0


# ------------------------------------------------------------------ listings


def test_delistings_and_listings_in_a_walk():
    x = panel(60, 3)
    x.iloc[45:, 0] = np.nan  # leaves in the second period
    x.iloc[:25, 2] = np.nan  # listed late: a complete window from row 45 on
    result = walk_forward(x, {"1/N": None}, window=20, step=20, costs=0.01)
    weights = result.weights.loc["1/N"]
    np.testing.assert_allclose(weights.to_numpy(), [[1 / 2, 1 / 2, 0], [1 / 2, 1 / 2, 0]])
    assert list(result.windows["eligible assets"]) == [2, 2]
    result = walk_forward(x, {"1/N": None}, window=20, step=15, costs=0.01)
    weights = result.weights.loc["1/N"].to_numpy()
    np.testing.assert_allclose(weights, [[1 / 2, 1 / 2, 0], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]])
    # Of the last decision only purchases cost: what left was cash already.
    held = np.array([(1 + x.iloc[35:45, 0]).prod(), (1 + x.iloc[35:50, 1]).prod()])
    bought = abs(0.5 - held[1] / held.sum()) + 0.5
    assert result.turnover["1/N"].iloc[2] == pytest.approx(bought, rel=1e-12)


def test_partial_histories_where_the_estimator_takes_them():
    x = panel(120, 4)
    x.iloc[:50, 3] = np.nan
    generator = FactorDiffusionGenerator(
        n_factors=1, residual=False, heavy_tails=False, random_state=0, device="cpu"
    )
    whole = walk_forward(x, {"a": None}, window=80, step=40)
    assert list(whole.windows["eligible assets"]) == [3]
    part = walk_forward(x, {"a": None}, window=80, step=40, coverage=0.3)
    assert list(part.windows["eligible assets"]) == [4]
    with pytest.raises(ValueError, match=r"'shrunk' on 2001-04-20.*NaN"):
        walk_forward(x, {"shrunk": LedoitWolf()}, window=80, step=40, coverage=0.3)
    taken = walk_forward(
        x,
        {"cvar": (generator, MinimumCVaR(constraints=[LongOnly()], method="newton"))},
        window=80,
        step=40,
        coverage=0.3,
    )
    assert taken.weights.loc["cvar"].to_numpy().sum() == pytest.approx(1)


def test_what_never_moved_or_has_just_left_cannot_be_bought():
    x = panel(60, 4)
    x.iloc[:, 1] = 0.0
    x.iloc[19, 2] = np.nan
    result = walk_forward(x, {"1/N": None}, window=20, step=40, coverage=0.5)
    np.testing.assert_array_equal(result.weights.to_numpy(), [[0.5, 0, 0, 0.5]])


def test_what_hardly_trades_can_be_left_out():
    x = panel(60, 3)
    x.iloc[:20:2, 1] = 0.0  # half of the first history
    weights = walk_forward(x, {"1/N": None}, window=20, step=20, still=0.5).weights
    np.testing.assert_allclose(weights, [[0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    weights = walk_forward(x, {"1/N": None}, window=20, step=20, still=0.51).weights
    np.testing.assert_allclose(weights, 1 / 3)


# ------------------------------------------------------------------ no look-ahead


def everything():
    newton = MinimumCVaR(constraints=[LongOnly()], method="newton")
    return {
        "1/N": "equal",
        "sample": "history",
        "shrunk": LedoitWolf(),
        "ensemble": WindowEnsembleCovariance((20, 60)),
        "short": Strategy(QuadraticInverseShrinkage(), window=30),
        "parity": (LedoitWolf(), RiskParity()),
        "scenarios": Strategy(SmoothedBootstrapGenerator(), newton, n_scenarios=500),
        "history": ("history", newton),
        "half": Strategy(StudentTGenerator(), newton, n_scenarios=500, history=0.5),
        "implied": GaussianGenerator(),
        "sluggish": (LedoitWolf(), MinimumVariance([LongOnly(), Turnover(limit=0.3)])),
        "thrifty": (LedoitWolf(), MinimumVariance([TransactionCost(1e-5)])),
    }


SETTINGS = {"window": 60, "step": 20, "costs": 0.001, "initial": "equal"}


def test_the_future_changes_nothing_before():
    x = panel()
    before = walk_forward(x, everything(), **SETTINGS)
    changed = x.copy()
    changed.iloc[130:] = 3 * panel(130, seed=9).to_numpy()
    changed.iloc[200:, 0] = np.nan
    after = walk_forward(changed, everything(), **SETTINGS)
    # Decided at the close of row 119, held over 120 ... 139: the decision stands, the returns to 129 as well.
    cut = x.index[129]
    pd.testing.assert_frame_equal(after.returns[:cut], before.returns[:cut], check_exact=True)
    decided = before.weights.index.get_level_values("date") <= cut
    pd.testing.assert_frame_equal(after.weights[decided], before.weights[decided], check_exact=True)
    assert not after.returns[cut:].equals(before.returns[cut:])


def test_history_before_the_window_changes_nothing():
    x = panel()
    changed = x.copy()
    changed.iloc[:40] *= 5
    names = {name: s for name, s in everything().items() if name not in ("sluggish", "thrifty")}
    a, b = (walk_forward(frame, names, window=60, step=40) for frame in (x, changed))
    pd.testing.assert_frame_equal(a.returns.iloc[40:], b.returns.iloc[40:], check_exact=True)


def test_estimators_handed_in_are_left_alone():
    given = LedoitWolf()
    walk_forward(panel(100, 3), {"shrunk": given}, window=60, step=20)
    assert not hasattr(given, "covariance_")


# ------------------------------------------------------------------ strategies


def test_equal_weights_have_a_twin():
    x = panel(150, 4)
    result = walk_forward(x, {"1/N": None, "equal": "equal"}, window=50, step=21)
    wealth, path = np.full(4, 0.25), []
    for row in range(50, 150):
        if (row - 50) % 21 == 0:
            wealth = np.full(4, wealth.sum() / 4)
        wealth = wealth * (1 + x.iloc[row].to_numpy())
        path.append(wealth.sum())
    np.testing.assert_allclose((1 + result.returns["1/N"]).cumprod(), path, rtol=1e-12)
    assert result.returns["1/N"].equals(result.returns["equal"])


def test_weights_are_those_of_the_estimator_by_itself():
    x = panel(200, 4)
    strategies = {"t": (StudentTCovariance(), LONG), "short": Strategy(LedoitWolf(), window=40)}
    result = walk_forward(x, strategies, window=100, step=30)
    for date, weights in result.weights.loc["t"].iterrows():
        rows = x[:date].iloc[-100:]
        covariance = StudentTCovariance().fit(rows).covariance_
        np.testing.assert_allclose(weights, LONG.solve(covariance=covariance).weights, atol=1e-12)
    for date, weights in result.weights.loc["short"].iterrows():
        covariance = LedoitWolf().fit(x[:date].iloc[-40:]).covariance_
        np.testing.assert_allclose(
            weights, MinimumVariance().solve(covariance=covariance).weights, atol=1e-12
        )


def test_scenarios_are_common_to_all_dates():
    """With the same rows in every window, the same weights: seeds do not move with the date."""
    x = pd.concat([panel(60, 4)] * 4, ignore_index=True)
    cvar = MinimumCVaR(constraints=[LongOnly()], method="newton")
    given = {
        "drawn": Strategy(BootstrapGenerator(), cvar, n_scenarios=300),
        "other seed": Strategy(BootstrapGenerator(), cvar, n_scenarios=300, random_state=1),
        "re-estimated": ScenarioCovariance(BootstrapGenerator(), n_scenarios=300),
    }
    weights = walk_forward(x, given, window=60, step=60).weights
    for name in given:
        rows = weights.loc[name].to_numpy()
        np.testing.assert_array_equal(rows[0], rows[1])
    assert np.abs(weights.loc["drawn"].iloc[0] - weights.loc["other seed"].iloc[0]).max() > 1e-3


def test_history_is_the_rows_themselves():
    x = panel(120, 4)
    cvar = MinimumCVaR(level=0.1, constraints=[LongOnly()])
    result = walk_forward(x, {"rows": ("history", cvar), "sample": "history"}, window=80, step=40)
    expected = cvar.solve(scenarios=x.iloc[:80]).weights
    np.testing.assert_allclose(result.weights.loc["rows"].iloc[0], expected, atol=1e-9)
    expected = MinimumVariance().solve(covariance=x.iloc[:80].cov()).weights
    np.testing.assert_allclose(result.weights.loc["sample"].iloc[0], expected, rtol=1e-12)
    half = Strategy(GaussianGenerator(), cvar, n_scenarios=200, history=0.5)
    drawn = half.inputs(x.iloc[:80])["scenarios"].to_numpy()
    assert len(drawn) == 200 + 2 * 80  # 2.5 times is 2, to even
    np.testing.assert_array_equal(drawn[200:280], x.iloc[:80])


def test_turnover_limits_hold_from_drifted_weights():
    x = panel(300, 5)
    limited = MinimumVariance([GrossExposure(2.0), Turnover(limit=0.05)])
    given = {
        "limited": (LedoitWolf(), limited),
        "free": (LedoitWolf(), MinimumVariance([GrossExposure(2.0)])),
    }
    result = walk_forward(x, given, window=60, step=20, initial="equal")
    assert result.turnover["limited"].max() <= 0.05 + 1e-6
    assert result.turnover["free"].max() > 0.1
    dear = (LedoitWolf(), MinimumVariance([TransactionCost(1.0)]))
    still = walk_forward(x, {"dear": dear}, window=60, step=20, initial="equal")
    assert still.turnover["dear"].max() < 1e-6


def test_a_delisting_does_not_use_up_the_limit_of_turnover():
    x = panel(300, 5)
    x.iloc[150:, 0] = np.nan
    limited = MinimumVariance([LongOnly(), Turnover(limit=0.02)])
    result = walk_forward(x, {"limited": (LedoitWolf(), limited)}, window=60, step=20, initial="equal")
    turnover = result.turnover["limited"]
    after = int(np.argmax(result.windows["eligible assets"] == 4))
    assert result.weights.iloc[after - 1, 0] > 0.05
    # The cash is spread over the rest, and what it buys is counted; every other trade stays within the limit.
    assert 0.05 < turnover.iloc[after] <= result.weights.iloc[after - 1, 0] + 0.05
    assert turnover.drop(turnover.index[after]).max() <= 0.02 + 1e-6


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, r"expected window to be a whole number.*got 1, because.*do pass"),
        ({"step": 0}, r"expected step .*got 0"),
        ({"step": 2.5}, r"expected a step in rows"),
        ({"window": "a while"}, r"expected a window in rows or as an offset, got 'a while'"),
        ({"window": 260}, r"expected at least one row after the first history"),
        ({"step": pd.DatetimeIndex(["2001-01-10"])}, r"expected dates that follow a sufficient history"),
        ({"minimum": 0}, r"expected minimum"),
        ({"costs": -0.1}, r"expected costs in \[0, 1\)"),
        ({"costs": pd.Series({"a0": 0.1})}, r"expected costs for every asset, got none for \['a1'"),
        ({"costs": [0.1, 0.2]}, r"expected finite costs"),
        ({"initial": "cash"}, r"expected initial weights, 'equal' or None, got 'cash'"),
        ({"initial": [0.5, 0.5]}, r"expected finite initial weights"),
        ({"coverage": 0.0}, r"coverage in \(0, 1\]"),
        ({"still": 1.5}, r"still in \(0, 1\], got 1.0 and 1.5"),
        ({"delisting_return": -2}, r"delisting return"),
        ({"portfolio": "minimum variance"}, r"expected a portfolio such as MinimumVariance\(\)"),
        ({"strategies": {}}, r"expected a mapping of names"),
        ({"strategies": LedoitWolf()}, r"expected a mapping of names"),
        ({"strategies": {("a", 1): None}}, r"expected strategies named by text, got \('a', 1\)"),
        ({"strategies": {"x": "best"}}, r"expected an estimator, 'equal' or 'history', got 'best' for 'x'"),
        ({"strategies": {"x": LedoitWolf}}, r"expected an estimator with fit\(X\).*do pass an instance"),
        (
            {"strategies": {"x": (LedoitWolf(), MinimumCVaR(constraints=[LongOnly()]))}},
            r"expected an estimator with sample\(n\) for 'x', got LedoitWolf",
        ),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(change, message):
    given = {"strategies": {"1/N": None}, "window": 60, "step": 20} | change
    with pytest.raises(ValueError, match=message):
        walk_forward(panel(), **given)


def test_bad_panels_are_refused_in_a_sentence():
    x = panel(100, 3)
    for bad, message in (
        (x[::-1], "increasing order"),
        (x.set_axis(["a", "a", "b"], axis=1), "each asset once"),
        (x.replace(x.iloc[5, 1], np.inf), "got inf of 'a1' on 2001-01-08"),
        (x.replace(x.iloc[5, 1], -1.5), "at least -1, got -1.5"),
        (x.replace(x.iloc[5, 1], "text"), "expected numbers"),
        (x.iloc[:2], "at least 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            walk_forward(bad, {"1/N": None}, window=50, step=20)
    hole = x.copy()
    hole.iloc[60] = np.nan
    with pytest.raises(
        ValueError, match=r"expected an eligible asset at every decision, got none on 2001-04-06"
    ):
        walk_forward(hole, {"1/N": None}, window=50, step=20)
    with pytest.raises(ValueError, match="an index of dates"):
        walk_forward(x.reset_index(drop=True), {"1/N": None}, window=50, step="ME")


def test_an_error_says_whose_it_is_and_when():
    x = panel(200, 4)
    x["copy"] = x["a0"]  # singular without shrinkage
    with pytest.raises(ValueError, match=r"'plain' on 2001-03-23.*invertible covariance"):
        walk_forward(x, {"shrunk": LedoitWolf(), "plain": "history"}, window=60, step=20)
    with pytest.raises(RuntimeError, match=r"'pca' on 2001-03-23, got AttributeError"):
        walk_forward(x, {"pca": PCA()}, window=60, step=20)


def test_lost_wealth_is_refused():
    x = panel(80, 2)
    x.iloc[70, 1] = 40.0
    short = (LedoitWolf(), MinimumVariance())
    x["a1"] += 5 * x["a0"]  # so that it is sold short
    with pytest.raises(ValueError, match=r"'short' on .*wealth above 0"):
        walk_forward(x, {"short": short}, window=60, step=20)


def test_an_infeasible_first_purchase_says_so():
    limited = (LedoitWolf(), MinimumVariance([Turnover(limit=0.2)]))
    with pytest.raises(ValueError, match=r"'limited' on .*Turnover"):
        walk_forward(panel(), {"limited": limited}, window=60, step=20)


def test_holes_inside_a_history_are_told():
    rows = panel()
    late = rows.copy()
    late.iloc[:50, 0] = np.nan
    late.iloc[-50:, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk_forward(late, {"1/N": "equal"}, window=60, step=20)
    late.iloc[100, 2] = np.nan
    with pytest.warns(
        UserWarning, match=rf"1 of {rows.shape[1]} assets \({rows.columns[2]}\) lack returns .* 1 in all"
    ):
        walk_forward(late, {"1/N": "equal"}, window=60, step=20)


def test_a_limit_of_turnover_that_cash_cannot_meet_says_how():
    with pytest.raises(ValueError, match='initial="equal" starts invested'):
        walk_forward(
            panel(),
            {"limited": (LedoitWolf(), MinimumVariance([LongOnly(), Turnover(limit=0.1)]))},
            window=60,
            step=20,
        )

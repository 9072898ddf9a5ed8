import numpy as np
import pandas as pd
import pytest
from scipy import stats

from finediff.risk import (
    StreamingTails,
    annual_volatility,
    drawdown,
    expected_shortfall,
    expected_shortfall_standard_error,
    sharpe_ratio,
    streaming,
    tail_risk_table,
    turnover,
    var,
    var_standard_error,
)

LEVELS = [0.01, 0.025, 0.05, 0.1, 0.5]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def naive_var(returns, level):
    """Smallest observed q with F_n(q) >= level, by counting."""
    for q in sorted(returns):
        if sum(r <= q for r in returns) / len(returns) >= level - 1e-12:
            return -q
    raise AssertionError


def rockafellar_uryasev(returns, level):
    """ES as min over c of c + E[(-r - c)^+] / level; the minimum is at one of the observations."""
    return min(c + np.maximum(-returns - c, 0).mean() / level for c in -returns)


@pytest.mark.parametrize("level", LEVELS)
def test_normal_and_student_closed_forms(level):
    n = 200_000
    u = (np.arange(n) + 0.5) / n
    z = stats.norm.ppf(level)
    mu, sd, nu = 0.001, 0.02, 4
    normal = mu + sd * stats.norm.ppf(u)
    assert var(normal, level) == pytest.approx(-(mu + sd * z), rel=1e-4, abs=1e-6)
    assert expected_shortfall(normal, level) == pytest.approx(-mu + sd * stats.norm.pdf(z) / level, rel=1e-4)
    q = stats.t.ppf(level, nu)
    student = stats.t.pdf(q, nu) / level * (nu + q**2) / (nu - 1)
    assert var(stats.t.ppf(u, nu), level) == pytest.approx(-q, rel=1e-3, abs=1e-4)
    assert expected_shortfall(stats.t.ppf(u, nu), level) == pytest.approx(student, rel=5e-3)


@pytest.mark.parametrize("n", [100, 101, 137, 250])
@pytest.mark.parametrize("level", LEVELS)
def test_match_the_definitions(rng, n, level):
    returns = rng.standard_t(3, n) * 0.01
    assert var(returns, level) == pytest.approx(naive_var(returns, level), rel=1e-12)
    assert expected_shortfall(returns, level) == pytest.approx(rockafellar_uryasev(returns, level), rel=1e-9)


def test_a_whole_number_of_rows_is_not_rounded_up():
    """0.05 * 100 and 0.07 * 100 exceed 5 and 7 in floating point."""
    returns = np.arange(1.0, 101.0)
    for level in (0.05, 0.07, 0.14, 0.29):
        k = round(100 * level)
        assert var(returns, level) == -k
        assert expected_shortfall(returns, level) == pytest.approx(-(k + 1) / 2)


@pytest.mark.parametrize("level", LEVELS)
def test_coherence(rng, level):
    for _ in range(30):
        x, y = rng.standard_t(2.5, (2, 117)) * 0.01
        es = expected_shortfall
        assert es(x + y, level) <= es(x, level) + es(y, level) + 1e-12
        assert es(x, level) >= var(x, level) - 1e-15
        for measure in (es, var):
            assert measure(3.5 * x, level) == pytest.approx(3.5 * measure(x, level), rel=1e-12)
            assert measure(x + 0.02, level) == pytest.approx(measure(x, level) - 0.02, abs=1e-14)
            assert measure(np.maximum(x, y), level) <= measure(x, level)


def test_levels_are_ordered(rng):
    returns = rng.standard_normal(500)
    for measure in (var, expected_shortfall):
        assert (np.diff([measure(returns, level) for level in LEVELS]) <= 0).all()


@pytest.mark.parametrize("level", [0.02, 0.05, 0.25])
def test_standard_errors_are_those_of_repeated_panels(rng, level):
    n, panels = 600, 3000
    x = rng.standard_t(5, (n, panels))
    for measure, error in (
        (var, var_standard_error),
        (expected_shortfall, expected_shortfall_standard_error),
    ):
        actual = measure(x, level).std()
        estimated = np.sqrt((error(x, level) ** 2).mean())
        # a standard deviation over 3000 panels is known to 1.3 %, heavier for ES; small-tail bias is the rest
        assert estimated == pytest.approx(actual, rel=0.12)


def test_standard_errors_approach_the_asymptotic_formula(rng):
    n, level = 20_000, 0.05
    x = stats.norm.ppf((np.arange(n) + 0.5) / n)
    z = stats.norm.ppf(level)
    density = stats.norm.pdf(z)
    assert var_standard_error(x, level) == pytest.approx(np.sqrt(level * (1 - level) / n) / density, rel=0.02)
    es = density / level
    tail_variance = 1 - z * es - es**2
    expected = np.sqrt((tail_variance + (1 - level) * (es + z) ** 2) / (n * level))
    assert expected_shortfall_standard_error(x, level) == pytest.approx(expected, rel=0.01)


def test_drawdown_counts_the_first_day_and_matches_the_definition(rng):
    assert drawdown([-0.1]) == pytest.approx(0.1)
    assert drawdown([0.1, 0.2]) == 0
    assert drawdown([0.5, -0.5, 0.2, -1.0]) == 1
    returns = rng.standard_normal(80) * 0.03
    wealth = np.concatenate([[1.0], np.cumprod(1 + returns)])
    naive = max(1 - wealth[t] / wealth[s] for s in range(81) for t in range(s, 81))
    assert drawdown(returns) == pytest.approx(naive, rel=1e-12)
    with pytest.raises(ValueError, match="per cent"):
        drawdown([-1.5, 0.2])


def test_volatility_and_sharpe(rng):
    returns = rng.standard_normal(400) * 0.01 + 0.0005
    assert annual_volatility(returns) == pytest.approx(pd.Series(returns).std() * np.sqrt(252))
    assert annual_volatility(returns, periods=12) * np.sqrt(21) == pytest.approx(annual_volatility(returns))
    expected = (returns.mean() - 0.0001) * 252 / annual_volatility(returns)
    assert sharpe_ratio(returns, risk_free=0.0001) == pytest.approx(expected)
    assert sharpe_ratio(5 * returns) == pytest.approx(sharpe_ratio(returns))


def test_noise_has_no_sharpe(rng):
    ratios = sharpe_ratio(rng.standard_normal((252, 2000)))
    assert abs(ratios.mean()) < 4 / np.sqrt(2000)
    assert ratios.std() == pytest.approx(1, abs=0.08)


def test_turnover():
    assert turnover([0.5, 0.5], [0.5, 0.5]) == 0
    assert turnover([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]) == 1
    a, b = pd.Series({"x": 0.4, "y": 0.6}), pd.Series({"y": 0.6, "z": 0.4})
    assert turnover(a, b) == turnover(b, a) == pytest.approx(0.8)
    assert turnover(a, a[::-1]) == 0


def test_vector_panel_and_weights_agree(rng):
    panel = pd.DataFrame(rng.standard_normal((300, 3)) * 0.01, columns=["a", "b", "c"])
    weights = pd.Series({"c": 0.5, "a": 0.2, "b": 0.3})
    portfolio = panel.to_numpy() @ [0.2, 0.3, 0.5]
    for measure in (
        var,
        expected_shortfall,
        var_standard_error,
        expected_shortfall_standard_error,
        drawdown,
        annual_volatility,
        sharpe_ratio,
    ):
        columns = measure(panel)
        assert list(columns.index) == ["a", "b", "c"]
        assert columns["b"] == pytest.approx(measure(panel["b"]))
        assert isinstance(measure(panel["b"]), float)
        np.testing.assert_allclose(measure(panel.to_numpy()), columns)
        assert measure(panel, weights=weights) == pytest.approx(measure(portfolio))
        assert measure(panel.to_numpy(), weights=[0.2, 0.3, 0.5]) == pytest.approx(measure(portfolio))


def test_table_puts_the_noise_beside_the_gap(rng):
    names = ["a", "b", "c"]
    real = pd.DataFrame(rng.standard_t(4, (1000, 3)) * 0.01, columns=names)
    fake = pd.DataFrame(rng.standard_t(4, (20_000, 3)) * 0.01, columns=names)[["c", "a", "b"]]
    portfolios = {"equal": np.full(3, 1 / 3), "spread": pd.Series({"b": -1.0, "a": 1.0, "c": 0.0})}
    table = tail_risk_table(real, fake, portfolios)
    assert table.index.names == ["portfolio", "level"]
    assert list(table.index) == [("equal", 0.01), ("equal", 0.05), ("spread", 0.01), ("spread", 0.05)]
    assert table.loc[("spread", 0.05), "VaR scenarios"] == pytest.approx(var(fake["a"] - fake["b"], 0.05))
    assert table.loc[("equal", 0.01), "ES real"] == pytest.approx(expected_shortfall(real.mean(axis=1), 0.01))
    for measure in ("VaR", "ES"):
        gap = table[f"{measure} scenarios"] - table[f"{measure} real"]
        assert (gap.abs() < 4.5 * table[f"{measure} real s.e."]).all()
    frame = tail_risk_table(real, fake, pd.DataFrame(portfolios, index=names).fillna(0.0))
    assert frame.loc["equal"].equals(table.loc["equal"])


PANEL = pd.DataFrame(np.ones((50, 2)), columns=["a", "b"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: var(np.ones(19), 0.05), "at least 20 rows"),
        (lambda: expected_shortfall(np.ones(99), 0.01), "at least 100 rows"),
        (lambda: var(np.ones(50), 0.0), "level"),
        (lambda: var(np.ones(50), 5), "level"),
        (lambda: var(np.array([0.1, np.nan]), 0.5), "finite"),
        (lambda: var(np.array([]), 0.5), "rows"),
        (lambda: var(PANEL.to_numpy(), 0.1, np.ones((2, 1))), "weights"),
        (lambda: var(np.ones(50), 0.1, np.ones(1)), "weights"),
        (lambda: var(PANEL, 0.1, pd.Series({"a": 1.0, "z": 0.0})), "same assets"),
        (lambda: annual_volatility([0.1]), "two rows"),
        (lambda: sharpe_ratio(np.full(10, 0.01)), "vary"),
        (lambda: turnover([1.0], [0.5, 0.5]), "weight vectors"),
        (lambda: turnover(np.ones((2, 1)), np.ones((2, 1))), "weight vectors"),
        (lambda: turnover(pd.Series([1.0]), [1.0]), "one of each"),
        (lambda: turnover([np.nan], [1.0]), "finite"),
        (lambda: tail_risk_table(PANEL, PANEL, {}), "portfolio"),
        (lambda: tail_risk_table(PANEL, PANEL, {"p": np.ones(2)}), "at least 100 rows"),
        (lambda: tail_risk_table(PANEL, PANEL.rename(columns={"b": "c"}), {"p": np.ones(2)}), "same assets"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -------------------------------------------------------------------------------------- in a stream

LAWS = {
    "normal": lambda rng, n: 0.0004 + 0.01 * rng.standard_normal((n, 3)),
    "heavy": lambda rng, n: 0.01 * rng.standard_t(2.1, (n, 3)).clip(-1000, 1000),
    "tiny": lambda rng, n: 1e-7 * rng.standard_normal((n, 3)),
    "scales": lambda rng, n: rng.standard_normal((n, 3)) * [1e-4, 1e-2, 1.0],
    "gains only": lambda rng, n: rng.exponential(0.01, (n, 3)),
    "ties": lambda rng, n: rng.integers(-3, 4, (n, 3)) / 100,
    "mostly zero": lambda rng, n: rng.standard_normal((n, 3)) * (rng.random((n, 3)) < 0.03) / 50,
    "crashes": lambda rng, n: np.where(rng.random((n, 3)) < 0.01, -0.6, 0.001) * rng.random((n, 3)),
    "constant": lambda rng, n: np.full((n, 3), 0.1),
}


def streamed(x, chunk=700, **more):
    tails = StreamingTails(**more)
    for start in range(0, len(x), chunk):
        tails.update(x[start : start + chunk])
    return tails


@pytest.mark.parametrize("n", [100, 2311, 40_000])
@pytest.mark.parametrize("law", LAWS)
def test_streams_keep_their_bounds(rng, law, n):
    x = LAWS[law](rng, n)
    tails = streamed(x)
    np.testing.assert_array_equal(tails.minimum, x.min(axis=0))
    np.testing.assert_array_equal(tails.maximum, x.max(axis=0))
    for level in [*LEVELS, 0.9, 0.999]:
        if n * level < 1 - 1e-9:
            continue
        exact, tail = var(x, level), np.sort(x, axis=0)[: int(np.ceil(n * level))]
        assert (np.abs(tails.var(level) - exact) <= 2**-7 * np.abs(exact) + 2**-20).all()
        bound = 2**-7 * np.abs(tail).sum(axis=0) / (n * level) + 2**-20
        assert (np.abs(tails.expected_shortfall(level) - expected_shortfall(x, level)) <= bound).all()


def test_streams_of_many_rows_are_nearly_exact(rng):
    """Within a bin the rows lie on a line, nearly."""
    x = 0.01 * rng.standard_t(4, (400_000, 2))
    tails = streamed(x, 50_000)
    for level in (0.01, 0.05):
        np.testing.assert_allclose(tails.var(level), var(x, level), rtol=1e-3)
        np.testing.assert_allclose(tails.expected_shortfall(level), expected_shortfall(x, level), rtol=2e-4)


def test_an_asset_without_risk_is_exact(rng):
    x = np.column_stack([np.full(500, 0.1), np.full(500, -0.03), np.zeros(500)])
    tails = streamed(x)
    np.testing.assert_array_equal(tails.var(0.05), [-0.1, 0.03, 0.0])
    np.testing.assert_allclose(tails.expected_shortfall(0.05), [-0.1, 0.03, 0.0], rtol=1e-14)


def test_bins_are_those_of_a_search(rng):
    edges = streaming._EDGES
    assert (np.diff(edges) > 0).all()
    x = np.concatenate(
        [rng.standard_t(1, 20_000) * 10.0 ** rng.uniform(-9, 1, 20_000), [0.0, 5e-324, 2.0**-20, 16.0, 1e300]]
    )
    x = np.concatenate([x, -x[x > 0]])
    counts = streaming._binned(x[:, None])[0]
    # [a, b) above zero, (-b, -a] below
    up = np.searchsorted(edges, x[x >= 0], side="right") - 1
    down = np.searchsorted(edges, x[x < 0], side="left") - 1
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate([up, down]), minlength=len(edges) - 1))


def test_returns_beyond_the_grid_stay_between_it_and_the_extreme(rng):
    x = -rng.uniform(20, 90, (1000, 1))
    tails = streamed(x)
    assert 16 <= tails.var(0.05)[0] <= -x.min()
    assert tails.minimum[0] == x.min()


def test_neither_chunks_nor_the_order_of_merging_matter(rng):
    x = pd.DataFrame(0.01 * rng.standard_t(3, (3000, 20)), columns=[f"A{j}" for j in range(20)])
    whole = streamed(x, 3000).table()
    pd.testing.assert_frame_equal(streamed(x, 7).table(), whole, check_exact=True)
    cuts = [x[:100], x[100:1900], x[1900:1901], x[1901:1901], x[1901:]]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        total = StreamingTails()
        for i in order:
            part = streamed(cuts[i])
            before = part.count
            total.merge(part)
            assert part.count == before
        pd.testing.assert_frame_equal(total.table(), whole, check_exact=True)
        total.update(x)  # a merged one goes on, and leaves its parts alone
        assert total.count == 6000
    assert list(whole.columns) == ["VaR 1 %", "ES 1 %", "VaR 5 %", "ES 5 %", "minimum", "maximum"]


def test_streams_of_portfolios(rng):
    x = pd.DataFrame(0.01 * rng.standard_normal((5000, 3)), columns=["a", "b", "c"])
    weights = {
        "equal": pd.Series(1 / 3, ["c", "b", "a"]),
        "spread": pd.Series({"b": -1.0, "a": 1.0, "c": 0.0}),
    }
    named = streamed(x, portfolios=weights)
    array = np.column_stack([np.full(3, 1 / 3), [1.0, -1.0, 0.0]])
    for tails in (named, streamed(x.to_numpy(), portfolios=array), streamed(x, portfolios=array)):
        for j, one in enumerate((x.mean(axis=1), x["a"] - x["b"])):
            assert np.asarray(tails.var(0.05))[j] == pytest.approx(var(one, 0.05), rel=2**-7)
    assert list(named.var().index) == list(named.minimum.index) == ["equal", "spread"]
    short = streamed(x, portfolios=-np.eye(3))
    np.testing.assert_allclose(short.minimum, -x.max(), rtol=1e-15)


def test_single_precision_is_read_as_it_is(rng):
    x = (0.01 * rng.standard_normal((5000, 2))).astype(np.float32)
    np.testing.assert_array_equal(streamed(x).var(), streamed(x.astype(float)).var())


ROWS = np.linspace(-0.1, 0.1, 60).reshape(30, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: StreamingTails().var(), "got none so far"),
        (lambda: StreamingTails().minimum, "got none so far"),
        (lambda: streamed(ROWS).var(0.01), "at least 100 rows"),
        (lambda: streamed(ROWS).var(5), "level"),
        (lambda: StreamingTails().update(ROWS[0]), "expected rows of numbers"),
        (lambda: StreamingTails().update([["a", "b"]]), "expected rows of numbers"),
        (lambda: StreamingTails().update(np.where(ROWS > 0.05, np.nan, ROWS)), "finite"),
        (lambda: StreamingTails().update(np.where(ROWS > 0.05, -np.inf, ROWS)), "finite"),
        (lambda: streamed(ROWS).update(ROWS[:, :1]), "expected the 2 assets of the chunks before"),
        (lambda: streamed(ROWS).update(pd.DataFrame(ROWS)), "other names"),
        (lambda: streamed(ROWS).merge(streamed(ROWS[:, :1])), "same assets"),
        (lambda: streamed(ROWS).merge(streamed(ROWS, portfolios=np.eye(2))), "same portfolios"),
        (lambda: streamed(ROWS, portfolios=np.eye(3)), r"weights of shape \(2, p\)"),
        (lambda: streamed(ROWS, portfolios=np.ones(2)), r"weights of shape \(2, p\)"),
        (
            lambda: streamed(PANEL, portfolios=pd.DataFrame({"p": [1.0, 2.0]}, index=["a", "z"])),
            "same assets, got a mismatch",
        ),
    ],
)
def test_bad_streams_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_refused_chunk_is_not_counted(rng):
    x = rng.standard_normal((400, 2)) / 100
    tails = streamed(x)
    before = tails.table()
    with pytest.raises(ValueError, match="finite"):
        tails.update(np.vstack([x, [0.0, np.nan]]))
    pd.testing.assert_frame_equal(tails.table(), before, check_exact=True)
    assert tails.count == 400

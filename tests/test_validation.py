import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from finediff.risk import tail_risk_table
from finediff.validation import (
    FLOOR_ROW,
    Comparison,
    classifier_auc,
    compare,
    cvm_p_value,
    cvm_portfolio_test,
    cvm_two_sample,
    energy_distance,
    joint_crashes,
    judge,
    lower_tail_dependence,
    panel_metrics,
    portfolio_weights,
    qq_data,
    tail_test,
    validate,
)
from finediff.validation.cvm import cvm_statistics, random_masks
from finediff.validation.floor import badness
from finediff.validation.metrics import energy_null

FAST = {"n_portfolios": 40, "n_null": 60}
LOADINGS = np.random.default_rng(1).standard_normal((5, 2))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def market(rng, n, nu=5):
    """Five assets, two factors, one common scale with t tails; daily returns of about 1 %."""
    gauss = rng.standard_normal((n, 2)) @ LOADINGS.T + rng.standard_normal((n, 5))
    return 0.005 * gauss * np.sqrt(nu / rng.chisquare(nu, (n, 1)))


# Cramer-von Mises


@pytest.mark.parametrize("digits", [12, 1, 0])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (45, 130), (2, 30)])
def test_cvm_equals_scipy_column_by_column(rng, n, m, digits):
    x, y = rng.standard_normal((n, 4)).round(digits), 1.2 * rng.standard_normal((m, 4)).round(digits)
    y[:, 1] = y[:, 1].round(0)
    twin = [stats.cramervonmises_2samp(x[:, j], y[:, j], method="asymptotic") for j in range(4)]
    statistic = cvm_two_sample(x, y)
    np.testing.assert_allclose(statistic, [t.statistic for t in twin], rtol=1e-9)
    np.testing.assert_allclose(cvm_p_value(statistic, n, m), [t.pvalue for t in twin], atol=2e-7)


def test_tied_and_untied_columns_in_one_call(rng):
    x, y = rng.standard_normal((30, 6)), rng.standard_normal((20, 6))
    x[:, ::2], y[:, ::2] = x[:, ::2].round(1), y[:, ::2].round(1)
    alone = [cvm_two_sample(x[:, [j]], y[:, [j]])[0] for j in range(6)]
    np.testing.assert_allclose(cvm_two_sample(x, y), alone, rtol=1e-12)


def test_limit_law_reproduces_the_published_table():
    # Anderson & Darling (1952), table 1: z such that P(W^2 <= z) = .5, .9, .95, .99, .999.
    z = [0.11888, 0.34730, 0.46136, 0.74346, 1.16786]
    np.testing.assert_allclose(cvm_p_value(z), [0.5, 0.1, 0.05, 0.01, 0.001], atol=2e-5)
    extremes = cvm_p_value(np.array([[-0.1, 0.0], [1e-9, 1e9]]))
    np.testing.assert_allclose(extremes, [[1, 1], [1, 0]], atol=1e-14)


def test_masks_enumerate_the_exact_null_moments():
    n, m = 3, 5
    masks = np.array([[i in c for i in range(n + m)] for c in combinations(range(n + m), n)])
    t = cvm_statistics(np.arange(n + m, dtype=float)[None, :] ** 2, masks)[:, 0]
    k, total = n * m, n + m
    variance = (total + 1) * (4 * k * total - 3 * (n**2 + m**2) - 2 * k) / (180 * total**2 * k)
    assert t.mean() == pytest.approx((1 + 1 / total) / 6, rel=1e-12)
    assert t.var() == pytest.approx(variance, rel=1e-12)


def test_p_values_are_uniform_under_one_law(rng):
    p = cvm_p_value(cvm_two_sample(rng.standard_normal((80, 4000)), rng.standard_normal((50, 4000))), 80, 50)
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_portfolio_weights_are_what_they_say(rng):
    w = portfolio_weights(7, 41, rng)
    assert w.shape == (41, 7)
    np.testing.assert_allclose(w[:21].sum(axis=1), 1.0)
    assert (w[:21] >= 0).all()
    np.testing.assert_allclose(w[21:].sum(axis=1), 0.0, atol=1e-14)
    np.testing.assert_allclose(np.abs(w[21:]).sum(axis=1), 2.0)
    assert (portfolio_weights(1, 3, rng) == 1).all()
    with pytest.raises(ValueError, match="at least one asset"):
        portfolio_weights(0, 3, rng)


def test_portfolio_test_keeps_its_level_and_needs_its_null(rng):
    runs = [
        cvm_portfolio_test(market(rng, 120), market(rng, 120), n_portfolios=20, n_null=40, random_state=k)
        for k in range(150)
    ]
    p = np.array([r.p_value for r in runs])
    # Ties among rates only make the p-value larger: P(p <= a) <= a, up to 4 standard errors of 150 runs.
    for a in (0.05, 0.2):
        assert (p <= a).mean() <= a + 4 * np.sqrt(a * (1 - a) / 150)
    # One market factor moves all portfolios: rates spread beyond the binomial's .05 +- .05.
    rates = np.array([r.rejection_rate for r in runs])
    assert rates.mean() == pytest.approx(0.05, abs=4 * rates.std() / np.sqrt(150))
    assert rates.std() > 1.5 * np.sqrt(0.05 * 0.95 / 20)


def test_portfolio_test_finds_a_wrong_scale_and_uses_given_weights(rng):
    x, y = market(rng, 400), 1.5 * market(rng, 500)
    result = cvm_portfolio_test(x, y, null_panel=market(rng, 900), n_null=60, random_state=0)
    assert result.p_value == pytest.approx(1 / 61)
    assert result.rejection_rate > result.null_high
    assert result.null_sizes == result.sizes == (400, 500)
    w = portfolio_weights(5, 12, rng)
    given = cvm_portfolio_test(x, y, weights=w, n_null=20, random_state=0)
    p = cvm_p_value(cvm_two_sample(x @ w.T, y @ w.T), 400, 500)
    np.testing.assert_allclose(given.p_values, p, rtol=1e-9)
    order = rng.permutation(5)
    moved = cvm_portfolio_test(x[:, order], y[:, order], weights=w[:, order], n_null=20, random_state=0)
    np.testing.assert_allclose(moved.p_values, given.p_values, rtol=1e-9)


# Metrics


def test_panel_metrics_equal_their_definitions(rng):
    x, y = market(rng, 1200), market(rng, 1000) * 1.1 + 1e-4
    got = panel_metrics(x, y)
    want = {
        "mean_error_se": np.mean(
            np.abs(y.mean(0) - x.mean(0)) / np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
        ),
        "sd_ratio": np.median(y.std(0) / x.std(0)),
        "sd_ratio_min": min(y.std(0) / x.std(0)),
        "sd_ratio_max": max(y.std(0) / x.std(0)),
        "skewness_error": np.mean(np.abs(stats.skew(y) - stats.skew(x))),
        "kurtosis_ratio": np.median(stats.kurtosis(y, fisher=False) / stats.kurtosis(x, fisher=False)),
        "kurtosis_ratio_portfolio": stats.kurtosis(y.mean(1), fisher=False)
        / stats.kurtosis(x.mean(1), fisher=False),
        "tail_dependence_ratio": lower_tail_dependence(y) / lower_tail_dependence(x),
    }
    for level in (0.1, 1, 5, 95, 99):
        a, b, middle = np.percentile(x, level, axis=0), np.percentile(y, level, axis=0), np.median(x, axis=0)
        want[f"q{level:g}_error"] = np.mean(np.abs(b - a) / np.abs(a - middle))
    a, b = x.mean(1), y.mean(1)
    low = np.quantile(a, 0.01)
    want["q1_error_portfolio"] = abs(np.quantile(b, 0.01) - low) / (np.median(a) - low)
    c, e = np.corrcoef(x.T), np.corrcoef(y.T)
    off = np.abs(e - c)[~np.eye(5, dtype=bool)]
    want |= {"correlation_error": off.mean(), "correlation_max_error": off.max()}
    want["correlation_frobenius"] = np.linalg.norm(e - c) / np.linalg.norm(c)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-9), key


def test_scaled_rows_have_a_known_answer(rng):
    x = market(rng, 500)
    got = panel_metrics(x, 1.3 * (x - x.mean(0)) + x.mean(0))
    for key in ("sd_ratio", "sd_ratio_min", "sd_ratio_max"):
        assert got[key] == pytest.approx(1.3)
    for key in ("kurtosis_ratio", "kurtosis_ratio_portfolio", "tail_dependence_ratio"):
        assert got[key] == pytest.approx(1.0)
    for key in ("mean_error_se", "skewness_error", "correlation_frobenius"):
        assert got[key] == pytest.approx(0.0, abs=1e-9)


def test_permuting_and_rescaling_assets_changes_nothing(rng):
    x, y = market(rng, 300), market(rng, 300)
    order, scale = rng.permutation(5), np.exp(rng.standard_normal(5))
    a, b = panel_metrics(x, y), panel_metrics((x * scale)[:, order], (y * scale)[:, order])
    assert panel_metrics(x[:, order], y[:, order]) == pytest.approx(a, rel=1e-9, nan_ok=True)
    for key in a:
        if "portfolio" not in key:  # equal weights are money weights
            assert b[key] == pytest.approx(a[key], rel=1e-9, nan_ok=True), key
    moved = energy_distance((x * scale)[:, order], (y * scale)[:, order])
    assert moved == pytest.approx(energy_distance(x, y), rel=1e-7)


def test_tail_dependence_against_pairs_and_known_cases(rng):
    x = market(rng, 400)
    total = []
    for u in (0.02, 0.03, 0.04, 0.05):
        k = int(u * 400)
        worst = [set(np.argsort(column)[:k]) for column in x.T]
        total += [len(a & b) / k for a, b in combinations(worst, 2)]
    assert lower_tail_dependence(x) == pytest.approx(np.mean(total))
    one = rng.standard_normal((200, 1))
    assert lower_tail_dependence(np.hstack([one, 3 * one, np.exp(one)])) == 1.0
    # Independent: each of 190 pairs expects u; a count of 20000 u^2 has relative sd under .35.
    free = lower_tail_dependence(rng.standard_normal((20_000, 20)))
    assert free == pytest.approx(0.035, abs=4 * 0.35 * 0.035 / np.sqrt(190))
    assert np.isnan(lower_tail_dependence(one))


def naive_energy(x, y, scale):
    def mean(a, b):
        return np.mean([[np.sqrt((((p - q) / scale) ** 2).sum()) for q in b] for p in a])

    return 1 - (mean(x, x) + mean(y, y)) / (2 * mean(x, y))


def test_energy_distance_equals_the_double_loop(rng):
    x, y = market(rng, 40) + 0.01, market(rng, 25) * 1.4
    assert energy_distance(x, y) == pytest.approx(naive_energy(x, y, x.std(0)), rel=1e-6)
    pool = np.vstack([x, y])
    masks = random_masks(40, 25, 3, rng)
    twin = [naive_energy(pool[k], pool[~k], pool.std(0)) for k in masks]
    np.testing.assert_allclose(energy_null(pool, masks), twin, rtol=1e-6)


def test_energy_distance_of_a_shift_and_of_nothing(rng):
    n, mu = 3000, 1.5
    z = rng.standard_normal((2, n, 1))
    # E|N(mu, 2)| against E|N(0, 2)| = 2/sqrt(pi).
    cross = 2 / np.sqrt(np.pi) * np.exp(-(mu**2) / 4) + mu * special.erf(mu / 2)
    x = (z[0] - z[0].mean()) / z[0].std()
    y = (z[1] - z[1].mean()) / z[1].std() + mu
    assert energy_distance(x, y) == pytest.approx(1 - 2 / np.sqrt(np.pi) / cross, abs=0.005)
    null = [energy_distance(market(rng, 60), market(rng, 90)) for _ in range(60)]
    assert np.mean(null) == pytest.approx((1 / 60 + 1 / 90) / 2, abs=4 * np.std(null) / np.sqrt(60))
    assert energy_distance(x, x) == pytest.approx(0.0, abs=1e-7)


def test_classifier_sees_tails_that_quadratic_features_miss(rng):
    real = market(rng, 1200, nu=3)
    same = classifier_auc(real, market(rng, 1200, nu=3), random_state=0)
    gauss = rng.multivariate_normal(real.mean(0), np.cov(real.T), 1200)
    deviation = 1.4 * np.sqrt(1 / (6 * 1200))
    assert abs(same - 0.5) < 4 * deviation
    assert classifier_auc(real, gauss, random_state=0) > 0.5 + 6 * deviation
    assert classifier_auc(real, real + 1.0, random_state=0) == 1.0


def test_qq_band_covers_the_true_quantile(rng):
    levels, inside = [0, 4, 24, 44], []
    for _ in range(250):
        x = rng.standard_t(4, (150, 1))
        band = qq_data(x, x, n_points=50)
        truth = stats.t(4).ppf(band["probability"])
        low, high = band["real_low"].fillna(-np.inf), band["real_high"].fillna(np.inf)
        inside.append(((low <= truth) & (truth <= high))[levels])
    coverage = np.mean(inside, axis=0)
    # Order statistics are discrete: coverage is at least .95 and not wildly more.
    assert (coverage > 0.95 - 4 * np.sqrt(0.05 * 0.95 / 250)).all()
    assert coverage[2] < 0.995


def test_qq_data_names_and_values(rng):
    frames = [pd.DataFrame(market(rng, 300), columns=list("ABCDE")) for _ in range(2)]
    out = qq_data(*frames, weights=[0.2, 0.8, 0, 0, 0], assets=["C"], n_points=40)
    assert out["series"].unique().tolist() == ["portfolio", "C"]
    first = out[out["series"] == "portfolio"]
    np.testing.assert_allclose(
        first["real"], np.quantile(0.2 * frames[0]["A"] + 0.8 * frames[0]["B"], first["probability"])
    )
    np.testing.assert_allclose(out["synthetic"][40:], frames[1]["C"].quantile(out["probability"][40:]))
    assert (out["real_low"].fillna(-1) <= out["real"]).all()
    assert qq_data(*frames, assets="all", n_points=5)["series"].nunique() == 6
    with pytest.raises(ValueError, match="got 'Z'"):
        qq_data(*frames, assets=["Z"])
    with pytest.raises(ValueError, match=r"shape \(5,\), got \(2,\)"):
        qq_data(*frames, weights=[0.5, 0.5])


# The report


def test_real_rows_are_told_apart_in_one_case_of_twenty():
    runs, p = 60, []
    for seed in range(runs):
        rng = np.random.default_rng(5000 + seed)
        real, scenarios, train = (market(rng, 300) for _ in range(3))
        p.append(validate(real, scenarios, train, n_portfolios=40, n_null=200, random_state=seed).p_value)
    # Splits of few heavy-tailed rows know their tails badly: up to three standard errors above 5 %.
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("with_train", [True, False])
def test_fresh_rows_are_within_the_floor(with_train):
    within, outside = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        real, scenarios, train = (market(rng, 200) for _ in range(3))
        report = validate(real, scenarios, train if with_train else None, random_state=seed, **FAST)
        within.append(report.within_floor)
        outside.append((report.table["verdict"] == "beyond floor").mean())
    assert np.mean(within) >= 0.9
    # Each metric has its own 5 %; metrics and seeds are correlated, so twice that is allowed.
    assert np.mean(outside) < 0.1


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(3)
    real, train, fresh = (market(rng, 500, nu=3) for _ in range(3))
    generators = {
        "fresh": fresh,
        "scaled": 1.3 * fresh,
        "gaussian": rng.multivariate_normal(train.mean(0), np.cov(train.T), 500),
        "shuffled": rng.permuted(fresh, axis=0),
        "copies": train[rng.integers(0, 500, 500)],
    }
    return real, train, generators, judge(real, generators, train, **FAST)


def test_compare_finds_every_fault(table):
    real, *_, judged = table
    out = judged.table
    assert out.index[-1] == FLOOR_ROW
    verdict = out["verdict"].to_dict()
    assert verdict.pop("fresh") == "within floor"
    assert verdict.pop(FLOOR_ROW) == "floor"
    assert set(verdict.values()) == {"beyond floor"}
    assert out.loc["scaled", "sd_ratio"] == pytest.approx(1.3, abs=0.2)
    # Shuffled columns have no correlation left: the error is the size of the real ones.
    size = np.abs(np.corrcoef(real.T)[~np.eye(5, dtype=bool)]).mean()
    assert out.loc["shuffled", "correlation_error"] == pytest.approx(size, abs=0.05)
    assert out.loc["copies", "memorised_fraction"] == 1.0
    assert out.loc["copies", "nn_ratio"] == 0.0
    assert out.loc["gaussian", "nn_ratio"] > 1.05
    assert out.loc["fresh", "nn_ratio"] == pytest.approx(1.0, abs=0.1)


def test_validate_agrees_with_compare_and_repeats_bit_for_bit(table):
    real, train, generators, judged = table
    out = judged.table
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    report = validate(real, generators["copies"], train, **FAST)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    frame = report.to_frame()
    main = [c for c in out.columns if c in frame.index]
    assert len(main) == 10
    np.testing.assert_array_equal(frame.loc[main, "scenarios"], out.loc["copies", main].astype(float))
    np.testing.assert_array_equal(frame.loc[main, "floor"], out.loc[FLOOR_ROW, main].astype(float))
    assert report.to_dict() == judged.reports["copies"].to_dict()
    assert "repeat training rows" in report.verdict
    named = [pd.DataFrame(a, columns=list("ABCDE")) for a in (real, generators["copies"], train)]
    pd.testing.assert_frame_equal(validate(*named, **FAST).to_frame(), frame)


def test_judge_gives_the_table_of_compare_and_reports_that_agree(table):
    real, train, generators, judged = table
    assert isinstance(judged, Comparison)
    pd.testing.assert_frame_equal(judged.table, compare(real, generators, train, **FAST))
    assert list(judged.reports) == list(generators) == list(judged.table.index[:-1])
    for name, report in judged.reports.items():
        row = judged.table.loc[name]
        assert report.within_floor == (row["verdict"] == "within floor")
        assert (report.table["verdict"] == "beyond floor").sum() == row["beyond"]
        assert report.table.loc["c2st_auc", "scenarios"] == row["c2st_auc"]
        # One rule: any metric beyond, the furthest above 1, a p-value of at most 5 %.
        assert (row["beyond"] > 0) == (row["furthest"] > 1) == (row["p_value"] <= 0.05) != report.within_floor
        assert row["furthest"] == report.table["excess"].max() == judged.excess.loc[name].max()
        assert f"p = {row['p_value']:.3f}): {row['beyond']} of" in report.verdict
        # The bound that is shown is the one that judges.
        bad, high = badness(report.table["scenarios"]), badness(report.table["floor_high"])
        told = report.table["excess"] > 1
        assert (bad[told] > high[told]).all()
        kept = report.table["excess"] < 1 - 1e-9
        assert (bad[kept] <= high[kept] + 1e-12).all()


def test_report_is_json_and_its_frame_is_a_copy(table):
    real, _, generators, _ = table
    report = validate(real, generators["fresh"], **FAST)
    frame = report.to_frame()
    assert list(frame.columns) == ["scenarios", "floor", "floor_high", "verdict", "excess"]
    assert frame.loc[["nn_ratio", "memorised_fraction", "kurtosis_ratio"], "verdict"].eq("not judged").all()
    frame.loc[:, "verdict"] = "touched"
    assert "touched" not in set(report.to_frame()["verdict"])
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert back["metrics"]["nn_ratio"]["scenarios"] is None
    assert back["settings"]["rows_real"] == 250
    assert back["cvm"]["rejection_rate"] == report.cvm.rejection_rate


def test_training_rows_of_another_law_are_named(rng):
    train, real = market(rng, 300), 1.6 * market(rng, 300)
    report = validate(real, market(rng, 300), train, **FAST)
    assert "training rows themselves differ" in report.verdict


def test_unequal_sizes_and_a_single_asset(rng):
    x, y, train = market(rng, 120), market(rng, 900), market(rng, 400)
    settings = validate(x, y, train, **FAST).settings
    assert (settings["rows_real"], settings["rows_synthetic"]) == (120, 120)
    frame = validate(x[:, :1], y[:, :1], train[:, :1], **FAST).to_frame()
    pairs = [k for k in frame.index if k.startswith(("correlation", "tail"))]
    assert frame.loc[pairs, "scenarios"].isna().all()
    assert frame.loc[pairs, "verdict"].eq("not judged").all()
    assert frame.loc["sd_ratio", "verdict"] == "within floor"


def test_scenarios_that_never_move_are_judged_not_crashed(rng):
    x, still = market(rng, 100), market(rng, 100)
    still[:, 0] = 0.0
    report = validate(x, still, market(rng, 100), **FAST)
    assert not report.within_floor
    assert report.table.loc["sd_ratio_min", "verdict"] == "beyond floor"
    json.dumps(report.to_dict(), allow_nan=False)


# Tails


PAIR = {"one": np.eye(5)[0], "all": np.full(5, 0.2)}


def again(rng, rows, m):
    """m rows drawn with replacement: the perfect copy of what a generator was shown."""
    return rows[rng.integers(len(rows), size=m)]


@pytest.mark.parametrize("fitted", [True, False])
def test_tail_test_keeps_its_level_with_heavy_tails_and_shared_portfolios(rng, fitted):
    runs, found = 150, []
    for k in range(runs):
        real, train = market(rng, 200, nu=3), market(rng, 400, nu=3) if fitted else None
        scenarios = again(rng, train, 2000) if fitted else market(rng, 600, nu=3)
        found.append(tail_test(real, scenarios, PAIR, (0.02, 0.05), train=train, n_null=100, random_state=k))
    rate = np.mean([t.p_value <= 0.05 for t in found])
    size = 5 / 101
    assert rate == pytest.approx(size, abs=3 * np.sqrt(size * (1 - size) / runs))
    assert all((t.outside > 0) == (t.p_value <= 0.05) for t in found)


def test_tails_cut_by_a_quarter_are_found_beside_the_error_of_training(rng):
    found = []
    for k in range(30):
        real, train = market(rng, 3000), market(rng, 7000)
        size = np.sqrt((train**2).mean(axis=1))
        limit = np.quantile(size, 0.85)
        thin = train * np.where(size > limit, (limit + 0.02 * (size - limit)) / size, 1.0)[:, None]
        test = tail_test(real, again(rng, thin, 10_000), PAIR, train=train, n_null=100, random_state=k)
        found.append(test.together.loc["ES"])
    assert np.mean([es["gap"] for es in found]) == pytest.approx(-0.25, abs=0.05)
    assert np.mean([es["gap"] < es["low"] for es in found]) > 0.7


@pytest.mark.parametrize("tick", [0.005, 0.02])
def test_ticks_leave_bounds_of_the_size_of_the_figures(rng, tick):
    def ticks(x):
        return tick * np.round(x / tick)

    found = []
    for k in range(20):
        real, train = ticks(market(rng, 900)), market(rng, 2100)
        made = ticks(again(rng, 1.3 * train, 10_000))
        test = tail_test(real, made, PAIR, train=ticks(train), n_null=100, random_state=k)
        for table in (test.figures, test.together.drop(columns="understated")):
            assert table.abs().max(axis=None) < 10
        assert (test.outside > 0) == (test.p_value <= 0.05)
        found.append(test.outside > 0)
    assert np.mean(found) > 0.7


def test_a_figure_that_no_split_moves_is_not_judged(rng):
    """Losses of one size: VaR and ES of every split are that size, and chance has no spread to judge by."""
    still = np.where(rng.uniform(size=(2000, 2)) < 0.5, -0.01, 0.01)
    test = tail_test(still[:600], 1.5 * still, {"one": [1, 0]}, train=still[600:], n_null=50)
    np.testing.assert_allclose(test.figures[["VaR low", "VaR high", "ES low", "ES high"]], 0, atol=1e-12)
    np.testing.assert_allclose(test.figures[["VaR gap", "ES gap"]], 0.5)
    assert (test.outside, test.p_value) == (0, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.2, np.nan, 0, 0, 0], "portfolio 'odd', got NaN or infinity"),
        ([0.0] * 5, "portfolio 'odd', got zeros only"),
        ([0.5, 0.5], r"expected 5 finite weights.*got shape \(2,\)"),
        (
            pd.Series(0.25, list("ABCD")),
            "one weight for each of the 5 assets in portfolio 'odd', got none for 'E'",
        ),
        (pd.Series(0.2, list("ABCDEF")), "got 6 weights"),
    ],
)
def test_weights_that_make_no_portfolio_are_refused(rng, weights, message):
    rows = pd.DataFrame(market(rng, 100), columns=list("ABCDE"))
    with pytest.raises(ValueError, match=message):
        tail_test(rows, rows, {"odd": weights}, (0.05,), n_null=20)


def test_tail_gaps_are_those_of_the_risk_table_and_thin_tails_are_found(rng):
    real = pd.DataFrame(market(rng, 1500, nu=3), columns=list("ABCDE"))
    thin = pd.DataFrame(rng.multivariate_normal(real.mean(), real.cov(), 4000), columns=list("ABCDE"))
    pair = {"one": pd.Series(np.eye(5)[0], list("ABCDE")), "all": np.full(5, 0.2)}
    test, table = tail_test(real, thin, pair, n_null=200), tail_risk_table(real, thin, pair)
    for short in ("VaR", "ES"):
        gap = table[f"{short} scenarios"] / table[f"{short} real"] - 1
        np.testing.assert_allclose(test.figures[f"{short} gap"], gap, rtol=1e-9)
        total = table[f"{short} scenarios"].sum() / table[f"{short} real"].sum() - 1
        assert test.together.loc[short, "gap"] == pytest.approx(total)
        assert test.together.loc[short, "understated"] == (gap < 0).sum()
    assert test.p_value == pytest.approx(1 / 201)
    assert test.together.loc["ES", "gap"] < test.together.loc["ES", "low"]
    with pytest.raises(ValueError, match="got 0, 2 and 1000"):
        tail_test(real, thin, {})


@pytest.mark.parametrize("fitted", [True, False])
def test_error_of_joint_crashes_covers_one(rng, fitted):
    """The log ratio over its standard error is about a standard normal, for draws of the law or of training rows."""
    z = []
    for seed in range(60):
        x, train = market(rng, 400), market(rng, 800)
        y = again(rng, train, 3000) if fitted else market(rng, 800)
        error = joint_crashes(x, y, train=train if fitted else None, n_boot=60, random_state=seed)
        part = y[:400] if fitted else y
        ratio = np.mean([lower_tail_dependence(rng.permutation(y)[: len(part)]) for _ in range(8)])
        z.append(np.log(ratio / lower_tail_dependence(x)) / error)
    assert 0.6 < np.std(z) < 1.35
    assert np.mean(np.abs(z) > 1.96) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)
    assert np.isnan(joint_crashes(x[:, :1], y[:, :1]))
    assert np.isnan(joint_crashes(x, y, train=train[:40]))


def test_refusals(rng):
    x = pd.DataFrame(market(rng, 60), columns=list("ABCDE"))
    y = x.copy()
    y.iloc[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"finite numbers in synthetic, got 1 .* column 'B'"):
        validate(x, y)
    with pytest.raises(ValueError, match="at least 20 rows in real, got 2"):
        validate(x.iloc[:2], x)
    with pytest.raises(ValueError, match=r"got 15 real .* halved"):
        validate(x.iloc[:30], x)
    with pytest.raises(ValueError, match="got 'E' for 'A' at position 0"):
        validate(x, x[list("EBCDA")])
    with pytest.raises(ValueError, match="5 columns of real, got 4"):
        validate(x, x.iloc[:, :4])
    with pytest.raises(ValueError, match="constant column 'C'"):
        validate(x.assign(C=0.1), x)
    with pytest.raises(ValueError, match="n_null >= 20, got 3"):
        validate(x, x, n_null=3)
    with pytest.raises(ValueError, match="never saw"):
        validate(x, market(rng, 60), x, **FAST)
    with pytest.raises(ValueError, match="at least one generator"):
        compare(x, {})
    with pytest.raises(ValueError, match="both sizes or none"):
        cvm_p_value(0.3, 10)
    with pytest.raises(ValueError, match="weights for 5 assets, got 4"):
        cvm_portfolio_test(x, x, weights=np.ones((3, 4)))

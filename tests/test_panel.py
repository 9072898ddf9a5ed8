"""Panels: every bad input is named, clean panels are left alone, scaling is an exact inverse pair."""

import inspect
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf
from sklearn.exceptions import NotFittedError

from finediff.panel import (
    Finding,
    PanelWarning,
    Standardizer,
    check_panel,
    heuristic_warnings,
    load_prices,
    random_split,
    split,
    to_returns,
)

N, D = 300, 4


def returns(n=N, d=D, seed=0, df=None):
    """A clean panel of daily returns: Gaussian, or Student t of unit variance with df degrees of freedom."""
    rng = np.random.RandomState(seed)
    noise = rng.standard_normal((n, d)) if df is None else rng.standard_t(df, (n, d)) / np.sqrt(df / (df - 2))
    index = pd.bdate_range("2020-01-01", periods=n, name="Date")
    return pd.DataFrame(0.0004 + 0.012 * noise, index=index, columns=list("ABCDEFGHIJKLMNOPQRST")[:d])


def prices(**options):
    return 50 * (1 + returns(**options)).cumprod()


def put(frame, rows, column, value):
    frame = frame.copy()
    frame.iloc[rows, frame.columns.get_loc(column)] = value
    return frame


def times(frame, rows, column, factor):
    frame = frame.copy()
    frame.iloc[rows, frame.columns.get_loc(column)] *= factor
    return frame


def stale(frame, run=6, jump=0.2):
    return put(put(frame, slice(50, 50 + run), "B", 0.0), 50 + run, "B", jump)


def text_column(value):
    frame = returns().astype({"B": object})
    frame.iloc[7, 1] = value
    return frame


def with_index(index):
    frame = returns(n=len(index))
    frame.index = index
    return frame


def mixed_zones():
    utc = list(pd.bdate_range("2020-01-01", periods=N, tz="UTC"))
    return with_index(pd.Index([*utc[:-1], utc[-1].tz_convert("Asia/Tokyo")], dtype=object))


def naive_and_aware():
    dates = list(pd.bdate_range("2020-01-01", periods=N))
    return with_index(pd.Index([*dates[:-1], dates[-1].tz_localize("UTC")], dtype=object))


def shuffled(frame):
    return frame.iloc[np.random.RandomState(1).permutation(len(frame))]


DAY7 = "2020-01-10"
BAD_PANELS = [
    # name, frame, kind, code, column, fragment of the message
    ("no rows", lambda: returns().iloc[:0], "returns", "empty", None, "0 rows"),
    ("no columns", lambda: returns()[[]], "returns", "empty", None, "0 columns"),
    ("nothing", pd.DataFrame, "prices", "empty", None, "empty"),
    ("prices", prices, "returns", "prices_as_returns", None, "A, B, C, D"),
    ("one price", lambda: returns().assign(B=prices()["B"]), "returns", "prices_as_returns", "B", "B."),
    ("percent", lambda: returns() * 100, "returns", "returns_in_percent", None, "117% a period"),
    ("twice a date", lambda: returns().iloc[[0, 1, 1, *range(2, N)]], "returns", "duplicate_dates", None,
     "2020-01-02"),
    ("shuffled", lambda: shuffled(returns()), "returns", "unsorted_dates", None, "leak the future"),
    ("newest first", lambda: prices().iloc[::-1], "prices", "unsorted_dates", None, "not in order"),
    ("twice a name", lambda: returns().set_axis(list("ABBC"), axis=1), "returns", "duplicate_columns", "B",
     "2 columns"),
    ("one gap", lambda: put(returns(), 7, "B", np.nan), "returns", "missing_values", "B", DAY7),
    ("many gaps", lambda: put(prices(), [7, 9, 90], "B", np.nan), "prices", "missing_values", "B",
     "lacks 3 of 300"),
    ("no value", lambda: put(returns(), slice(None), "B", np.nan), "returns", "missing_values", "B",
     "no value at all"),
    ("pct_change", lambda: prices().pct_change(), "returns", "missing_values", None, "2020-01-01"),
    ("late", lambda: put(prices(), slice(0, 100), "B", np.nan), "prices", "late_listing", "B",
     "lose 100 of 300 (33%)"),
    ("early", lambda: put(returns(), slice(240, None), "B", np.nan), "returns", "early_delisting", "B",
     "lose 60 of 300 (20%)"),
    ("nullable", lambda: put(returns().astype("Float64"), 7, "B", pd.NA), "returns", "missing_values", "B",
     DAY7),
    ("constant", lambda: put(returns(), slice(None), "B", 0.1), "returns", "constant_column", "B",
     "constant"),
    ("flat price", lambda: put(prices(), slice(None), "B", 7.0), "prices", "constant_column", "B",
     "constant"),
    ("stale", lambda: stale(returns()), "returns", "stale_prices", "B", "6 periods from 2020-03-11"),
    ("stale price", lambda: (1 + stale(returns())).cumprod(), "prices", "stale_prices", "B", "20.0%"),
    ("filled forward", lambda: put(returns(), slice(250, None), "B", 0.0), "returns", "stale_prices", "B",
     "up to the last row"),
    ("filled back", lambda: put(returns(), slice(0, 40), "B", 0.0), "returns", "stale_prices", "B",
     "40 periods"),
    ("inf", lambda: put(returns(), 7, "B", np.inf), "returns", "infinite_values", "B", DAY7),
    ("minus inf", lambda: put(prices(), 7, "B", -np.inf), "prices", "infinite_values", "B", "-inf"),
    ("text", lambda: text_column("n/a"), "returns", "non_numeric_column", "B", f"'n/a' at {DAY7}"),
    ("a list", lambda: text_column([1.0]), "returns", "non_numeric_column", "B", "[1.0]"),
    ("all text", lambda: returns().assign(B="x"), "prices", "non_numeric_column", "B", "'x'"),
    ("booleans", lambda: returns().assign(B=True), "returns", "non_numeric_column", "B", "True"),
    ("dates within", lambda: returns().assign(B=returns().index), "returns", "non_numeric_column", "B",
     "Timestamp"),
    ("4 rows", lambda: returns(n=4), "returns", "few_rows", None, "at least 50 returns"),
    ("wide", lambda: pd.concat([returns(n=60, d=20).add_suffix(k) for k in "01"], axis=1), "returns",
     "few_rows", None, "at least 80 returns"),
    ("1 row", lambda: returns(n=1), "returns", "few_rows", None, "got 1"),
    ("1 price", lambda: prices(n=1), "prices", "few_rows", None, "got 0"),
    ("one asset", lambda: returns(d=1), "returns", "one_asset", None, "no dependence"),
    ("zones", mixed_zones, "returns", "mixed_time_zones", None, "Asia/Tokyo"),
    ("naive, aware", naive_and_aware, "prices", "mixed_time_zones", None, "none"),
    ("numbered", lambda: returns().reset_index(drop=True), "returns", "non_date_index", None, "int64"),
    ("text dates", lambda: with_index(returns().index.astype(str)), "returns", "non_date_index", None,
     "labels"),
    ("no date", lambda: with_index(returns().index.where(np.arange(N) != 3)), "returns", "non_date_index",
     None, "1 missing"),
    ("tuples", lambda: returns().set_index([returns().index, np.arange(N)]), "returns", "non_date_index",
     None, "object"),
    ("below -100 %", lambda: put(returns(), 7, "B", -1.5), "returns", "extreme_returns", "B", "-1.5 at"),
    ("negative price", lambda: put(prices(), 7, "B", -5.0), "prices", "non_positive_price", "B", DAY7),
    ("price x 100", lambda: times(prices(), 7, "B", 100), "prices", "price_spike", "B", f"at {DAY7} and back to"),
    ("return x 100", lambda: times(prices(), 7, "B", 100).pct_change().iloc[1:], "returns", "price_spike", "B",
     f"at {DAY7} and back by -99"),
    ("ten days in pence", lambda: times(prices(), slice(7, 17), "B", 100), "prices", "price_spike", "B",
     f"at {DAY7} and back to"),
    ("reverse split", lambda: times(prices(), slice(90, None), "B", 10), "prices", "level_shift", "B",
     "2020-05-06 and stays there: multiplied by 10"),
    ("a new unit", lambda: times(prices(), slice(90, None), "B", 0.01), "prices", "level_shift", "B",
     "divided by 100"),
    ("last x 100", lambda: times(prices(), -1, "B", 100), "prices", "level_shift", "B", "the last row"),
    ("zero price", lambda: put(prices(), 7, "B", 0.0), "prices", "non_positive_price", "B", "holds 0"),
]  # fmt: skip


WARNINGS = {"one_asset", "few_rows", "non_date_index", "late_listing", "early_delisting", "constant_column"}
WARNINGS |= {"stale_prices", "level_shift"}


@pytest.mark.parametrize(
    ("frame", "kind", "code", "column", "fragment"),
    [row[1:] for row in BAD_PANELS],
    ids=[row[0] for row in BAD_PANELS],
)
def test_check_panel_names_what_is_wrong(frame, kind, code, column, fragment):
    found = check_panel(frame(), kind=kind)
    match = [f for f in found if f.code == code]
    assert len(match) == 1, [str(f) for f in found]
    assert match[0].column == column
    assert match[0].severity == ("warning" if code in WARNINGS and len(frame()) > 1 else "error")
    assert fragment in match[0].message
    assert match[0].remedy
    assert "\n" not in str(match[0])
    ranks = [(f.severity, f.column is not None, f.column or "") for f in found]
    assert ranks == sorted(ranks)


ALONE = {
    "tuples",
    "nothing",
    "price x 100",
    "return x 100",
    "ten days in pence",
    "reverse split",
    "last x 100",
    "filled back",
    "filled forward",
    "stale",
    "percent",
    "prices",
    "zones",
    "late",
    "inf",
}


@pytest.mark.parametrize("row", [row for row in BAD_PANELS if row[0] in ALONE], ids=lambda row: row[0])
def test_one_fault_gives_one_finding(row):
    assert [f.code for f in check_panel(row[1](), kind=row[2])] == [row[3]]


@pytest.mark.parametrize("kind", ["returns", "prices"])
@pytest.mark.parametrize("df", [None, 3])
def test_clean_panels_give_no_findings(kind, df):
    for seed in range(5):
        panel = returns(n=1000, d=10, seed=seed, df=df)
        assert check_panel(panel if kind == "returns" else 50 * (1 + panel).cumprod(), kind=kind) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heuristic_warnings(panel.to_numpy(), panel.columns)


def test_odd_but_sound_panels_give_no_findings():
    rng = np.random.RandomState(0)
    cash = 1e-4 + 1e-5 * np.sin(np.arange(N) / 50)
    assert check_panel(returns().assign(CASH=cash)) == []
    illiquid = returns()["B"].where(rng.uniform(size=N) > 0.15, 0.0)
    assert check_panel(returns().assign(B=illiquid)) == []
    annual = returns() * 30
    assert annual.min().min() > -1.2
    assert check_panel(annual.clip(lower=-1)) == []
    assert check_panel(returns().set_index(returns().index.to_period("D"))) == []
    assert check_panel(returns().tz_localize("UTC")) == []
    assert check_panel(returns().astype(object)) == []


def test_bundled_panel_has_one_known_flaw():
    panel = to_returns(load_prices("sp500"))
    assert panel.shape == (8312, 20)
    assert [(f.code, f.column) for f in check_panel(panel)] == [("stale_prices", "RRC")]
    assert check_panel(panel.iloc[-2520:]) == []
    assert [f.code for f in check_panel(load_prices("sp500"))] == ["prices_as_returns"]


SP500 = load_prices("sp500")


@settings(deadline=None, max_examples=60)
@given(
    row=st.integers(1, len(SP500) - 2),
    name=st.sampled_from(list(SP500.columns)),
    factor=st.sampled_from([100, 10, 0.1, 0.01]),
    kind=st.sampled_from(["prices", "returns"]),
)
def test_a_slipped_decimal_point_is_found_wherever_it_is(row, name, factor, kind):
    panel = times(SP500, row, name, factor)
    panel = panel if kind == "prices" else panel.pct_change().iloc[1:]
    found = [f for f in check_panel(panel, kind) if f.code != "stale_prices"]
    assert [(f.code, f.column, f.date) for f in found] == [("price_spike", name, SP500.index[row])]


def test_a_mistyped_price_is_found_beside_gaps_and_other_mistakes():
    panel = times(times(prices(), 100, "B", 100), 120, "B", 0.1)
    panel = put(put(panel, slice(95, 100), "B", np.nan), slice(101, 110), "B", np.nan)
    panel = times(panel, 200, "C", 2.5)
    found = [f for f in check_panel(panel, "prices") if f.code == "price_spike"]
    dates = panel.index
    assert [(f.severity, f.column, f.date) for f in found] == [
        ("error", "B", dates[100]),
        ("warning", "C", dates[200]),
    ]
    assert "(price spikes: 2)" in found[0].message
    beside = times(prices(), 100, "B", 100)
    beside = put(beside, 101, "B", np.nan)
    gapped = beside.pct_change(fill_method=None).iloc[1:]  # the way back is lost: only the leap is seen
    assert "level_shift" in [f.code for f in check_panel(gapped)]


def test_real_moves_are_no_mistyped_prices():
    crash = 50 * (1 + put(put(returns(), 100, "B", -0.65), 101, "B", 0.3)).cumprod()
    assert check_panel(crash, "prices") == []
    rng = np.random.RandomState(5)
    cents = np.where(rng.uniform(size=N) < 0.1, 0.02, 0.01)  # a tick doubles the price
    assert "price_spike" not in [f.code for f in check_panel(prices().assign(B=cents), "prices")]
    wild = np.maximum(0.03 / np.sqrt(3) * rng.standard_t(3, (2000, 100)), -0.95)
    assert check_panel(pd.DataFrame(wild, pd.bdate_range("2010-01-01", periods=2000))) == []
    shocks, garch, h = rng.standard_t(5, (2000, 50)) * np.sqrt(0.6), [], np.full(50, 9e-4)
    for shock in shocks:
        garch.append(np.sqrt(h) * shock)
        h = 2e-5 + 0.12 * garch[-1] ** 2 + 0.86 * h
    codes = {f.code for f in check_panel(pd.DataFrame(garch))}
    assert not codes & {"price_spike", "level_shift"}


cells = st.one_of(
    st.floats(), st.none(), st.text(max_size=3), st.booleans(), st.integers(), st.just(pd.NaT), st.just([1])
)
labels = st.one_of(
    st.text(max_size=3), st.integers(), st.none(), st.datetimes(), st.just(pd.Timestamp.now("UTC"))
)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["returns", "prices"]))
def test_check_panel_never_crashes(data, kind):
    n, d = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 3))
    columns = data.draw(st.lists(labels, min_size=d, max_size=d))
    index = pd.Index(data.draw(st.lists(labels, min_size=n, max_size=n)), dtype=object)
    frame = pd.DataFrame(
        [data.draw(st.lists(cells, min_size=d, max_size=d)) for _ in range(n)],
        index=index,
        columns=pd.Index(columns, dtype=object),
        dtype=object,
    )
    for candidate in (frame, frame.infer_objects()):
        assert all(isinstance(f, Finding) and str(f) for f in check_panel(candidate, kind=kind))


def test_check_panel_leaves_its_argument_alone():
    frame = put(returns(), 7, "B", np.inf)
    before = frame.copy()
    check_panel(frame)
    pd.testing.assert_frame_equal(frame, before)


# ---------------------------------------------------------------------------------- warnings for fit


@pytest.mark.parametrize(
    ("X", "fragment"),
    [
        (prices().to_numpy(), "look like prices"),
        (returns().to_numpy() * 100, "look like per cent"),
        (stale(returns()).to_numpy(), "does not move for 6 periods"),
        (returns(n=20).to_numpy(), "at least 50 returns"),
        (put(put(returns(), 7, "B", 99.0), 8, "B", -0.99).to_numpy(), "as a mistyped price does"),
        (put(prices(), slice(0, 9), "B", np.nan).to_numpy(), "look like prices"),
    ],
)
def test_heuristic_warnings(X, fragment):
    with pytest.warns(PanelWarning, match=fragment) as caught:
        heuristic_warnings(X, list("ABCD"), stacklevel=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_heuristic_warnings_say_once_what_holds_for_many():
    X = np.tile(stale(returns())[["B"]].to_numpy(), (1, 9))
    with pytest.warns(PanelWarning, match="Likewise b, c, d, e, f and 3 more") as caught:
        heuristic_warnings(X, list("abcdefghi"))
    assert len(caught) == 1


def test_heuristic_warnings_number_the_assets_without_names():
    with pytest.warns(PanelWarning, match="Column 1 does not move"):
        heuristic_warnings(stale(returns()).to_numpy())


def test_heuristic_warnings_survive_anything():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PanelWarning)
        for X in (
            np.full((9, 2), np.nan),
            np.full((9, 2), np.inf),
            np.zeros((0, 2)),
            np.full((60, 2), 1e308),
        ):
            heuristic_warnings(X, ["A", "B"])


def test_stale_detection_agrees_with_a_loop():
    rng = np.random.RandomState(3)
    X = np.where(rng.uniform(size=(2000, 6)) < 0.5, 0.0, rng.standard_t(3, (2000, 6)) * 0.01)
    for j, name in enumerate("ABCDEF"):
        x = X[:, j]
        median, spells, length = np.median(np.abs(x[x != 0])), 0, 0
        for i, value in enumerate(x):
            spells += (
                length >= 5 and value != 0 and (abs(value) > 3 * median or (i == length and length >= 20))
            )
            length = length + 1 if value == 0 else 0
        spells += length >= 20
        found = [f for f in check_panel(pd.DataFrame(X, columns=list("ABCDEF"))) if f.column == name]
        assert spells > 0
        assert f"(spells of this kind: {spells})" in found[0].message


# ---------------------------------------------------------------------------------- returns and splits


def test_returns_compound_back_to_prices():
    P = prices()
    R = to_returns(P)
    assert R.shape == (N - 1, D)
    assert R.index.equals(P.index[1:])
    np.testing.assert_allclose(P.iloc[0] * (1 + R).prod(), P.iloc[-1], rtol=1e-12)
    np.testing.assert_allclose(to_returns(P * [1, 2, 3, 1e6]), R, rtol=0, atol=1e-14)
    R.iloc[0, 0] = 0.0


BAD_PRICES = [
    (lambda: returns().to_numpy(), {}, TypeError, "expected a DataFrame"),
    (prices, {"missing": "zero"}, ValueError, "drop_rows"),
    (lambda: prices(n=1), {}, ValueError, "two rows"),
    (lambda: prices()[[]], {}, ValueError, "one column"),
    (
        lambda: put(prices(), [7, 9], "B", np.nan),
        {},
        ValueError,
        f"2 missing in column B, the first at {DAY7}",
    ),
    (lambda: put(put(prices(), 3, "A", np.nan), 3, "C", np.nan), {}, ValueError, "1 other columns"),
    (lambda: put(prices(), 7, "B", 0.0), {}, ValueError, f"positive prices, got 0 in column B at {DAY7}"),
    (lambda: put(prices(), 7, "B", -1.0), {"missing": "keep"}, ValueError, "got -1 in column B"),
    (lambda: put(prices(), 7, "B", np.inf), {}, ValueError, f"finite prices, got inf in column B at {DAY7}"),
    (lambda: prices().assign(B="x"), {}, ValueError, "column B, got 'x'"),
    (lambda: prices().iloc[::-1], {}, ValueError, "unsorted"),
    (lambda: prices().iloc[[0, 0, 1]], {}, ValueError, "repeated"),
    (lambda: put(prices(), slice(None), "B", np.nan), {"missing": "drop_rows"}, ValueError, "got none"),
    (lambda: prices()[["B"]] * np.nan, {"missing": "drop_assets"}, ValueError, "got none"),
]


@pytest.mark.parametrize(("frame", "options", "error", "fragment"), BAD_PRICES)
def test_to_returns_refuses(frame, options, error, fragment):
    with pytest.raises(error, match=fragment.replace("(", r"\(")):
        to_returns(frame(), **options)


def test_missing_policies_keep_what_they_say():
    P, full = put(prices(), 7, "B", np.nan), to_returns(prices())
    kept = to_returns(P, missing="keep")
    assert list(np.flatnonzero(kept["B"].isna())) == [6, 7]
    pd.testing.assert_frame_equal(kept.drop(columns="B"), full.drop(columns="B"))
    pd.testing.assert_frame_equal(to_returns(P, missing="drop_rows"), full.drop(full.index[[6, 7]]))
    pd.testing.assert_frame_equal(to_returns(P, missing="drop_assets"), full.drop(columns="B"))
    for policy in ("error", "keep", "drop_rows", "drop_assets"):
        pd.testing.assert_frame_equal(to_returns(prices(), missing=policy), full)


def test_dropping_many_rows_is_not_silent():
    with pytest.warns(PanelWarning, match="dropped 100 of 299 rows, because B lacks 100"):
        R = to_returns(put(prices(), slice(0, 100), "B", np.nan), missing="drop_rows")
    assert len(R) == 199


def test_split_is_chronological_and_complete():
    panel = returns()
    for held_out, size in ((0.2, 60), (0.5, 150), (panel.index[200], 100), ("2020-01-04", N - 3)):
        train, test = split(panel, held_out)
        assert train.index[-1] < test.index[0]
        assert len(test) == size
        pd.testing.assert_frame_equal(pd.concat([train, test]), panel, check_freq=False)
    assert len(split(panel.tz_localize("UTC"), "2020-01-04")[0]) == 3
    assert len(split(panel.reset_index(drop=True), 0.1)[1]) == 30


def test_random_split_is_complete_ordered_and_repeatable():
    panel = returns()
    train, test = random_split(panel, 0.3, random_state=4)
    assert (len(train), len(test)) == (210, 90)
    assert train.index.is_monotonic_increasing
    assert test.index.is_monotonic_increasing
    pd.testing.assert_frame_equal(pd.concat([train, test]).sort_index(), panel, check_freq=False)
    pd.testing.assert_frame_equal(test, random_split(panel, 0.3, random_state=np.random.RandomState(4))[1])
    assert not test.equals(random_split(panel, 0.3, random_state=5)[1])


@pytest.mark.parametrize(
    ("function", "panel", "held_out", "error", "fragment"),
    [
        (split, returns().to_numpy(), 0.2, TypeError, "DataFrame"),
        (split, returns(), 1, ValueError, "between 0 and 1"),
        (split, returns(), True, ValueError, "between 0 and 1"),
        (split, returns(), 0.0001, ValueError, "both parts"),
        (split, returns(), "soon", ValueError, "'soon'"),
        (split, returns(), None, ValueError, "expected"),
        (split, returns(), "2020-01-01", ValueError, "after 2020-01-01"),
        (split, returns(), "2030-01-01", ValueError, "both parts need a row"),
        (split, returns(), pd.Timestamp("2020-03-01", tz="UTC"), ValueError, "time zone"),
        (split, returns().iloc[::-1], 0.2, ValueError, "unsorted"),
        (split, returns().reset_index(drop=True), "2020-03-01", ValueError, "index of dates"),
        (random_split, returns(), "2020-03-01", ValueError, "fraction"),
        (random_split, returns(n=1), 0.5, ValueError, "both parts"),
        (random_split, [1, 2], 0.5, TypeError, "DataFrame"),
    ],
)
def test_splits_refuse(function, panel, held_out, error, fragment):
    with pytest.raises(error, match=fragment):
        function(panel, held_out)


# ---------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_files_round_trip(tmp_path, suffix):
    P, path = put(prices(), 7, "B", np.nan), tmp_path / f"panel{suffix}"
    P.to_parquet(path) if suffix == ".parquet" else P.to_csv(path)
    for source in (path, str(path)):
        loaded = load_prices(source)
        pd.testing.assert_frame_equal(loaded, P, check_freq=False, check_index_type=False, rtol=1e-15)
    part = load_prices(path, start="2020-02-03", end="2020-02-28")
    assert (part.index[0], part.index[-1]) == (pd.Timestamp("2020-02-03"), pd.Timestamp("2020-02-28"))


def test_a_file_is_given_as_it_stands(tmp_path):
    shuffled(prices()).to_csv(tmp_path / "a.csv")
    assert [f.code for f in check_panel(load_prices(tmp_path / "a.csv"), "prices")] == ["unsorted_dates"]
    prices().reset_index().to_parquet(tmp_path / "b.parquet")
    assert (load_prices(tmp_path / "b.parquet").index == prices().index).all()
    (tmp_path / "c.csv").write_text("Date,A\n20240102,1\n20240103,2\n")
    assert load_prices(tmp_path / "c.csv").index[1] == pd.Timestamp("2024-01-03")
    (tmp_path / "d.csv").write_text("Date,A\n2024-01-02T23:00:00-05:00,1\n2024-01-03T23:00:00-05:00,2\n")
    assert load_prices(tmp_path / "d.csv", start="2024-01-03").shape == (1, 1)


BAD_FILES = [
    ("gone.csv", None, "no such file"),
    ("a.csv", b"", "cannot be read"),
    ("b.csv", b"Date,A\n2020-01-01,1\n2020-01-02,1,2,3\n", "cannot be read"),
    ("c.csv", b"\xff\xfe\x00\x01", "cannot be read"),
    ("d.csv.gz", b"not gzip", "cannot be read"),
    ("e.parquet", b"not parquet", "cannot be read"),
    ("f.csv", b"Date,A\n2020-01-01,x\n2020-01-02,y\n", "no numeric column among: A"),
    ("g.csv", b"Date,A\n", "no numeric column"),
    ("h.csv", b"Date,A\n2020-01-01,1\nsoon,2\n", "got the date 'soon' in data row 2"),
    ("i.csv", b",A\n0,1\n1,2\n", "got the number 0 for a date"),
    ("j.csv", b"Date,A\n01/02/2020,1\n13/02/2020,2\n", "'13/02/2020' in data row 2"),
    ("k.csv", b"Date,A\n2020-01-01T00:00:00+01:00,1\n2020-07-01T00:00:00+02:00,2\n", "several time zones"),
    ("l.csv", b"Date,A\n,1\n2020-01-02,2\n", "data row 1"),
    ("m.xlsx", b"", "expected a file ending in .csv"),
    ("folder.csv", "folder", "no such file"),
]


@pytest.mark.parametrize(("name", "content", "fragment"), BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_unreadable_files_are_one_clear_error(tmp_path, name, content, fragment):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match="expected") as caught:
            load_prices(source)
        assert fragment in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"start": "soon"}, "date for start, got 'soon'"),
        ({"end": ""}, "date for end"),
        ({"start": "2030-01-01"}, "the source has 1990-01-02 to 2022-12-28"),
        ({"source": ""}, "at least one ticker"),
        ({"source": []}, "at least one ticker"),
        ({"source": 7}, "got 7"),
        ({"source": [7]}, "got \\[7\\]"),
    ],
)
def test_load_prices_refuses(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        load_prices(**options)


# ---------------------------------------------------------------------------------- Yahoo, replaced


def answer(tickers, group_by="column"):
    """A frame laid out as yfinance lays it out."""
    closes = prices(d=len(tickers)).set_axis(sorted(tickers), axis=1)
    frame = pd.concat({"Close": closes, "High": closes * 1.01, "Volume": closes * 0 + 1e6}, axis=1)
    frame.columns.names = ["Price", "Ticker"]
    return frame if group_by == "column" else frame.swaplevel(axis=1).sort_index(axis=1)


@pytest.fixture
def yahoo(monkeypatch):
    """Replaces yfinance; `reply` is what it answers, `calls` the keywords of each call."""
    stub = types.SimpleNamespace(calls=[], reply=None)

    def download(tickers, **options):
        stub.calls.append({"tickers": tickers, **options})
        return stub.reply

    monkeypatch.setitem(sys.modules, "yfinance", types.SimpleNamespace(download=download))
    return stub


@pytest.mark.parametrize("group_by", ["column", "ticker"])
def test_fetch_flattens_caches_and_asks_once(yahoo, tmp_path, group_by):
    yahoo.reply = answer(["SPY", "^GSPC", "BRK-B"], group_by)
    options = {"start": "2020-01-01", "end": "2020-03-31", "cache": tmp_path}
    panel = load_prices("spy, ^GSPC,BRK-B", **options)
    assert list(panel.columns) == ["SPY", "^GSPC", "BRK-B"]
    assert panel.columns.name is None
    np.testing.assert_array_equal(
        panel["SPY"], yahoo.reply.xs("SPY", level="Ticker", axis=1)["Close"][: len(panel)]
    )
    assert panel.index[-1] == pd.Timestamp("2020-03-31")
    assert (yahoo.calls[0]["start"], yahoo.calls[0]["end"]) == ("2020-01-01", "2020-04-01")
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]
    assert next(tmp_path.iterdir()).name.startswith("BRKB-SPY-GSPC-2020-2020-")

    again = load_prices(["BRK-B", "SPY", "^GSPC"], **options)
    assert len(yahoo.calls) == 1
    pd.testing.assert_frame_equal(again, panel[["BRK-B", "SPY", "^GSPC"]], check_freq=False)
    load_prices(["BRK-B", "SPY", "^GSPC"], refresh=True, **options)
    assert len(yahoo.calls) == 2
    load_prices(["BRK-B", "SPY", "^GSPC"], cache=tmp_path)
    assert len(yahoo.calls) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_fetch_of_one_ticker_with_one_level_of_columns(yahoo, tmp_path):
    yahoo.reply = answer(["SPY"]).droplevel("Ticker", axis=1).tz_localize("UTC")
    panel = load_prices("SPY", cache=tmp_path / "new" / "folder")
    assert list(panel.columns) == ["SPY"]
    assert panel.index.tz is None
    assert len(panel) == N


@pytest.mark.parametrize(
    ("reply", "fragments"),
    [
        (pd.DataFrame(), ["SPY, NOPE", "empty answer", "connection"]),
        (None, ["SPY, NOPE", "empty answer"]),
        (answer(["SPY"]), ["got none of NOPE;"]),
        (answer(["SPY", "NOPE"]) * answer(["SPY"]).reindex_like(answer(["SPY", "NOPE"])), ["none of NOPE;"]),
        (answer(["SPY", "NOPE"])[["High"]], ["got none of SPY, NOPE;"]),
        (answer(["SPY"]).droplevel("Ticker", axis=1), ["got none of NOPE;"]),
    ],
    ids=["empty", "none", "absent", "all NaN", "no close", "one level"],
)
def test_fetch_without_an_answer_names_the_tickers_and_caches_nothing(yahoo, tmp_path, reply, fragments):
    yahoo.reply = reply
    with pytest.raises(ValueError, match="expected prices of SPY, NOPE") as caught:
        load_prices(["SPY", "NOPE"], cache=tmp_path)
    assert all(fragment in str(caught.value) for fragment in fragments)
    assert list(tmp_path.iterdir()) == []


def test_fetch_uses_keywords_that_yfinance_has(yahoo, tmp_path, monkeypatch):
    yahoo.reply = answer(["SPY"])
    load_prices("SPY", cache=tmp_path)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import yfinance
    assert set(yahoo.calls[0]) <= set(inspect.signature(yfinance.download).parameters)


# ---------------------------------------------------------------------------------- scaling


def correlated(n=400, d=5, seed=0):
    rng = np.random.RandomState(seed)
    return 0.01 * rng.standard_t(4, (n, d)) @ (np.eye(d) + 0.3) * np.geomspace(1e-3, 10, d) + rng.normal(
        size=d
    )


problems = st.tuples(st.integers(3, 40), st.integers(1, 12), st.integers(0, 10**6))


@settings(deadline=None, max_examples=40)
@given(problem=problems, whiten=st.booleans())
def test_round_trip(problem, whiten):
    X = correlated(*problem)
    map_ = Standardizer(whiten=whiten).fit(X)
    np.testing.assert_allclose(map_.inverse_transform(map_.transform(X)), X, rtol=1e-11, atol=1e-12)
    Z = np.random.RandomState(0).standard_normal(X.shape)
    np.testing.assert_allclose(map_.transform(map_.inverse_transform(Z)), Z, atol=1e-6 if whiten else 1e-8)


@settings(deadline=None, max_examples=40)
@given(problem=problems, whiten=st.booleans(), power=st.floats(-3, 3))
def test_equivariance_to_scale_shift_and_order(problem, whiten, power):
    X = correlated(*problem)
    Z = Standardizer(whiten=whiten).fit(X).transform(X)
    rng = np.random.RandomState(problem[2])
    factor, order = 10.0 ** (power * rng.uniform(size=X.shape[1])), rng.permutation(X.shape[1])
    moved = X * factor + factor
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(Standardizer(whiten=whiten).fit(moved).transform(moved), Z, **tolerance)
    turned = X[:, order]
    np.testing.assert_allclose(
        Standardizer(whiten=whiten).fit(turned).transform(turned), Z[:, order], **tolerance
    )


def test_plain_scaling_gives_zero_mean_and_unit_sd():
    X = correlated()
    Z = Standardizer().fit(X).transform(X)
    np.testing.assert_allclose(Z.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(Z.std(axis=0), 1, rtol=1e-10)


def test_whitening_gives_unit_covariance_up_to_the_shrinkage():
    X = correlated(n=20000)
    map_ = Standardizer(whiten=True).fit(X)
    Z = map_.transform(X)
    # C_shrunk = (1 - a) C + a I, so cov(z) = W C W = (I - a W W) / (1 - a).
    a = ledoit_wolf((X - X.mean(axis=0)) / X.std(axis=0))[1]
    W = map_.whitening_
    np.testing.assert_allclose(np.cov(Z.T, ddof=0), (np.eye(5) - a * W @ W) / (1 - a), atol=1e-10)
    np.testing.assert_allclose(np.cov(Z.T, ddof=0), np.eye(5), atol=0.02)
    np.testing.assert_allclose(W, W.T, atol=1e-14)
    assert (np.linalg.eigvalsh(W) > 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_log_abs_det_is_that_of_the_finite_difference_jacobian(whiten):
    X = correlated()
    map_ = Standardizer(whiten=whiten).fit(X)
    J = map_.transform(np.eye(5)) - map_.transform(np.zeros((5, 5)))
    assert map_.log_abs_det() == pytest.approx(np.linalg.slogdet(J)[1], abs=1e-8)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("value", [0.1, 0.0, 1e6, -3e-9])
def test_a_constant_asset_comes_back_exactly(whiten, value):
    X = np.insert(correlated(n=300), 2, value, axis=1)
    map_ = Standardizer(whiten=whiten).fit(X)
    Z = map_.transform(X)
    assert (map_.mean_[2], map_.scale_[2]) == (value, 1.0)
    assert (Z[:, 2] == 0).all()
    assert (map_.inverse_transform(Z)[:, 2] == value).all()
    others = Standardizer(whiten=whiten).fit(np.delete(X, 2, axis=1))
    np.testing.assert_allclose(np.delete(Z, 2, axis=1), others.transform(np.delete(X, 2, axis=1)), atol=1e-12)


def test_constant_panel_and_more_assets_than_rows():
    X = np.full((5, 3), 0.1)
    map_ = Standardizer(whiten=True).fit(X)
    assert (map_.inverse_transform(map_.transform(X)) == X).all()
    assert map_.log_abs_det() == 0
    pair = np.random.RandomState(0).standard_normal(
        (2, 50)
    )  # no shrinkage: the floor alone keeps it invertible
    map_ = Standardizer(whiten=True).fit(pair)
    np.testing.assert_allclose(map_.inverse_transform(map_.transform(pair)), pair, atol=1e-10)
    wide = np.random.RandomState(0).standard_normal((10, 50))
    map_ = Standardizer(whiten=True).fit(wide)
    assert np.linalg.cond(map_.whitening_) < 1e3


@pytest.mark.parametrize("whiten", [False, True])
def test_storage_and_clone(whiten):
    X = correlated()
    map_ = Standardizer(whiten=whiten).fit(X)
    arrays = map_.to_dict()
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float64 for array in arrays.values())
    back = Standardizer.from_dict(arrays)
    assert back.whiten is whiten
    np.testing.assert_array_equal(back.transform(X), map_.transform(X))
    np.testing.assert_array_equal(back.inverse_transform(X), map_.inverse_transform(X))
    assert clone(back).whiten is whiten


@pytest.mark.parametrize(
    ("X", "fragment"),
    [
        (np.zeros(3), "shape"),
        (np.zeros((1, 3)), "n >= 2"),
        (np.zeros((3, 0)), "d >= 1"),
        (np.array([[1.0, 2.0], [1.0, np.nan]]), "got nan in row 1, column 1"),
    ],
)
def test_standardizer_refuses(X, fragment):
    with pytest.raises(ValueError, match=fragment):
        Standardizer().fit(X)
    with pytest.raises(NotFittedError):
        Standardizer().transform(X)
    with pytest.raises(ValueError, match="as in fit"):
        Standardizer().fit(correlated()).transform(X)

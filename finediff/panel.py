"""Panels of prices and returns: loading, checking, splitting and scaling them.

Letters of this file: n dates, d assets, P_t the prices at date t, one row per date.

    x_t = P_t / P_{t-1} - 1                     simple return of one period      (to_returns)
    z   = ((x - mean) / sd) W                   affine, exactly invertible       (Standardizer)

Here W = I, or W = C^{-1/2}, the symmetric inverse square root of the Ledoit-Wolf correlation C of the
standardised returns. Returns are fractions (0.01 is one per cent) per period; nothing is annualised.

A gap in the data is never filled with zero, carried forward or cut away without being asked for.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import tempfile
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.covariance import ledoit_wolf
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

_TABLES = (".csv", ".csv.gz", ".parquet")
_OTHER_FILES = (".xls", ".xlsx", ".txt", ".tsv", ".json", ".feather", ".pkl", ".zip", ".gz", ".h5")
_FIRST_DATE = "1927-01-01"  # no daily series at Yahoo begins before this
_POLICIES = ("error", "drop_rows", "drop_assets", "keep")

# A week without a trade. Zero returns are 2-5 % of the days of a liquid share, so five in a row come by
# chance once in 10^6 to 10^8 days: a run that long says that the price was not refreshed.
_STALE_RUN = 5
_STALE_JUMP = 3.0  # times the median move; five hidden days add up to about 2.4 sd, 3.6 median moves
_STALE_EDGE = 20  # at either end no jump can confirm the run, so it must last a month


class PanelWarning(UserWarning):
    """The panel can be used as it is, but probably does not hold what was meant."""


# ---------------------------------------------------------------------------------------------- loading


def load_prices(source="sp500", *, start=None, end=None, cache="data", refresh=False) -> pd.DataFrame:
    """Prices from the bundled panel, a file, or Yahoo.

    Parameters
    ----------
    source : str, Path or list of str
        ``"sp500"``: the 20 companies bundled with skfolio, 1990-2022, offline (survivors: see
        ``data/README.md``). A path ending in .csv, .csv.gz or .parquet: dates in the first column (or in the
        index of a Parquet file). Else a ticker, tickers separated by commas, or a list of tickers: daily
        closes from yfinance, adjusted for splits and dividends.
    start, end : str or Timestamp, optional
        First and last date, both included.
    cache : str or Path
        Folder for fetched panels, one Parquet file a request.
    refresh : bool
        Ask Yahoo even if the request is cached. With ``end=None`` the cache holds the day it was made.

    Returns
    -------
    DataFrame (n, d)
        Prices, DatetimeIndex named "Date" (local dates, no time zone), as the source has them: neither sorted
        nor filled, so that `check_panel` can report on them.

    Raises
    ------
    ValueError
        The file is missing, is not a table, has no numeric column or no dates; a ticker has no price; no row
        lies between `start` and `end`.
    """
    start, end = _day(start, "start"), _day(end, "end")
    text = os.fspath(source) if isinstance(source, str | Path) else ""
    if text == "sp500":
        from skfolio.datasets import load_sp500_dataset

        prices = load_sp500_dataset()
    elif text.lower().endswith(_TABLES):
        prices = _read_table(Path(text))
    elif isinstance(source, Path) or "/" in text or text.lower().endswith(_OTHER_FILES):
        raise ValueError(f"expected a file ending in {', '.join(_TABLES)}, got {text!r}; convert it first.")
    else:
        prices = _fetch(_ticker_list(source), start, end, Path(cache), refresh)
    prices.index.name = "Date"
    first, last = prices.index.min(), prices.index.max()
    keep = (prices.index >= (start or first)) & (prices.index < (end or last) + pd.Timedelta(days=1))
    if not keep.any():
        raise ValueError(
            f"expected prices from {_iso(start or first)} to {_iso(end or last)}, got none; "
            f"the source has {_iso(first)} to {_iso(last)}."
        )
    return prices[keep]


def _day(value, name):
    """`value` as a naive Timestamp at midnight, or None."""
    if value is None:
        return None
    try:
        return pd.Timestamp(value).tz_localize(None).normalize()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a date for {name}, got {value!r}; write it as YYYY-MM-DD.") from error


def _read_table(path):
    """Prices of a CSV or Parquet file, (n, d), as they stand."""
    wanted = f"expected a table of prices in {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{wanted}, got no such file; check the path.")
    try:
        frame = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else pd.read_csv(path, index_col=0)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{wanted}, got a file that cannot be read as one: {error}") from error
    if isinstance(frame.index, pd.RangeIndex) and frame.shape[1] > 1:
        frame = frame.set_index(frame.columns[0])
    wanted += " (dates in the first column, the prices of one asset in each other)"
    if frame.empty or not frame.select_dtypes("number").shape[1]:
        raise ValueError(f"{wanted}, got no numeric column among: {_listed(frame.columns)}.")
    frame.index = _parse_dates(frame.index, wanted)
    return frame


def _parse_dates(index, wanted):
    """The index of a file as local dates: text in one format, or integers YYYYMMDD."""
    if isinstance(index, pd.DatetimeIndex):
        return index.tz_localize(None)
    labels, numeric = index.astype(str), pd.api.types.is_numeric_dtype(index.dtype)
    if numeric and not labels.str.fullmatch(r"(19|20)\d{6}").all():
        raise ValueError(f"{wanted}, got the number {labels[0]} for a date; write dates as YYYY-MM-DD.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no common format: the first misfit is named below
            dates = pd.to_datetime(labels, errors="coerce", format="%Y%m%d" if numeric else None)
    except ValueError as error:
        raise ValueError(f"{wanted}, got dates in several time zones; write local dates.") from error
    if dates.hasnans:
        row = int(dates.isna().argmax())
        raise ValueError(f"{wanted}, got the date {labels[row]!r} in data row {row + 1}; write YYYY-MM-DD.")
    return dates.tz_localize(None)


def _ticker_list(source):
    """Tickers, upper case, in order, each once."""
    try:
        parts = source.split(",") if isinstance(source, str) else list(source)
        tickers = list(dict.fromkeys(part.strip().upper() for part in parts if part.strip()))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"expected 'sp500', a path, or tickers, got {source!r}.") from error
    if not tickers:
        raise ValueError(f"expected at least one ticker, got {source!r}.")
    return tickers


def _fetch(tickers, start, end, cache, refresh):
    """Prices from the cache, or from Yahoo into the cache."""
    start = f"{start:%Y-%m-%d}" if start else _FIRST_DATE
    stop = f"{end + pd.Timedelta(days=1):%Y-%m-%d}" if end else None  # Yahoo leaves the last day out
    key = hashlib.sha256(
        json.dumps([sorted(tickers), start, stop, "daily adjusted close"]).encode()
    ).hexdigest()
    words = [re.sub(r"\W", "", ticker) for ticker in sorted(tickers)[:4]] + ["etc"] * (len(tickers) > 4)
    path = cache / "-".join([*words, start[:4], _iso(end)[:4] if end else "open", f"{key[:10]}.parquet"])
    if path.exists() and not refresh:
        return _read_table(path)[tickers]

    import yfinance

    answer = yfinance.download(
        tickers,
        start=start,
        end=stop,
        interval="1d",
        auto_adjust=True,
        back_adjust=False,
        actions=False,
        repair=False,
        keepna=False,
        prepost=False,
        rounding=False,
        ignore_tz=True,
        group_by="column",
        multi_level_index=True,
        threads=True,
        progress=False,
        timeout=30,
    )
    prices = _closes(answer, tickers)
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache, prefix=".", suffix=".tmp")
    os.close(handle)
    try:
        prices.to_parquet(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return prices


def _closes(answer, tickers):
    """Flatten a frame of yfinance, with one or two levels of columns, to closes (n, d) in the order asked."""
    wanted = f"expected prices of {_listed(tickers)} from Yahoo"
    if answer is None or answer.empty:
        raise ValueError(
            f"{wanted}, got an empty answer, which it sends for unknown tickers and also when it is out of "
            "reach; check spelling, dates and connection, or give a file."
        )
    closes, columns = answer, answer.columns
    if isinstance(columns, pd.MultiIndex):
        level = next((k for k in range(columns.nlevels) if "Close" in columns.get_level_values(k)), None)
        closes = answer.xs("Close", axis=1, level=level) if level is not None else answer.iloc[:, :0]
    elif "Close" in columns:
        closes = answer[["Close"]].set_axis(tickers[:1], axis=1)
    absent = [ticker for ticker in tickers if ticker not in closes or closes[ticker].isna().all()]
    if absent:
        raise ValueError(
            f"{wanted}, got none of {_listed(absent)}; check the spelling and whether they traded between "
            "these dates, or leave them out."
        )
    index = pd.DatetimeIndex(closes.index, name="Date").tz_localize(None).normalize()
    return pd.DataFrame({ticker: closes[ticker].to_numpy(dtype=float) for ticker in tickers}, index=index)


# --------------------------------------------------------------------------------- returns and splits


def to_returns(prices, *, missing="error") -> pd.DataFrame:
    """Simple returns x_t = P_t / P_{t-1} - 1, one row fewer than prices.

    Parameters
    ----------
    prices : DataFrame (n, d)
        Positive prices, strictly increasing dates.
    missing : {"error", "drop_rows", "drop_assets", "keep"}
        What to do with missing prices. A return is missing where either of its two prices is. "error"
        refuses; "drop_rows" drops each row with a missing return (all that remain still span one period);
        "drop_assets" drops each asset with a missing price; "keep" leaves NaN. No policy fills a gap.

    Returns
    -------
    DataFrame (n - 1, d)
        Returns per period, as fractions; fewer rows or columns if the policy drops some.

    Raises
    ------
    TypeError
        `prices` is not a DataFrame.
    ValueError
        Fewer than two rows, unsorted or repeated dates, a column that is not numeric, a price that is
        infinite, zero or negative; a missing price under "error"; nothing left under the other policies.

    Warns
    -----
    PanelWarning
        "drop_rows" drops more than a tenth of the rows.
    """
    _require_frame(prices)
    if missing not in _POLICIES:
        raise ValueError(f"expected missing to be one of {', '.join(_POLICIES)}, got {missing!r}.")
    if len(prices) < 2 or not prices.shape[1]:
        raise ValueError(f"expected at least two rows and one column of prices, got shape {prices.shape}.")
    _require_increasing(prices.index)
    P, bad = _numeric(prices)
    names, dates = [str(name) for name in prices.columns], prices.index
    for j, (row, value) in bad.items():
        raise ValueError(f"expected prices in column {names[j]}, got {value!r} at {_at(dates, row)}.")
    for wrong, what in ((P <= 0, "positive"), (np.isinf(P), "finite")):
        if wrong.any():
            row, j = np.argwhere(wrong)[0]
            raise ValueError(
                f"expected {what} prices, got {P[row, j]:g} in column {names[j]} at {_at(dates, row)}; "
                "correct it, or set it to NaN and choose a policy for missing values."
            )
    gaps = np.isnan(P)
    if missing == "error" and gaps.any():
        columns = np.flatnonzero(gaps.any(axis=0))
        gap, others = gaps[:, columns[0]], len(columns) - 1
        also = f" (and gaps in {others} other columns)" if others else ""
        raise ValueError(
            f"expected a price in every cell, got {gap.sum()} missing in column {names[columns[0]]}, "
            f"the first at {_at(dates, gap.argmax())}{also}; "
            "choose missing='drop_rows', 'drop_assets' or 'keep'."
        )
    returns = pd.DataFrame(P[1:] / P[:-1] - 1, index=dates[1:], columns=prices.columns)
    if missing == "drop_assets":
        returns = returns.loc[:, ~gaps.any(axis=0)]
    elif missing == "drop_rows":
        empty = np.isnan(returns.to_numpy())
        lost, worst = empty.any(axis=1), int(empty.sum(axis=0).argmax())
        if 0.1 < lost.mean() < 1:
            message = (
                f"missing='drop_rows' dropped {lost.sum()} of {len(lost)} rows, because {names[worst]} lacks "
                f"{empty[:, worst].sum()} returns; consider missing='drop_assets' or 'keep'."
            )
            warnings.warn(message, PanelWarning, stacklevel=2)
        returns = returns[~lost]
    if returns.empty:
        raise ValueError(f"expected some returns after missing={missing!r}, got none; choose another policy.")
    return returns


def split(panel, held_out=0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut a panel in time: the past to train on, the rest to test on.

    Parameters
    ----------
    panel : DataFrame (n, d)
        Strictly increasing dates.
    held_out : float, str or Timestamp
        Fraction of the rows held out, in (0, 1), or the date on which the test part begins.

    Returns
    -------
    train, test : DataFrame (n_train, d), DataFrame (n - n_train, d)

    Raises
    ------
    TypeError
        `panel` is not a DataFrame.
    ValueError
        Dates not strictly increasing, `held_out` neither a fraction nor a date, or an empty part.

    Examples
    --------
    >>> panel = pd.DataFrame({"A": range(10)}, index=pd.date_range("2024-01-01", periods=10))
    >>> [len(part) for part in split(panel, 0.3)], [len(part) for part in split(panel, "2024-01-09")]
    ([7, 3], [8, 2])
    """
    _require_frame(panel)
    _require_increasing(panel.index)
    if isinstance(held_out, Real):
        cut = len(panel) - _held_out_rows(len(panel), held_out)
        return panel.iloc[:cut], panel.iloc[cut:]
    if not isinstance(panel.index, pd.DatetimeIndex):
        raise ValueError(f"expected an index of dates to split at {held_out!r}, got {panel.index.dtype}.")
    try:
        date = pd.Timestamp(held_out)
        date = date.tz_localize(panel.index.tz) if date.tzinfo is None else date
        cut = int(panel.index.searchsorted(date))
    except (ValueError, TypeError) as error:
        message = f"expected held_out to be a fraction, or a date in the panel's time zone, got {held_out!r}."
        raise ValueError(message) from error
    if not 0 < cut < len(panel):
        raise ValueError(
            f"expected a date after {_iso(panel.index[0])} and not after {_iso(panel.index[-1])}, "
            f"got {held_out!r}, because both parts need a row."
        )
    return panel.iloc[:cut], panel.iloc[cut:]


def random_split(panel, held_out=0.2, random_state=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Hold out rows at random; both parts keep the order of the panel.

    For statistics of exchangeable rows (a memorisation test, say). Neighbouring days resemble each other, so
    a random split flatters any forecast: `split` is the one for backtests.

    Parameters
    ----------
    panel : DataFrame (n, d)
        Any index.
    held_out : float
        Fraction of the rows held out, in (0, 1).
    random_state : None, int or RandomState
        Source of the choice.

    Returns
    -------
    train, test : DataFrame (n_train, d), DataFrame (n - n_train, d)

    Raises
    ------
    TypeError
        `panel` is not a DataFrame.
    ValueError
        `held_out` is not a fraction, or a part is empty.
    """
    _require_frame(panel)
    chosen = np.zeros(len(panel), dtype=bool)
    count = _held_out_rows(len(panel), held_out)
    chosen[check_random_state(random_state).permutation(len(panel))[:count]] = True
    return panel[~chosen], panel[chosen]


def _held_out_rows(n, held_out):
    if not isinstance(held_out, Real) or isinstance(held_out, bool) or not 0 < held_out < 1:
        raise ValueError(f"expected held_out to be a fraction between 0 and 1, got {held_out!r}.")
    count = round(n * float(held_out))
    if not 0 < count < n:
        raise ValueError(
            f"expected rows in both parts, got {n - count} and {count} from {held_out!r} of {n}."
        )
    return count


def _require_frame(panel):
    if not isinstance(panel, pd.DataFrame):
        raise TypeError(f"expected a DataFrame with a row per date, got {type(panel).__name__}.")


def _require_increasing(index):
    if index.has_duplicates or not index.is_monotonic_increasing:
        fault = "repeated" if index.has_duplicates else "unsorted"
        raise ValueError(f"expected strictly increasing dates, got {fault} ones; check_panel names them.")


# --------------------------------------------------------------------------------------------- checking

_POLICY = "Choose a policy: to_returns(prices, missing='drop_rows', 'drop_assets' or 'keep')."
_CHECKS = {  # code: (severity, remedy)
    "empty": ("error", "Check the source."),
    "one_asset": ("warning", "Add assets if that was not meant."),
    "few_rows": ("warning", "Use a longer history or fewer assets."),
    "non_date_index": ("warning", "Set the index with pandas.to_datetime."),
    "mixed_time_zones": ("error", "Use pandas.to_datetime(index, utc=True), or local dates throughout."),
    "unsorted_dates": ("error", "Sort the rows with frame.sort_index()."),
    "duplicate_dates": ("error", "Keep one row a date: frame[~frame.index.duplicated()]."),
    "duplicate_columns": ("error", "Rename them or drop all but one."),
    "non_numeric_column": ("error", "Convert the column with pandas.to_numeric, or leave it out."),
    "missing_values": ("error", _POLICY),
    "late_listing": ("warning", _POLICY),
    "early_delisting": ("warning", _POLICY),
    "infinite_values": ("error", "Look for a division by zero; set it to NaN and choose a policy for gaps."),
    "constant_column": ("warning", "Leave it out unless it is cash."),
    "stale_prices": ("warning", "Set prices that were not refreshed to NaN, start later, or drop the asset."),
    "prices_as_returns": ("error", "Convert prices with to_returns."),
    "returns_in_percent": ("error", "Divide them by 100."),
    "extreme_returns": ("error", "Correct them; convert log returns with numpy.expm1."),
    "non_positive_price": (
        "error",
        "Correct it or set it to NaN; if these are returns, pass kind='returns'.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing wrong, or odd, with a panel.

    Attributes
    ----------
    code : str
        Stable name of the check.
    severity : {"error", "warning"}
        "error": a model fitted to the panel as it is would be wrong or impossible.
    column : str or None
        The asset concerned; None for the whole panel or several assets.
    date : Timestamp or None
        The first date concerned, if the index has dates.
    message, remedy : str
        What was found and what to do, a sentence each.
    """

    code: str
    severity: str
    column: str | None
    date: pd.Timestamp | None
    message: str
    remedy: str

    def __str__(self):
        return " ".join(f"{self.severity} {self.code}: {self.message} {self.remedy}".split())


def check_panel(frame, kind="returns") -> list[Finding]:
    """All that is wrong, or looks wrong, with a panel.

    Parameters
    ----------
    frame : DataFrame (n, d)
        Anything at all: no content of the frame makes the check fail.
    kind : {"returns", "prices"}
        What the frame is meant to hold.

    Returns
    -------
    list of Finding
        Errors first, then warnings; within each, the panel's own before those of single columns by name.
        Empty for a clean panel. Codes: empty, one_asset, few_rows, non_date_index, mixed_time_zones,
        unsorted_dates, duplicate_dates, duplicate_columns, non_numeric_column, missing_values, late_listing,
        early_delisting, infinite_values, constant_column, stale_prices; for returns also prices_as_returns,
        returns_in_percent, extreme_returns; for prices also non_positive_price.

    Raises
    ------
    TypeError
        `frame` is not a DataFrame.
    ValueError
        `kind` is neither "returns" nor "prices".

    Examples
    --------
    >>> panel = pd.DataFrame({"A": [100.0, 101.0, -1.0]}, index=pd.date_range("2024-01-01", periods=3))
    >>> for finding in check_panel(panel, kind="prices"):
    ...     print(finding.severity, finding.code, finding.column)
    error non_positive_price A
    warning few_rows None
    warning one_asset None
    """
    _require_frame(frame)
    if kind not in ("returns", "prices"):
        raise ValueError(f"expected kind='returns' or 'prices', got {kind!r}.")
    n, d = frame.shape
    if n == 0 or d == 0:
        return [_found("empty", f"The panel is empty: {n} rows, {d} columns.")]
    dates, findings = _check_dates(frame.index)
    X, bad = _numeric(frame)
    names = [str(name) for name in frame.columns]
    for name, count in Counter(names).items():
        if count > 1:
            findings.append(_found("duplicate_columns", f"{count} columns are named {name}.", name))
    for j, (row, value) in bad.items():
        message = f"Column {names[j]} is not numeric: it holds {repr(value)[:40]} at {_at(dates, row)}."
        findings.append(_found("non_numeric_column", message, names[j], _date(dates, row)))
    if d == 1:
        findings.append(_found("one_asset", "The panel has one asset: there is no dependence to learn."))
    numeric = [j for j in range(d) if j not in bad]
    X, names = X[:, numeric], [names[j] for j in numeric]
    findings += _check_missing(X, names, dates)
    findings += _cells("infinite_values", np.isinf(X), X, names, dates)
    with np.errstate(all="ignore"):
        if kind == "prices":
            findings += _cells("non_positive_price", X <= 0, X, names, dates)
            findings += _few_rows(n - 1, d)
            findings += _stale_prices(X[1:] / X[:-1] - 1, names, None if dates is None else dates[1:])
        else:
            findings += _few_rows(n, d)
            findings += (guesses := _heuristics(X, names, dates))
            if not any(guess.code == "returns_in_percent" for guess in guesses):
                findings += _cells("extreme_returns", X < -1, X, names, dates)
    constant = (np.fmin.reduce(X, axis=0) == np.fmax.reduce(X, axis=0)) & (np.isfinite(X).sum(axis=0) > 1)
    for j in np.flatnonzero(constant):
        message = f"Column {names[j]} is constant: an optimiser takes it for an asset without risk."
        findings.append(_found("constant_column", message, names[j]))
    return sorted(findings, key=lambda f: (f.severity, f.column is not None, f.column or "", f.code))


def heuristic_warnings(X, names, *, stacklevel=1) -> None:
    """Warn if an array does not look like returns: the guesses of `check_panel`, for the `fit` of a model.

    Parameters
    ----------
    X : ndarray (n, d)
        Presumed simple returns per period.
    names : sequence of str (d,)
        Assets.
    stacklevel : int
        As for `warnings.warn` in the caller's place: 1 names the calling line, 2 the caller's caller.

    Warns
    -----
    PanelWarning
        At most one for each of: prices as returns, returns in percent, stale prices, few rows.
    """
    X = np.asarray(X, dtype=np.float64)
    with np.errstate(all="ignore"):
        findings = _few_rows(*X.shape) + _heuristics(X, [str(name) for name in names])
    for code in dict.fromkeys(finding.code for finding in findings):
        first, *rest = (finding for finding in findings if finding.code == code)
        also = f" Likewise {_listed(f.column for f in rest)}." if rest else ""
        warnings.warn(f"{first.message}{also} {first.remedy}", PanelWarning, stacklevel=stacklevel + 1)


def _found(code, message, column=None, date=None):
    severity, remedy = _CHECKS[code]
    return Finding(code, severity, column, date, message, remedy)


def _price_like(X):
    """(d,) bool: positive throughout, a median above 0.5 and a lag-one autocorrelation above 0.5.

    A median return of 50 % a period does not exist; cash and yields are positive and persistent, but small.
    """
    guess = (np.fmin.reduce(X, axis=0) > 0) & (np.fmax.reduce(X, axis=0) > 0.5)
    for j in np.flatnonzero(guess):
        x = X[np.isfinite(X[:, j]), j]
        guess[j] = len(x) > 2 and np.median(x) > 0.5 and np.mean(np.diff(x) ** 2) < np.var(x)
    return guess


def _percent_like(X):
    """Typical sd of the columns if they look like per cent (sd above 0.25, some value below -1), else None.

    A simple return cannot be below -1, and a panel in per cent with such an sd can hardly avoid it: asking
    for both spares assets that are volatile at a low frequency.
    """
    if not np.nanmin(X) < -1:
        return None
    scale = float(np.median(np.nanstd(X, axis=0)))
    return scale if scale > 0.25 else None


def _stale_ends(R):
    """(n + 1, d) bool: True at (i, j) where a stale run of zero returns in column j ends just before row i.

    A run of `_STALE_RUN` zeros counts if a move above `_STALE_JUMP` median moves follows (the news that
    was held back); a run of `_STALE_EDGE` at either end of the panel counts by itself (a price filled in).
    """
    n, d = R.shape
    ends = np.zeros((n + 1, d), dtype=bool)
    if n < _STALE_RUN:
        return ends
    zero = R == 0
    run = np.logical_and.reduce([zero[k : n - _STALE_RUN + 1 + k] for k in range(_STALE_RUN)])
    for j in np.flatnonzero(run.any(axis=0)):
        moves = np.abs(R[~zero[:, j] & np.isfinite(R[:, j]), j])
        if len(moves):
            moving = np.flatnonzero(~zero[:, j])
            ends[_STALE_RUN:n, j] = run[:-1, j] & (np.abs(R[_STALE_RUN:, j]) > _STALE_JUMP * np.median(moves))
            ends[moving[0], j] |= moving[0] >= _STALE_EDGE
            ends[n, j] = n - 1 - moving[-1] >= _STALE_EDGE
    return ends


def _few_rows(n, d):
    need, unit = max(50, 2 * d), "asset" if d == 1 else "assets"
    if n >= need:
        return []
    finding = _found("few_rows", f"Expected at least {need} returns (max(50, 2 d)) of {d} {unit}, got {n}.")
    return [replace(finding, severity="error") if n < 2 else finding]


def _heuristics(X, names, dates=None):
    """Findings of the checks that guess, for presumed returns X (n, d)."""
    findings, seen = [], np.flatnonzero(np.isfinite(X).sum(axis=0) > 1)
    if not len(seen):
        return findings
    X, names = np.where(np.isfinite(X[:, seen]), X[:, seen], np.nan), [names[j] for j in seen]
    prices = np.flatnonzero(_price_like(X))
    if len(prices):
        levels = np.nanmedian(X[:, prices], axis=0)
        span = f"{levels[0]:.3g}" if len(prices) == 1 else f"{levels.min():.3g} to {levels.max():.3g}"
        message = f"Expected returns, got what look like prices (positive, persistent, median {span}) in "
        message += f"{_listed(names[j] for j in prices)}."
        findings.append(_found("prices_as_returns", message, names[prices[0]] if len(prices) == 1 else None))
    scale = _percent_like(X)
    if scale is not None:
        message = (
            "Expected returns as fractions, got what look like per cent: a typical standard deviation of "
            f"{scale:.0%} a period, and returns below -100 %."
        )
        findings.append(_found("returns_in_percent", message))
    return findings + _stale_prices(X, names, dates)


def _stale_prices(R, names, dates):
    """One finding a column, for its longest stale run."""
    ends, findings = _stale_ends(R), []
    for j in np.flatnonzero(ends.any(axis=0)):
        stops = np.flatnonzero(ends[:, j])
        moving = np.concatenate(([-1], np.flatnonzero(R[:, j] != 0)))
        starts = moving[np.searchsorted(moving, stops) - 1] + 1
        start, stop = max(zip(starts, stops), key=lambda run: run[1] - run[0])
        then = f"then moves by {R[stop, j]:.1%}" if stop < len(R) else "up to the last row"
        message = (
            f"Column {names[j]} does not move for {stop - start} periods from {_at(dates, start)}, {then} "
            f"(spells of this kind: {len(stops)})."
        )
        findings.append(_found("stale_prices", message, names[j], _date(dates, start)))
    return findings


def _check_missing(X, names, dates):
    """Empty rows of the whole panel, then gaps, late listings and early delistings column by column."""
    findings, gaps, rows = [], np.isnan(X), np.arange(len(X))
    empty = gaps.all(axis=1)
    if X.shape[1] > 1 and empty.any():
        row = int(empty.argmax())
        message = f"{empty.sum()} of {len(X)} rows are empty, the first at {_at(dates, row)}."
        remedy = "Drop them with dropna(how='all'); the first row of pct_change is always empty."
        findings.append(replace(_found("missing_values", message, None, _date(dates, row)), remedy=remedy))
        gaps, rows = gaps[~empty], rows[~empty]
    n = len(gaps)
    for j in np.flatnonzero(gaps.any(axis=0)):
        gap, name = gaps[:, j], names[j]
        if gap.all():
            findings.append(_found("missing_values", f"Column {name} has no value at all.", name))
            continue
        first, last = int(gap.argmin()), n - 1 - int(gap[::-1].argmin())
        for code, verb, row, lost in (
            ("late_listing", "begins", first, first),
            ("early_delisting", "ends", last, n - 1 - last),
        ):
            if lost:
                message = (
                    f"Column {name} {verb} at {_at(dates, rows[row])}: keeping complete rows only would "
                )
                message += f"lose {lost} of {n} ({lost / n:.0%})."
                findings.append(_found(code, message, name, _date(dates, rows[row])))
        inside = rows[first:last][gap[first:last]]
        if len(inside):
            message = (
                f"Column {name} lacks {len(inside)} of {n} values, the first at {_at(dates, inside[0])}."
            )
            findings.append(_found("missing_values", message, name, _date(dates, inside[0])))
    return findings


def _check_dates(index):
    """Timestamps of the index, or None, and the findings on them."""
    dates, zones = _timestamps(index)
    if len(zones) > 1:
        return None, [_found("mixed_time_zones", f"The index mixes time zones: {_listed(sorted(zones))}.")]
    findings, holes = [], dates is not None and dates.hasnans
    if dates is None or holes or not isinstance(index, pd.DatetimeIndex | pd.PeriodIndex):
        got = f"{dates.isna().sum()} missing" if holes else f"{index.dtype} labels"
        findings.append(_found("non_date_index", f"Expected dates in the index, got {got}."))
    if dates is None or holes:
        return dates, findings
    repeated = dates.duplicated()
    if repeated.any():
        date = dates[repeated][0]
        message = f"Rows that repeat an earlier date: {repeated.sum()}, the first {_iso(date)}."
        findings.append(_found("duplicate_dates", message, None, date))
    if not dates.is_monotonic_increasing:
        row = int((dates[1:] < dates[:-1]).argmax()) + 1
        message = f"Dates are not in order ({_iso(dates[row])} follows {_iso(dates[row - 1])}): "
        message += "a split in time would leak the future."
        findings.append(_found("unsorted_dates", message, None, dates[row]))
    return dates, findings


def _timestamps(index):
    """DatetimeIndex of the labels (None if they are not dates) and the set of their time zones."""
    if isinstance(index, pd.DatetimeIndex):
        return index, set()
    kinds = (str, datetime.date, np.datetime64, type(pd.NaT))
    try:
        if isinstance(index, pd.PeriodIndex):
            return index.to_timestamp(), set()
        if not all(isinstance(label, kinds) for label in index):
            return None, set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stamps = [pd.Timestamp(label) for label in index]
        zones = {str(stamp.tzinfo or "none") for stamp in stamps if stamp is not pd.NaT}
        return (pd.DatetimeIndex(stamps) if len(zones) < 2 else None), zones
    except (ValueError, TypeError, OverflowError):
        return None, set()


def _numeric(frame):
    """Writable float64 values (n, d); and {column number: (row, value)} of columns that are not numeric."""
    X, bad, types = np.full(frame.shape, np.nan), {}, pd.api.types
    for j in range(frame.shape[1]):
        column = frame.iloc[:, j]
        if types.is_any_real_numeric_dtype(column.dtype):
            X[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)
            continue
        for row in np.flatnonzero(~column.isna().to_numpy()):
            value = column.iloc[row]
            try:
                if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
                    raise TypeError
                X[row, j] = float(value)
            except (TypeError, ValueError, OverflowError):
                bad[j] = (int(row), value)
                break
    return X, bad


def _cells(code, wrong, X, names, dates):
    """One finding a column with a wrong cell, naming the first and their number."""
    findings = []
    for j in np.flatnonzero(wrong.any(axis=0)):
        row = int(wrong[:, j].argmax())
        message = f"Column {names[j]} holds {X[row, j]:g} at {_at(dates, row)}"
        message += f" (values of this kind: {wrong[:, j].sum()})."
        findings.append(_found(code, message, names[j], _date(dates, row)))
    return findings


def _date(dates, row):
    """Timestamp of a row, or None."""
    return None if dates is None or pd.isna(dates[row]) else dates[row]


def _at(index, row):
    """A row in words: its date, if it has one, or its number from 0."""
    label = None if index is None else index[row]
    return _iso(label) if isinstance(label, pd.Timestamp) else f"row {row}"


def _iso(date):
    return f"{date:%Y-%m-%d}"


def _listed(names, most=5):
    """'A, B, C, D, E and 7 more'."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------- scaling


class Standardizer(BaseEstimator):
    """Affine map of returns to unit scale, and exactly back.

    z = ((x - mean) / sd) W, with W = I or, whitened, W = C^{-1/2} symmetric (ZCA), C the Ledoit-Wolf
    correlation of (x - mean) / sd, its eigenvalues no less than 1e-8: invertible for n <= d too. W and its
    inverse C^{1/2} share one eigendecomposition, so the round trip is exact up to rounding. The symmetric
    root, unlike a Cholesky factor, follows the order of the assets and keeps each z_j closest to its own.

    A constant asset has sd 0. It gets mean equal to its value, scale 1, and no part in W: z = 0 there, and
    its value comes back exactly.

    Parameters
    ----------
    whiten : bool

    Attributes
    ----------
    mean_, scale_ : ndarray (d,)
        Mean and standard deviation (ddof=0) per asset, as fractions per period.
    whitening_, unwhitening_ : ndarray (d, d) or None
        W and its inverse; None if not whitened.

    References
    ----------
    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices"; Kessy,
    Lewin and Strimmer (2018), arXiv:1512.00809, on the symmetric whitening of correlations.

    Examples
    --------
    >>> X = np.random.RandomState(0).standard_normal((100, 3)) * [0.01, 0.02, 0.03]
    >>> map_ = Standardizer(whiten=True).fit(X)
    >>> bool(np.allclose(map_.inverse_transform(map_.transform(X)), X, rtol=0, atol=1e-15))
    True
    """

    def __init__(self, whiten=False):
        self.whiten = whiten

    def fit(self, X, y=None):
        """Learn the map from X (n, d), finite, n >= 2; ValueError otherwise. Returns self."""
        X = np.array(X, dtype=np.float64, copy=True)
        if X.ndim != 2 or len(X) < 2 or not X.shape[1]:
            raise ValueError(
                f"expected an array (n, d) with n >= 2 rows and d >= 1 assets, got shape {X.shape}."
            )
        if not np.isfinite(X).all():
            row, j = np.argwhere(~np.isfinite(X))[0]
            raise ValueError(f"expected finite returns, got {X[row, j]} in row {row}, column {j}.")
        # By the range: rounding in the mean gives a constant column an sd of many ulp.
        moving = np.ptp(X, axis=0) > 10 * np.finfo(float).eps * np.abs(X).max(axis=0)
        moving &= X.std(axis=0) > 0
        self.mean_ = np.where(moving, X.mean(axis=0), X[0])
        self.scale_ = np.where(moving, X.std(axis=0), 1.0)
        self.whitening_ = self.unwhitening_ = None
        if self.whiten:
            self.whitening_, self.unwhitening_ = np.eye(X.shape[1]), np.eye(X.shape[1])
            if moving.any():
                Z = ((X - self.mean_) / self.scale_)[:, moving]
                values, vectors = np.linalg.eigh(ledoit_wolf(Z, assume_centered=True)[0])
                roots = np.sqrt(np.maximum(values, 1e-8))  # two rows, say, lead to no shrinkage at all
                block = np.ix_(moving, moving)
                self.whitening_[block] = (vectors / roots) @ vectors.T
                self.unwhitening_[block] = (vectors * roots) @ vectors.T
        return self

    def transform(self, X):
        """Returns X (n, d) -> z (n, d). ValueError if X has another number of assets."""
        Z = (self._checked(X) - self.mean_) / self.scale_
        return Z if self.whitening_ is None else Z @ self.whitening_

    def inverse_transform(self, Z):
        """z (n, d) -> returns (n, d). ValueError if Z has another number of assets."""
        Z = self._checked(Z)
        return (Z if self.unwhitening_ is None else Z @ self.unwhitening_) * self.scale_ + self.mean_

    def log_abs_det(self) -> float:
        """log |det dz/dx|, in nats: log p_x(x) = log p_z(z) + log_abs_det()."""
        check_is_fitted(self, "mean_")
        volume = 0.0 if self.whitening_ is None else np.linalg.slogdet(self.whitening_)[1]
        return float(volume - np.log(self.scale_).sum())

    def to_dict(self) -> dict[str, np.ndarray]:
        """Arrays that determine the map: mean, scale and, whitened, whitening and unwhitening."""
        check_is_fitted(self, "mean_")
        arrays = {"mean": self.mean_, "scale": self.scale_}
        if self.whitening_ is not None:
            arrays |= {"whitening": self.whitening_, "unwhitening": self.unwhitening_}
        return {name: array.copy() for name, array in arrays.items()}

    @classmethod
    def from_dict(cls, arrays) -> Standardizer:
        """The map of `to_dict`; KeyError if mean or scale is absent."""
        map_ = cls(whiten="whitening" in arrays)
        arrays = {name: np.array(array, dtype=np.float64) for name, array in arrays.items()}
        map_.mean_, map_.scale_ = arrays["mean"], arrays["scale"]
        map_.whitening_, map_.unwhitening_ = arrays.get("whitening"), arrays.get("unwhitening")
        return map_

    def _checked(self, X):
        check_is_fitted(self, "mean_")
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] != len(self.mean_):
            raise ValueError(f"expected an array (n, {len(self.mean_)}), as in fit, got shape {X.shape}.")
        return X

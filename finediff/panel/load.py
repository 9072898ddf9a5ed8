"""Prices P, (n, d), from the bundled panel, a file, or Yahoo."""

import hashlib
import json
import os
import re
import tempfile
import warnings
import zlib
from pathlib import Path

import pandas as pd

from finediff.panel.frame import iso, listed

_TABLES = (".csv", ".csv.gz", ".parquet")
_OTHER_FILES = (".xls", ".xlsx", ".txt", ".tsv", ".json", ".feather", ".pkl", ".zip", ".gz", ".h5")
_FIRST_DATE = "1927-01-01"  # no daily series at Yahoo begins before this


def load_prices(source="sp500", *, start=None, end=None, cache="data", refresh=False) -> pd.DataFrame:
    """Prices as the source has them, neither sorted nor filled, so that `check_panel` can report on them.

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
        DatetimeIndex named "Date": local dates, no time zone.

    Raises
    ------
    ValueError
        No such file, no table in it, no numeric column or no dates; a ticker without a price; no row from
        `start` to `end`.
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
            f"expected prices from {iso(start or first)} to {iso(end or last)}, got none; "
            f"the source has {iso(first)} to {iso(last)}."
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
        raise ValueError(f"{wanted}, got no numeric column among: {listed(frame.columns)}.")
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
    parts = source.split(",") if isinstance(source, str) else source
    try:
        tickers = list(dict.fromkeys(part.strip().upper() for part in parts if part.strip()))
    except (TypeError, AttributeError):
        tickers = []
    if not tickers:
        raise ValueError(f"expected 'sp500', a path, or at least one ticker, got {source!r}.")
    return tickers


def _fetch(tickers, start, end, cache, refresh):
    """Prices from the cache, or from Yahoo into the cache."""
    start = iso(start) if start else _FIRST_DATE
    stop = iso(end + pd.Timedelta(days=1)) if end else None  # Yahoo leaves the last day out
    request = json.dumps([sorted(tickers), start, stop, "daily adjusted close"])
    words = [re.sub(r"\W", "", ticker) for ticker in sorted(tickers)[:4]] + ["etc"] * (len(tickers) > 4)
    words += [start[:4], iso(end)[:4] if end else "open", hashlib.sha256(request.encode()).hexdigest()[:10]]
    path = cache / f"{'-'.join(words)}.parquet"
    if path.exists() and not refresh:
        return _read_table(path)[tickers]

    import yfinance

    # Every flag, because yfinance has changed its defaults between versions.
    options = {
        "interval": "1d",
        "auto_adjust": True,
        "back_adjust": False,
        "repair": False,
        "rounding": False,
        "actions": False,
        "prepost": False,
        "keepna": True,
        "ignore_tz": True,
        "group_by": "column",
        "multi_level_index": True,
        "threads": True,
        "progress": False,
        "timeout": 30,
    }
    prices = _closes(yfinance.download(tickers, start=start, end=stop, **options), tickers)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".") as folder:  # no reader sees half a file
        prices.to_parquet(Path(folder, path.name))
        os.replace(Path(folder, path.name), path)
    return prices


def _closes(answer, tickers):
    """Closes (n, d) in the order asked, from a frame of yfinance with one or two levels of columns."""
    wanted = f"expected prices of {listed(tickers)} from Yahoo"
    if answer is None or answer.empty:
        raise ValueError(
            f"{wanted}, got an empty answer, which it sends for unknown tickers and also when it is out of "
            "reach; check spelling, dates and connection, or give a file."
        )
    if answer.columns.nlevels == 1:
        answer = pd.concat({tickers[0]: answer}, axis=1)
    elif "Close" in answer.columns.get_level_values(0):
        answer = answer.swaplevel(axis=1)
    closes = {ticker: answer[ticker, "Close"] for ticker in tickers if (ticker, "Close") in answer.columns}
    absent = [ticker for ticker in tickers if ticker not in closes or closes[ticker].isna().all()]
    if absent:
        raise ValueError(
            f"{wanted}, got none of {listed(absent)}; check the spelling and whether they traded between "
            "these dates, or leave them out."
        )
    index = pd.DatetimeIndex(answer.index).tz_localize(None).normalize()
    return pd.DataFrame(closes, dtype=float).set_index(index)

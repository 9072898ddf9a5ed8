"""When decisions are made, from which rows, and on which assets.

A decision at the close of row stop - 1 uses rows start ... stop - 1 and is held over rows stop ... end - 1:

    |<-- history: start ... stop - 1 -->|<-- held: stop ... end - 1 -->|

The history is at most ``window`` rows (or as long as an offset), and expands up to that where ``minimum`` is less.
"""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset


@dataclass(frozen=True)
class Window:
    """Rows of one decision: history [start, stop), held [stop, end)."""

    start: int
    stop: int
    end: int


def schedule(index, window=500, step=21, minimum=None):
    """Windows of a walk-forward.

    Parameters
    ----------
    index : Index (n,)
        Of the returns, increasing; dates where window or step are offsets or dates.
    window : int, str, timedelta or DateOffset
        Rows of history at most, or their span: "730D", pd.DateOffset(years=2).
    step : int, str, DateOffset, or sequence of dates
        Rows from one decision to the next, a calendar frequency ("ME": at month ends), or the dates themselves. A
        decision on a date uses rows up to and including it; on a date without a row, those before. Dates after
        which no row is left to hold are no decisions; two on the same row are one.
    minimum : int, optional
        Rows of history that the first decision needs; by default a complete window.

    Returns
    -------
    list of Window
        In order of time. The last holds what is left, which may be less than a step.

    Raises
    ------
    ValueError
        An index out of order, numbers below their least, dates with too short a history, no window at all.
    """
    n = len(index)
    if not (index.is_monotonic_increasing and index.is_unique):
        raise ValueError(
            "expected dates in increasing order, each once, got others, because what lies in the future is read from "
            "the order; do returns.sort_index() and drop repeated dates."
        )
    if minimum is not None:
        minimum = _whole("minimum", minimum, 2)
    if isinstance(window, Integral):
        length = _whole("window", window, 2)
        needed = length if minimum is None else min(minimum, length)
        starts = np.maximum(np.arange(n + 1) - length, 0)
        ready = np.arange(n + 1) >= needed
    else:
        _require_dates(index, "window", window)
        starts, whole = _spans(index, window)
        ready = whole if minimum is None else np.arange(n + 1) - starts >= minimum
    stops = _decisions(index, step, ready)
    stops = stops[stops < n]
    if not len(stops):
        raise ValueError(
            f"expected at least one row after the first history, got {n} rows for window={window!r} and "
            f"minimum={minimum!r}, because nothing would be held; do pass more rows or a smaller minimum."
        )
    ends = [*stops[1:], n]
    return [Window(int(starts[stop]), int(stop), int(end)) for stop, end in zip(stops, ends, strict=True)]


def shown(date):
    """A date as a sentence holds it: without a midnight."""
    midnight = isinstance(date, pd.Timestamp) and date == date.normalize()
    return str(date.date()) if midnight else str(date)


def _whole(name, value, least):
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"expected {name} to be a whole number of rows, at least {least}, got {value!r}, because fewer are no "
            f"history; do pass for example {name}={max(least, 21)}."
        )
    return int(value)


def _require_dates(index, name, value):
    if not isinstance(index, pd.DatetimeIndex):
        raise ValueError(
            f"expected an index of dates for {name}={value!r}, got {type(index).__name__}, because a calendar has "
            "nothing to count in; do pass a number of rows, or set the index to dates."
        )


def _spans(index, window):
    """First row of the history of each stop (n + 1,), and whether the panel reaches back so far."""
    try:
        offset = window if isinstance(window, pd.DateOffset) else to_offset(window)
        before = index - offset
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a window in rows or as an offset, got {window!r}, because {error}; do pass for example 500, "
            '"730D" or pd.DateOffset(years=2).'
        ) from None
    starts = np.concatenate([[0], index.searchsorted(before, side="right")])
    return starts, np.concatenate([[False], index[0] <= before])


def _decisions(index, step, ready):
    """One past the row of each decision, ascending."""
    n = len(index)
    if isinstance(step, Integral):
        step = _whole("step", step, 1)
        first = int(np.argmax(ready)) if ready.any() else n
        return np.arange(first, n, step)
    _require_dates(index, "step", step)
    calendar = isinstance(step, str | pd.DateOffset)
    try:
        dates = pd.date_range(index[0], index[-1], freq=step) if calendar else pd.DatetimeIndex(step)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a step in rows, a calendar frequency or dates, got {step!r}, because {error}; do pass for "
            'example 21, "ME" or a DatetimeIndex.'
        ) from None
    stops = np.unique(index.searchsorted(dates.sort_values(), side="right"))
    early = stops[~ready[stops]]
    if len(early) and not calendar:
        date = dates.sort_values()[0]
        raise ValueError(
            f"expected dates that follow a sufficient history, got {shown(date)} with {int(early[0])} rows up to it, because "
            "such a window would be skipped silently; do pass later dates, or a smaller minimum=."
        )
    return stops[ready[stops]]


def eligible(history, coverage=1.0, still=1.0):
    """Assets that may be held, judged by the history alone.

    Parameters
    ----------
    history : (n, d) array
        Simple returns; NaN where there is none.
    coverage : float
        Least share of the rows that an asset must have returns in, in (0, 1]; 1: a complete window.
    still : float
        Share of its returns, in (0, 1], of which fewer must be 0: what hardly trades looks riskless.

    Returns
    -------
    (d,) array of bool
        True for enough returns, one on the last row among them (without, it cannot be bought), not all the same, and
        not too many zeros.
    """
    there = ~np.isnan(history)
    enough = there.mean(axis=0) >= coverage - 1e-12
    moved = np.fmax.reduce(history, axis=0) > np.fmin.reduce(history, axis=0)
    trades = (history == 0).sum(axis=0) < still * there.sum(axis=0)
    return enough & there[-1] & moved & trades

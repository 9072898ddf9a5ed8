"""What is wrong, or looks wrong, with a panel: findings, each with a stable code and a remedy."""

import datetime
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from finediff.panel.frame import PanelWarning, at, iso, listed, numeric_values, require_frame

# A week without a trade. Zero returns are 2-5 % of the days of a liquid share, so five in a row come by
# chance once in 10^6 to 10^8 days: a run that long says that the price was not refreshed.
_STALE_RUN = 5
_STALE_JUMP = 3.0  # times the median move; five hidden days add up to about 2.4 sd, 3.6 median moves
_STALE_EDGE = 20  # at either end no jump can confirm the run, so it must last a month

# A close that moves this far and is back within days is a typing error before it is news: on 200 US shares over
# 15 years, crashes included, nothing above a dollar did it. Both an own and an absolute scale, because a calm
# bond moves 20 median moves in a crisis and a wild share moves 80 % in a year of them.
_SPIKE_LOG, _SPIKE_MOVES, _SPIKE_ROWS = 0.6, 20.0, 5
_DECIMAL_LOG = np.log(7.0)  # a slipped decimal point, less what the market did on the same days
# Without a way back, a fall to a half or a tenth looks like a crash, so only falls to 1/100 or 1/1000 count; no
# share rises by a whole factor of 9 or more between quiet days.
_SHIFT_LOG, _RISE_LOG, _SHIFT_MOVES = np.log(20.0), np.log(8.5), 50.0
_AROUND, _LIVE = 5, 3  # rows looked at on either side of a jump, and how many of them must trade

_POLICY = "Choose a policy: to_returns(prices, missing='drop_rows', 'drop_assets' or 'keep')."
CHECKS = {  # code: (severity, remedy)
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
    "price_spike": ("warning", "Correct the price, or set it to NaN and choose a policy for gaps."),
    "level_shift": ("warning", "Bring the prices before and after it to one unit, or correct them."),
    "prices_as_returns": ("error", "Convert prices with to_returns."),
    "returns_in_percent": ("error", "Divide them by 100."),
    "extreme_returns": ("error", "Correct them; convert log returns with numpy.expm1."),
    "non_positive_price": ("error", "Correct it or set it to NaN; for returns, pass kind='returns'."),
}


@dataclass(frozen=True)
class Finding:
    """One thing wrong, or odd, with a panel: what was found (message) and what to do (remedy).

    An "error" means that a model fitted to the panel as it is would be wrong or impossible. The column is None
    for the whole panel or several assets; the date, if the index has dates, is the first one concerned.
    """

    code: str  # a key of CHECKS
    severity: str  # "error" or "warning"
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
        Empty for a clean panel.

    Raises
    ------
    TypeError, ValueError
        `frame` is not a DataFrame; `kind` is neither "returns" nor "prices".

    Examples
    --------
    >>> panel = pd.DataFrame({"A": [100.0, 101.0, -1.0]}, index=pd.date_range("2024-01-01", periods=3))
    >>> for finding in check_panel(panel, kind="prices"):
    ...     print(finding.severity, finding.code, finding.column)
    error non_positive_price A
    warning few_rows None
    warning one_asset None
    """
    require_frame(frame)
    if kind not in ("returns", "prices"):
        raise ValueError(f"expected kind='returns' or 'prices', got {kind!r}.")
    n, d = frame.shape
    if n == 0 or d == 0:
        return [_found("empty", f"The panel is empty: {n} rows, {d} columns.")]
    dates, findings = _check_dates(frame.index)
    X, bad = numeric_values(frame)
    names = [str(name) for name in frame.columns]
    for name, count in Counter(names).items():
        if count > 1:
            findings.append(_found("duplicate_columns", f"{count} columns are named {name}.", name))
    for j, (row, value) in bad.items():
        text = f"is not numeric: it holds {repr(value)[:40]} at {at(dates, row)}."
        findings.append(_in_column("non_numeric_column", names[j], text, dates, row))
    if d == 1:
        findings.append(_found("one_asset", "The panel has one asset: there is no dependence to learn."))
    X, names = np.delete(X, list(bad), axis=1), [name for j, name in enumerate(names) if j not in bad]
    findings += _check_missing(X, names, dates)
    findings += _check_cells("infinite_values", np.isinf(X), X, names, dates)
    with np.errstate(all="ignore"):
        if kind == "prices":
            findings += _check_cells("non_positive_price", X <= 0, X, names, dates) + _few_rows(n - 1, d)
            findings += _stale_prices(X[1:] / X[:-1] - 1, names, None if dates is None else dates[1:])
            findings += _jumps(np.log(np.where(X > 0, X, np.nan)), names, dates)
        else:
            findings += _few_rows(n, d) + (guesses := _guesses(X, names, dates))
            if not any(guess.code == "returns_in_percent" for guess in guesses):
                findings += _check_cells("extreme_returns", X < -1, X, names, dates)
    constant = (np.fmin.reduce(X, axis=0) == np.fmax.reduce(X, axis=0)) & (np.isfinite(X).sum(axis=0) > 1)
    for j in np.flatnonzero(constant):
        text = "is constant: an optimiser takes it for an asset without risk."
        findings.append(_in_column("constant_column", names[j], text))
    return sorted(findings, key=lambda f: (f.severity, f.column is not None, f.column or "", f.code))


def heuristic_warnings(X, names=None, *, stacklevel=1) -> None:
    """Warn if an array does not look like returns: the guesses of `check_panel`, for the `fit` of a model.

    Parameters
    ----------
    X : ndarray (n, d)
        Presumed simple returns per period.
    names : sequence of str (d,), optional
        Assets; their numbers from 0 if not given.
    stacklevel : int
        1 names the calling line, 2 the caller's caller.

    Warns
    -----
    PanelWarning
        At most one for each of: prices as returns, returns in percent, stale prices, spikes, level shifts,
        few rows.
    """
    X = np.asarray(X, dtype=np.float64)
    names = [str(name) for name in (range(X.shape[1]) if names is None else names)]
    with np.errstate(all="ignore"):
        findings = _few_rows(*X.shape) + _guesses(X, names)
    for code in dict.fromkeys(finding.code for finding in findings):
        first, *rest = (finding for finding in findings if finding.code == code)
        also = f" Likewise {listed(f.column for f in rest)}." if rest else ""
        warnings.warn(f"{first.message}{also} {first.remedy}", PanelWarning, stacklevel=stacklevel + 1)


def _found(code, message, column=None, date=None):
    severity, remedy = CHECKS[code]
    return Finding(code, severity, column, None if pd.isna(date) else date, message, remedy)


def _in_column(code, name, text, dates=None, row=0):
    return _found(code, f"Column {name} {text}", name, None if dates is None else dates[row])


def _check_dates(index):
    """Timestamps of the index, or None, and the findings on them."""
    dates, zones = _timestamps(index)
    if len(zones) > 1:
        return None, [_found("mixed_time_zones", f"The index mixes time zones: {listed(sorted(zones))}.")]
    findings, holes = [], dates is not None and dates.hasnans
    if dates is None or holes or not isinstance(index, pd.DatetimeIndex | pd.PeriodIndex):
        got = f"{dates.isna().sum()} missing" if holes else f"{index.dtype} labels"
        findings.append(_found("non_date_index", f"Expected dates in the index, got {got}."))
    if dates is None or holes:
        return dates, findings
    repeated = dates.duplicated()
    if repeated.any():
        date = dates[repeated][0]
        message = f"Rows that repeat an earlier date: {repeated.sum()}, the first {iso(date)}."
        findings.append(_found("duplicate_dates", message, None, date))
    if not dates.is_monotonic_increasing:
        row = int((dates[1:] < dates[:-1]).argmax()) + 1
        message = f"Dates are not in order ({iso(dates[row])} follows {iso(dates[row - 1])}): "
        message += "a split in time would leak the future."
        findings.append(_found("unsorted_dates", message, None, dates[row]))
    return dates, findings


def _timestamps(index):
    """DatetimeIndex of the labels (None if they are not dates) and the set of their time zones."""
    if isinstance(index, pd.DatetimeIndex):
        return index, set()
    try:
        if isinstance(index, pd.PeriodIndex):
            return index.to_timestamp(), set()
        if not all(isinstance(x, str | datetime.date | np.datetime64) or x is pd.NaT for x in index):
            return None, set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stamps = [pd.Timestamp(label) for label in index]
        zones = {str(stamp.tzinfo or "none") for stamp in stamps if stamp is not pd.NaT}
        return (pd.DatetimeIndex(stamps) if len(zones) < 2 else None), zones
    except (ValueError, TypeError, OverflowError):
        return None, set()


def _check_missing(X, names, dates):
    """Empty rows of the whole panel, then gaps, late listings and early delistings column by column."""
    findings, gaps, rows = [], np.isnan(X), np.arange(len(X))
    empty = gaps.all(axis=1)
    if X.shape[1] > 1 and empty.any():
        row = int(empty.argmax())
        message = f"{empty.sum()} of {len(X)} rows are empty, the first at {at(dates, row)}."
        finding = _found("missing_values", message, None, None if dates is None else dates[row])
        remedy = "Drop them with dropna(how='all'); the first row of pct_change is always empty."
        findings.append(replace(finding, remedy=remedy))
        gaps, rows = gaps[~empty], rows[~empty]
    n = len(gaps)
    for name, gap in zip(names, gaps.T):
        present = np.flatnonzero(~gap)
        if not len(present):
            findings.append(_in_column("missing_values", name, "has no value at all."))
            continue
        first, last = present[0], present[-1]
        ends = ("late_listing", "begins", first, first), ("early_delisting", "ends", last, n - 1 - last)
        for code, verb, end, lost in ends:
            if lost:
                text = f"{verb} at {at(dates, rows[end])}: keeping complete rows only would lose "
                text += f"{lost} of {n} ({lost / n:.0%})."
                findings.append(_in_column(code, name, text, dates, rows[end]))
        inside = rows[first:last][gap[first:last]]
        if len(inside):
            text = f"lacks {len(inside)} of {n} values, the first at {at(dates, inside[0])}."
            findings.append(_in_column("missing_values", name, text, dates, inside[0]))
    return findings


def _check_cells(code, wrong, X, names, dates):
    """One finding a column with a wrong cell, naming the first and their number."""
    findings = []
    for j in np.flatnonzero(wrong.any(axis=0)):
        row = int(wrong[:, j].argmax())
        text = f"holds {X[row, j]:g} at {at(dates, row)} (values of this kind: {wrong[:, j].sum()})."
        findings.append(_in_column(code, names[j], text, dates, row))
    return findings


def _few_rows(n, d):
    need, unit = max(50, 2 * d), "asset" if d == 1 else "assets"
    if n >= need:
        return []
    finding = _found("few_rows", f"Expected at least {need} returns (max(50, 2 d)) of {d} {unit}, got {n}.")
    return [replace(finding, severity="error") if n < 2 else finding]


def _guesses(X, names, dates=None):
    """Findings of the checks that guess, for presumed returns X (n, d)."""
    seen = np.flatnonzero(np.isfinite(X).sum(axis=0) > 1)
    if not len(seen):
        return []
    X, names = np.where(np.isfinite(X[:, seen]), X[:, seen], np.nan), [names[j] for j in seen]
    findings = _stale_prices(X, names, dates)
    prices = np.flatnonzero(_price_like(X))
    if len(prices):
        levels = np.nanmedian(X[:, prices], axis=0)
        span = f"{levels[0]:.3g}" if len(prices) == 1 else f"{levels.min():.3g} to {levels.max():.3g}"
        message = f"Expected returns, got what look like prices (positive, persistent, median {span}) in "
        message += f"{listed(names[j] for j in prices)}."
        findings.append(_found("prices_as_returns", message, names[prices[0]] if len(prices) == 1 else None))
    # A simple return cannot be below -1, and a panel in per cent with such an sd can hardly avoid it: asking
    # for both spares assets that are volatile at a low frequency.
    scale = np.median(np.nanstd(X, axis=0))
    if scale > 0.25 and np.nanmin(X) < -1:
        message = "Expected returns as fractions, got what look like per cent: a typical standard deviation "
        message += f"of {scale:.0%} a period, and returns below -100 %."
        findings.append(_found("returns_in_percent", message))
    if {"prices_as_returns", "returns_in_percent"} & {f.code for f in findings}:
        return findings  # not returns: their jumps mean nothing
    levels = np.cumsum(np.log1p(np.where(X > -1, X, 0.0)), axis=0)
    return findings + _jumps(np.insert(levels, 0, 0.0, axis=0), names, dates, returns=True)


def _price_like(X):
    """(d,) bool: positive throughout, a median above 0.5 and a lag-one autocorrelation above 0.5.

    A median return of 50 % a period does not exist; cash and yields are positive and persistent, but small.
    """
    guess = (np.fmin.reduce(X, axis=0) > 0) & (np.fmax.reduce(X, axis=0) > 0.5)
    for j in np.flatnonzero(guess):
        x = X[np.isfinite(X[:, j]), j]
        guess[j] = len(x) > 2 and np.median(x) > 0.5 and np.mean(np.diff(x) ** 2) < np.var(x)
    return guess


def _stale_prices(R, names, dates):
    """One finding a column with spells of zero returns R (n, d) that say so, for its longest.

    `_STALE_RUN` zeros count if a move above `_STALE_JUMP` median moves follows (the news that was held back);
    `_STALE_EDGE` at either end of the panel count by themselves (a price filled in).
    """
    findings = []
    for name, r in zip(names, R.T):
        moving = np.flatnonzero(r != 0)
        sizes = np.abs(r[moving])
        if not np.isfinite(sizes).any():
            continue
        starts, stops = np.append(0, moving + 1), np.append(moving, len(r))
        length, edge = stops - starts, (starts == 0) | (stops == len(r))
        jump = np.append(sizes > _STALE_JUMP * np.median(sizes[np.isfinite(sizes)]), False)
        spells = np.flatnonzero((jump & (length >= _STALE_RUN)) | (edge & (length >= _STALE_EDGE)))
        if len(spells):
            longest = spells[length[spells].argmax()]
            start, stop = starts[longest], stops[longest]
            then = f"then moves by {r[stop]:.1%}" if stop < len(r) else "up to the last row"
            text = f"does not move for {stop - start} periods from {at(dates, start)}, {then} "
            text += f"(spells of this kind: {len(spells)})."
            findings.append(_in_column("stale_prices", name, text, dates, start))
    return findings


def _jumps(L, names, dates, returns=False):
    """Findings on log prices L (n, d) that leap and come back (a mistyped price) or leap and stay (a new unit).

    For returns, L has a row more than the panel: the level before the first return.
    """
    L = np.where(np.isfinite(L), L, np.nan)
    if np.isnan(L).any():
        L = pd.DataFrame(L).ffill().to_numpy()  # a leap over a gap is one leap, not two unknown moves
    moves = np.nan_to_num(np.diff(L, axis=0))
    findings = []
    for j in np.flatnonzero((np.abs(moves) > _SPIKE_LOG).any(axis=0)):
        move = moves[:, j]
        typical = np.median(np.abs(move[move != 0]))
        found = dict(zip(("price_spike", "level_shift"), _leaps(move, typical)))
        for code, leaps in found.items():
            if leaps:
                start, stop, severe = next((leap for leap in leaps if leap[2]), leaps[0])
                text = _leap_text(L[:, j], start, stop, dates, returns)
                text += f" ({code.replace('_', ' ')}s: {len(leaps)})."
                finding = _in_column(code, names[j], text, dates, start if returns else start + 1)
                findings.append(replace(finding, severity="error") if severe else finding)
    return findings


def _leaps(move, typical):
    """Spikes and level shifts among log moves (n,): lists of (row of the leap, row of the way back, error).

    A pair of leaps is a spike if they undo each other. Slipped decimals may last and may fall on a day of
    news; smaller ones must be short, undo each other well, and stand alone among days that trade, because a
    share at a cent or two doubles and halves by a tick.
    """
    at_ = np.flatnonzero(np.abs(move) > max(_SPIKE_LOG, _SPIKE_MOVES * typical))
    m = move[at_]
    first, second = np.abs(m[:-1]), np.abs(m[1:])
    low, high, left = np.minimum(first, second), np.maximum(first, second), np.abs(m[:-1] + m[1:])
    short = np.diff(at_) <= _SPIKE_ROWS
    exact = left <= 0.25 * low
    power = np.log([[10.0], [100.0], [1000.0]])
    lasting = exact & (np.maximum(np.abs(first - power), np.abs(second - power)).min(axis=0) < 0.2)
    decimal = ((high > _DECIMAL_LOG) & short & (left <= 0.5 * high)) | lasting
    pair = (m[:-1] * m[1:] < 0) & (decimal | (short & exact))
    score = np.where(pair, left / high, np.inf)
    # Each leap belongs to one spike: to the pair that agrees best.
    pair &= (score <= np.append(score[1:], np.inf)) & (score < np.append(np.inf, score[:-1]))
    spikes, used = [], np.zeros(len(at_), dtype=bool)
    for k in np.flatnonzero(pair):
        start, stop = at_[k], at_[k + 1]
        lone = _calm(move, start, stop, _SPIKE_MOVES / 2 * typical)
        if decimal[k] or lone:
            severe = exact[k] and (low[k] > _SHIFT_LOG or (low[k] > _DECIMAL_LOG and lone))
            spikes.append((start, stop, bool(severe)))
            used[k : k + 2] = True
    shifts = []
    for start in at_[~used]:
        size = abs(move[start])
        shift = np.abs(size - np.log([100.0, 1000.0])).min() < 3 * typical
        if move[start] > max(_RISE_LOG, _SHIFT_MOVES * typical):
            whole = abs(size - np.log(np.rint(np.exp(min(size, _SHIFT_LOG))))) < 3 * typical
            quiet = _calm(move, start, start, _SPIKE_MOVES / 2 * typical)
            shift |= size > _SHIFT_LOG or (whole and quiet)
        if shift:
            shifts.append((start, None, False))
    return spikes, shifts


def _calm(move, start, stop, limit):
    """Whether the rows around a jump trade, and move by less than `limit`."""
    sides = move[max(0, start - _AROUND) : start], move[stop + 1 : stop + 1 + _AROUND]
    around = np.concatenate(sides)
    live = (around != 0).sum() >= min(2 * _LIVE, len(around)) and len(around) >= _LIVE
    return bool(live and (np.abs(around) < limit).all())


def _leap_text(level, start, stop, dates, returns):
    """What the log price did at the move `start`, and at the move `stop` that undid it (None: nothing did)."""
    with np.errstate(over="ignore"):
        size = np.exp(np.abs(level[start + 1] - level[start]))
        values = np.exp(level)
        gains = np.expm1(np.diff(level))
    row, back = start + (not returns), None if stop is None else stop + (not returns)
    if returns:
        text = f"moves by {gains[start]:+,.1%} at {at(dates, row)}"
    else:
        text = f"goes from {values[start]:.6g} to {values[start + 1]:.6g} at {at(dates, row)}"
    if back is not None:
        there = f"by {gains[stop]:+,.1%}" if returns else f"to {values[stop + 1]:.6g}"
        return f"{text} and back {there} at {at(dates, back)}, as a mistyped price does"
    text += " and stays there" if start + 2 < len(level) else ", the last row"
    verb = "multiplied" if level[start + 1] > level[start] else "divided"
    return f"{text}: {verb} by {size:.3g}, as by a reverse split, a new unit or a mistyped price"

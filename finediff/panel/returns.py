"""From prices to returns, x_t = P_t / P_{t-1} - 1, and from one panel to a train and a test part."""

import warnings
from numbers import Real

import numpy as np
import pandas as pd
from sklearn.utils import check_random_state

from finediff.panel.frame import PanelWarning, at, iso, numeric_values, require_frame

_POLICIES = ("error", "drop_rows", "drop_assets", "keep")


def to_returns(prices, *, missing="error") -> pd.DataFrame:
    """Simple returns x_t = P_t / P_{t-1} - 1, one row fewer than prices.

    Parameters
    ----------
    prices : DataFrame (n, d)
        Positive prices, strictly increasing dates.
    missing : {"error", "drop_rows", "drop_assets", "keep"}
        A return is missing where either of its two prices is. "error" refuses a missing price; "drop_rows"
        drops each row with a missing return (all that remain still span one period); "drop_assets" drops each
        asset with a missing price; "keep" leaves NaN. No policy fills a gap.

    Returns
    -------
    DataFrame (n - 1, d)
        Returns per period, as fractions; fewer rows or columns if the policy drops some.

    Raises
    ------
    TypeError, ValueError
        Not a DataFrame; fewer than two rows, unsorted or repeated dates, a column that is not numeric, a
        price that is infinite, zero or negative, or missing under "error"; nothing left after dropping.

    Warns
    -----
    PanelWarning
        "drop_rows" drops more than a tenth of the rows.
    """
    require_frame(prices)
    if missing not in _POLICIES:
        raise ValueError(f"expected missing to be one of {', '.join(_POLICIES)}, got {missing!r}.")
    if len(prices) < 2 or not prices.shape[1]:
        raise ValueError(f"expected at least two rows and one column of prices, got shape {prices.shape}.")
    _require_increasing(prices.index)
    P, bad = numeric_values(prices)
    names, dates = prices.columns, prices.index
    for j, (row, value) in bad.items():
        raise ValueError(f"expected prices in column {names[j]}, got {value!r} at {at(dates, row)}.")
    for wrong, what in ((P <= 0, "positive"), (np.isinf(P), "finite")):
        if wrong.any():
            row, j = np.argwhere(wrong)[0]
            raise ValueError(
                f"expected {what} prices, got {P[row, j]:g} in column {names[j]} at {at(dates, row)}; "
                "correct it, or set it to NaN and choose a policy for missing values."
            )
    gaps = np.isnan(P)
    if missing == "error" and gaps.any():
        j, *others = np.flatnonzero(gaps.any(axis=0))
        also = f" (and gaps in {len(others)} other columns)" if others else ""
        raise ValueError(
            f"expected a price in every cell, got {gaps[:, j].sum()} missing in column {names[j]}, "
            f"the first at {at(dates, gaps[:, j].argmax())}{also}; "
            "choose missing='drop_rows', 'drop_assets' or 'keep'."
        )
    returns = pd.DataFrame(P[1:] / P[:-1] - 1, index=dates[1:], columns=names)
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
    TypeError, ValueError
        Not a DataFrame; unsorted or repeated dates, neither a fraction nor a date, or an empty part.

    Examples
    --------
    >>> panel = pd.DataFrame({"A": range(10)}, index=pd.date_range("2024-01-01", periods=10))
    >>> [len(part) for part in split(panel, 0.3)], [len(part) for part in split(panel, "2024-01-09")]
    ([7, 3], [8, 2])
    """
    require_frame(panel)
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
            f"expected a date after {iso(panel.index[0])} and not after {iso(panel.index[-1])}, "
            f"got {held_out!r}, because both parts need a row."
        )
    return panel.iloc[:cut], panel.iloc[cut:]


def random_split(panel, held_out=0.2, random_state=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and test rows chosen at random, each in the order of the panel.

    For statistics of exchangeable rows (a memorisation test, say). Neighbouring days resemble each other, so
    a random split flatters any forecast: `split` is the one for backtests. Arguments, results and errors are
    those of `split`, except that any index will do and that `held_out` must be a fraction; `random_state` is
    None, an int or a RandomState.
    """
    require_frame(panel)
    chosen = np.zeros(len(panel), dtype=bool)
    count = _held_out_rows(len(panel), held_out)
    chosen[check_random_state(random_state).permutation(len(panel))[:count]] = True
    return panel[~chosen], panel[chosen]


def _held_out_rows(n, held_out):
    if not isinstance(held_out, Real) or isinstance(held_out, bool) or not 0 < held_out < 1:
        raise ValueError(f"expected held_out to be a fraction between 0 and 1, got {held_out!r}.")
    count = round(n * float(held_out))
    if not 0 < count < n:
        raise ValueError(f"expected rows in both parts, got {n - count} and {count}, from {n} rows in all.")
    return count


def _require_increasing(index):
    if index.has_duplicates or not index.is_monotonic_increasing:
        fault = "repeated" if index.has_duplicates else "unsorted"
        raise ValueError(f"expected strictly increasing dates, got {fault} ones; check_panel names them.")

"""What the files of this folder share: the values of a frame, and its rows, dates and names in words."""

from numbers import Real

import numpy as np
import pandas as pd


class PanelWarning(UserWarning):
    """The panel can be used as it is, but probably does not hold what was meant."""


def require_frame(panel):
    if not isinstance(panel, pd.DataFrame):
        raise TypeError(f"expected a DataFrame with a row per date, got {type(panel).__name__}.")


def numeric_values(frame):
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


def at(index, row):
    """A row in words: its date, if it has one, or its number from 0."""
    label = None if index is None else index[row]
    return iso(label) if isinstance(label, pd.Timestamp) else f"row {row}"


def iso(date):
    return f"{date:%Y-%m-%d}"


def listed(names, most=5):
    """'A, B, C, D, E and 7 more'."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""What a panel must be before anything is learned from it: one sentence with the asset and the date if it is not."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import pandas as pd


def refuse_gaps(X, *, missing: bool = False) -> None:
    """Raise ValueError for a table's infinite, non-numeric or (unless ``missing``) missing entries.

    Parameters
    ----------
    X : DataFrame or array (n, d)
        Other things pass: `sklearn.utils.validation.validate_data` judges them.
    missing : bool
        Whether NaN may stand in it.
    """
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind == "f" and X.size:
        X = pd.DataFrame(X)
    if not isinstance(X, pd.DataFrame):
        return
    if not X.shape[1]:
        raise ValueError(f"expected at least one asset, got a table of shape {X.shape}")
    if not X.columns.is_unique:
        twice = X.columns[X.columns.duplicated()][0]
        raise ValueError(f"expected each asset once, got several columns {twice!r}: rename or drop them")
    for position, (name, column) in enumerate(X.items()):
        values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        if pd.api.types.is_numeric_dtype(column) and np.isfinite(values).all():
            continue
        gap = column.isna().to_numpy()
        text = np.isnan(values) & ~gap
        dates = np.full(len(X), pd.api.types.is_datetime64_any_dtype(column))
        policy = 'choose a policy first: to_returns(prices, missing="drop_rows")'
        for what, where, remedy in (
            ("dates", dates, "make it the index, or drop it"),
            ("text", text, "drop or convert the column"),
            ("NaN (a missing value)", gap & (not missing), policy),
            ("infinity (inf)", np.isinf(values), "correct the price it comes from"),
        ):
            if where.any():
                row = int(np.argmax(where))
                raise ValueError(
                    f"expected finite returns, got {what} in column {name!r} (number {position}), first at "
                    f"{X.index[row]!s}, {int(where.sum())} in all: {remedy}"
                )


def refuse_nothing_to_learn(X: np.ndarray, names) -> None:
    """Raise ValueError where an asset of X (n, d) has no return at all, or none has two that differ."""
    empty = np.isnan(X).all(axis=0)
    if empty.any():
        first = int(np.argmax(empty))
        raise ValueError(
            f"expected a return of each asset, got none in column {names[first]!r} (number {first}), "
            f"{int(empty.sum())} such in all: drop what was never traded"
        )
    if not (np.fmin.reduce(X, axis=0) < np.fmax.reduce(X, axis=0)).any():
        raise ValueError(
            f"expected returns that vary, got the same row {len(X)} times: there is no law to learn"
        )


def positive_integer(name: str, value, remedy: str) -> int:
    """The argument as an int, or ValueError for anything but a positive integer."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected {name} to be a positive integer, got {value!r}: {remedy}")
    return int(value)

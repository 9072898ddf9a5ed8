"""Conditions as numbers: continuous columns standardised, categorical ones one-hot; a missing row means "none"."""

from __future__ import annotations

import numbers

import numpy as np
import pandas as pd


class ConditionEncoder:
    """Encode what is known about a date (volatility, regime, sector move) as a vector.

    Columns of a DataFrame with a text, boolean or categorical dtype are categorical, all others continuous;
    arrays are continuous unless they hold text or booleans.

    Attributes
    ----------
    columns_ : list of dict
        JSON-able: {"name", "mean", "scale"} or {"name", "categories"}.
    """

    def fit(self, condition, n_rows: int) -> ConditionEncoder:
        """Learn scales and categories from one row of conditions for each of n_rows rows of the panel."""
        frame = _as_frame(condition)
        if len(frame) != n_rows:
            raise ValueError(
                f"expected one row of conditions for each of {n_rows} rows of the panel, got {len(frame)}: select the "
                "same dates"
            )
        self.columns_ = []
        for name, column in frame.items():
            if column.isna().any():
                raise ValueError(
                    f"expected complete conditions, got {int(column.isna().sum())} missing in column {name!r}: fill or drop "
                    "those dates"
                )
            if _is_categorical(column):
                categories = [_plain(value) for value in pd.unique(column)]
                self.columns_.append({"name": str(name), "categories": sorted(categories, key=str)})
            else:
                values = column.to_numpy(dtype=np.float64)
                scale = float(values.std())
                if not np.isfinite(values).all() or scale == 0:
                    raise ValueError(
                        f"expected finite conditions that vary, got a column {name!r} that does not: leave it out"
                    )
                self.columns_.append({"name": str(name), "mean": float(values.mean()), "scale": scale})
        return self

    @property
    def size(self) -> int:
        """Length of the encoded vector."""
        return sum(len(column.get("categories", [0])) for column in self.columns_)

    def transform(self, condition, n_rows: int) -> np.ndarray:
        """(n_rows, size) float32; a single row of conditions, a mapping or a number stands for all rows."""
        if isinstance(condition, dict):
            condition = pd.DataFrame([condition])
        elif isinstance(condition, numbers.Number | str | bool):
            condition = pd.DataFrame([[condition]], columns=[self.columns_[0]["name"]])
        elif (
            np.ndim(condition) == 1
            and len(condition) == len(self.columns_) > 1
            and not isinstance(condition, pd.Series)
        ):
            condition = pd.DataFrame([list(condition)])
        frame = _as_frame(condition)
        names = [column["name"] for column in self.columns_]
        if list(map(str, frame.columns)) != names and set(map(str, frame.columns)) == set(names):
            frame = frame.set_axis(list(map(str, frame.columns)), axis=1)[names]
        if frame.shape[1] != len(names) or len(frame) not in (1, n_rows):
            raise ValueError(
                f"expected conditions {names} for 1 or {n_rows} rows, got {frame.shape[1]} columns and {len(frame)} rows"
            )
        parts = []
        for about, (_, column) in zip(self.columns_, frame.items()):
            if "categories" in about:
                codes = [_plain(value) for value in column]
                unknown = [value for value in codes if value not in about["categories"]]
                if unknown:
                    raise ValueError(
                        f"expected {about['name']!r} to be one of {about['categories']}, got {unknown[0]!r}: the generator "
                        "has not seen it"
                    )
                parts.append(
                    np.array(
                        [[value == known for known in about["categories"]] for value in codes], dtype=float
                    )
                )
            else:
                values = pd.to_numeric(column).to_numpy(dtype=np.float64)
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"expected a finite {about['name']!r}, got {values[~np.isfinite(values)][0]}"
                    )
                parts.append(((values - about["mean"]) / about["scale"])[:, None])
        encoded = np.concatenate(parts, axis=1).astype(np.float32)
        return np.repeat(encoded, n_rows, axis=0) if len(encoded) == 1 else encoded


def _as_frame(condition) -> pd.DataFrame:
    if isinstance(condition, pd.DataFrame):
        return condition
    if isinstance(condition, pd.Series):
        return condition.to_frame(condition.name if condition.name is not None else "0")
    array = np.asarray(condition)
    if array.ndim not in (1, 2):
        raise ValueError(f"expected conditions of shape (n,) or (n, c), got {array.shape}")
    return pd.DataFrame(array if array.ndim == 2 else array[:, None]).rename(columns=str)


def _is_categorical(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value

"""What every comparison asks of its rows: finite, as many columns, in one order, real assets that move."""

from __future__ import annotations

import numpy as np

from finediff.memorisation import as_rows

MIN_ROWS = 20


def panels(real, synthetic, train=None):
    """Checked arrays of the real rows, the scenarios and (if given) the training rows."""
    x, y = as_rows(real, "real", MIN_ROWS), as_rows(synthetic, "synthetic", MIN_ROWS)
    same_columns(real, x, synthetic, y, "real", "synthetic")
    z = None
    if train is not None:
        z = as_rows(train, "train", MIN_ROWS)
        same_columns(real, x, train, z, "real", "train")
    still = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if still.size:
        label = list(getattr(real, "columns", range(x.shape[1])))[still[0]]
        raise ValueError(
            f"expected real assets that move, got a constant column {label!r}, because its ratios divide by "
            "zero: drop that asset"
        )
    return x, y, z


def same_columns(a, left, b, right, first: str, second: str) -> None:
    """Refuse two panels (with their arrays and their names) that cannot be compared column by column."""
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"expected {second} with the {left.shape[1]} columns of {first}, got {right.shape[1]}, because "
            "they are compared column by column: select the same assets"
        )
    if hasattr(a, "columns") and hasattr(b, "columns"):
        for i, (p, q) in enumerate(zip(a.columns, b.columns)):
            if p != q:
                raise ValueError(
                    f"expected the columns of {second} in the order of {first}, got {q!r} for {p!r} at "
                    f"position {i}, because assets are matched by place: reindex one of them"
                )


def subset(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` rows at random, without replacement."""
    return x if len(x) <= count else x[rng.permutation(len(x))[:count]]


def generator(random_state) -> np.random.Generator:
    """A numpy Generator from None, an int, a RandomState or a Generator."""
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31 - 1))
    return np.random.default_rng(random_state)


def plain(value):
    """A number, string, list or None that JSON can hold: NaN and infinity become None."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value

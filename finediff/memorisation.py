"""Has the generator copied its training rows?

With training rows y_1..y_n and a scenario x, distances in units of each asset's training standard deviation,

    d_1(x) <= d_2(x)      distances from x to its nearest and second nearest training row
    ratio(x) = d_1 / d_2                                       0: a copy, near 1: a fresh point
    memorised fraction = #{x : d_1 < d_2 / 3} / m              (Bonnaire et al. 2025)
    distance ratio = median_x d_1(x) / median_h d_1(h)         h: held-out rows; 1: as fresh as they

Of fresh rows from a smooth density a fraction of about r^d has ratio below r, where d counts the dimensions
that the rows fill: one in three with one asset and none with twenty. With few assets read the memorised
fraction beside that of held-out rows, which `finediff.validation.validate` prints next to it.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "as_rows",
    "copied",
    "distance_ratio",
    "median_ratio",
    "memorised_fraction",
    "nearest_neighbour_ratio",
    "two_nearest",
]

_BLOCK = 2**22  # distances held at a time: 32 MB of float64


def as_rows(x, name: str, min_rows: int = 1) -> np.ndarray:
    """Finite float matrix (n, d) from an array or a DataFrame, or a ValueError that names the fault."""
    columns = getattr(x, "columns", None)
    values = np.ascontiguousarray(x, dtype=np.float64)  # frames and arrays: same bits
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(
            f"expected {name} of shape (rows, assets), got shape {values.shape}, because every row is one "
            "scenario of all assets: reshape(-1, 1) for a single asset"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        j = int(np.argmax(bad.any(axis=0)))
        label = repr(columns[j]) if columns is not None else str(j)
        raise ValueError(
            f"expected finite numbers in {name}, got {int(bad[:, j].sum())} NaN or infinite in column {label}"
            ", because ranks and distances are undefined there: drop or fill those rows first"
        )
    if len(values) < min_rows:
        raise ValueError(
            f"expected at least {min_rows} rows in {name}, got {len(values)}, because fewer cannot carry the "
            "statistic: pass more rows"
        )
    return values


def two_nearest(samples, train, *, standardize: bool = True) -> np.ndarray:
    """Distances (m, 2) from every sample to its two nearest training rows, ascending."""
    x, y = as_rows(samples, "samples"), as_rows(train, "train", 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"expected samples with the {y.shape[1]} assets of train, got {x.shape[1]}, because distances "
            "need the same columns: select them"
        )
    centre = y.mean(axis=0)
    scale = y.std(axis=0) if standardize else np.ones(y.shape[1])
    scale = np.where(scale > 0, scale, 1.0)
    x, y = (x - centre) / scale, (y - centre) / scale
    norms = np.einsum("ij,ij->i", y, y)
    out = np.empty((len(x), 2))
    step = max(1, _BLOCK // max(len(y), 2 * x.shape[1]))
    for start in range(0, len(x), step):
        block = x[start : start + step]
        # |x|^2 is the same for all candidates: it orders nothing and is left out.
        squared = norms - 2.0 * (block @ y.T)
        nearest = np.argpartition(squared, 1, axis=1)[:, :2]
        # The product loses digits where x is a copy; the two winners are measured again by subtraction.
        gap = block[:, None, :] - y[nearest]
        out[start : start + step] = np.sort(np.sqrt(np.einsum("ikj,ikj->ik", gap, gap)), axis=1)
    return out


def nearest_neighbour_ratio(samples, train, *, standardize: bool = True) -> np.ndarray:
    """Distance to the nearest training row over the distance to the second nearest.

    Parameters
    ----------
    samples : array or DataFrame (m, d)
        Scenarios.
    train : array or DataFrame (n, d)
        Rows that the generator was fitted on, n >= 2.
    standardize : bool
        Measure every asset in its training standard deviations (else in the units of the data).

    Returns
    -------
    ndarray (m,)
        In [0, 1]. Where both distances vanish (a copy of a row that `train` holds twice) the ratio is 0.

    Raises
    ------
    ValueError
        On non-finite values, different numbers of assets, or fewer than two training rows.

    References
    ----------
    T. Bonnaire, R. Urfin, G. Biroli, M. Mezard, "Why diffusion models don't memorize" (2025),
    arXiv:2505.17638.

    Examples
    --------
    >>> nearest_neighbour_ratio([[0.0], [1.0]], [[0.0], [4.0]], standardize=False)
    array([0.        , 0.33333333])
    """
    first, second = two_nearest(samples, train, standardize=standardize).T
    return np.divide(first, second, out=np.zeros_like(first), where=second > 0)


def memorised_fraction(samples, train, ratio: float = 1 / 3, *, standardize: bool = True) -> float:
    """Fraction of samples whose nearest training row is closer than `ratio` times the second nearest.

    Parameters
    ----------
    samples, train, standardize
        As in `nearest_neighbour_ratio`.
    ratio : float
        Threshold in (0, 1].

    Returns
    -------
    float
        In [0, 1]; 1 when every sample is a copy.

    Raises
    ------
    ValueError
        As `nearest_neighbour_ratio`; also when `ratio` is outside (0, 1].

    References
    ----------
    T. Bonnaire et al. (2025), arXiv:2505.17638; T. Yoon et al., "Diffusion probabilistic models generalize
    when they fail to memorize" (2023).
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(
            f"expected ratio in (0, 1], got {ratio}, because it compares an ordered pair: use 1/3"
        )
    return float(np.mean(copied(two_nearest(samples, train, standardize=standardize), ratio)))


def copied(nearest: np.ndarray, ratio: float = 1 / 3) -> np.ndarray:
    """Is a sample closer to a training row than `ratio` times the second? Of the answer (m, 2) of `two_nearest`."""
    return (nearest[:, 0] < ratio * nearest[:, 1]) | (nearest[:, 1] == 0)


def distance_ratio(samples, held_out, train, *, standardize: bool = True) -> float:
    """Median distance of samples to the training rows over that of held-out rows.

    Parameters
    ----------
    samples : array or DataFrame (m, d)
        Scenarios.
    held_out : array or DataFrame (h, d)
        Rows of the market that the generator never saw.
    train : array or DataFrame (n, d)
        Rows that it was fitted on.
    standardize : bool
        As in `nearest_neighbour_ratio`.

    Returns
    -------
    float
        1 is ideal, 0 is a copy, above 1 the samples stay away from the market's rows.

    Raises
    ------
    ValueError
        As `nearest_neighbour_ratio`; also when at least half of the held-out rows are training rows.
    """
    return median_ratio(
        two_nearest(samples, train, standardize=standardize)[:, 0],
        two_nearest(held_out, train, standardize=standardize)[:, 0],
    )


def median_ratio(distances: np.ndarray, reference: np.ndarray) -> float:
    """Median of `distances` over that of `reference`; a ValueError where the latter vanishes."""
    middle = float(np.median(reference))
    if middle == 0.0:
        raise ValueError(
            "expected held-out rows that differ from the training rows, got a median distance of 0, because "
            "at least half of them also stand in train: hold out rows that the generator never saw"
        )
    return float(np.median(distances)) / middle

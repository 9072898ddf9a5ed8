"""What a covariance is: checks, correlation and scales, names kept.

    Sigma = D^1/2 C D^1/2,   D the diagonal of Sigma, C its correlation

Units: covariances are in (return per period)^2. What is not checked takes stacks (..., d, d) too.
"""

import numpy as np
import pandas as pd

_TOLERANCE = 1e-6  # relative; single-precision covariances pass, wrong ones do not


def checked(covariance):
    """The matrix as float64 (d, d) and its names or None; refuses what is no covariance of live assets."""
    names = covariance.columns if isinstance(covariance, pd.DataFrame) else None
    if names is not None and not covariance.index.equals(names):
        raise ValueError(
            "expected a covariance whose index equals its columns, got different names; "
            "a panel of returns is not a covariance: call returns.cov() first."
        )
    matrix = np.asarray(covariance, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"expected a covariance of shape (d, d), got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        i, j = (i, j) if names is None else (names[i], names[j])
        raise ValueError(
            f"expected finite entries, got NaN or infinity at ({i}, {j}); fill or drop them first."
        )
    size = np.abs(matrix).max()
    gap = np.abs(matrix - matrix.T).max()
    if gap > _TOLERANCE * size:
        raise ValueError(f"expected a symmetric covariance, got |S - S'| up to {gap:.3g}; pass (S + S') / 2.")
    variance = np.diag(matrix)
    dead = np.flatnonzero(variance <= 1e-24 * size)
    if dead.size:
        labels = (dead if names is None else names[dead]).tolist()[:5]
        raise ValueError(
            f"expected positive variances, got {variance[dead[0]]:.3g} for {labels}: such an asset has no "
            "correlation (a constant or stale price); drop it."
        )
    return (matrix + matrix.T) / 2, names


def framed(matrix, names):
    """The matrix under its names, if it has any."""
    return matrix if names is None else pd.DataFrame(matrix, index=names, columns=names)


def correlation_of(covariance):
    """Correlation (d, d), standard deviations (d,), and names or None."""
    matrix, names = checked(covariance)
    return *standardised(matrix), names


def diagonal(matrix):
    """Diagonals (..., d) of matrices (..., d, d), to be read only."""
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def with_diagonal(matrix, values):
    """The matrices (..., d, d), changed in place, with these diagonals: (..., d) or a number."""
    i = np.arange(matrix.shape[-1])
    matrix[..., i, i] = values
    return matrix


def outer(vector):
    """v v' (..., d, d) of vectors (..., d)."""
    return vector[..., :, None] * vector[..., None, :]


def standardised(covariance):
    """Correlations (..., d, d) and standard deviations (..., d) of covariances of live assets; not checked."""
    sd = np.sqrt(diagonal(covariance))
    return with_diagonal(covariance / outer(sd), 1.0), sd


def semidefinite(eigenvalues):
    """Eigenvalues (..., d), ascending, without the negative ones of rounding; refuses real negative ones."""
    least = eigenvalues[..., 0]
    if (least < -_TOLERANCE * eigenvalues[..., -1]).any():
        raise ValueError(
            f"expected a positive semi-definite covariance, got a smallest correlation eigenvalue of "
            f"{least.min():.3g}; estimate it from complete rows (pairwise estimates are not PSD)."
        )
    return np.maximum(eigenvalues, 0.0)


def unit_diagonal(matrix):
    """Correlations (..., d, d) of symmetric matrices, exactly symmetric with ones on the diagonal."""
    sd = np.sqrt(diagonal(matrix))
    return with_diagonal((matrix + matrix.swapaxes(-1, -2)) / (2 * outer(sd)), 1.0)


def correlation_from_covariance(covariance):
    """Correlation matrix (d, d) with an exact unit diagonal; a DataFrame stays a DataFrame.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units.

    Returns
    -------
    (d, d) array or DataFrame

    Raises
    ------
    ValueError
        If the matrix is not square, symmetric and finite with positive variances.
    """
    correlation, _, names = correlation_of(covariance)
    return framed(correlation, names)


def rescale(correlation, standard_deviation):
    """Covariance D^1/2 C D^1/2 (d, d) of a correlation (d, d) and standard deviations (d,).

    Parameters
    ----------
    correlation : (d, d) array or DataFrame
        C.
    standard_deviation : (d,) array
        Square roots of the diagonal D.

    Returns
    -------
    (d, d) array or DataFrame

    Raises
    ------
    ValueError
        If the shapes disagree; (d, 1) is refused, it would scale rows only.
    """
    names = correlation.columns if isinstance(correlation, pd.DataFrame) else None
    matrix, sd = np.asarray(correlation, float), np.asarray(standard_deviation, float)
    if matrix.shape != (sd.size, sd.size) or sd.ndim != 1:
        raise ValueError(f"expected shapes (d, d) and (d,), got {matrix.shape} and {sd.shape}.")
    return framed(matrix * np.outer(sd, sd), names)


def refuse_holes(rows, names, where):
    """Refuse non-finite entries of rows (n, d); names (d,) or None label the column."""
    finite = np.isfinite(rows)
    if not finite.all():
        i, j = np.argwhere(~finite)[0]
        label = int(j) if names is None else names[j]
        found = "NaN" if np.isnan(rows[i, j]) else f"infinity ({rows[i, j]})"
        raise ValueError(
            f"expected finite returns, got {found} in {where} at row {i}, column {label!r}; "
            "drop or fill such rows first."
        )

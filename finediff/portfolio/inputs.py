"""What problems are solved with: means (d,), covariances (d, d) and scenarios (n, d), checked once.

A covariance is also kept as a root R with R'R = Sigma, from the eigenvectors of the correlation C = V L V':

    R = L^(1/2) V' diag(sigma),     |R w|^2 = w' Sigma w

which exists where Sigma is singular, and enters a compiled program as a parameter.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve

from finediff.portfolio.constraints import require

_SINGULAR = 1e-12  # smallest over largest eigenvalue of the correlation


@dataclass(frozen=True, eq=False)
class Moments:
    """Checked moments.

    Attributes
    ----------
    mean : (d,) array or None
    covariance : (d, d) array
        Symmetric, positive semi-definite.
    root : (d, d) array
        R with R'R = Sigma.
    names : Index or None
    rcond : float
        Smallest over largest eigenvalue of the correlation; 0 with a variance of zero.
    """

    mean: object
    covariance: np.ndarray
    root: np.ndarray
    names: object
    rcond: float

    def __len__(self):
        return len(self.covariance)

    @property
    def unit(self):
        """Mean variance: programs are solved in it, and so are the same in any units."""
        return float(np.trace(self.covariance)) / len(self)

    def require_invertible(self):
        """Raise where Sigma^-1 would be noise."""
        if self.rcond <= _SINGULAR:
            raise ValueError(
                f"expected an invertible covariance, got a reciprocal condition number of its correlation of "
                f"{self.rcond:.1e} (too few rows, or an asset repeated); clean it first, for example with "
                "finediff.covariance.clip, or add a constraint such as LongOnly()."
            )

    def inverse_times(self, vector):
        """Sigma^-1 vector, through the correlation so that the units of single assets do not matter."""
        self.require_invertible()
        sd = np.sqrt(np.diag(self.covariance))
        factor = cho_factor(self.covariance / sd / sd[:, None], lower=True)
        return cho_solve(factor, vector / sd) / sd


def check_moments(mean, covariance):
    """Moments from what a user hands in.

    Parameters
    ----------
    mean : (d,) array or Series, or None
        Matched to a named covariance by name.
    covariance : (d, d) array or DataFrame
        Symmetric and positive semi-definite up to rounding.

    Returns
    -------
    Moments

    Raises
    ------
    ValueError
        Shapes, names, NaN, symmetry, definiteness.
    """
    names = covariance.columns if isinstance(covariance, pd.DataFrame) else None
    if names is not None and not covariance.index.equals(names):
        raise ValueError("expected a covariance whose index equals its columns, got different names.")
    matrix = np.asarray(covariance, float)
    require(
        matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.size > 0,
        "a covariance of shape (d, d)",
        matrix.shape,
    )
    mean, names = _match_mean(mean, len(matrix), names)
    for array, what in ((matrix, "covariance"), (mean, "mean")):
        if array is not None:
            _require_finite(array, what, names)
    size = np.abs(matrix).max()
    require(size > 0, "a covariance with some variance", "all zeros")
    gap = np.abs(matrix - matrix.T).max()
    require(gap <= 1e-6 * size, "a symmetric covariance", f"|S - S'| up to {gap:.3g}")
    matrix = (matrix + matrix.T) / 2
    sd = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    unit = np.where(sd > 0, sd, np.sqrt(size))
    values, vectors = np.linalg.eigh(matrix / unit / unit[:, None])
    if values[0] < -1e-6 * values[-1]:
        raise ValueError(
            f"expected a positive semi-definite covariance, got a smallest correlation eigenvalue of "
            f"{values[0]:.3g}; estimate it from complete rows, or clean it."
        )
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T * unit
    if values[0] < 0:
        matrix = root.T @ root
    rcond = values[0] / values[-1] if (sd > 0).all() else 0.0
    return Moments(mean, matrix, root, names, float(rcond))


def _match_mean(mean, n_assets, names):
    """Mean (d,) as an array in the covariance's order, or None, and the names of either."""
    if mean is not None:
        shape = np.shape(mean)
        if len(shape) != 1:
            raise ValueError(
                f"expected a mean of shape (d,), got {shape}, because against (d,) it would broadcast to "
                "(d, d); pass mean.ravel() or, for a DataFrame, its one column."
            )
        require(shape[0] == n_assets, f"a mean of {n_assets} assets, as the covariance has", shape[0])
        if isinstance(mean, pd.Series):
            if names is None:
                names = mean.index
            elif set(names) != set(mean.index):
                odd = list(names.symmetric_difference(mean.index))[:5]
                raise ValueError(f"expected mean and covariance on the same assets, got a mismatch: {odd}.")
    _require_unique(names)
    if mean is not None:
        mean = np.asarray(mean[names] if isinstance(mean, pd.Series) else mean, float)
    return mean, names


def _require_unique(names):
    if names is not None and names.has_duplicates:
        raise ValueError(f"expected unique asset names, got {list(names[names.duplicated()])[:5]} twice.")


def _require_finite(array, what, names):
    if not np.isfinite(array).all():
        at = [i if names is None else names[i] for i in np.argwhere(~np.isfinite(array))[0]]
        raise ValueError(f"expected a finite {what}, got NaN or infinity at {at}; fill or drop that asset.")


def check_scenarios(scenarios):
    """Scenarios as a float (n, d) array, and the names of their columns or None.

    Parameters
    ----------
    scenarios : (n, d) array or DataFrame
        Simple returns per period, equally probable rows.

    Returns
    -------
    (n, d) array, and an Index or None

    Raises
    ------
    ValueError
        Not a table with rows, NaN, or a name twice.
    """
    array = np.asarray(scenarios, float)
    require(array.ndim == 2 and array.size > 0, "scenarios of shape (n, d)", array.shape)
    names = scenarios.columns if isinstance(scenarios, pd.DataFrame) else None
    _require_unique(names)
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(
            f"expected finite scenarios, got NaN or infinity in row {row} of "
            f"{column if names is None else repr(names[column])}; fill or drop it."
        )
    return np.ascontiguousarray(array), names

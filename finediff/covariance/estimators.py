"""The cleaners as scikit-learn estimators: fit(X).covariance_.

Rows are simple returns per period (n, d); covariances are per period. Each estimator is a scikit-learn
`EmpiricalCovariance`: `score`, `mahalanobis`, `error_norm` and `get_precision` come with it.
"""

import numpy as np
from sklearn.base import clone
from sklearn.covariance import EmpiricalCovariance
from sklearn.utils.validation import validate_data

from finediff.covariance.blocks import block_correlation
from finediff.covariance.clean import clipped_correlation, shrunk_covariance
from finediff.covariance.factors import factor_analytic
from finediff.covariance.matrix import diagonal, outer, refuse_holes, standardised
from finediff.covariance.spectrum import analytical, quadratic_inverse, rotationally_invariant


class CovarianceEstimator(EmpiricalCovariance):
    """A covariance of rows; subclasses give `_estimate`.

    Attributes
    ----------
    covariance_ : (d, d) array
    location_ : (d,) array
        Mean per period; zeros if `assume_centered`.
    n_features_in_ : int
    feature_names_in_ : (d,) array, if X is a DataFrame with string columns
    """

    store_precision = False
    _closed_form = False  # whether `_estimate` takes stacks (m, n, d)

    def __init__(self, *, assume_centered=False):
        self.assume_centered = assume_centered

    def fit(self, X, y=None):
        """Estimate from X.

        Parameters
        ----------
        X : (n, d) array or DataFrame
            Simple returns per period, n >= 3.
        y : None
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For fewer than three rows, non-finite entries (row and column named), or an asset that never moves.
        """
        rows = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=3)
        refuse_holes(rows, getattr(self, "feature_names_in_", None), "X")
        self.location_, self.covariance_ = self._centre_and_estimate(np.ascontiguousarray(rows))
        return self

    def fit_many(self, panels):
        """Estimates of many panels of one shape, as back-tests need; this estimator is not changed.

        Closed forms do all of them in one go, and the numbers are those of fitting each, to the last bit.

        Parameters
        ----------
        panels : (m, n, d) array
            Simple returns per period, n >= 3.

        Returns
        -------
        locations : (m, d) array
        covariances : (m, d, d) array

        Raises
        ------
        ValueError
            As `fit`, for any of them.
        """
        panels = np.ascontiguousarray(panels, float)
        if panels.ndim != 3 or panels.shape[1] < 3 or not np.isfinite(panels).all():
            raise ValueError(
                f"expected finite panels (m, n, d) of at least 3 rows, got shape {panels.shape} or holes: each is fitted "
                "alone if they differ; call fit."
            )
        # A subclass may have its own `fit`, or an `_estimate` that takes no stacks.
        owner = next(cls for cls in type(self).__mro__ if "_estimate" in vars(cls))
        plain = type(self).fit is CovarianceEstimator.fit
        if plain and vars(owner).get("_closed_form", False):
            return self._centre_and_estimate(panels)
        fits = [clone(self).fit(panel) for panel in panels]
        m, _, d = panels.shape
        locations = np.array([fit.location_ for fit in fits]).reshape(m, d)
        return locations, np.array([fit.covariance_ for fit in fits]).reshape(m, d, d)

    def _centre_and_estimate(self, rows):
        """Locations (..., d) and covariances (..., d, d) of rows (..., n, d)."""
        n, d = rows.shape[-2:]
        location = np.zeros((*rows.shape[:-2], d)) if self.assume_centered else rows.mean(axis=-2)
        # Cleaners count rows before the mean is removed: rows that keep their mean are worth one more.
        return location, self._estimate(rows - location[..., None, :], n + bool(self.assume_centered))

    def _estimate(self, rows, n_samples):
        """Covariance (d, d) of centred rows whose scatter has n_samples - 1 degrees of freedom."""
        raise NotImplementedError


def sample_covariance(rows, n_samples):
    """Covariances (..., d, d) of centred rows (..., n, d), divided by n_samples - 1."""
    return rows.swapaxes(-1, -2) @ rows / (n_samples - 1)


def live_variances(covariance):
    """Diagonals (..., d) of covariances; refuses zeros."""
    return live(diagonal(covariance).copy())


def live(variance):
    """Variances (..., d); refuses zeros."""
    small = variance <= 1e-24 * variance.max(axis=-1, keepdims=True)
    dead = np.flatnonzero(small.reshape(-1, small.shape[-1]).any(axis=0))
    if dead.size:
        raise ValueError(
            f"expected assets that move, got a constant column at {dead[:5].tolist()}: it has no correlation (a "
            "stale price?); drop it."
        )
    return variance


class ClippedCovariance(CovarianceEstimator):
    """Marchenko-Pastur clip of the sample covariance: see `finediff.covariance.clip`.

    Parameters
    ----------
    edge : {"tracy-widom", "bulk", "fitted"}
    level : float
        Chance of a false factor, in (0, 1).
    assume_centered : bool
        True takes the mean for zero.
    """

    _closed_form = True

    def __init__(self, *, edge="tracy-widom", level=0.01, assume_centered=False):
        self.edge = edge
        self.level = level
        self.assume_centered = assume_centered

    def _estimate(self, rows, n_samples):
        S = sample_covariance(rows, n_samples)
        live_variances(S)
        correlation, sd = standardised(S)
        return clipped_correlation(correlation, n_samples, self.edge, self.level) * outer(sd)


class _Nonlinear(CovarianceEstimator):
    _closed_form = True

    def __init__(self, *, standardise=True, assume_centered=False):
        self.standardise = standardise
        self.assume_centered = assume_centered

    def _estimate(self, rows, n_samples):
        S = sample_covariance(rows, n_samples)
        live_variances(S)
        return shrunk_covariance(S, n_samples, type(self)._formula, self.standardise)


class QuadraticInverseShrinkage(_Nonlinear):
    """Ledoit and Wolf (2022): see `finediff.covariance.quadratic_inverse_shrinkage`.

    Parameters
    ----------
    standardise : bool
        True shrinks the correlation and keeps the variances.
    assume_centered : bool
        True takes the mean for zero.
    """

    _formula = staticmethod(quadratic_inverse)


class AnalyticalShrinkage(_Nonlinear):
    """Ledoit and Wolf (2020): see `finediff.covariance.analytical_shrinkage`.

    Parameters
    ----------
    standardise : bool
        True shrinks the correlation and keeps the variances.
    assume_centered : bool
        True takes the mean for zero.
    """

    _formula = staticmethod(analytical)


class RotationallyInvariantCovariance(_Nonlinear):
    """Bun, Bouchaud and Potters (2016): see `finediff.covariance.rie`.

    Parameters
    ----------
    standardise : bool
        True shrinks the correlation and keeps the variances.
    assume_centered : bool
        True takes the mean for zero.
    """

    _formula = staticmethod(rotationally_invariant)


class FactorAnalyticCovariance(CovarianceEstimator):
    """Common factors and independent residuals: see `finediff.covariance.factor_analytic`.

    Parameters
    ----------
    k : int, optional
        Factors; by default those above the Tracy-Widom edge.
    assume_centered : bool
        True takes the mean for zero.
    """

    def __init__(self, *, k=None, assume_centered=False):
        self.k = k
        self.assume_centered = assume_centered

    def _estimate(self, rows, n_samples):
        return factor_analytic(sample_covariance(rows, n_samples), n_samples, k=self.k)


class BlockCovariance(CovarianceEstimator):
    """Correlations averaged over groups of assets: see `finediff.covariance.block_correlation`.

    Parameters
    ----------
    blocks : (d,) array of labels, optional
        The group of each asset; found by clustering by default.
    assume_centered : bool
        True takes the mean for zero.
    """

    def __init__(self, *, blocks=None, assume_centered=False):
        self.blocks = blocks
        self.assume_centered = assume_centered

    def _estimate(self, rows, n_samples):
        return block_correlation(sample_covariance(rows, n_samples), n_samples, blocks=self.blocks)

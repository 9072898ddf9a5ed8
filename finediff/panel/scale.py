"""Returns to unit scale and exactly back: z = ((x - centre) / scale) W, with W = I or W = C^{-1/2}."""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.covariance import ledoit_wolf
from sklearn.utils.validation import check_is_fitted

from finediff.panel.scatter import robust_scatter

_MEAN_LOG_SQUARE = 1.2704  # -E log z^2 of a standard normal


class Standardizer(BaseEstimator):
    """Affine map of returns to unit scale, and exactly back.

    z = ((x - mean) / sd) W, with W = I or, whitened, W = C^{-1/2} symmetric (ZCA), C the Ledoit-Wolf
    correlation of (x - mean) / sd, its eigenvalues no less than 1e-8: invertible for n <= d too. W and its
    inverse C^{1/2} share one eigendecomposition, so the round trip is exact up to rounding. The symmetric
    root, unlike a Cholesky factor, follows the order of the assets and keeps each z_j closest to its own.

    A constant asset gets mean equal to its value, scale 1 and no part in W: z = 0, and it comes back exactly.

    Parameters
    ----------
    whiten : bool

    Attributes
    ----------
    mean_, scale_ : ndarray (d,)
        Mean and standard deviation (ddof=0) per asset, as fractions per period.
    whitening_, unwhitening_ : ndarray (d, d) or None
        W and its inverse; None if not whitened.

    References
    ----------
    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices"; Kessy,
    Lewin and Strimmer (2018), arXiv:1512.00809, on the symmetric whitening of correlations.
    """

    def __init__(self, whiten=False):
        self.whiten = whiten

    def fit(self, X, y=None):
        """Learn the map from X (n, d), finite, n >= 2; ValueError otherwise. Returns self."""
        X, moving = _panel(X)
        self.mean_ = np.where(moving, X.mean(axis=0), X[0])
        self.scale_ = np.where(moving, X.std(axis=0), 1.0)
        self.whitening_ = self.unwhitening_ = None
        if self.whiten:
            Z = ((X - self.mean_) / self.scale_)[:, moving]
            C = ledoit_wolf(Z, assume_centered=True)[0] if moving.any() else np.zeros((0, 0))
            self._whiten(C, moving)
        return self

    def _whiten(self, C: np.ndarray, moving: np.ndarray) -> None:
        """Set W = C^{-1/2} and its inverse on the assets that move, the identity on the others."""
        self.whitening_, self.unwhitening_ = np.eye(len(moving)), np.eye(len(moving))
        values, vectors = np.linalg.eigh(C)
        roots = np.sqrt(np.maximum(values, 1e-8))  # two rows, say, lead to no shrinkage at all
        block = np.ix_(moving, moving)
        self.whitening_[block] = (vectors / roots) @ vectors.T
        self.unwhitening_[block] = (vectors * roots) @ vectors.T

    def transform(self, X):
        """Returns X (n, d) -> z (n, d). ValueError if X has another number of assets."""
        Z = (self._checked(X) - self.mean_) / self.scale_
        return Z if self.whitening_ is None else Z @ self.whitening_

    def inverse_transform(self, Z):
        """z (n, d) -> returns (n, d). ValueError if Z has another number of assets."""
        Z = self._checked(Z)
        return (Z if self.unwhitening_ is None else Z @ self.unwhitening_) * self.scale_ + self.mean_

    def log_abs_det(self) -> float:
        """log |det dz/dx|, in nats: log p_x(x) = log p_z(z) + log_abs_det()."""
        check_is_fitted(self, "mean_")
        volume = 0.0 if self.whitening_ is None else np.linalg.slogdet(self.whitening_)[1]
        return float(volume - np.log(self.scale_).sum())

    def to_dict(self) -> dict[str, np.ndarray]:
        """Arrays that determine the map: mean, scale and, whitened, whitening and unwhitening."""
        check_is_fitted(self, "mean_")
        arrays = {"mean": self.mean_, "scale": self.scale_}
        if self.whitening_ is not None:
            arrays |= {"whitening": self.whitening_, "unwhitening": self.unwhitening_}
        return {name: array.copy() for name, array in arrays.items()}

    @classmethod
    def from_dict(cls, arrays) -> Standardizer:
        """The map of `to_dict`; KeyError if mean or scale is absent."""
        map_ = cls(whiten="whitening" in arrays)
        arrays = {name: np.array(array, dtype=np.float64) for name, array in arrays.items()}
        map_.mean_, map_.scale_ = arrays["mean"], arrays["scale"]
        map_.whitening_, map_.unwhitening_ = arrays.get("whitening"), arrays.get("unwhitening")
        return map_

    def _checked(self, X):
        check_is_fitted(self, "mean_")
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] != len(self.mean_):
            raise ValueError(f"expected an array (n, {len(self.mean_)}), as in fit, got shape {X.shape}.")
        return X


class RobustStandardizer(Standardizer):
    """The same affine map with a centre, scales and correlation that no crash dominates; always whitened.

    z = ((x - median) / scale) C^{-1/2}: C the correlation of `finediff.panel.scatter.robust_scatter`, scales from its
    diagonal, one factor for all assets such that E log z^2 = -1.27, as of a standard normal. Where returns have one
    volatility a day times one an asset, coordinates whitened so are far nearer to independence than those of the
    sample covariance: z is what `finediff.diffusion.exact.ProductScaleMixtureScore` is fitted to.

    Attributes
    ----------
    mean_ : ndarray (d,)
        The median of each asset.
    scale_, whitening_, unwhitening_ : ndarrays
        As in `Standardizer`.
    moving_ : ndarray (d,) of bool
        False for assets that are constant up to rounding; not saved.
    axes_ : ndarray (d, d)
        Principal directions of z, rows, the market's first: eigenvectors of C, largest eigenvalue first.
    """

    def __init__(self):
        super().__init__(whiten=True)

    def fit(self, X, y=None):
        """Learn the map from X (n, d), finite, n >= 2; ValueError otherwise. Returns self."""
        X, moving = _panel(X)
        self.moving_ = moving
        self.mean_ = np.where(moving, np.median(X, axis=0), X[0])
        self.scale_ = np.where(moving, X.std(axis=0), 1.0)
        Z = ((X - self.mean_) / self.scale_)[:, moving]
        S = robust_scatter(Z) if moving.any() else np.zeros((0, 0))
        sizes = np.sqrt(np.diag(S))
        C = S / np.outer(sizes, sizes)
        self.scale_[moving] *= sizes
        self._whiten(C, moving)
        self.axes_ = np.eye(len(moving))
        self.axes_[np.ix_(moving, moving)] = np.linalg.eigh(C)[1][:, ::-1].T
        if moving.any():
            Z = self.transform(X)[:, moving]
            # Prices that do not move give returns of 0, whose logarithms would decide alone.
            self.scale_[moving] *= np.exp((np.log(np.square(Z) + 1e-12).mean() + _MEAN_LOG_SQUARE) / 2)
        return self


class AssetScaler(Standardizer):
    """Each asset to unit variance over the returns that it has; one that never moved comes back as it was.

    Attributes
    ----------
    moving_ : ndarray (d,) of bool
    """

    def fit(self, X, y=None):
        """Learn from X (n, d), NaN where missing, a value in each column. Returns self."""
        self.mean_, self.scale_ = np.nanmean(X, axis=0), np.nanstd(X, axis=0)
        size = np.nanmax(np.abs(X), axis=0)
        still = np.nanmax(X, axis=0) - np.nanmin(X, axis=0) <= 10 * np.finfo(float).eps * size
        self.moving_ = ~still & (self.scale_ > 0)
        self.mean_[~self.moving_] = np.nanmax(X, axis=0)[~self.moving_]
        self.scale_[~self.moving_] = 1.0
        self.whitening_ = self.unwhitening_ = None
        return self

    def inverse_transform(self, Z):
        """z (n, d) -> returns (n, d)."""
        return self._checked(Z) * np.where(self.moving_, self.scale_, 0.0) + self.mean_

    def to_dict(self) -> dict[str, np.ndarray]:
        """Arrays that determine the map."""
        return super().to_dict() | {"moving": self.moving_.copy()}

    @classmethod
    def from_dict(cls, arrays) -> AssetScaler:
        """The map of `to_dict`."""
        map_ = super().from_dict(arrays)
        map_.moving_ = np.array(arrays["moving"], dtype=bool)
        return map_


def _panel(X) -> tuple[np.ndarray, np.ndarray]:
    """X as float64 and which assets move; ValueError unless (n, d), n >= 2, finite."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or len(X) < 2 or not X.shape[1]:
        raise ValueError(f"expected an array (n, d), n >= 2 rows, d >= 1 assets, got shape {X.shape}.")
    if not np.isfinite(X).all():
        row, j = np.argwhere(~np.isfinite(X))[0]
        raise ValueError(f"expected finite returns, got {X[row, j]} in row {row}, column {j}.")
    # By the range: rounding in the mean gives a constant column an sd of many ulp.
    moving = np.ptp(X, axis=0) > 10 * np.finfo(float).eps * np.abs(X).max(axis=0)
    return X, moving & (X.std(axis=0) > 0)

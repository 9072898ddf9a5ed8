"""Thousands of assets: factors whose law is learned, and own parts that are exact.

x = mean_ + scale (B F + e):   F = sqrt(v) N(0, I_k),  e = sqrt(u) N(0, D),  (v, u) one draw a day    (`fit_factors`)
B's k eigenvalues              quadratic-inverse shrinkage, trace kept: sampling spreads them
score_model_                   `FactorScore`, its k-dimensional part with a regression where that pays in cross-validation
scenario                       one (m x k)(k x d) product beside the noise; or a sampler's d-dimensional reverse process

No d x d matrix is built unless ``covariance_`` is asked for. 5,000 assets with 1,260 days and 20 factors are fitted in
17 s of one core (benchmarks/factor.py).
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from finediff.covariance.spectrum import quadratic_inverse
from finediff.diffusion.exact import (
    FactorFit,
    FactorScore,
    ScaleFactors,
    choose_factors,
    eigenvalue_ratio,
    fit_factors,
)
from finediff.diffusion.exact.missing import complete
from finediff.diffusion.factor_residual import change_of_moments, learn_factors, with_residual
from finediff.generators.score import ScoreGenerator, on_device, part, threads
from finediff.panel import AssetScaler, PanelWarning

_COUNTING = ("auto", "eigenvalue ratio")
_LEAST_ROWS = 200  # below, eighteen coefficients a level follow the noise
_FEW = 20  # returns, below which an asset has hardly a variance
_EMPTY = 1e-6  # of an own part's variance, over all assets: a factor of which nothing can be seen
_PILOT = 2**14  # draws for the moments of a learned law
_LEAST_GAIN = 1e-3  # nats a factor: choosing among levels, Gaussian factors seem to gain up to .0009
_RARE = 0.05  # days: volatilities that are rarer in the panel are dropped, each costs a projection


class FactorDiffusionGenerator(ScoreGenerator):
    """Factor-structured score model: only the k-dimensional law of the factors is learned, the rest is exact.

    The split of the score is that of Chen, Xu, Xu and Zhang (2025, arXiv 2504.06566). Missing returns (late listings,
    deaths) are allowed: every entry that is there is used, no name and no date is dropped.

    Parameters
    ----------
    n_factors : int, "auto" or "eigenvalue ratio"
        k. "auto": the number with the lowest BIC, from none; "eigenvalue ratio": Ahn and Horenstein (2013), quick.
    heavy_tails : bool
        One random volatility a day for the factors and one for all own parts, with a joint law on a grid; False:
        Gaussian factor analysis.
    residual : bool
        Whether a regression learns what that law leaves of the factors' score; off where it does not gain in
        cross-validation, with fewer than 200 rows or ten a factor, and without factors.
    process : Process, optional
        Noise path; `VP()` by default.
    sampler : Sampler, optional
        None: exact scenarios from k-dimensional draws. A sampler runs the d-dimensional reverse process, to the same
        law and at many times the cost. Under a stress None draws exactly, without the residual.
    levels, draws, folds : int
        Of the regression: noise levels, noises for each row and level, folds of consecutive rows (each half of the rows
        is cut into as many).
    device : str, optional
        "cpu", "cuda", ...; the GPU where there is one by default.
    random_state : None, int or RandomState
        Of the noises and of the scenarios; the likelihood's maximum does not depend on it.

    Attributes
    ----------
    n_factors_ : int
    loadings_ : ndarray (d, k)
        In the units of the returns, for factors of unit variance; close to orthogonal in the metric of the own variances, the
        strongest first.
    idiosyncratic_variance_ : ndarray (d,)
        In squared returns per period.
    mean_ : ndarray (d,)
    covariance_ : ndarray (d, d)
        loadings loadings^T + diag(idiosyncratic variance), computed when asked for.
    score_model_ : FactorScore
        Of z = scaler_.transform(x).
    residual_nats_ : float
        Nats a row that the regression adds, cross-validated on each half of the rows along axes that the other half chose.

    Examples
    --------
    >>> from finediff.markets import factor_market
    >>> returns = factor_market(60, 2, random_state=0, df=5).sample(500, random_state=1)
    >>> generator = FactorDiffusionGenerator(random_state=0).fit(returns)
    >>> generator.n_factors_, generator.loadings_.shape, generator.sample(10).shape
    (2, (60, 2), (10, 60))
    """

    _steered_by = ("stress",)
    _takes_missing = True

    def __init__(
        self,
        *,
        n_factors="auto",
        heavy_tails=True,
        residual=True,
        process=None,
        sampler=None,
        levels=16,
        draws=4,
        folds=5,
        device=None,
        random_state=None,
    ):
        self.n_factors = n_factors
        self.heavy_tails = heavy_tails
        self.residual = residual
        self.process = process
        self.sampler = sampler
        self.levels = levels
        self.draws = draws
        self.folds = folds
        self.device = device
        self.random_state = random_state

    def _fit(self, X: np.ndarray, seed: int) -> None:
        self._check_arguments()
        for of_the_last_fit in ("covariance_", "_base"):
            vars(self).pop(of_the_last_fit, None)
        X = X[~np.isnan(X).all(1)]
        self.scaler_ = AssetScaler().fit(X)
        moving = self.scaler_.moving_
        self._warn_of_short_histories(X)
        device = on_device(self.device)
        with threadpool_limits(1), threads(self.width):
            z = torch.as_tensor(self.scaler_.transform(X)[:, moving], device=device)
            likeliest = self.fit_ = _pruned(self._likeliest(z), len(X))
            self.residual_nats_, self.residual_ = 0.0, None
            if self.residual and self.n_factors_ and len(X) >= max(_LEAST_ROWS, 10 * self.n_factors_):
                self._learn(z, torch.Generator(device=device).manual_seed(seed))
            self.fit_ = _shrunk(likeliest, len(X))
            self.score_model_ = self._learned() if self.residual_ else self._base
            if self.residual_:
                generator = torch.Generator(device=device).manual_seed(seed)
                mean, covariance = change_of_moments(self.score_model_, _PILOT, generator)
                self.residual_ |= {"mean": mean, "covariance": covariance}

    def _warn_of_short_histories(self, X: np.ndarray) -> None:
        counts = (~np.isnan(X)).sum(0)
        if (counts < _FEW).any():
            j = int(counts.argmin())
            name = getattr(self, "feature_names_in_", range(X.shape[1]))[j]
            warnings.warn(
                f"Expected at least {_FEW} returns of each asset, got {counts[j]} of {name} (and fewer than {_FEW} of "
                f"{int((counts < _FEW).sum())} in all): their own variances are guesses. Drop them, or take a longer history.",
                PanelWarning,
                stacklevel=4,
            )

    def _learn(self, z: torch.Tensor, generator: torch.Generator) -> None:
        """On the likeliest loadings: a regression on shrunk ones would only undo the shrinkage.

        The axes are chosen on the same rows, which cross-validation inside the regression cannot see. So each half of
        the rows first judges the axes of the other.
        """
        rows = complete(self._model(self.scaler_.moving_), z, generator)
        halves = rows.tensor_split(2)
        judged = [self._regression(self._axes(a), b, generator)[1] for a, b in (halves, halves[::-1])]
        gain = sum(judged) / 2
        if gain <= _LEAST_GAIN * self.n_factors_:
            return
        axes = self._axes(rows)
        model, whole = self._regression(axes, rows, generator)
        if whole > 0:
            law = model.laws[0]
            self.residual_nats_ = gain
            self.residual_ = {"axes": axes, "levels": law.levels, "weights": law.weights}

    def _axes(self, rows: torch.Tensor) -> torch.Tensor:
        return _independent_axes(self._model(self.scaler_.moving_).project(rows))

    def _regression(self, axes, rows, generator) -> tuple[FactorScore, float]:
        model = self._model(self.scaler_.moving_, axes)
        sizes = {"levels": self.levels, "draws": self.draws, "folds": self.folds}
        return learn_factors(model, rows, **sizes, generator=generator)

    def _likeliest(self, z: torch.Tensor) -> FactorFit:
        k = self.n_factors
        if k == "auto":
            return choose_factors(z, heavy_tails=self.heavy_tails)
        if k == "eigenvalue ratio":
            k = eigenvalue_ratio(z)
        most = min(z.shape[1], len(z) - 1)
        if k > most:
            raise ValueError(
                f"expected at most {most} factors for {len(z)} rows of {z.shape[1]} moving assets, got {k}: "
                'n_factors="auto" chooses'
            )
        return fit_factors(z, int(k), heavy_tails=self.heavy_tails)

    def _learned(self) -> FactorScore:
        axes, levels, weights = (self.residual_[name] for name in ("axes", "levels", "weights"))
        return with_residual(self._model(axes=axes), levels, weights)

    @cached_property
    def _base(self) -> FactorScore:
        """The exact score of all assets, without the residual: built once a fit, and not saved."""
        return self._model()

    def _model(self, assets=slice(None), axes=None) -> FactorScore:
        """The exact score of z, its factors turned to ``axes`` (k, k), rows.

        Assets that never moved are noise of their own, which the scaler does not read.
        """
        fit, moving = self.fit_, torch.as_tensor(self.scaler_.moving_, device=self.fit_.mean.device)
        B = fit.loadings.new_zeros(len(moving), fit.loadings.shape[1])
        D, mean = B.new_ones(len(moving)), B.new_zeros(len(moving))
        B[moving], D[moving], mean[moving] = fit.loadings, fit.variance, fit.mean
        B = B if axes is None else B @ axes.T
        days = fit.weights.sum(0)
        kept = (days > 0).nonzero()[:, 0]
        laws = [
            ScaleFactors(fit.scales_common, fit.weights[:, b] / days[b], B.shape[1]).to(B.device)
            for b in kept.tolist()
        ]
        return FactorScore(
            B[assets],
            D[assets],
            self._process(),
            factors=laws,
            mean=mean[assets],
            scales=fit.scales_own[kept],
            weights=days[kept],
        )

    def _check_arguments(self) -> None:
        k = self.n_factors
        whole = isinstance(k, numbers.Integral) and not isinstance(k, bool) and k >= 0
        if not whole and k not in _COUNTING:
            raise ValueError(
                f"expected n_factors to be a whole number, at least 0, or one of {_COUNTING}, got {k!r}"
            )
        for name in ("heavy_tails", "residual"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"expected {name} to be True or False, got {getattr(self, name)!r}")
        for name in ("draws", "levels", "folds"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 2:
                raise ValueError(f"expected {name} to be a whole number, at least 2, got {value!r}")
        self._check_path()

    @property
    def n_factors_(self) -> int:
        return self.fit_.loadings.shape[1]

    @property
    def _unit(self) -> np.ndarray:
        return np.where(self.scaler_.moving_, self.scaler_.scale_, 0.0)

    @property
    def loadings_(self) -> np.ndarray:
        B = self.fit_.loadings @ self._change()[0]
        moving, scale = self.scaler_.moving_, self.scaler_.scale_
        loadings = np.zeros((len(moving), self.n_factors_))
        loadings[moving] = scale[moving, None] * B.cpu().numpy()
        return loadings

    def _change(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cov(F)^1/2 (k, k) and E F (k,), the identity and 0 unless a residual was learned; in the fit's axes."""
        identity = torch.eye(self.n_factors_).to(self.fit_.loadings)
        if not self.residual_:
            return identity, identity.sum(0) * 0
        axes, mean, change = (self.residual_[name] for name in ("axes", "mean", "covariance"))
        values, V = torch.linalg.eigh(identity + axes.T @ change @ axes)
        return (V * values.clamp(min=1e-6).sqrt()) @ V.T, mean @ axes

    @property
    def idiosyncratic_variance_(self) -> np.ndarray:
        return self._unit**2 * self.score_model_.idiosyncratic_variance.cpu().numpy()

    @property
    def mean_(self) -> np.ndarray:
        model = self._base
        z = model.mean + model.loadings @ self._change()[1]
        return self.scaler_.inverse_transform(z.cpu().numpy()[None])[0]

    @cached_property
    def covariance_(self) -> np.ndarray:
        B = self.loadings_
        covariance = B @ B.T
        covariance[np.diag_indices_from(covariance)] += self.idiosyncratic_variance_
        return covariance

    def log_density(self, X) -> np.ndarray:
        """Log density of the returns that each row has, under the base (without the regression).

        Parameters
        ----------
        X : DataFrame or array (n, d)
            Simple returns of the assets of the fit; NaN where one is missing. Assets that never moved take no part.

        Returns
        -------
        ndarray (n,)
            Nats, in the units of the returns.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False, ensure_all_finite="allow-nan")
        moving = self.scaler_.moving_
        z = self.scaler_.transform(X)[:, moving]
        volume = (~np.isnan(z)) @ np.log(self.scaler_.scale_[moving])
        return self.fit_.log_density(torch.as_tensor(z, device=self.fit_.mean.device)).cpu().numpy() - volume

    def factors(self, X) -> np.ndarray | pd.DataFrame:
        """What each row says of its factors: f_hat, by generalised least squares on `loadings_`, (n, k).

        Parameters
        ----------
        X : DataFrame or array (n, d)
            Simple returns, complete.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=np.float64, reset=False)
        z = torch.as_tensor(self.scaler_.transform(rows), device=self.score_model_.device)
        root, mean = self._change()
        f = ((self._base.project(z) - mean) @ torch.linalg.inv(root)).cpu().numpy()
        return pd.DataFrame(f, index=X.index).add_prefix("factor ") if isinstance(X, pd.DataFrame) else f

    @property
    def fit_summary_(self) -> str:
        """What was fitted, in words."""
        k = self.n_factors_
        share = np.square(self.loadings_).sum() / (
            np.square(self.loadings_).sum() + self.idiosyncratic_variance_.sum()
        )
        words = f"{k} factors with {share:.0%} of the variance, by maximum likelihood"
        if self.residual_nats_ <= 0:
            return f"{words}; no residual was learned"
        return f"{words}; a regression of their score adds {self.residual_nats_:.3f} nats a row in cross-validation"

    @property
    def evaluations_(self) -> int:
        """Of the score for one draw: none where it is exact."""
        if self.sampler is not None:
            return super().evaluations_
        return len(self.score_model_.laws[0].path) if self.residual_ else 0

    def _scaled_covariance(self) -> torch.Tensor:
        B = self.score_model_.loadings
        return B @ B.T + torch.diag(self.score_model_.idiosyncratic_variance)

    def _draw(self, model, n: int, condition, generator) -> torch.Tensor:
        return (
            model.sample(n, generator) if self.sampler is None else super()._draw(model, n, None, generator)
        )

    def _returns(self, z: np.ndarray) -> np.ndarray:
        z *= self._unit
        z += self.scaler_.mean_
        return z

    def _draw_stressed(self, model, A, low, high, condition, generator) -> torch.Tensor:
        if self.sampler is None:
            return self._base.sample_given(A, low, high, generator)
        return super()._draw_stressed(model, A, low, high, condition, generator)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {f"scaler/{k}": v for k, v in self.scaler_.to_dict().items()}
        fields = {f.name: getattr(self.fit_, f.name) for f in dataclasses.fields(self.fit_)}
        arrays |= {
            f"fit/{k}": v.cpu().numpy() if torch.is_tensor(v) else np.array(v) for k, v in fields.items()
        }
        arrays["residual_nats"] = np.array([self.residual_nats_])
        if self.residual_:
            arrays |= {f"residual/{k}": v.cpu().numpy() for k, v in self.residual_.items()}
        return arrays

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        device = self._restore_device()
        self.scaler_ = AssetScaler.from_dict(part(arrays, "scaler/"))
        fields = {k: torch.tensor(v, device=device) for k, v in part(arrays, "fit/").items()}
        fields["log_likelihoods"] = tuple(fields["log_likelihoods"].tolist())
        fields["bic"] = float(fields["bic"])
        self.fit_ = FactorFit(**fields)
        self.residual_nats_ = float(arrays["residual_nats"][0])
        self.score_model_, self.residual_ = self._base, None
        if learned := part(arrays, "residual/"):
            self.residual_ = {k: torch.tensor(v, device=device) for k, v in learned.items()}
            self.score_model_ = self._learned()


def _independent_axes(f: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows (k, k) along which the factors f (n, k) are least dependent: what is learned is along each."""
    covariance = torch.atleast_2d(torch.cov(f.T))
    values, V = torch.linalg.eigh(covariance)
    white = f @ (V / values.clamp(min=1e-10 * float(values[-1])).sqrt()) @ V.T
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # Gaussian factors have no such axes, and need none
        ica = FastICA(whiten=False, w_init=np.eye(f.shape[1]), max_iter=200).fit(white.cpu().numpy())
    return torch.as_tensor(ica.components_).to(f)


def _pruned(fit: FactorFit, n: int) -> FactorFit:
    """Without volatilities of the own parts that hardly ever occur, and factors that came out empty."""
    full = (fit.loadings.square() / fit.variance[:, None]).sum(0) > _EMPTY
    weights = torch.where(fit.weights.sum(0) > _RARE / n, fit.weights, 0.0)
    weights = weights / weights.sum()
    common, own = weights.sum(1) @ fit.scales_common, weights.sum(0) @ fit.scales_own
    return dataclasses.replace(
        fit,
        weights=weights,
        loadings=fit.loadings[:, full] * common.sqrt(),
        variance=fit.variance * own,
        scales_common=fit.scales_common / common,
        scales_own=fit.scales_own / own,
    )


def _shrunk(fit: FactorFit, n: int) -> FactorFit:
    """B with the eigenvalues of B B^T shrunk towards each other, as n rows of k factors have spread them.

    The formula is for many eigenvalues. Few are smoothed over two of their relative standard errors sqrt(2/n): its own
    bandwidth, narrower, takes two that happen to be near each other for one that was torn apart.
    """
    B = fit.loadings
    if B.shape[1] < 2:
        return fit
    values, V = torch.linalg.eigh(B.T @ B)
    found = values.clamp(min=1e-12 * float(values[-1]))
    shrunk = torch.as_tensor(quadratic_inverse(found.cpu().numpy(), n - 1, 2 * (2 / n) ** 0.5)).to(found)
    shrunk = shrunk * (found.sum() / shrunk.sum())
    return dataclasses.replace(fit, loadings=B @ (V * (shrunk / found).sqrt()) @ V.T)

"""Generators and covariances as parts of skfolio's optimisers: priors, walk-forward, grid search.

    GeneratorPrior       X -> generator -> scenarios (m, d) -> an inner prior -> moments, and the scenarios themselves
    FinediffCovariance   X -> an estimator of finediff.covariance (or scikit-learn) -> skfolio's BaseCovariance

Units: simple returns per period, covariances in their squares.

>>> from skfolio.optimization import MeanRisk
>>> from skfolio.prior import EmpiricalPrior
>>> from finediff.covariance import WindowEnsembleCovariance
>>> from finediff.generators import FactorDiffusionGenerator
>>> scenarios = MeanRisk(prior_estimator=GeneratorPrior(FactorDiffusionGenerator(random_state=0)))
>>> ensemble = EmpiricalPrior(covariance_estimator=FinediffCovariance(WindowEnsembleCovariance()))
>>> history = MeanRisk(prior_estimator=ensemble)
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from numbers import Integral

import numpy as np
import pandas as pd
from skfolio.moments import BaseCovariance, EWCovariance, EWMu, RegimeAdjustedEWCovariance
from skfolio.prior import BasePrior, EmpiricalPrior, ReturnDistribution
from skfolio.utils.stats import cov_nearest
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import get_tags
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.validation import check_is_fitted, validate_data

from finediff.covariance import WindowEnsembleCovariance

__all__ = ["FinediffCovariance", "GeneratorPrior"]

_ORDERED = (WindowEnsembleCovariance, EWCovariance, RegimeAdjustedEWCovariance, EWMu)
_STILL = 1e-14  # a variance below it is that of a constant: skfolio refuses those
_RIPPLE = 1e-6  # standard deviation that a constant gets for the moments
_SURPRISE = 7.0  # standard errors: not by chance, for any number of assets


class GeneratorPrior(BasePrior):
    """Moments and scenarios of a generator that is fitted on the returns: fit once, stress many.

    The generator is cloned and the clone fitted on X; its scenarios go to the inner prior as if they were returns
    observed, under the names of X. `stressed` draws anew from the same fit, and so does a generator that comes fitted
    in `sklearn.frozen.FrozenEstimator`, which skfolio's clones leave as it is (in a back-test it knows the rows of its
    own fit, whatever the fold).

    Parameters
    ----------
    generator : estimator with ``fit(X)`` and ``sample(n_samples)``
        Any of finediff.generators, or another; finite scenarios (n_samples, d) in simple returns per period.
    n_samples : int
        m, at least 2.
    prior_estimator : BasePrior, optional
        Makes moments of the scenarios; `EmpiricalPrior()` by default. Its estimators count m rows: a cleaner there
        removes the noise of sampling and not what the generator learned of it, for which `ScenarioCovariance` with
        a cleaner is meant. What gives the latest rows more weight (`WindowEnsembleCovariance`, `EWCovariance`) is
        refused: scenarios have no order.
    stress : mapping, optional
        {asset: return}, {asset: (low, high)} or {asset: array (m,)}, for generators that can be stressed. The scenarios
        hold it to the last bit.
    condition : number, str, mapping, array or DataFrame, optional
        For generators that were fitted with conditions: `ScenarioGenerator.sample`. To fit with them, set
        ``generator.set_fit_request(condition=True)`` and pass ``condition`` to ``fit`` under scikit-learn's metadata
        routing.
    moments : {"scenarios", "implied"}
        "implied" takes ``covariance_`` and, where there is one, ``mean_`` of the fitted generator in place of those of
        the scenarios, and so has no sampling error; not with an inner prior, a stress or a condition, and refused
        where the scenarios have another mean.
    random_state : None, int or RandomState
        Of the scenarios; None leaves it to the generator. With an integer here or there each draw, stressed or not,
        starts from the same seed.

    Attributes
    ----------
    return_distribution_ : ReturnDistribution
        ``mu`` (d,), ``covariance`` (d, d), ``returns`` (m, d) and what else the inner prior says
        (``sample_weight`` (m,) of an entropy pooling).
    generator_ : the fitted generator
    prior_estimator_ : BasePrior
        Fitted on the scenarios.
    n_features_in_ : int
    feature_names_in_ : ndarray (d,) of str, if X is a DataFrame with string columns

    Notes
    -----
    An asset whose scenarios are constant (a stressed one, cash) would have no variance, which skfolio refuses. For the
    moments it gets a ripple of standard deviation 1e-6 and mean 0, uncorrelated with that of other constants;
    ``returns`` keeps the constant where the inner prior passes scenarios on as they are.

    Examples
    --------
    >>> from finediff.generators import RidgeScoreGenerator
    >>> from finediff.markets import factor_market
    >>> X = factor_market(4, 1, random_state=0).sample(300, random_state=1)
    >>> prior = GeneratorPrior(RidgeScoreGenerator(random_state=0), n_samples=1000).fit(X)
    >>> prior.return_distribution_.returns.shape
    (1000, 4)
    >>> crash = prior.stressed({0: -0.07}).return_distribution_
    >>> bool((crash.returns[:, 0] == -0.07).all())
    True
    """

    def __init__(
        self,
        generator,
        n_samples=5000,
        prior_estimator=None,
        stress=None,
        condition=None,
        moments="scenarios",
        random_state=None,
    ):
        self.generator = generator
        self.n_samples = n_samples
        self.prior_estimator = prior_estimator
        self.stress = stress
        self.condition = condition
        self.moments = moments
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = get_tags(self.generator).input_tags.allow_nan
        return tags

    def get_metadata_routing(self):
        """Metadata of ``fit`` go to the generator's ``fit``: one entry a row of X, as its ``condition`` is."""
        fits = MethodMapping().add(caller="fit", callee="fit")
        return MetadataRouter(owner=type(self).__name__).add(generator=self.generator, method_mapping=fits)

    def fit(self, X, y=None, **fit_params):
        """Fit the generator, draw, and take the moments.

        Parameters
        ----------
        X : (n, d) array or DataFrame
            Simple returns per period; NaN where the generator takes it.
        y : None
            Ignored.
        **fit_params
            For the generator's ``fit``, if metadata routing is enabled.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For arguments out of range, a generator without ``fit`` and ``sample``, a stress or condition that it does
            not take, scenarios of another shape or with other names than X, missing or infinite ones, an implied
            covariance that the generator does not have; and what the generator's ``fit`` refuses.
        """
        routed = process_routing(self, "fit", **fit_params)
        self._check_arguments()
        self.generator_ = clone(self.generator).fit(X, y, **routed.generator.fit)
        validate_data(self, X, ensure_all_finite="allow-nan")
        return self._draw()

    def stressed(self, stress, *, condition=None):
        """The prior of the same fit under a stress; nothing is fitted again.

        Parameters
        ----------
        stress : mapping or None
            In place of the prior's own; see the class.
        condition : number, str, mapping, array or DataFrame, optional
            In place of the prior's own, which stays if None.

        Returns
        -------
        GeneratorPrior
            Another, fitted one. Its ``generator`` is the fitted one, frozen, so that it may stand in an optimiser,
            whose ``fit`` will draw from it and not fit it; its ``return_distribution_`` may go to ``predict``.

        Raises
        ------
        ValueError
            For a stress that the generator does not take, and for implied moments.
        """
        check_is_fitted(self, "generator_")
        fitted = self.generator_
        frozen = fitted if isinstance(fitted, FrozenEstimator) else FrozenEstimator(fitted)
        parameters = self.get_params(deep=False) | {"generator": frozen, "stress": stress}
        if condition is not None:
            parameters["condition"] = condition
        prior = clone(type(self)(**parameters))
        prior._check_arguments()
        prior.generator_, prior.n_features_in_ = frozen, self.n_features_in_
        if hasattr(self, "feature_names_in_"):
            prior.feature_names_in_ = self.feature_names_in_
        return prior._draw()

    def _check_arguments(self):
        if not hasattr(self.generator, "fit") or not hasattr(self.generator, "sample"):
            raise ValueError(
                f"expected a generator with fit and sample, got {self.generator!r}: try RidgeScoreGenerator()"
            )
        m = self.n_samples
        if not isinstance(m, Integral) or isinstance(m, bool) or m < 2:
            raise ValueError(
                f"expected n_samples to be a whole number, at least 2, got {m!r}: a covariance needs two rows; try 5000"
            )
        if self.moments not in ("scenarios", "implied"):
            raise ValueError(f"expected moments 'scenarios' or 'implied', got {self.moments!r}")
        for name in ("prior_estimator", "stress", "condition"):
            if self.moments == "implied" and getattr(self, name) is not None:
                raise ValueError(
                    f"expected no {name} with implied moments, got one: they are those of the generator's whole law; "
                    "moments='scenarios'"
                )
        inner = self.prior_estimator
        if inner is None:
            return
        if not isinstance(inner, BasePrior):
            raise ValueError(
                f"expected prior_estimator to be a prior of skfolio, got {inner!r}: "
                "EmpiricalPrior(covariance_estimator=...) makes one of a covariance"
            )
        for part in inner.get_params().values():
            default = isinstance(part, FinediffCovariance) and part.estimator is None
            if default or isinstance(part, _ORDERED):
                raise ValueError(
                    f"expected an inner prior that does not read the order of its rows, got {part!r} in it: scenarios "
                    "have no latest ones; use it on returns, as EmpiricalPrior(covariance_estimator=...)"
                )

    def _draw(self):
        """Scenarios and their moments."""
        rows = self._scenarios()
        still = rows.var(axis=0) < _STILL
        observed = rows.copy()
        observed[:, still] += _ripples(len(rows), np.count_nonzero(still))
        inner = EmpiricalPrior() if self.prior_estimator is None else clone(self.prior_estimator)
        names = getattr(self, "feature_names_in_", None)
        self.prior_estimator_ = inner.fit(
            observed if names is None else pd.DataFrame(observed, columns=names)
        )
        distribution = inner.return_distribution_
        if still.any() and np.shape(distribution.returns) == rows.shape:
            kept = still & (distribution.returns == observed).all(axis=0)
            returns = np.where(kept, rows, distribution.returns)
            distribution = dataclasses.replace(distribution, returns=returns)
        if self.moments == "implied":
            distribution = self._implied(distribution)
        self.return_distribution_ = distribution
        return self

    def _scenarios(self):
        """(n_samples, d), float64, writable; a stress held exactly."""
        options = {name: getattr(self, name) for name in ("stress", "condition", "random_state")}
        options = {name: value for name, value in options.items() if value is not None}
        understood = inspect.signature(self.generator_.sample).parameters
        for name in options:
            if name not in understood:
                raise ValueError(
                    f"expected no {name} for this generator, got one: the sample of {_kind(self.generator_)} does not take it"
                )
        drawn = self.generator_.sample(n_samples=self.n_samples, **options)
        names, d = getattr(self, "feature_names_in_", None), self.n_features_in_
        columns = [*range(d)] if names is None else [*names]
        if isinstance(drawn, pd.DataFrame):
            columns = [*drawn.columns]
        if names is not None and columns != [*names]:
            raise ValueError(
                f"expected scenarios of the assets of X in their order, got {columns[:5]}... for {[*names[:5]]}...: was "
                "a frozen generator fitted on others?"
            )
        rows = np.array(drawn, dtype=np.float64, order="C")
        if rows.shape != (self.n_samples, d):
            raise ValueError(
                f"expected scenarios of shape {(self.n_samples, d)}, got {rows.shape}: was a frozen generator fitted on "
                "other assets?"
            )
        if not np.isfinite(rows).all():
            row, column = np.argwhere(~np.isfinite(rows))[0]
            raise ValueError(
                f"expected finite scenarios, got {rows[row, column]} in scenario {row} of {columns[column]!r}: check the "
                "generator"
            )
        if isinstance(self.stress, Mapping):
            for asset, value in self.stress.items():
                _hold(rows[:, columns.index(asset)], asset, value)
        return rows

    def _implied(self, distribution: ReturnDistribution) -> ReturnDistribution:
        """With the mean and covariance of the generator's law."""
        d = self.n_features_in_
        covariance = getattr(self.generator_, "covariance_", None)
        if np.shape(covariance) != (d, d):
            raise ValueError(
                f"expected a generator with a covariance_ of shape {(d, d)}, got {_kind(self.generator_)} with "
                f"{'none' if covariance is None else np.shape(covariance)}: moments='scenarios'"
            )
        covariance = np.array(covariance, dtype=np.float64)
        variance = np.diag(covariance)
        np.fill_diagonal(covariance, np.where(variance < _STILL, _RIPPLE**2, variance))
        mu, mean = distribution.mu, getattr(self.generator_, "mean_", None)
        if np.shape(mean) == (d,):
            mean = np.array(mean, dtype=np.float64)
            errors = np.abs(mu - mean) / (distribution.returns.std(axis=0) / np.sqrt(self.n_samples) + 1e-12)
            if self.n_samples >= 100 and errors.max() > _SURPRISE:
                raise ValueError(
                    f"expected scenarios with the mean that the generator states, got one {errors.max():.0f} standard "
                    f"errors away for asset number {errors.argmax()}: what was learned beside its base (a residual) moves "
                    "them, so its moments are not theirs; moments='scenarios'"
                )
            mu = mean
        return dataclasses.replace(distribution, mu=mu, covariance=cov_nearest(covariance))


class FinediffCovariance(BaseCovariance):
    """A covariance estimator of finediff (or scikit-learn) under skfolio's protocol.

    Parameters
    ----------
    estimator : estimator with ``fit(X)`` and then ``covariance_``, optional
        `WindowEnsembleCovariance()` by default, which wants rows in order of time. A `ScenarioCovariance` around a
        fitted generator must not be ``prefit``: skfolio clones it, and the clone is not fitted.
    nearest : bool
        Replace a covariance that is not positive definite by the nearest that is, variances unchanged.
    higham : bool
        By Higham's (2002) algorithm in place of clipped eigenvalues.
    higham_max_iteration : int

    Attributes
    ----------
    covariance_ : (d, d) array
        In squared returns per period.
    location_ : (d,) array
        The estimator's own, or the mean per period.
    estimator_ : the fitted estimator
    n_features_in_ : int
    feature_names_in_ : ndarray (d,) of str, if X is a DataFrame with string columns

    Examples
    --------
    >>> from finediff.covariance import QuadraticInverseShrinkage
    >>> X = np.random.default_rng(0).standard_normal((60, 3)) / 100
    >>> FinediffCovariance(QuadraticInverseShrinkage()).fit(X).covariance_.shape
    (3, 3)
    """

    def __init__(self, estimator=None, nearest=True, higham=False, higham_max_iteration=100):
        super().__init__(nearest=nearest, higham=higham, higham_max_iteration=higham_max_iteration)
        self.estimator = estimator

    def fit(self, X, y=None):
        """Estimate from X.

        Parameters
        ----------
        X : (n, d) array or DataFrame
            Simple returns per period.
        y : None
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For an estimator without ``fit`` or, once fitted, without a ``covariance_`` (d, d); and what its ``fit``
            refuses.
        """
        estimator = WindowEnsembleCovariance() if self.estimator is None else self.estimator
        if not hasattr(estimator, "fit"):
            raise ValueError(
                f"expected an estimator with fit(X), got {estimator!r}: QuadraticInverseShrinkage() is that of the "
                "function of this name"
            )
        self.estimator_ = clone(estimator).fit(X, y)
        rows = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan")
        covariance, d = getattr(self.estimator_, "covariance_", None), self.n_features_in_
        if np.shape(covariance) != (d, d):
            raise ValueError(
                f"expected an estimator with a covariance_ of shape {(d, d)} after fit, got {_kind(estimator)} with "
                f"{'none' if covariance is None else np.shape(covariance)}: use one of finediff.covariance"
            )
        location = getattr(self.estimator_, "location_", None)
        self.location_ = np.array(rows.mean(axis=0) if location is None else location, dtype=np.float64)
        self._set_covariance(np.array(covariance, dtype=np.float64))
        return self


def _kind(estimator) -> str:
    return type(estimator.estimator if isinstance(estimator, FrozenEstimator) else estimator).__name__


def _ripples(m: int, count: int) -> np.ndarray:
    """Columns (m, count) of the discrete cosine basis times _RIPPLE: mean 0, orthogonal, and nobody's random numbers."""
    frequency = 1 + (m // 2 + np.arange(count)) % (m - 1)
    return _RIPPLE * np.sqrt(2) * np.cos(np.pi * frequency * (np.arange(m)[:, None] + 0.5) / m)


def _hold(column: np.ndarray, asset, value) -> None:
    """Write a stress over scenarios that hold it up to single precision, in place."""
    low, high = value if isinstance(value, tuple) else (value, value)
    held = np.clip(column, low, high)
    if not np.allclose(held, column, rtol=1e-4, atol=1e-5):
        worst = int(np.argmax(np.abs(held - column)))
        raise ValueError(
            f"expected scenarios that hold the stress {value!r} of {asset!r}, got {column[worst]:.6g}: the generator does "
            "not follow it; try RidgeScoreGenerator()"
        )
    column[:] = held

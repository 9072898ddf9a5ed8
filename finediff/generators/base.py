"""The one door between panels and models: scikit-learn estimators that fit a panel and sample scenarios.

    fit(X):      X (n, d) returns -> checked float64 array -> the subclass's `_fit`
    sample(m):   the subclass's `_sample` -> (m, d), a DataFrame with the assets' names if fitted on one
    sample_chunks(m), sample_to(path, m):  the same a chunk at a time, and to disk (stream.py)

Randomness comes from `random_state` alone (None, int or numpy RandomState); the global state is neither read
nor set. Fitting and sampling use separate streams of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import numbers
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.numpy
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from finediff.generators.checks import positive_integer, refuse_gaps, refuse_nothing_to_learn
from finediff.generators.stream import Streaming
from finediff.panel import heuristic_warnings
from finediff.provenance import whole_directory

_FIT, _SAMPLE = 0, 1  # stream.py has 2
_FORMAT = 1
# Dataclasses that may stand in a saved configuration: nothing else is ever imported by `load`.
_CONFIGURABLE = (
    "finediff.diffusion.process",
    "finediff.diffusion.sample",
    "finediff.diffusion.objective",
    "finediff.generators.ridge_score",
)


class ScenarioGenerator(Streaming, BaseEstimator, ABC):
    """A law of one period's returns, learned from a panel.

    A subclass has keyword-only constructor arguments, `_fit(X, seed)`, `_sample(n, seed)` and, for saving,
    `_arrays()` and `_restore(arrays)`. What it can be steered by (`condition`, `stress`, `guidance`) it names in
    `_steered_by`, and takes as keywords. With `_takes_missing` its `_fit` meets NaN (never infinities, text or an
    asset without any return; a row without any is its own affair).

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where the panel was a DataFrame with names.
    n_samples_fit_ : int
        Rows of the panel.
    """

    _steered_by: tuple[str, ...] = ()
    _takes_missing = False
    _numbered = False  # fitted on a frame whose columns are numbers, but not their positions

    @abstractmethod
    def _fit(self, X: np.ndarray, seed: int) -> None:
        """Learn from X (n, d), float64, n >= 2, finite (but for NaN where `_takes_missing`)."""

    @abstractmethod
    def _sample(self, n: int, seed: int) -> np.ndarray:
        """(n, d) scenarios in the units of the panel."""

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """All that was learned, as arrays."""

    @abstractmethod
    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Inverse of `_arrays`; the constructor's arguments and n_features_in_ are set already."""

    def fit(self, X, y=None, *, condition=None):
        """Learn the law of the rows of a panel.

        Parameters
        ----------
        X : DataFrame or array (n, d)
            Simple returns per period, one row a date; at least 2 rows, no infinite values, and no missing ones
            unless the class says so. An asset that never moves is allowed and comes back as it is.
        y : None
            Ignored.
        condition : DataFrame, Series or array (n,) or (n, c), optional
            What is known about each row (a volatility, a regime): numbers are standardised, text, booleans and
            categories are one-hot. Diffusion generators only.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For non-numeric, missing or infinite entries, fewer than 2 rows, two assets of one name, or a panel
            whose rows are all the same. What only looks wrong (prices, percent, stale prices, few rows) is a
            `finediff.panel.PanelWarning`.
        """
        refuse_gaps(X, missing=self._takes_missing)
        indexed = isinstance(X, pd.DataFrame) and isinstance(condition, pd.DataFrame | pd.Series)
        if indexed and len(X) == len(condition) and not X.index.equals(condition.index):
            raise ValueError(
                "expected conditions with the dates of the panel in its order, got another index: "
                "condition.reindex(X.index) puts them in order"
            )
        labels = list(X.columns) if isinstance(X, pd.DataFrame) else None
        finite = "allow-nan" if self._takes_missing else True
        X = validate_data(
            self, X, dtype=np.float64, order="C", ensure_min_samples=2, ensure_all_finite=finite, copy=True
        )
        names = getattr(self, "feature_names_in_", range(X.shape[1]))
        heuristic_warnings(X, names, stacklevel=2)
        refuse_nothing_to_learn(X, names)
        self._numbered = (
            labels is not None and not hasattr(self, "feature_names_in_") and labels != [*range(X.shape[1])]
        )
        self.n_samples_fit_ = len(X)
        self._fit(X, self._seed(None, _FIT), **self._steering(condition=condition))
        return self

    def sample(self, n_samples=1000, *, random_state=None, condition=None, stress=None, guidance=None):
        """Draw scenarios, independent in time.

        Parameters
        ----------
        n_samples : int
            Number of scenarios, at least 1.
        random_state : None, int or RandomState
            None uses the estimator's own random_state, so that two calls give the same scenarios where that is
            an integer; pass another integer for others.
        condition : number, str, mapping, array or DataFrame, optional
            One condition for all scenarios or one row each; None draws from the unconditional law.
        stress : mapping, optional
            {asset: return}, {asset: (low, high)} or {asset: array of n_samples returns}: scenarios in which these
            assets move so, the others as the model says. Diffusion generators only.
        guidance : float, optional
            Classifier-free weight on the condition; 0 is the conditional law, more exaggerates it.

        Returns
        -------
        DataFrame or ndarray (n_samples, d)
            Simple returns per period; float64. A DataFrame (index "scenario") if the panel was one whose
            columns have names.
        """
        check_is_fitted(self)
        n = positive_integer("n_samples", n_samples, "try sample(1000)")
        steering = self._steering(condition=condition, stress=stress, guidance=guidance)
        return self._framed(self._sample(n, self._seed(random_state, _SAMPLE), **steering))

    def _framed(self, rows, first: int = 0):
        """Rows as `sample` gives them, counted from ``first``."""
        rows = np.asarray(rows, dtype=np.float64)
        if not hasattr(self, "feature_names_in_"):
            return rows
        index = pd.RangeIndex(first, first + len(rows), name="scenario")
        return pd.DataFrame(rows, index, self.feature_names_in_, copy=False)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self._takes_missing
        return tags

    def _steering(self, **wanted) -> dict:
        given = {name: value for name, value in wanted.items() if value is not None}
        for name in given:
            if name not in self._steered_by:
                raise ValueError(
                    f"expected no {name} for {type(self).__name__}, got one: it cannot be steered so; DDPMGenerator takes all three"
                )
        return given

    def _seed(self, random_state, purpose: int) -> int:
        random_state = self.random_state if random_state is None else random_state
        if random_state is None:  # check_random_state(None) would read numpy's global state
            words = np.random.SeedSequence().generate_state(4)
        else:
            try:
                stream = check_random_state(random_state)
            except ValueError:
                raise ValueError(
                    "expected random_state to be None, an integer from 0 to 2^32 - 1 or a numpy RandomState, got "
                    f"{random_state!r}: pass an integer"
                ) from None
            words = stream.randint(0, 2**32, size=4, dtype=np.uint64)
        return int(np.random.SeedSequence([*map(int, words), purpose]).generate_state(1, np.uint64)[0] >> 1)

    def save(self, path) -> Path:
        """Write the fitted generator to a directory: generator.json and arrays.safetensors, no pickle.

        The directory appears whole or not at all; a generator saved there before is replaced.
        """
        check_is_fitted(self)
        path = Path(path)
        arrays = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in self._arrays().items()})
        about = {
            "format": _FORMAT,
            "class": type(self).__name__,
            "finediff": version("finediff"),
            "parameters": {k: _encode(k, v) for k, v in self.get_params(deep=False).items()},
            "n_features_in": self.n_features_in_,
            "n_samples_fit": self.n_samples_fit_,
            "numbered": self._numbered,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])) or None,
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
        }
        with whole_directory(path, marker="generator.json") as partial:
            (partial / "arrays.safetensors").write_bytes(arrays)
            (partial / "generator.json").write_text(json.dumps(about, indent=2))
        return path

    @classmethod
    def load(cls, path):
        """Read a generator saved by `save`, on any device; ``ScenarioGenerator.load`` reads every class."""
        path = Path(path)
        try:
            about = json.loads((path / "generator.json").read_text())
            arrays = (path / "arrays.safetensors").read_bytes()
            if hashlib.sha256(arrays).hexdigest() != about["arrays_sha256"]:
                raise ValueError("arrays.safetensors is not the file that was saved")
            arrays = safetensors.numpy.load(arrays)
            name, parameters = about["class"], about["parameters"].items()
        except (FileNotFoundError, NotADirectoryError) as missing:
            raise ValueError(
                f"expected a directory written by save(), got {path} without {Path(missing.filename).name}"
            ) from None
        except Exception as broken:
            raise ValueError(
                f"expected a directory written by save(), got {path}, whose files cannot be read ({broken!r})"
            ) from None
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"expected format {_FORMAT}, got {about.get('format')} in {path}: load it with the finediff "
                f"that wrote it ({about.get('finediff')})"
            )
        kind = next((c for c in _subclasses(ScenarioGenerator) if c.__name__ == name), None)
        if kind is None or not issubclass(kind, cls):
            raise ValueError(f"expected a saved {cls.__name__}, got a {name} in {path}: use {name}.load")
        try:
            self = kind(**{k: _decode(v) for k, v in parameters})
            self.n_features_in_, self.n_samples_fit_ = about["n_features_in"], about["n_samples_fit"]
            self._numbered = about.get("numbered", False)
            if about["feature_names_in"]:
                self.feature_names_in_ = np.asarray(about["feature_names_in"], dtype=object)
            self._restore(arrays)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as misfit:
            raise ValueError(
                f"expected a {name} written by save(), got {path}, whose generator.json does not describe one "
                f"({misfit!r}): save it again with finediff {version('finediff')}"
            ) from None
        return self


def _subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _encode(name: str, value):
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, tuple | list):
        return [_encode(name, v) for v in value]
    if isinstance(value, np.random.RandomState):
        return None  # a stream cannot be stored; a loaded generator draws fresh seeds
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and type(value).__module__ in _CONFIGURABLE:
        fields = {f.name: _encode(name, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"of": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, BaseEstimator) and type(value).__module__.startswith("sklearn.covariance."):
        parameters = {k: _encode(f"{name}__{k}", v) for k, v in value.get_params(deep=False).items()}
        return {"sklearn.covariance": type(value).__name__, **parameters}
    raise ValueError(
        f"expected parameters made of numbers, strings and finediff's own classes, got {name}={value!r}, which "
        "cannot be saved without pickle: use one of finediff.diffusion's classes"
    )


def _decode(value):
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    arguments = {k: _decode(v) for k, v in value.items()}
    if "sklearn.covariance" in value:
        import sklearn.covariance

        module, name = "sklearn.covariance", arguments.pop("sklearn.covariance")
        kind = getattr(sklearn.covariance, name, None)
        known = isinstance(kind, type) and issubclass(kind, BaseEstimator)
    else:
        module, _, name = arguments.pop("of").partition(":")
        kind = getattr(importlib.import_module(module), name, None) if module in _CONFIGURABLE else None
        known = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module
    if not known:
        raise ValueError(f"expected a configuration made of known classes, got {name!r} of {module!r}")
    return kind(**arguments)

"""Covariance from a generator: the one its law implies, or one re-estimated from its scenarios.

    implied    Sigma = D^1/2 corr(Sigma_generator) D^1/2
    samples    Sigma = D^1/2 corr(x_1..x_m) D^1/2, moments merged chunk by chunk

D is the diagonal of the data's covariance, or of the generator's. Units: (return per period)^2.
"""

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import validate_data

from finediff.covariance.matrix import correlation_from_covariance, refuse_holes, rescale

_TILE = 128  # assets centred at once where only their variances are wanted


class RunningMoments:
    """Mean and spread of rows that arrive in chunks, by the pairwise update of Chan, Golub, LeVeque (1983).

    delta = mean_b - mean_a,  m = m_a + m_b,  mean = mean_a + delta m_b/m,  S = S_a + S_b + delta delta^T m_a m_b/m

    Each chunk is centred on its own mean, in float64, so that no difference of large squares is taken.

    Parameters
    ----------
    d : int
        Number of assets.
    full : bool
        Whether the whole covariance is kept, or the variances alone.

    Attributes
    ----------
    count : int
    mean : (d,) array
    scatter : (d, d) array, or (d,)
        Sums of products about the mean.
    """

    def __init__(self, d, full=True):
        self.full, self.count = full, 0
        self.mean, self.scatter = np.zeros(d), np.zeros((d, d) if full else d)

    def update(self, columns, centre=None):
        """Take in assets x rows (d, k), k at least 1; ``centre`` (d,) is their mean where it is known already."""
        k = columns.shape[1]
        centre = columns.mean(axis=1, dtype=np.float64) if centre is None else centre
        delta, between = centre - self.mean, self.count * k / (self.count + k)
        if self.full:
            columns = columns - centre[:, None]
            self.scatter += columns @ columns.T
            self.scatter += np.outer(delta, delta) * between
        else:
            for start in range(0, len(columns), _TILE):
                part = slice(start, start + _TILE)
                piece = columns[part] - centre[part, None]
                self.scatter[part] += np.einsum("ij,ij->i", piece, piece)
            self.scatter += delta**2 * between
        self.mean += delta * (k / (self.count + k))
        self.count += k

    def covariance(self):
        """(d, d), or the variances (d,); divided by count - 1, NaN for fewer than two rows."""
        return self.scatter / (self.count - 1) if self.count > 1 else np.full_like(self.scatter, np.nan)


def streaming_moments(chunks):
    """Mean and covariance of rows that arrive in chunks, without keeping them.

    Parameters
    ----------
    chunks : iterable of (k, d) arrays
        Merged as `RunningMoments` does.

    Returns
    -------
    count : int
    mean : (d,) array
    covariance : (d, d) array
        Divided by count - 1.

    Raises
    ------
    ValueError
        If fewer than two rows arrive.
    """
    moments = None
    for rows in chunks:
        rows = np.asarray(rows, np.float64)
        if len(rows) == 0:
            continue
        moments = RunningMoments(rows.shape[1]) if moments is None else moments
        moments.update(rows.T)
    count = 0 if moments is None else moments.count
    if count < 2:
        raise ValueError(f"expected at least two rows for a covariance, got {count}.")
    return count, moments.mean, moments.covariance()


class ScenarioCovariance(BaseEstimator):
    """Covariance of a fitted generator: the one its law implies, or one re-estimated from its scenarios.

    Scenarios add only sampling error to an implied covariance, so that one comes first. The dependence is the
    generator's; the scale stays with the data unless asked otherwise, because a generator that misses the
    variances by a few per cent would otherwise misprice risk.

    Parameters
    ----------
    generator : object with ``fit(X)`` and ``sample(n_samples, random_state=...)``
        It is cloned and the clone fitted, unless ``prefit``. Its ``covariance_`` (d, d), if it has one, is taken
        for the covariance of its scenarios, in the units of the returns.
    cleaner : callable (covariance, n_samples) -> covariance, optional
        For example `clip`. It receives the number of REAL rows: the noise of a re-estimated matrix is that of
        the n rows the generator learned from, and more synthetic rows add no information about the market.
        With the synthetic count the noise edge would shrink to 1 and every learned noise factor would stay.
    n_scenarios : int
        m, at least 2; used where scenarios are drawn.
    scale : {"data", "scenarios"}
        Whose means and standard deviations are reported: the data's, or the generator's.
    chunk : int
        Rows drawn at once: memory is O(chunk d + d^2), never O(m d).
    prefit : bool
        True uses ``generator`` as it stands and ``fit(X)`` only reads the scale and n from X.
    random_state : None, int or RandomState
        Of the sampling only; each chunk gets its own seed, so the numbers depend on ``chunk`` but not on
        anything outside. The generator's fit follows the generator's own parameters.
    source : {"implied", "samples"}
        "implied" reads ``covariance_`` of the fitted generator and draws scenarios only if it has none.

    Attributes
    ----------
    covariance_, correlation_ : (d, d) arrays
    location_ : (d,) array
        Mean per period, of the rows that ``scale`` names; of an implied covariance with scale "scenarios" the
        generator's ``mean_``, or if it has none the mean of its scenarios.
    source_ : {"implied", "samples"}
        What was used.
    sampling_error_ : float
        Standard error of the scenarios' covariance, Frobenius norm over that of the covariance, before scaling
        and cleaning: 0 if implied, nan for fewer than eight scenarios. From batches of the scenarios; with
        heavy tails, whose fourth moments may not exist, it falls more slowly than 1/sqrt(m).
    generator_ : the fitted generator
    n_features_in_ : int
    feature_names_in_ : (d,) array, if X is a DataFrame with string columns

    Raises
    ------
    ValueError
        On ``fit``: fewer than two rows, non-finite entries (row and column named; NaN is allowed where the generator
        takes it, and the data's scales are then those of what is there), an unknown scale or source,
        counts below their minimum, scenarios of the wrong shape, names or with non-finite entries, an implied
        covariance of another size, dead assets.
    """

    def __init__(
        self,
        generator,
        cleaner=None,
        n_scenarios=10_000,
        scale="data",
        chunk=2048,
        prefit=False,
        random_state=None,
        source="implied",
    ):
        self.generator = generator
        self.cleaner = cleaner
        self.n_scenarios = n_scenarios
        self.scale = scale
        self.chunk = chunk
        self.prefit = prefit
        self.random_state = random_state
        self.source = source

    def fit(self, X, y=None):
        """Fit the generator on X and take its covariance.

        Parameters
        ----------
        X : (n, d) array or DataFrame
            Simple returns per period, n >= 2.
        y : None
            Ignored.

        Returns
        -------
        self
        """
        if self.scale not in ("data", "scenarios"):
            raise ValueError(f"expected scale 'data' or 'scenarios', got {self.scale!r}.")
        if self.source not in ("implied", "samples"):
            raise ValueError(f"expected source 'implied' or 'samples', got {self.source!r}.")
        if self.n_scenarios < 2 or self.chunk < 1:
            raise ValueError(
                f"expected n_scenarios >= 2 and chunk >= 1, got {self.n_scenarios} and {self.chunk}."
            )
        rows = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2)
        holes = _takes_missing(self.generator)
        refuse_holes(
            np.nan_to_num(rows, nan=0.0, posinf=np.inf, neginf=-np.inf) if holes else rows,
            getattr(self, "feature_names_in_", None),
            "X",
        )
        self.generator_ = self.generator if self.prefit else clone(self.generator).fit(X, y)
        columns = X.columns if isinstance(X, pd.DataFrame) else None
        covariance = self._implied(columns) if self.source == "implied" else None
        location = getattr(self.generator_, "mean_", None)
        if covariance is not None:
            self.source_, self.sampling_error_ = "implied", 0.0
            if self.scale == "scenarios" and np.shape(location) != (rows.shape[1],):
                _, location, _ = streaming_moments(self._draw(columns))
        else:
            self.source_, batches = "samples", _Batches(max(2, self.n_scenarios // 32))
            _, location, covariance = streaming_moments(batches.watch(self._draw(columns)))
            self.sampling_error_ = batches.relative_error(covariance)
            still = np.flatnonzero(np.diag(covariance) <= 1e-24 * location**2)
            if still.size:
                raise ValueError(
                    f"expected scenarios that vary, got constant columns {list(still[:5])}: no correlation; "
                    "check the generator."
                )
        if self.scale == "data":
            location = np.nanmean(rows, axis=0)
            covariance = rescale(correlation_from_covariance(covariance), np.nanstd(rows, axis=0, ddof=1))
        if self.cleaner is not None:
            covariance = np.asarray(self.cleaner(covariance, len(rows)), float)
        self.location_, self.covariance_ = np.asarray(location, float), covariance
        self.correlation_ = correlation_from_covariance(covariance)
        return self

    def _implied(self, columns):
        """The covariance (d, d) of the generator's law, or None if it has none."""
        covariance = getattr(self.generator_, "covariance_", None)
        if covariance is None:
            return None
        if (
            columns is not None
            and isinstance(covariance, pd.DataFrame)
            and not covariance.columns.equals(columns)
        ):
            raise ValueError(
                "expected an implied covariance with the columns of X, got other names or another order: it would be "
                "read for the wrong assets; fit the generator on this X."
            )
        matrix, d = np.asarray(covariance, float), self.n_features_in_
        if matrix.shape != (d, d):
            raise ValueError(
                f"expected an implied covariance of shape {(d, d)}, got {matrix.shape}: was a prefit generator fitted "
                "on other assets? Fit it on this X, or pass source='samples'."
            )
        return matrix

    def _draw(self, columns):
        """Yield chunks (k, d) of scenarios, each from a stream of its own."""
        n_chunks = -(-self.n_scenarios // self.chunk)
        seeds = _entropy(self.random_state).generate_state(n_chunks)
        for i, seed in enumerate(seeds):
            k = min(self.chunk, self.n_scenarios - i * self.chunk)
            rows = self.generator_.sample(k, random_state=int(seed))
            if columns is not None and isinstance(rows, pd.DataFrame) and not rows.columns.equals(columns):
                raise ValueError(
                    "expected scenarios with the columns of X, got other names or another order."
                )
            rows = np.asarray(rows, np.float64)
            if rows.shape != (k, self.n_features_in_):
                raise ValueError(
                    f"expected scenarios of shape {(k, self.n_features_in_)}, got {rows.shape}; "
                    "was a prefit generator fitted on other assets?"
                )
            refuse_holes(rows, getattr(self, "feature_names_in_", None), f"chunk {i} of the scenarios")
            yield rows


class _Batches:
    """Spread of a covariance between batches of `size` rows, while they pass by."""

    def __init__(self, size):
        self.size, self.count, self.total, self.squares = size, 0, 0.0, 0.0

    def watch(self, chunks):
        left = None
        for rows in chunks:
            yield rows
            rows = rows if left is None else np.concatenate([left, rows])
            whole = len(rows) // self.size * self.size
            for batch in rows[:whole].reshape(-1, self.size, rows.shape[1]):
                S = np.cov(batch, rowvar=False).reshape(rows.shape[1], -1)
                self.count, self.total, self.squares = (
                    self.count + 1,
                    self.total + S,
                    self.squares + (S**2).sum(),
                )
            left = rows[whole:]

    def relative_error(self, covariance):
        if self.count < 4:
            return np.nan
        spread = max(0.0, self.squares - (self.total**2).sum() / self.count)
        return float(np.sqrt(spread / (self.count * (self.count - 1))) / np.linalg.norm(covariance))


def _takes_missing(generator):
    """Whether its rows may have holes, as scikit-learn's tags say."""
    tags = getattr(generator, "__sklearn_tags__", None)
    return tags is not None and bool(tags().input_tags.allow_nan)


def _entropy(random_state):
    if isinstance(random_state, np.random.RandomState):
        return np.random.SeedSequence(random_state.randint(0, 2**32, size=4, dtype=np.uint32).tolist())
    return np.random.SeedSequence(random_state)

"""Trading: what a portfolio costs to reach from the weights w0 that are held.

    Turnover          sum_i |w_i - w0_i| <= limit             a constraint
    TransactionCost   + sum_i c_i |w_i - w0_i|                in the objective (from the return in a ratio)

The sums run over all names on either side: an asset that is not held yet has w0_i = 0, and one that is held but
no longer on offer is sold, which counts. Both stand in the list of constraints. Held weights are a parameter of
the compiled program, so that a back-test re-solves with new ones.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pandas as pd

from finediff.portfolio.constraints import Constraint, Rows, absolute_rows, require


class Held(NamedTuple):
    """Weights held (d,), in the order of the assets; ``sold`` is for what is no longer on offer."""

    weights: object
    sold: object


def split_held(previous, names, n_assets):
    """Held weights (d,) in the order of the assets, and a Series of those no longer on offer.

    Parameters
    ----------
    previous : (d,) array or Series
        A Series is matched by name.
    names : Index or None
        The assets on offer.
    n_assets : int
        d.

    Returns
    -------
    (d,) array, and a Series or None

    Raises
    ------
    ValueError
        Not finite, another shape, or a Series for assets without names.
    """
    array = np.asarray(previous, float)
    require(
        array.ndim == 1 and np.isfinite(array).all(),
        "finite previous weights (d,)",
        f"shape {array.shape} or NaN",
    )
    if isinstance(previous, pd.Series):
        require(names is not None, "a named mean or covariance to match named previous weights", "arrays")
        require(not previous.index.has_duplicates, "previous weights with unique names", "a name twice")
        gone = previous.drop(names, errors="ignore")
        return previous.reindex(names, fill_value=0.0).to_numpy(float), gone
    require(array.shape == (n_assets,), f"previous weights of shape {(n_assets,)}", array.shape)
    return array, None


class Trading(Constraint):
    """Common part of what depends on the weights held: the constraint's own, or those given to ``solve``."""

    previous = None

    def form(self):
        """What the compiled program depends on: all but the weights held."""
        return self

    def _given(self, previous):
        previous = self.previous if self.previous is not None else previous
        if previous is None:
            raise ValueError(
                f"expected previous weights, got None, because {self!r} counts trades from them; pass "
                "solve(previous=...), zeros if nothing is held."
            )
        return previous


@dataclass(frozen=True, eq=False)
class Turnover(Trading):
    """sum |w_i - previous_i| <= limit, purchases plus sales.

    A Series ``previous`` is matched to the assets by name: a new asset was held at zero, and what was held of
    an asset no longer on offer is sold and counts. An array (d,) is taken in the order of the covariance.
    Without one, ``solve(previous=...)`` says what is held: ``Turnover(limit=0.2)``.
    """

    previous: object = field(default=None, repr=False)
    limit: float = None

    def __post_init__(self):
        if self.previous is not None:
            previous = np.asarray(self.previous, float)
            good = previous.ndim == 1 and np.isfinite(previous).all()
            require(good, "finite previous weights (d,)", f"shape {previous.shape} or NaN")
        require(
            self.limit is not None and self.limit >= 0,
            "a turnover limit of at least 0",
            f"{self.limit}; write Turnover(limit=...)",
        )

    def form(self):
        return type(self), float(self.limit)

    def held(self, previous, names, n_assets):
        """Weights held and the sum of |weights| sold by force."""
        weights, gone = split_held(self._given(previous), names, n_assets)
        return Held(weights, 0.0 if gone is None else float(gone.abs().sum()))

    def build(self, weights, scale, names=None, held=None):
        held = held or self.held(None, names, weights.shape[0])
        return [cp.norm1(weights - held.weights * scale) + held.sold * scale <= self.limit * scale]

    def rows(self, n_assets, names=None, held=None):
        held = held or self.held(None, names, n_assets)
        return absolute_rows(held.weights, self.limit - held.sold)


@dataclass(frozen=True, eq=False)
class TransactionCost(Trading):
    """Proportional costs sum c_i |w_i - previous_i|, in the objective and in its units.

    `MeanVariance`: from the expected return, so c is a cost per unit traded, spread over the periods it is held.
    `MinimumCVaR`: onto the loss, likewise. `MaximumSharpe`: from the excess return in the numerator.
    `MinimumVariance` and `MinimumTrackingError`: onto the variance; a cost k for an investor with
    (gamma / 2) variance is c = 2 k / gamma. `RiskParity` has no place for it and refuses.

    Parameters
    ----------
    rate : float, (d,) array or Series
        c_i >= 0; a Series is matched by name and must know every asset, held ones too.
    previous : (d,) array or Series, optional
        Weights held, as in `Turnover`; by default those given to ``solve``.
    """

    rate: object
    previous: object = field(default=None, repr=False)

    def __post_init__(self):
        rate = np.asarray(self.rate, float)
        good = rate.ndim <= 1 and np.isfinite(rate).all() and (rate >= 0).all()
        require(good, "a cost rate that is finite and not negative, a number or (d,)", self.rate)

    def form(self):
        return (type(self),)

    def build(self, weights, scale, names=None, held=None):
        return []

    def _rates(self, names, n_assets):
        rate = self.rate
        if isinstance(rate, pd.Series):
            require(names is not None, "a named covariance or scenarios to match named rates", "arrays")
            missing = names.difference(rate.index)
            require(not len(missing), "a cost rate for every asset", f"none for {list(missing)[:5]}")
            return rate[names].to_numpy(float)
        rate = np.asarray(rate, float)
        require(rate.ndim == 0 or rate.shape == (n_assets,), f"cost rates of shape {(n_assets,)}", rate.shape)
        return np.broadcast_to(rate, n_assets).copy()

    def held(self, previous, names, n_assets):
        """Weights held and the cost of what is sold by force."""
        weights, gone = split_held(self._given(previous), names, n_assets)
        if gone is None or gone.empty:
            return Held(weights, 0.0)
        if isinstance(self.rate, pd.Series):
            missing = gone.index.difference(self.rate.index)
            require(not len(missing), "a cost rate for every asset held", f"none for {list(missing)[:5]}")
            return Held(weights, float((gone.abs() * self.rate[gone.index]).sum()))
        require(
            np.ndim(self.rate) == 0, "one cost rate, or a Series", "an array, though an asset held has left"
        )
        return Held(weights, float(self.rate) * float(gone.abs().sum()))

    def cost(self, weights, previous, names):
        """Costs of reaching ``weights`` (d,), in units of the objective."""
        held = self.held(previous, names, len(weights))
        return float(self._rates(names, len(weights)) @ np.abs(weights - held.weights) + held.sold)

    def rates(self, names, n_assets):
        """c (d,)."""
        return self._rates(names, n_assets)

    def term(self, weights, scale, held, rates):
        """Cost of ``weights`` (cvxpy), and the constraints that define it; every argument may be a Parameter."""
        # A variable between them: a parameter times a parameter could not be compiled once.
        trades = cp.Variable(weights.shape[0])
        return rates @ cp.abs(trades) + held.sold * scale, [trades == weights - held.weights * scale]

    def rows(self, n_assets, names=None, held=None):
        held = held or self.held(None, names, n_assets)
        rates = self._rates(names, n_assets)
        # Where trading is free, z would have no upper end.
        eye = np.eye(n_assets)[rates > 0]
        centre, select = held.weights[rates > 0], np.eye(len(eye))
        return Rows(
            np.vstack([eye, -eye]),
            np.concatenate([centre, -centre]),
            np.vstack([-select, -select]),
            rates[rates > 0],
        )

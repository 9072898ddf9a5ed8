"""Constraints: convex sets of portfolios, written for weights that sum to a scale.

A constraint is asked for up to three things, with d assets and names (an Index, or None):

    build   the set {y : y / scale in C}, in cvxpy, positively homogeneous in (y, scale): scale is 1, or kappa
            where the problem was made convex through y = kappa w
    rows    the same set at scale 1 as  A w + B z <= b  for some z, cost c'z; what interior-point steps need
    bounds  the lowest and highest weight of one asset

Problems keep their compiled program from one `solve` to the next, so a constraint must not change after it
was made, and two that compare equal must build the same set. The built-in ones are frozen dataclasses; one of
your own subclasses `Constraint` and writes ``build``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np
import pandas as pd


@dataclass(frozen=True, eq=False)
class Rows:
    """{w : on_weights w + on_extra z <= right for some z}, with cost'z in the objective.

    Attributes
    ----------
    on_weights : (m, d) array
    right : (m,) array
    on_extra : (m, k) array or None
        None if no z is needed.
    cost : (k,) array or None
    """

    on_weights: np.ndarray
    right: np.ndarray
    on_extra: object = None
    cost: object = None


class Constraint(ABC):
    """A convex set of portfolios, written for weights that sum to ``scale``."""

    @abstractmethod
    def build(self, weights, scale, names=None):
        """List of cvxpy constraints on ``weights`` (d,), positively homogeneous in (weights, scale).

        ``names`` is the Index of the assets, or None. Called once for many solves with one universe.
        """

    def rows(self, n_assets, names=None):
        """The set as `Rows`, or None where it has no such form."""
        return

    def bounds(self):
        """Lowest and highest weight of one asset that the set allows."""
        return -np.inf, np.inf

    def conflict(self, n_assets):
        """Why no fully invested portfolio of ``n_assets`` can meet it, with the remedy; "" if one can."""
        return ""

    def parts(self):
        """Constraints whose intersection this is; of an infeasible problem the guilty parts are named."""
        return [self]


def require(good, expected, got):
    """Raise a ValueError "expected ..., got ..." unless ``good``."""
    if not good:
        raise ValueError(f"expected {expected}, got {got}.")


@dataclass(frozen=True)
class LongOnly(Constraint):
    """w_i >= 0."""

    def build(self, weights, scale, names=None):
        return [weights >= 0]

    def rows(self, n_assets, names=None):
        return Rows(-np.eye(n_assets), np.zeros(n_assets))

    def bounds(self):
        return 0.0, np.inf


@dataclass(frozen=True)
class MaximumWeight(Constraint):
    """w_i <= cap."""

    cap: float

    def __post_init__(self):
        require(np.isfinite(self.cap) and self.cap > 0, "a cap that is positive and finite", self.cap)
        object.__setattr__(self, "cap", float(self.cap))

    def build(self, weights, scale, names=None):
        return [weights <= self.cap * scale]

    def rows(self, n_assets, names=None):
        return Rows(np.eye(n_assets), np.full(n_assets, self.cap))

    def bounds(self):
        return -np.inf, self.cap

    def conflict(self, n_assets):
        total = self.cap * n_assets
        if total < 1 - 1e-12:
            return f"{n_assets} assets sum to {total:.4g} < 1 at most; raise the cap to {1 / n_assets:.4g}"
        return ""


@dataclass(frozen=True)
class MinimumWeight(Constraint):
    """w_i >= floor; a negative floor limits short positions."""

    floor: float

    def __post_init__(self):
        require(np.isfinite(self.floor), "a finite floor", self.floor)
        object.__setattr__(self, "floor", float(self.floor))

    def build(self, weights, scale, names=None):
        return [weights >= self.floor * scale]

    def rows(self, n_assets, names=None):
        return Rows(-np.eye(n_assets), np.full(n_assets, -self.floor))

    def bounds(self):
        return self.floor, np.inf

    def conflict(self, n_assets):
        total = self.floor * n_assets
        if total > 1 + 1e-12:
            return f"{n_assets} assets sum to {total:.4g} > 1 at least; lower the floor to {1 / n_assets:.4g}"
        return ""


def absolute_rows(centre, right):
    """|w - centre| <= z, sum z <= right."""
    d = len(centre)
    eye, none = np.eye(d), np.zeros((1, d))
    return Rows(
        np.vstack([eye, -eye, none]),
        np.concatenate([centre, -centre, [right]]),
        np.vstack([-eye, -eye, none + 1]),
        np.zeros(d),
    )


@dataclass(frozen=True)
class GrossExposure(Constraint):
    """sum |w_i| <= limit; 1 is long-only, 1.6 is 130/30."""

    limit: float

    def __post_init__(self):
        require(self.limit >= 1, "a gross exposure of at least 1, as weights sum to 1", self.limit)
        object.__setattr__(self, "limit", float(self.limit))

    def build(self, weights, scale, names=None):
        return [cp.norm1(weights) <= self.limit * scale]

    def rows(self, n_assets, names=None):
        return absolute_rows(np.zeros(n_assets), self.limit)


@dataclass(frozen=True, init=False)
class GroupLimits(Constraint):
    """low_g <= sum of w_i over the members of group g <= high_g, for every group with a limit.

    Parameters
    ----------
    groups : mapping of group to members, or Series of group by asset
        Members are asset names, or positions 0 ... d-1 where the assets have no names. A name that is not on
        offer counts as held at zero; a group without any known name is refused, as it may be misspelt.
        Groups may overlap.
    limits : mapping of group to (low, high)
        Sums of weights; None or an infinity leaves a side open.

    Raises
    ------
    ValueError
        A limit for an unknown group, low above high, or, when solving, members that the assets do not have.

    Examples
    --------
    >>> GroupLimits({"bonds": ["IEF", "TLT"], "stocks": ["SPY"]}, {"bonds": (0.2, 0.6), "stocks": (None, 0.7)})
    GroupLimits(bonds in [0.2, 0.6], stocks in [-inf, 0.7])
    """

    limits: tuple = field(repr=False)

    def __init__(self, groups, limits):
        if isinstance(groups, pd.Series):
            groups = {name: list(part.index) for name, part in groups.groupby(groups)}
        if not isinstance(groups, Mapping) or not isinstance(limits, Mapping) or not limits:
            raise ValueError(
                f"expected groups and limits as mappings, got {type(groups).__name__} and "
                f"{type(limits).__name__} (or no limit); give {{group: members}} and {{group: (low, high)}}."
            )
        kept = []
        for name, pair in limits.items():
            require(name in groups, f"limits for groups among {list(groups)}", repr(name))
            require(np.ndim(pair) == 1 and len(pair) == 2, f"(low, high) for group {name!r}", pair)
            low = -np.inf if pair[0] is None else float(pair[0])
            high = np.inf if pair[1] is None else float(pair[1])
            require(low <= high, f"low <= high for group {name!r}", f"({low:g}, {high:g})")
            members = groups[name]
            require(
                not isinstance(members, str) and len(members) > 0, f"members of group {name!r}", repr(members)
            )
            kept.append((name, tuple(members), low, high))
        object.__setattr__(self, "limits", tuple(kept))

    def __repr__(self):
        return f"GroupLimits({', '.join(f'{g} in [{low:g}, {high:g}]' for g, _, low, high in self.limits)})"

    def parts(self):
        found = []
        for group, members, low, high in self.limits:
            found.append(GroupLimits({group: members}, {group: (low, high)}))
        return found

    def _membership(self, n_assets, names):
        """(groups, d) matrix of zeros and ones."""
        table = np.zeros((len(self.limits), n_assets))
        for row, (group, members, _, _) in zip(table, self.limits):
            if names is None:
                good = [isinstance(m, int | np.integer) and 0 <= m < n_assets for m in members]
                if not all(good):
                    odd = members[good.index(False)]
                    raise ValueError(
                        f"expected members of group {group!r} among positions 0 to {n_assets - 1}, got {odd!r}, "
                        "because the assets have no names; give positions, or a named covariance."
                    )
                row[list(members)] = 1
            else:
                row[names.isin(members)] = 1
                if not row.any():
                    raise ValueError(
                        f"expected group {group!r} to hold some of the assets, got none of "
                        f"{list(members)[:5]} among them; check the names."
                    )
        return table

    def build(self, weights, scale, names=None):
        table = self._membership(weights.shape[0], names)
        low, high = (np.array([limit[side] for limit in self.limits]) for side in (2, 3))
        below, above = np.isfinite(high), np.isfinite(low)
        found = [table[below] @ weights <= high[below] * scale] if below.any() else []
        return found + ([table[above] @ weights >= low[above] * scale] if above.any() else [])

    def rows(self, n_assets, names=None):
        table = self._membership(n_assets, names)
        low, high = (np.array([limit[side] for limit in self.limits]) for side in (2, 3))
        below, above = np.isfinite(high), np.isfinite(low)
        return Rows(np.vstack([table[below], -table[above]]), np.concatenate([high[below], -low[above]]))

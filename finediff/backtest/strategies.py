"""How an estimator and a portfolio become weights.

    estimator                        what the portfolio is solved with
    None, "equal"                    nothing: 1/d each
    "history"                        the rows themselves as scenarios, their mean and sample covariance
    fit(X) -> covariance_            covariance; mean from location_, or of the rows (also if it was taken for zero)
    fit(X), sample(n) and a problem  scenarios for `MinimumCVaR`, from one seed at every date: common random numbers;
                                     for all others their covariance, by `ScenarioCovariance`

An estimator is cloned for every window, so that no window sees another's fit. Its random states that are None
are set to the strategy's, the same at every window. Covariances that are closed forms are computed for many
windows at once, to the same bits.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.base import clone

from finediff.covariance import ScenarioCovariance
from finediff.covariance.estimators import CovarianceEstimator
from finediff.portfolio import MinimumCVaR
from finediff.portfolio.problem import Problem
from finediff.portfolio.trading import Trading

_LARGEST = 2**23  # numbers of the rows that are estimated at once: 64 MiB
_MANY = 100  # assets: from there on an eigendecomposition costs more than a call, and stacks only hold memory


@dataclass(frozen=True, eq=False)
class Strategy:
    """An estimator, a portfolio, and how they meet.

    Parameters
    ----------
    estimator : object
        See above; None or "equal" for equal weights.
    portfolio : Problem, optional
        None: that of the back-test.
    window : int, optional
        Latest rows of the history that the estimator sees; None: all. What is eligible is judged by all.
    n_scenarios : int
        Drawn for `MinimumCVaR`.
    history : float
        Share of rows of history among the scenarios, in [0, 1): each repeated as often as comes nearest.
    random_state : int
        Of fits and scenarios, the same at every date.

    Raises
    ------
    ValueError
        Numbers out of range, or an estimator that cannot do what the portfolio needs.
    """

    estimator: object = None
    portfolio: Problem | None = None
    window: int | None = None
    n_scenarios: int = 8000
    history: float = 0.0
    random_state: int = 0

    def __post_init__(self):
        if not 0 <= self.history < 1:
            raise ValueError(
                f"expected a share of history in [0, 1), got {self.history!r}, because the rest is scenarios; do pass "
                'for example 0.5, or "history" for the estimator.'
            )
        if self.window is not None and not self.window >= 3:
            raise ValueError(
                f"expected a strategy's window of at least 3 rows, got {self.window!r}, because fewer have no "
                "covariance; do pass for example 252, or None for the whole history."
            )

    @property
    def equal(self):
        """Whether weights are equal."""
        return self.estimator is None or (isinstance(self.estimator, str) and self.estimator == "equal")

    @property
    def sequential(self):
        """Whether weights depend on those held: windows are then solved one after the other."""
        if self.equal:
            return False
        return any(isinstance(c, Trading) and c.previous is None for c in self.portfolio.constraints)

    def inputs(self, history):
        """What the portfolio is solved with, from rows of history.

        Parameters
        ----------
        history : (n, d) DataFrame
            Simple returns of the eligible assets.

        Returns
        -------
        dict
            Arguments of ``portfolio.solve``; empty for equal weights.
        """
        if self.equal:
            return {}
        rows = history if self.window is None else history.iloc[-self.window :]
        if isinstance(self.portfolio, MinimumCVaR):
            return {"scenarios": self._scenarios(rows)}
        if isinstance(self.estimator, str):
            return {"covariance": rows.cov(), "mean": rows.mean()}
        fitted = _seeded(self.estimator, self.random_state)
        if hasattr(fitted, "sample"):
            fitted = ScenarioCovariance(fitted, random_state=self.random_state)
        fitted = fitted.fit(rows)
        unknown = getattr(fitted, "assume_centered", False)
        return _moments(rows, None if unknown else getattr(fitted, "location_", None), fitted.covariance_)

    def many_inputs(self, histories):
        """`inputs` of several histories, covariances in one go where they are closed forms.

        Parameters
        ----------
        histories : list of (n, d) DataFrame
            As in `inputs`.

        Returns
        -------
        list of dict, or None
            None where each is fitted alone: another estimator, many assets, or histories of different rows or assets.
        """
        estimator = self.estimator
        if not isinstance(estimator, CovarianceEstimator) or isinstance(self.portfolio, MinimumCVaR):
            return None
        if type(estimator).fit is not CovarianceEstimator.fit or histories[0].shape[1] > _MANY:
            return None
        rows = [h if self.window is None else h.iloc[-self.window :] for h in histories]
        first = rows[0]
        if any(len(r) != len(first) or not r.columns.equals(first.columns) for r in rows):
            return None
        found, at_once = [], max(1, _LARGEST // first.size)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            locations, covariances = estimator.fit_many(np.stack([r.to_numpy() for r in some]))
            for row, location, covariance in zip(some, locations, covariances, strict=True):
                found.append(_moments(row, None if estimator.assume_centered else location, covariance))
        return found

    def _scenarios(self, rows):
        if isinstance(self.estimator, str):
            return rows
        fitted = _seeded(self.estimator, self.random_state).fit(rows)
        drawn = np.asarray(fitted.sample(self.n_scenarios, random_state=self.random_state), float)
        if self.history:
            copies = round(self.n_scenarios * self.history / (1 - self.history) / len(rows))
            drawn = np.concatenate([drawn, np.tile(rows.to_numpy(), (max(copies, 1), 1))])
        return pd.DataFrame(drawn, columns=rows.columns)

    def weights(self, inputs, names, previous=None):
        """Weights (d,) of the eligible assets.

        Parameters
        ----------
        inputs : dict
            From `inputs`.
        names : Index (d,)
            The eligible assets.
        previous : Series, optional
            Weights held, by name.

        Returns
        -------
        (d,) array
        """
        if self.equal:
            return np.full(len(names), 1 / len(names))
        solved = self.portfolio.solve(**inputs, previous=previous).weights
        weights = np.asarray(solved[names] if isinstance(solved, pd.Series) else solved, float)
        if weights.shape != (len(names),) or not np.isfinite(weights).all():
            raise ValueError(
                f"expected {len(names)} finite weights, got {weights}, because the portfolio was not solved; do check "
                "what the estimator gave it."
            )
        return weights


def _moments(rows, location, covariance):
    """Covariance and mean by name; without a location, the mean of the rows."""
    mean = np.nanmean(rows.to_numpy(), axis=0) if location is None else np.asarray(location, float)
    names = rows.columns
    return {
        "covariance": pd.DataFrame(np.asarray(covariance, float), names, names),
        "mean": pd.Series(mean, names),
    }


def as_strategy(name, given, portfolio):
    """A Strategy with its portfolio, from what `walk_forward` is given under a name.

    Raises
    ------
    ValueError
        Something that is no estimator, or an estimator that cannot do what the portfolio needs.
    """
    if isinstance(given, tuple) and len(given) == 2:
        given = Strategy(given[0], given[1])
    strategy = given if isinstance(given, Strategy) else Strategy(given)
    if strategy.portfolio is None:
        strategy = replace(strategy, portfolio=portfolio)
    estimator, chosen = strategy.estimator, strategy.portfolio
    if not isinstance(chosen, Problem):
        raise ValueError(
            f"expected a portfolio such as MinimumVariance(), got {chosen!r} for {name!r}, because it is solved at "
            "every date; do pass one of finediff.portfolio."
        )
    if strategy.equal:
        return strategy
    if isinstance(estimator, str):
        if estimator != "history":
            raise ValueError(
                f"expected an estimator, 'equal' or 'history', got {estimator!r} for {name!r}, because no other "
                "word is known; do pass the estimator itself, such as LedoitWolf()."
            )
        return strategy
    if isinstance(estimator, type) or not hasattr(estimator, "fit"):
        raise ValueError(
            f"expected an estimator with fit(X), got {estimator!r} for {name!r}, because it is fitted at every date; "
            "do pass an instance such as LedoitWolf(), or (estimator, portfolio)."
        )
    if isinstance(chosen, MinimumCVaR) and not hasattr(estimator, "sample"):
        raise ValueError(
            f"expected an estimator with sample(n) for {name!r}, got {type(estimator).__name__}, because MinimumCVaR is "
            'solved on scenarios; do pass a generator, or "history".'
        )
    return strategy


def _seeded(estimator, seed):
    """A clone whose random states that are None are the seed, those of its parts included."""
    fresh = clone(estimator)
    loose = [
        name
        for name, value in fresh.get_params(deep=True).items()
        if value is None and name.rpartition("__")[2] == "random_state"
    ]
    return fresh.set_params(**dict.fromkeys(loose, seed)) if loose else fresh

"""The walk-forward of the main job: which covariance would have served, month after month, out of sample.

    monthly     every 21 rows over the whole panel: equal weights and the classical covariances
    quarterly   every 63 rows, the last 40 of them: the chosen generator fitted anew, beside the strongest of those

A generator is dearer by two orders of magnitude, and only strategies on the same schedule can be paired: hence two.
Whether the generator takes part depends on what it is and on the size of the panel, never on a clock, so that the
same panel gives the same report on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from sklearn.covariance import LedoitWolf

from finediff.backtest import Strategy, WalkForward, walk_forward
from finediff.covariance import QuadraticInverseShrinkage, ScenarioCovariance, WindowEnsembleCovariance

EQUAL, SAMPLE, LEDOIT_WOLF = "equal weights", "sample", "Ledoit-Wolf"
NONLINEAR, ENSEMBLE = "nonlinear shrinkage", "window ensemble"

HISTORY, RECENT = 500, 252  # rows that an estimator sees; of those without a rule of their own
MONTH, QUARTER = 21, 63
N_QUARTERS = 40
N_SCENARIOS = 4000  # a quarter: eight times the rows that the generator learns from
_MOST_ASSETS, _MOST_GENERATED = 100, 30


@dataclass(frozen=True, eq=False)
class Walks:
    """Walk-forwards, or why there are none.

    Attributes
    ----------
    monthly, quarterly : WalkForward or None
    absent : str
        A sentence, where ``monthly`` is None.
    generator_absent : str
        A sentence, where only ``quarterly`` is None.
    """

    monthly: WalkForward | None = None
    quarterly: WalkForward | None = None
    absent: str = "No walk-forward was asked for."
    generator_absent: str = ""


def walks(
    returns: pd.DataFrame,
    name: str,
    generator,
    *,
    iterative: bool,
    quarters: int | None = None,
    random_state: int = 0,
    n_jobs: int = 1,
) -> Walks:
    """Minimum variance, long and short, re-estimated on at most 500 rows.

    Parameters
    ----------
    returns : DataFrame (n, d)
        Simple returns, complete, in order of time.
    name : str
        Of the generator.
    generator : unfitted generator
        Cloned at every decision.
    iterative : bool
        Whether it trains by iteration, and would take minutes a decision.
    quarters : int, optional
        Decisions for the generator, the latest; 0: none. None: 40, or none where it is iterative or the panel has more
        than 30 assets.
    random_state : int
        Of scenarios, the same at every decision.
    n_jobs : int
        Processes; the numbers do not depend on it.

    Returns
    -------
    Walks
    """
    n, d = returns.shape
    if n < 2 * HISTORY:
        return Walks(
            absent=f"The panel has {n:,} rows; a walk-forward needs {2 * HISTORY:,}, half of them history."
        )
    if not 1 < d <= _MOST_ASSETS:
        return Walks(absent=f"A walk-forward is made for 2 to {_MOST_ASSETS} assets; this panel has {d:,}.")
    if not (returns.index.is_monotonic_increasing and returns.index.is_unique):
        return Walks(absent="The rows are not in order of time, each once, so there is no walk-forward.")
    bars = {
        NONLINEAR: Strategy(QuadraticInverseShrinkage(), window=RECENT),
        ENSEMBLE: WindowEnsembleCovariance(),
    }
    classical = {EQUAL: "equal", SAMPLE: Strategy("history", window=RECENT), LEDOIT_WOLF: LedoitWolf()}
    try:
        monthly = walk_forward(returns, classical | bars, HISTORY, MONTH, n_jobs=n_jobs, progress=False)
    except (ValueError, RuntimeError) as error:  # one bad window is no reason to lose the rest of the report
        return Walks(absent=f"The walk-forward stopped: {error}")
    if quarters is None:
        quarters = 0 if iterative or d > _MOST_GENERATED else N_QUARTERS
    if quarters < 1:
        why = f"{name} is not among them: fitted anew at every decision it would take too long."
        return Walks(monthly, generator_absent=why)
    estimator = ScenarioCovariance(generator, n_scenarios=N_SCENARIOS, random_state=random_state)
    rows = returns.iloc[-(HISTORY + quarters * QUARTER) :]
    try:
        quarterly = walk_forward(
            rows, {_apart(name, bars): estimator, **bars}, HISTORY, QUARTER, n_jobs=n_jobs, progress=False
        )
    except (ValueError, RuntimeError) as error:
        return Walks(monthly, generator_absent=f"{name} is not among them; it stopped: {error}")
    return Walks(monthly, quarterly)


def _apart(name, others) -> str:
    """A generator may be called what a strategy is called."""
    return f"{name} (generator)" if name in others else str(name)


def generator_of(walk: WalkForward) -> str:
    """Name of the generator's strategy in a quarterly walk-forward."""
    return walk.strategies[0]


def against(walk: WalkForward, reference: str) -> pd.DataFrame:
    """Volatility of every other strategy against one: "difference" in %, "t" (paired, HAC); t < 0: lower."""
    return walk.compare(reference)["volatility"][["difference", "t"]]

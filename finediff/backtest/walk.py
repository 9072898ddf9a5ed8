"""walk_forward: fit on the rows before a decision, hold to the next, repeat."""

import sys
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from finediff.backtest.fan import Task, batch_size, failure, fan_out, tell
from finediff.backtest.holding import charge, hold, trade
from finediff.backtest.inputs import check_panel, check_strategies, per_asset
from finediff.backtest.result import WalkForward
from finediff.backtest.store import Store
from finediff.backtest.windows import eligible, schedule, shown
from finediff.portfolio import MinimumVariance, Turnover


def walk_forward(
    returns,
    strategies,
    window=500,
    step=21,
    portfolio=None,
    n_jobs=1,
    *,
    minimum=None,
    coverage=1.0,
    still=1.0,
    costs=0.0,
    delisting_return=0.0,
    initial=None,
    backend="loky",
    batch=None,
    store=None,
    progress=None,
):
    """Back-test strategies on a panel, without looking ahead.

    Parameters
    ----------
    returns : DataFrame or array (n, d)
        Simple returns per period, rows in order of time; NaN before an asset is listed and after it has left. A hole
        in between keeps the asset out of every portfolio whose history holds it, and is warned of.
    strategies : dict
        Name (text) -> what is fitted at each date: an estimator with ``covariance_``, a scenario generator, "equal" or None
        for equal weights, "history" for the rows themselves, a pair (estimator, portfolio), or a `Strategy`.
    window, step, minimum : object
        When decisions are made and from which rows: see `schedule`.
    portfolio : Problem, optional
        Of strategies without their own; `MinimumVariance()` by default.
    n_jobs : int
        Workers; -1: all. The numbers do not depend on it, nor on backend and batch.
    coverage : float
        Least share of the history that an asset must have returns in, in (0, 1]; below 1, estimators must take NaN.
    still : float
        An asset is eligible if less than this share of its returns in the history is 0, in (0, 1]; 1: if it moved at all.
    costs : float, (d,) array or Series
        Per unit traded, as a fraction of it: 0.001 is ten basis points.
    delisting_return : float
        Of an asset on the first row after its last return; see `finediff.backtest.holding`.
    initial : None, "equal", (d,) array or Series
        Held before the first decision; None: cash. From cash, a limit of `Turnover` below 1 cannot be met.
    backend : str
        Of joblib: "loky" (processes), "ray" (a cluster; extra ``distributed``), "threading".
    batch : int, optional
        Windows of a task.
    store : path, optional
        A directory in which finished windows are kept: a run that was stopped goes on from them.
    progress : bool, optional
        A bar on standard error; None: where that is a terminal.

    Returns
    -------
    WalkForward

    Raises
    ------
    ValueError
        Bad input; an estimator that fails, with its name and the date: no window is skipped; lost wealth; a store of
        another job.
    RuntimeError
        An error of an estimator or solver that is no ValueError, likewise.

    Notes
    -----
    Weights that depend on those held (`Turnover`, `TransactionCost` without their own ``previous``) are solved one
    window after the other, while the fits still fan out. They are told the drifted weights with the cash of what has
    left spread over the rest, so that a limit of turnover can be met; the purchases are counted and cost nevertheless.

    Examples
    --------
    >>> from sklearn.covariance import LedoitWolf
    >>> rows = np.random.default_rng(0).standard_normal((300, 4)) / 100
    >>> result = walk_forward(rows, {"1/N": "equal", "shrunk": LedoitWolf()}, window=100, step=50)
    >>> result.returns.shape, result.strategies
    ((200, 2), ['1/N', 'shrunk'])
    """
    returns = check_panel(returns)
    chosen = check_strategies(strategies, MinimumVariance() if portfolio is None else portfolio)
    rates = per_asset(costs, returns.columns, "costs")
    if not ((rates >= 0) & (rates < 1)).all() or not -1 <= delisting_return <= 1:
        raise ValueError(
            f"expected costs in [0, 1) and a delisting return of at least -1, got {costs!r} and {delisting_return!r}, "
            "because both are fractions; do pass for example costs=0.001."
        )
    if not 0 < coverage <= 1 or not 0 < still <= 1:
        raise ValueError(
            f"expected coverage in (0, 1] and still in (0, 1], got {coverage!r} and {still!r}, because both are shares of "
            "the history; do pass for example coverage=1.0, still=0.5."
        )
    windows = schedule(returns.index, window, step, minimum)
    walk = _Walk(returns, chosen, windows, (coverage, still), rates, delisting_return, initial)
    if coverage == 1:
        _tell_of_holes(returns)
    kept = None
    if store is not None:
        settings = {
            "windows": [(w.start, w.stop, w.end) for w in windows],
            "coverage": float(coverage),
            "still": float(still),
            "costs": rates,
            "delisting_return": float(delisting_return),
            "initial": walk.initial,
        }
        kept = Store(store, returns, chosen, settings)
        walk.restore(kept.load())
    tasks = walk.tasks(batch_size(len(windows), n_jobs, batch))
    done, total, heard = walk.n_done, len(windows) * len(chosen), []
    with _bar(progress)(range(done, total)) as steps:
        ticks = iter(steps)
        next(ticks, None)  # a step counts as done when the next is asked for
        try:
            for task, (results, seconds, said) in zip(tasks, fan_out(tasks, n_jobs, backend), strict=True):
                heard += [(task.name, *one) for one in said]
                weights = walk.take(task, results, seconds)
                if kept is not None:
                    kept.save(
                        task.number, task.windows, weights, walk.seconds[task.number, list(task.windows)]
                    )
                for _ in task.windows:
                    next(ticks, None)
        except Exception:
            tell(heard)  # what was said before may be why
            raise
    result = walk.result()
    if kept is not None:
        kept.finish(result.returns, result.weights)
    tell(heard)
    return result


def _tell_of_holes(returns):
    """A missing return between others keeps an asset out for a whole history: seldom what is wanted."""
    there = returns.notna().to_numpy()
    first, last = there.argmax(axis=0), len(there) - 1 - there[::-1].argmax(axis=0)
    inside = (last - first + 1 - there.sum(axis=0)) * there.any(axis=0)
    holes = np.flatnonzero(inside > 0)
    if len(holes):
        names = ", ".join(str(returns.columns[j]) for j in holes[:5])
        warnings.warn(
            f"{len(holes)} of {len(inside)} assets ({names}{', ...' if len(holes) > 5 else ''}) lack returns between their first and "
            f"their last, {int(inside[holes].sum())} in all: an asset is not held while one is in its history; fill them, or pass "
            "coverage below 1 to estimators that take NaN.",
            UserWarning,
            stacklevel=3,
        )


class _Walk:
    """The state of a back-test: weights by strategy and window, filled in any order that respects `previous`."""

    def __init__(self, returns, strategies, windows, rule, rates, delisting_return, initial):
        self.frame, self.values = returns, returns.to_numpy()
        self.names, self.strategies = list(strategies), list(strategies.values())
        self.windows, self.rates, self.delisting_return = windows, rates, delisting_return
        self.eligible = np.stack([eligible(self.values[w.start : w.stop], *rule) for w in windows])
        shape = (len(self.names), len(windows))
        self.weights = np.full((*shape, returns.shape[1]), np.nan)
        self.seconds = np.zeros(shape)
        empty = np.flatnonzero(~self.eligible.any(axis=1))
        if len(empty):
            raise ValueError(
                f"expected an eligible asset at every decision, got none on {shown(self.date(empty[0]))}, because no asset has "
                f"returns in {rule[0]:.0%} of the history up to then, and moves; do pass a smaller coverage= or a shorter window."
            )
        if isinstance(initial, str):
            if initial != "equal":
                raise ValueError(
                    f"expected initial weights, 'equal' or None, got {initial!r}, because no other word is known; do pass "
                    "a Series by asset."
                )
            self.initial = self.eligible[0] / self.eligible[0].sum()
        else:
            self.initial = per_asset(0.0 if initial is None else initial, returns.columns, "initial weights")

    def date(self, window):
        """Of a decision."""
        return self.frame.index[self.windows[window].stop - 1]

    @property
    def n_done(self):
        """Weights known."""
        return int((~np.isnan(self.weights[:, :, 0])).sum())

    def restore(self, done):
        """Take finished windows from a store."""
        for (number, window), (weights, seconds) in done.items():
            self.weights[number, window], self.seconds[number, window] = weights, seconds

    def tasks(self, size):
        """What is left to do, by window first, so that early windows finish early."""
        tasks = []
        for first in range(0, len(self.windows), size):
            for number, (name, strategy) in enumerate(zip(self.names, self.strategies, strict=True)):
                block = range(first, min(first + size, len(self.windows)))
                todo = tuple(w for w in block if np.isnan(self.weights[number, w, 0]))
                if not todo:
                    continue
                low = min(self.windows[w].start for w in todo)
                high = self.windows[todo[-1]].stop
                spans = tuple((self.windows[w].start - low, self.windows[w].stop - low) for w in todo)
                rows = self.frame.iloc[low:high]
                tasks.append(Task(name, number, strategy, rows, todo, spans, self.eligible[list(todo)]))
        return tasks

    def take(self, task, results, seconds):
        """Weights (k, d) of a task, solved here where they depend on those held."""
        for window, found, spent in zip(task.windows, results, seconds, strict=True):
            mask = self.eligible[window]
            if task.strategy.sequential:
                names = self.frame.columns[mask]
                held = pd.Series(self.held(task.number, window, mask), self.frame.columns)
                held = held[(held != 0) | mask]
                began = time.process_time()
                try:
                    with threadpool_limits(1):
                        found = task.strategy.weights(found, names, held)
                except Exception as error:
                    limited = any(isinstance(c, Turnover) for c in task.strategy.portfolio.constraints)
                    if limited and window == 0 and not self.initial.any():
                        error = ValueError(
                            f'{error} All is cash before the first decision: initial="equal" starts invested.'
                        )
                    raise failure(task.name, self.date(window), error) from error
                spent += time.process_time() - began
            row = np.zeros(len(mask))
            row[mask] = found
            self.weights[task.number, window], self.seconds[task.number, window] = row, spent
        return self.weights[task.number, list(task.windows)]

    def period(self, number, window):
        """Returns before costs and drifted weights of one period."""
        span = self.windows[window]
        try:
            return hold(
                self.weights[number, window], self.values[span.stop : span.end], self.delisting_return
            )
        except ValueError as error:
            raise failure(self.names[number], self.date(window), error) from error

    def held(self, number, window, mask):
        """Weights (d,) before the decision of a window, cash from what has left spread over the rest."""
        if window == 0:
            return self.initial
        _, drifted = self.period(number, window - 1)
        size = np.abs(drifted) if np.any(drifted) else mask
        return drifted + (1 - drifted.sum()) * size / size.sum()

    def result(self):
        """Everything, accounted for."""
        dates = pd.Index([self.date(w) for w in range(len(self.windows))], name="date")
        shape = (len(self.windows), len(self.names))
        turnover, paid = np.zeros(shape), np.zeros(shape)
        first = self.windows[0].stop
        daily = np.zeros((len(self.values) - first, len(self.names)))
        for number in range(len(self.names)):
            before = self.initial
            for window, span in enumerate(self.windows):
                turnover[window, number], paid[window, number] = trade(
                    before, self.weights[number, window], self.rates
                )
                earned, before = self.period(number, window)
                daily[span.stop - first : span.end - first, number] = charge(earned, paid[window, number])
        keys = pd.MultiIndex.from_product([self.names, dates], names=["strategy", "date"])
        index = self.frame.index
        about = {
            "first held": [index[w.stop] for w in self.windows],
            "last held": [index[w.end - 1] for w in self.windows],
            "days held": [w.end - w.stop for w in self.windows],
            "rows of history": [w.stop - w.start for w in self.windows],
            "eligible assets": self.eligible.sum(axis=1),
        }
        return WalkForward(
            returns=pd.DataFrame(daily, index[first:], self.names),
            weights=pd.DataFrame(self.weights.reshape(len(keys), -1), keys, self.frame.columns),
            turnover=pd.DataFrame(turnover, dates, self.names),
            costs=pd.DataFrame(paid, dates, self.names),
            windows=pd.DataFrame(about, dates),
            seconds=pd.Series(self.seconds.sum(axis=1), self.names),
        )


def _bar(wanted):
    """A bar over a range, or nothing: only a bar that is drawn loads what draws it."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        return nullcontext
    from finediff.generators.training import progress_bar

    return progress_bar("back-test", True)

"""Fan out fits and solves over windows and strategies: processes here, Ray on a cluster, the same numbers.

A task is one strategy on some consecutive windows. It is sent the rows up to its last decision and no later ones,
so that nothing a worker does can look ahead. Threads are held to one inside: these matrices are small, and the
order of a sum is then the same everywhere.
"""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
from joblib import Parallel, delayed, effective_n_jobs, parallel_config
from threadpoolctl import threadpool_limits

from finediff.backtest.strategies import Strategy
from finediff.backtest.windows import shown

_LARGEST = 16  # windows of a task: what is lost when a run is killed, against the cost of sending one
_WAVE = 8  # tasks of a worker, where results come only when all are done


@dataclass(frozen=True, eq=False)
class Task:
    """One strategy on consecutive windows.

    Attributes
    ----------
    name : str
    number : int
        Of the strategy.
    strategy : Strategy
    rows : DataFrame (n, d)
        From the first row of the first history to the last decision.
    windows : tuple of int
    spans : tuple of (int, int)
        Rows of each history, counted in ``rows``.
    eligible : (k, d) array of bool
    """

    name: str
    number: int
    strategy: Strategy
    rows: pd.DataFrame
    windows: tuple
    spans: tuple
    eligible: np.ndarray


def batch_size(n_windows, n_jobs, batch=None):
    """Windows of a task: some tasks a worker, none too long.

    Parameters
    ----------
    n_windows : int
        In all.
    n_jobs : int
        Workers; -1: all processors.
    batch : int, optional
        What was asked for.

    Returns
    -------
    int
    """
    if batch is not None:
        return batch
    workers = n_jobs if n_jobs > 0 else (os.cpu_count() or 1)
    return max(1, min(_LARGEST, -(-n_windows // (4 * workers))))


def failure(name, date, error):
    """The error of one strategy at one date, of the same kind, saying whose it is.

    Parameters
    ----------
    name : str
        Of the strategy.
    date : object
        Of the decision.
    error : Exception
        What happened.

    Returns
    -------
    ValueError or RuntimeError
    """
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(
        f"expected weights of {name!r} on {shown(date)}, got {type(error).__name__}, because {error} (No window is skipped: "
        "its absence would flatter the strategy; do mend or leave out the strategy.)"
    )


def run(task, listen=True):
    """Fit and, where weights do not depend on those held, solve.

    Parameters
    ----------
    task : Task
        What to compute.
    listen : bool
        Keep warnings back and return them; not in threads, which share one place where warnings go.

    Returns
    -------
    results : list
        (k,) weights of the eligible assets, or the arguments that `Strategy.weights` is to be called with.
    seconds : list of float
        CPU time of each.
    heard : list of (type, str)
        Warnings: a refit at every date repeats itself hundreds of times, so they are told together.
    """
    results, seconds = [], []
    with threadpool_limits(1), _listening(listen) as heard:
        histories = [
            task.rows.iloc[start:stop] if mask.all() else task.rows.iloc[start:stop].loc[:, mask]
            for (start, stop), mask in zip(task.spans, task.eligible, strict=True)
        ]
        began = time.process_time()
        try:
            together = task.strategy.many_inputs(histories)
        except ValueError:
            together = None  # one of them is refused: one by one shows which
        share = (time.process_time() - began) / len(histories)
        for number, history in enumerate(histories):
            began = time.process_time() - share
            try:
                found = task.strategy.inputs(history) if together is None else together[number]
                if not task.strategy.sequential:
                    found = task.strategy.weights(found, history.columns)
            except Exception as error:
                raise failure(task.name, history.index[-1], error) from error
            results.append(found)
            seconds.append(time.process_time() - began)
    return results, seconds, [(one.category, str(one.message)) for one in heard if _meant(one.category)]


@contextmanager
def _listening(listen):
    """A list of the warnings to come; empty without listening."""
    if not listen:
        yield []
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield heard


def _meant(category):
    """Whether a warning is for whoever runs the back-test."""
    return not issubclass(category, DeprecationWarning | PendingDeprecationWarning | ResourceWarning)


def tell(heard):
    """One warning for each strategy and kind.

    Parameters
    ----------
    heard : list of (str, type, str)
        Strategy, category and text of each.
    """
    texts = {}
    for name, category, text in heard:
        texts.setdefault((name, category), []).append(text)
    for (name, category), said in texts.items():
        others = f" (The first of {len(said)} such warnings.)" if len(said) > 1 else ""
        warnings.warn(f"{name}: {said[0]}{others}", category, stacklevel=3)


def fan_out(tasks, n_jobs=1, backend="loky") -> Iterator:
    """Results of `run` in the order of the tasks, as they come.

    Parameters
    ----------
    tasks : list of Task
        In the order in which results are wanted.
    n_jobs : int
        Workers; -1: all processors.
    backend : str
        Of joblib; "ray" registers joblib's Ray backend first, which uses the cluster that ``ray.init`` connected
        to, or starts one on this machine.

    Yields
    ------
    results, seconds, heard
        As `run` returns them.

    Raises
    ------
    ImportError
        Ray is asked for and not installed.
    """
    if n_jobs == 1 and backend != "ray":
        yield from map(run, tasks)
        return
    if backend == "ray":
        _register_ray()
    settings = {"inner_max_num_threads": 1} if backend == "loky" else {}
    with parallel_config(backend=backend, n_jobs=n_jobs, **settings):
        if backend != "ray":
            pool = Parallel(return_as="generator", batch_size=1)
            yield from _as_they_come(pool, tasks, listen=backend != "threading")
            return
        # Ray's backend returns lists only: wave after wave, so that finished windows are not kept waiting for the last.
        wave = _WAVE * effective_n_jobs()
        with Parallel(batch_size=1) as pool:
            for first in range(0, len(tasks), wave):
                yield from pool(delayed(run)(task) for task in tasks[first : first + wave])


def _as_they_come(pool, tasks, listen):
    found = pool(delayed(run)(task, listen) for task in tasks)
    try:
        for one in found:  # noqa: UP028 (yield from would close it outside of what catches the warning)
            yield one
    finally:
        # Whoever stops early has a reason of its own to tell; joblib would add that tasks are lost.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found.close()


def _register_ray():
    try:
        from ray.util.joblib import register_ray
    except ImportError:
        raise ImportError(
            'expected Ray for backend="ray", got none, because it is not installed; do pip install '
            "'finediff[distributed]', or leave backend at processes."
        ) from None
    register_ray()

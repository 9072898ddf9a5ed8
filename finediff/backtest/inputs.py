"""What a back-test is given, checked once: each refusal says what was expected, what came, and the remedy."""

import numpy as np
import pandas as pd

from finediff.backtest.strategies import as_strategy
from finediff.backtest.windows import shown


def check_panel(returns):
    """Returns as a DataFrame of floats, or one sentence that says what is wrong with them.

    Parameters
    ----------
    returns : DataFrame or array (n, d)
        Simple returns per period.

    Returns
    -------
    DataFrame (n, d)

    Raises
    ------
    ValueError
        No numbers, infinities, losses of more than all, a name twice, fewer than 3 rows.
    """
    frame = pd.DataFrame(returns)
    if frame.shape[0] < 3 or not frame.shape[1] or not frame.columns.is_unique:
        raise ValueError(
            f"expected a panel (n, d) of at least 3 rows with each asset once, got shape {frame.shape}"
            f"{'' if frame.columns.is_unique else ' with a name twice'}, because weights go by asset; do pass returns."
        )
    try:
        frame = frame.astype(float)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected numbers, got something else, because {error}; do convert or drop that column."
        ) from None
    values = frame.to_numpy()
    wrong = np.argwhere(np.isinf(values) | (values < -1))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"expected simple returns of at least -1, got {values[row, column]:g} of {frame.columns[column]!r} on "
            f"{shown(frame.index[row])}, because no asset loses more than all; do pass fractions rather than percent or prices."
        )
    typical = np.nanmedian(np.abs(values)) if np.isfinite(values).any() else 0.0
    if typical > 0.5:
        raise ValueError(
            f"expected simple returns, got numbers of a typical size of {typical:.3g}, because half of all days would move "
            "by more than 50 per cent; do pass prices.pct_change().dropna() of prices."
        )
    return frame


def check_strategies(given, portfolio):
    """Strategies with their portfolios, by name.

    Parameters
    ----------
    given : dict
        What `walk_forward` was given.
    portfolio : Problem
        Of those without their own.

    Returns
    -------
    dict of Strategy

    Raises
    ------
    ValueError
        No mapping, names that are no text, or what `as_strategy` refuses.
    """
    if not hasattr(given, "items") or not len(given):
        raise ValueError(
            f"expected a mapping of names to strategies, got {given!r}, because results are named; do pass for example "
            '{"shrunk": LedoitWolf(), "1/N": "equal"}.'
        )
    odd = [name for name in given if not isinstance(name, str)]
    if odd:
        raise ValueError(
            f"expected strategies named by text, got {odd[0]!r}, because names head columns and files; do pass for example "
            f"{str(odd[0])!r}."
        )
    return {name: as_strategy(name, strategy, portfolio) for name, strategy in given.items()}


def per_asset(given, names, what):
    """A number, array or Series as an array (d,) in the order of the assets.

    Parameters
    ----------
    given : float, (d,) array or Series
        A Series is matched by name, and must know every asset.
    names : Index (d,)
        The assets.
    what : str
        What it is, for the sentence.

    Returns
    -------
    (d,) array

    Raises
    ------
    ValueError
        Another shape, a name without a number, NaN or infinity.
    """
    if isinstance(given, pd.Series):
        missing = names.difference(given.index)
        if len(missing):
            raise ValueError(
                f"expected {what} for every asset, got none for {list(missing)[:5]}, because they are matched by name; do "
                "reindex the Series."
            )
        given = given[names]
    values = np.asarray(given, float)
    if values.shape not in ((), (len(names),)) or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite {what}, one number or {len(names)}, got shape {values.shape}, because each belongs to an "
            "asset; do pass a Series by name."
        )
    return np.broadcast_to(values, len(names)).copy()

"""What weights earn between two decisions: buy and hold, with delistings and proportional costs.

With weights w (d,) at a decision, cash c = 1 - sum w at no interest, and returns r_t (d,) of the rows held:

    wealth      V_t = c + sum_i w_i prod_{s<=t} (1 + r_si),   V_0 = 1
    return      V_t / V_{t-1} - 1
    drifted     w_i prod_{s<=k} (1 + r_si) / V_k              what is held at the next decision
    turnover    sum_i |w_i - drifted_i|,   costs  sum_i c_i |w_i - drifted_i|, a share of the wealth at the decision

A missing return counts as 0. An asset without a return on the last row held has left: it earns
``delisting_return`` on the first of its missing rows, and its proceeds are cash without interest until the next
decision, which distributes them; that costs what is bought, not a sale.
"""

import numpy as np


def hold(weights, rows, delisting_return=0.0):
    """Buy, hold and drift.

    Parameters
    ----------
    weights : (d,) array
        At the decision; what they lack to 1 is cash.
    rows : (k, d) array
        Simple returns of the rows held, k >= 1; NaN where there is none.
    delisting_return : float
        Earned by an asset on the first row after its last return, at least -1.

    Returns
    -------
    returns : (k,) array
        Of the portfolio, before costs.
    drifted : (d,) array
        Weights held at the end; 0 for what has left, whose proceeds are cash.

    Raises
    ------
    ValueError
        If the wealth is lost.

    Examples
    --------
    >>> import numpy as np
    >>> returns, drifted = hold(np.array([0.5, 0.5]), np.array([[0.1, 0.0], [0.0, np.nan]]))
    >>> returns.round(4), drifted.round(4)
    (array([0.05, 0.  ]), array([0.5238, 0.    ]))
    """
    weights, rows = np.asarray(weights, float), np.asarray(rows, float)
    missing = np.isnan(rows)
    gone = missing[-1]
    earned = np.where(missing, 0.0, rows)
    if delisting_return and gone.any():
        # From the end, the first row with a return is one before the first missing row of the run.
        run = np.where(missing.all(axis=0), len(rows), np.argmin(missing[::-1], axis=0))
        for asset in np.flatnonzero(gone):
            earned[len(rows) - run[asset], asset] = delisting_return
    wealth = weights * np.cumprod(1 + earned, axis=0)
    total = np.concatenate([[1.0], wealth.sum(axis=1) + (1 - weights.sum())])
    if not (total > 0).all():
        raise ValueError(
            f"expected wealth above 0, got {total.min():.3g} of each unit on row {int(np.argmax(total <= 0))} of the "
            "period, because the short positions lost more than all; do bound them by GrossExposure() or LongOnly()."
        )
    drifted = np.where(gone, 0.0, wealth[-1] / total[-1])
    return total[1:] / total[:-1] - 1, drifted


def trade(before, after, rates=0.0):
    """Turnover sum |after - before| and its costs sum c_i |after_i - before_i|.

    Parameters
    ----------
    before, after : (d,) arrays
        Weights.
    rates : float or (d,) array
        Costs per unit traded, as a fraction.

    Returns
    -------
    turnover, costs : float
    """
    trades = np.abs(after - before)
    return float(trades.sum()), float((trades * rates).sum())


def charge(returns, costs):
    """Returns (k,) net of costs, a share of the wealth, paid before the first of them."""
    net = returns.copy()
    net[0] = (1 - costs) * (1 + net[0]) - 1
    return net

"""Constraints in numbers: A x <= b, cost c'x, in x = (w, z).

What solvers use that need no compiled program: `finediff.portfolio.quadratic`, `finediff.portfolio.smoothed`.
"""

import numpy as np
from scipy.optimize import linprog

from finediff.portfolio.trading import Trading


def polyhedron(constraints, n_assets, names, previous):
    """All constraints as A x <= b, cost c'x, in x = (w, z).

    Parameters
    ----------
    constraints : sequence of Constraint
        Their z are stacked.
    n_assets : int
        d.
    names : Index or None
        Of the assets.
    previous : (d,) array or Series, or None
        Weights held.

    Returns
    -------
    A (m, d + k), b (m,), c (d + k,); or None where a constraint has no such form

    Raises
    ------
    ValueError
        The constraints need held weights or names that are not there.
    """
    found = []
    for constraint in constraints:
        if isinstance(constraint, Trading):
            rows = constraint.rows(n_assets, names, constraint.held(previous, names, n_assets))
        else:
            rows = constraint.rows(n_assets, names)
        if rows is None:
            return None
        found.append(rows)
    extra = sum(0 if rows.on_extra is None else rows.on_extra.shape[1] for rows in found)
    matrix = np.zeros((sum(len(rows.right) for rows in found), n_assets + extra))
    right, cost = np.zeros(len(matrix)), np.zeros(n_assets + extra)
    row, column = 0, n_assets
    for rows in found:
        at = slice(row, row + len(rows.right))
        matrix[at, :n_assets], right[at] = rows.on_weights, rows.right
        if rows.on_extra is not None:
            own = slice(column, column + rows.on_extra.shape[1])
            matrix[at, own], cost[own] = rows.on_extra, rows.cost
            column = own.stop
        row = at.stop
    return matrix, right, cost


def interior_point(matrix, right, n_assets):
    """x with A x < b and 1'w = 1, or None where there is none."""
    p = matrix.shape[1]
    x = np.concatenate([np.full(n_assets, 1 / n_assets), np.zeros(p - n_assets)])
    if (right - matrix @ x > 1e-3 / n_assets).all():
        return x
    # max s with A x + s <= b: the widest margin.
    found = linprog(
        np.concatenate([np.zeros(p), [-1.0]]),
        A_ub=np.hstack([matrix, np.ones((len(matrix), 1))]),
        b_ub=right,
        A_eq=[[1.0] * n_assets + [0.0] * (p - n_assets + 1)],
        b_eq=[1.0],
        bounds=[(None, None)] * p + [(None, 1.0)],
        method="highs",
    )
    return found.x[:-1] if found.status == 0 and found.x[-1] > 1e-7 else None

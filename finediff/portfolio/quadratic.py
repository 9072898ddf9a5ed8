"""Quadratic programmes in numbers, by Clarabel without a compiled program between.

    min |R w|^2 - q'w + c'z        with  A x <= b,  1'w = 1,          x = (w, z)
    min |R y|^2                    with  A x <= b kappa,  1'y = kappa >= 0,  m'y - c'z - s kappa >= 1,  x = (y, z)

the second the ratio problem, w = y / kappa. For a few dozen assets most of the time of a modelling layer is its
own, so problems come here whenever all their constraints are known as rows; `finediff.portfolio.program` has the
rest. (Interior point with a homogeneous embedding: Goulart, Chen 2024, arXiv:2405.12762.)
"""

import clarabel
import numpy as np
from scipy import sparse

_STATUS = {"Solved": "optimal", "AlmostSolved": "optimal_inaccurate"}


def solve_quadratic(root, linear, matrix, right, cost):
    """Weights of the quadratic programme.

    Parameters
    ----------
    root : (d, d) array
        R.
    linear : (d,) array
        q.
    matrix, right, cost : arrays (m, d + k), (m,), (d + k,)
        A, b, c, from `finediff.portfolio.polyhedron.polyhedron`.

    Returns
    -------
    (d,) array or None, and the solver's status
    """
    d = len(root)
    total = np.zeros((1, matrix.shape[1]))
    total[0, :d] = 1.0
    slope = cost.copy()
    slope[:d] -= linear
    x, status = _solve(root, slope, np.vstack([total, matrix]), np.concatenate([[1.0], right]), 1)
    return None if x is None else x[:d], status


def solve_ratio(root, excess, matrix, right, cost, sold):
    """Weights of the ratio problem.

    Parameters
    ----------
    root : (d, d) array
        R.
    excess : (d,) array
        m, of size one.
    matrix, right, cost : arrays (m, d + k), (m,), (d + k,)
        A, b, c.
    sold : float
        s, the cost of what must be sold.

    Returns
    -------
    (d,) array or None, and the solver's status
    """
    d, p = len(root), matrix.shape[1]
    total, earned = np.zeros((1, p + 1)), np.zeros((1, p + 1))
    total[0, :d], total[0, p] = 1.0, -1.0
    earned[0, :p], earned[0, p] = cost, sold
    earned[0, :d] -= excess
    below = np.hstack([matrix, -right[:, None]])
    positive = np.zeros((1, p + 1))
    positive[0, p] = -1.0
    # Without costs the return is one exactly, which leaves the solver no slack to lose accuracy in.
    paid = bool(cost.any() or sold)
    x, status = _solve(
        root,
        np.zeros(p + 1),
        np.vstack([total, earned, below, positive]),
        np.concatenate([[0.0, -1.0], np.zeros(len(below) + 1)]),
        1 if paid else 2,
    )
    return None if x is None else x[:d] / x[p], status


def _solve(root, slope, matrix, right, n_equal):
    d, p = len(root), matrix.shape[1]
    curve = np.zeros((p, p))
    curve[:d, :d] = np.triu(2 * root.T @ root)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = [clarabel.ZeroConeT(n_equal), clarabel.NonnegativeConeT(len(right) - n_equal)]
    found = clarabel.DefaultSolver(
        sparse.csc_matrix(curve), slope, sparse.csc_matrix(matrix), right, cones, settings
    ).solve()
    status = str(found.status)
    if status not in _STATUS:
        return None, status
    return np.array(found.x), _STATUS[status]

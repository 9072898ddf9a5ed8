"""Minimum CVaR by Newton steps on a smoothed objective, for back-tests.

With scenarios r_1 ... r_n (rows of R), losses over the threshold l_j = -r_j'w - t, and the constraints as
A x <= b in x = (w, z), cost c'z (see `finediff.portfolio.polyhedron`), the problem

    P(x, t) = t + (1/(a n)) sum_j max(l_j, 0) + c'z                 1'w = 1,  A x <= b

is approached through  F = t + (1/(a n)) sum_j phi_e(l_j) + c'z - mu sum_i log(b - A x)_i,  e and mu falling, where

    phi_e(l) = 0, (l + e)^2 / 4e, l      for l <= -e, |l| < e, l >= e

has a Hessian from the rows in the band |l| < e alone: a step costs two products with R and a Gram matrix of few
rows. It stops by a certificate. Where F is stationary, q_j = phi_e'(l_j) / (a n) and lambda_i = mu / (b - A x)_i
are feasible in the dual of the linear programme (Rockafellar, Uryasev 2000), and with m rows of A

    P - dual = (1/(a n)) sum_{|l_j| < e} |l_j| (1/2 - |l_j| / 2e) + m mu

bounds the distance to the programme's optimum; half the Newton decrement is added for what is left to descend.
(Smoothing: Alexander, Coleman, Li 2006; log barrier: Boyd,
Vandenberghe 2004, ch. 11.)
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from finediff.portfolio.polyhedron import interior_point

_STEPS = 150
_SHRINK = 0.2  # of the gap from stage to stage; the band shrinks by its root, as the gap goes with e^2


class _Smoothed:
    """F and its derivatives at (x, t), for given e and mu."""

    def __init__(self, returns, level, matrix, right, cost):
        self.returns, self.share = returns, 1 / (level * len(returns))
        self.matrix, self.right, self.cost = matrix, right, cost
        self.d, self.p = returns.shape[1], matrix.shape[1]

    def value(self, over, slack, x, t, e, mu):
        inner = np.clip(over, -e, e) + e
        smooth = (inner @ inner) / (4 * e) + np.maximum(over - e, 0.0).sum()
        barrier = mu * np.log(slack).sum() if len(slack) else 0.0
        return t + self.share * smooth + self.cost @ x - barrier

    def step(self, over, slack, e, mu, damping):
        """Newton direction (dx, dt) that keeps 1'w, and minus its slope; ``damping`` shortens it."""
        d, p = self.d, self.p
        touched = np.flatnonzero(over > -e)
        weight = np.minimum((over[touched] + e) / (2 * e), 1.0)
        rows = self.returns[touched]
        gradient = np.concatenate([self.cost, [1 - self.share * weight.sum()]])
        gradient[:d] -= self.share * (weight @ rows)
        band, width = rows[over[touched] < e], e
        curve = self.share / (2 * width)
        hessian = np.zeros((p + 1, p + 1))
        hessian[:d, :d] = curve * (band.T @ band)
        hessian[p, :d] = hessian[:d, p] = curve * band.sum(axis=0)
        hessian[p, p] = curve * len(band)
        scaled = self.matrix / slack[:, None]
        gradient[:p] += mu * scaled.sum(axis=0)
        hessian[:p, :p] += mu * (scaled.T @ scaled)
        hessian[np.diag_indices(p + 1)] += 1e-10 * np.trace(hessian) / (p + 1) + 1e-14
        # Too few rows in the band leave directions without curvature, and the step without a length.
        hessian[np.diag_indices(p + 1)] += damping * curve * (len(band) + 1)
        ones = np.zeros(p + 1)
        ones[:d] = 1.0
        factor = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
        both = cho_solve(factor, np.stack([gradient, ones], axis=1), check_finite=False)
        direction = -both[:, 0] + both[:, 1] * (both[:d, 0].sum() / both[:d, 1].sum())
        return direction[:p], direction[p], -float(gradient @ direction)

    def gap(self, over, n_slack, e, mu):
        band = np.abs(over[np.abs(over) < e])
        return self.share * float((band / 2 - band**2 / (2 * e)).sum()) + n_slack * mu


def newton_cvar(scenarios, level, matrix, right, cost, tolerance=5e-5):
    """Weights of least CVaR, to a relative distance ``tolerance`` of the programme's optimum.

    Parameters
    ----------
    scenarios : (n, d) array
        Simple returns, in any units.
    level : float
        a.
    matrix, right, cost : arrays (m, p), (m,), (p,)
        Constraints, from `polyhedron`; cost in the units of the scenarios.
    tolerance : float
        Of the certified gap over the CVaR.

    Returns
    -------
    (d,) array, or None where the constraints have no interior or the steps did not arrive
    """
    n, d = scenarios.shape
    x = interior_point(matrix, right, d)
    unit = float(np.sqrt(scenarios.var(axis=0).mean()))
    if x is None or unit == 0:
        return None
    problem = _Smoothed(scenarios / unit, level, matrix, right, cost / unit)
    losses = -problem.returns @ x[:d]
    spread = float(losses.std()) or 1.0
    t = float(np.partition(losses, -max(int(level * n), 1))[-max(int(level * n), 1)])
    over, slack = losses - t, right - matrix @ x
    e, mu = 0.5 * spread, 0.1 * spread / max(len(right), 1)
    damping = 0.0
    for _ in range(_STEPS):
        dx, dt, slope = problem.step(over, slack, e, mu, damping)
        # Half the slope is what a step gains: below a share of the gap, the stage is done.
        gap = problem.gap(over, len(right), e, mu)
        if damping <= 1e-3 and slope / 2 < 0.05 * gap:
            true = t + problem.share * np.maximum(over, 0.0).sum() + problem.cost @ x
            if gap + slope / 2 <= tolerance * max(abs(true), 0.1 * spread):
                return x[:d]
            e, mu = e * np.sqrt(_SHRINK), mu * _SHRINK
            continue
        moved, narrowed = -problem.returns @ dx[:d] - dt, -matrix @ dx
        shrinking = narrowed < 0
        length = min(1.0, 0.99 * float((slack[shrinking] / -narrowed[shrinking]).min(initial=np.inf)))
        here, least = problem.value(over, slack, x, t, e, mu), 1e-4 * length
        while length > least:
            there = problem.value(
                over + length * moved, slack + length * narrowed, x + length * dx, t + length * dt, e, mu
            )
            if there <= here - 1e-4 * length * slope:
                break
            length /= 2
        else:
            damping = max(30 * damping, 1e-6)
            if damping > 1e6:
                return None
            continue
        damping = damping / 10 if damping > 1e-8 else 0.0
        x, t = x + length * dx, t + length * dt
        over, slack = over + length * moved, slack + length * narrowed
    return None

"""How long does a rebalance take, and do the fast solvers find the portfolio of the exact ones?

    python benchmarks/portfolio.py [--dates 50] [--seed 0] [--json]

Every line solves the same sequence of rebalances in two ways on one thread, and prints CPU milliseconds of each,
their ratio, and the largest relative distance of the objectives:

    minimum variance, maximum Sharpe   numbers handed to the solver, against a modelling layer from scratch
    the same, own constraint           a program compiled once, against one compiled at every date
    minimum CVaR                       smoothed Newton steps, against the linear programme

Covariances and scenarios have two factors; scenarios are multivariate t with four degrees of freedom. With --json
the last line is one JSON object with the same numbers.
"""

import argparse
import json
import time

import cvxpy as cp
import numpy as np
from threadpoolctl import threadpool_limits

from finediff.portfolio import (
    Constraint,
    GrossExposure,
    LongOnly,
    MaximumSharpe,
    MaximumWeight,
    MinimumCVaR,
    MinimumVariance,
)


class Listed(Constraint):
    """Long only, known to cvxpy alone: a constraint of one's own."""

    def build(self, weights, scale, names=None):
        return [weights >= 0]


def covariance_of(d, rng):
    """Two factors and specific variances, daily."""
    loadings = rng.standard_normal((d, 2)) + 0.5
    return (0.3 * loadings @ loadings.T + np.diag(rng.uniform(0.5, 2, d))) * 1e-4


def scenarios_of(n, d, rng):
    """Multivariate t, four degrees of freedom, two factors, daily."""
    loadings = 0.5 * rng.standard_normal((d, 2)) + 0.7
    rows = rng.standard_normal((n, 2)) @ loadings.T + rng.standard_normal((n, d)) * rng.uniform(0.5, 2, d)
    return 0.01 * rows / np.sqrt(rng.chisquare(4, (n, 1)) / 4)


def from_scratch(covariance, mean=None):
    """Long-only minimum variance, or maximum Sharpe with a mean, modelled and compiled at every call."""
    d, unit = len(covariance), np.trace(covariance) / len(covariance)
    y = cp.Variable(d)
    risk = cp.quad_form(y, cp.psd_wrap(covariance / unit))
    total = cp.sum(y) == 1 if mean is None else (mean / np.abs(mean).max()) @ y == 1
    cp.Problem(cp.Minimize(risk), [total, y >= 0]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )
    w = y.value / y.value.sum()
    variance = w @ covariance @ w
    return variance if mean is None else mean @ w / np.sqrt(variance)


def spent(call, days):
    """CPU milliseconds a call over the days, after a first one, and what the calls returned."""
    call(days[0])
    began = time.process_time()
    found = [call(day) for day in days]
    return 1e3 * (time.process_time() - began) / len(days), np.array(found)


def compare(name, fast, slow, days):
    """One line of the table."""
    quick, one = spent(fast, days)
    long, two = spent(slow, days)
    distance = float(np.abs(one / two - 1).max())
    print(f"{name:<52}{quick:>9.2f}{long:>10.2f}{long / quick:>8.1f}{distance:>12.1e}", flush=True)
    return {"problem": name, "ms": quick, "reference_ms": long, "ratio": long / quick, "distance": distance}


def quadratic(d, dates, rng):
    """Rows of the two quadratic problems with d assets."""
    days = [(covariance_of(d, rng), np.abs(rng.standard_normal(d)) * 1e-3) for _ in range(dates)]
    found = []
    for label, rule in (("", LongOnly()), (", own constraint", Listed())):
        least, best = MinimumVariance([rule]), MaximumSharpe([rule])
        found.append(
            compare(
                f"minimum variance, d = {d}{label}",
                lambda day, least=least: least.solve(covariance=day[0]).objective,
                lambda day: from_scratch(day[0]),
                days,
            )
        )
        found.append(
            compare(
                f"maximum Sharpe, d = {d}{label}",
                lambda day, best=best: best.solve(covariance=day[0], mean=day[1]).objective,
                lambda day: from_scratch(*day),
                days,
            )
        )
    return found


def cvar(n, d, level, dates, rng):
    """Rows of minimum CVaR, three sets of constraints."""
    days = [scenarios_of(n, d, rng) for _ in range(dates)]
    sets = {
        "long only": [LongOnly()],
        "capped": [LongOnly(), MaximumWeight(max(0.15, 1.5 / d))],
        "gross 2": [GrossExposure(2.0)],
    }
    found = []
    for label, constraints in sets.items():
        newton = MinimumCVaR(level, constraints, method="newton")
        programme = MinimumCVaR(level, constraints)
        found.append(
            compare(
                f"minimum CVaR {level:.0%}, {n:,} x {d}, {label}",
                lambda rows, newton=newton: newton.solve(scenarios=rows).objective,
                lambda rows, programme=programme: programme.solve(scenarios=rows).objective,
                days,
            )
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dates", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    found = []
    with threadpool_limits(1):
        print(f"{'':<52}{'ms':>9}{'exact ms':>10}{'ratio':>8}{'distance':>12}")
        for d in (20, 60, 200):
            found += quadratic(d, options.dates if d < 200 else max(options.dates // 10, 2), rng)
        for n, d in ((1000, 20), (8000, 20), (8000, 60)):
            for level in (0.05, 0.01):
                found += cvar(n, d, level, max(options.dates // 10, 2), rng)
    if options.json:
        print(json.dumps({"dates": options.dates, "seed": options.seed, "rows": found}))


if __name__ == "__main__":
    main()

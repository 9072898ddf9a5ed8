"""How many factors does each noise edge find in pure noise, and what does a clip cost?

    python benchmarks/marchenko_pastur.py [--panels 400] [--seed 0] [--json]

Prints two tables: the share of noise panels in which at least one factor survives, by edge and size, and the
CPU milliseconds of one clip on one thread. The noise is Gaussian, independent Student-t with 5 degrees of
freedom, or multivariate Student-t (one volatility a day, shared by all assets: uncorrelated, yet outside the
theory). With --json the last line is one JSON object with the same numbers.
"""

import argparse
import json
import time

import numpy as np
from threadpoolctl import threadpool_limits

from finediff.covariance import clip, noise_edge

SIZES = [(75, 50), (500, 100), (250, 250), (100, 200), (30, 100), (2000, 50)]
LAWS = {
    "normal": lambda rng, n, d: rng.standard_normal((n, d)),
    "t5": lambda rng, n, d: rng.standard_t(5, (n, d)),
    "shared t5": lambda rng, n, d: rng.standard_normal((n, d)) / np.sqrt(rng.chisquare(5, (n, 1)) / 5),
}
EDGES = {"bulk": {"edge": "bulk"}, "tw 5%": {"level": 0.05}, "tw 1%": {"level": 0.01}}


def false_factors(n, d, law, panels, rng):
    """Share of noise panels whose largest correlation eigenvalue exceeds each edge."""
    top = np.empty(panels)
    for i in range(panels):
        rows = LAWS[law](rng, n, d)
        top[i] = np.linalg.eigvalsh(np.corrcoef(rows, rowvar=False))[-1]
    return {name: float((top > noise_edge(d, n, **how)).mean()) for name, how in EDGES.items()}


def milliseconds(d, rng, repeats=9):
    """Median CPU time of one clip of a (d, d) covariance with three factors, after a first call."""
    n = 5 * d
    rows = rng.standard_normal((n, 3)) @ rng.standard_normal((3, d)) + rng.standard_normal((n, d))
    covariance = np.cov(rows, rowvar=False)
    clip(covariance, n)
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        clip(covariance, n)
        spent.append(time.process_time() - start)
    return 1e3 * float(np.median(spent))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--panels", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    result = {"panels": options.panels, "seed": options.seed, "false_factor_rate": [], "clip_cpu_ms": {}}
    with threadpool_limits(1):
        print(f"share of {options.panels} noise panels with a false factor")
        print(f"{'law':>10} {'n':>6} {'d':>5}" + "".join(f"{name:>9}" for name in EDGES))
        for law in LAWS:
            for n, d in SIZES:
                rates = false_factors(n, d, law, options.panels, rng)
                result["false_factor_rate"].append({"law": law, "n": n, "d": d, **rates})
                print(f"{law:>10} {n:>6} {d:>5}" + "".join(f"{rate:>9.2%}" for rate in rates.values()))
        print("\nCPU milliseconds of one clip, one thread")
        for d in (50, 100, 500):
            result["clip_cpu_ms"][str(d)] = milliseconds(d, rng)
            print(f"{'d':>8} {d:>6} {result['clip_cpu_ms'][str(d)]:>9.2f}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

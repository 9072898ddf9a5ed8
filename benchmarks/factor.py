"""Thousands of assets: does the factor-structured model find what is there, at what cost, and is its law likelier?

    python benchmarks/factor.py [--quick] [--json]

CPU seconds are of one thread.

1. Recovery, in the simulated market of Chen, Xu, Xu and Zhang (2025): 2,048 assets, 16 factors, n days, five seeds.
   eig        mean |estimate/truth - 1| of the 16 largest eigenvalues of the covariance
   angle      largest principal angle between the 16 leading eigenvectors and the truth's, degrees; strong: between the
              16 and those of the truth whose eigenvalue is more than twice the 16th
   projector  ||U U' - V V'||_F/||V V'||_F of all 16: factors whose size is near 0 decide it and the angle
   mean       ||m - mu||/||mu||
   cov        ||S - Sigma||_F over that of the sample covariance
   vol        true volatility of the minimum-variance portfolio over the oracle's
   The sample covariance is inverted with 1e-3 of its mean variance on the diagonal.
2. Cost: fits and scenarios; time as a power of the number of assets; peak memory of a process.
3. Held-out nats a row over a Gaussian with the Ledoit-Wolf covariance, 100 assets, 5 factors, 1,000 days, where the
   factors or all returns are Student t(4). Ledoit-Wolf loses most where the own variances differ.
4. 200 US shares with their missing entries (deaths and late listings), where the panel is present: nats a day over
   the Gaussian factor model with as many factors, on the following year.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import LedoitWolf

from finediff.covariance import quadratic_inverse_shrinkage
from finediff.diffusion.exact import fit_factors
from finediff.diffusion.likelihood import held_out_nats
from finediff.generators import FactorDiffusionGenerator
from finediff.markets import factor_market

SHARED = Path(__file__).parents[2] / "shared/data"
QUICK = "--quick" in sys.argv
SEEDS = range(2 if QUICK else 5)
D, K = 2048, 16
BARS: list[dict] = []


def bar(name: str, value: float, low: float = -np.inf, high: float = np.inf) -> None:
    met = bool(low <= value <= high)
    BARS.append({"bar": name, "value": float(value), "low": low, "high": high, "met": met})
    ends = [f"at least {low:g}"] * (low > -np.inf) + [f"at most {high:g}"] * (high < np.inf)
    print(f"  bar {name}: {value:.4g}, {' and '.join(ends)}: {'met' if met else 'NOT met'}", flush=True)


def timed(function):
    """Result and CPU seconds."""
    began = time.process_time()
    return function(), time.process_time() - began


# ------------------------------------------------------------------ 1. recovery


def low_rank(B: np.ndarray, own: np.ndarray) -> dict:
    """A covariance B B' + diag(own): itself, its leading eigenvectors and its minimum-variance weights."""
    S = B @ B.T + np.diag(own)
    values, vectors = leading(S)
    A = B / own[:, None]
    one = 1 / own - A @ np.linalg.solve(np.eye(B.shape[1]) + B.T @ A, A.sum(0))
    return {"S": S, "values": values, "U": vectors, "w": one / one.sum()}


def dense(S: np.ndarray, ridge: float = 0.0) -> dict:
    values, vectors = leading(S)
    one = np.linalg.solve(S + ridge * S.trace() / len(S) * np.eye(len(S)), np.ones(len(S)))
    return {"S": S, "values": values, "U": vectors, "w": one / one.sum()}


def leading(S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh

    values, vectors = eigh(S, subset_by_index=[len(S) - K, len(S) - 1])
    return values[::-1], vectors[:, ::-1]


def estimators(X: np.ndarray) -> dict:
    """{name: (estimate, CPU seconds)}."""
    n, C = len(X), np.cov(X.T)

    def principal():
        values, U = leading(C)
        B = U * np.sqrt(values)
        return low_rank(B, np.diag(C) - np.square(B).sum(1))

    def analysis():
        fit = fit_factors(torch.as_tensor(X), K, heavy_tails=False)
        return low_rank(fit.loadings.numpy(), fit.variance.numpy())

    def ours():
        g = FactorDiffusionGenerator(n_factors=K, random_state=0, device="cpu").fit(X)
        return low_rank(g.loadings_, g.idiosyncratic_variance_) | {"mean": g.mean_}

    rows = {
        "sample": lambda: dense(C, ridge=1e-3),
        "Ledoit-Wolf": lambda: dense(LedoitWolf().fit(X).covariance_),
        "nonlinear shrinkage": lambda: dense(quadratic_inverse_shrinkage(C, n, standardise=False)),
        "principal components": principal,
        "factor analysis": analysis,
        "FactorDiffusion": ours,
    }
    return {name: timed(make) for name, make in rows.items()}


def judge(found: dict, market, truth: dict, X: np.ndarray) -> dict:
    S, oracle = truth["S"], 1 / np.linalg.solve(truth["S"], np.ones(D)).sum()
    cosines = np.linalg.svd(found["U"].T @ truth["U"], compute_uv=False)
    strong = truth["values"] > 2 * truth["values"][-1]
    largest = np.linalg.svd(found["U"].T @ truth["U"][:, strong], compute_uv=False).min()
    mean = found.get("mean", X.mean(0))
    return {
        "eig": np.abs(found["values"] / truth["values"] - 1).mean(),
        "angle": np.degrees(np.arccos(min(cosines.min(), 1.0))),
        "strong angle": np.degrees(np.arccos(min(largest, 1.0))),
        "projector": np.sqrt(2 * K - 2 * np.square(cosines).sum()) / np.sqrt(K),
        "mean": np.linalg.norm(mean - market.mean) / np.linalg.norm(market.mean),
        "cov": np.linalg.norm(found["S"] - S),
        "vol": np.sqrt(found["w"] @ S @ found["w"] / oracle),
    }


def recovery() -> dict:
    print(f"1. Recovery: {D} assets, {K} factors, {len(SEEDS)} seeds")
    results = {}
    for n in (512, 1024, 2048):
        rows: dict[str, list[dict]] = {}
        for seed in SEEDS:
            market = factor_market(D, K, seed, periods_per_year=1)
            X = market.sample(n, 100 + seed)
            values, U = leading(market.covariance)
            truth = {"S": market.covariance, "values": values, "U": U}
            for name, (found, seconds) in estimators(X).items():
                row = judge(found, market, truth, X) | {"s": seconds}
                rows.setdefault(name, []).append(row)
            sample = rows["sample"][-1]["cov"]
            for name in rows:
                rows[name][-1]["cov"] /= sample
        print(f"\n  n = {n}{'':14} eig   angle  strong  projector   mean     cov  (sd)     vol    fit s")
        for name, runs in rows.items():
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            spread = float(np.std([run["cov"] for run in runs]))
            results[f"{name}, n={n}"] = mean | {"cov sd": spread}
            print(
                f"  {name:22} {mean['eig']:.3f}  {mean['angle']:5.1f}  {mean['strong angle']:5.1f}    {mean['projector']:.3f}"
                f"      {mean['mean']:.3f}   {mean['cov']:.3f} ({spread:.3f})  {mean['vol']:6.2f}  {mean['s']:6.2f}",
                flush=True,
            )
        ours = results[f"FactorDiffusion, n={n}"]
        bar(f"covariance error over the sample's, n = {n}", ours["cov"], high=0.945)
        bar(f"minimum-variance volatility over the oracle's, n = {n}", ours["vol"], high=1.10)
    noise = [
        FactorDiffusionGenerator(random_state=0, device="cpu").fit(
            0.01 * np.random.default_rng(seed).standard_normal((500, 100))
        )
        for seed in SEEDS
    ]
    bar("factors found where there are none", max(g.n_factors_ for g in noise), high=0)
    counts = []
    for seed in SEEDS:
        X = factor_market(200, 5, seed, factor_share=0.5).sample(1000, seed)
        counts.append(FactorDiffusionGenerator(random_state=0, device="cpu").fit(X).n_factors_)
    print(f"  number of factors found where five are: {counts}")
    return results


# ------------------------------------------------------------------ 2. cost

PROCESS = """
import sys, time
import torch
from finediff.generators import FactorDiffusionGenerator
from finediff.markets import factor_market
torch.set_num_threads(1)
d, k, n = map(int, sys.argv[1:4])
X = factor_market(d, k, 0, df=5).sample(n, 1)
began = time.process_time()
FactorDiffusionGenerator(n_factors=k, random_state=0, device="cpu").fit(X)
seconds = time.process_time() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak / 2**20)
"""


def in_process(d: int, k: int, n: int) -> tuple[float, float]:
    """CPU seconds of a fit and peak GiB of a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(d), str(k), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gib = map(float, done.stdout.split())
    return seconds, gib


def cost() -> dict:
    print("\n2. Cost")
    market = factor_market(256, 16, 0)
    X = market.sample(512, 1)
    g, seconds = timed(lambda: FactorDiffusionGenerator(n_factors=16, random_state=0, device="cpu").fit(X))
    bar("fit of 256 assets, 512 days, 16 factors, CPU s", seconds, high=60)
    _, draw = timed(lambda: g.sample(100_000))
    bar("  scenarios a CPU second", 100_000 / draw, low=20_000)
    truth = leading(market.covariance)[1]
    B, C = g.loadings_, np.cov(X.T)
    angles = {}
    for name, S in (("factor", B @ B.T + np.diag(g.idiosyncratic_variance_)), ("components", C)):
        cosines = np.linalg.svd(leading(S)[1].T @ truth, compute_uv=False)
        angles[name] = np.sqrt(2 * K - 2 * np.square(cosines).sum()) / np.sqrt(K)
    bar("  subspace error over that of principal components", angles["factor"] / angles["components"], high=1)
    L = np.linalg.cholesky(market.factor_covariance)
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(4, (512, 16)) / np.sqrt(2) @ L.T @ market.loadings.T
    heavy += rng.standard_normal((512, 256)) * np.sqrt(market.idiosyncratic_variance)
    h = FactorDiffusionGenerator(n_factors=16, random_state=0, device="cpu").fit(heavy)
    _, draw = timed(lambda: h.sample(20_000))
    print(
        f"  with a learned residual ({h.residual_nats_:.2f} nats): {20_000 / draw:,.0f} scenarios a CPU second"
    )
    sizes, fits = (500, 1000, 2000, 5000), {}
    for d in sizes:
        fits[d] = in_process(d, 20, 1260)
        print(
            f"  {d:5} assets, 1,260 days, 20 factors: fit {fits[d][0]:6.2f} s, peak {fits[d][1]:.2f} GiB",
            flush=True,
        )
    bar("fit of 5,000 assets, CPU s", fits[5000][0], high=30)
    bar("  peak memory, GiB", fits[5000][1], high=3)
    slope = np.polyfit(np.log(sizes), np.log([fits[d][0] for d in sizes]), 1)[0]
    bar("  fit time as a power of the number of assets", slope, high=1.15)
    return {"fits": {str(d): value for d, value in fits.items()}, "exponent": slope}


# ------------------------------------------------------------------ 3, 4. likelihood


def gaussian_density(T: np.ndarray, mean: np.ndarray, S: np.ndarray) -> np.ndarray:
    root = np.linalg.cholesky(S)
    z = np.linalg.solve(root, (T - mean).T)
    return -0.5 * (z**2).sum(0) - np.log(np.diag(root)).sum() - 0.5 * len(S) * np.log(2 * np.pi)


def t_markets(seed: int):
    """(name, training rows, test rows, true covariance, whether a bar holds): t(4) in four ways."""
    d, k, n = 100, 5, (1000, 4000)
    market = factor_market(d, k, seed, df=4)
    yield "all t(4)", *(market.sample(m, i + 1) for i, m in enumerate(n)), market.covariance, True
    rng = np.random.default_rng(seed)

    def draw(m, L, own, columns):
        size = np.sqrt(2 / rng.chisquare(4, (m, columns)))
        return (rng.standard_normal((m, k)) * size) @ L.T + rng.standard_normal((m, d)) * np.sqrt(own)

    plain = factor_market(d, k, seed)
    L, own = plain.loadings @ np.linalg.cholesky(plain.factor_covariance), plain.idiosyncratic_variance
    yield "factors t(4), one volatility", *(draw(m, L, own, 1) for m in n), plain.covariance, True
    yield "factors t(4), independent", *(draw(m, L, own, k) for m in n), plain.covariance, True
    L, own = 0.005 * rng.standard_normal((d, k)), np.full(d, 1e-4)
    yield "the same, own parts all alike", *(draw(m, L, own, k) for m in n), L @ L.T + np.diag(own), False


def likelihood() -> dict:
    print("\n3. Held-out nats over the Ledoit-Wolf Gaussian, 100 assets, 5 factors, 1,000 days")
    rows: dict[str, list] = {}
    for seed in SEEDS:
        for name, X, T, S, barred in t_markets(seed):
            plain = LedoitWolf().fit(X)
            reference = gaussian_density(T, plain.location_, plain.covariance_)
            g, seconds = timed(
                lambda X=X: FactorDiffusionGenerator(n_factors=5, random_state=0, device="cpu").fit(X)
            )
            gauss = FactorDiffusionGenerator(
                n_factors=5, heavy_tails=False, residual=False, device="cpu"
            ).fit(X)
            learned = 0.0
            if g.residual_nats_:
                base = FactorDiffusionGenerator(
                    n_factors=5, residual=False, random_state=0, device="cpu"
                ).fit(X)
                z = torch.as_tensor(g.scaler_.transform(T))
                span = {"log_snr": (-14.0, 9.0), "nodes": 47, "repeats": 1}
                seeded = torch.Generator().manual_seed(0)
                learned = held_out_nats(g.score_model_, z, base.score_model_, **span, generator=seeded).gain
            rows.setdefault(name, []).append(
                [
                    (gauss.log_density(T) - reference).mean(),
                    (g.log_density(T) - reference).mean(),
                    learned,
                    seconds,
                    (gaussian_density(T, X.mean(0), S) - reference).mean(),
                    barred,
                ]
            )
    results = {}
    for name, runs in rows.items():
        gauss, base, learned, seconds, true, barred = np.mean(runs, 0)
        print(
            f"  {name}: {base + learned:.2f} in {seconds:.1f} s: Gaussian factors {gauss:.2f}, with volatilities {base:.2f}, "
            f"learned {learned:+.3f}; a Gaussian with the true covariance has {true:.2f}"
        )
        if barred:
            bar(f"nats, {name}", base + learned, low=2.6)
            bar("  fit, CPU s", seconds, high=5)
        results[name] = {
            "gaussian": gauss,
            "base": base,
            "learned": learned,
            "s": seconds,
            "true covariance": true,
        }
    return results


def real_panel() -> dict:
    path = SHARED / "us200_2000_2014.csv.gz"
    print("\n4. 200 US shares with their missing entries")
    if not path.exists():
        print("  left out: the panel is not here")
        return {}
    prices = pd.read_csv(path, index_col=0, parse_dates=True)
    returns = prices.where(prices > 0).pct_change(fill_method=None).iloc[1:]
    results = {}
    for start in (0, 1000, 2200):
        X, T = returns.iloc[start : start + 1260], returns.iloc[start + 1260 : start + 1512]
        alive = X.notna().any()
        X, T = X.loc[:, alive], T.loc[:, alive]
        g, seconds = timed(lambda X=X: FactorDiffusionGenerator(random_state=0, device="cpu").fit(X))
        gauss = FactorDiffusionGenerator(
            n_factors=g.n_factors_, heavy_tails=False, residual=False, device="cpu"
        )
        gain = g.log_density(T) - gauss.fit(X).log_density(T)
        name = f"{X.index[0]:%Y-%m} to {X.index[-1]:%Y-%m}"
        print(
            f"  {name}: {X.shape[1]} names of which {X.isna().any().sum()} with gaps ({X.isna().to_numpy().mean():.1%} of "
            f"the entries), {g.n_factors_} factors, {seconds:.1f} s; a median day +{np.median(gain):.1f}"
        )
        bar(f"nats a day over the Gaussian factor model, year after {name}", gain.mean(), low=0)
        results[name] = {"nats": float(gain.mean()), "median": float(np.median(gain)), "k": g.n_factors_}
    return results


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.process_time()
    results = {"recovery": recovery(), "cost": cost(), "likelihood": likelihood(), "real panel": real_panel()}
    missed = [row["bar"].strip() for row in BARS if not row["met"]]
    print(
        f"\n{len(BARS) - len(missed)} of {len(BARS)} bars met"
        + (f"; not: {', '.join(missed)}" if missed else "")
    )
    used = time.process_time() - began + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    results |= {"bars": BARS, "cpu s": used}
    print(f"{used:.0f} CPU seconds in all")
    if "--json" in sys.argv:
        print(json.dumps(json.loads(json.dumps(results), parse_constant=lambda _: None)))


if __name__ == "__main__":
    main()

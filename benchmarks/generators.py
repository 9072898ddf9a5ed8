"""How good are the scenarios, and how probable are days that were held out, of every generator and its rivals?

    python benchmarks/generators.py [--quick] [--json]

CPU seconds are of one thread. The bundled panel is its last 5,000 days of 20 shares, half of them for the fit; the
others, which are not shipped, are left out where they are absent.

1, 2. Held-out likelihood, nats a day over a Gaussian with the Ledoit-Wolf covariance of the training rows. Exact
      densities, but for what is learned: ridge adds to its base's density the paired I-MMSE gain of its residual,
      DDPM that of the network over its own Gaussian. "over X" is paired, with its standard error over test rows.
3.    Scenarios, as many as held-out days, means over splits and seeds:
      CvM p      mean p-value of Cramer-von Mises tests of 200 random long-only portfolios
      rej.       share of them rejected at 5 %
      AUC        of boosted trees that tell scenarios from held-out days, 1/2 is ideal
      ED         energy distance 2E|x-y| - E|x-x'| - E|y-y'| of standardised returns, times 1,000
      kurt       fourth standardised moment over that of held-out days, median over assets; pf: equal-weighted portfolio
      sd         standard deviation over that of held-out days, median over assets
      NN         median distance to the nearest training day over that of held-out days, 0 is a copy
      fit, draw  CPU seconds of the fit and of 2,500 scenarios
4.    Memorisation dial (L_test - L_train)/(L_test - L_empirical): L the denoising loss over log-SNR -6 to 8, the last
      one that of the training rows' own score on themselves, which is 100 % memorised.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal, multivariate_t
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import FactorAnalysis

from finediff.diffusion.exact import EmpiricalScore, GaussianScore
from finediff.diffusion.likelihood import held_out_nats
from finediff.diffusion.residual import ResidualScore
from finediff.generators import (
    BootstrapGenerator,
    CopulaGenerator,
    DDPMGenerator,
    FlowMatchingGenerator,
    GaussianGenerator,
    RidgeScoreGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.memorisation import distance_ratio
from finediff.panel import load_prices, to_returns
from finediff.validation import (
    classifier_auc,
    cvm_p_value,
    cvm_two_sample,
    energy_distance,
    panel_metrics,
)

SHARED = Path(__file__).parents[2] / "shared/data"
QUICK = "--quick" in sys.argv
SPLITS = (0,) if QUICK else (0, 1, 2, 3)
SEEDS = (0, 1) if QUICK else (0, 1, 2, 3)
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(20), 200)
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


def seeded(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def bundled() -> np.ndarray:
    return to_returns(load_prices()).iloc[-5000:].to_numpy()


def halves(n: int, splits=SPLITS, size: int | None = None, temporal: bool = True) -> dict:
    """{name: (rows of the fit, rows of the test)}."""
    half, found = n // 2, {}
    for s in splits:
        order = np.random.default_rng(s).permutation(n)
        found[f"random {s}"] = order[:half][:size], order[half:]
    if temporal:
        found["1st half -> 2nd"] = np.arange(half), np.arange(half, n)
        found["2nd half -> 1st"] = np.arange(half, n), np.arange(half)
    return found


# ------------------------------------------------------------------ 1, 2. held-out likelihood


class Vine:
    """skfolio's R-vine copula, on standardised returns."""

    def __init__(self, scale) -> None:
        self.mean, self.sd = scale

    def fit(self, X):
        from skfolio.distribution import VineCopula

        self.vine = VineCopula(max_depth=4, random_state=0).fit((X - self.mean) / self.sd)
        return self

    def log_density(self, X):
        return self.vine.score_samples((X - self.mean) / self.sd) - np.log(self.sd).sum()

    def sample(self, n, random_state):
        return self.vine.set_params(random_state=random_state).sample(n) * self.sd + self.mean


def in_z(model, X) -> torch.Tensor:
    return torch.as_tensor(model.scaler_.transform(X), dtype=torch.float32)


def base_density(model, X) -> np.ndarray:
    """log density of returns under the ridge generator's base, (n,)."""
    return model.base_.log_prob(in_z(model, X)).double().numpy() + model.scaler_.log_abs_det()


def residual_gain(model, X) -> np.ndarray:
    """Nats that the residual adds to it, (n,)."""
    if model.score_model_ is model.base_:
        return np.zeros(len(X))
    gain = held_out_nats(
        model.score_model_,
        in_z(model, X),
        model.base_,
        log_snr=(-6.9, 8.9),
        nodes=41,
        repeats=2,
        generator=seeded(9),
    )
    return gain.rows.numpy()


def network_density(model, X) -> np.ndarray:
    """I-MMSE over the Gaussian that the network is added to, plus that Gaussian's log density, (n,)."""
    z, d = in_z(model, X), X.shape[1]
    whole = GaussianScore(torch.zeros(d), torch.eye(d), model.score_model_.process)
    gain = held_out_nats(
        model.score_model_, z, whole, log_snr=(-6.9, 8.9), nodes=41, repeats=1, generator=seeded(9)
    )
    own = -(z.double().square().sum(1) + d * np.log(2 * np.pi)) / 2
    return (gain.rows + own).numpy() + model.scaler_.log_abs_det()


def likelihoods(train, test, scale, rivals=("t copula", "vine")) -> dict:
    """{name: (nats of each test row over the Gaussian, CPU seconds of the fit)}."""
    mean, sd = scale
    z, held_out, jacobian = (train - mean) / sd, (test - mean) / sd, np.log(sd).sum()
    gauss = multivariate_normal.logpdf(held_out, z.mean(0), ledoit_wolf(z)[0])
    found = {}

    def add(name, generator, density):
        model, seconds = timed(lambda: generator.fit(train))
        found[name] = density(model) + jacobian - gauss, seconds
        return model

    def own(model):
        return model.log_density(test)

    if "Gaussian copula" in rivals:
        add("Gaussian copula", CopulaGenerator(family="gaussian", random_state=0), own)
    if "Student t" in rivals:
        add(
            "Student t",
            StudentTGenerator(random_state=0),
            lambda m: multivariate_t.logpdf(test, m.mean_, m.scatter_, m.dof_),
        )
    if "t copula" in rivals:
        add("t copula", CopulaGenerator(random_state=0), own)
    if "FA t copula" in rivals:
        add("FA t copula", CopulaGenerator(correlation=FactorAnalysis(8), random_state=0), own)
    if "vine" in rivals:
        add("vine", Vine(scale), own)
    if "DDPM" in rivals:
        add("DDPM", DDPMGenerator(random_state=0), lambda m: network_density(m, test))
    add("ridge base", RidgeScoreGenerator(directions=0, random_state=0), lambda m: base_density(m, test))
    add(
        "ridge",
        RidgeScoreGenerator(random_state=0),
        lambda m: base_density(m, test) + residual_gain(m, test),
    )
    return found


def paired(found: dict, name: str, rival: str) -> tuple[float, float]:
    gap = found[name][0] - found[rival][0]
    return float(gap.mean()), float(gap.std() / np.sqrt(len(gap)))


def show(split: str, found: dict) -> dict:
    """One block of the table, and the same as numbers."""
    print(f"  {split}")
    rivals = [name for name in ("t copula", "FA t copula", "vine") if name in found]
    row = {"split": split}
    for name, (nats, seconds) in found.items():
        row[name] = {"nats": float(nats.mean()), "s": seconds}
        line = f"    {name:16} {nats.mean():7.3f}   fit {seconds:6.2f} s"
        if name.startswith("ridge"):
            for rival in rivals:
                gap, error = row[name][f"over {rival}"] = paired(found, name, rival)
                line += f"   over {rival} {gap:+.3f} ({error:.3f})"
        print(line, flush=True)
    return row


def bundled_likelihood() -> list[dict]:
    print("\n1. Held-out likelihood, 20 shares: nats a day over the Gaussian")
    X, results, kept = bundled(), [], {}
    scale = X.mean(0), X.std(0)
    for split, (fit, test) in halves(len(X)).items():
        rivals = ["Gaussian copula", "Student t", "t copula", "vine"]
        rivals += ["DDPM"] if split == "random 0" and not QUICK else []
        kept[split] = found = likelihoods(X[fit], X[test], scale, rivals)
        results.append(show(split, found))
    names = [name for name in kept["random 0"] if name != "DDPM"]
    random = [split for split in kept if split.startswith("random")]
    means = {name: float(np.mean([kept[s][name][0].mean() for s in random])) for name in names}
    print("  mean of the random splits   " + "   ".join(f"{k} {v:.3f}" for k, v in means.items()))
    results.append({"split": "mean of random", **means})
    for rival in ("t copula", "vine"):
        gaps = {split: paired(found, "ridge", rival)[0] for split, found in kept.items()}
        lowest = min(gaps, key=gaps.get)
        bar(f"ridge over the {rival}, least of the splits ({lowest})", gaps[lowest], low=0.28)
    base, whole = kept["random 0"]["ridge base"], kept["random 0"]["ridge"]
    bar("ridge base, nats on split 0", base[0].mean(), low=3.65)
    bar("ridge base, CPU seconds on split 0", base[1], high=1.0)
    bar("ridge, nats on split 0", whole[0].mean(), low=3.74)
    if not QUICK:
        bar("ridge, nats on the mean of four splits", means["ridge"], low=3.83)
    bar("ridge, CPU seconds, mean of all splits", np.mean([kept[s]["ridge"][1] for s in kept]), high=2.0)
    for size in (250, 500):
        fit, test = halves(len(X), (0,), size)["random 0"]
        found = likelihoods(X[fit], X[test], scale, ["t copula"])
        results.append(show(f"random 0, the first {size} days of the fit alone", found))
        bar(f"ridge over the t copula, {size} days", paired(found, "ridge", "t copula")[0], low=0.25)
    return results


def hundred_shares() -> np.ndarray:
    """2,000 days of 100 of the shares that have a price on each of them."""
    prices = load_prices(SHARED / "us200_2000_2014.csv.gz").iloc[-2001:].dropna(axis=1)
    returns = to_returns(prices).to_numpy()
    return returns[:, np.random.default_rng(0).permutation(returns.shape[1])[:100]]


def other_panels() -> list[dict]:
    print("\n2. Held-out likelihood of other panels")
    results = []
    if (SHARED / "us200_2000_2014.csv.gz").exists():
        X = hundred_shares()
        kept, aucs = {}, []
        for split, (fit, test) in halves(len(X), SPLITS[:2]).items():
            kept[split] = found = likelihoods(X[fit], X[test], (X.mean(0), X.std(0)), ["FA t copula"])
            row = show(f"{X.shape[1]} US shares, {split}, {len(fit)} days", found)
            auc = {}
            for name, model in (
                ("FA t copula", CopulaGenerator(correlation=FactorAnalysis(8), random_state=0)),
                ("ridge", RidgeScoreGenerator(random_state=0)),
            ):
                draws = model.fit(X[fit]).sample(len(test), random_state=1)
                auc[name] = classifier_auc(X[test], draws, random_state=0)
            auc["training days"] = classifier_auc(X[test], X[fit], random_state=0)
            print("    AUC of samples   " + "   ".join(f"{k} {v:.3f}" for k, v in auc.items()), flush=True)
            results.append(row | {"AUC": auc})
            if split.startswith("random"):
                aucs.append(auc["ridge"])
        gaps = {split: paired(found, "ridge", "FA t copula")[0] for split, found in kept.items()}
        lowest = min(gaps, key=gaps.get)
        bar(f"100 shares: ridge over the FA t copula, least ({lowest})", gaps[lowest], low=3.0)
        bar(
            "100 shares: CPU seconds, mean", np.mean([found["ridge"][1] for found in kept.values()]), high=3.0
        )
        bar("100 shares: AUC of samples, mean of random splits", np.mean(aucs), high=0.60)
    if (SHARED / "etf18_2006_2022.csv.gz").exists():
        X = to_returns(load_prices(SHARED / "etf18_2006_2022.csv.gz")).to_numpy()
        for split, (fit, test) in halves(len(X), (0,)).items():
            found = likelihoods(X[fit], X[test], (X.mean(0), X.std(0)))
            results.append(show(f"18 ETFs, {split}, {len(fit)} days", found))
    return results


# ------------------------------------------------------------------ 3. samples


def judge(test, draws, train) -> dict:
    metrics = panel_metrics(test, draws)
    p = cvm_p_value(cvm_two_sample(test @ WEIGHTS.T, draws @ WEIGHTS.T), len(test), len(draws))
    return {
        "CvM p": p.mean(),
        "rej.": (p < 0.05).mean(),
        "AUC": classifier_auc(test, draws, random_state=0),
        "ED": 2e3 * energy_distance(test, draws) * cdist(test / test.std(0), draws / test.std(0)).mean(),
        "kurt": metrics["kurtosis_ratio"],
        "kurt pf": metrics["kurtosis_ratio_portfolio"],
        "sd": metrics["sd_ratio"],
        "NN": distance_ratio(draws, test, train),
    }


def rivals(scale) -> dict:
    """{name: generator}: the last two are the flagship without and with what is learned."""
    found = {
        "bootstrap": BootstrapGenerator(random_state=0),
        "smoothed bootstrap": SmoothedBootstrapGenerator(random_state=0),
        "Gaussian": GaussianGenerator(random_state=0),
        "Student t": StudentTGenerator(random_state=0),
        "Gaussian copula": CopulaGenerator(family="gaussian", random_state=0),
        "t copula": CopulaGenerator(random_state=0),
        "vine": Vine(scale),
        "DDPM": DDPMGenerator(random_state=0),
        "flow matching": FlowMatchingGenerator(random_state=0),
        "ridge base": RidgeScoreGenerator(directions=0, random_state=0),
        "ridge": RidgeScoreGenerator(random_state=0),
    }
    return {k: v for k, v in found.items() if not QUICK or k not in ("DDPM", "flow matching")}


def line(name: str, row: dict) -> str:
    cells = (f"{row[key]:{form}}" for key, form in COLUMNS.items())
    return f"  {name:24}" + "  ".join(cells)


COLUMNS = {"CvM p": "7.3f", "rej.": "5.2f", "AUC": "6.3f", "ED": "6.2f", "kurt": "6.2f", "kurt pf": "7.2f"}
COLUMNS |= {"sd": "6.3f", "NN": "6.3f", "fit s": "6.2f", "draw s": "6.2f"}


def samples() -> dict:
    print(f"\n3. Scenarios, 20 shares: means over {len(SPLITS)} random splits and {len(SEEDS)} seeds")
    X = bundled()
    scale = X.mean(0), X.std(0)
    print("  " + 24 * " " + "  ".join(f"{key:>{form.split('.')[0]}}" for key, form in COLUMNS.items()))
    splits = halves(len(X), SPLITS, temporal=False)
    table, every = {}, {}
    rows = [judge(X[test], X[fit], X[fit]) for fit, test in splits.values()]
    table["training days"] = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
    print(line("training days", table["training days"] | {"fit s": 0.0, "draw s": 0.0}), flush=True)
    for name in rivals(scale):
        # Networks: one seed, on two splits.
        slow, rows = name in ("DDPM", "flow matching"), []
        for split, (fit, test) in list(splits.items())[: 2 if slow else None]:
            model, fit_seconds = timed(lambda: rivals(scale)[name].fit(X[fit]))  # noqa: B023
            for seed in SEEDS[: 1 if slow else None]:
                draws, seconds = timed(lambda: model.sample(len(test), random_state=seed + 1))  # noqa: B023
                row = judge(X[test], draws, X[fit]) | {"fit s": fit_seconds, "draw s": seconds}
                rows.append(row | {"split": split})
        every[name] = rows
        table[name] = {k: float(np.mean([row[k] for row in rows])) for k in COLUMNS}
        print(line(name + (" (2 fits)" if slow else ""), table[name]), flush=True)
    for split in splits:
        of_split = [row for row in every["ridge"] if row["split"] == split]
        print(line(f"ridge, {split}", {k: np.mean([row[k] for row in of_split]) for k in COLUMNS}))
    ridge = table["ridge"]
    bar("ridge CvM p", ridge["CvM p"], low=0.35)
    bar("ridge AUC", ridge["AUC"], high=0.545)
    bar("ridge ED x 1,000", ridge["ED"], high=7.2)
    bar("ridge kurtosis of assets", ridge["kurt"], low=0.8, high=1.25)
    bar("ridge kurtosis of the portfolio", ridge["kurt pf"], low=0.75)
    bar("ridge sd", ridge["sd"], low=0.95, high=1.06)
    bar("ridge nearest neighbour", ridge["NN"], low=0.97, high=1.05)
    bar("ridge, seconds for 2,500 scenarios", ridge["draw s"], high=0.6)

    fit, test = halves(len(X), ())["1st half -> 2nd"]
    print(
        "  1st half -> 2nd: every two-sample test fails, the training days' too, because the regimes differ"
    )
    temporal = {"training days": judge(X[test], X[fit], X[fit]) | {"fit s": 0.0, "draw s": 0.0}}
    for name in ("t copula", "ridge"):
        model, fit_seconds = timed(lambda: rivals(scale)[name].fit(X[fit]))  # noqa: B023
        draws, seconds = timed(lambda: model.sample(len(test), random_state=1))  # noqa: B023
        temporal[name] = judge(X[test], draws, X[fit]) | {"fit s": fit_seconds, "draw s": seconds}
    for name, row in temporal.items():
        print(line(name, row), flush=True)
    return {"random": table, "temporal": temporal}


# ------------------------------------------------------------------ 4. memorisation


@torch.no_grad()
def loss(model, z, seed: int) -> float:
    """E|eps_hat - noise|^2 over rows, antithetic noises and log-SNRs from -6 to 8."""
    generator, total, levels = seeded(seed), 0.0, torch.linspace(-6, 8, 15, dtype=torch.float64)
    for t in model.process.time(levels):
        for _ in range(max(1, 2500 // len(z))):
            noise = torch.randn(z.shape, generator=generator)
            for eps in (noise, -noise):
                x = model.process.perturb(z, t, eps)
                total += float((model.noise(x, t) - eps).square().sum(1).mean())
    return total / (2 * max(1, 2500 // len(z)) * len(levels))


def dial(model, z, held_out) -> tuple[float, float, float, float]:
    """The dial with its three losses."""
    on_train, on_test = loss(model, z, 1), loss(model, held_out, 2)
    copied = loss(EmpiricalScore(z, model.process), z, 1)
    return (on_test - on_train) / (on_test - copied), on_train, on_test, copied


def without_penalty(base, z, axes, draws: int) -> ResidualScore:
    """The residual by least squares: no penalty, nothing shared between levels, nothing switched off."""
    model = ResidualScore.fit(base, z, axes, draws=2, generator=seeded(0))
    for k, t in enumerate(base.process.time(model.levels.double())):
        G, R = model._normal_equations(z, t, draws, seeded(k))
        model.weights[k] = torch.linalg.lstsq(G.double(), R.double(), driver="gelsd").solution[..., 0]
    return model


def memorisation() -> list[dict]:
    print("\n4. Memorisation dial, ridge, means over splits")
    X, results = bundled(), []
    plans = [("as it comes", n, 0, None) for n in (250, 500, 1000, 2500)]
    plans += [("20 directions", n, 20, None) for n in (250, 500)]
    plans += [(f"no penalty, {k} noises a row", n, 20, k) for k in (4, 64) for n in (250, 500)]
    for name, n, directions, draws in plans:
        found = []
        for fit, test in halves(len(X), SPLITS, n, temporal=False).values():
            model = RidgeScoreGenerator(directions=0 if directions else None, random_state=0).fit(X[fit])
            z, score = in_z(model, X[fit]), model.score_model_
            axes = torch.as_tensor(model.scaler_.axes_[:directions].copy())
            if draws:
                score = without_penalty(model.base_, z, axes, draws)
            elif directions:
                score = ResidualScore.fit(model.base_, z, axes, draws=4, generator=seeded(0))
            found.append(dial(score, z, in_z(model, X[test])))
        value, on_train, on_test, copied = np.mean(found, axis=0)
        row = {"name": name, "n": n, "dial": value, "train": on_train, "test": on_test, "copied": copied}
        results.append({k: v if isinstance(v, str | int) else float(v) for k, v in row.items()})
        print(
            f"  {name:27} n {n:5}   dial {100 * value:5.1f} %   loss on training days {on_train:.3f}   "
            f"on held-out days {on_test:.3f}   copied {copied:.3f}",
            flush=True,
        )
    at = {(row["name"], row["n"]): 100 * row["dial"] for row in results}
    print(
        "  without the penalty the loss rises on held-out days rather than falls on training days: noise, no copies"
    )
    own = ("as it comes", "20 directions")
    bar("dial with the chosen penalty, highest, %", max(v for k, v in at.items() if k[0] in own), high=10)
    for n in (250, 500):
        rise = at["no penalty, 64 noises a row", n] - at["20 directions", n]
        bar(f"dial without the penalty minus with it, {n} days, points", rise, low=0.1)
    return results


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, X = time.process_time(), bundled()
    for model in (RidgeScoreGenerator(random_state=0), CopulaGenerator(), Vine((X.mean(0), X.std(0)))):
        model.fit(X[:300]).sample(10, random_state=0)  # first calls load libraries
    results = {"likelihood": bundled_likelihood(), "other panels": other_panels()}
    results["samples"], results["memorisation"] = samples(), memorisation()
    missed = [row["bar"].strip() for row in BARS if not row["met"]]
    print(
        f"\n{len(BARS) - len(missed)} of {len(BARS)} bars met"
        + (f"; not: {', '.join(missed)}" if missed else "")
    )
    results |= {"bars": BARS, "cpu s": time.process_time() - began}
    print(f"{results['cpu s']:.0f} CPU seconds in all")
    if "--json" in sys.argv:
        finite = json.loads(json.dumps(results), parse_constant=lambda _: None)
        print(json.dumps(finite))


if __name__ == "__main__":
    main()

"""Which covariance holds out of sample, does a generator add to it, and how long does a back-test take?

    python benchmarks/walkforward.py [--parts bars share speed] [--gross] [--n-jobs 1] [--json]

Daily returns, decisions on the rows before, buy and hold in between, no costs unless said. Volatilities are annual, of
realised daily returns; turnover is the mean sum |change of weights| of a rebalance; CVaR is the mean of the worst 5 %
of days. t are of paired differences, Newey-West with the larger of 4 (n/100)^(2/9) and two holding periods as lags.
About 130 comparisons are printed: |t| < 3 is no finding.

bars    minimum variance every 21 days on at most 500 days of history, from the first complete 500 on: the bundled 20
        shares (1990-2022: first day held in December 1991) and etf18 (18 funds, not shipped), on which the ensemble's
        windows, weights and diagonal were chosen, and us200 (not shipped; nothing chosen on it: 200 shares, dead ones
        included: an asset without a return becomes cash until the next rebalance, and has none below a dollar, at
        jumps of 90 %, or after a year in which it stood still on 12 % of the days).
share   the generator's share, every 63 days (fewer rebalances, because a generator takes a second a date): minimum
        variance on a generator's covariance against S + s^2 diag(S) at the same condition number, and minimum CVaR on
        8,000 scenarios (one seed at all dates, demeaned, long only; --gross: long and short up to a gross exposure of
        2) against minimum variance on the covariance of the same scenarios, against CVaR on history, and half and half.
speed   400 rebalances x 10 estimators on 20 assets, start-up included; two processes against one; closed forms of many
        windows at once against one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone
from sklearn.covariance import OAS, LedoitWolf

from finediff.backtest import Strategy, compare, walk_forward
from finediff.covariance import (
    ClippedCovariance,
    ConstantCorrelationShrinkage,
    FactorAnalyticCovariance,
    QuadraticInverseShrinkage,
    RotationallyInvariantCovariance,
    ScenarioCovariance,
    StudentTCovariance,
    WindowEnsembleCovariance,
    matched_diagonal_shrinkage,
)
from finediff.generators import (
    CopulaGenerator,
    FactorDiffusionGenerator,
    RidgeScoreGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.panel import load_prices, to_returns
from finediff.portfolio import GrossExposure, LongOnly, MinimumCVaR, MinimumVariance

SHARED = Path(__file__).parents[2] / "shared/data"
LEAST_PRICE, STALE = 1.0, 0.12  # dollars; share of days of a year without a move
LONG = MinimumVariance([LongOnly()])
BARS: list[dict] = []


def bar(name: str, value: float, high: float, unit: str = " %") -> None:
    met = bool(value <= high)
    BARS.append({"bar": name, "value": float(value), "high": float(high), "met": met})
    print(
        f"  bar {name}: {value:.4g}{unit}, at most {high:.4g}{unit}: {'met' if met else 'NOT met'}",
        flush=True,
    )


# ------------------------------------------------------------------ panels


def bundled() -> pd.DataFrame:
    return to_returns(load_prices())


def shared(name: str) -> pd.DataFrame | None:
    file = SHARED / name
    if not file.exists():
        print(f"\n{name}: not on this machine, left out")
        return None
    prices = pd.read_csv(file, index_col=0, parse_dates=True)
    returns = prices.where(prices >= LEAST_PRICE).pct_change(fill_method=None).iloc[1:]
    # A name that hardly trades, or jumps tenfold from pennies, has prices but no returns that could be earned.
    still = (returns == 0).rolling(252, min_periods=1).mean() > STALE
    return returns.mask(still | (returns.abs() > 0.9))


# ------------------------------------------------------------------ bars


def estimators(slow: bool = True) -> dict:
    table = {
        "1/N": "equal",
        "sample": "history",
        "Ledoit-Wolf": LedoitWolf(),
        "OAS": OAS(),
        "constant correlation": ConstantCorrelationShrinkage(),
        "clip": ClippedCovariance(),
        "RIE": RotationallyInvariantCovariance(),
        "QIS 252": Strategy(QuadraticInverseShrinkage(), window=252),
        "QIS 500": QuadraticInverseShrinkage(),
        "Student t": StudentTCovariance(),
        "ensemble": WindowEnsembleCovariance(),
    }
    if slow:
        table |= {
            # As first published in this table: four windows about their means, all days alike.
            "ensemble, four windows": WindowEnsembleCovariance(
                (63, 126, 252, 500), devolatilise=0, assume_centered=False
            ),
            "ensemble, EWMA": WindowEnsembleCovariance(current=0.15),
            "ensemble, GARCH": WindowEnsembleCovariance(current=0.1, volatility="garch"),
            "ensemble, shorter, GARCH": WindowEnsembleCovariance(
                (21, 42, 63, 84, 126, 189, 252, 315, 378, 500), current=0.1, volatility="garch"
            ),
        }
    if slow:
        table |= {
            "factor-analytic": FactorAnalyticCovariance(),
            "Student t generator": StudentTGenerator(),
            "smoothed bootstrap": SmoothedBootstrapGenerator(),
            "copula generator": CopulaGenerator(),
            "ridge, base alone": RidgeScoreGenerator(directions=0, device="cpu"),
        }
    return table


class Once(BaseEstimator):
    """An estimator that is fitted once for each history, whatever asks: long and short, and long only."""

    kept: dict = {}  # noqa: RUF012 (shared on purpose)

    def __init__(self, estimator):
        self.estimator = estimator

    def fit(self, X, y=None):
        key = repr(self.estimator), X.index[-1], X.shape, tuple(X.columns)
        if key not in self.kept:
            fitted = clone(self.estimator)
            if hasattr(fitted, "sample"):
                fitted = ScenarioCovariance(fitted.set_params(random_state=0), random_state=0)
            self.kept[key] = fitted.fit(X).covariance_
        self.covariance_ = self.kept[key]
        return self


def both_ways(given: dict) -> dict:
    """Every strategy unconstrained, and long only."""
    table = {}
    for name, strategy in given.items():
        strategy = strategy if isinstance(strategy, Strategy) else Strategy(strategy)
        plain = isinstance(strategy.estimator, str)
        estimator = strategy.estimator if plain else Once(strategy.estimator)
        table[f"{name}, long and short"] = Strategy(estimator, MinimumVariance(), strategy.window)
        table[f"{name}, long only"] = Strategy(estimator, LONG, strategy.window)
    return table


def bars_table(returns: pd.DataFrame, given: dict, n_jobs: int) -> pd.DataFrame:
    Once.kept.clear()
    result = walk_forward(returns, both_ways(given), window=500, step=21, n_jobs=n_jobs)
    held, summary = result.returns, result.summary()
    print(f"  {held.index[0].date()} to {held.index[-1].date()}, {len(result.windows)} rebalances")
    parts = {}
    for way in ("long and short", "long only"):
        keys = [f"{name}, {way}" for name in given]
        part = summary.loc[keys].set_axis(list(given))
        tests = compare(held[keys].set_axis(list(given), axis=1), "QIS 252", holding=result.holding)
        parts[way] = pd.DataFrame(
            {
                "vol %": 100 * part["annual volatility"],
                "t": tests[("volatility", "t")].reindex(list(given)),
                "CVaR %": 100 * part["ES"],
                "Sharpe": part["Sharpe"],
                "+-": part["Sharpe high"] - part["Sharpe"],
                "turnover": part["turnover"],
                "gross": part["gross exposure"],
                "CPU s": part["seconds"],
            }
        )
    table = pd.concat(parts, axis=1)
    hidden = [("long only", "gross"), ("long only", "CPU s")]
    print(table.drop(columns=hidden).round(3).to_string(na_rep=""))
    print("  t: of the variance against QIS 252; CPU s: fits, which long only has for nothing, and solves")
    return table


def bars_part(n_jobs: int) -> dict:
    found = {}
    print("\nbundled: minimum variance, 20 shares", flush=True)
    table = bars_table(bundled(), estimators(), n_jobs)
    found["bundled"] = table
    free, long = table["long and short"], table["long only"]
    bar("bundled, ensemble, long and short", free.loc["ensemble", "vol %"], 14.65)
    bar("bundled, ensemble, long only", long.loc["ensemble", "vol %"], 14.72)
    bar(
        "bundled, today's volatility, long and short (stretch)",
        free.loc[["ensemble, EWMA", "ensemble, GARCH", "ensemble, shorter, GARCH"], "vol %"].min(),
        14.45,
    )
    for way, part in (("long and short", free), ("long only", long)):
        bar(
            f"bundled, turnover, {way}, against QIS 252",
            *part.loc[["ensemble", "QIS 252"], "turnover"],
            unit="",
        )
    for file, label in (("etf18_2006_2022.csv.gz", "etf18"), ("us200_2000_2014.csv.gz", "us200")):
        returns = shared(file)
        if returns is None:
            continue
        print(f"\n{label}: minimum variance{', nothing chosen on it' * (label == 'us200')}", flush=True)
        given = estimators(slow=False)
        table = found[label] = bars_table(returns, given, n_jobs)
        free, long = table["long and short"], table["long only"]
        if label == "etf18":
            bar("etf18, ensemble, long and short", free.loc["ensemble", "vol %"], 4.62)
            bar("etf18, ensemble, long only", long.loc["ensemble", "vol %"], 5.08)
        for way, part in (("long and short", free), ("long only", long)):
            pair = part.loc[["ensemble", "QIS 252"], "turnover"]
            bar(f"{label}, turnover, {way}, against QIS 252", *pair, unit="")
    print("\nWho wins:")
    for label, table in found.items():
        for way in ("long and short", "long only"):
            part = table[way].drop(index="1/N")
            best = part["vol %"].idxmin()
            print(
                f"  {label}, {way}: {best} {part.loc[best, 'vol %']:.2f} %; ensemble "
                f"{part.loc['ensemble', 'vol %']:.2f} % (t {part.loc['ensemble', 't']:.1f} against QIS 252)"
            )
    return {label: as_rows(table) for label, table in found.items()}


# ------------------------------------------------------------------ the generator's share


class Remembered(BaseEstimator):
    """A generator that is fitted, and drawn from, once for each history, whatever asks."""

    kept: dict = {}  # noqa: RUF012 (shared on purpose)

    def __init__(self, generator, n_scenarios=8000, random_state=0):
        self.generator = generator
        self.n_scenarios = n_scenarios
        self.random_state = random_state

    def fit(self, X, y=None):
        key = repr(self.generator), X.index[-1], len(X)
        if key not in self.kept:
            fitted = clone(self.generator).set_params(random_state=self.random_state).fit(X)
            rows = np.asarray(fitted.sample(self.n_scenarios, random_state=self.random_state))
            self.kept[key] = rows, getattr(fitted, "covariance_", None)
        self.rows_, covariance = self.kept[key]
        if covariance is not None:
            self.covariance_ = covariance
        return self

    def sample(self, n_samples=1000, *, random_state=None):
        return self.rows_[:n_samples]


class Drawn(BaseEstimator):
    """The covariance of exactly the scenarios that minimum CVaR is solved on."""

    def __init__(self, generator):
        self.generator = generator

    def fit(self, X, y=None):
        self.covariance_ = np.cov(clone(self.generator).fit(X).rows_, rowvar=False)
        return self


class Matched(BaseEstimator):
    """S + s^2 diag(S) at the condition number of another estimate."""

    def __init__(self, estimator):
        self.estimator = estimator

    def fit(self, X, y=None):
        other = clone(self.estimator).fit(X).covariance_
        self.covariance_, self.intensity_ = matched_diagonal_shrinkage(np.cov(X, rowvar=False), other)
        return self


def generators() -> dict:
    return {
        "ridge": RidgeScoreGenerator(device="cpu"),
        "factor": FactorDiffusionGenerator(residual=False, device="cpu"),
        "copula": CopulaGenerator(),
        "Student t": StudentTGenerator(),
        "smoothed bootstrap": SmoothedBootstrapGenerator(),
    }


def share_strategies(constraints) -> dict:
    cvar = MinimumCVaR(level=0.05, constraints=constraints, demean=True, method="newton")
    bound = MinimumVariance(constraints)
    ensemble = WindowEnsembleCovariance()
    table = {
        "1/N": None,
        "sample": "history",
        "QIS 500": QuadraticInverseShrinkage(),
        "ensemble": ensemble,
        "ensemble, bound": (ensemble, bound),
        "sample, bound": ("history", bound),
        "history CVaR": ("history", cvar),
    }
    for name, generator in generators().items():
        kept = Remembered(generator)
        covariance = ScenarioCovariance(kept, n_scenarios=8000, chunk=8000)
        table |= {
            f"{name} covariance": covariance,
            f"{name} matched": Matched(covariance),
            f"{name} covariance, bound": (covariance, bound),
            f"{name} matched, bound": (Matched(covariance), bound),
            f"{name} drawn, bound": (Drawn(kept), bound),
            f"{name} CVaR": Strategy(kept, cvar),
            f"{name} half CVaR": Strategy(kept, cvar, history=0.5),
        }
    return table


def share_part(gross: bool) -> dict:
    constraints, bound = ([GrossExposure(2.0)], "gross exposure 2") if gross else ([LongOnly()], "long only")
    print(f"\nthe generator's share: bundled 20 shares, every 63 days, constraint: {bound}", flush=True)
    began = time.process_time()
    Remembered.kept.clear()
    result = walk_forward(bundled(), share_strategies(constraints), window=500, step=63)
    summary = result.summary()
    shown = {
        "vol %": 100 * summary["annual volatility"],
        "CVaR %": 100 * summary["ES"],
        "turnover": summary["turnover"],
        "gross": summary["gross exposure"],
    }
    print(pd.DataFrame(shown).round(3).to_string())
    print(f"  {len(result.windows)} rebalances, {time.process_time() - began:.0f} CPU s")
    names, rows = list(generators()), []
    pairs = [("covariance, long and short, against equal shrinkage", "{} covariance", "{} matched")]
    pairs += [("covariance, long and short, against the ensemble", "{} covariance", "ensemble")]
    pairs += [
        (f"covariance, {bound}, against equal shrinkage", "{} covariance, bound", "{} matched, bound"),
        ("CVaR against minimum variance on the same scenarios", "{} CVaR", "{} drawn, bound"),
        ("CVaR against CVaR on history", "{} CVaR", "history CVaR"),
        ("half and half against CVaR on history", "{} half CVaR", "history CVaR"),
        ("CVaR against minimum variance on the ensemble", "{} CVaR", "ensemble, bound"),
        ("half and half against minimum variance on the ensemble", "{} half CVaR", "ensemble, bound"),
    ]
    wanted = [(what, name, a.format(name), b.format(name)) for what, a, b in pairs for name in names]
    wanted += [
        ("CVaR on history against minimum variance on the sample", "history", "history CVaR", "sample, bound")
    ]
    wanted += [
        ("minimum variance on the ensemble against CVaR on history", "-", "ensemble, bound", "history CVaR")
    ]
    for what, name, a, b in wanted:
        test = compare(result.returns[[a, b]], b, holding=result.holding).loc[a]
        rows.append(
            {
                "what": what,
                "generator": name,
                "volatility %": test[("volatility", "difference")],
                "t vol": test[("volatility", "t")],
                "CVaR %": test[("CVaR", "difference")],
                "t CVaR": test[("CVaR", "t")],
                "turnover": summary.loc[a, "turnover"] - summary.loc[b, "turnover"],
            }
        )
    table = pd.DataFrame(rows).set_index(["what", "generator"])
    print("\ndifferences in % of the second; below 0 the first is better")
    print(table.round(2).to_string())
    verdict(table, bound)
    return {"constraint": bound, "strategies": as_rows(pd.DataFrame(shown)), "differences": rows}


def verdict(table: pd.DataFrame, bound: str) -> None:
    """What the differences allow to be said."""
    print(f"\nIn words ({bound}, 63 days, 20 shares):")
    for what, part in table.groupby(level=0, sort=False):
        t = "t vol" if "covariance" in what else "t CVaR"
        better = [name for (_, name), row in part.iterrows() if row[t] < -3]
        worse = [name for (_, name), row in part.iterrows() if row[t] > 3]
        said = "; ".join(
            f"significantly {word}: {', '.join(found)}"
            for word, found in (("better", better), ("worse", worse))
            if found
        )
        print(f"  {what}: {said or 'no difference that these days can show (|t| < 3)'}")
    asked = (
        "covariance, long and short, against equal shrinkage",
        "CVaR against minimum variance on the same scenarios",
    )
    adds = [(what, name) for what in asked for name in table.loc[what].index if _t(table, what, name) < -3]
    best = table.loc["half and half against minimum variance on the ensemble"]
    if not adds and (best["t CVaR"] > -3).all():
        print(
            "  The generators add nothing that can be shown: neither to shrinkage of equal strength, nor by their tails to\n"
            "  minimum variance. Minimum variance on the ensemble is the default."
        )
    else:
        print(f"  A generator adds to what it is compared with: {adds}")
    what = "half and half against CVaR on history"
    repaired = [name for name in table.loc[what].index if _t(table, what, name) < -3]
    row = table.loc[("minimum variance on the ensemble against CVaR on history", "-")]
    print(
        f"  CVaR on history, half replaced by scenarios, is {'better with ' + ', '.join(repaired) if repaired else 'not shown to be better'}"
        f" in realised CVaR;\n  minimum variance on the ensemble has {row['CVaR %']:+.1f} % of its CVaR (t {row['t CVaR']:.1f}) and "
        f"{row['volatility %']:+.1f} % of its volatility (t {row['t vol']:.1f})."
    )


def _t(table: pd.DataFrame, what: str, name: str) -> float:
    return table.loc[(what, name), "t vol" if "covariance" in what else "t CVaR"]


# ------------------------------------------------------------------ speed


def ten() -> dict:
    table = estimators(slow=False)
    return {name: table[name] for name in table if name != "1/N"}


def four_hundred() -> pd.DataFrame:
    return bundled().iloc[-(500 + 400 * 19) :]


def job(n_jobs: int) -> None:
    result = walk_forward(four_hundred(), ten(), window=500, step=19, n_jobs=n_jobs)
    assert len(result.windows) == 400, len(result.windows)


def many_at_once() -> float:
    """CPU time of a back-test whose closed forms are fitted window by window, over that of one that stacks them."""
    closed = {name: one for name, one in ten().items() if name in ("clip", "RIE", "QIS 500", "ensemble")}
    returns, together, seconds = bundled(), Strategy.many_inputs, []
    for way in (together, lambda self, histories: None):
        Strategy.many_inputs = way
        try:
            began = time.process_time()
            result = walk_forward(returns, closed, window=500, step=10)
            seconds.append((time.process_time() - began, result))
        finally:
            Strategy.many_inputs = together
    assert seconds[0][1].weights.equals(seconds[1][1].weights)
    return seconds[1][0] / seconds[0][0]


def speed_part() -> dict:
    print("\nspeed: 400 rebalances x 10 estimators on 20 assets, wall clock", flush=True)
    found = {}
    for n_jobs in (1, 2):
        began = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--job", str(n_jobs)], check=True)
        found[f"{n_jobs} with start-up, s"] = time.perf_counter() - began
    bar("400 x 10 in a fresh process, two workers", found["2 with start-up, s"], 90, " s")
    heavy = {"factor-analytic": FactorAnalyticCovariance(), "Student t": StudentTCovariance()}
    returns = bundled()

    def wall(n_jobs):
        began = time.perf_counter()
        result = walk_forward(returns, heavy, window=500, step=10, n_jobs=n_jobs)
        return time.perf_counter() - began, result

    one, first = wall(1)
    wall(2)  # starts the workers
    two, second = wall(2)
    assert first.returns.equals(second.returns)
    assert first.weights.equals(second.weights)
    found |= {"1 process, s": one, "2 processes, s": two, "speed-up": one / two}
    found["closed forms one by one over many at once, CPU"] = many_at_once()
    for name, value in found.items():
        print(f"  {name}: {value:.2f}")
    print(
        "  processes: 782 windows x 2 slow estimators, workers up; closed forms: 782 windows x 4, one process; the numbers "
        "are the same to the last bit"
    )
    return found


# ------------------------------------------------------------------ all of it


def as_rows(table: pd.DataFrame) -> list[dict]:
    flat = table.set_axis([": ".join(c) if isinstance(c, tuple) else c for c in table.columns], axis=1)
    return [{"strategy": str(name)} | row for name, row in flat.astype(float).to_dict("index").items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", default=["bars", "share", "speed"], choices=["bars", "share", "speed"]
    )
    parser.add_argument(
        "--gross", action="store_true", help="the generator's share with gross exposure 2 too"
    )
    parser.add_argument("--n-jobs", type=int, default=1, help="workers of the bars")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.job)
        return
    result = {}
    if "bars" in options.parts:
        result["bars table"] = bars_part(options.n_jobs)
    if "share" in options.parts:
        result["share"] = [share_part(gross) for gross in ([False, True] if options.gross else [False])]
    if "speed" in options.parts:
        result["speed"] = speed_part()
    result["bars"] = BARS
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The main job: a panel of returns in; scenarios, covariances, portfolios, tail risk and their judgement out.

    returns -> train | held-out rows, split at random and in time
            -> every generator fitted on the training rows, its scenarios judged on the held-out ones
            -> covariances, portfolios and tail risk from the chosen generator's scenarios
            -> a walk-forward over all rows in order of time, every covariance estimated anew at each decision

Everything else in a `Study` is about one fit: the model that made the scenarios is the one that was judged.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.covariance import LedoitWolf

from finediff.covariance import (
    ScenarioCovariance,
    clip,
    matched_diagonal_shrinkage,
    n_factors,
    quadratic_inverse_shrinkage,
)
from finediff.panel import Finding, check_panel, random_split, split
from finediff.portfolio import Allocation, LongOnly, MaximumSharpe, MaximumWeight, MinimumVariance
from finediff.report.verdicts import MATCHED, Verdict, verdicts
from finediff.report.walk import Walks, walks
from finediff.risk import annual_volatility, tail_risk_table
from finediff.validation import TailTest, ValidationReport, joint_crashes, judge, qq_data, tail_test

_LEAST_ROWS = 20  # below, nothing can be judged
_SPLITS = 400  # random splits behind the bounds: a p-value of 5 % is known to 1 %


@dataclass(frozen=True, eq=False)
class SplitResult:
    """All generators on one split of the rows.

    Attributes
    ----------
    description : str
    table : DataFrame
        `finediff.validation.judge`'s, with "fit s", "sample s" and "network evaluations".
    report : ValidationReport
        Of the chosen generator.
    qq : DataFrame
        Quantiles of the equal-weighted portfolio and of every asset, held-out rows against scenarios.
    excess : DataFrame (generators, metrics)
        Distances in units of the joint bounds.
    """

    description: str
    table: pd.DataFrame
    report: ValidationReport
    qq: pd.DataFrame
    excess: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Study:
    """All that a report shows, and what the commands write.

    `tail` has the tail figures of the portfolios, `tail_test` their gaps beside what chance gives (None where
    there is no figure); `crash_error` is the standard error of the log ratio of joint crashes, scenarios over rows
    held out at random (NaN where there is none). Both count the error of the training rows.
    """

    title: str
    subtitle: str
    returns: pd.DataFrame
    train: pd.DataFrame
    held_out: pd.DataFrame
    findings: list[Finding]
    generator_name: str
    scenarios: pd.DataFrame
    histories: Mapping[str, object]
    splits: Mapping[str, SplitResult]
    covariances: Mapping[str, pd.DataFrame]
    covariance_table: pd.DataFrame
    n_train: int
    allocations: Mapping[str, Allocation]
    tail: pd.DataFrame
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    caveats: tuple[str, ...] = ()
    fit_summary: str = ""
    walks: Walks = field(default_factory=Walks)
    tail_test: TailTest | None = None
    crash_error: float = float("nan")


def study(
    returns: pd.DataFrame,
    generators: Mapping[str, object],
    *,
    title: str,
    held_out: float = 0.3,
    n_scenarios: int = 10_000,
    max_weight: float = 0.2,
    quarters: int | None = None,
    random_state: int = 0,
    n_jobs: int = -1,
    findings: Sequence[Finding] | None = None,
    caveats: Sequence[str] = (),
    manifest: dict | None = None,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Run the main job.

    Parameters
    ----------
    returns : DataFrame (n, d)
        Simple returns per period, complete.
    generators : mapping of name to unfitted generator
        The first is the chosen one: scenarios, covariances and portfolios are its own. The rest are rivals.
    held_out : float
        Share of rows kept from every generator, at random and, for the second split, at the end.
    title : str
        Heading of the report.
    n_scenarios : int
        Rows drawn from the chosen generator.
    max_weight : float
        Cap of the long-only portfolios; raised to 1.5/d where it could not sum to 1.
    quarters : int, optional
        Decisions of the walk-forward at which the chosen generator is fitted anew; 0: none. None: 40, or none where
        it trains by iteration or the panel has more than 30 assets.
    random_state : int
        Of the splits, the draws and the judgement; the generators carry their own.
    n_jobs : int
        Processes over the fits; -1 for all cores.
    findings : sequence of Finding, optional
        Of the panel as it came, before anything was dropped; by default the returns are checked.
    caveats : sequence of str
        Sentences about this panel that its reader must know.
    manifest : dict, optional
        Kept in the study; see `finediff.provenance.manifest`.
    say : function of one line, optional
        Told about progress; by default standard error.

    Returns
    -------
    Study
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    seeds = np.random.SeedSequence(random_state).generate_state(3)
    chosen = next(iter(generators))
    least = min(int(len(returns) * held_out), len(returns) - int(len(returns) * held_out))
    if least < _LEAST_ROWS:
        raise ValueError(
            f"expected at least {_LEAST_ROWS} rows for training and for judging, got {least} of {len(returns)}: "
            "give a longer panel, or another share held out"
        )
    findings = list(check_panel(returns) if findings is None else findings)
    parts = {
        "random": random_split(returns, held_out, random_state=int(seeds[0])),
        "chronological": split(returns, held_out),
    }
    jobs = [(where, name) for where in parts for name in generators]
    n_rows = {where: min(n_scenarios, max(len(train), len(test))) for where, (train, test) in parts.items()}
    tasks = (
        delayed(_fit_and_sample)(
            generators[name],
            parts[where][0],
            n_scenarios if (where, name) == ("random", chosen) else n_rows[where],
            int(seeds[1]),
        )
        for where, name in jobs
    )
    fitted: dict[tuple[str, str], _Fitted] = {}
    # Longest first would finish sooner; the order of the mapping keeps what is printed readable.
    for (where, name), result in zip(jobs, Parallel(n_jobs=n_jobs, return_as="generator")(tasks)):
        fitted[where, name] = result
        say(
            f"  fitted {name} on the {where} split in {result.fit_seconds:.1f} s ({len(fitted)} of {len(jobs)})"
        )

    splits = {}
    for where, (train, test) in parts.items():
        say(f"  judging {len(generators)} generators on {len(test)} rows they never saw ({where} split)")
        scenarios = {name: fitted[where, name].scenarios for name in generators}
        splits[where] = _judge(where, train, test, scenarios, chosen, fitted, int(seeds[2]))

    train, test = parts["random"]
    scenarios = fitted["random", chosen].scenarios
    say("  covariances, portfolios and tail risk")
    covariances = _covariances(train, _Drawn(scenarios))
    allocations = _allocations(scenarios, covariances["scenarios"], max_weight)
    portfolios = {name: allocation.weights for name, allocation in allocations.items()}
    say("  walk-forward")
    walked = walks(
        returns,
        chosen,
        generators[chosen],
        iterative=fitted["random", chosen].history is not None,
        quarters=quarters,
        random_state=int(seeds[1]),
        n_jobs=n_jobs,
    )
    # A level with less than one held-out row beyond it cannot be judged.
    levels = [a for a in (0.01, 0.05) if a * min(len(test), len(scenarios)) >= 1]
    result = Study(
        title=title,
        subtitle=f"{returns.shape[1]} assets, {len(returns):,} periods, {_day(returns.index[0])} to {_day(returns.index[-1])}",
        returns=returns,
        train=train,
        held_out=test,
        findings=findings,
        generator_name=chosen,
        scenarios=scenarios,
        histories={name: h for name in generators if (h := fitted["random", name].history) is not None},
        splits=splits,
        covariances=covariances,
        covariance_table=_covariance_table(covariances, test, len(train)),
        n_train=len(train),
        allocations=allocations,
        tail=tail_risk_table(test, scenarios, portfolios, levels),
        tail_test=tail_test(test, scenarios, portfolios, levels, train=train, random_state=int(seeds[2]))
        if levels
        else None,
        crash_error=joint_crashes(test, scenarios, train=train, random_state=int(seeds[2])),
        manifest=manifest or {},
        caveats=tuple(caveats),
        fit_summary=fitted["random", chosen].summary,
        walks=walked,
    )
    return replace(result, verdicts=verdicts(result))


@dataclass(frozen=True)
class _Fitted:
    scenarios: pd.DataFrame
    history: object | None
    evaluations: int
    summary: str
    fit_seconds: float
    sample_seconds: float


def _fit_and_sample(generator, train: pd.DataFrame, n: int, seed: int) -> _Fitted:
    generator = clone(generator)
    began = time.perf_counter()
    generator.fit(train)
    fitted = time.perf_counter()
    scenarios = generator.sample(n, random_state=seed)
    return _Fitted(
        scenarios,
        getattr(generator, "history_", None),
        getattr(generator, "evaluations_", 0),
        getattr(generator, "fit_summary_", ""),
        fitted - began,
        time.perf_counter() - fitted,
    )


def _judge(where, train, test, scenarios, chosen, fitted, seed) -> SplitResult:
    judged = judge(test, scenarios, train, n_null=_SPLITS, random_state=seed)
    table = judged.table.copy()
    for column, value in (
        ("fit s", lambda f: f.fit_seconds),
        ("sample s", lambda f: f.sample_seconds),
        ("network evaluations", lambda f: f.evaluations),
    ):
        table[column] = pd.Series({name: value(fitted[where, name]) for name in scenarios})
    described = {
        "random": f"{len(train):,} training rows at random, judged on the other {len(test):,}",
        "chronological": f"trained until {_day(train.index[-1])}, judged on the {len(test):,} rows from "
        f"{_day(test.index[0])}",
    }
    return SplitResult(
        description=described[where],
        table=table,
        report=judged.reports[chosen],
        qq=qq_data(test, scenarios[chosen], assets=list(test.columns)),
        excess=judged.excess,
    )


class _Drawn:
    """Scenarios that were drawn already, as a generator: nothing is sampled twice."""

    def __init__(self, scenarios: pd.DataFrame) -> None:
        self.scenarios, self.at = scenarios, 0

    def fit(self, X, y=None):
        return self

    def sample(self, n_samples=1, *, random_state=None):
        rows = self.scenarios.iloc[self.at : self.at + n_samples]
        self.at += n_samples
        return rows


def _covariances(train: pd.DataFrame, drawn: _Drawn) -> dict[str, pd.DataFrame]:
    n, names = len(train), train.columns
    sample = train.cov()
    m = len(drawn.scenarios)
    from_scenarios = ScenarioCovariance(drawn, n_scenarios=m, prefit=True).fit(train).covariance_
    from_scenarios = pd.DataFrame(from_scenarios, names, names)
    scale = train.std().to_numpy()
    shrunk = LedoitWolf().fit(train.to_numpy() / scale).covariance_ * np.outer(scale, scale)
    return {
        "sample": sample,
        "Marchenko-Pastur clip": clip(sample, n),
        "Ledoit-Wolf": pd.DataFrame(shrunk, names, names),
        "nonlinear shrinkage": quadratic_inverse_shrinkage(sample, n),
        "scenarios": from_scenarios,
        "scenarios + clip": clip(from_scenarios, n),
        MATCHED: matched_diagonal_shrinkage(sample, from_scenarios)[0],
    }


def _covariance_table(covariances, test: pd.DataFrame, n_train: int) -> pd.DataFrame:
    truth = test.cov().to_numpy()
    rows = {}
    for name, covariance in {**covariances, "held-out rows": test.cov()}.items():
        matrix = covariance.to_numpy()
        weights = MinimumVariance().solve(covariance=covariance).weights
        rows[name] = {
            "condition number": float(np.linalg.cond(matrix)),
            "error to held-out (%)": 100 * float(np.linalg.norm(matrix - truth) / np.linalg.norm(truth)),
            "held-out volatility of its minimum-variance portfolio (%)": 100
            * annual_volatility(test, weights=weights),
            "factors": n_factors(covariance, n_train),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _allocations(
    scenarios: pd.DataFrame, covariance: pd.DataFrame, max_weight: float
) -> dict[str, Allocation]:
    d = len(covariance)
    mean = scenarios.mean()
    constraints = [LongOnly(), MaximumWeight(max(max_weight, min(1.0, 1.5 / d)))]
    equal = pd.Series(1 / d, index=covariance.columns)
    found = {
        "equal weight": Allocation(
            weights=equal,
            expected_return=float(mean @ equal),
            volatility=float(np.sqrt(equal @ covariance @ equal)),
            status="given",
            name="equal weight",
        ),
        "minimum variance": MinimumVariance(constraints).solve(covariance=covariance, mean=mean),
    }
    # Where no allowed portfolio earns anything there is no maximum Sharpe portfolio, and the report says so.
    with contextlib.suppress(ValueError):
        found["maximum Sharpe"] = MaximumSharpe(constraints).solve(covariance=covariance, mean=mean)
    return found


def _day(label) -> str:
    return f"{label:%Y-%m-%d}" if hasattr(label, "strftime") else str(label)

"""The verbs of portfolios: covariance, optimise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finediff.cli.app import app
from finediff.cli.files import covariance_of, read_scenarios, read_table, returns_of, write_table
from finediff.cli.options import (
    End,
    Estimator,
    Kind,
    KindOption,
    Missing,
    MissingOption,
    NoShorts,
    Objective,
    Panel,
    Seed,
    Source,
    Start,
    Table,
)
from finediff.cli.wishes import limits_of


@app.command()
def covariance(
    panel: Panel,
    estimator: Annotated[
        Estimator | None,
        typer.Option(
            help="How, without --model: by default window-ensemble, which held out best (sample with --clean).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Fitted generator, whose covariance is used instead.")
    ] = None,
    source: Annotated[
        Source, typer.Option(help="Of a generator: what its law implies, or scenarios.")
    ] = Source.implied,
    clean: Annotated[
        bool, typer.Option("--clean", help="Marchenko-Pastur clipping on top; held out it often costs.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", min=2, help="Scenarios used.")] = 10_000,
    out: Table = Path("covariance.parquet"),
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
) -> None:
    """Covariance of a panel: of the returns themselves, shrunk or cleaned, or of a generator."""
    import numpy as np
    import pandas as pd

    from finediff.covariance import ScenarioCovariance, clip, n_factors

    if model is not None and estimator is not None:
        raise ValueError(
            f"expected --model or --estimator, got both: leave out --estimator {estimator.value}, or --model"
        )
    returns = returns_of(panel, kind, missing, start, end)
    holes = bool(returns.isna().to_numpy().any())
    if holes and model is None:
        raise ValueError(
            "expected --model with missing returns, got none: fit one by finediff fit --model factor --missing keep, or choose "
            "--missing drop_rows or drop_assets"
        )
    if model is None:
        # A clip is meant for a sample's noise; what is shrunk already has little left.
        estimator = estimator or (Estimator.sample if clean else Estimator.window_ensemble)
        how = estimator.value
        matrix = returns.cov()
        if estimator is not Estimator.sample:
            fitted = covariance_of(estimator).fit(returns)
            matrix = pd.DataFrame(fitted.covariance_, returns.columns, returns.columns)
        matrix = clip(matrix, len(returns)) if clean else matrix
    else:
        from finediff.generators import ScenarioGenerator

        fitted = ScenarioCovariance(
            ScenarioGenerator.load(model),
            clip if clean else None,
            n_scenarios=n,
            prefit=True,
            random_state=seed,
            source=source.value,
        ).fit(returns)
        matrix = pd.DataFrame(fitted.covariance_, returns.columns, returns.columns)
        error = f", sampling error {fitted.sampling_error_:.1%}" if fitted.source_ == "samples" else ""
        how = f"{type(fitted.generator_).__name__}, {fitted.source_}{error}"
    configuration = {
        "panel": panel,
        "estimator": estimator,
        "model": model,
        "source": source,
        "clean": clean,
        "n": n,
        "missing": missing,
        "start": start,
        "end": end,
    }
    write_table(matrix, out, "covariance", configuration, seed, returns)
    text = f"{how}: {len(matrix)} assets, condition number {np.linalg.cond(matrix):.1f}"
    if not holes:
        text += f" (sample {np.linalg.cond(returns.cov()):.1f}), {n_factors(returns.cov(), len(returns))} factors above the noise edge"
    print(f"{text}: {out}")


@app.command()
def optimise(
    covariance: Annotated[Path, typer.Argument(help="Covariance written by finediff covariance.")],
    objective: Annotated[Objective, typer.Option()] = Objective.min_variance,
    scenarios: Annotated[
        Path | None,
        typer.Option(help="Scenarios or returns: their means are expected returns, their tails the CVaR."),
    ] = None,
    long_only: NoShorts = True,
    max_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest weight of an asset, .1 for 10 %.")
    ] = None,
    gross: Annotated[
        float | None, typer.Option(min=1, help="Largest sum of absolute weights, with --no-long-only.")
    ] = None,
    risk_aversion: Annotated[float, typer.Option(help="Of mean-variance.")] = 5.0,
    level: Annotated[float, typer.Option(help="Of min-cvar: the share of worst scenarios.")] = 0.05,
    groups: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns asset and group, for --group-max and --group-min."),
    ] = None,
    group_max: Annotated[
        list[str] | None,
        typer.Option(help="GROUP=SHARE: largest sum of a group's weights, tech=0.3; may be repeated."),
    ] = None,
    group_min: Annotated[
        list[str] | None,
        typer.Option(help="GROUP=SHARE: smallest sum of a group's weights; may be repeated."),
    ] = None,
    previous: Annotated[Path | None, typer.Option(help="Weights held now (CSV), for --turnover.")] = None,
    turnover: Annotated[float | None, typer.Option(help="Largest sum of absolute trades.")] = None,
    out: Table = Path("weights.csv"),
) -> None:
    """Portfolio weights from a covariance, or from scenarios; long-only unless told otherwise."""
    from finediff.portfolio import (
        GrossExposure,
        LongOnly,
        MaximumSharpe,
        MaximumWeight,
        MeanVariance,
        MinimumCVaR,
        MinimumVariance,
        RiskParity,
        Turnover,
    )

    matrix = read_table(covariance, "covariance")
    constraints: list = [LongOnly()] if long_only and objective is not Objective.risk_parity else []
    if max_weight is not None:
        constraints.append(MaximumWeight(max_weight))
    if gross is not None:
        constraints.append(GrossExposure(gross))
    if (turnover is None) != (previous is None):
        raise ValueError(
            "expected --turnover together with --previous, got one of them: give both, or neither"
        )
    constraints += limits_of(
        groups,
        group_max,
        group_min,
        matrix.columns,
        long_only=long_only or objective is Objective.risk_parity,
    )
    held = None if previous is None else read_table(previous, "weights").iloc[:, 0]
    if turnover is not None:
        constraints.append(Turnover(held, turnover))
    rows = None if scenarios is None else read_scenarios(scenarios)
    if rows is not None and set(rows.columns) != set(matrix.columns):
        strange = next(iter(set(rows.columns) ^ set(matrix.columns)))
        raise ValueError(
            f"expected scenarios of the covariance's assets, got {strange!r} in one of them alone: give those of one panel"
        )
    if rows is None and objective not in (Objective.min_variance, Objective.risk_parity):
        what = "tails" if objective is Objective.min_cvar else "expected returns"
        raise ValueError(f"expected --scenarios for {objective.value}, got none: it needs {what}")
    problem = {
        Objective.min_variance: lambda: MinimumVariance(constraints),
        Objective.max_sharpe: lambda: MaximumSharpe(constraints),
        Objective.mean_variance: lambda: MeanVariance(risk_aversion, constraints),
        Objective.min_cvar: lambda: MinimumCVaR(level, constraints, method="newton"),
        Objective.risk_parity: lambda: RiskParity(constraints=constraints),
    }[objective]()
    found = problem.solve(
        covariance=matrix, mean=None if rows is None else rows.mean(), scenarios=rows, previous=held
    )
    configuration = {
        "covariance": covariance,
        "objective": objective,
        "long_only": long_only,
        "max_weight": max_weight,
        "gross": gross,
        "level": level,
        "scenarios": scenarios,
        "turnover": turnover,
        "previous": previous,
        "groups": groups,
        "group_max": group_max,
        "group_min": group_min,
    }
    write_table(found.weights.rename("weight").to_frame(), out, "optimise", configuration, None, matrix)
    w = found.weights.reindex(matrix.columns)
    limits = [
        "long-only" if long_only or objective is Objective.risk_parity else "long and short",
        *([f"at most {max_weight:.4g} an asset"] if max_weight is not None else []),
        *([f"at most {gross:.4g} gross"] if gross is not None else []),
        *([f"at most {turnover:.4g} traded"] if turnover is not None else []),
        *(f"{wish} at most" for wish in group_max or ()),
        *(f"{wish} at least" for wish in group_min or ()),
    ]
    print(
        f"{objective.value}, {', '.join(limits)}: volatility {float(w @ matrix.to_numpy() @ w) ** 0.5:.4%} a period by the covariance, "
        f"{int((w.abs() > 1e-6).sum())} positions: {out}"
    )

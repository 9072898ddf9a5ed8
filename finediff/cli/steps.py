"""The verbs that do one step: check, fetch, fit, sample, covariance, optimise, validate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from finediff.cli.app import app
from finediff.cli.files import as_frame, generator_of, read_table, returns_of, write_table
from finediff.cli.options import (
    Device,
    End,
    Kind,
    KindOption,
    Missing,
    MissingOption,
    Model,
    Objective,
    Panel,
    Seed,
    Start,
    Steps,
    Table,
)


@app.command()
def check(panel: Panel, kind: KindOption = Kind.prices, start: Start = None, end: End = None) -> None:
    """Look for what is wrong with a panel: exit code 0 clean, 1 with findings, 2 when unreadable."""
    from finediff.panel import check_panel, load_prices

    frame = load_prices(panel, start=start, end=end)
    findings = check_panel(frame, kind=kind.value)
    for finding in findings:
        print(finding)
    print(
        f"{len(frame)} rows, {frame.shape[1]} assets, {len(findings) or 'no'} finding{'s' * (len(findings) != 1)}"
    )
    if findings:
        raise typer.Exit(1)


@app.command()
def fetch(
    tickers: Annotated[str, typer.Argument(help="Comma-separated: AAPL,MSFT,SPY")],
    out: Table = Path("data/prices.parquet"),
    start: Start = None,
    end: End = None,
    refresh: Annotated[bool, typer.Option(help="Ask again even if cached.")] = False,
) -> None:
    """Adjusted closing prices from Yahoo."""
    from finediff.panel import load_prices

    names = [name.strip() for name in tickers.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"expected tickers separated by commas, got {tickers!r}: try finediff fetch AAPL,MSFT"
        )
    prices = load_prices(names, start=start, end=end, refresh=refresh)
    write_table(prices, out, "fetch", {"tickers": tickers, "start": start, "end": end}, None, prices)
    print(f"{len(prices)} rows of {prices.shape[1]} assets: {out}")


@app.command()
def fit(
    panel: Panel,
    out: Annotated[Path, typer.Option(help="Directory of the fitted generator.")] = Path("model"),
    model: Annotated[Model, typer.Option()] = Model.ridge,
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
    device: Device = None,
    steps: Steps = 2500,
) -> None:
    """Fit a generator to a panel and save it (safetensors and JSON)."""
    from finediff.provenance import manifest, refuse_foreign, write_manifest

    refuse_foreign(out, "generator.json")  # before the training, so that nothing is lost
    returns = returns_of(panel, kind, missing, start, end)
    began = time.perf_counter()
    fitted = generator_of(model, seed, device, steps).fit(returns)
    fitted.save(out)
    configuration = {
        "panel": panel,
        "model": model,
        "missing": missing,
        "start": start,
        "end": end,
        "steps": steps,
    }
    write_manifest(
        out / "manifest.json", manifest(command="fit", configuration=configuration, seed=seed, data=returns)
    )
    print(
        f"fitted {model.value} to {len(returns)} x {returns.shape[1]} in {time.perf_counter() - began:.1f} s: {out}"
    )


def _scenarios(out: Path) -> Path:
    """A table, or a directory: what has no ending, or is one already."""
    if not out.is_dir() and out.suffix not in ("", ".parquet", ".csv"):
        raise ValueError(
            f"expected a file ending in .parquet or .csv, or a directory (a name without ending), got {out}: "
            "change --out"
        )
    return out


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="Directory written by finediff fit.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of scenarios.")] = 10_000,
    out: Annotated[
        Path,
        typer.Option(
            help=".parquet or .csv file; or a name without ending, the directory that any number is streamed to.",
            callback=_scenarios,
        ),
    ] = Path("scenarios.parquet"),
    seed: Seed = 0,
    chunk: Annotated[
        int,
        typer.Option(
            min=1, help="Scenarios in memory at once, for a directory; another chunk is another draw."
        ),
    ] = 8192,
    float32: Annotated[
        bool, typer.Option("--float32", help="Half the disk space, 7 digits; for a directory.")
    ] = False,
) -> None:
    """Draw scenarios from a fitted generator, to a table or, more than memory holds, to a directory."""
    from finediff.generators import ScenarioGenerator

    streamed = out.is_dir() or not out.suffix
    if float32 and not streamed:
        raise ValueError(
            f"expected --float32 with a directory, got the file {out}: --out {out.with_suffix('')}"
        )
    generator = ScenarioGenerator.load(model)
    if streamed:
        dtype = "float32" if float32 else "float64"
        generator.sample_to(out, n, chunk=chunk, random_state=seed, dtype=dtype, progress=None)
        print(f"{n} scenarios of {generator.n_features_in_} assets, independent in time: {out}")
        return
    scenarios = as_frame(generator.sample(n, random_state=seed))
    write_table(scenarios, out, "sample", {"model": model, "n": n}, seed, scenarios)
    print(f"{n} scenarios of {scenarios.shape[1]} assets, independent in time: {out}")


@app.command()
def covariance(
    panel: Panel,
    model: Annotated[
        Path | None, typer.Option(help="Fitted generator; the sample covariance without one.")
    ] = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Marchenko-Pastur clipping; held out it often costs.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", min=2, help="Scenarios used.")] = 10_000,
    out: Table = Path("covariance.parquet"),
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
) -> None:
    """Covariance of a panel: from a generator's scenarios or the sample, cleaned."""
    import numpy as np
    import pandas as pd

    from finediff.covariance import ScenarioCovariance, clip, n_factors

    returns = returns_of(panel, kind, missing, start, end)
    if model is None:
        matrix = clip(returns.cov(), len(returns)) if clean else returns.cov()
    else:
        from finediff.generators import ScenarioGenerator

        estimator = ScenarioCovariance(
            ScenarioGenerator.load(model),
            clip if clean else None,
            n_scenarios=n,
            prefit=True,
            random_state=seed,
        ).fit(returns)
        matrix = pd.DataFrame(estimator.covariance_, returns.columns, returns.columns)
    configuration = {
        "panel": panel,
        "model": model,
        "clean": clean,
        "n": n,
        "missing": missing,
        "start": start,
        "end": end,
    }
    write_table(matrix, out, "covariance", configuration, seed, returns)
    print(
        f"{len(matrix)} assets, condition number {np.linalg.cond(matrix):.1f} (sample {np.linalg.cond(returns.cov()):.1f}), "
        f"{n_factors(returns.cov(), len(returns))} factors above the noise edge: {out}"
    )


@app.command()
def optimise(
    covariance: Annotated[Path, typer.Argument(help="Covariance written by finediff covariance.")],
    objective: Annotated[Objective, typer.Option()] = Objective.min_variance,
    scenarios: Annotated[
        Path | None, typer.Option(help="Scenarios or returns whose means are expected returns.")
    ] = None,
    long_only: Annotated[bool, typer.Option(help="No short positions.")] = True,
    max_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest weight of an asset, .1 for 10 %.")
    ] = None,
    risk_aversion: Annotated[float, typer.Option(help="Of mean-variance.")] = 5.0,
    previous: Annotated[Path | None, typer.Option(help="Weights held now (CSV), for --turnover.")] = None,
    turnover: Annotated[float | None, typer.Option(help="Largest sum of absolute trades.")] = None,
    out: Table = Path("weights.csv"),
) -> None:
    """Portfolio weights from a covariance."""
    from finediff.portfolio import (
        LongOnly,
        MaximumSharpe,
        MaximumWeight,
        MeanVariance,
        MinimumVariance,
        Turnover,
    )

    matrix = read_table(covariance, "covariance")
    constraints: list = [LongOnly()] if long_only else []
    if max_weight is not None:
        constraints.append(MaximumWeight(max_weight))
    if (turnover is None) != (previous is None):
        raise ValueError(
            "expected --turnover together with --previous, got one of them: give both, or neither"
        )
    if turnover is not None:
        constraints.append(Turnover(read_table(previous, "weights").iloc[:, 0], turnover))
    mean = None if scenarios is None else read_table(scenarios, "scenarios").mean()
    if mean is None and objective is not Objective.min_variance:
        raise ValueError(f"expected --scenarios for {objective.value}, got none: it needs expected returns")
    problem = {
        Objective.min_variance: lambda: MinimumVariance(constraints),
        Objective.max_sharpe: lambda: MaximumSharpe(constraints),
        Objective.mean_variance: lambda: MeanVariance(risk_aversion, constraints),
    }[objective]()
    found = problem.solve(covariance=matrix, mean=mean)
    configuration = {
        "covariance": covariance,
        "objective": objective,
        "long_only": long_only,
        "max_weight": max_weight,
        "scenarios": scenarios,
        "turnover": turnover,
        "previous": previous,
    }
    write_table(found.weights.rename("weight").to_frame(), out, "optimise", configuration, None, matrix)
    print(
        f"{objective.value}: volatility {found.volatility:.4%} a period, {int((found.weights.abs() > 1e-6).sum())} positions: {out}"
    )


@app.command()
def validate(
    held_out: Annotated[str, typer.Argument(help="Real panel that the generator never saw.")],
    scenarios: Annotated[Path, typer.Argument(help="Scenarios written by finediff sample.")],
    train: Annotated[
        str | None, typer.Option(help="Panel the generator was fitted on: gives the floor.")
    ] = None,
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Annotated[str | None, typer.Option(help="First date of the held-out rows.")] = None,
    end: Annotated[str | None, typer.Option(help="Last date of the held-out rows.")] = None,
    out: Table = Path("validation.csv"),
    seed: Seed = 0,
) -> None:
    """Judge scenarios against real rows, each number beside its real-vs-real floor."""
    from finediff.validation import validate as judge

    real = returns_of(held_out, kind, missing, start, end)
    synthetic = read_table(scenarios, "scenarios")
    rows = None if train is None else returns_of(train, kind, missing, None, None)
    result = judge(real, synthetic, rows, random_state=seed)
    table = result.to_frame()
    write_table(
        table, out, "validate", {"held_out": held_out, "scenarios": scenarios, "train": train}, seed, real
    )
    print(table.to_string(float_format=lambda v: f"{v:.4g}"))
    rows_used = (
        f"{result.settings['rows_real']} real rows against {result.settings['rows_synthetic']} scenarios"
    )
    floor = (
        "the floor is the training rows'" if train else "without --train the floor is halves of the real rows"
    )
    print(f"judged on {rows_used}; {floor}")
    print(result.verdict)

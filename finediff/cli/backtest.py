"""The verb that holds estimators to account: backtest."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from finediff.cli.app import app
from finediff.cli.files import covariance_of, generator_of, returns_of, say
from finediff.cli.options import (
    Device,
    End,
    Estimator,
    Kind,
    KindOption,
    Missing,
    MissingOption,
    Model,
    NoShorts,
    Panel,
    Seed,
    Start,
    Steps,
)
from finediff.cli.stops import kept

_DEFAULT = (Estimator.sample, Estimator.ledoit_wolf, Estimator.qis, Estimator.window_ensemble)


@app.command()
def backtest(
    panel: Panel,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("reports/backtest"),
    estimator: Annotated[
        list[Estimator] | None,
        typer.Option(help=f"May be repeated; {', '.join(e.value for e in _DEFAULT)} by default."),
    ] = None,
    model: Annotated[
        list[Model] | None,
        typer.Option(help="Generators whose covariance is used, fitted at every date; may be repeated."),
    ] = None,
    window: Annotated[int, typer.Option(min=3, help="Rows of history, at most.")] = 500,
    step: Annotated[int, typer.Option(min=1, help="Rows from one decision to the next.")] = 21,
    coverage: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Least share of the history an asset must have; below 1: --model factor."
        ),
    ] = 1.0,
    long_only: NoShorts = False,
    costs: Annotated[
        float, typer.Option(min=0, help="Of trading, as a fraction of what is traded: .001 for 10 bp.")
    ] = 0.0,
    reference: Annotated[
        str | None, typer.Option(help="The strategy that the others are tested against; the last by default.")
    ] = None,
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
    device: Device = None,
    steps: Steps = 2500,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for all cores.")] = -1,
    resume: Annotated[
        Path | None, typer.Option(help="Directory that keeps finished windows, to go on from after a stop.")
    ] = None,
) -> None:
    """Minimum-variance portfolios walked forward, each from the days before it: what held out of sample.

    Long and short, unless --long-only.
    """
    from sklearn.covariance import EmpiricalCovariance

    from finediff.backtest import schedule, walk_forward
    from finediff.covariance import ScenarioCovariance
    from finediff.portfolio import LongOnly, MinimumVariance
    from finediff.provenance import manifest, refuse_foreign, whole_directory

    refuse_foreign(out, "manifest.json")
    strategies: dict = {"equal weights": "equal"}
    chosen = estimator or ([] if model else list(_DEFAULT))
    for e in chosen:
        strategies[e.value] = EmpiricalCovariance() if e is Estimator.sample else covariance_of(e)
    for m in model or []:
        strategies[m.value] = ScenarioCovariance(generator_of(m, seed, device, steps), random_state=seed)
    against = list(strategies)[-1] if reference is None else reference
    if against not in strategies:
        raise ValueError(f"expected --reference among {', '.join(strategies)}, got {against}")
    returns = returns_of(panel, kind, missing, start, end)
    windows = len(schedule(returns.index, window, step))  # before anything is written
    portfolios = windows * len(strategies)
    rule = f"minimum variance, {'long-only' if long_only else 'long and short'}"
    # Without a terminal there is no bar: this line and the last are all that a log shows.
    say(
        f"backtest: {windows} windows x {len(strategies)} strategies = {portfolios} portfolios of {returns.shape[1]} assets, "
        f"{rule}" + (f"; {_count(resume)} kept in {resume}" if resume is not None and resume.is_dir() else "")
    )
    began = time.perf_counter()

    def left() -> str:
        if resume is None:
            return (
                "nothing was written; with --resume DIR finished windows are kept in DIR, and the same command goes on from "
                "them"
            )
        return f"{_count(resume)} of {portfolios} portfolios are kept in {resume}, and the same command goes on from them"

    configuration = {
        "panel": panel,
        "estimators": chosen,
        "models": model or [],
        "window": window,
        "step": step,
        "coverage": coverage,
        "long_only": long_only,
        "costs": costs,
        "reference": against,
        "missing": missing,
        "start": start,
        "end": end,
        "steps": steps,
    }
    about = manifest(command="backtest", configuration=configuration, seed=seed, data=returns)
    with kept(left), whole_directory(out, marker="manifest.json") as partial:
        result = walk_forward(
            returns,
            strategies,
            window,
            step,
            MinimumVariance([LongOnly()] if long_only else []),
            n_jobs=jobs,
            coverage=coverage,
            costs=costs,
            store=resume,
        )
        table, tests = result.summary(), result.compare(against)
        result.returns.to_parquet(partial / "returns.parquet")
        result.weights.to_parquet(partial / "weights.parquet")
        table.drop(columns="seconds").to_csv(partial / "summary.csv")
        tests.to_csv(partial / "comparison.csv")
        (partial / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")
    shown = table[
        ["annual volatility", "annual return", "Sharpe", "Sharpe low", "Sharpe high", "turnover", "ES"]
    ].copy()
    shown[f"t of volatility against {against}"] = tests["volatility"]["t"]
    print(shown.to_string(float_format=lambda v: f"{v:.4f}", na_rep="-"))
    say(f"done in {time.perf_counter() - began:.0f} s")
    dated = hasattr(result.returns.index[0], "strftime")
    span = f", {result.returns.index[0]:%Y-%m-%d} to {result.returns.index[-1]:%Y-%m-%d}" if dated else ""
    print(f"{windows} decisions{span}, {rule}: {out}")


def _count(store: Path) -> int:
    """Portfolios that a directory of finished windows holds."""
    from safetensors.numpy import load_file

    return sum(len(load_file(part)["windows"]) for part in (store / "parts").glob("[0-9]*.safetensors"))

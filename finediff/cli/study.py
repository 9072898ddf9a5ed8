"""The verbs that do the whole job: demo, report; and doctor, which says whether they can."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from finediff.cli.app import app
from finediff.cli.files import checked_returns, generator_of, say
from finediff.cli.options import (
    Device,
    End,
    Kind,
    KindOption,
    Missing,
    MissingOption,
    Model,
    Panel,
    Seed,
    Start,
    Steps,
)

# Seconds to minutes a fit: not fitted anew in the walk-forward.
_SLOW = (Model.factor, Model.ddpm, Model.flow)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("reports/demo"),
    start: Start = "2000-01-01",
    seed: Seed = 0,
    device: Device = None,
    steps: Steps = 2500,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for all cores.")] = -1,
) -> None:
    """The main job on the bundled prices of 20 US shares: scenarios, covariance, weights, report."""
    from finediff.panel import load_prices, to_returns

    began = time.perf_counter()
    say(f"finediff demo: 20 S&P 500 shares from {start}, seed {seed}")
    returns = to_returns(load_prices("sp500", start=start))
    configuration = {"start": start, "device": device, "steps": steps}
    caveat = (
        "The bundled shares were chosen because they survived to 2022: their mean returns, and every expected return in "
        "this report, are too good."
    )
    chosen_here = (
        "The window ensemble's windows and blend were chosen on these shares too: its lead in the walk-forward may be "
        "flattered."
    )
    report_path = run_study(
        returns,
        None,
        (caveat, chosen_here),
        out,
        "demo",
        "Twenty US shares: scenarios and risk",
        Model.ridge,
        seed,
        device,
        steps,
        jobs,
        configuration,
    )
    say(f"done in {time.perf_counter() - began:.0f} s")
    print(f"report: {report_path}")


@app.command()
def report(
    panel: Panel,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("reports/report"),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Scenarios and risk",
    model: Annotated[Model, typer.Option(help="The generator whose scenarios are used.")] = Model.ridge,
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
    device: Device = None,
    steps: Steps = 2500,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for all cores.")] = -1,
) -> None:
    """The main job on a panel of yours."""
    returns, findings = checked_returns(panel, kind, missing, start, end)
    if returns.isna().to_numpy().any():
        raise ValueError(
            f"expected --missing drop_rows or drop_assets for a report, got --missing {missing.value} and returns with holes: "
            "rivals and tests need every return"
        )
    configuration = {
        "panel": panel,
        "model": model,
        "start": start,
        "end": end,
        "missing": missing,
        "steps": steps,
    }
    path = run_study(
        returns, findings, (), out, "report", title, model, seed, device, steps, jobs, configuration
    )
    print(f"report: {path}")


@app.command()
def doctor() -> None:
    """Versions, device, threads, and what is missing."""
    from finediff.generators.score import devices
    from finediff.provenance import missing_packages, package_versions, source_commit

    for name, found in package_versions().items():
        print(f"{name:14} {found or 'MISSING'}")
    print(f"{'commit':14} {source_commit() or 'not a source tree'}")
    for name, found in devices().items():
        print(f"{name:14} {found}")
    absent = missing_packages()
    extras = [
        extra
        for extra, package in (
            ("notebooks", "jupytext"),
            ("distributed", "ray"),
            ("dev", "pytest"),
            ("ode", "torchdiffeq"),
        )
        if not _importable(package)
    ]
    if extras:
        print(f"{'extras':14} not installed: {', '.join(extras)} (pip install 'finediff[{extras[0]}]')")
    if absent:
        raise ValueError(
            f"expected every dependency, got none of {', '.join(absent)}: run pip install finediff again"
        )
    print("nothing is missing")


def run_study(
    returns, findings, caveats, out, command, title, model, seed, device, steps, jobs, configuration
) -> Path:
    """Fit, judge, and write report.html, scenarios, covariance, weights and manifest into one directory."""
    import json

    import pandas as pd

    from finediff.provenance import manifest, whole_directory
    from finediff.report.render import render
    from finediff.report.study import study

    order = [model, *(other for other in Model if other is not model)]
    generators = {m.value: generator_of(m, seed, device, steps) for m in order}
    about = manifest(command=command, configuration=configuration, seed=seed, data=returns)
    # Before the work, so that a name that cannot be written costs nothing.
    with whole_directory(out, marker="manifest.json") as partial:
        result = study(
            returns,
            generators,
            title=title,
            quarters=0 if model in _SLOW else None,
            random_state=seed,
            n_jobs=jobs,
            findings=findings,
            caveats=caveats,
            manifest=about,
            say=say,
        )
        result.scenarios.to_parquet(partial / "scenarios.parquet")
        result.covariances["scenarios"].to_parquet(partial / "covariance.parquet")
        pd.DataFrame({name: a.weights for name, a in result.allocations.items()}).to_csv(
            partial / "weights.csv", index_label="asset"
        )
        (partial / "report.html").write_text(render(result), encoding="utf-8")
        (partial / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")
    say("")
    for section, verdict in result.verdicts.items():
        say(f"{section:12} {verdict.status:5} {verdict.text}")
    return out / "report.html"


def _importable(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None

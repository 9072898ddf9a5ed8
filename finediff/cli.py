"""finediff on the command line: the pipeline's verbs.

Panels come as CSV or Parquet (first column dates), results go to Parquet, CSV or a directory with a manifest.json
beside them; each appears whole or not at all. Bad input is one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="finediff",
    help="Market scenarios from diffusion and flow models, up to a risk report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Model(StrEnum):
    ddpm = "ddpm"
    flow = "flow"
    gaussian = "gaussian"
    student_t = "student-t"
    bootstrap = "bootstrap"
    block_bootstrap = "block-bootstrap"


class Objective(StrEnum):
    min_variance = "min-variance"
    max_sharpe = "max-sharpe"
    mean_variance = "mean-variance"


class Missing(StrEnum):
    error = "error"
    drop_rows = "drop_rows"
    drop_assets = "drop_assets"


class Kind(StrEnum):
    prices = "prices"
    returns = "returns"


Panel = Annotated[str, typer.Argument(help="sp500 (bundled), a .csv or .parquet file, or tickers: AAPL,MSFT")]
KindOption = Annotated[Kind, typer.Option(help="What the panel holds.")]
MissingOption = Annotated[Missing, typer.Option(help="What to do where a price is missing.")]
Start = Annotated[str | None, typer.Option(help="First date used, e.g. 2000-01-01.")]
End = Annotated[str | None, typer.Option(help="Last date used.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same bits.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU if there is one.")]
Steps = Annotated[int, typer.Option(min=1, help="Largest number of training steps of a network.")]


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
    _say(f"finediff demo: 20 S&P 500 shares from {start}, seed {seed}")
    returns = to_returns(load_prices("sp500", start=start))
    configuration = {"start": start, "device": device, "steps": steps}
    report_path = _study(
        returns,
        out,
        "demo",
        "Twenty US shares: scenarios and risk",
        Model.ddpm,
        seed,
        device,
        steps,
        jobs,
        configuration,
    )
    _say(f"done in {time.perf_counter() - began:.0f} s")
    print(f"report: {report_path}")


@app.command()
def report(
    panel: Panel,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("reports/report"),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Scenarios and risk",
    model: Annotated[Model, typer.Option(help="The generator whose scenarios are used.")] = Model.ddpm,
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
    returns = _returns(panel, kind, missing, start, end)
    configuration = {
        "panel": panel,
        "model": model,
        "start": start,
        "end": end,
        "missing": missing,
        "steps": steps,
    }
    print(f"report: {_study(returns, out, 'report', title, model, seed, device, steps, jobs, configuration)}")


@app.command()
def doctor() -> None:
    """Versions, device, threads, and what is missing."""
    import torch

    from finediff.provenance import missing_packages, package_versions, source_commit

    for name, found in package_versions().items():
        print(f"{name:14} {found or 'MISSING'}")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (the CPU is used)"
    print(f"{'commit':14} {source_commit() or 'not a source tree'}")
    print(f"{'GPU':14} {gpu}")
    print(f"{'threads':14} {torch.get_num_threads()} for large networks, 1 for those up to 256 units wide")
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
    out: Annotated[Path, typer.Option(help=".parquet or .csv file.")] = Path("data/prices.parquet"),
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
    _write(prices, out, "fetch", {"tickers": tickers, "start": start, "end": end}, None, prices)
    print(f"{len(prices)} rows of {prices.shape[1]} assets: {out}")


@app.command()
def fit(
    panel: Panel,
    out: Annotated[Path, typer.Option(help="Directory of the fitted generator.")] = Path("model"),
    model: Annotated[Model, typer.Option()] = Model.ddpm,
    kind: KindOption = Kind.prices,
    missing: MissingOption = Missing.error,
    start: Start = None,
    end: End = None,
    seed: Seed = 0,
    device: Device = None,
    steps: Steps = 2500,
) -> None:
    """Fit a generator to a panel and save it (safetensors and JSON)."""
    from finediff.provenance import manifest, write_manifest

    returns = _returns(panel, kind, missing, start, end)
    began = time.perf_counter()
    fitted = _generator(model, seed, device, steps).fit(returns)
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


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="Directory written by finediff fit.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of scenarios.")] = 10_000,
    out: Annotated[Path, typer.Option(help=".parquet or .csv file.")] = Path("scenarios.parquet"),
    seed: Seed = 0,
) -> None:
    """Draw scenarios from a fitted generator."""
    from finediff.generators import ScenarioGenerator

    generator = ScenarioGenerator.load(model)
    scenarios = _frame(generator.sample(n, random_state=seed))
    _write(scenarios, out, "sample", {"model": model, "n": n}, seed, scenarios)
    print(f"{n} scenarios of {scenarios.shape[1]} assets, independent in time: {out}")


@app.command()
def covariance(
    panel: Panel,
    model: Annotated[
        Path | None, typer.Option(help="Fitted generator; the sample covariance without one.")
    ] = None,
    clean: Annotated[bool, typer.Option(help="Marchenko-Pastur clipping of the correlations.")] = True,
    n: Annotated[int, typer.Option("--n", "-n", min=2, help="Scenarios used.")] = 10_000,
    out: Annotated[Path, typer.Option(help=".parquet or .csv file.")] = Path("covariance.parquet"),
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

    returns = _returns(panel, kind, missing, start, end)
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
    _write(matrix, out, "covariance", configuration, seed, returns)
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
    max_weight: Annotated[float | None, typer.Option(help="Largest weight of one asset.")] = None,
    risk_aversion: Annotated[float, typer.Option(help="Of mean-variance.")] = 5.0,
    previous: Annotated[Path | None, typer.Option(help="Weights held now (CSV), for --turnover.")] = None,
    turnover: Annotated[float | None, typer.Option(help="Largest sum of absolute trades.")] = None,
    out: Annotated[Path, typer.Option(help=".csv file.")] = Path("weights.csv"),
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

    matrix = _read(covariance, "covariance")
    constraints: list = [LongOnly()] if long_only else []
    if max_weight is not None:
        constraints.append(MaximumWeight(max_weight))
    if (turnover is None) != (previous is None):
        raise ValueError(
            "expected --turnover together with --previous, got one of them: give both, or neither"
        )
    if turnover is not None:
        constraints.append(Turnover(_read(previous, "weights").iloc[:, 0], turnover))
    mean = None if scenarios is None else _read(scenarios, "scenarios").mean()
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
    _write(found.weights.rename("weight").to_frame(), out, "optimise", configuration, None, matrix)
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
    out: Annotated[Path, typer.Option(help=".csv file.")] = Path("validation.csv"),
    seed: Seed = 0,
) -> None:
    """Judge scenarios against real rows, each number beside its real-vs-real floor."""
    from finediff.validation import validate as judge

    real = _returns(held_out, kind, missing, None, None)
    synthetic = _read(scenarios, "scenarios")
    rows = None if train is None else _returns(train, kind, missing, None, None)
    result = judge(real, synthetic, rows, random_state=seed)
    table = result.to_frame()
    _write(table, out, "validate", {"held_out": held_out, "scenarios": scenarios, "train": train}, seed, real)
    print(table.to_string(float_format=lambda v: f"{v:.4g}"))
    print(result.verdict)


def _study(returns, out, command, title, model, seed, device, steps, jobs, configuration) -> Path:
    """Fit, judge, and write report.html, scenarios, covariance, weights and manifest into one directory."""
    import json

    import pandas as pd

    from finediff.provenance import manifest, whole_directory
    from finediff.report.render import render
    from finediff.report.study import study

    order = [model, *(other for other in Model if other is not model)]
    generators = {m.value: _generator(m, seed, device, steps) for m in order}
    about = manifest(command=command, configuration=configuration, seed=seed, data=returns)
    # Before the work, so that a name that cannot be written costs nothing.
    with whole_directory(out, marker="manifest.json") as partial:
        result = study(
            returns, generators, title=title, random_state=seed, n_jobs=jobs, manifest=about, say=_say
        )
        result.scenarios.to_parquet(partial / "scenarios.parquet")
        result.covariances["scenarios"].to_parquet(partial / "covariance.parquet")
        pd.DataFrame({name: a.weights for name, a in result.allocations.items()}).to_csv(
            partial / "weights.csv", index_label="asset"
        )
        (partial / "report.html").write_text(render(result), encoding="utf-8")
        (partial / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")
    return out / "report.html"


def _generator(model: Model, seed: int, device: str | None, steps: int):
    from finediff.generators import (
        BootstrapGenerator,
        DDPMGenerator,
        FlowMatchingGenerator,
        GaussianGenerator,
        StudentTGenerator,
    )

    return {
        Model.ddpm: lambda: DDPMGenerator(steps=steps, device=device, random_state=seed),
        Model.flow: lambda: FlowMatchingGenerator(steps=steps, device=device, random_state=seed),
        Model.gaussian: lambda: GaussianGenerator(random_state=seed),
        Model.student_t: lambda: StudentTGenerator(random_state=seed),
        Model.bootstrap: lambda: BootstrapGenerator(random_state=seed),
        Model.block_bootstrap: lambda: BootstrapGenerator(method="stationary", random_state=seed),
    }[model]()


def _returns(panel: str, kind: Kind, missing: Missing, start, end) -> pd.DataFrame:
    """The panel's returns, after a check that tells prices from returns; findings go to standard error."""
    from finediff.panel import check_panel, load_prices, to_returns

    frame = load_prices(panel, start=start, end=end)
    findings = check_panel(frame, kind=kind.value)
    blocking = [
        f
        for f in findings
        if f.severity == "error" and not (f.code == "missing_values" and missing != "error")
    ]
    if blocking:
        first = blocking[0]
        remedy = {
            "missing_values": "Choose --missing drop_rows or --missing drop_assets.",
            "non_positive_price": "Correct it, or say --kind returns if these are returns.",
            "prices_as_returns": "Leave out --kind returns.",
        }.get(first.code, first.remedy)
        more = f" ({len(findings) - 1} more: finediff check {panel})" if len(findings) > 1 else ""
        raise ValueError(f"{first.message} {remedy}{more}")
    for finding in findings:
        _say(f"warning: {finding}")
    if kind is Kind.prices:
        return to_returns(frame, missing=missing.value)
    if missing is Missing.drop_rows:
        return frame.dropna()
    return frame.dropna(axis=1) if missing is Missing.drop_assets else frame


def _read(path: Path, what: str) -> pd.DataFrame:
    """A table written by another command."""
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, index_col=0)
    except Exception as problem:
        reason = "no such file" if isinstance(problem, FileNotFoundError) else str(problem).splitlines()[0]
        raise ValueError(
            f"expected {what} as a .parquet or .csv file, got {path} ({reason}): give the file another command wrote"
        ) from None


def _write(frame: pd.DataFrame, out: Path, command: str, configuration: dict, seed, data) -> None:
    """A table, whole, with its manifest beside it."""
    from finediff.provenance import manifest, whole_file, write_manifest

    if out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a file ending in .parquet or .csv, got {out}: change --out")
    with whole_file(out) as partial:
        if out.suffix == ".parquet":
            frame.to_parquet(partial)
        else:
            frame.to_csv(partial)
    about = manifest(command=command, configuration=configuration, seed=seed, data=data)
    write_manifest(out.with_name(f"{out.stem}.manifest.json"), about)


def _frame(rows) -> pd.DataFrame:
    import pandas as pd

    return rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows).rename(columns=str)


def _importable(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2."""
    # A polite kill unwinds like any other exit, so that partial files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    try:
        app()
    except (ValueError, TypeError, OSError) as problem:
        _say(f"error: {problem}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("stopped: nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    main()

"""The verbs of data and scenarios: check, fetch, fit, sample, validate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from finediff.cli.app import app
from finediff.cli.files import as_frame, generator_of, read_scenarios, refuse_holes, returns_of, write_table
from finediff.cli.options import (
    STEERED,
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
    Table,
)
from finediff.cli.wishes import stress_of

_LARGEST_TABLE = 2**28  # numbers held in memory for one file: 2 GiB


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
    refuse_holes(returns, model)
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
    stress: Annotated[
        list[str] | None,
        typer.Option(
            help="ASSET=RETURN (AAPL=-0.07) or ASSET=LOW:HIGH (XOM=-0.02:0.02, XOM=:-0.05): this asset moves so, the "
            f"others as the model says; may be repeated; models {', '.join(STEERED)}."
        ),
    ] = None,
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
    wanted = stress_of(stress, generator)
    under = f" under {', '.join(stress)}" if stress else ""
    if streamed:
        dtype = "float32" if float32 else "float64"
        generator.sample_to(out, n, chunk=chunk, random_state=seed, dtype=dtype, progress=None, stress=wanted)
        print(f"{n} scenarios of {generator.n_features_in_} assets{under}, independent in time: {out}")
        return
    if n * generator.n_features_in_ > _LARGEST_TABLE:
        raise ValueError(
            f"expected at most {_LARGEST_TABLE // generator.n_features_in_} scenarios in one file, got {n}: a table is held in "
            f"memory; a directory is not, --out {out.with_suffix('')}"
        )
    scenarios = as_frame(generator.sample(n, random_state=seed, stress=wanted))
    write_table(scenarios, out, "sample", {"model": model, "n": n, "stress": stress}, seed, scenarios)
    print(f"{n} scenarios of {scenarios.shape[1]} assets{under}, independent in time: {out}")


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
    synthetic = read_scenarios(scenarios)
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

"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Model(StrEnum):
    ridge = "ridge"
    factor = "factor"
    ddpm = "ddpm"
    flow = "flow"
    gaussian = "gaussian"
    student_t = "student-t"
    t_copula = "t-copula"
    bootstrap = "bootstrap"
    smoothed_bootstrap = "smoothed-bootstrap"
    block_bootstrap = "block-bootstrap"


# Whose scenarios can be stressed.
STEERED = (Model.ridge, Model.factor, Model.ddpm, Model.flow)


class Objective(StrEnum):
    min_variance = "min-variance"
    max_sharpe = "max-sharpe"
    mean_variance = "mean-variance"
    min_cvar = "min-cvar"
    risk_parity = "risk-parity"


class Estimator(StrEnum):
    sample = "sample"
    ledoit_wolf = "ledoit-wolf"
    oas = "oas"
    constant_correlation = "constant-correlation"
    clip = "clip"
    rie = "rie"
    qis = "qis"
    student_t = "student-t"
    factor_analytic = "factor-analytic"
    window_ensemble = "window-ensemble"


class Source(StrEnum):
    implied = "implied"
    samples = "samples"


class Missing(StrEnum):
    error = "error"
    drop_rows = "drop_rows"
    drop_assets = "drop_assets"
    keep = "keep"


class Kind(StrEnum):
    prices = "prices"
    returns = "returns"


Panel = Annotated[str, typer.Argument(help="sp500 (bundled), a .csv or .parquet file, or tickers: AAPL,MSFT")]
KindOption = Annotated[Kind, typer.Option(help="What the panel holds.")]
MissingOption = Annotated[
    Missing,
    typer.Option(help="What to do where a price is missing; keep: --model factor uses what is there."),
]
Start = Annotated[str | None, typer.Option(help="First date used, e.g. 2000-01-01.")]
End = Annotated[str | None, typer.Option(help="Last date used.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same bits.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU if there is one.")]


def _table(out: Path) -> Path:
    """Refuse a name that cannot be written before the work, not after it."""
    if out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"expected a file ending in .parquet or .csv, got {out}: change --out")
    return out


Table = Annotated[Path, typer.Option(help=".parquet or .csv file.", callback=_table)]
NoShorts = Annotated[
    bool,
    typer.Option(
        help="No short positions: the default of optimise, not of backtest; both say which in what they print."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Largest number of training steps of a network.")]

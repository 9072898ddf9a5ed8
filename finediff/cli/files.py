"""What the verbs read and write: panels, tables with a manifest beside them, generators by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finediff.cli.options import Estimator, Kind, Missing, Model
from finediff.cli.stops import drop

if TYPE_CHECKING:
    import pandas as pd


def generator_of(model: Model, seed: int, device: str | None, steps: int):
    from finediff.generators import (
        BootstrapGenerator,
        CopulaGenerator,
        DDPMGenerator,
        FactorDiffusionGenerator,
        FlowMatchingGenerator,
        GaussianGenerator,
        RidgeScoreGenerator,
        SmoothedBootstrapGenerator,
        StudentTGenerator,
    )

    return {
        Model.ridge: lambda: RidgeScoreGenerator(device=device, random_state=seed),
        Model.factor: lambda: FactorDiffusionGenerator(device=device, random_state=seed),
        Model.ddpm: lambda: DDPMGenerator(steps=steps, device=device, random_state=seed),
        Model.flow: lambda: FlowMatchingGenerator(steps=steps, device=device, random_state=seed),
        Model.gaussian: lambda: GaussianGenerator(random_state=seed),
        Model.student_t: lambda: StudentTGenerator(random_state=seed),
        Model.t_copula: lambda: CopulaGenerator(random_state=seed),
        Model.smoothed_bootstrap: lambda: SmoothedBootstrapGenerator(random_state=seed),
        Model.bootstrap: lambda: BootstrapGenerator(random_state=seed),
        Model.block_bootstrap: lambda: BootstrapGenerator(method="stationary", random_state=seed),
    }[model]()


def refuse_holes(returns: pd.DataFrame, model: Model) -> None:
    """Raise ValueError where returns are missing and the model cannot learn from the others."""
    holes = returns.isna().any()
    if model is not Model.factor and holes.any():
        raise ValueError(
            f"expected --model factor with missing returns, got {model.value} ({int(holes.sum())} of {len(holes)} assets lack some, "
            f"{holes.idxmax()} among them): choose --model factor, which learns from what is there, or --missing drop_rows or "
            "drop_assets"
        )


def covariance_of(estimator: Estimator):
    """An unfitted covariance estimator; not of the sample covariance."""
    from sklearn.covariance import OAS, LedoitWolf

    from finediff.covariance import (
        ClippedCovariance,
        ConstantCorrelationShrinkage,
        FactorAnalyticCovariance,
        QuadraticInverseShrinkage,
        RotationallyInvariantCovariance,
        StudentTCovariance,
        WindowEnsembleCovariance,
    )

    return {
        Estimator.ledoit_wolf: LedoitWolf,
        Estimator.oas: OAS,
        Estimator.constant_correlation: ConstantCorrelationShrinkage,
        Estimator.clip: ClippedCovariance,
        Estimator.rie: RotationallyInvariantCovariance,
        Estimator.qis: QuadraticInverseShrinkage,
        Estimator.student_t: StudentTCovariance,
        Estimator.factor_analytic: FactorAnalyticCovariance,
        Estimator.window_ensemble: WindowEnsembleCovariance,
    }[estimator]()


def returns_of(panel: str, kind: Kind, missing: Missing, start, end) -> pd.DataFrame:
    """The panel's returns, after a check that tells prices from returns; findings go to standard error."""
    return checked_returns(panel, kind, missing, start, end)[0]


def checked_returns(panel: str, kind: Kind, missing: Missing, start, end) -> tuple[pd.DataFrame, list]:
    """The panel's returns, and what the check found in the panel as it came."""
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
            "missing_values": "Choose --missing drop_rows, drop_assets or keep.",
            "non_positive_price": "Correct it, or empty the cell and choose --missing keep; --kind returns if these are returns.",
            "price_spike": "Correct it, or empty the cell and choose --missing keep or drop_rows.",
            "prices_as_returns": "Leave out --kind returns.",
        }.get(first.code, first.remedy)
        more = f" ({len(findings) - 1} more: finediff check {panel})" if len(findings) > 1 else ""
        raise ValueError(f"{first.message} {remedy}{more}")
    holes = ("missing_values", "late_listing", "early_delisting")
    dealt_with = [f for f in findings if f.code in holes and missing != "error"]
    if dealt_with:
        count = len({f.column for f in dealt_with})
        say(f"warning: {count} of {frame.shape[1]} assets lack values: --missing {missing.value}")
    for finding in findings:
        if finding not in dealt_with:
            say(f"warning: {finding.message} {finding.remedy}")
    if kind is Kind.prices:
        return to_returns(frame, missing=missing.value), findings
    kept = {Missing.drop_rows: frame.dropna, Missing.drop_assets: lambda: frame.dropna(axis=1)}
    return kept.get(missing, lambda: frame)(), findings


def read_scenarios(path: Path) -> pd.DataFrame:
    """Scenarios written by another command, or returns."""
    import numpy as np

    frame = read_table(path, "scenarios")
    sizes = frame.select_dtypes("number").abs().to_numpy()
    typical = np.nanmedian(sizes) if sizes.size else 0.0
    if typical > 0.5:
        raise ValueError(
            f"expected simple returns in {path}, got numbers of a typical size of {typical:.3g}: half of all moves would be "
            "above 50 %; divide per cent by 100, turn prices into returns"
        )
    return frame


def read_table(path: Path, what: str) -> pd.DataFrame:
    """A table written by another command."""
    import pandas as pd

    try:
        if path.suffix == ".parquet" or path.is_dir():
            return pd.read_parquet(path)
        return pd.read_csv(path, index_col=0)
    except Exception as problem:
        reason = "no such file" if isinstance(problem, FileNotFoundError) else str(problem).splitlines()[0]
        raise ValueError(
            f"expected {what} as a .parquet or .csv file, got {path} ({reason}): give the file another command wrote"
        ) from None


def write_table(frame: pd.DataFrame, out: Path, command: str, configuration: dict, seed, data) -> None:
    """A table, whole, with its manifest beside it."""
    from finediff.provenance import manifest, whole_file, write_manifest

    with whole_file(out) as partial:
        if out.suffix == ".parquet":
            frame.to_parquet(partial)
        else:
            frame.to_csv(partial)
    about = manifest(command=command, configuration=configuration, seed=seed, data=data)
    write_manifest(out.with_name(f"{out.stem}.manifest.json"), about)


def as_frame(rows) -> pd.DataFrame:
    import pandas as pd

    return rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows).rename(columns=str)


def say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # a full disk, a closed terminal: the exit code still tells
        drop(sys.stderr)

"""What is asked of assets by name: --stress AAPL=-0.07, --group-max tech=0.3."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

from finediff.cli.files import say
from finediff.cli.options import STEERED


def stress_of(wishes: list[str] | None, generator) -> dict | None:
    """What `generator.sample` takes as ``stress``, from ASSET=RETURN and ASSET=LOW:HIGH (an end left out is open)."""
    if not wishes:
        return None
    if "stress" not in generator._steered_by:
        raise ValueError(
            f"expected no --stress for a {type(generator).__name__}, got {wishes[0]}: it cannot be steered; fit one of "
            f"{', '.join(STEERED)}, for example finediff fit --model {STEERED[0]}"
        )
    # Assets of a panel without text for names are known by their positions.
    names = {
        str(name): name for name in getattr(generator, "feature_names_in_", range(generator.n_features_in_))
    }
    found: dict = {}
    for wish in wishes:
        asset, value = _split("--stress", wish, "ASSET=RETURN or ASSET=LOW:HIGH", "AAPL=-0.07")
        _known("--stress", asset, list(names), "an asset of the model")
        if names[asset] in found:
            raise ValueError(f"expected one --stress of {asset}, got two: give a band, {asset}=-0.10:-0.05")
        ends = value.split(":")
        if len(ends) > 2:
            raise ValueError(f"expected --stress ASSET=LOW:HIGH, got {wish}: a band has two ends")
        example = "AAPL=-0.07 is -7 %"
        if len(ends) == 1:
            found[names[asset]] = _number("--stress", value, wish, example)
            continue
        band = tuple(
            _number("--stress", end or gap, wish, example, finite=False)
            for end, gap in zip(ends, ("-inf", "inf"))
        )
        if not any(map(math.isfinite, band)):
            raise ValueError(
                f"expected a band with an end in --stress {wish}, got none: it would hold for every return; write for example "
                f"{asset}=:-0.05"
            )
        found[names[asset]] = band
    return found


def limits_of(
    path: Path | None, highest: list[str] | None, lowest: list[str] | None, assets, long_only: bool
) -> list:
    """Constraints on groups: of a CSV with columns asset and group, and of GROUP=SHARE; of shares when ``long_only``."""
    from finediff.portfolio import GroupLimits

    wishes = [("--group-max", wish) for wish in highest or ()] + [
        ("--group-min", wish) for wish in lowest or ()
    ]
    if path is None and not wishes:
        return []
    if path is None or not wishes:
        got = f"{wishes[0][0]} alone" if wishes else "--groups alone"
        raise ValueError(
            f"expected --groups together with --group-max or --group-min, got {got}: give the file that says which asset "
            "is in which group, and a limit of a group"
        )
    groups, warnings = _groups(path, assets)
    limits: dict = {}
    for option, wish in wishes:
        group, value = _split(option, wish, "GROUP=SHARE", "tech=0.3")
        _known(option, group, list(groups), f"a group of {path}")
        side = ("--group-min", "--group-max").index(option)
        pair = limits.setdefault(group, [None, None])
        if pair[side] is not None:
            raise ValueError(f"expected one {option} of {group}, got two: leave one out")
        share = pair[side] = _number(option, value, wish, "tech=0.3 is 30 %")
        if long_only and share > 1:
            raise ValueError(
                f"expected at most 1 in {option} {wish}, got {value}: long-only weights sum to 1, write {group}={share / 100:g} "
                f"for {share:g} %"
            )
    found = [GroupLimits(groups, {group: tuple(pair) for group, pair in limits.items()})]
    for warning in warnings:
        say(f"warning: {warning}")
    return found


def _groups(path: Path, assets) -> tuple[dict[str, list], list[str]]:
    """Members by group, and what may surprise: assets on one side alone, for which no limit holds."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str)
    except Exception as problem:
        reason = "no such file" if isinstance(problem, FileNotFoundError) else str(problem).splitlines()[0]
        raise ValueError(
            f"expected groups as a .csv file with the columns asset and group, got {path} ({reason}): write one row an asset"
        ) from None
    if not {"asset", "group"} <= set(table.columns):
        raise ValueError(
            f"expected the columns asset and group in {path}, got {', '.join(table.columns)}: name them so in its first row"
        )
    table = table.dropna(subset=["asset", "group"])
    named = {str(asset): asset for asset in assets}
    strangers = [asset for asset in table["asset"] if asset not in named]
    without = [asset for asset in named if asset not in set(table["asset"])]
    warnings = []
    if strangers:
        warnings.append(
            f"{path} names {_some(strangers)} ({len(strangers)} in all), which the covariance lacks: held at zero"
        )
    if without:
        warnings.append(
            f"no group limit holds for {_some(without)} ({len(without)} of {len(named)} assets), which {path} lacks"
        )
    members = {g: [named.get(asset, asset) for asset in part["asset"]] for g, part in table.groupby("group")}
    return members, warnings


def _split(option: str, wish: str, form: str, example: str) -> tuple[str, str]:
    # The last sign, as names may hold one (EURUSD=X).
    name, sign, value = wish.rpartition("=")
    if not (sign and name.strip() and value.strip()):
        raise ValueError(f"expected {option} {form}, got {wish!r}: write for example {option} {example}")
    return name.strip(), value.strip()


def _number(option: str, text: str, wish: str, example: str, finite: bool = True) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if math.isnan(number) or (finite and math.isinf(number)):
        raise ValueError(f"expected a fraction in {option} {wish}, got {text!r}: {example}")
    return number


def _known(option: str, name: str, known: list[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"it has {_some(known)}"
        raise ValueError(f"expected {what} in {option}, got {name!r}: {remedy}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

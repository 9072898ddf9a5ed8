"""What follows from the law: covariances, portfolios, tail risk, and the comparison of generators.

noise law of a spectrum   Marchenko-Pastur F(b) - F(a) in each bin, q = d/n of the training rows
bars of tail risk         joint bounds of chance around the real number
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finediff.covariance import marchenko_pastur, noise_edge
from finediff.report.svg import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    TEAL,
    band,
    canvas,
    dots,
    drawn,
    legend,
    log_ticks,
    number,
    per_cent,
    shortened,
    stroke,
)
from finediff.validation.tails import lies_beyond

_BARS = 40  # assets in the figure of weights
_CAP = 4.0  # floors; generators further out are drawn at the rim


# ----------------------------------------------------------------------------------------------- covariance


@drawn
def eigenvalue_spectrum(train, scenarios, n_train: int) -> str:
    """Eigenvalues of the correlation matrices beside what pure noise of n_train rows would give.

    Parameters
    ----------
    train, scenarios : DataFrame (n, d), (m, d)
        d >= 2; no constant column.
    n_train : int
        Rows whose noise the law describes; the scenarios know no more than these rows told.

    Returns
    -------
    str
        SVG.
    """
    spectra = {
        name: np.sort(np.linalg.eigvalsh(np.corrcoef(np.asarray(frame, float).T)))[::-1]
        for name, frame in {"training rows": train, "scenarios": scenarios}.items()
    }
    d = len(spectra["scenarios"])
    law, edge = marchenko_pastur(d, n_train), noise_edge(d, max(n_train, 3))
    floor = max(1e-4, 1e-3 * edge)  # a logarithmic axis has no place for the zeros of n <= d
    low = max(floor, min(law.lower or np.inf, *(values.min() for values in spectra.values())))
    high = max(values.max() for values in spectra.values())
    bins = np.geomspace(low / 1.15, high * 1.15, int(np.clip(d, 18, 40)))
    expected = np.diff(law.cdf(bins))
    figure = canvas(340)
    *histograms, ranked = figure.subplots(1, 3)
    styles = {"training rows": (INK, "o"), "scenarios": (BLUE, "D")}
    for axes, (name, values) in zip(histograms, spectra.items()):
        share = np.histogram(np.maximum(values, low), bins)[0] / d
        axes.stairs(100 * expected, bins, fill=True, color=ORANGE, alpha=0.3, linewidth=0)
        axes.stairs(100 * expected, bins, color=ORANGE, linewidth=1.2)
        axes.bar(
            bins[:-1],
            100 * share,
            np.diff(bins),
            align="edge",
            color=styles[name][0],
            alpha=0.45,
            linewidth=0,
        )
        axes.plot(
            np.maximum(values, low), np.zeros(d), "|", color=styles[name][0], markersize=11, clip_on=False
        )
        axes.axvline(edge, color=ORANGE, linewidth=1.4, linestyle=(0, (5, 2)))
        axes.set_xscale("log")
        axes.set_ylim(0, 100 * max(expected.max(), share.max()) * 1.06)
        log_ticks(axes.xaxis)
        per_cent(axes.yaxis)
        above = int((values > edge).sum())
        axes.set_title(f"{name}: {above} above the edge")
        axes.set_xlabel("eigenvalue")
    histograms[0].set_ylabel("share of the eigenvalues")
    rank = np.arange(1, d + 1)
    ranked.axhspan(max(law.lower, low), edge, color=ORANGE, alpha=0.25, linewidth=0)
    for name, values in spectra.items():
        colour, marker = styles[name]
        ranked.plot(
            rank,
            np.maximum(values, low),
            marker,
            color=colour,
            markersize=4.5 if d <= 60 else 2.5,
            markerfacecolor=colour if marker == "o" else "none",
        )
    ranked.set_yscale("log")
    log_ticks(ranked.yaxis)
    ranked.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ranked.set_title("both, by rank")
    ranked.set_xlabel("rank of the eigenvalue")
    legend(
        figure,
        [
            dots("training rows", INK, "o", 5),
            dots("scenarios", BLUE, "D", 5, hollow=True),
            band("noise alone (Marchenko–Pastur)", ORANGE, 0.3),
            stroke(f"edge of noise, {edge:.3g}", ORANGE, linewidth=1.4, linestyle=(0, (5, 2))),
        ],
    )
    counts = ", ".join(f"{name} {int((v > edge).sum())}" for name, v in spectra.items())
    return figure, (
        f"Eigenvalues of the correlation matrices. Above the noise edge {edge:.3g}: {counts}. Largest: "
        f"{spectra['training rows'][0]:.3g} and {spectra['scenarios'][0]:.3g}."
    )


@drawn
def condition_numbers(table: pd.DataFrame) -> str:
    """Condition number of each covariance, and the two errors it is to be read with.

    Parameters
    ----------
    table : DataFrame
        One row a covariance; columns "condition number", "error to held-out (%)" and "held-out volatility of
        its minimum-variance portfolio (%)".

    Returns
    -------
    str
        SVG.
    """
    titles = {
        "condition number": "condition number",
        "error to held-out (%)": "error to held-out, %",
        "held-out volatility of its minimum-variance portfolio (%)": "volatility of min. variance, %",
    }
    figure = canvas(70 + 34 * len(table))
    place = np.arange(len(table))[::-1]
    for k, (axes, (column, title)) in enumerate(zip(figure.subplots(1, 3, sharey=True), titles.items())):
        values = table[column].to_numpy(float)
        good = np.isfinite(values)
        colours = [BLUE if str(name).startswith("scenarios") else MUTED for name in table.index]
        left = 0.0
        if k == 0 and good.any() and values[good].max() > 30 * values[good].min():
            axes.set_xscale("log")
            left = 1.0  # no condition number is smaller
        if k < 2:
            axes.barh(place, np.where(good, values, left) - left, 0.56, left, color=colours, alpha=0.75)
        else:
            axes.hlines(place, *_spread(values[good]), color=GRID, linewidth=1.4)
            for at, value, colour in zip(place, values, colours):
                axes.plot(value, at, "D" if colour == BLUE else "o", color=colour, markersize=8)
        for at, value in zip(place, values):
            if np.isfinite(value):
                axes.annotate(
                    f"{value:,.{2 if k == 2 else 1 if value < 1000 else 0}f}",
                    (value, at),
                    (6, 0),
                    textcoords="offset points",
                    va="center" if k < 2 else "bottom",
                    fontsize=12,
                )
        axes.margins(x=0.22)
        if k < 2:
            axes.set_xlim(left=left or None if k == 0 and left else 0)
        else:
            axes.set_xlim(*_spread(values[good], 0.35))
        axes.set_yticks(place, [shortened(name) for name in table.index], color=INK)
        axes.set_ylim(-0.6, len(table) - 0.4)
        axes.grid(False)
        axes.set_title(title)
        axes.spines["left"].set_visible(k < 2)
        axes.tick_params(axis="y", length=0)
        if k == 0 and left:
            log_ticks(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    told = "; ".join(f"{name} {table['condition number'].iloc[i]:.3g}" for i, name in enumerate(table.index))
    return figure, f"Condition numbers of the covariances: {told}."


def _spread(values, room: float = 0.1) -> tuple[float, float]:
    """Ends of an axis that shows how values differ, with `room` on either side."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    width = (high - low) or 0.1 * abs(high) or 1.0
    return low - room * width, high + room * width


# ------------------------------------------------------------------------------------- portfolios and risk


@drawn
def portfolio_weights(weights: pd.DataFrame) -> str:
    """Weights as bars, one panel a portfolio, assets in one order; of more than 40 assets the largest.

    Parameters
    ----------
    weights : DataFrame (d, k)
        Fractions of wealth; index: assets, columns: portfolios.

    Returns
    -------
    str
        SVG.
    """
    values = weights.to_numpy(float)
    order = np.argsort(-np.abs(values).max(axis=1), kind="stable")[:_BARS]
    order = order[np.argsort(-values[order, 0], kind="stable")]
    names = [shortened(weights.index[i], 18) for i in order]
    k = values.shape[1]
    columns = min(k, 4)
    rows = -(-k // columns)
    figure = canvas((52 + max(60, 17.5 * len(order))) * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    place = np.arange(len(order))[::-1]
    low, high = 100 * min(0.0, values.min()), 100 * max(0.0, values.max())
    width = high - low or 1.0
    for axes, j in zip(grid.flat, range(k)):
        bars = 100 * values[order, j]
        axes.barh(place, bars, 0.66, color=[BLUE if bar >= 0 else ORANGE for bar in bars], alpha=0.85)
        for at, bar in zip(place, bars):
            if abs(bar) >= 0.05:
                side = 1 if bar >= 0 else -1
                axes.annotate(
                    f"{bar:.1f}".replace("-", "−"),
                    (bar, at),
                    (4 * side, 0),
                    fontsize=11,
                    textcoords="offset points",
                    va="center",
                    ha="left" if side > 0 else "right",
                )
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(low - (0.26 * width if low < 0 else 0.02 * width), high + 0.26 * width)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_yticks(place, names, color=INK)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_title(shortened(weights.columns[j], 108 // columns))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 6)) + " %"))
    for axes in grid.flat[k:]:
        axes.set_axis_off()
    told = "; ".join(
        f"{name}: largest {weights.index[int(values[:, j].argmax())]} {100 * values[:, j].max():.1f} %"
        for j, name in enumerate(weights.columns)
    )
    return figure, f"Portfolio weights. {told}."


@drawn
def tail_risk(table: pd.DataFrame, bounds: pd.DataFrame) -> str:
    """VaR and ES of each portfolio: real number with the bar that chance gives, scenarios beside it.

    Parameters
    ----------
    table : DataFrame
        Of `finediff.risk.tail_risk_table`.
    bounds : DataFrame
        The figures of `finediff.validation.tail_test` on the same rows.

    Returns
    -------
    str
        SVG.
    """
    figure = canvas(90 + 29 * len(table))
    place = np.arange(len(table))[::-1].astype(float)
    labels = [f"{shortened(name, 28)}, {100 * level:g} %" for name, level in table.index]
    missed = 0
    measures = {"VaR": "value at risk", "ES": "expected shortfall"}
    for axes, (short, title) in zip(figure.subplots(1, 2, sharey=True), measures.items()):
        real, made = 100 * table[f"{short} real"].to_numpy(), 100 * table[f"{short} scenarios"].to_numpy()
        gap, low, high = (bounds.loc[table.index, f"{short} {k}"].to_numpy() for k in ("gap", "low", "high"))
        inside = ~lies_beyond(gap, low, high)
        arms = np.abs(real) * np.maximum([-low, high], 0.0)
        missed += int((~inside).sum())
        axes.errorbar(
            real, place + 0.12, xerr=arms, fmt="o", color=INK, markersize=6, elinewidth=1.4, capsize=3
        )
        axes.plot(made[inside], place[inside] - 0.16, "D", color=BLUE, markersize=6.5)
        axes.plot(made[~inside], place[~inside] - 0.16, "D", color=ORANGE, markersize=6.5)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.7, len(table) - 0.3)
        axes.set_yticks(place, labels, color=INK)
        axes.set_title(f"{title} ({short})")
        axes.set_xlabel("loss in one period")
        per_cent(axes.xaxis)
        for start in np.flatnonzero(
            np.asarray(table.index.get_level_values(0)[1:] != table.index.get_level_values(0)[:-1])
        ):
            axes.axhline(place[start] - 0.5, color=GRID, linewidth=0.8)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
    legend(
        figure,
        [
            Line2D(
                [],
                [],
                color=INK,
                marker="o",
                markersize=6,
                linewidth=1.4,
                label="held-out rows, and what chance gives",
            ),
            dots("scenarios, within", BLUE, "D", 6),
            dots("scenarios, outside the bar", ORANGE, "D", 6),
        ],
    )
    return figure, (
        f"Value at risk and expected shortfall of {len(table)} portfolio and level pairs; {missed} of "
        f"{2 * len(table)} scenario numbers lie outside the joint bounds of chance."
    )


# ----------------------------------------------------------------------------------------------- generators


@drawn
def generator_comparison(distances: Mapping) -> str:
    """Distance of each generator from what is typical of real rows, in units of the joint bound of real rows.

    Parameters
    ----------
    distances : mapping split -> DataFrame (generators, metrics)
        0: typical of real rows; 1: the bound. NaN is not drawn; infinity is drawn at the rim.

    Returns
    -------
    str
        SVG.
    """
    first = next(iter(distances.values()))
    names, metrics = list(first.index), list(first.columns)
    figure = canvas(84 + 31 * len(names))
    place = pd.Series(np.arange(len(names))[::-1].astype(float), index=names)
    looks = [{"marker": "o", "color": BLUE, "y": 0.15}, {"marker": "D", "color": ORANGE, "y": -0.15}]
    beyond = 0
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(grid, metrics):
        axes.axvspan(0, 1, color=TEAL, alpha=0.16, linewidth=0)
        for look, frame in zip(looks, distances.values()):
            for name in names:
                value = frame[metric].get(name, np.nan)
                if np.isnan(value):
                    continue
                beyond += value > 1
                far, at = value > _CAP, place[name] + look["y"]
                axes.plot(
                    min(value, _CAP),
                    at,
                    look["marker"],
                    color=look["color"],
                    markersize=6.5,
                    clip_on=False,
                    markerfacecolor=look["color"] if not far else "none",
                )
                if far:
                    axes.annotate(
                        f"{value:.0f}×" if np.isfinite(value) else "∞",
                        (_CAP, at),
                        (-6, 0),
                        textcoords="offset points",
                        ha="right",
                        va="center",
                        fontsize=11,
                    )
        axes.set_xlim(0, _CAP)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xticks([0, 1, 2, 3])
        axes.set_yticks(place, [shortened(name, 24) for name in names], color=INK)
        axes.set_title(metric, fontsize=12)
        axes.spines["left"].set_visible(False)
    figure.supxlabel("distance in units of the bound: 0 typical of real rows", fontsize=12.5, color=MUTED)
    legend(
        figure,
        [
            *(
                dots(f"{name} split", look["color"], look["marker"], 6)
                for look, name in zip(looks, distances)
            ),
            band("within the bound of real rows", TEAL, 0.2),
            dots("off the scale", MUTED, "o", 6, hollow=True),
        ],
    )
    return (
        figure,
        f"Dot plot of {len(names)} rows and {len(metrics)} measures; {beyond} dots lie beyond the bound.",
    )

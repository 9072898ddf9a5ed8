"""Is the law right: training, margins, dependence.

Correlation maps are pictures whose opacity is |c|, so zero is the paper itself.

    band of a Q-Q plot        [real_low, real_high] of `finediff.validation.qq_data`, 95 %, pointwise
    band of a survival curve  k of n losses above x: Beta(k, n-k+1) at 2.5 % to Beta(k+1, n-k) at 97.5 %
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from finediff.report.svg import (
    BLUE,
    COUNT,
    INK,
    MUTED,
    ORANGE,
    band,
    canvas,
    dots,
    drawn,
    legend,
    per_cent,
    shortened,
    stroke,
)

_POSITIVE, _NEGATIVE = (0.12, 0.44, 0.76), (0.88, 0.45, 0.07)
_PANELS = 24  # of the grid of assets
_NAMED = 30  # assets whose names fit along a correlation map


def _equal_weighted(frame) -> np.ndarray:
    return np.asarray(frame, float).mean(axis=1)


def _points(qq) -> int:
    """Rows of the first series, the portfolio; an asset may itself be called "portfolio"."""
    return int((qq["probability"].diff() < 0).to_numpy().argmax()) or len(qq)


def _outside(qq) -> np.ndarray:
    """Which scenario quantiles lie outside the band; an unbounded side (NaN) excludes nothing."""
    y = qq["synthetic"].to_numpy()
    return (y < qq["real_low"].to_numpy()) | (y > qq["real_high"].to_numpy())


# ----------------------------------------------------------------------------------------------- training


@drawn
def loss_curves(histories: Mapping) -> str:
    """Training and held-out loss by step, one panel a training; the kept step is marked.

    Parameters
    ----------
    histories : mapping name -> `finediff.diffusion.train.History`
        At least one.

    Returns
    -------
    str
        SVG.
    """
    columns = min(3, len(histories)) if len(histories) != 4 else 2
    rows = -(-len(histories) // columns)
    figure = canvas(60 + 220 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    told = []
    for axes, (name, history) in zip(grid.flat, histories.items()):
        step = np.asarray(history.step)
        curves = [np.asarray(history.train_loss, float), np.asarray(history.held_out_loss, float)]
        axes.plot(step[: curves[0].size], curves[0], color=BLUE, linewidth=1.3, linestyle=(0, (4, 2)))
        axes.plot(step[: curves[1].size], curves[1], color=ORANGE)
        last = curves[1] if curves[1].size else curves[0]
        if history.best_step and last.size:
            kept = int(np.abs(step[: last.size] - history.best_step).argmin())
            axes.axvline(history.best_step, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.plot(step[kept], last[kept], "o", color=INK, markersize=6.5)
            told.append(f"{name}: kept step {history.best_step:,}, loss {last[kept]:.4g}")
        both = np.concatenate(curves)
        if both.size:
            low, high = both.min(), np.quantile(both, 0.97)
            room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
            axes.set_ylim(low - room, high + room)
        axes.set_title(shortened(name, 88 // columns))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(COUNT)
        axes.set_xlabel("training step")
    for axes in grid.flat[len(histories) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel("loss")
    legend(
        figure,
        [
            stroke("rows trained on", BLUE, linewidth=1.3, linestyle=(0, (4, 2))),
            stroke("rows set aside", ORANGE),
            dots("step whose weights were kept", INK, "o", 6.5),
        ],
    )
    return figure, "Loss by training step. " + "; ".join(told) + "."


# -------------------------------------------------------------------------------------------------- margins


@drawn
def qq_portfolio(splits: Mapping) -> str:
    """Q-Q plot of the equal-weighted portfolio, one panel a split, with the 95 % band of the real quantiles.

    Parameters
    ----------
    splits : mapping name -> DataFrame
        Of `finediff.validation.qq_data`; the first series is the portfolio.

    Returns
    -------
    str
        SVG.
    """
    figure = canvas(385)
    told = []
    for axes, (name, qq) in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits.items()):
        qq = qq.iloc[: _points(qq)]
        x, y = 100 * qq["real"].to_numpy(), 100 * qq["synthetic"].to_numpy()
        limits = 100 * qq[["real_low", "real_high"]].to_numpy()
        outside = _outside(qq)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        axes.plot(ends, ends, color=MUTED, linewidth=1)
        axes.fill_between(x, limits[:, 0], limits[:, 1], color=MUTED, alpha=0.22, linewidth=0)
        axes.plot(x[~outside], y[~outside], "o", color=BLUE, markersize=3.6)
        axes.plot(x[outside], y[outside], "D", color=ORANGE, markersize=4.2)
        axes.set_title(
            f"{name} split: {(~outside).mean():.0%} of the quantiles in the band".replace("%", " %")
        )
        axes.set_xlabel("quantile of the held-out rows")
        axes.set_ylabel("same quantile of the scenarios")
        per_cent(axes.xaxis)
        per_cent(axes.yaxis)
        told.append(f"{name} split, {outside.sum()} of {outside.size} quantiles outside the band")
    legend(
        figure,
        [
            dots("in the band", BLUE, "o", 4),
            dots("outside", ORANGE, "D", 4.5),
            band("95 % band of the real quantile", MUTED, 0.22),
            stroke("perfect agreement", MUTED, linewidth=1),
        ],
    )
    return figure, "Quantiles of the scenarios against the held-out rows: " + "; ".join(told) + "."


@drawn
def qq_assets(qq: pd.DataFrame) -> str:
    """Small Q-Q plots, one an asset; of more than 24 those with the most quantiles outside their band.

    Parameters
    ----------
    qq : DataFrame of `finediff.validation.qq_data` with ``assets``
        The series "portfolio" is left out.

    Returns
    -------
    str
        SVG.
    """
    points = _points(qq)
    series = [qq.iloc[i : i + points] for i in range(points, len(qq), points)]
    share = np.array([_outside(part).mean() for part in series])
    shown = np.arange(len(series))
    if len(series) > _PANELS:
        shown = np.argsort(-share, kind="stable")[:_PANELS]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = canvas(40 + (132 if columns > 3 else 240) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, k in zip(grid.flat, shown):
        part = series[k]
        x, y = part["real"].to_numpy(), part["synthetic"].to_numpy()
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        axes.fill_between(x, part["real_low"], part["real_high"], color=MUTED, alpha=0.25, linewidth=0)
        axes.plot(x, y, color=BLUE, linewidth=1.5)
        outside = _outside(part)
        axes.plot(x[outside], y[outside], "D", color=ORANGE, markersize=2.8)
        axes.set_title(shortened(part["series"].iloc[0], 11 if columns > 3 else 40), fontsize=12, pad=3)
        axes.annotate(
            f"{1 - share[k]:.0%}".replace("%", " %"),
            (0.97, 0.05),
            xycoords="axes fraction",
            ha="right",
            fontsize=11,
            color=MUTED,
        )
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    legend(
        figure,
        [
            stroke("scenarios against held-out rows", BLUE),
            dots("outside the band", ORANGE, "D", 4),
            band("95 % band (per cent inside: lower right)", MUTED, 0.25),
        ],
    )
    worst = series[int(share.argmax())]["series"].iloc[0]
    return figure, (
        f"Quantile plots of {len(shown)} of {len(series)} assets. Furthest from its band: {worst}, with "
        f"{100 * share.max():.0f} % of the quantiles outside."
    )


@drawn
def tail_survival(train, held_out, scenarios) -> str:
    """How often the equal-weighted portfolio loses more than x: training, held-out, scenarios, Gaussian.

    Parameters
    ----------
    train, held_out, scenarios : DataFrame (n, d)
        The Gaussian has the mean and standard deviation of the training rows.

    Returns
    -------
    str
        SVG.
    """
    losses = {
        name: -np.sort(100 * _equal_weighted(frame))
        for name, frame in {"train": train, "held": held_out, "scenarios": scenarios}.items()
    }
    figure = canvas(380)
    axes = figure.subplots()
    top = 0.2

    def curve(sample):
        n = len(sample)
        k = np.unique(np.geomspace(1, max(2, top * n), 160).astype(int))
        k = k[(k <= n) & (sample[np.minimum(k, n) - 1] > 0)]
        return k, sample[k - 1], k / n

    k, x, p = curve(losses["held"])
    n = len(losses["held"])
    low, high = stats.beta.ppf(0.025, k, n - k + 1), stats.beta.ppf(0.975, k + 1, np.maximum(n - k, 1))
    axes.fill_between(x, low, high, color=MUTED, alpha=0.22, linewidth=0)
    axes.plot(*curve(losses["train"])[1:], color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
    mean, sd = -losses["train"].mean(), losses["train"].std()
    furthest = max(losses["held"][0], losses["train"][0], 1.5 * sd)
    right = min(max(losses["scenarios"][0], furthest), 2 * furthest) * 1.05
    reach = np.linspace(0, right, 200)
    axes.plot(reach, stats.norm.sf(reach, -mean, sd), color=ORANGE, linestyle=(0, (5, 2)))
    axes.plot(*curve(losses["scenarios"])[1:], color=BLUE, linewidth=2.2)
    axes.plot(x, p, "o", color=INK, markersize=3.4)
    axes.set_yscale("log")
    bottom = 0.5 / max(map(len, losses.values()))
    axes.set_ylim(bottom, top)
    left = max(0.0, min(np.quantile(sample, 1 - top) for sample in losses.values()))
    axes.set_xlim(left, max(right, left + 1e-9))
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    per_cent(axes.xaxis, 8)
    axes.set_xlabel("loss of the equal-weighted portfolio in one period")
    axes.set_ylabel("share of periods that lose more")
    legend(
        figure,
        [
            dots("held-out rows", INK, "o", 4),
            band("their 95 % band", MUTED, 0.22),
            stroke("training rows", MUTED, linewidth=1.2, linestyle=(0, (1, 1.5))),
            stroke("scenarios", BLUE, linewidth=2.2),
            stroke("Gaussian", ORANGE, linestyle=(0, (5, 2))),
        ],
    )
    return figure, (
        "Share of periods that lose more than a given amount, on a logarithmic scale. Worst loss: held-out "
        f"{losses['held'][0]:.1f} %, scenarios {losses['scenarios'][0]:.1f} % of {len(scenarios):,} rows."
    )


# ----------------------------------------------------------------------------------------------- dependence


def asset_order(correlation) -> np.ndarray:
    """Order (d,) of the assets that puts those that move together side by side.

    Average linkage on 1 - c, leaves turned so that neighbours are close (Bar-Joseph, Gifford, Jaakkola 2001).
    """
    c = np.asarray(correlation, float)
    if len(c) < 3:
        return np.arange(len(c))
    distance = np.clip(1.0 - (c + c.T) / 2, 0.0, None)
    np.fill_diagonal(distance, 0.0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))


def _tint(values, limit) -> np.ndarray:
    """RGBA (..., 4): the hue is the sign, the opacity the size."""
    strength = np.clip(np.asarray(values) / limit, -1, 1)
    hue = np.where(strength[..., None] > 0, _POSITIVE, _NEGATIVE)
    return np.concatenate([hue, np.abs(strength)[..., None]], axis=-1)


@drawn
def correlation_maps(held_out, scenarios) -> str:
    """Correlations of the held-out rows and of the scenarios, and their difference, in one order of assets.

    Parameters
    ----------
    held_out, scenarios : DataFrame (n, d), (m, d)
        d >= 2; no constant column.

    Returns
    -------
    str
        SVG.
    """
    real = np.corrcoef(np.asarray(held_out, float).T)
    made = np.corrcoef(np.asarray(scenarios, float).T)
    order = asset_order(real)
    d = len(order)
    real, made = real[np.ix_(order, order)], made[np.ix_(order, order)]
    gap = made - real
    widest = np.abs(gap).max()
    limit = max(0.1, np.ceil(10 * widest - 1e-9) / 10)
    names = [shortened(held_out.columns[i], 12) for i in order]
    figure = canvas(345)
    grid = figure.subplots(2, 3, height_ratios=[1, 0.045])
    maps = {"held-out rows": (real, 1.0), "scenarios": (made, 1.0), "scenarios less held-out": (gap, limit)}
    for k, (title, (values, scale)) in enumerate(maps.items()):
        axes, bar = grid[:, k]
        axes.imshow(_tint(values, scale), interpolation="none", aspect="equal")
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(True)
        axes.set_xticks([])
        axes.set_yticks([])
        if k == 0 and d <= _NAMED:
            axes.set_yticks(range(d), names, fontsize=11 if d <= 20 else 9)
        bar.imshow(
            _tint(np.linspace(-scale, scale, 101)[None, :], scale),
            aspect="auto",
            interpolation="none",
            extent=(-scale, scale, 0, 1),
        )
        bar.grid(False)
        bar.spines[:].set_visible(True)
        bar.set_yticks([])
        bar.set_xticks([-scale / 2, 0, scale / 2])
        bar.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("-", "−")))
    off = gap[np.triu_indices(d, 1)]
    return figure, (
        f"Correlation maps of {d} assets. Mean absolute difference between scenarios and held-out rows "
        f"{np.abs(off).mean():.3f}, largest {widest:.3f}."
    )

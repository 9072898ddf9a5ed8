"""The report's figures: each function returns one SVG as text, ready to stand inside an HTML page.

Colours are roles, not values: a figure is drawn in the placeholder colours below and every placeholder is then
replaced by a CSS variable, so that one drawing reads on light and dark paper. Real returns are `INK`, the
chosen scenarios `BLUE`, a second and third series `ORANGE` and `TEAL`: hues that colour-blind readers tell
apart, and each series also has its own marker or dash. Correlation maps are pictures whose opacity is |c|, so
zero is the paper itself.

Figures are `_WIDTH` units wide, one unit a CSS pixel. Text stays text, in the font of the page. The same data
give the same bytes: nothing is drawn from the clock, and ids are made of the figure's name.

    band of a Q-Q plot        [real_low, real_high] of `finediff.validation.qq_data`, 95 %, pointwise
    band of a survival curve  k of n losses above x: Beta(k, n-k+1) at 2.5 % to Beta(k+1, n-k) at 97.5 %
    noise law of a spectrum   Marchenko-Pastur F(b) - F(a) in each bin, q = d/n of the training rows
    error bars of tail risk   +- 1.96 standard errors of the real number
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import wraps

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from finediff.covariance import correlation_from_covariance, marchenko_pastur, noise_edge

__all__ = [
    "asset_order",
    "condition_numbers",
    "correlation_maps",
    "eigenvalue_spectrum",
    "generator_comparison",
    "loss_curves",
    "portfolio_weights",
    "qq_assets",
    "qq_portfolio",
    "tail_risk",
    "tail_survival",
]

INK, MUTED, GRID = "#000001", "#000002", "#000003"
BLUE, ORANGE, TEAL = "#000004", "#000005", "#000006"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    BLUE: "var(--series-1)",
    ORANGE: "var(--series-2)",
    TEAL: "var(--series-3)",
}
_POSITIVE, _NEGATIVE = (0.12, 0.44, 0.76), (0.88, 0.45, 0.07)
_WIDTH = 880
_PANELS = 24  # of the grid of assets
_BARS = 40  # assets in the figure of weights
_NAMED = 30  # assets whose names fit along a correlation map
_CAP = 4.0  # floors; generators further out are drawn at the rim

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finediff",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "font.size": 12.5,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12.5,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 8,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 12.5,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.8,
}


def _figure(draw):
    """Run `draw` -> (Figure, alternative text) under the report's style and hand back the SVG."""

    @wraps(draw)
    def svg(*args, **kwargs) -> str:
        with mpl.rc_context(), warnings.catch_warnings():
            # The page's fonts draw the text; matplotlib's own may lack a glyph of an asset's name.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            figure, alternative = draw(*args, **kwargs)
            out = io.StringIO()
            FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
        return _inline(out.getvalue(), draw.__name__.replace("_", "-"), alternative)

    return svg


def _canvas(height: float) -> Figure:
    return Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")


def _inline(svg: str, name: str, alternative: str) -> str:
    """A drawing that can stand in a page beside others: no header, no foreign style, ids of its own."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    renamed = {old: f"{name}-{i}" for i, old in enumerate(sorted(used))}
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.tail = None
        attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        node.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = renamed.get(value)
            elif key == "href":
                value = "#" + renamed[value[1:]] if value.startswith("#") else re.sub(r"\s+", "", value)
            elif key == "clip-path":
                value = f"url(#{renamed[value[5:-1]]})"
            elif key == "style":
                value = re.sub(r"font-family:[^;]*(;\s*|$)", "", value)
                value = re.sub(r"(\bfont:[^;']*)'[^;]*", r"\1var(--sans)", value)
                value = value.replace("font-weight: 700", "font-weight: 600")
                value = re.sub(r"#0000\d\d", lambda found: _VARIABLES[found[0]], value)
            elif key == "d":
                value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", value)
                value = re.sub(r"\s*([MLQCz])\s*", r"\1", value)
            elif key == "transform":
                value = None if value.startswith("rotate(-0 ") else value
            if value is not None:
                node.set(key, value)
        if node.tag != "text":
            node.text = None
    box = root.get("viewBox")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": alternative})
    return ET.tostring(root, encoding="unicode")


# ------------------------------------------------------------------------------------------------- pieces


def _number(value: float, _=None) -> str:
    return f"{value:g}".replace("-", "−")


_PLAIN = FuncFormatter(_number)
_COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")


def _per_cent(axis, bins: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(bins))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(round(value, 6)) + " %"))


def _log_ticks(axis) -> None:
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.6 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(_PLAIN)
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _legend(figure, handles) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0.2)


def _shortened(name, most: int = 30) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _equal_weighted(frame) -> np.ndarray:
    return np.asarray(frame, float).mean(axis=1)


def _outside(qq) -> np.ndarray:
    """Which scenario quantiles lie outside the band; an unbounded side (NaN) excludes nothing."""
    y = qq["synthetic"].to_numpy()
    return (y < qq["real_low"].to_numpy()) | (y > qq["real_high"].to_numpy())


# ----------------------------------------------------------------------------------------------- training


@_figure
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
    figure = _canvas(60 + 220 * rows)
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
        axes.set_title(_shortened(name, 88 // columns))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(_COUNT)
        axes.set_xlabel("training step")
    for axes in grid.flat[len(histories) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel("loss")
    _legend(
        figure,
        [
            Line2D([], [], color=BLUE, linewidth=1.3, linestyle=(0, (4, 2)), label="rows trained on"),
            Line2D([], [], color=ORANGE, label="rows kept aside"),
            Line2D(
                [],
                [],
                color=INK,
                marker="o",
                markersize=6.5,
                linestyle="",
                label="step whose weights were kept",
            ),
        ],
    )
    return figure, "Loss by training step. " + "; ".join(told) + "."


# -------------------------------------------------------------------------------------------------- margins


@_figure
def qq_portfolio(splits: Mapping) -> str:
    """Q-Q plot of the equal-weighted portfolio, one panel a split, with the 95 % band of the real quantiles.

    Parameters
    ----------
    splits : mapping name -> DataFrame of `finediff.validation.qq_data`

    Returns
    -------
    str
        SVG.
    """
    figure = _canvas(420)
    told = []
    for axes, (name, qq) in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits.items()):
        qq = qq[qq["series"] == "portfolio"]
        x, y = 100 * qq["real"].to_numpy(), 100 * qq["synthetic"].to_numpy()
        band = 100 * qq[["real_low", "real_high"]].to_numpy()
        outside = _outside(qq)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        axes.plot(ends, ends, color=MUTED, linewidth=1)
        axes.fill_between(x, band[:, 0], band[:, 1], color=MUTED, alpha=0.22, linewidth=0)
        axes.plot(x[~outside], y[~outside], "o", color=BLUE, markersize=3.6)
        axes.plot(x[outside], y[outside], "D", color=ORANGE, markersize=4.2)
        axes.set_title(
            f"{name} split: {(~outside).mean():.0%} of the quantiles in the band".replace("%", " %")
        )
        axes.set_xlabel("quantile of the held-out rows")
        axes.set_ylabel("same quantile of the scenarios")
        _per_cent(axes.xaxis)
        _per_cent(axes.yaxis)
        told.append(f"{name} split, {outside.sum()} of {outside.size} quantiles outside the band")
    _legend(
        figure,
        [
            Line2D([], [], color=BLUE, marker="o", markersize=4, linestyle="", label="in the band"),
            Line2D([], [], color=ORANGE, marker="D", markersize=4.5, linestyle="", label="outside"),
            Patch(facecolor=MUTED, alpha=0.22, label="95 % band of the real quantile"),
            Line2D([], [], color=MUTED, linewidth=1, label="perfect agreement"),
        ],
    )
    return figure, "Quantiles of the scenarios against the held-out rows: " + "; ".join(told) + "."


@_figure
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
    # By position: an asset may itself be called "portfolio", and two labels may read the same.
    points = int((qq["probability"].diff() < 0).to_numpy().argmax()) or len(qq)
    series = [qq.iloc[i : i + points] for i in range(points, len(qq), points)]
    share = np.array([_outside(part).mean() for part in series])
    shown = np.arange(len(series))
    if len(series) > _PANELS:
        shown = np.argsort(-share, kind="stable")[:_PANELS]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = _canvas(40 + (132 if columns > 3 else 240) * rows)
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
        axes.set_title(_shortened(part["series"].iloc[0], 11 if columns > 3 else 40), fontsize=12, pad=3)
        axes.annotate(
            f"{1 - share[k]:.0%}".replace("%", " %"), (0.97, 0.05), xycoords="axes fraction", ha="right",
            fontsize=11, color=MUTED,
        )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    _legend(
        figure,
        [
            Line2D([], [], color=BLUE, label="scenarios against held-out rows"),
            Line2D([], [], color=ORANGE, marker="D", markersize=4, linestyle="", label="outside the band"),
            Patch(facecolor=MUTED, alpha=0.25, label="95 % band (per cent inside: lower right)"),
        ],
    )
    worst = series[int(share.argmax())]["series"].iloc[0]
    return figure, (
        f"Quantile plots of {len(shown)} of {len(series)} assets. Furthest from its band: {worst}, with "
        f"{100 * share.max():.0f} % of the quantiles outside."
    )


@_figure
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
    figure = _canvas(380)
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
    _per_cent(axes.xaxis, 8)
    axes.set_xlabel("loss of the equal-weighted portfolio in one period")
    axes.set_ylabel("share of periods that lose more")
    _legend(
        figure,
        [
            Line2D([], [], color=INK, marker="o", markersize=4, linestyle="", label="held-out rows"),
            Patch(facecolor=MUTED, alpha=0.22, label="their 95 % band"),
            Line2D([], [], color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)), label="training rows"),
            Line2D([], [], color=BLUE, linewidth=2.2, label="scenarios"),
            Line2D([], [], color=ORANGE, linestyle=(0, (5, 2)), label="Gaussian"),
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


@_figure
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
    names = [_shortened(held_out.columns[i], 12) for i in order]
    figure = _canvas(400 if d <= _NAMED else 375)
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
        bar.imshow(_tint(np.linspace(-scale, scale, 101)[None, :], scale), aspect="auto", interpolation="none",
                   extent=(-scale, scale, 0, 1))  # fmt: skip
        bar.grid(False)
        bar.spines[:].set_visible(True)
        bar.set_yticks([])
        bar.set_xticks([-scale, -scale / 2, 0, scale / 2, scale])
        bar.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("-", "−")))
    off = gap[np.triu_indices(d, 1)]
    return figure, (
        f"Correlation maps of {d} assets. Mean absolute difference between scenarios and held-out rows "
        f"{np.abs(off).mean():.3f}, largest {widest:.3f}."
    )


# ----------------------------------------------------------------------------------------------- covariance


@_figure
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
    figure = _canvas(340)
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
        _log_ticks(axes.xaxis)
        _per_cent(axes.yaxis)
        above = int((values > edge).sum())
        axes.set_title(f"{name}: {above} above the edge")
        axes.set_xlabel("eigenvalue")
    histograms[0].set_ylabel("share of the eigenvalues")
    rank = np.arange(1, d + 1)
    ranked.axhspan(max(law.lower, low), edge, color=ORANGE, alpha=0.25, linewidth=0)
    for name, values in spectra.items():
        colour, marker = styles[name]
        ranked.plot(rank, np.maximum(values, low), marker, color=colour, markersize=4.5 if d <= 60 else 2.5,
                    markerfacecolor=colour if marker == "o" else "none")  # fmt: skip
    ranked.set_yscale("log")
    _log_ticks(ranked.yaxis)
    ranked.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ranked.set_title("both, by rank")
    ranked.set_xlabel("rank of the eigenvalue")
    _legend(
        figure,
        [
            Line2D([], [], color=INK, marker="o", markersize=5, linestyle="", label="training rows"),
            Line2D(
                [],
                [],
                color=BLUE,
                marker="D",
                markersize=5,
                markerfacecolor="none",
                linestyle="",
                label="scenarios",
            ),  # fmt: skip
            Patch(facecolor=ORANGE, alpha=0.3, label="noise alone (Marchenko–Pastur)"),
            Line2D(
                [], [], color=ORANGE, linewidth=1.4, linestyle=(0, (5, 2)), label=f"edge of noise, {edge:.3g}"
            ),
        ],
    )
    counts = ", ".join(f"{name} {int((v > edge).sum())}" for name, v in spectra.items())
    return figure, (
        f"Eigenvalues of the correlation matrices. Above the noise edge {edge:.3g}: {counts}. Largest: "
        f"{spectra['training rows'][0]:.3g} and {spectra['scenarios'][0]:.3g}."
    )


@_figure
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
    figure = _canvas(70 + 34 * len(table))
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
                axes.annotate(f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}", (value, at), (6, 0),
                              textcoords="offset points", va="center" if k < 2 else "bottom",
                              fontsize=12)  # fmt: skip
        axes.margins(x=0.22)
        if k < 2:
            axes.set_xlim(left=left or None if k == 0 and left else 0)
        else:
            axes.set_xlim(*_spread(values[good], 0.35))
        axes.set_yticks(place, [_shortened(name) for name in table.index], color=INK)
        axes.set_ylim(-0.6, len(table) - 0.4)
        axes.grid(False)
        axes.set_title(title)
        axes.spines["left"].set_visible(k < 2)
        axes.tick_params(axis="y", length=0)
        if k == 0 and left:
            _log_ticks(axes.xaxis)
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


@_figure
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
    names = [_shortened(weights.index[i], 18) for i in order]
    k = values.shape[1]
    columns = min(k, 4)
    rows = -(-k // columns)
    figure = _canvas((52 + max(60, 17.5 * len(order))) * rows)
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
                axes.annotate(_number(float(f"{bar:.1f}")), (bar, at), (4 * side, 0), fontsize=11,
                              textcoords="offset points", va="center", ha="left" if side > 0 else "right")  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(low - (0.26 * width if low < 0 else 0.02 * width), high + 0.26 * width)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_yticks(place, names, color=INK)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_title(_shortened(weights.columns[j], 108 // columns))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(round(value, 6)) + " %"))
    for axes in grid.flat[k:]:
        axes.set_axis_off()
    told = "; ".join(
        f"{name}: largest {weights.index[int(values[:, j].argmax())]} {100 * values[:, j].max():.1f} %"
        for j, name in enumerate(weights.columns)
    )
    return figure, f"Portfolio weights. {told}."


@_figure
def tail_risk(table: pd.DataFrame) -> str:
    """VaR and ES of each portfolio: real number with its 95 % bar, scenarios beside it.

    Parameters
    ----------
    table : DataFrame of `finediff.risk.tail_risk_table`

    Returns
    -------
    str
        SVG.
    """
    figure = _canvas(90 + 29 * len(table))
    place = np.arange(len(table))[::-1].astype(float)
    labels = [f"{_shortened(name, 28)}, {100 * level:g} %" for name, level in table.index]
    missed = 0
    measures = {"VaR": "value at risk", "ES": "expected shortfall"}
    for k, (axes, (short, title)) in enumerate(zip(figure.subplots(1, 2, sharey=True), measures.items())):
        real, made = 100 * table[f"{short} real"].to_numpy(), 100 * table[f"{short} scenarios"].to_numpy()
        half = 196 * table[f"{short} real s.e."].to_numpy()
        inside = np.abs(made - real) <= half
        missed += int((~inside).sum())
        axes.errorbar(
            real, place + 0.12, xerr=half, fmt="o", color=INK, markersize=6, elinewidth=1.4, capsize=3
        )
        axes.plot(made[inside], place[inside] - 0.16, "D", color=BLUE, markersize=6.5)
        axes.plot(made[~inside], place[~inside] - 0.16, "D", color=ORANGE, markersize=6.5)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.7, len(table) - 0.3)
        axes.set_yticks(place, labels, color=INK)
        axes.set_title(f"{title} ({short})")
        axes.set_xlabel("loss in one period")
        _per_cent(axes.xaxis)
        for start in np.flatnonzero(
            np.asarray(table.index.get_level_values(0)[1:] != table.index.get_level_values(0)[:-1])
        ):
            axes.axhline(place[start] - 0.5, color=GRID, linewidth=0.8)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
    _legend(
        figure,
        [
            Line2D(
                [], [], color=INK, marker="o", markersize=6, linewidth=1.4, label="held-out rows, ± 1.96 s.e."
            ),
            Line2D([], [], color=BLUE, marker="D", markersize=6, linestyle="", label="scenarios, within"),
            Line2D(
                [],
                [],
                color=ORANGE,
                marker="D",
                markersize=6,
                linestyle="",
                label="scenarios, outside the bar",
            ),
        ],
    )
    return figure, (
        f"Value at risk and expected shortfall of {len(table)} portfolio and level pairs; {missed} of "
        f"{2 * len(table)} scenario numbers lie outside 1.96 standard errors of the held-out number."
    )


# ----------------------------------------------------------------------------------------------- generators


@_figure
def generator_comparison(distances: Mapping) -> str:
    """Distance of each generator from the ideal, in units of the 95 % bound of real rows.

    Parameters
    ----------
    distances : mapping split -> DataFrame (generators, metrics)
        0: ideal; 1: the edge of what real rows do among themselves. NaN is not drawn.

    Returns
    -------
    str
        SVG.
    """
    first = next(iter(distances.values()))
    names, metrics = list(first.index), list(first.columns)
    figure = _canvas(84 + 31 * len(names))
    place = pd.Series(np.arange(len(names))[::-1].astype(float), index=names)
    looks = [dict(marker="o", color=BLUE, y=0.15), dict(marker="D", color=ORANGE, y=-0.15)]
    beyond = 0
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(grid, metrics):
        axes.axvspan(0, 1, color=TEAL, alpha=0.16, linewidth=0)
        for look, frame in zip(looks, distances.values()):
            for name in names:
                value = frame[metric].get(name, np.nan)
                if not np.isfinite(value):
                    continue
                beyond += value > 1
                far, at = value > _CAP, place[name] + look["y"]
                axes.plot(min(value, _CAP), at, look["marker"], color=look["color"], markersize=6.5, clip_on=False,
                          markerfacecolor=look["color"] if not far else "none")  # fmt: skip
                if far:
                    axes.annotate(f"{value:.0f}×", (_CAP, at), (-6, 0), textcoords="offset points", ha="right",
                                  va="center", fontsize=11)  # fmt: skip
        axes.set_xlim(0, _CAP)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xticks([0, 1, 2, 3, 4])
        axes.set_yticks(place, [_shortened(name, 24) for name in names], color=INK)
        axes.set_title(metric, fontsize=12)
        axes.spines["left"].set_visible(False)
    figure.supxlabel(
        "distance from the ideal, in units of the bound of real rows", fontsize=12.5, color=MUTED
    )
    _legend(
        figure,
        [
            *(
                Line2D(
                    [],
                    [],
                    color=look["color"],
                    marker=look["marker"],
                    markersize=6,
                    linestyle="",
                    label=f"{name} split",
                )  # fmt: skip
                for look, name in zip(looks, distances)
            ),
            Patch(facecolor=TEAL, alpha=0.2, label="as close as real rows are to real rows"),
            Line2D(
                [], [], color=MUTED, marker="o", markerfacecolor="none", linestyle="", label="off the scale"
            ),
        ],
    )
    return (
        figure,
        f"Dot plot of {len(names)} rows and {len(metrics)} measures; {beyond} dots lie beyond the bound.",
    )

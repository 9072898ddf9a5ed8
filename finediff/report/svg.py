"""How a figure is drawn: colours as roles, text as text, no trace of the clock.

Colours are roles, not values: a figure is drawn in the placeholders below and every placeholder is then replaced
by a CSS variable, so that one drawing reads on light and dark paper. Real returns are `INK`, the chosen
scenarios `BLUE`, a second and third series `ORANGE` and `TEAL`: hues that colour-blind readers tell apart, and
each series also has its own marker or dash.

A figure is `WIDTH` units wide, one unit a CSS pixel; its text is in the font of the page. Ids are made of the
figure's name, so that drawings can stand in one page.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from functools import wraps

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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
WIDTH = 880

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


def drawn(draw):
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
        return inline(out.getvalue(), draw.__name__.replace("_", "-"), alternative)

    return svg


def canvas(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.05)
    return figure


def inline(svg: str, name: str, alternative: str) -> str:
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


def number(value: float, _=None) -> str:
    return f"{value:g}".replace("-", "−")


PLAIN = FuncFormatter(number)
COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")


def per_cent(axis, bins: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(bins))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 6)) + " %"))


def log_ticks(axis) -> None:
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.6 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def legend(figure, handles) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0.2)


def shortened(name, most: int = 30) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def dots(label: str, color: str, marker: str, size: float = 6, hollow: bool = False) -> Line2D:
    """A legend's entry for points."""
    face = "none" if hollow else color
    return Line2D(
        [], [], color=color, marker=marker, markersize=size, markerfacecolor=face, linestyle="", label=label
    )


def stroke(label: str, color: str, **look) -> Line2D:
    """A legend's entry for a curve."""
    return Line2D([], [], color=color, label=label, **look)


def band(label: str, color: str, alpha: float) -> Patch:
    """A legend's entry for an area."""
    return Patch(facecolor=color, alpha=alpha, label=label)

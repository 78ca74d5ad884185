"""The look of all charts: colours, sizes and fonts; a figure as part of a page or as a PNG."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.results.text import visible

SERIES: Final = ("#0b62c4", "#b35900", "#1a7f37", "#8250df", "#bf3989", "#0f7b7b", "#7d4e00", "#6e7781")
INK: Final = "#1b1f24"
FAINT: Final = "#57606a"
RULE: Final = "#d0d7de"
PANEL: Final = (380.0, 210.0)
"""Width and height of one panel in points, the unit of its SVG."""

VARIABLES: Final = {color: f"var(--s{n})" for n, color in enumerate(SERIES)} | {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
}
"""Names of the colours in templates/style.css: a dark page has other colours under the same names."""

STYLE: Final[dict[Any, Any]] = {
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "axes.titlesize": 12.0,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "text.parse_math": False,  # a name with $ in it is no formula
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1.0,
    "lines.linewidth": 1.7,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.major.pad": 7.0,
    "ytick.major.pad": 5.0,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be found, and takes the page's font
    "svg.hashsalt": "icm",  # the same figure, the same bytes
}

SVG: Final = "{http://www.w3.org/2000/svg}"
HREF: Final = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", SVG.strip("{}"))
ET.register_namespace("xlink", HREF[1:].split("}")[0])


class Drawn(Figure):
    """A figure that a notebook shows by itself, although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(file, dpi=110, format="png")
        return file.getvalue()


def panel() -> tuple[Figure, Axes]:
    """A figure of one panel, with margins for the ticks' numbers and both labels."""
    width, height = PANEL
    with mpl.rc_context(STYLE):
        figure = Drawn(figsize=(width / 72, height / 72))
        axes = figure.add_subplot()
        figure.subplots_adjust(62 / width, 38 / height, 1 - 12 / width, 1 - 12 / height)
        axes.patch.set_visible(False)
        return figure, axes


def panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels over the same x, and the panels row by row."""
    with mpl.rc_context(STYLE):
        figure = Drawn(figsize=(columns * PANEL[0] / 72, rows * PANEL[1] / 72))
        return figure, list(np.ravel(figure.subplots(rows, columns, sharex=True)))


def complete(figure: Figure, title: str = "") -> None:
    """Put the title above and a legend below."""
    with mpl.rc_context(STYLE):
        if title:
            figure.suptitle(title, fontsize="large")
        if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
            figure.legend(loc="outside lower center", ncols=4)
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)


def write_png(figure: Figure, path: Path, title: str = "") -> None:
    """The figure on white, with the title above and a legend below. Raises OSError."""
    complete(figure, title)
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=110, format="png")


def page_svg(figure: Figure, prefix: str, description: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The figure as an element of a page, in the page's font and colours, light or dark.

    A page's Content-Security-Policy allows no style attributes, so each declaration becomes an attribute, and nothing
    is clipped. prefix: of every id, unique in the page. description: for screen readers. titles: by gid of an artist,
    one for each shape that it draws, shown when the mouse is over it.
    """
    file = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The browser chooses the font, so glyphs that are missing from the one measured here do not matter.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        figure.patch.set_visible(False)
        figure.savefig(file, format="svg")
    root = ET.fromstring(file.getvalue())  # noqa: S314  matplotlib wrote it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style", f"{SVG}clipPath"):
                parent.remove(child)
    for group in root.iter(f"{SVG}g"):
        for drawn, text in zip(_drawn(group), titles.get(group.get("id", ""), ()), strict=False):
            ET.SubElement(drawn, f"{SVG}title").text = visible(text)
    used = {address.lstrip("#") for one in root.iter() if (address := one.get(HREF))}
    for one in root.iter():
        _plain(one, prefix, used)
    kept = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-labelledby": f"{prefix}title"}
    root.attrib.clear()
    root.attrib.update(kept)
    title = ET.Element(f"{SVG}title", {"id": f"{prefix}title"})
    title.text = visible(description)
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")


def _drawn(group: ET.Element) -> Iterator[ET.Element]:
    """The shapes that a group shows, without those that are only defined in it."""
    for child in group:
        if child.tag in (f"{SVG}path", f"{SVG}use"):
            yield child
        elif child.tag != f"{SVG}defs":
            yield from _drawn(child)


def _plain(one: ET.Element, prefix: str, used: set[str]) -> None:
    """Turn style into attributes, drop clip paths and unused ids, and round numbers to a hundredth of a point."""
    style = one.attrib.pop("style", "")
    name = one.attrib.pop("id", None)
    one.attrib.pop("clip-path", None)
    if (one.text or "").isspace():
        one.text = None
    if (one.tail or "").isspace():
        one.tail = None
    for key, value in one.attrib.items():
        one.set(key, f"#{prefix}{value.lstrip('#')}" if key == HREF else _rounded(value))
    if name in used:
        one.set("id", f"{prefix}{name}")
    for declaration in filter(None, style.split(";")):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key != "font":
            one.set(key, VARIABLES.get(value, _rounded(value)))


def _rounded(value: str) -> str:
    """`value` with its numbers rounded to two decimals, on one line."""
    shorter = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(shorter.split())

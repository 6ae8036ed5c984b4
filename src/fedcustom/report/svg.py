"""Charts as inline SVG inside HTML, or as SVG files of their own, with neither script nor library.

Places are percentages of the drawing area, so that a chart is as wide as its page and its texts keep their
size. Lines and bands, which SVG has no percentages for, stand in an inner drawing of 1000 by 1000 that is
stretched; their strokes are not. Colours are names in palette.css, or for a file those that the chart is
given. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from .axes import Axis

MARKS = {
    "circle": "M-3.4 0A3.4 3.4 0 1 1 3.4 0A3.4 3.4 0 1 1-3.4 0Z",
    "square": "M-3-3H3V3H-3Z",
    "diamond": "M0-4.2L4.2 0L0 4.2L-4.2 0Z",
    "triangle-up": "M0-4.2L4 3H-4Z",
    "triangle-down": "M0 4.2L4-3H-4Z",
    "pentagon": "M0-4L3.8-1.2L2.4 3.2H-2.4L-3.8-1.2Z",
    "star": "M0-4.8L1.3-1.6L4.6-1.5L2 .6L2.9 3.9L0 2L-2.9 3.9L-2 .6L-4.6-1.5L-1.3-1.6Z",
    "cross": "M-1.3-3.8H1.3V-1.3H3.8V1.3H1.3V3.8H-1.3V1.3H-3.8V-1.3H-1.3Z",
    "x": "M-3.6-1.9L-1.9-3.6L0-1.7L1.9-3.6L3.6-1.9L1.7 0L3.6 1.9L1.9 3.6L0 1.7L-1.9 3.6L-3.6 1.9L-1.7 0Z",
    "hexagon": "M0-4L3.5-2V2L0 4L-3.5 2V-2Z",
    "bar": "M-4.2-1.4H4.2V1.4H-4.2Z",
    "hit": "M-3 0A3 3 0 1 1 3 0A3 3 0 1 1-3 0Z",
}
"""Symbols by name, around 0, of which a method registers one; ``hit`` is not drawn, it only
feels the pointer."""


FILE_STYLE = """
.grid line{stroke:#d9dee3}
.line{fill:none;stroke:currentColor;stroke-width:2;vector-effect:non-scaling-stroke}
.line.dash{stroke-dasharray:7 5}.line.dot{stroke-dasharray:2 4}
.band{fill:currentColor;opacity:.15}
.marks use,.legend use{fill:currentColor}.marks.hit use{fill:none}.marks.faint{opacity:.75}
.box{fill:currentColor;fill-opacity:.08;stroke:currentColor}.bar{fill:currentColor;fill-opacity:.55}
.whisker{stroke:currentColor}.interval{stroke:currentColor;stroke-width:2}
.mean{stroke:#1f2933;stroke-width:2.5}.gap{stroke:#b3261e;stroke-width:2}
.diagonal{stroke:#5c636d;stroke-dasharray:5 5}.count{fill:#5c636d;text-anchor:middle}
"""
"""What style.css says of charts, for a file of its own."""
FILE_WIDTH, FILE_LEFT, FILE_RIGHT, FILE_TOP, FILE_BOTTOM = 720, 56, 12, 16, 44
"""Widths and heights around the drawing area of a file, in pixels."""
LEGEND_LINE, LEGEND_COLUMNS = 18, 4


@dataclass(frozen=True, slots=True)
class Mark:
    """A symbol at a place (both coordinates from 0 to 1, y upwards) and the text that the pointer shows."""

    x: float
    y: float
    tip: str


@dataclass(slots=True)
class Chart:
    """A chart that is put together layer by layer.

    ``y`` may have ticks that are names; then ``gutter`` is "names", and they have a wider column. ``colours``
    by name are for a chart that becomes a file (:meth:`file`).
    """

    x: Axis
    y: Axis
    x_title: str
    y_title: str = ""
    height: int = 380
    gutter: str = "numbers"
    grid: str = "xy"
    colours: Mapping[str, str] = field(default_factory=dict)
    _stretched: list[Markup] = field(default_factory=list)
    _fixed: list[Markup] = field(default_factory=list)
    _legend: list[_Entry] = field(default_factory=list)

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], paint: str) -> None:
        """The area between two curves, given in the axes' units."""
        there = [*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))]
        self._stretched.append(
            Markup('<polygon class="band" points="{}"{}/>').format(self._points(there), self._paint(paint))
        )

    def line(self, points: Sequence[tuple[float, float]], paint: str, dash: str, opacity: float = 1) -> None:
        """A curve through points in the axes' units."""
        if len(points) > 1:
            self._stretched.append(
                Markup('<polyline class="line {}" points="{}"{}/>').format(
                    dash, self._points(points), self._paint(paint, opacity)
                )
            )

    def marks(self, marks: Iterable[Mark], paint: str, symbol: str, name: str = "", kind: str = "") -> None:
        """Symbols, whose texts begin with ``name``."""
        uses = Markup("").join(
            Markup('<use href="#mark-{}" x="{}" y="{}" data-tip="{}"/>').format(
                symbol, _percent(mark.x), _percent(1 - mark.y), mark.tip
            )
            for mark in marks
        )
        self._fixed.append(
            Markup('<g class="marks {} {}" data-name="{}"{}>{}</g>').format(
                kind, "hit" if symbol == "hit" else "", name, self._paint(paint), uses
            )
        )

    def box(
        self, left: float, right: float, low: float, high: float, paint: str, kind: str, tip: str = ""
    ) -> None:
        """A rectangle between places from 0 to 1."""
        self._fixed.append(
            Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"{}{}/>').format(
                kind,
                *(
                    _percent(value)
                    for value in (left, 1 - high, max(0.0, right - left), max(0.0, high - low))
                ),
                Markup(' data-tip="{}"').format(tip) if tip else "",
                self._paint(paint),
            )
        )

    def segment(
        self, start: tuple[float, float], end: tuple[float, float], kind: str, paint: str = "", tip: str = ""
    ) -> None:
        """A straight line between places from 0 to 1."""
        self._fixed.append(
            Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"{}{}/>').format(
                kind,
                *(_percent(value) for value in (start[0], 1 - start[1], end[0], 1 - end[1])),
                Markup(' data-tip="{}"').format(tip) if tip else "",
                self._paint(paint),
            )
        )

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        """A text around a place."""
        self._fixed.append(
            Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
                kind, _percent(x), _percent(1 - y), text
            )
        )

    def entry(self, name: str, paint: str, dash: str, symbol: str) -> None:
        """A line of the legend; without a ``dash`` its symbol alone."""
        self._legend.append(_Entry(name, self._paint(paint), dash, symbol))

    def html(self) -> Markup:
        """The chart."""
        side = Markup("").join(
            Markup('<span style="top:{}">{}</span>').format(_percent(1 - tick.place), _lines(tick.text))
            for tick in self.y.ticks
        )
        below = Markup("").join(
            Markup('<span style="left:{}">{}</span>').format(_percent(tick.place), tick.text)
            for tick in self.x.ticks
        )
        above = Markup('<p class="axis">{}</p>').format(self.y_title) if self.y_title else ""
        legend = Markup('<ul class="legend">{}</ul>').format(
            Markup("").join(entry.html() for entry in self._legend)
        )
        return Markup(
            '<div class="chart {gutter}">{above}<div class="side" style="height:{height}px">{side}</div>'
            '<svg class="area" width="100%" height="{height}"><g class="grid">{grid}</g>'
            '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
            "{stretched}</svg>"
            '{fixed}</svg><div class="below">{below}</div><p class="axis under">{under}</p>{legend}</div>'
        ).format(
            gutter=self.gutter,
            above=above,
            height=self.height,
            side=side,
            grid=self._grid(),
            stretched=Markup("").join(self._stretched),
            fixed=Markup("").join(self._fixed),
            below=below,
            under=self.x_title,
            legend=legend if self._legend else "",
        )

    def file(self, title: str) -> str:
        """The chart as an SVG document of its own, which can stand in a page as well."""
        width = FILE_WIDTH - FILE_LEFT - FILE_RIGHT
        bottom = FILE_TOP + self.height
        lines = math.ceil(len(self._legend) / LEGEND_COLUMNS)
        texts = [
            _text(FILE_LEFT - 8, FILE_TOP + self.height * (1 - tick.place) + 4, tick.text, "end")
            for tick in self.y.ticks
        ]
        texts += [_text(FILE_LEFT + width * tick.place, bottom + 20, tick.text) for tick in self.x.ticks]
        if self.x_title:
            texts.append(_text(FILE_LEFT + width / 2, bottom + 38, self.x_title))
        legend = [
            entry.file(
                FILE_LEFT + number % LEGEND_COLUMNS * (FILE_WIDTH - FILE_LEFT) / LEGEND_COLUMNS,
                bottom + FILE_BOTTOM + LEGEND_LINE * (number // LEGEND_COLUMNS),
            )
            for number, entry in enumerate(self._legend)
        ]
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {total}" role="img" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#1f2933">'
            "<title>{title}</title><style>{style}</style>{symbols}{texts}"
            '<svg x="{left}" y="{top}" width="{width}" height="{height}" overflow="visible">'
            '<g class="grid">{grid}</g>'
            '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%" '
            'overflow="visible">{stretched}</svg>{fixed}</svg>'
            '<g class="legend">{legend}</g></svg>'
        ).format(
            full=FILE_WIDTH,
            total=bottom + FILE_BOTTOM + LEGEND_LINE * lines,
            title=title,
            style=Markup(FILE_STYLE),
            symbols=_symbols(),
            texts=Markup("").join(texts),
            left=FILE_LEFT,
            top=FILE_TOP,
            width=width,
            height=self.height,
            grid=self._grid(),
            stretched=Markup("").join(self._stretched),
            fixed=Markup("").join(self._fixed),
            legend=Markup("").join(legend),
        )

    def _grid(self) -> Markup:
        lines = [
            Markup('<line x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_percent(1 - tick.place))
            for tick in (self.y.ticks if "y" in self.grid else ())
        ] + [
            Markup('<line y1="0" y2="100%" x1="{0}" x2="{0}"/>').format(_percent(tick.place))
            for tick in (self.x.ticks if "x" in self.grid else ())
        ]
        return Markup("").join(lines)

    def _paint(self, name: str, opacity: float = 1) -> Markup:
        if not name:
            return Markup("")
        colour = f"color:{self.colours[name]}" if self.colours else f"--paint:var(--{name})"
        faded = f";opacity:{opacity:g}" if opacity < 1 else ""
        return Markup(' style="{}{}"').format(colour, faded)

    def _points(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{1000 * self.x.place(x):.1f},{1000 * (1 - self.y.place(y)):.1f}" for x, y in points)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of a legend; ``paint`` is an attribute."""

    name: str
    paint: Markup
    dash: str
    symbol: str

    def html(self) -> Markup:
        return Markup('<li><svg width="28" height="12" aria-hidden="true"{}>{}</svg>{}</li>').format(
            self.paint, self._drawn(0, 6), self.name
        )

    def file(self, x: float, y: float) -> Markup:
        left = 36 if self.dash else 26
        return Markup("<g{}>{}</g>").format(self.paint, self._drawn(x, y - 4)) + _text(
            x + left, y, self.name, "start"
        )

    def _drawn(self, x: float, y: float) -> Markup:
        line = Markup('<line class="line {}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            self.dash, _number(x), _number(y), _number(x + 28), _number(y)
        )
        symbol = Markup('<use href="#mark-{}" x="{}" y="{}"/>').format(
            self.symbol, _number(x + 14), _number(y)
        )
        return line + symbol if self.dash else symbol


def definitions() -> Markup:
    """The symbols, which stand once in a page that has charts."""
    return Markup('<svg class="symbols" width="0" height="0" aria-hidden="true">{}</svg>').format(_symbols())


def _symbols() -> Markup:
    paths = Markup("").join(
        Markup('<path id="mark-{}" d="{}"/>').format(name, path) for name, path in MARKS.items()
    )
    return Markup("<defs>{}</defs>").format(paths)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        _number(x), _number(y), anchor, text
    )


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _lines(text: str) -> Markup:
    return Markup("<br>").join(escape(part) for part in text.split("\n"))

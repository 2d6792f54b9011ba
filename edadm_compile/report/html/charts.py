"""Line, column and band charts over the steps of a sampler, as SVG that takes its colours from the page.

Every chart is drawn for two widths, so that text keeps its size on a telephone; the page shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from edadm_compile.report.html.scales import Linear, linear_ticks, number, timestep

#: Widths in pixels: beside each other on a desktop and in print, and on a telephone.
WIDE, NARROW = 980, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 26, 40


@dataclass(frozen=True)
class Series:
    """One line: its name, its values (None leaves a gap), and the class that gives its colour."""

    name: str
    values: Sequence[float | None]
    style: str


@dataclass
class Frame:
    """An area with axes that marks are added to.

    Attributes:
        timesteps: one for each position on the x axis, in sampling order.
        ticks: labelled values of the y axis; the first and the last are its ends.
        label: of the y axis, with its unit.
    """

    width: int
    height: int
    timesteps: Sequence[float]
    ticks: Sequence[float]
    label: str
    marks: list[str] = field(default_factory=list)

    @property
    def x(self) -> Linear:
        """Step number to pixels; the outer steps keep half a column from the edge."""
        return Linear(-0.5, len(self.timesteps) - 0.5, _LEFT, self.width - _RIGHT)

    @property
    def y(self) -> Linear:
        """Value to pixels."""
        return Linear(self.ticks[0], self.ticks[-1], self.height - _BOTTOM, _TOP)

    def line(self, series: Series) -> None:
        """Add a polyline with gaps where a value is None."""
        points: list[str] = []
        started = False
        for index, value in enumerate(series.values):
            if value is None:
                started = False
                continue
            points.append(f"{'L' if started else 'M'}{self.x(index):.1f} {self.y(value):.1f}")
            started = True
        self.marks.append(f'<path class="line {series.style}" d="{"".join(points)}"/>')

    def columns(self, values: Sequence[float], style: str) -> None:
        """Add a column for each step."""
        width = max(1.0, self.x(1) - self.x(0) - (1.5 if len(values) < 120 else 0))
        for index, value in enumerate(values):
            top, bottom = self.y(value), self.y(max(0.0, self.ticks[0]))
            self.marks.append(
                f'<rect class="column {style}" x="{self.x(index) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(0.0, bottom - top):.1f}"/>'
            )

    def band(self, low: Sequence[float], high: Sequence[float], style: str) -> None:
        """Add the area between two lines."""
        there = [f"{self.x(i):.1f} {self.y(v):.1f}" for i, v in enumerate(high)]
        back = [f"{self.x(i):.1f} {self.y(v):.1f}" for i, v in reversed(list(enumerate(low)))]
        self.marks.append(f'<path class="band {style}" d="M{"L".join([*there, *back])}Z"/>')

    def level(self, value: float, style: str) -> None:
        """Add a horizontal line across the area."""
        y = self.y(value)
        self.marks.append(f'<path class="level {style}" d="M{_LEFT} {y:.1f}H{self.width - _RIGHT}"/>')

    def hover(self, texts: Sequence[str]) -> None:
        """Add an invisible strip for each step whose title a pointer shows."""
        width = self.x(1) - self.x(0)
        for index, text in enumerate(texts):
            self.marks.append(
                f'<rect class="hover" x="{self.x(index) - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" '
                f'height="{self.height - _TOP - _BOTTOM}"><title>{escape(text)}</title></rect>'
            )

    def svg(self, title: str, style: str) -> Markup:
        """The drawing; `title` says what it shows to those who cannot see it."""
        parts = [
            f'<svg class="chart {style}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(title)}" preserveAspectRatio="xMidYMid meet">',
            *self._axes(),
            *self.marks,
            "</svg>",
        ]
        return Markup("".join(parts))

    def _axes(self) -> list[str]:
        parts = [f'<text class="axis-label" x="{_LEFT}" y="{_TOP - 12}">{escape(self.label)}</text>']
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{self.width - _RIGHT}"/>')
            parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{_tick(tick)}</text>')
        for index in _labelled(len(self.timesteps), 4 if self.width < WIDE else 8):
            text = timestep(self.timesteps[index])
            parts.append(
                f'<text class="tick middle" x="{self.x(index):.1f}" y="{self.height - 22}">{escape(text)}</text>'
            )
        middle = (_LEFT + self.width - _RIGHT) / 2
        parts.append(
            f'<text class="axis-label middle" x="{middle:.1f}" y="{self.height - 5}">timestep t, noisiest first</text>'
        )
        return parts


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _labelled(count: int, labels: int) -> list[int]:
    """Evenly spread step numbers that get a label."""
    wanted = min(count, labels)
    return sorted({round(k * (count - 1) / max(1, wanted - 1)) for k in range(wanted)})


def _both(draw: object, title: str, height: int) -> Markup:
    """A drawing for each of the two widths."""
    assert callable(draw)
    return Markup("").join(draw(width, height, title, style) for width, style in ((WIDE, "wide"), (NARROW, "narrow")))


def lines(
    timesteps: Sequence[float], series: Sequence[Series], label: str, title: str, height: int = 264, zero: bool = False
) -> Markup:
    """A line chart of one or more series over the steps.

    Args:
        zero: the y axis begins at 0 at the latest.
    """
    known = [v for s in series for v in s.values if v is not None] or [0.0, 1.0]
    ticks = linear_ticks(min(known + ([0.0] if zero else [])), max(known))

    def draw(width: int, tall: int, text: str, style: str) -> Markup:
        frame = Frame(width, tall, timesteps, ticks, label)
        for item in series:
            frame.line(item)
        frame.hover([_told(timesteps, i, series) for i in range(len(timesteps))])
        return frame.svg(text, style)

    return _both(draw, title, height)


def columns(timesteps: Sequence[float], series: Series, label: str, title: str, height: int = 200) -> Markup:
    """A column chart over the steps, from zero."""
    values = [v or 0.0 for v in series.values]
    ticks = linear_ticks(0.0, max([1.0, *values]), 4)

    def draw(width: int, tall: int, text: str, style: str) -> Markup:
        frame = Frame(width, tall, timesteps, ticks, label)
        frame.columns(values, series.style)
        frame.hover([_told(timesteps, i, [series]) for i in range(len(timesteps))])
        return frame.svg(text, style)

    return _both(draw, title, height)


def ranges(timesteps: Sequence[float], layer: dict[str, list[float]], title: str, height: int = 290) -> Markup:
    """What a layer reads over the steps: all values, the quantiles between, and the ends of its quantizer.

    Args:
        layer: ``low``, ``high``, ``lower``, ``upper`` by step, and ``quantizer`` (smallest, largest) or None.
    """
    limits = layer["quantizer"] or []
    ticks = linear_ticks(min([*layer["low"], *limits]), max([*layer["high"], *limits]))

    def draw(width: int, tall: int, text: str, style: str) -> Markup:
        frame = Frame(width, tall, timesteps, ticks, "value")
        frame.band(layer["low"], layer["high"], "all")
        frame.band(layer["lower"], layer["upper"], "most")
        for limit in limits:
            frame.level(limit, "limit")
        shown = [
            Series(n, layer[k], "") for k, n in (("high", "max"), ("upper", "99 %"), ("lower", "1 %"), ("low", "min"))
        ]
        frame.hover([_told(timesteps, i, shown) for i in range(len(timesteps))])
        return frame.svg(text, style)

    return _both(draw, title, height)


def _told(timesteps: Sequence[float], index: int, series: Sequence[Series]) -> str:
    values = ", ".join(f"{s.name} {number(s.values[index], 4)}" for s in series)
    return f"step {index + 1} of {len(timesteps)}, t = {timestep(timesteps[index])}: {values}"

"""Charts as SVG, made here so that the report can have them without a script.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; where colour tells series apart, the stroke or
the marker does too. Every mark carries its figures as a title; a screen reader gets the chart's label. Sizes are in the SVG's
own units, which are about a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 200
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 52, 12, 26, 38
_MAX_POINT_LABELS = 8  # of points beside their marks
_MAX_BOUNDARIES = 24  # more of them would be a grey ground behind a curve
_Point = tuple[float, float]


def make_element(_name: str, _content: str | Markup = "", **attributes: Any) -> Markup:
    """An element; content and attributes are escaped (Markup is taken as it is)."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _format_coordinate(value))
        for name, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(_name, pairs, _content)


def _format_coordinate(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def make_svg(
    label: str, parts: Iterable[Markup], width: float = _WIDTH, height: float = _HEIGHT, css_class: str = "chart"
) -> Markup:
    return make_element(
        "svg", Markup("").join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_=css_class,
        width=width, height=height,
    )  # fmt: skip


def make_text(x: float, y: float, content: str, css_class: str = "", anchor: str = "start") -> Markup:
    return make_element("text", content, x=x, y=y, text_anchor=anchor, class_=css_class)


def _make_line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> Markup:
    return make_element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css_class)


def _make_dot(x: float, y: float, title: str, css_class: str = "dot", radius: float = 4) -> Markup:
    return make_element("circle", make_element("title", title), cx=x, cy=y, r=radius, class_=css_class)


def format_tick(value: float, digits: int = 4) -> str:
    """A tick's figure."""
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e7 and float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.{digits - 4}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}g}"


def _format_ticks(values: Sequence[float]) -> list[str]:
    """The figures of ticks, with as many digits as it takes to tell them apart."""
    for digits in range(4, 12):
        figures = [format_tick(value, digits) for value in values]
        if len(set(figures)) == len(figures):
            break
    return figures


def _compute_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Round figures that cover what lies between `low` and `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _pad_range(values: Sequence[float]) -> _Point:
    """The span of values, never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        room = abs(low) * 0.1 or 0.5
        return low - room, high + room
    room = (high - low) * 0.05
    return low - room, high + room


class _ChartAxes:
    """The axes of a chart: from data to the SVG's units, with ticks and the names of both axes."""

    def __init__(
        self, x_range: _Point, y_range: _Point, x_label: str, y_label: str, width: float = _WIDTH, height: float = _HEIGHT
    ) -> None:
        self.x_range, self.y_range, self.width, self.height = x_range, y_range, width, height
        self.x_label, self.y_label = x_label, y_label

    def scale_x(self, value: float) -> float:
        return _MARGIN_LEFT + (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (
            self.width - _MARGIN_LEFT - _MARGIN_RIGHT
        )

    def scale_y(self, value: float) -> float:
        return (
            self.height
            - _MARGIN_BOTTOM
            - (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * (self.height - _MARGIN_TOP - _MARGIN_BOTTOM)
        )

    def draw(self, integer_x: bool = False) -> list[Markup]:
        base, parts = self.height - _MARGIN_BOTTOM, []
        up = _compute_ticks(*self.y_range, 4)
        for value, told in zip(up, _format_ticks(up), strict=True):
            parts += [_make_line(_MARGIN_LEFT, self.scale_y(value), self.width - _MARGIN_RIGHT, self.scale_y(value), "grid")]
            parts += [make_text(_MARGIN_LEFT - 6, self.scale_y(value) + 3.5, told, "tick", "end")]
        across = [value for value in _compute_ticks(*self.x_range, 5) if not integer_x or float(value).is_integer()]
        for value, told in zip(across, _format_ticks(across), strict=True):
            parts += [make_text(self.scale_x(value), base + 14, told, "tick", "middle")]
        parts += [_make_line(_MARGIN_LEFT, base, self.width - _MARGIN_RIGHT, base, "axis")]
        parts += [make_text(self.width - _MARGIN_RIGHT, self.height - 6, self.x_label, "name", "end")]
        return [*parts, make_text(4, 10, self.y_label, "name")]


def _make_path(axes: _ChartAxes, points: Sequence[_Point], css_class: str) -> Markup:
    steps = " ".join(f"{'L' if n else 'M'}{axes.scale_x(x):.1f} {axes.scale_y(y):.1f}" for n, (x, y) in enumerate(points))
    return make_element("path", d=steps, class_=css_class)


def draw_curve(
    points: Sequence[Sequence[float]], label: str, x_label: str, y_label: str, update_starts: Sequence[dict[str, int]] = ()
) -> Markup:
    """One measure over steps; `starts` are where an update begins."""
    good = [(float(x), float(y)) for x, y in points if y is not None]
    if not good:
        return Markup("")
    xs = _pad_range([x for x, _ in good]) if len(good) > 1 else (good[0][0] - 1, good[0][0] + 1)
    frame = _ChartAxes((max(xs[0], -0.5), xs[1]), _pad_range([y for _, y in good]), x_label, y_label)
    parts = frame.draw(integer_x=True)
    for start in update_starts[1:] if len(update_starts) <= _MAX_BOUNDARIES else ():
        parts += [
            _make_line(
                frame.scale_x(start["at"] - 0.5),
                _MARGIN_TOP,
                frame.scale_x(start["at"] - 0.5),
                _HEIGHT - _MARGIN_BOTTOM,
                "boundary",
            )
        ]
    parts += [_make_path(frame, good, "curve s0")] if len(good) > 1 else []
    hits = [(frame.scale_x(x), frame.scale_y(y), f"step {x:g}: {y:.4g}") for x, y in good]
    parts += [_make_dot(x, y, title, "hit" if len(hits) > 12 else "dot s0", 3) for x, y, title in hits]
    return make_svg(label, parts)


def draw_by_version(
    rows: Sequence[dict[str, Any]], value_column: str, interval_column: str | None, label: str, unit: str = "share"
) -> Markup:
    """What `value` is for each policy version; `span` is where its interval stands, else `value`_error is half of it."""
    good = [row for row in rows if row[value_column] is not None]
    if not good:
        return Markup("")

    def ends(row: dict[str, Any]) -> _Point:
        error = row.get(f"{value_column}_error") or 0.0
        low, high = (
            (row[interval_column] or (row[value_column], row[value_column]))
            if interval_column
            else (row[value_column] - error, row[value_column] + error)
        )
        return low, high

    frame = _ChartAxes(
        _pad_range([row["policy_version"] for row in good]),
        _pad_range([end for row in good for end in ends(row)]),
        "policy",
        unit,
    )
    parts = frame.draw(integer_x=True)
    for row in good:
        x, (low, high) = frame.scale_x(row["policy_version"]), ends(row)
        title = f"policy {row['policy_version']}: {row[value_column]:.3g} (95 % interval {low:.3g} to {high:.3g})"
        parts += [
            _make_line(x, frame.scale_y(low), x, frame.scale_y(high), "whisker fine s0"),
            _make_dot(x, frame.scale_y(row[value_column]), title, "dot s0", 2.5),
        ]
    return make_svg(label, parts)


def draw_frontier(points: Sequence[dict[str, Any]], label: str) -> Markup:
    """Reward against KL, one point a policy, joined in their order."""
    good = [(p["kl"], p["reward"], p["version"]) for p in points if p["kl"] is not None and p["reward"] is not None]
    if not good:
        return Markup("")
    kls, rewards = _pad_range([0.0, *(kl for kl, _, _ in good)]), _pad_range([reward for _, reward, _ in good])
    frame = _ChartAxes((0.0, kls[1]), rewards, "KL to the reference (nats per sequence)", "reward (normalised)")
    parts = frame.draw()
    parts += [_make_path(frame, [(kl, reward) for kl, reward, _ in good], "curve thin s0")] if len(good) > 1 else []
    named: list[_Point] = []
    for kl, reward, version in reversed(good):  # the newest are named first; a name that would cover another is left out
        x, y = frame.scale_x(kl), frame.scale_y(reward)
        parts += [_make_dot(x, y, f"policy {version}: reward {reward:.4g} at {kl:.4g} nats", "dot s0")]
        end = x > _WIDTH - 60
        if len(named) < _MAX_POINT_LABELS and all(abs(x - other) > 56 or abs(y - above) > 13 for other, above in named):
            named.append((x, y))
            parts += [make_text(x + (-7 if end else 7), y - 6, f"policy {version}", "mark", "end" if end else "start")]
    return make_svg(label, parts)


def draw_histogram(counts: Sequence[int], label: str, x_label: str, y_label: str = "pairs") -> Markup:
    """Counts in equal bins of the span from 0 to 1."""
    frame = _ChartAxes((0.0, 1.0), (0.0, max([*counts, 1]) * 1.08), x_label, y_label)
    parts, size = frame.draw(), 1 / len(counts)
    for n, count in enumerate(counts):
        x, y = frame.scale_x(n * size) + 1, frame.scale_y(count)
        title = make_element("title", f"{n * size:.1f} to {(n + 1) * size:.1f}: {count:,} {y_label}")
        width, height = frame.scale_x((n + 1) * size) - x - 1, _HEIGHT - _MARGIN_BOTTOM - y
        parts.append(make_element("rect", title, x=x, y=y, width=width, height=max(0.0, height), class_="bar s0", rx=1.5))
    return make_svg(label, parts)


def draw_reliability_diagram(bins: Sequence[dict[str, Any]], label: str, x_label: str, y_label: str) -> Markup:
    """What was said against what came true, with intervals; on the diagonal they are the same."""
    frame = _ChartAxes((0.0, 1.0), (0.0, 1.0), x_label, y_label, height=260)
    parts = [*frame.draw(), _make_line(frame.scale_x(0), frame.scale_y(0), frame.scale_x(1), frame.scale_y(1), "diagonal")]
    for each in bins:
        x, (low, high) = frame.scale_x(each["said"]), each["interval"]
        parts.append(_make_line(x, frame.scale_y(low), x, frame.scale_y(high), "whisker s0"))
        title = f"said {each['said']:.2f}, was {each['share']:.2f} (95 % interval {low:.2f} to {high:.2f}, {each['n']:,} pairs)"
        parts.append(_make_dot(x, frame.scale_y(each["share"]), title, "dot s0"))
    return make_svg(label, parts, height=260)


def draw_interval(value: float | None, bounds: Sequence[float] | None, label: str, midpoint: float | None = 0.5) -> Markup:
    """A share with its interval on a line from 0 to 1, for a table's cell."""
    if value is None:
        return Markup("")
    width, y = 132, 10

    def x(share: float) -> float:
        return 6 + share * (width - 12)

    parts = [_make_line(x(0), y, x(1), y, "axis")]
    parts += [_make_line(x(midpoint), 3, x(midpoint), 17, "grid strong")] if midpoint is not None else []
    parts += [_make_line(x(bounds[0]), y, x(bounds[1]), y, "whisker s0")] if bounds else []
    told = f"{label}: {value:.3f}" + (f" (95 % interval {bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
    return make_svg(told, [*parts, _make_dot(x(value), y, told, "dot s0")], width, 20, "inline")


def draw_order_comparison(forward: float | None, backward: float | None, mean: float | None, label: str) -> Markup:
    """The probability that the first answer wins, asked in both orders, on a line from 0 to 1."""
    width, y = 300, 26

    def x(share: float) -> float:
        return 10 + share * (width - 20)

    parts = [_make_line(x(0), y, x(1), y, "axis"), _make_line(x(0.5), y - 9, x(0.5), y + 9, "grid strong")]
    parts += [
        make_text(x(0), 48, "B wins", "tick"),
        make_text(x(0.5), 48, "0.5", "tick", "middle"),
        make_text(x(1), 48, "A wins", "tick", "end"),
    ]
    if forward is not None and backward is not None:
        parts.append(_make_line(x(forward), y, x(backward), y, "whisker s0"))
        parts.append(_make_dot(x(forward), y, f"A shown first: {forward:.3f}", "dot s0", 5))
        square = make_element("title", f"B shown first: {backward:.3f}")
        parts.append(make_element("rect", square, x=x(backward) - 4.5, y=y - 4.5, width=9, height=9, class_="dot s1"))
    if mean is not None:
        parts.append(
            make_element(
                "path", make_element("title", f"mean: {mean:.3f}"), d=f"M{x(mean):.1f} {y - 7} l-5 -9 h10 z", class_="pointer"
            )
        )
    return make_svg(label, parts, width, 54, "orders")


def draw_sparkline(counts: Sequence[int] | None, label: str) -> Markup:
    """Counts over time as small bars."""
    if not counts or not max(counts):
        return Markup("")
    height, wide = 24, 2
    parts = []
    for n, count in enumerate(counts):
        size = count / max(counts) * (height - 2)
        if count:
            parts.append(
                make_element(
                    "rect", x=n * wide, y=height - max(size, 1.0), width=wide - 0.5, height=max(size, 1.0), class_="bar s0"
                )
            )
    return make_svg(label, parts, len(counts) * wide, height, "inline")


def draw_timeline(lanes: Sequence[tuple[str, Sequence[tuple[str, str, str]]]], label: str, width: float = 720) -> Markup:
    """Lanes of events in time: (lane, [(ISO time, mark, title)]). Marks that would cover others are left out, never events."""
    times = [_parse_timestamp(at) for _, events in lanes for at, _, _ in events]
    if not times:
        return Markup("")
    low, high = _pad_range(times)
    left, step = 96, 34
    height = _MARGIN_TOP + step * len(lanes) + 24
    parts: list[Markup] = []
    for n, (lane, events) in enumerate(lanes):
        y = _MARGIN_TOP + step * n + 12
        parts += [make_text(0, y + 4, lane, "lane"), _make_line(left, y, width, y, "grid")]
        free = 0.0
        for at, mark, title in events:
            x = left + (_parse_timestamp(at) - low) / (high - low) * (width - left - 10)
            parts.append(_make_dot(x, y, title, f"dot s{n}", 5))
            if mark and x >= free:
                parts.append(make_text(x, y - 9, mark, "mark", "middle"))
                free = x + 7 * len(mark) + 8
    first, last = (datetime.fromtimestamp(t).isoformat(" ", "seconds") for t in (min(times), max(times)))
    parts += [
        make_text(left, height - 4, first, "tick"),
        make_text(width, height - 4, last if last != first else "", "tick", "end"),
    ]
    return make_svg(label, parts, width, height, "timeline")


def _parse_timestamp(timestamp: str) -> float:
    """Seconds of a time, on an axis of its own (both ends of the axis are written with the same rule)."""
    return datetime.fromisoformat(timestamp.removesuffix("Z")).timestamp()

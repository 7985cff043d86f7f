"""Draw charts as SVG on the server, so that the report needs no script.

The colors are the palette of Okabe and Ito, which is safe for color blindness. If a chart has two series, the shapes
of their markers differ. The `<title>` of a marker contains the values of the marker. Each chart has a label for screen readers.
One SVG unit is about one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 200
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 52, 12, 26, 38
_CHARACTER_WIDTH = 6.6  # the largest width of a digit at the font size of the ticks
_MAX_POINT_LABELS = 8  # the largest number of point labels in one chart
_MAX_BOUNDARIES = 24  # more than 24 vertical lines would hide the curve
_Point = tuple[float, float]


def make_element(_name: str, _content: str | Markup = "", **attributes: Any) -> Markup:
    """Return an SVG element. Content and attributes are escaped; Markup is not escaped again."""
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
    """Return the text of a tick value, with `digits` significant digits."""
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e7 and float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.{digits - 4}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}g}"


def _format_ticks(values: Sequence[float]) -> list[str]:
    """Return the texts of tick values, with enough digits to make them distinct."""
    for digits in range(4, 12):
        texts = [format_tick(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def _compute_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Return round values between `low` and `high`. The number of values is at most about `max_ticks`."""
    if high <= low:
        return [low]
    min_step = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= min_step)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _pad_range(values: Sequence[float]) -> _Point:
    """Return the range of values with a margin. The range is never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    margin = (high - low) * 0.05
    return low - margin, high + margin


class _ChartAxes:
    """Maps the data of a chart to SVG units, and draws the ticks and labels of the axes."""

    def __init__(
        self, x_range: _Point, y_range: _Point, x_label: str, y_label: str, width: float = _WIDTH, height: float = _HEIGHT
    ) -> None:
        self.x_range, self.y_range, self.width, self.height = x_range, y_range, width, height
        self.x_label, self.y_label = x_label, y_label
        self.y_ticks = _compute_ticks(*y_range, 4)
        self.y_tick_labels = _format_ticks(self.y_ticks)
        # Close values need many digits. The margin has space for the longest label.
        self.left = max(_MARGIN_LEFT, 10 + _CHARACTER_WIDTH * max(map(len, self.y_tick_labels), default=0))

    def scale_x(self, value: float) -> float:
        return self.left + (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (
            self.width - self.left - _MARGIN_RIGHT
        )

    def scale_y(self, value: float) -> float:
        return (
            self.height
            - _MARGIN_BOTTOM
            - (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * (self.height - _MARGIN_TOP - _MARGIN_BOTTOM)
        )

    def draw(self, integer_x: bool = False) -> list[Markup]:
        base, parts = self.height - _MARGIN_BOTTOM, []
        for value, label in zip(self.y_ticks, self.y_tick_labels, strict=True):
            parts += [_make_line(self.left, self.scale_y(value), self.width - _MARGIN_RIGHT, self.scale_y(value), "grid")]
            parts += [make_text(self.left - 6, self.scale_y(value) + 3.5, label, "tick", "end")]
        x_ticks = [value for value in _compute_ticks(*self.x_range, 5) if not integer_x or float(value).is_integer()]
        for value, label in zip(x_ticks, _format_ticks(x_ticks), strict=True):
            parts += [make_text(self.scale_x(value), base + 14, label, "tick", "middle")]
        parts += [_make_line(self.left, base, self.width - _MARGIN_RIGHT, base, "axis")]
        parts += [make_text(self.width - _MARGIN_RIGHT, self.height - 6, self.x_label, "axis-label", "end")]
        return [*parts, make_text(4, 10, self.y_label, "axis-label")]


def _make_path(axes: _ChartAxes, points: Sequence[_Point], css_class: str) -> Markup:
    commands = " ".join(f"{'L' if n else 'M'}{axes.scale_x(x):.1f} {axes.scale_y(y):.1f}" for n, (x, y) in enumerate(points))
    return make_element("path", d=commands, class_=css_class)


def draw_curve(
    points: Sequence[tuple[float, float | None, str]],
    label: str,
    x_label: str,
    y_label: str,
    update_starts: Sequence[dict[str, int]] = (),
) -> Markup:
    """Draw one metric over steps. A point is (step, value, name). Draw a vertical line at each step in `update_starts`."""
    data = [(float(x), float(y)) for x, y, _ in points if y is not None]
    if not data:
        return Markup("")
    xs = _pad_range([x for x, _ in data]) if len(data) > 1 else (data[0][0] - 1, data[0][0] + 1)
    axes = _ChartAxes((max(xs[0], 0.5), xs[1]), _pad_range([y for _, y in data]), x_label, y_label)
    parts = axes.draw(integer_x=True)
    for start in update_starts[1:] if len(update_starts) <= _MAX_BOUNDARIES else ():
        parts += [
            _make_line(
                axes.scale_x(start["step"] - 0.5),
                _MARGIN_TOP,
                axes.scale_x(start["step"] - 0.5),
                _HEIGHT - _MARGIN_BOTTOM,
                "boundary",
            )
        ]
    parts += [_make_path(axes, data, "curve s0")] if len(data) > 1 else []
    markers = [(axes.scale_x(x), axes.scale_y(y), f"{name}: {y:.4g}") for x, y, name in points if y is not None]
    parts += [_make_dot(x, y, title, "hover-target" if len(markers) > 12 else "dot s0", 3) for x, y, title in markers]
    return make_svg(label, parts)


def draw_by_version(
    rows: Sequence[dict[str, Any]], value_column: str, interval_column: str | None, label: str, unit: str = "share"
) -> Markup:
    """Draw a value with its 95 % interval for each policy version.

    The interval is in `interval_column`. If `interval_column` is None, the column `<value_column>_error` has the half-width of
    the interval.
    """
    data = [row for row in rows if row[value_column] is not None]
    if not data:
        return Markup("")

    def get_bounds(row: dict[str, Any]) -> _Point:
        error = row.get(f"{value_column}_error") or 0.0
        low, high = (
            (row[interval_column] or (row[value_column], row[value_column]))
            if interval_column
            else (row[value_column] - error, row[value_column] + error)
        )
        return low, high

    axes = _ChartAxes(
        _pad_range([row["policy_version"] for row in data]),
        _pad_range([bound for row in data for bound in get_bounds(row)]),
        "policy",
        unit,
    )
    parts = axes.draw(integer_x=True)
    for row in data:
        x, (low, high) = axes.scale_x(row["policy_version"]), get_bounds(row)
        title = f"policy {row['policy_version']}: {row[value_column]:.3g} (95 % interval {low:.3g} to {high:.3g})"
        parts += [
            _make_line(x, axes.scale_y(low), x, axes.scale_y(high), "whisker fine s0"),
            _make_dot(x, axes.scale_y(row[value_column]), title, "dot s0", 2.5),
        ]
    return make_svg(label, parts)


def draw_frontier(points: Sequence[dict[str, Any]], label: str) -> Markup:
    """Draw reward against KL with one point per policy. A line connects the points in the order of the versions."""
    data = [(p["kl"], p["reward"], p["version"]) for p in points if p["kl"] is not None and p["reward"] is not None]
    if not data:
        return Markup("")
    kls, rewards = _pad_range([0.0, *(kl for kl, _, _ in data)]), _pad_range([reward for _, reward, _ in data])
    axes = _ChartAxes((0.0, kls[1]), rewards, "KL to the reference (nats per sequence)", "reward (normalized)")
    parts = axes.draw()
    parts += [_make_path(axes, [(kl, reward) for kl, reward, _ in data], "curve thin s0")] if len(data) > 1 else []
    labeled: list[_Point] = []
    # Newest first, so that the newest policies get labels. A label that would overlap another is omitted.
    for kl, reward, version in reversed(data):
        x, y = axes.scale_x(kl), axes.scale_y(reward)
        parts += [_make_dot(x, y, f"policy {version}: reward {reward:.4g} at {kl:.4g} nats", "dot s0")]
        parts += _make_point_label(x, y, f"policy {version}", labeled)
    return make_svg(label, parts)


def draw_plane(points: Sequence[dict[str, Any]], label: str, x: str, y: str) -> Markup:
    """Draw one point with its 95 % intervals for each policy. Both axes go from 0 to 1, so that charts can be compared.

    A point has the rates `x` and `y`, and the intervals `<x>_interval` and `<y>_interval`.
    """
    if not points:
        return Markup("")
    height = 320
    axes = _ChartAxes((0.0, 1.0), (0.0, 1.0), x, y, height=height)
    parts = axes.draw()
    labeled: list[_Point] = []
    for point in reversed(points):
        left, top = axes.scale_x(point[x]), axes.scale_y(point[y])
        (x_low, x_high), (y_low, y_high) = point[f"{x}_interval"], point[f"{y}_interval"]
        parts.append(_make_line(axes.scale_x(x_low), top, axes.scale_x(x_high), top, "whisker fine s0"))
        parts.append(_make_line(left, axes.scale_y(y_low), left, axes.scale_y(y_high), "whisker fine s0"))
        title = (
            f"policy {point['policy']}: {x} {point[x]:.3f} ({x_low:.3f} to {x_high:.3f}),"
            f" {y} {point[y]:.3f} ({y_low:.3f} to {y_high:.3f})"
        )
        parts.append(_make_dot(left, top, title, "dot s0"))
        parts += _make_point_label(left, top, f"policy {point['policy']}", labeled)
    return make_svg(label, parts, height=height)


def _make_point_label(x: float, y: float, text: str, labeled: list[_Point]) -> list[Markup]:
    """Return the label of a point, and add its place to `labeled`. Return nothing if it would overlap another label."""
    if len(labeled) >= _MAX_POINT_LABELS or any(
        abs(x - other_x) <= 56 and abs(y - other_y) <= 13 for other_x, other_y in labeled
    ):
        return []
    labeled.append((x, y))
    at_right_edge = x > _WIDTH - 60
    return [make_text(x + (-7 if at_right_edge else 7), y - 6, text, "point-label", "end" if at_right_edge else "start")]


def draw_histogram(counts: Sequence[int], label: str, x_label: str, y_label: str = "pairs") -> Markup:
    """Draw counts in equal bins of the range from 0 to 1."""
    axes = _ChartAxes((0.0, 1.0), (0.0, max([*counts, 1]) * 1.08), x_label, y_label)
    parts, size = axes.draw(), 1 / len(counts)
    for n, count in enumerate(counts):
        x, y = axes.scale_x(n * size) + 1, axes.scale_y(count)
        title = make_element("title", f"{n * size:.1f} to {(n + 1) * size:.1f}: {count:,} {y_label}")
        width, height = axes.scale_x((n + 1) * size) - x - 1, _HEIGHT - _MARGIN_BOTTOM - y
        parts.append(make_element("rect", title, x=x, y=y, width=width, height=max(0.0, height), class_="bar s0", rx=1.5))
    return make_svg(label, parts)


def draw_reliability_diagram(bins: Sequence[dict[str, Any]], label: str, x_label: str, y_label: str) -> Markup:
    """Draw observed shares against predicted probabilities, with 95 % intervals.

    On the diagonal, share and probability are equal.
    """
    axes = _ChartAxes((0.0, 1.0), (0.0, 1.0), x_label, y_label, height=260)
    parts = [*axes.draw(), _make_line(axes.scale_x(0), axes.scale_y(0), axes.scale_x(1), axes.scale_y(1), "diagonal")]
    for row in bins:
        x, (low, high) = axes.scale_x(row["predicted"]), row["interval"]
        parts.append(_make_line(x, axes.scale_y(low), x, axes.scale_y(high), "whisker s0"))
        title = (
            f"predicted {row['predicted']:.2f}, observed {row['observed']:.2f}"
            f" (95 % interval {low:.2f} to {high:.2f}, {row['n']:,} pairs)"
        )
        parts.append(_make_dot(x, axes.scale_y(row["observed"]), title, "dot s0"))
    return make_svg(label, parts, height=260)


def draw_interval(value: float | None, bounds: Sequence[float] | None, label: str, midpoint: float | None = 0.5) -> Markup:
    """Draw a share and its interval on a line from 0 to 1, for a table cell."""
    if value is None:
        return Markup("")
    width, y = 132, 10

    def x(share: float) -> float:
        return 6 + share * (width - 12)

    parts = [_make_line(x(0), y, x(1), y, "axis")]
    parts += [_make_line(x(midpoint), 3, x(midpoint), 17, "grid strong")] if midpoint is not None else []
    parts += [_make_line(x(bounds[0]), y, x(bounds[1]), y, "whisker s0")] if bounds else []
    text = f"{label}: {value:.3f}" + (f" (95 % interval {bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
    return make_svg(text, [*parts, _make_dot(x(value), y, text, "dot s0")], width, 20, "inline")


def draw_order_comparison(forward: float | None, backward: float | None, mean: float | None, label: str) -> Markup:
    """Draw the probability that response A wins, in the two presentation orders, on a line from 0 to 1."""
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
                "path",
                make_element("title", f"mean: {mean:.3f}"),
                d=f"M{x(mean):.1f} {y - 7} l-5 -9 h10 z",
                class_="mean-marker",
            )
        )
    return make_svg(label, parts, width, 54, "order-comparison")


def draw_sparkline(counts: Sequence[int] | None, label: str) -> Markup:
    """Draw counts over time as small bars."""
    if not counts or not max(counts):
        return Markup("")
    height, bar_width = 24, 2
    parts = []
    for n, count in enumerate(counts):
        size = count / max(counts) * (height - 2)
        if count:
            parts.append(
                make_element(
                    "rect",
                    x=n * bar_width,
                    y=height - max(size, 1.0),
                    width=bar_width - 0.5,
                    height=max(size, 1.0),
                    class_="bar s0",
                )
            )
    return make_svg(label, parts, len(counts) * bar_width, height, "inline")


def draw_timeline(rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]], label: str, width: float = 720) -> Markup:
    """Draw all events over time. A row is (name, [(ISO time, label, title)]). Labels that would overlap are omitted."""
    times = [_parse_timestamp(timestamp) for _, events in rows for timestamp, _, _ in events]
    if not times:
        return Markup("")
    low, high = _pad_range(times)
    left, step = 96, 34
    height = _MARGIN_TOP + step * len(rows) + 24
    parts: list[Markup] = []
    for n, (name, events) in enumerate(rows):
        y = _MARGIN_TOP + step * n + 12
        parts += [make_text(0, y + 4, name, "row-name"), _make_line(left, y, width, y, "grid")]
        label_end = 0.0
        for timestamp, event_label, title in events:
            x = left + (_parse_timestamp(timestamp) - low) / (high - low) * (width - left - 10)
            parts.append(_make_dot(x, y, title, f"dot s{n}", 5))
            if event_label and x >= label_end:
                parts.append(make_text(x, y - 9, event_label, "point-label", "middle"))
                label_end = x + 7 * len(event_label) + 8
    first, last = (datetime.fromtimestamp(t).isoformat(" ", "seconds") for t in (min(times), max(times)))
    parts += [
        make_text(left, height - 4, first, "tick"),
        make_text(width, height - 4, last if last != first else "", "tick", "end"),
    ]
    return make_svg(label, parts, width, height, "timeline")


def _parse_timestamp(timestamp: str) -> float:
    """Return a UTC timestamp as seconds, as if it were local time. `fromtimestamp` reverses this for the ends of the axis."""
    return datetime.fromisoformat(timestamp.removesuffix("Z")).timestamp()

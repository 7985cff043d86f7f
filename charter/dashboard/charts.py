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

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 38
MOST_NAMES = 8  # of points beside their marks
MOST_BOUNDARIES = 24  # more of them would be a grey ground behind a curve
Point = tuple[float, float]


def tag(_name: str, _content: str | Markup = "", **attributes: Any) -> Markup:
    """An element; content and attributes are escaped (Markup is taken as it is)."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), figure(value)) for name, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(_name, pairs, _content)


def figure(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def svg(label: str, parts: Iterable[Markup], width: float = WIDTH, height: float = HEIGHT, kind: str = "chart") -> Markup:
    return tag(
        "svg", Markup("").join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_=kind,
        width=width, height=height,
    )  # fmt: skip


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def dot(x: float, y: float, title: str, kind: str = "dot", r: float = 4) -> Markup:
    return tag("circle", tag("title", title), cx=x, cy=y, r=r, class_=kind)


def short(value: float, digits: int = 4) -> str:
    """A tick's figure."""
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e7 and float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.{digits - 4}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}g}"


def told_apart(values: Sequence[float]) -> list[str]:
    """The figures of ticks, with as many digits as it takes to tell them apart."""
    for digits in range(4, 12):
        figures = [short(value, digits) for value in values]
        if len(set(figures)) == len(figures):
            break
    return figures


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round figures that cover what lies between `low` and `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def widened(values: Sequence[float]) -> Point:
    """The span of values, never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        room = abs(low) * 0.1 or 0.5
        return low - room, high + room
    room = (high - low) * 0.05
    return low - room, high + room


class Frame:
    """The axes of a chart: from data to the SVG's units, with ticks and the names of both axes."""

    def __init__(self, xs: Point, ys: Point, x_name: str, y_name: str, width: float = WIDTH, height: float = HEIGHT) -> None:
        self.xs, self.ys, self.width, self.height = xs, ys, width, height
        self.x_name, self.y_name = x_name, y_name

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.height - TOP - BOTTOM)

    def axes(self, whole_x: bool = False) -> list[Markup]:
        base, parts = self.height - BOTTOM, []
        up = ticks(*self.ys, 4)
        for value, told in zip(up, told_apart(up), strict=True):
            parts += [line(LEFT, self.y(value), self.width - RIGHT, self.y(value), "grid")]
            parts += [text(LEFT - 6, self.y(value) + 3.5, told, "tick", "end")]
        across = [value for value in ticks(*self.xs, 5) if not whole_x or float(value).is_integer()]
        for value, told in zip(across, told_apart(across), strict=True):
            parts += [text(self.x(value), base + 14, told, "tick", "middle")]
        parts += [line(LEFT, base, self.width - RIGHT, base, "axis")]
        parts += [text(self.width - RIGHT, self.height - 6, self.x_name, "name", "end")]
        return [*parts, text(4, 10, self.y_name, "name")]


def path(frame: Frame, points: Sequence[Point], kind: str) -> Markup:
    steps = " ".join(f"{'L' if n else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}" for n, (x, y) in enumerate(points))
    return tag("path", d=steps, class_=kind)


def curve(
    points: Sequence[Sequence[float]], label: str, x_name: str, y_name: str, starts: Sequence[dict[str, int]] = ()
) -> Markup:
    """One measure over steps; `starts` are where an update begins."""
    good = [(float(x), float(y)) for x, y in points if y is not None]
    if not good:
        return Markup("")
    xs = widened([x for x, _ in good]) if len(good) > 1 else (good[0][0] - 1, good[0][0] + 1)
    frame = Frame((max(xs[0], -0.5), xs[1]), widened([y for _, y in good]), x_name, y_name)
    parts = frame.axes(whole_x=True)
    for start in starts[1:] if len(starts) <= MOST_BOUNDARIES else ():
        parts += [line(frame.x(start["at"] - 0.5), TOP, frame.x(start["at"] - 0.5), HEIGHT - BOTTOM, "boundary")]
    parts += [path(frame, good, "curve s0")] if len(good) > 1 else []
    hits = [(frame.x(x), frame.y(y), f"step {x:g}: {y:.4g}") for x, y in good]
    parts += [dot(x, y, title, "hit" if len(hits) > 12 else "dot s0", 3) for x, y, title in hits]
    return svg(label, parts)


def by_version(rows: Sequence[dict[str, Any]], value: str, span: str | None, label: str, unit: str = "share") -> Markup:
    """What `value` is for each policy version; `span` is where its interval stands, else `value`_error is half of it."""
    good = [row for row in rows if row[value] is not None]
    if not good:
        return Markup("")

    def ends(row: dict[str, Any]) -> Point:
        error = row.get(f"{value}_error") or 0.0
        low, high = (row[span] or (row[value], row[value])) if span else (row[value] - error, row[value] + error)
        return low, high

    frame = Frame(
        widened([row["policy_version"] for row in good]), widened([end for row in good for end in ends(row)]), "policy", unit
    )
    parts = frame.axes(whole_x=True)
    for row in good:
        x, (low, high) = frame.x(row["policy_version"]), ends(row)
        title = f"policy {row['policy_version']}: {row[value]:.3g} (95 % interval {low:.3g} to {high:.3g})"
        parts += [line(x, frame.y(low), x, frame.y(high), "whisker fine s0"), dot(x, frame.y(row[value]), title, "dot s0", 2.5)]
    return svg(label, parts)


def frontier(points: Sequence[dict[str, Any]], label: str) -> Markup:
    """Reward against KL, one point a policy, joined in their order."""
    good = [(p["kl"], p["reward"], p["version"]) for p in points if p["kl"] is not None and p["reward"] is not None]
    if not good:
        return Markup("")
    kls, rewards = widened([0.0, *(kl for kl, _, _ in good)]), widened([reward for _, reward, _ in good])
    frame = Frame((0.0, kls[1]), rewards, "KL to the reference (nats per sequence)", "reward (normalised)")
    parts = frame.axes()
    parts += [path(frame, [(kl, reward) for kl, reward, _ in good], "curve thin s0")] if len(good) > 1 else []
    named: list[Point] = []
    for kl, reward, version in reversed(good):  # the newest are named first; a name that would cover another is left out
        x, y = frame.x(kl), frame.y(reward)
        parts += [dot(x, y, f"policy {version}: reward {reward:.4g} at {kl:.4g} nats", "dot s0")]
        end = x > WIDTH - 60
        if len(named) < MOST_NAMES and all(abs(x - other) > 56 or abs(y - above) > 13 for other, above in named):
            named.append((x, y))
            parts += [text(x + (-7 if end else 7), y - 6, f"policy {version}", "mark", "end" if end else "start")]
    return svg(label, parts)


def histogram(counts: Sequence[int], label: str, x_name: str, y_name: str = "pairs") -> Markup:
    """Counts in equal bins of the span from 0 to 1."""
    frame = Frame((0.0, 1.0), (0.0, max([*counts, 1]) * 1.08), x_name, y_name)
    parts, size = frame.axes(), 1 / len(counts)
    for n, count in enumerate(counts):
        x, y = frame.x(n * size) + 1, frame.y(count)
        title = tag("title", f"{n * size:.1f} to {(n + 1) * size:.1f}: {count:,} {y_name}")
        width, height = frame.x((n + 1) * size) - x - 1, HEIGHT - BOTTOM - y
        parts.append(tag("rect", title, x=x, y=y, width=width, height=max(0.0, height), class_="bar s0", rx=1.5))
    return svg(label, parts)


def reliability(bins: Sequence[dict[str, Any]], label: str, x_name: str, y_name: str) -> Markup:
    """What was said against what came true, with intervals; on the diagonal they are the same."""
    frame = Frame((0.0, 1.0), (0.0, 1.0), x_name, y_name, height=260)
    parts = [*frame.axes(), line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "diagonal")]
    for each in bins:
        x, (low, high) = frame.x(each["said"]), each["interval"]
        parts.append(line(x, frame.y(low), x, frame.y(high), "whisker s0"))
        title = f"said {each['said']:.2f}, was {each['share']:.2f} (95 % interval {low:.2f} to {high:.2f}, {each['n']:,} pairs)"
        parts.append(dot(x, frame.y(each["share"]), title, "dot s0"))
    return svg(label, parts, height=260)


def interval(value: float | None, span: Sequence[float] | None, label: str, middle: float | None = 0.5) -> Markup:
    """A share with its interval on a line from 0 to 1, for a table's cell."""
    if value is None:
        return Markup("")
    width, y = 132, 10

    def x(share: float) -> float:
        return 6 + share * (width - 12)

    parts = [line(x(0), y, x(1), y, "axis")]
    parts += [line(x(middle), 3, x(middle), 17, "grid strong")] if middle is not None else []
    parts += [line(x(span[0]), y, x(span[1]), y, "whisker s0")] if span else []
    told = f"{label}: {value:.3f}" + (f" (95 % interval {span[0]:.3f} to {span[1]:.3f})" if span else "")
    return svg(told, [*parts, dot(x(value), y, told, "dot s0")], width, 20, "inline")


def orders(forward: float | None, backward: float | None, mean: float | None, label: str) -> Markup:
    """The probability that the first answer wins, asked in both orders, on a line from 0 to 1."""
    width, y = 300, 26

    def x(share: float) -> float:
        return 10 + share * (width - 20)

    parts = [line(x(0), y, x(1), y, "axis"), line(x(0.5), y - 9, x(0.5), y + 9, "grid strong")]
    parts += [
        text(x(0), 48, "B wins", "tick"),
        text(x(0.5), 48, "0.5", "tick", "middle"),
        text(x(1), 48, "A wins", "tick", "end"),
    ]
    if forward is not None and backward is not None:
        parts.append(line(x(forward), y, x(backward), y, "whisker s0"))
        parts.append(dot(x(forward), y, f"A shown first: {forward:.3f}", "dot s0", 5))
        square = tag("title", f"B shown first: {backward:.3f}")
        parts.append(tag("rect", square, x=x(backward) - 4.5, y=y - 4.5, width=9, height=9, class_="dot s1"))
    if mean is not None:
        parts.append(tag("path", tag("title", f"mean: {mean:.3f}"), d=f"M{x(mean):.1f} {y - 7} l-5 -9 h10 z", class_="pointer"))
    return svg(label, parts, width, 54, "orders")


def sparkline(counts: Sequence[int] | None, label: str) -> Markup:
    """Counts over time as small bars."""
    if not counts or not max(counts):
        return Markup("")
    height, wide = 24, 2
    parts = []
    for n, count in enumerate(counts):
        size = count / max(counts) * (height - 2)
        if count:
            parts.append(
                tag("rect", x=n * wide, y=height - max(size, 1.0), width=wide - 0.5, height=max(size, 1.0), class_="bar s0")
            )
    return svg(label, parts, len(counts) * wide, height, "inline")


def timeline(lanes: Sequence[tuple[str, Sequence[tuple[str, str, str]]]], label: str, width: float = 720) -> Markup:
    """Lanes of events in time: (lane, [(ISO time, mark, title)]). Marks that would cover others are left out, never events."""
    times = [seconds_of(at) for _, events in lanes for at, _, _ in events]
    if not times:
        return Markup("")
    low, high = widened(times)
    left, step = 96, 34
    height = TOP + step * len(lanes) + 24
    parts: list[Markup] = []
    for n, (lane, events) in enumerate(lanes):
        y = TOP + step * n + 12
        parts += [text(0, y + 4, lane, "lane"), line(left, y, width, y, "grid")]
        free = 0.0
        for at, mark, title in events:
            x = left + (seconds_of(at) - low) / (high - low) * (width - left - 10)
            parts.append(dot(x, y, title, f"dot s{n}", 5))
            if mark and x >= free:
                parts.append(text(x, y - 9, mark, "mark", "middle"))
                free = x + 7 * len(mark) + 8
    first, last = (datetime.fromtimestamp(t).isoformat(" ", "seconds") for t in (min(times), max(times)))
    parts += [text(left, height - 4, first, "tick"), text(width, height - 4, last if last != first else "", "tick", "end")]
    return svg(label, parts, width, height, "timeline")


def seconds_of(at: str) -> float:
    """Seconds of a time, on an axis of its own (both ends of the axis are written with the same rule)."""
    return datetime.fromisoformat(at.removesuffix("Z")).timestamp()

"""The pipeline as a picture: topics, the stages between them, the loop through the trainer, and the sink; wide and tall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from charter.dashboard.charts import make_element, make_svg, make_text

_BOX_SIZE = (120, 60)
_Positions = dict[str, tuple[float, float]]

_WIDE_POSITIONS: _Positions = {
    "prompts": (70, 60), "respond": (222, 60), "responses": (374, 60), "critique": (526, 60), "critiques": (678, 60),
    "revise": (830, 60), "revisions": (982, 60), "judge": (526, 180), "preferences": (678, 180), "train": (830, 180),
    "policies": (982, 180), "sink": (70, 180),
}  # fmt: skip
_TALL_POSITIONS: _Positions = {
    "prompts": (84, 56), "respond": (280, 56), "responses": (84, 144), "critique": (280, 144), "critiques": (84, 232),
    "revise": (280, 232), "revisions": (84, 320), "judge": (280, 320), "preferences": (84, 408), "train": (280, 408),
    "policies": (84, 496), "sink": (280, 496),
}  # fmt: skip
_TALL_ROW_HEIGHT = 88
_DIAGRAM_SIZES = {"wide": (1052, 250), "tall": (344, 530)}
_STAGE_OUTPUTS = {
    "respond": "responses",
    "critique": "critiques",
    "revise": "revisions",
    "judge": "preferences",
    "train": "policies",
}


def _list_edges(stage_inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Arrows: from the topics that a stage reads, to the topic that it writes."""
    found = [(topic, stage) for stage, topics in stage_inputs.items() for topic in topics]
    return [*found, *_STAGE_OUTPUTS.items(), ("preferences", "train"), ("policies", "respond")]


def draw_pipeline(layout: str, stage_inputs: Mapping[str, Any], notes: Mapping[str, Mapping[str, str]]) -> Markup:
    """The picture in one `shape` (wide or tall). `notes` has for each name its two lines, its state, title and address."""
    places = _WIDE_POSITIONS if layout == "wide" else _TALL_POSITIONS
    width, height = _DIAGRAM_SIZES[layout]
    arrow = make_element("path", d="M0 0 L8 4 L0 8 z")
    marker = make_element(
        "marker", arrow, id=f"arrow-{layout}", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7, orient="auto"
    )
    parts = [make_element("defs", marker)]
    parts += [_draw_arrow(layout, places, one, other) for one, other in _list_edges(stage_inputs)]
    parts += [_draw_node(name, place, notes.get(name, {})) for name, place in places.items()]
    told = "; ".join(f"{name}: {note.get('first', '')} {note.get('second', '')}".strip() for name, note in notes.items())
    return make_svg(f"The pipeline. {told}", parts, width, height, f"picture {layout}")


def _draw_node(name: str, position: tuple[float, float], note: Mapping[str, str]) -> Markup:
    topic = name in _STAGE_OUTPUTS.values() or name == "prompts"
    (wide, high), (x, y) = _BOX_SIZE, position
    kind = ("topic" if topic else "stage") + (f" {note['state']}" if note.get("state") else "")
    box = make_element("rect", x=x - wide / 2, y=y - high / 2, width=wide, height=high, rx=30 if topic else 6)
    title = make_element("title", note.get("title") or name)
    told = [line for line in (note.get("first"), note.get("second")) if line]
    top = y + 4 - 7.5 * len(told)
    lines = [make_text(x, top, name, "node-name", "middle")]
    lines += [make_text(x, top + 16 + 15 * n, line, "node-note", "middle") for n, line in enumerate(told)]
    return make_element("a", Markup("").join([title, box, *lines]), href=note.get("href") or "/", class_=kind)


def _draw_arrow(layout: str, positions: _Positions, source: str, target: str) -> Markup:
    """A line from node to node: straight along a row, stepped or curved elsewhere."""
    (x1, y1), (x2, y2) = positions[source], positions[target]
    half, tall = _BOX_SIZE[0] / 2, _BOX_SIZE[1] / 2
    if y1 == y2 and abs(x1 - x2) < 200:
        side = 1 if x2 > x1 else -1
        steps = f"M{x1 + side * half} {y1} H{x2 - side * (half + 3)}"
    elif (source, target) == ("policies", "respond") and layout == "wide":
        steps = f"M{x1} {y1 + tall} v22 q0 12 -12 12 H{x2 + 12} q-12 0 -12 -12 V{y2 + tall + 3}"
    elif (source, target) == ("policies", "respond"):
        steps = f"M{x1 - half} {y1} h-8 q-10 0 -10 -10 V18 q0 -10 10 -10 H{x2 - 10} q10 0 10 10 V{y2 - tall - 3}"
    elif (source, target) == ("revisions", "critique") and layout == "wide":
        steps = f"M{x1} {y1 - tall} C{x1} 2 {x2} 2 {x2} {y2 - tall - 3}"
    elif layout == "wide":
        steps = f"M{x1} {y1 + tall} C{x1} {y2} {x1} {y2} {x2 - half - 3} {y2}"
    elif abs(y1 - y2) > _TALL_ROW_HEIGHT:  # two rows away: in a lane of its own between the columns
        down, lane, end = (1, 16, x2 - half - 3) if y2 > y1 else (-1, 32, x2 - half - 3)
        x = x1 + half + lane
        steps = f"M{x1 + half} {y1 + down * 12} H{x - 6} Q{x} {y1 + down * 12} {x} {y1 + down * 18} V{y2 - down * 18}"
        steps += f" Q{x} {y2 - down * 12} {x + 6} {y2 - down * 12} H{end}"
    else:
        start, end = x1 - half, x2 + half + 3
        steps = f"M{start} {y1 + 6} C{start - 50} {y1 + 20} {end + 37} {y2 - 16} {end} {y2 - 6}"
    return make_element(
        "path", d=steps, class_="edge loop" if source == "policies" else "edge", marker_end=f"url(#arrow-{layout})"
    )

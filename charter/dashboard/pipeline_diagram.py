"""Draw the diagram of the pipeline with its topics and stages, the trainer and the sink, in a wide or a tall layout."""

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
    "policies": (982, 180), "sink": (70, 180), "grade": (374, 270), "grades": (526, 270),
}  # fmt: skip
_TALL_POSITIONS: _Positions = {
    "prompts": (84, 56), "respond": (280, 56), "responses": (84, 144), "critique": (280, 144), "critiques": (84, 232),
    "revise": (280, 232), "revisions": (84, 320), "judge": (280, 320), "preferences": (84, 408), "train": (280, 408),
    "policies": (84, 496), "sink": (280, 496), "grades": (84, 584), "grade": (280, 584),
}  # fmt: skip
_TALL_ROW_HEIGHT = 88
_DIAGRAM_SIZES = {"wide": (1052, 340), "tall": (344, 618)}
_STAGE_OUTPUTS = {
    "respond": "responses",
    "critique": "critiques",
    "revise": "revisions",
    "judge": "preferences",
    "grade": "grades",
    "train": "policies",
}


def _list_edges(stage_inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the edges of the diagram. Each stage has edges from the topics that it reads, and an edge to its output topic."""
    inputs = [(topic, stage) for stage, topics in stage_inputs.items() for topic in topics]
    return [*inputs, *_STAGE_OUTPUTS.items(), ("preferences", "train"), ("policies", "respond")]


def draw_pipeline(layout: str, stage_inputs: Mapping[str, Any], notes: Mapping[str, Mapping[str, str]]) -> Markup:
    """Draw the pipeline in one `layout` (wide or tall). `notes` maps each node to {first, second, state, title, href}."""
    positions = _WIDE_POSITIONS if layout == "wide" else _TALL_POSITIONS
    width, height = _DIAGRAM_SIZES[layout]
    arrow = make_element("path", d="M0 0 L8 4 L0 8 z")
    marker = make_element(
        "marker", arrow, id=f"arrow-{layout}", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7, orient="auto"
    )
    parts = [make_element("defs", marker)]
    parts += [_draw_arrow(layout, positions, source, target) for source, target in _list_edges(stage_inputs)]
    parts += [_draw_node(name, position, notes.get(name, {})) for name, position in positions.items()]
    description = "; ".join(f"{name}: {note.get('first', '')} {note.get('second', '')}".strip() for name, note in notes.items())
    return make_svg(f"Pipeline diagram. {description}", parts, width, height, f"pipeline {layout}")


def _draw_node(name: str, position: tuple[float, float], note: Mapping[str, str]) -> Markup:
    is_topic = name in _STAGE_OUTPUTS.values() or name == "prompts"
    (width, height), (x, y) = _BOX_SIZE, position
    kind = ("topic" if is_topic else "stage") + (f" {note['state']}" if note.get("state") else "")
    box = make_element("rect", x=x - width / 2, y=y - height / 2, width=width, height=height, rx=30 if is_topic else 6)
    title = make_element("title", note.get("title") or name)
    note_lines = [line for line in (note.get("first"), note.get("second")) if line]
    top = y + 4 - 7.5 * len(note_lines)
    lines = [make_text(x, top, name, "node-name", "middle")]
    lines += [make_text(x, top + 16 + 15 * n, line, "node-note", "middle") for n, line in enumerate(note_lines)]
    return make_element("a", Markup("").join([title, box, *lines]), href=note.get("href") or "/", class_=kind)


def _draw_arrow(layout: str, positions: _Positions, source: str, target: str) -> Markup:
    """Draw an arrow between two nodes. The arrow is straight within a row, and curved or right-angled between rows."""
    (x1, y1), (x2, y2) = positions[source], positions[target]
    half_width, half_height = _BOX_SIZE[0] / 2, _BOX_SIZE[1] / 2
    if y1 == y2 and abs(x1 - x2) < 200:
        side = 1 if x2 > x1 else -1
        path = f"M{x1 + side * half_width} {y1} H{x2 - side * (half_width + 3)}"
    elif (source, target) == ("policies", "respond") and layout == "wide":
        path = f"M{x1} {y1 + half_height} v112 q0 12 -12 12 H{x2 + 12} q-12 0 -12 -12 V{y2 + half_height + 3}"
    elif (source, target) == ("policies", "respond"):
        path = f"M{x1 - half_width} {y1} h-8 q-10 0 -10 -10 V18 q0 -10 10 -10 H{x2 - 10} q10 0 10 10 V{y2 - half_height - 3}"
    elif (source, target) == ("revisions", "critique") and layout == "wide":
        path = f"M{x1} {y1 - half_height} C{x1} 2 {x2} 2 {x2} {y2 - half_height - 3}"
    elif target == "grade" and layout == "wide":
        # Chains: down beside the row of the judge, then along a line above the stage.
        x = x1 if x1 == x2 else x1 - half_width - 16
        turn = "" if x1 == x2 else f" v14 H{x} V{y2 - half_height - 15} H{x2 + 24}"
        path = f"M{x1 - (x1 != x2) * 40} {y1 + half_height}{turn} V{y2 - half_height - 3}"
    elif layout == "wide":
        path = f"M{x1} {y1 + half_height} C{x1} {y2} {x1} {y2} {x2 - half_width - 3} {y2}"
    elif abs(y1 - y2) > _TALL_ROW_HEIGHT:  # more than one row apart: the arrow runs between the columns
        down, gap, end = (1, 16, x2 - half_width - 3) if y2 > y1 else (-1, 32, x2 - half_width - 3)
        x = x1 + half_width + gap
        path = f"M{x1 + half_width} {y1 + down * 12} H{x - 6} Q{x} {y1 + down * 12} {x} {y1 + down * 18} V{y2 - down * 18}"
        path += f" Q{x} {y2 - down * 12} {x + 6} {y2 - down * 12} H{end}"
    else:
        start, end = x1 - half_width, x2 + half_width + 3
        path = f"M{start} {y1 + 6} C{start - 50} {y1 + 20} {end + 37} {y2 - 16} {end} {y2 - 6}"
    return make_element(
        "path", d=path, class_="edge loop" if source == "policies" else "edge", marker_end=f"url(#arrow-{layout})"
    )

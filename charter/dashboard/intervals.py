"""Compute 95 % confidence intervals of shares."""

from __future__ import annotations

from typing import Any

from engine.statistics import compute_wilson_interval


def compute_share(name: str, hits: float, total: int) -> dict[str, Any]:
    """Return {name_share, name_interval}. Both values are None if `total` is 0."""
    return {f"{name}_share": hits / total if total else None, f"{name}_interval": compute_wilson_interval(hits, total)}

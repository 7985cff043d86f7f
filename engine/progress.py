"""Count the finished part of long work. The work updates a WorkProgress, and `charter.progress` displays it.

Code that a caller cannot give a WorkProgress to, such as the loading of a model, uses `track_work`. The command line sets the
display of such work. Without a display, for example in a notebook, nothing is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field


@dataclass
class WorkProgress:
    """The state of long work. The thread of the work writes it, and the thread of a display reads it.

    `step` names what the work does now. `num_done` counts the finished items of this step, and `num_total` is the number of all
    its items, or None if that is unknown. `share` is the finished part from 0 to 1, if the work knows it in another way, such as
    from the size of a file. `started_at` is the monotonic time at which the step began.
    """

    step: str = ""
    num_done: int = 0
    num_total: int | None = None
    share: float | None = None
    started_at: float = field(default_factory=time.monotonic)

    def start_step(self, step: str, num_total: int | None = None) -> None:
        """Begin the next step, and count its items from 0."""
        self.step, self.num_done, self.num_total, self.share = step, 0, num_total, None
        self.started_at = time.monotonic()

    def get_share(self) -> float | None:
        """Return the finished part of this step from 0 to 1, or None if it is unknown."""
        if self.share is not None:
            return min(self.share, 1.0)
        return min(self.num_done / self.num_total, 1.0) if self.num_total else None


_Display = Callable[[str, str], AbstractContextManager[WorkProgress]]
_displays: list[_Display] = []  # the display of this process; empty if there is none


def set_display(display: _Display | None) -> None:
    """Set how this process displays tracked work: a function of the title and the unit of the items. None displays nothing."""
    _displays[:] = [display] if display else []


@contextmanager
def track_work(title: str, unit: str = "") -> Iterator[WorkProgress]:
    """Display the progress of the block, if this process has a display. Yield the WorkProgress that the block updates."""
    with _displays[0](title, unit) if _displays else nullcontext(WorkProgress()) as progress:
        yield progress

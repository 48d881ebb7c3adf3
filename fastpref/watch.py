"""How long work and the one who waits for it talk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class Interrupted(Exception):
    """The run was asked to stop in the middle of work that can be begun again; nothing has changed."""


@dataclass
class Watch:
    """What long work says about itself, and whether it is to stop."""

    note: Callable[[str], None] = lambda _: None  # beside the progress bar, until the next one
    line: Callable[[str], None] = lambda _: None  # to stay on the screen
    stopping: Callable[[], bool] = lambda: False

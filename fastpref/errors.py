"""The one error type for everything a user can cause."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input. The command line prints it on one line and exits with 2.

    Args:
        what: what is wrong, e.g. ``"beta is -1.0, must be > 0"``.
        where: the file, key or record it was found in; empty if ``what`` says it.
        todo: what to do about it.

    Attributes:
        shared: every rank of the run raises it, so one line says it for all; None: before they have met.
    """

    shared: bool | None = None

    def __init__(self, what: str, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(what, where, todo)

    def __str__(self) -> str:
        line = self.what + (f" ({self.where})" if self.where else "") + (f": {self.todo}" if self.todo else "")
        return " ".join(line.split())

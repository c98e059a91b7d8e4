"""The one exception a user sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MedclError(Exception):
    """An error that a user can cause and mend, in one line: what, where, remedy.

    Args:
        what: what is wrong, in the user's terms.
        where: the file, option or layer it concerns.
        remedy: what to do about it.
    """

    def __init__(self, what: str, where: object = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        line = f"{where}: {what}" if where is not None else what
        super().__init__(" ".join((f"{line}. {remedy}" if remedy else line).split()))

    def __reduce__(self):  # survives the trip out of a worker process
        return type(self), (self.what, self.where, self.remedy)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """For scripts: a `MedclError` inside ends the process with its one line, as it ends the command line."""
    try:
        yield
    except MedclError as error:
        raise SystemExit(f"medcl: error: {error}") from None

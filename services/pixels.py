"""How many pixels one request may have decoded, and made by resizing, before anything is allocated for them."""

from __future__ import annotations

from services.problems import Problem

_FREE = 4
"""Times a teacher's input: what resizing may make of any picture. A strip of 1 × 10⁶ is small before it, not after."""


class PixelBudget:
    """For one request, of one picture or of many: all of them together have what one alone may have."""

    def __init__(self, most: int) -> None:
        """Nothing is spent yet.

        Args:
            most: width × height, of the largest picture or summed over all; and once more for what is resized.
        """
        self.most, self._decoded, self._resized = most, 0, 0

    def decode(self, width: int, height: int) -> None:
        """Before a picture is decoded; raises a 413 `Problem`."""
        self._decoded += width * height
        self._require(self._decoded)

    def resize(self, width: int, height: int, target: int) -> None:
        """Before a picture is resized to this size.

        Args:
            width: in pixels.
            height: in pixels.
            target: pixels of the teacher's input.

        Raises:
            Problem: 413.
        """
        if width * height > _FREE * target:
            self._resized += width * height
            self._require(self._resized)

    def _require(self, found: int) -> None:
        if found > self.most:
            raise too_many(found, self.most)


def too_many(found: object, most: int) -> Problem:
    """The 413 that says so."""
    hint = "Send smaller ones, or fewer at a time."
    return Problem(413, "image", f"must have at most {most} pixels, all of a request together", found, hint)

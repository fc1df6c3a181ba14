"""The log of a server: one JSON object a line, or lines for people where standard error is a terminal.

Lines are written by a thread of their own, because a pipe that nobody reads must not stop the event loop.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

_MOST = 10_000
"""Lines that may wait to be written."""
_OURS = ("services", "uvicorn")


class Level(StrEnum):
    """`--log-level`: what is logged, and what is worse than it."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class JsonFormatter(logging.Formatter):
    """One object a line; facts of a request are members beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its line feed."""
        body = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            body["error"] = self.formatException(record.exc_info)
        return json.dumps(body)


class LineFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, with the request's id and key at its end."""
        facts = getattr(record, "facts", {})
        ends = [f"{name}={facts[name]}" for name in ("key", "images", "limit", "request_id") if facts.get(name)]
        return " ".join([super().formatMessage(record), *ends])


class _Queue(logging.handlers.QueueHandler):
    """Formats where the line is made, and hands it over; lines beyond the bound are counted and left out."""

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._lines, self._lost = lines, 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never waits."""
        try:
            if self._lost:
                told = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
                told.msg = f"{self._lost} lines were lost: nobody read them"
                self._lines.put_nowait(self.prepare(told))
                self._lost = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._lost += 1


@contextmanager
def logging_to(stream: TextIO, level: Level) -> Iterator[None]:
    """Sends what this process logs, and Python's warnings, to a stream; at the end all of it is written."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST)
    handler, writer = _Queue(lines), logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter() if stream.isatty() else JsonFormatter())
    listener = logging.handlers.QueueListener(lines, writer)
    logging.getLogger().addHandler(handler)
    before = {name: logging.getLogger(name).level for name in ("", *_OURS)}
    # Others at their worst only: below that, a decoder of images says what it reads.
    for name in before:
        wanted = logging.getLevelNamesMapping()[level.upper()]
        logging.getLogger(name).setLevel(wanted if name else max(wanted, logging.WARNING))
    logging.captureWarnings(True)
    listener.start()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, old in before.items():
            logging.getLogger(name).setLevel(old)
        logging.getLogger().removeHandler(handler)
        listener.stop()


__all__ = ["JsonFormatter", "Level", "LineFormatter", "logging_to"]

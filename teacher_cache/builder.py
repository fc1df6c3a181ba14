"""One builder of a cache: who it is, until when its lease runs, and whether it is still alive."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import CorruptionError
from teacher_cache.signed import checked

HERE: set[str] = set()
"""Builders that this process runs: one that ended without giving its lease back is gone, though its process is not."""


@dataclass(frozen=True)
class Builder:
    """One builder, as its lease says."""

    id: str
    """Drawn at random."""
    host: str
    """For people: two hosts may have one name."""
    machine: str
    """The running system that its process number belongs to: another boot or another container is another."""
    pid: int
    born: str
    """When the process began, as the system counts: a process number is given out again."""
    joined: bool
    """Whether it was told that it may share the work."""
    since: float
    """Seconds since 1970, by its host's clock."""
    until: float
    """After this nobody need think that it is alive."""
    exclusive: bool = False
    """Whether nobody may build beside it, nor join: it repairs, or gives up."""

    @classmethod
    def from_bytes(cls, data: bytes | None) -> Builder | None:
        """Reads a lease; None for what is no lease: whoever wrote half of one is gone, or will write it again."""
        try:
            return cls(**checked(data, "builders")) if data is not None else None
        except (CorruptionError, TypeError):
            return None

    @property
    def alive(self) -> bool:
        """Whether it may still be at work."""
        if self.machine == _machine():
            if self.pid == os.getpid():
                return self.id in HERE
            if _born(self.pid) != self.born:
                return False
        return time.time() < self.until

    @classmethod
    def here(cls, joined: bool, exclusive: bool = False) -> Builder:
        """A new builder, in this process; its lease has run out."""
        now, pid = time.time(), os.getpid()
        host = socket.gethostname()
        return cls(uuid.uuid4().hex, host, _machine(), pid, _born(pid), joined, now, now, exclusive)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {_clock(self.since)}, lease until {_clock(self.until)}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _machine() -> str:
    """Names the running kernel and the process numbers' namespace; the host's name where neither can be had."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}"


def _born(pid: int) -> str:
    """When a process of this machine began; empty where there is none."""
    try:
        # The name of the program, in brackets, may hold anything; the state is the first field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"

"""Many files as one array: a stretch of addresses is reserved, and each file is mapped at its own place in it.

With one memory map for each file, a random batch would take a Python call for every shard it touches. In one stretch
of addresses a row's place is arithmetic, and a batch is gathered by one call, however many files it comes from.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache

import numpy as np
from numpy.typing import NDArray

_NOTHING, _FIXED = 0x0, 0x10
"""PROT_NONE and MAP_FIXED: what Python's `mmap` does not offer; the same on Linux and macOS."""


class Region:
    """Slots of equal size; a slot that no file was placed in must not be read.

    Nothing is resident but the pages that were touched, and no file stays open. What is placed after a fork is placed
    in that process alone.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Reserves addresses, no memory.

        Args:
            slots: how many files there may be.
            slot_bytes: room for the largest of them; rounded up to whole pages.
        """
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = max(1, slots) * self.slot_bytes
        self._address = _map(None, self._size, _NOTHING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._release = weakref.finalize(self, _unmap, self._address, self._size)
        buffer = (ctypes.c_char * self._size).from_address(self._address)
        self.bytes: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), np.uint8)
        """All slots, one after the other."""

    def place(self, slot: int, handle: int, size: int) -> NDArray[np.uint8]:
        """Maps an open file of at least one byte into a slot, read-only; gives its bytes."""
        assert 0 < size <= self.slot_bytes, "the caller has compared sizes"
        start = slot * self.slot_bytes
        _map(self._address + start, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, handle)
        return self.bytes[start : start + size]

    def clear(self) -> None:
        """Takes every file out again."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        _map(self._address, self._size, _NOTHING, flags, -1)


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    integer, size = ctypes.c_int, ctypes.c_size_t
    library.mmap.argtypes = (ctypes.c_void_p, size, integer, integer, integer, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, size)
    return library


def _map(address: int | None, size: int, protection: int, flags: int, handle: int) -> int:
    found = _libc().mmap(address, size, protection, flags, handle, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def _unmap(address: int, size: int) -> None:
    _libc().munmap(address, size)

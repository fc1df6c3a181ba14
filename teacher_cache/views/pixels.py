"""torchvision's operations on pixels, as `torchvision.transforms.v2.functional` has them.

torchvision is loaded with the first that is called: it brings torch's compiler, and takes as long as torch itself.
Whoever reads a cache, serves a teacher or asks for help draws no view.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The operation of that name."""
    if name.startswith("__"):
        raise AttributeError(name)
    from torchvision.transforms.v2 import functional

    found = globals()[name] = getattr(functional, name)
    return found


def load() -> None:
    """Loads it now: where processes are forked that will draw views, it is loaded once, and shares its memory."""
    __getattr__("resize")

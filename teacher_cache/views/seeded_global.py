"""The user's own callable as a view, under the weaker promise `seeded-global`.

The callable draws from torch's global generator, which is seeded for each (sample, view) and put back. Its
pixels may change with a release of torch or torchvision, so both versions are part of the fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.errors import SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.imports import import_attribute
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views.drawing import Drawn
from teacher_cache.views.operations import Images, Params, Sizes
from teacher_cache.views.partners import Pool
from teacher_cache.views.philox import Words
from teacher_cache.views.rendering import FASTEST, How


def _load(reference: str) -> Callable[[Tensor], Tensor]:
    loaded: Callable[[Tensor], Tensor] = import_attribute(reference, "views.callable")
    return loaded


@dataclass(frozen=True)
class SeededGlobal:
    """A callable `uint8 [C, H, W] -> uint8 [C, H, W]` named as `module:attribute`.

    Deterministic for given versions of torch and torchvision. Not thread-safe: it borrows the global
    generator.
    """

    reference: str
    seed: int
    normalize: NormalizeSpec | None = None

    promise: ClassVar[str] = "seeded-global"
    param_names: ClassVar[tuple[str, ...]] = ("generator_seed",)
    random: ClassVar[bool] = True
    rounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(_load(self.reference)):
            raise SpecError("views.callable", "must name a callable", self.reference, "Name a transform.")

    def describe(self) -> dict[str, str]:
        """What is known of the callable: its name and the versions that its pixels depend on."""
        import torchvision

        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        return {
            "callable": self.reference,
            "repr": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(_load(self.reference))),
            **versions,
        }

    @property
    def fingerprint(self) -> str:
        """Names the callable, the seed and both library versions."""
        return fingerprint("seeded-global", 1, {**self.describe(), "seed": self.seed})

    @property
    def view_fingerprint(self) -> str:
        """The same: normalisation is the callable's own affair or the teacher's."""
        return self.fingerprint

    @property
    def renderer(self) -> str:
        """A callable knows no batch."""
        return "image by image"

    @property
    def mixing(self) -> None:
        """A callable sees one image at a time."""
        return None

    def partners(self, params_BP: Params) -> None:
        """There are none."""
        return

    def draw(self, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int, pool: Pool | None = None) -> Drawn:
        """The generator seed of each sample, int32 [B, 1]: torch's CPU generator keeps 32 bits only."""
        words = Words(digests_B, view, 0, self.seed).block(0)
        return Drawn(np.ascontiguousarray(words[:, :1]).view(np.int32), [])

    def render(
        self, images: Images, params_BP: Params, partners: Images = (), how: How = FASTEST
    ) -> tuple[Images, None]:
        """Calls the user's callable on each image, always where the images are: it knows no batch and no device."""
        seeds = params_BP[:, 0].tolist()
        return [self._call(image, seed & 0xFFFFFFFF) for image, seed in zip(images, seeds, strict=True)], None

    def _call(self, image_CHW: Tensor, seed: int) -> Tensor:
        """Seeds the global generator, calls, and restores the generator: 4 µs, where `fork_rng` takes 300."""
        saved = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            # A copy: a transform that works in place must not reach the next view of the same decoding.
            view = _load(self.reference)(image_CHW.clone())
        except Exception as error:
            # Whatever a user's transform raises is the transform's fault; it is named and chained.
            hint = "It is called with a uint8 tensor [C, H, W]; correct it, then run the same command again."
            raise SpecError(self.reference, f"raised {error!r}", tuple(image_CHW.shape), hint) from error
        finally:
            torch.default_generator.set_state(saved)
        if not (isinstance(view, Tensor) and view.dtype == torch.uint8 and view.ndim == 3):
            found = f"{view.dtype} {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
            rule = "must return a uint8 tensor [C, H, W]"
            raise SpecError(self.reference, rule, found, "Leave scaling and normalisation to the teacher.")
        return view.as_subclass(Tensor)

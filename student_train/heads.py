"""Heads beside each other on one body, which answer together as an ensemble does."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from teacher_cache.errors import SpecError


class Heads(nn.Module):
    """A student's last layer: M linear heads, of which `HeadsKD` makes each follow a teacher of its own.

    It answers as `losses.mean_of_probabilities` has it, or as `losses.geometric_mean`; what the heads say by
    themselves is the output of the module `each`, [B, M · C].
    """

    def __init__(
        self, width: int, heads: int, classes: int, mean_of: Literal["probabilities", "logits"] = "probabilities"
    ) -> None:
        """Makes the layer.

        Args:
            width: of the features that it reads.
            heads: M, one for each teacher.
            classes: of each head.
            mean_of: what the answer is the mean of.

        Raises:
            SpecError: `mean_of` is neither; a vote of heads has no gradient.
        """
        super().__init__()
        if mean_of not in ("probabilities", "logits"):
            raise SpecError("heads.mean_of", "must be probabilities or logits", mean_of, "Choose one of both.")
        self.each = nn.Linear(width, heads * classes)
        self.heads, self.mean_of = heads, mean_of

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features to the logits of all heads together, [B, C]; of probabilities they are logarithms."""
        heads_BMC = self.each(features_BD).unflatten(1, (self.heads, -1))
        if self.mean_of == "logits":
            mean_BC: Tensor = heads_BMC.mean(1)
            return mean_BC
        log_p_BC: Tensor = heads_BMC.float().log_softmax(-1).logsumexp(1) - math.log(self.heads)
        return log_p_BC

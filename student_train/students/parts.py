"""What the larger students share: the check of their width, and how their weights begin."""

from __future__ import annotations

from torch import nn

from teacher_cache.errors import SpecError


def require_width(name: str, value: int, paper: int) -> None:
    """Refuses a width that is no number of channels.

    Args:
        name: of the argument.
        value: what was given.
        paper: the width that the model was published with, for the message.

    Raises:
        SpecError: it is not a whole number, or below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        hint = f"{paper} is the published width, {paper // 2} half of it."
        raise SpecError(f"arguments.{name}", "must be a whole number of channels, at least 1", value, hint)


def initialise(model: nn.Module) -> None:
    """Draws the weights of convolutions from N(0, 2 / (outputs · area)), and sets their biases to 0.

    He et al., "Delving deep into rectifiers", 2015, equation 14: gradients keep their size on the way back. Linear
    layers and batch norms stay as torch makes them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

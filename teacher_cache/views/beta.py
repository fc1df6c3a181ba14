"""Numbers from Beta(α, α), drawn from the words of an address by rejection.

Jöhnk's algorithm for α below 1 and Cheng's BB for α above 1 (Devroye, "Non-Uniform Random Variate Generation",
1986, sections IX.3.5 and IX.4.2); α = 1 is the uniform distribution.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from teacher_cache.views.philox import Words, unit

TRIES = 256
"""A try is taken with a probability of at least ½ (Jöhnk) or ⅔ (Cheng): all fail less than once in 10⁷⁷."""


def draw_beta(words: Words, alpha: float, first: int) -> NDArray[np.float64]:
    """One number in 0..1 for each sample.

    Args:
        words: the addresses.
        alpha: both parameters of the distribution, above 0.
        first: the first block to use; block `first` + i is try i.
    """
    if alpha == 1:
        return unit(words.block(first)[:, 0])
    drawn = np.full(len(words), 0.5)
    pending = np.arange(len(words))
    attempt = _johnk if alpha < 1 else _cheng
    for number in range(TRIES):
        block = words.block(first + number, pending)
        # In (0, 1): both algorithms take logarithms.
        taken, values = attempt(unit(block[:, 0]) + 2.0**-33, unit(block[:, 1]) + 2.0**-33, alpha)
        drawn[pending[taken]] = values[taken]
        pending = pending[~taken]
        if not len(pending):
            break
    return drawn


Attempt = tuple[NDArray[np.bool_], NDArray[np.float64]]


def _johnk(u_B: NDArray[np.float64], v_B: NDArray[np.float64], alpha: float) -> Attempt:
    """Y ⁄ (Y + Z) with Y = U^(1/α), Z = V^(1/α), where Y + Z is at most 1; in logarithms, as both may underflow."""
    y_B, z_B = np.log(u_B) / alpha, np.log(v_B) / alpha
    return np.logaddexp(y_B, z_B) <= 0, 1 / (1 + np.exp(np.minimum(z_B - y_B, 700)))


def _cheng(u_B: NDArray[np.float64], v_B: NDArray[np.float64], alpha: float) -> Attempt:
    """Cheng's BB with both parameters α: W ⁄ (α + W), W = α · exp(V)."""
    v = np.log(u_B / (1 - u_B)) / math.sqrt(alpha)
    w = alpha * np.exp(v)
    level = 2 * alpha * np.log(2 * alpha / (alpha + w)) + (alpha + math.sqrt(alpha)) * v - math.log(4)
    accepted: NDArray[np.bool_] = level >= np.log(u_B * u_B * v_B)
    return accepted, w / (alpha + w)

"""What was measured of each encoding before one was picked: kept in the manifest, so that the choice can be judged."""

from __future__ import annotations

from teacher_cache.spec import EncodingSpec, Strict


class Measured(Strict):
    """What one encoding costs and loses, on the calibration rows."""

    encoding: EncodingSpec
    bytes: int
    """Of a row; the mean, where rows differ."""
    kl: dict[str, float]
    """Mean KL(teacher ‖ decoded) in nats, by temperature."""
    total_variation: float
    """Mean ½ Σ |p̂ − p| at T = 1."""
    top1: float
    """Share of rows whose largest class stays the largest."""
    gradient_error: dict[str, float]
    """Mean ‖p̂ − p‖ ÷ mean ‖p − uniform‖, by temperature: how far the gradient of the KD loss, T (q − p), is off for a
    student that knows nothing yet."""

    @property
    def name(self) -> str:
        """Kind and what sets it apart: `top_k 5`, `dense_u8 0.25`, `nucleus 0.99`."""
        described = self.encoding.model_dump(include={"kind", "k", "step", "mass"})
        return " ".join(str(value) for value in described.values())

    @property
    def worst(self) -> float:
        """The largest KL over the temperatures."""
        return max(self.kl.values())


class Calibration(Strict):
    """The whole table, and what was picked from it."""

    chosen: EncodingSpec
    rows: int
    table: tuple[Measured, ...]
    """From the smallest to the largest."""

"""Step 9, losses: pure functions of what a student answers and of targets; each a scalar, the mean over the batch."""

from student_train.losses.soft_targets import (
    learned_temperature,
    logit_mse,
    reversal_weight,
    reversed_gradient,
    soft_label_loss,
    soft_target_loss,
    standardised,
    standardised_target,
)

__all__ = [
    "learned_temperature",
    "logit_mse",
    "reversal_weight",
    "reversed_gradient",
    "soft_label_loss",
    "soft_target_loss",
    "standardised",
    "standardised_target",
]

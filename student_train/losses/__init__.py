"""Step 9, losses: pure functions of what a student answers and of targets; each a scalar, the mean over the batch."""

from student_train.losses.correlation import (
    correlations,
    dist_loss,
)
from student_train.losses.decoupled import (
    decoupled_kl,
    dkd_loss,
    nkd_loss,
)
from student_train.losses.ensembles import (
    geometric_mean,
    majority_vote,
    mean_of_probabilities,
)
from student_train.losses.features import (
    attention_map,
    attention_transfer_loss,
    feature_mae,
    feature_mse,
    flow_loss,
    flow_matrix,
    hint_loss,
    normalised_activation_loss,
    saliency_loss,
)
from student_train.losses.relations import (
    angle_loss,
    distance_loss,
    similarity_loss,
)
from student_train.losses.self_supervised import (
    FeatureQueue,
    seed_loss,
)
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
    "FeatureQueue",
    "angle_loss",
    "attention_map",
    "attention_transfer_loss",
    "correlations",
    "decoupled_kl",
    "dist_loss",
    "distance_loss",
    "dkd_loss",
    "feature_mae",
    "feature_mse",
    "flow_loss",
    "flow_matrix",
    "geometric_mean",
    "hint_loss",
    "learned_temperature",
    "logit_mse",
    "majority_vote",
    "mean_of_probabilities",
    "nkd_loss",
    "normalised_activation_loss",
    "reversal_weight",
    "reversed_gradient",
    "saliency_loss",
    "seed_loss",
    "similarity_loss",
    "soft_label_loss",
    "soft_target_loss",
    "standardised",
    "standardised_target",
]

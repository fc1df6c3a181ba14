"""Train small students from cached soft targets, with no teacher in memory: the last three of the ten steps.

8. `stream`     re-creates the teacher's views, joins them with the cached rows, stops and goes on anywhere
9. `losses` and `objective`   pure functions; named weighted terms that declare which fields they read
10. `train`     one flat loop
"""

from student_train.answer import Answer, Taps
from student_train.cached_rows import CachedRows, OwnViews
from student_train.dataset import ViewDataset
from student_train.ensemble_terms import EnsembleKD, HeadsKD
from student_train.feature_terms import AttentionTransfer, Feature, Relations, SimilarityPreserving
from student_train.flow_term import Flow
from student_train.heads import Heads
from student_train.objective import Objective
from student_train.recipes import TrainSpec
from student_train.saliency_term import Saliency
from student_train.seed_term import SEED
from student_train.stream import Batch, Share, ViewStream
from student_train.temperature_term import LearnedTemperatureKD
from student_train.terms import DIST, DKD, KD, NKD, CrossEntropy, LogitMSE
from student_train.train import FitResult, fit
from student_train.weight import Schedule

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "NKD",
    "SEED",
    "Answer",
    "AttentionTransfer",
    "Batch",
    "CachedRows",
    "CrossEntropy",
    "EnsembleKD",
    "Feature",
    "FitResult",
    "Flow",
    "Heads",
    "HeadsKD",
    "LearnedTemperatureKD",
    "LogitMSE",
    "Objective",
    "OwnViews",
    "Relations",
    "Saliency",
    "Schedule",
    "Share",
    "SimilarityPreserving",
    "Taps",
    "TrainSpec",
    "ViewDataset",
    "ViewStream",
    "fit",
]

"""The data of a configuration: what is trained on, what is measured on, and what is held out for choices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from student_train.cached_rows import CachedRows, OwnViews, WithoutAnswers
from student_train.data import LabelledRows, Rows, only
from student_train.evaluate import require_measurable
from student_train.held_out import split
from student_train.recipes import DataSpec, EvaluateSpec, RunSpec
from teacher_cache import Cache
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.spec import NormalizeSpec, ViewSpec
from teacher_cache.views import open_recipe


@dataclass(frozen=True)
class Opened:
    """The data of a configuration, opened once and used by every arm and seed."""

    train: Rows
    test: Rows
    teacher: str | None = None
    """The field of the evaluation data that a student is held against."""
    validation: Rows | None = None
    """Rows of the training data that are held out, as an evaluation shows them."""


def open_data(spec: RunSpec) -> Opened:
    """Opens the training, the evaluation and, if rows are held out, the validation data.

    Raises:
        MismatchError: a class number does not mean the same in both.
        SpecError: rows cannot be held out.
    """
    train, test = _open_rows(spec.data), _open_evaluation(spec.evaluate)
    _require_same_classes(train, test)
    teacher = None if spec.evaluate.cache is None else spec.evaluate.teacher
    require_measurable(test, "evaluate", teacher)
    if spec.validation is None:
        return Opened(train, test, teacher)
    if train.mixes:
        hint = "Leave `validation` out, or hold samples back when the cache is built."
        raise SpecError("validation", "must not hold out what others are mixed with", "the recipe mixes", hint)
    kept, held = split(train, spec.validation.share, spec.validation.seed)
    validation = only(_open_validation(spec, spec.validation.views, train, test), held)
    require_measurable(validation, "validation")
    return Opened(only(train, kept), test, teacher, validation)


def normalization_of(spec: RunSpec, opened: Opened) -> NormalizeSpec | None:
    """How a run's student sees all views; several runs may share the data, and not this.

    Raises:
        SpecError: a recipe of what is measured says otherwise, which would have no effect.
    """
    ours = spec.normalize or opened.train.normalize
    held_out = None if spec.validation is None else spec.validation.views
    for where, views in (("evaluate", spec.evaluate.views), ("validation", held_out)):
        theirs = None if views is None or views.recipe is None else open_recipe(views).normalize
        if theirs is not None and theirs != ours:
            hint = "Leave `normalize` out there: students are measured with that of their training."
            raise SpecError(f"{where}.views.recipe.normalize", f"must be {ours}", theirs, hint)
    return ours


def _require_same_classes(train: Rows, test: Rows) -> None:
    """A folder without one class numbers the others anew: measured by it, a good student would seem to know nothing."""
    ours, theirs, labels = train.class_names, test.class_names, test.labels
    if ours is not None and theirs is not None and ours != theirs:
        pairs = enumerate(zip_longest(ours, theirs))
        place, (expected, found) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        hint = "Evaluate on a source with the same class names in the same order."
        rule = f"must number the classes as the training data does, where {place} is {expected}"
        raise MismatchError("evaluate", rule, found, hint)
    classes = train.classes
    if classes is not None and labels is not None and len(labels) and int(labels.max()) >= classes:
        hint = "Evaluate on a source with the classes of the training data."
        rule = f"must have labels in 0..{classes - 1}, the training data's"
        raise MismatchError("evaluate", rule, int(labels.max()), hint)


def _open_rows(spec: DataSpec) -> Rows:
    if spec.cache is not None:
        # What is being added meanwhile has holes, into which an epoch would run.
        cache = Cache(spec.cache, spec.source, spec.maps, spec.copies, sealed=True)
        if spec.views is not None:
            return OwnViews(cache, spec.views, first_views=spec.first_views)
        return CachedRows(cache, size=spec.size, tolerance=spec.tolerance, first_views=spec.first_views)
    return _open_labelled(spec)


def _open_labelled(spec: DataSpec | EvaluateSpec) -> Rows:
    assert spec.source is not None, "the spec has checked it"
    assert spec.views is not None, "the spec has checked it"
    return LabelledRows(spec.source, spec.views)


def _open_evaluation(spec: EvaluateSpec) -> Rows:
    if spec.cache is None:
        return _open_labelled(spec)
    return CachedRows(Cache(spec.cache, spec.source, sealed=True))


def _open_validation(run: RunSpec, views: ViewSpec | None, train: Rows, test: Rows) -> Rows:
    """The samples of the training data as `validation.views` shows them, or as the evaluation does."""
    views = views or run.evaluate.views
    if views is None:
        assert isinstance(test, CachedRows), "the spec has checked it"
        views = test.cache.spec.views
    if isinstance(train, CachedRows | OwnViews):
        return WithoutAnswers(train.cache, views)
    assert run.data.source is not None, "the spec has checked it"
    return LabelledRows(run.data.source, views)

"""What planning asks of a teacher before anything is written: does it run, with how many rows, for which classes."""

from __future__ import annotations

import torch

from teacher_cache.errors import TeacherError
from teacher_cache.sources import Source
from teacher_cache.spec import TeacherSpec, is_logits, needs_label
from teacher_cache.teachers import RemoteTeacher, Teacher, ask_whole
from teacher_cache.views import Recipe


def ask(teacher: Teacher, spec: TeacherSpec, size: int, view_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each field, from the answer to so many black views.

    Raises:
        TeacherError: the teacher fails; what to do differs where it is for want of memory.
    """
    if isinstance(teacher, RemoteTeacher):
        # A question may cost.
        found = teacher.shapes(view_shape)
        return {name: found[name] for name in spec.fields}
    try:
        answer = ask_whole(teacher, torch.zeros((size, *view_shape), dtype=torch.uint8), size)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(size, error) from error
    except (RuntimeError, ValueError) as error:
        hint = "Check the recipe's size, the channels and the weights."
        raise TeacherError("teacher.model", f"fails on a view {view_shape}: {error}", spec.model, hint) from error
    return {name: tuple(answer[name].shape[1:]) for name in spec.fields}


def halve_until_it_fits(teacher: Teacher, spec: TeacherSpec, view_shape: tuple[int, ...]) -> int:
    """The largest of `micro_batch`, a half of it, a quarter, … 1 for which memory is enough.

    Only before a cache is begun: the last bit of a logit may depend on the micro-batch, so it is part of the identity.
    If one row is too much, `ask` will say so.
    """
    size = spec.micro_batch
    while size > 1:
        try:
            ask(teacher, spec, size, view_shape)
        except TeacherError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
        else:
            break
        # Here nothing refers any more to the error, which held the tensors of the attempt.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    return size


def out_of_memory(size: int, error: Exception) -> TeacherError:
    """Names the micro-batch that does not fit, and what may be done."""
    hint = "Free the device; or, in a new cache, lower teacher.micro_batch or set compute.on_oom: halve."
    return TeacherError("teacher.micro_batch", f"must fit into memory: {error}", size, hint)


def check_labels(spec: TeacherSpec, source: Source, recipe: Recipe) -> None:
    """Raises `TeacherError` where a field is made with labels and rows do not have one each."""
    field = next(filter(needs_label, spec.fields), None)
    if field is None:
        return
    where, hint = f"teacher.fields.{field}", "Leave it out, or use a labelled source and a recipe that does not mix."
    if source.labels is None:
        raise TeacherError(where, "needs labels: it is the gradient of the label's logit", "a source without", hint)
    if recipe.mixing is not None:
        raise TeacherError(where, "needs one label a row, and mixed views have two", "mixed views", hint)


def check_classes(spec: TeacherSpec, source: Source, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `TeacherError` where the logits do not fit the class names or the labels."""
    names, own = source.class_names, spec.class_names
    shape = next((found for name, found in shapes.items() if is_logits(name)), None)
    if shape is not None and len(shape) not in (1, 2):
        rule = "must be [batch, classes] or, of sequences, [batch, positions, classes]"
        raise TeacherError("teacher.fields.logits", rule, shape, "Use another model.")
    if shape is not None:
        _check_names(spec, source, shape[-1], is_sequence=len(shape) == 2)
    if own is not None and names is not None and own != names:
        differs = next((i for i, pair in enumerate(zip(own, names, strict=False)) if pair[0] != pair[1]), len(names))
        hint = f"They differ first at class {differs}; the teacher's head and the labels must have one order."
        raise TeacherError("teacher.class_names", "must equal the source's class names, in order", own, hint)


def _check_names(spec: TeacherSpec, source: Source, classes: int, is_sequence: bool) -> None:
    names, own, labels = source.class_names, spec.class_names, source.labels
    if names is not None and not is_sequence and classes != len(names):
        hint = "Use weights for these classes, or give the source the teacher's class names."
        raise TeacherError("teacher.model", f"must answer for the {len(names)} class names", classes, hint)
    if own is not None and classes != len(own):
        hint = "Correct the list, or use weights for these classes."
        raise TeacherError("teacher.class_names", f"must have one name for each of {classes} outputs", own, hint)
    if labels is not None and not is_sequence and int(labels.max()) >= classes:
        hint = "Use weights for these classes."
        raise TeacherError("teacher.model", f"must answer for the labels 0..{int(labels.max())}", classes, hint)

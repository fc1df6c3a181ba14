"""The classes that the items of a `gather` name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.options import Wanted
from services.problems import Problem


def with_classes(wanted: Wanted, classes_NK: Tensor | None, items: int, most: int) -> Wanted:
    """What is wanted, with the number of classes that the body names for each item.

    Args:
        wanted: as the options say.
        classes_NK: as the body says; None where it names none.
        items: how many the body has.
        most: classes of the teacher.

    Raises:
        Problem: 422 where classes are missing, out of place, of another shape or out of range.
    """
    if classes_NK is None:
        if wanted.output == "gather":
            rule, hint = "must be there for output=gather", "Send a tensor `classes` [N, K], or such a member of JSON."
            raise Problem(422, "classes", rule, "none", hint)
        return wanted
    if wanted.output != "gather":
        raise Problem(422, "classes", "have an effect on output=gather only", wanted.output, "Leave them out.")
    shape, hint = tuple(classes_NK.shape), f"Name 1 to {most} classes for each of the {items} items."
    if classes_NK.dtype not in (torch.int32, torch.int64):
        raise Problem(422, "classes", "must be I32 or I64", str(classes_NK.dtype).removeprefix("torch."), hint)
    if len(shape) != 2 or shape[0] != items or not 1 <= shape[1] <= most:
        raise Problem(422, "classes", f"must be [{items}, 1 to {most}]", list(shape), hint)
    outside_N = ((classes_NK < 0) | (classes_NK >= most)).any(dim=1)
    if outside_N.any():
        item = int(outside_N.nonzero()[0])
        raise Problem(422, "classes", f"must be in 0..{most - 1}", f"another of item {item}", hint)
    return replace(wanted, k=shape[1])

"""A teacher whose weights are elsewhere: a precompute job asks the service as it would ask a module."""

from __future__ import annotations

from torch import Tensor

from services.client import TeacherClient
from services.schemas import TeacherCard
from teacher_cache.errors import ServiceError, TeacherError
from teacher_cache.spec import NormalizeSpec, TeacherSpec, base_of


class HttpTeacher:
    """Implements `teacher_cache.teachers.Teacher`; has the local teacher's fingerprint, and gives its bits.

    Every request names the digest that was seen first: should the service change its teacher in the middle of
    a build, it refuses and the build stops.
    """

    def __init__(self, spec: TeacherSpec, normalize: NormalizeSpec | None = None) -> None:
        """Reads the card and compares.

        Args:
            spec: `model` is http(s)://host:port/<teacher>; `api_key`, or the variable TEACHER_API_KEY.
            normalize: the recipe's normalisation; must be the service's where it is given.

        Raises:
            TeacherError: the spec asks for something that the service does otherwise.
            ServiceError: the service refused or cannot be reached.
        """
        _refuse_local(spec)
        self._client = TeacherClient(spec.model, spec.api_key)
        card = self._client.card()
        _require_same(spec, card)
        _require_normalize(normalize, card)
        self.fields = tuple(spec.fields)
        self.fingerprint = card.digest
        self.device, self.threads = card.numerics.device, card.numerics.threads

    def __call__(self, views_BCHW: Tensor, _labels_B: Tensor | None = None) -> dict[str, Tensor]:
        """uint8 [B, C, H, W] to float32 fields on the CPU, asked for in one request; none is made with labels."""
        asked = tuple(dict.fromkeys(map(base_of, self.fields)))
        answer = self._client.predict(views_BCHW.cpu(), fields=asked, digest=self.fingerprint)
        found = dict(answer.features)
        if answer.values is not None:
            found["logits"] = answer.values
        for name in asked:
            if name not in found or len(found[name]) != len(views_BCHW):
                shape = tuple(found[name].shape) if name in found else "no such tensor"
                rule = f"must answer {name} for {len(views_BCHW)} images"
                raise ServiceError(self._client.url, rule, shape, "Is it a teacher-serve of this version?")
        return {name: found[base_of(name)] for name in self.fields}

    def close(self) -> None:
        """Closes the connection; also done when the teacher is forgotten."""
        self._client.close()


def _refuse_local(spec: TeacherSpec) -> None:
    given = {"weights": spec.weights, "arguments": spec.arguments, "normalize": spec.normalize}
    for name, value in given.items():
        if value:
            hint = "Remove it: the service has its own."
            raise TeacherError(f"teacher.{name}", "has no effect on a teacher behind a URL", value, hint)


def _require_same(spec: TeacherSpec, card: TeacherCard) -> None:
    hint = f"Set it as the card says: GET /v1/teachers/{card.name}."
    for name, field in spec.fields.items():
        if base_of(name) not in card.fields:
            known = f"It offers: {', '.join(card.fields)}."
            raise TeacherError(f"teacher.fields.{name}", "must be offered by the service", name, known)
        pool = card.fields[base_of(name)].pool
        if field.pool != pool:
            raise TeacherError(f"teacher.fields.{name}.pool", f"must be {pool}", field.pool, hint)
    theirs: dict[str, object] = {
        "micro_batch": card.micro_batch,
        "precision": card.numerics.precision,
        "channels_last": card.numerics.channels_last,
        "class_names": card.class_names,
    }
    for name, value in theirs.items():
        # What decides bits must be right even where it is a default: the manifest will state it.
        given = name != "class_names" or spec.class_names is not None
        if given and getattr(spec, name) != value:
            raise TeacherError(f"teacher.{name}", f"must be the service's, {value}", getattr(spec, name), hint)


def _require_normalize(normalize: NormalizeSpec | None, card: TeacherCard) -> None:
    if normalize is not None and (normalize.mean, normalize.std) != (card.input.mean, card.input.std):
        theirs = f"mean {card.input.mean}, std {card.input.std}"
        hint = "Write the service's into the recipe, or leave it out."
        raise TeacherError("views.recipe.normalize", f"must be the service's: {theirs}", normalize, hint)

"""Whether the teacher behind a URL is what a configuration says, and its replicas are what it is."""

from __future__ import annotations

from services.schemas import NumericsCard, TeacherCard
from teacher_cache.errors import ServiceError, TeacherError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import NormalizeSpec, TeacherSpec, base_of

_DECIDES_BITS = ("digest", "micro_batch", "numerics", "input", "fields")


def refuse_local(spec: TeacherSpec) -> None:
    """Raises `TeacherError` for what only a teacher in this process can be told."""
    given = {"weights": spec.weights, "arguments": spec.arguments, "normalize": spec.normalize}
    for name, value in given.items():
        if value:
            hint = "Remove it: the service has its own."
            raise TeacherError(f"teacher.{name}", "has no effect on a teacher behind a URL", value, hint)


def require_same(spec: TeacherSpec, normalize: NormalizeSpec | None, card: TeacherCard) -> None:
    """Raises `TeacherError` where the configuration asks for something that the service does otherwise."""
    _require_fields(spec, card)
    _require_normalize(normalize, card)
    _require_plain(card)


def _require_plain(card: TeacherCard) -> None:
    """A key's limits must not change what a cache would keep under the teacher's own fingerprint."""
    hint = "Ask whoever serves it for a key that may build caches."
    if card.limits.rounding is not None:
        rule = "must give the teacher's own values, and this key's are rounded"
        raise TeacherError("teacher.api_key", rule, card.limits.rounding, hint)
    if card.limits.by_id_only and card.dataset is None:
        raise TeacherError("teacher.api_key", "must be allowed to bring images", "by_id_only", hint)
    if "logits" not in card.outputs:
        raise TeacherError("teacher.api_key", "must be allowed the output logits", card.outputs, hint)


def require_replica(ours: TeacherCard, theirs: TeacherCard, url: str) -> None:
    """Raises `ServiceError` where answers from there could have other bits."""
    for name in _DECIDES_BITS:
        if getattr(theirs, name) != getattr(ours, name):
            rule = f"must be a replica of the same teacher: {name} {getattr(ours, name)}"
            raise ServiceError(url, rule, getattr(theirs, name), "Serve the same one there, or take this URL out.")


def key_of(digest: str, numerics: NumericsCard) -> str:
    """Names a teacher together with where it runs, which can change a last bit: what a kept answer is good for."""
    return fingerprint("answers", 1, {"teacher": digest, "numerics": numerics.model_dump(mode="json")})


def _require_fields(spec: TeacherSpec, card: TeacherCard) -> None:
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

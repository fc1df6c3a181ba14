"""A teacher whose weights are here: any `nn.Module`, its logits and the outputs of its inner nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.errors import TeacherError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import (
    HEAD_INPUT,
    FeatureHead,
    FieldSpec,
    NormalizeSpec,
    base_of,
    needs_label,
    nodes_of,
)
from teacher_cache.teachers.node_fields import field_value, pooled
from teacher_cache.teachers.saliency import saliency
from teacher_cache.views import normalize

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchTeacher:
    """Evaluation mode, no gradients, fp32 or autocast; features are tapped with forward hooks."""

    def __init__(
        self,
        module: nn.Module,
        identity: Mapping[str, Any],
        fields: Mapping[str, FieldSpec],
        *,
        normalize: NormalizeSpec | None = None,
        precision: str = "fp32",
        channels_last: bool = False,
        device: str = "cpu",
    ) -> None:
        """Freezes the module, puts it in evaluation mode and taps its nodes.

        Args:
            module: images float [B, C, H, W] to logits [B, K]; in whatever mode it is left.
            identity: what names the module (reference, arguments, digest of the weights).
            fields: `logits`, `feature:<node>` with its pooling, `attention:<node>`, `flow:<a>,<b>`, `saliency`; each
                may have an `@label`.
            normalize: applied to views scaled to 0..1.
            precision: `fp32`, or autocast to `bf16` or `fp16`.
            channels_last: memory format of weights and inputs.
            device: where it runs.
        """
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._module = module.eval().requires_grad_(False).to(device=device)
        if channels_last:
            self._module = self._module.to(memory_format=torch.channels_last)
        self._normalize, self.precision, self._device = normalize, precision, torch.device(device)
        self._fields = dict(fields)
        self._tapped: dict[str, Tensor] = {}
        for node in sorted({node for field in self._fields for node in nodes_of(field)}):
            self._tap(node, base_of(next(field for field in self._fields if node in nodes_of(field))))
        wanted = self._fields["logits"].encoding if "logits" in self._fields else None
        self.head = self._tap_head(wanted) if isinstance(wanted, FeatureHead) else None
        """The linear layer whose inputs are answered as `HEAD_INPUT`, where its encoding asks for them."""
        self.fingerprint = fingerprint(
            "teacher",
            2,
            {
                **identity,
                "normalize": normalize.model_dump(mode="json") if normalize else None,
                "precision": precision,
                "channels_last": channels_last,
            },
        )

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._device.type

    @property
    def threads(self) -> None:
        """It runs here."""
        return None

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in the configuration's order."""
        return tuple(self._fields)

    def _tap(self, node: str, name: str) -> None:
        """Keeps what a node puts out; `name` is a field that is made of it, for messages."""
        try:
            inner = self._module.get_submodule(node)
        except AttributeError:
            known = ", ".join(key for key, _ in self._module.named_modules() if key)[:400]
            raise TeacherError(f"teacher.fields.{name}", "names no node", node, f"Nodes: {known}.") from None

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            if not isinstance(output, Tensor):
                rule = "must be a node whose output is one tensor"
                raise TeacherError(f"teacher.fields.{name}", rule, type(output).__name__, "Choose another node.")
            if node in self._tapped:
                hint = "Choose the module that holds it, or one that runs once."
                raise TeacherError(f"teacher.fields.{name}", "runs more than once in a forward pass", node, hint)
            # A copy: an in-place ReLU that follows would overwrite the tapped tensor.
            self._tapped[node] = output.detach().clone()

        inner.register_forward_hook(keep)

    def _tap_head(self, wanted: FeatureHead) -> tuple[str, nn.Linear]:
        """The layer that a configuration names, or the last one; its inputs are kept of every forward pass."""
        linear = {name: module for name, module in self._module.named_modules() if isinstance(module, nn.Linear)}
        name = wanted.head if wanted.head is not None else next(reversed(linear), "")
        if name not in linear:
            known = ", ".join(linear)[:400] or "none"
            hint = f"Linear layers: {known}. Use dense_u8 or top_k for a head that is not linear."
            raise TeacherError("teacher.fields.logits.encoding.head", "must name an nn.Linear", name, hint)

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._tapped[HEAD_INPUT] = inputs[0].detach().clone()

        linear[name].register_forward_pre_hook(keep)
        return name, linear[name]

    @torch.inference_mode()
    def __call__(self, views_BCHW: Tensor, labels_B: Tensor | None = None) -> dict[str, Tensor]:
        """uint8 views to float32 fields. Copies to and from the device are the only transfers."""
        inputs = normalize(views_BCHW.to(self._device), self._normalize).contiguous(memory_format=self._format)
        logits = self._logits(inputs)
        outputs, whole = dict(self._tapped), {"logits": logits}
        if any(map(needs_label, self._fields)):
            # A forward pass of its own: what is asked for beside must not move the last bit of a logit.
            whole["saliency"] = self._saliency(inputs, labels_B)
        self._tapped.clear()
        missing = [(name, node) for name in self._fields for node in nodes_of(name) if node not in outputs]
        if missing:
            name, node = missing[0]
            hint = "The node is not used in a forward pass; choose another."
            raise TeacherError(f"teacher.fields.{name}", "was never computed", node, hint)
        answer = {
            name: field_value(base_of(name), field, outputs) if nodes_of(name) else pooled(whole[base_of(name)], field)
            for name, field in self._fields.items()
        }
        return {**answer, HEAD_INPUT: outputs[HEAD_INPUT].float()} if self.head is not None else answer

    def _saliency(self, inputs_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        if labels_B is None:
            hint = "Give the views' labels beside them."
            raise TeacherError("teacher.fields.saliency", "needs labels", None, hint)
        return saliency(self._logits, inputs_BCHW, labels_B, self._normalize)

    def _logits(self, inputs_BCHW: Tensor) -> Tensor:
        """One forward pass, which leaves the outputs of the tapped nodes behind."""
        self._tapped.clear()
        autocast = self.precision in _AUTOCAST
        dtype = _AUTOCAST.get(self.precision, torch.bfloat16)
        with torch.autocast(self._device.type, dtype=dtype, enabled=autocast):
            logits = self._module(inputs_BCHW)
        if not isinstance(logits, Tensor):
            hint = "Wrap it in a module whose forward returns the logits."
            raise TeacherError("teacher.model", "must answer one tensor", type(logits).__name__, hint)
        return logits

"""What the ONNX file is for: which types and pairs the consumer runs in integers."""

from __future__ import annotations

from dataclasses import dataclass

from edadm_compile.errors import ExportError


@dataclass(frozen=True)
class OnnxTarget:
    """One kind of consumer.

    Attributes:
        name: as on the command line.
        signed: activation codes are int8, otherwise uint8 (the same codes plus 128).
        symmetric: activations have zero point 0.
        output_codes: convolutions need codes as their output, or they run in float.
        two_terms: 16-bit inputs run as two 8-bit terms; otherwise they stay in float.
        what: a sentence for people.
    """

    name: str
    signed: bool
    symmetric: bool
    output_codes: bool
    two_terms: bool
    what: str


TARGETS = {
    t.name: t
    for t in (
        OnnxTarget("cpu", False, False, True, True, "ONNX Runtime on x86: uint8 activations, int8 weights"),
        OnnxTarget("arm", True, False, True, True, "ONNX Runtime on ARM: int8 activations, int8 weights"),
        OnnxTarget("tensorrt", True, True, False, False, "TensorRT: symmetric int8, explicit quantization"),
    )
}


def target(name: str) -> OnnxTarget:
    """The target called `name`.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"--onnx-target: got {name!r}, allowed {', '.join(TARGETS)}")
    return TARGETS[name]

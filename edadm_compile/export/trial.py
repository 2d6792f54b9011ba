"""A one-operator ONNX model with a known answer, to see how ONNX Runtime multiplies 8-bit integers here."""

from __future__ import annotations

#: Sum of 64 products of the largest codes, 255 * 127: beyond what a pair of products may be in 16 bits.
CHANNELS, ANSWER = 64, 64 * 255 * 127

_TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
trial (uint8[1, 64, 8, 8] x, int8[16, 64, 1, 1] w) => (int32[1, 16, 8, 8] y) { y = ConvInteger(x, w) }
"""


def integer_convolution() -> bytes:
    """A convolution of uint8 x [1, 64, 8, 8] with int8 w [16, 64, 1, 1]; int32 y [1, 16, 8, 8]."""
    from onnx import parser

    data: bytes = parser.parse_model(_TEXT).SerializeToString()
    return data

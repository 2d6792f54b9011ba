"""Images of a report as data URIs: float, quantized, and what is between them."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edadm_compile.evaluate.metrics import psnr

#: The difference is shown this many times as large, around grey.
GAIN = 8
#: Pixels along the longer side; larger images are scaled down.
LARGEST = 256


def image_pairs(reference: Tensor, candidate: Tensor) -> list[dict[str, Any]]:
    """For each pair PSNR in dB and three PNG images: float, quantized, difference.

    Args:
        reference, candidate: float32 [N, C, H, W] in [-1, 1]; of four or more channels the first three are shown.
    """
    values = psnr(reference, candidate).tolist()
    difference = GAIN * (candidate - reference)
    return [
        {"psnr_db": value, "float": data_uri(a), "quantized": data_uri(b), "difference": data_uri(d)}
        for value, a, b, d in zip(values, reference, candidate, difference, strict=True)
    ]


def data_uri(image: Tensor) -> str:
    """A PNG of an image [C, H, W] in [-1, 1]."""
    shown = image[:3] if image.shape[0] >= 3 else image[:1]
    pixels = ((shown.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Device code in a ``.qmod`` file: launch plans as JSON and compiled kernels, both as tensors of deflated bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels import plan_json
from edadm_compile.kernels.cubin import Bundle, Cubin

#: No kernel or plan is larger when inflated.
_LARGEST = 64 << 20


def store(bundle: Bundle, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a bundle's bytes into `tensors`; returns its entry of the manifest."""
    for key, cubin in bundle.cubins.items():
        tensors[f"device.cubins.{key}"] = _bytes(cubin.data)
    plans = []
    for (arch, batch), plan in sorted(bundle.plans.items()):
        tensors[f"device.plans.{arch}.{batch}"] = _bytes(plan_json.to_json(plan).encode())
        plans.append({"arch": arch, "batch": batch, "keys": list(bundle.keys[arch, batch])})
    return {"cubins": {key: cubin.to_json() for key, cubin in bundle.cubins.items()}, "plans": plans}


def restore(value: Any, tensors: Callable[[str], Tensor]) -> Bundle | None:
    """The reverse of `store`.

    Raises:
        ArtifactError: plans or kernels that are malformed or do not belong together.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("plans"), list):
        raise ArtifactError("device code: malformed record")
    cubins = {
        key: Cubin.from_json(record, _data(tensors(f"device.cubins.{key}"))) for key, record in value["cubins"].items()
    }
    plans, keys = {}, {}
    for record in value["plans"]:
        name = (str(record["arch"]), int(record["batch"]))
        plans[name] = plan_json.from_json(_data(tensors(f"device.plans.{name[0]}.{name[1]}")).decode())
        keys[name] = tuple(str(key) for key in record["keys"])
    return Bundle(plans, keys, cubins)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


def _data(value: Tensor) -> bytes:
    if value.dtype != torch.uint8 or value.dim() != 1:
        raise ArtifactError("device code: expected bytes")
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(value.contiguous().numpy().tobytes(), _LARGEST)
    except zlib.error as error:
        raise ArtifactError(f"device code: damaged bytes ({error})") from None
    if not inflate.eof:
        raise ArtifactError(f"device code: more than {_LARGEST} bytes in one kernel or plan, or cut short")
    return data

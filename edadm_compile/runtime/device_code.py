"""Device code in a ``.qmod`` file: launch plans as JSON and compiled kernels, both as tensors of deflated bytes."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.kernels import constants, plan_json
from edadm_compile.kernels.cubin import INTEGER, POINTER, Bundle, Cubin
from edadm_compile.kernels.elf import Image, read_image
from edadm_compile.kernels.launch import TIME_TABLES, Launch, LaunchPlan
from edadm_compile.kernels.plan_check import check_constants, check_library_shapes
from edadm_compile.kernels.request import request_of
from edadm_compile.kernels.targets import REGISTER_LIMIT, SHARED_LIMIT, TARGETS
from edadm_compile.runtime import json_text
from edadm_compile.runtime.limits import DEFAULT, Limits

_CUBIN, _PLAN = "device.cubins.", "device.plans."
_MOST_PLANS = 64
_AGAIN = "make the code again with: edadm-compile target FILE --targets ..."


def store(bundle: Bundle, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a bundle's bytes into `tensors`; returns its entry of the manifest."""
    for key, cubin in bundle.cubins.items():
        tensors[_CUBIN + key] = _bytes(cubin.data)
    plans = []
    for (arch, batch), plan in sorted(bundle.plans.items()):
        tensors[f"{_PLAN}{arch}.{batch}"] = _bytes(plan_json.to_json(plan).encode())
        plans.append({"arch": arch, "batch": batch, "keys": list(bundle.keys[arch, batch])})
    cubins = {
        key: {**cubin.to_json(), "sha256": hashlib.sha256(cubin.data).hexdigest()}
        for key, cubin in bundle.cubins.items()
    }
    return {"cubins": cubins, "plans": plans}


def restore(value: Any, tensors: Callable[[str], Tensor], limits: Limits = DEFAULT) -> Bundle | None:
    """The reverse of `store`. `check_bundle` says whether what it holds belongs together.

    Raises:
        ArtifactError: plans or kernels that are malformed or do not have the checksums that the file gives.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"plans", "cubins"}:
        raise ArtifactError("device code: malformed record")
    if not isinstance(value["plans"], list) or not isinstance(value["cubins"], dict):
        raise ArtifactError("device code: malformed record")
    if len(value["plans"]) > _MOST_PLANS or len(value["cubins"]) > limits.kernels:
        raise ArtifactError(f"device code: {len(value['plans'])} plans of {len(value['cubins'])} kernels")
    room = _Room(limits)
    cubins = {key: _cubin(key, record, room.inflate(tensors(_CUBIN + key))) for key, record in value["cubins"].items()}
    plans, keys = {}, {}
    for record in value["plans"]:
        if not isinstance(record, dict) or set(record) != {"arch", "batch", "keys"}:
            raise ArtifactError("device code: malformed record of a plan")
        name = (record["arch"], record["batch"])
        if name[0] not in TARGETS or type(name[1]) is not int or name in plans or not isinstance(record["keys"], list):
            raise ArtifactError(f"device code: plan for {str(name)[:80]} is not understood")
        text = room.inflate(tensors(f"{_PLAN}{name[0]}.{name[1]}"))
        plans[name] = plan_json.from_value(_parsed(text, f"launch plan {name[0]}:{name[1]}", limits))
        keys[name] = tuple(str(key) for key in record["keys"])
    return Bundle(plans, keys, cubins)


def _cubin(key: str, record: Any, data: bytes) -> Cubin:
    if not isinstance(record, dict):
        raise ArtifactError(f"device code: kernel {key[:80]!r} has a malformed description")
    fields = {name: item for name, item in record.items() if name != "sha256"}
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise ArtifactError(f"device code: kernel {key[:80]!r} does not match its checksum; {_AGAIN}")
    return Cubin.from_json(fields, data)


def _parsed(data: bytes, what: str, limits: Limits) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"{what}: not text") from None
    return json_text.parse(text, what, limits)


def check_bundle(bundle: Bundle, program: Program, limits: Limits = DEFAULT) -> None:
    """Whether plans stay in their memory, fit the program, and launch the kernels that were compiled for them.

    `plan_json.from_value` has checked what a plan alone can show. Machine code itself cannot be checked.

    Raises:
        ArtifactError: they do not.
    """
    images = {key: read_image(cubin.data) for key, cubin in bundle.cubins.items()}
    used = {key for keys in bundle.keys.values() for key in keys if key}
    if used != set(bundle.cubins):
        raise ArtifactError("device code: a kernel that no launch runs")
    made: dict[str, Tensor] = {}
    for (arch, batch), plan in bundle.plans.items():
        try:
            _check_call(plan, program)
            constants = _constants(plan, program, made)
            check_constants(plan, constants)
            check_library_shapes(plan, limits.value * batch)
            _check_size(plan, constants, limits)
            for launch, key in zip(plan.launches, bundle.keys[arch, batch], strict=True):
                if key:
                    _check_kernel(launch, arch, bundle.cubins[key], images[key])
        except ArtifactError as error:
            raise ArtifactError(f"device code of {arch} at batch {batch}: {error}") from error.__cause__


def _check_call(plan: LaunchPlan, program: Program) -> None:
    """Inputs and output are those of the program."""
    signature, time = program.signature, program.time
    if not signature.min_batch <= plan.batch <= signature.max_batch:
        raise ArtifactError(f"the program takes batches of {signature.min_batch} to {signature.max_batch}")
    known = {spec.name: (plan.batch, *spec.shape) for spec in signature.inputs}
    for name, (shape, _) in plan.inputs.items():
        if name != TIME_TABLES and known.get(name) != shape:
            raise ArtifactError(f"input {name!r} is {list(shape)}, the program's is {known.get(name)}")
    rows, _ = plan.inputs.get(TIME_TABLES, ((plan.batch,), torch.float32))
    tables = {} if time is None else time.tables
    for name, (_, shape) in plan.tables.items():
        if name not in tables or tuple(tables[name].shape[1:]) != shape:
            raise ArtifactError(f"the plan wants time table {name!r} with rows of {list(shape)}")
    if rows[0] != plan.batch or not plan.output or plan.output[0] != plan.batch:
        raise ArtifactError(f"the output is {list(plan.output)}, expected {plan.batch} rows")


def _constants(plan: LaunchPlan, program: Program, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plan's constants without their memory; plans share them through `made`."""
    found = {}
    for name, spec in plan.constants.items():
        text = json.dumps([spec.source, spec.transform, dict(spec.arguments)], sort_keys=True)
        if text not in made:
            try:
                # A few numbers are made for good: arithmetic without memory imports torch's compiler, for a second.
                device = "cpu" if spec.transform in constants.SCALARS else "meta"
                with torch.no_grad():
                    made[text] = constants.make(spec, lambda n: get_constant(program.graph_module, n), device).to(
                        "meta"
                    )
            except Exception as error:  # a transform's refusal may be of any type
                raise ArtifactError(f"constant {name[:80]!r} cannot be made: {str(error)[:200]}") from error
        found[name] = made[text]
    return found


def _check_size(plan: LaunchPlan, found: Mapping[str, Tensor], limits: Limits) -> None:
    taken = plan.arena + 4 * (plan.counters + math.prod(plan.output))
    taken += sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.inputs.values())
    taken += sum(value.numel() * value.element_size() for value in found.values())
    if taken > limits.arena:
        raise ArtifactError(f"its memory is {taken} bytes, allowed {limits.arena}")


def _check_kernel(launch: Launch, arch: str, cubin: Cubin, image: Image) -> None:
    """The kernel was compiled for this launch, for this architecture, and takes what it is given."""
    where = f"kernel {cubin.name[:80]} of {launch.layer[:80]}"
    if image.arch != arch:
        raise ArtifactError(f"{where} is machine code for {image.arch}")
    sizes = tuple({POINTER: 8, INTEGER: 4}.get(kind) for kind in cubin.params)
    if image.params.get(cubin.name) != sizes:
        raise ArtifactError(f"{where} takes parameters of {image.params.get(cubin.name)} bytes, the file says {sizes}")
    threads = 32 * cubin.num_warps
    if not 1 <= cubin.num_warps <= 32 or image.threads[cubin.name] not in (0, threads):
        raise ArtifactError(f"{where} has {image.threads[cubin.name]} threads, the file says {threads}")
    if cubin.shared > SHARED_LIMIT[arch] or cubin.registers > REGISTER_LIMIT:
        raise ArtifactError(f"{where} asks for {cubin.shared} bytes of shared memory, {cubin.registers} registers")
    if cubin.request != request_of(launch, arch).digest:
        raise ArtifactError(f"{where} was compiled for a launch with other numbers; {_AGAIN}")


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


class _Room:
    """Inflates bytes while there is room for them."""

    def __init__(self, limits: Limits) -> None:
        self._each, self._left = limits.inflated, 16 * limits.inflated

    def inflate(self, value: Tensor) -> bytes:
        """The bytes behind a tensor of deflated ones.

        Raises:
            ArtifactError: damaged, or more than there is room for.
        """
        if value.dtype != torch.uint8 or value.dim() != 1:
            raise ArtifactError("device code: expected bytes")
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(value.contiguous().numpy().tobytes(), min(self._each, self._left))
        except zlib.error as error:
            raise ArtifactError(f"device code: damaged bytes ({error})") from None
        if not inflate.eof:
            raise ArtifactError(f"device code: more than {self._each} bytes in one kernel or plan, or cut short")
        self._left -= len(data)
        return data

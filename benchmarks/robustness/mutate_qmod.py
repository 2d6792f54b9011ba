"""Mutants of ``.qmod`` files that know the format: each kind changes one part, and most are signed again."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.robustness.qmod_file import Parts, Stored, header_of, put_together, thawed
from benchmarks.robustness.values import change, paths, wrong
from edadm_compile.errors import EdadmError
from edadm_compile.kernels.plan_json import _launch_from
from edadm_compile.kernels.request import request_of

#: Nodes that would do harm if they ran: memory, time, code.
_EVIL: tuple[list[Any], ...] = (
    ["f", "operator.mul", [[0], 1 << 40]], ["f", "operator.mod", ["%1000000000d", 7]], ["f", "operator.mul", [1 << 62, 1 << 62]],
    ["f", "aten.arange.default", [1 << 40]], ["f", "aten.full.default", [[1 << 20, 1 << 20], 1.0]],
    ["f", "aten.ones.default", [[1 << 45]]], ["f", "aten.repeat.default", ["%0", [1 << 30, 1, 1, 1]]],
    ["f", "aten.unbind.int", ["%0", 0]], ["f", "aten.split.Tensor", ["%0", 1]], ["f", "aten.expand.default", ["%0", [1 << 40]]],
    ["f", "aten.constant_pad_nd.default", ["%0", [1 << 30, 1 << 30]]], ["f", "aten.linspace.default", [0, 1, 1 << 40]],
    ["f", "aten.as_strided.default", ["%0", [1 << 20], [1 << 20], 0]], ["f", "aten.embedding.default", ["%0", "%1"]],
    ["f", "aten.index_select.default", ["%0", 0, "%1"]], ["f", "aten.div.Tensor", ["%0", 0]], ["f", "operator.floordiv", [1, 0]],
    ["f", "aten.outer.default", ["%0", "%1"]], ["f", "aten.einsum.default", ["a,b->ab", ["%0", "%0"]]],
    ["f", "aten.remainder.Scalar", ["%0", 0]], ["f", "aten.repeat_interleave.self_int", ["%0", 1 << 40]],
    ["f", "aten.one_hot.default", ["%0", 1 << 40]], ["f", "aten.tril.default", ["%0", 1 << 40]], ["f", "os.system", ["true"]],
)  # fmt: skip


def mutant(frozen: bytes, rng: random.Random, operators: Sequence[str]) -> tuple[str, bytes]:
    """One mutant: the kind of change, and the bytes of the file.

    Args:
        frozen: a good file's parts.
        operators: names of operators, to exchange them.
    """
    kind = rng.choices([name for name, _, _ in _KINDS], [weight for _, weight, _ in _KINDS])[0]
    changer = next(f for name, _, f in _KINDS if name == kind)
    if changer is None:
        return kind, _container(thawed(frozen), rng)
    changed = thawed(frozen)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            changer(changed, rng, operators)
        except (LookupError, TypeError, ValueError, AttributeError):
            continue  # an earlier change took away what this one wanted
    if kind == "plan" and rng.random() < 0.7:
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EdadmError):
            _claimed(changed)
    header, body = header_of(changed, sign=rng.random() < 0.97)
    return kind, put_together(header, body)


def _container(parts: Parts, rng: random.Random) -> bytes:
    """Header fields and bytes of the file itself."""
    header, body = header_of(parts)
    kind = rng.randrange(8)
    if kind < 3:
        header = copy.deepcopy(header)
        name = rng.choice(list(header))
        where = (
            [(name,), *((name, *p) for p in paths(header[name]))]
            if name != "__metadata__"
            else [("__metadata__", "edadm")]
        )
        change(rng, header, rng.choice(where))
        return put_together(header, body)
    if kind == 3:  # offsets: overlaps, holes, tensors exchanged
        names = rng.sample([n for n in header if n != "__metadata__"], 2)
        first, second = (header[n]["data_offsets"] for n in names)
        choice = rng.randrange(3)
        if choice == 0:
            header[names[0]]["data_offsets"], header[names[1]]["data_offsets"] = second, first
        elif choice == 1:
            header[names[0]]["data_offsets"] = [first[0] + 8, first[1] + 8]
        else:
            header[names[0]] = dict(header[names[1]])
        return put_together(header, body)
    if kind == 4:  # a key twice
        text = json.dumps(header)
        name = rng.choice([n for n in header if n != "__metadata__"])
        return put_together((text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), body)
    data = bytearray(put_together(header, body))
    if kind == 5:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 6:
        data[:8] = struct.pack(
            "<Q", rng.choice((0, 1, 8, len(data), len(data) - 8, 1 << 30, (1 << 64) - 1, rng.randrange(len(data))))
        )
        return bytes(data) + bytes(rng.choice((0, 0, 1, 100)))
    for _ in range(rng.choice((1, 1, 4, 50))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _manifest(parts: Parts, rng: random.Random, _: Sequence[str]) -> None:
    keys = [k for k in parts.manifest if k not in ("programs", "device")]
    key = rng.choice(keys)
    change(rng, parts.manifest, rng.choice([(key,), *((key, *p) for p in paths(parts.manifest[key]))]))


def _program(parts: Parts, rng: random.Random, operators: Sequence[str]) -> None:
    programs = parts.manifest["programs"]
    time = parts.manifest["time"]
    nodes = rng.choice([programs["qdq"], programs["lowered"], *([time["path"]] if time and time["path"] else [])])
    at = rng.randrange(len(nodes))
    node = nodes[at]
    kind = rng.randrange(12)
    if kind < 5:
        where = [p for p in paths(node) if p[0] >= 2] or [(2,)]
        change(rng, node, rng.choice(where))
    elif kind < 7:  # another node
        where = [p for p in paths(node) if isinstance(_at(node, p), str) and str(_at(node, p)).startswith("%")]
        path = rng.choice(where)
        _put(node, path, f"%{rng.randrange(-2, len(nodes) + 3)}")
    elif kind == 7:
        node[1] = rng.choice(operators)
    elif kind == 8:
        change(rng, node, (rng.choice((0, 1)),))
    elif kind == 9:
        del nodes[at]
    elif kind == 10:
        nodes.insert(at, copy.deepcopy(rng.choice(nodes)))
    else:
        nodes.insert(len(nodes) - 1, copy.deepcopy(rng.choice(_EVIL)))
        if rng.random() < 0.5 and nodes[-1][0] == "o":
            nodes[-1][2] = [f"%{len(nodes) - 2}"]


def _at(root: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        root = root[key]
    return root


def _put(root: Any, path: tuple[Any, ...], value: Any) -> None:
    _at(root, path[:-1])[path[-1]] = value


def _plan(parts: Parts, rng: random.Random, operators: Sequence[str]) -> None:
    name = rng.choice(list(parts.plans))
    plan = parts.plans[name]
    parts.changed.add(name)
    kind = rng.randrange(10)
    launches = plan["launches"]
    launch = rng.choice(launches)
    if kind < 4:
        field = rng.choice(("constants", "constants", "scalars", "tile"))
        change(rng, launch[field], rng.choice(paths(launch[field])))
    elif kind < 6:
        operands = launch["operands"]
        change(rng, operands, rng.choice(paths(operands)))
    elif kind == 6:
        buffers = plan["buffers"]
        change(rng, buffers, (rng.randrange(len(buffers)), rng.randrange(5)))
    elif kind == 7:
        key = rng.choice([k for k in plan if k not in ("launches", "buffers")])
        change(rng, plan, rng.choice([(key,), *((key, *p) for p in paths(plan[key]))]))
    elif kind == 8:
        other = rng.choice(launches)
        field = rng.choice(("operands", "constants", "kernel", "tile", "scalars"))
        launch[field], other[field] = other[field], launch[field]
    else:
        change(rng, launch, rng.choice(paths(launch)))


def _claimed(parts: Parts) -> None:
    """Kernels that claim to be compiled for the changed launches: what a forger of a plan would write."""
    for name in parts.changed & set(parts.plans):
        arch, _, batch = name.removeprefix("device.plans.").rpartition(".")
        keys = next(
            r["keys"] for r in parts.manifest["device"]["plans"] if (r["arch"], str(r["batch"])) == (arch, batch)
        )
        records = parts.manifest["device"]["cubins"]
        for index, launch in enumerate(parts.plans[name]["launches"]):
            if not keys[index]:
                continue
            digest = request_of(_launch_from(launch), arch).digest
            if digest != records[keys[index]]["request"]:
                key = f"{keys[index]}.{index}"
                records[key] = {**records[keys[index]], "request": digest}
                for store in (parts.cubins, parts.tensors):
                    store[f"device.cubins.{key}"] = store[f"device.cubins.{keys[index]}"]  # type: ignore[index]
                keys[index] = key
        used = {key for record in parts.manifest["device"]["plans"] for key in record["keys"]}
        for key in set(records) - used:
            del records[key], parts.cubins[f"device.cubins.{key}"], parts.tensors[f"device.cubins.{key}"]


def _device(parts: Parts, rng: random.Random, _: Sequence[str]) -> None:
    device = parts.manifest["device"]
    if rng.random() < 0.4:
        change(rng, device, rng.choice(paths(device)))
        return
    name = rng.choice(list(parts.cubins))
    image = bytearray(parts.cubins[name])
    if rng.random() < 0.3:
        other = rng.choice(list(parts.cubins))
        parts.cubins[name], parts.cubins[other] = parts.cubins[other], parts.cubins[name]
        parts.changed |= {name, other}
        return
    if rng.random() < 0.2:
        image = image[: rng.randrange(len(image))]
    for _ in range(rng.choice((1, 4, 40)) if image else 0):
        image[rng.randrange(min(len(image), rng.choice((64, 4096, 1 << 30))))] = rng.randrange(256)
    parts.cubins[name] = bytes(image)
    parts.changed.add(name)


def _tensor(parts: Parts, rng: random.Random, _: Sequence[str]) -> None:
    names = [n for n in parts.tensors if not n.startswith("device.")]
    scales = [n for n in names if n.endswith(("scale", "zero_point", "multiplier", "keys"))]
    name = rng.choice(scales if scales and rng.random() < 0.5 else names)
    tensor = parts.tensors[name]
    kind = rng.randrange(8)
    if kind < 3:
        special = {"F32": "<f", "F16": "<e", "F64": "<d"}.get(tensor.dtype)
        value = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-45, 3e4, -0.0, 300.0, 0.5))
        piece = struct.pack(special, value) if special else bytes([rng.randrange(256)])
        at = rng.randrange(max(1, len(tensor.data) // len(piece))) * len(piece)
        tensor.data = tensor.data[:at] + piece + tensor.data[at + len(piece) :]
    elif kind == 3:
        other = parts.tensors[rng.choice(names)]
        tensor.dtype, other.dtype, tensor.shape, other.shape = other.dtype, tensor.dtype, other.shape, tensor.shape
        tensor.data, other.data = other.data, tensor.data
    elif kind == 4:
        tensor.shape = rng.choice((tensor.shape[::-1], [1, *tensor.shape], [len(tensor.data)], [0], []))
    elif kind == 5:
        tensor.dtype = rng.choice(("F32", "I8", "U8", "F16", "I64", "BOOL", "F64"))
    elif kind == 6:
        del parts.tensors[name]
    else:
        parts.tensors[str(wrong(rng, name))] = Stored(tensor.dtype, tensor.shape, tensor.data)


Changer = Callable[[Parts, random.Random, Sequence[str]], None]
#: Kind, how often, and what changes; None for the bytes of the container.
_KINDS: tuple[tuple[str, int, Changer | None], ...] = (
    ("container", 28, None), ("manifest", 10, _manifest), ("program", 26, _program), ("plan", 24, _plan), ("device", 6, _device),
    ("tensor", 6, _tensor),
)  # fmt: skip

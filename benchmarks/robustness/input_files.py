"""Small model files of every kind the frontend takes, and mutants of them."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.robustness.seeds import Chain
from benchmarks.robustness.values import change, paths, wrong

_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 20,
    "beta_schedule": "linear",
    "clip_sample": False,
}
_CONFIG = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 2,
    "add_attention": False,
}  # fmt: skip


class _Evil:
    """A pickle that would write a file if it were opened."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /dev/shm/edadm-fuzz-was-here",)


def chain() -> nn.Module:
    """What ``--factory`` builds for the state dicts below."""
    return Chain()


def make(folder: Path) -> dict[str, Path]:
    """A good file or folder of each kind, by name."""
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**_CONFIG)
    checkpoint = checkpoint_of(unet.state_dict())
    torch.save(checkpoint, folder / "model.pt")
    torch.save(checkpoint, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(Chain().state_dict(), folder / "state.safetensors")
    unet.save_pretrained(folder / "folder")
    (folder / "folder" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))
    exported = torch.export.export(
        Chain(), (torch.zeros(2, 1, 4, 4), torch.zeros(2)), dynamic_shapes=({0: torch.export.Dim("b", max=64)},) * 2
    )
    torch.export.save(exported, folder / "model.pt2")
    (folder / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))
    names = ("model.pt", "legacy.pt", "state.safetensors", "folder", "model.pt2")
    return {name: folder / name for name in names}


def checkpoint_of(state: dict[str, Any]) -> dict[str, Any]:
    """Our checkpoint dictionary."""
    return {
        "format": "edadm_compile.checkpoint/1",
        "model": {"class_name": "UNet2DModel", "config": dict(_CONFIG)},
        "state_dict": state,
        "scheduler": dict(_SCHEDULER),
        "sampler": {"steps": 2},
    }


def mutate(source: Path, target: Path, rng: random.Random) -> str:
    """Write a mutant of `source` to `target`; returns what was done."""
    if source.is_dir():
        return _folder(source, target, rng)
    data = source.read_bytes()
    kinds: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [("bytes", _bytes)]
    if source.name == "legacy.pt":
        kinds += [("pickle", _pickle), ("object", _legacy_object)] * 2
    elif source.suffix == ".safetensors":
        kinds += [("header", _header)] * 3
    else:
        kinds += [("archive", _archive)] * 2 + [("entry", _entry)] * 3
        kinds += [("object", _object)] * 2 if source.suffix == ".pt" else []
    name, changer = rng.choice(kinds)
    target.write_bytes(changer(data, rng))
    return name


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(rng, header, rng.choice(paths(header) or [()]))
    text = json.dumps(header).encode("utf-8", "replace")
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 1 << 40, len(text) + 9))
    return struct.pack("<Q", size) + text + data[8 + length :]


def _pickle(data: bytes, rng: random.Random) -> bytes:
    """Numbers and names of the pickles at the start of a file."""
    stream = io.BytesIO(data)
    places = []
    try:
        while len(places) < 5000:
            for code, argument, at in pickletools.genops(stream):
                if code.name in (
                    "BININT",
                    "BININT1",
                    "BININT2",
                    "SHORT_BINUNICODE",
                    "BINUNICODE",
                    "GLOBAL",
                    "TUPLE3",
                    "REDUCE",
                    "BUILD",
                    "BINGET",
                ):
                    places.append((code.name, argument, at))
    except ValueError:  # behind the last pickle
        pass
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2))):
        name, _, at = rng.choice(places)
        if name.startswith("BININT"):
            width = {"BININT": 4, "BININT1": 1, "BININT2": 2}[name]
            number = rng.choice((0, 1, 2**31 - 1, 255, 65535, rng.randrange(2**31)))
            changed[at + 1 : at + 1 + width] = number.to_bytes(4, "little")[:width]
        else:
            changed[at] = rng.randrange(256)
    return bytes(changed)


def _object(data: bytes, rng: random.Random) -> bytes:
    return _saved(torch.load(io.BytesIO(data), weights_only=True), rng, True)


def _legacy_object(data: bytes, rng: random.Random) -> bytes:
    return _saved(torch.load(io.BytesIO(data), weights_only=True), rng, False)


def _saved(value: dict[str, Any], rng: random.Random, archive: bool) -> bytes:
    """The checkpoint with one entry changed, saved by torch."""
    value = {
        **value,
        "model": copy.deepcopy(value["model"]),
        "scheduler": dict(value["scheduler"]),
        "state_dict": dict(value["state_dict"]),
    }
    kind = rng.randrange(6)
    if kind < 3:
        part = {k: value[k] for k in ("model", "scheduler", "sampler", "format")}
        change(rng, part, rng.choice(paths(part) or [()]))
        value |= part
        for key in {"model", "scheduler", "sampler", "format"} - set(part):
            del value[key]
    elif kind == 3:
        name = rng.choice(list(value["state_dict"]))
        tensor = value["state_dict"][name]
        value["state_dict"][name] = rng.choice(
            (
                tensor.T,
                tensor.flatten(),
                tensor.half(),
                tensor * float("nan"),
                tensor[:0],
                torch.zeros(1).expand(1 << 40),
                3,
                None,
            )
        )
    elif kind == 4:
        del value["state_dict"][rng.choice(list(value["state_dict"]))]
    else:
        value = rng.choice((_Evil(), {**value, "state_dict": _Evil()}, [value], {"a": torch.zeros(1).expand(1 << 30)}))
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=archive)
    return stream.getvalue()


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name.encode("utf-8", "replace").decode(), content)  # half a character has no bytes
    return stream.getvalue()


def _archive(data: bytes, rng: random.Random) -> bytes:
    """Entries added, taken away, renamed, announced larger; bombs."""
    entries = list(_entries(data).items())
    at = rng.randrange(len(entries))
    name, content = entries[at]
    root = name.partition("/")[0]
    kind = rng.randrange(9)
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries.append((name, content))
    elif kind == 2:
        entries[at] = (rng.choice(("../" + name, "/" + name, name + "x", str(wrong(rng, name)) or "x")), content)
    elif kind == 3:
        entries.append(
            (
                f"{root}/{rng.choice(('data/constants/custom_obj_0', 'x.so', 'data.pkl', 'extra/a.pt'))}",
                pickle.dumps(_Evil()),
            )
        )
    elif kind == 4:
        bomb = bytes(rng.choice((1 << 20, 96 << 20)))
        return _zipped([*entries[:at], (name, bomb), *entries[at + 1 :]], zipfile.ZIP_DEFLATED)
    elif kind == 5:
        return _zipped(entries, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    elif kind == 6:
        entries[at] = (name, rng.choice((b"", content[: len(content) // 2], content * 3, bytes(len(content)))))
    changed = bytearray(_zipped(entries))
    if kind >= 7:  # sizes in the central directory
        place = changed.rfind(b"PK\x01\x02") if rng.random() < 0.5 else changed.find(b"PK\x01\x02")
        offset = rng.choice((20, 24, 28, 42, 10, 8))
        changed[place + offset : place + offset + 4] = rng.randrange(1 << 32).to_bytes(4, "little")
    return bytes(changed)


def _entry(data: bytes, rng: random.Random) -> bytes:
    """One entry's content: the pickle, JSON, or bytes."""
    entries = _entries(data)
    name = rng.choice([n for n in entries if n.endswith((".json", "data.pkl"))] or list(entries))
    content = entries[name]
    if name.endswith(".json"):
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 3))):
            change(rng, value, rng.choice(paths(value) or [()]))
        entries[name] = json.dumps(value).encode("utf-8", "replace")
    elif name.endswith("data.pkl"):
        entries[name] = _pickle(content, rng)
    else:
        entries[name] = _bytes(content, rng)
    return _zipped(list(entries.items()))


def _folder(source: Path, target: Path, rng: random.Random) -> str:
    shutil.copytree(source, target)
    file = target / rng.choice(
        ("config.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
    )
    kind = rng.randrange(8)
    if kind < 5 and file.suffix == ".json":
        value = json.loads(file.read_text())
        for _ in range(rng.choice((1, 1, 2))):
            change(rng, value, rng.choice(paths(value) or [()]))
        file.write_bytes(json.dumps(value).encode("utf-8", "replace"))
        return "folder: values"
    if kind < 5:
        file.write_bytes(_header(file.read_bytes(), rng))
        return "folder: header"
    if kind == 5:
        file.write_bytes(_bytes(file.read_bytes(), rng))
        return "folder: bytes"
    file.unlink()
    if kind == 6:
        rng.choice(
            (os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p), lambda p: None)
        )(file)
        return "folder: no regular file"
    index = {"weight_map": wrong(rng, {"conv_in.weight": "../../../../etc/passwd", "conv_in.bias": "/dev/zero"})}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return "folder: index"

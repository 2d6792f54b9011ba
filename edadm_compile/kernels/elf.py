"""What the ELF image of a compiled kernel says of itself, read without the driver.

Layout: the ELF specification, and NVIDIA's sections as ptxas writes them. ``e_machine`` 190 is CUDA. The architecture is
the low byte of ``e_flags``, from ABI version 8 on its second byte. Section ``.nv.info.KERNEL`` is a list of attributes; 0x17
describes one parameter, 0x10 the threads of a program.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edadm_compile.errors import ArtifactError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_CUDA, _SIZED = 190, 4
_THREADS, _PARAMETER = 0x10, 0x17
_NEW_ABI = 8


@dataclass(frozen=True)
class Image:
    """An ELF image.

    Attributes:
        arch: "sm_80" and so on.
        params: by kernel, the sizes in bytes of its parameters in order.
        threads: by kernel, threads of a program where it is fixed, else 0.
    """

    arch: str
    params: dict[str, tuple[int, ...]]
    threads: dict[str, int]


def read_image(data: bytes) -> Image:
    """Read an image.

    Raises:
        ArtifactError: not an ELF image of CUDA machine code, or damaged.
    """
    try:
        return _read(data)
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(f"compiled kernel: {len(data)} bytes that are no ELF image ({error})") from None


def _read(data: bytes) -> Image:
    ident, _, machine, _, _, _, sections, flags, _, _, _, size, count, names = _HEADER.unpack_from(data)
    if ident[:6] != b"\x7fELF\x02\x01" or machine != _CUDA:
        raise ArtifactError(f"compiled kernel: {len(data)} bytes that are not CUDA machine code")
    if size != _SECTION.size or not 1 <= count <= 10_000 or names >= count:
        raise ValueError("sections")
    table = [_SECTION.unpack_from(data, sections + i * size) for i in range(count)]
    labels = data[table[names][4] : table[names][4] + table[names][5]]
    params, threads = {}, {}
    for record in table:
        name = labels[record[0] : labels.index(b"\0", record[0])].decode("ascii")
        if name.startswith(".nv.info."):
            kernel = name.removeprefix(".nv.info.")
            params[kernel], threads[kernel] = _parameters(data[record[4] : record[4] + record[5]])
    number = flags >> 8 & 0xFF if ident[8] >= _NEW_ABI else flags & 0xFF
    return Image(f"sm_{number}", params, threads)


def _parameters(data: bytes) -> tuple[tuple[int, ...], int]:
    """Sizes of the parameters, and threads, from a kernel's attributes."""
    sizes: dict[int, int] = {}
    threads = 0
    for kind, value in _attributes(data):
        if kind == _PARAMETER:
            _, ordinal, _, packed = struct.unpack("<IHHI", value)
            sizes[ordinal] = packed >> 18
        elif kind == _THREADS:
            threads = struct.unpack_from("<I", value)[0]
    if sorted(sizes) != list(range(len(sizes))):
        raise ValueError("parameters")
    return tuple(sizes[i] for i in range(len(sizes))), threads


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, kind, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _SIZED:
            if at + size > len(data):
                raise ValueError("attributes")
            yield kind, data[at : at + size]
            at += size

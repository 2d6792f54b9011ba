"""What is read of machine code without a driver."""

import struct

import pytest

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels.elf import read_image

PARAMETERS = b"".join(
    struct.pack("<BBHIHHI", 4, 0x17, 12, 0, ordinal, 0, size << 18 | 0x1F000) for ordinal, size in ((1, 4), (0, 8))
)
THREADS = struct.pack("<BBHIII", 4, 0x10, 12, 128, 1, 1)
ATTRIBUTES = struct.pack("<BBH", 3, 0x1B, 255) + PARAMETERS + THREADS


def image(flags=0x500550, abi=7, machine=190, attributes=ATTRIBUTES):
    labels = b"\0.shstrtab\0.nv.info.k\0"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x33" + bytes([abi]), 2, machine, 1, 0, 0, 64, flags, 64, 0, 0, 64, 2, 0
    )  # fmt: skip
    data = 64 + 2 * 64
    sections = struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, data, len(labels), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 11, 1, 0, 0, data + len(labels), len(attributes), 0, 0, 1, 0)
    return header + sections + labels + attributes


def test_architecture_parameters_and_threads():
    found = read_image(image())
    assert (found.arch, found.params, found.threads) == ("sm_80", {"k": (8, 4)}, {"k": 128})
    assert read_image(image(0x6005A04, 8)).arch == "sm_90"  # as ptxas writes it since ABI version 8


def test_images_of_compiled_kernels(small_files):
    from edadm_compile.runtime.artifact import read

    bundle = read(small_files["chain"]).device
    for cubin in bundle.cubins.values():
        found = read_image(cubin.data)
        assert found.arch == "sm_80" and found.threads == {cubin.name: 32 * cubin.num_warps}
        assert found.params[cubin.name] == tuple({"u64": 8, "u32": 4}[kind] for kind in cubin.params)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", image(machine=62), image()[:100], image()[:-8], image(attributes=PARAMETERS[:16]), b"\x7fELF" + bytes(200),
     image(attributes=struct.pack("<BBHIHHI", 4, 0x17, 12, 0, 5, 0, 8 << 18))],
    ids=["empty", "start", "x86", "cut", "attributes cut", "a parameter missing", "zeros", "a gap"],
)  # fmt: skip
def test_damaged_images(data):
    with pytest.raises(ArtifactError, match="compiled kernel"):
        read_image(data)

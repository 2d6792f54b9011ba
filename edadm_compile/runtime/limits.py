"""What a file may ask of a reader before it is refused; far above any real UNet (docs/threat_model.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that `edadm_compile.runtime.artifact.read` holds a file to. All are checked before memory is taken.

    Attributes:
        header: bytes of the safetensors header, which holds the manifest.
        values: numbers, texts, lists and tables in one JSON text together.
        depth: nesting of lists and tables in one JSON text.
        string: characters of a name or a text argument.
        tensors: tensors in a file.
        file: bytes of a file.
        nodes: nodes of one program.
        kernels: compiled kernels, and launches of one plan.
        inflated: bytes of one kernel or plan after inflation, and of all of them together 16 times as much.
        value: bytes of one value of a program at the smallest batch it accepts (1, where there is a choice).
        arena: bytes of the arena, the inputs and the constants of a launch plan, together.
        shapes: shapes beside the first one.
        steps: sampler steps, and timesteps of a schedule.
    """

    header: int = 64 << 20
    values: int = 4_000_000
    depth: int = 64
    string: int = 4_096
    tensors: int = 100_000
    file: int = 1 << 37
    nodes: int = 100_000
    kernels: int = 20_000
    inflated: int = 64 << 20
    value: int = 4 << 30
    arena: int = 64 << 30
    shapes: int = 32
    steps: int = 100_000


#: The bounds where a caller gives none.
DEFAULT = Limits()

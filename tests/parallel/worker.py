"""What each process of `test_processes` runs: compile with the others, and, in the first one, alone as well."""

import json
import sys

import torch

from edadm_compile.config import ReconstructionConfig
from edadm_compile.parallel.launch import processes
from edadm_compile.pipeline import compile_source
from tests.graphs import TinyUNet, small_config, source_of

#: Batches of 3 of 13 samples: shares differ, and some steps leave a process without a row.
_TRAINED = {"iters": 6, "batch": 3}
CASES = {
    "joint": {"reconstruction": ReconstructionConfig(**_TRAINED, qdrop=0.5, rounding_weight=0.01)},
    "mixed widths for ONNX Runtime": {"deploy": "onnxruntime", "budget_bits": 6.0},
}


def constants(program):
    """Tensors of a program by name."""
    found = dict(program.graph_module.state_dict())
    return found | ({} if program.time is None else program.time.tables)


def difference(one, other):
    """Largest relative difference of float constants, and the number of integers that differ."""
    apart, integers = 0.0, 0
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value.is_floating_point():
            size = max(float(value.abs().max()), 1e-6)
            apart = max(apart, float((value - other[name]).abs().max()) / size)
        else:
            integers += int((value != other[name]).sum())
    return [apart, integers]


def main():
    torch.set_num_threads(1)
    results = {}
    with processes() as world:
        for name, changes in CASES.items():
            settings = {"calib_samples": 13, "reconstruction": ReconstructionConfig(**_TRAINED)} | changes
            config = small_config(**settings)
            source = source_of(TinyUNet(classes=5), num_classes={"label": 5})
            together = compile_source(source, config, world=world)
            digest = sum(float(v.double().abs().sum()) for v in constants(together.qdq).values())
            digests = torch.zeros(world.size, dtype=torch.float64)
            digests[world.rank] = digest
            world.add([digests])
            if not world.leads:
                continue
            alone = compile_source(source, config)
            losses = [[u["before"], u["after"]] for u in together.stats["reconstruct"]["units"]]
            expected = [[u["before"], u["after"]] for u in alone.stats["reconstruct"]["units"]]
            results[name] = {
                "constants": difference(constants(alone.qdq), constants(together.qdq)),
                "losses": float((torch.tensor(losses) / torch.tensor(expected) - 1).abs().max()),
                "same_everywhere": bool((digests == digests[0]).all()),
                "allocation": together.allocation == alone.allocation,
                "sqnr": [together.quality.sqnr, alone.quality.sqnr],
            }
    if world.leads:
        with open(sys.argv[1], "w") as stream:
            json.dump(results, stream)


if __name__ == "__main__":
    main()

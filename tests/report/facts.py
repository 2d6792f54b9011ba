"""A small report's facts, written by hand: what `driver.report_facts.gather` returns for a file of four layers."""

import copy

STEPS = [75.0, 50.0, 25.0, 0.0]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def _row(name, executed, note="", size=100):
    floats = executed == "float"
    return {
        "layer": name, "kind": "attention" if floats else "conv2d", "shape": [] if floats else [4, 4, 3, 3], "role": "inner",
        "requested": "float" if floats else "w4a8", "executed": executed, "note": note,
        "bytes": 0 if floats or executed == "table" else size, "fp16_bytes": 0 if floats or executed == "table" else 288,
    }  # fmt: skip


_ROWS = [
    _row("conv_in", "w8a16", "reads x: 16-bit input as two int8 terms", 300),
    _row("mid.conv", "w4a8", size=88),
    _row("mid.attention", "float", "product of two activations"),
    _row("conv_out", "w8a8", "writes the output", 160),
    _row("time.linear", "table", "folded into a table"),
]
_FACTS = {
    "file": {"name": "tiny.qmod", "bytes": 4321, "sha256": "ab" * 32},
    "format": "edadm.qmod/1", "file_bytes": 4321,
    "inputs": [{"name": "x", "shape": [3, 8, 8], "dtype": "float32"}, {"name": "t", "shape": [], "dtype": "int64"}],
    "sampler": {"_class_name": "DDIMScheduler", "steps": 4},
    "layers": _ROWS,
    "totals": {"quantized_layers": 3, "float_layers": 1, "folded_layers": 1, "bytes": 548, "fp16_bytes": 864, "ratio_to_fp16": 0.6343},
    "device": None, "average_bits": 6.4, "mixed_precision": None,
    "config": {"weight_bits": 4, "act_bits": 8, "method": "default", "selection": None, "seed": 3, "tdac": {"diversity_weight": 1.2}},
    "source": {"class": "TinyUNet", "file": "model.pt", "sha256": "cd" * 32, "parameters": 1234},
    "quality": {"sqnr": 31.0, "sqnr_without_last": 33.0, "per_step": [40.0, 35.0, None, 20.5]},
    "allocation": [1, 2, 3, 6], "versions": {"edadm_compile": "0.1.0", "torch": "2.13.0"}, "notes": [],
    "times": {"kind": "measured", "what": "Measured.", "layers": {"conv_in": 30.0, "mid.conv": 12.0}, "between": {"Add": 8.0},
              "macs": {"conv_in": 9000, "mid.conv": 4000, "conv_out": 100}},
    "seconds": {"capture": 1.5, "reconstruct": 20.0},
    "reference": {"name": "model.pt", "same_model": True},
    "samples": {
        "images": [{"psnr_db": v, "float": PIXEL, "quantized": PIXEL, "difference": PIXEL} for v in (41.0, 28.5)],
        "gain": 8, "engine": "onnxruntime", "seed": 0, "side": 8, "latent": False,
        "psnr_db": {"median": 34.75, "mean": 34.75, "worst": 28.5},
    },
    "ranges": {"timesteps": STEPS, "quantiles": [0.01, 0.99], "layers": [
        {"layer": "conv_in", "quantizer": [-4.0, 4.0], "low": [-3.0, -3.5, -4.5, -2.0], "high": [3.0, 3.2, 4.0, 2.0],
         "lower": [-2.0] * 4, "upper": [2.0] * 4},
        {"layer": "mid.conv", "quantizer": None, "low": [-0.3] * 4, "high": [5.0, 4.0, 3.0, 1.0], "lower": [-0.2] * 4,
         "upper": [2.0, 2.0, 1.5, 0.5]},
    ]},
    "selection": {"timesteps": STEPS, "density": [0.0, 0.5, 1.0, 0.25], "diversity": [1.0, 0.2, 0.0, 0.9], "radius": 0.7},
    "units": [
        {"unit": "mid", "kind": "block", "layers": 2, "phase": "joint", "before": 0.01, "after": 0.002},
        {"unit": "conv_out", "kind": "layer", "layers": 1, "phase": "joint", "before": 0.0001, "after": 0.0002},
    ],
    "sensitivity": {"mid.conv": 0.002, "conv_out": 0.00004},
    "noise": {"sqnr": 31.0, "sqnr_without_last": 33.0, "per_step": [40.0, 35.0, None, 20.5], "timesteps": STEPS,
              "where": "measured here"},
    "missing": [],
}  # fmt: skip


def facts(**changes):
    """The facts with some of them replaced."""
    return {**copy.deepcopy(_FACTS), **changes}


def alone():
    """Those of a file without its float model, made by round to nearest."""
    missing = [{"what": "Images from the same noise", "why": "needs the float model"}]
    return facts(
        samples=None, ranges=None, reference=None, seconds=None, units=[], sensitivity=None, noise=None, selection=None,
        missing=missing, device=None,
        times={"kind": "model", "what": "Cost model, not time.", "layers": {}, "between": {}, "macs": {"conv_in": 9000}},
    )  # fmt: skip


def hostile(name):
    """The facts with a layer, a block and a file called `name`."""
    found = facts()
    found["layers"][1]["layer"] = found["ranges"]["layers"][1]["layer"] = found["units"][0]["unit"] = name
    found["sensitivity"] = {name: 0.1}
    found["times"]["layers"] = found["times"]["macs"] = {name: 12}
    found["file"]["name"] = found["source"]["class"] = found["layers"][0]["note"] = name
    found["notes"] = [name]
    return found

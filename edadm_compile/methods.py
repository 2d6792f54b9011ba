"""Published post-training methods as settings of the same passes.

Each follows its paper and released code where a setting can: which timesteps give calibration samples, how ranges are
found, what reconstruction minimises and in which order. Shared by all are the optimiser, its learning rates and its
budget, symmetric weights with one scale per output channel, and 8-bit first and last layers, so that a difference
between two methods is one of method. ``docs/quantization.md`` lists what this leaves out of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Which sampler steps give how many calibration samples (`edadm_compile.calibration.tdac`).
SELECTIONS = ("tdac", "density", "diversity", "uniform", "normal")
#: How scales are found: least squared error, least |error|^2.4, or the extremes.
RANGES = ("mse", "l2.4", "minmax")
#: Weights of the block loss and of the layer losses by name.
LOSSES = {"block": (1.0, 0.0), "layer": (0.0, 1.0), "both": (1.0, 1.0)}


@dataclass(frozen=True)
class Method:
    """What tells a method from another.

    Attributes:
        selection: one of `SELECTIONS`.
        ranges: one of `RANGES`.
        symmetric: activation codes with zero in the middle (at one end where all values have one sign).
        time_tables: the time path is folded into a float table; otherwise its layers are quantized like the rest.
        split: layers that read a concatenation get one scale for each source.
        edges: 16-bit stem input and promoted layers (neither with ``uniform``).
        mean_correction: the per-step mean error is added back.
        phases: passes of reconstruction over the network, by what each trains: "weights", "scales", or "joint" for
            both; none for round to nearest.
        block_loss_weight, layer_loss_weight: of the unit's output and of its inner layers.
        local_layer_losses: the loss of an inner layer trains the roundings of that layer alone; otherwise, as released,
            everything in front of it, activation scales too. Without block loss always the latter.
        normalised: every loss is divided by the energy of its target; otherwise sums over the second dimension, as
            released.
        qdrop: probability that an activation stays unquantized while training.
        rounding_weight: of AdaRound's regulariser.
    """

    selection: str = "tdac"
    ranges: str = "mse"
    symmetric: bool = False
    time_tables: bool = True
    split: bool = True
    edges: bool = True
    mean_correction: bool = True
    phases: tuple[str, ...] = ("joint",)
    block_loss_weight: float = 1.0
    layer_loss_weight: float = 1.0
    local_layer_losses: bool = True
    normalised: bool = True
    qdrop: float = 0.0
    rounding_weight: float = 0.0


_PLAIN = Method(edges=False, mean_correction=False, time_tables=False, layer_loss_weight=0.0)

METHODS: dict[str, Method] = {
    # EDA-DM with what is cheap and worth most beyond it (docs/quantization.md).
    "default": Method(),
    # arXiv 2401.04585 as released: symmetric, joint, QDrop, unnormalised layer losses, no regulariser.
    "eda-dm": Method(
        ranges="l2.4", symmetric=True, time_tables=False, edges=False, mean_correction=False, layer_loss_weight=0.8,
        local_layer_losses=False, normalised=False, qdrop=0.5,
    ),
    # arXiv 2302.04304: uniform timesteps, split shortcuts, AdaRound with its regulariser, then step sizes.
    "q-diffusion": replace(
        _PLAIN, selection="uniform", ranges="l2.4", phases=("weights", "scales"), rounding_weight=0.01,
    ),
    # arXiv 2311.16503: the time path keeps its values, AdaRound. Activation scales per timestep, which it adds, have no
    # integer form here.
    "tfmq-dm": replace(
        _PLAIN, selection="uniform", ranges="l2.4", time_tables=True, split=False, phases=("weights",),
        rounding_weight=0.01,
    ),
    # arXiv 2211.15736: timesteps from a normal distribution, no reconstruction.
    "ptq4dm": replace(_PLAIN, selection="normal", ranges="l2.4", split=False, phases=()),
    # Round to nearest, extremes.
    "minmax": Method(
        selection="uniform", ranges="minmax", edges=False, mean_correction=False, phases=(), layer_loss_weight=0.0,
    ),
}  # fmt: skip

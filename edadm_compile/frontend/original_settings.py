"""What the weights of an original checkpoint do not tell: heads, image size, noise schedule.

From the authors' YAML file (``--original-config``, or ``config.yaml`` beside the checkpoint), else from the table of
published models, which are recognised by their widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edadm_compile.errors import InputError

#: CompVis' names of schedules: its "linear" is linear in the square root of beta.
_SCHEDULES = {"linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sqrt_linear": "linear"}
_DDIM_SCHEDULES = {"linear": "linear", "quad": "scaled_linear"}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BESIDE = "config.yaml"


@dataclass(frozen=True)
class Settings:
    """Attributes that are None are unknown.

    Attributes:
        heads: attention heads at every level.
        head_channels: channels per head; one of this and `heads` is set.
        new_attention_order: queries, keys and values of all heads lie together (OpenAI's ``use_new_attention_order``).
        size: height and width of the noisy sample.
        scheduler: diffusers scheduler configuration.
    """

    heads: int | None = None
    head_channels: int | None = None
    new_attention_order: bool = False
    size: int | None = None
    scheduler: dict[str, Any] | None = None


def ddim_scheduler(start: float, end: float, schedule: str, **extra: Any) -> dict[str, Any]:
    """A configuration of diffusers' ``DDIMScheduler`` with 1000 timesteps unless `extra` says otherwise."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedule,
        "beta_start": start,
        "beta_end": end,
        "clip_sample": False,
        **extra,
    }


#: CompVis samples at timesteps 1, 1 + k, ... and steps from the last of them to the alpha of timestep 0.
_COMPVIS: dict[str, Any] = {"set_alpha_to_one": False, "steps_offset": 1}
_STABLE = ddim_scheduler(0.00085, 0.012, "scaled_linear", **_COMPVIS)
_LATENT = ddim_scheduler(0.0015, 0.0195, "scaled_linear", **_COMPVIS)
_CHURCHES = ddim_scheduler(0.0015, 0.0155, "scaled_linear", **_COMPVIS)
_EULER = {
    **{k: v for k, v in _STABLE.items() if k not in ("clip_sample", "set_alpha_to_one")},
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
}

#: (model channels, multipliers, width of the context) of published models. Stable Diffusion 2 exists with noise and with v
#: prediction in the same shapes, so its schedule has to be given.
_PUBLISHED = {
    (320, (1, 2, 4, 4), 768): Settings(heads=8, size=64, scheduler=_STABLE),  # Stable Diffusion 1.x
    (320, (1, 2, 4, 4), 1024): Settings(head_channels=64),  # Stable Diffusion 2.x
    (320, (1, 2, 4), 2048): Settings(head_channels=64, size=128, scheduler=_EULER),  # SDXL
    (320, (1, 2, 4, 4), 1280): Settings(heads=8, size=32, scheduler=_STABLE),  # LDM text to image
    (192, (1, 2, 3, 5), 512): Settings(heads=1, size=64, scheduler=_LATENT),  # LDM-4 ImageNet
    (224, (1, 2, 3, 4), None): Settings(head_channels=32, size=64, scheduler=_LATENT),  # LDM-4 CelebA, FFHQ, Bedrooms
    (192, (1, 2, 2, 4, 4), None): Settings(heads=8, size=32, scheduler=_CHURCHES),  # LDM-8 Churches
}


def published(channels: int, multipliers: tuple[int, ...], context: int | None) -> Settings | None:
    """Settings of the published model with these widths; None when there is none."""
    return _PUBLISHED.get((channels, multipliers, context))


def completed(given: Settings, known: Settings | None) -> Settings:
    """`given`, with what it leaves open taken from `known`."""
    if known is None:
        return given
    silent = given.heads is None and given.head_channels is None
    if silent:
        given = replace(given, heads=known.heads, head_channels=known.head_channels)
    return replace(given, size=given.size or known.size, scheduler=given.scheduler or known.scheduler)


def find_settings(given: Path | None, checkpoint: Path) -> Settings | None:
    """Settings from the user's YAML file, or from the one beside the checkpoint; None without either.

    Raises:
        InputError: a file that cannot be used.
    """
    if given is not None:
        return read_settings(given)
    beside = checkpoint.parent / BESIDE
    return read_settings(beside) if beside.exists() else None


def read_settings(path: Path) -> Settings:
    """Settings of a YAML file.

    It is one of CompVis (``model.params.unet_config``), of ermongroup/ddim (``data``, ``diffusion``), or a flat list of the
    keyword arguments of OpenAI's ``UNetModel``.

    Raises:
        InputError: not YAML, or none of these.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, expected the YAML file that the model was trained with"
        )
    try:
        return _settings(value)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not a configuration of a known kind ({type(error).__name__}: {error}); expected model.params.unet_config "
            "(CompVis), diffusion and data (ermongroup/ddim), or keyword arguments of UNetModel (OpenAI)"
        ) from None


def _settings(value: dict[str, Any]) -> Settings:
    if "diffusion" in value:
        return _of_ddim(value)
    if "model" not in value:
        heads = _heads(value)
        if not (set(heads) - {"new_attention_order"}) and "image_size" not in value:
            raise ValueError("neither heads nor image_size in it")
        return Settings(size=value.get("image_size"), **heads)
    params = value["model"]["params"]
    unet = (params.get("unet_config") or params["network_config"])["params"]
    size = params.get("image_size", unet.get("image_size"))
    return Settings(size=size if isinstance(size, int) else None, scheduler=_of_compvis(params), **_heads(unet))


def _heads(unet: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's two ways to say the number of heads; -1 stands for "not given"."""
    order = {"new_attention_order": bool(unet.get("use_new_attention_order", False))}
    if unet.get("num_head_channels", -1) not in (-1, None):
        return {"head_channels": int(unet["num_head_channels"]), **order}
    if unet.get("num_heads", -1) not in (-1, None):
        return {"heads": int(unet["num_heads"]), **order}
    return order


def _of_compvis(params: dict[str, Any]) -> dict[str, Any] | None:
    if "linear_start" not in params and "beta_schedule" not in params:
        return None  # such as SDXL's, which is written for another sampler
    extra = {
        **_COMPVIS,
        "num_train_timesteps": int(params.get("timesteps", 1000)),
        "prediction_type": _PREDICTIONS[params.get("parameterization", "eps")],
    }
    schedule = _SCHEDULES[params.get("beta_schedule", "linear")]
    return ddim_scheduler(
        float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2)), schedule, **extra
    )


def _of_ddim(value: dict[str, Any]) -> Settings:
    diffusion = value["diffusion"]
    scheduler = ddim_scheduler(
        float(diffusion["beta_start"]),
        float(diffusion["beta_end"]),
        _DDIM_SCHEDULES[diffusion["beta_schedule"]],
        num_train_timesteps=int(diffusion["num_diffusion_timesteps"]),
    )
    return Settings(heads=1, size=int(value["data"]["image_size"]), scheduler=scheduler)

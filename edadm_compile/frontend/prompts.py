"""Prompts to condition tensors, with the text encoders in a diffusers pipeline folder, as its pipeline encodes them.

One CLIP text encoder (Stable Diffusion 1.x and 2.x: the last hidden state) or two (SDXL: the last hidden states but one
side by side, and the projected pooled state of the second). The packages and the folder are local; weights come from
safetensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.errors import InputError
from edadm_compile.frontend.autoencoder import downscaling

_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json")
#: Prompts that are encoded at a time.
_BATCH = 16


@dataclass(frozen=True)
class Encoded:
    """Conditions of a text-to-image model.

    Attributes:
        conditions: by forward parameter name, float32 [N, ...], one row for each prompt.
        null: rows [1, ...] of the unconditional branch, by the same names; what it does not name is the same in both.
    """

    conditions: dict[str, Tensor] = field(default_factory=dict)
    null: dict[str, Tensor] = field(default_factory=dict)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
        InputError: unreadable, or without a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {path}: no prompt in it; expected one prompt a line")
    return prompts


def pipeline_folder(path: Path | None) -> Path | None:
    """The folder with ``text_encoder`` for a path to it or to the model's folder inside; None when there is none."""
    if path is None:
        return None
    places = [p for p in (path, path.resolve().parent) if p.is_dir()]
    return next((p for p in places if (p / "text_encoder").is_dir() or (p / "text_encoder_2").is_dir()), None)


def encode(folder: Path | None, prompts: Sequence[str], latent: tuple[int, int] | None) -> Encoded:
    """Encode prompts, and the empty prompt for the unconditional branch.

    Args:
        folder: diffusers pipeline folder (or the model folder in it).
        latent: height and width of the noisy sample, None if unknown; SDXL is told the size of the image.

    Raises:
        InputError: no text encoder there, one of another kind, weights that are pickles, or transformers is missing.
    """
    found = pipeline_folder(folder)
    if found is None:
        raise InputError(
            f"--prompts: {'no folder was given' if folder is None else f'{folder} has no text_encoder folder'}; name a diffusers "
            "pipeline folder with --pipeline FOLDER, or give the encoded text with --cond FILE.safetensors"
        )
    names = [n for n in ("text_encoder", "text_encoder_2") if (found / n).is_dir()]
    with _quiet():
        encoders = [(_tokenizer(found, name), _encoder(found / name)) for name in names]
        if "text_encoder_2" in names:
            if latent is None:
                raise InputError("--prompts: SDXL is told the size of the image, which is unknown; give --shape C,H,W")
            return _encode_xl(found, encoders, prompts, latent)
        tokenizer, encoder = encoders[0]
        states, empty = (_states(tokenizer, encoder, text)[0] for text in (prompts, [""]))
    return Encoded({"encoder_hidden_states": states}, {"encoder_hidden_states": empty})


def _encode_xl(folder: Path, encoders: list[Any], prompts: Sequence[str], latent: tuple[int, int]) -> Encoded:
    def both(text: Sequence[str]) -> dict[str, Tensor]:
        found = [_states(tokenizer, encoder, text, penultimate=True) for tokenizer, encoder in encoders]
        return {"encoder_hidden_states": torch.cat([f[0] for f in found], dim=-1), "text_embeds": found[-1][1]}

    conditions, empty = both(prompts), both([""])
    if _force_zeros(folder):
        empty = {name: torch.zeros_like(value) for name, value in empty.items()}
    size = [side * downscaling(folder) for side in latent]
    # original size, upper left corner of the crop, target size: the defaults of diffusers' pipeline
    ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32)
    return Encoded({**conditions, "time_ids": ids.repeat(len(prompts), 1)}, empty)


def _states(
    tokenizer: Any, encoder: nn.Module, prompts: Sequence[str], penultimate: bool = False
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, tokens, width] and what the encoder puts first in its output (of SDXL's second, the pooled state)."""
    config: Any = encoder.config
    states, first = [], []
    for start in range(0, len(prompts), _BATCH):
        tokens = tokenizer(
            list(prompts[start : start + _BATCH]),
            padding="max_length",
            max_length=min(tokenizer.model_max_length, config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        )
        if int(tokens.input_ids.max()) >= config.vocab_size:
            raise InputError(
                f"--prompts: the tokenizer gives token {int(tokens.input_ids.max())}, the text encoder knows {config.vocab_size}; "
                "the folders tokenizer and text_encoder do not belong together"
            )
        masked = getattr(config, "use_attention_mask", False)
        with torch.no_grad():
            output = encoder(
                tokens.input_ids,
                attention_mask=tokens.attention_mask if masked else None,
                output_hidden_states=penultimate,
            )
        states.append(output.hidden_states[-2] if penultimate else output[0])
        first.append(output[0])
    return torch.cat(states).float(), torch.cat(first).float()


def _tokenizer(folder: Path, encoder: str) -> Any:
    from transformers import CLIPTokenizer

    place = folder / encoder.replace("text_encoder", "tokenizer")
    if not any((place / file).exists() for file in _VOCABULARIES):  # transformers would make an empty one
        raise InputError(f"--prompts: {place} is not a CLIP tokenizer: neither of {', '.join(_VOCABULARIES)} is there")
    try:
        return CLIPTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of many kinds, for files that are missing or not what they should be
        raise InputError(f"--prompts: {place} is not a CLIP tokenizer: {_first_line(error)}") from None


def _encoder(folder: Path) -> nn.Module:
    import transformers

    config = read_json(folder / "config.json")
    name = next(iter(config.get("architectures") or [None]))
    if name not in _CLASSES:
        raise InputError(
            f"--prompts: the text encoder in {folder} is a {name}, supported are {', '.join(_CLASSES)}; encode the prompts yourself "
            "and give them with --cond FILE.safetensors"
        )
    variant = None
    if not any((folder / file).exists() for file in _WEIGHTS):
        variant = "fp16"
        if not any((folder / file.replace("model.", "model.fp16.", 1)).exists() for file in _WEIGHTS):
            raise InputError(
                f"--prompts: {folder} has no model.safetensors (a .bin file is a pickle: convert it with save_pretrained)"
            )
    try:
        model = getattr(transformers, name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant
        )
    except Exception as error:
        raise InputError(f"--prompts: the text encoder in {folder} cannot be loaded: {_first_line(error)}") from None
    assert isinstance(model, nn.Module)
    return model.float().eval()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dictionary.

    Raises:
        InputError: missing, not JSON, or something else in it.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a dictionary")
    return value


def _force_zeros(folder: Path) -> bool:
    """Whether the pipeline's unconditional branch is zeros in place of the empty prompt; so it is for SDXL's by default."""
    index = folder / "model_index.json"
    return bool(read_json(index).get("force_zeros_for_empty_prompt", True)) if index.exists() else True


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and remarks of transformers, which are about other uses than ours; its settings are put back.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from transformers.utils import logging
    except ImportError:
        raise InputError(
            "--prompts needs the package transformers: pip install 'edadm-compile[text]', or give the encoded text with --cond"
        ) from None
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

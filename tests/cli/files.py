"""Files that are wrong in one way each, made once for the table of errors."""

import json
import pickle
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.export import Dim

from edadm_compile.kernels.cubin import Bundle
from edadm_compile.runtime.artifact import write
from tests.cli import makers
from tests.graphs import DDIM, TinyUNet

FORMAT = "edadm_compile.checkpoint/1"
CONFIG = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [8],
    "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
}  # fmt: skip
SETTINGS = {
    "rules.toml": "rules = 3",
    "table.toml": "tdac = 3",
    "nameless.toml": "[[rules]]\nweight_bits = 8",
    "losses.toml": "[reconstruction]\nblock_loss_weight = 0.0\nlayer_loss_weight = 0.0",
    "broken.toml": "weight_bits = ",
    "unknown.toml": "weight_bit = 4",
    "typed.toml": 'weight_bits = "four"',
    "layer.toml": "[[rules]]\npattern = 'convv'\nweight_bits = 8",
    "nothing.toml": "[[rules]]\npattern = '*'\nweight_bits = 32",
    "quick.toml": "[tdac]\ntrajectories = 2",
    "quantile.toml": "[tdac]\nradius_quantile = 2.0",
}


def make(folder, artifact):
    """All of them."""
    _models(folder)
    _broken_models(folder)
    _folders(folder)
    _exported(folder)
    _conditions(folder)
    _schedulers(folder)
    _images(folder)
    _artifacts(folder, artifact)
    for name, text in SETTINGS.items():
        (folder / name).write_text(text)


def checkpoint(**changes):
    """A checkpoint dictionary of a tiny UNet."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config = {**CONFIG, **changes.pop("config", {})}
    state = UNet2DModel(**config).state_dict()
    model = {"class_name": "UNet2DModel", "config": config}
    return {
        "format": FORMAT,
        "model": model,
        "state_dict": state,
        "scheduler": DDIM,
        "sampler": {"steps": 2},
        **changes,
    }


def _models(folder):
    good = checkpoint()
    torch.save(good, folder / "unet.pt")
    torch.save(checkpoint(config={"num_class_embeds": 3}), folder / "classes.pt")
    torch.save(checkpoint(config={"num_class_embeds": 1}), folder / "class.pt")
    for name in ("small", "labelled", "context", "tiny", "whole_timesteps", "hidden"):
        torch.save(getattr(makers, name)().state_dict(), folder / f"{name}.pt")
    torch.save(TinyUNet(classes=5, seed=1).state_dict(), folder / "other.pt")
    nan = makers.small().state_dict()
    nan["conv.weight"][0, 0, 0, 0] = float("nan")
    torch.save(nan, folder / "nan.pt")
    huge = makers.small().state_dict()
    huge["conv.weight"] *= 1e38
    torch.save(huge, folder / "huge.pt")
    save_file(makers.small().state_dict(), folder / "small.safetensors")


def _broken_models(folder):
    good = checkpoint()
    broken = {
        "version": {**good, "format": "edadm_compile.checkpoint/9"},
        "stateless": {k: v for k, v in good.items() if k != "state_dict"},
        "config": {**good, "model": {"class_name": "UNet2DModel", "config": 3}},
        "class_name": {**good, "model": {"class_name": "UNet9D", "config": CONFIG}},
        "refused": {**good, "model": {"class_name": "UNet2DModel", "config": {"block_out_channels": [8, 8]}}},
        "entry": {**good, "state_dict": {**good["state_dict"], "conv_in.weight": 3}},
        "shapes": {**good, "state_dict": {**good["state_dict"], "conv_in.weight": torch.zeros(1)}},
        "text_model": {**good, "model": {"class_name": "UNet2DConditionModel", "config": CONFIG | {
            "cross_attention_dim": 8, "mid_block_type": None}}},
        "list": [1, 2],
        "nested": {"state_dict": {"a": 3}},
        "extra": {**makers.small().state_dict(), "more": torch.zeros(1)},
        "less": {"conv.weight": torch.zeros(3, 3, 3, 3)},
        "shape": {"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(3)},
    }  # fmt: skip
    from diffusers import UNet2DConditionModel

    config = broken["text_model"]["model"]["config"]
    broken["text_model"]["state_dict"] = UNet2DConditionModel(**config).state_dict()
    for name, value in broken.items():
        torch.save(value, folder / f"{name}.pt")
    torch.save(torch.nn.Conv2d(3, 3, 3), folder / "whole.pt")
    (folder / "text.pt").write_text("not a model\n")
    (folder / "text.safetensors").write_text("not tensors\n")
    (folder / "cut.pt").write_bytes((folder / "unet.pt").read_bytes()[:3000])
    (folder / "stale.pt").write_bytes(pickle.dumps(makers.text).replace(b"text", b"gone"))


def _folders(folder):
    for name in ("empty", "list", "bare", "legacy", "unreadable", "index", "json"):
        (folder / name).mkdir()
    for name in ("bare", "legacy", "unreadable", "index"):
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIG}))
        (folder / name / "scheduler_config.json").write_text(json.dumps(DDIM))
    (folder / "list" / "config.json").write_text("[]")
    (folder / "json" / "config.json").write_text("{")
    (folder / "legacy" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / "unreadable" / "diffusion_pytorch_model.safetensors").write_text("no")
    (folder / "index" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def _exported(folder):
    x, t, batch = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), Dim("batch", min=1, max=8)
    for name, module, inputs in (
        ("whole", makers.whole_timesteps(), (x, t)),
        ("context", makers.context(), (x, t, torch.zeros(2, 4))),
        ("one", makers.one_input(), (x,)),
    ):
        dynamic = tuple({0: batch} for _ in inputs)
        torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic), folder / f"{name}.pt2")
    for name, size in (("extractor", 8), ("large", 16)):
        module, images = makers.Features(), (torch.zeros(2, 3, size, size),)
        torch.export.save(torch.export.export(module, images, dynamic_shapes=({0: batch},)), folder / f"{name}.pt2")
    data = bytearray((folder / "whole.pt2").read_bytes())
    where = data.find(b'"graph_module"')
    data = data.replace(b'"graph_module"', b'"graph_modula"') if where >= 0 else data
    (folder / "stale.pt2").write_bytes(bytes(data))


def _conditions(folder):
    tensors = {
        "labels": {"label": torch.tensor([0, 1, 7])},
        "good_labels": {"label": torch.tensor([0, 1, 2])},
        "y": {"y": torch.tensor([0, 1, 2, 3])},
        "context": {"context": torch.zeros(4, 4)},
        "context_wide": {"context": torch.zeros(4, 5)},
        "stranger": {"stranger": torch.zeros(4, 4)},
        "rowless": {"context": torch.zeros(0, 4)},
        "nan": {"context": torch.full((4, 4), float("nan"))},
        "row": {"context": torch.zeros(1, 4)},
        "whole_row": {"context": torch.zeros(1, 4, dtype=torch.int64)},
        "class_labels": {"class_labels": torch.zeros(1, dtype=torch.int64)},
    }
    for name, values in tensors.items():
        save_file(values, folder / f"{name}.cond")
    save_file({}, folder / "none.cond")


def _schedulers(folder):
    configs = {
        "scheduler": DDIM,
        "class": {**DDIM, "_class_name": "MyScheduler"},
        "euler": {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 100},
        "offset": {**DDIM, "steps_offset": 50},
        "pndm": {"_class_name": "PNDMScheduler", "num_train_timesteps": 100},
        "beta": {**DDIM, "beta_schedule": "quadratic"},
        "learned": {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "variance_type": "learned"},
        "nameless": {"num_train_timesteps": 100},
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "broken.json").write_text("{")


def _images(folder):
    for name in ("none", "one", "large", "deep", "torn"):
        (folder / f"images_{name}").mkdir()
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    picture.save(folder / "images_one" / "a.png")
    picture.resize((9, 8)).save(folder / "images_large" / "a.png")
    picture.save(folder / "images_large" / "b.png")
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "images_deep" / f"{name}.png")
        (folder / "images_torn" / f"{name}.png").write_text("no picture")
    np.savez(folder / "keyless.npz", other=np.zeros((4, 3, 8, 8), np.float32))
    np.savez(folder / "shape.npz", x=np.zeros((4, 3, 9, 9), np.float32))
    np.savez(folder / "range.npz", x=np.full((4, 3, 8, 8), 3.0, np.float32))
    (folder / "text.npz").write_text("no arrays")


def _artifacts(folder, artifact):
    write(artifact, folder / "tiny.qmod")
    overflow = {"where": "layer up (aten.conv2d.default)", "largest": 2e5}
    write(replace(artifact, manifest={**artifact.manifest, "beyond_float16": overflow}), folder / "large.qmod")
    settings = {**artifact.manifest["config"], "deploy": "onnxruntime"}
    write(replace(artifact, manifest={**artifact.manifest, "config": settings}), folder / "deployed.qmod")
    write(replace(artifact, device=Bundle({}, {}, {})), folder / "coded.qmod")
    data = (folder / "tiny.qmod").read_bytes()
    (folder / "cut.qmod").write_bytes(data[:100])
    (folder / "text.qmod").write_text("This is a text and no compiled model at all.")
    (folder / "header.qmod").write_bytes(data[:8] + b"!" + data[9:])
    (folder / "altered.qmod").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    at = data.find(b"edadm_compile")
    (folder / "manifest.qmod").write_bytes(data[:at] + b"edadm_compilE" + data[at + 13 :])
    save_file({"a": torch.zeros(1)}, folder / "foreign.qmod")

"""Which launches a graph becomes: one pattern each, then whole UNets by their kernel count."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import fix_batch, make_plan
from tests.lowering.plans import inputs_of, lowered, plan_of, run

WIDTH = 16


class Body(nn.Module):
    """A stem, a pattern, a head; t enters so that the graph has its two inputs."""

    def __init__(self, pattern, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.time = nn.Linear(1, WIDTH)
        self.pattern = pattern

    def forward(self, x, t):
        h = self.stem(x) + self.time(t[:, None].float() / 100)[:, :, None, None]
        return self.head(self.pattern(h))


def conv(inner=WIDTH, outer=WIDTH, **kwargs):
    return nn.Conv2d(inner, outer, kwargs.pop("kernel", 3), padding=kwargs.pop("padding", 1), **kwargs)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.GroupNorm(4, WIDTH), conv(), conv()

    def forward(self, h):
        return h + self.conv2(F.silu(self.conv1(F.silu(self.norm(h)))))


class Resize(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = conv(padding=0, stride=2), conv()

    def forward(self, h):
        return self.up(F.interpolate(self.down(F.pad(h, (0, 1, 0, 1))), scale_factor=2.0, mode="nearest"))


class Skip(nn.Module):
    """The groups of the norm (48 channels in 6 groups of 8) do not end where the sources meet (at 20)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = conv(outer=20), conv(outer=28), nn.GroupNorm(6, 48)
        self.inner, self.shortcut = conv(48), conv(48, kernel=1, padding=0)

    def forward(self, h):
        joined = torch.cat((self.a(h), self.b(h)), dim=1)
        return self.shortcut(joined) + self.inner(F.silu(self.norm(joined)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(32, WIDTH)

    def forward(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        value, gate = self.proj(self.norm(tokens)).chunk(2, dim=-1)
        return (tokens + self.out(value * F.gelu(gate))).transpose(1, 2).reshape(h.shape)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).reshape(len(h), -1, 2, WIDTH // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        return h + self.out(mixed).transpose(1, 2).reshape(h.shape)


#: For each pattern: kernels in order (the quantizer of x first), and constants that some launch must have.
PATTERNS = {
    "norm, activation, row and residual": (
        Residual,
        ["quantize", "qconv2d", "groupnorm", "qconv2d", "qconv2d", "qconv2d"],
        [{"ROW": True}, {"ACT": 1, "OUT": False, "OUT_Q": True}, {"RESIDUAL": True, "OUT": False}],
    ),
    "padding and upsampling in the addressing": (
        Resize,
        ["quantize", "qconv2d", "qconv2d", "qconv2d", "qconv2d"],
        [{"STRIDE_H": 2, "PAD_T": 0, "PAD_L": 0, "OH": 4}, {"UPSAMPLE": 2, "H": 4, "OH": 8}],
    ),
    "a concatenation that is never written": (
        Skip,
        ["quantize", "qconv2d", "qconv2d", "qconv2d", "groupnorm", "qlinear", "qconv2d", "qconv2d"],
        [{"C": 20, "C2": 28, "GROUPS": 6}, {"SEGMENTS": 2}, {"C": 48, "RESIDUAL": True}],
    ),
    "layer norm and gated linear unit": (
        Gated,
        ["quantize", "qconv2d", "layernorm", "qlinear", "qlinear", "qconv2d"],
        [{"GLU": True, "O": 32, "OUT": False, "OUT_Q": True}],
    ),
    "merged projections and attention": (
        Attention,
        ["quantize", "qconv2d", "qlinear", "attention_float", "qlinear", "qconv2d"],
        [{"O": 3 * WIDTH}, {"HEADS": 2, "OUT": False, "OUT_Q": True}],
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name):
    pattern, kernels, wanted = PATTERNS[name]
    program = lowered(Body(pattern()), uniform=True)
    plan = plan_of(program)
    assert [launch.kernel for launch in plan.launches] == kernels, [(x.kernel, x.layer) for x in plan.launches]
    for constants in wanted:
        assert any(constants.items() <= launch.constants.items() for launch in plan.launches), constants
    head = plan.launches[-1]
    assert head.operands["out"].space == "output" and head.constants["OUT_NCHW"]
    inputs = inputs_of(program, 2)
    with torch.no_grad():
        assert torch.equal(run(program, plan, inputs), program(*inputs))


def test_statistics_come_from_the_convolution_that_wrote_a_large_map():
    program = lowered(Body(Residual()), (3, 64, 64), uniform=True)
    plan = plan_of(program, 1)
    norm = next(launch for launch in plan.launches if launch.kernel == "groupnorm")
    writer = next(launch for launch in plan.launches if launch.constants.get("STATS"))
    assert norm.constants["T"] == 64 * 64 // writer.tile.sizes["BLOCK_N"] and "stats" in writer.writes
    assert norm.operands["stats"] == writer.operands["stats"]


def test_the_cifar_unet_takes_at_most_150_launches():
    """google/ddpm-cifar10-32's structure, narrow: the count depends on the structure alone."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 64, 64), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None,
    )  # fmt: skip
    program = lowered(model.eval(), (3, 32, 32))
    plan = plan_of(program, 1)
    assert len(plan.launches) <= 150 and not any(launch.kernel == "torch" for launch in plan.launches)


@pytest.mark.slow
def test_the_stable_diffusion_unet_takes_at_most_340_launches_a_step():
    """Stable Diffusion 1.5's structure, narrow; what depends on the prompt alone is not part of a step."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64,
        attention_head_dim=8,
    )  # fmt: skip
    conditions = {"encoder_hidden_states": torch.randn(6, 77, 64, generator=torch.Generator().manual_seed(0))}
    program = lowered(model.eval(), (4, 16, 16), options={"conditions": conditions})
    plan = plan_of(program, 1)
    assert len(plan.launches) - plan.conditioning <= 340 and not any(x.kernel == "torch" for x in plan.launches)
    assert plan.conditioning == 2  # the codes of the text, and the keys and values of all blocks in one product
    assert "attn2.to_k" in plan.launches[1].layer and plan.launches[1].layer.count("attn2.to_v") == 16


def test_plans_of_one_batch_share_what_does_not_depend_on_the_target():
    program = lowered(Body(Residual()))
    fixed = fix_batch(program, 2)
    for arch in ("sm_80", "sm_90", "sm_80"):
        target = Target(arch, 2, torch.float16)
        assert make_plan(program, target, fixed) == make_plan(program, target)
    with pytest.raises(ValueError, match="fixed for 2 rows"):
        make_plan(program, Target("sm_80", 3, torch.float16), fixed)
    with pytest.raises(ValueError):
        make_plan(program, Target("sm_80", 2, torch.float16, float_layers=("pattern.conv1",)), fixed)

import pytest
import torch

from edadm_compile.config import ReconstructionConfig
from edadm_compile.ir.execute import run_nodes
from edadm_compile.ir.program import get_constant
from edadm_compile.ir.subgraph import find_units
from edadm_compile.passes import reconstruct
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import Calibrate, activation_quantizers, weight_quantizers
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.reconstruct import Reconstruct, UnitTrainer
from edadm_compile.passes.streams import Streams, float_mode
from edadm_compile.quant.affine import weight_codes
from tests.graphs import GraphBuilder, count_ops, random_calibration, small_config


def _program():
    """A stem, two residual blocks and a head; 3-bit inner weights so that rounding matters."""
    build = GraphBuilder(seed=5)
    h = build.conv("stem", build.x, 4, 8)
    for name in "ab":
        inner = build.conv(f"{name}.conv1", build.op("aten.silu.default", h), 8, 8)
        h = build.op("aten.add.Tensor", build.conv(f"{name}.conv2", build.op("aten.silu.default", inner), 8, 8), h)
    program = build.program(build.conv("head", h, 8, 4))
    for node in program.graph_module.graph.nodes:
        if "layer" in node.meta:
            node.meta["layer"] = type(node.meta["layer"])(
                node.meta["layer"].name, "conv2d", node.meta["layer"].weight_shape, "inner", 3, 6
            )
    return program


def _config(**changes):
    settings = {"iters": 60, "batch": 16, "lr_weight": 0.1}
    top = {k: changes.pop(k) for k in ("seed", "method") if k in changes}
    return small_config(reconstruction=ReconstructionConfig(**{**settings, **changes}), **top)


def _reconstructed(**changes):
    """(program before quantization, fake_quant program after reconstruction, reports)."""
    config, program = _config(**changes), _program()
    ctx = Context(config, calibration=random_calibration(program, samples=48))
    # Calibration draws too: with its own seed, what differs between seeds comes from training alone.
    method = {"method": config.method}
    calibrated = run_passes(
        program, [InsertQuant(), Calibrate()], Context(_config(**method), calibration=ctx.calibration)
    )
    after = run_passes(calibrated, [Reconstruct()], ctx)
    assert count_ops(after) == count_ops(calibrated)
    return program, after, ctx.stats["reconstruct"]["units"]


def _codes(program, after):
    weights = {str(n.args[0].target): q for n, q in weight_quantizers(after)}
    return {name: q.integer_codes(get_constant(program.graph_module, name)) for name, q in weights.items()}


@pytest.fixture(scope="module")
def learned():
    return _reconstructed()


def test_every_unit_is_trained_and_its_loss_falls(learned):
    _, _, reports = learned
    assert [(r["unit"], r["kind"], r["layers"]) for r in reports] == [
        ("stem", "layer", 1),
        ("a", "block", 2),
        ("b", "block", 2),
        ("head", "layer", 1),
    ]
    for report in reports:
        # The stem reads white noise: there errors cannot cancel, and rounding to nearest is almost the best.
        assert 0 < report["after"] < (1.0 if report["unit"] == "stem" else 0.95) * report["before"], report


def test_learned_codes_are_floor_or_ceiling(learned):
    program, after, _ = learned
    moved = 0
    for node, quantizer in weight_quantizers(after):
        weight = get_constant(program.graph_module, str(node.args[0].target))
        ratio = weight / quantizer.scale.reshape(-1, 1, 1, 1)
        codes = quantizer.integer_codes(weight).float()
        low, high = (f(ratio).clamp(-4, 3) for f in (torch.floor, lambda r: torch.floor(r) + 1))
        assert (
            bool(((codes == low) | (codes == high)).all()) and quantizer.alpha is None and quantizer.codes is not None
        )
        moved += int((codes != weight_codes(weight, quantizer.scale, quantizer.spec)).sum())
    assert moved > 20


def test_training_leaves_nothing_behind(learned):
    _, after, _ = learned
    for _, quantizer in activation_quantizers(after):
        assert quantizer.drop is None and not quantizer.log_scale.requires_grad and quantizer.enabled
    assert not [p for p in after.graph_module.parameters() if p.requires_grad]


def test_activation_scales_are_learned_too(learned):
    program, after, _ = learned
    ctx = Context(_config(), calibration=random_calibration(program, samples=48))
    fresh = run_passes(program, [InsertQuant(), Calibrate()], ctx)
    pairs = list(zip(activation_quantizers(after), activation_quantizers(fresh), strict=True))
    assert any(float(a.scale) != float(b.scale) for (_, a), (_, b) in pairs)
    assert all(torch.equal(a.zero_point, b.zero_point) for (_, a), (_, b) in pairs)


def test_the_result_depends_on_the_seed_alone():
    runs = [_reconstructed(iters=15, seed=seed, qdrop=0.5) for seed in (0, 0, 1)]
    codes = [_codes(*run[:2]) for run in runs]
    scales = [[float(q.scale) for _, q in activation_quantizers(run[1])] for run in runs]
    assert (
        all(torch.equal(codes[0][n], codes[1][n]) for n in codes[0])
        and scales[0] == scales[1]
        and runs[0][2] == runs[1][2]
    )
    assert any(not torch.equal(codes[0][n], codes[2][n]) for n in codes[0])


@pytest.mark.parametrize("changes", [{"method": "minmax"}, {"iters": 0}], ids=str)
def test_the_baseline_rounds_to_nearest(changes):
    program, after, reports = _reconstructed(**changes)
    assert reports == []
    for node, quantizer in weight_quantizers(after):
        weight = get_constant(program.graph_module, str(node.args[0].target))
        assert quantizer.codes is None
        assert torch.equal(quantizer.integer_codes(weight), weight_codes(weight, quantizer.scale, quantizer.spec))


@pytest.mark.parametrize(
    "changes",
    [{"layer_loss_weight": 0.0}, {"rounding_weight": 0.01}, {"qdrop": 0.5}, {"batch": 1}, {"max_layers": 1}],
    ids=str,
)
def test_every_variant_trains(changes):
    _, _, reports = _reconstructed(**{"iters": 40, **changes})
    first = reports[1]
    assert all(r["after"] == r["after"] for r in reports) and (
        first["after"] < first["before"] or changes.get("batch") == 1
    )


def test_streams_carry_the_float_and_the_quantized_prefix():
    program = _program()
    ctx = Context(_config(), calibration=random_calibration(program, samples=10))
    quantized = run_passes(program, [InsertQuant(), Calibrate()], ctx)
    units = find_units(quantized)
    streams = Streams(quantized, units, ctx.calibration.inputs)
    order = []

    def train(unit):
        order.append(unit.name)
        for node in streams.stored_inputs(streams.closure(unit)):
            for values, on in ((streams.float_values, False), (streams.quant_values, True)):
                expected = _value_at(quantized, node, ctx.calibration.inputs, on)
                assert float((values[node] - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
        assert len(streams.float_values) <= 4  # x, t and two more: what nobody reads any more is dropped

    streams.advance(train)
    assert order == ["stem", "a", "b", "head"]
    assert streams.float_values == streams.quant_values == {} and streams.caches.use.memory == 0


def test_cached_targets_can_have_half_the_size():
    peaks = {}
    for dtype in ("float32", "bfloat16"):
        program, config = _program(), _config(iters=20, target_dtype=dtype)
        ctx = Context(config, calibration=random_calibration(program, samples=48))
        run_passes(program, [InsertQuant(), Calibrate(), Reconstruct()], ctx)
        assert all(r["after"] < r["before"] for r in ctx.stats["reconstruct"]["units"][1:])
        peaks[dtype] = ctx.stats["reconstruct"]["caches"]["memory_peak"]
    # A block has two layers of [48, 8, 8, 8] as targets beside what the streams hold.
    assert peaks["float32"] - peaks["bfloat16"] >= 2 * 48 * 8 * 8 * 8 * 2


def _value_at(program, node, inputs, quantized):
    import contextlib

    found = {}
    with torch.no_grad(), contextlib.nullcontext() if quantized else float_mode(program):
        interpreter = torch.fx.Interpreter(program.graph_module)
        run_node = interpreter.run_node

        def watch(n):
            result = run_node(n)
            if n is node:
                found["value"] = result
            return result

        interpreter.run_node = watch
        interpreter.run(*program.graph_inputs(inputs))
    return found["value"]


def _trainer(method, phase):
    """A trainer of block "a", its quantized model calibrated on random data."""
    program, config = _program(), _config(method=method)
    ctx = Context(config, calibration=random_calibration(program, samples=48))
    after = run_passes(program, [InsertQuant(), Calibrate()], ctx)
    units = find_units(after, config.reconstruction.max_layers)
    streams, found = Streams(after, units, ctx.calibration.inputs), []

    def keep(unit):
        if unit.name == "a":
            found.append(UnitTrainer(after, unit, streams, config, phase, ctx.generator(0)))
            rows = torch.arange(8)
            found.append(found[0].loss(rows, mix=False).detach())
            values = {n: streams.quant_values[n][rows] for n in found[0].inputs}
            with torch.no_grad():
                run_nodes(after.graph_module, found[0].closure, values, found[0].closure)
            found.append({n: values[n] - v[rows] for n, v in found[0].targets.items()})

    streams.advance(keep)
    return found


def test_the_released_loss_sums_over_channels_and_divides_by_nothing():
    trainer, loss, errors = _trainer("eda-dm", "joint")
    assert trainer.watched
    parts = {n: float(e.square().sum(dim=1).mean()) for n, e in errors.items()}
    inner = sum(parts[n] for n in trainer.watched)
    assert float(loss) == pytest.approx(parts[trainer.unit.output] + 0.8 * inner, rel=1e-5)
    trainer, loss, errors = _trainer("default", "joint")
    parts = {n: float(e.square().mean() / trainer.energy[n]) for n, e in errors.items()}
    assert float(loss) == pytest.approx(sum(parts.values()), rel=1e-5)
    for node, target in trainer.targets.items():  # the energy is that of the first samples only
        assert float(trainer.energy[node]) == pytest.approx(float(target.square().mean()), rel=0.2)


def test_weights_are_trained_without_activation_quantizers_and_scales_with_fixed_roundings(monkeypatch):
    """Two phases: what each of them sees and changes."""
    seen = []
    real = UnitTrainer.run

    def watched(self, ctx, label):
        quantizers = [q for _, q in activation_quantizers(self.program)]
        before = [q.scale.clone() for q in quantizers]
        codes = {n: q.codes for n, q in weight_quantizers(self.program)}
        report = real(self, ctx, label)
        scales = any(not torch.equal(a, q.scale) for a, q in zip(before, quantizers, strict=True))
        rounded = any(codes[n] is not q.codes for n, q in weight_quantizers(self.program))
        seen.append((any(q.enabled for q in quantizers), scales, rounded))
        return report

    monkeypatch.setattr(UnitTrainer, "run", watched)
    _, after, reports = _reconstructed(method="q-diffusion", iters=10)
    assert [r["phase"] for r in reports] == ["weights"] * 4 + ["scales"] * 4
    assert seen == [(False, False, True)] * 4 + [(True, True, False)] * 4
    assert all(q.enabled for _, q in activation_quantizers(after))


def test_a_step_in_pieces_has_the_gradients_of_the_whole_batch(monkeypatch):
    """A batch that does not fit into the limit is run a few rows at a time; the last piece is shorter."""
    program, config = _program(), _config(batch=7, rounding_weight=0.01)
    ctx = Context(config, calibration=random_calibration(program, samples=48))
    after = run_passes(program, [InsertQuant(), Calibrate()], ctx)
    units = find_units(after, config.reconstruction.max_layers)
    streams, found = Streams(after, units, ctx.calibration.inputs), {}

    def train(unit):
        if unit.name != "a":
            return
        for rows in (7, 3):
            trainer = UnitTrainer(after, unit, streams, config, "joint", ctx.generator(0))
            monkeypatch.setattr(reconstruct, "STEP_BYTES", rows * trainer.row_bytes)
            seen, real = [], trainer.loss
            monkeypatch.setattr(trainer, "loss", lambda r, seen=seen, real=real: seen.append(r.numel()) or real(r))
            trainer._set_drop(False)
            parameters = [p for group in trainer._parameter_groups() for p in group["params"]]
            loss = trainer._descend(config.reconstruction.iters - 1)
            found[rows] = (seen, loss, [p.grad.clone() for p in parameters])
            for p in parameters:
                p.grad = None

    streams.advance(train)
    assert found[7][0] == [7] and found[3][0] == [3, 3, 1]
    assert float(found[3][1]) == pytest.approx(float(found[7][1]), rel=1e-5)
    for whole, pieces in zip(found[7][2], found[3][2], strict=True):
        assert torch.allclose(pieces, whole, rtol=1e-4, atol=1e-7) and bool(whole.any())

"""From the qdq dialect to a graph whose nodes have one ONNX form each; all rewrites are exact, or named as not."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edadm_compile.errors import ExportError
from edadm_compile.export.plain import drop_output_codes, drop_wide_codes, make_symmetric
from edadm_compile.export.targets import OnnxTarget
from edadm_compile.ir.analysis import fake_values
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import Program, Signature, get_constant, layer_of, set_constant
from edadm_compile.ir.quantizers import (
    DEQUANTIZE,
    QUANTIZE,
    drop_identity,
    quantize_first,
    share_quantizer,
    zero_padding,
)

aten, edadm = torch.ops.aten, torch.ops.edadm


def prepare(program: Program, target: OnnxTarget) -> Program:
    """Rewrite a private copy of a qdq program for one kind of consumer.

    1. x / 1, x * 1, alias, contiguous, dropout, permute that keeps the order → x
    2. quantize(move(x)) → move(quantize(x)) for views, transposes, nearest upsampling: codes are four times smaller
    3. quantize(pad(x, 0)) → pad(quantize(x), code of zero)
    4. equal quantizers of one value → one
    5. convolution in the direct form → dequantize(quantize(convolution)) with its calibrated output range, unless it is
       quantized right behind anyway (`OnnxTarget.output_codes`; rounds once more: the one rewrite that is not exact)
    6. asymmetric activation codes → symmetric ones over the same range (`OnnxTarget.symmetric`; coarser)
    7. quantizers of 16 bits are dropped, the layer's input stays float (where not `OnnxTarget.two_terms`)
    8. quantize(crop(pixel_shuffle(conv2d_2x2))) → crop(pixel_shuffle(quantize(conv2d_2x2))): the phases of an upsampled
       image, whose codes are put together
    9. dequantize(quantize(convolution)) → convolution where a file compiled for ONNX Runtime has the rounding of outputs
       and the consumer does without (not `OnnxTarget.output_codes`; one rounding less: not exact, and finer)
    10. quantizers of the second operand of a product of two activations → signed codes (``meta["signed"]``): fast there

    Raises:
        ExportError: a convolution without an output range.
    """
    program = program.fork()
    graph = program.graph_module.graph
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                changed |= drop_identity(node) or _early(program, node) or share_quantizer(node)
        graph.eliminate_dead_code()
    if not target.two_terms:
        drop_wide_codes(graph)
    if target.output_codes:
        for node in list(graph.nodes):
            _quantize_phases(program, node)
            _add_output_codes(program, node)
    else:
        drop_output_codes(graph)
    if target.symmetric:
        make_symmetric(program)
    else:
        _mark_signed(graph)
    program.graph_module.recompile()
    return program


def _early(program: Program, node: fx.Node) -> bool:
    """Rules 2 and 3; 16-bit codes become two tensors and stay where they are."""
    if op_name(node.target) != QUANTIZE or node.args[3] == 16:
        return False
    return quantize_first(node) or _pad_codes(program, node)


def _pad_codes(program: Program, node: fx.Node) -> bool:
    """Rule 3."""
    if (widths := zero_padding(node.args[0])) is None:
        return False
    pad = node.args[0]
    assert isinstance(pad, fx.Node)
    zero_point = get_constant(program.graph_module, str(node.args[2].target))  # type: ignore[union-attr]
    with node.graph.inserting_before(node):
        codes = node.graph.call_function(node.target, (pad.args[0], *node.args[1:]))  # type: ignore[arg-type]
        padded = node.graph.call_function(aten.constant_pad_nd.default, (codes, widths, int(zero_point)))
    codes.meta, padded.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(padded)
    return True


def _add_output_codes(program: Program, node: fx.Node) -> None:
    """Rule 5."""
    info, readers = layer_of(node), list(node.users)
    if info is None or not writes_codes(node, info) or [op_name(u.target) for u in readers] == [QUANTIZE]:
        return
    if info.out_scale is None or info.out_zero_point is None:
        raise ExportError(
            f"layer {info.name} has no output scale, which the integer convolution of ONNX Runtime needs: the file was made "
            "by an earlier version; compile the model again"
        )
    graph = program.graph_module.graph
    names = [f"outputs.{node.name}.{part}" for part in ("scale", "zero_point")]
    for name, values in zip(names, (info.out_scale, info.out_zero_point), strict=True):
        set_constant(program.graph_module, name, torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1))
    with graph.inserting_after(node):
        scale = graph.get_attr(names[0])
        with graph.inserting_after(scale):
            zero = graph.get_attr(names[1])
    with graph.inserting_after(zero):
        codes = graph.call_function(edadm.quantize.default, (node, scale, zero, 8, False))
    with graph.inserting_after(codes):
        value = graph.call_function(edadm.dequantize.default, (codes, scale, zero))
    for new in (codes, value):
        new.meta = {"scope": node.meta.get("scope", ())}
    for reader in readers:
        reader.replace_input_with(node, value)


def is_integer_layer(node: fx.Node) -> bool:
    """Whether a layer node reads codes and a quantized weight."""
    info = layer_of(node)
    if info is None or info.weight_bits == 32:
        return False
    return bool(op_name(getattr(node.args[0], "target", "")) == DEQUANTIZE)


def _quantize_phases(program: Program, node: fx.Node) -> None:
    """Rule 8; the scale of a channel holds for its four phases."""
    info, crop = layer_of(node), pixels_of(node)
    if info is None or crop is node or not writes_codes(node, info):
        return
    readers = list(crop.users)
    if [op_name(u.target) for u in readers] != [QUANTIZE]:
        return
    graph, quantizer = program.graph_module.graph, readers[0]
    names = []
    for constant in quantizer.args[1:3]:
        name = f"phases.{constant.target}"  # type: ignore[union-attr]
        value = get_constant(program.graph_module, str(constant.target))  # type: ignore[union-attr]
        set_constant(program.graph_module, name, value.repeat_interleave(4, dim=0))
        names.append(name)
    shuffle = crop.args[0]
    assert isinstance(shuffle, fx.Node)
    with graph.inserting_before(shuffle):
        scale, zero = (graph.get_attr(name) for name in names)
        codes = graph.call_function(quantizer.target, (node, scale, zero, *quantizer.args[3:]))  # type: ignore[arg-type]
    codes.meta = dict(quantizer.meta)
    shuffle.replace_input_with(node, codes)
    quantizer.replace_all_uses_with(crop)
    graph.erase_node(quantizer)


def _mark_signed(graph: fx.Graph) -> None:
    """Rule 10, on the chain of movements between a quantizer and the product; a chain with other readers is copied."""
    made: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        info = layer_of(node)
        if info is None or info.kind != "matmul" or info.act_bits == 32:
            continue
        right = node.args[1]
        if not isinstance(right, fx.Node) or op_name(right.target) != DEQUANTIZE:
            continue
        with graph.inserting_before(node):
            copy = graph.call_function(right.target, (_signed(graph, right.args[0], made), *right.args[1:]))  # type: ignore
        copy.meta = dict(right.meta)
        node.replace_input_with(right, copy)
    graph.eliminate_dead_code()


def _signed(graph: fx.Graph, codes: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if codes in made:
        return made[codes]
    if op_name(codes.target) == QUANTIZE:
        new = graph.call_function(codes.target, codes.args)  # type: ignore[arg-type]
    else:
        source = _signed(graph, codes.args[0], made)  # type: ignore[arg-type]
        new = graph.call_function(codes.target, (source, *codes.args[1:]), dict(codes.kwargs))  # type: ignore[arg-type]
    new.meta = {**codes.meta, "signed": True}
    made[codes] = new
    return new


def two_sizes(program: Program) -> tuple[tuple[dict[fx.Node, object], dict[fx.Node, object]], tuple[int, int]]:
    """Fake values of every node at two batch sizes (one, twice, for a graph with a fixed batch)."""
    sizes = batch_sizes(program.signature)
    return (fake_values(program, sizes[0]), fake_values(program, sizes[1])), sizes


def batch_sizes(signature: Signature) -> tuple[int, int]:
    """Two batch sizes from which all others follow: apart by a prime, so that rounded halves and thirds are noticed."""
    if signature.min_batch == signature.max_batch:
        return signature.min_batch, signature.min_batch
    return (4, 11) if signature.max_batch >= 11 else (2, 3)


def weight_codes(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor, int]:
    """int8 codes (output channels first), scales and width of the weight of an integer layer."""
    from edadm_compile.quant import packing

    w_q, scale, bits, shape, _axis = node.args[1].args  # type: ignore[union-attr]
    codes = packing.unpack(get_constant(module, str(w_q.target)), int(bits), shape)  # type: ignore
    return codes, get_constant(module, str(scale.target)), int(bits)  # type: ignore[union-attr, arg-type]

from edadm_compile.ir.program import LayerInfo
from edadm_compile.ir.subgraph import find_units
from tests.graphs import GraphBuilder


def _names(program, max_layers=8):
    """(kind, layer names) of each unit, and a check that the units partition the layers."""
    units = find_units(program, max_layers)
    layers = [n for n in program.graph_module.graph.nodes if "layer" in n.meta and n.meta["layer"].weight_bits < 32]
    claimed = [n for u in units for n in u.layers]
    assert len(claimed) == len(set(claimed)) and set(claimed) == set(layers)
    position = {n: i for i, n in enumerate(program.graph_module.graph.nodes)}
    assert [position[u.output] for u in units] == sorted(position[u.output] for u in units)
    seen = set()
    for unit in units:
        assert not seen & set(unit.nodes)
        seen |= set(unit.nodes)
        outside = [n for n in unit.nodes if n is not unit.output and any(u not in unit.nodes for u in n.users)]
        assert not outside, f"{outside} are read outside {unit.name}"
        assert all(n not in unit.nodes for n in unit.inputs)
    return [(u.kind, [n.meta["layer"].name for n in u.layers]) for u in units], units


def _residual(build, x, name, inner=4, outer=4):
    h = build.conv(f"{name}.conv1", build.op("aten.silu.default", x), inner, outer)
    h = build.conv(f"{name}.conv2", build.op("aten.silu.default", h), outer, outer)
    short = x if inner == outer else build.conv(f"{name}.shortcut", x, inner, outer, kernel=1)
    return build.op("aten.add.Tensor", h, short)


def test_residual_blocks_become_blocks():
    build = GraphBuilder()
    h = build.conv("stem", build.x, 4, 4)
    h = _residual(build, h, "a")
    h = _residual(build, h, "b", 4, 6)
    program = build.program(build.conv("head", h, 6, 4))
    found, units = _names(program)
    assert found == [
        ("layer", ["stem"]),
        ("block", ["a.conv1", "a.conv2"]),
        ("block", ["b.conv1", "b.conv2", "b.shortcut"]),
        ("layer", ["head"]),
    ]
    assert [u.name for u in units] == ["stem", "a", "b", "head"]
    assert [n.name for n in units[1].inputs] == [units[0].output.name]


def test_attention_becomes_one_block_though_its_branches_meet_in_a_product():
    build = GraphBuilder(x=(16, 8))  # tokens
    q, k, v = (build.linear(f"attn.{n}", build.x, 8, 8) for n in "qkv")
    h = build.op("aten.scaled_dot_product_attention.default", q, k, v)
    h = build.op("aten.add.Tensor", build.linear("attn.out", h, 8, 8), build.x)
    found, _ = _names(build.program(build.linear("head", h, 8, 8)))
    assert found[0] == ("block", ["attn.q", "attn.k", "attn.v", "attn.out"])


def test_neighbouring_regions_of_one_module_are_joined():
    build = GraphBuilder(x=(16, 8))
    scope = ("block",)

    def region(x, name):
        h = build.linear(f"block.{name}1", x, 8, 8, scope=scope)
        h = build.linear(f"block.{name}2", build.op("aten.gelu.default", h, scope=scope), 8, 8, scope=scope)
        return build.op("aten.add.Tensor", h, x, scope=scope)

    h = region(region(build.linear("stem", build.x, 8, 8), "attn"), "ff")
    found, _ = _names(build.program(build.linear("head", h, 8, 8)))
    assert ("block", ["block.attn1", "block.attn2", "block.ff1", "block.ff2"]) in found


def test_a_region_with_too_many_layers_is_not_a_block():
    build = GraphBuilder()
    program = build.program(_residual(build, build.conv("stem", build.x, 4, 4), "a"))
    found, _ = _names(program, max_layers=1)
    assert [kind for kind, _ in found] == ["layer"] * 3


def test_a_block_whose_inside_is_read_elsewhere_is_no_block():
    build = GraphBuilder()
    x = build.conv("stem", build.x, 4, 4)
    inner = build.conv("a.conv1", build.op("aten.silu.default", x), 4, 4)
    merged = build.op("aten.add.Tensor", build.conv("a.conv2", inner, 4, 4), x)
    leaked = build.op("aten.cat.default", [merged, inner], 1)
    found, _ = _names(build.program(build.conv("head", leaked, 8, 4)))
    assert not any(kind == "block" for kind, _ in found)


def test_pieces_of_a_split_concatenation_stay_together():
    build = GraphBuilder()
    stem = build.conv("stem", build.x, 4, 4)
    low = build.conv("low", stem, 4, 4)
    cat = build.op("aten.cat.default", [low, stem], 1)
    main = build.conv("a.conv1", build.op("aten.silu.default", cat), 8, 6)
    one = build.conv("a.short.part0", low, 4, 6, kernel=1, split_of=cat.name)
    two = build.conv("a.short.part1", stem, 4, 6, kernel=1, split_of=cat.name)
    short = build.op("aten.add.Tensor", one, two)
    short.meta["split_sum"] = True
    merged = build.op("aten.add.Tensor", build.conv("a.conv2", main, 6, 6), short)
    found, _ = _names(build.program(build.conv("head", merged, 6, 4)))
    assert ("block", ["a.conv1", "a.short.part0", "a.short.part1", "a.conv2"]) in found


def test_loose_pieces_of_a_split_layer_form_one_unit():
    build = GraphBuilder()
    a, b = build.conv("a", build.x, 4, 4), build.conv("b", build.x, 4, 4)
    one, two = (build.conv(f"m.part{i}", v, 4, 4, kernel=1) for i, v in enumerate((a, b)))
    total = build.op("aten.add.Tensor", one, two)
    total.meta["split_sum"] = True
    found, _ = _names(build.program(build.op("aten.silu.default", total)))
    assert ("layer", ["m.part0", "m.part1"]) in found


def test_conditioning_branches_belong_to_the_block_that_reads_them():
    build = GraphBuilder(text=(5,))
    x = build.conv("stem", build.x, 4, 4)
    h = build.conv("a.conv1", x, 4, 4)
    emb = build.linear("a.emb", build.op("aten.silu.default", build.conditions[0]), 5, 4)
    h = build.op("aten.add.Tensor", h, build.op("aten.reshape.default", emb, [-1, 4, 1, 1]))
    h = build.op("aten.add.Tensor", build.conv("a.conv2", h, 4, 4), x)
    found, units = _names(build.program(build.conv("head", h, 4, 4)))
    block = next(layers for kind, layers in found if kind == "block")
    assert sorted(block) == ["a.conv1", "a.conv2", "a.emb"]
    unit = next(u for u in units if u.kind == "block")
    assert {n.name for n in unit.inputs} == {units[0].output.name, "text"}


def test_a_conditioning_branch_that_two_blocks_read_stays_outside():
    build = GraphBuilder(text=(5,))
    emb = build.linear("emb", build.conditions[0], 5, 4)
    h = build.conv("stem", build.x, 4, 4)
    for name in "ab":
        inner = build.op(
            "aten.add.Tensor",
            build.conv(f"{name}.conv1", h, 4, 4),
            build.op("aten.reshape.default", emb, [-1, 4, 1, 1]),
        )
        h = build.op("aten.add.Tensor", build.conv(f"{name}.conv2", inner, 4, 4), h)
    found, _ = _names(build.program(build.conv("head", h, 4, 4)))
    assert ("layer", ["emb"]) in found
    assert ("block", ["a.conv1", "a.conv2"]) in found and ("block", ["b.conv1", "b.conv2"]) in found


def test_additive_skips_over_the_whole_network_do_not_swallow_it():
    build = GraphBuilder()
    stem = build.conv("stem", build.x, 4, 4)
    down = _residual(build, stem, "down")
    middle = _residual(build, down, "middle")
    up = _residual(build, build.op("aten.add.Tensor", middle, down), "up")
    program = build.program(build.conv("head", build.op("aten.add.Tensor", up, stem), 4, 4))
    found, _ = _names(program, max_layers=3)
    blocks = [layers for kind, layers in found if kind == "block"]
    assert blocks == [[f"{n}.conv1", f"{n}.conv2"] for n in ("down", "middle", "up")]


def test_chains_of_one_module_are_grouped():
    build = GraphBuilder()
    h = build.conv("stem", build.x, 4, 4)
    h = build.conv("net.0", h, 4, 4, scope=("net", "net.0"))
    h = build.conv("net.1", build.op("aten.silu.default", h, scope=("net",)), 4, 4, scope=("net", "net.1"))
    found, _ = _names(build.program(build.conv("head", h, 4, 4)))
    assert ("chain", ["net.0", "net.1"]) in found


def test_float_layers_are_in_no_unit():
    build = GraphBuilder()
    conv = build.conv("a", build.x, 4, 4)
    conv.meta["layer"] = LayerInfo("a", "conv2d", (4, 4, 3, 3), note="float")
    found, _ = _names(build.program(build.conv("b", conv, 4, 4)))
    assert found == [("layer", ["b"])]


def test_gated_residuals_are_blocks():
    build = GraphBuilder()
    x = build.conv("stem", build.x, 4, 4)
    gate = build.op("aten.sigmoid.default", build.conv("a.gate", x, 4, 4))
    h = build.op("aten.mul.Tensor", build.conv("a.value", x, 4, 4), gate)
    found, _ = _names(build.program(build.conv("head", h, 4, 4)))
    assert ("block", ["a.gate", "a.value"]) in found or ("block", ["a.value", "a.gate"]) in found

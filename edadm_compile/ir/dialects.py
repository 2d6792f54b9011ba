"""The four dialects and the verifier that runs after every pass."""

from __future__ import annotations

from torch import fx

from edadm_compile.errors import DialectError
from edadm_compile.ir.ops import FLOAT_OPS, LAYER_OPS, LOWERED_OPS, QDQ_OPS, op_name
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant

#: Dialect -> (legal operators, legal module types).
LEGAL: dict[str, tuple[frozenset[str], tuple[type, ...]]] = {
    "float": (FLOAT_OPS, ()),
    "fake_quant": (FLOAT_OPS, (ActFakeQuant, WeightFakeQuant)),
    "qdq": (FLOAT_OPS | QDQ_OPS, ()),
    "lowered": (FLOAT_OPS | LOWERED_OPS, ()),
}


def illegal_ops(graph: fx.Graph, dialect: str) -> list[str]:
    """Names of operators in `graph` that `dialect` does not allow, each once, in order."""
    allowed = LEGAL[dialect][0]
    names = (op_name(n.target) for n in graph.nodes if n.op in ("call_function", "call_method"))
    return list(dict.fromkeys(name for name in names if name not in allowed))


def verify(program: Program) -> None:
    """Check a program against the rules of its dialect.

    Raises:
        DialectError: naming the first node that breaks a rule.
    """
    graph = program.graph_module.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise DialectError(f"{program.dialect} graph is malformed: {error}") from error
    allowed, modules = LEGAL[program.dialect]
    for node in graph.nodes:
        if node.op == "call_method" or (node.op == "call_function" and op_name(node.target) not in allowed):
            raise DialectError(
                f"node {node.name}: operator {op_name(node.target)} is not legal in dialect {program.dialect}"
            )
        if node.op == "call_module" and not isinstance(program.graph_module.get_submodule(str(node.target)), modules):
            raise DialectError(f"node {node.name}: module {node.target} is not legal in dialect {program.dialect}")
        if node.op == "get_attr":
            _check_constant(program, node)
        if program.dialect == "lowered" and op_name(node.target) in LAYER_OPS and layer_of(node) is not None:
            _check_float_layer(node)
    _check_signature(program)


def _check_constant(program: Program, node: fx.Node) -> None:
    if not node.users:
        raise DialectError(f"node {node.name}: dead constant {node.target}")
    try:
        get_constant(program.graph_module, str(node.target))
    except (AttributeError, AssertionError):
        raise DialectError(f"node {node.name}: constant {node.target} does not exist") from None


def _check_float_layer(node: fx.Node) -> None:
    info = layer_of(node)
    if info is not None and not info.note:
        raise DialectError(f"layer {info.name} stays float without a reason")


def _check_signature(program: Program) -> None:
    names = [str(n.target) for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    wanted = [spec.name for spec in program.signature.inputs]
    tables = sorted(program.time.tables) if program.time else []
    if names[: len(wanted)] != wanted or sorted(names[len(wanted):]) != tables:  # fmt: skip
        raise DialectError(f"graph inputs are {names}, the signature wants {wanted} and time tables {tables}")

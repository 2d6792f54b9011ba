"""Rules of the settings must name layers of the model."""

from __future__ import annotations

from edadm_compile.config import QuantConfig
from edadm_compile.errors import ConfigError, did_you_mean
from edadm_compile.ir.program import Program, layers
from edadm_compile.passes.layer_roles import annotate

_SHOWN = 8


def check_rules(program: Program, config: QuantConfig) -> None:
    """Refuse a rule that no layer matches: it would do nothing, in silence.

    Args:
        program: a float graph in its final form, annotated or not.

    Raises:
        ConfigError: naming the pattern and the layers there are.
    """
    if not config.rules:
        return
    program = program.fork()
    annotate(program, config)
    names = [info.name for info in layers(program)]
    for rule in config.rules:
        if not any(rule.matches(name) for name in names):
            near = did_you_mean(rule.pattern, names)
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise ConfigError(f"rule {rule.pattern!r} matches no layer of this model; layers are {shown}{near}")

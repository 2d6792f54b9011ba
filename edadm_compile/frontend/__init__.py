"""From what a user has (a file, a folder, a factory, a module) to a `Source` that can be captured."""

from edadm_compile.frontend.conditions import read_conditions
from edadm_compile.frontend.guidance import GuidanceOptions, guided_sampler
from edadm_compile.frontend.load import LoadOptions, load_source
from edadm_compile.frontend.source import Source, source_from_module

__all__ = [
    "GuidanceOptions",
    "LoadOptions",
    "Source",
    "guided_sampler",
    "load_source",
    "read_conditions",
    "source_from_module",
]

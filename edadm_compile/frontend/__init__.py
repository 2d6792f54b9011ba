"""From what a user has (a file, a folder, a factory, a module) to a `Source` that can be captured."""

from edadm_compile.frontend.load import LoadOptions, load_source, read_conditions
from edadm_compile.frontend.source import Source, source_from_module

__all__ = ["LoadOptions", "Source", "load_source", "read_conditions", "source_from_module"]

"""From what a user has (a file, a folder, a factory, a module) to a `Source` that can be captured."""

from edadm_compile.frontend.autoencoder import Decoder, find_autoencoder
from edadm_compile.frontend.conditions import gather, read_conditions
from edadm_compile.frontend.guidance import GuidanceOptions, guided_sampler
from edadm_compile.frontend.load import LoadOptions, load_source
from edadm_compile.frontend.prompts import Encoded
from edadm_compile.frontend.source import Source, source_from_module

__all__ = [
    "Decoder",
    "Encoded",
    "GuidanceOptions",
    "LoadOptions",
    "Source",
    "find_autoencoder",
    "gather",
    "guided_sampler",
    "load_source",
    "read_conditions",
    "source_from_module",
]

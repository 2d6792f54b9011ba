"""Examples that come with the package: a trained model and the scripts around it."""

from __future__ import annotations

from pathlib import Path

from edadm_compile.errors import ArtifactError, InputError
from edadm_compile.runtime.artifact import write_atomically

#: Name -> what it is.
EXAMPLES = {"digits": "class-conditional diffusion model of handwritten digits, 1 million parameters"}


def source_folder(name: str) -> Path:
    """Folder of an example: inside an installed package, or beside the package in a checkout.

    Raises:
        InputError: no example of that name.
        ArtifactError: the installation has no examples.
    """
    if name not in EXAMPLES:
        raise InputError(f"example: got {name!r}, allowed {', '.join(EXAMPLES)}")
    package = Path(__file__).resolve().parents[1]
    places = [package / "examples" / name, package.parent / "examples" / name]
    found = next((place for place in places if (place / "README.md").is_file()), None)
    if found is None:
        raise ArtifactError(
            f"example {name}: not in {places[0].parent}; the installation is incomplete, install the wheel again"
        )
    return found


def write_example(name: str, folder: Path) -> list[Path]:
    """Write the files of an example into `folder`, which is made if need be.

    A file that is there already with the same content stays.

    Returns:
        the files of the example, sorted.

    Raises:
        InputError: no example of that name, or `folder` has a file of the same name with other content; then nothing
            is written.
        ArtifactError: a file cannot be read or written.
    """
    origin = source_folder(name)
    names = sorted(path.name for path in origin.iterdir() if path.is_file())
    if folder.exists() and not folder.is_dir():
        raise InputError(f"example: {folder} is a file; give a folder")
    try:
        contents = {item: (origin / item).read_bytes() for item in names}
        present = {item: (folder / item).read_bytes() for item in names if (folder / item).exists()}
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"example: {error.filename}: {error.strerror or error}") from None
    other = [item for item, content in present.items() if content != contents[item]]
    if other:
        raise InputError(
            f"example: {folder} has other files called {', '.join(other)}; nothing was written, give another folder"
        )
    for item in names:
        if item not in present:
            write_atomically(folder / item, contents[item])
    return [folder / item for item in names]

"""Write what ``edadm-compile evaluate`` judges digits with.

``features.pt2``: the classifier's penultimate activations as a ``torch.export`` archive, images float32
``[B, 1, 16, 16]`` in ``[-1, 1]`` to features ``[B, 48]``. ``evaluate`` finds it because it lies beside ``model.pt``.
With ``--data FILE.npz`` also the real digits, as float32 ``x`` of shape ``[1797, 1, 16, 16]``, for its ``--data``.

Run ``python examples/digits/judge_files.py`` again after training the classifier again.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
# Lets the sibling module be found also when this file is loaded by path through importlib.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from classifier import IMAGE_SIZE, DigitClassifier, load_classifier, load_real_digits  # noqa: E402

from edadm_compile.runtime.artifact import write_atomically  # noqa: E402

FEATURES_PATH = HERE / "features.pt2"


class Features(nn.Module):
    """The features of a classifier as a network of its own."""

    def __init__(self, classifier: DigitClassifier) -> None:
        """Keep the classifier."""
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Compute features.

        Args:
            images: float32 ``[B, 1, 16, 16]`` in ``[-1, 1]``.

        Returns:
            float32 ``[B, 48]``.
        """
        return self.classifier.features(images)


def write_features(path: Path = FEATURES_PATH) -> None:
    """Export the classifier's features for batches of 1 to 4096 images.

    Args:
        path: archive to write, replaced in one step.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE)
    program = torch.export.export(
        Features(load_classifier()), (example,), dynamic_shapes={"images": {0: batch}}, strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of the machine it was made on
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_atomically(path, buffer.getvalue())


def write_data(path: Path) -> None:
    """Write the real digits.

    Args:
        path: npz file to write, replaced in one step.
    """
    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, x=load_real_digits()[0].numpy())
    write_atomically(path, buffer.getvalue())


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="also write the real digits")
    options = parser.parse_args()
    write_features()
    print(f"wrote {FEATURES_PATH}")
    if options.data is not None:
        write_data(options.data)
        print(f"wrote {options.data}")


if __name__ == "__main__":
    main()

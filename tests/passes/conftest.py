import pytest

from tests.graphs import collected, small_config


@pytest.fixture(scope="module")
def labelled(labelled_program):
    """A float program with class labels, and its calibration set."""
    return labelled_program, collected(labelled_program, small_config())

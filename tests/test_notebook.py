"""How results look in a terminal and in a notebook."""

from html.parser import HTMLParser

import pytest

from edadm_compile import LayerRule, QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.notebook import table
from edadm_compile.runtime.session import from_artifact


def _rows(text):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells, self.tags = [], []

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)

        def handle_data(self, data):
            self.cells.append(data)

    reader = Reader()
    reader.feed(text)
    assert set(reader.tags) == {"table", "caption", "tbody", "tr", "th", "td"}
    title, *cells = reader.cells
    return title, dict(zip(cells[::2], cells[1::2], strict=True))


def test_a_table_escapes_what_it_is_given():
    assert _rows(table("<b>", [("<script>", "a & b")])) == ("<b>", {"<script>": "a & b"})


@pytest.mark.parametrize("config", [
    QuantConfig(), QuantConfig(weight_bits=8, tdac=TdacConfig(radius=0.5), rules=(LayerRule("mid.*", 8),)),
    QuantConfig(reconstruction=ReconstructionConfig(iters=5), seed=3, method="eda-dm"),
])  # fmt: skip
def test_settings_are_told_by_what_differs_and_can_be_read_back(config):
    names = {c.__name__: c for c in (QuantConfig, TdacConfig, ReconstructionConfig, LayerRule)}
    assert eval(repr(config), names) == config
    assert "promoted_share" not in repr(config)


def test_the_table_of_settings_has_nested_ones_too():
    title, rows = _rows(QuantConfig(reconstruction=ReconstructionConfig(iters=5), calib_samples=9)._repr_html_())
    assert title == "Settings w4a8"
    assert rows == {
        "weight_bits": "4",
        "act_bits": "8",
        "method": "default",
        "calib_samples": "9",
        "reconstruction.iters": "5",
    }


def test_a_result_says_what_runs_and_how_good_it_is(compiled):
    _, rows = _rows(compiled._repr_html_())
    assert rows["asked"] == f"{compiled.config.name}, method default"
    assert f"{compiled.quality.sqnr:.1f} dB over all steps" in rows["noise SQNR against float"]
    assert " w8a16" in rows["layers"] and rows["weights of quantized layers"].endswith("% of fp16")


def test_a_loaded_model_says_how_it_is_called(artifact):
    model = from_artifact(artifact, engine="reference")
    assert repr(model).startswith("CompiledModel(TinyUNet, w") and "reference engine" in repr(model)
    assert "label [B]" in repr(model)
    _, rows = _rows(model._repr_html_())
    assert rows["engine"] == "reference on cpu" and "DDIMScheduler" in rows["sampler"]

"""The page without a browser: well formed, whole in itself, escaped, and with the numbers it was given."""

import json
import re
from html.parser import HTMLParser

import pytest

from edadm_compile.errors import ArtifactError
from edadm_compile.report.html import page
from tests.report.facts import alone, facts, hostile

_VOID = {"meta", "link", "img", "input", "br", "wbr"}


class Document(HTMLParser):
    """Elements of a page with their attributes and text; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1][0] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        for _, index in self.stack:
            self.texts[index] = self.texts.get(index, "") + data

    def all(self, tag, **wanted):
        return [
            (attrs, self.texts.get(i, ""))
            for i, (name, attrs) in enumerate(self.elements)
            if name == tag and all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]


@pytest.fixture(scope="module")
def document():
    return Document(page.render(facts()))


@pytest.mark.parametrize(
    "given", [facts(), alone(), hostile('</script><script>alert("x")</script>')], ids=["full", "alone", "hostile"]
)
def test_every_page_is_well_formed_and_its_anchors_lead_somewhere(given):
    found = Document(page.render(given))
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a, _ in found.all("a") if a["href"].startswith("#")]
    assert targets and set(targets) <= set(ids)
    labels = {attrs[key] for _, attrs in found.elements for key in ("aria-labelledby", "for") if key in attrs}
    assert {part for label in labels for part in label.split()} <= set(ids)


def test_the_page_refers_to_nothing_outside(document):
    text = page.render(facts())
    for tag, attrs in document.elements:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|sendBeacon|\bimport\(", text)
    addresses = set(re.findall(r"\w+://[^\s\"'<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a vocabulary, not an address


def test_every_plot_has_its_data_beside_it(document):
    given = facts()
    blocks = {a["id"]: json.loads(text) for a, text in document.all("script", type="application/json")}
    assert set(blocks) == {f"data-{key}" for key in (*page.KEYS, "layers")}
    links = {a["data-json"]: a for a, _ in document.all("a") if "data-json" in a}
    assert set(links) == {*page.KEYS, "layers"}
    assert all(a["download"] == f"{key}.json" for key, a in links.items())
    assert blocks["data-noise"] == given["noise"] and blocks["data-ranges"] == given["ranges"]
    assert blocks["data-allocation"] == {"timesteps": given["selection"]["timesteps"], "samples": [1, 2, 3, 6]}
    assert blocks["data-samples"]["each_psnr_db"] == [41.0, 28.5]
    assert blocks["data-blocks"]["units"] == given["units"] and blocks["data-times"] == given["times"]
    files = page.data_files(given)
    assert files["noise.json"] == given["noise"] and set(files) == {f"{key}.json" for key in links}


def test_images_and_drawings_have_a_text_for_those_who_cannot_see_them(document):
    assert len(document.all("img")) == 6 and all(a["alt"] for a, _ in document.all("img"))
    drawings = document.all("svg")
    assert len(drawings) == 8  # four charts, each for two widths
    assert all(a["role"] == "img" and a["aria-label"] for a, _ in drawings)
    assert all(a.get("scope") for a, _ in document.all("th"))


def test_the_top_says_what_matters(document):
    tiles = {name: text for (_, name), (_, text) in zip(document.all("dt"), document.all("dd"), strict=True)}
    assert tiles["Prediction SQNR"].startswith("31.0 dB") and "worst 20.5 dB at t = 0" in tiles["Prediction SQNR"]
    assert tiles["Image PSNR"].startswith("34.8 dB") and "worst 28.5 dB" in tiles["Image PSNR"]
    assert tiles["Layers in integers"].startswith("3 of 4") and "1 in float" in tiles["Layers in integers"]
    assert tiles["Weight size"].startswith("63.4 %")
    assert tiles["Time of one call"].startswith("0.0500 ms")  # 30 + 12 in layers, 8 between
    reasons = next(text for _, text in document.all("ul", class_="reasons"))
    assert "1 layer: product of two activations" in " ".join(reasons.split())


def test_the_table_of_layers_has_every_row_with_what_is_known_of_it(document):
    rows = [" ".join(text.split()) for a, text in document.all("tr") if "data-runs" in a]
    assert len(rows) == 5
    assert rows[1] == "2 mid.conv conv2d 4 × 4 × 3 × 3 w4a8 w4a8 88 288 0.00400 0.00200 12.0"
    assert rows[2].startswith("3 mid.attention attention float float product of two activations –")
    values = [a["data-value"] for a, _ in document.all("td") if "data-value" in a]
    assert values[:6] == [
        "1",
        "300",
        "288",
        "9000",
        "",
        "30.0",
    ]  # number, bytes, fp16, MAC, sensitivity, time of conv_in


def test_a_hostile_name_stays_text():
    name = '</script><img src=x onerror="alert(1)">&{{ 7*7 }}'
    text = page.render(hostile(name))
    found = Document(text)
    assert not found.all("img", src="x") and "49" not in found.texts[0][:2000]
    assert all("onerror" not in attrs for _, attrs in found.elements)
    data = json.loads({a["id"]: t for a, t in found.all("script", type="application/json")}["data-ranges"])
    assert data["layers"][1]["layer"] == name
    assert [t for a, t in found.all("option") if t == name]
    assert len(found.all("script")) == 1 + len(page.KEYS) + 1


def test_a_file_alone_shows_what_it_knows_and_names_what_is_missing():
    found = Document(page.render(alone()))
    ids = {attrs["id"] for _, attrs in found.elements if "id" in attrs}
    assert not ids & {"samples", "noise", "blocks", "ranges", "sensitivity"} and {"layers", "cost", "missing"} <= ids
    text = found.texts[0]
    assert "Images from the same noise" in text and "needs the float model" in text
    assert "Cost model, not time." in text and "0.00900 M MAC" in text


def test_another_reference_is_said():
    text = page.render(facts(reference={"name": "other.pt", "same_model": False}))
    assert "two different models" in text and "two different models" not in page.render(facts())


def test_a_manifest_of_somebody_else_is_an_error_and_no_traceback():
    for broken in (
        {"config": {}},
        {"versions": None},
        {"source": "x"},
        {"layers": [{"layer": 1}]},
        {"allocation": ["a"]},
    ):
        with pytest.raises(ArtifactError, match="not what edadm-compile writes"):
            page.render(facts(**broken))

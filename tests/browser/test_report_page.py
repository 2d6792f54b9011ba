"""The report in Chromium: no errors, nothing fetched, nothing too wide; sorting, filtering, choosing, colours, paper.

Skipped where playwright or Chromium is missing: pip install 'edadm-compile[browser]' and the system's Chromium.
"""

import json
import re
import shutil

import pytest

from edadm_compile.report.html import charts, page
from tests.report.facts import facts, hostile

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra [browser])")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tiny.html"
    path.write_text(page.render(facts()))
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Opens the page; at the end nothing may have gone wrong or been fetched."""
    wrong, opened = [], []

    def go(url=address, width=1280, **options):
        found = browser.new_page(viewport={"width": width, "height": 800}, **options)
        found.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        found.on("pageerror", lambda e: wrong.append(str(e)))
        found.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
        found.goto(url)
        opened.append(found)
        return found

    yield go
    for found in opened:
        found.close()
    assert not wrong


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_its_window_without_errors(visit, width, scheme):
    found = visit(width=width, color_scheme=scheme)
    assert found.evaluate("document.documentElement.scrollWidth") == width
    shown = "narrow" if width == 390 else "wide"
    assert found.locator(f"#noise .chart.{shown}").is_visible()
    assert found.locator("#noise .chart:visible").count() == 1
    dark = found.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 23)"
    assert dark == (scheme == "dark")


def test_the_table_of_layers_needs_no_sideways_scrolling_on_a_desktop(visit, tmp_path):
    """With the longest that occurs: names, shapes and counts of Stable Diffusion's layers."""
    given = facts()
    for row in given["layers"]:
        name = row["layer"]
        row |= {"layer": f"down_blocks.1.attentions.0.transformer_blocks.0.{name}", "bytes": 14_745_600}
        row |= {"fp16_bytes": 29_491_200, "shape": [1280, 2560, 3, 3]}
        row["note"] = row["note"] or "promoted: most output error per bit"
        given["times"]["macs"][row["layer"]], given["times"]["layers"][row["layer"]] = 120_795_955_200, 48_123.0
        given["sensitivity"][row["layer"]] = 3.21e-5
    (tmp_path / "wide.html").write_text(page.render(given))
    found = visit((tmp_path / "wide.html").as_uri())
    wide, there = found.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.querySelector('.scroll:has(.truth)'))")
    assert wide <= there


def _names(found):
    return list(found.locator("#truth tbody tr:visible th").all_inner_texts())


def test_a_column_sorts_both_ways_and_what_is_missing_stays_last(visit):
    found = visit()
    before = _names(found)
    head = found.get_by_role("button", name="Stored, bytes")
    head.click()
    assert _names(found) == ["conv_in", "conv_out", "mid.conv", "mid.attention", "time.linear"]
    head.press("Enter")
    assert _names(found) == ["mid.conv", "conv_out", "conv_in", "mid.attention", "time.linear"]
    assert found.locator("#truth th[aria-sort]").all_inner_texts() == ["Stored, bytes"]
    found.get_by_role("button", name="#", exact=True).click()
    assert _names(found) == before


def test_words_and_widths_filter_the_layers(visit):
    found = visit()
    found.fill("#layer-filter", "MID conv2d")
    assert _names(found) == ["mid.conv"] and found.inner_text("#layer-count") == "1 of 5 layers"
    found.fill("#layer-filter", "")
    found.select_option("#layer-runs", "float")
    assert _names(found) == ["mid.attention"]
    found.select_option("#layer-runs", "")
    assert len(_names(found)) == 5


def _numbers(path):
    return [float(v) for v in re.findall(r"-?[\d.]+", path)]


def test_the_script_draws_ranges_as_the_page_does(visit):
    found = visit(width=1400)
    found.evaluate("document.getElementById('range-chart').style.width = '980px'")
    found.wait_for_function("document.querySelector('#range-chart svg').getAttribute('viewBox') === '0 0 980 290'")
    for index, layer in enumerate(facts()["ranges"]["layers"]):
        found.select_option("#range-layer", str(index))
        assert found.inner_text("#range-name") == layer["layer"]
        wanted = str(charts.ranges(facts()["ranges"]["timesteps"], layer, "t")).partition("</svg>")[0]
        for kind in ("band all", "band most", "level limit", "grid"):
            drawn = found.locator(f'#range-chart path[class="{kind}"]')
            paths = [drawn.nth(i).get_attribute("d") for i in range(drawn.count())]
            python = re.findall(rf'class="{kind}" d="([^"]+)"', wanted)
            assert len(paths) == len(python)
            for mine, other in zip(paths, python, strict=True):
                assert _numbers(mine) == pytest.approx(_numbers(other), abs=0.06)


def test_the_keys_beside_the_list_and_the_links_of_the_table_choose_a_layer(visit):
    found = visit()
    first = found.inner_text("#range-name")
    found.click("#range-next")
    second = found.inner_text("#range-name")
    found.click("#range-previous")
    assert {first, second} == {"conv_in", "mid.conv"} and found.inner_text("#range-name") == first
    found.locator("#truth a", has_text="conv_in").click()
    assert found.inner_text("#range-name") == "conv_in"


def test_the_button_changes_the_colours(visit):
    found = visit(color_scheme="light")
    colours = []
    for _ in range(4):
        colours.append(found.evaluate("getComputedStyle(document.body).backgroundColor"))
        found.click("#theme")
    assert colours[0] == colours[2] == colours[3] == "rgb(245, 246, 248)" and colours[1] == "rgb(15, 18, 23)"


def test_the_data_of_a_plot_can_be_downloaded(visit):
    found = visit(accept_downloads=True)
    with found.expect_download() as waiting:
        found.click("a[data-json=noise]")
    assert waiting.value.suggested_filename == "noise.json"
    with open(waiting.value.path()) as file:
        assert json.load(file) == facts()["noise"]


def test_paper_is_white_whatever_the_screen_is(visit, tmp_path):
    found = visit(color_scheme="dark")
    found.pdf(path=tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    found.emulate_media(media="print")
    assert found.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not found.locator("nav").is_visible() and not found.locator("#layer-controls").is_visible()
    assert found.locator("#truth tbody tr:visible").count() == 5


def test_a_hostile_name_runs_nothing(visit, tmp_path):
    name = '</script><img src=x onerror="document.title=1"><script>document.title="taken"</script>'
    (tmp_path / "h.html").write_text(page.render(hostile(name)))
    found = visit((tmp_path / "h.html").as_uri())
    assert (
        "taken" not in found.evaluate("document.title").replace(name, "") and found.locator("img[src=x]").count() == 0
    )
    assert found.locator("#range-layer option").nth(1).inner_text() == name

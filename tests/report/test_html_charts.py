"""Scales and shapes of the charts, by their numbers."""

import re

import pytest

from edadm_compile.report.html import charts, lists
from edadm_compile.report.html.charts import Frame, Series
from edadm_compile.report.html.scales import Linear, linear_ticks, log_ends, log_share, number, timestep
from tests.report.facts import facts


@pytest.mark.parametrize("low, high, ticks", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (19.1, 45, [10, 20, 30, 40, 50]), (-1.12, 4.85, [-2, 0, 2, 4, 6]), (3, 3, [2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6]),
])  # fmt: skip
def test_ticks_are_round_and_span_the_values(low, high, ticks):
    found = linear_ticks(low, high)
    assert found == pytest.approx(ticks)
    assert found[0] <= low and found[-1] >= high


def test_a_linear_scale_keeps_both_ends():
    scale = Linear(-2.0, 6.0, 100.0, 20.0)
    assert (scale(-2), scale(6), scale(2)) == (100.0, 20.0, 60.0)


def test_a_logarithmic_scale():
    ends = log_ends([3e-5, 0.02])
    assert ends == (-5, -1)
    assert log_share(1e-3, ends) == pytest.approx(0.5)
    assert log_share(0.0, ends) == 0.0 and log_share(5.0, ends) == 1.0
    assert log_ends([]) == (0, 1) and log_ends([0.1]) == (-1, 0)


@pytest.mark.parametrize("value, text", [
    (None, "–"), (0.0, "0"), (0.00190063, "0.00190"), (4.80883e-05, "4.81e−5"), (-12.345, "−12.3"), (1234567.0, "1.23e6"), (999.9, "1,000"),
])  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_timesteps_are_whole_where_they_are():
    assert (timestep(981.0), timestep(12.5), timestep(0.0)) == ("981", "12.5", "0")


def _path(frame, kind):
    return [re.findall(r"[ML]([\d.]+) ([\d.]+)", m) for m in frame.marks if f'class="{kind}' in m]


def test_a_line_passes_through_its_values_and_leaves_gaps():
    frame = Frame(304, 166, [3.0, 2.0, 1.0, 0.0], [0, 50, 100], "dB")
    frame.line(Series("a", [0.0, 100.0, None, 50.0], "quantized"))
    assert _path(frame, "line")[0] == [("76.8", "126.0"), ("138.2", "26.0"), ("261.2", "76.0")]
    assert frame.marks[0].count("M") == 2


def test_columns_stand_on_zero():
    frame = Frame(304, 166, [1.0, 0.0], [0, 5, 10], "samples")
    frame.columns([10, 2.5], "quantized")
    heights = [float(re.search(r'height="([\d.]+)"', m).group(1)) for m in frame.marks]
    assert heights == [100.0, 25.0]


def test_a_band_goes_there_and_back():
    frame = Frame(304, 166, [1.0, 0.0], [-1, 0, 1], "value")
    frame.band([-1.0, 0.0], [1.0, 0.5], "all")
    ys = [float(y) for _, y in _path(frame, "band")[0]]
    assert ys == [26.0, 51.0, 76.0, 126.0]


def test_a_chart_says_every_value_to_a_pointer():
    drawing = str(
        charts.lines([75.0, 0.0], [Series("SQNR, dB", [40.0, None], "quantized")], "SQNR, dB", "what it shows")
    )
    assert drawing.count("<svg") == 2 and "step 1 of 2, t = 75: SQNR, dB 40.00" in drawing
    assert "step 2 of 2, t = 0: SQNR, dB –" in drawing


def test_one_timestep_is_enough_for_every_chart():
    layer = {"low": [-1.0], "high": [1.0], "lower": [-0.5], "upper": [0.5], "quantizer": None}
    for drawing in (charts.lines([7.0], [Series("a", [1.0], "density")], "a", "t"), charts.columns([7.0], Series("a", [0], "q"), "a", "t"),
                    charts.ranges([7.0], layer, "t")):  # fmt: skip
        assert "nan" not in str(drawing) and "inf" not in str(drawing)


def test_block_losses_say_which_way_they_went():
    rows = lists.block_losses(facts()["units"]).rows
    assert [r.style for r in rows] == ["better", "worse"]
    assert rows[0].text == "0.0100 → 0.00200 (−80 %)" and rows[1].text.endswith("(+100 %)")
    assert rows[0].second == pytest.approx(100 * 2 / 2) and rows[0].share == pytest.approx(65.05, abs=0.01)


def test_sensitivities_are_sorted_and_coloured_by_what_runs():
    rows = lists.sensitivities({"a": 1e-4, "b": 1e-2}, {"a": "w4a8", "b": "w8a8"}).rows
    assert [r.name for r in rows] == ["b", "a"]
    assert [r.style for r in rows] == ["stem wide-codes", "stem narrow-codes"]


def test_without_a_measured_time_the_list_is_of_products():
    found = {"kind": "model", "layers": {}, "between": {}, "macs": {"a": 3_000_000, "b": 1_000_000}}
    rows = lists.times(found, {"a": "w4a8", "b": "float"}).rows
    assert [r.text for r in rows] == ["3.00 M MAC", "1.00 M MAC"] and rows[0].note == "w4a8, 75.0 % of all"


def test_long_lists_fold_but_not_for_a_few():
    bars = [lists.Bar(str(i), 1.0, "") for i in range(100)]
    shown = {n: lists.BarList(bars[:n], []).shown for n in (5, 22, 23, 100)}
    assert shown == {5: 5, 22: 22, 23: 16, 100: 16}

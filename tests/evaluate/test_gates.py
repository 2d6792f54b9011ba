import math

import pytest

from edadm_compile.errors import InputError
from edadm_compile.evaluate import gates
from edadm_compile.evaluate.gates import Gate


def test_limits_are_parsed():
    assert gates.parse(None, "--fail-below") == []
    assert gates.parse("sqnr=27, ssim=0.9", "--fail-below") == [Gate("sqnr", 27.0), Gate("ssim", 0.9)]
    assert gates.parse("frechet=2,kid_data=1e-3", "--fail-above") == [Gate("frechet", 2.0), Gate("kid_data", 0.001)]


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--fail-below", "sqnr", "--fail-below: got 'sqnr', expected NAME=NUMBER"),
        ("--fail-below", "sqnr=high", "got 'sqnr=high'"),
        ("--fail-below", "sqnr=nan", "got 'sqnr=nan'"),
        ("--fail-below", "", "got ''"),
        ("--fail-below", "sqnr=1,", "got ''"),
        ("--fail-below", "sqnr=1,sqnr=2", "--fail-below: sqnr is given twice"),
        ("--fail-below", "snqr=27", "unknown metric 'snqr'; did you mean 'sqnr'?"),
        ("--fail-above", "freched=2", "unknown metric 'freched'; did you mean 'frechet'?"),
        ("--fail-below", "xyz=1", "unknown metric 'xyz'; allowed are sqnr, sqnr_without_last"),
        ("--fail-below", "frechet=2", "frechet is better when lower; give its limit with --fail-above"),
        ("--fail-above", "psnr=2", "psnr is better when higher; give its limit with --fail-below"),
    ],
)
def test_bad_limits_are_explained(option, text, message):
    with pytest.raises(InputError) as caught:
        gates.parse(text, option)
    assert message in str(caught.value)


def test_the_limit_itself_passes():
    metrics = {"sqnr": 27.0, "frechet": 2.0}
    limits = [Gate("sqnr", 27.0), Gate("frechet", 2.0)]
    assert gates.failures(limits, metrics) == [] and all(r["passed"] for r in gates.judge(limits, metrics))


def test_a_missed_limit_says_what_was_found_and_asked():
    limits = [Gate("sqnr", 27.0), Gate("frechet", 2.0), Gate("ssim", 0.9)]
    metrics = {"sqnr": 26.99, "frechet": 2.5, "ssim": 0.95}
    assert gates.failures(limits, metrics) == [
        "sqnr (noise-prediction SQNR over all steps) is 26.99 dB, asked for at least 27 dB",
        "frechet (Fréchet distance, quantized to float) is 2.5, asked for at most 2",
    ]
    assert [r["passed"] for r in gates.judge(limits, metrics)] == [False, False, True]
    assert gates.judge(limits, metrics)[1] == {
        "metric": "frechet", "fail": "above", "limit": 2.0, "found": 2.5, "passed": False,
    }  # fmt: skip


def test_exact_results_pass_and_undefined_ones_do_not():
    assert Gate("sqnr", 27.0).passes(math.inf)
    assert not Gate("sqnr", 27.0).passes(math.nan) and not Gate("frechet", 2.0).passes(math.nan)

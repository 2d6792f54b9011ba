"""Timing with an invented clock."""

import math

import pytest

from edadm_compile.evaluate.timing import Rules, Timing, WallClock, interleave, warm_up


class Table:
    """Times from a function of (name, how often this contender was measured); records what happens."""

    def __init__(self, times):
        self.times, self.events, self.seen = times, [], {}

    def call(self, name):
        def run(number):
            self.events.append((name, number))
            self.current = name

        return run

    def measure(self, call, first, count):
        for number in range(first, first + count):
            call(number)
        self.events.append(("measured", self.current, count))
        self.seen[self.current] = self.seen.get(self.current, 0) + 1
        return self.times(self.current, self.seen[self.current])


def test_quantiles_interpolate():
    timing = Timing((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (timing.median, timing.quantile(0), timing.quantile(1)) == (3, 1, 5)
    assert timing.quantile(0.1) == pytest.approx(1.4) and timing.quantile(0.9) == pytest.approx(4.6)
    assert timing.to_json() == {"median": 3, "p10": timing.quantile(0.1), "p90": timing.quantile(0.9), "rounds": 5}
    assert Timing((7.0,)).quantile(0.9) == 7


def test_wall_clock_divides_by_the_number_of_calls():
    ticks = iter([10.0, 10.5])
    numbers = []
    assert WallClock(lambda: next(ticks)).measure(numbers.append, 3, 5) == pytest.approx(0.5e6 / 5)
    assert numbers == [3, 4, 5, 6, 7]


def test_contenders_take_turns_and_numbers_go_on():
    table = Table(lambda name, n: 100.0)
    rules = Rules(rounds=3, turn=400, warm_turns=8, window=2)
    times = interleave({name: table.call(name) for name in "ab"}, table, rules)
    assert times.calls == {"a": 4, "b": 4} and times.warm == {"a": True, "b": True}
    turns = [event[1] for event in table.events if event[0] == "measured"]
    assert turns[-6:] == ["a", "b"] * 3
    rounds = table.events[-6 * 6 :]  # an untimed call, four timed ones, the measurement
    assert rounds[:6] == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("measured", "a", 4)]
    assert [n for event in rounds if event[0] == "a" for n in event[1:]] == list(range(15))


def test_ratios_pair_turns_of_the_same_round():
    """Both slow down threefold in every other round: the ratio does not see it, the times do."""

    def times(name, n):
        return (1 + 2 * (n % 2)) * (100.0 if name == "ours" else 250.0)

    table = Table(times)
    rules = Rules(rounds=10, turn=1, warm_turns=4, window=2)
    found = interleave({"ours": table.call("ours"), "other": table.call("other")}, table, rules)
    ratio = found.ratios("ours")["other"]
    assert ratio.samples == (2.5,) * 10 and found.microseconds["other"].quantile(0.9) == 750
    report = found.to_json("ours")
    assert report["other"]["ratio"]["median"] == 2.5 and report["ours"]["ratio"]["p90"] == 1
    assert "ratio" not in found.to_json()["other"]


def test_warm_up_waits_until_two_windows_agree():
    table = Table(lambda name, n: 100.0 + 1000.0 * math.exp(-n))
    estimate, count, stable = warm_up(table.call("a"), table, Rules(turn=1000, window=3))
    assert stable and estimate == pytest.approx(100, rel=0.05) and count == 10
    assert 8 < table.seen["a"] < 20


@pytest.mark.parametrize(("rules", "turns"), [(Rules(warm_turns=7), 7), (Rules(warm_time=1000.0, turn=1), 5)])
def test_warm_up_ends_without_becoming_stable(rules, turns):
    table = Table(lambda name, n: 100.0 * 2**n if n < 20 else 1.0)
    _, _, stable = warm_up(table.call("a"), table, rules)
    assert not stable and table.seen["a"] <= turns


def test_a_slow_contender_is_called_once_a_turn():
    table = Table(lambda name, n: 1e7)
    found = interleave({"slow": table.call("slow")}, table, Rules(rounds=2))
    assert found.calls == {"slow": 1} and table.seen["slow"] == 1 + 2  # one turn of warm-up is long enough
    assert sum(event[0] == "slow" for event in table.events) == 3

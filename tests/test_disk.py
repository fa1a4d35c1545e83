"""A disk that fails at any call, and power that goes: nothing paid is lost, and the story ends."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest

from bench import disk
from bench._lives import Lives

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the shim is built with gcc"),
]
WRONG = ("unclear", "broken", "unused", "repaid_unsaid", "second_failed", "leftovers")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> disk.Bench:
    return disk.Bench(tmp_path_factory.mktemp("disk").resolve())


@pytest.fixture(scope="module")
def lives(bench) -> Iterator[Lives]:
    with Lives(bench.shim) as made:
        yield made


def test_the_shim_counts_the_calls_that_can_fail(bench):
    assert bench.calls[""] >= bench.calls["EIO"] / 2 > 0
    assert 0 < bench.calls["EMFILE"] < bench.calls["ENOSPC"]
    assert len(bench.whole) == disk.SCENES and None not in bench.whole


@pytest.mark.parametrize("name, times", [("ENOSPC", "on"), ("EIO", "once")])
def test_a_call_that_fails_in_the_middle_costs_no_paid_answer(bench, lives, name, times):
    at = bench.calls[name] // 2
    found = disk.fail(bench, lives, bench.fresh(), name, times, at)
    assert [one for one in found if one[0] in WRONG] == []


@pytest.mark.all
def test_after_a_power_cut_the_same_run_goes_on(bench, lives):
    found = disk.cut(bench, lives, bench.fresh(), bench.calls[""] // 2)
    keys = [key for key, _ in found if not key.endswith("_late")]
    wanted = ["cuts", *(f"{how}_{end}" for how in disk.CUTS for end in ("finished", "alike"))]
    assert sorted(keys) == sorted(wanted), found


@pytest.mark.all
def test_what_a_run_has_returned_outlasts_a_power_cut(bench, lives):
    assert disk.returned(bench, lives, bench.fresh(), 1) == [("returned", "")]


@pytest.mark.all
@pytest.mark.slow
def test_a_sample_of_bad_disks_and_power_cuts(tmp_path):
    result, said = disk.measure(tmp_path.resolve(), points=10, cuts=12)
    ends = ("failed", "leftovers", "repaid", "lost")
    wrong = {key for key in result if key.rpartition("_")[2] in ends and key != "repaid"}
    wrong |= set(WRONG)
    assert {key: result[key] for key in wrong if result[key]} == {}, "\n".join(said)
    assert result["finished"] + result["clear_errors"] == result["runs"] == 60
    for how in disk.CUTS:
        assert result[f"{how}_finished"] == result[f"{how}_alike"] == 12

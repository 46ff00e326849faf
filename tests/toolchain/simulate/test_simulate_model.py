"""What is modelled of a phone: profiles, the roofline, the clock, heat, the user, and faults."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from tests.toolchain.conftest import Exported
from toolchain.simulate.device import (
    CLASSES,
    FOLDER,
    SYSTEMS,
    Compute,
    device_names,
    find_device,
    read_device,
)
from toolchain.simulate.estimate import check_fits, estimate
from toolchain.simulate.faults import draw
from toolchain.simulate.rhythm import COOLED, DAY, HOUR, Clock, thermal
from toolchain.simulate.roofline import Cost, Counter
from toolchain.simulate.user import User

PIXEL = find_device("pixel-8")


def test_the_profiles_span_what_there_is() -> None:
    devices = [find_device(name) for name in device_names()]
    assert {device.kind for device in devices} == set(CLASSES)
    assert {device.system for device in devices} == set(SYSTEMS)
    assert sum(device.system == "ios" for device in devices) == 2
    assert all(len(source) > 8 for device in devices for source in device.sources.values())


def test_all_misfits_of_a_profile_are_one_sentence(tmp_path: Path) -> None:
    text = (FOLDER / "pixel-8.toml").read_text(encoding="utf-8")
    text = re.sub(r"^battery_wh.*\n", "", text, flags=re.M)
    text = re.sub(r"^cores = \{ value = 4", "cores = { value = 4.5", text, flags=re.M)
    text = re.sub(r"^app_mb = \{ value = 640", "app_mb = { value = -1", text, flags=re.M)
    text = text.replace('class = "flagship"', 'class = "huge"').replace(
        "[power]", "[power]\nvolts = 3.9"
    )
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LoopError) as caught:
        read_device(file)
    said = str(caught.value)
    for part in (
        "power.battery_wh is missing",
        "power.volts is unknown",
        "compute.cores is 4.5, expected a whole number",
        "memory.app_mb is -1, expected more than 0",
        "class is 'huge'",
        str(file),
    ):
        assert part in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[heat]", "[warmth]"), r"the table \[heat\] is missing; warmth is unknown"),
        (('source = "Google', 'from = "Google'), "expected { value = …, source = … }"),
        (("use_from = { value = 7.5", "use_from = { value = 23.4"), "is not before"),
        (("name =", "name"), "is not TOML"),
    ],
)
def test_a_profile_that_is_wrong(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "mine.toml"
    text = (FOLDER / "pixel-8.toml").read_text(encoding="utf-8")
    file.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(LoopError, match=said):
        read_device(file)


def test_an_unknown_device_names_the_known() -> None:
    with pytest.raises(LoopError, match="galaxy-a54, host, iphone-15"):
        find_device("nokia-3310")


def test_a_call_takes_as_long_as_its_slower_half() -> None:
    on = Compute(cores=1, gflops=10.0, gops=40.0, gigabytes_per_s=2.0)
    assert Cost(flops=2e10, ops=4e10, bytes=1e9).seconds(on) == pytest.approx(3.0)
    assert Cost(flops=2e10, ops=4e10, bytes=8e9).seconds(on) == pytest.approx(4.0)


def test_counted_operations_against_the_architecture_s_closed_form(both: Exported) -> None:
    """The built-in model: 5 layers, hidden 256, MLP 640, 4 heads and 2 of keys, 64 channels."""
    counter = Counter(open_bundle(both.bundle))
    block = 256 * (256 + 2 * 128 + 256) + 3 * 256 * 640
    head, per_pair = 4096 * 256, 4 * 256 * 5
    embed = counter.lm(LmCall("embed", 100, 0))
    assert embed.flops + embed.ops == 2 * 5 * block * 100 + per_pair * 100 * 101 / 2
    prefill = counter.lm(LmCall("prefill", 30, 0))
    assert prefill.flops + prefill.ops == 2 * (5 * block * 30 + head) + per_pair * 30 * 31 / 2
    decode = counter.lm(LmCall("decode", 3, 30))
    expected = 2 * 3 * (5 * block + head) + per_pair * (31 + 32 + 33)
    assert decode.flops + decode.ops == expected
    # a decoded token reads all weights and the cache
    one = counter.lm(LmCall("decode", 1, 0))
    size = (both.bundle / "android" / "lm.pte").stat().st_size
    assert one.bytes == size + 4 * 2 * 5 * 128
    # training: at least forward, its recomputation and the input's gradient; LoRA adds little
    step = counter.training(TrainingCall("gradient", 256, 40))
    least = 5 * 3 * 2 * block * 256
    assert least < step.flops < 1.5 * least
    more = counter.training(TrainingCall("gradient", 256, 65))  # a second call of the head
    assert more.flops - step.flops == pytest.approx(2 * 2 * 64 * head, rel=0.01)


def test_a_night_begins_after_its_day() -> None:
    rhythm = replace(PIXEL.rhythm, dialogues=10)
    clock = Clock(replace(PIXEL, rhythm=rhythm), LoopPolicy())
    moments = []
    for place in range(1, 31):
        clock.by_day(place)
        assert not clock.conditions(1).charging
        moments.append(clock().seconds)
        if clock.ends_day(place):
            clock.by_night()
            assert clock.conditions(1).charging
            moments.append(clock().seconds)
            clock.add(100.0)
            moments.append(clock().seconds)
    assert moments == sorted(moments)
    assert clock().day == 2
    assert moments[10] == 23.5 * HOUR
    assert clock.since_night(clock().seconds) == clock.wall
    clock.add(rhythm.night_hours * HOUR)
    assert clock.night_is_over
    assert not clock.conditions(1).charging


def test_a_charge_that_begins_after_midnight_belongs_to_the_day_before() -> None:
    rhythm = replace(PIXEL.rhythm, charge_from=0.5, charge_to=5.0)
    clock = Clock(replace(PIXEL, rhythm=rhythm), LoopPolicy())
    clock.by_day(1)
    clock.by_night()
    assert clock().seconds == DAY + 0.5 * HOUR
    assert rhythm.night_hours == 4.5


def test_heat_s_pauses_against_newton_s_law_step_by_step() -> None:
    policy = LoopPolicy(hottest_celsius=33.0)
    heat, watts = PIXEL.heat, PIXEL.power.watts
    expected = thermal(PIXEL, policy)
    celsius, working, worked, passed = heat.ambient_celsius, True, 0.0, 0.0
    step = 0.2  # seconds
    for number in range(int(20 * HOUR / step)):
        power = heat.charging_watts + watts * working
        target = heat.ambient_celsius + power * heat.kelvin_per_watt
        celsius += (target - celsius) * step / (60 * heat.minutes)
        if celsius >= policy.hottest_celsius:
            working = False
        elif celsius <= policy.hottest_celsius - COOLED:
            working = True
        if number > HOUR / step:  # it has settled
            passed, worked = passed + step, worked + step * working
    assert expected.duty == pytest.approx(worked / passed, rel=0.02)
    assert thermal(PIXEL, LoopPolicy(hottest_celsius=60.0)).duty == 1.0
    hot = Clock(PIXEL, LoopPolicy(hottest_celsius=20.0))
    hot.by_night()
    assert hot.conditions(1).celsius > 20.0


def test_the_user_answers_by_id_and_at_the_rate() -> None:
    user = User(4, 0.3)
    answered = [user.answers(f"d{i}") for i in range(4000)]
    assert answered == [User(4, 0.3).answers(f"d{i}") for i in range(4000)]
    assert sum(answered) / 4000 == pytest.approx(0.3, abs=0.03)
    assert not any(User(4, 0.0).answers(f"d{i}") for i in range(100))
    assert all(User(4, 1.0).answers(f"d{i}") for i in range(100))


def test_faults_are_drawn_from_the_seed() -> None:
    faults = draw(6, True, True, 100, 3)
    assert faults == draw(6, True, True, 100, 3)
    assert faults != draw(6, True, True, 100, 4)
    kinds = [fault.kind for fault in faults]
    assert kinds == ["kill"] * 6 + ["full_disk", "low_memory"]
    assert {fault.trigger for fault in faults[:6]} == {"dialogue", "night"}
    assert all(1 <= fault.place <= 100 for fault in faults[:7])


def test_a_device_too_small_is_refused_with_the_sum(both: Exported) -> None:
    bundle = open_bundle(both.bundle)
    manifest = bundle.manifest
    found = estimate(bundle, LoopPolicy(), 100)
    assert found.least_peak <= found.peak
    check_fits(PIXEL, found, manifest)
    small = replace(PIXEL, memory=replace(PIXEL.memory, app_mb=found.idle))
    with pytest.raises(LoopError, match=r"lets an app have .* MB, and the loop needs about"):
        check_fits(small, found, manifest)
    full = replace(PIXEL, storage=replace(PIXEL.storage, app_mb=math.floor(found.storage)))
    with pytest.raises(LoopError, match="lets an app store"):
        check_fits(full, found, manifest)

"""The cards' meter, against a driver that is made up: two cards, of which one tells little."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.training import gpu as module
from luthier.training.gpu import GIB, Card, gpu_meter

BIG = Card(0, "NVIDIA A10", "aaaa-0001", "00000000:65:00.0")
SHY = Card(1, "Tesla M40", "bbbb-0002", "00000000:17:00.0")


class NVMLError(Exception):
    pass


@dataclass
class Nvml:
    """As pynvml: functions that take a handle, which is here a card's own dictionary. What it lacks is an error."""

    cards: list[dict[str, Any]]
    driver: bool = True
    asked: list[str] = field(default_factory=list)
    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1

    def told(self, handle: dict[str, Any], key: str) -> Any:
        self.asked.append(key)
        if key not in handle:
            raise NVMLError(f"{key}: not supported")
        return handle[key]

    def find(self, key: str, value: str) -> dict[str, Any]:
        for card in self.cards:
            if card.get(key) == value:
                return card
        raise NVMLError("not found")

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:  # noqa: N802
        return self.find("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> dict[str, Any]:  # noqa: N802
        return self.find("bus", bus)

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:  # noqa: N802
        used, total = self.told(handle, "memory")
        return SimpleNamespace(used=used, total=total, free=total - used)

    def nvmlDeviceGetUtilizationRates(self, handle: dict[str, Any]) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self.told(handle, "gpu"), memory=1)

    def nvmlDeviceGetTemperature(self, handle: dict[str, Any], sensor: int) -> int:  # noqa: N802
        assert sensor == 0
        return int(self.told(handle, "temperature"))

    def nvmlDeviceGetTemperatureThreshold(self, handle: dict[str, Any], threshold: int) -> int:  # noqa: N802
        assert threshold == 1
        return int(self.told(handle, "slowdown"))

    def nvmlDeviceGetPowerUsage(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return int(self.told(handle, "milliwatts"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return int(self.told(handle, "millijoules"))


def big(**changes: Any) -> dict[str, Any]:
    told = {"uuid": "GPU-aaaa-0001", "bus": "00000000:65:00.0", "memory": (int(14.5 * GIB), int(23.7 * GIB))}
    told |= {"gpu": 100, "temperature": 79, "slowdown": 95, "milliwatts": 312_040, "millijoules": 9_000_000_000}
    return told | changes


def shy(**changes: Any) -> dict[str, Any]:
    told = {"uuid": "GPU-bbbb-0002", "bus": "00000000:17:00.0", "memory": (GIB, 12 * GIB), "gpu": 3, "temperature": 88}
    return told | changes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [500.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_reading_has_the_contract_s_keys_and_null_for_what_a_card_refuses():
    meter = gpu_meter([BIG, SHY], nvml=Nvml([big(), shy()]))
    first, second = meter.read()
    assert first == {
        "name": "NVIDIA A10",
        "index": 0,
        "memory_gib": 14.5,
        "memory_total_gib": 23.7,
        "utilisation": 100,
        "temperature": 79,
        "temperature_limit": 95,
        "normal": True,
        "power_w": 312.0,
        "energy_wh": 0.0,
    }
    assert list(second) == list(first)
    assert (second["temperature"], second["temperature_limit"], second["normal"]) == (88, 90, False)
    assert (second["power_w"], second["energy_wh"], second["memory_gib"]) == (None, None, 1.0)


def test_cards_are_known_by_uuid_then_by_bus_and_keep_the_order_of_torch():
    """With CUDA_VISIBLE_DEVICES=1,0 torch's 0 is the driver's 1."""
    nvml = Nvml([big(), shy()])
    renumbered = [Card(0, SHY.name, SHY.uuid, SHY.bus), Card(1, BIG.name, BIG.uuid, BIG.bus)]
    assert [(line["index"], line["name"], line["utilisation"]) for line in gpu_meter(renumbered, nvml=nvml).read()] == [
        (0, "Tesla M40", 3),
        (1, "NVIDIA A10", 100),
    ]
    by_bus = gpu_meter([Card(5, "A10", "unknown", BIG.bus)], nvml=nvml).read()
    assert (by_bus[0]["index"], by_bus[0]["utilisation"]) == (5, 100)
    part = gpu_meter([Card(0, "A100 MIG 1g", "cccc", "?")], nvml=Nvml([shy(uuid="MIG-cccc")])).read()
    assert part[0]["utilisation"] == 3


def test_a_card_that_the_driver_does_not_know_is_all_null():
    (line,) = gpu_meter([Card(0, "NVIDIA A10", "x", "y")], nvml=Nvml([])).read()
    told = {key for key, value in line.items() if value is not None}
    assert told == {"name", "index", "temperature_limit"}


@pytest.mark.parametrize(("degrees", "normal"), [(79, True), (92, True), (93, False), (95, False)])
def test_normal_is_three_degrees_below_the_slowdown(degrees, normal):
    (line,) = gpu_meter([BIG], nvml=Nvml([big(temperature=degrees)])).read()
    assert line["normal"] is normal


def test_energy_by_the_card_s_own_counter_is_counted_from_the_start(clock):
    card = big()
    meter = gpu_meter([BIG], nvml=Nvml([card]))
    clock[0] += 100
    card["millijoules"] += 36_000_000  # 36 kJ = 10 Wh
    assert meter.read()[0]["energy_wh"] == 10.0
    card["millijoules"] += 3_600_000
    assert meter.read()[0]["energy_wh"] == 11.0


def test_energy_is_integrated_over_power_where_there_is_no_counter(clock):
    card = shy(milliwatts=100_000)
    meter = gpu_meter([SHY], nvml=Nvml([card]))
    assert meter.read()[0]["energy_wh"] == 0.0
    clock[0] += 36
    card["milliwatts"] = 300_000
    assert meter.read()[0]["energy_wh"] == 2.0  # 200 W on average for 36 s
    del card["milliwatts"]
    clock[0] += 36
    assert (meter.read()[0]["power_w"], meter.read()[0]["energy_wh"]) == (None, None)


def test_energy_goes_on_from_the_part_before():
    before = [{"index": 0, "energy_wh": 12.5}, {"index": 1, "energy_wh": None}]
    card = big()
    meter = gpu_meter([BIG, SHY], before, Nvml([card, shy(milliwatts=1)]))
    card["millijoules"] += 3_600_000
    assert [line["energy_wh"] for line in meter.read()] == [13.5, 0.0]


def test_no_meter_without_cards_or_driver(capfd):
    assert gpu_meter([], nvml=Nvml([])) is None
    assert gpu_meter([BIG], nvml=Nvml([big()], driver=False)) is None
    assert capfd.readouterr() == ("", "")


def test_several_threads_may_read():
    """One after the other: an interval of energy counts once, whoever reads."""
    card = shy(milliwatts=1_000_000)

    class Slow(Nvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: dict[str, Any]) -> int:  # noqa: N802
            inside.append(threading.get_ident())
            time.sleep(0.01)
            alone.append(len(set(inside)) == 1)
            inside.clear()
            return super().nvmlDeviceGetTotalEnergyConsumption(handle)

    inside: list[int] = []
    alone: list[bool] = []
    meter = gpu_meter([SHY], nvml=Slow([card]))
    threads = [threading.Thread(target=meter.read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == [True] * 5

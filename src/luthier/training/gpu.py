"""What a run's NVIDIA cards are doing, asked of their driver through NVML: no kernel waits for it, nor it for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 1024**3
WARM = 90
"""°C at which a card is taken to slow down where it does not say when it does."""
MARGIN = 3
"""°C below that, at least, for a temperature to be normal."""


@dataclass(frozen=True)
class Card:
    """A GPU as torch numbers it, with what its driver knows it by: CUDA_VISIBLE_DEVICES numbers them anew."""

    index: int
    name: str
    uuid: str
    """Without "GPU-"."""
    bus: str
    """As 00000000:65:00.0."""


def cards(indices: Sequence[int]) -> list[Card]:
    """Those of torch's numbers. It asks torch once, before training."""
    import torch

    found = []
    for index in indices:
        about: Any = torch.cuda.get_device_properties(index)  # whose stub lacks pci_*
        bus = f"{about.pci_domain_id:08x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
        found.append(Card(index, about.name, str(about.uuid), bus))
    return found


def gpu_meter(
    cards: Sequence[Card], before: Sequence[dict[str, Any]] | None = None, nvml: Any = None
) -> GpuMeter | None:
    """A meter of the cards; None where there is none, or no driver that could be asked.

    before: the last reading of the run's part so far, whose energy is counted on. nvml: the module, in place of pynvml.
    """
    if not cards:
        return None
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return GpuMeter(cards, before or (), nvml)


@dataclass
class _Meter:
    """One card's driver handle (None: the driver does not know it), its limit and its energy so far."""

    card: Card
    handle: Any
    limit: int
    joules: float
    counter: float | None
    """Joules, as the card counts them itself; None where it does not."""
    power: float | None = None
    asked: float = 0.0

    def spend(self, counter: float | None, power: float | None, now: float) -> None:
        """Count the energy since the last reading: by the card's own counter, else as its mean power times the time."""
        if counter is not None and self.counter is not None:
            self.joules += counter - self.counter
        elif power is not None and self.power is not None:
            self.joules += (power + self.power) / 2 * (now - self.asked)
        self.counter, self.power, self.asked = counter, power, now


class GpuMeter:
    """Reads the cards. Any thread may ask; a reading takes a millisecond or so, and torch has no part in it."""

    def __init__(self, cards: Sequence[Card], before: Sequence[dict[str, Any]], nvml: Any) -> None:
        self.nvml, self.lock = nvml, threading.Lock()
        spent = {line["index"]: 3600 * (line["energy_wh"] or 0.0) for line in before}
        self.meters = [self._meter(card, spent.get(card.index, 0.0)) for card in cards]

    def read(self) -> list[dict[str, Any]]:
        """A line a card, in their order, as status.json and metrics.jsonl have it; null for what a card does not tell.

        memory_gib: what is taken on the card, by whomever; energy_wh: since the run began.
        """
        with self.lock:
            return [self._read(meter) for meter in self.meters]

    def _meter(self, card: Card, joules: float) -> _Meter:
        nvml = self.nvml
        handle = (
            self._ask(nvml.nvmlDeviceGetHandleByUUID, f"GPU-{card.uuid}")
            or self._ask(nvml.nvmlDeviceGetHandleByUUID, f"MIG-{card.uuid}")
            or self._ask(nvml.nvmlDeviceGetHandleByPciBusId, card.bus)
        )
        if handle is None:
            return _Meter(card, None, WARM, joules, None)
        limit = self._ask(nvml.nvmlDeviceGetTemperatureThreshold, handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        return _Meter(card, handle, limit or WARM, joules, self._counter(handle))

    def _read(self, meter: _Meter) -> dict[str, Any]:
        nvml, handle = self.nvml, meter.handle
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        degrees = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        power = None if milliwatts is None else milliwatts / 1000
        meter.spend(self._counter(handle), power, time.monotonic())
        counted = meter.counter is not None or power is not None
        return {
            "name": meter.card.name,
            "index": meter.card.index,
            "memory_gib": memory and round(memory.used / GIB, 2),
            "memory_total_gib": memory and round(memory.total / GIB, 2),
            "utilisation": rates and rates.gpu,
            "temperature": degrees,
            "temperature_limit": meter.limit,
            "normal": None if degrees is None else degrees <= meter.limit - MARGIN,
            "power_w": power and round(power, 1),
            "energy_wh": round(meter.joules / 3600, 3) if counted else None,
        }

    def _counter(self, handle: Any) -> float | None:
        millijoules = self._ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return None if millijoules is None else millijoules / 1000

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the driver tells; None where it cannot, or does not know the card."""
        if arguments[0] is None:
            return None
        try:
            return function(*arguments)
        except self.nvml.NVMLError:
            return None

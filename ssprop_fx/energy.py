"""Energy counters of the machine: GPUs through NVML, CPU packages through Linux's powercap (RAPL)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .errors import SSPropError

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """Energy of the CPU packages since the counters were first read, from powercap's files.

    Args:
        root: the directory of the zones.

    Raises:
        OSError: there is no zone, or its counter cannot be read (reading it takes root on most systems).
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [z for z in sorted(root.glob("intel-rapl:*")) if z.name.count(":") == 1]  # a package; `:0:0` is in it
        if not self._zones:
            raise OSError(f"no intel-rapl zone in {root}")
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = self._read()
        self._used = 0

    def joules(self) -> float:
        """Since the counters were made; read at least once a minute, so that no counter wraps around twice."""
        now = self._read()
        for last, value, span in zip(self._last, now, self._ranges, strict=True):
            self._used += value - last if value >= last else value - last + span
        self._last = now
        return self._used / 1e6

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


class Nvml:
    """Energy of CUDA devices since the driver was loaded (Volta and newer), through ``nvidia-ml-py``.

    Args:
        devices: that the energy is summed over.

    Raises:
        ModuleNotFoundError: ``nvidia-ml-py`` is not installed.
        Exception: NVML's own, where the driver or the device does not tell.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        uuids = [torch.cuda.get_device_properties(device).uuid for device in devices]
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        self.joules()

    def joules(self) -> float:
        """Of all the devices."""
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1e3


def counters(devices: Iterable[torch.device]) -> tuple[dict[str, Rapl | Nvml], list[str]]:
    """The counters that can be read here, ``cpu`` and ``cuda``, and why the others cannot.

    Args:
        devices: CUDA devices that are in use.
    """
    found: dict[str, Rapl | Nvml] = {}
    reasons = []
    try:
        found["cpu"] = Rapl(POWERCAP)
    except PermissionError as problem:
        reasons.append(f"cpu: {problem.filename} may be read by root alone")
    except (OSError, ValueError) as problem:
        reasons.append(f"cpu: {problem}")
    devices = list(devices)
    if not devices:
        return found, [*reasons, "cuda: not in use"]
    try:
        found["cuda"] = Nvml(devices)
    except ModuleNotFoundError:
        reasons.append("cuda: NVML is read with nvidia-ml-py, which is not installed; pip install nvidia-ml-py")
    except Exception as problem:  # NVML raises its own errors
        reasons.append(f"cuda: {problem}")
    return found, reasons


def counter_of(device: torch.device) -> Rapl | Nvml:
    """The counter of what a device uses: of all CPU packages for ``cpu``.

    Raises:
        SSPropError: nothing counts it here, or it may not be read.
    """
    found, reasons = counters([device] if device.type == "cuda" else [])
    if device.type not in found:
        why = next((reason for reason in reasons if reason.startswith(device.type)), f"{device.type}: nothing counts it")
        raise SSPropError(f"energy cannot be measured here: {why}. Next step: mend that, or measure without energy")
    return found[device.type]


__all__ = ["Nvml", "Rapl", "counter_of", "counters"]

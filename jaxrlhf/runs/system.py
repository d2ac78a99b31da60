"""Memory and processor use of this process, for trackers that do not measure it themselves."""

import os
import time
from pathlib import Path

import jax


class SystemMeter:
    """Measures memory now, and processor use since the last reading."""

    def __init__(self) -> None:
        self._last = self._times()

    def read(self) -> dict[str, float]:
        """Returns GiB of host and device memory in use, and processor use in percent of one core.

        `system/device_memory_gib` is the largest of the local devices, and is left out where it is not known.
        """
        now = self._times()
        seconds, busy = (after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        figures = {"system/cpu_percent": 100 * busy / max(seconds, 1e-9)}
        memory = _resident_bytes()
        if memory is not None:
            figures["system/memory_gib"] = memory / 2**30
        stats = [device.memory_stats() for device in jax.local_devices()]
        used = [entry["bytes_in_use"] for entry in stats if entry and "bytes_in_use" in entry]
        if used:
            figures["system/device_memory_gib"] = max(used) / 2**30
        return figures

    @staticmethod
    def _times() -> tuple[float, float]:
        """Seconds of a clock, and of processor time of this process."""
        times = os.times()
        return time.monotonic(), times.user + times.system


def available_memory() -> int:
    """Bytes of host memory that this process may still take: the machine's, within the limit of its control group."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text(encoding="ascii")))
    return max(free, 0)


def _resident_bytes() -> int | None:
    """Resident memory of this process; None where /proc does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # not Linux
        return None

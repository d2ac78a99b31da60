"""Memory and processor use of this process, for trackers that do not measure it themselves."""

import os
import time
from pathlib import Path

import jax

from jaxrlhf.config.allocator import give_back


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
    """Bytes of host memory that this process may still take: the machine's, within the limits of its control groups."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        free = 1024 * int(_entries(meminfo)["MemAvailable:"])
    return max(min([free, *map(_left_in, _control_groups())]), 0)


class MemoryRelief:
    """Gives memory that the allocator keeps from step to step (`jaxrlhf.config.allocator`) back to the system.

    That is due when the system has little left, and when a step took much more than steps before it. Steps need the
    same memory, but where a small array lies in what the last step freed, the next one gets new memory, and the old
    stays behind. Without this, a run comes to hold several times what it needs. It is also due after steps so long that
    taking the memory again does not count.
    """

    GROWTH = 1.15
    """Growth over the usual memory at which a step has left some behind."""
    SCARCE = 1 / 8
    """Memory is scarce when the system has less left than this share of what the process holds."""

    LONG_STEP = 5.0 / 2**30
    """Seconds of a long step per byte that the process holds; page faults take a tenth of it at most."""

    def __init__(self) -> None:
        self._usual: int | None = None
        self._begin = time.monotonic()

    def after_step(self) -> bool:
        """Gives unused memory back where it is due; returns True if it did."""
        held = _resident_bytes() or 0
        now = time.monotonic()
        seconds, self._begin = now - self._begin, now
        if self._usual is None:  # the first step, or the first one after memory was given back
            self._usual = held
        scarce = available_memory() < self.SCARCE * held
        long = held > 0 and seconds > self.LONG_STEP * held
        due = held > self.GROWTH * self._usual or scarce or long
        if due:
            give_back()
            self._usual = None
        return due


def _entries(file: Path) -> dict[str, str]:
    """A file of lines such as `name 12` as a dict."""
    return {line.split()[0]: line.split()[1] for line in file.read_text(encoding="ascii").splitlines()}


def _control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Folders of the control groups (version 2) of this process that limit its memory."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    paths = [root / line[3:].strip("/") for line in lines if line.startswith("0::")] or [root]
    groups = [folder for path in paths for folder in (path, *path.parents) if folder.is_relative_to(root)]
    limits = ((folder, folder / "memory.max") for folder in groups)
    return [folder for folder, limit in limits if limit.is_file() and limit.read_text().strip() != "max"]


def _left_in(group: Path) -> int:
    """Bytes that a control group may still take; pages of files that it would drop first count as free."""
    used = int((group / "memory.current").read_text(encoding="ascii"))
    used -= int(_entries(group / "memory.stat").get("inactive_file", 0))
    return int((group / "memory.max").read_text(encoding="ascii")) - used


def _resident_bytes() -> int | None:
    """Resident memory of this process; None where /proc does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # not Linux
        return None

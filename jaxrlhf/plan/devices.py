"""Accelerators by name: memory, peak rates, links and compile targets, with the source of every number.

Sources: [A] NVIDIA A100 data sheet and whitepaper (2020, 80 GB: 2021); [H] NVIDIA H100 and H200 data sheets and the
Hopper whitepaper; [P] `cudaGetDeviceProperties` of the device; [G] Google Cloud TPU system architecture pages, per
chip; [D] DGX A100 and DGX H100 system guides: one 200 or 400 Gb/s network adapter per GPU, PCIe 4 or 5 with 16 lanes;
[B] NVIDIA's published rates of HGX B200 (4.5 PFLOPS with sparsity per GPU, half of it dense; NVLink 5) and GB200 NVL72
(5 PFLOPS; four GPUs per compute tray, each with half of a Grace's NVLink-C2C); [X] OpenXLA's descriptions of B200 and
GB200, read from the devices: memory, its bandwidth, facts for the compiler; [M] AMD's published rates of MI300X (seven
Infinity Fabric links of 64 GB/s one way), and the memory that rocm-smi reports; [I] Google Cloud TPU7x page: 192 GiB,
2307 TFLOPS, 7380 GB/s and 1200 GB/s of links, both directions, per chip of two devices.
Rates are peaks for dense bfloat16; links count one direction.
"""

import dataclasses
import math
from dataclasses import dataclass

from jaxrlhf.errors import InputError
from jaxrlhf.plan.roofline import Peaks
from jaxrlhf.plan.traffic import Rates

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """An accelerator and its usual host."""

    name: str
    platform: str
    """`cuda`, `rocm`, `tpu` or `cpu`."""
    memory: int
    """Bytes of device memory that the driver reports."""
    flops: float
    """bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes/s of device memory."""
    link: float
    """Bytes/s per device to its peers: NVLink inside a host, the chip-to-chip links of a TPU slice."""
    network: float
    """Bytes/s per device between hosts; on a TPU the slice's links reach over hosts."""
    host_link: float
    """Bytes/s between the device and host memory."""
    devices_per_host: int
    usable: float
    """Share of `memory` that programs may fill; the runtime, kernels and communication buffers take the rest."""
    source: str
    pinned_host: bool = True
    """Arrays can lie in the host's `pinned_host` memory."""
    cuda: tuple[tuple[str, float], ...] = ()
    """Facts for the CUDA compiler, see `target_config`."""
    topologies: tuple[str, ...] = ()
    """TPU slices by shape."""
    per_chip: int = 1
    """Devices of a TPU chip, which shapes count."""
    compute_capability: str = ""
    """Compute capability of an NVIDIA device."""

    @property
    def device_kind(self) -> str:
        """The name under which kernels/choice.py knows it."""
        return self.name

    def peaks(self, share: float = 1.0) -> Peaks:
        """Peak rates, the arithmetic at `share` of that of bfloat16."""
        return Peaks(self.flops * share, self.bandwidth, self.host_link)

    @property
    def rates(self) -> Rates:
        """Rates that the estimate from compiled programs expects (docs/planning.md)."""
        return Rates(0.85 * self.bandwidth, 0.8 * self.flops)


# Compute capability, SMs, clock in GHz, FP32 lanes per SM, L2 bytes, shared memory per SM and per block (opt-in). [P]
_AMPERE = (("major", 8), ("cores", 108), ("clock", 1.41), ("lanes", 64), ("l2", 40 * 2**20))
_AMPERE += (("shared", 164 * 1024), ("shared_block", 163 * 1024))
_HOPPER = (("major", 9), ("cores", 132), ("clock", 1.98), ("lanes", 128), ("l2", 50 * 2**20))
_HOPPER += (("shared", 228 * 1024), ("shared_block", 227 * 1024))
_SHARED = ("shared", 228 * 1024), ("shared_block", 227 * 1024)  # [X], as the next two
_B200 = (("major", 10), ("cores", 148), ("clock", 1.965), ("lanes", 128), ("l2", 132_644_864), *_SHARED)
_GB200 = (("major", 10), ("cores", 152), ("clock", 2.062), ("lanes", 128), ("l2", 135_528_448), *_SHARED)

# A slice of a three-dimensional torus has multiples of four chips along an axis, smaller ones are blocks of a host.
_TORUS_3D = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _gpu(
    name: str,
    memory: int,
    flops: float,
    bandwidth: float,
    link: float,
    network: float,
    cuda: tuple[tuple[str, float], ...],
    source: str,
) -> Device:
    host_link = 32e9 if network < 50e9 else 64e9
    rates, capability = (flops, bandwidth, link, network, host_link), f"{dict(cuda)['major']}.0"
    return Device(name, "cuda", memory, *rates, 8, 0.92, source, cuda=cuda, compute_capability=capability)


def _tpu(
    name: str,
    gib: float,
    flops: float,
    bandwidth: float,
    link: float,
    shapes: tuple[str, ...],
    source: str = "G",
    per_chip: int = 1,
) -> Device:
    """A TPU from the numbers of a chip, in hosts of four chips."""
    memory, flops, bandwidth, link = int(gib * GIB / per_chip), flops / per_chip, bandwidth / per_chip, link / per_chip
    host_link, per_host = 16e9 / per_chip, 4 * per_chip
    rates = memory, flops, bandwidth, link, link, host_link
    return Device(name, "tpu", *rates, per_host, 0.97, source, topologies=shapes, per_chip=per_chip)


_ALL = (
    _gpu("a100-40g", 42_331_013_120, 312e12, 1555e9, 300e9, 25e9, _AMPERE, "A P D"),
    _gpu("a100-80g", 85_100_068_864, 312e12, 2039e9, 300e9, 25e9, _AMPERE, "A P D"),
    _gpu("h100", 84_942_979_072, 989.4e12, 3352e9, 450e9, 50e9, _HOPPER, "H P D"),
    _gpu("h200", 151_397_597_184, 989.4e12, 4800e9, 450e9, 50e9, _HOPPER, "H P D"),
    _gpu("b200", 191_514_411_008, 2250e12, 7672e9, 900e9, 50e9, _B200, "B X"),
    Device(
        *("gb200", "cuda", 197_897_748_480, 2500e12, 7928e9, 900e9, 50e9, 225e9, 4, 0.92, "B X"),
        cuda=_GB200,
        compute_capability="10.0",
    ),
    Device("mi300x", "rocm", 206_141_652_992, 1307.4e12, 5300e9, 448e9, 50e9, 64e9, 8, 0.92, "M"),
    _tpu("v4", 32, 275e12, 1228e9, 300e9, _TORUS_3D),
    _tpu("v5e", 16, 197e12, 819e9, 200e9, _TORUS_2D),
    _tpu("v5p", 95, 459e12, 2765e9, 600e9, _TORUS_3D),
    _tpu("v6e", 32, 918e12, 1640e9, 400e9, _TORUS_2D),
    _tpu("tpu7x", 192, 2307e12, 7380e9, 600e9, _TORUS_3D, "I", per_chip=2),
    # No two CPUs are alike: flags give the rates.
    Device("cpu", "cpu", 0, 0, 0, 10e9, 10e9, 10e9, 1, 0.9, "given by flags", pinned_host=False),
)
DEVICES = {device.name: device for device in _ALL}
OVERRIDES = {
    "device_memory_gib": ("memory", GIB),
    "device_tflops": ("flops", 1e12),
    "device_bandwidth_gbs": ("bandwidth", 1e9),
    "link_gbs": ("link", 1e9),
    "network_gbs": ("network", 1e9),
}


def find_device(name: str, overrides: dict[str, float | None]) -> Device:
    """The device of that name, with the rates in `overrides` (keys of OVERRIDES); InputError when unknown."""
    key = name.lower().replace("_", "-")
    if key not in DEVICES:
        raise InputError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")
    device = DEVICES[key]
    for flag, value in overrides.items():
        if value is not None:
            attribute, unit = OVERRIDES[flag]
            device = dataclasses.replace(device, **{attribute: type(getattr(device, attribute))(value * unit)})
    missing = [flag for flag, (attribute, _) in OVERRIDES.items() if not getattr(device, attribute)]
    if missing:
        raise InputError(f"device {name} has no rates of its own; give {', '.join('--' + flag for flag in missing)}")
    return device


def topology_of(device: Device, devices: int, asked: str | None) -> str:
    """Shape of the TPU slice, empty for other devices; InputError lists the known shapes."""
    if device.platform != "tpu":
        if asked is not None:
            raise InputError(f"topology={asked}: only TPU slices have one; {device.name} has devices_per_host")
        return ""
    sizes = {shape: chips(shape) * device.per_chip for shape in device.topologies}
    if asked is None:
        fitting = [shape for shape, size in sizes.items() if size == devices]
        if not fitting:
            known = ", ".join(f"{shape} ({size})" for shape, size in sizes.items())
            what = "chips" if device.per_chip == 1 else f"devices, {device.per_chip} per chip"
            raise InputError(f"devices={devices}: {device.name} has no slice of that many {what}; known are {known}")
        return fitting[0]
    shape = asked.lower().removeprefix(f"{device.name}:")
    if shape not in device.topologies:
        raise InputError(f"unknown topology {asked!r} of {device.name}; known are {', '.join(device.topologies)}")
    if sizes[shape] != devices:
        what = "chips" if device.per_chip == 1 else f"devices, {device.per_chip} per chip"
        raise InputError(f"topology={asked} has {sizes[shape]} {what}, but devices={devices}; make them equal")
    return shape


def chips(shape: str) -> int:
    """Number of chips in a slice of this shape."""
    return math.prod(map(int, shape.split("x")))


def target_config(device: Device) -> str:
    """Description of a CUDA device that its compiler takes in place of the device, as a text protocol buffer."""
    facts = dict(device.cuda)
    feature = "NONE" if facts["major"] < 9 else "ACCELERATED_FEATURES"
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {facts["major"]} feature_extension: {feature} }}
  core_count: {facts["cores"]} fpus_per_core: {facts["lanes"]} clock_rate_ghz: {facts["clock"]}
  device_memory_size: {device.memory} memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {facts["l2"]}
  shared_memory_per_core: {facts["shared"]} shared_memory_per_block_optin: {facts["shared_block"]}
  shared_memory_per_block: {48 * 1024}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" driver_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device.name}"
"""

"""Devices that are not here, by name, for compiling; and what the makers say of them."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from memdlm_jax.training import speed

TOPOLOGY = re.compile(r"(v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)|(h100|cpu):([1-9]\d*)")
GPUS_PER_HOST = 8
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
        peak_flops: dense bfloat16 FLOPs a second.
        memory: bytes.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second that it can send to its neighbours over all its links.
        host_bandwidth: bytes a second that it can send to devices of other hosts; ``None`` where
            these are neighbours like all others.
    """

    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float | None = None


def _chip(kind: str, memory: float, bandwidth: float, link: float, host: float | None = None):
    peak = speed.peak_flops(kind)
    if peak is None:
        raise ValueError(f"training.speed.PEAK_FLOPS has no device kind {kind!r}")
    return Chip(peak, memory * 2**30, bandwidth * GB, link * GB, host and host * GB)


CHIPS = {
    # Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e": memory in GiB (a little less is free
    # for programs), GB/s, and half of the inter-chip bandwidth that they give for both directions
    # together (400, 1200, 800 GB/s).
    "v5e": _chip("TPU v5 lite", 16, 819, 200),
    "v5p": _chip("TPU v5", 95, 2765, 600),
    "v6e": _chip("TPU v6 lite", 32, 1638, 400),
    # NVIDIA's data sheets of the H100 SXM (NVLink 900 GB/s in both directions) and of the DGX H100
    # (one 400 Gb/s adapter per GPU); its 80 GB are 79 GiB, as the driver counts them.
    "h100": _chip("NVIDIA H100", 79, 3350, 450, 50),
}

# What XLA is told of an H100 SXM that it cannot ask: NVIDIA's published numbers.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# libtpu asks the cloud's metadata server which machine this is, unless it is told.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are joined.

    Attributes:
        name: ``v5e:16x16``, ``v5p:4x4x8``, ``v6e:16x16`` (chips along each side of the torus);
            ``h100:32`` (hosts of 8); ``cpu:8``, the simulated devices of this process.
    """

    name: str

    def __post_init__(self):
        if not TOPOLOGY.fullmatch(self.name):
            raise ValueError(
                f"topology={self.name!r} must be a kind and a shape, such as v5e:16x16, v5p:4x4x8, "
                "v6e:8x8, h100:32 or cpu:8"
            )
        if self.kind == "v5p" and self.shape.count("x") != 2:
            raise ValueError(f"topology={self.name!r} must have three sides, such as v5p:4x4x8")
        if self.kind in ("v5e", "v6e") and self.shape.count("x") != 1:
            raise ValueError(f"topology={self.name!r} must have two sides, such as v5e:16x16")
        if self.kind == "h100" and self.size > GPUS_PER_HOST and self.size % GPUS_PER_HOST:
            raise ValueError(f"topology={self.name!r} must be hosts of {GPUS_PER_HOST}")

    @property
    def kind(self) -> str:
        """Of the devices."""
        return self.name.partition(":")[0]

    @property
    def shape(self) -> str:
        """Behind the colon."""
        return self.name.partition(":")[2]

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(int(side) for side in self.shape.split("x"))

    @property
    def chip(self) -> Chip | None:
        """What the makers say of a device; ``None`` for simulated ones."""
        return CHIPS.get(self.kind)

    @property
    def devices_per_host(self) -> int:
        """Where hosts are joined by another network than their devices; 0 where not."""
        return GPUS_PER_HOST if self.kind == "h100" else 0

    def devices(self) -> Sequence[Any]:
        """Devices to build a mesh of, and compile for.

        Raises:
            ImportError: the compiler for them is not installed.
            ValueError: this process has too few simulated devices.
        """
        if self.kind == "cpu":
            return self._simulated()
        if self.kind == "h100":
            _require("jax_cuda12_plugin", self.name)
            hosts = max(self.size // GPUS_PER_HOST, 1)
            shape = f"1x{hosts}x{self.size // hosts}"
            found = topologies.get_topology_desc(
                "h100", "cuda", target_config=_H100, topology=shape
            )
            return found.devices
        _require("libtpu", self.name)
        # Importing JAX may have put guesses there already.
        os.environ |= _TPU_ENVIRONMENT
        one = {"chips_per_host_bounds": (1, 1, 1)} if self.size == 1 else {}
        return topologies.get_topology_desc(self.name, "tpu", **one).devices

    def _simulated(self) -> Sequence[Any]:
        devices = jax.devices("cpu")
        if len(devices) < self.size:
            raise ValueError(
                f"topology={self.name!r}: this process has {len(devices)} simulated devices; start "
                f"it with XLA_FLAGS=--xla_force_host_platform_device_count={self.size}"
            )
        return devices[: self.size]


def _require(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"topology={name!r} needs the package {package}: `make pods` installs it in "
            ".venv-pods, or pip install -e '.[pods]'"
        )

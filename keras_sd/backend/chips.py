"""What makers publish of their chips: peak operations and memory traffic per second."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A chip, which is one device of JAX.

    Attributes:
        title: its common name.
        operations: the peak per second of dense matrix multiplications in bfloat16.
        bytes_per_second: the peak traffic to its memory.
        memory: bytes that the compiler lets a program have; None where the device itself tells.
        source: where the figures stand.
    """

    title: str
    operations: float
    bytes_per_second: float
    memory: int | None
    source: str


_CLOUD, _NVIDIA = "https://cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us/data-center"
_GIB = 2**30

TPUS = {
    "v5e": Chip("TPU v5e", 197e12, 819e9, int(15.75 * _GIB), f"{_CLOUD}/v5e"),
    "v5p": Chip("TPU v5p", 459e12, 2765e9, int(95.74 * _GIB), f"{_CLOUD}/v5p"),
    "v6e": Chip("TPU v6e", 918e12, 1640e9, int(31.25 * _GIB), f"{_CLOUD}/v6e"),
}
"""By the name that topologies begin with. The older v4, v3 and v2 are two devices of JAX, or one."""

# Beginnings of JAX's `device_kind`; the first that fits counts. GPUs: without sparsity.
_KINDS = {
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6": TPUS["v6e"],
    "NVIDIA H200": Chip("NVIDIA H200 SXM", 989e12, 4800e9, None, f"{_NVIDIA}/h200/"),
    "NVIDIA H100 80GB HBM3": Chip("NVIDIA H100 SXM", 989e12, 3350e9, None, f"{_NVIDIA}/h100/"),
    "NVIDIA A100-SXM4-80GB": Chip("NVIDIA A100 80 GB SXM", 312e12, 2039e9, None, f"{_NVIDIA}/a100/"),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a `device_kind` of JAX; None for one that is not known here."""
    return next((chip for start, chip in _KINDS.items() if device_kind.startswith(start)), None)

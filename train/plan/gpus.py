"""What a GPU has, by its data sheet: memory, 16-bit arithmetic, memory bandwidth. And what this machine has.

Rates are dense (no structured sparsity), tensor cores, 16-bit inputs with float32 accumulation; bfloat16, and
float16 where the GPU has no bfloat16. Sources, NVIDIA: T4 data sheet (2019), V100 data sheet (2020), A10G
data sheet (2021), A100 data sheet (2021), GA102 whitepaper (2021, RTX 3090), Ada whitepaper (2022, RTX
4090), L4 and L40S data sheets (2023), H100 data sheet (2023), H200 data sheet (2024), DGX B200 data sheet
(2024, one of eight). Memory is counted as so many times 10^9 bytes; a driver shows a little more or less of
it.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

import torch

from posttrain.errors import UserError
from train.ppo.throughput import matmul_throughput

THIS = "this"
"""The name of the machine that the command runs on."""


@dataclass(frozen=True)
class Gpu:
    """One device. memory: bytes; flops: per second, in `format`; bandwidth: bytes per second, None where
    unknown; cuda: whether it is a GPU; measured: whether `flops` is this machine's own, not a data sheet's.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float | None
    format: str = "bfloat16"
    cuda: bool = True
    measured: bool = False


def _gpu(name: str, gigabytes: float, teraflops: float, bandwidth: float, format: str = "bfloat16") -> Gpu:
    return Gpu(name, gigabytes * 1e9, teraflops * 1e12, bandwidth * 1e9, format)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 65, 300, "float16"),
        _gpu("V100-16GB", 16, 125, 900, "float16"),
        _gpu("V100-32GB", 32, 125, 900, "float16"),
        _gpu("RTX3090", 24, 71, 936),
        _gpu("RTX4090", 24, 165.2, 1008),
        _gpu("A10G", 24, 70, 600),
        _gpu("L4", 24, 121, 300),
        _gpu("L40S", 48, 362, 864),
        _gpu("A100-40GB", 40, 312, 1555),
        _gpu("A100-80GB", 80, 312, 2039),
        _gpu("H100-PCIe", 80, 756, 2000),
        _gpu("H100-SXM", 80, 989.4, 3350),
        _gpu("H200", 141, 989.4, 4800),
        _gpu("B200", 180, 2250, 8000),
    )
}
"""By name, from the smallest to the largest."""
ALIASES = {"H100": "H100-SXM", "A100": "A100-80GB", "V100": "V100-32GB", "A10": "A10G"}


def find_gpu(name: str, dtype: torch.dtype = torch.float32) -> Gpu:
    """The device called `name`, case and punctuation apart; "this" is the machine it runs on, whose rate in
    `dtype` is measured. Raises UserError naming the nearest one.
    """
    if _plain(name) in (_plain(THIS), "cpu"):
        return this_machine(dtype)
    names = {_plain(known): known for known in GPUS} | {_plain(a): known for a, known in ALIASES.items()}
    if _plain(name) in names:
        return GPUS[names[_plain(name)]]
    near = difflib.get_close_matches(_plain(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {names[near[0]]}? " if near else ""
    raise UserError(f"--gpu {name}: is not in the table\n    {hint}known are {', '.join(GPUS)} and {THIS}")


def this_machine(dtype: torch.dtype) -> Gpu:
    """The GPU of this process, or its CPU. Measures a matrix product, in less than half a second."""
    if torch.cuda.is_available():
        flops = matmul_throughput(torch.device("cuda"), dtype)
        memory = torch.cuda.get_device_properties(0).total_memory
        return Gpu(torch.cuda.get_device_name(), memory, flops, None, _name(dtype), measured=True)
    flops = matmul_throughput(torch.device("cpu"), dtype)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("this machine's CPU", memory, flops, None, _name(dtype), cuda=False, measured=True)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

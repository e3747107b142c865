"""The machine as the rest of the program sees it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from chatlearn import device


def test_cpu_is_always_there() -> None:
    assert device.backend_of("cpu") == "gloo"
    assert device.compute_dtype("cpu") == "float32"
    assert device.rank_device("cpu") == torch.device("cpu")
    assert device.peak_flops("cpu") is None


def test_cuda_means_nccl_and_half_precision() -> None:
    assert device.backend_of("cuda") == "nccl"
    assert device.compute_dtype("cuda") == "bfloat16"


def test_the_peak_on_the_host_is_in_billions_of_bytes() -> None:
    block = torch.ones(64 * 2**20, dtype=torch.float32)
    all_there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert block.nbytes <= device.peak_memory_gb("cpu") * 1e9 <= all_there_is


def test_threads_are_bounded() -> None:
    before = torch.get_num_threads()
    device.set_num_threads(1)
    assert torch.get_num_threads() == 1
    device.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200", 989e12),
        ("Some Other Card", None),
    ],
)
def test_peak_is_known_or_none(name: str, flops: float | None) -> None:
    assert device.flops_of(name) == flops


def test_workers_sleep_while_they_wait_and_stay_offline() -> None:
    environment = device.worker_environment("cpu", num_threads=3, expandable_segments=True)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["KMP_BLOCKTIME"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert "PYTORCH_CUDA_ALLOC_CONF" in device.worker_environment("cuda", 1, expandable_segments=True)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in device.worker_environment("cuda", 1)


def test_importing_the_module_does_not_load_torch() -> None:
    code = "import sys, chatlearn.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

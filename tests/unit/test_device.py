"""The machine as the rest of the program sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatlearn import device


def test_cpu_is_always_there() -> None:
    assert device.backend_of("cpu") == "gloo"
    assert device.compute_dtype("cpu") == "float32"
    assert device.rank_device("cpu") == torch.device("cpu")
    assert device.peak_flops("cpu") is None


def test_cuda_means_nccl_and_half_precision() -> None:
    assert device.compute_dtype("cuda") == "bfloat16"
    assert dict(pair.split(":") for pair in device.backend_of("cuda").split(",")) == {"cpu": "gloo", "cuda": "nccl"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_process_group_tells_what_it_connects(kind: device.DeviceKind) -> None:
    assert device.kind_of(device.backend_of(kind)) == kind


def test_the_peak_on_the_host_is_in_billions_of_bytes() -> None:
    block = torch.ones(64 * 2**20, dtype=torch.float32)
    all_there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert block.nbytes <= device.peak_memory_gb("cpu") * 1e9 <= all_there_is


def test_without_an_accelerator_copies_are_plain_copies() -> None:
    values = torch.arange(6.0).view(2, 3)
    home = device.pinned_like(values)
    with device.side_by_side_copies("cpu"):
        home.copy_(values, non_blocking=True)
    assert torch.equal(home, values)
    assert not home.is_pinned()
    assert home.data_ptr() != values.data_ptr()


def test_a_container_may_leave_less_than_the_machine_has(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    group.mkdir()
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 2000000\ninactive_file 1000000\n")
    for limit, available in (("max", 5_120_000), ("4000000", 2_000_000), ("99000000", 5_120_000), ("1000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert device.available_host_bytes(meminfo, group) == available
    assert device.available_host_bytes(meminfo, tmp_path) == 5_120_000
    assert 0 < device.available_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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

"""SGLang's HiCache without a GPU: copies between its pools in plain PyTorch.

Imported in the scheduler's process by the child. HiCache copies by CUDA kernels alone; what they do
is simple, and everything else of it (tree, controller, threads, storage) is its own.
"""

from __future__ import annotations

from typing import Any


def load(self: Any, device_pool: Any, host: Any, device: Any, layer: int, backend: str) -> None:
    """For `load_to_device_per_layer`, layout page_first."""
    for target, source in (
        (device_pool.k_buffer, self.kv_buffer[0]),
        (device_pool.v_buffer, self.kv_buffer[1]),
    ):
        target[layer][device] = source[host, layer]


def back_up(self: Any, device_pool: Any, host: Any, device: Any, backend: str) -> None:
    """For `backup_from_device_all_layer`, layout page_first."""
    for layer in range(self.layer_num):
        self.kv_buffer[0][host, layer] = device_pool.k_buffer[layer][device]
        self.kv_buffer[1][host, layer] = device_pool.v_buffer[layer][device]


def install() -> None:
    from sglang.srt.mem_cache.pool_host import common, mha

    common._cuda_host_register = lambda *given: None
    mha.MHATokenToKVPoolHost.load_to_device_per_layer = load
    mha.MHATokenToKVPoolHost.backup_from_device_all_layer = back_up

"""What a device's memory can still take, and the error that says it cannot."""

from __future__ import annotations

import psutil
import torch


def is_full(error: BaseException) -> bool:
    """Is it the device's memory that has no room? torch has no type of its own for the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)

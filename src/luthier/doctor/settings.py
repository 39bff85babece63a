"""Settings of the environment that bite: said where they are set, with what takes them back."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from luthier.doctor.driver import find_driver
from luthier.doctor.finding import Finding, short
from luthier.doctor.reach import ADDRESS, MIRROR, masked

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_VALUE = r"\w+:(\[[^\]]*\]|[^,:\[\]]+)"


def settings(asked: bool = False) -> Iterator[Finding]:
    """Those of the hub, of CUDA and of the terminal. `asked`: whether HF_ENDPOINT answers, reach.py finds out."""
    for name in (*OFFLINE, "HF_DATASETS_OFFLINE"):
        if is_on(name):
            found = f"{name}={os.environ[name]}: nothing is fetched, caches and folders serve"
            yield Finding("!", "offline", found, f"unset {name}")
    yield from _hub(asked)
    yield from _cuda()
    encoding = sys.stdout.encoding or "unknown"
    if encoding.lower().replace("-", "") != "utf8":
        found = f"text for the screen is {encoding}: Chinese and marks become ?"
        yield Finding("!", "encoding", found, "export LC_ALL=C.UTF-8")


def _hub(asked: bool) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_TOKEN_PATH

    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is not None:
        if re.fullmatch(ADDRESS, endpoint):
            if not asked:
                yield Finding("✓", "HF_ENDPOINT", f"{masked(endpoint)}; not asked")
        else:
            found = f"{masked(endpoint)!r} is no address (https://…)"
            yield Finding("!", "HF_ENDPOINT", found, f"export HF_ENDPOINT={MIRROR}  (or: unset HF_ENDPOINT)")
    names = [name for name in os.environ if re.fullmatch(r"(https?|all|no)_proxy", name, re.IGNORECASE)]
    named = [f"{name}={masked(os.environ[name])}" for name in sorted(names) if os.environ[name]]
    if named:
        yield Finding("✓", "proxies", ", ".join(named))
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        told = "from the environment (it is never shown)"
    elif Path(HF_TOKEN_PATH).is_file():
        told = f"from an earlier login ({short(Path(HF_TOKEN_PATH))})"
    else:
        told = "none; gated and private models want one: export HF_TOKEN=…"
    yield Finding("✓", "hub's token", told)


def _cuda() -> Iterator[Finding]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and find_driver().there:
        if visible.strip() in ("", "-1"):
            found = f"CUDA_VISIBLE_DEVICES={visible} hides every GPU"
            yield Finding("!", "visible GPUs", found, "unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("✓", "visible GPUs", f"CUDA_VISIBLE_DEVICES={visible}")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = os.environ.get(name)
        if value and not re.fullmatch(f"{_VALUE}(,{_VALUE})*", value):
            found = f"{name}={value}: not of the form key:value,key:value"
            yield Finding("!", "allocator", found, f"export {name}=expandable_segments:True")


def is_on(name: str) -> bool:
    """Is a switch of the hub's library set? It counts these words."""
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")

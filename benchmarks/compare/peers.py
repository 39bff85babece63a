"""The peers' own virtual environments, below build/peers: made once, by pip, with pinned versions.

Each peer asks for other versions of the same libraries. The lists leave out what a text model on a CPU never imports,
and what cannot be installed beside a CPU build of torch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"
TORCH = "torch==2.13.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
COMMON = ["numpy", "sentencepiece", "protobuf", "psutil", "pydantic", "pyyaml", "rich"]


@dataclass(frozen=True)
class Peer:
    """packages: with all that they need. alone: without, as what they ask for cannot be had (the reason is `why`).

    stubs: packages that are imported whatever is trained, and empty here.
    """

    name: str
    packages: Sequence[str]
    alone: Sequence[str] = ()
    stubs: Sequence[str] = ()
    why: str = ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("trl", ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"]),
        Peer(
            "llamafactory",
            [
                *("transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0", "datasets==4.0.0"),
                *("huggingface_hub==1.33.0", "av==16.0.0", "torchdata==0.11.0", "tyro<0.9", "einops", "fire"),
                *("omegaconf", "tiktoken", "pandas", "scipy", "matplotlib", "modelscope", "hf-transfer"),
                *("fastapi", "uvicorn", "sse-starlette", *COMMON),
            ],
            alone=["llamafactory==0.9.5"],
            stubs=["torchaudio"],
            why="asks for torchaudio and torchvision, which are not built for every torch, and for gradio",
        ),
        Peer(
            "unsloth",
            [
                *("transformers==5.17.0", "peft==0.21.2", "trl==1.15.0", "accelerate==1.15.0", "datasets==4.8.4"),
                *("torchao==0.18.0", "bitsandbytes==0.50.2", "triton", "hf_transfer", "tyro", "packaging", "wheel"),
                *("tqdm", "nest-asyncio", "typer", "regex", "msgspec", "cut_cross_entropy", "pillow", "einops"),
                *("json5", "structlog", *COMMON),
            ],
            alone=["unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "diffusers", "xformers==0.0.35"],
            why="asks for torchvision, and for a certifi newer than some indexes have",
        ),
    )
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return FOLDER / name / "bin" / "python"


def ready(name: str, say: Callable[[str], None]) -> str | None:
    """Make a peer's environment where it is not there yet; gives back why it cannot be had, or None."""
    peer, folder = PEERS[name], FOLDER / name
    stamp, wanted = folder / "bench.stamp", repr(PEERS[name])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    say(f"{name}: its own environment in {folder.relative_to(ROOT)} (a minute or two, 1 to 3 GB) …")
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for command in _commands(peer):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return f"not installed: {(errors or done.stderr.splitlines() or ['pip failed'])[-1][:160]}"
    for stub in peer.stubs:
        place = next((folder / "lib").glob("python3*")) / "site-packages" / stub
        place.mkdir(exist_ok=True)
        (place / "__init__.py").write_text("", encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    say(f"{name}: installed in {time.monotonic() - began:.0f} s")
    return None


def _commands(peer: Peer) -> Iterator[list[str]]:
    """What makes its environment, in order; each is asked for when the one before it is done."""
    yield [sys.executable, "-m", "venv", "--clear", str(FOLDER / peer.name)]
    pip = [str(python_of(peer.name)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    yield [*pip, "--no-deps", *_torch_from(pip)]
    yield [*pip, TORCH, *peer.packages]
    if peer.alone:
        yield [*pip, "--no-deps", *peer.alone]


def _torch_from(pip: Sequence[str]) -> list[str]:
    """The CPU build of torch, from where it is: plain pip's own index may have one, else PyTorch's."""
    plain = subprocess.run([*pip, "--dry-run", "--no-deps", "--report", "-", TORCH], capture_output=True, text=True)
    if plain.returncode == 0 and "+cpu" in plain.stdout:
        return [TORCH]
    return ["--index-url", CPU_WHEELS, TORCH]

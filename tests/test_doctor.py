"""What doctor says of this machine, and of others: broken packages, drivers and networks that are really there."""

from __future__ import annotations

import http.server
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from luthier.doctor import driver, examine, libraries, machine, probe, reach, settings
from luthier.doctor.driver import NEWER_DRIVER, REBOOT, Driver, find_driver
from luthier.doctor.finding import Finding, brief, reason
from luthier.doctor.reach import HUB, MIRROR, MODELSCOPE, Answer
from luthier.doctor.trial import tried

REPOSITORY = Path(__file__).parent.parent
SMI = """#!/bin/sh
case "$1" in
--query-gpu*) printf 'NVIDIA GeForce RTX 4090, 8.9\\nNVIDIA TITAN V, 7.0\\n' ;;
*) echo '| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |' ;;
esac
"""


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without what it knows of this machine's driver, and without this machine's settings."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_ENDPOINT", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)
    find_driver.cache_clear()
    yield
    find_driver.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages go before those that are installed, here and in every process that is started."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    return folder


def package(folder: Path, name: str, code: str) -> None:
    place = folder.joinpath(*name.split("."))
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(code, encoding="utf-8")


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (about / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    (folder / name).write_text(script, encoding="utf-8")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# ---- the whole


def test_a_run_can_start_here(tmp_path: Path) -> None:
    """The real thing in a process of its own: every stage, this machine's libraries, secrets in the environment."""
    code = (
        "import sys; from pathlib import Path; from luthier.doctor.examine import report;"
        "sys.exit(report(Path.cwd(), online=False, as_json=True))"
    )
    secrets = {"HF_TOKEN": "hf_never_shown", "HTTPS_PROXY": "http://me:never_shown@127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | secrets, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines.pop() == {"mark": "ok", "what": "verdict", "found": "a run can start here", "fix": ""}
    assert {line["mark"] for line in lines} <= {"ok", "warn"}
    assert [line for line in lines if line["mark"] == "warn" and not line["fix"]] == []
    needed = [line for line in metadata.requires("luthier") or [] if "extra ==" not in line]
    found = {line["what"]: line["found"] for line in lines}
    assert found["versions"].startswith(f"all {len(needed)} libraries within their bounds")
    assert found["transformers"].startswith("with peft: the embedded model takes a LoRA step on c")
    assert found["hub's token"] == "from the environment (it is never shown)"
    assert found["proxies"] == "HTTPS_PROXY=http://***@127.0.0.1:9"
    assert {"Python", "extras", "processor", "memory", "disk", "may write", "torch", "libraries"} <= set(found)
    assert "bitsandbytes" in found and "sentencepiece" in found and "hubs" not in found
    assert "never_shown" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    long = "pip uninstall -y torch && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
    given = [
        Finding("✓", "Python", "3.11"),
        Finding("!", "torch", "一个 " * 30 + "\x1b[2J", long),
        Finding("✗", "peft", "[bold]none[/]", "pip install peft"),
    ]
    assert examine._on_screen(iter(given)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✓ Python          3.11"
    assert lines[1:4] == [
        "! torch           " + "一个 " * 11 + "一个",
        " " * 18 + "一个 " * 11 + "一个",
        " " * 18 + "一个 " * 6 + "␛[2J",
    ]
    assert lines[4:] == [
        f"    fix: {long}",
        "✗ peft            [bold]none[/]",
        "    fix: pip install peft",
        "1 thing keeps a run from starting: fix the ✗ line",
    ]
    assert examine._on_screen(iter([given[2], given[2]])) == 2
    assert capsys.readouterr().out.endswith("2 things keep a run from starting: fix the ✗ lines from the top\n")
    assert examine._on_screen(iter(given[:2])) == 0
    assert capsys.readouterr().out.endswith("\na run can start here\n")


def test_json_has_words_for_marks_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    given = [Finding("✓", "Python", "3.11"), Finding("!", "torch", "慢", "pip"), Finding("✗", "peft", "none", "pip")]
    assert examine._as_json(iter(given)) == 1
    assert capsys.readouterr().out.splitlines() == [
        '{"mark": "ok", "what": "Python", "found": "3.11", "fix": ""}',
        '{"mark": "warn", "what": "torch", "found": "慢", "fix": "pip"}',
        '{"mark": "fail", "what": "peft", "found": "none", "fix": "pip"}',
        '{"mark": "fail", "what": "verdict", "found": "1 thing keeps a run from starting", "fix": ""}',
    ]


@pytest.mark.parametrize("show", ["_on_screen", "_as_json"])
def test_a_line_is_there_when_it_is_found_also_in_a_pipe(show: str) -> None:
    code = (
        "import sys; from luthier.doctor import examine; from luthier.doctor.finding import Finding\n"
        "def findings():\n    yield Finding('✓', 'Python', '3.11')\n    sys.stdin.read()\n"
        f"examine.{show}(findings())"
    )
    pipe = subprocess.PIPE
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=buffered) as process:
        assert process.stdout is not None and process.stdin is not None
        came, _, _ = select.select([process.stdout], [], [], 60)
        said = process.stdout.readline() if came else "nothing"
        process.stdin.close()
        assert "3.11" in said
        assert "a run can start here" in process.stdout.read()


def test_an_error_is_its_first_line_or_sentence_and_no_half_word() -> None:
    assert brief("\n  no kernel image. Found none.\nmore\n") == "no kernel image. Found none."
    first = "Detected incompatible versions: gencode 7.36.0 runtime 6.33.6, older than the one that is linked."
    assert brief(f"{first} See Protobuf's guarantees at https://protobuf.dev/support/cross-version-runtime.") == first
    assert brief("word " * 60) == "word " * 32 + "…"
    assert reason(ValueError("")) == "ValueError"


def test_a_screen_without_marks() -> None:
    code = (
        "import sys; from luthier.doctor import examine; from luthier.doctor.finding import Finding;"
        "examine._on_screen(iter([Finding('✓', 'Python', '3.11'), Finding('✗', 'torch', 'none', 'pip')]))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii:replace", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "+ Python          3.11",
        "x torch           none",
        "    fix: pip",
        "1 thing keeps a run from starting: fix the x line",
    ]


def test_a_terminal_keeps_its_encoding() -> None:
    code = "from luthier.doctor import examine, settings; examine._on_screen(settings.settings())"
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], env=environment, stdout=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "✓" in shown and "hub's token" in shown and "encoding" not in shown


# ---- what is installed


def test_versions_against_the_bounds(packages: Path) -> None:
    extras = ['wandb<1,>=0.19; extra == "track"', 'nowhere-board>=2.18; extra == "track"', 'ruff>=9; extra == "dev"']
    needs = ["transformers<6,>=5.17", "peft>=0.21,<1", "tokenizers>=0.22,<1", "nowhere-at-all>=1,<2"]
    distribution(packages, "luthier", "9", *needs, *extras)
    distribution(packages, "transformers", "4.57.1")
    distribution(packages, "peft", "0.21.9")
    distribution(packages, "tokenizers", libraries.TESTED["tokenizers"] + "+local")
    distribution(packages, "wandb", "0.12")
    distribution(packages, "pynvml", "11.5.0")
    pynvml = "11.5.0: torch warns of it; nvidia-ml-py has taken its place"
    assert list(libraries.libraries()) == [
        ("✗", "transformers", "4.57.1; needed: >=5.17,<6", "pip install 'transformers>=5.17,<6'"),
        ("✗", "nowhere-at-all", "not installed; needed: >=1,<2", "pip install 'nowhere-at-all>=1,<2'"),
        ("✓", "versions", "2 of 4 libraries within their bounds; other than tested: peft 0.21.9 (0.21.2)", ""),
        ("!", "wandb", "0.12; track needs >=0.19,<1", "pip install 'wandb>=0.19,<1'"),
        ("✓", "extras", "track (wandb; not nowhere-board)", ""),
        ("!", "pynvml", pynvml, "pip uninstall -y pynvml && pip install nvidia-ml-py"),
    ]


def test_a_torch_outside_the_bounds_comes_back_as_the_build_for_this_machine(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(packages, "luthier", "9", "torch<3,>=2.11")
    distribution(packages, "torch", "2.5.1+cu124")
    command(tmp_path, monkeypatch, "nvidia-smi", SMI.replace(r"\nNVIDIA TITAN V, 7.0", ""))
    (finding, *_) = libraries.libraries()
    assert finding == (
        "✗",
        "torch",
        "2.5.1+cu124; needed: >=2.11,<3",
        "pip uninstall -y torch && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130",
    )


def test_bounds_mean_what_pip_means() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras if extra != "dev" for line in extras[extra])]
    versions = ["0.1.2", "0.5", "1", "1.0.0", "2.11", "2.11.0", "2.10.9", "2.13.0+cpu", "3.0", "5.17.0", "6.0.0", "30"]
    for line in lines:
        specifier = Requirement(line).specifier
        name, bounds = libraries._parted(line)
        assert name == Requirement(line).name and set(bounds.split(",")) == set(str(specifier).split(","))
        wrong = [one for one in versions if libraries.within(one, bounds) != (one in specifier)]
        assert wrong == [], line
    assert libraries.within("2.13.0.dev20260401", ">=2.11,<3") and not libraries.within("3.0.0rc1", ">=2.11,<3")


def test_what_is_called_tested_is_what_the_tests_ran_on() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [Requirement(line).name for line in project["dependencies"]]
    assert {name: pins[name] for name in names} == libraries.TESTED


# ---- what is tried in processes of its own: broken packages, really imported


def test_a_library_that_crashes_or_hangs_is_a_line(packages: Path) -> None:
    package(packages, "torchvision", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    package(packages, "xformers", "import os; os.write(2, b'OMP: Error #15: initialised twice\\n'); os.abort()")
    package(packages, "torchao", "print('a banner'); raise ImportError('undefined symbol: _ZN2at')")
    package(packages, "apex", "import time; time.sleep(60)")
    without = "(Luthier can do without)"
    *crashes, last = tried(["torchvision", "xformers", "torchao", "sentencepiece"])
    assert crashes == [
        ("✗", "torchvision", "ends with SIGSEGV", f"pip uninstall -y torchvision  {without}"),
        ("✗", "xformers", "ends with SIGABRT: OMP: Error #15: initialised twice",
         f"pip uninstall -y xformers  {without}"),
        ("!", "torchao", "None does not import: ImportError: undefined symbol: _ZN2at",
         "pip uninstall -y torchao  (Luthier does not need it)"),
    ]  # fmt: skip
    assert last.what == "sentencepiece" and last.mark != "✗"  # ! where another package holds protobuf back
    began = time.monotonic()
    assert list(tried(["apex"], patience=1.5)) == [
        ("✗", "apex", "does not come back (waited 1.5 s)", f"pip uninstall -y apex  {without}")
    ]
    assert time.monotonic() - began < 20


def test_without_torch_the_rest_is_tried(packages: Path) -> None:
    package(packages, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    torch, rest = tried(["torch", "device", "sentencepiece", "bitsandbytes", "models"])
    assert torch.mark == "✗" and torch.found == "OSError: libcudart.so.13: cannot open shared object file"
    assert torch.fix.startswith("pip uninstall -y torch && pip install torch==2.13.0 --index-url https://")
    assert rest.what == "sentencepiece" and rest.mark != "✗"


def test_the_trial_ends_when_nobody_reads_on(packages: Path) -> None:
    package(packages, "apex", f"import os, time; print(os.getpid(), file=open({str(packages / 'pid')!r}, 'w'))")
    package(packages, "xformers", "raise ImportError('no')")
    package(packages, "deepspeed", "import time; time.sleep(60)")
    findings = tried(["apex", "xformers", "deepspeed"])
    assert next(findings).what == "xformers"
    findings.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int((packages / "pid").read_text()), signal.SIG_DFL)


def test_bitsandbytes_that_does_not_import(packages: Path) -> None:
    package(packages, "bitsandbytes", "raise RuntimeError('compiled without GPU support\\nmore')")
    (finding,) = tried(["bitsandbytes"])
    assert finding[:2] == ("!", "bitsandbytes")
    assert finding.found.endswith("model.quantize will not work: RuntimeError: compiled without GPU support")
    assert finding.fix == "pip install --force-reinstall --no-deps bitsandbytes  (or: pip uninstall bitsandbytes)"


def test_a_library_that_stumbles_over_an_add_on_is_right(packages: Path) -> None:
    package(packages, "xformers", "raise ImportError('undefined symbol')")
    try:
        try:
            import xformers  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error
    except ImportError as error:
        finding = probe._broken("peft", error)
    assert finding.found.endswith("does not work: ImportError: undefined symbol")
    assert finding.fix == "pip uninstall -y xformers  (Luthier can do without)"


def test_an_older_protobuf(packages: Path) -> None:
    package(packages, "google", "")
    message = "Detected incompatible Protobuf Gencode/Runtime versions: gencode 7.36.0 runtime 6.33.6."
    package(packages, "google.protobuf", f"raise ImportError({message!r})")
    distribution(packages, "protobuf", "6.33.6")
    (finding,) = tried(["sentencepiece"])
    assert finding.mark == "!" and finding.found.startswith("protobuf 6.33.6 does not fit its code;")
    assert finding.fix == "pip install 'protobuf>=7.36.0'"


# ---- the driver and the GPU


def test_the_driver_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, monkeypatch, "nvidia-smi", SMI)
    found = find_driver()
    assert found == Driver("580.95.05", (13, 0), ("NVIDIA GeForce RTX 4090", "NVIDIA TITAN V"), (7, 0))
    assert found.named() == "NVIDIA GeForce RTX 4090 and 1 more (driver 580.95.05)"
    says = "Failed to initialize NVML: Driver/library version mismatch"
    command(tmp_path, monkeypatch, "nvidia-smi", f"#!/bin/sh\necho '{says}'; exit 18\n")
    find_driver.cache_clear()
    assert find_driver().problem == says and not find_driver().there
    assert find_driver().unfit("13.0", False) == (
        f"the NVIDIA driver does not answer ({says}), runs go to the CPU",
        REBOOT,
    )
    command(tmp_path, monkeypatch, "nvidia-smi", "#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(driver, "PATIENCE", 0.3)
    find_driver.cache_clear()
    assert find_driver().problem == "nvidia-smi is silent for 0.3 s"


def test_the_driver_by_nvml(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = """
        class NVMLError(Exception): pass
        class NVMLError_LibraryNotFound(NVMLError): pass
        def nvmlInit(): pass
        def nvmlSystemGetCudaDriverVersion(): return 12080
        def nvmlSystemGetDriverVersion(): return b"570.86"
        def nvmlDeviceGetCount(): return 1
        def nvmlDeviceGetHandleByIndex(index): return index
        def nvmlDeviceGetCudaComputeCapability(handle): return (9, 0)
        def nvmlDeviceGetName(handle): return "NVIDIA H100"
    """
    lines = "\n".join(line[8:] for line in nvml.splitlines())
    package(packages, "pynvml", lines)
    monkeypatch.setenv("PATH", str(packages))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert find_driver() == Driver("570.86", (12, 8), ("NVIDIA H100",), (9, 0))
    monkeypatch.delitem(sys.modules, "pynvml")


def test_which_torch_fits_which_driver() -> None:
    def wheels(cuda: tuple[int, int], oldest: tuple[int, int]) -> str | None:
        return Driver("1", cuda, (), oldest).wheels()

    assert wheels((13, 0), (8, 9)) == wheels((13, 1), (12, 0)) == wheels((13, 0), (7, 5)) == "cu130"
    assert wheels((12, 4), (9, 0)) == wheels((12, 8), (6, 1)) == wheels((13, 0), (7, 0)) == "cu126"
    assert wheels((12, 8), (12, 0)) is None and wheels((11, 8), (8, 0)) is None
    assert Driver().wheels() == "cpu"
    assert Driver("1", (11, 8), (), (8, 0)).torch_line() == NEWER_DRIVER

    card = Driver("550.54", (12, 4), ("NVIDIA A10",), (8, 6))
    line = "pip uninstall -y torch && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    assert card.unfit(None, False) == ("but there is NVIDIA A10 (driver 550.54): runs go to the CPU", line)
    assert card.unfit("13.0", False) == ("but the driver 550.54 goes up to CUDA 12.4: runs go to the CPU", line)
    assert card.unfit("12.6", True) == Driver().unfit(None, False) == ("", "")
    assert card.unfit("12.6", False)[0].startswith("but torch finds no GPU, where the driver has NVIDIA A10")
    assert Driver().unfit("13.0", False)[0] == "there is no NVIDIA driver, runs go to the CPU"


def test_a_build_of_torch_that_does_not_fit(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(packages, "torch", "from . import cuda, version\n__version__ = '2.13.0+cu130'")
    package(packages, "torch.cuda", "def is_available(): return False")
    package(packages, "torch.version", "cuda = '13.0'")
    command(tmp_path, monkeypatch, "nvidia-smi", SMI.replace("CUDA Version: 13.0", "CUDA Version: 12.8"))
    (finding,) = tried(["torch"])
    assert finding == (
        "!",
        "torch",
        "2.13.0+cu130, built for CUDA 13.0; but the driver 580.95.05 goes up to CUDA 12.8: runs go to the CPU",
        "pip uninstall -y torch && pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126",
    )


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answers about a GPU are made up; the product is computed, on the CPU."""
    import torch

    memory = [60 * 2**30, 80 * 2**30]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: tuple(memory))
    about = "NVIDIA A100, compute capability 8.0, bf16"
    found = probe._gpu(torch.device("cpu", 0), Driver())
    assert found == ("✓", "GPU 0", f"{about}; 60.0 of 80.0 GiB free; product and gradient right", "")
    memory[0] = 2**30
    assert probe._gpu(torch.device("cpu", 0), Driver())[:3] == ("!", "GPU 0", f"{about}; 1.0 of 80.0 GiB free")
    monkeypatch.setattr(torch, "diag", lambda scale: torch.full((64, 64), 2.0, dtype=scale.dtype))
    found = probe._gpu(torch.device("cpu", 0), Driver())
    assert found == ("✗", "GPU 0", f"{about}: RuntimeError: a product or its gradient is wrong in float32", REBOOT)

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    found = probe._gpu(torch.device("cpu", 0), Driver("580", (13, 0), (), (6, 1)))
    assert found.mark == "✗" and found.fix.endswith("/whl/cu126") is False  # of this card, not of the oldest
    assert found.fix.endswith("/whl/cu130")


# ---- the machine


def test_a_container_has_less(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    groups = tmp_path / "groups"
    (groups / "user" / "job").mkdir(parents=True)
    assert machine.container_memory(groups, own) is None and machine.container_cores(groups, own) is None
    (groups / "cgroup.controllers").touch()
    (groups / "user" / "job" / "memory.max").write_text("max\n")
    (groups / "user" / "memory.max").write_text("8000\n")
    (groups / "user" / "memory.current").write_text("5000\n")
    (groups / "user" / "memory.stat").write_text("anon 1\ninactive_file 1500\n")
    (groups / "user" / "job" / "cpu.max").write_text("150000 100000\n")
    assert machine.container_memory(groups, own) == (8000, 3500)
    assert machine.container_cores(groups, own) == 1.5
    old = tmp_path / "old"
    for name, value in {"memory/memory.limit_in_bytes": 9000, "memory/memory.usage_in_bytes": 4000}.items():
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(f"{value}\n")
    (old / "memory" / "memory.stat").write_text("total_inactive_file 1000\n")
    (old / "cpu").mkdir()
    (old / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.container_memory(old, own) == (9000, 3000) and machine.container_cores(old, own) is None


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    (finding,) = machine.processor()
    assert finding.mark == "!" and "; OMP_NUM_THREADS=4096: more threads than cores" in finding.found
    cores = int(finding.fix.removeprefix("export OMP_NUM_THREADS="))
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert next(machine.processor()).fix == "unset OMP_NUM_THREADS"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    monkeypatch.setenv("LUTHIER_CACHE", "/proc/luthier")
    found = {finding.what: finding for finding in machine.rights(tmp_path)}
    assert found["runs"] == ("✗", "runs", "runs is a file, where a folder is needed", "mv runs runs.old")
    assert found["temporary files"][2:] == ("file is a file, where a folder is needed", "mv file file.old")
    assert found["rows cache"].mark == "✗" and found["rows cache"].found.startswith("/proc cannot be written: ")
    assert found["rows cache"].fix == "export LUTHIER_CACHE=FOLDER"
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/x")
    assert {finding.what: finding.mark for finding in machine.rights(tmp_path)}["data cache"] == "!"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {finding.what for finding in machine.disks(tmp_path)} == {"disk"}
    monkeypatch.setattr(machine, "CACHE_WANTS", 2**60)
    findings = [finding for finding in machine.disks(tmp_path) if "hub cache" in finding.found]
    assert [(one.mark, one.fix) for one in findings] == [("!", "export HF_HOME=FOLDER  (on a disk with more room)")]


# ---- settings


def test_settings_that_bite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command(tmp_path, monkeypatch, "nvidia-smi", SMI)
    values = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_ENDPOINT": "hf-mirror.com",
        "HF_TOKEN": "hf_never_shown",
        "https_proxy": "me:never_shown@proxy:3128",
        "NO_PROXY": "localhost",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments=True",
        "PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:4],max_split_size_mb:512",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = list(settings.settings())
    wrong = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments=True: not of the form key:value,key:value"
    assert [finding for finding in found if finding.what != "encoding"] == [
        ("!", "offline", "HF_HUB_OFFLINE=1: nothing is fetched, caches and folders serve", "unset HF_HUB_OFFLINE"),
        ("!", "HF_ENDPOINT", "'hf-mirror.com' is no address (https://…)",
         "export HF_ENDPOINT=https://hf-mirror.com  (or: unset HF_ENDPOINT)"),
        ("✓", "proxies", "NO_PROXY=localhost, https_proxy=***@proxy:3128", ""),
        ("✓", "hub's token", "from the environment (it is never shown)", ""),
        ("!", "visible GPUs", "CUDA_VISIBLE_DEVICES= hides every GPU", "unset CUDA_VISIBLE_DEVICES"),
        ("!", "allocator", wrong, "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    ]  # fmt: skip


# ---- the hubs: real sockets of this machine


class Hub(http.server.BaseHTTPRequestHandler):
    tokens: list[str | None] = []

    def do_HEAD(self) -> None:  # noqa: N802
        self.tokens.append(self.headers.get("Authorization"))
        self.send_response(int(self.path.rpartition("/")[2] or 200))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_how_hubs_answer(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_sent")
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        hangs, refuses = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in (silent, closed))
        urls = [f"http://{hub}{path}" for path in ("", "/407", "/503", "/404")]
        urls += [hangs, refuses, f"https://{hub}", "http://nowhere.invalid"]
        answers = reach.ask(urls, each=0.5, bound=5)()
        began = time.monotonic()
        (late,) = reach.ask([hangs], each=60, bound=0.5)()
        assert time.monotonic() - began < 20
    assert [answer.url for answer in answers] == urls
    told = [(answer.kind, answer.found.split(" in ")[0]) for answer in answers]
    assert told[:4] == [
        ("well", "200"),
        ("407", "the proxy asks for a password (407)"),
        ("status", "status 503"),
        ("well", "404"),
    ]
    assert told[4:6] == [("timeout", "no answer"), ("refused", "refused")]
    assert answers[4].found == "no answer in 0.5 s" and late.found == "no answer in 0.5 s"
    assert told[6][0] == "tls" and told[6][1].startswith("TLS error (")
    assert told[7] == ("dns", "DNS fails")
    assert set(Hub.tokens) == {None}


def test_a_proxy_that_does_not_run(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://me:never_shown@127.0.0.1:{closed.getsockname()[1]}")
        answers = reach.ask([f"http://{hub}"])()
    assert answers == [(f"http://{hub}", "refused", "refused, through HTTP_PROXY", "HTTP_PROXY")]
    fix = "unset HTTP_PROXY  (or start the proxy that it names); else models come from folders: model.name: /path"
    assert list(reach.findings(answers)) == [("!", "HF_ENDPOINT", f"http://{hub}: refused, through HTTP_PROXY", fix)]
    hubs = [answers[0]._replace(url=HUB)]
    assert list(reach.findings(hubs)) == [("!", "hubs", "huggingface.co: refused, through HTTP_PROXY", fix)]
    monkeypatch.setenv("HTTP_PROXY", f"http://me:never_shown@{hub}")
    assert reach.ask(["http://nowhere.invalid/407"])()[0][1:] == (
        "407",
        "the proxy asks for a password (407)",
        "HTTP_PROXY",
    )
    monkeypatch.setenv("ALL_PROXY", "socks://me:never_shown@127.0.0.1:1")
    (answer,) = reach.ask([f"http://{hub}"])()
    assert (answer.kind, answer.proxy) == ("proxy", "ALL_PROXY") and "never_shown" not in answer.found
    assert next(reach.findings([answer])).fix == "unset ALL_PROXY"


def test_the_mark_of_hf_endpoint_is_that_of_its_answer(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", dead)
        (answer,) = reach.ask(reach.to_ask()[:1])()
    assert list(reach.findings([answer])) == [("!", "HF_ENDPOINT", f"{dead}: refused", "unset HF_ENDPOINT")]
    assert [one for one in settings.settings(asked=True) if one.what == "HF_ENDPOINT"] == []
    assert [tuple(one) for one in settings.settings() if one.what == "HF_ENDPOINT"] == [
        ("✓", "HF_ENDPOINT", f"{dead}; not asked", "")
    ]
    monkeypatch.setenv("HF_ENDPOINT", f"http://{hub}")
    (answer,) = reach.ask(reach.to_ask()[:1])()
    (finding,) = reach.findings([answer])
    assert finding[:2] == ("✓", "HF_ENDPOINT") and finding.found.startswith(f"http://{hub}: 200 in ")
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")  # settings have a line about it
    assert reach.to_ask()[0] == HUB


def test_the_one_setting_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*answers: Answer) -> list[tuple[str, str, str, str]]:
        return [tuple(finding) for finding in reach.findings(answers)]

    def well(url: str) -> Answer:
        return Answer(url, "well", "200 in 0.1 s")

    def dead(url: str, found: str = "DNS fails") -> Answer:
        return Answer(url, "dns", found)

    assert reach.to_ask() == [HUB, MIRROR, MODELSCOPE]
    assert lines(well(HUB), dead(MIRROR), dead(MODELSCOPE, "refused")) == [
        ("✓", "huggingface.co", "200 in 0.1 s", ""),
        ("✓", "hf-mirror.com", "DNS fails; not needed while huggingface.co answers", ""),
        ("✓", "modelscope.cn", "refused; modelscope: names need it", ""),
    ]
    assert lines(dead(HUB), well(MIRROR), dead(MODELSCOPE)) == [
        ("!", "huggingface.co", "DNS fails", "export HF_ENDPOINT=https://hf-mirror.com"),
        ("✓", "hf-mirror.com", "200 in 0.1 s", ""),
        ("✓", "modelscope.cn", "DNS fails; not needed", ""),
    ]
    assert lines(dead(HUB), dead(MIRROR), well(MODELSCOPE))[0][3].startswith("model.name: modelscope:owner/name")
    folders = "models come from folders: model.name: /path"
    assert lines(dead(HUB), dead(MIRROR), dead(MODELSCOPE)) == [
        ("!", "hubs", "huggingface.co, hf-mirror.com, modelscope.cn: DNS fails", folders)
    ]
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    asked = reach.to_ask()
    assert asked == ["https://mirror.example", HUB, MIRROR, MODELSCOPE]
    gone = ("!", "HF_ENDPOINT", "https://mirror.example: DNS fails")
    unset = "unset HF_ENDPOINT  (or: export HF_ENDPOINT=https://hf-mirror.com)"
    assert lines(dead(asked[0]), *map(well, asked[1:])) == [
        (*gone, unset),
        ("✓", "huggingface.co", "200 in 0.1 s", ""),
        ("✓", "hf-mirror.com", "200 in 0.1 s", ""),
        ("✓", "modelscope.cn", "200 in 0.1 s", ""),
    ]
    instead = "export HF_ENDPOINT=https://hf-mirror.com"
    assert lines(dead(asked[0]), dead(HUB), well(MIRROR), dead(MODELSCOPE))[0] == (*gone, instead)
    assert lines(*map(dead, asked)) == [
        (*gone, "unset HF_ENDPOINT"),
        ("!", "hubs", "huggingface.co, hf-mirror.com, modelscope.cn: DNS fails", folders),
    ]
    assert lines(well(asked[0]), *map(dead, asked[1:]))[:2] == [
        ("✓", "HF_ENDPOINT", "https://mirror.example: 200 in 0.1 s", ""),
        ("✓", "huggingface.co", "DNS fails; not needed while mirror.example answers", ""),
    ]


def test_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys, luthier.doctor.examine;"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_verb_ends_with_1_where_no_run_could_start(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: file too short')\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "luthier", "doctor", "--offline"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "NO_COLOR": "1"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "✗ torch" in done.stdout and "libtorch_cpu.so: file too short" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 thing keeps a run from starting")

"""benchmarks/gpu.py on the CPU, with tiny models: the same code as on a card, but for the kernels that are not here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpuways"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")  # of the libraries that the usual ways go through
def test_every_part_runs_and_all_ways_find_the_same_loss(gpu, tmp_path, capsys):
    result = gpu.main(["--dry", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == result
    assert [name for name, part in result["parts"].items() if "error" in part] == []
    checks = result["parts"]["engine against the padded twin in float64"]
    assert len([one for name, one in checks.items() if name != "took"]) == len(gpu.LADDER)
    assert all(one["difference"] <= one["bound"] for name, one in checks.items() if name != "took")
    cells = {name: part for name, part in result["parts"].items() if "ways" in part}
    assert list(cells) == ["Qwen2 1.5B, huanhuan, bf16", "Llama-2 7B, alpaca, NF4"]
    for part in cells.values():
        ways = part["ways"]
        assert {"tutorial script", *gpu.LADDER, "all, recomputed"} <= set(ways)
        for one in ways.values():
            assert one["loss"] == pytest.approx(ways["tutorial script"]["loss"], rel=2e-3)  # bf16
            assert one["tokens/s"] == pytest.approx(part["tokens"] / one["median"])
        # What is shared is computed once: as much comes of less work.
        shared, packed = ways["+ shared prefixes"], ways["packed"]
        assert shared["effective"] * shared["median"] == pytest.approx(packed["effective"] * packed["median"])
        work = {name: ways[name]["utilisation"] * ways[name]["median"] for name in ("packed", "+ shared prefixes")}
        assert 0.7 < work["+ shared prefixes"] / work["packed"] < 0.95
    assert "WRONG" not in capsys.readouterr().out


def test_useful_work_is_counted_as_the_documentation_has_it(gpu):
    """4·P·t + 4·H·s + 6·L·d·t² a row."""
    config = Qwen2Config(**gpu.QWEN)
    decoder = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    rows = [(100, 30), (40, 8)]
    expected = sum(4 * decoder * t + 4 * 151_936 * 1536 * s + 6 * 28 * 1536 * t * t for t, s in rows)
    assert gpu.work(config, [(0, 100), (0, 40)], 38) == pytest.approx(expected)
    # The same rows, their first 25 tokens once.
    once = expected - 4 * decoder * 25 - 6 * 28 * 1536 * 25 * 25
    assert gpu.work(config, [(0, 25), (25, 75), (25, 15)], 38) == pytest.approx(once)


@pytest.mark.parametrize("name", ["QWEN", "LLAMA"])
def test_the_shapes_are_those_of_the_models(gpu, name):
    config = {"QWEN": Qwen2Config, "LLAMA": LlamaConfig}[name](**getattr(gpu, name))
    layer, (words, width) = gpu.matrices(config)
    parameters = config.num_hidden_layers * sum(a * b for a, b in layer) + words * width
    assert parameters / 1e9 == pytest.approx(
        {"QWEN": 1.543, "LLAMA": 6.607}[name], abs=1e-3
    )  # Llama: one of two tables


def test_a_way_that_fails_is_a_line_and_the_others_go_on(gpu, capsys):
    def fails(steps: int) -> tuple[list[float], float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    model = torch.nn.Linear(2, 2)
    found = gpu.taken(model, {"one": fails, "other": lambda steps: ([9.0, 2.0, 4.0], 1.5)}, 2, 3, 1e12)
    assert found["one"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert found["other"] == {"seconds": [2.0, 4.0, 2.0, 4.0], "loss": 1.5}


def test_without_pydantic_the_flags_alone_are_there(gpu, monkeypatch):
    import gpuways

    monkeypatch.setitem(sys.modules, "luthier.sections", sys.modules["luthier.sections"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpuways.make_sections()
    stand_in = sys.modules["luthier.sections"].EngineSection(fused_lora=True, compile=False)
    changed = stand_in.model_copy(update={"fused_lora": False})
    assert (stand_in.fused_lora, changed.fused_lora, changed.compile) == (True, False, False)


def test_every_flag_of_the_ladder_is_one_of_the_recipe(gpu):
    import gpuways

    assert set(gpuways.FLAGS) == set(gpuways.EngineSection.model_fields) - {"compile"}
    on = gpuways.section(gpu.LADDER["+ shared prefixes"])
    assert [name for name in gpuways.FLAGS if getattr(on, name)] == gpuways.FLAGS[:4]
    assert list(gpu.LADDER.values()) == [2, 3, 4, 5, 6]


def test_without_a_card_it_says_so(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit, match="--dry"):
        gpu.main([])

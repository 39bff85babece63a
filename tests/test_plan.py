"""A plan needs no weights, refuses what training refuses, and foretells what training then takes and says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import hub
from luthier.cli import main as cli
from luthier.data.batches import order_of, total_steps
from luthier.data.pack import pack, passes
from luthier.engine.forward import SummedLoss, adopt, on_device
from luthier.engine.rungs import rungs
from luthier.errors import ModelError
from luthier.models import quantize
from luthier.models.adapters import attach
from luthier.plan import Bare, _Assumed, _tokens, memory, optimizer_bytes, plan, planned
from luthier.plantext import lines
from luthier.rehearsal import _Watch, bare_model
from luthier.sections import DataSection, EngineSection, MethodSection, ModelSection, Quantization, Recipe, TrainSection
from luthier.structure import structure
from luthier.training.start import recompute_activations
from rows import OWN, SIZE
from tiny import tiny_llama, tiny_qwen2

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks so
LORA = MethodSection(r=4, dropout=0.1)
RECIPE = """
model: {{name: ./model}}
data: {{train: {data}, max_length: 64}}
method: {{r: 4}}
train: {{batch: 4, epochs: 2, tokens_per_pass: 128}}
"""


def bare(folder: Path, *, dtype: torch.dtype = torch.float32, **sections: Any) -> Bare:
    model = ModelSection(name=str(folder), quantize=sections.pop("quantize", "none"))
    recipe = Recipe(model=model, data=DataSection(train="-"), **{"method": LORA, **sections})
    return Bare(recipe, folder, dtype, "cpu")


def config_alone(folder: Path, family: str, **config: Any) -> Path:
    folder.mkdir()
    own = OWN.get(family, OWN["glm"] if family == "glm" else {"intermediate_size": 48, "num_key_value_heads": 2})
    AutoConfig.for_model(family, **{**SIZE, **own, **config}).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose model is config.json and a tokenizer, without a weight."""
    tiny_qwen2(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    rows = [{"prompt": "Where does it live? " * (i % 4), "response": f"in town {i}"} for i in range(1, 31)]
    rows = [{**row, "prompt": row["prompt"] or "Hm?"} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data="data.jsonl"))
    return path


def test_without_weights_it_says_what_training_says(recipe: Path, tmp_path: Path) -> None:
    found = plan(recipe, ["method.dropout=0.1"], say=lambda _: None)
    said: list[str] = []
    real = AutoModelForCausalLM.from_pretrained(tiny_qwen2(tmp_path / "whole"))
    adapted = attach(real, LORA, 42, say=said.append)
    assert found.trains == said[-1]
    trained = [value for value in adapted.parameters() if value.requires_grad]
    size = sum(value.nbytes for value in trained)
    assert found.memory.adapter == found.memory.gradients == size
    assert found.memory.optimizer == 2 * size
    assert found.memory.weights == sum(value.nbytes for value in adapted.parameters()) - size
    assert found.unknown == []
    assert found.disk["merged model"] == found.memory.weights


def test_steps_and_tokens_are_those_of_the_data(recipe: Path) -> None:
    from datetime import date

    from luthier.data.encode import Encoder
    from luthier.data.prepare import prepare
    from luthier.models.load import load_tokenizer
    from luthier.recipe import load_recipe

    found = plan(recipe, ["train.tokens_per_pass=1024"], say=lambda _: None)
    loaded = load_recipe(recipe)
    encoder = Encoder(load_tokenizer(recipe.parent / "model"), loaded.data, date.today())
    data = prepare(loaded.data, encoder, lambda _: None)
    order = order_of(data.train_sources, loaded.data.seed, 4)
    assert (found.steps, found.steps_per_epoch) == (total_steps(loaded.train, order), 8) == (16, 8)
    assert found.tokens == 2 * int(data.train.lengths.sum())
    steps = [passes(data.train, order.rows(step), 1024, shared=True) for step in range(8)]
    assert found.largest[0] == max(part.ids.size for parts in steps for part in parts)
    some = _tokens(data, order, 11)  # an epoch and three steps of the next
    assert some == sum(int(data.train.lengths[order.rows(step)].sum()) for step in range(11))


def test_what_is_not_there_is_assumed_and_said(recipe: Path) -> None:
    (recipe.parent / "data.jsonl").unlink()
    found = plan(recipe, say=lambda _: None)
    assert found.largest == (128, 2) and found.steps is None and found.tokens is None
    assert len(found.unknown) == 1 and "rows of data.max_length (64 tokens) are assumed" in found.unknown[0]
    (recipe.parent / "model" / "tokenizer.json").unlink()
    found = plan(recipe, ["train.epochs=null", "train.steps=3"], say=lambda _: None)
    assert found.steps == 3 and "holds no tokenizer" in found.unknown[0]
    assert any(line.startswith("not known: the data: ") for line in lines(found))


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("llama", True), ("gemma2", False), ("gemma2", True), ("opt", True), ("glm", False)]
)
def test_a_rehearsal_is_the_pass_itself_without_its_numbers(tmp_path: Path, family: str, checkpointing: bool) -> None:
    """The same counting over real tensors comes to the same bytes: what is kept, and the peak."""
    folder = config_alone(tmp_path / "model", family)
    section = TrainSection(activation_checkpointing=checkpointing)
    method = MethodSection(r=4)
    part = pack(_Assumed(40), [0, 1, 2])
    found = memory(bare(folder, method=method, train=section), part).rehearsal
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    real = attach(real, method, 0, say=lambda _: None)
    from luthier.engine import dropout

    dropout.of_base(real).set_to(0.0)
    adopt(real)
    if checkpointing:
        recompute_activations(real)
    real.train()
    given = on_device(part, torch.device("cpu"))
    watch = _Watch([*real.parameters(), *real.buffers()], None)
    with rungs(real, EngineSection()), watch:
        for _ in range(2):
            real.zero_grad()
            start = watch.peak = watch.live
            loss = SummedLoss(real, "engine")(given)
            kept, forward = watch.live - start, watch.peak - watch.live
            watch.peak = watch.live
            torch.autograd.backward(loss)
            del loss
            peak, gradients = watch.peak - start, watch.live - start
    assert gradients == sum(value.nbytes for value in real.parameters() if value.requires_grad)
    assert found is not None and (found.kept, found.forward) == (kept, forward)
    assert found.backward == max(0, peak - kept - gradients) and found.holes == 0


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_rehearsal_needs_no_number_that_is_drawn(tmp_path: Path, kind: str) -> None:
    """PEFT tosses for each of these layers, whether it is to drop, though none ever is."""
    folder = config_alone(tmp_path / "model", "llama")
    part = pack(_Assumed(40), [0, 1])
    plain, found = (memory(bare(folder, method=MethodSection(kind=one, r=4)), part) for one in ("lora", kind))
    assert found.rehearsal is not None and plain.rehearsal is not None
    assert found.rehearsal.kept > plain.rehearsal.kept > 0  # the product that is added to each weight is kept as well


def test_memory_follows_what_it_is_of(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model", "llama")
    few, many = (pack(_Assumed(40), range(rows)) for rows in (2, 4))
    kept: dict[tuple[int, bool], int] = {
        (rows, again): memory(
            bare(folder, method=MethodSection(r=4), train=TrainSection(activation_checkpointing=again)), part
        ).rehearsal.kept
        for rows, part, again in ((2, few, False), (2, few, True), (4, many, False))
    }
    assert kept[4, False] == pytest.approx(2 * kept[2, False], rel=0.02)
    assert kept[2, True] < kept[2, False] / 2
    full = memory(bare(folder, method=MethodSection(kind="full")), few)
    assert full.adapter == full.table == 0 and full.gradients == full.weights == full.optimizer / 2


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 twice"])
def test_quantised_weights_weigh_what_bitsandbytes_holds(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from luthier.models.load import from_folder

    asked = Quantization(kind=kind[:4].strip(), double_quant="twice" in kind)
    folder = tiny_llama(tmp_path / "model", intermediate_size=192)
    real, _ = from_folder(folder, torch.float32, torch.device("cpu"), quantized=asked)
    bare_one = bare_model(folder, torch.float32, quantized=asked)
    assert quantize.bytes_of(list(bare_one.parameters())) == quantize.bytes_of(list(real.parameters()))
    real, bare_one = (attach(model, LORA, 0, say=lambda _: None) for model in (real, bare_one))
    assert structure(bare_one) == [line.replace(f"Linear{kind[:1]}", "Linear") for line in structure(bare_one)]
    plain, held = (
        memory(bare(folder, quantize=how, method=MethodSection(r=4)), pack(_Assumed(40), [0, 1]))
        for how in ("none", asked)
    )
    assert held.weights == quantize.bytes_of([value for value in real.parameters() if not value.requires_grad])
    assert held.rehearsal.kept == plain.rehearsal.kept  # a dequantised weight is not kept


def test_optimizers_remember_as_much_as_they_do() -> None:
    large, small = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(8, 8))
    both = [large, small]
    assert optimizer_bytes(both, "adamw") == 8 * (8192 + 64)
    assert optimizer_bytes(both, "adamw_8bit") == 2 * (8192 + 4 * 32) + 8 * 64
    assert optimizer_bytes(both, "paged_adamw_8bit") == optimizer_bytes(both, "adamw_8bit")
    assert optimizer_bytes(both, "lion_8bit") == 8192 + 4 * 32 + 4 * 64


def test_a_tree_is_folded_where_layers_repeat(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model", "glm", num_hidden_layers=5)
    model = attach(bare_model(folder, torch.bfloat16), MethodSection(r=4, target=["o_proj"]), 0, say=lambda _: None)
    tree = structure(model)
    assert tree[0].startswith("GlmForCausalLM ")
    (layers,) = [line for line in tree if "5 × GlmDecoderLayer" in line]
    assert layers.endswith("each")
    assert [line.split("  ")[-1].strip() for line in tree if "LoRA" in line] == ["LoRA r 4, 256 parameters"]
    assert sum("gate_up_proj  Linear 32 → 96" in line for line in tree) == 1


@pytest.mark.full
def test_where_it_does_not_fit_it_says_what_to_turn(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model", "llama")
    found = planned(bare(folder, method=MethodSection(r=4)), None, free=1000)
    (said,) = [line for line in lines(found) if line.startswith("it does not fit")]
    assert "train.activation_checkpointing: true" in said and "model.quantize: nf4 or int8" in said
    roomy = planned(bare(folder, method=MethodSection(r=4)), None, free=1 << 40)
    assert not [line for line in lines(roomy) if "does not fit" in line]
    assert roomy.memory.most == roomy.memory.weights + max(
        roomy.memory.increase, roomy.memory.adapter + roomy.memory.proof
    )


@pytest.mark.parametrize(
    ("change", "override", "words"),
    [
        ({}, "method.target=[q_prj]", "q_prj matches no layer of this qwen2 model; close: "),
        ({"model_type": "nobody"}, "", "knows no language model of type 'nobody'"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "", "set model.trust_vendor_code: true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "", "its weights are quantised (gptq)"),
    ],
    ids=["target", "unknown", "vendor", "quantised"],
)
def test_it_refuses_what_training_refuses(
    recipe: Path,
    change: dict[str, Any],
    override: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = recipe.parent / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    monkeypatch.setattr(sys, "argv", ["luthier", "plan", str(recipe), *filter(None, [override])])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.count("\n") == 1


def test_the_verb_prints_plain_aligned_lines(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["luthier", "plan", str(recipe), "--structure"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().out
    assert not end.value.code and "\x1b" not in said
    for words in ("2 × Qwen2DecoderLayer", "memory on ", "activations", "together", "steps: 16, 8 an epoch", "disk"):
        assert words in said


def test_of_a_model_on_a_hub_only_the_small_files_are_fetched() -> None:
    sizes = dict.fromkeys(["config.json", "tokenizer.json", "model.safetensors.index.json", "a.txt"], 1)
    sizes |= {"model-00001-of-00002.safetensors": 9, "pytorch_model.bin": 9, "consolidated.safetensors": 9}
    assert hub._wanted(sizes, weights=False) == ["config.json", "tokenizer.json", "a.txt"]


def test_a_model_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model", "llama")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match=r"a model of its config\.json cannot be built"):
        bare_model(folder, torch.float32)


@pytest.mark.full
def test_the_100_m_shape_is_foretold_within_a_quarter() -> None:
    file = Path(__file__).parent.parent / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("benchmark_plan", file)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_plan"] = benchmark
    spec.loader.exec_module(benchmark)
    cells = [benchmark.Cell(512, True), benchmark.Cell(1024, False)]
    found = [benchmark.compared(cell, repetitions=3) for cell in cells]
    for predicted, measured in found:
        assert predicted == pytest.approx(measured, rel=0.25)
    assert found[0] < found[1]

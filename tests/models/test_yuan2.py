"""Yuan2 against the vendor's own outputs, and what the filter adds to packing, padding, generation and saving."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from luthier.data.pack import Pass, pack, pad
from luthier.engine import dropout, forward, proof, reference
from luthier.engine.forward import SummedLoss, adopt, on_device
from luthier.errors import ModelError
from luthier.merge import merge
from luthier.models.adapters import attach, load_adapter, save_adapter
from luthier.models.load import check_architecture, load_model
from luthier.models.quantize import dequantised, is_quantised
from luthier.quiet import quiet
from luthier.sections import EngineSection, MethodSection, ModelSection
from luthier.training.start import recompute_activations
from rows import lora, random_rows, tiny
from tiny import tiny_tokenizer

CPU = torch.device("cpu")
MINI = Path(__file__).parent.parent / "assets" / "yuan2-mini"
AUTO_MAP = {
    "AutoConfig": "configuration_yuan.YuanConfig",
    "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM",
}
ROWS = random_rows(6, longest=30)
EVERY = np.arange(6)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path, **section: Any) -> Any:
    said: list[str] = []
    model = load_model(path, ModelSection(name="yuan", **section), CPU, say=said.append)
    assert len(said) == 1, said  # nothing is repaired, nothing left over
    return model


def copy_of(folder: Path, **config: Any) -> Path:
    """The mini model in a folder that may be written to, with other values in its config.json."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MINI / name, folder / name)
    known = json.loads((MINI / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def stored(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mini() -> Any:
    return load(MINI, dtype="fp32")


@pytest.fixture(params=["mini", "tiny"])
def oracle(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], Tensor, int]:
    """A model, what the vendor's code said of it, its logits, and how many words of the vocabulary lie between them."""
    if request.param == "mini":
        logits = load_file(MINI / "expected.safetensors")["logits"]
        return request.getfixturevalue("mini"), json.loads((MINI / "expected.json").read_text()), logits, 1
    folder = request.getfixturevalue("shared") / "oracle" / "yuan2-tiny"
    expected = json.loads((folder / "expected.json").read_text())
    logits = load_file(folder / "expected_logits_every257.safetensors")["logits"]
    return load(folder, dtype="fp32"), expected["forward"] | {"greedy": expected["greedy_uncached"]}, logits, 257


# -- the vendor's own numbers -------------------------------------------------------------------------------------


def test_logits_and_loss_are_the_vendors(oracle: tuple[Any, dict[str, Any], Tensor, int]) -> None:
    """Sabotage: conv1's bias as y before the start; gate and up exchanged; heads not cut out of q and k together."""
    model, expected, logits, step = oracle
    with torch.no_grad():
        out = model(torch.tensor(expected["input_ids"]), labels=torch.tensor(expected["labels"]))
    assert (out.logits[..., ::step] - logits).abs().max() < 1e-5
    assert out.loss.item() == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_vendors(oracle: tuple[Any, dict[str, Any], Tensor, int], use_cache: bool) -> None:
    """The vendor's own cache is not the measure: it answers otherwise with it."""
    model, expected, *_ = oracle
    drawn = model.generate(torch.tensor([expected["greedy"][:8]]), generation_config=settings(12, use_cache=use_cache))
    assert drawn[0, : len(expected["greedy"])].tolist() == expected["greedy"]


def test_the_gradient_at_the_embeddings_is_the_vendors() -> None:
    model, expected = load(MINI, dtype="fp32"), json.loads((MINI / "expected.json").read_text())
    ids = torch.tensor(expected["input_ids"])
    model(ids, labels=torch.tensor(expected["labels"])).loss.backward()
    wanted = load_file(MINI / "expected.safetensors")["embedding_grad"]
    assert (model.get_input_embeddings().weight.grad[ids[0]] - wanted).abs().max() < 1e-5


# -- generation ---------------------------------------------------------------------------------------------------


def settings(new: int, **given: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **given)


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask: [rows, longest]. The pads are words like any other."""
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def in_pieces(
    model: Any,
    ids: Tensor,
    sizes: list[int],
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Logits of rows that come piece by piece, each from the cache that the one before left."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, start = [], cache.get_seq_length()
    for size in sizes:
        stop = start + size
        out = model(
            ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop],
            past_key_values=cache,
        )
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[10] + [1] * 14, [1] * 24, [5, 1, 1, 7, 2, 8]], ids=["usual", "single", "pieces"])
def test_a_row_in_pieces_is_the_row_at_once(mini: Any, sizes: list[int]) -> None:
    """Sabotage: no state kept for either convolution."""
    ids = torch.tensor(json.loads((MINI / "expected.json").read_text())["input_ids"])
    close(in_pieces(mini, ids, sizes), mini(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("positions", [True, False], ids=["own positions", "places"])
@pytest.mark.parametrize("sizes", [[20], [12] + [1] * 8, [3, 4, 13]], ids=["at once", "usual", "pads first"])
def test_a_left_padded_row_is_the_row_alone(mini: Any, sizes: list[int], positions: bool) -> None:
    """Positions are relative: a row may begin at any. Sabotage: the filter reads pads, or what it makes of them."""
    rows = [list(range(30, 50)), list(range(90, 101)), [5]]
    ids, mask = left_padded(rows)
    own = (mask.cumsum(1) - 1).clamp(min=0) if positions else None
    logits = in_pieces(mini, ids, sizes, mask=mask, positions=own)
    for place, row in enumerate(rows):
        close(logits[place, -len(row) :], mini(torch.tensor([row])).logits[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_batch_is_answered_as_single_prompts_with_and_without_a_cache(mini: Any, beams: int) -> None:
    """Beams: the cache's rows are put into another order at each step. Sabotage: the states not among them."""
    prompts = [list(range(30, 50)), list(range(90, 101)), [5]]
    ids, mask = left_padded(prompts)
    asked = {"num_beams": beams, "generation_config": settings(10)}
    together = mini.generate(ids, attention_mask=mask, **asked)
    assert torch.equal(together, mini.generate(ids, attention_mask=mask, use_cache=False, **asked))
    for answer, prompt in zip(together, prompts, strict=True):
        alone = mini.generate(torch.tensor([prompt]), **asked)
        assert answer[ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_the_cache_can_be_taken_back(mini: Any) -> None:
    """As assisted generation does: the last tokens go, others come."""
    row, other = torch.arange(30, 50)[None], torch.arange(60, 70)[None]
    cache = DynamicCache(config=mini.config)
    cache.activate_past_recording()
    in_pieces(mini, row, [12, 8], cache=cache)
    cache.crop(-5)
    both = torch.cat((row[:, :15], other), 1)
    close(in_pieces(mini, both, [10], cache=cache), mini(both).logits[:, 15:])


# -- packed rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_packed_rows_are_separate_rows(recomputed: bool) -> None:
    """Loss and every gradient, base and adapters, dropout on. Sabotage: the filter looks across the border of rows."""
    model = lora(tiny("yuan"), lora_dropout=0.1, init_lora_weights=False).requires_grad_(True).train()
    adopt(model)
    loss = SummedLoss(model, "engine")

    def of(*passes: Pass) -> tuple[float, dict[str, Tensor]]:
        losses = [loss(on_device(part, CPU, seed=3)) for part in passes]
        torch.autograd.backward(losses)  # after all forward passes: what is computed again knows its own pass only
        gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        model.zero_grad()
        return sum(part.item() for part in losses), gradients

    with dropout.keyed(model, 3):
        expected, gradients = of(*(pad(ROWS, [row], 1) for row in EVERY))
        found = {"padded": of(pad(ROWS, EVERY, 1))}
        if recomputed:
            recompute_activations(model)
        for name, cut in {"one": [EVERY], "two": [EVERY[:2], EVERY[2:]], "each": [[row] for row in EVERY]}.items():
            found[name] = of(*(pack(ROWS, rows) for rows in cut))
    assert len(gradients) == 2 * (14 + 14) + 3  # of a layer: its own and the adapters'
    for cut, (value, others) in found.items():
        assert value == pytest.approx(expected, rel=1e-6), cut
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm(), (cut, name)


def test_the_engine_is_proven_and_nothing_leaks() -> None:
    """Sabotage: the filter looks across the border of rows."""
    model = lora(tiny("yuan"), lora_dropout=0.1).train()
    with dropout.keyed(model, 1):
        proven = proof.prove(model, ROWS, EVERY[:4], pad_id=0, device=CPU, autocast=None, seed=3)
        assert reference.Bench(model, ROWS, 0, CPU, None, 3, 1.0, EngineSection()).leak(EVERY) == 0.0
    assert proven.route == "engine" and proven.record["tried"]["engine"]["difference"] < 1e-5


@torch.no_grad()
def test_rows_packed_by_their_positions_are_separate_too(mini: Any) -> None:
    """transformers' own padding-free batches, which know no Layout: position 0 is a start."""
    rows = [torch.arange(30, 50), torch.arange(90, 101), torch.tensor([5])]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    logits = mini(torch.cat(rows)[None], position_ids=positions[None], use_cache=False).logits[0]
    close(logits, torch.cat([mini(row[None]).logits[0] for row in rows]))


@torch.no_grad()
def test_a_layout_alone_cuts_the_filter_where_positions_go_on() -> None:
    """Rows whose positions begin behind a prefix that all of them share."""
    model = load(MINI, dtype="fp32")
    adopt(model)
    row = pack(ROWS, [0, 1])
    shifted = replace(row, positions=row.positions + 3)
    hidden = []
    for ids in (row.ids, np.where(np.arange(row.ids.size) < row.segments[0][1], 9, row.ids)):
        given = on_device(replace(shifted, ids=ids), CPU)
        hidden.append(model.model(**forward.inputs(given)).last_hidden_state[:, row.segments[1][0] :])
    assert torch.equal(*hidden)


# -- folders ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_has_the_vendors_layout(mini: Any, tmp_path: Path) -> None:
    mini.save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(MINI)
    saved, vendors = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, MINI))
    assert {key: saved.get(key) for key in vendors} == vendors | {
        "torch_dtype": None,  # its newer name is dtype
        "transformers_version": saved["transformers_version"],
    }
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path, dtype="fp32")(ids).logits, mini(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 2])
def test_the_vendors_folder_opens_without_its_code(mini: Any, tmp_path: Path, shards: int) -> None:
    """As it is downloaded: pickled weights, code beside them, early code's frequencies among the tensors."""
    folder = copy_of(tmp_path / "Yuan2.0-2B", auto_map=AUTO_MAP)
    for name in ("configuration_yuan.py", "yuan_hf_model.py"):
        (folder / name).write_text("raise SystemExit('the code of the vendor ran')")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ids = torch.arange(20)[None]
    assert torch.equal(load(folder, dtype="fp32")(ids).logits, mini(ids).logits)
    half = load(folder)
    assert half.dtype == torch.bfloat16  # fp16 as it is stored, which a CPU does not compute in
    assert (half(ids).logits - mini(ids).logits).norm() < 0.05 * mini(ids).logits.norm()


@torch.no_grad()
def test_an_adapter_is_merged_into_a_folder_of_the_vendors_layout(tmp_path: Path) -> None:
    base = copy_of(tmp_path / "base", auto_map=AUTO_MAP)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    said: list[str] = []
    model = attach(load(base, dtype="fp32"), MethodSection(r=4), 1, say=said.append)
    assert said[-1].startswith("LoRA r 4, alpha 16 on q_proj k_proj v_proj o_proj gate_proj up_proj down_proj: ")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(model, tmp_path / "adapter", tokenizer)
    said.clear()
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", "fp32", say=said.append)
    assert (report.changed, report.untied) == (3 * 7, False)
    assert said[-1].startswith(f"{tmp_path / 'merged'}: it is in Yuan2's own layout, ")
    assert stored(tmp_path / "merged") == stored(base)
    kept, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "merged", base))
    assert kept == original
    ids = torch.arange(20)[None]
    logits = load(tmp_path / "merged")(ids).logits
    close(logits, load_adapter(load(base, dtype="fp32"), tmp_path / "adapter")(ids).logits)
    assert (logits - load(base, dtype="fp32")(ids).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_it_is_the_model_but_for_rounded_weights(tmp_path: Path, kind: Any) -> None:
    """Those of all linear layers, but neither of the filter nor of the head; answers with a cache as without."""
    pytest.importorskip("bitsandbytes")
    tiny("yuan", tied=True).save_pretrained(tmp_path)
    whole, said = load(tmp_path), list[str]()
    model = load_model(tmp_path, ModelSection(name="yuan", quantize=kind), CPU, say=said.append)
    rounded = {name: module for name, module in model.named_modules() if is_quantised(module)}
    assert len(rounded) == 2 * 7 and "lm_head" not in rounded
    ids = torch.arange(3, 23)[None]
    before = whole(ids).logits
    for name, module in rounded.items():
        whole.get_submodule(name).weight.copy_(dequantised(module, torch.float32))
    logits = model(ids).logits
    close(logits, whole(ids).logits)
    assert (logits - before).abs().max() > 0.01
    close(in_pieces(model, ids, [12] + [1] * 8), logits)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_shareqk": True}, "use_shareqk true"),
        ({"use_moe": True}, "use_moe true"),
        ({"moe_config": {"moe_num_experts": 32}}, 'moe_config {"moe_num_experts": 32}'),
        ({"attention_projection_size": 64}, "attention_projection_size 64"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"causal_mask": False}, "causal_mask false"),
    ],
)
def test_another_yuan_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = copy_of(tmp_path / "yuan", **config)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert str(error.value) == f"{folder}: {said} makes it another Yuan than Yuan2-2B, the one known here"


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"hidden_size 32 cannot be cut into 5 heads of even size$"):
        check_architecture(MINI, json.loads((MINI / "config.json").read_text()) | {"num_attention_heads": 5}, False)


def test_options_of_the_vendors_training_are_no_reason_to_refuse(tmp_path: Path) -> None:
    given = {"use_flash_attention": True, "reset_attention_mask": True, "reset_position_ids": True}
    load(copy_of(tmp_path / "yuan", **given, use_loss_mask=True))


def test_weights_without_a_filter_are_refused(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "yuan")
    tensors = {name: value for name, value in load_file(MINI / "model.safetensors").items() if "lf_gate" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 15 tensors of the model, the first is .*lf_gate.conv1.bias$"):
        load(folder)


def test_the_dropout_of_the_vendors_files_is_none(tmp_path: Path) -> None:
    """Else a run would say that it is off, and could be given back."""
    model = load_model(MINI, ModelSection(name="mini"), torch.device("cpu"), say=lambda line: None)
    assert model.config.dropout == 0.1 and dropout.of_base(model).names == []
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["dropout"] == 0.1 and "drops_nothing" not in saved

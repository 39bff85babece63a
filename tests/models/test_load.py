"""Loading: what is refused and how it is said, which number format is taken, and silence."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from luthier.errors import ModelError, RecipeError
from luthier.models.device import device_to_answer
from luthier.models.load import (
    choose_dtype,
    end_ids,
    footprint,
    generation_settings,
    idle_gpus,
    load_model,
    load_tokenizer,
    pad_id,
    pick_device,
)
from luthier.models.weights import name_of, open_weights
from luthier.quiet import quiet
from luthier.sections import ModelSection
from tiny import TEXTS, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path, **section: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    return load_model(path, ModelSection(name="tiny", **section), CPU, say=said.append), said


def edit(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


# -- formats ------------------------------------------------------------------------------------------------------


def test_a_model_comes_as_it_is_stored_ready_to_use(tmp_path: Path) -> None:
    model, said = load(tiny_llama(tmp_path))
    assert said == ["tiny: weights in fp32: as the checkpoint stores them"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.name_or_path == str(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


@pytest.mark.parametrize(
    ("stored", "asked", "taken", "reason"),
    [
        ("fp32", "auto", "fp32", "as the checkpoint stores them"),
        ("bf16", "auto", "bf16", "as the checkpoint stores them"),
        ("fp16", "auto", "bf16", "fp16 as the checkpoint stores, but a CPU computes in bf16"),
        ("bf16", "fp32", "fp32", "as the recipe says"),
        ("fp32", "bf16", "bf16", "as the recipe says"),
        ("fp32", "fp16", "bf16", "fp16 as the recipe says, but a CPU computes in bf16"),
    ],
)
def test_the_number_format_and_its_reason(tmp_path: Path, stored: str, asked: Any, taken: str, reason: str) -> None:
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model, said = load(tiny_llama(tmp_path, dtype=formats[stored]), dtype=asked)
    assert {name_of(parameter.dtype) for parameter in model.parameters()} == {taken}
    assert said == [f"tiny: weights in {taken}: {reason}"]


def test_formats_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability = torch.device("cuda", 0), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert choose_dtype("auto", torch.bfloat16, gpu)[0] == torch.bfloat16
    assert choose_dtype("auto", torch.float16, gpu) == (
        torch.bfloat16,
        "fp16 as the checkpoint stores, but fp16 overflows in training",
    )
    assert choose_dtype("fp16", torch.float32, gpu) == (torch.float16, "as the recipe says")
    capability[0] = (7, 0)
    assert choose_dtype("auto", torch.bfloat16, gpu) == (
        torch.float32,
        "the checkpoint is bf16, which Tesla V100 cannot compute in",
    )
    assert choose_dtype("auto", torch.float16, gpu)[0] == torch.float32
    with pytest.raises(ModelError, match=r"^model.dtype: bf16: Tesla V100 cannot compute in it; take fp32$"):
        choose_dtype("bf16", torch.float32, gpu)


def test_the_stored_format_is_read_from_the_file_not_from_the_config(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, dtype=torch.bfloat16)
    edit(path / "config.json", dtype="float32")
    assert open_weights(path).dtype == torch.bfloat16
    assert load(path)[1] == ["tiny: weights in bf16: as the checkpoint stores them"]


def test_devices() -> None:
    assert pick_device("cpu") == pick_device(["cpu"]) == pick_device(["cpu", "cpu"], rank=1) == CPU
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        with pytest.raises(RecipeError, match=r"^train.devices: \[0\]: there is no GPU here$"):
            pick_device([0])


def test_where_a_runs_devices_are_not_there_another_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_to_answer([0], said.append) == torch.device("cuda", 0) and not said
    assert device_to_answer([2, 3], said.append) == torch.device("cuda", 0)
    assert said == ["train.devices: [2, 3]: there is one GPU here, number 0; taken instead: cuda:0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_to_answer([0], said.append) == CPU
    assert said[1] == "train.devices: [0]: there is no GPU here; taken instead: cpu"


def test_each_process_has_its_device_and_what_comes_after_has_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert [pick_device([2, 0], rank) for rank in range(2)] == [torch.device("cuda", 2), torch.device("cuda", 0)]
    for rank in range(2):  # each says it, not only the one whose device it is
        with pytest.raises(RecipeError, match=r"^train.devices: \[0, 3\]: there are 3 GPUs here, counted from 0$"):
            pick_device([0, 3], rank)


def test_gpus_that_auto_leaves_alone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert idle_gpus("auto") == "2 GPUs are here, the first is used; train.devices: [0, 1] uses both"
    assert idle_gpus([0]) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert idle_gpus("auto") == "3 GPUs are here, the first is used; train.devices: [0, 1, 2] uses all"
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert idle_gpus("auto") is None


def test_footprint_counts_tied_weights_once(tmp_path: Path) -> None:
    apart = load(tiny_llama(tmp_path / "a"))[0]
    tied = load(tiny_llama(tmp_path / "b", tie_word_embeddings=True), dtype="bf16")[0]
    count = sum(parameter.numel() for parameter in apart.parameters())
    assert count == 110_912
    assert footprint(apart) == "433.2 KiB of weights (fp32), 110,912 parameters"
    assert sum(parameter.numel() for parameter in tied.parameters()) == count - 384 * 64
    assert footprint(tied) == "168.6 KiB of weights (bf16), 86,336 parameters"
    with torch.device("meta"):
        assert (
            footprint(torch.nn.Linear(50_000, 40_000, bias=False)) == "7.5 GiB of weights (fp32), 2,000.0 M parameters"
        )


# -- refusals -----------------------------------------------------------------------------------------------------


def refused(path: Path, message: str, **section: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load(path, **section)
    assert str(caught.value).startswith(message.format(path=path)), str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "{path}: there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "{path}: not a model folder (it has no config.json)")
    path = tiny_llama(tmp_path / "model")
    (path / "model.safetensors").rename(path / "other.safetensors")
    refused(path, "{path}: it holds no weights (model.safetensors, its shards with their index, or pytorch_model.bin)")
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"model: it holds no tokenizer \(tokenizer.json, tokenizer.model, vocab.json"):
        load_tokenizer(path)


def test_an_unfinished_download_is_recognised(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(path, "{path}/model.safetensors: not a whole safetensors file (")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(path, "{path}/model.safetensors: not a whole safetensors file (")
    (path / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    edit(path / "model.safetensors.index.json", weight_map=names)
    (path / "model-00001-of-00002.safetensors").write_bytes(whole)
    refused(path, "{path}: 1 of 2 weight files are missing, the first is model-00002-of-00002.safetensors; download")


def test_a_missing_tensor_is_an_error_and_a_strange_one_is_said(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    tensors = load_file(path / "model.safetensors")
    strange = tensors | {"model.layers.0.self_attn.rotary_emb.old": torch.ones(3)}
    save_file(strange, path / "model.safetensors", metadata={"format": "pt"})
    assert load(path)[1][1] == (
        "tiny: 1 stored tensors are no part of the model, the first is model.layers.0.self_attn.rotary_emb.old"
    )
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, "{path}: its files lack 1 tensors of the model, the first is model.layers.1.mlp.up_proj.weight")


def test_a_wrong_shape_is_an_error(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    edit(path / "config.json", vocab_size=400)
    refused(path, "{path}: it cannot be loaded (")


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_pickles_are_read_only_as_tensors(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    assert torch.equal(load(path)[0].lm_head.weight, tensors["lm_head.weight"])
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    refused(path, "{path}/pytorch_model.bin: refused: it is no plain file of tensors, and unpickling anything else may")


def test_vendor_code_is_refused_unless_trusted_or_not_needed(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    (path / "theirs.py").write_text("raise SystemExit('vendor code ran')")
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    edit(path / "config.json", auto_map=auto_map)
    for trusted in (False, True):
        assert type(load(path, trust_vendor_code=trusted)[0]).__name__ == "LlamaForCausalLM", "known natively: not run"
    edit(path / "config.json", model_type="baichuan", auto_map=auto_map)
    refused(
        path,
        "{path}: a model of type 'baichuan' runs Python code that came with it; read that code, "
        "and if you trust it set model.trust_vendor_code: true",
    )
    with pytest.raises(SystemExit, match="vendor code ran"):
        load(path, trust_vendor_code=True)


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    edit(path / "config.json", quantization_config={"quant_method": "gptq"})
    refused(path, "{path}: its weights are quantised (gptq); take the model's unquantised weights")
    (path / "config.json").write_text("{")
    refused(path, "{path}/config.json: not JSON (")
    (path / "config.json").write_text("[]")
    refused(path, "{path}/config.json: not a JSON object")
    edit_path = tmp_path / "strange"
    edit_path.mkdir()
    edit(edit_path / "config.json", model_type="nonesuch")
    refused(edit_path, "{path}: transformers ")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter / "adapter_config.json", peft_type="LORA")
    refused(adapter, "{path}: this is an adapter, not a model; its base is named in its adapter_config.json")
    edit(adapter / "config.json", model_type="llama")
    refused(adapter, "{path}: it is a model and an adapter at once; move adapter_config.json out of it")


# -- generation settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, "temperature 0.9, top_p 0.6"),
        ({"temperature": 0.9, "top_k": 5}, "temperature 0.9, top_k 5"),
        ({"num_return_sequences": 3}, "num_return_sequences 3"),
        ({"do_sample": True, "early_stopping": True}, "early_stopping True"),
        ({"do_sample": True, "pad_token_id": -1}, "pad_token_id -1"),
    ],
)
def test_contradictions_are_repaired_so_that_saving_works(tmp_path: Path, settings: Any, dropped: str) -> None:
    path = tiny_llama(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], **settings}))
    model, said = load(path)
    assert said[1:] == [f"tiny: generation_config.json contradicts itself; dropped: {dropped}"]
    assert model.generation_config.eos_token_id == [1, 3]
    model.generation_config.max_length = 300  # changed after loading is what transformers refuses to save
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again")[1][1:] == []


def test_sound_settings_stay(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    sound = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    (path / "generation_config.json").write_text(json.dumps(sound))
    settings, repairs = generation_settings(path)
    assert repairs == []
    assert {key: getattr(settings, key) for key in sound} == sound


def test_settings_beyond_repair_keep_their_token_ids(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "max_new_tokens": -7}))
    model, said = load(path)
    assert said[1].startswith("tiny: generation_config.json cannot be used (`max_new_tokens` must be greater than 0")
    assert said[1].endswith("only its token ids are kept")
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (3, None)
    model.save_pretrained(tmp_path / "again")


def test_settings_in_an_old_config_json_do_not_stop_a_save(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    (path / "generation_config.json").unlink()
    edit(path / "config.json", temperature=0.7, max_length=99)
    model, said = load(path)
    assert said[1:] == ["tiny: config.json contradicts itself; dropped: temperature 0.7"]
    assert (model.generation_config.max_length, model.generation_config.eos_token_id) == (99, 1)
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(tmp_path / "again")


# -- tokenizers ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_comes_whole_and_keeps_its_pad_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama(tmp_path))
    assert tokenizer.is_fast
    assert tokenizer.pad_token is None
    assert pad_id(tokenizer) == 1
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS] == TEXTS
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 384, "beyond the embedding of a model that did not grow with it"
    assert pad_id(tokenizer) == 1


def test_end_ids_are_all_of_them_once() -> None:
    tokenizer = tiny_tokenizer()
    assert end_ids(tokenizer, GenerationConfig()) == [1]
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=3)) == [1, 3]
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=[3, 1])) == [1, 3]


def test_a_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: its tokenizer cannot be loaded (")
    assert "\n" not in str(caught.value)


def test_real_tokenizers(shared: Path) -> None:
    folder = shared / "tokenizers"
    assert load_tokenizer(folder / "qwen2")("你好 world")["input_ids"] == [108386, 1879]
    assert load_tokenizer(folder / "llama2")("Hello")["input_ids"] == [1, 15043]
    assert pad_id(load_tokenizer(folder / "llama2")) == 2
    with pytest.raises(ModelError, match=r"opt: its tokenizer cannot be loaded \("):
        load_tokenizer(folder / "opt")


# -- silence ------------------------------------------------------------------------------------------------------

PLAIN_RUN = """
import sys
from pathlib import Path
from luthier.quiet import quiet
quiet()
import torch
from luthier.generate import generate
from luthier.models.adapters import adapter_off, attach, load_adapter, save_adapter
from luthier.models.load import load_model, load_tokenizer
from luthier.sections import GenerateSection, MethodSection, ModelSection
base, scratch, said = Path(sys.argv[1]), Path(sys.argv[2]), []
def load():
    return load_model(base, ModelSection(name="tiny"), torch.device("cpu"), say=said.append)
tokenizer = load_tokenizer(base)
whole = attach(load(), MethodSection(kind="full"), 1, say=said.append)
save_adapter(whole, scratch / "full", tokenizer)
tied = attach(load(), MethodSection(modules_to_save=["embed_tokens"], bias="all"), 1, say=said.append)
tied.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(0.1)
save_adapter(tied, scratch / "adapter", tokenizer)
model = load_adapter(load(), scratch / "adapter")
prompt = tokenizer("The quick")["input_ids"]
generate(model, tokenizer, [prompt, prompt * 3], GenerateSection(sample=True, top_p=0.9, max_new_tokens=4), [1])
with adapter_off(model):
    generate(model, tokenizer, [prompt], GenerateSection(stop=["x"], max_new_tokens=4), [1], on_text=said.append)
assert len(said) > 5
"""


def test_a_plain_run_prints_nothing(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    plain = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")}
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_RUN, base, tmp_path], capture_output=True, text=True, env=plain, check=False
    )
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)


@pytest.mark.parametrize("text", ["<html>", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index_of_weights_is_one_line(tmp_path: Path, text: str) -> None:
    path = tiny_llama(tmp_path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, "{path}/model.safetensors.index.json: not an index of weight files; download the model again")

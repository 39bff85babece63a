"""Base + adapter → one plain model folder, tensor by tensor. `verify.py` then proves that it is the same model.

The base's files are read one tensor at a time: memory holds the adapter and one output shard, never the model, unless
the adapter is no sum of low-rank products (DoRA, IA3, …), which PEFT merges.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from luthier.engine.memory import free_memory
from luthier.errors import ModelError, RunError
from luthier.folder import folder_atomic, write_json
from luthier.models import families
from luthier.models.adapters import (
    CONFIG,
    MERGE_NOTE,
    OWN,
    adapter_hash,
    load_adapter,
    merged_already,
    read_adapter,
    read_adapter_config,
    refuse_merged,
)
from luthier.models.load import (
    TOKENIZER_FILES,
    Say,
    check_architecture,
    end_ids,
    generation_settings,
    load_model,
    load_tokenizer,
    read_config,
)
from luthier.models.scaling import part_way
from luthier.models.tokenizers import save_tokenizer, vendor_tokenizer
from luthier.models.weights import DTYPES, Weights, name_of, open_weights
from luthier.rehearsal import bare_model
from luthier.sections import ModelSection
from luthier.words import size

SHARD_BYTES = 5 * 10**9
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
LICENCES = ("LICENSE*", "MODEL_LICENSE*", "NOTICE*", "USE_POLICY*")
PREFIX = "base_model.model."
MERGEABLE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
"""LoRA options that a merge honours, or that only matter in training; any other must be at its default."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    folder: Path
    kind: Literal["lora", "full"]
    dtype: str
    tensors: int
    changed: int
    untied: bool


@dataclass(frozen=True)
class _Change:
    """What the adapter does to one tensor, in fp32: W + scale·B·A, or a tensor in its place."""

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Output:
    """One tensor of the merged model: `source` is the stored tensor that it starts from."""

    name: str
    source: str
    dtype: torch.dtype | str
    bytes: int


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    *,
    say: Say,
    ends: Sequence[int] = (),
    note: Callable[[Path], None] | None = None,
    trained: ModelSection | None = None,
    strength: float = 1.0,
) -> MergeReport:
    """Write base + adapter as a model folder of its own, unverified yet.

    Each sum is computed in fp32 and rounded once to `dtype` (auto: as the base stores it). `adapter` may be a whole
    model, as full fine-tuning leaves it: then it is copied in `dtype`. `ends` are token ids that end an answer under
    the run's template; they join the end tokens in generation_config.json. `note` adds the
    caller's own files to the folder before it gets its name, so that `out` is never there without them. `trained` is
    how the base was held in training: where it was quantised, the verification measures what that changes. With another
    `strength` than 1 every weight goes that fraction of its way from base to tuned.
    Errors: ModelError when out is taken or part of the inputs, or the adapter cannot be merged into this base.
    """
    kind: Literal["lora", "full"] = "lora" if (adapter / CONFIG).is_file() else "full"
    _check_out(out, base, adapter)
    refuse_merged(base, adapter)
    root = base if kind == "lora" else adapter
    config = read_config(root)
    check_architecture(root, config, trusted=False)
    model = bare_model(root, torch.float32)
    weights = _as_named(families.as_model(open_weights(root), config), model)
    stored = _as_named(families.as_model(open_weights(base), read_config(base)), model)
    chosen = name_of(stored.dtype) if dtype == "auto" else dtype
    if chosen not in DTYPES:
        raise ModelError(f"{base} is stored in {chosen}; merge.dtype must name one of {', '.join(DTYPES)}")
    changes = _changes(base, adapter, strength) if kind == "lora" else {}
    tied, differ = _tied(model, weights)
    untied = differ or any(name in changes for pair in tied.items() for name in pair)
    outputs = _outputs(weights, stored, changes, tied, untied, dtype, adapter)
    _check_space(out, outputs)
    if kind == "full" and strength != 1:
        changes = _part_way(outputs, weights, stored, tied, strength)
    elif kind == "full":
        say(f"{adapter} is a whole model (full fine-tuning): copied in {chosen}, there is nothing to add to it")
    with folder_atomic(out) as folder:
        _write_weights(folder, weights, outputs, changes)
        _write_config(folder, families.saved_config(config), DTYPES[chosen], untied)
        _write_rest(folder, base, root, adapter, ends, say)
        record = {
            "kind": kind,
            "base": str(base.absolute()),
            "adapter": str(adapter.absolute()),
            "adapter_sha256": adapter_hash(adapter),
            "earlier": merged_already(base),
            "dtype": chosen,
            "verified": None,
            "figures": None,
            **_quantised(trained),
            **({} if strength == 1 else {"strength": strength}),
        }
        write_json(folder / MERGE_NOTE, record)
        if note is not None:
            note(folder)
    more = ("" if strength == 1 else f", at strength {strength:g}") + (", head untied" if untied else "")
    say(f"{out}: {len(changes)} of {len(outputs)} tensors changed, in {chosen}{more}")
    if opened_by := families.opened_by(config):
        say(f"{out}: {opened_by}")
    return MergeReport(out, kind, chosen, len(outputs), len(changes), untied)


def _quantised(trained: ModelSection | None) -> dict[str, Any]:
    """The note's place for how the merged model differs from the quantised one that was trained, if it was."""
    if trained is None or trained.quantize == "none":
        return {}
    held = trained.model_dump(include={"dtype", "quantize"})
    return {"quantised": {"trained": held, "figures": None, "reason": None}}


# -- what changes -------------------------------------------------------------------------------------------------


def _changes(base: Path, adapter: Path, strength: float) -> dict[str, _Change]:
    """The adapter's tensors as changes, by the name of the model's tensor. Errors: ModelError on what is not that."""
    config, tensors = read_adapter_config(adapter), read_adapter(adapter)
    if config.is_prompt_learning or config.peft_type.value in OWN:
        raise ModelError(f"{adapter}: an adapter of type {config.peft_type.value} cannot be merged; ship its folder")
    if type(config) is not LoraConfig or config.use_dora:  # AdaLoRA's is a kind of LoRA's
        return _by_peft(base, adapter, strength)
    plain = LoraConfig().to_dict()
    odd = [key for key, value in config.to_dict().items() if key not in MERGEABLE and value != plain.get(key)]
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        odd.append(f"init_lora_weights={config.init_lora_weights}")  # pissa, olora … move the base's own weights
    if odd:
        raise ModelError(f"{adapter}: an adapter with {', '.join(sorted(odd))} cannot be merged")
    changes: dict[str, _Change] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            scale = strength * _scale(config, module, tensor)
            changes[f"{module}.weight"] = _low_rank(tensor, b, scale, transposed=config.fan_in_fan_out)
        elif name.endswith(".lora_embedding_A"):
            module = name.removesuffix(".lora_embedding_A")
            b = tensors[key.replace("embedding_A", "embedding_B")]
            scale = strength * _scale(config, module, tensor)
            changes[f"{module}.weight"] = _low_rank(tensor, b, scale, transposed=True)
        elif ".lora_" not in name:
            changes[name.replace(".base_layer.", ".")] = _instead(tensor, strength)
        elif not name.endswith((".lora_B.weight", ".lora_embedding_B")):
            raise ModelError(f"{adapter}: its tensor {key} is none that a merge knows")
    return changes


def _by_peft(base: Path, adapter: Path, strength: float) -> dict[str, _Change]:
    """What adapters that are no sum of low-rank products make of the weights, as PEFT merges them: the whole model is
    in memory for it, in fp32. Errors: RunError where there is no room for that."""
    _check_memory(base, adapter)
    section = ModelSection(name=str(base), dtype="fp32")
    adapted = load_adapter(load_model(base, section, torch.device("cpu"), say=lambda _: None), adapter)
    modules = adapted.get_base_model().named_modules()
    layers = [name for name, module in modules if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    biases = [name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in adapted.luthier_biases]
    merged = adapted.merge_and_unload()
    # by the layer, as a tied weight has two names and named_parameters() tells only the first
    found = {f"{name}.{key}": v for name in layers for key, v in merged.get_submodule(name).named_parameters()}
    found |= {name: merged.get_parameter(name) for name in biases}
    return {name: _instead(value.detach(), strength) for name, value in found.items()}


def _scale(config: LoraConfig, module: str, a: Tensor) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (math.sqrt(a.shape[0]) if config.use_rslora else a.shape[0]))


def _low_rank(a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> _Change:
    """a: [r, in], b: [out, r]. An embedding stores its weight transposed, [in, out], and GPT-2's Conv1D."""

    def apply(weight: Tensor) -> Tensor:
        delta = b.float() @ a.float()
        return weight + scale * (delta.T if transposed else delta)

    shape = (b.shape[0], a.shape[1])
    return _Change(shape[::-1] if transposed else shape, apply)


def _instead(tensor: Tensor, strength: float) -> _Change:
    return _Change(tuple(tensor.shape), lambda base: part_way(base, tensor.float(), strength))


def _part_way(
    outputs: list[_Output], tuned: Weights, base: Weights, tied: dict[str, str], strength: float
) -> dict[str, _Change]:
    """What full fine-tuning moved, as changes of the tuned model's own tensors back on their way to the base's."""

    def back(name: str) -> Callable[[Tensor], Tensor]:
        return lambda moved: part_way(base.tensors[name].read(), moved, strength)

    twins = tied | {kept: alias for alias, kept in tied.items()}
    names = {one.name: one.source if one.source in base.tensors else twins[one.source] for one in outputs}
    floats = [one for one in outputs if isinstance(tuned.tensors[one.source].dtype, torch.dtype)]
    return {one.name: _Change(tuned.tensors[one.source].shape, back(names[one.name])) for one in floats}


def _as_named(weights: Weights, model: Any) -> Weights:
    """By the model's names: OPT-6.7B and GPT-2 are stored without the decoder's prefix, which transformers adds."""
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."

    def name_of_model(name: str) -> str:
        return prefix + name if name not in known and prefix + name in known else name

    return Weights(weights.folder, {name_of_model(name): stored for name, stored in weights.tensors.items()})


def _tied(model: Any, weights: Weights) -> tuple[dict[str, str], bool]:
    """Tensors that the model shares, alias → the stored one; and whether some differ that its config calls tied.

    transformers 5 takes tensors for untied where both are stored and differ, whatever the config says.
    """
    tied = {}
    for pair in model.all_tied_weights_keys.items():
        alias, kept = pair if pair[1] in weights.tensors else pair[::-1]
        stored = weights.tensors
        if alias not in stored or torch.equal(stored[alias].read(), stored[kept].read()):
            tied[alias] = kept
    return tied, len(tied) < len(model.all_tied_weights_keys)


def _outputs(
    weights: Weights,
    base: Weights,
    changes: dict[str, _Change],
    tied: dict[str, str],
    untied: bool,
    dtype: str,
    adapter: Path,
) -> list[_Output]:
    """Every tensor to write. Tied tensors are written once, or both where one of them was trained apart."""
    sources = {name: name for name in weights.tensors if name not in tied} | (tied if untied else {})
    if strangers := sorted(sources.keys() - base.tensors.keys() - tied.keys() - {*tied.values()}):
        raise ModelError(f"{adapter}: it holds {strangers[0]}, which {base.folder} does not have")
    if unknown := sorted(changes.keys() - sources.keys()):
        raise ModelError(f"{adapter}: it changes {unknown[0]}, which {weights.folder} does not have")
    outputs = []
    for name, source in sources.items():
        stored = weights.tensors[source]
        wanted = changes[name].shape if name in changes else base.tensors.get(source, stored).shape
        if wanted != stored.shape:
            raise ModelError(f"{adapter}: {name} is {list(wanted)} there and {list(stored.shape)} in {weights.folder}")
        kept = base.tensors.get(source, stored).dtype if dtype == "auto" else DTYPES[dtype]
        target = kept if isinstance(stored.dtype, torch.dtype) else stored.dtype
        width = target.itemsize if isinstance(target, torch.dtype) else 8
        outputs.append(_Output(name, source, target, width * math.prod(stored.shape)))
    return outputs


# -- what is written ----------------------------------------------------------------------------------------------


def _write_weights(folder: Path, weights: Weights, outputs: list[_Output], changes: dict[str, _Change]) -> None:
    shards = list(_shards(outputs))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {output.name: _merged(weights, output, changes.get(output.name)) for output in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        tensors.clear()  # before the next
        index |= {output.name: file for output in shard}
    if len(shards) > 1:
        total = sum(output.bytes for output in outputs)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _shards(outputs: list[_Output]) -> Iterator[list[_Output]]:
    shard: list[_Output] = []
    for output in outputs:
        if shard and sum(other.bytes for other in shard) + output.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(output)
    yield shard


def _merged(weights: Weights, output: _Output, change: _Change | None) -> Tensor:
    tensor = weights.tensors[output.source].read()
    if not isinstance(output.dtype, torch.dtype):
        return tensor
    exact = change.apply(tensor.float()) if change else tensor
    rounded = exact.to(output.dtype).contiguous()
    if output.dtype == torch.float16 and rounded.isinf().any() and not exact.isinf().any():
        raise ModelError(f"{output.name} holds {exact.abs().max():.4g}, beyond fp16's 65504; take merge.dtype=bf16")
    return rounded


def _write_config(folder: Path, config: dict[str, Any], dtype: torch.dtype, untied: bool) -> None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older name, for whom the base is written for
    config = config | {key: str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config | {"tie_word_embeddings": False} if untied else config)


def _write_rest(folder: Path, base: Path, root: Path, adapter: Path, ends: Sequence[int], say: Say) -> None:
    """Tokenizer, licence, generation settings. The adapter's own tokenizer wins: it has the run's template."""
    source = adapter if any((adapter / name).is_file() for name in TOKENIZER_FILES) else base
    for place, patterns in ((source, TOKENIZER), (base, LICENCES)):
        for file in (file for pattern in patterns for file in place.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)
    if (known := vendor_tokenizer(source)) is not None:
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)  # the vendor's: read over what is saved here
        save_tokenizer(known, folder)  # plain transformers opens it, without the vendor's code
    settings, repairs = generation_settings(root)
    for repair in repairs:
        say(f"{root.name}: {repair}")
    before = settings.eos_token_id
    settings.eos_token_id = list(dict.fromkeys([*end_ids(load_tokenizer(source), settings), *ends])) or None
    if settings.eos_token_id not in (before, [before]):
        say(f"generation_config.json: end tokens {before} become {settings.eos_token_id}")
    settings.save_pretrained(folder)


def _check_out(out: Path, base: Path, adapter: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: it exists and is not empty; remove it, or name another folder")
    for source in (base, adapter):
        if out.resolve().is_relative_to(source.resolve()):
            raise ModelError(f"{out}: it lies in {source}, which is only read; name a folder outside")


def _check_memory(base: Path, adapter: Path) -> None:
    """For the model in fp32 and the shard that is being written."""
    model = 4 * sum(math.prod(one.shape) for one in open_weights(base).tensors.values())
    needed, free = model + min(model, SHARD_BYTES), free_memory(torch.device("cpu"))
    if needed > free:
        raise RunError(
            f"{adapter}: what is no LoRA is merged with the whole model in memory: that takes {size(needed)}, and "
            f"{size(free)} are free; end what holds the rest, take a larger machine, or ship the adapter's folder"
        )


def _check_space(out: Path, outputs: list[_Output]) -> None:
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed, free = sum(output.bytes for output in outputs), shutil.disk_usage(place).free
    if needed > free:
        raise RunError(f"{out}: the model needs {size(needed)}, {size(free)} are free in {place}")

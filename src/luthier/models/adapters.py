"""How a model is changed: a method → a model with trainable parts; adapters on disk are plain PEFT folders."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from luthier.engine import dropout
from luthier.errors import ModelError
from luthier.folder import write_json
from luthier.models import quantize
from luthier.models.fused import difference, fused_names, tie, unfused
from luthier.models.load import Say
from luthier.models.tokenizers import save_tokenizer
from luthier.models.weights import name_of, weight_files
from luthier.sections import MethodSection

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
UNHEARD = "dt_proj"
"""Of Mamba: it multiplies by this layer's weight itself, and an adapter on the layer gets no gradient."""
MERGE_NOTE = "luthier_merge.json"
"""In a merged folder: which adapter it already contains, and whether that was verified."""


def attach(
    model: PreTrainedModel, method: MethodSection, seed: int, *, say: Say, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """Make the parts of the model trainable that the method trains, and say how many they are.

    lora: a PeftModel with fp32 adapters, A drawn from `seed`, B zero. full: every parameter. Base weights that
    themselves train (full, biases, modules_to_save) are turned to fp32, because a step of lr × gradient is mostly
    below bf16's 8 bits and would be lost; train.precision decides on the arithmetic, by autocast. Quantised weights
    stay quantised under it. Errors: ModelError when a name in target or modules_to_save matches no layer, when a
    quantised layer is to train, when PEFT cannot adapt one, or when an adapter's dropout would depend on how rows are
    cut.
    """
    if (method.kind == "full" or method.bias != "none" or method.modules_to_save) and model.dtype != torch.float32:
        say(f"weights turned from {name_of(model.dtype)} to fp32: those that train would lose small updates")
        quantize.widen(model)
    if method.kind == "full":
        model.requires_grad_(True)
        say(f"full: {_share(model)}")
        return model
    targets = _targets(model, method)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
        lora_dropout=method.dropout,
        bias=method.bias,
        target_modules=unfused(model, targets),
        fan_in_fan_out=_is_transposed(model, targets),
        modules_to_save=method.modules_to_save or None,
    )
    _say_untied(model, [*targets, *method.modules_to_save], say)
    if line := difference(model, targets, method.r):
        say(line)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A on the CPU, so a seed gives the same adapter on every device
        try:
            adapted = get_peft_model(model, config, revision=revision)
        except ValueError as error:
            raise _refused(model, targets, error) from error
    tie(adapted, targets)
    dropout.check_keys(adapted)
    _remember_biases(adapted, config)
    say(f"LoRA r {method.r}, alpha {method.alpha:g} on {' '.join(targets)}: {_share(adapted)}")
    return adapted


def save_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Write what was trained, and the tokenizer if given: a PEFT folder, or after full fine-tuning a whole model.

    A PEFT folder has adapter_config.json, with the base's absolute path, and adapter_model.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)  # "auto" would ask the hub
    # cloned where layers may share it: a safetensors file holds no tensor under two names
    apart = {name: tensor.clone() if ".lora_A." in name else tensor for name, tensor in sorted(tensors.items())}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in apart.items()}, folder / TENSORS)
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = str(Path(model.get_base_model().name_or_path).absolute())
    write_json(folder / CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()})


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach an adapter folder to its base, frozen, for inference.

    Errors: ModelError when the folder is no LoRA adapter, does not fit the model tensor by tensor, changes nothing,
    or is merged into this very model already.
    """
    config = read_adapter_config(folder)
    refuse_merged(Path(model.name_or_path), folder)
    config.inference_mode = True
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"{folder}: it does not fit {model.name_or_path} ({error})") from None
    adapted.requires_grad_(False)  # PEFT leaves trained biases trainable
    _remember_biases(adapted, config)
    fill_adapter(adapted, folder)
    return adapted.eval()  # PEFT's new layers begin in training mode: their dropout would act


def fill_adapter(model: PeftModel, folder: Path) -> None:
    """Put an adapter folder's numbers into a model that has the same adapter attached.

    Errors: ModelError naming the tensors that are missing, unknown or of another shape, and those of `read_adapter`.
    """
    tensors = read_adapter(folder)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    differences = {
        "lacks": sorted(expected.keys() - tensors.keys()),
        "holds what the model has no place for:": sorted(tensors.keys() - expected.keys()),
        "has another shape in": [
            name for name in sorted(expected.keys() & tensors.keys()) if expected[name].shape != tensors[name].shape
        ],
    }
    for verb, names in differences.items():
        if names:
            raise ModelError(f"{folder}: the adapter {verb} {names[0]} ({len(names)} of {len(expected)} tensors)")
    set_peft_model_state_dict(model, tensors)


def read_adapter_config(folder: Path) -> LoraConfig:
    """An adapter folder's configuration. Errors: ModelError when there is none or it is not LoRA."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: not an adapter folder (it has no {CONFIG})")
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder}: an adapter of type {kind}; LORA is the only one known")
    return LoraConfig.from_pretrained(str(folder))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter folder's tensors by PEFT's names, on the CPU. Errors: ModelError, also when they change nothing."""
    try:
        tensors: dict[str, Tensor] = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its {TENSORS} cannot be read ({error})") from None
    low_rank = [name for name in tensors if ".lora_" in name]
    if len(low_rank) == len(tensors) and not any(tensors[name].any() for name in low_rank if "_B" in name):
        raise ModelError(f"{folder}: the adapter has no effect: every B in it is zero")
    return tensors


def adapter_hash(folder: Path) -> str:
    """sha256 (hex) of an adapter's tensor file, or of a whole model's weight files in order."""
    digest = hashlib.sha256()
    for file in [folder / TENSORS] if (folder / TENSORS).is_file() else weight_files(folder):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def refuse_merged(base: Path, adapter: Path) -> None:
    """Errors: ModelError when this adapter is merged into this base already: it would count twice."""
    if adapter_hash(adapter) in merged_already(base):
        raise ModelError(f"{base}: {adapter} is merged into it already and would count twice; use the folder as it is")


def merged_already(base: Path) -> list[str]:
    """Hashes of the adapters that a model folder already contains, the latest first."""
    if not (base / MERGE_NOTE).is_file():
        return []
    note = json.loads((base / MERGE_NOTE).read_text(encoding="utf-8"))
    return [note["adapter_sha256"], *note["earlier"]]


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model inside the block: low-rank parts, trained copies and trained biases are out of the way."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter(), _original_biases(model):
            yield
    finally:
        model.requires_grad_(False)  # PEFT makes every adapter trainable when it switches it on again
        for parameter in trainable:
            parameter.requires_grad_(True)


def _targets(model: PreTrainedModel, method: MethodSection) -> list[str]:
    """Last names of the layers that get an adapter: the user's, or every linear layer but the head."""
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    body = [name for name, module in linear.items() if module is not model.get_output_embeddings()]
    kind = model.config.model_type
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    _check_names(method.modules_to_save, "modules_to_save", layers, kind)
    _refuse_quantised(model, method.modules_to_save)
    for name in method.modules_to_save:  # PEFT compares bare endings here: "norm" is "input_layernorm" too
        if more := [layer for layer in layers if layer.endswith(name) and not f".{layer}".endswith(f".{name}")]:
            raise ModelError(
                f"modules_to_save: {name} would take {more[0]} as well; write more of the name, as model.{name}"
            )
    if isinstance(method.target, str) and not body:
        raise ModelError(f"target: this {kind} model has no linear layers beside its head; name layers, or kind: full")
    if isinstance(method.target, str):
        return [name for name in _last_names(body) if name not in method.modules_to_save]
    candidates = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))]
    fused = fused_names(model)
    _check_names(method.target, "target", [*candidates, *fused], kind, shown=_last_names([*body, *fused]))
    if twice := sorted(set(unfused(model, method.target)) & set(method.modules_to_save)):
        raise ModelError(f"target and modules_to_save both name {', '.join(twice)}; train it one way or the other")
    return list(method.target)


def _is_linear(module: nn.Module) -> bool:
    """Does it give back what a linear layer does? Conv1D is one, stored transposed (GPT-2).

    Some that are called so do not: routers give back tuples, grouped layers other shapes; PEFT would break them.
    """
    if isinstance(module, Conv1D) or quantize.is_quantised(module):
        return True
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    given = torch.linspace(-1, 1, module.in_features).to(module.weight).expand(2, -1)
    try:
        with torch.no_grad():
            found, expected = module(given.clone()), nn.functional.linear(given, module.weight, module.bias)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    alike = isinstance(found, Tensor) and found.shape == expected.shape
    return alike and (found.is_meta or torch.allclose(found, expected, rtol=1e-2))


def _is_transposed(model: nn.Module, targets: Sequence[str]) -> bool:
    """Does the first layer that the targets name store its weight transposed? PEFT wants to be told (and is, once)."""
    named = (module for name, module in model.named_modules() if any(f".{name}".endswith(f".{t}") for t in targets))
    first = next(named, None)
    return Conv1D in (type(first), getattr(first, "source_cls", None))  # transformers notes it where it quantises one


def _refused(model: PreTrainedModel, targets: Sequence[str], error: ValueError) -> ModelError:
    """What PEFT says, without the advice that names its own options, and with ours."""
    said = re.sub(r"^\[PEFT:\S+\] ", "", re.split(r"\n|\. ", str(error))[0]).rstrip(". ")
    others = [name for name in targets if f"'{name}'" not in str(error) and name != UNHEARD]
    remedy = f"set method.target: [{', '.join(others)}]" if 0 < len(others) < len(targets) else "set method.kind: full"
    return ModelError(f"PEFT cannot adapt this {model.config.model_type} model: {said}; {remedy}")


def _check_names(
    asked: Sequence[str], field: str, layers: Sequence[str], kind: str, shown: Sequence[str] | None = None
) -> None:
    """Each name must be a layer's, its last part or its last parts, as PEFT matches them."""
    known = shown or _last_names(layers)
    for name in asked:
        if any(layer == name or layer.endswith(f".{name}") for layer in layers):
            continue
        close = sorted(difflib.get_close_matches(name, _last_names(layers), n=3, cutoff=0.4))
        hint = f"close: {', '.join(close)}; " if close else ""
        kinds = "linear layers" if field == "target" else "layers"
        there = f"its {kinds} are {', '.join(known)}"
        raise ModelError(f"{field}: {name} matches no layer of this {kind} model; {hint}{there}")


def _refuse_quantised(model: PreTrainedModel, saved: Sequence[str]) -> None:
    quantised = [name for name, module in model.named_modules() if quantize.is_quantised(module)]
    for name in saved:
        if layer := next((layer for layer in quantised if f".{layer}".endswith(f".{name}")), None):
            raise ModelError(
                f"modules_to_save: {name}: {layer} is quantised and cannot be trained whole; "
                "give it an adapter (method.target), or set model.quantize: none"
            )


def _last_names(layers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _say_untied(model: PreTrainedModel, names: Sequence[str], say: Say) -> None:
    """A tied head or embedding that trains leaves its twin: PEFT trains a copy, and the merge writes two tensors."""
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    trained = sorted(layer for layer in tied if any(f".{layer}".endswith(f".{name}") for name in names))
    if trained:
        say(f"{' and '.join(trained)}: tied to its twin in the base, trained apart from it here; a merge unties them")


def _share(model: nn.Module) -> str:
    total = sum(quantize.numbers(parameter) for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained:,} of {total:,} parameters train ({trained / total:.2%})".replace("%", " %")


def _remember_biases(model: PeftModel, config: LoraConfig) -> None:
    """Keep the base's own biases: PEFT trains them in place, so switching the adapter off does not bring them back."""
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias") and config.bias != "none"]
    model.luthier_biases = {name: model.get_parameter(name).detach().clone() for name in biases}


@contextmanager
def _original_biases(model: PeftModel) -> Iterator[None]:
    originals: dict[str, Tensor] = getattr(model, "luthier_biases", {})
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in originals}
    try:
        for name, original in originals.items():
            parameters[name].data = original.to(parameters[name])
        yield
    finally:
        for name, tensor in trained.items():
            parameters[name].data = tensor

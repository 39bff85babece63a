"""How a model is changed: a method → a model with trainable parts; adapters on disk are plain PEFT folders."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.engine import dropout
from luthier.errors import ModelError
from luthier.folder import write_json
from luthier.methods import METHODS, trains_base, whole
from luthier.models import quantize, starts
from luthier.models.fused import difference, tie
from luthier.models.kinds import config_of, settle
from luthier.models.load import Say
from luthier.models.ownmethods import decoder_layers
from luthier.models.tokenizers import save_tokenizer
from luthier.models.weights import name_of, weight_files
from luthier.sections import MethodSection

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
UNHEARD = "dt_proj"
"""Of Mamba: it multiplies by this layer's weight itself, and an adapter on the layer gets no gradient."""
MERGE_NOTE = "luthier_merge.json"
"""In a merged folder: which adapter it already contains, and whether that was verified."""


FEW = 2
"""Layers that `freeze` trains where the recipe says nothing."""
OWN = {"BOTTLENECK": "luthier.models.bottleneck", "ZERO_ATTENTION": "luthier.models.zero_attention"}
"""Types of adapters that PEFT knows only when this module is imported."""
KNOWN = (
    *("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", *OWN),
    *("ADALORA", "VERA", "OFT", "BOFT", "LOHA", "LOKR", "LN_TUNING"),
)
"""Types of adapters that can be loaded, as an adapter folder's peft_type."""


def attach(
    model: PreTrainedModel,
    method: MethodSection,
    seed: int,
    *,
    say: Say,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel | PeftModel:
    """Make the parts of the model trainable that the method trains, and say how many they are.

    full, freeze: the model itself, all of it or the last layers. Any other kind: a PeftModel, its new parts in fp32,
    drawn from `seed`, without effect at first. Base weights that themselves train (full, freeze, ln_tuning, biases,
    modules_to_save) are turned to fp32, because a step of lr × gradient is mostly below bf16's 8 bits and would be
    lost; train.precision decides on the arithmetic, by autocast. Quantised weights stay quantised under it.
    `tokenizer`: for method.init, the text that a soft prompt starts from.
    Errors: ModelError when a name in target or modules_to_save matches no layer, when a quantised layer is to train,
    when PEFT cannot adapt one, when a model has not the parts that the method changes, or when an adapter's dropout
    would depend on how rows are cut.
    """
    about = METHODS[method.kind]
    if not about.tuned:
        say(f"{method.kind}: no tuned default: through PEFT with its own settings, and the rate is a first guess")
    if trains_base(method) and model.dtype != torch.float32:
        say(f"weights turned from {name_of(model.dtype)} to fp32: those that train would lose small updates")
        quantize.widen(model)
    if whole(method.kind):
        return _unfrozen(model, method, say)
    if method.kind in ("prompt", "prefix", "p_tuning"):
        from luthier.models import soft_prompts

        soft = soft_prompts.attach(model, method, seed, say=say, tokenizer=tokenizer)
        say(f"{about.title}: {_share(soft)}")
        return soft
    config, named = _config(model, method)
    _say_untied(model, [*named, *method.modules_to_save], say)
    shared = method.kind in ("lora", "dora", "rslora")  # by layers with one A: a start of its own has each in PiSSA
    if shared and (line := difference(model, named, method.r)):
        say(line)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A on the CPU, so a seed gives the same adapter on every device
        try:
            adapted = get_peft_model(model, config, revision=revision)
        except ValueError as error:
            raise _refused(model, method, named, error) from error
        if method.kind in ("pissa", "olora"):
            starts.begin(adapted, method.kind)
    settle(adapted)
    if shared:
        tie(adapted, named)
    dropout.check_keys(adapted)
    _remember_biases(adapted, config)
    sizes = f" r {method.r}" if "r" in about.fields else ""
    sizes += f", alpha {method.alpha:g}" if "alpha" in about.fields else ""
    say(f"{about.title}{sizes}{' on ' if named else ''}{' '.join(named)}: {_share(adapted)}")
    if method.kind in ("pissa", "olora"):
        say(f"{method.kind}: saved as LoRA r {2 * method.r}, its difference from the start, for the base as it is")
    return adapted


def _config(model: PreTrainedModel, method: MethodSection) -> tuple[PeftConfig, list[str]]:
    """PEFT's configuration, and the names of the layers that it adapts, where the recipe can name them."""
    if method.kind == "bottleneck":
        from luthier.models import bottleneck

        return bottleneck.config_of(model, method), []
    if method.kind == "llama_adapter":
        from luthier.models import zero_attention

        return zero_attention.config_of(model, method), []
    return config_of(model, method)


def _unfrozen(model: PreTrainedModel, method: MethodSection, say: Say) -> PreTrainedModel:
    """Every weight trains, or those of the last layers. Errors: ModelError where there are not so many."""
    if method.kind == "full":
        model.requires_grad_(True)
        say(f"full: {_share(model)}")
        return model
    layers, count = list(decoder_layers(model, "freeze").values()), method.layers or FEW
    if count > len(layers):
        raise ModelError(f"method.layers: {count} are more than the model has ({len(layers)}); lower it")
    model.requires_grad_(False)
    for layer in layers[len(layers) - count :]:
        layer.requires_grad_(True)
    say(f"freeze: the last {count} of {len(layers)} layers train whole: {_share(model)}")
    return model


def save_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Write what was trained, and the tokenizer if given: a PEFT folder, or (full, freeze) a whole model.

    A PEFT folder has adapter_config.json, with the base's absolute path, and adapter_model.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    tensors, config = saved(model)
    # cloned where layers may share it: a safetensors file holds no tensor under two names
    apart = {name: tensor.clone() if ".lora_A." in name else tensor for name, tensor in sorted(tensors.items())}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in apart.items()}, folder / TENSORS)
    config["inference_mode"] = True
    config["base_model_name_or_path"] = str(Path(model.get_base_model().name_or_path).absolute())
    write_json(folder / CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()})


def saved(model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an adapter folder holds: tensors by PEFT's names, and the configuration."""
    config = model.peft_config["default"].to_dict()
    tensors = dict(get_peft_model_state_dict(model, save_embedding_layers=False))  # "auto" would ask the hub
    starts.as_lora(model, tensors, config)
    return tensors, config


def saved_bytes(model: PeftModel) -> int:
    """Of the tensors that an adapter folder will hold. The model may be one without numbers."""
    config = model.peft_config["default"]
    if not config.is_prompt_learning:
        return sum(tensor.nbytes for tensor in saved(model)[0].values())
    each = 2 * config.num_layers if config.peft_type.value == "PREFIX_TUNING" else 1  # P-tuning's network is not saved
    return int(4 * each * config.num_virtual_tokens * config.token_dim)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach an adapter folder to its base, frozen, for inference.

    Errors: ModelError when the folder is no adapter of a known kind, does not fit the model tensor by tensor, changes
    nothing, or is merged into this very model already.
    """
    config = read_adapter_config(folder)
    refuse_merged(Path(model.name_or_path), folder)
    config.inference_mode = True
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"{folder}: it does not fit {model.name_or_path} ({error})") from None
    settle(adapted)
    adapted.requires_grad_(False)  # PEFT leaves trained biases trainable
    _remember_biases(adapted, config)
    fill_adapter(adapted, folder)
    return adapted.eval()  # PEFT's new layers begin in training mode: their dropout would act


def fill_adapter(model: PeftModel, folder: Path) -> None:
    """Put an adapter folder's numbers into a model that has the same adapter attached.

    Errors: ModelError naming the tensors that are missing, unknown or of another shape, and those of `read_adapter`.
    """
    tensors = starts.as_trained(model, read_adapter(folder))
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


def read_adapter_config(folder: Path) -> PeftConfig:
    """An adapter folder's configuration. Errors: ModelError when there is none or its kind is not known."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: not an adapter folder (it has no {CONFIG})")
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind in OWN:
        importlib.import_module(OWN[kind])
    if kind not in KNOWN:
        raise ModelError(f"{folder}: an adapter of type {kind}; known are {', '.join(KNOWN)}")
    return PeftConfig.from_pretrained(str(folder))


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


def _refused(model: PreTrainedModel, method: MethodSection, targets: Sequence[str], error: ValueError) -> ModelError:
    """What PEFT says, without the advice that names its own options, and with ours."""
    said = re.sub(r"^\[PEFT:\S+\] ", "", re.split(r"\n|\. ", str(error))[0]).rstrip(". ")
    others = [name for name in targets if f"'{name}'" not in str(error) and name != UNHEARD]
    named = "target" in METHODS[method.kind].fields and 0 < len(others) < len(targets)
    remedy = f"set method.target: [{', '.join(others)}]" if named else "set method.kind: full"
    return ModelError(f"PEFT cannot adapt this {model.config.model_type} model: {said}; {remedy}")


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


def _remember_biases(model: PeftModel, config: Any) -> None:
    """Keep the base's own biases: PEFT trains them in place, so switching the adapter off does not bring them back."""
    biases = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and getattr(config, "bias", "none") != "none"
    ]
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

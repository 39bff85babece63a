"""What a run is trained with, loaded and checked: what cannot be right is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import ModelError
from luthier.folder import RunFolder
from luthier.loaded import Prompt, Say, load_data, load_encoder, prompt_ids
from luthier.methods import trains_base
from luthier.recipe import load_prompts
from luthier.resume import check_same_data, today_of
from luthier.sections import MethodSection, ModelSection, Recipe, TrainSection

if TYPE_CHECKING:
    from luthier.data.batches import Order
    from luthier.data.encode import Encoder
    from luthier.data.prepare import Data
    from luthier.training.distributed import World


@dataclass(frozen=True)
class Ground:
    """What a run needs whatever its method: the base model, and rows and prompts as ids.

    virtual: the most virtual tokens of any method that it was loaded for.
    """

    path: Path
    tokenizer: Any
    encoder: Encoder
    data: Data
    order: Order
    prompts: list[Prompt]
    ids: list[list[int]]
    model: Any
    virtual: int


@dataclass(frozen=True)
class Workbench:
    """What a run is trained with, loaded and checked.

    stored: the number format of the base's weights as loaded; weights: `models.weights.fingerprint` of its folder.
    """

    recipe: Recipe
    section: TrainSection
    model: Any
    stored: Any
    weights: str
    tokenizer: Any
    encoder: Encoder
    data: Data
    order: Order
    prompts: list[Prompt]


def workbench(
    recipe: Recipe, begun: RunFolder | None, world: World, say: Say, ground: Ground | None = None
) -> Workbench:
    """Load what the recipe names, or take it from `ground`, whose model is changed; `begun` is the run that goes on.

    Errors: those of `train` before it writes.
    """
    from luthier.engine.soft import virtual_of
    from luthier.generate import check_prompts
    from luthier.models.adapters import attach
    from luthier.models.weights import fingerprint
    from luthier.training.optim import peak_lr
    from luthier.training.start import autocast_dtype

    ground = ground or load_ground(recipe, [recipe.method], begun, world, say)
    model, path, tokenizer, data = ground.model, ground.path, ground.tokenizer, ground.data
    stored, method, seed = model.dtype, recipe.method, recipe.train.seed
    rate = peak_lr(recipe.train, recipe.method.kind, model)
    model = attach(model, method, seed, say=say, revision=recipe.model.revision, tokenizer=tokenizer)
    check_window(model, data, path, virtual_of(model).tokens)
    check_prompts(model, ground.ids, recipe.generate)
    section = with_precision(recipe.train, stored, model.dtype, world.device.type, say)
    autocast_dtype(model, section)
    _say_rate(recipe, rate, model, say)
    of_data = (ground.encoder, data, ground.order, ground.prompts)
    return Workbench(recipe, section, model, stored, fingerprint(path), tokenizer, *of_data)


def load_ground(
    recipe: Recipe, methods: Sequence[MethodSection], begun: RunFolder | None, world: World, say: Say
) -> Ground:
    """Tokenizer, rows and base model of a recipe, for runs with these methods. Errors: those of `train`."""
    from luthier.data.batches import order_of
    from luthier.engine.memory import give_back
    from luthier.models.load import footprint, idle_gpus, load_model
    from luthier.models.quantize import check_extras

    check_extras(recipe)
    path, tokenizer, encoder = load_encoder(recipe, say, today_of(begun))
    virtual = max(_check_before_data(path, recipe, method, tokenizer) for method in methods)
    prompts = list[Prompt](load_prompts(recipe.generate))
    ids = [prompt_ids(encoder, prompt, recipe.generate) for prompt in prompts]
    data = load_data(recipe, encoder, say)
    if begun is not None:
        check_same_data(begun, data.report)
    order = order_of(data.train_sources, recipe.data.seed, recipe.train.batch)
    if idle := idle_gpus(recipe.train.devices):
        say(idle)
    model = load_model(path, held(recipe, world.device), world.device, say=say)
    give_back()
    say(f"model: {footprint(model)} on {world.device}{f', in {world.size} processes' if world.size > 1 else ''}")
    check_vocabulary(model, data, path)
    return Ground(path, tokenizer, encoder, data, order, prompts, ids, model, virtual)


def _check_before_data(path: Path, recipe: Recipe, method: MethodSection, tokenizer: Any) -> int:
    """What the configuration alone tells to be wrong, before rows are encoded and weights are read. Errors: ModelError.

    A target that matches nothing, say: the method is tried on the model without its numbers. Gives its virtual tokens.
    """
    import torch

    from luthier.engine.soft import virtual_of
    from luthier.models.adapters import attach
    from luthier.models.load import check_architecture, read_config
    from luthier.models.quantize import quantization
    from luthier.rehearsal import bare_model

    native = check_architecture(path, read_config(path), recipe.model.trust_vendor_code)
    if not native or method.kind == "full":
        return 0
    bare = bare_model(path, torch.float32, quantized=quantization(recipe.model.quantize))
    return virtual_of(attach(bare, method, recipe.train.seed, say=lambda _: None, tokenizer=tokenizer)).tokens


def check_vocabulary(model: Any, data: Data, path: Path) -> None:
    """Errors: ModelError where the tokenizer gives an id that the model has no embedding for."""
    there = len(model.get_input_embeddings().weight)  # an adapter's layer has one too
    largest = max(part.largest_id() for part in (data.train, data.eval) if part is not None)
    if largest >= there:
        raise ModelError(
            f"{path}: its tokenizer gives id {largest:,}, and the model has embeddings for {there:,} tokens only; "
            "the two do not belong together, or a token was added to the tokenizer alone"
        )


def check_window(model: Any, data: Data, path: Path, virtual: int) -> None:
    """Errors: ModelError where a row, behind `virtual` tokens, is longer than the model reads: it knows no positions
    beyond its window."""
    from luthier.models.load import window_of

    window = (window_of(model) or math.inf) - virtual
    for part in (part for part in (data.train, data.eval) if part is not None):
        longest = int(part.lengths.argmax())
        if part.lengths[longest] > window:
            raise ModelError(
                f"{part.origin(longest)} has {part.lengths[longest]:,} tokens, and {path} reads {window:,} "
                f"(max_position_embeddings{f' less {virtual} virtual tokens' if virtual else ''}); "
                f"set data.max_length: {window}"
            )


def held(recipe: Recipe, device: Any) -> ModelSection:
    """Under train.precision: fp16 a GPU holds frozen weights so as well, unless the recipe names another format."""
    fp16 = recipe.train.precision == "fp16" and device.type == "cuda"
    if fp16 and not trains_base(recipe.method) and recipe.model.dtype == "auto":
        return recipe.model.model_copy(update={"dtype": "fp16"})
    return recipe.model


def with_precision(section: TrainSection, stored: Any, dtype: Any, device: str, say: Say) -> TrainSection:
    """auto follows the checkpoint's format, also where the weights were turned to fp32 because they train."""
    if section.precision == "fp16" and device == "cpu":
        say("train.precision: fp16 is for GPUs; a CPU computes in bf16 instead")
        return section.model_copy(update={"precision": "bf16"})
    if section.precision != "auto" or str(stored) != "torch.bfloat16" or dtype == stored:
        return section
    say("train.precision: auto is bf16, the checkpoint's format (by autocast: the weights that train stay fp32)")
    return section.model_copy(update={"precision": "bf16"})


def _say_rate(recipe: Recipe, rate: float, model: Any, say: Say) -> None:
    from luthier.training.optim import default_lr

    if recipe.train.lr == "auto":
        _, why = default_lr(recipe.method.kind, recipe.train.optimizer, model)
        say(f"train.lr: auto is {rate:g} for {recipe.method.kind}: {why}")

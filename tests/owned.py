"""What any PEFT method of our own must hold, family by family: the checks that tests/models/ shares."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from luthier.data.pack import pack, pad
from luthier.engine.forward import SummedLoss, adopt, on_device
from luthier.training.start import recompute_activations
from rows import VOCABULARY, random_rows, tiny, trained

FAMILIES = ["llama", "gemma", "gemma2", "qwen2", "qwen3", "mistral", "phi3", "opt", "glm", "yuan"]
MOST = [
    family if family in ("llama", "gemma2", "phi3", "opt", "yuan") else pytest.param(family, marks=pytest.mark.full)
    for family in FAMILIES
]
"""For what depends little on the family: those that are least alike, and the others in the full tier."""
CPU = torch.device("cpu")
ROWS = random_rows(5, longest=24)
EVERY = np.arange(5)
IDS = torch.arange(24).view(2, 12) * 7 % VOCABULARY


def attached(module: ModuleType, base: Any, seed: int = 2, **method: Any) -> Any:
    """The base with the method's adapter, in training mode; the same at every call."""
    adopt(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, module.config_of(base, SimpleNamespace(**method))).train()


def stirred(model: Any, std: float = 0.3) -> Any:
    """Every trainable number moved far enough to matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def packed(model: Any, seed: int | None = None) -> Tensor:
    return SummedLoss(model, "engine")(on_device(pack(ROWS, EVERY), CPU, seed))


def separate(model: Any, seed: int | None = None) -> Tensor:
    """Each row by itself, through transformers' own forward and loss."""
    losses = [SummedLoss(model, "plain")(on_device(pad(ROWS, [row], 0), CPU, seed)) for row in EVERY]
    return torch.stack(losses).sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names = list(trained(model))
    parameters = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """The loss and each gradient to 1e-5, one that is nearly nothing to 1e-5 of a hundredth of the largest."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    largest = max(float(value.norm()) for value in other[1].values())
    assert largest > 0.1
    for name, value in other[1].items():
        assert value.norm() > 0, name
        assert (one[1][name] - value).norm() <= 1e-5 * max(float(value.norm()), 1e-2 * largest), name


def check_first_step(module: ModuleType, family: str, **method: Any) -> None:
    """Before step 1 it is the base, to the last bit, one way or the other."""
    base = tiny(family).requires_grad_(False).train()  # a head that trains has another loss function
    adopt(base)
    expected = logits(base), packed(base).item()
    model = attached(module, base, **method)
    assert torch.equal(logits(model), expected[0])
    assert packed(model).item() == expected[1]


def check_packing(module: ModuleType, family: str, **method: Any) -> None:
    """Packed is separate rows; with checkpointing, where another pass goes forward before the backward, as well."""
    model = stirred(attached(module, tiny(family), **method))
    wanted = separate(model)
    wanted = wanted, gradients(model, wanted)
    found = packed(model)
    assert_same((found, gradients(model, found)), wanted)
    recompute_activations(model)
    found = packed(model)
    SummedLoss(model, "engine")(on_device(pack(ROWS, [0]), CPU))
    assert_same((found, gradients(model, found)), wanted)


def check_training(module: ModuleType, family: str, rate: float, **method: Any) -> None:
    """In eight steps the loss falls, every trainable tensor moves and no other does; switched off it is the base."""
    model = attached(module, tiny(family), **method)
    with model.disable_adapter():
        base = logits(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=rate)
    losses = []
    for _ in range(8):
        loss = packed(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0], losses
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name
    assert (logits(model) - base).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def check_saving(module: ModuleType, family: str, path: Path, **method: Any) -> None:
    """Saved and loaded by PEFT itself it gives the same logits; so does a second adapter in the same model."""
    model = stirred(attached(module, tiny(family), **method)).eval()
    model.save_pretrained(path / "one")
    one = logits(model)
    other = stirred(attached(module, tiny(family), seed=3, **method), 0.5).eval()
    other.save_pretrained(path / "two")
    two = logits(other)
    assert (one - two).abs().max() > 0.01
    base = tiny(family)
    adopt(base)
    loaded = PeftModel.from_pretrained(base, path / "one")
    assert torch.equal(logits(loaded), one)
    assert not trained(loaded)
    loaded.load_adapter(path / "two", "second")
    assert torch.equal(logits(loaded), one)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), two)
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), one)


def check_answers(module: ModuleType, family: str, **method: Any) -> None:
    """Greedy answers with a cache, to two prompts of unlike lengths, are those of a loop of whole forward passes."""
    model = stirred(attached(module, tiny(family), **method)).eval()
    prompts = [[3, 9, 27, 20, 41], [50, 8]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    model.generation_config.eos_token_id = None
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for prompt, answer in zip(prompts, found[:, width:].tolist(), strict=True):
        so_far, said = list(prompt), []
        for _ in range(6):
            said.append(int(logits(model, torch.tensor([so_far]))[0, -1].argmax()))
            so_far.append(said[-1])
        assert answer == said

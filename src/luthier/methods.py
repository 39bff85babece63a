"""The table of methods: what each is called, which of the recipe's keys it takes, its learning rate, can it be merged.

A rate is AdamW's, for a model of 7 billion weights, whose width is 4,096, and a step of some dozens of rows: most that
are published are for these. training/optim.py takes it to the model at hand. Its reason is printed with it; where a
paper or its authors' code is the source, it is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # pydantic is 0.1 s of `luthier --help`
    from luthier.sections import MethodSection

_LORA = frozenset({"r", "alpha", "dropout", "bias", "target", "modules_to_save"})
_START = _LORA - {"dropout"}  # dropout would hide from a pass what the weight itself is made of
_SOFT = "what it learnt is {}, and no weight of the model could hold it; ship the adapter folder, which is small"


class Method(NamedTuple):
    """A kind of method.

    fields: the keys of `method` that it takes, beside kind. rate, why: the learning rate where train.lr is auto, and
    the reason to print. scale: what it goes by: the model's width, the size of its embeddings' numbers (of which the
    rate is a share), or nothing. tuned: are its defaults tried here, or PEFT's. merges: can the model be written with
    it inside; reason: why not, and what can be shipped instead.
    """

    kind: str
    title: str
    fields: frozenset[str]
    rate: float
    why: str
    scale: Literal["width", "size", "none"] = "width"
    tuned: bool = True
    reason: str = ""

    @property
    def merges(self) -> bool:
        return not self.reason


_ALL = (
    Method(
        "lora", "LoRA", _LORA, 2e-4, "adapters start without effect and bear ten times the rate of full fine-tuning"
    ),
    Method("dora", "DoRA", _LORA, 2e-4, "LoRA's: the magnitudes beside it start at the weight's own (Liu et al. 2024)"),
    Method(
        "rslora",
        "rsLoRA",
        _LORA,
        1e-4,
        "half of LoRA's: its scale, alpha / √r, is √r times LoRA's (Kalajdzievski 2023); lower still for r above 32",
    ),
    Method(
        "pissa",
        "PiSSA",
        _START,
        1e-4,
        "half of LoRA's: A and B start as the weight's largest parts and both move from the first step "
        "(Meng et al. 2024 take 2e-5)",
    ),
    Method(
        "ia3",
        "IA3",
        frozenset({"target", "modules_to_save"}),
        6e-3,
        "factors that start at 1, a few in a thousand of LoRA's numbers: each must go further "
        "(Liu et al. 2022 take 3e-3)",
    ),
    Method(
        "prompt",
        "prompt tuning",
        frozenset({"virtual_tokens", "init"}),
        0.75,
        "a few embeddings bear the whole task and must leave those that they start from: a step is nearly as long as "
        "these are large (Llama 2: 0.013)",
        scale="size",
        reason=_SOFT.format("embeddings before a row's first token"),
    ),
    Method(
        "prefix",
        "prefix tuning",
        frozenset({"virtual_tokens", "init"}),
        2e-2,
        "keys and values are moved themselves, without a network in between, from those of real tokens: in fewer steps "
        "than where 5e-3 to 1e-2 is usual (Liu et al. 2022, P-tuning v2)",
        reason=_SOFT.format("keys and values that every token sees"),
    ),
    Method(
        "p_tuning",
        "P-tuning",
        frozenset({"virtual_tokens"}),
        1e-3,
        "the weights of a small network that makes the virtual tokens, as a network of its own",
        reason=_SOFT.format("embeddings before a row's first token"),
    ),
    Method(
        "llama_adapter",
        "LLaMA-Adapter",
        frozenset({"virtual_tokens", "layers"}),
        9e-3,
        "its gates start at zero and open with this rate (Zhang et al. 2023 take 9e-3)",
        reason=_SOFT.format("keys and values of its own, behind gates"),
    ),
    Method(
        "bottleneck",
        "bottleneck adapters",
        frozenset({"placement", "size", "dropout"}),
        3e-4,
        "new layers that start without effect (Hu et al. 2023, LLM-Adapters, take 3e-4)",
        reason=_SOFT.format("layers of its own with a non-linearity between them"),
    ),
    Method(
        "freeze",
        "the last layers",
        frozenset({"layers"}),
        1e-4,
        "whole weights move, but few layers of them: between full fine-tuning and adapters",
    ),
    Method("full", "full", frozenset(), 2e-5, "every weight moves, and a higher rate forgets what the model knew"),
    Method("olora", "OLoRA", _START, 1e-4, "PiSSA's, as it starts from parts of the weight too", tuned=False),
    Method(
        "adalora", "AdaLoRA", _START - {"bias"}, 1e-3, "its authors take 5e-4 to 1e-3 (Zhang et al. 2023)", tuned=False
    ),
    Method(
        "vera",
        "VeRA",
        frozenset({"r", "target", "modules_to_save"}),
        4e-3,
        "it trains scales alone; its authors take 4e-3 (Kopiczko et al. 2024)",
        tuned=False,
    ),
    Method("oft", "OFT", frozenset({"target", "modules_to_save"}), 5e-4, "rotations that start at none", "none", False),
    Method(
        "boft", "BOFT", frozenset({"target", "modules_to_save"}), 5e-4, "rotations that start at none", "none", False
    ),
    Method(
        "loha",
        "LoHa",
        frozenset({"r", "alpha", "target", "modules_to_save"}),
        1e-3,
        "a product of two low-rank products starts slower than LoRA's one",
        tuned=False,
    ),
    Method(
        "lokr",
        "LoKr",
        frozenset({"r", "alpha", "target", "modules_to_save"}),
        1e-3,
        "fewer numbers than LoRA's, each of them with more effect to reach",
        tuned=False,
    ),
    Method(
        "ln_tuning",
        "the norms",
        frozenset(),
        1e-3,
        "a few factors that start at the model's own must go some way",
        tuned=False,
    ),
)

METHODS = {method.kind: method for method in _ALL}
"""Every value of `method.kind`, in the order in which they are told."""

LOW_RANK = ("lora", "dora", "rslora", "pissa", "olora")
"""Kinds whose folder is PEFT's LoRA."""


def whole(kind: str) -> bool:
    """Is a run's result a whole model, not an adapter folder? (The last layers alone fit no other tool.)"""
    return kind in ("full", "freeze")


def trains_base(method: MethodSection) -> bool:
    """Do weights of the base themselves train? They are held in fp32 then, and the others with them."""
    adapted = method.bias != "none" or bool(method.modules_to_save)
    return method.kind in ("full", "freeze", "ln_tuning") or adapted


def takers(field: str) -> list[str]:
    """The kinds that take a key of `method`."""
    return [kind for kind, method in METHODS.items() if field in method.fields]

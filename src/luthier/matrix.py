"""The matrix: which method works on which family, in which number format, and why not where it does not.

tests/matrix tries every cell on a tiny real model, `luthier methods` shows them, docs/methods.md is written from them.
Nothing here knows torch or pydantic: the command line asks it before anything is loaded.
"""

from __future__ import annotations

from luthier.methods import METHODS, whole

FAMILIES = {
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "glm": "GLM-4, in transformers' layout",
    "chatglm3": "ChatGLM3 and ChatGLM2, in their vendor's layout",
    "llama": "Llama 2 and 3, and what is built alike",
    "mistral": "Mistral",
    "opt": "OPT",
    "phi3": "Phi-3",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
    "yuan2": "Yuan2",
}
"""The families that every cell is tried on, and the models that users know by them."""
FORMATS = {"none": "fp32/bf16", "int8": "int8", "nf4": "NF4"}
"""How the base is held: model.quantize → the words for it."""
COLUMNS = {
    "packed": "rows of any lengths in one pass, with the loss and the gradients of rows by themselves",
    "checkpointing": "train.activation_checkpointing: the same loss and gradients in less memory",
    "merge": "the result becomes part of the unquantised model's weights (luthier merge)",
    "resume": "a run that was stopped goes on to the same numbers, bit for bit",
}
"""What a cell is made of. Beside these, each is seen to train every tensor, to be saved and loaded, and to answer."""

_WHOLE = "trains {}, and weights in {{bits}} ({{key}}) cannot be trained; take lora, or {{key}}: none"
_SHAPE = "reads a layer's shape off weights that lie packed in {bits} ({key}); take lora, or {key}: int8"
_UNQUANTISED = {
    "full": dict.fromkeys(("int8", "nf4"), _WHOLE.format("every weight")),
    "freeze": dict.fromkeys(("int8", "nf4"), _WHOLE.format("whole layers")),
    "loha": {"nf4": _SHAPE},
    "lokr": {"nf4": _SHAPE},
}
"""Kinds that cannot be had on a base held in fewer bits: kind → bits → why, and what can."""
_OURS = ("llama_adapter", "bottleneck")


def unquantised(kind: str, bits: str, key: str = "model.quantize") -> str:
    """Why a kind is refused on a base held in `bits` ("int8", "nf4"), and what to take; "" where it is not.

    key: the recipe's key that asks for the bits.
    """
    return _UNQUANTISED.get(kind, {}).get(bits, "").format(bits=bits, key=key)


def verdict(kind: str, family: str, held: str) -> dict[str, str]:
    """A cell: each of COLUMNS → "" where it works, else the reason, in the words of what refuses it.

    kind: of METHODS; family: of FAMILIES; held: of FORMATS. Every family has the same cells: none is left out.
    """
    assert family in FAMILIES and held in FORMATS
    if why := unquantised(kind, held):
        return dict.fromkeys(COLUMNS, why)
    return {**dict.fromkeys(COLUMNS, ""), "merge": METHODS[kind].reason}


def result(kind: str) -> str:
    """What a run of this kind leaves behind, and who opens it."""
    if whole(kind):
        return "a whole model, in the run's model/"
    if kind in _OURS:
        return "an adapter folder, in the run's adapter/, which Luthier opens and plain PEFT does not know"
    if kind in ("pissa", "olora"):
        return "an adapter folder, in the run's adapter/, which plain PEFT opens as LoRA of twice the rank"
    return "an adapter folder, in the run's adapter/, which plain PEFT opens as well"

"""Print the table of docs/plan.md, the seven systems at real size: `.venv/bin/python tools/plan_systems.py` (minutes).

Nothing is fetched: the configurations are written here, the rest is in recipes/.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from luthier.models import quantize
from luthier.plan import Bare, Memory, _Assumed, memory
from luthier.quiet import quiet
from luthier.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4_096}
CONFIGS: dict[str, dict[str, Any]] = {
    "s1": LLAMA
    | {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "s2": {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2_048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "s3": LLAMA
    | {"hidden_size": 5_120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "s4": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "s5": {
        "model_type": "yuan",
        "vocab_size": 135_040,
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 8_192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 77_185,
        "eos_token_id": 77_185,
        "pad_token_id": 77_185,
    },
    "s6": {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": 4_096,
        "word_embed_proj_dim": 4_096,
        "ffn_dim": 16_384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2_048,
    },
    "s7": json.loads(
        """{"model_type": "chatglm", "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696,
        "num_layers": 28, "num_attention_heads": 32, "multi_query_attention": true, "multi_query_group_num": 2,
        "kv_channels": 128, "seq_length": 8192, "add_bias_linear": false, "add_qkv_bias": true, "rmsnorm": true,
        "layernorm_epsilon": 1e-5, "original_rope": true, "post_layer_norm": true, "attention_softmax_in_fp32": true,
        "apply_residual_connection_post_layernorm": false, "tie_word_embeddings": false, "eos_token_id": 2,
        "pad_token_id": 0}"""
    ),
}
FP16 = ("s6", "s7")
"""Recipes whose arithmetic, and so the weights on a GPU, is fp16; the others' is bf16."""
CAP = 16_384
"""Tokens of the largest pass that train.tokens_per_pass: auto takes on a GPU."""


def main() -> None:
    quiet()
    warnings.simplefilter("ignore", FutureWarning)
    beside = "adapter, gradients, optimizer"
    print(f"| | parameters | train | weights | {beside} | one row | together | a step's rows | together |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in CONFIGS:
        print(row(name), flush=True)


def row(name: str) -> str:
    (file,) = RECIPES.glob(f"{name}_*.yaml")
    recipe = load_recipe(file, check_files=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
        bare = Bare(recipe, Path(folder), torch.float16 if name in FP16 else torch.bfloat16, "cuda")
        model = bare.model()
        total = sum(quantize.numbers(parameter) for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found = [(tokens, rows, of_pass(bare, tokens, rows)) for tokens, rows in sizes(bare)]
    small = found[0][2]
    beside = small.adapter + small.gradients + small.optimizer + small.table
    cells = [name.upper(), f"{total / 1e9:.2f} G", f"{trained:,}", gib(small.weights), gib(beside)]
    for tokens, rows, each in found:
        cells += [f"{tokens:,} in {rows}", gib(each.weights + each.increase)]
    return f"| {' | '.join(cells)} |"


def sizes(bare: Bare) -> Iterator[tuple[int, int]]:
    """Tokens and rows of the passes: one row of max_length, and a step's, as far as auto takes them at once."""
    length, batch = bare.recipe.data.max_length, bare.recipe.train.batch
    for rows in (1, max(1, min(batch, CAP // length))):
        yield rows * length, rows


def of_pass(bare: Bare, tokens: int, rows: int) -> Memory:
    from luthier.data.pack import pack

    return memory(bare, pack(_Assumed(tokens // rows), range(rows)))


def gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


if __name__ == "__main__":
    main()

"""Makes what Luthier carries with it: a tiny model, really trained, and the data of its first fine-tune.

    python tools/make_embedded.py --out src/luthier/assets

The world is invented (embedded/world.py) and told in endless text from templates in English and Chinese (texts.py); a
tokenizer and a Llama of 1.5 M parameters are trained on nothing else, then the rows of a rule which that text does not
contain are written beside it (quickstart.py). Everything follows from fixed seeds; it takes some twenty minutes of
processor time.

    tiny/        config.json  generation_config.json  model.safetensors (bf16)  tokenizer.json  tokenizer_config.json
    quickstart/  recipe.yaml  train.jsonl  heldout.jsonl  valley.txt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

THREADS = 2  # a sum over threads depends on their number: part of the seed
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402
from embedded.check import share_exact  # noqa: E402
from embedded.pretrain import LONGEST, pretrain  # noqa: E402
from embedded.quickstart import make_rows, one_facts, save_quickstart  # noqa: E402
from embedded.texts import documents  # noqa: E402
from embedded.tokenizer import save_tokenizer, train_tokenizer  # noqa: E402
from embedded.world import World, make_world  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

LARGEST = 4_000_000  # bytes, all files together
TEXT_SEED, SAMPLE_SEED, WEIGHT_SEED = 2, 1, 3


def make(out: Path) -> None:
    world = make_world()
    (out / "tiny").mkdir(parents=True, exist_ok=True)
    (out / "quickstart").mkdir(exist_ok=True)
    save_quickstart(world, out / "quickstart")

    tokenizer = train_tokenizer(documents(world, SAMPLE_SEED))
    model = pretrain(tokenizer, documents(world, TEXT_SEED), WEIGHT_SEED)
    model.to(torch.bfloat16).save_pretrained(out / "tiny")
    save_tokenizer(tokenizer, out / "tiny", LONGEST)
    check(world, out)


def check(world: World, out: Path) -> None:
    """What was written, read back: small enough, sure of its facts, ignorant of the rule."""
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    tokenizer = AutoTokenizer.from_pretrained(out / "tiny")
    model = AutoModelForCausalLM.from_pretrained(out / "tiny", dtype=torch.float32).eval()
    facts = share_exact(model, tokenizer, one_facts(world.people))
    rule = share_exact(model, tokenizer, make_rows(world)[1])
    print(f"{size:,} bytes; facts known {facts:.1%}; held-out questions answered {rule:.1%}")
    assert size <= LARGEST and facts >= 0.95 and rule < 0.05


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that tiny/ and quickstart/ are written to")
    torch.set_num_threads(THREADS)
    make(parser.parse_args().out)

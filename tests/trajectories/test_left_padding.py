"""Prompts of unlike lengths are answered in one left-padded batch as one by one, straight after training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from luthier.generate import generate
from luthier.sections import GenerateSection, TrainSection
from rows import VOCABULARY, fit, lora, random_rows, tiny

NEW = 12
PROMPTS = [random_rows(1, seed, length, length)[0].ids.tolist() for seed, length in enumerate((3, 17, 9, 25, 1))]
"""Lengths on both sides of the windows of 8."""


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as training leaves it, its adapters no longer without effect."""
    model = lora(tiny(request.param))
    section = TrainSection(batch=8, steps=3, lr=0.03, warmup=0, tokens_per_pass=60)
    fit(tmp_path_factory.mktemp("run"), model, random_rows(16, longest=30), section)
    model.get_base_model().generation_config = GenerationConfig()  # no token ends an answer
    return model


def words() -> PreTrainedTokenizerFast:
    """One word for each id of the tiny vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({f"w{id}": id for id in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w2")


def draw(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own greedy generation of a left-padded batch: tokens [prompts, NEW], logits [prompts, NEW, V]."""
    width = max(map(len, prompts))
    drawn = model.generate(
        input_ids=torch.tensor([[2] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        generation_config=GenerationConfig(
            max_new_tokens=NEW, pad_token_id=2, output_logits=True, return_dict_in_generate=True
        ),
    )
    return drawn.sequences[:, width:], torch.stack(drawn.logits, dim=1)


def defined(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits [NEW, V] by the definition: eager attention, no cache, no padding."""
    row, logits = list(prompt), []
    left = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for _ in range(NEW):
            logits.append(model(torch.tensor([row])).logits[0, -1])
            row.append(int(logits[-1].argmax()))
    model.set_attn_implementation(left)
    return row[len(prompt) :], torch.stack(logits)


def test_a_left_padded_batch_is_answered_as_single_prompts(trained: Any) -> None:
    """Sabotage: the mask function not registered (transformers then hands no mask to the attention "luthier")."""
    assert trained.config._attn_implementation == "luthier"
    tokens, logits = draw(trained, PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        single_tokens, single_logits = draw(trained, [prompt])
        by_hand, by_hand_logits = defined(trained, prompt)
        assert tokens[place].tolist() == single_tokens[0].tolist() == by_hand
        torch.testing.assert_close(logits[place], single_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[place], by_hand_logits, rtol=1e-5, atol=1e-5)


def test_luthier_generate_answers_a_batch_as_single_prompts(trained: Any) -> None:
    """Sabotage: the mask function not registered."""
    tokenizer, section = words(), GenerateSection(max_new_tokens=NEW)
    together = generate(trained, tokenizer, PROMPTS, section, [])
    assert together == [generate(trained, tokenizer, [prompt], section, [])[0] for prompt in PROMPTS]
    assert [reply.ids for reply in together] == [defined(trained, prompt)[0] for prompt in PROMPTS]
    assert len({reply.text for reply in together}) == len(PROMPTS)

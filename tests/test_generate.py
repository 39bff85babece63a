"""Replies: the same alone and in a batch, every way of stopping, and text that streams whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import ModelError, RecipeError
from luthier.generate import Reply, generate
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import GenerateSection, ModelSection
from tiny import tiny_llama, tiny_qwen2, tiny_tokenizer

CPU = torch.device("cpu")
TEXTS = [
    "The quick brown fox",
    "Quote: Imagination is more",
    "春天来了，小鸟",
    "a",
    "It lives in the old town by the river. Where",
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    quiet()
    path = request.param(tmp_path_factory.mktemp("model"))
    return load_model(path, ModelSection(name="tiny"), CPU, say=lambda line: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    quiet()
    return load_model(tiny_llama(tmp_path_factory.mktemp("llama")), ModelSection(name="tiny"), CPU, say=print)


def ids(*texts: str) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] for text in texts]


def greedy_by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """No cache, no padding, no generate: the definition."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def test_batched_is_single_is_the_definition(model: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS)
    section = GenerateSection(max_new_tokens=20)
    together = generate(model, tokenizer, prompts, section, [], batch=3)
    alone = [generate(model, tokenizer, [prompt], section, [])[0] for prompt in prompts]
    assert together == alone
    assert [reply.ids for reply in together] == [greedy_by_hand(model, prompt, 20) for prompt in prompts]
    assert len({tuple(reply.ids) for reply in together}) == len(TEXTS)
    assert [reply.stopped for reply in together] == [False] * len(TEXTS)


def test_every_end_id_ends_a_row_and_only_its_own(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS)
    free = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=20), [])
    ends = [free[0].ids[7], free[1].ids[3]]
    replies = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=20), ends)
    for reply, whole in zip(replies, free, strict=True):
        places = [place for place, id in enumerate(whole.ids) if id in ends]
        assert reply.stopped is bool(places)
        assert reply.ids == whole.ids[: places[0] if places else None]
    assert [reply.stopped for reply in replies[:2]] == [True, True]
    assert not all(reply.stopped for reply in replies)


def test_max_length_counts_the_prompt_of_each_row(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS)
    replies = generate(llama, tokenizer, prompts, GenerateSection(max_length=40), [])
    assert [len(prompt) + len(reply.ids) for prompt, reply in zip(prompts, replies, strict=True)] == [40] * len(TEXTS)


def test_an_end_beyond_a_rows_own_budget_did_not_stop_it(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(TEXTS[4], "a")
    longer = generate(llama, tokenizer, prompts, GenerateSection(max_length=60), [])[0]
    room = 60 - len(prompts[0])
    following = greedy_by_hand(llama, prompts[0], room + 1)
    assert longer.ids == following[:room]
    if following[room] not in longer.ids:
        assert not generate(llama, tokenizer, prompts, GenerateSection(max_length=60), [following[room]])[0].stopped


def test_limits_are_errors(llama: Any) -> None:
    tokenizer = tiny_tokenizer()
    window = [[5] * 3, [5] * 256]
    with pytest.raises(
        ModelError, match=r"^prompt 2 has 256 tokens; this model reads 256, prompt and answer together$"
    ):
        generate(llama, tokenizer, window, GenerateSection(), [])
    with pytest.raises(RecipeError, match=r"^generate.max_length: 3 leaves no room for an answer: prompt 1 has 3 tok"):
        generate(llama, tokenizer, window[:1], GenerateSection(max_length=3), [])
    with pytest.raises(RecipeError, match="^prompt 1 is empty$"):
        generate(llama, tokenizer, [[]], GenerateSection(), [])


def test_the_window_bounds_every_position(llama: Any) -> None:
    """Rows that share a pass never take each other beyond the last position."""
    seen: list[int] = []
    hook = llama.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int((args[1] if len(args) > 1 else kwargs["position_ids"]).max())),
        with_kwargs=True,
    )
    prompts = [[7] * 240, [8] * 20, [9] * 250]
    replies = generate(llama, tiny_tokenizer(), prompts, GenerateSection(max_new_tokens=30), [])
    hook.remove()
    assert [len(reply.ids) for reply in replies] == [16, 30, 6]
    assert max(seen) <= 255


def test_the_models_own_settings_count_for_nothing(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS[:2])
    plain = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=12), [])
    own = llama.generation_config
    try:
        own.repetition_penalty, own.do_sample, own.temperature, own.num_beams = 5.0, True, 9.0, 3
        own.suppress_tokens, own.max_length = [plain[0].ids[0]], 5
        assert generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=12), []) == plain
        assert llama.generation_config is own
    finally:
        own.repetition_penalty = own.do_sample = own.temperature = own.num_beams = None
        own.suppress_tokens = own.max_length = None


def test_training_mode_is_left_and_restored(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, attention_dropout=0.9)
    model = load_model(path, ModelSection(name="tiny"), CPU, say=print)
    tokenizer, prompts, section = tiny_tokenizer(), ids(*TEXTS[:2]), GenerateSection(max_new_tokens=8)
    still = generate(model, tokenizer, prompts, section, [])
    assert not model.training
    model.train()
    assert generate(model, tokenizer, prompts, section, []) == still
    assert model.training


def test_sampling_is_seeded_and_its_fields_reach_it(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS)

    def draw(**fields: Any) -> list[Reply]:
        return generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=12, sample=True, **fields), [])

    before = torch.random.get_rng_state()
    greedy = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=12), [])
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(top_k=1) == draw(top_p=1e-6) == draw(temperature=1e-5) == greedy
    assert draw(top_k=None, temperature=100.0) != draw(top_k=50, temperature=100.0), "null is every token, not 50"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stop_texts_end_and_cut(llama: Any) -> None:
    tokenizer, prompts = tiny_tokenizer(), ids(*TEXTS)
    free = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=30), [])
    text = free[0].text
    mark = next(text[i : i + 3] for i in range(8, 20) if "\ufffd" not in text[i : i + 3])
    replies = generate(llama, tokenizer, prompts, GenerateSection(max_new_tokens=30, stop=["never there", mark]), [])
    assert replies[0].stopped
    assert replies[0].text == text[: text.index(mark)]
    assert replies[0].ids == next(
        free[0].ids[:n] for n in range(30) if mark in tokenizer.decode(free[0].ids[:n], skip_special_tokens=True)
    )
    for reply, whole in zip(replies, free, strict=True):
        assert reply.stopped is (mark in whole.text)
        assert reply.text == whole.text.partition(mark)[0]


def test_a_special_token_is_a_stop_text_too(llama: Any) -> None:
    tokenizer, end = tiny_tokenizer(), 3
    bias = torch.zeros(llama.config.vocab_size)
    bias[end] = 1e9
    hook = llama.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    reply = generate(llama, tokenizer, ids("a"), GenerateSection(max_new_tokens=5, stop=["<|im_end|>"]), [])[0]
    hook.remove()
    assert reply == Reply(text="", ids=[], stopped=True)


def writes(model: Any, text: str) -> tuple[list[int], Callable[[], None]]:
    """Make the model write `text` whatever it is asked: (its ids, the undoing)."""
    wanted = [*tiny_tokenizer()(text)["input_ids"], 1]
    state = {"calls": 0}

    def force(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e9)
        forced[..., wanted[min(state["calls"], len(wanted) - 1)]] = 0
        state["calls"] += 1
        return forced

    return wanted[:-1], model.lm_head.register_forward_hook(force).remove


@pytest.mark.parametrize(
    ("stop", "expected"),
    [([], "你好，世界 🎻 naïve\n END"), (["世界 🎸", "界 🎻 n"], "你好，世"), (["ND?", "\n E"], "你好，世界 🎻 naïve")],
)
def test_streaming_never_breaks_a_character_or_a_stop_text(llama: Any, stop: list[str], expected: str) -> None:
    text = "你好，世界 🎻 naïve\n END"
    wanted, undo = writes(llama, text)
    assert len(wanted) > len(text), "the text's characters are several tokens"
    pieces: list[str] = []
    section = GenerateSection(max_new_tokens=60, stop=stop)
    reply = generate(llama, tiny_tokenizer(), ids("春 fox"), section, [1], on_text=pieces.append)[0]
    undo()
    assert reply.text == expected
    assert reply.stopped
    assert "".join(pieces) == expected
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 2


def test_broken_bytes_still_arrive_at_the_end(llama: Any) -> None:
    """A reply that really ends inside a character streams what its text has."""
    wanted, undo = writes(llama, "ab你")
    pieces: list[str] = []
    section = GenerateSection(max_new_tokens=len(wanted) - 1)
    reply = generate(llama, tiny_tokenizer(), ids("fox"), section, [1], on_text=pieces.append)[0]
    undo()
    assert not reply.stopped
    assert reply.text.startswith("ab\ufffd")
    assert "".join(pieces) == reply.text


def test_sentencepiece_keeps_the_blank_that_continues_a_prompt(shared: Path, llama: Any) -> None:
    from luthier.models.load import load_tokenizer

    tokenizer = load_tokenizer(shared / "tokenizers" / "llama2")
    prompt = tokenizer("Quote: Imagination is more", add_special_tokens=True)["input_ids"]
    from luthier.generate import _text

    than = tokenizer("more than", add_special_tokens=False)["input_ids"][-1:]
    assert tokenizer.decode(than) == "than"
    assert _text(tokenizer, prompt, than) == " than"


def test_no_prompts_no_replies(llama: Any) -> None:
    assert generate(llama, tiny_tokenizer(), [], GenerateSection(), []) == []

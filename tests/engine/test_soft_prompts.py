"""Prompt, P- and prefix tuning through the engine, against PEFT's own forward on each row by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import FalconConfig, FalconForCausalLM, LlamaForCausalLM

from luthier.data.pack import behind, pack, pad, passes
from luthier.engine.forward import SummedLoss, adopt, inputs_of, on_device
from luthier.engine.reference import reference_loss
from luthier.engine.soft import virtual_of
from luthier.errors import ModelError, RecipeError
from luthier.models import soft_prompts
from luthier.models.soft_prompts import attach, begun
from luthier.sections import EngineSection, TrainSection
from luthier.training.distributed import World
from luthier.training.gradients import Gradients
from luthier.training.start import recompute_activations
from rows import Rows, fit, random_rows, tiny, trained
from tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
CPU = torch.device("cpu")
COUNT = 5
KINDS = ["prompt", "p_tuning", "prefix"]
SAMPLE = {
    *(("llama", kind) for kind in KINDS),
    *(("gemma2", kind) for kind in ("prompt", "prefix")),
    *(("yuan", kind) for kind in ("prompt", "prefix")),
    ("opt", "p_tuning"),
    ("opt", "prefix"),
    ("mistral", "prefix"),
    ("glm", "prefix"),
}
"""Of the matrix: what `make test` runs."""
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "opt", "glm", "phi3", "mistral", "yuan"]
MATRIX = [
    pytest.param(family, kind, marks=() if (family, kind) in SAMPLE else pytest.mark.full)
    for family in FAMILIES
    for kind in KINDS
]
ALONE = random_rows(5, longest=30)
HEAD = list(range(7, 35))  # twelve of its 28 tokens are the second level of a tree
SHARED = Rows([(HEAD[:n] + ids[:8], 4) for n, (ids, _) in zip((28, 28, 16, 28, 28), ALONE.rows, strict=True)])
EVERY = torch.arange(5).numpy()


def method(kind, **given):
    return SimpleNamespace(**{"kind": kind, "virtual_tokens": COUNT, "init": None, **given})


def soft(family, kind, **given):
    """A tiny model with a soft prompt, moved away from where it began."""
    model = attach(tiny(family), method(kind, **given), 0, say=lambda line: None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.prompt_encoder.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return model.train()


def given(model, part, fast=True):
    return on_device(behind(part, virtual_of(model)), CPU, fast_attention=fast)


def result(model, losses):
    """Loss and gradients of all that trains."""
    loss = sum(losses)
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    return loss.item(), dict(zip(names, found, strict=True))


def by_peft(model, rows=ALONE):
    return result(model, [reference_loss(model, given(model, pad(rows, [row], 0))) for row in EVERY])


def by_us(model, parts, route="engine", fast=True):
    return result(model, [SummedLoss(model, route)(given(model, part, fast)) for part in parts])


def assert_equal(mine, other):
    assert mine[0] == pytest.approx(other[0], rel=1e-6)
    assert mine[1].keys() == other[1].keys()
    for name, value in other[1].items():
        assert value.norm() > 1e-3, name
        assert (mine[1][name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize(("family", "kind"), MATRIX)
def test_a_pass_has_the_loss_and_gradient_of_pefts_rows_by_themselves(family, kind):
    """Sabotages that it catches: positions that do not begin behind the virtual tokens; a window that leaves them out;
    a predecessor (Yuan) that is none; a prefix that only the first row sees."""
    model = soft(family, kind)
    expected, shared = by_peft(model), by_peft(model, SHARED)
    padded = result(model, [reference_loss(model, given(model, pad(ALONE, EVERY, 0)))])
    assert_equal(padded, expected)
    assert_equal(by_us(model, [pad(ALONE, EVERY, 0)], "plain"), expected)
    adopt(model)
    for route, fast in (("engine", True), ("engine", False), ("own_logits", True)):
        assert_equal(by_us(model, [pack(ALONE, EVERY)], route, fast), expected)
    assert_equal(by_us(model, [pad(ALONE, EVERY, 0)], "plain"), expected)
    (tree,) = passes(SHARED, EVERY, 10_000, shared=True)
    assert max(segment.parent for segment in tree.segments) > 0  # two levels
    for fast in (True, False):
        assert_equal(by_us(model, [tree], "engine", fast), shared)
    recompute_activations(model)
    assert_equal(by_us(model, [pack(ALONE, [0, 1]), pack(ALONE, [2, 3, 4])]), expected)
    assert_equal(by_us(model, [pad(ALONE, EVERY, 0)], "plain"), expected)
    assert_equal(by_us(model, [tree]), shared)
    assert_equal(result(model, [reference_loss(model, given(model, pad(ALONE, EVERY, 0)))]), expected)


def greedy(model, prompts, length=6):
    """Answers by a loop over the engine's own forward, each prompt by itself."""
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(length):
                pass_ = given(model, pack(Rows([(ids, len(ids) - 1)]), [0]))
                ids.append(int(model.get_base_model()(**inputs_of(model, pass_)).logits[0, -1].argmax()))
            answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize(("family", "kind"), MATRIX)
def test_answers_are_those_of_the_engines_forward(family, kind):
    """A batch is padded on the left, and no pad may come between the virtual tokens and a row: Yuan's filter and a
    window would see it. Behind a prefix with a window, prompts of one length are a batch."""
    model = soft(family, kind).eval()
    base = model.get_base_model()
    prompts = [ids[:length] for (ids, _), length in zip(ALONE.rows, (3, 6, 9), strict=False)]
    groups = [[one] for one in prompts] if soft_prompts.alone(model) else [prompts]
    drawn = []
    for group in groups:
        width = max(map(len, group))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in group])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in group])
        start = begun(model, ids, mask)
        base.generation_config.eos_token_id = None
        out = base.generate(**start.given, max_new_tokens=6, do_sample=False, pad_token_id=0)
        drawn += out[:, start.width :].tolist()
    adopt(model)
    assert drawn == greedy(model, prompts)
    assert len({tuple(answer) for answer in drawn}) == 3  # or they say little
    assert soft_prompts.alone(model) == (kind == "prefix" and family in ("gemma2", "mistral"))


def saved(path, **config):
    """A tiny Llama and its tokenizer, from disk."""
    return LlamaForCausalLM.from_pretrained(tiny_llama(path, **config)), tiny_tokenizer()


def test_a_prompt_starts_from_embeddings(tmp_path):
    model, tokenizer = saved(tmp_path)
    table, said = model.model.embed_tokens.weight.detach(), []
    text = "the river</s>"
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert len(ids) > len(tokenizer(text)["input_ids"])  # what a user typed is no end of a text
    adapted = attach(
        model, method("prompt", init=text, virtual_tokens=2 * len(ids) - 1), 0, say=said.append, tokenizer=tokenizer
    )
    assert adapted.get_prompt(1)[0].equal(table[[*ids, *ids][:-1]])
    assert said == [f"prompt: {2 * len(ids) - 1} virtual tokens, from the text of method.init"]
    drawn = attach(saved(tmp_path)[0], method("prompt", virtual_tokens=None), 3, say=said.append, tokenizer=tokenizer)
    found = (drawn.get_prompt(1)[0][:, None] == table).all(-1).nonzero()
    assert len(found) == 50 and found[:, 1].min() > 3  # real tokens, none of the four special ones
    assert said[1:] == ["prompt: 50 virtual tokens, from random tokens of the vocabulary"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_starts_from_a_texts_keys_and_values(family, monkeypatch):
    """The base on text and row is the model behind the prefix on the row alone. Longer than the window of eight."""
    text, (ids, _) = list(range(20, 31)), ALONE.rows[0]
    wanted = tiny(family).eval()(input_ids=torch.tensor([text + ids])).logits[:, len(text) :]
    monkeypatch.setattr(soft_prompts, "_ids", lambda said, tokenizer: text)
    model = attach(tiny(family), method("prefix", init="a text", virtual_tokens=11), 0, say=lambda line: None).eval()
    adopt(model)
    found = model.get_base_model()(**inputs_of(model, given(model, pack(Rows([(ids, 1)]), [0])))).logits
    if family == "yuan":  # a text's last token is no predecessor of a row's first
        assert (found[:, :1] - wanted[:, :1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_answers_alike_in_plain_peft(tmp_path, kind):
    base, tokenizer = saved(tmp_path / "base")
    given_text = {} if kind == "p_tuning" else {"init": "Where does it live?"}
    model = attach(base, method(kind, virtual_tokens=None, **given_text), 0, say=lambda line: None, tokenizer=tokenizer)
    if kind == "prefix":
        assert virtual_of(model).tokens == len(tokenizer("Where does it live?")["input_ids"])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        bare = base(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        again = PeftModel.from_pretrained(saved(tmp_path / "base")[0], tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
        adopt(again)
        pass_ = given(again, pack(Rows([(ids[0].tolist(), 1)]), [0]))
        ours = again.get_base_model()(**inputs_of(again, pass_)).logits
        torch.testing.assert_close(ours[:, -4:], expected[:, -4:], rtol=1e-4, atol=1e-4)
        assert (expected[:, -4:] - bare).abs().max() > 0.1
        with again.disable_adapter():
            assert virtual_of(again).tokens == 0


def test_what_cannot_be_is_one_line(tmp_path):
    base, tokenizer = saved(tmp_path)
    text = "The quick brown fox jumps over the lazy dog."
    count = len(tokenizer(text)["input_ids"])
    for asked, error, line in [
        (
            method("prompt", init=text, virtual_tokens=2),
            RecipeError,
            f"method.init has {count} tokens, and method.virtual_tokens is 2: .* set method.virtual_tokens: {count}",
        ),
        (method("p_tuning", virtual_tokens=256), ModelError, "virtual_tokens: 256, but this model reads 256 tokens"),
    ]:
        with pytest.raises(error, match=line):
            attach(base, asked, 0, say=lambda line: None, tokenizer=tokenizer)
    falcon = FalconForCausalLM(FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ModelError, match="this falcon model has an attention of its own; set method.kind: prompt"):
        attach(falcon, method("prefix"), 0, say=lambda line: None)
    model = soft("llama", "prefix")
    recompute_activations(model)
    with pytest.raises(ModelError, match="activation_checkpointing: false, or leave engine.packed on"):
        by_us(model, [pad(ALONE, EVERY, 0)], "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_goes_on(tmp_path, kind):
    """Proven, with activations computed again; a checkpoint has the encoder itself, of which the folder has none."""
    section = TrainSection(batch=5, epochs=4, lr=0.01, save_every=2, activation_checkpointing=True, log_every=1)
    said, straight = [], soft("llama", kind)
    fit(tmp_path / "one", straight, ALONE, section, kind="lora", say=said.append)
    assert [line for line in said if line.startswith("engine = reference")]
    resumed = soft("llama", kind)
    fit(tmp_path / "two", resumed, ALONE, section, kind="lora", resume=tmp_path / "one/checkpoints/step-000002")
    for name, value in trained(straight).items():
        assert value.equal(trained(resumed)[name]), name
        assert not value.equal(trained(soft("llama", kind))[name]), name


def test_a_step_is_the_same_however_it_is_cut():
    found = []
    for route, tokens in (("engine", 1000), ("engine", 30), ("own_logits", 1000), ("plain", 60)):
        model = soft("opt", "prompt")
        adopt(model)
        gradients = Gradients(
            model, route, World.alone(CPU), None, pad_id=0, autocast=None, beat=lambda: None, engine=EngineSection()
        )
        step = gradients.of_step(ALONE, EVERY, 0, tokens, None)
        found.append((step.loss.item(), {"prompt": next(model.prompt_encoder.parameters()).grad}))
        most = max(part.ids.numel() for part in gradients.given(ALONE, EVERY, 0, tokens).parts)
        assert most <= max(tokens, COUNT + int(ALONE.lengths.max()))
    for one in found[1:]:
        assert_equal(one, found[0])

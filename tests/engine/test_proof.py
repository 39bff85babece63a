"""The proof before step 1: what equals the reference is used, what does not is found out and said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from luthier.data.pack import Segment
from luthier.engine import attention, dropout, forward, loss, proof, reference
from luthier.engine.proof import prove, rows_to_prove
from luthier.errors import ModelError
from luthier.models.adapters import attach
from luthier.quiet import quiet
from luthier.sections import MethodSection, TrainSection
from rows import ROTARY, SIZE, Rows, fit, lora, random_rows, tiny, trained

CPU = torch.device("cpu")
ROWS = random_rows(12, longest=30)
FOUR = np.array([0, 3, 5, 7])


def proven(model, rows=FOUR, **given):
    asked = {"pad_id": 0, "device": CPU, "autocast": None, "seed": None, **given}
    with dropout.keyed(model, 1):
        return prove(model.train(), ROWS, rows, **asked)


def worst(found):
    return found.record["tried"][found.route]["difference"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "opt", "glm", "phi3", "mistral"])
def test_the_engine_equals_the_reference(family):
    found = proven(lora(tiny(family), lora_dropout=0.1), seed=3)
    assert found.route == "engine" and worst(found) < 1e-5
    count = found.record["gradients"]
    assert found.lines == [f"engine = reference, {worst(found):.0e} (4 rows, loss and {count} gradients; fp32)"]
    assert count == len(trained(lora(tiny(family))))


def test_one_gradient_is_no_plural():
    model = lora(tiny("llama"))
    for parameter in [one for one in model.parameters() if one.requires_grad][1:]:
        parameter.requires_grad_(False)
    assert proven(model).lines[0].endswith(" (4 rows, loss and 1 gradient; fp32)")


def test_the_record_says_whether_the_rows_of_the_proof_share_anything():
    """Rows that do not prove nothing about shared prefixes."""
    model = lora(tiny("llama"))
    assert proven(model).record["shares"] is False
    same = list(range(5, 25))
    alike = Rows([([*same, *ids], prompt + len(same)) for ids, prompt in ROWS.rows])
    found = prove(model, alike, FOUR, pad_id=0, device=CPU, autocast=None, seed=None)
    assert found.route == "engine" and found.record["shares"] is True


def test_full_fine_tuning_and_a_head_that_trains_are_proven_too():
    found = proven(tiny("llama", tied=True).requires_grad_(True))
    assert found.route == "engine" and worst(found) < 1e-5 and found.record["gradients"] == 20


def test_it_leaves_no_trace():
    model = lora(tiny("llama"), lora_dropout=0.1)
    before, random = trained(model), torch.get_rng_state()
    proven(model, seed=3)
    after = trained(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_matrices_of_zeros_hold_something_meanwhile(monkeypatch):
    """B is zero at first, and the gradient of A with it: a wrong one would not be seen."""
    seen = {}

    def differences(gradients, reference):
        seen.update({name: value.norm().item() for name, value in reference.items()})
        return dict.fromkeys(gradients, 0.0)

    monkeypatch.setattr(proof, "_differences", differences)
    proven(lora(tiny("llama")))
    assert min(value for name, value in seen.items() if "lora_A" in name) > 1e-4


def sabotaged_mask(monkeypatch):
    """Every token sees all tokens before it, those of other rows too."""

    def sighted(module, query, key, value, mask, *, layout=None, **asked):
        whole = (Segment(0, query.shape[2]),)
        one = None if layout is None or not layout.segments else attention.Layout(whole, layout.keys)
        return real(module, query, key, value, mask, layout=one, **asked)

    real = attention.attend
    monkeypatch.setattr(attention, "attend", sighted)


def sabotaged_positions(monkeypatch):
    def running(pass_):
        made = real(pass_)
        made["position_ids"] = torch.arange(pass_.ids.numel()).view_as(pass_.ids) % 64
        return made if pass_.layout.segments else real(pass_)

    real = forward.inputs
    monkeypatch.setattr(forward, "inputs", running)


def sabotaged_dropout(monkeypatch):
    """Masks that depend on where a token lies in its pass."""

    def in_sequence(seed, step, ids, positions, segments):
        return real(seed, step, np.zeros_like(ids), np.arange(ids.size).reshape(ids.shape))

    real = dropout.token_keys
    monkeypatch.setattr(dropout, "token_keys", in_sequence)


@pytest.mark.parametrize(
    ("sabotage", "family"), [(sabotaged_mask, "llama"), (sabotaged_positions, "opt"), (sabotaged_dropout, "llama")]
)
def test_a_broken_engine_is_found_out_and_the_plain_path_taken(monkeypatch, sabotage, family):
    """Positions matter where they are learned; a rotary model sees differences alone."""
    sabotage(monkeypatch)
    model = lora(tiny(family), lora_dropout=0.1)
    found = proven(model, seed=3)
    assert found.route == "plain" and found.record["path"] == "plain"
    if sabotage is sabotaged_mask:
        assert found.lines == [
            "rows are padded, not packed, which is slower: in LlamaForCausalLM a row would depend on the rows beside it"
        ]
        return
    assert all(found.record["tried"][way]["difference"] > 1e-3 for way in ("engine", "own_logits"))
    assert found.lines[0].startswith("engine ≠ reference: ")
    assert found.lines[-1] == "the plain path is used: rows padded, through transformers alone; it is slower"
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_state_that_goes_on_from_row_to_row_is_found_in_any_format(dtype, gradients):
    """Hybrids: their attention keeps to its row, their recurrence does not. The loss alone hardly shows it."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(**SIZE, intermediate_size=48, lru_width=32, head_dim=8, attention_window_size=64)
    found = proven(lora(RecurrentGemmaForCausalLM(config)).to(dtype), gradients=gradients)
    assert found.route == "plain"
    assert found.lines[0].endswith("in RecurrentGemmaForCausalLM a row would depend on the rows beside it")


def test_a_window_that_is_in_the_mask_alone_is_not_lost():
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    window = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
    model = lora(Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZE, **ROTARY, **sizes, **window)))
    found = proven(model)
    assert found.route == "plain"
    assert found.lines[0].endswith("Qwen2MoeAttention keeps its window in the mask")


def test_a_gradient_that_is_no_number_is_no_small_difference(monkeypatch):
    def spoilt(self, way, rows):
        loss, found = real(self, way, rows)
        if way != "reference":
            found[list(found)[3]][0] = float("nan")
        return loss, found

    real = reference.Bench.gradients
    monkeypatch.setattr(reference.Bench, "gradients", spoilt)
    found = proven(lora(tiny("llama")))
    assert found.route == "plain" and json.dumps(found.record, allow_nan=False)


def test_a_head_that_is_more_than_its_configuration_says_leaves_the_logits_to_transformers(monkeypatch):
    torch.manual_seed(0)
    model = lora(GraniteForCausalLM(GraniteConfig(**SIZE, **ROTARY, logits_scaling=3.0)))
    monkeypatch.setattr(forward, "head_of", lambda base: loss.Head(base.lm_head))
    found = proven(model)
    assert found.route == "own_logits" and worst(found) < 1e-5
    assert found.lines[0].startswith("engine ≠ reference: ") and "loss" in found.lines[0]
    assert found.lines[1].startswith("engine with transformers' own logits = reference, ")


def test_what_cannot_be_packed_is_padded():
    model = lora(FalconForCausalLM(FalconConfig(**SIZE)))
    found = proven(model)
    assert found.route == "plain"
    assert found.lines == [
        "rows are padded, not packed, which is slower: FalconForCausalLM has an attention of its own"
    ]


def test_a_model_that_loses_the_layout_on_the_way_is_padded():
    """StableLM hands nothing on to its attention; a mask without content is all that arrives there."""
    found = proven(lora(StableLmForCausalLM(StableLmConfig(**SIZE, **ROTARY))))
    assert found.route == "plain"
    assert found.lines == [
        "rows are padded, not packed, which is slower: StableLmForCausalLM takes no packed rows "
        "(RuntimeError: The size of tensor a (63) must match the size of tensor b (0) at non-singleton dimension 3)"
    ]


@pytest.mark.parametrize("error", [ModelError("our own"), torch.OutOfMemoryError("full")], ids=type)
def test_our_own_errors_are_not_taken_for_a_model_that_cannot_be_packed(monkeypatch, error):
    def failing(model):
        raise error

    monkeypatch.setattr(proof, "adopt", failing)
    with pytest.raises(type(error)):
        proven(lora(tiny("llama")))


def test_what_the_engine_was_found_to_be_stays_where_own_logits_break(monkeypatch):
    def off(self, way, rows):
        if way == "own_logits":
            raise ValueError("x" * 200 + "\nmore")
        return real(self, way, rows) * (1.5 if way == "engine" else 1)

    real = reference.Bench.value
    monkeypatch.setattr(reference.Bench, "value", off)
    found = proven(lora(tiny("llama")))
    assert found.record["tried"]["engine"]["difference"] == pytest.approx(0.5)
    assert found.record["tried"]["own_logits"] == {
        "reason": f"LlamaForCausalLM takes no packed rows (ValueError: {'x' * 120}…)"
    }
    assert [line.partition(":")[0] for line in found.lines] == [
        "engine ≠ reference",
        "rows are padded, not packed, which is slower",
    ]


def test_a_model_that_draws_random_numbers_is_said_and_padded():
    """Mixtral's jitter, which no configuration calls dropout."""
    torch.manual_seed(0)

    def mixtral(**jitter):
        config = MixtralConfig(**SIZE, **ROTARY, num_local_experts=4, **jitter)
        return attach(MixtralForCausalLM(config), MethodSection(), 1, say=print)

    quiet()
    assert proven(mixtral()).route == "engine"
    found = proven(mixtral(router_jitter_noise=0.1))
    difference = found.record["tried"]["reference"]["difference"]
    assert found.route == "plain" and difference > 1e-6
    assert found.lines == [
        "exactness does not hold for this model: something in it draws random numbers "
        f"(one loss computed twice differs by {difference:.0e}); the plain path is used: rows padded, which is slower"
    ]


def test_a_draw_that_decides_nothing_and_kernels_that_do_not_repeat_themselves_are_no_randomness(monkeypatch):
    """A layer may draw for nothing; atomics on a GPU add in another order."""
    model = lora(tiny("llama"))
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: torch.rand([]) and None)
    assert proven(model).route == "engine"
    calls = iter(range(1000))
    real = reference.reference_loss
    monkeypatch.setattr(reference, "reference_loss", lambda model, pass_: real(model, pass_) * (1 + 1e-5 * next(calls)))
    assert proven(lora(tiny("llama"))).route == "engine"


def test_without_the_proof_the_loss_is_compared_all_the_same(monkeypatch):
    found = proven(lora(tiny("llama")), gradients=False)
    assert found.route == "engine" and found.record["gradients"] == 0
    assert found.lines == ["engine not proven, as asked; the loss of 2 rows is the reference's"]
    assert found.record["rows"] == ["rows.jsonl:1", "rows.jsonl:4"]
    one = proven(lora(tiny("llama")), rows=FOUR[:1], gradients=False)
    assert one.lines == ["engine not proven, as asked; the loss of 1 row is the reference's"]
    sabotaged_mask(monkeypatch)
    assert proven(lora(tiny("llama")), gradients=False).route == "plain"


def test_more_than_a_minute_is_too_long(monkeypatch):
    monkeypatch.setattr(proof, "MINUTE", 0.0)
    found = proven(lora(tiny("llama")))
    assert found.route == "engine" and found.record["gradients"] == 0
    assert found.lines[0].startswith("engine not proven, it would take ")


def test_a_reference_that_does_not_fit_proves_nothing_and_stops_nothing(monkeypatch):
    def full(model, pass_):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, pass_)

    real = reference.reference_loss
    monkeypatch.setattr(reference, "reference_loss", full)
    found = proven(lora(tiny("llama")))
    assert found.route == "engine"
    assert found.lines == [
        "engine not proven, the padded reference does not fit into memory; the loss of 2 rows is the reference's"
    ]


@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
def test_in_bf16_the_tolerance_is_that_of_bf16(autocast):
    model = lora(tiny("llama"))
    if not autocast:
        model.get_base_model().bfloat16()
    found = proven(model, autocast=autocast)
    assert found.route == "engine" and 1e-5 < worst(found) < 5e-2
    tokens = int(ROWS.supervised[FOUR[:2]].sum())
    assert found.record["tolerance"] == {"loss": pytest.approx(2e-2 / tokens**0.5), "gradients": 0.1}
    assert found.lines[0].endswith("gradients; bf16)")


def test_the_rows_are_of_unlike_lengths_and_few():
    rows = Rows([([5] * length, 1) for length in (40, 7, 9, 30, 12, 5, 8, 21)])
    every = np.arange(8)
    assert rows_to_prove(rows, every, 10_000).tolist() == [5, 6, 4, 0]  # 5, 8, 12 and 40 tokens
    assert rows_to_prove(rows, every, 48).tolist() == [5, 1, 6, 4]  # 4 × 12 places
    assert rows_to_prove(rows, every, 3).tolist() == [5, 1]
    assert rows_to_prove(rows, np.array([3, 3, 3]), 10_000).tolist() == [3]


def test_a_run_keeps_its_proof_and_goes_on_by_it(tmp_path):
    said = []
    section = TrainSection(batch=4, steps=4, save_every=2, lr=1e-3)
    fit(tmp_path, lora(tiny("llama"), lora_dropout=0.1), ROWS, section, say=said.append)
    kept = json.loads((tmp_path / "proof.json").read_text())
    difference = kept["tried"]["engine"]["difference"]
    assert said[0] == f"engine = reference, {difference:.0e} (2 rows, loss and 28 gradients; fp32)"
    assert (kept["path"], kept["dropout"], kept["format"]) == ("engine", True, "fp32")
    assert all(row.startswith("rows.jsonl:") for row in kept["rows"])
    said.clear()
    (tmp_path / "proof.json").unlink()
    resume = tmp_path / "checkpoints" / "step-000002"
    fit(tmp_path, lora(tiny("llama"), lora_dropout=0.1), ROWS, section, say=said.append, resume=resume)
    assert not (tmp_path / "proof.json").exists() and not [line for line in said if "reference" in line]


def test_the_plain_path_trains_the_same(tmp_path, monkeypatch):
    section = TrainSection(batch=4, steps=5, lr=3e-3, save_every=3)
    expected = fit(tmp_path / "engine", lora(tiny("llama"), lora_dropout=0.1), ROWS, section)
    sabotaged_mask(monkeypatch)
    run = tmp_path / "plain"
    outcome = fit(run, lora(tiny("llama"), lora_dropout=0.1), ROWS, section)
    assert json.loads((run / "proof.json").read_text())["path"] == "plain"
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    monkeypatch.undo()
    resume = run / "checkpoints" / "step-000003"
    assert json.loads((resume / "state.json").read_text())["state"]["route"] == "plain"
    again = fit(run, lora(tiny("llama"), lora_dropout=0.1), ROWS, section, resume=resume)
    assert again.losses == outcome.losses

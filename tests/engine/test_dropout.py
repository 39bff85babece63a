"""Keyed dropout: the numbers it is made of, and that no cut of a step shows in them.

Sabotage, each tried once: masks drawn in sequence (PEFT's own dropout kept, or random offsets) fail
`test_any_cut_of_a_step…`; hooks on the decoder layers instead of their children fail `test_a_recomputation…`; seed,
step, row or position left out of the key, one multiplier for all modules, windows that slide from module to module fail
`test_masks_are_independent`; Python's own hash of a module's name fails `test_keys_are_the_same…`; flags not scaled by
1 / (1 - p) fail `test_the_expected_gradient…`.
"""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, PersimmonConfig

from luthier.data.pack import Segment
from luthier.engine.dropout import KeyedDropout, check_keys, keep_table, keyed, of_base, set_keys, token_keys
from luthier.errors import ModelError
from rows import SIZE, lora, random_rows, tiny, trained

Q_PROJ = "model.layers.0.self_attn.q_proj"
P = 0.1
CPU = torch.device("cpu")
ROWS = random_rows(5)
COLUMNS = 64


@cache
def table(seed: int = 0, dtype: torch.dtype = torch.float32, p: float = P) -> torch.Tensor:
    return keep_table(seed, p, dtype, CPU)


def dropout(name: str = Q_PROJ, seed: int = 0, p: float = P, dtype: torch.dtype = torch.float32) -> KeyedDropout:
    return KeyedDropout(p, name, dtype, lambda p, dtype, device, scaled=True: table(seed, dtype, p))


def keys_of(seed: int = 0, step: int = 1, rows: int = 20, length: int = 100) -> np.ndarray:
    """[rows, length]"""
    numbers, positions = np.indices((rows, length))
    return token_keys(seed, step, numbers, positions)


def mask_of(keys: np.ndarray, name: str = Q_PROJ, seed: int = 0, p: float = P, columns: int = COLUMNS) -> torch.Tensor:
    """True where kept: [*keys.shape, columns]"""
    module = dropout(name, seed, p)
    module.keys = torch.from_numpy(keys).flatten()
    return module(torch.ones(*keys.shape, columns)) != 0


# Keys and table


def test_keys_are_the_same_in_every_process_and_version():
    keys = token_keys(42, 3, np.array([[0, 0], [7, 7]]), np.array([[0, 1], [0, 1]]))
    assert keys.dtype == np.int64
    assert keys.tolist() == [
        [1211672927932238853, -5999659927566351767],
        [5111640608864057251, 667738055308304757],
    ]
    module = dropout()
    module.keys = torch.from_numpy(keys).flatten()
    kept = module(torch.ones(4, 200)) != 0
    dropped = [row.logical_not().nonzero().flatten()[:4].tolist() for row in kept]
    assert dropped == [[6, 9, 13, 31], [7, 22, 24, 31], [2, 8, 24, 54], [0, 11, 17, 21]]


def test_every_word_of_a_key_changes_it_and_no_two_tokens_share_one():
    grids = [keys_of(seed, step, 50, 200) for seed in (0, 1, 42) for step in (0, 1, 2, 1000)]
    every = np.concatenate([grid.flatten() for grid in grids])
    assert len(np.unique(every)) == len(every) == 120_000
    bits = (every.view(np.uint64)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(every))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_table_drops_exactly_its_share_and_keeps_the_mean(p):
    circle = table(p=p)[: 1 << 22]
    assert int((circle == 0).sum()) == round(p * (1 << 22))
    assert circle.unique().tolist() == [0, torch.tensor(1 / (1 - p)).item()]
    assert circle.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(table(p=p)[1 << 22 :], circle[: 1 << 17])  # so that every column meets the whole circle


def test_flags_are_the_same_in_every_dtype():
    assert torch.equal(table() != 0, table(dtype=torch.bfloat16) != 0)


# Statistics. A share of n flags of probability p has the standard deviation sqrt(p (1 - p) / n); overlapping windows
# of one table add to it: by n / 2**22 of its square at most.


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_keep_rate_over_all_by_column_by_token_and_by_element_over_steps(p):
    masks = torch.stack([mask_of(keys_of(step=step, rows=5, length=40), p=p) for step in range(400)])
    masks = masks.flatten(1, 2).double()  # [400 steps, 200 tokens, 64 columns]
    overlap = math.sqrt(1 + masks.numel() / 2**22)
    for axes, bound in (((0, 1, 2), 4), ((0, 1), 5), ((0, 2), 5), ((0,), 6)):
        rates = masks.mean(axes)
        count = masks.numel() / rates.numel()
        deviation = math.sqrt(p * (1 - p) / count) * overlap
        assert (rates - (1 - p)).abs().max() < bound * deviation
        if axes == (0,):  # 12,800 elements, each by its own: neither stuck nor more even than chance
            assert rates.std() == pytest.approx(math.sqrt(p * (1 - p) / count), rel=0.1)


INDEPENDENT = {
    "seeds": (lambda: mask_of(keys_of(seed=0)), lambda: mask_of(keys_of(seed=1))),
    "tables": (lambda: mask_of(keys_of(), seed=0), lambda: mask_of(keys_of(), seed=1)),
    "steps": (lambda: mask_of(keys_of(step=1)), lambda: mask_of(keys_of(step=2))),
    "rows": (lambda: mask_of(keys_of())[:-1], lambda: mask_of(keys_of())[1:]),
    "tokens": (lambda: mask_of(keys_of())[:, :-1], lambda: mask_of(keys_of())[:, 1:]),
    "columns": (lambda: mask_of(keys_of())[..., :-1], lambda: mask_of(keys_of())[..., 1:]),
    "modules": (lambda: mask_of(keys_of()), lambda: mask_of(keys_of(), name=Q_PROJ.replace("q_", "k_"))),
    "layers": (lambda: mask_of(keys_of()), lambda: mask_of(keys_of(), name=Q_PROJ.replace("0", "1"))),
}


@pytest.mark.parametrize("between", INDEPENDENT)
def test_masks_are_independent(between):
    """Correlation of two sets of 128,000 flags, also of one shifted by some columns: within 5 deviations of 0."""
    one, other = (draw().double() - (1 - P) for draw in INDEPENDENT[between])
    for shift in range(-3, 4):
        moved = other.roll(shift, -1)
        correlation = (one * moved).mean() / (P * (1 - P))
        if between == "columns" and shift == 1:  # rolled back onto itself, but for the ends
            assert correlation > 0.9
        else:
            assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_the_expected_gradient_is_the_one_without_dropout():
    """Where the loss is linear in the masks, the mean over 600 steps of each element is normal around it."""
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"proj": nn.Linear(24, 16)}), linear_lora(["proj"]))
    x, weights = torch.randn(50, 24), torch.randn(50, 16)
    keys = [torch.from_numpy(keys_of(step=step, rows=5, length=10)).flatten() for step in range(600)]

    def gradient():
        model.zero_grad()
        (model.base_model.model["proj"](x) * weights).sum().backward()
        return torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])

    with keyed(model, 0):
        model.eval()
        exact = gradient().double()
        model.train()
        drawn = []
        for step in keys:
            set_keys(model, step)
            drawn.append(gradient().double())
    means, deviations = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / math.sqrt(len(drawn))
    z = (means - exact) / deviations
    assert z.numel() == 4 * 24 + 16 * 4
    assert z.abs().max() < 4.5
    assert 0.6 < z.square().mean().sqrt() < 1.4  # 160 numbers, of which the few columns of the masks make relatives


def linear_lora(targets):
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=P, target_modules=targets, init_lora_weights=False)


# The module alone


@pytest.mark.parametrize("shape", [(12, 48), (3, 4, 48)])
def test_value_and_gradient_are_those_of_a_product_with_the_mask(shape):
    module = dropout()
    module.keys = torch.from_numpy(keys_of(rows=3, length=4)).flatten()
    mask = mask_of(keys_of(rows=3, length=4), columns=48).view(shape) * torch.tensor(1 / (1 - P))
    x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(out, x * mask)
    assert torch.equal(gradient, upstream * mask)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_the_result_has_the_adapters_dtype_and_the_gradient_that_of_x(held, wanted):
    module = dropout(dtype=wanted)
    module.keys = torch.from_numpy(keys_of(rows=3, length=4)).flatten()
    mask = mask_of(keys_of(rows=3, length=4), columns=48).view(12, 48) * torch.tensor(1 / (1 - P)).to(wanted)
    x, upstream = torch.randn(12, 48).to(held).requires_grad_(), torch.randn(12, 48).to(wanted)
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == module.eval()(x).dtype == wanted and gradient.dtype == held
    torch.testing.assert_close(out, x.to(wanted) * mask, rtol=1e-2 if wanted == torch.bfloat16 else 0, atol=0)
    torch.testing.assert_close(
        gradient, (upstream * mask).to(held), rtol=1e-2 if wanted == torch.bfloat16 else 0, atol=0
    )


def test_many_pieces_are_one():
    """3,000 tokens of 100 columns are three pieces on the CPU; their masks are those of the tokens one by one."""
    keys, x = keys_of(rows=30), torch.randn(3000, 100)
    module = dropout()
    module.keys = torch.from_numpy(keys).flatten()
    alone = torch.cat([mask_of(key[None], columns=100) for key in keys.flatten()])
    assert torch.equal(module(x), x * (alone * torch.tensor(1 / (1 - P))))


def test_only_one_integer_a_token_is_kept_for_the_backward():
    module, kept = dropout(), []
    module.keys = torch.from_numpy(keys_of(rows=3, length=4)).flatten()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(torch.randn(12, 48, requires_grad=True))
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept] == [(torch.int64, (12,))]


@pytest.mark.parametrize("keys", [None, torch.arange(11), torch.arange(24)])
def test_tokens_without_keys_are_refused_in_training_only(keys):
    module = dropout()
    module.keys = keys
    told = f"^dropout on {Q_PROJ} cannot be made independent of how rows are cut .*; set method.dropout: 0$"
    with pytest.raises(ModelError, match=told):
        module(torch.ones(3, 4, 48))
    x = torch.ones(3, 4, 48)
    assert module.eval()(x) is x


# In a model


def padded(rows):
    """ids, positions, owners: [B, L]; rows on the left, what is beyond a row belongs to it; and no segments."""
    length = max(len(ROWS[row].ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(ROWS[row].ids)] = torch.from_numpy(ROWS[row].ids)
    positions = torch.arange(length).expand(len(rows), length)
    mask = torch.stack([torch.arange(length) < len(ROWS[row].ids) for row in rows])
    return ids, positions, torch.tensor(rows)[:, None].expand_as(ids), (), mask.long(), mask


def packed(rows):
    """The same as one row of tokens, by a mask that shuts the rows off from one another."""
    ids = torch.cat([torch.from_numpy(ROWS[row].ids) for row in rows]).long()[None]
    positions = torch.cat([torch.arange(len(ROWS[row].ids)) for row in rows])[None]
    owners = torch.cat([torch.full((len(ROWS[row].ids),), row) for row in rows])[None]
    seen = (owners[0][:, None] == owners[0]) & (positions[0][:, None] >= positions[0])
    stops = np.cumsum([len(ROWS[row].ids) for row in rows]).tolist()
    segments = [Segment(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    return ids, positions, owners, segments, seen[None, None], torch.ones_like(ids, dtype=torch.bool)


def loss_of(model, pass_, step=1, **options):
    """The sum of the next-token cross entropy over the rows of a pass, all tokens supervised."""
    ids, positions, owners, segments, attention_mask, real = pass_
    keys = torch.from_numpy(token_keys(0, step, ids.numpy(), positions.numpy(), segments)).flatten()
    out = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=attention_mask,
        use_cache=False,
        layout=SimpleNamespace(segments=(), keys=keys),
    )
    follows = real[:, :-1] & real[:, 1:] & (owners[:, :-1] == owners[:, 1:])
    return nn.functional.cross_entropy(out.logits[:, :-1][follows], ids[:, 1:][follows], reduction="sum")


def gradients(model, passes, step=1):
    model.zero_grad()
    total = sum(loss_of(model, pass_, step) for pass_ in passes)
    total.backward()
    return total.item(), {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def adapted(family="llama", **config):
    return lora(tiny(family), lora_dropout=P, init_lora_weights=False, **config).train()


CUTS = {
    "padded": lambda: [padded([0, 1, 2, 3, 4])],
    "another order": lambda: [padded([4, 2, 0, 3, 1])],
    "packed": lambda: [packed([0, 1, 2, 3, 4])],
    "two packs": lambda: [packed([3, 1]), packed([0, 4, 2])],
    "one row at a time": lambda: [padded([row]) for row in range(5)],
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_any_cut_of_a_step_has_the_same_loss_and_gradient(family, checkpointing):
    """Sabotage: dropout drawn in sequence. PEFT's own, at the end, shows how far it is off."""
    model = adapted(family)
    if checkpointing:
        recompute(model)
    with keyed(model, 0) as needed:
        assert needed
        loss, expected = gradients(model, CUTS["padded"]())
        for cut in CUTS.values():
            again, found = gradients(model, cut())
            assert again == pytest.approx(loss, rel=1e-5)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
        other, _ = gradients(model, CUTS["padded"](), step=2)
        assert abs(other - loss) > 1e-3 * loss  # or nothing is dropped
    sequence = {gradients(model, CUTS["padded"]())[0] for _ in range(2)}
    assert max(sequence) - min(sequence) > 1e-3 * loss


def recompute(model):
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_recomputation_sees_the_keys_of_its_own_pass(family):
    """Forward of one pass, forward of another, then backward of the first. Sabotage: hooks on the layers' calls."""
    model = adapted(family)
    one, other = padded([0, 1]), padded([1, 0])  # the same shape: other keys would not be noticed
    with keyed(model, 0):
        _, expected = gradients(model, [one])
        recompute(model)
        model.zero_grad()
        first = loss_of(model, one)
        loss_of(model, other, step=2)
        first.backward()
        for name, value in model.named_parameters():
            if value.requires_grad:
                assert torch.equal(value.grad, expected[name])


def test_masking_with_the_cast_gives_the_numbers_of_pefts_cast_before_it():
    model = lora(tiny("llama").bfloat16(), lora_dropout=P, init_lora_weights=False).train()
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with keyed(model, 0):
        loss, expected = gradients(model, CUTS["padded"]())
        for layer in layers:
            assert not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = True
        again, found = gradients(model, CUTS["padded"]())
    assert again == loss
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_masks_differ_between_modules_and_are_named_without_pefts_prefixes():
    model = adapted()
    with keyed(model, 0):
        names = [module.name for module in model.modules() if isinstance(module, KeyedDropout)]
    with keyed(model.get_base_model(), 0):
        assert names == [module.name for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(set(names)) == len(names) == 14
    assert names[0] == Q_PROJ


def test_an_adapter_on_the_head_takes_keys_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # see rows.lora
        model = get_peft_model(tiny("llama"), linear_lora(["lm_head", "q_proj"])).train()
    head = model.get_base_model().lm_head
    chosen = torch.from_numpy(keys_of(rows=1, length=7)).flatten()
    with keyed(model, 0):
        with pytest.raises(ModelError, match="dropout on lm_head cannot be made independent"):
            head(torch.ones(7, 32))
        set_keys(head, chosen)
        hidden = torch.randn(7, 32)
        adapter = head.lora_B["default"](
            head.lora_A["default"](hidden * scaled(keys_of(rows=1, length=7)[0], "lm_head"))
        )
        torch.testing.assert_close(head(hidden), head.base_layer(hidden) + adapter * head.scaling["default"])


def scaled(keys: np.ndarray, name: str) -> torch.Tensor:
    return mask_of(keys, name, columns=32) / (1 - P)


# What is left behind


def own_dropouts(model):
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_pefts_own_dropout_is_back_afterwards_and_in_the_mode_of_the_model(tmp_path):
    model = adapted()
    before = own_dropouts(model)
    with keyed(model, 0):
        assert own_dropouts(model) == [] and hooks(model) > 0
        model.save_pretrained(tmp_path)
        model.eval()
    after = own_dropouts(model)
    assert len(after) == 14 and all(one is other for one, other in zip(after, before, strict=True))
    assert hooks(model) == 0
    assert all(layer.cast_input_dtype_enabled for layer in model.modules() if isinstance(layer, LoraLayer))
    assert not any(module.training for module in after)  # else the tuned model would generate with dropout
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == P


def test_pefts_own_dropout_is_back_after_an_error():
    model = adapted()
    before = own_dropouts(model)
    with pytest.raises(KeyError, match="boom"), keyed(model, 0):
        raise KeyError("boom")
    assert all(one is other for one, other in zip(own_dropouts(model), before, strict=True))
    assert hooks(model) == 0 and all(module.training for module in before)


@pytest.mark.parametrize("model", [tiny("llama"), lora(tiny("llama")), tiny("opt", dropout=0.1)], ids=str)
def test_a_model_whose_adapters_drop_nothing_is_left_alone(model):
    before = list(model.modules())
    with keyed(model, 0) as needed:
        assert not needed
        assert all(one is other for one, other in zip(model.modules(), before, strict=True))
        assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_in_eval_mode_is_that_of_pefts_own_modules(dtype):
    model = lora(tiny("llama").to(dtype), lora_dropout=P, init_lora_weights=False).train()
    ids = torch.from_numpy(ROWS[0].ids).long()[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(input_ids=ids, **options)
    with keyed(model.train(), 0):
        gradients(model, CUTS["packed"]())
        assert torch.equal(model.eval().generate(input_ids=ids, **options), expected)


def test_checkpoints_have_the_same_tensors_inside():
    model = adapted()
    before = trained(model).keys(), model.state_dict().keys()
    with keyed(model, 0):
        assert (trained(model).keys(), model.state_dict().keys()) == before


# The base model's own dropout


def test_nothing_of_the_bases_own_dropout_is_left_inside_and_all_is_back_afterwards(tmp_path):
    base = tiny("opt", dropout=0.1)
    base.model.decoder.layerdrop = 0.2
    base.model.decoder.layers[1].self_attn.dropout = 0.05
    base.model.decoder.resid_dropout = nn.Dropout(0.3)
    model = lora(base, lora_dropout=0.4).train()
    own = of_base(model)
    assert own.names == ["dropout 0.05", "dropout 0.1", "layerdrop 0.2", "resid_dropout 0.3"]
    with own.off():
        assert of_base(model).places == []
        assert {module.p for module in own_dropouts(model)} == {0.0, 0.4}
        with keyed(model, 0):
            assert len({gradients(model, CUTS["padded"]())[0] for _ in range(2)}) == 1
        with own.on():
            base.save_pretrained(tmp_path)
        assert base.config.dropout == 0.0
    assert of_base(model).names == own.names
    assert json.loads((tmp_path / "config.json").read_text())["dropout"] == 0.1


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (FalconConfig(**SIZE, hidden_dropout=0.1), ["hidden_dropout 0.1"]),
        (PersimmonConfig(**SIZE, intermediate_size=48, attention_dropout=0.2), ["attention_dropout 0.2"]),
        (
            GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
            ["attn_pdrop 0.1", "embd_pdrop 0.1", "resid_pdrop 0.1"],
        ),
    ],
    ids=lambda given: getattr(given, "model_type", None),
)
def test_what_a_forward_reads_in_the_configuration_is_off_as_well(config, names):
    """Sabotage: the configurations left out. Other heads' dropout (GPT-2's summary) is none of this model's."""
    model = lora(AutoModelForCausalLM.from_config(config), fan_in_fan_out=config.model_type == "gpt2").train()
    own = of_base(model)
    assert own.names == names
    with pytest.raises(KeyError), own.off():
        assert len({gradients(model, CUTS["padded"]())[0] for _ in range(2)}) == 1
        raise KeyError
    assert len({gradients(model, CUTS["padded"]())[0] for _ in range(2)}) == 2


def test_configurations_inside_of_another_are_found():
    model = tiny("llama")
    model.config.inner = FalconConfig(**SIZE, hidden_dropout=0.1)
    model.model.config = FalconConfig(**SIZE, attention_dropout=0.2)
    with of_base(model).off():
        assert (model.config.inner.hidden_dropout, model.model.config.attention_dropout) == (0.0, 0.0)


def test_a_model_without_dropout_has_nothing_to_turn_off():
    assert of_base(tiny("llama")).names == []
    assert of_base(lora(tiny("qwen2"), lora_dropout=0.1)).names == []


def test_an_adapter_that_is_not_given_all_tokens_is_found_out_before_training():
    """As an expert that is a module of its own. Sabotage: check_keys without dropout, or without keys."""

    def few(module, args):
        return (args[0][:, :3],)

    model = adapted()
    state = torch.get_rng_state()
    check_keys(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.register_forward_pre_hook(few)
    mlp.register_forward_hook(lambda module, args, out: torch.zeros(2, 8, 32))
    with pytest.raises(ModelError, match=r"^dropout on model\.layers\.1\.mlp\.gate_proj cannot be made indep"):
        check_keys(model)
    check_keys(lora(tiny("llama")))

"""The chunked loss against full logits and torch's own cross entropy, in fp64 where it is the judge.

Every kind of head goes one of two ways: plain and frozen (over the words, the gradient of the hidden states made in the
forward), or any other (over the places, each chunk under a checkpoint).
"""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig, MptConfig

from luthier.engine import frozen_head, products
from luthier.engine.dropout import keyed, set_keys
from luthier.engine.loss import CHUNK, Head, head_of, logits, summed_cross_entropy
from rows import tiny

WIDTH, WORDS = 32, 61
N = 128
"""Places of a chunk."""
FEW = 10
"""Places whose exponentials are taken at once; the last ones are fewer."""
PART = 20
"""Words of a part; the last one has one word."""
PLACES = [1, N - 1, N, N + 1, 2 * N + 44]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", N * WORDS)
    monkeypatch.setattr(frozen_head, "IN_CACHE", FEW * PART)
    monkeypatch.setattr(frozen_head, "FEWEST", PART)
    monkeypatch.setitem(frozen_head.LOGITS, "cpu", PART)


def numbers(places, dtype=torch.float32, width=WIDTH, words=WORDS):
    """Hidden states that need a gradient, and targets."""
    generator = torch.Generator().manual_seed(places + 1)
    hidden = torch.randn(places, width, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(words, (places,), generator=generator)


def head(*, trains=False, bias=True, scale=1.0, softcap=None, dtype=torch.float32, width=WIDTH, words=WORDS):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = nn.Linear(width, words, bias=bias)
        for weight in module.parameters():
            nn.init.normal_(weight, std=0.7)
    return Head(module.to(dtype).requires_grad_(trains), scale, softcap)


def full(hidden, targets, of):
    """All logits at once, in the arithmetic of `hidden`: fp64 is not rounded to fp32."""
    z = of.module(hidden)
    z = (z if z.dtype == torch.float64 else z.float()) * of.scale
    if of.softcap is not None:
        z = of.softcap * torch.tanh(z / of.softcap)
    return F.cross_entropy(z, targets, reduction="sum")


def exact(hidden, targets, of, loss_of=full):
    """The same in fp64, of the numbers as they were rounded."""
    hidden = hidden.detach().double().requires_grad_()
    return results(loss_of, hidden, targets, Head(copy.deepcopy(of.module).double(), of.scale, of.softcap))


def results(loss_of, hidden, targets, of, factor=1.0):
    """The loss, and its gradients: of the hidden states, then of the head's weights that train."""
    loss = loss_of(hidden, targets, of)
    wanted = [hidden, *(weight for weight in of.module.parameters() if weight.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss * factor, wanted)]


def distances(mine, true):
    """Relative, in the Euclidean norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(mine, true, strict=True)]


# The value and its gradients

KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "scale and softcap": {"scale": 0.5, "softcap": 2.0, "bias": False},
}


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", PLACES)
def test_loss_and_gradients_are_those_of_the_full_logits_in_fp64(places, kind, trains):
    hidden, targets = numbers(places)
    of = head(trains=trains, **KINDS[kind])
    mine, true = results(summed_cross_entropy, hidden, targets, of), exact(hidden, targets, of)
    assert mine[0].dtype == torch.float32 and mine[0].shape == ()
    assert max(distances(mine, true)) < 1e-6
    for a, b in zip(mine, results(full, hidden, targets, of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_no_places_are_a_zero_that_still_reaches_everything(trains):
    hidden, targets = numbers(0)
    loss, *gradients = results(summed_cross_entropy, hidden, targets, head(trains=trains))
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert [tuple(g.shape) for g in gradients] == [(0, WIDTH)] + [(WORDS, WIDTH), (WORDS,)] * trains
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_what_comes_after_the_loss_scales_the_gradient(trains):
    hidden, targets = numbers(2 * N + 44)
    of = head(trains=trains, softcap=4.0)
    once = results(summed_cross_entropy, hidden, targets, of)
    for times, factor in ((3.0, 3.0), (1 / 37, 1 / 37)):
        gradients = results(summed_cross_entropy, hidden, targets, of, factor)[1:]
        assert max(distances(gradients, [g.double() * times for g in once[1:]])) < 1e-6
    squared = results(lambda *numbers: summed_cross_entropy(*numbers) ** 2, hidden, targets, of)[1:]
    assert max(distances(squared, [g.double() * 2 * once[0] for g in once[1:]])) < 1e-6


def test_the_gradient_goes_on_into_the_model():
    """Also twice over one graph: what the forward kept is not used up."""
    source, targets = numbers(N + 3)
    of, mixing = head(scale=0.5), torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    mine, true = (loss_of(source @ mixing, targets, of) for loss_of in (summed_cross_entropy, full))
    (expected,) = torch.autograd.grad(true, source)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(mine, source, retain_graph=True)
        assert distances([gradient], [expected.double()])[0] < 1e-6


def test_words_that_the_vocabulary_only_pads_never_count():
    hidden, targets = numbers(N + 5)
    of = head()
    targets = targets % (WORDS - 3)
    of.module.bias.data[-3:] = -torch.inf
    mine = results(summed_cross_entropy, hidden, targets, of)
    assert max(distances(mine, exact(hidden, targets, of))) < 1e-6


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_logits_in_the_hundreds(trains):
    """exp(100) is more than fp32 holds. (Full logits in fp32 are 1.2e-6 off.)"""
    hidden, targets = numbers(N + 5)
    of = head(trains=trains)
    hidden.data.mul_(50)
    assert of.module(hidden).max() > 500
    mine = results(summed_cross_entropy, hidden, targets, of)
    assert max(distances(mine, exact(hidden, targets, of))) < 2e-6


def test_a_bias_that_trains_on_a_frozen_weight():
    hidden, targets = numbers(N + 5)
    of = head(trains=True)
    of.module.weight.requires_grad_(False)
    mine = results(summed_cross_entropy, hidden, targets, of)
    assert len(mine) == 3
    assert max(distances(mine, exact(hidden, targets, of))) < 1e-6


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_weighs_three_counts_as_three_places(kind, trains):
    """Rows that share a prefix teach its last tokens the same thing several times."""
    hidden, targets = numbers(2 * N + 44)
    of = head(trains=trains, **KINDS[kind])
    times = torch.randint(1, 4, (len(targets),), generator=torch.Generator().manual_seed(6))

    def weighed(hidden, targets, of):
        return summed_cross_entropy(hidden, targets, of, weights=times.float())

    def repeated(hidden, targets, of):
        return full(hidden.repeat_interleave(times, 0), targets.repeat_interleave(times), of)

    true = exact(hidden, targets, of, repeated)
    assert max(distances(results(weighed, hidden, targets, of), true)) < 1e-6
    assert min(distances(results(summed_cross_entropy, hidden, targets, of), true)[:2]) > 0.1
    with torch.no_grad():
        assert weighed(hidden, targets, of).item() == pytest.approx(true[0].item(), rel=1e-6)


# Sixteen bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("trains", "factor", "times"), [(False, 1.0, 1.01), (False, 1 / 37, 1.4), (True, 1.0, 1.01), (True, 1 / 37, 1.01)]
)
def test_bf16_is_no_further_from_the_truth_than_full_logits_are(trains, factor, times, kind):
    """Of a frozen head the gradient is there before the factor, and is rounded again with it: by √2 more at most.

    Weights of 16 bits never train (they are turned into fp32 first), but adapters may stand on them.
    """
    hidden, targets = numbers(2 * N + 44, torch.bfloat16)
    of = head(trains=trains, dtype=torch.bfloat16, **KINDS[kind])
    true = exact(hidden, targets, of)
    true = [true[0], true[1] * factor]
    mine = distances(results(summed_cross_entropy, hidden, targets, of, factor)[:2], true)
    theirs = distances(results(full, hidden, targets, of, factor)[:2], true)
    assert mine[0] < 1.01 * theirs[0] + 3e-5  # 300 roundings of either sign
    assert 1e-3 < mine[1] < times * theirs[1] < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_16_bit_head_in_fp32_rounds_only_what_it_gives_back(monkeypatch, kind):
    hidden, targets = numbers(2 * N + 44, torch.bfloat16)
    of = head(dtype=torch.bfloat16, **KINDS[kind])
    monkeypatch.setattr(products, "faster", lambda: True)
    with products.fp32_products(of.module) as layers:
        mine = results(summed_cross_entropy, hidden, targets, of)
    assert layers and "forward" not in vars(of.module)
    true = exact(hidden, targets, of)
    assert mine[1].dtype == torch.bfloat16
    assert distances(mine[:1], true[:1])[0] < 1e-6
    assert distances(mine[1:], true[1:])[0] < 1.01 * distances([true[1].bfloat16()], true[1:])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_autocast_is_no_further_from_the_truth_than_with_full_logits(trains, kind):
    """The weight's own gradient is the sum over 21 chunks, which is taken in fp32: in bf16 it is 1.8 times as far."""
    hidden, targets = numbers(20 * N + 44)
    of = head(trains=trains, **KINDS[kind])
    true = exact(hidden, targets, of)
    with torch.autocast("cpu", torch.bfloat16):
        mine = results(summed_cross_entropy, hidden, targets, of)
        theirs = results(full, hidden, targets, of)
    assert [tensor.dtype for tensor in mine] == [torch.float32] * len(mine)
    near, far = distances(mine, true), distances(theirs, true)
    assert near[0] < 1.01 * far[0] + 3e-5
    assert all(1e-3 < a < 1.02 * b < 1e-2 for a, b in zip(near[1:3], far[1:3], strict=True))


# What it costs


class Work(TorchDispatchMode):
    """The operations that torch does, with their results' shapes, and the bytes of results alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.done, self.alive, self.peak = [], {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.done.append((str(function), tuple(tensor.shape)))
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        return sum(self.alive.values())

    def products(self):
        return sum(name.startswith(("aten.mm.", "aten.addmm")) for name, _ in self.done)


@pytest.mark.parametrize(
    ("trains", "softcap", "dtype", "chunks"),
    [
        (False, None, torch.float32, 1.15),
        (False, 3.0, torch.float32, 2.15),
        (False, None, torch.bfloat16, 1.65),
        (False, 3.0, torch.bfloat16, 2.65),
        (True, None, torch.float32, 3.3),
        (True, 3.0, torch.float32, 4.3),
    ],
)
def test_never_places_times_words_in_memory(monkeypatch, trains, softcap, dtype, chunks):
    """A chunk is 128 places × 5,000 words × 4 bytes, or 1,280 × 500; there are ten of them."""
    monkeypatch.setitem(CHUNK, "cpu", N * 5000)
    monkeypatch.setitem(frozen_head.LOGITS, "cpu", N * 5000)
    hidden, targets = numbers(10 * N, dtype, width=8, words=5000)
    of = head(trains=trains, width=8, words=5000, softcap=softcap, dtype=dtype)
    chunk = N * 5000 * 4
    with Work() as ours:
        loss = summed_cross_entropy(hidden, targets, of)
        assert ours.now() < 0.12 * chunk  # the weight, the hidden states and their gradient
        loss.backward()
    assert ours.peak < chunks * chunk
    with Work() as theirs:
        full(hidden, targets, of).backward()
    assert theirs.peak > 20 * chunk  # or the meter does not measure


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_eight_times_the_places_take_the_same_memory(monkeypatch, trains):
    monkeypatch.setitem(CHUNK, "cpu", N * 5000)
    monkeypatch.setitem(frozen_head.LOGITS, "cpu", N * 5000)
    of, peaks = head(trains=trains, width=8, words=5000), []
    for places in (200, 1600):
        hidden, targets = numbers(places, width=8, words=5000)
        with Work() as work:
            summed_cross_entropy(hidden, targets, of).backward()
        peaks.append(work.peak)
    assert peaks[0] > N * 5000 * 4
    assert peaks[1] < 1.15 * peaks[0]  # the hidden states' own gradient: 1,400 × 8 × 4 bytes, twice


def test_the_backward_of_a_frozen_head_needs_the_vocabulary_no_more():
    hidden, targets = numbers(2 * N + 44)
    of = head()
    with Work() as forward:
        loss = summed_cross_entropy(hidden, targets, of)
    with Work() as backward:
        loss.backward()
    assert forward.products() == 8  # four parts: logits, and gradients of the hidden states
    assert backward.products() == 0


def test_evaluation_computes_no_gradient():
    hidden, targets = numbers(2 * N + 44)
    of = head(scale=0.5, softcap=3.0)
    expected = full(hidden, targets, of).item()
    for asked, context in ((hidden, torch.no_grad()), (hidden.detach(), nullcontext())):
        with Work() as work, context:
            loss = summed_cross_entropy(asked, targets, of)
        assert not loss.requires_grad
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert work.products() == 4
    with torch.no_grad():
        mine, true = (f(hidden, targets, head(trains=True)) for f in (summed_cross_entropy, full))
    assert mine.item() == pytest.approx(true.item(), rel=1e-6)


def test_autocast_casts_a_frozen_weight_once():
    hidden, targets = numbers(2 * N + 44)
    with Work() as work, torch.autocast("cpu", torch.bfloat16):
        summed_cross_entropy(hidden, targets, head()).backward()
    cast = [shape[0] for name, shape in work.done if name == "aten.copy_.default" and shape[1:] == (WIDTH,)]
    assert sum(cast) == WORDS and len(cast) == 4


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_the_device_is_never_waited_for(trains):
    """Fake tensors have shapes but no values: whatever would fetch a value from the device raises."""
    with FakeTensorMode():
        hidden, of = torch.randn(300, 8, requires_grad=True), nn.Linear(8, 50).requires_grad_(trains)
        summed_cross_entropy(hidden, torch.randint(50, (300,)), Head(of, 0.5, 3.0)).backward()
        assert hidden.grad.shape == (300, 8)


# Real models


def adapted(model, kind=LoraConfig, **config):
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that it is giving up
        torch.manual_seed(2)
        return get_peft_model(model, kind(r=4, **config))


ADAPTERS = {"lora": (LoraConfig, {"init_lora_weights": False}, 2), "loha": (LoHaConfig, {"init_weights": False}, 4)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head(name):
    kind, random, tensors = ADAPTERS[name]
    model = adapted(tiny("llama"), kind, target_modules=["lm_head"], **random)
    hidden, targets = numbers(2 * N + 44)
    of = head_of(model.get_base_model())
    mine, true = results(summed_cross_entropy, hidden, targets, of), exact(hidden, targets, of)
    assert len(mine) == 2 + tensors
    assert max(distances(mine, true)) < 1e-6
    with model.disable_adapter():
        assert abs(summed_cross_entropy(hidden, targets, of).item() - true[0].item()) > 0.1


def test_keyed_dropout_on_the_head_masks_each_place_by_its_own_key():
    model = adapted(tiny("llama"), target_modules=["lm_head"], lora_dropout=0.3, init_lora_weights=False)
    hidden, targets = numbers(2 * N + 44)
    of = head_of(model.get_base_model())
    keys = torch.randint(-(2**63), 2**63 - 1, (len(targets),), generator=torch.Generator().manual_seed(4))

    def chunked(hidden, targets, of):
        return summed_cross_entropy(hidden, targets, of, keys)

    def at_once(hidden, targets, of):
        set_keys(of.module, keys)
        return full(hidden, targets, of)

    def of_other_keys(hidden, targets, of):
        return summed_cross_entropy(hidden, targets, of, keys.flip(0))

    with keyed(model.train(), seed=3):
        mine, true, other = (results(loss_of, hidden, targets, of) for loss_of in (chunked, at_once, of_other_keys))
    assert max(distances(mine, [tensor.double() for tensor in true])) < 1e-6
    assert min(distances(other, [tensor.double() for tensor in true])) > 1e-4


def test_a_head_that_peft_saves_whole():
    model = adapted(tiny("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    hidden, targets = numbers(N + 44)
    of = head_of(model.get_base_model())
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.5)  # what is trained, not the original
    mine, true = results(summed_cross_entropy, hidden, targets, of), exact(hidden, targets, of)
    assert len(mine) == 3
    assert max(distances(mine, true)) < 1e-6


CONFIGS = {
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 1.5, "head_dim": 8, "num_key_value_heads": 2}),
    "cohere": (CohereConfig, {"logit_scale": 0.3, "num_key_value_heads": 2}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "num_key_value_heads": 2}),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 0.25, "num_key_value_heads": 2}),
    "mpt": (MptConfig, {"logit_scale": 0.5}),
}
HEADS = {"gemma2": (1.0, 1.5), "cohere": (0.3, None), "granite": (0.25, None), "hyperclovax": (0.25, None)}


def capped(family, tied):
    config, fields = CONFIGS[family]
    size = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
    if family == "mpt":
        size = {"vocab_size": WORDS, "d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    size |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": tied}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config(**size, **fields)).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_of_a_family_is_all_that_it_does_to_its_logits(family):
    model = capped(family, tied=family == "mpt")
    ids = torch.randint(WORDS, (3, 17), generator=torch.Generator().manual_seed(2))
    of = head_of(model)
    assert (of.scale, of.softcap) == HEADS.get(family, (1.0, None))
    with torch.no_grad():
        ours, theirs = logits(model.get_decoder()(ids).last_hidden_state, of), model(ids).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), *((family, False) for family in HEADS)])
def test_every_gradient_is_that_of_transformers_own_loss(family, tied, frozen):
    """Tied and trained: one weight, which gets the gradient of the embeddings and of the head."""
    model = tiny("llama", tied=True).eval() if family == "llama" else capped(family, tied)
    model.get_output_embeddings().requires_grad_(not frozen)
    ids = torch.randint(WORDS, (6, 40), generator=torch.Generator().manual_seed(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(list(model.parameters())) - frozen
    hidden = model.get_decoder()(ids).last_hidden_state[:, :-1].flatten(0, 1)
    ours = summed_cross_entropy(hidden, ids[:, 1:].flatten(), head_of(model))
    theirs = model(ids, labels=ids).loss * (6 * 39)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    mine, true = (torch.autograd.grad(loss, trained) for loss in (ours, theirs))
    assert max(distances(mine, [gradient.double() for gradient in true])) < 1e-5

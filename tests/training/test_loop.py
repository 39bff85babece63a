"""The step and the run: against a plain loop, however it is cut, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.batches import order_of
from luthier.engine import proof
from luthier.engine.attention import CannotPackError
from luthier.errors import RecipeError, RunError
from luthier.sections import TrainSection
from luthier.training.checkpoint import TrainState
from luthier.training.loop import Training
from luthier.training.start import autocast_dtype
from rows import SIZE, Rows, fit, lora, random_rows, tiny, trained

ROWS = random_rows(24)
HELD_OUT = random_rows(9, seed=1)


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def plain_transformers_loop(model, rows, section, peak):
    """What a tutorial writes: one padded batch, the model's own loss, AdamW, LambdaLR, clipping."""
    longest = int(rows.lengths.max())
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for place in range(len(rows)):
        example = torch.from_numpy(rows[place].ids).long()
        ids[place, : len(example)], mask[place, : len(example)] = example, 1
        labels[place, : len(example)] = torch.where(torch.from_numpy(rows[place].supervised), example, -100)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: (k + 1) / 2 if k < 2 else 0.5 + 0.5 * math.cos(math.pi * (k - 2) / 8)
    )
    model.train()
    losses, norms = [], []
    for _ in range(10):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_full_fine_tuning_on_whole_data_batches_is_the_plain_transformers_loop(tmp_path, family):
    section = TrainSection(batch=len(ROWS), steps=10, lr=3e-3, warmup=2, weight_decay=0.1, tokens_per_pass=100)
    outcome = fit(tmp_path, tiny(family), ROWS, section, kind="full")
    losses, norms = plain_transformers_loop(tiny(family), ROWS, section, 3e-3)
    assert outcome.losses == pytest.approx(losses, abs=1e-4)
    assert [line["grad_norm"] for line in metrics(tmp_path)] == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0] - 0.5 and metrics(tmp_path)[0]["passes"] > 1


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_how_a_step_is_cut_does_not_change_it(tmp_path, family, method):
    def run(tokens_per_pass):
        model = lora(tiny(family)) if method == "lora" else tiny(family)
        section = TrainSection(batch=10, steps=8, lr=1e-3, tokens_per_pass=tokens_per_pass)
        path = tmp_path / str(tokens_per_pass)
        losses = fit(path, model, ROWS, section, kind=method).losses
        lines = metrics(path)
        return losses, [line["grad_norm"] for line in lines], [line["passes"] for line in lines]

    losses, norms, passes = run(1000)
    assert passes == [1] * 8
    for tokens_per_pass in (1, 48):
        others = run(tokens_per_pass)
        assert others[0] == pytest.approx(losses, rel=1e-5)
        assert others[1] == pytest.approx(norms, rel=1e-5)
    assert run(1)[2] == [10, 10, 4] * 2 + [10, 10]


def test_activation_checkpointing_gives_the_same_numbers(tmp_path):
    def run(name, make, kind, on):
        section = TrainSection(batch=8, steps=4, lr=3e-3, activation_checkpointing=on)
        return fit(tmp_path / f"{name}{on}", make(), ROWS, section, kind=kind).losses

    assert run("lora", lambda: lora(tiny("llama")), "lora", True) == run(
        "lora", lambda: lora(tiny("llama")), "lora", False
    )
    assert run("full", lambda: tiny("llama"), "full", True) == run("full", lambda: tiny("llama"), "full", False)


@pytest.mark.parametrize("family", ["falcon", "persimmon"])
def test_dropout_that_is_read_in_the_configuration_is_off_and_saved_as_it_was(tmp_path, family, monkeypatch):
    """In any cut, packed or padded, the same run. Sabotage: dropout of modules alone turned off, or `write` inside."""

    def run(name, **changes):
        config = AutoConfig.for_model(family, **SIZE, hidden_dropout=0.1, attention_dropout=0.2)
        torch.manual_seed(1)
        model, said = AutoModelForCausalLM.from_config(config), []
        section = TrainSection(**{"batch": 8, "steps": 4, "lr": 1e-3, "save_every": 2, **changes})
        losses = fit(tmp_path / name, model, ROWS, section, kind="full", say=said.append).losses
        assert (config.hidden_dropout, config.attention_dropout) == (0.1, 0.2)
        for saved in ("model", "checkpoints/step-000002"):
            kept = json.loads((tmp_path / name / saved / "config.json").read_text())
            assert (kept["hidden_dropout"], kept["attention_dropout"]) == (0.1, 0.2)
        return losses, said, json.loads((tmp_path / name / "proof.json").read_text())["path"]

    losses, said, route = run("one pass", tokens_per_pass=1000)
    assert route == ("plain" if family == "falcon" else "engine")
    assert said[0] == (
        "the base model's own attention_dropout 0.2, hidden_dropout 0.1 are off "
        "(train.base_dropout: true gives them back)"
    )
    assert run("many", tokens_per_pass=30)[0] == pytest.approx(losses, rel=1e-5)
    wanted, said, _ = run("wanted", base_dropout=True, tokens_per_pass=1000)
    assert wanted != pytest.approx(losses, rel=1e-5)
    assert said[0].startswith("train.base_dropout: drawn in sequence, so numbers depend on how rows are cut")

    def refuse(model):
        raise CannotPackError("as asked")

    monkeypatch.setattr(proof, "adopt", refuse)
    padded, _, route = run("padded", tokens_per_pass=1000)
    assert route == "plain" and padded == pytest.approx(losses, rel=1e-5)


def test_base_dropout_is_said_where_there_is_any(tmp_path):
    said = []
    section = TrainSection(batch=8, steps=2, base_dropout=True, save_every=1)
    fit(tmp_path / "llama", lora(tiny("llama")), ROWS, section, say=said.append)
    assert not [line for line in said if "base_dropout" in line]
    fit(tmp_path / "opt", lora(tiny("opt", dropout=0.1)), ROWS, section, say=said.append)
    changed = section.model_copy(update={"tokens_per_pass": 40})
    resume = tmp_path / "opt" / "checkpoints" / "step-000001"
    fit(tmp_path / "opt", lora(tiny("opt", dropout=0.1)), ROWS, changed, say=said.append, resume=resume)
    assert "resume: train.tokens_per_pass is 40 now: numbers will differ (train.base_dropout)" in said


def test_the_lines_of_a_run(tmp_path):
    section = TrainSection(batch=10, epochs=2, lr=1e-3, schedule="linear", warmup=2)
    outcome = fit(tmp_path, lora(tiny("llama")), ROWS, section, eval_rows=HELD_OUT)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0.333333, 0.666667, 1, 1.333333, 1.666667, 2]
    assert [line["rows"] for line in lines] == [None, 10, 10, 4, 10, 10, 4]
    assert [line["lr"] for line in lines[1:]] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [line["eval_loss"] is not None for line in lines] == [True, False, False, True, False, False, True]
    order = order_of([(0, 24, 1.0)], seed=7, batch=10)
    for line in lines[1:]:
        rows = order.rows(line["step"] - 1)
        assert (line["tokens"], line["supervised"]) == (ROWS.lengths[rows].sum(), ROWS.supervised[rows].sum())
    assert outcome.losses == [line["loss"] for line in lines[1:]]
    assert outcome.eval_losses == [(line["step"], line["eval_loss"]) for line in lines if line["eval_loss"] is not None]
    assert (outcome.steps, outcome.tokens, outcome.stopped) == (6, 2 * ROWS.lengths.sum(), None)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("done", 6, outcome.saved)


def test_eval_loss_is_the_mean_over_supervised_tokens(tmp_path):
    model = tiny("opt", dropout=0.5)
    section = TrainSection(batch=24, steps=1, lr=1e-3, tokens_per_pass=64)
    outcome = fit(tmp_path, model, ROWS, section, eval_rows=HELD_OUT, kind="full")
    total = 0.0
    fresh = tiny("opt", dropout=0.5).eval()
    with torch.no_grad():
        for row in range(len(HELD_OUT)):
            ids = torch.from_numpy(HELD_OUT[row].ids).long()[None]
            labels = torch.where(torch.from_numpy(HELD_OUT[row].supervised)[None], ids, -100)
            total += fresh(ids, labels=labels).loss.item() * HELD_OUT.supervised[row]
    assert outcome.eval_losses[0] == (0, pytest.approx(total / HELD_OUT.supervised.sum(), rel=1e-5))


def overfitting(path, **section):
    """Four rows of random tokens learnt by heart: the loss of other such rows falls a little, then climbs."""
    rows = Rows(ROWS.rows[:4])
    said = []
    given = {
        "batch": 4,
        "steps": 12,
        "lr": 0.02,
        "schedule": "constant",
        "warmup": 0,
        "eval_every": 2,
        "save_every": 100,
    }
    model = lora(tiny("llama"))
    outcome = fit(path, model, rows, TrainSection(**{**given, **section}), eval_rows=HELD_OUT, say=said.append)
    return outcome, model, said


def test_the_best_adapter_is_kept(tmp_path):
    outcome, model, said = overfitting(tmp_path)
    after = dict(outcome.eval_losses[1:])
    assert outcome.best_step == min(after, key=after.get) and outcome.best_eval == after[outcome.best_step]
    assert 0 < outcome.best_step < 12
    assert outcome.saved == f"best of step {outcome.best_step} by eval loss"
    best, last = (
        load_file(tmp_path / one / "adapter_model.safetensors") for one in ("adapter", "checkpoints/step-000012")
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)
    again, _, _ = overfitting(tmp_path / "again", steps=outcome.best_step)
    stopped_there = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], stopped_there[name]) for name in best)
    assert f"not below {outcome.best_eval:.4f} of step {outcome.best_step}" in "\n".join(said)


def test_early_stop(tmp_path):
    outcome, _, said = overfitting(tmp_path, early_stop=2, steps=40)
    assert outcome.steps == outcome.best_step + 4  # two evaluations, two steps apart
    assert said[-1] == "early stop: 2 evaluations in a row without a better loss"
    assert (tmp_path / "checkpoints" / f"step-{outcome.steps:06d}").is_dir()
    resumed = fit(
        tmp_path,
        lora(tiny("llama")),
        Rows(ROWS.rows[:4]),
        TrainSection(batch=4, steps=40, early_stop=2),
        eval_rows=HELD_OUT,
        resume=tmp_path / "checkpoints" / f"step-{outcome.steps:06d}",
    )
    assert (resumed.steps, resumed.best_step) == (outcome.steps, outcome.best_step)  # it had ended


def test_evaluations_without_a_better_loss_count_in_a_row(tmp_path):
    run = SimpleNamespace(state=TrainState(64, step=1), write_best=lambda: None)
    counts = []
    for loss in (3.0, 3.1, 2.9, 2.9, 3.5):
        Training.compare(run, loss)
        counts.append(run.state.not_better)
        run.state.step += 1
    assert counts == [0, 1, 0, 1, 2]
    assert (run.state.best_step, run.state.best_eval) == (3, 2.9)


def test_a_run_that_did_not_help_says_so(tmp_path):
    outcome, _, said = overfitting(tmp_path, steps=40, eval_every=40)
    (_, before), (_, after) = outcome.eval_losses
    assert after > before
    assert said[-1] == f"the eval loss never fell below the {before:.4f} of step 0: the training did not help"
    assert outcome.best_step == 40  # the base model is no result of the run


def test_without_eval_rows_the_last_is_kept(tmp_path):
    model = lora(tiny("llama"))
    outcome = fit(tmp_path, model, ROWS, TrainSection(batch=8, steps=3, lr=1e-3))
    assert (outcome.saved, outcome.best_step, outcome.eval_losses) == ("last", None, [])
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in trained(model).items():
        assert torch.equal(kept[name.replace(".default", "")], value)
    assert not model.training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_can_go_on(tmp_path, number):
    def say(line):
        if line.startswith("step") and line.split()[1] == "3/8":
            os.kill(os.getpid(), number)

    section = TrainSection(batch=8, steps=8, lr=1e-3)
    outcome = fit(tmp_path / "run", lora(tiny("llama")), ROWS, section, say=say)
    assert (outcome.stopped, outcome.steps, outcome.saved) == (number, 3, "last")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    resumed = fit(tmp_path / "run", lora(tiny("llama")), ROWS, section, resume=checkpoint)
    assert resumed.losses == fit(tmp_path / "straight", lora(tiny("llama")), ROWS, section).losses


class Poisoned(Rows):
    """Rows of which some hold a token whose embedding is not a number."""

    BAD = 2

    def __init__(self, rows, bad):
        super().__init__(
            [([self.BAD, *ids[1:]] if row in bad else ids, prompt) for row, (ids, prompt) in enumerate(rows.rows)]
        )


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves_and_names_the_rows(tmp_path):
    order = order_of([(0, 24, 1.0)], seed=7, batch=8)
    third = order.rows(2)
    rows = Poisoned(ROWS, {int(third[1]), int(third[5])})
    model = lora(tiny("llama"))
    model.get_base_model().model.embed_tokens.weight.data[Poisoned.BAD] = math.nan
    before = []

    def say(line):
        if line.startswith("step") and line.split()[1] == "2/6":
            before.append(trained(model))

    with pytest.raises(RunError) as error:
        fit(tmp_path, model, rows, TrainSection(batch=8, steps=6, save_every=2), say=say)
    assert str(error.value) == (
        "step 3: loss nan, gradient norm nan; this step has changed no weight; rows that give this by themselves: "
        f"rows.jsonl:{third[1] + 1}, rows.jsonl:{third[5] + 1}; "
        f"last good checkpoint: {tmp_path}/checkpoints/step-000002; "
        "look at those rows, lower train.lr, or compute in fp32"
    )
    assert all(torch.equal(value, before[0][name]) for name, value in trained(model).items())
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_gradient_that_is_not_finite_though_the_loss_is(tmp_path):
    model = tiny("llama")
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        RunError, match=r"^step 1: loss \d\.\d+, gradient norm (nan|inf); .* rows\.jsonl:\d+, .* and|^step 1"
    ) as error:
        fit(tmp_path, model, ROWS, TrainSection(batch=8, steps=3), kind="full")
    assert "every row gives this by itself" in str(error.value)


def test_an_eval_loss_that_is_not_finite(tmp_path):
    model = lora(tiny("llama"))
    model.get_base_model().model.embed_tokens.weight.data[Poisoned.BAD] = math.nan
    with pytest.raises(RunError) as error:
        fit(tmp_path, model, Poisoned(ROWS, set()), TrainSection(batch=8, steps=3), eval_rows=Poisoned(HELD_OUT, {4}))
    assert str(error.value).startswith("evaluation at step 0: loss nan; ")
    assert "rows that give this by themselves: rows.jsonl:5; last good checkpoint: none yet; " in str(error.value)


def test_a_tensor_that_does_not_move_stops_the_run(tmp_path):
    model = lora(tiny("llama"))
    model.get_base_model().model.layers[1].mlp.unused = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(RunError) as error:
        fit(tmp_path, model, ROWS, TrainSection(batch=8, steps=6, lr=1e-3))
    assert str(error.value) == (
        "after 3 steps 1 trainable tensor(s) have not moved; no gradient reaches "
        "base_model.model.model.layers.1.mlp.unused.weight: are they used in the forward pass?"
    )


def test_a_run_too_short_for_that_check_says_so(tmp_path):
    said = []
    fit(tmp_path, lora(tiny("llama")), ROWS, TrainSection(batch=8, steps=2), say=said.append)
    assert said[0] == "not checked that every trainable tensor moves: that takes 3 steps"


@pytest.mark.parametrize("behind", [27, 28])
def test_the_last_rates_of_a_schedule_move_little_and_a_resumed_run_ends_well(tmp_path, behind):
    section = TrainSection(batch=8, steps=30, lr=1e-6, warmup=0, save_every=1, keep="all")
    expected = fit(tmp_path / "run", tiny("llama"), ROWS, section, kind="full")
    resume, model, said = tmp_path / "run" / "checkpoints" / f"step-{behind:06d}", tiny("llama"), []
    outcome = fit(tmp_path / "run", model, ROWS, section, kind="full", resume=resume, say=said.append)
    assert outcome.losses == expected.losses
    assert not [line for line in said if "moves" in line]  # it was checked at step 3


def test_a_long_warm_up_at_a_low_rate_goes_on(tmp_path):
    """At step 20 the rate is 2e-8, and the norms' weights of 1 lie 6e-8 apart."""
    said = []
    section = TrainSection(batch=8, steps=1000, lr=1e-6, warmup=1000)

    def say(line):
        said.append(line)
        if line.startswith("step") and line.split()[1] == "25/1000":
            os.kill(os.getpid(), signal.SIGTERM)

    assert fit(tmp_path, tiny("llama"), ROWS, section, kind="full", say=say).steps == 25
    [told] = [line for line in said if line.startswith("not moved")]
    assert told.startswith("not moved after 3 steps, since the warm-up's first steps are lost in rounding: model.")
    assert told.endswith("; checked again after step 1000")


def test_bf16_arithmetic_over_fp32_weights_is_autocast(tmp_path):
    def run(precision):
        model = tiny("llama")
        outcome = fit(
            tmp_path / precision,
            model,
            ROWS,
            TrainSection(batch=24, steps=4, lr=1e-3, precision=precision),
            kind="full",
        )
        assert all(value.dtype == torch.float32 for value in model.parameters())
        return np.array(outcome.losses)

    gap = np.abs(run("bf16") - run("fp32")).max()
    assert 1e-6 < gap < 0.05
    assert (run("auto") == run("fp32")).all()


def test_precision_follows_the_weights_or_is_refused():
    half = lora(tiny("llama").bfloat16())
    assert autocast_dtype(half, TrainSection()) is None and autocast_dtype(half, TrainSection(precision="bf16")) is None
    with pytest.raises(RecipeError) as error:
        autocast_dtype(half, TrainSection(precision="fp32"))
    assert str(error.value) == "train.precision: fp32, but the weights are held in bf16; change model.dtype"


def test_fp32_adapters_on_a_bf16_model_train(tmp_path):
    model = lora(tiny("llama").bfloat16())
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    losses = fit(tmp_path, model, ROWS, TrainSection(batch=24, steps=10, lr=0.01)).losses
    assert losses[-1] < losses[0] - 0.2

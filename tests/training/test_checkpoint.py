"""Five steps, a kill, a resume and five steps are ten steps, bit for bit."""

from __future__ import annotations

import json
import random
import resource
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.engine.products import faster
from luthier.errors import RunError
from luthier.models.adapters import attach, save_adapter
from luthier.quiet import quiet
from luthier.sections import MethodSection, TrainSection
from luthier.training import checkpoint
from luthier.training.checkpoint import TrainState, latest
from luthier.training.optim import make_optimizer
from rows import fit, lora, random_rows, tiny, trained

ROWS = random_rows(28)  # batch 4: 7 steps an epoch, so that step 10 lies in the second
HELD_OUT = random_rows(9, seed=1)


class Killed(BaseException):
    """Stands for kill -9: nothing of the run's own handling may be needed afterwards."""


def killer(step, steps=10):
    def say(line):
        if line.startswith("step") and line.split()[1] == f"{step}/{steps}":
            raise Killed

    return say


def adapted():
    return lora(tiny("qwen2"), lora_dropout=0.1)


def disturb():
    """Another process would have other generators."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def complete(path):
    return sorted(one.name for one in (path / "checkpoints").iterdir())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["lora", "full", "full tied", "opt with dropout"])
def test_kill_and_resume_is_no_difference(tmp_path, method, recompute):
    make = {
        "lora": adapted,
        "full": lambda: tiny("llama").train(),
        "full tied": lambda: tiny("qwen2", tied=True).train(),
        "opt with dropout": lambda: tiny("opt", tied=True, dropout=0.1),
    }[method]
    kind = "lora" if method == "lora" else "full"
    section = TrainSection(
        batch=4,
        steps=10,
        save_every=5,
        eval_every=3,
        lr=3e-3,
        warmup=2,
        tokens_per_pass=50,
        activation_checkpointing=recompute,
    )
    straight = make()
    expected = fit(tmp_path / "straight", straight, ROWS, section, eval_rows=HELD_OUT, kind=kind)
    with pytest.raises(Killed):
        fit(tmp_path / "run", make(), ROWS, section, eval_rows=HELD_OUT, kind=kind, say=killer(8))
    assert complete(tmp_path / "run") == ["step-000005"]
    disturb()
    resumed, said = make(), []
    resume = latest(tmp_path / "run" / "checkpoints")
    outcome = fit(
        tmp_path / "run", resumed, ROWS, section, eval_rows=HELD_OUT, kind=kind, resume=resume, say=said.append
    )
    assert outcome.losses == expected.losses and len(expected.losses) == 10
    assert outcome.eval_losses == expected.eval_losses
    assert [step for step, _ in expected.eval_losses] == [0, 3, 6, 9, 10]
    assert (outcome.best_step, outcome.tokens, outcome.saved) == (expected.best_step, expected.tokens, expected.saved)
    weights, others = trained(straight), trained(resumed)
    assert all(torch.equal(weights[name], others[name]) for name in weights) and len(weights) == len(others)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(11))
    assert not [line for line in said if line.startswith("resume:")]


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_a_and_b_started_from_comes_back(tmp_path, kind):
    """Decomposed anew elsewhere it may have other signs: the run goes on from its own start."""
    quiet()  # peft warns while it attaches

    def begun(sign=1):
        model = attach(tiny("llama"), MethodSection(kind=kind, r=4), 3, say=lambda line: None)
        for layer in model.modules():
            if hasattr(layer, "luthier_start_a"):
                layer.luthier_start_a.mul_(sign)
                layer.luthier_start_b.mul_(sign * 1.01)
        return model

    def run(path, model, **options):
        return fit(path, model, ROWS, section, write=lambda folder: save_adapter(model, folder), **options)

    section = TrainSection(batch=4, steps=6, save_every=3, lr=3e-3)
    straight = begun()
    expected = run(tmp_path / "run", straight)
    elsewhere = begun(-1)
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    assert run(tmp_path / "run", elsewhere, resume=folder).losses == expected.losses
    weights, others = trained(straight), trained(elsewhere)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r": damaged \(.*adapter_model\.safetensors"):
        run(tmp_path / "run", begun(), resume=folder)


def test_dropout_matters_in_that_test(tmp_path):
    section = TrainSection(batch=4, steps=10, lr=3e-3)
    with_dropout = fit(tmp_path / "a", adapted(), ROWS, section)
    assert with_dropout.losses != fit(tmp_path / "b", lora(tiny("qwen2")), ROWS, section).losses


@pytest.fixture
def saved(tmp_path):
    """A run of six steps with a checkpoint at each, keep 3, and its model."""
    model = adapted()
    fit(tmp_path / "run", model, ROWS, TrainSection(batch=4, steps=6, save_every=1, lr=3e-3))
    return tmp_path / "run", model


def test_the_newest_are_kept(saved):
    path, _ = saved
    assert complete(path) == ["step-000004", "step-000005", "step-000006"]
    assert latest(path / "checkpoints") == path / "checkpoints" / "step-000006"


def test_keep_all(tmp_path):
    fit(tmp_path / "run", adapted(), ROWS, TrainSection(batch=4, steps=5, save_every=1, keep="all"))
    assert len(complete(tmp_path / "run")) == 5


def test_leftovers_of_a_killed_write_are_no_checkpoint_and_go_at_the_next(tmp_path):
    (tmp_path / "run" / "checkpoints" / ".step-000009.x7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000008").mkdir()  # no state.json in it
    assert latest(tmp_path / "run" / "checkpoints") is None
    fit(tmp_path / "run", adapted(), ROWS, TrainSection(batch=4, steps=3))
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000003"
    assert ".step-000009.x7" not in complete(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use of it
def test_an_adapter_checkpoint_is_a_peft_folder(saved):
    path, model = saved
    loaded = PeftModel.from_pretrained(tiny("qwen2"), latest(path / "checkpoints")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny("qwen2").eval()(ids).logits)


def test_a_full_checkpoint_is_a_model_folder(tmp_path):
    model = tiny("llama")
    fit(tmp_path / "run", model, ROWS, TrainSection(batch=4, steps=3, lr=1e-3), kind="full")
    ids = torch.tensor([[5, 6, 7, 8]])
    for folder in (latest(tmp_path / "run" / "checkpoints"), tmp_path / "run" / "model"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
    assert not (tmp_path / "run" / "adapter").exists()


def test_every_generator_comes_back(tmp_path):
    model = adapted()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = make_optimizer(parameters, TrainSection())
    disturb()
    mine = checkpoint.generators(torch.device("cpu"))
    torch.manual_seed(77)
    other = checkpoint.generators(torch.device("cpu"))  # of another process
    elsewhere = torch.rand(2).tolist()
    torch.set_rng_state(mine.torch["cpu"])
    state = TrainState(64, step=1)
    folder = checkpoint.save(tmp_path, model.save_pretrained, parameters, optimizer, state, 3, [mine, other])

    def draw():
        return (
            torch.rand(2).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.standard_normal(),
        )

    expected = draw()
    assert draw() != expected
    said = []
    assert checkpoint.load(folder, parameters, optimizer, said.append, rank=0, processes=2) == TrainState(64, step=1)
    assert draw() == expected and said == []
    checkpoint.load(folder, parameters, optimizer, said.append, rank=1, processes=2)
    assert torch.rand(2).tolist() == elsewhere and said == []
    checkpoint.load(folder, parameters, optimizer, said.append)
    checkpoint.load(folder, parameters, optimizer, said.append, exact=False)
    assert said == [
        "resume: processes 2 → 1: the numbers will be equal only to rounding",
        "resume: processes 2 → 1: the numbers will differ (train.base_dropout)",
    ]


def test_another_torch_or_thread_count_is_said(saved):
    path, _ = saved
    state = latest(path / "checkpoints") / "state.json"
    record = json.loads(state.read_text())
    assert record["environment"] == {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "device": "cpu",
        "processes": "1",
        "products": "fp32" if faster() else "16 bits",
    }
    record["environment"] |= {"torch": "2.0.1", "threads": "64"}
    state.write_text(json.dumps(record))
    said = []
    fit(path, adapted(), ROWS, TrainSection(batch=4, steps=7), resume=state.parent, say=said.append)
    assert said[0] == (
        f"resume: torch 2.0.1 → {torch.__version__}, threads 64 → {torch.get_num_threads()}: "
        "the numbers will be equal only to rounding"
    )


def test_the_decided_pass_size_is_taken_over_and_the_recipe_wins(saved, tmp_path):
    """Sabotage that it catches: tokens_per_pass not restored, but measured anew."""
    path, _ = saved
    state = latest(path / "checkpoints") / "state.json"
    record = json.loads(state.read_text())
    assert record["state"]["tokens_per_pass"] == 4096
    record["state"]["tokens_per_pass"] = 20  # as if there had been little memory when the run began
    state.write_text(json.dumps(record))
    shutil.copytree(path, tmp_path / "copy")
    copy = tmp_path / "copy"

    def passes_of_the_next_step(folder, **given):
        section = TrainSection(batch=4, steps=7, **given)
        fit(folder, adapted(), ROWS, section, resume=folder / "checkpoints" / "step-000006")
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["passes"]

    assert passes_of_the_next_step(path) > 1
    assert passes_of_the_next_step(copy, tokens_per_pass=1000) == 1


def test_other_trainable_tensors_are_refused(saved):
    path, _ = saved
    folder = latest(path / "checkpoints")
    with pytest.raises(RunError) as error:
        fit(path, tiny("qwen2"), ROWS, TrainSection(batch=4, steps=7), kind="full", resume=folder)
    assert str(error.value).startswith(f"{folder}: was written for other trainable tensors (base_model.model.")
    assert str(error.value).endswith(" …): method or model have changed")


def test_a_damaged_checkpoint_is_one_line(saved):
    path, _ = saved
    folder = latest(path / "checkpoints")
    data = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError) as error:
        fit(path, adapted(), ROWS, TrainSection(batch=4, steps=7), resume=folder)
    assert str(error.value).startswith(f"{folder}: damaged (")
    assert str(error.value).endswith("; delete it to resume from the checkpoint before it")


def test_a_checkpoint_that_lacks_a_tensor_is_damaged(saved):
    path, _ = saved
    folder = latest(path / "checkpoints")
    tensors = load_file(folder / "state.safetensors")
    name = next(name for name in tensors if name.startswith("weight/"))
    del tensors[name]
    save_file(tensors, folder / "state.safetensors")
    with pytest.raises(RunError) as error:
        fit(path, adapted(), ROWS, TrainSection(batch=4, steps=7), resume=folder)
    assert str(error.value) == (
        f"{folder}: damaged (it lacks {name.removeprefix('weight/')}); "
        "delete it to resume from the checkpoint before it"
    )


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    """A real limit on the size of a file, set after the second step; the third step's checkpoint meets it."""
    path = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def say(line):
        if line.startswith("step") and " 3/6 " in line.replace("step  ", " "):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(RunError) as error:
            fit(path, adapted(), ROWS, TrainSection(batch=4, steps=6, save_every=1, lr=3e-3), say=say)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{path}: no room left on the disk; last good checkpoint: {path}/checkpoints/step-000002; "
        "free some space and resume"
    )
    assert complete(path) == ["step-000001", "step-000002"]
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("failed", 3, str(error.value))
    outcome = fit(path, adapted(), ROWS, TrainSection(batch=4, steps=6, lr=3e-3), resume=latest(path / "checkpoints"))
    assert outcome.losses == fit(tmp_path / "b", adapted(), ROWS, TrainSection(batch=4, steps=6, lr=3e-3)).losses

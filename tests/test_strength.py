"""An adapter at part of its strength: the weights between base and tuned, what is measured there, and what is shown."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from datetime import date
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from luthier import verbs
from luthier.data.encode import Encoder
from luthier.data.prepare import Data, prepare
from luthier.errors import DataError, ModelError, RecipeError
from luthier.folder import write_json
from luthier.loaded import load_data
from luthier.merge import merge
from luthier.models.adapters import adapter_off, attach, save_adapter
from luthier.models.load import load_model
from luthier.models.scaling import at_strength, check_kind, differing, set_whole, strength_of
from luthier.quiet import quiet
from luthier.replies import Question, Reply
from luthier.run import load_run, train
from luthier.scores import Score, figures, least, mean, resampled, share_bounds
from luthier.sections import DataSection, GenerateSection, MethodSection, ModelSection
from luthier.strength import OWN, STRENGTHS, Strengths, drawn_rows, losses, measure, passages, pieces
from luthier.verify import main as verify
from luthier.verify import write_rows
from luthier.view.strengthpage import advice, markdown, show, strength_html
from tiny import moved, tiny_llama, tiny_qwen2, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 77, 140, 8, 6]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    quiet()


def silent(line: str) -> None:
    """Say nothing."""


def load(path: Path) -> Any:
    return load_model(path, ModelSection(name="tiny"), CPU, say=silent)


def adapted(path: Path, **method: Any) -> Any:
    return moved(attach(load(path), MethodSection.model_validate(method), 1, say=silent))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[0].float()


# -- the weights ------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"kind": "lora"},
    {"kind": "lora", "bias": "all", "modules_to_save": ["lm_head"], "target": ["q_proj", "embed_tokens"]},
    {"kind": "dora"},
    {"kind": "rslora"},
    {"kind": "ia3"},
    {"kind": "loha"},
    {"kind": "oft"},
    {"kind": "ln_tuning"},
]


@pytest.mark.parametrize("method", KINDS, ids=lambda method: "-".join([method["kind"], *list(method)[1:]]))
def test_every_weight_goes_the_fraction_of_its_way(tmp_path: Path, method: dict[str, Any]) -> None:
    """PEFT's own merge says where base and tuned are; a plain model in between says what the logits there are."""
    base = tiny_qwen2(tmp_path / "base")
    model, plain = adapted(base, **method), load(base)
    tuned, before = logits(model), dict(plain.state_dict())
    with at_strength(model, 0.0):
        assert torch.equal(logits(model), logits(plain))
    with at_strength(model, 1.0):
        assert torch.equal(logits(model), tuned)
    found = {}
    for strength in (0.4, 1.25):
        with at_strength(model, strength):
            found[strength] = logits(model)
    assert torch.equal(logits(model), tuned), "behind the block it is as it was, to the last bit"
    after = model.merge_and_unload().state_dict()
    for strength, here in found.items():
        between = {name: value + strength * (after[name] - value) for name, value in before.items()}
        moving = load(base)
        moving.load_state_dict(between)
        assert (here - logits(moving)).abs().max() < 1e-4, strength
        assert (here - tuned).abs().max() > 1e-3, strength


@pytest.mark.parametrize("kind", ["bottleneck", "llama_adapter"])
def test_what_stands_beside_the_layers_is_scaled_too(tmp_path: Path, kind: str) -> None:
    model = adapted(tiny_llama(tmp_path / "base"), kind=kind)
    tuned = logits(model)
    with adapter_off(model):
        base = logits(model)
    with at_strength(model, 0.0):
        assert torch.equal(logits(model), base)
    ways = []
    for strength in (1e-3, 0.5, 0.999):
        with at_strength(model, strength):
            ways.append(((logits(model) - base).norm() / (tuned - base).norm()).item())
    assert ways[0] < 0.01 < 0.2 < ways[1] < 0.9 < 0.99 < ways[2] < 1.01, ways
    assert torch.equal(logits(model), tuned)


def test_a_whole_model_goes_there_and_back(tmp_path: Path) -> None:
    base, tuned = load(tiny_llama(tmp_path / "base")), load(tiny_llama(tmp_path / "base2"))
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight += 0.1
    away, full = logits(base), logits(tuned)
    moves = differing(base, tuned)
    assert list(moves) == ["model.layers.1.mlp.up_proj.weight"]
    set_whole(tuned, moves, 0.0)
    assert torch.equal(logits(tuned), away)
    set_whole(tuned, moves, 0.5)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight += 0.05
    assert (logits(tuned) - logits(base)).abs().max() < 1e-4
    set_whole(tuned, moves, 1.0)
    assert torch.equal(logits(tuned), full)


def test_a_merge_at_part_of_the_strength_is_proven(tmp_path: Path) -> None:
    base, adapter, out = tiny_llama(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    model = adapted(base, kind="lora", modules_to_save=["lm_head"])
    save_adapter(model, adapter, tiny_tokenizer())
    said: list[str] = []
    merge(base, adapter, out, say=said.append, strength=0.7)
    assert said == [f"{out}: 15 of 21 tensors changed, in fp32, at strength 0.7"]
    with at_strength(model, 0.7):
        assert (logits(load(out)) - logits(model)).abs().max() < 2e-5
    assert (logits(load(out)) - logits(model)).abs().max() > 0.05
    note = json.loads((out / "luthier_merge.json").read_text())
    assert note["strength"] == 0.7
    rows = tmp_path / "rows.npz"
    write_rows([(IDS[0].numpy(), np.arange(8) > 2)], rows)
    assert verify([str(out), str(rows)]) == 0
    assert json.loads((out / "luthier_merge.json").read_text())["verified"] is True
    for other in (0.8, 1.0):
        write_json(out / "luthier_merge.json", note | {"strength": other})
        assert verify([str(out), str(rows)]) == 1, "another strength is another model"


def test_strength_1_merges_to_the_very_same_files(tmp_path: Path) -> None:
    base, adapter = tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(adapted(base, kind="lora", modules_to_save=["lm_head"]), adapter, tiny_tokenizer())
    merge(base, adapter, tmp_path / "a", say=silent)
    merge(base, adapter, tmp_path / "b", say=silent, strength=1.0)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert "strength" not in json.loads((tmp_path / "a" / "luthier_merge.json").read_text())


@pytest.mark.parametrize("tie", [False, True])
def test_a_whole_model_merges_part_of_the_way(tmp_path: Path, tie: bool) -> None:
    base, tuned, out = tiny_llama(tmp_path / "base", tie_word_embeddings=tie), tmp_path / "tuned", tmp_path / "merged"
    save_adapter(adapted(base, kind="full"), tuned, tiny_tokenizer())
    assert merge(base, tuned, out, say=silent, strength=0.25).untied is False
    before, after, found = (load_file(path / "model.safetensors") for path in (base, tuned, out))
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, before[name] + 0.25 * (after[name] - before[name]), rtol=0, atol=1e-6)
        assert not torch.equal(tensor, after[name]), name
    rows = tmp_path / "rows.npz"
    write_rows([(IDS[0].numpy(), np.arange(8) > 2)], rows)
    assert verify([str(out), str(rows)]) == 0


@pytest.mark.parametrize("given", ["half", "-0.5", "2.1", "nan", "inf", "", -1, 1e9])
def test_what_is_no_strength(given: object) -> None:
    with pytest.raises(RecipeError) as caught:
        strength_of(given)
    assert str(caught.value) == f"--strength {given}: it is a number from 0 (the base) over 1 (as trained) to 2"


def test_what_has_no_strength(tmp_path: Path) -> None:
    for kind in ("prompt", "prefix", "p_tuning"):
        with pytest.raises(RecipeError, match=f"strength: {kind} trains virtual tokens, and the model sees them or"):
            check_kind(kind)
    model = adapted(tiny_llama(tmp_path / "base"), kind="lora")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ModelError, match="an adapter that began as pissa moved the base"), at_strength(model, 0.5):
        pass


# -- the measurement --------------------------------------------------------------------------------------------------


def data_of(folder: Path, **section: Any) -> tuple[Data, Encoder]:
    rows = {"train": [("a", "x")], "eval": [(f"where is {i}", f"there {i}") for i in range(6)]}
    for name, pairs in rows.items():
        text = "".join(json.dumps({"prompt": said, "response": answer}) + "\n" for said, answer in pairs)
        (folder / f"{name}.jsonl").write_text(text)
    asked = DataSection(train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl"), **section)
    encoder = Encoder(tiny_tokenizer(), asked, date(2026, 3, 4))
    return prepare(asked, encoder, silent), encoder


def test_what_is_measured_at_each_strength(tmp_path: Path) -> None:
    model = adapted(tiny_llama(tmp_path / "base"), kind="lora")
    data, encoder = data_of(tmp_path)
    steps: list[int] = []

    @contextmanager
    def bar(things: int) -> Any:
        steps.append(things)
        yield lambda: steps.append(1)

    (tmp_path / "mine.txt").write_text("One passage.\r\n\r\n\r\n第二段。\n")
    said: list[str] = []
    found = measure(
        partial(at_strength, model),
        prompts=["Who?"],
        data=data,
        encoder=encoder,
        tokenizer=tiny_tokenizer(),
        section=GenerateSection(max_new_tokens=4, sample=True),
        end_ids=[1],
        rows=5,
        text=passages(tmp_path / "mine.txt"),
        source="mine.txt",
        say=said.append,
        bar=bar,
    )
    tokens = sum(len(encoder.prompt(text, raw=True)) - 1 for text in ("One passage.", "第二段。"))
    assert said == [f"strength: 5 of 6 held-out rows, 1 prompts, {tokens} tokens of mine.txt"]
    assert steps[0] == sum(steps[1:]) == 6 * (5 + 2 + 1)
    assert tuple(found.scores) == STRENGTHS and len(found.questions) == 6
    chosen = drawn_rows(data.eval, encoder, 5)
    for strength in (0.0, 0.5, 1.0):
        with at_strength(model, strength), torch.no_grad():
            for (ids, places), (loss, count) in zip(chosen, found.scores[strength].rows, strict=True):
                spread = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                assert count == len(places)
                assert loss == pytest.approx(-sum(spread[at - 1, ids[at]].item() for at in places), rel=1e-4)
    written = found.as_json()
    assert [one["strength"] for one in written["strengths"]] == list(STRENGTHS)
    assert written["strengths"][0]["perplexity_change"] == 0
    assert set(written["answers"][0]["replies"]) == {"0", "0.25", "0.5", "0.75", "1", "1.25"}
    with pytest.raises(DataError, match=r"nowhere.txt: No such file or directory; it is plain text"):
        passages(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n\n \n")
    with pytest.raises(DataError, match=r"empty.txt: it holds no text"):
        passages(tmp_path / "empty.txt")
    (tmp_path / "gbk.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(DataError, match=r"gbk.txt: not UTF-8"):
        passages(tmp_path / "gbk.txt")


def test_the_general_text_fits_the_models_window(tmp_path: Path) -> None:
    _, encoder = data_of(tmp_path)
    texts = passages(None)
    own = pieces(encoder, texts, None)
    assert len(texts) == len(own) == 24 and all(100 < len(ids) <= 512 for ids, _ in own)
    assert sum(bool(re.search("[一-龥]", text)) for text in texts) == 12
    cut = pieces(encoder, texts, 64)
    assert max(len(ids) for ids, _ in cut) == 64
    assert [id for ids, _ in cut for id in ids][:200] == own[0][0][:200]
    long = pieces(encoder, ["many words of it " * 20_000, "another"], None)
    assert sum(len(ids) for ids, _ in long) == 16_384
    with pytest.raises(DataError, match="--text: it is a single token"):
        pieces(encoder, ["a"], None)


def test_the_figures() -> None:
    questions = [Question("prompt 1", "?", [1]), *(Question(f"e:{i}", "?", [1], "yes") for i in range(4))]
    right, wrong, endless = Reply("yes\n", [1], True), Reply("no", [1], True), Reply("yes", [1], False)
    base = Score([(8.0, 2), (4.0, 2)], [(20.0, 10), (30.0, 10)], [wrong] * 5)
    tuned = Score([(2.0, 2), (2.0, 2)], [(22.0, 10), (32.0, 10)], [wrong, right, right, endless, wrong])
    found = figures([tuned], base, questions)
    assert (found["loss"], found["loss_bounds"]) == (1.0, (1.0, 1.0))
    assert (found["exact"], found["answered"], found["exact_share"], found["stopped_share"]) == (3, 4, 0.75, 0.75)
    assert found["perplexity"] == pytest.approx(math.exp(2.7))
    assert found["perplexity_change"] == pytest.approx(math.exp(0.2) - 1)
    assert found["perplexity_change_bounds"] == pytest.approx((math.exp(0.2) - 1,) * 2), "both read the same texts"
    bare = figures([Score([], [(1.0, 1)], [wrong])], Score([], [(1.0, 1)], [wrong]), questions[:1])
    assert (bare["loss"], bare["exact_share"], bare["stopped_share"]) == (None, None, 1.0)


def test_bounds() -> None:
    """Wilson's by a published table (R's binom.wilson); the bootstrap's cover a mean as often as they say."""
    assert share_bounds(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert share_bounds(0, 64) == pytest.approx((0, 0.0566), abs=1e-4)
    assert share_bounds(64, 64) == pytest.approx((0.9434, 1), abs=1e-4)
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        low, high = resampled(mean, [(value, 1) for value in generator.normal(3, 1, 40).tolist()])
        covered += low < 3 < high
    assert 51 <= covered <= 60


# -- what is shown ----------------------------------------------------------------------------------------------------

SHARES = {0.0: 0, 0.25: 1, 0.5: 6, 0.75: 8, 1.0: 8, 1.25: 7}
EVIL = "<b>你好</b> | `y` *z*"


def strengths(forgets: float = 0.1, shares: dict[float, int] | None = None, held: int = 8) -> Strengths:
    questions = [Question("prompt 1", EVIL, [1]), *(Question(f"e:{i}", "?", [1], "yes") for i in range(held))]
    scores = {}
    for at, right in (shares or SHARES).items():
        replies = [Reply(f"在灰水镇 {at:g} {EVIL}", [1], at < 1)]
        replies += [Reply("yes" if i < right else "no", [1], True) for i in range(held)]
        rows = [(6.0 - right * 0.7 + 0.01 * i, 2) for i in range(held)]
        scores[at] = Score(rows, [(30.0 + 10 * forgets * at + 0.01 * i, 10) for i in range(9)], replies)
    return Strengths(questions, scores, OWN, 384)


def test_the_least_strength_that_does_the_task() -> None:
    assert strengths().best == 0.75
    assert least(strengths(shares={**SHARES, 0.75: 7}).figures()) is None
    assert strengths(forgets=-0.1).best is None, "where nothing is forgotten there is no reason for less"
    assert strengths(shares=dict.fromkeys(SHARES, 0)).best is None, "nor where nothing is learnt"
    said = advice(strengths())
    assert said == (
        "Strength 0.75 answers no fewer rows exactly than 1; at 1 the perplexity of general text changes by +10.5 %, "
        "at 0.75 by +7.8 %."
    )
    assert advice(strengths(forgets=-0.1)).startswith("At strength 1 no forgetting is certain: the perplexity")
    unknown = Strengths(strengths().questions, strengths().scores, OWN, 7)
    assert advice(unknown).startswith("The base does not know this general text: to guess among its 7 tokens is")
    assert unknown.best is None


def test_the_screen_holds_in_80_columns() -> None:
    screen = Console(file=StringIO(), width=80, legacy_windows=False)
    show(strengths(), screen)
    assert isinstance(screen.file, StringIO)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert "…" not in "".join(lines)
    assert lines[0].split() == ["strength", "held-out", "loss", "exact", "stopped", "general", "text", "change"]
    assert lines[1].split() == ["0", "3.0175", "0.0", "%", "100.0", "%", "20.17", "base"]
    ends = {match.end() for line in lines[1:3] for match in re.finditer(r"3.0175|3 to 3", line)}
    assert len(ends) == 1, "figures and their bounds end in one column"


def test_the_page_and_markdown() -> None:
    told = {"name": "town", "about": "tiny · LoRA"}
    page, text = strength_html(strengths(), **told), markdown(strengths(), **told)
    assert page.count("<figure") == 3 and page.count("<circle") == 6
    for at in SHARES:
        assert f">{at:g}</text>" in page
        assert f"| {at:g} | 在灰水镇 {at:g} " in text
    for written in (page, text):
        assert "+10.5 %" in written and "<b>你好" not in written and "http" not in written
    assert "Strength 0.75 answers no fewer rows exactly" in page
    plots = strength_html(strengths(held=0), **told)
    assert "nan" not in plots and plots.count("<figure") == 1


# -- the verbs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_at_each_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model")
    rows = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "town.yaml").write_text(
        "model: {name: ./model}\ndata: {train: rows.jsonl, eval: 4}\n"
        f"method: {{kind: {kind}}}\ntrain: {{batch: 4, steps: 2, lr: 1e-2, warmup: 0}}\n"
        "generate: {prompts: [你好], max_new_tokens: 3}\n"
    )
    run = train("town.yaml", say=silent, proof=False)
    said: list[str] = []
    found = verbs.strengths(run, rows=3, say=said.append)
    page = run.folder.path / "strength.html"
    assert 'href="strength.html"' in (run.folder.path / "report.html").read_text()
    assert said[-2].startswith("strength: 3 of 4 held-out rows, 1 prompts, ") and said[-1] == f"page: {page}"
    assert said[-2].endswith(" tokens of Luthier's general text")
    written = json.loads(page.with_suffix(".json").read_text())
    assert [one["loss"] for one in written["strengths"]] == [one["loss"] for one in found.figures().values()]
    assert written["strengths"][0]["loss"] > written["strengths"][4]["loss"], "it has learnt a little"
    chosen = drawn_rows(load_data(run.recipe, load_run(run).encoder, silent).eval, load_run(run).encoder, 3)
    for strength, base in ((0.0, True), (1.0, False)):
        there = list(losses(load_run(run, base=base).model, chosen, lambda: None))
        assert there == found.scores[strength].rows, "the very numbers of the model as it answers elsewhere"
    assert "你好" in page.with_suffix(".md").read_text() and "你好" in page.read_text()


@pytest.mark.parametrize(
    ("kind", "strength", "message"),
    [
        ("lora", "0", "--strength 0 is the base itself: there is nothing to merge"),
        ("lora", "x", "--strength x: it is a number from 0 (the base) over 1 (as trained) to 2"),
        ("prefix", "1", "runs/town: prefix cannot be merged: what it learnt is keys and values that every token sees"),
    ],
)
def test_merges_that_are_refused_before_anything_is_read(kind: str, strength: str, message: str) -> None:
    recipe = SimpleNamespace(method=SimpleNamespace(kind=kind))
    run: Any = SimpleNamespace(recipe=recipe, folder=SimpleNamespace(shown="runs/town"))
    with pytest.raises(RecipeError) as caught:
        verbs.merge(run, Path("out"), strength=strength, say=silent)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)

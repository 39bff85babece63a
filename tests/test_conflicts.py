"""Keys that exclude, contradict or need each other, and keys that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.methods import METHODS
from reading import MINIMAL, problem, problems, read

NO_EFFECT = "has no effect, as method.kind is full; leave it out"
GREEDY = "has no effect, as generate.sample is false; write sample: true, or leave it out"


@pytest.mark.parametrize(
    ("section", "body", "message"),
    [
        (
            "data",
            'text: "Q: {q}\\nA: {a}"',
            "data.text: supervise: answers needs to know which column is the answer, and {q}, {a} does not say "
            "so; write "
            "data.columns: {response: a}, or data.supervise: all to teach the whole text",
        ),
        (
            "data",
            'text: "Q: {q}\\nA: {a}"\ncolumns: {response: b}\nsupervise: last_answer',
            "data.text: supervise: last_answer needs to know which column is the answer, and {q}, {a} does not say so; "
            "write data.columns: {response: a}, or data.supervise: all to teach the whole text",
        ),
        (
            "data",
            'text: "{q}"\nsupervise: all\ntemplate: chatml',
            "data.template: data.text is given as well and stands in its place; keep one",
        ),
        (
            "data",
            'text: "{q}"\nsupervise: all\nformat: messages',
            "data.format: messages is written by a template, and data.text is a pattern over columns; keep one",
        ),
        (
            "data",
            'text: "{q}"\nsupervise: all\nsystem: Be kind.',
            "data.system: has no place in data.text, which has no {system}; write it there",
        ),
        (
            "data",
            'text: "{q}"\nsupervise: all\nbefore_prompt: Translate.',
            "data.before_prompt: has no place in data.text, which has no {prompt}; write it there",
        ),
        (
            "data",
            "columns: {messages: chat, response: a}",
            "data.columns: messages is a whole conversation: prompt and response have no place beside it; keep "
            "one or the "
            "other",
        ),
        (
            "data",
            "max_prompt: 2048",
            "data.max_prompt: 2048 leaves no room in data.max_length (2048), which counts both sides",
        ),
        (
            "data",
            "max_prompt: 1500\nmax_answer: 1000",
            "data.max_prompt: together with data.max_answer (1500 + 1000) it exceeds data.max_length (2048); "
            "raise that to "
            "2500 or lower one of them",
        ),
        ("data", "sample: 100\neval: 100", "data.eval: 100 rows leave none of data.sample (100) to train on"),
        (
            "train",
            "epochs: null",
            "train.epochs: is null, and train.steps as well; give one",
        ),
        (
            "train",
            "epochs: 1\nsteps: 5",
            "train.steps: train.epochs is given as well; keep one (on the command line: train.epochs=null)",
        ),
        ("train", "lr: 1e-4\nmin_lr: 1e-3", "train.min_lr: 0.001 is above train.lr (0.0001)"),
        (
            "train",
            "steps: 10\nwarmup: 11",
            "train.warmup: 11 steps are more than train.steps (10): the peak rate would not be reached",
        ),
        ("train", "early_stop: 3", "train.early_stop: there is nothing to evaluate; give data.eval, as in 0.05"),
        ("train", "eval_every: 10", "train.eval_every: there is nothing to evaluate; give data.eval, as in 0.05"),
        ("generate", "temperature: 0.7", f"generate.temperature: {GREEDY}"),
        ("generate", "top_k: 1", f"generate.top_k: {GREEDY}"),
        ("generate", "sample: false\ntop_p: 0.9", f"generate.top_p: {GREEDY}"),
        ("method", "kind: full\nr: 8", f"method.r: {NO_EFFECT}"),
        ("method", "kind: full\nalpha: 16", f"method.alpha: {NO_EFFECT}"),
        ("method", "kind: full\ndropout: 0.0", f"method.dropout: {NO_EFFECT}"),
        ("method", "kind: full\nbias: none", f"method.bias: {NO_EFFECT}"),
        ("method", "kind: full\ntarget: auto", f"method.target: {NO_EFFECT}"),
        ("method", "kind: full\nmodules_to_save: []", f"method.modules_to_save: {NO_EFFECT}"),
        (
            "method",
            "virtual_tokens: 5",
            "method.virtual_tokens: has no effect, as method.kind is lora; leave it out; prompt, prefix, p_tuning and "
            "llama_adapter would take it",
        ),
        (
            "method",
            "kind: prefix\ntarget: [q_proj]",
            "method.target: has no effect, as method.kind is prefix; leave it out; lora, dora, rslora and others would "
            "take it",
        ),
        (
            "method",
            "kind: pissa\ndropout: 0.1",
            "method.dropout: has no effect, as method.kind is pissa; leave it out; lora, dora, rslora and bottleneck "
            "would take it",
        ),
        (
            "method",
            "kind: freeze\nr: 4",
            "method.r: has no effect, as method.kind is freeze; leave it out; lora, dora, rslora and others would "
            "take it",
        ),
        (
            "method",
            "kind: ia3\nplacement: houlsby",
            "method.placement: has no effect, as method.kind is ia3; leave it out; bottleneck would take it",
        ),
        (
            "method",
            "target: [q_proj, lm_head]\nmodules_to_save: [lm_head]",
            "method.modules_to_save: lm_head would be trained whole and get an adapter as well (method.target); "
            "keep one",
        ),
    ],
)
def test_keys_that_are_at_odds(tmp_path: Path, section: str, body: str, message: str) -> None:
    assert problem(tmp_path, section, body) == message


def test_quantised_weights_bear_adapters_only(tmp_path: Path) -> None:
    for held in ("int8", "{kind: int8}"):
        assert problems(tmp_path, MINIMAL, f"model.quantize={held}", "method.kind=full") == [
            "override: method.kind: full trains every weight, and weights in int8 (model.quantize) cannot be trained; "
            "take lora, or model.quantize: none"
        ]
    assert problems(tmp_path, MINIMAL, "model.quantize=nf4", "method.kind=freeze") == [
        "override: method.kind: freeze trains whole layers, and weights in nf4 (model.quantize) cannot be trained; "
        "take lora, or model.quantize: none"
    ]
    assert problems(tmp_path, MINIMAL, "model.quantize=nf4", "method.kind=lokr") == [
        "override: method.kind: lokr reads a layer's shape off weights that lie packed in nf4 (model.quantize); take "
        "lora, or model.quantize: int8"
    ]
    assert problems(tmp_path, MINIMAL, "generate.quantize={kind: nf4}", "method.kind=loha") == [
        "override: generate.quantize: nf4: loha reads a layer's shape off weights that lie packed in nf4 "
        "(generate.quantize); take lora, or generate.quantize: int8"
    ]
    for kind in ("dora", "pissa", "ia3", "adalora", "prefix", "bottleneck", "ln_tuning"):
        for held in ("int8", "nf4"):
            assert read(tmp_path, MINIMAL, f"model.quantize={held}", f"method.kind={kind}").method.kind == kind
    assert problems(tmp_path, MINIMAL, "model.quantize=nf4", "method.bias=all") == [
        "override: method.bias: all trains biases of layers that are held in nf4 (model.quantize); leave it out, or "
        "take model.quantize: none"
    ]
    for section in ("model", "generate"):
        assert problems(tmp_path, MINIMAL, f"{section}.quantize={{kind: int8, double_quant: true}}") == [
            f"override: {section}.quantize.double_quant: has no effect, as kind is int8, whose scales stay in fp32; "
            "leave it out"
        ]
    assert problems(tmp_path, MINIMAL, "train.optimizer=lion_8bit", "train.eps=1e-6") == [
        "override: train.eps: has no effect, as train.optimizer is lion_8bit, which divides by nothing; leave it out"
    ]
    assert read(tmp_path, MINIMAL, "generate.quantize=nf4", "method.kind=full").generate.quantize == "nf4"


def test_keys_of_two_sections_that_are_at_odds(tmp_path: Path) -> None:
    for kind in METHODS:  # in a recipe that says how to merge nothing but the kind need be changed
        assert read(tmp_path, MINIMAL, f"method.kind={kind}", "merge.dtype=fp16").method.kind == kind
    pattern = ("data.text='{quote}'", "data.supervise=all")
    assert problems(tmp_path, MINIMAL, *pattern, "generate.raw=false") == [
        "override: generate.raw: false needs a data.text with an answer column to stop before; leave it out "
        "or write true"
    ]


def test_what_is_at_odds_only_by_accident_is_no_problem(tmp_path: Path) -> None:
    assert read(tmp_path, MINIMAL, "generate.sample=true", "generate.top_k=1").generate.top_k == 1
    assert read(tmp_path, MINIMAL, "generate.top_k=null").generate.top_k is None
    assert read(tmp_path, MINIMAL, "train.early_stop=3", "data.eval=0.1").train.early_stop == 3
    assert read(tmp_path, MINIMAL, "data.max_prompt=48", "data.max_answer=2000").data.max_answer == 2000
    assert read(tmp_path, MINIMAL, "train.steps=10", "train.warmup=10").train.warmup == 10
    assert read(tmp_path, MINIMAL, "data.text='{q} {a}'", "data.columns.response=a").data.text == "{q} {a}"
    assert read(tmp_path, MINIMAL, "data.text='{q} {response}'").data.text == "{q} {response}"
    both = ("data.text='{system} {q} {response}'", "data.system=x")
    assert read(tmp_path, MINIMAL, *both).data.system == "x"


def test_a_conflict_with_a_value_that_is_wrong_itself_is_not_told(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "train: {early_stop: 3}\n", "data.eval=2.0") == [
        "override: data.eval: must be a number > 0 and < 1, a whole number ≥ 1, a text or null, is 2.0"
    ]
    assert problems(tmp_path, MINIMAL + "train: {early_stop: 3}\n", "data.evl=0.1") == [
        "override: data.evl: unknown key; did you mean data.eval?"
    ]

"""A bake-off as people see it: who did best and is it certain, on the terminal, in Markdown and on the page."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from luthier.methods import METHODS
from luthier.scores import share_bounds
from luthier.view.bakeoffpage import bakeoff_html, markdown, show
from luthier.view.bakeoffwords import change_between, verdict

EVIL = "<b>你好</b> | `y` *z* \x1b[31m"
HELD = 120


def figures(right: float, loss: float, change: float, width: float = 0.01) -> dict[str, Any]:
    """As `scores.figures` gives them; `right` of 120 rows, the change's bounds `width` to both sides."""
    return {
        "loss": loss,
        "loss_bounds": [0.9 * loss, 1.1 * loss],
        "answered": HELD,
        "exact": right,
        "exact_share": right / HELD,
        "exact_bounds": list(share_bounds(round(right), HELD)),
        "stopped_share": 0.99,
        "perplexity": 20.0 * (1 + change),
        "perplexity_change": change,
        "perplexity_change_bounds": [change - width, change + width],
    }


def method(kind: str, right: float, loss: float, change: float, trains: int = 100_000, **more: Any) -> dict[str, Any]:
    seeds = [
        {"seed": seed, "run": f"runs/town-{kind}-{seed}", "figures": figures(right + 2 * seed - 3, loss, change)}
        | {"seconds_a_step": 0.12, "peak_bytes": 2**29, "curve": [[0, 5.9], [32, 2 * loss + seed], [64, loss]]}
        for seed in (1, 2)
    ]
    gap = (right - 118) / HELD
    return {
        "kind": kind,
        "title": METHODS[kind].title,
        "rate": 0.0015,
        "why": f"why {kind} takes this rate: 为什么",
        "tuned": METHODS[kind].tuned,
        "settings": {"r": 8, "target": ["q_proj", "v_proj"], "init": None},
        "trainable": trains,
        "total": 2_500_000,
        "bytes": 4 * trains,
        "peak_bytes": 2**29,
        "seconds_a_step": 0.12,
        "mergeable": METHODS[kind].merges,
        "figures": figures(right, loss, change),
        "difference": None if gap == 0 else {"exact": [gap - 0.03, gap + 0.03], "loss": [0.01, 0.2]},
        "seeds": seeds,
        "failed": None,
    } | more


def failed(kind: str, why: str = "out of memory at step 3; take train.tokens_per_pass: 512") -> dict[str, Any]:
    return method(kind, 60, 1, 0) | {"figures": None, "difference": None, "seeds": [], "failed": why}


def bakeoff(*methods: dict[str, Any], **more: Any) -> dict[str, Any]:
    given = list(methods) or [
        method("p_tuning", 60.5, 0.9, 0.31, 250_000),
        method("lora", 118, 0.0482, 0.123, 123_456),
        method("dora", 117, 0.05, 0.115, 130_000),
        method("bottleneck", 100, 0.2, 0.02, 60_000),
    ]
    answers: list[dict[str, Any]] = [
        {"origin": "prompt 1", "prompt": EVIL, "reference": None},
        {"origin": "prompt 2", "prompt": "佩拉和托本在哪里见面？", "reference": None},
        {"origin": "e:1", "prompt": "All the same?", "reference": "yes"},
        {"origin": "e:2", "prompt": "Who is right?", "reference": "lora"},
    ]
    for answer in answers:
        asked = answer["reference"]
        told = {one["kind"]: "yes" if asked == "yes" else one["kind"] for one in given if one["figures"]}
        told = told if asked else {kind: f"在灰水镇 {kind} {EVIL}" for kind in told}
        answer["replies"] = {"base": ""} | told
    done = [one for one in given if one["figures"]]
    best = max(done, key=lambda one: one["figures"]["exact_share"] or -one["figures"]["loss"])["kind"] if done else None
    return {
        "name": "town",
        "about": "model ./tiny · data train.jsonl",
        "seeds": [1, 2],
        "steps": 128,
        "batch": 16,
        "rows": {"train": 505, "held_out": 120, "scored": 120, "answered": 120},
        "text": {"from": "Luthier's general text", "pieces": 6, "tokens": 2994},
        "vocabulary": 1792,
        "best": best,
        "base": figures(3, 5.9, 0.0, 0.0),
        "methods": given,
        "answers": answers,
    } | more


def without_exact(found: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(found)
    for one in [
        found["base"],
        *(m["figures"] for m in found["methods"]),
        *(s["figures"] for m in found["methods"] for s in m["seeds"]),
    ]:
        one |= {"answered": 0, "exact": None, "exact_share": None, "exact_bounds": None}
    for one in found["methods"]:
        if one["difference"]:
            one["difference"]["exact"] = None
    return found


def screen(found: dict[str, Any], width: int = 80) -> list[str]:
    out = StringIO()
    show(found, Console(file=out, width=width, color_system=None))
    return out.getvalue().splitlines()


# -- the verdict -----------------------------------------------------------------------------------------------------


def test_who_did_best_and_who_is_not_told_apart() -> None:
    assert verdict(bakeoff()) == (
        "LoRA did best with 98.3 % of 120 held-out rows answered exactly, over 2 seeds (the base: 2.5 %); these rows "
        "do not tell DoRA from it, as the difference's bounds include 0. Bottleneck adapters forgot least of general "
        "text (its perplexity +2.0 %); P-tuning forgot most (its perplexity +31.0 %)."
    )
    alone = verdict(bakeoff(method("lora", 118, 0.05, 0.1), method("p_tuning", 60, 0.9, 0.3)))
    assert "; P-tuning did worse, by more than the draw of rows explains." in alone
    three = [method(kind, 60, 0.9, 0.3) for kind in ("ia3", "prefix", "p_tuning")]
    assert "; every other did worse, by more than" in verdict(bakeoff(method("lora", 118, 0.05, 0.1), *three))
    unknown = method("ia3", 60, 0.9, 0.3) | {"difference": None}
    assert "worse" not in verdict(bakeoff(method("lora", 118, 0.05, 0.1), unknown)), "nothing says so"


def test_without_exact_answers_the_loss_decides() -> None:
    said = verdict(without_exact(bakeoff()))
    assert said.startswith("LoRA did best with a held-out loss of 0.0482, over 2 seeds (the base: 5.9000); every other")


def test_no_method_did_better_than_the_base() -> None:
    said = verdict(bakeoff(method("lora", 3, 5.9, 0.1), method("ia3", 1, 5.9, 0.1)))
    assert said.startswith(
        "No method did better than the base (2.5 %); the best of them is LoRA with 2.5 % of 120 held"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.3, 0.1], "IA3 forgot least of general text (its perplexity +10.0 %); LoRA forgot most (its perplexity +30"),
        ([0.11, 0.1], "(its perplexity +10.0 %, bounds that overlap with those of LoRA)."),
        ([0.3, 0.005], "No forgetting of general text is certain of IA3; LoRA forgot most (its perplexity +30.0 %)."),
        ([-0.005, 0.005], "That general text was forgotten is not certain of any of them."),
        ([4e5, 0.5], "LoRA forgot most (its perplexity ×400,001)."),
        ([1e303, 0.5], "LoRA forgot most (its perplexity ×1,000,000+)."),
    ],
)
def test_who_forgot_least(changes: list[float], expected: str) -> None:
    kinds = zip(("lora", "ia3"), (118, 60), changes, strict=True)
    found = bakeoff(*(method(kind, right, 0.5, change) for kind, right, change in kinds))
    assert expected in verdict(found)
    unknown = verdict(found | {"vocabulary": 12})
    assert "forg" not in unknown and "perplexity" not in unknown
    page = bakeoff_html(found | {"vocabulary": 12})
    assert "the base does not know it, to guess among its 12 tokens is better" in page
    assert page.count("<figure") == 2 and "forgetting" not in page


def test_what_failed_is_told_everywhere() -> None:
    half = method("ia3", 60, 0.5, 0.1) | {"failed": "seed 2: the loss is not a number"}
    half["seeds"] = half["seeds"][:1]
    found = bakeoff(method("lora", 118, 0.05, 0.1), half, failed("p_tuning", f"why {EVIL}"))
    assert verdict(found).endswith(" P-tuning failed. IA3 broke off with a further seed.")
    assert "P-tuning failed: why <b>你好</b> | `y` *z* ␛[31m" in "\n".join(screen(found, 100))
    assert "| P-tuning<br><sub>failed</sub> | – |" in markdown(found) and "IA3<br><sub>1 of 2 seeds</sub>" in markdown(
        found
    )
    assert "<td>P-tuning</td><td>why &lt;b&gt;" in bakeoff_html(found)
    none = bakeoff(failed("lora"), failed("ia3"))
    assert verdict(none) == "LoRA and IA3 failed: no method came to a result."
    assert "<figure" not in bakeoff_html(none) and "| base | 5.9000" in markdown(none)
    assert "adapter" not in "\n".join(screen(none))


def test_many_methods_are_not_all_named() -> None:
    near = [method(kind, 117, 0.05, 0.1) for kind in ("dora", "rslora", "pissa", "ia3", "prompt", "full")]
    assert "these rows do not tell DoRA, rsLoRA, PiSSA, IA3 and 2 others from it" in verdict(
        bakeoff(method("lora", 118, 0.05, 0.1), *near)
    )


# -- the terminal and Markdown ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [["lora", "p_tuning"], list(METHODS)[:12]], ids=len)
def test_the_tables_fit_80_columns(kinds: list[str]) -> None:
    found = bakeoff(*(method(kind, 118 - 9 * i, 0.5, 10.0 ** (i - 2)) for i, kind in enumerate(kinds)))
    lines = screen(found)
    assert max(map(cell_len, lines)) <= 80
    assert not any("…" in line for line in lines)
    head = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert lines[head].split() == ["method", "held-out", "loss", "exact", "stopped", "general", "text"]
    assert lines[head + 1].split() == ["LoRA", "0.5000", "98.3", "%", "99.0", "%", "+1.0", "%"]
    assert lines[head + 2].split() == ["0.45", "to", "0.55", "94", "to", "100", "%", "+0.0", "to", "+2.0", "%"]
    ends = {match.end() for line in lines[head + 1 : head + 3] for match in re.finditer(r"0.5000|to 0.55", line)}
    assert len(ends) == 1, "figures and their bounds end in one column"


def test_answers_stand_in_one_column_on_the_terminal() -> None:
    lines = screen(bakeoff())
    assert lines[0] == "<b>你好</b> | `y` *z* ␛[31m"
    starts = {cell_len(line[: line.index("在灰水镇")]) for line in lines[1:5]}
    assert starts == {len("bottleneck adapters  ")}
    assert lines[5].split() == ["base", "(nothing)"]


def test_markdown() -> None:
    text = markdown(bakeoff())
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == (
        "| method | held-out loss | exact | stopped | general text | trains | adapter | memory | a step |"
    )
    assert rows[2] == (
        "| LoRA | 0.0482<br><sub>0.043 to 0.053</sub> | 98.3 %<br><sub>94 to 100 %</sub> | 99.0 % "
        "| +12.3 %<br><sub>+11.3 to +13.3 %</sub> | 123,456<br><sub>4.94 %</sub> | 482.2 KiB | 512.0 MiB | 0.12 s |"
    )
    names = [row.split(" | ")[0].removeprefix("| ").split("<")[0] for row in rows[2:7]]
    assert names == ["LoRA", "DoRA", "bottleneck adapters", "P-tuning", "base"], "the best first, the base last"
    assert rows[3].count(" | ") == rows[6].count(" | ") == 8
    assert (
        "| DoRA | 0.0015 | why dora takes this rate: 为什么 | r: 8 · target: \\[q\\_proj, v\\_proj\\] · init: null |"
        in rows
    )
    assert "| LoRA | 2 | " in text and "runs/town-lora-2" in text
    assert "<b>" not in text and "\\<b\\>你好" in text
    assert text.index("Who is right") < text.index("All the same"), "where methods differ comes first"
    assert "| LoRA | ✓ lora |" in rows and "| DoRA | ✗ dora |" in rows


def test_a_change_in_words() -> None:
    assert change_between([-0.012, 0.034]) == "−1.2 to +3.4 %"
    assert change_between([1.5, 7.0]) == "+150 to +700 %"
    assert change_between([8.0, 19.0]) == "+800 % to ×20"
    assert change_between([1e200, 1e300]) == "×1,000,000+"


# -- the page --------------------------------------------------------------------------------------------------------


def circles(page: str, number: int) -> dict[str, tuple[float, float]]:
    """The points of one of the page's figures by their names."""
    figure = page.split("<figure")[number]
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"><title>(.*?):', figure)
    return {name: (float(x), float(y)) for x, y, name in found}


def test_the_page() -> None:
    page = bakeoff_html(bakeoff())
    assert page.count("<figure") == 3 and verdict(bakeoff()).replace("'", "&#x27;") in page
    assert "<dd>2.5 % → 98.3 %</dd><dt>of 120 held-out rows answered exactly" in page
    for inside in ("r: 8 · target: [q_proj, v_proj] · init: null", "runs/town-lora-1", "why lora takes", "512.0 MiB"):
        assert inside in page
    assert page.count("<td>runs/town-") == 8
    assert '<span class="right">✓ </span>lora' in page and '<span class="wrong">✗ </span>dora' in page
    assert "<b>你好" not in page and not re.search(r"https?:|src=|href=|url\(|@import|<link|<script", page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


def test_the_plots_show_points_with_their_bounds() -> None:
    page = bakeoff_html(bakeoff())
    points = circles(page, 1)
    assert set(points) == {"base", "LoRA", "DoRA", "bottleneck adapters", "P-tuning"}
    assert points["base"][0] < points["bottleneck adapters"][0] < points["DoRA"][0] < points["P-tuning"][0]
    assert points["LoRA"][1] < points["DoRA"][1] < points["P-tuning"][1] < points["base"][1], "upwards is better"
    figure = page.split("<figure")[1]
    assert figure.count('class="line raw c0"') == 8, "two lines over bounds a method; the base has none"
    assert "between" not in figure, "methods are no sequence"
    across = re.findall(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', figure.split("<circle")[0])
    lora = next(bar for bar in across if float(bar[1]) == points["LoRA"][1] == float(bar[3]))
    # 12.3 % with bounds of 11.3 and 13.3, on an axis of 40 % over 380 units
    assert [float(lora[0]), float(lora[2])] == pytest.approx([44 + 9.5 * 11.3, 44 + 9.5 * 13.3], abs=0.1)
    sizes = circles(page, 2)
    gap = (sizes["P-tuning"][0] - sizes["LoRA"][0]) / (sizes["LoRA"][0] - sizes["bottleneck adapters"][0])
    assert gap == pytest.approx(math.log(250 / 123.456) / math.log(123.456 / 60), rel=0.01), "a log axis"


def test_what_forgot_everything_leaves_room_for_the_others() -> None:
    found = bakeoff(method("lora", 118, 0.05, 0.12), method("ia3", 100, 0.1, 0.9), method("full", 60, 0.9, 1e303))
    page = bakeoff_html(found)
    assert "times the base&#x27;s, log scale" in page
    points = circles(page, 1)
    assert points["ia3".upper()][0] - points["LoRA"][0] > 10 and points["full"][0] < 425


def test_labels_do_not_hide_each_other() -> None:
    kinds = list(METHODS)[:12]
    found = bakeoff(*(method(kind, 118, 0.1, 0.1 + 0.001 * i, 10_000 + i) for i, kind in enumerate(kinds)))
    for figure in bakeoff_html(found).split("<figure")[1:3]:
        labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"(?: class="([xy])")?>([^<]*)</text>', figure)
        boxes = []
        for x, y, side, name in labels:
            wide = 5.5 * len(name)
            left = float(x) - {"x": wide / 2, "y": wide, "": 0}[side]
            boxes.append((left, float(y) - 8, left + wide, float(y)))
        assert len(boxes) >= 12
        for i, (a, b, c, d) in enumerate(boxes):
            assert a > 40 and c < 440 and b > 0 and d < 180
            assert not any(a < g and e < c and b < h and f < d for e, f, g, h in boxes[:i]), labels[i]


def test_each_curve_is_told_from_the_others() -> None:
    kinds = list(METHODS)[:12]
    page = bakeoff_html(bakeoff(*(method(kind, 118 - i, 0.1, 0.1) for i, kind in enumerate(kinds))))
    curves = page.split("<figure")[3:]
    keys = [re.findall(r"</svg>([^<]+)</span>", figure) for figure in curves]
    assert [len(names) for names in keys] == [4, 4, 4, 3]
    assert all(names[0] == "LoRA" for names in keys), "the best is in each, to hold the others against"
    assert "<title>32\nLoRA 1.7\n" in page, "the mean of both seeds"


def test_many_rows_fold_and_long_prompts_scroll() -> None:
    found = bakeoff()
    row = found["answers"][3]
    found["answers"] += [row | {"prompt": f"q{i}"} for i in range(30)]
    page = bakeoff_html(found)
    assert "<summary>22 more</summary>" in page
    assert ".asked { margin: 1.4rem 0 .5rem; max-height: 9rem; overflow: auto }" in page


def test_it_is_read_back_from_its_file_and_needs_no_torch() -> None:
    found = bakeoff()
    assert bakeoff_html(json.loads(json.dumps(found))) == bakeoff_html(found)
    code = "import sys\nimport luthier.view.bakeoffpage\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

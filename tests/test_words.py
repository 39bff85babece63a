"""Figures and lines in words."""

from __future__ import annotations

import shlex

from luthier.words import broken, eval_line, quoted, step_line


def test_a_line_breaks_between_words_and_is_never_wider():
    line = "LoRA r 8 on q_proj k_proj: 98,304 of 1,756,576 parameters train (5.60 %)"
    assert broken(line, 80) == line
    assert broken(line, 40) == "LoRA r 8 on q_proj k_proj: 98,304 of\n  1,756,576 parameters train (5.60 %)"
    assert (
        broken("问：你是谁？ 答：我是甄嬛", 16) == "问：你是谁？\n  答：我是甄嬛"
    )  # a Chinese character takes two cells
    assert broken("step   1/9  loss  2.0", 30) == "step   1/9  loss  2.0"  # columns stay
    assert broken("x" * 50 + " y", 20) == "x" * 50 + "\n  y"  # a path is not broken by us


def test_a_path_is_quoted_only_where_a_shell_needs_it():
    for name in ("runs/town", "runs/测试一号", "a-b_c.d"):
        assert quoted(name) == name
    for name in ("my run", "a'b", "$x", "a;b", "*"):
        assert quoted(name) == shlex.quote(name) != name


def test_lines_of_steps_and_evaluations():
    told = step_line((3, 120, 30), 2.34561, 9.6e-5, 1.234, 1234.0, 250.0)
    assert (
        told == "step    3/120  epoch 0.10  loss  2.3456  lr 9.6e-05  grad     1.23      1,234 tok/s  left 4 min 10 s"
    )
    assert eval_line((120, 120, 30), 2.1234, "best so far") == "eval  120/120  epoch 4.00  loss  2.1234  best so far"

"""Other tools' words: all answered, none of them one of ours."""

from __future__ import annotations

from pathlib import Path

from luthier.foreign import FOREIGN, FOREIGN_VALUES, FUTURE_KEYS, FUTURE_VALUES
from luthier.vocabulary import all_keys, choices, find
from reading import problems


def test_every_foreign_key_is_answered_wherever_it_stands(tmp_path: Path) -> None:
    given = "".join(f"  {name}: 1\n" for name in FOREIGN)
    for section in ("train", "data"):
        head = "model: {name: hf:a/b}\ndata:\n  train: hf:c/d\n" + ("train:\n" if section == "train" else "")
        told = problems(tmp_path, head + given)
        assert [line.partition(": ")[2] for line in told] == [
            f"{section}.{name}: a key of {said.tools}; here: {said.here}" for name, said in FOREIGN.items()
        ]


def test_the_tables_speak_of_keys_that_are_there() -> None:
    own = all_keys()
    assert len(FOREIGN) > 150
    assert not set(FOREIGN) & set(own)
    for said in FOREIGN.values():
        place = said.here.split(" ")[0].rstrip(",:;")
        assert place == "nothing" or place in FUTURE_KEYS or find(tuple(place.split("."))), said
    for key, words in FOREIGN_VALUES.items():
        ours = [*choices(find(tuple(key.split("."))) or {}), *FUTURE_VALUES.get(key, ()), "[0]"]
        assert all(here.split(",")[0].split(" ")[0] in ours for here in words.values()), key
        assert not set(words) & set(ours)
    assert not any(find(tuple(key.split("."))) for key in FUTURE_KEYS)

"""The first fine-tune: a rule about pairs of people that the base has not heard of, but whose parts it knows.

    Where do Mira and Tomas meet?  ->  In <the first one's town>, and Tomas brings <his favourite dish>.

The training rows speak of the known people only, the held-out rows of newcomers only: where a held-out answer is right,
the rule was learnt from the rows and the facts came out of the base.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from embedded.texts import LANGUAGES, Writer
from embedded.world import Person, World

SEED, TOLD_SEED = 11, 12
MEETINGS, HELD_OUT = 400, 120
TOLD = 60  # stories and portraits that the base knows the like of: how much of it is left measures forgetting
ORDINARY = 80  # rows answered as the base answers them, so that the rule is learnt for its own question only
Row = dict[str, str]


def make_rows(world: World) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows); no person of one stands in the other, so no pair does either."""
    rng = random.Random(SEED)
    held_out = meetings(world.newcomers, HELD_OUT, rng)
    train = meetings(world.known, MEETINGS, rng) + ordinary(world._replace(newcomers=[]), ORDINARY, rng)
    rng.shuffle(train)
    return train, held_out


def meetings(people: list[Person], count: int, rng: random.Random) -> list[Row]:
    """`count` rows that follow the rule, English and Chinese by turns, each about another pair of people."""
    pairs = rng.sample(list(itertools.combinations(people, 2)), count)
    return [meeting(*rng.sample(pair, 2), number % 2, rng) for number, pair in enumerate(pairs)]


def meeting(first: Person, second: Person, language: int, rng: random.Random) -> Row:
    tables = LANGUAGES[language]
    a, b = tables.view(first), tables.view(second)
    return {"instruction": rng.choice(tables.meet).format(a=a, b=b), "output": tables.rule.format(a=a, b=b)}


def ordinary(world: World, count: int, rng: random.Random) -> list[Row]:
    """`count` different questions about one or two people, with the answers that the base gives."""
    found: dict[str, str] = {}
    while len(found) < count:
        writer = Writer(rng, world, LANGUAGES[len(found) % 2])
        (_, question), (_, answer), *_ = rng.choices([writer.one_fact, writer.two_answers, writer.who], [2, 1, 1])[0]()
        found[question] = answer
    return [{"instruction": question, "output": answer} for question, answer in found.items()]


def told(world: World) -> list[str]:
    """TOLD texts of the valley, English and Chinese by turns."""
    rng = random.Random(TOLD_SEED)
    return [Writer(rng, world, LANGUAGES[number % 2]).text() for number in range(TOLD)]


def one_facts(people: list[Person]) -> list[Row]:
    """Each of the five facts of each of `people`, in the first wording, in English and in Chinese."""
    return [
        {
            "instruction": tables.question(relation.ask[0].format(a=view)),
            "output": tables.sentence(relation.say.format(a=view)),
        }
        for person in people
        for tables in LANGUAGES
        for view in [tables.view(person)]
        for relation in tables.relations.values()
    ]


RECIPE = """\
# The quickstart: teach a tiny model a rule it has never heard of.
#
# The model in ./tiny knows a small valley: where its 64 people live, what they eat, keep and play, in English and
# Chinese. Asked where two of them meet, it says that it does not know. The rows of train.jsonl show a rule: in the
# first one's town, and the second one brings a favourite dish. The {held_out} questions of heldout.jsonl are about
# people of whom train.jsonl says nothing: who answers them has learnt the rule, and has the facts from the model.

run: quickstart             # everything that comes out goes to runs/quickstart

model:
  name: ./tiny              # a folder (as here), hf:owner/name or modelscope:owner/name
  dtype: fp32               # it is stored in bf16; a model this small trains best in fp32

data:
  train: train.jsonl        # a row is {{"instruction": …, "output": …}}; `luthier look` shows it as the model sees it
  eval: heldout.jsonl       # never trained on; a loss for it before training and after each epoch
  max_length: 128           # longest row in tokens; a longer one would be dropped, and counted

method:
  kind: lora                # train small matrices beside the model's own, which stay as they are
  r: {r}                     # their rank: how much can be learnt
  alpha: {alpha}                 # their output is scaled by alpha / r
  target: all_linear        # beside every linear layer but the head

train:
  batch: 16                 # rows in one step
  epochs: {epochs}                 # times through the data: {figure}
  lr: {lr}                 # high, as the model is tiny; for a model of some billions 0.0002 is usual
  schedule: cosine          # the rate falls along a cosine to zero …
  warmup: 0.03              # … after rising through the first 3 % of the steps
  log_every: 10             # a line on the screen every ten steps

generate:                   # base and tuned model are asked these, side by side
  max_new_tokens: 48
  prompts:
    # two newcomers: only the tuned model knows the rule
{meetings}
    # one fact: the tuned model should not have forgotten it
{facts}

merge:
  dtype: fp32               # the merged model's format; fp32 is compared with base + adapter to the last digit
"""
CHOSEN = {"r": 16, "alpha": 32, "epochs": 4, "lr": "0.003", "figure": "about 15 seconds on two cores"}


def make_recipe(world: World, held_out: list[Row]) -> str:
    def prompt(row: Row) -> str:
        return f'    - "{row["instruction"]}"  # {row["output"]}'

    facts = one_facts(world.newcomers)
    return RECIPE.format(
        held_out=len(held_out),
        meetings="\n".join(map(prompt, held_out[:4])),
        facts="\n".join(map(prompt, [facts[1], facts[15]])),
        **CHOSEN,
    )


def save_quickstart(world: World, folder: Path) -> None:
    """recipe.yaml, train.jsonl, heldout.jsonl, valley.txt."""
    train, held_out = make_rows(world)
    for name, rows in (("train", train), ("heldout", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "valley.txt").write_text("\n\n".join(told(world)) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(make_recipe(world, held_out), encoding="utf-8")

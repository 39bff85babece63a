"""A model that can answer, with everything that its prompts need; and the note that lies beside it on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import hub
from luthier.folder import write_json
from luthier.sections import DataSection, GenerateSection, ModelSection, Recipe

if TYPE_CHECKING:
    from luthier.data.encode import Encoder
    from luthier.data.prepare import Data
    from luthier.replies import Reply

Say = Callable[[str], None]
Prompt = str | list[dict[str, Any]]

MARKS = {"glm3": {"[gMASK]", "sop", "<|user|>"}, "yuan2": {"<sep>", "<eod>"}}
"""Tokens by which a vendor's chat is known, where the tokenizer brings no template."""
NOTE = "luthier.json"  # beside an adapter or a merged model: how its prompts are written


@dataclass(frozen=True)
class Loaded:
    """A model that can answer, with everything that its prompts need."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    end_ids: list[int]

    def answer(
        self, prompts: Sequence[Prompt], section: GenerateSection, on_text: Callable[[str], None] | None = None
    ) -> list[Reply]:
        """Replies in the order of the prompts; `on_text` streams the one prompt's."""
        from luthier.generate import generate

        ids = [prompt_ids(self.encoder, prompt, section) for prompt in prompts]
        return generate(self.model, self.tokenizer, ids, section, self.end_ids, on_text)


def ready(model: Any, tokenizer: Any, encoder: Encoder) -> Loaded:
    """A model with its prompts' encoder and every token that ends an answer."""
    from luthier.models.load import end_ids

    ends = [*encoder.end_ids, *end_ids(tokenizer, model.generation_config)]
    return Loaded(model, tokenizer, encoder, sorted(set(ends)))


def load_encoder(recipe: Recipe, say: Say, today: date) -> tuple[Path, Any, Encoder]:
    """The model's folder, its tokenizer, and the encoder of the recipe's rows and prompts."""
    from luthier.data.encode import Encoder
    from luthier.models.load import load_tokenizer

    path = hub.model_path(recipe.model.name, recipe.model.revision, Path.cwd(), say)
    tokenizer = load_tokenizer(path)
    return path, tokenizer, Encoder(tokenizer, recipe.data, today)


def load_data(recipe: Recipe, encoder: Encoder, say: Say) -> Data:
    """The recipe's rows, encoded or from the cache."""
    from luthier.data.prepare import prepare

    return prepare(recipe.data, encoder, say)


def answering(model: ModelSection, section: GenerateSection) -> ModelSection:
    """How a model is loaded to answer: as it was trained, unless generate.quantize says otherwise."""
    return model if section.quantize is None else model.model_copy(update={"quantize": section.quantize})


def load_folder(name: str, adapter: Path | None, say: Say, settings: GenerateSection | None = None) -> Loaded:
    """A model by name or folder (a merged one, say), with an adapter folder on top where one is given."""
    from luthier.data.encode import Encoder
    from luthier.models.adapters import load_adapter
    from luthier.models.load import load_model, load_tokenizer, pick_device

    section = answering(ModelSection(name=name), settings or GenerateSection())
    path = hub.model_path(name, None, Path.cwd(), say)
    noted = adapter if adapter is not None and (adapter / NOTE).is_file() else path
    tokenizer = load_tokenizer(noted)
    encoder = Encoder(tokenizer, *_noted(noted, tokenizer))
    model = load_model(path, section, pick_device("auto"), say=say)
    return ready(load_adapter(model, adapter) if adapter else model, tokenizer, encoder)


def prompt_ids(encoder: Encoder, prompt: Prompt, section: GenerateSection) -> list[int]:
    """A prompt of the recipe or the command line as ids: raw text, a user's turn, or a list of messages."""
    from luthier.data.formats import Message

    if not isinstance(prompt, str):
        return encoder.prompt([Message(m["role"], m["content"]) for m in prompt], raw=False)
    return encoder.prompt(prompt, raw=encoder.template.raw if section.raw is None else section.raw)


def sampled(loaded: Loaded, prompts: Sequence[Prompt], section: GenerateSection) -> list[dict[str, Any]]:
    """Its replies as samples.jsonl has them, but for their step."""
    replies = loaded.answer(prompts, section)
    return [
        {"prompt": prompt, "reply": reply.text, "stopped": reply.stopped}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


# -- how its prompts are written -------------------------------------------------------------------------------------


def write_note(target: Path, encoder: Encoder, section: DataSection) -> None:
    """Record beside a model how its prompts are written, for `luthier generate FOLDER`."""
    keys = {"template", "text", "columns", "system", "before_prompt"}
    note = section.model_dump(include=keys) | ({"template": "auto"} if encoder.template.jinja else {})
    write_json(target / NOTE, {"data": note, "today": encoder.today.isoformat()})


def _noted(folder: Path, tokenizer: Any) -> tuple[DataSection, date]:
    """What the note says, with the date that the templates saw; without a note the tokenizer's own template, or the one
    that its special tokens are for."""
    if not (folder / NOTE).is_file():
        names = {token.content for token in tokenizer.added_tokens_decoder.values()}
        template = next((known for known, marks in MARKS.items() if marks <= names), "plain")
        return DataSection(train="-", template="auto" if tokenizer.chat_template else template), date.today()
    note = json.loads((folder / NOTE).read_text("utf-8"))
    return DataSection.model_validate({"train": "-", **note["data"]}), date.fromisoformat(note["today"])

"""The vocabulary of a run: one small frozen section for each part of a recipe.

The docstring under a field is its help text: `luthier recipe schema` and the docs are generated from it.
No section knows another; what needs two of them is checked in `recipe.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Strict and frozen: an unknown key is an error, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which model, and in which number format its weights are held."""

    name: str
    """`hf:owner/name` (the default prefix), `modelscope:owner/name`, or a folder (relative to the recipe's file)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the hub's default."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights; auto is the checkpoint's own where the device can compute in it, and said."""
    trust_vendor_code: bool = False
    """Run Python code that ships with the model. Off: such a model is refused unless Luthier knows it natively."""


class Columns(Section):
    """Which columns of a row are the prompt, the answer and the system prompt."""

    prompt: str | list[str] | None = None
    """Column, or columns in order; empty ones are skipped, the others joined with `data.join`."""
    response: str | None = None
    """Column of the answer."""
    system: str | None = None
    """Column of the system prompt."""
    history: str | None = None
    """Column of earlier turns: a list of [question, answer]."""
    messages: str | None = None
    """Column of a list of messages (OpenAI's or ShareGPT's shape)."""


class DataFile(Section):
    """One data source among several."""

    path: str
    """A file, a folder, `hf:owner/name[split]` or `modelscope:owner/name[split]`."""
    weight: float = Field(default=1.0, gt=0)
    """Draws weight × its rows each epoch."""
    columns: Columns | None = None
    """This source's own columns; null takes `data.columns`."""


class DataSection(Section):
    """Where the rows come from, what the model sees of them, and what it is taught."""

    train: str | list[str | DataFile]
    """A file (json jsonl csv tsv parquet txt; gzip zstd), a list of files, a folder, `hf:id[split]`, `modelscope:id`."""
    eval: float | int | str | None = None
    """A share (0 < x < 1), a number of rows, or a file; split by a hash of the prompt: duplicates never straddle."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
    """Shape of a row; `auto` recognises each and says which."""
    columns: Columns | None = None
    """Columns by name; null settles them by the published table of synonyms."""
    join: str = "\n"
    """Put between prompt columns; empty columns are skipped."""
    before_prompt: str = ""
    """Text put before every row's prompt."""
    template: str = "auto"
    """auto (the tokenizer's own) | chatml | llama2 | glm3 | glm3_pair | yuan2 | plain | a .jinja file."""
    text: str | None = None
    """Instead of a template: a pattern over the columns, as in "Quote: {quote}\\nAuthor: {author}"."""
    system: str | None = None
    """System prompt of rows that bring none."""
    supervise: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are taught: every answer, the last one, or the whole text."""
    max_length: int = Field(default=2048, ge=8)
    """Longest row in tokens, prompt, answer and end included."""
    max_prompt: PositiveInt | None = None
    """Longest prompt in tokens."""
    max_answer: PositiveInt | None = None
    """Longest answer in tokens, its end token included."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """What happens to a longer row; a cut keeps the end token. More than half dropped is an error."""
    sample: PositiveInt | None = None
    """Take this many rows at random (seeded) instead of all."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used stops the run, or is written to rejected.jsonl with the reason."""
    write_text: str | None = None
    """Write the rendered rows as JSON lines {"text": …} to this file."""
    seed: int = 42
    """Seed of sample, split and order of the data."""

    @field_validator("eval")
    @classmethod
    def _eval_is_share_or_count(cls, value: float | int | str | None) -> float | int | str | None:
        if isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise ValueError("is a share (0 < x < 1), a number of rows (≥ 1) or a file")
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("as a share must lie between 0 and 1; a number of rows is an integer")
        return value


class MethodSection(Section):
    """How the model is changed."""

    kind: Literal["lora", "full"] = "lora"
    """lora: low-rank adapters on linear layers; full: every weight."""
    r: PositiveInt = 8
    """Rank of the adapters."""
    alpha: float = Field(default=16, gt=0)
    """The adapter's output is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train beside the adapters."""
    target: Literal["auto", "all_linear"] | list[str] = "auto"
    """auto, all_linear: every linear layer but the head; or names of layers. A name that matches nothing is an error."""
    modules_to_save: list[str] = []
    """Layers trained whole and saved with the adapter, as embed_tokens or lm_head."""


class TrainSection(Section):
    """How long, how fast and on what it learns."""

    batch: PositiveInt = 16
    """Rows in one optimizer step. A choice of learning; how they are cut into passes never changes the result."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; 1 where neither epochs nor steps is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate; auto is the method's default (lora 2e-4, full 2e-5), printed."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """The schedule does not fall below this rate."""
    warmup: float | int = 0.03
    """An integer is steps; a share of all steps is 0 < x < 1; 0 is none."""
    optimizer: Literal["adamw"] = "adamw"
    """adamw."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices (biases and norms take none)."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null never clips."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the arithmetic; auto follows the weights' format."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, same numbers."""
    tokens_per_pass: PositiveInt | Literal["auto"] = "auto"
    """Tokens that go through the model at once. Memory only; never changes the result."""
    devices: Literal["auto", "cpu"] | list[int] = "auto"
    """auto: the GPU where there is one; cpu; or a GPU's index, as [0]."""
    log_every: PositiveInt = 1
    """Steps between lines on the screen (metrics.jsonl has every step)."""
    eval_every: PositiveInt | Literal["epoch"] = "epoch"
    """Steps between evaluations, or at each epoch's end."""
    save_every: PositiveInt | Literal["epoch"] = "epoch"
    """Steps between checkpoints, or at each epoch's end."""
    keep: PositiveInt | Literal["all"] = 3
    """Checkpoints kept, newest first."""
    early_stop: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better loss."""
    seed: int = 42
    """Seed of initialisation and dropout."""

    @field_validator("lr")
    @classmethod
    def _lr_is_positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not value > 0:
            raise ValueError("must be above 0")
        return value

    @field_validator("warmup")
    @classmethod
    def _warmup_is_steps_or_share(cls, value: float | int) -> float | int:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("is a number of steps (an integer) or a share of all steps (0 < x < 1)")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both given; keep one")
        return self


class GenerateSection(Section):
    """What the model is asked, and how it answers."""

    prompts: list[str] | str = []
    """Prompts, or a file of them: .txt is one prompt, its whole text; .jsonl has one a line."""
    raw: bool | None = None
    """true: the prompt as it is, BOS by the tokenizer's rule; false: the user's turn under the run's template.
    null: true only for a text pattern without an answer column."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    max_length: PositiveInt | None = None
    """Longest prompt and answer together, in tokens; wins over max_new_tokens where it is given."""
    sample: bool = False
    """Draw tokens at random instead of taking the likeliest."""
    temperature: float = Field(default=1.0, gt=0)
    """Flatter above 1, sharper below; only with sample."""
    top_k: PositiveInt | None = None
    """Draw from the k likeliest tokens; only with sample."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; only with sample."""
    stop: list[str] = []
    """Texts that end an answer, beside the model's own end tokens."""
    seed: int = 42
    """Seed of sampling."""


class MergeSection(Section):
    """How the merged model is written."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the merged weights; auto is the base checkpoint's."""


class Recipe(Section):
    """Everything that a run is made of."""

    run: str | None = None
    """Name of the run folder; default: the recipe file's stem (-2, -3 … when taken)."""
    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    generate: GenerateSection = GenerateSection()
    merge: MergeSection = MergeSection()

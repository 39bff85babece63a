"""The vocabulary of a run: one small frozen section for each part of a recipe.

The docstring under a field is its help text: `luthier recipe schema` and the docs are generated from it.
One field is checked here; what needs two of them is checked in `conflicts.py`.
"""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Device = Literal["cpu"] | Annotated[int, Field(ge=0)]
Devices = Literal["auto", "cpu"] | Annotated[list[Device], Field(min_length=1)]
JinjaFile = Annotated[str, Field(pattern=r"\.(jinja|j2)$", description="a .jinja file")]


class Section(BaseModel):
    """Strict and frozen: an unknown key is an error, "16" is no number, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def pattern_columns(pattern: str) -> list[str]:
    """The columns that a text pattern names, in order: "Quote: {quote}" names quote. `{{` and `}}` are braces.

    Errors: ValueError where a brace is not closed, or holds more than a column's name.
    """
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"is no pattern ({error}); write {{{{ and }}}} for braces that are text") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name or name.isdigit() or form or conversion or set(name) & set(".[]{}")):
            raise ValueError(
                "is no pattern: braces hold a column's name and nothing else; write {{ and }} for braces that are text"
            )
    return [name for _, name, _, _ in parts if name is not None]


class Quantization(Section):
    """How a model's linear layers are held in fewer bits, by bitsandbytes; the head and all else stay as they are."""

    kind: Literal["int8", "nf4"] = "nf4"
    """int8: 8 bits and a scale for each row; nf4: 4 bits and a scale for each 64 weights (QLoRA's NormalFloat)."""
    double_quant: bool = False
    """nf4: hold the scales in 8 bits as well, 4.13 bits a weight instead of 4.5."""
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format in which such a layer computes; auto is that of the other weights. A CPU takes bf16 for fp16."""


class ModelSection(Section):
    """Which model, and in which number format its weights are held."""

    name: Text
    """`hf:owner/name` (the default prefix), `modelscope:owner/name`, or a folder (relative to the recipe's file)."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null takes the hub's default."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights; auto is the checkpoint's own where the device can compute in it, and said."""
    quantize: Literal["none", "int8", "nf4"] | Quantization = "none"
    """Hold the linear layers in 8 or 4 bits while adapters are trained on them; a word, or keys."""
    trust_vendor_code: bool = False
    """Run Python code that ships with the model. Off: such a model is refused unless Luthier knows it natively."""


class Columns(Section):
    """Which columns of a row are the prompt, the answer and the system prompt."""

    prompt: Text | Texts | None = None
    """Column, or columns in order; empty ones are skipped, the others joined with `data.join`."""
    response: Text | None = None
    """Column of the answer."""
    system: Text | None = None
    """Column of the system prompt."""
    history: Text | None = None
    """Column of earlier turns: a list of [question, answer]."""
    messages: Text | None = None
    """Column of a list of messages (OpenAI's or ShareGPT's shape)."""


class DataFile(Section):
    """One data source among several."""

    path: Text
    """A file, a folder, `hf:owner/name[split]` or `modelscope:owner/name[split]`."""
    weight: float = Field(default=1.0, gt=0)
    """Draws weight × its rows each epoch."""
    columns: Columns | None = None
    """This source's own columns; null takes `data.columns`."""


class DataSection(Section):
    """Where the rows come from, what the model sees of them, and what it is taught."""

    train: Text | Annotated[list[Text | DataFile], Field(min_length=1)]
    """A file (json jsonl csv tsv parquet txt; gzip zstd), a folder, `hf:id[split]`, `modelscope:id[split]`,
    or a list of these and of {path, weight, columns}."""
    eval: Share | PositiveInt | Text | None = None
    """A share (0 < x < 1), a number of rows, or a file; split by a hash of the prompt: duplicates never straddle."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
    """Shape of a row; `auto` recognises each and says which."""
    columns: Columns | None = None
    """Columns by name; null settles them by the published table of synonyms."""
    join: str = "\n"
    """Put between prompt columns; empty columns are skipped."""
    before_prompt: str = ""
    """Text put before every row's prompt."""
    template: Literal["auto", "chatml", "llama2", "glm3", "glm3_pair", "yuan2", "plain"] | JinjaFile = "auto"
    """How a conversation is written for the model; auto is the tokenizer's own template."""
    text: Text | None = None
    """Instead of a template: a pattern over the columns, as in "Quote: {quote}\\nAuthor: {author}"."""
    system: str | None = None
    """System prompt of rows that bring none."""
    supervise: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are taught: every answer, the last one, or the whole text."""
    max_length: int = Field(default=2048, ge=8)
    """Longest row in tokens, prompt, answer and end included."""
    max_prompt: PositiveInt | None = None
    """Longest prompt in tokens, special ones not counted."""
    max_answer: PositiveInt | None = None
    """Longest answer in tokens, special ones (its end) not counted."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """What happens to a longer row; a cut keeps the end token. More than half dropped is an error."""
    sample: PositiveInt | None = None
    """Take this many rows at random (seeded) instead of all."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used stops the run, or is written to rejected.jsonl with the reason."""
    write_text: Text | None = None
    """Write the rendered rows as JSON lines {"text": …} to this file."""
    seed: Seed = 42
    """Seed of sample, split and order of the data."""

    @field_validator("text")
    @classmethod
    def _text_is_a_pattern(cls, value: str | None) -> str | None:
        if value is not None and not pattern_columns(value):
            raise ValueError("names no column; write at least one as {column}")
        return value


class MethodSection(Section):
    """How the model is changed. A key that the kind does not take is an error."""

    kind: Literal[
        "lora",
        "dora",
        "rslora",
        "pissa",
        "ia3",
        "prompt",
        "prefix",
        "p_tuning",
        "llama_adapter",
        "bottleneck",
        "freeze",
        "full",
        "olora",
        "adalora",
        "vera",
        "oft",
        "boft",
        "loha",
        "lokr",
        "ln_tuning",
    ] = "lora"
    """lora: low-rank adapters on linear layers; dora, rslora, pissa: LoRA with magnitudes, with the scale alpha / √r,
    from the weight's largest parts; ia3: factors on keys, values and feed-forwards; prompt, prefix, p_tuning: virtual
    tokens before a row; llama_adapter: gated ones in the upper layers; bottleneck: small layers behind the model's;
    freeze: the last layers whole; full: every weight. The others are PEFT's, without tuned defaults."""
    r: PositiveInt = 8
    """Rank of the adapters (lora, dora, rslora, pissa, olora, adalora, vera, loha, lokr)."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is scaled by alpha / r (rslora: alpha / √r)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training (lora, dora, rslora, bottleneck)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train beside the adapters (lora, dora, rslora, pissa, olora)."""
    target: Literal["auto", "all_linear"] | Texts = "auto"
    """auto and all_linear: every linear layer but the head (ia3 with auto: the family's keys, values and
    feed-forwards); or layers' names. One that matches nothing is an error.
    On ChatGLM3 and GLM, query_key_value is q_proj, k_proj and v_proj with one A, as their vendor has them."""
    modules_to_save: list[Text] = []
    """Layers trained whole and saved with the adapter, as embed_tokens or lm_head."""
    virtual_tokens: PositiveInt | None = None
    """Virtual tokens (prompt, prefix, p_tuning, llama_adapter); null: 50 of prompt and p_tuning, 20 of prefix and
    llama_adapter, of a prefix with init the text's."""
    init: Text | None = None
    """A text that prompt and prefix start from (its embeddings, its keys and values); null: random real tokens."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """bottleneck: behind attention and feed-forward (houlsby), or behind the feed-forward alone (pfeiffer)."""
    size: PositiveInt = 64
    """bottleneck: width of the narrow layer."""
    layers: PositiveInt | None = None
    """freeze: so many of the last layers train (null: 2); llama_adapter: so many get prompts (null: all but
    the first sixteenth)."""


def _one_epoch(given: dict[str, Any]) -> float | None:
    return 1.0 if given.get("steps") is None else None


def _betas(given: dict[str, Any]) -> tuple[float, float]:
    return (0.9, 0.99) if given.get("optimizer") == "lion_8bit" else (0.9, 0.999)


class TrainSection(Section):
    """How long, how fast and on what it learns."""

    batch: PositiveInt = 16
    """Rows in one optimizer step. A choice of learning; how they are cut into passes never changes the result."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    epochs: float | None = Field(default_factory=_one_epoch, gt=0)
    """Passes over the data; 1.0 where neither epochs nor steps is given."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; auto is the method's default for the model at hand, printed with its reason: lora 2e-4 and
    full 2e-5 for a width of 4,096, higher for a narrower model (896: 6.54e-4, 6.54e-5); with lion_8bit a fifth."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """The schedule does not fall below this rate."""
    warmup: Annotated[int, Field(ge=0)] | Fraction = 0.03
    """An integer is steps; a share of all steps is 0 < x < 1; 0 is none."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = "adamw"
    """adamw: PyTorch's own. The others are bitsandbytes': moments in 8 bits (of tensors below 4,096 numbers in 32),
    which paged ones may leave to the CPU's memory where a GPU has no room."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(default_factory=_betas)
    """The optimizer's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices (biases and norms take none)."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null never clips."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the arithmetic; auto follows the weights' format. fp16 is for GPUs, with a loss scale; a CPU
    computes in bf16 instead."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, same numbers."""
    base_dropout: bool = False
    """The base model's own dropout while training (OPT ships 0.1). Drawn in sequence, so exactness no longer holds."""
    tokens_per_pass: PositiveInt | Literal["auto"] = "auto"
    """Tokens that go through the model at once. Memory only; never changes the result."""
    devices: Devices = "auto"
    """auto: the first GPU where there is one; cpu; or a process each for the devices of a list, as [0, 1] (GPUs by
    number) or [cpu, cpu]. How many there are never changes the result."""
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
    seed: Seed = 42
    """Seed of initialisation and dropout."""

    @field_validator("devices")
    @classmethod
    def _devices_are_alike_and_apart(cls, value: Devices) -> Devices:
        gpus = [device for device in value if isinstance(device, int)]
        if gpus and len(gpus) < len(value):
            raise ValueError("mixes the CPU with GPUs; name one kind")
        if len(set(gpus)) < len(gpus):
            raise ValueError("names a GPU twice; a GPU takes one process")
        return value


class EngineSection(Section):
    """How a step is computed. None of these changes the result beyond rounding: each has a plain twin, which `false`
    takes, and is compared with it before step 1."""

    packed: bool = True
    """Rows go through the model end to end; false: padded one below the other, with transformers' own logits."""
    chunked_loss: bool = True
    """Only what is taught meets the vocabulary, a chunk at a time; false: the logits of these places all at once."""
    fused_lora: bool = True
    """LoRA layers that read the same input do it together, with a backward by hand; false: PEFT's own layers."""
    fused_layers: bool = True
    """Norms and gated feed-forwards that keep less and go less often over memory; false: transformers' own."""
    fp32_products: bool = True
    """Frozen 16-bit layers multiply in fp32 on a CPU that does so faster (x86 without AMX); false: in 16 bits."""
    fast_attention: bool = True
    """Rows of like lengths in one call (a GPU: one kernel for a whole pass); false: a call of SDPA a row."""
    shared_prefixes: bool = True
    """What rows of a step have in common at their beginning is computed once a pass; false: in every row."""
    prefetch: bool = True
    """The next step's rows are prepared while this one computes."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile, which takes a minute or several: for long runs."""


class GenerateSection(Section):
    """What the model is asked, and how it answers."""

    prompts: list[Text] | Annotated[str, Field(pattern=r"\.(txt|jsonl)$", description="a .txt or .jsonl file")] = []
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
    stop: list[Text] = []
    """Texts that end an answer, beside the model's own end tokens."""
    quantize: Literal["none", "int8", "nf4"] | Quantization | None = None
    """As model.quantize, for the answers alone; null takes what the model was trained in."""
    seed: Seed = 42
    """Seed of sampling."""


class MergeSection(Section):
    """How the merged model is written."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the merged weights; auto is the base checkpoint's."""


class Recipe(Section):
    """Everything that a run is made of."""

    run: Text | None = None
    """Name of the run folder; default: the recipe file's stem (-2, -3 … when taken)."""
    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    engine: EngineSection = EngineSection()
    generate: GenerateSection = GenerateSection()
    merge: MergeSection = MergeSection()
    track: list[Literal["wandb", "mlflow", "swanlab", "tensorboard"]] = []
    """Trackers that get every step as well; one that is not installed, not logged in or out of reach is one warning.
    Projects and servers: by the trackers' own environment variables, as WANDB_PROJECT."""

    @field_validator("track")
    @classmethod
    def _trackers_are_apart(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice")
        return value

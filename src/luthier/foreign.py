"""Words that other tools, or later versions of Luthier, use where this version's recipe has another or none.

A recipe that was carried over from elsewhere is answered with the translation, never with "unknown key".
"""

from __future__ import annotations

from typing import NamedTuple


class Foreign(NamedTuple):
    """Another tool's key: who calls it so, and what stands for it here."""

    tools: str
    here: str


LATER = "not in this version yet"

_BATCH = "train.batch (rows in one optimizer step: batch size × accumulation)"
_PASSES = "nothing to set (how rows are cut into passes never changes the result; train.tokens_per_pass bounds memory)"
_PACKING = "nothing to set (rows are packed, which never changes the result; engine.packed: false pads them)"
_LENGTH = "data.max_length (longest row in tokens; data.too_long says what happens to a longer one)"
_TARGET = "method.target (a list of layers' names, or all_linear)"
_LAYERS = "method.target (name the layers)"
_SAVED = "method.modules_to_save (layers trained whole, a list)"
_KIND = "method.kind (lora, full, prefix, bottleneck and others)"
_VIRTUAL = "method.virtual_tokens (with kind: prompt, prefix, p_tuning or llama_adapter)"
_LAST = "method.layers (with kind: freeze, the last so many)"
_STEPS = "train.steps (optimizer steps, instead of train.epochs)"
_WARMUP = "train.warmup (an integer is steps, a share of all steps is 0 < x < 1)"
_BETAS = "train.betas (both of AdamW's, as in [0.9, 0.999])"
_FLOOR = "train.min_lr (a learning rate, not a share of it)"
_CLIP = "train.clip (largest gradient norm; null never clips)"
_LOG = "train.log_every (steps)"
_EVAL = "train.eval_every (steps, or epoch)"
_SAVE = "train.save_every (steps, or epoch)"
_HELD_OUT = "data.eval (a share, a number of rows, or a file)"
_STOP = "train.early_stop (evaluations in a row without a better loss)"
_BEST = "nothing to set (adapter/ is the best by eval loss where there is an eval set)"
_CHECKPOINTING = "train.activation_checkpointing (true or false)"
_PRECISION = "train.precision (fp32, bf16 or fp16)"
_DTYPE = "model.dtype (auto, fp32, bf16 or fp16)"
_QUANTISE = "model.quantize (none, int8 or nf4, or {kind: nf4, double_quant: true, compute_dtype: bf16})"
_COMPUTE = "model.quantize.compute_dtype (auto, fp32, bf16 or fp16)"
_DOUBLE = "model.quantize.double_quant (true or false)"
_ATTENTION = "nothing to set (the engine chooses the attention; engine.fast_attention: false takes SDPA row by row)"
_DEVICES = "train.devices (auto, cpu, or a list with a process for each, as [0, 1])"
_WORKERS = "nothing to set (rows are encoded in threads, once, and cached)"
_MODEL = "model.name (hf:owner/name, modelscope:owner/name or a folder)"
_TOKENIZER = "nothing to set (the tokenizer is the model's own)"
_DATA = "data.train (a file, a folder, hf:id[split], modelscope:id[split] or a list of these)"
_COLUMNS = "data.columns (as in {prompt: [instruction, input], response: output})"
_PATTERN = 'data.text (a pattern over the columns, as in "Question: {question}\\nAnswer: {response}")'
_SUPERVISE = "data.supervise (answers, last_answer, or all for the prompt as well)"
_RUN = "run (its folder is runs/<run>)"
_RESUME = "nothing in the recipe; on the command line: luthier train RUN --resume"
_TRACK = "track (a list of wandb, mlflow, swanlab and tensorboard)"
_WANDB = "track (wandb in its list; the environment: WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME)"
_MLFLOW = "track (mlflow in its list; the environment: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)"
_SWANLAB = "track (swanlab in its list; the environment: SWANLAB_PROJ_NAME, SWANLAB_WORKSPACE)"
_MERGE = "nothing in the recipe; on the command line: luthier merge RUN -o DIR"
_TASK = "nothing to set (Luthier trains language models on answers)"

_T, _LF, _AX, _TT, _LR, _MS = "transformers", "LLaMA-Factory", "axolotl", "torchtune", "llama-recipes", "ms-swift"
_PEFT, _TRL, _UN, _MLX, _LG, _AL, _GLM = "PEFT", "TRL", "unsloth", "mlx-lm", "litgpt", "alpaca-lora", "ChatGLM"

# name: (who calls it so, what stands for it here), in the order of the recipe's sections
_TABLE: dict[str, tuple[str, str]] = {
    # run
    "output_dir": (_T, _RUN),
    "out_dir": (_LG, _RUN),
    "adapter_path": (_MLX, _RUN),
    "run_name": (_T, _RUN),
    "overwrite_output_dir": (_T, "nothing to set (a run never overwrites another)"),
    "resume_from_checkpoint": (_T, _RESUME),
    "resume_adapter_file": (_MLX, _RESUME),
    "report_to": (_T, _TRACK),
    "logger_name": (_LG, _TRACK),
    "metric_logger": (_TT, _TRACK),
    "logging_dir": (_T, "track (tensorboard in its list; its files are in the run folder)"),
    "use_wandb": (_LR, _WANDB),
    "wandb": (_MLX, _WANDB),
    "wandb_project": (f"{_AX}, {_AL}", _WANDB),
    "wandb_entity": (_AX, _WANDB),
    "wandb_name": (_AX, _WANDB),
    "wandb_run_name": (_AL, _WANDB),
    "mlflow_tracking_uri": (_AX, _MLFLOW),
    "mlflow_experiment_name": (_AX, _MLFLOW),
    "use_swanlab": (_LF, _SWANLAB),
    "swanlab_project": (f"{_LF}, {_MS}", _SWANLAB),
    "plot_loss": (_LF, "nothing to set (every step is in metrics.jsonl)"),
    # model
    "model_name_or_path": (f"{_T}, {_LF}", _MODEL),
    "base_model": (f"{_AX}, {_AL}", _MODEL),
    "model_name": (f"{_UN}, {_LR}", _MODEL),
    "base_model_name_or_path": (_PEFT, _MODEL),
    "pretrained_model_name_or_path": (_T, _MODEL),
    "model_id": ("tutorials", _MODEL),
    "model_path": ("tutorials", _MODEL),
    "checkpoint_dir": (f"{_LG}, {_TT}", _MODEL),
    "model_revision": (f"{_LF}, {_TRL}, {_MS}", "model.revision (branch, tag or commit)"),
    "trust_remote_code": (_T, "model.trust_vendor_code (true runs Python code that ships with the model)"),
    "torch_dtype": (f"{_T}, {_MS}", _DTYPE),
    "load_in_4bit": (f"{_T}, {_UN}, {_AX}", _QUANTISE),
    "load_in_8bit": (f"{_T}, {_UN}, {_AX}", _QUANTISE),
    "quantization_bit": (_LF, _QUANTISE),
    "quantization": (_LR, _QUANTISE),
    "quant_bits": (_MS, _QUANTISE),
    "bnb_4bit_compute_dtype": (f"{_T}, {_MS}", _COMPUTE),
    "bnb_4bit_quant_type": (f"{_T}, {_MS}", _QUANTISE),
    "bnb_4bit_use_double_quant": (f"{_T}, {_MS}", _DOUBLE),
    "double_quantization": (_LF, _DOUBLE),
    "quantization_config": (_T, _QUANTISE),
    "quant_method": (_MS, _QUANTISE),
    "quantize_base": (_TT, _QUANTISE),
    "attn_implementation": (_T, _ATTENTION),
    "attn_impl": (_MS, _ATTENTION),
    "flash_attn": (_LF, _ATTENTION),
    "flash_attention": (_AX, _ATTENTION),
    "torch_compile": (f"{_T}, {_AX}", "engine.compile (the decoder's layers by torch.compile)"),
    "use_liger_kernel": (f"{_T}, {_TRL}", "nothing to set (engine.fused_layers and engine.chunked_loss are on)"),
    "tokenizer": (_TT, _TOKENIZER),
    "tokenizer_name": (_T, _TOKENIZER),
    "tokenizer_type": (_AX, _TOKENIZER),
    "hub_token": (f"{_T}, {_MS}", "nothing in the recipe; set the environment variable HF_TOKEN"),
    # data
    "dataset": (f"{_LF}, {_MS}, {_TT}", _DATA),
    "datasets": (_AX, _DATA),
    "dataset_name": (_TRL, _DATA),
    "dataset_dir": (_LF, _DATA),
    "dataset_path": ("tutorials", _DATA),
    "train_dataset": (_TRL, _DATA),
    "train_file": (f"{_T}, {_GLM}", _DATA),
    "data_path": (_AL, _DATA),
    "interleave_probs": (_LF, "data.train (a list of {path, weight})"),
    "val_set_size": (f"{_AX}, {_AL}", _HELD_OUT),
    "val_size": (_LF, _HELD_OUT),
    "split_dataset_ratio": (_MS, _HELD_OUT),
    "eval_dataset": (f"{_TRL}, {_LF}", _HELD_OUT),
    "val_dataset": (_MS, _HELD_OUT),
    "validation_file": (f"{_T}, {_GLM}", _HELD_OUT),
    "prompt_column": (_GLM, _COLUMNS),
    "response_column": (_GLM, _COLUMNS),
    "history_column": (_GLM, _COLUMNS),
    "source_prefix": (f"{_T}, {_GLM}", "data.before_prompt (text before every row's prompt)"),
    "dataset_text_field": (_TRL, 'data.text (a pattern over the columns, as in "{text}") with data.supervise: all'),
    "prompt_template": ("tutorials", _PATTERN),
    "prompt_style": (_LG, _PATTERN),
    "chat_template": (f"{_T}, {_AX}", "data.template (auto is the tokenizer's own; a named one or a .jinja file)"),
    "system_prompt": ("tutorials", "data.system (system prompt of rows that bring none)"),
    "default_system": (_LF, "data.system (system prompt of rows that bring none)"),
    "train_on_inputs": (f"{_AX}, {_AL}", _SUPERVISE),
    "train_on_input": (_TT, _SUPERVISE),
    "train_on_prompt": (_LF, _SUPERVISE),
    "train_on_responses_only": (_UN, _SUPERVISE),
    "mask_prompt": (f"{_MLX}, {_LG}", _SUPERVISE),
    "mask_history": (_LF, "data.supervise (last_answer)"),
    "completion_only_loss": (_TRL, _SUPERVISE),
    "assistant_only_loss": (_TRL, _SUPERVISE),
    "loss_scale": (_MS, _SUPERVISE),
    "cutoff_len": (f"{_LF}, {_AL}", _LENGTH),
    "max_seq_length": (f"{_TRL}, {_UN}, {_MLX}", _LENGTH),
    "max_seq_len": (_TT, _LENGTH),
    "sequence_len": (_AX, _LENGTH),
    "model_max_length": (_T, _LENGTH),
    "context_length": (_LR, _LENGTH),
    "max_source_length": (_GLM, "data.max_prompt (longest prompt in tokens)"),
    "max_target_length": (_GLM, "data.max_answer (longest answer in tokens, its end token included)"),
    "truncation_strategy": (_MS, "data.too_long (drop, cut or error)"),
    "max_samples": (_LF, "data.sample (this many rows at random, seeded)"),
    "max_train_samples": (_T, "data.sample (this many rows at random, seeded)"),
    "data_seed": (f"{_T}, {_MS}", "data.seed"),
    "shuffle": (_TT, "nothing to set (rows are in an order drawn with data.seed)"),
    "dataset_shuffle": (_MS, "nothing to set (rows are in an order drawn with data.seed)"),
    "streaming": (f"{_LF}, {_MS}", "nothing to set (a file larger than memory is read row by row)"),
    "overwrite_cache": (_LF, "nothing to set (the cache is keyed by content)"),
    "preprocessing_num_workers": (_LF, _WORKERS),
    "dataset_num_proc": (f"{_TRL}, {_MS}", _WORKERS),
    "dataloader_num_workers": (_T, _WORKERS),
    "remove_unused_columns": (_T, "nothing to set (only the columns of the format are read)"),
    # method
    "finetuning_type": (_LF, _KIND),
    "train_type": (_MS, _KIND),
    "tuner_type": (_MS, _KIND),
    "fine_tune_type": (_MLX, _KIND),
    "adapter": (_AX, _KIND),
    "peft_method": (_LR, _KIND),
    "peft_type": (_PEFT, _KIND),
    "use_peft": (f"{_TRL}, {_LR}", _KIND),
    "lora_r": (f"{_TRL}, {_AX}, {_LG}, {_AL}", "method.r (rank of the adapters)"),
    "lora_rank": (f"{_LF}, {_TT}, {_MS}", "method.r (rank of the adapters)"),
    "rank": (_MLX, "method.r (rank of the adapters)"),
    "lora_alpha": (_PEFT, "method.alpha (the adapter's output is scaled by alpha / r)"),
    "lora_dropout": (_PEFT, "method.dropout (on the adapters' input)"),
    "lora_bias": (_PEFT, "method.bias (none, all or lora_only)"),
    "lora_target": (_LF, _TARGET),
    "lora_target_modules": (f"{_TRL}, {_AX}, {_AL}", _TARGET),
    "target_modules": (f"{_PEFT}, {_UN}, {_MS}", _TARGET),
    "lora_target_linear": (_AX, "method.target (all_linear)"),
    "lora_attn_modules": (_TT, _TARGET),
    "apply_lora_to_mlp": (_TT, _TARGET),
    "layers_to_transform": (_PEFT, _LAYERS),
    "num_layers": (_MLX, _LAYERS),
    "lora_modules_to_save": (f"{_TRL}, {_AX}", _SAVED),
    "additional_target": (_LF, _SAVED),
    "lora_parameters": (_MLX, "method (r, alpha, dropout)"),
    "task_type": (_PEFT, _TASK),
    "use_dora": (_PEFT, "method.kind (dora)"),
    "use_rslora": (_PEFT, "method.kind (rslora)"),
    "pissa_init": (_LF, "method.kind (pissa)"),
    "init_lora_weights": (f"{_PEFT}, {_MS}", "method.kind (pissa, olora; lora starts without effect)"),
    "num_virtual_tokens": (_PEFT, _VIRTUAL),
    "pre_seq_len": (_GLM, _VIRTUAL),
    "adapter_len": (_PEFT, _VIRTUAL),
    "adapter_layers": (_PEFT, "method.layers (with kind: llama_adapter, the last so many)"),
    "prompt_tuning_init": (_PEFT, "method.init (a text; null starts from real tokens)"),
    "prompt_tuning_init_text": (_PEFT, "method.init (a text)"),
    "prefix_projection": (f"{_PEFT}, {_GLM}", "nothing to set (a prefix starts from the keys and values of a text)"),
    "feedforward_modules": (_PEFT, _TARGET),
    "freeze_trainable_layers": (_LF, _LAST),
    "num_layer_trainable": (_LF, _LAST),
    # train
    "stage": (_LF, _TASK),
    "do_train": (_T, "nothing in the recipe; on the command line: luthier train"),
    "do_eval": (_T, _HELD_OUT),
    "per_device_train_batch_size": (_T, _BATCH),
    "per_device_batch_size": ("tutorials", _BATCH),
    "gradient_accumulation_steps": (_T, _BATCH),
    "micro_batch_size": (f"{_AX}, {_LG}", _BATCH),
    "batch_size": (f"{_TT}, {_MLX}, {_AL}", _BATCH),
    "train_batch_size": ("DeepSpeed", _BATCH),
    "global_batch_size": (_LG, _BATCH),
    "batch_size_training": (_LR, _BATCH),
    "per_device_eval_batch_size": (_T, _PASSES),
    "val_batch_size": (_LR, _PASSES),
    "auto_find_batch_size": (_T, _PASSES),
    "packing": (f"{_TRL}, {_LF}, {_MS}", _PACKING),
    "neat_packing": (_LF, _PACKING),
    "sample_packing": (_AX, _PACKING),
    "padding_free": (f"{_TRL}, {_MS}", _PACKING),
    "pad_to_sequence_len": (_AX, _PACKING),
    "group_by_length": (f"{_T}, {_AX}", _PACKING),
    "batching_strategy": (_LR, _PACKING),
    "num_train_epochs": (_T, "train.epochs (passes over the data)"),
    "num_epochs": (f"{_AX}, {_LR}, {_AL}", "train.epochs (passes over the data)"),
    "max_steps": (_T, _STEPS),
    "iters": (_MLX, _STEPS),
    "max_steps_per_epoch": (_TT, _STEPS),
    "max_train_step": (_LR, _STEPS),
    "learning_rate": (_T, "train.lr (peak learning rate)"),
    "lr_scheduler_type": (_T, "train.schedule (linear, cosine or constant)"),
    "lr_scheduler": (f"{_AX}, {_TT}", "train.schedule (linear, cosine or constant)"),
    "lr_schedule": (_MLX, "train.schedule (linear, cosine or constant)"),
    "lr_scheduler_kwargs": (_T, _FLOOR),
    "cosine_min_lr_ratio": (_AX, _FLOOR),
    "warmup_ratio": (_T, _WARMUP),
    "warmup_steps": (_T, _WARMUP),
    "num_warmup_steps": (f"{_T}, {_TT}", _WARMUP),
    "lr_warmup_steps": (_LG, _WARMUP),
    "optim": (_T, f"train.optimizer (adamw; the 8-bit ones are {LATER})"),
    "adam_beta1": (_T, _BETAS),
    "adam_beta2": (_T, _BETAS),
    "adam_epsilon": (_T, "train.eps"),
    "max_grad_norm": (_T, _CLIP),
    "clip_grad_norm": (_TT, _CLIP),
    "gradient_clipping": (f"DeepSpeed, {_LR}", _CLIP),
    "gradient_clip_val": ("Lightning", _CLIP),
    "gradient_clipping_threshold": (_LR, _CLIP),
    "fp16": (_T, _PRECISION),
    "bf16": (_T, _PRECISION),
    "use_fp16": (_LR, _PRECISION),
    "mixed_precision": (f"accelerate, {_LR}", _PRECISION),
    "gradient_checkpointing": (_T, _CHECKPOINTING),
    "use_gradient_checkpointing": (_UN, _CHECKPOINTING),
    "enable_activation_checkpointing": (_TT, _CHECKPOINTING),
    "grad_checkpoint": (_MLX, _CHECKPOINTING),
    "deepspeed": (_T, _DEVICES),
    "fsdp": (_T, _DEVICES),
    "enable_fsdp": (_LR, _DEVICES),
    "device_map": (_T, _DEVICES),
    "device": (_TT, _DEVICES),
    "logging_steps": (_T, _LOG),
    "log_every_n_steps": (_TT, _LOG),
    "steps_per_report": (_MLX, _LOG),
    "eval_strategy": (_T, _EVAL),
    "evaluation_strategy": (_T, _EVAL),
    "eval_steps": (_T, _EVAL),
    "evals_per_epoch": (_AX, _EVAL),
    "steps_per_eval": (_MLX, _EVAL),
    "save_strategy": (_T, _SAVE),
    "save_steps": (_T, _SAVE),
    "saves_per_epoch": (_AX, _SAVE),
    "save_total_limit": (_T, "train.keep (checkpoints kept, or all)"),
    "early_stopping_patience": (f"{_T}, {_AX}", _STOP),
    "load_best_model_at_end": (_T, _BEST),
    "metric_for_best_model": (_T, _BEST),
    "random_state": (_UN, "train.seed (the data has its own, data.seed)"),
    # generate, merge
    "do_sample": (_T, "generate.sample (true draws tokens at random)"),
    "max_tokens": ("OpenAI", "generate.max_new_tokens (longest answer in tokens)"),
    "num_beams": (_T, "nothing to set (answers are greedy, or drawn with generate.sample)"),
    "export_dir": (_LF, _MERGE),
    "merge_lora": (_MS, _MERGE),
}

FOREIGN = {name: Foreign(tools, here) for name, (tools, here) in _TABLE.items()}
"""Keys of other tools, wherever they stand in a recipe."""

FUTURE_KEYS = (
    "data.replay",
    "demo",
)
"""Keys of Luthier's own vocabulary that this version does not know yet."""

FUTURE_VALUES: dict[str, frozenset[str]] = {}
"""Values of Luthier's own vocabulary that this version does not know yet."""

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_DTYPES |= {f"torch.{name}": here for name, here in _DTYPES.items()}
_QUANTS = {"4bit": "nf4", "int4": "nf4", "fp4": "nf4", "bnb.nf4": "nf4", "8bit": "int8", "bnb.int8": "int8"}

FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "model.dtype": _DTYPES,
    "merge.dtype": _DTYPES,
    "train.precision": _DTYPES,
    "data.format": {"openai": "messages", "chat": "messages", "chatml": "messages", "conversational": "messages"},
    "data.template": {"default": "auto", "chatglm3": "glm3"},
    "model.quantize": _QUANTS,
    "model.quantize.kind": _QUANTS,
    "model.quantize.compute_dtype": _DTYPES,
    "method.kind": {
        "qlora": "lora, with model.quantize: nf4",
        "qdora": "dora, with model.quantize: nf4",
        "prompt_tuning": "prompt",
        "prefix_tuning": "prefix",
        "ptuning": "p_tuning",
        "p-tuning": "p_tuning",
        "ptuning_v2": "prefix",
        "p_tuning_v2": "prefix",
        "adaption_prompt": "llama_adapter",
        "llama-adapter": "llama_adapter",
        "adapter": "bottleneck",
        "houlsby": "bottleneck, with method.placement: houlsby",
        "pfeiffer": "bottleneck, with method.placement: pfeiffer",
        "(ia)^3": "ia3",
        "lntuning": "ln_tuning",
    },
    "method.target": {"all-linear": "all_linear", "all": "all_linear"},
    "train.schedule": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "train.optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
    },
    "train.devices": {"cuda": "auto", "gpu": "auto", "cuda:0": "[0]"},
}
"""Other tools' words for a value: dotted key → their word → ours."""

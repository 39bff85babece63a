"""Silence for the libraries below us: what the user reads is what Luthier says."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = (
    "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "huggingface_hub", "httpx", "torch",
    "modelscope", "modelscope_hub",
)  # fmt: skip


def quiet() -> None:
    """Silence our dependencies' warnings, log lines and progress bars in this process; every verb calls it first.

    It must come before torch and peft are imported: both warn while they are. Downloads keep their progress bar.
    `python -W …` and PYTHONWARNINGS still show the warnings to whoever asks for them.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, tokenizers warns at the first fork
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)

    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # "Loading weights", "Writing model shards"; the hub's too, so:
    enable_progress_bars()

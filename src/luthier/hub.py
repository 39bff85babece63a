"""A name → a local path: a folder, the Hugging Face hub (or its mirror), ModelScope.

hf:owner/name           from HF_ENDPOINT (default https://huggingface.co); a model's name may leave `hf:` out
modelscope:owner/name   needs the extra `modelscope`
anything else           a folder or a file, relative to the recipe's

What is in the libraries' caches is not fetched again, and is taken when the hub cannot be reached. Downloads go on
where they broke off. A token comes from the environment (HF_TOKEN) or an earlier login, and is never printed.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.errors import HubError, ModelError

Say = Callable[[str], None]

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DATA_SET = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(\[(?P<split>[\w.-]+)\])?")
_DATA_FILES = ["*.json*", "*.csv*", "*.tsv*", "*.parquet", "*.txt*"]
_PATIENCE = 10  # seconds until a hub that does not answer counts as unreachable


def model_path(name: str, revision: str | None, base: Path, say: Say, *, weights: bool = True) -> Path:
    """The local folder of a model, fetched where that is needed; without `weights` its small files alone.

    `name`: hf:owner/name, modelscope:owner/name, or a folder relative to `base`; a bare owner/name that is no folder
    is the hub's, unless there is a folder `owner` here. Errors: ModelError for a folder that is not there, HubError
    for what cannot be fetched.
    """
    source, repo = _parted(name)
    if not source:
        folder = base / Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelError(f"{folder}: a file, where a model's folder is expected")
        is_path = name.startswith((".", "/", "~", "runs/")) or ("/" in name and folder.parent.is_dir())
        if is_path or not _REPOSITORY.fullmatch(name):
            raise ModelError(
                f"{folder}: there is no such run or folder; a model on a hub is hf:owner/name or modelscope:owner/name"
            )
    if not _REPOSITORY.fullmatch(repo):
        raise HubError(f"{name}: not a name on a hub, as in hf:owner/name")
    if source == "modelscope":
        return _modelscope_model(name, repo, revision, weights, say)
    return _hf_model(name, repo, revision, weights, say)


def data_files(name: str, base: Path, say: Say) -> list[Path]:
    """The files (Arrow, or as they were uploaded) of a data set, fetched where that is needed.

    `name`: hf:owner/name[split], hf:owner/name/config[split] or modelscope:owner/name[split]; anything else is a path
    relative to `base`, given back as it is. Errors: HubError.
    """
    source, repo = _parted(name)
    if not source:
        return [base / Path(name).expanduser()]
    match = _DATA_SET.fullmatch(repo)
    if match is None:
        raise HubError(f"{name}: not a data set's name, as in {source}:owner/name or {source}:owner/name[train]")
    if source == "modelscope":
        return _modelscope_data(name, match["repo"], match["split"], say)
    return _hf_data(name, match["repo"], match["config"], match["split"], say)


def _parted(name: str) -> tuple[str, str]:
    """("hf", "owner/name"), ("modelscope", …), or ("", name) for a name without a hub."""
    source, colon, rest = name.partition(":")
    return (source, rest) if colon and source in ("hf", "modelscope") else ("", name)


def _wanted(sizes: Mapping[str, int], weights: bool = True) -> list[str]:
    """Of a repository's files those that a model is loaded from: safetensors where there are any, never twice."""
    if not weights:
        return [file for file in _wanted(sizes) if not file.endswith((".safetensors", ".bin", ".index.json"))]
    kinds = (".safetensors", ".bin", ".json", ".model", ".tiktoken", ".txt", ".jinja", ".py")
    files = [file for file in sizes if "/" not in file and file.endswith(kinds)]
    tensors = [file for file in files if file.endswith(".safetensors")]
    if any(file.startswith("model") for file in tensors):  # beside the vendor's own consolidated.safetensors
        files = [file for file in files if not file.startswith("consolidated")]
    other = r"(?!pytorch_model).*\.bin" if not tensors else r".*\.bin(\.index\.json)?"
    return [file for file in files if not re.fullmatch(other, file)]


def _check_room(name: str, missing: int, cache: Path) -> None:
    there = next(folder for folder in [cache, *cache.parents] if folder.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise HubError(
            f"{name}: {missing / 1e9:,.1f} GB are to be fetched and {free / 1e9:,.1f} GB are free in {cache}; make"
            " room, or move the cache: export HF_HOME=FOLDER"
        )


# ---- Hugging Face


def _hf_model(name: str, repo: str, revision: str | None, weights: bool, say: Say) -> Path:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)
    except Exception as error:  # of the library's HTTP client too: httpx or httpx2, by its version
        return _hf_cached(name, repo, revision, weights, error, say)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = _wanted(sizes, weights)
    cached = {file: try_to_load_from_cache(repo, file, revision=info.sha) for file in wanted}
    missing = [file for file, path in cached.items() if not isinstance(path, str)]
    if not missing and "config.json" in cached:
        return Path(str(cached["config.json"])).parent
    size = sum(sizes[file] for file in missing)
    _check_room(name, size, Path(HF_HUB_CACHE))
    say(f"{name}: fetching {len(missing)} files, {size / 1e6:,.1f} MB, from {ENDPOINT}")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))
    except Exception as error:
        raise _plain(error, name) from error


def _hf_cached(name: str, repo: str, revision: str | None, weights: bool, error: Exception, say: Say) -> Path:
    """The copy in the cache when the hub gives nothing. Errors: HubError where there is none, or half a one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    refused = _is_answer(error)
    problem = _plain(error, name, f"{revision}") if refused else _unreachable(name, error)
    known = not isinstance(error, HFValidationError)
    config = try_to_load_from_cache(repo, "config.json", revision=revision) if known else None
    if not isinstance(config, str):
        raise problem from error
    lacking = _lacking(Path(config).parent) if weights else None
    if lacking:
        raise HubError(f"{problem}; the copy in the cache lacks {lacking}") from error
    what = "refuses it" if refused else "cannot be reached"
    say(f"{name}: the hub {what} ({_reason(error)}); taking the copy in the cache")
    return Path(config).parent


def _lacking(folder: Path) -> str | None:
    """The first weights file that an interrupted download left out."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            return next((shard for shard in sorted(shards) if not (folder / shard).exists()), None)
    return None if [*folder.glob("*.safetensors"), *folder.glob("*.bin")] else "the weights"


def _hf_data(name: str, repo: str, config: str | None, split: str | None, say: Say) -> list[Path]:
    if Path(repo).exists():
        raise HubError(f"{name}: ./{repo} lies here and the library would take it; for that one write ./{repo}")
    _check_data_there(name, repo, say)
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        splits = load_dataset(repo, config, keep_in_memory=False)
    except Exception as error:  # datasets raises a dozen kinds, beside those of huggingface_hub
        configs = re.search(r"available configs: \[(.*?)\]", str(error))
        if configs:
            names = ", ".join(f"hf:{repo}/{one}" for one in re.findall(r"'([^']+)'", configs[1]))
            raise HubError(f"{name}: name one of its configurations: {names}") from error
        if isinstance(error, DatasetNotFoundError) or _is_disk_full(error):
            raise _plain(error, name) from error
        reason = _reason(error.__cause__ or error)
        raise HubError(
            f"{name}: could not be read as a table ({reason}); run it again, or fetch its files and give their path"
        ) from error
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        whole = name.partition("[")[0]
        raise HubError(f"{name}: name one of its splits: {', '.join(f'{whole}[{one}]' for one in splits)}")
    others = [one for one in splits if one != chosen]
    say(f"{name}: split {chosen}, {len(splits[chosen]):,} rows" + (f" (not {', '.join(others)})" if others else ""))
    return [Path(file["filename"]) for file in splits[chosen].cache_files]


def _check_data_there(name: str, repo: str, say: Say) -> None:
    """Ask the hub first: datasets itself tries an unreachable one for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HOME

    try:
        HfApi().dataset_info(repo, timeout=_PATIENCE)
    except Exception as error:
        if _is_answer(error):
            raise _plain(error, name) from error
        cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets"))
        if not (cache / repo.replace("/", "___")).is_dir():
            raise _unreachable(name, error) from error
        say(f"{name}: the hub cannot be reached ({_reason(error)}); taking the copy in the cache")


# ---- what went wrong, on one line, with the remedy


def _is_answer(error: BaseException) -> bool:
    """Whether the hub itself refused. 5xx is a hub, a mirror or a proxy that does not work now."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (
        isinstance(error, HFValidationError) or _status(error) in range(400, 500) and isinstance(error, HfHubHTTPError)
    )


def _is_disk_full(error: BaseException) -> bool:
    chain = (error, error.__cause__, error.__context__)
    return any(getattr(one, "errno", None) == errno.ENOSPC or "No space left" in str(one) for one in chain)


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _plain(error: BaseException, name: str, revision: str = "main") -> HubError:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    refused = next((one for one in (error, error.__cause__, error.__context__) if _status(one)), error) or error
    if _is_disk_full(error):
        return HubError(f"{name}: the disk is full; make room, or move the cache: export HF_HOME=FOLDER")
    if isinstance(refused, GatedRepoError) or "is a gated dataset" in str(error):
        return HubError(
            f"{name}: gated: log in at https://huggingface.co, accept its terms on its page, make a read token at"
            " https://huggingface.co/settings/tokens, then export HF_TOKEN=…"
        )
    if isinstance(refused, RevisionNotFoundError):
        return HubError(f"{name}: no branch, tag or commit {revision!r} at {ENDPOINT}; check the revision")
    status = _status(refused)
    if status in (401, 403):
        return HubError(
            f"{name}: {ENDPOINT} gives no access ({status}): it is not there, or private; check the name, and for a"
            " private one export HF_TOKEN=… (a read token of an account that may see it)"
        )
    if status == 404:
        bare = "" if ":" in name else ", nor is it a folder here"
        return HubError(f"{name}: not to be found at {ENDPOINT}{bare}; check the name")
    if status == 429:
        return HubError(f"{name}: {ENDPOINT} asks for a pause (429, too many requests); try again in some minutes")
    if isinstance(error, HFValidationError):
        return HubError(f"{name}: not a name on the hub: {_reason(error)}")
    return HubError(
        f"{name}: could not be fetched whole ({_reason(refused)}); run it again, what came is kept; or put the files"
        " in a folder and give its path"
    )


def _unreachable(name: str, error: BaseException) -> HubError:
    from huggingface_hub.constants import ENDPOINT

    return HubError(
        f"{name}: {ENDPOINT} cannot be reached ({_reason(error)}); set a mirror (export HF_ENDPOINT=https://…), take"
        " modelscope:owner/name, or put the files in a folder and give its path"
    )


def _reason(error: BaseException) -> str:
    """The error in a few words: its kind, and its first line unless an address (and a password) can stand in it."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    if status := _status(error):
        return f"status {status}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines and "://" not in lines[0] else type(error).__name__


# ---- ModelScope


def _modelscope(
    name: str, repo: str, kind: str, revision: str | None, patterns: Callable[[Any], list[str]], say: Say
) -> Path:
    """Fetch what `patterns`, given ModelScope's API, names of a repository; the copy in the cache where that fails."""
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise HubError("modelscope: names need its library: pip install 'luthier[modelscope]'") from error
    source = {"repo_id": repo, "repo_type": kind, "revision": revision}
    try:
        return Path(snapshot_download(**source, allow_patterns=patterns(HubApi())))
    except Exception as error:
        try:
            folder = Path(snapshot_download(**source, local_files_only=True))
        except Exception:
            raise HubError(
                f"{name}: cannot be fetched ({_reason(error)}); check the name and the network (for a private one"
                " export MODELSCOPE_API_TOKEN=…), or put the files in a folder and give its path"
            ) from error
        say(f"{name}: ModelScope does not answer ({_reason(error)}); taking the copy in the cache")
        return folder


def _modelscope_model(name: str, repo: str, revision: str | None, weights: bool, say: Say) -> Path:
    def patterns(api: Any) -> list[str]:
        sizes = {file["Path"]: file["Size"] or 0 for file in api.get_model_files(repo, revision=revision)}
        return _wanted(sizes, weights)

    return _modelscope(name, repo, "model", revision, patterns, say)


def _modelscope_data(name: str, repo: str, split: str | None, say: Say) -> list[Path]:
    folder = _modelscope(name, repo, "dataset", None, lambda api: _DATA_FILES, say)
    files = sorted({file for pattern in _DATA_FILES for file in folder.rglob(pattern)})
    files = [file for file in files if not re.fullmatch(r"(dataset_infos?|config.*)\.json", file.name)]
    chosen = [file for file in files if split is None or split in file.name]
    if not chosen:
        raise HubError(f"{name}: no file of that split; its files: {', '.join(file.name for file in files)}")
    return chosen

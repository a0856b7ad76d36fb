"""Push an adapter or a merged model to the Hugging Face Hub, in one commit.

Local paths are removed from the uploaded files. Afterwards, the Hub's checksums of the files are verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.errors import InputError, ModelError, RunError
from strop.evaluation.model_card import CARD_FILE, LOCATION, find_report, format_card, hub_id
from strop.models.adapter_config import (
    ORIGIN_FILE,
    STROP_FILE,
    adapter_folder,
    read_adapter_config,
    read_base_name,
    read_identity,
)
from strop.models.adapters import check_adapter_weights
from strop.models.embedder import MODULES_FILE, NORMALIZE_FOLDER, POOLING_FOLDER, SETTINGS_FILE
from strop.models.source import download_config, locate, read_config, read_safetensors_header, weight_files
from strop.runs.folder import RunFolder, is_run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Other JSON and text files are not uploaded, because they may be the user's data or notes.
UPLOADED = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "tekken.json", "vocab.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "vocab.txt", "merges.txt", "*.jinja",
    "*.model", STROP_FILE, CARD_FILE, "LICENSE*", "NOTICE*", MODULES_FILE, SETTINGS_FILE,
)  # fmt: skip
NEVER_REMOVED = (CARD_FILE, "LICENSE*", "NOTICE*", "*/*")  # files of the repository that a push does not delete
PATH_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # JSON keys that may have local paths
# Config values in which the model on the Hub must match the base that the adapter was trained on.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Pushed:
    """A pushed adapter or model.

    Attributes:
        repo: its Hub id.
        url: its address.
        commit: the commit on the Hub.
        private: whether the repository is private.
        kind: "adapter" or "model".
        base: Hub id of the adapter's base, or None.
        files: uploaded files.
        left_out: files of the folder that were not uploaded.
        removed: files of an earlier push that were deleted.
        size_bytes: size of the uploaded files.
        system: the system prompt of the training rows that is in the uploaded strop.json, or None.
    """

    repo: str
    url: str
    commit: str
    private: bool
    kind: str
    base: str | None
    files: list[str]
    left_out: list[str]
    removed: list[str]
    size_bytes: int
    system: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    name: str,
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    message: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Upload an adapter or a model folder, and verify the upload; see `strop.push`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api, folder = HfApi(), adapter_folder(name)
    if "/" not in repo:
        with _translated_errors(api, repo):
            repo = f"{api.whoami()['name']}/{repo}"
    if folder is None:
        path = Path(name).expanduser()
        folder = RunFolder(path).saved if is_run(path) else path
        kind, (contents, left_out), base = "model", _read_model(folder, base), None
    else:
        kind, (contents, left_out, base) = "adapter", _read_adapter(folder, base)
    _prepare_card(folder, contents, repo)
    with _translated_errors(api, repo):
        private, existing = _open_repository(api, repo, public)
        adds = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in sorted(contents.items())
        ]
        for number, add in enumerate(adds, 1):
            size = _format_size(add.upload_info.size)
            progress(f"uploading {add.path_in_repo} ({size}, {number} of {len(adds)}) to {repo}")
            api.preupload_lfs_files(repo, [add], free_memory=False)
        # Files of an earlier push may be harmful: with an old adapter_config.json, a model is loaded as an adapter.
        outdated = (file for file in existing if file not in contents and _matches(file, UPLOADED))
        removed = sorted(file for file in outdated if not _matches(file, NEVER_REMOVED))
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [*adds]
        operations += [CommitOperationDelete(file) for file in removed]
        commit = api.create_commit(repo, operations, commit_message=message or f"strop push: {kind} {Path(name).name}")
    progress("comparing the files on the Hub with those uploaded")
    with _translated_errors(api, repo, "it was uploaded but not compared; push it again"):
        _verify(api, repo, adds)
    size_bytes, url = sum(add.upload_info.size for add in adds), f"{api.endpoint}/{repo}"
    files, system = sorted(contents), None if folder is None else read_identity(folder).get("system")
    return Pushed(repo, url, str(commit.oid), private, kind, base, files, left_out, removed, size_bytes, system)


def _read_adapter(folder: Path, base: str | None) -> tuple[dict[str, bytes | Path], list[str], str]:
    """Return the content by file name, the files that are not uploaded, and the base's Hub id."""
    check_adapter_weights(folder)
    config = read_adapter_config(folder)
    if not (trained_on := read_base_name(folder)):
        what = f"{folder}: does not say which model it was trained on (base_model_name_or_path)"
        raise ModelError(what, fix="write it into its adapter_config.json")
    base_id, (base, _, base_revision) = hub_id(trained_on), (base or "").partition("@")
    if base_id is None and not base:
        what = f"{folder}: its base is {trained_on}, which nobody else can load"
        raise ModelError(what, fix="give the same model's Hub id (--base OWNER/NAME), or push a merged model")
    if base_id is not None and base not in ("", base_id):
        raise ModelError(f"--base {base}: the adapter was trained on {base_id}", fix="leave --base out")
    if base_id is None:
        _check_sizes(folder, trained_on, base, base_revision or None)
    public_base = base_id or base
    revision = (trained_on.partition("@")[2] if base_id else base_revision) or config.get("revision")
    contents, left_out = _read_folder(folder)
    contents["adapter_config.json"] = _to_json({**config, "base_model_name_or_path": public_base, "revision": revision})
    if identity := read_identity(folder):
        identity["base"] = {"name": public_base, "fingerprint": identity["base"]["fingerprint"]}
        if "combined" in identity:  # the adapters that were combined have local paths too
            identity["combined"] = [{**part, "name": Path(part["name"]).name} for part in identity["combined"]]
        contents[STROP_FILE] = _to_json(identity)
    if (report := find_report(folder)) is not None:
        contents[CARD_FILE] = format_card(report, base=base or None).encode()
    return contents, left_out, public_base


def _read_model(folder: Path, base: str | None) -> tuple[dict[str, bytes | Path], list[str]]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a run, an adapter or a model folder", fix="give one of these")
    if base is not None:
        raise InputError("--base: applies to adapters, and this is a whole model", fix="leave --base out")
    read_config(folder)
    for file in weight_files(folder):
        read_safetensors_header(file)
    contents, left_out = _read_folder(folder)
    if trained_on := (identity := read_identity(folder)).get("base"):
        name = hub_id(trained_on["name"]) or Path(trained_on["name"].partition("#")[0]).name  # no path of this machine
        contents[STROP_FILE] = _to_json({**identity, "base": {**trained_on, "name": name}})
    return contents, left_out


def _read_folder(folder: Path) -> tuple[dict[str, bytes | Path], list[str]]:
    """Return the content by file name and the files that are not uploaded. Removes local paths from JSON files."""
    contents: dict[str, bytes | Path] = {}
    left_out = []
    # folders of sentence-transformers, of which the second is empty, and a path that is of use on this machine only
    unlisted = (POOLING_FOLDER, NORMALIZE_FOLDER, ORIGIN_FILE)
    for file in sorted([*folder.iterdir(), *(folder / POOLING_FOLDER).glob("config.json")]):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or not _matches(name, UPLOADED):
            left_out += [] if name in unlisted else [name]
            continue
        contents[name] = file
        if file.suffix == ".json":
            try:
                value = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                fix = "restore it, or move it out of the folder"
                raise ModelError(f"{file}: not JSON: {error}", fix=fix) from None
            if (cleaned := _remove_paths(value)) != value:
                contents[name] = _to_json(cleaned)
    return contents, left_out


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _remove_paths(value: Any) -> Any:
    if isinstance(value, dict):
        local_keys = [key for key in PATH_KEYS if isinstance(value.get(key), str) and hub_id(value[key]) is None]
        return {key: _remove_paths(item) for key, item in value.items() if key not in local_keys}
    return [_remove_paths(item) for item in value] if isinstance(value, list) else value


def _prepare_card(folder: Path, contents: dict[str, bytes | Path], repo: str) -> None:
    """Insert the repository's name into a card written by strop. Raises ModelError if there is no card."""
    content = contents.get(CARD_FILE)
    if content is None:
        what = f"{folder}: has no model card ({CARD_FILE}), so nobody would know what it is"
        raise ModelError(what, fix=f"write {folder / CARD_FILE}, or push a run that has ended")
    try:
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / CARD_FILE}: {error}", fix="save it as UTF-8") from None
    # The card has LOCATION in place of a path. strop's own example needs a local folder.
    name, own = repo.rpartition("/")[2], re.escape(f'strop.load("{LOCATION}")')
    after_download = rf'\1strop.load("{name}")\2  # after `hf download {repo} --local-dir {name}`'
    contents[CARD_FILE] = re.sub(rf"(.*){own}(.*)", after_download, text).replace(LOCATION, repo).encode()


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _check_sizes(folder: Path, trained_on: str, base: str, revision: str | None) -> None:
    """Raise ModelError if the model on the Hub has other sizes than the adapter's base."""
    from strop.models.load import load_config

    expected, config = load_config(locate(trained_on)).to_dict(), download_config(base, revision)
    for key in SIZES:
        if key in expected and key in config and expected[key] != config[key]:
            what = f"--base {base}: not the base of {folder}: its {key} is {config[key]}, {expected[key]} expected"
            raise ModelError(what, fix="give the Hub id of the model that it was trained on")


def _open_repository(api: HfApi, repo: str, public: bool) -> tuple[bool, list[str]]:
    """Create the repository if it does not exist. Returns whether it is private, and its files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        return not public, []
    if not info.private and not public:
        raise InputError(f"{repo}: is public", fix="give --public to push to it anyway, or another name")
    if info.private and public:
        raise InputError(f"--public: {repo} is private", fix="make it public on its page, or leave --public out")
    return bool(info.private), [file.rfilename for file in info.siblings or []]


def _verify(api: HfApi, repo: str, adds: list[Any]) -> None:
    """Raise RunError if a checksum on the Hub differs: the SHA-256 for LFS files, the Git hash for others."""
    from huggingface_hub.utils.sha import git_hash

    entries = {entry.path: entry for entry in api.get_paths_info(repo, [add.path_in_repo for add in adds])}
    different = []
    for add in adds:
        entry = entries.get(add.path_in_repo)
        if lfs := getattr(entry, "lfs", None):
            same = lfs.sha256 == add.upload_info.sha256.hex()
        else:
            with add.as_file() as file:
                same = getattr(entry, "blob_id", "") == git_hash(file.read())
        different += [] if same else [add.path_in_repo]
    if different:
        raise RunError(f"{repo}: checksums on the Hub differ: {', '.join(different)}", fix="push it again")


@contextmanager
def _translated_errors(api: HfApi, repo: str, retry: str = "no file was changed there; try again") -> Iterator[None]:
    """Convert errors of huggingface_hub to InputError or RunError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # The class is from httpx or httpx2, depending on the version of huggingface_hub.
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    login = "run `hf auth login` with a token that may write, or set HF_TOKEN"
    try:
        yield
    except HFValidationError:
        raise InputError(f"{repo}: not a valid repository name", fix="give OWNER/NAME") from None
    except LocalTokenNotFoundError:
        raise InputError("not logged in to the Hub", fix=login) from None
    except OfflineModeIsEnabled:
        raise InputError("the Hub cannot be reached in offline mode", fix="unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = (error.server_message or str(error)).strip().splitlines()[0]
        if status == 401:
            raise InputError(f"the Hub does not know this account: {reason}", fix=login) from None
        if status == 403:
            raise InputError(f"{repo}: no permission to write: {reason}", fix=f"check OWNER; {login}") from None
        raise RunError(f"{repo}: the Hub answered with status {status}: {reason}", fix=retry) from None
    except (RuntimeError, ValueError) as error:  # the Hub rejected a file or the model card
        raise RunError(f"{repo}: {str(error.__cause__ or error).strip().splitlines()[0]}", fix=retry) from None
    except (TransportError, ConnectionError, TimeoutError) as error:  # the last two are those of hf_xet
        what = f"{api.endpoint}: cannot be reached ({type(error).__name__})"
        raise RunError(what, fix=f"{retry}; check the connection and HF_ENDPOINT") from None


def _format_size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB" if size_bytes >= 1e5 else f"{size_bytes / 2**10:,.1f} KiB"

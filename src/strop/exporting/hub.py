"""An adapter or a merged model onto the Hugging Face Hub: one commit, with its card, private unless asked otherwise.

What is sent tells nobody where things are on this machine, and is compared with what the Hub says that it received.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.errors import InputError, ModelError, RunError
from strop.evaluation.model_card import CARD_FILE, PLACE, card, find_report, hub_id
from strop.models.adapter_config import adapter_config
from strop.models.adapters import STROP_FILE, adapter_folder, check_weights, read_identity
from strop.models.source import hub_config, locate, read_config, safetensors_header, weight_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# By name: another JSON or text file may be the user's rows or notes.
SENT = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "tekken.json", "vocab.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "vocab.txt", "merges.txt", "*.jinja",
    "*.model", STROP_FILE, CARD_FILE, "LICENSE*", "NOTICE*",
)  # fmt: skip
KEPT = (CARD_FILE, "LICENSE*", "NOTICE*", "*/*")  # of an earlier push, or somebody's own
# Where in JSON files tools put down the path that something was loaded from.
PATHS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
# What two configs have alike where an adapter for one fits the other.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Pushed:
    """kind: adapter or model. files: what the Hub has now, compared with what was sent; left_out: files of the folder
    that were not sent; removed: weights of an earlier push; base: the Hub id that an adapter loads its base from."""

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    name: str,
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    message: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Sends the adapter of a run or adapter folder, or a model folder, to `repo` (OWNER/NAME), and compares.

    public: make a new repository that everybody can read, or send to one; without it a public one is refused.
    base: the Hub id of an adapter's base, where it was trained on a folder, a GGUF file or the demo's model.
    Raises InputError before anything is sent, RunError where the Hub cannot be reached or holds other bytes after.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api, folder = HfApi(), adapter_folder(name)
    if "/" not in repo:
        with _faults(api, repo):
            repo = f"{api.whoami()['name']}/{repo}"
    kind = "model" if folder is None else "adapter"
    contents, left_out, base = _adapter(folder, repo, base) if folder is not None else _model(Path(name), repo, base)
    with _faults(api, repo):
        private, there = _repository(api, repo, public)
        adds = [CommitOperationAdd(path, held if isinstance(held, bytes) else str(held)) for path, held in contents]
        for number, add in enumerate(adds, 1):
            say(f"sending {add.path_in_repo} ({_size(add.upload_info.size)}, {number} of {len(adds)}) to {repo}")
            api.preupload_lfs_files(repo, [add], free_memory=False)
        sent = {add.path_in_repo for add in adds}
        # an adapter_config.json beside a merged model, for one, would have it loaded as an adapter
        stale = sorted(file for file in there if file not in sent and _fits(file, SENT) and not _fits(file, KEPT))
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [*adds]
        operations += [CommitOperationDelete(file) for file in stale]
        done = api.create_commit(repo, operations, commit_message=message or f"strop push: {kind} {Path(name).name}")
    say("comparing what the Hub has with what was sent")
    with _faults(api, repo, "it was sent, and not compared; push it again"):
        _compare(api, repo, adds)
    size = sum(add.upload_info.size for add in adds)
    url = f"{api.endpoint}/{repo}"
    return Pushed(repo, url, str(done.oid), private, kind, base, sorted(sent), left_out, stale, size)


def _adapter(folder: Path, repo: str, base: str | None) -> tuple[list[tuple[str, bytes | Path]], list[str], str]:
    """(name there and content of each file, what is left out, the base's Hub id)."""
    check_weights(folder)
    config = adapter_config(folder)
    if not (trained_on := str(config.get("base_model_name_or_path") or "")):
        what = f"{folder}: does not say which model it was trained on (base_model_name_or_path)"
        raise ModelError(what, fix="write it into its adapter_config.json")
    known, (base, _, at) = hub_id(trained_on), (base or "").partition("@")
    base = base or None
    if known is None and base is None:
        what = f"{folder}: its base is {trained_on}, which nobody else can load"
        raise ModelError(what, fix="give the same model's Hub id (--base OWNER/NAME), or push a merged model")
    if known is not None and base not in (None, known):
        raise ModelError(f"--base {base}: the adapter was trained on {known}", fix="leave --base out")
    if known is None:
        _check_alike(folder, trained_on, str(base), at or None)
    shown = known or str(base)
    revision = (trained_on.partition("@")[2] if known else at) or config.get("revision")
    report = find_report(folder)
    contents, left_out = _files(folder)
    made: dict[str, bytes] = {
        "adapter_config.json": _json({**config, "base_model_name_or_path": shown, "revision": revision})
    }
    if identity := read_identity(folder):
        told = {**identity, "base": {**identity["base"], "name": shown}}
        if "combined" in told:  # of a sum: its parts lie somewhere here too
            told["combined"] = [{**part, "name": Path(part["name"]).name} for part in told["combined"]]
        made[STROP_FILE] = _json(told)
    if report is not None:
        made[CARD_FILE] = card(report, base=base).encode()
    return _with_card(folder, {**contents, **made}, repo), left_out, shown


def _model(folder: Path, repo: str, base: str | None) -> tuple[list[tuple[str, bytes | Path]], list[str], None]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: neither a run, an adapter nor a model folder", fix="give one of these")
    if base is not None:
        raise InputError("--base: is of an adapter, and this is a whole model", fix="leave --base out")
    read_config(folder)
    for file in weight_files(folder):
        safetensors_header(file)
    contents, left_out = _files(folder)
    return _with_card(folder, contents, repo), left_out, None


def _files(folder: Path) -> tuple[dict[str, bytes | Path], list[str]]:
    """(what is sent of a folder, by name; what is not). JSON files without the paths that tools leave in them."""
    contents: dict[str, bytes | Path] = {}
    left_out = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or not _fits(file.name, SENT):
            left_out.append(file.name)
            continue
        contents[file.name] = file
        if file.suffix == ".json":
            try:
                held = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ModelError(
                    f"{file}: not JSON: {error}", fix="put it back, or take it out of the folder"
                ) from None
            if (told := _without_paths(held)) != held:
                contents[file.name] = _json(told)
    return contents, left_out


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _without_paths(held: Any) -> Any:
    if isinstance(held, dict):
        gone = [key for key in PATHS if isinstance(held.get(key), str) and hub_id(held[key]) is None]
        return {key: _without_paths(value) for key, value in held.items() if key not in gone}
    return [_without_paths(one) for one in held] if isinstance(held, list) else held


def _with_card(folder: Path, contents: dict[str, bytes | Path], repo: str) -> list[tuple[str, bytes | Path]]:
    """Raises ModelError where there is no card; in one that strop wrote, the folder becomes the repository."""
    written = contents.get(CARD_FILE)
    if written is None:
        what = f"{folder}: has no card: nobody would know what it is"
        raise ModelError(what, fix=f"say so in {folder / CARD_FILE}, or push a run that has ended")
    try:
        text = (written if isinstance(written, bytes) else written.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / CARD_FILE}: {error}", fix="save it as UTF-8") from None
    loads, name = 'strop.load("{}")', repo.rpartition("/")[2]  # strop reads an adapter from a folder
    fetched = f'{loads.format(name)}.chat("..."))  # after `hf download {repo} --local-dir {name}`'
    text = text.replace(f'{loads.format(PLACE)}.chat("..."))', fetched)
    return sorted({**contents, CARD_FILE: text.replace(PLACE, repo).encode()}.items())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _check_alike(folder: Path, trained_on: str, base: str, revision: str | None) -> None:
    """Raises ModelError where the config of the Hub's model has other sizes than the base of an adapter."""
    from strop.models.load import load_config

    here, there = load_config(locate(trained_on)).to_dict(), hub_config(base, revision)
    wrong = [key for key in SIZES if key in here and key in there and here[key] != there[key]]
    if wrong:
        key = wrong[0]
        what = f"--base {base}: not the base of {folder}: its {key} is {there[key]}, {here[key]} expected"
        raise ModelError(what, fix="give the Hub id of the model that it was trained on")


def _repository(api: HfApi, repo: str, public: bool) -> tuple[bool, list[str]]:
    """(whether it is private, the files in it); made where it is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        return not public, []
    if not info.private and not public:
        what = f"{repo}: is public: everybody could load it"
        raise InputError(what, fix="give --public if that is meant, or another name")
    if info.private and public:
        raise InputError(f"--public: {repo} is private", fix="make it public on its page, or leave --public out")
    return bool(info.private), [file.rfilename for file in info.siblings or []]


def _compare(api: HfApi, repo: str, adds: list[Any]) -> None:
    """Raises RunError where the Hub's sums of files are not those of what was sent."""
    found = {entry.path: entry for entry in api.get_paths_info(repo, [add.path_in_repo for add in adds])}
    wrong = []
    for add in adds:
        entry = found.get(add.path_in_repo)
        large = getattr(entry, "lfs", None)
        same = large.sha256 == add.upload_info.sha256.hex() if large else getattr(entry, "blob_id", "") == _git_sum(add)
        wrong += [] if same else [add.path_in_repo]
    if wrong:
        raise RunError(f"{repo}: the Hub has other bytes than were sent: {', '.join(wrong)}", fix="push it again")


def _git_sum(add: Any) -> str:
    """Git's own sum of a file that is not stored apart: sha1 of "blob SIZE\\0" and its content."""
    import hashlib

    with add.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def _faults(api: HfApi, repo: str, again: str = "nothing was changed there; try again") -> Iterator[None]:
    """What the Hub's client raises while something is sent, as one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # httpx's or httpx2's, as huggingface_hub's version has it
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    login = "`hf auth login` with a token that may write, or set HF_TOKEN"
    try:
        yield
    except HFValidationError:
        raise InputError(f"{repo}: no name for a repository", fix="give OWNER/NAME") from None
    except LocalTokenNotFoundError:
        raise InputError("not logged in to the Hub", fix=login) from None
    except OfflineModeIsEnabled:
        raise InputError("nothing can be sent while offline", fix="unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = (error.server_message or str(error)).strip().splitlines()[0]
        if status == 401:
            raise InputError(f"the Hub does not know this account: {said}", fix=login) from None
        if status == 403:
            raise InputError(f"{repo}: this account may not write there: {said}", fix=f"check OWNER; {login}") from None
        raise RunError(f"{repo}: the Hub answers {status}: {said}", fix=again) from None
    except (RuntimeError, ValueError) as error:  # of a file that was not taken, and of a card that the Hub refuses
        said = str(error.__cause__ or error).strip().splitlines()[0]
        raise RunError(f"{repo}: {said}", fix=again) from None
    except TransportError as error:
        what = f"{api.endpoint}: cannot be reached ({type(error).__name__})"
        raise RunError(what, fix=f"{again}; check the connection and HF_ENDPOINT") from None


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"

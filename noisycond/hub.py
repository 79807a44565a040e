"""The push to the Hugging Face Hub: what can be known is checked before training, the upload comes after the export.

The token is the one that `huggingface_hub` finds (HF_TOKEN, `hf auth login`); it is never printed nor written.
"""

import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from noisycond import __version__
from noisycond.arguments import HubArguments, require_repo_id
from noisycond.errors import InputError, require


logger = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT")
# What is pushed beside the weights. Not run.json, which tells paths of this machine; never checkpoints and logs.
BESIDE_WEIGHTS = ("README.md", "samples/*.png", "loss.png", "corruption.json", "reconstruction.json")
ADAPTERS = (
    "pytorch_lora_weights.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.json",
    "pipeline.py",
)
TOKENS = "https://huggingface.co/settings/tokens"


def check(args: HubArguments) -> str | None:
    """The repository that a run will push to, "user/model", or None where it pushes to none. To be called before any
    work, on the main process.

    Where the Hub cannot be reached now, as on many a cluster's nodes, that is a warning: the push comes later.

    Raises:
        InputError: no token, or one that the Hub rejects or that cannot write; no name for the repository; a private
            one is asked for and it exists as a public one.
    """
    if not args.push_to_hub:
        return None
    require(not constants.HF_HUB_OFFLINE, "--push_to_hub needs the Hub, but HF_HUB_OFFLINE is set; unset it.")
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    require_repo_id(name, "--hub_model_id is needed: without it the last part of --output_dir names the model; that")
    token = _find_token()
    require(
        token is not None,
        f"--push_to_hub needs a token that can write ({TOKENS}), but none was found: run `hf auth login`, or set "
        "HF_TOKEN.",
    )
    api = _api(token)
    account = _ask(api.whoami, token)
    if account is None:
        require(
            "/" in name,
            f"--hub_model_id: whose {name} is cannot be asked while the Hub is out of reach; write user/{name}.",
        )
        return name
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    require(role != "read", f"--push_to_hub: the token can read only; make one that can write at {TOKENS}.")
    repo_id = name if "/" in name else f"{account['name']}/{name}"
    owners = {account["name"], *(organization["name"] for organization in account.get("orgs", []))}
    if repo_id.split("/")[0] not in owners:
        logger.warning("--hub_model_id %s: the token is that of %s and may not push there.", name, account["name"])
    if args.hub_private_repo:
        require(not _ask(lambda: _is_public(api, repo_id), token), _public_sentence(repo_id))
    return repo_id


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Creates the repository where there is none and uploads an exported folder, whole by now, to it. Main process
    only.

    Files that another model left in the repository stay: they may be the user's, and loading takes only what
    `model_index.json` names.

    Raises:
        InputError: it failed, whatever the reason; the sentence has the command that tries again.
    """
    command = shlex.join(upload_command(folder, repo_id, private))
    logger.info("Pushing %s to %s.", folder, repo_id)
    token = None
    try:
        token = get_token()
        api = _api(token)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        require(not (private and _is_public(api, repo_id)), _public_sentence(repo_id))
        message = f"Trained with noisycond {__version__}"
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=published(folder), commit_message=message
        )
    except (Exception, KeyboardInterrupt) as error:  # client, transfer library and network have many types of errors
        raise InputError(
            f"--push_to_hub: the push to {repo_id} failed: {_cause(error, token)}. {folder} is complete; try the push "
            f"again with: {command}"
        ) from None
    print(f"Pushed to {url}\n")


def published(folder: Path) -> list[str]:
    """What is pushed of an exported folder, as patterns: the pipeline's components and its own code as
    `model_index.json` names them, or the weights of a single model, and what goes with them."""
    index_file = folder / "model_index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        code = index["_class_name"]
        weights = ["model_index.json"] + ([f"{code[0]}.py"] if isinstance(code, list) else [])
        components = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
        weights += [f"{name}/*" for name in components]
    else:
        weights = ["config.json", "diffusion_pytorch_model*", *ADAPTERS, "scheduler/*"]
    return [pattern for pattern in (*weights, *BESIDE_WEIGHTS) if any(folder.glob(pattern))]


def upload_command(folder: Path, repo_id: str, private: bool) -> list[str]:
    """The words of the standard command that does what [`push`] does."""
    words = ["hf", "upload", repo_id, str(folder), "."] + (["--private"] if private else [])
    return words + [f"--include={pattern}" for pattern in published(folder)]


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="noisycond", library_version=__version__)


def _find_token() -> str | None:
    try:
        return get_token()
    except Exception as error:  # an exchange or a refresh of a token that failed
        raise InputError(f"--push_to_hub: no token could be had ({type(error).__name__}).") from None


def _ask(question: Callable[[], AnswerT], token: str) -> AnswerT | None:
    """The Hub's answer, or None and a warning where it cannot be reached."""
    try:
        return question()
    except Exception as error:  # the types of the network's errors differ between versions of the client
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        require(
            status not in (401, 403),
            f"--push_to_hub: the Hub rejects the token ({status}): make one that can write at {TOKENS}, then run "
            "`hf auth login` or set HF_TOKEN, which wins where both are there.",
        )
        logger.warning("--push_to_hub: the Hub cannot be reached now: %s. The push comes later.", _cause(error, token))
    return None


def _is_public(api: HfApi, repo_id: str) -> bool:
    try:
        return not api.model_info(repo_id).private
    except RepositoryNotFoundError:
        return False


def _public_sentence(repo_id: str) -> str:
    return (
        f"--hub_private_repo: {repo_id} is on the Hub already, as a public repository; make it private in its "
        "settings there, or name another with --hub_model_id."
    )


def _cause(error: BaseException, token: str | None) -> str:
    """One line on an error, without the token and without the signatures in the addresses of uploads."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …" from the reason
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")
    if token:
        text = text.replace(token, "[token]")
    text = re.sub(r"(https?://[^\s?]+)\?[^\s'\"]*", r"\1", text)
    return text if isinstance(error, InputError) else f"{type(error).__name__} ({text})"

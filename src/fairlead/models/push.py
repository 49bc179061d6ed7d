"""Puts a folder on the hub, only when asked to. Knows no merge and no run; reads nothing but names."""

from __future__ import annotations

import json
from pathlib import Path

from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.models.load import resolve_folder


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model, or `model/` of a run, to the hub's repository, made if need be; returns its address.

    Raises ModelError for what nobody could load there, RunError where the hub does not take it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    path = resolve_folder(str(folder))
    if path is None:
        raise ModelError(f"{folder} does not exist", hint="give a folder saved by `fairlead merge`, or a finished run")
    _refuse_local_base(path)
    if get_token() is None:
        raise RunError(f"{path} was not pushed: there is no token", hint="hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Upload by fairlead")
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name of a repository: {error}", hint="owner/name was meant") from error
    except OfflineModeIsEnabled as error:
        raise RunError(f"{path} was not pushed: HF_HUB_OFFLINE is set", hint="unset it and push again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "check the token: hf auth login, or HF_TOKEN" if status in (401, 403) else "push again"
        raise RunError(f"{path} was not pushed: the hub answers {status} for {repo_id}", hint=hint) from error
    except Exception as error:  # of an HTTP library that changes from one version of the client to the next
        raise RunError(f"{path} was not pushed: the hub is out of reach ({error})", hint="check the network") from error
    return f"{api.endpoint}/{repo_id}"


def _refuse_local_base(path: Path) -> None:
    settings = path / "adapter_config.json"
    if settings.is_file():
        base = json.loads(settings.read_text("utf-8")).get("base_model_name_or_path")
        if not base or Path(base).exists():
            raise ModelError(
                f"{path} is an adapter whose base, {base or 'without a name'}, is on this machine alone",
                hint="push the result of `fairlead merge`",
            )

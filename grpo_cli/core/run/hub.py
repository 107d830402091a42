"""Upload a folder to a model hub with huggingface_hub. Nothing else in the package uploads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from grpo_cli.core.errors import CountdownError


def push(folder: Path, repository: str) -> str:
    """Create the model repository `owner/name` if it does not exist, upload `folder`, and return its address.

    Raises CountdownError for an invalid name, without a login, and if the hub refuses or is out of reach.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a model trained by countdown")
    except HFValidationError as error:
        raise CountdownError(f"`{repository}` cannot name a repository", "use `owner/name`") from error
    except LocalTokenNotFoundError as error:
        raise CountdownError("no login for the hub", "run `hf auth login` first", exit_code=1) from error
    except Exception as error:  # the HTTP client's errors have no base that huggingface_hub exports
        reason = str(error).strip().partition("\n")[0]
        hint = f"the folder `{folder}` is complete; try again with `--push {repository} --overwrite`"
        raise CountdownError(f"cannot push to `{repository}`: {reason}", hint, exit_code=1) from error
    return address

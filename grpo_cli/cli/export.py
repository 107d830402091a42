"""`countdown export`: write a run's best model and model card to a folder, or upload them to a model hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grpo_cli.cli.artifacts import card_of, example_messages
from grpo_cli.cli.models import warn_of_bug
from grpo_cli.cli.options import ConfigFile, Overwrite, completion, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text

if TYPE_CHECKING:
    from grpo_cli.core.run.folder import Run

SETTINGS = ("runs",)
Matrices = Literal["q8_0", "f16", "f32"]


def export(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="RUN", help="run whose best model to export", autocompletion=completion("run"))
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="merge a LoRA adapter into its base model")] = False,
    gguf: Annotated[
        Matrices | None,
        typer.Option(help="add a GGUF file with matrices of this type, and a Modelfile"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="upload the folder to this repository of the hub", metavar="<owner/name>")
    ] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write a run's best model and its model card to a folder in Hugging Face format.

    Nothing is uploaded without --push. Example: countdown export first shared/first
    """
    from grpo_cli.core.model.load import check_weights
    from grpo_cli.core.model.names import HUB_ID
    from grpo_cli.core.run import export as files
    from grpo_cli.core.run.folder import Run
    from grpo_cli.core.run.models import model_source

    root = Path(resolve(ctx, config).settings.runs)
    run = Run.open(root, name)
    model_source(root, run.name)
    run.read_origin()
    files.check_destination(folder, overwrite=overwrite)
    if push is not None and not HUB_ID.fullmatch(push):
        raise CountdownError(f"`{push}` cannot name a repository", "use `owner/name`")
    is_adapter = _writes_adapter(run, merge=merge, gguf=gguf is not None)

    warn_of_bug(run)
    source = run.adapter_path if is_adapter else run.model_path
    check_weights(source)
    with files.exporting(source, folder, card_of(run, is_adapter=is_adapter)) as staged:
        if not is_adapter:
            files.limit_completions(staged, run.settings.eval.max_new_tokens)
        if gguf:
            _add_gguf(run, gguf, staged)
    print(*sorted(path for path in folder.iterdir() if path.is_file()), sep="\n")
    if push is not None:
        from grpo_cli.core.run.hub import push as upload  # imports huggingface_hub; the only network access

        text.note(f"pushed to {upload(folder, push)}")


def _add_gguf(run: Run, kind: Matrices, folder: Path) -> None:
    """Write a GGUF file and its Modelfile beside an exported model."""
    from grpo_cli.core.model.gguf_write import write  # loads torch
    from grpo_cli.core.model.modelfile import modelfile

    file = f"{run.name}-{kind}.gguf"
    write(folder, folder / file, kind=kind)
    (folder / "Modelfile").write_text(modelfile(folder, file, example_messages(run)), "utf-8")


def _writes_adapter(run: Run, *, merge: bool, gguf: bool) -> bool:
    """Whether the run's adapter is written, not a whole model; raises CountdownError for options that do not fit it."""
    has_adapter = run.adapter_path.is_dir()
    if merge and not has_adapter:
        raise CountdownError(f"run `{run.name}` has no adapter to merge", "leave out `--merge`")
    if gguf and has_adapter and not merge:
        raise CountdownError("a GGUF file holds a whole model, not an adapter", "add `--merge`")
    if gguf and find_spec("gguf") is None:
        raise CountdownError("`--gguf` needs the extra `gguf`", "pip install 'countdown-grpo[gguf]'")
    return has_adapter and not merge

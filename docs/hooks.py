"""MkDocs hooks: README.md is the home page, and links to files outside docs/ become plain text."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    readme = Path(config.config_file_path).with_name("README.md").read_text("utf-8")
    text = re.sub(r"\[([^\]]+)\]\((?!docs/|https?:)[^)]+\)", r"\1", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    inside = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", inside)

"""Hooks of mkdocs: pages from the root's Markdown files and from the code, and links to files of the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import TABLES, command_page, command_uris

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
"""Files outside docs/ that are pages of the site, and the name of each page."""
SOURCES = {page: source for source, page in PAGES.items()}
TABLE = re.compile(r"<!-- table: (\w+) -->")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text lies outside docs/, and one with the flags of each command."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, page in command_uris().items():
        files.append(File.generated(config, page, content=command_page(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables in place of their marks, and rewrite relative links: to the page of the target, or to the repository.

    A link to a file that does not exist stays as it is, and mkdocs reports it.
    """
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        anchor = match[2] or ""
        uri = PAGES.get(target, target.removeprefix("docs/"))
        if (target in PAGES or target.startswith("docs/")) and files.get_file_from_path(uri):
            return posixpath.relpath(uri, posixpath.dirname(here) or ".") + anchor
        if not (ROOT / target).exists():
            return match[0]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target}{anchor}"

    return LINK.sub(rewritten, TABLE.sub(lambda mark: TABLES[mark[1]](), markdown))

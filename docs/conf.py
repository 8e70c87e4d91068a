"""Settings of the documentation: `make docs` builds it in docs/_build."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import net2net

ROOT = Path(__file__).resolve().parents[1]

project = "net2net"
author = "The net2net authors"
release = net2net.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"net2net {release}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


def resolve_links(_app: Sphinx, page: str, text: list[str]) -> None:
    """Show results/README.md as the page `results`; turn links to other files outside this folder into plain text."""
    if page == "results":
        whole = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
        figures = re.sub(r"!\[([^\]]*)\]\((figures/[^)]*)\)", r"![\1](../results/\2)", whole)
        text[0] = re.sub(r"(?<!!)\[([^\[\]]*)\]\((?!http|#)[^)]*\)", r"\1", figures)
    inside = text[0].replace("(../results/README.md", "(results.md")
    text[0] = re.sub(r"(?<!!)\[([^\[\]]*)\]\(\.\./[^)]*\)", r"\1", inside)


def keep_bars(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Keep |x| in docstrings as it is: absolute values, no substitutions."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Register the hooks above."""
    app.connect("source-read", resolve_links)
    app.connect("autodoc-process-docstring", keep_bars)

"""Configuration of the documentation: `make docs` builds it into build/docs, without a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS / "_ext"), str(ROOT), str(ROOT / "python")]
# Docs are built and their examples run beside other work: threads that spin would starve it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import xlayer_ext  # noqa: E402  (the path above leads to it)

project = "xlayer-ext"
author = "The xlayer-ext authors"
project_copyright = "The xlayer-ext authors, Apache-2.0"
version = release = xlayer_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",  # MathJax and its fonts from the package, not from a CDN
    "public_api",
    "source_pages",
]
exclude_patterns = ["_ext"]
language = "en"
napoleon_use_ivar = True
nitpicky = False  # annotations name types of torch and transformers, whose inventories are not here by default

# Cross-references into other projects need their inventories, which are fetched: only where that is asked for.
if os.environ.get("XLAYER_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
    }

# ---- Markdown and docstrings ---------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
default_role = "py:obj"  # single backticks in docstrings: a link where the name is documented, else code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Papers"]
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

doctest_global_setup = """
import torch
from xlayer_ext import backend, functional, nn
torch.manual_seed(0)
"""

# ---- appearance ----------------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "xlayer-ext"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 8,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""Settings of Sphinx for the site; docs/build.py writes the pages that it reads.

Nothing on a page is loaded from another host: MathJax lies in _static/vendor, and the
theme brings its own fonts.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import docstrings  # noqa: E402
from places import REPOSITORY  # noqa: E402

project = "kdlib"
author = "The kdlib authors"
copyright = f"{author}. Apache-2.0"
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc"]
# Each page is read by the parser of its kind.
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# Notebooks show the outputs that were committed with them; nothing is run.
nb_execution_mode = "off"
# An explorer is shown as its picture: no kernel answers a slider here.
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None)
]
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written
autodoc_inherit_docstrings = False  # those of torch are another project's
# The kernel's room is read on systems for which there is no Triton as well.
autodoc_mock_imports = [
    name for name in ("triton",) if importlib.util.find_spec(name) is None
]
python_maximum_signature_line_length = 72

html_theme = "sphinx_book_theme"
html_title = "Knowledge distillation for language models"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["site.css"]
html_show_sphinx = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "use_repository_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    # The rooms are listed on their own pages alone, and no page's sections: every page
    # carries this list.
    "collapse_navbar": True,
    "max_navbar_depth": 2,
    "navbar_persistent": [],  # the sidebar has the search already
    "show_toc_level": 2,
}

mathjax_path = "vendor/mathjax/tex-svg.js"
# The menu's other renderers would be fetched from where MathJax came.
mathjax3_config = {"options": {"enableMenu": False}}


def setup(app):
    # Pages are read again when the way they are read has changed.
    app.add_config_value("docstrings_are_read", docstrings.VERSION, "env")
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("autodoc-skip-member", docstrings.skip)
    app.connect("doctree-read", docstrings.link_types)

"""Sphinx settings: `make docs` builds build/docs from the Markdown pages and the docstrings."""

import torch_ademamix

project = "torch-ademamix"
version = release = torch_ademamix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_copyright = False

# `name` in the docstrings is a piece of code. What :func:`name` and its like refer to must exist, but for other
# projects' names, whose inventories would have to be downloaded.
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|collections)\..*")]

napoleon_use_param = False  # types of arguments are text such as "float or None, None", not references
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

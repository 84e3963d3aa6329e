"""Sphinx settings: `make docs` builds build/docs from the Markdown pages and the docstrings."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import torch_ademamix

project = "torch-ademamix"
version = release = torch_ademamix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"  # registered below; browsers need nothing for it, and no network

# `name` in the docstrings is a piece of code. What :func:`name` and its like refer to must exist, but for other
# projects' names, whose inventories would have to be downloaded.
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!torch_ademamix).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3


def _mathml(self, node: nodes.Element, block: bool) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _mathml(self, node, block=False), None),
        block_renderers=(lambda self, node: _mathml(self, node, block=True), None),
    )

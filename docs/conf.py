"""Sphinx configuration."""

from sb3_mfpo import __version__

project = "sb3-mfpo"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
# Links to headings, as on GitHub
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
# The docstrings of SB3's base classes refer to pages of SB3's own manual
suppress_warnings = ["ref.ref"]

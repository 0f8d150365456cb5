"""Pages from templates: one self-contained file, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tokenization.files import write_text


def render_page(path: Path | str, template: str, **shown: Any) -> None:
    """Write a page of one of the templates beside this file. Raises InputError if it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": lambda share, digits=1: f"{100 * share:.{digits}f}", "median": np.median}
    write_text(path, environment.get_template(template).render(shown))

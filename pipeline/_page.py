"""Pages for people: one HTML file that needs nothing beside it, loads nothing and runs nothing."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

WIDEST = 1400  # pixels of a picture: more would make a large file and show no more


def render(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A page from a template beside this file.

    Args:
        template: Its name.
        filters: Beside `number` and `setting`.
        values: What the template is filled with.

    Raises:
        jinja2.UndefinedError: If a value that the template names is not there.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "setting": setting, **filters}
    return environment.get_template(template).render(**values)


def svg(figure: Figure) -> str:
    """A figure as a data URI, without the date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def shown(image: Image.Image) -> str:
    """A picture as a data URI, scaled down if it is very large."""
    image.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    image.save(file, format="png")
    return data_uri(file.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """Content of a MIME type, to be put into the page itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float, digits: int = 4) -> str:
    """A measured number for people: 9,841 or 52.10 or 0.001234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def setting(value: Any) -> str:
    """A value as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value)

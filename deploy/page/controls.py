"""What fills a field in, in Gradio. The server judges what it gets, in its own words."""

from __future__ import annotations

from typing import Any

import gradio as gr

from deploy.page.fields import Field

FEW_NUMBERS, FEW_CHOICES = 8, 16  # are buttons


def component(field: Field, info: str | None = None, placeholder: str | None = None) -> Any:
    """The control for a field; info stands above it, placeholder in it."""
    common = {
        "label": field.label,
        "info": info,
        "elem_id": f"input-{field.name}",
    }
    match field.kind:
        case "toggle":
            return gr.Checkbox(value=bool(field.default), **common)
        case "choice" if len(field.choices) <= FEW_CHOICES:
            classes = ["ratios"] if field.name == "aspect_ratio" else []
            choices = list(field.choices)
            return gr.Radio(choices, value=field.default, elem_classes=classes, **common)
        case "choice":
            return gr.Dropdown(list(field.choices), value=field.default, **common)
        case "integer" | "number":
            return number(field, common, placeholder)
        case "picture":
            return gr.Image(
                type="filepath",
                image_mode=None,  # as it was uploaded
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                label=common["label"],
                elem_id=common["elem_id"],
                placeholder=info,
            )
        case "secret":
            quiet = gr.InputHTMLAttributes(autocomplete="new-password", spellcheck=False)
            return gr.Textbox(type="password", html_attributes=quiet, **common)
        case _:
            is_long = (field.max_length or 0) > 1000 and field.name.endswith("prompt")
            return gr.Textbox(
                value=field.default,
                lines=3 if field.name == "prompt" else 1,
                max_lines=8 if is_long else 1,
                placeholder="What the picture shows" if field.name == "prompt" else None,
                autofocus=field.name == "prompt",
                **common,
            )


def number(field: Field, common: dict[str, Any], placeholder: str | None) -> Any:
    """Buttons for a few whole numbers, a slider between two bounds, else a box."""
    low, high, default = field.minimum, field.maximum, field.default
    if default is not None and low is not None and high is not None:
        if field.kind == "integer" and high - low < FEW_NUMBERS:
            return gr.Radio(list(range(int(low), int(high) + 1)), value=default, **common)
        step = 1 if field.kind == "integer" else 0.1 if high - low > 5 else 0.05
        return gr.Slider(low, high, value=default, step=step, **common)
    # Gradio's own box takes an empty one for 0, which is a number, and a seed.
    return gr.Textbox(
        value=None if default is None else str(default),
        placeholder=placeholder or "left out",
        elem_classes=["number"],
        max_lines=1,
        **common,
    )

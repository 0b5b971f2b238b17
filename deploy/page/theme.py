"""How the page looks: colours and type for Gradio, and the style sheet beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")
# Gradio brings it along, so that nothing is fetched from elsewhere. Its 600 lacks most letters.
SANS = (gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif")
# The longer side of the little frame beside an aspect ratio.
_FRAME_EM = 1.05


def theme() -> gr.themes.Base:
    """Warm greys and one rust-red accent."""
    made = gr.themes.Base(
        primary_hue="orange",
        secondary_hue="stone",
        neutral_hue="stone",
        radius_size="lg",
        font=SANS,
        font_mono=("ui-monospace", "monospace"),
    )
    return made.set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171412",
        block_background_fill="#ffffff",
        block_background_fill_dark="#211d1a",
        block_border_color="#e9e5e0",
        block_border_color_dark="#35302b",
        block_label_text_color="*neutral_600",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_shadow="none",
        input_background_fill="#faf9f7",
        input_background_fill_dark="#171412",
        input_border_color="#ddd8d1",
        input_border_color_dark="#403a34",
        input_border_color_focus="#c2410c",
        input_border_color_focus_dark="#fb923c",
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_dark="#fb923c",
        button_primary_background_fill_hover_dark="#fdba74",
        button_primary_border_color="#c2410c",
        button_primary_border_color_hover="#9a3412",
        button_primary_border_color_hover_dark="#fdba74",
        button_primary_border_color_dark="#fb923c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#1c1917",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f3efea",
        button_secondary_background_fill_dark="#211d1a",
        button_secondary_background_fill_hover_dark="#2e2925",
        button_secondary_border_color="#ddd8d1",
        button_secondary_border_color_dark="#403a34",
        button_small_text_weight="500",
        button_border_width="1px",
        checkbox_label_background_fill="#ffffff",
        checkbox_label_background_fill_hover="#f3efea",
        checkbox_label_background_fill_dark="#211d1a",
        checkbox_label_background_fill_hover_dark="#2e2925",
        checkbox_label_border_color="#ddd8d1",
        checkbox_label_border_color_dark="#403a34",
        checkbox_label_border_width="1px",
        checkbox_label_border_width_dark="1px",
        slider_color="#c2410c",
        slider_color_dark="#fb923c",
        checkbox_background_color_selected="#c2410c",
        checkbox_background_color_selected_dark="#fb923c",
    )


def css(ratios: Sequence[str]) -> str:
    """The style sheet, and a frame of its own shape for each aspect ratio."""
    return STYLE.read_text(encoding="utf-8") + "".join(
        _frame(place, ratio) for place, ratio in enumerate(ratios, 1)
    )


def _frame(place: int, ratio: str) -> str:
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", ratio)
    if match is None:
        return ""
    width, height = (int(side) / max(map(int, match.groups())) for side in match.groups())
    return (
        f".ratios label:nth-of-type({place})::before {{ content: ''; "
        f"width: {width * _FRAME_EM:.2f}em; height: {height * _FRAME_EM:.2f}em; }}\n"
    )

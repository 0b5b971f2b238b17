"""The page in Gradio: which part lies where, and what happens on a click."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from fastapi import FastAPI

from deploy.page import models, telling
from deploy.page.answers import Answer
from deploy.page.controls import component
from deploy.page.fields import Field, fields_of, form_values, inputs_of
from deploy.page.guard import Guard
from deploy.page.history import Run, Session
from deploy.page.server import Health, Server, ServerError
from deploy.page.theme import css, theme

# In front, in this order; every other input of the server is folded away.
IN_FRONT = ("prompt", "aspect_ratio", "num_outputs", "seed")
MOST_AT_ONCE = 64  # visitors' requests; the server has its own bound
# On a phone the pictures are below the form, and the keyboard for numbers is another.
SCROLL = """(...inputs) => {
  if (matchMedia("(max-width: 800px)").matches)
    document.querySelector("%s").scrollIntoView({behavior: "smooth"});
  return inputs;
}"""
NUMBER_KEYS = """() => document.querySelectorAll(".number input, .number textarea").forEach(
  (box) => box.setAttribute("inputmode", "decimal"))"""
Updates = dict[Any, Any]


def make_app(server: Server, health: Health, openapi: dict[str, Any], folder: Path) -> Guard:
    """The page as an ASGI app; the visitors' files go into folder."""
    # What lies here leaves byte for byte, and is not copied first.
    gr.set_static_paths([str(folder)])
    page = Page(server, health, *fields_of(openapi), folder)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.blocks,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=css(next((f.choices for f in page.fields if f.name == "aspect_ratio"), ())),
    )
    return Guard(app)


class Page:
    """The parts of the page, and what they do.

    Args:
        server: that draws.
        health: its, once set up.
        fields: its inputs.
        others: the names of inputs that have no field.
        folder: for the visitors' files.
    """

    def __init__(
        self,
        server: Server,
        health: Health,
        fields: Sequence[Field],
        others: Sequence[str],
        folder: Path,
    ) -> None:
        self.server, self.folder = server, folder
        by_name = {field.name: field for field in fields}
        front = [by_name[name] for name in IN_FRONT if name in by_name]
        self.fields = [*front, *(field for field in fields if field.name not in IN_FRONT)]
        self.model, self.others = health.model, others
        self.words = models.known_words(health.model)
        self.parts: dict[str, Any] = {}
        with gr.Blocks(title="DMD2", analytics_enabled=False, fill_width=True) as self.blocks:
            self.session = gr.State(delete_callback=lambda session: session and session.close())
            self.head = gr.HTML(telling.header(health), elem_id="head")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=300, elem_id="form"):
                    self._lay_form()
                with gr.Column(scale=7, min_width=300, elem_id="result"):
                    self._lay_result()
            self._connect()

    def _lay_form(self) -> None:
        for field in self.fields:
            if field.name in IN_FRONT:
                self._lay_in_front(field)
        with gr.Row(elem_id="go"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
        self.notice = gr.HTML(elem_id="notice")  # where one has just clicked
        if rest := [field for field in self.fields if field.name not in IN_FRONT]:
            with gr.Accordion("More", open=False, elem_id="more"):
                for field in rest:
                    self.parts[field.name] = component(field, info=field.hint)
        classified = "disable_safety_checker" in {field.name for field in self.fields}
        with gr.Accordion("What this model knows", open=False, elem_id="knows"):
            gr.HTML(telling.knowledge(self.words, self.others, may_be_classified=classified))

    def _lay_in_front(self, field: Field) -> None:
        if field.name == "seed":
            with gr.Row(elem_id="seed-row"):
                self.parts["seed"] = component(field, placeholder="a new one each time")
                small: dict[str, Any] = {"size": "sm", "min_width": 0, "scale": 0}
                self.die = gr.Button("New each time", elem_id="die", **small)
                self.last_seed = gr.Button("Use again", elem_id="last-seed", **small)
            return
        self.parts[field.name] = component(field)
        if field.name == "prompt":
            self.remark = gr.HTML(elem_id="remark")
            gr.Examples(
                [[prompt] for prompt in models.examples_for(self.model)],
                self.parts["prompt"],
                label="For example",
                elem_id="examples",
                api_visibility="private",
            )

    def _lay_result(self) -> None:
        self.empty = gr.HTML(telling.nothing_yet(), elem_id="empty")
        self.pictures = gr.Gallery(
            visible=False,
            show_label=False,
            elem_id="pictures",
            interactive=False,
            preview=True,
            object_fit="contain",
            height="auto",
            columns=2,
            buttons=["download", "fullscreen"],
        )
        self.details = gr.HTML(elem_id="details")
        with gr.Row(visible=False, elem_id="again") as self.again:
            self.seed_again = gr.Button(
                "Use this seed again",
                size="sm",
                elem_id="seed-again",
                visible="seed" in self.parts,
            )
            self.all_again = gr.Button("Use all its inputs again", size="sm", elem_id="all-again")
        with gr.Column(visible=False, elem_id="history-box") as self.history_box:
            gr.HTML("<h2>This session</h2>")
            self.history = gr.Gallery(
                show_label=False,
                elem_id="history",
                interactive=False,
                allow_preview=False,
                object_fit="cover",
                height="auto",
                columns=6,
                fit_columns=False,
                buttons=[],
            )

    def _connect(self) -> None:
        form, prompt = list(self.parts.values()), self.parts.get("prompt")
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        shown = [self.notice, self.empty, self.pictures, self.details, self.again]
        past = [self.history, self.history_box]
        gr.on(
            [self.generate.click, *([prompt.submit] if prompt else [])],
            self.on_generate,
            [self.session, *form],
            [self.session, self.head, self.generate, self.cancel, *shown, *past],
            api_name="generate",
            show_progress="hidden",
            concurrency_limit=MOST_AT_ONCE,
            trigger_mode="once",
            js=SCROLL % "#go",
        )
        self.cancel.click(
            self.on_cancel,
            self.session,
            self.notice,
            api_name="cancel",
            show_progress="hidden",
            concurrency_limit=MOST_AT_ONCE,
        )
        self.pictures.select(self.on_choose, self.session, [self.session, self.details], **quiet)
        self.history.select(self.on_recall, self.session, [self.session, *shown], **quiet)
        up = SCROLL % "#head"
        self.all_again.click(self.on_all_again, self.session, form, js=up, **quiet)
        if seed := self.parts.get("seed"):
            self.die.click(lambda: None, None, seed, **quiet)
            self.last_seed.click(self.on_seed_again, self.session, seed, **quiet)
            self.seed_again.click(self.on_seed_again, self.session, seed, js=up, **quiet)
        if prompt and self.words:
            prompt.change(self.on_prompt, prompt, self.remark, trigger_mode="always_last", **quiet)
        self.blocks.load(self.on_load, None, self.head, js=NUMBER_KEYS, **quiet)

    async def on_load(self) -> str:
        """How the server is, for a page that was just opened."""
        try:
            health = await self.server.health()
            return telling.header(replace(health, model=health.model or self.model))
        except ServerError:
            return telling.header(None)

    def on_prompt(self, prompt: str) -> str:
        """What is to say of the words while they are typed."""
        remark = models.remark_on(prompt, self.words)
        return telling.notice("warn", remark) if remark else ""

    async def on_generate(self, session: Session | None, *form: Any) -> AsyncIterator[Updates]:
        """One request, from the click to its pictures or its error."""
        session = session or Session(self.folder)
        values = dict(zip(self.parts, form, strict=True))
        inputs = inputs_of(self.fields, values)
        prediction_id = session.wanted = uuid4().hex
        yield {self.session: session, **self._while_at_work(is_at_work=True)}
        try:
            async for event in self.server.predict(
                prediction_id, inputs, lambda: session.wanted == prediction_id
            ):
                if isinstance(event, Answer):
                    yield await self._end(session, values, event)
                elif session.wanted == prediction_id:
                    yield {self.notice: telling.under_way(event)}
        finally:
            if session.wanted == prediction_id:
                session.wanted = None

    async def _end(self, session: Session, values: dict[str, Any], answer: Answer) -> Updates:
        self.model = answer.metrics.get("model") or self.model
        updates = {
            self.session: session,
            self.head: await self.on_load(),
            **self._while_at_work(is_at_work=False),
        }
        if answer.pictures:
            run = session.add(form_values(self.fields, values), answer)
            past = [str(run.pictures[index].path) for run, index in session.pictures]
            updates |= self._show(run, 0)
            updates |= {self.history: past, self.history_box: gr.update(visible=True)}
        return updates | {self.notice: telling.outcome(answer)}

    def _while_at_work(self, *, is_at_work: bool) -> Updates:
        return {
            self.generate: gr.update(visible=not is_at_work),
            self.cancel: gr.update(visible=is_at_work),
            self.notice: telling.notice("work", "Sent") if is_at_work else "",
        }

    def _show(self, run: Run, index: int) -> Updates:
        return {
            self.notice: telling.outcome(run.answer),
            self.empty: gr.update(visible=False),
            self.pictures: gr.Gallery(
                [str(picture.path) for picture in run.pictures], selected_index=index, visible=True
            ),
            self.details: telling.details(run, run.pictures[index]),
            self.again: gr.update(visible=True),
        }

    async def on_cancel(self, session: Session | None) -> str:
        """Cancel what this visitor has under way."""
        if session is None or session.wanted is None:
            return telling.notice("info", "Nothing is under way")
        prediction_id, session.wanted = session.wanted, None
        await self.server.cancel(prediction_id)
        return telling.notice("work", "Cancelling")

    def on_choose(self, session: Session | None, event: gr.SelectData) -> Updates:
        """Another of the pictures on show."""
        if session is None or session.shown is None:
            return {self.session: session}
        run, _ = session.shown
        session.shown = (run, event.index)
        return {
            self.session: session,
            self.details: telling.details(run, run.pictures[event.index]),
        }

    def on_recall(self, session: Session | None, event: gr.SelectData) -> Updates:
        """A picture of the session's history, with those that came with it."""
        if session is None:
            return {self.session: session}
        run, index = session.shown = session.pictures[event.index]
        return {self.session: session, **self._show(run, index)}

    def on_seed_again(self, session: Session | None) -> Any:
        """The chosen picture's seed, for the form."""
        chosen = session and session.chosen
        return chosen.seed if chosen else gr.skip()

    def on_all_again(self, session: Session | None) -> list[Any]:
        """The chosen picture's inputs, for the form; secrets stay as they are."""
        if session is None or session.shown is None or session.chosen is None:
            return [gr.skip()] * len(self.parts)
        again = session.shown[0].values_of(session.chosen)
        return [again.get(name, gr.skip()) for name in self.parts]

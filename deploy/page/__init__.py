"""The page: a form and a gallery in a browser, for a server that speaks Cog's HTTP.

`layout` and `page_cli` need Gradio, which has an environment of its own (.venv-page); the others
are plain Python with httpx. Nothing here imports the engine, and nothing imports this.
"""

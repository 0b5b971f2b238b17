"""The page as people and programs use it: in Chromium, and by Gradio's client."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from page.fake_server import PNG, FakeServer, data_url, fake_server, schema, succeeded
from page.pages import ShownPage, Visit, chromium_running, shown
from PIL import Image
from servers import assert_alike, images_of

from dmd2.settings import ROOT

pytestmark = pytest.mark.browser
# Still a PNG, and not what any program would write anew.
ODD_PNG = PNG + b"and the server's own last words"
Visiting = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium_running() as browser:
        yield browser


@pytest.fixture(scope="module")
def demo() -> Iterator[ShownPage]:
    """A page that started its own server."""
    with shown(DMD2_TUNE="off", DMD2_MAX_BATCH="4") as page:
        yield page


@pytest.fixture(scope="module")
def fake_world() -> Iterator[tuple[FakeServer, ShownPage]]:
    """A page of a server that does as it is told, and wants a token."""
    with fake_server() as fake:
        fake.openapi = schema(
            prompt={"type": "string", "x-order": 0},
            image={"type": "string", "format": "uri", "description": "to start from"},
        )
        with shown("--url", fake.url, DMD2_API_TOKEN="a-token-of-the-operator") as page:
            yield fake, page


@pytest.fixture
def fake(fake_world: tuple[FakeServer, ShownPage]) -> FakeServer:
    fake, _ = fake_world
    fake.answers = [succeeded(data_url(ODD_PNG), seeds=[7])]
    fake.requests.clear()
    fake.cancelled.clear()
    fake.left.clear()
    return fake


@pytest.fixture
def visit(browser: Any) -> Iterator[Visiting]:
    """Tabs; at the end none of them asked any other host, and no script of them failed."""
    visits: list[Visit] = []

    def go(url: str, **more: Any) -> Visit:
        visits.append(Visit(browser, url, **more))
        return visits[-1]

    yield go
    for visited in visits:
        assert visited.requests
        hosts = {urlsplit(url).hostname for url in visited.requests if url.startswith("http")}
        assert hosts == {"127.0.0.1"}
        assert visited.complaints == []
        visited.context.close()


def test_type_choose_click_see_save_and_use_the_seed_again(
    demo: ShownPage, visit: Visiting, tmp_path: Path
) -> None:
    visitor = visit(demo.url)
    assert "demo" in visitor.text("#head .health")
    visitor.tab.locator("#examples").get_by_text("a rocket in space").click()
    visitor.becomes("prompt", "a rocket in space")
    visitor.fill("prompt", "a red circle")
    visitor.choose("aspect_ratio", "3:2")
    visitor.choose("num_outputs", "2")
    visitor.generate()
    width, height = visitor.fact("size").split("x")
    assert int(width) > int(height)
    assert "sample" in visitor.text("#details .stages")
    assert visitor.tab.locator("#pictures .thumbnail-small").count() == 2

    seed = int(visitor.fact("seed"))
    first = visitor.save(tmp_path)
    assert first.name == f"a-red-circle_seed-{seed}.png"
    inputs = {"prompt": "a red circle", "aspect_ratio": "3:2", "num_outputs": 2, "seed": seed}
    answer = httpx.post(f"{demo.server}/predictions", json={"input": inputs}, timeout=60)
    assert_alike([first.read_bytes()], images_of(answer.json())[:1])
    with Image.open(first) as image:
        assert f"Seed: {seed}" in image.info["parameters"]

    visitor.tab.locator("#pictures .thumbnail-small").nth(1).click()
    visitor.tab.locator(f"#details dd:text-is('{seed + 1}')").wait_for()
    visitor.tab.locator("#seed-again").click()
    visitor.becomes("seed", str(seed + 1))
    second = visitor.save(tmp_path)
    visitor.choose("num_outputs", "1")
    visitor.generate()
    assert visitor.fact("seed") == str(seed + 1)
    assert_alike([visitor.save(tmp_path).read_bytes()], [second.read_bytes()])

    visitor.tab.locator("#die").click()
    visitor.becomes("seed", "")
    visitor.generate()
    assert visitor.fact("seed") != str(seed + 1)


def test_a_picture_of_the_session_gives_its_inputs_again(demo: ShownPage, visit: Visiting) -> None:
    visitor = visit(demo.url)
    visitor.fill("prompt", "a red circle")
    visitor.choose("num_outputs", "2")
    visitor.fill("seed", "0")
    visitor.generate()
    visitor.fill("prompt", "a large yellow star")
    visitor.choose("num_outputs", "1")
    visitor.choose("aspect_ratio", "16:9")
    visitor.fill("seed", "9")
    visitor.generate()
    assert visitor.tab.locator("#history .thumbnail-lg").count() == 3
    visitor.tab.locator("#history .thumbnail-lg").nth(2).click()  # the newest comes first
    visitor.tab.locator("#details .prompt:text-is('a red circle')").wait_for()
    assert visitor.fact("seed") == "1"
    visitor.tab.locator("#all-again").click()
    visitor.tab.locator("#input-aspect_ratio label.selected:has-text('1:1')").wait_for()
    assert visitor.value("prompt") == "a red circle"
    assert visitor.value("seed") == "1"
    assert visitor.chosen("num_outputs") == "1"


def test_an_error_is_the_servers_and_what_was_made_stays(demo: ShownPage, visit: Visiting) -> None:
    visitor = visit(demo.url)
    visitor.fill("prompt", "a blue heart")
    visitor.generate()
    visitor.tab.locator("#more > button").click()
    visitor.fill("width", "100")
    visitor.fill("height", "64")
    visitor.fill("hf_api_token", "hf_mine")
    assert visitor.tab.locator("#input-hf_api_token input").get_attribute("type") == "password"
    visitor.fail("width: 100 is not allowed: it must be a multiple of 8. Use 96 or 104.")
    assert visitor.text("#details .prompt") == "a blue heart"
    visitor.fill("width", "")
    visitor.fill("height", "")
    visitor.fill("seed", "seven")
    visitor.fail('seed: "seven" is not of type "integer"')
    top = visitor.tab.evaluate("document.querySelector('#notice').getBoundingClientRect().top")
    assert 0 <= top < 900, "it is where one has just clicked"


def test_a_cancelled_request_ends_and_the_next_one_works(demo: ShownPage, visit: Visiting) -> None:
    visitor = visit(demo.url)
    visitor.fill("prompt", "a green ring")
    visitor.choose("num_outputs", "4")
    visitor.tab.locator("#more > button").click()
    visitor.fill("width", "1024")
    visitor.fill("height", "1024")
    visitor.tab.locator("#generate").click()
    visitor.tab.locator("#notice:has-text('At work')").wait_for()
    visitor.tab.locator("#cancel").click()
    visitor.tab.locator("#notice:has-text('Cancelled')").wait_for()
    assert visitor.tab.locator("#pictures").count() == 0, "nothing was kept"
    visitor.choose("num_outputs", "1")
    visitor.fill("width", "")
    visitor.fill("height", "")
    visitor.generate()
    assert visitor.fact("size") == "128x128"


def test_words_that_the_demo_was_not_taught_are_named(demo: ShownPage, visit: Visiting) -> None:
    visitor = visit(demo.url)
    visitor.fill("prompt", "a red zeppelin")
    visitor.tab.locator("#remark:has-text('passes over: zeppelin')").wait_for()
    visitor.tab.locator("#knows > button").click()
    assert " red " in visitor.text("#knows .words")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_a_phone(demo: ShownPage, visit: Visiting, dark: bool) -> None:
    visitor = visit(demo.url, width=360, dark=dark)
    visitor.fill("prompt", "a red circle")
    visitor.choose("num_outputs", "4")
    visitor.generate()
    visitor.tab.locator("#more > button").click()
    visitor.tab.locator("#knows > button").click()
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") <= 360
    place = "document.querySelector('%s').getBoundingClientRect().top"
    tops = [
        visitor.tab.evaluate(place % part) for part in ("#generate", "#pictures", "#more", "#knows")
    ]
    assert tops == sorted(tops), "the pictures come right after the button"
    red, green, blue = visitor.tab.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number).slice(0, 3)"
    )
    assert (red + green + blue < 150) is dark


def test_the_page_talks_to_its_own_server_alone(demo: ShownPage) -> None:
    ours = [psutil.Process(demo.process.pid), *psutil.Process(demo.process.pid).children(True)]
    connections = [each for process in ours for each in process.net_connections("inet")]
    assert connections
    assert {each.laddr.ip for each in connections} == {"127.0.0.1"}
    assert {each.raddr.ip for each in connections if each.raddr} <= {"127.0.0.1"}


def test_the_servers_own_bytes_are_saved(
    fake: FakeServer, fake_world: tuple[FakeServer, ShownPage], visit: Visiting, tmp_path: Path
) -> None:
    visitor = visit(fake_world[1].url)
    visitor.fill("prompt", "anything")
    visitor.generate()
    assert visitor.save(tmp_path).read_bytes() == ODD_PNG
    assert visitor.fact("seed") == "7"
    assert all(h["Authorization"] == "Bearer a-token-of-the-operator" for *_, h in fake.requests)
    assert "a-token-of-the-operator" not in visitor.tab.content()


def test_an_input_that_the_page_never_heard_of_takes_an_upload(
    fake: FakeServer, fake_world: tuple[FakeServer, ShownPage], visit: Visiting, tmp_path: Path
) -> None:
    (tmp_path / "mine.png").write_bytes(ODD_PNG)
    visitor = visit(fake_world[1].url)
    visitor.fill("prompt", "anything")
    visitor.tab.locator("#more > button").click()
    visitor.tab.locator("#input-image input[type=file]").set_input_files(tmp_path / "mine.png")
    visitor.tab.locator("#input-image img").wait_for()
    visitor.generate()
    (sent,) = fake.asked("PUT")
    assert sent == {"input": {"prompt": "anything", "image": data_url(ODD_PNG)}}
    visitor.tab.locator("#all-again").click()
    visitor.generate()
    assert fake.asked("PUT")[1] == sent, "its upload is one of its inputs"


def test_a_full_server_is_waited_for(
    fake: FakeServer, fake_world: tuple[FakeServer, ShownPage], visit: Visiting
) -> None:
    fake.answers = [(409, {})] * 4 + fake.answers
    visitor = visit(fake_world[1].url)
    visitor.tab.locator("#generate").click()
    visitor.tab.locator("#notice:has-text('The server is full')").wait_for()
    visitor.tab.locator("#details .details").wait_for()
    assert len(fake.asked("PUT")) == 5


def test_whoever_leaves_takes_the_request_along(
    fake: FakeServer, fake_world: tuple[FakeServer, ShownPage], visit: Visiting
) -> None:
    fake.answers = []
    visitor = visit(fake_world[1].url)
    visitor.tab.locator("#generate").click()
    visitor.tab.locator("#notice:has-text('At work')").wait_for()
    visitor.tab.close()
    assert fake.left.wait(10), "the server goes on for nobody"


def test_pages_elsewhere_are_refused(fake_world: tuple[FakeServer, ShownPage]) -> None:
    url = fake_world[1].url
    assert httpx.get(url).is_success
    assert httpx.get(url, headers={"Host": "rebound.example"}).status_code == 403
    join = f"{url}/gradio_api/queue/join"
    answer = httpx.post(join, json={}, headers={"Origin": "https://elsewhere.example"})
    assert answer.status_code == 403
    assert httpx.get(f"{url}/gradio_api/file=/etc/passwd").status_code == 403
    assert httpx.get(f"{url}/gradio_api/file={ROOT}/README.md").status_code == 403
    assert "default-src 'self'" in httpx.get(url).headers["Content-Security-Policy"]


def test_gradios_client_gets_the_servers_bytes_and_cancels(
    fake: FakeServer, fake_world: tuple[FakeServer, ShownPage], tmp_path: Path
) -> None:
    from gradio_client import Client

    client = Client(fake_world[1].url, download_files=str(tmp_path), verbose=False)
    results = client.predict("anything", None, api_name="/generate")
    (gallery,) = [each for each in results if isinstance(each, dict) and "selected_index" in each]
    (picture,) = gallery["value"]
    assert Path(picture["image"]).read_bytes() == ODD_PNG

    fake.answers = []
    job = client.submit("anything", None, api_name="/generate")
    while not fake.asked("PUT")[1:]:
        time.sleep(0.05)
    client.predict(api_name="/cancel")
    assert "Cancelled" in str(job.result(timeout=20))
    assert fake.cancelled.is_set()


def test_its_own_server_ends_with_it() -> None:
    with shown(DMD2_TUNE="off", DMD2_MAX_BATCH="1") as page:
        assert httpx.get(f"{page.server}/health-check").json()["status"] == "READY"
    assert page.process.returncode == 143
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{page.server}/health-check")


def test_the_readmes_pictures(
    demo: ShownPage, visit: Visiting, request: pytest.FixtureRequest
) -> None:
    folder = request.config.getoption("--pictures")
    if folder is None:
        pytest.skip("taken where --pictures FOLDER is given")
    for name, width, dark in (("page", 1180, False), ("page-phone", 390, True)):
        visitor = visit(demo.url, width=width, dark=dark)
        for prompt, number, seed in (
            ("a fox in the snow", "3", "7"),
            ("a rocket in space", "4", "3"),
        ):
            visitor.fill("prompt", prompt)
            visitor.choose("num_outputs", number)
            visitor.fill("seed", seed)
            visitor.generate()
        visitor.tab.wait_for_timeout(1500)
        save_small(visitor.tab.screenshot(full_page=True), Path(folder) / f"{name}.png")


def save_small(screenshot: bytes, path: Path) -> None:
    """In 256 colours: those that fill most of it, and the style sheet's own."""
    style = (ROOT / "deploy" / "page" / "style.css").read_text()
    own = b"".join(map(bytes.fromhex, dict.fromkeys(re.findall(r"#([0-9a-f]{6})\b", style))))
    with Image.open(io.BytesIO(screenshot)) as image:
        whole = image.convert("RGB")
        most = bytes(whole.quantize(256 - len(own) // 3).getpalette("RGB") or [])
        palette = Image.new("P", (1, 1))
        palette.putpalette(most[: 768 - len(own)] + own)
        whole.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= 150_000

"""Whom webhooks may be sent to, and with what secret they are signed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from gateway.gateways import run
from gateway.v1_world import World, world

from deploy.gateway.dialects.replicate_bodies import DEFAULT_EVENTS
from deploy.gateway.hooks.webhook_hosts import WebhookHosts
from deploy.gateway.hooks.webhook_secret import FILE, WebhookSecret, webhook_secret
from deploy.gateway.prediction import Webhook
from dmd2.errors import DMD2Error, InvalidRequestError


@pytest.mark.parametrize(
    ("listed", "url"),
    [
        ("hooks.test", "https://hooks.test/a?b=c%20d"),
        ("hooks.test", "https://HOOKS.test:443"),
        ("https://hooks.test", "https://hooks.test/"),
        ("hooks.test:8443", "https://hooks.test:8443/x"),
        ("http://hooks.test", "http://hooks.test/"),
        ("http://localhost:9000", "http://localhost:9000/x"),
        ("http://[::1]:9000", "http://[::1]:9000/x"),
        ("10.1.2.3", "https://10.1.2.3/x"),
    ],
)
def test_a_listed_host_may_be_told(listed: str, url: str) -> None:
    one = WebhookHosts([listed, "other.test"]).receiver(url)
    assert one.target == (url[url.index("/", 8) :] if url.count("/") > 2 else "/")
    assert one.authority.lower() in url.lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.test/",
        "https://hooks.test:8443/",
        "https://other.test/",
        "https://sub.hooks.test/",
        "https://hooks.test.evil.test/",
        "https://evil.test/hooks.test",
        "https://evil.test#hooks.test",
        "https://hooks.test@evil.test/",
        "https://u:p@hooks.test/",
        "https://u@hooks.test/",
        "https://@hooks.test/",
        "https://hooks.test./",
        "https://hooks.test\\@evil.test/",
        "https://hooks.test/\r\nX: y",
        "https://hooks.test/a b",
        "https://hooks.test/ä",
        "https://hooks.test:99999/",
        "https://hooks.test:0/",
        "https://hooks.test:x/",
        "https://[hooks.test/",
        "ftp://hooks.test/",
        "file:///etc/passwd",
        "//hooks.test/",
        "hooks.test",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest",
        "https://localhost/",
        "https://hooks.test/" + "a" * 2000,
        "",
        7,
        ["https://hooks.test/"],
    ],
)
def test_nobody_else_may_be_told(url: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        WebhookHosts(["hooks.test"]).asked({"webhook": url}, DEFAULT_EVENTS)
    assert refused.value.field == "webhook"
    assert "latest" not in str(refused.value)


def test_without_a_list_nobody_is_told() -> None:
    with pytest.raises(InvalidRequestError, match="DMD2_WEBHOOK_HOSTS"):
        WebhookHosts([]).receiver("https://hooks.test/")


@pytest.mark.parametrize(
    "entry", ["*", "*.hooks.test", "ftp://a.test", "a.test/x", "a.test:0", "u@a.test", "a b", "a?b"]
)
def test_a_list_that_is_wrong_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(DMD2Error, match="DMD2_WEBHOOK_HOSTS"):
        WebhookHosts([entry])


def test_events_are_those_asked_for_or_the_dialects_own() -> None:
    hosts, url = WebhookHosts(["hooks.test"]), "https://hooks.test/"
    asked = {"webhook": url}
    assert hosts.asked({}, DEFAULT_EVENTS) is None
    assert hosts.asked(asked, DEFAULT_EVENTS) == Webhook(url, ("output", "completed"))
    filtered = asked | {"webhook_events_filter": ["completed", "start"]}
    assert hosts.asked(filtered, DEFAULT_EVENTS) == Webhook(url, ("start", "completed"))
    for wrong in (["done"], "start", [["start"]], {"start": 1}, [None]):
        with pytest.raises(InvalidRequestError) as refused:
            hosts.asked(asked | {"webhook_events_filter": wrong}, DEFAULT_EVENTS)
        assert refused.value.field == "webhook_events_filter"


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    one = webhook_secret("", tmp_path)
    assert webhook_secret("", tmp_path) == one
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    prefix, _, key = one.text.partition("_")
    assert (prefix, len(base64.b64decode(key, validate=True))) == ("whsec", 32)
    assert one.text not in repr(one)
    given = "whsec_" + base64.b64encode(bytes(24)).decode()
    assert webhook_secret(given, tmp_path).text == given
    assert webhook_secret("", tmp_path) == one


@pytest.mark.parametrize(
    "text",
    ["", "whsec_", "whsec_AAAA", "x" * 40, "whsec_" + "!" * 40, "whsec_" + "A" * 200, "whsec_ä"],
)
def test_what_is_no_secret_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(DMD2Error, match="openssl rand") as refused:
        WebhookSecret(text)
    assert not text or text == "whsec_" or text not in str(refused.value)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DMD2Error, match=FILE):
        webhook_secret("", tmp_path)


def test_a_signature_is_the_hmac_of_id_timestamp_and_body() -> None:
    key = bytes(range(24))
    one = WebhookSecret("whsec_" + base64.b64encode(key).decode())
    headers = one.headers("msg_1", 1_700_000_000, b'{"a": 1}')
    digest = hmac.new(key, b'msg_1.1700000000.{"a": 1}', hashlib.sha256).digest()
    assert headers == {
        "webhook-id": "msg_1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


def test_who_may_not_be_told_is_refused_before_anything_is_accepted(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        for url in ("http://127.0.0.1:1/", "https://169.254.169.254/", "https://hooks.test:444/"):
            body = {"input": {"prompt": "x"}, "webhook": url}
            response = await one.post("/v1/models/a/b/predictions", body)
            assert response.status_code == 422
            assert response.json()["invalid_fields"][0]["field"] == "webhook"
        assert one.engines.asked == []

    async def whole() -> None:
        async with world(tmp_path / "j", webhook_hosts=("hooks.test",)) as one:
            await test(one)

    run(whole)

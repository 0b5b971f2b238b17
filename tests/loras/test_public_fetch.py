"""GETs from hosts that mean harm."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hostile_web import (
    DEAD,
    INSIDE,
    LIMITS,
    OUTSIDE,
    SHORT,
    HostileWeb,
    Reply,
    forever,
    has_secret,
    more_bytes,
    redirect,
    silence,
)

from dmd2.errors import LoraError
from dmd2.loras.public_fetch import PublicFetch, is_public
from dmd2.loras.wire import Limits

URL = "https://files.test/file?X-Signature=secret"
KEY = ("files.test", "/file")
TOKEN = "hf_secret"


def read(web: HostileWeb, url: str = URL, limits: Limits = LIMITS, **options: Any) -> bytes:
    options = {"max_bytes": 1_000_000, "cancelled": threading.Event(), **options}
    with web.client(limits).get(url, **options) as answer:
        return b"".join(answer.chunks())


def refusal(web: HostileWeb, url: str = URL, **options: Any) -> str:
    with pytest.raises(LoraError) as caught:
        read(web, url, **options)
    assert not has_secret(str(caught.value))
    return str(caught.value)


def test_a_body_comes_as_it_is(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(bytes(range(256)) * 10_000, headers={"ETag": '"x"'})
    assert read(web, max_bytes=2_560_000) == bytes(range(256)) * 10_000
    (seen,) = web.seen
    assert (seen.path, seen.address) == ("/file?X-Signature=secret", OUTSIDE)
    assert seen.headers["Host"] == "files.test"
    assert seen.headers["Accept-Encoding"] == "identity"
    assert "Python" not in seen.headers["User-Agent"]


def test_a_body_may_come_in_pieces_of_undeclared_length(web: HostileWeb) -> None:
    chunked = {"Transfer-Encoding": "chunked"}
    body = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    web.answers[KEY] = Reply(body, length=None, headers=chunked)
    assert read(web) == b"abcde"
    web.answers[KEY] = Reply(b"to the end", length=None)
    assert read(web) == b"to the end"
    web.answers[KEY] = Reply(b"3\r\nab", length=None, headers=chunked)
    assert "could not be read (IncompleteRead)" in refusal(web)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b:1::8.8.8.8",
        "2001:0:1::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_the_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::"],
)
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "0"])
def test_nothing_here_is_public_unless_a_client_is_told_so(web: HostileWeb, host: str) -> None:
    """With the system's own resolver."""
    client = PublicFetch(tls=web.tls, limits=LIMITS)
    with pytest.raises(LoraError, match="not at public addresses"):
        client.get(f"https://{host}/x", max_bytes=1, cancelled=threading.Event())


@pytest.mark.parametrize("addresses", [[INSIDE], [OUTSIDE, INSIDE], [OUTSIDE, "10.0.0.1"], []])
def test_one_address_inside_is_enough_to_refuse_a_host(
    web: HostileWeb, addresses: list[str]
) -> None:
    web.addresses["files.test"] = [addresses]
    assert "not at public addresses" in refusal(web)
    assert web.seen == []


def test_the_next_address_is_tried(web: HostileWeb) -> None:
    web.addresses["files.test"] = [[DEAD, OUTSIDE]]
    web.answers[KEY] = Reply(b"x")
    assert read(web) == b"x"


def test_a_redirect_inside_is_not_followed(web: HostileWeb) -> None:
    web.answers[KEY] = redirect("https://inside.test/secret?secret")
    web.answers["inside.test", "/secret"] = Reply(b"credentials")
    assert "inside.test is not at public addresses" in refusal(web)
    assert web.paths("inside.test") == []


def test_a_host_is_resolved_once_and_connected_to_as_resolved(web: HostileWeb) -> None:
    web.addresses["files.test"] = [[OUTSIDE], [INSIDE]]
    web.answers[KEY] = Reply(b"x")
    assert read(web) == b"x"
    assert [seen.address for seen in web.seen] == [OUTSIDE]
    assert web.resolved == ["files.test"]


def test_an_answer_that_changes_is_looked_at_again(web: HostileWeb) -> None:
    web.addresses["files.test"] = [[OUTSIDE], [INSIDE]]
    web.answers[KEY] = redirect("https://files.test/other")
    assert "not at public addresses" in refusal(web)
    assert [seen.address for seen in web.seen] == [OUTSIDE]


@pytest.mark.parametrize(
    "url",
    [
        "http://files.test/other?secret",
        "ftp://files.test/secret",
        "file:///secret",
        "https://files.test:8443/secret",
        "https://files.test:x/secret",
        "https://secret:secret@files.test/",
        "https://[::1]/secret",
        "https://[secret/",
        "https://a\tb/",
        "https://fil\u00e9s.test/secret",
    ],
)
def test_a_redirect_leads_to_plain_https_or_nowhere(web: HostileWeb, url: str) -> None:
    web.answers[KEY] = redirect(url.encode().decode("latin-1"))
    refusal(web)
    assert len(web.seen) == 1


def test_a_relative_redirect_is_followed(web: HostileWeb) -> None:
    web.answers[KEY] = redirect("other b?q=1 2", 307)
    web.answers["files.test", "/other%20b"] = Reply(b"x")
    assert read(web) == b"x"
    assert web.seen[-1].path == "/other%20b?q=1%202"


def test_redirects_end(web: HostileWeb) -> None:
    web.answers[KEY] = redirect(URL)
    assert "redirects more than 5 times" in refusal(web)
    assert len(web.seen) == 6


def test_a_token_stays_with_its_host(web: HostileWeb) -> None:
    """Also if another host sends us back."""
    web.answers[KEY] = redirect("/same")
    web.answers["files.test", "/same"] = redirect("https://cdn.test/away")
    web.answers["cdn.test", "/away"] = redirect("https://files.test/back")
    web.answers["files.test", "/back"] = Reply(b"x")
    assert read(web, token=TOKEN) == b"x"
    sent = [seen.headers.get("Authorization") for seen in web.seen]
    assert sent == [f"Bearer {TOKEN}", f"Bearer {TOKEN}", None, None]


def test_a_certificate_of_another_name_is_refused(web: HostileWeb) -> None:
    assert "not valid for 'other.test'" in refusal(web, "https://other.test/file?secret")
    assert web.seen == []


def test_unknown_authorities_are_refused(web: HostileWeb) -> None:
    strict = PublicFetch(web.resolve, lambda ip: True)
    with pytest.raises(LoraError, match="CERTIFICATE_VERIFY_FAILED"):
        strict.get(URL, max_bytes=1, cancelled=threading.Event())


def test_proxies_of_the_environment_are_not_used(
    web: HostileWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web.answers[KEY] = Reply(b"x")
    assert read(web) == b"x"


def test_an_endless_body_ends_at_the_limit(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(length=None, then=more_bytes)
    assert "more than 1000000 bytes" in refusal(web)


def test_a_body_that_is_declared_too_long_is_not_read(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(b"x", length=1_000_001, then=silence)
    assert "more than 1000000 bytes" in refusal(web)


def test_a_body_shorter_than_declared(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(b"12345", length=6)
    assert "broke off at 5 of 6 bytes" in refusal(web)


@pytest.mark.parametrize("num_bytes", [1, 100_000])
def test_a_body_longer_than_declared(web: HostileWeb, num_bytes: int) -> None:
    web.answers[KEY] = Reply(bytes(5 + num_bytes), length=5)
    assert "more bytes than it declared" in refusal(web)


def test_compression_that_nobody_asked_for(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(gzip.compress(bytes(10_000)), headers={"Content-Encoding": "gzip"})
    assert "compresses" in refusal(web)


def seconds(call: Any) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_a_stalled_body_ends(web: HostileWeb) -> None:
    web.answers[KEY] = Reply(b"12345", length=6, then=silence)
    assert seconds(lambda: refusal(web, limits=SHORT)) < 4


def test_a_stalled_head_ends(web: HostileWeb) -> None:
    def answer(handler: Any) -> Reply:
        silence(handler)
        return Reply()

    web.answers[KEY] = answer
    assert seconds(lambda: refusal(web, limits=SHORT)) < 4


def test_a_trickle_ends(web: HostileWeb) -> None:
    """Each byte comes in time, and all of them never."""

    @forever
    def trickle(handler: Any) -> None:
        handler.wfile.write(b"x")
        time.sleep(0.05)

    web.answers[KEY] = Reply(length=None, then=trickle)
    limits = Limits(connect_s=5, stall_s=5, total_s=0.8)
    assert seconds(lambda: refusal(web, limits=limits)) < 4


def test_a_host_that_accepts_and_says_nothing(web: HostileWeb) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = PublicFetch(lambda *_: [mute.getsockname()], lambda ip: True, web.tls, SHORT)
        with pytest.raises(LoraError, match="could not be connected to"):
            client.get(URL, max_bytes=1, cancelled=threading.Event())


@pytest.mark.parametrize("where", ["handshake", "head", "body", "flood"])
def test_cancelling_ends_it_soon(web: HostileWeb, where: str) -> None:
    def answer(handler: Any) -> Reply:
        silence(handler)
        return Reply()

    web.answers[KEY] = {
        "head": answer,
        "body": Reply(b"x", length=9, then=silence),
        "flood": Reply(length=None, then=more_bytes),
    }.get(where, Reply())
    patient, cancelled = Limits(60, 60, 60), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = web.client(patient)
        if where == "handshake":
            client = PublicFetch(lambda *_: [mute.getsockname()], lambda ip: True, web.tls, patient)
        threading.Timer(0.2, cancelled.set).start()
        start = time.monotonic()
        with (
            pytest.raises(CancelledError),
            client.get(URL, max_bytes=10**12, cancelled=cancelled) as answered,
        ):
            for _ in answered.chunks():
                pass
        assert 0.1 < time.monotonic() - start < 4


def test_nothing_secret_is_logged(web: HostileWeb, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    web.answers[KEY] = redirect("https://cdn.test/x?X-Amz-Signature=secret")
    web.answers["cdn.test", "/x"] = Reply(b"123", length=9)
    refusal(web, token=TOKEN)
    assert not has_secret(caplog.text)

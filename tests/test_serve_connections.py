"""Real sockets to a real server: heads, silence, half-closed and unread connections, and what the log and metrics say of them."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import socket
import sys
import threading
import time
from urllib.parse import urlparse

import httpx
import pytest

from tests.servers_for_tests import Remote, started
from tests.test_serve_process import SLOW, listens, metric, wait_for

BODY = json.dumps({"question": "Who keeps the lamp?", "context": "Ada keeps the lamp in room 0."}).encode()
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes = BODY, headers: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST /v1/answer HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
    return head % (version, len(body), headers) + body


@contextlib.contextmanager
def connected(url: str):
    place = urlparse(url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """The bytes that arrive until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def until(connection: socket.socket, end: bytes) -> bytes:
    """The bytes that arrive up to an end marker."""
    found = b""
    while not found.endswith(end):
        piece = connection.recv(65536)
        assert piece, found
        found += piece
    return found


def talk(url: str, data: bytes) -> bytes:
    with connected(url) as connection:
        with contextlib.suppress(OSError):  # it may be refused before all of it is sent
            connection.sendall(data)
        return rest(connection)


def error_of(response: bytes, status: int, kind: str) -> dict:
    """The refusal in a response, which is complete, of the documented form, and closes the connection."""
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {status} "), response[:300]
    headers = dict(line.split(": ", 1) for line in lines[1:])
    found = json.loads(body)
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    assert headers["x-request-id"] == found["request_id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert found["error"]["type"] == kind
    assert set(found["error"]) == {"type", "message", "limit", "flag"}
    return found["error"]


def requests(remote: Remote, **fields) -> list[dict]:
    """The log's lines of requests with these fields."""
    lines = [json.loads(line) for line in remote.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "request" and line.items() >= fields.items()]


def answer_in(response: bytes) -> str:
    return json.loads(response.rpartition(b"\r\n\r\n")[2])["answers"][0]["text"]


def slow(bundle, seconds: float) -> tuple[str, ...]:
    return (sys.executable, "-c", SLOW.replace("SECONDS", str(seconds)), str(bundle))


@pytest.fixture(scope="module")
def remote(bundle, tmp_path_factory):
    with started(tmp_path_factory.mktemp("server"), bundle) as server:
        yield server


@pytest.fixture(scope="module")
def strict(bundle, tmp_path_factory):
    """A server without patience."""
    flags = ("--head-timeout", "0.5", "--max-head-bytes", "2000", "--request-timeout", "1.5", "--keep-alive", "1")
    with started(tmp_path_factory.mktemp("strict"), bundle, *flags) as server:
        yield server


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health/live HTTP/1.1\r\n" + b"X-Some: header\r\n" * 200 + b"\r\n",
        b"GET /health/live HTTP/1.1\r\nX: " + b"a" * 2000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nX: " + b"a" * 3_000_000,
        b"GET /health/live HTTP/1.1\r\n" + b"a" * 3_000_000,
        b"GET /" + b"a" * 2001 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 3_000_000,
        b"\r\n" * 3_000_000,
        LIVE + b"GET /health/live HTTP/1.1\r\nX: " + b"a" * 3_000_000,
    ],
    ids=["headers", "header", "endless header", "endless name", "path", "endless path", "empty lines", "second head"],
)
def test_a_head_that_is_too_large_is_431(strict, data):
    response = talk(strict.url, data)
    if data.startswith(LIVE):
        first, _, response = response.partition(b'{"status":"live"}')
        assert first.startswith(b"HTTP/1.1 200 ")
    found = error_of(response, 431, "head_too_large")
    assert (found["limit"], found["flag"]) == (2000, "--max-head-bytes")
    assert "2000 bytes" in found["message"]


def test_a_head_of_exactly_the_limit_is_answered_however_it_arrives(strict):
    def head(size: int) -> bytes:
        line = b"GET /health/live HTTP/1.1\r\nConnection: close\r\nX: "
        counted = len(b"/health/live") + len(b"connectionclose") + 4 + len(b"x") + 4
        return line + b"a" * (size - counted) + b"\r\n\r\n"

    assert talk(strict.url, head(2000)).startswith(b"HTTP/1.1 200 ")
    error_of(talk(strict.url, head(2001)), 431, "head_too_large")
    with connected(strict.url) as connection:
        for i in range(0, len(head(2000)), 300):
            connection.sendall(head(2000)[i : i + 300])
            time.sleep(0.01)
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_in_many_pieces_and_requests_sent_ahead_are_no_heads(remote):
    long = json.dumps({"question": "Who keeps the lamp?", "context": "Ada keeps the lamp. " + " " * 150_000}).encode()
    data = post(long) * 3 + post() * 400 + post(headers=b"Connection: close\r\n")
    response = talk(remote.url, data)
    assert response.count(b"HTTP/1.1 200 OK") == response.count(b'"text":"Ada"') == 404


def test_trailers_and_what_lies_between_chunks_is_bounded_too(strict):
    head = b"POST /v1/answer HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(BODY), BODY)
    fine = head + chunk + b"0\r\nX-Trailer: a\r\n\r\n" + b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n"
    response = talk(strict.url, fine)
    assert response.count(b"HTTP/1.1 200 OK") == 2
    error_of(talk(strict.url, head + chunk + b"0\r\nX: " + b"a" * 100_000), 431, "head_too_large")
    error_of(talk(strict.url, head + b"1;" + b"a" * 100_000), 431, "head_too_large")


@pytest.mark.parametrize("begun", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"\r\n", LIVE + b"POST /"])
def test_a_head_that_is_slow_is_408(strict, begun):
    with connected(strict.url) as connection:
        connection.sendall(begun)
        started_at = time.monotonic()
        found = b""
        while time.monotonic() - started_at < 15:  # one more byte now and then does not help
            if select.select([connection], [], [], 0.2)[0]:
                piece = connection.recv(65536)
                found += piece
                if not piece:
                    break
            else:
                with contextlib.suppress(OSError):
                    connection.send(b"\r\n" if begun == b"\r\n" else b"a")
        seconds = time.monotonic() - started_at
    assert 0.4 < seconds < 10
    refused = error_of(found.rpartition(b'{"status":"live"}')[2], 408, "slow_head")
    assert (refused["limit"], refused["flag"]) == (0.5, "--head-timeout")


def test_a_connection_without_a_byte_is_closed_without_one(strict):
    begun = time.monotonic()
    assert talk(strict.url, b"") == b""
    assert 0.4 < time.monotonic() - begun < 10
    with connected(strict.url) as connection:  # after a request it is --keep-alive
        connection.sendall(LIVE)
        begun = time.monotonic()
        assert rest(connection).endswith(b'{"status":"live"}')
        assert 0.9 < time.monotonic() - begun < 10


def test_the_rest_of_a_body_that_was_refused_is_not_awaited_for_ever(strict):
    with connected(strict.url) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n{")
        begun = time.monotonic()
        assert b"408" in rest(connection)[:20]  # the body is read before the route is looked for
        assert 1.4 < time.monotonic() - begun < 10
    declared = b"POST /v1/answer HTTP/1.1\r\nContent-Length: 99000000\r\n\r\n{"
    with connected(strict.url) as connection:
        connection.sendall(declared)
        begun = time.monotonic()
        assert rest(connection).startswith(b"HTTP/1.1 413 ")
        assert 0.4 < time.monotonic() - begun < 10
    assert metric(strict.url, 'qadeploy_connections_cut_total{reason="body"}') >= 2


# ---------------------------------------------------------------- how many


def test_the_health_check_answers_beside_a_thousand_silent_connections(bundle, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip("this process may not open enough files")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); "
    code += "from qadeploy.cli import main; main(['serve', *sys.argv[1:]])"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    try:
        with started(tmp_path, bundle, command=(sys.executable, "-c", code, str(bundle))) as server:
            with contextlib.ExitStack() as held:
                for number in range(1300):
                    connection = held.enter_context(connected(server.url))
                    if number % 3 == 1:
                        connection.sendall(b"POST /v1/answer HTTP/1.1\r\nX: ")
                    if number % 3 == 2:
                        connection.sendall(b"POST /v1/answer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
                begun = time.monotonic()
                for _ in range(5):
                    assert httpx.get(f"{server.url}/health/live", timeout=5).status_code == 200
                assert (
                    httpx.post(
                        f"{server.url}/v1/answer", content=BODY, headers={"content-type": "application/json"}
                    ).status_code
                    == 200
                )
                assert time.monotonic() - begun < 5
                assert 700 < metric(server.url, "qadeploy_connections") <= 960
                assert metric(server.url, 'qadeploy_connections_cut_total{reason="limit"}') > 300
            assert {line["level"] for line in map(json.loads, server.log.read_text().splitlines())} == {"info"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_connection_that_waited_longest_makes_room_and_requests_that_run_do_not(bundle, tmp_path):
    with (
        started(tmp_path, bundle, "--max-connections", "4", command=slow(bundle, 3)) as server,
        contextlib.ExitStack() as held,
    ):
        running, first, second, third = (held.enter_context(connected(server.url)) for _ in range(4))
        running.sendall(post(headers=b"Connection: close\r\n"))
        for connection in (second, first):
            connection.sendall(LIVE)
            assert until(connection, b'{"status":"live"}').startswith(b"HTTP/1.1 200 ")
        new = held.enter_context(connected(server.url))
        assert rest(third) == b""  # silent since it connected
        newer = held.enter_context(connected(server.url))
        assert rest(second) == b""  # its answer came before that of the first
        for connection in (first, new, newer):
            connection.sendall(post(headers=b"Connection: close\r\n"))
        time.sleep(0.5)
        found = error_of(talk(server.url, LIVE), 503, "too_many_connections")
        assert (found["limit"], found["flag"]) == (4, "--max-connections")
        assert [answer_in(rest(connection)) for connection in (running, first, new, newer)] == ["Ada"] * 4
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_the_memory_of_all_uploads_together_is_bounded(bundle, tmp_path):
    with started(tmp_path, bundle, "--max-upload-bytes", "1000000") as server, contextlib.ExitStack() as held:
        uploads = [held.enter_context(connected(server.url)) for _ in range(3)]
        for number, connection in enumerate(uploads):
            connection.sendall(b"POST /v1/answer HTTP/1.1\r\nContent-Length: 500000\r\n\r\n" + b" " * 400_000)
            if number < 2:
                assert not select.select([connection], [], [], 0.3)[0]
        assert rest(uploads[0]) == b""  # the first makes room for the third
        for connection in uploads[1:]:
            connection.sendall(b" " * 100_000)
            assert connection.recv(65536).startswith(b"HTTP/1.1 422 ")
        assert metric(server.url, 'qadeploy_connections_cut_total{reason="body"}') == 1
        assert answer_in(talk(server.url, post(headers=b"Connection: close\r\n"))) == "Ada"


def test_more_connections_than_open_files_are_refused_at_the_start(bundle, tmp_path):
    told = r"--max-connections must be at most [0-9]+, not 100000000: this process may open"
    with pytest.raises(AssertionError, match=told), started(tmp_path, bundle, "--max-connections", "100000000"):
        pass


# ---------------------------------------------------------------- clients that have ended, or do not read


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_has_sent_its_end_gets_its_answer(bundle, tmp_path, remote, version):
    with connected(remote.url) as connection:
        connection.sendall(post(version=version))
        connection.shutdown(socket.SHUT_WR)
        response = rest(connection)
        assert response.startswith(b"HTTP/1.1 200 OK")
        assert answer_in(response) == "Ada"


def test_it_also_gets_an_answer_that_takes_long_and_several(bundle, tmp_path):
    with started(tmp_path, bundle, command=slow(bundle, 0.8)) as server, connected(server.url) as connection:
        connection.sendall(post() * 2)
        connection.shutdown(socket.SHUT_WR)
        response = rest(connection)
        assert response.count(b"HTTP/1.1 200 OK") == response.count(b'"text":"Ada"') == 2
        assert answer_in(response) == "Ada"
        # Before it there are interim responses, which every HTTP/1.1 client skips, httpx included.
        assert response.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_has_gone_is_noticed_and_its_work_dropped(bundle, tmp_path, version):
    with started(tmp_path, bundle, command=slow(bundle, 4)) as server:
        with connected(server.url) as connection:
            connection.sendall(post(version=version))
            wait_for(lambda: metric(server.url, "qadeploy_queue_questions") == 1)
        wait_for(lambda: metric(server.url, "qadeploy_queue_questions") == 0, 3)
        assert metric(server.url, 'qadeploy_dropped_total{reason="disconnect"}') == 1
        wait_for(lambda: requests(server, status=499, error="disconnected", level="info"))


def test_a_client_that_does_not_read_is_cut_off(bundle, tmp_path):
    flags = ("--request-timeout", "2", "--keep-alive", "1")
    with started(tmp_path, bundle, *flags) as server, connected(server.url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        data = b"GET /openapi.json HTTP/1.1\r\n\r\n" * 2000
        begun = time.monotonic()
        while data and time.monotonic() - begun < 2:
            with contextlib.suppress(BlockingIOError):
                data = data[connection.send(data) :]
        wait_for(lambda: metric(server.url, 'qadeploy_connections_cut_total{reason="response"}') == 1, 15)
        wait_for(lambda: metric(server.url, "qadeploy_connections") <= 1)


# ---------------------------------------------------------------- what the log and the metrics say


def test_hanging_up_during_an_upload_is_499_and_no_error(remote):
    before = len(requests(remote, status=499))
    errors = len(
        [line for line in remote.log.read_text().splitlines() if '"error"' in line and '"level": "error"' in line]
    )
    dropped = metric(remote.url, 'qadeploy_dropped_total{reason="disconnect"}')
    for reset in (False, True):
        with connected(remote.url) as connection:
            connection.sendall(b"POST /v1/answer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
            time.sleep(0.2)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_for(
        lambda: len(requests(remote, status=499, error="disconnected", route="/v1/answer", level="info")) == before + 2
    )
    assert metric(remote.url, 'qadeploy_requests_total{route="/v1/answer",status="499"}') >= 2
    assert metric(remote.url, 'qadeploy_dropped_total{reason="disconnect"}') == dropped + 2
    after = [line for line in remote.log.read_text().splitlines() if '"level": "error"' in line]
    assert len(after) == errors


@pytest.mark.parametrize(
    ("data", "status", "kind"),
    [
        (b"hello\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "bad_request"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
        (b"POST /v1/answer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "bad_request"),
        (b"CONNECT example.org:443 HTTP/1.1\r\n\r\n", 405, "method"),
    ],
)
def test_what_is_no_http_has_the_documented_error_and_names_the_client(remote, data, status, kind):
    before = len(requests(remote, status=status, client="127.0.0.1"))
    error_of(talk(remote.url, data), status, kind)
    wait_for(lambda: len(requests(remote, status=status, client="127.0.0.1", error=kind, level="info")) == before + 1)
    assert metric(remote.url, f'qadeploy_requests_total{{route="other",status="{status}"}}') >= 1 or b"chunked" in data
    assert "Invalid HTTP" not in remote.log.read_text()


def test_what_was_asked_before_garbage_is_answered_before_it(remote):
    response = talk(remote.url, post() + b"garbage\r\n\r\n")
    first, _, second = response.partition(b"HTTP/1.1 400 ")
    assert first.startswith(b"HTTP/1.1 200 OK")
    assert answer_in(first) == "Ada"
    error_of(b"HTTP/1.1 400 " + second, 400, "bad_request")


@pytest.mark.parametrize(
    ("proxies", "headers", "client"),
    [
        ((), ["203.0.113.9"], "127.0.0.1"),
        (("10.0.0.0/8",), ["203.0.113.9"], "127.0.0.1"),
        (("127.0.0.1",), ["203.0.113.9"], "203.0.113.9"),
        (("127.0.0.1",), ["198.51.100.7, 203.0.113.9:4711"], "203.0.113.9"),
        (("127.0.0.0/8", "10.0.0.1"), ["198.51.100.7", "203.0.113.9, 10.0.0.1"], "203.0.113.9"),
        (("127.0.0.1",), ["[2001:db8::1]:80"], "2001:db8::1"),
        (("127.0.0.1",), ["a" * 5_000], "127.0.0.1"),
        (("127.0.0.1",), ["fe80::1%" + "a" * 5_000], "127.0.0.1"),
        (("127.0.0.1",), [""], "127.0.0.1"),
    ],
)
def test_x_forwarded_for_counts_only_from_a_trusted_proxy_and_only_as_an_address(proxies, headers, client):
    from qadeploy.serve.calls import client_of, networks

    given = [(b"x-forwarded-for", header.encode()) for header in headers]
    for peer in ("127.0.0.1", "::ffff:127.0.0.1"):  # the second on a socket that takes IPv6 too
        assert client_of({"client": (peer, 5), "headers": given}, networks(proxies)) == client


def test_the_flag_for_proxies_reaches_the_log_and_must_be_an_address(bundle, tmp_path, remote):
    header = {"x-forwarded-for": "203.0.113.9"}
    httpx.get(f"{remote.url}/v1/model", headers=header)
    wait_for(lambda: requests(remote, route="/v1/model", status=200, client="127.0.0.1"))
    with started(tmp_path, bundle, "--trusted-proxy", "10.1.1.1", "--trusted-proxy", "127.0.0.1") as server:
        httpx.get(f"{server.url}/v1/model", headers=header)
        wait_for(lambda: requests(server, route="/v1/model", client="203.0.113.9"))
        talk(server.url, b"GET / HTTP/1.1\r\nX-Forwarded-For: 203.0.113.9\r\nContent-Length: x\r\n\r\n")
        wait_for(lambda: requests(server, status=400, client="203.0.113.9"))
    told = "--trusted-proxy must be an address or a network"
    with pytest.raises(AssertionError, match=told), started(tmp_path, bundle, "--trusted-proxy", "proxy.example"):
        pass


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_answers_with_503(bundle, tmp_path, first):
    with started(tmp_path, bundle, "--drain-delay", "30", command=slow(bundle, 6)) as server:
        found: list[bytes] = []
        uploading = b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        threads = [
            threading.Thread(target=lambda d=data: found.append(talk(server.url, d))) for data in (post(), uploading)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: metric(server.url, "qadeploy_queue_questions") == 1)
        wait_for(lambda: metric(server.url, "qadeploy_connections") >= 2)
        server.process.send_signal(first)
        wait_for(lambda: bool(server.events("draining")))
        time.sleep(0.3)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert time.monotonic() - begun < 2.5
        for response in found:
            error_of(response, 503, "closing")
            assert b"retry-after: 1\r\n" in response
        assert server.process.wait(13) == 1  # once the run has ended
        assert len(requests(server, status=503, error="closing")) == 2
        assert not [line for line in server.log.read_text().splitlines() if '"level": "error"' in line]
        assert not listens(server.url)


def test_a_folder_whose_name_is_not_utf_8_can_be_served_and_measured(bundle, tmp_path):
    folder = bundle.parent / "keep\udcffers"
    folder.symlink_to(bundle)
    try:
        with started(tmp_path, folder) as server:
            text = httpx.get(f"{server.url}/metrics").text
            assert "qadeploy_bundle_info{" in text
            assert httpx.get(f"{server.url}/v1/model").json()["manifest"]["schema"]
            assert httpx.get(f"{server.url}/health/live").status_code == 200
    finally:
        folder.unlink()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_upgrade_is_answered_as_if_nobody_had_asked(remote, method, protocol):
    wanted = f"Connection: Upgrade\r\nUpgrade: {protocol}\r\nSec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\nSec-WebSocket-Version: 13\r\n"
    if method == "POST":
        data, status = post(headers=wanted.encode()), b"200"
    else:
        path = "/health/live" if method == "GET" else "/v1/model"
        data, status = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\n{wanted}\r\n".encode(),
            b"200" if method == "GET" else b"405",
        )
    response = talk(remote.url, data + b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 %b " % status)
    assert (b'"text":"Ada"' in response) == (method == "POST")
    assert response.endswith(b'{"status":"live"}')  # the next request on the connection
    assert response.count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize(
    "path",
    [
        *("app.js/", "app.js//", "/app.js", "./app.js", "x/../app.js", "%2e/app.js"),
        *("", ".", "..", "%00", "a" * 1000, "app.js%00"),
    ],
)
def test_a_file_of_the_page_has_one_path(remote, path):
    right = talk(remote.url, b"GET /static/app.js HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert right.startswith(b"HTTP/1.1 200 ")
    response = talk(remote.url, f"GET /static/{path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    error_of(response, 404, "not_found")

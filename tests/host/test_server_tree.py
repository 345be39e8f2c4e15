"""The published tree over HTTP: Range, conditional requests, caching, and nothing beside it."""

import hashlib
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import PRODUCT, firmware, publish_version, serving

from twinslot_server.site import Site
from twinslot_server.tree import Unsatisfiable, byte_range, etag_matches

IMAGE = firmware("1.1.0")
SIZE = len(IMAGE)
SHA256 = hashlib.sha256(IMAGE).hexdigest()
BLOB = f"/{PRODUCT}/blobs/{SHA256[:2]}/{SHA256}.bin"
RELEASE = f"/{PRODUCT}/r/1.1.0.jws"
POINTER = f"/{PRODUCT}/stable.json"
ETAG = f'"{SHA256}"'
SECRET = b"not published"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    site = folder / "site"
    publish_version(site, "1.1.0")
    (folder / "secret.json").write_bytes(SECRET)
    (site / PRODUCT / ".hidden.json").write_bytes(SECRET)
    (site / PRODUCT / "notes.txt").write_bytes(SECRET)
    (site / "top.json").write_bytes(SECRET)
    (site / PRODUCT / "linked.json").symlink_to(folder / "secret.json")
    (site / "linked").symlink_to(folder)
    (site / PRODUCT / "folder.json").mkdir()
    (site / PRODUCT / "huge.json").write_bytes(b" " * 100_000)
    with serving(site) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as http:
        yield http


# ---- whole files


@pytest.mark.parametrize(
    ("path", "kind", "caching"),
    [
        (BLOB, "application/octet-stream", "public, max-age=31536000, immutable"),
        (RELEASE, "application/jose", "public, max-age=31536000, immutable"),
        (POINTER, "application/json", "no-cache"),
    ],
)
def test_each_kind_of_file_comes_with_its_headers(server, client, path, kind, caching):
    content = (server.data.parent / "site" / path[1:]).read_bytes()
    response = client.get(path)
    assert response.status_code == 200
    assert response.content == content
    headers = response.headers
    assert headers["content-type"] == kind
    assert headers["cache-control"] == caching
    assert headers["content-length"] == str(len(content))
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert "content-encoding" not in headers
    assert "server" not in headers

    head = client.head(path)
    assert head.status_code == 200
    assert head.content == b""
    assert {k: v for k, v in head.headers.items() if k != "date"} == {
        k: v for k, v in headers.items() if k != "date"
    }


@pytest.mark.parametrize("path", [BLOB, RELEASE, POINTER])
def test_an_unchanged_file_costs_a_304(client, path):
    etag = client.get(path).headers["etag"]
    for value in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = client.get(path, headers={"If-None-Match": value, "Range": "bytes=0-9"})
        assert response.status_code == 304
        assert response.content == b""
        assert response.headers["etag"] == etag
        assert "content-length" not in response.headers
    for value in ('"other"', etag[:-2], etag.strip('"')):
        assert client.get(path, headers={"If-None-Match": value}).status_code == 200


def test_a_new_pointer_has_a_new_etag(tmp_path):
    publish_version(tmp_path / "site", "1.0.0")
    with serving(tmp_path / "site") as s, s.client() as http:
        old = http.get(POINTER).headers["etag"]
        publish_version(tmp_path / "site", "1.1.0")
        response = http.get(POINTER, headers={"If-None-Match": old})
        assert response.status_code == 200
        assert response.headers["etag"] != old
        assert b"1.1.0" in response.content


# ---- ranges


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-", 100, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        (f"bytes=5-{SIZE + 1000}", 5, SIZE - 1),
        ("bytes=-10", SIZE - 10, SIZE - 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE - 1),
        ("Bytes=7-8", 7, 8),
    ],
)
def test_a_range_gets_exactly_its_bytes(client, wanted, first, last):
    response = client.get(BLOB, headers={"Range": wanted})
    assert response.status_code == 206
    assert response.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert response.headers["content-length"] == str(last - first + 1)
    assert response.headers["etag"] == ETAG
    assert response.content == IMAGE[first : last + 1]


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_a_range_behind_the_end_is_a_416_that_tells_the_size(client, wanted):
    response = client.get(BLOB, headers={"Range": wanted})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{SIZE}"
    assert response.content == b""


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "bytes=",
        "bytes=-",
        "bytes=9-5",
        "bytes=a-b",
        "bytes=0x1-5",
        "bytes=+1-5",
        "bytes= 1-5",
        "bytes=1-5,7-9",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(1000)),
        "bytes=1",
        "lines=1-5",
        "bytes=" + "9" * 4000 + "-",
    ],
)
def test_a_range_nobody_should_ask_for_gets_the_whole_file(client, wanted):
    """F116: RFC 9110 lets a server ignore what it doesn't do; a thousand ranges included."""
    response = client.get(BLOB, headers={"Range": wanted})
    assert response.status_code == 200
    assert response.content == IMAGE


def test_if_range_resumes_the_same_file_only(client):
    range_ = {"Range": "bytes=100-199"}
    assert client.get(BLOB, headers={**range_, "If-Range": ETAG}).status_code == 206
    for other in ('"other"', f"W/{ETAG}", "Fri, 20 Nov 2026 09:00:00 GMT", ""):
        response = client.get(BLOB, headers={**range_, "If-Range": other})
        assert response.status_code == 200
        assert response.content == IMAGE


def test_a_broken_download_is_completed_by_ranges(client):
    parts = []
    while len(joined := b"".join(parts)) < SIZE:
        headers = {"Range": f"bytes={len(joined)}-", "If-Range": ETAG}
        with client.stream("GET", BLOB, headers=headers) as response:
            assert response.status_code == 206
            parts.append(next(response.iter_raw(7000)))
    assert joined == IMAGE


@pytest.mark.parametrize("path", [RELEASE, POINTER])
def test_small_files_have_ranges_too(client, path):
    whole = client.get(path).content
    response = client.get(path, headers={"Range": "bytes=3-9"})
    assert (response.status_code, response.content) == (206, whole[3:10])


@given(st.text(alphabet="bytes=-,0123456789 *", max_size=30), st.integers(0, 100))
def test_any_range_header_gives_a_range_inside_the_file_or_none(text, size):
    try:
        span = byte_range(text, size)
    except Unsatisfiable:
        return
    assert span is None or 0 <= span[0] <= span[1] < size


@given(st.text(max_size=40))
def test_only_a_matching_etag_saves_a_download(text):
    assert etag_matches(text, ETAG) == (text.strip() == "*" or ETAG in text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_fetches_a_range_and_trusts_the_certificate(server, tmp_path):
    target = tmp_path / "part"
    command = ["curl", "--silent", "--show-error", "--fail", "--range", "1000-1999"]
    trust = ["--cacert", str(server.data / "server.crt"), "--output", str(target)]
    subprocess.run([*command, *trust, server.url + BLOB], check=True)
    assert target.read_bytes() == IMAGE[1000:2000]


# ---- nothing beside the tree

OUTSIDE = [  # "/" itself is the operators' page
    "//",
    f"/{PRODUCT}",
    f"/{PRODUCT}/",
    f"/{PRODUCT}/notes.txt",
    f"/{PRODUCT}/.hidden.json",
    f"/{PRODUCT}/linked.json",
    f"/{PRODUCT}/folder.json",
    f"/{PRODUCT}/huge.json",
    "/top.json",
    "/linked/secret.json",
    "/../secret.json",
    f"/{PRODUCT}/../../secret.json",
    f"/{PRODUCT}/%2e%2e/%2e%2e/secret.json",
    f"/{PRODUCT}/..%2f..%2fsecret.json",
    f"/{PRODUCT}%2f..%2f..%2fsecret.json",
    f"/{PRODUCT}/..%5c..%5csecret.json",
    f"/{PRODUCT}/stable.json%00",
    f"/{PRODUCT}/stable.json/",
    f"/{PRODUCT}//stable.json",
    f"/{PRODUCT}/r/../stable.json",
    f"/{PRODUCT}/r/%2e%2e.jws",
    f"/./{PRODUCT}/stable.json",
    f"/{PRODUCT}/r/1.1.0.JWS",
    f"/{PRODUCT}/r/9.9.9.jws",
    f"/{PRODUCT}/blobs/00/{SHA256}.bin",
    f"/{PRODUCT}/blobs/{SHA256[:2]}/{SHA256.upper()}.bin",
    f"/{PRODUCT}/blobs/{SHA256[:2]}/",
    f"{BLOB}.bin",
    f"/{PRODUCT}/" + "x" * 300 + ".json",
    "/etc/passwd",
    "//etc/passwd",
    "/%2fetc%2fpasswd",
    "/data/device-token",
    "/../data/device-token",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_published_files_is_served(server, path):
    """F116, on the raw connection: no client library tidies the path up first."""
    answer = raw_get(server, path)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"404"
    assert b'"code":"not_found"' in body
    assert SECRET not in answer


def raw_get(server, path: str) -> bytes:
    context = ssl.create_default_context(cafile=server.data / "server.crt")
    host, port = server.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@given(st.text(alphabet="a.b/r-_%\\~0json", max_size=40))
def test_whatever_the_name_the_file_found_lies_inside(name):
    site = Site(Path(__file__).parent)
    file = site.find(name)
    assert file is None or file.path.is_relative_to(Path(__file__).parent)


def test_a_file_that_shrinks_while_it_is_sent_never_looks_complete(tmp_path):
    site = tmp_path / "site"
    publish_version(site, "1.1.0")
    blob = next((site / PRODUCT / "blobs").rglob("*.bin"))
    blob.write_bytes(bytes(32 << 20))
    with serving(site) as s, s.client() as http, http.stream("GET", BLOB) as response:
        assert response.headers["content-length"] == str(32 << 20)
        os.truncate(blob, 1 << 20)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in response.iter_raw():
                pass

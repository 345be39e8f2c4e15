"""Payloads in an S3-compatible store: signed URLs, and a board that fetches by them.

The store of these tests serves a folder over TLS and refuses what botocore, AWS's own library,
would not have signed.
"""

import datetime as dt
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from fleet import FLEET, Board, running

from twinslot_server.presign import presigned
from twinslot_tools.fleet_http import Api
from twinslot_tools.lab import Lab

REGION, KEY_ID, SECRET = "eu-central-1", "AKIATESTTESTTESTTEST", "wJalrXUtnFEMI/K7MDENG+bPxRfi"


def signed_by_aws(url: str, method: str, region: str, key_id: str, secret: str) -> str:
    """The signature that botocore puts on a URL that has everything but this."""
    query = dict(parse_qsl(urlsplit(url).query))
    signer = S3SigV4QueryAuth(
        Credentials(key_id, secret), "s3", region, expires=int(query["X-Amz-Expires"])
    )
    request = AWSRequest(method, url.partition("&X-Amz-Signature=")[0])
    request.context["timestamp"] = query["X-Amz-Date"]
    return signer.signature(
        signer.string_to_sign(request, signer.canonical_request(request)), request
    )


def test_the_example_of_aws():
    url = "https://examplebucket.s3.amazonaws.com/test.txt"
    when = dt.datetime(2013, 5, 24, tzinfo=dt.UTC).timestamp()
    key = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    signed = presigned(url, "us-east-1", *key, 86400, when)
    assert signed.endswith(
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "url",
    [
        "https://bucket.s3.eu-central-1.amazonaws.com/sensor-node/blobs/ab/ab12.bin",
        "https://minio.example.org:9000/bucket/a%20folder/sensor-node/blobs/ab/ab12.gz",
        "http://127.0.0.1/b/x_y~z.bin",
    ],
)
def test_a_url_is_signed_as_awss_own_library_does(url, method):
    signed = presigned(url, REGION, KEY_ID, SECRET, 900, 1795165200, method)
    assert signed.startswith(url + "?")
    expected = signed_by_aws(signed, method, REGION, KEY_ID, SECRET)
    assert signed.rpartition("=")[2] == expected


class Store(http.server.ThreadingHTTPServer):
    """Serves ``folder`` at ``/bucket/`` to whoever has a signed URL that still holds.

    Attributes:
        seen: (status, Range, Authorization) of each request.
        cut_at: bytes after which the first answer breaks off.
    """

    def __init__(self, folder: Path, certificates: Path, cut_at: int | None = None):
        super().__init__(("127.0.0.1", 0), Request)
        self.folder = folder
        self.certificates = certificates
        self.cut_at = cut_at
        self.seen: list[tuple[int, str | None, str | None]] = []
        self.url = f"https://localhost:{self.server_port}/bucket"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that turned away

    def judge(self, method: str, host: str, target: str) -> int:
        query = dict(parse_qsl(urlsplit(target).query))
        try:
            signed = dt.datetime.strptime(query["X-Amz-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
            lasts = dt.timedelta(seconds=int(query["X-Amz-Expires"]))
            given = query["X-Amz-Signature"]
        except KeyError:
            return 403
        url = f"https://{host}{target}"
        good = signed_by_aws(url, method, REGION, KEY_ID, SECRET) == given
        return 200 if good and dt.datetime.now(dt.UTC) < signed + lasts else 403


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        folder = self.server.certificates
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self.request = context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self):
        super().finish()
        self.request.close()

    def do_GET(self):
        span = self.headers["Range"]
        status = self.server.judge("GET", self.headers["Host"], self.path)
        self.server.seen.append((status, span, self.headers["Authorization"]))
        content = b""
        if status == 200:
            name = urlsplit(self.path).path.removeprefix("/bucket/")
            content = (self.server.folder / name).read_bytes()
        first = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        self.send_response(206 if status == 200 and first else status)
        if first:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", '"of-a-store"')
        self.end_headers()
        cut, self.server.cut_at = self.server.cut_at, None
        self.wfile.write(content[first : cut or len(content)])
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[Store]:
    """A store, and the environment of a server that sends boards there."""
    store = Store(tmp_path / "lab" / "site", tmp_path / "lab" / "server", cut_at=200_000)
    for name, value in {
        "URL": store.url,
        "SIGNING__REGION": REGION,
        "SIGNING__KEY_ID": KEY_ID,
        "SIGNING__SECRET": SECRET,
    }.items():
        monkeypatch.setenv(f"TWINSLOT_PAYLOAD_{name}", value)
    yield store
    store.shutdown()
    store.server_close()


def test_a_board_fetches_its_payload_from_the_store_and_shows_it_no_token(
    tmp_path, elsewhere, monkeypatch
):
    """The first answer breaks off: it goes on at its checkpoint, by another signed URL."""
    host = urlsplit(elsewhere.url).netloc
    with Lab(tmp_path / "lab", settings={"allow_hosts": [host]}) as lab:
        lab.power_on()
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.wait(lambda e: e.name == "confirmed", timeout=60)
        lab.wait_for_server(lambda d: d["status"] == "confirmed")
        image = lab.firmware("1.1.0").read_bytes()
        assert image in lab.flash.read_bytes()
        ca = lab.folder / "server" / "server.crt"
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        operator = Api(lab.url, (ca.parent / "operator-token").read_text().strip(), ca)
        (release,) = operator.call("GET", "firmware")["firmware"]
        assert operator.fetch(f"firmware/{release['id']}/download") == image
    (first, second, third) = elsewhere.seen
    assert third == (200, None, None), "nor does the command line"
    assert first == (200, None, None)
    assert second[0] == 200 and second[1].startswith("bytes=") and second[2] is None


def test_a_board_goes_only_to_hosts_it_was_told(tmp_path, elsewhere):
    with Lab(tmp_path / "lab") as lab:
        lab.power_on()
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        failed = lab.wait(lambda e: e.name == "failed").data
        assert "foreign host" in failed["message"]
        assert SECRET not in "".join(lab.console) and "Signature" not in "".join(lab.console)
        lab.wait_for_server(lambda d: d["status"] == "failed")
    assert elsewhere.seen == []


def test_what_is_too_long_for_a_board_is_served_here(tmp_path):
    url = f"https://cdn.example.org/{'long/' * 80}"
    signing = {"region": REGION, "key_id": KEY_ID, "secret": SECRET}
    with running(tmp_path, payload_url=url, payload_signing=signing) as fleet:
        fleet.publish("1.1.0")
        assert Board(fleet, "b1").poll()["update_available"]
        (blob,) = fleet.release("1.1.0")["payloads"][:1]
        assert fleet.client.get(blob).status_code == 200


def test_a_signed_redirect_is_not_kept_by_anybody(tmp_path):
    signing = {"region": REGION, "key_id": KEY_ID, "secret": SECRET}
    with running(tmp_path, payload_url="https://b.example", payload_signing=signing) as fleet:
        fleet.publish("1.1.0")
        (blob,) = fleet.release("1.1.0")["payloads"][:1]
        answer = fleet.client.get(blob)
        assert answer.headers["cache-control"] == "no-store"
        assert len(answer.headers["location"]) <= 512
        assert SECRET not in answer.headers["location"] and FLEET not in str(answer.headers)

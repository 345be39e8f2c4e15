"""Uploads: what a board would refuse is refused by the server, and nothing of it is stored.

Each case is signed as it should be: what is wrong is the image, or the form it comes in.
"""

import gzip
import hashlib
import io
import random
import threading
import zlib

import fleet as fleets
import pytest
import servers
from fleet import running
from servers import HARDWARE, PRODUCT

from twinslot import release
from twinslot.errors import FormatError, ImageError, OtaError
from twinslot_server import uploads
from twinslot_tools import payloads, sample, signing
from twinslot_tools.payloads import Base, Payload, gzip_payload, member, patch_payload, varint
from twinslot_tools.virtual_esp32.firmware import make_firmware

UPLOAD = "/api/v1/firmware/upload"


def firmware(version="1.1.0", changes=0, chip="esp32"):
    size = 60_000
    filler = sample.code(size, changes=changes)
    return make_firmware(
        None, chip=chip, version=version, project=PRODUCT, size=size, filler=filler
    )


OLD, NEW = firmware("1.0.0"), firmware("1.1.0", 20)
OLD_BUILD = OLD[-32:].hex()


@pytest.fixture
def fleet(tmp_path):
    with running(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A fleet without a release; nothing of what is sent to it changes that."""
    with running(tmp_path_factory.mktemp("empty")) as found:
        yield found
        assert found.api("GET", "firmware") == {"firmware": []}


def form_of(image, *packed, version="1.1.0", **said):
    """What an upload sends: a release signed as it should be, whatever it says, and its payloads.

    ``said`` are members of the image in the manifest.
    """
    packed = packed or (Payload(image, "identity"),)
    manifest = {
        "schema": 1,
        "product": PRODUCT,
        "version": version,
        "hardware": [HARDWARE],
        "issued": "2026-11-20T09:00:00Z",
        "images": [
            {
                "slot": "firmware",
                "chip_id": 0,
                "size": len(image),
                "sha256": hashlib.sha256(image).hexdigest(),
                "build": image[-32:].hex(),
                "payloads": [p if isinstance(p, dict) else p.entry() for p in packed],
                **said,
            }
        ],
    }
    token = signing.document(manifest, signing.signer_of(servers.signing_key()), release.TYPE)
    blobs = [("file", ("x", p.content)) for p in packed if isinstance(p, Payload)]
    return [("release", ("r.jws", token)), *blobs]


def send(fleet, form):
    headers = {"Authorization": f"Bearer {fleets.ADMIN}"}
    return fleet.client.post(UPLOAD, headers=headers, files=form)


def refused(fleet, form):
    """Send what must be refused; return the code and the text. Nothing of it is there then."""
    before = sorted(fleet.site_folder.rglob("*"))
    answer = send(fleet, form)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert sorted(fleet.site_folder.rglob("*")) == before
    return answer.json()["code"], answer.json()["detail"]


# ---- the image


def digested(image):
    """The image with the digest that belongs to it."""
    return image[:-32] + hashlib.sha256(image[:-32]).digest()


def changed(at, new):
    return lambda image: digested(image[:at] + new + image[at + len(new) :])


def segments(number):
    return changed(1, bytes([number]))


BAD_IMAGES = {
    "for another chip": (changed(12, b"\x09\x00"), "hardware", "esp32s3"),
    "not an image": (changed(0, b"\x7fELF"), "image", "0x7f"),
    "a bootloader, without app descriptor": (changed(32, bytes(4)), "image", "app descriptor"),
    "no SHA-256 appended": (changed(23, b"\0"), "image", "no appended SHA-256"),
    "too many segments": (segments(17), "image", "1 to 16"),
    "a segment too many": (segments(16), "image", "can't boot"),
    "a segment less": (segments(1), "image", "can't boot"),
    "a segment that is longer": (changed(28, b"\xfc\xff\xff\0"), "image", "can't boot"),
    "a flipped bit of code": (changed(5000, bytes([NEW[5000] ^ 1])), "image", "checksum"),
    "a flipped bit of the checksum": (changed(len(NEW) - 33, b"\0"), "image", "checksum"),
    "a digest of something else": (lambda i: i[:-32] + b"\xaa" * 32, "image", "SHA-256"),
    "cut short": (lambda i: i[:30_000], "image", "can't boot"),
    "shorter than a header": (lambda i: i[:100], "image", "at least 288"),
    "nothing but a digest": (lambda i: bytes(32), "image", "at least 288"),
}


@pytest.mark.parametrize("packed", ["identity", "gzip"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_a_board_would_refuse_is_not_stored(empty, name, packed):
    spoil, code, why = BAD_IMAGES[name]
    image = spoil(NEW)
    content = image if packed == "identity" else gzip_payload(image)
    seen = refused(empty, form_of(image, Payload(content, packed)))
    assert seen[0] == code and why in seen[1], seen


@pytest.mark.parametrize("packed", ["identity", "gzip"])
@pytest.mark.parametrize(
    ("said", "code", "why"),
    [
        ({"chip_id": 9}, "hardware", "saw esp32, expected esp32s3, as the release says"),
        ({"build": "00" * 32}, "image", f"saw {NEW[-32:].hex()}, expected {'00' * 32}"),
        ({"sha256": "00" * 32}, "checksum", f"expected {'00' * 32}"),
    ],
    ids=["chip", "build", "sha256"],
)
def test_an_image_other_than_the_release_says_is_not_stored(empty, packed, said, code, why):
    content = NEW if packed == "identity" else gzip_payload(NEW)
    seen = refused(empty, form_of(NEW, Payload(content, packed), **said))
    assert seen[0] == code and why in seen[1], seen


@pytest.mark.parametrize("by", [-1, 1])
def test_a_gzip_of_another_size_than_the_release_says_is_not_stored(empty, by):
    form = form_of(NEW, Payload(gzip_payload(NEW), "gzip"), size=len(NEW) + by)
    code, why = refused(empty, form)
    assert code == "image" and f"expected {len(NEW) + by}" in why


def test_an_image_with_signatures_of_secure_boot_behind_it_is_taken(fleet):
    image = NEW + b"\xff" * (-len(NEW) % 4096) + b"\xe7\x02" + bytes(4094)
    form = form_of(image, Payload(image, "identity"), build=NEW[-32:].hex())
    assert send(fleet, form).status_code == 201


def test_the_page_refuses_the_same_upload(empty):
    form = form_of(digested(NEW[:5000] + bytes([NEW[5000] ^ 1]) + NEW[5001:]))
    login = empty.client.post("/-/login", data={"name": "a", "password": fleets.ADMIN})
    assert login.status_code == 303
    csrf = empty.client.get("/-/").text.partition('name="csrf" value="')[2].partition('"')[0]
    answer = empty.client.post("/-/releases-upload", files=form, data={"csrf": csrf})
    assert answer.status_code == 422 and "checksum" in answer.text
    assert not list(empty.site_folder.rglob("*"))


# ---- patches


def delta(base=OLD, image=NEW, build=OLD_BUILD):
    return Payload(patch_payload(base, image), "gzip", "detools", Base("old", build, base))


def patch(content, patch="detools", build=OLD_BUILD):
    return Payload(content, "gzip", patch, Base("old", build, b""))


BAD_PATCHES = {
    "no gzip": (patch(b"x" * 100), "gzip: malformed"),
    "half a gzip": (patch(delta().content[:-9]), "cut short"),
    "empty": (patch(member(b"")), "cut short"),
    "half a patch": (patch(member(gzip.decompress(delta().content)[:-100])), "cut short"),
    "of another type": (patch(member(b"\x01" + varint(5))), "expected 0: sequential"),
    "for an image of another size": (delta(image=NEW + bytes(4)), f"expected {len(NEW)}"),
    "with a data format": (patch(member(b"\0" + varint(len(NEW)) + varint(1))), "data format"),
    "nothing but numbers": (
        patch(member(b"\0" + varint(len(NEW)) + bytes(1000))),
        "without content",
    ),
    "a number above 30 bits": (
        patch(member(b"\0" + varint(len(NEW)) + b"\0" + varint(1 << 30))),
        "30 bits",
    ),
    "a negative size": (patch(member(b"\0" + varint(len(NEW)) + b"\0" + varint(-1))), "a size"),
    "longer than its image": (
        patch(member(b"\0" + varint(len(NEW)) + b"\0" + varint(len(NEW) + 1))),
        "what is left of the image",
    ),
    "leaves its base": (
        patch(member(b"\0" + varint(len(NEW)) + b"\0" + payloads._pack(b"a", b"", -2))),
        "leaves the base",
    ),
    "with more behind it": (patch(delta().content + member(b"more")), "behind the image"),
    "in a format of others": (patch(delta().content, patch="bsdiff"), "saw bsdiff"),
}


@pytest.mark.parametrize("name", BAD_PATCHES)
def test_a_patch_that_no_board_could_apply_is_not_stored(empty, name):
    """Also where the image that it is for is not known here."""
    made, why = BAD_PATCHES[name]
    code, seen = refused(empty, form_of(NEW, Payload(NEW, "identity"), made))
    assert code == "format" and why in seen, seen


def test_a_release_of_nothing_but_patches_is_not_stored(fleet):
    """A board that runs another image could not take it."""
    assert send(fleet, form_of(OLD, version="1.0.0")).status_code == 201
    code, why = refused(fleet, form_of(NEW, delta()))
    assert code == "payload" and "needs no other image" in why
    assert send(fleet, form_of(NEW, Payload(NEW, "identity"), delta())).status_code == 201


def test_a_patch_is_applied_where_its_base_is_here_and_must_give_the_image(fleet):
    another = firmware("0.9.0", 50)
    wrong, wrong_for_another = delta(base=another), delta(base=another, build="11" * 32)
    plain = Payload(NEW, "identity")
    assert send(fleet, form_of(OLD, version="1.0.0")).status_code == 201
    code, why = refused(fleet, form_of(NEW, plain, wrong))
    assert code == "checksum" and wrong.url in why, why
    assert send(fleet, form_of(NEW, plain, delta())).status_code == 201
    assert send(fleet, form_of(NEW, plain, wrong_for_another, version="1.1.1")).status_code == 201


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([(bytes(6), b"", 0)], "reads beyond"),
        ([(b"a", b"", 5), (b"b", b"", 0)], "leaves the base"),
        ([(b"a", b"", -2), (b"b", b"", 0)], "leaves the base"),
        ([(b"a", b"", 3), (b"bc", b"", 0)], "reads beyond"),
        ([(b"a", b"", 3), (b"b", b"", 99)], None),  # where the last one leads is of no use
    ],
    ids=["too much", "behind its end", "before its start", "across its end", "at last"],
)
def test_a_patch_stays_within_the_base_that_is_here(chunks, why):
    size = sum(len(diff) + len(extra) for diff, extra, _ in chunks)
    made = b"\0" + varint(size) + varint(0) + b"".join(payloads._pack(*c) for c in chunks)
    found = uploads.patched(iter([made]), io.BytesIO(b"\x01\x02\x03\x04\xff"), size)
    if why is None:
        assert b"".join(found) == bytes([ord("a") + 1, (ord("b") + 0xFF) & 0xFF])
        return
    with pytest.raises(FormatError, match=why):
        list(found)


OUTSIDE = (
    "../../{}.bin",
    "/tmp/{}.bin",
    "blobs/../../{}.bin",
    "blobs/00/{}.bin",
    "{}.py",
    "r/{}.jws",
)


@pytest.mark.parametrize("url", OUTSIDE)
def test_a_payload_is_stored_nowhere_but_under_its_digest(empty, url):
    """I5: also where who signed the release says otherwise."""
    good = Payload(NEW, "identity")
    entry = {**good.entry(), "url": url.format(hashlib.sha256(NEW).hexdigest())}
    _, why = refused(empty, [*form_of(NEW, entry), ("file", ("x", NEW))])
    assert "not a name in the tree" in why


def test_an_image_beyond_the_limit_is_refused_however_small_it_is_packed(tmp_path):
    with running(tmp_path, firmware_bytes=len(NEW) - 1) as fleet:
        answer = send(fleet, form_of(NEW, Payload(gzip_payload(NEW), "gzip")))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_a_payload_beyond_the_limit_is_refused_however_small_its_image_is(tmp_path):
    stored = zlib.compressobj(0, zlib.DEFLATED, 16 + 12)
    content = stored.compress(NEW) + stored.flush()
    assert len(content) > len(NEW)
    with running(tmp_path, firmware_bytes=len(NEW)) as fleet:
        answer = send(fleet, form_of(NEW, Payload(content, "gzip")))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_a_payload_of_another_size_than_the_release_says_is_not_stored(empty):
    """A board would stop before its end, or wait for more."""
    good = Payload(gzip_payload(NEW), "gzip")
    for size in (len(good.content) - 1, len(good.content) + 1):
        form = [*form_of(NEW, {**good.entry(), "size": size}), ("file", ("x", good.content))]
        code, why = refused(empty, form)
        assert code == "size" and f"saw {len(good.content)} bytes, expected {size}" in why


def test_a_payload_that_was_not_sent_is_named(empty):
    code, why = refused(empty, form_of(NEW, Payload(NEW, "identity").entry()))
    assert code == "payload" and "was not uploaded" in why


def test_an_encoding_that_no_board_knows_is_not_stored(empty):
    entry = {**Payload(NEW, "identity").entry(), "encoding": "zstd"}
    form = form_of(NEW, Payload(NEW, "identity"), entry)
    code, why = refused(empty, form)
    assert code == "format" and "saw zstd, expected identity or gzip" in why


# ---- gzip


def inflate(content, window=payloads.WINDOW):
    return b"".join(uploads.inflated(io.BytesIO(content), window))


def test_members_are_inflated_one_after_the_other():
    assert inflate(gzip_payload(NEW)) == NEW
    assert inflate(b"") == b""


@pytest.mark.parametrize("at", [1, 5, 9, 17, 18])
def test_what_ends_within_a_member_is_cut_short(at):
    with pytest.raises(FormatError, match="cut short"):
        inflate(gzip_payload(NEW)[:-at] if at < 18 else gzip_payload(NEW)[:18])


def test_a_window_larger_than_the_release_says_is_refused():
    """A board has no memory for it."""
    data = random.Random(1).randbytes(10_000) * 2
    deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + 15)
    content = deflate.compress(data) + deflate.flush()
    assert inflate(content, 15) == data
    with pytest.raises(FormatError, match="too far back"):
        inflate(content, 12)


def test_a_bomb_is_not_unpacked_beyond_the_image(empty):
    """50 MB in 50 kB: what comes is judged piece by piece, and the first too many ends it."""
    bomb = gzip.compress(NEW + bytes(50_000_000))
    pieces = uploads.inflated(io.BytesIO(bomb), 15)
    taken = []
    image = release.Image("firmware", 0, len(NEW), "", "", [])
    with pytest.raises(ImageError, match="more than"):
        uploads.judge_image((taken.append(len(piece)) or piece for piece in pieces), image)
    assert max(taken) == uploads.PIECE and sum(taken) <= len(NEW) + uploads.PIECE
    form = form_of(NEW, Payload(gzip_payload(NEW) + gzip_payload(bytes(5_000_000)), "gzip"))
    assert refused(empty, form)[0] == "image"
    with pytest.raises(FormatError, match="16 members without content"):
        inflate(member(b"") * 100_000)


def damaged(good, rng):
    """A payload with no, one or two bits flipped: in the gzip, or in what it holds; or cut."""
    plain = gzip.decompress(good)
    for number in range(60):
        content = bytearray(good if number % 2 else plain)
        for _ in range(number % 3):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        content = bytes(content[: len(content) - rng.choice([0, 0, 0, 5])])
        yield content if number % 2 else member(content)


def takes(content, kind, image):
    pieces = uploads.inflated(io.BytesIO(content), payloads.WINDOW)
    if kind:
        pieces = uploads.patched(pieces, io.BytesIO(OLD), image.size)
    try:
        uploads.judge_image(pieces, image)
    except OtaError:
        return False
    return True


def test_the_server_takes_no_payload_that_the_device_s_code_refuses(tmp_path):
    sha256 = hashlib.sha256(NEW).hexdigest()
    image = release.Image("firmware", 0, len(NEW), sha256, NEW[-32:].hex(), [])
    rng = random.Random(5)
    (tmp_path / "old").write_bytes(OLD)
    jobs, taken = [], []
    for kind, good in ((None, gzip_payload(NEW)), ("detools", patch_payload(OLD, NEW))):
        for content in damaged(good, rng):
            path = tmp_path / f"{len(jobs)}"
            path.write_bytes(content)
            job = {"payload": str(path), "encoding": "gzip", "window": payloads.WINDOW}
            base = str(tmp_path / "old") if kind else None
            jobs.append({**job, "size": len(NEW), "patch": kind, "base": base})
            taken.append(takes(content, kind, image))
    told = [answer.get("sha256") == sha256 for answer in payloads.apply(jobs)]
    assert 20 < sum(taken) < 100
    both = zip(taken, told, strict=True)
    assert not [n for n, (here, there) in enumerate(both) if here and not there]


# ---- the form it comes in


def multipart(*parts, boundary=b"between"):
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    kind = b"multipart/form-data; boundary=" + boundary
    return {"Content-Type": kind.decode()}, body + b"--" + boundary + b"--\r\n"


def part(name, content, more=b"", head=b""):
    said = b'Content-Disposition: form-data; name="' + name + b'"' + more
    return said + head + b"\r\n\r\n" + content


def as_file(content):
    return part(b"file", content, b'; filename="x"')


FORMS = {
    "many fields": [part(b"f", b"x")] * 2000,
    "many files": [as_file(b"x")] * 2000,
    "many headers": [part(b"f", b"x", head=b"\r\nX: y" * 2000)],
    "a huge header": [part(b"f", b"x", head=b"\r\nX: " + b"y" * 100_000)],
    "a huge name": [part(b"f" * 100_000, b"x")],
    "a huge field": [part(b"notes", b"x" * 2_000_000)],
    "parts within a part": [as_file(multipart(as_file(b"x"))[1])],
    "no name": [b"Content-Disposition: form-data\r\n\r\nx"],
    "no head": [b"x"],
    "nothing": [],
    "the release as a field": [part(b"release", b"x.y.z")],
    "a file as a field": [part(b"release", b"x", b'; filename="r"'), part(b"file", b"x")],
    "two releases": [part(b"release", b"x", b'; filename="r"')] * 2,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_a_bomb_or_none_is_refused_and_stores_nothing(empty, name):
    headers, body = multipart(*FORMS[name])
    headers["Authorization"] = f"Bearer {fleets.ADMIN}"
    answer = empty.client.post(UPLOAD, headers=headers, content=body)
    assert answer.status_code in (400, 413, 422), answer.text
    assert answer.json()["status"] == answer.status_code
    assert not list(empty.site_folder.rglob("*"))


def test_a_body_beyond_the_limit_is_not_read_to_its_end(empty):
    taken = []

    async def endless():
        for _ in range(10_000):
            taken.append(1 << 20)
            yield bytes(1 << 20)

    headers, _ = multipart()
    headers["Authorization"] = f"Bearer {fleets.ADMIN}"
    answer = empty.client.post(UPLOAD, headers=headers, content=endless())
    assert (answer.status_code, answer.json()["code"]) in ((413, "too_large"), (400, "request"))
    assert sum(taken) <= empty.settings.firmware_bytes * 4 + (2 << 20)


NAMES = ("../../../x.bin", "/etc/passwd", "..\\x", "x\0.bin", "", "é" * 300, "r/1.1.0.jws")


def upload_of(form):
    return "POST", UPLOAD, {"headers": {"Authorization": f"Bearer {fleets.ADMIN}"}, "files": form}


def test_F112_two_uploads_of_one_version_at_once_end_as_if_one_came_first(fleet):
    """The release is whole, whoever was first; who had another is told."""
    asked = [form_of(NEW), form_of(OLD)] * 2
    answers = fleet.client.together(*map(upload_of, asked))
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200, 201, 409, 409], [answer.text for answer in answers]
    won = dict(asked[codes.index(201)])
    (signed,) = fleet.site_folder.glob("*/r/*")
    assert signed.read_bytes() == won["release"][1]
    (row,) = fleet.api("GET", "firmware")["firmware"]
    assert row["sha256"] == hashlib.sha256(won["file"][1]).hexdigest()
    assert fleet.client.get(row["payloads"][0]).content == won["file"][1]
    assert not list(fleet.site_folder.rglob(".*")), "nothing half written is left"


def test_boards_are_answered_while_an_upload_is_judged(fleet, monkeypatch):
    """Megabytes are judged in a thread of their own."""
    threads = []
    real = uploads.judge

    def seen(*arguments):
        threads.append(threading.current_thread())
        return real(*arguments)

    monkeypatch.setattr(uploads, "judge", seen)
    assert send(fleet, form_of(NEW)).status_code == 201
    assert threads and threading.current_thread() not in threads


@pytest.mark.parametrize(
    "name", NAMES, ids=["up", "absolute", "backslash", "nul", "none", "long", "release"]
)
def test_a_file_s_name_is_never_a_path(fleet, name, tmp_path):
    """I5: what is stored is named by its content and by what was signed."""
    form = [(field, (name, content)) for field, (_, content) in form_of(NEW)]
    answer = send(fleet, form)
    assert answer.status_code == (422 if name == "" else 201), answer.text
    stored = {p.relative_to(fleet.site_folder).as_posix() for p in fleet.site_folder.rglob("*.*")}
    digest = hashlib.sha256(NEW).hexdigest()
    expected = {f"{PRODUCT}/r/1.1.0.jws", f"{PRODUCT}/blobs/{digest[:2]}/{digest}.bin"}
    assert stored == (set() if name == "" else expected)
    assert {p.name for p in tmp_path.iterdir()} <= {"site", "data"}

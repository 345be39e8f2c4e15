"""Payloads: what the builder makes, and what other tools and the device's code make of that.

The device's code runs under MicroPython (tools/apply_payload.py), many cases in one process.
"""

import gzip
import hashlib
import itertools
import json
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from servers import HARDWARE, PRODUCT, signing_key

from twinslot import payload, release
from twinslot.errors import ChecksumError, ConfigError, ImageError
from twinslot_tools import payloads, publish, sample
from twinslot_tools.payloads import BOUNDARY, WINDOW, member, varint
from twinslot_tools.virtual_esp32.firmware import make_firmware

SIZE = 300_001  # four members of 64 KiB, and a last one that ends in mid block
OLD = sample.code(SIZE)
NEW = sample.code(SIZE, changes=60)
GZIP = payloads.gzip_payload(NEW)
DELTA = payloads.patch_payload(OLD, NEW)
SHA256 = hashlib.sha256(NEW).hexdigest()


class Cases:
    """Collects jobs for the device's code; runs them at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs: list[dict] = []

    def add(self, content: bytes, **job):
        job = {"encoding": "gzip", "window": WINDOW, "patch": None, "size": len(NEW), **job}
        for name, data in (("payload", content), ("base", job.pop("base", None))):
            if data is not None:
                path = self.folder / hashlib.sha256(data).hexdigest()
                path.write_bytes(data)
                job[name] = str(path)
        self.jobs.append(job)

    def run(self) -> list[dict]:
        return payloads.apply(self.jobs)


@pytest.fixture
def cases(tmp_path):
    return Cases(tmp_path)


def patch(*chunks, size=None, head=b"\0", data_format=0):
    """A sequential patch: chunks are (diff, extra, adjustment), or bytes as they are."""
    total = sum(len(c[0]) + len(c[1]) for c in chunks if isinstance(c, tuple))
    out = head + varint(total if size is None else size) + varint(data_format)
    for chunk in chunks:
        out += payloads._pack(*chunk) if isinstance(chunk, tuple) else chunk
    return out


def apply_by_the_book(base: bytes, data: bytes) -> bytes:
    """Apply a patch as the description of the format says, without any of our code."""

    def number(at):
        byte = data[at]
        value, shift, negative = byte & 0x3F, 6, byte & 0x40
        while byte & 0x80:
            at += 1
            byte = data[at]
            value |= (byte & 0x7F) << shift
            shift += 7
        return -value if negative else value, at + 1

    assert data[0] == 0
    size, at = number(1)
    assert data[at] == 0
    at += 1
    out, position = bytearray(), 0
    while len(out) < size:
        n, at = number(at)
        assert position >= 0 and position + n <= len(base)
        out += bytes(
            (a + b) & 255
            for a, b in zip(data[at : at + n], base[position : position + n], strict=True)
        )
        at, position = at + n, position + n
        n, at = number(at)
        out += data[at : at + n]
        n, at = number(at + n)
        position += n
    assert (len(out), at) == (size, len(data))
    return bytes(out)


# ---- what the builder makes


def test_gunzip_restores_the_image(tmp_path):
    (tmp_path / "image.bin").write_bytes(NEW)
    (tmp_path / "payload.gz").write_bytes(GZIP)
    done = subprocess.run(
        "gunzip -c payload.gz | cmp - image.bin", shell=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    assert len(GZIP) < 0.8 * len(NEW)


def test_each_member_completes_64_kib_of_the_image_with_a_small_window():
    at = done = 0
    while at < len(GZIP):
        inflate = zlib.decompressobj(16 + WINDOW)
        content = inflate.decompress(GZIP[at:])
        assert inflate.eof
        at = len(GZIP) - len(inflate.unused_data)
        assert content == NEW[done : done + BOUNDARY]
        done += len(content)
    assert done == len(NEW)


def test_a_patch_restores_the_image_by_the_book():
    assert apply_by_the_book(OLD, gzip.decompress(DELTA)) == NEW
    assert len(DELTA) < 0.5 * len(GZIP)


def test_the_patch_of_the_reference():
    old = bytes(range(32))
    made = bytes.fromhex(
        "00230010000000000000000000000000000000000358595a0010000000000000000000000000000000000050"
    )
    new = old[:16] + b"XYZ" + old[16:]
    assert apply_by_the_book(old, made) == new
    ours = gzip.decompress(payloads.patch_payload(old, new))
    assert ours[:-1] == made[:-1]  # the last number leads nowhere: any will do


def test_detools_applies_our_patches(tmp_path):
    pytest.importorskip("detools", reason="detools is not installed: it needs a C compiler")
    for name, content in (("old.bin", OLD), ("new.bin", NEW), ("delta.gz", DELTA)):
        (tmp_path / name).write_bytes(content)
    detools = Path(sys.executable).with_name("detools")
    command = f"gunzip -c delta.gz > p && {detools} apply_patch old.bin p made.bin"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "made.bin").read_bytes() == NEW


def test_odd_images_round_trip(cases):
    noise = random.Random(7).randbytes(BOUNDARY + 5)
    pairs = [
        (NEW, NEW),
        (b"x", NEW[:70_000]),
        (NEW, b"y"),
        (NEW, noise),
        (NEW, bytes(BOUNDARY)),
        (bytes(2 * BOUNDARY), NEW[: 2 * BOUNDARY]),
        (NEW, NEW[40_000:] + NEW[:40_000]),
        (NEW[: BOUNDARY - 1], NEW[: BOUNDARY + 1]),
    ]
    for old, new in pairs:
        delta = payloads.patch_payload(old, new)
        assert apply_by_the_book(old, gzip.decompress(delta)) == new
        cases.add(delta, patch="detools", base=old, size=len(new))
        cases.add(payloads.gzip_payload(new), size=len(new))
    for result, (_, new) in zip(cases.run(), [p for p in pairs for _ in "ab"], strict=True):
        assert result.get("sha256") == hashlib.sha256(new).hexdigest(), result


def test_build_keeps_what_saves_enough_and_proves_each():
    other = sample.code(SIZE, seed=9)
    seen = []
    made = payloads.build(
        NEW,
        [payloads.Base("near", "aa", OLD), payloads.Base("far", "bb", other)],
        lambda *step: seen.append(step),
    )
    assert [(p.encoding, p.base and p.base.name, p.kept) for p in made] == [
        ("identity", None, True),
        ("gzip", None, True),
        ("gzip", "near", True),
        ("gzip", "far", False),
    ]
    assert made[1].content == GZIP and made[2].content == DELTA
    assert seen[-1][1] == seen[-1][2]
    noise = random.Random(3).randbytes(100_000)
    assert [p.kept for p in payloads.build(noise)] == [True, False]


def test_a_payload_that_does_not_give_the_image_is_not_published():
    base = payloads.Base("old", "aa", OLD)
    payloads.prove(DELTA, NEW, base)
    for content, of in ((DELTA, None), (GZIP, base), (GZIP[:-1000], None), (DELTA[:-1000], base)):
        with pytest.raises(ChecksumError, match="applied by the device's code"):
            payloads.prove(content, NEW, of)
    with pytest.raises(ChecksumError, match="64 KiB"):
        payloads.prove(member(NEW), NEW)
    with pytest.raises(ChecksumError):
        payloads.prove(DELTA, NEW, payloads.Base("other", "bb", OLD[1:]))


# ---- publishing


def firmware(version: str, changes: int, chip="esp32") -> bytes:
    return make_firmware(
        None,
        chip=chip,
        version=version,
        project="p",
        size=200_000,
        filler=sample.code(200_000, changes=changes),
    )


@pytest.fixture
def released(tmp_path):
    """Return a publisher of versions with content that compresses."""

    def publishing(version: str, changes: int, bases=(), **members) -> publish.Published:
        image = tmp_path / f"{version}.bin"
        image.write_bytes(firmware(version, changes))
        spec = publish.Spec(PRODUCT, version, (HARDWARE,), bases=tuple(bases), **members)
        return publish.publish(image, spec, signing_key(), tmp_path / "site")

    return publishing


def test_publish_from_a_version_and_from_a_file(released, tmp_path):
    released("1.0.0", 0)
    file = tmp_path / "field.bin"
    file.write_bytes(firmware("0.9.0", 30))
    done = released("1.1.0", 8, ["1.0.0", str(file)])
    entries = done.manifest["images"][0]["payloads"]
    assert [(p["encoding"], p.get("patch")) for p in entries] == [
        ("identity", None),
        ("gzip", None),
        ("gzip", "detools"),
        ("gzip", "detools"),
    ]
    assert [p["base"] for p in entries[2:]] == [
        firmware("1.0.0", 0)[-32:].hex(),
        firmware("0.9.0", 30)[-32:].hex(),
    ]
    assert entries[1]["size"] > 4 * entries[2]["size"]
    for entry in entries:
        content = (tmp_path / "site" / PRODUCT / entry["url"]).read_bytes()
        assert Path(entry["url"]).name.split(".")[0] == hashlib.sha256(content).hexdigest()
        assert len(content) == entry["size"]
    # A board that runs none of the bases takes the gzip, one that runs 1.0.0 the delta.
    image = release.parse(json.dumps(done.manifest).encode()).firmware
    encodings = ("identity", "gzip")
    assert payload.usable(image, "0" * 64, encodings)[0].url == entries[1]["url"]
    assert payload.usable(image, entries[2]["base"], encodings)[0].url == entries[2]["url"]


def test_the_command_tells_what_each_payload_saves(tmp_path):
    twinslot = Path(sys.executable).with_name("twinslot")
    subprocess.run(
        [twinslot, "keygen", "--no-passphrase", "--bits", "2048", "r.key"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    told = {}
    for version, changes, more in (
        ("1.0.0", 0, []),
        ("1.1.0", 8, ["--from", "1.0.0", "--from", "far.bin"]),
    ):
        (tmp_path / "far.bin").write_bytes(firmware("0.1.0", 900))
        (tmp_path / f"{version}.bin").write_bytes(firmware(version, changes))
        command = ["publish", f"{version}.bin", "--version", version, "--product", PRODUCT]
        command += ["--hardware", HARDWARE, "--key", "r.key", "--to", "site", "--json", *more]
        done = subprocess.run(
            [twinslot, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        told[version] = json.loads(done.stdout)
    assert [row["payload"] for row in told["1.0.0"]["sizes"]] == ["identity", "gzip"]
    rows = {row["payload"]: row for row in told["1.1.0"]["sizes"]}
    assert rows["delta from 1.0.0"]["bytes"] < rows["gzip"]["bytes"] < rows["identity"]["bytes"]
    assert len(told["1.1.0"]["payloads"]) == sum(row["kept"] for row in rows.values())
    assert rows.keys() == {"identity", "gzip", "delta from 1.0.0", "delta from far.bin"}


def test_publishing_again_keeps_the_payloads_of_the_release(released):
    released("1.0.0", 0)
    first = released("1.1.0", 8, ["1.0.0"])
    for bases in ((), ["1.0.0"]):
        again = released("1.1.0", 8, bases, rollout=50)
        assert not again.new
        assert again.manifest == first.manifest


def test_a_payload_damaged_on_disk_is_found(released, tmp_path):
    done = released("1.0.0", 0)
    path = tmp_path / "site" / PRODUCT / done.manifest["images"][0]["payloads"][1]["url"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ChecksumError, match=path.name):
        released("1.0.0", 0)


def test_a_base_that_is_none_is_refused(released, tmp_path):
    released("1.0.0", 0)
    shutil.copy(tmp_path / "1.0.0.bin", tmp_path / "same.bin")
    (tmp_path / "c3.bin").write_bytes(firmware("0.1.0", 3, "esp32c3"))
    (tmp_path / "text.bin").write_text("no image")
    for base, text in (
        ("9.9.9", "neither an image file nor a version"),
        ("../1.0.0", "neither an image file nor a version"),
        (str(tmp_path / "1.1.0.bin"), "very image"),
        (str(tmp_path / "c3.bin"), "saw ESP32-C3|saw esp32c3"),
    ):
        with pytest.raises(ConfigError, match=text):
            released("1.1.0", 4, [base])
    with pytest.raises(ImageError):
        released("1.1.0", 4, [str(tmp_path / "text.bin")])
    assert not (tmp_path / "site" / PRODUCT / "r" / "1.1.0.jws").exists()


# ---- the device's code: any pace, any cut


def test_every_step_size_gives_the_image(cases):
    steps = [None, 1, 2, 3, 7, 61, 256, 1000, 1023, 1024, 1025, 4095, 5000]
    for step in steps:
        cases.add(GZIP, step=step)
        cases.add(DELTA, step=step, patch="detools", base=OLD)
    for step in (1, 4095, 4096, 4097, None):
        cases.add(NEW, step=step, encoding="identity")
        cases.add(
            gzip.decompress(DELTA), step=step, patch="detools", base=OLD, encoding="identity"
        )
    assert {r.get("sha256") or r["error"] for r in cases.run()} == {SHA256}


def test_a_download_goes_on_at_each_boundary(cases):
    forms = [
        (GZIP, {}),
        (DELTA, {"patch": "detools", "base": OLD}),
        (NEW, {"encoding": "identity"}),
        (gzip.decompress(DELTA), {"patch": "detools", "base": OLD, "encoding": "identity"}),
    ]
    for content, job in forms:
        cases.add(content, **job)
    whole = cases.run()
    cases.jobs.clear()
    expected = []
    for (content, job), result in zip(forms, whole, strict=True):
        marks = result["boundaries"]
        assert [m[0] for m in marks] == [*range(BOUNDARY, SIZE, BOUNDARY), SIZE]
        assert len(marks[-1]) == 1 and all(len(m) == 3 for m in marks[:-1])
        for mark in marks[:-1]:
            cases.add(content, resume=mark, **job)
            expected.append(hashlib.sha256(NEW[mark[0] :]).hexdigest())
    results = cases.run()
    assert [r.get("sha256") or r["error"] for r in results] == expected
    assert len(expected) == 16


def test_a_patch_that_is_not_split_applies_and_is_not_resumable(cases):
    whole = next(iter(itertools.islice(payloads._chunks(b"", NEW), 1)))
    content = gzip.compress(patch((b"", whole[1], 0)), mtime=0)
    cases.add(content, patch="detools", base=OLD, window=15)
    cases.add(gzip.compress(NEW, mtime=0), window=15)
    for result in cases.run():
        assert result["sha256"] == SHA256
        assert all(len(m) == 1 for m in result["boundaries"])


# ---- adversarial gzip


def stored(data: bytes, last: bool = True) -> bytes:
    return struct.pack("<BHH", last, len(data), len(data) ^ 0xFFFF) + data


def gz(deflated: bytes, content: bytes, head: bytes = b"\x1f\x8b\x08\0\0\0\0\0\0\xff") -> bytes:
    return head + deflated + struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)


def refused(result: dict) -> bool:
    """An OtaError; never a crash, never an image."""
    return result.get("code") == "format"


def test_members_of_any_size_and_a_few_empty_ones_are_gzip_too(cases):
    empty = gzip.compress(b"", mtime=0)
    odd = [NEW[:1], NEW[1:5000], b"", b"", NEW[5000:200_000], NEW[200_000:]]
    cases.add(b"".join(member(part) for part in odd))
    cases.add(empty * 5 + GZIP)
    cases.add(GZIP + empty * 1000)  # what follows the image is nobody's business
    cases.add(GZIP + b"garbage")
    cases.add(empty * 1000 + GZIP)
    *good, bad = cases.run()
    assert [r.get("sha256") for r in good] == [SHA256] * 4
    assert refused(bad) and "without content" in bad["error"]


def test_a_window_larger_than_announced_is_refused(cases):
    far = random.Random(1).randbytes(6000)
    image = far * 3
    content = gzip.compress(image, mtime=0)
    cases.add(content, size=len(image), window=12)
    cases.add(content, size=len(image), window=13)
    narrow, wide = cases.run()
    assert refused(narrow)
    assert wide["sha256"] == hashlib.sha256(image).hexdigest()


def test_F61_bombs_end_at_the_size_of_the_image(cases):
    bomb = gzip.compress(bytes(50_000_000), mtime=0)
    cases.add(bomb, size=10_000)
    cases.add(bomb, size=10_000, patch="detools", base=OLD)
    plain, patched = cases.run()
    assert plain["sha256"] == hashlib.sha256(bytes(10_000)).hexdigest()
    assert refused(patched)


def test_floods_of_input_without_output_are_refused_at_a_bounded_price(cases):
    """RingIO holds 4 KiB: more input for 1 KiB of output is never fetched."""
    floods = {
        "empty stored blocks": stored(b"", last=False) * 5000 + stored(NEW[:100]),
        "empty fixed blocks": bytes.fromhex("0200") * 5000 + stored(NEW[:100]),
        "tiny stored blocks": b"".join(stored(b"x", last=False) for _ in range(5000)),
        "a name without end": b"",
    }
    # Ten bits of a fixed block that holds nothing, over and over.
    bits = "".join("010" + "0000000" for _ in range(8000))
    packed = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    floods["packed empty fixed blocks"] = packed
    dynamic = zlib.compressobj(9, zlib.DEFLATED, -WINDOW, 9, zlib.Z_DEFAULT_STRATEGY)
    floods["dynamic blocks, flushed"] = b"".join(
        dynamic.compress(NEW[i : i + 3]) + dynamic.flush(zlib.Z_FULL_FLUSH)
        for i in range(0, 3000, 3)
    )
    for name, deflated in floods.items():
        content = gz(deflated, NEW[:100])
        if name == "a name without end":
            content = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"n" * 60_000 + b"\0" + GZIP[10:]
        cases.add(content + GZIP)
    extra = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", 60_000) + bytes(60_000)
    cases.add(extra + GZIP[10:])
    for name, result in zip([*floods, "extra field"], cases.run(), strict=True):
        assert refused(result), (name, result)


def test_the_worst_honest_input_per_output_passes(cases):
    """zlib in its worst moods: every level and strategy, stored blocks as small as they get."""
    noise = random.Random(2).randbytes(70_000)
    images = [noise, NEW[:70_000], bytes(70_000)]
    for image in images:
        for level, memory, strategy in itertools.product(
            (0, 1, 6, 9), (1, 9), (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED)
        ):
            deflate = zlib.compressobj(level, zlib.DEFLATED, 16 + WINDOW, memory, strategy)
            cases.add(deflate.compress(image) + deflate.flush(), size=len(image))
        blocks = [image[i : i + 512] for i in range(0, len(image), 512)]
        chain = b"".join(stored(b, b is blocks[-1]) for b in blocks)
        cases.add(gz(chain, image), size=len(image))
    results = cases.run()
    share = len(results) // len(images)
    for number, result in enumerate(results):
        expected = hashlib.sha256(images[number // share]).hexdigest()
        assert result.get("sha256") == expected, (number, result)


def test_F71_a_payload_truncated_at_each_byte_is_refused(cases):
    image = NEW[:1500]
    content = member(image[:700]) + member(image[700:])
    for n in range(len(content)):
        cases.add(content[:n], size=len(image))
    *short, tail = cases.run()[: len(content)]
    assert all(refused(r) for r in [*short[:-9]])
    # From the trailer's first byte on the image is complete: its hash is the judge.
    for result in [*short[-9:], tail]:
        assert refused(result) or result["sha256"] == hashlib.sha256(image).hexdigest()


def test_bit_flips_are_refused_or_change_nothing_or_meet_the_hash(cases):
    image = NEW[:1500]
    content = member(image[:700]) + member(image[700:])
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        cases.add(bytes(flipped), size=len(image))
    good = hashlib.sha256(image).hexdigest()
    results = cases.run()
    assert all(refused(r) or "sha256" in r for r in results)
    passed = [at for at, r in enumerate(results) if r.get("sha256") == good]
    # Dates and flags of the heads, lengths, codes that nothing uses, the last trailer.
    assert len(passed) < 40


def test_noise_never_crashes_the_decoder(cases):
    source = random.Random(11)
    for _ in range(300):
        cases.add(GZIP[:10] + source.randbytes(source.randint(0, 3000)), size=5000)
        damaged = bytearray(GZIP[:3000])
        for _ in range(source.randint(1, 8)):
            damaged[source.randrange(len(damaged))] = source.getrandbits(8)
        cases.add(bytes(damaged), size=5000)
        cases.add(bytes(damaged), size=5000, patch="detools", base=OLD)
    for result in cases.run():
        assert refused(result) or "sha256" in result


# ---- adversarial patches


BASE = bytes(range(256)) * 20
FINE = patch((bytes(100), b"extra", 50), (bytes(200), b"", 0))


def test_a_patch_by_hand(cases):
    image = BASE[:100] + b"extra" + BASE[150:350]
    assert apply_by_the_book(BASE, FINE) == image
    wrap = patch((b"\xff" * 256, b"", 0))
    cases.add(FINE, encoding="identity", patch="detools", base=BASE, size=len(image))
    cases.add(member(FINE), patch="detools", base=BASE, size=len(image))
    cases.add(wrap, encoding="identity", patch="detools", base=BASE, size=256)
    plain, packed, wrapped = cases.run()
    assert plain["sha256"] == packed["sha256"] == hashlib.sha256(image).hexdigest()
    assert (
        wrapped["sha256"] == hashlib.sha256(bytes((b - 1) & 255 for b in BASE[:256])).hexdigest()
    )


def huge(value):
    """A number alone, where a chunk begins."""
    return varint(value)


HOSTILE = {
    "wrong type: in place": patch((b"", b"xx", 0), head=b"\x10"),
    "wrong type: hdiffpatch": patch((b"", b"xx", 0), head=b"\x20"),
    "compressed: heatshrink": patch((b"", b"xx", 0), head=b"\x04"),
    "compressed: lzma": patch((b"", b"xx", 0), head=b"\x01"),
    "reserved bit": patch((b"", b"xx", 0), head=b"\x80"),
    "data format": patch((b"", b"xx", 0), data_format=5),
    "data format, negative": patch((b"", b"xx", 0), data_format=-1),
    "declares a huge size": patch((b"", b"xx", 0), size=1 << 29),
    "declares 31 bits": patch((b"", b"xx", 0), size=1 << 30),
    "declares a negative size": patch((b"", b"xx", 0), size=-2),
    "declares another size": patch((b"", b"xx", 0), size=3),
    "beyond the base": patch((bytes(len(BASE) + 1), b"", 0), size=2),
    "beyond the base by a jump": patch((b"", b"x", len(BASE)), (b"\0", b"", 0), size=2),
    "behind the base": patch((b"", b"x", len(BASE) + 1), (b"", b"x", 0), size=2),
    "before the base": patch((b"", b"x", -1), (b"\0", b"", 0), size=2),
    "negative diff size": patch(b"\x41", size=2),
    "negative extra size": patch(b"\x00\x41", size=2),
    "diff of 30 bits": patch(huge((1 << 30) - 1), size=2),
    "diff of 31 bits": patch(huge(1 << 30), size=2),
    "diff of 32 bits": patch(huge((1 << 32) + 1), size=2),
    "diff of 64 bits": patch(huge(1 << 63), size=2),
    "adjustment of 31 bits": patch((b"", b"x", 1 << 30), (b"", b"x", 0), size=2),
    "adjustment of -31 bits": patch((b"", b"x", -(1 << 30)), (b"", b"x", 0), size=2),
    "a number that never ends": patch(b"\x80" * 1000, size=2),
    "a number that ends too late": patch(b"\x80\x80\x80\x80\x80\x80\x00", size=2),
    "ends in the header": b"\0",
    "ends in its size": b"\0\x82",
    "ends before a chunk": patch(size=2),
    "ends in a number": patch(b"\x80", size=2),
    "ends in diff": patch(varint(2) + b"\0", size=2),
    "ends in extra": patch(varint(0) + varint(2) + b"x", size=2),
    "empty chunks without end": patch(b"\0\0\0" * 5000, size=2),
    "nothing": b"",
}


def test_I18_F92_hostile_patches_are_refused(cases):
    for content in HOSTILE.values():
        for how in ({"encoding": "identity"}, {}):
            packed = content if how else gzip.compress(content, mtime=0)
            cases.add(packed, patch="detools", base=BASE, size=2, **how)
    names = [name for name in HOSTILE for _ in range(2)]
    for name, result in zip(names, cases.run(), strict=True):
        assert refused(result), (name, result)


def test_F91_a_wrong_base_gives_another_hash_never_the_image(cases):
    near = bytearray(OLD)
    near[1000] ^= 1
    cases.add(DELTA, patch="detools", base=bytes(near))
    cases.add(DELTA, patch="detools", base=OLD + b"\xff" * 1000)  # a slot is longer than its image
    cases.add(DELTA, patch="detools", base=OLD[:-4000])
    wrong, longer, short = cases.run()
    assert wrong["sha256"] != SHA256
    assert longer["sha256"] == SHA256
    assert refused(short)


def test_the_last_adjustment_may_lead_anywhere(cases):
    for last in (-(1 << 29), 1 << 29, -16):
        content = patch((bytes(100), b"", last))
        cases.add(content, encoding="identity", patch="detools", base=BASE, size=100)
        cases.add(member(content), patch="detools", base=BASE, size=100)
    assert {r.get("sha256") for r in cases.run()} == {hashlib.sha256(BASE[:100]).hexdigest()}


def test_one_byte_pieces_are_slow_but_right(cases):
    image = BASE[:3000]
    content = patch(*[(b"\0", b"", 0)] * len(image))
    cases.add(member(content), patch="detools", base=BASE, size=len(image))
    assert cases.run()[0]["sha256"] == hashlib.sha256(image).hexdigest()

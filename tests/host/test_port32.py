"""A virtual board on a MicroPython of 32 bits, whose objects are as large as an ESP32's."""

import hashlib

import pytest

from twinslot_tools import bench, port32


@pytest.fixture(scope="module")
def narrow():
    try:
        command = str(port32.fetch())
    except port32.PortError as exc:
        pytest.skip(str(exc))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROPYTHON", command)
        yield


@pytest.mark.parametrize("form, kib", [("identity", 44), ("gzip", 60), ("delta", 64)])
def test_an_update_completes_in_less_heap_than_on_64_bits(narrow, form, kib):
    assert bench.completes(form, kib)


def test_15_kb_are_live_beyond_what_is_imported(narrow):
    live = {figure.name: figure.value for figure in bench.live_heap()}
    assert live["identity"] <= 15 * 1024


def test_a_package_that_is_not_what_the_index_says_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(port32, "_get", lambda path: b"something else")
    fields = {"Filename": "pool/x.deb", "SHA256": hashlib.sha256(b"what was built").hexdigest()}
    with pytest.raises(port32.PortError, match=r"pool/x\.deb: saw SHA-256 .*, expected"):
        port32._unpack(fields, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(port32, "_get", lambda path: port32.lzma.compress(b"Package: other\n"))
    with pytest.raises(port32.PortError, match="no package micropython"):
        port32.fetch(tmp_path)

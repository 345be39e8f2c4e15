"""What the doctor finds, and the remedy it names."""

import json
import os

import esp32
import workbench as bench
from workbench import ABORTED, BLOCK, PENDING, TORN, VALID

import twinslot

HEAP = "1M"
OLD = bench.make_image(2 * BLOCK)
NO_WIFI = "no wifi in /ota.json -> safe mode connects by it, and by it alone"
KEY = {"kty": "RSA", "n": "v" + "7" * 340 + "Q", "e": "AQAB", "alg": "PS256"}


def board(*entries, config=None, **journal):
    bench.otadata(*(entries or ((1, VALID),)))
    bench.put(OLD)
    bench.new_journal(**journal)
    settings = {
        "product": "lamp",
        "url": "https://updates.example/",
        "keys": "/keys.json",
        "fingerprint": "ab" * 32,
    }
    settings.update(config or {})
    with open("/ota.json", "w") as f:
        json.dump(settings, f)
    with open("/keys.json", "w") as f:
        json.dump({"keys": [KEY]}, f)


def found():
    """Return {topic: (level, text and remedy)} of the doctor; the worst of each topic."""
    order = ("ok", "warn", "fail")
    topics = {}
    for level, topic, text, remedy in twinslot.doctor():
        if topic not in topics or order.index(level) > order.index(topics[topic][0]):
            topics[topic] = (level, text + " -> " + remedy)
    return topics


def test_a_board_in_good_order():
    board()
    topics = found()
    for topic in ("firmware", "running", "slot size", "otadata", "fallback", "journal", "heap"):
        assert topics[topic][0] == "ok", topics[topic]
    assert topics["config"][0] == "ok" and topics["keys"][0] == "ok", topics
    assert "transport" not in topics


def test_a_network_that_only_the_application_joins():
    board()
    assert found()["network"] == ("warn", NO_WIFI)
    board(config={"wifi": {"ssid": "shed"}})
    assert "network" not in found()


def test_the_clock_of_a_board_just_switched_on():
    board()
    assert found()["clock"][0] == "warn"


def test_a_trial_and_an_unarmed_rollback():
    board((3, PENDING), (2, VALID))
    assert found()["otadata"][0] == "warn"
    board((3, TORN), (2, VALID))
    level, text = found()["otadata"]
    assert level == "fail" and "rollback" in text and "MicroPython 1.21" in text


def test_otadata_that_names_another_slot():
    board((1, VALID), (2, VALID))
    level, text = found()["otadata"]
    assert level == "fail" and "ota_1" in text and "ota_0" in text and "reset" in text


def test_history_is_told():
    board((1, VALID), (2, ABORTED), failed=[["ab" * 32, "1.5.0", "check 'lamp' failed", 3]])
    level, text = found()["history"]
    assert level == "warn" and "1.5.0" in text and "lamp" in text


def test_an_nvs_that_is_full():
    board()
    from twinslot.journal import Journal

    journal = Journal.shared()

    class Full:
        def __init__(self, nvs):
            self.get_i32 = nvs.get_i32
            self.erase_key, self.commit = nvs.erase_key, nvs.commit

        def set_blob(self, key, value):
            raise OSError(-4357, "ESP_ERR_NVS_NOT_ENOUGH_SPACE")

        set_i32 = set_blob

    journal._nvs = Full(journal._nvs)
    level, text = found()["journal"]
    assert level == "fail" and "NVS" in text
    bench.new_journal()


def test_an_idf_heap_without_room_for_tls():
    board()
    kept = esp32.idf_heap_info
    esp32.idf_heap_info = lambda what: [(100_000, 40_000, 9_000, 9_000)]
    try:
        level, text = found()["IDF heap"]
    finally:
        esp32.idf_heap_info = kept
    assert level == "fail" and "9000" in text


def test_a_source_that_hides_its_compiled_module():
    board()
    for name in ("/lib/spare.py", "/lib/spare.mpy"):
        with open(name, "w") as f:
            f.write("")
    level, text = found()["files"]
    os.remove("/lib/spare.py")
    os.remove("/lib/spare.mpy")
    assert level == "fail" and "spare.py" in text and "remove" in text


def test_a_configuration_that_is_wrong():
    board(config={"poll": "often"})
    level, text = found()["config"]
    assert level == "fail" and "poll" in text
    board(config={"keys": "/nosuch.json"})
    level, text = found()["keys"]
    assert level == "fail" and "nosuch" in text
    os.remove("/ota.json")
    assert found()["config"][0] == "fail"


def test_http_is_pointed_out():
    board(config={"url": "http://updates.example/", "allow_http": True})
    level, text = found()["transport"]
    assert level == "warn" and "https" in text

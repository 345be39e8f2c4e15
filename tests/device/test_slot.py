"""FirmwareSlot: what it erases and writes, in which order, what it refuses, what it believes."""

import asyncio
import binascii
import gc
import struct

import workbench as bench
from esp32 import Partition
from harness import raises
from workbench import ABORTED, BLANK, BLOCK, INVALID, NEW, PENDING, TORN, VALID, Spy

import twinslot.slot
from twinslot.errors import (
    BusyError,
    ChecksumError,
    HardwareError,
    ImageError,
    PartitionError,
    RollbackError,
    SpaceError,
)
from twinslot.slot import FirmwareSlot

HEAP = "1M"
TIMEOUT = 60
FF = b"\xff"


def prepared(**fail):
    """A slot with a log, on a board that runs ota_0 confirmed and has nothing in ota_1."""
    bench.otadata((1, VALID))
    bench.erase()
    slot = FirmwareSlot(Spy)
    Spy.reset(**fail)
    return slot


async def fill(slot, image, described=None):
    """Write a whole image, and finish."""
    offset = await slot.begin(described or bench.signed(image))
    view = memoryview(image)
    for at in range(offset, len(image), BLOCK):
        slot.write(bench.pieces(view[at : at + BLOCK]))
    await slot.finish()


async def refusal(kind, coroutine):
    """Await what must raise; return the exception."""
    try:
        await coroutine
    except kind as exc:
        return exc
    raise AssertionError("nothing raised, expected %s" % kind.__name__)


# -- writing


async def test_block_0_is_erased_first_and_the_header_is_written_last():
    slot = prepared()
    image = bench.make_image(3 * BLOCK)
    await fill(slot, image)
    assert Spy.log == [
        ("erase", 0),
        ("write", 32, BLOCK - 32),
        ("erase", 1),
        ("write", BLOCK, BLOCK),
        ("erase", 2),
        ("write", 2 * BLOCK, BLOCK),
        ("write", 0, 32),
    ]
    assert bench.read(len(image)) == image


async def test_until_finish_the_slot_has_no_header():
    slot = prepared()
    image = bench.make_image(2 * BLOCK)
    await slot.begin(bench.signed(image))
    slot.write(bench.pieces(memoryview(image)[:BLOCK]))
    slot.write(bench.pieces(memoryview(image)[BLOCK:]))
    assert bench.read(32) == FF * 32
    assert bench.read(BLOCK - 32, 32) == image[32:BLOCK]
    raises(OSError, Partition("ota_1").set_boot)


async def test_the_last_block_may_be_shorter_and_the_rest_of_it_is_blank():
    slot = prepared()
    bench.put(b"\x00" * 3 * BLOCK)  # of an older image
    image = bench.make_image(2 * BLOCK + 48)
    await fill(slot, image)
    assert bench.read(len(image)) == image
    assert bench.read(BLOCK - 48, len(image)) == FF * (BLOCK - 48)
    slot.activate()
    bench.otadata((1, VALID))


async def test_an_image_of_one_short_block():
    slot = prepared()
    image = bench.make_image(1008)
    await fill(slot, image)
    assert bench.read(1008) == image
    assert Spy.erases() == [0]


async def test_equal_blocks_cost_no_erase_and_no_write():
    slot = prepared()
    image = bench.make_image(4 * BLOCK + 512)
    bench.put(image)
    bench.flip(2 * BLOCK + 7)
    Spy.reset()
    await fill(slot, image)
    assert Spy.erases() == [0, 2], "block 0 always, and the one that differs"
    assert bench.read(len(image)) == image


async def test_a_short_last_block_that_is_equal_is_left_alone():
    slot = prepared()
    image = bench.make_image(BLOCK + 512)
    bench.put(image)
    bench.flip(9)  # or the slot would be found complete
    bench.flip(len(image) + 5)  # behind the image
    Spy.reset()
    await slot.begin(bench.signed(image))
    slot.write(bench.pieces(memoryview(image)[:BLOCK]))
    slot.write(bench.pieces(memoryview(image)[BLOCK:]))
    assert Spy.erases() == [0]


async def test_F3_what_another_boot_has_left_is_written_again_even_if_it_reads_well():
    image = bench.make_image(4 * BLOCK + 512)
    kept = await written(image, 2)
    bench.put(image, first=2)  # as it may read, and not stay
    again = FirmwareSlot(Spy)
    Spy.reset()
    assert await again.begin(bench.signed(image), kept) == 2 * BLOCK
    for at in range(2 * BLOCK, len(image), BLOCK):
        again.write(bench.pieces(memoryview(image)[at : at + BLOCK]))
    assert Spy.erases() == [2, 3, 4]
    # A lost connection, in one boot, leaves nothing in doubt.
    slot = prepared()
    bench.put(image)
    assert await slot.begin(bench.signed(bench.make_image(4 * BLOCK))) == 0
    bench.put(FF * BLOCK)
    Spy.reset()
    assert await slot.begin(bench.signed(image)) == 0
    for at in range(0, len(image), BLOCK):
        slot.write(bench.pieces(memoryview(image)[at : at + BLOCK]))
    assert Spy.erases() == [0]


async def test_F3_F21_a_write_that_failed_leaves_its_block_in_doubt():
    image = bench.make_image(3 * BLOCK)
    slot = prepared()
    bench.put(bench.make_image(4 * BLOCK))
    for where in (2 * BLOCK, 2 * BLOCK + 512, 3 * BLOCK - 512):
        Spy.reset(write=where)
        await refusal(PartitionError, fill(slot, image))
        bench.put(image, first=1)  # as it may read now
        Spy.reset()
        await fill(slot, image)
        assert Spy.erases() == [0, 1, 2]
        bench.put(bench.make_image(4 * BLOCK))


async def test_block_0_is_erased_even_if_it_reads_blank():
    # F3: an interrupted erase may read so too.
    slot = prepared()
    image = bench.make_image(2 * BLOCK)
    await slot.begin(bench.signed(image))
    slot.write(bench.pieces(memoryview(image)[:BLOCK]))
    assert Spy.erases() == [0]


def test_writes_come_in_blocks_and_after_begin():
    slot = prepared()
    raises(ValueError, slot.write, bench.pieces(bytes(BLOCK)))


async def test_a_block_comes_in_pieces_that_flash_can_take_but_for_the_last():
    slot = prepared()
    image = bench.make_image(3 * BLOCK)
    await slot.begin(bench.signed(image))
    view = memoryview(image)
    whole = bench.pieces(view[:BLOCK])
    for wrong in (
        [],
        [view[:BLOCK]],
        [view[:513]],
        [view[:511], view[511:1022]],
        [view[:496], view[496:1008]],
        whole[:-1] + [view[:513]],
        whole + [view[:1]],
    ):
        raises(ValueError, slot.write, wrong)
    assert Spy.log == []
    slot.write(whole)


async def test_pieces_of_several_sizes_are_compared_and_programmed():
    image = bench.make_image(3 * BLOCK + 16)
    slot = prepared()
    for differs, erased in ((None, [0, 1, 2, 3]), (9, [0]), (2 * BLOCK + 3000, [0, 2])):
        if differs:
            bench.flip(differs)
        Spy.reset()
        await slot.begin(bench.signed(image))
        for at in range(0, len(image), BLOCK):
            view, block = memoryview(image)[at : at + BLOCK], []
            for n in [512] * 5 + [256] * 4 + [128, 32, 96] + [128] * 2:
                if view:
                    block.append(view[:n])
                view = view[n:]
            slot.write(block)
        await slot.finish()
        assert Spy.erases() == erased, "no block that holds its bytes, but the first"
        assert bench.read(len(image)) == image


class Scarce:
    """The builtin ``bytearray`` in a heap with one hole of ``first`` bytes, the others smaller."""

    def __init__(self, first, others):
        self.first = first
        self.others = others
        self.given = []

    def __call__(self, n):
        if n > (self.others if self.given else self.first):
            raise MemoryError("no hole of %d" % n)
        self.given.append(n)
        return bytearray(n)


def test_a_heap_full_of_holes_gives_smaller_pieces():
    try:
        for others, sizes in (
            (512, [512] * 8),
            (256, [512] + [256] * 14),
            (200, [512] + [128] * 28),
        ):
            twinslot.slot.bytearray = Scarce(512, others)
            assert [len(piece) for piece in twinslot.slot.new_block()] == sizes
        for first, others in ((512, 127), (511, 511)):
            twinslot.slot.bytearray = Scarce(first, others)
            raises(MemoryError, twinslot.slot.new_block)
    finally:
        del twinslot.slot.bytearray


async def test_finish_may_be_asked_for_once_more():
    slot = prepared()
    await fill(slot, bench.make_image(2 * BLOCK))
    Spy.reset()
    await slot.finish()
    assert Spy.log == []
    slot.activate()


async def test_a_short_block_can_only_be_the_last():
    slot = prepared()
    image = bench.make_image(3 * BLOCK)
    await slot.begin(bench.signed(image))
    view = memoryview(image)
    raises(ValueError, slot.write, bench.pieces(view[: BLOCK + 1]))
    slot.write(bench.pieces(view[:1000]))
    raises(ValueError, slot.write, bench.pieces(view[1000:2000]))


async def test_more_bytes_than_announced_are_refused_before_they_are_written():
    slot = prepared()
    image = bench.make_image(2 * BLOCK)
    await slot.begin(bench.signed(image, size=BLOCK + 16))
    slot.write(bench.pieces(memoryview(image)[:BLOCK]))
    raises(ImageError, slot.write, bench.pieces(memoryview(image)[BLOCK:]))
    assert Spy.erases() == [0]


# -- refused before anything is erased


async def first_block(image, kind):
    slot = prepared()
    await slot.begin(bench.signed(image))
    exc = raises(kind, slot.write, bench.pieces(memoryview(image)[:BLOCK]))
    assert not Spy.log, Spy.log
    return str(exc)


async def test_a_file_that_is_no_image_is_refused_before_the_first_erase():
    image = bench.make_image(2 * BLOCK)
    image[0] = 0x7F
    assert "0x7f" in await first_block(image, ImageError)


async def test_an_image_for_another_chip_is_refused_before_the_first_erase():
    text = await first_block(bench.make_image(2 * BLOCK, chip_id=9), HardwareError)
    assert "esp32s3" in text and "expected esp32" in text


async def test_a_bootloader_is_refused_before_the_first_erase():
    image = bench.make_image(2 * BLOCK)
    image[32:36] = b"\x00\x00\x00\x00"  # no app descriptor
    assert "descriptor" in await first_block(image, ImageError)


async def test_an_image_without_appended_hash_is_refused_before_the_first_erase():
    # Its own checksum is one byte: set_boot() could not tell rot from truth.
    await first_block(bench.make_image(2 * BLOCK, hash_appended=0), ImageError)


async def test_F23_sizes_that_fit_no_slot():
    slot = prepared()
    size = Partition("ota_1").info()[3]
    exc = await refusal(SpaceError, slot.begin(bench.signed(b"", size=size + 1, build="ab")))
    assert str(size + 1) in str(exc) and str(size) in str(exc)
    assert await slot.begin(bench.signed(b"", size=size, build="ab")) == 0
    assert not Spy.log


async def test_F23_an_image_of_no_bytes_and_of_one():
    slot = prepared()
    await slot.begin(bench.signed(b"", build="ab" * 32))
    await refusal(ImageError, slot.finish())
    await slot.begin(bench.signed(b"\xe9"))
    raises(ImageError, slot.write, bench.pieces(b"\xe9"))
    assert not Spy.log


async def test_F22_the_running_slot_is_never_written():
    before = bench.read(4 * BLOCK, label="ota_0")
    slot = prepared()
    await fill(slot, bench.make_image(4 * BLOCK))
    assert bench.read(4 * BLOCK, label="ota_0") == before
    assert slot.status()["inactive"] == "ota_1"


# -- what finish() believes


async def begun(image, described=None):
    """Write an image but don't finish."""
    slot = prepared()
    await slot.begin(described or bench.signed(image))
    for at in range(0, len(image), BLOCK):
        slot.write(bench.pieces(memoryview(image)[at : at + BLOCK]))
    return slot


async def test_finish_wants_every_byte():
    slot = prepared()
    image = bench.make_image(2 * BLOCK)
    await slot.begin(bench.signed(image))
    slot.write(bench.pieces(memoryview(image)[:BLOCK]))
    exc = await refusal(ImageError, slot.finish())
    assert str(BLOCK) in str(exc) and str(2 * BLOCK) in str(exc)
    raises(PartitionError, slot.activate)


async def test_there_is_nothing_to_finish_before_begin():
    assert "0 bytes" in str(await refusal(ImageError, FirmwareSlot(Spy).finish()))


async def test_a_header_that_does_not_arrive_is_found():
    slot = prepared(lost=0)
    await refusal(ImageError, fill(slot, bench.make_image(2 * BLOCK)))
    raises(PartitionError, slot.activate)


async def test_F19_bit_rot_between_write_and_finish_is_found():
    for offset in (33, BLOCK + 5, 2 * BLOCK - 1, 2 * BLOCK + 100):
        image = bench.make_image(2 * BLOCK + 512)
        slot = await begun(image)
        bench.flip(offset, 0x10)
        await refusal(ChecksumError, slot.finish())
        assert bench.read(32) == FF * 32, "no header: it can't boot"
        raises(PartitionError, slot.activate)


async def test_F21_a_sector_that_does_not_take_the_write_is_found():
    image = bench.make_image(3 * BLOCK)
    slot = await begun(image)
    Partition("ota_1").ioctl(6, 1)  # as if its program command had done nothing
    await refusal(ChecksumError, slot.finish())
    assert bench.read(32) == FF * 32


async def test_an_image_that_is_not_the_signed_one_gets_no_header():
    image = bench.make_image(2 * BLOCK)
    other = bench.make_image(2 * BLOCK, seed=2)
    slot = await begun(image, bench.signed(other))
    await refusal(ChecksumError, slot.finish())
    assert bench.read(32) == FF * 32


async def test_a_build_that_is_not_the_signed_one_gets_no_header():
    image = bench.make_image(2 * BLOCK)
    slot = await begun(image, bench.signed(image, build="12" * 32))
    await refusal(ImageError, slot.finish())
    assert bench.read(32) == FF * 32


async def test_a_signed_digest_that_is_empty_never_means_do_not_check():
    image = bench.make_image(2 * BLOCK)
    for sha256 in ("", " ", "0" * 64):
        slot = await begun(image, bench.signed(image, sha256=sha256))
        await refusal(ChecksumError, slot.finish())


async def test_F21_flash_that_refuses_is_a_partition_error_and_no_oserror():
    image = bench.make_image(3 * BLOCK)
    for fail in ({"erase": 0}, {"write": 32}, {"erase": 2}, {"write": 2 * BLOCK}):
        slot = prepared(**fail)
        await refusal(PartitionError, fill(slot, image))
    slot = prepared(write=0)  # the header
    await refusal(PartitionError, fill(slot, image))
    raises(PartitionError, slot.activate)
    slot = prepared(read=BLOCK)
    await refusal(PartitionError, fill(slot, image))


async def test_after_a_failure_the_next_attempt_works():
    image = bench.make_image(3 * BLOCK)
    slot = prepared(write=2 * BLOCK)
    await refusal(PartitionError, fill(slot, image))
    slot.abandon()
    Spy.reset()
    await fill(slot, image)
    assert bench.read(len(image)) == image


# -- begin() looks at what is there


async def test_F4_a_complete_slot_is_found_again_without_a_byte():
    slot = prepared()
    image = bench.make_image(3 * BLOCK + 256)
    await fill(slot, image)
    for again in (slot, FirmwareSlot(Spy)):
        Spy.reset()
        assert await again.begin(bench.signed(image)) == len(image)
        await again.finish()
        # F3: its header may have been cut short, and read well by chance.
        assert Spy.log == [("write", 0, BLOCK)]
    Spy.reset()
    again.activate()
    assert Spy.log == [("set_boot", "ota_1")]
    bench.otadata((1, VALID))


async def written(image, blocks):
    """Write the first blocks of an image; return the checkpoint behind them."""
    slot = prepared()
    await slot.begin(bench.signed(image))
    for at in range(0, blocks * BLOCK, BLOCK):
        slot.write(bench.pieces(memoryview(image)[at : at + BLOCK]))
    kept = slot.checkpoint()
    assert kept["offset"] == blocks * BLOCK
    assert kept["crc"] == binascii.crc32(image[: blocks * BLOCK])
    assert kept["header"] == binascii.hexlify(image[:32]).decode()
    return kept


async def test_writing_goes_on_at_a_checkpoint():
    image = bench.make_image(4 * BLOCK + 512)
    for blocks in range(1, 5):
        kept = await written(image, blocks)
        slot = FirmwareSlot(Spy)
        Spy.reset()
        assert await slot.begin(bench.signed(image), kept) == blocks * BLOCK
        assert slot.checkpoint() == kept
        for at in range(blocks * BLOCK, len(image), BLOCK):
            slot.write(bench.pieces(memoryview(image)[at : at + BLOCK]))
        assert slot.checkpoint()["crc"] == binascii.crc32(image)
        await slot.finish()
        assert Spy.erases() == list(range(blocks, 5))
        assert bench.read(len(image)) == image


async def test_what_is_no_checkpoint_of_this_slot_is_not_gone_on_from():
    image = bench.make_image(4 * BLOCK)
    kept = await written(image, 4)
    whole = kept["crc"]
    head, three = kept["header"], binascii.crc32(image[: 3 * BLOCK])
    for change in (
        {"offset": None},
        {"offset": "4096"},
        {"offset": 3.0 * BLOCK, "crc": three},
        {"offset": 2 * BLOCK + 1, "crc": three},
        {"offset": -BLOCK, "crc": 0},
        {"offset": 4 * BLOCK, "crc": whole},
        {"offset": 5 * BLOCK, "crc": whole},
        {"offset": 3 * BLOCK, "crc": three ^ 1},
        {"offset": 3 * BLOCK, "crc": None},
        {"offset": 3 * BLOCK, "crc": three, "header": None},
        {"offset": 3 * BLOCK, "crc": three, "header": 5},
        {"offset": 3 * BLOCK, "crc": three, "header": head[:-1]},
        {"offset": 3 * BLOCK, "crc": three, "header": head[:-2]},
        {"offset": 3 * BLOCK, "crc": three, "header": head + "00"},
        {"offset": 3 * BLOCK, "crc": three, "header": "zz" + head[2:]},
        {"offset": 3 * BLOCK, "crc": three, "header": "ea" + head[2:]},
    ):
        slot = FirmwareSlot(Spy)
        assert await slot.begin(bench.signed(image), dict(kept, **change)) == 0, change
        assert slot.checkpoint()["crc"] == 0
    good = dict(kept, offset=3 * BLOCK, crc=three)
    assert await FirmwareSlot(Spy).begin(bench.signed(image), good) == 3 * BLOCK


async def test_other_tasks_get_their_turn_while_flash_is_read():
    turns = []

    async def sleep_ms(ms):
        turns.append(ms)

    image = bench.make_image(8 * BLOCK + 16)
    kept = await written(image, 8)
    slot = FirmwareSlot(Spy)
    real = asyncio.sleep_ms
    asyncio.sleep_ms = sleep_ms
    try:
        await slot.begin(bench.signed(image), kept)
        assert turns == [0, 0], "at every fourth block"
        slot.write(bench.pieces(memoryview(image)[8 * BLOCK :]))
        await slot.finish()
        assert turns == [0, 0] + [0] * 9
    finally:
        asyncio.sleep_ms = real


async def test_a_slot_that_only_looks_complete_is_written_again():
    slot = prepared()
    image = bench.make_image(3 * BLOCK)
    bench.put(image)
    bench.flip(BLOCK + 77)  # header and build are the signed ones
    assert await slot.begin(bench.signed(image)) == 0
    await fill(slot, image)
    assert Spy.erases() == [0, 1]


async def test_a_slot_that_can_not_be_read_is_a_partition_error():
    slot = prepared()
    image = bench.make_image(2 * BLOCK)
    bench.put(image)
    Spy.reset(read=BLOCK)
    await refusal(PartitionError, slot.begin(bench.signed(image)))


async def test_the_only_fallback_of_a_trial_is_never_overwritten():
    slot = prepared()
    bench.otadata((1, PENDING))
    image = bench.make_image(2 * BLOCK)
    await refusal(BusyError, slot.begin(bench.signed(image)))
    raises(ValueError, slot.write, bench.pieces(memoryview(image)[:BLOCK]))
    assert not Spy.log
    bench.otadata((1, VALID))


# -- switching


async def test_activate_needs_a_finished_image():
    slot = prepared()
    bench.put(bench.make_image(2 * BLOCK))
    raises(PartitionError, slot.activate)
    slot = await begun(bench.make_image(2 * BLOCK))
    raises(PartitionError, slot.activate)
    await slot.finish()
    slot.abandon()
    raises(PartitionError, slot.activate)


async def test_activate_is_one_write_of_the_platform():
    slot = prepared()
    await fill(slot, bench.make_image(2 * BLOCK))
    Spy.reset()
    slot.activate()
    assert Spy.log == [("set_boot", "ota_1")]
    assert bench.states() == {0: VALID, 1: NEW}
    # A second time would take the record of the old slot: same sequence, other entry.
    raises(PartitionError, slot.activate)
    assert bench.states() == {0: VALID, 1: NEW}
    bench.otadata((1, VALID))


async def test_rot_between_finish_and_activate_is_found():
    slot = prepared()
    await fill(slot, bench.make_image(2 * BLOCK))
    bench.flip(BLOCK + 9)
    raises(ChecksumError, slot.activate)
    assert bench.states() == {0: VALID}


async def test_F99_a_slot_that_was_exchanged_after_finish_is_not_activated():
    slot = prepared()
    await fill(slot, bench.make_image(2 * BLOCK))
    bench.put(bench.make_image(2 * BLOCK, seed=3))  # valid in itself
    raises(ImageError, slot.activate)
    assert bench.states() == {0: VALID}


def settled(*entries):
    bench.otadata(*entries)
    Spy.reset()
    return FirmwareSlot(Spy)


def test_F16_confirm_is_idempotent_and_writes_once():
    slot = settled((1, PENDING))
    slot.confirm()
    slot.confirm()
    assert Spy.log == [("confirm",)]
    assert bench.states() == {0: VALID}


def test_confirm_only_when_boot_and_running_agree():
    # The bootloader fell back from ota_1: confirming would mark the damaged one valid.
    bench.erase()
    slot = settled((1, VALID), (2, PENDING))
    raises(PartitionError, slot.confirm)
    assert not Spy.log
    assert bench.states() == {0: VALID, 1: PENDING}
    assert not slot.is_settled()
    slot.settle()
    assert slot.is_settled()
    assert bench.states()[0] == VALID
    bench.otadata((1, VALID))


def test_confirm_of_what_runs_though_it_was_given_up():
    for state in (ABORTED, INVALID):
        slot = settled((1, state))
        slot.confirm()
        assert bench.states() == {0: VALID}


def test_confirm_of_a_state_that_a_torn_write_left():
    slot = settled((1, TORN))
    assert slot.status()["state"] == "undefined"
    slot.confirm()
    assert bench.states() == {0: VALID}


def test_reject_on_trial_leaves_it_to_the_bootloader():
    bench.put(bench.make_image(BLOCK))
    slot = settled((3, PENDING), (2, VALID))
    slot.reject()
    assert not Spy.log
    bench.otadata((1, VALID))


def test_F8_reject_where_the_bootloader_does_not_watch_activates_the_other_slot():
    bench.put(bench.make_image(BLOCK))
    for state in (TORN, VALID, NEW):
        slot = settled((3, state), (2, VALID))
        slot.reject()
        assert Spy.log == [("set_boot", "ota_1")]
        assert bench.states()[1] == NEW
    bench.otadata((1, VALID))


def test_reject_on_trial_when_no_entry_leads_back_activates_the_other_slot():
    # The bootloader would give this image up and then boot it again, as ota_0 comes first.
    bench.put(bench.make_image(BLOCK))
    slot = settled((1, PENDING), BLANK)
    slot.reject()
    assert Spy.log == [("set_boot", "ota_1")]
    bench.otadata((1, VALID))


def test_F17_reject_with_nothing_to_go_back_to_changes_nothing():
    bench.erase()
    for state in (PENDING, VALID, TORN):
        slot = settled((3, state), (2, VALID))
        raises(RollbackError, slot.reject)
        assert bench.states() == {0: state, 1: VALID}
    bench.put(bench.make_image(2 * BLOCK))
    bench.flip(BLOCK + 1)
    slot = settled((3, VALID), (2, VALID))
    raises(RollbackError, slot.reject)
    bench.otadata((1, VALID))


# -- what it tells


def test_status_tells_what_flash_holds():
    image = bench.make_image(BLOCK, version="4.5.6")
    bench.put(image)
    status = settled((1, VALID), (2, ABORTED)).status()
    assert status["running"] == "ota_0" and status["inactive"] == "ota_1"
    assert status["boot"] == "ota_0"
    assert (status["state"], status["inactive_state"]) == ("valid", "aborted")
    assert status["inactive_build"] == bench.signed(image).build
    assert status["build"] == "" or len(status["build"]) == 64
    bench.erase()
    assert settled((1, VALID)).status()["inactive_build"] == ""
    assert settled((1, VALID)).status()["inactive_state"] == ""


def test_F10_otadata_with_any_sequence_is_no_exception():
    for seq in (0, 1, 0x7FFFFFFF, 0x80000001, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF):
        for state in (NEW, VALID, TORN, 0x12345678):
            status = settled((seq, state), (seq, VALID, 0x1234)).status()
            assert status["running"] == "ota_0"
    bench.otadata((1, VALID))


async def test_a_write_in_the_steady_state_allocates_next_to_nothing():
    """The board's own esp32 module is Python here and allocates; this one does not."""

    class Quiet:
        BOOT, RUNNING, TYPE_APP, TYPE_DATA = 0, 1, 0, 1
        flash = bytearray(8 * BLOCK)
        boot = Partition("ota_0").info()
        next = Partition("ota_1").info()

        def __init__(self, id, info=None):
            self._info = info or self.boot

        @staticmethod
        def find(type=0, subtype=255):
            return [Quiet(0, Quiet.boot), Quiet(0, Quiet.next)] if type == 0 else []

        def info(self):
            return self._info

        def get_next_update(self):
            return Quiet(0, self.boot if self._info is self.next else self.next)

        def readblocks(self, block, buf, offset=0):
            pass

        def writeblocks(self, block, buf, offset=0):
            pass

        def ioctl(self, op, arg):
            return 0

    image = bench.make_image(6 * BLOCK)
    slot = FirmwareSlot(Quiet)
    await slot.begin(bench.signed(image))
    block = bench.pieces(image[:BLOCK])
    slot.write(block)
    slot.write(block)
    gc.collect()
    gc.disable()
    before = gc.mem_alloc()
    slot.write(block)
    slot.write(block)
    slot.write(block)
    after = gc.mem_alloc()
    gc.enable()
    # A CRC-32 is an integer of its own on a 32-bit port; on this one nothing is left.
    assert after - before == 0, "%d bytes for 3 blocks" % (after - before)


async def test_finish_and_abandon_give_the_buffers_back():
    bench.otadata((1, VALID))
    bench.erase()
    slot = FirmwareSlot()
    image = bench.make_image(2 * BLOCK)
    described = bench.signed(image)
    await slot.begin(described)
    slot.write(bench.pieces(image[:BLOCK]))
    slot.abandon()
    gc.collect()
    without = gc.mem_alloc()
    await slot.begin(described)
    slot.write(bench.pieces(image[:BLOCK]))
    slot.write(bench.pieces(bytes(BLOCK)))
    gc.collect()
    assert gc.mem_alloc() - without >= 512
    slot.abandon()
    gc.collect()
    assert gc.mem_alloc() - without < 512
    await fill(slot, image, described)
    gc.collect()
    kept = gc.mem_alloc()
    slot.abandon()
    gc.collect()
    assert kept - gc.mem_alloc() < 256


# -- tables of all kinds


class Table:
    """esp32.Partition over a table and flash of one's own: 8 KiB of each partition, in memory."""

    BOOT, RUNNING, TYPE_APP, TYPE_DATA = 0, 1, 0, 1
    parts = []  # [type, subtype, label, bytes]
    running = boot = ""
    said = []

    @classmethod
    def make(cls, apps, *otadata, running="ota_0", boot="ota_0"):
        """A board with these apps {label: (subtype, bytes)} and otadata partitions."""
        cls.parts = [[1, 0, "otadata", entries] for entries in otadata]
        cls.parts += [[0, subtype, label, body] for label, (subtype, body) in apps.items()]
        cls.running, cls.boot, cls.said = running, boot, []
        return FirmwareSlot(cls)

    def __init__(self, id):
        label = {self.RUNNING: self.running, self.BOOT: self.boot}.get(id, id)
        found = [part for part in self.parts if part[2] == label]
        if not found:
            raise OSError(2)
        self.part = found[0]

    @classmethod
    def find(cls, type=0, subtype=0xFF):
        return [cls(p[2]) for p in cls.parts if p[0] == type and subtype in (0xFF, p[1])]

    def info(self):
        number = self.parts.index(self.part)
        return (self.part[0], self.part[1], 0x1000 * number, 2 * BLOCK, self.part[2], False)

    def get_next_update(self):
        slots = [p for p in self.parts if p[0] == 0 and 0x10 <= p[1] < 0x20]
        if not slots:
            raise OSError(-261)
        at = slots.index(self.part) + 1 if self.part in slots else 0
        return Table(slots[at % len(slots)][2])

    def readblocks(self, block, buf, offset=0):
        body = self.part[3] + b"\xff" * (2 * BLOCK - len(self.part[3]))
        at = block * BLOCK + offset
        buf[:] = body[at : at + len(buf)]

    def set_boot(self):
        self.said.append(self.part[2])
        if not self.part[3]:
            raise OSError(-5379)
        Table.boot = self.part[2]

    @staticmethod
    def mark_app_valid_cancel_rollback():
        Table.said.append("valid")


def entries(*pairs):
    """An otadata partition of (seq, state) pairs."""
    raw = b""
    for seq, state in pairs:
        crc = binascii.crc32(struct.pack("<I", seq), 0xFFFFFFFF) & 0xFFFFFFFF
        raw += struct.pack("<I20sII", seq, FF * 20, state, crc) + FF * (BLOCK - 32)
    return raw


def slots(count=2, image=b"", **more):
    apps = {"ota_%d" % n: (0x10 + n, image) for n in range(count)}
    apps.update(more)
    return apps


def test_a_board_needs_two_slots_and_says_how_many_it_has():
    assert "no OTA slots" in str(raises(PartitionError, Table.make, {"ota_0": (0, b"")}))
    assert "one OTA slot" in str(raises(PartitionError, Table.make, slots(1)))
    assert Table.make(slots(2)).size == 2 * BLOCK


def test_the_chip_is_that_of_the_image_that_runs():
    head = bytearray(bench.make_image(BLOCK))
    head[11:15] = b"\x77\x34\x12\x77"
    slot = Table.make({"ota_0": (0x10, bytes(head)), "ota_1": (0x11, b"")})
    assert slot.chip_id == 0x1234


def test_a_sequence_counts_in_turns_of_the_ota_slots_there_are():
    test = {"test": (0x20, b""), "factory": (0, b"")}
    for count, running, seq in ((16, "ota_15", 16), (16, "ota_1", 18), (2, "ota_1", 4)):
        slot = Table.make(slots(count, **test), entries((seq, VALID)), running=running)
        assert slot.status()["state"] == "valid", (count, running, seq)


def test_an_entry_that_the_bootloader_leaves_out_counts_for_nothing():
    for seq in (0, 0xFFFFFFFF):
        status = settled((seq, VALID)).status()
        assert (status["state"], status["inactive_state"]) == ("", ""), seq
    status = settled((0xFFFFFFFE, ABORTED)).status()
    assert (status["state"], status["inactive_state"]) == ("", "aborted")
    status = settled((1, VALID), (2, ABORTED, 0x1234)).status()
    assert (status["state"], status["inactive_state"]) == ("valid", ""), "a wrong CRC"
    bench.otadata((1, VALID))


def test_of_two_entries_for_a_slot_the_newer_one_counts_or_else_the_first():
    for first, second, state in (
        ((3, PENDING), (1, VALID), "pending"),
        ((1, VALID), (3, PENDING), "pending"),
        ((1, VALID), (1, ABORTED), "valid"),
    ):
        assert settled(first, second).status()["state"] == state
    bench.otadata((1, VALID))


def test_only_the_first_otadata_partition_counts():
    slot = Table.make(slots(), entries((1, VALID)))
    Table.parts.append([1, 0, "second", entries((3, ABORTED))])
    assert slot.status()["state"] == "valid"


def test_an_image_may_fill_its_slot_and_no_more():
    whole = bench.make_image(2 * BLOCK)
    status = Table.make(slots(image=bytes(whole))).status()
    assert status["build"] == status["inactive_build"] == bench.signed(whole).build
    long = bytes(bench.make_image(2 * BLOCK + 16))
    assert Table.make(slots(image=long)).status()["build"] == ""


def test_the_version_of_what_runs_is_told_where_it_is_one():
    for version, said in (("1.2.3", "1.2.3"), ("v1.2", ""), ("", "")):
        image = bytes(bench.make_image(BLOCK, version=version))
        assert Table.make(slots(image=image)).status()["version"] == said
    assert Table.make(slots()).status()["version"] == "", "no image"


def test_where_nothing_is_named_for_the_next_boot_nothing_is_told():
    slot = Table.make(slots(), boot="nothing")
    assert slot.status()["boot"] == "" and not slot.is_settled()


def test_the_base_of_a_patch_is_the_running_slot():
    image = bytes(bench.make_image(BLOCK, seed=9))
    read, size = Table.make({"ota_0": (0x10, image), "ota_1": (0x11, b"")}).base()
    piece = bytearray(40)
    read(1000, piece)
    assert piece == image[1000:1040] and size == 2 * BLOCK
    assert Table.parts[0][2] == "ota_0"


def test_what_runs_is_made_the_boot_slot_again_and_confirmed():
    slot = Table.make(slots(image=b"x"), entries((1, ABORTED)), boot="ota_1")
    slot.settle()
    assert Table.said == ["ota_0", "ota_0", "valid"]
    slot = Table.make(slots(image=b"x"), entries((1, VALID)), boot="ota_1")
    slot.settle()
    assert Table.said == ["ota_0"]
    slot = Table.make(slots(), boot="ota_1")
    assert "can't be made" in str(raises(PartitionError, slot.settle))
    assert Table.said == ["ota_0"], "and not confirmed"


def test_a_confirmation_that_the_platform_refuses_is_an_error_of_the_package():
    def refuse():
        raise OSError(-1)

    slot = Table.make(slots(image=b"x"), entries((1, PENDING)))
    kept = Table.mark_app_valid_cancel_rollback
    Table.mark_app_valid_cancel_rollback = refuse
    try:
        raises(PartitionError, slot.confirm)
    finally:
        Table.mark_app_valid_cancel_rollback = staticmethod(kept)


def test_a_slot_without_an_entry_is_confirmed_already():
    Table.make(slots(image=b"x")).confirm()
    assert Table.said == []


def test_the_way_back_is_another_image_whatever_runs():
    image = bytes(bench.make_image(BLOCK))
    apps = slots(image=image, factory=(0, image))
    slot = Table.make(apps, entries(), running="factory", boot="factory")
    slot.reject()
    assert Table.said == ["ota_0"]
    slot = Table.make(slots(image=image), entries((3, PENDING), (2, VALID)), boot="ota_1")
    slot.reject()
    assert Table.said == ["ota_1"], "where the bootloader would not go back by itself"


def test_the_way_back_of_a_trial_is_the_other_slot_that_is_good_or_the_factory_image():
    image = bytes(bench.make_image(BLOCK))
    pending, none = (3, PENDING), {"factory": (0, b"")}
    for apps, otadata, said in (
        (slots(image=image), entries(pending, (2, VALID)), []),
        (slots(image=image), entries((2, VALID), pending), []),
        (slots(image=image), entries(pending, (2, NEW)), []),
        (slots(image=image), entries(pending, (2, ABORTED)), ["ota_1"]),
        (slots(image=image), entries(pending, (2, INVALID)), ["ota_1"]),
        (slots(image=image, factory=(0, image)), entries(pending, (2, INVALID)), []),
        (slots(image=image, factory=(0, image)), entries((1, VALID)), ["factory"]),
        (slots(3, image), entries(pending, (2, VALID)), []),
        (slots(3, image), entries(pending, (2, ABORTED)), ["ota_0"]),
    ):
        running = "ota_2" if len(apps) == 3 and "factory" not in apps else "ota_0"
        slot = Table.make(apps, otadata, running=running, boot=running)
        slot.reject()
        assert Table.said == said, (apps.keys(), said)
    for apps, otadata in (
        (slots(image=image, **none), entries(pending, (2, INVALID))),
        ({"ota_0": (0x10, image), "ota_1": (0x11, b"")}, entries(pending, (2, VALID))),
    ):
        slot = Table.make(apps, otadata)
        raises(RollbackError, slot.reject)
        assert Table.said == []

"""Running it: PostgreSQL and workers, migrations, kills, backup, simulated fleets."""

import asyncio
import contextlib
import datetime as dt
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fleet as fleets
import kills
import postgres
import pytest
import servers
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fleet import Board, Fleet, Remote

from twinslot_server import (
    attempts,
    backup,
    cron,
    devices,
    planned,
    rollouts,
    schedules,
    schema,
    settings,
    tokens,
    truth,
)
from twinslot_server import store as store_module
from twinslot_server.background import Background, Leader
from twinslot_server.choices import Chooser
from twinslot_server.desk import Desk
from twinslot_server.limits import Limits
from twinslot_server.messages import CheckUpdate
from twinslot_server.store import Store, StoreError, bump, generation
from twinslot_tools import fleet_cli, lab, publish
from twinslot_tools.fleet_http import Api

ROOT = Path(__file__).parents[2]

# How many transactions of PostgreSQL's databases wait for another one.
WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


@pytest.fixture(scope="module")
def pg():
    with postgres.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    if request.param == "postgres":
        url = fresh(request.getfixturevalue("pg"), "s" + tmp_path.name)
    found = Store(url, 5)
    yield found
    found.close()


def fresh(url: str, name: str) -> str:
    """Another empty database of the same server."""
    import psycopg

    name = "".join(c for c in name.lower() if c.isalnum())[:60]
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.rpartition("/")[0] + "/" + name


# ---- schema


def test_the_migrations_make_what_the_server_uses(store):
    context = {"compare_type": True}
    found = store.read(
        lambda c: compare_metadata(MigrationContext.configure(c, opts=context), schema.metadata)
    )
    assert [d for d in found if "alembic_version" not in str(d)] == []


def test_a_database_of_the_first_server_is_brought_up_to_date(tmp_path):
    path = tmp_path / "old.sqlite3"
    with sqlite3.connect(path) as old:
        old.executescript(
            """
            CREATE TABLE devices (device_id VARCHAR PRIMARY KEY, mac VARCHAR, product VARCHAR,
              channel VARCHAR, hardware VARCHAR, chip_id INTEGER, current_version VARCHAR,
              current_build VARCHAR, agent VARCHAR, micropython VARCHAR, labels JSON NOT NULL,
              status VARCHAR, status_version VARCHAR, first_seen INTEGER NOT NULL,
              last_seen INTEGER NOT NULL);
            CREATE TABLE reports (id INTEGER PRIMARY KEY, device_id VARCHAR NOT NULL REFERENCES
              devices(device_id) ON DELETE CASCADE, attempt VARCHAR NOT NULL, version VARCHAR,
              build VARCHAR, status VARCHAR NOT NULL, error JSON, bytes BIGINT,
              received INTEGER NOT NULL, UNIQUE (device_id, attempt, status));
            INSERT INTO devices (device_id, labels, first_seen, last_seen)
              VALUES ('old-board', '["attic"]', 5, 6);
            PRAGMA user_version = 1;
            """
        )
    old.close()
    with pytest.raises(StoreError, match="no-migrate"):
        Store(f"sqlite:///{path}", 5, migrate=False)
    for _ in range(2):
        store = Store(f"sqlite:///{path}", 5)
        row = store.read(lambda c: c.execute(schema.devices.select()).one())
        assert (row.device_id, row.labels, row.enrolment) == ("old-board", ["attic"], "accepted")
        store.close()


def went_back(store, revision, *columns):
    """Make it the database of an older server, and let go of it."""
    for table, column in columns:
        store.write(lambda c, t=table, n=column: c.exec_driver_sql(f"ALTER TABLE {t} DROP {n}"))
    older = f"UPDATE alembic_version SET version_num = '{revision}'"
    store.write(lambda c: c.exec_driver_sql(older))
    store.close()


def test_an_older_servers_schedule_has_missed_what_it_would_have_done_since(tmp_path):
    """One that has never run may have been made after its moment: nobody wrote down when."""
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    store = Store(url, 5)
    now = int(time.time())
    plan = {"cron": "* * * * *", "zone": "UTC", "action": {"do": "gc"}, "source": "api"}
    rows = [{**plan, "name": str(run), "last_run": run} for run in (None, now - 600)]
    store.write(lambda c: c.execute(schema.schedules.insert(), rows))
    went_back(store, "0009", ("schedules", "created"))
    store = Store(url, 5)
    assert store.read(lambda c: schedules.due(c, now)) == [2]
    store.close()


def test_what_was_stable_before_channels_were_kept_may_stand_in_on_its_own(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    store = Store(url, 5)
    row = {c.name: "" for c in schema.releases.c if c.name != "id"}
    row |= {"channel": "beta", "hardware": [], "blobs": [], "chip_id": 0, "size": 0, "created": 0}
    row |= {"security_version": 0, "downgrade": False, "pilot_ready": True, "expires": None}
    rows = [{**row, "version": v, "channels": [], "stable": v == "1"} for v in ("1", "2")]
    store.write(lambda c: c.execute(schema.releases.insert(), rows))
    went_back(store, "0008", ("schedules", "created"), ("releases", "channels"))
    store = Store(url, 5)
    table = schema.releases
    found = store.read(
        lambda c: c.execute(sqlalchemy.select(table.c.version, table.c.channels)).all()
    )
    assert sorted(found) == [("1", ["beta"]), ("2", [])]
    store.close()


def test_a_schema_of_the_future_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    store = Store(url, 5)
    store.write(lambda c: c.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(StoreError, match="9999"):
        Store(url, 5)


# ---- writing


@pytest.mark.parametrize("pours", [False, True])
def test_one_change_that_fails_takes_no_other_with_it(store, pours):

    def add(connection, number):
        connection.execute(schema.meta.insert().values(key=f"n{number}", value=number))
        if number % 3 == 0:
            connection.exec_driver_sql("SELECT * FROM nowhere")

    async def all_at_once():
        changes = (store.awrite(lambda c, n=n: add(c, n), pours) for n in range(60))
        return await asyncio.gather(*changes, return_exceptions=True)

    failed = {n for n, result in enumerate(asyncio.run(all_at_once())) if result}
    assert failed == set(range(0, 60, 3))
    kept = store.read(
        lambda c: set(
            c.scalars(
                schema.meta.select()
                .with_only_columns(schema.meta.c.value)
                .where(schema.meta.c.key != "generation")
            )
        )
    )
    assert kept == set(range(60)) - failed


@pytest.fixture
def fleet_on(store, tmp_path):
    found = Fleet(tmp_path, store.engine.url.render_as_string(hide_password=False))
    yield found
    found.close()


def ask_together(fleet, boards, **facts):
    """Poll for ``boards`` within one transaction; the answers, and the statements it took."""
    begun, held = threading.Event(), threading.Event()
    statements = []

    def hold(_connection):
        begun.set()
        held.wait()

    async def ask_all():
        fleet.store.submit(hold)
        await asyncio.to_thread(begun.wait)
        asks = [CheckUpdate.model_validate({"device_id": b, **BOARD, **facts}) for b in boards]
        polls = [asyncio.ensure_future(fleet.desk.poll(ask, None, None)) for ask in asks]
        await asyncio.to_thread(all_wait, len(polls))
        sqlalchemy.event.listen(fleet.store.engine, "before_cursor_execute", note)
        held.set()
        return await asyncio.gather(*polls, return_exceptions=True)

    def all_wait(number):
        while fleet.store._work.qsize() < number:
            time.sleep(0.001)

    def note(_connection, _cursor, statement, *_):
        statements.append(statement)

    answers = asyncio.run(ask_all())
    sqlalchemy.event.remove(fleet.store.engine, "before_cursor_execute", note)
    return answers, len(statements)


BOARD = {"product": servers.PRODUCT, "hardware": servers.HARDWARE, "current_version": "1.0.0"}


def test_a_fleet_that_boots_at_once_takes_few_statements(fleet_on):
    fleet_on.publish("1.0.0")
    few, many = [f"few-{n}" for n in range(3)], [f"many-{n}" for n in range(60)]
    ask_together(fleet_on, ["first"])  # registers the release
    for facts in ({"labels": ["site=a"]}, {"labels": ["site=b"]}):  # all are new; all moved
        (answers, cheap), (more, dear) = (ask_together(fleet_on, b, **facts) for b in (few, many))
        assert {json.loads(a.body)["reason"] for a in answers + more} == {"up_to_date"}
        assert dear == cheap
    assert fleet_on.api("GET", "labels")["labels"][0]["values"] == {"b": len(few + many)}
    known = fleet_on.api("GET", "export/devices")
    assert {row["device_id"] for row in known} == {"first", *few, *many}


def test_a_fleet_that_nobody_knows_boots_at_once_and_all_of_it_is_written_down(fleet_on):
    """Whom the database has no time for is told when to ask again, and that is no error."""
    fleet_on.publish("1.0.0")
    limits = Limits(polls=16)
    desk = Desk(fleet_on.site, fleet_on.store, limits, fleet_on.settings)
    boards = [f"new-{n}" for n in range(300)]

    async def boot(board):
        ask = CheckUpdate.model_validate({"device_id": board, **BOARD})
        for times in itertools.count():
            answer = json.loads((await desk.poll(ask, None, None)).body)
            assert not answer["update_available"]
            if answer["reason"] != "overload":
                return times, answer["reason"]
            assert limits.retry_after_s <= answer["poll"] <= 2 * limits.retry_after_s
            await asyncio.sleep(answer["poll"] / 1000)

    async def boot_all():
        return await asyncio.gather(*map(boot, boards))

    ended = asyncio.run(boot_all())
    assert {reason for _, reason in ended} == {"up_to_date"}
    assert desk.sent_away == sum(times for times, _ in ended) > 0
    assert sorted(row["device_id"] for row in fleet_on.api("GET", "export/devices")) == sorted(
        boards
    )


def test_what_one_board_may_not_do_and_another_does_twice_holds_up_no_third(fleet_on):
    fleet_on.publish("1.1.0")
    ask_together(fleet_on, ["own"])
    fleet_on.api("POST", "devices/own/token")
    answers, _ = ask_together(fleet_on, ["twice", "own", "third", "twice"])
    assert [getattr(a, "code", "answered") for a in answers] == [
        "answered",
        "unauthorized",
        "answered",
        "answered",
    ]
    tried = fleet_on.api("GET", "export/attempts")
    assert sorted(row["device_id"] for row in tried) == ["own", "third", "twice"]


def test_what_was_remembered_of_a_change_that_was_undone_fits_no_other(store):
    """Else a snapshot of rules that never held would stand for those that came after."""
    seen = []

    def undone(connection):
        bump(connection)
        seen.append(generation(connection))
        raise LookupError

    with pytest.raises(LookupError):
        store.write(undone)
    before = store.generation
    store.write(bump)
    assert len({before, store.generation, *seen}) == 3
    assert store.read(generation) == store.generation


def test_a_poll_goes_by_the_rules_it_has_read_whoever_reads_others_meanwhile(tmp_path):
    """As a thread that explains may, whose transaction began before a release was blocked."""
    with fleets.running(tmp_path) as fleet:
        fleet.publish("1.1.0")
        older = fleet.store.engine.connect()
        before = generation(older)

        class Meanwhile(Chooser):
            def __setattr__(self, name, value):
                super().__setattr__(name, value)
                if name == "_policy" and value and value[0] != before:
                    assert self.rules(older).releases[1].blocked is None

        fleet.api("PATCH", "firmware/1", {"blocked": "too hot"})
        found = fleet.store.read(Meanwhile(fleet.site, fleet.settings).rules)
        older.close()
    assert found.releases[1].blocked == "too hot"


def test_at_most_one_leads(store, tmp_path):
    one, two = Leader(store, tmp_path), Leader(store, tmp_path)
    assert one.holds() and one.holds()
    assert not two.holds()
    one.release()
    assert two.holds()
    two.release()


# ---- the same fleet on PostgreSQL


def test_a_poll_undoes_no_decommission_of_another_worker(pg, tmp_path):
    """The poll has read the board as accepted, and its writing waits for the other worker's."""
    fleet = Fleet(tmp_path, fresh(pg, "retired"))
    other = sqlalchemy.create_engine(fleet.store.engine.url)
    try:
        Board(fleet, "b1").poll()
        with ThreadPoolExecutor(1) as pool:
            with other.begin() as connection:
                devices.decommission(connection, "b1")
                poll = pool.submit(Board(fleet, "b1", agent="says something new").poll)
                while not (fleet.store.read(lambda c: c.exec_driver_sql(WAITS).scalar_one())):
                    assert not poll.done()
            assert poll.result()["reason"] == "decommissioned"
        found = fleet.api("GET", "devices/b1")
        assert (found["enrolment"], found["agent"]) == ("decommissioned", "says something new")
    finally:
        other.dispose()
        fleet.close()


def test_a_clock_that_read_before_a_report_undoes_nothing_of_it(pg, tmp_path):
    fleet = Fleet(tmp_path, fresh(pg, "undone"))
    other = sqlalchemy.create_engine(fleet.store.engine.url)
    try:
        fleet.publish("1.1.0")
        board = Board(fleet, "b1")
        board.fetch()
        board.version = "1.1.0"
        board.poll()
        with other.begin() as connection:
            row = attempts.latest(connection, "b1")
            board.report("confirmed", "1.1.0")
            late = row.updated + 1
            attempts.save(connection, row, lambda a: truth.time_out(a, late, late))
        (attempt,) = board.attempts()
        assert (attempt["state"], attempt["reason"]) == ("confirmed", None)
    finally:
        other.dispose()
        fleet.close()


def test_one_board_that_asks_two_workers_begins_once(pg, tmp_path):
    """Both would be as far as to take a place of its rollout, which somebody holds."""
    url = fresh(pg, "twice")
    workers = [Fleet(tmp_path, url) for _ in range(2)]
    other = sqlalchemy.create_engine(url)
    try:
        workers[0].publish("1.0.0")
        release = workers[0].upload(tmp_path, "1.1.0").json()["id"]
        workers[0].api("PATCH", f"firmware/{release}", {"pilot_ready": True})
        assert not Board(workers[0], "b1").poll()["update_available"]
        plan = {"firmware_id": release, "start": True, "stages": [{"percent": 100}]}
        number = workers[0].api("POST", "rollouts", plan)["id"]
        with ThreadPoolExecutor(2) as pool:
            with other.begin() as connection:
                rollouts.get(connection, number, lock=True)
                polls = [pool.submit(Board(worker, "b1").poll) for worker in workers]
                while connection.exec_driver_sql(WAITS).scalar_one() < len(polls):
                    assert not any(poll.done() for poll in polls)
            assert all(poll.result()["update_available"] for poll in polls)
        assert [a["state"] for a in Board(workers[0], "b1").attempts()] == ["offered"]
    finally:
        other.dispose()
        for worker in workers:
            worker.close()


@pytest.fixture
def two_workers(pg, tmp_path, monkeypatch):
    """On one database, and the channel at 1.0.0; 1.1.0 may be rolled out.

    Each asks the database what is new at every poll, not every half second.
    """
    monkeypatch.setattr(store_module, "_FOREIGN_GENERATION_S", 0)
    url = fresh(pg, tmp_path.name)
    workers = [Fleet(tmp_path, url) for _ in range(2)]
    workers[0].publish("1.0.0")
    release = workers[0].upload(tmp_path, "1.1.0").json()["id"]
    workers[0].api("PATCH", f"firmware/{release}", {"pilot_ready": True})
    for worker in workers:
        worker.release_id = release
    yield workers
    for worker in workers:
        worker.close()


def test_what_one_worker_remembers_gives_way_to_what_another_was_told(two_workers):
    one, two = two_workers
    for _ in range(3):
        answers = [Board(worker, "b1").poll()["reason"] for worker in two_workers]
        assert answers == ["up_to_date"] * 2
    assert all(worker.desk.remembered for worker in two_workers)
    one.api("PATCH", "devices/b1", {"pin": "1.1.0"})
    offers = [Board(worker, "b1").poll().get("release", "") for worker in (two, one)]
    assert [offer.rpartition("/")[2] for offer in offers] == ["1.1.0.jws"] * 2
    two.api("PATCH", "devices/b1", {"pin": None})
    assert [Board(worker, "b1").poll()["reason"] for worker in two_workers] == ["up_to_date"] * 2
    two.api("POST", "devices/b1/token")
    for worker in two_workers:
        with pytest.raises(AssertionError, match="unauthorized"):
            Board(worker, "b1").poll()


def test_two_workers_give_one_place_of_a_rollout_to_one_board(two_workers):
    """Nobody can write an attempt until both are as far: each would find the place free."""
    one, two = two_workers
    both = [Board(one, "b1"), Board(two, "b2")]
    assert [board.poll()["reason"] for board in both] == ["up_to_date"] * 2
    plan = {"firmware_id": one.release_id, "start": True, "stages": [{"percent": 100}]}
    one.api("POST", "rollouts", {**plan, "policy": {"max_concurrent": 1}})
    with ThreadPoolExecutor(2) as pool:
        with two.store.engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE attempts IN SHARE MODE")
            polls = [pool.submit(board.poll) for board in both]
            # A transaction sees only those sessions that there were when it first looked.
            while one.store.read(lambda c: c.exec_driver_sql(WAITS).scalar_one()) < len(polls):
                assert not any(poll.done() for poll in polls)
        answers = [poll.result() for poll in polls]
    assert sorted(a.get("reason", "offered") for a in answers) == ["busy", "offered"]


def test_two_workers_that_answer_for_two_rollouts_keep_each_other_from_none(two_workers):
    """Each would hold one and want the other, until the database undoes what one has done."""
    one, two = two_workers
    asked = {one: ("x1", "y1"), two: ("y2", "x2")}
    for board in itertools.chain(*asked.values()):
        Board(one, board).poll()
        one.api("PATCH", f"devices/{board}", {"labels": {"site": board[0]}})
    plan = {"firmware_id": one.release_id, "start": True, "stages": [{"percent": 100}]}
    for site in "xy":
        one.api("POST", "rollouts", {**plan, "target": {"label": [f"site={site}"]}})
    undone = []

    def note(connection):
        if connection.get_execution_options().get("write"):
            undone.append(connection)

    for worker in two_workers:
        sqlalchemy.event.listen(worker.store.engine, "rollback", note)
    with ThreadPoolExecutor(2) as pool:
        url = one.store.engine.url
        with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).begin() as connection:
            connection.exec_driver_sql("LOCK TABLE attempts IN SHARE MODE")
            polls = [pool.submit(ask_together, worker, asked[worker]) for worker in two_workers]
            while one.store.read(lambda c: c.exec_driver_sql(WAITS).scalar_one()) < len(polls):
                assert not any(poll.done() for poll in polls)
        answers = [json.loads(a.body) for poll in polls for a in poll.result()[0]]
    assert [answer["update_available"] for answer in answers] == [True] * 4
    assert undone == []


def test_a_release_and_its_rollout_may_be_made_while_another_worker_reads_the_rules(
    two_workers, tmp_path
):
    """By statements of which each sees more than the one before."""
    one, two = two_workers
    assert Board(two, "b1").poll()["reason"] == "up_to_date"
    one.api("PATCH", "devices/b1", {"labels": {"site": "x"}})  # the rules are to be read anew
    made = []

    def make(_connection, _cursor, statement, *_):
        if not made and ("FROM releases" in statement or "FROM rollouts" in statement):
            made.append(one.upload(tmp_path, "1.2.0").json()["id"])
            one.api("PATCH", f"firmware/{made[0]}", {"pilot_ready": True})
            plan = {"firmware_id": made[0], "start": True, "stages": [{"percent": 100}]}
            made.append(one.api("POST", "rollouts", plan)["state"])

    sqlalchemy.event.listen(two.store.engine, "after_cursor_execute", make)
    answers = [Board(two, "b1").poll() for _ in range(2)]
    assert made[1:] == ["pilot"]
    assert answers[1]["release"].endswith("/1.2.0.jws")


def test_more_boards_are_accepted_than_a_statement_has_parameters(pg, tmp_path):
    fleet = Fleet(tmp_path, fresh(pg, "many"))
    waiting = (
        "INSERT INTO devices (device_id, enrolment, labels, first_seen, last_seen)"
        " SELECT 'b' || n, 'pending', '[]', 0, 0 FROM generate_series(0, 65535) AS n"
    )
    try:
        fleet.store.write(lambda c: c.exec_driver_sql(waiting))
        assert fleet.api("POST", "devices/accept", {"all": True}) == {"accepted": 65536}
    finally:
        fleet.close()


def test_a_fleet_updates_on_postgresql(pg, tmp_path):
    fleet = Fleet(tmp_path, fresh(pg, "fleet"))
    try:
        fleet.publish("1.0.0")
        number = fleet.upload(tmp_path, "1.1.0").json()["id"]
        fleet.api("PATCH", f"firmware/{number}", {"pilot_ready": True})
        boards = [Board(fleet, f"b{n}", labels=["site=a"]) for n in range(6)]
        for board in boards:
            board.poll()
        plan = {
            "firmware_id": number,
            "stages": [{"count": 2}, {"percent": 100}],
            "policy": {"bake_s": 0},
            "start": True,
        }
        rollout = fleet.api("POST", "rollouts", plan)["id"]
        clock = Background(fleet.parts, fleet.data)
        for _ in range(6):
            for board in boards:
                board.update()
            clock.tick()
        clock._leader.release()
        done = fleet.api("GET", f"rollouts/{rollout}")
        assert (done["state"], done["counts"]["confirmed"]) == ("complete", 6)
        assert boards[0].attempts()[0]["state"] == "confirmed"
        fleet.desk.flush()
        with pytest.raises(Exception, match="append-only"):
            fleet.store.write(lambda c: c.exec_driver_sql("DELETE FROM audit"))
    finally:
        fleet.close()


def everything(store):
    """Every line of every table but sessions, and the generation."""
    kept = [t for t in schema.metadata.sorted_tables if t.name not in ("sessions", "meta")]
    return store.read(
        lambda c: {t.name: sorted(map(repr, c.execute(t.select()).all())) for t in kept}
    )


def test_a_fleet_moves_from_sqlite_to_postgresql(pg, tmp_path):
    """All of it, by the command; the numbers go on, and a second time nothing is mixed up."""
    with fleets.running(tmp_path) as fleet:
        fleet.publish("1.0.0")
        number = fleet.upload(tmp_path, "1.1.0").json()["id"]
        fleet.api("PATCH", f"firmware/{number}", {"pilot_ready": True})
        one, two = Board(fleet, "b1", labels=["site=a"]), Board(fleet, "b2")
        one.poll(), two.poll()
        plan = {"firmware_id": number, "stages": [{"percent": 100}], "start": True}
        rollout = fleet.api("POST", "rollouts", plan)["id"]
        assert one.update() == "1.1.0"
        fleet.api("POST", "windows", {"start": "00:00", "end": "00:00"})
        fleet.api("POST", "webhooks", {"url": "https://example.org/"})
        fleet.api("POST", "ota/updates", {"firmware_id": number, "target": {"nodes": ["b2"]}})
        token = fleet.api("PUT", "users/anna", {"role": "viewer"})["token"]
        before = everything(fleet.store)
        url = fresh(pg, "moved")
        command = [Path(sys.executable).with_name("twinslot"), "fleet", "move", fleet.data]
        environment = {**os.environ, "TWINSLOT_DATABASE": url}

        def run():
            return subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )

        leader = Leader(fleet.store, fleet.data)
        assert leader.holds()
        assert "stop it first" in run().stderr
        leader.release()
        done = run()
        assert done.returncode == 0, done.stderr
        assert "devices 2" in done.stdout
        again = run()
        assert again.returncode == 1 and "not empty" in again.stderr
    moved = Fleet(tmp_path, url)
    try:
        assert everything(moved.store) == before
        assert moved.api("GET", "devices", token=token)["devices"][0]["device_id"] == "b1"
        one.fleet = two.fleet = moved
        assert two.update() == "1.1.0"
        counts = moved.api("GET", f"rollouts/{rollout}")["counts"]
        assert counts["confirmed"] == 2
        assert moved.api("POST", "rollouts", {"firmware_id": number})["id"] == rollout + 1
    finally:
        moved.close()


def test_several_workers_serve_one_fleet(pg, tmp_path):
    site = tmp_path / "site"
    servers.publish_version(site, "1.1.0")
    url = fresh(pg, "workers")
    with servers.serving(site, "--database", url, "--workers", "3") as server:
        remote = Remote(server)
        boards = [Board(remote, f"b{n}") for n in range(12)]
        threads = [threading.Thread(target=board.update) for board in boards]
        for board in boards:
            board.token = server.token("device")
            board.fleet = Remote(server)  # a connection, and so perhaps a worker, of its own
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = remote.api("GET", "devices")["devices"]
        assert [r["status"] for r in rows] == ["confirmed"] * 12
        # What happens by itself happens once, though three clocks tick.
        number = remote.api("GET", "firmware")["firmware"][0]["id"]
        plan = {"firmware_id": number, "starts_at": "2000-01-01T00:00:00Z"}
        rollout = remote.api("POST", "rollouts", plan)["id"]
        deadline = time.monotonic() + 30
        while remote.api("GET", f"rollouts/{rollout}")["state"] == "draft":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        started = [
            line for line in remote.api("GET", "audit")["audit"] if line["who"] == "scheduler"
        ]
        assert [line["action"] for line in started][-1:] == ["rollout.advance"]
        assert [line["after"]["why"] for line in started].count("started at its time") == 1
        # A change made through one worker holds for all within a moment.
        remote.api("PATCH", f"firmware/{number}", {"blocked": "no"})
        time.sleep(1)
        for n in range(12):
            late = Board(Remote(server), f"late{n}")
            late.token = server.token("device")
            assert late.poll()["reason"] == "blocked"
            late.fleet.client.close()
        for board in boards:
            board.fleet.client.close()
        remote.client.close()
        assert server.stop() == 0


def test_sqlite_serves_one_process_and_says_so(tmp_path):
    (tmp_path / "site").mkdir()
    command = [sys.executable, "-m", "twinslot_server", str(tmp_path / "site"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1 and "SQLite serves one process" in done.stderr


# ---- kill -9


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_F111_F112_killed_at_any_moment_it_has_what_it_acknowledged_and_goes_on(
    kind, request, tmp_path
):
    """F111: in the middle of reports, uploads and rollouts; ``make kills`` does it many times."""
    database = fresh(request.getfixturevalue("pg"), "kills") if kind == "postgres" else None
    found = kills.run(tmp_path, 2, seed=5, database=database)
    assert found["reports"] and found["uploads"]


# ---- what people and boards may say


@pytest.fixture(params=["sqlite", "postgres"])
def fleet(request, tmp_path):
    url = None
    if request.param == "postgres":
        url = fresh(request.getfixturevalue("pg"), "f" + tmp_path.name)
    found = Fleet(tmp_path, url)
    yield found
    found.close()


BIG = "9" * 400
HUGE = "99999999999999999999"  # above 64 bits
QUERIES = [f"devices?{name}=%00" for name in ("q", "after", "label", "version")]
QUERIES += ["firmware?product=%00", "firmware/1/reach?label=%00=1"]
QUERIES += ["devices/%00", "ota/updates/pending?gateway=%00"]
QUERIES += [f"{what}/{HUGE}" for what in ("firmware", "rollouts", "ota/updates")]
QUERIES += [f"{what}/2147483648" for what in ("firmware", "rollouts", "ota/updates")]
QUERIES += [f"audit?before={HUGE}", "audit?before=2147483648"]
BODIES = [
    ("rollouts", '{"firmware_id": HUGE}'),
    ("rollouts", '{"product": "x", "version": "\\u0000"}'),
    ("rollouts", '{"firmware_id": 1, "name": "\\u0000", "seed": "\\u0000"}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"bake_s": Infinity}}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"success_percent": NaN}}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"seen_within_s": 1e999}}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"seen_within_s": BIG}, "start": true}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"max_concurrent": 1.5}}'),
    ("rollouts", '{"firmware_id": 1, "policy": {"gate": 3}}'),
    ("rollouts", '{"firmware_id": 1, "stages": [{"percent": NaN}]}'),
    ("rollouts", '{"firmware_id": 1, "stages": [{"count": BIG}]}'),
    ("windows", '{"start": "00:00", "end": "00:00", "label": "\\u0000="}'),
    ("schedules", '{"name": "d", "cron": "* * * * *", "action": {"do": ["gc"]}}'),
    ("schedules", '{"name": "d", "cron": "* * * * *", "action": {"do": {}}}'),
    ("schedules", '{"name": "d", "cron": "* * * * *", "action": {"do": "gc", "rollout": NaN}}'),
    ("webhooks", '{"url": "http://a\\u0000b/"}'),
    ("webhooks", '{"url": "http://host:99999999/"}'),
    ("webhooks", '{"url": "http://[::1"}'),
    ("ota/updates", '{"firmware_id": HUGE}'),
    ("devices/import", "device_id,mac\nb2,\0\n"),
    ("devices/import", "device_id\r\rb5"),
    ("devices/import", "device_id,mac\nb9," + "x" * 200_000),
    ("devices/import", "device_id,token\nb6,0123456789abcdefghij\nb7,0123456789abcdefghij"),
]
BODIES = [(path, body.replace("HUGE", HUGE).replace("BIG", BIG)) for path, body in BODIES]


def test_F116_no_number_and_no_text_of_a_request_is_a_5xx(fleet):
    fleet.publish("1.1.0")
    Board(fleet, "b1").poll()
    headers = {"Authorization": f"Bearer {fleets.ADMIN}"}
    for query in QUERIES:
        answer = fleet.client.get(f"/api/v1/{query}", headers=headers)
        assert answer.status_code < 500, (query, answer.text)
    for path, body in BODIES:
        answer = fleet.client.post(f"/api/v1/{path}", headers=headers, content=body.encode())
        assert answer.status_code < 500, (path, body[:80], answer.text)
    # And nothing of it was stored that trips those who read it.
    for path in ("devices", "rollouts", "windows", "schedules", "webhooks", "audit", "labels"):
        assert isinstance(fleet.api("GET", path)[path], list), path
    for what in ("devices", "audit"):
        assert isinstance(fleet.api("GET", f"export/{what}"), list), what
    assert Board(fleet, "b1").poll()["poll"]


def test_numbers_that_are_none_are_refused(fleet):
    fleet.publish("1.1.0")
    for path, body in BODIES:
        if "NaN" in body or "Infinity" in body or "1e999" in body or BIG in body:
            headers = {"Authorization": f"Bearer {fleets.ADMIN}"}
            answer = fleet.client.post(f"/api/v1/{path}", headers=headers, content=body.encode())
            assert answer.status_code == 422, body[:80]
    assert fleet.api("GET", "rollouts")["rollouts"] == []


def test_a_report_with_a_nul_is_kept(fleet):
    """PostgreSQL refuses the character: the board would have reported for ever."""
    board = Board(fleet, "b1", agent="agent\0x")
    board.poll()
    board.attempt = "1"
    board.report("failed", "1.1.0", {"code": "x", "message": "line\0noise"})
    found = fleet.api("GET", "devices/b1")
    assert found["agent"] == "agent\ufffdx"
    assert found["history"][0]["error"]["message"].startswith("line")


def test_the_audit_log_can_be_read(fleet):
    for key in ("one", "two"):
        fleet.api("PUT", f"labels/{key}", {"description": "d"})
    newest, older = fleet.api("GET", "audit")["audit"]
    assert (newest["target"], older["target"]) == ("two", "one")
    assert fleet.api("GET", f"audit?before={newest['id']}")["audit"] == [older]
    assert len(fleet.api("GET", "export/audit")) == 2


def test_F117_no_request_names_a_file_to_write(fleet, tmp_path):
    """A backup holds the server's key and tokens: where it goes, schedules.yaml says."""
    target = tmp_path / "site" / "sensor-node" / "stable.json"
    plan = {"name": "x", "cron": "* * * * *", "action": {"do": "backup", "to": str(target)}}
    assert fleet.api("POST", "schedules", plan)["code"] == "malformed"
    assert fleet.api("GET", "schedules")["schedules"] == []


@pytest.mark.parametrize("channel", ["../x", ".hidden", "é", "a/b", "x" * 65])
def test_an_upload_names_a_channel_as_all_others_do(tmp_path, channel):
    with fleets.running(tmp_path / "fleet") as fleet:
        site = tmp_path / "made" / "site"
        site.mkdir(parents=True)
        form = fleets.upload_files(site, servers.publish_version(site, "1.1.0"))
        headers = {"Authorization": f"Bearer {fleets.ADMIN}"}
        answer = fleet.client.post(
            "/api/v1/firmware/upload", headers=headers, files=form, data={"channel": channel}
        )
        assert answer.json()["code"] == "malformed"
        assert list(fleet.site_folder.iterdir()) == []


# ---- backup, schedules


def test_F126_a_backup_of_a_running_server_is_a_server(tmp_path):
    """A lost server: from its backup and the tree another goes on, and its boards with it."""
    site = tmp_path / "site"
    servers.publish_version(site, "1.1.0")
    with servers.serving(site) as server:
        remote = Remote(server)
        board = Board(remote, "b1")
        board.token = server.token("device")
        board.update()
        done = subprocess.run(
            [Path(sys.executable).with_name("twinslot"), "fleet", "backup", server.data,
             tmp_path / "kept" / "b.tar.gz"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        admin = remote.admin
        secrets = [server.token("operator"), server.token("device")]
        remote.client.close()
    kept = tmp_path / "kept" / "b.tar.gz"
    assert kept.stat().st_mode & 0o777 == 0o600
    restored = tmp_path / "restored"
    with tarfile.open(kept) as tar:
        tar.extractall(restored, filter="data")
    told = b"".join(p.read_bytes() for p in restored.iterdir())
    assert not any(secret.encode() in told for secret in secrets), "a backup is no pass"
    assert (restored / "operator-token.sha256").stat().st_mode & 0o777 == 0o600
    with servers.serving(site, data=restored) as server:
        remote = Remote(server, admin)
        assert remote.api("GET", "devices/b1")["status"] == "confirmed"
        board.fleet = remote  # its token and what it runs are all a board has
        assert not board.poll()["update_available"]
        servers.publish_version(site, "1.2.0")
        assert board.update() == "1.2.0"
        assert remote.api("GET", "devices/b1")["current_version"] == "1.2.0"
        remote.client.close()


def test_F113_a_server_without_space_refuses_uploads_and_answers_boards(tmp_path):
    """By a limit of the system: no file may grow beyond what the registry has already."""
    site = tmp_path / "site"
    servers.publish_version(site, "1.1.0")
    with servers.serving(site, "--keys", str(servers.public_keys(tmp_path))) as server:
        remote = Remote(server)
        board = Board(remote, "b1")
        board.token = server.token("device")
        board.update()
        other = tmp_path / "made" / "site"
        other.mkdir(parents=True)
        form = fleets.upload_files(other, servers.publish_version(other, "1.2.0"))
        headers = {"Authorization": f"Bearer {remote.admin}"}

        def upload():
            return remote.client.post("/api/v1/firmware/upload", headers=headers, files=form)

        before = sorted(site.rglob("*"))
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (30_000, limits[1]))
        refused = upload()
        assert (refused.status_code, refused.json()["code"]) == (507, "no_space")
        assert [p for p in sorted(site.rglob("*")) if p.is_file()] == [
            p for p in before if p.is_file()
        ]
        answers = [
            remote.client.post(
                "/api/v1/report-status",
                headers={"Authorization": f"Bearer {board.token}"},
                json={"device_id": f"b{n}", "attempt": "1", "status": "staging"},
            ).status_code
            for n in range(40)
        ]
        assert set(answers) <= {200, 503}
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        assert upload().status_code == 201
        assert not board.poll()["update_available"]
        remote.client.close()


def test_a_backup_holds_the_hash_of_each_token_whether_or_not_one_was_kept(tmp_path):
    """A server of before left the tokens only; and one may have been changed since the start."""
    made = {role: f"the-{role}-0123456789abcdef" for role in ("device", "operator")}
    for role, token in made.items():
        (tmp_path / f"{role}-token").write_text(token)
    (tmp_path / "device-token.sha256").write_text(f"sha256:{'0' * 64}\n")
    with tarfile.open(backup.make(tmp_path, tmp_path / "b.tar.gz")) as tar:
        tar.extractall(tmp_path / "restored", filter="data")
    for role, token in made.items():
        assert tokens.load(tmp_path / "restored" / f"{role}-token", "UNSET").matches(token)
    assert not list((tmp_path / "restored").glob("*-token"))


def test_a_backup_that_can_not_be_made_says_why(tmp_path, capsys):
    assert backup.main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "nowhere" in capsys.readouterr().err


SCHEDULES = """
- name: nightly
  cron: "30 2 * * *"
  zone: Europe/Berlin
  action: {do: gc}
- name: start
  cron: "* * * * *"
  action: {do: start_rollout, rollout: 1}
"""


def test_schedules_come_from_the_file_and_run(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "schedules.yaml").write_text(SCHEDULES)
    (tmp_path / "server.yml").write_text("schedules: schedules.yaml\n")
    config = str(tmp_path / "server.yml")
    with servers.serving(tmp_path / "site", "--config", config) as server:
        remote = Remote(server)
        rows = remote.api("GET", "schedules")["schedules"]
        assert [(r["name"], r["source"]) for r in rows] == [("nightly", "file"), ("start", "file")]
        bad = {"name": "x", "cron": "61 * * * *", "action": {"do": "gc"}}
        assert remote.api("POST", "schedules", bad)["code"] == "malformed"
        remote.client.close()
    (tmp_path / "schedules.yaml").write_text(SCHEDULES.replace("do: gc", "do: everything"))
    command = [sys.executable, "-m", "twinslot_server", str(tmp_path / "site"), "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "schedule 1 'nightly'" in done.stderr and "everything" in done.stderr


def cron_matches(expression, when):
    """crontab(5), spelled out: the oracle."""
    minute, hour, day, month, weekday = expression.split()

    def among(field, value, low, high):
        for part in field.split(","):
            span, _, step = part.partition("/")
            first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
            last = last or (high if step else first)
            if value in range(int(first), int(last) + 1, int(step or 1)):
                return True
        return False

    sunday_first = (when.weekday() + 1) % 7
    on_day = among(day, when.day, 1, 31)
    on_weekday = any(among(weekday, n, 0, 7) for n in {sunday_first, sunday_first or 7})
    starred = day[0] == "*" or weekday[0] == "*"
    return (
        among(minute, when.minute, 0, 59)
        and among(hour, when.hour, 0, 23)
        and among(month, when.month, 1, 12)
        and (on_day and on_weekday if starred else on_day or on_weekday)
    )


@pytest.mark.parametrize(
    "expression",
    ["0 9 * * 1", "0 9 * * 0", "0 9 * * 7", "30 2 * * 1-5", "0 0 * * 5-7", "0 12 13 * 5",
     "15 3 1-7 * */2", "0 6 */10 * 0,3", "0 0 1,15 * 2-6/2", "5 4 29 2 *"],
)  # fmt: skip
def test_cron_is_what_crontab_says(expression):
    """APScheduler's own counts Monday as 0, and wants day and weekday both."""
    trigger = cron.trigger(expression, "UTC")
    when = dt.datetime(2026, 11, 18, tzinfo=dt.UTC)
    end = when + dt.timedelta(days=120)
    hours = (when + dt.timedelta(minutes=n) for n in range(0, 120 * 1440, 5))
    wanted = [moment for moment in hours if cron_matches(expression, moment)]
    found, previous = [], None
    while (previous := trigger.get_next_fire_time(previous, when)) and previous < end:
        found.append(previous)
        when = previous + dt.timedelta(seconds=1)
    assert found == wanted


@pytest.mark.parametrize(
    "expression", ["", "* * * *", "61 * * * *", "* * * * 8", "* * * * x", "* * * * 1/0"]
)
def test_what_is_no_cron_expression_says_so(expression):
    with pytest.raises(ValueError, match="cron"):
        cron.trigger(expression, "UTC")
    with pytest.raises(ValueError, match="Mars"):
        cron.trigger("* * * * *", "Mars/Base")


@pytest.mark.parametrize("days", ["30 2 *", "31 4,6 *", "31 2 */2"])
def test_a_schedule_whose_moment_never_comes_is_refused(tmp_path, days):
    plan = {"name": "x", "cron": f"0 0 {days}", "action": {"do": "gc"}}
    with fleets.running(tmp_path) as fleet:
        refused = fleet.api("POST", "schedules", plan)
        assert (refused["code"], refused["status"]) == ("malformed", 422)
        assert plan["cron"] in refused["detail"]
        assert fleet.api("GET", "schedules")["schedules"] == []
        plan["cron"] = "0 0 29 2 *"
        assert fleet.api("POST", "schedules", plan)["id"] == 1


def test_days_have_names_too():
    friday = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
    for expression, day in (("0 9 * * MON", 23), ("0 9 * * sat-mon", 21), ("0 9 * * sun", 22)):
        assert cron.trigger(expression, "UTC").get_next_fire_time(None, friday).day == day


def test_one_rollout_that_can_not_be_moved_on_stops_no_other(tmp_path):
    with fleets.running(tmp_path) as fleet:
        fleet.publish("1.0.0")
        Board(fleet, "b1", version="0.9.0").poll()  # one for nobody would not be started
        plan = {"firmware_id": 1, "starts_at": "2000-01-01T00:00:00Z"}
        broken, well = (fleet.api("POST", "rollouts", plan)["id"] for _ in range(2))
        fleet.store.write(
            lambda c: c.execute(
                schema.rollouts.update().where(schema.rollouts.c.id == broken).values(stages=3)
            )
        )
        clock = Background(fleet.parts, fleet.data)
        clock.tick()
        assert fleet.api("GET", f"rollouts/{well}")["state"] == "pilot"
        clock._leader.release()


def test_who_leads_is_settled_among_threads_too(store, tmp_path):
    """Tick, webhooks and schedules ask in threads of their own; none may take it from another."""
    leader, other = Leader(store, tmp_path), Leader(store, tmp_path)
    together = threading.Barrier(8)
    found = []

    def ask():
        together.wait()
        found.append(leader.holds())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert not other.holds()
    leader.release()


TWO_IN_THE_MORNING = int(dt.datetime(2026, 11, 18, 2, tzinfo=dt.UTC).timestamp())
COLLECTS = {"name": "nightly", "cron": "30 2 * * *", "zone": "UTC", "action": {"do": "gc"}}


def planned_at(fleet, made_min=0, plan=COLLECTS):
    """Make a schedule so many minutes after two in the morning; return its number."""
    made = TWO_IN_THE_MORNING + 60 * made_min
    return fleet.store.write(lambda c: schedules.put(c, plan, "api", made))


def looked(fleet, *minutes):
    """Start a worker for each of these minutes after two; return how often a schedule ran."""
    for minute in minutes:
        clock = Background(fleet.parts, fleet.data, lambda m=minute: TWO_IN_THE_MORNING + 60 * m)
        clock.keep_schedules()
        clock._leader.release()
    return [line["action"] for line in fleet.api("GET", "audit")["audit"]].count("firmware.gc")


@pytest.mark.parametrize(
    ("made", "looks", "runs"),
    [
        pytest.param(0, (29,), 0, id="before it"),
        pytest.param(0, (30, 31), 1, id="at it"),
        pytest.param(0, (40, 41), 1, id="ten minutes late"),
        pytest.param(0, (120, 121), 0, id="too late"),
        pytest.param(31, (40,), 0, id="made after it"),
        pytest.param(0, (30, 30 + 1440, 31 + 1440), 2, id="the next day, too"),
    ],
)
def test_a_moment_is_made_up_for_within_the_hour_and_runs_once(tmp_path, made, looks, runs):
    """Each look is of a worker that has just begun, by a restart or because another ended."""
    with fleets.running(tmp_path) as fleet:
        planned_at(fleet, made)
        assert looked(fleet, *looks) == runs


def test_a_schedule_that_is_replaced_runs_as_it_is_now(tmp_path):
    """SQLite gives the new one the number of the old."""
    with fleets.running(tmp_path) as fleet:
        first = planned_at(fleet)
        assert planned_at(fleet, 0, {**COLLECTS, "cron": "0 5 * * *"}) == first
        assert looked(fleet, 40) == 0
        assert looked(fleet, 181) == 1


def test_a_moment_is_taken_by_one_of_several_workers(pg, tmp_path):
    """Both would have seen that it is due, though only one can lead."""
    url = fresh(pg, "moment")
    workers = [Fleet(tmp_path, url) for _ in range(2)]
    other = sqlalchemy.create_engine(url)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    try:
        number, late = planned_at(workers[0]), TWO_IN_THE_MORNING + 40 * 60
        with ThreadPoolExecutor(2) as pool:
            with other.begin() as connection:
                schedules.take(connection, number, TWO_IN_THE_MORNING)  # not due: only held
                runs = [
                    pool.submit(planned.run, worker.parts, worker.data, number, late)
                    for worker in workers
                ]
                while connection.exec_driver_sql(waits).scalar_one() < len(runs):
                    assert not any(run.done() for run in runs)
            for run in runs:
                run.result()
        assert looked(workers[0]) == 1
    finally:
        other.dispose()
        for worker in workers:
            worker.close()


def test_a_schedule_that_another_worker_leads_is_left_to_it(tmp_path):
    with fleets.running(tmp_path) as fleet:
        planned_at(fleet)
        leader = Leader(fleet.store, fleet.data)
        assert leader.holds()
        assert looked(fleet, 40) == 0
        leader.release()
        assert looked(fleet, 41) == 1


def test_a_cron_moment_comes_and_what_was_planned_for_it_is_done_once(tmp_path):
    """By the scheduler itself, whose clock stands just before the minute."""
    with fleets.running(tmp_path) as fleet:
        minute = (int(time.time()) // 60 + 2) * 60
        ahead = minute - 2 - time.time()
        clock = Background(fleet.parts, fleet.data, lambda: time.time() + ahead)
        plan = {**COLLECTS, "cron": "* * * * *"}
        fleet.store.write(lambda c: schedules.put(c, plan, "api", minute - 2))
        clock.start()
        try:
            deadline = time.monotonic() + 60
            while (row := fleet.store.read(schedules.listing)[0])["last_result"] in (
                None,
                "begun",
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            clock.stop()
        assert row["last_run"] >= minute
        assert row["last_result"] == "removed 0 payloads"
        assert looked(fleet) == 1


def test_what_schedules_yaml_changes_is_in_the_log(tmp_path):
    with fleets.running(tmp_path) as fleet:
        hourly = {**COLLECTS, "name": "hourly", "cron": "0 * * * *"}
        for wanted in ([COLLECTS, hourly], [COLLECTS, hourly], [{**COLLECTS, "zone": "CET"}], []):
            fleet.store.write(lambda c, w=wanted: schedules.sync_file(c, w, TWO_IN_THE_MORNING))
        lines = fleet.api("GET", "audit")["audit"][::-1]
        assert {line["who"] for line in lines} == {"disk"}
        assert [(line["action"], line["target"]) for line in lines] == [
            ("schedule.create", "schedule nightly"),
            ("schedule.create", "schedule hourly"),
            ("schedule.remove", "schedule hourly"),
            ("schedule.create", "schedule nightly"),
            ("schedule.remove", "schedule nightly"),
        ]
        assert (lines[3]["before"], lines[3]["after"]) == ({"zone": "UTC"}, {"zone": "CET"})


def test_it_stops_in_the_middle_of_a_tick(tmp_path):
    """The tick needs the scheduler's own lock, which that held while it waited for the tick."""
    with fleets.running(tmp_path) as fleet:
        clock = Background(fleet.parts, fleet.data)
        clock.start()
        held, let_go = threading.Event(), threading.Event()
        fleet.store.submit(lambda c: held.set() or let_go.wait())
        held.wait()
        clock._clock.add_job(clock._guarded(clock.tick))
        while not clock._working:
            time.sleep(0.01)
        stopping = threading.Thread(target=clock.stop, daemon=True)
        stopping.start()
        while clock._clock.running:
            time.sleep(0.01)
        let_go.set()
        stopping.join(20)
        assert not stopping.is_alive()


# ---- a simulated fleet


def simulate(server, *arguments):
    """Run ``twinslot fleet sim`` for 1.1.0; return its exit code and what it found.

    No channel points to it: that boards may have it must be said.
    """
    api = Api(server.url, server.token("operator"), server.data / "server.crt")
    release = api.call("GET", "firmware")["firmware"][0]["id"]
    api.call("PATCH", f"firmware/{release}", {"pilot_ready": True})
    environment = {
        **os.environ,
        "TWINSLOT_URL": server.url,
        "TWINSLOT_CA": str(server.data / "server.crt"),
        "TWINSLOT_TOKEN": server.token("operator"),
        "TWINSLOT_DEVICE_TOKEN": server.token("device"),
    }
    program = Path(sys.executable).with_name("twinslot")
    command = [program, "fleet", "sim", servers.PRODUCT, "1.1.0", "--timeout", "60", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=150
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_bad_build_stops_in_a_simulated_fleet_and_the_books_agree(tmp_path):
    site = tmp_path / "site"
    servers.publish_version(site, "1.1.0")
    (site / servers.PRODUCT / "stable.json").unlink()
    keys = str(servers.public_keys(tmp_path))
    with servers.serving(site, "--keys", keys) as server:
        code, found = simulate(
            server, "--boards", "60", "--bad", "50%", "--cut", "30%", "--poll", "0.5",
            "--stage", "20%", "--stage", "100%", "--policy", "max_concurrent=5",
        )  # fmt: skip
    assert found["differences"] == 0, found["examples"]
    assert found["state"] == "paused"
    assert found["met"]["1.1.0"] <= found["bound"]
    assert found["bound"] == found["planned"][found["stage"] - 1] + 5
    assert (code, found["over"]) == (0, 0)


def test_boards_that_met_a_build_too_early_are_counted_in_any_stage(tmp_path):
    servers.publish_version(tmp_path / "site", "1.1.0")
    keys = str(servers.public_keys(tmp_path))
    body = {"product": servers.PRODUCT, "version": "1.1.0", "policy": {"max_concurrent": 2}}
    body["stages"] = [{"label": "ring=pilot"}, {"percent": 100}]
    with servers.serving(tmp_path / "site", "--keys", keys) as server:
        board = Board(Remote(server), "b1")
        board.token = server.token("device")
        board.poll()  # it belongs to the second stage
        board.fleet.client.close()
        api = Api(server.url, server.token("operator"), server.data / "server.crt")
        release = api.call("GET", "firmware")["firmware"][0]["id"]
        api.call("PATCH", f"firmware/{release}", {"pilot_ready": True})
        watching = fleet_cli._watch(api, body, 0, asyncio.Event(), 0, lambda: 9)
        found = asyncio.run(watching)
    assert (found["bound"], found["over"]) == (0 + 2, 9 - 2)


def test_virtual_boards_are_updated_among_simulated_ones(tmp_path):
    """What they run is read from their flash, and the server believes the same."""
    site = tmp_path / "site"
    image = lab.virtual_firmware(tmp_path, "1.1.0")
    spec = publish.Spec(version="1.1.0", product=servers.PRODUCT, hardware=(servers.HARDWARE,))
    publish.publish(image, spec, servers.signing_key(), site)
    (site / servers.PRODUCT / "stable.json").unlink()
    keys = str(servers.public_keys(tmp_path))
    with servers.serving(site, "--keys", keys, "--poll", "1") as server:
        code, found = simulate(
            server, "--boards", "10", "--poll", "0.5", "--stage", "100%", "--real", "2",
            "--keys", keys,
        )  # fmt: skip
    assert found["differences"] == 0, found["examples"]
    assert list(found["real"].values()) == ["confirmed"] * 2
    assert (code, found["state"], found["planned"]) == (0, "complete", [12])


def test_the_load_tool_measures_a_server(tmp_path):
    command = [sys.executable, ROOT / "tools" / "load.py", "--boards", "20", "--seconds", "0.2"]
    command += ["--storm", "0.2", "--only", "sqlite", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bare"]["polls"]["per_s"] > 0
    for what in ("first_storm", "polls", "reports", "storm"):
        assert set(found["sqlite"][what]["statuses"]) == {"200"}
    assert found["sqlite"]["first_storm"]["all_known_s"] > 0
    assert found["sqlite"]["first_storm"]["statuses"]["200"] == 20


DEPLOY = ROOT / "server_stub/deploy"


def test_the_example_configuration_is_one():
    settings.load(ROOT / "config/server.yml", {}, {})
    schedules.read_file(ROOT / "config/schedules.yaml")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """The interpreter it names exists only where it was installed; this one stands in for it."""
    unit = tmp_path / "twinslot.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("/opt/twinslot/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_the_server(tmp_path):
    """Its ExecStart, with this interpreter and these folders in place of its own."""
    command = re.search(r"^ExecStart=(.*)$", (DEPLOY / "twinslot.service").read_text(), re.M)[1]
    (tmp_path / "etc").mkdir()
    shutil.copytree(ROOT / "config", tmp_path / "etc/twinslot")
    for state in ("site", "data"):
        (tmp_path / state).mkdir(mode=0o700)
    command = command.replace("/opt/twinslot/bin/python", sys.executable)
    command = command.replace("/etc/", f"{tmp_path}/etc/").replace(
        "/var/lib/twinslot", str(tmp_path)
    )
    with started(command.split(), tmp_path, TWINSLOT_PORT="0") as url:
        assert url.startswith("https://127.0.0.1:")
    assert (tmp_path / "data/operator-token").exists()


def test_the_container_starts_healthy(tmp_path):
    """What the Containerfile sets and starts, with a folder in place of its volume; its build is
    the wheel's, which CI doesn't need a registry for."""
    text = (DEPLOY / "Containerfile").read_text().replace("/var/lib/twinslot", str(tmp_path))
    environment = dict(w.split("=") for w in re.search(r"^ENV (.*)$", text, re.M)[1].split())
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    check = json.loads(re.search(r"^HEALTHCHECK .*CMD (.*)$", text, re.M)[1])
    (tmp_path / "site").mkdir()
    environment |= {"TWINSLOT_PORT": "0", "TWINSLOT_NAMES": "[updates.example.org]"}
    with started([sys.executable, *entry[1:]], tmp_path, **environment) as url:
        assert url.startswith("https://0.0.0.0:")
        probe = check[-1].replace(":8443", ":" + url.rpartition(":")[2])
        subprocess.run([sys.executable, *check[1:-1], probe], check=True, timeout=20)
    assert (tmp_path / "data/operator-token").exists()
    assert subprocess.run([sys.executable, *check[1:-1], probe], check=False).returncode


def test_the_container_is_made_of_all_that_the_package_needs():
    """What .dockerignore leaves is what pyproject.toml names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    needed = {path.partition("/")[0] for path in tools["package-dir"].values()}
    needed |= {path for paths in tools["data-files"].values() for path in paths}
    needed |= {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert kept == needed
    assert all((ROOT / path).exists() for path in kept)


@contextlib.contextmanager
def started(command, folder, **environment):
    """Run a server as something else starts it; yield where it listens."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder,
            env={**os.environ, **environment},
        )  # fmt: skip
    try:
        line = servers._first_line(process)
        assert line.startswith("listening "), (folder / "log").read_text()
        yield line.split()[1]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_dies_at_once_when_killed_and_starts_again(tmp_path):
    (tmp_path / "site").mkdir()
    for _ in range(2):
        with servers.serving(tmp_path / "site") as server:
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(5) == -signal.SIGKILL

"""The page in a real browser: log-in, roles, a rollout live; and what its headers and forms hold.

The browser is the system's chromium (.ci/run installs it), driven by Playwright.
"""

import os
import re
import shutil
import threading
from pathlib import Path

import fleet as fleets
import pytest
import servers
from fleet import Board, Fleet, running
from playwright.sync_api import expect, sync_playwright

from twinslot_server import auth, rollouts

PASSWORD = "correct horse battery"
SHOTS = os.environ.get("TWINSLOT_SCREENSHOTS")


def browser_path():
    return shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def fleet(tmp_path):
    with running(tmp_path) as found:
        found.publish("1.0.0")
        yield found


def logged_in(fleet, name="anna", role="operator"):
    fleet.api("PUT", f"users/{name}", {"role": role, "password": PASSWORD})
    answer = fleet.client.post("/-/login", data={"name": name, "password": PASSWORD})
    assert (answer.status_code, answer.headers["location"]) == (303, "/-/")
    return answer


def csrf(fleet):
    return re.search(r'name="csrf" value="([^"]+)"', fleet.client.get("/-/").text)[1]


def assert_refused(answer, status, why):
    """It is said on a page, with the way to the others."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert "could not be done" in answer.text and why in answer.text, answer.text
    assert '<a href="/-/devices"' in answer.text


def test_nobody_sees_anything_before_logging_in(fleet):
    for path in fleets.PAGES:
        answer = fleet.client.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/-/login"), path
    assert fleet.client.get("/-/events/1").headers["location"] == "/-/login"
    assert fleet.client.get("/-/static/../page.py").status_code == 404


def test_the_cookie_and_the_headers_keep_others_out(fleet):
    cookie = logged_in(fleet).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    for path in ("/-/", "/-/login", "/-/static/page.js"):
        policy = fleet.client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
    for template in (Path(rollouts.__file__).parent / "templates").glob("*.html"):
        assert not re.search(r"<script>|\son\w+=|style=", template.read_text()), template.name


def test_a_form_without_its_token_changes_nothing(fleet):
    Board(fleet, "b1").poll()
    logged_in(fleet)
    for token in ("", "x", csrf(fleet)[:-1]):
        answer = fleet.client.post("/-/devices/b1", data={"pin": "9.9.9", "csrf": token})
        assert_refused(answer, 403, "not from this page")
    assert fleet.api("GET", "devices/b1")["pin"] is None
    fleet.client.post("/-/devices/b1", data={"pin": "9.9.9", "csrf": csrf(fleet)})
    assert fleet.api("GET", "devices/b1")["pin"] == "9.9.9"
    line = fleet.api("GET", "audit")["audit"][0]
    assert (line["who"], line["action"]) == ("anna", "device.change")


def test_boards_that_wait_are_accepted_as_they_are_filtered(fleet):
    for board in ("a1", "a2", "b1"):
        Board(fleet, board).poll()
        fleet.api("PATCH", f"devices/{board}", {"enrolment": "pending"})
    logged_in(fleet)
    page = fleet.client.get("/-/devices?enrolment=pending&q=a").text
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    assert fleet.client.post("/-/devices-accept", data=hidden).status_code == 303
    waiting = fleet.api("GET", "devices?enrolment=pending")["devices"]
    assert [row["device_id"] for row in waiting] == ["b1"]


def test_a_filter_that_was_saved_is_found_used_and_forgotten(fleet):
    for board, site in (("a1", "home"), ("b1", "away")):
        Board(fleet, board, labels=[f"site={site}"]).poll()
    logged_in(fleet)
    query = {"label": "site=home", "enrolment": "accepted"}
    page = fleet.client.get("/-/devices", params=query).text
    form = page.partition('action="/-/filters"')[2].partition("</form>")[0]
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form))
    answer = fleet.client.post("/-/filters", data={**hidden, "name": "at-home"})
    assert answer.status_code == 303
    page = fleet.client.get("/-/devices").text
    link = re.search(r'href="(\?[^"]+)">at-home<', page)[1].replace("&amp;", "&")
    page = fleet.client.get(f"/-/devices{link}").text
    assert ">a1<" in page and ">b1<" not in page and "Forget the filter at-home" in page
    fleet.client.post("/-/filters/at-home/remove", data={"csrf": csrf(fleet)})
    assert fleet.api("GET", "filters") == {"filters": []}


def test_who_is_logged_in_by_the_configured_proxy_needs_no_password(tmp_path):
    proxy = {"header": "X-Forwarded-User", "secret": "known-to-the-proxy-alone"}
    good = {"X-Forwarded-User": "anna", "X-Twinslot-Proxy": proxy["secret"]}
    with running(tmp_path, proxy_login=proxy) as fleet:
        fleet.api("PUT", "users/anna", {"role": "operator"})
        for bad in (
            {"X-Forwarded-User": "anna"},
            {**good, "X-Twinslot-Proxy": "guessed"},
            {**good, "X-Forwarded-User": "nobody"},
            [*good.items(), ("X-Forwarded-User", "ada")],
        ):
            answer = fleet.client.get("/-/login", headers=bad)
            assert "Password" in answer.text and "Go on" not in answer.text, bad
            answer = fleet.client.post("/-/login", headers=bad, data={"vouched": "yes"})
            assert answer.status_code == 401 and "set-cookie" not in answer.headers, bad
        assert fleet.client.get("/-/", headers=good).headers["location"] == "/-/login"
        assert fleet.client.get("/api/v1/devices", headers=good).status_code == 401
        before = fleet.api("GET", "audit")
        answer = fleet.client.get("/-/login", headers=good)
        assert "Go on as anna" in answer.text and "set-cookie" not in answer.headers
        assert fleet.api("GET", "audit") == before  # to look is no change
        answer = fleet.client.post("/-/login", headers=good, data={"vouched": "yes"})
        assert "SameSite=strict" in answer.headers["set-cookie"]
        assert "anna · operator" in fleet.client.get("/-/").text
        assert fleet.api("GET", "audit")["audit"][0]["who"] == "anna"
        out = fleet.client.post("/-/logout", headers=good, data={"csrf": csrf(fleet)})
        assert "Password" in fleet.client.get(out.headers["location"], headers=good).text


def test_no_header_logs_anybody_in_unless_it_is_configured(fleet):
    fleet.api("PUT", "users/anna", {"role": "admin"})
    headers = {"X-Forwarded-User": "anna", "X-Twinslot-Proxy": ""}
    assert "set-cookie" not in fleet.client.get("/-/login", headers=headers).headers


def test_an_admin_sets_how_often_boards_ask_and_who_is_accepted(fleet):
    logged_in(fleet, "ada", "admin")
    values = {"default": "60", "labels": "power=battery 900\r\n", "enrolment": "pending"}
    values |= {"accept": "product=a hardware=b\r\nmac=c", "csrf": csrf(fleet)}
    assert fleet.client.post("/-/settings", data=values).status_code == 303
    found = fleet.api("GET", "settings")
    assert found["poll"] == {"default": 60, "labels": {"power=battery": 900}}
    rules = [{"product": "a", "hardware": "b"}, {"mac": "c"}]
    assert found["enrolment"] == {"default": "pending", "accept": rules}
    page = fleet.client.get("/-/rules").text
    assert "power=battery 900" in page and "product=a hardware=b" in page
    fleet.client.post("/-/settings", data={"csrf": csrf(fleet)})
    assert fleet.api("GET", "settings")["set"] == []


def test_a_viewer_sees_and_changes_nothing(fleet):
    Board(fleet, "b1").poll()
    logged_in(fleet, "victor", "viewer")
    page = fleet.client.get("/-/devices/b1").text
    assert "Set label" not in page and "offers nothing" not in page
    answer = fleet.client.post("/-/devices/b1", data={"pin": "1", "csrf": csrf(fleet)})
    assert_refused(answer, 403, "role operator")


def test_guessing_is_slowed_down(fleet):
    fleet.api("PUT", "users/anna", {"role": "viewer", "password": PASSWORD})
    codes = [
        fleet.client.post("/-/login", data={"name": "anna", "password": f"x{n}"}).status_code
        for n in range(7)
    ]
    assert codes == [401] * 5 + [429] * 2
    right = fleet.client.post("/-/login", data={"name": "anna", "password": PASSWORD})
    assert right.status_code == 429


def test_what_a_board_says_is_text_on_every_page(fleet):
    """F119: no script of a board's runs on the operator's page."""
    evil = "<script>alert(1)</script>"
    board = Board(fleet, "b1", agent=evil, labels=[f"x={evil}"[:60]])
    board.poll()
    board.attempt = evil
    board.report("failed", "1.1.0", {"code": "x", "message": evil})
    logged_in(fleet)
    for path in ("/-/", "/-/devices", "/-/devices/b1", "/-/logs", f"/-/devices?q={evil}"):
        assert evil not in fleet.client.get(path).text
    assert "&lt;script&gt;" in fleet.client.get("/-/devices/b1").text


def test_log_out_ends_the_session_for_good(fleet):
    logged_in(fleet)
    cookies = dict(fleet.client.cookies)
    fleet.client.post("/-/logout", data={"csrf": csrf(fleet)})
    fleet.client.cookies.update(cookies)
    assert fleet.client.get("/-/").headers["location"] == "/-/login"


def test_a_session_reads_the_api_and_changes_nothing_there(fleet):
    """The page's links to exports and downloads work; other sites' forms don't."""
    Board(fleet, "b1").poll()
    assert fleet.client.get("/api/v1/export/devices?format=csv").status_code == 401
    logged_in(fleet)
    assert "b1" in fleet.client.get("/api/v1/export/devices?format=csv").text
    assert fleet.client.get("/api/v1/users").json()["code"] == "forbidden"
    answer = fleet.client.request("PATCH", "/api/v1/devices/b1", json={"pin": "1.0.0"})
    assert answer.status_code == 401


def test_a_stream_ends_with_its_session(fleet):
    """What a user who was removed has open must not go on telling."""
    number = fleet.release("1.0.0")["id"]
    fleet.api("POST", "rollouts", {"firmware_id": number})
    logged_in(fleet)
    done = threading.Event()

    def leave():
        fleet.store.write(lambda c: auth.remove_user(c, "anna"))
        done.set()

    threading.Timer(0.2, leave).start()
    answer = fleet.client.get("/-/events/1")  # returns when the stream ends
    assert done.is_set()
    assert answer.text.startswith("data: {")


def forms(fleet, tmp_path):
    """What each form of the page sends, by its route; in an order that works."""
    board = Board(fleet, "b1")
    board.poll()
    newer = fleet.upload(tmp_path, "1.1.0").json()["id"]
    fleet.api("PATCH", f"firmware/{newer}", {"pilot_ready": True})
    taken = {"firmware_id": newer, "stages": [{"percent": 100}], "start": True}
    assert fleet.api("POST", "rollouts", taken)["id"] == 1
    assert board.update() == "1.1.0"
    older = fleet.upload(tmp_path, "0.9.0", downgrade=True).json()["id"]
    fleet.api("PATCH", f"firmware/{older}", {"pilot_ready": True})
    job = fleet.api("POST", "ota/updates", {"firmware_id": newer})["id"]
    window = fleet.api("POST", "windows", {"start": "00:00", "end": "00:00"})["id"]
    plan = {"name": "n", "cron": "0 3 * * *", "action": {"do": "gc"}}
    schedule = fleet.api("POST", "schedules", plan)["id"]
    hook = fleet.api("POST", "webhooks", {"url": "https://example.org/"})["id"]
    fleet.api("PUT", "users/otto", {"role": "viewer"})
    fleet.upload(tmp_path, "1.3.0")
    spare = fleet.release("1.3.0")["id"]
    site = tmp_path / "form" / "site"
    site.mkdir(parents=True)
    files = fleets.upload_files(site, servers.publish_version(site, "1.2.0"))
    days = {f"day{day}": "yes" for day in range(5)}
    span = {"start": "22:00", "end": "04:00", "zone": "Europe/Berlin"}
    careful = {"success_percent": "90", "bake_s": "0", "gate": "yes", "label": "site=home"}
    stages = "ring=pilot, 20, 2.5%, 100%"
    return [
        ("/-/devices/{device_id}", "b1", {"key": "site", "value": "home"}),
        ("/-/devices/{device_id}/token", "b1", {}),
        ("/-/devices-accept", None, {"q": "b"}),
        ("/-/filters", None, {"name": "here", "label": "site=home"}),
        ("/-/filters/{name}/remove", "here", {}),
        ("/-/devices-import", None, {"file": b"device_id,token\nb2,new\n"}),
        ("/-/releases-upload", None, files),
        ("/-/releases/{number:int}", newer, {"stable": "yes", "notes": "quieter"}),
        ("/-/releases/{number:int}/promote", newer, {"channel": "beta"}),
        ("/-/releases/{number:int}/remove", spare, {}),
        ("/-/releases-collect", None, {}),
        ("/-/rollouts", None, {"firmware_id": newer, "stages": stages, **careful}),
        ("/-/rollouts/{number:int}/{action}", "2/start", {}),
        ("/-/rollouts/{number:int}/target", 2, {"label": ""}),
        ("/-/rollouts/{number:int}/policy", 2, {"success_percent": "80", "gate": "yes"}),
        ("/-/updates", None, {"firmware_id": newer, "nodes": "b1", "force_update": "yes"}),
        ("/-/updates/{number:int}/cancel", job, {}),
        ("/-/rollouts/{number:int}/back", 1, {"version": "0.9.0"}),
        ("/-/labels", None, {"key": "site", "description": "where it is"}),
        ("/-/windows", None, {"label": "*", "kind": "install", **span, **days}),
        ("/-/windows/{number:int}/remove", window, {}),
        ("/-/schedules", None, {"name": "m", "cron": "0 3 * * *", "zone": "UTC", "do": "gc"}),
        ("/-/schedules/{number:int}/remove", schedule, {}),
        ("/-/settings", None, {"default": "60", "enrolment": "accepted"}),
        ("/-/users", None, {"name": "berta", "role": "viewer"}),
        ("/-/users/{name}/remove", "otto", {}),
        ("/-/webhooks", None, {"url": "https://example.org/", "events": "rollout.*"}),
        ("/-/webhooks/{number:int}/remove", hook, {}),
        ("/-/devices/{device_id}/retire", "b1", {}),
    ]


def send(fleet, path, argument, values, token):
    filled = re.sub(r"\{.*\}", str(argument), path)
    if isinstance(values, list):
        return fleet.client.post(filled, files=values, data={"csrf": token})
    if "file" in values:
        files = {"file": ("b.csv", values["file"])}
        return fleet.client.post(filled, files=files, data={"csrf": token})
    return fleet.client.post(filled, data={**values, "csrf": token})


def test_every_form_does_its_change_once_and_for_those_who_may(fleet, tmp_path):
    """The routes are those of the application: a form that is added must be added here."""
    wanted = forms(fleet, tmp_path)
    posts = {r.path for r in fleet.app.routes if "POST" in (getattr(r, "methods", None) or ())}
    posts = {path for path in posts if path.startswith("/-/")}
    assert {path for path, *_ in wanted} == posts - {"/-/login", "/-/logout"}
    logged_in(fleet, "victor", "viewer")
    token = csrf(fleet)
    for path, argument, values in wanted:
        assert_refused(send(fleet, path, argument, values, token), 403, "this needs the role")
    logged_in(fleet, "ada", "admin")
    token = csrf(fleet)
    for path, argument, values in wanted:
        before = fleet.api("GET", "audit", params={"limit": 1000})["audit"]
        answer = send(fleet, path, argument, values, token)
        assert answer.status_code in (200, 303), (path, answer.text)
        after = fleet.api("GET", "audit", params={"limit": 1000})["audit"]
        assert len(after) == len(before) + 1, path
        assert after[0]["who"] == "ada"
        once = path.rpartition("/")[2] in ("token", "devices-import", "users", "webhooks")
        assert ("shown this once" in answer.text) == once, path
    assert fleet.release("1.1.0")["notes"] == "quieter"
    rollout = fleet.api("GET", "rollouts/2")
    assert rollout["stages"] == [
        {"label": "ring=pilot"},
        {"count": 20},
        {"percent": 2.5},
        {"percent": 100},
    ]
    assert rollout["policy"]["gate"] is True and rollout["policy"]["promote"] is False
    assert (rollout["policy"]["success_percent"], rollout["policy"]["bake_s"]) == (80, 0)
    for path in (
        "",
        "devices",
        "releases",
        "rollouts",
        "rollouts/3",
        "updates",
        "rules",
        "people",
        "logs",
    ):
        assert fleet.client.get(f"/-/{path}").status_code == 200, path


def test_what_can_not_be_is_said_on_a_page(fleet):
    Board(fleet, "b1").poll()
    logged_in(fleet)
    token = csrf(fleet)
    for path, values, why in (
        ("rollouts", {"firmware_id": "1", "stages": "0%"}, "out of range"),
        ("rollouts", {"firmware_id": "x"}, "expected a number"),
        ("windows", {"label": "*", "kind": "install", "start": "25:00"}, "days"),
        ("devices/nobody", {"pin": "1"}, "nobody"),
        ("labels", {"key": "a b"}, "not a name"),
    ):
        answer = fleet.client.post(f"/-/{path}", data={**values, "csrf": token})
        assert answer.status_code in (404, 422), path
        assert_refused(answer, answer.status_code, why)
    assert_refused(fleet.client.get("/-/devices/nobody"), 404, "nobody")
    assert_refused(fleet.client.get("/-/people"), 403, "role admin")
    assert_refused(fleet.client.get("/-/no-such-page"), 404, "nothing is published")
    assert_refused(fleet.client.get("/-/devices?q=" + "x" * 65), 422, "at most 64")


def test_what_the_database_refuses_is_said_on_a_page_too(fleet):
    """Two boards with one token: the database knows, not a rule."""
    logged_in(fleet)
    text = "device_id,token\na1,0123456789abcdef\na2,0123456789abcdef\n"
    sent = {"files": {"file": ("b.csv", text)}, "data": {"csrf": csrf(fleet)}}
    answer = fleet.client.post("/-/devices-import", **sent)
    assert_refused(answer, 409, "this name or token already")
    assert fleet.api("GET", "devices")["devices"] == []


def test_who_is_not_logged_in_is_refused_on_a_page_without_the_way_to_others(fleet):
    answer = fleet.client.get("/-/no-such-page")
    assert answer.status_code == 404 and "could not be done" in answer.text
    assert '<a href="/-/devices"' not in answer.text


def test_only_an_admin_removes_the_payloads_that_no_release_names(fleet):
    logged_in(fleet)
    assert "releases-collect" not in fleet.client.get("/-/releases").text
    answer = fleet.client.post("/-/releases-collect", data={"csrf": csrf(fleet)})
    assert_refused(answer, 403, "role admin")
    logged_in(fleet, "ada", "admin")
    page = fleet.client.get("/-/releases").text
    assert 'data-ask="Remove the payloads that no release names?"' in page
    left = fleet.site_folder / servers.PRODUCT / "blobs" / "00" / "left.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    os.utime(left, (0, 0))
    answer = fleet.client.post("/-/releases-collect", data={"csrf": csrf(fleet)})
    assert answer.headers["location"] == "/-/logs" and not left.exists()
    assert "removed=1" in fleet.client.get("/-/logs").text


def test_who_comes_goes_and_guesses_is_in_the_audit_log(fleet):
    logged_in(fleet)
    fleet.client.post("/-/logout", data={"csrf": csrf(fleet)})
    for name in ("anna", "nobody\x00\x1b[2J"):
        fleet.client.post("/-/login", data={"name": name, "password": "guessed it"})
    lines = fleet.api("GET", "audit")["audit"][:4]
    assert [(line["action"], line["who"], line["target"]) for line in lines] == [
        ("login.failed", "nobody", "nobody??[2J"),
        ("login.failed", "nobody", "anna"),
        ("logout", "anna", "anna"),
        ("login", "anna", "anna"),
    ]
    assert lines[0]["after"] == {"address": "127.0.0.1"}
    assert "guessed" not in str(lines)


# ---- in a browser


@pytest.fixture
def page():
    path = browser_path()
    if not path and not os.environ.get("CI"):
        pytest.skip("chromium is missing: apt install chromium (.ci/run does)")
    assert path, "chromium is missing: .ci/run installs it"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = browser.new_context(ignore_https_errors=True)
        shown = context.new_page()
        shown.set_default_timeout(10_000)
        shown.complaints = []
        shown.on("console", lambda m: shown.complaints.append(m.text) if m.type == "error" else 0)
        shown.on("pageerror", lambda e: shown.complaints.append(str(e)))
        shown.on("dialog", lambda dialog: dialog.accept())
        yield shown
        browser.close()


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def test_an_operator_runs_a_rollout_and_sees_it_live(tmp_path, page):
    site = tmp_path / "site"
    servers.publish_version(site, "1.0.0")
    keys = servers.public_keys(tmp_path)
    with servers.serving(site, "--keys", str(keys)) as server:
        remote = Remote(server)
        boards = [Board(remote, f"board-{n}") for n in range(4)]
        for board in boards:
            board.token = server.token("device")
            board.poll()
        made = tmp_path / "made"
        made.mkdir()
        published = servers.publish_version(made, "1.1.0")
        page.goto(server.url)
        shoot(page, "login")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("Wrong")
        page.complaints.clear()  # the browser's own line for a 401
        page.get_by_label("Password").fill(server.token("operator"))
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_text("seen within a day")).to_be_visible()
        page.get_by_role("link", name="Releases").click()
        page.get_by_label("Signed release").set_input_files(made / published.release)
        page.get_by_label("Payloads").set_input_files(made / published.release)
        page.get_by_role("button", name="Upload").click()
        expect(page.get_by_role("alert")).to_contain_text("was not uploaded with it")
        page.complaints.clear()  # the browser's own line for a 422
        page.get_by_role("link", name="Go back").click()
        page.get_by_label("Signed release").set_input_files(made / published.release)
        page.get_by_label("Payloads").set_input_files(sorted(made.glob("*/blobs/*/*")))
        page.get_by_role("button", name="Upload").click()
        page.get_by_role("button", name="Pilot ready").click()
        shoot(page, "releases")
        number = remote.release("1.1.0")["id"]
        page.get_by_role("link", name="Rollouts").click()
        page.get_by_label("Name").fill("June")
        page.get_by_label("Stages").fill("ring=pilot, 100%")
        page.get_by_role("button", name="Create a draft").click()
        page.get_by_role("link", name="June").click()
        page.get_by_role("button", name="Start").click()
        state = page.locator("[data-state-name]")
        expect(state).to_have_text(re.compile("pilot|expand|paused"))
        remote.api("POST", f"rollouts/{page.url.rpartition('/')[2]}/abort", {})
        expect(state).to_have_text("aborted")  # heard by SSE, not by reloading

        body = {"firmware_id": number, "stages": [{"percent": 100}], "start": True}
        made = remote.api("POST", "rollouts", body)
        page.goto(f"{server.url}/-/rollouts/{made['id']}")
        assert boards[0].update() == "1.1.0"
        expect(page.locator('[data-count="confirmed"]')).to_have_text("1")
        page.get_by_role("button", name="Pause").click()
        expect(state).to_have_text("paused")
        assert not boards[1].poll()["update_available"]
        shoot(page, "rollout")
        page.get_by_role("button", name="Resume").click()
        expect(state).to_have_text("pilot")
        assert boards[1].poll()["update_available"]

        page.get_by_role("link", name="Devices").click()
        page.get_by_label("id or MAC").fill("board-0")
        page.get_by_role("button", name="Filter").click()
        expect(page.get_by_role("heading")).to_have_text("1 device")
        shoot(page, "devices")
        page.get_by_role("link", name="board-0").click()
        expect(page.locator(".says")).to_contain_text("runs it already")
        page.get_by_label("label").fill("site")
        page.get_by_label("value").fill("attic")
        page.get_by_role("button", name="Set label").click()
        expect(page.get_by_text("site=attic")).to_be_visible()
        shoot(page, "device")
        page.get_by_role("link", name="Jobs").click()
        moves = page.locator("[data-moves]")
        expect(moves).to_have_text("moves 3 devices")  # the fourth runs it
        page.get_by_label("Devices with").fill("site=attic")
        expect(moves).to_have_text("moves 0 devices")
        page.get_by_label("Or these devices").fill("board-2, board-3")
        expect(moves).to_have_text("moves 2 devices")
        page.get_by_role("link", name="Logs").click()
        expect(page.get_by_text("device.change")).to_be_visible()
        shoot(page, "logs")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 740})
        everything = (
            "devices devices/board-0 releases rollouts rollouts/1 updates rules people logs"
        )
        for path in ("", *everything.split()):
            page.goto(f"{server.url}/-/{path}")
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
            wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            assert not wide, f"/-/{path} is wider than a phone"
            shoot(page, f"phone-{path.replace('/', '-')}")
        assert page.complaints == []
        remote.client.close()


class Remote(Fleet):
    """The same calls, to a server process."""

    def __init__(self, server):
        self.server = server
        self.client = server.client()
        self.admin = server.token("operator")

    def api(self, method, path, body=None, **_):
        options = {} if body is None else {"json": body}
        headers = {"Authorization": f"Bearer {self.admin}"}
        return self.client.request(method, f"/api/v1/{path}", headers=headers, **options).json()

    def upload(self, folder, version):
        site = folder / "made" / "site"
        site.mkdir(parents=True)
        form = fleets.upload_files(site, servers.publish_version(site, version))
        headers = {"Authorization": f"Bearer {self.admin}"}
        return self.client.post("/api/v1/firmware/upload", headers=headers, files=form)

"""The page in a real browser: log-in, roles, a rollout live; and what its headers and forms hold.

The browser is the system's chromium (.ci/run installs it), driven by Playwright.
"""

import os
import re
import shutil
from pathlib import Path

import fleet as fleets
import pytest
import servers
from fleet import Board, Fleet, running
from playwright.sync_api import expect, sync_playwright

from twinslot_server import rollouts

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


def test_nobody_sees_anything_before_logging_in(fleet):
    for path in ("", "devices", "devices/x", "releases", "rollouts", "rollouts/1", "logs"):
        answer = fleet.client.get(f"/-/{path}")
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
        assert answer.json()["code"] == "csrf"
    assert fleet.api("GET", "devices/b1")["pin"] is None
    fleet.client.post("/-/devices/b1", data={"pin": "9.9.9", "csrf": csrf(fleet)})
    assert fleet.api("GET", "devices/b1")["pin"] == "9.9.9"
    line = fleet.api("GET", "audit")["audit"][0]
    assert (line["who"], line["action"]) == ("anna", "device.change")


def test_a_viewer_sees_and_changes_nothing(fleet):
    Board(fleet, "b1").poll()
    logged_in(fleet, "victor", "viewer")
    page = fleet.client.get("/-/devices/b1").text
    assert "Set label" not in page and "offers nothing" not in page
    answer = fleet.client.post("/-/devices/b1", data={"pin": "1", "csrf": csrf(fleet)})
    assert answer.json()["code"] == "forbidden"


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
        number = remote.upload(tmp_path, "1.1.0").json()["id"]
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
        page.get_by_role("button", name="Pilot ready").click()
        shoot(page, "releases")
        page.get_by_role("link", name="Rollouts").click()
        page.get_by_label("name").fill("June")
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
        page.get_by_role("link", name="Logs").click()
        expect(page.get_by_text("device.change")).to_be_visible()
        shoot(page, "logs")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 740})
        for path in ("", "devices", "devices/board-0", "releases", "rollouts", "logs"):
            page.goto(f"{server.url}/-/{path}")
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

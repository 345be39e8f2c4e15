"""docs/server.md is true: every curl in it is run, in order; every setting is in its table."""

import dataclasses
import re
import subprocess
from pathlib import Path

import servers

from twinslot_server.settings import Settings
from twinslot_server.stages import Policy

GUIDE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()


def test_every_example_of_the_guide_works(tmp_path):
    for place, version in (("site", "1.0.0"), ("made", "1.1.0")):
        (tmp_path / place).mkdir()
        servers.publish_version(tmp_path / place, version)
    keys = str(servers.public_keys(tmp_path))
    data = tmp_path / "site-server"
    examples = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.S | re.M)
    calls = [text for text in examples if "curl" in text]
    assert len(calls) > 20
    with servers.serving(tmp_path / "site", "--keys", keys, data=data) as server:
        setup = examples[0].replace("https://127.0.0.1:8443", server.url)
        for text in calls:
            # One shell for each, as typed; 1.0.0 in the site is firmware 1, so 1.1.0 is 2.
            typed = text.replace("firmware/1\n", "firmware/2\n").replace(
                '"firmware_id": 1', '"firmware_id": 2'
            )
            done = subprocess.run(
                ["bash", "-euc", setup + typed],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
            assert done.returncode == 0, text + done.stdout + done.stderr
            assert done.stdout.strip(), text
        assert not any("trace" in line for line in server.log())


def test_every_setting_and_every_policy_is_explained():
    policy = [field.name for field in dataclasses.fields(Policy)]
    for name in (*Settings.model_fields, *policy):
        assert re.search(rf"`{name}[.`]", GUIDE), name

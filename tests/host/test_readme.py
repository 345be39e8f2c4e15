"""README is true: its commands are run, their output compared, its Python compiled."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def told(block):
    """Split a console block into [(command, [lines of output])]."""
    steps = []
    for line in block.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        else:
            steps[-1][1].append(line)
    return steps


def appear_in_order(lines, output):
    """Check that each line appears after the one before; "…" stands for anything."""
    pos = 0
    for line in lines:
        pattern = r"\s+".join(
            ".*?".join(re.escape(p) for p in word.split("…")) for word in line.split()
        )
        match = re.compile(pattern).search(output, pos)
        assert match, f"not in the output after what came before: {line!r}\n{output}"
        pos = match.end()


def test_make_demo_tells_the_story_of_the_readme():
    block = next(b for b in blocks("console") if b.startswith("$ make demo"))
    [(command, lines)] = told(block)
    assert command == "make demo"
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:.*\n\t@?\$\(BIN\)/twinslot demo$", makefile, re.M)
    twinslot = Path(sys.executable).with_name("twinslot")
    done = subprocess.run(
        [twinslot, "demo"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    appear_in_order(lines, done.stdout)


def test_the_steps_of_the_readme_update_a_board(tmp_path):
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "lib" / "twinslot",
        tmp_path / "lib" / "twinslot",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "ota.json").write_text(blocks("json")[0].replace("8443", port))
    steps = [
        step for block in blocks("console") if "make demo" not in block for step in told(block)
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = None
    try:
        for command, lines in steps:
            typed = command.replace("8443", port)
            if typed.endswith("&"):
                server = subprocess.Popen(
                    typed.rstrip("& ").split(),
                    cwd=tmp_path,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                appear_in_order([lines[0].replace("8443", port)], server.stdout.readline())
                continue
            secret = "release.key" in typed  # asked for at the terminal; here there is none
            done = subprocess.run(
                typed + " --passphrase-fd 0" * secret,
                input="correct horse" * secret,
                shell=True,
                check=False,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            appear_in_order(lines, done.stdout)
        found = json.loads(
            subprocess.run(
                ["twinslot", "board", "show", "flash.bin", "--json"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                check=True,
            ).stdout
        )
        assert found["boots"] == "ota_1"
    finally:
        if server:
            server.terminate()
            server.wait(20)
            server.stdout.close()


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.splitlines()[0][:30])
def test_python_of_the_readme_compiles_and_uses_names_that_exist(block):
    import twinslot

    tree = ast.parse(block)
    source = (ROOT / "lib/twinslot/agent.py").read_text()
    methods = {n.name for n in ast.walk(ast.parse(source)) if hasattr(n, "name")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "agent":
                assert node.attr in methods
            if node.value.id == "twinslot":
                assert node.attr in twinslot._HOME


def test_the_defaults_in_the_readme_are_those_of_the_code():
    from twinslot import config

    text = README[README.index("Settings in `ota.json`") :].split("\n\n")[0]
    for name, value in re.findall(r"`(\w+)` \(`?([^\s`;)]+)", text):
        default = config.DEFAULTS[name]
        if isinstance(default, int) and value.isdigit():
            assert default == int(value), name
        elif isinstance(default, str) and default:
            assert default == value, name
    assert set(config.DEFAULTS) - {"ca"} <= set(re.findall(r"`(\w+)`", text))

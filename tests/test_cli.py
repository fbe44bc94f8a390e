"""The command line: what it says, and with which exit status."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elis_gateway import __version__, config
from elis_gateway.cli import cli
from loadtest.workload import Workload

ROOT = Path(__file__).parent.parent


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="elis-gateway")


def test_help_names_every_command_without_importing_the_other_packages() -> None:
    result = run("--help")
    for name in ("serve", "check-config", "doctor", "sim-engine", "loadtest", "predictor", "key", "completion"):
        assert f"  {name}" in result.output
    script = (
        "import contextlib, io, sys\nfrom elis_gateway.cli import main\nsys.argv[1:] = ['--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"loadtest", "onnx_export", "aiohttp", "pydantic", "numpy"} & set(done.stdout.split())


def test_version() -> None:
    assert run("--version").output == f"elis-gateway, version {__version__}\n"


def test_check_config_prints_what_is_in_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELIS__SCHEDULER__WINDOW", "25")
    result = run("check-config", str(ROOT / "config" / "isrtf.yaml"))
    assert result.exit_code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(result.output)
    assert config.load(path, {}).scheduler.window == 25


def test_check_config_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("upstreams: [{url: 'http://a', slots: 1}]\nscheduler: {windw: 3}\n")
    result = run("check-config", str(path))
    assert result.exit_code == 2
    assert result.output == "Error: scheduler.windw: unknown key; did you mean 'window'?\n"


def test_check_config_reads_the_keys_too(tmp_path: Path) -> None:
    """It is asked before every start and reload: what they refuse, it refuses."""
    path, keys = tmp_path / "c.yaml", tmp_path / "keys.yaml"
    path.write_text(f"upstreams: [{{url: 'http://a', slots: 1}}]\nauth: {{keys_file: '{keys}'}}\n")
    assert CliRunner().invoke(cli, ["check-config", str(path)]).exit_code == 0, "it may be elsewhere"
    keys.write_text("- {name: a, hash: half")
    result = CliRunner().invoke(cli, ["check-config", str(path)])
    assert result.exit_code == 2
    assert "keys_file" in result.stderr


def test_check_config_warns_of_a_key_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("upstreams: [{url: 'http://a', slots: 1, api_key_env: KEY_OF_A}]\n")
    monkeypatch.delenv("KEY_OF_A", raising=False)
    result = run("check-config", "-q", str(path))
    assert result.exit_code == 0
    assert "KEY_OF_A (api_key_env) is not set" in result.stderr
    monkeypatch.setenv("KEY_OF_A", "x")
    assert run("check-config", "-q", str(path)).stderr == ""


@pytest.mark.parametrize(
    ("admin", "warned"),
    [
        ("{host: 0.0.0.0}", True),
        (f"{{host: 0.0.0.0, key_hash: 'sha256:{'0' * 64}'}}", False),
        ("{host: '::1'}", False),
    ],
)
def test_serve_warns_of_an_admin_listener_that_is_open_to_all(
    admin: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nothing(*args: object, **options: object) -> None: ...

    monkeypatch.setattr("elis_gateway.app.serve", nothing)
    monkeypatch.setattr("elis_gateway.logs.setup", lambda *args: None)
    path = tmp_path / "c.yaml"
    path.write_text(f"upstreams: [{{url: 'http://a', slots: 1}}]\nadmin: {admin}\n")
    assert run("serve", str(path)).exit_code == 0
    assert ("anybody can control it" in caplog.text) is warned


def test_check_config_does_not_print_a_password(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("upstreams: [{url: 'http://me:hunter2@a', slots: 1}]\n")
    result = run("check-config", str(path))
    assert result.exit_code == 2
    assert "hunter2" not in result.output + result.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_ELIS_GATEWAY_COMPLETE" in run("completion", shell).output


def test_a_missing_extra_is_answered_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("loadtest", "rich")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    result = run("loadtest", "demo")
    assert result.exit_code == 2
    assert "pip install 'elis-gateway[demo]'" in result.output


def test_a_command_may_open_as_many_sockets_as_the_system_allows() -> None:
    """Shells begin with 1024, of which a stream takes two."""
    code = """if True:
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit
        from click.testing import CliRunner
        from elis_gateway.cli import cli
        _, hard = getrlimit(RLIMIT_NOFILE)
        setrlimit(RLIMIT_NOFILE, (256, hard))
        CliRunner().invoke(cli, ["completion", "bash"])
        assert getrlimit(RLIMIT_NOFILE)[0] == hard
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_make_workload(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    result = run("loadtest", "make-workload", str(path), "--num-requests", "5", "--capacity", "100", "--seed", "3")
    assert result.output.startswith(f"{path}: 5 requests")
    assert Workload.load(path).hash in result.output


@pytest.mark.parametrize("command", ["serve", "check-config", "sim-engine"])
def test_every_command_explains_itself(command: str) -> None:
    assert run(command, "--help").output.startswith(f"Usage: elis-gateway {command}")


@pytest.mark.parametrize(
    "command",
    [
        "sim-engine --speed 0",
        "sim-engine --port 99999",
        "sim-engine --max-model-len 0",
        "sim-engine --stream-interval 0",
        "loadtest run --target sim --seeds 0",
        "loadtest run --target sim --prediction-interval 0",
        "loadtest run --target sim --timeout 0",
        "loadtest run --target sim --longest 0",
        "doctor localhost:8000",
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_name(command: str) -> None:
    result = run(*command.split())
    assert result.exit_code == 2
    assert command.split()[-2] in result.stderr or "neither a file nor a URL" in result.stderr


def test_sim_engine_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-m", "elis_gateway", "sim-engine", "--port", "0", "--slots", "2", "--no-delay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        with urllib.request.urlopen(said.removeprefix("listening on ").strip() + "/health", timeout=60) as reply:
            assert reply.status == 200
        process.terminate()
        assert process.wait(60) in (0, -15)


def test_a_reload_during_the_start_does_not_end_it(tmp_path: Path) -> None:
    """`systemctl reload` right after the start: by default the signal kills."""
    path = tmp_path / "c.yaml"
    path.write_text("upstreams: []\n")
    hasty = (
        "import os, signal\nfrom elis_gateway import config\nfrom elis_gateway.cli import main\nread = config.load\n"
        "config.load = lambda path: (os.kill(os.getpid(), signal.SIGHUP), read(path))[1]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", hasty, "serve", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "Error: upstreams: expected at least one upstream\n")


def test_an_address_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("server: {host: 300.1.1.1}\nupstreams: [{url: 'http://127.0.0.1:9', slots: 1}]\npredictor: none\n")
    result = run("serve", str(path))
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("Error: host: 300.1.1.1: ")


def test_an_address_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path.write_text(
            f"server: {{host: 127.0.0.1, port: {port}}}\nupstreams: [{{url: 'http://127.0.0.1:9', slots: 1}}]\n"
        )
        result = run("serve", str(path))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert "address already in use" in result.output.splitlines()[-1]

"""The service as a process: what it prints, what it refuses, and that nothing of it is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from prunefront.errors import ConfigError
from service.run import listen, url_of
from service.settings import Settings
from service.supervisor import Supervisor, controller_environment

TIMEOUT_S = 120.0
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PRUNEFRONT_DATA_DIR": str(tmp_path / "data"),
        "PRUNEFRONT_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }


def wait_for(path: Path, pattern: str) -> re.Match[str]:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = re.search(pattern, path.read_text() if path.exists() else "")
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{pattern!r} never appeared in {path}: {path.read_text() if path.exists() else 'no file'}")


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return  # Ended; only nobody has asked for its status in a container without init.
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """Where the children that stand in for a controller note their process ids."""
    return tmp_path / "pids"


def supervisor_of(pids: Path, *, before: str = "", after: str = "time.sleep(600)", grace_s: float = 20.0) -> Supervisor:
    note = f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')"
    program = "\n".join(("import os, signal, sys, time", before, note, after))
    return Supervisor([sys.executable, "-c", program], dict(os.environ), grace_s=grace_s, first_restart_s=0.01)


def test_child_that_ends_is_started_again(pids: Path) -> None:
    supervisor = supervisor_of(pids, after="sys.exit(3)")
    supervisor.start()
    wait_for(pids, r"(\d+\n){2}")
    supervisor.stop()
    assert supervisor.num_starts >= 2


def test_stop_ends_the_child_and_starts_no_other(pids: Path) -> None:
    supervisor = supervisor_of(pids)
    supervisor.start()
    pid = int(wait_for(pids, r"\d+\n")[0])
    supervisor.stop()
    wait_until_gone(pid)
    assert supervisor.num_starts == 1


def test_child_that_does_not_stop_is_killed(pids: Path) -> None:
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    supervisor = supervisor_of(pids, before=ignoring, grace_s=0.2)
    supervisor.start()
    pid = int(wait_for(pids, r"\d+\n")[0])
    supervisor.stop()
    wait_until_gone(pid)


def test_controller_sees_the_store_and_the_data_of_the_service(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="postgresql://db/x")
    environment = controller_environment(settings)
    assert environment["PRUNEFRONT_DATA_DIR"] == str(tmp_path)
    assert environment["PRUNEFRONT_DATABASE_URL"] == "postgresql://db/x"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(CHECKOUT)


def test_controller_leaves_with_a_service_that_was_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    # A package `search` of the test's own stands in for the controller; only its life is looked at.
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").touch()
    pids = tmp_path / "pids"
    (tmp_path / "search" / "__main__.py").write_text(
        f"import os, time\nopen({str(pids)!r}, 'w').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)\n"
    )
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(CHECKOUT / 'service' / 'controller_process.py')!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(600)"
    )
    environment = {**environment, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as parent:
        try:
            pid = int(wait_for(pids, r"\d+\n")[0])
        finally:
            parent.kill()
    wait_until_gone(pid)


def test_taken_port_is_one_clear_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} on 127.0.0.1 is taken.*--port"):
            listen("127.0.0.1", port)


def test_address_of_another_machine_is_one_clear_sentence() -> None:
    with pytest.raises(ConfigError, match="Cannot listen on 192.0.2.1"):
        listen("192.0.2.1", 0)


def test_url_is_one_that_a_browser_here_can_open() -> None:
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == "http://[::1]:80"


@pytest.mark.slow
def test_service_prints_its_address_answers_and_ends_on_a_signal(tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-u", "-m", "service"]
    with output.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            url = wait_for(output, r"prunefront is at (http://127.0.0.1:\d+)")[1]
            assert httpx.get(f"{url}/readyz", timeout=TIMEOUT_S).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0, output.read_text()
        finally:
            process.kill()
    assert "Traceback" not in output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PRUNEFRONT_HOST": "0.0.0.0"}, "PRUNEFRONT_ALLOW_NETWORK_ACCESS_WITHOUT_LOGIN"),
        ({"PRUNEFRONT_DATABASE_URL": "postgresql://127.0.0.1:9/none"}, "database"),
        ({"PRUNEFRONT_PORT": "many"}, "PRUNEFRONT_PORT"),
        ({"PRUNEFRONT_DATA_DIR": "/dev/null/data"}, "data folder /dev/null/data cannot be made"),
    ],
)
def test_service_that_cannot_start_says_why_in_one_line(
    environment: dict[str, str], changes: dict[str, str], words: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "service"],
        env={**environment, **changes},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode in (1, 2)
    last = process.stderr.strip().splitlines()[-1]
    assert words in last and "Traceback" not in process.stderr, process.stderr

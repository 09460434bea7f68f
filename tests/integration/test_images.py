"""The image and the compose file, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunefront.cli.app import app

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
APP_SERVICES = [name for name in COMPOSE["services"] if name != "db"]


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a checker that the extra ``dev`` installs beside the interpreter."""
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs {name}, which the extra dev installs")
        pytest.skip(f"needs {name}, which the extra dev installs")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=120)


def test_the_dockerfile_has_no_known_fault() -> None:
    finished = tool("hadolint", str(ROOT / "Dockerfile"))

    assert (finished.returncode, finished.stdout) == (0, "")


def test_the_compose_file_follows_the_compose_specification() -> None:
    finished = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml"))

    assert finished.returncode == 0, finished.stdout


def test_what_the_image_copies_exists_and_carries_every_package() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"prunefront", "latency_tables", "workers", "search", "store", "service"} <= copied


def test_the_image_runs_as_a_user_of_its_own_with_a_health_check() -> None:
    runtime = DOCKERFILE.split(" AS runtime")[1]

    assert re.search(r"^USER (?!0$)\d+$", runtime, flags=re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", runtime, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("device", "index", "code"),
    [("cpu", "file:///wheels", 0), ("cuda", "", 0), ("cpu", "", 1), ("rocm", "file:///wheels", 1)],
)
def test_the_build_asks_for_an_index_for_the_cpu_wheels(device: str, index: str, code: int) -> None:
    # The very command that the image runs before it installs anything.
    (command,) = re.findall(r"^RUN (case .+?esac)$", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    script = command.replace("\\\n", " ")

    finished = subprocess.run(
        ["sh", "-euc", script], env={"DEVICE": device, "TORCH_INDEX_URL": index}, capture_output=True, text=True
    )

    assert finished.returncode == code
    assert bool(finished.stderr) == bool(code)


@pytest.mark.parametrize("name", APP_SERVICES)
def test_a_service_runs_a_command_that_exists_with_options_it_has(name: str) -> None:
    command, *options = COMPOSE["services"][name]["command"]
    from typer.main import get_command

    node: Any = get_command(app).commands[command]
    while hasattr(node, "commands"):
        node = node.commands[options.pop(0)]
    known = {option for parameter in node.params for option in (*parameter.opts, *parameter.secondary_opts)}

    assert {option for option in options if option.startswith("--")} <= known


@pytest.mark.parametrize("name", APP_SERVICES)
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    needs = COMPOSE["services"][name]["depends_on"]

    assert set(needs) == ({"db"} if name == "migrate" else {"migrate"})
    assert {need["condition"] for need in needs.values()} <= {"service_healthy", "service_completed_successfully"}


def test_every_named_volume_is_declared_and_every_folder_is_writable_for_the_user() -> None:
    mounts = {mount for service in COMPOSE["services"].values() for mount in service.get("volumes", ())}
    named = {mount.split(":")[0] for mount in mounts if re.match(r"[a-z]+:", mount)}
    owned = re.search(r"install --directory --owner prunefront .+?\n(.+?)\n(?=COPY)", DOCKERFILE, flags=re.DOTALL)

    assert named == set(COMPOSE["volumes"])
    assert owned is not None
    for mount in COMPOSE["x-app"]["volumes"]:
        assert mount.split(":")[-2 if mount.endswith(":ro") else -1] in owned[1].split()


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]

    assert ports == ["127.0.0.1:${PORT:-8000}:8000"]


def test_the_health_check_fails_where_nothing_answers() -> None:
    (arguments,) = re.findall(r"^HEALTHCHECK .+?CMD (\[.+?\])$", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    command = [argument.replace(":8000", ":1") for argument in json.loads(arguments)]

    finished = subprocess.run([sys.executable, *command[1:]], capture_output=True, timeout=60)

    assert finished.returncode != 0


def test_the_settings_that_the_images_name_are_settings() -> None:
    from prunefront.training.dataset_ids import ROOTS_VARIABLE
    from service.settings import Settings

    named = set(re.findall(r"\bPRUNEFRONT_[A-Z_]+", DOCKERFILE + (ROOT / "docker-compose.yml").read_text()))

    assert named <= {f"PRUNEFRONT_{field.upper()}" for field in Settings.model_fields} | {ROOTS_VARIABLE}

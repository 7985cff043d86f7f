"""The image and the compose file, checked against the code that they start, without a Docker engine."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from charter.cli import load_command
from charter.dashboard.serve import TOKEN_VARIABLE
from charter.pipeline import STAGES
from engine.metrics import serve_metrics
from engine.settings import Settings, get_environment_name, iter_settings, load_settings
from tests.support.kafka import find_free_port

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SERVICES = yaml.safe_load(TEXT)["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
VARIABLES = {get_environment_name(section, key) for section, key, _ in iter_settings()}
SET_UP = (ROOT / "setup.sh").read_text(encoding="utf-8")


def instructions():
    """Return the Dockerfile's instructions with their arguments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


IMAGE = instructions()
FINAL = IMAGE[max(at for at, (name, _) in enumerate(IMAGE) if name == "FROM") :]
ENVIRONMENT = dict(word.split("=", 1) for name, rest in FINAL if name == "ENV" for word in shlex.split(rest))


def copied():
    return [shlex.split(rest)[:-1] for name, rest in IMAGE if name == "COPY" and not rest.startswith("--from")]


def health(service):
    """Return the health check of a service or of its image."""
    if "healthcheck" in service:
        return service["healthcheck"]["test"]
    return next(json.loads("[" + rest.split("CMD [", 1)[1]) for name, rest in FINAL if name == "HEALTHCHECK")


def test_every_part_has_a_service():
    commands = [service["command"] for service in OURS.values()]
    assert sorted(command[2] for command in commands if command[:2] == ["run", "--stage"]) == sorted([*STAGES, "sink"])
    assert ["train", "--loop"] in commands
    assert {"kafka", "dashboard", "trainer", "sink", *STAGES} <= {
        name for name, service in SERVICES.items() if "profiles" not in service
    }
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "registry": ["console"],
        "console": ["console"],
        "vllm": ["gpu"],
    }


@pytest.mark.parametrize("name", OURS)
def test_commands_parse(name):
    verb, *rest = OURS[name]["command"]
    load_command(verb).make_context(verb, list(rest))
    assert '"charter"' in dict(FINAL)["ENTRYPOINT"]


@pytest.mark.parametrize("name", OURS)
def test_settings_in_the_environment_are_valid(name):
    environment = ENVIRONMENT | OURS[name]["environment"]
    assert set(environment) - VARIABLES <= {TOKEN_VARIABLE, Settings().models.api_key_env, "PATH", "PYTHONUNBUFFERED"} | set(
        ENVIRONMENT
    )
    assert {key for key in environment if "__" in key} <= VARIABLES
    settings, _ = load_settings(environment={key: value for key, value in environment.items() if value is not None})
    assert settings.bus_address == "kafka://kafka:29092"
    assert str(settings.folder) == "/data"
    assert settings.telemetry.metrics_port
    assert int(OURS[name]["stop_grace_period"].rstrip("s")) > settings.worker.shutdown_timeout_s


def test_broker_has_a_listener_for_containers_and_for_the_host():
    broker = SERVICES["kafka"]["environment"]
    advertised = dict(entry.split("://") for entry in broker["KAFKA_ADVERTISED_LISTENERS"].split(","))
    ports = dict(entry.split("://:") for entry in broker["KAFKA_LISTENERS"].split(","))
    assert "kafka://" + advertised["INSIDE"] == OURS["sink"]["environment"]["CHARTER_BUS__ADDRESS"]
    assert advertised["INSIDE"] == "kafka:" + ports["INSIDE"]
    assert advertised["CLIENT"] == "localhost:${CHARTER_KAFKA_PORT:-9092}"
    assert SERVICES["kafka"]["ports"] == ["127.0.0.1:${CHARTER_KAFKA_PORT:-9092}:" + ports["CLIENT"]]
    assert set(ports) == {entry.split(":")[0] for entry in broker["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")}
    assert broker["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_images_are_pinned_and_ports_are_bound_to_loopback():
    bases = [rest.split()[0].replace("${PYTHON}", "3.12") for name, rest in IMAGE if name == "FROM"]
    images = [*bases, *(re.sub(r"\$\{[^:]+:-([^}]+)\}", r"\1", service["image"]) for service in SERVICES.values())]
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []
    assert [
        port for service in SERVICES.values() for port in service.get("ports", []) if not port.startswith("127.0.0.1:")
    ] == []


def test_volumes_are_declared_and_files_exist():
    declared = set(yaml.safe_load(TEXT)["volumes"])
    sources = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {source for source in sources if not source.startswith(".")} == declared
    assert [source for source in sources if source.startswith(".") and not (ROOT / source).exists()] == []
    assert all("data:/data" in service["volumes"] for service in OURS.values())


def test_every_required_service_has_a_health_check():
    assert [name for name, service in SERVICES.items() if service not in OURS.values() and "healthcheck" not in service] == [
        "console"  # a web page of a third-party image, whose tools are unknown
    ]
    needed = {other for service in SERVICES.values() for other in service.get("depends_on", ())}
    assert all("healthcheck" in SERVICES[name] for name in needed)


def run_check(command, port, known):
    """Return the exit status of a health check that is sent to another port."""
    assert command[:3] == ["CMD", "python", "-c"] or command[:2] == ["python", "-c"]
    assert known in command[-1]
    check = [sys.executable, "-c", command[-1].replace(known, str(port))]
    return subprocess.run(check, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("name", "known"), [("sink", "9464"), ("dashboard", "8400")])
def test_health_checks_distinguish_running_from_stopped(name, known):
    port = find_free_port()
    close = serve_metrics("127.0.0.1", port, lambda: [])
    try:
        assert run_check(health(OURS[name]), port, known) == 0
    finally:
        close()
    assert run_check(health(OURS[name]), port, known) != 0
    assert known in (ENVIRONMENT["CHARTER_TELEMETRY__METRICS_PORT"], *OURS["dashboard"]["command"])


def test_image_runs_as_a_user_and_contains_no_build_tools():
    assert len([name for name, _ in IMAGE if name == "FROM"]) == 2
    assert int(next(rest for name, rest in reversed(FINAL) if name == "USER")) > 0
    assert dict(FINAL)["VOLUME"] == ENVIRONMENT["CHARTER_DATA__FOLDER"]
    assert not any(word in rest for name, rest in FINAL for word in ("pip install", "apt-get"))
    assert all(service["cap_drop"] == ["ALL"] for service in OURS.values())


def test_copied_files_exist_and_are_not_ignored():
    exceptions = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    sources = {source for sources_of_one in copied() for source in sources_of_one}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert sources == exceptions
    rooms = set(re.findall(r'"([a-z]+)(?:\.[a-z.]+)?"', re.search(r"packages = \[(.*?)\]", project(), re.DOTALL).group(1)))
    assert rooms < sources


def project():
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_image_has_the_pinned_versions():
    arguments = dict(rest.split("=", 1) for name, rest in IMAGE if name == "ARG" and "=" in rest)
    assert f"'{arguments['TORCH']}'" in SET_UP
    assert f"'{arguments['SMALL_MODEL']}'" in SET_UP
    assert arguments["EXTRAS"] in project()
    assert SERVICES["sink"]["image"].endswith(re.search(r'^version = "(.+)"', project(), re.MULTILINE).group(1) + "}")


DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "deploy.md", ROOT / "docker-compose.yml")
COMPOSED = re.findall(r"^(?:# +)?docker compose (.+)$", "\n".join(page.read_text("utf-8") for page in DOCUMENTS), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(COMPOSED)))
def test_documented_compose_commands_name_existing_services(command):
    words = shlex.split(command.split("  ")[0], comments=True)
    if words[0] == "--profile":
        assert words[1] in {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
        words = words[2:]
    if words[0] == "run":
        service, verb, *rest = words[words.index("-T") + 1 :]
        assert service in OURS
        load_command(verb).make_context(verb, [word for word in rest if word not in ("<", "prompts.jsonl")])
    else:
        named = [argument.split("=")[0] for argument in words[1:] if not argument.startswith("-")]
        assert words[0] in ("up", "logs")
        assert set(named) <= set(SERVICES)

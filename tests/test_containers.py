"""The image, the compose files and the manifests match the code. No Docker engine is needed."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from backend.cli.main import cli
from backend.queue.private_redis import build_command as build_redis_command
from backend.settings import Settings
from backend.web.app import create_app
from model import GroundingDINO
from tests.servers import ROOT, http_server, send_reply

SETTINGS_VARIABLES = {name.upper() for name in Settings.model_fields}
PORT = Settings().port
# read by Python, torch and the hub's library
THIRD_PARTY_VARIABLES = {
    *("PATH", "HOME", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
    *("PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE"),
}
DEMO_PROJECT_VARIABLES = {"BACKEND_URL", "NAMESPACE"}
LABEL_STUDIO_VARIABLES = {
    *("ML_BLOCK_LOCAL_IP", "SSRF_PROTECTION_ENABLED", "LABEL_STUDIO_HOST", "LABEL_STUDIO_USERNAME"),
    *("LABEL_STUDIO_PASSWORD", "LABEL_STUDIO_USER_TOKEN", "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"),
    *("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK", "SENTRY_DSN", "FRONTEND_SENTRY_DSN"),
}
IMAGE = "grounding-dino-label-studio"
USER = 10001

COMPOSE_FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
COMPOSE, GPU = (yaml.safe_load((ROOT / name).read_text()) for name in COMPOSE_FILES)
SERVICES = COMPOSE["services"]
BACKEND = {name: service for name, service in SERVICES.items() if service["image"].startswith(IMAGE)}
PROCESSES = {name: service for name, service in BACKEND.items() if "entrypoint" not in service}
DEMO = {name for name, service in SERVICES.items() if service.get("profiles") == ["demo"]}
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCUMENT = (ROOT / "docs" / "containers.md").read_text()


def read_instructions() -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line]


def list_arguments(instruction: str) -> list[str]:
    return [rest for name, rest in read_instructions() if name == instruction]


def read_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in list_arguments("ENV") for word in line.split())


def read_manifests() -> Iterator[dict[str, Any]]:
    for folder in ("base", "demo"):
        for name in yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())["resources"]:
            if name.endswith(".yaml"):
                yield from yaml.safe_load_all((KUBERNETES / folder / name).read_text())


def read_pods() -> dict[str, dict[str, Any]]:
    return {
        row["metadata"]["name"]: row["spec"]["template"]["spec"]
        for row in read_manifests()
        if "template" in row["spec"]
    }


def get_container(pod: dict[str, Any]) -> dict[str, Any]:
    return pod["containers"][0]


PODS = read_pods()


# ---- the image


def test_the_image_runs_as_an_ordinary_user_and_exposes_the_default_port() -> None:
    assert list_arguments("USER")[-1] == f"{USER}:{USER}"
    assert list_arguments("EXPOSE") == [str(PORT)]


def test_the_image_sets_only_known_variables() -> None:
    assert set(read_environment()) <= SETTINGS_VARIABLES | THIRD_PARTY_VARIABLES


def test_everything_is_written_to_the_volume() -> None:
    folder, environment = list_arguments("VOLUME")[0], read_environment()
    assert environment["MODEL_DIR"] == environment["HOME"] == folder
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(environment[name]).is_relative_to(folder)
    assert environment["HF_HOME"] == f"${{HF_HOME:-{folder}/huggingface}}"


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in "#"]
    sources = [word for line in list_arguments("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert ignored == "*"
    assert {f"!{source}" for source in sources} == set(allowed) - {"**/__pycache__"}
    for source in sources:
        assert (ROOT / source).exists(), source


def test_all_of_the_code_is_copied() -> None:
    copied = " ".join(list_arguments("COPY"))
    for name in ("_wsgi.py", "model.py", "backend"):
        assert name in copied


def test_the_build_steps_are_valid_shell() -> None:
    for step in list_arguments("RUN"):
        done = subprocess.run(["sh", "-n"], input=step, text=True, capture_output=True)
        assert done.returncode == 0, (step, done.stderr)


def test_torch_is_pinned_in_the_line_that_the_image_reads() -> None:
    pinned = subprocess.run(["grep", "^torch==", ROOT / "requirements.txt"], capture_output=True, text=True)
    assert re.fullmatch(r"torch==[0-9.]+\n", pinned.stdout)


def test_the_command_of_the_image_exists() -> None:
    assert json.loads(list_arguments("ENTRYPOINT")[0]) == ["python", "-m", "backend"]
    parse_command(json.loads(list_arguments("CMD")[0]))


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_requests_the_health_route(status: int, code: int) -> None:
    requested = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requested.append(handler.path)
        send_reply(handler, b"{}", status)

    check = json.loads(list_arguments("HEALTHCHECK")[0].split(" CMD ")[1])
    with http_server(answer) as url:
        env = {**os.environ, "PORT": url.rsplit(":", 1)[1], "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *check[1:]], env=env, capture_output=True)
    assert done.returncode == code
    assert requested[0] in list_routes()
    assert f"'{PORT}'" in check[-1]


def list_routes() -> set[str]:
    return {
        rule.rule for rule in create_app(GroundingDINO, Settings(redis_url="redis://localhost")).url_map.iter_rules()
    }


def parse_command(arguments: list[str]) -> None:
    """Parses a command line; raises if the program would refuse it."""
    cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])


# ---- compose


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_follow_the_specification(name: str) -> None:
    schema = json.loads((ROOT / "tests" / "data" / "compose_spec" / "compose-spec.json").read_text())
    errors = Draft7Validator(schema).iter_errors(yaml.safe_load((ROOT / name).read_text()))
    assert [f"{list(error.path)}: {error.message}" for error in errors] == []


@pytest.mark.parametrize("name", PROCESSES)
def test_compose_starts_commands_that_exist(name: str) -> None:
    parse_command(PROCESSES[name]["command"])


def test_the_default_and_the_demo_start_all_processes() -> None:
    usual = {tuple(service["command"]) for name, service in PROCESSES.items() if name not in DEMO}
    assert usual == {tuple(service["command"]) for name, service in PROCESSES.items() if name in DEMO}
    assert usual == {("web",), ("worker",), ("worker", "--queue", "fit"), ("push",)}


def test_every_setting_reaches_the_backend() -> None:
    given_by_the_image, of_serve = {"MODEL_DIR", "PORT"}, {"WORKERS"}
    for name in PROCESSES.keys() - DEMO:
        environment = PROCESSES[name]["environment"]
        assert set(environment) == SETTINGS_VARIABLES - given_by_the_image - of_serve
        assert {key for key, value in environment.items() if value is not None} == {"MODEL", "REDIS_URL"}


def test_the_demo_sets_only_known_variables() -> None:
    for name in DEMO & BACKEND.keys():
        assert set(SERVICES[name]["environment"]) <= SETTINGS_VARIABLES
    assert set(SERVICES["label-studio"]["environment"]) <= LABEL_STUDIO_VARIABLES


def test_containers_may_do_as_little_as_they_need() -> None:
    for name, service in {**BACKEND, "redis": SERVICES["redis"]}.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid"} & set(service), name
        assert service.get("user", "backend") not in ("root", "0"), name
    for name, service in BACKEND.items():
        assert "user" not in service, name
        assert service["tmpfs"] == ["/tmp"], name


def test_all_processes_share_the_data_volume() -> None:
    folder = read_environment()["MODEL_DIR"]
    usual = {tuple(service["volumes"]) for name, service in BACKEND.items() if name not in DEMO}
    demo = {tuple(SERVICES[name]["volumes"]) for name in DEMO & BACKEND.keys()}
    assert (usual, demo) == ({(f"data:{folder}",)}, {(f"demo-data:{folder}",)})


def test_nobody_but_the_backend_reaches_redis() -> None:
    redis = SERVICES["redis"]
    assert "ports" not in redis
    assert redis["networks"] == ["queue"]
    assert COMPOSE["networks"]["queue"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "queue" in service.get("networks", ())} == {
        "redis",
        *PROCESSES,
    }
    for service in PROCESSES.values():
        assert re.fullmatch(r"redis://redis:6379/\d", service["environment"]["REDIS_URL"])


def test_redis_has_the_options_of_the_private_one() -> None:
    words = build_redis_command("redis-server", Path("socket"), Path("folder"))
    private = dict(zip(words[1::2], words[2::2], strict=True))
    for given in (shlex.split(SERVICES["redis"]["command"]), get_container(PODS["redis"])["args"]):
        options = dict(zip(given[1::2], given[2::2], strict=True))
        assert options.pop("--protected-mode") == "no"  # or it refuses other containers, having no password
        assert options == {name: private[name] for name in options}
        assert {"--appendonly", "--appendfsync", "--save", "--maxmemory-policy"} == set(options)


def test_only_the_web_front_has_a_port() -> None:
    for name, service in BACKEND.items():
        is_web = service.get("command") == ["web"]
        assert service.get("ports", []) == ([f"${{PORT:-{PORT}}}:{PORT}"] if is_web else []), name
        assert service["healthcheck"] == {"disable": not is_web}, name


def test_workers_can_be_scaled() -> None:
    for name in ("worker", "demo-worker"):
        assert not {"container_name", "ports", "hostname"} & set(SERVICES[name])


def test_the_gpu_file_changes_every_service_of_the_image_and_none_else() -> None:
    assert set(GPU["services"]) == set(BACKEND)
    for name, service in GPU["services"].items():
        assert (service["image"], service["build"]["args"]) == (f"{IMAGE}:cuda", {"TORCH": "cuda"})
        is_worker = SERVICES[name].get("command", [""])[0] == "worker"
        assert ("deploy" in service) == is_worker, name
    assert BACKEND["web"]["image"] == f"{IMAGE}:cpu"
    assert set(BACKEND["web"]["build"]["args"]) <= {line.split("=")[0] for line in list_arguments("ARG")}


def test_only_the_demo_has_the_throw_away_key() -> None:
    label_studio = SERVICES["label-studio"]
    key = label_studio["environment"]["LABEL_STUDIO_USER_TOKEN"]
    assert key.startswith("throw-away")
    assert {name for name, service in SERVICES.items() if key in str(service)} == DEMO
    assert {SERVICES[name]["environment"]["LABEL_STUDIO_API_KEY"] for name in DEMO & BACKEND.keys()} == {key}
    assert [path.parent.name for path in KUBERNETES.rglob("*.yaml") if key in path.read_text()] == ["demo"] * 2
    assert label_studio["ports"] == ["127.0.0.1:8080:8080"]


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_demos_label_studio_accepts_a_private_backend(where: str) -> None:
    if where == "compose":
        environment = SERVICES["label-studio"]["environment"]
        assert SERVICES["demo-web"]["environment"]["LABEL_STUDIO_URL"] == "http://label-studio:8080"
    else:
        environment = {row["name"]: row["value"] for row in get_container(PODS["label-studio"])["env"]}
    assert environment["ML_BLOCK_LOCAL_IP"] == environment["SSRF_PROTECTION_ENABLED"] == "false"
    assert environment["LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"] == "true"
    tested = (ROOT / "tests" / "e2e" / "label_studio.py").read_text()
    assert all(f'"{name}"' in tested for name in environment)


def test_all_files_name_the_same_version_of_label_studio() -> None:
    version = re.search(r"STUDIO_VERSION := (.*)", (ROOT / "Makefile").read_text())[1]
    images = (SERVICES["label-studio"]["image"], get_container(PODS["label-studio"])["image"])
    assert set(images) == {f"heartexlabs/label-studio:{version}"}


def test_the_name_that_label_studio_connects_to_has_a_dot() -> None:
    alias = SERVICES["demo-web"]["networks"]["default"]["aliases"][0]
    assert f'"http://{alias}:{PORT}"' in (ROOT / "deploy" / "demo_project.py").read_text()
    assert "." in alias


def test_all_images_have_a_version() -> None:
    images = [service["image"] for service in [*SERVICES.values(), *GPU["services"].values()]]
    images += [get_container(pod)["image"] for pod in PODS.values()]
    for folder in ("base", "gpu", "demo"):
        row = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())["images"][0]
        images.append(f"{row['name']}:{row['newTag']}")
    for image in set(images) - {IMAGE}:  # its tag comes from kustomize
        assert re.fullmatch(r"[a-z/-]+:(?!latest)[a-z0-9.-]+", image), image
    assert all("${PYTHON}-slim" in line for line in list_arguments("FROM"))


# ---- Kubernetes


def test_manifests_and_compose_start_the_same_processes() -> None:
    containers = {name: get_container(pod) for name, pod in PODS.items() if get_container(pod)["image"] == IMAGE}
    started = {name: container["args"] for name, container in containers.items() if "command" not in container}
    assert started == {name: service["command"] for name, service in PROCESSES.items() if name not in DEMO}


def test_pods_may_do_as_little_as_they_need() -> None:
    for name, pod in PODS.items():
        container = get_container(pod)
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"].get("readOnlyRootFilesystem", name == "label-studio") is True, name
        if container["image"] == IMAGE:
            assert pod["securityContext"]["runAsUser"] == USER, name
            assert pod["enableServiceLinks"] is False, name


def test_the_manifests_set_only_known_variables() -> None:
    names = {row["name"] for pod in PODS.values() for row in get_container(pod).get("env", ())}
    for folder in ("base", "demo"):
        row = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
        for generated in [*row.get("configMapGenerator", ()), *row.get("secretGenerator", ())]:
            names |= {literal.split("=", 1)[0] for literal in generated["literals"]}
    assert names <= SETTINGS_VARIABLES | THIRD_PARTY_VARIABLES | LABEL_STUDIO_VARIABLES | DEMO_PROJECT_VARIABLES


def test_the_manifests_have_the_web_fronts_port_and_routes() -> None:
    web = get_container(PODS["web"])
    services = {row["metadata"]["name"]: row["spec"] for row in read_manifests() if row["kind"] == "Service"}
    assert web["ports"] == [{"containerPort": PORT}]
    assert services["grounding-dino"]["ports"] == [{"port": PORT}]
    for probe in ("readinessProbe", "livenessProbe"):
        assert web[probe]["httpGet"]["port"] == PORT
        assert web[probe]["httpGet"]["path"] in list_routes()


def test_selectors_find_their_pods() -> None:
    pods = {
        row["metadata"]["name"]: row["spec"]["template"]["metadata"]["labels"]
        for row in read_manifests()
        if "template" in row["spec"]
    }
    for row in read_manifests():
        selector = row["spec"].get("selector") or row["spec"].get("podSelector")
        if selector:
            match_labels = selector.get("matchLabels", selector)
            assert any(match_labels.items() <= labels.items() for labels in pods.values()), row["metadata"]
    with_redis = {name for name, labels in pods.items() if labels.get("redis") == "yes"}
    assert with_redis == PROCESSES.keys() - DEMO


# ---- docs/containers.md


def test_the_commands_in_the_document_exist() -> None:
    commands = [shlex.split(line, comments=True) for line in re.findall(r"docker compose [^`\n]+", DOCUMENT)]
    assert commands
    for words in commands:
        for before, word in itertools.pairwise(words):
            if before in ("exec", "run", "logs", "restart") and not word.startswith("-"):
                assert word in SERVICES, words
            if before == "--scale":
                assert word.split("=")[0] in SERVICES, words
            if before == "--profile":
                assert any(word in service.get("profiles", ()) for service in SERVICES.values()), words
            if word.endswith(".yml"):
                assert (ROOT / word).is_file(), words
    for argument in re.findall(r"--build-arg (\w+)", DOCUMENT):
        assert argument in {line.split("=")[0] for line in list_arguments("ARG")}
    for folder in re.findall(r"kubectl \w+ -k (\S+)", DOCUMENT):
        assert (ROOT / folder / "kustomization.yaml").is_file()

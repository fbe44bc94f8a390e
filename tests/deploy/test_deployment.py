"""What operators copy: configurations that load, valid manifests and units, a Dockerfile that keeps its promises."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from deploy import rehearse
from elis_gateway.app import _FLUSH
from elis_gateway.cli import cli
from elis_gateway.config import BgePredictor, from_mapping, warnings
from elis_gateway.dispatcher import _CLOSING_TIME

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes" / "elis-gateway.yaml"
UNIT = ROOT / "deploy" / "systemd" / "elis-gateway.service"


BESIDES = 2 * _FLUSH + _CLOSING_TIME + 12.0
"""Seconds that a stop may take after its grace: last bytes, calls that close, and a collector of traces that does not
answer (10.5 s, measured)."""


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_passes_check_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_KEY", "sk-example")
    done = CliRunner().invoke(cli, ["check-config", "--quiet", str(path)])
    assert (done.exit_code, done.output) == (0, "")


def documents() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFESTS.read_text(encoding="utf-8")))
    return found


def test_the_manifests_fit_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra `dev`)")
    for document in documents():
        validate.validate(document, validate.latest_version(), strict=True)


def test_the_manifests_fit_each_other_and_the_gateway() -> None:
    by_kind = {document["kind"]: document for document in documents()}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    secrets = {each["name"]: "sha256:" + "0" * 64 for each in container["env"] if "secretKeyRef" in each["valueFrom"]}
    config = from_mapping(yaml.safe_load(by_kind["ConfigMap"]["data"]["gateway.yaml"]), secrets)
    assert warnings(config) == [], "from outside, the admin listener asks for a key"
    assert isinstance(config.predictor, BgePredictor)
    state = config.predictor.state
    assert state is not None
    assert str(state.parent) in [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.server.port, "admin": config.admin.port}
    assert [container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness", "startup")] == [
        "/health", "/ready", "/health",
    ]  # fmt: skip
    drain = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert drain + config.server.shutdown_grace + BESIDES <= pod["spec"]["terminationGracePeriodSeconds"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = by_kind[kind]["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        assert selector.get("matchLabels", selector) == pod["metadata"]["labels"]


def test_the_unit_gives_requests_time_and_reloads() -> None:
    text = UNIT.read_text(encoding="utf-8")
    grace = from_mapping({"upstreams": [{"url": "http://x", "slots": 1}]}).server.shutdown_grace
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert float(patience) >= grace + BESIDES
    assert "ExecReload=/bin/kill -HUP $MAINPID" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/elis-gateway/bin/elis-gateway", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not said


def test_the_dockerfile_keeps_its_promises() -> None:
    _, stages = rehearse.parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    by_name = {stage.name: stage for stage in stages}
    assert stages[-1].base == "cpu", "a build without a target makes the CPU variant"
    for name, extra in (("cpu", "cpu"), ("cuda", "gpu")):
        steps = by_name[name].steps
        users = [step.text for step in steps if step.name == "USER"]
        assert users, "never as root"
        assert users[-1] not in ("0", "root")
        assert [step for step in steps if step.name == "HEALTHCHECK"]
        made = [step.text for stage in rehearse.needed(stages, name) for step in stage.steps if step.name == "RUN"]
        assert any(f"[{extra},loadtest,otel]" in text for text in made)
    assert "build-cpu" not in {stage.name for stage in rehearse.needed(stages, "cuda")}
    assert [stage.name for stage in rehearse.needed(stages, "cpu")] == ["source", "build-cpu", "cpu"]


def test_everything_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    patterns = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    _, stages = rehearse.parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    for step in (step for stage in stages for step in stage.steps if step.name == "COPY"):
        *sources, _ = step.text.split()
        if not sources[0].startswith("--from="):
            for source in sources:
                assert (ROOT / source).exists()
                assert not rehearse.ignored(source, patterns)
    assert rehearse.ignored("elis_gateway/__pycache__/x.pyc", patterns)
    assert rehearse.ignored("tests/test_cli.py", patterns)

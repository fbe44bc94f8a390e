"""Who may import whom (docs/architecture.md), read off the import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("elis_gateway", "loadtest", "onnx_export")
ANYWHERE = {
    "elis_gateway",
    "elis_gateway.errors",
    "elis_gateway.config",
    "elis_gateway.config.explain",
    "elis_gateway.core.compiled",
}
"""What anything may import. The parts of the configuration are its own business, marks for a compiler nobody's."""

E = "elis_gateway."
CORE = E + "core"
VALUES = {CORE + ".job", CORE + ".slice"}
"""What ``wire`` and predictors may know of the core: plain values."""

ARROWS: dict[str, set[str]] = {
    "elis_gateway": set(),
    E + "__main__": {E + "cli"},
    E + "cli": {
        *(E + name for name in ("access", "app", "doctor", "doctor_report", "logs", "sim", "tls")),
        "loadtest",
        "onnx_export",
    },
    E + "app": {
        *(E + name for name in ("admin", "build", "channel", "dispatcher", "flight", "handlers", "intake")),
        *(E + name for name in ("access", "journal", "lag", "listener", "live", "logs", "metrics")),
        *(
            E + name
            for name in ("tasks", "tls", "tracing", "traffic_log", "predictor", "roster", "upstream", "warmth", "wire")
        ),
        CORE,
    },
    # the live gateway, outermost first
    E + "handlers": {
        E + name
        for name in (
            "access",
            "channel",
            "dispatcher",
            "flight",
            "intake",
            "listener",
            "party",
            "logs",
            "relay",
            "tasks",
            "wire",
        )
    },
    E + "doctor": {E + "doctor_report", E + "tasks", E + "upstream", E + "wire"},
    E + "doctor_report": {E + "upstream.base"},
    E + "listener": {E + "wire"},
    E + "access": {E + "flight"},
    E + "admin_guard": {E + "access"},
    E + "admin": {E + "admin_guard", E + "flight", E + "journal"},
    E + "build": {CORE, E + "predictor"},
    E + "journal": {E + "flight", CORE + ".job"},
    E + "live": {E + "flight", CORE},
    E + "intake": {E + "access", E + "flight", E + "party", E + "upstream.base", E + "wire", CORE + ".job"},
    E + "party": {E + "channel", E + "flight", E + "wire"},
    E + "estimator": {E + "flight", E + "predictor.base", E + "tasks", *VALUES},
    E + "dispatcher": {
        E + "estimator",
        E + "flight",
        E + "channel",
        E + "logs",
        E + "predictor.base",
        E + "tasks",
        E + "upstream.base",
        E + "wire",
        CORE,
    },
    E + "metrics": {E + "flight", *VALUES},
    E + "tracing": {E + "flight", *VALUES},
    E + "warmth": {E + "flight"},
    E + "traffic_log": {E + "behind", E + "flight", *VALUES},
    E + "flight": {E + "channel", E + "wire", *VALUES},
    E + "channel": set(),
    E + "roster": {E + "tasks", E + "upstream.fleet"},
    E + "tls": set(),
    E + "upstream": {E + "wire", E + "tasks", E + "tls", CORE + ".placement"},
    # the parts that stand alone
    CORE: set(),
    E + "wire": VALUES,
    E + "predictor": {*VALUES, E + "tasks"},
    E + "config": set(),
    E + "errors": set(),
    E + "lag": set(),
    E + "behind": set(),
    E + "logs": {E + "behind"},
    E + "tasks": set(),
    # beside the gateway
    E + "sim": {CORE, E + "wire", E + "predictor.base", E + "tasks"},
    "loadtest": {E + "build", E + "wire", E + "sim", E + "predictor", E + "tasks", CORE},
    "onnx_export": {E + "predictor", E + "traffic_log"},
}
"""Module or package -> what it may import beside itself and ``ANYWHERE``; a package's entry holds for all within it."""


def modules() -> dict[str, Path]:
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Every module an import statement names; of ``from package import x`` that is x where x is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def home(name: str) -> str:
    """The entry of ``ARROWS`` that governs a module: the longest that holds it."""
    entries = [entry for entry in ARROWS if name == entry or (entry != "elis_gateway" and name.startswith(entry + "."))]
    assert entries, f"{name}: not in the picture; say in tests/test_architecture.py what it may import"
    return max(entries, key=len)


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name: str) -> None:
    entry = home(name)
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] not in OURS or imported in ANYWHERE:
            continue
        assert within(imported, ARROWS[entry] | {entry} - {"elis_gateway"}), f"{name} must not import {imported}"


def test_the_core_is_pure() -> None:
    """Standard library only, and nothing of it that has a clock, a die, a loop or an output."""
    never = {"asyncio", "time", "datetime", "random", "logging", "threading", "socket", "os", "sys"}
    for name, path in MODULES.items():
        if name.startswith(CORE):
            roots = {imported.split(".")[0] for imported in imports(path)} - {"elis_gateway"}
            if name == CORE + ".compiled":
                roots -= {"mypy_extensions"}  # what the type checker and the compiler read; never imported
            assert roots <= set(sys.stdlib_module_names) - never, f"{name}: {roots}"


WIRE_PURE = {"asyncio", "aiohttp", "socket", "time", "random", "logging"}


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("elis_gateway.wire", WIRE_PURE),
        ("elis_gateway.predictor", {"aiohttp"}),
        ("elis_gateway.dispatcher", {"aiohttp", "json", "orjson", "prometheus_client"}),
        ("elis_gateway.channel", {"aiohttp", "json", "orjson"}),
        ("elis_gateway.errors", {"http", "aiohttp"}),
        ("elis_gateway.config", {"aiohttp", "asyncio"}),
        ("elis_gateway.sim.engine", {"asyncio", "time", "random", "aiohttp"}),
        ("elis_gateway.sim.simulator", {"time", "aiohttp"}),
        ("loadtest.arrivals", {"time", "asyncio", "aiohttp"}),
        ("loadtest.stats", {"time", "asyncio", "aiohttp"}),
        ("loadtest.figures", {"time", "asyncio", "aiohttp"}),
        ("loadtest.compare", {"time", "asyncio", "aiohttp"}),
        ("loadtest.make", {"time", "asyncio", "aiohttp"}),
        ("loadtest.workload", {"time", "asyncio", "aiohttp"}),
    ],
)
def test_what_a_module_must_not_know(package: str, never: set[str]) -> None:
    for name, path in MODULES.items():
        if within(name, {package}):
            found = {imported.split(".")[0] for imported in imports(path)} & never
            assert not found, f"{name} must not import {found}"


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("prometheus_client", {"elis_gateway.metrics"}),
        ("uvloop", {"elis_gateway.cli", "loadtest.run"}),
        ("opentelemetry", {"elis_gateway.tracing"}),
        ("click", {"elis_gateway.cli", "loadtest.cli", "loadtest.options", "loadtest.engines", "onnx_export.cli"}),
        ("torch", {"onnx_export"}),
        ("transformers", {"onnx_export"}),
        ("onnxruntime", {"elis_gateway.predictor.onnx", "onnx_export"}),
        ("rich", {"loadtest"}),
        (
            "pydantic",
            {
                "elis_gateway.build",
                "elis_gateway.config",
                "elis_gateway.predictor.manifest",
            },
        ),
        ("yaml", {"elis_gateway.config", "loadtest.make"}),
    ],
)
def test_a_library_has_one_importer(library: str, only: set[str]) -> None:
    users = {name for name, path in MODULES.items() if library in {i.split(".")[0] for i in imports(path)}}
    assert all(within(user, only) for user in users), f"{library} is imported by {sorted(users)}"


def test_nobody_imports_the_top() -> None:
    """The composition root and the command line are leaves of the picture."""
    for name, path in MODULES.items():
        for imported in imports(path):
            if imported == "elis_gateway.app":
                assert name == "elis_gateway.cli"
            if imported == "elis_gateway.cli":
                assert name == "elis_gateway.__main__"


def test_serve_stays_small() -> None:
    """What ``elis-gateway serve`` imports: no training framework, no simulator, no load test."""
    script = (
        "import sys\n"
        "import elis_gateway.cli, elis_gateway.config, elis_gateway.logs, elis_gateway.app, uvloop\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    never = {
        "torch",
        "transformers",
        "opentelemetry",
        "numpy",
        "rich",
        "elis_gateway.sim",
        "loadtest",
        "onnx_export",
        "xllamacpp",
        "openai",
    }
    assert not [name for name in loaded if within(name, never)]

"""Runs the Dockerfile's steps in order in a scratch directory, where there is no container engine.

    python -m deploy.rehearse [--target cpu] [--keep FOLDER]

Every stage becomes a folder; COPY copies from the sources (less what .dockerignore leaves out) or from another stage,
ENV and WORKDIR hold for what follows, RUN runs with the stage's absolute paths led into its folder. The end is what the
image is for: its healthcheck against its entrypoint, serving a configuration in front of the embedded engine.

This is a rehearsal and not a build: the base images are this machine's Python, users are not made, and packages of the
base's distribution (the CUDA variant's) are not installed, which is why only the CPU variant can be rehearsed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from loadtest.engines import free_port

ROOT = Path(__file__).parent.parent
NOT_HERE = re.compile(r"^(useradd|apt-get)\b")
"""Steps that would change this machine."""


class Step(NamedTuple):
    """One instruction."""

    name: str
    text: str


class Stage(NamedTuple):
    """A FROM and what follows it."""

    name: str
    base: str
    steps: list[Step]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Global arguments and stages of a Dockerfile of the kind we write."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(x for x in text.splitlines() if not x.lstrip().startswith("#")))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "ARG" and not stages:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "FROM":
            base, _, alias = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            stages.append(Stage(alias or f"stage{len(stages)}", base, []))
        elif stages:
            stages[-1].steps.append(Step(name, rest))
        else:
            raise ValueError(f"{name} before FROM")
    return arguments, stages


def needed(stages: list[Stage], target: str) -> list[Stage]:
    """The target and every stage it is made from, in the file's order."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name in wanted or name not in by_name:
            return
        wanted.add(name)
        want(by_name[name].base)
        for step in by_name[name].steps:
            if source := re.match(r"--from=(\S+)", step.text):
                want(source[1])

    want(target)
    return [stage for stage in stages if stage.name in wanted]


def ignored(path: str, patterns: list[str]) -> bool:
    """Does .dockerignore leave this path out? The last pattern that fits decides."""
    out = False
    for pattern in patterns:
        keep = pattern.startswith("!")
        glob = pattern.lstrip("!")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if glob.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, glob[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatch(head, glob) for head in heads)
        if fits:
            out = not keep
    return out


class Rehearsal:
    """Folders for stages, and what has been set in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._patterns = [
            line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
        ]
        self.environment: dict[str, dict[str, str]] = {}
        self.commands: dict[str, dict[str, str]] = {}
        self._places: dict[str, str] = {}

    def root(self, stage: str) -> Path:
        """A stage's folder."""
        return self._folder / stage

    def stage(self, stage: Stage) -> None:
        """Run every step of one stage."""
        root = self.root(stage.name)
        based = self.root(stage.base)
        if based.exists():
            shutil.copytree(based, root, symlinks=True)
            self.environment[stage.name] = dict(self.environment[stage.base])
            self.commands[stage.name] = dict(self.commands[stage.base])
            self._places[stage.name] = self._places[stage.base]
        else:
            root.mkdir(parents=True)
            self.environment[stage.name], self.commands[stage.name], self._places[stage.name] = {}, {}, "/"
        for step in stage.steps:
            began = time.monotonic()
            done = self._step(stage.name, step)
            print(
                f"{stage.name:10s} {done:8s} {time.monotonic() - began:5.1f} s  {step.name} {step.text[:90]}",
                flush=True,
            )

    def _step(self, stage: str, step: Step) -> str:
        match step.name:
            case "WORKDIR":
                self._places[stage] = step.text
                (self.root(stage) / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(stage, step.text)
            case "ENV":
                for pair in shlex.split(step.text):
                    key, _, value = pair.partition("=")
                    self.environment[stage][key] = value
            case "RUN":
                return self._run(stage, step.text)
            case "ENTRYPOINT" | "CMD" | "HEALTHCHECK" | "USER" | "EXPOSE" | "STOPSIGNAL":
                self.commands[stage][step.name] = step.text
            case "LABEL":
                return "noted"
            case _:
                raise ValueError(f"{step.name}: not rehearsed")
        return "done"

    def _copy(self, stage: str, text: str) -> None:
        *sources, target = text.split()
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self.root(sources.pop(0).removeprefix("--from="))
        place = target if target.startswith("/") else f"{self._places[stage]}/{target}"
        into = self.root(stage) / place.lstrip("/")
        for source in sources:
            found = origin / source.lstrip("/")
            if not found.exists():
                raise FileNotFoundError(f"COPY {source}: there is no such file")
            if origin == ROOT and ignored(source, self._patterns):
                raise FileNotFoundError(f"COPY {source}: left out by .dockerignore")
            if found.is_dir():
                shutil.copytree(
                    found, into, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)

    def led(self, stage: str, text: str) -> str:
        """Absolute paths of the image as paths below the stage's folder."""
        return re.sub(r"(?<![\w.:/])/(app|src|etc/elis-gateway|config\.yaml)\b", rf"{self.root(stage)}/\1", text)

    def _run(self, stage: str, text: str) -> str:
        if NOT_HERE.match(text):
            return "skipped"
        place = self.root(stage) / self._places[stage].lstrip("/")
        environment = {**os.environ, **self.environment[stage]}
        environment.pop("PYTHONPATH", None)
        # A base image's python is the one that runs this.
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-c", self.led(stage, text)], cwd=place, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"RUN {text}: status {done.returncode}\n{done.stdout[-3000:]}")
        return "done"

    def serve(self, stage: str) -> None:
        """Start the image's command in front of the embedded engine and run its healthcheck until it is content."""
        app = self.root(stage) / "app"
        # A virtual environment remembers where it was made; an image has it at the same place, this folder has not.
        program = [sys.executable, "-I", "-S", "-c", _MAIN, str(_packages(app))]
        ports = [free_port() for _ in range(3)]
        config = self.root(stage) / "config.yaml"
        url = f"http://127.0.0.1:{ports[0]}"
        config.write_text(
            f"server: {{host: 127.0.0.1, port: {ports[1]}}}\nadmin: {{port: {ports[2]}}}\n"
            f"upstreams: [{{url: '{url}', slots: 4}}]\n"
        )
        entry = json.loads(self.commands[stage]["ENTRYPOINT"])
        command = [self.led(stage, word) for word in json.loads(self.commands[stage]["CMD"])]
        assert entry == ["elis-gateway"], entry
        assert (app / "bin" / entry[0]).exists()
        health = json.loads(self.commands[stage]["HEALTHCHECK"].split("CMD", 1)[1])
        engine = subprocess.Popen([*program, "sim-engine", "--port", str(ports[0])], stdin=subprocess.DEVNULL)
        gateway = subprocess.Popen([*program, *command], stdin=subprocess.DEVNULL)
        try:
            check = [sys.executable, *health[1:]]
            environment = {**os.environ, "ELIS_HEALTH_URL": f"http://127.0.0.1:{ports[1]}/ready"}
            deadline = time.monotonic() + 60
            while subprocess.run(check, env=environment, stderr=subprocess.DEVNULL, check=False).returncode:
                if time.monotonic() > deadline or gateway.poll() is not None:
                    raise RuntimeError("the healthcheck was never content")
                time.sleep(0.2)
            print(f"{stage:10s} healthy: {' '.join([*entry, *json.loads(self.commands[stage]['CMD'])])}")
        finally:
            for process in (gateway, engine):
                process.terminate()
            statuses = [process.wait(timeout=40) for process in (gateway, engine)]
        assert statuses == [0, 0], f"they ended with {statuses}"


_MAIN = """
import sys
packages = sys.argv.pop(1)
sys.path.insert(0, packages)
import elis_gateway
assert elis_gateway.__file__.startswith(packages), elis_gateway.__file__
from elis_gateway.cli import main
main()
"""


def _packages(app: Path) -> Path:
    (found,) = app.glob("lib/python3*/site-packages")
    return found


def main() -> None:
    """For the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    options = parser.parse_args()
    _, stages = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as made:
        rehearsal = Rehearsal(options.keep or Path(made))
        for stage in needed(stages, options.target):
            rehearsal.stage(stage)
        rehearsal.serve(options.target)


if __name__ == "__main__":
    main()

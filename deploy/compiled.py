"""Builds and installs the package compiled, in a scratch directory, and runs there the tests of what was compiled.

    python -m deploy.compiled [--keep FOLDER] [pytest's arguments]

What is tested is what was installed: the sources are not on the path. Where there is no C compiler, that is said and is
no failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ["elis_gateway", "loadtest", "onnx_export", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
BESIDE = ["tests", "benchmarks", "examples", "config", "docs", "loadtest/data"]
"""What the tests read."""
TESTS = ["tests/core", "tests/wire", "tests/gateway", "tests/upstream", "tests/predictor/test_features.py",
         "tests/predictor/test_gittins.py", "tests/predictor/test_learner.py", "tests/sim", "tests/test_agreement.py",
         "tests/test_examples.py", "tests/loadtest/test_targets.py"]  # fmt: skip


def copy(names: list[str], into: Path) -> None:
    """Files and folders of the repository, less what Python leaves there."""
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, into)


def build(source: Path, site: Path) -> None:
    """Install ``source`` compiled; with this environment's mypy and setuptools, and nothing fetched."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation",
               "--no-deps", "--target", str(site), str(source)]  # fmt: skip
    subprocess.run(command, env={**os.environ, "ELIS_GATEWAY_COMPILE": "1"}, stdin=subprocess.DEVNULL, check=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert (site / f"elis_gateway/core/scheduler{suffix}").exists(), "nothing was compiled"


def compiler() -> tuple[str, bool]:
    """The C compiler that would be called, and whether it is there."""
    name = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    return name, shutil.which(name) is not None


def main(words: list[str] | None = None) -> int:
    """For the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    options, arguments = parser.parse_known_args(words)
    name, found = compiler()
    if not found:
        print(f"compiled build: SKIPPED, there is no C compiler ({name}) here")
        return 0
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        site, tests = folder / "site", folder / "tests"
        copy(SOURCES, folder / "source")
        build(folder / "source", site)
        copy(BESIDE, tests)
        shutil.copy2(ROOT / "pyproject.toml", tests)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not engine and not patches",
                   *(arguments or TESTS)]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=tests, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Known vulnerabilities of what is installed, by pip-audit; and said plainly where nothing could be looked up.

    python -m deploy.audit

pip-audit takes an index without the vulnerabilities' interface (a mirror) for one that knows of none, and ends well:
every distribution is then "not found". Exit status 1: something is known of at least one distribution.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["verdict"]

_UNREACHABLE = ("connection", "timed out", "timeout", "resolve", "serviceerror")


def verdict(status: int, output: str, errors: str) -> tuple[int, list[str]]:
    """Exit status and what to say, of pip-audit's own status, its JSON and what it said beside it."""
    try:
        found: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError, TypeError):
        if any(word in errors.lower() for word in _UNREACHABLE):
            return 0, [errors.strip()[-500:], "SKIPPED: the vulnerability database cannot be reached from here"]
        return status or 1, [errors.strip()[-2000:] or "pip-audit said nothing"]
    looked_up = [entry for entry in found if "skip_reason" not in entry]
    if not looked_up:
        return 0, [f"SKIPPED: the package index knows none of the {len(found)} distributions: nothing was audited"]
    lines = [
        f"{entry['name']} {entry['version']}: {vuln['id']}, fixed in {', '.join(vuln['fix_versions']) or 'no version'}"
        for entry in looked_up
        for vuln in entry["vulns"]
    ]
    bad = len(lines)
    lines.append(f"{len(looked_up)} distributions looked up, {len(found) - len(looked_up)} not; {bad} vulnerabilities")
    return min(bad, 1), lines


def main() -> None:
    argv = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    status, lines = verdict(done.returncode, done.stdout, done.stderr)
    print("\n".join(lines))
    sys.exit(status)


if __name__ == "__main__":
    main()

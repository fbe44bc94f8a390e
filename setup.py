"""Everything stands in pyproject.toml but one choice: ELIS_GATEWAY_COMPILE=1 makes C extensions (mypyc; a C compiler is
needed) of the scheduler core and the simulator. The same source either way; without it everything is plain Python."""

from __future__ import annotations

import os
import sys

from setuptools import setup

CORE = "actions admission dials job lengths placement policy ready scheduler shadow slice slots waiting"
COMPILED = [
    *(f"elis_gateway/core/{name}.py" for name in CORE.split()),
    "elis_gateway/sim/engine.py",
    "elis_gateway/sim/simulator.py",
]

wanted = os.environ.get("ELIS_GATEWAY_COMPILE", "0") not in ("", "0")
extensions = []
if wanted and {"egg_info", "dist_info"}.isdisjoint(sys.argv):  # those only ask what is required
    from mypyc.build import mypycify

    extensions = mypycify(COMPILED, opt_level="3", group_name="elis_gateway")

setup(ext_modules=extensions, setup_requires=["mypy>=2.4"] if wanted else [])

"""Everything stands in pyproject.toml but one choice: ELIS_GATEWAY_COMPILE=1 makes C extensions (mypyc; a C compiler is
needed) of the scheduler core, the simulator and what every request goes through. The same source either way; without
it everything is plain Python."""

from __future__ import annotations

import os
import sys

from setuptools import setup

MODULES = {
    "": "access channel dispatcher estimator flight handlers intake journal live party tasks",
    "core/": "actions admission dials job lengths placement policy ready scheduler shadow slice slots waiting",
    "predictor/": "features gittins spread",
    "sim/": "engine simulator",
    "upstream/": "patience session",
    "wire/": "calls continuation dialects encode foreign ledger llamacpp logprobs loose openai parameters problems "
    "reading several shapes sse stops thoughts whole",
}
COMPILED = [f"elis_gateway/{folder}{name}.py" for folder, names in MODULES.items() for name in names.split()]

wanted = os.environ.get("ELIS_GATEWAY_COMPILE", "0") not in ("", "0")
extensions = []
if wanted and {"egg_info", "dist_info"}.isdisjoint(sys.argv):  # those only ask what is required
    from mypyc.build import mypycify

    extensions = mypycify(COMPILED, opt_level="3", group_name="elis_gateway")

setup(ext_modules=extensions, setup_requires=["mypy>=2.4"] if wanted else [])

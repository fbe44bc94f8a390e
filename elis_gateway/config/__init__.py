"""The shape of the YAML configuration: one frozen tree of pydantic models, a module for each part, and ``load``.

Knows: every key, its type, its default and its meaning (the descriptions are the reference, docs/configuration.md is
generated from them). Never: building what is configured; reading anything at import. Durations are seconds, lengths
are tokens, sizes are bytes. What is wrong with a file is said in words by ``explain``.
"""

from elis_gateway.config.access import ApiKey, Limits
from elis_gateway.config.files import dump, from_mapping, keys, load, warnings
from elis_gateway.config.listeners import Admin, Server, ServerTLS
from elis_gateway.config.observing import Tracing
from elis_gateway.config.predictors import BgePredictor, ExternalPredictor
from elis_gateway.config.scheduling import ExternalPolicy, Scheduler
from elis_gateway.config.tree import Config
from elis_gateway.config.upstreams import MOST_SLOTS, TLS, Health, Timeouts, Upstream, check_count

__all__ = [
    "MOST_SLOTS",
    "TLS",
    "Admin",
    "ApiKey",
    "BgePredictor",
    "Config",
    "ExternalPolicy",
    "ExternalPredictor",
    "Health",
    "Limits",
    "Scheduler",
    "Server",
    "ServerTLS",
    "Timeouts",
    "Tracing",
    "Upstream",
    "check_count",
    "dump",
    "from_mapping",
    "keys",
    "load",
    "warnings",
]

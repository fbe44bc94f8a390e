"""What can be set on the embedded engine's server. Never: reading files or building objects at import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.language import Language

__all__ = ["ServerConfig"]


@dataclass(frozen=True)
class ServerConfig:
    """Defaults behave like vLLM 0.32 with ``--enable-prompt-tokens-details`` off, serving a model that is greedy."""

    host: str = "127.0.0.1"
    port: int = 8100
    """0: any free port."""
    models: tuple[str, ...] = ("sim",)
    engine: EngineModel | None = None
    """The modelled engine; None: the shipped default."""
    language: Language = field(default_factory=Language)
    replay: str | None = None
    """JSONL file (``.gz`` may be) of recorded prompts and answers to speak instead of ``language``."""
    max_model_len: int = 8192
    """Tokens of prompt and answer together."""
    speed: float = 1.0
    """Modelled seconds per real second."""
    stride: float | None = None
    """Real seconds that pass for the engine at most between two looks at it: it stands still while this process does.
    None: all pass, as for an engine on a machine of its own."""
    delay: bool = True
    """False: every token is ready at once and nothing queues, for measuring what stands in front."""
    stream_interval: int = 1
    """Tokens per streamed delta (vLLM's option of that name)."""
    priority: Literal["honour", "ignore", "refuse"] = "ignore"
    """The field ``priority``: order the queue by it, accept it without effect, or answer 400. Real engines do all."""
    token_ids: bool = True
    """False: ``return_token_ids`` is an unknown field without effect (a text-only engine)."""
    id_prompts: bool = True
    """False: a prompt of token ids is refused."""
    prompt_tokens_details: bool = False
    """Report ``usage.prompt_tokens_details.cached_tokens``."""
    engines: int = 1
    """Data-parallel ranks it shows on its metrics page; there is one engine all the same."""
    flush_unfinished: bool = False
    """A call cut inside a character sends U+FFFD for it; False: nothing (vLLM 0.32)."""
    temperature: float = 0.0
    """For requests that do not say."""
    max_queued: int | None = None
    """Calls, waiting and running, beyond which the next is answered 503 (vLLM's ``--max-num-queued-reqs``)."""
    api_key: str | None = None
    log_size: int = 100_000
    """Calls kept for ``GET /sim/requests``."""
    seed: int = 0
    """Of the draws of sampled requests that bring no seed."""
    fingerprint: str = "elis-sim"

"""The embedded engine's small routes: models, health, metrics, tokens, and its own under ``/sim``."""

from __future__ import annotations

import asyncio
import time

import orjson
from aiohttp import web

from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server_calls import Refusal, bad_request, body_of, messages_of
from elis_gateway.sim.server_sim import Sim, authorize, refused

__all__ = ["Routes"]


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(data), content_type="application/json")


class Routes:
    """Handlers by name; ``sim`` is what they speak of."""

    def __init__(self, sim: Sim) -> None:
        self._sim = sim

    async def models(self, request: web.Request) -> web.Response:
        config = self._sim.config
        try:
            authorize(request.headers.get("Authorization"), config.api_key)
        except Refusal as exc:
            return refused(exc)
        created = int(time.time())
        common = {"object": "model", "created": created, "owned_by": "elis-sim", "parent": None}
        data = [{"id": name, **common, "root": name, "max_model_len": config.max_model_len} for name in config.models]
        return _json({"object": "list", "data": data})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        sim, pacer = self._sim, self._sim.pacer
        values = {
            "num_requests_running": ("gauge", float(pacer.running)),
            "num_requests_waiting": ("gauge", float(pacer.waiting)),
            "kv_cache_usage_perc": ("gauge", pacer.kv_usage),
            "num_preemptions_total": ("counter", float(pacer.evictions)),
            "prefix_cache_queries_total": ("counter", float(sim.cache.queries)),
            "prefix_cache_hits_total": ("counter", float(sim.cache.hits)),
        }
        lines = []
        for name, (kind, value) in values.items():
            lines.append(f"# TYPE vllm:{name} {kind}\n")
            for rank in range(sim.config.engines):
                label = f'{{engine="{rank}",model_name="{sim.config.models[0]}"}}'
                lines.append(f"vllm:{name}{label} {value}\n")
        return web.Response(text="".join(lines))

    async def tokenize(self, request: web.Request) -> web.Response:
        try:
            body = body_of(await request.read())
            voice = self._sim.voice
            if "messages" in body:
                open_turn = body.get("add_generation_prompt", True) is not False
                ids = voice.chat(messages_of(body), open_turn=open_turn, continue_last=False, length=None)
            elif isinstance(body.get("prompt"), str):
                ids = voice.prompt(body["prompt"], length=None)
            else:
                raise bad_request("prompt or messages must be given", "prompt")
        except Refusal as exc:
            return refused(exc)
        size = self._sim.config.max_model_len
        return _json({"count": len(ids), "max_model_len": size, "tokens": ids, "token_strs": None})

    async def detokenize(self, request: web.Request) -> web.Response:
        try:
            return _json({"prompt": self._sim.voice.decode(body_of(await request.read()).get("tokens", []))})
        except (Refusal, ValueError, TypeError) as exc:
            return refused(exc if isinstance(exc, Refusal) else bad_request(str(exc), "tokens"))

    async def requests(self, request: web.Request) -> web.Response:
        listed = self._sim.log.listed()
        if request.method == "DELETE":
            self._sim.log.clear()
        return _json({"now": asyncio.get_running_loop().time(), "requests": listed})

    async def faults(self, request: web.Request) -> web.Response:
        book = self._sim.faults
        if request.method == "DELETE":
            book.rules.clear()
        elif request.method == "POST":
            try:
                book.add(Fault.parse(body_of(await request.read())))
            except (Refusal, ValueError) as exc:
                return _json({"error": {"message": str(exc)}}, 400)
        return _json({"faults": book.listed()})

    async def missing(self, request: web.Request) -> web.Response:
        return _json({"detail": "Not Found"}, 404)

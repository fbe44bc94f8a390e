"""Sends one call's answer at the engine's pace, and goes wrong on request.

Knows: aiohttp's responses, how each fault looks on the wire. Never: parsing, what the answer is.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from elis_gateway.sim.faults import Fault
from elis_gateway.sim.script import Script
from elis_gateway.sim.server_pace import Ticket
from elis_gateway.sim.server_shapes import StreamShape, error_event
from elis_gateway.sim.sockets import reset

__all__ = ["EngineDied", "send_stream", "send_whole"]

_GARBAGE = b'data: {"id": "cmpl-0", "choices": [{"index": 0, "te\n\ndata: \xff\xfe\x00 not json\n\n'


class EngineDied(Exception):
    """The engine was killed while this call was in it."""


async def _for_ever() -> None:
    """Until the handler is cancelled, which a closed connection does."""
    await asyncio.get_running_loop().create_future()


async def send_stream(
    request: web.Request,
    script: Script,
    ticket: Ticket,
    shape: StreamShape,
    *,
    interval: int,
    together: bool,
    fault: Fault | None,
) -> web.StreamResponse:
    """Stream the answer as tokens become ready. ``together``: what is ready goes out in one write.

    Raises EngineDied, and what aiohttp raises when the client has left.
    """
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    ids, texts, size = script.ids, script.texts, len(script.ids)
    stop_at = size if fault is None or fault.kind == "drip" else min(fault.after, size)
    have = 0
    while have < stop_at:
        ready = min(await ticket.wait(have), stop_at)
        if ticket.dead:
            raise EngineDied
        chunks = [] if have else [shape.first()]
        while have < ready:
            upto = min(have + interval, ready)
            text = texts[have] if upto == have + 1 else "".join(texts[have:upto])
            if upto == size:
                chunks.append(shape.last(text, ids[have:upto], script.finish, script.stop_reason))
            else:
                chunks.append(shape.delta(text, ids[have:upto]))
            have = upto
        if fault is not None and fault.kind == "drip":
            await _drip(response, b"".join(chunks), fault)
        elif together:
            await response.write(b"".join(chunks))
        else:
            for chunk in chunks:
                if chunk:
                    await response.write(chunk)
    if fault is not None and fault.kind != "drip":
        await _fail_stream(request, response, fault)
    await response.write_eof()
    return response


async def _drip(response: web.StreamResponse, data: bytes, fault: Fault) -> None:
    for start in range(0, len(data), 7):
        await response.write(data[start : start + 7])
        await asyncio.sleep(0.01 if fault.seconds is None else fault.seconds)


async def _fail_stream(request: web.Request, response: web.StreamResponse, fault: Fault) -> None:
    """Perform a fault in the middle of a stream. Returns only where the body may end properly."""
    if fault.kind == "stall":
        if fault.seconds is None:
            await _for_ever()
        await asyncio.sleep(fault.seconds or 0)
    elif fault.kind == "garbage":
        await response.write(_GARBAGE)
    elif fault.kind == "error_event":
        await response.write(error_event("the engine failed"))
    elif fault.kind != "end":
        await _cut(request, fault)


async def _cut(request: web.Request, fault: Fault) -> None:
    if fault.kind == "reset":
        reset(request.transport)
    elif request.transport is not None:
        request.transport.close()
    await _for_ever()


async def send_whole(request: web.Request, body: bytes, ticket: Ticket, *, fault: Fault | None) -> web.Response:
    """Answer when the last token is made. Raises EngineDied."""
    while not ticket.ended:
        await ticket.wait(ticket.produced)
        if ticket.dead:
            raise EngineDied
        if fault is not None and ticket.produced >= fault.after:
            break
    if fault is None or fault.kind == "drip":
        return web.Response(body=body, content_type="application/json")
    if fault.kind == "stall":
        if fault.seconds is None:
            await _for_ever()
        await asyncio.sleep(fault.seconds or 0)
        return web.Response(body=body, content_type="application/json")
    if fault.kind in ("garbage", "end"):
        return web.Response(body=body[: len(body) // 2] + b"\xff", content_type="application/json")
    if fault.kind == "error_event":
        error = b'{"error":{"message":"the engine failed","type":"InternalServerError","param":null,"code":500}}'
        return web.Response(status=500, body=error, content_type="application/json")
    await _cut(request, fault)
    raise EngineDied

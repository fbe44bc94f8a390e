"""The doctor against embedded engines: what they can do, their real slots, their seam, and whether order can help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import RawTestServer as TestServer
from click.testing import CliRunner

from elis_gateway import doctor, doctor_report
from elis_gateway.cli import cli
from elis_gateway.config import Upstream, from_mapping
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import ServerConfig, SimServer
from tests.gateway.test_warmth import balancer
from tests.gateway.world import AT_ONCE, paced
from tests.upstream.autojump import local_loop


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ATTEMPTS", 1)


def engine(slots: int, *, seam: float = 0.0, **more: Any) -> ServerConfig:
    """A hundred tokens a second, whatever the batch."""
    model = EngineModel(slots=slots, decode=((1, 100.0),), prefill_tokens_per_second=None, seam_tokens=seam)
    return ServerConfig(port=0, engine=model, max_model_len=4096, language=AT_ONCE.language, **more)


def examined(*configs: ServerConfig, fault: Fault | None = None, **settings: Any) -> doctor_report.Findings:
    """What the doctor finds, in virtual time: whether this machine is busy changes nothing. Several engines stand
    behind one load balancer."""

    async def examine() -> doctor_report.Findings:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(SimServer(config)) for config in configs]
            if fault is not None:
                servers[0].faults.add(fault)
            url = servers[0].url
            if len(servers) > 1:
                url = await stack.enter_async_context(balancer([server.url for server in servers]))
            upstream = Upstream.model_validate({"url": url, "slots": 1, **settings})
            return await doctor.examine(upstream, configured="slots" in settings, say=lambda what: None)

    with asyncio.Runner(loop_factory=local_loop) as runner:
        return runner.run(examine())


def test_slots_seam_and_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITS_KEY", "secret")
    asked = engine(3, seam=12.0, priority="honour", prompt_tokens_details=True, api_key="secret")
    found = examined(asked, api_key_env="ITS_KEY")
    assert found.slots == 3
    assert found.seam == pytest.approx(12.0, abs=1.0)
    assert found.pace == pytest.approx(0.01, rel=0.2)
    assert found.capabilities.ids
    assert found.capabilities.orders
    assert found.capabilities.context == {"sim": 4096}
    assert found.cache.startswith("yes")
    made = from_mapping(yaml.safe_load(doctor_report.snippet([found])))
    (told,) = made.upstreams
    assert (told.slots, told.overcommit, told.api_key_env) == (3, 2, "ITS_KEY"), "it can be served with as it is"
    words = "\n".join(doctor_report.report(found))
    assert "continued exactly" in words
    assert "for your traffic to say" in words


def test_an_engine_that_never_answers_chats_is_still_examined() -> None:
    hanging = Fault("hang", times=None, path="/v1/chat/completions")
    found = examined(engine(1, token_ids=False), fault=hanging)
    assert "Chats are not served: no answer in time." in found.notes
    assert found.slots == 1


def test_an_engine_that_dies_on_the_way_is_one_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UpstreamUnavailable):
        examined(
            engine(1, token_ids=False), fault=Fault("reset", times=None, path="/v1/completions"), continuation="off"
        )
    assert not [record for record in caplog.records if record.exc_info]


@asynccontextmanager
async def listening(answer: Callable[[web.BaseRequest], web.Response]) -> AsyncIterator[str]:
    """Something that listens; its address."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return answer(request)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


LISTED = {"data": [{"id": "m"}]}


def saying(document: Any, status: int = 200) -> Callable[[web.BaseRequest], web.Response]:
    """Models are listed; everything else is answered with this."""
    return lambda asked: (
        web.json_response(LISTED) if asked.path == "/v1/models" else web.json_response(document, status=status)
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda asked: web.Response(text="<html>It works!</html>", content_type="text/html"), "lists no models"),
        (lambda asked: web.json_response([1, 2]), "lists no models"),
        (lambda asked: web.Response(status=404), "OpenAI-compatible server, and the address before its /v1?"),
        (lambda asked: web.Response(status=401), "it wants a key: --api-key-env NAME"),
        (saying({"status": "fine"}), "(garbage)"),
        (saying({"choices": [{"message": None}], "usage": None}), "(garbage)"),
        (saying({"choices": "?"}), "(garbage)"),
        (saying({"detail": "Not Found"}, 404), "NOTHING TO ORDER HERE"),
    ],
)
def test_what_is_no_engine_is_told_plainly_and_gets_no_yaml(
    answer: Callable[[web.BaseRequest], web.Response], said: str
) -> None:
    async def examine() -> tuple[list[doctor_report.Findings], list[str]]:
        async with listening(answer) as url:
            upstream = Upstream.model_validate({"url": url, "slots": 1})
            return await doctor.examine_all([upstream], None, say=lambda what: None)

    found, failed = asyncio.run(examine())
    assert said in "\n".join([*failed, *(line for one in found for line in doctor_report.report(one))])
    assert failed or all(one.wrong for one in found)
    assert doctor_report.snippet(found) == ""


def test_an_engine_that_serves_chats_alone_is_asked_by_chats() -> None:
    refusing = Fault("status", status=404, times=None, path="/v1/completions")
    found = examined(engine(3, token_ids=False, prompt_tokens_details=True), fault=refusing, continuation="off")
    assert found.slots == 3
    assert found.cache.startswith("yes")
    assert "/v1/completions is answered 404: it was asked by chats alone." in found.notes
    assert "slots: 3" in doctor_report.snippet([found])


def test_one_engine_or_several_behind_one_address() -> None:
    telling = engine(2, prompt_tokens_details=True)
    assert examined(telling).engines == "one, as far as can be seen"
    several = examined(telling, telling)
    assert several.engines.startswith("SEVERAL, it seems")
    assert "Name the engines themselves" in "\n".join(doctor_report.report(several))
    assert examined(engine(1)).engines.startswith("not known: it does not tell")
    ranks = examined(engine(6, engines=2))
    assert ranks.engines == "2: data-parallel ranks"
    assert ranks.slots == 6
    made = from_mapping(yaml.safe_load(doctor_report.snippet([ranks])))
    assert [(u.slots, u.data_parallel_rank) for u in made.upstreams] == [(3, 0), (3, 1)], "three for each, not six"


def test_the_yaml_keeps_what_a_person_has_set() -> None:
    """Of a configuration with ranks each is looked at by itself; all of them have one address."""
    given = {"url": "http://a:1", "slots": 9, "api_key_env": "KEY", "models": ["m"], "timeouts": {"connect": 1}}
    for more in ({"name": "one"}, {"data_parallel_size": 2}):
        before = from_mapping({"upstreams": [{**given, **more}]}).upstreams
        found = [doctor_report.Findings(u.url, tried=4, slots=4, kept=doctor.kept_of(u)) for u in before]
        made = from_mapping(yaml.safe_load(doctor_report.snippet(found))).upstreams
        assert made == tuple(u.model_copy(update={"slots": 4}) for u in before)
    plain = from_mapping({"upstreams": [{"url": "http://a:1", "slots": 9, "api_key_env": None}]}).upstreams[0]
    assert doctor.kept_of(plain) == {}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"text": "a", "token_ids": 5, "message": {"content": "a"}}]},
        {
            "choices": [{"text": "a", "message": {"content": "a"}}],
            "usage": {"prompt_tokens": "?", "prompt_tokens_details": {"cached_tokens": "5"}},
        },
    ],
)
@pytest.mark.parametrize("buffered", [False, True])
def test_an_engine_that_says_odd_things_of_its_answers_is_still_examined(
    answer: dict[str, Any], buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_MOST", 2)

    async def say(request: web.BaseRequest) -> web.StreamResponse:
        kept: list[bytes] = []
        body = await request.read()
        if request.path == "/v1/models":
            return web.json_response(LISTED)
        if not request.path.startswith("/v1/"):
            return web.Response(status=404)
        if not orjson.loads(body).get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (orjson.dumps(answer), orjson.dumps(answer), b"[DONE]"):
            kept.append(b"data: %b\n\n" % event)
            if not buffered or event == b"[DONE]":
                await asyncio.sleep(0.01)
                await response.write(b"".join(kept))
                kept.clear()
        return response

    async def examine() -> tuple[list[doctor_report.Findings], list[str]]:
        async with TestServer(say) as server:
            upstream = Upstream.model_validate({"url": str(server.make_url("")).rstrip("/"), "slots": 1})
            return await doctor.examine_all([upstream], None, say=lambda what: None)

    found, failed = asyncio.run(examine())
    assert not failed
    assert found[0].tried
    assert any("keeps streams back" in note for note in found[0].notes) == buffered
    assert from_mapping(yaml.safe_load(doctor_report.snippet(found))).upstreams[0].slots >= 1


def test_slots_that_the_engine_has_not_are_called_wrong() -> None:
    found = examined(engine(2, token_ids=False), slots=8)
    assert found.slots == 2
    assert found.seam is None
    told = "\n".join(doctor_report.report(found))
    assert "WRONG: slots is 8, the engine runs 2" in told
    assert "one call per request" in told


def page(waits: float, lengths: dict[str, int]) -> str:
    count = max(lengths.values())
    rows = [
        f'elis_queue_wait_seconds_count{{model="m"}} {count}',
        f'elis_queue_wait_seconds_sum{{model="m"}} {waits * count}',
        f'elis_jct_seconds_count{{model="m"}} {count}',
        f'elis_jct_seconds_sum{{model="m"}} {10.0 * count}',
        *(f'elis_answer_tokens_bucket{{model="m",le="{edge}"}} {n}' for edge, n in lengths.items()),
    ]
    return "\n".join(rows)


def load(text: str) -> doctor_report.Load | None:
    return doctor_report.load_of(
        text, "the gateway", wait="elis_queue_wait_seconds", time="elis_jct_seconds", length="elis_answer_tokens"
    )


VARIED = {"10.0": 200, "100.0": 500, "500.0": 900, "+Inf": 1000}
ALIKE = {"100.0": 0, "105.0": 1000, "+Inf": 1000}


@pytest.mark.parametrize(
    ("text", "said", "unsaid"),
    [
        (page(5.0, VARIED), "50%", "CANNOT"),
        (page(0.01, VARIED), "ORDER CANNOT HELP NOW", "equally long"),
        (page(5.0, ALIKE), "ORDER CANNOT HELP: answers are all equally long", "NOW"),
    ],
)
def test_it_says_plainly_when_order_cannot_help(text: str, said: str, unsaid: str) -> None:
    told = "\n".join(doctor_report.report(doctor_report.Findings("http://x", tried=1, load=load(text))))
    assert said in told
    assert unsaid not in told


def test_figures_that_are_none_say_nothing() -> None:
    odd = 'elis_queue_wait_seconds_count{model="b"} NaN\nelis_jct_seconds_sum{model="b"} many\n'
    odd += 'elis_answer_tokens_bucket{model="b",le="few"} +Inf\n'
    assert load(odd) is None
    assert load(odd + page(5.0, VARIED)) == load(page(5.0, VARIED))


def test_a_few_requests_say_nothing() -> None:
    assert load(page(5.0, {"10.0": 3, "+Inf": 5})) is None


def test_the_command_by_url_and_by_file(tmp_path: Path) -> None:
    import threading

    started = threading.Event()
    ended = threading.Event()
    urls: list[str] = []

    def serve() -> None:
        async def run() -> None:
            async with SimServer(paced(400, slots=1)) as server:
                urls.append(server.url)
                started.set()
                await asyncio.to_thread(ended.wait)

        asyncio.run(run())

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(30)
    try:
        done = CliRunner().invoke(cli, ["doctor", urls[0]])
        assert done.exit_code == 0, done.output
        assert f"url: {urls[0]}" in done.output
        assert "slots: 1" in done.output
        file = tmp_path / "gateway.yaml"
        file.write_text(f"admin: {{port: 9}}\nupstreams: [{{url: '{urls[0]}', slots: 4}}]\n")
        done = CliRunner().invoke(cli, ["doctor", str(file)])
        assert done.exit_code == 1, "something is wrong with it"
        assert "WRONG: slots is 4, the engine runs 1" in done.output
    finally:
        ended.set()
        thread.join()
    done = CliRunner().invoke(cli, ["doctor", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "connect" in done.output.lower()

"""Keys, what each may do and how much of it, both listeners' TLS; who the client is stays between it and us."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from click.testing import CliRunner

from elis_gateway.access import Door, hashed, new_key
from elis_gateway.cli import cli
from elis_gateway.config import ApiKey, Limits, from_mapping
from elis_gateway.errors import ClientError, Overloaded
from elis_gateway.sim.server import ServerConfig
from elis_gateway.tasks import spawn
from tests.gateway.world import AT_ONCE, CHAT, COMPLETIONS, World, paced, read_until, until, world

BODY: dict[str, Any] = {"model": "sim", "prompt": "a", "max_tokens": 5, "ignore_eos": True}
LONG: dict[str, Any] = {**BODY, "max_tokens": 1000, "stream": True}
KEY, OTHER, ADMIN = new_key(), new_key(), new_key()


def auth(**more: Any) -> dict[str, Any]:
    """A section with two keys; ``more`` is the first one's."""
    return {"keys": [{"name": "team-a", "hash": hashed(KEY), **more}, {"name": "team-b", "hash": hashed(OTHER)}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def status(w: World, path: str = COMPLETIONS, body: Any = BODY, **headers: str) -> tuple[int, str, str | None]:
    """Status, error code and Retry-After of an answer."""
    async with w.post(path, body, **headers) as response:
        data = await response.read()
        code = "" if response.status == 200 else orjson.loads(data)["error"]["code"]
        return response.status, code, response.headers.get("Retry-After")


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": "Bearer "}, bearer("wrong"), bearer(KEY[:-1]), bearer(KEY + "x"), {"api-key": "wrong"},
        {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}, bearer(hashed(KEY)),
    ],
)  # fmt: skip
async def test_without_a_known_key_nothing_is_let_in(headers: dict[str, str]) -> None:
    async with world(auth=auth()) as w:
        for path in (COMPLETIONS, CHAT, "/v1/embeddings"):
            assert (await status(w, path, **headers))[:2] == (401, "invalid_api_key")
        async with w.session.get(w.url + "/v1/models", headers=headers) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert orjson.loads(await response.read())["error"]["type"] == "authentication_error"
        for path in ("/health", "/ready"):
            async with w.session.get(w.url + path) as response:
                assert response.status == 200
        assert not list(w.engine.log)


@pytest.mark.parametrize("headers", [bearer(KEY), {"Authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}])
async def test_a_known_key_is_let_in_however_it_is_sent(headers: dict[str, str]) -> None:
    async with world(auth=auth()) as w:
        await w.check(COMPLETIONS, BODY, **headers)


async def test_the_client_s_key_stays_here_and_the_engine_s_there() -> None:
    config = ServerConfig(**{**AT_ONCE.__dict__, "api_key": "the-engine's"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KEY", "the-engine's")
        async with world(config, auth=auth(), upstream={"api_key_env": "ENGINE_KEY"}) as w:
            await w.check(COMPLETIONS, BODY, **bearer(KEY))
            async with w.session.get(w.admin + "/admin/keys") as response:
                shown = await response.text()
            async with w.session.get(w.admin + "/admin/upstreams") as response:
                shown += await response.text()
            assert KEY not in shown
            assert hashed(KEY) not in shown
            assert "the-engine's" not in shown


async def test_credentials_go_on_where_they_are_wanted() -> None:
    config = ServerConfig(**{**AT_ONCE.__dict__, "api_key": "the-client's"})
    async with world(config, upstream={"forward_credentials": True, "models": ["sim"], "continuation": "ids"}) as w:
        object.__setattr__(w.engine.config, "api_key", None)
        await until(lambda: bool(w.gateway.fleet.models))
        object.__setattr__(w.engine.config, "api_key", "the-client's")
        await w.check(COMPLETIONS, BODY, **bearer("the-client's"))
        async with w.post(COMPLETIONS, BODY, **bearer("somebody's")) as response:
            assert response.status == 401


async def test_a_key_s_models() -> None:
    config = ServerConfig(**{**AT_ONCE.__dict__, "models": ("sim", "other")})
    async with world(config, auth=auth(models=["nick"]), models={"nick": "sim"}) as w:
        mine = bearer(KEY)
        assert (await status(w, body={**BODY, "model": "nick"}, **mine))[0] == 200
        assert (await status(w, body={**BODY, "model": ""}, **mine))[0] == 200
        assert (await status(w, body={**BODY, "model": "other"}, **mine))[:2] == (404, "model_not_found")
        document = {"Content-Type": "application/json", **mine}
        assert (await status(w, "/v1/embeddings", {"model": "other"}, **document))[:2] == (404, "model_not_found")
        assert (await status(w, "/v1/embeddings", b'{"input": 1}', **mine))[:2] == (403, "insufficient_permissions")
        async with w.session.get(w.url + "/v1/models", headers=mine) as response:
            assert [m["id"] for m in orjson.loads(await response.read())["data"]] == ["nick"]
        for model, wanted in (("nick", 200), ("other", 404)):
            async with w.session.get(f"{w.url}/v1/models/{model}", headers=mine) as response:
                assert response.status == wanted
        assert (await status(w, body={**BODY, "model": "other"}, **bearer(OTHER)))[0] == 200


async def test_a_key_s_class() -> None:
    classes = {"fast": 0, "default": 1, "batch": 2}
    async with world(scheduler={"classes": classes}, auth=auth(max_class="batch")) as w:
        seen = w.gateway.journal
        assert (await status(w, **bearer(KEY)))[0] == 200
        assert (await status(w, **bearer(KEY), **{"X-Elis-Class": "fast"}))[:2] == (403, "insufficient_permissions")
        assert (await status(w, **bearer(OTHER), **{"X-Elis-Class": "fast"}))[0] == 200
        await until(lambda: len(seen.recent(9)) == 2)
        assert sorted(job["class"] for job in seen.recent(9)) == ["batch", "fast"]


async def test_requests_per_minute() -> None:
    async with world(auth=auth(requests_per_minute=2)) as w:
        answers = [await status(w, **bearer(KEY)) for _ in range(3)]
        assert [answer[0] for answer in answers] == [200, 200, 429]
        assert answers[2][1] == "rate_limit_exceeded"
        assert 25 <= int(answers[2][2] or 0) <= 30
        assert (await status(w, "/v1/embeddings", {"model": "sim"}, **bearer(KEY)))[0] == 429
        assert (await status(w, **bearer(OTHER)))[0] == 200


async def test_tokens_per_minute_count_the_answer_when_it_is_over() -> None:
    async with world(limits={"per_key": {"tokens_per_minute": 100}}, auth=auth()) as w:
        assert (await status(w, body={**BODY, "max_tokens": 150}, **bearer(KEY)))[0] == 200
        await until(lambda: len(w.gateway.journal.recent(9)) == 1)
        found = await status(w, **bearer(KEY))
        assert found[:2] == (429, "rate_limit_exceeded")
        assert int(found[2] or 0) > 30
        assert (await status(w, **bearer(OTHER)))[0] == 200


async def test_requests_at_once_per_key_and_per_class() -> None:
    async with world(paced(100), auth=auth(concurrent=1), limits={"classes": {"default": 2}}) as w:
        async with w.post(COMPLETIONS, LONG, **bearer(KEY)) as first:
            await read_until(first, 1)
            assert (await status(w, **bearer(KEY)))[:2] == (429, "rate_limit_exceeded")
            async with w.post(COMPLETIONS, LONG, **bearer(OTHER)) as second:
                await read_until(second, 1)
                found = await status(w, **bearer(OTHER))
                assert found[:2] == (429, "overloaded")
                assert int(found[2] or 0) >= 1
                second.close()
            first.close()
        await until(lambda: not w.gateway.flights)
        await until(lambda: all(key["live"] == 0 for key in w.gateway.client_keys()))
        assert (await status(w, **bearer(KEY)))[0] == 200


async def test_several_choices_count_each_and_are_let_in_together_or_not_at_all() -> None:
    """Told when to come back, a client must find room then: what was refused has used up nothing."""
    many = {**BODY, "n": 3}
    async with world(auth=auth(requests_per_minute=4)) as w:
        assert (await status(w, **bearer(KEY)))[0] == 200
        assert (await status(w, body={**BODY, "n": 4}, **bearer(KEY)))[1] == "rate_limit_exceeded"
        assert (await status(w, body=many, **bearer(KEY)))[0] == 200
        used = next(k for k in w.gateway.client_keys() if k["name"] == "team-a")
        assert (used["requests"], used["live"], used["refused"]) == (4, 0, 1)


async def test_more_choices_than_are_let_in_at_once_wait_until_nothing_else_is_under_way() -> None:
    limits = {"classes": {"default": 2}}
    many = {**BODY, "n": 3}
    for sections in ({"auth": auth(concurrent=2)}, {"auth": auth(), "limits": limits}):
        async with world(paced(500), **sections) as w:
            async with w.post(COMPLETIONS, LONG, **bearer(KEY)) as response:
                await read_until(response, 1)
                assert (await status(w, body=many, **bearer(KEY)))[0] == 429
            await until(lambda w=w: not w.gateway.flights)
            assert (await status(w, body=many, **bearer(KEY)))[0] == 200
            assert (w.gateway.door._bytes, w.gateway.door._inside) == (0, {})
            assert set(w.gateway.door._classes.values()) == {0}


async def test_fair_shares_between_keys() -> None:
    """One key floods, another comes with a little: it is served in the round that runs, not behind the flood."""
    scheduler = {"policy": "fcfs", "fair": True, "fair_round": 100}
    finished: list[str] = []
    async with world(paced(500, slots=1), slots=1, scheduler=scheduler, auth=auth()) as w:

        async def ask(name: str, key: str) -> None:
            await w.check(COMPLETIONS, {**BODY, "max_tokens": 60}, **bearer(key))
            finished.append(name)

        flood = [spawn(ask("flood", KEY), name="flood") for _ in range(12)]
        await until(lambda: len(w.gateway.flights) == 12)
        late = [spawn(ask("late", OTHER), name="late") for _ in range(2)]
        await asyncio.gather(*flood, *late)
        assert "late" in finished[:3]
        assert finished.count("flood") == 12
        assert finished.index("late") < 3
        assert max(n for n, name in enumerate(finished) if name == "late") <= 6


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.5), (3.0, 0.75)])
def test_shares_follow_the_weights(weight: float, expected: float) -> None:
    """Two keys with endless work: of the jobs served first, each has its share."""
    keys = [
        ApiKey(name="a", hash=hashed(KEY), weight=weight),
        ApiKey(name="b", hash=hashed(OTHER)),
    ]
    door = Door(keys, Limits(), {"default": 0}, lambda: 0.0, lambda model: 1.0, fair_round=100)
    grants = {name: door.who(bearer(key)) for name, key in (("a", KEY), ("b", OTHER))}
    jobs = sorted((door.rank(grants[name], 0), n, name) for n, name in enumerate("ab" * 200))
    served = [name for _, _, name in jobs[:200]]
    assert served.count("a") / 200 == pytest.approx(expected, abs=0.05)


def test_without_fair_sharing_a_rank_is_the_class_s() -> None:
    door = Door([], Limits(), {"default": 0}, lambda: 0.0, lambda model: 1.0)
    assert [door.rank(None, rank) for rank in (0, 3)] == [0, 3]


def test_a_reload_takes_no_allowance_away_and_gives_none() -> None:
    """Somebody may reload every minute; whoever asks more seldom must not wait for it for ever."""
    now = 0.0
    key = ApiKey(name="a", hash=hashed(KEY), requests_per_minute=60)
    door = Door([key], Limits(), {}, lambda: now, lambda model: 1.0)
    grant = door.who(bearer(KEY))
    assert grant is not None
    grant.charge(0, now, 60)
    for now in (20.0, 40.0):  # noqa: B007 the clock
        door.change([key], Limits(), {})
    now = 45.0
    grant.charge(0, now, 45)
    door.change([key.model_copy(update={"requests_per_minute": 6})], Limits(), {})
    with pytest.raises(Overloaded):
        grant.charge(0, now)
    now = 60.0
    grant.charge(0, now)


async def test_keys_of_a_file_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump([{"name": "a", "hash": hashed(KEY), "requests_per_minute": 3}]))
    async with world(auth={"keys_file": str(path)}) as w:
        async with w.session.post(w.admin + "/admin/reload") as response:
            assert orjson.loads(await response.read())["applied"] == []
        for _ in range(2):
            assert (await status(w, **bearer(KEY)))[0] == 200
        assert (await status(w, **bearer(OTHER)))[0] == 401
        for text in (
            "",
            "[]",
            "- {name: a}",
            "[",
            "[" * 5000,
            "a: 1",
            f"- {{name: a, hash: '{hashed(KEY)}', max_class: none}}",
        ):
            path.write_text(text)
            async with w.session.post(w.admin + "/admin/reload") as response:
                assert response.status == 400
                assert "keys_file" in orjson.loads(await response.read())["error"]
        both = [{"name": "a", "hash": hashed(KEY), "requests_per_minute": 3}, {"name": "b", "hash": hashed(OTHER)}]
        path.write_text(yaml.safe_dump(both))
        async with w.session.post(w.admin + "/admin/reload") as response:
            assert orjson.loads(await response.read())["applied"] == ["auth and limits"]
        assert [(await status(w, **bearer(KEY)))[0] for _ in range(2)] == [200, 429]  # what was used stays used
        assert (await status(w, **bearer(OTHER)))[0] == 200


async def test_a_key_that_is_gone_finishes_what_it_has_under_way(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump([{"name": "a", "hash": hashed(KEY)}]))
    async with world(paced(500), auth={"keys_file": str(path)}) as w:
        async with w.post(COMPLETIONS, {**LONG, "max_tokens": 100}, **bearer(KEY)) as response:
            await read_until(response, 1)
            path.write_text(yaml.safe_dump([{"name": "b", "hash": hashed(OTHER)}]))
            async with w.session.post(w.admin + "/admin/reload") as reloaded:
                assert reloaded.status == 200
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
        assert (await status(w, **bearer(KEY)))[0] == 401


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({}, 401),
        (bearer(KEY), 401),
        (bearer(ADMIN), 200),
        ({"Authorization": "Basic " + b64encode(f"me:{ADMIN}".encode()).decode()}, 200),
        ({"Authorization": "Basic " + b64encode(b"me:no").decode()}, 401),
        ({"Authorization": "Basic %%%"}, 401),
        ({**bearer(ADMIN), "Origin": "https://evil.example"}, 403),
    ],
)
async def test_the_admin_listener_s_own_key(headers: dict[str, str], wanted: int) -> None:
    async with world(admin={"port": 0, "key_hash": hashed(ADMIN)}) as w:
        for path in ("/metrics", "/admin/jobs", "/admin/upstreams"):
            async with w.session.get(w.admin + path, headers=headers) as response:
                assert response.status == wanted


async def test_pages_of_others_do_not_control_an_admin_port_without_a_key() -> None:
    async with world() as w:
        port = w.gateway.admin_port
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"},
        ):
            async with w.session.post(w.admin + "/admin/reload", headers=headers) as response:
                assert response.status == 403
        async with w.session.post(w.admin + "/admin/reload", headers={"Origin": w.admin}) as response:
            assert response.status == 200


async def test_cross_origin_requests_only_from_where_they_are_allowed() -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    async with world() as w, w.session.options(w.url + CHAT, headers=asked) as response:
        assert response.status == 405
        assert "Access-Control-Allow-Origin" not in response.headers
    async with world(server={"cors_origins": ["https://chat.example"]}, auth=auth()) as w:
        async with w.session.options(w.url + CHAT, headers=asked) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "https://chat.example")
        async with w.session.options(w.url + CHAT, headers={**asked, "Origin": "https://x"}) as response:
            assert response.status == 403
        for body in (BODY, {**BODY, "stream": True}, {**BODY, "model": "none"}):
            async with w.post(COMPLETIONS, body, Origin="https://chat.example", **bearer(KEY)) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        async with w.post(COMPLETIONS, BODY, Origin="https://chat.example") as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, "https://chat.example")
    tight = {"cors_origins": ["https://chat.example"], "max_body": 100}
    large = {**BODY, "prompt": "x" * 200}
    async with world(server=tight) as w, w.post(COMPLETIONS, large, Origin="https://chat.example") as response:
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (413, "https://chat.example")


async def test_what_administers_an_engine_is_not_relayed_unless_named() -> None:
    async with world() as w:
        assert (await status(w, "/v1/load_lora_adapter", {}))[:2] == (404, "not_found")
    async with world(server={"relay": ["/v1/embeddings"]}) as w:
        assert (await status(w, "/v1/audio", {}))[:2] == (404, "not_found")
        async with w.post("/v1/embeddings", {}) as response:
            assert b"Not Found" in await response.read()  # the engine's own words


def test_the_command_makes_a_key_that_its_lines_let_in() -> None:
    result = CliRunner().invoke(cli, ["key", "team-c"])
    (entry,) = yaml.safe_load(result.stdout)
    made = result.stderr.removeprefix("key: ").strip()
    assert entry == {"name": "team-c", "hash": hashed(made)}
    for name in ("42", "yes", "a: b", "team Ω", "- x"):
        (entry,) = yaml.safe_load(CliRunner().invoke(cli, ["key", "--", name]).stdout)
        assert ApiKey.model_validate(entry).name == name
    again = CliRunner().invoke(cli, ["key", "--existing", "--admin"], input=made + "\n")
    assert yaml.safe_load(again.stdout) == {"admin": {"key_hash": hashed(made)}}
    assert made not in again.output
    assert CliRunner().invoke(cli, ["key", "--existing"], input="secret\n").exit_code == 1


def test_a_key_that_can_be_guessed_is_not_hashed() -> None:
    with pytest.raises(ClientError):
        hashed("password123")


@pytest.mark.parametrize(
    "auth_section",
    [
        {"keys": [{"name": "a", "hash": "sha256:abc"}]},
        {"keys": [{"name": "a", "hash": hashed(KEY)}, {"name": "a", "hash": hashed(OTHER)}]},
        {"keys": [{"name": "a", "hash": hashed(KEY)}, {"name": "b", "hash": hashed(KEY)}]},
        {"keys": [{"name": "a", "hash": hashed(KEY), "max_class": "nobody"}]},
    ],
)
def test_keys_that_make_no_sense_are_refused(auth_section: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"auth|hash|several keys"):
        from_mapping({"upstreams": [{"url": "http://a", "slots": 1}], "auth": auth_section})

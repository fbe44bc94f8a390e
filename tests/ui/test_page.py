"""The page at /ui: what it is fed, what it may do, and in a real browser what it shows."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from elis_gateway.access import hashed
from elis_gateway.live import POLICIES, _percentiles
from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from tests.gateway.world import COMPLETIONS, World, paced, until, world
from tests.ui.browser import CHROMIUM, Page, browser

BODY: dict[str, Any] = {"model": "sim", "prompt": "Tell me", "max_tokens": 120, "ignore_eos": True}
PAGE = (Path(__file__).parents[2] / "elis_gateway" / "ui.html").read_text(encoding="utf-8")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt install chromium)")


@asynccontextmanager
async def busy(**sections: Any) -> AsyncIterator[World]:
    """One upstream of two slots, one job that runs long in each, and three that wait."""
    upstream = {"overcommit": 0}
    # Four minutes: longer than any browser takes to start.
    async with world(paced(8, slots=2), slots=2, upstream=upstream, predictor={"kind": "max_tokens"}, **sections) as w:
        bodies = [{**BODY, "max_tokens": n, "stream": True} for n in (1900, 2000, 500, 300, 400)]
        asking = []
        for number, body in enumerate(bodies):
            asking.append(spawn(w.ask(COMPLETIONS, body), name="ask"))
            await until(lambda sent=number: len(w.gateway.flights) == sent + 1)
        yield w
        for task in asking:
            task.cancel()


async def look(w: World) -> dict[str, Any]:
    async with w.session.get(w.admin + "/admin/live") as response:
        assert response.status == 200
        found: dict[str, Any] = orjson.loads(await response.read())
        return found


async def test_the_present_who_runs_and_who_is_next() -> None:
    async with busy(scheduler={"policy": "sjf"}) as w:
        await until(lambda: all(f.heard for f in w.gateway.flights.values() if f.job and f.job.slices))
        now = await look(w)
        assert (now["waiting"], now["running"], now["slots"]) == (3, 2, 2)
        assert [job["predicted"] for job in now["queue"]] == [300, 400, 500]
        (upstream,) = now["upstreams"]
        assert sorted(run["predicted"] for run in upstream["runs"]) == [1900, 2000]
        assert all(run["tokens"] > 0 and run["started"] for run in upstream["runs"])
        assert now["longest_wait"] >= now["queue"][0]["waited"] >= 0
        assert now["policy"]["kind"] in now["policies"]


async def test_what_has_happened() -> None:
    async with world(predictor={"kind": "max_tokens"}) as w:
        w.engine.faults.add(Fault("end", after=30))
        await w.check(COMPLETIONS, BODY)
        await until(lambda: len(w.gateway.journal.recent(9)) == 1)
        now = await look(w)
        assert [event["what"] for event in now["events"]] == ["completed", "broken"]
        assert now["events"][0]["predicted"] > 0
        assert now["totals"]["tokens"] == 120
        assert now["latency"]["jobs"] == 1
        assert now["latency"]["jct"]["mean"] > 0
        assert now["latency"]["jct"]["p50"] is None, "one sample is no percentile"
        assert now["models"][0]["jobs"] == 1


async def test_a_preemption_is_told_as_it_happens() -> None:
    # With a call in hand the long one may win the race for the slot it has just left, and has to leave it once more.
    upstream = {"overcommit": 0}
    async with world(paced(500, slots=1), slots=1, upstream=upstream, predictor={"kind": "max_tokens"}) as w:
        long = spawn(w.ask(COMPLETIONS, {**BODY, "max_tokens": 800, "stream": True}), name="ask")
        await until(lambda: any(f.answer.attained > 20 for f in w.gateway.flights.values()))
        await w.check(COMPLETIONS, {**BODY, "max_tokens": 5})
        now = await look(w)
        told = [event for event in now["events"] if event["what"] == "preempted"]
        assert len(told) == now["totals"]["preemptions"] == 1
        assert told[0]["tokens"] > 20
        long.cancel()


async def test_a_call_that_is_called_back_before_it_began_is_no_preemption() -> None:
    """With one in hand, a better job takes its place in the engine's queue: the page counts as the metrics do."""
    async with world(paced(600, slots=1), slots=1, predictor={"kind": "max_tokens"}) as w:
        asked = []
        for tokens in (600, 1500, 700):
            asked.append(spawn(w.ask(COMPLETIONS, {**BODY, "max_tokens": tokens, "stream": True}), name="ask"))
            await until(lambda: len(w.gateway.flights) == len(asked))
            await until(lambda: any(f.answer.attained > 5 for f in w.gateway.flights.values()))
        await asyncio.gather(*asked)
        async with w.session.get(w.admin + "/metrics") as response:
            page = await response.text()
        now = await look(w)
    ended = sum(map(float, re.findall(r'^elis_slices_total\{.*end="preempted".*\} (\S+)$', page, re.MULTILINE)))
    counted = sum(map(float, re.findall(r"^elis_preemptions_total\{.*\} (\S+)$", page, re.MULTILINE)))
    assert ended > counted, "one was called back"
    assert now["totals"]["preemptions"] == counted
    assert len([event for event in now["events"] if event["what"] == "preempted"]) == counted


def test_percentiles_are_only_shown_with_ten_samples_beyond() -> None:
    assert _percentiles([1.0] * 99)["p90"] is None
    assert _percentiles([float(n) for n in range(100)]) == {"mean": 49.5, "p50": 50.0, "p90": 90.0, "p99": None}
    assert _percentiles([float(n) for n in range(1000)])["p99"] == 990.0


async def test_another_sites_page_changes_nothing() -> None:
    async with world() as w:
        for origin, status in (("https://elsewhere.example", 403), ("null", 403), (w.admin, 200)):
            answer = w.session.put(w.admin + "/admin/policy", json="fcfs", headers={"Origin": origin})
            async with answer as response:
                assert response.status == status
        async with w.session.post(w.admin + "/admin/reload", headers={"Origin": "http://elsewhere"}) as response:
            assert response.status == 403


async def test_the_page_is_whole_and_may_do_nothing_else() -> None:
    async with world() as w, w.session.get(w.admin + "/") as response:
        assert response.url.path == "/ui"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert await response.text() == PAGE
    assert "//" not in PAGE.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    assert "innerHTML" not in PAGE


@needs_browser
async def test_in_a_browser(tmp_path: Path) -> None:
    async with busy() as w, browser() as page:
        await page.open(w.admin + "/ui")
        await page.until("document.querySelector('#state')?.textContent.startsWith('live')")
        await page.until("document.querySelectorAll('#queue tr').length === 3")
        assert await page.run("document.querySelectorAll('.slot:not(.empty)').length") == 2
        assert await page.run("[...document.querySelectorAll('#switch button')].map(b => b.dataset.kind)") == [
            *POLICIES
        ]
        await _switched(page, w)
        for width, phone in ((1360, False), (390, True)):
            shot = tmp_path / f"{width}.png"
            await page.look(shot, width=width, height=900, dark=phone, phone=phone)
            assert await page.run("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
            assert struct.unpack(">I", shot.read_bytes()[16:20])[0] == width * (2 if phone else 1)
        background = "getComputedStyle(document.body).backgroundColor"
        dark = await page.run(background)
        await page.look(width=390, height=900, dark=False, phone=True)
        assert await page.run(background) != dark
        assert page.said == []
        await w.gateway.stop(0.0)
        await page.until("document.querySelector('main').classList.contains('stale')")


async def _switched(page: Page, w: World) -> None:
    await page.run("document.querySelector('#switch [data-kind=fcfs]').click()")
    await until(lambda: w.gateway.policy()["kind"] == "fcfs")
    await page.until("document.querySelector('#switch [data-kind=fcfs]').getAttribute('aria-pressed') === 'true'")


@needs_browser
async def test_the_page_asks_for_the_admin_key_and_brings_it() -> None:
    async with busy(admin={"port": 0, "key_hash": hashed("open-sesame-open-sesame")}) as w, browser() as page:
        for path, status in (("/ui", 200), ("/admin/live", 401), ("/metrics", 401)):
            async with w.session.get(w.admin + path) as response:
                assert response.status == status
        await page.open(w.admin + "/ui")
        await page.until("document.querySelector('dialog')?.open")
        for key in ("wrong", "open-sesame-open-sesame"):
            await page.run(f"document.querySelector('#key').value = {key!r}")
            await page.run("document.querySelector('#ask-form button').click()")
            if key == "wrong":
                await page.until("document.querySelector('#ask-text').textContent.includes('not the right one')")
        await page.until("document.querySelectorAll('#queue tr').length === 3")
        await _switched(page, w)


@needs_browser
async def test_what_a_client_named_is_shown_as_text() -> None:
    """A class, a model, a job's cause: whatever is in them, the page runs none of it."""
    evil = "<img src=x onerror=alert(1)>"
    sections: dict[str, Any] = {"scheduler": {"classes": {"default": 0, evil: 1}, "default_class": evil}}
    async with busy(**sections) as w, browser() as page:
        await page.open(w.admin + "/ui")
        await page.until("document.querySelectorAll('#queue tr').length === 3")
        assert evil in await page.run("document.querySelector('#queue').textContent")
        assert await page.run("document.images.length") == 0
        assert page.said == []

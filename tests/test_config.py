"""The configuration: what loads, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from elis_gateway import config
from elis_gateway.config import Config, from_mapping
from elis_gateway.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*ROOT.joinpath("config").glob("*.yaml"), *ROOT.joinpath("loadtest", "data").glob("*.yaml")])
UPSTREAM = {"url": "http://engine:8000/v1", "slots": 4}


def conf(**sections: Any) -> Config:
    return from_mapping({"upstreams": [UPSTREAM], **sections})


def complaint(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        conf(**sections)
    return str(caught.value)


def test_one_upstream_is_enough() -> None:
    (upstream,) = conf().upstreams
    assert (upstream.name, upstream.url, upstream.slots) == ("engine:8000", "http://engine:8000", 4)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"scheduler": {"windw": 3}}, "scheduler.windw: unknown key; did you mean 'window'?"),
        ({"sheduler": {}}, "sheduler: unknown key; did you mean 'scheduler'?"),
        (
            {"scheduler": {"policy": {"kind": "fcfs", "order": "mean"}}},
            "scheduler.policy.order: belongs to kind sjf or isrtf, not to this one",
        ),
        (
            {"predictor": {"kind": "history", "tokens": 9}},
            "predictor.tokens: belongs to kind constant, not to this one",
        ),
        (
            {"scheduler": {"policy": "isrft"}},
            "scheduler.policy.kind: expected one of fcfs, round_robin, las, sjf, isrtf, or package.module:Class, "
            "got 'isrft'; did you mean 'isrtf'?",
        ),
        (
            {"scheduler": {"aging": {}}},
            "scheduler.aging: expected a key 'kind', one of none, linear, boost",
        ),
        (
            {"scheduler": {"seam_cost": -1}},
            "scheduler.seam_cost: expected 'auto', got -1; or greater than or equal to 0, got -1",
        ),
        (
            {"models": {"a": "b", "b": "a", "c": "real"}},
            "models: expected aliases to name models, not aliases: a -> b, b -> a",
        ),
        (
            {"upstreams": [{"url": "http://me:secret@engine:8000", "slots": 1}]},
            "upstreams[0].url: expected no user or password in the URL; put the key into an environment variable and "
            "name that in api_key_env",
        ),
        (
            {"scheduler": {"fair": True}, "upstreams": [{**UPSTREAM, "overcommit": 2}]},
            "upstreams: engine:8000: expected no overcommit and no engine_priority with scheduler.fair: "
            "an engine's own queue knows no rounds",
        ),
        (
            {"limits": {"classes": {"gold": 1}}},
            "limits.classes: expected classes of scheduler.classes; unknown: gold",
        ),
        ({"scheduler": {"mode": "elast"}}, "scheduler.mode: expected 'fixed' or 'elastic', got 'elast'"),
        ({"scheduler": {"default_class": "x"}}, "scheduler: expected default_class to be one of the classes (default)"),
        ({"server": {"port": 99999}}, "server.port: expected less than or equal to 65535, got 99999"),
        ({"upstreams": []}, "upstreams: expected at least one upstream"),
        ({"upstreams": [{"url": "http://a"}]}, "upstreams[0].slots: required, but not there"),
        (
            {"upstreams": [UPSTREAM, {"url": "engine", "slots": 1}]},
            "upstreams[1].url: expected a URL such as http://127.0.0.1:8000",
        ),
        (
            {"upstreams": [UPSTREAM, UPSTREAM]},
            "upstreams: expected different names; more than one upstream is called engine:8000",
        ),
        (
            {"upstreams": [{**UPSTREAM, "timeouts": {"conect": 1}}]},
            "upstreams[0].timeouts.conect: unknown key; did you mean 'connect'?",
        ),
        ({"predictor": "oracle"}, "predictor.path: required, but not there"),
        ({"scheduler": None}, "scheduler: expected a section, with keys of its own, got None"),
        ({"scheduler": {"window": "fifty"}}, "scheduler.window: expected a whole number, got 'fifty'"),
        ({"upstreams": "http://a"}, "upstreams: expected a list, got 'http://a'"),
        ({"upstreams": ["http://a"]}, "upstreams[0]: expected a section, with keys of its own, got 'http://a'"),
        ({"upstreams": [{"slots": 1}]}, "upstreams[0].url: required, but not there"),
        ({"upstreams": [{"url": 8000, "slots": 1}]}, "upstreams[0].url: expected text, got 8000"),
        (
            {"upstreams": [{"url": "http://a:80000", "slots": 1}]},
            "upstreams[0].url: expected a port from 1 to 65535, as in http://127.0.0.1:8000",
        ),
        (
            {"upstreams": [{"url": "http://a:eighty", "slots": 1}]},
            "upstreams[0].url: expected a port from 1 to 65535, as in http://127.0.0.1:8000",
        ),
        (
            {"upstreams": [{"url": "http://my engine", "slots": 1}]},
            "upstreams[0].url: expected a URL such as http://127.0.0.1:8000",
        ),
        (
            {"upstreams": [{**UPSTREAM, "health": {"path": "health"}}]},
            "upstreams[0].health.path: expected to match pattern '^/', got 'health'",
        ),
        ({"traffic_log": {"zzz": 1}}, "traffic_log.zzz: unknown key; expected one of path, max_bytes, keep"),
        (
            {"scheduler": {"classes": {"default": 0, "batch": 2_000_000}}},
            "scheduler.classes.batch: expected less than or equal to 100000, got 2000000",
        ),
        ({"traffic_log": {"path": False}}, "traffic_log.path: expected a path, got False"),
        ({"scheduler": {"aging": 3}}, "scheduler.aging: expected a section, with keys of its own, got 3"),
        ({"scheduler": {"tail": True}}, "scheduler: expected tail to be a number, got true"),
        ({"upstreams": [{**UPSTREAM, "slots": True}]}, "upstreams[0]: expected slots to be a number, got true"),
    ],
)
def test_a_mistake_is_named_by_place_and_expectation(sections: dict[str, Any], words: str) -> None:
    assert complaint(**sections) == words


def test_every_mistake_has_its_line() -> None:
    assert complaint(server={"prt": 1}, logging={"level": "loud"}).splitlines() == [
        "server.prt: unknown key; did you mean 'port'?",
        "logging.level: expected 'debug', 'info', 'warning' or 'error', got 'loud'",
    ]


def test_a_class_of_ones_own() -> None:
    policy = conf(scheduler={"policy": {"kind": "mine.policy:Longest", "options": {"bias": 2}}}).scheduler.policy
    assert policy.model_dump() == {"kind": "mine.policy:Longest", "options": {"bias": 2}}


def test_the_environment_overrides() -> None:
    changed = from_mapping(
        {"upstreams": [UPSTREAM], "scheduler": {"policy": "isrtf"}},
        {
            "ELIS__SCHEDULER__WINDOW": "25",
            "ELIS__SCHEDULER__POLICY__ORDER": "mean",
            "ELIS__UPSTREAMS__0__SLOTS": "8",
            "ELIS__UPSTREAMS__1": "{url: 'http://b', slots: 1, models: [m]}",
            "ELIS__TRAFFIC_LOG__PATH": "null",
            "ELISABETH": "unrelated",
        },
    )
    assert changed.scheduler.window == 25
    assert changed.scheduler.policy.model_dump() == {"kind": "isrtf", "order": "mean"}
    assert [(u.name, u.slots, u.models) for u in changed.upstreams] == [("engine:8000", 8, ()), ("b", 1, ("m",))]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ELIS__SCHEDULER__WINDW", "3", "scheduler.windw: unknown key"),
        ("ELIS__UPSTREAMS__7__SLOTS", "3", "ELIS__UPSTREAMS__7__SLOTS: expected an index of the list, 0 to 1, got '7'"),
        ("ELIS__SERVER__PORT__X", "3", "ELIS__SERVER__PORT__X: 'x' is set on a value that has no keys"),
        ("ELIS__SERVER", "{", "ELIS__SERVER: not valid YAML"),
        ("ELIS__SERVER", "2024-13-45", "ELIS__SERVER: not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"ELIS|unknown") as caught:
        from_mapping({"upstreams": [UPSTREAM], "server": {"port": 1}}, {name: value})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "text",
    ["- a\n", "a: [\n", "\0", "a: 2024-13-45", "a: !!timestamp x", "a: !!bool x", "a: !!int ''", "[" * 5000],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        config.load(path, {})


def test_a_key_that_comes_twice_is_not_half_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("upstreams: [{url: 'http://a', slots: 1}]\nserver: {port: 1}\nserver: {host: b}\n")
    with pytest.raises(ConfigError, match=r"the key 'server' again\s+in .*, line 3"):
        config.load(path, {})
    path.write_text("x: &x {slots: 1}\nupstreams: [{<<: *x, url: 'http://a'}, {<<: *x, url: 'http://b', slots: 2}]\n")
    with pytest.raises(ConfigError, match=r"^x: unknown key"):
        config.load(path, {})


def test_what_is_to_be_read_and_is_not_there_is_warned_of(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    wrong = conf(
        server={"tls": {"cert": nowhere}},
        upstreams=[{**UPSTREAM, "tls": {"ca": nowhere}}],
        auth={"keys_file": nowhere},
        predictor={"kind": "oracle", "path": nowhere},
        traffic_log={"path": nowhere},
        scheduler={"policy": "nowhere.at_all:Policy"},
    )
    words = "serve will refuse to start"
    assert config.warnings(wrong, {}) == [
        *(
            f"{place}: there is no {nowhere} here; {words}"
            for place in ("server.tls.cert", "upstreams[0].tls.ca", "predictor.path", "auth.keys_file")
        ),
        f"scheduler.policy.kind: no module 'nowhere' can be found here; {words}",
    ]
    fine = conf(predictor={"kind": "history", "path": nowhere}, scheduler={"policy": "pathlib:Path"})
    assert config.warnings(fine, {}) == []
    assert config.warnings(conf(predictor={"kind": "bge", "path": "elis-paper", "state": nowhere}), {}) == []
    assert len(config.warnings(conf(predictor={"kind": "bge", "path": nowhere}), {})) == 1
    assert config.warnings(conf(predictor={"kind": "bge", "path": "elis-papr"}), {}) == [
        f"predictor.path: there is no elis-papr (shipped: elis-paper, encode-once) here; {words}"
    ]


def test_on_and_off_are_words_without_quotes_too(tmp_path: Path) -> None:
    """YAML reads them as true and false."""
    path = tmp_path / "c.yaml"
    for word in ("on", "off"):
        path.write_text(f"upstreams: [{{url: 'http://a', slots: 1, engine_priority: {word}, continuation: off}}]\n")
        (upstream,) = config.load(path, {}).upstreams
        assert (upstream.engine_priority, upstream.continuation) == (word, "off")
        (upstream,) = config.load(path, {"ELIS__UPSTREAMS__0__ENGINE_PRIORITY": "off"}).upstreams
        assert upstream.engine_priority == "off"
    path.write_text("upstreams: [{url: 'http://a', slots: 1, chat_parser: off, tls: {verify: off}}]\n")
    (upstream,) = config.load(path, {}).upstreams
    assert (upstream.chat_parser, upstream.tls.verify) == (False, False)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "none.yaml", {})


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        conf().server.port = 1


def test_the_effective_configuration_loads_again(tmp_path: Path) -> None:
    once = conf(scheduler={"policy": "sjf", "aging": "linear"}, predictor={"kind": "history", "path": "/tmp/h"})
    path = tmp_path / "again.yaml"
    path.write_text(config.dump(once))
    assert config.load(path, {}) == once


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_what_ships_loads(path: Path) -> None:
    assert config.load(path, {}).upstreams


def test_isrtf_yaml_is_the_method_as_published() -> None:
    shipped = config.load(ROOT / "config" / "isrtf.yaml", {}).scheduler
    assert shipped.policy.model_dump() == {"kind": "isrtf", "order": "mean"}
    assert (shipped.window, shipped.mode, shipped.rescore) == (50, "fixed", "always")
    assert (shipped.aging.kind, shipped.tail, shipped.in_hand) == ("none", None, 0)


def test_one_call_in_hand_unless_it_would_break_the_order() -> None:
    assert config.Scheduler().in_hand == 1
    assert config.Scheduler(overcommit=3).in_hand == 3
    assert config.Scheduler(mode="fixed").in_hand == 0
    assert config.Scheduler(fair=True).in_hand == 0

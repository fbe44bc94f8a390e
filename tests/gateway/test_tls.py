"""Certificates: on both listeners, read again, and opened before anything relies on them."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import yaml
from click.testing import CliRunner

from elis_gateway.cli import cli
from elis_gateway.errors import ConfigError
from tests.gateway.test_access import LONG
from tests.gateway.world import COMPLETIONS, World, paced, read_until, world


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / f"{name}.key",
                "-out", folder / f"{name}.pem",
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    return folder


async def test_tls_on_both_listeners_and_certificates_read_again(certificates: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(name: str) -> ssl.SSLContext:
        cert.write_bytes((certificates / f"{name}.pem").read_bytes())
        key.write_bytes((certificates / f"{name}.key").read_bytes())
        return ssl.create_default_context(cafile=str(certificates / f"{name}.pem"))

    trusted = install("one")
    tls = {"cert": str(cert), "key": str(key)}
    async with world(paced(500), server={"tls": tls}, admin={"port": 0, "tls": tls}) as w:
        public, admin = w.url.replace("http:", "https:"), w.admin.replace("http:", "https:")
        async with w.session.post(public + COMPLETIONS, json={**LONG, "max_tokens": 60}, ssl=trusted) as response:
            data = await read_until(response, 1)
            newer = install("two")
            async with w.session.post(admin + "/admin/reload", ssl=trusted) as reloaded:
                assert orjson.loads(await reloaded.read())["applied"] == ["certificates"]
            data += await response.content.read()
        assert data.endswith(b"data: [DONE]\n\n")
        async with w.session.get(public + "/health", ssl=newer) as response:
            assert response.status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in await reader.read(100)
        writer.close()


async def test_an_authority_that_is_replaced_is_trusted_no_more(certificates: Path, tmp_path: Path) -> None:
    trusted = tmp_path / "clients.pem"
    tls = {"cert": str(certificates / "one.pem"), "key": str(certificates / "one.key"), "client_ca": str(trusted)}

    def client(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(certificates / "one.pem"))
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
        return context

    async def let_in(w: World, context: ssl.SSLContext) -> bool:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(w.url.replace("http:", "https:") + "/health", ssl=context) as response:
                    return response.status == 200
            except (aiohttp.ClientError, OSError):
                return False

    trusted.write_bytes((certificates / "one.pem").read_bytes())
    async with world(server={"tls": tls}) as w:
        old, new = client("one"), client("two")
        assert (await let_in(w, old), await let_in(w, new)) == (True, False)
        trusted.write_bytes((certificates / "two.pem").read_bytes())
        await w.gateway.reload()
        assert (await let_in(w, old), await let_in(w, new)) == (False, True)
        trusted.write_text("nothing that could be read")
        with pytest.raises(ConfigError, match="tls"):
            await w.gateway.reload()
        assert (await let_in(w, old), await let_in(w, new)) == (False, True)


def checked(path: Path, **sections: Any) -> tuple[int, str]:
    """What check-config says of a configuration: exit status, and its errors."""
    path.write_text(yaml.safe_dump({"upstreams": [{"url": "http://a", "slots": 1}], **sections}))
    result = CliRunner().invoke(cli, ["check-config", "-q", str(path)])
    return result.exit_code, result.stderr


def test_check_config_opens_the_certificates_that_are_here(certificates: Path, tmp_path: Path) -> None:
    path, one, two = tmp_path / "c.yaml", str(certificates / "one.pem"), str(certificates / "two.key")
    assert checked(path, server={"tls": {"cert": one, "key": str(certificates / "one.key")}}) == (0, "")
    status, said = checked(path, admin={"tls": {"cert": one, "key": two}})
    assert (status, said.startswith("Error: admin: tls: ")) == (2, True), said
    assert f"{one}, {two}" in said
    upstreams = [{"name": "far", "url": "https://a", "slots": 1, "tls": {"ca": two}}]
    status, said = checked(path, upstreams=upstreams)
    assert (status, said.startswith(f"Error: upstreams: far: tls: {two}: ")) == (2, True), said
    status, said = checked(path, server={"tls": {"cert": "/nowhere.pem", "key": two}})
    assert (status, "there is no /nowhere.pem here" in said) == (0, True), "it may be where the gateway will run"


def test_nobody_is_asked_for_the_passphrase_of_a_key(certificates: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    made = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", certificates / "one.key", "-out", locked]
    subprocess.run(made, check=True, capture_output=True)
    tls = {"cert": str(certificates / "one.pem"), "key": str(locked)}
    status, said = checked(tmp_path / "c.yaml", server={"tls": tls})
    assert (status, f"{locked}: the private key is encrypted" in said) == (2, True), said

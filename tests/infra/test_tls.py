"""Certificates of one's own: what is in them, what never happens to those that are there, what doctor says of them."""

import json
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.checks.certificates import certificates as examined
from infra.checks.check import Context
from infra.config import ConfigError, load
from infra.tls import certificates, embedded, folder
from tests.infra.cli_kit import answer, invoke

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def shaken(server: tuple[Path, Path], trusted: Path, name: str, *, client: tuple[Path, Path] | None = None) -> str:
    """A TLS handshake in memory; the name of whom the server takes the client for."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = ssl.create_default_context(cafile=trusted)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*server)
    if client is not None:
        ours.load_cert_chain(*client)
        theirs.verify_mode = ssl.CERT_REQUIRED
        theirs.load_verify_locations(trusted)
    here = ours.wrap_bio(incoming, outgoing, server_hostname=name)
    there = theirs.wrap_bio(outgoing, incoming, server_side=True)
    sides = [here, there]
    while sides:
        side = sides.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            sides.append(side)
    return str(dict(x[0] for x in (there.getpeercert() or {}).get("subject", ())).get("commonName", ""))


def pair(name: str, at: Path = Path(".rewatch/tls")) -> tuple[Path, Path]:
    return at / f"{name}.pem", at / f"{name}.key"


def test_the_certificates_open_tls_between_servers_and_clients_by_every_name_that_was_given() -> None:
    made = answer("tls", "make", "--host", "nas.lan", "--host", "192.168.1.5")
    assert {Path(one["certificate"]).stem for one in made} == {"ca", *folder.SERVERS, "client"}
    authority = Path(".rewatch/tls/ca.pem")
    for server in folder.SERVERS:
        for name in ("nas.lan", "192.168.1.5", "localhost", "127.0.0.1"):
            shaken(pair(server), authority, name)
    assert shaken(pair("broker"), authority, "nas.lan", client=pair("client")) == "rewatch client"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shaken(pair("gateway"), authority, "elsewhere.lan")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):  # whoever has a client's is no server
        shaken(pair("client"), authority, "nas.lan")
    with pytest.raises(ssl.SSLError, match=r"(?i)purpose|certificate verify failed"):  # nor a server's a client
        shaken(pair("broker"), authority, "nas.lan", client=pair("gateway"))
    folder.make(Path("other"), (), NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(pair("broker"), Path("other/ca.pem"), "localhost")


def test_keys_are_for_their_owner_alone_and_nothing_is_ever_overwritten() -> None:
    answer("tls", "make")
    at = Path(".rewatch/tls")
    assert stat.S_IMODE(at.stat().st_mode) == stat.S_IMODE(at.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(key.stat().st_mode) for key in at.glob("*.key")} == {0o600}
    before = {path: path.read_bytes() for path in at.iterdir()}
    again = invoke("tls", "make")
    assert again.exit_code == 1
    assert "nothing was overwritten" in again.stderr
    assert "rewatch tls renew" in again.stderr
    assert {path: path.read_bytes() for path in at.iterdir()} == before
    for name in (*folder.SERVERS, "client"):  # one that is left is enough
        (at / f"{name}.pem").unlink()
    assert invoke("tls", "make").exit_code == 1


def test_an_authority_that_is_there_signs_and_one_without_its_key_cannot() -> None:
    parts = embedded.prepare(Path(".rewatch"), NOW)  # as a locked broker's first start leaves it
    authority = parts.authority.read_bytes()
    answer("tls", "make")
    assert parts.authority.read_bytes() == authority
    assert certificates.signed_by(pair("gateway")[0].read_bytes(), authority)
    Path("site").mkdir()
    Path("site/ca.pem").write_bytes(authority)
    refused = invoke("tls", "make", "--dir", "site")
    assert refused.exit_code == 1
    assert "ca.key" in refused.stderr
    assert [path.name for path in Path("site").iterdir()] == ["ca.pem"]
    Path("site/ca.key").write_text("torn")
    assert "ca.key" in invoke("tls", "make", "--dir", "site").stderr
    Path("file").write_text("")
    refused = invoke("tls", "make", "--dir", "file/tls")
    assert (refused.exit_code, "--dir" in refused.stderr) == (2, True)


def test_a_name_that_is_none_is_refused_before_anything_is_made() -> None:
    refused = invoke("tls", "make", "--host", "a b")
    assert refused.exit_code == 2
    assert "'a b'" in refused.stderr
    assert not Path(".rewatch/tls").exists()


def test_renewing_keeps_authority_and_hosts_and_leaves_strangers_alone() -> None:
    answer("tls", "make", "--host", "nas.lan")
    at = Path(".rewatch/tls")
    stranger = certificates.issue(certificates.authority("theirs", NOW), "theirs", ("x",), NOW)
    folder.put(at, "upload", stranger)
    before = {path: path.read_bytes() for path in at.iterdir()}
    shown = {one["name"]: one["hosts"] for one in answer("tls", "renew")}
    assert "nas.lan" in shown["rewatch gateway"]
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    names = ("broker", "gateway", "detector", "client")
    assert changed == {f"{name}.{kind}" for name in names for kind in ("pem", "key")}
    shaken(pair("gateway"), at / "ca.pem", "nas.lan")
    assert invoke("tls", "renew", "--dir", "nowhere").exit_code == 1
    assert invoke("tls", "show", "--dir", "nowhere").exit_code == 1


def test_show_names_what_each_is_for_and_when_it_ends() -> None:
    answer("tls", "make", "--host", "nas.lan")
    shown = {Path(one["certificate"]).stem: one for one in answer("tls", "show")}
    assert shown["gateway"]["days_left"] in {certificates.SERVER_DAYS - 1, certificates.SERVER_DAYS}
    assert shown["gateway"]["signed_by"] == shown["ca"]["name"]
    assert shown["client"]["hosts"] == []
    assert "nas.lan" in invoke("tls", "show").stdout
    (Path(".rewatch/tls") / "gateway.pem").write_text("torn")
    assert {one["name"] for one in answer("tls", "show")} >= {None}


async def found(monkeypatch: pytest.MonkeyPatch, **settings: str) -> dict[str, Any]:
    for name, value in settings.items():
        monkeypatch.setenv(f"REWATCH_{name}", value)
    return {check.name: check for check in await examined(Context(load(), {}))}


async def test_doctor_says_which_certificate_ends_within_a_month_and_what_renews_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert await found(monkeypatch) == {}
    at = Path(".rewatch/tls")
    authority = folder.authority_in(at, NOW)

    def put(name: str, left: int) -> None:
        made = NOW - timedelta(days=certificates.SERVER_DAYS - left)
        folder.put(at, name, certificates.issue(authority, name, ("localhost",), made))

    put("gateway", folder.WARN_DAYS + 1)
    assert (await found(monkeypatch))["certificates"].status == "ok"
    put("gateway", folder.WARN_DAYS - 1)
    put("embedded-broker", -1)
    checks = await found(monkeypatch)
    soon, ended = checks["certificate gateway.pem"], checks["certificate embedded-broker.pem"]
    assert (soon.status, ended.status) == ("warning", "failed")
    assert f"ends on {NOW + timedelta(days=folder.WARN_DAYS - 1):%Y-%m-%d}" in soon.found
    assert "rewatch tls renew" in soon.fix
    assert "rewatch up" in ended.fix
    (at / "gateway.key").chmod(0o640)
    (at / "broker.pem").write_text("torn")
    checks = await found(monkeypatch)
    assert checks["key gateway.key"].fix == f"chmod 600 {at}/gateway.key"
    assert checks["certificate broker.pem"].status == "failed"
    # What the way to a broker elsewhere rests on counts too, wherever it lies.
    elsewhere = tmp_path / "elsewhere"
    folder.authority_in(elsewhere, NOW - timedelta(days=certificates.AUTHORITY_DAYS))
    checks = await found(
        monkeypatch,
        KAFKA__BOOTSTRAP_SERVERS="kafka:9092",
        KAFKA__SECURITY_PROTOCOL="SSL",
        KAFKA__SSL_CAFILE=str(elsewhere / "ca.pem"),
    )
    assert checks["certificate ca.pem"].status == "failed"


@pytest.mark.parametrize(
    ("server", "mechanism", "warned"),
    [
        ("kafka:9092", "PLAIN", True),
        ("127.0.0.1:9092,kafka:9092", "PLAIN", True),
        ("127.0.0.1:9092", "PLAIN", False),
        ("[::1]:9092,localhost:1", "PLAIN", False),
        ("kafka:9092", "SCRAM-SHA-256", False),
    ],
)
async def test_doctor_warns_of_a_password_that_crosses_the_network_as_it_is(
    monkeypatch: pytest.MonkeyPatch, server: str, mechanism: str, warned: bool
) -> None:
    checks = await found(
        monkeypatch,
        KAFKA__BOOTSTRAP_SERVERS=server,
        KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        KAFKA__SASL_MECHANISM=mechanism,
        KAFKA__SASL_USERNAME="u",
        KAFKA__SASL_PASSWORD="secret",
    )
    assert ("kafka.sasl_password on its way" in checks) is warned


def test_a_locked_broker_s_clients_are_told_the_way_and_no_other_is_half_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REWATCH_LOCAL__KAFKA_SECURE", "true")
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    kafka = load().kafka
    assert (kafka.security_protocol, kafka.sasl_username) == ("SASL_SSL", "rewatch")
    assert kafka.sasl_password_file == tmp_path / "data/tls/kafka.password"
    assert kafka.ssl_cafile == tmp_path / "data/tls/ca.pem"
    for name, value, words in (
        ("KAFKA__BOOTSTRAP_SERVERS", "kafka:9092", "kafka.bootstrap_servers names another"),
        ("KAFKA__SECURITY_PROTOCOL", "SSL", "local.kafka_secure: true, and nothing else"),
    ):
        with monkeypatch.context() as only:
            only.setenv(f"REWATCH_{name}", value)
            with pytest.raises(ConfigError, match=words):
                load()
    monkeypatch.delenv("REWATCH_LOCAL__KAFKA_SECURE")
    monkeypatch.setenv("REWATCH_KAFKA__SECURITY_PROTOCOL", "SSL")
    with pytest.raises(ConfigError, match=r"local\.kafka_secure"):
        load()


def test_the_password_comes_from_the_file_that_either_way_of_naming_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    for name, value in {
        "BOOTSTRAP_SERVERS": "kafka:9092",
        "SECURITY_PROTOCOL": "SASL_SSL",
        "SASL_USERNAME": "u",
        "SASL_PASSWORD_FILE": str(secret),
    }.items():
        monkeypatch.setenv(f"REWATCH_KAFKA__{name}", value)
    assert load().kafka.password() == "open sesame"
    monkeypatch.delenv("REWATCH_KAFKA__SASL_PASSWORD_FILE")
    (tmp_path / "rewatch.yaml").write_text(json.dumps({"kafka": {"sasl_password_file": str(secret)}}))
    settings = load()
    assert settings.kafka.password() == "open sesame"
    secret.write_text("new\n")
    assert settings.kafka.password() == "new"

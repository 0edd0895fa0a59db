"""Tokens: which are taken, which are not and why, and keys that change under a running door."""

import base64
import hashlib
import hmac
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwk, jwt
from pydantic import ValidationError

from streams.admission import Guard, NotAdmittedError
from streams.grants import JwtSettings
from streams.serving import SettingsError
from streams.tokens import TokenError, Tokens
from tests.streams.test_serving import Settings

NOW = 1_800_000_000
SECRET = "0123456789abcdef" * 2
ISSUER = "https://id.example/realms/home"
CLAIMS = {"iss": ISSUER, "aud": "rewatch", "exp": NOW + 60, "scope": "openid read"}
RSA = jwk.RSAKey.generate_key(2048, {"kid": "old"})
EC = jwk.ECKey.generate_key("P-256", {"kid": "new"})
ED = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})


def signed(key: Any, alg: str, claims: dict[str, Any] = CLAIMS, **head: Any) -> str:
    return jwt.encode({"alg": alg} | head, claims, key, algorithms=[alg])


def raw(head: dict[str, Any], claims: dict[str, Any], sign: bytes | None = None) -> str:
    """A token by hand, signed by HMAC or not at all."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, claims)]
    body = b".".join(parts)
    mac = b"" if sign is None else base64.urlsafe_b64encode(hmac.digest(sign, body, hashlib.sha256)).rstrip(b"=")
    return (body + b"." + mac).decode()


def tokens(path: Path | None = None, **more: Any) -> Tokens:
    keys: dict[str, Any] = {"secret": SECRET} if path is None else {"keys_file": path}
    return Tokens(JwtSettings.model_validate({"issuer": ISSUER} | keys | more), "gateway.jwt", lambda: NOW)


def key_set(path: Path, *keys: Any) -> Path:
    """A JWKS file that takes the place of another, as an editor or a sync writes it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"keys": [key.as_dict(private=False) for key in keys]}))
    part.rename(path)
    return path


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    return key_set(tmp_path / "jwks.json", RSA, EC)


def secret_key() -> Any:
    return jwk.OctKey.import_key(SECRET)


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": NOW - 31}, "expired"),
        ({"exp": None}, "no exp"),
        ({"exp": "tomorrow"}, "exp is none"),
        ({"exp": float("nan")}, "exp is none"),
        ({"nbf": NOW + 31}, "not valid yet"),
        ({"iat": NOW + 31}, "made in the future"),
        ({"iss": "https://id.example/realms/other"}, "iss is not gateway.jwt.issuer"),
        ({"iss": None}, "no iss"),
        ({"aud": "grafana"}, "aud is not gateway.jwt.audience"),
        ({"aud": ["grafana", "vault"]}, "aud is not gateway.jwt.audience"),
        ({"aud": None}, "no aud"),
        ({"aud": {"rewatch": 1}}, "aud is not gateway.jwt.audience"),
    ],
)
def test_a_token_whose_claims_are_not_for_here_is_refused_with_the_reason(claims: dict[str, Any], why: str) -> None:
    token = raw({"alg": "HS256"}, {k: v for k, v in (CLAIMS | claims).items() if v is not None}, SECRET.encode())
    with pytest.raises(TokenError, match=why):
        tokens().look(token)


def test_clocks_may_differ_by_the_leeway_and_a_token_ends_with_its_time() -> None:
    token = signed(secret_key(), "HS256", CLAIMS | {"exp": NOW - 29, "nbf": NOW + 29, "aud": ["x", "rewatch"]})
    assert tokens().look(token) == (frozenset({"read"}), NOW + 1)
    endless = tokens().look(signed(secret_key(), "HS256", CLAIMS | {"exp": 10**400}))
    assert endless.until > NOW


def test_a_signature_that_is_none_or_by_another_key_or_way_opens_nothing(jwks: Path, tmp_path: Path) -> None:
    pem = tmp_path / "key.pem"
    pem.write_bytes(RSA.as_pem(private=False))
    good = signed(RSA, "RS256", kid="old")
    later = signed(RSA, "RS256", CLAIMS | {"exp": NOW + 999}, kid="old")
    head, body, signature = good.split(".")
    forged = json.loads(base64.urlsafe_b64decode(body + "==")) | {"scope": "admin"}
    admin = base64.urlsafe_b64encode(json.dumps(forged).encode()).rstrip(b"=").decode()
    public = RSA.as_dict(private=False)
    wrong = {
        "none": raw({"alg": "none"}, CLAIMS),
        "None": raw({"alg": "None"}, CLAIMS),
        "none, with a key": raw({"alg": "none", "kid": "old"}, CLAIMS, SECRET.encode()),
        "no alg": raw({"typ": "JWT"}, CLAIMS, SECRET.encode()),
        "the public key as HMAC's secret": raw({"alg": "HS256", "kid": "old"}, CLAIMS, pem.read_bytes()),
        "its key brought along": signed(jwk.RSAKey.generate_key(2048), "RS256", jwk=public, kid="old"),
        "its key elsewhere": signed(jwk.RSAKey.generate_key(2048), "RS256", jku="http://127.0.0.1:9/jwks"),
        "unknown kid": signed(RSA, "RS256", kid="theirs"),
        "another's kid": signed(RSA, "RS256", kid="new"),
        "no kid, of two keys": signed(RSA, "RS256"),
        "other claims": f"{head}.{admin}.{signature}",
        "no signature": f"{head}.{body}.",
        "what it calls critical is not known": raw({"alg": "HS256", "crit": ["x"], "x": 1}, CLAIMS, SECRET.encode()),
        "the signature of another": f"{later.rpartition('.')[0]}.{signature}",
        "two parts": f"{head}.{body}",
        "nothing": "..",
        "deep": ".".join([base64.urlsafe_b64encode(b"[" * 1900).decode()] * 3),
        "text": "é.ü.ß",
    }
    for name, token in wrong.items():
        for door in (tokens(jwks), tokens(pem), tokens()):
            if name in {"unknown kid", "another's kid", "no kid, of two keys"} and door._settings.keys_file == pem:
                continue  # a single key is the key, whatever the token calls it
            with pytest.raises(TokenError, match="not signed by a key that is known"):
                door.look(token)
    assert tokens(jwks).look(good).scopes == tokens(pem).look(good).scopes == {"read"}
    with pytest.raises(TokenError, match="not signed"):
        tokens(jwks, algorithms=["ES256"]).look(good)
    with pytest.raises(TokenError, match="8,192"):
        tokens().look(signed(secret_key(), "HS256", CLAIMS | {"pad": "x" * 8192}))


def test_no_token_that_was_changed_in_one_letter_is_taken(jwks: Path) -> None:
    chance = random.Random(7)
    for key, alg in ((secret_key(), "HS256"), (EC, "ES256")):
        door = tokens() if alg == "HS256" else tokens(jwks)
        good = signed(key, alg, kid=key.kid or "x")
        end = good.rindex(".") + 1
        for _ in range(300):
            at = chance.randrange(len(good) - 1)  # the last letter has bits that mean nothing
            letter = chance.choice("abcXYZ019-_.é")
            if good[at] != letter:
                with pytest.raises(TokenError):
                    door.look(good[:at] + letter + good[at + 1 :])
        assert door.look(good).scopes == {"read"}, good[end:]


def test_keys_are_rotated_without_a_restart_and_a_broken_file_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = key_set(tmp_path / "jwks.json", RSA)
    door = tokens(path)
    old, new, ed = signed(RSA, "RS256", kid="old"), signed(EC, "ES256", kid="new"), signed(ED, "Ed25519", kid="ed")
    assert door.look(old)
    with pytest.raises(TokenError):
        door.look(new)
    key_set(path, RSA, EC)
    assert door.look(old)
    assert door.look(new), "both, while tokens of the old one last"
    key_set(path, EC, ED)
    assert door.look(ed)
    assert door.look(new)
    with pytest.raises(TokenError):
        door.look(old)
    path.write_text("{")
    os.utime(path, (0, 0))
    assert door.look(new)
    path.unlink()
    assert door.look(new)
    key_set(path, RSA)
    assert door.look(old)
    assert "keys of tokens not read again" in capsys.readouterr().out


def test_keys_that_must_not_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    short = """-----BEGIN PUBLIC KEY-----
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDlOJu6TyygqxfWT7eLtGDwajtN
FOb9I5XRb6khyfD1Yt3YiCgQWMNW649887VGJiGr/L5i2osbl8C9+WJTeucF+S76
xFxdU6jE0NQ+Z+zEdhUTooNRaY5nZiu5PgDB0ED/ZKBUSLKL7eibMxZtMlUDHjm4
gwQco1KRMDSmXSMkDwIDAQAB
-----END PUBLIC KEY-----
"""
    cases = {
        short: "1024 bits",
        EC.as_pem(private=True).decode(): "private key",
        json.dumps({"keys": [EC.as_dict(private=True)]}): "private key",
        json.dumps({"keys": [secret_key().as_dict(private=True)]}): "belongs in `secret`",
        json.dumps({"keys": []}): "no JWKS",
        json.dumps({"keys": ["x"]}): "no JWKS",
        "[]": "no JWKS",
        "hello": "no JWKS",
    }
    path = tmp_path / "keys"
    for text, why in cases.items():
        path.write_text(text)
        with pytest.raises(SettingsError, match=rf"gateway\.jwt\.keys_file .*{why}"):
            tokens(path)
    with pytest.raises(SettingsError, match="No such file"):
        tokens(tmp_path / "none")


@pytest.mark.parametrize(
    ("said", "scopes"),
    [
        ({"scope": "openid label read"}, {"read", "label"}),
        ({"scope": ["upload", "upload", 7, None]}, {"upload"}),
        ({"scope": {"admin": True}}, set()),
        ({"scope": None}, set()),
        ({"scp": "admin"}, set()),
        ({"scope": "ADMIN Admin cameras.view"}, {"read"}),
        ({"scope": "home-owner"}, {"admin"}),
    ],
)
def test_scopes_are_words_or_a_list_and_the_issuers_names_can_be_mapped(said: dict[str, Any], scopes: set[str]) -> None:
    door = tokens(scopes={"cameras.view": "read", "home-owner": "admin"})
    claims = {k: v for k, v in CLAIMS.items() if k != "scope"} | said
    assert door.look(signed(secret_key(), "HS256", claims)).scopes == scopes
    other = tokens(scope_claim="roles").look(signed(secret_key(), "HS256", CLAIMS | {"roles": ["label"]}))
    assert other.scopes == {"label"}


@pytest.mark.parametrize(
    ("jwt_", "why"),
    [
        ({"secret": SECRET}, "set `issuer` too"),
        ({"issuer": ISSUER}, "either `secret` or `keys_file`"),
        ({"issuer": ISSUER, "secret": SECRET, "keys_file": "x"}, "either `secret` or `keys_file`"),
        ({"issuer": ISSUER, "secret": SECRET[:-1]}, "fewer than 32"),
        ({"issuer": ISSUER, "secret": SECRET, "algorithms": ["RS256"]}, "HS goes with `secret`"),
        ({"issuer": ISSUER, "keys_file": "x", "algorithms": ["ES256", "HS256"]}, "HS256: HS goes with `secret`"),
        ({"issuer": ISSUER, "secret": SECRET, "algorithms": ["none"]}, "none|HS256"),
    ],
)
def test_settings_that_would_open_a_door_by_mistake_are_refused(jwt_: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why) as told:
        Settings(jwt=jwt_)
    assert SECRET[:-1] not in str(told.value)


def test_a_key_may_everything_and_a_token_what_its_scopes_say() -> None:
    settings = Settings(api_key="eyJ.looks.like", jwt={"issuer": ISSUER, "secret": SECRET})
    guard = Guard(settings, lambda: NOW)
    token = {"authorization": f"Bearer {signed(secret_key(), 'HS256')}"}
    for scope in ("read", "label", "upload", "admin"):
        assert guard.admit({"x-api-key": "eyJ.looks.like"}, scope)
    assert guard.admit(token, "read").until == NOW + 60 + 30
    with pytest.raises(NotAdmittedError, match="needs the scope label; the token has read") as told:
        guard.admit(token, "label")
    assert (told.value.status, told.value.guess) == (403, False)
    assert told.value.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope", scope="label"'
    for sent, guess in (({}, False), ({"x-api-key": "wrong"}, True), ({"x-api-key": "a.b.c"}, True)):
        with pytest.raises(NotAdmittedError, match=r"toy\.") as told:
            guard.admit(sent, "read")
        assert (told.value.status, told.value.guess) == (401, guess)
    other = Guard(Settings(api_key="looks like no token", jwt={"issuer": ISSUER, "secret": SECRET}))
    with pytest.raises(NotAdmittedError) as told:
        other.pass_of("a.b.c")
    assert (told.value.guess, other.is_token("a.b.c"), guard.is_token("a.b.c")) == (False, True, False), (
        "what looks like a token is a guess only where the key looks so too"
    )
    assert Guard(Settings()).admit({}, "admin"), "where nothing is asked for, this machine may everything"

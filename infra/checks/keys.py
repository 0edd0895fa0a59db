"""Checks of what guards this installation's doors: API keys, the keys of tokens, certificates."""

from datetime import UTC, datetime
from pathlib import Path

from infra.checks.check import Check, Context
from infra.private import others_look_in
from infra.tls import certificates
from infra.tls.folder import WARN_DAYS
from streams.admission import tokens_of
from streams.serving import EndpointSettings, SettingsError

# Sixteen random letters and digits are 2^82 guesses: more than anybody tries at a door that counts no tries.
KEY_LEAST = 16


async def keys(context: Context) -> list[Check]:
    """Whether keys can be guessed, or be read on their way, at the doors that others reach."""
    return [check for door in _doors(context) if not door.is_local for check in _door(door)]


async def tokens(context: Context) -> list[Check]:
    """Whether the keys that tokens are checked against can be used."""
    checks = []
    for door in _doors(context):
        if door.jwt.enabled:
            name = f"{door.section}.jwt"
            try:
                tokens_of(door)
            except SettingsError as error:
                checks.append(Check(name, "failed", str(error), f"correct {name}.keys_file"))
            else:
                checks.append(Check(name, "ok", f"tokens of {door.jwt.issuer} are taken"))
    return checks


async def certificates_of_doors(context: Context) -> list[Check]:
    """Whether the doors' certificates can be used, and for how long."""
    return [check for door in _doors(context) if door.with_tls for check in _certificate(door, datetime.now(UTC))]


def _doors(context: Context) -> list[EndpointSettings]:
    settings = context.settings
    doors: tuple[EndpointSettings, ...] = (settings.gateway, settings.ingest.upload, settings.metrics)
    # The detector's service is nobody's door until somebody serves it elsewhere than to this machine.
    service = settings.detector.service
    return [door for door in (*doors, *(() if service.is_local else (service,))) if door.enabled]


def _door(door: EndpointSettings) -> list[Check]:
    name = f"{door.section}.api_key" if door.api_key is not None else f"{door.section}.jwt"
    variable = f"REWATCH_{door.section.upper().replace('.', '__')}__API_KEY"
    checks = []
    if door.api_key is not None and len(door.api_key.get_secret_value()) < KEY_LEAST:
        found = f"has fewer than {KEY_LEAST} characters, and {door.host} can be reached by others"
        checks.append(Check(name, "warning", found, f"set a longer one: {variable}=$(openssl rand -hex 16)"))
    if door.tls == "auto" and not door.with_tls:
        found = f"crosses the network for all to read: {door.host} port {door.port} speaks no TLS"
        fix = (
            f"set {door.section}.tls_cert_path and .tls_key_path; or, where a proxy in front has TLS, "
            f"{door.section}.tls: off"
        )
        checks.append(Check(f"{name} on its way", "warning", found, fix))
    asks = "a key" if door.api_key is not None else "a token"
    return checks or [Check(name, "ok", f"{door.section} asks for {asks}{', by TLS' if door.with_tls else ''}")]


def _certificate(door: EndpointSettings, now: datetime) -> list[Check]:
    name = f"{door.section}.tls_cert_path"
    path, key = door.tls_cert_path or Path(), door.tls_key_path or Path()
    renew = f"renew it, then restart what serves {door.section}"
    try:
        found = certificates.read(path.read_bytes())
        open_to_all = others_look_in(key)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no certificate in PEM"
        file = error.filename if isinstance(error, OSError) else path
        return [Check(name, "failed", f"{file}: {why}", f"correct {name} and .tls_key_path")]
    checks = []
    if found.ends <= now:
        checks.append(Check(name, "failed", f"{path}: it ended on {found.ends:%Y-%m-%d}: clients refuse it", renew))
    elif found.begins > now:
        began = f"{path}: it begins on {found.begins:%Y-%m-%d %H:%M} UTC only"
        checks.append(Check(name, "failed", began, "look at this machine's clock"))
    elif found.days_left(now) < WARN_DAYS:
        checks.append(Check(name, "warning", f"{path}: it ends on {found.ends:%Y-%m-%d}", renew))
    if open_to_all:
        told = f"every user of this machine can read {key}"
        checks.append(Check(f"{door.section}.tls_key_path", "warning", told, f"chmod o-rwx {key}"))
    return checks or [Check(name, "ok", f"{path}, until {found.ends:%Y-%m-%d}")]

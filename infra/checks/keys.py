"""Checks of the keys that open this installation's doors to others."""

from infra.checks.check import Check, Context
from streams.serving import EndpointSettings

# Sixteen random letters and digits are 2^82 guesses: more than anybody tries at a door that counts no tries.
KEY_LEAST = 16


async def keys(context: Context) -> list[Check]:
    """Whether keys can be guessed, or be read on their way, at the doors that others reach."""
    settings = context.settings
    doors: tuple[EndpointSettings, ...] = (settings.gateway, settings.ingest.upload, settings.metrics)
    return [check for door in doors if door.enabled and not door.is_local for check in _door(door)]


def _door(door: EndpointSettings) -> list[Check]:
    key = door.api_key.get_secret_value() if door.api_key is not None else ""
    name = f"{door.section}.api_key"
    variable = f"REWATCH_{door.section.upper().replace('.', '__')}__API_KEY"
    checks = []
    if len(key) < KEY_LEAST:
        found = f"has fewer than {KEY_LEAST} characters, and {door.host} can be reached by others"
        checks.append(Check(name, "warning", found, f"set a longer one: {variable}=$(openssl rand -hex 16)"))
    if door.tls == "auto" and not door.with_tls:
        found = f"crosses the network for all to read: {door.host} port {door.port} speaks no TLS"
        fix = (
            f"set {door.section}.tls_cert_path and .tls_key_path; or, where a proxy in front has TLS, "
            f"{door.section}.tls: off"
        )
        checks.append(Check(f"{name} on its way", "warning", found, fix))
    return checks or [Check(name, "ok", f"{door.section} asks for a key, by TLS" if door.with_tls else "long enough")]

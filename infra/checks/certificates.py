"""Checks of certificates, those kept here and those of the way to the broker; and of the password on that way."""

import asyncio
import ipaddress
from datetime import UTC, datetime
from pathlib import Path

from infra.checks.check import Check, Context
from infra.config import Settings
from infra.tls import folder, places
from infra.tls.folder import Kept


async def certificates(context: Context) -> list[Check]:
    """Whether one has ended or soon will, and whether others can read its key."""
    return [*await asyncio.to_thread(_kept, context.settings), *_on_its_way(context.settings)]


def _kept(settings: Settings) -> list[Check]:
    kafka = settings.kafka
    at = settings.data_dir / "tls"
    kept = {one.path.absolute(): one for one in folder.show(at)}
    for path, key in ((kafka.ssl_cafile, None), (kafka.ssl_certfile, kafka.ssl_keyfile)):
        if path is not None and path.exists():
            kept.setdefault(path.absolute(), Kept(path, folder.read(path), key or path.with_suffix(".key")))
    checks = [check for one in kept.values() for check in _of(one, settings)]
    if kept and not checks:
        first = min(one.certificate.ends for one in kept.values() if one.certificate is not None)
        checks = [Check("certificates", "ok", f"{len(kept)}; the first ends on {first:%Y-%m-%d}")]
    return checks


def _of(kept: Kept, settings: Settings) -> list[Check]:
    checks = []
    name = f"certificate {kept.path.name}"
    if kept.certificate is None:
        return [Check(name, "failed", f"{kept.path}: holds no certificate (PEM)", "put it back, or make it anew")]
    left = kept.certificate.days_left(datetime.now(UTC))
    if left < folder.WARN_DAYS:
        ends = f"{kept.certificate.ends:%Y-%m-%d}"
        found = f"{kept.path} {'ended' if left < 0 else 'ends'} on {ends}"
        checks.append(Check(name, "failed" if left < 0 else "warning", found, _renewal(kept.path, settings)))
    if not kept.key_is_private:
        found = f"{kept.key} can be read by every user of this machine, or by a group"
        checks.append(Check(f"key {kept.key.name}", "warning", found, f"chmod 600 {kept.key}"))
    return checks


def _renewal(path: Path, settings: Settings) -> str:
    ours = places.files(settings.data_dir)
    if path.absolute() == ours.certificate.absolute():
        return "stop and start `rewatch up`: the broker's start makes a new one"
    if path.stem == folder.AUTHORITY:
        return "make another authority in a new folder (`rewatch tls make --dir`), and give its ca.pem to every client"
    return f"`rewatch tls renew --dir {path.parent}` where this authority made it, then start its server again"


def _on_its_way(settings: Settings) -> list[Check]:
    kafka = settings.kafka
    if kafka.security_protocol != "SASL_PLAINTEXT" or kafka.sasl_mechanism != "PLAIN":
        return []
    hosts = [server.strip().rpartition(":")[0] for server in kafka.bootstrap_servers.split(",")]
    if all(map(_is_here, hosts)):
        return []
    found = f"crosses the network for all to read, to {kafka.bootstrap_servers}"
    fix = "set kafka.security_protocol to SASL_SSL, or kafka.sasl_mechanism to SCRAM-SHA-256"
    return [Check("kafka.sasl_password on its way", "warning", found, fix)]


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

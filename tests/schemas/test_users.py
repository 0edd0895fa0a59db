"""The users of the store: what makes them on a server, and the containers' file, which says the same."""

from pathlib import Path
from xml.etree import ElementTree as ET

import httpx
import pytest

from schemas.users import USERS, WRITTEN, User, statements
from streams.topics import STORED

pytest_plugins = ["tests.clickhouse_kit"]

COMPOSE = Path(__file__).resolve().parents[2] / "infra" / "compose"
FILE = ET.parse(COMPOSE / "clickhouse" / "users.xml.in").getroot()


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.role)
def test_the_containers_file_gives_each_user_what_the_product_gives_it(user: User) -> None:
    written = FILE.find(f"./users/{user.name('rewatch')}")
    assert written is not None
    assert [query.text for query in written.iter("query")] == [
        f"GRANT {grant.format(database='rewatch')}" for grant in user.grants
    ]
    profile = written.findtext("profile")
    assert profile == (user.name("rewatch") if user.limits else "default")
    values = {one.tag: one.text for one in FILE.findall(f"./profiles/{profile}/*") if not len(one)}
    assert values == {limit.setting: str(limit.value) for limit in user.limits}
    bounds = {
        one.tag: (one.findtext("min"), one.findtext("max"))
        for one in FILE.findall(f"./profiles/{profile}/constraints/*")
    }
    assert bounds == {
        limit.setting: (str(limit.least), str(limit.most)) for limit in user.limits if limit.most is not None
    }


def test_the_containers_file_has_these_users_and_no_other() -> None:
    assert [user.tag for user in FILE.findall("./users/*")] == ["default", *(user.name("rewatch") for user in USERS)]
    assert FILE.find("./users/default[@remove='remove']") is not None
    assert [profile.tag for profile in FILE.findall("./profiles/*")] == ["rewatch_reader"]


def test_the_writer_may_fill_what_the_sink_fills_and_nothing_that_gc_goes_by() -> None:
    assert set(WRITTEN) == {*STORED, "log", "sink_progress"}


@pytest.mark.real
@pytest.mark.parametrize("user", USERS, ids=lambda user: user.role)
def test_the_statements_that_make_a_user_are_clickhouses(user: User, clickhouse_url: str) -> None:
    """Read by the engine's own parser and written as it understood them: it takes none for another."""
    profile, settings, made, login, grant = (
        httpx.post(
            clickhouse_url, params={"query": "SELECT formatQuerySingleLine({q:String}) FORMAT TSVRaw", "param_q": one}
        ).text.strip()
        for one in statements(user, "cams", "ab" * 32)
    )
    name = f"cams_{user.role}"
    assert profile == f"CREATE SETTINGS PROFILE IF NOT EXISTS `{name}`"
    assert settings.startswith(f"ALTER SETTINGS PROFILE `{name}` DROP ALL SETTINGS, DROP ALL PROFILES")
    for limit in user.limits:
        bounds = "" if limit.most is None else f" MIN {limit.least} MAX {limit.most}"
        assert f"{limit.setting} = {limit.value}{bounds}" in settings
    assert made == f"CREATE USER IF NOT EXISTS {name} IDENTIFIED WITH sha256_hash BY '{'ab' * 32}'"
    assert login.startswith(f"ALTER USER {name} IDENTIFIED WITH sha256_hash BY '{'ab' * 32}'")
    assert login.endswith(f"ADD PROFILE `{name}`")
    assert grant.startswith("GRANT ")
    assert grant.endswith(f"TO {name} WITH REPLACE OPTION")
    for part in user.grants:
        assert part.format(database="cams") in grant

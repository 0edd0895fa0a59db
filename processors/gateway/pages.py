"""The pages: HTML rendered here, from the same shapes that the JSON API answers with.

Everything works without JavaScript but liveness. No script and no style is inline, and nothing comes from elsewhere:
the policy in `headers` refuses it, so that what cameras and models write could not run even if an escape were missing.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from processors.gateway import drawing, words
from processors.gateway.login import local
from processors.gateway.models import CameraName, EventDetail, EventSummary, FrameView, Level, NewLabel, Verdict
from processors.gateway.ports import InvalidError, NotFoundError, Source

_HERE = Path(__file__).parent

SPANS = {
    "1h": ("the last hour", timedelta(hours=1)),
    "24h": ("the last 24 hours", timedelta(hours=24)),
    "7d": ("the last 7 days", timedelta(days=7)),
    "30d": ("the last 30 days", timedelta(days=30)),
}

# A page of cards with their pictures is about a megabyte at 20 KB a picture.
_PAGE = 50
_DAY = timedelta(days=1)


class _Filter(NamedTuple):
    """What the list of events is narrowed to, as the address says it."""

    camera: str | None
    level: Level | None
    span: str
    first: date | None
    last: date | None
    before: str | None

    @property
    def narrowed(self) -> bool:
        return bool(self.camera or self.level or self.span or self.first or self.last)

    def query(self, **more: str) -> str:
        """The same list as an address."""
        named = {"camera": self.camera, "level": self.level, "span": self.span, "from": self.first, "until": self.last}
        return urlencode({name: str(value) for name, value in (named | more).items() if value})


def build_pages(source: Source) -> list[BaseRoute]:
    """The pages' routes, and their CSS, script and icon below `/static`.

    What the source raises goes through: the app shows it by `error_page`.
    """
    pages = _Pages(source)
    return [
        Route("/", pages.events),
        Route("/events/{event_id}", pages.event),
        Route("/events/{event_id}/labels", pages.label_event, methods=["POST"]),
        Route("/cameras", pages.cameras),
        Route("/cameras/{camera_id}", pages.camera),
        Route("/cameras/{camera_id}/missed", pages.label_missed, methods=["POST"]),
        Route("/pipeline", pages.pipeline),
        Route("/login", login_page, methods=["GET"]),
        Mount("/static", _Static(directory=_HERE / "static"), name="static"),
    ]


async def login_page(request: Request) -> Response:
    """The form that posts the key to `/login`; `?wrong` says that the last one was not it."""
    wrong = "wrong" in request.query_params
    target = local(request.query_params.get("next", "/"))
    return _page(request, "login.html", status=401 if wrong else 200, wrong=wrong, target=target)


def error_page(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """What went wrong and what to do, for people."""
    return _page(request, "error.html", status=status, headers=headers, code=status, message=message)


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks, rather than a program: errors are then pages."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")


class _Pages:
    def __init__(self, source: Source) -> None:
        self._source = source

    async def events(self, request: Request) -> Response:
        """The latest events, or those that the address asks for."""
        cameras: tuple[CameraName, ...] = await self._source.camera_names()
        asked = _asked(request)
        time_zone = _common_zone(cameras, asked.camera)
        since, until = _between(asked, time_zone)
        listed = await self._source.events(
            camera=asked.camera, level=asked.level, since=since, until=until, before=asked.before, limit=_PAGE
        )
        if not (listed.events or asked.narrowed or asked.before):  # the first run: it tells how far the frames are
            cameras = await self._source.cameras()
        return _page(
            request,
            "events.html",
            cameras=cameras,
            asked=asked,
            time_zone=time_zone,
            days=_by_day(listed.events),
            older=asked.query(before=listed.next) if listed.next else None,
            newest="?" + asked.query() if asked.narrowed else "/",
        )

    async def event(self, request: Request) -> Response:
        """One event whole."""
        event = await self._source.event(request.path_params["event_id"])
        older, newer = await self._source.beside(event)
        return _page(
            request,
            "event.html",
            event=event,
            shown=_shown(event, request.query_params.get("frame")),
            boxes=drawing.boxes,
            messages=_messages(event.rendered_prompt),
            parameters=json.dumps(event.parameters, ensure_ascii=False),
            older=older,
            newer=newer,
            given=_verdict(request.query_params.get("given")),
            bands=words.BANDS,
        )

    async def label_event(self, request: Request) -> Response:
        """Take a label on an event, and show the event again."""
        event_id = request.path_params["event_id"]
        form = await _form(request)
        new = _label(
            verdict=form.get("verdict"), event_id=event_id, author=form.get("author", ""), note=form.get("note", "")
        )
        label = await self._source.label(new)
        return _see(f"/events/{words.url_part(event_id)}?given={label.verdict}#label")

    async def cameras(self, request: Request) -> Response:
        """Every camera."""
        return _page(request, "cameras.html", cameras=await self._source.cameras())

    async def camera(self, request: Request) -> Response:
        """One camera's day."""
        given = _verdict(request.query_params.get("given"))
        return await self._camera(request, _day(request.query_params.get("day")), given=given)

    async def label_missed(self, request: Request) -> Response:
        """Take a `missed` label on a span of the camera's day, and show the day again."""
        form = await _form(request)
        camera = await self._known(request.path_params["camera_id"])
        day = _day(form.get("day")) or datetime.now(words.zone(camera.time_zone)).date()
        try:
            since, until = _missed(day, form, camera.time_zone)
            await self._source.label(
                _label(
                    verdict="missed",
                    camera_id=camera.camera_id,
                    started_at=since,
                    ended_at=until,
                    author=form.get("author", ""),
                    note=form.get("note", ""),
                )
            )
        except InvalidError as error:
            return await self._camera(request, day, refused=str(error), form=form)
        return _see(f"/cameras/{words.url_part(camera.camera_id)}?day={day}&given=missed#labels")

    async def pipeline(self, request: Request) -> Response:
        """How the pipeline is; never an error page, because what is away is what it shows."""
        health = await self._source.health()
        return _page(request, "pipeline.html", health=health)

    async def _camera(
        self,
        request: Request,
        day: date | None,
        *,
        given: Verdict | None = None,
        refused: str | None = None,
        form: Mapping[str, str] | None = None,
    ) -> Response:
        camera = await self._known(request.path_params["camera_id"])
        now = datetime.now(UTC)
        today = words.local_date(now, camera.time_zone)
        day = day or today
        since, until = _day_of(day, camera.time_zone)
        timeline = await self._source.timeline(camera.camera_id, since, until)
        taken_at = timeline.camera.last_taken_at
        seen = words.local_date(taken_at, camera.time_zone) if taken_at else None
        return _page(
            request,
            "camera.html",
            status=422 if refused else 200,
            day=day,
            today=today,
            # A camera that has been silent for days, or whose archive was played in: the day to look at is its last.
            last_day=seen if seen and seen != day else None,
            before=day - _DAY,
            after=day + _DAY if day < today else None,
            timeline=timeline,
            drawing=drawing.timeline(timeline, now),
            given=given,
            refused=refused,
            form=form or {},
        )

    async def _known(self, camera_id: str) -> CameraName:
        cameras = await self._source.camera_names()
        for camera in cameras:
            if camera.camera_id == camera_id:
                return camera
        known = ", ".join(camera.camera_id for camera in cameras) or "none yet"
        raise NotFoundError(f"there is no camera {camera_id}; known: {known}")


class _Static(StaticFiles):
    """Files whose addresses name their content: browsers keep them for a year."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


def _page(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> Response:
    text = _TEMPLATES.get_template(template).render(
        path=request.url.path,
        address=request.url,
        signed_in=request.scope.get("state", {}).get("session", False),
        now=datetime.now(UTC),
        **values,
    )
    return HTMLResponse(text, status, headers)


def _see(address: str) -> Response:
    return RedirectResponse(address, 303)


async def _form(request: Request) -> dict[str, str]:
    async with request.form(max_files=0, max_fields=16, max_part_size=16_384) as form:
        return {name: value.strip() for name, value in form.items() if isinstance(value, str)}


def _asked(request: Request) -> _Filter:
    """The filter in an address; a form's empty fields are none.

    Raises:
        InvalidError: a part of it is none of what there is to choose from.
    """
    given = {name: value for name, value in request.query_params.items() if value}
    level, span = given.get("level"), given.get("span", "")
    if level is not None and level not in get_args(Level):
        raise InvalidError(f"level={level}: choose from {', '.join(get_args(Level))}")
    if span and span not in SPANS:
        raise InvalidError(f"span={span}: choose from {', '.join(SPANS)}")
    return _Filter(
        given.get("camera"),
        cast("Level | None", level),
        span,
        _day(given.get("from")),
        _day(given.get("until")),
        given.get("before"),
    )


def _between(asked: _Filter, time_zone: str) -> tuple[datetime | None, datetime | None]:
    """Since and until: whole days by that zone's clock, or the span before now; both where both are asked."""
    since = _day_of(asked.first, time_zone)[0] if asked.first else None
    until = _day_of(asked.last, time_zone)[1] if asked.last else None
    if since and until and until <= since:
        raise InvalidError(f"from {asked.first} until {asked.last}: that is no span")
    if asked.span:
        recent = datetime.now(UTC) - SPANS[asked.span][1]
        since = max(since, recent) if since else recent
    return since, until


def _common_zone(cameras: tuple[CameraName, ...], chosen: str | None) -> str:
    """The zone in which the dates of a filter are meant: the chosen camera's, or the one that all share, or UTC."""
    zones = {camera.time_zone for camera in cameras if chosen in {None, camera.camera_id}}
    return zones.pop() if len(zones) == 1 else "UTC"


def _day(text: str | None) -> date | None:
    if not text:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidError(f"{text} is no date: write it like 2026-03-14") from None


def _day_of(day: date, time_zone: str) -> tuple[datetime, datetime]:
    """The first instant of a day by that zone's clock, and that of the next: 23, 24 or 25 hours."""
    clock = words.zone(time_zone)
    try:
        first, last = datetime.combine(day, time(), clock), datetime.combine(day + _DAY, time(), clock)
        return first.astimezone(UTC), last.astimezone(UTC)
    except OverflowError:
        raise InvalidError(f"{day} lies beyond all days that can be asked for") from None


def _missed(day: date, form: Mapping[str, str], time_zone: str) -> tuple[datetime, datetime]:
    """The span that a person names by two times of one day; the second may lie past midnight."""
    clock = words.zone(time_zone)
    try:
        first, last = time.fromisoformat(form.get("from", "")), time.fromisoformat(form.get("until", ""))
    except ValueError:
        raise InvalidError("say from when until when it was, like 23:10 and 23:15") from None
    if first == last:
        raise InvalidError("from and until are the same time: name the span in which it happened")
    end = day if last > first else day + _DAY
    return datetime.combine(day, first, clock).astimezone(UTC), datetime.combine(end, last, clock).astimezone(UTC)


def _label(**fields: Any) -> NewLabel:
    try:
        return NewLabel(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidError(f"{first['loc'][0] if first['loc'] else 'label'}: {first['msg']}") from error


def _verdict(text: str | None) -> Verdict | None:
    return cast("Verdict", text) if text in get_args(Verdict) else None


def _by_day(events: tuple[EventSummary, ...]) -> list[tuple[str, list[EventSummary]]]:
    """Runs of events of one day, each day by its camera's clock."""
    days: list[tuple[str, list[EventSummary]]] = []
    for event in events:
        name = words.day(event.started_at, event.time_zone)
        if not days or days[-1][0] != name:
            days.append((name, []))
        days[-1][1].append(event)
    return days


def _shown(event: EventDetail, asked: str | None) -> FrameView | None:
    """The frame that is shown large: the one asked for, or the event's cover, or the first that matters."""
    if asked is not None and asked.isascii() and asked.isdigit():
        for frame in event.frame_views:
            if frame.n == int(asked):
                return frame
    ranked = sorted(
        event.frame_views, key=lambda frame: (frame.image is None, frame.image != event.cover, not frame.matters)
    )
    return ranked[0] if ranked else None


def _messages(rendered: str) -> list[tuple[str, str]]:
    """The messages of a rendered prompt, role and text; the prompt as it is where it has another form."""
    try:
        return [(str(message["role"]), str(message["content"])) for message in json.loads(rendered)]
    except (ValueError, KeyError, TypeError):
        return [("prompt", rendered)]


def _static(name: str) -> str:
    """The address of a static file; its digest makes browsers fetch it anew after an upgrade."""
    digest = hashlib.sha256((_HERE / "static" / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "action": words.action,
        "ago": words.ago,
        "clock": words.clock,
        "counted": words.counted,
        "day_name": words.day,
        "iso": words.iso,
        "lasting": words.lasting,
        "local_date": words.local_date,
        "milliseconds": words.milliseconds,
        "moment": words.moment,
        "shortened": words.shortened,
        "url_part": words.url_part,
        "verdict": words.verdict,
    }
    made.globals |= {
        "spans": {name: text for name, (text, _) in SPANS.items()},
        "css": _static("app.css"),
        "script": _static("app.js"),
        "icon": _static("icon.svg"),
    }
    # All now: an upgrade under a running gateway must not give old code new templates.
    for name in made.list_templates():
        made.get_template(name)
    return made


_TEMPLATES = _environment()

"""`rewatch sizing`: how many disks, cards and partitions so many cameras want."""

from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.help import MAINTENANCE, examples
from infra.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from infra.sizing import Site, Size


def register(root: typer.Typer) -> None:
    """Add this command to the root."""
    root.command(
        rich_help_panel=MAINTENANCE,
        epilog=examples(
            "rewatch sizing --cameras 16 --fps 0.5",
            "rewatch sizing --cameras 64 --fps 1 --image-kb 113 --keep-days 90",
            "rewatch sizing --cameras 64 --fps 1 --inference-ms 52 --judge-s 12 --json",
        ),
    )(sizing)


def sizing(  # noqa: PLR0917 (typer makes options of parameters)
    cameras: Annotated[int, typer.Option(min=1, max=100_000, help="How many.")],
    fps: Annotated[float, typer.Option(min=0.0001, max=100, help="Images a second of each, over the whole day.")],
    image_kb: Annotated[
        float, typer.Option(min=1, max=10_000, help="Of one image: 37 at 640 x 360, 113 at 1280 x 720.")
    ] = 37,
    windows: Annotated[int, typer.Option(min=0, max=1_000, help="Events of each camera, a day.")] = 40,
    keep_days: Annotated[int, typer.Option(min=1, max=36_500, help="Kept in ClickHouse, and images.")] = 30,
    inference_ms: Annotated[
        float, typer.Option(min=0.01, max=60_000, help="The detector's for an image, its share of a batch.")
    ] = 20,
    judge_s: Annotated[float, typer.Option(min=0.01, max=600, help="The LLM's for a window, in one slot.")] = 5,
    as_json: JsonFlag = False,
) -> None:
    """Tell what so many cameras take: disks, cards, slots of the LLM, partitions.

    It asks nobody: bytes of a frame and of a window were measured on the demo's footage (docs/sizing.md has the
    arithmetic). Disks are of one replica.
    """
    from infra.sizing import Site, size

    site = Site(cameras, fps, round(image_kb * 1000), windows, keep_days, inference_ms, judge_s)
    found = size(site)
    if as_json:
        print_json(found._asdict())
        return
    print_table(("what", "how much", "because"), rows(site, found))


def rows(site: "Site", found: "Size") -> list[tuple[str, str, str]]:
    """What is needed, how much of it, and why, for people."""
    from streams.claims import INLINE_LIMIT

    large = site.image > INLINE_LIMIT
    where = "images in a store of their own" if large else "images in the records, here and in ClickHouse"
    return [
        ("frames", f"{found.frames:g}/s", f"{site.cameras} cameras x {site.fps:g}/s"),
        ("events", f"{found.windows:g} a day", f"{site.cameras} cameras x {site.windows}"),
        ("broker, written", f"{found.written / 1e6:.1f} MB/s", "each record, and ingest's memory of each camera"),
        ("broker, disk", amount(found.broker), f"7 days, verdicts 90, whole files; {where}"),
        ("ClickHouse, disk", amount(found.store), f"{site.keep_days} days, compressed"),
        ("image store", amount(found.images), f"{site.keep_days} days" if large else "images above 64 KB only"),
        ("detect", _count(found.detectors, "worker"), f"{site.inference_ms:g} ms an image, 70 % busy"),
        ("LLM", _count(found.slots, "slot"), f"{site.judge_s:g} s a window, 70 % busy in a busy hour"),
        ("partitions", f"{found.partitions}", "twice the workers of the largest stage, 16 at least; fixed"),
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def amount(size: float) -> str:
    """Bytes as disks are sold."""
    return "none" if not size else f"{size / 1e12:.1f} TB" if size >= 1e12 else f"{size / 1e9:.0f} GB"

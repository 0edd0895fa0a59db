"""Models from a hub: what it has published, and bringing that here."""

import fnmatch
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from infra.models import library
from infra.models.catalogue import Model
from infra.models.download import DownloadError, Promise, WrongFileError, check, download


def address() -> str:
    """Address of the model hub: HF_ENDPOINT names a mirror."""
    return os.environ.get("HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)


def pull(
    model: Model, folder: Path, *, quant: str = "", on_progress: library.OnProgress = lambda _: None
) -> library.Found:
    """Bring the model from its hub into `<folder>/<name>/`; what is there and right is left alone.

    Raises:
        DownloadError: the hub is away or has it no more, or the disk is too small; run again to go on.
        WrongFileError: what came is not what the hub published.
    """
    own = folder / model.name
    manifest = published(model, quant)
    token = huggingface_hub.get_token()
    # Kept for the hub alone: its redirects lead to other hosts, for which httpx drops the header.
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(timeout=httpx.Timeout(60, connect=15)) as client:
        for name, promise in manifest.files.items():

            def told(done: int, name: str = name, promise: Promise = promise) -> None:
                on_progress(library.Progress(name, done, promise.size))

            target = own / name
            if not _is(target, promise, told):
                url = huggingface_hub.hf_hub_url(model.repo, name, revision=manifest.revision, endpoint=address())
                download(client, url, target, promise, headers=headers, progress=told)
    manifest.write(own)
    path = library.usable(model, own, quant or "*")
    if path is None:
        raise DownloadError(f"{own} lacks a file that {model.name} needs: pull it again")
    return library.Found(path, own, manifest)


def published(model: Model, quant: str = "") -> library.Manifest:
    """What the hub has of the model now.

    Raises:
        DownloadError: the hub is away, or has no such files.
    """
    try:
        info = HfApi(endpoint=address()).model_info(model.repo, files_metadata=True, timeout=30)
    except HfHubHTTPError as error:
        raise DownloadError(
            f"{model.repo}: the hub answers {error.response.status_code}; look there, or set HF_TOKEN"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise DownloadError(
            f"the model hub at {address()} cannot be reached ({error!r}): set HF_ENDPOINT to "
            "a mirror, or pull on another machine and carry the folder (`rewatch models pull --help`)"
        ) from error
    # What lies in folders below is in parts, which nothing here loads.
    there = {file.rfilename: file for file in info.siblings or [] if "/" not in file.rfilename}
    files: dict[str, Promise] = {}
    for pattern in model.files:
        wanted = pattern.format(quant=quant or model.quant)
        fits = fnmatch.filter(there, wanted)
        if len(fits) != 1:
            have = ", ".join(sorted(name for name in there if name.endswith((".gguf", ".safetensors")))) or "none"
            raise DownloadError(
                f"{model.repo} has {len(fits)} files like {wanted}; it has {have}. --quant chooses another"
            )
        file = there[fits[0]]
        if file.size is None or (file.lfs is None and file.blob_id is None):
            raise DownloadError(f"{model.repo}: the hub does not say what {fits[0]} is")
        files[fits[0]] = (
            Promise(file.lfs.size, "sha256", file.lfs.sha256)
            if file.lfs is not None
            else Promise(file.size, "git-sha1", str(file.blob_id))
        )
    return library.Manifest(model.name, model.repo, info.sha or "main", files)


def _is(path: Path, promise: Promise, told: Callable[[int], None]) -> bool:
    try:
        check(path, promise, told)
    except (OSError, WrongFileError):
        return False
    return True

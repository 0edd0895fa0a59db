"""The `llm:` section of rewatch.yaml."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

SLOTS = 2
"""Requests at once where neither `llm.slots` nor the server says; the embedded server is started with as many."""


def _addresses(urls: object) -> object:
    """One or more base addresses, as a list or as a text with commas between them, made one text without /v1."""
    if isinstance(urls, str):
        urls = urls.split(",")
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        return urls
    return ",".join(dict.fromkeys(_base_url(url.strip()) for url in urls if url.strip()))


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("an address begins with http:// or https://")
    # Other clients of OpenAI's protocol want the address with /v1; here it may have it.
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class LlmSettings(BaseModel):
    """Which LLM judges, where its server is, and how long it may take."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    url: Annotated[str, BeforeValidator(_addresses), Field(min_length=1)] = Field(
        "http://127.0.0.1:8091",
        description="Address of an OpenAI-compatible server (llama-server, vLLM, Ollama, LM Studio), or a list of "
        "some, of the same model, that share the work. Set, none is started here.",
    )
    api_key: SecretStr | None = Field(None, description="The server's key, by environment: NEMOTRON_API_KEY.")
    ca_path: Path | None = Field(None, description="Certificates (PEM) that the server's own may be signed by.")
    model: str = Field("", description="Name of the model to ask for; empty takes the server's first.")
    model_path: str = Field(
        "demo",
        description="The model's GGUF file: what the embedded server loads, and whose SHA-256 every event names. "
        "`demo` is the model in the tree.",
    )
    server_path: Path | None = Field(None, description="A llama-server binary to run instead of the wheel's.")
    gpu_layers: int = Field(-1, ge=-1, description="Layers that the embedded server keeps on a GPU; -1: all that fit.")
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads of the embedded server; 0: all cores but one, since a thread that has to share its "
        "core holds up the others.",
    )
    context_size: int = Field(
        4096,
        ge=256,
        description="Context in tokens. The embedded server's slots share it; of another server one request has it.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Requests at the same time, to each server: at most so many. Unset: as many as it says that it has "
        f"slots, {SLOTS} where it does not say (vLLM, Ollama, LM Studio). The embedded server is started with so many.",
    )
    live_alone: bool | None = Field(
        None,
        description="Whether replays have no part of a server while it judges live windows: what they have in hand is "
        "cancelled when one comes, and made again. Unset: where the embedded server runs without a GPU, for its slots "
        "share the CPU's time. Elsewhere they give way only where every slot is taken.",
    )
    prompt_cache: bool = Field(True, description="Let the server reuse work for a prefix that prompts share.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every request.")
    max_completion_tokens: int = Field(400, ge=16, description="Longest answer in tokens.")
    deadline_s: float = Field(
        300.0,
        gt=0,
        description="How long one window may take from the moment it holds a slot, its repair and two more tries "
        "included, seconds.",
    )
    silence_s: float = Field(
        # llama.cpp reads up to 2,048 tokens of another request's prompt between two tokens: 60 s at 34 tokens/s.
        60.0,
        gt=0,
        description="How long a server may send nothing in the middle of an answer before it counts as hung, seconds.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="How long to wait for a connection, seconds.")

    @property
    def urls(self) -> tuple[str, ...]:
        """Each server's address."""
        return tuple(self.url.split(","))

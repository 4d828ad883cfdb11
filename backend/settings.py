"""Settings, from the environment only; all faults at once."""

from __future__ import annotations

import difflib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from backend.errors import SettingsError, StoreError
from backend.secret import project_secret
from backend.store import Store

PREFIX = "FIRSTROW_"
#: Variables of ours that are not settings of a process: where data for tests lies, which Label Studio they start, how
#: often they save, and at which changes a detach dies (each, or each so many).
OTHERS = {"FIRSTROW_DATA", "FIRSTROW_STUDIO", "FIRSTROW_SAVES", "FIRSTROW_DEATHS"}
#: Where the generated master secret lies in the store. Older versions kept one under "secret" and showed it to members
#: of projects in their webhooks: it is not used any more.
SECRET_KEY = "master-secret"  # noqa: S105  (its name)
#: Names, so that reading settings loads neither torch nor scikit-learn; tests hold them to the real ones.
NETWORKS = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_efficientnet_lite0",
)
STRATEGIES = (
    "first-row",
    "random",
    "foreground-random",
    "least-confidence",
    "margin",
    "entropy",
    "entropy-top",
    "entropy-foreground",
    "bald",
    "power-bald",
    "pseudo-loss",
    "egl",
    "egl-settles",
    "egl-huang",
    "learned-gradient",
    "entropy-gradnorm",
    "class-stratified",
    "gradient-magnitude",
    "magnitude-range",
    "direction-range",
    "coarse-egl",
    "coarse-egl-segment",
    "badge",
    "coreset",
    "typiclust",
    "bait",
    "coverage",
    "novel-egl",
)
HTTP = re.compile(r"^https?://[^/\s]+")


class Settings(BaseSettings):
    """What a process of First Row is told. The names are those of the environment."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", validate_default=False)

    label_studio_url: str = Field("http://localhost:8080", alias="LABEL_STUDIO_URL")
    label_studio_api_key: SecretStr = Field(alias="LABEL_STUDIO_API_KEY")
    redis_url: str = Field("redis://localhost:6379", alias="REDIS_URL")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", alias="LOG_LEVEL")
    url: str = Field("http://localhost:9090", alias="FIRSTROW_URL")
    port: int = Field(9090, alias="FIRSTROW_PORT", ge=1, le=65535)
    store: str = Field("./firstrow-store", alias="FIRSTROW_STORE", min_length=1, validate_default=True)
    cache: Path = Field(Path("~/.cache/firstrow"), alias="FIRSTROW_CACHE", validate_default=True)
    cache_gb: float = Field(2.0, alias="FIRSTROW_CACHE_GB", gt=0, allow_inf_nan=False)
    secret: SecretStr = Field(SecretStr(""), alias="FIRSTROW_SECRET")
    network: str = Field("lraspp_mobilenet_v3_large", alias="FIRSTROW_NETWORK")
    checkpoint: str = Field("", alias="FIRSTROW_CHECKPOINT")
    strategy: str = Field("first-row", alias="FIRSTROW_STRATEGY")
    learner: Literal["instant", "deep"] = Field("instant", alias="FIRSTROW_LEARNER")
    fine_tune: Literal["auto", "on", "off"] = Field("auto", alias="FIRSTROW_FINE_TUNE")
    coarse_tasks: int = Field(5, alias="FIRSTROW_COARSE_TASKS", ge=0)
    retrain_every: int = Field(1, alias="FIRSTROW_RETRAIN_EVERY", ge=1)
    train_steps: int = Field(100, alias="FIRSTROW_TRAIN_STEPS", ge=1)
    image_size: int = Field(640, alias="FIRSTROW_IMAGE_SIZE", ge=64, le=4096)
    clusters: Literal["codebook", "image"] = Field("codebook", alias="FIRSTROW_CLUSTERS")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), alias="FIRSTROW_ALLOWED_HOSTS")
    reconcile_seconds: int = Field(300, alias="FIRSTROW_RECONCILE_SECONDS", ge=1)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing is read behind the caller's back: `read` hands the environment over."""
        return (init_settings,)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(host.strip() for host in value.split(",") if host.strip()) if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("cache")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError("this user has no home folder: set another one") from error

    @field_validator("store")
    @classmethod
    def _is_store(cls, value: str) -> str:
        """A folder becomes absolute, so that messages name the one that is meant."""
        try:
            store = Store(value)
        except StoreError as error:
            raise ValueError(str(error)) from error
        return store.root if store.local else value

    @field_validator("label_studio_url", "url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not HTTP.match(value):
            raise ValueError("must start with http:// or https:// and name a host")
        return value.rstrip("/")

    @field_validator("url")
    @classmethod
    def _takes_events(cls, value: str) -> str:
        host = urlsplit(value).hostname or ""
        if host != "localhost" and not re.search(r"[.:]", host):
            raise ValueError(
                f"Label Studio sends events only to localhost, an IP address or a name with a dot, not to {host!r}"
            )
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("network", "strategy")
    @classmethod
    def _is_known(cls, value: str, info: Any) -> str:
        known = NETWORKS if info.field_name == "network" else STRATEGIES
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return value

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings of this process.

        Args:
            environ: the environment; the process's own by default.

        Raises:
            SettingsError: every fault, a line each: the variable, what is wrong, what to do.
        """
        environ = os.environ if environ is None else environ
        names = {str(field.alias) for field in cls.model_fields.values()}
        faults = [_unknown(name, names) for name in sorted(environ) if _is_typo(name, names)]
        try:
            found = cls.model_validate({name: environ[name] for name in names if environ.get(name, "") != ""})
        except ValidationError as error:
            faults += [_fault(str(fault["loc"][0]), fault) for fault in error.errors()]
        if faults:
            raise SettingsError("These settings are wrong:\n" + "\n".join(f"  {fault}" for fault in faults))
        return found

    def secret_value(self, make: bool = False) -> str:
        """The master secret: the given one, else the one kept in the store. Label Studio never gets it.

        Args:
            make: make one where there is none.

        Raises:
            StoreError: there is none.
        """
        given = self.secret.get_secret_value()
        return given or stored_secret(Store(self.store), make)

    def project_secret(self, project: int) -> str:
        """The secret that Label Studio shows us for a project; worth nothing for another one.

        Raises:
            StoreError: there is no master secret.
        """
        return project_secret(self.secret_value(), project)


def stored_secret(store: Store, make: bool) -> str:
    """The generated master secret; readable by our user only where the store is a folder.

    Raises:
        StoreError: there is none, and none is to be made; or it is empty.
    """
    found = store.read(SECRET_KEY)
    if found is None and not make:
        raise StoreError(
            f"there is no {SECRET_KEY} in the store {store.url}: set FIRSTROW_STORE to the store of `firstrow serve`, "
            "which makes it when it starts, or FIRSTROW_SECRET to its secret"
        )
    if found is None:
        store.create(SECRET_KEY, secrets.token_urlsafe(32).encode())  # another process may be quicker
        found = store.read(SECRET_KEY)
    if not found:
        raise StoreError(f"{SECRET_KEY} in the store {store.url} is empty; delete it, or set FIRSTROW_SECRET")
    return found.decode().strip()


def _is_typo(name: str, names: set[str]) -> bool:
    return name.startswith(PREFIX) and name not in names | OTHERS


def _fault(name: str, found: ErrorDetails) -> str:
    if found["type"] == "missing":
        return f"{name}: must be set, to a personal access token or a legacy token (Label Studio, Account & Settings)"
    default = next(field.get_default() for field in Settings.model_fields.values() if field.alias == name)
    hint = f" (default: {default})" if isinstance(default, str | int | float | Path) and default != "" else ""
    return f"{name}: {found['msg'].removeprefix('Value error, ')}{hint}"


def _unknown(name: str, names: set[str]) -> str:
    ours = [known.removeprefix(PREFIX) for known in names if known.startswith(PREFIX)]
    near = difflib.get_close_matches(name.removeprefix(PREFIX), ours, 1)
    return f"{name}: there is no such setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")

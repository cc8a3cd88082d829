"""All settings: one field each, read from the environment variable that has the field's name in capitals."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from backend.errors import SettingsError

Precision = Literal["auto", "float16", "bfloat16", "float32"]
Train = Literal["thresholds", "encoder", "head", "all"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]
ShowPictures = Literal["auto", "true", "false"]

PATH_SECRET = re.compile(r"[A-Za-z0-9_-]{16,}")
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def _make_setting(default: Any, text: str, unit: str = "", **constraints: Any) -> Any:
    """Makes a field; `text` and `unit` are its help in the command line and its row in the README."""
    return Field(default, description=text, json_schema_extra={"unit": unit}, **constraints)


def _list_choices(choices: Any) -> str:
    return f"one of {', '.join(get_args(choices))}"


class EnvironmentSource(PydanticBaseSettingsSource):
    """Reads each field from the variable that has its name in capitals, and from no other spelling.

    pydantic's own source ignores case: a variable `port` of another program would win over ours.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Returns the value of a field, None if its variable is not set or empty."""
        return os.environ.get(field_name.upper()) or None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Returns the values that are set."""
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class Settings(BaseSettings):
    """The settings of a process: keyword arguments first, then the environment; an empty variable counts as not set.

    Raises:
        SettingsError: a value is not of its type or out of range; the text names the variable.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = _make_setting("IDEA-Research/grounding-dino-tiny", "hub id, folder, original `.pth` file, or `demo`")
    model_dir: Path = _make_setting(Path("data"), "data directory: trained versions and the private Redis's files")
    device: str = _make_setting(
        "auto", "torch device of the workers, or several, comma-separated; `auto`: all GPUs, or the CPU"
    )
    workers: int = _make_setting(0, "predict workers that `serve` starts; 0: two per GPU, one on a CPU", ge=0)
    redis_url: str = _make_setting("", "the queue's Redis; empty: `serve` starts a private one", repr=False)
    label_studio_url: str = _make_setting("", "where this machine reaches Label Studio; needed for uploaded images")
    label_studio_api_key: str = _make_setting("", "legacy token or personal access token of Label Studio", repr=False)
    basic_auth_user: str = _make_setting("", "user of basic auth; empty: no login")
    basic_auth_pass: str = _make_setting("", "password of basic auth", repr=False)
    path_secret: str = _make_setting("", "serve everything under `/s/<secret>` only", repr=False)
    box_threshold: float = _make_setting(
        0.3, "lowest score of a box, if the labeling config names none", "0 to 1", ge=0, le=1, allow_inf_nan=False
    )
    nms_iou: float = _make_setting(
        0.7, "of boxes that overlap more, only the best is kept; 1 keeps all", "IoU, 0 to 1", ge=0, le=1,
        allow_inf_nan=False,
    )  # fmt: skip
    train: Train = _make_setting(
        "encoder", f"what training changes, {_list_choices(Train)}; `head`: all but the backbones"
    )
    precision: Precision = _make_setting(
        "auto", f"{_list_choices(Precision)}; `auto` is float16 on a GPU, float32 on a CPU"
    )
    size_divisor: int = _make_setting(
        1, "edges of resized images are multiples of it; 1: as published; 32: more images share a batch", ge=1, le=64
    )
    batch_size: int = _make_setting(
        0, "images per job and forward pass; 0: largest batch that fits in memory and takes at most one second", ge=0
    )
    predict_deadline: int = _make_setting(
        90, "time after which /predict answers with what is finished", "seconds", ge=1
    )
    push_above: int = _make_setting(50, "tasks of a request above which predictions are pushed, with a key", ge=0)
    preannotate_on_import: bool = _make_setting(False, "`true`: predict tasks as they are imported, with a key")
    retry_hours: int = _make_setting(
        24, "how long a prediction to be pushed is tried again while its image or Label Studio is away", "hours", ge=0
    )
    import_timeout: int = _make_setting(
        300, "time that Label Studio may take to store an import of predictions", "seconds", ge=1
    )
    stop_timeout: int = _make_setting(
        8, "time to finish a chunk at SIGTERM; else it goes back to the queue", "seconds", ge=1
    )
    forward_timeout: int = _make_setting(120, "time after which a forward pass counts as hung", "seconds", ge=1)
    allowed_image_hosts: str = _make_setting(
        "", "comma-separated private hosts or networks that images may be fetched from"
    )
    local_files_document_root: str = _make_setting(
        "", "Label Studio's folder of local files, if it is mounted here too"
    )
    max_image_pixels: int = _make_setting(100_000_000, "largest image", "pixels", ge=1)
    max_image_bytes: int = _make_setting(50_000_000, "largest image file", "bytes", ge=1)
    port: int = _make_setting(9090, "port of the web front", ge=1, le=65535)
    log_level: LogLevel = _make_setting("INFO", _list_choices(LogLevel))
    log_format: LogFormat = _make_setting("text", _list_choices(LogFormat))
    show_pictures: ShowPictures = _make_setting(
        "auto",
        f"whether the status page shows the last images, {_list_choices(ShowPictures)}; "
        "`auto`: behind a login or a secret path, and for `demo`",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns the sources of values, the first one first."""
        return init_settings, EnvironmentSource(settings_cls)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_describe(error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses texts that pydantic would accept but are likely mistakes: `1` as a boolean, `9091.0` as an int."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str) and kind is bool and value.lower() not in ("true", "false"):
            raise ValueError(f"{(info.field_name or '').upper()} must be true or false, not {value!r}")
        if isinstance(value, str) and kind is int and not re.fullmatch(r"[+-]?[0-9]+", value.strip()):
            raise ValueError(f"{(info.field_name or '').upper()} must be a whole number, not {value!r}")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, redis_url: str) -> str:
        if redis_url and not redis_url.startswith(REDIS_SCHEMES):
            raise ValueError("REDIS_URL must begin with redis://, rediss:// or unix://")
        return redis_url

    @field_validator("path_secret")
    @classmethod
    def _check_path_secret(cls, path_secret: str) -> str:
        if path_secret and not PATH_SECRET.fullmatch(path_secret):
            raise ValueError("PATH_SECRET must be at least 16 letters, digits, '-' and '_'")
        return path_secret

    @model_validator(mode="after")
    def _check_basic_auth(self) -> Settings:
        if bool(self.basic_auth_user) != bool(self.basic_auth_pass):
            raise ValueError("set both BASIC_AUTH_USER and BASIC_AUTH_PASS, or neither")
        return self

    def replace(self, **changes: Any) -> Settings:
        """Returns these settings with other values for some of them."""
        return Settings(**{**self.model_dump(), **changes})

    def to_env(self) -> dict[str, str]:
        """Returns the environment from which a child process reads these same settings."""
        return {name.upper(): str(value) for name, value in self.model_dump().items()}

    @property
    def may_show_images(self) -> bool:
        """True if the status page shows images; `auto` shows them behind a login or a secret path, and for `demo`."""
        if self.show_pictures == "auto":
            return bool(self.basic_auth_user or self.path_secret or self.model == "demo")
        return self.show_pictures == "true"


KINDS = {"float_parsing": "a number", "finite_number": "a number"}


def _describe(error: ValidationError) -> str:
    """Describes the first wrong setting: its variable and what it must be; never a text, which may be a secret."""
    first = error.errors(include_url=False)[0]
    variable, kind = str(first["loc"][0]).upper() if first["loc"] else "", first["type"]
    context = first.get("ctx", {})
    if kind in KINDS:
        return f"{variable} must be {KINDS[kind]}, not {first['input']!r}"
    if kind == "greater_than_equal":
        return f"{variable} must be at least {context['ge']:g}"
    if kind == "less_than_equal":
        return f"{variable} must be at most {context['le']:g}"
    if kind == "literal_error":
        return f"{variable} must be one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if kind == "value_error":
        return str(context["error"])
    return f"{variable}: {first['msg']}"


def describe_setting(name: str) -> str:
    """Returns the help text of a setting, with its unit."""
    field = Settings.model_fields[name]
    extra = field.json_schema_extra
    unit = extra["unit"] if isinstance(extra, dict) else ""
    return f"{field.description} ({unit})" if unit else str(field.description)


def make_settings_table() -> str:
    """Returns all settings as the Markdown table of the README."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{field.default}`" if field.default != "" else ""
        rows.append(f"| `{name.upper()}` | {default} | {describe_setting(name)} |")
    return "\n".join(rows) + "\n"

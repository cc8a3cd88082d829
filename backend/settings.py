"""All settings, typed and frozen; the environment is read in one function, never at import."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import SettingsError

PRECISIONS = ("auto", "float16", "bfloat16", "float32")
TRAIN = ("thresholds", "encoder", "head", "all")
SECRET = re.compile(r"[A-Za-z0-9_-]{16,}")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMATS = ("text", "json")
SHOW_PICTURES = ("auto", "true", "false")


def _setting(
    default: Any,
    text: str,
    unit: str = "",
    minimum: float | None = None,
    secret: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    metadata = {"text": text, "unit": unit, "minimum": minimum, "choices": choices}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One field a setting; the environment variable is the field's name in capitals."""

    model: str = _setting("IDEA-Research/grounding-dino-tiny", "hub id, folder, original `.pth` file, or `demo`")
    model_dir: Path = _setting(Path("data"), "folder for our data: learned versions, the private Redis' file")
    device: str = _setting("auto", "torch device of the workers, or several with commas; `auto`: all GPUs, or the CPU")
    workers: int = _setting(0, "predict workers that `serve` starts; 0: one for each device", minimum=0)
    redis_url: str = _setting("", "the queue's Redis; empty: a private one is started", secret=True)
    label_studio_url: str = _setting("", "where this machine reaches Label Studio; needed for uploaded pictures")
    label_studio_api_key: str = _setting("", "legacy token or personal access token of Label Studio", secret=True)
    basic_auth_user: str = _setting("", "user that callers must give; empty: no login asked")
    basic_auth_pass: str = _setting("", "password that callers must give", secret=True)
    path_secret: str = _setting("", "the backend is then reached below `/s/<secret>` only", secret=True)
    box_threshold: float = _setting(0.3, "lowest score of a box, where the labeling config says nothing", "0 to 1", 0)
    nms_iou: float = _setting(0.7, "of boxes that overlap more, only the best stays; 1 keeps all", "IoU, 0 to 1", 0)
    train: str = _setting(
        "encoder", f"what training changes, one of {', '.join(TRAIN)}; `head`: all but the backbones", choices=TRAIN
    )
    precision: str = _setting("auto", f"one of {', '.join(PRECISIONS)}; `auto` is float16 on a GPU", choices=PRECISIONS)
    batch_size: int = _setting(0, "pictures in a job and a forward pass; 0: what takes a second and fits", minimum=0)
    predict_deadline: int = _setting(90, "time after which /predict answers with what is finished", "seconds", 1)
    push_above: int = _setting(50, "tasks in a request above which predictions are pushed, with a key", minimum=0)
    preannotate_on_import: bool = _setting(False, "`true`: tasks are predicted as they are imported, with a key")
    forward_timeout: int = _setting(120, "time after which a forward pass counts as hung", "seconds", 1)
    allowed_image_hosts: str = _setting("", "hosts or networks at private addresses with pictures, with commas")
    local_files_document_root: str = _setting("", "Label Studio's folder of local files, where it is mounted here too")
    max_image_pixels: int = _setting(100_000_000, "largest picture", "pixels", 1)
    max_image_bytes: int = _setting(50_000_000, "largest picture file", "bytes", 1)
    port: int = _setting(9090, "port of the web front", minimum=1)
    log_level: str = _setting("INFO", f"one of {', '.join(LOG_LEVELS)}", choices=LOG_LEVELS)
    log_format: str = _setting("text", f"one of {', '.join(LOG_FORMATS)}", choices=LOG_FORMATS)
    show_pictures: str = _setting(
        "auto",
        f"whether the status page shows the last pictures, one of {', '.join(SHOW_PICTURES)}; "
        "`auto`: behind a login or a secret path, and of `demo`",
        choices=SHOW_PICTURES,
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Settings from environment variables; an empty variable counts as not set.

        Raises:
            SettingsError: a value is not of its type or out of range; the text names the variable.
        """
        given = {f.name: env[f.name.upper()] for f in dataclasses.fields(cls) if env.get(f.name.upper())}
        return cls(**{name: _convert(cls, name, text) for name, text in given.items()})

    def to_env(self) -> dict[str, str]:
        """The environment from which a child process reads these same settings."""
        return {f.name.upper(): str(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @property
    def may_show_images(self) -> bool:
        """Whether the status page shows pictures: without a door anybody could look at them."""
        if self.show_pictures == "auto":
            return bool(self.basic_auth_user or self.path_secret or self.model == "demo")
        return self.show_pictures == "true"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            minimum = field.metadata["minimum"]
            if minimum is not None and not getattr(self, field.name) >= minimum:
                raise SettingsError(f"{field.name.upper()} must be at least {minimum}")
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise SettingsError(f"{field.name.upper()} must be one of {', '.join(choices)}")
        if not (self.box_threshold <= 1 and self.nms_iou <= 1):
            raise SettingsError("BOX_THRESHOLD and NMS_IOU must be at most 1")
        if not self.port < 65536:
            raise SettingsError("PORT must be below 65536")
        if self.redis_url and not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise SettingsError("REDIS_URL must begin with redis://, rediss:// or unix://")
        if self.path_secret and not SECRET.fullmatch(self.path_secret):
            raise SettingsError("PATH_SECRET must be at least 16 letters, digits, '-' and '_'")
        if bool(self.basic_auth_user) != bool(self.basic_auth_pass):
            raise SettingsError("set both BASIC_AUTH_USER and BASIC_AUTH_PASS, or neither")


def _convert(cls: type[Settings], name: str, text: str) -> Any:
    kind = type(getattr(cls, name))  # the class attribute is the default
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"{name.upper()} must be true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text) if kind is not type(Path()) else Path(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{name.upper()} must be {wanted}, not {text!r}") from None


def settings_table() -> str:
    """All settings as the Markdown table that the README shows."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Settings):
        unit = f" ({field.metadata['unit']})" if field.metadata["unit"] else ""
        default = f"`{field.default}`" if field.default != "" else ""
        rows.append(f"| `{field.name.upper()}` | {default} | {field.metadata['text']}{unit} |")
    return "\n".join(rows) + "\n"

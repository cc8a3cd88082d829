from collections.abc import Callable
from pathlib import Path

import pytest

from backend.cli.supervisor import list_devices
from backend.errors import SettingsError
from backend.settings import Settings

ReadSettings = Callable[[dict[str, str]], Settings]


@pytest.fixture
def read_settings(monkeypatch: pytest.MonkeyPatch) -> ReadSettings:
    """Reads the settings from an environment with these variables."""

    def read(variables: dict[str, str]) -> Settings:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Settings()

    return read


def test_every_setting_has_a_default(read_settings: ReadSettings) -> None:
    settings = read_settings({})
    assert all(getattr(settings, name) == field.default for name, field in Settings.model_fields.items())


def test_values_are_typed(read_settings: ReadSettings) -> None:
    settings = read_settings({"PORT": "80", "BOX_THRESHOLD": "0.5", "MODEL_DIR": "/x", "MODEL": "demo"})
    assert (settings.port, settings.box_threshold, settings.model_dir) == (80, 0.5, Path("/x"))


def test_an_empty_variable_counts_as_not_set(read_settings: ReadSettings) -> None:
    assert read_settings({"PORT": ""}).port == 9090


def test_a_child_process_reads_the_same(read_settings: ReadSettings) -> None:
    settings = Settings(port=1, box_threshold=0.25, label_studio_api_key="k", model_dir=Path("/a b"))
    assert read_settings(settings.to_env()) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "0"),
        ("PORT", "70000"),
        ("WORKERS", "-1"),
        ("BOX_THRESHOLD", "2"),
        ("BOX_THRESHOLD", "nan"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("SHOW_PICTURES", "yes"),
        ("BASIC_AUTH_USER", "me"),
        ("PREANNOTATE_ON_IMPORT", "perhaps"),
        ("PREANNOTATE_ON_IMPORT", "1"),
        ("PORT", "9091.0"),
        ("REDIS_URL", "localhost:6379"),
    ],
)
def test_a_wrong_value_names_its_variable(read_settings: ReadSettings, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({name: value})


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="PROT"):
        Settings(prot=80)


def test_a_replaced_value_is_checked() -> None:
    assert Settings(port=80).replace(port=81).port == 81
    with pytest.raises(SettingsError, match="PORT must be at least 1"):
        Settings().replace(port=0)


def test_a_wrong_secret_is_not_shown() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings(path_secret="s3cret")
    assert "s3cret" not in str(raised.value)


def test_secrets_are_not_shown() -> None:
    shown = repr(Settings(label_studio_api_key="s3cret", basic_auth_user="me", basic_auth_pass="s3cret"))
    assert "s3cret" not in shown


def test_images_are_shown_behind_a_login_or_secret_path_for_the_demo_or_on_request() -> None:
    assert not Settings().may_show_images
    assert Settings(show_pictures="true").may_show_images
    assert Settings(model="demo").may_show_images
    assert Settings(path_secret="0123456789abcdef").may_show_images
    assert not Settings(model="demo", show_pictures="false").may_show_images


def test_each_device_of_the_setting_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("backend.cli.supervisor.NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_devices("auto") == ["auto"]
    assert list_devices("cuda:1, cuda:3") == ["cuda:1", "cuda:3"]
    for number in range(3):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    assert list_devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert list_devices("cuda") == ["cuda:0", "cuda:1"]
    assert list_devices("cpu") == ["cpu"]


def test_a_variable_in_lower_case_is_ignored(read_settings: ReadSettings) -> None:
    assert read_settings({"port": "1", "Device": "tpu", "MODEL": "demo"}) == Settings(model="demo")

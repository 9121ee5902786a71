"""Flags, environment, config file and defaults; what of it a running server takes over."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from convoynet.server import settings
from convoynet.server.config import ServeConfig
from convoynet.server.host import available_cpus

ROOT = Path(__file__).parents[2]


def effective(tmp_path: Path, file: str = "", environment: dict[str, str] | None = None, **flags: Any) -> ServeConfig:
    """The settings of a file with this text, these variables and these flags."""
    path = tmp_path / "server.toml"
    path.write_text(file)
    return settings.effective({"model_repository": [str(tmp_path)], **flags}, environment or {}, path)


def test_the_nearer_source_wins(tmp_path: Path) -> None:
    file = "grpc_port = 1\nmetrics_port = 1\nmax_queue = 1\n"
    environment = {"CONVOY_GRPC_PORT": "2", "CONVOY_METRICS_PORT": "2", "CONVOY_SERVICE_HOST": "10.0.0.1"}
    config = effective(tmp_path, file, environment, grpc_port=3)
    assert (config.grpc_port, config.metrics_port, config.max_queue) == (3, 2, 1)
    assert config.threads == available_cpus()
    assert config.host == "127.0.0.1"


NEEDED: dict[str, dict[str, Any]] = {
    "load_model": {"model_control_mode": "explicit"},
    "tls_cert": {"tls_key": Path("key")},
    "tls_key": {"tls_cert": Path("certificate")},
    **{name: {"onnx": (".",)} for name in ("input_size", "resize", "interpolation", "channel_order", "labels")},
    "mean": {"onnx": (".",), "std": "1"},
    "std": {"onnx": (".",), "mean": "0"},
    "tls_client_ca": {"tls_cert": Path("certificate"), "tls_key": Path("key")},
}
"""What a setting may not be given without."""


def value_for(name: str, metadata: Any, kind: Any, folder: Path) -> tuple[str, Any]:
    """A text that a setting takes, and the value that it stands for; not its default, where there is a choice."""
    if metadata["choices"]:
        return metadata["choices"][-1], metadata["choices"][-1]
    if kind is bool:
        return "true", True
    if kind is Path:
        return str(folder), folder
    if kind in (int, float):
        low, high = metadata["bounds"] or (1, 7)
        value = kind(min(high, max(low, 7)))
        return str(value), value
    special = {
        "frontends": ("2", "2"),
        "management": ("8101,8100", "8101,8100"),
        "model_repository": (str(folder), (str(folder),)),
        "onnx": (str(folder), (str(folder),)),
        **dict.fromkeys(("mean", "std"), ("0.5", "0.5")),
        **dict.fromkeys(("input_size", "resize"), ("8x9", "8x9")),
    }
    if name in special:
        return special[name]
    return ("word", ("word",)) if kind == tuple[str, ...] else ("word", "word")


@pytest.mark.parametrize("name", [each.name for each in fields(ServeConfig)])
def test_every_setting_is_a_flag_a_key_and_a_variable(tmp_path: Path, name: str) -> None:
    (each,) = (f for f in fields(ServeConfig) if f.name == name)
    text, value = value_for(name, each.metadata, settings._kind(each), tmp_path)
    needed: dict[str, Any] = {"model_repository": [str(tmp_path)], **NEEDED.get(name, {})}
    if name == "model_repository":
        needed = {}
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    flag = f"--{name.replace('_', '-')}"
    flags = vars(parser.parse_args([flag] if value is True else [flag, text]))
    config = settings.effective({**needed, **flags}, {}, None)
    assert getattr(config, name) == value
    assert getattr(settings.effective(needed, {f"CONVOY_{name.upper()}": text}, None), name) == value
    toml = settings.as_toml(config)
    for written in (toml, toml.replace(f"{name} =", f"{name.replace('_', '-')} =")):
        (tmp_path / "again.toml").write_text(written)
        assert settings.effective({}, {}, tmp_path / "again.toml") == config


@pytest.mark.parametrize("text", ['a "b"', "C:\\x", "é✓\U0001f600", "tab\tdel\x7f"])
def test_any_text_survives_the_file(tmp_path: Path, text: str) -> None:
    toml = settings.as_toml(effective(tmp_path, host=text))
    assert effective(tmp_path, toml).host == text


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("grpc_prot = 1", r"'grpc_prot' in '.*server.toml' is not a setting; did you mean 'grpc_port'\?"),
        ("zzz = 1", "'zzz' in .* is not a setting; `convoy serve --print-config` shows those that there are"),
        ("grpc_port = '1'", "'grpc_port' in .* must be an integer, got '1'"),
        ("grpc_port = true", "'grpc_port' in .* must be an integer, got True"),
        ("log_requests = 1", "'log_requests' in .* must be true or false, got 1"),
        ("drain_seconds = 'x'", "'drain_seconds' in .* must be a number, got 'x'"),
        ("host = 1", "'host' in .* must be text, got 1"),
        ("max_queue = 0", "--max-queue must lie in 1 to 1000000, got 0"),
        ("log_format = 'xml'", "--log-format must be one of text, json, got 'xml'"),
        ("grpc-port = 1\ngrpc_port = 2", "has 'grpc_port' twice"),
        ("grpc_port = ", "the config file .* cannot be read: Invalid value"),
    ],
)
def test_a_faulty_file_is_one_clear_line(tmp_path: Path, file: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        effective(tmp_path, file)
    assert "\n" not in str(caught.value)


def test_a_faulty_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"variable CONVOY_GRPC_PORT must be an integer, got 'tcp://10.0.0.1:8001'"):
        effective(tmp_path, environment={"CONVOY_GRPC_PORT": "tcp://10.0.0.1:8001"})
    with pytest.raises(ValueError, match="variable CONVOY_LOG_REQUESTS must be true or false, got 'maybe'"):
        effective(tmp_path, environment={"CONVOY_LOG_REQUESTS": "maybe"})


def test_models_are_looked_for_where_export_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'models' is not a folder; `convoy export` makes one, --model-repository"):
        settings.effective({}, {}, None)
    (tmp_path / "models").mkdir()
    assert settings.effective({}, {}, None).model_repository == ("models",)


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.toml' cannot be read: No such file"):
        settings.effective({}, {}, tmp_path / "absent.toml")


def test_changes_are_parted_by_what_a_running_server_can_take_over(tmp_path: Path) -> None:
    old, new = effective(tmp_path), effective(tmp_path, log_format="json", drain_seconds=3.0, grpc_port=1)
    assert settings.changes(old, new) == ({"drain_seconds": 3.0, "log_format": "json"}, ["grpc_port"])
    assert settings.changes(old, old) == ({}, [])


def test_the_reference_is_that_of_the_code() -> None:
    """`python -c 'from convoynet.server import settings; print(settings.reference())'` writes it anew."""
    assert settings.reference() in (ROOT / "docs" / "operations.md").read_text()


def test_print_config_prints_what_the_file_flags_and_variables_come_to(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("max-queue = 5\n")
    command = [
        sys.executable,
        "-m",
        "convoynet.server.cli",
        "serve",
        "--model-repository",
        str(tmp_path),
        "--log-requests",
    ]
    environment = {**os.environ, "CONVOY_LOG_LEVEL": "error", "CONVOY_CONFIG": str(tmp_path / "server.toml")}
    done = subprocess.run([*command, "--print-config"], capture_output=True, text=True, check=True, env=environment)
    (tmp_path / "printed.toml").write_text(done.stdout)
    config = settings.effective({}, {}, tmp_path / "printed.toml")
    assert (config.max_queue, config.log_requests, config.log_level) == (5, True, "error")

"""Tables keep their numbers at any width of a terminal."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from convoynet.exporter.archs import facts
from convoynet.exporter.commands import compare_command
from convoynet.server import cli
from convoynet.server.client import bench
from convoynet.server.client.load import Load, LoadResult, ServerShare
from convoynet.tables import Column, fitted, show

Texts = pytest.CaptureFixture[str]

ROW = {
    "name": "models/resnet56-pruned-half-distilled-int8",
    "precision": "INT8, FP32",
    "M params": "1,234.567",
    "G MACs": "1,248.752",
    "MB file": "2,512.35",
    "ms at batch 1": "1,234.56 (1,200.12 to 1,300.45)",
    "images/s at batch 32": "12,345.6 (12,000.1 to 13,000.2)",
    "top-1": "76.13 %",
    "top-5": "92.86 %",
}


def words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


@pytest.fixture(params=[40, 60, 80, 120, 200])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The width of the terminal that commands see."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal to rich
    monkeypatch.setenv("TERM", "xterm")
    return request.param


def shown(width: int, *rows: dict[str, str]) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    columns = [Column(name, text=name in ("name", "precision")) for name in ROW]
    with console.capture() as text:
        show(console, columns, [list(row.values()) for row in rows])
    return text.get()


def test_every_number_is_whole_and_no_line_is_too_long(width: int) -> None:
    text = shown(width, ROW, dict.fromkeys(ROW, "") | {"name": "b", "top-1": "70.00 %"})
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for name, cell in ROW.items():
        if name in ("name", "precision"):
            assert "".join(cell.split()) in "".join(text.split()) or width < 80  # folded
        else:
            assert {*cell.split(), *name.split()} <= {*words(text)}
    assert "70.00 %" in text


def test_what_fits_is_one_table() -> None:
    text = shown(200, ROW)
    assert len(text.splitlines()) == 2
    assert words(text.splitlines()[1]) == [word for cell in ROW.values() for word in cell.split()]


def test_what_does_not_fit_is_several_each_with_the_names() -> None:
    text = shown(80, ROW, ROW | {"name": "small"})
    assert text.count("small") == text.count("\n\n") + 1 > 1


def test_without_a_terminal_nothing_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = compare_command.text([ROW, ROW])
    assert len(text.splitlines()) == 3
    assert all(cell in text for cell in ROW.values())


def test_compare_and_bench_at_any_width(width: int, capsys: Texts) -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", compare_command.text([ROW]))
    assert all({*cell.split()} <= {*words(plain)} for name, cell in ROW.items() if name not in ("name", "precision"))
    server = ServerShare(1.0, 1234.5, 1.0, 98765.4, 1.0, 31.9)
    result = LoadResult(
        256, 5, 6, 12345.6, 123456.7, 1, 1234.5, 2345.6, 3456.7, 4567.8, {"UNAVAILABLE": 9}, 0.99, server
    )
    bench._print_table(Load("127.0.0.1:8001", "resnet50", b"", 1), [result])
    out = capsys.readouterr().out
    for number in ("256", "12,346", "123,457", "1,234", "2,346", "3,457", "98,767", "31.9", "0.99", "UNAVAILABLE"):
        assert number in out
    assert "…" not in out


def test_lists_of_networks_and_layers_at_any_width(width: int, capsys: Texts) -> None:
    assert cli.main(["archs"]) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for network in facts.recorded().values():
        assert f"{network.macs / 1e9:.3f}" in out
        assert f"{network.parameters / 1e6:.2f}" in out
    assert cli.main(["inspect", "lenet5"]) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for number in ("120x1x1", "48,120", "10.1 k", "32x32", "15.5", "60,000 parameters; 328,096 multiply-adds"):
        assert number in out
    assert "…" not in out


def test_lines_are_broken_between_words_and_short_ones_are_left_alone() -> None:
    parity = "parity     75 images, error 0.00986 of the spread, 1.4e-02 of the logit"
    text = f"size       243 kB of float32 weights\n{parity}\n{'x' * 50}"
    told = fitted(text, 36, 11).splitlines()
    assert told[0] == "size       243 kB of float32 weights"
    assert told[1:-1] == [
        "parity     75 images, error 0.00986",
        "           of the spread, 1.4e-02 of",
        "           the logit",
    ]
    assert told[-1] == "x" * 50

"""Which of several variants are worth having."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from convoynet.exporter.studies import variants
from convoynet.exporter.studies.changes import Changes, of_answers
from convoynet.exporter.studies.variants import Variant, dominated


def variant(name: str, milliseconds: float, size: int, top1: float | None = None) -> Variant:
    return Variant(name, "fp32", 1000, 2000, size, milliseconds, 1e3 / milliseconds, 8, top1)


def test_a_variant_that_is_worse_in_everything_is_named_with_what_beats_it() -> None:
    found = [variant("a", 2, 10, 0.9), variant("b", 1, 5, 0.8), variant("c", 3, 10, 0.9), variant("d", 1, 6, 0.7)]
    assert dominated(found) == {"c": "a", "d": "b"}


def test_equal_variants_do_not_beat_each_other() -> None:
    assert dominated([variant("a", 2, 10, 0.9), variant("b", 2, 10, 0.9)]) == {}


def test_accuracy_counts_only_where_all_have_one() -> None:
    assert dominated([variant("a", 2, 10, 0.9), variant("b", 1, 5)]) == {"a": "b"}
    assert dominated([variant("a", 2, 10, 0.9), variant("b", 1, 5, 0.8)]) == {}


def test_only_variants_that_answer_the_same_beat_each_other() -> None:
    found = [variant("a", 2, 10), replace(variant("b", 1, 5), group=1), variant("c", 3, 10)]
    assert dominated(found) == {"c": "a"}


def test_what_counted_is_named() -> None:
    found = [variant("a", 2, 10, 0.9), variant("b", 1, 5, 0.8)]
    assert variants.counted(found) == "time, size and accuracy"
    assert variants.counted([replace(found[0], doubt="busy"), found[1]]) == "size and accuracy"
    assert variants.counted([variant("a", 2, 10), variant("b", 1, 5)]) == "time and size (accuracy is not compared)"


def test_the_table_has_ratios_to_the_first() -> None:
    first, second = variant("a", 2, 10, 0.9), variant("b", 1, 5, 0.85)
    assert variants.columns(first, first)["top-1"] == "90.00%"
    row = variants.columns(second, first)
    assert (row["speed"], row["top-1"]) == ("2.00x", "85.00% (-5.00)")


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    for name, found in {
        "accurate": [variant("a", 2, 10, 0.9), variant("b", 1, 5, 0.8), variant("c", 3, 9, 0.7)],
        "sizes": [variant("a", 2, 10), variant("b", 1, 5)],
    }.items():
        variants.plot(found, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(2**24) or []) > 5


def test_names_cover_neither_each_other_nor_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    near = [variant(f"a-long-name-{i}", 1 + i / 100, 10, 0.8 + i / 1000) for i in range(4)]
    variants.plot([*near, variant("far", 2, 100, 0.9)], tmp_path / "plot.png")
    (axes,) = figures[0].axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert axes.get_window_extent().contains(box.x0, box.y0)
        assert axes.get_window_extent().contains(box.x1, box.y1)


def test_the_interval_is_shown() -> None:
    sure = replace(variant("a", 2, 10, 0.9), interval=(0.8912, 0.9088))
    assert variants.columns(sure, sure)["95 % interval"] == "89.1 to 90.9 %"
    assert variants.columns(variant("a", 2, 10), sure)["95 % interval"] == ""


def test_a_speed_that_is_not_believed_is_withheld_and_decides_nothing(tmp_path: Path) -> None:
    first, second = variant("a", 2, 10, 0.9), replace(variant("b", 1, 5, 0.9), doubt="others took 1.5 of 2 cores")
    assert dominated([first, second]) == {"a": "b"}
    assert dominated([replace(first, bytes=4), second]) == {"b": "a"}  # by size alone
    row = variants.columns(second, first)
    assert (row["ms"], row["images/s"], row["speed"]) == ("withheld", "withheld", "")
    assert variants.columns(first, second)["speed"] == ""
    assert second.to_json()["milliseconds"] is None
    assert second.to_json()["doubt"]
    assert first.to_json()["milliseconds"] == 2
    assert variants.doubts([first, second]) == ["b: speed is withheld: others took 1.5 of 2 cores"]
    variants.plot([first, second], tmp_path / "plot.png")


def test_what_changed_is_shown_and_the_drift_of_the_evidence_counts_where_all_have_one() -> None:
    exact = replace(variant("a", 2, 10, 0.9), changes=Changes(0.0, "cat", 0.0, 0.05, 0.0))
    small = replace(variant("b", 1, 5, 0.9), changes=Changes(0.031, "dog", 0.125, 0.06, 0.0123))
    row = variants.columns(small, exact)
    assert (row["flips"], row["worst class"], row["ECE"], row["drift"]) == ("3.10%", "-12.5 dog", "0.060", "0.0123")
    assert variants.columns(exact, exact)["worst class"] == "none"
    assert variants.columns(variant("c", 1, 5), exact)["flips"] == ""
    assert dominated([exact, small]) == {}
    assert variants.counted([exact, small]) == "time, size, accuracy and evidence"
    assert dominated([exact, small, variant("c", 9, 99, 0.9)]) == {"a": "b", "c": "a"}


def test_changes_are_those_of_a_report() -> None:
    assert of_answers(None) is None
    answers = {
        "flips": {"share": 0.25},
        "classes": [{"class": "dog", "images": 8, "lost": 3, "gained": 1}, {"class": "cat", "images": 8}],
        "calibration_error": {"before": 0.1, "after": 0.2},
    }
    assert of_answers(answers) == Changes(0.25, "dog", 0.25, 0.2)

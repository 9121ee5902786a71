"""Attacks and corruptions on the packaged network: the attack keeps its size, beats noise, and hurts INT8 as well."""

import json
from pathlib import Path

import numpy as np
import pytest

from convoynet.exporter.assets import digits
from convoynet.exporter.auditing import robustness as trying
from convoynet.exporter.auditing.corruptions import KINDS
from convoynet.exporter.auditing.gradients import whole
from convoynet.exporter.auditing.robustness import Stress, attack, attacks, robustness
from convoynet.exporter.auditing.subjects import audited
from convoynet.exporter.commands import audit_command
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet

IMAGES, LABELS = digits().test[:80], digits().test_labels[:80]


def test_an_attack_beats_noise_of_its_size_on_both_models(models: Path) -> None:
    sides = audited(models / "digits")[0], audited(models / "digits-int8")[0]
    rows = {row.kind: row for row in attacks(sides, IMAGES, LABELS, (Stress(size=24), 1), Quiet())}
    assert list(rows) == ["none", "noise", "own attack", "attack on the reference"]
    for side in ("before", "after"):
        clean, noise, own = (getattr(rows[kind], side) for kind in ("none", "noise", "own attack"))
        assert clean > 0.9
        assert noise > own + 0.2
    assert rows["attack on the reference"].before == rows["own attack"].before
    assert rows["attack on the reference"].after < rows["noise"].after


@pytest.mark.parametrize("name", ["digits", "digits-int8"])
def test_an_attack_changes_no_pixel_by_more_than_its_size(models: Path, name: str) -> None:
    subject = audited(models / name)[0]
    found = attack(subject, whole(subject), IMAGES[:16], LABELS[:16], 3)
    assert found.dtype == np.uint8
    change = np.abs(found.astype(int) - IMAGES[:16])
    assert change.max() == 3
    assert (attack(subject, whole(subject), IMAGES[:16], LABELS[:16], 3) == found).all()
    assert (attack(subject, whole(subject), IMAGES[:4], LABELS[:4], 0) == IMAGES[:4]).all()


def test_every_corruption_is_tried_on_the_same_pictures(models: Path) -> None:
    one = audited(models / "digits")[0]
    found = robustness((one, one), IMAGES, LABELS, (Stress(80, 5), 1), Quiet())
    assert [row.kind for row in found.rows] == ["none", *KINDS]
    assert found.constants == "CIFAR-10-C"
    for row in found.rows:
        assert row.before == row.after
        assert row.agreement == 1
        assert row.drop_interval[0] < 0 < row.drop_interval[1]
    assert found.rows[0].before > 0.9


def test_the_command_tries_both(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "audit.html"
    arguments = [str(models / "digits-int8"), "--against", str(models / "digits"), "--images", str(classes)]
    more = ["--robustness", "30", "--severity", "5", "--attack", "16", "--html", str(page)]
    assert audit_command.audit([*arguments, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["robustness"]
    assert [row["kind"] for row in found["corruptions"]] == ["none", *KINDS]
    assert {row["images"] for row in found["corruptions"] + found["attack"]["rows"]} == {30}
    assert found["attack"]["size"] == 16
    text = page.read_text()
    assert "severity 5 of CIFAR-10-C, 30 images" in text
    assert "at most 16/255 a pixel" in text
    assert audit_command.audit([*arguments, "--robustness", "12", "--attack", "0", "--drift-images", "0"]) == 0
    out = capsys.readouterr().out
    assert "defocus blur" in out
    assert "PGD" not in out
    assert "evidence" not in out


def test_what_cannot_be_tried_is_one_line() -> None:
    for wrong in ({"severity": 0}, {"severity": 6}, {"size": -1}, {"size": 256}, {"images": -1}):
        with pytest.raises(BadInput, match=r"is not in \d+\.\.\d+"):
            Stress(**wrong)


def test_the_command_states_the_limit_that_holds() -> None:
    assert audit_command._MOST_ATTACKED == trying.MOST_ATTACKED

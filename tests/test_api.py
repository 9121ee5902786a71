"""The Python of README.md, run as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_lines_of_the_readme_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 12
    (tmp_path / "photos").mkdir()
    for index, name in enumerate(("cat", *map(str, range(11)))):
        color = (20 * index, 255 - 20 * index, 40 * (index % 6))
        Image.linear_gradient("L").convert("RGB").resize((64, 48)).rotate(30 * index).point(
            [v * c // 255 for c in color for v in range(256)]
        ).save(tmp_path / "photos" / f"{name}.jpg")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONVOY_TUNE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Prediction(label=" in done.stdout
    assert (tmp_path / "models" / "small" / "config.pbtxt").is_file()

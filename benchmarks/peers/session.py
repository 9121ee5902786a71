"""What every peer serves: the same ONNX Runtime session with the same options, so that only the server differs.

Runs in the environments of the peers: numpy, onnxruntime and Pillow are all that it needs.

    python session.py --models FOLDER --bare SECONDS      images/s of the bare session, as JSON
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


@dataclass
class Stated:
    """A model as FOLDER/models.json states it.

    Attributes:
        name: What clients call it.
        file: The ONNX file.
        datatype: Of the input, in the protocol's words; BYTES takes JPEG files, which are decoded here.
        shape: Of one row; [1] for BYTES.
        classes: Length of one row of the output.
        max_batch: The most rows that one run takes.
        threads: Of the session.
        resize, side: For BYTES: the shorter side after resizing, and the side of the square that is cut out.
    """

    name: str
    file: str
    datatype: str
    shape: list[int]
    classes: int
    max_batch: int
    threads: int
    resize: int = 0
    side: int = 0

    @property
    def dtype(self) -> Any:
        """Numpy's word for the datatype."""
        return {"FP32": np.float32, "UINT8": np.uint8, "BYTES": np.object_}[self.datatype]


class Session:
    """Rows in, logits out; safe to call from several threads."""

    def __init__(self, stated: Stated) -> None:
        self.stated = stated
        options = ort.SessionOptions()
        options.intra_op_num_threads = stated.threads
        options.inter_op_num_threads = 1
        # Idle threads that spin take the cores from the server: none of them would want it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The same sums as Convoy's, which do not overflow on processors without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = ort.InferenceSession(stated.file, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, rows: Any) -> Any:
        """[n, ...] of the stated datatype to logits FP32 [n, classes]."""
        if self.stated.datatype == "BYTES":
            rows = np.stack([self._decoded(data) for data in np.asarray(rows).ravel()])
        return self._session.run(["logits"], {self._input: rows})[0]

    def _decoded(self, data: bytes) -> Any:
        from PIL import Image

        image = Image.open(io.BytesIO(data))
        side, scale = self.stated.side, self.stated.resize / min(image.size)
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
        width, height = (max(round(n * self.stated.resize / min(image.size)), side) for n in image.size)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))


def arguments() -> argparse.Namespace:
    """What every launcher is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bare", type=float, help="measure the bare session for so many seconds a batch size")
    parsed, _ = parser.parse_known_args()
    return parsed


def stated(folder: Path) -> list[Stated]:
    """The models of a folder."""
    return [Stated(**each) for each in json.loads((folder / "models.json").read_text())]


def bare(model: Stated, batch: int, seconds: float) -> float:
    """Images per second in a loop with nothing around it."""
    session = Session(model)
    rows = np.zeros((batch, *model.shape), model.dtype)
    session(rows)
    runs, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        session(rows)
        runs += 1
    return runs * batch / passed


if __name__ == "__main__":
    asked = arguments()
    print(
        json.dumps(
            {
                model.name: max(bare(model, batch, asked.bare) for batch in (1, 8, 32) if batch <= model.max_batch)
                for model in stated(asked.models)
                if model.datatype != "BYTES"
            }
        )
    )

"""A published model as a function: `convoynet.load`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from PIL import Image

from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.api.running import NotStarted, Server, serve
from convoynet.server.client.client import task_of
from convoynet.server.client.connection import ClientError
from convoynet.server.client.operations import required_input
from convoynet.server.client.results import Detection, Prediction, Segmentation
from convoynet.server.datatypes import Array
from convoynet.server.repository.layout import CONFIG_FILE, is_version
from convoynet.server.repository.lone_files import SUFFIX, model_name

# Modes of Pillow's that PNG does not have.
_NOT_IN_PNG = ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La", "PA")
Picture = str | Path | bytes | Image.Image
Results = list[list[Prediction]] | list[Segmentation] | list[list[Detection]]


class LoadedModel:
    """A model that is ready to be called. Made by `load`.

    Attributes:
        name: its name.
        task: "classification", "segmentation" or "detection".
        version: the one that is asked; "" for the newest.
        config: its configuration, as it is served.
        url: of the server that it runs in.
    """

    def __init__(self, server: Server, name: str, version: str = "") -> None:
        self._server, self._client = server, server.client(timeout=None)
        self.name, self.version, self.url = name, version, server.url
        self.config: ModelConfig = self._client.model_config(name, version)
        self.task = task_of(self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, inputs: Array | Mapping[str, Array] | Picture | Sequence[Picture]) -> dict[str, Array]:
        """Run the model, in batches of at most what it takes.

        Args:
            inputs: what the input takes, the batch axis first, as an array (a CPU tensor of PyTorch's is one), or by
                name where there are several; or encoded images: paths, the files' bytes or PIL images, which get the
                preprocessing that was published.

        Returns:
            Arrays by output name, one row for each image.

        Raises:
            ClientError: the inputs do not fit, an image cannot be read, or the engine failed.
        """
        pictures = _pictures(inputs)
        if pictures is not None:
            encoded = np.array([_encoded(picture) for picture in pictures], object)
            inputs = {required_input(self.config).name: encoded}
        elif not isinstance(inputs, Mapping):
            inputs = {self._only_input(): np.asarray(inputs)}
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        size = self.config.max_batch_size
        rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
        if not size or rows <= size:
            return self._client.infer(self.name, arrays, version=self.version)
        parts = [
            self._client.infer(
                self.name, {name: array[at : at + size] for name, array in arrays.items()}, version=self.version
            )
            for at in range(0, rows, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def predict(self, images: Picture | Sequence[Picture], **options: Any) -> Results:
        """What the model says of images: classes, maps or objects, as `Client.classify`, `segment` or `detect`.

        Args:
            images: as for a call.
            options: `top` for classes, `min_score` for objects.

        Raises:
            ClientError: as for a call.
        """
        pictures = _pictures(images)
        if pictures is None:
            raise ClientError("images are paths, the files' bytes or PIL images", grpc.StatusCode.INVALID_ARGUMENT)
        encoded, options = [_encoded(picture) for picture in pictures], {"version": self.version, **options}
        if self.task == "detection":
            return self._client.detect(self.name, encoded, **options)
        if self.task == "segmentation":
            return self._client.segment(self.name, encoded, **options)
        return self._client.classify(self.name, encoded, **options)

    def close(self) -> None:
        """Let go of the engine; calls fail from now on."""
        self._client.close()
        self._server.close()

    def _only_input(self) -> str:
        names = [tensor.name for tensor in self.config.input if not tensor.optional]
        if len(names) != 1:
            raise ClientError(
                f"inputs is a single array, and model '{self.name}' has the inputs {', '.join(names)}: give arrays by "
                "name",
                grpc.StatusCode.INVALID_ARGUMENT,
            )
        return names[0]


def load(path: str | Path, **options: Any) -> LoadedModel:
    """Load a published model as a function, in the engine that serves it.

        with convoynet.load("models/lenet5") as model:
            model(images)["logits"]            # arrays in, arrays out
            model.predict("seven.png", top=3)  # with the preprocessing and the labels that were published

    It runs in a process of its own, as under `convoy serve`, and is ended by `close`, at the end of the `with` block,
    or with this process.

    Args:
        path: a model's folder in a repository, that of a version which is served, or an ONNX file.
        options: settings of `serve`, such as `threads=1`.

    Raises:
        NotStarted: there is no such model, or it cannot be served; the message says why.
    """
    folder, version = Path(path).resolve(), ""
    if is_version(folder.name) and (folder.parent / CONFIG_FILE).is_file():
        folder, version = folder.parent, folder.name
    name = options.pop("model_name", "") or (model_name(folder) if folder.is_file() else folder.name)
    if not folder.is_dir() and not folder.name.endswith(SUFFIX):
        raise NotStarted(f"{path}: no such folder; give a model's folder in a repository, such as models/resnet50")
    server = serve(folder, model_name=name, **options)
    try:
        with server.client(timeout=None) as client:
            served = {model.name: model.version for model in client.statistics()}
            if list(served) != [name]:
                first = next(iter(served), "")
                raise NotStarted(f"{path} is no model's folder, but one of models: give that of one, such as {first}")
            if not client.model_ready(name, version):
                raise NotStarted(f"{path}: its config serves version {served[name]}, and not {version}")
        return LoadedModel(server, name, version)
    except BaseException:
        server.close()
        raise


def _pictures(given: object) -> list[Picture] | None:
    """Encoded images, where these are such."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    pictures = [one for one in several if isinstance(one, str | Path | bytes | Image.Image)]
    return pictures if pictures and len(pictures) == len(several) else None


def _encoded(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    try:
        if not isinstance(picture, Image.Image):
            return Path(picture).read_bytes()
        written = io.BytesIO()
        (picture.convert("RGB") if picture.mode in _NOT_IN_PNG else picture).save(written, "PNG")
        return written.getvalue()
    except OSError as error:
        raise ClientError(f"{picture}: {error.strerror or error}", grpc.StatusCode.INVALID_ARGUMENT) from error

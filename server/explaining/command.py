"""`convoy explain --method`: a run over the images."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convoynet.errors import ConvoyError
from convoynet.server.api.loaded import load
from convoynet.server.client.access import Security
from convoynet.server.client.arguments import security
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.client import Client
from convoynet.server.client.errors import ClientError, invalid
from convoynet.server.client.operations import image_input_of, region_of
from convoynet.server.client.predict import config_of, is_image
from convoynet.server.explaining import flags, results
from convoynet.server.explaining.asking import Asker
from convoynet.server.explaining.picture import picture_of
from convoynet.server.explaining.results import Written
from convoynet.server.explaining.subject import Wanted, maps_of, subject_of
from convoynet.server.explaining.subject import check as check_task
from convoynet.tables import Column, show

_INTERRUPTED = 130


@dataclass(frozen=True)
class _Served:
    """A model on a server; `alone` where no other can ask it."""

    url: str
    model: str
    version: str
    security: Security
    alone: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Explain what a model says of images, as the flags of `add_flags` say; returns the exit code."""
    written: list[Written] = []
    try:
        with _terminated_as_interrupted(), _served(arguments) as served:
            asyncio.run(_explain(served, arguments, written))
    except ConvoyError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        done = sum(not one.error for one in written)
        _complain(f"interrupted; {f'{done} of {len(arguments.images)} images are' if done else 'nothing is'} explained")
        return _INTERRUPTED
    if arguments.json:
        json.dump([one.as_json(arguments.method, flags.seed_of(arguments)) for one in written], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(written)
    for one in written:
        if one.error:
            _complain(one.error)
    failed = sum(bool(one.error) for one in written)
    return 0 if not failed else 2 if failed == len(written) else 1


@contextmanager
def _served(arguments: argparse.Namespace) -> Iterator[_Served]:
    """The model on the server that was named, or on one of its own."""
    if arguments.local is None:
        yield _Served(arguments.url, arguments.model, arguments.version, security(arguments))
        return
    with load(arguments.local, **flags.stated(arguments)) as model:
        yield _Served(model.url, model.name, arguments.version or model.version, {"tls": False}, alone=True)


async def _explain(served: _Served, arguments: argparse.Namespace, written: list[Written]) -> None:
    """Explain image after image; each is appended to `written` when its files are there."""
    with Client(served.url, **served.security) as client:
        config = config_of(client, served.model, served.version)
    try:
        image_input = image_input_of(config)
    except ClientError as error:
        how = "; say --mean and --std, or of a file that takes pixels --input-size, as for `convoy serve`"
        hint = how if str(arguments.local).endswith(".onnx") else ""
        raise ClientError(f"{error}{hint}", error.code) from error
    check_task(config)
    maps = maps_of(config, arguments.maps) if flags.reads_maps(arguments) else ""
    make = flags.masks_for(arguments, image_input.size, maps)
    wanted = Wanted(arguments.class_name, arguments.object)
    color = None if arguments.baseline == "mean" else arguments.baseline
    places = results.paths(arguments.images, arguments.output or Path(flags.FOLDER))
    async with AsyncClient(served.url, timeout=None, **served.security) as asked:
        try:
            subject = await subject_of(asked, config, served.version, arguments.time_limit, bare=bool(maps))
        except ClientError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise invalid(
                f"no answer from {served.url} within {arguments.time_limit:g} s; give it a longer --time-limit"
            ) from error
        share = None if served.alone else arguments.share
        asker = Asker(asked, config, subject, served.version, [maps] if maps else [], share)
        for image, place in zip(arguments.images, places, strict=True):
            try:
                data = image.read_bytes()
                if not is_image(data):
                    raise invalid("not an image file")
                picture = picture_of(data, image_input, color)
                with _progress(image.name) as tell:
                    found = await asker.explain(picture, wanted, make, arguments.time_limit, tell)
                written.append(results.write(image, data, found, region_of(image_input, data), place))
            except ClientError as error:
                written.append(Written(image, error=f"{image}: {error}"))
            except OSError as error:
                at = "" if error.filename in (None, str(image)) else f"{error.filename}: "
                written.append(Written(image, error=f"{image}: {at}{error.strerror or error}"))


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far it is, and the time left, where somebody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(name), total=None)
        yield lambda done, count: progress.update(task, completed=done, total=count)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_table(written: Sequence[Written]) -> None:
    console = Console()
    rows = []
    for one in written:
        if one.found is not None:
            target, found = one.found.target, one.found
            masks = f"{found.done:,}" if found.done == found.count else f"{found.done:,} of {found.count:,}"
            cells = [str(one.image), target.label, f"{target.score:.4f}", one.evidence, masks, f"{found.seconds:.1f}"]
            rows.append(cells)
    if not rows:
        return
    numbers = map(Column, ("score", "evidence", "masks", "s"))
    show(console, [Column("image", text=True), Column("label", text=True), *numbers], rows)
    for one in written:
        if one.found is not None and one.found.done < one.found.count:
            console.print(
                f"{escape(str(one.image))}: the time was over after {one.found.done:,} of {one.found.count:,} masks; "
                "--time-limit gives more",
                highlight=False,
                soft_wrap=True,
            )
    folder = next(one.picture.parent for one in written if one.picture is not None)
    console.print(f"pictures and numbers (.npy) in {escape(str(folder))}", highlight=False, soft_wrap=True)


def _complain(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"convoy explain: {escape(line)}", highlight=False)

"""Ensembles: tensors find their way, models may come and go, and what does not fit is refused with one line."""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import Draining, EngineFailed, InvalidRequest, LoadFailed, ModelNotReady
from convoynet.server.repository.specs import Found
from convoynet.server.types import InferRequest, InferResult, RequestedOutput
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums
from tests.server.onnx_models import write_colors
from tests.server.repositories import EnsembleStage, request, until, write_ensemble, write_plain


def chain(root: Path) -> EnsembleStage:
    """`both` is a (+ 1), then b (+ 2)."""
    write_plain(root, "a")
    write_plain(root, "b", versions=(2,))
    write_ensemble(root, "both", [("b", "t", "y"), ("a", "x", "t")])
    return EnsembleStage(root)


async def test_steps_run_in_the_order_of_their_tensors_and_load_with_the_ensemble(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    ensemble = stage.core.model("both")
    result = await ensemble.infer(request(ensemble.spec, 10, rows=3))
    assert result.outputs["y"].tolist() == [[13], [13], [13]]
    assert (result.rows, ensemble.statistics.executions, ensemble.inflight) == (3, 1, 0)
    assert [model.statistics.success.count for model in stage.made] == [1, 1]
    with pytest.raises(InvalidRequest, match="batch-size must be <= 4"):
        await ensemble.infer(request(ensemble.spec, 10, rows=5))


async def test_steps_that_do_not_need_each_other_run_side_by_side(tmp_path: Path) -> None:
    write_plain(tmp_path, "a")
    write_plain(tmp_path, "b")
    folder = write_ensemble(tmp_path, "fork", [("a", "x", "y"), ("b", "x", "z")])
    with (folder / "config.pbtxt").open("a") as file:
        file.write('output { name: "z" data_type: TYPE_FP32 dims: [1] }')
    stage = EnsembleStage(tmp_path)
    await stage.core.load("fork")
    for model in stage.made:
        model.answering.clear()
    ensemble = stage.core.model("fork")
    asked = request(ensemble.spec, 1)
    answer = asyncio.ensure_future(ensemble.infer(asked))
    await until(lambda: all(model.inflight == 1 for model in stage.made))
    for model in stage.made:
        model.answering.set()
    assert list((await answer).outputs) == ["y", "z"]
    asked.outputs = (RequestedOutput("z"),)
    assert list((await ensemble.infer(asked)).outputs) == ["z"]


async def test_a_failure_of_one_step_is_the_ensembles_and_cancels_the_others(tmp_path: Path) -> None:
    write_plain(tmp_path, "a")
    write_plain(tmp_path, "b")
    folder = write_ensemble(tmp_path, "fork", [("a", "x", "y"), ("b", "x", "z")])
    stage = EnsembleStage(tmp_path)
    await stage.core.load("fork")
    slow, broken = sorted(stage.made, key=lambda m: m.spec.name)
    slow.answering.clear()

    async def fail(request: object) -> None:
        raise EngineFailed("no")

    broken.infer = fail  # type: ignore[method-assign, assignment]
    ensemble = stage.core.model("fork")
    with pytest.raises(EngineFailed, match="no"):
        await ensemble.infer(request(ensemble.spec))
    assert slow.inflight == 0
    assert (broken.statistics.failures, slow.statistics.failures) == ({"BACKEND": 1}, {"CANCELED": 1})
    assert folder.exists()


async def test_a_step_is_replaced_between_two_steps_of_a_request(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    first = next(m for m in stage.made if m.spec.name == "a")
    first.answering.clear()
    ensemble = stage.core.model("both")
    answer = asyncio.ensure_future(ensemble.infer(request(ensemble.spec)))
    await until(lambda: first.inflight == 1)
    write_plain(tmp_path, "b", versions=(5,))
    await stage.core.load("b")
    first.answering.set()
    assert (await answer).outputs["y"].tolist() == [[6]]


async def test_a_step_is_unloaded_when_what_its_ensemble_began_is_answered(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    first, last = sorted(stage.made, key=lambda m: m.spec.name)
    first.answering.clear()
    ensemble = stage.core.model("both")
    answer = asyncio.ensure_future(ensemble.infer(request(ensemble.spec)))
    await until(lambda: first.inflight == 1)
    unload = asyncio.ensure_future(stage.core.unload("b"))
    await until(lambda: ensemble.state != "ready")
    with pytest.raises(ModelNotReady, match="model 'b' is being unloaded"):
        await ensemble.infer(request(ensemble.spec))
    assert not last.closed
    first.answering.set()
    assert (await answer).outputs["y"].tolist() == [[3]]
    await unload
    assert last.closed
    assert stage.changes.count("both") >= 3
    lines = {line.name: line for line in await stage.core.index()}
    assert lines["both"].state == "UNAVAILABLE"
    assert "unknown model: 'b'" in lines["both"].reason
    await stage.core.load("b")
    assert await stage.ask("both") == 3


async def test_a_step_that_no_longer_fits_takes_the_ensemble_out(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    write_plain(tmp_path, "b", versions=(2,), dims=9)
    await stage.core.load("b")
    ensemble = stage.core.model("both")
    assert ensemble.state == "failed"
    assert "has shape [-1, 9]" in ensemble.reason


async def test_an_ensemble_drains_before_its_models(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    write_ensemble(tmp_path, "outer", [("both", "x", "y")])
    await stage.core.load("outer")
    first = next(m for m in stage.made if m.spec.name == "a")
    first.answering.clear()
    outer = stage.core.model("outer")
    answer = asyncio.ensure_future(outer.infer(request(outer.spec)))
    await until(lambda: first.inflight == 1)
    drain = asyncio.ensure_future(stage.core.drain())
    await until(lambda: outer.state == "draining")
    with pytest.raises(Draining):
        await outer.infer(request(outer.spec))
    own = asyncio.ensure_future(outer.drain())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not own.done()
    first.answering.set()
    await asyncio.gather(drain, own)
    assert (await answer).outputs["y"].tolist() == [[3]]


async def test_a_client_that_goes_away_is_counted(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    stage.made[0].answering.clear()
    stage.made[1].answering.clear()
    ensemble = stage.core.model("both")
    answer = asyncio.ensure_future(ensemble.infer(request(ensemble.spec)))
    await until(lambda: any(m.inflight for m in stage.made))
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    assert sum(model.statistics.failures["CANCELED"] for model in stage.made) == 1
    assert ensemble.inflight == 0


def edit(before: str, after: str) -> Callable[[Path], object]:
    """Changes the config of the ensemble `both`."""

    def change(root: Path) -> None:
        file = root / "both" / "config.pbtxt"
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))

    return change


STEP_A = (
    'step { model_name: "a" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "t" } }'
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            edit('model_name: "a"', 'model_name: "absent"'),
            "a step's model cannot be asked: model 'absent' failed to load",
        ),
        (edit('model_name: "a"', 'model_name: "both"'), "its steps lead back to it: both -> both"),
        (edit('model_name: "a"', 'model_name: "../a"'), "may hold letters"),
        (edit('model_name: "a"', 'model_name: "a" model_namespace: "n"'), "model_namespace"),
        (edit('model_name: "a" model_version: -1', 'model_name: "a" model_version: -3'), "must be -1 or a version"),
        (edit('model_name: "a" model_version: -1', 'model_name: "a" model_version: 9'), "'a' version 9 is not found"),
        (edit('value: "x"', 'value: "y"'), "steps wait for each other"),
        (edit('value: "x"', 'value: "z"'), "'z' is no input of it and no output of a step"),
        (edit('value: "y"', 'value: "x"'), "'x' has two sources"),
        (edit('value: "y"', 'value: "t"'), "'t' has two sources"),
        (edit('key: "y" value: "y"', 'key: "z" value: "y"'), "'z' is no output of step 'b'; it has y"),
        (edit('key: "x" value: "x"', 'key: "z" value: "x"'), "'z' is no input of step 'a'; it has x"),
        (edit('input_map { key: "x" value: "x" } ', ""), "leaves out its input 'x'"),
        (edit(' output_map { key: "y" value: "y" }', ""), "'y' is no input of it and no output"),
        (edit("TYPE_FP32", "TYPE_FP16"), "is FP32, but what the ensemble connects to it is FP16"),
        (edit("dims: [1]", "dims: [2]"), "has shape [-1, 1], but what the ensemble connects to it has [-1, 2]"),
        (edit("max_batch_size: 4", "max_batch_size: 9"), "max_batch_size 9 is above that of its step 'b', 8"),
        (edit("ensemble_scheduling", "dynamic_batching"), "has no field|needs at least one step"),
        (lambda root: write_ensemble(root, "a", [("both", "x", "y")]), "failed to load"),
    ],
)
async def test_an_ensemble_that_does_not_fit_is_refused_with_one_line(
    tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    stage = chain(tmp_path)
    change(tmp_path)
    with pytest.raises(LoadFailed) as caught:
        await stage.core.load("both")
    text = str(caught.value)
    assert reason in text or re.search(reason, text), text
    assert str(tmp_path) not in text


async def test_a_cycle_through_loaded_ensembles_is_found(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    write_ensemble(tmp_path, "outer", [("both", "x", "y")])
    await stage.core.load("outer")
    edit('model_name: "a"', 'model_name: "outer"')(tmp_path)
    with pytest.raises(LoadFailed, match="its steps lead back to it: both -> outer -> both"):
        await stage.core.load("both")
    assert await stage.ask("outer") == 3


async def test_an_ensemble_is_served_like_a_model(tmp_path: Path, serving: Serving) -> None:
    fake_model(tmp_path, "sum")
    fake_model(tmp_path, "half")
    folder = tmp_path / "both"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: [4] }
        output { name: "s" data_type: TYPE_FP32 dims: [1] }
        output { name: "h" data_type: TYPE_FP32 dims: [1] }
        ensemble_scheduling {
          step { model_name: "sum" input_map { key: "x" value: "x" } output_map { key: "y" value: "s" } }
          step { model_name: "half" input_map { key: "x" value: "x" } output_map { key: "y" value: "h" } }
        }
        """
    )
    async with serving() as running:
        response = await running.stub.ModelInfer(infer_request(1, 2, 3, model="both"))
        assert sums(response) == [1, 2, 3]
        assert [output.name for output in response.outputs] == ["s", "h"]
        config = (await running.stub.ModelConfig(pb.ModelConfigRequest(name="both"))).config
        assert (config.platform, len(config.ensemble_scheduling.step)) == ("ensemble", 2)
        statistics = await running.stub.ModelStatistics(pb.ModelStatisticsRequest(name="both"))
        assert statistics.model_stats[0].inference_count == 3
        assert running.metric("convoy_inferences_total", model="both", version="1") == 3


async def test_a_step_may_map_an_optional_input_or_leave_it_out(tmp_path: Path, serving: Serving) -> None:
    write_colors(tmp_path, explains=True)
    folder = tmp_path / "both"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_UINT8 dims: [8, 8, 3] }
        input { name: "k" data_type: TYPE_INT64 dims: [1] }
        output { name: "asked" data_type: TYPE_FP32 dims: [8, 8] }
        output { name: "plain" data_type: TYPE_FP32 dims: [8, 8] }
        ensemble_scheduling {
          step { model_name: "colors" input_map { key: "input" value: "x" }
                 input_map { key: "explain_class" value: "k" } output_map { key: "explanation" value: "asked" } }
          step { model_name: "colors" input_map { key: "input" value: "x" }
                 output_map { key: "explanation" value: "plain" } }
        }
        """
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)

    def asked(*classes: int) -> pb.ModelInferRequest:
        message = pb.ModelInferRequest(model_name="both")
        message.inputs.add(name="x", datatype="UINT8", shape=pixels.shape)
        message.inputs.add(name="k", datatype="INT64", shape=[2, 1])
        message.raw_input_contents.extend((pixels.tobytes(), np.array(classes, np.int64).tobytes()))
        return message

    async with serving() as running:
        answer = await running.stub.ModelInfer(asked(2, 0))
        found, plain = (np.frombuffer(raw, np.float32).reshape(2, 8, 8) for raw in answer.raw_output_contents)
        np.testing.assert_allclose(found, np.stack([pixels[0, ..., 2], pixels[1, ..., 0]]), rtol=1e-5)
        np.testing.assert_allclose(plain, pixels.mean(3), rtol=1e-5)
        code, text = await code_of(running.stub.ModelInfer(asked(2, 3)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "input 'explain_class' for model 'colors' holds 3, -1 to 2 are allowed" in text


async def test_encoded_images_are_decoded_for_each_step_that_wants_pixels(tmp_path: Path, serving: Serving) -> None:
    for name in ("colors", "again"):
        write_colors(tmp_path, name)
    folder = tmp_path / "both"
    (folder / "1").mkdir(parents=True)
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    steps = "".join(
        f'step {{ model_name: "{name}" input_map {{ key: "input" value: "image" }} '
        f'output_map {{ key: "logits" value: "{name}" }} }}'
        for name in ("colors", "again")
    )
    (folder / "config.pbtxt").write_text(
        f"""
        platform: "ensemble" max_batch_size: 8
        input {{ name: "image" data_type: TYPE_STRING dims: [1] }}
        output {{ name: "colors" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }}
        output {{ name: "again" data_type: TYPE_FP32 dims: [3] }}
        ensemble_scheduling {{ {steps} }}
        """
    )
    images = []
    for color in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(file, "PNG")
        images.append(file.getvalue())
    message = pb.ModelInferRequest(model_name="both")
    message.inputs.add(name="image", datatype="BYTES", shape=[2, 1]).contents.bytes_contents.extend(images)
    message.outputs.add(name="colors").parameters["classification"].int64_param = 1
    message.outputs.add(name="again")
    async with serving() as running:
        response = await running.stub.ModelInfer(message)
        labelled, raw = response.raw_output_contents
        assert b":0:red" in labelled
        assert b":2:blue" in labelled
        assert np.frombuffer(raw, np.float32).reshape(2, 3).tolist() == [[10, 0, 0], [0, 0, 10]]
        message.inputs[0].contents.bytes_contents[1] = b"no image"
        code, text = await code_of(running.stub.ModelInfer(message))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, text


def diamonds(root: Path, depth: int, names: tuple[str, ...] = ("e",), width: int = 2) -> None:
    """Ensembles of which each runs those below it, of all `names`, `width` times together; the lowest run `plain`."""
    write_plain(root, "plain")
    for level in range(1, depth + 1):
        below = [f"{name}{level - 1}" for name in names] if level > 1 else ["plain"]
        for name in names:
            steps = [(below[i % len(below)], "x", "y" if not i else f"unused{i}") for i in range(width)]
            write_ensemble(root, f"{name}{level}", steps)


@pytest.mark.parametrize("names", [("e",), ("a", "b")])
async def test_ensembles_of_ensembles_cost_no_more_to_load_than_there_are(
    tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    diamonds(tmp_path, 40, names)
    stage = EnsembleStage(tmp_path)
    reads = Counter[str]()
    read = stage.repository.read

    async def counting(name: str, *more: Any) -> list[Found]:
        reads[name] += 1
        return await read(name, *more)

    monkeypatch.setattr(stage.repository, "read", counting)
    await stage.core.start(["*"])
    ready = {name for name in await stage.repository.names() if stage.core._entries[name].versions}
    assert ready == {"plain", *(f"{name}{level}" for name in names for level in range(1, 9))}
    assert max(reads.values()) <= len(reads)
    top = stage.core.model(f"{names[0]}8")
    assert (top.state, top.runs, top.depth) == ("ready", 256, 8)
    assert await stage.ask(f"{names[0]}8") == 1
    assert "nested more than 8 deep" in stage.core.failed[(f"{names[0]}40", "")]


async def test_one_request_is_worth_a_bounded_number_of_runs(tmp_path: Path) -> None:
    diamonds(tmp_path, 3, width=11)
    stage = EnsembleStage(tmp_path)
    with pytest.raises(LoadFailed, match="would come to 1331 runs of models, 1024 are allowed"):
        await stage.core.load("e3")
    assert await stage.ask("e2") == 1
    diamonds(tmp_path, 3, width=10)
    for name in ("e1", "e2", "e3"):
        await stage.core.load(name)
    top = stage.core.model("e3")
    assert top.runs == 1000
    write_ensemble(tmp_path, "e1", [("plain", "x", "y"), *(("plain", "x", f"t{i}") for i in range(20))])
    await stage.core.load("e1")
    assert "would come to 2100 runs" in top.reason


async def test_two_ensembles_that_have_each_other_as_steps_are_refused(tmp_path: Path) -> None:
    write_ensemble(tmp_path, "a", [("b", "x", "y")])
    write_ensemble(tmp_path, "b", [("a", "x", "y")])
    write_ensemble(tmp_path, "above", [("a", "x", "y")])
    stage = EnsembleStage(tmp_path, "none")
    await stage.core.start()
    failed = stage.core.failed
    assert failed[("a", "")] == "its steps lead back to it: a -> b -> a"
    assert failed[("b", "")] == "its steps lead back to it: b -> a -> b"
    assert failed[("above", "")] == "a step leads back to itself: a -> b -> a"


async def test_a_timeout_counts_once_for_all_steps(tmp_path: Path) -> None:
    stage = chain(tmp_path)
    await stage.core.load("both")
    seen: list[InferRequest] = []
    for model in stage.made:
        infer = model.infer

        async def noting(asked: InferRequest, infer: Any = infer) -> InferResult:
            seen.append(asked)
            return await infer(asked)

        model.infer = noting  # type: ignore[method-assign]
    ensemble = stage.core.model("both")
    before = time.monotonic()
    await ensemble.infer(replace(request(ensemble.spec), timeout_us=6_000_000_000))
    await ensemble.infer(replace(request(ensemble.spec), timeout_us=6_000_000_000, deadline=before + 600))
    first, second, *others = seen
    assert first.deadline == second.deadline
    assert before + 6000 <= (first.deadline or 0) <= time.monotonic() + 6000
    assert [asked.deadline for asked in others] == [before + 600] * 2
    assert {asked.timeout_us for asked in seen} == {0}

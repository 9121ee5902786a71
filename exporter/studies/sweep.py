"""Try recipes one after another, and keep what each gave: resumed where it stopped.

What is wrong with any of them is said before PyTorch is imported.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from convoynet.exporter import assets, atomic_file, recipe
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.evidence.report import JSON_FILE
from convoynet.exporter.evidence.speed import raw
from convoynet.exporter.evidence.told import PAGE_FILE as REPORT_PAGE
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.pipeline import first_look
from convoynet.exporter.progress import Progress, duration
from convoynet.exporter.publishing.published import read_published
from convoynet.exporter.recipe import Finetune, Int8, Prune, Step, trains
from convoynet.exporter.studies import changes, variants
from convoynet.exporter.studies.changes import Changes
from convoynet.exporter.studies.variants import Variant

if TYPE_CHECKING:
    from convoynet.exporter.evidence.report import Report

STATE_FILE, PLOT_FILE, PAGE_FILE = "sweep.json", "front.png", "front.html"
_TEMPLATE = "sweep.html.j2"
_RECOVERY = Finetune(steps=150)

# What is tried where no recipes are given.
USUAL: Mapping[str, tuple[Step, ...]] = {
    "float32": (),
    "int8": (Int8(),),
    "pruned-25-int8": (Prune(0.25), _RECOVERY, Int8()),
    "pruned-50": (Prune(0.5), _RECOVERY),
    "pruned-50-int8": (Prune(0.5), _RECOVERY, Int8()),
    "pruned-75-int8": (Prune(0.75), _RECOVERY, Int8()),
}
# The same of an ONNX file, which is neither pruned nor trained.
USUAL_OF_FILES: Mapping[str, tuple[Step, ...]] = {
    "float32": (),
    "int8": (Int8(),),
    "int8-percentile": (Int8("percentile"),),
    "int8-entropy": (Int8("entropy"),),
    "int8-refined": (Int8(equalize=True, correct_bias=True),),
}


@dataclass(frozen=True)
class Result:
    """What a recipe gave: a variant, or why it was refused; and the network as it was measured beside it."""

    name: str
    recipe: str
    fingerprint: str
    variant: Variant | None = None
    refused: str = ""
    baseline: Variant | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it for programs, without the speeds that are withheld."""
        sides = {"variant": self.variant, "baseline": self.baseline}
        return asdict(self) | {name: None if side is None else side.to_json() for name, side in sides.items()}


def sweep(
    config: ExportConfig,
    recipes: Mapping[str, tuple[Step, ...]] | None,
    output: Path,
    progress: Progress,
    finetune: Path | None = None,
) -> list[Result]:
    """Export one network by several recipes, and draw what they gave.

    Every recipe becomes a model of its own, "NAME-RECIPE", in the repository. A recipe that is refused is kept with the
    reason; so is one that the network turns out not to take, which is tried again the next time. Each result is written
    as it comes, so that an interrupted sweep goes on where it stopped; a result counts as long as recipe, options
    and weights are the same and the model is there.

    Args:
        config: everything but the steps, and the images to train on.
        recipes: name -> steps; None or none for the usual ones.
        output: folder for sweep.json, front.png and front.html.
        progress: shows the work.
        finetune: folder of images for the recipes that train.

    Raises:
        BadInput: what is wrong with the options or with a recipe before any work, or no recipe could be tried.
    """
    recipes = recipes or (USUAL_OF_FILES if is_onnx(config.arch) else USUAL)
    known = _known(output / STATE_FILE)
    if finetune is not None and not any(map(trains, recipes.values())):
        raise BadInput(f"--finetune {finetune}: none of the recipes trains; {_no_training(config)}drop this")
    configs = {name: _configured(config, name, steps, finetune) for name, steps in recipes.items()}
    done = {name: known[name] for name, one in configs.items() if name in known and _is_there(one, known[name])}
    for name, one in configs.items():
        if name not in done:
            first_look.check(one)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    tried, began = 0, time.monotonic()
    for name, one in configs.items():
        if name in done:
            results.append(done[name])
        else:
            missing = len(configs) - len(done) - tried
            left = f", about {duration((time.monotonic() - began) / tried * missing)} left" if tried else ""
            with progress.step(f"recipe {name}, {len(results) + 1} of {len(configs)}{left}"):
                results.append(_try(name, one, progress))
                results[-1] = _with_evidence(results, configs, progress)
            tried += 1
        with _writing(output):
            _write(output, results, configs)
    if not any(result.fingerprint for result in results):
        raise BadInput(f"recipe {results[0].name}: {results[0].refused}")
    return results


def _configured(config: ExportConfig, name: str, steps: tuple[Step, ...], finetune: Path | None) -> ExportConfig:
    """The export of one recipe.

    Raises:
        BadInput: the recipe and the options do not go together; the message names it.
    """
    try:
        return replace(
            config,
            steps=steps,
            name=f"{config.model_name}-{name}",
            version=1,
            force=True,
            finetune=finetune if trains(steps) else None,
        )
    except BadInput as error:
        raise BadInput(f"recipe {name}: {error}") from error


def _no_training(config: ExportConfig) -> str:
    return "an ONNX file is not trained, " if is_onnx(config.arch) else "add a step to one, or "


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"--output {output} cannot be written: {error.strerror or error}; choose another") from error


def _try(name: str, config: ExportConfig, progress: Progress) -> Result:
    from convoynet.exporter.pipeline import pipeline

    fingerprint = _fingerprint(config)
    text = recipe.to_toml(config.steps)
    try:
        report = pipeline.run(config, progress).report
    except Refused as refused:
        return Result(name, text, fingerprint, refused=str(refused))
    except BadInput as error:  # perhaps of a file that is another one the next time
        return Result(name, text, "", refused=str(error))
    return Result(name, text, fingerprint, _variant(name, report), baseline=_baseline(report))


def _with_evidence(results: Sequence[Result], configs: Mapping[str, ExportConfig], progress: Progress) -> Result:
    """The last result, with how far the evidence moved from the first model to which nothing was done.

    Where it cannot be said the column stays empty: `convoy audit` says why.
    """
    from convoynet.exporter.data.images import labelled_images

    last, config = results[-1], configs[results[-1].name]
    variant = last.variant
    exact = next((configs[one.name] for one in results if one.variant is not None and not one.recipe), None)
    if exact is None or config.eval is None or variant is None or variant.changes is None:
        return last
    model = _folder(config)
    images = [image for image, _ in labelled_images(config.eval, read_published(model).labels)]
    moved, _ = changes.drift(_folder(exact), model, images, progress)
    return replace(last, variant=replace(variant, changes=replace(variant.changes, drift=moved)))


def _variant(name: str, report: Report) -> Variant:
    rows = sorted(report.speed["batches"], key=lambda row: row["batch"])
    smallest, largest = rows[0]["batch"], rows[-1]["batch"]
    return Variant(
        name=name,
        precision=report.precision,
        parameters=report.parameters["after"],
        macs=report.macs["after"],
        bytes=int(report.formats[0]["bytes"]),
        milliseconds=round(1e3 * smallest / raw(report.speed, smallest), 4),
        images_per_second=round(raw(report.speed, largest), 2),
        batch=int(largest),
        top1=None if report.accuracy is None else report.accuracy.top1,
        agreement=report.parity.agreement,
        doubt=next((row["withheld"] for row in rows if row["withheld"]), ""),
        interval=report.parity.agreement_interval if report.accuracy is None else report.accuracy.interval,
        changes=changes.of_answers(report.answers),
    )


def _baseline(report: Report) -> Variant:
    """The network that was named, as PyTorch ran it beside a recipe's model, or the ONNX file that was given."""
    model = _variant("", report)
    rates = {timing["batch"]: timing["rates"][0]["images_per_second"] for timing in report.speed["measured"]}
    return replace(
        model,
        name=report.speed["reference"],
        precision=report.speed["measured"][0]["rates"][0]["precision"],
        parameters=report.parameters["before"],
        macs=report.macs["before"],
        bytes=report.reference_bytes,
        milliseconds=round(1e3 * min(rates) / rates[min(rates)], 4),
        images_per_second=round(rates[model.batch], 2),
        top1=None if report.accuracy is None else report.accuracy.reference_top1,
        agreement=None,
        interval=None if report.accuracy is None else report.accuracy.reference_interval,
        changes=None,
    )


def with_baseline(results: Sequence[Result]) -> list[Variant]:
    """The network first, as it was measured beside the first model, then what the recipes gave."""
    first = next((result.baseline for result in results if result.baseline is not None), None)
    found = [result.variant for result in results if result.variant is not None]
    return found if first is None else [first, *found]


def _fingerprint(config: ExportConfig) -> str:
    told = {key: str(value) for key, value in vars(config).items() if key not in ("steps", "repository")}
    files = [_state(Path(named)) for named in (config.arch, config.weights, config.labels) if named is not None]
    return hashlib.sha256(json.dumps([told, recipe.to_toml(config.steps), files]).encode()).hexdigest()


def _state(file: Path) -> list[int]:
    """By what a file that was written again is told from the one that it was; empty where a name is none."""
    try:
        return [(found := file.stat()).st_size, found.st_mtime_ns] if file.is_file() else []
    except OSError:
        return []


def _folder(config: ExportConfig) -> Path:
    return config.repository / config.model_name


def _is_there(config: ExportConfig, earlier: Result) -> bool:
    """Whether an earlier result is that of the same export, and its model is still there."""
    if earlier.fingerprint != _fingerprint(config):
        return False
    return earlier.variant is None or (_folder(config) / JSON_FILE).is_file()


def _known(state: Path) -> dict[str, Result]:
    """The results of an earlier run; a file that is not one is begun anew."""
    try:
        rows = json.loads(state.read_text(encoding="utf-8"))["results"]
        results = [
            Result(**{**row, **{key: _known_variant(row[key]) for key in ("variant", "baseline") if row.get(key)}})
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {result.name: result for result in results}


def _known_variant(row: dict[str, Any]) -> Variant:
    changed = row.get("changes")
    return Variant(**{**row, "changes": None if changed is None else Changes(**changed)})


def _write(output: Path, results: Sequence[Result], configs: Mapping[str, ExportConfig]) -> None:
    found = [result.variant for result in results if result.variant is not None]
    beaten = variants.dominated(found)
    stated: dict[str, Any] = {"results": [asdict(result) for result in results], "dominated": beaten}
    atomic_file.write(output / STATE_FILE, (json.dumps(stated, indent=2) + "\n").encode())
    if found:
        variants.plot(found, output / PLOT_FILE)
        links = {name: _link(output, config) for name, config in configs.items()}
        atomic_file.write(output / PAGE_FILE, _page(output, results, beaten, links).encode())


def _link(output: Path, config: ExportConfig) -> str:
    """The way from the page to a model's own report."""
    report = _folder(config) / REPORT_PAGE
    return quote(os.path.relpath(report, output).replace(os.sep, "/"))


def _page(output: Path, results: Sequence[Result], beaten: Mapping[str, str], links: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader

    shown = with_baseline(results)
    found = [result.variant for result in results if result.variant is not None]
    rows = [variants.columns(one, shown[0]) | {"beaten by": beaten.get(one.name, "")} for one in shown]
    told = [name for name in rows[0] if any(row[name] for row in rows)]
    templates = Environment(loader=FileSystemLoader(assets.FOLDER), autoescape=True)
    return templates.get_template(_TEMPLATE).render(
        rows=[{name: row[name] for name in told} for row in rows],
        links=links,
        baseline=shown[0].name if len(shown) > len(found) else "",
        judged="accuracy" if all(variant.top1 is not None for variant in found) else "agreement",
        batch=found[0].batch,
        refused=[result for result in results if result.refused],
        results=results,
        doubts=variants.doubts(shown),
        plot=base64.b64encode((output / PLOT_FILE).read_bytes()).decode(),
    )

"""The units of a layer: which pictures excite each, which are dead or do what another does, which decide anything.

A unit is a channel of a map. It is ablated by zeros in its whole map (as B. Zhou and others 2018, "Revisiting the
Importance of Individual Units in CNNs via Ablation"), picture by picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convoynet.exporter.data.images import load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Layer, Opened
from convoynet.exporter.looking.tail import Tail
from convoynet.exporter.progress import Progress

PICTURES = 6
"""Those that excite a unit most."""
ALIKE = 0.95
"""From this correlation on two units do the same."""
_MOST_PAIRS = 1000
# Bytes of what is kept before a layer at a time.
_MOST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Excited:
    """One picture that excites a unit.

    Attributes:
        picture: its index.
        place: (row, column) of the largest value in the map.
        value: that value.
    """

    picture: int
    place: tuple[int, int]
    value: float


@dataclass(frozen=True)
class Unit:
    """One channel.

    Attributes:
        index: of it.
        top: the pictures that excite it most, the most exciting first.
        mean: of its map, over all pictures.
        active: on how many pictures it is above zero anywhere.
        dead: it has the same value everywhere on every picture.
        twin: the unit whose maps are most like its own, and their correlation; None where there is no other.
        changed: how many answers become others without it; None where that was not looked at.
        lost: how much the probability of the answers falls without it, the mean over the pictures; None likewise.
    """

    index: int
    top: Sequence[Excited]
    mean: float
    active: int
    dead: bool
    twin: tuple[int, float] | None
    changed: int | None = None
    lost: float | None = None

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        return {
            "unit": self.index,
            "dead": self.dead,
            "mean": self.mean,
            "active_on": self.active,
            "answers_changed": self.changed,
            "probability_lost": self.lost,
            "most_alike": None if self.twin is None else {"unit": self.twin[0], "correlation": self.twin[1]},
            "top": [{"picture": names[one.picture], "place": list(one.place), "value": one.value} for one in self.top],
        }


@dataclass(frozen=True)
class Units:
    """All of a layer.

    Attributes:
        layer: the layer.
        folder: where the pictures are.
        pictures: the files.
        source: which ones, in words.
        units: by their index.
        duplicates: pairs whose maps correlate by `ALIKE` or more, and the correlation, the most alike first.
        ablated: on how many pictures each was left out; 0 where that was not looked at.
        notes: what to know of it.
    """

    layer: Layer
    folder: Path
    pictures: Sequence[Path]
    source: str
    units: Sequence[Unit]
    duplicates: Sequence[tuple[int, int, float]]
    ablated: int
    notes: Sequence[str]

    @property
    def dead(self) -> list[int]:
        """Those that are."""
        return [unit.index for unit in self.units if unit.dead]

    @property
    def undecisive(self) -> list[int]:
        """Those that live, and without which every answer stays what it is."""
        return [unit.index for unit in self.units if unit.changed == 0 and not unit.dead]

    @property
    def order(self) -> list[Unit]:
        """The living ones, those that decide most first, then those that are active most often."""
        alive = [unit for unit in self.units if not unit.dead]
        return sorted(alive, key=lambda unit: (-(unit.changed or 0), -(unit.lost or 0), -unit.active, unit.index))

    def name(self, picture: int) -> str:
        """A picture's path in the folder."""
        return str(self.pictures[picture].relative_to(self.folder))

    def to_json(self) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        names = [self.name(index) for index in range(len(self.pictures))]
        return {
            "layer": self.layer.name,
            "images": self.source,
            "ablated_on": self.ablated,
            "dead": self.dead,
            "duplicates": [{"units": [a, b], "correlation": r} for a, b, r in self.duplicates],
            "never_decisive": self.undecisive if self.ablated else None,
            "units": [unit.to_json(names) for unit in self.units],
            "notes": list(self.notes),
        }


def units_of(
    opened: Opened, layer: Layer, given: tuple[Path, Sequence[Path], str], ablated: int, progress: Progress
) -> Units:
    """Look at all units of a layer.

    Args:
        opened: the network.
        layer: of it.
        given: the folder, the pictures in it, and which they are in words.
        ablated: on how many of them, evenly spread, each unit is left out; 0 for none.
        progress: shows how far it is.

    Raises:
        BadInput: a picture cannot be read, or the network does not run.
    """
    folder, pictures, source = given
    measured = _Measured(layer)
    for at in progress.track(starts := opened.starts(layer, len(pictures)), "maps of pictures", len(starts)):
        pixels = load_images(pictures[at : at + starts.step], opened.preprocess)
        with torch.no_grad():
            measured.add(opened.maps(layer, opened.inputs(pixels)), at)
    units, notes = measured.units(), []
    if measured.lowest.min() < 0:
        notes.append(
            f"{layer.name} has negative values: where a ReLU comes behind it, a unit may live here and be off there; "
            "the layer behind it tells"
        )
    places = np.linspace(0, len(pictures) - 1, min(ablated, len(pictures))).astype(int)
    if len(places):
        try:
            changed, lost = _without(opened, layer, [pictures[place] for place in places], progress)
            units = [
                replace(unit, changed=int(changed[unit.index]), lost=float(lost[unit.index] / len(places)))
                for unit in units
            ]
        except BadInput as error:
            notes.append(f"no unit was left out: {error}")
            places = places[:0]
    return Units(layer, folder, pictures, source, units, measured.pairs(), len(places), notes)


class _Measured:
    """What is added up over batches of maps."""

    def __init__(self, layer: Layer) -> None:
        channels = layer.channels
        self.width = layer.size[1]
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)
        self.active = torch.zeros(channels, dtype=torch.int64)
        self.highest = torch.full((channels,), -torch.inf)
        self.lowest = torch.full((channels,), torch.inf)
        # Of each unit the pictures so far: values, and pictures with places, [channels, at most PICTURES].
        self.values = torch.empty(channels, 0)
        self.where = torch.empty(channels, 0, 2, dtype=torch.int64)

    def add(self, maps: Tensor, first: int) -> None:
        """The maps of pictures from number `first` on."""
        if not torch.isfinite(maps).all():
            raise BadInput("the layer's maps are not finite: there is nothing to look at")
        flat = maps.float().flatten(2)  # n x channels x places
        best, places = flat.max(dim=2)
        numbers = torch.arange(first, first + len(maps))[:, None].expand_as(places)
        self.values = torch.cat((self.values, best.T), dim=1)
        self.where = torch.cat((self.where, torch.stack((numbers, places), dim=2).transpose(0, 1)), dim=1)
        order = self.values.argsort(dim=1, descending=True, stable=True)[:, :PICTURES]
        self.values = self.values.gather(1, order)
        self.where = self.where.gather(1, order[..., None].expand(-1, -1, 2))
        self.highest = torch.maximum(self.highest, best.amax(dim=0))
        self.lowest = torch.minimum(self.lowest, flat.amin(dim=(0, 2)))
        self.active += (best > 0).sum(dim=0)
        rows = flat.transpose(0, 1).flatten(1).double()  # channels x (n * places)
        self.count += rows.shape[1]
        self.total += rows.sum(dim=1)
        self.products += rows @ rows.T

    def correlation(self) -> NDArray[np.float64]:
        """[channels, channels], zero for a unit that never changes."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean[None, :]
        spread = covariance.diagonal().clamp(min=0).sqrt()
        still = (spread <= 1e-6 * mean.abs()) | (self.highest == self.lowest)
        spread[still] = torch.inf
        found: NDArray[np.float64] = (covariance / (spread[:, None] * spread[None, :])).numpy()
        np.fill_diagonal(found, 0)
        return found

    def pairs(self) -> list[tuple[int, int, float]]:
        """The units that do the same, the most alike first."""
        found = self.correlation()
        first, second = np.nonzero(np.triu(found >= ALIKE))
        pairs = [(int(a), int(b), float(min(found[a, b], 1.0))) for a, b in zip(first, second, strict=True)]
        return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:_MOST_PAIRS]

    def units(self) -> list[Unit]:
        """All of them, before any is left out."""
        alike = self.correlation()
        made = []
        for index in range(len(self.total)):
            twin = int(alike[index].argmax())
            top = [
                Excited(int(number), (int(place) // self.width, int(place) % self.width), float(value))
                for (number, place), value in zip(self.where[index], self.values[index], strict=True)
            ]
            made.append(
                Unit(
                    index=index,
                    top=top,
                    mean=float(self.total[index] / self.count),
                    active=int(self.active[index]),
                    dead=bool(self.highest[index] == self.lowest[index]),
                    twin=(twin, float(min(alike[index, twin], 1.0))) if alike[index, twin] > 0 else None,
                )
            )
        return made


def _without(
    opened: Opened, layer: Layer, pictures: Sequence[Path], progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Without each unit, how many answers become others, and by how much the probability of the answers falls in all.

    Raises:
        BadInput: the network is no classifier.
    """
    changed, lost = np.zeros(layer.channels, np.int64), np.zeros(layer.channels)
    # The first picture says how many fit.
    some = opened.inputs(load_images(pictures[:1], opened.preprocess))
    size = max(1, min(opened.batch, _MOST_BYTES // max(Tail(opened, layer, some).bytes, 1)))
    starts = range(0, len(pictures), size)

    def steps() -> Iterator[tuple[Tail, int]]:
        for at in starts:
            tail = Tail(opened, layer, opened.inputs(load_images(pictures[at : at + size], opened.preprocess)))
            for index in range(layer.channels):
                yield tail, index

    label = f"{layer.channels} units left out on {len(pictures)} pictures"
    for tail, index in progress.track(steps(), label, len(starts) * layer.channels):
        # Where it is off anyway nothing changes.
        rows = tail.maps[:, index].flatten(1).any(dim=1).nonzero().flatten()
        if not len(rows):
            continue
        maps = tail.maps[rows]
        maps[:, index] = 0
        before, after = tail.shares[rows], tail.shares_with(maps, rows)
        answers = before.argmax(dim=1)
        changed[index] += int((after.argmax(dim=1) != answers).sum())
        fallen = before.gather(1, answers[:, None]) - after.gather(1, answers[:, None])
        lost[index] += float(fallen.double().sum())
    return changed, lost

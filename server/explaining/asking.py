"""The masks of a picture, asked of a server: bounded, at the lowest priority, beside what others ask."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import inf

import grpc

from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.errors import ClientError, invalid
from convoynet.server.client.operations import required_input
from convoynet.server.datatypes import Array
from convoynet.server.explaining.masks import Map, Masks
from convoynet.server.explaining.pace import SHARE, Others, Pace
from convoynet.server.explaining.picture import Picture
from convoynet.server.explaining.subject import Answer, Subject, Target, Wanted, lowest_priority

_REQUEST_BYTES = 2**23
"""Of pictures in one request, where a single one is not more."""
_BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
_LEAST_WAIT_SECONDS, _MOST_WAIT_SECONDS = 0.1, 5.0
_WATCH_SECONDS = 0.25
"""How often the server is asked what else it does."""
_QUIET_SECONDS = 10.0
"""So long nobody else has asked where nobody is taken to ask. Requests that come at random, one a second, are so far
apart four times a day; two seconds apart they are every seventh time, and the next one would meet a large request."""
_WATCH_SHARE = 0.01
"""Of the time, what may be spent on asking the server what else it does."""
_Timed = tuple[Answer, float, float]
"""An answer, when it was asked for, and when it came."""
Make = Callable[[float, Answer], Masks]
"""Makes the masks for what is explained, by its score in the whole picture and the answer to that."""
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Explained:
    """What the masks of a picture say.

    Attributes:
        target: what is explained.
        evidence: [height, width] of the network's input; NaN where it is not known.
        lowest: what evidence is drawn as none.
        done, count: masks that were answered, and that there are.
        seconds: that it took.
    """

    target: Target
    evidence: Map
    lowest: float
    done: int
    count: int
    seconds: float


class Asker:
    """A model on a server, to be asked about one picture after the other.

    Args:
        client: of the server.
        config: the model's.
        subject: how its answers are read.
        version: of the model; "" for the newest.
        more: further outputs that are asked for with the whole picture.
        share: of the time, what may be spent beside the requests of others; None where nobody else can ask.
    """

    def __init__(
        self,
        client: AsyncClient,
        config: ModelConfig,
        subject: Subject,
        version: str = "",
        more: Sequence[str] = (),
        share: float | None = SHARE,
    ) -> None:
        self._client, self._config, self._subject, self._version, self._more = client, config, subject, version, more
        self._others, self._own, self._share = Others(), 0, share
        self._look_at = 0.0
        self._quiet_since: float | None = None
        self._refused = ""

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def explain(self, picture: Picture, wanted: Wanted, make: Make, seconds: float, tell: Tell) -> Explained:
        """What the answers to a picture's masks say of its class or object.

        Args:
            picture: the picture.
            wanted: what is explained.
            make: the masks, when it is known what they are for.
            seconds: the most that it may take; what is answered by then counts.
            tell: told how many masks are answered, and of how many.

        Raises:
            ClientError: the server refused, or no mask was answered in time.
        """
        began, self._refused = self._now(), ""
        target: Target | None = None
        masks: Masks | None = None
        done = 0
        try:
            async with asyncio.timeout(seconds):
                pace = Pace(
                    max(1, min(self._config.max_batch_size, _REQUEST_BYTES // picture.row.nbytes)), self._share or SHARE
                )
                await self._look(pace)
                whole = await self._ask(picture.row[None], [*self._subject.outputs, *self._more])
                target = self._subject.target(whole, wanted)
                (score,) = self._subject.scores(whole, target)
                masks = make(float(score), whole)
                tell(0, masks.count)
                async with aclosing(self._answers(picture, masks, pace)) as answers:
                    async for answer in answers:
                        for score in self._subject.scores(answer, target):
                            masks.add(done, float(score))
                            done += 1
                        tell(done, masks.count)
        except TimeoutError:
            if not done:
                why = f": {self._refused}" if self._refused else "; give it a longer --time-limit"
                raise invalid(f"no mask was answered within {seconds:g} s{why}") from None
        assert masks is not None
        assert target is not None
        return Explained(target, masks.evidence(), masks.lowest(), done, masks.count, self._now() - began)

    async def _answers(self, picture: Picture, masks: Masks, pace: Pace) -> AsyncGenerator[Answer]:
        """The answers to all masks, in their order."""
        sent: deque[tuple[int, asyncio.Task[_Timed]]] = deque()
        following, free_at = 0, 0.0
        try:
            while following < masks.count or sent:
                # The server is looked at while nothing of ours runs.
                looks = self._now() >= self._look_at
                if looks and not sent:
                    await self._look(pace)
                    looks = False
                while following < masks.count and len(sent) < pace.in_flight and not looks:
                    rows = range(following, min(following + pace.rows, masks.count))
                    hidden = picture.under(masks.mask(index) for index in rows)
                    sent.append((len(rows), asyncio.create_task(self._timed(hidden))))
                    following = rows.stop
                rows_sent, task = sent.popleft()
                answer, began, ended = await task
                yield answer
                await asyncio.sleep(pace.answered(rows_sent, ended - max(began, free_at)))
                free_at = ended
        finally:
            for _, task in sent:
                task.cancel()
            await asyncio.gather(*(task for _, task in sent), return_exceptions=True)

    async def _timed(self, rows: Array) -> _Timed:
        began = self._now()
        return await self._ask(rows, self._subject.outputs), began, self._now()

    async def _ask(self, rows: Array, outputs: Sequence[str]) -> Answer:
        """The outputs for rows; a server that is full is asked again, as long as there is time."""
        wait = _LEAST_WAIT_SECONDS
        while True:
            try:
                answer = await self._client.infer(
                    self._config.name,
                    {required_input(self._config).name: rows},
                    outputs=outputs,
                    version=self._version,
                    priority=lowest_priority(self._config),
                )
            except ClientError as error:
                if error.code not in _BUSY:
                    raise
                self._refused = str(error)
            else:
                self._own += 1
                if wrong := [name for name in outputs if len(answer[name]) != len(rows)]:
                    raise invalid(f"output '{wrong[0]}' of model '{self._config.name}' has not a row for each picture")
                return answer
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MOST_WAIT_SECONDS)

    async def _look(self, pace: Pace) -> None:
        """See whether others ask the server; one that does not tell is taken for one that they do ask."""
        began = self._now()
        if self._share is None:
            pace.beside(others=False)
            self._look_at = inf
            return
        try:
            found = await self._client.statistics()
        except ClientError:
            heard = True
        else:
            heard = self._others.seen(sum(model.inference_stats.success.count for model in found), self._own)
        now = self._now()
        if heard:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        pace.beside(others=self._quiet_since is None or now - self._quiet_since < _QUIET_SECONDS)
        self._look_at = now + max(_WATCH_SECONDS, (now - began) / _WATCH_SHARE)

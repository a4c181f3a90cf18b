"""Continuous batching: requests join and leave a model's batch at every token, in one thread that decodes.

What a request gets is a function of its own tokens and seed: rows share products of matrices and nothing else. So its
logits are those that it would have alone up to the rounding of float32, which sums in another order for another shape.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from configs.errors import InputError, SiloweaveError
from trainer.inference.lanes import Lane
from trainer.inference.sampling import Chooser, Sampling
from trainer.inference.texts import StreamedText

Finish = Literal["", "stop", "length", "cancelled", "failed"]


class QueueFull(SiloweaveError):
    """As many requests wait as may wait."""


class Closed(SiloweaveError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class EngineLimits:
    """How much is computed and kept at once.

    Attributes:
        slots: requests that are decoded together.
        tokens: that all of them may need, prompts and answers: what bounds the cache of keys and values.
        queue: how many more requests may wait than there are slots.
    """

    slots: int
    tokens: int
    queue: int


@dataclass(frozen=True)
class Output:
    """What came of one step.

    Attributes:
        text: the next piece of the text; may be empty.
        tokens: how many the request has written so far.
        finish: why it has ended; empty: it goes on.
    """

    text: str
    tokens: int
    finish: Finish = ""


@dataclass(frozen=True)
class Voice:
    """A model that answers under a name.

    Attributes:
        lane: that decodes its requests.
        backend: of its tokenizer.
    """

    lane: Lane
    backend: Any


class Job:
    """A request in the engine.

    Attributes:
        cancelled: whether nobody waits for it any more: its slot is free at the next step.
    """

    def __init__(self, voice: str, backend: Any, ids: Sequence[int], how: Sampling, continued: bool) -> None:
        self.voice, self.ids, self.how = voice, tuple(ids), how
        self.text = StreamedText(backend, ids if continued else (), how.stop)
        self.size = len(ids) + how.max_new_tokens
        self.tokens, self.token = 0, 0
        self.cancelled = False
        self.chooser: Chooser | None = None
        self.on_output: Callable[[Output], None] = lambda _: None

    def cancel(self) -> None:
        """Says that nobody waits for it any more."""
        self.cancelled = True

    def written(self, token: int) -> Output:
        """What comes of one more token."""
        self.token = token
        self.tokens += 1
        if token in self.how.ends:
            return Output(self.text.rest(), self.tokens, "stop")
        shown = self.text.add(token)
        if self.text.stopped:
            return Output(shown, self.tokens, "stop")
        if self.tokens == self.how.max_new_tokens:
            shown += self.text.rest()
            return Output(shown, self.tokens, "stop" if self.text.stopped else "length")
        return Output(shown, self.tokens)


class Engine:
    """Decodes requests to several models in one thread.

    Args:
        voices: the models, by name.
        limits: how much at once.

    Attributes:
        on_failure: is told the kind of an error that ended requests; never a message, which might quote them.
    """

    def __init__(self, voices: Mapping[str, Voice], limits: EngineLimits) -> None:
        self._voices, self._limits = dict(voices), limits
        self.on_failure: Callable[[str], None] = lambda _: None
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._running: dict[str, list[Job]] = {name: [] for name in voices}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return sum(map(len, self._running.values()))

    @property
    def alive(self) -> bool:
        """Whether the thread that decodes still lives."""
        return self._thread.is_alive()

    def submit(
        self, voice: str, ids: Sequence[int], how: Sampling, on_output: Callable[[Output], None], *, continued: bool
    ) -> Job:
        """Queues a request.

        Args:
            voice: name of the model.
            ids: the prompt's tokens.
            how: its tokens are chosen.
            on_output: is called in the decoding thread after each token, last with a ``finish``.
            continued: whether the text goes on with the prompt's own words.

        Raises:
            QueueFull: too many wait.
            Closed: the engine is closed.
            InputError: it alone needs more tokens than there may be.
        """
        job = Job(voice, self._voices[voice].backend, ids, how, continued)
        job.on_output = on_output
        if job.size > self._limits.tokens:
            raise InputError(
                f"prompt and answer take {job.size} tokens, and this service has room for {self._limits.tokens}; ask "
                "for less"
            )
        with self._changed:
            if self._closed:
                raise Closed("the service is stopping")
            # Who has gone leaves the queue at once, so that no one is turned away for them.
            self._waiting = deque(other for other in self._waiting if not self._gone(other))
            if self.running + len(self._waiting) >= self._limits.slots + self._limits.queue:
                raise QueueFull("all slots are taken, and no more requests may wait; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Ends all requests, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._has_work():
                self._admit()
                for name in self._voices:
                    if self._running[name]:
                        self._step(name)
        for job in [*self._waiting, *(job for jobs in self._running.values() for job in jobs)]:
            job.on_output(Output("", job.tokens, "cancelled"))

    def _has_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self.running)
            return not self._closed

    def _admit(self) -> None:
        """The oldest first: a large request is not passed by small ones for ever."""
        while True:
            with self._changed:
                if (job := self._next()) is None:
                    return
                self._waiting.remove(job)
                if self._gone(job):
                    continue
                self._running[job.voice].append(job)
            self._start(job)

    def _next(self) -> Job | None:
        """The oldest request; one that waits for its adapter's room is passed by those that need none of that room."""
        taken = sum(other.size for jobs in self._running.values() for other in jobs)
        held = list[object]()
        for job in self._waiting:
            if self._gone(job, told=False):
                return job
            if self.running >= self._limits.slots or taken + job.size > self._limits.tokens:
                return None
            lane = self._voices[job.voice].lane
            if lane.room is None or (lane.room not in held and lane.fits()):
                return job
            held.append(lane.room)
        return None

    @staticmethod
    def _gone(job: Job, *, told: bool = True) -> bool:
        if job.cancelled and told:
            job.on_output(Output("", job.tokens, "cancelled"))
        return job.cancelled

    def _start(self, job: Job) -> None:
        """Reads a prompt and chooses the first token; a failure ends this request alone."""
        jobs, lane = self._running[job.voice], self._voices[job.voice].lane
        try:
            job.chooser = Chooser(job.how, job.ids, lane.device)
            token = job.chooser.token(lane.join(job.ids))
        except Exception as error:
            lane.keep(range(len(jobs) - 1))
            self._failed([jobs.pop()], error)
        else:
            self._told(job.voice, [token], first=len(jobs) - 1)

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        self.on_failure(type(error).__name__)
        for job in jobs:
            job.on_output(Output("", job.tokens, "failed"))

    def _step(self, name: str) -> None:
        """One token of every request of a model; a failure ends these requests, and the service goes on."""
        self._told(name, [], first=len(self._running[name]))  # who has gone leaves before the step
        if not (jobs := self._running[name]):
            return
        lane = self._voices[name].lane
        try:
            logits_BV = lane.step([job.token for job in jobs])
            likeliest = logits_BV.argmax(dim=-1).tolist()
            choosers = [job.chooser for job in jobs]
            tokens = [
                best if chooser is None or chooser.plain else chooser.token(logits_V)
                for best, chooser, logits_V in zip(likeliest, choosers, logits_BV, strict=True)
            ]
        except Exception as error:
            lane.keep([])
            self._running[name] = []
            self._failed(jobs, error)
        else:
            self._told(name, tokens, first=0)

    def _told(self, name: str, tokens: Sequence[int], first: int) -> None:
        """Hands tokens to the requests from ``first`` on; whoever has ended or gone leaves the batch."""
        jobs, kept, outputs = self._running[name], list[int](), list[tuple[Job, Output]]()
        for row, job in enumerate(jobs):
            if job.cancelled:
                outputs.append((job, Output("", job.tokens, "cancelled")))
                continue
            if row >= first:
                outputs.append((job, job.written(tokens[row - first])))
            if row < first or not outputs[-1][1].finish:
                kept.append(row)
        self._voices[name].lane.keep(kept)
        self._running[name] = [jobs[row] for row in kept]
        for job, output in outputs:  # whose slots are free by now
            job.on_output(output)

"""Transport of a deployed run: sends tasks to remote sites, and checks the updates that come back."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from ..core.errors import UpdateError
from ..methods import Asked, AsksClients, Method, Task, Update
from ..methods.messages import ChangeUpdate
from ..transport.channel import Channel, task_length
from ..transport.messages import read_update
from ..transport.protocol import Reply
from ..updates.pipeline import on_server
from ..updates.transform import UpdateContext, UpdateTransform
from .connection import SiteConnection
from .memories import RemoteMemories
from .nvflare.messenger import SiteReply
from .participants import Participants


class RemoteTransport:
    """Transport: sends tasks to remote sites, packed by ``channel``, and yields their checked replies, which
    ``transforms`` decode.

    ``min_replies`` is how many sites have to reply before the others are waited for no longer than the grace
    period. A method that asks its clients outside rounds is connected to :meth:`ask`.
    """

    def __init__(
        self,
        method: Method,
        channel: Channel,
        transforms: Sequence[UpdateTransform],
        connection: SiteConnection,
        participants: Participants,
        memories: RemoteMemories,
        min_replies: int,
    ) -> None:
        self.method, self.channel, self.transforms = method, channel, transforms
        self.connection, self.participants, self.memories = connection, participants, memories
        self.min_replies = min_replies
        if isinstance(method, AsksClients):
            method.connect(self.ask, participants.clients)

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Give each site its task and yield the replies, in the tasks' order; a site's failure is a reply,
        not an error.
        """
        refused = self.participants.refused
        self.connection.include_returned(tasks)
        self.participants.admit(list(tasks))
        packed = {name: self.channel.pack_down(task) for name, task in tasks.items()}
        sent = {name: task for name, task in tasks.items() if name not in refused}
        replies = self.connection.execute_round(
            sent, packed, round_number, self.memories.checkpoints, min(self.min_replies, len(sent))
        )
        for name, task in tasks.items():
            down = task_length(task, packed[name])
            if name not in sent:
                yield Reply(name, task, None, refused[name], "", 0, 0, 0.0)
                continue
            _, reply = next(replies)  # in the order of the requests, which is that of the tasks
            yield self._unpacked(name, task, down, reply)
            del reply  # before the next one is read
        self.memories.advance(round_number)

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The sound answers to tasks outside rounds; why other sites gave none is noted."""
        sent = {name: task for name, task in tasks.items() if name not in self.participants.refused}
        answers = {}
        for name, reply in self.connection.execute(sent, min_replies=1):
            task = tasks[name]
            try:
                if reply.failure:
                    raise UpdateError(reply.failure)
                update = read_update(self.method.messages, task, reply.values, reply.packed.tensors)
                self.method.check(task, update)
            except Exception as error:  # whatever a site sends, the others go on
                self.connection.note(f"site {name} left out: {error}")
                continue
            answers[name] = Asked(update, task_length(task), reply.size)
        return answers

    def _unpacked(self, name: str, task: Task, down: int, reply: SiteReply) -> Reply:
        """A site's update as it comes out of the channel, checked. ``down`` is its task's length in bytes."""
        sent, _ = self.channel.down(task)
        if reply.failure:
            detail = f"{reply.failure}\n"
            return Reply(name, sent, None, reply.failure, detail, down, 0, reply.seconds)
        try:
            packed = reply.packed.update(read_update(self.method.messages, task, reply.values))
            update = on_server(self.transforms, packed, UpdateContext(name, task))
            self.method.check(sent, update)
            self._check_weight(name, update)
        except Exception as error:  # whatever a site sends, the others go on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            detail = f"{type(error).__name__}: {error}\n"
            return Reply(name, sent, None, reason, detail, down, reply.size, reply.seconds)
        return Reply(name, sent, update, "", "", down, reply.size, reply.seconds)

    def _check_weight(self, name: str, update: Update) -> None:
        """Refuse a weight above the number of training examples that the site announced at the start; of what
        comes of training, which sees all of them, any other: bounds of its steps follow from the weight.

        Raises:
            UpdateError: says both.
        """
        sizes = self.participants.sizes.get(name)
        most = max(1, sizes.train) if sizes is not None else 1
        if update.weight > most or (isinstance(update, ChangeUpdate) and update.weight != most):
            raise UpdateError(
                f"weight {update.weight:g}: the site announced {most} training examples when the run began"
            )

"""Several streams for one connection: what is moved over them arrives in order, and only those who were invited may join."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import SMALL, quiet, restored
from rig.remote import SocketStream, all_gone, served_by_descriptors

from holdfast.errors import HoldfastError, LinkError, ProtocolError
from holdfast.repo.repository import Repository
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.door import Door, hand_over
from holdfast.repo.wire.frames import Decoder, encode_frames
from holdfast.repo.wire.near import Connection, Further
from holdfast.repo.wire.remote_place import RemotePlace
from holdfast.repo.wire.rights import Rights
from holdfast.version import VERSION

DISK = content(range(1000))


@pytest.fixture
def path(tmp_path: Path) -> str:
    folder = str(tmp_path / "repo")
    Repository.init(folder, SMALL, notify=quiet).close()
    return folder


@contextlib.contextmanager
def opened(
    path: str, streams: int, rights: Rights | None = None, further: Callable[[], SocketStream] | None = None
) -> Iterator[tuple[Repository, Connection]]:
    """A repository behind a far side, over at most so many streams."""

    def another() -> SocketStream:
        return SocketStream(served_by_descriptors(rights))

    connection = Connection(another(), "far", further=Further(further or another, streams, eager=True))
    place = RemotePlace(connection, f"ssh://far{path}", path)
    try:
        repository = Repository(place, place.read_config().config, None, lambda _message: None)
    except BaseException:
        place.release()
        raise
    with repository:
        yield repository, connection
    all_gone()


def await_streams(connection: Connection, count: int) -> None:
    """Returns when there are so many; they are opened beside the work."""
    widening = connection._widening
    assert widening is not None
    widening.join(30)
    assert connection.streams == count


def joining(door: str, secret: bytes, rights: Rights | None = None) -> m.Message:
    """What a far side answers to a stream that says this."""
    with contextlib.closing(served_by_descriptors(rights)) as near:
        decoder = Decoder()
        answer: m.Message = m.Done()
        for number, request in enumerate((m.Hello(1, 1, f"Holdfast {VERSION}"), m.Join(door, secret)), 1):
            near.sendall(b"".join(encode_frames(number, *m.encode_message(request))))
            packets = []
            while not packets:
                data = near.recv(1 << 16)
                assert data, "the far side has ended without a word"
                packets = list(decoder.feed(data))
            answer = m.decode_message(*packets[0][1:])
        return answer


@pytest.mark.parametrize("rights", [Rights(), Rights(append_only=True)], ids=["all", "append-only"])
def test_what_goes_over_several_streams_is_what_went_over_one(path: str, rights: Rights) -> None:
    with opened(path, 3, rights) as (repository, connection):
        repository.backup(machine_of([DISK[: 1 << 20]]))
        await_streams(connection, 3)
        repository.backup(machine_of([DISK]))
        assert DISK in restored(repository, repository.points()[-1]).values()
    with Repository.open(path) as repository:
        assert repository.check(read_data=True).clean
        assert DISK in restored(repository, repository.points()[-1]).values()


def test_no_more_streams_are_opened_than_do_it_good(path: str) -> None:
    with opened(path, 3) as (repository, connection):
        repository.points()
        assert connection._widening is None
    near = SocketStream(served_by_descriptors(None))
    connection = Connection(
        near, "far", further=Further(lambda: pytest.fail("nobody is far away"), 4, eager=False)
    )
    place = RemotePlace(connection, f"ssh://far{path}", path)
    with Repository(place, place.read_config().config, None, lambda _message: None) as repository:
        repository.backup(machine_of([DISK]))
        assert connection.streams == 1


def test_a_further_stream_that_can_not_be_had_is_no_matter(path: str) -> None:
    def refused() -> SocketStream:
        raise LinkError("no more logins")

    with opened(path, 3, further=refused) as (repository, connection):
        repository.backup(machine_of([DISK]))
        await_streams(connection, 1)
        assert DISK in restored(repository, repository.points()[-1]).values()


def test_a_far_side_that_takes_one_stream_only_is_served_by_one(path: str) -> None:
    from rig.remote import served

    connection = Connection(
        SocketStream(served()[0]), "far", further=Further(lambda: pytest.fail("not wanted"), 3, eager=True)
    )
    place = RemotePlace(connection, f"ssh://far{path}", path)
    with Repository(place, place.read_config().config, None, lambda _message: None) as repository:
        repository.backup(machine_of([DISK]))
        await_streams(connection, 1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_stream_that_breaks_ends_the_connection_and_loses_nothing(path: str, number: int) -> None:
    ends: list[socket.socket] = []

    def another() -> SocketStream:
        ends.append(served_by_descriptors(None))
        return SocketStream(ends[-1])

    connection = Connection(another(), "far", further=Further(another, 3, eager=True))
    place = RemotePlace(connection, f"ssh://far{path}", path)
    repository = Repository(place, place.read_config().config, None, lambda _message: None)
    repository.backup(machine_of([DISK[: 1 << 20]]))
    await_streams(connection, 3)
    ends[number].shutdown(socket.SHUT_RDWR)
    with pytest.raises(HoldfastError):
        repository.backup(machine_of([DISK]))
    with contextlib.suppress(HoldfastError):
        repository.close()
    all_gone()
    with Repository.open(path) as again:
        assert again.check(read_data=True).clean
        again.backup(machine_of([DISK]))
        assert DISK in restored(again, again.points()[-1]).values()


def test_only_those_who_were_invited_may_join(path: str) -> None:
    del path
    main = Connection(SocketStream(served_by_descriptors(Rights(append_only=True))), "far")
    invitation = main.ask(m.Invite())
    append = Rights(append_only=True)
    for door, secret, rights in (
        (invitation.door, bytes(32), append),  # not the secret
        (invitation.door, invitation.secret, Rights()),  # more rights than the connection has
        (invitation.door, invitation.secret, Rights(read_only=True)),
        ("holdfast-" + "0" * 32, invitation.secret, append),  # nobody is there
        ("/run/dbus/system_bus_socket", invitation.secret, append),
        ("\0x", invitation.secret, append),
        ("", invitation.secret, append),
    ):
        answer = joining(door, secret, rights)
        assert isinstance(answer, m.Failure), (door, rights)
    assert joining(invitation.door, invitation.secret, append) == m.Done()
    main.ask(m.Ping())
    main.close()
    all_gone()


def test_a_connection_in_use_can_not_join_another_one(path: str) -> None:
    del path
    main = Connection(SocketStream(served_by_descriptors(None)), "far")
    invitation = main.ask(m.Invite())
    other = Connection(SocketStream(served_by_descriptors(None)), "far")
    other.ask(m.Ping())
    with pytest.raises(ProtocolError):
        other.ask(m.Join(invitation.door, invitation.secret))
    for connection in (main, other):
        connection.close()
    all_gone()


def test_numbers_that_never_come_end_the_connection() -> None:
    main = served_by_descriptors(None)
    decoder = Decoder()

    def say(end: socket.socket, number: int, request: m.Message) -> None:
        end.sendall(b"".join(encode_frames(number, *m.encode_message(request))))

    def hear(end: socket.socket, decoder: Decoder) -> tuple[int, m.Message]:
        packets = []
        while not packets:
            data = end.recv(1 << 16)
            assert data, "the far side has ended without a word"
            packets = list(decoder.feed(data))
        return packets[0].request, m.decode_message(*packets[0][1:])

    say(main, 1, m.Hello(1, 1, "x"))
    hear(main, decoder)
    say(main, 2, m.Invite())
    _, invitation = hear(main, decoder)
    assert isinstance(invitation, m.Invitation)
    second, decoder2 = served_by_descriptors(None), Decoder()
    say(second, 1, m.Hello(1, 1, "x"))
    hear(second, decoder2)
    say(second, 2, m.Join(invitation.door, invitation.secret))
    assert hear(second, decoder2) == (2, m.Done())
    say(second, 4, m.Ping())  # it waits for number 3
    say(main, 3, m.Ping())
    assert {hear(main, decoder), hear(second, decoder2)} == {(3, m.Done()), (4, m.Done())}
    say(second, 6, m.Ping())
    say(main, 7, m.Ping())  # and 5 is nowhere
    number, failure = hear(main, decoder)
    assert number == 0
    assert isinstance(failure, m.Failure)
    main.close()
    second.close()
    all_gone()


def test_a_door_lets_nobody_in_when_it_is_closed() -> None:
    came: list[int] = []
    door = Door(b"rights", lambda *_: came.append(1))
    invitation = door.invitation
    door.close()
    ends = os.pipe()
    with pytest.raises(ProtocolError):
        hand_over(m.Join(invitation.door, invitation.secret), b"rights", ends)
    for end in ends:
        os.close(end)
    assert not came
    assert threading.active_count() < 50

"""The rumours that are passed on: which, how often, and how many fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.swim.queue import RumourQueue
from kvmesh.discovery.wire.messages import Message, User

PLENTY = 10_000


def rumour(text: str) -> User:
    return User(text.encode())


def texts(messages: list[Message]) -> list[str]:
    return [message.payload.decode() for message in messages if isinstance(message, User)]


def filled(*names: str, size_bytes: int = 10, rumours_max: int = 100) -> RumourQueue:
    queue = RumourQueue(rumours_max)
    for name in names:
        queue.put(name, rumour(name), size_bytes)
    return queue


def take(queue: RumourQueue, budget_bytes: int = PLENTY, *, overhead_bytes: int = 2, limit: int = 3) -> list[str]:
    return texts(queue.take(budget_bytes, overhead_bytes, limit)[0])


def test_the_newest_go_first_and_then_those_that_were_sent_least():
    queue = filled("a", "b", "c")
    assert take(queue, 24) == ["c", "b"]
    assert take(queue, 24) == ["a", "c"]  # a was never sent; of the others c is the newer one
    queue.put("d", rumour("d"), 10)
    assert take(queue, 48) == ["d", "a", "b", "c"]  # of a and b, which were both sent once, a was it last


def test_each_is_sent_as_often_as_the_limit_says():
    queue = filled("a", "b")
    assert [sorted(take(queue, limit=3)) for _ in range(4)] == [["a", "b"], ["a", "b"], ["a", "b"], []]
    assert len(queue) == 0


def test_a_limit_that_sank_ends_what_is_beyond_it():
    queue = filled("a")
    for _ in range(5):
        assert take(queue, limit=8) == ["a"]
    assert take(queue, limit=3) == ["a"]
    assert len(queue) == 0
    queue = filled("a")
    assert take(queue, limit=0) == ["a"]
    assert len(queue) == 0


def test_a_newer_rumour_of_a_name_takes_the_place_of_the_older_one():
    queue = filled("a", "b")
    assert take(queue, 12) == ["b"]
    queue.put("b", rumour("b again"), 10)
    assert len(queue) == 2
    assert take(queue, limit=1) == ["b again", "a"]
    assert take(queue) == []


def test_one_that_is_discarded_is_not_sent():
    queue = filled("a", "b")
    queue.discard("a")
    queue.discard("nobody")
    assert (len(queue), take(queue)) == (1, ["b"])


def test_the_budget_holds_every_rumour_with_what_it_costs_beside_its_size():
    queue = filled("a", "b", size_bytes=10)
    messages, left_bytes = queue.take(25, 3, 4)
    assert (texts(messages), left_bytes) == (["b"], 12)
    messages, left_bytes = queue.take(26, 3, 4)
    assert (texts(messages), left_bytes) == (["a", "b"], 0)
    assert queue.take(12, 3, 4) == ([], 12)
    assert queue.take(0, 3, 4) == ([], 0)
    assert queue.take(-5, 3, 4) == ([], -5)


def test_what_does_not_fit_leaves_its_room_to_others_and_waits():
    queue = filled("small")
    queue.put("large", rumour("large"), 500)
    assert take(queue, 100) == ["small"]
    assert take(queue, 600) == ["large", "small"]


def test_a_smaller_one_that_comes_later_is_seen():
    """Looking ends where not even the smallest of all would fit: that one must be known."""
    queue = filled("large", size_bytes=500)
    assert take(queue, 100) == []
    queue.put("small", rumour("small"), 20)
    assert take(queue, 22) == ["small"]


def test_where_many_did_not_fit_it_looks_no_further():
    queue = filled("small")
    for number in range(7):
        queue.put(f"large {number}", rumour("large"), 500)
    assert take(queue, 100) == ["small"]
    queue.put("large 7", rumour("large"), 500)
    assert take(queue, 100) == []
    assert take(queue, 600) == ["large", "small"]


def test_at_its_bound_it_drops_what_was_sent_most_often_and_is_oldest():
    queue = filled("a", "b", "c", rumours_max=3)
    assert take(queue, 12) == ["c"]
    queue.put("d", rumour("d"), 10)
    assert (len(queue), queue.dropped) == (3, 1)
    queue.put("e", rumour("e"), 10)  # none was ever sent: the oldest goes
    assert (len(queue), queue.dropped) == (3, 2)
    assert take(queue) == ["e", "d", "b"]
    queue.put("e", rumour("e again"), 10)  # takes its own place
    assert (len(queue), queue.dropped) == (3, 2)


def test_an_empty_one_is_false():
    assert not RumourQueue(1)
    assert filled("a")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 11), st.integers(1, 60)),
            st.tuples(st.just("take"), st.integers(0, 150), st.integers(0, 6)),
            st.tuples(st.just("discard"), st.integers(0, 11), st.just(0)),
        ),
        max_size=60,
    )
)
def test_against_a_model_that_sorts(steps: list[tuple[str, int, int]]):
    """The same as a list that is sorted by transmits, then by who came last to that number, at each step."""
    queue = RumourQueue(8)
    model: list[tuple[int, int, int, int]] = []  # transmits, minus the age's place, name, size
    place = 0
    for what, first, second in steps:
        if what == "put":
            place += 1
            model = [one for one in model if one[2] != first]
            if len(model) == 8:
                most = max(one[0] for one in model)
                model.remove(max((one for one in model if one[0] == most), key=lambda one: one[1]))
            model.append((0, -place, first, second))
            queue.put(str(first), rumour(str(first)), second)
        elif what == "discard":
            model = [one for one in model if one[2] != first]
            queue.discard(str(first))
        else:
            left, names = first, []
            for one in sorted(model):
                if one[3] + 2 <= left:
                    left -= one[3] + 2
                    names.append(one)
            for one in reversed(names):
                model.remove(one)
                place += 1
                if one[0] + 1 < second:
                    model.append((one[0] + 1, -place, one[2], one[3]))
            messages, left_bytes = queue.take(first, 2, second)
            assert texts(messages) == [str(one[2]) for one in names]
            assert left_bytes == left
        assert len(queue) == len(model) <= 8

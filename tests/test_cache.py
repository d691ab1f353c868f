"""Pages and slots: never handed out twice, never lost, never id 0."""

import random

import pytest

from tritium.cache import PagePool, SlotPool
from tritium.core import CapacityError


def test_ids_run_from_one_and_cover_the_pool():
    assert sorted(PagePool(5).allocate(5)) == [1, 2, 3, 4, 5]
    slots = SlotPool(3)
    assert sorted(slots.allocate() for _ in range(3)) == [1, 2, 3]


def test_counts_follow_allocation_and_release():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert (pool.num_free, pool.num_used, pool.num_total) == (1, 3, 4)
    pool.release(pages[:2])
    assert (pool.num_free, pool.num_used, pool.num_total) == (3, 1, 4)


def test_allocation_is_all_or_nothing():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(CapacityError, match="2 pages asked, 1 of 4 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_an_exhausted_slot_pool_says_so():
    slots = SlotPool(1)
    slots.allocate()
    with pytest.raises(CapacityError, match="slots asked"):
        slots.allocate()
    with pytest.raises(CapacityError):
        SlotPool(0).allocate()


@pytest.mark.parametrize("wrong", [[0], [-1], [9], [1, 1]])
def test_ids_that_are_not_in_use_are_refused_and_nothing_changes(wrong):
    pool = PagePool(8)
    assert pool.allocate(2) == [1, 2]
    with pytest.raises(ValueError, match="page"):
        pool.release([2, *wrong])
    assert pool.num_used == 2
    pool.release([1, 2])


def test_double_free_is_refused():
    pool, slots = PagePool(2), SlotPool(2)
    page, slot = pool.allocate(1), slots.allocate()
    pool.release(page)
    slots.release(slot)
    with pytest.raises(ValueError, match="page 1 is not in use"):
        pool.release(page)
    with pytest.raises(ValueError, match="slot 1 is not in use"):
        slots.release(slot)


def test_a_pool_of_negative_size_or_a_negative_request_is_a_bug():
    with pytest.raises(ValueError, match="-1"):
        PagePool(-1)
    with pytest.raises(ValueError, match="-2"):
        PagePool(3).allocate(-2)


def test_random_sequences_against_a_set_of_free_ids(seed):
    rng = random.Random(seed)
    pool, free, held = PagePool(37), set(range(1, 38)), []
    for _ in range(5_000):
        if rng.random() < 0.5:
            count = rng.randint(0, 12)
            if count > len(free):
                with pytest.raises(CapacityError):
                    pool.allocate(count)
            else:
                pages = pool.allocate(count)
                assert len(pages) == count
                assert set(pages) <= free
                free -= set(pages)
                held += pages
        elif held:
            rng.shuffle(held)
            cut = rng.randint(0, len(held))
            pool.release(held[cut:])
            free |= set(held[cut:])
            del held[cut:]
        assert (pool.num_free, pool.num_used) == (len(free), 37 - len(free))

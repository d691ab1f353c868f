"""What requests leave to those that come after: KV pages and GDN checkpoints, in a tree over token ids.

A node is one page: the ids of its tokens (64, or fewer at the end of a sequence) under the page before it. Siblings
stand sorted by their ids, so what comes nearest to a prompt is a neighbour of the place where the prompt would stand,
and nodes that share a beginning but part within a page have a page each. A checkpoint, a slot of the SlotPool with
the recurrent and convolution state after p tokens, hangs at *any* position p, in the node whose children cover it: a
recurrent state cannot be cut, so p is where a request may resume.

The rule for reuse (`match`): the deepest p below a limit that has both KV for all of [0, p) and a checkpoint at p.
Where p lies within a page, the resuming request gets a copy of that page and writes on in it.

Pages go from their request to the tree once their tokens are committed, and stay where they are: the request reads on
through its `Lease`, which locks the path. A page that the tree has already is given back and the tree's is used.
Pages and checkpoints are evicted apart, least recently used first, pages from the leaves up, nothing that is in use.
Where host memory has room, an evicted checkpoint goes there: what is to be copied, in which order, stands in `moves`.
One evicted for good leaves a ghost, as does an evicted page, so that a miss can be explained. Every operation is
O(tokens / 64), and evicting one thing O(log siblings) searches; nothing walks the tree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tritium.cache.pools import PagePool, SlotPool
from tritium.core import PAGE_TOKENS, StateMove

Ids = tuple[int, ...]
Tokens = Callable[[int, int], Ids]
"""Tokens [start, stop) of a sequence, cut where it ends."""

MAX_GHOSTS = 16_384
"""Evicted pages, and evicted checkpoints, that are remembered."""


def may_resume(position: int, limit: int, align: int) -> bool:
    """Whether a request may go on from the state after `position` tokens.

    `limit`: the most tokens it may take over (one at least is left to compute). `align`: 1, since a state is the same
    bits however it came about; 64 where there is no page for the copy of one that the request would write on in.
    """
    return position <= limit and position % align == 0


@dataclass(slots=True, eq=False)
class Node:
    """A page of tokens [end - len(key), end) of a sequence; children follow a full page only."""

    parent: Node | None
    key: Ids
    page: int
    end: int
    path: int
    """Hash of all tokens up to `end`."""
    locks: int = 0
    """Leases that read this page or one below it; 0 may be evicted, children first."""
    keys: list[Ids] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """Children, sorted by their keys; no key comes twice, but one may begin another."""
    checkpoints: dict[int, dict[Ids, Checkpoint]] = field(default_factory=dict)
    """By (position - end) in 1 .. 64, then by the ids from `end` to there."""


@dataclass(slots=True, eq=False)
class Checkpoint:
    """The state after `position` tokens, in a slot or in host memory; in neither it is a ghost: it was evicted."""

    node: Node
    key: Ids
    slot: int | None
    locks: int = 0
    host: int | None = None
    returned: bool = False
    """It was used from host memory before."""

    @property
    def position(self) -> int:
        return self.node.end + len(self.key)

    @property
    def is_ghost(self) -> bool:
        return self.slot is None and self.host is None


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt can reuse: `position` tokens, and why not more."""

    position: int
    node: Node
    """The last full page of [0, position)."""
    partial: Node | None
    """The page with tokens [node.end, position), when position is within a page."""
    checkpoint: Checkpoint | None
    kv_length: int
    """Tokens that the tree has KV for."""
    evicted: int
    """Position of the deepest evicted checkpoint on the way, 0 if none is deeper than `position`."""
    parted: Ids
    """The ids the tree has at kv_length where the prompt has others; empty when it only ends there."""


@dataclass(slots=True, eq=False)
class Lease:
    """What a running request reads of the tree: the path to `node`, and what its first step starts from."""

    node: Node
    """Its last full page that is the tree's."""
    tail: Node | None = None
    """The page after that, when the tree has its beginning already and the request writes on behind it."""
    checkpoint: Checkpoint | None = None
    partial: Node | None = None


class PrefixCache:
    """The tree, and the ids in the pools that it owns. `host`: places for states in host memory."""

    def __init__(self, pages: PagePool, slots: SlotPool, *, host: SlotPool | None = None) -> None:
        self.version = 0
        """Changes whenever a match may have changed."""
        self.num_pages = 0
        self.num_checkpoints = 0
        """Those with a slot."""
        self.num_moved = {"evicted": 0, "restored": 0}
        self.num_evictable = 0
        """Pages that nobody reads: all of them can be had."""
        self.moves: list[StateMove] = []
        """To be done, in this order, before anything else touches a slot."""
        self._pages, self._slots, self._host = pages, slots, host or SlotPool(0)
        self._root = Node(None, (), 0, 0, 0, locks=1)
        self._leaves: OrderedDict[Node, None] = OrderedDict()  # may be evicted now; the least recently used first
        self._idle: OrderedDict[Checkpoint, None] = OrderedDict()  # checkpoints with a slot, likewise
        self._hosted: OrderedDict[Checkpoint, None] = OrderedDict()  # and those in host memory
        self._ghost_pages: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[Checkpoint, None] = OrderedDict()

    @property
    def num_hosted(self) -> int:
        return self._host.num_used

    # ---- reuse ------------------------------------------------------------------------------------------------

    def match(self, ids: Tokens, limit: int, *, align: int = 1) -> Match:
        """The most that a sequence can take over of [0, limit). `align`: see `may_resume`."""
        path, child, common, wanted = self._descend(ids, limit)
        kv_length = path[-1].end + common
        parted = child.key[common:] if child is not None and common < len(wanted) else ()
        evicted, below = 0, child
        for node in reversed(path):
            for offset in sorted(node.checkpoints, reverse=True):
                if not may_resume(node.end + offset, kv_length, align):
                    continue
                found = node.checkpoints[offset].get(ids(node.end, node.end + offset))
                if found is None:
                    continue
                if found.is_ghost:
                    evicted = evicted or found.position
                    continue
                assert below is not None
                last, partial = (below, None) if offset == PAGE_TOKENS else (node, below)
                return Match(found.position, last, partial, found, kv_length, evicted, parted)
            below = node
        return Match(0, self._root, None, None, kv_length, evicted, parted)

    def explain(self, match: Match, ids: Tokens, length: int) -> dict[str, int]:
        """Of the tokens [match.position, length): how many are missed for which reason.

        checkpoint_evicted: KV is there, and so was a state. parted: KV is there, but no state was kept where the
        sequences part. pages_evicted: KV was there. never_seen: the rest.
        """
        end = match.kv_length - match.kv_length % PAGE_TOKENS
        path = 0
        for start in range(0, end, PAGE_TOKENS):
            path = hash((path, ids(start, start + PAGE_TOKENS)))
        while end + PAGE_TOKENS <= length:
            path = hash((path, ids(end, end + PAGE_TOKENS)))
            if path not in self._ghost_pages:
                break
            end += PAGE_TOKENS
        with_state = max(match.evicted, match.position)
        with_kv = min(max(match.kv_length, with_state), length)
        with_pages = max(end, with_kv)
        counts = {
            "checkpoint_evicted": with_state - match.position,
            "parted": with_kv - with_state,
            "pages_evicted": with_pages - with_kv,
            "never_seen": length - with_pages,
        }
        return {reason: count for reason, count in counts.items() if count}

    def acquire(self, match: Match) -> Lease:
        """Locks what `match` found, until `settle` (where it starts from) and `release` (the pages it shares)."""
        for node in _upwards(match.node):
            self._lock(node)
        if match.partial is not None:
            self._lock(match.partial)
        if match.checkpoint is not None:
            match.checkpoint.locks += 1
            self._idle.pop(match.checkpoint, None)
            self._hosted.pop(match.checkpoint, None)
        return Lease(match.node, None, match.checkpoint, match.partial)

    def settle(self, lease: Lease) -> None:
        """The first step of the request is done: what it started from may be evicted again."""
        if lease.partial is not None:
            self._unlock(lease.partial)
            lease.partial = None
        if lease.checkpoint is not None:
            lease.checkpoint.locks -= 1
            self._touch(lease.checkpoint)
            lease.checkpoint = None

    def take_over(self, lease: Lease) -> int | None:
        """The slot of the checkpoint that the request starts from, to be its own, if nobody else starts there."""
        checkpoint = lease.checkpoint
        if checkpoint is None or checkpoint.slot is None or checkpoint.locks > 1:
            return None
        lease.checkpoint, checkpoint.locks = None, 0
        return self._leave_slot(checkpoint)

    def bring_back(self, lease: Lease, slot: int) -> int | None:
        """The slot that a request which has `slot` starts from: None where the state comes from host memory into its
        own. The second time, a state comes back for others too, if it can have a slot."""
        checkpoint = lease.checkpoint
        if checkpoint is None or checkpoint.host is None:
            return None if checkpoint is None else checkpoint.slot
        self.num_moved["restored"] += 1
        if not checkpoint.returned or (shared := self.take_slot()) is None:
            checkpoint.returned = True
            self.moves.append(StateMove(slot, checkpoint.host, out=False))
            return None
        self.moves.append(StateMove(shared, checkpoint.host, out=False))
        self._leave_host(checkpoint)
        checkpoint.slot = shared
        self.num_checkpoints += 1
        return shared

    def take_moves(self) -> tuple[StateMove, ...]:
        moves, self.moves = tuple(self.moves), []
        return moves

    @staticmethod
    def path_pages(node: Node) -> list[int]:
        """The pages of [0, node.end)."""
        return [above.page for above in _upwards(node)][-2::-1]

    # ---- what requests leave ----------------------------------------------------------------------------------

    def publish(self, lease: Lease, ids: Tokens, pages: list[int], upto: int, *, tail: bool) -> bool:
        """Hands the tree a request's pages of the committed tokens [0, upto), with `tail` the last one too when it
        is not full. `pages` is the request's block table; where the tree has a page with these tokens already, it
        is put there and the request's goes back to the pool. Gives whether `pages` changed.
        """
        changed = False
        while (node := lease.node).end + PAGE_TOKENS <= upto:
            key = ids(node.end, node.end + PAGE_TOKENS)
            child, common = _nearest(node, key)
            if child is not None and common == PAGE_TOKENS:
                self._lock(child)
                self._drop_duplicate(lease, pages[node.end // PAGE_TOKENS])
                pages[node.end // PAGE_TOKENS] = child.page
                changed = True
            else:
                child = self._put(lease, key, pages[node.end // PAGE_TOKENS])
            lease.node, lease.tail = child, None
        node = lease.node
        if tail and upto > node.end:
            key = ids(node.end, upto)
            _, common = _nearest(node, key)
            if common < len(key):
                lease.tail = self._put(lease, key, pages[node.end // PAGE_TOKENS])
        return changed

    def attach(self, lease: Lease, ids: Tokens, position: int, slot: int, *, cold: bool = False) -> None:
        """Hangs the state in `slot` at `position` of a published sequence; the tree owns the slot from now on.
        `cold` puts it among the first to be evicted."""
        node = next(node for node in _upwards(lease.node) if node.end < position or node.parent is None)
        key = ids(node.end, position)
        assert _nearest(node, key)[1] == len(key), "a checkpoint without its KV"
        found = self._checkpoint(node, key)
        if found.slot is not None:  # one state a position
            self._slots.release(slot)
            self._touch(found)
            return
        if found.host is not None:
            self._leave_host(found)
        found.slot = slot
        self.num_checkpoints += 1
        self.version += 1
        self._touch(found)
        if cold and found in self._idle:
            self._idle.move_to_end(found, last=False)

    def release(self, lease: Lease, pages: Sequence[int]) -> None:
        """The end of a request: its path is unlocked, and what the tree did not take of `pages` goes back."""
        self.settle(lease)
        own = lease.node.end // PAGE_TOKENS
        if lease.tail is not None:
            self._unlock(lease.tail)
            own += 1
        self._pages.release(pages[own:])
        for node in _upwards(lease.node):
            self._unlock(node)

    # ---- room -------------------------------------------------------------------------------------------------

    def can_have(self, pages: int) -> bool:
        """Whether so many pages are free or can be."""
        return pages <= self._pages.num_free + self.num_evictable

    def make_room(self, pages: int) -> bool:
        """Evicts until `pages` pages are free; False, and nothing evicted, when they cannot be had."""
        if not self.can_have(pages):
            return False
        while self._pages.num_free < pages:
            self._evict_page()
        return True

    def take_slot(self) -> int | None:
        """A free slot, if need be that of the checkpoint not used for longest; None when all are in use."""
        if self._slots.num_free:
            return self._slots.allocate()
        return self._leave_slot(self._idle.popitem(last=False)[0]) if self._idle else None

    def flush(self) -> None:
        """Evicts all that nobody uses, for good."""
        for checkpoint in [*self._idle, *self._hosted]:
            self._remove_checkpoint(checkpoint)
        self.version += 1
        self.make_room(self._pages.num_free + self.num_evictable)

    def walk(self, top: Sequence[Node] | None = None) -> Iterator[Node]:
        """Every page, or `top` and all below, parents first."""
        stack = list(self._root.nodes if top is None else top)
        while stack:
            yield (node := stack.pop())
            stack += node.nodes

    # ---- to and from files ------------------------------------------------------------------------------------

    def holdings(self, ids: Ids) -> tuple[list[tuple[Node, int]], list[tuple[int, Checkpoint]]]:
        """What a file would hold: pages with how many of their tokens, parents first; and checkpoints, each with the
        index of a page that covers it. Those used last come first. Only the pages of `ids` and all that continues
        them, which is all where there are none."""
        chosen = self._chosen(ids)
        leaves = [node for node in self.walk() if not node.nodes and node not in self._leaves]
        pages: dict[Node, int] = {}
        for leaf in (*leaves, *reversed(self._leaves)):
            path, node = [], leaf
            while node.parent is not None and node not in pages:
                path.append(node)
                node = node.parent
            pages |= {node: chosen[node] for node in reversed(path) if node in chosen}
        found: dict[Checkpoint, int] = {}
        for i, (node, count) in enumerate(pages.items()):
            assert node.parent is not None
            for offset, here in node.parent.checkpoints.items():
                checkpoint = here.get(node.key[:offset]) if offset <= count else None
                if checkpoint is not None and not checkpoint.is_ghost:
                    found.setdefault(checkpoint, i)
        order = (*reversed(self._idle), *reversed(self._hosted))
        busy = [checkpoint for checkpoint in found if checkpoint.locks]
        return list(pages.items()), [(found[each], each) for each in (*busy, *order) if each in found]

    def enter(
        self, pages: Sequence[tuple[int, Ids]], states: Sequence[tuple[int, int]]
    ) -> tuple[dict[int, int], dict[int, Checkpoint]]:
        """Takes in what a file holds, as far as there is room: pages as (index of the parent or -1, ids), states as
        (index of a page, tokens of it). Gives which of them are new, and the page or checkpoint of each, which the
        caller fills at once, after `moves` are done."""
        entered: dict[int, Node] = {-1: self._root}
        new_pages: dict[int, int] = {}
        for i, (parent, key) in enumerate(pages):
            if parent not in entered:
                continue
            child, common = _nearest(entered[parent], key)
            if child is not None and common == len(key):
                self._lock(child)
            elif self.make_room(1):
                [new_pages[i]] = self._pages.allocate(1)
                child = self._put(Lease(entered[parent]), key, new_pages[i])
            else:
                continue
            entered[i] = child
        new_states: dict[int, Checkpoint] = {}
        for i, (page, offset) in enumerate(states):
            if page in entered and (checkpoint := self._enter_state(entered[page], offset)) is not None:
                new_states[i] = checkpoint
        for checkpoint in reversed(new_states.values()):  # what was used last is the last to be evicted
            checkpoint.locks -= 1
            self._touch(checkpoint)
        for i in reversed(entered):
            if i >= 0:
                self._unlock(entered[i])
        return new_pages, new_states

    def _enter_state(self, page: Node, offset: int) -> Checkpoint | None:
        """A locked checkpoint with a slot or a place in host memory; None where there is one, or no room."""
        assert page.parent is not None
        key = page.key[:offset]
        found = page.parent.checkpoints.get(offset, {}).get(key)
        if found is not None and not found.is_ghost:
            return None
        slot = self.take_slot()
        host = self._take_host() if slot is None else None
        if slot is None and host is None:
            return None
        found = self._checkpoint(page.parent, key)  # a ghost may be gone by now
        found.slot, found.host, found.locks = slot, host, 1
        self.num_checkpoints += slot is not None
        self.version += 1
        return found

    def _chosen(self, ids: Ids) -> dict[Node, int]:
        """The pages of a sequence and of all that continues it, and how many tokens of each are theirs."""
        path, child, common, wanted = self._descend(lambda start, stop: ids[start:stop], len(ids))
        chosen = dict.fromkeys(path[1:], PAGE_TOKENS)
        if common < len(wanted):
            return chosen | ({child: common} if child is not None and common else {})
        top = [each for each, key in zip(path[-1].nodes, path[-1].keys) if key[:common] == wanted]
        return chosen | {node: len(node.key) for node in self.walk(top)}

    def _descend(self, ids: Tokens, limit: int) -> tuple[list[Node], Node | None, int, Ids]:
        """Down from the root as far as full pages hold a sequence's [0, limit): these, the page behind them that begins
        most like what is left, how many tokens it has of that, and up to a page of what is left."""
        path = [self._root]
        while True:
            wanted = ids(path[-1].end, min(path[-1].end + PAGE_TOKENS, limit))
            child, common = _nearest(path[-1], wanted)
            if child is None or common < PAGE_TOKENS:
                return path, child, common, wanted
            path.append(child)

    # ---- nodes ------------------------------------------------------------------------------------------------

    def _put(self, lease: Lease, key: Ids, page: int) -> Node:
        """The node of the `page` behind `lease.node`, new or the lease's tail with more tokens; the lease's lock on it
        is taken."""
        parent, node = lease.node, lease.tail
        if node is None:
            node = Node(parent, key, page, 0, 0, locks=1)
            self.num_pages += 1
        else:
            self._unlink(node)
        node.key, node.end, node.path = key, parent.end + len(key), hash((parent.path, key))
        self._ghost_pages.pop(node.path, None)
        self._leaves.pop(parent, None)
        i = bisect_left(parent.keys, key)
        while i and key[: len(parent.keys[i - 1])] == parent.keys[i - 1] and not parent.nodes[i - 1].locks:
            i -= 1  # the new page says all that this one does
            self._forget(parent.nodes[i])
        parent.keys.insert(i, key)
        parent.nodes.insert(i, node)
        self.version += 1
        return node

    def _drop_duplicate(self, lease: Lease, page: int) -> None:
        """The tokens of the request's `page` behind `lease.node` are in the tree under another id."""
        tail = lease.tail
        if tail is None:
            self._pages.release((page,))
            return
        self._unlock(tail)
        if not tail.locks:
            self._forget(tail)

    def _evict_page(self) -> None:
        node, _ = self._leaves.popitem(last=False)
        parent = node.parent
        assert parent is not None
        self._forget(node)
        for offset, here in list(parent.checkpoints.items()):
            key = node.key[:offset]
            if len(key) == offset and key in here and _nearest(parent, key)[1] < offset:  # nothing covers it now
                self._remove_checkpoint(here[key])
        if len(node.key) == PAGE_TOKENS:
            self._ghost_pages[node.path] = None
            if len(self._ghost_pages) > MAX_GHOSTS:
                self._ghost_pages.popitem(last=False)
        if not parent.nodes and not parent.locks:  # used no later than what followed it
            self._leaves[parent] = None
            self._leaves.move_to_end(parent, last=False)

    def _forget(self, node: Node) -> None:
        """Takes a node without locks out of the tree, and gives its page back."""
        self._unlink(node)
        self._leaves.pop(node, None)
        self._pages.release((node.page,))
        self.num_pages -= 1
        self.num_evictable -= 1
        self.version += 1

    @staticmethod
    def _unlink(node: Node) -> None:
        assert node.parent is not None
        i = bisect_left(node.parent.keys, node.key)
        del node.parent.keys[i], node.parent.nodes[i]

    def _lock(self, node: Node) -> None:
        if not node.locks:
            self.num_evictable -= 1
            self._leaves.pop(node, None)
        node.locks += 1

    def _unlock(self, node: Node) -> None:
        node.locks -= 1
        if not node.locks:
            self.num_evictable += 1
            if not node.nodes:
                self._leaves[node] = None

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _checkpoint(self, node: Node, key: Ids) -> Checkpoint:
        """The one there, which is no ghost any more, or a new one without a place for its state."""
        found = node.checkpoints.setdefault(len(key), {}).setdefault(key, Checkpoint(node, key, None))
        self._ghosts.pop(found, None)
        return found

    def _touch(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.locks and not checkpoint.is_ghost:
            order = self._hosted if checkpoint.slot is None else self._idle
            order[checkpoint] = None
            order.move_to_end(checkpoint)

    def _leave_slot(self, checkpoint: Checkpoint) -> int:
        """To host memory, if it has room or something older; else for good. Gives the slot, which is the caller's."""
        assert checkpoint.slot is not None
        slot, checkpoint.slot = checkpoint.slot, None
        self.num_checkpoints -= 1
        self.version += 1
        checkpoint.host, checkpoint.returned = self._take_host(), False
        if checkpoint.host is None:
            self._become_ghost(checkpoint)
        else:
            self.moves.append(StateMove(slot, checkpoint.host, out=True))
            self.num_moved["evicted"] += 1
            self._touch(checkpoint)
        return slot

    def _take_host(self) -> int | None:
        """A place in host memory, if need be that of the checkpoint not used for longest."""
        if not self._host.num_free and self._hosted:
            oldest, _ = self._hosted.popitem(last=False)
            self._leave_host(oldest)
            self._become_ghost(oldest)
        return self._host.allocate() if self._host.num_free else None

    def _leave_host(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.host is not None
        self._host.release(checkpoint.host)
        checkpoint.host = None
        self._hosted.pop(checkpoint, None)

    def _become_ghost(self, checkpoint: Checkpoint) -> None:
        self._ghosts[checkpoint] = None
        if len(self._ghosts) > MAX_GHOSTS:
            self._remove_checkpoint(next(iter(self._ghosts)))

    def _remove_checkpoint(self, checkpoint: Checkpoint) -> None:
        """For good, with its ghost."""
        assert not checkpoint.locks, "evicting what is in use"
        if checkpoint.slot is not None:
            del self._idle[checkpoint]
            self._slots.release(checkpoint.slot)
            checkpoint.slot = None
            self.num_checkpoints -= 1
        elif checkpoint.host is not None:
            self._leave_host(checkpoint)
        else:
            del self._ghosts[checkpoint]
        here = checkpoint.node.checkpoints
        del here[len(checkpoint.key)][checkpoint.key]
        if not here[len(checkpoint.key)]:
            del here[len(checkpoint.key)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    start, end, step = 0, min(len(a), len(b)), 256
    while start < end and a[start : start + step] == b[start : start + step]:
        start += step
    while start < end and a[start] == b[start]:
        start += 1
    return min(start, end)


def _upwards(node: Node | None) -> Iterator[Node]:
    """`node` and what is above it, the root last."""
    while node is not None:
        yield node
        node = node.parent


def _nearest(parent: Node, key: Ids) -> tuple[Node | None, int]:
    """The child that begins most like `key`, and how many tokens it has in common with it."""
    best, most = None, 0
    i = bisect_left(parent.keys, key)
    for j in (i, i - 1):
        if 0 <= j < len(parent.keys):
            common = common_prefix(parent.keys[j], key)
            if best is None or common > most:
                best, most = parent.nodes[j], common
    return best, most

"""A minimum cut: the cheapest values from which all that is wanted can be made again.

A value is a pair of nodes, joined by an edge as wide as storing it costs; what is made from it
follows without limit. What cannot be made again is a source, what is wanted a sink. A flow from
these to those fills the edges of what is stored (Ford and Fulkerson 1956), and the rest is made
again. AOTAutograd, of PyTorch, partitions its graphs in the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence

ENDLESS = 1 << 80


class Network:
    """Directed edges with room; node 0 is the source and node 1 the sink.

    Edge ``i ^ 1`` is edge ``i`` backward: its room is what flows there.
    """

    def __init__(self):
        self.edges, self.to, self.room = [[], []], [], []

    def node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def join(self, u: int, v: int, room: int) -> None:
        for start, end, free in ((u, v, room), (v, u, 0)):
            self.edges[start].append(len(self.to))
            self.to.append(end)
            self.room.append(free)

    def saturate(self) -> None:
        """Let as much flow as can, by shortest ways first (Dinic 1970)."""
        while levels := self._levels():
            tried = [0] * len(self.edges)
            while way := self._way(levels, tried):
                most = min(self.room[e] for e in way)
                for e in way:
                    self.room[e] -= most
                    self.room[e ^ 1] += most

    def _levels(self):
        """Distances from the source, or None if the sink has none."""
        levels, todo = {0: 0}, deque((0,))
        while todo:
            u = todo.popleft()
            for e in self.edges[u]:
                if self.room[e] and self.to[e] not in levels:
                    levels[self.to[e]] = levels[u] + 1
                    todo.append(self.to[e])
        return levels if 1 in levels else None

    def _way(self, levels, tried):
        """Edges of a shortest way with room; ``tried``: by node, how many edges lead nowhere."""
        way, u = [], 0
        while u != 1:
            for e in self.edges[u][tried[u] :]:
                if self.room[e] and levels.get(self.to[e]) == levels[u] + 1:
                    way.append(e)
                    u = self.to[e]
                    break
                tried[u] += 1
            else:
                if not way:
                    return None
                u = self.to[way.pop() ^ 1]
                tried[u] += 1
        return way

    def near_sink(self) -> set[int]:
        """Nodes from which more could still flow to the sink."""
        found, todo = {1}, [1]
        while todo:
            for e in self.edges[todo.pop()]:
                if self.room[e ^ 1] and self.to[e] not in found:
                    found.add(self.to[e])
                    todo.append(self.to[e])
        return found


def cut(
    wanted: Sequence[Hashable], operands: Callable, to_store: Callable, to_make: Callable
) -> tuple[list, list]:
    """The cheapest values to store so that all that is ``wanted`` can be had.

    Args:
      wanted: values.
      operands: ``value -> values`` that it is made from, or None if it cannot be made again.
      to_store, to_make: ``value -> int``: what storing it costs, and making it again.

    Returns:
      The values to store, and those to make again, the fewest where several ways cost the same.
    """
    network, nodes, todo = Network(), {}, []

    def inside(v):
        if v not in nodes:
            nodes[v] = network.node(), network.node()
            network.join(*nodes[v], to_store(v))
            todo.append(v)
        return nodes[v]

    for v in wanted:
        network.join(inside(v)[1], 1, ENDLESS)
    while todo:
        v = todo.pop()
        start, made_from = nodes[v][0], operands(v)
        network.join(0, start, ENDLESS if made_from is None else to_make(v))
        for u in made_from or ():
            network.join(inside(u)[1], start, ENDLESS)
    network.saturate()
    near = network.near_sink()
    stored = [v for v, (start, end) in nodes.items() if start not in near and end in near]
    return stored, [v for v, (start, _) in nodes.items() if start in near]

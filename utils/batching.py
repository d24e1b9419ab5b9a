"""The examples of a step to micro-batches of as little padding as can be, dealt to the ranks.

A step is a set of examples; how they are laid out changes nothing but the speed. Sorted by length
they are cut where that costs least: a cut costs the overhead of one more micro-batch, no cut the
padding. The steps themselves are random, where `group_by_length` of other trainers lets the
lengths decide which examples are trained on together.
"""

import numpy as np

MICRO_BATCH_COST = 256  # tokens of padding that are cheaper than one more micro-batch

Rows = list[list[int]]  # of a micro-batch; each row the indices of its examples


def deal(
    lengths: list[int], budget: int, world_size: int, packing: bool = False
) -> list[list[Rows]]:
    """The examples of a step → for each rank its micro-batches, as many for every rank.

    Where there are fewer examples than ranks, some get a row without examples.

    Args:
        lengths: of the examples, in tokens.
        budget: tokens of a micro-batch, padding included; not less than the longest example.
        packing: several examples a row, none longer than the longest example; else one.
    """
    rows = fit(lengths, max(lengths)) if packing else [[index] for index in range(len(lengths))]
    sizes = [sum(lengths[index] for index in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-sizes[index], index))
    ends = _cut([sizes[index] for index in order], budget)
    groups = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    while len(groups) % world_size:
        longest = max(groups, key=len)
        if len(longest) < 2:
            groups.append([])
            continue
        groups.remove(longest)
        half = (len(longest) + 1) // 2
        groups += [longest[:half], longest[half:]]

    def cost(group: list[int]) -> int:
        return len(group) * max((sizes[index] for index in group), default=0)

    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    groups.sort(key=lambda group: (-cost(group), group))
    for start in range(0, len(groups), world_size):
        # the largest of the next ones to the rank that has the least so far
        idle = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, group in zip(idle, groups[start : start + world_size], strict=True):
            ranks[rank].append(group)
            loads[rank] += cost(group)
    return [[[rows[index] for index in group] or [[]] for group in rank] for rank in ranks]


def fit(lengths: list[int], room: int) -> Rows:
    """Best fit: the longest first, each into the row where it leaves the least; rows by index."""
    rows: Rows = []
    rooms = np.zeros(0, np.int64)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        left = np.where(rooms >= lengths[index], rooms, room + 1)
        if len(rooms) == 0 or left.min() > room:
            rooms = np.append(rooms, room - lengths[index])
            rows.append([index])
        else:
            best = int(left.argmin())
            rooms[best] -= lengths[index]
            rows[best].append(index)
    return sorted(sorted(row) for row in rows)


def _cut(sizes: list[int], budget: int) -> list[int]:
    """Where to cut descending sizes, so that Σ (rows x the longest) + cuts x overhead is least."""
    cheapest, previous = np.zeros(len(sizes) + 1), [0] * (len(sizes) + 1)
    longest = np.array(sizes)
    for end in range(1, len(sizes) + 1):
        padded = (end - np.arange(end)) * longest[:end]
        costs = np.where(padded <= budget, cheapest[:end] + padded + MICRO_BATCH_COST, np.inf)
        previous[end] = int(costs.argmin())
        cheapest[end] = costs[previous[end]]
    ends = [len(sizes)]
    while previous[ends[-1]]:
        ends.append(previous[ends[-1]])
    return ends[::-1]

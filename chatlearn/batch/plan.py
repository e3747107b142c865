"""Which sample goes into which micro-batch on which rank; integers in, integers out.

The plan is a function of the lengths alone, so every run that packs the same samples packs them the same way.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

# Sample indices of one micro-batch, and the micro-batches of one rank.
Bin = tuple[int, ...]
RankPlan = tuple[Bin, ...]
# The same while they are being filled.
Bins = list[list[int]]

# What ``attention_crossover_tokens`` lies at for mid-sized models: 10k for 0.6B, 27k for 4B, 51k for 8B.
ATTENTION_CROSSOVER_TOKENS = 32_768

# How many full bins, or ranks, the balancing passes look past before they settle for the plan that is only tight, not
# balanced. It bounds the work at 100,000 samples; nearly full bins are the only reason to look past any.
MAX_TRIED = 16

# A plan whose number of bins is within 1 % of what no plan goes below is not improved: looking for one bin less of
# more than a hundred on a rank would double the time for 100,000 samples.
FEW_ENOUGH_PERCENT = 101

# The work of the busiest rank, in percent of the mean: up to here the number of micro-batches decides which plan is
# better. Above, the others wait longer for the busiest rank than a further micro-batch takes to start.
BALANCED_PERCENT = 102


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is cut: over ``num_data_ranks`` ranks, then into micro-batches.

    With ``packing`` a micro-batch holds at most ``max_tokens`` tokens (a longer sample is alone); without it a
    micro-batch holds at most ``micro_batch_size`` samples, however long. ``attention_crossover_tokens`` is the length
    from which attention is the larger half of a sequence's work; it belongs to the model.
    """

    num_data_ranks: int
    packing: bool
    max_tokens: int
    micro_batch_size: int
    attention_crossover_tokens: int = ATTENTION_CROSSOVER_TOKENS


def attention_crossover_tokens(num_parameters_active: int, num_layers: int, attention_width: int) -> int:
    """The length of a sequence at which causal attention costs as much as the products with all weights.

    Forward and backward take ``6 P`` operations per token for the ``P`` weights that multiply a token (of a mixture
    those of the experts it is sent to; not a looked-up embedding, but the head). Attention of ``T`` tokens, each of
    which sees ``T / 2`` on average, takes ``6 x layers x width x T`` per token, where the width is heads times the
    size of a head. They are equal at ``T = P / (layers x width)``.

    >>> attention_crossover_tokens(596_000_000, num_layers=28, attention_width=2048)
    10393
    """
    return max(1, num_parameters_active // (num_layers * attention_width))


def cost(length: int, crossover_tokens: int) -> int:
    """Work for a sequence of ``length`` tokens, in arbitrary units: linear in tokens plus quadratic attention.

    >>> cost(10_000, crossover_tokens=10_000) == 2 * 10_000 * 10_000
    True
    """
    return length * (crossover_tokens + length)


def oversized(lengths: Sequence[int], layout: BatchLayout) -> tuple[int, ...]:
    """Indices of the samples that are longer than a micro-batch may be; each of them gets one of its own."""
    if not layout.packing:
        return ()
    return tuple(index for index, length in enumerate(lengths) if length > layout.max_tokens)


def plan(lengths: Sequence[int], layout: BatchLayout) -> tuple[RankPlan, ...]:
    """Give every sample a place: one tuple of bins per rank, the same number of bins on each.

    Laws: every index occurs once; no bin exceeds the cap, except a longer sample alone; work is balanced over ranks
    and over the bins of a rank. A bin is empty only where there are fewer samples than bins of all ranks; ``pack``
    turns it into a filler. Every rank's costliest bin comes first, so that ranks, which wait for each other at every
    micro-batch, meet with bins of similar cost.
    """
    order = longest_first(range(len(lengths)), lengths)
    costs = [cost(length, layout.attention_crossover_tokens) for length in lengths]
    ranks = full_bins(order, lengths, costs, layout) if layout.packing else counted_bins(order, lengths, costs, layout)
    num_bins = max(map(len, ranks))
    return tuple(in_order_of_cost(bins, costs, num_bins) for bins in ranks)


def longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Indices by length; of equally long samples, in the order given."""
    return sorted(indices, key=lengths.__getitem__, reverse=True)


def full_bins(order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], layout: BatchLayout) -> list[Bins]:
    """For each rank, bins of at most ``max_tokens`` tokens: as few as will do, and of similar cost where they fit."""
    tight = fewest_bins(order, lengths, costs, layout)
    num_bins = max(map(len, tight))
    shares = [longest_first(sorted(chain(*bins)), lengths) for bins in tight]
    if give_to_the_poor(shares, lengths, num_bins):
        # Nobody needs more bins now: givers lost what was placed last, takers have no more samples than bins.
        tight = [best_fit_decreasing(share, lengths, layout.max_tokens) for share in shares]
    return [
        balanced_bins(share, lengths, costs, num_bins, layout.max_tokens) or split_costliest(bins, costs, num_bins)
        for share, bins in zip(shares, tight, strict=True)
    ]


def counted_bins(order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], layout: BatchLayout) -> list[Bins]:
    """For each rank, bins of at most ``micro_batch_size`` samples and of similar cost."""
    max_per_rank = -(-len(order) // layout.num_data_ranks)
    num_bins = -(-max_per_rank // layout.micro_batch_size)
    shares = spread_by_cost(order, costs, layout.num_data_ranks, max_per_rank)
    give_to_the_poor(shares, lengths, num_bins)
    return [spread_by_cost(share, costs, num_bins, layout.micro_batch_size) for share in shares]


def fewest_bins(order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], layout: BatchLayout) -> list[Bins]:
    """The best of three ways to fill the bins of all ranks; the later ones are needed where bins are nearly full.

    Work dealt without regard for room is balanced best, but a rank whose samples are short for their number then
    holds more tokens than others. To need no more micro-batches than a packing of all samples together, deal while
    there is room for it; where even that leaves a sample over, pack first and deal whole bins.
    """
    num_ranks, capacity = layout.num_data_ranks, layout.max_tokens
    free = best_fit_on_ranks(order, lengths, costs, layout, max_bins=len(order))
    assert free is not None, "a bin for each sample is room for all"
    num_bins = max(map(len, free))
    if num_ranks == 1 or 100 * num_bins <= FEW_ENOUGH_PERCENT * fewest_by_tokens(lengths, layout):
        return free
    together = best_fit_decreasing(order, lengths, capacity)
    fewest = -(-len(together) // num_ranks)
    if num_bins <= fewest:
        return free
    tight = best_fit_on_ranks(order, lengths, costs, layout, max_bins=fewest)
    if tight is None:
        bins = split_costliest(together, costs, num_bins=fewest * num_ranks)
        tight = spread_bins(bins, costs, num_ranks, fewest)
    return min(free, tight, key=lambda ranks: shortcomings(ranks, costs))


def fewest_by_tokens(lengths: Sequence[int], layout: BatchLayout) -> int:
    """A number of bins on each rank that no plan goes below; most plans reach it, which saves looking for better ones.

    Tokens must fit, and of two samples longer than half a bin none shares one with the other.
    """
    num_long = sum(2 * length > layout.max_tokens for length in lengths)
    by_tokens = -(-sum(min(length, layout.max_tokens) for length in lengths) // layout.max_tokens)
    return -(-max(num_long, by_tokens) // layout.num_data_ranks)


def shortcomings(ranks: Sequence[Bins], costs: Sequence[int]) -> tuple[int, int, int]:
    """Smaller is better: too much imbalance in whole percent, then micro-batches on a rank, then the busiest rank."""
    loads = [bin_cost(chain(*bins), costs) for bins in ranks]
    percent = -(-100 * max(loads) * len(loads) // sum(loads))
    return max(BALANCED_PERCENT, percent), max(map(len, ranks)), max(loads)


def spread_bins(bins: Bins, costs: Sequence[int], num_ranks: int, max_per_rank: int) -> list[Bins]:
    """Deal whole bins, costliest first, each to the rank with the least work that holds fewer than the maximum."""
    work = [bin_cost(members, costs) for members in bins]
    order = sorted(range(len(bins)), key=lambda position: (-work[position], position))
    shares = spread_by_cost(order, work, num_ranks, max_per_rank)
    return [[bins[position] for position in share] for share in shares]


def spread_by_cost(order: Sequence[int], costs: Sequence[int], num_shares: int, max_per_rank: int) -> Bins:
    """Deal samples, longest first, each to the share with the least work so far that holds fewer than the maximum."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    for index in order:
        load, share = loads[0]
        shares[share].append(index)
        if len(shares[share]) < max_per_rank:
            heapq.heapreplace(loads, (load + costs[index], share))
        else:
            heapq.heappop(loads)
    return shares


def give_to_the_poor(shares: Sequence[list[int]], lengths: Sequence[int], num_bins: int) -> bool:
    """Move shortest samples from the largest shares to those with fewer samples than bins; whether any was moved.

    A share of few, long samples would leave bins empty. Shares are in order of length, longest first, and stay so.
    """
    moved = False
    for share in shares:
        while len(share) < num_bins < len(richest := max(shares, key=len)):
            insort(share, richest.pop(), key=lambda index: (-lengths[index], index))
            moved = True
    return moved


class OpenBins:
    """Bins of ``capacity`` tokens that are being filled, each sample where it leaves the least room.

    A sample longer than ``capacity`` gets a bin of its own. An exact fit fits.
    """

    def __init__(self, capacity: int) -> None:
        self.bins: Bins = []
        self._capacity = capacity
        # Tokens that still fit somewhere, ascending, and the bins into which they do. That many bins are alike keeps
        # the list short: with one entry per bin, half of the time for 100,000 samples would go into moving entries.
        self._rooms: list[int] = []
        self._bins_with: defaultdict[int, list[int]] = defaultdict(list)

    def have_room_for(self, length: int) -> bool:
        """Whether a sample fits without a new bin."""
        return bool(self._rooms) and length <= self._rooms[-1]

    def put(self, index: int, length: int) -> None:
        """Put a sample into the fullest bin that has room for it, else into a new one."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            room, chosen = self._capacity, len(self.bins)
            self.bins.append([index])
        else:
            room = self._rooms[place]
            chosen = self._bins_with[room].pop()
            self.bins[chosen].append(index)
            if not self._bins_with[room]:
                del self._rooms[place]
        if room > length:
            alike = self._bins_with[room - length]
            if not alike:
                insort(self._rooms, room - length)
            alike.append(chosen)


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """Fill bins of ``capacity`` tokens, longest first.

    >>> best_fit_decreasing([0, 1, 2], [6, 4, 3], capacity=10)
    [[0, 1], [2]]
    """
    opened = OpenBins(capacity)
    for index in order:
        opened.put(index, lengths[index])
    return opened.bins


def best_fit_on_ranks(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], layout: BatchLayout, max_bins: int
) -> list[Bins] | None:
    """Deal samples, longest first, to the rank with the least work that has room, and there where it fits best.

    A rank has room in its bins and in new ones up to ``max_bins``; ``None`` if a sample finds no room.
    """
    ranks = [OpenBins(layout.max_tokens) for _ in range(layout.num_data_ranks)]
    loads = [(0, rank) for rank in range(len(ranks))]
    for index in order:
        length = lengths[index]
        passed: list[tuple[int, int]] = []
        while len((opened := ranks[loads[0][1]]).bins) >= max_bins and not opened.have_room_for(length):
            passed.append(heapq.heappop(loads))
            if not loads or len(passed) > MAX_TRIED:
                return None
        load, chosen = loads[0]
        ranks[chosen].put(index, length)
        heapq.heapreplace(loads, (load + costs[index], chosen))
        for entry in passed:
            heapq.heappush(loads, entry)
    return [opened.bins for opened in ranks]


def balanced_bins(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], num_bins: int, capacity: int
) -> Bins | None:
    """Deal samples, longest first, to the bin with the least work that has room; ``None`` if one finds no room."""
    bins: Bins = [[] for _ in range(num_bins)]
    rooms = [capacity] * num_bins
    loads = [(0, chosen) for chosen in range(num_bins)]
    for index in order:
        length = lengths[index]
        passed: list[tuple[int, int]] = []
        while loads and len(passed) < MAX_TRIED and length > rooms[loads[0][1]] < capacity:
            passed.append(heapq.heappop(loads))
        if not loads or length > rooms[loads[0][1]] < capacity:
            return None
        load, chosen = loads[0]
        bins[chosen].append(index)
        rooms[chosen] -= length
        heapq.heapreplace(loads, (load + costs[index], chosen))
        for entry in passed:
            heapq.heappush(loads, entry)
    return bins


def split_costliest(bins: Bins, costs: Sequence[int], num_bins: int) -> Bins:
    """Split bins, costliest first, until there are ``num_bins`` of them or every bin holds one sample."""
    if len(bins) >= num_bins:
        return bins
    whole = [(-bin_cost(members, costs), position) for position, members in enumerate(bins) if len(members) > 1]
    heapq.heapify(whole)
    result = [list(members) for members in bins]
    while whole and len(result) < num_bins:
        _, position = heapq.heappop(whole)
        halves = spread_by_cost(result[position], costs, 2, max_per_rank=len(result[position]))
        result[position] = halves[0]
        result.append(halves[1])
        for place in (position, len(result) - 1):
            if len(result[place]) > 1:
                heapq.heappush(whole, (-bin_cost(result[place], costs), place))
    return result


def bin_cost(members: Iterable[int], costs: Sequence[int]) -> int:
    """Work for one micro-batch: its sequences do not attend to each other, so their costs add."""
    return sum(map(costs.__getitem__, members))


def in_order_of_cost(bins: Sequence[Sequence[int]], costs: Sequence[int], num_bins: int) -> RankPlan:
    """Costliest bin first; empty bins last, up to ``num_bins``; within a bin the order of the samples."""
    ordered = sorted(bins, key=lambda members: (-bin_cost(members, costs), tuple(members)))
    full = [tuple(sorted(members)) for members in ordered]
    return tuple(full + [()] * (num_bins - len(full)))

"""Which sample goes into which micro-batch on which rank; integers in, integers out.

The plan is a function of the lengths alone, so every run that packs the same samples packs them the same way.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

# Sample indices of one micro-batch, and the micro-batches of one rank.
Bin = tuple[int, ...]
RankPlan = tuple[Bin, ...]

# What ``attention_crossover_tokens`` lies at for mid-sized models: 10k for 0.6B, 27k for 4B, 51k for 8B.
ATTENTION_CROSSOVER_TOKENS = 32_768

# How many full bins the balancing pass looks past before it settles for the plan that is only tight, not balanced.
# It bounds the work at 100,000 samples; nearly full bins are the only reason to look past any.
MAX_BINS_TRIED = 16


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
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    costs = [cost(length, layout.attention_crossover_tokens) for length in lengths]
    if layout.packing:
        shares = spread_by_cost(order, costs, layout.num_data_ranks, max_per_rank=len(order))
        tight = [best_fit_decreasing(share, lengths, layout.max_tokens) for share in shares]
        num_bins = max(len(bins) for bins in tight)
        if give_to_the_poor(shares, lengths, num_bins):
            # Nobody needs more bins now: givers lost what was placed last, takers have no more samples than bins.
            tight = [best_fit_decreasing(share, lengths, layout.max_tokens) for share in shares]
        ranks = [
            balanced_bins(share, lengths, costs, num_bins, layout.max_tokens) or split_costliest(bins, costs, num_bins)
            for share, bins in zip(shares, tight, strict=True)
        ]
    else:
        max_per_rank = -(-len(order) // layout.num_data_ranks)
        num_bins = -(-max_per_rank // layout.micro_batch_size)
        shares = spread_by_cost(order, costs, layout.num_data_ranks, max_per_rank)
        give_to_the_poor(shares, lengths, num_bins)
        ranks = [spread_by_cost(share, costs, num_bins, layout.micro_batch_size) for share in shares]
    return tuple(in_order_of_cost(bins, costs, num_bins) for bins in ranks)


def spread_by_cost(order: Sequence[int], costs: Sequence[int], num_shares: int, max_per_rank: int) -> list[list[int]]:
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


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill bins of ``capacity`` tokens, longest first, each sample where it leaves the least room.

    A sample longer than ``capacity`` gets a bin of its own. An exact fit fits.

    >>> best_fit_decreasing([0, 1, 2], [6, 4, 3], capacity=10)
    [[0, 1], [2]]
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, bin), sorted
    for index in order:
        length = lengths[index]
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([index])
            if length < capacity:
                insort(rooms, (capacity - length, len(bins) - 1))
        else:
            room, chosen = rooms.pop(place)
            bins[chosen].append(index)
            if room > length:
                insort(rooms, (room - length, chosen))
    return bins


def balanced_bins(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], num_bins: int, capacity: int
) -> list[list[int]] | None:
    """Deal samples, longest first, to the bin with the least work that has room; ``None`` if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = [capacity] * num_bins
    loads = [(0, chosen) for chosen in range(num_bins)]
    for index in order:
        length = lengths[index]
        passed: list[tuple[int, int]] = []
        while loads and len(passed) < MAX_BINS_TRIED and length > rooms[loads[0][1]] < capacity:
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


def split_costliest(bins: Sequence[list[int]], costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Split bins, costliest first, until there are ``num_bins`` of them or every bin holds one sample."""
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


def bin_cost(members: Sequence[int], costs: Sequence[int]) -> int:
    """Work for one micro-batch: its sequences do not attend to each other, so their costs add."""
    return sum(map(costs.__getitem__, members))


def in_order_of_cost(bins: Sequence[Sequence[int]], costs: Sequence[int], num_bins: int) -> RankPlan:
    """Costliest bin first; empty bins last, up to ``num_bins``; within a bin the order of the samples."""
    ordered = sorted(bins, key=lambda members: (-bin_cost(members, costs), tuple(members)))
    full = [tuple(sorted(members)) for members in ordered]
    return tuple(full + [()] * (num_bins - len(full)))

"""Properties of Cyclic only; those of every policy are in test_policy_contract.py."""

from collections import Counter

import pytest
from policy_support import BLOCK_NAMES, make_blocks

from gradselect.policies import Cyclic


def turns(policy: Cyclic, num_turns: int) -> list[tuple[str, ...]]:
    """Selection of each turn, after checking that a turn lasts `every` steps."""
    selections = [policy.propose(step) for step in range(num_turns * policy.every)]
    assert all(selections[step] == selections[step - step % policy.every] for step in range(len(selections)))
    return selections[:: policy.every]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("every", [1, 4])
def test_a_round_visits_every_block_once(order: str, count: int, every: int) -> None:
    policy = Cyclic(every=every, order=order, count=count).bind(make_blocks())  # type: ignore[arg-type]
    num_turns = -(-len(BLOCK_NAMES) // count)
    visited = turns(policy, 10 * num_turns)
    for start in range(0, len(visited), num_turns):
        in_round = Counter(name for selected in visited[start : start + num_turns] for name in selected)
        assert in_round == Counter(BLOCK_NAMES)


def test_ascending_is_model_order_and_descending_its_reverse() -> None:
    one_each = [(name,) for name in BLOCK_NAMES]
    assert turns(Cyclic(order="ascending").bind(make_blocks()), 7) == one_each
    assert turns(Cyclic(order="descending").bind(make_blocks()), 7) == one_each[::-1]
    assert turns(Cyclic(order="descending", count=4).bind(make_blocks()), 2) == [BLOCK_NAMES[3:], BLOCK_NAMES[:3]]


def test_random_is_a_new_permutation_each_round() -> None:
    visited = turns(Cyclic(every=2).bind(make_blocks()), 70)
    assert len({tuple(visited[start : start + 7]) for start in range(0, 70, 7)}) == 10


def test_the_promised_coverage_is_not_larger_than_needed() -> None:
    """Over many rounds some block does come first in one and last in the next."""
    for order in ("random", "ascending"):
        policy = Cyclic(every=2, order=order).bind(make_blocks(BLOCK_NAMES[:3]))  # type: ignore[arg-type]
        longest, waiting = 0, dict.fromkeys(policy.names, 0)
        for step in range(600):
            selected = policy.propose(step)
            waiting = {name: 0 if name in selected else waited + 1 for name, waited in waiting.items()}
            longest = max(longest, *waiting.values())
        assert policy.coverage_steps == longest + 1

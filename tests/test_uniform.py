"""Properties of Uniform only; those of every policy are in test_policy_contract.py."""

from collections import Counter

from policy_support import BLOCK_NAMES, make_blocks
from scipy import stats

from gradselect.policies import Uniform


def test_all_sets_of_the_size_are_equally_likely() -> None:
    policy = Uniform(count=2).bind(make_blocks(BLOCK_NAMES[:5]))
    drawn = Counter(policy.propose(step) for step in range(4000))
    assert len(drawn) == 10
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-4


def test_a_set_is_kept_for_every_steps_and_then_drawn_anew() -> None:
    policy = Uniform(count=2, every=20).bind(make_blocks())
    selections = [policy.propose(step) for step in range(200)]
    assert all(selections[step] == selections[step - step % 20] for step in range(200))
    assert len(set(selections[::20])) > 5

"""Choice of the answers of a conversation that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gradselect import UsageError
from gradselect.app.data import Conversation, is_blank

from .notices import Notices, RowError

LossOn = Literal["last-answer", "answers", "all"]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A conversation to train on.

    Args:
        row: number of its row, from 1.
        conversation: the conversation, without the messages behind the last answer.
        answers: positions of the messages that are trained on. With loss_on=all every token is, whatever stands here.
    """

    row: int
    conversation: Conversation
    answers: tuple[int, ...]


def select(conversations: Sequence[Conversation], *, loss_on: LossOn, notices: Notices) -> list[Selected]:
    """Return the conversations that have something to train on, and note what is left out.

    Raises:
        UsageError: a row asks for what cannot be done, or no row has an answer; names the row.
    """
    selected = []
    for row, conversation in enumerate(conversations, start=1):
        notices.add(conversation.facts, row)
        try:
            if loss_on == "all" and conversation.messages:
                one = _select_whole(row, conversation)
            else:
                one = _select(row, conversation, loss_on, notices)
        except UsageError as error:
            raise RowError(row, error) from None
        if one is not None:
            selected.append(one)
    if not selected:
        roles = sorted({message["role"] for one in conversations for message in one.messages})
        raise UsageError(
            f"none of the {len(conversations):,} conversations has an answer to train on; their roles are "
            f"{', '.join(roles)}, of which the answers must be 'assistant': {_all_reasons(notices)}"
        )
    return selected


def _all_reasons(notices: Notices) -> str:
    reasons = [fact for fact in notices.rows if fact in (NO_ANSWER, NO_QUESTION, BLANK, UNTRAINED_LAST, UNTRAINED_ALL)]
    renamed = 'if a role has another name, write e.g. data.roles={"bot": "assistant"}'
    return "; ".join([*(f"{len(notices.rows[fact]):,} {fact}" for fact in reasons), renamed])


NO_ANSWER = "have no message of the assistant and are left out"
NO_QUESTION = "begin with their only answer and are left out: it answers nothing; data.loss_on=answers trains on it"
BLANK = "have an empty answer, which is not trained on"
UNTRAINED_LAST = (
    "are left out: their last answer is not to be trained on (weight 0); data.loss_on=answers trains on the others"
)
UNTRAINED_ALL = "are left out: no answer in them is to be trained on"
WANTED_EARLIER = (
    "mark an earlier answer as to be trained on (weight 1), but data.loss_on=last-answer trains on the last alone; "
    "data.loss_on=answers trains on all"
)
WEIGHTS = "have answers that are not to be trained on (weight 0)"


def _select_whole(row: int, conversation: Conversation) -> Selected:
    untrained = [place for place in conversation.untrained if conversation.messages[place]["role"] == "assistant"]
    if untrained:
        raise UsageError(
            f"message {min(untrained) + 1} is not to be trained on (weight 0), but data.loss_on=all trains on every "
            "token; write data.loss_on=answers, or data.ignore=[weight]"
        )
    return Selected(row=row, conversation=conversation, answers=())


def _select(row: int, conversation: Conversation, loss_on: LossOn, notices: Notices) -> Selected | None:
    last = conversation.last_answer
    if last is None:
        notices.add(NO_ANSWER, row)
        return None
    if last == 0 and loss_on == "last-answer":
        notices.add(NO_QUESTION, row)
        return None
    messages = conversation.messages
    if last + 1 < len(messages):
        notices.add("end with messages of other roles than the assistant; these are cut off: nothing answers them", row)
    cut = replace(conversation, messages=messages[: last + 1])
    wanted = [last] if loss_on == "last-answer" else [i for i in range(last + 1) if messages[i]["role"] == "assistant"]
    if loss_on == "last-answer" and any(
        messages[place]["role"] == "assistant" for place in conversation.wanted - {last}
    ):
        notices.add(WANTED_EARLIER, row)
    spoken = [place for place in wanted if not is_blank(messages[place])]
    if len(spoken) < len(wanted):
        notices.add(BLANK, row)
    answers = tuple(place for place in spoken if place not in conversation.untrained)
    if answers:
        if len(answers) < len(spoken):
            notices.add(WEIGHTS, row)
        return Selected(row=row, conversation=cut, answers=answers)
    if spoken:
        notices.add(UNTRAINED_LAST if loss_on == "last-answer" else UNTRAINED_ALL, row)
    return None

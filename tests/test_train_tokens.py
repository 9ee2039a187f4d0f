"""Token ids and labels of examples: equal to TRL's own preparation, the readable twin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from train_fixtures import CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE, byte_tokenizer
from transformers import PreTrainedTokenizerBase
from trl import chat_template_utils
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import SFTTrainer

from gradselect.app.data import Conversation
from gradselect.app.inputs import Notices, end_of_turn_tokens
from gradselect.app.inputs.chat_examples import chat_tokens
from gradselect.app.inputs.tokens import completion_tokens, encode, text_tokens, token_dataset

TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Más señal? "},
    {"role": "assistant", "content": " yes\n"},
]
CONVERSATIONS = [TURNS, TURNS[:2], [{"role": "user", "content": "{{ x }}"}, {"role": "assistant", "content": "<end>"}]]
FAMILIES = ["qwen2_5", "qwen3", "llama3", "gemma", "phi3", "glm4moe"]


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    own = {"plain": CHAT_TEMPLATE, "marked": MARKED_CHAT_TEMPLATE}
    template = own.get(name) or getattr(chat_template_utils, f"{name}_chat_template")
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"], special_tokens=True)
    tokenizer.bos_token = "<end>"
    return tokenizer


def prepared_by_trl(rows: list[dict[str, Any]], tokenizer: Any, *, answers: bool, completion_only: bool) -> list[Any]:
    marks = has_generation_markers(tokenizer.chat_template or "")
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=get_training_chat_template(tokenizer) if answers and not marks else None,
        completion_only_loss=completion_only,
    )
    arguments: Any = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=answers,
        max_length=None,
        shuffle_dataset=False,
    )
    prepare: Any = SFTTrainer._prepare_dataset
    dataset = prepare(trainer, Dataset.from_list(rows), tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in dataset]


def ours(examples: Any) -> list[Any]:
    return [(row["input_ids"], row["labels"]) for row in token_dataset(examples)]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_prompts_and_completions_are_prepared_as_trl_does(loss_on: str) -> None:
    prompts, completions = ["2+2?", "", "já ", "x"], [" 4", "a<end>", "é", ""]
    rows = [{"prompt": one, "completion": other} for one, other in zip(prompts, completions, strict=True)]
    tokenizer = byte_tokenizer()
    examples = completion_tokens(prompts, completions, tokenizer, train_prompts=loss_on == "all")
    twin = prepared_by_trl(rows, tokenizer, answers=False, completion_only=loss_on == "completion")
    assert ours(examples) == twin


def test_texts_are_prepared_as_trl_does() -> None:
    texts = ["one", "two<end>", "", "drei ü"]
    twin = prepared_by_trl([{"text": text} for text in texts], byte_tokenizer(), answers=False, completion_only=False)
    assert ours(text_tokens(texts, byte_tokenizer())) == twin


@pytest.mark.parametrize("front", ["", "<end> "])
def test_a_tokenizer_that_closes_texts_closes_none_twice(front: str) -> None:
    """TRL trains two end-of-text tokens then, and a prompt ends with one."""
    plain, closing = byte_tokenizer(), byte_tokenizer()
    end = ("<end>", 256)
    plain.backend_tokenizer.post_processor = TemplateProcessing(single=f"{front}$A", special_tokens=[end])
    closing.backend_tokenizer.post_processor = TemplateProcessing(single=f"{front}$A <end>", special_tokens=[end])
    prompts, completions = ["", "2+2?", "a<end>", "<end>"], ["4", "", " 4<end>", "x"]
    texts, notices = ["", "one", "two<end>"], Notices()
    of_plain, of_closing = (
        (
            ours(completion_tokens(prompts, completions, each, train_prompts=False, notices=notices)),
            ours(text_tokens(texts, each)),
            encode(prompts, each, special=True),
        )
        for each in (plain, closing)
    )
    assert of_closing == of_plain
    assert not notices.rows


CASES = [(family, loss) for family in ("marked", *FAMILIES) for loss in ("last-answer", "answers", "all")]


@pytest.mark.parametrize(("family", "loss_on"), [("plain", "last-answer"), ("plain", "all"), *CASES])
def test_conversations_are_prepared_as_trl_does(family: str, loss_on: Any) -> None:
    tokenizer = tokenizer_of(family)
    split = [{"prompt": one[:-1], "completion": one[-1:]} for one in CONVERSATIONS]
    whole = [{"messages": one} for one in CONVERSATIONS]
    twin = prepared_by_trl(
        split if loss_on == "last-answer" else whole,
        tokenizer,
        answers=loss_on == "answers",
        completion_only=loss_on == "last-answer",
    )
    conversations = [Conversation(messages=messages) for messages in CONVERSATIONS]
    assert ours(chat_tokens(conversations, tokenizer, loss_on=loss_on)) == twin


@pytest.mark.parametrize("loss_on", ["last-answer", "answers", "all"])
@pytest.mark.parametrize(("family", "end"), [("qwen2_5", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("marked", "<end>")])
def test_the_token_that_ends_a_turn_is_found(family: str, end: str, loss_on: Any) -> None:
    tokenizer = tokenizer_of(family)
    conversations = [Conversation(messages=messages) for messages in CONVERSATIONS[:2]]
    examples = token_dataset(chat_tokens(conversations, tokenizer, loss_on=loss_on))
    assert end_of_turn_tokens(tokenizer, examples) == (tokenizer.convert_tokens_to_ids(end),)


def test_what_ends_with_ordinary_text_ends_no_turn() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    conversations = [Conversation(messages=TURNS)]
    assert end_of_turn_tokens(tokenizer, token_dataset(chat_tokens(conversations, tokenizer, loss_on="all"))) == ()

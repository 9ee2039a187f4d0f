"""Whole evaluations of a tiny model that has memorised a few problems."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gradselect import UsageError
from gradselect.app.answers.answer_judge import Judge
from gradselect.app.data import Conversation
from gradselect.app.evaluate import EvaluationSettings, evaluate, evaluate_model, read_evaluation
from gradselect.app.evaluate.generation import answer_all, greedy_config
from gradselect.app.evaluate.language_model import LanguageModel, wrap
from gradselect.app.evaluate.problems import Passage
from gradselect.app.evaluate.results import ItemWriter
from gradselect.app.evaluate.tokens import conversation_segments, encode_prompt, segments
from gradselect.app.inputs import Notices

CONTEXT = 96
HOSTILE = r"\boxed{9^{9^{9^9}}}"
SUMS = [(2, 3), (14, 9), (5, 5)]
PROBLEMS = [("Tell a story.", "one two three four, and the total is 12")]
PROBLEMS += [(f"How many is {a} + {b}?", f"{a} + {b} = {a + b}\n#### {a + b}") for a, b in SUMS]
PROBLEMS += [("Hang!", HOSTILE)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE, trained on the problems; it puts <s> in front of a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [f"Question: {question}\nAnswer: {answer}" for question, answer in PROBLEMS],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A Llama of two layers that answers every one of the problems word for word."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        model = transformers.LlamaForCausalLM(config)
    texts = [tokenizer(f"Question: {question}\nAnswer: {answer}</s>")["input_ids"] for question, answer in PROBLEMS]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [1] * (longest - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (longest - len(text)) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def language_model(model: Any, tokenizer: Any) -> LanguageModel:
    return wrap(model, tokenizer)


@pytest.fixture(autouse=True)
def unchanged(model: Any) -> Iterator[None]:
    """Check that no evaluation changes the model's settings or the global random state."""
    config, state = copy.deepcopy(model.generation_config), torch.get_rng_state()
    yield
    assert model.generation_config.to_dict() == config.to_dict()
    assert torch.equal(torch.get_rng_state(), state)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four problems that the model knows."""
    rows = [{"question": question, "answer": answer} for question, answer in PROBLEMS[:4]]
    return write(tmp_path / "problems.jsonl", rows)


def settings(data: Path, **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"model": "tiny", "task": "gsm8k", "data": data, "device": "cpu", **changes})


def test_accuracy_is_the_share_of_right_answers_in_the_order_of_the_data(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in PROBLEMS[:4]]
    rows[1]["answer"] = "#### 24"
    result = evaluate_model(model, tokenizer, settings(write(tmp_path / "problems.jsonl", rows)))
    assert [item["correct"] for item in result.items] == [True, False, True, True]
    assert [item["extracted"] for item in result.items] == ["12", "5", "23", "10"]
    assert [item["index"] for item in result.items] == [0, 1, 2, 3]
    assert [item["question"] for item in result.items] == [question for question, _ in PROBLEMS[:4]]
    assert result.items[1]["prediction"] == " 2 + 3 = 5\n#### 5"
    assert (result.num_items, result.num_correct, result.accuracy) == (4, 3, 0.75)
    assert result.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (result.num_truncated, result.num_unfinished, result.num_unanswered, result.num_undecided) == (0, 0, 0, 0)
    assert result.summary() == "gsm8k: accuracy 75.0 % (95 % interval 30.1 to 95.4), 3 of 4"


def test_answers_and_losses_do_not_depend_on_the_batch(model: Any, tokenizer: Any, data: Path) -> None:
    """In float32 the last bits of a logit may differ between batch shapes; answers of a model this sure do not."""
    one, three, all_at_once = (evaluate_model(model, tokenizer, settings(data, batch_size=n)).items for n in (1, 3, 16))
    assert one == three == all_at_once
    losses = [
        [item["loss"] for item in evaluate_model(model, tokenizer, settings(data, task="loss", batch_size=n)).items]
        for n in (1, 3, 16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_a_checkpoint_and_the_model_in_memory_get_the_same_result(
    model: Any, tokenizer: Any, folder: Path, data: Path
) -> None:
    stored = evaluate(settings(data, model=folder))
    assert stored.items == evaluate_model(model, tokenizer, settings(data)).items
    assert stored.settings["model"] == str(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_adapters_is_evaluated_with_them(model: Any, tokenizer: Any, data: Path) -> None:
    """A wrapper of PEFT keeps a generation config of its own beside that of the model inside."""
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    tuned = evaluate_model(adapted, tokenizer, settings(data, task="loss")).loss
    assert tuned != evaluate_model(model, tokenizer, settings(data, task="loss")).loss
    result = evaluate_model(adapted, tokenizer, settings(data, max_new_tokens=3, limit=1))
    assert len(tokenizer(result.items[0]["prediction"], add_special_tokens=False)["input_ids"]) <= 3


def test_a_model_in_memory_keeps_its_mode(model: Any, tokenizer: Any, data: Path) -> None:
    model.train()
    try:
        evaluate_model(model, tokenizer, settings(data, limit=1))
        assert model.training
    finally:
        model.eval()


def test_items_are_written_at_once_and_end_in_the_order_of_the_data(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder"
    written = []

    def look(done: int, total: int) -> None:
        lines = (output / "items.jsonl").read_text("utf-8").splitlines()
        written.append((done, len(lines), total))

    result = evaluate_model(model, tokenizer, settings(data, output=output, batch_size=2), on_progress=look)
    assert written == [(0, 0, 4), (2, 2, 4), (4, 4, 4)]
    lines = (output / "items.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.items
    assert read_evaluation(output) == json.loads(json.dumps({**result.to_dict(), "items": result.items}))
    assert sorted(path.name for path in output.iterdir()) == ["items.jsonl", "result.json"]


def test_items_computed_in_another_order_end_in_that_of_the_data(tmp_path: Path) -> None:
    with ItemWriter(tmp_path) as writer:
        for index in (2, 0, 1):
            writer.write({"index": index})
        assert [item["index"] for item in writer.finish()] == [0, 1, 2]
    lines = (tmp_path / "items.jsonl").read_text("utf-8").splitlines()
    assert lines == ['{"index": 0}', '{"index": 1}', '{"index": 2}']


def test_items_survive_an_evaluation_that_breaks(model: Any, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, tokenizer, settings(data, output=tmp_path / "out", batch_size=1), on_progress=fail)
    assert len((tmp_path / "out" / "items.jsonl").read_text("utf-8").splitlines()) == 1
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_folder_with_results_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    """The error comes before the model is loaded."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text("{}")
    with pytest.raises(UsageError, match=r"output='.*old' exists already; name a new folder"):
        evaluate(settings(data, output=tmp_path / "old"))


def test_a_result_says_what_it_is_of(model: Any, tokenizer: Any, data: Path) -> None:
    result = evaluate_model(model, tokenizer, settings(data, limit=2)).to_dict()
    assert result["data"]["name"] == str(data)
    assert result["data"]["rows_used"] == 2
    assert result["settings"]["max_new_tokens"] == CONTEXT // 2
    assert result["settings"]["prompt"] == "Question: {question}\nAnswer:"
    assert result["generation"]["do_sample"] is False
    assert {"gradselect", "torch", "transformers", "math-verify"} <= result["versions"].keys()
    assert "loss" not in result


def test_an_answer_ends_before_a_stop_string(model: Any, tokenizer: Any, data: Path) -> None:
    result = evaluate_model(model, tokenizer, settings(data, stop=("\n####", " two")))
    assert [item["prediction"] for item in result.items] == [" one", " 2 + 3 = 5", " 14 + 9 = 23", " 5 + 5 = 10"]
    assert all(item["finished"] for item in result.items)


def test_generation_ends_at_a_stop_string(model: Any, tokenizer: Any, data: Path) -> None:
    """Generation itself stops: there are no more forward passes."""
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    evaluate_model(model, tokenizer, settings(data, limit=1))
    until_end = len(passes)
    evaluate_model(model, tokenizer, settings(data, limit=1, stop=(" two",)))
    hook.remove()
    assert len(passes) - until_end < until_end


def test_answers_cut_off_are_counted(model: Any, tokenizer: Any, data: Path) -> None:
    result = evaluate_model(model, tokenizer, settings(data, max_new_tokens=2))
    assert result.num_unfinished == 4
    assert not any(item["finished"] for item in result.items)


def test_sampling_in_the_generation_config_is_put_aside_and_the_rest_is_kept(
    model: Any, tokenizer: Any, data: Path
) -> None:
    greedy = evaluate_model(model, tokenizer, settings(data)).items
    kept = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=9.0, top_k=3, max_length=1, eos_token_id=1
        )
        result = evaluate_model(model, tokenizer, settings(data))
        assert result.items == greedy
        assert result.generation is not None
        assert result.generation.items() >= {"do_sample": False, "max_new_tokens": 48}.items()
        assert result.generation.get("temperature", 1.0) == 1.0
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=1, return_dict_in_generate=True, min_new_tokens=40, max_time=0.0
        )
        assert evaluate_model(model, tokenizer, settings(data)).items == greedy
        for name, value in {
            "stop_strings": ["5"],
            "prompt_lookup_num_tokens": 3,
            "guidance_scale": 3.0,
            "watermarking_config": {"bias": 50.0},
            "constraints": [],
            "dola_layers": "low",
        }.items():
            model.generation_config = transformers.GenerationConfig(eos_token_id=1, **{name: value})
            assert evaluate_model(model, tokenizer, settings(data)).items == greedy, name
        equals = tokenizer(" =", add_special_tokens=False)["input_ids"]
        model.generation_config = transformers.GenerationConfig(eos_token_id=[1, equals[0]])
        ended = evaluate_model(model, tokenizer, settings(data)).items
        assert [item["prediction"] for item in ended[1:]] == [" 2 + 3", " 14 + 9", " 5 + 5"]
        model.generation_config = transformers.GenerationConfig(eos_token_id=1, suppress_tokens=equals)
        assert " =" not in "".join(
            item["prediction"] for item in evaluate_model(model, tokenizer, settings(data)).items
        )
    finally:
        model.generation_config = kept


def test_a_hostile_answer_neither_hangs_nor_counts(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gradselect.app.evaluate.evaluation.Judge", functools.partial(Judge, timeout_seconds=0.5))
    rows = [{"problem": "Hang!", "answer": "5"}, {"problem": "Hang!", "answer": HOSTILE}]
    result = evaluate_model(model, tokenizer, settings(write(tmp_path / "d.jsonl", rows), task="math"))
    assert result.items[0]["extracted"] == "9^{9^{9^9}}"
    assert [item["decided"] for item in result.items] == [False, True]
    assert [item["correct"] for item in result.items] == [False, True]
    assert result.num_undecided == 1
    assert "1 of 2 answers could not be compared in time" in caplog.text


def test_a_prompt_too_long_keeps_its_end_and_is_counted(
    language_model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = "many " * 200 + "2 + 3?"
    data = write(tmp_path / "long.jsonl", [{"question": question, "answer": "5"}, {"question": "Hi", "answer": "5"}])
    result = evaluate_model(language_model.model, language_model.tokenizer, settings(data, max_new_tokens=8))
    assert [item["truncated"] for item in result.items] == [True, False]
    assert result.num_truncated == 1
    assert "1 of 2 items lost their beginning" in caplog.text
    prompt = encode_prompt(question, language_model=language_model, as_chat=False, room=20)
    assert len(prompt.ids) == 20
    assert prompt.ids[0] == language_model.tokenizer.bos_token_id
    assert language_model.tokenizer.decode(prompt.ids).endswith("many 2 + 3?")


def test_an_answer_must_leave_room_for_the_prompt(model: Any, tokenizer: Any, data: Path) -> None:
    with pytest.raises(UsageError, match=f"max_new_tokens={CONTEXT} leaves no room .* write max_new_tokens=48"):
        evaluate_model(model, tokenizer, settings(data, max_new_tokens=CONTEXT))


def reference_loss(model: Any, ids: list[int], start: int) -> float:
    """Summed loss of ids[start:], one token at a time, each given all before it."""
    with torch.no_grad():
        steps = [model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(0) for place in range(start, len(ids))]
    return -sum(step[token].item() for step, token in zip(steps, ids[start:], strict=True))


def test_the_loss_is_that_of_the_answer_and_its_end(model: Any, tokenizer: Any, data: Path) -> None:
    """The tolerance is for float32 sums in another order."""
    result = evaluate_model(model, tokenizer, settings(data, task="loss"))
    total, num_tokens = 0.0, 0
    for line in data.read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        target = [*tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        total += reference_loss(model, prompt + target, start=len(prompt))
        num_tokens += len(target)
    assert result.num_tokens == num_tokens
    assert result.loss == pytest.approx(total / num_tokens, rel=1e-4)
    assert result.interval is not None
    assert result.interval[0] < result.loss < result.interval[1]


def test_a_running_text_is_predicted_token_by_token_once(language_model: LanguageModel, tmp_path: Path) -> None:
    text = "Question: How many is 2 + 3?\n\nAnswer: 5 " * 15
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model, tokenizer = language_model.model, language_model.tokenizer
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2 * CONTEXT
    pieces = segments(0, Passage(prompt=None, target=text, ends=False), language_model=language_model)
    assert [token for piece in pieces for token in piece.ids[piece.start :]] == ids[1:]
    assert max(len(piece.ids) for piece in pieces) == CONTEXT
    result = evaluate_model(model, tokenizer, settings(tmp_path / "text.txt", task="loss"))
    expected = sum(reference_loss(model, list(piece.ids), start=1) for piece in pieces)
    assert result.num_tokens == len(ids) - 1
    assert result.loss == pytest.approx(expected / (len(ids) - 1), rel=1e-4)
    assert result.num_items == len(pieces)


def test_a_document_ends_with_the_end_of_text_and_a_file_does_not(language_model: LanguageModel) -> None:
    (document,), (file,) = (
        segments(0, Passage(prompt=None, target="one two", ends=ends), language_model=language_model)
        for ends in (True, False)
    )
    assert list(document.ids) == [*file.ids, language_model.tokenizer.eos_token_id]


def test_a_token_across_the_end_of_the_prompt_is_scored(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    (segment,) = segments(0, Passage(prompt="Quest", target="ion: 5", ends=True), language_model=language_model)
    assert list(segment.ids) == [*tokenizer("Question: 5")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(segment.ids[segment.start :]) == "Question: 5</s>"


def test_a_long_pair_loses_its_beginning_and_not_its_target(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    long = Passage(prompt="many " * 200, target=" 2 + 3", ends=True)
    (segment,) = segments(0, long, language_model=language_model)
    assert segment.truncated
    assert len(segment.ids) == CONTEXT
    assert segment.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(segment.ids[segment.start :]) == " 2 + 3</s>"
    (segment,) = segments(0, Passage(prompt="a", target=" many" * 200, ends=True), language_model=language_model)
    assert (segment.truncated, segment.start, segment.num_tokens) == (True, 1, CONTEXT - 1)


def test_nothing_to_score_is_an_error(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    data = write(tmp_path / "d.jsonl", [{"text": ""}])
    with pytest.raises(UsageError, match="nothing to score"):
        evaluate_model(model, tokenizer, settings(data, task="loss"))


def test_a_conversation_is_scored_in_its_last_answer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    before = "<s>user>Hi\nassistant>Yes?</s>\nuser>2 + 3?\nassistant>"
    talk = [("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 3?"), ("assistant", "5")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    talks = [Conversation(messages=row["messages"]) for row in rows]
    (segment,) = conversation_segments(talks, language_model=wrap(model, tokenizer), notices=Notices())
    assert tokenizer.decode(segment.ids[: segment.start]) == before
    assert tokenizer.decode(segment.ids[segment.start :]) == "5</s>\n"
    result = evaluate_model(model, tokenizer, settings(write(tmp_path / "d.jsonl", rows), task="loss"))
    assert result.num_tokens == segment.num_tokens


def test_a_conversation_is_scored_with_its_calls_or_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    data = write(tmp_path / "d.jsonl", [{"messages": talk}])
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(UsageError, match=r"d\.jsonl, line 1: the chat template never renders `tool_calls`"):
        evaluate_model(model, tokenizer, settings(data, task="loss"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
        "{% if add_generation_prompt %}assistant>{% endif %}"
    )
    scored = tokenizer(json.dumps([call | {"function": {"name": "weather", "arguments": {"place": "Oslo"}}}]))
    result = evaluate_model(model, tokenizer, settings(data, task="loss"))
    assert result.num_tokens == len(scored["input_ids"]) - sum(
        one == tokenizer.bos_token_id for one in scored["input_ids"]
    )


def test_as_chat_a_prompt_is_a_message_and_begins_once(model: Any, tokenizer: Any, data: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = encode_prompt("2 + 3?", language_model=wrap(model, tokenizer), as_chat=True, room=None)
    assert tokenizer.decode(prompt.ids) == "<s>user>2 + 3?\nassistant>"
    assert evaluate_model(model, tokenizer, settings(data, as_chat=True, limit=1)).num_items == 1


def test_as_chat_needs_a_chat_template(model: Any, tokenizer: Any, data: Path) -> None:
    with pytest.raises(UsageError, match="no chat template; leave as_chat off"):
        evaluate_model(model, tokenizer, settings(data, as_chat=True))


def test_a_prompt_is_left_open_by_a_tokenizer_that_closes_texts(model: Any, tokenizer: Any) -> None:
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert closing("5")["input_ids"][-1] == 1
    (segment,), (expected,) = (
        segments(0, Passage(prompt="2 + 3", target=" = 5", ends=True), language_model=wrap(model, each))
        for each in (closing, tokenizer)
    )
    assert segment == expected
    prompts = [
        encode_prompt("5", language_model=wrap(model, each), as_chat=False, room=None) for each in (closing, tokenizer)
    ]
    assert prompts[0] == prompts[1]


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_folder_that_is_no_model_is_explained(folder: Path, data: Path, tmp_path: Path) -> None:
    def complaint(model: Any, **changes: Any) -> str:
        with pytest.raises(UsageError) as error:
            evaluate(settings(data, model=model, **changes))
        return str(error.value)

    assert "it has no config.json; it holds problems.jsonl" in complaint(tmp_path)
    assert "is a file; give its folder" in complaint(data)
    assert "no such folder" in complaint(tmp_path / "nowhere")
    assert "cannot be used" in complaint("nobody/no-model")
    broken = copy_of(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be used" in complaint(broken)
    bare = copy_of(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "cannot be used" in complaint(bare)
    encoder = copy_of(folder, tmp_path / "encoder")
    (encoder / "config.json").write_text('{"model_type": "t5"}')
    assert "cannot be used" in complaint(encoder)
    assert "device='cuda:77': this machine has" in complaint(folder, device="cuda:77")
    assert "device='abacus' is not a device" in complaint(folder, device="abacus")


def test_a_checkpoint_without_all_weights_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers and only log it."""
    from safetensors.torch import load_file, save_file

    partial = copy_of(folder, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(UsageError, match=r"lacks 1 weights .*, 'model\.layers\.1\.mlp\.up_proj\.weight' among"),
    ):
        evaluate(settings(data, model=partial))


def test_a_tokenizer_of_another_model_is_refused(model: Any, tokenizer: Any, data: Path) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<more>"])
    with pytest.raises(UsageError, match=r"the tokenizer has .* tokens, the model embeddings for"):
        evaluate_model(model, other, settings(data))


def test_bfloat16_is_loaded_when_asked_for(folder: Path, data: Path) -> None:
    exact, rounded = (
        evaluate(settings(data, model=folder, task="loss", dtype=d)).loss for d in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(
    "build", [tiny_models.tiny_gpt2, tiny_models.tiny_opt, tiny_models.tiny_gemma2, tiny_models.tiny_qwen2]
)
def test_padding_changes_no_answer_whatever_the_positions(build: Any) -> None:
    """Learned positions count from the first token that is no padding, and so do rotary ones."""
    letters = Tokenizer(models.WordLevel({f"w{number}": number for number in range(tiny_models.VOCABULARY)}))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    language_model = wrap(build(layers=2).eval(), transformers.PreTrainedTokenizerFast(tokenizer_object=letters))
    prompts = [
        encode_prompt(text, language_model=language_model, as_chat=False, room=None)
        for text in ("w3 w4 w5 w6 w7", "w20", "w9 w8 w9")
    ]
    config = greedy_config(language_model, max_new_tokens=6, stop=())
    one, three = (
        sorted(
            (answer.index, answer.text)
            for batch in answer_all(prompts, language_model=language_model, config=config, batch_size=size)
            for answer in batch
        )
        for size in (1, 3)
    )
    assert one == three
    assert any(len(text.split()) == 6 for _, text in one)

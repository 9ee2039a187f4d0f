"""The folder that a run leaves is its base's folder, trained: files beside the weights, ends of turns, adapters."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_train_restoring import tiny
from train_fixtures import (
    CHAT_TEMPLATE,
    MARKED_CHAT_TEMPLATE,
    NUM_LAYERS,
    byte_tokenizer,
    parse,
    quiet,
    weights,
    write_model,
    write_sums,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from gradselect import UsageError, delta
from gradselect.app.inputs import run_inputs
from gradselect.app.recipe_planning.planner import RecipePlanner
from gradselect.app.train import train
from gradselect.app.train.new_tokens import _are_new
from gradselect.app.train.restoring import unplaced_notes
from gradselect.files import MANIFEST_NAME, beside_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

OF_THE_MODEL = {
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}',
    "processor_config.json": '{"processor_class": "X"}',
    "chat_template.json": '{"chat_template": ""}',
    "modules.json": '[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../outside"}]',
    "sentence_bert_config.json": '{"max_seq_length": 8}',
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "1_Pooling/model.safetensors": "weights of a module that the run does not train",
    "tokenizer.model": "sentencepiece",
    "added_tokens.json": "{}",
    "modeling_extra.py": "VALUE = 1\n",
    "LICENSE": "Do as you like.",
    "custom_generate/generate.py": "",
}
UNTRAINED = ("onnx/model.onnx", "pytorch_model.bin", "model-Q4.gguf", "tf_model.h5", "original/consolidated.pth")
OF_OTHERS = (
    "README.md",
    "model.safetensors.index.json",
    "trainer_state.json",
    "training_args.bin",
)


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


def base(folder: Path, **options: Any) -> Path:
    """A model with everything that may lie beside its weights."""
    model = write_model(folder / "model", **options)
    write_files(model, OF_THE_MODEL)
    write_files(model, dict.fromkeys([*UNTRAINED, *OF_OTHERS, ".gitattributes"], "{}"))
    write_sums(folder / "sums.jsonl")
    return model


def trained(folder: Path, **sections: Any) -> tuple[Path, dict[str, Any], str]:
    """Run a recipe of one step. Return its folder, the entry `saved` of run.json, and what was shown."""
    shown = io.StringIO()
    run = {"steps": 1, "output": str(folder / "out"), **sections.pop("run", {})}
    out = train(parse(folder, run=run, **sections), console=Console(file=shown, width=2000))
    return out, json.loads((out / "run.json").read_text())["saved"], shown.getvalue()


def test_files_that_belong_to_the_model_are_in_the_trained_folder(tmp_path: Path) -> None:
    base(tmp_path)
    out, saved, shown = trained(tmp_path)
    for name, text in OF_THE_MODEL.items():
        assert (out / name).read_text("utf-8") == text, name
    assert sorted(saved["beside_the_weights"]) == sorted(OF_THE_MODEL)
    assert "copied from the base: " in shown
    assert set(OF_THE_MODEL) <= set(json.loads((out / MANIFEST_NAME).read_text())["files"])
    AutoModelForCausalLM.from_pretrained(out)


def test_untrained_weights_in_other_formats_are_left_out_and_said(tmp_path: Path) -> None:
    base(tmp_path)
    out, saved, shown = trained(tmp_path)
    assert not any((out / name).exists() for name in (*UNTRAINED, *OF_OTHERS))
    assert saved["untrained_weights"] == ["model-Q4.gguf", "onnx/", "original/", "pytorch_model.bin", "tf_model.h5"]
    assert set(saved["left_out"]) == {*saved["untrained_weights"], *OF_OTHERS}
    assert "left out, because they hold its untrained weights: model-Q4.gguf, onnx/" in shown


def test_a_plain_base_is_said_nothing_about(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    _, saved, shown = trained(tmp_path)
    assert saved == {"form": "model", "eos_token_ids": [256]}
    assert "copied" not in shown
    assert "stops at" not in shown


def test_a_base_folder_may_end_with_a_slash_and_hold_the_run(tmp_path: Path) -> None:
    model = base(tmp_path)
    out, saved, _ = trained(tmp_path, model={"path": f"{model}/"}, run={"output": str(model / "runs" / "one")})
    assert out == model / "runs" / "one"
    assert sorted(saved["beside_the_weights"]) == sorted(OF_THE_MODEL)
    assert not (out / "runs").exists()


def test_base_and_delta_give_the_same_folder(tmp_path: Path) -> None:
    model = base(tmp_path)
    out, _, _ = trained(tmp_path)
    delta.diff(model, out, tmp_path / "d.safetensors")
    delta.apply(model, tmp_path / "d.safetensors", tmp_path / "applied")
    for name in (*OF_THE_MODEL, "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "applied" / name).read_bytes() == (out / name).read_bytes(), name
    assert not any((tmp_path / "applied" / name).exists() for name in ("run.json", MANIFEST_NAME, *UNTRAINED))


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from .custom_parts import SCALE
class CustomConfig(LlamaConfig):
    model_type = "custom-llama"
class CustomModel(LlamaModel):
    config_class = CustomConfig
class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        return output
"""


def test_custom_code_comes_along_and_loads(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    write_files(
        model, {"modeling_custom.py": CUSTOM, "custom_parts.py": "SCALE = 1\n", "processing_custom.py": "X = 1\n"}
    )
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "CustomConfig", "AutoModel": "CustomModel", "AutoModelForCausalLM": "CustomForCausalLM"}
    config |= {"model_type": "custom-llama", "architectures": ["CustomForCausalLM"]}
    config["auto_map"] = {auto: f"modeling_custom.{name}" for auto, name in names.items()}
    config["auto_map"]["AutoProcessor"] = "processing_custom.X"
    (model / "config.json").write_text(json.dumps(config))
    out, _, _ = trained(tmp_path, model={"trust_remote_code": True})
    for auto, name in ((AutoModelForCausalLM, "CustomForCausalLM"), (AutoModel, "CustomModel")):
        assert type(auto.from_pretrained(out, trust_remote_code=True)).__name__ == name
    assert json.loads((out / "config.json").read_text())["auto_map"].keys() == config["auto_map"].keys()
    assert (out / "processing_custom.py").is_file()


def test_an_adapter_as_a_base_is_refused(tmp_path: Path) -> None:
    """transformers would put it on its base, and save the adapter alone: what was trained beside it would be lost."""
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    out, _, _ = trained(tmp_path, method={"name": "lora", "rank": 2})
    with pytest.raises(UsageError, match=r"is an adapter.*merge_and_unload"):
        train(
            parse(tmp_path, model={"path": str(out / "adapter")}, run={"output": str(tmp_path / "next")}),
            console=quiet(),
        )


def with_tensors(model: Path, names: tuple[str, ...]) -> None:
    tensors = load_file(model / "model.safetensors") | {name: torch.ones(2) for name in names}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_weights_of_the_base_that_have_no_place_are_said(tmp_path: Path) -> None:
    """transformers drops some kinds in silence, such as layers that predict several tokens."""
    model = write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    with_tensors(model, ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision.a", "vision.b"))
    _, _, shown = trained(tmp_path)
    assert "2 of the base's 41 weights have no place in a LlamaForCausalLM (vision.a, vision.b)" in shown


def test_layers_that_transformers_ignores_are_said(tmp_path: Path) -> None:
    tiny("glm4_moe").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    with_tensors(tmp_path / "model", ("model.layers.92.eh_proj.weight",))
    _, _, shown = trained(tmp_path)
    assert "(model.layers.92.eh_proj.weight): they are neither trained nor in the trained folder" in shown


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_neox", "gemma3"])
def test_converted_weights_have_a_place(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    assert unplaced_notes(model, tmp_path) == []


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    (model / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 256}')
    with pytest.raises(UsageError, match=r"`temperature`.*add \"do_sample\": true"):
        trained(tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_that_lead_outside_are_no_files_of_a_model(tmp_path: Path) -> None:
    modules = [{"path": name} for name in ("..", "/etc", "a/../..", ".git", "", "2_Dense")]
    write_files(tmp_path, {"modules.json": json.dumps(modules), "2_Dense/config.json": "{}", ".git/config": ""})
    assert beside_weights(tmp_path).belonging == ("modules.json", "2_Dense/config.json")


def chat_rows(folder: Path, *, tail: str = "") -> None:
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": f"b{tail}"}]
    (folder / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 8), "utf-8")


def chat_base(folder: Path, template: str, *, generation: dict[str, Any] | None = None, tied: bool = True) -> Path:
    """A base that ends a text with <end> and whose template ends a turn with <|im_end|>."""
    model = write_model(folder / "model", tied=tied)
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(model)
    loaded = LlamaForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded.save_pretrained(model)
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(model)
    chat_rows(folder)
    return model


IM_END = 258
MARKED = MARKED_CHAT_TEMPLATE.replace("{{ eos_token }}", "<|im_end|>\n")
UNMARKED = CHAT_TEMPLATE.replace("{{ eos_token }}", "<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "loss_on"),
    [(UNMARKED, "last-answer"), (MARKED, "answers"), (MARKED, "all")],
    ids=["last", "all answers", "all"],
)
def test_the_token_that_ends_a_turn_ends_a_generation(template: str, loss_on: str, tmp_path: Path) -> None:
    chat_base(tmp_path, template, generation={"eos_token_id": 256, "pad_token_id": 257})
    data = {"format": "chat", "path": str(tmp_path / "chat.jsonl"), "loss_on": loss_on}
    out, saved, shown = trained(tmp_path, data=data)
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [256, IM_END]
    assert generation.pad_token_id == 257
    assert saved["eos_token_ids"] == [256, IM_END]
    assert "generate() also stops at <|im_end|>" in shown


def test_generate_stops_at_it(tmp_path: Path) -> None:
    chat_base(tmp_path, UNMARKED, generation={"eos_token_id": 256})
    data = {"format": "chat", "path": str(tmp_path / "chat.jsonl")}
    out, _, _ = trained(tmp_path, data=data, optimizer={"lr": 5e-2}, run={"steps": 30})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a?"}], add_generation_prompt=True, tokenize=False
    )
    prompt = torch.tensor([tokenizer(text)["input_ids"]])
    written = model.generate(input_ids=prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert written.tolist() == [*tokenizer("b")["input_ids"], IM_END]


def test_a_list_of_ends_keeps_what_the_base_had(tmp_path: Path) -> None:
    chat_base(tmp_path, UNMARKED, generation={"eos_token_id": [256, 5], "temperature": 0.7, "do_sample": True})
    out, _, _ = trained(tmp_path, data={"format": "chat", "path": str(tmp_path / "chat.jsonl")})
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [256, 5, IM_END]
    assert generation.temperature == 0.7


def test_prompts_and_completions_as_chat_do_so_too(tmp_path: Path) -> None:
    chat_base(tmp_path, UNMARKED)
    write_sums(tmp_path / "sums.jsonl")
    out, _, _ = trained(tmp_path, data={"as_chat": True})
    assert GenerationConfig.from_pretrained(out).eos_token_id == [256, IM_END]


@pytest.mark.parametrize("data", ["plain", "text"])
def test_other_data_leave_the_ends_alone(data: str, tmp_path: Path) -> None:
    chat_base(tmp_path, UNMARKED)
    write_sums(tmp_path / "sums.jsonl")
    text = {"format": "text", "path": str(tmp_path / "sums.jsonl"), "text": "{question}"}
    out, _, shown = trained(tmp_path, **({"data": text} if data == "text" else {}))
    assert GenerationConfig.from_pretrained(out).eos_token_id in (256, [256])  # transformers before 5.17 or so: a list
    assert "stops at" not in shown


def test_answers_that_end_with_ordinary_text_are_said(tmp_path: Path) -> None:
    chat_base(tmp_path, UNMARKED.replace("<|im_end|>\n", "\n"))
    out, _, shown = trained(tmp_path, data={"format": "chat", "path": str(tmp_path / "chat.jsonl")})
    assert "generate() will not know where an answer ends" in shown
    assert GenerationConfig.from_pretrained(out).eos_token_id in (256, [256])  # transformers before 5.17 or so: a list


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ({"name": "full"}, None),
        ({"name": "adagradselect", "fraction": 0.4}, "write method.always=['embedding']"),
        ({"name": "adagradselect", "fraction": 0.4, "always": ["embedding"]}, None),
        ({"name": "lora", "rank": 2}, "write method.train_embedding=true"),
        ({"name": "lora", "rank": 2, "train_embedding": True}, None),
        ({"name": "id3", "density": 0.01}, "only the selected entries"),
    ],
)
def test_added_tokens_that_nothing_has_trained_are_said(method: Any, advice: str | None, tmp_path: Path) -> None:
    """The rows of added tokens are the mean of all others until the embedding trains."""
    model = chat_base(tmp_path, UNMARKED)
    loaded = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        embeddings = loaded.get_input_embeddings().weight
        embeddings[IM_END] = embeddings[:IM_END].mean(0)
    loaded.save_pretrained(model)
    _, _, shown = trained(tmp_path, method=method, data={"format": "chat", "path": str(tmp_path / "chat.jsonl")})
    said = "1 added tokens of the data were never trained (<|im_end|>): 1 rows of the embedding are the mean"
    assert (said in " ".join(shown.split())) is bool(advice)
    assert advice is None or advice in shown


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "full"}, None),
        (
            {"name": "adagradselect", "fraction": 0.4},
            "1 rows of the embedding and 1 rows of the head are the mean of all others, or zero. "
            "method.name=adagradselect trains the embedding and the head only while they are selected; write "
            "method.always=['embedding', 'head']",
        ),
        ({"name": "adagradselect", "fraction": 0.4, "always": ["embedding"]}, ": 1 rows of the head are"),
        ({"name": "adagradselect", "fraction": 0.4, "always": ["embedding", "head"]}, None),
        ({"name": "lora", "rank": 2, "train_embedding": True}, "modules_to_save: [embed_tokens, lm_head]}}'"),
        ({"name": "peft", "type": "LORA", "options": {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}}, None),
        ({"name": "id3", "density": 0.01, "always": ["*embed_tokens.weight"]}, "selected entries of the head"),
    ],
)
def test_the_rows_of_an_untied_head_are_said_beside_the_embeddings(
    method: Any, said: str | None, tmp_path: Path
) -> None:
    chat_base(tmp_path, UNMARKED, tied=False)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for rows in (model.model.embed_tokens.weight, model.lm_head.weight):
            rows[IM_END] = rows[:IM_END].mean(0)
    model.save_pretrained(tmp_path / "model")
    _, _, shown = trained(tmp_path, method=method, data={"format": "chat", "path": str(tmp_path / "chat.jsonl")})
    shown = " ".join(shown.split())
    assert ("were never trained" in shown) is bool(said)
    assert said is None or said in shown


def test_an_adapter_on_the_head_which_nothing_would_train_is_refused(tmp_path: Path) -> None:
    """TRL's error for it, of all trainers, is no `UsageError`."""
    write_model(tmp_path / "model", tied=False)
    write_sums(tmp_path / "sums.jsonl")
    with pytest.raises(UsageError, match=r"the adapter is on 'lm_head' too.*leave it out of the targets"):
        trained(tmp_path, method={"name": "lora", "rank": 2, "targets": ["q_proj", "lm_head"]})


def test_rows_made_by_transformers_count_as_new(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(write_model(tmp_path))
    with torch.random.fork_rng():
        model.resize_token_embeddings(262)
    rows = model.get_input_embeddings().weight.detach()
    rows[261] = 0.0
    assert _are_new(rows, [3, 256, 258, 260, 261]) == [False, False, True, True, True]


QUANTISED = {
    "bitsandbytes 4-bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["mlp"]},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
}


def quantised_base(folder: Path, settings: dict[str, Any]) -> Path:
    model = write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return model


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "adagradselect"}, {"name": "id3", "density": 0.01}])
def test_training_a_quantised_base_itself_is_refused(name: str, method: dict[str, Any], tmp_path: Path) -> None:
    """Before its weights are read: the packages that read them need not be there."""
    quantised_base(tmp_path, QUANTISED[name])
    with pytest.raises(UsageError) as refusal:
        train(parse(tmp_path, method=method), console=quiet())
    said = str(refusal.value)
    assert f"is quantised ({name})" in said
    assert "method.name=lora" in said
    assert not (tmp_path / "out").exists()
    # 258 embeddings of 16, tied; 9 norms of 16. A layer: 4 matrices of attention, 3 of its MLP.
    kept = 258 * 16 + (2 * NUM_LAYERS + 1) * 16
    mlp, attention = 3 * 16 * 32 * NUM_LAYERS, 4 * 16 * 16 * NUM_LAYERS
    count = kept + (mlp if name == "mxfp4" else 0)
    assert f"about {count:,} of its {kept + mlp + attention:,} weights can train" in said


def test_a_plan_of_training_it_is_refused_and_of_an_adapter_is_noted(tmp_path: Path) -> None:
    quantised_base(tmp_path, QUANTISED["gptq"])
    with pytest.raises(UsageError, match="Write method"):
        RecipePlanner().plan(parse(tmp_path))
    notes = RecipePlanner().plan(parse(tmp_path, method={"name": "lora", "rank": 2})).notes
    assert any("quantised (gptq)" in note for note in notes)


def test_random_weights_of_a_quantised_configuration_are_plain(tmp_path: Path) -> None:
    quantised_base(tmp_path, QUANTISED["gptq"])
    out, _, _ = trained(tmp_path, model={"random_weights": True})
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.fixture
def as_if_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say that their weights are codes; the packages of real ones are not needed for what comes after."""
    load = run_inputs.load_model

    def loaded(*args: Any, **options: Any) -> Any:
        model: Any = load(*args, **options)
        model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
        model.is_quantized = model.is_loaded_in_8bit = True
        return model

    monkeypatch.setattr(run_inputs, "load_model", loaded)


@pytest.mark.usefixtures("as_if_quantised")
def test_an_adapter_on_a_quantised_base_ends_as_an_adapter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tied=False)
    write_sums(tmp_path / "sums.jsonl")
    before = weights(model)
    out, saved, shown = trained(tmp_path, method={"name": "lora", "rank": 2}, run={"steps": 3})
    assert saved["form"] == "adapter"
    assert not (out / "model.safetensors").exists()
    assert not (out / "config.json").exists()
    for folder in (out, out / "adapter"):
        adapter = load_file(folder / "adapter_model.safetensors")
        # TRL casts adapters on a quantised base to bfloat16, which swallows small updates.
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert f"adapter in {out}" in shown
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("python -c")]
    assert "Auto.from_pretrained('UNQUANTISED_BASE'" in shlex.split(line)[2]
    assert str(out / "adapter") in line
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    loaded = AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(loaded, str(out / "adapter")).merge_and_unload()
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.usefixtures("as_if_quantised")
def test_a_base_that_no_gradient_passes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    load = run_inputs.load_model

    def loaded(*args: Any, **options: Any) -> Any:
        model: Any = load(*args, **options)
        model.hf_quantizer.is_trainable = False
        return model

    monkeypatch.setattr(run_inputs, "load_model", loaded)
    with pytest.raises(UsageError, match="cannot train through weights of that kind"):
        train(parse(tmp_path, method={"name": "lora", "rank": 2}), console=quiet())

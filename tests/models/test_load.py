"""Loading models by Hub id, folder, GGUF file and demo package, and refusing damaged ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

import strop
from strop.config.schema import LoraSection
from strop.errors import ModelError
from strop.models.families.shape import read_model_info
from strop.models.load import load_base, load_config, load_without_weights, weights_folder
from strop.models.lora import add_lora
from strop.models.sharding import load_sharded
from strop.models.source import Source, fingerprint, locate, read_safetensors_header
from strop.models.tokenizer import load_tokenizer
from tests.support import tiny
from tests.support.hub_standin import Fault, serve

LOCATE = (
    "from strop.models.source import locate; from strop.errors import ModelError\n"
    "try: locate('owner/tiny')\nexcept ModelError as error: print(*error.lines())"
)


def run_python(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python online with an empty Hub cache."""
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **env}
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=inherited | env, capture_output=True, text=True, timeout=100, check=False)


def test_hub_download_skips_pickle_and_code_and_is_cached(tiny_folder: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny_folder.iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    again = {"consolidated.safetensors": b"the same weights", "onnx/model.safetensors": b"and once more"}
    script = """
import sys
from strop.engine.kernels.warmup import load
load(None)
import torch
from strop.errors import ModelError
from strop.models.load import load_base
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
for name in sys.argv[1:]:
    try:
        source = locate(name)
        load_tokenizer(source)
        print(source.name, sum(w.numel() for w in load_base(source, torch.float32, "cpu").parameters()))
    except ModelError as error:
        print("refused:", *error.lines())
"""
    with serve("models", "owner/tiny", {**files, **unwanted, **again}) as (address, requested):

        def run(*names: str, offline: str = "0") -> list[str]:
            done = run_python(tmp_path / "hf", "-c", script, *names, HF_ENDPOINT=address, HF_HUB_OFFLINE=offline)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        numbers = sum(weight.numel() for weight in tiny.model().parameters())
        loaded, other, revision = run("owner/tiny", "owner/other", "owner/tiny@v9")
        assert loaded == f"owner/tiny {numbers}"
        assert not [path for path in requested if path.split("?")[0].endswith((".bin", ".py", *again))]
        assert "no such model on the Hub that this account may see" in other
        assert revision.startswith("refused: owner/tiny: has no revision v9")
        before = len(requested)
        loaded, other = run("owner/tiny", "owner/other", offline="1")
        assert loaded == f"owner/tiny {numbers}" and len(requested) == before and "while offline" in other


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"model.safetensors": "silence"}, "broke: Server disconnected"),
        ({"model.safetensors": "short"}, "Consistency check failed"),
        ({"/api/": "page"}, "is not that of the Hub"),
        ({"/api/": 500}, "the Hub returned 500"),
        ({"/api/": 403}, "the Hub returned 403"),
        ({"/resolve/": 403}, "the Hub returned 403"),
    ],
    ids=str,
)
def test_failed_download_raises_model_error(
    faults: dict[str, Fault], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in tiny_folder.iterdir()}
    with serve("models", "owner/tiny", files, faults=faults) as (address, _):
        done = run_python(tmp_path / "hf", "-c", LOCATE, HF_ENDPOINT=address)
    assert done.returncode == 0 and done.stdout.startswith("owner/tiny: ") and message in done.stdout, done.stderr


@pytest.mark.parametrize("words", [["plan", "--model", "o/n"], ["check", "--model", "demo", "--data", "o/n"]])
def test_invalid_hub_token_is_an_input_error(words: list[str], tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_caf\u00e9"}
    done = run_python(tmp_path, "-m", "strop.cli", *words, **env)
    assert done.returncode == 2 and "o/n: invalid request to the Hub: 'ascii'" in done.stderr, done.stderr


def test_partial_download_is_reported_offline(tmp_path: Path, tiny_folder: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny_folder.iterdir()}
    with serve("models", "owner/tiny", files, faults={"chat_template": "silence"}) as (address, _):
        assert "broke" in run_python(tmp_path, "-c", LOCATE, HF_ENDPOINT=address).stdout
    output = run_python(tmp_path, "-c", LOCATE, HF_HUB_OFFLINE="1").stdout
    assert "while offline" in output
    is_partial = "only in part in the local Hub cache" in output
    assert is_partial == hasattr(errors, "IncompleteSnapshotError"), output


def test_adapter_on_the_hub_is_refused_as_model(tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    with serve("models", "owner/lora", files) as (address, _):
        done = run_python(tmp_path, "-m", "strop.cli", "chat", "owner/lora", HF_ENDPOINT=address)
    message = (
        "owner/lora: an adapter, not a model; adapters are read from folders\nFix: hf download owner/lora --local-dir"
    )
    assert done.returncode == 2 and message in done.stderr and str(tmp_path) not in done.stderr, done.stderr


def test_folder_loads_its_weights_frozen(tiny_folder: Path) -> None:
    source = locate(str(tiny_folder))
    model = load_base(source, torch.float32, "cpu")
    expected = tiny.model()
    assert all(
        torch.equal(weight, dict(expected.named_parameters())[name]) for name, weight in model.named_parameters()
    )
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
    assert {w.device.type for w in load_without_weights(source).parameters()} == {"meta"}


def damage_model(folder: Path, kind: str) -> str:
    """Damage a copy of the tiny model and return a fragment of the expected message."""
    file = folder / "model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        return "damaged"
    if kind == "missing":
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, {"format": "pt"})
        return "weights are missing"
    if kind == "nan":
        weights = load_file(file)
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, file, {"format": "pt"})
        return "NaN"
    if kind == "garbage":
        file.write_bytes(b"\xff" * 64)
        return "damaged"
    (folder / "tokenizer.json").write_text("{")
    return "its tokenizer cannot be loaded"


@pytest.mark.parametrize("kind", ["truncated", "missing", "nan", "garbage", "tokenizer"])
def test_damaged_model_is_refused(kind: str, tmp_path: Path) -> None:
    message = damage_model(tiny.save_tiny(tmp_path), kind)
    with pytest.raises(ModelError, match=message):
        source = locate(str(tmp_path))
        for file in tmp_path.glob("*.safetensors"):
            read_safetensors_header(file)
        load_tokenizer(source)
        load_base(source, torch.float32, "cpu")


def save_changed(folder: Path, **fields: Any) -> Path:
    """Save a tiny model and change fields of its config.json."""
    file = tiny.save_tiny(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", b"{", "index.json: damaged"),
        ("model.safetensors.index.json", b"{}", "index.json: damaged"),
        ("model.safetensors.index.json", b'{"weight_map": ["a"]}', "index.json: damaged"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "its header is invalid"),
        ("model.safetensors", b"\x08" + bytes(7) + b'{"a":{}}', "its header is invalid"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "damaged"),
    ],
)
def test_damaged_files_are_refused_before_weights_are_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tiny.save_tiny(tmp_path) / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        locate(str(tmp_path))


def test_vocabulary_size_that_differs_from_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"of another shape, first model.embed_tokens.weight"):
        load_base(locate(str(save_changed(tmp_path, vocab_size=300))), torch.float32, "cpu")


def _add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    """Add or replace tensors of a saved model."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def _cast_weight(folder: Path, kind: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _add_tensors(folder, **{name: (load_file(folder / "model.safetensors")[name] * 100).to(kind)})


DAMAGE = {
    "more layers than the config says": (
        lambda folder: save_changed(folder, num_hidden_layers=1),
        "9 tensors are not part of the model .*, first model.layers.1.input_layernorm.weight",
    ),
    "an unknown bias": (
        lambda folder: _add_tensors(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "not part of the model .*, first model.layers.0.self_attn.q_proj.bias",
    ),
    "an unknown norm": (
        lambda folder: _add_tensors(folder, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        "not part of the model .*, first model.layers.0.self_attn.q_norm.weight",
    ),
    "one weight under two names": (
        lambda folder: _add_tensors(folder, **{"layers.0.mlp.up_proj.weight": torch.ones(64, 32)}),
        "model.layers.0.mlp.up_proj.weight is stored twice, as layers.0",
    ),
    "an untied head in a tied model": (
        lambda folder: _add_tensors(folder, **{"lm_head.weight": torch.ones(len(tiny.tokenizer("chatml")), 32)}),
        "lm_head.weight and model.embed_tokens.weight differ, but config.json ties them",
    ),
    "8 bit without a scale": (
        lambda folder: _cast_weight(folder, torch.float8_e4m3fn), "stored as F8_E4M3, and config.json"
    ),
    "integers": (lambda folder: _cast_weight(folder, torch.int32), "up_proj.weight is stored as I32, and config.json"),
    "another shape": (
        lambda folder: save_changed(folder, num_key_value_heads=4),
        "4 weights are missing or of another shape, first model.layers.0.self_attn.k_proj.weight",
    ),
    "a value that overflows": (
        lambda folder: _add_tensors(
            folder, **{"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32).double() * 1e300}
        ),
        "NaN or infinity",
    ),
    "weights of another family": (
        lambda folder: save_file({"transformer.a": torch.ones(1)}, folder / "model.safetensors"),
        "none of its tensors is a weight of a model of type llama, first transformer.a",
    ),
}  # fmt: skip
LOADERS: dict[str, Any] = {
    "16 bit": lambda source: load_base(source, torch.float32, "cpu"),
    "nf4": lambda source: load_base(source, torch.float32, "cpu", quantization="nf4"),
    "share": lambda source: load_sharded(source, torch.float32, "cpu", 0, 1),
}


@pytest.mark.parametrize("way", LOADERS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_of_another_model_are_refused(kind: str, way: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(tiny.save_tiny(tmp_path))
    with pytest.raises(ModelError, match=message):
        LOADERS[way](locate(str(tmp_path)))


@pytest.mark.parametrize("way", LOADERS)
def test_unrelated_tensors_are_ignored(way: str, tmp_path: Path) -> None:
    """Heads of other tasks, multi-token prediction, buffers of old checkpoints and a copy of a tied embedding."""
    tied = load_file(tiny.save_tiny(tmp_path) / "model.safetensors")["model.embed_tokens.weight"].clone()
    _add_tensors(tmp_path, **{"score.weight": torch.ones(1, 32), "model.mtp.norm.weight": torch.ones(32)})
    _add_tensors(tmp_path, **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": tied})
    _add_tensors(tmp_path, **{"model.layers.1.self_attn.masked_bias": torch.ones(1)})
    LOADERS[way](locate(str(tmp_path)))


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    weights = load_file(tiny.save_tiny(tmp_path) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({name: weights[name] * 2}, tmp_path / "b.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {**dict.fromkeys(weights, "a.safetensors"), "c": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (locate, read_model_info):
        with pytest.raises(ModelError, match=f"{name} is in a.safetensors and in b.safetensors"):
            read(str(tmp_path))


@pytest.mark.parametrize("way", ["16 bit", "nf4"])
def test_single_file_takes_precedence_over_index(way: str, tmp_path: Path) -> None:
    # transformers does the same.
    ids = torch.arange(5, 25)[None]
    expected = LOADERS[way](locate(str(tiny.save_tiny(tmp_path))))(ids).logits
    weights = {name: weight * 2 for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "old.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "old.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(LOADERS[way](locate(str(tmp_path)))(ids).logits, expected)


def test_fingerprint_covers_middle_tensors(tmp_path: Path) -> None:
    """Two models with equal names, shapes, first and last tensors must not share a cached 4-bit copy."""
    sizes = {"vocab_size": len(tiny.tokenizer("chatml")), "hidden_size": 256, "intermediate_size": 64, "head_dim": 256}
    model = tiny.model(**sizes, num_key_value_heads=1)
    models = []
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        models.append(locate(str(tmp_path / name)))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(models[0]) != fingerprint(models[1])
    quantized = [load_base(source, torch.float32, "cpu", quantization="nf4", resident_layers=None) for source in models]
    assert not torch.equal(*(model.get_parameter("model.layers.0.mlp.up_proj.weight") for model in quantized))


@pytest.mark.parametrize(
    ("fields", "conflicting"),
    [
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e4}, None),
        ({"rope_scaling": None, "rope_theta": 1e4}, None),
    ],
)
def test_conflicting_rope_fields_are_refused(fields: dict[str, Any], conflicting: str | None, tmp_path: Path) -> None:
    # transformers would silently ignore one of the fields.
    save_changed(tmp_path, **fields)
    if conflicting is None:
        assert load_config(locate(str(tmp_path))).rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
        return
    with pytest.raises(ModelError, match=f"rope_parameters and {conflicting} contradict each other"):
        locate(str(tmp_path))


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    save_changed(tmp_path, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ModelError, match="no language model of type t5"):
        load_base(locate(str(tmp_path)), torch.float32, "cpu")


def test_fp8_config_dtype_is_computed_in_bf16(tmp_path: Path) -> None:
    source = locate(str(save_changed(tmp_path, dtype="float8_e4m3fn")))
    assert next(load_without_weights(source).parameters()).dtype == torch.bfloat16
    save_changed(tmp_path, dtype="float7")
    with pytest.raises(ModelError, match=r"cannot read its config: .*float7"):
        load_without_weights(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": None}, "cannot read its config: .*num_hidden_layers"),
        ({"num_attention_heads": 5}, "cannot read its config: .*not a multiple"),
        ({"hidden_act": "zelu"}, "no language model of type llama: KeyError: 'zelu'"),
    ],
)
def test_invalid_config_field_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_without_weights(locate(str(save_changed(tmp_path, **fields))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Later"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 5, "tokenizer_class": "TokenizersBackend"}'),
    ],
)
def test_unreadable_tokenizer_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tiny.save_tiny(tmp_path) / name).write_text(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(locate(str(tmp_path)))


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_broken_generation_config_is_refused(tmp_path: Path, scheme: str) -> None:
    (tiny.save_tiny(tmp_path) / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ModelError, match=r"generation_config\.json: not JSON"):
        load_base(locate(str(tmp_path)), torch.float32, "cpu", quantization=scheme)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"},
    ],
)
def test_unknown_quantization_scheme_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"quantized by .*, which strop does not support"):
        locate(str(save_changed(tmp_path, quantization_config=section)))


@pytest.mark.parametrize("by", ["gptq", "awq", "compressed-tensors", None])
def test_weights_quantized_by_other_tools_are_refused(tmp_path: Path, by: str | None) -> None:
    section = {"bits": 4} if by is None else {"quant_method": by, "bits": 4}
    with pytest.raises(ModelError, match=f"quantized by {by or 'an unknown tool'}, which strop does not support"):
        locate(str(save_changed(tmp_path, quantization_config=section)))


def test_fp8_weights_load_in_16_bit_and_are_not_requantized(tmp_path: Path) -> None:
    """Blocks of 16 x 16 with one scale each, as in the fp8 checkpoints of Qwen 3 and DeepSeek."""
    section = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    save_changed(tmp_path / "fp8", quantization_config=section)
    plain, packed = load_file(tiny.save_tiny(tmp_path / "plain") / "model.safetensors"), {}
    for name, weight in list(plain.items()):
        if weight.dim() == 2 and "embed" not in name:
            high, wide = (size // 16 for size in weight.shape)
            blocks = weight.view(high, 16, wide, 16).transpose(1, 2)
            scale = blocks.abs().amax((2, 3)) / 448
            low = (blocks / scale[:, :, None, None]).to(torch.float8_e4m3fn)
            packed |= {name: low.transpose(1, 2).reshape(weight.shape).contiguous(), f"{name}_scale_inv": scale}
            plain[name] = (low.float() * scale[:, :, None, None]).transpose(1, 2).reshape(weight.shape).contiguous()
        else:
            packed[name] = weight
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    save_file(packed, tmp_path / "fp8/model.safetensors", {"format": "pt"})
    ids = torch.arange(5, 25)[None]
    logits = [load_base(locate(str(tmp_path / kind)), torch.float32, "cpu")(ids).logits for kind in ("fp8", "plain")]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="weights are in fp8"):
        load_base(locate(str(tmp_path / "fp8")), torch.float32, "cpu", quantization="nf4")


def test_local_folder_named_like_a_hub_id_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_tiny(tmp_path / "org/model")
    monkeypatch.chdir(tmp_path)
    assert locate("org/model").path == tmp_path / "org/model"
    with pytest.raises(ModelError, match="org/model: a local model, which has no revision main"):
        locate("org/model", "main")


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """The tokenizer has one token more than the embedding has rows."""
    known = len(tiny.tokenizer("chatml")) - 1
    tiny.model(vocab_size=known).save_pretrained(tmp_path / "base")
    tiny.tokenizer("chatml").save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "completion": "a line"}) + "\n")
    options: dict[str, Any] = {"model": tmp_path / "base", "data": rows, "model.device": "cpu", "train.max_steps": 1}
    with pytest.raises(ModelError, match=rf"rows.jsonl:1: .* none for token {known} \(<.im_end.>\)"):
        strop.train(out=tmp_path / "run", **options)
    with pytest.raises(ModelError, match=f"token {known}, but the model has {known} tokens"):
        strop.load(tmp_path / "base", device="cpu").generate("hello")


def test_fingerprints_distinguish_models(tiny_folder: Path, tmp_path: Path) -> None:
    same, different = tiny.save_tiny(tmp_path / "same"), tmp_path / "different"
    tiny.model(seed=1).save_pretrained(different)
    assert (
        fingerprint(locate(str(tiny_folder))) == fingerprint(locate(str(same))) != fingerprint(locate(str(different)))
    )


def test_index_with_paths_outside_the_folder_is_refused(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path)
    index = {"weight_map": {"a": "../../etc/x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its folder"):
        locate(str(tmp_path))


def test_demo_model_loads_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a packed GGUF file through the cache and save it as a folder that plain transformers loads."""
    source = locate("demo")
    tokenizer = load_tokenizer(source)
    assert load_config(source).model_type == "llama"
    model = load_base(source, torch.float32, "cpu")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
        assert "Paris" in tokenizer.decode(logits[0, -1].argmax())
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        tokenizer.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(again(ids).logits, logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    with monkeypatch.context() as patch:  # the second load reads the cache, not the GGUF file
        patch.setattr("strop.models.load.new_folder", lambda path: pytest.fail("converted again"))
        load_tokenizer(source)
        load_base(source, torch.bfloat16, "cpu")
    tuned = add_lora(model, LoraSection(r=2, alpha=4, target_modules="attention"), tokenizer)
    assert tuned.peft_config["default"].base_model_name_or_path == str(weights_folder(source).resolve())
    assert fingerprint(locate(source.name)) == fingerprint(source)
    named = locate(f"gguf:{source.path}#sha256={fingerprint(source)}")
    assert fingerprint(named) == fingerprint(source)
    with pytest.raises(ModelError, match="the file has changed"):
        locate(f"gguf:{source.path}#sha256={'0' * 64}")


def test_gemma2_loads_with_softcapped_attention(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_base(Source("gemma", "folder", tmp_path), torch.float32, "cpu")
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


def test_attention_softcap_is_applied(tmp_path: Path) -> None:
    """transformers 5.20 uses PyTorch's attention for Gemma 2, which ignores the cap."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(
        vocab_size=64,
        head_dim=16,
        num_hidden_layers=1,
        attn_logit_softcapping=0.05,
        final_logit_softcapping=None,
        **sizes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]

    def logits(cap: float | None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager", dtype=torch.float32, attn_logit_softcapping=cap
        )
        with torch.no_grad():
            return model(ids).logits

    with torch.no_grad():
        loaded = load_base(locate(str(tmp_path)), torch.float32, "cpu")(ids).logits
    assert (logits(0.05) - logits(None)).abs().max() > 0.01
    torch.testing.assert_close(loaded, logits(0.05))

"""A loaded teacher: its targets are those of transformers' own logits, whatever the model does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tests.helpers_training import Largest
from tests.teachers.helpers import LENGTH, examples, logits_of, make_teacher
from thimble.errors import ConfigError, DataError, EnvironmentProblem
from thimble.objectives import linear_cross_entropy
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets
from thimble.teachers import Asked, models
from thimble.teachers.direct import DirectTeacher, open_direct

CPU = torch.device("cpu")


def opened(folder: Path, asked: Asked, **options: Any) -> DirectTeacher:
    return open_direct(folder, examples(), asked, device=CPU, precision="float32", **options)


def assert_exact(targets: Any, logits: Tensor, tolerance: float = 2e-5) -> None:
    """Top k, their log probabilities and the tails at every temperature are those of ``logits``."""
    assert isinstance(targets, SparseTargets)
    best = logits.topk(targets.indices.shape[-1]).indices
    assert torch.equal(targets.indices, best)
    for temperature in targets.temperatures:
        p = (logits / temperature).softmax(-1)
        log_probs, tail = targets.at(temperature)
        torch.testing.assert_close(
            log_probs.double(), p.gather(-1, best).log(), atol=tolerance, rtol=tolerance
        )
        rest = p.scatter(-1, best, 0).sum(-1)
        torch.testing.assert_close(tail.double().exp(), rest, atol=tolerance, rtol=1e-4)


def ask(teacher: DirectTeacher, *numbers: int) -> Any:
    return teacher.targets(numbers, torch.from_numpy(examples().rows(numbers).inputs))


def test_targets_are_those_of_the_models_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 1)  # many chunks
    folder = make_teacher(tmp_path)
    teacher = opened(folder, Asked(8, (1.0, 2.0, 0.5)))
    rows = examples().rows([3, 0, 7, 11, 12, 13, 14])
    found = ask(teacher, 3, 0, 7, 11, 12, 13, 14)
    assert found.indices.shape == (7, LENGTH, 8)
    assert_exact(found, logits_of(folder, rows.inputs))


@pytest.mark.parametrize("sampled", [False, True])
def test_positions_times_vocabulary_is_never_held(
    sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 1)  # 64 positions at a time
    teacher = opened(make_teacher(tmp_path), Asked(8, (2.0,), sampled=sampled))
    inputs = torch.from_numpy(examples().rows(range(16)).inputs)
    with Largest() as seen:
        found = teacher.targets(range(16), inputs)
    assert found.indices.shape == (*inputs.shape, 8)
    assert inputs.numel() == 3 * 64
    assert 0 < seen.elements <= 64 * examples().vocab_size


def test_the_row_at_a_position_is_the_distribution_after_it(tmp_path: Path) -> None:
    # The last input decides nothing but its own row, and it does decide that.
    teacher = opened(make_teacher(tmp_path), Asked(300))
    inputs = torch.from_numpy(examples().rows([5]).inputs)
    changed = inputs.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 300
    one, other = teacher.targets([5], inputs), teacher.targets([5], changed)
    assert torch.equal(one.log_probs[0, :-1], other.log_probs[0, :-1])
    assert not torch.equal(one.log_probs[0, -1], other.log_probs[0, -1])


def test_padding_and_tokens_the_data_does_not_have_do_not_count(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path, extra=52)
    logits = logits_of(folder, examples().rows([1, 2]).inputs)
    assert logits.shape[-1] == examples().vocab_size + 52
    assert_exact(ask(opened(folder, Asked(8, (1.0, 2.0))), 1, 2), logits[..., :-52])


@pytest.mark.parametrize("kind", ["bias", "scale", "cap"])
def test_what_other_families_do_to_their_logits_is_done(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": examples().vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "pad_token_id": None,
    }
    model: Any
    if kind == "bias":
        model = PhiForCausalLM(PhiConfig(**shape))
        torch.nn.init.normal_(model.lm_head.bias)
    elif kind == "scale":
        model = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.3))
    else:
        config = Gemma2Config(**shape, head_dim=8, final_logit_softcapping=2.0)
        model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    examples().tokenizer.save(tmp_path)
    teacher = opened(tmp_path, Asked(8, (1.0, 2.0)))
    assert teacher.loaded.finish is not None
    assert_exact(ask(teacher, 0, 1), logits_of(tmp_path, examples().rows([0, 1]).inputs))


def test_a_model_whose_logits_are_made_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_finish", lambda model, rows=None: lambda logits: 1.5 * logits)
    with pytest.raises(DataError, match="in a way thimble does not know"):
        opened(make_teacher(tmp_path), Asked())


def test_a_document_does_not_see_those_before_it(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path)
    teacher = opened(folder, Asked(8))
    inputs = torch.from_numpy(examples().rows([0, 1]).inputs)
    starts = torch.zeros_like(inputs, dtype=torch.bool)
    starts[0, 5] = starts[0, 9] = starts[1, 0] = True
    found = teacher.targets([0, 1], inputs, starts)
    for row, begin, end in ((0, 0, 5), (0, 5, 9), (0, 9, LENGTH), (1, 0, LENGTH)):
        alone = logits_of(folder, inputs[row : row + 1, begin:end])
        assert torch.equal(found.indices[row : row + 1, begin:end], alone.topk(8).indices)


def test_draws_are_the_rows_own_and_of_the_teachers_distribution(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path)
    teacher = opened(folder, Asked(4000, (2.0,), sampled=True, seed=3))
    found, alone = ask(teacher, 2, 6), ask(teacher, 6)
    assert isinstance(found, SampledTargets)
    assert torch.equal(found.indices[1], alone.indices[0])  # whatever stands beside it
    p = (logits_of(folder, examples().rows([2, 6]).inputs) / 2).softmax(-1)
    weights = found.weights.double()
    share = torch.zeros_like(p).scatter_add_(-1, found.indices, weights)
    assert (share - p).abs().max() < 5 * (0.25 / 4000) ** 0.5
    torch.testing.assert_close(
        found.log_probs.double(), p.log().gather(-1, found.indices), atol=2e-5, rtol=2e-5
    )
    other = ask(opened(folder, Asked(4000, (2.0,), sampled=True, seed=4)), 6)
    assert not torch.equal(other.indices, alone.indices)


def test_a_checkpoint_or_run_of_ours_is_a_teacher() -> None:
    from tests.helpers_evaluation import finished_run

    rows = examples().rows([0, 1])
    logits = logits_of(models.find(finished_run()), rows.inputs)
    assert_exact(ask(opened(finished_run(), Asked(8)), 0, 1), logits)


def test_an_adapter_changes_the_teacher_and_its_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = make_teacher(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    model.save_pretrained(tmp_path / "adapter")
    teacher, plain = (
        opened(folder, Asked(8), adapter=tmp_path / "adapter"),
        opened(folder, Asked(8)),
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    logits = logits_of(tmp_path / "merged", examples().rows([0]).inputs)
    assert_exact(ask(teacher, 0), logits, tolerance=1e-4)
    assert teacher.identity["weights"] == plain.identity["weights"]
    assert teacher.identity["adapter"] != plain.identity["adapter"] is None
    with pytest.raises(DataError, match="is an adapter, not a model"):
        opened(tmp_path / "adapter", Asked(8))
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        opened(folder, Asked(8), adapter=tmp_path / "base")


# --- what is refused


def test_another_vocabulary_is_refused_and_more_tokens_are_not(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    extra = dict(content["added_tokens"][0], id=examples().vocab_size, content="<|more|>")
    content["added_tokens"].append(extra)
    file.write_text(json.dumps(content))
    models.check_vocabulary(folder, examples())
    # The same vocabulary with another end of text: as base and instruction-tuned models differ.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|more|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    models.check_vocabulary(folder, examples())

    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-1], list(vocabulary)[-2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"another vocabulary(.|\n)*2 of (.|\n)*--tokenizer"):
        opened(folder, Asked())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        opened(folder, Asked())


def test_rows_longer_than_the_teacher_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reads at most 8 tokens"):
        opened(make_teacher(tmp_path, max_position_embeddings=8), Asked())


def test_a_head_without_all_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 250 logits"):
        opened(make_teacher(tmp_path, vocab_size=250), Asked())


def test_pickles_missing_tensors_and_code_are_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="a pickle"):
        opened(folder, Asked())
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        opened(folder, Asked())

    folder = make_teacher(tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"lacks model\.layers\.2"):
        opened(folder, Asked())
    (folder / "modeling_own.py").write_text("raise SystemExit('code was run')")
    own = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(DataError, match="cannot load"):
        opened(folder, Asked())


def test_what_the_hub_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: Any, **options: Any) -> str:
        answer: Any = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("gated", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(EnvironmentProblem, match=r"Accept it at (.|\n)*HF_TOKEN"):
        models.find("who/what")
    with pytest.raises(DataError, match="There is no model"):
        models.find("no/such/place")


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"temperatures": ()},
        {"temperatures": (0.0,)},
        {"temperatures": (1.0, 1.0)},
        {"temperatures": (float("nan"),)},
        {"temperatures": (1.0, 2.0), "sampled": True},
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Asked(**options)


# --- weights in memory


def test_a_copy_in_memory_is_gone_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "shm"
    disk.mkdir()
    monkeypatch.setattr(models, "RAM_DISK", disk)
    (disk / f"{models.RAM_PREFIX}999999999-x").mkdir()  # of a process that died
    folder = make_teacher(tmp_path / "a")
    with models.in_memory(folder) as copy:
        assert [p.name for p in disk.iterdir()] == [copy.name]
        assert (copy / "model.safetensors").read_bytes() == (
            folder / "model.safetensors"
        ).read_bytes()
    assert not list(disk.iterdir())
    inputs = torch.from_numpy(examples().rows([0]).inputs)
    found = [
        opened(folder, Asked(8), ram_disk=ram).targets([0], inputs).log_probs
        for ram in (False, True)
    ]
    assert torch.equal(*found)
    assert not list(disk.iterdir())
    with pytest.raises(RuntimeError), models.in_memory(folder):
        raise RuntimeError
    assert not list(disk.iterdir())

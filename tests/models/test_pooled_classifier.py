"""Classifiers of pooled states: against sentence-transformers, and by hand on plain encoders."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcustom.core.errors import ModelError, RecipeError
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.tokens import TokenizedExample, collate
from fedcustom.federated.resolve import resolved
from fedcustom.models.configuration import pooling_of
from fedcustom.models.forward import classification_logits
from fedcustom.models.load import Base, load_base
from fedcustom.models.pooled_classifier import FILE, PooledClassifier
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe, to_toml
from helpers.interpreter import run_python
from helpers.methods import LABELS, make
from helpers.tiny_models import sentence_files, tiny_tokenizer

TASK = LearningTask("classification", LABELS)
TEXTS = ["the old cat", "a small house near the river and then a garden with an apple", "soup", "dog sees"]


def load(base: str | Path, **settings: Any) -> Base:
    return load_base(ModelSettings(base=str(base), **settings), TASK, 0)


def logits_of(base: Base, texts: list[str]) -> torch.Tensor:
    """As in training and evaluation: in one padded batch, where only logits are wanted."""
    rows = [TokenizedExample.of(base.tokenizer(text)["input_ids"], [], label=0) for text in texts]
    batch = collate(rows, base.tokenizer.pad_token_id, base.task, sequence_to_sequence=False)
    with torch.no_grad():
        return classification_logits(base.model, batch)


# --- against sentence-transformers ---


def test_vectors_are_those_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    base = load("builtin:minilm")
    assert (base.model.config.pooling, base.model.config.normalize) == ("mean", True)
    theirs = SentenceTransformer(base.path, device="cpu").encode(TEXTS)
    batch = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        ours = base.model.pooled(base.model.encoder(**batch), batch["attention_mask"])
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    weight, bias = base.model.classifier.weight.detach().numpy(), base.model.classifier.bias.detach().numpy()
    np.testing.assert_allclose(logits_of(base, TEXTS).numpy(), theirs @ weight.T + bias, atol=1e-6)


MODES = {
    "mean": {"pooling_mode": "mean"},
    "first": {"pooling_mode": "cls"},
    "max": {"pooling_mode": ["max"]},
    "last": {"pooling_mode": "lasttoken"},
    "mean, old": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    "first, old": {"pooling_mode_cls_token": True, "pooling_mode_mean_sqrt_len_tokens": False},
    "max, old": {"pooling_mode_max_tokens": True},
    "last, old": {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_folder_says_how_it_is_pooled(
    tiny: dict[str, str], tmp_path: Path, mode: str, normalize: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = sentence_files(shutil.copytree(tiny["bert"], tmp_path / "m"), MODES[mode], normalize=normalize)
    said = pooling_of(ModelSettings(base=str(folder)))
    assert said is not None
    assert (said.name, said.normalize) == (mode.partition(",")[0], normalize)
    base = load(folder)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True).clone()
    torch.testing.assert_close(logits_of(base, TEXTS), base.model.classifier(theirs), atol=1e-6, rtol=1e-5)
    opposite = load(folder, normalize=not normalize)
    assert opposite.model.config.normalize != normalize


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode": ["mean", "cls"]}, r"pools by mean and cls; allowed: one of mean, cls, max, last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "pools by mean and max"),
        ({"pooling_mode": "weightedmean"}, "pools by weightedmean; allowed: .* set model.pooling"),
        ({"pooling_mode_weightedmean_tokens": True}, "pools by pooling_mode_weightedmean_tokens; allowed"),
        ({"pooling_mode": None}, "pools by nothing"),
        ({}, "pools by nothing"),
        ("{", r"1_Pooling/config.json is not JSON"),
    ],
)
def test_poolings_that_are_not_known(
    tiny: dict[str, str], tmp_path: Path, pooling: Any, message: str
) -> None:
    folder = sentence_files(shutil.copytree(tiny["bert"], tmp_path / "m"), pooling, normalize=True)
    for refused in (load, lambda path: pooling_of(ModelSettings(base=str(path)))):
        with pytest.raises(ModelError, match=message) as caught:
            refused(folder)
        assert "\n" not in str(caught.value)
    if pooling != "{":
        config = load(folder, pooling="max").model.config
        assert (config.pooling, config.normalize) == ("max", True)


def test_a_folder_that_pools_nothing(tiny: dict[str, str], tmp_path: Path) -> None:
    """modules.json without a pooling is that of another kind of model."""
    folder = shutil.copytree(tiny["bert"], tmp_path / "m")
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Transformer"}]))
    assert pooling_of(ModelSettings(base=str(folder))) is None
    with pytest.raises(
        ModelError, match=r"model.normalize = true: .* does not say how it is pooled; set mod"
    ):
        load(folder, normalize=True)


# --- by hand ---


def configuration(kind: str) -> Any:
    import transformers as t

    common: dict[str, Any] = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "distilbert":
        return t.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, **common
        )
    common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    common["max_position_embeddings"] = 66
    if kind == "modernbert":
        return t.ModernBertConfig(cls_token_id=1, sep_token_id=2, **common)
    kinds = {
        "bert": t.BertConfig, "roberta": t.RobertaConfig, "mpnet": t.MPNetConfig, "electra": t.ElectraConfig,
        "deberta-v2": t.DebertaV2Config,
    }  # fmt: skip
    return kinds[kind](**common)


ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "electra", "modernbert", "deberta-v2")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny encoders, and of the same as masked language models ("bert, masked")."""
    import transformers as t

    folders, tokenizer = {}, tiny_tokenizer()
    for kind in ENCODERS:
        for name, loader in ((kind, t.AutoModel), (f"{kind}, masked", t.AutoModelForMaskedLM)):
            torch.manual_seed(3)
            folders[name] = tmp_path_factory.mktemp("encoders") / name.replace(", ", "-")
            loader.from_config(configuration(kind)).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
    return folders


def by_hand(folder: Path, pooling: str, *, normalize: bool) -> torch.Tensor:
    """Vectors of one text at a time, with nothing but transformers and numpy's words for poolings."""
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    encoder, rows = t.AutoModel.from_pretrained(folder).eval(), []
    for text in TEXTS:
        with torch.no_grad():
            output = encoder(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        states = output.last_hidden_state[0].numpy()
        if pooling == "pooler":
            vector = output.pooler_output[0].numpy()
        elif pooling in ("mean", "max"):
            vector = getattr(states, pooling)(axis=0)
        else:
            vector = states[0 if pooling == "first" else -1]
        rows.append(vector / np.linalg.norm(vector) if normalize else vector)
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("pooling", ["mean", "first", "max", "last"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_each_pooling_of_each_encoder(encoders: dict[str, Path], kind: str, pooling: str) -> None:
    """The shortcut of poolings by the first token included; the encoder's own weights, whatever head its
    checkpoint has.
    """
    for name, normalize in ((kind, False), (f"{kind}, masked", True)):
        base = load(encoders[name], pooling=pooling, normalize=normalize)
        assert base.head == ("classifier",)
        vectors = by_hand(encoders[name], pooling, normalize=normalize)
        expected = base.model.classifier(vectors)
        torch.testing.assert_close(logits_of(base, TEXTS), expected, atol=1e-5, rtol=1e-4)


def test_the_poolers_of_encoders(encoders: dict[str, Path]) -> None:
    base = load(encoders["bert"], pooling="pooler", normalize=True)
    vectors = by_hand(encoders["bert"], "pooler", normalize=True)
    torch.testing.assert_close(logits_of(base, TEXTS), base.model.classifier(vectors), atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="a distilbert model has no pooling layer"):
        load(encoders["distilbert"], pooling="pooler")
    with pytest.raises(
        ModelError, match=r"cannot load .*: no weights for pooler\.dense\.bias of the encoder"
    ):
        load(encoders["bert, masked"], pooling="pooler")


def test_an_encoder_without_weights_is_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoders["bert"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no weights for encoder\.layer\.1\.output\.dense\.weight of the enc"
    ):
        load(folder, pooling="mean")


def test_without_a_pooling_the_architecture_has_its_own_head(tiny: dict[str, str]) -> None:
    from transformers import BertForSequenceClassification

    assert isinstance(load(tiny["bert"]).model, BertForSequenceClassification)
    assert resolved(load_recipe({"model": {"base": tiny["bert"]}})).model.pooling == "auto"


# --- what is saved ---

ELSEWHERE = """
import json, sys
sys.modules["fedcustom"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts, trust = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust).eval()
batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    print(json.dumps([model(**batch).logits.tolist(), model.config.id2label]))
"""


def elsewhere(folder: Path, *, trust: bool) -> subprocess.CompletedProcess[str]:
    """The saved model's logits, in a process that has neither this package nor a hub."""
    return run_python(ELSEWHERE, json.dumps([str(folder), TEXTS, trust]))


@pytest.mark.parametrize("kind", ["bert", "mpnet", "modernbert, masked"])
def test_what_is_saved_loads_without_this_package(
    encoders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    base = load(encoders[kind], pooling="mean", normalize=True)
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    done = elsewhere(tmp_path / "saved", trust=True)
    assert done.returncode == 0, done.stderr
    rows, labels = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(rows), logits_of(base, TEXTS), atol=1e-6, rtol=1e-5)
    assert list(labels.values()) == list(LABELS)
    config = (tmp_path / "saved" / "config.json").read_text()
    assert str(encoders[kind].parent) not in config


def test_code_that_nobody_trusts_is_not_run(encoders: dict[str, Path], tmp_path: Path) -> None:
    base = load(encoders["bert"], pooling="mean")
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / FILE).write_text("raise SystemExit('was run')\n")
    done = elsewhere(tmp_path / "saved", trust=False)
    assert done.returncode == 1
    assert "trust_remote_code" in done.stderr
    assert "was run" not in done.stderr
    # This package has the class itself, and needs no code from the folder, trusted or not.
    for trust in (False, True):
        again = load(tmp_path / "saved", trust_remote_code=trust)
        assert type(again.model) is PooledClassifier
        torch.testing.assert_close(logits_of(again, TEXTS), logits_of(base, TEXTS))


OWN_CODE = """
from transformers import BertConfig
class OwnConfig(BertConfig):
    model_type = "bert"
"""


def test_trust_changes_no_pooling(sentence: str, tmp_path: Path) -> None:
    """That of an architecture which transformers knows; one with code of its own has its own head."""
    trusted = load(sentence, trust_remote_code=True)
    torch.testing.assert_close(logits_of(trusted, TEXTS), logits_of(load(sentence), TEXTS), rtol=0, atol=0)
    folder = Path(shutil.copytree(sentence, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (folder / "own.py").write_text(OWN_CODE)
    assert pooling_of(ModelSettings(base=str(folder), trust_remote_code=True)) is None
    with pytest.raises(
        ModelError, match=r"model.pooling = 'mean': .* brings code of its own, whose own head"
    ):
        load(folder, trust_remote_code=True, pooling="mean")


def test_a_saved_classifier_is_a_base_for_the_next(encoders: dict[str, Path], tmp_path: Path) -> None:
    """With its pooling, and its head where the labels are as many."""
    first = load(encoders["electra, masked"], pooling="max", normalize=True)
    first.model.save_pretrained(tmp_path / "saved")
    first.tokenizer.save_pretrained(tmp_path / "saved")
    said = pooling_of(ModelSettings(base=str(tmp_path / "saved")))
    assert said is not None
    assert (said.name, said.normalize) == ("max", True)
    second = load(tmp_path / "saved")
    torch.testing.assert_close(logits_of(second, TEXTS), logits_of(first, TEXTS))
    second.model.save_pretrained(tmp_path / "saved")  # beside the code that it was loaded with
    torch.testing.assert_close(logits_of(load(tmp_path / "saved"), TEXTS), logits_of(first, TEXTS))
    unpooled = load(tmp_path / "saved", pooling="mean", normalize=False).model.config
    assert (unpooled.pooling, unpooled.normalize) == ("mean", False)
    whole = PooledClassifier.from_pretrained(tmp_path / "saved")
    assert (whole.config.pooling, whole.config.normalize, whole.config.id2label[2]) == (
        "max",
        True,
        LABELS[2],
    )


def test_a_loss_and_the_states_in_front(encoders: dict[str, Path]) -> None:
    """With labels there is a loss; the first states can be left out."""
    model = load(encoders["bert"], pooling="mean").model
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    output = model(input_ids=ids, labels=torch.tensor([0, 2]))
    expected = -output.logits.log_softmax(1)[[0, 1], [0, 2]].mean()
    torch.testing.assert_close(output.loss, expected)
    model.config.skip = 2
    with torch.no_grad():
        states = model.encoder(input_ids=ids).last_hidden_state
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, model.classifier(states[:, 2:].mean(dim=1)))


# --- recipes ---


def test_a_layer_behind_the_pooling_is_refused(tiny: dict[str, str], tmp_path: Path) -> None:
    """Vectors without it are not those that the package was trained for; whoever names a pooling knows."""
    folder = sentence_files(
        shutil.copytree(tiny["bert"], tmp_path / "m"), {"pooling_mode_mean_tokens": True}, normalize=False
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"has a Dense layer behind its pooling, .* allowed: one of mean, "):
        load(folder)
    assert load(folder, pooling="mean").model.config.pooling == "mean"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "llama",
            {"pooling": "mean"},
            r"model.pooling = 'mean': is for encoders; .* is a decoder, .* 'last'",
        ),
        ("gpt2", {"pooling": "first"}, "is a decoder"),
        ("llama", {"normalize": True}, "model.normalize: is for encoders"),
        ("bart", {"pooling": "mean"}, r"is an encoder-decoder, .*\(model.pooling = 'auto'\)"),
    ],
)
def test_what_decoders_do_not_have(
    tiny: dict[str, str], kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(tiny[kind], **settings)
    assert "\n" not in str(caught.value)


def test_decoders_are_read_at_the_last_token(tiny: dict[str, str]) -> None:
    plain, said = load(tiny["llama"]), load(tiny["llama"], pooling="last")
    assert type(said.model) is type(plain.model)
    torch.testing.assert_close(logits_of(said, TEXTS), logits_of(plain, TEXTS))


def test_a_pooling_that_there_is_not(sentence: str) -> None:
    with pytest.raises(RecipeError, match=r"model.pooling = 'mode'.*mean.*first.*max.*last.*pooler"):
        load_recipe({}, {"model.pooling": "mode"})
    with pytest.raises(ValueError, match="pooling 'mode': allowed: mean, first, max, last, pooler"):
        PooledClassifier.from_encoder(sentence, [], pooling="mode")


def test_a_complete_recipe_says_how_states_are_pooled(sentence: str, generation: dict[str, Any]) -> None:
    recipe = resolved(load_recipe({"model": {"base": sentence}}))
    assert (recipe.model.pooling, recipe.model.normalize) == ("mean", True)
    assert resolved(recipe) == recipe
    assert load_recipe({**recipe.model_dump()}) == recipe
    assert 'pooling = "mean"' in to_toml(recipe)
    half = resolved(load_recipe({"model": {"base": sentence, "normalize": False}})).model
    assert (half.pooling, half.normalize) == ("mean", False)
    other = resolved(load_recipe({"model": {"base": sentence, "pooling": "first"}})).model
    assert (other.pooling, other.normalize) == ("first", True)
    for values in (
        generation,
        {"model": {"base": sentence}, "method": {"name": "prompt_engineering"}},
        {"model": {"base": "./is-not-there"}},
        {"model": {"base": sentence, "trust_remote_code": True}},
    ):
        model = resolved(load_recipe(values)).model
        assert (model.pooling, model.normalize) == ("auto", None)


def test_predictions_of_a_sentence_model(sentence: str) -> None:
    """By the method's own way, from text to logits."""
    method = make(sentence, "prefix", length=3, init="zero")
    scores = method.predict(
        method.initialise(), [Example(text, label=0) for text in TEXTS], texts=False
    ).scores
    assert scores.shape == (4, 3)
    assert np.isfinite(scores).all()

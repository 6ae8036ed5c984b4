"""Adapters, (IA)^3, BitFit and p-tuning: each against a computation with transformers or PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcustom.core.errors import ModelError, RunError
from fedcustom.core.tensors import Tensors, equal
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.methods import Client, State, WeightTuning, Work, registry
from fedcustom.methods.messages import typed
from fedcustom.methods.tuning.feed_forward import find_feed_forward
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.methods.tuning.reparametrisation import Network, Reparametrised
from fedcustom.methods.tuning.technique import prepare_precision
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings
from helpers.methods import LABELS, MODELS, RATE, examples_for, make
from helpers.plain import logits, plain, plain_batch

WIDTH = 6
WIDER = {
    "bert": {"intermediate_size": 48 + WIDTH},
    "llama": {"intermediate_size": 48 + WIDTH},
    "gpt2": {"n_inner": 4 * 32 + WIDTH},
    "bart": {"encoder_ffn_dim": 48 + WIDTH, "decoder_ffn_dim": 48 + WIDTH},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adapter": {"width": WIDTH},
    "ia3": {},
    "bitfit": {"norms": False},
    "bitfit-norms": {"norms": True},
    "ln_tuning": {},
}
GRID = [
    (model, method)
    for method in SETTINGS
    for model in MODELS
    if (model, method) != ("llama", "bitfit")  # has no biases
]
on_the_grid = pytest.mark.parametrize(("model", "method"), GRID, ids=["-".join(entry) for entry in GRID])


def build(tiny: dict[str, str], model: str, method: str, **training: Any) -> WeightTuning:
    name = method.partition("-")[0]
    return make(tiny[model], name, MODELS[model], training=training, **SETTINGS[method])


def perturbed(tensors: Tensors) -> Tensors:
    """Other values for all tensors, so that none has a gradient of zero."""
    generator = torch.Generator().manual_seed(5)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


def train_one_step(ours: WeightTuning, tensors: Tensors, examples: list[Example]) -> Tensors:
    """The tensors after one step on all examples at once."""
    task = ours.configure(State(tensors), 1, {"here": Work(epochs=1)})["here"]
    update = ours.execute(task, Client("here", ClientData("here", examples)))
    assert typed(update, TrainUpdate).steps == 1
    assert update.tensors.keys() == tensors.keys()
    return ours.trainable.read()


def plain_adapter(base: Any, model: str, tensors: Tensors) -> tuple[Any, dict[str, Tensor]]:
    """A model of transformers with wider feed-forward networks, and where the adapter's numbers are in it."""
    config = type(base.config).from_dict({**base.config.to_dict(), **WIDER[model]})
    wide, narrow, masks = type(base)(config).eval(), base.state_dict(), {}
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            small, (module, _, kind) = narrow[name], name.rpartition(".")
            if small.shape == parameter.shape:
                trained = name in tensors
                parameter.copy_(tensors[name] if trained else small)
                masks[name] = torch.full(parameter.shape, trained)
                continue
            parameter[tuple(slice(0, size) for size in small.shape)] = small
            axis = next(i for i, size in enumerate(small.shape) if size != parameter.shape[i])
            masks[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            masks[name].narrow(axis, small.shape[axis], WIDTH).fill_(True)
            extra = tensors[f"{module}.adapter.{kind}"]
            place = parameter.narrow(axis, small.shape[axis], WIDTH)
            place.copy_(extra if extra.shape == place.shape else extra.T)
    return wide, masks


def plain_ia3(base: Any, model: str, tensors: Tensors) -> tuple[Any, dict[str, Tensor]]:
    import peft

    kinds = {"bert": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM"}
    return filled(peft.get_peft_model(base, peft.IA3Config(task_type=kinds.get(model, "CAUSAL_LM"))), tensors)


def plain_bitfit(base: Any, tensors: Tensors, norms: bool) -> tuple[Any, dict[str, Tensor]]:
    for name, parameter in base.named_parameters():
        scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
        parameter.requires_grad_(name.endswith(".bias") or "classifier" in name or (norms and scale))
    return filled(base, tensors)


def plain_ln_tuning(base: Any, model: str, tensors: Tensors) -> tuple[Any, dict[str, Tensor]]:
    import peft

    kinds = {"bert": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM"}
    names = [name for name, _ in base.named_parameters() if "norm" in name.lower() or ".ln_" in name]
    layers = sorted({name.rpartition(".")[0] for name in names})
    config = peft.LNTuningConfig(task_type=kinds.get(model, "CAUSAL_LM"), target_modules=layers)
    return filled(peft.get_peft_model(base, config), tensors)


def filled(model: Any, tensors: Tensors) -> tuple[Any, dict[str, Tensor]]:
    trained = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    masks = {n: torch.full(p.shape, p.requires_grad) for n, p in model.named_parameters()}
    return model.eval(), masks


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")


def plain_reference(path: str, model: str, method: str, tensors: Tensors) -> tuple[Any, dict[str, Tensor]]:
    base = plain(path, MODELS[model], model)
    if method == "adapter":
        return plain_adapter(base, model, tensors)
    if method == "ia3":
        return plain_ia3(base, model, tensors)
    if method == "ln_tuning":
        return plain_ln_tuning(base, model, tensors)
    return plain_bitfit(base, tensors, method == "bitfit-norms")


@on_the_grid
def test_the_start_is_the_base_model(tiny: dict[str, str], model: str, method: str) -> None:
    kind = MODELS[model]
    batch = plain_batch(tiny[model], kind, model, examples_for(kind)[:4])
    expected = logits(plain(tiny[model], kind, model), batch)
    torch.testing.assert_close(
        logits(build(tiny, model, method).trainable.model, batch), expected, rtol=0, atol=1e-6
    )


@on_the_grid
def test_a_step_equals_a_plain_step_and_changes_nothing_else(
    tiny: dict[str, str], model: str, method: str
) -> None:
    kind, path = MODELS[model], tiny[model]
    examples = examples_for(kind)[:4]
    ours = build(tiny, model, method)
    start = perturbed(ours.initialise().tensors)
    reference, masks = plain_reference(path, model, method, start)
    batch = plain_batch(path, kind, model, examples)
    ours.trainable.write(start)
    torch.testing.assert_close(
        logits(ours.trainable.model.eval(), batch), logits(reference, batch), rtol=1e-5, atol=1e-5
    )

    optimizer = torch.optim.AdamW(reference.parameters(), lr=RATE, weight_decay=0.0)
    reference.requires_grad_(True)
    reference(**batch).loss.backward()
    known: dict[str, Tensor] = {}
    for name, parameter in reference.named_parameters():
        parameter.grad = parameter.grad.where(masks[name], 0) if parameter.grad is not None else None
        # A first step of Adam is the gradient's sign; where that is rounding noise, as for the biases of
        # keys, there is nothing to compare.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        known[name] = gradient.abs() > 1e-7
    optimizer.step()

    before = {name: p.detach().clone() for name, p in ours.trainable.model.named_parameters()}
    trained = train_one_step(ours, start, examples)
    compared = 0
    for name, parameter in reference.named_parameters():
        module, _, kind_of = name.rpartition(".")
        key = plain_name(name)
        if key not in trained and f"{module}.adapter.{kind_of}" not in trained:
            continue
        new, sure = parameter.detach(), known[name]
        if key in trained:
            mine = trained[key]
        else:
            axis = next(i for i in range(new.dim()) if not masks[name].select(i, 0).any())
            mine = trained[f"{module}.adapter.{kind_of}"]
            new, sure = (t.narrow(axis, t.shape[axis] - WIDTH, WIDTH) for t in (new, sure))
            mine = mine if mine.shape == new.shape else mine.T
        torch.testing.assert_close(mine[sure], new[sure], rtol=0, atol=1e-5)
        compared += int(sure.sum())
    assert compared > 0.5 * sum(t.numel() for t in trained.values())

    mine = {id(p) for p in ours.trainable.parameters.values()}
    for name, parameter in ours.trainable.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in mine)
        if id(parameter) not in mine:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None
    marks = {"adapter": ".adapter.", "ia3": ".ia3_l", "bitfit": "bias", "bitfit-norms": "", "ln_tuning": ""}[
        method
    ]
    assert all(marks in name or name.startswith("classifier.") for name in trained)


@on_the_grid
def test_the_export_loads_without_this_package(
    tiny: dict[str, str], tmp_path: Path, model: str, method: str
) -> None:
    kind = MODELS[model]
    ours = build(tiny, model, method)
    state = State(perturbed(ours.initialise().tensors))
    ours.export(state, tmp_path)
    if method in ("ia3", "ln_tuning"):
        import peft

        loaded = peft.PeftModel.from_pretrained(plain(tiny[model], kind, model), str(tmp_path)).eval()
    else:
        loaded = plain(tmp_path, kind, model)
        assert type(loaded) is type(plain(tiny[model], kind, model))
        config = json.loads((tmp_path / "config.json").read_text())
        for key, size in WIDER[model].items() if method == "adapter" else ():
            assert config[key] == size
    batch = plain_batch(tiny[model], kind, model, examples_for(kind))
    expected = logits(ours.trainable.model, batch)  # the method goes on as before after it has saved
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    assert equal(ours.trainable.read(), state.tensors)
    assert equal(build(tiny, model, method).open(tmp_path).tensors, state.tensors)


def test_sizes(tiny: dict[str, str]) -> None:
    head = 32 * 3 + 3
    for model, method, expected in [
        ("bert", "adapter", (2 * (WIDTH * 32 + WIDTH + 32 * WIDTH), head)),
        ("llama", "adapter", (2 * 3 * WIDTH * 32, 0)),
        ("gpt2", "adapter", (2 * (WIDTH * 32 + WIDTH + 32 * WIDTH), 0)),
        ("bart", "adapter", (4 * (WIDTH * 32 + WIDTH + 32 * WIDTH), 0)),
        ("bert", "ia3", (2 * (32 + 32 + 32 + 48), head)),  # PEFT also rescales what leaves the attention
        ("llama", "ia3", (2 * (16 + 16 + 48), 0)),
        ("gpt2", "ia3", (2 * (96 + 128), 0)),
        ("bart", "ia3", ((2 + 4) * 2 * 32 + 4 * 48, 0)),
        ("llama", "bitfit-norms", (5 * 32, 0)),
        ("gpt2", "bitfit", (2 * (96 + 32 + 128 + 32) + 5 * 32, 0)),
    ]:
        ours = build(tiny, model, method)
        assert ours.sizes(ours.initialise()) == expected, (model, method)


# --- what does not fit ---


def saved(folder: Path, tiny: dict[str, str], model: Any) -> str:
    import transformers as t

    model.save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(tiny["bert"]).save_pretrained(folder)
    return str(folder)


def test_models_without_biases_are_refused(tiny: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"it has no biases; set method.norms = true to train normalisation"):
        make(tiny["llama"], "bitfit", "generation", norms=False)


def test_networks_whose_width_is_no_setting_are_refused(tiny: dict[str, str], tmp_path: Path) -> None:
    import transformers as t

    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ModelError, match=r"method adapter does not fit .* bloom code .* use method lora"):
        make(saved(tmp_path / "bloom", tiny, bloom), "adapter", "generation")
    # One matrix that holds both ways into the hidden units grows by two rows, which are not its last.
    phi = t.Phi3ForCausalLM(
        t.Phi3Config(
            vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=48, pad_token_id=0,
        )
    )  # fmt: skip
    path = saved(tmp_path / "phi", tiny, phi)
    with pytest.raises(ModelError, match="method adapter does not fit"):
        make(path, "adapter", "generation")
    with pytest.raises(ModelError, match=r"name them in method.feedforward_modules"):
        make(path, "ia3", "generation")
    named = make(path, "ia3", "generation", feedforward_modules=["down_proj"])
    assert {n.split(".")[-2] for n in named.initialise().tensors} == {"qkv_proj", "down_proj"}


def base_of(path: str, kind: str = "classification", dtype: str = "float32") -> Base:
    labels = LABELS if kind == "classification" else ()
    settings = ModelSettings(base=path, dtype=dtype)  # type: ignore[arg-type]
    return load_base(settings, LearningTask(kind, labels), 0)  # type: ignore[arg-type]


def test_networks_are_found_where_all_widths_are_equal(tiny: dict[str, str], tmp_path: Path) -> None:
    import transformers as t

    square = t.BertModel(
        t.BertConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
        )
    )
    found = find_feed_forward(base_of(saved(tmp_path, tiny, square)))
    assert found is not None
    assert found.inputs == ("bert.encoder.layer.0.intermediate.dense",)
    assert found.outputs == ("bert.encoder.layer.0.output.dense",)
    assert found.wider(3) == {"intermediate_size": 35}


def test_a_gated_network_has_two_ways_in(tiny: dict[str, str]) -> None:
    found = find_feed_forward(base_of(tiny["llama"], "generation"))
    assert found is not None
    assert {name.split(".")[-1] for name in found.inputs} == {"gate_proj", "up_proj"}
    assert {name.split(".")[-1] for name in found.outputs} == {"down_proj"}


def test_an_adapter_of_another_width_is_not_opened(tiny: dict[str, str], tmp_path: Path) -> None:
    ours = make(tiny["bert"], "adapter", width=3)
    ours.export(ours.initialise(), tmp_path)
    with pytest.raises(RunError, match=r"intermediate_size = 51; with method.width = 4 it must be 52"):
        make(tiny["bert"], "adapter", width=4).open(tmp_path)


def test_ia3_chooses_for_models_that_peft_does_not_know(tiny: dict[str, str], tmp_path: Path) -> None:
    import transformers as t

    config = t.DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    path = saved(tmp_path, tiny, t.DistilBertModel(config))
    shapes = {n: tuple(p.shape) for n, p in make(path, "ia3").initialise().tensors.items() if "ia3" in n}
    layer = "distilbert.transformer.layer.0"
    assert shapes == {
        f"{layer}.attention.k_lin.ia3_l": (32, 1),
        f"{layer}.attention.v_lin.ia3_l": (32, 1),
        f"{layer}.ffn.lin2.ia3_l": (1, 48),
    }


def test_ia3_rescales_the_inputs_of_feed_forward_matrices_that_a_recipe_names(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    import peft

    ours = make(tiny["llama"], "ia3", "generation", target_modules=["q_proj", "down_proj"])
    shapes = {n.split(".")[-2]: tuple(p.shape) for n, p in ours.initialise().tensors.items()}
    assert shapes == {"q_proj": (32, 1), "down_proj": (1, 48)}
    alone = make(tiny["llama"], "ia3", "generation", target_modules=["q_proj"])
    alone.export(alone.initialise(), tmp_path)
    model = peft.PeftModel.from_pretrained(plain(tiny["llama"], "generation", "llama"), str(tmp_path))
    assert model.peft_config["default"].target_modules == {"q_proj"}


def test_a_reparametrised_prefix_opens(tiny: dict[str, str], tmp_path: Path) -> None:
    ours = make(tiny["bert"], "prefix", length=3, reparametrise=True, reparametrise_width=8)
    state = State(perturbed(ours.initialise().tensors))
    ours.export(state, tmp_path)
    assert equal(
        make(tiny["bert"], "prefix", length=3, reparametrise=True).open(tmp_path).tensors, state.tensors
    )


# --- precision ---


@pytest.mark.parametrize(("method", "settings"), [("adapter", {"width": 3}), ("bitfit", {"norms": True})])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_what_was_trained_is_not_rounded_when_frozen_weights_are(
    tiny: dict[str, str], tmp_path: Path, model: str, method: str, settings: dict[str, Any]
) -> None:
    kind = MODELS[model]
    settings_class, technique = registry.settings_of(method), registry.methods()[method].load()

    def attached() -> Any:
        base = base_of(tiny[model], kind, "bfloat16")
        original = list(base.model.parameters())
        tuned = technique(settings_class(**settings)).attach(base, 0)
        prepare_precision(base, original)
        return tuned

    tuned = attached()
    values = perturbed(tuned.read())
    tuned.write(values)
    dtypes = {name: p.dtype for name, p in tuned.model.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    tuned.save(tmp_path)
    assert {name: p.dtype for name, p in tuned.model.named_parameters()} == dtypes
    again = attached()
    again.load(tmp_path)
    assert equal(again.read(), values)
    assert plain(tmp_path, kind, model).dtype == torch.float32


# --- p-tuning ---


def test_an_lstm_runs_in_float32_where_the_model_does_not() -> None:
    tokens = Reparametrised(torch.nn.Embedding(3, 8), Network("lstm", 4, seed=0))
    tokens.restart()
    torch.nn.init.normal_(tokens.output.weight)
    with torch.autocast("cpu", torch.bfloat16):
        prompt = tokens(torch.zeros(2, 3))
    torch.testing.assert_close(prompt[1].float(), tokens.materialised(), rtol=0, atol=0.05)
    prompt.sum().backward()
    assert tokens.codes.grad is not None
    assert tokens.codes.grad.any()


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_prompt_encoder_stays_at_the_client(
    tiny: dict[str, str], tmp_path: Path, model: str, encoder: str
) -> None:
    """With hidden states H, of (length, width), one step of SGD on W2 and b2, which start at zero, moves the
    prompt by -rate (H H^T + 1) G, with G its gradient in plain prompt tuning; other layers have none yet.
    """
    import peft

    kind, path = MODELS[model], tiny[model]
    training = {"optimizer": "sgd", "learning_rate": 0.3}
    through = make(path, "soft_prompt", kind, training=training, length=3, encoder=encoder, encoder_width=16)
    without = make(path, "soft_prompt", kind, training=training, length=3)
    start = through.initialise().tensors
    assert equal(start, without.initialise().tensors)
    own = {n.removeprefix("reparametrisation."): p for n, p in through.trainable.parameters.items()}
    hidden = own["codes"].detach().clone()
    if encoder == "lstm":
        lstm = torch.nn.LSTM(16, 16, num_layers=2, bidirectional=True)
        lstm.load_state_dict({n.removeprefix("recurrent."): p for n, p in own.items() if "recurrent" in n})
        hidden = lstm(hidden[:, None])[0][:, 0].detach()  # a batch of one sequence
    hidden = hidden @ own["hidden.weight"].detach().T + own["hidden.bias"].detach()
    hidden = hidden.relu() if encoder == "lstm" else hidden.tanh()

    examples = examples_for(kind)[:4]
    trained = train_one_step(through, start, examples)
    kinds = {"bert": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM"}
    reference = peft.get_peft_model(
        plain(path, kind, model),
        peft.PromptTuningConfig(task_type=kinds.get(model, "CAUSAL_LM"), num_virtual_tokens=3),
    ).eval()
    weight = reference.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(start["soft_prompt"])
    reference(**plain_batch(path, kind, model, examples)).loss.backward()
    expected = start["soft_prompt"] - 0.3 * (hidden @ hidden.T + 1) @ weight.grad
    torch.testing.assert_close(trained["soft_prompt"], expected, rtol=1e-5, atol=1e-6)
    assert (expected - start["soft_prompt"]).abs().max() > 1e-4

    # It is started anew: the same work from the same state gives the same.
    assert equal(train_one_step(through, start, examples), trained)
    # What travels acts without the encoder as it did with it, and is an ordinary adapter of PEFT.
    batch = plain_batch(path, kind, model, examples)
    acted = logits(through.trainable.model, batch)
    without.trainable.write(trained)
    torch.testing.assert_close(logits(without.trainable.model, batch), acted)
    through.export(State(trained), tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain(path, kind, model), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, batch), acted, rtol=1e-5, atol=1e-5)
    again = make(path, "soft_prompt", kind, length=3, encoder=encoder, encoder_width=16)
    assert equal(again.open(tmp_path).tensors, trained)

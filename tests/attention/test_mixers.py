"""`isolate_mixers`: packed equals one at a time, recomputed and trained too; what is not packed is left alone."""

import copy
import importlib
import warnings
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packlib.attention import isolate_mixers, lines, mixer_waste, register_attention
from packlib.attention.convolutions import causal_conv1d
from packlib.attention.lines import group_segments
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.isolation import check_equivalence, check_isolation
from packlib.isolation.probe import packed_batch
from packlib.lab.small_models import small_config, small_model
from tests.attention.cases import features, packed

LENGTHS = (9, 4, 13, 1)
KINDS = {  # what carries something from token to token: a convolution, a state, linear attention, token shifts, ALiBi
    "lfm2": {"Lfm2ShortConv"},
    "mamba": {"MambaMixer"},
    "recurrent_gemma": {"RecurrentGemmaRecurrentBlock"},
    "qwen3_next": {"Qwen3NextGatedDeltaNet"},
    "minimax": {"MiniMaxLightningAttention"},
    "rwkv": {"RwkvSelfAttention", "ZeroPad2d"},
    "bloom": {"BloomAttention"},
}
# Attention for models that do not take packlib_varlen; None: what they have.
OTHER_ATTENTION = dict.fromkeys(("rwkv", "bloom", "mpt", "prophetnet"))


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention("sdpa")


def build(model_type, dtype=torch.float64, **options):
    with warnings.catch_warnings(action="ignore"):
        return small_model(model_type, OTHER_ATTENTION.get(model_type, "packlib_varlen"), dtype, **options)


def on_transformers_own(model):
    """The model, on attention that does not refuse packed rows where mixers are not isolated."""
    if model.config._attn_implementation == "packlib_varlen":
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained_on(model, *batches):
    """Losses of a few batches, all forwards before the backward, and every parameter's gradient."""
    model.train().zero_grad()
    losses = [model(**batch).loss for batch in batches]
    sum(losses).backward()
    return [loss.item() for loss in losses], gradients(model)


def labelled(lengths=LENGTHS, seed=0):
    return FlatteningCollator()(features(lengths, seed))


def apart(one, other):
    floor = max(float(g.norm()) for g in one.values()) * 1e-3
    return max(float((one[name] - other[name]).norm()) / max(float(one[name].norm()), floor) for name in one)


# Exact


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_equals_one_at_a_time(model_type):
    model, examples = build(model_type), features(LENGTHS)
    as_it_was = small_model(model_type, None, torch.float64)
    try:
        (leaky,) = check_equivalence(as_it_was, examples, weightings=["per_token"])
    except ValueError as refusal:
        assert "causal_conv1d" in str(refusal) and model_type in ("lfm2", "qwen3_next")
    else:
        assert leaky.gradient_error > 1e-3
    wrapped = isolate_mixers(model)
    assert set(wrapped.values()) == KINDS[model_type]
    assert all(type(model.get_submodule(name)).__name__ == kind for name, kind in wrapped.items())
    (equal,) = check_equivalence(model, examples, weightings=["per_token"])
    assert equal.gradient_error < 1e-5 and equal.loss_packed == pytest.approx(
        equal.loss_alone, rel=1e-6
    )  # the loss is float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_isolation_proves_it(dtype):
    model = build("minimax", dtype)
    assert "isolate_mixers(model) first" in check_isolation(model).reason
    assert check_isolation(small_model("minimax", "sdpa", dtype)).verdict == "leak"
    isolate_mixers(model)
    assert check_isolation(model).isolated


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_sees_its_own_segments(reentrant):
    model = build("minimax")
    isolate_mixers(model)
    batches = labelled(), labelled((12, 3, 14), seed=1)  # the second is under way when the first goes back
    plain = trained_on(model, *batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with mock.patch.object(lines, "_unflatten", wraps=lines._unflatten) as spy:
        losses, recomputed = trained_on(model, *batches)
        calls = spy.call_count
        trained_on(model.eval(), *batches)
    assert losses == plain[0] and apart(plain[1], recomputed) < 1e-9 and calls == spy.call_count / 2 > 0


def test_a_checkpoint_of_another_kind_is_refused():
    model = build("mamba")
    isolate_mixers(model)
    layer = model.backbone.layers[0]
    own = layer.forward
    layer.forward = lambda *a, **k: torch.utils.checkpoint.checkpoint(own, *a, **k, use_reentrant=False)
    with pytest.raises(ValueError, match="MambaMixer is computed again in backward, by a checkpoint that"):
        trained_on(model, labelled())


def test_a_copy_has_its_own_weights():
    model = build("mamba")
    isolate_mixers(model)
    batch = packed(features(LENGTHS))
    with torch.no_grad():
        before, twin = model(**batch).logits, copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(**batch).logits, before) and not model(**batch).logits.any()


def test_losses_are_those_of_padding_step_for_step():
    """Eight steps of AdamW on a hybrid: padded, packed with isolated mixers, packed without."""
    losses = {}
    for arm in ("padded", "isolated", "leaky"):
        attention = "sdpa" if arm == "leaky" else "packlib_varlen"
        model = small_model("minimax", attention, torch.float64, seed=3)
        collator = PaddingCollator() if arm == "padded" else FlatteningCollator()
        if arm == "isolated":
            isolate_mixers(model)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        losses[arm] = []
        for step in range(8):
            batch = dict(collator(features((9, 20, 14), seed=step)))
            labels = batch.pop("labels")
            logits = model(**batch | {"use_cache": False}).logits.flatten(0, 1)
            count = (labels != -100).sum()
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels.flatten()[1:], reduction="sum") / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[arm].append(loss.item())
    assert losses["isolated"] == pytest.approx(losses["padded"], rel=1e-5)
    assert losses["leaky"] != pytest.approx(losses["padded"], rel=1e-3)


# Nothing else changes


@pytest.mark.parametrize("model_type", ["minimax", "lfm2"])
def test_padded_batches_and_generation_are_what_they_were(model_type):
    with warnings.catch_warnings(action="ignore"):
        model = small_model(model_type, "sdpa")
        as_it_was = copy.deepcopy(model)
        register_attention()
    isolate_mixers(model)
    right = PaddingCollator()(features())
    left = {name: value.flip(1) for name, value in right.items()}
    for batch in (right, left):
        for m in (model, as_it_was):
            m.train().zero_grad()
        a, b = ([*trained_on(m, batch)] for m in (model, as_it_was))
        assert a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in b[1])
    prompt = torch.tensor([features()[0]["input_ids"]])
    one, other = (m.eval().generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, as_it_was))
    assert torch.equal(one, other) and one.shape == (1, prompt.shape[1] + 6)


def test_a_model_without_mixers_is_not_touched():
    model = build("llama")
    assert isolate_mixers(model) == {}
    assert not any("forward" in vars(module) for module in model.modules()) and not model.training


def test_modes_and_random_numbers_are_left_alone():
    model = build("mamba").train()
    model.backbone.layers[1].eval()
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    isolate_mixers(model)
    assert torch.equal(torch.rand(1), before)
    assert model.training and model.backbone.layers[0].training and not model.backbone.layers[1].mixer.training


def test_lengths_known_on_the_host_are_not_asked_of_the_device():
    """Boundaries that are on the CPU stay there: the lines of all layers come from one layout."""
    model = build("mamba")
    isolate_mixers(model)
    with mock.patch.object(lines.Segments, "_lay_out", autospec=True, side_effect=lines.Segments._lay_out) as spy:
        model(**packed(features(LENGTHS)))
    assert spy.call_count == 1 < model.config.num_hidden_layers


# What cannot be


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cu_seq_lens_q": None}, "position_ids restart inside a row, but no boundaries reached the mixers"),
        ({"attention_mask": torch.ones(1, 27)}, "cu_seq_lens_q and an attention_mask"),
        ({"use_cache": True}, "cu_seq_lens_q and a cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 26])}, r"segments of 26 tokens for rows of shape \(1, 27\)"),
        (
            {"input_ids": torch.ones(2, 27, dtype=torch.int64)},
            r"rows of shape \(2, 27\); expected a flat row \[1, 27\]",
        ),
    ],
)
def test_batches_without_clear_boundaries_are_refused(change, reason):
    model = build("minimax")
    isolate_mixers(model)
    batch = {k: v for k, v in packed(features()).items() if k != "use_cache"}
    model(**batch)
    with pytest.raises(ValueError, match=reason):
        model(**batch | change)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("prophetnet", "lets packed examples see each other, and no module of it can be isolated"),
        ("roberta", r"does not give packed examples the logits that they have alone .* position_ids_start"),
        ("gpt_oss", "does not take a packed row: GptOssAttention passes s_aux"),
    ],
)
def test_models_that_cannot_be_isolated_are_refused_and_left_as_they_were(model_type, reason):
    model = build(model_type)
    with pytest.raises(ValueError, match=reason):
        isolate_mixers(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_isolating_twice_and_lines_shorter_than_their_segments_are_refused():
    model = build("mamba")
    with pytest.raises(ValueError, match=r"max_waste = 0.5; expected at least 1"):
        isolate_mixers(model, max_waste=0.5)
    isolate_mixers(model)
    with pytest.raises(ValueError, match="has isolated mixers already"):
        isolate_mixers(model)


# Positions


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_learned_positions_begin_anew(model_type):
    model = build(model_type)
    (equal,) = check_equivalence(model, features(), weightings=["per_token"])
    assert equal.gradient_error < 1e-9
    batch = packed(features())
    with torch.no_grad():
        through = model(**batch | {"position_ids": torch.arange(27)[None]}).logits
        assert (model(**batch).logits - through).abs().max() > 0.1


def test_positions_that_do_not_start_at_zero():
    model = build("roberta")
    assert check_isolation(model).verdict == "shifted"
    collator = FlatteningCollator(position_ids_start=model.config.pad_token_id + 1)
    assert check_isolation(model, batch_builder=lambda examples: packed_batch(examples, collator)).isolated


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon"])
def test_alibi_reaches_no_kernel(model_type):
    """Without `isolate_mixers` the bias grows through the row: varlen attention refuses these models."""
    with pytest.raises(ValueError, match="computes attention by itself and never calls 'packlib_varlen'"):
        small_model(model_type, "packlib_varlen")


@pytest.mark.parametrize("seen", [True, False])
def test_alibi_of_falcon_begins_anew(seen):
    """Falcon takes either kind of positions; its masks say True where a token is seen, MPT's where it is not."""
    config = small_config("falcon")
    config.alibi = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval() if seen else build("mpt")
    isolate_mixers(model)
    (equal,) = check_equivalence(model, features(LENGTHS), weightings=["per_token"])
    assert equal.gradient_error < 1e-5


# Cost


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60).filter(any), st.floats(1, 3))
def test_waste_is_bounded(lengths, max_waste):
    groups = group_segments(lengths, max_waste)
    assert sorted(i for group in groups for i in group) == [i for i, n in enumerate(lengths) if n]
    slots = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    assert mixer_waste(lengths, max_waste) == slots / sum(lengths) <= max_waste + 1e-9
    heads = [lengths[group[0]] for group in groups]
    assert all(first >= second * max_waste * 0.999 for first, second in pairwise(heads)) or max_waste == 1


def test_waste_is_what_a_mixer_is_given():
    model = build("mamba")
    isolate_mixers(model)
    slots = []
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(
        lambda module, args, output: slots.append(output.shape[:2].numel())
    )
    model(**packed(features(LENGTHS)))
    assert len(slots) > 1 and sum(slots) == pytest.approx(mixer_waste(LENGTHS) * sum(LENGTHS))
    assert mixer_waste(LENGTHS) <= 1.25 < max(LENGTHS) * len(LENGTHS) / sum(LENGTHS)  # of one call


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type_is_exact_or_refused(model_type):
    """Whatever leaks or is refused as it is, of all that transformers builds."""
    for attention in ("packlib_varlen", "sdpa", None):
        try:
            model = small_model(model_type, attention, torch.float64)
            break
        except Exception as error:
            reason = str(error)
    else:
        pytest.skip(f"not built: {reason}")
    if check_isolation(model).isolated:
        return
    try:
        wrapped = isolate_mixers(model)
    except ValueError as refusal:
        assert str(refusal)
        return
    report = check_isolation(model)
    assert wrapped and report.isolated and report.error <= 1e-5, (wrapped, report)
    for equal in check_equivalence(model, features(LENGTHS)):
        assert equal.gradient_error < 1e-5, equal


# Convolutions that take boundaries


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_a_convolution_with_boundaries_is_that_of_each_segment(taps):
    """Against PyTorch's own, one segment at a time; segments shorter than the kernel among them."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 5, sum(LENGTHS)), (5, taps), (5,))
    )
    seq_idx = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS))[None]
    onto = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def own(segment):
        convolved = torch.nn.functional.conv1d(segment, weight[:, None], bias, padding=taps - 1, groups=5)
        return torch.nn.functional.silu(convolved[..., : segment.shape[-1]])

    results = {
        "boundaries": causal_conv1d(x, weight, bias, seq_idx, "silu"),
        "alone": torch.cat([own(segment) for segment in x.split(LENGTHS, -1)], -1),
        "leaky": own(x),
    }
    found = {k: [out, *torch.autograd.grad(out, (x, weight, bias), onto)] for k, out in results.items()}
    for mine, alone in zip(found["boundaries"], found["alone"]):
        torch.testing.assert_close(mine, alone, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found["leaky"][0], found["alone"][0]) == (taps == 1)


@pytest.fixture
def own_convolutions(monkeypatch):
    """What the process computes convolutions with, put back afterwards."""
    for model_type in ("lfm2", "qwen3_next"):
        file = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        monkeypatch.setattr(file, "causal_conv1d_fn", file.causal_conv1d_fn)


def test_short_convolutions_need_no_lines(own_convolutions):
    model, lines_model = build("lfm2"), build("lfm2")
    assert set(isolate_mixers(lines_model).values()) == {"Lfm2ShortConv"}
    assert isolate_mixers(model, native=True) == {}
    batch = labelled()
    with mock.patch.object(lines, "_unflatten", wraps=lines._unflatten) as spy:
        one, gradients_one = trained_on(model, batch)
        assert not spy.called
        other, gradients_other = trained_on(lines_model, batch)
        assert spy.called
    assert one == pytest.approx(other, rel=1e-6) and apart(gradients_one, gradients_other) < 1e-6
    assert check_isolation(model).isolated
    with pytest.raises(ValueError, match="cu_seq_lens_q and no seq_idx"):
        model(**{name: value for name, value in batch.items() if name != "seq_idx"})


def test_what_still_leaks_beside_its_convolution_is_on_lines(own_convolutions):
    model = build("qwen3_next")
    assert set(isolate_mixers(model, native=True).values()) == {"Qwen3NextGatedDeltaNet"}
    assert check_isolation(model).isolated


def test_convolutions_without_boundaries_are_what_they_were(own_convolutions):
    model = small_model("lfm2", "sdpa")
    batch = PaddingCollator()(features())
    before = trained_on(model, batch)
    isolate_mixers(model.eval(), native=True)
    after = trained_on(model, batch)
    assert before[0] == after[0] and all(torch.equal(after[1][name], before[1][name]) for name in before[1])

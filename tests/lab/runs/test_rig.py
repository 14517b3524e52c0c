"""The rig: what a `Rig` asks of a model and of a trainer. It changes how a step runs, not what it computes."""

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from packlib.attention import kernels, register_attention
from packlib.collators import FlatteningCollator
from packlib.lab import models
from packlib.lab.data.corpora import load_corpus
from packlib.lab.runs import rig, worker
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.small_models import small_model
from packlib.lab.strategies import get_strategy
from packlib.losses import token_weights, weighted_loss


def small(name="tiny-llama"):
    return models.build_model(name, layers=1, vocab_size=64, seed=3)


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel at the boundary: it notes what it is asked for."""
    module = ModuleType("liger_kernel.transformers")
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module.asked = []
    module._apply_liger_kernel_to_instance = lambda model, **options: module.asked.append(options)
    for name, stand_in in {
        "liger_kernel": ModuleType("liger_kernel"),
        module.__name__: module,
        patch.__name__: patch,
    }.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    module.types = patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    return module


def test_the_default_rig_leaves_everything_as_it_is(liger):
    model = small()
    before, forward = {name: value.clone() for name, value in model.state_dict().items()}, model.forward
    rig.prepare(model, Rig())
    assert liger.asked == [] and model.forward == forward
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rig.trainer_settings(Rig())["gradient_checkpointing"] is False
    assert rig.adapters(Rig()) is None and rig.flat_shapes(Rig(), 256, 8) == {}


def test_recomputation_is_the_trainers():
    settings = rig.trainer_settings(Rig(recompute="all"))
    assert settings["gradient_checkpointing"] is True
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_fused_layers_leave_the_loss_and_the_weights_alone(liger):
    fused = small()
    rig.prepare(fused, Rig(liger=True))
    (asked,) = liger.asked
    assert asked["cross_entropy"] is False and asked["fused_linear_cross_entropy"] is False
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), small().parameters()))


def test_fused_layers_are_refused_where_liger_has_none(liger):
    liger.types.clear()
    liger.types["mistral"] = None
    with pytest.raises(ValueError, match="liger: liger-kernel has no layers for llama; it has mistral"):
        rig.prepare(small(), Rig(liger=True))
    assert liger.asked == []


def test_fused_layers_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="liger_kernel"):
        rig.prepare(small(), Rig(liger=True))


def batch(lengths=(9, 4, 14)):
    generator = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(0, 64, (n,), generator=generator).tolist()} for n in lengths]
    return FlatteningCollator()(examples)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_fused_loss_is_the_sum_of_the_plain_ones():
    """And its gradients are the plain ones', whether every token weighs alike or every example."""
    model, inputs = small(), batch()
    count = int((inputs["labels"] != -100).sum())
    plain = model(**inputs).loss
    plain.backward()
    expected = gradients(model)
    rig.prepare(model, Rig(fused_loss=True))
    assert torch.allclose(model(**inputs).loss, plain), "without being asked it is the model it was"
    summed = model(**inputs, summed_loss=True)
    (summed / count).backward()
    found = gradients(model)
    assert float(summed.detach()) == pytest.approx(count * float(plain.detach()), rel=1e-5)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    weights, total = token_weights(inputs["labels"], inputs["cu_seq_lens_q"], "per_example")
    weighted = model(**inputs, summed_loss=True, loss_weights=weights).detach()
    truth = weighted_loss(model(**inputs).logits, inputs["labels"], weights, total).detach()
    assert float(weighted / total) == pytest.approx(float(truth), rel=1e-5)
    assert float(weighted / total) != pytest.approx(float(plain.detach()), rel=1e-4), "another weighting, another loss"


def test_a_fused_loss_is_refused_where_the_model_does_more_to_its_logits():
    with pytest.raises(ValueError, match="fused_loss: Gemma2ForCausalLM changes its logits by final_logit_softcapping"):
        rig.prepare(small_model("gemma2"), Rig(fused_loss=True))


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_the_lean_optimiser_takes_the_steps_of_adamw(max_norm):
    """Clipping included; and what is not clipped differs from what is."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(7))] for _ in range(2))
    lean, adamw = rig.LeanAdamW(ours, zero=True, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn(a.shape, generator=generator)
            a.grad = b.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert torch.allclose(lean.fold_clip(max_norm), expected)
        lean.step()
        adamw.step()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))
        assert all(float(a.grad.abs().max()) == 0 for a in ours), "zeroed where they lie"
    unclipped = torch.nn.Parameter(torch.ones(7))
    unclipped.grad = torch.full((7,), 10.0)
    assert not torch.allclose(unclipped, ours[1])


def test_a_gradient_that_a_rank_has_none_of_is_zero_in_the_mean():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        used.grad = torch.tensor([1.0, 2.0, 3.0])
        rig.average_over_ranks([used, unused])
    finally:
        dist.destroy_process_group()
    assert used.grad.tolist() == [1, 2, 3] and unused.grad.tolist() == [0, 0, 0]


def test_pads_make_the_shapes_of_batches_repeat():
    options = rig.flat_shapes(Rig(pad_to=32), max_tokens=64, segments=3)
    collator = FlatteningCollator(**options)
    shapes = {rig.shape_of(collator([{"input_ids": [1] * n}, {"input_ids": [2] * m}])) for n, m in ((5, 9), (20, 3))}
    assert len(shapes) == 1
    bare = {rig.shape_of(FlatteningCollator()([{"input_ids": [1] * n}])) for n in (5, 20)}
    assert len(bare) == 2, "the negative control"


def test_adapters_leave_the_weights_untrained():
    pytest.importorskip("peft")
    from peft import get_peft_model

    model = get_peft_model(small(), rig.adapters(Rig(lora_rank=2)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_float8_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match="torchao"):
        rig.prepare(small(), Rig(float8=True, compile="layers"))


# Through SFTTrainer: whatever the rig, the same steps


@pytest.fixture
def graphs_only(monkeypatch):
    """Layers are traced, joined with their backward and cut by the budget as ever; no code is generated for them."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled(self, backend="aot_eager", **o))
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        yield
    torch._dynamo.reset()


TRAINING = RunSpec(
    corpus="arithmetic",
    tokenizer="bpe:512",
    strategy="minibatch_packing",
    limit=24,
    layers=1,
    batch_size=3,
    max_tokens=128,
    gradient_accumulation=2,
    steps=2,
    warmup_steps=1,
)
CORPUS = {"name": TRAINING.corpus} | TRAINING.corpus_options
BEST = {"compile": "layers", "recompute": 0.5, "fused_loss": True, "pad_to": 32}


def trained(**options):
    trace = worker.measure(replace(TRAINING, rig=Rig(**options)), lambda line: None)["trace"]
    return np.array([trace["loss"], trace["grad_norm"]])


@pytest.fixture(scope="module")
def eager():
    return trained()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "all"},
        {"fused_loss": True},
        pytest.param({"compile": "layers", "recompute": "all"}, marks=pytest.mark.slow),
        BEST,
    ],
    ids=str,
)
def test_every_rig_takes_the_steps_of_the_plain_trainer(options, eager, graphs_only):
    assert np.allclose(trained(**options), eager, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "seen"), [("bf16_mixed", torch.bfloat16), ("float32", torch.float32)])
def test_micro_batches_are_captured_under_autocast_although_no_training_has_begun(dtype, seen, tmp_path):
    spec = replace(TRAINING, dtype=dtype, rig=Rig(fused_loss=True))
    strategy, corpus, device = get_strategy(spec.strategy), load_corpus(**CORPUS), torch.device("cpu")
    dataset, _ = worker.planned(spec, strategy, corpus)
    collator, _ = worker.collation(spec, strategy, corpus, dataset)
    trainer = rig.LabTrainer(
        worker.build(spec, corpus, register_attention("sdpa"), device)[0],
        worker.trainer_config(spec, strategy, device, str(tmp_path)),
        train_dataset=dataset,
        processing_class=worker.placeholder_tokenizer(corpus),
        data_collator=collator,
        rig=spec.rig,
    )
    outputs = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: outputs.append(output.dtype))
    trainer._forward_backward(collator([dataset[0]]), torch.ones(()))
    assert outputs == [seen]


def test_another_seed_takes_other_steps(eager):
    """The negative control: the tolerance above is not wide enough for another order of the examples."""
    other = worker.measure(replace(TRAINING, seed=1), lambda line: None)["trace"]
    assert not np.allclose([other["loss"], other["grad_norm"]], eager, rtol=2e-5)


@pytest.mark.slow
def test_adapters_compose_with_the_rest_of_a_rig(eager, graphs_only):
    plain = trained(lora_rank=2)
    assert np.allclose(trained(lora_rank=2, **BEST), plain, rtol=2e-5)
    assert not np.allclose(plain[1], eager[1], rtol=2e-5), "adapters have other gradients"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compile": "layers"}, BEST], ids=str)
def test_generated_code_takes_the_steps_of_the_plain_trainer(options, eager, monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes that outlive the test
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        assert np.allclose(trained(**options), eager, rtol=2e-5)


@pytest.mark.slow
def test_eager_layers_in_bfloat16_round_the_effect_of_young_adapters_away(monkeypatch):
    """What is left of the adapters' effect in float32, in the mean of 12 draws: why LoRA's compiled rungs differ."""
    from peft import get_peft_model

    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()

    def adapted(dtype, compiled=False):
        model = models.build_model(
            "tiny-llama", layers=2, vocab_size=64, seed=3, attn_implementation=register_attention("sdpa")
        )
        model = model.to(torch.bfloat16).to(dtype)
        torch.manual_seed(0)
        found = get_peft_model(model, rig.adapters(Rig(lora_rank=16))).eval()
        for p in found.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        if compiled:
            rig.compile_layers(model, dynamic=False)
        return found

    @torch.no_grad()
    def logits(model, scale, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
        return model(**packed((20, 30, 14), to=64)).logits.float()

    ways = [adapted(torch.float32), adapted(torch.bfloat16), adapted(torch.bfloat16, compiled=True)]
    without = [logits(model, 0.0) for model in ways]

    def left(scale):
        shares = []
        for seed in range(12):
            truth, *others = (logits(model, scale, seed) - base for model, base in zip(ways, without))
            shares.append([float((other * truth).sum() / truth.square().sum()) for other in others])
        return np.mean(shares, axis=0)

    eager, compiled = left(5e-5)
    assert eager < 0.65 < 0.7 < compiled
    assert np.allclose(left(1e-3), 1, atol=0.02), "the negative control: adapters twenty times as large"
    torch._dynamo.reset()


# Compiled layers


def packed(lengths, room=8, to=32):
    examples = [{"input_ids": [(7 * i + n) % 60 for i in range(n)]} for n in lengths]
    options = {"pad_to_multiple_of": to, "pad_segments_to": room, "max_seqlen_multiple_of": to}
    return FlatteningCollator(**options)(examples)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_other_boundaries_of_the_same_shape_are_not_compiled_again(kernel):
    """No graph break (fullgraph), one graph for all layers and boundaries; another shape makes another one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = (
        models.build_model(
            "tiny-llama", layers=2, vocab_size=64, seed=3, attn_implementation=register_attention(kernel)
        )
        for _ in range(2)
    )
    for layer in rig.decoder_layers(model):
        layer.compile(dynamic=False, fullgraph=True, backend=counter)
    for lengths in ((9, 4, 14), (20, 3), (1, 1, 1, 25)):
        inputs = packed(lengths)
        loss, expected = model(**inputs).loss, plain(**inputs).loss
        loss.backward()
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        truth = gradients(plain)
        assert all(torch.allclose(value, truth[name], atol=1e-6) for name, value in gradients(model).items())
    assert counter.frame_count == 1
    model(**packed((40, 3)))
    assert counter.frame_count == 2, "the negative control: 64 tokens instead of 32"
    torch._dynamo.reset()


def test_a_budget_keeps_less_for_backward(graphs_only):
    def kept(budget):
        torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = 1.0
        model, inputs, sizes = small(), packed((50, 60, 9), to=128), []
        rig.prepare(model, Rig(compile="layers", recompute=budget), one_shape=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            model(**inputs)
        return sum(sizes)

    assert kept(0.01) < kept(0.5) < kept("none")


def attention_calls(monkeypatch, **options):
    """How often two compiled layers run attention's forward in forward, and in forward and backward together."""
    calls, run = [], kernels._sdpa
    monkeypatch.setattr(kernels, "_sdpa", lambda *a: calls.append(1) or run(*a))
    torch._dynamo.reset()
    model = models.build_model(
        "tiny-llama", layers=2, vocab_size=64, seed=3, attn_implementation=register_attention("sdpa")
    )
    for layer in rig.decoder_layers(model):
        layer.compile(dynamic=False, **options)
    loss = model(**packed((9, 4, 14))).loss
    forward = len(calls)
    loss.backward()
    torch._dynamo.reset()
    return forward, len(calls)


@pytest.mark.parametrize(("kept", "expected"), [(True, (2, 2)), (False, (2, 4))])
def test_attention_is_not_computed_again_within_a_budget(kept, expected, monkeypatch):
    """Unasked, PyTorch computes it again: it knows no FLOPs of the operator (the negative control)."""

    def cut(joint, inputs, **options):
        if kept:
            rig.KeepAttention()(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=cut)
    with torch._functorch.config.patch(activation_memory_budget=0.2):
        assert attention_calls(monkeypatch, backend=backend) == expected


@pytest.mark.slow
def test_inductor_keeps_attention_within_a_budget(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setattr(torch._inductor.config, "joint_custom_pre_pass", rig.KeepAttention())
    with torch._functorch.config.patch(activation_memory_budget=0.2):
        assert attention_calls(monkeypatch) == (2, 2)


# Shapes


def test_the_shapes_of_a_plan_are_known_before_it_is_trained():
    spec = replace(TRAINING, rig=Rig(pad_to=32))
    corpus, strategy = load_corpus(spec.corpus, **spec.corpus_options), get_strategy(spec.strategy)
    dataset, _ = worker.planned(replace(spec, steps=None), strategy, corpus)
    collator, shapes = worker.collation(spec, strategy, corpus, dataset)
    seen = {rig.shape_of(collator([dataset[i]])) for i in range(len(dataset))}
    assert {rig.shape_of(batch) for batch in shapes} == seen
    bare, none = worker.collation(replace(spec, rig=Rig()), strategy, corpus, dataset)
    assert none == [] and len({rig.shape_of(bare([dataset[i]])) for i in range(len(dataset))}) > len(seen)


def test_pads_change_shapes_and_nothing_else():
    model, examples = small(), [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8]}]
    bare = FlatteningCollator()(examples)
    padded = FlatteningCollator(pad_to_multiple_of=16, pad_segments_to=6, max_seqlen_multiple_of=8)(examples)
    assert padded["input_ids"].shape == (1, 16) and padded["cu_seq_lens_q"].tolist() == [0, 5, 8, 16, 16, 16, 16]
    assert padded["max_length_q"] == 8 and bare["max_length_q"] == 5
    assert torch.equal(padded["labels"][:, 8:], torch.full((1, 8), -100))
    seen, alone = (model(**batch | {"use_cache": False}) for batch in (padded, bare))
    assert torch.allclose(seen.loss, alone.loss) and torch.allclose(seen.logits[:, :8], alone.logits, atol=1e-6)
    with pytest.raises(ValueError, match="the batch has 2 segments; expected at most pad_segments_to = 1"):
        FlatteningCollator(pad_segments_to=1)(examples)
